"""A teacher that was put to sleep wakes by itself and answers as before; one whose files changed meanwhile is refused."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from actors.teacher import TeacherActor
from nexus.towers.health import FingerprintChangedError
from nexus.towers.packing import unpack_targets
from nexus.towers.targets import ScoreRequest

REQUEST = ScoreRequest(("a",), ("Tom has 3 pens.",), ("3+2=5\n#### 5",), None, 1.0, 8, (0,))


@pytest.fixture
def actor(reasoning_spec, tmp_path):
    """The actor's class itself, over a copy of the teacher's files."""
    folder = tmp_path / "teacher"
    shutil.copytree(reasoning_spec.path, folder)
    return TeacherActor(dataclasses.replace(reasoning_spec, path=str(folder)), 1)


def test_a_sleeper_holds_no_model_and_wakes_with_equal_answers(actor):
    before = unpack_targets(actor.score(REQUEST))
    assert actor.health().loaded
    assert actor.sleep() > 0
    assert not actor.health().loaded
    # Asleep already: nothing to do.
    assert actor.sleep() > 0
    assert unpack_targets(actor.score(REQUEST)) == before
    assert actor.health().loaded


def test_a_teacher_whose_files_changed_in_its_sleep_is_refused_and_does_not_answer(actor, tmp_path):
    actor.score(REQUEST)
    actor.sleep()
    model = tmp_path / "teacher" / "config.json"
    model.write_text(model.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert "1e-05" in model.read_text()
    with pytest.raises(FingerprintChangedError, match="to wake with fingerprint"):
        actor.score(REQUEST)
    assert not actor.health().loaded
