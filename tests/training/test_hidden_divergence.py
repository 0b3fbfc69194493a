"""The tiled hidden-state form against the dense divergences, in value, gradient and memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nexus.training.divergence import (
    distill_divergence,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
)
from nexus.training.hidden_divergence import (
    DISTILL_MIX,
    FORWARD_KL,
    REVERSE_KL,
    OutputHead,
    Term,
    hidden_divergence,
    jsd_terms,
    skewed_kl_terms,
    skewed_reverse_kl_terms,
)

B, T, D, E, V = 2, 7, 6, 5, 53

Dense = Callable[..., Tensor]
PAIRS: dict[str, tuple[tuple[Term, ...], Dense]] = {
    "forward_kl": (FORWARD_KL, forward_kl),
    "reverse_kl": (REVERSE_KL, reverse_kl),
    "jsd_0": (jsd_terms(0.0), forward_kl),
    "jsd_1": (jsd_terms(1.0), reverse_kl),
    "jsd_0.3": (jsd_terms(0.3), functools.partial(generalized_jsd, beta=0.3)),
    "skewed_kl": (skewed_kl_terms(), skewed_kl),
    "skewed_kl_0.6": (skewed_kl_terms(0.6), functools.partial(skewed_kl, alpha=0.6)),
    "skewed_reverse_kl": (skewed_reverse_kl_terms(), skewed_reverse_kl),
    "distill": (DISTILL_MIX, distill_divergence),
    "both_kls": (
        (Term(0.25, "teacher", 0.0), Term(2.0, "student", 1.0)),
        lambda *args, **settings: 0.25 * forward_kl(*args, **settings) + 2.0 * reverse_kl(*args, **settings),
    ),
}
every = pytest.mark.parametrize(("terms", "dense"), PAIRS.values(), ids=PAIRS.keys())


class Problem:
    """Two models' states and heads, random and float64 unless told."""

    def __init__(
        self, seed: int = 0, *, scale: float = 2.0, dtype: torch.dtype = torch.float64, capped: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * math.sqrt(scale)).to(dtype)

        self.student = random(B, T, D).requires_grad_()
        self.weight = random(V, D).requires_grad_()
        self.bias = random(V).requires_grad_()
        self.teacher = random(B, T, E)
        self.teacher_head = OutputHead(random(V, E), random(V), 5.0 if capped else None)
        self.head = OutputHead(self.weight, self.bias, 4.0 if capped else None)
        self.mask = torch.rand(B, T, generator=generator) < 0.7

    @property
    def leaves(self) -> list[Tensor]:
        return [self.student, self.weight, self.bias]

    def tiled(self, terms: tuple[Term, ...], **changes: Any) -> Tensor:
        settings: dict[str, Any] = {"num_loss_tokens": 9, "temperature": 2.0, **changes}
        return hidden_divergence(
            self.student, self.head, self.teacher, self.teacher_head, self.mask, terms=terms, **settings
        )

    def dense(self, divergence: Dense, *, temperature: float = 2.0) -> Tensor:
        return divergence(
            logits(self.student, self.head),
            logits(self.teacher, self.teacher_head),
            self.mask,
            num_loss_tokens=9,
            temperature=temperature,
        )


def logits(hidden: Tensor, head: OutputHead) -> Tensor:
    values = F.linear(hidden, head.weight_VD, head.bias_V)
    return values if head.softcap is None else head.softcap * torch.tanh(values / head.softcap)


@every
@pytest.mark.parametrize("workspace_bytes", [1, 20_000, 1 << 20])
@pytest.mark.parametrize("capped", [False, True])
def test_value_and_gradients_are_those_of_the_dense_form(
    terms: tuple[Term, ...], dense: Dense, workspace_bytes: int, capped: bool
) -> None:
    """From one id of one row at a time to everything at once."""
    problem = Problem(capped=capped)
    tiled_loss, dense_loss = problem.tiled(terms, workspace_bytes=workspace_bytes), problem.dense(dense)
    assert tiled_loss.item() == pytest.approx(dense_loss.item(), rel=1e-11)
    for found, expected in zip(
        torch.autograd.grad(tiled_loss, problem.leaves), torch.autograd.grad(dense_loss, problem.leaves), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_rows_beyond_one_block_of_the_backward_pass_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(1)
    whole = torch.autograd.grad(problem.tiled(DISTILL_MIX), problem.leaves)
    monkeypatch.setattr("nexus.training.hidden_divergence.MAX_BLOCK_ROWS", 3)
    for part, expected in zip(torch.autograd.grad(problem.tiled(DISTILL_MIX), problem.leaves), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)


@every
def test_extreme_logits_stay_finite_and_equal_to_the_dense_form(terms: tuple[Term, ...], dense: Dense) -> None:
    problem = Problem(2, scale=1e3, dtype=torch.float32)
    tiled_loss, dense_loss = problem.tiled(terms, temperature=1.0), problem.dense(dense, temperature=1.0)
    assert tiled_loss.item() == pytest.approx(dense_loss.item(), rel=1e-4)
    for found, expected in zip(
        torch.autograd.grad(tiled_loss, problem.leaves), torch.autograd.grad(dense_loss, problem.leaves), strict=True
    ):
        assert bool(torch.isfinite(found).all())
        # float32 rounding of logits of about 1e4
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6 + 1e-2 * expected.abs().max().item())


@every
def test_a_teacher_equal_to_the_student_costs_nothing(terms: tuple[Term, ...], dense: Dense) -> None:
    problem = Problem(3, dtype=torch.float32)
    problem.teacher = problem.student.detach().clone()
    problem.teacher_head = OutputHead(problem.weight.detach().clone(), problem.bias.detach().clone())
    loss = problem.tiled(terms)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    for gradient in torch.autograd.grad(loss, problem.leaves):
        assert gradient.abs().max().item() < 1e-5


@every
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_masked_positions_cannot_change_loss_or_gradient(terms: tuple[Term, ...], dense: Dense, poison: float) -> None:
    results = []
    for fill in (0.0, poison):
        problem = Problem(4)
        unscored = ~problem.mask[..., None]
        problem.student = problem.student.detach().masked_fill(unscored, fill).requires_grad_()
        problem.teacher = problem.teacher.masked_fill(unscored, fill)
        loss = problem.tiled(terms)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in problem.leaves)])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    assert not results[1][1][~problem.mask].any()


@every
def test_vocabulary_permutation_and_logit_shift_change_nothing(terms: tuple[Term, ...], dense: Dense) -> None:
    problem = Problem(12)
    value = problem.tiled(terms, workspace_bytes=20_000).item()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    heads = problem.head, problem.teacher_head
    problem.head, problem.teacher_head = (OutputHead(head.weight_VD[order], head.bias_V[order]) for head in heads)
    assert problem.tiled(terms, workspace_bytes=20_000).item() == pytest.approx(value, rel=1e-11)
    problem.head = replace(heads[0], bias_V=heads[0].bias_V + 7.0)
    problem.teacher_head = replace(heads[1], bias_V=heads[1].bias_V - 3.0)
    assert problem.tiled(terms, workspace_bytes=20_000).item() == pytest.approx(value, rel=1e-11)


@every
def test_a_batch_that_scores_nothing_is_zero_and_attached(terms: tuple[Term, ...], dense: Dense) -> None:
    problem = Problem(5)
    problem.mask = torch.zeros(B, T)
    problem.student = problem.student.detach().fill_(math.inf).requires_grad_()
    problem.teacher = problem.teacher.fill_(math.nan)
    loss = problem.tiled(terms, num_loss_tokens=0)
    loss.backward()
    assert loss.item() == 0.0
    for leaf in problem.leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_only_the_gradients_that_are_asked_for_are_computed_and_none_reaches_the_teacher() -> None:
    problem = Problem(6)
    problem.teacher.requires_grad_()
    problem.teacher_head = replace(
        problem.teacher_head, weight_VD=problem.teacher_head.weight_VD.clone().requires_grad_()
    )
    (states,) = torch.autograd.grad(problem.tiled(FORWARD_KL), [problem.student])
    problem.head = OutputHead(problem.weight.detach())
    problem.tiled(FORWARD_KL).backward()
    assert problem.student.grad is not None
    assert not torch.equal(problem.student.grad, states)  # another head: without its bias
    assert problem.weight.grad is None
    assert problem.teacher.grad is None
    assert problem.teacher_head.weight_VD.grad is None
    problem.student = problem.student.detach()
    problem.head = OutputHead(problem.weight)
    problem.tiled(FORWARD_KL).backward()
    assert problem.weight.grad is not None


def test_the_upstream_gradient_scales_the_result() -> None:
    problem = Problem(7)
    once, thrice = (torch.autograd.grad(k * problem.tiled(DISTILL_MIX), problem.leaves) for k in (1.0, 3.0))
    for small, large in zip(once, thrice, strict=True):
        torch.testing.assert_close(3.0 * small, large, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_models_products_and_nothing_else(dtype: torch.dtype) -> None:
    problem = Problem(8, dtype=dtype)
    loss = problem.tiled(DISTILL_MIX)
    dense = problem.dense(distill_divergence)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5)  # the logits are rounded alike, the softmax is not
    for leaf, found, expected in zip(
        problem.leaves,
        torch.autograd.grad(loss, problem.leaves),
        torch.autograd.grad(dense, problem.leaves),
        strict=True,
    ):
        assert found.dtype == leaf.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())


def test_autocast_changes_nothing_inside() -> None:
    problem = Problem(9, dtype=torch.float32)
    plain = problem.tiled(DISTILL_MIX)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = problem.tiled(DISTILL_MIX)
    assert torch.equal(plain, cast)


def test_it_trains_a_head_and_a_trunk() -> None:
    problem = Problem(10, scale=0.5)
    start = problem.tiled(DISTILL_MIX).item()
    optimizer = torch.optim.SGD(problem.leaves, lr=2.0)
    for _ in range(30):
        optimizer.zero_grad()
        loss = problem.tiled(DISTILL_MIX)
        loss.backward()
        optimizer.step()
    assert problem.tiled(DISTILL_MIX).item() < 0.5 * start


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))]
        )
        return result


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made() -> None:
    tokens, vocabulary = 200, 1000
    largest = []
    for workspace_bytes in (1 << 16, 1 << 28):
        student = torch.randn(1, tokens, 8, requires_grad=True)
        weight = torch.randn(vocabulary, 8, requires_grad=True)
        with Largest() as mode:
            loss = hidden_divergence(
                student,
                OutputHead(weight),
                torch.randn(1, tokens, 4),
                OutputHead(torch.randn(vocabulary, 4)),
                torch.ones(1, tokens),
                terms=DISTILL_MIX,
                num_loss_tokens=tokens,
                temperature=1.0,
                workspace_bytes=workspace_bytes,
            )
            loss.backward()
        largest.append(mode.elements)
    # The largest is the head's gradient; with room for everything it is the logits, which shows that the measurement sees them.
    assert largest == [vocabulary * 8, tokens * vocabulary]


def test_what_cannot_be_compared_is_refused() -> None:
    problem = Problem(11)
    with pytest.raises(ValueError, match="student: expected a head"):
        replace_head(problem, OutputHead(problem.weight[:, :-1])).tiled(FORWARD_KL)
    with pytest.raises(ValueError, match="student: expected a head"):
        replace_head(problem, OutputHead(problem.weight[0])).tiled(FORWARD_KL)
    with pytest.raises(ValueError, match="student: expected a bias"):
        replace_head(problem, OutputHead(problem.weight, problem.bias[:-1])).tiled(FORWARD_KL)
    for cap in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="student: expected a finite softcap"):
            replace_head(problem, OutputHead(problem.weight, softcap=cap)).tiled(FORWARD_KL)
    with pytest.raises(ValueError, match="one vocabulary"):
        replace_head(problem, OutputHead(problem.weight[:-1])).tiled(FORWARD_KL)
    replace_head(problem, OutputHead(problem.weight))
    with pytest.raises(ValueError, match="terms: expected at least one"):
        problem.tiled(())
    with pytest.raises(ValueError, match="workspace_bytes: expected"):
        problem.tiled(FORWARD_KL, workspace_bytes=0)
    with pytest.raises(ValueError, match="temperature: expected"):
        problem.tiled(FORWARD_KL, temperature=0.0)
    with pytest.raises(ValueError, match="num_loss_tokens: expected"):
        problem.tiled(FORWARD_KL, num_loss_tokens=0)
    problem.mask = problem.mask[:, :-1]
    with pytest.raises(ValueError, match="student: expected a head"):
        problem.tiled(FORWARD_KL)
    with pytest.raises(ValueError, match="beta: expected"):
        jsd_terms(1.5)
    for weight, under, share in ((0.0, "teacher", 0.0), (math.nan, "teacher", 0.0), (1.0, "student", 1.1)):
        with pytest.raises(ValueError, match="term: expected a finite weight"):
            Term(weight, under, share)
    for under, share in (("teacher", 1.0), ("student", 0.0)):
        with pytest.raises(ValueError, match="against itself"):
            Term(1.0, under, share)
    for make in (skewed_kl_terms, skewed_reverse_kl_terms):
        with pytest.raises(ValueError, match="alpha: expected"):
            make(0.0)


def replace_head(problem: Problem, head: OutputHead) -> Problem:
    problem.head = head
    return problem
