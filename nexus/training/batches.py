"""The data cursor of distillation: which rows each optimizer step sees, drawn ahead for the teachers and seekable for a rollback.

One step draws, for every assignment (a teacher and a capability that it labels), unlabelled rows from that assignment's stream,
and a few labelled rows of every capability. Streams are deterministic given the seed. Because targets of the next steps are
asked for while the student trains, the cursor remembers the stream state before each pending draw: `state_dict` always describes
the next step to train, not the last one drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nexus.data.records import Record


class RecordStream(Protocol):
    """An endless deterministic stream of record batches (`nexus.data.loader.RecordBatches`)."""

    def next_batch(self) -> tuple[Record, ...]:
        """The next batch; a new epoch begins by itself."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which the stream continues exactly."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        ...


@dataclass(frozen=True)
class Assignment:
    """One teacher labelling one capability; its string form keys streams and events."""

    teacher: str
    capability: str

    def __str__(self) -> str:
        """`teacher/capability`."""
        return f"{self.teacher}/{self.capability}"


@dataclass(frozen=True)
class StepBatch:
    """The rows of one draw."""

    draw: int
    unlabelled: Mapping[Assignment, tuple[Record, ...]]
    labelled: Mapping[str, tuple[Record, ...]]

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Ids of all rows, for the quarantine."""
        groups = (*self.unlabelled.values(), *self.labelled.values())
        return tuple(record.id for group in groups for record in group)


@dataclass(frozen=True)
class _Pending:
    state: dict[str, Any]
    batch: StepBatch


class StepBatches:
    """Draws step batches; rows in `excluded` are left out of every draw."""

    def __init__(self, unlabelled: Mapping[Assignment, RecordStream], labelled: Mapping[str, RecordStream]) -> None:
        self._unlabelled = dict(unlabelled)
        self._labelled = dict(labelled)
        self._draw = 0
        self._pending: deque[_Pending] = deque()
        self._excluded: Collection[str] = frozenset()

    @property
    def excluded(self) -> Collection[str]:
        """Quarantined row ids; batches drawn ahead are drawn anew without them, as after a restart."""
        return self._excluded

    @excluded.setter
    def excluded(self, ids: Collection[str]) -> None:
        if ids != self._excluded:
            self._excluded = ids
            self.load_state_dict(self.state_dict())

    def peek(self, ahead: int) -> StepBatch:
        """The batch `ahead` draws after the next one, which is 0; nothing is consumed."""
        while len(self._pending) <= ahead:
            state = self._stream_state()
            self._pending.append(_Pending(state, self._draw_batch()))
        return self._pending[ahead].batch

    def advance(self) -> None:
        """Consume the next batch."""
        self.peek(0)
        self._pending.popleft()

    def state_dict(self) -> dict[str, Any]:
        """The cursor before the next step to train."""
        return self._pending[0].state if self._pending else self._stream_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Seek to `state`; batches drawn ahead are dropped."""
        self._pending.clear()
        self._draw = state["draw"]
        for key, stream in self._streams().items():
            stream.load_state_dict(state["streams"][key])

    def _stream_state(self) -> dict[str, Any]:
        return {"draw": self._draw, "streams": {key: stream.state_dict() for key, stream in self._streams().items()}}

    def _streams(self) -> dict[str, RecordStream]:
        unlabelled = {f"unlabelled:{assignment}": stream for assignment, stream in self._unlabelled.items()}
        return unlabelled | {f"labelled:{capability}": stream for capability, stream in self._labelled.items()}

    def _draw_batch(self) -> StepBatch:
        batch = StepBatch(
            draw=self._draw,
            unlabelled={assignment: self._rows(stream) for assignment, stream in self._unlabelled.items()},
            labelled={capability: self._rows(stream) for capability, stream in self._labelled.items()},
        )
        self._draw += 1
        return batch

    def _rows(self, stream: RecordStream) -> tuple[Record, ...]:
        return tuple(record for record in stream.next_batch() if record.id not in self._excluded)
