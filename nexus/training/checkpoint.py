"""Checkpoints of a training run: a folder per step, complete or absent.

`checkpoints/step-00000100/` holds `student.safetensors` (weights), `state.pt` (optimizer, schedule, recovery, cursor, RNG: plain
tensors and numbers, read back with `weights_only=True`) and `manifest.json` (sha256 of both). The folder is written under another
name and renamed last, so a killed process leaves the previous checkpoint in force.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nexus.artifacts import StrictModel, read_artifact, sha256_of, write_artifact
from nexus.errors import ArtifactError

_FOLDER = re.compile(r"step-(\d{8})")
WEIGHTS_FILE = "student.safetensors"
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"


class CheckpointManifest(StrictModel):
    """manifest.json of one checkpoint."""

    step: int
    fingerprint: str
    """Hash of the configuration sections that training depends on."""
    sources: dict[str, str]
    """What else the weights were learned from (a teacher, a pretrained trunk) -> its fingerprint."""
    files: dict[str, str]
    """File name -> sha256."""
    aliases: dict[str, str]
    """Weight -> the stored weight that it is tied to; safetensors stores each memory once."""


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    fingerprint: str,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    sources: Mapping[str, str] = MappingProxyType({}),
    keep: int = 2,
) -> Path:
    """Write one checkpoint below `directory` and drop all but the newest `keep`.

    Args:
        sources: what the weights were learned from besides the configuration, by the names that `load_checkpoint` refuses with.

    Raises:
        ArtifactError: when the disk refuses.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f".step-{step:08d}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        aliases = _aliases(weights)
        stored = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items() if name not in aliases}
        save_file(stored, temporary / WEIGHTS_FILE)
        with (temporary / STATE_FILE).open(
            "wb"
        ) as file:  # given a path, torch would name its own line instead of a full disk
            torch.save(dict(state), file)
        files = {name: sha256_of(temporary / name) for name in (WEIGHTS_FILE, STATE_FILE)}
        manifest = CheckpointManifest(
            step=step, fingerprint=fingerprint, sources=dict(sources), files=files, aliases=aliases
        )
        write_artifact(temporary / MANIFEST_FILE, manifest)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        refused = error.__context__ if isinstance(error.__context__, OSError) else error
        raise ArtifactError(
            f"Expected to write the checkpoint {final}, found: {refused}. Free disk space and run the same command again."
        ) from error
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints below `directory`, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _FOLDER.fullmatch(path.name))


def load_checkpoint(
    directory: Path, *, fingerprint: str, sources: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """Step, weights and state of the newest checkpoint below `directory`; None when there is none.

    Args:
        sources: those of `save_checkpoint` that have to be the same now.

    Raises:
        ArtifactError: when it is damaged, belongs to a run with another configuration, or was learned from another source.
    """
    found = list_checkpoints(directory)
    if not found:
        return None
    newest = found[-1]
    manifest = read_artifact(newest / MANIFEST_FILE, CheckpointManifest)
    if manifest.fingerprint != fingerprint:
        raise ArtifactError(
            f"Expected {newest} to belong to this configuration ({fingerprint}), found {manifest.fingerprint}. "
            "Choose another --out, or delete the folder to train anew."
        )
    for name, source in sources.items():
        if manifest.sources.get(name) != source:
            raise ArtifactError(
                f"Expected {name} as it was when {newest} was written ({manifest.sources.get(name)}), found another ({source}). Put "
                "the former back, or choose another --out to train anew."
            )
    for name, digest in manifest.files.items():
        path = newest / name
        if not path.is_file() or sha256_of(path) != digest:
            raise ArtifactError(
                f"Expected {path} as its manifest describes it, found another or no file. Delete {newest}."
            )
    state = torch.load(newest / STATE_FILE, weights_only=True, map_location="cpu")
    weights = load_file(newest / WEIGHTS_FILE)
    return manifest.step, weights | {name: weights[target] for name, target in manifest.aliases.items()}, state


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` without its frozen parameters, which are read again from where they came."""
    frozen = _frozen(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give `model` what `trained_weights` took from one built alike.

    Raises:
        ArtifactError: when the weights are another model's.
    """
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    strange = sorted({*missing} - _frozen(model)) + sorted(unexpected)
    if strange:
        raise ArtifactError(
            f"Expected the checkpoint's weights to be those of this student, found {len(strange)} that are missing or unknown, "
            f"{strange[0]} among them. Train anew with another --out."
        )


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def _aliases(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is the whole memory of an earlier one."""
    first: dict[tuple[int, int], str] = {}
    aliases = {}
    for name, tensor in weights.items():
        memory = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and memory in first:
            aliases[name] = first[memory]
        first.setdefault(memory, name)
    return aliases
