"""What teachers said, in Parquet: completions and targets, written once by extraction, read by distillation.

`<teacher>/<capability>-00000.parquet` holds `id, prompt, completion`, the unlabelled rows of distillation; for a teacher with cached
targets `<teacher>/scores/<capability>-00000.parquet` holds what it would have answered while the student trains, packed as it would
have travelled. Every file carries the teacher's fingerprint in its metadata, and a file of scores all that its targets depend on; it
is complete when it exists (written under another name, renamed last). `<capability>.json` closes the set: it lists the files with
their rows. Files of another fingerprint or of other settings are refused by name, never mixed in.

Shape letters: B rows, N scored tokens of a row, P positions, H the teacher's width.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from nexus.artifacts import StrictModel, read_artifact, write_artifact
from nexus.data.records import Record
from nexus.errors import ArtifactError
from nexus.towers.packing import PackedKind, PackedTargets, PackedTokens, join_rows, split_rows
from nexus.towers.targets import TeacherTargets

ROWS_PER_GROUP = 64
"""Rows that are read from a file of scores at a time: 2 MB of top-k targets at 128 tokens a row."""
GROUPS_IN_MEMORY = 40
"""Read groups that are kept: shuffled rows come from a window of 1,024, and from two of them where one ends."""

_FINGERPRINT_KEY = b"nexus_fingerprint"
_SETTINGS_KEY = b"nexus_settings"
_READ_KEY = b"nexus_rows_read"
"""Readable input rows up to and with the last one of a file; more than it holds where the teacher could not take some."""
_SCHEMA = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("completion", pa.string())])


class TargetManifest(StrictModel):
    """Closes the target files of one teacher and capability."""

    capability: str
    fingerprint: str
    files: dict[str, int]
    """File name -> rows."""


class _FileWriter:
    """Numbered whole files of one capability in a folder; reopening continues after the last whole one."""

    def __init__(self, folder: Path, capability: str, fingerprint: str, rows_per_file: int) -> None:
        self._folder = folder
        self._capability = capability
        self._fingerprint = fingerprint
        self._rows_per_file = rows_per_file
        self._files: dict[str, int] = {}
        for leftover in folder.glob(f".{capability}-[0-9][0-9][0-9][0-9][0-9].parquet.*.tmp"):
            leftover.unlink(missing_ok=True)  # of a process that was killed: a run directory has one user at a time
        for path in self.files(folder, capability):
            self._files[path.name] = check_targets(path, fingerprint)
        manifest = folder / f"{capability}.json"
        self.complete = manifest.is_file()
        listed = read_artifact(manifest, TargetManifest).files if self.complete else ()
        expected = sorted({*listed, *(self._name(number) for number in range(len(self._files)))})
        missing = [name for name in expected if name not in self._files]
        if missing:
            later = [name for name in [*self._files, *([manifest.name] if self.complete else [])] if name > missing[0]]
            raise ArtifactError(
                f"Expected the files of {folder} without a gap, found no {missing[0]}: what comes behind it cannot be placed. Delete "
                f"{', '.join(later)} there and extract again."
            )

    @property
    def rows(self) -> int:
        """Rows in whole files."""
        return sum(self._files.values())

    @staticmethod
    def files(folder: Path, capability: str) -> list[Path]:
        """Whole target files in order."""
        return sorted(folder.glob(f"{capability}-[0-9][0-9][0-9][0-9][0-9].parquet"))

    @staticmethod
    def rows_of(folder: Path, capability: str) -> int:
        """Rows of a finished set."""
        return sum(read_artifact(folder / f"{capability}.json", TargetManifest).files.values())

    def _name(self, number: int) -> str:
        return f"{self._capability}-{number:05d}.parquet"

    def _close(self) -> None:
        manifest = TargetManifest(capability=self._capability, fingerprint=self._fingerprint, files=self._files)
        write_artifact(self._folder / f"{self._capability}.json", manifest)
        self.complete = True

    def _write_file(self, table: pa.Table) -> None:
        name = self._name(len(self._files))
        temporary = self._folder / f".{name}.{os.getpid()}.tmp"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, temporary, row_group_size=ROWS_PER_GROUP)
            temporary.replace(self._folder / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise ArtifactError(
                f"Expected to write {self._folder / name}, found: {error}. Free disk space and run the same command again."
            ) from error
        self._files[name] = table.num_rows


class TargetWriter(_FileWriter):
    """Appends completions to numbered files of `rows_per_file` rows."""

    def __init__(self, folder: Path, *, capability: str, fingerprint: str, rows_per_file: int) -> None:
        """Raises ArtifactError when the folder holds targets of another fingerprint."""
        super().__init__(folder, capability, fingerprint, rows_per_file)
        self._pending: list[tuple[str, str, str]] = []
        self._positions: list[int] = []
        self.rows_read = 0
        """Readable input rows that the whole files leave behind them, those included that the teacher could not take."""
        for path in self.files(folder, capability)[-1:]:
            found = (pq.read_schema(path).metadata or {}).get(_READ_KEY)
            self.rows_read = self.rows if found is None else int(found)

    def write(
        self, records: Sequence[Record], completions: Sequence[str], positions: Sequence[int] | None = None
    ) -> None:
        """Add one batch; `positions` are the rows' places among the readable input rows, None where every one is answered."""
        if positions is None:
            first = self._positions[-1] + 1 if self._positions else self.rows_read
            positions = range(first, first + len(records))
        self._pending += [(record.id, record.prompt, text) for record, text in zip(records, completions, strict=True)]
        self._positions += positions
        while len(self._pending) >= self._rows_per_file:
            self._flush(self._rows_per_file)

    def finish(self) -> None:
        """Write the last file and the manifest."""
        if self._pending:
            self._flush(len(self._pending))
        self._close()

    def _flush(self, count: int) -> None:
        rows, self._pending = self._pending[:count], self._pending[count:]
        self.rows_read = self._positions[count - 1] + 1
        del self._positions[:count]
        columns = [pa.array(list(column), pa.string()) for column in zip(*rows, strict=True)]
        metadata = {_FINGERPRINT_KEY: self._fingerprint.encode(), _READ_KEY: str(self.rows_read).encode()}
        self._write_file(pa.table(columns, schema=_SCHEMA.with_metadata(metadata)))


class ScoreSettings(StrictModel):
    """All that cached targets depend on beside their rows."""

    schema_version: int = 1
    teacher: str
    fingerprint: str
    """Of checkpoint, revision, quantisation, tokenizer and the meaning of targets."""
    temperature: float
    transport: PackedKind | None
    """Of the token distributions; None for a teacher without any."""
    width: int | None
    """Kept ids or draws that were asked for; None where the transport has no such number."""
    layers: tuple[int, ...]
    hidden_size: int
    """H of their states."""
    snr_db: float | None


class ScoreWriter(_FileWriter):
    """Appends packed targets to numbered files of `rows_per_file` rows."""

    def __init__(self, folder: Path, *, capability: str, settings: ScoreSettings, rows_per_file: int) -> None:
        """Raises ArtifactError when the folder holds targets of another teacher or of other settings."""
        super().__init__(folder, capability, settings.fingerprint, rows_per_file)
        for path in self.files(folder, capability):
            check_settings(path, settings)
        self._settings = settings
        self._pending: list[pa.Table] = []
        self._num_pending = 0

    def write(self, packed: PackedTargets) -> None:
        """Add one batch."""
        table = _score_table(packed, self._settings)
        self._pending.append(table)
        self._num_pending += table.num_rows
        while self._num_pending >= self._rows_per_file:
            self._flush(self._rows_per_file)

    def finish(self) -> None:
        """Write the last file and the manifest."""
        if self._num_pending:
            self._flush(self._num_pending)
        self._close()

    def _flush(self, count: int) -> None:
        whole = pa.concat_tables(self._pending)
        self._write_file(whole.slice(0, count).combine_chunks())
        self._pending = [whole.slice(count)]
        self._num_pending = whole.num_rows - count


def score_schema(settings: ScoreSettings) -> pa.Schema:
    """Arrow types of a file of scores; a column that a teacher does not fill is null."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("vocabulary_size", pa.int32()),
            ("width", pa.int32()),
            ("num_tokens", pa.int32()),
            ("token_ids", pa.binary()),
            ("ids", pa.binary()),
            # Bits of bfloat16, which Arrow has not.
            ("values", pa.list_(pa.uint16())),
            ("tail", pa.list_(pa.uint16())),
            ("pooled", pa.list_(pa.float32())),
            ("label_logprobs", pa.list_(pa.float32())),
            *((f"hidden_{layer}", pa.list_(pa.list_(pa.float16(), settings.hidden_size))) for layer in settings.layers),
        ]
    )


def _score_table(packed: PackedTargets, settings: ScoreSettings) -> pa.Table:
    rest, tokens = packed.rest, packed.tokens
    count = len(rest.row_ids)
    columns: dict[str, list[Any]] = {name: [None] * count for name in score_schema(settings).names}
    columns["id"] = list(rest.row_ids)
    bounds = np.arange(count + 1)
    if tokens is not None:
        bounds = np.concatenate([[0], np.cumsum(tokens.lengths_B)])
        rows = split_rows(tokens)
        columns["vocabulary_size"] = [row.vocabulary_size for row in rows]
        columns["width"] = [row.width for row in rows]
        columns["num_tokens"] = [row.num_tokens for row in rows]
        columns["token_ids"] = [row.token_ids.tobytes() for row in rows]
        columns["ids"] = [row.ids.tobytes() for row in rows]
        columns["values"] = [row.values_NW.reshape(-1) for row in rows]
        columns["tail"] = [row.tail_N for row in rows]
    if rest.pooled_BE is not None:
        columns["pooled"] = list(rest.pooled_BE)
    if rest.label_logprobs_BC is not None:
        columns["label_logprobs"] = list(rest.label_logprobs_BC)
    for layer, states in rest.hidden.items():
        # A language model has a state for each token of all rows, an encoder as many for each row.
        by_row = [states[begin:end] for begin, end in pairwise(bounds)] if tokens else states
        columns[f"hidden_{layer}"] = [list(own) for own in by_row]
    schema = score_schema(settings).with_metadata(
        {_FINGERPRINT_KEY: settings.fingerprint.encode(), _SETTINGS_KEY: settings.model_dump_json().encode()}
    )
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


class ScoreReader:
    """Cached targets of one teacher and capability, found by row id.

    Held in memory: 12 bytes for each row, and at most `GROUPS_IN_MEMORY` groups of `ROWS_PER_GROUP` rows.
    """

    def __init__(self, folder: Path, *, capability: str, settings: ScoreSettings) -> None:
        """
        Raises:
            ArtifactError: there are none, extraction did not finish, or they are of another teacher or of other settings; the message
                names what differs.
        """
        self._settings = settings
        self._paths = ScoreWriter.files(folder, capability)
        if not (folder / f"{capability}.json").is_file():
            raise ArtifactError(
                f"Expected cached targets of teacher {settings.teacher!r} in {folder}, found no complete set. Run `nexus extract`."
            )
        hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
        self._groups: list[tuple[int, int]] = []
        """(file, group in it) of every group."""
        for number, path in enumerate(self._paths):
            check_targets(path, settings.fingerprint)
            check_settings(path, settings)
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["id"]).column("id").to_pylist()
                hashes.append(np.array([_hash_of(row_id) for row_id in ids], np.uint64))
                places.append(len(self._groups) * ROWS_PER_GROUP + np.arange(len(ids), dtype=np.uint32))
                self._groups.append((number, group))
        order = np.argsort(np.concatenate(hashes), kind="stable")
        self._hashes, self._places = np.concatenate(hashes)[order], np.concatenate(places)[order].astype(np.uint32)
        self._read: OrderedDict[int, pa.Table] = OrderedDict()

    def read(self, row_ids: Sequence[str], *, label_texts: tuple[str, ...] | None) -> PackedTargets:
        """The targets of these rows, in this order.

        Raises:
            ArtifactError: a row has none.
        """
        rows = [self._row(row_id) for row_id in row_ids]
        kind = self._settings.transport
        tokens = None if kind is None else join_rows([_tokens_of(row, kind) for row in rows])
        hidden = {}
        for layer in self._settings.layers:
            states = [np.array(row[f"hidden_{layer}"], np.float16) for row in rows]
            hidden[layer] = np.stack(states) if tokens is None else np.concatenate(states)
        rest = TeacherTargets(
            teacher=self._settings.teacher,
            fingerprint=self._settings.fingerprint,
            tokenizer_hash=None,
            row_ids=tuple(row_ids),
            tokens=None,
            hidden=hidden,
            pooled_BE=_stacked(rows, "pooled"),
            label_texts=label_texts,
            label_logprobs_BC=_stacked(rows, "label_logprobs"),
        )
        return PackedTargets(rest, tokens)

    def _row(self, row_id: str) -> dict[str, Any]:
        wanted = np.uint64(_hash_of(row_id))
        found = int(np.searchsorted(self._hashes, wanted))
        row = self._at(int(self._places[found])) if found < len(self._hashes) else None
        # Two ids may share a hash; the chance is 3 % among a billion rows.
        if row is None or row["id"] != row_id:
            raise ArtifactError(
                f"Expected cached targets of teacher {self._settings.teacher!r} for row {row_id!r}, found none: the data changed. "
                "Extract again in a new --out."
            )
        return row

    def _at(self, place: int) -> dict[str, Any]:
        group, offset = divmod(place, ROWS_PER_GROUP)
        table = self._read.pop(group, None)
        if table is None:
            file, number = self._groups[group]
            table = pq.ParquetFile(self._paths[file]).read_row_group(number)
        self._read[group] = table
        if len(self._read) > GROUPS_IN_MEMORY:
            self._read.popitem(last=False)
        return {name: _plain(table.column(name)[offset]) for name in table.column_names}


def _plain(scalar: Any) -> Any:
    """A scalar's value; lists of numbers as arrays, without a Python number for each."""
    if not scalar.is_valid or not isinstance(scalar, pa.ListScalar):
        return scalar.as_py()
    if pa.types.is_fixed_size_list(scalar.type.value_type):
        flat = scalar.values.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(scalar.values), scalar.type.value_type.list_size)
    return scalar.values.to_numpy(zero_copy_only=False)


def _tokens_of(row: dict[str, Any], kind: PackedKind) -> PackedTokens:
    count, width = row["num_tokens"], row["width"]
    return PackedTokens(
        kind=kind,
        vocabulary_size=row["vocabulary_size"],
        width=width,
        lengths_B=np.array([count], np.int32),
        token_ids=np.frombuffer(row["token_ids"], np.uint8),
        ids=np.frombuffer(row["ids"], np.uint8),
        values_NW=np.asarray(row["values"], np.uint16).reshape(count, width),
        tail_N=np.asarray(row["tail"], np.uint16),
    )


def _stacked(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray | None:
    return None if rows[0][name] is None else np.stack([np.asarray(row[name], np.float32) for row in rows])


def _hash_of(row_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "little")


def check_settings(path: Path, settings: ScoreSettings) -> None:
    """Refuse a file of scores of other settings.

    Raises:
        ArtifactError: naming every setting that differs.
    """
    text = (pq.read_schema(path).metadata or {}).get(_SETTINGS_KEY, b"{}")
    try:
        found = ScoreSettings.model_validate_json(text)
    except ValidationError:
        raise ArtifactError(
            f"Expected {path} to say what its targets depend on, found nothing that this version reads. Delete {path.parent} and "
            "extract again."
        ) from None
    pairs = [(name, getattr(settings, name), getattr(found, name)) for name in ScoreSettings.model_fields]
    wrong = [f"{name} {wanted}, found {other}" for name, wanted, other in pairs if wanted != other]
    if wrong:
        raise ArtifactError(
            f"Expected cached targets of teacher {settings.teacher!r} in {path} with {'; '.join(wrong)}. Delete {path.parent} and "
            "extract again."
        )


def check_targets(path: Path, fingerprint: str) -> int:
    """Rows of a target file.

    Raises:
        ArtifactError: when it belongs to another teacher, revision, quantisation or tokenizer.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(
            f"Expected teacher targets in {path}, found: {error}. Delete the file and extract again."
        ) from None
    found = (file.schema_arrow.metadata or {}).get(_FINGERPRINT_KEY, b"none").decode()
    if found != fingerprint:
        raise ArtifactError(
            f"Expected targets of teacher fingerprint {fingerprint} in {path}, found {found}: the teacher changed since. "
            f"Delete {path.parent} and extract again."
        )
    return int(file.metadata.num_rows)
