"""The loop: deterministic whatever the order of answers, skips that cost no step, exact resume, every action reported."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest_training import CAPABILITIES, facts, image_rows, label_targets, text_rows, token_targets

from nexus.errors import ConfigError, TrainingDivergedError
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
    schedule="cosine",
    warmup_steps=2,
    final_rate=0.02,
    decay_share=0.2,
    weight_decay=0.01,
    grad_clip=1.0,
    accumulate=1,
    ema_decay=None,
    gold_weight=0.5,
    anchor_start=1.0,
    anchor_end=0.3,
    window=2,
    snapshot_every=4,
    checkpoint_every=3,
    surgery_method="none",
    surgery_every=2,
    surgery_subset="adapters_and_trunk",
    ramps={},
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


def _loop(
    spec,
    tokenizer,
    *,
    taught=True,
    labelled=True,
    spike=None,
    recovery=None,
    excluded=frozenset(),
    rows=2,
    source=None,
    assignments=ASSIGNMENTS,
    standardise="scale",
    **changes,
):
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
        standardise=standardise,
    )
    batches = StepBatches(
        {assignment: CyclingStream(found, rows) for assignment, found in assignments.items()} if taught else {},
        {"math": CyclingStream(text_rows(4), rows // 2)} if labelled else {},
    )
    batches.excluded = excluded
    importance = {teacher.id: 1.0 for teacher in teachers}
    source = (source or _source(tokenizer)) if taught else None
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


def test_where_recovery_gives_up_the_loop_stands_at_the_step_of_the_state_that_it_kept(spec, tokenizer):
    """Else a checkpoint of it would claim steps that its weights never made, and a resume would leave them out."""
    loop, _ = _loop(spec, tokenizer, recovery=RecoveryConfig(max_rollbacks=0))
    states = {}

    def remember(report):
        states[loop.step] = (_weights(loop), _copy(loop.state_dict()))

    loop.run(on_report=remember, should_stop=lambda: loop.step >= 6, save=lambda: None)
    weights, state = states[4]  # the newest snapshot
    with torch.no_grad():
        next(loop.objective.parameters()).fill_(math.nan)
    with pytest.raises(TrainingDivergedError, match="state of step 4"):
        loop.advance()
    kept = loop.state_dict()
    assert kept["step"] == 4
    _assert_equal(_weights(loop), weights)
    for part in ("scheduler", "batches"):
        assert kept[part] == state[part]
    assert loop.advance().step == 4


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
        ({"optimizer": "adamw8bit", "standardise": "phi_s"}, True),
        ({"surgery_method": "pcgrad", "surgery_every": 3, "accumulate": 2, "ema_decay": 0.9}, True),
        ({"ramps": {"labels": (2, 3)}, "schedule": "wsd"}, True),
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


def test_a_run_resumed_after_a_row_was_confirmed_as_poison_is_the_uninterrupted_one(spec, tokenizer):
    poison = ASSIGNMENTS[Assignment("same", "math")][3].id  # of the rows drawn ahead when the spike strikes

    def poisoned(**changes):
        loop, _ = _loop(spec, tokenizer, **changes)
        for hit in "ab":
            loop.recovery.quarantine.add([poison, hit])
        return loop

    undisturbed = poisoned(spike=Spike(0, "nan", math.nan))
    assert poison in undisturbed.batches.peek(1).sample_ids
    _, reports = _run(undisturbed, stop_after=1)
    assert reports[0].action == "skip"
    assert poison not in undisturbed.batches.peek(0).sample_ids
    resumed = poisoned()
    resumed.objective.load_state_dict(_copy(undisturbed.objective.state_dict()))
    resumed.load_state_dict(_copy(undisturbed.state_dict()))
    expected, found = (_run(loop)[1] for loop in (undisturbed, resumed))
    assert [(report.rows, report.total) for report in found] == [(report.rows, report.total) for report in expected]
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


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
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
        assert report.anchor_weight == start
    assert losses[2.0] - losses[0.0] == pytest.approx(2.0 * anchor, rel=1e-4)


@pytest.mark.parametrize("method", ["upgrad", "pcgrad"])
def test_surgery_on_its_due_steps_changes_only_conflicting_updates_and_keeps_the_gold_gradient(spec, tokenizer, method):
    plain, _ = _loop(spec, tokenizer, surgery_every=1)
    operated, _ = _loop(spec, tokenizer, surgery_every=1, surgery_method=method)
    without_gold, _ = _loop(spec, tokenizer, surgery_every=1, surgery_method=method, gold_weight=0.0)
    gradients = {}
    for name, loop in (("plain", plain), ("operated", operated), ("no gold", without_gold)):
        gradients[name] = _gradient(loop)
    assert not torch.equal(gradients["operated"], gradients["no gold"])
    assert torch.isfinite(gradients["operated"]).all()
    cosine = torch.nn.functional.cosine_similarity(gradients["plain"], gradients["operated"], dim=0)
    assert cosine > 0.5


def _gradient(loop):
    """Of the next step, unclipped, without taking it."""
    loop.settings = replace(loop.settings, grad_clip=1e9)
    loop.optimizer.step = lambda: None
    loop.advance()
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in loop.objective.parameters()
            if p.requires_grad
        ]
    )


def test_surgery_reports_what_it_found_on_the_steps_that_it_is_due(spec, tokenizer):
    loop, _ = _loop(spec, tokenizer, surgery_method="upgrad", surgery_every=3)
    _, reports = _run(loop)
    assert [report.step for report in reports if report.surgery is not None] == [0, 3, 6]
    found = reports[3].surgery
    assert found.teachers == ("labels", "same")
    assert found.cosines["same"]["labels"] == pytest.approx(found.cosines["labels"]["same"])
    assert -1.0 <= found.cosines["same"]["labels"] <= 1.0


@pytest.mark.parametrize("subset", ["adapters_and_trunk", "trunk"])
def test_between_two_surgeries_the_plan_is_used_with_each_steps_own_losses(spec, tokenizer, subset):
    """On one and the same batch, the reused plan gives what a new one would."""
    gradients = {}
    for every in (1, 5):
        changes = {"surgery_method": "upgrad", "surgery_every": every, "surgery_subset": subset}
        loop, _ = _loop(spec, tokenizer, learning_rate=0.0, weight_decay=0.0, **changes)
        loop.batches._unlabelled = {key: CyclingStream(rows[:1], 1) for key, rows in ASSIGNMENTS.items()}
        loop.batches._labelled = {"math": CyclingStream(text_rows(1), 1)}
        _frozen(loop)
        loop.advance()
        gradients[every] = _gradient(loop)
    torch.testing.assert_close(gradients[5], gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("subset", ["adapters_and_trunk", "trunk"])
def test_surgery_goes_back_through_the_trunk_once_for_each_pass_forward(spec, tokenizer, subset):
    """What a step of surgery costs, on the step that finds the plan and on those that use it."""
    loop, _ = _loop(spec, tokenizer, surgery_method="upgrad", surgery_every=3, surgery_subset=subset)
    passes = {"forward": 0, "backward": 0}

    def count(name):
        passes[name] += 1

    layer = loop.objective.student.core.layers[-1]
    layer.register_forward_hook(lambda *_: count("forward"))
    layer.register_full_backward_hook(lambda *_: count("backward"))
    reports = [loop.advance() for _ in range(3)]
    assert [report.surgery is not None for report in reports] == [True, False, False]
    assert loop._operation._plan.conflicts == 1  # else the steps between would be plain
    assert passes["backward"] == passes["forward"]


@pytest.mark.parametrize("subset", ["adapters", "trunk"])
def test_surgery_leaves_parameters_outside_its_subset_alone(spec, tokenizer, subset):
    plain, _ = _loop(spec, tokenizer, surgery_every=1)
    operated, _ = _loop(spec, tokenizer, surgery_every=1, surgery_method="upgrad", surgery_subset=subset)
    _gradient(plain)
    _gradient(operated)
    changed = {
        name.split(".")[1] if name.startswith("student.") else "maps"
        for (name, one), two in zip(plain.objective.named_parameters(), operated.objective.parameters(), strict=True)
        if one.grad is not None and not torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-7)
    }
    assert changed <= {"core" if subset == "trunk" else "adapters"}


def test_excluded_rows_can_leave_an_assignment_without_rows(spec, tokenizer):
    loop, _ = _loop(spec, tokenizer, excluded=frozenset(row.id for row in image_rows(5)))
    report = loop.advance()
    assert set(report.losses) == {"same"}


@pytest.mark.parametrize(
    ("text", "spike"), [("50:nan", ("nan", 50)), ("3:x50", ("scale", 3)), ("0:x2.5", ("scale", 0))]
)
def test_a_spike_is_read_from_its_text(text, spike):
    found = parse_spike(text, steps=51)
    assert (found.kind, found.step) == spike


@pytest.mark.parametrize("text", ["nan", "5", "5:", "5:y50", "-1:nan", "5:x"])
def test_another_spike_is_refused(text):
    with pytest.raises(ConfigError, match="STEP:nan or STEP:xFACTOR"):
        parse_spike(text, steps=51)


@pytest.mark.parametrize(
    ("text", "found"), [("51:nan", "below distill.steps, 51"), ("5:x1", "above 1"), ("5:x0", "above 1")]
)
def test_a_spike_that_would_spoil_nothing_is_refused(text, found):
    with pytest.raises(ConfigError, match=found):
        parse_spike(text, steps=51)


# Gradient accumulation.


def _frozen(loop):
    """Standardisers whose statistics no longer move, so that a loss depends on its rows alone."""
    for standardiser in loop.objective.standardisers.values():
        width = standardiser.width
        standardiser.update(torch.randn(8, width, generator=torch.Generator().manual_seed(0)), torch.ones(8))
        standardiser.freeze()


class PerRowSource(RecordedSource):
    """Answers that depend on each row alone, whatever batch it comes in."""

    def __init__(self, tokenizer):
        rows = {row.id: row for group in ASSIGNMENTS.values() for row in group}

        def answer(teacher, request):
            parts = []
            for row_id in request.row_ids:
                seed = sum(map(ord, row_id))
                if teacher == "same":
                    parts.append(token_targets(TEACHERS[0], (rows[row_id],), tokenizer, seed=seed))
                else:
                    parts.append(label_targets(TEACHERS[1], (rows[row_id],), seed=seed))
            return _joined(parts)

        super().__init__(answer)


def _joined(parts):
    tokens = parts[0].tokens
    if tokens is not None:
        columns = {
            name: np.concatenate([getattr(part.tokens, name) for part in parts])
            for name in ("token_ids_N", "ids_NK", "logprobs_NK", "tail_logprob_N")
        }
        lengths = [part.tokens.offsets_B1[-1] for part in parts]
        tokens = replace(tokens, offsets_B1=np.cumsum([0, *lengths]), **columns)
    return replace(
        parts[0],
        row_ids=tuple(row_id for part in parts for row_id in part.row_ids),
        tokens=tokens,
        hidden={layer: np.concatenate([part.hidden[layer] for part in parts]) for layer in parts[0].hidden},
        label_logprobs_BC=None
        if parts[0].label_logprobs_BC is None
        else np.concatenate([part.label_logprobs_BC for part in parts]),
    )


@pytest.mark.parametrize(("method", "standardise"), [("none", "scale"), ("upgrad", "scale"), ("none", "phi_s")])
def test_accumulated_draws_equal_one_large_batch(spec, tokenizer, method, standardise):
    """Also in the anchor, whose targets are standardised by statistics that the step itself moves."""
    found, statistics = [], []
    for rows, accumulate in ((4, 1), (2, 2)):
        loop, _ = _loop(
            spec,
            tokenizer,
            rows=rows,
            accumulate=accumulate,
            source=PerRowSource(tokenizer),
            standardise=standardise,
            surgery_method=method,
        )
        loop.settings = replace(loop.settings, grad_clip=1e9)
        loop.optimizer.step = lambda: None
        report = loop.advance()
        gradients = {name: p.grad for name, p in loop.objective.named_parameters() if p.grad is not None}
        found.append((report, gradients))
        statistics.append({key: part.state_dict() for key, part in loop.objective.standardisers.items()})
    (large, expected), (parts, gradients) = found
    assert all(state["count"] for state in statistics[0].values())
    torch.testing.assert_close(*statistics, rtol=0, atol=0)
    assert parts.rows == large.rows == 10
    assert parts.losses == pytest.approx(large.losses, rel=1e-5)
    assert parts.kd == pytest.approx(large.kd, rel=1e-5)
    assert parts.anchor == pytest.approx(large.anchor, rel=1e-5)
    assert parts.gold == pytest.approx(large.gold, rel=1e-5)
    assert parts.total == pytest.approx(large.total, rel=1e-5)
    assert parts.coefficients == pytest.approx(large.coefficients, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=2e-6, msg=name)


def test_a_teacher_of_two_capabilities_has_the_mean_of_both_however_the_step_is_cut(spec, tokenizer):
    prose = tuple(replace(row, id=f"p{row.id}", capability="prose") for row in text_rows(4))
    everyone = {row.id: row for row in (*text_rows(4), *prose)}

    def answer(teacher, request):
        return _joined(
            [
                token_targets(TEACHERS[0], (everyone[name],), tokenizer, seed=sum(map(ord, name)))
                for name in request.row_ids
            ]
        )

    losses = []
    for rows, accumulate in ((4, 1), (2, 2)):
        loop, _ = _loop(
            spec,
            tokenizer,
            rows=rows,
            accumulate=accumulate,
            source=RecordedSource(answer),
            assignments={Assignment("same", "math"): text_rows(4), Assignment("same", "prose"): prose},
        )
        losses.append(loop.advance().losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_accumulation_asks_for_the_targets_of_whole_steps_ahead(spec, tokenizer):
    loop, source = _loop(spec, tokenizer, accumulate=2, window=1)
    loop.advance()
    assert max(draw for kind, draw in source.log if kind == "submit") == 3
    assert loop.batches.peek(0).draw == 2


@pytest.mark.parametrize("taught", [True, False])
def test_a_spike_at_an_accumulated_step_skips_all_its_draws(spec, tokenizer, taught):
    """Steps are counted, not draws, and nothing of the step may stay behind."""
    loop, _ = _loop(spec, tokenizer, accumulate=2, spike=Spike(1, "nan", math.nan), taught=taught)
    before = {}
    reports = []

    def on_report(report):
        reports.append(report)
        if report.draw == 0:
            before.update(_weights(loop))
        if report.draw == 2:
            _assert_equal(before, _weights(loop))

    loop.run(on_report=on_report, should_stop=lambda: False, save=lambda: None)
    assert [report.draw for report in reports][:4] == [0, 2, 4, 6]
    assert [report.action for report in reports].count("skip") == 1
    assert reports[1].action == "skip"
    assert loop.step == 8


# Averaged weights, later teachers.


def test_the_average_follows_the_weights_and_is_restored_by_a_rollback(spec, tokenizer):
    recovery = RecoveryConfig(flags_to_rollback=1, certify_steps=1, suspect_margin=0, warmup=4, window=8)
    averages = {}
    loop, _ = _loop(
        spec,
        tokenizer,
        steps=20,
        snapshot_every=2,
        spike=Spike(12, "scale", 1e6),
        recovery=recovery,
        learning_rate=1e-4,
        ema_decay=0.9,
    )

    def on_report(report):
        averages.setdefault(loop.step, _copy(loop.average.state_dict()["weights"]))
        if report.action == "rollback":
            restored = loop.average.state_dict()["weights"]
            for name, tensor in averages[report.restored_step].items():
                assert torch.equal(restored[name], tensor), name
            seen.append(report)

    seen = []
    loop.run(on_report=on_report, should_stop=lambda: False, save=lambda: None)
    assert seen
    last = loop.average.state_dict()["weights"]
    weights = dict(loop.objective.named_parameters())
    assert any(not torch.equal(last[name], weights[name]) for name in last)


def test_a_later_teacher_is_not_asked_before_its_step_and_rises_in_weight(spec, tokenizer):
    loop, source = _loop(spec, tokenizer, ramps={"labels": (2, 4)})
    asked = []
    submit = source.submit

    def recorded(key, teacher, request):
        asked.append((key[0], teacher))
        submit(key, teacher, request)

    source.submit = recorded
    _, reports = _run(loop)
    assert [set(report.losses) for report in reports[:3]] == [{"same"}, {"same"}, {"labels", "same"}]
    assert min(draw for draw, teacher in asked if teacher == "labels") == 2
    assert [report.shares for report in reports] == [
        {"labels": share} for share in (0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0)
    ]
    weights = [report.coefficients["labels"] for report in reports[2:6]]
    assert weights[0] < 0.3
    assert weights[0] < weights[3]
    renewed = [incident for incident in loop.recovery.incidents if incident.kind == "rebaseline"]
    assert len(renewed) >= 2  # it came in, and the baselines were frozen


def test_a_later_teacher_whose_step_is_skipped_to_is_still_not_asked_too_early(spec, tokenizer):
    """Skips move the draws of the first step that it takes part in: what was asked for and is not needed yet is not waited for."""
    loop, _ = _loop(spec, tokenizer, ramps={"labels": (2, 4)}, spike=Spike(1, "nan", math.nan))
    _, reports = _run(loop)
    assert [set(report.losses) for report in reports[:4]] == [{"same"}, {"same"}, {"same"}, {"labels", "same"}]


def test_a_broken_teacher_is_left_out_and_named(spec, tokenizer):
    source = _source(tokenizer)
    whole = source.answer

    def answer(teacher, request):
        targets = whole(teacher, request)
        if teacher == "labels":
            targets = replace(targets, label_logprobs_BC=np.full_like(targets.label_logprobs_BC, np.nan))
        return targets

    source.answer = answer
    loop, _ = _loop(spec, tokenizer, source=source, surgery_method="upgrad", surgery_every=1)
    report = loop.advance()
    assert report.action == "step"
    assert report.excluded == ("labels",)
    assert set(report.coefficients) == {"same"}
    assert math.isfinite(report.total)


def test_accumulation_needs_no_labelled_rows(spec, tokenizer):
    loop, _ = _loop(spec, tokenizer, accumulate=2, labelled=False)
    report = loop.advance()
    assert report.gold is None
    assert report.action == "step"


def test_where_the_plan_found_no_conflict_the_steps_between_are_plain(spec, tokenizer):
    """Orthogonal teachers: each on parameters of its own."""
    loop, _ = _loop(spec, tokenizer, surgery_method="upgrad", surgery_every=4, surgery_subset="adapters")
    plain, _ = _loop(spec, tokenizer)
    _, reports = _run(loop)
    _, expected = _run(plain)
    assert reports[0].surgery.plan.conflicts == 0
    assert [report.total for report in reports] == pytest.approx([report.total for report in expected], rel=1e-4)
    assert [report.grad_norm for report in reports] == pytest.approx(
        [report.grad_norm for report in expected], rel=1e-3
    )
