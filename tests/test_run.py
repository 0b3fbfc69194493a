"""A run directory belongs to one configuration and one process; a stage is complete only with its outputs whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nexus import run as run_module
from nexus.config import load_config
from nexus.errors import ArtifactError
from nexus.run import EventLog, RunDirectory

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@pytest.fixture
def config():
    return load_config(QUICKSTART)


def _complete(run: RunDirectory, name: str = "out.bin") -> None:
    (run.path / name).write_bytes(b"1234")
    run.complete("profile", seconds=1.0, peak_memory_gib=0.5, outputs=[run.path / name], summary={"rows": 2})


def test_a_complete_stage_stays_complete_for_the_next_process(tmp_path, config):
    run = RunDirectory(tmp_path / "r", config)
    assert run.completed("profile") is None
    _complete(run)
    run.close()
    again = RunDirectory(tmp_path / "r", config)
    assert again.completed("profile").summary == {"rows": 2}
    again.reset("profile")
    assert again.completed("profile") is None


@pytest.mark.parametrize("damage", ["change", "remove", "record", "fingerprint"])
def test_a_stage_with_damaged_outputs_is_not_complete(tmp_path, config, damage):
    run = RunDirectory(tmp_path / "r", config)
    _complete(run)
    record = run.path / "stages" / "profile.json"
    if damage == "change":
        (run.path / "out.bin").write_bytes(b"12345")
    elif damage == "remove":
        (run.path / "out.bin").unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:20])
    else:
        record.write_text(record.read_text().replace(config.fingerprint(), "0" * 16))
    assert run.completed("profile") is None


def test_a_mended_configuration_takes_over_a_directory_in_which_nothing_was_done(tmp_path, config):
    RunDirectory(tmp_path / "r", config).close()
    mended = load_config(QUICKSTART, ["distill.steps=300"])
    RunDirectory(tmp_path / "r", mended).close()
    assert load_config(tmp_path / "r" / "config.resolved.yaml") == mended


def test_another_configuration_is_refused_and_its_difference_named(tmp_path, config):
    RunDirectory(tmp_path / "r", config).close()
    (tmp_path / "r" / "profile").mkdir()
    other = load_config(QUICKSTART, ["distill.steps=300"])
    with pytest.raises(ArtifactError, match=r"distill\.steps = \d+ there and 300 here\. Choose another --out"):
        RunDirectory(tmp_path / "r", other)
    with pytest.raises(ArtifactError, match=r"and 1 more keys"):
        RunDirectory(tmp_path / "r", load_config(QUICKSTART, ["distill.steps=300", "data.0.batch_size=1"]))
    # The refused attempt does not keep the directory locked.
    RunDirectory(tmp_path / "r", config).close()


def test_a_second_process_is_refused_while_the_first_works(tmp_path, config):
    run = RunDirectory(tmp_path / "r", config)
    code = (
        "import sys; from pathlib import Path; from nexus.config import load_config; from nexus.run import RunDirectory\n"
        "try: RunDirectory(Path(sys.argv[1]), load_config(Path(sys.argv[2])))\n"
        "except ValueError as error: print(error)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "r"), str(QUICKSTART)]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert "another nexus process" in said
    run.close()
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout == ""


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Choose another --out"):
        RunDirectory(tmp_path / "file" / "run", config)


def test_a_full_disk_is_found_before_work_begins(tmp_path, config, monkeypatch):
    # A real disk cannot be filled in a test; the bound is raised above what any disk has free instead.
    monkeypatch.setattr(run_module, "MIN_FREE_BYTES", 1 << 62)
    with pytest.raises(ArtifactError, match="Free disk space"):
        RunDirectory(tmp_path / "r", config)


def test_events_are_lines_of_json(tmp_path):
    log = EventLog(tmp_path / "deep" / "events.jsonl")
    log.write({"kind": "step", "student": "a", "step": 0})
    log.write({"kind": "skip", "student": "a", "step": 1})
    events = [json.loads(line) for line in (tmp_path / "deep" / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["step", "skip"]
    assert all(event["time"] > 0 for event in events)


def test_a_resumed_run_drops_the_steps_that_it_trains_again(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.truncate_steps("a", 0)  # nothing there yet
    for step in range(4):
        log.write({"kind": "step", "student": "a", "step": step})
        log.write({"kind": "step", "student": "b", "step": step})
    log.write({"kind": "skip", "student": "a", "step": 3})
    with path.open("a") as file:
        file.write('{"kind": "st')  # a killed process
    log.truncate_steps("a", 2)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["step"] for e in events if e.get("student") == "a" and e["kind"] == "step"] == [0, 1]
    assert sum(e.get("student") == "b" for e in events) == 4
    assert sum(e["kind"] == "skip" for e in events) == 1


def test_the_tokens_of_each_teacher_are_summed_over_the_steps_of_one_student(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    assert log.taught_tokens("distilled") == {}
    for step, tokens in enumerate(({"a": 3, "b": 4}, {"a": 5})):
        log.write({"kind": "step", "student": "distilled", "step": step, "tokens": tokens})
    log.write({"kind": "step", "student": "labels_only", "step": 0, "tokens": {"a": 100}})
    log.write({"kind": "skip", "student": "distilled", "step": 2})
    with path.open("a") as file:
        file.write('{"kind": "st')
    assert log.taught_tokens("distilled") == {"a": 8, "b": 4}


def test_the_aligned_share_counts_every_token_of_the_run_once(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    assert log.aligned_shares("distilled") == {}
    for step, (tokens, share) in enumerate([(100, 0.5), (300, 0.9)]):
        log.write(
            {
                "kind": "step",
                "student": "distilled",
                "step": step,
                "tokens": {"other": tokens, "same": 7},
                "aligned": {"other": share},
            }
        )
    log.write({"kind": "step", "student": "distilled", "step": 2, "tokens": {"same": 7}})
    assert log.aligned_shares("distilled") == {"other": pytest.approx((50 + 270) / 400)}
    assert log.aligned_shares("labels_only") == {}


def test_steps_that_a_rollback_undid_taught_nothing(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(4):
        log.write({"kind": "step", "student": "distilled", "step": step, "tokens": {"a": 1}})
    log.write({"kind": "step", "student": "labels", "step": 3, "tokens": {"b": 7}})
    log.write({"kind": "rollback", "student": "distilled", "step": 4, "restored_step": 1})
    log.write({"kind": "step", "student": "distilled", "step": 1, "tokens": {"a": 10}})
    assert log.taught_tokens("distilled") == {"a": 11}
    assert log.taught_tokens("labels") == {"b": 7}
