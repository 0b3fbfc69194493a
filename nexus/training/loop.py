"""The distillation loop: batches and teacher targets in, optimizer steps out. Knows no actor; targets come through a Protocol.

While the student trains on one step's draws, the targets of the next `window` steps are being made. They are collected in draw
order, so the weights do not depend on which teacher was faster, or was killed and asked again. Every step passes the recovery check
before the optimizer; a skipped one costs no optimizer step, so a run always makes `steps` of them.

A step takes `accumulate` draws, each a micro-batch of its own. Every loss is a sum over its scored tokens divided by those of the
whole step, and each teacher's gradient is added up before the teachers are combined: the step equals that of one large batch.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nexus.adapters.base import Adapter
from nexus.config import Optimizer
from nexus.data.records import Record
from nexus.errors import ConfigError, TrainingDivergedError
from nexus.student.memory import NexusStudent
from nexus.towers.targets import ScoreRequest, TeacherHead, TeacherTargets
from nexus.training.average import WeightAverage
from nexus.training.batches import Assignment, StepBatch, StepBatches
from nexus.training.loss import GradientSurgeryLoss, SurgeryLoss
from nexus.training.objective import DistillationObjective, Whole
from nexus.training.optimizer import MuonAdamW, hidden_matrices
from nexus.training.recovery import RecoveryConfig, RecoveryStep, SampleQuarantine
from nexus.training.scheduler import LearningRateSchedule, ScheduleKind, cosine_decay, ramp_share
from nexus.training.snapshot import Stateful
from nexus.training.teacher_gradients import (
    SurgeryMethod,
    SurgeryOutcome,
    SurgerySteps,
    TeacherGradients,
    backward_in_parts,
)

ADAM_BETAS = (0.9, 0.95)
"""The second decay of language-model training (GPT-3, LLaMA): the variance follows a spike within 20 steps instead of 1,000."""


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

    step: int
    """Attempts at a step before the one that it spoils; those that were left out count, so that it strikes once."""
    kind: Literal["nan", "scale"]
    factor: float


def parse_spike(text: str, *, steps: int) -> Spike:
    """`STEP:nan` or `STEP:x50`, in a run of `steps`.

    Raises:
        ConfigError: when `text` is neither, or would spoil nothing.
    """
    match = re.fullmatch(r"(\d+):(?:(nan)|x(\d+(?:\.\d+)?))", text)
    if match is None:
        raise ConfigError(
            f"Expected --inject-spike STEP:nan or STEP:xFACTOR, found {text!r}. Example: --inject-spike 50:x50"
        )
    step, is_nan, factor = match.groups()
    spike = Spike(int(step), "nan" if is_nan else "scale", math.nan if is_nan else float(factor))
    if spike.step >= steps:
        raise ConfigError(
            f"Expected --inject-spike at a step below distill.steps, {steps}, found {spike.step}. Choose an earlier one."
        )
    if spike.factor <= 1.0:
        raise ConfigError(f"Expected --inject-spike STEP:xFACTOR with a factor above 1, found {text!r}. Try STEP:x50.")
    return spike


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of the run's configuration; see `nexus.config.DistillConfig` for meanings."""

    steps: int
    optimizer: Optimizer
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
    surgery_method: SurgeryMethod
    surgery_every: int
    seed: int
    # What a loop in a notebook or a benchmark need not choose.
    schedule: ScheduleKind = "cosine"
    final_rate: float = 0.02
    decay_share: float = 0.2
    accumulate: int = 1
    ema_decay: float | None = None
    surgery_subset: Literal["adapters_and_trunk", "adapters", "trunk"] = "adapters_and_trunk"
    ramps: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Teacher -> (first step, steps over which its importance rises from 0); others take part in full from the start."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step, or the attempt at it, did; `step` counts optimizer steps before it."""

    step: int
    draw: int
    """The first of its draws."""
    action: Literal["step", "skip", "rollback"]
    losses: Mapping[str, float]
    """l_t of each teacher, unpenalised."""
    kd: Mapping[str, float]
    anchor: Mapping[str, float]
    coefficients: Mapping[str, float]
    excluded: tuple[str, ...]
    """Teachers whose loss was nan or inf and took no part."""
    surgery: SurgeryOutcome | None
    """What surgery found, on the steps that it was due."""
    gold: float | None
    total: float
    grad_norm: float
    learning_rate: float
    rows: int
    tokens: Mapping[str, int]
    """Scored for each teacher that took part (`TeacherLoss.tokens`)."""
    aligned: Mapping[str, float]
    """The share of them in spans that both tokenizers cut out, for teachers of another tokenizer that are compared span by span."""
    anchor_weight: float
    """Of `anchor` in `losses`: gamma, which decays."""
    shares: Mapping[str, float]
    """Of its importance that each teacher of `LoopSettings.ramps` had; 0 before it takes part."""
    wait_s: float
    """Seconds spent waiting for targets."""
    restored_step: int | None
    """After a rollback: the step that training continues from."""


@dataclass(frozen=True)
class _Parts:
    """One draw's shares of the losses of its step; they add up to the step's."""

    kd: dict[str, Tensor]
    anchor: dict[str, Tensor]
    per_teacher: dict[str, Tensor]
    gold: Tensor | None


@dataclass(frozen=True)
class _Sizes:
    """What the losses of a step are divided by, over all its draws."""

    teachers: dict[Assignment, Whole]
    labelled: dict[str, int]


@dataclass(frozen=True)
class _Step:
    """The losses of one optimizer step, whose gradient is in place."""

    total: Tensor
    per_teacher: dict[str, float]
    kd: dict[str, float]
    anchor: dict[str, float]
    gold: float | None
    combined: SurgeryLoss | None
    outcome: SurgeryOutcome | None


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
        self._tokens: Counter[str] = Counter()
        """Scored in this step, by teacher."""
        self._aligned: defaultdict[str, float] = defaultdict(float)
        """Those of them in spans that both tokenizers cut out, for teachers of another tokenizer that are compared."""
        self._awaited: set[Hashable] = set()
        """Keys of the targets that were asked for and not collected yet."""
        self.optimizer = _optimizer(objective, settings)
        self.scheduler = LearningRateSchedule(
            self.optimizer,
            warmup_steps=settings.warmup_steps,
            total_steps=settings.steps,
            final_fraction=settings.final_rate,
            decay_share=settings.decay_share,
            kind=settings.schedule,
        )
        self._parts: dict[str, Stateful] = {
            f"standardiser.{key}": part for key, part in objective.standardisers.items()
        }
        if surgery is not None:
            self._parts["surgery"] = surgery
        self._shared, self._others = _surgery_subset(objective, settings)
        self._one_by_one = settings.surgery_subset != "adapters_and_trunk"
        """Whether a step between two plans differentiates each teacher's loss by itself. Where the parameters outside the subset lie
        in the trunk too, two passes over one graph would take half a step more; one over each teacher's graph takes nothing more."""
        self._operation: SurgerySteps | None = None
        if settings.surgery_method != "none" and surgery is not None:
            self._operation = SurgerySteps(settings.surgery_method, every=settings.surgery_every, seed=settings.seed)
            self._parts["operation"] = self._operation
        self.average: WeightAverage | None = None
        if settings.ema_decay is not None:
            self.average = WeightAverage(objective, decay=settings.ema_decay)
        self.recovery = RecoveryStep(
            objective,
            self.optimizer,
            scheduler=self.scheduler,
            data=batches,
            config=recovery,
            extra=self._parts,
            stepped={} if self.average is None else {"average": self.average},
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
        """Train on the draws of one step, or skip them, or roll back."""
        batches = [self.batches.peek(ahead) for ahead in range(self.settings.accumulate)]
        sample_ids = tuple(sample_id for batch in batches for sample_id in batch.sample_ids)
        start = time.perf_counter()
        targets = [self._targets(batch) for batch in batches]
        wait_s = time.perf_counter() - start
        self.recovery.begin_step()
        self.optimizer.zero_grad(set_to_none=True)
        factor = self._spike_factor(batches)
        self._tokens.clear()
        self._aligned.clear()
        self._observe(batches, targets)
        losses = (
            self._whole_step(batches[0], targets[0], factor)
            if len(batches) == 1
            else self._accumulated_step(batches, targets, factor)
        )
        grad_norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.settings.grad_clip)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        anchor_weight = self._anchor_weight
        shares = {teacher: self._share(teacher, self.step) for teacher in self.settings.ramps}
        action = self.recovery.check(losses.total, grad_norm, sample_ids)
        step = self.step
        restored = None
        was_excluded = self.batches.excluded
        if action != "step":
            self.batches.excluded = self.recovery.quarantine.confirmed
        if action == "rollback":
            restored = self._roll_back()
        else:
            if action == "step":
                self._step()
            for _ in batches:
                self.batches.advance()
            self._asked -= len(batches)
            if self.batches.excluded != was_excluded:
                self._forget()  # what was asked for holds rows that are drawn no more
        return StepReport(
            step=step,
            draw=batches[0].draw,
            action=action,
            losses=losses.per_teacher,
            kd=losses.kd,
            anchor=losses.anchor,
            coefficients={} if losses.combined is None else losses.combined.coefficients,
            excluded=() if losses.combined is None else losses.combined.excluded,
            surgery=losses.outcome,
            gold=losses.gold,
            total=float(losses.total),
            grad_norm=float(grad_norm),
            learning_rate=learning_rate,
            rows=len(sample_ids),
            tokens=dict(self._tokens),
            aligned={teacher: count / self._tokens[teacher] for teacher, count in self._aligned.items()},
            anchor_weight=anchor_weight,
            shares=shares,
            wait_s=wait_s,
            restored_step=restored,
        )

    def _roll_back(self) -> int:
        """Return to a good state; its step, also where recovery gives up on it: a checkpoint of that state has to say so."""
        try:
            self.step = self.recovery.rollback()
        except TrainingDivergedError:
            returned_to = self.recovery.incidents[-1].returned_to
            assert returned_to is not None
            self.step = returned_to
            raise
        finally:
            self._forget()
        return self.step

    def _step(self) -> None:
        before = (self._warming_up, self.scheduler.phase, self._teaching(self.step))
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update()
        self.step += 1
        if (self._warming_up, self.scheduler.phase, self._teaching(self.step)) != before:
            # The level of the loss is about to change for a known reason.
            self.recovery.rebaseline("the learning rate's phase, the teachers, or their baselines changed")

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
            "average": None if self.average is None else self.average.state_dict(),
            "rng": torch.get_rng_state(),
            # Asking for it would start CUDA in a process that has not used it.
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
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
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["rng_cuda"])
        self._forget()

    # --- targets --------------------------------------------------------------------------------------------------------------

    def _targets(self, batch: StepBatch) -> dict[Assignment, TeacherTargets | None]:
        """Targets of `batch`, after asking for those of the draws behind it."""
        while self._asked < self.settings.accumulate * (self.settings.window + 1):
            # A draw is trained on no later than when every draw before it makes its step.
            self._ask(self.batches.peek(self._asked), self.step + self._asked // self.settings.accumulate)
            self._asked += 1
        return {assignment: self._collect(batch, assignment) for assignment in batch.unlabelled}

    def _ask(self, batch: StepBatch, step: int) -> None:
        for assignment, records in batch.unlabelled.items():
            request = self.objective.request(assignment, records)
            if self._source is not None and request is not None and self._share(assignment.teacher, step):
                key = _key(batch, assignment)
                self._source.submit(key, assignment.teacher, request)
                self._awaited.add(key)

    def _collect(self, batch: StepBatch, assignment: Assignment) -> TeacherTargets | None:
        key = _key(batch, assignment)
        if self._source is None or key not in self._awaited:
            return None
        self._awaited.discard(key)
        return self._source.collect(key)

    def _forget(self) -> None:
        self._asked = 0
        self._awaited.clear()
        if self._source is not None:
            self._source.forget()

    # --- teachers -------------------------------------------------------------------------------------------------------------

    def _share(self, teacher: str, step: int) -> float:
        """Of its importance that a teacher has at `step`; 0 before it takes part."""
        return ramp_share(step, *self.settings.ramps[teacher]) if teacher in self.settings.ramps else 1.0

    @property
    def _anchor_weight(self) -> float:
        settings = self.settings
        return cosine_decay(settings.anchor_start, settings.anchor_end, self.step, settings.steps)

    def _teaching(self, step: int) -> tuple[str, ...]:
        return tuple(teacher for teacher in self._importance if self._share(teacher, step))

    # --- losses ---------------------------------------------------------------------------------------------------------------

    def _observe(
        self, batches: Sequence[StepBatch], targets: Sequence[Mapping[Assignment, TeacherTargets | None]]
    ) -> None:
        """Show the objective the features of the whole step before any loss of it is computed."""
        step: dict[Assignment, list[TeacherTargets | None]] = {}
        for batch, answers in zip(batches, targets, strict=True):
            for assignment in self._taught(batch):
                step.setdefault(assignment, []).append(answers[assignment])
        self.objective.observe(step)

    def _parts_of(
        self, batch: StepBatch, targets: Mapping[Assignment, TeacherTargets | None], sizes: _Sizes | None
    ) -> _Parts:
        """The losses of one draw, as shares of its step where `sizes` are given."""
        gamma = self._anchor_weight
        kds: dict[str, list[Tensor]] = {}
        anchors: dict[str, list[Tensor]] = {}
        for assignment, records in self._taught(batch).items():
            whole = None if sizes is None else sizes.teachers[assignment]
            loss = self.objective.teacher_loss(assignment, records, targets[assignment], whole=whole, observed=True)
            self._tokens[assignment.teacher] += loss.tokens
            if loss.aligned is not None:
                self._aligned[assignment.teacher] += loss.aligned * loss.tokens
            kds.setdefault(assignment.teacher, []).append(loss.kd)
            anchors.setdefault(assignment.teacher, []).append(loss.anchor)
        asked = list(self._taught(batch)) if sizes is None else list(sizes.teachers)
        counts = {teacher: sum(assignment.teacher == teacher for assignment in asked) for teacher in kds}
        kd = {teacher: torch.stack(parts).sum() / counts[teacher] for teacher, parts in kds.items()}
        anchor = {teacher: torch.stack(parts).sum() / counts[teacher] for teacher, parts in anchors.items()}
        labelled = _with_rows(batch)
        return _Parts(
            kd=kd,
            anchor=anchor,
            per_teacher={teacher: kd[teacher] + gamma * anchor[teacher] for teacher in kd},
            gold=self.objective.gold_loss(labelled, num_tokens=None if sizes is None else sizes.labelled)
            if labelled
            else None,
        )

    def _taught(self, batch: StepBatch) -> dict[Assignment, tuple[Record, ...]]:
        """The rows of the teachers that take part at this step."""
        return {
            assignment: records
            for assignment, records in batch.unlabelled.items()
            if records and self._share(assignment.teacher, self.step)
        }

    def _combine(self, per_teacher: Mapping[str, Tensor]) -> SurgeryLoss | None:
        if self._surgery is None or not per_teacher:
            return None
        shares = {teacher: self._share(teacher, self.step) for teacher in per_teacher}
        return self._surgery(per_teacher, shares=shares)

    def _total(self, combined: Tensor | None, gold: Tensor | None) -> Tensor:
        terms = [] if combined is None else [combined]
        if gold is not None and self.settings.gold_weight:
            terms.append(self.settings.gold_weight * gold)
        if not terms:
            raise ConfigError(
                "Expected teachers or labelled rows with gold_weight above 0, found neither: nothing would train the student. "
                "Add one of them."
            )
        return torch.stack(terms).sum()

    def _spike_factor(self, batches: Sequence[StepBatch]) -> float:
        spoilt = self._spike is not None and self._spike.step == batches[0].draw // self.settings.accumulate
        return self._spike.factor if self._spike is not None and spoilt else 1.0

    # --- gradients ------------------------------------------------------------------------------------------------------------

    def _whole_step(
        self, batch: StepBatch, targets: Mapping[Assignment, TeacherTargets | None], factor: float
    ) -> _Step:
        """The losses and gradient of a step of one draw."""
        parts = self._parts_of(batch, targets, None)
        combined = self._combine(parts.per_teacher)
        total = self._total(None if combined is None else combined.loss, parts.gold) * factor
        outcome = None
        if self._operation is None or combined is None or not combined.coefficients:
            total.backward()
        elif self._one_by_one or self._operation.due(tuple(combined.coefficients)):
            gradients = TeacherGradients(self._shared, self._others)
            self._differentiate(gradients, parts)
            outcome = self._write(gradients, combined, factor)
        else:
            assert self._surgery is not None
            weighted = self._operation.weighted(parts.per_teacher, combined, self._surgery.baselines)
            if weighted is None:
                total.backward()
            else:
                whole = self._total(weighted, parts.gold) * factor
                backward_in_parts(whole, total, shared=self._shared, others=self._others)
        return _Step(
            total=total.detach(),
            per_teacher=_floats(parts.per_teacher),
            kd=_floats(parts.kd),
            anchor=_floats(parts.anchor),
            gold=None if parts.gold is None else float(parts.gold.detach()),
            combined=combined,
            outcome=outcome,
        )

    def _accumulated_step(
        self,
        batches: Sequence[StepBatch],
        targets: Sequence[Mapping[Assignment, TeacherTargets | None]],
        factor: float,
    ) -> _Step:
        """The losses and gradient of a step of several draws; one draw's graph is in memory at a time."""
        sizes = self._sizes(batches, targets)
        gradients = TeacherGradients(self._shared, self._others)
        sums: dict[str, dict[str, Tensor]] = {"kd": {}, "anchor": {}, "per_teacher": {}}
        golds: list[Tensor] = []
        for batch, answers in zip(batches, targets, strict=True):
            parts = self._parts_of(batch, answers, sizes)
            self._differentiate(gradients, parts)
            for name, found in (("kd", parts.kd), ("anchor", parts.anchor), ("per_teacher", parts.per_teacher)):
                for teacher, value in found.items():
                    sums[name][teacher] = sums[name].get(teacher, torch.zeros(())) + value.detach().cpu()
            if parts.gold is not None:
                golds.append(parts.gold.detach().cpu())
        combined = self._combine(sums["per_teacher"])
        gold = torch.stack(golds).sum() if golds else None
        total = self._total(None if combined is None else combined.loss, gold) * factor
        outcome = self._write(gradients, combined, factor)
        return _Step(
            total=total,
            per_teacher=_floats(sums["per_teacher"]),
            kd=_floats(sums["kd"]),
            anchor=_floats(sums["anchor"]),
            gold=None if gold is None else float(gold),
            combined=combined,
            outcome=outcome,
        )

    def _sizes(
        self, batches: Sequence[StepBatch], targets: Sequence[Mapping[Assignment, TeacherTargets | None]]
    ) -> _Sizes:
        teachers: dict[Assignment, Whole] = {}
        labelled: dict[str, int] = {}
        for batch, answers in zip(batches, targets, strict=True):
            for assignment, records in self._taught(batch).items():
                own = self.objective.size(assignment, records, answers[assignment])
                teachers[assignment] = own if assignment not in teachers else teachers[assignment] + own
            for capability, records in _with_rows(batch).items():
                labelled[capability] = labelled.get(capability, 0) + self.objective.num_gold_tokens(records)
        return _Sizes(teachers, labelled)

    def _differentiate(self, gradients: TeacherGradients, parts: _Parts) -> None:
        for teacher, loss in parts.per_teacher.items():
            gradients.add(teacher, loss)
        if parts.gold is not None and self.settings.gold_weight:
            gradients.add_plain(self.settings.gold_weight * parts.gold)

    def _write(self, gradients: TeacherGradients, combined: SurgeryLoss | None, factor: float) -> SurgeryOutcome | None:
        """Set the gradients of the step; returns what surgery found where it was due."""
        due = self._operation is not None and combined is not None and self._operation.due(tuple(combined.coefficients))
        baselines = {} if self._surgery is None else self._surgery.baselines
        outcome = gradients.write(combined, baselines, self._operation)
        if factor != 1.0:
            for parameter in self.objective.parameters():
                if parameter.grad is not None:
                    parameter.grad *= factor
        return outcome if due else None


def _key(batch: StepBatch, assignment: Assignment) -> Hashable:
    return (batch.draw, str(assignment))


def _with_rows(batch: StepBatch) -> dict[str, tuple[Record, ...]]:
    return {capability: rows for capability, rows in batch.labelled.items() if rows}


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {teacher: float(value.detach()) for teacher, value in values.items()}


def _surgery_subset(
    objective: DistillationObjective, settings: LoopSettings
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that surgery combines, and all others that train, among them the maps to the teachers' spaces."""
    student = objective.student
    adapters = [adapter for adapter in student.adapters.values() if isinstance(adapter, Adapter)]
    maps = {id(parameter) for adapter in adapters for parameter in adapter.alignments.parameters()}
    chosen: list[nn.Module] = []
    if settings.surgery_subset != "adapters":
        chosen.append(student.core)
    if settings.surgery_subset != "trunk":
        chosen.append(student.adapters)
    shared = [p for module in chosen for p in module.parameters() if p.requires_grad and id(p) not in maps]
    taken = {id(parameter) for parameter in shared}
    return shared, [p for p in objective.parameters() if p.requires_grad and id(p) not in taken]


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
    if settings.optimizer != "muon":
        # bitsandbytes takes a second to import, and is wanted here alone.
        from nexus.training.eight_bit import AdamW8bit

        return AdamW8bit(groups, paged=settings.optimizer == "paged_adamw8bit", **rates)
    return MuonAdamW(matrices, groups, weight_decay=settings.weight_decay, **rates)


def _hidden_matrices(student: NexusStudent) -> list[nn.Parameter]:
    """Those of the trunk's layers and ports and of the adapters, but for the maps to the teachers' spaces, which are heads."""
    adapters = [adapter for adapter in student.adapters.values() if isinstance(adapter, Adapter)]
    heads = {id(parameter) for adapter in adapters for parameter in adapter.alignments.parameters()}
    found = hidden_matrices((student.core.layers, student.core.ports, *adapters))
    return [matrix for matrix in found if id(matrix) not in heads]
