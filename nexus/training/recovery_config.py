"""The bounds of the recovery rules of `recovery`, checked when they are set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RecoveryConfig:
    """Bounds of the recovery rules; the defaults were measured on synthetic noise (false alarms below 1 in 1000 steps).

    Raises ValueError, naming the field, for a value out of range.
    """

    window: int = 64
    """Accepted values that a detector looks back on."""

    warmup: int = 32
    """Accepted values before a detector flags anything but a tenfold leap."""

    threshold: float = 6.0
    """z above which a step is flagged."""

    loss_floor: float = 0.03
    """Least deviation of the log loss: with `threshold` 6 a flag needs a loss 20 % above the median."""

    grad_floor: float = 0.18
    """Least deviation of the log gradient norm: with `threshold` 6 a flag needs 2.9 times the median."""

    flags_to_rollback: int = 3
    """Flags within `flag_horizon` steps that make a rollback of what would be a skip."""

    flag_horizon: int = 5
    """Steps over which flags are counted."""

    ema_decay: float = 0.9
    """Of the moving average of the loss, whose slow rise is the third reason for a rollback."""

    ema_ratio: float = 1.15
    """Rise of that average over its value at the snapshot."""

    ema_steps: int = 20
    """Steps in a row for which it must stay above."""

    certify_steps: int = 20
    """Clean steps after a snapshot before it is trusted."""

    suspect_margin: int = 5
    """Steps by which a snapshot must be older than the first suspect."""

    ring_size: int = 3
    """Snapshots held in memory."""

    rebaseline_after: int = 16
    """Flags in a row, without a rollback, after which the detectors start anew; twice as many after a jump beyond `MODEST_JUMP`."""

    max_rollbacks: int = 3
    """Rollbacks within `budget_steps`; one more ends the run."""

    budget_steps: int = 1000
    """Steps over which rollbacks are counted."""

    max_skip_window: int = 512
    """Most batches that an escalated rollback skips: the upper end of PaLM's 200 to 500."""

    lr_factor: float = 0.5
    """Learning rate after the third rollback of an incident, as a share of the schedule's."""

    rewarm_steps: int = 100
    """Steps over which that share returns to 1."""

    max_nonfinite: int = 64
    """Losses or gradients in a row that are not finite, without a rollback, before the run is ended: nothing is being learnt."""

    def __post_init__(self) -> None:
        at_least_one = (
            "window",
            "warmup",
            "flags_to_rollback",
            "flag_horizon",
            "ema_steps",
            "certify_steps",
            "rebaseline_after",
            "budget_steps",
            "max_skip_window",
            "rewarm_steps",
            "max_nonfinite",
        )
        _require(self, at_least_one, lambda value: value >= 1, "at least 1")
        _require(self, ("suspect_margin", "max_rollbacks"), lambda value: value >= 0, "at least 0")
        # With one slot the next snapshot would overwrite the only certified one.
        _require(self, ("ring_size",), lambda value: value >= 2, "at least 2")
        _require(self, ("threshold", "loss_floor", "grad_floor"), lambda value: value > 0.0, "above 0")
        _require(self, ("ema_decay", "lr_factor"), lambda value: 0.0 < value < 1.0, "between 0 and 1")
        _require(self, ("ema_ratio",), lambda value: value > 1.0, "above 1")
        _require(self, ("warmup",), lambda value: value <= self.window, f"at most window ({self.window})")
        horizon = self.flag_horizon
        _require(self, ("flags_to_rollback",), lambda value: value <= horizon, f"at most flag_horizon ({horizon})")


def _require(config: RecoveryConfig, names: Sequence[str], holds: Callable[[Any], bool], expected: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not holds(value):
            raise ValueError(f"{name}: expected {expected}, found {value}")
