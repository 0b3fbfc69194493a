"""The trained student as a Ray actor: fits the router, answers held-out rows. Needs no teacher."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nexus.config import RunConfig, resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nexus.assembly.bundle import Answer, BundleStudent
    from nexus.data.records import Record
    from nexus.student.memory import NexusStudent
    from nexus.training.facts import TeacherFacts

STUDENT_DIR = "student"
"""Folder of the run directory that holds the distilled student with its router."""


@dataclass(frozen=True)
class RouteResult:
    """What fitting the router gave."""

    files: tuple[str, ...]
    threshold: float | None
    risk: float | None
    reason: str


class StudentActor:
    """Works on the students of one run directory."""

    def __init__(self, config: RunConfig, run_dir: str, working_dir: str) -> None:
        """`working_dir` is what relative paths of `config` start from."""
        self._config = config
        self._run_dir = Path(run_dir)
        self._working_dir = working_dir
        self._students: dict[str, BundleStudent] = {}

    def __repr__(self) -> str:
        """Name in Ray's logs and on its dashboard."""
        return f"StudentActor({self._config.name})"

    def train_router(self, teachers: tuple[TeacherFacts, ...]) -> RouteResult:
        """Fit the router on pool prompts and write the whole student to `student/`."""
        from nexus.data.collate import length_check
        from nexus.data.loader import iter_records
        from nexus.data.media import usable
        from nexus.data.quarantine import Quarantine
        from nexus.training.routing import train_router

        config = self._config
        os.chdir(self._working_dir)
        student, tokenizer = self._trained("distilled", teachers)
        quarantine = Quarantine(self._run_dir / "quarantine", config.quarantine.max_bad_share)
        fits = length_check(tokenizer, config.student.max_length)
        rows: list[Record] = []
        for source in config.data:
            paths = [resolve_path(text) for text in source.pool]
            records = iter_records(paths, capability=source.capability, quarantine=quarantine)
            rows += islice(usable(records, quarantine, fits), config.router.max_rows)
        fit = train_router(
            student,
            tokenizer,
            rows,
            {source.capability: source.towers for source in config.data},
            config.router,
            max_length=config.student.max_length,
            seed=config.seed,
        )
        folder = self._run_dir / STUDENT_DIR
        temporary = folder.with_name(f".{STUDENT_DIR}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        student.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        return RouteResult(
            files=tuple(str(path.relative_to(self._run_dir)) for path in sorted(folder.iterdir())),
            threshold=fit.threshold.threshold,
            risk=fit.threshold.risk_upper_bound,
            reason=fit.threshold.reason,
        )

    def answer(
        self,
        name: str,
        records: Sequence[Record],
        *,
        max_new_tokens: int,
        snr_db: float | None,
        towers: tuple[str, ...] | None,
        batch_size: int,
        teachers: tuple[TeacherFacts, ...],
    ) -> tuple[Answer, ...]:
        """Answers of the student `name` (`distilled` or `labels_only`); `towers` None lets its router choose."""
        from nexus.assembly.bundle import InputRow
        from nexus.data.media import read_media
        from nexus.student.preprocess import Noise

        if name not in self._students:
            self._students[name] = self._load(name, teachers)
        rows = []
        for record in records:
            data = None if record.media is None else read_media(record.media)
            is_audio = record.media is not None and record.media.kind == "audio"
            rows.append(
                InputRow(
                    prompt=record.prompt,
                    image=None if is_audio else data,
                    audio=data if is_audio else None,
                    noise=Noise(record.id, snr_db) if is_audio and snr_db is not None else None,
                )
            )
        chosen = None if towers is None else [towers] * len(rows)
        return self._students[name].answer(rows, max_new_tokens, batch_size=batch_size, towers=chosen)

    def _load(self, name: str, teachers: tuple[TeacherFacts, ...]) -> BundleStudent:
        from transformers import AutoTokenizer

        from nexus.assembly.bundle import BundleStudent
        from nexus.student.memory import NexusStudent

        max_length = self._config.student.max_length
        if name == "distilled":
            folder = self._run_dir / STUDENT_DIR
            return BundleStudent(
                NexusStudent.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), max_length=max_length
            )
        return BundleStudent(*self._trained(name, teachers), max_length=max_length)

    def _trained(self, name: str, teachers: tuple[TeacherFacts, ...]) -> tuple[NexusStudent, PreTrainedTokenizerBase]:
        """Student and tokenizer of the newest checkpoint."""
        import torch

        from nexus.training.setup import load_trained_student

        torch.set_num_threads(self._config.cluster.torch_threads)
        return load_trained_student(self._config, self._run_dir, name, teachers, taught=name == "distilled")
