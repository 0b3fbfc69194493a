"""What the scripts of this folder do when `ray job submit` runs them.

A job's `python` is the one that the shell which typed `ray start` had on its PATH: another one than Ray's where Ray was started as
`.venv/bin/ray`. The script then goes on in the interpreter of the cluster's own workers. Imports nothing beyond the standard
library: the first interpreter may have nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

WORKER_COMMAND = "--python_worker_command="
"""Argument of Ray's node process that begins with the interpreter of its workers."""
NEEDED = ("ray", "typer")


def run_script(last: str) -> None:
    """The command line of `nexus` for one last stage, then exit."""
    if any(find_spec(name) is None for name in NEEDED):
        _continue_in(worker_interpreter())
    from jobs.cli import app

    sys.argv = [sys.argv[0], last, *sys.argv[1:]]
    app()


def worker_interpreter() -> Path | None:
    """Interpreter of the Ray node that this process descends from; None outside a Ray job."""
    for command in _ancestors():
        for argument in command:
            if argument.startswith(WORKER_COMMAND):
                interpreter = Path(argument.removeprefix(WORKER_COMMAND).split(" ")[0])
                return interpreter if interpreter.is_file() else None
    return None


def _continue_in(interpreter: Path | None) -> None:
    """Replace this process; exit with 2 where that cannot help."""
    # Not resolved: a virtual environment's interpreter is a link, and is known by the link's place.
    if interpreter is None or str(interpreter) == sys.executable:
        sys.exit(_complaint())
    print(f"python has no Ray ({sys.executable}); continuing in the cluster's {interpreter}", flush=True)
    os.execv(interpreter, [str(interpreter), *sys.argv])  # nosec B606 # the interpreter that Ray itself starts


def _complaint() -> int:
    print(
        f"nexus: expected a Python that nexus is installed in, found {sys.executable}. "
        "Type `make setup` and use .venv/bin/python, or activate .venv before `ray start`.",
        file=sys.stderr,
    )
    return 2


def _ancestors() -> Iterator[list[str]]:
    """Command lines from the parent upwards; none where the system has no /proc."""
    pid = os.getppid()
    while pid > 1:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
            # The name in parentheses may hold anything; the parent's id is the second field behind it.
            parent = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            return
        yield command
        pid = parent
