"""Where targets come from: teachers of this process, files that extraction wrote, and sources side by side.

Implements `nexus.training.loop.TargetSource`.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nexus.artifacts import TransportMetrics
from nexus.data.targets import ScoreReader
from nexus.errors import ConfigError
from nexus.towers.packing import PackedTargets, unpack_targets
from nexus.towers.targets import ScoreRequest, TeacherHead, TeacherTargets
from nexus.training.facts import TeacherFacts
from nexus.training.loop import TargetSource
from nexus.training.requests import settings_of

if TYPE_CHECKING:
    from nexus.towers.engine import TeacherEngine

SCORES_DIR = "scores"
"""Folder of a teacher's cached targets, beside its answers."""


class MovedBytes:
    """Counts the buffers of one teacher's replies."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        """Transports that were used: `auto` may choose several."""
        self.rows = 0
        self.tokens = 0
        self.token_bytes = 0
        """Of the token distributions."""
        self.bytes = 0
        """Of all arrays, the states of critical layers and labels included."""

    def add(self, packed: PackedTargets) -> None:
        """Count one reply."""
        self.rows += len(packed.row_ids)
        self.bytes += packed.num_bytes
        if packed.tokens is not None:
            self.kinds.add(packed.tokens.kind)
            self.tokens += packed.tokens.num_tokens
            self.token_bytes += packed.tokens.num_bytes

    def metrics(self, targets: Literal["live", "cached"]) -> TransportMetrics:
        """The counts as the run reports them."""
        return TransportMetrics(
            transports=tuple(sorted(self.kinds)),
            targets=targets,
            rows=self.rows,
            tokens=self.tokens,
            bytes_per_token=self.token_bytes / self.tokens if self.tokens else None,
            bytes_per_row=self.bytes / max(1, self.rows),
        )


class EngineSource:
    """Teachers of this process, each in a thread of its own: they work ahead while the trainer makes its step.

    Nothing is packed or moved. One core serves each thread best (`OMP_NUM_THREADS=1`): threads of PyTorch's own would wait for each
    other. For teachers that read text: what a forward pass over media draws would come from the trainer's random generator.
    """

    def __init__(self, engines: Mapping[str, TeacherEngine]) -> None:
        """`engines` by teacher."""
        self._engines = dict(engines)
        self._threads = {teacher: ThreadPoolExecutor(1, thread_name_prefix=teacher) for teacher in engines}
        self._asked: dict[Hashable, Future[TeacherTargets]] = {}

    def submit(self, key: Hashable, teacher: str, request: ScoreRequest) -> None:
        """Queue one request.

        Raises:
            ConfigError: its rows have media.
        """
        if request.media is not None:
            raise ConfigError(
                f"Expected rows of text for the teacher {teacher!r} of this process, found media. Use an actor for it."
            )
        self._asked[key] = self._threads[teacher].submit(self._engines[teacher].score, request)

    def collect(self, key: Hashable) -> TeacherTargets:
        """Wait for the targets under `key`; raises what the teacher raised."""
        return self._asked.pop(key).result()

    def head(self, teacher: str) -> TeacherHead:
        """A teacher's output head."""
        return self._threads[teacher].submit(self._engines[teacher].output_head).result()

    def forget(self) -> None:
        """Drop what waits; what a teacher has begun it ends."""
        for future in self._asked.values():
            future.cancel()
        self._asked.clear()

    def close(self) -> None:
        """Drop what waits, and end the threads."""
        self.forget()
        for thread in self._threads.values():
            thread.shutdown()


class CachedSource:
    """Targets from a run directory: no teacher runs."""

    def __init__(self, folder: Path, teachers: Mapping[str, TeacherFacts]) -> None:
        """
        Args:
            folder: `targets` of the run directory.
            teachers: those with cached targets, by id.
        """
        self._folder = folder
        self._teachers = dict(teachers)
        self._readers: dict[tuple[str, str], ScoreReader] = {}
        self._asked: dict[Hashable, tuple[str, ScoreRequest]] = {}
        self.moved: dict[str, MovedBytes] = {}
        """What was read so far, by teacher."""

    def submit(self, key: Hashable, teacher: str, request: ScoreRequest) -> None:
        """Remember one request.

        Raises:
            ArtifactError: there are no targets for such requests; the message names what differs.
        """
        assert request.capability is not None, "the objective names the capability of its rows"
        if (teacher, request.capability) not in self._readers:
            self._readers[teacher, request.capability] = ScoreReader(
                self._folder / teacher / SCORES_DIR,
                capability=request.capability,
                settings=settings_of(request, self._teachers[teacher]),
            )
        self._asked[key] = (teacher, request)

    def collect(self, key: Hashable) -> TeacherTargets:
        """Read the rows of one request.

        Raises:
            ArtifactError: a row has no targets.
        """
        teacher, request = self._asked.pop(key)
        assert request.capability is not None
        reader = self._readers[teacher, request.capability]
        packed = reader.read(request.row_ids, label_texts=self._teachers[teacher].label_texts)
        self.moved.setdefault(teacher, MovedBytes()).add(packed)
        return unpack_targets(packed)

    def head(self, teacher: str) -> TeacherHead:
        """Raises ConfigError: hidden states are never cached, and no head is."""
        raise ConfigError(f"Expected a live teacher to give its output head, found cached targets of {teacher!r}.")

    def forget(self) -> None:
        """Drop what was asked for."""
        self._asked.clear()


class MixedSource:
    """Some teachers live, the others cached."""

    def __init__(self, live: TargetSource, cached: CachedSource, cached_teachers: Collection[str]) -> None:
        self._live = live
        self._cached = cached
        self._cached_teachers = frozenset(cached_teachers)
        self._teacher_of: dict[Hashable, str] = {}

    def _source(self, teacher: str) -> TargetSource:
        return self._cached if teacher in self._cached_teachers else self._live

    def submit(self, key: Hashable, teacher: str, request: ScoreRequest) -> None:
        """Ask whichever source the teacher has."""
        self._teacher_of[key] = teacher
        self._source(teacher).submit(key, teacher, request)

    def collect(self, key: Hashable) -> TeacherTargets:
        """Wait for the targets under `key`."""
        return self._source(self._teacher_of.pop(key)).collect(key)

    def head(self, teacher: str) -> TeacherHead:
        """Ask for a live teacher's output head."""
        return self._source(teacher).head(teacher)

    def forget(self) -> None:
        """Drop everything in flight."""
        self._teacher_of.clear()
        self._live.forget()
        self._cached.forget()
