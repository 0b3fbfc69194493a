"""Ray Data pipelines: stream rows from files to the resident teachers, and their answers back in file order.

Reading is a generator over row batches (`nexus.data.loader.iter_records`), so a file is never whole in memory and bad rows reach
the quarantine with their place. The calling actors hold no CPU and no weights: they forward batches to the named teacher actors,
one hop through the object store. One Dataset runs at a time, in file order (`preserve_order`).
"""

from __future__ import annotations

import pickle  # nosec B403 # values of our own actors within one Ray session, whose own RPC is pickle
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy

from actors.pool import TeacherPool
from nexus.data.loader import iter_records
from nexus.data.media import usable
from nexus.data.quarantine import Quarantine
from nexus.data.records import Record
from nexus.errors import NexusError
from nexus.towers.rows import RowsError

CALLERS = 2
"""Actors that forward batches; two keep one teacher busy while the other's rows are being read."""

POLL_S = 0.5
"""Longest wait between two looks at the signals."""

READER = "nexus-data"
"""Name of the thread that waits for Ray Data."""


@dataclass(frozen=True)
class TeacherWork:
    """Rows of one capability for one teacher."""

    teacher: str
    capability: str
    paths: tuple[str, ...]
    skip_rows: int
    """Readable rows at the front that are already done."""
    max_rows: int | None
    method: str
    """Method of the teacher actor; it gets the records and `arguments`."""
    arguments: tuple[Any, ...]
    batch_size: int


@dataclass(frozen=True)
class TeacherAnswer:
    """What a teacher returned for one batch."""

    work: int
    """Index of the work item."""
    records: tuple[Record, ...]
    result: Any


@dataclass(frozen=True)
class _Reply:
    records: tuple[Record, ...]
    """The rows that were answered."""
    rejected: tuple[tuple[Record, str], ...]
    """Rows that the teacher cannot take, with the reason; the others were asked again without them."""
    answer: bytes | None
    """What the teacher said, still packed: unpacking it in the caller would load the libraries of its classes. None without a row
    that was answered."""


class _TeacherCaller:
    """Ray Data UDF: one row in is one pickled batch of records, one row out is the teacher's pickled answer."""

    def __init__(self, teachers: tuple[str, ...], timeout_s: float, max_retries: int) -> None:
        self._pool = TeacherPool.attach(teachers, window=2, timeout_s=timeout_s, max_retries=max_retries)
        self._calls = 0

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"work": [], "answer": []}
        for work_index, teacher, payload in zip(batch["work"], batch["teacher"], batch["payload"], strict=True):
            out["work"].append(int(work_index))
            out["answer"].append(pickle.dumps(self._ask(str(teacher), payload)))
        return out

    def _ask(self, teacher: str, payload: bytes) -> _Reply:
        content = pickle.loads(payload)  # nosec B301 # written by `_Reader`
        if isinstance(content, NexusError):
            return _Reply((), (), pickle.dumps(content))
        records, method, arguments = content
        rejected: list[tuple[Record, str]] = []
        while records:
            self._calls += 1
            self._pool.submit(self._calls, teacher, "packed", method, records, *arguments)
            try:
                return _Reply(records, tuple(rejected), self._pool.collect(self._calls))
            except RowsError as error:
                bad = [record for record in records if record.id in error.reasons]
                if not bad:
                    return _Reply((), tuple(rejected), pickle.dumps(error))
                rejected += [(record, f"{error.what} Found {error.reasons[record.id]}.") for record in bad]
                records = tuple(record for record in records if record.id not in error.reasons)
            except NexusError as error:
                # Carried to the driver as a value: an exception here would be wrapped by Ray Data, and retried.
                return _Reply((), tuple(rejected), pickle.dumps(error))
        return _Reply((), tuple(rejected), None)


class _Reader:
    """Ray Data UDF: one work item in, its record batches out, streamed."""

    def __init__(self, works: tuple[TeacherWork, ...], quarantine_dir: str, max_bad_share: float) -> None:
        self._works = works
        self._quarantine_dir = quarantine_dir
        self._max_bad_share = max_bad_share

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list[Any]]]:
        for index in batch["work"]:
            yield from self._read(int(index))

    def _read(self, index: int) -> Iterator[dict[str, list[Any]]]:
        work = self._works[index]
        quarantine = Quarantine(Path(self._quarantine_dir), self._max_bad_share)
        try:
            for records in _batched(work, quarantine):
                yield {
                    "work": [index],
                    "teacher": [work.teacher],
                    "payload": [pickle.dumps((records, work.method, work.arguments))],
                }
        except NexusError as error:
            yield {"work": [index], "teacher": [""], "payload": [pickle.dumps(error)]}


def _batched(work: TeacherWork, quarantine: Quarantine) -> Iterator[tuple[Record, ...]]:
    pending: list[Record] = []
    records = iter_records([Path(path) for path in work.paths], capability=work.capability, quarantine=quarantine)
    # Rows that the teacher rejected in an earlier run of this folder have no answer there: they are not among those to skip.
    known = (record for record in records if not quarantine.knows(record))
    for number, record in enumerate(usable(known, quarantine)):
        if number < work.skip_rows:
            continue
        if work.max_rows is not None and number >= work.skip_rows + work.max_rows:
            break
        pending.append(record)
        if len(pending) == work.batch_size:
            yield tuple(pending)
            pending = []
    if pending:
        yield tuple(pending)


def stream_answers(
    works: Sequence[TeacherWork],
    *,
    quarantine_dir: Path,
    max_bad_share: float,
    timeout_s: float,
    max_retries: int,
    name: str,
    check: Callable[[], None] | None = None,
) -> Iterator[TeacherAnswer]:
    """Answers in the order of the works and of their rows; `check` is called while waiting and may raise to end the wait.

    Rows that a teacher cannot take go to the quarantine.

    Raises:
        NexusError: what reading or a teacher raised, or too many rows of a file that a teacher cannot take; earlier answers have
            been yielded by then.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # The default of 30 minutes would hide a hang; one batch is bounded by its own timeout and retries.
    context.execution_no_progress_timeout_s = int(timeout_s * (max_retries + 2)) + 120
    quarantine = Quarantine(quarantine_dir, max_bad_share)
    last_rows: dict[str, int] = {}
    teachers = tuple(dict.fromkeys(work.teacher for work in works))
    reader = _Reader(tuple(works), str(quarantine_dir), max_bad_share)
    dataset: ray.data.Dataset = ray.data.from_items(
        [{"work": index} for index in range(len(works))], override_num_blocks=len(works)
    )
    dataset = dataset.map_batches(reader.__call__, batch_size=1, num_cpus=1)
    dataset = dataset.map_batches(
        _TeacherCaller,
        fn_constructor_args=(teachers, timeout_s, max_retries),
        batch_size=1,
        num_cpus=0,
        compute=ActorPoolStrategy(size=min(CALLERS, len(works))),
    )
    dataset.set_name(name)
    for batch in _watched(dataset.iter_batches(batch_size=1, batch_format="numpy"), check):
        for work_index, payload in zip(batch["work"], batch["answer"], strict=True):
            reply: _Reply = pickle.loads(payload)  # nosec B301 # written by `_TeacherCaller`
            for record, reason in reply.rejected:
                quarantine.add_record(record, reason)
            for record in (*reply.records, *(record for record, _ in reply.rejected)):
                assert record.source is not None, "records of the stream come from files"
                last_rows[record.source.file] = max(record.source.row, last_rows.get(record.source.file, 0))
            for file, row in last_rows.items():
                quarantine.check(file, row, final=False)
            if reply.answer is None:
                continue
            result = pickle.loads(reply.answer)  # nosec B301 # written by `TeacherActor.packed`
            if isinstance(result, BaseException):
                raise result
            yield TeacherAnswer(int(work_index), reply.records, result)
    for file, row in last_rows.items():
        quarantine.check(file, row)


@dataclass(frozen=True)
class _End:
    """Last thing that the reading thread says."""

    error: BaseException | None


def _watched(batches: Iterable[dict[str, Any]], check: Callable[[], None] | None) -> Iterator[dict[str, Any]]:
    """The batches, read by another thread: Ray Data waits for the next one without end, and hears no signal meanwhile."""
    arrived: queue.Queue[dict[str, Any] | _End] = queue.Queue(maxsize=1)
    left = threading.Event()

    def put(item: dict[str, Any] | _End) -> bool:
        while not left.is_set():
            try:
                arrived.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
        except Exception as error:
            put(_End(error))
        else:
            put(_End(None))

    threading.Thread(target=read, name=READER, daemon=True).start()
    try:
        while True:
            if check:
                check()
            try:
                item = arrived.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return
    finally:
        left.set()
