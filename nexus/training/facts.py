"""What training has to know about teachers and capabilities: plain values that cross to actors and rest in the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nexus.artifacts import StrictModel
from nexus.config import Role
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
