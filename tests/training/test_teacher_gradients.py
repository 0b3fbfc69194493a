"""Gradients of one step, teacher by teacher: against `combine`, over micro-batches, and on the steps between two surgeries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nexus.training.loss import GradientSurgeryLoss, SurgeryLoss
from nexus.training.surgery import combine
from nexus.training.teacher_gradients import SurgerySteps, TeacherGradients, backward_in_parts

TEACHERS = ("audio", "code")


class Case:
    """A shared weight that two teachers pull in conflicting directions, a bias that one of them sees, and a map of each."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(11)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))

        self.shared, self.bias, self.unused = parameter(2, 3), parameter(4), parameter(2)
        self.maps = {teacher: parameter(3) for teacher in TEACHERS}
        self.pull = torch.randn(2, 3, generator=generator, dtype=torch.float64).to(dtype)
        self.loss = GradientSurgeryLoss(
            {"audio": 1.0, "code": 3.0}, ramp_steps=0, baselines={"audio": 2.0, "code": 4.0}
        )

    @property
    def subset(self) -> list[nn.Parameter]:
        return [self.shared, self.bias, self.unused]

    @property
    def others(self) -> list[nn.Parameter]:
        return list(self.maps.values())

    def losses(self) -> dict[str, Tensor]:
        return {
            "audio": (self.shared * self.pull).sum() + self.maps["audio"].square().sum() + 8.0,
            "code": -(self.shared * self.pull).sum() * 0.5 + self.bias.square().sum() + self.maps["code"].sum() + 20.0,
        }

    def gold(self) -> Tensor:
        return self.shared.square().sum() * 0.1

    def rows(self) -> Tensor:
        """Gradients of the ratios [N, P] on the subset, by autograd."""
        rows = []
        for teacher, loss in self.losses().items():
            gradients = torch.autograd.grad(
                loss / self.loss.baselines[teacher], self.subset, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        return torch.stack(rows)

    def written(self) -> Tensor:
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.subset])

    def collected(self, parts: int = 1) -> TeacherGradients:
        gradients = TeacherGradients(self.subset, self.others)
        for _ in range(parts):
            for teacher, loss in self.losses().items():
                gradients.add(teacher, loss / parts)
            gradients.add_plain(self.gold() / parts)
        return gradients


@pytest.mark.parametrize("parts", [1, 3])
def test_without_surgery_the_gradient_is_that_of_the_combined_loss(parts: int) -> None:
    case = Case()
    result = case.loss(case.losses())
    case.collected(parts).write(result, case.loss.baselines, None)
    written = [None if p.grad is None else p.grad.clone() for p in (*case.subset, *case.others)]
    for parameter in (*case.subset, *case.others):
        parameter.grad = None
    (result.loss + case.gold()).backward()
    for parameter, found in zip((*case.subset, *case.others), written, strict=True):
        if parameter is case.unused:
            assert found is None
            assert parameter.grad is None
        else:
            torch.testing.assert_close(found, parameter.grad)


@pytest.mark.parametrize("method", ["upgrad", "pcgrad"])
def test_surgery_writes_the_combined_gradient_on_its_subset_beside_the_labelled_rows_and_the_plain_sum_elsewhere(
    method,
) -> None:
    case = Case()
    result = case.loss(case.losses())
    outcome = case.collected().write(result, case.loss.baselines, SurgerySteps(method, every=1, seed=0))
    rows, written = case.rows(), case.written()
    assert outcome is not None
    assert bool((rows @ rows.T < 0).any())
    coefficients = torch.tensor(list(result.coefficients.values()), dtype=torch.float64)
    (gold,) = torch.autograd.grad(case.gold(), [case.shared])
    expected = combine(rows, coefficients, method=method)
    expected[:6] += gold.reshape(-1)
    torch.testing.assert_close(written, expected)
    torch.testing.assert_close(
        case.maps["audio"].grad, result.coefficients["audio"] / 2.0 * 2.0 * case.maps["audio"].detach()
    )
    assert outcome.teachers == TEACHERS
    assert outcome.plan.conflicts == 1
    cosine = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0).item()
    assert outcome.cosines["audio"]["code"] == pytest.approx(cosine)
    assert not outcome.pareto_stationary


def test_upgrad_conflicts_with_no_teacher_after_accumulation() -> None:
    case = Case()
    gradients = TeacherGradients(case.subset, case.others)
    for _ in range(4):
        for teacher, loss in case.losses().items():
            gradients.add(teacher, loss / 4)
    gradients.write(case.loss(case.losses()), case.loss.baselines, SurgerySteps("upgrad", every=1, seed=0))
    assert float((case.rows() @ case.written()).min()) >= -1e-8


def test_where_nothing_conflicts_surgery_is_the_identity() -> None:
    plain, operated = Case(), Case()
    for case, surgery in ((plain, None), (operated, SurgerySteps("upgrad", every=1, seed=0))):
        gradients = TeacherGradients(case.subset, case.others)
        agreeing = {"audio": case.losses()["audio"], "code": (case.shared * case.pull).sum() * 3.0 + 20.0}
        for teacher, loss in agreeing.items():
            gradients.add(teacher, loss)
        gradients.write(case.loss(agreeing), case.loss.baselines, surgery)
    torch.testing.assert_close(operated.written(), plain.written(), rtol=1e-12, atol=0.0)


def test_the_steps_between_weigh_the_losses_as_the_plan_says_in_one_backward_pass() -> None:
    case = Case()
    steps = SurgerySteps("upgrad", every=3, seed=0)
    result = case.loss(case.losses())
    assert steps.due(TEACHERS)
    outcome = case.collected().write(result, case.loss.baselines, steps)
    expected = [None if p.grad is None else p.grad.clone() for p in (*case.subset, *case.others)]
    assert outcome is not None
    for _ in range(2):
        assert not steps.due(TEACHERS)
        for parameter in (*case.subset, *case.others):
            parameter.grad = None
        losses = case.losses()
        result = case.loss(losses)
        weighted = steps.weighted(losses, result, case.loss.baselines)
        assert weighted is not None
        gold = case.gold()
        backward_in_parts(weighted + gold, result.loss + gold, shared=case.subset, others=case.others)
        # The same gradients and coefficients as when the plan was found: the same result.
        for parameter, found in zip((*case.subset, *case.others), expected, strict=True):
            torch.testing.assert_close(parameter.grad, found)
    assert steps.due(TEACHERS)


def test_a_plan_without_conflict_leaves_the_steps_between_as_they_are() -> None:
    steps = SurgerySteps("upgrad", every=3, seed=0)
    result = SurgeryLoss(torch.zeros(()), {"audio": 0.5, "code": 0.5}, {}, ())
    steps.outcome(result, dict(zip(TEACHERS, torch.eye(2), strict=True)), dict.fromkeys(TEACHERS, 1.0))
    losses = {teacher: torch.ones((), requires_grad=True) for teacher in TEACHERS}
    assert steps.weighted(losses, result, dict.fromkeys(TEACHERS, 1.0)) is None


def test_a_plan_is_of_the_ratios_and_not_of_the_losses() -> None:
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    baselines = {"a": 1e-3, "b": 1.0, "c": 40.0}
    result = SurgeryLoss(torch.zeros(()), {"a": 0.2, "b": 0.3, "c": 0.5}, {}, ())
    steps = SurgerySteps("upgrad", every=1, seed=0)
    outcome = steps.outcome(result, dict(zip("abc", rows, strict=True)), baselines)
    assert outcome is not None
    ratios = rows / torch.tensor([1e-3, 1.0, 40.0], dtype=torch.float64)[:, None]
    assert bool((ratios @ ratios.T < 0.0).any())
    combined = torch.tensor(list(outcome.factors.values()), dtype=torch.float64) @ ratios
    coefficients = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    expected = combine(ratios, coefficients, method="upgrad")
    torch.testing.assert_close(combined, expected, rtol=1e-12, atol=1e-12)


def test_other_teachers_make_surgery_due() -> None:
    steps = SurgerySteps("upgrad", every=10, seed=0)
    result = SurgeryLoss(torch.zeros(()), {"audio": 0.5, "code": 0.5}, {}, ())
    steps.outcome(result, dict(zip(TEACHERS, torch.eye(2), strict=True)), dict.fromkeys(TEACHERS, 1.0))
    assert not steps.due(TEACHERS)
    assert steps.due(("audio",))


def test_between_two_surgeries_accumulated_steps_use_the_plan_too() -> None:
    case = Case()
    steps = SurgerySteps("upgrad", every=2, seed=0)
    first = case.collected(2).write(case.loss(case.losses()), case.loss.baselines, steps)
    again = case.collected(2).write(case.loss(case.losses()), case.loss.baselines, steps)
    assert first is not None
    assert again is not None
    assert again.plan is first.plan
    third = case.collected(2).write(case.loss(case.losses()), case.loss.baselines, steps)
    assert third is not None
    assert third.plan is not first.plan


def test_excluded_teachers_are_left_out_and_the_generator_is_used() -> None:
    case = Case()
    losses = {**case.losses(), "code": case.shared.sum() * math.nan}
    gradients = TeacherGradients(case.subset, case.others)
    for teacher, loss in losses.items():
        gradients.add(teacher, loss)
    result = case.loss(losses)
    assert result.excluded == ("code",)
    outcome = gradients.write(result, case.loss.baselines, SurgerySteps("pcgrad", every=1, seed=0))
    assert outcome is not None
    assert outcome.teachers == ("audio",)
    assert bool(torch.isfinite(case.written()).all())
    assert case.maps["code"].grad is None


def test_a_teacher_whose_gradient_is_zero_is_not_conflicted_with_and_has_no_cosine() -> None:
    case = Case()
    losses = {**case.losses(), "code": case.shared.sum() * 0.0 + 1.0}
    gradients = TeacherGradients(case.subset, case.others)
    for teacher, loss in losses.items():
        gradients.add(teacher, loss)
    result = case.loss(losses)
    outcome = gradients.write(result, case.loss.baselines, SurgerySteps("upgrad", every=1, seed=0))
    assert outcome is not None
    assert outcome.cosines["audio"]["code"] == 0.0
    torch.testing.assert_close(case.shared.grad, result.coefficients["audio"] / 2.0 * case.pull)


def test_a_gradient_that_is_not_finite_is_left_for_the_recovery_step_and_makes_surgery_due() -> None:
    case = Case()
    steps = SurgerySteps("upgrad", every=5, seed=0)
    case.collected().write(case.loss(case.losses()), case.loss.baselines, steps)
    assert not steps.due(TEACHERS)
    # The norm of zeros: a finite loss whose gradient is not.
    losses = {**case.losses(), "code": (case.shared - case.shared.detach()).square().sum().sqrt() + 1.0}
    gradients = TeacherGradients(case.subset, case.others)
    for teacher, loss in losses.items():
        gradients.add(teacher, loss)
    assert gradients.write(case.loss(losses), case.loss.baselines, steps) is None
    assert not bool(torch.isfinite(case.written()).all())
    assert steps.due(TEACHERS)


def test_teachers_that_cancel_take_no_step_and_are_reported() -> None:
    weight = nn.Parameter(torch.ones(3))
    losses = {"audio": weight.sum(), "code": 8.0 - weight.sum()}
    loss = GradientSurgeryLoss(
        {"audio": 1.0, "code": 1.0}, ramp_steps=0, penalty=0.0, baselines={"audio": 1.0, "code": 1.0}
    )
    gradients = TeacherGradients([weight], [])
    for teacher, value in losses.items():
        gradients.add(teacher, value)
    outcome = gradients.write(loss(losses), loss.baselines, SurgerySteps("upgrad", every=1, seed=0))
    assert outcome is not None
    assert outcome.pareto_stationary
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_step_without_teachers_has_the_gradient_of_the_labelled_rows_alone() -> None:
    case = Case()
    gradients = TeacherGradients([], case.subset)
    gradients.add_plain(case.gold())
    assert gradients.write(None, {}, SurgerySteps("upgrad", every=1, seed=0)) is None
    torch.testing.assert_close(case.shared.grad, 0.2 * case.shared.detach())


def test_with_an_empty_subset_everything_is_the_plain_sum() -> None:
    case = Case()
    gradients = TeacherGradients([], case.subset)
    losses = case.losses()
    for teacher, loss in losses.items():
        gradients.add(teacher, loss)
    result = case.loss(losses)
    gradients.write(result, case.loss.baselines, None)
    torch.testing.assert_close(
        case.shared.grad,
        (result.coefficients["audio"] / 2.0 - result.coefficients["code"] / 4.0 * 0.5) * case.pull,
    )


def test_parts_of_a_backward_pass_need_no_other_parameters() -> None:
    case = Case()
    loss = case.losses()["audio"]
    backward_in_parts(loss, loss, shared=[case.shared], others=[])
    torch.testing.assert_close(case.shared.grad, case.pull)


def test_half_precision_parameters_get_half_precision_gradients_added_in_float32() -> None:
    case = Case(torch.bfloat16)
    gradients = TeacherGradients(case.subset, case.others)
    for _ in range(300):
        gradients.add("audio", (case.shared * 0.01).float().sum())
    result = case.loss({"audio": torch.tensor(3.0)})
    gradients.write(result, {"audio": 1.0}, None)
    assert case.shared.grad is not None
    assert case.shared.grad.dtype == torch.bfloat16
    # Added in bfloat16, 300 times 0.01 would stop growing near 2.5.
    torch.testing.assert_close(case.shared.grad.float(), torch.full((2, 3), 3.0), rtol=0.01, atol=0.0)


def test_a_restored_state_continues_with_the_same_plan_and_order() -> None:
    random = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, turned = (dict(zip("abcd", sign * random, strict=True)) for sign in (1.0, -1.0))
    baselines = dict.fromkeys("abcd", 2.0)
    result = SurgeryLoss(torch.zeros(()), dict.fromkeys("abcd", 0.25), {}, ())
    first = SurgerySteps("pcgrad", every=2, seed=0)
    empty = first.state_dict()
    first.outcome(result, rows, baselines)
    state = first.state_dict()
    second = SurgerySteps("pcgrad", every=2, seed=5)
    second.load_state_dict(state)
    for _ in range(3):  # the first reuses the plan, the second draws a new order
        one, two = (steps.outcome(result, turned, baselines) for steps in (first, second))
        assert one is not None
        assert two is not None
        assert one.factors == two.factors
    second.load_state_dict(empty)
    assert second.due(tuple("abcd"))
