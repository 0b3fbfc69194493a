"""The loop: deterministic whatever the order of answers, skips that cost no step, exact resume, every action reported."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest_training import CAPABILITIES, facts, image_rows, label_targets, text_rows, token_targets

from nexus.errors import ConfigError
from nexus.student.memory import NexusStudent
from nexus.training.batches import Assignment, StepBatches
from nexus.training.loop import DistillationLoop, LoopSettings, Spike, parse_spike
from nexus.training.loss import GradientSurgeryLoss
from nexus.training.objective import DistillationObjective, align_with_teachers
from nexus.training.recovery import RecoveryConfig, SampleQuarantine

SETTINGS = LoopSettings(
    steps=8,
    optimizer="adamw",
    learning_rate=3e-3,
    warmup_steps=2,
    weight_decay=0.01,
    grad_clip=1.0,
    gold_weight=0.5,
    anchor_start=1.0,
    anchor_end=0.3,
    window=2,
    snapshot_every=4,
    checkpoint_every=3,
    surgery_method="none",
    surgery_every=2,
    seed=0,
)


class CyclingStream:
    """Rows of a fixed list in turn; the contract of RecordBatches."""

    def __init__(self, rows, size):
        self.rows, self.size, self.position = rows, size, 0

    def next_batch(self):
        chosen = [self.rows[(self.position + n) % len(self.rows)] for n in range(self.size)]
        self.position += self.size
        return tuple(chosen)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class RecordedSource:
    """Answers from the teachers' functions, and what was asked when."""

    def __init__(self, answer):
        self.answer, self.asked, self.log = answer, {}, []

    def submit(self, key, teacher, request):
        assert key not in self.asked
        self.asked[key] = (teacher, request)
        self.log.append(("submit", key[0]))

    def collect(self, key):
        self.log.append(("collect", key[0]))
        return self.answer(*self.asked.pop(key))

    def forget(self):
        self.asked.clear()
        self.log.append(("forget", None))


TEACHERS = (facts("same"), facts("labels"))
ASSIGNMENTS = {Assignment("same", "math"): text_rows(5), Assignment("labels", "sight"): image_rows(5)}


def _source(tokenizer) -> RecordedSource:
    rows = {row.id: row for group in ASSIGNMENTS.values() for row in group}

    def answer(teacher, request):
        chosen = tuple(rows[row_id] for row_id in request.row_ids)
        seed = sum(map(ord, "".join(request.row_ids)))
        if teacher == "same":
            return token_targets(TEACHERS[0], chosen, tokenizer, seed=seed)
        return label_targets(TEACHERS[1], chosen, seed=seed)

    return RecordedSource(answer)


def _loop(spec, tokenizer, *, taught=True, labelled=True, spike=None, recovery=None, excluded=frozenset(), **changes):
    torch.manual_seed(0)
    teachers = TEACHERS if taught else ()
    if taught:
        spec = align_with_teachers(spec, teachers, {"same": ("reasoning",), "labels": ("vision",)})
    objective = DistillationObjective(
        NexusStudent(spec),
        tokenizer,
        teachers=teachers,
        capabilities=CAPABILITIES,
        temperature=2.0,
        top_k=8,
        response_weight=1.0,
        max_length=64,
    )
    batches = StepBatches(
        {assignment: CyclingStream(rows, 2) for assignment, rows in ASSIGNMENTS.items()} if taught else {},
        {"math": CyclingStream(text_rows(3), 1)} if labelled else {},
    )
    batches.excluded = excluded
    importance = {teacher.id: 1.0 for teacher in teachers}
    source = _source(tokenizer) if taught else None
    loop = DistillationLoop(
        objective,
        batches,
        source,
        importance=importance,
        surgery=GradientSurgeryLoss(importance, warmup_steps=2, ramp_steps=4) if taught else None,
        recovery=recovery or RecoveryConfig(),
        quarantine=SampleQuarantine(),
        settings=replace(SETTINGS, **changes),
        spike=spike,
    )
    return loop, source


def _run(loop, *, stop_after=None, saved=None):
    reports = []

    def should_stop():
        return stop_after is not None and len(reports) >= stop_after

    def save():
        if saved is not None:
            saved.append((loop.step, _copy(loop.objective.state_dict()), _copy(loop.state_dict())))

    finished = loop.run(on_report=reports.append, should_stop=should_stop, save=save)
    return finished, reports


def _copy(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value


def _weights(loop):
    return {name: tensor.clone() for name, tensor in loop.objective.state_dict().items()}


def _assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_makes_its_steps_saves_on_schedule_and_lowers_the_losses(spec, tokenizer):
    saved = []
    loop, _ = _loop(spec, tokenizer, steps=40, checkpoint_every=15)
    finished, reports = _run(loop, saved=saved)
    assert finished
    assert [report.step for report in reports] == list(range(40))
    assert [step for step, *_ in saved] == [15, 30, 40]
    for teacher in ("same", "labels"):
        assert reports[-1].losses[teacher] < reports[0].losses[teacher]
    assert reports[-1].gold < reports[0].gold
    assert sum(reports[5].coefficients.values()) == pytest.approx(1.0)
    assert reports[0].learning_rate < reports[1].learning_rate


def test_targets_of_later_draws_are_asked_before_a_step_and_collected_in_order(spec, tokenizer):
    loop, source = _loop(spec, tokenizer)
    loop.advance()
    assert [entry for entry in source.log if entry[0] == "submit"] == [("submit", d) for d in (0, 0, 1, 1, 2, 2)]
    loop.advance()
    assert [d for kind, d in source.log if kind == "collect"] == [0, 0, 1, 1]
    assert max(d for kind, d in source.log if kind == "submit") == 3


def test_the_run_is_reproducible(spec, tokenizer):
    first, second = (_loop(spec, tokenizer)[0] for _ in range(2))
    _run(first)
    _run(second)
    _assert_equal(_weights(first), _weights(second))


@pytest.mark.parametrize(
    ("changes", "taught"),
    [
        ({}, True),
        ({"surgery_method": "upgrad"}, True),
        ({}, False),
        ({"optimizer": "muon"}, True),
    ],
)
def test_a_stopped_run_continues_to_the_same_weights(spec, tokenizer, changes, taught):
    undisturbed, _ = _loop(spec, tokenizer, taught=taught, **changes)
    _run(undisturbed)
    saved = []
    stopped, _ = _loop(spec, tokenizer, taught=taught, **changes)
    finished, _ = _run(stopped, stop_after=4, saved=saved)
    assert not finished
    step, weights, state = saved[-1]
    assert step == 4
    resumed, _ = _loop(spec, tokenizer, taught=taught, **changes)
    resumed.objective.load_state_dict(weights)
    resumed.load_state_dict(state)
    finished, reports = _run(resumed)
    assert finished
    assert reports[0].step == 4
    _assert_equal(_weights(resumed), _weights(undisturbed))


def test_muon_moves_the_inner_matrices_and_adamw_the_embeddings_and_the_maps_to_teachers(spec, tokenizer):
    loop, _ = _loop(spec, tokenizer, optimizer="muon")
    names = {id(parameter): name for name, parameter in loop.objective.named_parameters()}
    muon, decayed, rest = ([names[id(p)] for p in group["params"]] for group in loop.optimizer.param_groups)
    assert "student.core.layers.0.mlp.gate_proj.weight" in muon
    assert "student.core.ports.1.q_proj.weight" in muon
    assert any(name.startswith("student.adapters.vision") for name in muon)
    assert not [name for name in muon if "alignment" in name or "embed_tokens" in name or "bias" in name]
    assert "student.core.embed_tokens.weight" in decayed
    assert [name for name in decayed if "adapters" in name and "alignments" in name]
    assert sorted([*muon, *decayed, *rest]) == sorted(names.values())
    assert [group["weight_decay"] for group in loop.optimizer.param_groups] == [0.01, 0.01, 0.0]


def test_a_run_stopped_before_its_first_step_saves_nothing(spec, tokenizer):
    saved = []
    loop, _ = _loop(spec, tokenizer)
    assert _run(loop, stop_after=0, saved=saved) == (False, [])
    assert saved == []


def test_a_run_at_its_end_has_nothing_to_do(spec, tokenizer):
    saved = []
    loop, _ = _loop(spec, tokenizer)
    loop.step = 8
    assert _run(loop, saved=saved) == (True, [])
    assert saved == []


def test_a_nan_is_skipped_without_costing_a_step_and_changes_nothing(spec, tokenizer):
    loop, _ = _loop(spec, tokenizer, spike=Spike(3, "nan", math.nan))
    before = {}
    reports = []

    def on_report(report):
        reports.append(report)
        if report.draw == 2:
            before.update(_weights(loop))
        if report.draw == 3:
            _assert_equal(before, _weights(loop))

    loop.run(on_report=on_report, should_stop=lambda: False, save=lambda: None)
    assert [report.action for report in reports].count("skip") == 1
    assert reports[3].action == "skip"
    assert not math.isfinite(reports[3].total)
    assert len(reports) == 9
    assert loop.step == 8


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_rollback_returns_to_a_snapshot_and_asks_for_the_targets_again(spec, tokenizer, optimizer):
    recovery = RecoveryConfig(flags_to_rollback=1, certify_steps=1, suspect_margin=0, warmup=4, window=8)
    loop, source = _loop(
        spec,
        tokenizer,
        steps=20,
        snapshot_every=2,
        spike=Spike(12, "scale", 1e6),
        recovery=recovery,
        learning_rate=1e-4,
        optimizer=optimizer,
    )
    finished, reports = _run(loop)
    assert finished
    rollbacks = [report for report in reports if report.action == "rollback"]
    assert len(rollbacks) >= 1
    assert rollbacks[0].draw == 12
    assert rollbacks[0].restored_step < 12
    assert ("forget", None) in source.log
    assert loop.step == 20


def test_without_teachers_only_the_labelled_rows_train(spec, tokenizer):
    loop, _ = _loop(spec, tokenizer, taught=False)
    finished, reports = _run(loop)
    assert finished
    assert reports[0].losses == {}
    assert reports[0].coefficients == {}
    assert reports[-1].gold < reports[0].gold


def test_without_labelled_rows_only_the_teachers_train(spec, tokenizer):
    loop, _ = _loop(spec, tokenizer, labelled=False)
    _, reports = _run(loop)
    assert all(report.gold is None for report in reports)


def test_with_nothing_to_train_on_the_run_says_so(spec, tokenizer):
    loop, _ = _loop(spec, tokenizer, taught=False, labelled=False)
    with pytest.raises(ConfigError, match="nothing would train the student"):
        loop.advance()


def test_the_gold_weight_changes_the_total(spec, tokenizer):
    totals = []
    for weight in (0.0, 0.5):
        loop, _ = _loop(spec, tokenizer, gold_weight=weight)
        report = loop.advance()
        totals.append((report.total, report.gold))
    assert totals[1][0] - totals[0][0] == pytest.approx(0.5 * totals[0][1], rel=1e-5)


def test_the_anchor_weight_follows_its_schedule(spec, tokenizer):
    losses = {}
    for start in (0.0, 2.0):
        loop, _ = _loop(spec, tokenizer, anchor_start=start, anchor_end=0.0)
        report = loop.advance()
        losses[start] = report.losses["same"]
        anchor = report.anchor["same"]
    assert losses[2.0] - losses[0.0] == pytest.approx(2.0 * anchor, rel=1e-4)


@pytest.mark.parametrize("method", ["upgrad", "pcgrad"])
def test_surgery_on_its_due_steps_changes_only_conflicting_updates_and_keeps_the_gold_gradient(spec, tokenizer, method):
    plain, _ = _loop(spec, tokenizer, surgery_every=1)
    operated, _ = _loop(spec, tokenizer, surgery_every=1, surgery_method=method)
    without_gold, _ = _loop(spec, tokenizer, surgery_every=1, surgery_method=method, gold_weight=0.0)
    gradients = {}
    for name, loop in (("plain", plain), ("operated", operated), ("no gold", without_gold)):
        loop.settings = replace(loop.settings, grad_clip=1e9)
        loop.optimizer.step = lambda: None
        loop.advance()
        gradients[name] = torch.cat(
            [p.grad.flatten() for p in loop.objective.student.core.parameters() if p.grad is not None]
        )
    assert not torch.equal(gradients["operated"], gradients["no gold"])
    assert torch.isfinite(gradients["operated"]).all()
    cosine = torch.nn.functional.cosine_similarity(gradients["plain"], gradients["operated"], dim=0)
    assert cosine > 0.5


def test_excluded_rows_can_leave_an_assignment_without_rows(spec, tokenizer):
    loop, _ = _loop(spec, tokenizer, excluded=frozenset(row.id for row in image_rows(5)))
    report = loop.advance()
    assert set(report.losses) == {"same"}


@pytest.mark.parametrize(
    ("text", "spike"), [("50:nan", ("nan", 50)), ("3:x50", ("scale", 3)), ("0:x2.5", ("scale", 0))]
)
def test_a_spike_is_read_from_its_text(text, spike):
    assert (parse_spike(text).kind, parse_spike(text).draw) == spike


@pytest.mark.parametrize("text", ["nan", "5", "5:", "5:y50", "-1:nan", "5:x"])
def test_another_spike_is_refused(text):
    with pytest.raises(ConfigError, match="STEP:nan or STEP:xFACTOR"):
        parse_spike(text)
