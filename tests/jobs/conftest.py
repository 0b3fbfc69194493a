"""The command line in this process, and what its tests ask of an answer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import app

RAY_VARIABLES = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def document(self) -> dict[str, Any]:
        """Stdout as the one JSON object that it has to be."""
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document

    def complaint(self) -> str:
        """The one line of a user's mistake: exit code 2, nothing on stdout."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        assert self.err.startswith("nexus: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err


@pytest.fixture
def nexus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Outcome]]:
    """Runs `nexus ARGUMENTS...` in an empty working directory, with an empty home and no cluster to join."""
    home = tmp_path / "home"
    home.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RAY_TMPDIR", str(home))
    for name in RAY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)

    yield run
    # A session prepares the environment for Ray and takes over the signals.
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)
