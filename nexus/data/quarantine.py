"""Rows that cannot be used: where they are written down, how they are counted, and when there are too many of them.

`quarantine/<input file name>.jsonl` gets one `{"file", "row", "reason"}` object per bad row, appended and flushed at once, so that
a crash loses nothing. Files are read once per epoch and by several processes; a row that already stands there is not written
again, however its file is spelt (`data/x.csv`, `./data/x.csv`, an absolute path, a link). Counts are those of this process: they
describe the data as they are now, not as they were when an older run of the same folder met them. Memory grows with the number of
bad rows only.
"""

from __future__ import annotations

import json
import logging
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nexus.data.records import Record
from nexus.errors import ArtifactError, DataError

logger = logging.getLogger(__name__)

MIN_ROWS = 1000
"""Rows that must have been seen before a share is judged in the middle of a file: one bad row at its top is not 100 %."""


@dataclass(frozen=True)
class QuarantinedRow:
    """One line of a quarantine file."""

    file: str
    row: int
    reason: str


class Quarantine:
    """Collects the bad rows of a run.

    Args:
        directory: folder of the JSONL files, made when the first row arrives; None only counts and logs.
        max_bad_share: `check` refuses a file of which more than this share is bad.
    """

    def __init__(self, directory: Path | None, max_bad_share: float) -> None:
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"expected 0 <= max_bad_share <= 1, found {max_bad_share}")
        self.directory = directory
        self.max_bad_share = max_bad_share
        self._bad: dict[str, array[int]] = {}
        """Rows of each file, by its place."""
        self._first_reason: dict[str, str] = {}
        self._spelling: dict[str, str] = {}
        """Place -> how the file was called when its first bad row was met."""
        self._places = _Places()
        self._logs: dict[Path, _Log] = {}
        self._earlier: set[tuple[str, int]] | None = None
        """Rows in the folder's files; read when first asked for."""

    def add(self, file: Path | str, row: int, reason: str) -> None:
        """Write down that `row` of `file` cannot be used; the first reason of a row stays.

        Raises:
            ArtifactError: when the disk refuses.
        """
        name = str(file)
        key = self._places[name]
        rows = self._bad.setdefault(key, array("q"))
        index = bisect_left(rows, row)
        if index < len(rows) and rows[index] == row:
            return
        rows.insert(index, row)
        self._spelling.setdefault(key, name)
        self._first_reason.setdefault(key, f"row {row}: {reason}")
        logger.warning("quarantined row %d of %s: %s", row, name, reason)
        if self.directory is not None:
            path = self.directory / f"{Path(name).name}.jsonl"
            self._logs.setdefault(path, _Log(path)).append(QuarantinedRow(name, row, reason))

    def add_record(self, record: Record, reason: str) -> None:
        """Write down that a record turned out to be unusable later, for example when its media were decoded.

        Raises:
            ValueError: for a record that was not read by `nexus.data.loader`.
        """
        if record.source is None:
            raise ValueError(f"expected a record that came from a file, found {record.id!r} without a source")
        self.add(record.source.file, record.source.row, reason)

    def knows(self, record: Record) -> bool:
        """Whether the record was left out before, by this process or by an earlier one with the same folder."""
        if record.source is None:
            return False
        if self._earlier is None:
            written = () if self.directory is None else read_quarantine(self.directory)
            self._earlier = {(self._places[entry.file], entry.row) for entry in written}
        key = self._places[record.source.file]
        rows = self._bad.get(key, ())
        index = bisect_left(rows, record.source.row)
        now = index < len(rows) and rows[index] == record.source.row
        return now or (key, record.source.row) in self._earlier

    def counts(self) -> Mapping[str, int]:
        """Bad rows of each file that had any, as this process met them."""
        return {self._spelling[key]: len(rows) for key, rows in self._bad.items()}

    def check(self, file: Path | str, rows_seen: int, *, final: bool = True) -> None:
        """Refuse `file` when more than `max_bad_share` of its first `rows_seen` rows are bad.

        Args:
            final: the whole file was seen; otherwise nothing is decided before MIN_ROWS.

        Raises:
            DataError: naming the share, the first reason and what to do.
        """
        key = self._places[str(file)]
        rows = self._bad.get(key)
        if rows is None or (not final and rows_seen < MIN_ROWS):
            return
        bad = bisect_right(rows, rows_seen)
        if bad > self.max_bad_share * rows_seen:
            raise DataError(
                f"Expected at most {self.max_bad_share:.2%} bad rows in {file}, found {bad} of {rows_seen} "
                f"({self._first_reason[key]}). {self.remedy}"
            )

    def first_reason(self) -> str | None:
        """Row and reason of the first bad row of this process; None when there was none."""
        return next(iter(self._first_reason.values()), None)

    @property
    def remedy(self) -> str:
        """What a user can do about bad rows."""
        listed = f" listed in {self.directory}" if self.directory is not None else ""
        return f"Mend the rows{listed}, or raise quarantine.max_bad_share."


def read_quarantine(directory: Path) -> Iterator[QuarantinedRow]:
    """Every row in the quarantine files of `directory`, once, by file name; nothing when the folder is absent."""
    places = _Places()
    for path in sorted(directory.glob("*.jsonl")):
        seen: set[tuple[str, int]] = set()
        for entry in _parse(path.read_bytes()):
            row = (places[entry.file], entry.row)
            if row not in seen:
                seen.add(row)
                yield entry


class _Places(dict[str, str]):
    """A file as it is spelt -> the absolute path without links, looked up once."""

    def __missing__(self, name: str) -> str:
        self[name] = str(Path(name).resolve())
        return self[name]


class _Log:
    """One quarantine file, shared with other processes and earlier runs: remembers how far it was read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._known: dict[str, set[int]] = {}
        """Rows in it, by the place of their file."""
        self._places = _Places()

    def append(self, entry: QuarantinedRow) -> None:
        key = self._places[entry.file]
        line = json.dumps({"file": entry.file, "row": entry.row, "reason": entry.reason}).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                file.seek(self._offset)
                unread = file.read()
                for other in _parse(unread):
                    self._known.setdefault(self._places[other.file], set()).add(other.row)
                self._offset += len(unread)
                if entry.row in self._known.get(key, ()):
                    return
                if unread and not unread.endswith(b"\n"):  # a process died in the middle of its line
                    line = b"\n" + line
                file.write(line)
                self._offset += len(line)
        except OSError as error:
            raise ArtifactError(
                f"Expected to write {self._path}, found: {error.strerror or error}. Free disk space or choose another --out."
            ) from error
        self._known.setdefault(key, set()).add(entry.row)


def _parse(data: bytes) -> Iterator[QuarantinedRow]:
    """The whole lines of a quarantine file; a line that a killed process left half written is passed over."""
    for line in data.splitlines():
        try:
            entry = json.loads(line)
            yield QuarantinedRow(str(entry["file"]), int(entry["row"]), str(entry["reason"]))
        except (ValueError, KeyError, TypeError):
            continue
