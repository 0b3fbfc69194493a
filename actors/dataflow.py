"""Rows on their way to the teachers: Ray Data streams them from files, the pool's actors answer, answers come in file order.

Reading is a generator over row batches (`nexus.data.loader.iter_records`), so a file is never whole in memory and bad rows reach
the quarantine with their place. The batches of all works are read in turn, one Dataset at a time, so that all teachers have work at
once; what a teacher's replicas answer is given out in the order of its rows, whichever of them was faster.
"""

from __future__ import annotations

import itertools
import pickle  # nosec B403 # values of our own tasks within one Ray session, whose own RPC is pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from actors.pool import TeacherPool
from nexus.data.loader import iter_records
from nexus.data.media import usable
from nexus.data.quarantine import Quarantine
from nexus.data.records import Record
from nexus.errors import NexusError, StageFailedError
from nexus.towers.rows import RowsError

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
    """Readable rows at the front that are already done, answered or rejected."""
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
    """The rows that were answered."""
    positions: tuple[int, ...]
    """Place of each of them among the readable rows of the work, counted from 0 at their front."""
    num_rejected: int
    """Rows of the batch that the teacher cannot take; they are in the quarantine."""
    result: Any
    """None when no row was answered."""


@dataclass(frozen=True)
class _Asked:
    """A batch that a teacher has to answer."""

    key: Hashable
    records: tuple[Record, ...]
    positions: tuple[int, ...]
    rejected: tuple[Record, ...] = ()


class _Reader:
    """Ray Data UDF: the works in, their record batches out, one of each work in turn."""

    def __init__(self, works: tuple[TeacherWork, ...], quarantine_dir: str, max_bad_share: float) -> None:
        self._works = works
        self._quarantine_dir = quarantine_dir
        self._max_bad_share = max_bad_share

    def __call__(self, _: dict[str, np.ndarray]) -> Iterator[dict[str, list[Any]]]:
        waiting = deque((index, self._batches(work)) for index, work in enumerate(self._works))
        while waiting:
            index, batches = waiting.popleft()
            try:
                records = next(batches, None)
            except NexusError as error:
                # Carried to the driver as a value: an exception here would be wrapped by Ray Data, and retried.
                yield {"work": [index], "payload": [pickle.dumps(error)]}
                return
            if records is not None:
                yield {"work": [index], "payload": [pickle.dumps(records)]}
                waiting.append((index, batches))

    def _batches(self, work: TeacherWork) -> Iterator[tuple[Record, ...]]:
        rows = work_rows(work, Quarantine(Path(self._quarantine_dir), self._max_bad_share))
        while records := tuple(itertools.islice(rows, work.batch_size)):
            yield records


def work_rows(work: TeacherWork, quarantine: Quarantine) -> Iterator[Record]:
    """The rows of a work item in file order; those that cannot be read go to the quarantine.

    Which rows these are depends on the files alone, never on what a teacher rejected: a continued run meets the same ones.

    Raises:
        DataError: a file cannot be read, or too many of its rows.
    """
    records: Iterable[Record] = iter_records(
        [Path(path) for path in work.paths], capability=work.capability, quarantine=quarantine
    )
    end = None if work.max_rows is None else work.skip_rows + work.max_rows
    return itertools.islice(usable(records, quarantine), work.skip_rows, end)


def stream_answers(
    works: Sequence[TeacherWork],
    *,
    pool: TeacherPool,
    quarantine_dir: Path,
    max_bad_share: float,
    timeout_s: float,
    name: str,
    check: Callable[[], None] | None = None,
) -> Iterator[TeacherAnswer]:
    """The answers of each work in the order of its rows; `check` is called while waiting for rows and may raise to end the wait.

    Rows that a teacher cannot take go to the quarantine. Every teacher of `pool` has as many batches in flight as it can take, and no
    more answers wait here than that.

    Args:
        timeout_s: longest wait for rows.
        name: of the Dataset, on Ray's dashboard.

    Raises:
        NexusError: what reading or a teacher raised, or too many rows of a file that a teacher cannot take; answers to the rows
            before have been yielded by then.
    """
    stream = _AnswerStream(works, pool, Quarantine(quarantine_dir, max_bad_share), name)
    try:
        yield from stream.run(_read(works, quarantine_dir, max_bad_share, timeout_s, name, check))
    finally:
        stream.leave()


def _read(
    works: Sequence[TeacherWork],
    quarantine_dir: Path,
    max_bad_share: float,
    timeout_s: float,
    name: str,
    check: Callable[[], None] | None,
) -> Iterator[tuple[int, tuple[Record, ...]]]:
    """(work, records) of all works, each in turn."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Its own limit counts the time in which nobody asks for rows, because the teachers are busy; `_watched` keeps one that does not.
    context.execution_no_progress_timeout_s = -1
    reader = _Reader(tuple(works), str(quarantine_dir), max_bad_share)
    dataset: ray.data.Dataset = ray.data.from_items([{"start": 0}], override_num_blocks=1)
    dataset = dataset.map_batches(reader.__call__, batch_size=1, num_cpus=1)
    dataset.set_name(name)
    for batch in _watched(dataset.iter_batches(batch_size=1, batch_format="numpy"), check, timeout_s):
        for index, payload in zip(batch["work"], batch["payload"], strict=True):
            content = pickle.loads(payload)  # nosec B301 # written by `_Reader`
            if isinstance(content, NexusError):
                raise content
            yield int(index), content


class _AnswerStream:
    """The batches of one stream that are with the teachers."""

    def __init__(self, works: Sequence[TeacherWork], pool: TeacherPool, quarantine: Quarantine, name: str) -> None:
        self._works = works
        self._pool = pool
        self._quarantine = quarantine
        self._keys = (("stream", name, number) for number in itertools.count())
        self._asked: list[deque[_Asked]] = [deque() for _ in works]
        self._last_rows: dict[str, int] = {}

    def run(self, batches: Iterator[tuple[int, tuple[Record, ...]]]) -> Iterator[TeacherAnswer]:
        failure: NexusError | None = None
        num_read = [0] * len(self._works)
        while True:
            try:
                batch = next(batches, None)
            except NexusError as error:
                batch, failure = None, error
            if batch is None:
                break
            index, records = batch
            first = self._works[index].skip_rows + num_read[index]
            num_read[index] += len(records)
            while self._is_full(self._works[index].teacher):
                yield from self._next_answer()
            self._asked[index].append(self._ask(index, records, tuple(range(first, first + len(records)))))
        while any(self._asked):
            yield from self._next_answer()
        if failure is not None:
            raise failure
        # The first rows of a file do not tell its share of bad ones.
        whole = {
            path
            for work, count in zip(self._works, num_read, strict=True)
            for path in work.paths
            if work.max_rows is None or count < work.max_rows
        }
        for file, row in self._last_rows.items():
            self._quarantine.check(file, row, final=file in whole)

    def leave(self) -> None:
        """Let go of what nobody waits for any more."""
        if any(self._asked):
            self._pool.forget()

    def _is_full(self, teacher: str) -> bool:
        held = sum(len(asked) for work, asked in zip(self._works, self._asked, strict=True) if work.teacher == teacher)
        return held >= self._pool.capacity(teacher)

    def _ask(
        self, index: int, records: tuple[Record, ...], positions: tuple[int, ...], rejected: tuple[Record, ...] = ()
    ) -> _Asked:
        work, key = self._works[index], next(self._keys)
        self._pool.submit(key, work.teacher, work.method, records, *work.arguments)
        return _Asked(key, records, positions, rejected)

    def _next_answer(self) -> Iterator[TeacherAnswer]:
        """Wait for the oldest batch of any work; nothing where its rows have to be asked for again."""
        heads = {asked[0].key: index for index, asked in enumerate(self._asked) if asked}
        index = heads[self._pool.collect_first(list(heads))]
        asked = self._asked[index].popleft()
        try:
            result = self._pool.collect(asked.key)
        except RowsError as error:
            bad = [record for record in asked.records if record.id in error.reasons]
            if not bad:
                raise
            for record in bad:
                self._quarantine.add_record(record, f"{error.what} Found {error.reasons[record.id]}.")
            places = zip(asked.records, asked.positions, strict=True)
            good = [(record, place) for record, place in places if record.id not in error.reasons]
            rejected = (*asked.rejected, *bad)
            if good:
                records, positions = zip(*good, strict=True)
                self._asked[index].appendleft(self._ask(index, records, positions, rejected))
                return
            asked, result = _Asked(asked.key, (), (), rejected), None
        for record in (*asked.records, *asked.rejected):
            assert record.source is not None, "records of the stream come from files"
            self._last_rows[record.source.file] = max(record.source.row, self._last_rows.get(record.source.file, 0))
        for file, row in self._last_rows.items():
            self._quarantine.check(file, row, final=False)
        yield TeacherAnswer(index, asked.records, asked.positions, len(asked.rejected), result)


@dataclass(frozen=True)
class _End:
    """Last thing that the reading thread says."""

    error: BaseException | None


def _watched(
    batches: Iterable[dict[str, Any]], check: Callable[[], None] | None, timeout_s: float
) -> Iterator[dict[str, Any]]:
    """The batches, read by another thread: Ray Data waits for the next one without end, and hears no signal meanwhile.

    Raises:
        StageFailedError: when none comes within `timeout_s`.
    """
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
        limit = time.monotonic() + timeout_s
        while True:
            if check:
                check()
            try:
                item = arrived.get(timeout=min(POLL_S, timeout_s))
            except queue.Empty:
                if time.monotonic() > limit:
                    raise StageFailedError(
                        f"Expected rows from Ray Data within {timeout_s:.0f} s, found none. Free a CPU of the cluster, and run the "
                        "same command again: completed work is kept."
                    ) from None
                continue
            if not isinstance(item, _End):
                yield item
                limit = time.monotonic() + timeout_s
            elif item.error is not None:
                raise item.error
            else:
                return
    finally:
        left.set()
