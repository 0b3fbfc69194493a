"""Held-out statistics: properties first, then an independent naive reference in pure Python."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.artifacts import QuantisationTax, Retention, RouterMetrics
from nexus.assembly.evaluate import (
    RESAMPLES_PER_BLOCK,
    build_retention,
    divergence_per_item,
    quantisation_tax,
    retention_with_interval,
    router_metrics,
    score_answers,
    tower_set_name,
)
from nexus.errors import DataError


def scores(num_rows: int, share: float, seed: int) -> np.ndarray:
    """bool [num_rows], each True with probability `share`."""
    return np.random.default_rng(seed).random(num_rows) < share


# --- answers ------------------------------------------------------------------------------------------------------------------


def test_gsm8k_answers_are_compared_as_numbers_behind_the_marks() -> None:
    predictions = ["2+2=4\n#### 4", "so #### 1,000.", "#### $7.50", "4", "#### 5\n#### 4"]
    golds = ["1+3=4\n#### 4", "1000", "7.5", "#### 4", "#### 4"]
    assert score_answers(predictions, golds, "gsm8k").tolist() == [True, True, True, False, False]


def test_exact_answers_ignore_outer_white_space_and_nothing_else() -> None:
    predictions = [" True\n", "true", "True False", ""]
    assert score_answers(predictions, ["True"] * 4, "exact").tolist() == [True, False, False, False]


def test_a_gold_completion_scores_itself_as_right() -> None:
    golds = ["18-4=14\n#### 14", "#### -3", "12"]
    assert score_answers([*golds[:2], "#### 12"], golds, "gsm8k").all()


def test_no_rows_give_no_scores() -> None:
    assert score_answers([], [], "exact").shape == (0,)


def test_a_missing_prediction_is_refused() -> None:
    with pytest.raises(DataError, match=r"2 gold answers, found 1"):
        score_answers(["a"], ["a", "b"], "exact")


@pytest.mark.parametrize(("gold", "kind"), [("  ", "exact"), ("", "gsm8k"), ("####  ", "gsm8k")])
def test_a_gold_answer_without_content_is_refused_by_row(gold: str, kind: str) -> None:
    with pytest.raises(DataError, match=r"held-out row 1"):
        score_answers(["1", "1"], ["1", gold], kind)  # type: ignore[arg-type]


# --- retention ----------------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_teacher_retains_exactly_one() -> None:
    teacher = scores(300, 0.9, seed=1)
    assert retention_with_interval(teacher, teacher, chance=0.1, bootstrap=500, seed=0) == (1.0, (1.0, 1.0))


def test_a_student_at_chance_retains_nothing() -> None:
    student = [True] * 10 + [False] * 90
    retention, (low, high) = retention_with_interval([True] * 100, student, chance=0.1, bootstrap=500, seed=0)
    assert retention == pytest.approx(0.0, abs=1e-12)
    assert low == 0.0
    assert high > 0.0


def test_a_student_below_chance_is_clipped_at_zero_and_not_negative() -> None:
    retention, interval = retention_with_interval([1.0] * 50, [0.0] * 50, chance=0.25, bootstrap=100, seed=0)
    assert (retention, interval) == (0.0, (0.0, 0.0))


def test_retention_is_the_chance_corrected_ratio() -> None:
    retention, _ = retention_with_interval([1, 1, 1, 1, 0], [1, 1, 1, 0, 0], chance=0.2, bootstrap=200, seed=0)
    assert retention == pytest.approx((0.6 - 0.2) / (0.8 - 0.2))


def test_a_student_better_than_its_teacher_retains_more_than_one() -> None:
    retention, _ = retention_with_interval([1, 1, 1, 0], [1, 1, 1, 1], chance=0.0, bootstrap=200, seed=0)
    assert retention == pytest.approx(4 / 3)


def test_error_rates_give_what_their_complements_give() -> None:
    generator = np.random.default_rng(3)
    teacher, student = generator.uniform(0.0, 0.3, 80), generator.uniform(0.1, 0.6, 80)
    errors = retention_with_interval(teacher, student, chance=0.9, bootstrap=300, seed=5, error_rate=True)
    # -e and 1 - e order their distinct outcomes alike, so the same seed draws the same rows.
    accuracies = retention_with_interval(1 - teacher, 1 - student, chance=1 - 0.9, bootstrap=300, seed=5)
    assert errors[0] == pytest.approx(accuracies[0])
    assert errors[1] == pytest.approx(accuracies[1])


def test_more_errors_retain_less() -> None:
    few, _ = retention_with_interval([0.1] * 20, [0.2] * 20, chance=1.0, bootstrap=50, seed=0, error_rate=True)
    many, _ = retention_with_interval([0.1] * 20, [0.5] * 20, chance=1.0, bootstrap=50, seed=0, error_rate=True)
    assert few == pytest.approx(0.8 / 0.9)
    assert many == pytest.approx(0.5 / 0.9)


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=30, max_size=80),
    chance=st.floats(0.0, 0.3),
    seed=st.integers(0, 5),
)
def test_intervals_are_ordered_finite_and_not_negative(
    pairs: list[tuple[bool, bool]], chance: float, seed: int
) -> None:
    # Half of the teacher's rows are right whatever is drawn, so that it stays above chance.
    teacher = [row for row, _ in pairs] + [True] * len(pairs)
    student = [row for _, row in pairs] + [False] * len(pairs)
    retention, (low, high) = retention_with_interval(teacher, student, chance=chance, bootstrap=200, seed=seed)
    assert 0.0 <= low <= high < math.inf
    assert retention >= 0.0


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(40)))
def test_the_order_of_the_rows_changes_nothing(order: list[int]) -> None:
    teacher, student = scores(40, 0.9, seed=1), scores(40, 0.6, seed=2)
    expected = retention_with_interval(teacher, student, chance=0.1, bootstrap=300, seed=7)
    assert retention_with_interval(teacher[order], student[order], chance=0.1, bootstrap=300, seed=7) == expected


def test_one_more_right_answer_never_lowers_the_retention() -> None:
    teacher, student = scores(60, 0.95, seed=1), scores(60, 0.5, seed=2)
    before, _ = retention_with_interval(teacher, student, chance=0.1, bootstrap=10, seed=0)
    for row in np.flatnonzero(~student):
        better = student.copy()
        better[row] = True
        assert retention_with_interval(teacher, better, chance=0.1, bootstrap=10, seed=0)[0] > before


def test_the_seed_decides_the_interval() -> None:
    teacher, student = scores(100, 0.9, seed=1), scores(100, 0.7, seed=2)
    first, again, other = (
        retention_with_interval(teacher, student, chance=0.0, bootstrap=200, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first[0] == other[0]
    assert first[1] != other[1]


def naive_interval(teacher: np.ndarray, student: np.ndarray, chance: float, resamples: int) -> tuple[float, float]:
    """Row by row, with Python's own generator: draw B rows with replacement, both models' results together."""
    generator = random.Random(11)
    values = []
    for _ in range(resamples):
        rows = [generator.randrange(len(teacher)) for _ in teacher]
        mean_teacher = math.fsum(float(teacher[row]) for row in rows) / len(rows)
        mean_student = math.fsum(float(student[row]) for row in rows) / len(rows)
        values.append(max(0.0, (mean_student - chance) / (mean_teacher - chance)))
    values.sort()
    return values[round(0.025 * (resamples - 1))], values[round(0.975 * (resamples - 1))]


@pytest.mark.parametrize("continuous", [False, True])
def test_the_interval_agrees_with_resampling_row_by_row(continuous: bool) -> None:
    teacher = scores(60, 0.9, seed=1).astype(float)
    student = np.where(scores(60, 0.85, seed=2), teacher, 0.0)
    if continuous:
        noise = np.random.default_rng(4).uniform(0, 0.2, (2, 60))
        teacher, student = teacher - noise[0], student - noise[1]
    _, interval = retention_with_interval(teacher, student, chance=0.1, bootstrap=4000, seed=0)
    # The standard error of a 2.5 % quantile of 2,000 draws of this spread (0.05) is about 0.003.
    assert interval == pytest.approx(naive_interval(teacher, student, 0.1, 2000), abs=0.015)


def test_pairing_narrows_the_interval_of_a_student_that_fails_where_its_teacher_fails() -> None:
    teacher = scores(400, 0.8, seed=1)
    alike = teacher.copy()
    alike[np.flatnonzero(teacher)[:8]] = False
    unrelated = np.random.default_rng(9).permutation(alike)
    paired, crossed = (
        retention_with_interval(teacher, student, chance=0.0, bootstrap=2000, seed=0)[1]
        for student in (alike, unrelated)
    )
    assert (paired[1] - paired[0]) < 0.5 * (crossed[1] - crossed[0])


@pytest.mark.parametrize("resamples", [1, RESAMPLES_PER_BLOCK, 2 * RESAMPLES_PER_BLOCK + 3])
def test_any_number_of_resamples_gives_an_interval(resamples: int) -> None:
    teacher, student = scores(50, 0.9, seed=1), scores(50, 0.7, seed=2)
    low, high = retention_with_interval(teacher, student, chance=0.0, bootstrap=resamples, seed=0)[1]
    assert 0.0 < low <= high


@pytest.mark.parametrize("right", [0, 25])
def test_a_teacher_at_or_below_chance_is_refused(right: int) -> None:
    teacher = [True] * right + [False] * (100 - right)
    with pytest.raises(DataError, match=r"teacher above chance \(0\.250\)"):
        retention_with_interval(teacher, teacher, chance=0.25, bootstrap=100, seed=0)


def test_a_teacher_with_errors_at_chance_is_refused() -> None:
    with pytest.raises(DataError, match=r"found a mean score of 0\.900"):
        retention_with_interval([0.9] * 10, [0.9] * 10, chance=0.9, bootstrap=100, seed=0, error_rate=True)


def test_a_teacher_that_many_resamples_put_at_chance_is_refused() -> None:
    with pytest.raises(DataError, match=r"resample of 4 rows.*evaluate\.max_rows"):
        retention_with_interval([1, 0, 0, 0], [1, 0, 0, 0], chance=0.0, bootstrap=500, seed=0)


def test_rare_resamples_at_chance_are_left_out() -> None:
    # P(a resample misses all four right rows of ten) = 0.6^10 = 0.6 %.
    teacher = [1] * 4 + [0] * 6
    retention, interval = retention_with_interval(teacher, teacher, chance=0.0, bootstrap=2000, seed=0)
    assert (retention, interval) == (1.0, (1.0, 1.0))


@pytest.mark.parametrize(
    ("teacher", "student"),
    [([], []), ([1.0, 1.0], [1.0]), ([[1.0]], [[1.0]]), ([1.0, math.nan], [1.0, 1.0]), ([1.0, 1.0], [1.0, math.inf])],
)
def test_scores_of_different_rows_or_without_value_are_refused(teacher: list[float], student: list[float]) -> None:
    with pytest.raises(DataError, match=r"Expected"):
        retention_with_interval(teacher, student, chance=0.0, bootstrap=10, seed=0)


# --- the Retention artefact ---------------------------------------------------------------------------------------------------


def build(labels_only: np.ndarray | None, contract: float = 0.7) -> Retention:
    return build_retention(
        teacher="big",
        teacher_scores=scores(200, 0.95, seed=1),
        student_scores=scores(200, 0.75, seed=2),
        labels_only_scores=labels_only,
        chance=0.1,
        contract=contract,
        bootstrap=300,
        seed=0,
    )


def test_a_retention_holds_its_own_arithmetic() -> None:
    row = build(scores(200, 0.3, seed=3))
    assert row.retention == pytest.approx((row.student_score - row.chance) / (row.teacher_score - row.chance))
    assert row.labels_only_score is not None
    assert row.labels_only_retention == pytest.approx(
        (row.labels_only_score - row.chance) / (row.teacher_score - row.chance)
    )
    assert row.labels_only_ci95 is not None
    assert row.labels_only_ci95[0] <= row.labels_only_retention <= row.labels_only_ci95[1]
    assert row.teacher_score == scores(200, 0.95, seed=1).mean()
    assert row.num_rows == 200
    assert Retention.model_validate_json(row.model_dump_json()) == row


def test_without_a_labels_only_student_its_numbers_are_absent() -> None:
    row = build(None)
    assert (row.labels_only_score, row.labels_only_retention, row.labels_only_ci95) == (None, None, None)


def test_the_contract_is_held_from_the_retention_upwards() -> None:
    reached = build(None).retention
    assert build(None, contract=reached).holds
    assert not build(None, contract=reached + 1e-9).holds


# --- quantisation tax ---------------------------------------------------------------------------------------------------------


def log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    return logits_NC - np.log(np.exp(logits_NC).sum(axis=-1, keepdims=True))


def test_divergence_agrees_with_a_sum_over_classes() -> None:
    generator = np.random.default_rng(0)
    log_p, log_q = (log_softmax(generator.normal(size=(7, 5))) for _ in range(2))
    kl_N, same_N = divergence_per_item(log_p, log_q)
    for row in range(7):
        expected = math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p[row], log_q[row], strict=True))
        assert kl_N[row] == pytest.approx(expected, rel=1e-12)
        assert same_N[row] == (list(log_p[row]).index(max(log_p[row])) == list(log_q[row]).index(max(log_q[row])))


def test_equal_distributions_diverge_by_exactly_zero() -> None:
    log_p = log_softmax(np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32))
    kl_N, same_N = divergence_per_item(log_p, log_p)
    assert kl_N.tolist() == [0.0] * 4
    assert same_N.all()


def test_a_class_that_the_float_teacher_excludes_adds_nothing() -> None:
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log([[0.5, 0.5, 0.0]]), np.log([[0.25, 0.25, 0.5]])
    assert divergence_per_item(log_p, log_q)[0] == pytest.approx([math.log(2)])
    assert divergence_per_item(log_p, log_p)[0].tolist() == [0.0]


@pytest.mark.parametrize(
    ("log_p", "log_q", "expected"),
    [
        (np.log([[0.5, 0.5]]), np.log([[0.2, 0.2, 0.6]]), "two equal shapes"),
        (np.log([0.5, 0.5]), np.log([0.5, 0.5]), "two equal shapes"),
        (np.log([[0.5, 0.4]]), np.log([[0.5, 0.5]]), "sum to one"),
        (np.log([[0.5, 0.5]]), np.array([[2.0, 1.0]]), "sum to one"),
    ],
)
def test_anything_but_two_whole_distributions_is_refused(log_p: np.ndarray, log_q: np.ndarray, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        divergence_per_item(log_p, log_q)


def tax(**changes: object) -> QuantisationTax:
    arguments = {
        "float_correct": [True, True, True, False],
        "nf4_correct": [True, True, False, False],
        "kl_N": [0.1, 0.3, 0.2],
        "same_top1_N": [True, True, False],
        "quantised_share": 0.8,
        "max_weight_error": 0.09,
    }
    return quantisation_tax(**{**arguments, **changes})  # type: ignore[arg-type]


def test_the_tax_averages_scores_over_rows_and_divergence_over_items() -> None:
    expected = {"float_score": 0.75, "nf4_score": 0.5, "mean_kl_nats": 0.2, "top1_agreement": 2 / 3}
    result = tax().model_dump()
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    assert (result["quantised_share"], result["max_weight_error"]) == (0.8, 0.09)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"nf4_correct": [True]}, "same rows"),
        ({"kl_N": [0.1]}, "same rows"),
        ({"float_correct": [], "nf4_correct": []}, "found none"),
        ({"kl_N": [], "same_top1_N": []}, "found none"),
        ({"kl_N": [0.1, math.inf, 0.2]}, "finite"),
    ],
)
def test_a_tax_that_was_not_measured_on_both_copies_is_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        tax(**changes)


# --- router -------------------------------------------------------------------------------------------------------------------


def test_a_set_of_towers_has_one_name_whatever_its_order() -> None:
    assert tower_set_name(("vision", "audio")) == tower_set_name(["audio", "vision"]) == "audio+vision"
    assert tower_set_name(()) == "trunk"


def test_router_metrics_count_every_row_once() -> None:
    metrics = router_metrics(
        labels=[("vision",), ("vision",), (), ("reasoning",), ()],
        decisions=[("vision",), (), (), ("reasoning",), ("reasoning",)],
        sources=["model", "trunk", "model", "keyword", "model"],
        threshold=0.7,
    )
    assert metrics == RouterMetrics(
        accuracy=3 / 5,
        threshold=0.7,
        coverage=3 / 5,
        confusion={
            "vision": {"vision": 1, "trunk": 1},
            "trunk": {"trunk": 1, "reasoning": 1},
            "reasoning": {"reasoning": 1},
        },
    )
    assert json.loads(metrics.model_dump_json())["confusion"]["vision"] == {"vision": 1, "trunk": 1}


@pytest.mark.parametrize(
    ("labels", "decisions", "sources"), [([], [], []), ([()], [(), ()], ["model"]), ([()], [()], [])]
)
def test_rows_that_were_not_routed_are_refused(labels: list, decisions: list, sources: list) -> None:
    with pytest.raises(DataError, match="Route every held-out row once"):
        router_metrics(labels, decisions, sources, threshold=0.5)
