"""The quantisation tax of one teacher: its float original against its NF4 copy on the same held-out rows.

Both copies answer the rows (their scores are compared by the caller), and both are scored on the same items: every token of the NF4
copy's own answers for a language model, the label distribution of every row for a classifier.

Shape letters: N items (tokens or rows), C classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nexus.data.records import Record
from nexus.towers.engine import TeacherEngine
from nexus.towers.targets import TeacherTargets

CHUNK_ROWS = 16
"""Rows scored at a time: dense distributions over a vocabulary of 152k take 0.6 MB per token and copy."""


@dataclass(frozen=True)
class TaxMeasurement:
    """Answers of both copies and their distributions' distance."""

    float_answers: tuple[str, ...]
    nf4_answers: tuple[str, ...]
    kl_N: np.ndarray
    """float64 [N]; KL(float || NF4) in nats."""
    same_top1_N: np.ndarray
    """bool [N]; both copies have the same most probable item."""


def measure_tax(
    float_engine: TeacherEngine,
    nf4_engine: TeacherEngine,
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    snr_db: float | None,
) -> TaxMeasurement:
    """Compare two engines over the same checkpoint; see the module."""
    float_answers = float_engine.answer(records, max_new_tokens=max_new_tokens, snr_db=snr_db)
    nf4_answers = nf4_engine.answer(records, max_new_tokens=max_new_tokens, snr_db=snr_db)
    divergences, agreements = [], []
    for start in range(0, len(records), CHUNK_ROWS):
        rows = records[start : start + CHUNK_ROWS]
        request = nf4_engine.request(rows, completions=nf4_answers[start : start + CHUNK_ROWS], snr_db=snr_db)
        log_p_NC = _dense(float_engine.score(request))
        log_q_NC = _dense(nf4_engine.score(request))
        p_NC = np.exp(log_p_NC)
        divergences.append(np.where(p_NC > 0, p_NC * (log_p_NC - log_q_NC), 0.0).sum(axis=1))
        agreements.append(log_p_NC.argmax(axis=1) == log_q_NC.argmax(axis=1))
    return TaxMeasurement(float_answers, nf4_answers, np.concatenate(divergences), np.concatenate(agreements))


def _dense(targets: TeacherTargets) -> np.ndarray:
    """Log-probabilities [N, C], float64."""
    if targets.tokens is None:
        assert targets.label_logprobs_BC is not None
        return targets.label_logprobs_BC.astype(np.float64)
    tokens = targets.tokens
    dense_NC = np.full(tokens.ids_NK.shape, -np.inf)
    np.put_along_axis(dense_NC, tokens.ids_NK.astype(np.int64), tokens.logprobs_NK.astype(np.float64), axis=1)
    return dense_NC
