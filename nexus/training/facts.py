"""What training has to know about teachers and capabilities: plain values that cross to actors and rest in the run directory."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nexus.artifacts import NIWTProfile, StrictModel
from nexus.config import Role
from nexus.errors import ConfigError
from nexus.towers.targets import Transport


@dataclass(frozen=True)
class TeacherFacts:
    """One teacher as training sees it."""

    id: str
    role: Role
    importance: float
    shares_tokenizer: bool
    """The student speaks this teacher's tokenizer."""
    vocabulary_size: int | None
    """Rows of a language model's output layer."""
    num_layers: int
    hidden_size: int
    label_texts: tuple[str, ...] | None
    fingerprint: str
    critical_layers: tuple[tuple[int, float], ...]
    """(layer, weight) from the profile; empty anchors nothing."""


@dataclass(frozen=True)
class TokenTransport:
    """How one teacher's token distributions are asked for; see `nexus.towers.targets.ScoreRequest`."""

    kind: Transport
    draws: int | None = None
    max_error: float | None = None


@dataclass(frozen=True)
class CapabilityFacts:
    """How rows of one capability are fed."""

    name: str
    towers: tuple[str, ...]
    snr_db: float | None


def profiled_importance(profile: NIWTProfile) -> float:
    """exp(-nll) of the clean teacher on the profiled samples, in (0, 1]: the geometric mean of what it gave to the right tokens, or
    labels. Comparable between teachers that were asked in tokens of one kind; a model of random weights over V ids gets about 1 / V.

    Raises:
        ConfigError: the profile has no likelihood, as that of an encoder without a head.
    """
    nll = profile.baseline.nll
    if nll is None:
        raise ConfigError(
            f"teachers.{profile.teacher}.importance: expected a profile with a likelihood, found one of {profile.metric}, which says "
            "nothing of how good the teacher is. Give a number."
        )
    # The smallest positive number, where a teacher is as wrong as that: an importance is above 0.
    return max(math.exp(-nll), sys.float_info.min)


class _TeacherFactsModel(StrictModel):
    id: str
    role: Role
    importance: float
    shares_tokenizer: bool
    vocabulary_size: int | None
    num_layers: int
    hidden_size: int
    label_texts: tuple[str, ...] | None
    fingerprint: str
    critical_layers: tuple[tuple[int, float], ...]


class TeacherFactsFile(StrictModel):
    """teachers.json."""

    teachers: tuple[_TeacherFactsModel, ...]

    @classmethod
    def from_facts(cls, teachers: Sequence[TeacherFacts]) -> TeacherFactsFile:
        """The file of these teachers."""
        return cls(teachers=tuple(_TeacherFactsModel(**asdict(teacher)) for teacher in teachers))

    def to_facts(self) -> tuple[TeacherFacts, ...]:
        """The teachers of the file."""
        return tuple(TeacherFacts(**teacher.model_dump()) for teacher in self.teachers)
