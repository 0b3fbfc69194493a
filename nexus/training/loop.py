"""The distillation loop: batches and teacher targets in, optimizer steps out. Knows no actor; targets come through a Protocol.

While the student trains on one draw, the targets of the next `window` draws are being made. They are collected in draw order, so
the weights do not depend on which teacher was faster, or was killed and asked again. Every step passes the recovery check before
the optimizer; a skipped draw costs no optimizer step, so a run always makes `steps` of them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nexus.adapters.base import Adapter
from nexus.errors import ConfigError
from nexus.student.memory import NexusStudent
from nexus.towers.targets import ScoreRequest, TeacherHead, TeacherTargets
from nexus.training.batches import Assignment, StepBatch, StepBatches
from nexus.training.loss import GradientSurgeryLoss, SurgeryLoss, apply_surgery
from nexus.training.objective import DistillationObjective, TeacherLoss
from nexus.training.optimizer import MuonAdamW, hidden_matrices
from nexus.training.recovery import RecoveryConfig, RecoveryStep, SampleQuarantine
from nexus.training.scheduler import LearningRateSchedule, cosine_decay
from nexus.training.snapshot import Stateful

ADAM_BETAS = (0.9, 0.95)
"""The second decay of language-model training (GPT-3, LLaMA): the variance follows a spike within 20 steps instead of 1,000."""
FINAL_RATE_FRACTION = 0.02
"""Of the peak, at the last step: a short run gains most of its accuracy while the rate falls."""


class TargetSource(Protocol):
    """Where targets come from: a pool of teacher actors, or teachers in this process."""

    def submit(self, key: Hashable, teacher: str, request: ScoreRequest) -> None:
        """Begin to make the targets of `request`."""
        ...

    def collect(self, key: Hashable) -> TeacherTargets:
        """Wait for the targets under `key`."""
        ...

    def head(self, teacher: str) -> TeacherHead:
        """A language teacher's output head, for its `hidden` targets."""
        ...

    def forget(self) -> None:
        """Drop everything in flight."""
        ...


@dataclass(frozen=True)
class Spike:
    """A fault to inject, for seeing the recovery at work."""

    draw: int
    kind: Literal["nan", "scale"]
    factor: float


def parse_spike(text: str) -> Spike:
    """`STEP:nan` or `STEP:x50`.

    Raises:
        ConfigError: when `text` is neither.
    """
    match = re.fullmatch(r"(\d+):(?:(nan)|x(\d+(?:\.\d+)?))", text)
    if match is None:
        raise ConfigError(
            f"Expected --inject-spike STEP:nan or STEP:xFACTOR, found {text!r}. Example: --inject-spike 50:x50"
        )
    draw, is_nan, factor = match.groups()
    return Spike(int(draw), "nan" if is_nan else "scale", math.nan if is_nan else float(factor))


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of the run's configuration; see `nexus.config.DistillConfig` for meanings."""

    steps: int
    optimizer: Literal["adamw", "muon"]
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    grad_clip: float
    gold_weight: float
    anchor_start: float
    anchor_end: float
    window: int
    snapshot_every: int
    checkpoint_every: int
    surgery_method: Literal["none", "upgrad", "pcgrad"]
    surgery_every: int
    seed: int


@dataclass(frozen=True)
class StepReport:
    """What one draw did; `step` counts optimizer steps before it."""

    step: int
    draw: int
    action: Literal["step", "skip", "rollback"]
    losses: Mapping[str, float]
    """l_t of each teacher, unpenalised."""
    kd: Mapping[str, float]
    anchor: Mapping[str, float]
    coefficients: Mapping[str, float]
    gold: float | None
    total: float
    grad_norm: float
    learning_rate: float
    rows: int
    wait_s: float
    """Seconds spent waiting for targets."""
    restored_step: int | None
    """After a rollback: the step that training continues from."""


@dataclass(frozen=True)
class _Losses:
    total: Tensor
    per_teacher: dict[str, Tensor]
    kd: dict[str, float]
    anchor: dict[str, float]
    gold: Tensor | None
    combined: SurgeryLoss | None


class DistillationLoop:
    """Trains the objective's student; `run` may be left and entered again at any step."""

    def __init__(
        self,
        objective: DistillationObjective,
        batches: StepBatches,
        source: TargetSource | None,
        *,
        importance: Mapping[str, float],
        surgery: GradientSurgeryLoss | None,
        recovery: RecoveryConfig,
        quarantine: SampleQuarantine,
        settings: LoopSettings,
        spike: Spike | None = None,
    ) -> None:
        """Without teachers (`importance` empty, `source` and `surgery` None) only the labelled rows train the student."""
        self.objective = objective
        self.batches = batches
        self.settings = settings
        self.step = 0
        self._source = source
        self._importance = dict(importance)
        self._surgery = surgery
        self._spike = spike
        self._asked = 0
        """Draws ahead whose targets have been asked for."""
        self.optimizer = _optimizer(objective, settings)
        self.scheduler = LearningRateSchedule(
            self.optimizer,
            warmup_steps=settings.warmup_steps,
            total_steps=settings.steps,
            final_fraction=FINAL_RATE_FRACTION,
        )
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._parts: dict[str, Stateful] = {
            f"standardiser.{key}": part for key, part in objective.standardisers.items()
        }
        self._parts["generator"] = _GeneratorState(self._generator)
        if surgery is not None:
            self._parts["surgery"] = surgery
        self.recovery = RecoveryStep(
            objective,
            self.optimizer,
            scheduler=self.scheduler,
            data=batches,
            config=recovery,
            extra=self._parts,
            quarantine=quarantine,
        )

    def run(
        self, *, on_report: Callable[[StepReport], None], should_stop: Callable[[], bool], save: Callable[[], None]
    ) -> bool:
        """Train to the last step; True when it was reached, False when `should_stop` ended it. `save` writes a checkpoint.

        Raises:
            TrainingDivergedError: when the recovery ladder is exhausted; the last good state is in place and saved.
        """
        self.objective.train()
        saved = self.step
        while self.step < self.settings.steps:
            if should_stop():
                if self.step != saved:
                    save()
                return False
            steps = self.recovery.snapshot_steps
            if not steps or (self.step % self.settings.snapshot_every == 0 and self.step not in steps):
                self.recovery.snapshot(self.step)
            report = self.advance()
            on_report(report)
            if report.action == "step" and self.step % self.settings.checkpoint_every == 0:
                save()
                saved = self.step
        if self.step != saved:
            save()
        return True

    def advance(self) -> StepReport:
        """Train on the next draw, or skip it, or roll back."""
        batch = self.batches.peek(0)
        start = time.perf_counter()
        targets = self._targets(batch)
        wait_s = time.perf_counter() - start
        self.recovery.begin_step()
        losses = self._losses(batch, targets)
        total = self._with_spike(losses.total, batch.draw)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward(retain_graph=self._operates)
        self._operate(losses)
        grad_norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.settings.grad_clip)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        action = self.recovery.check(total.detach(), grad_norm, batch.sample_ids)
        step = self.step
        restored = None
        if action != "step":
            self.batches.excluded = self.recovery.quarantine.confirmed
        if action == "rollback":
            restored = self.step = self.recovery.rollback()
            self._forget()
        else:
            if action == "step":
                self._step()
            self.batches.advance()
            self._asked -= 1
        return StepReport(
            step=step,
            draw=batch.draw,
            action=action,
            losses={teacher: float(loss.detach()) for teacher, loss in losses.per_teacher.items()},
            kd=losses.kd,
            anchor=losses.anchor,
            coefficients={} if losses.combined is None else losses.combined.coefficients,
            gold=None if losses.gold is None else float(losses.gold.detach()),
            total=float(total.detach()),
            grad_norm=float(grad_norm),
            learning_rate=learning_rate,
            rows=len(batch.sample_ids),
            wait_s=wait_s,
            restored_step=restored,
        )

    def _step(self) -> None:
        warming_up, phase = self._warming_up, self.scheduler.phase
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        if (self._warming_up, self.scheduler.phase) != (warming_up, phase):
            # The level of the loss is about to change for a known reason.
            self.recovery.rebaseline("the learning rate's phase or the teachers' baselines changed")

    @property
    def _warming_up(self) -> bool:
        return self._surgery is not None and self._surgery.warming_up

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights: plain values and tensors, for `load_state_dict` of a loop built alike."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "recovery": self.recovery.state_dict(),
            "batches": self.batches.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; the weights are the caller's to load."""
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.recovery.load_state_dict(state["recovery"])
        self.batches.load_state_dict(state["batches"])
        self.batches.excluded = self.recovery.quarantine.confirmed
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["rng"])
        self._forget()

    # --- targets --------------------------------------------------------------------------------------------------------------

    def _targets(self, batch: StepBatch) -> dict[Assignment, TeacherTargets | None]:
        """Targets of `batch`, after asking for those of the draws behind it."""
        while self._asked <= self.settings.window:
            self._ask(self.batches.peek(self._asked))
            self._asked += 1
        return {
            assignment: self._source.collect(_key(batch, assignment))
            if self._source is not None and self.objective.request(assignment, records) is not None
            else None
            for assignment, records in batch.unlabelled.items()
        }

    def _ask(self, batch: StepBatch) -> None:
        for assignment, records in batch.unlabelled.items():
            request = self.objective.request(assignment, records)
            if self._source is not None and request is not None:
                self._source.submit(_key(batch, assignment), assignment.teacher, request)

    def _forget(self) -> None:
        self._asked = 0
        if self._source is not None:
            self._source.forget()

    # --- losses ---------------------------------------------------------------------------------------------------------------

    def _losses(self, batch: StepBatch, targets: Mapping[Assignment, TeacherTargets | None]) -> _Losses:
        settings = self.settings
        gamma = cosine_decay(settings.anchor_start, settings.anchor_end, self.step, settings.steps)
        parts: dict[str, list[TeacherLoss]] = {}
        for assignment, records in batch.unlabelled.items():
            if records:
                loss = self.objective.teacher_loss(assignment, records, targets[assignment])
                parts.setdefault(assignment.teacher, []).append(loss)
        kd = {teacher: torch.stack([loss.kd for loss in losses]).mean() for teacher, losses in parts.items()}
        anchor = {teacher: torch.stack([loss.anchor for loss in losses]).mean() for teacher, losses in parts.items()}
        per_teacher = {teacher: kd[teacher] + gamma * anchor[teacher] for teacher in parts}
        labelled = {capability: rows for capability, rows in batch.labelled.items() if rows}
        gold = self.objective.gold_loss(labelled) if labelled else None
        combined = self._surgery(per_teacher) if self._surgery is not None and per_teacher else None
        terms = [] if combined is None else [combined.loss]
        if gold is not None and settings.gold_weight:
            terms.append(settings.gold_weight * gold)
        if not terms:
            raise ConfigError(
                "Expected teachers or labelled rows with gold_weight above 0, found neither: nothing would train the student. "
                "Add one of them."
            )
        return _Losses(
            total=torch.stack(terms).sum(),
            per_teacher=per_teacher,
            kd={teacher: float(value.detach()) for teacher, value in kd.items()},
            anchor={teacher: float(value.detach()) for teacher, value in anchor.items()},
            gold=gold,
            combined=combined,
        )

    def _with_spike(self, total: Tensor, draw: int) -> Tensor:
        if self._spike is None or self._spike.draw != draw:
            return total
        return total * self._spike.factor

    @property
    def _operates(self) -> bool:
        return self.settings.surgery_method != "none" and self.step % self.settings.surgery_every == 0

    def _operate(self, losses: _Losses) -> None:
        """Replace the adapters' and trunk's gradient by its surgery, on the steps that it is due."""
        if not self._operates or losses.combined is None or self._surgery is None:
            return
        assert self.settings.surgery_method != "none"
        student = self.objective.student
        shared = [*student.core.parameters(), *student.adapters.parameters()]
        # The labelled rows' gradient takes no part in the surgery; it is added to what the surgery writes.
        gold = None
        if losses.gold is not None and self.settings.gold_weight:
            gold = torch.autograd.grad(
                self.settings.gold_weight * losses.gold, shared, retain_graph=True, allow_unused=True
            )
        apply_surgery(
            losses.per_teacher,
            losses.combined,
            self._surgery.baselines,
            shared,
            method=self.settings.surgery_method,
            generator=self._generator,
        )
        for parameter, gradient in zip(shared, gold or (), strict=False):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient


class _GeneratorState:
    """A torch generator as a part of the training state: the order of PCGrad's projections is drawn from it."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> Tensor:
        return self._generator.get_state()

    def load_state_dict(self, state: Tensor) -> None:
        self._generator.set_state(state)


def _key(batch: StepBatch, assignment: Assignment) -> Hashable:
    return (batch.draw, str(assignment))


def _optimizer(objective: DistillationObjective, settings: LoopSettings) -> torch.optim.Optimizer:
    matrices = _hidden_matrices(objective.student) if settings.optimizer == "muon" else []
    taken = {id(matrix) for matrix in matrices}
    rest = [p for p in objective.parameters() if p.requires_grad and id(p) not in taken]
    # Matrices decay; gains, biases and gates do not: pulling a norm's gain to 0 is no regularisation.
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    rates: dict[str, Any] = {"lr": settings.learning_rate, "betas": ADAM_BETAS}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, foreach=True, **rates)
    return MuonAdamW(matrices, groups, weight_decay=settings.weight_decay, **rates)


def _hidden_matrices(student: NexusStudent) -> list[nn.Parameter]:
    """Those of the trunk's layers and ports and of the adapters, but for the maps to the teachers' spaces, which are heads."""
    adapters = [adapter for adapter in student.adapters.values() if isinstance(adapter, Adapter)]
    heads = {id(parameter) for adapter in adapters for parameter in adapter.alignments.parameters()}
    found = hidden_matrices((student.core.layers, student.core.ports, *adapters))
    return [matrix for matrix in found if id(matrix) not in heads]
