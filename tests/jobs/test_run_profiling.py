"""`jobs/run_profiling.sh`: the options of `nexus profile` in a script's spelling, from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "run_profiling.sh"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a folder of its own, without a cluster to join."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    return subprocess.run(
        [str(SCRIPT), *arguments],
        cwd=folder,
        env={**environment, "PYTHON": sys.executable, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_both_spellings_reach_the_command_and_values_keep_their_letters(tmp_path):
    done = run(tmp_path, "--batch_size", "0", "--max-samples=4", "--json")
    assert done.returncode == json.loads(done.stdout)["exit_code"] == 2
    assert "'profile.batch_size', found 0" in done.stderr
    done = run(tmp_path, "--max_samples=4", "--config=no_such_file.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("nexus: Expected a configuration at no_such_file.yaml, found no such file.")
