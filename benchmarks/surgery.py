"""Does gradient surgery pay? Plain importance weights, PCGrad and UPGrad at equal time, on real teachers that disagree.

    python benchmarks/surgery.py [--budget 60] [--seeds 0 1 2] [--threads 1] [--json FILE]

Four character-level language models (Qwen3, 3 layers of 96) are trained on four kinds of text that this Python installation holds:
source code, prose of its documentation strings, JSON, and tables of numbers. One student, smaller than any of them (2 layers of 48),
learns all four by forward KL on each teacher's own kind of text, through `GradientSurgeryLoss`. Every method gets the same start,
the same order of batches and the same budget of CPU seconds of this process (wall time of a machine that does nothing else), so a
method that takes longer steps makes fewer. `upgrad/10` finds a plan every tenth step and weighs the losses by it between, as a run
with `distill.surgery.every: 10` does.

Prints for each method the steps made, the cost of a step against the plain one, the share of solved steps with a conflict, and the
mean and the worst teacher's divergence on held-out text, as the median over seeds; last, the conflict matrix of the first seed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from nexus.training.divergence import forward_kl
from nexus.training.loss import GradientSurgeryLoss
from nexus.training.teacher_gradients import SurgeryOutcome, SurgerySteps, TeacherGradients

KINDS = ("code", "prose", "json", "tables")
LENGTH, BATCH = 64, 8
TEACHER_STEPS = 250
HELD_OUT_ROWS = 64
METHODS: dict[str, tuple[Literal["none", "upgrad", "pcgrad"], int]] = {
    "plain": ("none", 1),
    "pcgrad": ("pcgrad", 1),
    "upgrad": ("upgrad", 1),
    "upgrad/10": ("upgrad", 10),
}


@dataclass(frozen=True)
class Result:
    """One method on one seed."""

    steps: int
    seconds_per_step: float
    conflict_share: float
    held_out: dict[str, float]
    cosines: dict[str, dict[str, float]] | None


def main() -> int:
    """Train the teachers, then a student by every method and seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=60.0, help="CPU seconds of each method and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts = {kind: _text(kind) for kind in KINDS}
    teachers = {kind: _teacher(text) for kind, text in texts.items()}
    print(
        f"{len(KINDS)} teachers, {arguments.budget:g} CPU s per method and seed, {len(arguments.seeds)} seeds",
        flush=True,
    )
    results = {
        name: [_student(texts, teachers, method, every, seed, arguments.budget) for seed in arguments.seeds]
        for name, (method, every) in METHODS.items()
    }
    plain = statistics.median(result.seconds_per_step for result in results["plain"])
    table = {}
    for name, runs in results.items():
        row = table[name] = {
            "steps": statistics.median(run.steps for run in runs),
            "step_over_plain": statistics.median(run.seconds_per_step for run in runs) / plain,
            "conflict_share": statistics.median(run.conflict_share for run in runs),
            "mean_kl": statistics.median(statistics.mean(run.held_out.values()) for run in runs),
            "worst_kl": statistics.median(max(run.held_out.values()) for run in runs),
        }
        print(f"  {name:<10} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print("cosines between the teachers' gradients, last solved step of the first seed (upgrad)")
    cosines = results["upgrad"][0].cosines or {}
    for teacher, row in cosines.items():
        print(f"  {teacher:<8}" + "".join(f"{value:8.3f}" for value in row.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"table": table, "cosines": cosines}, indent=2))
    return 0


def _text(kind: str) -> bytes:
    generator = random.Random(kind)
    library = sorted(Path(inspect.__file__).parent.glob("*.py"))[:40]
    if kind == "code":
        return b"".join(path.read_bytes() for path in library)[:400_000]
    if kind == "prose":
        names = (
            "argparse",
            "asyncio",
            "concurrent.futures",
            "datetime",
            "decimal",
            "email",
            "fractions",
            "logging",
            "random",
        )
        modules = [__import__(name, fromlist=["_"]) for name in names]
        parts = [
            inspect.getdoc(value) or "" for module in modules for value in vars(module).values() if callable(value)
        ]
        return "\n".join(sorted(set(parts))).encode()[:400_000]
    if kind == "json":
        rows = [
            {"id": n, "name": generator.choice("abcdefgh") * 3, "tags": generator.choices(["red", "blue", "old"], k=2)}
            for n in range(6000)
        ]
        return json.dumps(rows).encode()[:400_000]
    return "\n".join("\t".join(f"{generator.gauss(0, 30):8.2f}" for _ in range(6)) for _ in range(7000)).encode()[
        :400_000
    ]


def _model(width: int, layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, tie_word_embeddings=True,
        )
    )  # fmt: skip


def _rows(text: bytes, count: int, generator: torch.Generator, *, held_out: bool) -> Tensor:
    """Rows of LENGTH + 1 bytes, from the last tenth of the text when held out, else from before it."""
    cut = int(0.9 * len(text))
    low, high = (cut, len(text) - LENGTH - 1) if held_out else (0, cut - LENGTH - 1)
    starts = torch.randint(low, high, (count,), generator=generator).tolist()
    return torch.tensor([list(text[start : start + LENGTH + 1]) for start in starts])


def _teacher(text: bytes) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model, generator = _model(96, 3), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(TEACHER_STEPS):
        rows = _rows(text, 2 * BATCH, generator, held_out=False)
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def _student(
    texts: dict[str, bytes],
    teachers: dict[str, Qwen3ForCausalLM],
    method: Literal["none", "upgrad", "pcgrad"],
    every: int,
    seed: int,
    budget_s: float,
) -> Result:
    torch.manual_seed(seed)
    student, generator = _model(48, 2), torch.Generator().manual_seed(seed)
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    combine_losses = GradientSurgeryLoss(dict.fromkeys(KINDS, 1.0), ramp_steps=0, penalty=0.0)
    surgery = None if method == "none" else SurgerySteps(method, every=every, seed=seed)
    outcome: SurgeryOutcome | None = None
    step = solved = conflicts = 0
    start = time.process_time()
    while time.process_time() - start < budget_s:
        losses = {
            kind: _divergence(student, teachers[kind], _rows(texts[kind], BATCH, generator, held_out=False))
            for kind in KINDS
        }
        result = combine_losses(losses)
        optimizer.zero_grad()
        if surgery is None:
            result.loss.backward()
        elif surgery.due(tuple(result.coefficients)):
            gradients = TeacherGradients(parameters, [])
            for kind, loss in losses.items():
                gradients.add(kind, loss)
            outcome = gradients.write(result, combine_losses.baselines, surgery)
            assert outcome is not None
            solved += 1
            conflicts += outcome.plan.conflicts > 0
        else:
            weighted = surgery.weighted(losses, result, combine_losses.baselines)
            (result.loss if weighted is None else weighted).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
    seconds = (time.process_time() - start) / step
    fixed = torch.Generator().manual_seed(12345)
    with torch.no_grad():
        held_out = {
            kind: _divergence(student, teachers[kind], _rows(texts[kind], HELD_OUT_ROWS, fixed, held_out=True)).item()
            for kind in KINDS
        }
    return Result(step, seconds, conflicts / max(1, solved), held_out, None if outcome is None else outcome.cosines)


def _divergence(student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, rows: Tensor) -> Tensor:
    inputs = rows[:, :-1]
    with torch.no_grad():
        targets = teacher(inputs).logits
    mask = torch.ones_like(inputs)
    return forward_kl(student(inputs).logits, targets, mask, num_loss_tokens=mask.numel(), temperature=1.0)


if __name__ == "__main__":
    sys.exit(main())
