"""Where the actor of a vendor's teacher runs: the interpreter of its package's environment, with this installation's nexus."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.pool import runtime_environment
from nexus.errors import TeacherUnavailableError
from nexus.towers.registry import load_registry, spec_of_entry
from nexus.vendors.environments import DIRECTORY_VARIABLE


def test_a_vendors_teacher_starts_with_its_own_interpreter_and_all_others_with_the_drivers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    registry = load_registry()
    speaks, reads = (spec_of_entry(registry.get(name), tmp_path) for name in ("parler-tts-large", "qwen2.5-0.5b"))
    assert runtime_environment(reads) is None
    with pytest.raises(
        TeacherUnavailableError, match=r"'parler-tts-large', found none.*make teacher-env NAME=parler-tts"
    ):
        runtime_environment(speaks)
    python = tmp_path / "parler-tts" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    environment = runtime_environment(speaks)
    assert environment is not None
    assert environment["py_executable"] == str(python)
    assert (Path(environment["env_vars"]["PYTHONPATH"]) / "actors" / "teacher.py").is_file()
