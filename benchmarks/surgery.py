"""Does gradient surgery pay, and what does a step of it cost? Real teachers that disagree, the loop that training runs, equal time.

    python benchmarks/surgery.py [--budget 20] [--seeds 0 1] [--threads 1] [--json FILE]

Four character-level language models (Qwen3, 3 layers of 96) are trained on four kinds of text that this Python installation holds:
source code, prose of its documentation strings, JSON, and tables of numbers. One student, smaller than any of them (2 layers of 64),
learns all four by forward KL from their last hidden states, each teacher on its own kind of text, in `DistillationLoop` as a run does
it. The teachers' states are computed beforehand, so that a step is the student's alone. Every method gets the same start, the same
rows in the same order, and the same CPU seconds of this process (wall time of a machine that does nothing else): `--budget` in all,
divided among the seeds. A method that takes longer steps makes fewer of them. `plain` is the importance-weighted sum; `upgrad/10`
finds a plan every tenth step and weighs the losses by it between, as a run with `distill.surgery.every: 10` does.

The methods take turns of ten steps; `step_over_plain` is the median over rounds of a method's turn over the plain one beside it. With
it come the steps made, the share of solved steps with a conflict, and the mean and the worst teacher's divergence on held-out text,
as medians over seeds; last, the conflict matrix of the first seed. Ends with exit code 1 when a step of a method that finds a plan
every tenth step costs more than 1.3 plain ones.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
import sys
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nexus.data.records import Record
from nexus.student.config import NexusStudentConfig
from nexus.student.memory import NexusStudent
from nexus.student.presets import StudentSpec
from nexus.student.router import SparseIntentRouterConfig
from nexus.towers.targets import HiddenTargets, ScoreRequest, TeacherHead, TeacherTargets
from nexus.training.batches import Assignment, RecordStream, StepBatches
from nexus.training.facts import CapabilityFacts, TeacherFacts, TokenTransport
from nexus.training.loop import DistillationLoop, LoopSettings, StepReport
from nexus.training.loss import GradientSurgeryLoss
from nexus.training.objective import DistillationObjective
from nexus.training.recovery import RecoveryConfig, SampleQuarantine

KINDS = ("code", "prose", "json", "tables")
LENGTH, BATCH = 64, 8
TEACHER_WIDTH, TEACHER_LAYERS, TEACHER_STEPS = 96, 3, 160
TRAIN_ROWS, HELD_OUT_ROWS = 768, 64
TURN = 10
"""Steps that a method makes before the next one's turn: one plan of `every: 10`."""
MAX_STEP_OVER_PLAIN = 1.3
METHODS: dict[str, tuple[Literal["none", "upgrad", "pcgrad"], int]] = {
    "plain": ("none", 1),
    "upgrad/10": ("upgrad", 10),
    "pcgrad/10": ("pcgrad", 10),
    "upgrad": ("upgrad", 1),
}


@dataclass(frozen=True)
class Rows:
    """One kind of text in tokens of one length, and its teacher's states at all but the last of them."""

    ids_BT: Tensor
    states_BTE: Tensor
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Task:
    """What every method gets."""

    tokenizer: PreTrainedTokenizerFast
    train: Mapping[str, Rows]
    held_out: Mapping[str, Rows]
    heads: Mapping[str, Tensor]


@dataclass
class Run:
    """One method on one seed, as far as it got."""

    loop: DistillationLoop
    turns: list[float] = field(default_factory=list)
    """CPU seconds of each."""
    reports: list[StepReport] = field(default_factory=list)


def main() -> int:
    """Train the teachers, then a student by every method and seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=20.0, help="CPU seconds of each method, over all seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = make_task()
    print(
        f"{len(KINDS)} teachers, {arguments.budget:g} CPU s per method over {len(arguments.seeds)} seeds, "
        f"{BATCH} rows of {LENGTH} tokens per teacher and step",
        flush=True,
    )
    seeds = [_train(task, seed, arguments.budget / len(arguments.seeds)) for seed in arguments.seeds]
    table = {name: _row(task, name, seeds) for name in METHODS}
    for name, row in table.items():
        print(f"  {name:<10} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print("cosines between the teachers' gradients, last solved step of the first seed (upgrad)")
    cosines = next(report.surgery for report in reversed(seeds[0]["upgrad"].reports) if report.surgery).cosines
    for teacher, values in cosines.items():
        print(f"  {teacher:<8}" + "".join(f"{value:8.3f}" for value in values.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"table": table, "cosines": cosines}, indent=2))
    tenth = [row["step_over_plain"] for name, row in table.items() if name.endswith("/10")]
    return int(max(tenth) > MAX_STEP_OVER_PLAIN)


def _train(task: Task, seed: int, budget_s: float) -> dict[str, Run]:
    """All methods in turns, each until its time is up."""
    runs = {name: Run(make_loop(task, seed, method=method, every=every)) for name, (method, every) in METHODS.items()}
    for run in runs.values():
        _take_turn(run)
        run.turns.clear()  # the first steps of a process warm its caches up
    while active := [run for run in runs.values() if sum(run.turns) < budget_s]:
        for run in active:
            _take_turn(run)
    return runs


def _take_turn(run: Run) -> None:
    end = len(run.reports) + TURN
    start = time.process_time()
    run.loop.run(on_report=run.reports.append, should_stop=lambda: len(run.reports) >= end, save=lambda: None)
    run.turns.append(time.process_time() - start)


def _row(task: Task, name: str, seeds: Sequence[Mapping[str, Run]]) -> dict[str, float]:
    ratios = [
        own / plain
        for runs in seeds
        for own, plain in zip(
            runs[name].turns, runs["plain"].turns, strict=False
        )  # until the shorter one's time was up
    ]
    solved = [report.surgery.plan.conflicts > 0 for runs in seeds for report in runs[name].reports if report.surgery]
    kls = [_held_out(task, runs[name].loop) for runs in seeds]
    return {
        "steps": statistics.median(runs[name].loop.step for runs in seeds),
        "step_over_plain": statistics.median(ratios),
        "conflict_share": statistics.mean(solved) if solved else 0.0,
        "mean_kl": statistics.median(statistics.mean(found.values()) for found in kls),
        "worst_kl": statistics.median(max(found.values()) for found in kls),
    }


@torch.no_grad()
def _held_out(task: Task, loop: DistillationLoop) -> dict[str, float]:
    """KL(teacher || student) on text that nobody trained on, nats per token."""
    core = loop.objective.student.core.eval()
    found = {}
    for kind, rows in task.held_out.items():
        log_q = core(input_ids=rows.ids_BT).logits[:, :-1].double().log_softmax(-1)
        log_p = (rows.states_BTE @ task.heads[kind].T).double().log_softmax(-1)
        found[kind] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return found


# --- the task -----------------------------------------------------------------------------------------------------------------


def make_task(kinds: Sequence[str] = KINDS) -> Task:
    """Tokenizer of bytes, trained teachers, their rows and states."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    backend.train_from_iterator(
        [],
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + 2, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    train, held_out, heads = {}, {}, {}
    for kind in kinds:
        text = _text(kind)
        cut = int(0.9 * len(text))
        train_texts = _windows(text[:cut], TRAIN_ROWS)
        teacher = _teacher(_ids(tokenizer, train_texts))
        train[kind] = _rows(tokenizer, teacher, kind, train_texts)
        held_out[kind] = _rows(tokenizer, teacher, kind, _windows(text[cut:], HELD_OUT_ROWS))
        heads[kind] = teacher.lm_head.weight.detach()
    return Task(tokenizer, train, held_out, heads)


def _text(kind: str) -> str:
    generator = random.Random(kind)
    library = sorted(Path(inspect.__file__).parent.glob("*.py"))[:40]
    if kind == "code":
        found = "".join(path.read_text("utf-8") for path in library)
    elif kind == "prose":
        names = ("argparse", "asyncio", "concurrent.futures", "datetime", "decimal", "email", "fractions", "logging")
        modules = [__import__(name, fromlist=["_"]) for name in names]
        parts = {
            inspect.getdoc(value) or "" for module in modules for value in vars(module).values() if callable(value)
        }
        found = "\n".join(sorted(parts))
    elif kind == "json":
        rows = [
            {"id": n, "name": generator.choice("abcdefgh") * 3, "tags": generator.choices(["red", "blue", "old"], k=2)}
            for n in range(6000)
        ]
        found = json.dumps(rows)
    else:
        found = "\n".join("\t".join(f"{generator.gauss(0, 30):8.2f}" for _ in range(6)) for _ in range(7000))
    return found.encode("ascii", "ignore").decode()[:400_000]


def _windows(text: str, count: int) -> list[str]:
    starts = random.Random(count).choices(range(len(text) - LENGTH), k=count)
    return [text[start : start + LENGTH] for start in starts]


def _ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """[B, LENGTH + 1]: a token of each byte, and the end of sequence."""
    ids = torch.tensor(tokenizer(list(texts))["input_ids"])
    return torch.cat([ids, torch.full((len(ids), 1), tokenizer.eos_token_id)], dim=1)


def _teacher(ids_BT: Tensor) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=258, hidden_size=TEACHER_WIDTH, intermediate_size=3 * TEACHER_WIDTH, num_hidden_layers=TEACHER_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=TEACHER_WIDTH // 4, tie_word_embeddings=True,
    )  # fmt: skip
    model, generator = Qwen3ForCausalLM(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(TEACHER_STEPS):
        rows = ids_BT[torch.randint(len(ids_BT), (2 * BATCH,), generator=generator)]
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _rows(tokenizer: PreTrainedTokenizerFast, teacher: Qwen3ForCausalLM, kind: str, texts: Sequence[str]) -> Rows:
    ids_BT = _ids(tokenizer, texts)
    states_BTE = torch.cat([teacher.model(part).last_hidden_state[:, :-1] for part in ids_BT.split(64)])
    records = tuple(
        Record(id=str(number), capability=kind, prompt="", completion=text) for number, text in enumerate(texts)
    )
    return Rows(ids_BT, states_BTE, records)


# --- the loop -----------------------------------------------------------------------------------------------------------------


class Shuffled:
    """Rows in an order of their own for each epoch."""

    def __init__(self, records: Sequence[Record], seed: int) -> None:
        self._records, self._seed, self._next = records, seed, 0

    def next_batch(self) -> tuple[Record, ...]:
        """The next `BATCH` rows."""
        epoch, step = divmod(self._next, len(self._records) // BATCH)
        self._next += 1
        order = random.Random(f"{self._seed} {epoch}").sample(range(len(self._records)), len(self._records))
        return tuple(self._records[index] for index in order[BATCH * step : BATCH * (step + 1)])

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._next = state["next"]


class States:
    """The teachers' states, computed beforehand; row ids are their places."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._asked: dict[Hashable, tuple[str, ScoreRequest]] = {}

    def submit(self, key: Hashable, teacher: str, request: ScoreRequest) -> None:
        """Remember what is wanted."""
        self._asked[key] = (teacher, request)

    def collect(self, key: Hashable) -> TeacherTargets:
        """The states of the rows."""
        teacher, request = self._asked.pop(key)
        rows = self._task.train[teacher]
        places = [int(row_id) % len(rows.ids_BT) for row_id in request.row_ids]
        tokens = HiddenTargets(
            np.arange(len(places) + 1) * LENGTH,
            rows.ids_BT[places][:, 1:].flatten().numpy().astype(np.int32),
            rows.states_BTE[places].flatten(0, 1).numpy(),
        )
        return TeacherTargets(
            teacher=teacher, fingerprint="print", tokenizer_hash="bytes", row_ids=request.row_ids, tokens=tokens,
            hidden={}, pooled_BE=None, label_texts=None, label_logprobs_BC=None,
        )  # fmt: skip

    def head(self, teacher: str) -> TeacherHead:
        """The teacher's output head."""
        return TeacherHead(self._task.heads[teacher].numpy(), None, None)

    def forget(self) -> None:
        """Drop what was asked for."""
        self._asked.clear()


def make_loop(
    task: Task,
    seed: int,
    *,
    method: Literal["none", "upgrad", "pcgrad"] = "none",
    every: int = 1,
    width: int = 64,
    layers: int = 2,
    streams: Mapping[str, RecordStream] | None = None,
    snapshot_every: int = 50,
) -> DistillationLoop:
    """A loop over the task's teachers with a fresh student; it never comes to its last step."""
    torch.manual_seed(seed)
    core = NexusStudentConfig(
        vocab_size=258, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, port_every=1, max_position_embeddings=LENGTH + 1, tie_word_embeddings=True, use_cache=False,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    student = NexusStudent(
        StudentSpec(core, None, None, None, SparseIntentRouterConfig(embedding_size=width, hidden_size=8))
    )
    kinds = list(task.train)
    facts = [
        TeacherFacts(
            id=kind, role="causal_lm", importance=1.0, shares_tokenizer=True, vocabulary_size=258, num_layers=TEACHER_LAYERS,
            hidden_size=TEACHER_WIDTH, label_texts=None, fingerprint="print", critical_layers=(),
        )
        for kind in kinds
    ]  # fmt: skip
    source = States(task)
    objective = DistillationObjective(
        student,
        task.tokenizer,
        teachers=facts,
        capabilities=[CapabilityFacts(kind, (), None) for kind in kinds],
        temperature=1.0,
        top_k=1,
        response_weight=1.0,
        max_length=LENGTH + 1,
        divergence="forward_kl",
        transports={kind: TokenTransport("hidden") for kind in kinds},
        head_of=source.head,
    )
    streams = streams or {kind: Shuffled(task.train[kind].records, seed) for kind in kinds}
    importance = dict.fromkeys(kinds, 1.0)
    return DistillationLoop(
        objective,
        StepBatches({Assignment(kind, kind): streams[kind] for kind in kinds}, {}),
        source,
        importance=importance,
        surgery=GradientSurgeryLoss(importance, ramp_steps=0, penalty=0.0),
        recovery=RecoveryConfig(),
        quarantine=SampleQuarantine(),
        settings=LoopSettings(
            steps=10**6, optimizer="adamw", learning_rate=3e-3, warmup_steps=10, weight_decay=0.01, grad_clip=1.0,
            gold_weight=0.0, anchor_start=0.0, anchor_end=0.0, window=1, snapshot_every=snapshot_every, checkpoint_every=10**9,
            surgery_method=method, surgery_every=every, seed=seed, schedule="constant",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
