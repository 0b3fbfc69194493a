"""Distillation speed, every ratio against its baseline in the same run: a plain loop, TRL's GKD trainer, live and cached teachers.

    python benchmarks/distill.py [--json FILE] [--steps 40] [--rounds 5] [--trl-python PYTHON] [--only NAME ...] [--work DIR]
                                 [--peers-keep-memory]

The task: a Qwen3 teacher (4 layers of 128) trained on the sources of this Python's standard library in 4,096 tokens, and a student
of 2 layers of 64. Every contender gets the same saved teacher in float32, the same initial student (`NexusStudentCore`), the same
rows in the same order (8 of 128 tokens a step), forward KL at temperature 1, AdamW with the same constants, clipping and schedule. A
contender is a process of its own with two cores in all: two threads, or one for the student and one of each teacher. Those of nexus
run as its actors do, with the memory settings of `actors.cluster` (freed memory is kept for the next step), the others as torch and
TRL come, or with the same settings under --peers-keep-memory. Rounds run every contender once, each round in the opposite order of
the one before. Five warm-up steps are dropped, nothing is logged or evaluated in between; seconds are the median over all steps of
all rounds, with the least beside it and, where all work is in one process, the CPU seconds of its threads (where others use the
machine too, their ratio is the steadier one).

TRL is no dependency: it runs in the interpreter given by --trl-python (trl 1.16.0, which has to import torch and transformers too;
this folder's parent is put on its path). A ratio that could not be measured is left out, with the reason printed. Ratios printed:

    heldout_kl_difference          nexus in process against the plain loop, nats per token on rows that nobody trained on
    speedup_over_plain_loop        nexus in process (DistillationLoop, the teacher in a thread beside it, one-pass divergence)
    speedup_over_trl_gkd           the same over trl.experimental.gkd.GKDTrainer (lmbda 0, beta 0)
    live_ray_speedup_over_trl_gkd  the teacher as a Ray actor on the same two cores
    cached_epoch_speedup           an epoch from cached top-k targets over a live epoch of the same
    overlap_efficiency             max(teacher, student) / step, the least over teachers of 0.5, 1, 2, 4 times the student's step
    serial_loop_speedup_4_teachers four teachers, two of them slow, over a hand-written serial loop
    loss_peak_extra_gib            of the hidden-state divergence, 1,024 tokens of 512 over 151,936 ids, forward and backward
    loss_time_over_trl             its time over that of TRL's vocabulary tiles
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, LENGTH, BATCH = 4096, 128, 8
WARM_UP = 5
TEACHER_STEPS = 120
"""Enough for a teacher that prefers some tokens; what it knows is not measured here."""
HELD_OUT_ROWS = 64
LEARNING_RATE, FINAL_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.02, 0.01, 1.0
SLOW = (0.5, 1.0, 2.0, 4.0)
"""Times of a slowed teacher, in steps of the student."""
TEACHER = "stdlib"
PEERS = ("plain", "trl", "trl_loss", "serial4")
"""Contenders that have nothing of nexus but the student."""


def main() -> int:
    """Run every benchmark that was asked for; 0 when all of it ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS, help="of training the teacher")
    parser.add_argument("--trl-python", type=Path)
    parser.add_argument("--peers-keep-memory", action="store_true", help="give them the memory settings of nexus too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="keeps the trained teacher between runs")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--factor", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with _quiet_stdout() as out:
            print(json.dumps(CONTENDERS[arguments.one](arguments)), file=out, flush=True)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        arguments.work = (arguments.work or Path(scratch)).resolve()
        if not (arguments.work / "task.pt").is_file():
            _prepare(arguments.work, arguments.teacher_steps)
        ratios: dict[str, float] = {}
        for name in arguments.only:
            found = PARTS[name](arguments)
            ratios |= found
            for key, value in found.items():
                print(f"  {key:<32} {value:.4f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(ratios, indent=2) + "\n")
    return 0


# --- the parts ----------------------------------------------------------------------------------------------------------------


def _in_process(arguments: argparse.Namespace) -> dict[str, float]:
    names = ["plain", "nexus", "ray"]
    if arguments.trl_python is None:
        print("not measured: speedup_over_trl_gkd, live_ray_speedup_over_trl_gkd (no --trl-python)")
    else:
        names.append("trl")
    runs = _rounds(arguments, names)
    seconds = {name: statistics.median(_steps(runs[name])) for name in names}
    best = {name: min(_steps(runs[name])) for name in names}
    cpu = {name: statistics.median(_steps(runs[name], "cpu_seconds")) for name in names if name != "ray"}
    tokens = BATCH * LENGTH
    for name in names:
        kl = runs[name][0]["held_out_kl"]
        print(
            f"  {name:<6} {1e3 * seconds[name]:7.1f} ms a step ({1e3 * best[name]:.1f} at best), "
            f"{tokens / seconds[name]:8,.0f} tokens/s ({tokens / best[name]:,.0f}), held-out KL {kl:.4f} nats"
        )
    kls = {name: runs[name][0]["held_out_kl"] for name in names}
    found = {
        "heldout_kl_difference": abs(kls["nexus"] - kls["plain"]),
        "speedup_over_plain_loop": seconds["plain"] / seconds["nexus"],
        "speedup_over_plain_loop_best": best["plain"] / best["nexus"],
        "speedup_over_plain_loop_cpu": cpu["plain"] / cpu["nexus"],
    }
    if "trl" in names:
        found |= {
            "heldout_kl_difference_trl": abs(kls["trl"] - kls["plain"]),
            "speedup_over_trl_gkd": seconds["trl"] / seconds["nexus"],
            "speedup_over_trl_gkd_best": best["trl"] / best["nexus"],
            "speedup_over_trl_gkd_cpu": cpu["trl"] / cpu["nexus"],
            "live_ray_speedup_over_trl_gkd": seconds["trl"] / seconds["ray"],
            "live_ray_speedup_over_trl_gkd_best": best["trl"] / best["ray"],
        }
    return found


def _cached_epoch(arguments: argparse.Namespace) -> dict[str, float]:
    runs = _rounds(arguments, ["live", "cached"])
    live, cached = (statistics.median(_steps(runs[name])) for name in ("live", "cached"))
    cpu_live, cpu_cached = (statistics.median(_steps(runs[name], "cpu_seconds")) for name in ("live", "cached"))
    print(
        f"  live {1e3 * live:.1f} ms, cached {1e3 * cached:.1f} ms a step; CPU {1e3 * cpu_live:.1f} and {1e3 * cpu_cached:.1f}"
    )
    return {"cached_epoch_speedup": live / cached, "cached_epoch_speedup_cpu": cpu_live / cpu_cached}


def _overlap(arguments: argparse.Namespace) -> dict[str, float]:
    found = {}
    for factor in SLOW:
        run = _contender(arguments, "overlap", factor=factor)
        teacher, student, step = run["teacher_seconds"], run["student_seconds"], run["step_seconds"]
        found[f"overlap_efficiency_{factor:g}"] = max(teacher, student) / step
        print(f"  teacher {1e3 * teacher:.0f} ms, student {1e3 * student:.0f} ms, step {1e3 * step:.0f} ms")
    found["overlap_efficiency"] = min(found.values())
    return found


def _four_teachers(arguments: argparse.Namespace) -> dict[str, float]:
    runs = _rounds(arguments, ["serial4", "ray4"])
    serial, overlapped = (statistics.median(_steps(runs[name])) for name in ("serial4", "ray4"))
    print(f"  serial {1e3 * serial:.0f} ms, nexus {1e3 * overlapped:.0f} ms a step")
    return {"serial_loop_speedup_4_teachers": serial / overlapped}


def _loss(arguments: argparse.Namespace) -> dict[str, float]:
    path = arguments.work / "loss.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "loss_memory.py"), "--forms", "nexus"]
    command += ["--divergences", "forward_kl", "--repeats", "2", "--json", str(path)]
    seconds: dict[str, list[float]] = {"nexus": [], "trl": []}
    values: dict[str, float] = {}
    peaks, trl_peaks = [], []
    rounds = 1 if arguments.trl_python is None else min(3, arguments.rounds)
    for number in range(rounds):
        for name in ("nexus", "trl") if number % 2 == 0 else ("trl", "nexus"):
            if name == "nexus":
                subprocess.run(command, check=False, env=_environment(2), stdout=subprocess.DEVNULL)
                measured = json.loads(path.read_text())["forward_kl"]["nexus"]
                peaks.append(measured["gib"])
            elif arguments.trl_python is not None:
                measured = _contender(arguments, "trl_loss")
                trl_peaks.append(measured["gib"])
            else:
                continue
            seconds[name].append(measured["seconds"])
            values[name] = measured["loss"]
    found = {"loss_peak_extra_gib": max(peaks)}
    if arguments.trl_python is None:
        print("not measured: loss_time_over_trl (no --trl-python)")
        return found
    print(
        f"  nexus {min(seconds['nexus']):.1f} s, TRL's tiles {min(seconds['trl']):.1f} s and {max(trl_peaks):.2f} GiB, forward and "
        f"backward; losses {values['nexus']:.5f} and {values['trl']:.5f}"
    )
    if abs(values["nexus"] - values["trl"]) > 1e-3 * values["trl"]:
        raise SystemExit("the two losses differ: it is not the same computation")
    return found | {"loss_time_over_trl": min(seconds["nexus"]) / min(seconds["trl"])}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "speed": _in_process,
    "cached": _cached_epoch,
    "overlap": _overlap,
    "four": _four_teachers,
    "loss": _loss,
}


# --- processes ----------------------------------------------------------------------------------------------------------------


def _rounds(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            runs[name].append(_contender(arguments, name))
    return runs


def _steps(runs: Sequence[Mapping[str, Any]], name: str = "seconds") -> list[float]:
    return [seconds for run in runs for seconds in run[name]]


def _contender(arguments: argparse.Namespace, name: str, *, factor: float = 0.0) -> dict[str, Any]:
    is_trl = name.startswith("trl")
    python = str(arguments.trl_python) if is_trl else sys.executable
    command = [python, __file__, "--one", name, "--work", str(arguments.work), "--steps", str(arguments.steps)]
    threads = 1 if name in ("nexus", "ray", "ray4", "overlap") else 2
    environment = _environment(threads, is_peer=name in PEERS and not arguments.peers_keep_memory)
    done = subprocess.run(
        [*command, "--factor", str(factor)], stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{name} ended with exit code {done.returncode}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _environment(threads: int, *, is_peer: bool = False) -> dict[str, str]:
    from actors.cluster import MALLOC_ENVIRONMENT

    own = {name: value for name, value in os.environ.items() if name not in MALLOC_ENVIRONMENT}
    return {
        **own,
        **({} if is_peer else MALLOC_ENVIRONMENT),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }


@contextmanager
def _quiet_stdout() -> Iterator[Any]:
    """The result goes to the real output; what libraries print goes to the error output."""
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        yield out
    finally:
        sys.stdout = out


# --- the task -----------------------------------------------------------------------------------------------------------------


def _prepare(work: Path, teacher_steps: int) -> None:
    """Tokenizer, rows, teacher and initial student."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    print("training the teacher", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    text = "\n".join(path.read_text("utf-8") for path in sorted(Path(inspect.__file__).parent.glob("*.py"))[:120])
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    ids = tokenizer(text)["input_ids"]
    windows = [ids[start : start + LENGTH - 1] for start in range(0, len(ids) - LENGTH, LENGTH - 1)]
    random.Random(0).shuffle(windows)
    texts = [tokenizer.decode(window) for window in windows]
    # A row's text has to give its tokens back, so that contenders who read text and who read tokens see the same.
    rows = [row for row, again in zip(texts, tokenizer(texts)["input_ids"], strict=True) if len(again) == LENGTH - 1]
    tokens = torch.tensor(tokenizer(rows)["input_ids"])
    tokens = torch.cat([tokens, torch.full((len(tokens), 1), tokenizer.eos_token_id)], dim=1)
    torch.manual_seed(0)
    teacher = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    train = tokens[HELD_OUT_ROWS:]
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for step in range(teacher_steps):
        batch = train[torch.randint(len(train), (BATCH,), generator=torch.Generator().manual_seed(step))]
        loss = teacher(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"  {len(rows)} rows, the teacher's last loss {loss.item():.2f} nats", flush=True)
    teacher.save_pretrained(work / "teacher")
    tokenizer.save_pretrained(work / "teacher")
    torch.manual_seed(1)
    student = _student().core.state_dict()
    torch.save({"rows": rows, "tokens": tokens, "student": student}, work / "task.pt")


def _student() -> Any:
    from nexus.student.config import NexusStudentConfig
    from nexus.student.memory import NexusStudent
    from nexus.student.presets import StudentSpec
    from nexus.student.router import SparseIntentRouterConfig

    core = NexusStudentConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, port_every=1, max_position_embeddings=512, tie_word_embeddings=True, use_cache=False,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    router = SparseIntentRouterConfig(embedding_size=64, hidden_size=8)
    return NexusStudent(StudentSpec(core, None, None, None, router))


def _load_student(task: Mapping[str, Any]) -> Any:
    student = _student()
    student.core.load_state_dict(task["student"])
    return student


def _task(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task: dict[str, Any] = torch.load(arguments.work / "task.pt")
    return task


def _teacher(arguments: argparse.Namespace) -> Any:
    from transformers import Qwen3ForCausalLM

    return (
        Qwen3ForCausalLM.from_pretrained(arguments.work / "teacher", dtype=torch.float32).eval().requires_grad_(False)
    )


def _total(arguments: argparse.Namespace) -> int:
    return WARM_UP + int(arguments.steps)


def _batches(arguments: argparse.Namespace, tokens: Tensor) -> list[Tensor]:
    train = tokens[HELD_OUT_ROWS:]
    return [train[torch.arange(BATCH * step, BATCH * (step + 1)) % len(train)] for step in range(_total(arguments))]


def _optimizer(core: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    from nexus.training.loop import ADAM_BETAS
    from nexus.training.scheduler import LearningRateSchedule

    parameters = list(core.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=ADAM_BETAS, foreach=True)
    return optimizer, LearningRateSchedule(
        optimizer, warmup_steps=WARM_UP, total_steps=steps, final_fraction=FINAL_RATE
    )


@torch.no_grad()
def _held_out(core: nn.Module, teacher: nn.Module, tokens: Tensor) -> float:
    total = 0.0
    core.eval()
    for rows in tokens[:HELD_OUT_ROWS].split(BATCH):
        log_q, log_p = (model(input_ids=rows).logits[:, :-1].double().log_softmax(-1) for model in (core, teacher))
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / (HELD_OUT_ROWS * (LENGTH - 1))


@dataclass
class _Clock:
    """Ends of steps: wall seconds, and CPU seconds of this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def steps(self) -> dict[str, list[float]]:
        """Without those of the warm-up."""
        wall, cpu = ([after - before for before, after in pairwise(times)] for times in (self.wall, self.cpu))
        return {"seconds": wall[WARM_UP:], "cpu_seconds": cpu[WARM_UP:]}


def _result(clock: _Clock, core: nn.Module, teacher: nn.Module, tokens: Tensor) -> dict[str, Any]:
    return {**clock.steps(), "held_out_kl": _held_out(core, teacher, tokens)}


# --- contenders ---------------------------------------------------------------------------------------------------------------


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dense logits of both models, torch's kl_div, autograd."""
    task, teacher = _task(arguments), _teacher(arguments)
    core = _load_student(task).core.train()
    optimizer, scheduler = _optimizer(core, _total(arguments))
    clock = _Clock()
    clock.tick()
    for rows in _batches(arguments, task["tokens"]):
        mask = torch.ones_like(rows)
        with torch.no_grad():
            target = teacher(input_ids=rows, attention_mask=mask).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        logits = core(input_ids=rows, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(core.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        clock.tick()
    return _result(clock, core, teacher, task["tokens"])


def _trl(arguments: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class InOrder(GKDTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    clock = _Clock()

    class Ticks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    task, teacher = _task(arguments), _teacher(arguments)
    core = _load_student(task).core.train()
    optimizer, schedule = _optimizer(core, _total(arguments))
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.fraction)
    rows = torch.cat(_batches(arguments, task["tokens"]))

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([example["input_ids"] for example in examples])
        labels = ids.clone()
        mask = torch.ones_like(ids)
        prompt = {"prompts": ids[:, :1], "prompt_attention_mask": mask[:, :1]}
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **prompt}

    trainer = InOrder(
        model=core,
        teacher_model=teacher,
        args=GKDConfig(
            output_dir=str(arguments.work / "trl"), lmbda=0.0, beta=0.0, temperature=1.0, use_cpu=True, bf16=False,
            per_device_train_batch_size=BATCH, max_steps=_total(arguments), max_grad_norm=CLIP, report_to=[],
            logging_strategy="no", save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, max_length=LENGTH,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(arguments.work / "teacher"),
        optimizers=(optimizer, scheduler),
        callbacks=[Ticks()],
    )  # fmt: skip
    trainer.train()
    return _result(clock, core, teacher, task["tokens"])


def _trl_loss(arguments: argparse.Namespace) -> dict[str, Any]:
    """TRL's vocabulary tiles at the size of benchmarks/loss_memory.py, on the same numbers."""
    import math

    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    torch.set_num_threads(2)
    torch.manual_seed(0)
    tokens, width, vocabulary = 1024, 512, 151_936
    student = torch.randn(1, tokens, width, requires_grad=True)
    head = (torch.randn(vocabulary, width) * (2.0 / math.sqrt(width))).requires_grad_()
    teacher = torch.randn(1, tokens, width)
    teacher_head = torch.randn(vocabulary, width) * (2.0 / math.sqrt(width))
    seconds = []
    Path("/proc/self/clear_refs").write_text("5")  # sets the kernel's peak back to what is resident now
    before = _peak_gib()
    for _ in range(3):
        student.grad = head.grad = None
        start = time.perf_counter()
        loss = _chunked_divergence_loss(student, teacher, head, teacher_head, torch.ones(1, tokens), beta=0.0)[0]
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "loss": float(loss.detach()), "gib": _peak_gib() - before}


def _peak_gib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / (1 << 20)


# --- nexus --------------------------------------------------------------------------------------------------------------------


class _InOrder:
    """The rows of every step, in order."""

    def __init__(self, steps: Sequence[tuple[Any, ...]]) -> None:
        self._steps, self._next = steps, 0

    def next_batch(self) -> tuple[Any, ...]:
        self._next += 1
        return self._steps[(self._next - 1) % len(self._steps)]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]


class _EngineSource:
    """Teachers of this process, asked when their targets are needed: a live epoch of the same threads as the cached one."""

    def __init__(self, engines: Mapping[str, Any]) -> None:
        self._engines = engines
        self._asked: dict[Any, tuple[str, Any]] = {}

    def submit(self, key: Any, teacher: str, request: Any) -> None:
        self._asked[key] = (teacher, request)

    def collect(self, key: Any) -> Any:
        teacher, request = self._asked.pop(key)
        return self._engines[teacher].score(request)

    def head(self, teacher: str) -> Any:
        return self._engines[teacher].output_head()

    def forget(self) -> None:
        self._asked.clear()


def _spec(arguments: argparse.Namespace, teacher: str = TEACHER) -> Any:
    from nexus.towers.registry import TeacherSpec

    # In float32 like everybody's: what NF4 saves is memory, and it is measured elsewhere.
    return TeacherSpec(
        id=teacher,
        path=str(arguments.work / "teacher"),
        revision=None,
        role="causal_lm",
        quantise=False,
        min_coverage=0.0,
    )


def _engine(arguments: argparse.Namespace) -> Any:
    from nexus.towers.engine import TeacherEngine
    from nexus.towers.loader import load_tower

    return TeacherEngine(load_tower(_spec(arguments), device="cpu"), teacher_id=TEACHER)


def _loop(
    arguments: argparse.Namespace,
    task: Mapping[str, Any],
    fingerprint: str,
    source: Any,
    *,
    transport: str = "hidden",
    teachers: Sequence[str] = (TEACHER,),
    window: int = 2,
    top_k: int = 64,
    epoch: int | None = None,
) -> Any:
    from transformers import AutoTokenizer

    from nexus.data.records import Record
    from nexus.training.batches import Assignment, StepBatches
    from nexus.training.facts import CapabilityFacts, TeacherFacts, TokenTransport
    from nexus.training.loop import DistillationLoop, LoopSettings
    from nexus.training.loss import GradientSurgeryLoss
    from nexus.training.objective import DistillationObjective
    from nexus.training.recovery import RecoveryConfig, SampleQuarantine

    facts = [
        TeacherFacts(
            id=teacher, role="causal_lm", importance=1.0, shares_tokenizer=True, vocabulary_size=VOCABULARY, num_layers=4,
            hidden_size=128, label_texts=None, fingerprint=fingerprint, critical_layers=(),
        )
        for teacher in teachers
    ]  # fmt: skip
    objective = DistillationObjective(
        _load_student(task),
        AutoTokenizer.from_pretrained(arguments.work / "teacher"),
        teachers=facts,
        capabilities=[CapabilityFacts("code", (), None)],
        temperature=1.0,
        top_k=top_k,
        response_weight=1.0,
        max_length=LENGTH,
        divergence="mix" if transport == "topk" else "forward_kl",
        transports={teacher: TokenTransport(transport) for teacher in teachers},  # type: ignore[arg-type]
        head_of=source.head,
    )
    rows = task["rows"][HELD_OUT_ROWS:]
    steps = [
        tuple(
            Record(id=str(n % len(rows)), capability="code", prompt="", completion=rows[n % len(rows)])
            for n in range(BATCH * step, BATCH * (step + 1))
        )
        for step in range(epoch or _total(arguments))
    ]
    return DistillationLoop(
        objective,
        StepBatches({Assignment(teacher, "code"): _InOrder(steps) for teacher in teachers}, {}),
        source,
        importance=dict.fromkeys(teachers, 1.0),
        surgery=GradientSurgeryLoss(dict.fromkeys(teachers, 1.0), penalty=0.0, baselines=dict.fromkeys(teachers, 1.0)),
        recovery=RecoveryConfig(),
        quarantine=SampleQuarantine(),
        settings=LoopSettings(
            steps=_total(arguments), optimizer="adamw", learning_rate=LEARNING_RATE, warmup_steps=WARM_UP,
            weight_decay=WEIGHT_DECAY, grad_clip=CLIP, gold_weight=0.0, anchor_start=0.0, anchor_end=0.0, window=window,
            snapshot_every=50, checkpoint_every=10**9, surgery_method="none", surgery_every=1, seed=0, schedule="cosine",
            final_rate=FINAL_RATE, decay_share=0.2, accumulate=1, ema_decay=None, surgery_subset="adapters_and_trunk", ramps={},
        ),
    )  # fmt: skip


def _advance(loop: Any) -> tuple[_Clock, list[float]]:
    """Times of the steps of `loop.run`, and seconds of their waits for targets."""
    clock, waits = _Clock(), []
    clock.tick()

    def on_report(report: Any) -> None:
        assert report.action == "step"
        clock.tick()
        waits.append(report.wait_s)

    loop.run(on_report=on_report, should_stop=lambda: False, save=lambda: None)
    return clock, waits[WARM_UP:]


def _nexus(arguments: argparse.Namespace) -> dict[str, Any]:
    from nexus.training.sources import EngineSource

    task, engine = _task(arguments), _engine(arguments)
    source = EngineSource({TEACHER: engine})
    # Whole distributions cost nothing to move within a process, and the head over them is the teacher's work then.
    loop = _loop(arguments, task, engine.fingerprint, source, transport="full")
    clock, _ = _advance(loop)
    source.close()
    return _result(clock, loop.objective.student.core, engine.tower.model, task["tokens"])


def _live(arguments: argparse.Namespace) -> dict[str, Any]:
    """Top-k targets from a teacher of this process."""
    task, engine = _task(arguments), _engine(arguments)
    loop = _loop(arguments, task, engine.fingerprint, _EngineSource({TEACHER: engine}), transport="topk", window=1)
    clock, _ = _advance(loop)
    return dict(clock.steps())


def _cached(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same from Parquet, which an epoch before wrote."""
    from nexus.data.targets import ScoreWriter
    from nexus.towers.packing import pack_targets
    from nexus.training.batches import Assignment
    from nexus.training.requests import settings_of
    from nexus.training.sources import SCORES_DIR, CachedSource

    task, engine = _task(arguments), _engine(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        loop = _loop(arguments, task, engine.fingerprint, _EngineSource({}), transport="topk", window=1)
        objective, assignment = loop.objective, Assignment(TEACHER, "code")
        facts = objective.teachers[TEACHER]
        steps = [loop.batches.peek(ahead).unlabelled[assignment] for ahead in range(_total(arguments) + 1)]
        writer = ScoreWriter(
            Path(scratch) / TEACHER / SCORES_DIR,
            capability="code",
            settings=settings_of(objective.request(assignment, steps[0]), facts),
            rows_per_file=256,
        )
        for records in steps:
            targets = engine.score(objective.request(assignment, records))
            writer.write(pack_targets(targets, vocabulary_size=VOCABULARY))
        writer.finish()
        del engine
        source = CachedSource(Path(scratch), {TEACHER: facts})
        clock, _ = _advance(_loop(arguments, task, facts.fingerprint, source, transport="topk", window=1))
    return dict(clock.steps())


@contextmanager
def _ray_pool(arguments: argparse.Namespace, teachers: Sequence[str], sleeps: Mapping[str, float]) -> Iterator[Any]:
    """Teachers as actors of a local Ray, one thread each; a slow one sleeps until its call has taken as long as it should."""
    from actors.cluster import connect, prepare_environment, resolve_cluster

    # Ray reads its environment when it is first imported.
    target = resolve_cluster("local")
    prepare_environment(target)
    import ray

    from actors.pool import TeacherPool
    from actors.teacher import TeacherActor

    class SlowTeacher(TeacherActor):
        def __init__(self, spec: Any, torch_threads: int, seconds: float) -> None:
            super().__init__(spec, torch_threads)
            self._seconds = seconds
            self.taken: list[float] = []

        def score(self, request: Any) -> Any:
            start = time.perf_counter()
            packed = super().score(request)
            time.sleep(max(0.0, self._seconds - (time.perf_counter() - start)))
            self.taken.append(time.perf_counter() - start)
            return packed

        def seconds(self) -> list[float]:
            return self.taken

    connect(target, namespace="benchmark", num_cpus=2, object_store_mib=128, torch_threads=1, dashboard=False)
    try:
        handles = {
            teacher: [
                ray.remote(concurrency_groups={"control": 1})(SlowTeacher)
                .options(num_cpus=0, allow_out_of_order_execution=True)
                .remote(_spec(arguments, teacher), 1, sleeps.get(teacher, 0.0))
            ]
            for teacher in teachers
        }
        pool = TeacherPool(handles, window=3, timeout_s=120, max_retries=0)
        for teacher in teachers:
            pool.submit(("load", teacher), teacher, "load")
        yield pool, {teacher: pool.collect(("load", teacher)) for teacher in teachers}
    finally:
        ray.shutdown()


def _ray(arguments: argparse.Namespace) -> dict[str, Any]:
    task = _task(arguments)
    with _ray_pool(arguments, [TEACHER], {}) as (pool, reports):
        from actors.trainer import PoolSource

        loop = _loop(arguments, task, reports[TEACHER].fingerprint, PoolSource(pool))
        clock, _ = _advance(loop)
    return _result(clock, loop.objective.student.core, _teacher(arguments), task["tokens"])


def _overlapped(arguments: argparse.Namespace) -> dict[str, Any]:
    """A teacher that takes `factor` steps of the student; the student alone is measured first, on targets that are there."""
    task, engine = _task(arguments), _engine(arguments)
    # Hidden states: to choose the best ids of every token alone takes the teacher longer than half a step of the student.
    alone = _loop(arguments, task, engine.fingerprint, _EngineSource({TEACHER: engine}))
    clock, waits = _advance(alone)
    student = statistics.median(step - wait for step, wait in zip(clock.steps()["seconds"], waits, strict=True))
    with _ray_pool(arguments, [TEACHER], {TEACHER: arguments.factor * student}) as (pool, reports):
        from actors.trainer import PoolSource

        loop = _loop(arguments, task, reports[TEACHER].fingerprint, PoolSource(pool))
        clock, waits = _advance(loop)
        pool.submit("seconds", TEACHER, "seconds")
        taken = pool.collect("seconds")
    steps = clock.steps()["seconds"]
    # Means and not medians: a queue that runs dry now and then costs a few long waits, which a median would hide.
    return {
        "teacher_seconds": statistics.mean(taken[WARM_UP : WARM_UP + len(steps)]),
        "student_seconds": statistics.mean(step - wait for step, wait in zip(steps, waits, strict=True)),
        "step_seconds": statistics.mean(steps),
    }


FOUR = ("one", "two", "three", "four")
SLOW_TEACHERS = {"one": 0.15, "two": 0.15}
"""Seconds of a call, as of a teacher several times the student's size."""


def _ray4(arguments: argparse.Namespace) -> dict[str, Any]:
    task = _task(arguments)
    with _ray_pool(arguments, FOUR, SLOW_TEACHERS) as (pool, reports):
        from actors.trainer import PoolSource

        loop = _loop(arguments, task, reports["one"].fingerprint, PoolSource(pool), teachers=FOUR, window=3)
        clock, _ = _advance(loop)
    return dict(clock.steps())


def _serial4(arguments: argparse.Namespace) -> dict[str, Any]:
    """One teacher after the other, then the student: dense logits, kl_div, the same four batches a step."""
    task, teacher = _task(arguments), _teacher(arguments)
    core = _load_student(task).core.train()
    optimizer, scheduler = _optimizer(core, _total(arguments))
    clock = _Clock()
    clock.tick()
    for rows in _batches(arguments, task["tokens"]):
        mask = torch.ones_like(rows)
        optimizer.zero_grad()
        for name in FOUR:
            asked = time.perf_counter()
            with torch.no_grad():
                target = teacher(input_ids=rows, attention_mask=mask).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            time.sleep(max(0.0, SLOW_TEACHERS.get(name, 0.0) - (time.perf_counter() - asked)))
            logits = core(input_ids=rows, attention_mask=mask).logits[:, :-1].flatten(0, 1)
            loss = nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)
            (loss / len(FOUR)).backward()
        nn.utils.clip_grad_norm_(core.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        clock.tick()
    return dict(clock.steps())


CONTENDERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "plain": _plain,
    "trl": _trl,
    "trl_loss": _trl_loss,
    "nexus": _nexus,
    "live": _live,
    "cached": _cached,
    "ray": _ray,
    "overlap": _overlapped,
    "serial4": _serial4,
    "ray4": _ray4,
}


if __name__ == "__main__":
    sys.exit(main())
