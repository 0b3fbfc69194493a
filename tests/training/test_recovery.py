"""The recovery step: bit-exact skips and rollbacks on a real model, and its rules on series of losses."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nexus.errors import TrainingDivergedError
from nexus.training.loss import GradientSurgeryLoss
from nexus.training.recovery import Action, RecoveryConfig, RecoveryStep, SampleQuarantine

NUM_BATCHES = 100
SNAPSHOT_EVERY = 10
CONFIG = RecoveryConfig()


# A real model with everything that a bad batch can touch.


class Noisy(nn.Module):
    """BatchNorm, dropout and input noise from all three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            inputs = inputs + 0.01 * random.random() + 0.01 * float(np.random.rand())
        return self.body(inputs)


class Cursor:
    """A data position that can be put aside and returned."""

    def __init__(self) -> None:
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@dataclass
class Run:
    """One training run over numbered batches; `poison` changes the loss of some of them."""

    recovery_config: RecoveryConfig | None = CONFIG
    poison: dict[int, float] = field(default_factory=dict)
    leave_out: Collection[int] = ()
    num_batches: int = NUM_BATCHES

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = Noisy()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 200)
        self.cursor = Cursor()
        self.weights = GradientSurgeryLoss({"a": 1.0}, ramp_steps=20)
        generator = torch.Generator().manual_seed(1)
        self.batches = [
            (torch.randn(8, 6, generator=generator), torch.randn(8, 1, generator=generator))
            for _ in range(self.num_batches)
        ]
        self.actions: list[tuple[int, Action]] = []
        self.trained: list[int] = []
        self.recovery: RecoveryStep | None = None
        if self.recovery_config is not None:
            self.recovery = RecoveryStep(
                self.model,
                self.optimizer,
                scheduler=self.scheduler,
                data=self.cursor,
                config=self.recovery_config,
                extra={"weights": self.weights},
            )

    def backward(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batches[index]
        factor = self.poison.get(index, 1.0)
        if not math.isfinite(factor):
            inputs = inputs * factor
        loss = self.weights(
            {"a": (self.model(inputs) - targets * (factor if math.isfinite(factor) else 1.0)).square().mean()}
        ).loss
        self.optimizer.zero_grad()
        loss.backward()
        return loss, nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def advance(self) -> Action:
        """One batch, as the protocol says."""
        index = self.cursor.next
        self.cursor.next += 1
        if index in self.leave_out:
            return "skip"
        loss, norm = self.backward(index)
        action: Action = "step" if self.recovery is None else self.recovery.check(loss, norm, [index])
        self.actions.append((index, action))
        if action == "step":
            self.take_step(index)
        elif action == "rollback":
            assert self.recovery is not None
            self.trained = self.trained[: self.recovery.rollback()]
        return action

    def take_step(self, index: int) -> None:
        self.optimizer.step()
        self.scheduler.step()
        self.trained.append(index)
        if self.recovery is not None and len(self.trained) % SNAPSHOT_EVERY == 0:
            self.recovery.snapshot(len(self.trained))

    def to_the_end(self) -> Run:
        while self.cursor.next < self.num_batches:
            self.advance()
        return self


def state_of(run: Run) -> dict[str, Any]:
    return {
        "model": run.model.state_dict(),
        "moments": run.optimizer.state_dict()["state"],
        "groups": run.optimizer.state_dict()["param_groups"],
        "scheduler": run.scheduler.state_dict(),
        "weights": run.weights.state_dict(),
        "cursor": run.cursor.state_dict(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }


def assert_equal(left: Any, right: Any, path: str = "state") -> None:
    """Bit for bit, with the path of the first difference."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, np.ndarray):
        assert np.array_equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_equal(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, (first, second) in enumerate(zip(left, right, strict=True)):
            assert_equal(first, second, f"{path}[{index}]")
    else:
        assert left == right, path


def assert_never_saw(make: Callable[[], Run], missing: Collection[int]) -> Run:
    """`make` a run; it must end as one that was configured without the batches `missing`, and without any recovery."""
    run = make()
    reached = copy.deepcopy(state_of(run))
    reference = Run(recovery_config=None, leave_out=missing).to_the_end()
    assert_equal(reached, state_of(reference))
    assert [index for index in range(NUM_BATCHES) if index not in missing] == reference.trained == run.trained
    return run


# Bit-exactness.


@pytest.mark.parametrize("bad", [0, 1, 50, NUM_BATCHES - 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_costs_one_step_and_leaves_no_trace(bad: int, value: float) -> None:
    run = assert_never_saw(lambda: Run(poison={bad: value}).to_the_end(), {bad})
    assert [index for index, action in run.actions if action != "step"] == [bad]


@pytest.mark.parametrize("bad", [50, NUM_BATCHES - 1])
def test_a_spike_costs_one_step_and_leaves_no_trace(bad: int) -> None:
    run = assert_never_saw(lambda: Run(poison={bad: 1e4}).to_the_end(), {bad})
    assert [index for index, action in run.actions if action != "step"] == [bad]


def test_the_detectors_after_a_skip_are_those_of_a_run_that_never_saw_the_batch() -> None:
    saw, never = Run(poison={50: 1e4}).to_the_end(), Run(leave_out={50}).to_the_end()
    assert saw.recovery is not None
    assert never.recovery is not None
    left, right = saw.recovery.state_dict()["watch"], never.recovery.state_dict()["watch"]
    assert left == right


@pytest.mark.parametrize("delay", [0, 1, 4])
@pytest.mark.parametrize("value", [math.nan, 1e4])
def test_a_batch_that_is_noticed_late_is_undone_by_a_rollback(delay: int, value: float) -> None:
    def late() -> Run:
        run = Run(poison={53: value})
        assert run.recovery is not None
        while run.cursor.next < 53:
            run.advance()
        for index in range(53, 54 + delay):  # trained on, unnoticed
            run.cursor.next = index + 1
            run.backward(index)
            run.take_step(index)
        assert run.recovery.rollback() == 50
        run.trained = run.trained[:50]
        assert run.cursor.next == 50
        run.leave_out = {53}
        return run.to_the_end()

    assert_never_saw(late, {53})


def test_one_snapshot_serves_several_rollbacks() -> None:
    def thrice() -> Run:
        run = Run()
        assert run.recovery is not None
        while run.cursor.next < 52:
            run.advance()
        for extra in (5, 1, 0):
            for _ in range(extra):
                run.advance()
            assert run.recovery.rollback() == 50
            run.trained = run.trained[:50]
        return run.to_the_end()

    assert_never_saw(thrice, set())


def test_three_flags_in_five_steps_roll_back_and_leave_out_the_batches_and_the_one_before_them() -> None:
    poison = {71: 1e4, 72: math.nan, 74: 1e4}
    run = assert_never_saw(lambda: Run(poison=poison).to_the_end(), {70, 71, 72, 74})
    assert run.recovery is not None
    rollbacks = [incident for incident in run.recovery.incidents if incident.kind == "rollback"]
    assert [(incident.returned_to, incident.rung) for incident in rollbacks] == [
        (50, 1)
    ]  # 60 has not 20 clean steps yet
    assert [action for index, action in run.actions if index == 73] == ["step", "step"]
    replayed = [incident.sample_ids for incident in run.recovery.incidents if incident.kind == "replay"]
    assert replayed == [("70",), ("71",), ("72",), ("74",)]
    assert run.recovery.quarantine.suspects == {"71", "72", "74"}


def test_infinite_parameters_after_a_step_are_rolled_back() -> None:
    def broken_once() -> Run:
        run = Run()
        taken: list[None] = []

        def overflow(*_: object) -> None:
            taken.append(None)
            if len(taken) == 66:  # the step on batch 65
                with torch.no_grad():
                    run.model.body[0].weight[0, 0] = math.inf

        run.optimizer.register_step_post_hook(overflow)
        return run.to_the_end()

    run = assert_never_saw(broken_once, {65})
    assert run.recovery is not None
    (rollback,) = [incident for incident in run.recovery.incidents if incident.kind == "rollback"]
    assert rollback.reason == "parameters are not finite"
    assert rollback.returned_to == 40  # certified, and 5 steps older than the suspect


def test_the_state_before_the_forward_pass_is_found_for_numbers_drawn_between_steps() -> None:
    """The first batch and the generators' state at it are unknown when the recovery step is made."""
    states = []
    for sees_the_batch in (True, False):
        run = Run(poison={0: math.nan})
        torch.manual_seed(77)
        random.seed(78)
        np.random.seed(79)
        if sees_the_batch:
            run.advance()
        states.append(copy.deepcopy((random.getstate(), np.random.get_state(), torch.get_rng_state())))
    assert_equal(states[0], states[1])


def test_begin_step_marks_the_moment_for_loops_that_call_parts_of_the_model() -> None:
    run = Run()
    assert run.recovery is not None
    torch.manual_seed(5)
    run.recovery.begin_step()
    marked = torch.get_rng_state()
    buffer = run.model.body[1].running_mean.clone()
    run.model.body(torch.full((8, 6), math.nan))
    assert run.recovery.check(math.nan, 1.0, ["x"]) == "skip"
    assert torch.equal(torch.get_rng_state(), marked)
    assert torch.equal(run.model.body[1].running_mean, buffer)


def test_a_forward_pass_in_evaluation_mode_does_not_mark_the_moment() -> None:
    run = Run()
    assert run.recovery is not None
    run.model.eval()
    run.model(torch.zeros(2, 6))
    run.model.train()
    torch.manual_seed(6)
    marked = torch.get_rng_state()
    run.model(torch.zeros(2, 6))
    run.recovery.check(math.nan, 1.0, ["x"])
    assert torch.equal(torch.get_rng_state(), marked)


@pytest.mark.parametrize("bad_micro_batch", [0, 2, 3])
def test_a_spike_inside_gradient_accumulation_undoes_the_whole_step(bad_micro_batch: int) -> None:
    def accumulated(poison: bool) -> Run:
        run = Run()
        assert run.recovery is not None
        for step in range(6):
            if step == 3 and not poison:
                continue
            run.optimizer.zero_grad()
            total = torch.zeros(())
            for micro in range(4):
                inputs, targets = run.batches[4 * step + micro]
                if step == 3 and micro == bad_micro_batch:
                    inputs = inputs * math.nan
                loss = (run.model(inputs) - targets).square().mean() / 4
                loss.backward()
                total += loss.detach()
            norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            if run.recovery.check(total, norm, range(4 * step, 4 * step + 4)) == "step":
                run.take_step(step)
        return run

    left = accumulated(True)
    state = copy.deepcopy(state_of(left))
    right = accumulated(False)
    assert left.trained == right.trained == [0, 1, 2, 4, 5]
    assert_equal(state, state_of(right))


def test_a_refused_batch_leaves_no_gradient_behind() -> None:
    run = Run(poison={0: math.nan})
    run.advance()
    assert all(parameter.grad is None for parameter in run.model.parameters())


# Series of losses, without a model that matters.


def bare(config: RecoveryConfig = CONFIG, quarantine: SampleQuarantine | None = None) -> RecoveryStep:
    model = nn.Linear(2, 1)
    return RecoveryStep(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config, quarantine=quarantine)


def noise(count: int, seed: int = 0) -> list[tuple[float, float]]:
    """Losses around 2 with 3 % and gradient norms around 1 with 20 % noise."""
    generator = np.random.default_rng(seed)
    return [
        (2.0 * math.exp(0.03 * loss), math.exp(0.2 * norm))
        for loss, norm in generator.standard_normal((count, 2)).tolist()
    ]


def feed(recovery: RecoveryStep, series: Sequence[tuple[float, float]], start: int = 0) -> list[Action]:
    return [recovery.check(loss, norm, [start + index]) for index, (loss, norm) in enumerate(series)]


def test_false_alarms_stay_below_one_in_a_thousand() -> None:
    assert sum(action != "step" for action in feed(bare(), noise(4000))) <= 4


@pytest.mark.parametrize(
    ("loss_factor", "norm_factor"),
    [(1.5, 1.0), (1.3, 6.0), (1.0, 20.0), (2.0, 1.0), (1e4, 1e4), (math.inf, 1.0), (1.0, math.nan)],
)
def test_single_spikes_are_flagged_and_the_next_step_is_not(loss_factor: float, norm_factor: float) -> None:
    recovery = bare()
    feed(recovery, noise(100))
    loss, norm = noise(1, 5)[0]
    assert recovery.check(loss * loss_factor, norm * norm_factor, ["bad"]) == "skip"
    assert feed(recovery, noise(20, 6)) == ["step"] * 20
    incident = recovery.incidents[0]
    assert incident.sample_ids == ("bad",)
    assert incident.check == 101
    assert incident.action == "skip"
    assert incident.kind == ("spike" if math.isfinite(loss_factor * norm_factor) else "nonfinite")
    assert "bad" in recovery.quarantine


def test_falling_losses_are_no_spikes() -> None:
    recovery = bare()
    feed(recovery, noise(100))
    assert recovery.check(1e-3, 1e-3, ["lucky"]) == "step"
    assert recovery.check(0.0, 0.0, ["perfect"]) == "step"


def test_tensors_and_numbers_are_judged_alike() -> None:
    recovery = bare()
    feed(recovery, noise(40))
    assert recovery.check(torch.tensor(2.0, requires_grad=True), torch.tensor(1.0), torch.tensor([1, 2])) == "step"
    assert recovery.check(torch.tensor(20.0), 1.0, ["a"]) == "skip"
    assert recovery.state_dict()["accepted"] == [[41, ["1", "2"]]]


def test_one_nan_costs_one_step_and_the_detector_works_on() -> None:
    recovery = bare()
    feed(recovery, noise(100))
    assert recovery.check(math.nan, math.nan, ["bad"]) == "skip"
    assert recovery.check(10.0, 1.0, ["spike"]) == "skip"
    assert recovery.check(2.0, 1.0, ["good"]) == "step"


def test_a_burst_of_twenty_steps_is_refused_whole() -> None:
    recovery = bare()
    feed(recovery, noise(100))
    assert "step" not in feed(recovery, [(loss * 5, norm * 5) for loss, norm in noise(20, 3)])
    assert feed(recovery, noise(30, 4)) == ["step"] * 30


def test_a_new_level_is_accepted_after_at_most_sixteen_refusals_and_acquits_its_batches() -> None:
    recovery = bare()
    feed(recovery, noise(200))
    actions = feed(recovery, [(loss * 1.5, norm) for loss, norm in noise(400, 2)], start=1000)
    assert actions.count("skip") <= 16
    assert "rollback" not in actions
    assert actions[16:] == ["step"] * 384
    assert [incident.kind for incident in recovery.incidents].count("rebaseline") == 1
    assert not recovery.quarantine.suspects


def test_even_a_large_new_level_is_accepted_in_the_end() -> None:
    recovery = bare()
    feed(recovery, noise(100))
    actions = feed(recovery, [(loss * 100, norm * 100) for loss, norm in noise(100, 2)])
    assert actions == ["skip"] * 32 + ["step"] * 68


def test_a_change_that_is_announced_costs_nothing() -> None:
    recovery = bare()
    feed(recovery, noise(100))
    recovery.rebaseline("the teacher mix changes")
    assert feed(recovery, [(loss * 1.5, norm) for loss, norm in noise(100, 2)]) == ["step"] * 100
    assert recovery.incidents[0].reason == "the teacher mix changes"


def test_before_a_snapshot_is_certified_nothing_is_rolled_back() -> None:
    recovery = bare()
    recovery.snapshot(0)
    feed(recovery, noise(19))
    assert recovery.certified_steps == ()
    assert feed(recovery, [(math.nan, 1.0)] * 5) == ["skip"] * 5
    feed(recovery, noise(1))
    assert recovery.certified_steps == (0,)
    assert feed(recovery, [(math.nan, 1.0)] * 3)[-1] == "rollback"


def test_in_the_first_steps_only_what_is_not_finite_is_skipped() -> None:
    recovery = bare()
    assert feed(recovery, [(2.0, 1.0), (2e4, 1e4), (math.nan, 1.0), (2.0, math.inf), (3.0, 1.0)]) == [
        "step",
        "step",
        "skip",
        "skip",
        "step",
    ]


@pytest.mark.parametrize("spike", [(100.0, 1.0), (2.0, 50.0)])
def test_behind_a_rebaseline_a_tenfold_leap_is_skipped_before_the_window_is_full(spike: tuple[float, float]) -> None:
    recovery = bare()
    feed(recovery, noise(60))
    recovery.rebaseline("the phase of the schedule changes")
    feed(recovery, noise(18))
    assert feed(recovery, [spike]) == ["skip"]
    assert feed(recovery, noise(30)) == ["step"] * 30
    assert recovery.incidents[-1].kind == "spike"


def test_a_snapshot_must_be_older_than_the_first_suspect() -> None:
    recovery = bare(RecoveryConfig(certify_steps=2, suspect_margin=5))
    recovery.snapshot(0)
    feed(recovery, noise(40))
    recovery.snapshot(40)
    feed(recovery, noise(4, 1))
    assert recovery.certified_steps == (0, 40)
    assert feed(recovery, [(math.nan, 1.0)] * 3) == ["skip", "skip", "rollback"]
    assert recovery.rollback() == 0


# The slow rise.


def rising(count: int) -> list[tuple[float, float]]:
    """0.5 % a step: no single step is a spike."""
    return [(loss * 1.005**index, norm) for index, (loss, norm) in enumerate(noise(count, 9))]


def test_a_loss_that_rises_slowly_is_rolled_back_to_before_the_rise() -> None:
    recovery = bare()
    feed(recovery, noise(60))
    recovery.snapshot(60)
    feed(recovery, noise(40, 1), start=60)
    actions = feed(recovery, rising(200), start=100)
    assert "skip" not in actions[: actions.index("rollback")]
    recovery = bare()
    feed(recovery, noise(60))
    recovery.snapshot(60)
    feed(recovery, noise(40, 1), start=60)
    series = rising(200)
    for index, (loss, norm) in enumerate(series):
        if recovery.check(loss, norm, [100 + index]) == "rollback":
            break
    assert recovery.rollback() == 60
    incident = recovery.incidents[-1]
    assert incident.reason == "the loss stayed high for 20 steps"
    # The average needs 15 % (28 steps), then 20 steps above it, and lags by about 10.
    assert 45 <= index <= 80


def test_a_rise_is_judged_by_the_spread_of_the_losses() -> None:
    generator = np.random.default_rng(4)
    recovery = bare()

    def loose(count: int, level: float) -> list[tuple[float, float]]:
        return [(level * math.exp(0.5 * value), 1.0) for value in generator.standard_normal(count).tolist()]

    feed(recovery, loose(100, 1.0))
    recovery.snapshot(100)
    assert "rollback" not in feed(recovery, loose(100, 1.0) + loose(200, 1.3))


@pytest.mark.parametrize("reason", ["generation", "warm-up", "negative"])
def test_a_rise_is_not_judged_against_what_cannot_be_compared(reason: str) -> None:
    recovery = bare()
    level = -2.0 if reason == "negative" else 2.0
    feed(recovery, [(level, 1.0)] * (10 if reason == "warm-up" else 60))
    recovery.snapshot(1)
    feed(recovery, [(level, 1.0)] * 25)
    assert recovery.certified_steps == (1,)
    if reason == "generation":
        recovery.rebaseline("announced")
    # 1.19 is below the 20 % of a spike and above the 15 % of a rise.
    higher = -1.0 if reason == "negative" else 2.38
    assert "rollback" not in feed(recovery, [(higher, 1.0)] * 60)


def test_a_rise_that_began_before_every_trusted_snapshot_is_lived_with() -> None:
    recovery = bare(RecoveryConfig(suspect_margin=1000))
    feed(recovery, [(2.0, 1.0)] * 60)
    recovery.snapshot(60)
    feed(recovery, [(2.0, 1.0)] * 25)
    assert feed(recovery, [(2.38, 1.0)] * 40) == ["step"] * 40


# The ladder.


def driven(recovery: RecoveryStep, good: int, start: int = 0) -> int:
    """`good` clean steps with a snapshot every 10; returns the next id."""
    for index in range(start, start + good):
        recovery.check(2.0, 1.0, [index])
        if (index + 1) % SNAPSHOT_EVERY == 0:
            recovery.snapshot(index + 1)
    return start + good


def spoil(recovery: RecoveryStep, start: int) -> int:
    """From id `start`: good batches until 6 were accepted, then three bad ones; returns the next id."""
    accepted, index = 0, start
    while accepted < 6:
        accepted += recovery.check(2.0, 1.0, [index]) == "step"
        index += 1
    assert [recovery.check(math.nan, 1.0, [index + offset]) for offset in range(3)] == ["skip", "skip", "rollback"]
    return index + 3


def judged(recovery: RecoveryStep, ids: Sequence[int]) -> list[Action]:
    return [recovery.check(2.0, 1.0, [index]) for index in ids]


def test_repeated_rollbacks_escalate_to_older_snapshots_wider_windows_and_a_lower_rate() -> None:
    recovery = bare(RecoveryConfig(ring_size=6))
    assert spoil(recovery, driven(recovery, 60)) == 69
    assert recovery.rollback() == 40
    # Rung 1: only the suspects (66 to 68) and the batch before them are left out.
    assert judged(recovery, [63, 64, 65, 66, 67, 68, 69]) == ["step"] * 2 + ["skip"] * 4 + ["step"]
    assert recovery.learning_rate_share == 1.0
    spoil(recovery, 100)
    assert recovery.rollback() == 30  # older than before
    # Rung 2: four batches that were not known to be good are left out as well; the known ones are replayed.
    assert judged(recovery, [31, 32, 200, 201, 202, 203, 204]) == ["step"] * 2 + ["skip"] * 4 + ["step"]
    assert recovery.learning_rate_share == 1.0
    spoil(recovery, 300)
    assert recovery.rollback() == 20
    # Rung 3: eight, and half of the learning rate.
    assert judged(recovery, range(400, 409)) == ["skip"] * 8 + ["step"]
    assert recovery.learning_rate_share == pytest.approx(0.505)
    assert [incident.rung for incident in recovery.incidents if incident.kind == "rollback"] == [1, 2, 3]


def test_without_an_older_snapshot_the_same_one_is_used_again() -> None:
    recovery = bare()
    spoil(recovery, driven(recovery, 60))
    assert recovery.rollback() == 40
    spoil(recovery, 100)
    assert recovery.rollback() == 40
    assert recovery.incidents[-1].rung == 2


def test_flags_right_after_a_rollback_are_skipped_because_nothing_was_trained_since() -> None:
    recovery = bare()
    spoil(recovery, driven(recovery, 60))
    recovery.rollback()
    assert feed(recovery, [(math.nan, 1.0)] * 5, start=100) == ["skip"] * 5


def test_an_incident_is_over_after_twenty_clean_steps_beyond_the_replay() -> None:
    recovery = bare()
    ids = spoil(recovery, driven(recovery, 60))
    recovery.rollback()
    driven(recovery, 46, start=ids)  # as many as were undone (26), then 20
    spoil(recovery, 1000)
    recovery.rollback()
    assert [incident.rung for incident in recovery.incidents if incident.kind == "rollback"] == [1, 1]


def test_the_skip_window_is_bounded() -> None:
    recovery = bare(RecoveryConfig(max_skip_window=2))
    spoil(recovery, driven(recovery, 60))
    recovery.rollback()
    spoil(recovery, 100)
    recovery.rollback()
    assert judged(recovery, range(200, 204)) == ["skip", "skip", "step", "step"]


def test_when_the_budget_is_spent_the_run_ends_on_the_last_good_state() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recovery = RecoveryStep(model, optimizer, config=CONFIG)
    driven(recovery, 60)
    good = copy.deepcopy(model.state_dict())
    start = 100
    for _ in range(3):
        start = spoil(recovery, start)
        recovery.rollback()
    spoil(recovery, start)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    with pytest.raises(TrainingDivergedError, match="at most 3 rollbacks in 1000 steps") as caught:
        recovery.rollback()
    assert_equal(dict(model.state_dict()), dict(good))
    assert recovery.incidents[-1].kind == "diverged"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_budget_is_counted_over_a_thousand_steps() -> None:
    recovery = bare(RecoveryConfig(budget_steps=50))
    start = driven(recovery, 60)
    for _ in range(6):
        start = spoil(recovery, start)
        recovery.rollback()
        start = driven(recovery, 60, start=start)
    assert sum(incident.kind == "rollback" for incident in recovery.incidents) == 6


def test_an_endless_run_of_nans_ends_the_run_without_a_trace() -> None:
    run = Run(poison=dict.fromkeys(range(NUM_BATCHES), math.nan))
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(TrainingDivergedError, match="found 64 steps in a row"):
        run.to_the_end()
    assert_equal(dict(run.model.state_dict()), dict(before))
    assert len(run.actions) == 63


def test_nans_that_are_not_in_a_row_do_not_end_the_run() -> None:
    recovery = bare(RecoveryConfig(max_nonfinite=3))
    actions = feed(recovery, [(math.nan, 1.0), (math.nan, 1.0), (2.0, 1.0)] * 4)
    assert actions == ["skip", "skip", "step"] * 4


def test_infinite_parameters_go_to_any_snapshot_there_is_and_without_one_end_the_run() -> None:
    recovery = bare()
    recovery.snapshot(0)
    feed(recovery, noise(3))
    with torch.no_grad():
        recovery._model.weight.fill_(math.inf)
    assert recovery.check(2.0, 1.0, ["x"]) == "rollback"
    assert recovery.rollback() == 0
    assert bool(torch.isfinite(recovery._model.weight).all())
    alone = bare()
    with torch.no_grad():
        alone._model.weight.fill_(math.inf)
    with pytest.raises(TrainingDivergedError, match="no snapshot to return to"):
        alone.check(2.0, 1.0, ["x"])


def test_a_rollback_without_any_snapshot_says_what_to_do() -> None:
    with pytest.raises(TrainingDivergedError, match="Call snapshot"):
        bare().rollback()


def test_a_rollback_that_was_asked_for_is_forgotten_when_training_went_on() -> None:
    recovery = bare()
    start = spoil(recovery, driven(recovery, 60))
    recovery.check(2.0, 1.0, [start])
    assert recovery.rollback() == 60  # the trainer's own: the newest, and nothing is left out
    assert recovery.incidents[-1].reason == "asked for by the trainer"
    assert recovery.check(2.0, 1.0, [60]) == "step"


# Snapshots.


@pytest.mark.parametrize("where", ["parameters", "moments"])
def test_a_state_that_is_not_finite_is_not_kept(where: str) -> None:
    run = Run()
    assert run.recovery is not None
    for _ in range(3):
        run.advance()
    with torch.no_grad():
        if where == "parameters":
            run.model.body[0].bias[0] = math.nan
        else:
            run.optimizer.state[run.model.body[0].bias]["exp_avg_sq"][0] = math.inf
    run.recovery.snapshot(3)
    assert run.recovery.snapshot_steps == ()
    assert run.recovery.incidents[-1].kind == "refused_snapshot"


def test_the_ring_keeps_the_newest_and_never_loses_its_only_certified_snapshot() -> None:
    recovery = bare()
    driven(recovery, 60)
    assert recovery.snapshot_steps == (40, 50, 60)
    assert recovery.certified_steps == (40,)
    for step in (61, 62, 63):
        recovery.check(2.0, 1.0, [step])
        recovery.snapshot(step)
    # 40 stays for being certified and 50 because it is about to be; the newest is there for a rollback at the trainer's wish.
    assert recovery.snapshot_steps == (40, 50, 63)
    driven(recovery, 7, start=63)
    assert recovery.snapshot_steps == (50, 63, 70)
    assert recovery.certified_steps == (50,)


def test_snapshots_that_follow_each_other_closely_still_get_certified() -> None:
    recovery = bare()
    for step in range(60):
        recovery.check(2.0, 1.0, [step])
        recovery.snapshot(step)
    assert recovery.certified_steps


def test_snapshots_newer_than_the_one_returned_to_are_forgotten() -> None:
    recovery = bare()
    spoil(recovery, driven(recovery, 60))
    assert recovery.rollback() == 40
    assert recovery.snapshot_steps == (40,)
    recovery.snapshot(41)
    assert recovery.snapshot_steps[-1] == 41


def test_batches_without_ids_are_judged_but_never_named() -> None:
    recovery = bare()
    for index in range(60):
        recovery.check(2.0, 1.0, [])
        if index == 30:
            recovery.snapshot(30)
    actions = [recovery.check(math.nan, 1.0, []) for _ in range(3)]
    assert actions == ["skip", "skip", "rollback"]
    recovery.rollback()
    assert recovery.check(2.0, 1.0, []) == "step"
    assert not recovery.quarantine.suspects


# The learning rate of the third rung.


def on_third_rung() -> tuple[RecoveryStep, torch.optim.Optimizer]:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recovery = RecoveryStep(model, optimizer, config=RecoveryConfig(rewarm_steps=4))
    driven(recovery, 60)
    for start in (100, 200, 300):
        spoil(recovery, start)
        recovery.rollback()
    return recovery, optimizer


def test_the_rate_is_halved_inside_the_step_only_and_returns_over_the_next_steps() -> None:
    recovery, optimizer = on_third_rung()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # would compound a rate that it can see
    weight = recovery._model.weight
    shares, rates, moved = [], [], []
    for index in range(400, 415):
        if recovery.check(2.0, 1.0, [index]) != "step":
            continue
        before = weight.detach().clone()
        for parameter in recovery._model.parameters():
            parameter.grad = torch.ones_like(parameter)
        scheduled = optimizer.param_groups[0]["lr"]
        shares.append(recovery.learning_rate_share)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == scheduled
        schedule.step()
        rates.append(scheduled)
        moved.append(float((before - weight).detach()[0, 0]))
    assert shares[:5] == [0.625, 0.75, 0.875, 1.0, 1.0]
    assert rates == pytest.approx([0.1 * 0.5**index for index in range(len(rates))])
    assert moved == pytest.approx([share * rate for share, rate in zip(shares, rates, strict=True)], rel=1e-4)


def test_a_step_that_raises_does_not_lower_the_rate_for_good() -> None:
    recovery, optimizer = on_third_rung()

    def broken() -> float:
        raise RuntimeError("out of memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(broken)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert recovery.learning_rate_share == 0.5


# Resuming, and objects that outlive each other.


def test_a_resumed_recovery_decides_as_the_uninterrupted_one() -> None:
    original = bare()
    start = spoil(original, driven(original, 60))
    original.rollback()
    resumed = bare()
    resumed.snapshot(7)
    resumed.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert resumed.snapshot_steps == ()
    assert repr(resumed.state_dict()) == repr(original.state_dict())  # nan differs from itself
    assert repr(resumed.incidents) == repr(original.incidents)
    series = [(2.0, 1.0), (2.0, 1.0), (9.0, 1.0), (math.nan, 1.0), (2.1, 1.0)]
    assert feed(resumed, series, start=64) == feed(original, series, start=64)
    assert resumed.state_dict()["watch"] == original.state_dict()["watch"]
    assert resumed.snapshot_steps == ()
    assert start == 69


def test_flags_reach_the_quarantine_that_was_given(tmp_path: Any) -> None:
    path = tmp_path / "suspects.jsonl"
    recovery = bare(quarantine=SampleQuarantine(path))
    recovery.check(math.nan, 1.0, ["poison", "neighbour"])
    assert SampleQuarantine(path).suspects == {"poison", "neighbour"}


def test_a_model_can_be_copied_and_pickled_and_outlives_its_recovery_step() -> None:
    run = Run()
    for twin in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        assert twin(torch.zeros(2, 6)).shape == (2, 1)
    assert run.recovery is not None
    snapshots = run.recovery.snapshot_steps
    run.recovery = None
    gc.collect()
    run.advance()  # hooks of a recovery step that is gone do nothing
    assert run.trained == [0]
    assert snapshots == ()


# Bounds.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 0),
        ("warmup", 0),
        ("warmup", 65),
        ("threshold", 0.0),
        ("loss_floor", -0.1),
        ("grad_floor", 0.0),
        ("flags_to_rollback", 0),
        ("flags_to_rollback", 6),
        ("flag_horizon", 0),
        ("ema_decay", 1.0),
        ("ema_ratio", 1.0),
        ("ema_steps", 0),
        ("certify_steps", 0),
        ("suspect_margin", -1),
        ("ring_size", 1),
        ("rebaseline_after", 0),
        ("max_rollbacks", -1),
        ("budget_steps", 0),
        ("max_skip_window", 0),
        ("lr_factor", 0.0),
        ("rewarm_steps", 0),
        ("max_nonfinite", 0),
        ("threshold", math.nan),
    ],
)
def test_bounds_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .*, found"):
        RecoveryConfig(**{name: value})  # type: ignore[arg-type]
