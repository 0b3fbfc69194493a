"""`nexus teachers tax`: what NF4 costs each teacher of a run on its held-out rows, one teacher after the other and without Ray.

The measurement is the one that `nexus evaluate` writes into a run's metrics and report (nexus/towers/tax.py); this command gives it
before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nexus.assembly.evaluate import quantisation_tax, score_answers
from nexus.config import DataConfig, RunConfig, resolve_path
from nexus.data.loader import iter_records
from nexus.errors import ConfigError, DataError
from nexus.towers.registry import load_registry, nearest, resolve_teacher

if TYPE_CHECKING:
    from nexus.data.records import Record
    from nexus.towers.engine import TeacherEngine

COSINE_OF = "embedding"


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


def render_tax(row: TaxRow) -> str:
    """One row for people."""
    parts = []
    if row.mean_kl_nats is not None:
        parts.append(f"KL {row.mean_kl_nats:.4f} nats over {row.items} items, top-1 {row.top1_agreement:.1%}")
    if row.nf4_score is not None:
        parts.append(f"score {row.float_score:.3f} -> {row.nf4_score:.3f}")
    if row.mean_cosine is not None:
        parts.append(f"cosine {row.mean_cosine:.4f} over {row.items} {COSINE_OF}s")
    parts.append(f"{row.quantised_share:.0%} in NF4, weight error at most {row.max_weight_error:.3f}")
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
