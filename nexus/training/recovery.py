"""Finding a bad batch before it reaches the optimizer, and returning to a good state when one got through.

Detectors watch x_L = log(loss) and x_G = log(gradient norm before clipping). Over a window of accepted values,
z = (x - median) / max(1.4826 MAD, floor); z > 6 for either of them flags the step (see `spikes`).

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

import math
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nexus.errors import TrainingDivergedError
from nexus.training.recovery_config import RecoveryConfig
from nexus.training.sample_quarantine import BatchKey, SampleQuarantine
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
from nexus.training.spikes import SpikeDetector, Watch

__all__ = ["Incident", "RecoveryConfig", "RecoveryStep", "SampleQuarantine", "Stateful"]

Action = Literal["step", "skip", "rollback"]
IncidentKind = Literal["nonfinite", "spike", "replay", "rollback", "rebaseline", "refused_snapshot", "diverged"]

LOSS_MINIMUM = 1e-8
GRAD_NORM_MINIMUM = 1e-12
"""Below these a logarithm measures rounding."""

MODEST_JUMP = 1.0
"""Log ratio (a factor of 2.7) up to which 16 flags in a row look like a new regime; beyond it, like a burst, and twice as many are
waited for. A burst of 20 steps is refused whole, a loss that is 1.5 times higher for good costs 16 steps."""

EXCESS_SIGMAS = 2.0
"""The slow-divergence rule asks for an excess of this many step-to-step deviations of the log loss too: a moving average of 10 steps
strays by a quarter of one by chance, and where losses differ widely between batches 15 % is no divergence."""


@dataclass(frozen=True)
class Incident:
    """One entry of the incident log: a decision that was not "step"."""

    kind: IncidentKind
    """"replay" is a batch that was left out because an earlier rollback said so."""

    action: Literal["skip", "rollback", "none", "stop"]

    reason: str

    check: int
    """Number of `check` calls made before the decision; never goes back."""

    sample_ids: BatchKey = ()

    loss: float | None = None

    grad_norm: float | None = None

    loss_z: float | None = None
    """z of the log loss; None while the detector warms up, and where no detector was asked."""

    grad_norm_z: float | None = None

    returned_to: int | None = None
    """The step of the snapshot that a rollback returned to."""

    rung: int | None = None
    """How often the incident has been rolled back."""


@dataclass(frozen=True)
class _Observation:
    """What `check` was told, and what the detectors make of it."""

    loss: float
    grad_norm: float
    key: BatchKey
    loss_z: float | None = None
    grad_norm_z: float | None = None


@dataclass(eq=False)
class _Snapshot:
    """A slot of the ring."""

    state: TrainingState
    step: int
    position: int
    generation: int
    average: float
    deviation: float | None
    """Of the log loss from step to step; None if the detector was still warming up."""
    watch: dict[str, Any]
    clean_steps: int = 0


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
        stepped: further parts that change only where the optimizer steps, such as an average of the weights; of any size.
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
        stepped: Mapping[str, Stateful] | None = None,
        quarantine: SampleQuarantine | None = None,
    ) -> None:
        self.config = config
        self.quarantine = SampleQuarantine() if quarantine is None else quarantine
        self.incidents: list[Incident] = []
        self._model = model
        self._optimizer = optimizer
        self._extra = dict(extra or {})
        self._parts: dict[str, Stateful] = {f"extra.{name}": part for name, part in self._extra.items()}
        self._parts |= {f"stepped.{name}": part for name, part in (stepped or {}).items()}
        if scheduler is not None:
            self._parts["scheduler"] = scheduler
        if data is not None:
            self._parts["data"] = data
        self._watch = Watch(
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
        model.register_forward_pre_hook(_Hook(self, RecoveryStep._forward_begins))
        optimizer.register_step_pre_hook(_Hook(self, RecoveryStep._lower_rates))
        optimizer.register_step_post_hook(_Hook(self, RecoveryStep._return_rates))

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
        observed = _Observation(_number(loss), _number(grad_norm), _batch_key(sample_ids))
        self._checks += 1
        self._suspicion = None
        action = self._judge(observed)
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
            self._log("refused_snapshot", "none", "parameters or moments are not finite")
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
            self._log("diverged", "stop", reason, returned_to=chosen.step, rung=rung)
            raise TrainingDivergedError(
                f"Expected at most {self.config.max_rollbacks} rollbacks in {self.config.budget_steps} steps, found one more. "
                f"The state of step {chosen.step} has been kept; lower the learning rate or look at the quarantined samples."
            )
        self._rollback_checks = [*recent, self._checks]
        self._plan_replay(suspicion, chosen, rung)
        self._return_to(chosen)
        reason = "asked for by the trainer" if suspicion is None else suspicion.reason
        self._log("rollback", "rollback", reason, returned_to=chosen.step, rung=self._rung)
        return chosen.step

    def rebaseline(self, reason: str) -> None:
        """Start the detectors anew: the level of the loss is about to change for a known reason.

        Call it when the teacher mix, the batch size, the phase of the schedule or the weight of a loss term changes.
        """
        watch = self._watch
        watch.losses.clear()
        watch.grad_norms.clear()
        watch.recent.clear()
        watch.streak.clear()
        watch.average, watch.num_averaged, watch.drift = 0.0, 0, 0
        watch.generation += 1
        self._log("rebaseline", "none", reason)

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

    def _judge(self, observed: _Observation) -> Action:
        watch = self._watch
        if not self._parameters_finite():
            return self._corrupted(observed)
        if self._refuses(observed.key):
            self._log("replay", "skip", "named by a rollback", observed)
            return "skip"
        if not (math.isfinite(observed.loss) and math.isfinite(observed.grad_norm)):
            watch.nonfinite_streak += 1
            if watch.nonfinite_streak >= self.config.max_nonfinite:
                self._undo_forward()
                self._log("diverged", "stop", "nothing finite is coming", observed)
                raise TrainingDivergedError(
                    f"Expected finite losses and gradients, found {watch.nonfinite_streak} steps in a row without; none of them was "
                    "taken. Lower the learning rate or look at the quarantined samples."
                )
            return self._flag("nonfinite", "loss or gradient is not finite", observed)
        watch.nonfinite_streak = 0
        log_loss = math.log(max(observed.loss, LOSS_MINIMUM))
        log_norm = math.log(max(observed.grad_norm, GRAD_NORM_MINIMUM))
        observed = replace(observed, loss_z=watch.losses.score(log_loss), grad_norm_z=watch.grad_norms.score(log_norm))
        leaps = watch.losses.leaps(log_loss) or watch.grad_norms.leaps(log_norm)
        if max(observed.loss_z or 0.0, observed.grad_norm_z or 0.0) <= self.config.threshold and not leaps:
            return self._accept(observed, log_loss, log_norm)
        jump = max(watch.losses.excess(log_loss), watch.grad_norms.excess(log_norm))
        watch.streak.append((jump, observed.key))
        if self._is_new_regime():
            self._log("spike", "skip", "loss or gradient norm above its window", observed)
            self.quarantine.acquit([key for _, key in watch.streak])
            self.rebaseline(f"{len(watch.streak)} flags in a row")
            return "skip"
        return self._flag("spike", "loss or gradient norm above its window", observed)

    def _is_new_regime(self) -> bool:
        """True once flags in a row are too many for a burst."""
        streak = self._watch.streak
        jump = float(np.median([jump for jump, _ in streak]))
        return len(streak) >= self.config.rebaseline_after * (1 if jump <= MODEST_JUMP else 2)

    def _corrupted(self, observed: _Observation) -> Action:
        """Parameters that are not finite: whatever the loss says, only a snapshot helps."""
        reason = "parameters are not finite"
        if not self._ring:
            self._log("diverged", "stop", reason, observed)
            raise TrainingDivergedError(
                "Expected finite parameters, found nan or inf after an optimizer step, and no snapshot to return to. "
                "Call snapshot(step) before training and every 50 steps."
            )
        self._log("nonfinite", "rollback", reason, observed)
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

    def _flag(self, kind: Literal["nonfinite", "spike"], reason: str, observed: _Observation) -> Action:
        watch = self._watch
        watch.recent.append((True, watch.position, observed.key))
        self.quarantine.add(observed.key)
        flagged = [(position, batch) for was_flagged, position, batch in watch.recent if was_flagged]
        suspicion = _Suspicion(
            f"{len(flagged)} of the last {len(watch.recent)} steps were flagged",
            flagged[0][0],
            tuple(batch for _, batch in flagged),
        )
        action: Literal["skip", "rollback"] = "skip"
        if len(flagged) >= self.config.flags_to_rollback and self._eligible(suspicion):
            self._suspicion, action = suspicion, "rollback"
        self._log(kind, action, reason, observed)
        return action

    def _accept(self, observed: _Observation, log_loss: float, log_norm: float) -> Action:
        watch = self._watch
        watch.losses.accept(log_loss)
        watch.grad_norms.accept(log_norm)
        watch.recent.append((False, watch.position, observed.key))
        watch.streak.clear()
        watch.position += 1
        watch.follow(observed.loss, self.config.ema_decay)
        if not self._ring:
            self._accepted.clear()  # without a snapshot nothing will be replayed
        self._accepted.append((watch.position, observed.key))
        self._rewarm_left = max(0, self._rewarm_left - 1)
        self._close_incident()
        if not self._drifting():
            watch.drift = 0
            for snapshot in self._ring:
                snapshot.clean_steps += 1
            return "step"
        watch.drift += 1
        began = watch.position - watch.drift
        first = tuple(key for position, key in self._accepted if position == began + 1)
        suspicion = _Suspicion(f"the loss stayed high for {watch.drift} steps", began, first)
        if watch.drift < self.config.ema_steps or not self._eligible(suspicion):
            return "step"
        self._suspicion = suspicion
        self._log("spike", "rollback", suspicion.reason, observed)
        return "rollback"

    def _drifting(self) -> bool:
        """True if the moving average of the loss is too far above its value at the newest certified snapshot."""
        watch = self._watch
        certified = [snapshot for snapshot in self._ring if self._certified(snapshot)]
        if not certified:
            return False
        then = certified[-1]
        if then.deviation is None or then.generation != watch.generation or then.average <= 0.0:
            return False
        threshold = max(math.log(self.config.ema_ratio), EXCESS_SIGMAS * then.deviation)
        return watch.average > then.average * math.exp(threshold)

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
        kind: IncidentKind,
        action: Literal["skip", "rollback", "none", "stop"],
        reason: str,
        observed: _Observation | None = None,
        *,
        returned_to: int | None = None,
        rung: int | None = None,
    ) -> None:
        incident = Incident(kind, action, reason, self._checks, returned_to=returned_to, rung=rung)
        if observed is not None:
            incident = replace(
                incident,
                sample_ids=observed.key,
                loss=observed.loss,
                grad_norm=observed.grad_norm,
                loss_z=observed.loss_z,
                grad_norm_z=observed.grad_norm_z,
            )
        self.incidents.append(incident)


class _Hook:
    """Calls one method of a `RecoveryStep` as long as that lives. A model that is copied or pickled carries one that does nothing."""

    def __init__(self, owner: RecoveryStep | None = None, method: Callable[[RecoveryStep], None] | None = None) -> None:
        self._owner = weakref.ref(owner) if owner is not None else None
        self._method = method

    def __call__(self, *_: object) -> None:
        owner = self._owner() if self._owner is not None else None
        if owner is not None and self._method is not None:
            self._method(owner)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _batch_key(sample_ids: Iterable[Hashable]) -> BatchKey:
    listed = sample_ids.tolist() if isinstance(sample_ids, Tensor) else sample_ids
    return tuple(str(sample_id) for sample_id in listed)


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
