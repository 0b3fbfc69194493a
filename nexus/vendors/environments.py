"""Where the environments of vendors' packages are, and how one is made: `make teacher-env NAME=qwen-tts`.

A teacher of such a package is loaded by the interpreter of its environment alone: `nexus teachers check` starts it as a process, Ray
starts the teacher's actor with it (`runtime_env`). Python and Ray are there in the versions of this installation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ENVIRONMENTS: Mapping[str, str] = {"qwen-tts": "transformers 4.57.3", "parler-tts": "transformers 4.46.1"}
"""Package -> what it pins, against the transformers of this installation."""
DIRECTORY_VARIABLE = "NEXUS_TEACHER_ENVS"
"""Names the folder of the environments where they do not lie in the source tree's `.teacher-envs`."""


def tree() -> Path:
    """Folder of the packages nexus, actors and jobs: all that an environment needs of this installation."""
    return Path(__file__).resolve().parents[2]


def environments_directory() -> Path:
    """Folder with one environment per package."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    return Path(named) if named else tree() / ".teacher-envs"


def interpreter_of(package: str) -> Path | None:
    """Python of a package's environment; None where it has not been made."""
    python = environments_directory() / package / "bin" / "python"
    return python if python.exists() else None


def what_to_type(package: str) -> str:
    """What a teacher of `package` needs, and the command that makes it."""
    return f"{package}, which pins {ENVIRONMENTS[package]}, in an environment of its own; type: make teacher-env NAME={package}"


def process_environment() -> dict[str, str]:
    """Variables of a process that runs in such an environment: it imports this installation's nexus, and reaches for no hub."""
    return {"PYTHONPATH": str(tree()), "HF_HUB_OFFLINE": "1"}
