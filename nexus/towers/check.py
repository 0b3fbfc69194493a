"""Tries teachers one by one: load through the real path, run the role, say in one row what happened.

With `tiny` each architecture is built small from its own configuration class first (tiny.py); without, the checkpoints of this
machine are tried. A row is `ok` only when the teacher's own class was loaded and its targets passed the health probe; a teacher that
lacks a package, its files or access says what it `needs`; anything else is `failed` with the reason. Nothing is stood in for.
"""

from __future__ import annotations

import gc
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
from PIL import Image

from nexus.config import Role
from nexus.data.media import read_media
from nexus.data.records import Media, Record
from nexus.errors import NexusError
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import LoadedTower, load_tower
from nexus.towers.registry import (
    TeacherEntry,
    TeacherRegistry,
    resolve_entry,
    spec_of_entry,
)
from nexus.towers.targets import ScoreRequest, TeacherTargets
from nexus.towers.tiny import BASE, has_tiny, write_tiny

REMEDIES = {
    "diffusers": "diffusers; type: pip install 'nexus-distill[diffusion]'",
    "qwen-tts": "qwen-tts, which pins transformers 4.57.3, in an environment of its own; type: python -m venv qwen-tts && "
    "qwen-tts/bin/pip install qwen-tts",
    "parler-tts": "parler-tts, which pins transformers 4.46.1, in an environment of its own; type: python -m venv parler-tts && "
    "parler-tts/bin/pip install parler-tts",
}
"""Package that is not there -> what it takes and what to type."""
MODULES = {"diffusers": "diffusers", "qwen-tts": "qwen_tts", "parler-tts": "parler_tts"}

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
    """Something of it is stored in NF4."""
    quantised_share: float | None
    """Share of its parameters in NF4; None when it was not loaded."""
    quantisable_share: float | None
    """Share that NF4 could hold, policy aside."""
    bits_per_param: float | None
    """Stored bits per quantised parameter; None when nothing is quantised."""
    targets: tuple[str, ...]
    """Kinds of target that it gave, with the length of a row's part."""
    seconds: float


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
    for entry in entries:
        start = time.perf_counter()
        missing = what_it_needs(entry, tiny=tiny)
        if missing is not None:
            yield _row(entry, "needs", missing, start)
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
    module = MODULES.get(entry.library)
    if module is not None and find_spec(module) is None:
        return REMEDIES[entry.library]
    if (entry.model_class is None and entry.role != "sae") or entry.remote_code.needed:
        return "; ".join(entry.needs)
    if tiny and not has_tiny(entry.id):
        return (
            f"a tiny build of {entry.model_class}, which is not there; type: nexus teachers check --teachers {entry.id}"
        )
    return None


def exercise(engine: TeacherEngine) -> tuple[str, ...]:
    """Run the teacher's role on two rows; returns the kinds of target that it gave.

    Raises:
        NexusError: whatever the engine raises for them.
    """
    layers = tuple(sorted({0, engine.num_layers - 1})) if engine.num_layers else ()
    kinds = []
    if engine.role == "causal_lm":
        rows = (("Say hello.", "Hello."), ("What is 2 + 2?", "4"))
        prompts, completions = zip(*rows, strict=True)
        kinds += _kinds(engine.score(ScoreRequest(("a", "b"), prompts, completions, None, 1.0, 8, layers)))
        engine.generate(prompts, max_new_tokens=4)
        kinds.append("text")
    elif engine.role == "sae":
        kinds += _kinds(
            engine.score(ScoreRequest(("a", "b"), ("Say hello.", "Add."), ("Hello.", "4"), None, 1.0, 8, ()))
        )
    elif engine.role == "diffusion":
        prompts = ("a red square", "two dogs")
        pictures = (_picture(0), _picture(1))
        kinds += _kinds(engine.score(ScoreRequest(("a", "b"), prompts, None, pictures, 1.0, 8, layers)))
    else:
        media = tuple(read_media(record.media) for record in probe_rows(engine) if record.media is not None)
        kinds += _kinds(engine.score(ScoreRequest(("a", "b"), ("", ""), None, media, 1.0, 8, layers)))
    return tuple(kinds)


def probe_rows(engine: TeacherEngine) -> tuple[Record, Record]:
    """Two rows of noise and tones in the medium that the teacher takes."""
    rate = getattr(engine.tower.processor, "sampling_rate", None)
    kind: Literal["image", "audio", "video"] = "image"
    if rate is not None:
        kind, data = "audio", [_tone(seed, rate) for seed in (0, 1)]
    elif hasattr(engine.tower.model.config, "num_frames"):
        kind, data = "video", [_clip(seed) for seed in (0, 1)]
    else:
        data = [_picture(seed) for seed in (0, 1)]
    first, second = (
        Record(id=str(index), capability="check", prompt="", media=Media(kind, part)) for index, part in enumerate(data)
    )
    return first, second


def _picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _clip(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    first, *others = (Image.fromarray(frame) for frame in pixels)
    first.save(buffer, "GIF", save_all=True, append_images=others)
    return buffer.getvalue()


def _tone(seed: int, rate: int) -> bytes:
    """Half a second."""
    buffer = io.BytesIO()
    time_T = np.arange(rate // 2) / rate
    soundfile.write(buffer, 0.3 * np.sin(2 * np.pi * (200 + 150 * seed) * time_T), rate, format="WAV")
    return buffer.getvalue()


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
    }
    return CheckRow(
        entry.id, status, reason, entry.role, targets=targets, seconds=time.perf_counter() - start, **numbers
    )
