"""What sleeping teachers cost: three teachers with a place for one, against the same calls with all of them awake.

    python benchmarks/swapping.py [--parameters 100e6] [--calls 32] [--rows 8] [--turns 8 16]

A teacher that is awake does all that waits for it before another is woken, and a sleeper is left asleep until a turn of calls waits
for it (`cluster.turn_batches` of a run), so a swap is paid once for many calls. The callers ask as distillation does: every teacher
at every step, two turns ahead. Both sides run in the same Ray session on the same three actors, whose forward of a batch takes at
least 50 ms. Prints the seconds of both sides, the swaps, what one costs, and the share that swapping adds to the computation, as the
actors measured it; the exit code is 1 when that is a tenth or more. The shipped sample teacher, whose batch takes some milliseconds,
is measured beside (`--samples`): nothing is promised of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from actors.cluster import connect, prepare_environment, resolve_cluster
from nexus.towers.registry import TeacherSpec
from nexus.towers.targets import ScoreRequest

SAMPLE = Path(__file__).resolve().parents[1] / "nexus" / "data" / "samples" / "teachers" / "sample-reasoning"
TEACHERS = ("first", "second", "third")
TIMEOUT_S = 600.0
MAX_SHARE = 0.1
MIN_BATCH_S = 0.05
LAYER_PARAMETERS = 4 * 1024 * 1024 + 3 * 1024 * 4096


def write_teacher(folder: Path, parameters: float) -> None:
    """A model with random weights of about so many parameters, with the sample's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        num_hidden_layers=max(1, round(parameters / LAYER_PARAMETERS)),
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=100e6, help="of each teacher")
    parser.add_argument("--samples", action="store_true", help="the shipped sample teacher instead; promises nothing")
    parser.add_argument("--calls", type=int, default=32, help="calls of each teacher")
    parser.add_argument("--rows", type=int, default=8, help="rows of a call")
    parser.add_argument(
        "--turns", type=int, nargs="+", default=[8, 16], help="calls that wait before a teacher is woken"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    target = resolve_cluster("local")
    prepare_environment(target)
    with tempfile.TemporaryDirectory() as scratch:
        folder = SAMPLE
        if not arguments.samples:
            folder = Path(scratch) / "teacher"
            write_teacher(folder, arguments.parameters)
        connect(target, namespace="swapping", num_cpus=2, object_store_mib=128, torch_threads=1, dashboard=False)
        found = measure(arguments, folder, Path(scratch) / "cache")
        import ray

        ray.shutdown()
    if arguments.json:
        print(json.dumps(found))
    slow_enough = all(row["batch"] >= MIN_BATCH_S for row in found)
    return 0 if arguments.samples or (slow_enough and all(row["share"] < MAX_SHARE for row in found)) else 1


def measure(arguments: argparse.Namespace, folder: Path, cache: Path) -> list[dict[str, float]]:
    """One row for each turn."""
    from actors.pool import Sleep, TeacherPool

    specs = [
        TeacherSpec(id=name, path=str(folder), revision=None, role="causal_lm", cache_dir=str(cache))
        for name in TEACHERS
    ]
    # The pool that creates the actors keeps them alive.
    owner, reports = TeacherPool.start(
        specs, torch_threads=1, window=2, timeout_s=TIMEOUT_S, max_retries=1, load_timeout_s=TIMEOUT_S
    )
    weights = reports["first"].weight_bytes
    if not arguments.json:
        print(f"three teachers of {reports['first'].num_params:,} parameters, {weights / 2**20:.0f} MiB in NF4")
    found = []
    for turn in arguments.turns:
        seconds = {}
        for kind, sleep in (("awake", None), ("by turns", Sleep(1, 2**40, turn))):
            pool = TeacherPool.attach(TEACHERS, window=2, timeout_s=TIMEOUT_S, max_retries=1, sleep=sleep)
            before = _costs(owner)
            start = time.perf_counter()
            _ask(pool, arguments.calls, arguments.rows, 2 * turn)
            seconds[kind] = time.perf_counter() - start
            swapped, computed = (now - then for now, then in zip(_costs(owner), before, strict=True))
        row = {
            "turn": turn,
            "awake": seconds["awake"],
            "by_turns": seconds["by turns"],
            "batch": computed / (len(TEACHERS) * arguments.calls),
            "swaps": pool.swaps,
            "swap": swapped / max(1, pool.swaps),
            "share": swapped / computed,
        }
        found.append(row)
        if not arguments.json:
            print(
                f"turn of {turn:3d}: awake {row['awake']:6.2f} s, by turns {row['by_turns']:6.2f} s "
                f"({row['by_turns'] / row['awake'] - 1:+.1%}); a batch {row['batch'] * 1000:.0f} ms; {pool.swaps} swaps of "
                f"{row['swap'] * 1000:.0f} ms: {row['share']:.1%} of the computation (promised below {MAX_SHARE:.0%})",
                flush=True,
            )
    return found


def _costs(owner: object) -> tuple[float, float]:
    """Seconds of swapping and of computation so far, over all teachers."""
    from actors.pool import TeacherPool

    assert isinstance(owner, TeacherPool)
    healths = [owner.health(teacher, timeout_s=60) for teacher in TEACHERS]
    return sum(item.swap_seconds for item in healths), sum(item.busy_seconds for item in healths)


def _ask(pool: object, calls: int, rows: int, ahead: int) -> None:
    """Every teacher at every step, `ahead` steps ahead, as training asks."""
    from actors.pool import TeacherPool

    assert isinstance(pool, TeacherPool)
    for number in range(calls + ahead):
        if number < calls:
            for teacher in TEACHERS:
                pool.submit((teacher, number), teacher, "score", request(number, rows))
        if number >= ahead:
            for teacher in TEACHERS:
                pool.collect((teacher, number - ahead))


if __name__ == "__main__":
    sys.exit(main())
