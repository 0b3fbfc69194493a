"""From a language model's logits to what a request's transport sends of them.

Shape letters: B rows, N scored tokens, V vocabulary, K kept ids, S draws, H the model's width, J candidates for K.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nexus.towers.packing import bytes_per_token
from nexus.towers.targets import (
    FullTargets,
    HiddenTargets,
    SampledTargets,
    ScoreRequest,
    TokenDistributions,
    TokensAlone,
    TokenTargets,
)

AUTO_MAX_K = 512
"""Most ids that `auto` keeps of a token: 2,176 bytes at 18 bits. Beyond it the last hidden state of all but the widest models is
smaller, and exact."""


def keep_columns(
    logits_NV: Tensor | None,
    states_NH: Tensor | None,
    request: ScoreRequest,
    row_ids: Sequence[str],
    counts: Sequence[int],
) -> tuple[dict[str, Tensor], Tensor]:
    """What has to be kept of some rows until the whole request is known.

    Args:
        logits_NV: any float type; divided by the request's temperature and normalised in float32. Not needed by hidden and none.
        states_NH: what the output head reads; needed by the transports hidden and auto.
        row_ids: of the rows that the N tokens belong to, one after the other.
        counts: tokens of each of them.

    Returns:
        Name -> [N, ...] on the logits' device; and bool [N], False where the model's results are not finite.
    """
    columns: dict[str, Tensor] = {}
    finite = []
    if request.transport in ("hidden", "auto"):
        assert states_NH is not None, "these transports need the states that the head reads"
        columns["states"] = states_NH.float()
        finite.append(torch.isfinite(states_NH).all(dim=-1))
    if request.transport == "none":
        return {}, torch.ones(sum(counts), dtype=torch.bool)
    if request.transport != "hidden":
        assert logits_NV is not None, "all other transports need logits"
        logprobs, finite_N = _logit_columns(logits_NV, request, row_ids, counts)
        columns |= logprobs
        finite.append(finite_N)
    return columns, torch.stack(finite).all(dim=0)


def _logit_columns(
    logits_NV: Tensor, request: ScoreRequest, row_ids: Sequence[str], counts: Sequence[int]
) -> tuple[dict[str, Tensor], Tensor]:
    if request.transport in ("topk", "auto"):
        kept = min(request.top_k if request.transport == "topk" else AUTO_MAX_K, logits_NV.shape[1])
        packed = pack_topk(logits_NV, top_k=kept, temperature=request.temperature)
        columns = {"ids": packed.ids_NK, "logprobs": packed.logprobs_NK, "tail": packed.tail_N}
        if request.transport == "auto":
            columns["errors"] = _topk_errors(logits_NV, packed, request.temperature)
        return columns, packed.finite_N
    logprobs_NV = torch.log_softmax(_tempered(logits_NV, request.temperature), dim=-1)
    finite_N = torch.isfinite(logprobs_NV.amax(dim=-1))
    if request.transport == "full":
        return {"logprobs": logprobs_NV}, finite_N
    ids_NS = _draw(logprobs_NV, request, row_ids, counts)
    return {"ids": ids_NS, "logprobs": logprobs_NV.gather(-1, ids_NS.long())}, finite_N


def to_targets(
    columns: Mapping[str, np.ndarray],
    request: ScoreRequest,
    *,
    offsets_B1: np.ndarray,
    token_ids_N: np.ndarray,
    vocabulary_size: int,
) -> TokenDistributions:
    """The reply's distributions from the columns of all rows; `auto` is decided here, on all of them together."""
    if request.transport == "none":
        return TokensAlone(offsets_B1, token_ids_N)
    if request.transport == "hidden":
        return HiddenTargets(offsets_B1, token_ids_N, columns["states"])
    if request.transport == "full":
        return FullTargets(offsets_B1, token_ids_N, columns["logprobs"])
    if request.transport == "sampled":
        return SampledTargets(offsets_B1, token_ids_N, columns["ids"], columns["logprobs"])
    whole = TokenTargets(offsets_B1, token_ids_N, columns["ids"], columns["logprobs"], columns["tail"])
    if request.transport == "topk":
        return whole
    assert request.max_error is not None, "auto comes with the error that it may make"
    return _fewest_bytes(whole, columns["states"], columns["errors"], request.max_error, vocabulary_size)


@dataclass(frozen=True)
class PackedTopK:
    """The K most probable ids of each position and the mass of the rest, on the model's device."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor
    finite_N: Tensor
    """False where the logits held NaN, infinity, or nothing but -infinity."""


def pack_topk(logits_NV: Tensor, *, top_k: int, temperature: float) -> PackedTopK:
    """Top-k with a tail: exp(logprobs).sum() + exp(tail) is 1 up to rounding.

    The tail is the log-sum-exp of what was not kept and not log(1 - kept mass), which loses every digit when the kept mass is near 1.

    Args:
        logits_NV: any float type; divided by the temperature and normalised in float32.
        top_k: at most V.
    """
    logprobs_NV = torch.log_softmax(_tempered(logits_NV, temperature), dim=-1)
    kept_NK, ids_NK = logprobs_NV.topk(top_k, dim=-1)
    return PackedTopK(
        ids_NK=ids_NK.to(torch.int32),
        logprobs_NK=kept_NK,
        # In place: nothing else reads them, and a copy would be as large as the logits.
        tail_N=torch.logsumexp(logprobs_NV.scatter_(-1, ids_NK, float("-inf")), dim=-1),
        finite_N=torch.isfinite(kept_NK[:, 0]),
    )


def _tempered(logits_NV: Tensor, temperature: float) -> Tensor:
    """In float32. A division by 1 would write the largest tensor of all once more."""
    return logits_NV.float() if temperature == 1.0 else logits_NV.float() / temperature


def _draw(logprobs_NV: Tensor, request: ScoreRequest, row_ids: Sequence[str], counts: Sequence[int]) -> Tensor:
    """int32 [N, S] by inversion, in float64: single precision would never draw the rarest ids.

    The numbers behind a row's draws follow from its id alone, so that a repeated, a cached and a live request agree.
    """
    assert request.draws is not None, "sampled comes with the number of draws"
    parts = [torch.empty(0, request.draws, dtype=torch.int32, device=logprobs_NV.device)]
    for row_id, logprobs_TV in zip(row_ids, logprobs_NV.split(list(counts)), strict=True):
        seed = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "little")
        uniform_TS = np.random.default_rng(seed).random((len(logprobs_TV), request.draws))
        mass_TV = logprobs_TV.double().exp().cumsum(dim=-1)
        places_TS = torch.from_numpy(uniform_TS).to(mass_TV.device) * mass_TV[:, -1:]
        ids_TS = torch.searchsorted(mass_TV, places_TS, right=True)
        parts.append(ids_TS.clamp_max_(logprobs_TV.shape[1] - 1).to(torch.int32))
    return torch.cat(parts)


def _candidates(kept: int) -> list[int]:
    """The numbers of ids that `auto` chooses among: powers of two, and all that were kept."""
    return [*(1 << power for power in range(kept.bit_length()) if 1 << power < kept), kept]


def _topk_errors(logits_NV: Tensor, packed: PackedTopK, temperature: float) -> Tensor:
    """float32 [N, J]: KL(teacher || its k + 1 bins, the tail spread evenly) for each candidate k.

    sum over the ids outside of p log p, minus tail log(tail / (V - k)). Of rounding it says nothing: that adds about 1e-5 nats.
    """
    vocabulary_size = logits_NV.shape[1]
    logprobs_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1).double()
    negentropy_N = _plogp(logprobs_NV).sum(dim=-1)
    logprobs_NK = packed.logprobs_NK.double()
    kept_NK = _plogp(logprobs_NK).cumsum(dim=-1)
    # From the back: 1 - (kept mass) would lose every digit of a small tail.
    tails_NK = torch.logaddexp(
        packed.tail_N.double()[:, None], logprobs_NK.flip(-1).logcumsumexp(dim=-1).flip(-1).roll(-1, -1)
    )
    tails_NK[:, -1:] = packed.tail_N.double()[:, None]
    errors = []
    for k in _candidates(logprobs_NK.shape[1]):
        outside = vocabulary_size - k
        log_tail_N = tails_NK[:, k - 1]
        spread_N = log_tail_N.exp() * (log_tail_N.clamp_min(-1e3) - np.log(max(1, outside)))
        errors.append((negentropy_N - kept_NK[:, k - 1] - spread_N).clamp_min(0.0) if outside else 0.0 * spread_N)
    return torch.stack(errors, dim=-1).float()


def _plogp(logprobs: Tensor) -> Tensor:
    return logprobs.exp() * logprobs.clamp_min(-1e3)


def _fewest_bytes(
    whole: TokenTargets, states_NH: np.ndarray, errors_NJ: np.ndarray, max_error: float, vocabulary_size: int
) -> TokenDistributions:
    kept = whole.ids_NK.shape[1]
    scored = (whole.offsets_B1, whole.token_ids_N)
    hidden_bytes = bytes_per_token("hidden", width=states_NH.shape[1], vocabulary_size=vocabulary_size)
    full_bytes = bytes_per_token("full", width=vocabulary_size, vocabulary_size=vocabulary_size)
    exact_bytes = min(hidden_bytes, full_bytes) if kept == vocabulary_size else hidden_bytes
    means_J = errors_NJ.astype(np.float64).sum(axis=0) / max(1, len(errors_NJ))
    for k, error in zip(_candidates(kept), means_J.tolist(), strict=True):
        if error <= max_error and bytes_per_token("topk", width=k, vocabulary_size=vocabulary_size) < exact_bytes:
            rest_NJ = np.concatenate([whole.tail_logprob_N[:, None], whole.logprobs_NK[:, k:]], axis=1)
            return TokenTargets(
                *scored, whole.ids_NK[:, :k], whole.logprobs_NK[:, :k], np.logaddexp.reduce(rest_NJ, axis=1)
            )
    if exact_bytes < hidden_bytes:
        logprobs_NV = np.empty((len(whole.ids_NK), vocabulary_size), np.float32)
        np.put_along_axis(logprobs_NV, whole.ids_NK.astype(np.int64), whole.logprobs_NK, axis=1)
        return FullTargets(*scored, logprobs_NV)
    return HiddenTargets(*scored, states_NH)
