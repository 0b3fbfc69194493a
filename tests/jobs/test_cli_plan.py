"""`nexus plan`: a place and a price for every teacher, from a command that starts and imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_teacher_of_the_registry_gets_a_place_on_four_cards(nexus):
    told = nexus("plan", "--all", "--gpus", "4x24GiB")
    assert told.code == 0
    assert "kimi-k2.5" in told.out
    assert "streamed" in told.out
    assert "sleeps (" in told.out
    assert "wave 2" in told.out
    assert "cluster.resident_teachers=" in told.out
    assert "A run would refuse kimi-k2.5 (a run streams encoders alone), gemma-scope-2-27b (role sae), " in told.out
    document = nexus("plan", "--all", "--gpus", "4x24GiB", "--json").document()
    for purpose in ("training", "extraction"):
        teachers = [place["id"] for place in document[purpose]["places"] if place["id"] != "student"]
        assert teachers == [size["id"] for size in document["teachers"]]
        assert len(teachers) == 23
        for use in document[purpose]["devices"]:
            assert use["planned_bytes"] <= use["capacity_bytes"]
    assert document["refused"]["sd3-medium"] == "role diffusion"
    assert "siglip2-so400m" not in document["refused"]


def test_a_runs_own_teachers_are_measured_by_their_files_and_fit_this_machine(nexus):
    told = nexus("plan")
    assert told.code == 0
    assert "sizes of 4 from the headers of their checkpoints" in told.out
    assert "this machine now" in told.out
    assert nexus("plan", "--json").document()["training"]["num_waves"] == 1


def test_what_a_run_asks_for_is_what_the_plan_counts(nexus):
    few, many = (nexus("plan", "--set", f"distill.steps={n}", "--json").document() for n in (100, 1000))
    seconds = [document["training"]["places"][1]["compute_seconds"] for document in (few, many)]
    assert seconds[1] == pytest.approx(10 * seconds[0])


@pytest.mark.parametrize("text", ["four", "4x24", "4x24GiB,,", ""])
def test_gpus_that_cannot_be_read_are_one_line(nexus, text):
    assert "Expected GPUs as 4x24GiB" in nexus("plan", "--gpus", text).complaint()


def test_a_teacher_whose_files_are_gone_and_a_cluster_that_is_too_small_are_one_line(nexus, tmp_path):
    missing = nexus("plan", "--set", f"teachers.sample-code.path={tmp_path / 'gone'}").complaint()
    assert "sample-code" in missing
    small = nexus("plan", "--gpus", "1x300MiB/400MiB").complaint()
    assert "on the largest GPU" in small


def test_planning_imports_neither_ray_nor_torch_nor_transformers():
    code = (
        "import sys; from jobs.cli import app\n"
        "try: app(['plan', '--all', '--gpus', '4x24GiB', '--json'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == "[]"
