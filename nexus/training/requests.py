"""What a teacher is asked about rows: the same while the student trains and when its targets are written beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from nexus.data.media import read_media
from nexus.data.records import Record
from nexus.data.targets import ScoreSettings
from nexus.errors import ConfigError, TowerLoadError
from nexus.towers.packing import PackedKind
from nexus.towers.targets import ScoreRequest
from nexus.training.facts import CapabilityFacts, TeacherFacts, TokenTransport

TOPK = TokenTransport("topk")
NO_DISTRIBUTIONS = TokenTransport("none")


def is_asked(teacher: TeacherFacts, *, by_span: bool) -> bool:
    """Whether training asks it about rows at all: the answers of a language model with another tokenizer may say everything.

    Args:
        by_span: its distribution is compared span by span with the student's.
    """
    return teacher.role != "causal_lm" or teacher.shares_tokenizer or by_span or bool(teacher.critical_layers)


def score_request(
    teacher: TeacherFacts,
    records: Sequence[Record],
    *,
    temperature: float,
    by_span: bool,
    top_k: int,
    transport: TokenTransport | None,
    capability: CapabilityFacts,
) -> ScoreRequest:
    """The request for these rows; language models score the rows' completions, others their media.

    Args:
        by_span: as `is_asked`; the probability of a span is that of its text at temperature 1 only.
        transport: of a teacher with the student's tokenizer; None takes top-k.

    Raises:
        TowerLoadError: a row for a language model has no completion.
    """
    is_language = teacher.role == "causal_lm"
    chosen = TOPK
    if teacher.shares_tokenizer and transport is not None:
        chosen = transport
    elif is_language and not teacher.shares_tokenizer and not by_span:
        # The text of its answers is learned from, and its layers: no loss reads the distributions. Spans need no more than top-k.
        chosen = NO_DISTRIBUTIONS
    return ScoreRequest(
        row_ids=tuple(record.id for record in records),
        prompts=tuple(record.prompt for record in records),
        completions=tuple(completion_of(record) for record in records) if is_language else None,
        media=None if is_language else tuple(_media_bytes(record) for record in records),
        temperature=1.0 if by_span else temperature,
        top_k=top_k,
        layers=tuple(layer for layer, _ in teacher.critical_layers),
        snr_db=capability.snr_db,
        transport=chosen.kind,
        draws=chosen.draws,
        max_error=chosen.max_error,
        capability=capability.name,
    )


def settings_of(request: ScoreRequest, teacher: TeacherFacts) -> ScoreSettings:
    """What cached targets that answer `request` depend on beside its rows.

    Raises:
        ConfigError: they cannot be cached.
    """
    kind: PackedKind | None = None
    if teacher.role == "causal_lm":
        if request.transport == "hidden" or request.transport == "auto":  # spelt out for the type checker
            raise ConfigError(
                f"Expected transport topk, sampled or full for the cached targets of teacher {teacher.id!r}, found "
                f"{request.transport}: its output head would be needed while the student trains. Choose one of them."
            )
        kind = request.transport
    return ScoreSettings(
        teacher=teacher.id,
        fingerprint=teacher.fingerprint,
        temperature=request.temperature,
        transport=kind,
        width={"topk": request.top_k, "sampled": request.draws}.get(str(kind)),
        layers=request.layers,
        hidden_size=teacher.hidden_size,
        snr_db=request.snr_db,
    )


def completion_of(record: Record) -> str:
    """The row's completion. Raises TowerLoadError without one."""
    if record.completion is None:
        raise TowerLoadError(
            f"Expected a completion in row {record.id}, found none. Extract the teacher's answers first."
        )
    return record.completion


def _media_bytes(record: Record) -> bytes:
    assert record.media is not None, "the loader refuses rows without the media that their columns promise"
    return read_media(record.media)
