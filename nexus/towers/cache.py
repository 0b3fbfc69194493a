"""Quantised teachers on disk: what NF4 made of a checkpoint is written once and read by every later load.

An entry is a folder `<teacher>-<key>` with a manifest and safetensors files, one per transformer block and one for the rest, so that
a teacher can also be run block by block (streamed.py). The key is a hash of everything that the stored tensors follow from: the
checkpoint's configuration, files and a sample of their bytes, the class, the policy, the number type and device that they were
quantised on, and the versions of the libraries. Anything else is another entry; nothing is ever converted.

An entry is published by renaming a finished folder, so that two processes may write and read at once. It is used only when every
file has the hash of the manifest and the checkpoint is still the one that it was made from: unchanged size and time of each file, or
else the same hash. What fails is told by name and made again.

A matrix is stored as bitsandbytes stores it: `<name>.weight` and `<name>.weight.<part of its quantisation state>`. Buffers that no
state dict holds (rotary frequencies) are stored too, so that nothing needs to be computed again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nexus.artifacts import StrictModel, fingerprint_of, read_artifact, sha256_of, write_artifact
from nexus.errors import ArtifactError, TowerLoadError
from nexus.towers.checkpoint import Checkpoint, SourceFile, sampled_digest, source_files, weights_digest
from nexus.towers.experts import packed_tensors
from nexus.towers.nf4 import CoverageReport, QuantisationPlan

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the layout; part of every key."""
MANIFEST = "manifest.json"
REST = "rest.safetensors"
"""The file of everything outside the blocks."""
_QUANTISED = ".weight."
"""Stands between a matrix and a part of its quantisation state."""
_ABANDONED_S = 24 * 3600.0
"""A folder that was being written so long ago belongs to a process that was killed."""


class CacheManifest(StrictModel):
    """What an entry holds and what it was made from; the last file that is written."""

    teacher: str
    recipe: Mapping[str, Any]
    """What the key is the hash of, for people."""
    source: tuple[SourceFile, ...]
    """The checkpoint's files when the entry was made."""
    weights_digest: str
    """`nexus.towers.checkpoint.weights_digest` of that checkpoint: part of the teacher's fingerprint."""
    own_quantiser: bool
    coverage: CoverageReport
    files: Mapping[str, str]
    """Name of each safetensors file -> sha256."""
    ties: Mapping[str, str]
    """Name of a tied parameter -> the name under which it is stored."""


@dataclass(frozen=True)
class CacheEntry:
    """An entry whose files have the hashes of its manifest."""

    folder: Path
    manifest: CacheManifest

    def block_files(self) -> tuple[tuple[Path, ...], ...]:
        """The files of each block, in order."""
        files: dict[str, list[Path]] = defaultdict(list)
        for name in sorted(self.manifest.files):
            if name != REST:
                files[name.rpartition("-")[0]].append(self.folder / name)
        return tuple(tuple(paths) for paths in files.values())

    def fill_rest(self, model: PreTrainedModel, device: torch.device) -> None:
        """As `fill`, but without the blocks.

        Raises:
            TowerLoadError: blocks share parameters with each other or with the rest, so that they cannot come and go.
        """
        rest = read_tensors(self.folder / REST)
        shared = [alias for alias, name in self.manifest.ties.items() if name not in rest]
        if shared:
            raise TowerLoadError(
                f"Expected blocks of their own in teacher {self.manifest.teacher!r}, found that {shared[0]!r} is shared. Load it "
                "whole instead of streamed."
            )
        install(model, rest, device)
        self.tie(model)

    def fill(self, model: PreTrainedModel, device: torch.device) -> None:
        """Put every stored tensor into `model`, whose modules are as quantisation leaves them and whose tensors are on meta."""
        for name in sorted(self.manifest.files):
            install(model, read_tensors(self.folder / name), device)
        self.tie(model)

    def tie(self, model: PreTrainedModel) -> None:
        """Make tied parameters one again."""
        for alias, name in self.manifest.ties.items():
            owner, leaf = _owner(model, alias)
            owner._parameters[leaf] = model.get_parameter(name)


class QuantisedCache:
    """The entries in one folder, which may not exist yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find(self, teacher: str, recipe: Mapping[str, Any], checkpoint: Checkpoint) -> CacheEntry | None:
        """The entry for `recipe`, or None when there is none that can be used."""
        folder = self._folder(teacher, recipe)
        if not folder.is_dir():
            return None
        try:
            manifest = read_artifact(folder / MANIFEST, CacheManifest)
            for name, digest in manifest.files.items():
                if sha256_of(folder / name) != digest:
                    raise ArtifactError(f"{name} does not have the hash of the manifest")
            # A file that was touched or copied is compared by content; one that was not is believed.
            if manifest.source != source_files(checkpoint) and manifest.weights_digest != weights_digest(checkpoint):
                raise ArtifactError("the checkpoint has changed since")
        except (ArtifactError, OSError) as error:
            logger.warning("quantised cache: %s cannot be used (%s); it is made again", folder, error)
            return None
        return CacheEntry(folder, manifest)

    def write(
        self,
        teacher: str,
        recipe: Mapping[str, Any],
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        *,
        blocks: Sequence[str],
        coverage: CoverageReport,
        digest: str,
        own_quantiser: bool,
    ) -> CacheEntry | None:
        """Publish a loaded model; None, with a warning, when the folder cannot be written: the teacher itself is loaded.

        Args:
            blocks: dotted names of the blocks, in order; each gets a file of its own.
            digest: the checkpoint's `weights_digest`.
        """
        with self.writing(teacher, recipe) as draft:
            return draft.finish(
                model,
                blocks=blocks,
                manifest=CacheManifest(
                    teacher=teacher,
                    recipe=recipe,
                    source=source_files(checkpoint),
                    weights_digest=digest,
                    own_quantiser=own_quantiser,
                    coverage=coverage,
                    files={},
                    ties={},
                ),
            )
        return None

    def writing(self, teacher: str, recipe: Mapping[str, Any]) -> _Draft:
        """A folder to fill, published by `publish` and otherwise removed; leaving it swallows errors of the disk with a warning."""
        return _Draft(self.directory, self._folder(teacher, recipe))

    def _folder(self, teacher: str, recipe: Mapping[str, Any]) -> Path:
        return self.directory / f"{teacher}-{fingerprint_of(recipe)}"


class BlockSpill:
    """Takes the packed tensors of blocks as they are made (`nexus.towers.experts.spilling`) and writes a file per block."""

    def __init__(self, draft: _Draft, blocks: Sequence[str]) -> None:
        self._draft = draft
        self._blocks = blocks
        self._index: int | None = None
        self._pending: dict[str, Tensor] = {}
        self.failure: OSError | SafetensorError | None = None
        """Why a block could not be written; transformers hides what goes wrong while it loads."""

    def __call__(self, tensors: dict[str, Tensor]) -> bool:
        """Keep the tensors of a block; those of the rest stay in the model."""
        index = _block_of(next(iter(tensors)), self._blocks)
        if index is None:
            return False
        if index != self._index:
            try:
                self.flush()
            except (OSError, SafetensorError) as error:
                self.failure = error
                raise
            self._index = index
        self._pending.update(tensors)
        return True

    def flush(self) -> None:
        """Write what is held; transformers loads in the order of names, so a block is complete when the next one begins."""
        if self._index is not None:
            self._draft.add(block_file(self._index), self._pending)
        self._index, self._pending = None, {}


class _Draft:
    """An entry that is being written."""

    def __init__(self, directory: Path, final: Path) -> None:
        self.files: dict[str, str] = {}
        self._directory = directory
        self._final = final
        self._folder = directory / f".{final.name}.{uuid.uuid4().hex}.tmp"
        self._replaced = _inode(final)

    def __enter__(self) -> _Draft:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError, ArtifactError)):
            self._warn(error)
            return True
        return False

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one file."""
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True)
            _remove_abandoned(self._directory)
        path = self._folder / name
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        self.files[name] = sha256_of(path)

    def finish(self, model: nn.Module, *, blocks: Sequence[str], manifest: CacheManifest) -> CacheEntry:
        """Write all that `model` holds and publish it; `files` and `ties` of the manifest are filled in here."""
        tensors, ties = stored_state(model)
        for name, group in _by_block(tensors, blocks).items():
            # A block whose matrices were spilled has a file already.
            self.add(name.replace("-0.", "-1.") if name in self.files else name, group)
        return self.publish(manifest.model_copy(update={"files": dict(self.files), "ties": ties}))

    def publish(self, manifest: CacheManifest) -> CacheEntry:
        """Write the manifest and put the folder in its place, unless another process has put an equal one there meanwhile."""
        write_artifact(self._folder / MANIFEST, manifest)
        old = self._folder.with_suffix(".old")
        with (self._directory / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _inode(self._final) in (None, self._replaced):
                # What stands there was found unfit before this one was begun.
                with suppress(FileNotFoundError):
                    self._final.rename(old)
                self._folder.rename(self._final)
        shutil.rmtree(old, ignore_errors=True)
        return CacheEntry(self._final, manifest)

    def _warn(self, error: BaseException) -> None:
        logger.warning("quantised cache: %s cannot be written (%s)", self._final, " ".join(str(error).split()))


def recipe_of(
    checkpoint: Checkpoint,
    *,
    model_class: str,
    plan: QuantisationPlan,
    dtype: torch.dtype,
    device_type: str,
    blocks: Sequence[str],
    code: bool,
) -> dict[str, Any]:
    """Everything that the tensors of an entry follow from, as plain JSON values.

    Args:
        code: the folder's own Python files are run, and count.
    """
    return {
        "format": FORMAT,
        "config": dict(checkpoint.config),
        "files": [[path.name, path.stat().st_size, sampled_digest(path)] for path in checkpoint.files],
        "code": [[path.name, sha256_of(path)] for path in sorted(checkpoint.folder.glob("*.py"))] if code else [],
        "class": model_class,
        "float": list(plan.keep),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_type,
        "blocks": list(blocks),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bitsandbytes": bnb.__version__,
        },
    }


def stored_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a loaded model by its name, quantisation states taken apart; and tied names -> the stored one.

    What lies on meta has been spilled, or is filled by no load, and is left out.
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
            continue
        first[id(parameter)] = name
        if not parameter.is_meta:
            is_packed = getattr(parameter, "quant_state", None) is not None
            tensors.update(packed_tensors(name, parameter) if is_packed else {name: parameter.data})
    for name, tensor in _other_tensors(model):
        # A buffer that is another one's view may not be stored as such.
        tensors[name] = tensor.clone()
    return tensors, ties


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, in memory of their own.

    Raises:
        TowerLoadError: the file cannot be read.
    """
    try:
        # Not mapped: what the file becomes later cannot matter, and nothing is counted that is not held.
        with safe_open(path, framework="pt", backend="pread") as file:
            # torch's own memory is aligned; matrix products of misaligned operands may differ in the last bits.
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  # the file is no mapping
    except (OSError, SafetensorError) as error:
        raise TowerLoadError(
            f"Expected to read {path} of the quantised cache, found: {' '.join(str(error).split())}. Load the teacher again."
        ) from None


def install(model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put stored tensors into the places that their names say, on `device`."""
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    plain = {}
    for name, tensor in tensors.items():
        matrix, mark, part = name.partition(_QUANTISED)
        if mark:
            states[f"{matrix}.weight"][part] = tensor
        else:
            plain[name] = tensor
    for name, tensor in plain.items():
        owner, leaf = _owner(model, name)
        if name in states:
            owner._parameters[leaf] = bnb.nn.Params4bit.from_prequantized(
                data=tensor, quantized_stats=states[name], device=device, module=owner
            )
        elif leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=False)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = tensor.to(device)
        else:
            setattr(owner, leaf, tensor.to(device))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _other_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and tensors that are plain attributes of a module."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        attributes = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
        for name, tensor in (*module._buffers.items(), *attributes.items()):
            if tensor is not None and not tensor.is_meta:
                yield f"{prefix}{name}", tensor


def _by_block(tensors: Mapping[str, Tensor], blocks: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors."""
    files: dict[str, dict[str, Tensor]] = {REST: {}}
    for name, tensor in tensors.items():
        index = _block_of(name, blocks)
        files.setdefault(REST if index is None else block_file(index), {})[name] = tensor
    return files


def block_file(index: int, part: int = 0) -> str:
    """The name of a block's file; sorted names are in the blocks' order."""
    return f"block-{index:05d}-{part}.safetensors"


def _block_of(name: str, blocks: Sequence[str]) -> int | None:
    return next((index for index, block in enumerate(blocks) if name.startswith(f"{block}.")), None)


def _inode(folder: Path) -> int | None:
    """What tells one folder from a later one of the same name; None without any."""
    return folder.stat().st_ino if folder.is_dir() else None


def _remove_abandoned(directory: Path) -> None:
    for folder in directory.glob(".*.*"):
        with suppress(OSError):
            if time.time() - os.stat(folder).st_mtime > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
