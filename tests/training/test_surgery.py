"""Gradient surgery against its defining conditions: the dual cone, the KKT conditions, linearity, and PCGrad where both agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nexus.training import surgery
from nexus.training.surgery import (
    combine,
    nonnegative_minimiser,
    plan_scaled_surgery,
    plan_surgery,
    weighted_sum,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conflicting(seed: int, num_teachers: int, num_parameters: int = 60, *, log_scale: float = 0.0) -> Tensor:
    """Anti-correlated rows: their mean is over-subtracted, so that every pair tends to conflict."""
    rows = torch.randn(num_teachers, num_parameters, generator=generator(seed), dtype=torch.float64)
    rows = rows - 1.5 * rows.mean(dim=0)
    scales = torch.randn(num_teachers, 1, generator=generator(seed + 1), dtype=torch.float64)
    return rows * torch.exp(log_scale * scales)


def simplex(seed: int, num_teachers: int) -> Tensor:
    weights = torch.rand(num_teachers, generator=generator(seed + 2), dtype=torch.float64) + 0.01
    return weights / weights.sum()


def worst_conflict(gradients: Tensor, coefficients: Tensor, combined: Tensor) -> float:
    """The most negative <g_t, d> / (|g_t| sum_s c_s |g_s|)."""
    norms = gradients.norm(dim=1)
    return float((gradients @ combined / (norms * (coefficients * norms).sum())).min())


# The weighted sum.


@pytest.mark.parametrize("method", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sum_is_the_weighted_sum_in_the_dtype_of_the_gradients(method: surgery.Method, dtype: torch.dtype) -> None:
    gradients, coefficients = conflicting(0, 3).to(dtype), simplex(0, 3)
    combined = combine(gradients, coefficients, method=method)
    assert combined.dtype == dtype
    assert combined.shape == (60,)
    assert torch.equal(combined, (coefficients @ gradients.double()).to(dtype))


@pytest.mark.parametrize("method", ["upgrad", "pcgrad"])
def test_without_conflict_surgery_is_the_weighted_sum(method: surgery.Method) -> None:
    gradients = torch.rand(5, 40, generator=generator(1), dtype=torch.float64)  # all in the positive orthant
    coefficients = simplex(1, 5)
    torch.testing.assert_close(
        combine(gradients, coefficients, method=method), coefficients @ gradients, rtol=1e-12, atol=1e-12
    )


# UPGrad.


def test_upgrad_gives_the_published_value() -> None:
    # The example of TorchJD's documentation, exact instead of with its regularisation of 1e-4 ([0.2929, 1.9004, 1.9004]).
    gradients = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
    combined = combine(gradients, torch.tensor([0.5, 0.5]), method="upgrad")
    assert combined.tolist() == pytest.approx([0.29240, 1.90058, 1.90058], abs=1e-5)


def test_upgrad_gives_torchjds_values_for_four_conflicting_teachers() -> None:
    # TorchJD 0.18, UPGrad(pref_vector=coefficients * norms, projector=QuadprogProjector(reg_eps=1e-10)) of the unit rows.
    gradients = torch.tensor(
        [[3.0, -1.0, 0.5, 2.0], [-2.0, 0.4, 1.0, -1.5], [0.1, -0.2, -0.7, 0.3], [1.0, 2.0, -1.0, -2.5]],
        dtype=torch.float64,
    )
    coefficients = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    combined = combine(gradients, coefficients, method="upgrad")
    assert combined.tolist() == pytest.approx([0.19907875638, -0.32110884697, -0.07635967234, -0.42663391519], abs=1e-8)


@pytest.mark.parametrize("num_teachers", [2, 3, 5, 8, 16, 32])
@pytest.mark.parametrize("log_scale", [0.0, 4.0])
def test_upgrad_conflicts_with_no_teacher_whatever_the_scales(num_teachers: int, log_scale: float) -> None:
    for seed in range(4):
        gradients = conflicting(10 * seed, num_teachers, log_scale=log_scale)
        coefficients = simplex(seed, num_teachers)
        plain = worst_conflict(gradients, coefficients, combine(gradients, coefficients, method="sum"))
        repaired = worst_conflict(gradients, coefficients, combine(gradients, coefficients, method="upgrad"))
        assert repaired >= -1e-8
        assert plain < repaired


def test_upgrad_conflicts_with_no_teacher_when_there_are_fewer_parameters_than_teachers() -> None:
    gradients, coefficients = conflicting(3, 16, 6, log_scale=2.0), simplex(3, 16)
    assert worst_conflict(gradients, coefficients, combine(gradients, coefficients, method="upgrad")) >= -1e-8


@pytest.mark.parametrize("distance", [1e-4, 1e-8, 1e-12])
def test_upgrad_holds_for_nearly_opposite_and_nearly_equal_teachers(distance: float) -> None:
    base = torch.randn(4, 30, generator=generator(4), dtype=torch.float64)
    noise = torch.randn(8, 30, generator=generator(5), dtype=torch.float64)
    gradients = torch.cat([base, -base]) + distance * noise
    coefficients = simplex(4, 8)
    assert worst_conflict(gradients, coefficients, combine(gradients, coefficients, method="upgrad")) >= -1e-8


def test_upgrad_is_the_sum_of_projections_on_the_dual_cone() -> None:
    gradients, coefficients = conflicting(6, 5, log_scale=1.0), simplex(6, 5)
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    expected = torch.zeros(60, dtype=torch.float64)
    for row, coefficient in zip(gradients, coefficients, strict=True):
        # Moreau: x minus its projection on the cone spanned by the negated rows is its projection on the dual cone.
        multipliers, _ = nnls(-unit.T.numpy(), (coefficient * row).numpy())
        expected += coefficient * row + unit.T @ torch.from_numpy(multipliers)
    torch.testing.assert_close(combine(gradients, coefficients, method="upgrad"), expected, rtol=1e-9, atol=1e-9)


def test_each_projection_satisfies_the_kkt_conditions() -> None:
    gradients = conflicting(7, 8)
    unit = (gradients / gradients.norm(dim=1, keepdim=True)).numpy()
    cosines = unit @ unit.T
    for index in range(8):
        extra = nonnegative_minimiser(cosines, cosines[index])
        weights = extra + np.eye(8)[index]
        assert (extra >= 0.0).all()
        assert (cosines @ weights >= -1e-10).all()
        assert extra @ (cosines @ weights) == pytest.approx(0.0, abs=1e-10)


def test_upgrad_does_not_depend_on_the_order_of_the_teachers() -> None:
    gradients, coefficients = conflicting(8, 8, log_scale=1.5), simplex(8, 8)
    combined = combine(gradients, coefficients, method="upgrad")
    order = torch.randperm(8, generator=generator(9))
    permuted = combine(gradients[order], coefficients[order], method="upgrad")
    scale = float((coefficients * gradients.norm(dim=1)).sum())
    assert float((combined - permuted).norm()) <= 1e-12 * scale


def test_upgrad_is_linear_in_the_scale_of_each_teacher() -> None:
    gradients, coefficients = conflicting(10, 4), simplex(10, 4)

    def scaled(factors: Tensor) -> Tensor:
        return combine(factors[:, None] * gradients, coefficients, method="upgrad")

    first = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    second = torch.tensor([4.0, 0.1, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(scaled(first) + scaled(second), scaled(first + second), rtol=1e-12, atol=1e-12)


def test_a_small_step_along_upgrad_raises_no_teachers_loss() -> None:
    gradients, coefficients = conflicting(11, 6), simplex(11, 6)
    combined = combine(gradients, coefficients, method="upgrad")
    assert float(combined.norm()) > 0.0
    # Linear losses <g_t, x>: with SGD the change of each is -step <g_t, d>.
    assert bool((-0.01 * (gradients @ combined) <= 1e-10).all())
    assert bool((-0.01 * (gradients @ combine(gradients, coefficients, method="sum")) > 0).any())


def test_a_teacher_without_weight_is_still_not_conflicted_with() -> None:
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    combined = combine(gradients, torch.tensor([1.0, 0.0]), method="upgrad")
    assert combined.tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("method", ["sum", "upgrad", "pcgrad"])
def test_without_any_weight_there_is_no_step(method: surgery.Method) -> None:
    assert not combine(conflicting(12, 3), torch.zeros(3), method=method).any()


# Two teachers: all surgeries agree.


def test_with_two_teachers_upgrad_is_pcgrad() -> None:
    for seed in range(10):
        gradients, coefficients = conflicting(20 + seed, 2, log_scale=2.0), simplex(seed, 2)
        first, second = gradients
        product = first @ second
        assert product < 0
        expected = coefficients[0] * (first - product / (second @ second) * second)
        expected += coefficients[1] * (second - product / (first @ first) * first)
        scale = float((coefficients * gradients.norm(dim=1)).sum())
        for method in ("upgrad", "pcgrad"):
            combined = combine(gradients, coefficients, method=method)
            assert float((combined - expected).norm()) <= 1e-10 * scale


# PCGrad.


def test_pcgrad_projects_in_turn_as_published() -> None:
    gradients, coefficients = conflicting(30, 4), simplex(30, 4)
    orders = generator(31)
    expected = torch.zeros(60, dtype=torch.float64)
    for index in range(4):
        others = [other for other in range(4) if other != index]
        row = coefficients[index] * gradients[index]
        for position in torch.randperm(3, generator=orders).tolist():
            other = gradients[others[position]]
            row = row - torch.clamp(row @ other, max=0.0) / (other @ other) * other
        expected += row
    combined = combine(gradients, coefficients, method="pcgrad", generator=generator(31))
    torch.testing.assert_close(combined, expected, rtol=1e-10, atol=1e-12)


def test_the_generator_fixes_the_order_of_pcgrad_and_the_order_matters() -> None:
    gradients, coefficients = conflicting(32, 5), simplex(32, 5)

    def with_seed(seed: int) -> Tensor:
        return combine(gradients, coefficients, method="pcgrad", generator=generator(seed))

    assert torch.equal(with_seed(1), with_seed(1))
    assert not torch.allclose(with_seed(1), with_seed(2))
    before = torch.get_rng_state()
    in_row_order = combine(gradients, coefficients, method="pcgrad")
    assert torch.equal(in_row_order, combine(gradients, coefficients, method="pcgrad"))
    assert torch.equal(before, torch.get_rng_state())


def test_pcgrad_can_leave_conflicts_that_upgrad_does_not() -> None:
    left = 0
    for seed in range(10):
        gradients, coefficients = conflicting(40 + seed, 5), simplex(seed, 5)
        combined = combine(gradients, coefficients, method="pcgrad", generator=generator(seed))
        left += worst_conflict(gradients, coefficients, combined) < -1e-6
    assert left > 0


# Plans.


def test_the_conflict_matrix_holds_the_cosines_whatever_the_scales() -> None:
    gradients = conflicting(33, 4, log_scale=4.0)
    gradients[2] = 0.0
    plan = plan_surgery(gradients, method="none")
    unit = torch.nn.functional.normalize(gradients, dim=1)
    np.testing.assert_allclose(plan.cosines_NN, (unit @ unit.T).numpy(), atol=1e-12)
    np.testing.assert_allclose(plan.norms_N, gradients.norm(dim=1).numpy(), rtol=1e-12)
    assert plan.conflicts == int((np.triu(plan.cosines_NN, 1) < 0).sum()) > 0


@pytest.mark.parametrize("method", ["none", "upgrad", "pcgrad"])
def test_a_plan_serves_any_coefficients(method: surgery.Method) -> None:
    gradients = conflicting(34, 5, log_scale=1.0)
    plan = plan_surgery(gradients, method=method, generator=generator(0))
    for seed in range(3):
        coefficients = simplex(seed, 5)
        applied = weighted_sum(gradients, plan.factors(coefficients.numpy()))
        assert torch.equal(applied, combine(gradients, coefficients, method=method, generator=generator(0)))


def test_a_plan_without_conflict_returns_the_coefficients() -> None:
    gradients = torch.rand(3, 8, generator=generator(35), dtype=torch.float64)
    plan = plan_surgery(gradients, method="upgrad")
    assert plan.conflicts == 0
    assert np.array_equal(plan.projections_NN, np.eye(3))
    coefficients = simplex(35, 3).numpy()
    assert np.array_equal(plan.factors(coefficients), coefficients)
    assert not plan.is_stationary(coefficients)
    assert plan.is_stationary(np.zeros(3))


def test_teachers_that_cancel_are_reported_as_stationary() -> None:
    rows = torch.tensor([[1.0, 2.0], [-3.0, -6.0]], dtype=torch.float64)
    coefficients = np.array([0.5, 0.5])
    plan = plan_surgery(rows, method="upgrad")
    assert plan.is_stationary(coefficients)
    assert not plan.factors(coefficients).any()
    assert plan.conflicts == 1
    # Without surgery the longer one wins, and the plain sum of the two is a step.
    assert not plan_surgery(rows, method="none").is_stationary(coefficients)


# Degenerate input.

DEGENERATE: dict[str, tuple[list[list[float]], list[float]]] = {
    "one teacher": ([[1.0, -2.0]], [1.0, -2.0]),
    "all zero": ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
    "one zero": ([[1.0, 0.0], [0.0, 0.0]], [0.5, 0.0]),
    "duplicates": ([[1.0, 2.0], [1.0, 2.0]], [1.0, 2.0]),
    "opposites": ([[1.0, 2.0], [-1.0, -2.0]], [0.0, 0.0]),
    "duplicates and an opposite": ([[1.0, 2.0], [1.0, 2.0], [-3.0, -6.0]], [0.0, 0.0]),
    "opposites of very different size": ([[1e20, 0.0], [-1e-20, 0.0]], [0.0, 0.0]),
}


@pytest.mark.parametrize("method", ["upgrad", "pcgrad"])
@pytest.mark.parametrize(("rows", "expected"), DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_gradients_have_exact_answers(
    method: surgery.Method, rows: list[list[float]], expected: list[float]
) -> None:
    gradients = torch.tensor(rows, dtype=torch.float64)
    coefficients = torch.full((len(rows),), 1.0 / len(rows), dtype=torch.float64)
    assert combine(gradients, coefficients, method=method).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("method", ["sum", "upgrad", "pcgrad"])
@pytest.mark.parametrize("scale", [1e-20, 1e20, 1e-300, 1e200])
def test_extreme_scales_stay_finite_and_proportional(method: surgery.Method, scale: float) -> None:
    gradients, coefficients = conflicting(50, 4), simplex(50, 4)
    plain = combine(gradients, coefficients, method=method)
    scaled = combine(gradients * scale, coefficients, method=method)
    torch.testing.assert_close(scaled / scale, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_extreme_scales_stay_finite_in_float32(scale: float) -> None:
    gradients, coefficients = (conflicting(51, 4) * scale).float(), simplex(51, 4)
    combined = combine(gradients, coefficients, method="upgrad")
    assert combined.dtype == torch.float32
    assert bool(torch.isfinite(combined).all())
    assert worst_conflict(gradients.double(), coefficients, combined.double()) >= -1e-6  # one float32 rounding of d


def test_the_result_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, coefficients = conflicting(52, 4), simplex(52, 4)
    whole = combine(gradients, coefficients, method="upgrad")
    monkeypatch.setattr(surgery, "COLUMNS_PER_CHUNK", 7)
    torch.testing.assert_close(combine(gradients, coefficients, method="upgrad"), whole, rtol=1e-12, atol=1e-12)


def test_duplicates_opposites_zeros_and_any_scale_together_conflict_with_nobody() -> None:
    for seed in range(5):
        base = torch.randn(3, 20, generator=generator(seed), dtype=torch.float64)
        zero = torch.zeros(1, 20, dtype=torch.float64)
        gradients = torch.cat([base, base, -base[:1], zero, -1e-20 * base[1:2], 1e20 * base[2:]])
        coefficients = simplex(seed, len(gradients))
        combined = combine(gradients, coefficients, method="upgrad")
        alive = gradients.norm(dim=1) > 0.0
        assert worst_conflict(gradients[alive], coefficients[alive], combined) >= -1e-8
        assert bool(torch.isfinite(combine(gradients, coefficients, method="pcgrad")).all())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *found])
        return result


@pytest.mark.parametrize("method", ["upgrad", "pcgrad"])
def test_the_gradients_of_all_teachers_are_never_copied(
    method: surgery.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surgery, "COLUMNS_PER_CHUNK", 10)
    rows, coefficients = conflicting(55, 4).unbind(), simplex(55, 4).numpy()
    with Largest() as largest:
        plan = plan_scaled_surgery(rows, [1.0, 2.0, 3.0, 4.0], method=method)
        weighted_sum(rows, plan.factors(coefficients))
    assert largest.elements == 60  # the combined gradient


def test_the_inputs_are_left_as_they_are_and_need_no_graph() -> None:
    gradients = conflicting(53, 3).requires_grad_()
    before = gradients.detach().clone()
    combined = combine(gradients, simplex(53, 3).requires_grad_(), method="upgrad")
    assert not combined.requires_grad
    assert torch.equal(gradients.detach(), before)


def test_the_solver_gives_up_with_a_feasible_point() -> None:
    gradients = conflicting(54, 8)
    unit = (gradients / gradients.norm(dim=1, keepdim=True)).numpy()
    cosines = unit @ unit.T
    unfinished = nonnegative_minimiser(cosines, cosines[0], max_iterations=1)
    assert (unfinished >= 0.0).all()
    assert np.count_nonzero(unfinished) == 1
    finished = nonnegative_minimiser(cosines, cosines[0])

    def objective(y: np.ndarray) -> float:
        return float(y @ cosines @ y / 2 + cosines[0] @ y)

    assert objective(finished) < objective(unfinished) < 0.0


# Refusals.


def test_what_is_no_gradient_problem_is_refused() -> None:
    gradients, coefficients = conflicting(60, 3), simplex(60, 3)
    with pytest.raises(ValueError, match="method: expected one of"):
        combine(gradients, coefficients, method="mgda")  # type: ignore[arg-type]
    for wrong in (gradients[0], gradients[:0], gradients[:, :0], gradients.long()):
        with pytest.raises(ValueError, match="gradients: expected a float tensor"):
            combine(wrong, coefficients, method="sum")
    with pytest.raises(ValueError, match="coefficients: expected 3, one per teacher"):
        combine(gradients, coefficients[:2], method="sum")
    for number in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="coefficients: expected finite numbers"):
            combine(gradients, torch.tensor([0.5, number, 0.5]), method="sum")
    for number in (float("nan"), float("inf")):
        broken = gradients.clone()
        broken[1, 5] = number
        with pytest.raises(ValueError, match=r"nan or inf in rows \[1\]"):
            combine(broken, coefficients, method="upgrad")
