"""Teachers of vendors' packages: where their environments are looked for, and what is made of what a process in one of them says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nexus.errors import TowerLoadError
from nexus.towers.check import check_teachers
from nexus.towers.loader import load_tower
from nexus.towers.registry import TeacherRegistry, load_registry, spec_of_entry
from nexus.vendors.environments import (
    DIRECTORY_VARIABLE,
    ENVIRONMENTS,
    environments_directory,
    interpreter_of,
    process_environment,
    tree,
    what_to_type,
)

QWEN = ("qwen3-tts-customvoice", "qwen3-tts-voicedesign", "qwen3-tts-tokenizer")


@pytest.fixture(scope="module")
def registry() -> TeacherRegistry:
    return load_registry()


def interpreter(folder: Path, *lines: str) -> Path:
    """A program in the place of an environment's Python that says `lines` and fails."""
    python = folder / "qwen-tts" / "bin" / "python"
    python.parent.mkdir(parents=True)
    said = "\n".join(f"echo '{line}'" for line in lines)
    python.write_text(
        f"#!/bin/sh\necho \"$3\" > {folder / 'asked.json'}\n{said}\necho 'first line' >&2\necho 'no such thing' >&2\nexit 3\n"
    )
    python.chmod(0o755)
    return python


def test_every_package_of_the_registry_with_its_own_pins_can_be_made(registry: TeacherRegistry) -> None:
    packages = {entry.library for entry in registry.teachers} - {"transformers", "diffusers", "sae"}
    assert packages == ENVIRONMENTS.keys()
    for package in packages:
        folder = tree() / "scripts" / "environments"
        pins = (folder / f"{package}.txt").read_text() + (folder / f"{package}.no-deps.txt").read_text()
        assert ENVIRONMENTS[package].replace(" ", "==") in pins.splitlines()
        assert f"{package}==" in pins
        assert f"make teacher-env NAME={package}" in what_to_type(package)
    # An actor runs there: Ray speaks to its own version only.
    locked = (tree() / "constraints.txt").read_text()
    ray = next(line for line in locked.splitlines() if line.startswith("ray=="))
    assert all(ray.replace("ray", "ray[default]") in (folder / f"{name}.txt").read_text() for name in packages)


def test_environments_lie_in_the_tree_or_where_the_variable_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    assert environments_directory() == tree() / ".teacher-envs"
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    assert interpreter_of("qwen-tts") is None
    python = interpreter(tmp_path)
    assert interpreter_of("qwen-tts") == python
    assert Path(process_environment()["PYTHONPATH"], "nexus", "__init__.py").is_file()


def test_rows_come_from_the_environments_process_and_what_it_did_not_say_failed(
    registry: TeacherRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    said = {
        "id": QWEN[0], "status": "ok", "reason": None, "quantised": True, "quantised_share": 0.8, "quantisable_share": 0.9,
        "bits_per_param": 4.5, "targets": ["tokens", "hidden"], "seconds": 1.5,
    }  # fmt: skip
    refused = {"id": QWEN[2], "status": "failed", "reason": "no codec", "seconds": 0.5}
    interpreter(tmp_path, "Warning: welcome", json.dumps(said), json.dumps(refused))
    rows = list(check_teachers(registry, (*QWEN, "parler-tts-large"), tiny=True))
    assert [row.status for row in rows] == ["ok", "failed", "failed", "needs"]
    assert (rows[0].role, rows[0].targets, rows[0].quantised_share, rows[0].seconds) == (
        "codec_lm", ("tokens", "hidden"), 0.8, 1.5
    )  # fmt: skip
    assert "found: no such thing. Make the environment again: make teacher-env NAME=qwen-tts" in str(rows[1].reason)
    assert (rows[2].role, rows[2].reason, rows[2].quantised_share) == ("codec", "no codec", None)
    assert json.loads((tmp_path / "asked.json").read_text()) == [[name, None] for name in QWEN]
    list(check_teachers(registry, QWEN[:1], tiny=True, keep=tmp_path / "kept"))
    assert json.loads((tmp_path / "asked.json").read_text()) == [[QWEN[0], str(tmp_path / "kept" / QWEN[0])]]


def test_local_checkpoints_that_are_not_there_are_needed_and_start_no_process(
    registry: TeacherRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    python = interpreter(tmp_path)
    (row,) = check_teachers(registry, QWEN[:1], tiny=False, models_dir=tmp_path / "models")
    assert row.status == "needs"
    assert "nexus teachers pull qwen3-tts-customvoice" in str(row.reason)
    # The process is started for the one that is there, and fails; the other one's row is kept.
    (tmp_path / "models" / QWEN[1]).mkdir(parents=True)
    rows = list(check_teachers(registry, QWEN[:2], tiny=False, models_dir=tmp_path / "models"))
    assert [row.status for row in rows] == ["needs", "failed"]
    assert "no such thing" in str(rows[1].reason)
    python.unlink()
    (row,) = check_teachers(registry, QWEN[:1], tiny=False, models_dir=tmp_path / "models")
    assert "make teacher-env NAME=qwen-tts" in str(row.reason)


def test_such_a_teacher_is_not_loaded_by_this_processs_transformers(registry: TeacherRegistry, tmp_path: Path) -> None:
    with pytest.raises(TowerLoadError, match="make teacher-env NAME=qwen-tts"):
        load_tower(spec_of_entry(registry.get(QWEN[0]), tmp_path))
