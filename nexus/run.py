"""A run directory: which configuration it belongs to, which stages are complete, what happened.

A stage is complete when its record says so *and* the files that it produced are still there with the recorded hashes; anything
else is done again. One process at a time may work in a directory. Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from nexus.artifacts import StageRecord, read_artifact, sha256_of, write_artifact, write_bytes_atomically
from nexus.config import RunConfig, dump_config
from nexus.errors import ArtifactError

STAGES = ("profile", "extract", "distill", "route", "evaluate", "export", "report")
WORK = ("stages", "profile", "targets", "checkpoints")
"""What stands in a run directory as soon as any stage has done something."""
CONFIG_FILE = "config.resolved.yaml"
EVENTS_FILE = "events.jsonl"
MIN_FREE_BYTES = 64 * 2**20
"""A quickstart writes about 20 MiB; less free space than this is refused before work is lost to a full disk."""


class RunDirectory:
    """The directory of one run, locked while it is open."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        """Create or reopen `path` for `config`.

        Raises:
            ArtifactError: when the directory holds a run of another configuration, is in use by another process, cannot be
                written, or its disk is full.
        """
        self.path = path
        self.config = config
        self._lock = self._open(path)
        try:
            self._claim(config)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, path: Path) -> IO[str]:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("a")
        except OSError as error:
            raise ArtifactError(
                f"Expected to write the run directory {path}, found: {error.strerror or error}. Choose another --out."
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ArtifactError(
                f"Expected {path} to be free, found another nexus process working in it. Wait for it, or choose another --out."
            ) from None
        return lock

    def _claim(self, config: RunConfig) -> None:
        free = shutil.disk_usage(self.path).free
        if free < MIN_FREE_BYTES:
            raise ArtifactError(
                f"Expected at least {MIN_FREE_BYTES >> 20} MiB free for {self.path}, found {free >> 20} MiB. "
                "Free disk space or choose another --out."
            )
        resolved = self.path / CONFIG_FILE
        if not any((self.path / name).exists() for name in WORK):
            # Nothing is lost by another configuration, such as one in which a mistake was mended.
            write_bytes_atomically(resolved, dump_config(config).encode())
            return
        there = yaml.safe_load(resolved.read_text())
        here = yaml.safe_load(dump_config(config))
        differences = list(_differences(there, here, ""))
        if differences:
            key, old, new = differences[0]
            more = f" and {len(differences) - 1} more keys" if len(differences) > 1 else ""
            raise ArtifactError(
                f"Expected {self.path} to hold a run of this configuration, found {key} = {old!r} there and {new!r} here{more}. "
                "Choose another --out, or remove the directory."
            )

    def close(self) -> None:
        """Let other processes in."""
        self._lock.close()

    def completed(self, stage: str) -> StageRecord | None:
        """The stage's record when it is complete and its outputs are whole, else None."""
        path = self.path / "stages" / f"{stage}.json"
        if not path.is_file():
            return None
        try:
            record = read_artifact(path, StageRecord)
        except ArtifactError:
            return None
        if record.fingerprint != self.config.fingerprint():
            return None
        for name, digest in record.outputs.items():
            file = self.path / name
            if not file.is_file() or sha256_of(file) != digest:
                return None
        return record

    def complete(
        self,
        stage: str,
        *,
        seconds: float,
        peak_memory_gib: float,
        outputs: Sequence[Path],
        summary: Mapping[str, float | int | str],
    ) -> StageRecord:
        """Write the stage's record: the last thing that a stage does."""
        record = self.describe(
            stage, seconds=seconds, peak_memory_gib=peak_memory_gib, outputs=outputs, summary=summary
        )
        write_artifact(self.path / "stages" / f"{stage}.json", record)
        return record

    def describe(
        self,
        stage: str,
        *,
        seconds: float,
        peak_memory_gib: float,
        outputs: Sequence[Path],
        summary: Mapping[str, float | int | str],
    ) -> StageRecord:
        """The record of a stage, not written: of one that is not complete."""
        return StageRecord(
            stage=stage,
            fingerprint=self.config.fingerprint(),
            seconds=round(seconds, 2),
            peak_memory_gib=round(peak_memory_gib, 3),
            outputs={str(path.relative_to(self.path)): sha256_of(path) for path in outputs},
            summary=dict(summary),
        )

    def reset(self, stage: str) -> None:
        """Forget that a stage was complete."""
        (self.path / "stages" / f"{stage}.json").unlink(missing_ok=True)


class EventLog:
    """events.jsonl: one JSON object per line, flushed per event."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one event; `time` (seconds since 1970) is added."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")

    def taught_tokens(self, student: str) -> dict[str, int]:
        """Tokens of each teacher in the steps of `student`; teachers that no step names are left out."""
        tokens: Counter[str] = Counter()
        for event in self._steps(student):
            tokens.update(event.get("tokens", {}))
        return dict(tokens)

    def aligned_shares(self, student: str) -> dict[str, float]:
        """Share of a teacher's tokens in spans that both tokenizers cut out, over the steps of `student` that compared any."""
        aligned: dict[str, float] = {}
        tokens: Counter[str] = Counter()
        for event in self._steps(student):
            for teacher, share in event.get("aligned", {}).items():
                tokens[teacher] += event["tokens"][teacher]
                aligned[teacher] = aligned.get(teacher, 0.0) + share * event["tokens"][teacher]
        return {teacher: count / tokens[teacher] for teacher, count in aligned.items()}

    def _steps(self, student: str) -> Iterator[Mapping[str, Any]]:
        for event in without_undone(self._events()):
            if event.get("student") == student and event["kind"] == "step":
                yield event

    def _events(self) -> Iterator[dict[str, Any]]:
        if not self._path.is_file():
            return
        with self._path.open() as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue  # half a line of a killed process

    def truncate_steps(self, student: str, step: int) -> None:
        """Drop the step events of `student` at or after `step`: a resumed run trains them again."""
        if not self._path.is_file():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line of a killed process
            if event.get("student") == student and event.get("step", -1) >= step and event["kind"] == "step":
                continue
            kept.append(line)
        write_bytes_atomically(self._path, "".join(line + "\n" for line in kept).encode())


def without_undone(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events but for the steps that a later rollback of the same student undid: they taught it nothing."""
    kept: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("kind") == "rollback" and isinstance(restored := event.get("restored_step"), int):
            kept = [
                earlier
                for earlier in kept
                if earlier.get("kind") != "step"
                or earlier.get("student") != event.get("student")
                or not isinstance(earlier.get("step"), int)
                or earlier["step"] < restored
            ]
        kept.append(event)
    return kept


def _differences(old: Any, new: Any, place: str) -> list[tuple[str, Any, Any]]:
    """Keys at which two configuration documents differ, depth first."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            item
            for key in keys
            for item in _differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            item
            for index, pair in enumerate(zip(old, new, strict=True))
            for item in _differences(*pair, f"{place}.{index}")
        ]
    return [] if old == new else [(place, old, new)]


def student_profile_path(run_dir: Path, capability: str) -> Path:
    """Where the profile of the finished student on one capability is kept."""
    return run_dir / "student_profile" / f"{capability}.json"
