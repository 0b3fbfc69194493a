"""One small run through the command line, each command a process of its own: interrupted, continued, repeated, asked."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from nexus.artifacts import Metrics, NIWTProfile, read_artifact
from nexus.config import SAMPLES_DIR
from nexus.run import STAGES

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 240
"""Only a hang takes this long."""
STEPS = 80
POOL_ROWS = 200
BROKEN_ROW = 5
TEST_ROWS = 10

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two configurations: one of 200 rows with one broken line, one whose every third line is broken."""
    folder = tmp_path_factory.mktemp("run")
    rows = pq.read_table(SAMPLES_DIR / "reasoning" / "pool.parquet").slice(0, POOL_ROWS).to_pylist()
    lines = [json.dumps(row) for row in rows]
    long = json.dumps({"question": "How many " + "apples are left " * 50})
    few = [*lines[: BROKEN_ROW - 1], "{broken", *lines[BROKEN_ROW - 1 :], long]
    (folder / "few.jsonl").write_text("\n".join(few) + "\n")
    many = [line if number % 3 else "{broken" for number, line in enumerate(lines)]
    (folder / "many.jsonl").write_text("\n".join(many) + "\n")
    held_out = pq.read_table(SAMPLES_DIR / "reasoning" / "test.parquet").slice(0, TEST_ROWS).to_pylist()
    # The student takes it; the teacher has 256 positions.
    held_out.append({"question": "How many " + "apples are left " * 90, "answer": "#### 1"})
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    for name in ("few", "many"):
        document = {
            "name": name,
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
                    "pool": [f"{name}.jsonl"],
                    "labelled": ["samples:reasoning/labelled.parquet"],
                    "test": ["test.jsonl"],
                    "towers": ["reasoning"],
                    "answer": "gsm8k",
                    "max_new_tokens": 32,
                    "batch_size": 4,
                }
            ],
            "student": {"tokenizer": "sample-reasoning", "max_length": 128},
            "profile": {"max_samples": 8},
            "distill": {"steps": STEPS, "warmup_steps": 5, "learning_rate": 2.0e-3, "labels_only": False},
            "router": {"steps": 5, "max_rows": 40},
            "evaluate": {"max_rows": TEST_ROWS + 1, "bootstrap": 50, "num_samples": 1},
            "cluster": {"num_cpus": 2, "object_store_mib": 80},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return folder


class Command:
    """A running `nexus`, its output in files: what it says cannot fill a pipe."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._err = folder / f"{time.monotonic_ns()}.err"
        self._out = self._err.with_suffix(".out")
        with self._err.open("w") as err, self._out.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "RAY_TMPDIR": "/tmp"},
                stdout=out,
                stderr=err,
            )

    @property
    def err(self) -> str:
        """What it has said so far."""
        return self._err.read_text()

    @property
    def out(self) -> str:
        """What it has answered so far."""
        return self._out.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the command does."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self._process.poll() is None, self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(0.1)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        """Exit code."""
        return self._process.wait(timeout=DEADLINE_S)


def steps_of(run: Path) -> list[int]:
    """Optimizer steps in the order in which they were recorded; half a last line does not count."""
    path = run / "events.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [event["step"] for event in map(json.loads, lines) if event["kind"] == "step"]


def quarantined(folder: Path, file: str) -> list[dict[str, Any]]:
    lines = (folder / "out" / "quarantine" / f"{file}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def records_of(run: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (run / "stages").glob("*.json")}


@pytest.fixture(scope="module")
def interrupted(folder: Path) -> tuple[int, str, list[int], dict[str, bytes]]:
    """Ctrl-C in mid-distillation: exit code, last line, steps done, and stages complete by then."""
    run = folder / "out"
    command = Command(folder, "pipeline", "-c", "few.yaml", "-o", "out", "--cluster", "local")
    command.until(lambda: len(steps_of(run)) > 10)
    command.interrupt()
    code = command.wait()
    return code, command.err.splitlines()[-1], steps_of(run), records_of(run)


@pytest.fixture(scope="module")
def continued(folder: Path, interrupted: object) -> Command:
    """The same command, which ends."""
    command = Command(folder, "pipeline", "-c", "few.yaml", "-o", "out", "--cluster", "local", "--json")
    assert command.wait() == 0, command.err
    return command


@pytest.mark.chaos
def test_ctrl_c_in_mid_distillation_ends_with_130_and_keeps_the_state(folder, interrupted):
    code, _, steps, records = interrupted
    assert code == 130
    assert set(records) == {"profile", "extract"}
    assert 10 < len(steps) < STEPS
    assert list((folder / "out" / "checkpoints" / "distilled").iterdir())


@pytest.mark.chaos
def test_the_same_command_continues_at_the_saved_step_and_repeats_no_stage(folder, interrupted, continued):
    *_, earlier_steps, earlier_records = interrupted
    assert re.search(r"^profile: complete \(.* earlier\)$", continued.err, flags=re.MULTILINE)
    assert re.search(r"^extract: complete \(.* earlier\)$", continued.err, flags=re.MULTILINE)
    records = records_of(folder / "out")
    assert {name: records[name] for name in earlier_records} == earlier_records
    # Each step once: those before the interruption were not trained again.
    assert steps_of(folder / "out") == list(range(STEPS))
    assert steps_of(folder / "out")[: len(earlier_steps)] == earlier_steps


def test_the_result_is_one_json_object_with_stages_metrics_and_bad_rows(folder, continued):
    document = json.loads(continued.out)
    assert tuple(document["stages"]) == STAGES
    assert Metrics.model_validate_json(json.dumps(document["metrics"])).retention["reasoning"].num_rows == 10
    # The teacher answered the long row, which with its answer is too long for the student.
    answers = next(file for file in document["quarantined"] if file.endswith(".parquet"))
    assert document["quarantined"] == {str(folder / "few.jsonl"): 1, answers: 1, str(folder / "test.jsonl"): 1}
    assert {row["row"] for row in quarantined(folder, "few.jsonl")} == {BROKEN_ROW}
    assert "expected 1 to 128 tokens" in quarantined(folder, Path(answers).name)[0]["reason"]
    (held_out,) = quarantined(folder, "test.jsonl")
    assert held_out["row"] == TEST_ROWS + 1
    assert "at most 256 tokens of the teacher" in held_out["reason"]
    assert "3 bad rows left out" in continued.err
    assert "Traceback" not in continued.err


def test_a_third_time_nothing_is_done_and_ray_is_not_started(folder, continued):
    before = records_of(folder / "out")
    steps = steps_of(folder / "out")
    command = Command(folder, "pipeline", "-c", "few.yaml", "-o", "out", "--cluster", "local")
    assert command.wait() == 0
    assert re.findall(r"^(\w+): complete \(.*earlier\)$", command.err, flags=re.MULTILINE) == list(STAGES)
    assert "Ray" not in command.err
    assert (records_of(folder / "out"), steps_of(folder / "out")) == (before, steps)
    assert "report: out/report.html" in command.out


def test_the_report_is_drawn_again_from_the_directory_alone(folder, continued):
    (folder / "out" / "report.html").unlink()
    command = Command(folder, "report", "out", "--json")
    assert command.wait() == 0
    assert json.loads(command.out)["report"] == "out/report.html"
    assert (folder / "out" / "report.html").stat().st_size > 10_000


def test_the_bundle_answers(folder, continued):
    command = Command(folder, "generate", "-b", "out/bundle", "-p", "How many pens?", "--max-new-tokens", "4", "--json")
    assert command.wait() == 0, command.err
    assert set(json.loads(command.out)) == {"answer", "towers", "source"}


def test_the_student_is_profiled_on_its_teachers_rows_and_the_report_lays_them_side_by_side(folder, continued):
    command = Command(folder, "profile", "-b", "out/bundle", "--json")
    assert command.wait() == 0, command.err
    layers = json.loads(command.out)["structure"]["reasoning"]
    assert {name: found["num_layers"] for name, found in layers.items()} == {"student": 2, "sample-reasoning": 2}
    student = read_artifact(folder / "out" / "student_profile" / "reasoning.json", NIWTProfile)
    teacher = read_artifact(folder / "out" / "profile" / "sample-reasoning.json", NIWTProfile)
    assert (student.num_layers, student.num_samples) == (2, teacher.num_samples)
    assert "Layers of sample-reasoning and of the student" in (folder / "out" / "report.html").read_text()


@pytest.mark.chaos
def test_ctrl_c_while_teachers_load_ends_with_130_and_leaves_no_stage_half_done(folder):
    command = Command(folder, "profile", "-c", "few.yaml", "-o", "early", "--cluster", "local")
    command.until(lambda: "started a local Ray" in command.err)
    command.interrupt()
    assert command.wait() == 130
    assert records_of(folder / "early") == {}
    assert "Traceback" not in command.err


def test_too_many_bad_rows_end_the_stage_in_one_line_that_names_share_and_first_reason(folder):
    command = Command(folder, "extract", "-c", "many.yaml", "-o", "bad", "--cluster", "local")
    assert command.wait() == 2
    (line,) = [line for line in command.err.splitlines() if line.startswith("nexus: ")]
    assert "Expected at most 1.00% bad rows in" in line
    assert "found 67 of 200 (row 1: " in line
    assert "raise quarantine.max_bad_share" in line
    assert "Traceback" not in command.err
    assert records_of(folder / "bad") == {}
