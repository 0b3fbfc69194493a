"""The profile stage over real actors: neither replicas, nor restarts, nor other teachers beside it change a byte of a profile.

Sessions of one process share this module's Ray and its loaded teachers. What a killed driver leaves behind is what is on the disk at
that moment: those tests copy the run directory in mid-stage and continue in the copy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from actors.pool import TeacherPool, actor_name
from actors.profiling import UNLABELLED, ProfilingRounds
from actors.session import FACTS_FILE, Interrupted, Reporter, Session
from actors.stages import _teacher_facts, profile_journal, run_stages
from nexus.artifacts import CriticalLayer, NIWTProfile, write_artifact
from nexus.config import SAMPLES_DIR, parse_config
from nexus.errors import ConfigError, DataError
from nexus.training.facts import TeacherFactsFile

TEXT, IMAGES = "sample-reasoning", "sample-vision"
OPTIONS = {"window": 2, "timeout_s": 120, "max_retries": 20}


def document(labelled: str = "samples:reasoning/labelled.parquet", **profile: object) -> dict[str, object]:
    def source(capability: str, rows: str, **more: object) -> dict[str, object]:
        files = {"pool": [rows], "labelled": [rows], "test": [rows], "max_new_tokens": 8, "batch_size": 4}
        return {"capability": capability, **files, **more}

    return {
        "name": "profiles",
        "seed": 3,
        "teachers": [
            {
                "kind": "path",
                "id": TEXT,
                "path": f"samples:teachers/{TEXT}",
                "role": "causal_lm",
                "capabilities": ["reasoning"],
            },
            {
                "kind": "path",
                "id": IMAGES,
                "path": f"samples:teachers/{IMAGES}",
                "role": "encoder",
                "capabilities": ["vision"],
            },
        ],
        "data": [
            source("reasoning", labelled, answer="gsm8k", max_new_tokens=4),
            source("vision", "samples:vision/labelled.parquet"),
        ],
        "student": {"preset": "quickstart", "tokenizer": TEXT},
        "quarantine": {"max_bad_share": 0.5},
        "profile": {"max_samples": 12, "min_samples": 6, "batch_size": 4, "confirm_samples": 3, **profile},
        "distill": {"steps": 30, "learning_rate": 1.0e-3},
    }


class Heard(Reporter):
    """Keeps the lines, and calls back at every progress."""

    def __init__(self, on_progress: Callable[[str, int], None]) -> None:
        self.lines: list[str] = []
        self._on_progress = on_progress

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        self._on_progress(stage, done)


class Bench:
    """Runs the profile stage in this process on teachers that are loaded once."""

    def __init__(self, cluster: object, folder: Path) -> None:
        self._cluster = cluster
        with_specs = self._session(folder, document(), None, Heard(lambda *_: None))
        with_specs.run.close()
        # Held as long as the bench: an actor ends with the last handle of its creator.
        self.pool, self._reports = TeacherPool.start(
            with_specs.specs, replicas={TEXT: 2}, torch_threads=1, num_gpus=0, load_timeout_s=120, **OPTIONS
        )

    def run(
        self,
        out: Path,
        configuration: dict[str, object],
        *,
        replicas: int = 1,
        teachers: tuple[str, ...] | None = None,
        on_progress: Callable[[Session, str, int], None] = lambda *_: None,
    ) -> list[str]:
        """The lines that were said."""
        reporter = Heard(lambda stage, done: on_progress(session, stage, done))
        session = self._session(out, configuration, teachers, reporter)
        handles = {
            TEXT: [ray.get_actor(actor_name(TEXT, replica)) for replica in range(replicas)],
            IMAGES: [ray.get_actor(actor_name(IMAGES))],
        }
        session._cluster, session._reports = self._cluster, self._reports
        session._pool = TeacherPool(handles, check=session.check_signals, **OPTIONS)
        try:
            run_stages(session, "profile")
        finally:
            session.run.close()
        return reporter.lines

    def calls(self, teacher: str, replica: int = 0) -> int:
        """Calls that the actor has answered, those that nobody waits for any more among them."""
        ray.get(ray.get_actor(actor_name(teacher, replica)).load.remote(), timeout=60)
        return self.pool.health(teacher, replica=replica, timeout_s=60).calls

    @staticmethod
    def _session(
        out: Path, configuration: dict[str, object], teachers: tuple[str, ...] | None, reporter: Heard
    ) -> Session:
        config = parse_config(configuration, source="test")
        return Session(config, out, cluster="local", dashboard=False, reporter=reporter, teachers=teachers)


@pytest.fixture(scope="module")
def bench(ray_cluster, tmp_path_factory) -> Bench:
    return Bench(ray_cluster, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def reference(bench, tmp_path_factory) -> Path:
    """Directory of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("reference")
    bench.run(out, document())
    return out


@pytest.fixture(scope="module")
def undisturbed(reference) -> dict[str, object]:
    return artefacts(reference)


def artefacts(out: Path) -> dict[str, object]:
    """What the stage wrote: every file's bytes; of the JSON all but the time that it took."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in (out / "profile").glob("*.safetensors")}
    for path in (out / "profile").glob("*.json"):
        text = path.read_text()
        assert text.count('"seconds"') == 1
        found[path.name] = [line for line in text.splitlines() if '"seconds"' not in line]
    return found


def profile_of(out: Path, teacher: str) -> NIWTProfile:
    return NIWTProfile.model_validate_json((out / "profile" / f"{teacher}.json").read_text())


def test_every_teacher_gets_a_profile_and_the_journal_goes(reference):
    assert {path.name for path in (reference / "profile").iterdir()} == {
        f"{teacher}.{ending}" for teacher in (TEXT, IMAGES) for ending in ("json", "safetensors")
    }
    assert (reference / "stages" / "profile.json").is_file()
    assert profile_of(reference, TEXT).strategy != "auto", "the strategy is the one that was used"


def test_replicas_share_the_work_and_the_profile_is_the_same(bench, undisturbed, tmp_path):
    before = [bench.calls(TEXT, replica) for replica in range(2)]
    bench.run(tmp_path, document(), replicas=2)
    assert all(bench.calls(TEXT, replica) > old for replica, old in enumerate(before))
    assert TeacherPool.attach([TEXT, IMAGES], **OPTIONS).num_replicas(TEXT) == 2
    assert artefacts(tmp_path) == undisturbed


def test_whatever_a_killed_driver_leaves_behind_is_continued_to_the_same_profile(bench, undisturbed, tmp_path):
    copies: list[Path] = []

    def leave_behind(session: Session, stage: str, done: int) -> None:
        if TEXT in stage:
            copies.append(tmp_path / f"killed-{len(copies)}")
            shutil.copytree(session.run.path, copies[-1])

    calls = bench.calls(TEXT)
    bench.run(tmp_path / "run", document(), on_progress=leave_behind)
    whole = bench.calls(TEXT) - calls
    assert len(copies) >= 4
    for copy in (copies[0], copies[-1]):
        calls = bench.calls(TEXT)
        lines = bench.run(copy, document())
        assert artefacts(copy) == undisturbed
        (done,) = (int(re.findall(r"after (\d+) rows", line)[0]) for line in lines if f"{TEXT} continues" in line)
        # Batches of 4 rows, cut at 6 and 12 rows; then the second pass.
        assert bench.calls(TEXT) - calls == whole - {4: 1, 6: 2, 10: 3, 12: 4}[done]


def test_ctrl_c_keeps_every_answer_that_had_come(bench, undisturbed, tmp_path):
    seen: dict[str, int] = {}

    def interrupt(session: Session, stage: str, done: int) -> None:
        seen[stage.removeprefix("profile ")] = done
        if sum(seen.values()) >= 10:
            session._on_signal(signal.SIGINT, None)

    with pytest.raises(Interrupted):
        bench.run(tmp_path, document(), on_progress=interrupt)
    assert not (tmp_path / "stages" / "profile.json").exists()
    lines = bench.run(tmp_path, document())
    said = [re.findall(r"profile: (\S+) continues after (\d+) rows", line) for line in lines]
    assert {teacher: int(rows) for found in said for teacher, rows in found} == seen
    assert artefacts(tmp_path) == undisturbed


@pytest.mark.chaos
def test_a_teacher_killed_in_mid_profile_changes_nothing(bench, undisturbed, tmp_path):
    victims: list[int] = []

    def kill(session: Session, stage: str, done: int) -> None:
        if not victims and TEXT in stage:
            victims.append(session.pool.health(TEXT, timeout_s=60).pid)
            os.kill(victims[0], signal.SIGKILL)

    bench.run(tmp_path, document(), on_progress=kill)
    assert bench.pool.health(TEXT, timeout_s=60).pid != victims[0]
    assert artefacts(tmp_path) == undisturbed


def test_a_journal_of_other_rows_or_another_teacher_is_not_used(bench, tmp_path):
    rows = tmp_path / "rows.parquet"
    shutil.copy(SAMPLES_DIR / "reasoning" / "labelled.parquet", rows)
    configuration = document(str(rows))

    def stop(session: Session, stage: str, done: int) -> None:
        session._on_signal(signal.SIGINT, None)

    def known(change: Callable[[Session], None]) -> int:
        """Rows of the text teacher that the journal still counts."""
        session = bench._session(tmp_path / "run", configuration, (TEXT,), Heard(lambda *_: None))
        session._reports, session._pool = dict(bench._reports), bench.pool
        try:
            change(session)
            return ProfilingRounds(session, profile_journal(session)).teachers[TEXT].rows["reasoning"]
        finally:
            session.run.close()

    def another_teacher(session: Session) -> None:
        session._reports[TEXT] = dataclasses.replace(session._reports[TEXT], fingerprint="another")

    def other_settings(session: Session) -> None:
        session.config = parse_config({**document(str(rows), strategy="brute")}, source="test")

    with pytest.raises(Interrupted):
        bench.run(tmp_path / "run", configuration, teachers=(TEXT,), on_progress=stop)
    assert known(lambda session: None) == 4
    assert known(another_teacher) == known(other_settings) == 0
    table = pq.read_table(rows)
    pq.write_table(table.slice(1), rows)
    assert known(lambda session: None) == 0


def test_only_chosen_teachers_are_measured_and_the_others_complete_the_stage(bench, undisturbed, tmp_path):
    before = {teacher: bench.calls(teacher) for teacher in (TEXT, IMAGES)}
    bench.run(tmp_path, document(), teachers=(IMAGES,))
    assert bench.calls(TEXT) == before[TEXT]
    assert [path.name for path in (tmp_path / "profile").glob("*.json")] == [f"{IMAGES}.json"]
    assert not (tmp_path / "stages" / "profile.json").exists()
    before = {teacher: bench.calls(teacher) for teacher in (TEXT, IMAGES)}
    bench.run(tmp_path, document())
    assert bench.calls(IMAGES) == before[IMAGES]
    assert artefacts(tmp_path) == undisturbed
    with pytest.raises(ConfigError, match=r"'sample-visoin'. Did you mean 'sample-vision'"):
        bench.run(tmp_path, document(), teachers=("sample-visoin",))


def test_rounds_end_early_when_the_critical_layers_are_stable(bench, tmp_path):
    rows: dict[str, int] = {}
    bench.run(
        tmp_path,
        document(max_samples=96, min_samples=6, batch_size=12, confirm_samples=0),
        on_progress=lambda _, stage, done: rows.update({stage: done}),
    )
    for teacher in (TEXT, IMAGES):
        profile = profile_of(tmp_path, teacher)
        assert profile.num_samples == rows[f"profile {teacher}"]
        assert profile.stopped_early == (profile.num_samples < 96)
        assert profile.num_samples in (6, 12, 24, 48, 96), "looked at only at these counts"
        assert not profile.partial
    assert profile_of(tmp_path, IMAGES).stopped_early or profile_of(tmp_path, TEXT).stopped_early


def test_a_spent_budget_ends_with_one_batch_of_every_teacher_marked_partial(bench, tmp_path):
    bench.run(tmp_path, document(budget_seconds=1.0e-6))
    for teacher in (TEXT, IMAGES):
        profile = profile_of(tmp_path, teacher)
        assert profile.partial
        assert profile.num_samples == 4
        assert "Stopped after 4 samples: the budget of 1e-06 s was spent." in str(profile.note)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_batch_size_changes_no_critical_layer_and_values_by_rounding_alone(bench, reference, tmp_path, batch_size):
    bench.run(tmp_path, document(batch_size=batch_size, confirm_samples=0))
    for teacher in (TEXT, IMAGES):
        ours, theirs = profile_of(reference, teacher), profile_of(tmp_path, teacher)
        assert [item.layer for item in ours.critical_layers] == [item.layer for item in theirs.critical_layers]
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            assert mine.delta_nll == pytest.approx(other.delta_nll, abs=1e-5)
            assert mine.intrinsic_dim == other.intrinsic_dim


def test_a_changed_profile_changes_the_layers_that_distillation_asks_the_teacher_for(bench, reference, tmp_path):
    session = bench._session(tmp_path, document(), None, Heard(lambda *_: None))
    session.run.close()
    session._reports, session._pool = bench._reports, bench.pool
    profiles = {teacher: profile_of(reference, teacher) for teacher in (TEXT, IMAGES)}
    found = {facts.id: facts.critical_layers for facts in _teacher_facts(session, profiles, from_files=False)}
    assert found == {
        name: tuple((item.layer, item.weight) for item in profile.critical_layers) for name, profile in profiles.items()
    }
    assert all(found.values())
    asked = document()
    asked["teachers"][0]["importance"] = "profile"
    session.config = parse_config(asked, source="test")
    weights = {facts.id: facts.importance for facts in _teacher_facts(session, profiles, from_files=False)}
    assert weights == {TEXT: pytest.approx(math.exp(-profiles[TEXT].baseline.nll)), IMAGES: 1.0}
    profiles[TEXT] = profiles[TEXT].model_copy(update={"critical_layers": (CriticalLayer(layer=1, weight=1.0),)})
    changed = {facts.id: facts.critical_layers for facts in _teacher_facts(session, profiles, from_files=False)}
    assert changed == {**found, TEXT: ((1, 1.0),)}


def test_training_loads_no_teacher_whose_targets_are_cached(bench, reference, tmp_path):
    asked = document()
    session = Bench._session(tmp_path, asked, None, Heard(lambda *_: None))
    session.run.close()
    profiles = {teacher: profile_of(reference, teacher) for teacher in (TEXT, IMAGES)}
    session._reports, session._pool = bench._reports, bench.pool
    everybody = _teacher_facts(session, profiles, from_files=False)
    asked["teachers"][1]["targets"] = "cached"
    session.config = parse_config(asked, source="test")
    written = tmp_path / "targets" / IMAGES / FACTS_FILE
    write_artifact(written, TeacherFactsFile.from_facts(everybody[1:]))
    # Nobody but the live teacher is there to answer, and none is started.
    session._reports = {TEXT: bench._reports[TEXT]}
    assert _teacher_facts(session, profiles, from_files=True) == everybody
    assert list(session._reports) == [TEXT]
    assert session._pool is bench.pool


def test_rows_that_a_teacher_cannot_take_are_left_out_of_both_passes(bench, tmp_path):
    table = pq.read_table(SAMPLES_DIR / "reasoning" / "labelled.parquet").slice(0, 12).to_pylist()
    table[2]["question"] = "pens " * 300
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in table))
    bench.run(tmp_path / "run", document(str(rows)), teachers=(TEXT,))
    assert profile_of(tmp_path / "run", TEXT).num_samples == 11
    (line,) = (tmp_path / "run" / "quarantine" / "rows.jsonl.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 3
    rows.write_text(json.dumps(table[2]) + "\n")
    with pytest.raises(DataError, match="bad rows in"):
        bench.run(tmp_path / "none", document(str(rows)), teachers=(TEXT,))


def test_images_without_answer_among_answered_ones_are_left_out_whatever_the_batch_size(bench, tmp_path):
    table = pq.read_table(SAMPLES_DIR / "vision" / "labelled.parquet").slice(0, 12)
    answers = [None if row in (0, 2) else answer for row, answer in enumerate(table["answer"].to_pylist())]
    rows = tmp_path / "rows.parquet"
    pq.write_table(table.set_column(table.column_names.index("answer"), "answer", pa.array(answers, pa.string())), rows)
    profiles, reasons = [], []
    for size in (1, 4):
        configuration = document(batch_size=size, confirm_samples=0)
        configuration["data"][1]["labelled"] = [str(rows)]
        bench.run(tmp_path / str(size), configuration, teachers=(IMAGES,))
        profiles.append(profile_of(tmp_path / str(size), IMAGES))
        lines = (tmp_path / str(size) / "quarantine" / "rows.parquet.jsonl").read_text().splitlines()
        reasons.append({entry["row"]: entry["reason"] for entry in map(json.loads, lines)})
    one, four = profiles
    assert one.num_samples == four.num_samples == 10
    assert one.accuracy_by == four.accuracy_by == "label"
    for mine, other in zip(one.layers, four.layers, strict=True):
        assert mine.delta_nll == pytest.approx(other.delta_nll, abs=1e-5)
    assert reasons[0] == dict.fromkeys((1, 3), UNLABELLED)
    assert set(reasons[1]) == {1, 3}
    assert all("no answer" in reason for reason in reasons[1].values())


@pytest.mark.chaos
def test_a_replica_that_dies_for_good_is_stood_in_for(bench, undisturbed, tmp_path):
    victims = [ray.get_actor(actor_name(TEXT, 1))]
    left: list[int] = []

    def kill(session: Session, stage: str, done: int) -> None:
        if victims:
            ray.kill(victims.pop())
        left.append(session.pool.num_replicas(TEXT))

    bench.run(tmp_path, document(), replicas=2, on_progress=kill)
    assert (left[0], left[-1]) == (2, 1)
    assert artefacts(tmp_path) == undisturbed
