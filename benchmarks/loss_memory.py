"""Peak memory and time of the hidden-state divergence, beside the dense form and two tiled autograd forms, in one run.

    python benchmarks/loss_memory.py [--tokens 1024] [--width 512] [--vocabulary 151936] [--threads 2] [--repeats 3] [--json FILE]

Each measurement is a process of its own: forward and backward once to warm up, then `--repeats` times. The time is the best of
them, with the CPU seconds of all threads beside it (on a shared machine their ratio is the steadier one). The memory is the growth
of the process's resident peak (VmHWM, Linux) from just before the first pass, inputs and heads loaded. The gradient of the
student's head (V x width) is part of it, as it is of every form. Forms:

    nexus       nexus.training.hidden_divergence
    dense       logits of both models, nexus.training.divergence, autograd
    rows        the same over blocks of rows under torch.utils.checkpoint: plain PyTorch's usual way out
    tiles       vocabulary tiles with an online log-sum-exp in autograd, each tile under checkpoint: the hand-written counterpart of
                the tiles of TRL's trainers (TRL itself is no dependency and is not run here)

Prints one line per divergence and form with its ratios against `tiles` and `dense`, and ends with exit code 1 when nexus takes
more than 0.6 GiB at the default size or disagrees with the reference by more than float32 rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nexus.training.divergence import distill_divergence, forward_kl, generalized_jsd
from nexus.training.hidden_divergence import DISTILL_MIX, FORWARD_KL, OutputHead, hidden_divergence, jsd_terms

FORMS = ("nexus", "tiles", "rows", "dense")
DIVERGENCES = ("forward_kl", "jsd_0.5", "distill_mix")
MAX_GIB = 0.6
AGREEMENT = 2e-4
ROWS, TILE = 64, 8192
"""Blocks of `rows` and tiles of `tiles`: within 10 % of their best time here at no more than about 1 GiB."""


def main() -> int:
    """Measure every form in a process of its own; 1 when the memory or the agreement misses its bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--divergences", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("FORM", "DIVERGENCE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measure(arguments, *arguments.one)))
        return 0
    size = f"{arguments.tokens} tokens, width {arguments.width}, vocabulary {arguments.vocabulary}"
    print(f"{size}, float32, {arguments.threads} threads; forward + backward")
    results: dict[str, dict[str, dict[str, float]]] = {}
    failed = False
    for divergence in arguments.divergences:
        rows = results[divergence] = {form: _run(arguments, form, divergence) for form in arguments.forms}
        for form, row in rows.items():
            ratios = [
                _ratios(row, rows[other], other) for other in ("tiles", "dense") if other in rows and other != form
            ]
            figures = f"{row['gib']:6.2f} GiB {row['seconds']:7.2f} s {row['cpu_seconds']:7.2f} CPU s"
            print(f"  {divergence:<12} {form:<6} {figures}  {'; '.join(ratios)}", flush=True)
        failed |= not _agree(rows)
        failed |= "nexus" in rows and rows["nexus"]["gib"] > MAX_GIB
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    return int(failed)


def _ratios(row: dict[str, float], other: dict[str, float], name: str) -> str:
    seconds, cpu, gib = (row[key] / other[key] for key in ("seconds", "cpu_seconds", "gib"))
    return f"{seconds:.2f}x the time, {cpu:.2f}x the CPU time, {gib:.2f}x the memory of {name}"


def _run(arguments: argparse.Namespace, form: str, divergence: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", form, divergence]
    for name in ("tokens", "width", "vocabulary", "threads", "repeats"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def _agree(rows: dict[str, dict[str, float]]) -> bool:
    reference = next(iter(rows.values()))
    return all(
        math.isclose(row[key], reference[key], rel_tol=AGREEMENT)
        for row in rows.values()
        for key in ("loss", "state_gradient", "head_gradient")
    )


def _measure(arguments: argparse.Namespace, form: str, divergence: str) -> dict[str, float]:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokens, width, vocabulary = arguments.tokens, arguments.width, arguments.vocabulary
    student = torch.randn(1, tokens, width, requires_grad=True)
    head = (torch.randn(vocabulary, width) * (2.0 / math.sqrt(width))).requires_grad_()
    teacher = torch.randn(1, tokens, width)
    teacher_head = torch.randn(vocabulary, width) * (2.0 / math.sqrt(width))
    seconds, cpu_seconds = [], []
    # Making the inputs had a peak of its own; 5 sets the kernel's peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_gib()
    for _ in range(arguments.repeats + 1):
        student.grad = head.grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = _loss(form, divergence, student, head, teacher, teacher_head)
        loss.backward()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    peak = _peak_gib()
    assert student.grad is not None
    assert head.grad is not None
    return {
        "gib": peak - before,
        "seconds": min(seconds[1:]),
        "cpu_seconds": min(cpu_seconds[1:]),
        "loss": loss.item(),
        "state_gradient": student.grad.norm().item(),
        "head_gradient": head.grad.norm().item(),
    }


def _peak_gib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / (1 << 20)


def _loss(form: str, divergence: str, student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    tokens = student.shape[1]
    if form == "nexus":
        terms = {"forward_kl": FORWARD_KL, "jsd_0.5": jsd_terms(0.5), "distill_mix": DISTILL_MIX}[divergence]
        return hidden_divergence(
            student,
            OutputHead(head),
            teacher,
            OutputHead(teacher_head),
            torch.ones(1, tokens),
            terms=terms,
            num_loss_tokens=tokens,
            temperature=1.0,
        )
    if form == "dense":
        return _dense(divergence, student, head, teacher, teacher_head, tokens)
    if form == "rows":
        parts = [
            checkpoint(_dense, divergence, states, head, targets, teacher_head, tokens, use_reentrant=False)
            for states, targets in zip(student.split(ROWS, dim=1), teacher.split(ROWS, dim=1), strict=True)
        ]
        return torch.stack(parts).sum()
    return _tiles(divergence, student[0], head, teacher[0], teacher_head)


def _dense(
    divergence: str, student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, tokens: int
) -> Tensor:
    with torch.no_grad():
        targets = teacher @ teacher_head.T
    logits, mask = student @ head.T, torch.ones(student.shape[:-1])
    if divergence == "jsd_0.5":
        return generalized_jsd(logits, targets, mask, beta=0.5, num_loss_tokens=tokens, temperature=1.0)
    function = forward_kl if divergence == "forward_kl" else distill_divergence
    return function(logits, targets, mask, num_loss_tokens=tokens, temperature=1.0)


def _tiles(divergence: str, student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    norms, targets = [], []
    with torch.no_grad():
        for weight in teacher_head.split(TILE):
            targets.append((teacher @ weight.T).logsumexp(-1))
    target_norm = torch.stack(targets).logsumexp(0)

    def norm(states: Tensor, weight: Tensor) -> Tensor:
        return (states @ weight.T).logsumexp(-1)

    def part(states: Tensor, weight: Tensor, norm_N: Tensor, teacher_weight: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = teacher @ teacher_weight.T - target_norm[:, None]
        log_q = states @ weight.T - norm_N[:, None]
        p, q = log_p.exp(), log_q.exp()
        if divergence == "forward_kl":
            return (p * (log_p - log_q)).sum()
        if divergence == "jsd_0.5":
            log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
            return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum()
        near_q = torch.logaddexp(log_p + math.log(0.1), log_q + math.log(0.9))
        near_p = torch.logaddexp(log_p + math.log(0.9), log_q + math.log(0.1))
        return 0.5 * (p * (log_p - near_q) + q * (log_q - near_p)).sum()

    for weight in head.split(TILE):
        norms.append(checkpoint(norm, student, weight, use_reentrant=False))
    norm_N = torch.stack(norms).logsumexp(0)
    parts = [
        checkpoint(part, student, weight, norm_N, teacher_weight, use_reentrant=False)
        for weight, teacher_weight in zip(head.split(TILE), teacher_head.split(TILE), strict=True)
    ]
    return torch.stack(parts).sum() / student.shape[0]


if __name__ == "__main__":
    sys.exit(main())
