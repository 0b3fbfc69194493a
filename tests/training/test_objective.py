"""The losses of one step: each term changes the gradients of what it trains, and nothing else slips in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest_training import (
    CAPABILITIES,
    WIDTH,
    facts,
    image_rows,
    label_targets,
    text_rows,
    token_targets,
)

from nexus.data.collate import collate
from nexus.errors import ConfigError, TowerLoadError
from nexus.student.memory import NexusStudent
from nexus.towers.health import FingerprintChangedError, RowCountError
from nexus.towers.targets import FullTargets, HiddenTargets, SampledTargets, TeacherHead, TokensAlone
from nexus.training.batches import Assignment
from nexus.training.divergence import distill_divergence, forward_kl
from nexus.training.facts import TeacherFactsFile, TokenTransport
from nexus.training.objective import (
    DistillationObjective,
    align_with_teachers,
    check_answered,
    label_token_ids,
)

TOWERS = {"same": ("reasoning",), "other": (), "labels": ("vision",), "same2": ()}


def _objective(spec, tokenizer, teachers, *, towers=None, seed=0, **changes) -> DistillationObjective:
    torch.manual_seed(seed)
    spec = align_with_teachers(spec, teachers, towers or {teacher.id: TOWERS[teacher.id] for teacher in teachers})
    student = NexusStudent(spec)
    # An untrained port is closed; opened, gradients can be seen to reach what stands behind it.
    for port in student.core.ports.values():
        torch.nn.init.constant_(port.gate_D, 0.5)
    settings = {"temperature": 2.0, "top_k": 8, "response_weight": 1.0, "max_length": 64}
    return DistillationObjective(
        student, tokenizer, teachers=teachers, capabilities=CAPABILITIES, **{**settings, **changes}
    )


def _gradient_names(objective, loss) -> set[str]:
    objective.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {name for name, p in objective.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


def test_token_distillation_trains_trunk_and_reasoning_tower(spec, tokenizer):
    teacher = facts("same")
    objective = _objective(spec, tokenizer, [teacher])
    rows = text_rows()
    loss = objective.teacher_loss(Assignment("same", "math"), rows, token_targets(teacher, rows, tokenizer))
    trained = _gradient_names(objective, loss.kd)
    assert "student.core.layers.1.mlp.down.weight" in trained or any("layers.1" in name for name in trained)
    assert any(name.startswith("student.adapters.reasoning") for name in trained)
    assert not any("alignments" in name for name in trained)
    assert not any(name.startswith(("student.adapters.vision", "student.adapters.audio")) for name in trained)


def test_the_anchor_trains_the_alignment_and_what_feeds_it(spec, tokenizer):
    teacher = facts("same")
    objective = _objective(spec, tokenizer, [teacher])
    rows = text_rows()
    loss = objective.teacher_loss(Assignment("same", "math"), rows, token_targets(teacher, rows, tokenizer))
    trained = _gradient_names(objective, loss.anchor)
    assert {name for name in trained if "alignments" in name} == {
        *(f"student.adapters.reasoning.alignments.{index}.{part}" for index in (0, 1) for part in ("weight", "bias")),
        *(f"trunk_alignments.same:{layer}.{part}" for layer in (0, 3) for part in ("weight", "bias")),
    }
    assert "student.core.embed_tokens.weight" in trained


def test_token_distillation_equals_the_dense_reference_at_full_vocabulary(spec, tokenizer):
    teacher = facts("same", critical_layers=())
    objective = _objective(spec, tokenizer, [teacher], temperature=2.0)
    rows = text_rows()
    targets = token_targets(teacher, rows, tokenizer, top_k=len(tokenizer))
    loss = objective.teacher_loss(Assignment("same", "math"), rows, targets)

    batch = collate(rows, tokenizer, max_length=64, padding_side="right")
    with torch.no_grad():
        output = objective.student(
            batch.input_ids_BT,
            batch.attention_mask_BT,
            prompt_mask_BT=batch.attention_mask_BT.bool() & ~batch.loss_mask_BT,
            tower_mask_BN=torch.tensor([[True, False, False]] * len(rows)),
        )
    logits = output.trunk.logits[:, :-1][batch.loss_mask_BT[:, 1:]].double()
    q = (logits / 2.0).softmax(-1).numpy()
    p = np.zeros_like(q)
    np.put_along_axis(
        p, targets.tokens.ids_NK.astype(int), np.exp(targets.tokens.logprobs_NK.astype(np.float64)), axis=1
    )
    a = 0.1

    def kl(x, y):
        return (x * (np.log(x) - np.log(y))).sum(axis=1).mean()

    reference = 4.0 * (0.5 * kl(p, a * p + (1 - a) * q) + 0.5 * kl(q, (1 - a) * p + a * q))
    assert float(loss.kd.detach()) == pytest.approx(reference, rel=1e-4)
    assert float(loss.anchor) == 0.0


def _transported(targets, logits_NV, kind, temperature=2.0):
    """The same teacher's targets in another transport."""
    scored = (targets.tokens.offsets_B1, targets.tokens.token_ids_N)
    logprobs = (logits_NV / temperature).log_softmax(-1)
    if kind == "full":
        return replace(targets, tokens=FullTargets(*scored, logprobs.numpy()))
    ids = torch.multinomial(logprobs.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    drawn = logprobs.gather(-1, ids).numpy()
    return replace(targets, tokens=SampledTargets(*scored, ids.int().numpy(), drawn))


@pytest.mark.parametrize("extra", [0, 5])
def test_every_transport_teaches_the_same_distribution(spec, tokenizer, extra):
    """Full, hidden and all ids give one loss and one gradient; draws give the forward KL. The teacher's head may be padded."""
    teacher = facts("same", critical_layers=())
    size = len(tokenizer) + extra
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(size, WIDTH, generator=generator)
    # An id that only the padding knows has no probability.
    bias = torch.zeros(size).index_fill(0, torch.arange(len(tokenizer), size), -30.0)
    rows = text_rows()
    whole = token_targets(teacher, rows, tokenizer, top_k=len(tokenizer))
    states = torch.randn(len(whole.tokens.token_ids_N), WIDTH, generator=generator)
    logits = states @ head.T + bias
    kept = (logits[:, : len(tokenizer)] / 2.0).log_softmax(-1).topk(len(tokenizer))
    whole = replace(
        whole,
        tokens=replace(
            whole.tokens,
            ids_NK=kept.indices.int().numpy(),
            logprobs_NK=kept.values.numpy(),
            tail_logprob_N=np.full(len(logits), -np.inf, np.float32),
        ),
    )
    scored = (whole.tokens.offsets_B1, whole.tokens.token_ids_N)
    asked = []

    def head_of(name: str) -> TeacherHead:
        asked.append(name)
        return TeacherHead(head.numpy(), bias.numpy(), None)

    objective = _objective(spec, tokenizer, [teacher], towers={"same": ()}, head_of=head_of)
    assignment = Assignment("same", "prose")
    found = {}
    for name, targets in {
        "topk": whole,
        "full": _transported(whole, logits, "full"),
        "hidden": replace(whole, tokens=HiddenTargets(*scored, states.numpy())),
        "sampled": _transported(whole, logits[:, : len(tokenizer)], "sampled"),
    }.items():
        objective.zero_grad(set_to_none=True)
        loss = objective.teacher_loss(assignment, rows, targets).kd
        loss.backward()
        found[name] = (loss.detach(), objective.student.core.lm_head.weight.grad.clone())
    for name in ("full", "hidden"):
        torch.testing.assert_close(found[name][0], found["topk"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name][1], found["topk"][1], rtol=1e-3, atol=1e-5)
    objective.teacher_loss(assignment, rows, replace(whole, tokens=HiddenTargets(*scored, states.numpy())))
    assert asked == ["same"]
    with torch.no_grad():
        student = objective._forward(rows, [row.completion for row in rows]).scored_logits_NV
    count = len(student)
    reference = 4 * forward_kl(
        student[None],
        logits[None, :, : len(tokenizer)],
        torch.ones(1, count),
        num_loss_tokens=count,
        temperature=2.0,
    )
    # 20,000 draws of numbers of size 1 to 10.
    assert float(found["sampled"][0]) == pytest.approx(float(reference), rel=0.05)


@pytest.mark.parametrize("divergence", ["mix", "forward_kl"])
def test_a_wide_head_computes_its_logits_twice_and_gives_the_same(spec, tokenizer, divergence, monkeypatch):
    """Also: the divergence is the configured one in every transport that has it."""
    teacher = facts("same", critical_layers=())
    rows = text_rows()
    whole = token_targets(teacher, rows, tokenizer, top_k=len(tokenizer))
    count = len(whole.tokens.token_ids_N)
    head, states = torch.randn(len(tokenizer), WIDTH), torch.randn(count, WIDTH)
    kept = (states @ head.T / 2.0).log_softmax(-1).topk(len(tokenizer))
    scored = (whole.tokens.offsets_B1, whole.tokens.token_ids_N)
    hidden = replace(whole, tokens=HiddenTargets(*scored, states.numpy()))
    ids = replace(whole.tokens, ids_NK=kept.indices.int().numpy(), logprobs_NK=kept.values.numpy())
    objective = _objective(
        spec,
        tokenizer,
        [teacher],
        divergence=divergence,
        head_of=lambda _name: TeacherHead(head.numpy(), None, None),
    )
    losses = [objective.teacher_loss(Assignment("same", "math"), rows, hidden).kd]
    monkeypatch.setattr("nexus.training.objective.ONE_PASS_HEAD_BYTES", 0)
    losses.append(objective.teacher_loss(Assignment("same", "math"), rows, hidden).kd)
    losses.append(objective.teacher_loss(Assignment("same", "math"), rows, replace(whole, tokens=ids)).kd)
    student = objective._forward(rows, [row.completion for row in rows]).scored_logits_NV
    function = forward_kl if divergence == "forward_kl" else distill_divergence
    setting = {"num_loss_tokens": count, "temperature": 2.0}
    losses.append(4 * function(student[None], (states @ head.T)[None], torch.ones(1, count), **setting))
    for loss in losses[:-1]:
        assert float(loss.detach()) == pytest.approx(float(losses[-1].detach()), rel=1e-4)


@pytest.mark.parametrize("kind", ["same", "labels"])
def test_the_square_of_the_temperature_is_a_choice(spec, tokenizer, kind):
    teacher = facts(kind, critical_layers=())
    rows, capability = (text_rows(), "math") if kind == "same" else (image_rows(), "sight")
    targets = token_targets(teacher, rows, tokenizer) if kind == "same" else label_targets(teacher, rows)
    squared, plain = (
        _objective(spec, tokenizer, [teacher], temperature=3.0, temperature_squared=chosen).teacher_loss(
            Assignment(kind, capability), rows, targets
        )
        for chosen in (True, False)
    )
    torch.testing.assert_close(squared.kd, 9.0 * plain.kd)


def test_a_bfloat16_head_is_used_as_the_teacher_does(spec, tokenizer):
    teacher = facts("same", critical_layers=())
    rows = text_rows()
    whole = token_targets(teacher, rows, tokenizer)
    head = torch.randn(len(tokenizer), WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    states = np.ones((len(whole.tokens.token_ids_N), WIDTH), np.float32)
    hidden = replace(whole, tokens=HiddenTargets(whole.tokens.offsets_B1, whole.tokens.token_ids_N, states))
    losses = []
    for sent in (head.float().numpy(), head.view(torch.int16).numpy().view(np.uint16)):
        objective = _objective(
            spec, tokenizer, [teacher], head_of=lambda _name, sent=sent: TeacherHead(sent, None, 5.0)
        )
        losses.append(float(objective.teacher_loss(Assignment("same", "math"), rows, hidden).kd.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_requests_name_the_transport_of_teachers_that_share_the_tokenizer(spec, tokenizer):
    transports = {"same": TokenTransport("sampled", draws=5), "other": TokenTransport("auto", max_error=0.1)}
    objective = _objective(spec, tokenizer, [facts("same"), facts("other")], transports=transports)
    request = objective.request(Assignment("same", "math"), text_rows())
    assert (request.transport, request.draws, request.max_error) == ("sampled", 5, None)
    other = objective.request(Assignment("other", "prose"), text_rows(capability="prose"))
    assert (other.transport, other.draws, other.max_error) == ("none", None, None)


def test_no_loss_reads_distributions_in_other_tokens_unless_spans_are_compared(spec, tokenizer):
    teacher, rows = facts("other"), text_rows(capability="prose")
    assignment, targets = (
        Assignment("other", "prose"),
        token_targets(facts("other"), text_rows(capability="prose"), tokenizer),
    )
    assert targets.tokens is not None
    alone = replace(targets, tokens=TokensAlone(targets.tokens.offsets_B1, targets.tokens.token_ids_N))
    whole, without = (
        _objective(spec, tokenizer, [teacher]).teacher_loss(assignment, rows, found) for found in (targets, alone)
    )
    assert torch.equal(whole.kd, without.kd)
    assert torch.equal(whole.anchor, without.anchor)
    by_span = _objective(spec, tokenizer, [teacher], tokenizers={"other": tokenizer})
    assert by_span.request(assignment, rows).transport == "topk"


def test_another_tokenizer_is_taught_by_the_text_of_its_answers(spec, tokenizer):
    teacher = facts("other")
    objective = _objective(spec, tokenizer, [teacher], response_weight=0.5)
    rows = text_rows(capability="prose")
    loss = objective.teacher_loss(Assignment("other", "prose"), rows, token_targets(teacher, rows, tokenizer))
    batch = collate(rows, tokenizer, max_length=64, padding_side="right")
    logits = objective.student.core(batch.input_ids_BT, batch.attention_mask_BT).logits
    mask = batch.loss_mask_BT[:, 1:]
    reference = F.cross_entropy(logits[:, :-1][mask], batch.input_ids_BT[:, 1:][mask])
    assert float(loss.kd.detach()) == pytest.approx(0.5 * float(reference.detach()), rel=1e-5)
    assert {name for name in _gradient_names(objective, loss.anchor) if name.startswith("trunk_alignments")} == {
        f"trunk_alignments.other:{layer}.{part}" for layer in (0, 3) for part in ("weight", "bias")
    }


def test_a_teacher_of_another_tokenizer_without_critical_layers_is_not_asked(spec, tokenizer):
    objective = _objective(spec, tokenizer, [facts("other", critical_layers=())])
    rows = text_rows(capability="prose")
    assignment = Assignment("other", "prose")
    assert objective.request(assignment, rows) is None
    assert float(objective.teacher_loss(assignment, rows, None).kd.detach()) > 0


def test_a_language_teacher_without_a_tower_is_anchored_to_the_trunk_token_by_token(spec, tokenizer):
    teacher = facts("same")
    objective = _objective(spec, tokenizer, [teacher], towers={"same": ()})
    rows = text_rows(capability="prose")
    loss = objective.teacher_loss(Assignment("same", "prose"), rows, token_targets(teacher, rows, tokenizer))
    trained = _gradient_names(objective, loss.anchor)
    assert any(name.startswith("trunk_alignments.same:0") for name in trained)
    assert not any("adapters" in name for name in trained)


@pytest.mark.parametrize("positions", [4, 9])
def test_a_classifier_teaches_text_and_its_patches_teach_the_tower(spec, tokenizer, positions):
    teacher = facts("labels")
    objective = _objective(spec, tokenizer, [teacher])
    rows = image_rows()
    loss = objective.teacher_loss(
        Assignment("labels", "sight"), rows, label_targets(teacher, rows, positions=positions)
    )
    assert any(name.startswith("student.core.layers") for name in _gradient_names(objective, loss.kd))
    anchored = _gradient_names(objective, loss.anchor)
    maps = "student.adapters.vision.alignments."
    assert {name for name in anchored if name.startswith(maps)} == {
        f"{maps}{index}.{part}" for index in (0, 1) for part in ("weight", "bias")
    }
    # The third map reads the labels from the pooled features, which the divergence trains.
    assert {name for name in _gradient_names(objective, loss.kd) if name.startswith(maps)} == {
        f"{maps}2.{part}" for part in ("weight", "bias")
    }
    assert not any(name.startswith("student.core") for name in anchored)


def test_the_classifier_s_divergence_is_that_of_its_labels(spec, tokenizer):
    """Over whole answers, the summed token divergence along every label path is the divergence of the label distributions."""
    teacher = facts("labels", label_texts=("3", "7"), critical_layers=())
    objective = _objective(spec, tokenizer, [teacher], temperature=1.0)
    rows = image_rows(1)
    targets = label_targets(teacher, rows)
    loss = objective.teacher_loss(Assignment("labels", "sight"), rows, targets)
    chosen = teacher.label_texts[int(targets.label_logprobs_BC[0].argmax())]
    batch = collate(rows, tokenizer, max_length=64, padding_side="right", completions=[chosen])
    passed = objective._forward(rows, [chosen])
    logq = passed.scored_logits_NV.log_softmax(-1)
    paths = label_token_ids(teacher.label_texts, tokenizer)
    p = np.exp(targets.label_logprobs_BC[0].astype(np.float64))
    tower = objective.student.adapters["vision"]
    label_logq = tower.predict("labels", "pooled", passed.features["vision"][1])[0].log_softmax(-1).detach().numpy()
    own = (p * (np.log(p) - label_logq)).sum()
    first = sum(p[c] * (np.log(p[c]) - float(logq[0, paths[c][0]].detach())) for c in (0, 1))
    # After the first digit the teacher is certain: the label ends.
    rest = -float(logq[1, paths[0][-1]].detach())
    assert batch.loss_mask_BT.sum() == 2
    assert float(loss.kd.detach()) == pytest.approx((first + rest) / 2 + own, rel=1e-4)


def test_gold_rows_of_several_capabilities_share_one_pass_and_equal_their_own(spec, tokenizer):
    objective = _objective(spec, tokenizer, [])
    groups = {"math": text_rows(2), "prose": text_rows(3, "prose"), "sight": image_rows(2)}
    together = objective.gold_loss(groups)
    apart = torch.stack([objective.gold_loss({name: rows}) for name, rows in groups.items()]).mean()
    assert float(together.detach()) == pytest.approx(float(apart.detach()), rel=1e-5)
    trained = _gradient_names(objective, together)
    assert any("adapters.vision" in name for name in trained)
    assert any("adapters.reasoning" in name for name in trained)
    assert not any("adapters.audio" in name for name in trained)


def test_the_answer_never_reaches_the_reasoning_context(spec, tokenizer):
    """Changing later answer tokens changes no earlier prediction."""
    objective = _objective(spec, tokenizer, [facts("same")])
    row = text_rows(1)[0]
    one, two = (objective._forward([row], [completion]) for completion in ("1+1=2", "1+1=9"))
    same = (one.scored_ids_N == two.scored_ids_N).long().cumprod(0).sum()
    torch.testing.assert_close(one.scored_logits_NV[: same + 1], two.scored_logits_NV[: same + 1])


def test_requests_carry_what_each_kind_of_teacher_needs(spec, tokenizer):
    objective = _objective(spec, tokenizer, [facts("same"), facts("labels")])
    text = objective.request(Assignment("same", "math"), text_rows())
    assert text.completions == tuple(row.completion for row in text_rows())
    assert (text.media, text.temperature, text.top_k, text.layers) == (None, 2.0, 8, (0, 3))
    image = objective.request(Assignment("labels", "sight"), image_rows())
    assert image.completions is None
    assert image.media == tuple(row.media.data for row in image_rows())
    assert objective.request(Assignment("same", "math"), ()) is None


def test_targets_of_a_changed_teacher_or_another_tokenizer_are_refused(spec, tokenizer):
    teacher = facts("same")
    objective = _objective(spec, tokenizer, [teacher])
    rows = text_rows()
    targets = token_targets(teacher, rows, tokenizer)
    with pytest.raises(RowCountError, match="rows that are not those"):
        objective.teacher_loss(Assignment("same", "math"), rows[::-1], targets)
    with pytest.raises(FingerprintChangedError, match="changed during the run"):
        objective.teacher_loss(Assignment("same", "math"), rows, replace(targets, fingerprint="new"))
    other = replace(targets.tokens, token_ids_N=targets.tokens.token_ids_N + 1)
    with pytest.raises(TowerLoadError, match="the tokenizers differ"):
        objective.teacher_loss(Assignment("same", "math"), rows, replace(targets, tokens=other))


def test_a_row_without_a_completion_names_the_remedy(spec, tokenizer):
    objective = _objective(spec, tokenizer, [facts("same")])
    row = replace(text_rows(1)[0], completion=None)
    with pytest.raises(TowerLoadError, match="Extract the teacher's answers first"):
        objective.request(Assignment("same", "math"), [row])


def _feature_targets(teacher, rows, *, width=WIDTH):
    random = np.random.default_rng(0)
    labelled = label_targets(replace(teacher, label_texts=("1",)), rows)
    pooled_BE = random.normal(size=(len(rows), width)).astype(np.float32)
    return replace(labelled, label_texts=None, label_logprobs_BC=None, pooled_BE=pooled_BE)


def test_an_encoder_without_labels_teaches_the_tower_by_its_features_alone(spec, tokenizer):
    teacher = facts("labels", label_texts=None)
    objective = _objective(spec, tokenizer, [teacher])
    rows = tuple(replace(row, completion=None) for row in image_rows())
    loss = objective.teacher_loss(Assignment("labels", "sight"), rows, _feature_targets(teacher, rows))
    assert float(loss.kd) == 0
    trained = _gradient_names(objective, loss.anchor)
    maps = "student.adapters.vision.alignments."
    assert {name for name in trained if name.startswith(maps)} == {
        f"{maps}{index}.{part}" for index in (0, 1, 2) for part in ("weight", "bias")
    }
    assert not any(name.startswith("student.core") for name in trained)
    assert loss.tokens > len(rows)


def test_the_pooled_embedding_alone_anchors_a_teacher_without_critical_layers(spec, tokenizer):
    teacher = facts("labels", label_texts=None, critical_layers=())
    objective = _objective(spec, tokenizer, [teacher])
    rows = image_rows()
    targets = _feature_targets(teacher, rows)
    first = objective.teacher_loss(Assignment("labels", "sight"), rows, targets)
    other = objective.teacher_loss(
        Assignment("labels", "sight"), rows, replace(targets, pooled_BE=np.flip(targets.pooled_BE, axis=1).copy())
    )
    assert float(first.anchor.detach()) > 0
    assert float(first.anchor.detach()) != float(other.anchor.detach())


def test_pooled_embeddings_of_another_width_than_the_blocks_are_refused(spec, tokenizer):
    teacher = facts("labels", label_texts=None)
    objective = _objective(spec, tokenizer, [teacher])
    rows = image_rows()
    with pytest.raises(TowerLoadError, match="pooled embeddings of"):
        objective.teacher_loss(Assignment("labels", "sight"), rows, _feature_targets(teacher, rows, width=WIDTH + 1))


def test_the_scored_tokens_of_a_teacher_are_counted(spec, tokenizer):
    teacher = facts("same")
    objective = _objective(spec, tokenizer, [teacher])
    rows = text_rows()
    targets = token_targets(teacher, rows, tokenizer)
    assert objective.teacher_loss(Assignment("same", "math"), rows, targets).tokens == len(targets.tokens.token_ids_N)


def test_a_capability_that_nobody_answers_is_refused():
    teachers = [facts("same"), facts("labels", label_texts=None)]
    check_answered(teachers, {"sight": ["labels", "same"]})
    with pytest.raises(ConfigError, match="'sight' that answers in text"):
        check_answered(teachers, {"sight": ["labels"]})


def test_an_encoder_without_a_tower_to_teach_is_refused(spec):
    with pytest.raises(ConfigError, match="vision or audio under"):
        align_with_teachers(spec, [facts("labels")], {"labels": ()})


def test_changing_the_profile_s_critical_layers_changes_the_loss(spec, tokenizer):
    rows = text_rows()
    losses = []
    for layers in (((0, 1.0),), ((3, 1.0),), ((0, 0.5), (3, 0.5))):
        teacher = facts("same", critical_layers=layers)
        objective = _objective(spec, tokenizer, [teacher], seed=1)
        targets = token_targets(facts("same"), rows, tokenizer)
        losses.append(float(objective.teacher_loss(Assignment("same", "math"), rows, targets).anchor.detach()))
    assert len(set(losses)) == 3


def test_facts_survive_their_file():
    teachers = (facts("same"), facts("labels", vocabulary_size=7))
    document = TeacherFactsFile.from_facts(teachers).model_dump_json()
    assert TeacherFactsFile.model_validate_json(document).to_facts() == teachers
