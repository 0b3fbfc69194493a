"""Token-level distillation from a teacher whose tokenizer is not the student's.

Both models score the same text; only their cuts differ. Between two cuts that both make, a span, each tokenizer has one or more
tokens, and the chain rule gives each model's log-probability of the span (as GOLD merges them, Patino et al. 2025). Three cases:

    token     one token each: KL(teacher || student) over bins, the teacher's kept ids that the student's vocabulary also has, and
              everything else as one bin. For one and the same tokenizer this is `divergence.topk_tail_kl`.
    merged    several tokens: KL(teacher || student) over two bins, this span and any other continuation.
    unaligned a span that is too long, or a token of the teacher's outside its kept ids: the distance between sorted probabilities,
              position by position (ULD, Boizard et al. 2024, arXiv 2402.12030, eq. 2), which needs no common vocabulary and knows
              no text: a fallback, whose share is reported.

Departure from ULD: the sorted probabilities are the teacher's K kept ones and its tail, against the student's K largest and the rest.
Equality of two tokenizers is proven by `towers.loader.tokenizer_hash`, never by their sizes.

Shape letters: N scored tokens of the student, M of the teacher, S spans, K kept ids, V the student's vocabulary, C common ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nexus.errors import ConfigError, TowerLoadError
from nexus.towers.targets import TokenTargets
from nexus.training.divergence import check_temperature, compute_dtype, logsumexp_or_absent, per_token

MAX_SPAN_TOKENS = 8
"""Tokens of either model above which a span's probability says too little: a product of so many is 0 for all but copied text."""

SPACE_MARKS = ("Ġ", "▁")
"""How byte-level and SentencePiece vocabularies write a space."""


@dataclass(frozen=True)
class SpanAlignment:
    """Spans of text that both tokenizers cut out; span s has tokens offsets[s]:offsets[s+1] of each."""

    student_offsets_S1: NDArray[np.int64]
    teacher_offsets_S1: NDArray[np.int64]


@dataclass(frozen=True)
class CommonIds:
    """Ids of tokens that mean the same to both, in the order of the teacher's."""

    teacher_ids_C: Tensor
    student_ids_C: Tensor


@dataclass(frozen=True)
class CrossTokenizerLoss:
    """What `cross_tokenizer_loss` found."""

    loss: Tensor
    """Scalar, attached to the graph: nats of the aligned spans plus the weighted distance of the others, per scored token."""
    aligned_share: float
    """Of the student's tokens, those in spans that were compared by probability of text; 1 where nothing is scored."""


def align_spans(student_ends_N: NDArray[np.int64], teacher_ends_M: NDArray[np.int64]) -> SpanAlignment:
    """The finest spans that both tokenisations of one text share.

    Args:
        student_ends_N: for each token the position in the text at which it ends, never decreasing. A token that ends inside a
            character repeats the end of the character; the end-of-sequence token ends one position after the text.
        teacher_ends_M: the same for the teacher's tokens of the same text.

    Raises:
        ValueError: ends that decrease, or texts of different length.
    """
    for ends in (student_ends_N, teacher_ends_M):
        if ends.ndim != 1 or bool((np.diff(ends) < 0).any()):
            raise ValueError(f"ends: expected positions in the text that never decrease, found {ends.tolist()}")
    if student_ends_N[-1:].tolist() != teacher_ends_M[-1:].tolist():
        raise ValueError(
            f"ends: expected two tokenisations of one text, found ends at {student_ends_N[-1:].tolist()} and "
            f"{teacher_ends_M[-1:].tolist()}; a tokenizer that normalises its input needs the ends in the original text"
        )
    common = np.intersect1d(student_ends_N, teacher_ends_M)
    student, teacher = (np.searchsorted(ends, common, side="right") for ends in (student_ends_N, teacher_ends_M))
    return SpanAlignment(np.concatenate([[0], student]), np.concatenate([[0], teacher]))


def common_ids(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> CommonIds:
    """Ids that both vocabularies spell alike, a leading space included however each writes it, and the ends of sequence.

    Other special tokens are left out: what they mean is not in their spelling.
    """
    student_vocabulary = _spelled(student)
    pairs = [
        (teacher_id, student_vocabulary[text])
        for text, teacher_id in _spelled(teacher).items()
        if text in student_vocabulary
    ]
    pairs = sorted([*pairs, (teacher.eos_token_id, student.eos_token_id)])
    ids_C2 = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return CommonIds(ids_C2[:, 0].contiguous(), ids_C2[:, 1].contiguous())


@dataclass(frozen=True)
class AlignedRows:
    """The scored tokens of a batch that both models score, aligned row by row."""

    alignment: SpanAlignment
    student_N: Tensor
    """bool over the student's scored tokens, set for those of the rows that are compared."""
    teacher_M: Tensor


class TextAligner:
    """Brings the tokens of a teacher's answers and the student's to common spans of text.

    Raises:
        ConfigError: a tokenizer that does not say where in the text its tokens end.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, name: str) -> None:
        for whose, tokenizer in (("the student", student), (name, teacher)):
            if not tokenizer.is_fast:
                raise ConfigError(
                    f"Expected tokenizers that tell where their tokens end for distill.cross_tokenizer spans, found the slow one of "
                    f"{whose}. Set distill.cross_tokenizer to responses."
                )
        self.common = common_ids(student, teacher)
        self._student, self._teacher, self._name = student, teacher, name

    def align(self, completions: Sequence[str], student_counts_B: Sequence[int], tokens: TokenTargets) -> AlignedRows:
        """Spans of a batch of answers.

        Rows whose first token one of the models cannot score, for want of anything before it, are left out.

        Args:
            student_counts_B: the student's scored tokens of each row, the end of sequence included.
            tokens: of the teacher, for the same rows.

        Raises:
            TowerLoadError: when the teacher's tokens are not those of its tokenizer.
        """
        student_parts, teacher_parts = [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
        student_kept: list[bool] = []
        teacher_kept: list[bool] = []
        student_total = teacher_total = 0
        for row, text in enumerate(completions):
            _, student_ends = token_ends(self._student, text)
            ids, teacher_ends = token_ends(self._teacher, text)
            start, stop = (int(offset) for offset in tokens.offsets_B1[row : row + 2])
            scored = tokens.token_ids_N[start:stop].tolist()
            if scored != ids[len(ids) - len(scored) :]:
                raise TowerLoadError(
                    f"Expected {self._name} to score the tokens that its saved tokenizer makes of an answer, found others. Run "
                    "`nexus distill` anew with another --out."
                )
            whole = student_counts_B[row] == len(student_ends) and len(scored) == len(ids)
            student_kept += [whole] * student_counts_B[row]
            teacher_kept += [whole] * len(scored)
            if whole:
                spans = align_spans(student_ends, teacher_ends)
                student_parts.append(spans.student_offsets_S1[1:] + student_total)
                teacher_parts.append(spans.teacher_offsets_S1[1:] + teacher_total)
                student_total += len(student_ends)
                teacher_total += len(ids)
        alignment = SpanAlignment(np.concatenate(student_parts), np.concatenate(teacher_parts))
        return AlignedRows(alignment, torch.tensor(student_kept), torch.tensor(teacher_kept))


def token_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], NDArray[np.int64]]:
    """Ids of an answer, its end of sequence included, and where each ends in the text, as `align_spans` takes it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
    # A token of characters that were normalised away may name an earlier place.
    ends = np.maximum.accumulate(ends) if len(ends) else ends
    return [*encoded["input_ids"], tokenizer.eos_token_id], np.append(ends, len(text) + 1)


def cross_tokenizer_loss(
    student_logits_NV: Tensor,
    student_ids_N: Tensor,
    teacher_token_ids_M: Tensor,
    teacher_ids_MK: Tensor,
    teacher_logprobs_MK: Tensor,
    teacher_tail_logprob_M: Tensor,
    *,
    alignment: SpanAlignment,
    common: CommonIds,
    num_loss_tokens: int | Tensor,
    temperature: float,
    uld_weight: float = 1.0,
    max_span_tokens: int = MAX_SPAN_TOKENS,
) -> CrossTokenizerLoss:
    """Compare the models span by span, by the best of the module's three ways that a span allows.

    At a temperature other than 1 a span's probability is that of the tempered models, which depends on the cuts: use 1 unless the
    tokenizers are close.

    Args:
        student_logits_NV: raw logits that predict each scored token, any float dtype.
        student_ids_N: the scored tokens themselves.
        teacher_token_ids_M: the teacher's tokens of the same text.
        teacher_ids_MK: its kept ids, most probable first.
        teacher_logprobs_MK: their log-probabilities at this temperature; detached.
        teacher_tail_logprob_M: log of its mass outside the kept ids.
        alignment: of `align_spans`, over all rows in the order of the tokens.
        common: of `common_ids`.
        num_loss_tokens: scored tokens of the student in the whole optimizer step.
        temperature: finite and above 0.
        uld_weight: nats that a distance of 1 of an unaligned position counts; 0 leaves those positions out.
        max_span_tokens: tokens of either model in a span that is still merged.

    Raises:
        ValueError: shapes that disagree with the alignment, or settings out of range.
    """
    _check(student_logits_NV, student_ids_N, teacher_token_ids_M, teacher_ids_MK, teacher_logprobs_MK, alignment)
    if not (math.isfinite(uld_weight) and uld_weight >= 0.0) or max_span_tokens < 1:
        raise ValueError(
            f"expected a finite uld_weight >= 0 and max_span_tokens >= 1, found {uld_weight} and {max_span_tokens}"
        )
    dtype = compute_dtype(student_logits_NV)
    log_q_NV = torch.log_softmax(student_logits_NV.to(dtype) / check_temperature(temperature), dim=-1)
    log_p_MK, tail_p_M = teacher_logprobs_MK.detach().double(), teacher_tail_logprob_M.detach().double()
    own_M = teacher_ids_MK == teacher_token_ids_M[:, None]
    own_known_M = own_M.any(dim=-1)

    student_offsets, teacher_offsets = (
        torch.from_numpy(offsets).to(student_logits_NV.device)
        for offsets in (alignment.student_offsets_S1, alignment.teacher_offsets_S1)
    )
    student_counts_S, teacher_counts_S = student_offsets.diff(), teacher_offsets.diff()
    single_S = (student_counts_S == 1) & (teacher_counts_S == 1)
    known_S = _span_sums(own_known_M.double(), teacher_counts_S) == teacher_counts_S
    merged_S = ~single_S & known_S & (torch.maximum(student_counts_S, teacher_counts_S) <= max_span_tokens)
    unaligned_S = ~single_S & ~merged_S

    merged_N, merged_M = (
        torch.repeat_interleave(merged_S, counts_S) for counts_S in (student_counts_S, teacher_counts_S)
    )
    own_NV = torch.zeros_like(log_q_NV[merged_N], dtype=torch.bool).scatter(-1, student_ids_N[merged_N, None], True)
    merged_q_S2 = _span_or_other(log_q_NV[merged_N], own_NV, student_counts_S[merged_S])
    with_tail_MJ = torch.cat([log_p_MK, tail_p_M[:, None]], dim=-1)[merged_M]
    own_MJ = F.pad(own_M, (0, 1))[merged_M]
    merged_p_S2 = torch.log_softmax(_span_or_other(with_tail_MJ, own_MJ, teacher_counts_S[merged_S]), dim=-1)
    singles_N, singles_M = student_offsets[:-1][single_S], teacher_offsets[:-1][single_S]
    values = [
        _token_kl(log_q_NV[singles_N], teacher_ids_MK[singles_M], log_p_MK[singles_M], tail_p_M[singles_M], common),
        _bins_kl(merged_q_S2, merged_p_S2.to(dtype)),
    ]
    pairs = [
        (student + step, teacher + step)
        for student, teacher, steps in zip(
            student_offsets[:-1][unaligned_S].tolist(),
            teacher_offsets[:-1][unaligned_S].tolist(),
            torch.minimum(student_counts_S, teacher_counts_S)[unaligned_S].tolist(),
            strict=True,
        )
        for step in range(steps)
    ]
    if pairs and uld_weight > 0.0:
        rows_N, rows_M = torch.tensor(pairs, device=log_q_NV.device).unbind(dim=1)
        values.append(uld_weight * _sorted_distance(log_q_NV[rows_N], log_p_MK[rows_M], tail_p_M[rows_M]))
    scored = int(student_counts_S.sum())
    aligned = int(student_counts_S[~unaligned_S].sum())
    return CrossTokenizerLoss(per_token(torch.cat(values), num_loss_tokens), aligned / scored if scored else 1.0)


def _token_kl(log_q_SV: Tensor, ids_SK: Tensor, log_p_SK: Tensor, tail_p_S: Tensor, common: CommonIds) -> Tensor:
    """KL over the kept ids that the student has too, and the rest as one bin [S]."""
    common = CommonIds(common.teacher_ids_C.to(ids_SK.device), common.student_ids_C.to(ids_SK.device))
    places_SK = torch.searchsorted(common.teacher_ids_C, ids_SK).clamp_max(max(0, len(common.teacher_ids_C) - 1))
    if len(common.teacher_ids_C):
        shared_SK = common.teacher_ids_C[places_SK] == ids_SK
        student_ids_SK = common.student_ids_C[places_SK]
    else:
        shared_SK, student_ids_SK = torch.zeros_like(ids_SK, dtype=torch.bool), torch.zeros_like(ids_SK)
    bins_p_SK = log_p_SK.masked_fill(~shared_SK, -math.inf)
    rest_p_S = torch.cat([log_p_SK.masked_fill(shared_SK, -math.inf), tail_p_S[:, None]], dim=-1).logsumexp(dim=-1)
    log_p_SJ = torch.log_softmax(torch.cat([bins_p_SK, rest_p_S[:, None]], dim=-1), dim=-1).to(log_q_SV.dtype)
    bins_q_SK = log_q_SV.gather(-1, student_ids_SK)
    taken_SV = torch.zeros_like(log_q_SV, dtype=torch.bool)
    rows_S1 = torch.arange(len(ids_SK), device=ids_SK.device)[:, None].expand_as(ids_SK)
    taken_SV[rows_S1[shared_SK], student_ids_SK[shared_SK]] = True
    rest_q_S = logsumexp_or_absent(log_q_SV.masked_fill(taken_SV, -math.inf))
    return _bins_kl(torch.cat([bins_q_SK, rest_q_S[:, None]], dim=-1), log_p_SJ)


def _span_or_other(log_probs_RJ: Tensor, own_RJ: Tensor, counts_S: Tensor) -> Tensor:
    """log of a span's probability and of that of any other continuation [S, 2], from its tokens' bins in order.

    The other one is the sum of parting from the span at its first token, at its second, and so on: 1 - (the span's) would lose
    what a confident model leaves to others, and the gradient with it.
    """
    own_R = log_probs_RJ.masked_fill(~own_RJ, 0.0).sum(dim=-1)
    parting_R = logsumexp_or_absent(log_probs_RJ.masked_fill(own_RJ, -math.inf))
    width = int(counts_S.max()) if len(counts_S) else 1
    inside_SW = torch.arange(width, device=counts_S.device) < counts_S[:, None]
    own_SW = own_R.new_zeros(inside_SW.shape).masked_scatter(inside_SW, own_R)
    parting_SW = own_R.new_full(inside_SW.shape, -math.inf).masked_scatter(inside_SW, parting_R)
    span_S = own_SW.sum(dim=-1)
    reached_SW = F.pad(own_SW.cumsum(dim=-1)[:, :-1], (1, 0))
    return torch.stack([span_S, logsumexp_or_absent(reached_SW + parting_SW)], dim=-1)


def _bins_kl(log_q_SJ: Tensor, log_p_SJ: Tensor) -> Tensor:
    """KL(p || q) over bins, the last of them everything else [S]; a bin that is empty for the teacher counts nothing."""
    # A student without anything else, its vocabulary being kept whole, counts as one with the smallest number, without a gradient.
    floor = math.log(torch.finfo(log_q_SJ.dtype).tiny)
    rest_q_S1 = log_q_SJ[:, -1:]
    log_q_SJ = torch.cat([log_q_SJ[:, :-1], rest_q_S1.masked_fill(torch.isneginf(rest_q_S1.detach()), floor)], dim=-1)
    absent_SJ = torch.isneginf(log_p_SJ)
    return (log_p_SJ.exp() * (log_p_SJ.masked_fill(absent_SJ, 0.0) - log_q_SJ.masked_fill(absent_SJ, 0.0))).sum(dim=-1)


def _sorted_distance(log_q_RV: Tensor, log_p_RK: Tensor, tail_p_R: Tensor) -> Tensor:
    """Sum of |p - q| over the sorted probabilities and what is left of both [R]."""
    kept = min(log_p_RK.shape[-1], log_q_RV.shape[-1])
    q_RK = log_q_RV.topk(kept, dim=-1).values.exp()
    p_RK = log_p_RK.exp().to(q_RK.dtype)
    missing_R = p_RK[:, kept:].sum(dim=-1) + tail_p_R.exp().to(q_RK.dtype)
    return (q_RK - p_RK[:, :kept]).abs().sum(dim=-1) + (1.0 - q_RK.sum(dim=-1) - missing_R).abs()


def _span_sums(values_N: Tensor, counts_S: Tensor) -> Tensor:
    spans_N = torch.repeat_interleave(torch.arange(len(counts_S), device=counts_S.device), counts_S)
    return values_N.new_zeros(len(counts_S)).index_add(0, spans_N, values_N)


def _spelled(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    special = set(tokenizer.all_special_tokens)
    spelled: dict[str, int] = {}
    for token, index in tokenizer.get_vocab().items():
        if token not in special:
            for mark in SPACE_MARKS:
                token = token.replace(mark, " ")
            spelled[token] = index
    return spelled


def _check(
    student_logits_NV: Tensor,
    student_ids_N: Tensor,
    teacher_token_ids_M: Tensor,
    teacher_ids_MK: Tensor,
    teacher_logprobs_MK: Tensor,
    alignment: SpanAlignment,
) -> None:
    num_student, num_teacher = int(alignment.student_offsets_S1[-1]), int(alignment.teacher_offsets_S1[-1])
    found = (tuple(student_logits_NV.shape[:1]), tuple(student_ids_N.shape))
    if found != ((num_student,), (num_student,)):
        raise ValueError(
            f"student: expected logits [N, V] and ids [N] of the {num_student} tokens aligned, found {found}"
        )
    if (
        tuple(teacher_token_ids_M.shape) != (num_teacher,)
        or teacher_ids_MK.shape != teacher_logprobs_MK.shape
        or teacher_ids_MK.shape[:1] != (num_teacher,)
    ):
        raise ValueError(
            f"teacher: expected ids [M] and kept ids and log-probabilities [M, K] of the {num_teacher} tokens aligned, found "
            f"{tuple(teacher_token_ids_M.shape)}, {tuple(teacher_ids_MK.shape)} and {tuple(teacher_logprobs_MK.shape)}"
        )
