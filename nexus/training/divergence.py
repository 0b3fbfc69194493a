"""Divergences between a teacher's and a student's next-token distributions, dense and over k+1 bins.

Shape letters: B batch, T time, V vocabulary, K kept ids, N teachers, M scored positions (selected from B x T).

Conventions that hold for every function of this file:

- A loss mask marks *logit positions*: entry (b, t) is set when the prediction made at position t is scored. Bool or 0/1.
- The result is a scalar in nats per scored token: the sum over the scored positions divided by `num_loss_tokens`, the count
  over the whole optimizer step, all ranks and micro-batches included, so that accumulated micro-batches give the full-batch
  mean. A batch that scores nothing gives 0, attached to the graph, whatever `num_loss_tokens` is.
- Scored positions are selected before the softmax, because a padding position may hold inf and 0 * inf is nan.
- The softmax runs in float32, or in float64 when an input is float64; half-precision logits are upcast first.
- No gradient flows into the teacher.
- No temperature**2 factor: see `kd_loss`.
- An entry whose probability is 0 contributes 0, also where both log-probabilities are -inf (ids masked in both models). Where
  one model forbids what the divergence demands, the value is inf: that is the divergence, and the recovery step skips it.

With p the teacher and q the student, both at the given temperature:

    forward KL    KL(p || q)                                   Hinton et al. 2015, arXiv 1503.02531
    reverse KL    KL(q || p)                                   Gu et al. 2023, arXiv 2306.08543
    JSD_beta      beta KL(p || m) + (1 - beta) KL(q || m),     Agarwal et al. 2023, arXiv 2306.13649, eq. 1
                  m = beta p + (1 - beta) q; 0 and 1 are *defined* as the forward and the reverse KL, as TRL does
    SKL_a         KL(p || a p + (1 - a) q)                     Ko et al. 2024 (DistiLLM), arXiv 2402.03898, eq. 3
    SRKL_a        KL(q || (1 - a) p + a q)                     the same, eq. 4
    default mix   0.5 SKL_0.1 + 0.5 SRKL_0.1

Each has a form over k+1 bins (`topk_tail_*`, `distill_divergence_topk`): the kept ids, and everything else as one bin. Binning is a
coarsening, so none of them exceeds its dense value (data processing inequality). `training.hidden_divergence` computes the dense
values from hidden states without logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

DISTILL_SKEW = 0.1
"""The skew of the default mix: DistiLLM's measured optimum (arXiv 2402.03898, section 4.4)."""

MAX_KEPT_MASS = 1.05
"""Kept log-probabilities may sum to slightly more than 1: 64 bfloat16 roundings add at most 0.8 %. Beyond that they are not
log-probabilities."""

TAIL_ROUNDING_EPS = 8
"""A tail below this many machine epsilons of the teacher's log-probabilities is rounding: see `_topk_bins`."""


def forward_kl(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
) -> Tensor:
    """KL(teacher || student), the mean-seeking direction.

    Args:
        student_logits_BTV: any float dtype.
        teacher_logits_BTV: the same shape and the same vocabulary; detached.
        loss_mask_BT: bool or 0/1, set where the position is scored.
        num_loss_tokens: scored positions in the whole optimizer step.
        temperature: divides both logits before the softmax; finite and above 0.

    Returns:
        Scalar float32 (float64 for float64 logits), nats per scored token.

    Raises:
        ValueError: shapes that disagree, a temperature that is not positive, or a count below 1 while something is scored.
    """
    log_q_MV, log_p_MV = _dense_rows(student_logits_BTV, teacher_logits_BTV, loss_mask_BT, temperature)
    return per_token(_kl(log_p_MV, log_q_MV), num_loss_tokens)


def reverse_kl(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
) -> Tensor:
    """KL(student || teacher), the mode-seeking direction. Arguments, result and errors as `forward_kl`."""
    log_q_MV, log_p_MV = _dense_rows(student_logits_BTV, teacher_logits_BTV, loss_mask_BT, temperature)
    return per_token(_kl(log_q_MV, log_p_MV), num_loss_tokens)


def generalized_jsd(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    loss_mask_BT: Tensor,
    *,
    beta: float,
    temperature: float,
    num_loss_tokens: int | Tensor,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of GKD: beta 0 is KL(teacher || student), beta 1 is KL(student || teacher).

    The two ends are those divergences and not the limits of the interpolation (which are 0), as in TRL. In between the value
    is bounded by the entropy of (beta, 1 - beta), ln 2 at 0.5. Arguments, result and errors as `forward_kl`.
    """
    check_beta(beta)
    log_q_MV, log_p_MV = _dense_rows(student_logits_BTV, teacher_logits_BTV, loss_mask_BT, temperature)
    return per_token(_jsd(log_q_MV, log_p_MV, beta), num_loss_tokens)


def skewed_kl(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
    alpha: float = DISTILL_SKEW,
) -> Tensor:
    """SKL_alpha = KL(p || alpha p + (1 - alpha) q), at most ln(1 / alpha). Arguments, result and errors as `forward_kl`."""
    check_alpha(alpha)
    log_q_MV, log_p_MV = _dense_rows(student_logits_BTV, teacher_logits_BTV, loss_mask_BT, temperature)
    return per_token(_skewed_kl(log_p_MV, log_q_MV, alpha), num_loss_tokens)


def skewed_reverse_kl(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
    alpha: float = DISTILL_SKEW,
) -> Tensor:
    """SRKL_alpha = KL(q || (1 - alpha) p + alpha q), at most ln(1 / alpha). Arguments, result and errors as `forward_kl`."""
    check_alpha(alpha)
    log_q_MV, log_p_MV = _dense_rows(student_logits_BTV, teacher_logits_BTV, loss_mask_BT, temperature)
    return per_token(_skewed_kl(log_q_MV, log_p_MV, alpha), num_loss_tokens)


def distill_divergence(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
) -> Tensor:
    """The default mix 0.5 SKL_0.1 + 0.5 SRKL_0.1, at most ln 10: bounded, so one bad token cannot own the step.

    Arguments, result and errors as `forward_kl`.
    """
    log_q_MV, log_p_MV = _dense_rows(student_logits_BTV, teacher_logits_BTV, loss_mask_BT, temperature)
    return per_token(_distill_mix(log_q_MV, log_p_MV), num_loss_tokens)


def mixture_kl(
    student_logits_BTV: Tensor,
    teacher_logits_NBTV: Tensor,
    weights_N: Tensor | Sequence[float],
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
) -> Tensor:
    """KL(mixture || student) where the mixture is sum_n w_n softmax(teacher_n / temperature).

    A mixture of *probabilities*: averaging logits would be the geometric mean, which is another distribution. Only teachers
    with one and the same tokenizer can be mixed.

    Args:
        student_logits_BTV: any float dtype.
        teacher_logits_NBTV: one slice per teacher, the student's shape; detached.
        weights_N: relative weights, not negative and not all 0; divided by their sum. A teacher of weight 0 is not read.
        loss_mask_BT: bool or 0/1, set where the position is scored.
        num_loss_tokens: scored positions in the whole optimizer step.
        temperature: divides all logits before the softmax; finite and above 0.

    Returns:
        Scalar as in `forward_kl`.

    Raises:
        ValueError: as `forward_kl`; weights that are negative, not finite, all 0, or not one per teacher.
    """
    if teacher_logits_NBTV.ndim < 1 or teacher_logits_NBTV.shape[1:] != student_logits_BTV.shape:
        raise ValueError(
            f"teacher logits: expected one slice of shape {tuple(student_logits_BTV.shape)} per teacher, "
            f"found {tuple(teacher_logits_NBTV.shape)}; only teachers of one tokenizer can be mixed"
        )
    log_weights = _log_weights(weights_N, teacher_logits_NBTV.shape[0])
    mask_BT = _as_mask(loss_mask_BT, student_logits_BTV)
    dtype = compute_dtype(student_logits_BTV, teacher_logits_NBTV)
    log_q_MV = _log_softmax_rows(student_logits_BTV, mask_BT, temperature, dtype)
    log_p_MV: Tensor | None = None
    for log_weight, teacher_logits_BTV in zip(log_weights, teacher_logits_NBTV.detach(), strict=True):
        if log_weight > -math.inf:
            component_MV = _log_softmax_rows(teacher_logits_BTV, mask_BT, temperature, dtype) + log_weight
            log_p_MV = component_MV if log_p_MV is None else torch.logaddexp(log_p_MV, component_MV)
    assert log_p_MV is not None  # the weights have a positive sum
    return per_token(_kl(log_p_MV, log_q_MV), num_loss_tokens)


def topk_tail_kl(
    student_logits_BTV: Tensor,
    ids_BTK: Tensor,
    logprobs_BTK: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
    tail_logprob_BT: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) over k+1 bins: the teacher's k kept ids, and everything else as one bin.

    By the data processing inequality it never exceeds the dense forward KL, does not fall as k grows, and equals the dense
    value at k = V. The student's normaliser and its tail run over the whole vocabulary, so mass that leaves the kept ids is
    paid for (renormalising both sides on the kept ids would make it free).

    Args:
        student_logits_BTV: raw logits, any float dtype; divided by `temperature` here.
        ids_BTK: integer, distinct at each scored position, in [0, V).
        logprobs_BTK: the teacher's log-probabilities of these ids *at this same temperature* (the teacher tempers them
            before it selects, so that nothing has to be renormalised here); detached.
        loss_mask_BT: bool or 0/1, set where the position is scored.
        num_loss_tokens: scored positions in the whole optimizer step.
        temperature: finite and above 0.
        tail_logprob_BT: log of the teacher's mass outside the kept ids. Send it when the log-probabilities were rounded: in
            bfloat16 a kept mass of 0.998 rounds to 1. None takes 1 - (kept mass), in float64, and 0 when that is negative.
            The k+1 bins are divided by their sum, which is 1 up to such rounding, so that the result stays a divergence.

    Returns:
        Scalar as in `forward_kl`.

    Raises:
        ValueError: as `forward_kl`; ids out of range or repeated at a scored position; log-probabilities whose mass exceeds 1.
    """
    log_q_MJ, log_p_MJ = _topk_bins(
        student_logits_BTV, ids_BTK, logprobs_BTK, loss_mask_BT, temperature, tail_logprob_BT
    )
    return per_token(_kl(log_p_MJ, log_q_MJ), num_loss_tokens)


def distill_divergence_topk(
    student_logits_BTV: Tensor,
    ids_BTK: Tensor,
    logprobs_BTK: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
    tail_logprob_BT: Tensor | None = None,
) -> Tensor:
    """`distill_divergence` over the k+1 bins of `topk_tail_kl`, whose arguments and errors it shares.

    Each half is a divergence between the binned distributions, so it too never exceeds its dense value.
    """
    log_q_MJ, log_p_MJ = _topk_bins(
        student_logits_BTV, ids_BTK, logprobs_BTK, loss_mask_BT, temperature, tail_logprob_BT
    )
    return per_token(_distill_mix(log_q_MJ, log_p_MJ), num_loss_tokens)


def topk_tail_reverse_kl(
    student_logits_BTV: Tensor,
    ids_BTK: Tensor,
    logprobs_BTK: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
    tail_logprob_BT: Tensor | None = None,
) -> Tensor:
    """`reverse_kl` over the k+1 bins of `topk_tail_kl`, whose arguments and errors it shares.

    The tail bin keeps it from emptying the kept ids, which a truncated reverse KL rewards. A tail that was not sent is at least one
    rounding of the log-probabilities: a certain teacher's mass rounds to 1, and a student elsewhere would cost infinity.
    """
    log_q_MJ, log_p_MJ = _topk_bins(
        student_logits_BTV, ids_BTK, logprobs_BTK, loss_mask_BT, temperature, tail_logprob_BT, under_student=True
    )
    return per_token(_kl(log_q_MJ, log_p_MJ), num_loss_tokens)


def topk_tail_jsd(
    student_logits_BTV: Tensor,
    ids_BTK: Tensor,
    logprobs_BTK: Tensor,
    loss_mask_BT: Tensor,
    *,
    beta: float,
    num_loss_tokens: int | Tensor,
    temperature: float,
    tail_logprob_BT: Tensor | None = None,
) -> Tensor:
    """`generalized_jsd` over the k+1 bins of `topk_tail_kl`, whose arguments and errors it shares.

    At beta 1 it is `topk_tail_reverse_kl`.
    """
    check_beta(beta)
    log_q_MJ, log_p_MJ = _topk_bins(
        student_logits_BTV, ids_BTK, logprobs_BTK, loss_mask_BT, temperature, tail_logprob_BT, under_student=beta == 1.0
    )
    return per_token(_jsd(log_q_MJ, log_p_MJ, beta), num_loss_tokens)


def topk_tail_skewed_kl(
    student_logits_BTV: Tensor,
    ids_BTK: Tensor,
    logprobs_BTK: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
    alpha: float = DISTILL_SKEW,
    tail_logprob_BT: Tensor | None = None,
) -> Tensor:
    """`skewed_kl` over the k+1 bins of `topk_tail_kl`, whose arguments and errors it shares."""
    check_alpha(alpha)
    log_q_MJ, log_p_MJ = _topk_bins(
        student_logits_BTV, ids_BTK, logprobs_BTK, loss_mask_BT, temperature, tail_logprob_BT
    )
    return per_token(_skewed_kl(log_p_MJ, log_q_MJ, alpha), num_loss_tokens)


def topk_tail_skewed_reverse_kl(
    student_logits_BTV: Tensor,
    ids_BTK: Tensor,
    logprobs_BTK: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
    alpha: float = DISTILL_SKEW,
    tail_logprob_BT: Tensor | None = None,
) -> Tensor:
    """`skewed_reverse_kl` over the k+1 bins of `topk_tail_kl`, whose arguments and errors it shares."""
    check_alpha(alpha)
    log_q_MJ, log_p_MJ = _topk_bins(
        student_logits_BTV, ids_BTK, logprobs_BTK, loss_mask_BT, temperature, tail_logprob_BT
    )
    return per_token(_skewed_kl(log_q_MJ, log_p_MJ, alpha), num_loss_tokens)


def topk_tail_mixture_kl(
    student_logits_BTV: Tensor,
    ids_NBTK: Tensor,
    logprobs_NBTK: Tensor,
    weights_N: Tensor | Sequence[float],
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
) -> Tensor:
    """`mixture_kl` over bins: the ids that every teacher kept, and everything else as one bin.

    Teachers keep different ids, and what a teacher put on an id that only others kept is unknown inside its tail. So the common
    coarsening is used: an id that some teacher did not keep joins the tail of all. At K = V that is the dense value; below, it never
    exceeds it. Teachers of weight 0 do not narrow the common ids.

    Args:
        student_logits_BTV: raw logits, any float dtype.
        ids_NBTK: each teacher's kept ids, in any order; distinct within a teacher at each scored position.
        logprobs_NBTK: their log-probabilities at this temperature, float32 or float64 (a tail is 1 - kept mass); detached.
        weights_N: as in `mixture_kl`.
        loss_mask_BT: bool or 0/1, set where the position is scored.
        num_loss_tokens: scored positions in the whole optimizer step.
        temperature: finite and above 0.

    Returns:
        Scalar as in `forward_kl`.

    Raises:
        ValueError: as `topk_tail_kl` and `mixture_kl`.
    """
    if ids_NBTK.ndim < 1 or ids_NBTK.shape != logprobs_NBTK.shape:
        raise ValueError(
            f"top-k: expected ids and log-probabilities of one shape [teachers, ..., K], found {tuple(ids_NBTK.shape)} and "
            f"{tuple(logprobs_NBTK.shape)}"
        )
    log_weights = _log_weights(weights_N, ids_NBTK.shape[0])
    counted = [index for index, log_weight in enumerate(log_weights) if log_weight > -math.inf]
    first = counted[0]
    mixed_MK: Tensor | None = None
    for index in counted:
        mask_BT, ids_MK = _check_topk(student_logits_BTV, ids_NBTK[index], logprobs_NBTK[index], loss_mask_BT)
        first_ids_MK = ids_NBTK[first][mask_BT].long()
        logprobs_MK = logprobs_NBTK[index].detach()[mask_BT].double()
        _check_mass(logprobs_MK)
        same_MKK = first_ids_MK[:, :, None] == ids_MK[:, None, :]
        # nan marks an id that this teacher did not keep; it survives every later sum.
        matched_MK = torch.where(same_MKK, logprobs_MK[:, None, :], -math.inf).amax(dim=-1)
        weighted_MK = (matched_MK + log_weights[index]).masked_fill(~same_MKK.any(dim=-1), math.nan)
        mixed_MK = weighted_MK if mixed_MK is None else torch.logaddexp(mixed_MK, weighted_MK)
    assert mixed_MK is not None  # the weights have a positive sum
    dtype = compute_dtype(student_logits_BTV, logprobs_NBTK)
    log_q_MV = _log_softmax_rows(student_logits_BTV, mask_BT, temperature, dtype)
    kept_q_MK = log_q_MV.gather(-1, first_ids_MK)
    unkept_MK = mixed_MK.isnan()
    # Ids that are not common keep their place outside, and leave an empty bin of probability 0 on both sides.
    tail_q_M = logsumexp_or_absent(log_q_MV.scatter(-1, first_ids_MK, kept_q_MK.masked_fill(~unkept_MK, -math.inf)))
    log_p_MJ = _with_tail(mixed_MK.masked_fill(unkept_MK, -math.inf), None, tail_q_M, logprobs_NBTK.dtype)
    log_q_MJ = torch.cat([kept_q_MK.masked_fill(unkept_MK, -math.inf), tail_q_M[:, None]], dim=-1)
    return per_token(_kl(log_p_MJ.to(dtype), log_q_MJ), num_loss_tokens)


def sampled_kl(
    student_logits_BTV: Tensor,
    ids_BTS: Tensor,
    logprobs_BTS: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int | Tensor,
    temperature: float,
    proposal_logprobs_BTS: Tensor | None = None,
) -> Tensor:
    """Unbiased estimate of KL(teacher || student) from S draws of the teacher (RS-KD, arXiv 2503.16870, section 4).

    mean_s w_s (log p(x_s) - log q(x_s)), with w_s = p(x_s) / r(x_s) for draws from a proposal r, and 1 for draws from p itself. The
    student's normaliser runs over the whole vocabulary. Value and gradient equal those of `forward_kl` in expectation, which no
    top-k form's do; a single value may be negative. Departure from RS-KD: the weights are not divided by their sum, which would
    make the estimate biased.

    Args:
        student_logits_BTV: raw logits, any float dtype.
        ids_BTS: integer draws with replacement, in [0, V); repeats count as often as they were drawn.
        logprobs_BTS: the teacher's log-probabilities of the draws at this temperature; detached.
        loss_mask_BT: bool or 0/1, set where the position is scored.
        num_loss_tokens: scored positions in the whole optimizer step.
        temperature: finite and above 0.
        proposal_logprobs_BTS: log r of the draws; None when they were drawn from the teacher.

    Returns:
        Scalar as in `forward_kl`.

    Raises:
        ValueError: as `forward_kl`; ids out of range, or shapes that disagree.
    """
    mask_BT = _as_mask(loss_mask_BT, student_logits_BTV)
    shapes = {tuple(ids_BTS.shape), tuple(logprobs_BTS.shape)}
    shapes |= set() if proposal_logprobs_BTS is None else {tuple(proposal_logprobs_BTS.shape)}
    if len(shapes) != 1 or ids_BTS.shape[:-1] != mask_BT.shape or ids_BTS.shape[-1] == 0:
        raise ValueError(
            f"draws: expected ids and log-probabilities of shape {(*mask_BT.shape, 'S')} with S >= 1, found {sorted(shapes)}"
        )
    ids_MS = ids_BTS[mask_BT].long()
    _check_range(ids_MS, student_logits_BTV.shape[-1])
    dtype = compute_dtype(student_logits_BTV, logprobs_BTS)
    log_q_MS = _log_softmax_rows(student_logits_BTV, mask_BT, temperature, dtype).gather(-1, ids_MS)
    log_p_MS = logprobs_BTS.detach()[mask_BT].to(dtype)
    gap_MS = log_p_MS - log_q_MS
    if proposal_logprobs_BTS is not None:
        gap_MS = (log_p_MS - proposal_logprobs_BTS.detach()[mask_BT].to(dtype)).exp() * gap_MS
    return per_token(gap_MS.mean(dim=-1), num_loss_tokens)


def kd_loss(divergence: Tensor, *, temperature: float) -> Tensor:
    """temperature**2 * divergence: KD_t of the training objective.

    The gradient of a tempered divergence shrinks as 1 / temperature**2; the factor keeps its size, and with it the balance
    against other loss terms, independent of the temperature (Hinton et al. 2015, arXiv 1503.02531, section 2.1).
    """
    return divergence * check_temperature(temperature) ** 2


# Divergences between rows of log-probabilities; the first argument is the one the expectation is taken under.


def _kl(log_a_MJ: Tensor, log_b_MJ: Tensor) -> Tensor:
    """KL(a || b) for each row [M]; entries with a = 0 contribute 0 to value and gradient even where b = 0 too."""
    a_MJ = log_a_MJ.exp()
    absent_MJ = a_MJ == 0
    # Both sides are replaced where a = 0: 0 * (-inf + inf) is nan in the value, and 0 * nan is nan in the gradient.
    return (a_MJ * (log_a_MJ.masked_fill(absent_MJ, 0.0) - log_b_MJ.masked_fill(absent_MJ, 0.0))).sum(dim=-1)


def _log_mixture(log_a_MJ: Tensor, log_b_MJ: Tensor, weight_a: float) -> Tensor:
    """log(weight_a * a + (1 - weight_a) * b), for 0 < weight_a < 1, without leaving log space.

    Where both are 0 the result is arbitrary but finite: logaddexp(-inf, -inf) has a nan gradient, and `_kl` ignores the entry.
    """
    both_absent_MJ = torch.isneginf(log_a_MJ) & torch.isneginf(log_b_MJ)
    return torch.logaddexp(
        log_a_MJ.masked_fill(both_absent_MJ, 0.0) + math.log(weight_a),
        log_b_MJ.masked_fill(both_absent_MJ, 0.0) + math.log1p(-weight_a),
    )


def _jsd(log_q_MJ: Tensor, log_p_MJ: Tensor, beta: float) -> Tensor:
    if beta == 0.0:
        return _kl(log_p_MJ, log_q_MJ)
    if beta == 1.0:
        return _kl(log_q_MJ, log_p_MJ)
    log_m_MJ = _log_mixture(log_p_MJ, log_q_MJ, beta)
    return beta * _kl(log_p_MJ, log_m_MJ) + (1.0 - beta) * _kl(log_q_MJ, log_m_MJ)


def _skewed_kl(log_a_MJ: Tensor, log_b_MJ: Tensor, alpha: float) -> Tensor:
    """KL(a || alpha a + (1 - alpha) b)."""
    return _kl(log_a_MJ, _log_mixture(log_a_MJ, log_b_MJ, alpha))


def _distill_mix(log_q_MJ: Tensor, log_p_MJ: Tensor) -> Tensor:
    return 0.5 * _skewed_kl(log_p_MJ, log_q_MJ, DISTILL_SKEW) + 0.5 * _skewed_kl(log_q_MJ, log_p_MJ, DISTILL_SKEW)


# From logits to rows of log-probabilities at the scored positions.


def _dense_rows(
    student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, loss_mask_BT: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log q, log p), each [M, V]; only the first carries a gradient."""
    if student_logits_BTV.shape != teacher_logits_BTV.shape:
        raise ValueError(
            f"logits: expected one shape for both models, found student {tuple(student_logits_BTV.shape)} and teacher "
            f"{tuple(teacher_logits_BTV.shape)}; models of different vocabularies have no common token distribution"
        )
    mask_BT = _as_mask(loss_mask_BT, student_logits_BTV)
    dtype = compute_dtype(student_logits_BTV, teacher_logits_BTV)
    log_q_MV = _log_softmax_rows(student_logits_BTV, mask_BT, temperature, dtype)
    log_p_MV = _log_softmax_rows(teacher_logits_BTV.detach(), mask_BT, temperature, dtype)
    return log_q_MV, log_p_MV


def _topk_bins(
    student_logits_BTV: Tensor,
    ids_BTK: Tensor,
    logprobs_BTK: Tensor,
    loss_mask_BT: Tensor,
    temperature: float,
    tail_logprob_BT: Tensor | None,
    *,
    under_student: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log q, log p) over the kept ids and the tail, each [M, K+1]; [M, V] at K = V, where there is no tail.

    `under_student`: log q - log p is averaged under the student, so that a tail that rounds to 0 must not become one of -inf.
    """
    mask_BT, ids_MK = _check_topk(student_logits_BTV, ids_BTK, logprobs_BTK, loss_mask_BT)
    if tail_logprob_BT is not None and tail_logprob_BT.shape != mask_BT.shape:
        raise ValueError(f"tail: expected shape {tuple(mask_BT.shape)}, found {tuple(tail_logprob_BT.shape)}")
    vocabulary_size = student_logits_BTV.shape[-1]
    dtype = compute_dtype(student_logits_BTV, logprobs_BTK)
    log_q_MV = _log_softmax_rows(student_logits_BTV, mask_BT, temperature, dtype)
    kept_q_MK = log_q_MV.gather(-1, ids_MK)
    # float64 because 1 - mass cancels; the teacher's side has only K numbers per token.
    kept_p_MK = logprobs_BTK.detach()[mask_BT].double()
    _check_mass(kept_p_MK)
    if ids_MK.shape[-1] == vocabulary_size:
        return kept_q_MK, torch.log_softmax(kept_p_MK, dim=-1).to(dtype)
    # Summed over the other ids: 1 - (kept mass) would lose a confident student's tail.
    tail_q_M = logsumexp_or_absent(log_q_MV.scatter(-1, ids_MK, -math.inf))
    tail_p_M = None if tail_logprob_BT is None else tail_logprob_BT.detach()[mask_BT].double()
    least = torch.finfo(logprobs_BTK.dtype).eps if under_student else 0.0
    log_p_MJ = _with_tail(kept_p_MK, tail_p_M, tail_q_M, logprobs_BTK.dtype, least=least)
    return torch.cat([kept_q_MK, tail_q_M[:, None]], dim=-1), log_p_MJ.to(dtype)


def topk_targets(ids_MK: Tensor, logprobs_MK: Tensor, tail_logprob_M: Tensor, *, vocabulary_size: int) -> Tensor:
    """The teacher's k + 1 bins [M, K+1] in float64, divided by their sum, with the checks of `topk_tail_kl`.

    A tail that is a few roundings stays: a divergence over mixtures takes no harm from a student without one.
    """
    _check_ids(ids_MK, vocabulary_size)
    kept_p_MK = logprobs_MK.detach().double()
    _check_mass(kept_p_MK)
    tail_p_M1 = tail_logprob_M.detach().double()[:, None]
    if ids_MK.shape[-1] == vocabulary_size:
        tail_p_M1 = torch.full_like(tail_p_M1, -math.inf)
    return torch.log_softmax(torch.cat([kept_p_MK, tail_p_M1], dim=-1), dim=-1)


def _with_tail(
    kept_p_MK: Tensor, tail_p_M: Tensor | None, tail_q_M: Tensor, received_dtype: torch.dtype, *, least: float = 0.0
) -> Tensor:
    """The teacher's bins [M, K+1] in float64, divided by their sum; `tail_p_M` None takes 1 - (kept mass), from `least` on."""
    if tail_p_M is None:
        tail_p_M = (1.0 - kept_p_MK.exp().sum(dim=-1)).clamp_min(least).log()
    # Where the student masks every id outside the kept ones, a teacher's tail of a few roundings would cost infinity.
    rounding = TAIL_ROUNDING_EPS * torch.finfo(received_dtype).eps
    tail_p_M = tail_p_M.masked_fill(torch.isneginf(tail_q_M.detach()) & (tail_p_M <= math.log(rounding)), -math.inf)
    return torch.log_softmax(torch.cat([kept_p_MK, tail_p_M[:, None]], dim=-1), dim=-1)


def logsumexp_or_absent(outside_MV: Tensor) -> Tensor:
    """logsumexp [M], and -inf without a gradient for a row of -inf, where that of logsumexp is nan."""
    empty_M = torch.isneginf(outside_MV.detach()).all(dim=-1)
    return outside_MV.masked_fill(empty_M[:, None], 0.0).logsumexp(dim=-1).masked_fill(empty_M, -math.inf)


def _log_softmax_rows(logits_BTV: Tensor, mask_BT: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    return F.log_softmax(logits_BTV[mask_BT].to(dtype) / check_temperature(temperature), dim=-1)


def _log_weights(weights_N: Tensor | Sequence[float], num_teachers: int) -> list[float]:
    """Logarithms of the weights over their sum."""
    weights = torch.as_tensor(weights_N).detach().double().cpu()
    if weights.shape != (num_teachers,):
        raise ValueError(f"weights: expected {num_teachers}, one per teacher, found shape {tuple(weights.shape)}")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or float(weights.sum()) == 0.0:
        raise ValueError(f"weights: expected finite numbers >= 0 with a positive sum, found {weights.tolist()}")
    return [float(value) for value in (weights / weights.sum()).log()]


def per_token(divergence_M: Tensor, num_loss_tokens: int | Tensor) -> Tensor:
    """Sum of the rows over the count of the whole step; 0, attached, without rows. Raises ValueError unless the count is finite
    and at least 1."""
    total = divergence_M.sum()
    count = float(num_loss_tokens)
    if divergence_M.shape[0] == 0:
        return total
    if not (math.isfinite(count) and count >= 1.0):
        raise ValueError(
            f"num_loss_tokens: expected the scored positions of the whole optimizer step (here at least "
            f"{divergence_M.shape[0]}), found {count:g}"
        )
    return total / count


def _as_mask(loss_mask_BT: Tensor, logits_BTV: Tensor) -> Tensor:
    if loss_mask_BT.shape != logits_BTV.shape[:-1]:
        raise ValueError(
            f"loss mask: expected shape {tuple(logits_BTV.shape[:-1])}, one entry per logit position, "
            f"found {tuple(loss_mask_BT.shape)}"
        )
    return selection(loss_mask_BT)


def selection(mask: Tensor) -> Tensor:
    """`mask` as bool. Raises ValueError for anything but 0 and 1 in it: a weight would count in full."""
    if mask.dtype == torch.bool:
        return mask
    chosen = mask == 1
    if not bool((chosen | (mask == 0)).all()):
        raise ValueError(
            "loss mask: expected bool, or only 0 and 1, found other values; weigh positions in the loss, not in the mask"
        )
    return chosen


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype, at least float32."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def check_temperature(temperature: float) -> float:
    """Return it. Raises ValueError unless it is finite and above 0."""
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise ValueError(f"temperature: expected a finite number above 0, found {temperature}")
    return temperature


def check_beta(beta: float) -> None:
    """Raise ValueError outside [0, 1]."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected a number from 0 (forward KL) to 1 (reverse KL), found {beta}")


def check_alpha(alpha: float) -> None:
    """Raise ValueError outside (0, 1)."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha: expected a skew strictly between 0 and 1, found {alpha}")


def _check_topk(
    student_logits_BTV: Tensor, ids_BTK: Tensor, logprobs_BTK: Tensor, loss_mask_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """The mask as bool, and the kept ids at the scored positions."""
    mask_BT = _as_mask(loss_mask_BT, student_logits_BTV)
    if ids_BTK.shape != logprobs_BTK.shape or ids_BTK.shape[:-1] != mask_BT.shape or ids_BTK.shape[-1] == 0:
        raise ValueError(
            f"top-k: expected ids and log-probabilities of shape {(*mask_BT.shape, 'K')} with K >= 1, "
            f"found ids {tuple(ids_BTK.shape)} and log-probabilities {tuple(logprobs_BTK.shape)}"
        )
    ids_MK = ids_BTK[mask_BT].long()
    _check_ids(ids_MK, student_logits_BTV.shape[-1])
    return mask_BT, ids_MK


def _check_ids(ids_MK: Tensor, vocabulary_size: int) -> None:
    _check_range(ids_MK, vocabulary_size)
    sorted_MK = ids_MK.sort(dim=-1).values
    if bool((sorted_MK[:, 1:] == sorted_MK[:, :-1]).any()):
        raise ValueError("top-k: expected distinct ids at each scored position, found a repeated id")


def _check_range(ids_MK: Tensor, vocabulary_size: int) -> None:
    if ids_MK.numel() and (int(ids_MK.min()) < 0 or int(ids_MK.max()) >= vocabulary_size):
        raise ValueError(
            f"teacher's ids: expected ids from 0 to {vocabulary_size - 1}, found {int(ids_MK.min())} to {int(ids_MK.max())}; "
            "the teacher's vocabulary is not the student's"
        )


def _check_mass(logprobs_MK: Tensor) -> None:
    mass_M = logprobs_MK.exp().sum(dim=-1)
    if bool((mass_M > MAX_KEPT_MASS).any()):
        raise ValueError(
            f"top-k: expected log-probabilities, found a kept mass of {float(mass_M.max()):.4g}; "
            "raw logits must go through log_softmax over the teacher's whole vocabulary"
        )
