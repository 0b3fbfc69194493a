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

import torch
from torch import Tensor

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

    def __call__(self, losses: Mapping[str, Tensor], *, shares: Mapping[str, float] | None = None) -> SurgeryLoss:
        """Combine the losses of the teachers that labelled this batch; teachers left out of `losses` are absent.

        Args:
            losses: l_t by teacher, one number each, attached to the graph.
            shares: of its importance that each teacher has in this step, above 0, for teachers that are ramped in; None is 1.

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
        importance = {name: self.importance[name] * (1.0 if shares is None else shares[name]) for name in present}
        total = sum(importance.values())
        weights = [weight / total for weight in importance.values()]
        ratios = [values[name] / self._baselines[name] for name in present]
        # float64 throughout: the squares of float32 ratios overflow at 1e19, which a spike can reach.
        ratios_N = torch.stack([losses[name].reshape(()).double() / self._baselines[name] for name in present])
        loss, coefficients = _penalised_mean(ratios_N, weights, self.mode, penalty)
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
    ratios_N: Tensor, weights: Sequence[float], mode: Mode, penalty: float
) -> tuple[Tensor, list[float]]:
    """J attached to the graph, and c_t, for weights that sum to 1 (the module's formulas)."""
    weights_N = ratios_N.new_tensor(weights)
    mu = (weights_N * ratios_N).sum()
    # Centred twice: the rounding of mu, over a deviation that is as small, would be seen in sum_t c_t = 1.
    centred_N = ratios_N - mu
    centred_N = centred_N - (weights_N * centred_N).sum()
    variance = (weights_N * centred_N.square()).sum()
    centred = centred_N.detach().tolist()
    if mode == "variance":
        spread = -min(centred)
        lam = min(penalty, GUARD_MARGIN / (2.0 * spread)) if spread > 0.0 else penalty
        loss = mu + lam * variance
        slope = 2.0 * lam
    else:
        bounds = [math.sqrt(weight / (1.0 - weight)) for weight in weights if weight < 1.0]
        lam = min([penalty, *(GUARD_MARGIN * bound for bound in bounds)])
        deviation = (variance + STD_EPSILON**2).sqrt()
        loss = mu + lam * deviation
        slope = lam / float(deviation.detach())
    return loss, [weight * (1.0 + slope * value) for weight, value in zip(weights, centred, strict=True)]
