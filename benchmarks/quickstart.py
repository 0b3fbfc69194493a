"""The quickstart over three seeds: retention, what the labels alone give, and cost; prints the medians.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--out runs/benchmark-quickstart]

Each seed is a whole `nexus quickstart` in its own process and run directory; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from actors.cluster import MALLOC_ENVIRONMENT


def main() -> int:
    """Run the seeds and print a table; exit 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-quickstart"))
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        result = _run(seed, arguments.out / f"seed-{seed}")
        if result is None:
            return 1
        results.append(result)
    _print(arguments.seeds, results)
    return 0


def _run(seed: int, out: Path) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "jobs.cli", "quickstart", "--json", "--out", str(out), "--set", f"seed={seed}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | MALLOC_ENVIRONMENT, check=False)
    if done.returncode:
        print(f"seed {seed}: exit code {done.returncode}", file=sys.stderr)
        return None
    return dict(json.loads(done.stdout))


def _print(seeds: list[int], results: list[dict[str, Any]]) -> None:
    metrics = [result["metrics"] for result in results]
    print(f"seeds {', '.join(map(str, seeds))}; medians (all values)")
    for capability in metrics[0]["retention"]:
        rows = [m["retention"][capability] for m in metrics]
        gaps = [row["student_score"] - row["labels_only_score"] for row in rows]
        print(
            f"  {capability:<10} retention {_median(rows, 'retention')}  teacher {_median(rows, 'teacher_score')}  "
            f"student {_median(rows, 'student_score')}  labels only {_median(rows, 'labels_only_score')}  "
            f"better by {statistics.median(gaps):.3f}"
        )
    stages = [m["stages"] for m in metrics]
    seconds = [sum(stage["seconds"] for stage in run.values()) for run in stages]
    memory = [max(stage["peak_memory_gib"] for stage in run.values()) for run in stages]
    print(f"  seconds of all stages {statistics.median(seconds):.0f} ({', '.join(f'{s:.0f}' for s in seconds)})")
    print(f"  peak summed PSS, GiB  {statistics.median(memory):.2f} ({', '.join(f'{m:.2f}' for m in memory)})")


def _median(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{statistics.median(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


if __name__ == "__main__":
    sys.exit(main())
