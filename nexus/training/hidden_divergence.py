"""Divergences between two models from their last hidden states and output heads, without ever holding [tokens, V] logits.

At a vocabulary of 151,936 the float32 logits of 1,024 tokens take 0.58 GiB per model, and the dense loss keeps several such tensors
for its backward pass. Here logits exist one tile of the vocabulary at a time: the forward pass runs an online log-sum-exp over the
tiles (Milakov and Gimelshein 2018, arXiv 1805.02867), which already gives the forward KL, computes the tiles a second time for
every other divergence, and keeps three numbers per row; the backward pass recomputes each tile from those. Nothing of the size of
a head is kept between the two, so the losses of many teachers over one student head cost no memory beside each other, and a
gradient that is not asked for is not computed.

Every divergence of `training.divergence` is a sum of terms w KL(a || m), a the teacher p or the student q and
m = share p + (1 - share) q. With s_v = q_v dD/dq_v and D one row's divergence over logits l,

    term under p    s_v = -w (1 - share) q_v p_v / m_v
    term under q    s_v = w q_v (log(q_v / m_v) - (1 - share) q_v / m_v), up to a multiple of q_v, which the next line removes
    gradient        dD/dl_v = s_v - q_v sum_u s_u

which at the ends is the known q - p (forward KL) and q (log(q / p) - KL(q || p)) (reverse KL).

Shape letters: B batch, T time, V vocabulary, D the student's width, E the teacher's width, M scored positions, R rows of a block,
J ids of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nexus.training.divergence import (
    DISTILL_SKEW,
    check_alpha,
    check_beta,
    check_temperature,
    compute_dtype,
    per_token,
    selection,
)

WORKSPACE_BYTES = 96 << 20
"""Room for logits and their temporaries: 1,024 tokens over a vocabulary of 151,936 then train in 0.5 GiB, of which 0.29 are the
gradient of a 512-wide head. On a GPU give more: wide tiles fill its matrix units."""

TILE_TENSORS = 10
"""Tensors of one tile that are alive at a time: log-probabilities and probabilities of both models, those of m, and temporaries."""

MAX_BLOCK_ROWS = 1024
"""Rows that are worked on at a time: more mean narrower tiles, and below some 1,000 ids a tile's matrix product slows; fewer read
the heads more often."""


@dataclass(frozen=True)
class OutputHead:
    """From hidden states to logits: W h + b, and where the model has one its soft cap, cap tanh(logits / cap).

    To compare models whose vocabularies were padded to different sizes, cut both weights to the ids that they share.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    """Finite: ids that a model forbids are cut out of both heads."""
    softcap: float | None = None
    """Above 0; Gemma's `final_logit_softcapping`."""


@dataclass(frozen=True)
class Term:
    """weight KL(under || teacher_share * teacher + (1 - teacher_share) * student).

    Raises:
        ValueError: a weight or a share out of range; also the share at which a model is compared with itself.
    """

    weight: float
    """Finite and above 0."""
    under: Literal["teacher", "student"]
    teacher_share: float
    """From 0, for terms under the student above 0, to 1, for terms under the teacher below 1."""

    def __post_init__(self) -> None:
        itself = 1.0 if self.under == "teacher" else 0.0
        if not (math.isfinite(self.weight) and self.weight > 0.0 and 0.0 <= self.teacher_share <= 1.0):
            raise ValueError(f"term: expected a finite weight above 0 and a teacher_share from 0 to 1, found {self}")
        if self.teacher_share == itself:
            raise ValueError(f"term: expected two distributions, found the {self.under} against itself in {self}")


FORWARD_KL = (Term(1.0, "teacher", 0.0),)
REVERSE_KL = (Term(1.0, "student", 1.0),)
DISTILL_MIX = (Term(0.5, "teacher", DISTILL_SKEW), Term(0.5, "student", 1.0 - DISTILL_SKEW))
"""`distill_divergence`, the default of the loop."""


def jsd_terms(beta: float) -> tuple[Term, ...]:
    """The terms of `generalized_jsd`, whose ends are the forward and the reverse KL. Raises ValueError outside [0, 1]."""
    check_beta(beta)
    if beta in (0.0, 1.0):
        return FORWARD_KL if beta == 0.0 else REVERSE_KL
    return (Term(beta, "teacher", beta), Term(1.0 - beta, "student", beta))


def skewed_kl_terms(alpha: float = DISTILL_SKEW) -> tuple[Term, ...]:
    """The term of `skewed_kl`. Raises ValueError outside (0, 1)."""
    check_alpha(alpha)
    return (Term(1.0, "teacher", alpha),)


def skewed_reverse_kl_terms(alpha: float = DISTILL_SKEW) -> tuple[Term, ...]:
    """The term of `skewed_reverse_kl`. Raises ValueError outside (0, 1)."""
    check_alpha(alpha)
    return (Term(1.0, "student", 1.0 - alpha),)


def hidden_divergence(
    student_hidden_BTD: Tensor,
    student_head: OutputHead,
    teacher_hidden_BTE: Tensor,
    teacher_head: OutputHead,
    loss_mask_BT: Tensor,
    *,
    terms: tuple[Term, ...],
    num_loss_tokens: int | Tensor,
    temperature: float,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """The divergence of `terms` between the models' next-token distributions; equals the dense form to rounding.

    Each model's logits are computed in the wider dtype of its states and head, as the model itself would, and everything after
    in at least float32. Autocast does not reach inside. The gradient can be taken once, not twice.

    Args:
        student_hidden_BTD: the states that the student's head reads, any float dtype.
        student_head: receives a gradient where its tensors require one.
        teacher_hidden_BTE: as the teacher sent them; detached, like its head.
        teacher_head: over the same vocabulary.
        loss_mask_BT: bool or 0/1, set where the prediction made at the position is scored. Other positions are not read.
        terms: `FORWARD_KL`, `REVERSE_KL`, `DISTILL_MIX`, or what `jsd_terms` and its like return.
        num_loss_tokens: scored positions in the whole optimizer step.
        temperature: divides both models' logits before the softmax; finite and above 0.
        workspace_bytes: room for logits and temporaries, above the gradients and the copy of the scored states. At least one row
            and one tile of one id are worked on, whatever it is.

    Returns:
        Scalar in nats per scored token, as `divergence.forward_kl`.

    Raises:
        ValueError: shapes, settings or counts out of range.
    """
    _check(student_hidden_BTD, student_head, loss_mask_BT, "student")
    _check(teacher_hidden_BTE, teacher_head, loss_mask_BT, "teacher")
    if student_head.weight_VD.shape[0] != teacher_head.weight_VD.shape[0]:
        raise ValueError(
            f"heads: expected one vocabulary, found {student_head.weight_VD.shape[0]} ids of the student and "
            f"{teacher_head.weight_VD.shape[0]} of the teacher; for one tokenizer, cut both to the ids that they share"
        )
    if not terms:
        raise ValueError("terms: expected at least one, found none")
    if workspace_bytes < 1:
        raise ValueError(f"workspace_bytes: expected at least 1, found {workspace_bytes}")
    mask_BT = selection(loss_mask_BT)
    setting = _Setting(
        terms,
        check_temperature(temperature),
        workspace_bytes,
        compute_dtype(student_hidden_BTD, student_head.weight_VD, teacher_hidden_BTE, teacher_head.weight_VD),
        student_head.softcap,
        teacher_head.softcap,
    )
    with torch.autocast(student_hidden_BTD.device.type, enabled=False):
        rows_M: Tensor = _RowDivergences.apply(  # type: ignore[no-untyped-call]
            student_hidden_BTD[mask_BT],
            student_head.weight_VD,
            student_head.bias_V,
            teacher_hidden_BTE.detach()[mask_BT],
            teacher_head.weight_VD.detach(),
            None if teacher_head.bias_V is None else teacher_head.bias_V.detach(),
            setting,
        )
        return per_token(rows_M, num_loss_tokens)


@dataclass(frozen=True)
class _Setting:
    terms: tuple[Term, ...]
    temperature: float
    workspace_bytes: int
    dtype: torch.dtype
    student_softcap: float | None
    teacher_softcap: float | None


class _RowDivergences(torch.autograd.Function):
    """The divergence of each row [M]."""

    @staticmethod
    def forward(
        ctx: Any,
        student_MD: Tensor,
        student_weight_VD: Tensor,
        student_bias_V: Tensor | None,
        teacher_ME: Tensor,
        teacher_weight_VE: Tensor,
        teacher_bias_V: Tensor | None,
        setting: _Setting,
    ) -> Tensor:
        student = _Logits(student_MD, student_weight_VD, student_bias_V, setting.student_softcap, setting)
        teacher = _Logits(teacher_ME, teacher_weight_VE, teacher_bias_V, setting.teacher_softcap, setting)
        num_rows, vocabulary_size = student_MD.shape[0], student_weight_VD.shape[0]
        block, tile = _block_and_tile(num_rows, vocabulary_size, setting)
        # The reverse KL could do with one pass too, but its sum_u s_u must carry the rounding of the tiles it is subtracted from.
        plain = all((term.under, term.teacher_share) == ("teacher", 0.0) for term in setting.terms)
        values_M, slopes_M, student_norms_M, teacher_norms_M = (
            torch.zeros(num_rows, dtype=setting.dtype, device=student_MD.device) for _ in range(4)
        )
        for rows in _slices(num_rows, block):
            under_q, under_p = (_Running(values_M[rows]) for _ in range(2))
            for ids in _slices(vocabulary_size, tile):
                student_RJ, teacher_RJ = student.tile(rows, ids), teacher.tile(rows, ids)
                gap_RJ = student_RJ - teacher_RJ if plain else None
                under_q.add(student_RJ, None)
                under_p.add(teacher_RJ, gap_RJ)
            norm_q_R, norm_p_R = under_q.norm_R, under_p.norm_R
            student_norms_M[rows], teacher_norms_M[rows] = norm_q_R, norm_p_R
            if plain:
                # The mean of the logits' difference says it all, and sum_u s_u is -w.
                weight = sum(term.weight for term in setting.terms)
                values_M[rows] = weight * (norm_q_R - norm_p_R - under_p.mean_R)
                slopes_M[rows] = -weight
                continue
            for ids in _slices(vocabulary_size, tile):
                log_q_RJ = student.tile(rows, ids).sub_(norm_q_R[:, None])
                log_p_RJ = teacher.tile(rows, ids).sub_(norm_p_R[:, None])
                for value_R, slope_RJ in values_and_slopes(log_q_RJ, log_q_RJ.exp(), log_p_RJ, setting.terms):
                    values_M[rows] += value_R
                    slopes_M[rows] += slope_RJ.sum(dim=-1)
        ctx.setting = setting
        ctx.save_for_backward(
            student_MD,
            student_weight_VD,
            student_bias_V,
            teacher_ME,
            teacher_weight_VE,
            teacher_bias_V,
            slopes_M,
            student_norms_M,
            teacher_norms_M,
        )
        return values_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_M: Tensor) -> tuple[Tensor | None, ...]:
        student_MD, weight_VD, bias_V, teacher_ME, teacher_weight_VE, teacher_bias_V, slopes_M, *norms = (
            ctx.saved_tensors
        )
        student_norms_M, teacher_norms_M = norms
        setting: _Setting = ctx.setting
        student = _Logits(student_MD, weight_VD, bias_V, setting.student_softcap, setting)
        teacher = _Logits(teacher_ME, teacher_weight_VE, teacher_bias_V, setting.teacher_softcap, setting)
        num_rows, vocabulary_size = student_MD.shape[0], weight_VD.shape[0]
        block, tile = _block_and_tile(num_rows, vocabulary_size, setting)
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        states_MD = torch.zeros_like(student_MD, dtype=setting.dtype) if wants_states else None
        weights_VD = torch.empty_like(weight_VD) if wants_weight else None
        biases_V = torch.empty_like(bias_V) if wants_bias else None
        for ids in _slices(vocabulary_size, tile):
            tile_weight_JD = weight_VD[ids]
            tile_gradient_JD = torch.zeros_like(tile_weight_JD, dtype=setting.dtype)
            tile_bias_J = slopes_M.new_zeros(len(tile_weight_JD))
            for rows in _slices(num_rows, block):
                student_RJ = student.tile(rows, ids)
                log_p_RJ = teacher.tile(rows, ids).sub_(teacher_norms_M[rows, None])
                log_q_RJ = student_RJ - student_norms_M[rows, None]
                q_RJ = log_q_RJ.exp()
                # In place of the sum over u: dD/dl = s - q sum(s).
                slopes_RJ = q_RJ * -slopes_M[rows, None]
                for _, slope_RJ in values_and_slopes(log_q_RJ, q_RJ, log_p_RJ, setting.terms):
                    slopes_RJ += slope_RJ
                slopes_RJ.mul_(upstream_M[rows, None] / setting.temperature)
                if setting.student_softcap is not None:
                    # The derivative of cap tanh(x / cap) is 1 - tanh^2, and tanh is the tempered logit * temperature / cap.
                    slopes_RJ.mul_(1.0 - (student_RJ * (setting.temperature / setting.student_softcap)).square())
                if states_MD is not None:
                    _add_product(states_MD[rows], slopes_RJ, tile_weight_JD, student.native)
                if wants_weight:
                    _add_product(tile_gradient_JD, slopes_RJ.T, student_MD[rows], student.native)
                if wants_bias:
                    tile_bias_J += slopes_RJ.sum(dim=0)
            if weights_VD is not None:
                weights_VD[ids] = tile_gradient_JD
            if biases_V is not None:
                biases_V[ids] = tile_bias_J
        if states_MD is not None:
            states_MD = states_MD.to(student_MD.dtype)
        return states_MD, weights_VD, biases_V, None, None, None, None


@dataclass(frozen=True)
class _Logits:
    """Tempered logits of one model, tile by tile."""

    hidden_MD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    setting: _Setting

    @property
    def native(self) -> torch.dtype:
        """Of the matrix products, as in the model itself."""
        return torch.promote_types(self.hidden_MD.dtype, self.weight_VD.dtype)

    def tile(self, rows: slice, ids: slice) -> Tensor:
        """[R, J], a new tensor in the computing dtype."""
        bias_J = None if self.bias_V is None else self.bias_V[ids].to(self.native)
        logits_RJ = F.linear(self.hidden_MD[rows].to(self.native), self.weight_VD[ids].to(self.native), bias_J)
        logits_RJ = logits_RJ.to(self.setting.dtype)
        if self.softcap is not None:
            logits_RJ.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_RJ.div_(self.setting.temperature)


class _Running:
    """Log-sum-exp over the tiles so far, and the mean of a second quantity under their softmax, for each row [R]."""

    def __init__(self, like_R: Tensor) -> None:
        self._largest_R = torch.full_like(like_R, -math.inf)
        self._sum_R = torch.zeros_like(like_R)
        self._weighted_R = torch.zeros_like(like_R)

    def add(self, logits_RJ: Tensor, quantity_RJ: Tensor | None) -> None:
        """Take in a tile; its logits are used up."""
        larger_R = torch.maximum(self._largest_R, logits_RJ.amax(dim=-1))
        shrink_R = (self._largest_R - larger_R).exp()
        weights_RJ = logits_RJ.sub_(larger_R[:, None]).exp_()
        self._largest_R = larger_R
        self._sum_R = self._sum_R * shrink_R + weights_RJ.sum(dim=-1)
        if quantity_RJ is not None:
            self._weighted_R = self._weighted_R * shrink_R + weights_RJ.mul_(quantity_RJ).sum(dim=-1)

    @property
    def norm_R(self) -> Tensor:
        return self._largest_R + self._sum_R.log()

    @property
    def mean_R(self) -> Tensor:
        return self._weighted_R / self._sum_R


def values_and_slopes(
    log_q_RJ: Tensor, q_RJ: Tensor, log_p_RJ: Tensor, terms: tuple[Term, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each term: the tile's part of the divergence [R], and s_v [R, J] of the module's formulas."""
    p_RJ = log_p_RJ.exp()
    for term in terms:
        student_share = 1.0 - term.teacher_share
        log_a_RJ, a_RJ = (log_p_RJ, p_RJ) if term.under == "teacher" else (log_q_RJ, q_RJ)
        if 0.0 < term.teacher_share < 1.0:
            # One logarithm instead of a log-add-exp. a / m is at most 1 / share; where both vanish the entry adds 0.
            tiny = torch.finfo(q_RJ.dtype).tiny
            quotient_RJ = a_RJ / (p_RJ * term.teacher_share).add_(q_RJ, alpha=student_share).clamp_min_(tiny)
            log_quotient_RJ = quotient_RJ.clamp_min(tiny).log_()
        else:
            quotient_RJ = None
            log_quotient_RJ = log_a_RJ - (log_q_RJ if term.under == "teacher" else log_p_RJ)
        value_R = term.weight * (a_RJ * log_quotient_RJ).sum(dim=-1)
        if term.under == "student":
            slope_RJ = (
                log_quotient_RJ if quotient_RJ is None else log_quotient_RJ.sub_(quotient_RJ, alpha=student_share)
            )
            yield value_R, slope_RJ.mul_(q_RJ).mul_(term.weight)
        else:
            # q p / m is p where m = q, and nothing may be divided by a q that underflowed.
            slope_RJ = p_RJ.clone() if quotient_RJ is None else quotient_RJ.mul_(q_RJ)
            yield value_R, slope_RJ.mul_(-term.weight * student_share)


def _add_product(target: Tensor, left: Tensor, right: Tensor, native: torch.dtype) -> None:
    """target += left @ right, multiplied in the model's dtype and added in the target's."""
    if native == target.dtype:
        target.addmm_(left, right.to(native))
    else:
        target += left.to(native) @ right.to(native)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _block_and_tile(num_rows: int, vocabulary_size: int, setting: _Setting) -> tuple[int, int]:
    """Rows and ids that are worked on at a time, at least one of each."""
    block = max(1, min(MAX_BLOCK_ROWS, num_rows))
    tile = setting.workspace_bytes // (TILE_TENSORS * block * setting.dtype.itemsize)
    return block, max(1, min(tile, vocabulary_size))


def _check(hidden: Tensor, head: OutputHead, loss_mask_BT: Tensor, model: str) -> None:
    weight = head.weight_VD
    if weight.ndim != 2 or 0 in weight.shape or hidden.shape != (*loss_mask_BT.shape, weight.shape[-1]):
        raise ValueError(
            f"{model}: expected a head [V, width] and hidden states of shape {(*loss_mask_BT.shape, 'width')}, one per entry of "
            f"the loss mask, found a head {tuple(weight.shape)} and states {tuple(hidden.shape)}"
        )
    if head.bias_V is not None and head.bias_V.shape != weight.shape[:1]:
        raise ValueError(
            f"{model}: expected a bias of shape {tuple(weight.shape[:1])}, found {tuple(head.bias_V.shape)}"
        )
    if head.softcap is not None and not (math.isfinite(head.softcap) and head.softcap > 0.0):
        raise ValueError(f"{model}: expected a finite softcap above 0, found {head.softcap}")
