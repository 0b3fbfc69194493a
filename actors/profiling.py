"""The profile stage's two passes: rows in rounds until each teacher's critical layers are stable, then a few rows once more."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.dataflow import TeacherWork
from nexus.config import resolve_path
from nexus.errors import DataError
from nexus.profiling.consolidation import merge_measurements
from nexus.profiling.sampling import Reservoir, SamplingPlan, is_stable

if TYPE_CHECKING:
    from actors.session import Session
    from nexus.data.records import Record
    from nexus.profiling.consolidation import BatchMeasurement, ConfirmationMeasurement, ConfirmationPlan


@dataclass
class TeacherKnowledge:
    """What is known of one teacher so far."""

    kept: Reservoir[tuple[str, Record]]
    """(capability, row) of the second pass."""
    by_capability: dict[str, list[BatchMeasurement]] = field(default_factory=dict)
    exhausted: set[str] = field(default_factory=set)
    """Capabilities without further rows."""
    num_rows: int = 0
    stopped_early: bool = False
    is_complete: bool = False
    """Whether no further rows are wanted: stable, at the limit, or none left."""

    @property
    def measurements(self) -> list[BatchMeasurement]:
        """Of all capabilities."""
        return [part for parts in self.by_capability.values() for part in parts]


class ProfilingRound:
    """Streams labelled rows to the teachers until their profiles are known."""

    def __init__(self, session: Session) -> None:
        settings = session.config.profile
        self._session = session
        self.teachers = {
            teacher.id: TeacherKnowledge(Reservoir(settings.confirm_samples)) for teacher in session.config.teachers
        }
        for teacher in session.config.teachers:
            for capability in teacher.capabilities:
                if not session.config.data_of(capability).labelled:
                    raise DataError(
                        f"Expected labelled rows of capability {capability!r} to profile {teacher.id} on, found none. "
                        f"Name a file under data.{capability}.labelled."
                    )

    def run(self, start: float) -> bool:
        """Measure; return whether the budget, counted from `start` (of `time.perf_counter`), was spent before all was known."""
        settings = self._session.config.profile
        looks = SamplingPlan(settings.max_samples, min(settings.min_samples, settings.max_samples)).look_counts
        # Under a budget every teacher gets one batch first, so that each has a profile when time is up.
        first = min(settings.batch_size, looks[0])
        counts = looks if settings.budget_seconds is None or first == looks[0] else (first, *looks)
        done = 0
        for index, count in enumerate(counts):
            budget = None if index == 0 else settings.budget_seconds
            if not self._measure(done, count - done, start, budget):
                return True
            done = count
            for teacher in self._session.config.teachers:
                known = self.teachers[teacher.id]
                if known.is_complete:
                    continue
                known.is_complete = count == settings.max_samples or known.exhausted.issuperset(teacher.capabilities)
                if not known.is_complete and count in looks:
                    merged = merge_measurements(known.measurements)
                    known.is_complete = known.stopped_early = is_stable(merged, seed=self._session.config.seed)
            if all(known.is_complete for known in self.teachers.values()):
                break
        return False

    def _measure(self, skip_rows: int, max_rows: int, start: float, budget_seconds: float | None) -> bool:
        """Measure one round of rows; return whether there was time for all of it."""
        session = self._session
        config = session.config
        works = [
            TeacherWork(
                teacher=teacher.id,
                capability=capability,
                paths=tuple(str(resolve_path(path).resolve()) for path in config.data_of(capability).labelled),
                skip_rows=skip_rows,
                max_rows=max_rows,
                method="measure",
                arguments=(config.profile.strategy, config.data_of(capability).snr_db),
                batch_size=config.profile.batch_size,
            )
            for teacher in config.teachers
            for capability in teacher.capabilities
            if not self.teachers[teacher.id].is_complete and capability not in self.teachers[teacher.id].exhausted
        ]
        rows = [0] * len(works)
        for answer in session.stream(works, "nexus profile"):
            if budget_seconds is not None and time.perf_counter() - start >= budget_seconds:
                return False
            work, known = works[answer.work], self.teachers[works[answer.work].teacher]
            known.by_capability.setdefault(work.capability, []).append(answer.result)
            known.num_rows += len(answer.records)
            ids = [f"{work.capability}/{record.id}" for record in answer.records]
            known.kept.offer(ids, [(work.capability, record) for record in answer.records])
            rows[answer.work] += len(answer.records)
            session.reporter.progress(
                "profile", sum(known.num_rows for known in self.teachers.values()), None, work.teacher
            )
        # Rows that a teacher refused are missing too, but no more of them than a run bears.
        refused = math.ceil(config.quarantine.max_bad_share * max_rows)
        for work, count in zip(works, rows, strict=True):
            if count == 0 or count < max_rows - refused:
                self.teachers[work.teacher].exhausted.add(work.capability)
        return True


def confirm_profile(
    session: Session, teacher: str, known: TeacherKnowledge, plan: ConfirmationPlan
) -> list[ConfirmationMeasurement]:
    """Run the second pass of one teacher over its kept rows, batch by batch."""
    from nexus.towers.engine import AnswerCheck

    config = session.config
    rows: dict[str, list[Record]] = {}
    for capability, record in known.kept.rows():
        rows.setdefault(capability, []).append(record)
    sources = {capability: config.data_of(capability) for capability in rows}
    # Verification is equivalent where the whole completion is the answer. One teacher's rows are all judged in one way.
    is_generated = any(source.answer != "exact" for source in sources.values())
    keys = []
    for capability, records in rows.items():
        source = sources[capability]
        check = AnswerCheck(source.answer, source.max_new_tokens) if is_generated else None
        for first in range(0, len(records), config.profile.batch_size):
            part = tuple(records[first : first + config.profile.batch_size])
            keys.append(("confirm", teacher, capability, first))
            session.pool.submit(keys[-1], teacher, "confirm", part, plan, config.profile.strategy, source.snr_db, check)
    return [session.pool.collect(key) for key in keys]
