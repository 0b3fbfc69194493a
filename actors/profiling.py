"""The profile stage's two passes: rows in rounds until each teacher's critical layers are stable, then a few rows once more.

Every answer is folded into what is known of its teacher as soon as it is there, in the order of the rows: memory does not grow with
their number, and neither replicas nor restarts change a bit. What is known is journalled, so that rows are measured once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray

import nexus
from actors.dataflow import TeacherWork
from nexus.artifacts import fingerprint_of, sha256_of
from nexus.config import resolve_path
from nexus.data.loader import iter_records
from nexus.data.quarantine import Quarantine
from nexus.errors import DataError
from nexus.profiling.consolidation import merge_measurements
from nexus.profiling.journal import ConfirmedRows, MeasuredRows, ProfileJournal
from nexus.profiling.sampling import Reservoir, SamplingPlan, is_stable
from nexus.towers.rows import RowsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from actors.session import Session
    from nexus.config import DataConfig
    from nexus.data.records import Record
    from nexus.profiling.consolidation import BatchMeasurement, ConfirmationMeasurement, ConfirmationPlan


UNLABELLED = "no answer, where other rows have one; add or drop it"
"""Why a row without answer is quarantined after it was measured: a teacher's rows are all measured on answers, or none is."""


@dataclass
class TeacherKnowledge:
    """What is known of one teacher so far, by capability."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows that are done, from the front of the data; rejected ones among them."""
    measured: dict[str, BatchMeasurement] = field(default_factory=dict)
    exhausted: set[str] = field(default_factory=set)
    """Capabilities without further rows."""
    stopped_early: bool = False
    is_complete: bool = False
    """Whether no further rows are wanted: stable, at the limit, or none left."""

    @property
    def num_samples(self) -> int:
        """Rows that were measured."""
        return sum(len(measurement.sample_ids) for measurement in self.measured.values())

    def take_up(self, capability: str, measurement: BatchMeasurement) -> dict[str, tuple[str, ...]]:
        """Add a measurement of rows; return, by capability, the ids of rows without answer that do not count, old or new ones.

        One row with an answer leaves out all that have none, as within a batch: what counts depends neither on the batches nor on
        which teacher or capability answered first.
        """
        others = [name for name, known in self.measured.items() if known.is_labelled != measurement.is_labelled]
        if others and not measurement.is_labelled:
            return {capability: measurement.sample_ids}
        rejected = {name: self.measured.pop(name).sample_ids for name in others}
        before = self.measured.get(capability)
        self.measured[capability] = merge_measurements([measurement] if before is None else [before, measurement])
        return rejected


class ProfilingRounds:
    """Streams labelled rows to the teachers until their profiles are known."""

    def __init__(self, session: Session, journal: ProfileJournal) -> None:
        """Takes up what `journal` knows of these teachers, settings and rows."""
        self._session = session
        self._journal = journal
        self._quarantine = Quarantine(session.run.path / "quarantine", session.config.quarantine.max_bad_share)
        self._last_rows: dict[str, int] = {}
        self.teachers = {teacher.id: TeacherKnowledge() for teacher in session.teachers}
        self.fingerprints: dict[tuple[str, str], str] = {}
        """By teacher and capability: of everything that a measurement depends on."""
        self.earlier_seconds = 0.0
        """Wall-clock time of earlier processes."""
        hashes: dict[str, list[str]] = {}
        for teacher in session.teachers:
            for capability in teacher.capabilities:
                source = session.config.data_of(capability)
                if not source.labelled:
                    raise DataError(
                        f"Expected labelled rows of capability {capability!r} to profile {teacher.id} on, found none. "
                        f"Name a file under data.{capability}.labelled."
                    )
                if capability not in hashes:
                    hashes[capability] = [sha256_of(resolve_path(path)) for path in source.labelled]
                self.fingerprints[teacher.id, capability] = fingerprint_of(
                    [
                        nexus.__version__,
                        session.fingerprints[teacher.id],
                        session.config.fingerprint("profile", "seed"),
                        source.model_dump(mode="json", include={"snr_db", "answer", "max_new_tokens"}),
                        hashes[capability],
                    ]
                )
                self._take_up(teacher.id, capability)

    def run(self, start: float) -> bool:
        """Measure; return whether the budget, counted from `start` (of `time.perf_counter`), was spent before all was known."""
        settings = self._session.config.profile
        looks = SamplingPlan(settings.max_samples, min(settings.min_samples, settings.max_samples)).look_counts
        # Under a budget every teacher gets one batch first, so that each has a profile when time is up.
        first = min(settings.batch_size, looks[0])
        counts = looks if settings.budget_seconds is None or first == looks[0] else (first, *looks)
        for index, count in enumerate(counts):
            budget = None if index == 0 else settings.budget_seconds
            try:
                if not self._measure(count, start, budget):
                    return True
            finally:
                self._journal.flush()
            for teacher in self._session.teachers:
                known = self.teachers[teacher.id]
                if known.is_complete:
                    continue
                known.is_complete = count == settings.max_samples or known.exhausted.issuperset(teacher.capabilities)
                # An earlier process that went on behind this count had found the layers not stable at it.
                if not known.is_complete and count in looks and max(known.rows.values()) <= count:
                    merged = merge_measurements(list(known.measured.values()))
                    known.is_complete = known.stopped_early = is_stable(merged, seed=self._session.config.seed)
                if known.is_complete:
                    self._session.reporter.progress(f"profile {teacher.id}", known.num_samples, known.num_samples)
            if all(known.is_complete for known in self.teachers.values()):
                break
        return False

    def _take_up(self, teacher: str, capability: str) -> None:
        known = self.teachers[teacher]
        known.rows[capability] = 0
        entry = self._journal.read((teacher, capability), self.fingerprints[teacher, capability], MeasuredRows)
        if entry is None:
            return
        known.rows[capability] = entry.num_rows
        if entry.measurement is not None:
            self._reject(known.take_up(capability, entry.measurement), None)
        self.earlier_seconds = max(self.earlier_seconds, entry.seconds)
        self._session.reporter.line(f"profile: {teacher} continues after {entry.num_rows} rows of {capability}")

    def _measure(self, count: int, start: float, budget_seconds: float | None) -> bool:
        """Measure each capability's first `count` rows as far as they are not; return whether there was time for all of it."""
        session = self._session
        works = [
            _work(session, teacher.id, capability, known.rows[capability], count - known.rows[capability])
            for teacher in session.teachers
            for capability in teacher.capabilities
            if not (known := self.teachers[teacher.id]).is_complete
            and capability not in known.exhausted
            and known.rows[capability] < count
        ]
        if not works:
            return True
        with closing(session.stream(works, "nexus profile")) as answers:
            for answer in answers:
                seconds = time.perf_counter() - start
                if budget_seconds is not None and seconds >= budget_seconds:
                    return False
                teacher, capability = works[answer.work].teacher, works[answer.work].capability
                known = self.teachers[teacher]
                known.rows[capability] += len(answer.records) + answer.num_rejected
                rejected = known.take_up(capability, answer.result) if answer.records else {}
                # Left out are these very rows, or such as were measured earlier.
                self._reject(rejected, None if answer.result is None or answer.result.is_labelled else answer.records)
                self._see(answer.records)
                for name in dict.fromkeys((*rejected, capability)):
                    self._journal.note(
                        (teacher, name),
                        self.fingerprints[teacher, name],
                        MeasuredRows(known.rows[name], known.measured.get(name), seconds),
                    )
                limit = session.config.profile.max_samples * len(known.rows)
                session.reporter.progress(f"profile {teacher}", sum(known.rows.values()), limit)
        for work in works:
            known = self.teachers[work.teacher]
            if known.rows[work.capability] < count:
                known.exhausted.add(work.capability)
                for path in work.paths:
                    self._quarantine.check(path, self._last_rows.get(path, 0))
        return True

    def _reject(self, ids: Mapping[str, Sequence[str]], records: Sequence[Record] | None) -> None:
        """Quarantine rows without answer, given by capability; they are read once more where their records are None."""
        for capability, row_ids in ids.items():
            source = self._session.config.data_of(capability)
            for record in _find(self._session, source, Counter(row_ids)) if records is None else records:
                self._quarantine.add_record(record, UNLABELLED)

    def _see(self, records: Sequence[Record]) -> None:
        """Refuse a file of which too many rows so far were left out here."""
        for record in records:
            assert record.source is not None, "rows to profile on come from files"
            file = record.source.file
            self._last_rows[file] = max(record.source.row, self._last_rows.get(file, 0))
            self._quarantine.check(file, self._last_rows[file], final=False)


class ConfirmationRound:
    """The second pass: some rows of the first once more, of all teachers at once."""

    def __init__(self, session: Session, journal: ProfileJournal, rounds: ProfilingRounds) -> None:
        self._session = session
        self._journal = journal
        self._rounds = rounds
        self._quarantine = Quarantine(session.run.path / "quarantine", session.config.quarantine.max_bad_share)
        self._batches: dict[str, list[_ConfirmationBatch]] = {}

    def ask(self, teacher: str, plan: ConfirmationPlan) -> None:
        """Let a teacher begin with what is not journalled."""
        from nexus.towers.engine import AnswerCheck

        config = self._session.config
        known = self._rounds.teachers[teacher]
        rows = _kept_rows(self._session, known)
        # Verification is equivalent where the whole completion is the answer. One teacher's rows are all judged in one way, and
        # behind media nothing is generated with layers skipped.
        has_media = any(record.media is not None for records in rows.values() for record in records)
        is_generated = not has_media and any(config.data_of(capability).answer != "exact" for capability in rows)
        fingerprint = fingerprint_of(
            [[self._rounds.fingerprints[teacher, name], count] for name, count in sorted(known.rows.items())]
        )
        # Once for all batches: its bases are as large as the teacher is wide, times their number.
        plan_reference = ray.put(plan)
        self._batches[teacher] = []
        for capability, records in rows.items():
            source = config.data_of(capability)
            check = AnswerCheck(source.answer, source.max_new_tokens) if is_generated else None
            for first in range(0, len(records), config.profile.batch_size):
                batch = _ConfirmationBatch(
                    name=(teacher, f"{capability}-confirm-{first:05d}"),
                    fingerprint=fingerprint,
                    records=tuple(records[first : first + config.profile.batch_size]),
                    arguments=(plan_reference, config.profile.strategy, source.snr_db, check),
                )
                batch.entry = self._journal.read(batch.name, fingerprint, ConfirmedRows)
                self._batches[teacher].append(batch)
                if batch.entry is None:
                    self._session.pool.submit(batch.key, teacher, "confirm", batch.records, *batch.arguments)

    def collect(self, teacher: str) -> list[ConfirmationMeasurement]:
        """Wait for a teacher's measurements, in the order of their rows."""
        found = []
        for batch in self._batches[teacher]:
            if batch.entry is None:
                batch.entry = ConfirmedRows(
                    tuple(record.id for record in batch.records), self._wait_for(teacher, batch)
                )
                self._journal.write(batch.name, batch.fingerprint, batch.entry)
            if batch.entry.measurement is not None:
                found.append(batch.entry.measurement)
        return found

    def _wait_for(self, teacher: str, batch: _ConfirmationBatch) -> ConfirmationMeasurement | None:
        pool = self._session.pool
        records = batch.records
        while True:
            try:
                return pool.collect(batch.key)
            except RowsError as error:
                for record in records:
                    if record.id in error.reasons:
                        self._quarantine.add_record(record, f"{error.what} Found {error.reasons[record.id]}.")
                good = tuple(record for record in records if record.id not in error.reasons)
                if len(good) == len(records):
                    raise
                if not good:
                    return None
                records = good
                pool.submit(batch.key, teacher, "confirm", records, *batch.arguments)


@dataclass
class _ConfirmationBatch:
    name: tuple[str, str]
    fingerprint: str
    records: tuple[Record, ...]
    arguments: tuple[object, ...]
    entry: ConfirmedRows | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return ("confirm", *self.name)


def profile_teachers(session: Session, journal: ProfileJournal, start: float) -> Iterator[TeacherResult]:
    """Measure and yield what is known of each teacher, in their order.

    Args:
        start: of the stage, of `time.perf_counter`.

    Raises:
        DataError: a teacher has no row to be profiled on.
    """
    from nexus.profiling.consolidation import plan_confirmation

    rounds = ProfilingRounds(session, journal)
    spent = rounds.run(start - rounds.earlier_seconds)
    second = ConfirmationRound(session, journal, rounds)
    merged: dict[str, BatchMeasurement] = {}
    plans: dict[str, ConfirmationPlan] = {}
    for teacher, known in rounds.teachers.items():
        if not known.measured:
            raise DataError(
                f"Expected rows to profile {teacher} on, found none readable. See quarantine/ in the run directory."
            )
        merged[teacher] = merge_measurements(list(known.measured.values()))
        plans[teacher] = plan_confirmation(merged[teacher], seed=session.config.seed)
        second.ask(teacher, plans[teacher])
    for teacher, known in rounds.teachers.items():
        yield TeacherResult(
            teacher=teacher,
            merged=merged[teacher],
            capabilities=known.measured,
            plan=plans[teacher],
            confirmations=second.collect(teacher),
            is_partial=spent and not known.is_complete,
            stopped_early=known.stopped_early,
            seconds=time.perf_counter() - start + rounds.earlier_seconds,
        )


@dataclass(frozen=True)
class TeacherResult:
    """All that was measured of one teacher."""

    teacher: str
    merged: BatchMeasurement
    capabilities: Mapping[str, BatchMeasurement]
    plan: ConfirmationPlan
    confirmations: Sequence[ConfirmationMeasurement]
    is_partial: bool
    stopped_early: bool
    seconds: float
    """Since the stage began, with those of earlier processes."""


def _work(session: Session, teacher: str, capability: str, skip_rows: int, max_rows: int) -> TeacherWork:
    config = session.config
    source = config.data_of(capability)
    return TeacherWork(
        teacher=teacher,
        capability=capability,
        paths=tuple(str(resolve_path(path).resolve()) for path in source.labelled),
        skip_rows=skip_rows,
        max_rows=max_rows,
        method="measure",
        arguments=(config.profile.strategy, source.snr_db),
        batch_size=config.profile.batch_size,
    )


def _kept_rows(session: Session, known: TeacherKnowledge) -> dict[str, list[Record]]:
    """By capability, the rows of the second pass, by their ids; read once more, because only their ids are remembered."""
    kept: Reservoir[tuple[str, str]] = Reservoir(session.config.profile.confirm_samples)
    for capability, measurement in known.measured.items():
        ids = measurement.sample_ids
        kept.offer([f"{capability}/{row_id}" for row_id in ids], [(capability, row_id) for row_id in ids])
    wanted: dict[str, Counter[str]] = {}
    for capability, row_id in kept.rows():
        wanted.setdefault(capability, Counter())[row_id] += 1
    rows = {}
    for capability, missing in wanted.items():
        rows[capability] = sorted(_find(session, session.config.data_of(capability), missing), key=lambda row: row.id)
    return rows


def _find(session: Session, source: DataConfig, missing: Counter[str]) -> Iterator[Record]:
    # Bad rows have been written down when they were read first.
    quarantine = Quarantine(None, session.config.quarantine.max_bad_share)
    paths = [resolve_path(path).resolve() for path in source.labelled]
    for record in iter_records(paths, capability=source.capability, quarantine=quarantine):
        if missing[record.id] > 0:
            missing[record.id] -= 1
            yield record
            if not any(missing.values()):
                return
