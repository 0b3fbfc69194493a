"""Finding a bad batch before it reaches the optimizer, and returning to a good state when one got through.

Detectors watch x_L = log(loss) and x_G = log(gradient norm before clipping). Over a window of accepted values,
z = (x - median) / max(1.4826 MAD, floor); z > 6 on either side of the pair flags the step, and only upwards. The median and the
median absolute deviation are not moved by a few outliers, and a flagged value never enters the window, so one nan or one burst does
not blind the detector, as it does a mean and a standard deviation (OLMo-core's SkipStepOptimizer, ZClip arXiv 2504.02507).

Tiers:

0. Loss or gradient norm is not finite: skip.
1. A detector flags: skip, and remember the batch as a suspect.
2. Parameters or moments are not finite, or 3 of the last 5 steps were flagged, or the loss has stayed above that of the last
   certified snapshot for 20 steps: roll back. A snapshot is certified by 20 clean steps after it, and it must be 5 steps older than
   the first suspect.
3. Repeated rollbacks of one incident escalate: (1) replay without the flagged batches and the one before them; (2) an older
   snapshot, and skip a window of batches from the first suspect on (PaLM, arXiv 2204.02311, section 5.1: replaying the same batches
   elsewhere did not spike, so it is data *and* state; both are changed); (3) the same with half the learning rate, which then warms
   up again. More than 3 rollbacks in 1000 steps end the run with `TrainingDivergedError`, on the last good state.

After 16 flags in a row without a rollback (32 when the level jumped by more than a factor e, as in a burst) the new level is taken
for the truth and the windows start anew, because a window that refuses everything would skip for ever; `rebaseline` does it at
once, where the trainer knows of the change.

A skip returns the random generators, the buffers (BatchNorm statistics) and the `extra` parts to the moment before the refused
batch's forward pass, so that the run continues bit for bit as one that never saw it; a rollback returns everything.
"""

from __future__ import annotations

import json
import math
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from nexus.errors import TrainingDivergedError
from nexus.training.snapshot import (
    RandomState,
    Stateful,
    TrainingState,
    Tree,
    all_finite,
    capture_random_state,
    copy_buffers,
    copy_tree,
    drop_gradients,
    optimizer_tensors,
    restore_buffers,
    restore_random_state,
    return_tree,
    trained_parameters,
)

__all__ = ["Incident", "RecoveryConfig", "RecoveryStep", "SampleQuarantine", "SpikeDetector", "Stateful"]

Action = Literal["step", "skip", "rollback"]

BatchKey: TypeAlias = tuple[str, ...]
"""A batch by the ids of its samples, because a step index means another batch after a rollback."""

LOSS_MINIMUM = 1e-8
GRAD_NORM_MINIMUM = 1e-12
"""Below these a logarithm measures rounding."""

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal variable whose median absolute deviation is 1."""

MODEST_JUMP = 1.0
"""Log ratio (a factor of 2.7) up to which 16 flags in a row look like a new regime; beyond it, like a burst, and twice as many are
waited for. A burst of 20 steps is refused whole, a loss that is 1.5 times higher for good costs 16 steps."""

EXCESS_SIGMAS = 2.0
"""The slow-divergence rule asks for an excess of this many step-to-step deviations of the log loss too: a moving average of 10 steps
strays by a quarter of one by chance, and where losses differ widely between batches 15 % is no divergence."""


@dataclass(frozen=True)
class RecoveryConfig:
    """Bounds of the recovery rules; the defaults were measured on synthetic noise (false alarms below 1 in 1000 steps).

    Raises ValueError, naming the field, for a value out of range.
    """

    window: int = 64
    """Accepted values that a detector looks back on."""

    warmup: int = 32
    """Accepted values before a detector flags anything."""

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


@dataclass(frozen=True)
class Incident:
    """One entry of the incident log: a decision that was not "step"."""

    kind: Literal["nonfinite", "spike", "replay", "rollback", "rebaseline", "refused_snapshot", "diverged"]
    """"replay" is a batch that was skipped because an earlier incident named it."""

    check: int
    """Number of `check` calls made before the decision; never goes back."""

    action: Literal["skip", "rollback", "none", "stop"]

    reason: str

    sample_ids: BatchKey = ()

    loss: float | None = None

    grad_norm: float | None = None

    loss_z: float | None = None
    """z of the log loss; None while the detector warms up."""

    grad_norm_z: float | None = None

    returned_to: int | None = None
    """The step of the snapshot that a rollback returned to."""

    rung: int | None = None
    """How often this incident has been rolled back."""


class SpikeDetector:
    """Robust z-scores of one series over a window of accepted values.

    Args:
        window: accepted values to look back on.
        warmup: accepted values before anything is scored.
        floor: least deviation, in the unit of the series.
    """

    def __init__(self, *, window: int, warmup: int, floor: float) -> None:
        self.warmup = warmup
        self.floor = floor
        self._values: deque[float] = deque(maxlen=window)

    def score(self, value: float) -> float | None:
        """z of `value`; None during the warm-up."""
        if len(self._values) < self.warmup:
            return None
        return self.excess(value) / max(self.deviation() or 0.0, self.floor)

    def excess(self, value: float) -> float:
        """How far `value` lies above the median of the window."""
        return value - float(np.median(np.array(self._values)))

    def deviation(self) -> float | None:
        """1.4826 MAD of the window, without the floor; None during the warm-up."""
        if len(self._values) < self.warmup:
            return None
        values = np.array(self._values)
        return MAD_TO_SIGMA * float(np.median(np.abs(values - np.median(values))))

    def accept(self, value: float) -> None:
        """Add a value that belongs to the series."""
        self._values.append(value)

    def clear(self) -> None:
        """Forget everything: the warm-up begins again."""
        self._values.clear()

    def state_dict(self) -> list[float]:
        return list(self._values)

    def load_state_dict(self, state: Sequence[float]) -> None:
        self.clear()
        self._values.extend(state)


class SampleQuarantine:
    """Samples that were in a flagged batch, by id.

    A sample is a *suspect* until the end of its epoch, because its neighbours, or the state of the model, may be to blame. It is
    *confirmed* by a second, independent hit: in another epoch or among other neighbours. Rollbacks do not undo anything here.

    Args:
        path: JSON lines, one per decision, appended to; what an earlier run wrote is read first. None keeps it in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.epoch = 0
        self._hits: dict[str, set[tuple[int, BatchKey]]] = {}
        self._suspects: set[str] = set()
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8")
            complete = text[: text.rfind("\n") + 1]
            if complete != text:  # the process was killed while it wrote its last line
                path.write_text(complete, encoding="utf-8")
            for line in complete.splitlines():
                entry = json.loads(line)
                if entry["event"] == "epoch":
                    self._release(entry["epoch"])
                else:
                    self._add(tuple(entry["sample_ids"]), entry["epoch"])

    @property
    def suspects(self) -> frozenset[str]:
        """Samples to leave out until the epoch ends."""
        return frozenset(self._suspects)

    @property
    def confirmed(self) -> frozenset[str]:
        """Samples to leave out for good."""
        return frozenset(sample_id for sample_id, hits in self._hits.items() if len(hits) > 1)

    def __contains__(self, sample_id: Hashable) -> bool:
        """True for a sample that should not be drawn now."""
        return str(sample_id) in self._suspects or len(self._hits.get(str(sample_id), ())) > 1

    def add(self, sample_ids: Iterable[Hashable]) -> None:
        """Record one flagged batch."""
        key = tuple(str(sample_id) for sample_id in sample_ids)
        if key:
            self._add(key, self.epoch)
            self._append({"event": "suspect", "epoch": self.epoch, "sample_ids": list(key)})

    def start_epoch(self, epoch: int) -> None:
        """Release the suspects: they are drawn again in epoch number `epoch`, and a second hit there confirms them."""
        self._release(epoch)
        self._append({"event": "epoch", "epoch": epoch})

    def _add(self, key: BatchKey, epoch: int) -> None:
        for sample_id in key:
            self._hits.setdefault(sample_id, set()).add((epoch, key))
        self._suspects.update(key)

    def _release(self, epoch: int) -> None:
        self.epoch = epoch
        self._suspects.clear()

    def _append(self, entry: Mapping[str, object]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


@dataclass
class _Watch:
    """The detector's side of a training state: what a rollback returns and a run that never saw the batch would hold."""

    losses: SpikeDetector
    grad_norms: SpikeDetector
    recent: deque[tuple[bool, int, BatchKey]]
    """(flagged, position, batch) of the last steps."""
    position: int = 0
    """Accepted steps on this trajectory."""
    ema: float = 0.0
    ema_count: int = 0
    excess: int = 0
    """Steps in a row for which the moving average was too high."""
    generation: int = 0
    """Counts re-baselinings; losses of different generations are not compared."""
    jumps: list[float] = field(default_factory=list)
    """Of the flags in a row so far: by how much, in log, the higher of the two series exceeded its median."""
    nonfinite_streak: int = 0

    @property
    def average(self) -> float | None:
        """Bias-corrected moving average of the loss."""
        return self.ema if self.ema_count else None

    def state_dict(self) -> dict[str, Any]:
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _WATCH_PARTS}
        return {
            **plain,
            "jumps": list(self.jumps),
            "losses": self.losses.state_dict(),
            "grad_norms": self.grad_norms.state_dict(),
            "recent": [[flagged, position, list(key)] for flagged, position, key in self.recent],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.load_state_dict(state["losses"])
        self.grad_norms.load_state_dict(state["grad_norms"])
        self.recent.clear()
        self.recent.extend((flagged, position, tuple(key)) for flagged, position, key in state["recent"])
        self.jumps = list(state["jumps"])
        for name in set(state) - _WATCH_PARTS:
            setattr(self, name, state[name])


_WATCH_PARTS = {"losses", "grad_norms", "recent", "jumps"}


@dataclass(eq=False)
class _Snapshot:
    """A slot of the ring."""

    state: TrainingState
    step: int = 0
    position: int = 0
    generation: int = 0
    average: float | None = None
    deviation: float | None = None
    clean_steps: int = 0
    watch: dict[str, Any] = field(default_factory=dict)


@dataclass
class _BeforeForward:
    """What a forward pass changes although the optimizer has not stepped."""

    random: RandomState
    buffers: dict[str, Tensor]
    parts: dict[str, Tree]


@dataclass(frozen=True)
class _Suspicion:
    """Why a rollback is due, and what it must not replay."""

    reason: str
    first_position: int
    batches: tuple[BatchKey, ...]


class RecoveryStep:
    """Decides before every optimizer step whether to take it, and returns to a good state when one was bad.

    The protocol of a loop; `check` is called once per optimizer step, after the backward pass and before clipping matters:

        for step, batch in ...:                             # `data` is the cursor that the batches come from
            optimizer.zero_grad()
            loss = compute_loss(model(batch))               # a forward pass in training mode marks the moment to return to
            loss.backward()
            grad_norm = clip_grad_norm_(model.parameters(), 1.0)       # the norm before clipping
            action = recovery.check(loss, grad_norm, batch.ids)
            if action == "step":
                optimizer.step(); scheduler.step()
                if step % 50 == 0:
                    recovery.snapshot(step)
            elif action == "rollback":
                step = recovery.rollback()                  # model, optimizer, scheduler, data, generators are those of `step`

    After "skip" there is nothing to do but to leave the step out: random generators, buffers and `extra` are already as before the
    refused batch, and its gradients are gone. `data` and `scheduler` are not: the batch stays consumed, and the schedule was not
    stepped. After a rollback `data` serves the batches since the snapshot again; those under suspicion are answered with "skip".

    The moment before the forward pass is found by a hook on `model`; a loop that calls only parts of the model, or draws random
    numbers of the step before it, calls `begin_step` there instead. With gradient accumulation the first forward pass after the
    last `check` counts. Batches of very different loss levels in turn widen the windows: give each step a mixture.

    Args:
        model: its trained parameters and all its buffers are kept.
        optimizer: any torch optimizer; one hook on it applies the learning-rate share of the third rung.
        scheduler: has `state_dict` and `load_state_dict`.
        data: the same; its position is part of a snapshot.
        config: bounds of the rules.
        extra: further parts that a step changes, such as `GradientSurgeryLoss` or a standardiser; small, since they are also
            copied before every forward pass.
        quarantine: where suspects are kept; a new one in memory unless given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Stateful | None = None,
        data: Stateful | None = None,
        config: RecoveryConfig,
        extra: Mapping[str, Stateful] | None = None,
        quarantine: SampleQuarantine | None = None,
    ) -> None:
        self.config = config
        self.quarantine = SampleQuarantine() if quarantine is None else quarantine
        self.incidents: list[Incident] = []
        self._model = model
        self._optimizer = optimizer
        self._extra = dict(extra or {})
        self._parts: dict[str, Stateful] = {f"extra.{name}": part for name, part in self._extra.items()}
        if scheduler is not None:
            self._parts["scheduler"] = scheduler
        if data is not None:
            self._parts["data"] = data
        self._watch = _Watch(
            SpikeDetector(window=config.window, warmup=config.warmup, floor=config.loss_floor),
            SpikeDetector(window=config.window, warmup=config.warmup, floor=config.grad_floor),
            deque(maxlen=config.flag_horizon),
        )
        self._ring: list[_Snapshot] = []
        self._spare: list[TrainingState] = []
        self._accepted: list[tuple[int, BatchKey]] = []
        # Retry policy: a rollback leaves these as they are.
        self._checks = 0
        self._rollback_checks: list[int] = []
        self._suspicion: _Suspicion | None = None
        self._rung = 0
        self._last_position = 0
        self._steps_to_close = 0
        self._replay: Counter[BatchKey] = Counter()
        self._refused: Counter[BatchKey] = Counter()
        self._skip_window = 0
        self._rewarm_left = 0
        self._scheduled_rates: list[Any] = []
        self._awaiting_forward = True
        self._before = self._capture_before(None)
        model.register_forward_pre_hook(_ForwardWatch(self))
        optimizer.register_step_pre_hook(_StepWatch(self, RecoveryStep._lower_rates))
        optimizer.register_step_post_hook(_StepWatch(self, RecoveryStep._return_rates))

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """The steps of the snapshots held, oldest first."""
        return tuple(snapshot.step for snapshot in self._ring)

    @property
    def certified_steps(self) -> tuple[int, ...]:
        """Those of them with enough clean steps behind them to roll back to."""
        return tuple(snapshot.step for snapshot in self._ring if self._certified(snapshot))

    @property
    def learning_rate_share(self) -> float:
        """Share of the scheduled learning rate that the next step uses: 1 except after the third rollback of an incident."""
        gone = (self.config.rewarm_steps - self._rewarm_left) / self.config.rewarm_steps
        return 1.0 if self._rewarm_left == 0 else self.config.lr_factor + (1.0 - self.config.lr_factor) * gone

    def begin_step(self) -> None:
        """Mark this as the moment that a skip of the coming batch returns to."""
        self._before = self._capture_before(self._before)
        self._awaiting_forward = False

    def check(self, loss: float | Tensor, grad_norm: float | Tensor, sample_ids: Iterable[Hashable]) -> Action:
        """Judge one step before the optimizer takes it.

        Args:
            loss: the loss of the whole step, a number or a 0-dimensional tensor.
            grad_norm: the norm of all gradients before clipping.
            sample_ids: of the batch; they name it across rollbacks and restarts.

        Returns:
            "step": take it. "skip": leave it out; already undone. "rollback": call `rollback` next.

        Raises:
            TrainingDivergedError: nothing finite is left to return to, or nothing finite has come for `max_nonfinite` checks.
        """
        loss, grad_norm, key = _number(loss), _number(grad_norm), _batch_key(sample_ids)
        self._checks += 1
        self._suspicion = None
        action = self._judge(loss, grad_norm, key)
        if action != "step":
            self._undo_forward()
        self._before = self._capture_before(self._before)
        self._awaiting_forward = True
        return action

    def snapshot(self, step: int) -> None:
        """Keep the present state under the number `step`, in memory. Call it between an optimizer step and the next batch.

        A state that is not finite is refused (and logged); the next `check` rolls back.
        """
        if not self._parameters_finite() or not all_finite(optimizer_tensors(self._optimizer)):
            self._log(kind="refused_snapshot", action="none", reason="parameters or moments are not finite")
            return
        if len(self._ring) == self.config.ring_size:
            self._evict()
        state = self._spare.pop() if self._spare else TrainingState()
        state.capture(self._model, self._optimizer, self._parts)
        watch = self._watch
        self._ring.append(
            _Snapshot(
                state=state,
                step=step,
                position=watch.position,
                generation=watch.generation,
                average=watch.average,
                deviation=watch.losses.deviation(),
                watch=watch.state_dict(),
            )
        )
        oldest = self._ring[0].position
        self._accepted = [entry for entry in self._accepted if entry[0] >= oldest]

    def rollback(self) -> int:
        """Return to a snapshot and give its step.

        After `check` said "rollback" it is one that the rules trust; called on the trainer's own account, the newest. Snapshots
        newer than it are forgotten. The same snapshot can be returned to again.

        Raises:
            TrainingDivergedError: the budget of rollbacks is spent (the last good state has been returned), or no snapshot exists.
        """
        if not self._ring:
            raise TrainingDivergedError(
                "Expected a snapshot to return to, found none. Call snapshot(step) before training and every 50 steps."
            )
        suspicion, self._suspicion = self._suspicion, None
        rung = self._rung + 1
        chosen = self._choose(suspicion, rung)
        recent = [check for check in self._rollback_checks if check > self._checks - self.config.budget_steps]
        if len(recent) >= self.config.max_rollbacks:
            self._return_to(chosen)
            reason = f"{len(recent)} rollbacks in {self.config.budget_steps} steps"
            self._log(kind="diverged", action="stop", reason=reason, returned_to=chosen.step, rung=rung)
            raise TrainingDivergedError(
                f"Expected at most {self.config.max_rollbacks} rollbacks in {self.config.budget_steps} steps, found one more. "
                f"The state of step {chosen.step} has been kept; lower the learning rate or look at the quarantined samples."
            )
        self._rollback_checks = [*recent, self._checks]
        self._plan_replay(suspicion, chosen, rung)
        self._return_to(chosen)
        reason = "asked for by the trainer" if suspicion is None else suspicion.reason
        self._log(kind="rollback", action="rollback", reason=reason, returned_to=chosen.step, rung=self._rung)
        return chosen.step

    def rebaseline(self, reason: str) -> None:
        """Start the detectors anew: the level of the loss is about to change for a known reason.

        Call it when the teacher mix, the batch size, the phase of the schedule or the weight of a loss term changes.
        """
        watch = self._watch
        watch.losses.clear()
        watch.grad_norms.clear()
        watch.recent.clear()
        watch.jumps.clear()
        watch.ema, watch.ema_count, watch.excess = 0.0, 0, 0
        watch.generation += 1
        self._log(kind="rebaseline", action="none", reason=reason)

    def state_dict(self) -> dict[str, Any]:
        """Detectors, retry policy and incident log as plain numbers and strings, for a checkpoint.

        Snapshots are not in it: the checkpoint is one. Take one with `snapshot` after loading. The quarantine has its own file.
        """
        return {
            "watch": self._watch.state_dict(),
            "accepted": [[position, list(key)] for position, key in self._accepted],
            "checks": self._checks,
            "rollback_checks": list(self._rollback_checks),
            "rung": self._rung,
            "last_position": self._last_position,
            "steps_to_close": self._steps_to_close,
            "replay": [[list(key), count] for key, count in self._replay.items()],
            "refused": [[list(key), count] for key, count in self._refused.items()],
            "skip_window": self._skip_window,
            "rewarm_left": self._rewarm_left,
            "incidents": [asdict(incident) for incident in self.incidents],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; the snapshots held are forgotten, since they belong to another trajectory."""
        self._forget(self._ring)
        self._suspicion = None
        self._watch.load_state_dict(state["watch"])
        self._accepted = [(position, tuple(key)) for position, key in state["accepted"]]
        self._checks = state["checks"]
        self._rollback_checks = list(state["rollback_checks"])
        self._rung = state["rung"]
        self._last_position = state["last_position"]
        self._steps_to_close = state["steps_to_close"]
        self._replay = Counter({tuple(key): count for key, count in state["replay"]})
        self._refused = Counter({tuple(key): count for key, count in state["refused"]})
        self._skip_window = state["skip_window"]
        self._rewarm_left = state["rewarm_left"]
        self.incidents = [
            Incident(**{**entry, "sample_ids": tuple(entry["sample_ids"])}) for entry in state["incidents"]
        ]
        self._before = self._capture_before(self._before)
        self._awaiting_forward = True

    # Judging one step.

    def _judge(self, loss: float, grad_norm: float, key: BatchKey) -> Action:
        if not self._parameters_finite():
            return self._corrupted(loss, grad_norm, key)
        if self._refuses(key):
            self._log(
                kind="replay",
                action="skip",
                reason="named by a rollback",
                sample_ids=key,
                loss=loss,
                grad_norm=grad_norm,
            )
            return "skip"
        watch = self._watch
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            watch.nonfinite_streak += 1
            if watch.nonfinite_streak >= self.config.max_nonfinite:
                self._log(kind="diverged", action="stop", reason="nothing finite", loss=loss, grad_norm=grad_norm)
                raise TrainingDivergedError(
                    f"Expected finite losses and gradients, found {watch.nonfinite_streak} steps in a row without. No step was "
                    "taken since; lower the learning rate or look at the quarantined samples."
                )
            return self._flag("nonfinite", loss, grad_norm, key, None, None)
        watch.nonfinite_streak = 0
        log_loss = math.log(max(loss, LOSS_MINIMUM))
        log_norm = math.log(max(grad_norm, GRAD_NORM_MINIMUM))
        loss_z, norm_z = watch.losses.score(log_loss), watch.grad_norms.score(log_norm)
        if max(loss_z or 0.0, norm_z or 0.0) > self.config.threshold:
            watch.jumps.append(max(watch.losses.excess(log_loss), watch.grad_norms.excess(log_norm)))
            action = self._flag("spike", loss, grad_norm, key, loss_z, norm_z)
            patience = self.config.rebaseline_after * (1 if float(np.median(watch.jumps)) <= MODEST_JUMP else 2)
            if len(watch.jumps) >= patience:
                self._suspicion = None
                self.rebaseline(f"{len(watch.jumps)} flags in a row")
                return "skip"
            return action
        return self._accept(loss, log_loss, log_norm, grad_norm, key)

    def _corrupted(self, loss: float, grad_norm: float, key: BatchKey) -> Action:
        """Parameters that are not finite: whatever the loss says, only a snapshot helps."""
        reason = "parameters are not finite"
        if not self._ring:
            self._log(kind="diverged", action="stop", reason=reason, sample_ids=key, loss=loss, grad_norm=grad_norm)
            raise TrainingDivergedError(
                "Expected finite parameters, found nan or inf after an optimizer step, and no snapshot to return to. "
                "Call snapshot(step) before training and every 50 steps."
            )
        self._log(kind="nonfinite", action="rollback", reason=reason, sample_ids=key, loss=loss, grad_norm=grad_norm)
        culprits = tuple(previous for _, previous in self._accepted[-1:])
        self._suspicion = _Suspicion(reason, self._watch.position, culprits)
        return "rollback"

    def _refuses(self, key: BatchKey) -> bool:
        """True for a batch that the last rollback decided not to train on."""
        if self._refused[key] > 0:
            self._refused[key] -= 1
            return True
        if self._replay[key] > 0:
            self._replay[key] -= 1
            return False
        if self._skip_window > 0:
            self._skip_window -= 1
            return True
        return False

    def _flag(
        self,
        kind: Literal["nonfinite", "spike"],
        loss: float,
        grad_norm: float,
        key: BatchKey,
        loss_z: float | None,
        norm_z: float | None,
    ) -> Action:
        watch = self._watch
        watch.recent.append((True, watch.position, key))
        self.quarantine.add(key)
        flagged = [(position, batch) for was_flagged, position, batch in watch.recent if was_flagged]
        action: Literal["skip", "rollback"] = "skip"
        if len(flagged) >= self.config.flags_to_rollback:
            reason = f"{len(flagged)} of the last {len(watch.recent)} steps were flagged"
            suspicion = _Suspicion(reason, flagged[0][0], tuple(batch for _, batch in flagged))
            if self._eligible(suspicion):
                self._suspicion, action = suspicion, "rollback"
        self._log(
            kind=kind,
            action=action,
            reason="loss or gradient is not finite"
            if kind == "nonfinite"
            else "loss or gradient norm above its window",
            sample_ids=key,
            loss=loss,
            grad_norm=grad_norm,
            loss_z=loss_z,
            grad_norm_z=norm_z,
        )
        return action

    def _accept(self, loss: float, log_loss: float, log_norm: float, grad_norm: float, key: BatchKey) -> Action:
        watch = self._watch
        watch.losses.accept(log_loss)
        watch.grad_norms.accept(log_norm)
        watch.recent.append((False, watch.position, key))
        watch.jumps.clear()
        watch.position += 1
        watch.ema_count += 1
        # Bias-corrected in place: the weights of a plain average until the decay takes over.
        weight = (1.0 - self.config.ema_decay) / (1.0 - self.config.ema_decay**watch.ema_count)
        watch.ema += weight * (loss - watch.ema)
        self._accepted.append((watch.position, key))
        self._rewarm_left = max(0, self._rewarm_left - 1)
        self._close_incident()
        watch.excess = watch.excess + 1 if self._drifting() else 0
        if watch.excess == 0:
            for snapshot in self._ring:
                snapshot.clean_steps += 1
        elif watch.excess >= self.config.ema_steps:
            started = watch.position - watch.excess
            first = tuple(batch for position, batch in self._accepted if position == started + 1)
            suspicion = _Suspicion(f"the loss stayed high for {watch.excess} steps", started, first)
            if self._eligible(suspicion):
                self._suspicion = suspicion
                self._log(
                    kind="spike",
                    action="rollback",
                    reason=suspicion.reason,
                    sample_ids=key,
                    loss=loss,
                    grad_norm=grad_norm,
                )
                return "rollback"
        return "step"

    def _drifting(self) -> bool:
        """True if the moving average of the loss is too far above its value at the newest certified snapshot."""
        certified = [snapshot for snapshot in self._ring if self._certified(snapshot)]
        average = self._watch.average
        if not certified or average is None:
            return False
        then = certified[-1]
        if (
            then.generation != self._watch.generation
            or then.average is None
            or then.deviation is None
            or then.average <= 0.0
        ):
            return False
        threshold = max(math.log(self.config.ema_ratio), EXCESS_SIGMAS * then.deviation)
        return average > then.average * math.exp(threshold)

    def _close_incident(self) -> None:
        """An incident is over once as many batches as certify a snapshot were accepted beyond the replayed ones."""
        if self._rung:
            self._steps_to_close -= 1
            if self._steps_to_close <= 0 and not self._skip_window:
                self._rung = 0
                self._refused.clear()
                self._replay.clear()

    # Snapshots and the return to them.

    def _certified(self, snapshot: _Snapshot) -> bool:
        return snapshot.clean_steps >= self.config.certify_steps

    def _eligible(self, suspicion: _Suspicion) -> list[_Snapshot]:
        """Certified snapshots old enough for this suspicion, newest first."""
        latest = suspicion.first_position - self.config.suspect_margin
        return [
            snapshot for snapshot in reversed(self._ring) if self._certified(snapshot) and snapshot.position <= latest
        ]

    def _choose(self, suspicion: _Suspicion | None, rung: int) -> _Snapshot:
        # Non-finite parameters may have to be returned to a snapshot that is not certified: its values are at least finite.
        eligible = (self._eligible(suspicion) if suspicion is not None else []) or self._ring[::-1]
        older = [snapshot for snapshot in eligible if snapshot.position < self._last_position]
        return older[0] if suspicion is not None and rung > 1 and older else eligible[0]

    def _evict(self) -> None:
        """Free a slot: the oldest, unless it is the only certified one; then the newest, so that the others grow old enough."""
        certified = [snapshot for snapshot in self._ring if self._certified(snapshot)]
        only_hope = len(certified) == 1 and certified[0] is self._ring[0]
        self._forget([self._ring[-1] if only_hope or not certified else self._ring[0]])

    def _forget(self, snapshots: Sequence[_Snapshot]) -> None:
        gone = list(snapshots)
        self._spare.extend(snapshot.state for snapshot in gone)
        self._ring = [snapshot for snapshot in self._ring if snapshot not in gone]

    def _plan_replay(self, suspicion: _Suspicion | None, chosen: _Snapshot, rung: int) -> None:
        """Decide which batches the replay from `chosen` leaves out."""
        self._refused.clear()
        self._replay.clear()
        self._skip_window = 0
        self._last_position = chosen.position
        if suspicion is None:
            return
        self._rung = rung
        before = [
            (position, key)
            for position, key in self._accepted
            if chosen.position < position <= suspicion.first_position
        ]
        previous = [key for _, key in before[-1:]]
        self._refused.update(key for key in dict.fromkeys([*suspicion.batches, *previous]) if key)
        self._replay.update(key for _, key in before if key and key not in self._refused)
        self._steps_to_close = len(before) + self.config.certify_steps
        if rung >= 2:
            self._skip_window = min(2**rung, self.config.max_skip_window)
        if rung >= 3:
            self._rewarm_left = self.config.rewarm_steps

    def _return_to(self, chosen: _Snapshot) -> None:
        self._forget([snapshot for snapshot in self._ring if snapshot.position > chosen.position])
        self._accepted = [entry for entry in self._accepted if entry[0] <= chosen.position]
        chosen.state.restore(self._model, self._optimizer, self._parts)
        self._watch.load_state_dict(chosen.watch)
        self._before = self._capture_before(self._before)
        self._awaiting_forward = True

    # The moment before the forward pass.

    def _capture_before(self, slot: _BeforeForward | None) -> _BeforeForward:
        return _BeforeForward(
            random=capture_random_state(),
            buffers=copy_buffers(self._model, slot.buffers if slot else {}),
            parts={name: copy_tree(part.state_dict()) for name, part in self._extra.items()},
        )

    def _forward_begins(self) -> None:
        if self._awaiting_forward and self._model.training:
            self.begin_step()

    def _undo_forward(self) -> None:
        drop_gradients(self._model, self._optimizer)
        restore_buffers(self._model, self._before.buffers)
        for name, part in self._extra.items():
            part.load_state_dict(return_tree(None, self._before.parts[name]))
        restore_random_state(self._before.random)

    # The learning rate of the third rung: changed only inside `optimizer.step`, so that a schedule never compounds it.

    def _lower_rates(self) -> None:
        self._return_rates()  # an optimizer step that raised left them low
        share = self.learning_rate_share
        if share < 1.0:
            self._scheduled_rates = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * share

    def _return_rates(self) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._scheduled_rates, strict=False):
            group["lr"] = rate
        self._scheduled_rates = []

    def _parameters_finite(self) -> bool:
        return all_finite(list(trained_parameters(self._model, self._optimizer)))

    def _log(
        self,
        *,
        kind: Literal["nonfinite", "spike", "replay", "rollback", "rebaseline", "refused_snapshot", "diverged"],
        action: Literal["skip", "rollback", "none", "stop"],
        reason: str,
        sample_ids: BatchKey = (),
        loss: float | None = None,
        grad_norm: float | None = None,
        loss_z: float | None = None,
        grad_norm_z: float | None = None,
        returned_to: int | None = None,
        rung: int | None = None,
    ) -> None:
        self.incidents.append(
            Incident(
                kind=kind,
                check=self._checks,
                action=action,
                reason=reason,
                sample_ids=sample_ids,
                loss=loss,
                grad_norm=grad_norm,
                loss_z=loss_z,
                grad_norm_z=grad_norm_z,
                returned_to=returned_to,
                rung=rung,
            )
        )


class _ForwardWatch:
    """Forward-pre hook that tells a `RecoveryStep` of a forward pass. A copied or pickled model carries one that does nothing."""

    def __init__(self, owner: RecoveryStep | None = None) -> None:
        self._owner = weakref.ref(owner) if owner is not None else lambda: None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        owner = self._owner()
        if owner is not None:
            owner._forward_begins()

    def __reduce__(self) -> tuple[type[_ForwardWatch], tuple[()]]:
        return _ForwardWatch, ()


class _StepWatch:
    """Optimizer-step hook that calls one method of a `RecoveryStep`, as long as that lives."""

    def __init__(self, owner: RecoveryStep | None = None, method: Callable[[RecoveryStep], None] | None = None) -> None:
        self._owner = weakref.ref(owner) if owner is not None else lambda: None
        self._method = method

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owner = self._owner()
        if owner is not None and self._method is not None:
            self._method(owner)

    def __reduce__(self) -> tuple[type[_StepWatch], tuple[()]]:
        return _StepWatch, ()


def _batch_key(sample_ids: Iterable[Hashable]) -> BatchKey:
    listed = sample_ids.tolist() if isinstance(sample_ids, Tensor) else sample_ids
    return tuple(str(sample_id) for sample_id in listed)


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _require(config: RecoveryConfig, names: Sequence[str], holds: Callable[[Any], bool], expected: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not holds(value):
            raise ValueError(f"{name}: expected {expected}, found {value}")
