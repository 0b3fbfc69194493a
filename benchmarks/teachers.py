"""What loading and asking a teacher costs: the quantised cache, bits and memory, the wire, and streaming against memory.

Run as `python benchmarks/teachers.py [--parameters N] [--only SECTION]`. Every load is a process of its own,
so that its peak is its own; imports are not counted. Each line prints the figure beside its baseline from the same run; the exit
code is 1 when one misses what is promised of it.

load      a dense model: first load (quantises) against second (reads the cache), equal logits, bits per quantised parameter, and the
          largest resident memory above that of the idle process against the quantised size and two shards
experts   the same for a mixture of experts, whose stacks are 1,024 x 1,024 and more
wire      64 ids and log-probabilities of a token: columns against Python lists, and bytes per token by vocabulary
streamed  a model run block by block under a hard limit of its address space, against the same model in memory
busy      share of the time in which a teacher's actor computes while extraction streams rows to it, from its first answer to its last
          and by its own clock, against asking for one batch after the other
process   what a teacher's process takes before it has loaded anything, as its actor imports its libraries, against a plain import
"""

from __future__ import annotations

import argparse
import json
import os
import pickle  # nosec B403 # what Ray sends between processes
import subprocess  # nosec B404 # measurements in processes of their own
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARD_BYTES = 64 * 2**20
MAX_LOAD_SHARE = 0.2
MAX_BITS = 4.2
MIN_WIRE_FACTOR = 50.0
MAX_BYTES_PER_TOKEN = 280.0
MIN_BUSY = 0.9
MIN_BATCH_S = 0.2

WRITE = """
import json, sys, torch, transformers
from nexus.towers.tiny import tiny_tokenizer

folder, name, sizes, shard = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
torch.set_default_dtype(torch.float16)
model_class = getattr(transformers, name)
torch.manual_seed(0)
model = model_class(model_class.config_class(**sizes))
for parameter in model.parameters():
    if parameter.ndim > 1:
        parameter.data.normal_(0, 0.02)
model.save_pretrained(folder, max_shard_size=shard)
tiny_tokenizer().save_pretrained(folder)
print(json.dumps({"parameters": model.num_parameters()}))
"""

LOAD = """
import hashlib, json, os, resource, sys, time
from pathlib import Path
import psutil, torch
from transformers.utils.logging import disable_progress_bar
from nexus.errors import TowerLoadError
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.registry import TeacherSpec
from nexus.towers.targets import ScoreRequest

folder, cache, streamed, headroom, rows = sys.argv[1], sys.argv[2], sys.argv[3] == "1", int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(1)
disable_progress_bar()
process = psutil.Process()
spec = dict(id="bench", path=folder, revision=None, role="causal_lm", cache_dir=cache)
result = {}
if headroom:
    limit = process.memory_info().vms + headroom
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        load_tower(TeacherSpec(**spec), device="cpu")
    except TowerLoadError as error:
        result["in_memory"] = str(error)
before = process.memory_info().rss
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
start = time.perf_counter()
tower = load_tower(TeacherSpec(**spec, streamed=streamed), device="cpu")
result["load_seconds"] = time.perf_counter() - start
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
result["peak"] = int(status["VmHWM"].split()[0]) * 1024 - before
request = ScoreRequest(
    tuple(map(str, range(rows))), ("what is it",) * rows, tuple(f"it is {i}" for i in range(rows)), None, 1.0, 64, ()
)
engine = TeacherEngine(tower, teacher_id="bench")
start = time.perf_counter()
tokens = engine.score(request).tokens
result["score_seconds"] = time.perf_counter() - start
coverage = tower.coverage
result.update(
    from_cache=tower.from_cache, bits=coverage.bits_per_param, stored=coverage.stored_bytes, share=coverage.share,
    digest=hashlib.sha256(tokens.ids_NK.tobytes() + tokens.logprobs_NK.tobytes()).hexdigest(),
)
print(json.dumps(result))
"""

PROCESS = """
import json, sys, time
from contextlib import nullcontext
from actors.memory import private_bytes
from nexus.towers.lean import lean_imports

start = time.process_time()
with lean_imports() if sys.argv[1] == "1" else nullcontext():
    import nexus.towers.engine
print(json.dumps({"seconds": time.process_time() - start, "private": private_bytes()}))
"""

DENSE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64,
    "vocab_size": 512, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {
    **DENSE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 1024, "decoder_sparse_step": 1,
    "num_hidden_layers": 2,
}  # fmt: skip
DENSE_LAYER = 4 * 1024 * 1024 + 3 * 1024 * 4096
NARROW = {**DENSE, "intermediate_size": 2048}
"""Packing a matrix takes some ten times its packed size for a moment, which has to fit beside two blocks."""
NARROW_LAYER = 4 * 1024 * 1024 + 3 * 1024 * 2048
NARROW_SHARD_BYTES = 16 * 2**20
"""A shard is mapped for a moment to read its header, and addresses are what is limited."""
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=220e6, help="of the dense model of load and streamed")
    parser.add_argument("--only", choices=sorted(SECTIONS), help="one of the measurements")
    parser.add_argument("--rows", type=int, default=64, help="rows that streamed scores")
    arguments = parser.parse_args()
    kept = [
        section(arguments) for name, section in SECTIONS.items() if arguments.only is None or name == arguments.only
    ]
    return 0 if all(kept) else 1


def measure_load(arguments: argparse.Namespace) -> bool:
    layers = max(1, round(arguments.parameters / DENSE_LAYER))
    return _load_twice("load", "Qwen3ForCausalLM", {**DENSE, "num_hidden_layers": layers})


def measure_experts(_arguments: argparse.Namespace) -> bool:
    return _load_twice("experts", "Qwen3MoeForCausalLM", EXPERTS)


def _load_twice(name: str, model_class: str, sizes: dict[str, Any]) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        parameters = _run(WRITE, folder, model_class, json.dumps(sizes), SHARD_BYTES)["parameters"]
        shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
        first, second = (_run(LOAD, folder, Path(scratch) / "cache", 0, 0, 4) for _ in range(2))
    assert (first["from_cache"], second["from_cache"]) == (False, True), "the second load was to come from the cache"
    share = second["load_seconds"] / first["load_seconds"]
    allowed = first["stored"] + 2 * max(shards)
    print(
        f"{name}: {parameters / 1e6:.0f}M parameters, {first['share']:.1%} in NF4, {sum(shards) / MIB:.0f} MiB of float16"
    )
    print(
        f"  first load {first['load_seconds']:.1f} s, second {second['load_seconds']:.2f} s: {share:.3f} of it "
        f"(promised {MAX_LOAD_SHARE}); results {'equal' if first['digest'] == second['digest'] else 'DIFFER'}"
    )
    print(f"  {first['bits']:.4f} bits per quantised parameter (promised {MAX_BITS}) against 16")
    for which, run in (("first", first), ("second", second)):
        print(
            f"  largest resident memory of the {which} load {run['peak'] / MIB:.0f} MiB above idle (promised: quantised and two "
            f"shards, {allowed / MIB:.0f} MiB) against {sum(shards) / MIB:.0f} MiB of the floating-point files"
        )
    return (
        share <= MAX_LOAD_SHARE
        and first["digest"] == second["digest"]
        and first["bits"] <= MAX_BITS
        and max(first["peak"], second["peak"]) <= allowed
    )


def measure_wire(_arguments: argparse.Namespace) -> bool:
    from nexus.towers.packing import bytes_per_token, pack_tokens, unpack_tokens
    from nexus.towers.targets import TokenTargets

    tokens, kept, vocabulary = 4096, 64, 151_936
    generator = np.random.default_rng(0)
    targets = TokenTargets(
        np.array([0, tokens]),
        generator.integers(0, vocabulary, tokens, dtype=np.int32),
        generator.integers(0, vocabulary, (tokens, kept), dtype=np.int32),
        -generator.exponential(size=(tokens, kept)).astype(np.float32),
        -generator.exponential(size=tokens).astype(np.float32),
    )

    def as_lists() -> None:
        sent = [
            {"ids": ids, "logprobs": values, "tail": tail}
            for ids, values, tail in zip(
                targets.ids_NK.tolist(), targets.logprobs_NK.tolist(), targets.tail_logprob_N.tolist(), strict=True
            )
        ]
        received = pickle.loads(pickle.dumps(sent, protocol=5))  # nosec B301 # our own bytes
        np.array([token["ids"] for token in received], np.int32)
        np.array([token["logprobs"] for token in received], np.float32)
        np.array([token["tail"] for token in received], np.float32)

    def as_columns() -> None:
        buffers: list[Any] = []
        sent = pickle.dumps(targets, protocol=5, buffer_callback=buffers.append)
        # Ray copies the buffers into its store once; the receiver reads them there.
        pickle.loads(sent, buffers=[bytes(buffer) for buffer in buffers])  # nosec B301 # as above

    def as_packed() -> None:
        unpack_tokens(pickle.loads(pickle.dumps(pack_tokens(targets, vocabulary_size=vocabulary), protocol=5)))  # nosec B301

    speeds = {call.__name__: tokens / _best_of(call) for call in (as_lists, as_columns, as_packed)}
    factor = speeds["as_columns"] / speeds["as_lists"]
    print(f"wire: {kept} of {vocabulary:,} ids and log-probabilities per token")
    print(
        f"  columns {speeds['as_columns']:,.0f} tokens/s against {speeds['as_lists']:,.0f} as Python lists: {factor:.0f} times "
        f"(promised {MIN_WIRE_FACTOR:.0f}); packed to bits and back {speeds['as_packed']:,.0f} tokens/s"
    )
    sizes = {size: bytes_per_token("topk", width=kept, vocabulary_size=size) for size in (32_000, 151_936, 262_144)}
    plain = sum(array.nbytes for array in (targets.ids_NK, targets.logprobs_NK, targets.tail_logprob_N)) / tokens
    words = ", ".join(f"{size:.1f} at V = {vocabulary:,}" for vocabulary, size in sizes.items())
    print(f"  bytes per token: {words} (promised {MAX_BYTES_PER_TOKEN:.0f}) against {plain:.0f} unpacked")
    return factor >= MIN_WIRE_FACTOR and max(sizes.values()) <= MAX_BYTES_PER_TOKEN


def measure_streamed(arguments: argparse.Namespace) -> bool:
    sizes = {**NARROW, "num_hidden_layers": max(1, round(arguments.parameters / NARROW_LAYER))}
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch) / "model", Path(scratch) / "cache"
        _run(WRITE, folder, "Qwen3ForCausalLM", json.dumps(sizes), NARROW_SHARD_BYTES)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        headroom = size // 4
        packing = _run(LOAD, folder, cache, 1, headroom, arguments.rows)
        streamed = _run(LOAD, folder, cache, 1, headroom, arguments.rows)
        whole = _run(LOAD, folder, cache, 0, 0, arguments.rows)
    equal = packing["digest"] == streamed["digest"] == whole["digest"]
    print(
        f"streamed: a checkpoint of {size / MIB:.0f} MiB, {whole['stored'] / MIB:.0f} MiB in NF4, {arguments.rows} rows"
    )
    print(f"  the process may hold {headroom / MIB:.0f} MiB beyond its libraries; in memory: {packing['in_memory']}")
    print(
        f"  first load and packing {packing['load_seconds']:.1f} s, later {streamed['load_seconds']:.2f} s; scoring "
        f"{streamed['score_seconds']:.2f} s against {whole['score_seconds']:.2f} s in memory "
        f"({streamed['score_seconds'] / whole['score_seconds']:.2f} times); results {'equal' if equal else 'DIFFER'}"
    )
    return equal and "GiB of memory" in packing["in_memory"]


def measure_busy(arguments: argparse.Namespace) -> bool:
    from actors.cluster import connect, prepare_environment, resolve_cluster

    target = resolve_cluster("local")
    prepare_environment(target)
    connect(target, namespace="busy", num_cpus=4, object_store_mib=128, torch_threads=1, dashboard=False)
    import ray

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        _run(WRITE, folder, "Qwen3ForCausalLM", json.dumps({**DENSE, "num_hidden_layers": 2}), SHARD_BYTES)
        found = _busy_shares(folder, Path(scratch), batches=24, rows=8)
    ray.shutdown()
    (streamed, batch_s), (one_by_one, _) = found
    print(
        f"busy: a teacher that computes {batch_s * 1000:.0f} ms for a batch (at least {MIN_BATCH_S * 1000:.0f} are meant)"
    )
    print(
        f"  busy {streamed:.1%} of the time while extraction streams to it (promised {MIN_BUSY:.0%}) against {one_by_one:.1%} when "
        "one batch is read, asked and written after the other"
    )
    return streamed >= MIN_BUSY and batch_s >= MIN_BATCH_S


def _busy_shares(folder: Path, scratch: Path, *, batches: int, rows: int) -> list[tuple[float, float]]:
    """(share, seconds of a batch) of extraction's stream, then of one batch after the other."""
    from actors.dataflow import TeacherWork, stream_answers
    from actors.pool import TeacherPool
    from nexus.data.loader import iter_records
    from nexus.data.targets import TargetWriter
    from nexus.towers.registry import TeacherSpec

    path = scratch / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"what is {n} and {n}"}) + "\n" for n in range(batches * rows)))
    found = []
    # A teacher of its own for each: an actor tells its share over all calls of one kind.
    for name in ("streamed", "one-by-one"):
        spec = TeacherSpec(id=name, path=str(folder), revision=None, role="causal_lm")
        pool, _ = TeacherPool.start([spec], torch_threads=1, window=2, timeout_s=600, max_retries=1, load_timeout_s=600)
        writer = TargetWriter(scratch / name, capability="text", fingerprint="f", rows_per_file=4 * rows)
        if name == "streamed":
            work = TeacherWork(name, "text", (str(path),), 0, None, "answer", (8, None), rows)
            for answer in stream_answers(
                [work], pool=pool, quarantine_dir=scratch / "quarantine", max_bad_share=0.0, timeout_s=600, name=name
            ):
                writer.write(answer.records, answer.result, answer.positions)
        else:
            records = list(iter_records([path], capability="text", quarantine=None))
            for start in range(0, len(records), rows):
                pool.submit(start, name, "answer", records[start : start + rows], 8, None)
                writer.write(records[start : start + rows], pool.collect(start))
        writer.finish()
        health = pool.health(name, timeout_s=60)
        share = pool.busy_share(name)
        assert share is not None, "it has answered more than twice"
        found.append((share, health.busy_seconds / health.calls))
    return found


def measure_process(_arguments: argparse.Namespace) -> bool:
    plain, lean = (_run(PROCESS, flag) for flag in (0, 1))
    print(
        f"process: {lean['private'] / MIB:.0f} MiB of private memory and {lean['seconds']:.1f} s of one core to import against "
        f"{plain['private'] / MIB:.0f} MiB and {plain['seconds']:.1f} s by a plain import"
    )
    return lean["private"] < plain["private"]


SECTIONS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "load": measure_load,
    "experts": measure_experts,
    "wire": measure_wire,
    "streamed": measure_streamed,
    "busy": measure_busy,
    "process": measure_process,
}


def _run(script: str, *arguments: object) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # One heap that gives back what is freed: the C library reserves 64 MiB of addresses for each further one.
        env={
            **os.environ,
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "131072",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
        },
    )
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def _best_of(call: Callable[[], None], repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
