"""The data cursor: drawn ahead without being consumed, seekable, and told apart from what is pending."""

from __future__ import annotations

from nexus.data.records import Record
from nexus.training.batches import Assignment, StepBatches


class CountingStream:
    """A stream whose n-th batch holds rows named after n; the same contract as RecordBatches."""

    def __init__(self, name: str, size: int = 2) -> None:
        self.name, self.size, self.position = name, size, 0

    def next_batch(self) -> tuple[Record, ...]:
        number, self.position = self.position, self.position + 1
        return tuple(
            Record(id=f"{self.name}{number}.{row}", capability=self.name, prompt="p") for row in range(self.size)
        )

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state) -> None:
        self.position = state["position"]


A, B = Assignment("t", "math"), Assignment("u", "code")


def _batches() -> StepBatches:
    return StepBatches({A: CountingStream("math"), B: CountingStream("code", 1)}, {"math": CountingStream("gold", 1)})


def test_a_draw_holds_rows_of_every_assignment_and_every_labelled_set():
    batch = _batches().peek(0)
    assert [record.id for record in batch.unlabelled[A]] == ["math0.0", "math0.1"]
    assert batch.sample_ids == ("math0.0", "math0.1", "code0.0", "gold0.0")
    assert str(A) == "t/math"


def test_peeking_consumes_nothing():
    batches = _batches()
    ahead = batches.peek(3)
    assert ahead.draw == 3
    assert batches.peek(0).draw == 0
    batches.advance()
    assert batches.peek(0).draw == 1
    assert batches.peek(2) is ahead


def test_the_state_is_that_of_the_next_step_however_far_was_peeked():
    near, far = _batches(), _batches()
    for batches in (near, far):
        batches.advance()
    far.peek(5)
    assert near.state_dict() == far.state_dict()


def test_seeking_gives_the_draws_of_an_undisturbed_run():
    undisturbed = [batches.sample_ids for batches in _draws(_batches(), 6)]
    batches = _batches()
    batches.advance()
    batches.advance()
    state = batches.state_dict()
    batches.peek(3)
    batches.advance()
    batches.load_state_dict(state)
    assert [batch.sample_ids for batch in _draws(batches, 4)] == undisturbed[2:]
    assert batches.peek(0).draw == 6


def test_rows_excluded_later_leave_the_draws_made_ahead_too():
    batches = _batches()
    batches.peek(3)
    batches.advance()
    batches.excluded = frozenset({"math2.1"})
    assert [record.id for record in batches.peek(1).unlabelled[A]] == ["math2.0"]
    assert batches.peek(0).draw == 1


def test_excluded_rows_are_left_out_of_later_draws():
    batches = _batches()
    batches.excluded = frozenset({"math0.1", "gold0.0"})
    assert batches.peek(0).sample_ids == ("math0.0", "code0.0")


def _draws(batches: StepBatches, count: int):
    for _ in range(count):
        yield batches.peek(0)
        batches.advance()
