"""The student on a GPU against the same student on the CPU: equal losses, states that return exactly, and the time of a step.

    python benchmarks/gpu.py [--device cuda] [--steps 12] [--json]

Runs without Ray: the quickstart's teachers answer once, in this process, and every run reads the same answers. Exit code 1 when a
check fails. Checks, each with its tolerance beside it below: losses in float32 against the CPU's, and in bfloat16 against float32;
all that a rollback returns, bit for bit; snapshots in pinned memory; the 8-bit optimizers, paged too. Then the seconds of a step of
the quickstart student and of a wider trunk, in float32 and bfloat16, each over that of the CPU measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from nexus.config import SAMPLES_DIR, load_config
from nexus.data.loader import iter_records
from nexus.data.targets import TargetWriter
from nexus.student.config import NexusStudentConfig
from nexus.student.core import NexusStudentCore
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.registry import TeacherSpec, shipped_config
from nexus.towers.targets import ScoreRequest, TeacherHead, TeacherTargets
from nexus.training.facts import TeacherFacts
from nexus.training.loop import DistillationLoop
from nexus.training.setup import build_loop, save_tokenizer
from nexus.training.snapshot import optimizer_tensors, trained_parameters

ROLES = {"reasoning": "causal_lm", "code": "causal_lm", "vision": "encoder", "audio": "encoder"}
ROWS = 24
"""Answers of each language teacher that training draws from."""
FLOAT32_TOLERANCE = 2e-3
"""Relative, of the total loss over the steps: sums run in another order, and each step starts from the difference of the last."""
BFLOAT16_TOLERANCE = 5e-2
"""Relative: 8 bits of mantissa in the matrix products; losses stay in float32."""
OVERRIDES = (
    "distill.warmup_steps=2",
    "distill.optimizer=adamw",
    "distill.learning_rate=0.001",
    "distill.labelled_batch_size=2",
    "distill.window=1",
    "distill.anchor_start=1.0",
    "distill.anchor_end=0.3",
    *(f"data.{capability}.batch_size=8" for capability in ROLES),
)


class Answers:
    """Targets of teachers in this process, asked once for all runs."""

    def __init__(self, engines: dict[str, TeacherEngine]) -> None:
        self._engines = engines
        self._kept: dict[tuple[str, tuple[str, ...]], TeacherTargets] = {}
        self._asked: dict[Hashable, tuple[str, ScoreRequest]] = {}

    def submit(self, key: Hashable, teacher: str, request: ScoreRequest) -> None:
        self._asked[key] = (teacher, request)

    def collect(self, key: Hashable) -> TeacherTargets:
        teacher, request = self._asked.pop(key)
        place = (teacher, request.row_ids)
        if place not in self._kept:
            self._kept[place] = self._engines[teacher].score(request)
        return self._kept[place]

    def head(self, teacher: str) -> TeacherHead:
        return self._engines[teacher].output_head()

    def forget(self) -> None:
        self._asked.clear()


class Bench:
    """Loops over one run directory that differ in device and settings."""

    def __init__(self, work: Path, steps: int) -> None:
        self._work, self._steps = work, steps
        save_tokenizer(SAMPLES_DIR / "teachers" / "sample-reasoning", work)
        engines = {}
        for capability, role in ROLES.items():
            teacher = f"sample-{capability}"
            spec = TeacherSpec(teacher, str(SAMPLES_DIR / "teachers" / teacher), None, role)  # type: ignore[arg-type]
            engines[teacher] = TeacherEngine(load_tower(spec, device="cpu"), teacher_id=teacher)
        for capability in ("reasoning", "code"):
            engine = engines[f"sample-{capability}"]
            pool = iter_records([SAMPLES_DIR / capability / "pool.parquet"], capability=capability, quarantine=None)
            rows = [next(pool) for _ in range(ROWS)]
            writer = TargetWriter(
                work / "targets" / engine.teacher_id, capability=capability, fingerprint=engine.fingerprint, rows_per_file=ROWS
            )  # fmt: skip
            writer.write(rows, engine.answer(rows, max_new_tokens=16))
            writer.finish()
        own = engines["sample-reasoning"].tokenizer_hash
        self._facts = [
            TeacherFacts(
                id=teacher, role=engine.role, importance=1.0, shares_tokenizer=engine.tokenizer_hash == own,
                vocabulary_size=engine.vocabulary_size, num_layers=engine.num_layers, hidden_size=engine.hidden_size,
                label_texts=engine.label_texts, fingerprint=engine.fingerprint,
                critical_layers=((engine.num_layers - 1, 1.0),),
            )
            for teacher, engine in engines.items()
        ]  # fmt: skip
        self._source = Answers(engines)

    def loop(self, device: str, *overrides: str) -> DistillationLoop:
        config = load_config(
            shipped_config("quickstart.yaml"), [f"distill.steps={self._steps}", *OVERRIDES, *overrides]
        )
        return build_loop(
            config, run_dir=self._work, teachers=self._facts, source=self._source, taught=True, device=device
        )

    def losses(self, device: str, *overrides: str) -> list[float]:
        loop = self.loop(device, *overrides)
        loop.recovery.snapshot(0)
        return [loop.advance().total for _ in range(self._steps)]

    def step_seconds(self, device: str, *overrides: str) -> float:
        """Median over the second half of the steps."""
        loop = self.loop(device, *overrides)
        loop.recovery.snapshot(0)
        seconds = []
        for _ in range(self._steps):
            start = time.perf_counter()
            loop.advance()
            _wait(device)
            seconds.append(time.perf_counter() - start)
        return sorted(seconds[self._steps // 2 :])[self._steps // 4]


def main() -> int:
    """Run and print; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script without one")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024, help="of the wider trunk")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu: expected a GPU that CUDA can open, found none; --device cpu tries the script without one",
            file=sys.stderr,
        )
        return 2
    device = arguments.device
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), arguments.steps)
        reference = bench.losses("cpu")
        own = bench.losses(device)
        checks = {
            "float32_difference": (_difference(own, reference), FLOAT32_TOLERANCE),
            "bfloat16_difference": (
                _difference(bench.losses(device, "distill.precision=bfloat16"), own), BFLOAT16_TOLERANCE
            ),
            "adamw8bit_difference": (
                _difference(bench.losses(device, "distill.optimizer=adamw8bit"), own), BFLOAT16_TOLERANCE
            ),
            "tensors_a_rollback_left_changed": (_changed_by_rollback(bench.loop(device)), 0.0),
        }  # fmt: skip
        if device == "cuda":
            paged = bench.losses(device, "distill.optimizer=paged_adamw8bit")
            checks["paged_adamw8bit_difference"] = (_difference(paged, own), BFLOAT16_TOLERANCE)
        plain = bench.step_seconds("cpu")
        times = {
            "quickstart_step_s_cpu": plain,
            "quickstart_step_s": bench.step_seconds(device),
            "quickstart_step_s_bfloat16": bench.step_seconds(device, "distill.precision=bfloat16"),
        }
    for name, precision in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        times[f"wide_step_s_{name}"] = _wide_step(device, precision, arguments.width, arguments.layers)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "checks": {name: {"found": found, "at_most": limit} for name, (found, limit) in checks.items()},
        "seconds": times,
        "speedup_over_cpu": plain / times["quickstart_step_s"],
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }
    failed = [name for name, (found, limit) in checks.items() if not found <= limit]
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=1))
    if failed:
        print(f"gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _difference(own: Sequence[float], reference: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(own, reference, strict=True))


def _changed_by_rollback(loop: DistillationLoop) -> float:
    """Tensors of the state that differ from what they were at the snapshot, after further steps and the return."""
    for _ in range(3):
        loop.recovery.snapshot(loop.step)
        loop.advance()
    loop.recovery.snapshot(loop.step)
    before = [tensor.detach().clone() for tensor in _state(loop)]
    loop.advance()
    loop.step = loop.recovery.rollback()
    # It may have chosen an older snapshot: forward again to the same step.
    while loop.step < 3:
        loop.advance()
    return float(sum(not torch.equal(a, b) for a, b in zip(_state(loop), before, strict=True)))


def _state(loop: DistillationLoop) -> list[Any]:
    return [*trained_parameters(loop.objective, loop.optimizer), *optimizer_tensors(loop.optimizer)]


def _wide_step(device: str, precision: torch.dtype, width: int, layers: int) -> float:
    """Seconds of forward and backward of a trunk on 8 rows of 256 tokens, the best of five."""
    config = NexusStudentConfig(
        vocab_size=32_000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 256), port_every=max(1, layers // 2),
        tie_word_embeddings=True,
    )  # fmt: skip
    core = NexusStudentCore(config).to(device)
    ids_BT = torch.randint(0, config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0)).to(device)
    seconds = []
    for _ in range(6 if device == "cuda" else 1):
        core.zero_grad(set_to_none=True)
        start = time.perf_counter()
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            loss = core(ids_BT, labels=ids_BT).loss
        loss.backward()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:] or seconds)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
