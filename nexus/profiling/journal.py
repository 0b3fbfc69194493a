"""What a profile has measured so far, on disk: read back it is bit for bit what was written.

One safetensors file per entry holds the arrays; its metadata hold the entry's structure as JSON, and the fingerprint of everything
that the numbers depend on. Nothing is unpickled. A file appears whole or not at all (`write_bytes_atomically`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nexus.artifacts import write_bytes_atomically
from nexus.profiling.activation import ActivationMoments, MeanUpdate
from nexus.profiling.consolidation import BatchMeasurement, ConfirmationMeasurement, Effects
from nexus.profiling.probe import ProbeStatistics
from nexus.profiling.spectral import Comoment

MAX_WRITING_SHARE = 0.05
"""Share of the time that may go into writing: an entry with the covariances of a large teacher takes seconds."""


@dataclasses.dataclass(frozen=True, eq=False)
class MeasuredRows:
    """What is known of one teacher on the rows of one capability."""

    num_rows: int
    """Rows from the front of the data that are done, rejected ones among them."""
    measurement: BatchMeasurement | None
    """Of the rows that were not rejected; None without any."""
    seconds: float
    """Wall-clock time that the stage had taken by then."""


@dataclasses.dataclass(frozen=True, eq=False)
class ConfirmedRows:
    """What one batch of the second pass said."""

    sample_ids: tuple[str, ...]
    """Rows that were asked for."""
    measurement: ConfirmationMeasurement | None
    """Of the rows that were not rejected; None without any."""


EntryT = TypeVar("EntryT", MeasuredRows, ConfirmedRows)

_CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        MeasuredRows,
        ConfirmedRows,
        BatchMeasurement,
        ConfirmationMeasurement,
        Effects,
        ActivationMoments,
        Comoment,
        MeanUpdate,
        ProbeStatistics,
    )
}


class ProfileJournal:
    """Entries by name, each in a file of its own.

    Args:
        folder: made when the first entry is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: dict[tuple[str, ...], tuple[str, MeasuredRows]] = {}
        self._due: dict[tuple[str, ...], float] = {}

    def read(self, name: Sequence[str], fingerprint: str, kind: type[EntryT]) -> EntryT | None:
        """The entry `name`, or None where there is none, it is damaged, or its numbers belong to another `fingerprint`."""
        try:
            with safe_open(self._path(name), framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != fingerprint:
                    return None
                entry = _built(
                    json.loads(metadata["entry"]), [file.get_tensor(str(i)) for i in range(len(file.keys()))]
                )
        except (OSError, SafetensorError):
            return None
        return entry if isinstance(entry, kind) else None

    def write(self, name: Sequence[str], fingerprint: str, entry: MeasuredRows | ConfirmedRows) -> None:
        """Write or replace an entry.

        Raises:
            ArtifactError: when the disk refuses.
        """
        arrays: list[np.ndarray] = []
        structure = json.dumps(_structure(entry, arrays))
        # safetensors writes the memory as it lies: a view in another order would come back transposed.
        tensors = {str(number): np.ascontiguousarray(array) for number, array in enumerate(arrays)}
        write_bytes_atomically(self._path(name), save(tensors, {"fingerprint": fingerprint, "entry": structure}))

    def note(self, name: Sequence[str], fingerprint: str, entry: MeasuredRows) -> None:
        """As `write`, but as often as `MAX_WRITING_SHARE` allows: a later entry takes the place of one that waits for `flush`."""
        key = tuple(name)
        self._waiting[key] = (fingerprint, entry)
        if time.monotonic() >= self._due.get(key, 0.0):
            self._write_waiting(key)

    def flush(self) -> None:
        """Write what `note` still holds back."""
        for key in list(self._waiting):
            self._write_waiting(key)

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_waiting(self, key: tuple[str, ...]) -> None:
        start = time.monotonic()
        self.write(key, *self._waiting.pop(key))
        end = time.monotonic()
        self._due[key] = end + (end - start) * (1 / MAX_WRITING_SHARE - 1)

    def _path(self, name: Sequence[str]) -> Path:
        return self.folder.joinpath(*name[:-1], f"{name[-1]}.safetensors")


def _structure(value: Any, arrays: list[np.ndarray]) -> Any:
    """JSON that `_built` turns back into `value`; its arrays are appended to `arrays`."""
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, tuple):
        return [_structure(item, arrays) for item in value]
    if isinstance(value, dict):
        return {"labels": [[key, _structure(item, arrays)] for key, item in value.items()]}
    if dataclasses.is_dataclass(value):
        fields = {field.name: _structure(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, "fields": fields}
    return value


def _built(structure: Any, arrays: Sequence[np.ndarray]) -> Any:
    if isinstance(structure, list):
        return tuple(_built(item, arrays) for item in structure)
    if not isinstance(structure, dict):
        return structure
    if "array" in structure:
        return arrays[structure["array"]]
    if "labels" in structure:
        return {key: _built(item, arrays) for key, item in structure["labels"]}
    fields = {name: _built(item, arrays) for name, item in structure["fields"].items()}
    return _CLASSES[structure["class"]](**fields)
