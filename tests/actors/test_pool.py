"""Teachers as actors: the actor returns what the engine computes, the pool bounds, retries, heals and never changes an answer."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys

import pytest
import ray

from actors.dataflow import TeacherWork
from actors.pool import Sleep, TeacherPool, actor_name
from actors.stages import _waves
from nexus.errors import ConfigError, TeacherUnavailableError, TowerLoadError
from nexus.towers.packing import pack_targets, unpack_targets
from nexus.towers.registry import TeacherSpec
from nexus.towers.targets import ScoreRequest


def _request(number: int) -> ScoreRequest:
    return ScoreRequest(
        row_ids=(f"a{number}", f"b{number}"),
        prompts=(f"Tom has {number} pens.", "How many?"),
        completions=("2+3=5\n#### 5", f"#### {number}"),
        media=None,
        temperature=2.0,
        top_k=8,
        layers=(0, 1),
    )


@pytest.fixture(scope="module")
def pool(ray_cluster, reasoning_spec):
    pool, reports = TeacherPool.start(
        [reasoning_spec],
        torch_threads=1,
        num_gpus=0,
        window=2,
        timeout_s=120,
        max_retries=3,
        load_timeout_s=120,
    )
    assert reports["sample-reasoning"].quantised_share > 0.5
    assert reports["sample-reasoning"].max_weight_error < 0.12
    return pool


@pytest.fixture(scope="module")
def engine(reasoning_spec):
    import torch

    from nexus.towers.engine import TeacherEngine
    from nexus.towers.loader import load_tower

    torch.set_num_threads(1)
    return TeacherEngine(load_tower(reasoning_spec), teacher_id="sample-reasoning")


def _expected(engine, number: int):
    """What arrives: log-probabilities are rounded on their way."""
    return unpack_targets(pack_targets(engine.score(_request(number)), vocabulary_size=engine.vocabulary_size))


def test_the_actor_returns_what_the_engine_computes_in_process(pool, engine):
    pool.submit("one", "sample-reasoning", "score", _request(3))
    assert unpack_targets(pool.collect("one")) == _expected(engine, 3)


def test_results_are_kept_until_collected_in_any_order(pool, engine):
    for number in range(6):
        pool.submit(number, "sample-reasoning", "score", _request(number))
    for number in (5, 0, 3, 1, 4, 2):
        assert pool.collect(number).row_ids == _request(number).row_ids


def test_the_window_bounds_what_is_in_flight(pool):
    for number in range(7):
        pool.submit(("w", number), "sample-reasoning", "score", _request(number))
    lane = pool._lanes["sample-reasoning"]
    assert len(lane.in_flight) == 2
    assert len(lane.waiting) == 5
    pool.forget()
    assert not lane.in_flight
    assert not lane.waiting


def test_an_error_of_the_teacher_arrives_as_itself_and_spoils_no_other_call(pool):
    bad = ScoreRequest(("x",), ("p",), None, None, 1.0, 4, ())
    pool.submit("bad", "sample-reasoning", "score", bad)
    pool.submit("good", "sample-reasoning", "score", _request(1))
    with pytest.raises(ConfigError, match="Expected completions"):
        pool.collect("bad")
    assert pool.collect("good").row_ids == ("a1", "b1")


def test_the_actor_is_named_readable_and_healthy_while_it_works(pool):
    handle = ray.get_actor(actor_name("sample-reasoning"))
    assert handle is not None
    pool.submit("busy", "sample-reasoning", "score", _request(2))
    health = pool.health("sample-reasoning")
    assert health.loaded
    assert health.pid != os.getpid()
    pool.collect("busy")


def test_a_missing_actor_is_named_on_attach(ray_cluster):
    with pytest.raises(TeacherUnavailableError, match="'teacher:nobody'"):
        TeacherPool.attach(["nobody"], window=1, timeout_s=1, max_retries=0)


def test_an_answer_that_does_not_come_in_time_is_an_error(pool):
    pool.submit("slow", "sample-reasoning", "score", _request(1))
    with pytest.raises(TeacherUnavailableError, match=r"within 0 s"):
        pool.collect("slow", timeout_s=0)
    pool.forget()


def test_a_check_ends_the_wait(pool):
    def stop() -> None:
        raise KeyboardInterrupt

    attached = TeacherPool.attach(["sample-reasoning"], window=1, timeout_s=60, max_retries=0)
    attached._check = stop
    attached.submit("k", "sample-reasoning", "score", _request(1))
    with pytest.raises(KeyboardInterrupt):
        attached.collect("k")


def test_a_batch_that_times_out_is_asked_again_and_then_given_up(pool):
    events = []
    hasty = TeacherPool.attach(
        ["sample-reasoning"],
        window=4,
        timeout_s=0.5,
        max_retries=1,
        on_event=lambda kind, teacher, reason: events.append((kind, teacher)),
    )
    # A stopped process answers nothing, however slow or fast the machine is.
    pid = pool.health("sample-reasoning", timeout_s=60).pid
    os.kill(pid, signal.SIGSTOP)
    try:
        hasty.submit("k", "sample-reasoning", "score", _request(1))
        with pytest.raises(TeacherUnavailableError, match="failed 2 times"):
            hasty.collect("k", timeout_s=60)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert events == [("retry", "sample-reasoning")] * 2


@pytest.mark.chaos
def test_a_killed_teacher_is_restarted_and_its_lost_batches_answered_alike(ray_cluster, pool, engine):
    before = pool.health("sample-reasoning")
    for number in range(5):
        pool.submit(("k", number), "sample-reasoning", "score", _request(number))
    os.kill(before.pid, signal.SIGKILL)
    for number in range(5):
        assert unpack_targets(pool.collect(("k", number))) == _expected(engine, number)
    after = pool.health("sample-reasoning")
    assert after.incarnation != before.incarnation


@pytest.mark.chaos
def test_a_teacher_that_cannot_load_says_why_and_does_not_hang(ray_cluster, tmp_path):
    (tmp_path / "empty").mkdir()
    spec = TeacherSpec(id="broken", path=str(tmp_path / "empty"), revision=None, role="causal_lm")
    with pytest.raises(TowerLoadError, match=r"config\.json in .*empty, found no such file"):
        TeacherPool.start([spec], torch_threads=1, num_gpus=0, window=1, timeout_s=60, max_retries=0, load_timeout_s=60)


@pytest.fixture(scope="module")
def two_teachers(pool, reasoning_spec):
    """Handles of the module's teacher and of another over the same files."""
    second = dataclasses.replace(reasoning_spec, id="second")
    # The pool that creates an actor keeps it alive.
    other, _ = TeacherPool.start([second], torch_threads=1, window=2, timeout_s=120, max_retries=3, load_timeout_s=240)
    yield {name: [ray.get_actor(actor_name(name))] for name in ("sample-reasoning", "second")}
    assert other.teachers == ("second",)


@pytest.mark.parametrize(
    "max_kept_bytes", [pytest.param(2**40, id="dropped"), pytest.param(0, id="restarted", marks=pytest.mark.chaos)]
)
def test_one_place_serves_two_teachers_with_equal_answers_and_one_model_in_memory(two_teachers, engine, max_kept_bytes):
    sleeping = TeacherPool(two_teachers, window=2, timeout_s=120, max_retries=3, sleep=Sleep(1, max_kept_bytes))
    before = {name: sleeping.health(name).pid for name in two_teachers}
    for number in range(3):
        for name in two_teachers:
            sleeping.submit((name, number), name, "score", _request(number))
    for number in (2, 0, 1):
        expected = _expected(engine, number)
        for name in two_teachers:
            answer = unpack_targets(sleeping.collect((name, number)))
            assert dataclasses.replace(answer, teacher="sample-reasoning") == expected
    assert sum(sleeping._is_loaded(name, 0) for name in two_teachers) == 1
    # All that waited for a teacher was done before it was put to sleep.
    assert 1 <= sleeping.swaps <= 3
    restarted = [name for name in two_teachers if sleeping.health(name).pid != before[name]]
    assert bool(restarted) == (max_kept_bytes == 0)


def test_a_sleeper_is_woken_for_a_whole_turn_or_for_a_caller_who_cannot_go_on_without_it(two_teachers):
    first, second = two_teachers
    sleeping = TeacherPool(two_teachers, window=2, timeout_s=120, max_retries=3, sleep=Sleep(1, 2**40, turn=3))
    sleeping.submit("a", first, "score", _request(0))
    sleeping.collect("a")
    before = sleeping.swaps
    assert sleeping.capacity(first) == 3
    for number in range(2):
        sleeping.submit(number, second, "score", _request(number))
    assert len(sleeping._lanes[second].waiting) == 2
    sleeping.submit("b", first, "score", _request(1))
    # While one that is awake is about to answer one of them, the other need not wake.
    assert sleeping.collect_first([0, "b"]) == "b"
    assert (sleeping.swaps, sleeping._is_loaded(second, 0)) == (before, False)
    sleeping.submit(2, second, "score", _request(2))
    assert sleeping.swaps == before + 1
    assert sleeping.collect(2).rest.row_ids == _request(2).row_ids
    sleeping.submit("c", first, "score", _request(2))
    assert sleeping._lanes[first].waiting
    assert sleeping.collect("c").rest.row_ids == _request(2).row_ids
    assert sleeping.swaps == before + 2
    assert 0 < sleeping.swap_share() < 100


def test_the_actors_process_imports_no_compiler_and_tells_how_busy_it_was(pool, engine):
    handle = ray.get_actor(actor_name("sample-reasoning"))
    idle = ray.get(
        handle.__ray_call__.remote(lambda _: [m for m in ("scipy", "pandas") if m in sys.modules]), timeout=60
    )
    assert idle == []
    for number in range(3):
        pool.submit(number, "sample-reasoning", "score", _request(number))
        pool.collect(number)
    assert 0 < pool.health("sample-reasoning").busy_share <= 1


def test_work_for_more_teachers_than_fit_is_cut_into_waves():
    works = [TeacherWork(t, c, (), 0, None, "answer", (), 1) for t, c in ("ax", "ay", "bx", "cx", "cy")]
    assert list(_waves(works, 2)) == [[0, 1, 2], [3, 4]]
    assert list(_waves(works, None)) == [[0, 1, 2, 3, 4]]
    assert list(_waves([], 2)) == []
