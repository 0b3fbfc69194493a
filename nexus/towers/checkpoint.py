"""A checkpoint folder as it lies on disk: its config.json, its safetensors files, and a hash of both.

Everything that can be wrong with a folder is found here, before any weight is read, and is told in one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nexus.artifacts import StrictModel
from nexus.errors import TowerLoadError

if TYPE_CHECKING:
    from torch import Tensor

FULL_HASH_BYTES = 2 * 1024**3
"""Up to this size all bytes of the weights are hashed (about 4 s); larger ones by header, size and sampled blocks."""
SAMPLED_BLOCKS = 256
BLOCK_BYTES = 1024**2
GLANCE_BLOCKS = 64
GLANCE_BYTES = 16 * 1024
"""What `sampled_digest` reads of a file beside its header: 1 MiB, a few milliseconds whatever the file's size."""

GPTQ_BITS = (2, 4, 8)
"""Sizes of codes that fill 32-bit numbers without a rest; codes of 3 bits are laid out in several ways."""
GPTQ_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""Name of a layout -> what its stored zero points lack."""


class SourceFile(StrictModel):
    """A weight file as the file system shows it."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class GptqFormat:
    """How the authors of a checkpoint packed its matrices by GPTQ (gptq.py reads them)."""

    bits: int
    """Of a code."""
    group_size: int | None
    """Input features that share a scale; None: all of a matrix."""
    zero_offset: int
    """Added to a stored zero point: 1 in the first version of the format, 0 in the second."""

    def __str__(self) -> str:
        """As reports name it."""
        return f"GPTQ {self.bits} bit, " + (f"group {self.group_size}" if self.group_size else "one group")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has passed all checks that need no weights."""

    folder: Path
    config: Mapping[str, Any]
    """config.json."""
    weights: Mapping[str, Path]
    """Key of each tensor -> the safetensors file that holds it."""
    gptq: GptqFormat | None = None
    """What its authors quantised it with; None for floating point."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted(set(self.weights.values())))


def open_checkpoint(folder: Path, *, stem: str = "model") -> Checkpoint:
    """Look into a checkpoint folder.

    Args:
        stem: name of the weights: `<stem>.safetensors`, or shards listed in `<stem>.safetensors.index.json`.

    Raises:
        TowerLoadError: no folder, no or broken config.json, no or broken or missing safetensors files, weights that are
            already quantised by another method than GPTQ.
    """
    if not folder.is_dir():
        raise TowerLoadError(f"Expected a checkpoint folder at {folder}, found no such folder. Correct the path.")
    config = read_json(folder / "config.json")
    gptq = _quantised_by_its_authors(folder, config)
    weights: dict[str, Path] = {}
    for path in _weight_files(folder, stem):
        try:
            with safe_open(path, framework="np", backend="pread") as file:
                weights.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise TowerLoadError(
                f"Expected readable safetensors in {path}, found: {' '.join(str(error).split())}. Fetch the file again."
            ) from None
    return Checkpoint(folder, config, weights, gptq)


def weights_digest(checkpoint: Checkpoint, *, full_hash_bytes: int = FULL_HASH_BYTES) -> str:
    """SHA-256 over the content of the safetensors files; above `full_hash_bytes` over headers, sizes and sampled blocks."""
    whole = sum(path.stat().st_size for path in checkpoint.files) <= full_hash_bytes
    digest = hashlib.sha256()
    for path in checkpoint.files:
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            if whole:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                continue
            header_size = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header_size))
            for i in range(SAMPLED_BLOCKS):
                file.seek(path.stat().st_size * i // SAMPLED_BLOCKS)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def sampled_digest(path: Path) -> str:
    """SHA-256 over a safetensors file's header and evenly spaced blocks: tells checkpoints apart, does not prove one whole."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(int.from_bytes(file.read(8), "little")))
        for i in range(GLANCE_BLOCKS):
            file.seek(path.stat().st_size * i // GLANCE_BLOCKS)
            digest.update(file.read(GLANCE_BYTES))
    return digest.hexdigest()


def source_files(checkpoint: Checkpoint) -> tuple[SourceFile, ...]:
    """Sizes and times of the safetensors files."""
    stats = {path.name: path.stat() for path in checkpoint.files}
    return tuple(SourceFile(name=name, size=stat.st_size, mtime_ns=stat.st_mtime_ns) for name, stat in stats.items())


class StoredTensor:
    """A tensor of a checkpoint that is read when it is indexed, into memory of its own.

    transformers takes it for a slice of a safetensors file. Reading through a mapping, as it would itself, leaves every page of the
    checkpoint in the process, whose peak would then be the floating-point model.
    """

    def __init__(self, file: Any, key: str) -> None:
        self._slice = file.get_slice(key)

    def __getitem__(self, index: Any) -> Tensor:
        """The part that `index` says, in torch's own (aligned) memory."""
        tensor: Tensor = self._slice[index].clone()
        return tensor

    def get_shape(self) -> list[int]:
        """Sizes of all dimensions."""
        return list(self._slice.get_shape())

    def get_dtype(self) -> str:
        """Number type, as safetensors writes it."""
        return str(self._slice.get_dtype())


def stored_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by their key; none is read."""
    files = {path: safe_open(path, framework="pt", backend="pread") for path in checkpoint.files}
    return {key: StoredTensor(files[path], key) for key, path in checkpoint.weights.items()}


def _weight_files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        if not isinstance(weight_map, dict):
            raise TowerLoadError(
                f"Expected weight_map in {index} to map tensors to files, found a {type(weight_map).__name__}. Fetch the file again."
            )
        shards = sorted({folder / str(name) for name in weight_map.values()})
        for shard in shards:
            if not shard.is_file():
                raise TowerLoadError(f"Expected the shard {shard}, found no such file. Fetch the checkpoint again.")
        if shards:
            return shards
    if (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf", ".nemo"))
    raise TowerLoadError(
        f"Expected {stem}.safetensors in {folder}, found {', '.join(others) or 'no weights'}. Only safetensors are read, because "
        "other formats can run code; convert the checkpoint, or fetch its safetensors revision."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; TowerLoadError in one line when there is none."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise TowerLoadError(
            f"Expected {path.name} in {path.parent}, found no such file. Is this a checkpoint folder?"
        ) from None
    except (OSError, ValueError) as error:
        raise TowerLoadError(f"Expected JSON in {path}, found: {error}. Fetch the file again.") from None
    if not isinstance(document, dict):
        raise TowerLoadError(
            f"Expected a JSON object in {path}, found a {type(document).__name__}. Fetch the file again."
        )
    return document


def _quantised_by_its_authors(folder: Path, config: Mapping[str, Any]) -> GptqFormat | None:
    """Quantised weights are never quantised again: the error would add up, and some classes drop the setting and load noise."""
    nested = [value for value in config.values() if isinstance(value, dict)]
    for section in (config, *nested):
        found = section.get("quantization_config")
        if not found:
            continue
        method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found
        if method == "gptq":
            return _gptq_format(folder, found)
        raise TowerLoadError(
            f"Expected weights in floating point or GPTQ in {folder}, found weights already quantised by {method}. Use the original "
            "checkpoint that this one was made from."
        )
    return None


def _gptq_format(folder: Path, found: Mapping[str, Any]) -> GptqFormat:
    bits: Any = found.get("bits")
    group_size: Any = found.get("group_size", 128)
    version = found.get("checkpoint_format", found.get("format", "gptq"))
    wrong = None
    if bits not in GPTQ_BITS:
        wrong = f"{bits} bits; use a checkpoint of {', '.join(map(str, GPTQ_BITS))} bits"
    elif not isinstance(group_size, int) or (group_size != -1 and group_size < 1):
        wrong = f"groups of {group_size}; fetch config.json again"
    elif version not in GPTQ_ZERO_OFFSETS:
        wrong = f"the layout {version}; use a checkpoint in one of {', '.join(GPTQ_ZERO_OFFSETS)}"
    if wrong is not None:
        raise TowerLoadError(f"Expected a GPTQ checkpoint that can be read in {folder}, found {wrong}.")
    return GptqFormat(bits, None if group_size == -1 else group_size, GPTQ_ZERO_OFFSETS[version])
