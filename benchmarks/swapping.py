"""What sleeping teachers cost: three teachers with a place for one, against the same calls with all of them awake.

    python benchmarks/swapping.py [--calls 96] [--rows 16]

A teacher that is awake does all that waits for it before another is woken, so a swap is paid once for as many calls as the callers
ask for ahead (`--windows`, which is `distill.window` of a run). Both sides run in the same Ray session on the same three actors; on
a CPU a sleeper drops its model and reads it again. Prints the seconds of both, the swaps, and the share that swapping adds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from actors.cluster import connect, prepare_environment, resolve_cluster
from nexus.towers.registry import TeacherSpec
from nexus.towers.targets import ScoreRequest

TEACHER = Path(__file__).resolve().parents[1] / "nexus" / "data" / "samples" / "teachers" / "sample-reasoning"
TIMEOUT_S = 300.0


def request(number: int, rows: int) -> ScoreRequest:
    """Rows of arithmetic, other ones for each number."""
    return ScoreRequest(
        row_ids=tuple(f"{number}-{row}" for row in range(rows)),
        prompts=tuple(f"Tom has {number + row} pens and buys 2 more. How many pens in all?" for row in range(rows)),
        completions=tuple(f"{number + row}+2={number + row + 2}\n#### {number + row + 2}" for row in range(rows)),
        media=None,
        temperature=1.0,
        top_k=64,
        layers=(),
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=96, help="calls of each teacher")
    parser.add_argument("--rows", type=int, default=16, help="rows of a call")
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 16, 48], help="calls asked for ahead")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    target = resolve_cluster("local")
    prepare_environment(target)
    connect(target, namespace="swapping", num_cpus=2, object_store_mib=128, torch_threads=1, dashboard=False)
    from actors.pool import Sleep, TeacherPool

    teachers = ("first", "second", "third")
    specs = [TeacherSpec(id=name, path=str(TEACHER), revision=None, role="causal_lm") for name in teachers]
    TeacherPool.start(specs, torch_threads=1, window=2, timeout_s=TIMEOUT_S, max_retries=1, load_timeout_s=TIMEOUT_S)
    found = []
    for window in arguments.windows:
        seconds = {}
        swaps = 0
        for kind, sleep in (("awake", None), ("by turns", Sleep(1, 2**40))):
            pool = TeacherPool.attach(teachers, window=2, timeout_s=TIMEOUT_S, max_retries=1, sleep=sleep)
            start = time.perf_counter()
            _ask(pool, teachers, arguments.calls, arguments.rows, window)
            seconds[kind] = time.perf_counter() - start
            swaps = pool.swaps
        share = seconds["by turns"] / seconds["awake"] - 1
        found.append({"window": window, **seconds, "swaps": swaps, "added": share})
        if not arguments.json:
            print(
                f"window {window:3d}: awake {seconds['awake']:6.2f} s, by turns {seconds['by turns']:6.2f} s, {swaps} swaps, "
                f"{share:+.1%}",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(found))


def _ask(pool: object, teachers: tuple[str, ...], calls: int, rows: int, window: int) -> None:
    """Every teacher at every step, `window` steps ahead, as training asks."""
    from actors.pool import TeacherPool

    assert isinstance(pool, TeacherPool)
    for number in range(calls + window):
        if number < calls:
            for teacher in teachers:
                pool.submit((teacher, number), teacher, "score", request(number, rows))
        if number >= window:
            for teacher in teachers:
                pool.collect((teacher, number - window))


if __name__ == "__main__":
    main()
