"""Tries teachers one by one: load through the real path, run the role, say in one row what happened.

With `tiny` each architecture is built small from its own configuration class first (tiny.py); without, the checkpoints of this
machine are tried. A row is `ok` only when the teacher's own class was loaded and its targets passed the health probe; a teacher that
lacks a package, its files or access says what it `needs`; anything else is `failed` with the reason. Nothing is stood in for.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess  # nosec B404 # the interpreter of an environment that the user made
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from nexus.config import Role
from nexus.errors import NexusError, TowerLoadError
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import LoadedTower, load_tower
from nexus.towers.probes import probe_media, probe_request
from nexus.towers.registry import (
    BASE,
    TeacherEntry,
    TeacherRegistry,
    resolve_entry,
    spec_of_entry,
)
from nexus.towers.targets import TeacherTargets
from nexus.towers.tiny import has_tiny, write_tiny
from nexus.vendors.environments import ENVIRONMENTS, interpreter_of, process_environment, what_to_type

DIFFUSERS = "diffusers; type: pip install 'nexus-distill[diffusion]'"
"""What a diffusion teacher needs where the extra is not installed."""

Status = Literal["ok", "needs", "failed"]


@dataclass(frozen=True)
class CheckRow:
    """What became of one teacher."""

    id: str
    status: Status
    reason: str | None
    """What it needs or why it failed; None when it is ok."""
    role: Role
    quantised: bool
    """Something of it is stored in NF4, or in what its authors quantised it with."""
    quantised_share: float | None
    """Share of its parameters that are; None when it was not loaded."""
    quantisable_share: float | None
    """Share that NF4 could hold, policy aside."""
    bits_per_param: float | None
    """Stored bits per quantised parameter; None when nothing is quantised."""
    targets: tuple[str, ...]
    """Kinds of target that it gave, with the length of a row's part."""
    seconds: float
    method: str = "in NF4"
    """How the quantised share is stored (`CoverageReport.method`)."""


def check_teachers(
    registry: TeacherRegistry,
    teachers: Sequence[str],
    *,
    tiny: bool,
    models_dir: Path | None = None,
    keep: Path | None = None,
) -> Iterator[CheckRow]:
    """Try teachers by their ids, in that order; yields a row as soon as it is known.

    One teacher is in memory at a time, and tiny folders are deleted as soon as they are read, unless they are kept.

    Args:
        teachers: ids; empty means the whole registry.
        models_dir: without `tiny`, searched before the Hugging Face cache.
        keep: with `tiny`, where the folders are left, each named as its teacher; one that is there is not built again.

    Raises:
        TowerLoadError: an unknown id, before anything is tried.
    """
    entries = [registry.get(teacher) for teacher in teachers] or list(registry.teachers)
    tried: dict[str, CheckRow] = {}
    for entry in entries:
        start = time.perf_counter()
        missing = what_it_needs(entry, tiny=tiny)
        if missing is not None:
            yield _row(entry, "needs", missing, start)
            continue
        if entry.library in ENVIRONMENTS:
            if entry.id not in tried:
                siblings = [other for other in entries if other.library == entry.library]
                tried |= _rows_of_environment(siblings, tiny=tiny, models_dir=models_dir, keep=keep)
            yield tried[entry.id]
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="nexus-check-") as scratch:
                if tiny:
                    folder = (keep or Path(scratch)) / entry.id
                    if not folder.exists():
                        write_tiny(entry.id, folder)
                    spec = spec_of_entry(entry, folder, base=folder / BASE if entry.base else None)
                else:
                    spec = resolve_entry(entry, models_dir=models_dir)
                # Checked where it runs in any case; a tiny model is no work for a GPU.
                tower = load_tower(spec, device="cpu" if tiny else "auto")
                targets = exercise(TeacherEngine(tower, teacher_id=entry.id))
            yield _row(entry, "ok", None, start, tower, targets)
            del tower
        except NexusError as error:
            # Without their files real checkpoints are not wrong, they are not here.
            absent = not tiny and "found neither" in str(error)
            yield _row(entry, "needs" if absent else "failed", str(error), start)
        except (
            Exception
        ) as error:  # the one place that decides: a library's own mistake is this row's result, not the command's
            yield _row(entry, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", start)
        gc.collect()


def what_it_needs(entry: TeacherEntry, *, tiny: bool) -> str | None:
    """What keeps a teacher from being tried on this machine, and what to type; None when nothing does."""
    if entry.library == "diffusers" and find_spec("diffusers") is None:
        return DIFFUSERS
    if entry.library in ENVIRONMENTS:
        return what_to_type(entry.library) if interpreter_of(entry.library) is None else None
    if (entry.model_class is None and entry.role != "sae") or entry.remote_code.needed:
        return "; ".join(entry.needs)
    if tiny and not has_tiny(entry.id):
        return (
            f"a tiny build of {entry.model_class}, which is not there; type: nexus teachers check --teachers {entry.id}"
        )
    return None


def _rows_of_environment(
    entries: Sequence[TeacherEntry], *, tiny: bool, models_dir: Path | None, keep: Path | None
) -> dict[str, CheckRow]:
    """Try teachers of one vendor's package, all in one process of its environment."""
    start = time.perf_counter()
    rows: dict[str, CheckRow] = {}
    asked: list[tuple[str, str | None]] = []
    for entry in entries:
        try:
            kept = None if keep is None else str(keep.absolute() / entry.id)
            asked.append((entry.id, kept if tiny else resolve_entry(entry, models_dir=models_dir).path))
        except TowerLoadError as error:
            rows[entry.id] = _row(entry, "needs" if "found neither" in str(error) else "failed", str(error), start)
    if not asked:
        return rows
    documents, last = ask_environment(entries[0].library, asked)
    for entry in entries:
        if entry.id in documents:
            document = documents[entry.id]
            rows[entry.id] = CheckRow(
                id=entry.id,
                status=document["status"],
                reason=document["reason"],
                role=entry.role,
                quantised=document.get("quantised", False),
                quantised_share=document.get("quantised_share"),
                quantisable_share=document.get("quantisable_share"),
                bits_per_param=document.get("bits_per_param"),
                targets=tuple(document.get("targets", ())),
                seconds=document["seconds"],
            )
        elif entry.id not in rows:
            rows[entry.id] = _row(entry, "failed", silent_environment(entry.library, last), start)
    return rows


def ask_environment(
    library: str, asked: Sequence[tuple[str, str | None]], *flags: str
) -> tuple[dict[str, dict[str, Any]], str]:
    """What `python -m nexus.vendors.check` says of each teacher in the environment of its package, and its last words otherwise."""
    python = interpreter_of(library)
    assert python is not None, "only teachers whose environment is there are tried"
    done = subprocess.run(
        [str(python), "-m", "nexus.vendors.check", json.dumps(asked), *flags],
        capture_output=True, text=True, check=False, env={**os.environ, **process_environment()},
    )  # fmt: skip
    # Some packages greet on standard output.
    said = [line for line in done.stdout.splitlines() if line.startswith('{"id": ')]
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {row["id"]: row for row in map(json.loads, said)}, last


def silent_environment(library: str, last: str) -> str:
    """Why a teacher has no row, when the process ended before it came to it."""
    return (
        f"Expected {interpreter_of(library)} to try it, found: {last[:300]}. Make the environment again: make teacher-env "
        f"NAME={library}"
    )


def exercise(engine: TeacherEngine) -> tuple[str, ...]:
    """Run the teacher's role on two rows; returns the kinds of target that it gave.

    Raises:
        NexusError: whatever the engine raises for them.
    """
    layers = tuple(sorted({0, engine.num_layers - 1})) if engine.num_layers and engine.role != "sae" else ()
    request = probe_request(engine.tower, layers)
    kinds = _kinds(engine.score(request))
    if engine.role == "causal_lm":
        engine.generate(request.prompts, max_new_tokens=4)
        kinds.append("text")
        if engine.tower.processor is not None:
            engine.score(replace(request, media=probe_media(engine.tower)))
            kinds.append("media")
    return tuple(kinds)


def _kinds(targets: TeacherTargets) -> list[str]:
    kinds = []
    if targets.tokens is not None:
        kinds.append("tokens")
    if targets.hidden:
        kinds.append("hidden")
    if targets.pooled_BE is not None:
        kinds.append("embedding")
    if targets.label_logprobs_BC is not None:
        kinds.append("labels")
    if targets.features is not None:
        kinds.append("features")
    if targets.codec is not None:
        kinds += ["codes", "latents", "reconstruction"]
    if targets.denoising is not None:
        kinds += ["noise", *(["blocks"] if targets.denoising.blocks else [])]
    return kinds


def _row(
    entry: TeacherEntry,
    status: Status,
    reason: str | None,
    start: float,
    tower: LoadedTower | None = None,
    targets: tuple[str, ...] = (),
) -> CheckRow:
    coverage = None if tower is None else tower.coverage
    quantised = coverage is not None and coverage.quantised_params > 0
    numbers: dict[str, Any] = {
        "quantised": quantised,
        "quantised_share": None if coverage is None else coverage.share,
        "quantisable_share": None if coverage is None else coverage.quantisable_share,
        "bits_per_param": coverage.bits_per_param if coverage is not None and quantised else None,
        **({} if coverage is None else {"method": coverage.method}),
    }
    return CheckRow(
        entry.id, status, reason, entry.role, targets=targets, seconds=time.perf_counter() - start, **numbers
    )
