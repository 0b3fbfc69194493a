"""Divergences whose gradient is made together with their value, block of rows by block of rows, in closed form.

Autograd walks over [tokens, V] some ten times, forward and back, and keeps four or five such tensors between the two. Here a block of
rows is projected, compared and differentiated while it lies in the processor's cache, its gradient goes at once into those of the
states and of the head, and nothing of the size of the logits exists. A backward pass only scales what is there, so asking for the
gradient of one teacher's loss several times, as gradient surgery does, costs nothing more.

The price is one gradient of the head [V, D] for each loss whose graph is alive; where that is too much, `training.hidden_divergence`
keeps three numbers per row instead and computes the logits again.

With q the student, p the teacher, and s_v = q_v dD/dq_v of `training.hidden_divergence`, the gradient by logit v is

    over whole distributions    s_v - q_v S                                 S = sum_u s_u
    over k + 1 bins             s_v - q_v S                                 for a kept id, where the sums run over the bins
                                q_v (s_tail / q_tail - S)                   for an id in the tail

Shape letters: M scored positions, R rows of a block, V vocabulary, D the student's width, E the teacher's width, K kept ids,
J = K + 1 bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nexus.training.divergence import check_temperature, compute_dtype, per_token, topk_targets
from nexus.training.hidden_divergence import OutputHead, Term, values_and_slopes

BLOCK_BYTES = 4 << 20
"""Logits of one block: few such tensors stay in the caches, and their matrix products are still wide enough. Measured at 1,024 tokens
over 4,096 ids: 1 to 8 MiB differ by less than the noise, half a MiB costs a sixth."""

_LOWEST = -1e30
"""Stands for the logarithm of 0: an impossible id then adds exactly 0, and not 0 times infinity."""

BlockGradient = Callable[[Tensor, slice], "tuple[Tensor, Tensor]"]
"""From tempered logits [R, V] of the rows in the slice, which it may overwrite, to their divergences [R] and gradients [R, V]."""


@dataclass(frozen=True)
class StudentRows:
    """The student at the scored positions: its states [M, D], and the weight [V, D] of its output head."""

    states_MD: Tensor
    weight_VD: Tensor


def topk_one_pass(
    student: StudentRows,
    ids_MK: Tensor,
    logprobs_MK: Tensor,
    *,
    terms: tuple[Term, ...],
    num_loss_tokens: int | Tensor,
    temperature: float,
    tail_logprob_M: Tensor,
) -> Tensor:
    """The divergence of `terms` over the k + 1 bins of `divergence.topk_tail_kl`; equals the autograd form to rounding.

    Args:
        terms: none of them an end of the interpolation, whose value where the student has no tail is infinite.
        ids_MK, logprobs_MK, tail_logprob_M: as there, of the scored positions.

    Returns:
        Scalar in nats per scored token.

    Raises:
        ValueError: as there.
    """
    log_p_MJ = topk_targets(ids_MK, logprobs_MK, tail_logprob_M, vocabulary_size=len(student.weight_VD))
    dtype = compute_dtype(student.states_MD, student.weight_VD, logprobs_MK)
    ids_MK = ids_MK.long()
    log_p_MJ = log_p_MJ.to(dtype)

    def block(logits_RV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        ids_RK = ids_MK[rows]
        q_RV = torch.softmax(logits_RV, dim=-1)
        kept_RK = q_RV.gather(-1, ids_RK)
        # Without the kept ids and not as 1 - (kept mass), which would lose a confident student's tail.
        q_RV.scatter_(-1, ids_RK, 0.0)
        tail_R1 = q_RV.sum(dim=-1, keepdim=True)
        q_RJ = torch.cat([kept_RK, tail_R1], dim=-1)
        value_R, slopes_RJ = _total(q_RJ.log().clamp_min_(_LOWEST), q_RJ, log_p_MJ[rows], terms)
        whole_R1 = slopes_RJ.sum(dim=-1, keepdim=True)
        tiny = torch.finfo(dtype).tiny
        gradient_RV = q_RV.mul_(slopes_RJ[:, -1:] / tail_R1.clamp_min(tiny) - whole_R1)
        gradient_RV.scatter_(-1, ids_RK, slopes_RJ[:, :-1] - kept_RK * whole_R1)
        return value_R, gradient_RV

    return _one_pass(student, block, dtype, num_loss_tokens, temperature)


def dense_one_pass(
    student: StudentRows,
    teacher_logprobs_MV: Tensor,
    *,
    terms: tuple[Term, ...],
    num_loss_tokens: int | Tensor,
    temperature: float,
) -> Tensor:
    """The divergence of `terms` from the teacher's tempered log-probabilities over the student's vocabulary.

    They are divided by their sum, which is 1 up to the rounding of their transport. Result as `topk_one_pass`.
    """
    dtype = compute_dtype(student.states_MD, student.weight_VD, teacher_logprobs_MV)

    def block(logits_RV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        # Log-probabilities are logits of themselves. An impossible id adds exactly 0 then, and not 0 times infinity.
        return _dense(logits_RV, teacher_logprobs_MV[rows].to(dtype).clamp_min(_LOWEST), terms)

    return _one_pass(student, block, dtype, num_loss_tokens, temperature)


def hidden_one_pass(
    student: StudentRows,
    teacher_states_ME: Tensor,
    teacher_head: OutputHead,
    *,
    terms: tuple[Term, ...],
    num_loss_tokens: int | Tensor,
    temperature: float,
) -> Tensor:
    """The divergence of `terms` from the teacher's states; equals `hidden_divergence`. Result as `topk_one_pass`.

    Args:
        teacher_head: over the student's vocabulary.
    """
    dtype = compute_dtype(student.states_MD, student.weight_VD, teacher_states_ME, teacher_head.weight_VD)
    native = torch.promote_types(teacher_states_ME.dtype, teacher_head.weight_VD.dtype)
    weight_VE = teacher_head.weight_VD.to(native)
    bias_V = None if teacher_head.bias_V is None else teacher_head.bias_V.to(native)

    def block(logits_RV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        teacher_RV = F.linear(teacher_states_ME[rows].to(native), weight_VE, bias_V).to(dtype)
        if teacher_head.softcap is not None:
            teacher_RV.div_(teacher_head.softcap).tanh_().mul_(teacher_head.softcap)
        return _dense(logits_RV, teacher_RV if temperature == 1.0 else teacher_RV.div_(temperature), terms)

    return _one_pass(student, block, dtype, num_loss_tokens, temperature)


def _dense(logits_RV: Tensor, teacher_RV: Tensor, terms: tuple[Term, ...]) -> tuple[Tensor, Tensor]:
    """Of tempered logits, which may be overwritten; the teacher's are finite."""
    if len(terms) == 1 and (terms[0].under, terms[0].teacher_share) == ("teacher", 0.0):
        # The forward KL needs no logarithm of a probability: it is sum p (l_p - l_q), plus the difference of the normalisers, and its
        # gradient is q - p. The largest probability says what the softmax divided by.
        q_RV, p_RV = torch.softmax(logits_RV, dim=-1), torch.softmax(teacher_RV, dim=-1)
        norm_q_R = logits_RV.amax(dim=-1) - q_RV.amax(dim=-1).log()
        norm_p_R = teacher_RV.amax(dim=-1) - p_RV.amax(dim=-1).log()
        # In place: torch.linalg.vecdot writes the product to memory of its own.
        value_R = teacher_RV.sub_(logits_RV).mul_(p_RV).sum(dim=-1) + norm_q_R - norm_p_R
        return value_R * terms[0].weight, q_RV.sub_(p_RV).mul_(terms[0].weight)
    log_q_RV = torch.log_softmax(logits_RV, dim=-1)
    q_RV, log_p_RV = log_q_RV.exp(), torch.log_softmax(teacher_RV, dim=-1)
    value_R, slopes_RV = _total(log_q_RV, q_RV, log_p_RV, terms)
    return value_R, slopes_RV.addcmul_(q_RV, slopes_RV.sum(dim=-1, keepdim=True), value=-1.0)


def _total(log_q: Tensor, q: Tensor, log_p: Tensor, terms: tuple[Term, ...]) -> tuple[Tensor, Tensor]:
    """Values [R] and slopes of all terms together."""
    parts = list(values_and_slopes(log_q, q, log_p, terms))
    value_R, slopes = parts[0]
    for more_R, more in parts[1:]:
        value_R = value_R + more_R
        slopes = slopes.add_(more)
    return value_R, slopes


def _one_pass(
    student: StudentRows, block: BlockGradient, dtype: torch.dtype, num_loss_tokens: int | Tensor, temperature: float
) -> Tensor:
    check_temperature(temperature)
    with torch.autocast(student.states_MD.device.type, enabled=False):
        sum_: Tensor = _OnePass.apply(student.states_MD, student.weight_VD, block, dtype, temperature)  # type: ignore[no-untyped-call]
    # The count divides the sum; the number of rows says whether there is anything to divide.
    return per_token(sum_.expand(1) if len(student.states_MD) else sum_.expand(1)[:0], num_loss_tokens)


class _OnePass(torch.autograd.Function):
    """The summed divergence of all rows."""

    @staticmethod
    def forward(
        ctx: Any, states_MD: Tensor, weight_VD: Tensor, block: BlockGradient, dtype: torch.dtype, temperature: float
    ) -> Tensor:
        native = torch.promote_types(states_MD.dtype, weight_VD.dtype)
        own_MD, own_VD = states_MD.detach().to(native), weight_VD.detach().to(native)
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        states_grad_MD = torch.empty_like(own_MD, dtype=dtype)
        weight_grad_VD = torch.zeros_like(own_VD, dtype=dtype) if wants_weight else None
        total = torch.zeros((), dtype=dtype, device=states_MD.device)
        step = max(1, BLOCK_BYTES // (len(weight_VD) * dtype.itemsize))
        for start in range(0, len(states_MD), step):
            rows = slice(start, start + step)
            logits_RV = F.linear(own_MD[rows], own_VD).to(dtype)
            if temperature != 1.0:
                logits_RV.div_(temperature)
            value_R, gradient_RV = block(logits_RV, rows)
            total += value_R.sum()
            gradient_RV = gradient_RV.to(native)
            if wants_states:
                states_grad_MD[rows] = gradient_RV @ own_VD
            if weight_grad_VD is not None and native == dtype:
                weight_grad_VD.addmm_(gradient_RV.T, own_MD[rows])
            elif weight_grad_VD is not None:
                weight_grad_VD += gradient_RV.T @ own_MD[rows]
        ctx.temperature = temperature
        ctx.dtypes = (states_MD.dtype, weight_VD.dtype)
        ctx.save_for_backward(states_grad_MD if wants_states else None, weight_grad_VD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream / ctx.temperature
        gradients = [
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None)
