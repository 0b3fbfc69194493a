"""`nexus teachers tax`: what NF4 costs each teacher of a run on its held-out rows, one teacher after the other and without Ray.

The measurement is the one that `nexus evaluate` writes into a run's metrics and report (nexus/towers/tax.py); this command gives it
before anything is trained. `registry_taxes` weighs the registry's teachers of every role instead, on the fixed inputs of the health
probe.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus.assembly.evaluate import quantisation_tax, score_answers
from nexus.config import DataConfig, RunConfig, resolve_path
from nexus.data.loader import iter_records
from nexus.errors import ConfigError, DataError, TowerLoadError
from nexus.towers.probes import PROMPTS
from nexus.towers.registry import (
    BASE,
    TeacherEntry,
    load_registry,
    nearest,
    resolve_entry,
    resolve_teacher,
    spec_of_entry,
)

if TYPE_CHECKING:
    from nexus.data.records import Record
    from nexus.towers.engine import TeacherEngine

COSINE_OF = "cosine of embeddings"


@dataclass(frozen=True)
class TaxRow:
    """What NF4 costs one teacher on the rows of one capability."""

    teacher: str
    capability: str
    rows: int
    items: int
    """Tokens of a language model's answers, else rows."""
    mean_kl_nats: float | None
    """KL(original || NF4) per item; None for a teacher without distributions."""
    top1_agreement: float | None
    float_score: float | None
    """Share of rows that the original answers right."""
    nf4_score: float | None
    mean_cosine: float | None
    """Of the embeddings of an encoder without labels; None for all others."""
    quantised_share: float
    max_weight_error: float
    measure: str | None = None
    """What was compared on fixed inputs; None for a run's rows."""
    stored_bytes: int | None = None
    """Of the weights as loaded; None for a run's rows."""
    needs: str | None = None
    """Why nothing was measured."""


def measure_taxes(
    config: RunConfig, teachers: Sequence[str], *, max_rows: int, models_dir: Path | None
) -> Iterator[TaxRow]:
    """Measure teachers of a run, in its order; yields a row as soon as it is known.

    Args:
        teachers: ids of the run; empty means all.
        max_rows: of each capability, from its test files.

    Raises:
        ConfigError: an id that the run does not have.
        TowerLoadError: as `nexus.towers.loader.load_tower`.
        DataError: no row that can be read, or as `nexus.towers.engine.TeacherEngine.tax`.
    """
    known = tuple(teacher.id for teacher in config.teachers)
    for name in teachers:
        if name not in known:
            raise ConfigError(
                f"Expected ids of the run's teachers ({', '.join(known)}), found {name!r}{nearest(name, known)} Correct --teachers."
            )
    registry = load_registry()
    chosen = [teacher for teacher in config.teachers if not teachers or teacher.id in teachers]
    # Files are looked for before the first model is loaded.
    specs = [
        replace(
            resolve_teacher(teacher, registry, models_dir=models_dir),
            id=teacher.id,
            cache_dir=config.cache.dir,
            cache_min_parameters=config.cache.min_parameters,
        )
        for teacher in chosen
    ]
    rows = {
        capability: _rows(config.data_of(capability), max_rows)
        for teacher in chosen
        for capability in teacher.capabilities
    }
    from nexus.towers.engine import TeacherEngine
    from nexus.towers.loader import load_tower

    for teacher, spec in zip(chosen, specs, strict=True):
        engine = TeacherEngine(load_tower(spec), teacher_id=teacher.id)
        for capability in teacher.capabilities:
            yield _measure(engine, config.data_of(capability), rows[capability])


def registry_taxes(teachers: Sequence[str], *, tiny: bool, models_dir: Path | None) -> Iterator[TaxRow]:
    """Measure teachers of the registry on the fixed inputs of the health probe; yields a row as soon as it is known.

    Args:
        teachers: ids; empty means the whole registry.
        tiny: built tiny first; otherwise their checkpoints must be on this machine.

    Raises:
        TowerLoadError: an unknown id, or a teacher that is on this machine and cannot be loaded.
    """
    from nexus.towers.check import what_it_needs
    from nexus.vendors.environments import ENVIRONMENTS

    registry = load_registry()
    entries = [registry.get(name) for name in teachers] or list(registry.teachers)
    # All teachers of one package are weighed in one process of its environment, whose start takes longer than they do.
    said: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.library in ENVIRONMENTS and entry.id not in said and what_it_needs(entry, tiny=tiny) is None:
            said |= _said_of([other for other in entries if other.library == entry.library], tiny, models_dir)
        with tempfile.TemporaryDirectory(prefix="nexus-tax-") as scratch:
            yield _of_registry(entry, Path(scratch) / entry.id, said.get(entry.id), tiny=tiny, models_dir=models_dir)
        gc.collect()


def _said_of(entries: Sequence[TeacherEntry], tiny: bool, models_dir: Path | None) -> dict[str, dict[str, Any]]:
    """What the environment of a vendor's package says of its teachers; raises TowerLoadError for the first that failed."""
    from nexus.towers.check import ask_environment, silent_environment
    from nexus.vendors.check import WEIGH

    asked = [(entry.id, None if tiny else resolve_entry(entry, models_dir=models_dir).path) for entry in entries]
    documents, last = ask_environment(entries[0].library, asked, WEIGH)
    for entry in entries:
        said = documents.get(entry.id, {"status": "failed", "reason": silent_environment(entry.library, last)})
        if said["status"] != "ok":
            raise TowerLoadError(said["reason"])
    return documents


def _of_registry(
    entry: TeacherEntry, scratch: Path, said: dict[str, Any] | None, *, tiny: bool, models_dir: Path | None
) -> TaxRow:
    from nexus.towers.check import what_it_needs
    from nexus.towers.engine import TeacherEngine
    from nexus.towers.loader import load_tower
    from nexus.towers.tax import TargetTax
    from nexus.towers.tiny import write_tiny

    capability = ",".join(entry.capabilities)
    missing = what_it_needs(entry, tiny=tiny)
    if missing is not None:
        return TaxRow(entry.id, capability, 0, 0, None, None, None, None, None, 0.0, 0.0, needs=missing)
    if said is not None:
        measured = TargetTax(**said["tax"])
        share, error, size = said["quantised_share"], said["max_weight_error"], said["stored_bytes"]
    else:
        if tiny:
            write_tiny(entry.id, scratch)
            spec = spec_of_entry(entry, scratch, base=scratch / BASE if entry.base else None)
        else:
            spec = resolve_entry(entry, models_dir=models_dir)
        engine = TeacherEngine(load_tower(spec, device="cpu" if tiny else "auto"), teacher_id=entry.id)
        coverage = engine.tower.coverage
        found = engine.probe_tax()
        share, error, size = coverage.share, coverage.max_weight_error, coverage.stored_bytes
        if found is None:
            return TaxRow(
                entry.id, capability, 0, 0, None, None, None, None, None, share, error,
                stored_bytes=size, needs=f"an original to compare with: it is {coverage.method}",
            )  # fmt: skip
        measured = found
    return TaxRow(
        entry.id, capability, len(PROMPTS), measured.items, measured.mean_kl_nats, measured.top1_agreement, None, None,
        measured.mean_cosine, share, error, measure=measured.measure, stored_bytes=size,
    )  # fmt: skip


def render_tax(row: TaxRow) -> str:
    """One row for people."""
    if row.needs is not None:
        return f"{row.teacher:<24} {row.capability:<16} needs: {row.needs}"
    parts = []
    if row.mean_kl_nats is not None:
        parts.append(f"KL {row.mean_kl_nats:.4f} nats over {row.items} items, top-1 {row.top1_agreement:.1%}")
    if row.nf4_score is not None:
        parts.append(f"score {row.float_score:.3f} -> {row.nf4_score:.3f}")
    if row.mean_cosine is not None:
        parts.append(f"{row.measure or COSINE_OF} {row.mean_cosine:.4f} over {row.items} items")
    parts.append(f"{row.quantised_share:.0%} in NF4, weight error at most {row.max_weight_error:.3f}")
    if row.stored_bytes is not None:
        parts.append(f"{row.stored_bytes / 2**20:.2f} MiB")
    return f"{row.teacher:<24} {row.capability:<16} {row.rows:>4} rows  {'; '.join(parts)}"


def _rows(source: DataConfig, max_rows: int) -> list[Record]:
    paths = [resolve_path(text) for text in source.test]
    rows = list(islice(iter_records(paths, capability=source.capability, quarantine=None), max_rows))
    if not rows:
        raise DataError(
            f"Expected rows of {source.capability!r} to weigh NF4 on, found none in {', '.join(source.test)}."
        )
    return rows


def _measure(engine: TeacherEngine, source: DataConfig, rows: list[Record]) -> TaxRow:
    coverage = engine.tower.coverage
    if engine.role == "encoder" and engine.label_texts is None:
        cosines_B = engine.feature_tax(rows)
        return TaxRow(
            engine.teacher_id, source.capability, len(rows), len(cosines_B), None, None, None, None,
            float(cosines_B.mean()), coverage.share, coverage.max_weight_error,
        )  # fmt: skip
    if coverage.already is not None:
        return TaxRow(
            engine.teacher_id, source.capability, len(rows), 0, None, None, None, None, None, coverage.share,
            coverage.max_weight_error, needs=f"an original to compare with: it is {coverage.method}",
        )  # fmt: skip
    measured = engine.tax(rows, max_new_tokens=source.max_new_tokens, snr_db=source.snr_db)
    golds = [row.completion if row.answer is None else row.answer for row in rows]
    # Only rows that all have an answer give a score.
    gold = [answer for answer in golds if answer is not None]
    has_gold = len(gold) == len(rows)
    tax = quantisation_tax(
        float_correct=score_answers(measured.float_answers, gold, source.answer) if has_gold else [0.0] * len(rows),
        nf4_correct=score_answers(measured.nf4_answers, gold, source.answer) if has_gold else [0.0] * len(rows),
        kl_N=measured.kl_N,
        same_top1_N=measured.same_top1_N,
        quantised_share=coverage.share,
        max_weight_error=coverage.max_weight_error,
    )
    return TaxRow(
        engine.teacher_id, source.capability, len(rows), len(measured.kl_N), tax.mean_kl_nats, tax.top1_agreement,
        tax.float_score if has_gold else None, tax.nf4_score if has_gold else None, None, coverage.share,
        coverage.max_weight_error,
    )  # fmt: skip
