"""The learning-rate schedule at its corners, its state, and the cosine between two values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nexus.training.scheduler import LearningRateSchedule, ScheduleKind, cosine_decay, ramp_share


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def trace(schedule: LearningRateSchedule, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
    return rates


def test_warm_up_is_linear_reaches_the_peak_and_the_last_step_has_the_final_share() -> None:
    rates = trace(LearningRateSchedule(optimizer(2.0), total_steps=12, warmup_steps=4, final_fraction=0.25), 14)
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[3:12]))
    assert rates[11:] == [0.5, 0.5, 0.5]
    # Half a cosine over the 8 steps from the peak to the end: its middle is the mean of both.
    assert rates[7] == pytest.approx(0.5 * (2.0 + 0.5))


def test_without_warm_up_the_first_step_uses_the_peak() -> None:
    assert trace(LearningRateSchedule(optimizer(3.0), total_steps=3, final_fraction=0.0), 3) == pytest.approx(
        [3.0, 1.5, 0.0]
    )


def test_a_run_of_one_step_ends_where_it_begins() -> None:
    assert trace(LearningRateSchedule(optimizer(3.0), total_steps=1, final_fraction=0.1), 2) == pytest.approx(
        [0.3, 0.3]
    )


def test_constant_keeps_the_peak_after_the_warm_up() -> None:
    schedule = LearningRateSchedule(optimizer(1.0), total_steps=5, warmup_steps=2, kind="constant")
    assert trace(schedule, 7) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_every_group_follows_its_own_peak() -> None:
    schedule = LearningRateSchedule(optimizer(1.0, 0.1), total_steps=10, warmup_steps=2)
    assert schedule.get_last_lr() == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize(("kind", "middle"), [("cosine", "decay"), ("constant", "constant")])
def test_the_phase_names_the_part_of_the_schedule(kind: ScheduleKind, middle: str) -> None:
    schedule = LearningRateSchedule(optimizer(1.0), total_steps=4, warmup_steps=1, kind=kind)
    phases = []
    for _ in range(6):
        phases.append(schedule.phase)
        schedule.step()
    assert phases == ["warmup", middle, middle, middle, "done", "done"]


def test_a_restored_schedule_sets_the_learning_rate_and_continues() -> None:
    original_optimizer = optimizer(1.0)
    original = LearningRateSchedule(original_optimizer, total_steps=10, warmup_steps=3)
    for _ in range(5):
        original.step()
    restored_optimizer = optimizer(1.0)
    restored = LearningRateSchedule(restored_optimizer, total_steps=10, warmup_steps=3)
    restored.load_state_dict(original.state_dict())
    assert restored_optimizer.param_groups[0]["lr"] == original_optimizer.param_groups[0]["lr"]
    assert trace(restored, 5) == trace(original, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps >= 1"),
        ({"total_steps": 5, "warmup_steps": 5}, "warmup_steps < total_steps"),
        ({"total_steps": 5, "warmup_steps": -1}, "0 <= warmup_steps"),
        ({"total_steps": 5, "final_fraction": 1.5}, "final_fraction: expected"),
        ({"total_steps": 5, "final_fraction": math.nan}, "final_fraction: expected"),
        ({"total_steps": 5, "kind": "linear"}, "kind: expected"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRateSchedule(optimizer(1.0), **settings)  # type: ignore[arg-type]


def test_cosine_decay_goes_from_start_to_end_and_stays() -> None:
    values = [cosine_decay(1.0, 0.3, step, 8) for step in range(-1, 11)]
    assert values[:2] == [1.0, 1.0]
    assert values[5] == pytest.approx(0.65)  # half of the way at half of the steps
    assert values[3] == pytest.approx(0.3 + 0.7 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert values[9:] == [0.3, 0.3, 0.3]
    assert values[1:10] == sorted(values[1:10], reverse=True)


@pytest.mark.parametrize("total", [0, -1])
def test_cosine_decay_over_no_steps_is_at_its_end(total: int) -> None:
    assert cosine_decay(1.0, 0.3, 0, total) == 0.3


def test_wsd_warms_up_stays_and_falls_along_one_minus_the_square_root() -> None:
    schedule = LearningRateSchedule(
        optimizer(1.0), total_steps=20, warmup_steps=4, final_fraction=0.1, decay_share=0.25, kind="wsd"
    )
    fractions = [schedule.fraction(step) for step in range(22)]
    assert fractions[:4] == [0.25, 0.5, 0.75, 1.0]
    assert fractions[4:15] == [1.0] * 11
    assert fractions[15:20] == pytest.approx([1.0 - 0.9 * math.sqrt(n / 5) for n in range(1, 6)])
    assert fractions[19:] == pytest.approx([0.1] * 3)
    phases = []
    for _ in range(21):
        phases.append(schedule.phase)
        schedule.step()
    assert phases == ["warmup"] * 4 + ["constant"] * 11 + ["decay"] * 5 + ["done"]


def test_a_fall_longer_than_what_is_left_begins_after_the_warm_up() -> None:
    schedule = LearningRateSchedule(optimizer(1.0), total_steps=10, warmup_steps=4, decay_share=1.0, kind="wsd")
    assert schedule.fraction(3) == 1.0
    assert schedule.fraction(4) < 1.0


def test_a_share_of_the_steps_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="decay_share: expected a share of the steps"):
        LearningRateSchedule(optimizer(1.0), total_steps=10, decay_share=0.0, kind="wsd")


def test_a_later_teacher_rises_from_nothing_to_its_whole_importance() -> None:
    assert [ramp_share(step, 3, 4) for step in range(9)] == [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [ramp_share(step, 2, 0) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]
