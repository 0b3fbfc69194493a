"""Processes killed on purpose, and losses spoilt: the weights of a seeded run stay what they would have been, or the command says
in one line why it failed and continues when typed again.

One undisturbed run is the reference of all; its profile and its extracted targets are the others' start. The commands run as
processes of their own and join this module's Ray, except where the driver dies: that one's own local Ray has to go with it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from safetensors.numpy import load_file

from actors.pool import actor_name
from actors.teacher import CONTROL_GROUP

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "nexus" / "data" / "samples"
STEPS = 44
"""The detectors judge after 32 accepted steps; the spike of the last test comes behind them."""
CHECKPOINT_EVERY = 5
KILL_AT = 12
"""Between two checkpoints, and far enough from the end for a restart to matter."""
DEADLINE_S = 300.0
"""Only a hang takes this long."""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One teacher, 48 rows, 44 steps; relative paths, which the workers of a Ray that was started elsewhere have to find."""
    folder = tmp_path_factory.mktemp("chaos")
    shutil.copy(SAMPLES / "reasoning" / "labelled.parquet", folder)
    shutil.copytree(SAMPLES / "teachers" / "sample-reasoning", folder / "teacher")
    pq.write_table(pq.read_table(SAMPLES / "reasoning" / "pool.parquet").slice(0, 48), folder / "pool.parquet")
    document = {
        "name": "chaos",
        "seed": 3,
        "teachers": [
            {
                "kind": "path",
                "id": "sample-reasoning",
                "path": "teacher",
                "role": "causal_lm",
                "capabilities": ["reasoning"],
            }
        ],
        "data": [
            {
                "capability": "reasoning",
                "pool": ["pool.parquet"],
                "labelled": ["labelled.parquet"],
                "test": [str(SAMPLES / "reasoning" / "test.parquet")],
                "towers": ["reasoning"],
                "answer": "gsm8k",
                "max_new_tokens": 16,
                "batch_size": 4,
            }
        ],
        "student": {"preset": "quickstart", "tokenizer": "sample-reasoning", "max_length": 96},
        "profile": {"max_samples": 4, "batch_size": 4},
        "distill": {
            "steps": STEPS,
            "learning_rate": 2.0e-3,
            "warmup_steps": 2,
            "labelled_batch_size": 2,
            "checkpoint_every": CHECKPOINT_EVERY,
            "labels_only": False,
            "variance": {"warmup_steps": 1},
            "recovery": {"snapshot_every": 7},
        },
        "cluster": {"num_cpus": 2, "object_store_mib": 80},
    }
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def address(ray_cluster: object) -> str:
    """HOST:PORT of this module's Ray."""
    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, address: str) -> Path:
    """Directory of a run that nobody disturbed."""
    out = config_file.parent / "undisturbed"
    _finish(_start(config_file, out, address))
    return out


@pytest.fixture
def prepared(undisturbed: Path, tmp_path: Path) -> Path:
    """A run directory in which only the distillation is missing."""
    out = tmp_path / "run"
    shutil.copytree(
        undisturbed, out, ignore=shutil.ignore_patterns("checkpoints", "distill.json", "events.jsonl", ".lock")
    )
    return out


def test_a_teacher_killed_in_mid_distillation_does_not_change_the_final_weights(
    config_file, address, undisturbed, prepared
):
    command = _start(config_file, prepared, address)
    teacher = _actor(actor_name("sample-reasoning"), command)
    _until(lambda: _steps(prepared) >= KILL_AT, command)
    victim = ray.get(teacher.health.options(concurrency_group=CONTROL_GROUP).remote(), timeout=60)
    os.kill(victim.pid, signal.SIGKILL)
    assert _health_after(victim.incarnation, teacher).pid != victim.pid
    assert "distill: complete" in _finish(command)
    assert len(_step_events(prepared)) == STEPS
    _assert_equal_weights(prepared, undisturbed)


def test_a_killed_trainer_fails_the_command_in_one_line_and_the_same_command_continues(
    config_file, address, undisturbed, prepared
):
    command = _start(config_file, prepared, address)
    trainer = _actor("trainer:distilled", command)
    _until(lambda: _steps(prepared) >= KILL_AT, command)
    os.kill(ray.get(trainer.pid.options(concurrency_group=CONTROL_GROUP).remote(), timeout=60), signal.SIGKILL)
    output = _finish(command, code=1)
    assert [line for line in output.splitlines() if line.startswith("nexus: ")] == output.splitlines()[-1:]
    assert "run the same command again" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert not (prepared / "stages" / "distill.json").exists()

    before = len((prepared / "events.jsonl").read_text().splitlines())
    output = _finish(_start(config_file, prepared, address))
    assert "extract: complete" in output, "earlier stages must not run again"
    assert len(_step_events(prepared)) == STEPS, "each step stands once in the events"
    assert before < len((prepared / "events.jsonl").read_text().splitlines())
    _assert_equal_weights(prepared, undisturbed)


def test_a_killed_driver_takes_its_ray_along_and_the_same_command_continues(config_file, undisturbed, prepared):
    command = _start(config_file, prepared, "local")
    _until(lambda: _steps(prepared) >= KILL_AT, command)
    # Ray's agents look for their node once in a while, and leave a minute later.
    processes = [
        process
        for process in psutil.Process(command.pid).children(recursive=True)
        if not any("Agent" in part for part in process.cmdline())
    ]
    assert any("raylet" in process.name() for process in processes)
    assert any("TrainerActor" in " ".join(process.cmdline()) for process in processes)
    command.kill()
    command.wait()
    _until_gone(processes)
    assert not (prepared / "stages" / "distill.json").exists()

    assert "distill: complete" in _finish(_start(config_file, prepared, "local"))
    assert len(_step_events(prepared)) == STEPS
    _assert_equal_weights(prepared, undisturbed)


@pytest.mark.parametrize(("spike", "draw"), [("20:nan", 20), ("40:x50", 40)])
def test_an_injected_spike_is_skipped_and_counted_and_the_run_completes(config_file, address, prepared, spike, draw):
    _finish(_start(config_file, prepared, address, "--inject-spike", spike))
    events = [json.loads(line) for line in (prepared / "events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["draw"]) for event in events if event["kind"] in ("skip", "rollback")] == [
        ("skip", draw)
    ]
    record = json.loads((prepared / "stages" / "distill.json").read_text())
    assert record["summary"]["skipped"] == 1
    assert record["summary"]["rollbacks"] == 0
    assert record["summary"]["steps"] == STEPS
    assert draw not in {event["draw"] for event in _step_events(prepared)}, "the spoilt draw trained nothing"
    assert all(np.isfinite(tensor).all() for tensor in _weights(prepared).values())


def _start(config: Path, out: Path, cluster: str, *more: str) -> subprocess.Popen[str]:
    """The command in the folder of its configuration, its output to a file beside the run (a pipe would fill up and block it)."""
    log = out.with_suffix(".log")
    command = ["distill", "--config", str(config), "--out", str(out), "--cluster", cluster, *more]
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=config.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )


def _finish(command: subprocess.Popen[str], *, code: int = 0) -> str:
    """Wait for the command; returns its output."""
    try:
        found = command.wait(timeout=DEADLINE_S)
    finally:
        command.kill()
    output = _log(command).read_text()
    assert found == code, output
    return output


def _log(command: subprocess.Popen[str]) -> Path:
    assert isinstance(command.args, list)
    return Path(str(command.args[command.args.index("--out") + 1])).with_suffix(".log")


def _until(condition: Callable[[], bool], command: subprocess.Popen[str]) -> None:
    """Poll until `condition` holds while the command runs."""
    limit = time.monotonic() + DEADLINE_S
    while not condition():
        assert command.poll() is None, f"the command ended too early:\n{_log(command).read_text()}"
        assert time.monotonic() < limit, _log(command).read_text()
        time.sleep(0.02)


def _actor(name: str, command: subprocess.Popen[str]):
    """Handle of another driver's actor, as soon as it exists."""
    found: list[dict[str, str]] = []

    def exists() -> bool:
        found[:] = [entry for entry in ray.util.list_named_actors(all_namespaces=True) if entry["name"] == name]
        return bool(found)

    _until(exists, command)
    return ray.get_actor(name, namespace=found[-1]["namespace"])


def _health_after(incarnation: str, teacher):
    """Health of the next incarnation, once Ray has restarted the actor."""
    limit = time.monotonic() + DEADLINE_S
    while time.monotonic() < limit:
        try:
            health = ray.get(teacher.health.options(concurrency_group=CONTROL_GROUP).remote(), timeout=60)
        except ray.exceptions.ActorUnavailableError:
            time.sleep(0.1)
            continue
        if health.incarnation != incarnation:
            return health
    raise AssertionError("the teacher was not restarted")


def _until_gone(processes: list[psutil.Process]) -> None:
    """Wait for processes that are not this process's children."""
    limit = time.monotonic() + DEADLINE_S
    while alive := [process for process in processes if _lives(process)]:
        assert time.monotonic() < limit, f"left behind: {alive}"
        time.sleep(0.5)


def _lives(process: psutil.Process) -> bool:
    try:
        # A zombie has ended; whoever adopted it has yet to ask for its exit code.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _step_events(out: Path) -> list[dict[str, object]]:
    path = out / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [event for event in map(json.loads, lines) if event["kind"] == "step"]


def _steps(out: Path) -> int:
    path = out / "events.jsonl"
    return path.read_text().count('"kind": "step"') if path.is_file() else 0


def _weights(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "checkpoints" / "distilled" / f"step-{STEPS:08d}" / "student.safetensors")


def _assert_equal_weights(out: Path, reference: Path) -> None:
    ours, theirs = _weights(out), _weights(reference)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert not different
