"""Teacher completions in Parquet: written once by extraction, streamed as the unlabelled rows of distillation.

`<teacher>/<capability>-00000.parquet` holds `id, prompt, completion`; every file carries the teacher's fingerprint in its metadata
and is complete when it exists (written under another name, renamed last). `<capability>.json` closes the set: it lists the files
with their rows. Files of another fingerprint are refused, never mixed in.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nexus.artifacts import StrictModel, read_artifact, write_artifact
from nexus.data.records import Record
from nexus.errors import ArtifactError

_FINGERPRINT_KEY = b"nexus_fingerprint"
_SCHEMA = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("completion", pa.string())])


class TargetManifest(StrictModel):
    """Closes the target files of one teacher and capability."""

    capability: str
    fingerprint: str
    files: dict[str, int]
    """File name -> rows."""


class TargetWriter:
    """Appends completions to numbered files of `rows_per_file` rows; reopening continues after the last whole file."""

    def __init__(self, folder: Path, *, capability: str, fingerprint: str, rows_per_file: int) -> None:
        """Raises ArtifactError when the folder holds targets of another fingerprint."""
        self._folder = folder
        self._capability = capability
        self._fingerprint = fingerprint
        self._rows_per_file = rows_per_file
        self._pending: list[tuple[str, str, str]] = []
        self._files: dict[str, int] = {}
        for path in self.files(folder, capability):
            self._files[path.name] = check_targets(path, fingerprint)
        self.complete = (folder / f"{capability}.json").is_file()

    @property
    def rows(self) -> int:
        """Rows in whole files."""
        return sum(self._files.values())

    def write(self, records: Sequence[Record], completions: Sequence[str]) -> None:
        """Add one batch."""
        self._pending += [(record.id, record.prompt, text) for record, text in zip(records, completions, strict=True)]
        while len(self._pending) >= self._rows_per_file:
            self._flush(self._rows_per_file)

    def finish(self) -> None:
        """Write the last file and the manifest."""
        if self._pending:
            self._flush(len(self._pending))
        manifest = TargetManifest(capability=self._capability, fingerprint=self._fingerprint, files=self._files)
        write_artifact(self._folder / f"{self._capability}.json", manifest)
        self.complete = True

    def _flush(self, count: int) -> None:
        rows, self._pending = self._pending[:count], self._pending[count:]
        name = f"{self._capability}-{len(self._files):05d}.parquet"
        columns = [pa.array(list(column), pa.string()) for column in zip(*rows, strict=True)]
        table = pa.table(columns, schema=_SCHEMA.with_metadata({_FINGERPRINT_KEY: self._fingerprint.encode()}))
        temporary = self._folder / f".{name}.{os.getpid()}.tmp"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, temporary)
            temporary.replace(self._folder / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise ArtifactError(
                f"Expected to write {self._folder / name}, found: {error}. Free disk space and run the same command again."
            ) from error
        self._files[name] = count

    @staticmethod
    def files(folder: Path, capability: str) -> list[Path]:
        """Whole target files in order."""
        return sorted(folder.glob(f"{capability}-[0-9][0-9][0-9][0-9][0-9].parquet"))

    @staticmethod
    def rows_of(folder: Path, capability: str) -> int:
        """Rows of a finished set."""
        return sum(read_artifact(folder / f"{capability}.json", TargetManifest).files.values())


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
