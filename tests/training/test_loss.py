"""The combined loss against its formulas, its guards, and what it must not let through."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from nexus.training.loss import (
    BASELINE_DECAY,
    BASELINE_FLOOR,
    GradientSurgeryLoss,
    Mode,
    SurgeryLoss,
)

NAMES = ("audio", "code", "reasoning", "vision")

both_modes = pytest.mark.parametrize("mode", ["variance", "std"])


def settled(importance: dict[str, float], *, mode: Mode = "variance", penalty: float = 1.0) -> GradientSurgeryLoss:
    """At full penalty, with every baseline 1, so that ratios are losses."""
    return GradientSurgeryLoss(
        importance, mode=mode, penalty=penalty, ramp_steps=0, baselines=dict.fromkeys(importance, 1.0)
    )


def numbers(*values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in zip(NAMES, values, strict=False)}


def random_case(seed: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 5))
    importance = dict(zip(NAMES[:count], (generator.random(count) + 0.01).tolist(), strict=True))
    return importance, numbers(*np.exp(generator.standard_normal(count) * 2.0).tolist())


# Formulas.


@pytest.mark.parametrize("penalty", [0.0, 0.05])
@both_modes
def test_value_and_coefficients_are_those_of_the_definition(mode: Mode, penalty: float) -> None:
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    ratios = np.array([0.8, 1.1, 0.9, 1.3])
    result = settled(dict(zip(NAMES, weights * 10, strict=True)), mode=mode, penalty=penalty)(numbers(*ratios))
    mu = weights @ ratios
    variance = weights @ (ratios - mu) ** 2
    if mode == "variance":
        expected, slope = mu + penalty * variance, 2 * penalty
    else:
        expected, slope = mu + penalty * math.sqrt(variance), penalty / math.sqrt(variance)
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
    assert list(result.coefficients) == list(NAMES)
    assert list(result.coefficients.values()) == pytest.approx(weights * (1 + slope * (ratios - mu)), rel=1e-9)
    assert list(result.ratios.values()) == pytest.approx(ratios)
    assert result.excluded == ()


@both_modes
def test_equal_ratios_have_no_penalty(mode: Mode) -> None:
    for seed in range(50):
        importance, _ = random_case(seed)
        result = settled(importance, mode=mode)(numbers(*[0.7] * len(importance)))
        total = sum(importance.values())
        assert result.loss.item() == pytest.approx(0.7, abs=2e-8)
        for name, coefficient in result.coefficients.items():
            assert coefficient == pytest.approx(importance[name] / total, rel=1e-12)


@both_modes
@pytest.mark.parametrize("penalty", [0.0, 0.3, 1.0, 10.0, 1e6])
def test_coefficients_sum_to_one_and_are_never_negative(mode: Mode, penalty: float) -> None:
    for seed in range(200):
        importance, losses = random_case(seed)
        coefficients = settled(importance, mode=mode, penalty=penalty)(losses).coefficients
        assert math.fsum(coefficients.values()) == pytest.approx(1.0, abs=1e-12)
        assert min(coefficients.values()) >= 0.0
        # Where ratios differ by rounding alone, so does what they are centred by.
        close = {name: 0.7 * (1.0 + 1e-16 * place) + 1e-17 * loss for place, (name, loss) in enumerate(losses.items())}
        coefficients = settled(importance, mode=mode, penalty=penalty)(close).coefficients
        assert math.fsum(coefficients.values()) == pytest.approx(1.0, abs=1e-12)


def test_without_the_guard_the_best_fitted_teacher_would_be_pushed_away() -> None:
    loss = settled({"audio": 1.0, "code": 1.0}, penalty=10.0)
    result = loss(numbers(0.1, 1.9))
    assert 0.5 * (1 + 2 * 10.0 * (0.1 - 1.0)) < 0.0  # the coefficient that the formula alone would give
    assert 0.0 <= result.coefficients["audio"] < 1e-6
    assert result.coefficients["code"] == pytest.approx(1.0)


@both_modes
@pytest.mark.parametrize("penalty", [0.2, 10.0])
def test_autograd_of_the_loss_is_the_weighted_sum_of_the_gradients_of_the_ratios(mode: Mode, penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    centres = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    losses = {name: (point - centre).square().sum() for name, centre in zip(NAMES, centres, strict=False)}
    baselines = {"audio": 2.0, "code": 5.0, "reasoning": 0.5}
    loss = GradientSurgeryLoss(
        {"audio": 1.0, "code": 2.0, "reasoning": 3.0}, mode=mode, penalty=penalty, ramp_steps=0, baselines=baselines
    )
    result = loss(losses)
    (gradient,) = torch.autograd.grad(result.loss, point, retain_graph=True)
    expected = torch.zeros(6, dtype=torch.float64)
    for name, coefficient in result.coefficients.items():
        (part,) = torch.autograd.grad(losses[name] / baselines[name], point, retain_graph=True)
        expected += coefficient * part
    assert float((gradient - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    assert float(gradient.norm()) > 0.0


def test_the_std_mode_is_the_worst_case_over_a_chi_square_ball() -> None:
    weights, ratios, penalty = np.array([0.2, 0.3, 0.5]), np.array([0.6, 1.0, 1.5]), 0.3
    result = settled(dict(zip(NAMES, weights, strict=False)), mode="std", penalty=penalty)(numbers(*ratios))
    worst = minimize(
        lambda q: -float(q @ ratios),
        weights,
        bounds=[(0.0, 1.0)] * 3,
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1.0},
            {"type": "ineq", "fun": lambda q: penalty**2 - ((q - weights) ** 2 / weights).sum()},
        ],
        options={"ftol": 1e-14},
    )
    assert result.loss.item() == pytest.approx(-worst.fun, abs=1e-6)
    assert list(result.coefficients.values()) == pytest.approx(worst.x.tolist(), abs=1e-4)


@both_modes
@pytest.mark.parametrize("factors", [(1e-4, 7.0), (1e6, 0.3)])
def test_scaling_a_loss_with_its_baseline_changes_nothing(mode: Mode, factors: tuple[float, float]) -> None:
    importance = {"audio": 1.0, "code": 2.0}

    def combined(scales: tuple[float, float]) -> SurgeryLoss:
        baselines = {"audio": 2.0 * scales[0], "code": 3.0 * scales[1]}
        loss = GradientSurgeryLoss(importance, mode=mode, penalty=0.5, ramp_steps=0, baselines=baselines)
        return loss(numbers(1.0 * scales[0], 4.0 * scales[1]))

    plain, scaled = combined((1.0, 1.0)), combined(factors)
    assert scaled.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    assert scaled.coefficients == pytest.approx(plain.coefficients, rel=1e-12)


def test_one_teacher_is_its_own_ratio() -> None:
    for mode in ("variance", "std"):
        loss = GradientSurgeryLoss({"audio": 3.0}, mode=mode, penalty=5.0, ramp_steps=0, baselines={"audio": 4.0})
        result = loss(numbers(2.0))
        assert result.loss.item() == pytest.approx(0.5, abs=1e-7)
        assert result.coefficients == {"audio": 1.0}


def test_small_steps_lower_every_teachers_ratio() -> None:
    generator = torch.Generator().manual_seed(3)
    point = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    centres = 5.0 + torch.randn(3, 4, generator=generator, dtype=torch.float64)
    loss = settled(dict.fromkeys(NAMES[:3], 1.0))
    before: dict[str, float] = {}
    for _ in range(2):
        losses = {name: (point - centre).square().sum() for name, centre in zip(NAMES, centres, strict=False)}
        result = loss(losses)
        assert all(result.ratios[name] < before.get(name, math.inf) for name in result.ratios)
        before = result.ratios
        (gradient,) = torch.autograd.grad(result.loss, point)
        with torch.no_grad():
            point -= 1e-3 * gradient


def test_ratios_beyond_float32_squares_stay_finite() -> None:
    losses = {"audio": torch.tensor(1e25, requires_grad=True), "code": torch.tensor(1.0, requires_grad=True)}
    result = settled({"audio": 1.0, "code": 1.0})(losses)
    result.loss.backward()
    assert math.isfinite(result.loss.item())
    assert result.coefficients["audio"] == pytest.approx(1.0)
    assert losses["audio"].grad is not None
    assert losses["audio"].grad.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_loss_has_the_widest_dtype_and_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    losses = {"audio": torch.tensor([1.5], dtype=dtype), "code": torch.tensor(0.5, dtype=torch.bfloat16)}
    result = settled({"audio": 1.0, "code": 1.0})(losses)
    assert result.loss.dtype == expected
    assert result.loss.shape == ()


# Ramp and warm-up.


def test_the_penalty_rises_linearly_over_the_ramp() -> None:
    loss = GradientSurgeryLoss(
        {"audio": 1.0, "code": 1.0}, penalty=0.5, ramp_steps=5, baselines={"audio": 1.0, "code": 1.0}
    )
    values = [loss(numbers(0.5, 1.5)).loss.item() for _ in range(7)]
    # mu = 1, V = 0.25: the excess over 1 is lam / 4.
    assert values == pytest.approx([1 + 0.25 * 0.5 * share for share in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0)])


@pytest.mark.parametrize("ramp_steps", [0, 1])
def test_without_a_ramp_the_penalty_is_there_at_once(ramp_steps: int) -> None:
    loss = GradientSurgeryLoss(
        {"audio": 1.0, "code": 1.0}, penalty=0.5, ramp_steps=ramp_steps, baselines={"audio": 1.0, "code": 1.0}
    )
    assert loss(numbers(0.5, 1.5)).loss.item() == pytest.approx(1.125)


def test_the_baseline_is_a_bias_corrected_average_that_freezes_after_the_warm_up() -> None:
    loss = GradientSurgeryLoss({"audio": 1.0}, warmup_steps=3)
    seen = [4.0, 2.0, 1.0]
    for count in range(1, 4):
        assert loss.warming_up
        result = loss(numbers(seen[count - 1]))
        powers = [(1 - BASELINE_DECAY) * BASELINE_DECAY ** (count - 1 - i) for i in range(count)]
        expected = float(np.dot(powers, seen[:count])) / (1 - BASELINE_DECAY**count)
        assert loss.baselines["audio"] == pytest.approx(expected, rel=1e-12)
        assert result.ratios["audio"] == pytest.approx(seen[count - 1] / expected, rel=1e-12)
    assert not loss.warming_up
    frozen = loss.baselines["audio"]
    assert loss(numbers(100.0)).ratios["audio"] == pytest.approx(100.0 / frozen)
    assert loss.baselines["audio"] == frozen


def test_the_first_loss_is_its_own_baseline_even_without_a_warm_up() -> None:
    loss = GradientSurgeryLoss({"audio": 1.0}, warmup_steps=0)
    assert loss(numbers(5.0)).ratios["audio"] == pytest.approx(1.0)
    assert loss(numbers(10.0)).ratios["audio"] == pytest.approx(2.0)


def test_a_baseline_does_not_fall_below_its_floor() -> None:
    loss = GradientSurgeryLoss({"audio": 1.0}, warmup_steps=1)
    assert loss(numbers(1e-9)).ratios["audio"] == pytest.approx(1e-9 / BASELINE_FLOOR)


def test_given_baselines_are_used_as_they_are() -> None:
    loss = GradientSurgeryLoss({"audio": 1.0, "code": 1.0}, baselines={"audio": 8.0}, warmup_steps=5)
    result = loss(numbers(4.0, 3.0))
    assert result.ratios == pytest.approx({"audio": 0.5, "code": 1.0})
    assert loss.baselines["audio"] == 8.0
    assert loss.warming_up


# Absent and broken teachers.


@both_modes
def test_a_batch_without_a_teacher_equals_a_run_configured_without_it(mode: Mode) -> None:
    settings: dict[str, Any] = {"mode": mode, "penalty": 0.4, "ramp_steps": 4, "warmup_steps": 2}
    whole = GradientSurgeryLoss({"audio": 1.0, "code": 2.0, "reasoning": 5.0}, **settings)
    smaller = GradientSurgeryLoss({"audio": 1.0, "code": 2.0}, **settings)
    for step in range(6):
        losses = numbers(1.0 + 0.1 * step, 2.0 - 0.2 * step)
        left, right = whole(losses), smaller(losses)
        assert left.coefficients == right.coefficients
        assert left.ratios == right.ratios
        assert torch.equal(left.loss, right.loss)
    assert "reasoning" not in whole.baselines


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_excluded_and_reported_and_touches_nothing_else(broken: float) -> None:
    importance = {"audio": 1.0, "code": 2.0, "reasoning": 5.0}
    loss, clean = GradientSurgeryLoss(importance), GradientSurgeryLoss(importance)
    weight = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    losses = {"audio": weight * 2, "code": weight * broken, "reasoning": weight.square()}
    result = loss(losses)
    expected = clean({"audio": losses["audio"], "reasoning": losses["reasoning"]})
    assert result.excluded == ("code",)
    assert result.coefficients == expected.coefficients
    assert torch.equal(result.loss, expected.loss)
    result.loss.backward()
    assert weight.grad is not None
    assert math.isfinite(weight.grad.item())
    assert loss.state_dict() == clean.state_dict()


def test_when_every_teacher_is_broken_the_loss_is_not_finite() -> None:
    loss = GradientSurgeryLoss({"audio": 1.0, "code": 1.0})
    result = loss(numbers(math.nan, math.inf))
    assert not math.isfinite(result.loss.item())
    assert result.excluded == ("audio", "code")
    assert result.coefficients == {}
    assert result.ratios == {}
    assert loss.baselines == {}


# State.


def test_a_restored_loss_continues_bit_for_bit() -> None:
    def fresh() -> GradientSurgeryLoss:
        return GradientSurgeryLoss({"audio": 1.0, "code": 2.0}, ramp_steps=10, warmup_steps=4)

    original = fresh()
    for step in range(3):
        original(numbers(1.0 + step, 2.0))
    state = copy.deepcopy(original.state_dict())
    restored = fresh()
    restored.load_state_dict(state)
    for step in range(5):
        left, right = original(numbers(2.0 - 0.1 * step, 1.0)), restored(numbers(2.0 - 0.1 * step, 1.0))
        assert torch.equal(left.loss, right.loss)
        assert left.coefficients == right.coefficients
    # The state that was handed out is not moved by later steps: a rollback can use it twice.
    assert state == {**state, "calls": 3}
    again = fresh()
    again.load_state_dict(state)
    assert again.state_dict() == state


def test_a_state_of_other_teachers_is_refused() -> None:
    loss = GradientSurgeryLoss({"audio": 1.0})
    loss(numbers(1.0))
    with pytest.raises(ValueError, match="teachers: expected some of"):
        GradientSurgeryLoss({"code": 1.0}).load_state_dict(loss.state_dict())


# Refusals.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance": {}}, "at least one teacher"),
        ({"importance": {"audio": 0.0}}, "importance of audio"),
        ({"importance": {"audio": math.nan}}, "importance of audio"),
        ({"importance": {"audio": -1.0}}, "importance of audio"),
        ({"mode": "max"}, "mode: expected"),
        ({"penalty": -1.0}, "penalty: expected"),
        ({"penalty": math.inf}, "penalty: expected"),
        ({"ramp_steps": -1}, "ramp_steps and warmup_steps"),
        ({"warmup_steps": -1}, "ramp_steps and warmup_steps"),
        ({"baselines": {"video": 1.0}}, "teachers: expected some of"),
        ({"baselines": {"audio": 0.0}}, "baseline of audio"),
        ({"baselines": {"audio": math.inf}}, "baseline of audio"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"importance": {"audio": 1.0}, **settings}
    importance = arguments.pop("importance")
    with pytest.raises(ValueError, match=message):
        GradientSurgeryLoss(importance, **arguments)


def test_losses_that_cannot_be_combined_are_refused() -> None:
    loss = GradientSurgeryLoss({"audio": 1.0})
    with pytest.raises(ValueError, match="found none"):
        loss({})
    with pytest.raises(ValueError, match=r"found \['video'\]"):
        loss({"video": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="loss of audio: expected one number"):
        loss({"audio": torch.ones(2)})


# Teachers that are ramped in.


@both_modes
def test_a_share_scales_a_teachers_importance(mode: Mode) -> None:
    losses = numbers(2.0, 3.0)
    ramped = settled({"audio": 1.0, "code": 2.0}, mode=mode, penalty=0.1)(losses, shares={"audio": 1.0, "code": 0.25})
    fixed = settled({"audio": 1.0, "code": 0.5}, mode=mode, penalty=0.1)(losses)
    assert ramped.coefficients == fixed.coefficients
    assert torch.equal(ramped.loss, fixed.loss)
