"""Streams records out of Parquet, JSONL and CSV files, and batches them: nothing reads a file whole.

`iter_records` gives the records in the order of the files. `RecordBatches` (endless) and `SmartBatchLoader` (tokenised, bucketed by
length, one epoch per iteration) shuffle through a window of bounded rows and bytes: a window is filled from the files, permuted
with a generator seeded by (seed, epoch, window), and used up before the next is filled. The place to resume at is therefore the
place in the files where the window began and the number of units taken from it: a few integers, exact at any point.

Rows that look alike and lie together in a file stay within one window of each other: shuffle sorted files, or raise
`buffer_rows`. Files come in another order each epoch, and the first window has another size, so that neighbours change.

Ids: a row without an `id` gets `<file name without ending>:<row>`, with more of the path where two files would share that name. An
exact test for doubled ids needs memory that grows with the data, so it is not made while streaming; stages that key results by
id call `check_unique_ids` first (8 bytes per row).
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nexus.data.quarantine import Quarantine
from nexus.data.records import (
    PROMPT_COLUMNS,
    READ_COLUMNS,
    Record,
    RowError,
    Source,
    check_media_file,
    has_prompt_column,
    normalise_row,
)
from nexus.errors import ArtifactError, DataError

if TYPE_CHECKING:
    # Ray's reading workers stream records only: torch, which tokenised batches need, would cost each of them 150 MiB.
    from transformers import PreTrainedTokenizerBase

    from nexus.data.collate import PaddingSide, TokenBatch, TokenisedRow

logger = logging.getLogger(__name__)

DEFAULT_CAPABILITY = "text"
"""Capability of rows that name none, where the caller names none either."""

WINDOW_BATCHES = 32
"""Batches in a `SmartBatchLoader` window unless told otherwise: sorting by length within 32 batches leaves little padding."""
WINDOW_BYTES = 64 << 20
"""A window is closed early when its rows (media bytes, text and ids) take more: 256 photographs would not fit otherwise."""
CHUNK_ROWS = 64
"""Rows tokenised in one call: enough to hide the call's cost, few enough to hold undecoded."""
CHECK_EVERY = 1000
"""Rows between two looks at the share of bad rows."""

_PARQUET_BATCH_BYTES = 4 << 20
_PARQUET_BUFFER_BYTES = 4 << 10
"""A buffer makes pyarrow read page by page; without one it holds whole column chunks. Pages larger than the buffer empty it, while
smaller ones make pyarrow 26 lengthen it up to the compressed column chunk, so it is small."""
_MAX_LINE_BYTES = 64 << 20
"""A longer line is no row but a file without line ends; it is quarantined instead of held."""
_JSONL_PROBE_LINES = 100
"""Lines looked at to tell a file with other columns from a file with a few bad rows."""


# --- public -------------------------------------------------------------------------------------------------------------------


def iter_records(
    paths: Sequence[Path | str], *, capability: str | None, quarantine: Quarantine | None
) -> Iterator[Record]:
    """Every usable record of `paths`, in their order; media paths are made relative to the data file's folder.

    Args:
        capability: of the rows; None takes each row's own `capability` column, else DEFAULT_CAPABILITY.
        quarantine: where bad rows go; None makes the first bad row an error.

    Raises:
        DataError: at the call, for a missing, empty or unknown file or one without accepted columns; while iterating, when too
            many rows are bad or a Parquet file is damaged.
    """
    source = _RowSource(paths, capability=capability, quarantine=quarantine)
    return _all_records(source)


def check_unique_ids(paths: Sequence[Path | str], *, capability: str | None, quarantine: Quarantine | None) -> int:
    """Read all of `paths` once and return the number of usable rows. Takes 8 bytes of memory per row.

    Raises:
        DataError: naming the first id that two rows share.
    """
    hashes = np.fromiter(
        (_hash_of(record.id) for record in iter_records(paths, capability=capability, quarantine=quarantine)), np.uint64
    )
    num_rows = len(hashes)
    hashes.sort()
    doubled = set(hashes[:-1][hashes[1:] == hashes[:-1]].tolist())
    if doubled:
        seen: dict[str, Source | None] = {}
        for record in iter_records(paths, capability=capability, quarantine=quarantine):
            if _hash_of(record.id) not in doubled:
                continue
            if record.id in seen:
                raise DataError(
                    f"Expected every row to have its own id, found {record.id!r} {_place(seen[record.id])} and "
                    f"{_place(record.source)}. Rename one, or leave the id column out."
                )
            seen[record.id] = record.source
    return num_rows


class RecordBatches:
    """An endless stream of shuffled record batches: each epoch gives every usable row once.

    Batches always have `batch_size` rows; one that reaches the end of an epoch is filled from the next, so that a set smaller than a
    batch repeats rows within it.

    Args:
        seed: order of the rows; equal seeds give equal streams.
        buffer_rows: rows of the shuffle window.
        quarantine: where bad rows go; None makes the first bad row an error.

    Raises:
        DataError: as `iter_records`; from `next_batch` also when an epoch has no usable row.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        *,
        capability: str | None,
        batch_size: int,
        seed: int,
        buffer_rows: int = 1024,
        quarantine: Quarantine | None = None,
    ) -> None:
        _require_positive({"batch_size": batch_size, "buffer_rows": buffer_rows})
        self.batch_size = batch_size
        source = _RowSource(paths, capability=capability, quarantine=quarantine)
        settings = {"seed": seed, "batch_size": batch_size, "buffer_rows": buffer_rows}
        self._stream = _WindowStream[Record, Record](
            source, _RecordPlan(), seed=seed, window_rows=buffer_rows, multiple=1, settings=settings
        )

    @property
    def epoch(self) -> int:
        """Epochs that were completed."""
        return self._stream.epoch

    def next_batch(self) -> tuple[Record, ...]:
        """The next `batch_size` records."""
        batch: list[Record] = []
        while len(batch) < self.batch_size:
            record = self._stream.next_unit()
            if record is not None:
                batch.append(record)
        return tuple(batch)

    def state_dict(self) -> dict[str, object]:
        """Where the stream stands, as JSON values."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where `state` was taken.

        Raises:
            ArtifactError: when it was taken over other files or with other settings.
        """
        self._stream.load_state_dict(state)


class SmartBatchLoader:
    """Tokenised batches of rows of similar length, streamed.

    Iterating gives the rest of the current epoch: every usable row once, in batches of `batch_size` (the last of an epoch may be
    smaller). The next iteration is the next epoch, in another order. There is one position per loader: leaving a loop early and
    entering another continues behind the last batch that was given out.

    Args:
        paths: Parquet, JSONL or CSV files.
        max_length: longest row in tokens, prompt, completion and end of sequence together; longer rows are quarantined.
        shuffle_seed: None keeps windows in the order of the files (rows are still bucketed by length inside a window).
        quarantine_dir: folder for bad rows; None only counts and logs them.
        capability: of the rows; None takes each row's own `capability` column, else DEFAULT_CAPABILITY.
        max_bad_share: stop when more than this share of a file's rows is bad.
        padding_side: where padding goes.
        buffer_rows: rows of the window that is shuffled and bucketed, rounded up to whole batches; WINDOW_BATCHES batches by default.

    Raises:
        DataError: as `iter_records`; while iterating also when an epoch has no usable row.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        *,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int,
        shuffle_seed: int | None = None,
        quarantine_dir: Path | str | None = None,
        capability: str | None = None,
        max_bad_share: float = 1.0,
        padding_side: PaddingSide = "left",
        buffer_rows: int | None = None,
    ) -> None:
        # Loaded here and not in the middle of the stream.
        from nexus.data.collate import pad_rows

        if buffer_rows is None:
            buffer_rows = WINDOW_BATCHES * batch_size
        _require_positive({"batch_size": batch_size, "max_length": max_length, "buffer_rows": buffer_rows})
        self.quarantine = Quarantine(None if quarantine_dir is None else Path(quarantine_dir), max_bad_share)
        if tokenizer.eos_token_id is None:
            logger.warning("the tokenizer has no end-of-sequence token: completions end without one")
        self._pad_rows = pad_rows
        self._tokenizer = tokenizer
        self._padding_side: PaddingSide = padding_side
        settings = {
            "shuffle_seed": shuffle_seed,
            "batch_size": batch_size,
            "max_length": max_length,
            "buffer_rows": buffer_rows,
            "vocabulary": len(tokenizer),
        }
        self._stream: _WindowStream[TokenisedRow, tuple[TokenisedRow, ...]] = _WindowStream(
            _RowSource(paths, capability=capability, quarantine=self.quarantine),
            _TokenPlan(tokenizer, self.quarantine, batch_size=batch_size, max_length=max_length),
            seed=shuffle_seed,
            window_rows=-(-buffer_rows // batch_size) * batch_size,
            multiple=batch_size,
            settings=settings,
        )

    @property
    def epoch(self) -> int:
        """Epochs that were completed."""
        return self._stream.epoch

    def __iter__(self) -> Iterator[TokenBatch]:
        while (rows := self._stream.next_unit()) is not None:
            yield self._pad_rows(rows, self._tokenizer, padding_side=self._padding_side)

    def state_dict(self) -> dict[str, object]:
        """Where the loader stands, as JSON values: behind the last batch that was given out."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where `state` was taken; batches are then those of an undisturbed run.

        Raises:
            ArtifactError: when it was taken over other files or with other settings.
        """
        self._stream.load_state_dict(state)


# --- windows ------------------------------------------------------------------------------------------------------------------

ItemT = TypeVar("ItemT")
UnitT = TypeVar("UnitT", covariant=True)


class _Plan(Protocol[ItemT, UnitT]):
    """What a stream makes of a window of records."""

    def admit(self, records: Sequence[Record]) -> list[ItemT]:
        """The items of the records that can be used."""

    def num_bytes(self, item: ItemT) -> int:
        """About what an item holds in memory."""

    def arrange(self, items: list[ItemT], rng: np.random.Generator | None) -> Sequence[UnitT]:
        """The units of a window, in the order in which they are given out."""


class _RecordPlan:
    """Units are records, permuted."""

    def admit(self, records: Sequence[Record]) -> list[Record]:
        return list(records)

    def num_bytes(self, item: Record) -> int:
        return _record_bytes(item)

    def arrange(self, items: list[Record], rng: np.random.Generator | None) -> Sequence[Record]:
        return items if rng is None else [items[index] for index in rng.permutation(len(items))]


class _TokenPlan:
    """Units are batches of rows of similar length; batches are permuted, a smaller last one stays last."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, quarantine: Quarantine, *, batch_size: int, max_length: int
    ) -> None:
        self._tokenizer = tokenizer
        self._quarantine = quarantine
        self._batch_size = batch_size
        self._max_length = max_length

    def admit(self, records: Sequence[Record]) -> list[TokenisedRow]:
        from nexus.data.collate import check_length, tokenise_rows

        rows = []
        for row in tokenise_rows(records, self._tokenizer):
            try:
                check_length(row, self._max_length)
            except RowError as error:
                self._quarantine.add_record(row.record, str(error))
            else:
                rows.append(row)
        return rows

    def num_bytes(self, item: TokenisedRow) -> int:
        return _record_bytes(item.record) + item.prompt_ids.nbytes + item.completion_ids.nbytes

    def arrange(self, items: list[TokenisedRow], rng: np.random.Generator | None) -> Sequence[tuple[TokenisedRow, ...]]:
        lengths = np.array([len(row) for row in items])
        ties = np.arange(len(items)) if rng is None else rng.permutation(len(items))
        rows = [items[index] for index in np.lexsort((ties, lengths))]
        batches = [tuple(rows[start : start + self._batch_size]) for start in range(0, len(rows), self._batch_size)]
        if rng is None:
            return batches
        whole = len(rows) // self._batch_size
        return [batches[index] for index in rng.permutation(whole)] + batches[whole:]


@dataclass(frozen=True)
class _Position:
    """Where the next row of a file begins."""

    row: int = 0
    """Rows before it (JSONL: lines)."""
    offset: int = 0
    """Bytes before it (JSONL and CSV)."""


@dataclass(frozen=True)
class _Cursor:
    """Where the next row of an epoch begins: which file in the epoch's order, and where in it."""

    file: int = 0
    position: _Position = _Position()


@dataclass(frozen=True)
class _Place:
    """Where a stream stands. One immutable value, so that an interrupt never leaves half of it changed."""

    epoch: int = 0
    window: int = 0
    start: _Cursor = _Cursor()
    """Where the window began."""
    taken: int = 0
    """Units of the window that were given out."""


class _WindowStream(Generic[ItemT, UnitT]):
    """Units of one window after the other, epoch after epoch.

    Args:
        seed: None keeps the order of the files.
        window_rows: items of a full window, a multiple of `multiple`.
        multiple: a window that is closed early, because its items are large, holds a multiple of this.
        settings: what a state has to agree with, besides the files.
    """

    def __init__(
        self,
        source: _RowSource,
        plan: _Plan[ItemT, UnitT],
        *,
        seed: int | None,
        window_rows: int,
        multiple: int,
        settings: Mapping[str, int | None],
    ) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"expected a seed of at least 0, found {seed}")
        self._source = source
        self._plan = plan
        self._seed = seed
        self._window_rows = window_rows
        self._multiple = multiple
        self._settings = {**settings, "files": source.identity()}
        self._at = _Place()
        self._units: Sequence[UnitT] | None = None
        self._end = _Cursor()
        self._steps: Iterator[_Step] | None = None

    @property
    def epoch(self) -> int:
        """Epochs that were completed."""
        return self._at.epoch

    def next_unit(self) -> UnitT | None:
        """The next unit; None once at the end of each epoch."""
        units = self._window()
        if units and self._at.taken >= len(units):
            self._at = _Place(self._at.epoch, self._at.window + 1, self._end)
            del units  # let go of the old window before the next is held
            self._units = None
            units = self._window()
        if not units:
            if self._at.window == 0:
                raise self._source.nothing_usable()
            self._go_to(_Place(self._at.epoch + 1))
            return None
        self._at = replace(self._at, taken=self._at.taken + 1)
        return units[self._at.taken - 1]

    def state_dict(self) -> dict[str, object]:
        """Where the stream stands, as JSON values."""
        start = self._at.start
        return {
            "epoch": self._at.epoch,
            "window": self._at.window,
            "file": start.file,
            "row": start.position.row,
            "offset": start.position.offset,
            "taken": self._at.taken,
            "settings": deepcopy(self._settings),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where `state` was taken; refuses the state of other files or settings."""
        epoch, window, file, row, offset, taken = (
            _count_in(state, name) for name in ("epoch", "window", "file", "row", "offset", "taken")
        )
        saved = state.get("settings")
        for name, ours in self._settings.items():
            theirs = saved.get(name) if isinstance(saved, Mapping) else None
            if theirs != ours:
                raise ArtifactError(
                    f"Expected a loader state with {name} {ours}, found {theirs}. "
                    "Restore what it was taken with, or start without this state."
                )
        self._go_to(_Place(epoch, window, _Cursor(file, _Position(row, offset)), taken))

    def _go_to(self, place: _Place) -> None:
        self._at = place
        self._units = None
        self._steps = None

    def _window(self) -> Sequence[UnitT]:
        """The units of the current window; empty at the end of an epoch."""
        if self._units is None:
            try:
                items, self._end = self._fill()
            except BaseException:
                self._steps = None  # they are ahead of the window now; another try has to begin where it began
                raise
            rng = None if self._seed is None else np.random.default_rng([self._seed, self._at.epoch, self._at.window])
            self._units = self._plan.arrange(items, rng)
        return self._units

    def _fill(self) -> tuple[list[ItemT], _Cursor]:
        """The items of the current window, and where the next begins."""
        order, first_window_rows = self._epoch_plan()
        if self._steps is None:
            self._steps = self._source.steps(order, self._at.start)
        rows_wanted = self._window_rows if self._at.window else first_window_rows
        items: list[ItemT] = []
        end = self._at.start
        num_bytes = 0
        while True:
            missing = -len(items) % self._multiple if num_bytes >= WINDOW_BYTES else rows_wanted - len(items)
            steps = list(islice(self._steps, min(CHUNK_ROWS, missing)))
            if not steps:
                return items, end
            admitted = self._plan.admit([step.record for step in steps if step.record is not None])
            for step in steps:
                if step.finished is not None:
                    self._source.check(*step.finished)
            end = steps[-1].cursor
            num_bytes += sum(map(self._plan.num_bytes, admitted))
            items += admitted

    def _epoch_plan(self) -> tuple[Sequence[int], int]:
        """The epoch's order of files, and the rows of its first window."""
        if self._seed is None:
            return range(self._source.num_files), self._window_rows
        rng = np.random.default_rng([self._seed, self._at.epoch])
        first = int(rng.integers(1, self._window_rows // self._multiple, endpoint=True)) * self._multiple
        return rng.permutation(self._source.num_files).tolist(), first


def _count_in(state: Mapping[str, object], name: str) -> int:
    value = state.get(name)
    if type(value) is not int or value < 0:
        raise ArtifactError(f"Expected a loader state with {name!r}, found {value!r}. Start without this state.")
    return value


# --- rows of several files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One usable record and where the next row begins, or the news that a file was read to its end."""

    record: Record | None
    cursor: _Cursor
    finished: tuple[Path, int] | None = None
    """The file and the number of its rows."""


class _RowSource:
    """The files of one data set: checked when made, read as often as needed."""

    def __init__(self, paths: Sequence[Path | str], *, capability: str | None, quarantine: Quarantine | None) -> None:
        if isinstance(paths, (str, Path)):
            paths = [paths]
        self._files = tuple(Path(path) for path in paths)
        if not self._files:
            raise DataError("Expected at least one data file, found none. Name a Parquet, JSONL or CSV file.")
        doubled = [path for path, times in Counter(path.absolute() for path in self._files).items() if times > 1]
        if doubled:
            raise DataError(f"Expected each data file once, found {doubled[0]} twice. Name it once.")
        for path in self._files:
            _check_file(path)
        self._names = _short_names(self._files)
        self._capability = capability
        self._quarantine = quarantine

    @property
    def num_files(self) -> int:
        return len(self._files)

    def identity(self) -> list[list[str | int]]:
        """Name and size of each file, as JSON has it."""
        return [[path.name, path.stat().st_size] for path in self._files]

    def steps(self, order: Sequence[int], start: _Cursor) -> Iterator[_Step]:
        """Records of the files in `order`, from `start` on; bad rows are quarantined on the way."""
        for turn in range(start.file, len(order)):
            path, name = self._files[order[turn]], self._names[order[turn]]
            position = start.position if turn == start.file else _Position()
            for row in _reader_of(path)(path, position):
                position = row.end
                try:
                    record = self._record(row, path, name)
                except RowError as error:
                    self._reject(path, row.number, str(error))
                else:
                    yield _Step(record, _Cursor(turn, position))
                if row.number % CHECK_EVERY == 0 and self._quarantine is not None:
                    self._quarantine.check(path, row.number, final=False)
            yield _Step(None, _Cursor(turn + 1), (path, position.row))

    def check(self, path: Path, num_rows: int) -> None:
        """Refuse a file that turned out to have too many bad rows."""
        if self._quarantine is not None:
            self._quarantine.check(path, num_rows)

    def nothing_usable(self) -> DataError:
        """The error of a data set in which every row is bad."""
        files = ", ".join(str(path) for path in self._files)
        if self._quarantine is None or (reason := self._quarantine.first_reason()) is None:
            return DataError(f"Expected rows in {files}, found none. Write at least one row.")
        return DataError(f"Expected usable rows in {files}, found only bad ones ({reason}). Mend them.")

    def _record(self, row: _RawRow, path: Path, name: str) -> Record:
        if isinstance(row.values, RowError):
            raise row.values
        capability = self._capability
        if capability is None:
            own = row.values.get("capability")
            capability = own if isinstance(own, str) and own else DEFAULT_CAPABILITY
        record = normalise_row(row.values, row_id=f"{name}:{row.number}", capability=capability)
        if record.media is not None and isinstance(record.media.data, str):
            file = path.parent / record.media.data
            check_media_file(record.media.kind, file)
            record = replace(record, media=replace(record.media, data=str(file)))
        return replace(record, source=Source(str(path), row.number))

    def _reject(self, path: Path, number: int, reason: str) -> None:
        if self._quarantine is None:
            raise DataError(f"Expected readable rows in {path}, found row {number}: {reason}. Mend or remove it.")
        self._quarantine.add(path, number, reason)


def _all_records(source: _RowSource) -> Iterator[Record]:
    found = False
    for step in source.steps(range(source.num_files), _Cursor()):
        if step.finished is not None:
            source.check(*step.finished)
        if step.record is not None:
            found = True
            yield step.record
    if not found:
        raise source.nothing_usable()


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The stem of each file; where two agree, their names, and where these agree too, as many folders as tell them apart."""
    names = [path.stem for path in paths]
    depth = 0
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.absolute().parts[-depth:]) for path in paths]
    return names


def _record_bytes(record: Record) -> int:
    """About what a record holds in memory."""
    media = record.media.data if record.media is not None else ""
    return len(record.prompt) + len(record.completion or "") + len(media)


def _hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _place(source: Source | None) -> str:
    assert source is not None, "records of files know their source"
    return f"in row {source.row} of {source.file}"


def _require_positive(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected {name} of at least 1, found {size}")


# --- rows of one file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RawRow:
    """One row as it stands in a file, or why it cannot be read."""

    number: int
    values: Mapping[str, object] | RowError
    end: _Position


_Reader = Callable[[Path, _Position], Iterator[_RawRow]]


def _reader_of(path: Path) -> _Reader:
    return _FORMATS[path.suffix.lower()][0]


def _check_file(path: Path) -> None:
    """Refuse a file that is missing, empty, of an unknown kind, or without accepted columns, before any row is read."""
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise DataError(
            f"Expected a data file that ends in {', '.join(_FORMATS)}, found {path}. Convert it or name another."
        )
    try:
        if not path.exists():
            raise DataError(f"Expected a data file at {path}, found no such file. Check the path or create it.")
        if not path.is_file():
            raise DataError(f"Expected a data file at {path}, found a folder or device. Name the files in it.")
        if path.stat().st_size == 0:
            raise DataError(f"Expected rows in {path}, found an empty file. Write it again.")
        columns = _FORMATS[suffix][1](path)
    except OSError as error:
        raise DataError(f"Expected to read {path}, found: {error.strerror or error}. Check the file.") from None
    if columns is not None and not has_prompt_column(columns):
        raise DataError(
            f"Expected one of the columns {', '.join(PROMPT_COLUMNS)} in {path}, "
            f"found {', '.join(sorted(columns)) or 'none'}. "
            "Rename the column that holds the question."
        )


def _open_parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False, memory_map=False)


def _parquet_columns(path: Path) -> set[str]:
    try:
        with _open_parquet(path) as file:
            if file.metadata.num_rows == 0:
                raise DataError(f"Expected rows in {path}, found a Parquet file with none. Write it again.")
            return set(file.schema_arrow.names)
    except pa.ArrowException as error:
        raise _damaged(path, error) from None


def _read_parquet(path: Path, start: _Position) -> Iterator[_RawRow]:
    try:
        with _open_parquet(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            first, skip = 0, start.row
            while first < len(groups) and skip >= groups[first].num_rows:
                skip -= groups[first].num_rows
                first += 1
            names = [name for name in file.schema_arrow.names if name in READ_COLUMNS]
            num_bytes = sum(_num_bytes(group, names) for group in groups)
            rows_at_once = max(1, min(CHUNK_ROWS, _PARQUET_BATCH_BYTES * file.metadata.num_rows // max(1, num_bytes)))
            number = start.row - skip
            for batch in file.iter_batches(
                batch_size=rows_at_once, row_groups=range(first, len(groups)), columns=names, use_threads=False
            ):
                behind = max(0, min(batch.num_rows, start.row - number))
                number += behind
                for values in batch.slice(behind).to_pylist():
                    number += 1
                    yield _RawRow(number, values, _Position(number))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _num_bytes(group: pq.RowGroupMetaData, names: Sequence[str]) -> int:
    """Uncompressed size of the named columns of a row group."""
    columns = (group.column(index) for index in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in names)


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()).rstrip(".")
    return DataError(f"Expected a readable Parquet file at {path}, found: {reason}. Write it again.")


class _Lines:
    """The lines of a binary file, at most _MAX_LINE_BYTES each, with the place of the next; a line may be too long."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file = file
        self.offset = offset
        file.seek(offset)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> bytes | None:
        """The next line with its end; None for one that is too long to hold."""
        line = self._file.readline(_MAX_LINE_BYTES)
        self.offset += len(line)
        if not line:
            raise StopIteration
        if line.endswith(b"\n") or len(line) < _MAX_LINE_BYTES:
            return line
        while line and not line.endswith(b"\n"):
            line = self._file.readline(_MAX_LINE_BYTES)
            self.offset += len(line)
        return None


_TOO_LONG = RowError(f"expected a line of less than {_MAX_LINE_BYTES >> 20} MiB, found a longer one")


def _read_jsonl(path: Path, start: _Position) -> Iterator[_RawRow]:
    with path.open("rb") as file:
        lines = _Lines(file, start.offset)
        for number, line in enumerate(lines, start=start.row + 1):
            if line is None or line.strip():
                yield _RawRow(number, _TOO_LONG if line is None else _parse_line(line), _Position(number, lines.offset))


def _parse_line(line: bytes) -> Mapping[str, object] | RowError:
    try:
        # Bytes that are no UTF-8 become lone surrogates, which the normaliser refuses where it reads them.
        values = json.loads(line.decode("utf-8-sig", errors="surrogateescape"))
    except json.JSONDecodeError as error:
        return RowError(f"expected a JSON object, found broken JSON at character {error.pos + 1} ({error.msg})")
    except (ValueError, RecursionError) as error:
        return RowError(f"expected a JSON object, found JSON that cannot be read ({error})")
    if not isinstance(values, dict):
        return RowError(f"expected a JSON object, found {type(values).__name__}")
    return values


def _jsonl_columns(path: Path) -> set[str] | None:
    """The keys of the first objects; None when the first lines hold no object, which the quarantine will tell."""
    columns: set[str] = set()
    found_row = False
    for row in islice(_read_jsonl(path, _Position()), _JSONL_PROBE_LINES):
        found_row = True
        if not isinstance(row.values, RowError):
            columns.update(row.values)
    if not found_row:
        raise DataError(f"Expected rows in {path}, found only empty lines. Write it again.")
    return columns or None


def _csv_text(lines: _Lines) -> Iterator[str]:
    """Lines for csv.reader, which reads one at a time, so that `lines.offset` stays at the end of the row."""
    for line in lines:
        # csv.reader refuses a field above its limit, and with it the row that a line too long belongs to.
        yield "x" * (csv.field_size_limit() + 1) if line is None else line.decode(errors="surrogateescape")


def _csv_header(path: Path) -> tuple[list[str], int]:
    """The column names of a CSV file and the place of its first row."""
    with path.open("rb") as file:
        lines = _Lines(file, 0)
        try:
            header = next(csv.reader(_csv_text(lines), strict=True), [])
        except csv.Error as error:
            raise DataError(
                f"Expected a header line in {path}, found: {error}. Write column names into line 1."
            ) from None
        header = [name.removeprefix("\ufeff") for name in header]
        if len(set(header)) < len(header):
            doubled = next(name for name in header if header.count(name) > 1)
            raise DataError(f"Expected each column once in {path}, found {doubled!r} twice. Rename one.")
        return header, lines.offset


def _csv_columns(path: Path) -> set[str]:
    header, _ = _csv_header(path)
    if next(_read_csv(path, _Position()), None) is None:
        raise DataError(f"Expected rows below the header of {path}, found none. Write it again.")
    return set(header)


def _read_csv(path: Path, start: _Position) -> Iterator[_RawRow]:
    header, offset = _csv_header(path)
    with path.open("rb") as file:
        lines = _Lines(file, start.offset or offset)
        reader = csv.reader(_csv_text(lines), strict=True)
        number = start.row
        while True:
            values: Mapping[str, object] | RowError
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # the reader goes on with the next line
                values = RowError(f"expected a CSV row, found {error}")
            else:
                if not cells:
                    continue
                if len(cells) == len(header):
                    # CSV cannot tell an absent value from an empty one.
                    values = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
                else:
                    values = RowError(f"expected {len(header)} cells as in the header, found {len(cells)}")
            number += 1
            yield _RawRow(number, values, _Position(number, lines.offset))


_FORMATS: Mapping[str, tuple[_Reader, Callable[[Path], set[str] | None]]] = {
    ".parquet": (_read_parquet, _parquet_columns),
    ".jsonl": (_read_jsonl, _jsonl_columns),
    ".ndjson": (_read_jsonl, _jsonl_columns),
    ".csv": (_read_csv, _csv_columns),
}
"""Ending -> rows of a file, and the columns that can be known before its rows are read."""
