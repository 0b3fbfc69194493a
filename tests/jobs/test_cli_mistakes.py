"""Mistakes in a run's configuration, data, teachers, directory and cluster: one line each, before Ray starts."""

from __future__ import annotations

import errno
import json
import socket
from pathlib import Path

import pytest
import yaml

import jobs.execute
from actors.session import check_device, check_trained
from jobs.execute import guarded
from nexus.config import SAMPLES_DIR, load_config, parse_config
from nexus.errors import ConfigError, DataError, StageFailedError
from nexus.run import RunDirectory

REASONING = SAMPLES_DIR / "reasoning"


def document() -> dict[str, object]:
    """A run of the reasoning teacher alone."""
    return {
        "name": "mistakes",
        "teachers": [
            {
                "kind": "path",
                "id": "sample-reasoning",
                "path": "samples:teachers/sample-reasoning",
                "role": "causal_lm",
                "capabilities": ["reasoning"],
            }
        ],
        "data": [
            {
                "capability": "reasoning",
                "pool": [str(REASONING / "pool.parquet")],
                "labelled": [str(REASONING / "labelled.parquet")],
                "test": [str(REASONING / "test.parquet")],
                "towers": ["reasoning"],
                "answer": "gsm8k",
                "max_new_tokens": 48,
                "batch_size": 8,
            }
        ],
        "student": {"tokenizer": "sample-reasoning"},
        "distill": {"steps": 30, "learning_rate": 1.0e-3},
    }


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document()))
    return path


CONFIG_MISTAKES = {
    "unknown key": ("--set distill.stpes=3", "unknown key 'distill.stpes', did you mean 'steps'?"),
    "unknown section": ("--set distil.steps=3", "did you mean 'distill'?"),
    "no value": ("--set distill.steps", "Expected --set KEY=VALUE"),
    "value of another kind": ("--set distill.steps=many", "'distill.steps'"),
    "section under a value": ("--set distill.steps.x=3", "expected a section above 'x'"),
    "unknown item of a list": ("--set data.reasonin.batch_size=3", "one of reasoning at 'data.reasonin'"),
    "warm-up without end": ("--set distill.steps=3", "warmup_steps below steps"),
    "tokenizer of nobody": ("--set student.tokenizer=sample-reason", "did you mean 'sample-reasoning'?"),
    "spike of nowhere": ("--inject-spike soon", "Expected --inject-spike STEP:nan or STEP:xFACTOR"),
    "cluster of nowhere": ("--cluster there", "--cluster: expected auto, local or HOST:PORT"),
    "missing file": ("--config none.yaml", "found no such file. `nexus init` writes one."),
    "a folder": ("--config .", "Expected a readable YAML file"),
}


@pytest.mark.parametrize("name", CONFIG_MISTAKES)
def test_a_mistake_in_the_configuration_is_one_line(nexus, config, name):
    arguments, expected = CONFIG_MISTAKES[name]
    complaint = nexus("pipeline", "--config", config, *arguments.split()).complaint()
    assert expected in complaint
    assert not Path("runs").exists()


def after_the_first_line(told) -> str:
    """The complaint of a command that has said which configuration it runs."""
    assert told.code == 2, told.err
    assert told.out == ""
    first, *rest = told.err.splitlines()
    assert first.startswith("configuration ")
    assert len(rest) == 1, told.err
    # Ray would have said that it started.
    return rest[0]


INPUT_MISTAKES = {
    "missing data": (
        "data.reasoning.pool",
        ["none.parquet"],
        "Expected a data file at none.parquet, found no such file",
    ),
    "empty data": ("data.reasoning.pool", ["empty.jsonl"], "found an empty file"),
    "data of an unknown kind": ("data.reasoning.test", ["notes.txt"], "Expected a data file that ends in .parquet"),
    "damaged Parquet": ("data.reasoning.labelled", ["broken.parquet"], "broken.parquet"),
    "missing teacher": ("teachers.0.path", "none", "Expected the checkpoint folder of teacher 'sample-reasoning'"),
    "unknown preset": ("student.preset", "quikstart", "found 'quikstart'. Did you mean 'quickstart'? Correct it."),
    "rows longer than the student": (
        "student.max_length",
        600,
        "student.max_length of at most 512, the positions of preset",
    ),
    "answers longer than the student": (
        "data.reasoning.max_new_tokens",
        512,
        "to leave room for a prompt in the 512 positions",
    ),
    "labels alone without any": (
        "data.reasoning.labelled",
        [],
        "Add labelled files, or set distill.labels_only to false.",
    ),
    "role without a loader": ("teachers.0.role", "diffusion", "role diffusion"),
}


@pytest.mark.parametrize("name", INPUT_MISTAKES)
def test_a_mistake_in_the_inputs_is_one_line_before_ray_starts(nexus, config, name):
    key, value, expected = INPUT_MISTAKES[name]
    Path("empty.jsonl").touch()
    Path("notes.txt").write_text("x")
    Path("broken.parquet").write_bytes((REASONING / "labelled.parquet").read_bytes()[:-20])
    told = nexus("pipeline", "-c", config, "--set", f"{key}={json.dumps(value)}")
    assert expected in after_the_first_line(told)


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("distill.device=cuda", "Set distill.device to cpu or auto"),
        ("distill.optimizer=paged_adamw8bit", "Set distill.optimizer to adamw8bit"),
    ],
)
def test_what_needs_a_gpu_is_refused_where_there_is_none_before_ray_starts(nexus, config, monkeypatch, setting, remedy):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told = after_the_first_line(nexus("pipeline", "-c", config, "--cluster", "local", "--set", setting))
    place = setting.replace("=", " ")
    assert f"Expected a GPU for {place}, found the device cpu alone (this machine, where a local Ray starts)" in told
    assert f"{remedy}, or join a cluster with a GPU." in told


def test_a_first_step_without_teacher_and_labels_is_refused():
    teachers = [{**document()["teachers"][0], "id": name, "start_step": 5} for name in ("sample-reasoning", "second")]
    changes = {"teachers": teachers, "distill": {**document()["distill"], "gold_weight": 0.0, "labels_only": False}}
    config = parse_config({**document(), **changes}, source="test")
    with pytest.raises(ConfigError, match=r"found the earliest start_step 5\. Leave it out of one teacher\."):
        check_trained(config)
    check_trained(parse_config({**document(), "teachers": teachers}, source="test"))
    teachers[1]["start_step"] = 0
    check_trained(parse_config({**document(), **changes}, source="test"))


def test_what_needs_a_gpu_is_taken_where_there_is_one():
    config = parse_config({**document(), "distill": {**document()["distill"], "device": "cuda"}}, source="test")
    check_device(config, 1, "a cluster")
    with pytest.raises(ConfigError, match="Expected a GPU"):
        check_device(config, 0, "a cluster")


def test_an_unknown_teacher_is_told_its_nearest_name_and_an_absent_one_how_to_get_it(nexus, tmp_path):
    run = document()
    run["teachers"] = [{"kind": "registry", "id": "qwen2.5-0.6b", "capabilities": ["reasoning"]}]
    run["student"] = {"tokenizer": "qwen2.5-0.6b"}
    path = tmp_path / "registry.yaml"
    path.write_text(yaml.safe_dump(run))
    assert "Did you mean 'qwen2.5-0.5b'?" in after_the_first_line(nexus("profile", "-c", path))
    known = ("--set", "teachers.0.id=qwen2.5-0.5b", "--set", "student.tokenizer=qwen2.5-0.5b")
    absent = after_the_first_line(nexus("profile", "-c", path, *known, "--models-dir", tmp_path))
    assert "nexus teachers pull qwen2.5-0.5b" in absent


def test_a_mended_configuration_goes_on_in_the_directory_of_the_mistake(nexus, config):
    told = nexus("pipeline", "-c", config, "-o", "here", "--set", "data.reasoning.pool=[none.parquet]")
    assert "none.parquet" in after_the_first_line(told)
    told = nexus("pipeline", "-c", config, "-o", "here", "--set", "data.reasoning.pool=[other.parquet]")
    assert "other.parquet" in after_the_first_line(told)


def test_a_directory_with_another_run_s_work_is_refused_naming_the_difference(nexus, config):
    RunDirectory(Path("here"), load_config(config)).close()
    Path("here/profile").mkdir()
    complaint = nexus("pipeline", "-c", config, "-o", "here", "--set", "seed=3").complaint()
    assert "seed = 0 there and 3 here. Choose another --out" in complaint


def test_a_directory_that_cannot_be_written_is_one_line(nexus, config):
    Path("file").touch()
    assert "Choose another --out" in nexus("pipeline", "-c", config, "-o", "file").complaint()
    assert "Choose another --out" in nexus("pipeline", "-c", config, "-o", "/proc/run").complaint()


def test_a_directory_in_use_is_one_line(nexus, config):
    held = RunDirectory(Path("here"), load_config(config))
    assert "another nexus process working in it" in nexus("profile", "-c", config, "-o", "here").complaint()
    held.close()


def test_a_dead_ray_address_is_one_line_and_ray_is_never_asked(nexus, config, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", dead)
    complaint = nexus("profile", "-c", config, "-o", "here").complaint()
    assert f"RAY_ADDRESS: expected a Ray cluster at {dead}" in complaint
    assert "ray start --head" in complaint
    assert "--cluster: expected a Ray cluster" in nexus("profile", "-c", config, "--cluster", dead).complaint()


def test_without_a_configuration_the_first_line_names_the_shipped_one(nexus):
    told = nexus("profile", "--set", "teachers.sample-code.path=none")
    assert told.code == 2
    assert told.err.splitlines()[0] == (
        "configuration configs/quickstart.yaml (shipped; --config names another), run directory runs/quickstart"
    )


def test_a_report_of_no_run_is_one_line(nexus, tmp_path):
    assert "Name the folder that was given to --out" in nexus("report", tmp_path).complaint()
    assert nexus("report", tmp_path / "none").complaint()


# --- what a command raises ------------------------------------------------------------------------------------------------------


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


class _WrappedError(RuntimeError):
    """As Ray wraps what an actor raised: a text of many lines, and the cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback\n  of many\n  lines")
        self.cause = cause


VERDICTS = {
    "a user's mistake": (DataError("Expected x, found y. Do z."), 2, "nexus: Expected x, found y. Do z."),
    "a failed stage": (StageFailedError("It failed."), 1, "nexus: It failed."),
    "an actor's error": (_WrappedError(DataError("of\nthe actor")), 2, "nexus: of the actor"),
    "a full disk": (OSError(errno.ENOSPC, "No space left", "f"), 2, "found: No space left at f. Free some"),
    "an actor's full disk": (_WrappedError(OSError(errno.ENOSPC, "No space left")), 2, "choose another --out"),
    "a forbidden file": (PermissionError(errno.EACCES, "Permission denied", "f"), 2, "Permission denied at f"),
    "another refusal": (OSError(errno.EIO, "I/O error"), 1, "Expected the system to comply, found: I/O error"),
    "a fault of ours": (ZeroDivisionError("division\nby zero"), 1, "found ZeroDivisionError: by zero"),
    "a silent fault": (AssertionError(), 1, "found AssertionError: without a message"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "nexus: stopped"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_whatever_a_command_raises_ends_in_one_line_and_an_exit_code(capsys, name):
    error, code, expected = VERDICTS[name]
    assert guarded(raising(error)) == code
    line = capsys.readouterr().err
    assert expected in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("name", VERDICTS)
def test_a_machine_is_told_of_the_failure_as_one_json_object(capsys, name):
    error, code, _ = VERDICTS[name]
    assert guarded(raising(error), as_json=True) == code
    told = capsys.readouterr()
    assert json.loads(told.out) == {"error": told.err.removeprefix("nexus: ").rstrip("\n"), "exit_code": code}


@pytest.mark.parametrize(
    "arguments", [["report", "none"], ["report"], ["profil"], ["pipeline", "--config", "none.yaml"], ["doctor", "now"]]
)
def test_json_is_answered_with_json_even_by_a_mistake(nexus, arguments):
    told = nexus(*arguments, "--json")
    assert told.code == 2
    assert told.document() == {"error": told.err.removeprefix("nexus: ").rstrip("\n"), "exit_code": 2}
    assert "Expected" in told.err


@pytest.mark.parametrize(("signum", "code"), [(2, 130), (15, 143)])
def test_a_signal_s_exit_code_says_which_it_was_and_that_the_state_is_saved(capsys, signum, code):
    from actors.session import Interrupted

    assert guarded(raising(Interrupted(signum))) == code
    assert "the state is saved and the same command continues" in capsys.readouterr().err


def test_an_exit_of_python_itself_passes():
    with pytest.raises(SystemExit):
        guarded(raising(SystemExit(5)))


def test_a_wrong_log_level_is_no_reason_to_fail(monkeypatch):
    monkeypatch.setenv("NEXUS_LOG_LEVEL", "loud")
    assert guarded(lambda: None) == 0


def test_bad_rows_are_counted_once_however_their_file_is_spelt(tmp_path, monkeypatch):
    from nexus.data.quarantine import Quarantine

    monkeypatch.chdir(tmp_path)
    quarantine = Quarantine(tmp_path / "run" / "quarantine", 1.0)
    quarantine.add("rows.jsonl", 3, "broken")
    quarantine.add(tmp_path / "rows.jsonl", 3, "broken")
    quarantine.add("rows.jsonl", 7, "broken")
    assert jobs.execute._quarantined(Path("run")) == {str(tmp_path / "rows.jsonl"): 2}


def test_teachers_to_profile_are_those_of_the_run(nexus, config):
    told = nexus("profile", "-c", config, "--teachers", "sample-resoning")
    assert "found 'sample-resoning'. Did you mean 'sample-reasoning'? Correct --teachers." in told.complaint()
    assert "Expected --teachers ID,ID, found ', '" in nexus("profile", "-c", config, "--teachers", ", ").complaint()


def test_a_bundle_is_profiled_without_what_concerns_teachers_alone(nexus, config, tmp_path):
    for option in (
        ["--teachers", "a"],
        ["--fresh"],
        ["--budget-seconds", "3"],
        ["--cluster", "local"],
        ["--dashboard"],
    ):
        told = nexus("profile", "--bundle", tmp_path, "-c", config, *option).complaint()
        assert f"Expected --bundle without {option[0]}" in told
    assert "config.resolved.yaml beside the bundle" in nexus("profile", "--bundle", tmp_path).complaint()
    assert "Expected a bundle with manifest.json" in nexus("profile", "--bundle", tmp_path, "-c", config).complaint()


def test_keeping_tiny_checkpoints_without_building_them_is_refused(nexus):
    assert "Add --tiny" in nexus("teachers", "check", "--keep", "here").complaint()
