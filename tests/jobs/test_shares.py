"""The line that says who taught how much."""

from __future__ import annotations

from jobs.execute import _shares
from nexus.artifacts import Metrics


def metrics(tokens: dict[str, int]) -> Metrics:
    return Metrics(
        retention={}, quantisation_tax={}, throughput={}, stages={}, student_parameters=1, teacher_parameters={}, seed=0,
        teacher_tokens=tokens,
    )  # fmt: skip


def test_shares_are_of_all_tokens_and_the_starved_are_named():
    assert _shares(metrics({"a": 1000, "b": 3000, "c": 0})) == (
        "teachers: 2 of 3 taught 4,000 tokens, each with 25.0% to 75.0% of them; starved: c"
    )


def test_a_run_in_which_nobody_taught_says_so():
    assert _shares(metrics({"a": 0})) == "teachers: 0 of 1 taught 0 tokens; starved: a"
