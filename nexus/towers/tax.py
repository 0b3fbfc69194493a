"""The quantisation tax of one teacher: its floating-point original against its NF4 copy on the same held-out rows.

Both copies answer the rows (the caller compares their scores), and both are read on the same items at temperature 1: every token of
the NF4 copy's own answers for a language model, because those are what a student learns from, and every row for a classifier.
An encoder without labels gives features: what is compared is the direction of each row's embedding.
Shape letters: N items (tokens or rows), C classes or vocabulary, B rows, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nexus.data.records import Record

if TYPE_CHECKING:
    from nexus.towers.engine import TeacherEngine


@dataclass(frozen=True)
class TaxMeasurement:
    """Answers of both copies and their distributions' distance."""

    float_answers: tuple[str, ...]
    nf4_answers: tuple[str, ...]
    kl_N: np.ndarray
    """float64 [N]; KL(original || NF4) in nats. Empty for a teacher without an original (`TeacherEngine.tax`)."""
    same_top1_N: np.ndarray
    """bool [N]; both copies have the same most probable class."""


def measure_tax(
    float_engine: TeacherEngine,
    nf4_engine: TeacherEngine,
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    snr_db: float | None,
) -> TaxMeasurement:
    """Compare two engines over the same checkpoint; raises as `TeacherEngine.answer` does."""
    float_answers = float_engine.answer(records, max_new_tokens=max_new_tokens, snr_db=snr_db)
    nf4_answers = nf4_engine.answer(records, max_new_tokens=max_new_tokens, snr_db=snr_db)
    originals = float_engine.answer_logits(records, nf4_answers, snr_db=snr_db)
    quantised = nf4_engine.answer_logits(records, nf4_answers, snr_db=snr_db)
    parts = [divergence(own_NC, other_NC) for own_NC, other_NC in zip(originals, quantised, strict=True)]
    return TaxMeasurement(
        float_answers,
        nf4_answers,
        np.concatenate([kl_N.cpu().numpy() for kl_N, _ in parts]),
        np.concatenate([same_N.cpu().numpy() for _, same_N in parts]),
    )


def feature_cosines(float_engine: TeacherEngine, nf4_engine: TeacherEngine, records: Sequence[Record]) -> np.ndarray:
    """Cosine of each row's pooled embedding with that of the original, float64 [B]; raises as `TeacherEngine.score` does."""
    original_BE, quantised_BE = (engine.embed(records).astype(np.float64) for engine in (float_engine, nf4_engine))
    norms_B = np.linalg.norm(original_BE, axis=1) * np.linalg.norm(quantised_BE, axis=1)
    cosines_B: np.ndarray = (original_BE * quantised_BE).sum(axis=1) / norms_B
    return cosines_B


def divergence(original_logits_NC: Tensor, quantised_logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    """KL(original || quantised) in nats, float64 [N] and never negative, and whether the arg-max agrees, bool [N]."""
    log_p_NC = torch.log_softmax(original_logits_NC.double(), dim=-1)
    log_q_NC = torch.log_softmax(quantised_logits_NC.double(), dim=-1)
    # A class that the original cannot choose adds nothing: 0 * (-inf - x) would be NaN.
    terms_NC = torch.where(log_p_NC.exp() > 0, log_p_NC.exp() * (log_p_NC - log_q_NC), 0.0)
    return terms_NC.sum(dim=-1).clamp(min=0), log_p_NC.argmax(dim=-1) == log_q_NC.argmax(dim=-1)
