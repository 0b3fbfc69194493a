"""What keeping a run safe costs: snapshots against the steps between them, and memory against the rows trained on.

    python benchmarks/recovery.py [--width 256] [--layers 4] [--rows 320] [--threads 2] [--json FILE]

Both run `DistillationLoop` over one real teacher's states (`benchmarks/surgery.py` has the task), 8 rows of 64 tokens a step.

    snapshot_share           seconds of a snapshot (parameters, moments, schedule, data, generators; both checked for nan), over those
                             of the 50 plain steps that it stands for: at most 0.02
    check_share              seconds of what the recovery step does at every step (finite parameters, detectors, the state before the
                             forward pass), over those of a step
    memory_ratio_10x_rows    peak resident memory of a process that trains once over 10 R rows of a JSONL file, over that of one with
                             R rows: at most 1.05. Three snapshots are held in both.

Seconds are medians. Ends with exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from surgery import BATCH, TRAIN_ROWS, Task, make_loop, make_task

from nexus.data.loader import RecordBatches
from nexus.data.records import Record
from nexus.training.loop import DistillationLoop

SNAPSHOT_EVERY = 50
WARM_UP = 5
MAX_SNAPSHOT_SHARE, MAX_MEMORY_RATIO = 0.02, 1.05
KIND = "code"


def main() -> int:
    """Measure both and print them; 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="of the student whose snapshots are timed")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="timed")
    parser.add_argument("--rows", type=int, default=320, help="R; a multiple of the rows of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.work is not None:
        print(_peak_mib(arguments.work, arguments.rows))
        return 0
    task = make_task([KIND])
    loop = make_loop(task, 0, width=arguments.width, layers=arguments.layers, snapshot_every=10**9)
    found = _snapshot_cost(loop, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(task, Path(folder) / "task.pt")
        peaks = [_in_a_process(Path(folder), rows, arguments.threads) for rows in (arguments.rows, 10 * arguments.rows)]
    found["memory_ratio_10x_rows"] = peaks[1] / peaks[0]
    print(f"  {arguments.rows} rows {peaks[0]:.1f} MiB, {10 * arguments.rows} rows {peaks[1]:.1f} MiB at the most")
    for key, value in found.items():
        print(f"  {key:<24} {value:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(found["snapshot_share"] > MAX_SNAPSHOT_SHARE or found["memory_ratio_10x_rows"] > MAX_MEMORY_RATIO)


def _snapshot_cost(loop: DistillationLoop, steps: int) -> dict[str, float]:
    recovery = loop.recovery
    step_s, check_s, snapshot_s = [], [], []
    for number in range(WARM_UP + steps):
        times = [time.perf_counter()]
        report = loop.advance()
        times.append(time.perf_counter())
        # Once more what the step just did of it.
        recovery.begin_step()
        recovery.check(report.total, report.grad_norm, (str(number),))
        times.append(time.perf_counter())
        recovery.snapshot(number)
        times.append(time.perf_counter())
        for kept, (before, after) in zip((step_s, check_s, snapshot_s), pairwise(times), strict=True):
            kept.append(after - before)
    step, check, snapshot = (statistics.median(times[WARM_UP:]) for times in (step_s, check_s, snapshot_s))
    parameters = sum(parameter.numel() for parameter in loop.objective.parameters() if parameter.requires_grad)
    print(
        f"  {parameters / 1e6:.2f} M parameters: step {1e3 * step:.1f} ms, check {1e3 * check:.2f} ms, "
        f"snapshot {1e3 * snapshot:.1f} ms every {SNAPSHOT_EVERY} steps"
    )
    return {"snapshot_share": snapshot / (SNAPSHOT_EVERY * step), "check_share": check / step}


def _in_a_process(folder: Path, rows: int, threads: int) -> float:
    command = [sys.executable, __file__, "--work", str(folder), "--rows", str(rows), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


class WholeRows:
    """Rows of a file without their prompts, which a file must have and the task has not."""

    def __init__(self, rows: RecordBatches) -> None:
        self._rows = rows
        self.state_dict, self.load_state_dict = rows.state_dict, rows.load_state_dict

    def next_batch(self) -> tuple[Record, ...]:
        """The next rows."""
        rows = self._rows.next_batch()
        return tuple(replace(row, prompt="", completion=row.prompt + str(row.completion)) for row in rows)


def _peak_mib(folder: Path, rows: int) -> float:
    """The largest resident memory of this process (VmHWM, Linux) after it trained on every row once."""
    task: Task = torch.load(folder / "task.pt", weights_only=False)
    path = folder / f"{rows}.jsonl"
    usable = [record for record in task.train[KIND].records if not record.completion[0].isspace()]
    with path.open("w") as file:
        for number in range(rows):
            again, place = divmod(number, len(usable))
            text = usable[place].completion
            row_id = int(usable[place].id) + again * TRAIN_ROWS
            file.write(json.dumps({"id": str(row_id), "prompt": text[0], "completion": text[1:]}) + "\n")
    stream = WholeRows(RecordBatches([path], capability=KIND, batch_size=BATCH, seed=0, buffer_rows=64))
    loop = make_loop(task, 0, streams={KIND: stream}, snapshot_every=10)
    steps = rows // BATCH
    loop.run(on_report=lambda report: None, should_stop=lambda: loop.step >= steps, save=lambda: None)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())
