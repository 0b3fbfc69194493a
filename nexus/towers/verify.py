"""Compares a teacher's files on this machine with what the registry says of them, reading headers and hashes, never a model.

Offline that is: every file whole and, where the Hugging Face client noted the hash that it was published under, of that hash; the
commit that it noted equal to the pinned one; the type that config.json names; every tensor of the class there, of its shape, and no
other. What only the repository itself can tell is listed as such: facts that the registry marks `verify`, and hashes of files
that came without a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from nexus.artifacts import sha256_of
from nexus.errors import NexusError, TowerLoadError
from nexus.towers.checkpoint import read_json
from nexus.towers.loader import check_tensors
from nexus.towers.registry import TeacherEntry, TeacherRegistry, resolve_entry

_NOTES = Path(".cache") / "huggingface" / "download"
"""Where the client writes, beside files that it fetched into a folder, the commit and the hash of each."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
PARAMETERS_TOLERANCE = 0.1
"""Published sizes are rounded, and some count embeddings that others leave out."""

VerifyStatus = Literal["ok", "absent", "failed"]


@dataclass(frozen=True)
class VerifyRow:
    """What became of one teacher."""

    id: str
    status: VerifyStatus
    reason: str | None
    """What is wrong or absent; None when all that could be verified is right."""
    verified: tuple[str, ...]
    """What was compared and is right."""
    online: tuple[str, ...]
    """What only the repository can tell: open it with a network and compare."""


def verify_teachers(
    registry: TeacherRegistry, teachers: Sequence[str], *, models_dir: Path | None = None
) -> Iterator[VerifyRow]:
    """Compare teachers by their ids, in that order; yields a row as soon as it is known.

    Args:
        teachers: ids; empty means the whole registry.
        models_dir: searched before the Hugging Face cache.

    Raises:
        TowerLoadError: an unknown id, before anything is read.
    """
    entries = [registry.get(teacher) for teacher in teachers] or list(registry.teachers)
    for entry in entries:
        yield _verify(entry, models_dir)


def _verify(entry: TeacherEntry, models_dir: Path | None) -> VerifyRow:
    online: list[str] = list(entry.verify)
    verified: list[str] = []
    try:
        spec = resolve_entry(entry, models_dir=models_dir)
    except NexusError as error:
        return VerifyRow(entry.id, "absent", str(error), (), tuple(online))
    # A link in the models folder may lead into the hub's cache.
    folder = Path(spec.path).resolve()
    try:
        _compare_files(folder, verified, online)
        _compare_revision(entry, folder, verified, online)
        # Pipelines and dictionaries are folders of several parts, whose classes only their own loaders know.
        if entry.role not in ("sae", "diffusion"):
            _compare_config(entry, folder)
            verified.append("config")
            _compare_size(entry, folder, check_tensors(spec))
            verified += ["tensors", "parameters"]
    except NexusError as error:
        return VerifyRow(entry.id, "failed", str(error), tuple(verified), tuple(online))
    return VerifyRow(entry.id, "ok", None, tuple(verified), tuple(online))


def _compare_files(folder: Path, verified: list[str], online: list[str]) -> None:
    """Every safetensors file opens, and has the hash under which it was published, where that is known here."""
    paths = sorted(folder.rglob("*.safetensors"))
    for path in paths:
        try:
            with safe_open(path, framework="np", backend="pread"):
                pass
        except (OSError, SafetensorError) as error:
            raise TowerLoadError(
                f"Expected readable safetensors in {path}, found: {' '.join(str(error).split())}. Fetch the file again."
            ) from None
    verified.append("files")
    published = {path: _published_hash(folder, path) for path in paths}
    for path, expected in published.items():
        if expected is not None and (found := sha256_of(path)) != expected:
            raise TowerLoadError(
                f"Expected sha256 {expected} of {path}, as it was published, found {found}. Fetch the file again."
            )
    unknown = [path.name for path, expected in published.items() if expected is None]
    if len(unknown) < len(paths):
        verified.append("sha256")
    if unknown:
        online.append(f"sha256 of {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}")


def _published_hash(folder: Path, path: Path) -> str | None:
    """Of a large file the hub's own name is its sha256: the blob that the cache links to, or the client's note."""
    if path.is_symlink() and _SHA256.fullmatch(name := path.readlink().name):
        return name
    note = _note(folder, path)
    return note[1] if len(note) > 1 and _SHA256.fullmatch(note[1]) else None


def _note(folder: Path, path: Path) -> list[str]:
    """Commit, hash and time of a file that the client fetched into a folder; empty without a note."""
    note = folder / _NOTES / f"{path.relative_to(folder)}.metadata"
    return note.read_text().splitlines() if note.is_file() else []


def _compare_revision(entry: TeacherEntry, folder: Path, verified: list[str], online: list[str]) -> None:
    """The commit that the client fetched is the pinned one."""
    if entry.revision is None:
        return
    notes = [_note(folder, path) for path in sorted(folder.rglob("*.safetensors"))]
    commits = {note[0] for note in notes if note}
    if folder.parent.name == "snapshots":
        commits.add(folder.name)
    if not commits:
        online.append("revision of the files")
    elif commits != {entry.revision}:
        raise TowerLoadError(
            f"Expected revision {entry.revision} of {entry.repo} in {folder}, found {', '.join(sorted(commits))}. Fetch it again "
            f"with: nexus teachers pull {entry.id}"
        )
    else:
        verified.append("revision")


def _compare_config(entry: TeacherEntry, folder: Path) -> None:
    """config.json names the type and, where it names any, the class of the entry."""
    config = read_json(folder / "config.json")
    found = config.get("model_type")
    if entry.model_type is not None and found != entry.model_type:
        raise TowerLoadError(
            f"Expected model_type {entry.model_type!r} in {folder / 'config.json'}, found {found!r}. Fetch {entry.repo} again, or "
            f"mend the entry {entry.id!r} of configs/teachers.yaml."
        )


def _compare_size(entry: TeacherEntry, folder: Path, parameters: int) -> None:
    size = parameters / 1e9
    if abs(size / entry.billion_parameters - 1) > PARAMETERS_TOLERANCE:
        raise TowerLoadError(
            f"Expected {entry.billion_parameters:g} billion parameters in {folder}, found {size:.3g}. Fetch {entry.repo} again, or "
            "mend billion_parameters in configs/teachers.yaml."
        )
