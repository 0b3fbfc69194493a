"""Schedules over optimizer steps: the learning rate, the decaying weight of the feature anchors, and teachers that come in later."""

from __future__ import annotations

import math
from typing import Literal, TypedDict, get_args

import torch

ScheduleKind = Literal["cosine", "wsd", "constant"]


class ScheduleState(TypedDict):
    """What a rollback and a resume restore; the shape of the schedule comes from the configuration."""

    step: int


class LearningRateSchedule:
    """Linear warm-up, then one of three ways to the end.

    "cosine": a half cosine down to a share of the peak. "constant": the peak itself. "wsd" (warm-up, stable, decay): the peak, and in
    the last steps a fall to the share along 1 - sqrt, the best of the shapes that were compared (Haegele et al. 2024, arXiv
    2405.18392, section 3); a run can be made longer from any point before the fall.

    The peak of each parameter group is the learning rate that the group has when the schedule is made. Step s (0-based) of
    `warmup_steps` uses (s + 1) / warmup_steps of the peak, so that no step is wasted at 0; the last of `total_steps` uses
    exactly `final_fraction`, and so does every later one. Call `step` once after each `optimizer.step`, not after a skipped one.

    Args:
        optimizer: its groups' learning rates are set at once, to those of step 0, and after each `step`.
        total_steps: optimizer steps of the run, at least 1.
        warmup_steps: at least 0 and below `total_steps`.
        final_fraction: of the peak, from 0 to 1; not for "constant".
        decay_share: of all steps, above 0 and up to 1: the fall of "wsd", which is the only one to use it.
        kind: "cosine", "wsd" or "constant".

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        warmup_steps: int = 0,
        final_fraction: float = 0.1,
        decay_share: float = 0.2,
        kind: ScheduleKind = "cosine",
    ) -> None:
        if kind not in get_args(ScheduleKind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(ScheduleKind))}, found {kind!r}")
        if total_steps < 1 or not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"schedule: expected total_steps >= 1 and 0 <= warmup_steps < total_steps, "
                f"found {total_steps} and {warmup_steps}"
            )
        if not 0.0 <= final_fraction <= 1.0:
            raise ValueError(f"final_fraction: expected a share of the peak from 0 to 1, found {final_fraction}")
        if not 0.0 < decay_share <= 1.0:
            raise ValueError(f"decay_share: expected a share of the steps above 0 and up to 1, found {decay_share}")
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.final_fraction = final_fraction
        self.kind: ScheduleKind = kind
        self._decay_steps = min(max(1, round(decay_share * total_steps)), total_steps - warmup_steps)
        self._optimizer = optimizer
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._step = 0
        self._apply()

    @property
    def phase(self) -> Literal["warmup", "decay", "constant", "done"]:
        """The part of the schedule that the next step belongs to; a change of phase is a reason to re-baseline a detector."""
        if self._step < self.warmup_steps:
            return "warmup"
        if self._step >= self.total_steps:
            return "done"
        if self.kind == "wsd":
            return "constant" if self._step < self.total_steps - self._decay_steps else "decay"
        return "decay" if self.kind == "cosine" else "constant"

    def fraction(self, step: int) -> float:
        """Share of the peak that step `step` (0-based) uses."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            fallen = min(1.0, max(0.0, (step + 1 - (self.total_steps - self._decay_steps)) / self._decay_steps))
            return 1.0 - (1.0 - self.final_fraction) * math.sqrt(fallen)
        # The first step after the warm-up is the peak; with a warm-up its last step already was.
        first = max(self.warmup_steps - 1, 0)
        return cosine_decay(1.0, self.final_fraction, step - first, self.total_steps - 1 - first)

    def step(self) -> None:
        """Advance to the next optimizer step."""
        self._step += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group for the next step."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def state_dict(self) -> ScheduleState:
        return {"step": self._step}

    def load_state_dict(self, state: ScheduleState) -> None:
        """Continue from `state`; sets the optimizer's learning rates too."""
        self._step = state["step"]
        self._apply()

    def _apply(self) -> None:
        fraction = self.fraction(self._step)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * fraction


def cosine_decay(start: float, end: float, step: int, total: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total` and after it (arXiv 1608.03983, eq. 5).

    The weight gamma of the feature anchors goes from 1.0 to 0.3 by it. With `total` <= 0 there is nothing to decay over: `end`.
    """
    if step >= total:
        return end
    if step <= 0:
        return start
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step / total))


def ramp_share(step: int, start: int, steps: int) -> float:
    """Share of its importance that a teacher has at `step`: 0 before `start`, then rising linearly to 1 over `steps` steps."""
    if step < start:
        return 0.0
    return min(1.0, (step - start + 1) / max(1, steps))
