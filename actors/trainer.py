"""The trainer as a Ray actor: one student, its checkpoints and its events; the loop itself knows no Ray.

The distilled student pulls targets from the teachers' actors as futures; the labels-only student, its comparison, has no teacher.
Weights and training state are saved every `checkpoint_every` steps, at the end, and when asked to stop; the same command continues
from there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nexus.artifacts import TransportMetrics
from nexus.config import RunConfig
from nexus.towers.targets import ScoreRequest, TeacherHead, TeacherTargets

if TYPE_CHECKING:
    from actors.metrics import TrainerMetrics
    from actors.pool import Sleep, TeacherPool
    from nexus.run import EventLog
    from nexus.student.memory import NexusStudent
    from nexus.training.facts import TeacherFacts
    from nexus.training.loop import DistillationLoop, StepReport, TargetSource
    from nexus.training.sources import MovedBytes

STOP_TIMEOUT_S = 60.0
"""Longest wait for a trainer to finish its step and save, after Ctrl-C."""


@dataclass(frozen=True)
class TrainerPlan:
    """All that a trainer is made from; plain values."""

    config: RunConfig
    run_dir: str
    working_dir: str
    """What relative paths of the configuration start from: a worker of a joined cluster was started elsewhere."""
    student: str
    """`distilled` or `labels_only`; names the checkpoint folder and the events."""
    teachers: tuple[TeacherFacts, ...]
    inject_spike: str | None
    device: str
    """Of the student: `cpu`, or `cuda` for the GPU that Ray gave to this actor."""
    sleep: Sleep | None = None
    """How its teachers share memory; None when all stay awake."""


@dataclass(frozen=True)
class TrainerProgress:
    """Where a trainer is."""

    student: str
    step: int
    steps: int
    note: str


@dataclass(frozen=True)
class TrainerResult:
    """What a finished trainer says."""

    student: str
    steps: int
    num_parameters: int
    files: tuple[str, ...]
    """Written files, relative to the run directory."""
    skipped: int
    rollbacks: int
    rows: int
    seconds: float
    """Of this call; a resumed run counts its last part."""
    wait_seconds: float
    transports: Mapping[str, TransportMetrics]
    """What each teacher's targets took, by teacher."""
    swaps: int
    """Times that a teacher was put to sleep."""
    swap_share: float | None
    """Of falling asleep and waking, against the time in which teachers computed; None where none sleeps."""


class PoolSource:
    """`nexus.training.loop.TargetSource` over the teachers' actors."""

    def __init__(self, pool: TeacherPool) -> None:
        self._pool = pool
        self.moved: dict[str, MovedBytes] = {}
        """What crossed so far, by teacher."""

    def submit(self, key: Hashable, teacher: str, request: ScoreRequest) -> None:
        """Queue one request."""
        self._pool.submit(key, teacher, "score", request)

    def collect(self, key: Hashable) -> TeacherTargets:
        """Wait for one answer."""
        from nexus.towers.packing import unpack_targets
        from nexus.training.sources import MovedBytes

        packed = self._pool.collect(key)
        self.moved.setdefault(packed.rest.teacher, MovedBytes()).add(packed)
        return unpack_targets(packed)

    def head(self, teacher: str) -> TeacherHead:
        """Ask for a teacher's output head."""
        key = ("output_head", teacher)
        self._pool.submit(key, teacher, "output_head")
        return self._pool.collect(key)

    def forget(self) -> None:
        """Drop what is in flight."""
        self._pool.forget()


class TrainerActor:
    """Trains one student to the end of its plan."""

    def __init__(self, plan: TrainerPlan) -> None:
        self._plan = plan
        self._stop = threading.Event()
        self._pool: TeacherPool | None = None
        self._progress = TrainerProgress(plan.student, 0, plan.config.distill.steps, "starting")

    def __repr__(self) -> str:
        """Name in Ray's logs and on its dashboard."""
        return f"TrainerActor({self._plan.student})"

    def progress(self) -> TrainerProgress:
        """Where training is; call it in the control group."""
        return self._progress

    def pid(self) -> int:
        """Process id; call it in the control group."""
        return os.getpid()

    def request_stop(self) -> None:
        """Save after the step in progress and return; call it in the control group."""
        self._stop.set()

    def train(self) -> TrainerResult:
        """Train from the newest checkpoint, or from the start, to the last step.

        Raises:
            NexusError: what the data, a teacher, or the recovery raised.
            StageFailedError: when a stop was asked for before the last step; the state is saved.
        """
        import torch

        from actors.metrics import TrainerMetrics
        from nexus.errors import StageFailedError, TrainingDivergedError
        from nexus.run import EVENTS_FILE, EventLog
        from nexus.training.checkpoint import (
            list_checkpoints,
            load_checkpoint,
            load_trained,
            save_checkpoint,
            trained_weights,
        )
        from nexus.training.setup import build_loop, training_sources

        plan = self._plan
        os.chdir(plan.working_dir)
        torch.set_num_threads(plan.config.cluster.torch_threads)
        run_dir = Path(plan.run_dir)
        events = EventLog(run_dir / EVENTS_FILE)
        metrics = TrainerMetrics(plan.student)
        folder = run_dir / "checkpoints" / plan.student
        taught = plan.student == "distilled"
        source, transports = self._source(events) if taught else (None, dict)
        loop = build_loop(
            plan.config,
            run_dir=run_dir,
            teachers=plan.teachers,
            source=source,
            taught=taught,
            inject_spike=plan.inject_spike,
            # Two turns: one fills while the other is used up.
            steps_ahead=None if plan.sleep is None else max(plan.config.distill.window, 2 * plan.sleep.turn),
            device=plan.device,
        )
        fingerprint = plan.config.fingerprint()
        sources = training_sources(plan.config, plan.teachers if taught else ())
        found = load_checkpoint(folder, fingerprint=fingerprint, sources=sources)
        if found is not None:
            _, weights, state = found
            load_trained(loop.objective, weights)
            loop.load_state_dict(state)
        events.truncate_steps(plan.student, loop.step)
        totals = {"rows": 0, "wait": 0.0}

        def on_report(report: StepReport) -> None:
            self._record(report, loop, events, metrics)
            totals["rows"] += report.rows
            totals["wait"] += report.wait_s

        def save() -> None:
            save_checkpoint(
                folder,
                step=loop.step,
                fingerprint=fingerprint,
                sources=sources,
                weights=trained_weights(loop.objective),
                state=loop.state_dict(),
            )

        start = time.perf_counter()
        try:
            finished = loop.run(on_report=on_report, should_stop=self._stop.is_set, save=save)
        except TrainingDivergedError:
            save()
            raise
        if not finished:
            raise StageFailedError(f"Stopped at step {loop.step} of {loop.settings.steps}; the state is saved.")
        newest = list_checkpoints(folder)[-1]
        incidents = [incident.action for incident in loop.recovery.incidents]
        return TrainerResult(
            student=plan.student,
            steps=loop.step,
            num_parameters=_exported_parameters(loop.objective.student),
            files=tuple(str(path.relative_to(run_dir)) for path in sorted(newest.iterdir())),
            skipped=incidents.count("skip"),
            rollbacks=sum(incident.kind == "rollback" for incident in loop.recovery.incidents),
            rows=int(totals["rows"]),
            seconds=time.perf_counter() - start,
            wait_seconds=totals["wait"],
            transports=transports(),
            swaps=0 if self._pool is None else self._pool.swaps,
            swap_share=None if self._pool is None or plan.sleep is None else self._pool.swap_share(),
        )

    def _source(self, events: EventLog) -> tuple[TargetSource, Callable[[], dict[str, TransportMetrics]]]:
        """Where targets come from, and what they took so far."""
        from actors.pool import TeacherPool
        from nexus.training.sources import CachedSource, MixedSource

        config = self._plan.config
        by_id = {teacher.id: teacher for teacher in self._plan.teachers}
        cached_ids = config.cached_teachers
        cached = CachedSource(Path(self._plan.run_dir) / "targets", {teacher: by_id[teacher] for teacher in cached_ids})
        live: PoolSource | None = None
        source: TargetSource = cached
        if len(cached_ids) < len(by_id):
            pool = TeacherPool.attach(
                [teacher for teacher in by_id if teacher not in cached_ids],
                window=config.distill.window,
                timeout_s=config.distill.target_timeout_s,
                max_retries=config.distill.max_retries,
                sleep=self._plan.sleep,
                on_event=lambda kind, teacher, reason: events.write(
                    {
                        "kind": "restart" if kind == "retry" else kind,
                        "teacher": teacher,
                        "reason": reason,
                        "step": self._progress.step,
                    }
                ),
            )
            self._pool = pool
            source = live = PoolSource(pool)
            if cached_ids:
                source = MixedSource(live, cached, cached_ids)

        def transports() -> dict[str, TransportMetrics]:
            moved = {} if live is None else {teacher: moved.metrics("live") for teacher, moved in live.moved.items()}
            return moved | {teacher: moved.metrics("cached") for teacher, moved in cached.moved.items()}

        return source, transports

    def _record(self, report: StepReport, loop: DistillationLoop, events: EventLog, metrics: TrainerMetrics) -> None:
        student = self._plan.student
        common = {"student": student, "step": report.step, "draw": report.draw}
        numbers: dict[str, object] = {
            "losses": dict(report.losses),
            "kd": dict(report.kd),
            "anchor": dict(report.anchor),
            "coefficients": dict(report.coefficients),
            "gold": report.gold,
            "total": report.total,
            "grad_norm": report.grad_norm,
            "lr": report.learning_rate,
            "tokens": dict(report.tokens),
            "wait_s": round(report.wait_s, 4),
        }
        if report.excluded:
            numbers["excluded"] = list(report.excluded)
        if report.anchor:
            numbers["anchor_weight"] = round(report.anchor_weight, 6)
            numbers["shares"] = dict(report.shares)
        if report.aligned:
            numbers["aligned"] = dict(report.aligned)
        if report.surgery is not None:
            numbers["surgery"] = {
                "cosines": report.surgery.cosines,
                "factors": report.surgery.factors,
                "conflicts": report.surgery.plan.conflicts,
                "pareto_stationary": report.surgery.pareto_stationary,
            }
        if report.action == "step":
            events.write({"kind": "step", **common, **numbers})
            metrics.stepped(total=report.total, losses=dict(report.losses), wait_s=report.wait_s)
        else:
            # JSON has no NaN: what is not finite is written as text.
            finite = {
                key: value if value == value and abs(value) != float("inf") else str(value)
                for key, value in (("total", report.total), ("grad_norm", report.grad_norm))
            }
            events.write({"kind": report.action, **common, **finite, "restored_step": report.restored_step})
            metrics.recovered(report.action)
        note = f"loss {report.total:.3f}" if report.action == "step" else f"{report.action} at draw {report.draw}"
        self._progress = TrainerProgress(student, loop.step, loop.settings.steps, note)


def _exported_parameters(student: NexusStudent) -> int:
    """Parameters of the student without what no bundle carries: maps to its teachers' spaces, updates before they are merged."""
    return sum(
        parameter.numel()
        for name, parameter in student.named_parameters()
        if ".alignments." not in name and ".lora_" not in name
    )
