"""One teacher as a Ray actor: synchronous, NF4 weights, restartable.

The constructor does nothing that can fail, because Ray never restarts an actor whose constructor raised. `load` is idempotent;
every other call loads first when it has to, so an actor that Ray restarted heals itself on its next call. All answers are pure
functions of their request: the pool may repeat a call after a crash.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from actors.memory import load_turn, private_bytes, release_freed_memory
from nexus.errors import ProfilingError
from nexus.towers.health import FingerprintChangedError
from nexus.vendors.environments import ENVIRONMENTS

if TYPE_CHECKING:
    from nexus.data.records import Record
    from nexus.profiling.consolidation import BatchMeasurement, ConfirmationMeasurement, ConfirmationPlan
    from nexus.towers.engine import AnswerCheck, ProfileStrategy, TeacherEngine
    from nexus.towers.nf4 import CoverageReport
    from nexus.towers.packing import PackedTargets
    from nexus.towers.parking import ParkedWeights
    from nexus.towers.registry import TeacherSpec
    from nexus.towers.targets import ScoreRequest, TeacherHead
    from nexus.towers.tax import TaxMeasurement

CONTROL_GROUP = "control"

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class LoadReport:
    """What a teacher says after loading."""

    teacher: str
    fingerprint: str
    tokenizer_hash: str | None
    num_params: int
    quantised_share: float
    bits_per_param: float
    max_weight_error: float
    weight_bytes: int
    num_layers: int
    hidden_size: int
    vocabulary_size: int | None
    """Rows of a language model's output layer; None for an encoder."""
    label_texts: tuple[str, ...] | None
    from_cache: bool
    """Its weights had been quantised by an earlier load."""
    seconds: float


@dataclass(frozen=True)
class ActorHealth:
    """Answer of the control group, also while a forward pass runs."""

    pid: int
    incarnation: str
    """Changes when Ray restarted the actor."""
    loaded: bool
    calls: int
    busy_seconds: float


class TeacherActor:
    """Holds one teacher; created by `actors.pool.TeacherPool` under the name `teacher:<id>`, further replicas as `teacher:<id>#2`."""

    def __init__(self, spec: TeacherSpec, torch_threads: int, replica: int = 0) -> None:
        self._spec = spec
        self._replica = replica
        self._torch_threads = torch_threads
        self._engine: TeacherEngine | None = None
        self._parked: ParkedWeights | None = None
        """Of a model that sleeps in the node's memory."""
        self._report: LoadReport | None = None
        self._incarnation = f"{os.getpid()}-{time.time_ns()}"
        self._calls = 0
        self._busy_seconds = 0.0

    def __repr__(self) -> str:
        """Name in Ray's logs and on its dashboard."""
        return f"TeacherActor({self._spec.id}{replica_suffix(self._replica)})"

    def load(self) -> LoadReport:
        """Load and quantise the weights once; called again it returns the first report.

        Raises:
            TowerLoadError: when the checkpoint does not satisfy its entry.
        """
        self._loaded()
        assert self._report is not None
        return self._report

    def sleep(self) -> int:
        """Put the model aside; the next call wakes it. Returns the bytes of private memory that this process keeps.

        On a GPU the weights move to pinned memory of the node and come back as they were. Elsewhere they are dropped, and read
        again from the checkpoint.
        """
        if self._engine is not None:
            if self._spec.library not in ENVIRONMENTS and self._engine.tower.model.device.type == "cuda":
                from nexus.towers.parking import park

                self._parked = park(self._engine.tower.model)
            else:
                self._engine = None
            gc.collect()
            release_freed_memory()
        return private_bytes()

    def score(self, request: ScoreRequest) -> PackedTargets:
        """Targets for the trainer, packed: what leaves this process is what they take."""
        from nexus.towers.packing import pack_targets

        return self._timed(
            len(request.row_ids),
            lambda engine: pack_targets(engine.score(request), vocabulary_size=engine.vocabulary_size),
        )

    def output_head(self) -> TeacherHead:
        """What the receiver of `hidden` targets needs once."""
        return self._loaded().output_head()

    def answer(self, records: Sequence[Record], max_new_tokens: int, snr_db: float | None) -> tuple[str, ...]:
        """The teacher's answer to each row as text, whatever its role."""
        return self._seldom(
            len(records), lambda engine: engine.answer(records, max_new_tokens=max_new_tokens, snr_db=snr_db)
        )

    def measure(self, records: Sequence[Record], strategy: ProfileStrategy, snr_db: float | None) -> BatchMeasurement:
        """Layer-ablation measurement of one batch."""
        return self._profiled(len(records), lambda engine: engine.measure(records, strategy=strategy, snr_db=snr_db))

    def confirm(
        self,
        records: Sequence[Record],
        plan: ConfirmationPlan,
        strategy: ProfileStrategy,
        snr_db: float | None,
        answers: AnswerCheck | None,
    ) -> ConfirmationMeasurement:
        """Second pass of a profile over some rows of the first."""
        return self._profiled(
            len(records),
            lambda engine: engine.confirm(records, plan, strategy=strategy, snr_db=snr_db, answers=answers),
        )

    def tax(self, records: Sequence[Record], max_new_tokens: int, snr_db: float | None) -> TaxMeasurement:
        """Float original against NF4 on the same rows; the float copy is dropped afterwards."""
        return self._seldom(
            len(records), lambda engine: engine.tax(records, max_new_tokens=max_new_tokens, snr_db=snr_db)
        )

    def health(self) -> ActorHealth:
        """Pid, incarnation and counters; call it in the control group."""
        is_awake = self._engine is not None and self._parked is None
        return ActorHealth(os.getpid(), self._incarnation, is_awake, self._calls, self._busy_seconds)

    def _profiled(self, rows: int, call: Callable[[TeacherEngine], _Answer]) -> _Answer:
        """As `_seldom`, counted as work on a profile."""
        before = self._busy_seconds
        try:
            result = self._seldom(rows, call)
        except ProfilingError as error:
            raise type(error)(f"Profiling {self._spec.id}: {error}") from None
        self._metrics.profiled(rows, self._busy_seconds - before)
        return result

    def _seldom(self, rows: int, call: Callable[[TeacherEngine], _Answer]) -> _Answer:
        """As `_timed`, for work whose large blocks are not wanted again by the next step."""
        try:
            return self._timed(rows, call)
        finally:
            release_freed_memory()

    def _timed(self, rows: int, call: Callable[[TeacherEngine], _Answer]) -> _Answer:
        engine = self._loaded()
        start = time.perf_counter()
        result = call(engine)
        seconds = time.perf_counter() - start
        self._calls += 1
        self._busy_seconds += seconds
        self._metrics.answered(rows, seconds)
        return result

    def _loaded(self) -> TeacherEngine:
        if self._engine is not None and self._parked is not None:
            from nexus.towers.parking import unpark

            unpark(self._engine.tower.model, self._parked)
            self._parked = None
            self._engine.probe()
        if self._engine is None:
            import torch
            from transformers.utils.logging import disable_progress_bar

            from actors.metrics import TeacherMetrics

            torch.set_num_threads(self._torch_threads)
            # One bar per checkpoint would bury the run's own news.
            disable_progress_bar()
            with load_turn():
                start = time.perf_counter()
                engine, coverage, weight_bytes, from_cache = _opened(self._spec)
            engine.probe()
            before = None if self._report is None else self._report.fingerprint
            self._report = LoadReport(
                teacher=self._spec.id,
                fingerprint=engine.fingerprint,
                tokenizer_hash=engine.tokenizer_hash,
                num_params=coverage.total_params,
                quantised_share=coverage.share,
                bits_per_param=coverage.bits_per_param,
                max_weight_error=coverage.max_weight_error,
                weight_bytes=weight_bytes,
                num_layers=engine.num_layers,
                hidden_size=engine.hidden_size,
                vocabulary_size=engine.vocabulary_size if engine.role == "causal_lm" else None,
                label_texts=engine.label_texts,
                from_cache=from_cache,
                seconds=time.perf_counter() - start,
            )
            if before is not None and before != engine.fingerprint:
                raise FingerprintChangedError(
                    self._spec.id,
                    f"Expected teacher {self._spec.id!r} to wake with fingerprint {before}, found {engine.fingerprint}: its "
                    "files changed.",
                )
            self._metrics = TeacherMetrics(self._spec.id)
            self._metrics.loaded(weight_bytes)
            self._engine = engine
        return self._engine


def _opened(spec: TeacherSpec) -> tuple[TeacherEngine, CoverageReport, int, bool]:
    """The teacher, how much of it is in NF4, the bytes of its weights, and whether they came from the quantised cache."""
    if spec.library in ENVIRONMENTS:
        from nexus.vendors.engine import load_vendor_engine

        # It gives targets, and nothing of the rest: the pool asks these teachers for nothing else.
        vendor: Any = load_vendor_engine(spec)
        return vendor, vendor.coverage, vendor.coverage.stored_bytes, False
    from nexus.towers.engine import TeacherEngine
    from nexus.towers.loader import load_tower

    tower = load_tower(spec)
    weight_bytes = sum(p.numel() * p.element_size() for p in tower.model.parameters())
    return TeacherEngine(tower, teacher_id=spec.id), tower.coverage, weight_bytes, tower.from_cache


def replica_suffix(replica: int) -> str:
    """What tells the replicas of one teacher apart; nothing for the first."""
    return f"#{replica + 1}" if replica else ""
