"""Divergences against float64 references written in NumPy and SciPy, and the properties that published losses violate."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import Tensor

from nexus.training.divergence import (
    distill_divergence,
    distill_divergence_topk,
    forward_kl,
    generalized_jsd,
    kd_loss,
    mixture_kl,
    reverse_kl,
    sampled_kl,
    skewed_kl,
    skewed_reverse_kl,
    topk_tail_jsd,
    topk_tail_kl,
    topk_tail_mixture_kl,
    topk_tail_reverse_kl,
    topk_tail_skewed_kl,
    topk_tail_skewed_reverse_kl,
    topk_targets,
)

B, T, V = 2, 5, 11
INF = math.inf

Dense = Callable[..., Tensor]


def jsd(beta: float) -> Dense:
    def divergence(
        student: Tensor, teacher: Tensor, mask: Tensor, *, num_loss_tokens: int, temperature: float
    ) -> Tensor:
        return generalized_jsd(
            student, teacher, mask, beta=beta, num_loss_tokens=num_loss_tokens, temperature=temperature
        )

    return divergence


def mixture_of_one(
    student: Tensor, teacher: Tensor, mask: Tensor, *, num_loss_tokens: int, temperature: float
) -> Tensor:
    return mixture_kl(student, teacher[None], [1.0], mask, num_loss_tokens=num_loss_tokens, temperature=temperature)


def with_topk(function: Dense, k: int) -> Dense:
    def divergence(
        student: Tensor, teacher: Tensor, mask: Tensor, *, num_loss_tokens: int, temperature: float
    ) -> Tensor:
        ids, logprobs, tail = top(teacher, k, temperature)
        return function(
            student, ids, logprobs, mask, num_loss_tokens=num_loss_tokens, temperature=temperature, tail_logprob_BT=tail
        )

    return divergence


def topk_jsd(beta: float) -> Dense:
    return functools.partial(topk_tail_jsd, beta=beta)


def topk_mixture_of_one(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    mask: Tensor,
    *,
    num_loss_tokens: int,
    temperature: float,
    tail_logprob_BT: Tensor,
) -> Tensor:
    """Takes no tail: it computes 1 - (kept mass)."""
    return topk_tail_mixture_kl(
        student, ids[None], logprobs[None], [1.0], mask, num_loss_tokens=num_loss_tokens, temperature=temperature
    )


def top(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k best ids, their log-probabilities and the exact log of the rest, as a teacher would send them."""
    wide = torch.promote_types(teacher.dtype, torch.float32)
    sorted_logprobs, ids = torch.log_softmax(teacher.detach().to(wide) / temperature, dim=-1).sort(
        descending=True, dim=-1
    )
    return ids[..., :k], sorted_logprobs[..., :k], sorted_logprobs[..., k:].logsumexp(dim=-1)


DENSE: dict[str, Dense] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_0": jsd(0.0),
    "jsd_0.3": jsd(0.3),
    "jsd_1": jsd(1.0),
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "distill": distill_divergence,
    "mixture": mixture_of_one,
}
TOPK: dict[str, Dense] = {
    "forward_kl": topk_tail_kl,
    "reverse_kl": topk_tail_reverse_kl,
    "jsd_0": topk_jsd(0.0),
    "jsd_0.3": topk_jsd(0.3),
    "jsd_1": topk_jsd(1.0),
    "skewed_kl": topk_tail_skewed_kl,
    "skewed_reverse_kl": topk_tail_skewed_reverse_kl,
    "distill": distill_divergence_topk,
    "mixture": topk_mixture_of_one,
}
"""The k+1-bin form of every dense divergence."""
ALL = {**DENSE, **{f"{name}_topk_4": with_topk(sparse, 4) for name, sparse in TOPK.items()}}
BOUNDED = ("jsd_0.3", "skewed_kl", "skewed_reverse_kl", "distill")
BOUNDED += tuple(f"{name}_topk_4" for name in BOUNDED)

every = pytest.mark.parametrize("divergence", ALL.values(), ids=ALL.keys())
every_dense = pytest.mark.parametrize("divergence", DENSE.values(), ids=DENSE.keys())
every_bounded = pytest.mark.parametrize("divergence", [ALL[name] for name in BOUNDED], ids=BOUNDED)


@pytest.fixture
def mask() -> Tensor:
    return torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)


def logits(seed: int, *, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, T, V, generator=generator, dtype=torch.float64) * scale).to(dtype)


def reference(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float, name: str) -> float:
    """Mean over the scored positions, from probabilities, by SciPy's elementwise p log(p / q)."""
    values = []
    for b, t in mask.nonzero().tolist():
        q = np.exp(log_softmax(student[b, t].double().numpy() / temperature))
        p = np.exp(log_softmax(teacher[b, t].double().numpy() / temperature))

        def kl(a: np.ndarray, b: np.ndarray) -> float:
            return float(rel_entr(a, b).sum())

        m = 0.3 * p + 0.7 * q
        values.append(
            {
                "forward_kl": kl(p, q),
                "mixture": kl(p, q),
                "jsd_0": kl(p, q),
                "reverse_kl": kl(q, p),
                "jsd_1": kl(q, p),
                "jsd_0.3": 0.3 * kl(p, m) + 0.7 * kl(q, m),
                "skewed_kl": kl(p, 0.1 * p + 0.9 * q),
                "skewed_reverse_kl": kl(q, 0.9 * p + 0.1 * q),
                "distill": 0.5 * kl(p, 0.1 * p + 0.9 * q) + 0.5 * kl(q, 0.9 * p + 0.1 * q),
            }[name]
        )
    return float(np.mean(values))


# Values.


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_value_equals_the_float64_reference(name: str, temperature: float, mask: Tensor) -> None:
    student, teacher = logits(0), logits(1)
    value = DENSE[name](student, teacher, mask, num_loss_tokens=int(mask.sum()), temperature=temperature)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(reference(student, teacher, mask, temperature, name), rel=1e-12)


@every
def test_gradient_equals_finite_differences(divergence: Dense, mask: Tensor) -> None:
    student, teacher = logits(2).requires_grad_(), logits(3)
    loss = divergence(student, teacher, mask, num_loss_tokens=6, temperature=2.0)
    (gradient,) = torch.autograd.grad(loss, student)
    step = 1e-6
    for index in [(0, 0, 0), (0, 1, 7), (1, 3, 10), (0, 2, 4)]:
        shifted = []
        for sign in (1, -1):
            moved = student.detach().clone()
            moved[index] += sign * step
            shifted.append(divergence(moved, teacher, mask, num_loss_tokens=6, temperature=2.0).item())
        # Central differences: error of order step**2 plus rounding over step.
        assert gradient[index].item() == pytest.approx((shifted[0] - shifted[1]) / (2 * step), abs=1e-8)


@every
def test_equal_models_give_zero_and_a_zero_gradient(divergence: Dense, mask: Tensor) -> None:
    student = logits(4, dtype=torch.float32).requires_grad_()
    loss = divergence(student, student.detach().clone(), mask, num_loss_tokens=6, temperature=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)  # float32 rounding of a log-softmax
    assert student.grad is not None
    assert student.grad.abs().max().item() < 1e-6


@every
def test_every_divergence_pulls_the_student_towards_the_teacher(divergence: Dense, mask: Tensor) -> None:
    student, teacher = logits(5).requires_grad_(), logits(6)
    before = divergence(student, teacher, mask, num_loss_tokens=6, temperature=2.0)
    (gradient,) = torch.autograd.grad(before, student)
    after = divergence(student.detach() - 0.1 * gradient, teacher, mask, num_loss_tokens=6, temperature=2.0)
    assert gradient.abs().max() > 1e-3
    assert after.item() < before.item()


def test_beta_0_is_teacher_to_student_and_beta_1_is_student_to_teacher() -> None:
    student = torch.log(torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64))
    teacher = torch.log(torch.tensor([[[0.25, 0.25, 0.5]]], dtype=torch.float64))
    mask = torch.ones(1, 1)
    teacher_to_student = 0.25 * math.log(0.5) + 0.5 * math.log(2.0)
    student_to_teacher = 0.5 * math.log(2.0) + 0.25 * math.log(0.5)
    tilted = torch.log(torch.tensor([[[0.7, 0.2, 0.1]]], dtype=torch.float64))
    for beta, expected in ((0.0, teacher_to_student), (1.0, student_to_teacher)):
        value = generalized_jsd(student, teacher, mask, beta=beta, temperature=1.0, num_loss_tokens=1)
        assert value.item() == pytest.approx(expected, rel=1e-12)
    kl_teacher_tilted = 0.25 * math.log(0.25 / 0.7) + 0.25 * math.log(0.25 / 0.2) + 0.5 * math.log(0.5 / 0.1)
    kl_tilted_teacher = 0.7 * math.log(0.7 / 0.25) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.5)
    assert generalized_jsd(tilted, teacher, mask, beta=0, temperature=1.0, num_loss_tokens=1).item() == pytest.approx(
        kl_teacher_tilted, rel=1e-12
    )
    assert generalized_jsd(tilted, teacher, mask, beta=1, temperature=1.0, num_loss_tokens=1).item() == pytest.approx(
        kl_tilted_teacher, rel=1e-12
    )


@every_bounded
def test_bounded_divergences_stay_below_their_bound_at_extreme_logits(divergence: Dense, mask: Tensor) -> None:
    student = logits(7, scale=1e4, dtype=torch.float32).requires_grad_()
    teacher = logits(8, scale=1e4, dtype=torch.float32)
    loss = divergence(student, teacher, mask, num_loss_tokens=6, temperature=1.0)
    loss.backward()
    assert loss.item() <= math.log(10.0) + 1e-5
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def test_bounds_are_reached_by_disjoint_distributions() -> None:
    student = torch.tensor([[[200.0, 0.0]]], dtype=torch.float64)
    arguments = (student, student.flip(-1), torch.ones(1, 1))
    settings = {"num_loss_tokens": 1, "temperature": 1.0}
    assert generalized_jsd(*arguments, beta=0.5, **settings).item() == pytest.approx(math.log(2.0), rel=1e-12)
    assert distill_divergence(*arguments, **settings).item() == pytest.approx(math.log(10.0), rel=1e-12)
    assert forward_kl(*arguments, **settings).item() == pytest.approx(200.0, rel=1e-12)


@every
def test_no_divergence_is_negative(divergence: Dense) -> None:
    mask = torch.ones(B, T)
    for seed in range(20):
        value = divergence(logits(seed), logits(100 + seed), mask, num_loss_tokens=B * T, temperature=1.5)
        assert value.item() > 0.0


# Masks, counts, shapes and dtypes.


@every
@pytest.mark.parametrize("poison", [INF, -INF, math.nan, 1e4])
def test_masked_positions_cannot_change_loss_or_gradient(divergence: Dense, poison: float, mask: Tensor) -> None:
    student, teacher = logits(9), logits(10)
    results = []
    for fill in (0.0, poison):
        poisoned_student = student.masked_fill(~mask[..., None], fill).requires_grad_()
        poisoned_teacher = teacher.masked_fill(~mask[..., None], fill)
        loss = divergence(poisoned_student, poisoned_teacher, mask, num_loss_tokens=6, temperature=2.0)
        loss.backward()
        assert poisoned_student.grad is not None
        results.append((loss.detach(), poisoned_student.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[1][1][~mask].any()
    assert bool(results[1][1][mask].any())


@every
@pytest.mark.parametrize("num_loss_tokens", [0, 7])
def test_a_batch_that_scores_nothing_is_zero_and_attached(divergence: Dense, num_loss_tokens: int) -> None:
    student = logits(11).fill_(INF).requires_grad_()
    loss = divergence(student, logits(12), torch.zeros(B, T), num_loss_tokens=num_loss_tokens, temperature=2.0)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()


@every
def test_integer_and_boolean_masks_agree(divergence: Dense, mask: Tensor) -> None:
    student, teacher = logits(13), logits(14)
    values = [
        divergence(student, teacher, mask.to(dtype), num_loss_tokens=6, temperature=2.0).item()
        for dtype in (torch.bool, torch.int64, torch.uint8, torch.float32)
    ]
    assert values == [values[0]] * 4


@every
def test_micro_batches_add_up_to_the_full_batch(divergence: Dense, mask: Tensor) -> None:
    student, teacher = logits(15), logits(16)
    count = torch.tensor(int(mask.sum()))
    whole = divergence(student, teacher, mask, num_loss_tokens=count, temperature=2.0)
    parts = [
        divergence(student[b : b + 1], teacher[b : b + 1], mask[b : b + 1], num_loss_tokens=count, temperature=2.0)
        for b in range(B)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_upcast_before_the_softmax(
    divergence: Dense, dtype: torch.dtype, mask: Tensor
) -> None:
    student, teacher = logits(17, dtype=dtype), logits(18, dtype=dtype)
    value = divergence(student, teacher, mask, num_loss_tokens=6, temperature=2.0)
    exact = divergence(student.double(), teacher.double(), mask, num_loss_tokens=6, temperature=2.0)
    assert value.dtype == torch.float32
    # Only float32 rounding is left: a softmax in the half type would be wrong by about 1e-2.
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


@every
def test_vocabulary_permutation_and_logit_shift_change_nothing(divergence: Dense, mask: Tensor) -> None:
    student, teacher = logits(19), logits(20)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    value = divergence(student, teacher, mask, num_loss_tokens=6, temperature=2.0).item()
    permuted = divergence(student[..., order], teacher[..., order], mask, num_loss_tokens=6, temperature=2.0)
    shifted = divergence(student + 7.0, teacher - 3.0, mask, num_loss_tokens=6, temperature=2.0)
    assert permuted.item() == pytest.approx(value, rel=1e-12)
    assert shifted.item() == pytest.approx(value, rel=1e-12)


@every_dense
def test_no_gradient_reaches_the_teacher(divergence: Dense, mask: Tensor) -> None:
    student, teacher = logits(21).requires_grad_(), logits(22).requires_grad_()
    divergence(student, teacher, mask, num_loss_tokens=6, temperature=2.0).backward()
    assert teacher.grad is None
    assert student.grad is not None


# Ids that are masked in the vocabulary.


@every
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ids_masked_in_both_models_contribute_nothing(
    divergence: Dense, scale: float, dtype: torch.dtype, mask: Tensor
) -> None:
    student, teacher = logits(23, scale=scale, dtype=dtype), logits(24, scale=scale, dtype=dtype)
    banned = torch.zeros(V, dtype=torch.bool)
    banned[[0, 5, 10]] = True
    masked_student = student.masked_fill(banned, -INF).requires_grad_()
    loss = divergence(masked_student, teacher.masked_fill(banned, -INF), mask, num_loss_tokens=6, temperature=2.0)
    loss.backward()
    without = divergence(student[..., ~banned], teacher[..., ~banned], mask, num_loss_tokens=6, temperature=2.0)
    assert loss.item() == pytest.approx(without.item(), rel=1e-6)
    assert masked_student.grad is not None
    assert bool(torch.isfinite(masked_student.grad).all())
    assert not masked_student.grad[..., banned].any()


def test_an_id_that_only_the_teacher_masks_leaves_forward_kl_finite(mask: Tensor) -> None:
    teacher = logits(25)
    teacher[..., 3] = -INF
    student = logits(26).requires_grad_()
    loss = forward_kl(student, teacher, mask, num_loss_tokens=6, temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(reference(student.detach(), teacher, mask, 1.0, "forward_kl"), rel=1e-12)
    assert student.grad is not None
    assert bool((student.grad[mask][:, 3] > 0).all())  # the forbidden id is pushed down


def test_mass_where_the_other_model_forbids_it_is_infinite(mask: Tensor) -> None:
    student, teacher = logits(27), logits(28)
    student[..., 3] = -INF
    assert forward_kl(student, teacher, mask, num_loss_tokens=6, temperature=1.0).item() == INF
    assert reverse_kl(teacher, student, mask, num_loss_tokens=6, temperature=1.0).item() == INF
    assert math.isfinite(distill_divergence(student, teacher, mask, num_loss_tokens=6, temperature=1.0).item())


# Top-k with a tail.


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_equals_the_dense_divergence_at_k_v_and_rises_to_it(name: str, temperature: float, mask: Tensor) -> None:
    student, teacher = logits(29), logits(30)
    full = DENSE[name](student, teacher, mask, num_loss_tokens=6, temperature=temperature).item()
    values = [
        with_topk(TOPK[name], k)(student, teacher, mask, num_loss_tokens=6, temperature=temperature).item()
        for k in range(1, V + 1)
    ]
    assert values[-1] == pytest.approx(full, rel=1e-12)
    # One id outside the kept ones makes the tail that id.
    assert values[-2] == pytest.approx(full, rel=1e-12)
    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(values))
    assert values[0] > 0.0


def test_topk_equals_the_reference_over_k_plus_one_bins(mask: Tensor) -> None:
    student, teacher = logits(31), logits(32)
    ids, logprobs, _ = top(teacher, 3, 2.0)
    value = topk_tail_kl(student, ids, logprobs, mask, num_loss_tokens=6, temperature=2.0)
    expected = 0.0
    for b, t in mask.nonzero().tolist():
        q = np.exp(log_softmax(student[b, t].numpy() / 2.0))
        p = np.exp(log_softmax(teacher[b, t].numpy() / 2.0))
        kept = ids[b, t].numpy()
        bins_p = np.append(p[kept], 1.0 - p[kept].sum())
        bins_q = np.append(q[kept], 1.0 - q[kept].sum())
        expected += float(rel_entr(bins_p, bins_q).sum())
    assert value.item() == pytest.approx(expected / 6, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 4, V])
def test_topk_is_finite_when_the_kept_mass_rounds_to_one(k: int, dtype: torch.dtype, mask: Tensor) -> None:
    teacher = logits(33, scale=1.0)
    teacher[..., 2] = 60.0  # tail of 1e-26: below the rounding of 1 in every dtype
    ids, logprobs, tail = top(teacher, k, 1.0)
    for sent_tail in (None, tail.to(dtype)):
        student = logits(34).to(dtype).requires_grad_()
        loss = topk_tail_kl(
            student, ids, logprobs.to(dtype), mask, num_loss_tokens=6, temperature=1.0, tail_logprob_BT=sent_tail
        )
        loss = loss + distill_divergence_topk(
            student, ids, logprobs.to(dtype), mask, num_loss_tokens=6, temperature=1.0, tail_logprob_BT=sent_tail
        )
        loss.backward()
        dense = forward_kl(student.detach(), teacher, mask, num_loss_tokens=6, temperature=1.0)
        dense = dense + distill_divergence(student.detach(), teacher, mask, num_loss_tokens=6, temperature=1.0)
        assert loss.item() == pytest.approx(dense.item(), rel=1e-5)
        assert student.grad is not None
        assert bool(torch.isfinite(student.grad).all())
        assert bool(student.grad[mask].any())


@pytest.mark.parametrize("divergence", [topk_tail_reverse_kl, topk_jsd(1.0)], ids=["reverse_kl", "jsd_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_student_outside_a_certain_teachers_ids_costs_no_more_than_densely_under_the_reverse_kl(
    divergence: Dense, dtype: torch.dtype, mask: Tensor
) -> None:
    teacher = logits(65, scale=1.0)
    teacher[..., 2] = 60.0  # its kept mass rounds to 1, so that 1 - mass says that the tail is impossible
    student = logits(66, scale=1.0)
    student[..., 7] = 40.0
    ids, logprobs, _ = top(teacher, 2, 1.0)
    leaf = student.requires_grad_()
    loss = divergence(leaf, ids, logprobs.to(dtype), mask, num_loss_tokens=6, temperature=1.0)
    loss.backward()
    dense = reverse_kl(student.detach(), teacher, mask, num_loss_tokens=6, temperature=1.0)
    assert 1.0 < loss.item() <= dense.item()
    assert leaf.grad is not None
    assert bool(torch.isfinite(leaf.grad).all())
    closer = student.detach().clone()
    closer[..., 2] += 39.0
    nearer = divergence(closer, ids, logprobs.to(dtype), mask, num_loss_tokens=6, temperature=1.0)
    assert nearer.item() < loss.item()
    equal = divergence(teacher.clone(), ids, logprobs.to(dtype), mask, num_loss_tokens=6, temperature=1.0)
    assert 0.0 <= equal.item() < 2.0 * torch.finfo(dtype).eps


def test_a_rounded_mass_above_one_keeps_the_divergence_non_negative_and_its_minimum_at_equality(mask: Tensor) -> None:
    teacher = logits(35)
    ids, logprobs, _ = top(teacher, V - 1, 1.0)
    rounded = logprobs.bfloat16().double() + 1e-3
    assert bool((rounded.exp().sum(dim=-1) > 1.0).any())
    student = logits(35).requires_grad_()
    loss = topk_tail_kl(student, ids, rounded, mask, num_loss_tokens=6, temperature=1.0)
    loss.backward()
    assert 0.0 <= loss.item() < 1e-2
    assert student.grad is not None
    assert student.grad.sum(dim=-1).abs().max() < 1e-12  # bins that sum to 1 pull no mass out of the softmax


def test_a_sent_tail_recovers_what_rounded_log_probabilities_lost(mask: Tensor) -> None:
    teacher = logits(36, scale=0.1)
    teacher[..., :4] += 9.0  # tail of about 3e-4, lost in the bfloat16 rounding of four log-probabilities
    ids, logprobs, tail = top(teacher, 4, 1.0)
    student = teacher.clone()
    student[..., 4:] -= 20.0  # a student that has given up the tail
    dense = forward_kl(student, teacher, mask, num_loss_tokens=6, temperature=1.0).item()
    rounded = logprobs.bfloat16()
    without = topk_tail_kl(student, ids, rounded, mask, num_loss_tokens=6, temperature=1.0).item()
    with_tail = topk_tail_kl(
        student, ids, rounded, mask, num_loss_tokens=6, temperature=1.0, tail_logprob_BT=tail.bfloat16()
    ).item()
    assert abs(with_tail - dense) < 0.1 * dense < abs(without - dense)


def test_a_confident_wrong_student_gets_the_dense_gradient_through_topk() -> None:
    teacher = torch.zeros(1, 1, V, dtype=torch.float32)
    teacher[..., 0] = 5.0
    student = torch.zeros(1, 1, V, dtype=torch.float32)
    student[..., 7] = 60.0  # certain of an id that is not kept
    mask = torch.ones(1, 1)
    gradients = []
    for divergence in (forward_kl, with_topk(topk_tail_kl, 2)):
        leaf = student.clone().requires_grad_()
        divergence(leaf, teacher, mask, num_loss_tokens=1, temperature=1.0).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert gradients[1][0, 0, 0].item() == pytest.approx(gradients[0][0, 0, 0].item(), rel=1e-6)
    assert gradients[1][0, 0, 0].item() < -0.9


def test_mass_that_leaves_the_kept_ids_is_paid_for() -> None:
    teacher = torch.zeros(1, 1, V, dtype=torch.float64)
    teacher[..., :3] = 6.0
    mask = torch.ones(1, 1)
    divergence = with_topk(topk_tail_kl, 3)
    leaked = teacher.clone()
    leaked[..., 3:] += 8.0  # the kept ids keep their proportions: a renormalised top-k loss would stay 0
    loss = divergence(leaked, teacher, mask, num_loss_tokens=1, temperature=1.0).item()
    dense = forward_kl(leaked, teacher, mask, num_loss_tokens=1, temperature=1.0).item()
    assert loss == pytest.approx(dense, rel=1e-9)  # within the tail the two agree here
    assert loss > 1.0


def test_an_over_confident_student_keeps_its_gradient_under_topk() -> None:
    teacher = torch.zeros(1, 1, V, dtype=torch.float64)
    teacher[..., 0] = 2.0
    student = teacher.clone()
    student[..., 0] = 4.0  # more mass on the kept id than the teacher: truncated sums go negative and are clamped
    student.requires_grad_()
    loss = with_topk(topk_tail_kl, 1)(student, teacher, torch.ones(1, 1), num_loss_tokens=1, temperature=1.0)
    loss.backward()
    assert loss.item() > 0.05
    assert student.grad is not None
    assert student.grad[0, 0, 0].item() > 0.1


def test_the_bins_of_a_teacher_that_kept_every_id_have_no_tail_whatever_was_sent_as_one() -> None:
    _, logprobs, _ = top(logits(70), V, 1.0)
    ids = torch.arange(V).expand(B * T, V)
    rounding = torch.full((B * T,), -16.0, dtype=torch.float64)
    bins = topk_targets(ids, logprobs.reshape(B * T, V), rounding, vocabulary_size=V)
    assert bool(torch.isneginf(bins[:, -1]).all())
    torch.testing.assert_close(bins[:, :-1], logprobs.reshape(B * T, V), rtol=1e-12, atol=1e-12)
    kept = topk_targets(ids[:, :3], logprobs.reshape(B * T, V)[:, :3], rounding, vocabulary_size=V)
    torch.testing.assert_close(kept.exp().sum(dim=-1), torch.ones(B * T, dtype=torch.float64))
    assert bool(torch.isfinite(kept).all())


def test_rounding_in_the_tail_costs_nothing_where_the_student_masks_all_other_ids(mask: Tensor) -> None:
    student, teacher = logits(37, dtype=torch.float32), logits(38, dtype=torch.float32)
    student[..., 8:] = -INF
    teacher[..., 8:] = -INF
    ids, logprobs, _ = top(teacher, 8, 1.0)
    leaf = student.requires_grad_()
    loss = topk_tail_kl(leaf, ids, logprobs - 2e-7, mask, num_loss_tokens=6, temperature=1.0)
    loss.backward()
    dense = forward_kl(leaf.detach(), teacher, mask, num_loss_tokens=6, temperature=1.0)
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5)
    assert leaf.grad is not None
    assert bool(torch.isfinite(leaf.grad).all())


def test_a_real_tail_that_the_student_forbids_is_infinite(mask: Tensor) -> None:
    student, teacher = logits(39), logits(40)
    ids, logprobs, _ = top(teacher, 4, 1.0)
    forbidding = torch.full_like(student, -INF).scatter(-1, ids, student.gather(-1, ids))
    assert topk_tail_kl(forbidding, ids, logprobs, mask, num_loss_tokens=6, temperature=1.0).item() == INF


def test_garbage_ids_at_unscored_positions_are_not_read(mask: Tensor) -> None:
    student, teacher = logits(41), logits(42)
    ids, logprobs, tail = top(teacher, 4, 1.0)
    settings = {"num_loss_tokens": 6, "temperature": 1.0}
    clean = topk_tail_kl(student, ids, logprobs, mask, **settings, tail_logprob_BT=tail)
    unscored = ~mask[..., None]
    dirty = topk_tail_kl(
        student,
        ids.masked_fill(unscored, -1).int(),
        logprobs.masked_fill(unscored, math.nan),
        mask,
        **settings,
        tail_logprob_BT=tail.masked_fill(~mask, INF),
    )
    assert torch.equal(clean, dirty)


# Mixtures.


def test_mixture_is_of_probabilities_with_normalised_weights(mask: Tensor) -> None:
    student = logits(43)
    teachers = torch.stack([logits(44), logits(45), logits(46)])
    value = mixture_kl(student, teachers, [2.0, 1.0, 1.0], mask, num_loss_tokens=6, temperature=2.0)
    expected = 0.0
    for b, t in mask.nonzero().tolist():
        q = np.exp(log_softmax(student[b, t].numpy() / 2.0))
        ps = [np.exp(log_softmax(teacher[b, t].numpy() / 2.0)) for teacher in teachers]
        expected += float(rel_entr(0.5 * ps[0] + 0.25 * ps[1] + 0.25 * ps[2], q).sum())
    assert value.item() == pytest.approx(expected / 6, rel=1e-12)


def test_a_teacher_of_weight_zero_is_not_read(mask: Tensor) -> None:
    student, teacher = logits(47), logits(48)
    teachers = torch.stack([torch.full_like(teacher, math.nan), teacher])
    value = mixture_kl(student, teachers, torch.tensor([0.0, 3.0]), mask, num_loss_tokens=6, temperature=1.0)
    assert value.item() == pytest.approx(
        forward_kl(student, teacher, mask, num_loss_tokens=6, temperature=1.0).item(), rel=1e-12
    )


@pytest.mark.parametrize("weights", [[0.5], [0.5, -0.5], [0.0, 0.0], [math.nan, 1.0], [INF, 1.0]])
def test_mixture_refuses_weights_that_are_no_weights(weights: list[float], mask: Tensor) -> None:
    teachers = torch.stack([logits(49), logits(50)])
    with pytest.raises(ValueError, match="weights: expected"):
        mixture_kl(logits(51), teachers, weights, mask, num_loss_tokens=6, temperature=1.0)


def test_mixture_refuses_teachers_of_another_vocabulary(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="one tokenizer"):
        mixture_kl(logits(52), logits(53)[None, ..., :-1], [1.0], mask, num_loss_tokens=6, temperature=1.0)


def topk_of_each(teachers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    kept = [top(teacher, k, 1.0) for teacher in teachers]
    return torch.stack([ids for ids, _, _ in kept]), torch.stack([logprobs for _, logprobs, _ in kept])


def test_a_topk_mixture_bins_the_ids_that_all_teachers_kept(mask: Tensor) -> None:
    student, weights = logits(70), np.array([0.5, 0.3, 0.2])
    # Similar teachers, in another order of ids each, keep some ids in common and some not.
    teachers = torch.stack([logits(71) + 0.4 * logits(72 + n) for n in range(3)])
    ids, logprobs = topk_of_each(teachers, 6)
    value = topk_tail_mixture_kl(student, ids, logprobs, weights, mask, num_loss_tokens=6, temperature=1.0)
    expected, num_common = 0.0, []
    for b, t in mask.nonzero().tolist():
        q = np.exp(log_softmax(student[b, t].numpy()))
        p = weights @ np.exp(log_softmax(teachers[:, b, t].numpy(), axis=-1))
        common = sorted(set.intersection(*(set(ids[n, b, t].tolist()) for n in range(3))))
        num_common.append(len(common))
        bins_p, bins_q = (np.append(d[common], 1.0 - d[common].sum()) for d in (p, q))
        expected += float(rel_entr(bins_p, bins_q).sum())
    assert 0 < min(num_common) < max(num_common) < 6  # the case is not a trivial one
    assert value.item() == pytest.approx(expected / 6, rel=1e-10)
    assert value.item() < mixture_kl(student, teachers, weights, mask, num_loss_tokens=6, temperature=1.0).item()


def test_a_topk_mixture_that_keeps_everything_is_the_dense_mixture(mask: Tensor) -> None:
    student, weights = logits(75).requires_grad_(), [2.0, 1.0, 0.0]
    teachers = torch.stack([logits(76), logits(77), logits(78)])
    ids, logprobs = topk_of_each(teachers, V)
    # The third teacher has no weight: its ids neither narrow the common ones nor are they read.
    ids[2], logprobs[2] = -1, math.nan
    losses = (
        topk_tail_mixture_kl(student, ids, logprobs, weights, mask, num_loss_tokens=6, temperature=1.0),
        mixture_kl(student, teachers, weights, mask, num_loss_tokens=6, temperature=1.0),
    )
    sparse, dense = (torch.autograd.grad(loss, student)[0] for loss in losses)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-14)


def test_a_topk_mixture_refuses_what_no_teacher_can_have_sent(mask: Tensor) -> None:
    student = logits(79)
    ids, logprobs = topk_of_each(torch.stack([logits(80), logits(81)]), 3)
    settings = {"num_loss_tokens": 6, "temperature": 1.0}
    with pytest.raises(ValueError, match=r"one shape \[teachers"):
        topk_tail_mixture_kl(student, ids[:1], logprobs, [1.0, 1.0], mask, **settings)
    with pytest.raises(ValueError, match="weights: expected 2"):
        topk_tail_mixture_kl(student, ids, logprobs, [1.0], mask, **settings)
    with pytest.raises(ValueError, match="expected ids from 0 to 10"):
        topk_tail_mixture_kl(student, ids + V, logprobs, [1.0, 1.0], mask, **settings)
    with pytest.raises(ValueError, match="log_softmax"):
        topk_tail_mixture_kl(student, ids, logprobs + 5.0, [1.0, 1.0], mask, **settings)


# Draws.


def draws(
    teacher: Tensor, num_draws: int, seed: int, *, proposal: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids drawn from softmax(proposal or teacher), and the log-probabilities of both at them."""
    log_p = torch.log_softmax(teacher, dim=-1)
    log_r = log_p if proposal is None else torch.log_softmax(proposal, dim=-1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(log_r.exp().flatten(0, -2), num_draws, replacement=True, generator=generator)
    ids = ids.view(*teacher.shape[:-1], num_draws)
    return ids, log_p.gather(-1, ids), log_r.gather(-1, ids)


@pytest.mark.parametrize("from_proposal", [False, True])
def test_draws_give_the_dense_value_and_gradient_in_expectation(from_proposal: bool, mask: Tensor) -> None:
    """Exactly: the sum over every id of its probability of being drawn times the estimate from that one draw."""
    student, teacher = logits(82).requires_grad_(), logits(83)
    log_p = torch.log_softmax(teacher, dim=-1)
    log_r = torch.log_softmax(logits(84, scale=1.0), dim=-1) if from_proposal else log_p
    # One position at a time, so that one id is drawn for it.
    value, gradient = 0.0, torch.zeros_like(student)
    for position in mask.nonzero():
        only = torch.zeros_like(mask)
        only[tuple(position)] = True
        for token in range(V):
            loss = sampled_kl(
                student,
                torch.full((B, T, 1), token),
                log_p[..., token : token + 1],
                only,
                num_loss_tokens=6,
                temperature=1.0,
                proposal_logprobs_BTS=log_r[..., token : token + 1] if from_proposal else None,
            )
            chance = log_r[tuple(position)][token].exp().item()
            value += chance * loss.item()
            gradient += chance * torch.autograd.grad(loss, student)[0]
    dense = forward_kl(student, teacher, mask, num_loss_tokens=6, temperature=1.0)
    assert value == pytest.approx(dense.item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(dense, student)[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("from_proposal", [False, True])
def test_draws_do_not_depend_on_the_order_of_the_vocabulary_nor_on_a_shift_of_the_logits(
    from_proposal: bool, mask: Tensor
) -> None:
    student, teacher = logits(67), logits(68)
    log_p = torch.log_softmax(teacher / 2.0, dim=-1)
    log_r = torch.log_softmax(logits(69), dim=-1)
    ids = torch.randint(V, (B, T, 5), generator=torch.Generator().manual_seed(3))
    drawn = {"proposal_logprobs_BTS": log_r.gather(-1, ids)} if from_proposal else {}
    settings = {"num_loss_tokens": 6, "temperature": 2.0, **drawn}
    value = sampled_kl(student, ids, log_p.gather(-1, ids), mask, **settings).item()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(4))
    places = order.argsort()[ids]  # where each id went
    permuted = sampled_kl(student[..., order], places, log_p.gather(-1, ids), mask, **settings)
    shifted = sampled_kl(student + 7.0, ids, log_p.gather(-1, ids), mask, **settings)
    assert permuted.item() == pytest.approx(value, rel=1e-12)
    assert shifted.item() == pytest.approx(value, rel=1e-12)


def test_many_draws_converge_and_a_kept_share_does_not(mask: Tensor) -> None:
    student, teacher = logits(85), logits(86)
    settings = {"num_loss_tokens": 6, "temperature": 1.0}
    dense = forward_kl(student, teacher, mask, **settings).item()
    for proposal in (None, 0.8 * teacher):
        ids, log_p, log_r = draws(teacher, 20000, 0, proposal=proposal)
        sent = None if proposal is None else log_r
        value = sampled_kl(student, ids, log_p, mask, **settings, proposal_logprobs_BTS=sent).item()
        # The standard error of 6 x 20,000 draws of a spread of about 5 nats is 0.015.
        assert value == pytest.approx(dense, abs=0.06)
    assert with_topk(topk_tail_kl, 1)(student, teacher, mask, **settings).item() < dense - 0.06


def test_draws_of_a_certain_and_wrong_student_give_the_full_gradient() -> None:
    teacher = torch.zeros(1, 1, V, dtype=torch.float64)
    teacher[..., 0] = 40.0
    student = teacher.roll(1, dims=-1).requires_grad_()
    ids, log_p, _ = draws(teacher, 4, 1)
    sampled_kl(student, ids, log_p, torch.ones(1, 1), num_loss_tokens=1, temperature=1.0).backward()
    assert student.grad is not None
    assert student.grad[0, 0, :2].tolist() == pytest.approx([-1.0, 1.0], abs=1e-9)


@pytest.mark.parametrize("poison", [INF, math.nan])
def test_unscored_draws_cannot_change_loss_or_gradient(poison: float, mask: Tensor) -> None:
    teacher = logits(87)
    ids, log_p, log_r = draws(teacher, 5, 2)
    results = []
    for fill in (0.0, poison):
        student = logits(88).masked_fill(~mask[..., None], fill).requires_grad_()
        unscored = ~mask[..., None]
        loss = sampled_kl(
            student,
            ids.masked_fill(unscored, -1),
            log_p.masked_fill(unscored, fill),
            mask,
            num_loss_tokens=6,
            temperature=2.0,
            proposal_logprobs_BTS=log_r.masked_fill(unscored, fill),
        )
        loss.backward()
        results.append((loss.detach(), student.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert bool(results[0][1][mask].any())
    nothing = sampled_kl(student, ids, log_p, torch.zeros_like(mask), num_loss_tokens=6, temperature=2.0)
    nothing.backward()
    assert nothing.item() == 0.0


def test_draws_that_cannot_be_a_teachers_are_refused(mask: Tensor) -> None:
    ids, log_p, log_r = draws(logits(89), 5, 3)
    settings = {"num_loss_tokens": 6, "temperature": 1.0}
    for wrong in ((ids[..., :4], log_p), (ids[..., :0], log_p[..., :0]), (ids[:, :-1], log_p[:, :-1])):
        with pytest.raises(ValueError, match="draws: expected ids and log-probabilities"):
            sampled_kl(logits(90), *wrong, mask, **settings)
    with pytest.raises(ValueError, match="draws: expected ids and log-probabilities"):
        sampled_kl(logits(90), ids, log_p, mask, **settings, proposal_logprobs_BTS=log_r[..., :1])
    with pytest.raises(ValueError, match="expected ids from 0 to 10"):
        sampled_kl(logits(90), ids + V, log_p, mask, **settings)


# Temperature and refusals.


def test_kd_loss_makes_the_gradient_norm_nearly_independent_of_the_temperature(mask: Tensor) -> None:
    norms = []
    for temperature in (4.0, 8.0, 16.0):
        student = logits(54, scale=1.0).requires_grad_()
        divergence = forward_kl(student, logits(55, scale=1.0), mask, num_loss_tokens=6, temperature=temperature)
        kd_loss(divergence, temperature=temperature).backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert kd_loss(torch.tensor(0.5), temperature=2.0).item() == 2.0
    assert max(norms) / min(norms) < 1.2


@every
@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(divergence: Dense, temperature: float, mask: Tensor) -> None:
    student = logits(56)
    with pytest.raises(ValueError, match="temperature: expected"):
        # The teacher of a sparse divergence tempers its own logits, at 1 here; the refusal is about the student's.
        divergence(student, student, mask, num_loss_tokens=6, temperature=temperature)


@every
@pytest.mark.parametrize("num_loss_tokens", [0, -1])
def test_a_count_below_one_is_refused_while_something_is_scored(
    divergence: Dense, num_loss_tokens: int, mask: Tensor
) -> None:
    with pytest.raises(ValueError, match="at least 6"):
        divergence(logits(57), logits(58), mask, num_loss_tokens=num_loss_tokens, temperature=1.0)


@every_dense
def test_shapes_that_disagree_are_refused(divergence: Dense, mask: Tensor) -> None:
    with pytest.raises(ValueError, match="expected one"):
        divergence(logits(59), logits(60)[..., :-1], mask, num_loss_tokens=6, temperature=1.0)
    with pytest.raises(ValueError, match="loss mask: expected shape"):
        divergence(logits(59), logits(60), mask[:, :-1], num_loss_tokens=6, temperature=1.0)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_outside_zero_to_one_is_refused(beta: float, mask: Tensor) -> None:
    with pytest.raises(ValueError, match="beta: expected"):
        generalized_jsd(logits(61), logits(62), mask, beta=beta, temperature=1.0, num_loss_tokens=6)


@pytest.mark.parametrize("divergence", [skewed_kl, skewed_reverse_kl])
@pytest.mark.parametrize("alpha", [0.0, 1.0, math.nan])
def test_a_skew_outside_the_open_interval_is_refused(divergence: Dense, alpha: float, mask: Tensor) -> None:
    with pytest.raises(ValueError, match="alpha: expected"):
        divergence(logits(63), logits(64), mask, alpha=alpha, temperature=1.0, num_loss_tokens=6)


def test_top_k_that_cannot_be_a_teachers_answer_is_refused(mask: Tensor) -> None:
    student, teacher = logits(65), logits(66)
    ids, logprobs, tail = top(teacher, 4, 1.0)
    settings = {"num_loss_tokens": 6, "temperature": 1.0}
    with pytest.raises(ValueError, match="expected ids and log-probabilities of shape"):
        topk_tail_kl(student, ids[..., :3], logprobs, mask, **settings)
    with pytest.raises(ValueError, match="K >= 1"):
        topk_tail_kl(student, ids[..., :0], logprobs[..., :0], mask, **settings)
    with pytest.raises(ValueError, match="expected ids and log-probabilities of shape"):
        topk_tail_kl(student, ids[:, :-1], logprobs[:, :-1], mask, **settings)
    with pytest.raises(ValueError, match="tail: expected shape"):
        topk_tail_kl(student, ids, logprobs, mask, **settings, tail_logprob_BT=tail[..., None])
    with pytest.raises(ValueError, match="expected ids from 0 to 10"):
        topk_tail_kl(student, ids + V, logprobs, mask, **settings)
    with pytest.raises(ValueError, match="expected ids from 0 to 10"):
        topk_tail_kl(student, ids - V, logprobs, mask, **settings)
    with pytest.raises(ValueError, match="distinct ids"):
        topk_tail_kl(student, torch.zeros_like(ids), logprobs, mask, **settings)
    with pytest.raises(ValueError, match="log_softmax"):
        topk_tail_kl(student, ids, teacher.gather(-1, ids), mask, **settings)


@pytest.mark.parametrize("count", [math.inf, math.nan, 0.5, 0, -3])
def test_a_count_of_scored_tokens_is_finite_and_at_least_1(count):
    logits = torch.randn(1, 3, 5)
    with pytest.raises(ValueError, match="num_loss_tokens: expected the scored positions"):
        forward_kl(logits, logits, torch.ones(1, 3), num_loss_tokens=count, temperature=1.0)


@pytest.mark.parametrize("value", [2.0, 0.5, -1.0, math.nan, math.inf])
def test_a_mask_of_weights_is_refused_and_one_of_zeros_and_ones_selects(value):
    student, teacher = torch.randn(2, 1, 3, 5)
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    setting = {"num_loss_tokens": 2, "temperature": 1.0}
    assert torch.equal(
        forward_kl(student, teacher, mask, **setting), forward_kl(student, teacher, mask.bool(), **setting)
    )
    mask[0, 1] = value
    with pytest.raises(ValueError, match="loss mask: expected bool, or only 0 and 1"):
        forward_kl(student, teacher, mask, **setting)
