"""What a teacher's profile says of its weight among the teachers."""

from __future__ import annotations

import math

import pytest

from nexus.artifacts import NIWTProfile, ProfileBaseline
from nexus.errors import ConfigError
from nexus.training.facts import profiled_importance


def profile(nll: float | None, metric: str = "delta_nll") -> NIWTProfile:
    document = {
        "teacher": "code",
        "revision": "main",
        "num_layers": 2,
        "num_samples": 8,
        "metric": metric,
        "strategy": "triangular",
        "baseline": ProfileBaseline(nll=nll, accuracy=None).model_dump(),
        "layers": (),
        "critical_layers": (),
        "seconds": 1.0,
    }
    return NIWTProfile.model_validate(document)


def test_the_importance_of_a_profile_is_the_geometric_mean_of_what_the_teacher_gave_to_the_right_tokens() -> None:
    given = (0.9, 0.5, 0.2)
    nll = -sum(math.log(probability) for probability in given) / 3
    assert profiled_importance(profile(nll)) == pytest.approx(math.prod(given) ** (1 / 3))
    assert profiled_importance(profile(0.0)) == 1.0
    # Random weights over 151,936 ids: next to a teacher that knows its capability it has no say.
    assert profiled_importance(profile(math.log(151_936))) == pytest.approx(1 / 151_936)


def test_a_teacher_that_is_wrong_beyond_all_numbers_still_has_an_importance_above_zero() -> None:
    assert profiled_importance(profile(1e6)) > 0.0


def test_a_profile_without_a_likelihood_has_no_importance() -> None:
    with pytest.raises(ConfigError, match=r"teachers.code.importance: .* found one of cosine_drop.* Give a number"):
        profiled_importance(profile(None, "cosine_drop"))
