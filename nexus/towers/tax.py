"""The quantisation tax of one teacher: its floating-point original against its NF4 copy on the same held-out rows.

Both copies answer the rows (the caller compares their scores), and both are read on the same items at temperature 1: every token of
the NF4 copy's own answers for a language model, because those are what a student learns from, and every row for a classifier.
An encoder without labels gives features: what is compared is the direction of each row's embedding.

`target_tax` weighs the targets of every role, on fixed inputs that need no data: distributions by KL where there are any, what has no
distribution (features of an sae, noise predictions, embeddings, reconstructions) by its direction.
Shape letters: N items (tokens or rows), C classes or vocabulary, B rows, E embedding width, F features of a dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nexus.data.records import Record
from nexus.errors import DataError
from nexus.towers.targets import ScoreRequest, SparseTargets, TeacherTargets, TokenTargets

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


@dataclass(frozen=True)
class TargetTax:
    """What NF4 costs a teacher's targets on fixed inputs: a divergence and an agreement, or a cosine."""

    measure: str
    """What was compared."""
    items: int
    """Tokens or rows."""
    mean_kl_nats: float | None
    """KL(original || NF4) per token."""
    top1_agreement: float | None
    mean_cosine: float | None
    """Between the original and NF4, per item."""


def whole_distributions(request: ScoreRequest, vocabulary_size: int | None) -> ScoreRequest:
    """`request` with nothing kept back of a distribution, and without hidden states."""
    return replace(request, top_k=vocabulary_size or request.top_k, layers=(), temperature=1.0)


def target_tax(original: TeacherTargets, quantised: TeacherTargets) -> TargetTax:
    """Compare the targets of both copies of a teacher for one request of `whole_distributions`.

    Raises:
        DataError: targets of another kind, or NF4 rules out what the original allows.
    """
    if isinstance(original.tokens, TokenTargets) and isinstance(quantised.tokens, TokenTargets):
        kl_N, same_N = divergence(*_dense_logprobs(original.tokens, quantised.tokens))
        if not bool(kl_N.isfinite().all()):
            raise DataError(
                f"Expected a finite divergence of teacher {original.teacher!r}, found infinity: NF4 rules out what the original "
                "allows. Keep more modules in floating point (skip_modules)."
            )
        return TargetTax("KL of tokens", len(kl_N), float(kl_N.mean()), float(same_N.double().mean()), None)
    pairs = [_vectors(targets) for targets in (original, quantised)]
    if any(pair is None for pair in pairs):
        raise DataError(
            f"Expected targets that can be weighed of teacher {original.teacher!r}, found none. Report this."
        )
    (what, original_N), (_, quantised_N) = [pair for pair in pairs if pair is not None]
    cosines = [_cosine(one, other) for one, other in zip(original_N, quantised_N, strict=True)]
    return TargetTax(f"cosine of {what}", len(cosines), None, None, float(np.mean(cosines)))


def _dense_logprobs(*columns: TokenTargets) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, C] of each over the ids that both have kept, with all else as one more class.

    Where the codebooks of one model differ in size, fewer ids are kept than the larger ones have; the divergence of the merged
    classes is then a lower bound.
    """
    size = 1 + max(int(tokens.ids_NK.max()) for tokens in columns)
    whole = [
        torch.full((len(tokens.ids_NK), size), -torch.inf, dtype=torch.float64).scatter_(
            1, torch.from_numpy(tokens.ids_NK.astype(np.int64)), torch.from_numpy(tokens.logprobs_NK).double()
        )
        for tokens in columns
    ]
    both_NC = (whole[0] > -torch.inf) & (whole[1] > -torch.inf)
    first, second = (
        torch.cat(
            [
                logprobs_NC.masked_fill(~both_NC, -torch.inf),
                torch.logsumexp(
                    torch.cat(
                        [
                            logprobs_NC.masked_fill(both_NC, -torch.inf),
                            torch.from_numpy(tokens.tail_logprob_N)[:, None],
                        ],
                        dim=1,
                    ),
                    dim=1,
                    keepdim=True,
                ),
            ],
            dim=1,
        )
        for logprobs_NC, tokens in zip(whole, columns, strict=True)
    )
    return first, second


def _vectors(targets: TeacherTargets) -> tuple[str, list[np.ndarray]] | None:
    """What the targets are when they are no distribution, and a vector per item."""
    if targets.features is not None:
        return "features", [
            row for layer in sorted(targets.features) for row in _dense_features(targets.features[layer])
        ]
    if targets.denoising is not None:
        # Of the first step: at every later one the copies no longer look at the same latents.
        return "noise predictions", [row.ravel() for row in targets.denoising.predictions_BS[:, 0]]
    if targets.codec is not None:
        return "reconstructions", np.split(targets.codec.samples_T, targets.codec.sample_offsets_B1[1:-1])
    if targets.pooled_BE is not None:
        return "embeddings", list(targets.pooled_BE)
    return None


def _dense_features(sparse: SparseTargets) -> np.ndarray:
    """float32 [N, F]."""
    dense_NF = np.zeros((len(sparse.token_offsets_N1) - 1, sparse.num_features), dtype=np.float32)
    tokens_Z = np.repeat(np.arange(len(dense_NF)), np.diff(sparse.token_offsets_N1))
    dense_NF[tokens_Z, sparse.feature_ids_Z] = sparse.values_Z
    return dense_NF


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """1 for two vectors of zeros, which say the same; 0 when one alone is of zeros."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / norms) if norms else float(not one.any() and not other.any())


def divergence(original_logits_NC: Tensor, quantised_logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    """KL(original || quantised) in nats, float64 [N] and never negative, and whether the arg-max agrees, bool [N]."""
    log_p_NC = torch.log_softmax(original_logits_NC.double(), dim=-1)
    log_q_NC = torch.log_softmax(quantised_logits_NC.double(), dim=-1)
    # A class that the original cannot choose adds nothing: 0 * (-inf - x) would be NaN.
    terms_NC = torch.where(log_p_NC.exp() > 0, log_p_NC.exp() * (log_p_NC - log_q_NC), 0.0)
    return terms_NC.sum(dim=-1).clamp(min=0), log_p_NC.argmax(dim=-1) == log_q_NC.argmax(dim=-1)
