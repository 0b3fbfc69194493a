"""The gradient of one optimizer step out of the gradients of its teachers: plain, added up over micro-batches, or operated on.

Three ways to the same kind of result, chosen by what a step needs:

    one backward pass   of the combined loss: no surgery, one micro-batch. Nothing here is used.
    reused surgery      one backward pass too, of sum_t f_t r_t, whose weights f_t an earlier surgery fixed (`SurgerySteps.weighted`)
    one per teacher     each teacher's loss is differentiated by itself and its graph is freed (`TeacherGradients`). Teachers that
                        have rows of their own share no graph, so the passes together cost what one over all of them costs; what it
                        takes is one row of gradients per teacher in memory.

The last is what surgery is found with, and what makes accumulation over micro-batches exact: the weights c_t of `GradientSurgeryLoss`
are not linear in the losses, so they are known only after the last micro-batch, when the first ones' graphs are gone.

Shape letters: N teachers, P parameters of the surgery subset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from nexus.training.loss import SurgeryLoss
from nexus.training.snapshot import all_finite
from nexus.training.surgery import SurgeryPlan, plan_scaled_surgery, weighted_sum

SurgeryMethod = Literal["none", "upgrad", "pcgrad"]


@dataclass(frozen=True)
class SurgeryOutcome:
    """What surgery found on one step, for the log and for the steps until it is due again."""

    teachers: tuple[str, ...]
    """The teachers that took part, sorted; the order of every array."""
    plan: SurgeryPlan
    factors: dict[str, float]
    """The weight of each teacher's own gradient grad r_t in what was written; the coefficients where nothing conflicted."""
    pareto_stationary: bool
    """The teachers cancel: the step on these parameters is 0."""

    @property
    def cosines(self) -> dict[str, dict[str, float]]:
        """The conflict matrix by teacher; a teacher whose gradient is 0 has cosine 0 with all."""
        rows = self.plan.cosines_NN.tolist()
        return {
            teacher: dict(zip(self.teachers, row, strict=True))
            for teacher, row in zip(self.teachers, rows, strict=True)
        }


class SurgeryState(TypedDict):
    """What a rollback and a resume restore of `SurgerySteps`."""

    generator: Tensor
    teachers: list[str]
    """Of the plan in use; empty without one."""
    norms_N: Tensor
    cosines_NN: Tensor
    projections_NN: Tensor
    age: int


class TeacherGradients:
    """Sums of each teacher's gradients of its own loss, micro-batch after micro-batch.

    Args:
        shared: parameters whose gradients surgery combines; may be empty.
        others: parameters that always get the plain weighted sum.
    """

    def __init__(self, shared: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> None:
        self._shared, self._others = list(shared), list(others)
        self._sizes = [parameter.numel() for parameter in self._shared]
        self._rows: dict[str, Tensor] = {}
        self._reached: dict[str, set[int]] = {}
        """Per teacher, the places of the shared parameters that its loss depends on; the others keep no gradient at all."""
        self._own: dict[str, list[Tensor | None]] = {}
        self._plain: list[Tensor | None] = [None] * (len(self._shared) + len(self._others))

    def add(self, teacher: str, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's share of l_t, and free its graph."""
        gradients = self._gradients(loss)
        found = gradients[: len(self._shared)]
        if teacher not in self._rows:
            dtype = torch.float32
            for parameter in self._shared:
                dtype = torch.promote_types(dtype, parameter.dtype)
            device = self._shared[0].device if self._shared else loss.device
            self._rows[teacher] = torch.zeros(sum(self._sizes), dtype=dtype, device=device)
            self._own[teacher] = [None] * len(self._others)
            self._reached[teacher] = set()
        for place, (part_P, gradient) in enumerate(zip(self._rows[teacher].split(self._sizes), found, strict=True)):
            if gradient is not None:
                part_P += gradient.reshape(-1)
                self._reached[teacher].add(place)
        _accumulate(self._own[teacher], gradients[len(self._shared) :])

    def add_plain(self, loss: Tensor) -> None:
        """Add the gradient of a term that no teacher gave, such as the labelled rows'; surgery leaves it alone."""
        _accumulate(self._plain, self._gradients(loss))

    def write(
        self, result: SurgeryLoss | None, baselines: Mapping[str, float], surgery: SurgerySteps | None
    ) -> SurgeryOutcome | None:
        """Set `.grad` of all parameters to the combined gradient of the step.

        Args:
            result: what `GradientSurgeryLoss` made of the whole step's losses; teachers that it excluded are left out; None
                where the step had no teacher.
            baselines: its `baselines`.
            surgery: None writes the plain weighted sum.

        Returns:
            What surgery found; None without it, and where a teacher of a finite loss has a gradient that is not: the plain sum is
            then written, which is not finite either, for the recovery step to refuse.
        """
        coefficients = {} if result is None else result.coefficients
        weights = {teacher: coefficient / baselines[teacher] for teacher, coefficient in coefficients.items()}
        outcome = None
        factors = weights
        if surgery is not None and result is not None and weights:
            outcome = surgery.outcome(result, self._rows, baselines)
            if outcome is not None:
                factors = {teacher: outcome.factors[teacher] / baselines[teacher] for teacher in weights}
        for parameter, plain in zip([*self._shared, *self._others], self._plain, strict=True):
            parameter.grad = None if plain is None else plain.to(parameter.dtype, copy=True)
        if factors and self._shared:
            rows = [self._rows[teacher] for teacher in factors]
            combined_P = weighted_sum(rows, np.array(list(factors.values()), dtype=np.float64))
            reached = set().union(*(self._reached[teacher] for teacher in factors))
            for place, part_P in enumerate(combined_P.split(self._sizes)):
                if place in reached:
                    _add_gradient(self._shared[place], part_P.view_as(self._shared[place]))
        for teacher, weight in weights.items():
            for parameter, gradient in zip(self._others, self._own[teacher], strict=True):
                if gradient is not None:
                    _add_gradient(parameter, weight * gradient)
        return outcome

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss.reshape(()), [*self._shared, *self._others], allow_unused=True)


class SurgerySteps:
    """When surgery is due, and what it does on the steps between.

    A plan is found every `every` steps, and whenever the teachers are not those of the plan; the other steps use its weights with
    their own coefficients. What a method promises holds for the gradients of the plan, so that `every` trades the promise for time.

    Args:
        method: "upgrad" or "pcgrad".
        every: optimizer steps from one plan to the next.
        seed: fixes the order in which "pcgrad" projects.
    """

    def __init__(self, method: SurgeryMethod, *, every: int, seed: int) -> None:
        self.method: SurgeryMethod = method
        self.every = every
        self._generator = torch.Generator().manual_seed(seed)
        self._teachers: tuple[str, ...] = ()
        self._plan: SurgeryPlan | None = None
        self._age = 0
        """Steps that used the plan, the one that found it included."""

    def due(self, teachers: Sequence[str]) -> bool:
        """True if the step of these teachers (sorted) needs a plan of its own."""
        return self._plan is None or self._age >= self.every or tuple(teachers) != self._teachers

    def outcome(
        self, result: SurgeryLoss, gradients: Mapping[str, Tensor], baselines: Mapping[str, float]
    ) -> SurgeryOutcome | None:
        """Find or reuse a plan for the gradients of the ratios r_t, and count the step.

        Args:
            gradients: grad l_t [P] of at least the teachers of `result.coefficients`.
            baselines: r_t = l_t / b_t.

        Returns:
            None, with no plan left, where a gradient is not finite.
        """
        teachers = tuple(result.coefficients)
        rows = [gradients[teacher] for teacher in teachers]
        if not all_finite(rows):
            self._plan, self._teachers = None, ()
            return None
        if self.due(teachers):
            scales = [1.0 / baselines[teacher] for teacher in teachers]
            self._plan = plan_scaled_surgery(rows, scales, method=self.method, generator=self._generator)
            self._teachers, self._age = teachers, 0
        self._age += 1
        assert self._plan is not None
        coefficients = _array(result)
        return SurgeryOutcome(
            teachers,
            self._plan,
            dict(zip(teachers, self._plan.factors(coefficients).tolist(), strict=True)),
            pareto_stationary=self._plan.is_stationary(coefficients),
        )

    def weighted(
        self, losses: Mapping[str, Tensor], result: SurgeryLoss, baselines: Mapping[str, float]
    ) -> Tensor | None:
        """sum_t f_t r_t by the plan in use, and count the step; None where the plan leaves the gradient of `result.loss` as it is."""
        assert self._plan is not None
        self._age += 1
        coefficients = _array(result)
        factors = self._plan.factors(coefficients)
        if np.array_equal(factors, coefficients):
            return None
        ratios = [losses[teacher].reshape(()).double() / baselines[teacher] for teacher in self._teachers]
        terms = [factor * ratio for factor, ratio in zip(factors.tolist(), ratios, strict=True)]
        return torch.stack(terms).sum().to(result.loss.dtype)

    def state_dict(self) -> SurgeryState:
        plan = self._plan
        empty = np.zeros((0, 0))
        return {
            "generator": self._generator.get_state(),
            "teachers": list(self._teachers),
            "norms_N": torch.tensor([] if plan is None else plan.norms_N, dtype=torch.float64),
            "cosines_NN": torch.tensor(empty if plan is None else plan.cosines_NN, dtype=torch.float64),
            "projections_NN": torch.tensor(empty if plan is None else plan.projections_NN, dtype=torch.float64),
            "age": self._age,
        }

    def load_state_dict(self, state: SurgeryState) -> None:
        """Continue from `state`."""
        self._generator.set_state(state["generator"])
        self._teachers = tuple(state["teachers"])
        self._age = state["age"]
        arrays = [state[name].numpy().copy() for name in ("norms_N", "cosines_NN", "projections_NN")]
        self._plan = SurgeryPlan(*arrays) if self._teachers else None


def backward_in_parts(
    whole: Tensor, plain: Tensor, *, shared: Sequence[nn.Parameter], others: Sequence[nn.Parameter]
) -> None:
    """Give `shared` the gradient of `whole` and `others` that of `plain`, two losses over one graph.

    Where `others` are the maps to the teachers' spaces, which stand next to the losses, their pass is short.
    """
    gradients = torch.autograd.grad(plain, list(others), retain_graph=True, allow_unused=True) if others else ()
    torch.autograd.backward(whole, inputs=list(shared))
    for parameter, gradient in zip(others, gradients, strict=True):
        parameter.grad = gradient


def _array(result: SurgeryLoss) -> np.ndarray:
    return np.array(list(result.coefficients.values()), dtype=np.float64)


def _accumulate(sums: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            previous = sums[index]
            sums[index] = gradient if previous is None else previous + gradient


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    added = gradient.to(parameter.dtype)
    parameter.grad = added.clone() if parameter.grad is None else parameter.grad + added
