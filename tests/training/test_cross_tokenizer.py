"""Losses across tokenizers: alignment on real ones, values against their definitions, and equality where the tokenizers agree."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nexus.config import SAMPLES_DIR
from nexus.errors import ConfigError, TowerLoadError
from nexus.towers.targets import TokenTargets
from nexus.training.cross_tokenizer import (
    CommonIds,
    SpanAlignment,
    TextAligner,
    align_spans,
    common_ids,
    cross_tokenizer_loss,
    token_ends,
)
from nexus.training.divergence import topk_tail_kl

V, K = 12, 4
TEXT = "the teacher and the student read the same text, and the tokenizers cut it in other places"


def ends(*positions: int) -> np.ndarray:
    return np.array(positions, dtype=np.int64)


def identity(size: int) -> CommonIds:
    return CommonIds(torch.arange(size), torch.arange(size))


class Problem:
    """A student of 12 ids and a teacher of 12 others, with its top 4, on tokens cut as told."""

    def __init__(self, student_ends: np.ndarray, teacher_ends: np.ndarray, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.alignment = align_spans(student_ends, teacher_ends)
        self.logits = torch.randn(len(student_ends), V, generator=generator, dtype=torch.float64).requires_grad_()
        self.ids = torch.randint(V, (len(student_ends),), generator=generator)
        self.teacher = torch.randn(len(teacher_ends), V, generator=generator, dtype=torch.float64).log_softmax(-1)
        logprobs, ids = self.teacher.sort(descending=True, dim=-1)
        self.kept, self.logprobs = ids[:, :K], logprobs[:, :K]
        self.tail = logprobs[:, K:].logsumexp(dim=-1)
        self.tokens = self.kept[:, 1].clone()  # each token of the text is the teacher's second choice
        self.common = identity(V)

    def __call__(self, **changes: Any) -> Any:
        settings: dict[str, Any] = {"num_loss_tokens": max(1, len(self.ids)), "temperature": 1.0, **changes}
        return cross_tokenizer_loss(
            self.logits,
            self.ids,
            self.tokens,
            self.kept,
            self.logprobs,
            self.tail,
            alignment=self.alignment,
            common=self.common,
            **settings,
        )


# Alignment.


def test_spans_are_the_finest_that_both_tokenisations_share() -> None:
    #           |ab|c|def|g h|, |abc|d|ef|gh|
    alignment = align_spans(ends(2, 3, 6, 7, 8), ends(3, 4, 6, 8))
    assert alignment.student_offsets_S1.tolist() == [0, 2, 3, 5]
    assert alignment.teacher_offsets_S1.tolist() == [0, 1, 3, 4]


def test_tokens_inside_one_character_stay_together() -> None:
    # A character of two bytes: both of its tokens end where it ends.
    alignment = align_spans(ends(1, 2, 2, 3), ends(1, 2, 3))
    assert alignment.student_offsets_S1.tolist() == [0, 1, 3, 4]
    assert alignment.teacher_offsets_S1.tolist() == [0, 1, 2, 3]


def test_no_text_has_no_spans() -> None:
    assert align_spans(ends(), ends()).student_offsets_S1.tolist() == [0]


def test_what_is_not_two_tokenisations_of_one_text_is_refused() -> None:
    with pytest.raises(ValueError, match="never decrease"):
        align_spans(ends(2, 1), ends(2))
    with pytest.raises(ValueError, match="never decrease"):
        align_spans(ends(2), ends(2)[None])
    with pytest.raises(ValueError, match="one text"):
        align_spans(ends(1, 2), ends(1, 3))
    with pytest.raises(ValueError, match="one text"):
        align_spans(ends(), ends(3))


def trained(size: int, *, prefix: str = "") -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", *([prefix] if prefix else [])]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def text_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], np.ndarray]:
    encoded = tokenizer(text, return_offsets_mapping=True)
    return encoded["input_ids"], ends(*(end for _, end in encoded["offset_mapping"]))


def test_spans_of_real_tokenizers_hold_the_same_text() -> None:
    student, teacher = trained(40), trained(70)
    (student_ids, student_ends), (teacher_ids, teacher_ends) = (text_ends(t, TEXT) for t in (student, teacher))
    assert len(student_ids) > len(teacher_ids)
    alignment = align_spans(student_ends, teacher_ends)
    pieces = [
        [
            tokenizer.decode(ids[start:stop])
            for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        ]
        for tokenizer, ids, offsets in (
            (student, student_ids, alignment.student_offsets_S1),
            (teacher, teacher_ids, alignment.teacher_offsets_S1),
        )
    ]
    assert pieces[0] == pieces[1]
    assert "".join(pieces[0]) == TEXT
    assert len(student_ids) > len(pieces[0]) > 15


def test_common_ids_are_those_of_equal_spelling_and_the_ends_of_sequence() -> None:
    student, teacher = trained(40), trained(70, prefix="<new>")
    teacher.add_special_tokens({"eos_token": "<new>"})
    common = common_ids(student, teacher)
    assert len(common.teacher_ids_C) > 25
    assert bool((common.teacher_ids_C.diff() > 0).all())
    pairs = dict(zip(common.teacher_ids_C.tolist(), common.student_ids_C.tolist(), strict=True))
    assert pairs.pop(teacher.eos_token_id) == student.eos_token_id
    for teacher_id, student_id in pairs.items():
        assert teacher.convert_ids_to_tokens(teacher_id) == student.convert_ids_to_tokens(student_id)
    assert not {*teacher.all_special_ids} & {*pairs}
    # The first special token shifted every id: equal ids are no equal tokens.
    assert not torch.equal(common.teacher_ids_C, common.student_ids_C)


# Values.


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_one_tokenizer_gives_the_topk_divergence_and_a_share_of_one(temperature: float) -> None:
    problem = Problem(ends(1, 2, 3, 4, 5), ends(1, 2, 3, 4, 5))
    result = problem(temperature=temperature)
    expected = topk_tail_kl(
        problem.logits, problem.kept, problem.logprobs, torch.ones(5), num_loss_tokens=5, temperature=temperature,
        tail_logprob_BT=problem.tail,
    )  # fmt: skip
    assert result.aligned_share == 1.0
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    found, wanted = (torch.autograd.grad(loss, problem.logits)[0] for loss in (result.loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_ids_that_the_student_does_not_have_join_the_rest() -> None:
    problem = Problem(ends(1), ends(1))
    # The teacher's ids are other numbers, and the student spells only its best and its third.
    spelled = problem.kept[0, [0, 2]]
    order = spelled.argsort()
    problem.common = CommonIds(spelled[order], torch.tensor([5, 7])[order])
    p, q = problem.logprobs[0].exp(), problem.logits.detach().softmax(-1)[0]
    bins_p = torch.stack([p[0], p[2], 1 - p[0] - p[2]])
    bins_q = torch.stack([q[5], q[7], 1 - q[5] - q[7]])
    assert problem().loss.item() == pytest.approx(float((bins_p * (bins_p / bins_q).log()).sum()), rel=1e-10)
    problem.common = identity(0)
    assert problem().loss.item() == pytest.approx(0.0, abs=1e-12)  # one bin: nothing is said


def test_a_merged_span_compares_the_probabilities_of_its_text() -> None:
    problem = Problem(ends(1, 2, 3), ends(1, 3))
    result = problem()
    log_q = problem.logits.detach().log_softmax(-1)
    q = (log_q[1, problem.ids[1]] + log_q[2, problem.ids[2]]).exp().item()
    p = problem.teacher[1, problem.tokens[1]].exp().item()
    merged = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    first = Problem(ends(1), ends(1))
    first.logits, first.kept = problem.logits[:1], problem.kept[:1]
    first.logprobs, first.tail, first.tokens = problem.logprobs[:1], problem.tail[:1], problem.tokens[:1]
    assert result.aligned_share == 1.0
    assert result.loss.item() == pytest.approx((first().loss.item() + merged) / 3, rel=1e-10)


def test_spans_that_are_too_long_or_not_kept_fall_back_to_sorted_probabilities() -> None:
    problem = Problem(ends(1, 2, 3), ends(1, 3))
    q = problem.logits.detach().softmax(-1)[1].sort(descending=True).values
    p = problem.logprobs[1].exp()
    distance = float((q[:K] - p).abs().sum() + (q[K:].sum() - problem.tail[1].exp()).abs())
    without = problem(max_span_tokens=1, uld_weight=0.0)
    for changes in ({"max_span_tokens": 1}, {}):
        if not changes:
            problem.tokens[1] = V + 1  # what the text says is none of the kept ids
        result = problem(**changes)
        assert result.aligned_share == pytest.approx(1 / 3)
        assert result.loss.item() == pytest.approx(without.loss.item() + distance / 3, rel=1e-10)


def test_the_sorted_distance_of_a_small_student_counts_what_it_cannot_hold() -> None:
    problem = Problem(ends(2), ends(1, 2))
    problem.logits = problem.logits.detach()[:, :2].requires_grad_()
    problem.ids = torch.zeros(1, dtype=torch.long)
    problem.common = identity(0)
    q, p = problem.logits.detach().softmax(-1)[0].sort(descending=True).values, problem.logprobs[0].exp()
    distance = float((q - p[:2]).abs().sum() + 1 - p[:2].sum())
    assert problem(max_span_tokens=1).loss.item() == pytest.approx(distance, rel=1e-10)


@pytest.mark.parametrize(("student_ends", "max_span_tokens"), [((1, 2, 3), 8), ((1, 2, 3, 3, 3), 8), ((1, 2, 3), 1)])
def test_the_gradient_lowers_the_loss_and_is_that_of_finite_differences(
    student_ends: tuple[int, ...], max_span_tokens: int
) -> None:
    problem = Problem(ends(*student_ends), ends(1, 3), seed=1)
    loss = problem(max_span_tokens=max_span_tokens).loss
    (gradient,) = torch.autograd.grad(loss, problem.logits)
    logits = problem.logits.detach()
    for index in [(0, 0), (1, 3), (2, 11)]:
        values = []
        for step in (1e-6, -1e-6):
            problem.logits = logits.clone()
            problem.logits[index] += step
            values.append(problem(max_span_tokens=max_span_tokens).loss.item())
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)
    problem.logits = logits - 0.1 * gradient
    assert problem(max_span_tokens=max_span_tokens).loss.item() < loss.item()


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_certain_models_stay_finite(scale: float) -> None:
    problem = Problem(ends(1, 2, 3), ends(1, 3))
    problem.logits = (problem.logits.detach() * scale).float().requires_grad_()
    problem.logprobs = torch.tensor([0.0, -50.0, -60.0, -70.0]).repeat(2, 1)
    problem.tail = torch.full((2,), -math.inf)
    problem.tokens = problem.kept[:, 0].clone()
    loss = problem().loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert math.isfinite(loss.item())
    assert problem.logits.grad is not None
    assert bool(torch.isfinite(problem.logits.grad).all())


def test_a_student_whose_whole_vocabulary_is_kept_has_no_rest() -> None:
    problem = Problem(ends(1, 2), ends(1, 2))
    problem.logits = problem.logits.detach()[:, :2].requires_grad_()
    problem.ids = torch.zeros(2, dtype=torch.long)
    kept, order = problem.kept[0, :2].sort()
    problem.common = CommonIds(kept, order)
    problem.kept = problem.kept[:1].repeat(2, 1)
    loss = problem().loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert problem.logits.grad is not None
    assert bool(torch.isfinite(problem.logits.grad).all())


def test_nothing_scored_is_zero_and_attached() -> None:
    problem = Problem(ends(), ends())
    result = problem(num_loss_tokens=0)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert result.aligned_share == 1.0
    assert problem.logits.grad is not None


def test_tokens_that_do_not_fit_the_alignment_are_refused() -> None:
    problem = Problem(ends(1, 2, 3), ends(1, 3))
    for name, message in (("logits", "student: expected"), ("ids", "student: expected"), ("tokens", "teacher: expected"),
                          ("kept", "teacher: expected"), ("logprobs", "teacher: expected")):  # fmt: skip
        whole: Tensor = getattr(problem, name)
        setattr(problem, name, whole[:-1])
        with pytest.raises(ValueError, match=message):
            problem()
        setattr(problem, name, whole)
    for changes in ({"uld_weight": -1.0}, {"uld_weight": math.inf}, {"max_span_tokens": 0}):
        with pytest.raises(ValueError, match="uld_weight"):
            problem(**changes)
    problem.alignment = SpanAlignment(ends(0, 1), ends(0, 1))
    with pytest.raises(ValueError, match="student: expected"):
        problem()
    problem = Problem(ends(1, 2, 3), ends(1, 3))
    problem.kept, problem.logprobs = problem.kept[:1], problem.logprobs[:1]
    with pytest.raises(ValueError, match="teacher: expected"):
        problem()


# From texts to spans.


@pytest.fixture(scope="module")
def tokenizers():
    return [
        AutoTokenizer.from_pretrained(SAMPLES_DIR / "teachers" / name) for name in ("sample-reasoning", "sample-code")
    ]


def _scored(tokenizer, texts: list[str], skip: tuple[int, ...] = ()) -> TokenTargets:
    rows = [token_ends(tokenizer, text)[0][1 if row in skip else 0 :] for row, text in enumerate(texts)]
    tokens = np.array([token for row in rows for token in row], dtype=np.int32)
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    empty = np.zeros((len(tokens), 1), dtype=np.float32)
    return TokenTargets(offsets, tokens, empty.astype(np.int32), empty, empty[:, 0])


TEXTS = ["Tom has 3 apples.\n#### 12", "", "if x:  y=1"]


def test_where_tokens_end_is_told_for_every_token_and_the_end_of_sequence(tokenizers):
    for tokenizer in tokenizers:
        for text in TEXTS:
            ids, ends = token_ends(tokenizer, text)
            assert len(ids) == len(ends)
            assert ids[-1] == tokenizer.eos_token_id
            assert ends[-1] == len(text) + 1
            assert (np.diff(ends) >= 0).all()
            assert tokenizer.decode(ids[:-1]) == text


def test_spans_of_a_batch_hold_the_same_text_in_both_tokenizers(tokenizers):
    student, teacher = tokenizers
    aligner = TextAligner(student, teacher, name="code")
    counts = [len(token_ends(student, text)[0]) for text in TEXTS]
    rows = aligner.align(TEXTS, counts, _scored(teacher, TEXTS))
    assert bool(rows.student_N.all())
    assert bool(rows.teacher_M.all())
    texts = []
    for tokenizer, offsets in (
        (student, rows.alignment.student_offsets_S1),
        (teacher, rows.alignment.teacher_offsets_S1),
    ):
        ids = [token for text in TEXTS for token in token_ends(tokenizer, text)[0]]
        assert offsets[-1] == len(ids)
        spans = [ids[start:stop] for start, stop in itertools.pairwise(offsets)]
        texts.append([tokenizer.decode([token for token in span if token != tokenizer.eos_token_id]) for span in spans])
    assert texts[0] == texts[1]
    assert "".join(texts[0]) == "".join(TEXTS)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_row_whose_first_token_one_model_cannot_score_is_left_out(tokenizers, whose):
    student, teacher = tokenizers
    aligner = TextAligner(student, teacher, name="code")
    counts = [len(token_ends(student, text)[0]) for text in TEXTS]
    if whose == "student":
        counts[0] -= 1
    rows = aligner.align(TEXTS, counts, _scored(teacher, TEXTS, skip=(0,) if whose == "teacher" else ()))
    assert not rows.student_N[: counts[0]].any()
    assert rows.student_N[counts[0] :].all()
    rest = TextAligner(student, teacher, name="code").align(TEXTS[1:], counts[1:], _scored(teacher, TEXTS[1:]))
    assert np.array_equal(rows.alignment.student_offsets_S1, rest.alignment.student_offsets_S1)
    assert np.array_equal(rows.alignment.teacher_offsets_S1, rest.alignment.teacher_offsets_S1)
    assert int(rows.teacher_M.sum()) == rest.alignment.teacher_offsets_S1[-1]


def test_tokens_of_another_tokenizer_are_refused(tokenizers):
    student, teacher = tokenizers
    aligner = TextAligner(student, teacher, name="code")
    counts = [len(token_ends(student, text)[0]) for text in TEXTS]
    with pytest.raises(TowerLoadError, match="Expected code to score the tokens that its saved tokenizer makes"):
        aligner.align(TEXTS, counts, _scored(student, TEXTS))


def test_a_tokenizer_that_does_not_tell_where_its_tokens_end_is_refused(tokenizers):
    with pytest.raises(ConfigError, match="found the slow one of bytes"):
        TextAligner(tokenizers[0], ByT5Tokenizer(), name="bytes")


NO_COMMON = CommonIds(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long))


@pytest.mark.parametrize("margin", [10.0, 17.0, 40.0, 300.0])
def test_a_student_certain_of_the_wrong_span_has_its_full_gradient(margin: float) -> None:
    # Two tokens of the student against one of the teacher, which gives the span 0.3; the student all but 98 exp(-margin).
    logits_NV = torch.zeros(2, 50)
    logits_NV[0, 3] = logits_NV[1, 4] = margin
    logits_NV.requires_grad_()
    found = cross_tokenizer_loss(
        logits_NV,
        torch.tensor([3, 4]),
        torch.tensor([7]),
        torch.tensor([[7, 8]]),
        torch.tensor([[0.3, 0.6]]).log(),
        torch.tensor([0.1]).log(),
        alignment=SpanAlignment(np.array([0, 2]), np.array([0, 1])),
        common=NO_COMMON,
        num_loss_tokens=1,
        temperature=1.0,
    )
    found.loss.backward()
    # q = (1 + 49 e)^-2 with e = exp(-margin), so that log(1 - q) = log(98 e + 2401 e^2) - 2 log(1 + 49 e), by hand.
    e = math.exp(-margin)
    inside, outside = -2 * math.log1p(49 * e), math.log(98) - margin + math.log1p(24.5 * e) - 2 * math.log1p(49 * e)
    expected = 0.3 * (math.log(0.3) - inside) + 0.7 * (math.log(0.7) - outside)
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-5)
    # d/dmargin of both tokens' logits: each gives half of 0.7 back to everything else.
    assert logits_NV.grad is not None
    assert logits_NV.grad[[0, 1], [3, 4]].tolist() == pytest.approx([0.35, 0.35], abs=2e-3)


def test_what_a_certain_student_leaves_to_other_ids_is_no_floor() -> None:
    logits_NV = torch.zeros(1, 50)
    logits_NV[0, 3] = 200.0
    logits_NV.requires_grad_()
    ids_MK, log_p_MK, tail_M = torch.tensor([[3, 8]]), torch.tensor([[0.3, 0.1]]).log(), torch.tensor([0.6]).log()
    found = cross_tokenizer_loss(
        logits_NV,
        torch.tensor([3]),
        torch.tensor([3]),
        ids_MK,
        log_p_MK,
        tail_M,
        alignment=SpanAlignment(np.array([0, 1]), np.array([0, 1])),
        common=CommonIds(torch.arange(50), torch.arange(50)),
        num_loss_tokens=1,
        temperature=1.0,
    )
    same = topk_tail_kl(
        logits_NV[None],
        ids_MK[None],
        log_p_MK[None],
        torch.ones(1, 1),
        num_loss_tokens=1,
        temperature=1.0,
        tail_logprob_BT=tail_M[None],
    )
    torch.testing.assert_close(found.loss, same)
    (gradient_NV,) = torch.autograd.grad(found.loss, logits_NV)
    assert float(gradient_NV[0, 3]) == pytest.approx(0.7, rel=1e-5)


def test_a_teacher_certain_of_the_end_teaches_the_end() -> None:
    student, teacher = trained(40), trained(70, prefix="<new>")
    teacher.add_special_tokens({"eos_token": "<new>"})
    logits_NV = torch.zeros(1, len(student), requires_grad=True)
    found = cross_tokenizer_loss(
        logits_NV,
        torch.tensor([student.eos_token_id]),
        torch.tensor([teacher.eos_token_id]),
        torch.tensor([[teacher.eos_token_id]]),
        torch.tensor([[0.99]]).log(),
        torch.tensor([0.01]).log(),
        alignment=SpanAlignment(np.array([0, 1]), np.array([0, 1])),
        common=common_ids(student, teacher),
        num_loss_tokens=1,
        temperature=1.0,
    )
    (gradient_NV,) = torch.autograd.grad(found.loss, logits_NV)
    assert int(gradient_NV.argmin()) == student.eos_token_id
    assert float(gradient_NV.min()) < -0.9
