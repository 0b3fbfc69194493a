"""Statistics of held-out evaluation: scores, retention with its interval, quantisation tax, router confusion. NumPy alone.

Retention of a capability is R = max(0, (s - c) / (t - c)) with student score s, teacher score t and chance c. Its interval is the
percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over held-out rows, *paired*: a resampled row brings the teacher's and
the student's result together, so that rows which are hard for both cancel.

Shape letters: B rows, N scored items (tokens or rows), C classes or vocabulary, U distinct (teacher, student) outcomes, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nexus.artifacts import QuantisationTax, Retention, RouterMetrics
from nexus.data.answers import AnswerPattern, extract_answer, gold_answer
from nexus.errors import DataError

INTERVAL_PERCENTILES = (2.5, 97.5)
"""The central 95 %."""
MAX_UNDEFINED_SHARE = 0.025
"""Resamples whose teacher is not above chance have no retention. Up to one tail of the interval they can be left out; beyond it,
the interval itself would be a matter of taste."""
RESAMPLES_PER_BLOCK = 256
"""Bounds the count matrix [R, U] to 256 rows at a time."""

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def score_answers(predictions: Sequence[str], answers: Sequence[str], kind: AnswerPattern) -> BoolArray:
    """bool [B]: which predictions give the gold answer.

    `gsm8k` compares the normalised numbers after `####`, `exact` the whole texts without outer white space. A prediction without
    an answer is wrong.

    Raises:
        DataError: when the lengths differ, or a gold answer holds nothing that could be compared.
    """
    if len(predictions) != len(answers):
        raise DataError(
            f"Expected one prediction for each of {len(answers)} gold answers, found {len(predictions)}. "
            "Score the rows that were generated, all of them, in their order."
        )
    correct = np.zeros(len(answers), dtype=bool)
    for row, (prediction, answer) in enumerate(zip(predictions, answers, strict=True)):
        gold = gold_answer(answer, kind)
        if gold is None:
            raise DataError(
                f"Expected a gold answer of kind {kind!r}, found {answer[:60]!r} in held-out row {row}. "
                "Mend the row or change data.<capability>.answer."
            )
        correct[row] = extract_answer(prediction, kind) == gold
    return correct


def retention_with_interval(
    teacher_scores: ArrayLike,
    student_scores: ArrayLike,
    *,
    chance: float,
    bootstrap: int,
    seed: int,
    error_rate: bool = False,
) -> tuple[float, tuple[float, float]]:
    """Chance-corrected retention and its paired 95 % bootstrap interval.

    Args:
        teacher_scores: [B], bool (right or wrong) or float, one per held-out row.
        student_scores: [B], the student on the same rows in the same order.
        chance: the mean score of guessing, in the scores' own unit.
        bootstrap: number of resamples.
        seed: of the resampling; the result depends on nothing else, the order of the rows included.
        error_rate: the scores are errors (lower is better), so that `chance` is the error of guessing. Scores and chance are
            then negated, which leaves the formula's value and turns what "above chance" means.

    Raises:
        DataError: when there are no rows, the two differ in length, a score is not finite, or the teacher is at or below chance (on
            the rows, or on too many resamples): nothing can be retained of a skill that is not there.
    """
    teacher_B = np.asarray(teacher_scores, dtype=np.float64)
    student_B = np.asarray(student_scores, dtype=np.float64)
    if teacher_B.ndim != 1 or teacher_B.shape != student_B.shape or teacher_B.size == 0:
        raise DataError(
            f"Expected teacher and student scores of the same held-out rows, found shapes {teacher_B.shape} and "
            f"{student_B.shape}. Evaluate both on one non-empty set of rows."
        )
    if not (np.isfinite(teacher_B).all() and np.isfinite(student_B).all()):
        raise DataError("Expected finite scores, found nan or infinity. Score a row without an answer as wrong.")
    if error_rate:
        teacher_B, student_B, chance = -teacher_B, -student_B, -chance
    if teacher_B.mean() <= chance:
        raise DataError(
            f"Expected a teacher above chance ({abs(chance):.3f}), found a mean score of {abs(teacher_B.mean()):.3f}. "
            "Retention of it is undefined: choose a teacher that has the skill, or correct data.<capability>.chance."
        )
    retention = float(_retention(teacher_B.mean(), student_B.mean(), chance))
    resampled_R = _bootstrap(teacher_B, student_B, chance, bootstrap, np.random.default_rng(seed))
    undefined = 1.0 - resampled_R.size / bootstrap
    if undefined > MAX_UNDEFINED_SHARE:
        raise DataError(
            f"Expected the teacher above chance in nearly every resample of {teacher_B.size} rows, found it at or below in "
            f"{undefined:.0%}. Raise evaluate.max_rows or choose a stronger teacher."
        )
    low, high = np.percentile(resampled_R, INTERVAL_PERCENTILES)
    return retention, (float(low), float(high))


def build_retention(
    *,
    teacher: str,
    teacher_scores: ArrayLike,
    student_scores: ArrayLike,
    labels_only_scores: ArrayLike | None,
    chance: float,
    contract: float,
    bootstrap: int,
    seed: int,
) -> Retention:
    """The `Retention` of one capability from [B] results of teacher, student and (where trained) labels-only student.

    The contract holds when the retention itself, not its lower bound, reaches it.

    Raises:
        DataError: as `retention_with_interval`.
    """
    retention, interval = retention_with_interval(
        teacher_scores, student_scores, chance=chance, bootstrap=bootstrap, seed=seed
    )
    without, without_score, without_interval = None, None, None
    if labels_only_scores is not None:
        without_score = float(np.mean(np.asarray(labels_only_scores, dtype=np.float64)))
        without, without_interval = retention_with_interval(
            teacher_scores, labels_only_scores, chance=chance, bootstrap=bootstrap, seed=seed
        )
    return Retention(
        teacher=teacher,
        teacher_score=float(np.mean(np.asarray(teacher_scores, dtype=np.float64))),
        student_score=float(np.mean(np.asarray(student_scores, dtype=np.float64))),
        chance=chance,
        retention=retention,
        ci95=interval,
        contract=contract,
        holds=retention >= contract,
        num_rows=int(np.size(teacher_scores)),
        labels_only_score=without_score,
        labels_only_retention=without,
        labels_only_ci95=without_interval,
    )


def divergence_per_item(float_logprobs_NC: ArrayLike, nf4_logprobs_NC: ArrayLike) -> tuple[FloatArray, BoolArray]:
    """KL(float || NF4) in nats, float64 [N], and whether both put the same class first, bool [N].

    Args:
        float_logprobs_NC: log-probabilities of the unquantised teacher; -inf is a probability of zero and adds nothing.
        nf4_logprobs_NC: those of the quantised teacher for the same items.

    Raises:
        DataError: when the shapes differ or a row does not sum to one within 1e-3.
    """
    log_p_NC = np.asarray(float_logprobs_NC, dtype=np.float64)
    log_q_NC = np.asarray(nf4_logprobs_NC, dtype=np.float64)
    if log_p_NC.ndim != 2 or log_p_NC.shape != log_q_NC.shape:
        raise DataError(
            f"Expected two equal shapes [items, classes], found {log_p_NC.shape} and {log_q_NC.shape}. "
            "Score the same items with both copies of the teacher."
        )
    p_NC = np.exp(log_p_NC)
    for total_N in (p_NC.sum(axis=-1), np.exp(log_q_NC).sum(axis=-1)):
        if not np.allclose(total_N, 1.0, atol=1e-3):
            raise DataError(
                "Expected log-probabilities that sum to one over the classes, found "
                f"{total_N[np.argmax(np.abs(total_N - 1.0))]:.3f}. Pass whole distributions, not logits or a top-k."
            )
    # Written as a difference only where p > 0: 0 * (-inf - x) is nan, and its limit is 0.
    difference_NC = np.subtract(log_p_NC, log_q_NC, out=np.zeros_like(log_p_NC), where=p_NC > 0)
    # Rounding can leave -1e-17 for equal distributions; KL is never negative.
    kl_N = np.maximum((p_NC * difference_NC).sum(axis=-1), 0.0)
    return kl_N, log_p_NC.argmax(axis=-1) == log_q_NC.argmax(axis=-1)


def quantisation_tax(
    *,
    float_correct: ArrayLike,
    nf4_correct: ArrayLike,
    kl_N: ArrayLike,
    same_top1_N: ArrayLike,
    quantised_share: float,
    max_weight_error: float,
) -> QuantisationTax:
    """What NF4 costs a teacher: scores [B] of both copies, and what `divergence_per_item` said batch by batch, concatenated.

    Raises:
        DataError: when nothing was scored or the copies were scored on different numbers of rows.
    """
    if np.size(float_correct) != np.size(nf4_correct) or np.size(kl_N) != np.size(same_top1_N):
        raise DataError(
            f"Expected both copies of the teacher on the same rows, found {np.size(float_correct)} and "
            f"{np.size(nf4_correct)} scores, {np.size(kl_N)} and {np.size(same_top1_N)} divergences. Score them together."
        )
    if np.size(float_correct) == 0 or np.size(kl_N) == 0:
        raise DataError(
            "Expected held-out rows to weigh NF4 on, found none. Name test files in data.<capability>.test."
        )
    if not np.isfinite(np.asarray(kl_N, dtype=np.float64)).all():
        raise DataError(
            "Expected finite divergences, found infinity or nan: NF4 rules out what the teacher allows, or gave nan. "
            "Keep more modules in floating point (skip_modules)."
        )
    return QuantisationTax(
        float_score=float(np.mean(np.asarray(float_correct, dtype=np.float64))),
        nf4_score=float(np.mean(np.asarray(nf4_correct, dtype=np.float64))),
        mean_kl_nats=float(np.mean(np.asarray(kl_N, dtype=np.float64))),
        top1_agreement=float(np.mean(np.asarray(same_top1_N, dtype=np.float64))),
        quantised_share=quantised_share,
        max_weight_error=max_weight_error,
    )


def tower_set_name(towers: Sequence[str]) -> str:
    """A set of towers as the report and `RouterMetrics.confusion` call it: `audio+vision`, or `trunk` for none."""
    return "+".join(sorted(towers)) or "trunk"


def router_metrics(
    labels: Sequence[Sequence[str]],
    decisions: Sequence[Sequence[str]],
    sources: Sequence[str],
    *,
    threshold: float,
    network_source: str = "model",
) -> RouterMetrics:
    """Confusion, accuracy and coverage of held-out routing decisions.

    Args:
        labels: the towers that each row needs.
        decisions: the towers that the router switched on, same order.
        sources: who decided each row, as `RouterDecision.source` says.
        network_source: the source that counts as covered.

    Raises:
        DataError: when there are no rows or the lengths differ.
    """
    if not len(labels) == len(decisions) == len(sources) or not labels:
        raise DataError(
            f"Expected one decision and one source for each labelled row, found {len(labels)}, {len(decisions)} and "
            f"{len(sources)}. Route every held-out row once."
        )
    confusion: dict[str, dict[str, int]] = {}
    for label, decision in zip(labels, decisions, strict=True):
        counts = confusion.setdefault(tower_set_name(label), {})
        counts[tower_set_name(decision)] = counts.get(tower_set_name(decision), 0) + 1
    right = sum(counts.get(label, 0) for label, counts in confusion.items())
    return RouterMetrics(
        accuracy=right / len(labels),
        threshold=threshold,
        coverage=sum(source == network_source for source in sources) / len(labels),
        confusion=confusion,
    )


def _retention(teacher: float | FloatArray, student: float | FloatArray, chance: float) -> FloatArray:
    return np.maximum(0.0, (student - chance) / (teacher - chance))


def _bootstrap(
    teacher_B: FloatArray, student_B: FloatArray, chance: float, resamples: int, generator: np.random.Generator
) -> FloatArray:
    """Retention of each resample whose teacher is above chance, float64 [at most R].

    Drawing B rows with replacement and counting their distinct outcomes is one multinomial draw over the U distinct (teacher,
    student) pairs. For right/wrong scores U is at most 4, whatever B is.
    """
    outcomes_U2, counts_U = np.unique(np.stack([teacher_B, student_B], axis=1), axis=0, return_counts=True)
    kept = []
    for start in range(0, resamples, RESAMPLES_PER_BLOCK):
        size = min(RESAMPLES_PER_BLOCK, resamples - start)
        drawn_RU = generator.multinomial(teacher_B.size, counts_U / counts_U.sum(), size=size)
        means_R2 = drawn_RU @ outcomes_U2 / teacher_B.size
        above = means_R2[:, 0] > chance
        kept.append(_retention(means_R2[above, 0], means_R2[above, 1], chance))
    return np.concatenate(kept)
