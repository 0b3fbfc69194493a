"""One teacher as a Ray actor: synchronous, NF4 weights, restartable.

The constructor does nothing that can fail, because Ray never restarts an actor whose constructor raised. `load` is idempotent;
every other call loads first when it has to, so an actor that Ray restarted heals itself on its next call. All answers are pure
functions of their request: the pool may repeat a call after a crash.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actors.memory import load_turn, private_bytes, release_freed_memory
from nexus.errors import ProfilingError
from nexus.towers.health import FingerprintChangedError
from nexus.vendors.environments import ENVIRONMENTS

if TYPE_CHECKING:
    from torch.nn import Module

    from nexus.data.records import Record
    from nexus.profiling.consolidation import BatchMeasurement, ConfirmationMeasurement, ConfirmationPlan
    from nexus.towers.engine import AnswerCheck, ProfileStrategy, TeacherEngine
    from nexus.towers.loader import LoadedTower
    from nexus.towers.nf4 import CoverageReport
    from nexus.towers.packing import PackedTargets
    from nexus.towers.parking import FileWeights, ParkedWeights
    from nexus.towers.registry import TeacherSpec
    from nexus.towers.targets import ScoreRequest, TeacherHead
    from nexus.towers.tax import TaxMeasurement

CONTROL_GROUP = "control"

_Answer = TypeVar("_Answer")

FilesSeen = tuple[tuple[str, int, int], ...]
"""Name, size and time of change of each file."""


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
    swap_seconds: float
    """Of falling asleep and waking, all times together."""
    busy_share: float | None
    """Of the time between the first and the last answer of the kind of call that it answered last; None before the second."""


@dataclass
class _Stretch:
    """Calls of one method in a row, after the first of them has ended."""

    method: str
    first_end: float
    last_end: float
    busy_seconds: float = 0.0

    @property
    def busy_share(self) -> float | None:
        """Of the time from the first end to the last."""
        span = self.last_end - self.first_end
        return self.busy_seconds / span if span else None


class TeacherActor:
    """Holds one teacher; created by `actors.pool.TeacherPool` under the name `teacher:<id>`, further replicas as `teacher:<id>#2`."""

    def __init__(self, spec: TeacherSpec, torch_threads: int, replica: int = 0) -> None:
        self._spec = spec
        self._replica = replica
        self._torch_threads = torch_threads
        self._engine: TeacherEngine | None = None
        self._asleep = False
        """Whether the engine's weights are set aside."""
        self._parked: ParkedWeights | None = None
        """Of a model that sleeps in the node's memory."""
        self._file: FileWeights | None = None
        """What a model on a CPU reads its weights from since it first slept."""
        self._files_seen: FilesSeen = ()
        """Its checkpoint's files when it was loaded."""
        self._report: LoadReport | None = None
        self._incarnation = f"{os.getpid()}-{time.time_ns()}"
        self._calls = 0
        self._busy_seconds = 0.0
        self._swap_seconds = 0.0
        self._stretch: _Stretch | None = None

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

        On a GPU the weights move to pinned memory of the node and come back as they were. On a CPU they move to a file, once, from
        which the model reads what it needs. What can do neither is dropped, and read again from the checkpoint.
        """
        if self._engine is not None and not self._asleep:
            start = time.perf_counter()
            self._asleep = self._set_aside(self._engine.tower)
            if not self._asleep:
                self._drop()
                # Weights that were set aside leave nothing behind, and a look at all objects takes 0.2 s.
                gc.collect()
            release_freed_memory()
            self._swap_seconds += time.perf_counter() - start
        return private_bytes()

    def score(self, request: ScoreRequest) -> PackedTargets:
        """Targets for the trainer, packed: what leaves this process is what they take."""
        from nexus.towers.packing import pack_targets

        return self._timed(
            "score",
            len(request.row_ids),
            lambda engine: pack_targets(engine.score(request), vocabulary_size=engine.vocabulary_size),
        )

    def output_head(self) -> TeacherHead:
        """What the receiver of `hidden` targets needs once."""
        return self._loaded().output_head()

    def answer(self, records: Sequence[Record], max_new_tokens: int, snr_db: float | None) -> tuple[str, ...]:
        """The teacher's answer to each row as text, whatever its role."""
        return self._seldom(
            "answer", len(records), lambda engine: engine.answer(records, max_new_tokens=max_new_tokens, snr_db=snr_db)
        )

    def measure(self, records: Sequence[Record], strategy: ProfileStrategy, snr_db: float | None) -> BatchMeasurement:
        """Layer-ablation measurement of one batch."""
        return self._profiled(
            "measure", len(records), lambda engine: engine.measure(records, strategy=strategy, snr_db=snr_db)
        )

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
            "confirm",
            len(records),
            lambda engine: engine.confirm(records, plan, strategy=strategy, snr_db=snr_db, answers=answers),
        )

    def tax(self, records: Sequence[Record], max_new_tokens: int, snr_db: float | None) -> TaxMeasurement:
        """Float original against NF4 on the same rows; the float copy is dropped afterwards."""
        return self._seldom(
            "tax", len(records), lambda engine: engine.tax(records, max_new_tokens=max_new_tokens, snr_db=snr_db)
        )

    def health(self) -> ActorHealth:
        """Pid, incarnation and counters; call it in the control group."""
        is_awake = self._engine is not None and not self._asleep
        share = None if self._stretch is None else self._stretch.busy_share
        return ActorHealth(
            os.getpid(), self._incarnation, is_awake, self._calls, self._busy_seconds, self._swap_seconds, share
        )

    def _profiled(self, method: str, rows: int, call: Callable[[TeacherEngine], _Answer]) -> _Answer:
        """As `_seldom`, counted as work on a profile."""
        before = self._busy_seconds
        try:
            result = self._seldom(method, rows, call)
        except ProfilingError as error:
            raise type(error)(f"Profiling {self._spec.id}: {error}") from None
        self._metrics.profiled(rows, self._busy_seconds - before)
        return result

    def _seldom(self, method: str, rows: int, call: Callable[[TeacherEngine], _Answer]) -> _Answer:
        """As `_timed`, for work whose large blocks are not wanted again by the next step."""
        try:
            return self._timed(method, rows, call)
        finally:
            release_freed_memory()

    def _timed(self, method: str, rows: int, call: Callable[[TeacherEngine], _Answer]) -> _Answer:
        engine = self._loaded()
        start = time.perf_counter()
        result = call(engine)
        end = time.perf_counter()
        seconds = end - start
        self._calls += 1
        self._busy_seconds += seconds
        if self._stretch is None or self._stretch.method != method:
            self._stretch = _Stretch(method, end, end)
        else:
            self._stretch.last_end = end
            self._stretch.busy_seconds += seconds
        self._metrics.answered(rows, seconds)
        return result

    def _set_aside(self, tower: LoadedTower) -> bool:
        """Whether all of the tower's weights now wait where they hold nothing that others could use."""
        # A vendor's engine has no tower of ours; a dictionary is no module; a streamed model holds next to nothing.
        if self._spec.library in ENVIRONMENTS or tower.dictionaries is not None or tower.is_streamed:
            return False
        if tower.model.device.type == "cuda":
            from nexus.towers.parking import park

            if tower.denoiser is not None:
                return False  # its other components would stay where they are
            self._parked = park(tower.model)
            return True
        if self._file is None:
            from nexus.towers.parking import FileWeights

            folder = Path(self._spec.cache_dir or tempfile.gettempdir()).expanduser()
            try:
                self._file = FileWeights(_modules_of(tower), folder)
            except OSError:  # no room on the disk
                return False
        self._file.release()
        return True

    def _drop(self) -> None:
        self._engine = None
        self._parked = None
        self._file = None
        self._asleep = False

    def _bring_back(self, engine: TeacherEngine) -> None:
        """Wake a model that was set aside; one whose files changed meanwhile is dropped."""
        start = time.perf_counter()
        if _files_of(self._spec) != self._files_seen:
            self._drop()
            return
        if self._parked is not None:
            from nexus.towers.parking import unpark

            unpark(engine.tower.model, self._parked)
            self._parked = None
        elif self._file is not None:
            self._file.prefetch()
        self._asleep = False
        try:
            engine.probe()
        except Exception:
            self._drop()  # the next call loads it anew
            raise
        self._swap_seconds += time.perf_counter() - start

    def _loaded(self) -> TeacherEngine:
        if self._engine is not None and self._asleep:
            self._bring_back(self._engine)
        if self._engine is None:
            import torch
            from transformers.utils.logging import disable_progress_bar

            from actors.metrics import TeacherMetrics

            torch.set_num_threads(self._torch_threads)
            # One bar per checkpoint would bury the run's own news.
            disable_progress_bar()
            self._files_seen = _files_of(self._spec)
            with load_turn():
                start = time.perf_counter()
                engine, coverage, from_cache = _opened(self._spec)
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
                weight_bytes=coverage.stored_bytes,
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
            if before is not None:
                self._swap_seconds += time.perf_counter() - start
            self._metrics = TeacherMetrics(self._spec.id)
            self._metrics.loaded(coverage.stored_bytes)
            self._engine = engine
        return self._engine


def _modules_of(tower: LoadedTower) -> list[Module]:
    """All that holds weights; the model of a diffusion teacher is one component of several."""
    from torch import nn

    parts = [tower.model] if tower.denoiser is None else tower.denoiser.pipeline.components.values()
    return [part for part in parts if isinstance(part, nn.Module)]


def _files_of(spec: TeacherSpec) -> FilesSeen:
    """Name, size and time of every file that the teacher is loaded from."""
    folders = [Path(folder) for folder in (spec.path, spec.base_path) if folder is not None]
    found = [(path, path.stat()) for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return tuple((str(path), status.st_size, status.st_mtime_ns) for path, status in found)


def _opened(spec: TeacherSpec) -> tuple[TeacherEngine, CoverageReport, bool]:
    """The teacher, how much of it is in NF4, and whether that came from the quantised cache."""
    if spec.library in ENVIRONMENTS:
        from nexus.vendors.engine import load_vendor_engine

        # It gives targets, and nothing of the rest: the pool asks these teachers for nothing else.
        vendor: Any = load_vendor_engine(spec)
        return vendor, vendor.coverage, False
    from nexus.towers.lean import lean_imports

    with lean_imports():
        from nexus.towers.engine import TeacherEngine
        from nexus.towers.loader import load_tower

    tower = load_tower(spec)
    return TeacherEngine(tower, teacher_id=spec.id), tower.coverage, tower.from_cache


def replica_suffix(replica: int) -> str:
    """What tells the replicas of one teacher apart; nothing for the first."""
    return f"#{replica + 1}" if replica else ""
