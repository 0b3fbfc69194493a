"""Importance-weighted gradient surgery with a variance penalty: one loss out of the losses of several teachers.

Teacher t of T has importance w_t (normalised over the teachers present) and loss l_t. With the dimensionless ratio
r_t = l_t / sg(b_t), b_t its own baseline:

    mu = sum_t w_t r_t          V = sum_t w_t (r_t - mu)^2
    variance mode   J = mu + lam V                   c_t = w_t (1 + 2 lam (r_t - mu))
    std mode        J = mu + lam sqrt(V + eps^2)     c_t = w_t (1 + lam (r_t - mu) / sqrt(V + eps^2))

and grad J = sum_t c_t grad r_t with sum_t c_t = 1. The variance penalty is V-REx (Krueger et al. 2021, arXiv 2003.00688, eq. 7)
with weights; the std mode is the chi-square distributionally robust loss (Duchi and Namkoong 2019, arXiv 1610.03425): mu +
sqrt(rho) sigma is the largest sum_t q_t r_t over q with chi2(q || w) <= rho, so lam = sqrt(rho) has a unit.

Unbounded, lam makes c_t negative: gradient *ascent* on the teachers that are already fitted. Departure from the papers: lam is
limited, as a constant of the graph, to the largest value for which every c_t >= 0. In variance mode that is
1 / (2 (mu - min r)); in std mode min_t sqrt(w_t / (1 - w_t)), because |r_t - mu| <= sigma sqrt((1 - w_t) / w_t).

Shape letters: N teachers, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from nexus.training.surgery import Method, SurgeryPlan, plan_surgery, weighted_sum

Mode = Literal["variance", "std"]

BASELINE_DECAY = 0.9
"""Of the moving average that becomes a baseline: it averages about 10 batches, a third of the default warm-up."""

BASELINE_FLOOR = 1e-3
"""Nats per token. A teacher that is matched before the warm-up ends must not turn its rounding into large ratios."""

STD_EPSILON = 1e-8
"""Keeps the gradient of sqrt(V) finite at V = 0; far below any spread of ratios that matters."""

GUARD_MARGIN = 1.0 - 1e-9
"""Stays this little inside the bound on lam, so that rounding cannot turn a coefficient of 0 into a negative one."""


@dataclass(frozen=True)
class SurgeryLoss:
    """What `GradientSurgeryLoss` computed for one step; the teachers of all mappings are in sorted order."""

    loss: Tensor
    """Scalar J, attached to the graph, in the widest dtype of the losses (at least float32). Not finite if no teacher's is."""

    coefficients: dict[str, float]
    """c_t: the weight of grad r_t in grad `loss`. Never negative; they sum to 1."""

    ratios: dict[str, float]
    """r_t, a teacher's loss over its baseline; 1 is where it stood during the warm-up."""

    excluded: tuple[str, ...]
    """Teachers that were present with a loss that is nan or inf: left out of everything else, sorted."""


class LossState(TypedDict):
    """What a rollback and a resume restore."""

    calls: int
    baselines: dict[str, float]
    frozen: list[str]
    averages: dict[str, float]
    counts: dict[str, int]


class GradientSurgeryLoss:
    """Combines per-teacher losses into one, with importance weights and a penalty on the spread of their ratios.

    Each call is one optimizer step: it advances the lambda ramp by one and, for the teachers present, the warm-up. Evaluate
    validation losses without it, or restore `state_dict` afterwards. With gradient accumulation pass the summed losses of the
    whole step. Baselines belong to the teacher: one that is seen rarely freezes after `warmup_steps` batches of its own, and a
    batch without it is treated exactly as by a run configured without it.

    Args:
        importance: weight of each teacher, above 0; only proportions matter, since they are normalised over those present.
        mode: "variance" (V-REx) or "std" (chi-square DRO).
        penalty: lam after the ramp, at least 0. In variance mode on ratios, in std mode the square root of the chi-square radius.
        ramp_steps: lam rises linearly from 0 at the first call to `penalty` at call number `ramp_steps`, because a jump upsets
            the optimizer's moments; 0 or 1 gives all of it at once.
        warmup_steps: batches over which a teacher's baseline follows the bias-corrected moving average of its loss (this batch
            included) before it is frozen, not below `BASELINE_FLOOR`. A teacher always uses at least its first finite loss.
        baselines: teachers whose baseline is known, in the unit of their loss and above 0: frozen from the start, as given.

    Raises:
        ValueError: a setting out of range, or a baseline of an unknown teacher.
    """

    def __init__(
        self,
        importance: Mapping[str, float],
        *,
        mode: Mode = "variance",
        penalty: float = 1.0,
        ramp_steps: int = 500,
        warmup_steps: int = 32,
        baselines: Mapping[str, float] | None = None,
    ) -> None:
        if not importance:
            raise ValueError("importance: expected at least one teacher, found none")
        for name, weight in importance.items():
            if not (math.isfinite(weight) and weight > 0.0):
                raise ValueError(
                    f"importance of {name}: expected a finite number above 0, found {weight}; leave the teacher out"
                )
        if mode not in ("variance", "std"):
            raise ValueError(f"mode: expected 'variance' or 'std', found {mode!r}")
        if not (math.isfinite(penalty) and penalty >= 0.0):
            raise ValueError(f"penalty: expected a finite number >= 0, found {penalty}")
        if ramp_steps < 0 or warmup_steps < 0:
            raise ValueError(f"ramp_steps and warmup_steps: expected >= 0, found {ramp_steps} and {warmup_steps}")
        self.importance = {name: float(importance[name]) for name in sorted(importance)}
        self.mode: Mode = mode
        self.penalty = float(penalty)
        self.ramp_steps = ramp_steps
        self.warmup_steps = warmup_steps
        given = dict(baselines or {})
        self._check_known(given)
        for name, baseline in given.items():
            if not (math.isfinite(baseline) and baseline > 0.0):
                raise ValueError(f"baseline of {name}: expected a finite number above 0, found {baseline}")
        self._calls = 0
        self._baselines = {name: float(value) for name, value in given.items()}
        self._frozen = set(given)
        self._averages: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    @property
    def baselines(self) -> dict[str, float]:
        """b_t of every teacher that has one: r_t = l_t / b_t, in the unit of the loss."""
        return dict(self._baselines)

    @property
    def warming_up(self) -> bool:
        """True while the baseline of some teacher still moves."""
        return any(name not in self._frozen for name in self.importance)

    def __call__(self, losses: Mapping[str, Tensor]) -> SurgeryLoss:
        """Combine the losses of the teachers that labelled this batch; teachers left out of `losses` are absent.

        Args:
            losses: l_t by teacher, one number each, attached to the graph.

        Returns:
            The combined loss and what it was made of. When every loss is nan or inf there is nothing to combine: `loss` is
            their sum, which is not finite, for the recovery step to refuse.

        Raises:
            ValueError: no teacher, an unknown teacher, or a loss that is not one number.
        """
        if not losses:
            raise ValueError(
                "losses: expected at least one teacher, found none; a batch without teachers has nothing to distil"
            )
        self._check_known(losses)
        for name, loss in losses.items():
            if loss.numel() != 1:
                raise ValueError(f"loss of {name}: expected one number, found shape {tuple(loss.shape)}")
        penalty = self._ramped_penalty()
        self._calls += 1
        # One transfer for all teachers, not one per teacher.
        names = sorted(losses)
        values = dict(
            zip(
                names, torch.stack([losses[name].detach().reshape(()).double() for name in names]).tolist(), strict=True
            )
        )
        excluded = tuple(name for name in names if not math.isfinite(values[name]))
        present = [name for name in names if name not in excluded]
        dtype = torch.float32
        for loss in losses.values():
            dtype = torch.promote_types(dtype, loss.dtype)
        if not present:
            return SurgeryLoss(
                torch.stack([losses[name].reshape(()).to(dtype) for name in names]).sum(), {}, {}, excluded
            )
        for name in present:
            self._observe(name, values[name])
        total = sum(self.importance[name] for name in present)
        weights = [self.importance[name] / total for name in present]
        ratios = [values[name] / self._baselines[name] for name in present]
        # float64 throughout: the squares of float32 ratios overflow at 1e19, which a spike can reach.
        ratios_N = torch.stack([losses[name].reshape(()).double() / self._baselines[name] for name in present])
        loss, coefficients = _penalised_mean(ratios_N, ratios, weights, self.mode, penalty)
        return SurgeryLoss(
            loss.to(dtype),
            dict(zip(present, coefficients, strict=True)),
            dict(zip(present, ratios, strict=True)),
            excluded,
        )

    def state_dict(self) -> LossState:
        """Plain numbers: the ramp's position, the baselines, and the moving averages behind those that still move."""
        return {
            "calls": self._calls,
            "baselines": dict(self._baselines),
            "frozen": sorted(self._frozen),
            "averages": dict(self._averages),
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: LossState) -> None:
        """Continue from `state`. Raises ValueError if it speaks of a teacher that this loss does not know."""
        self._check_known(state["baselines"])
        self._calls = state["calls"]
        self._baselines = dict(state["baselines"])
        self._frozen = set(state["frozen"])
        self._averages = dict(state["averages"])
        self._counts = dict(state["counts"])

    def _ramped_penalty(self) -> float:
        if self.ramp_steps <= 1:
            return self.penalty
        return self.penalty * min(1.0, self._calls / (self.ramp_steps - 1))

    def _observe(self, name: str, loss: float) -> None:
        if name in self._frozen:
            return
        count = self._counts.get(name, 0) + 1
        average = BASELINE_DECAY * self._averages.get(name, 0.0) + (1.0 - BASELINE_DECAY) * loss
        self._counts[name], self._averages[name] = count, average
        self._baselines[name] = max(average / (1.0 - BASELINE_DECAY**count), BASELINE_FLOOR)
        if count >= self.warmup_steps:
            self._frozen.add(name)

    def _check_known(self, names: Mapping[str, object]) -> None:
        unknown = sorted(set(names) - set(self.importance))
        if unknown:
            raise ValueError(
                f"teachers: expected some of {list(self.importance)}, found {unknown}; give each an importance"
            )


def _penalised_mean(
    ratios_N: Tensor, ratios: Sequence[float], weights: Sequence[float], mode: Mode, penalty: float
) -> tuple[Tensor, list[float]]:
    """J attached to the graph, and c_t, for weights that sum to 1 (the module's formulas)."""
    weights_N = ratios_N.new_tensor(weights)
    mu = (weights_N * ratios_N).sum()
    variance = (weights_N * (ratios_N - mu).square()).sum()
    mu_value = float(mu.detach())
    if mode == "variance":
        spread = mu_value - min(ratios)
        lam = min(penalty, GUARD_MARGIN / (2.0 * spread)) if spread > 0.0 else penalty
        loss = mu + lam * variance
        slope = 2.0 * lam
    else:
        bounds = [math.sqrt(weight / (1.0 - weight)) for weight in weights if weight < 1.0]
        lam = min([penalty, *(GUARD_MARGIN * bound for bound in bounds)])
        deviation = (variance + STD_EPSILON**2).sqrt()
        loss = mu + lam * deviation
        slope = lam / float(deviation.detach())
    return loss, [weight * (1.0 + slope * (ratio - mu_value)) for weight, ratio in zip(weights, ratios, strict=True)]


def teacher_gradients(
    losses: Mapping[str, Tensor], baselines: Mapping[str, float], parameters: Sequence[nn.Parameter]
) -> Tensor:
    """Gradient of each r_t = l_t / b_t with respect to `parameters`, flattened and concatenated: [N, P], float32 or wider.

    Runs one backward pass per teacher and keeps the graph. A parameter that a loss does not reach has gradient 0. Under
    gradient accumulation the result of the micro-batches may be added before it is combined.

    Args:
        losses: l_t by teacher; rows follow this order.
        baselines: b_t of each of them (`GradientSurgeryLoss.baselines`).
        parameters: the surgery subset, for example the adapters and the trunk's LoRA weights.
    """
    rows: list[Tensor] = []
    for name, loss in losses.items():
        gradients = torch.autograd.grad(
            loss.reshape(()) / baselines[name],
            list(parameters),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        rows.append(torch.cat([gradient.reshape(-1).to(_at_least_float32(gradient)) for gradient in gradients]))
    return torch.stack(rows)


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


def apply_surgery(
    losses: Mapping[str, Tensor],
    result: SurgeryLoss,
    baselines: Mapping[str, float],
    parameters: Sequence[nn.Parameter],
    *,
    method: Method,
    generator: torch.Generator | None = None,
) -> SurgeryOutcome | None:
    """Replace `.grad` of `parameters` by the gradient that surgery makes of the teachers' own gradients.

    Call it after `result.loss.backward(retain_graph=True)`, which gave all other parameters their gradient. What holds for the
    written gradient (no negative inner product with any teacher's, for "upgrad") survives clipping by norm, but not the
    diagonal preconditioner of Adam nor weight decay.

    Args:
        losses: what `GradientSurgeryLoss` was called with; teachers that it excluded are left out here too.
        result: what it returned.
        baselines: its `baselines`.
        parameters: the surgery subset.
        method: see `surgery.combine`.
        generator: fixes the order in which "pcgrad" projects.

    Returns:
        What was found; None, with every `.grad` as it was, where a teacher of a finite loss has a gradient that is not: the plain
        gradient is then not finite either, for the recovery step to refuse.
    """
    present = {name: losses[name] for name in result.coefficients}
    gradients_NP = teacher_gradients(present, baselines, parameters)
    if not bool(torch.isfinite(gradients_NP).all()):
        return None
    coefficients = np.array(list(result.coefficients.values()), dtype=np.float64)
    plan = plan_surgery(gradients_NP, method=method, generator=generator)
    factors = plan.factors(coefficients)
    combined_P = weighted_sum(gradients_NP, factors)
    parts = combined_P.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype, copy=True)
    return SurgeryOutcome(
        tuple(present),
        plan,
        dict(zip(present, factors.tolist(), strict=True)),
        pareto_stationary=plan.is_stationary(coefficients),
    )


def reapply_surgery(
    losses: Mapping[str, Tensor],
    result: SurgeryLoss,
    baselines: Mapping[str, float],
    parameters: Sequence[nn.Parameter],
    *,
    outcome: SurgeryOutcome,
) -> bool:
    """Replace `.grad` of `parameters` as an earlier surgery would, in one backward pass instead of one per teacher.

    The earlier plan meets this step's coefficients and gradients, so "upgrad" no longer promises anything; it costs (1 + 2 N) / 3
    plain steps to keep the promise at every step. The graph is kept.

    Returns:
        False, with every `.grad` as it was, where the teachers are not those of the plan: then surgery is due.
    """
    if tuple(result.coefficients) != outcome.teachers:
        return False
    factors = outcome.plan.factors(np.array(list(result.coefficients.values()), dtype=np.float64))
    ratios = [losses[name].reshape(()).double() / baselines[name] for name in outcome.teachers]
    weighted = sum((factor * ratio for factor, ratio in zip(factors.tolist(), ratios, strict=True)), torch.zeros(()))
    gradients = torch.autograd.grad(
        weighted, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    return True


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
