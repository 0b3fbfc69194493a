"""A run's configuration becomes a student and a loop: with the shipped teachers in this process, over their real data."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from nexus.config import SAMPLES_DIR, RunConfig, load_config
from nexus.data.collate import tokenise_rows
from nexus.data.loader import iter_records
from nexus.data.quarantine import read_quarantine
from nexus.data.targets import TargetWriter
from nexus.errors import ArtifactError, ConfigError
from nexus.student.memory import NexusStudent
from nexus.student.shipped import student_positions
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.registry import TeacherSpec, shipped_config
from nexus.training.batches import Assignment
from nexus.training.checkpoint import load_trained, save_checkpoint, trained_weights
from nexus.training.facts import TeacherFacts
from nexus.training.setup import (
    build_loop,
    build_student_spec,
    load_trained_student,
    save_teacher_tokenizer,
    save_tokenizer,
    training_sources,
)

ROLES = {"reasoning": "causal_lm", "code": "causal_lm", "vision": "encoder", "audio": "encoder"}
OVERRIDES = (
    "distill.cross_tokenizer=responses",
    "distill.steps=2",
    "distill.warmup_steps=1",
    "distill.labelled_batch_size=2",
    "distill.checkpoint_every=1",
    "distill.window=1",
    "student.max_length=96",
    *(f"data.{capability}.batch_size=2" for capability in ROLES),
)


@pytest.fixture(scope="module")
def engines() -> dict[str, TeacherEngine]:
    torch.set_num_threads(1)
    found = {}
    for capability, role in ROLES.items():
        teacher = f"sample-{capability}"
        spec = TeacherSpec(teacher, str(SAMPLES_DIR / "teachers" / teacher), None, role)
        found[teacher] = TeacherEngine(load_tower(spec, device="cpu"), teacher_id=teacher)
    return found


@pytest.fixture(scope="module")
def teachers(engines) -> tuple[TeacherFacts, ...]:
    student_hash = engines["sample-reasoning"].tokenizer_hash
    return tuple(
        TeacherFacts(
            id=teacher,
            role=engine.role,
            importance=1.0,
            shares_tokenizer=engine.tokenizer_hash == student_hash,
            vocabulary_size=engine.tower.model.config.vocab_size if engine.role == "causal_lm" else None,
            num_layers=engine.num_layers,
            hidden_size=engine.hidden_size,
            label_texts=engine.label_texts,
            fingerprint=engine.fingerprint,
            critical_layers=((0, 0.5), (engine.num_layers - 1, 0.5)),
        )
        for teacher, engine in engines.items()
    )


@pytest.fixture(scope="module")
def run_dir(engines, tmp_path_factory) -> Path:
    """A run directory as extraction leaves it: the tokenizer, and a few answers of each language teacher."""
    path = tmp_path_factory.mktemp("run")
    save_tokenizer(SAMPLES_DIR / "teachers" / "sample-reasoning", path)
    for capability in ("reasoning", "code"):
        engine = engines[f"sample-{capability}"]
        pool = iter_records([SAMPLES_DIR / capability / "pool.parquet"], capability=capability, quarantine=None)
        rows = [next(pool) for _ in range(5)]
        writer = TargetWriter(
            path / "targets" / engine.teacher_id,
            capability=capability,
            fingerprint=engine.fingerprint,
            rows_per_file=3,
        )
        writer.write(rows, engine.answer(rows, max_new_tokens=12))
        writer.finish()
    return path


class EnginesSource:
    """Targets from teachers of this process."""

    def __init__(self, engines):
        self.engines, self.requests, self.asked = engines, {}, set()

    def submit(self, key, teacher, request):
        self.requests[key] = (teacher, request)
        self.asked.add(teacher)

    def collect(self, key):
        teacher, request = self.requests.pop(key)
        return self.engines[teacher].score(request)

    def forget(self):
        self.requests.clear()


def _config(*overrides: str) -> RunConfig:
    return load_config(shipped_config("quickstart.yaml"), [*OVERRIDES, *overrides])


def _loop(config, run_dir, teachers, engines, *, taught=True, inject_spike=None, steps_ahead=None):
    source = EnginesSource(engines) if taught else None
    loop = build_loop(
        config,
        run_dir=run_dir,
        teachers=teachers,
        source=source,
        taught=taught,
        inject_spike=inject_spike,
        steps_ahead=steps_ahead,
    )
    return loop, source


def _run(loop):
    reports, saved = [], []
    assert loop.run(on_report=reports.append, should_stop=lambda: False, save=lambda: saved.append(loop.step))
    return reports, saved


def test_the_vocabulary_holds_every_id_that_targets_can_name(run_dir, teachers, tokenizer):
    sharing, *others = teachers
    wide = replace(sharing, vocabulary_size=len(tokenizer) + 64)
    other = replace(others[0], shares_tokenizer=False, vocabulary_size=10**6)
    config = _config()
    assert build_student_spec(config, tokenizer, [wide, other], taught=False).core.vocab_size == len(tokenizer) + 64
    spec = build_student_spec(config, tokenizer, [replace(sharing, vocabulary_size=None)], taught=False)
    assert spec.core.vocab_size == len(tokenizer)
    assert (spec.core.pad_token_id, spec.core.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_the_router_knows_the_keywords_of_the_data_and_alignments_exist_only_when_taught(teachers, tokenizer):
    config = _config()
    taught, alone = (build_student_spec(config, tokenizer, teachers, taught=taught) for taught in (True, False))
    assert taught.router.keywords == tuple((data.towers[0], data.keywords) for data in config.data if data.keywords)
    assert {tower for tower, _ in alone.router.keywords} == {"reasoning", "vision", "audio"}
    assert [len(adapter.alignments) for adapter in alone.adapters().values()] == [0, 0, 0]
    # Two critical layers each; classifiers also teach their labels.
    assert [len(adapter.alignments) for adapter in taught.adapters().values()] == [2, 3, 3]
    assert (
        replace(taught, reasoning=None, vision=None, audio=None).to_dict()
        == replace(alone, reasoning=None, vision=None, audio=None).to_dict()
    )


def test_a_taught_student_steps_on_every_teacher_s_real_targets(run_dir, teachers, engines):
    config = _config()
    loop, source = _loop(config, run_dir, teachers, engines)
    assert loop.objective.student.spec.core.vocab_size >= len(loop.objective.tokenizer)
    before = {name: tensor.clone() for name, tensor in loop.objective.named_parameters()}
    reports, saved = _run(loop)
    assert [report.action for report in reports] == ["step", "step"]
    assert saved == [1, 2]
    assert source.asked == set(engines)
    for report in reports:
        assert set(report.losses) == set(report.kd) == set(report.anchor) == set(engines)
        assert all(np.isfinite(list(report.losses.values())))
        assert report.gold is not None
        # Two unlabelled rows of each teacher, two labelled ones of each capability.
        assert report.rows == 16
    # Only the router, which the route stage trains, stays as it was.
    after = dict(loop.objective.named_parameters())
    unchanged = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert unchanged == {name for name in before if name.startswith("student.router.")}


def test_language_rows_come_with_the_teachers_own_answers(run_dir, teachers, engines):
    loop, _ = _loop(_config(), run_dir, teachers, engines)
    batch = loop.batches.peek(0)
    written = {
        (row.prompt, row.completion)
        for path in TargetWriter.files(run_dir / "targets" / "sample-reasoning", "reasoning")
        for row in iter_records([path], capability="reasoning", quarantine=None)
    }
    assert len(written) == 5
    answered = batch.unlabelled[Assignment("sample-reasoning", "reasoning")]
    assert {(row.prompt, row.completion) for row in answered} <= written
    assert all(row.media is not None for row in batch.unlabelled[Assignment("sample-vision", "vision")])


def test_no_step_holds_a_row_that_is_too_long_for_the_student(run_dir, teachers, engines, tokenizer):
    loop, _ = _loop(_config("student.max_length=45", "quarantine.max_bad_share=1.0"), run_dir, teachers, engines)
    drawn = [row for ahead in range(12) for rows in loop.batches.peek(ahead).unlabelled.values() for row in rows]
    lengths = [len(row) for row in tokenise_rows([row for row in drawn if row.completion], tokenizer)]
    assert 0 < max(lengths) <= 45
    written = [row.reason for row in read_quarantine(run_dir / "quarantine")]
    assert any("expected 1 to 45 tokens" in reason for reason in written)


def test_the_student_has_as_many_positions_as_its_preset_says(tokenizer, teachers):
    config = _config()
    spec = build_student_spec(config, tokenizer, teachers, taught=False)
    assert student_positions(config) == spec.core.max_position_embeddings == 512


def test_equal_seeds_build_equal_loops_and_another_seed_another(run_dir, teachers, engines):
    def start(seed):
        loop, _ = _loop(_config(f"seed={seed}"), run_dir, teachers, engines)
        weights = torch.cat([tensor.flatten() for tensor in loop.objective.parameters()])
        return weights, loop.batches.peek(0).sample_ids

    (weights, ids), (same_weights, same_ids), (other_weights, other_ids) = (start(seed) for seed in (3, 3, 4))
    assert torch.equal(weights, same_weights)
    assert ids == same_ids
    assert not torch.equal(weights, other_weights)
    assert ids != other_ids


def test_targets_that_are_asked_for_further_ahead_give_the_same_weights(run_dir, teachers, engines):
    found = []
    for ahead in (None, 5):
        loop, source = _loop(_config(), run_dir, teachers, engines, steps_ahead=ahead)
        loop.advance()
        # One step's targets are collected, those of the steps ahead are not.
        assert len(source.requests) == len(teachers) * (ahead or loop.settings.window)
        loop.advance()
        found.append(trained_weights(loop.objective))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_without_teachers_the_same_student_trains_on_the_labelled_rows_alone(run_dir, teachers, engines):
    taught, _ = _loop(_config(), run_dir, teachers, engines)
    loop, _ = _loop(_config(), run_dir, teachers, engines, taught=False)
    assert loop.objective.student.core.config.to_dict() == taught.objective.student.core.config.to_dict()
    batch = loop.batches.peek(0)
    assert batch.unlabelled == {}
    assert {name: len(rows) for name, rows in batch.labelled.items()} == dict.fromkeys(ROLES, 2)
    reports, _ = _run(loop)
    assert [report.losses for report in reports] == [{}, {}]


def test_capabilities_without_labelled_rows_are_taught_by_their_teachers_alone(run_dir, teachers, engines):
    loop, _ = _loop(_config("data.vision.labelled=[]"), run_dir, teachers, engines)
    batch = loop.batches.peek(0)
    assert set(batch.labelled) == {"reasoning", "code", "audio"}
    assert Assignment("sample-vision", "vision") in batch.unlabelled


def test_settings_reach_the_loop(run_dir, teachers, engines):
    config = _config("distill.learning_rate=0.25", "distill.window=3", "distill.grad_clip=0.5", "seed=7")
    loop, _ = _loop(config, run_dir, teachers, engines)
    assert (loop.settings.learning_rate, loop.settings.window, loop.settings.seed) == (0.25, 3, 7)
    names = set(loop.settings.__dataclass_fields__) & set(type(config.distill).model_fields)
    assert {"steps", "gold_weight", "anchor_start", "anchor_end", "weight_decay"} <= names
    assert {name: getattr(loop.settings, name) for name in names} == {
        name: getattr(config.distill, name) for name in names
    }


def test_an_injected_spike_is_caught_and_its_samples_are_written_down(run_dir, teachers, engines, tmp_path):
    (tmp_path / "tokenizer").symlink_to(run_dir / "tokenizer")
    loop, _ = _loop(_config(), tmp_path, teachers, engines, taught=False, inject_spike="1:nan")
    hit = list(loop.batches.peek(1).sample_ids)
    reports, _ = _run(loop)
    assert [report.action for report in reports] == ["step", "skip", "step"]
    lines = (tmp_path / "quarantine" / "samples-labels_only.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"event": "suspect", "epoch": 0, "sample_ids": hit}]


def test_a_spike_that_cannot_be_read_is_refused(run_dir, teachers, engines):
    with pytest.raises(ConfigError, match="STEP:nan or STEP:xFACTOR"):
        _loop(_config(), run_dir, teachers, engines, taught=False, inject_spike="soon")


def test_missing_answers_of_a_language_teacher_name_the_stage_that_makes_them(run_dir, teachers, engines, tmp_path):
    (tmp_path / "tokenizer").symlink_to(run_dir / "tokenizer")
    with pytest.raises(ArtifactError, match=r"sample-reasoning's answers.*Run `nexus extract` first"):
        _loop(_config(), tmp_path, teachers, engines)


def test_answers_of_a_changed_teacher_are_refused(run_dir, teachers, engines):
    changed = tuple(replace(teacher, fingerprint="other") for teacher in teachers)
    with pytest.raises(ArtifactError, match="the teacher changed since"):
        _loop(_config(), run_dir, changed, engines)


@pytest.mark.parametrize("taught", [True, False])
def test_a_checkpoint_gives_back_the_student_it_was_taken_of(run_dir, teachers, engines, tmp_path, taught):
    config = _config()
    (tmp_path / "tokenizer").symlink_to(run_dir / "tokenizer")
    (tmp_path / "targets").symlink_to(run_dir / "targets")
    loop, _ = _loop(config, tmp_path, teachers, engines, taught=taught)
    loop.advance()
    save_checkpoint(
        tmp_path / "checkpoints" / "any",
        step=loop.step,
        fingerprint=config.fingerprint(),
        weights=trained_weights(loop.objective),
        state=loop.state_dict(),
    )
    student, tokenizer = load_trained_student(config, tmp_path, "any", teachers, taught=taught)
    assert not student.training
    assert tokenizer.get_vocab() == loop.objective.tokenizer.get_vocab()
    expected = loop.objective.student.state_dict()
    assert student.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student.state_dict().items())


def test_a_missing_checkpoint_names_the_stage_that_writes_it(run_dir, teachers):
    with pytest.raises(ArtifactError, match=r"nowhere, found none\. Run `nexus distill` first"):
        load_trained_student(_config(), run_dir, "nowhere", teachers, taught=False)


def test_averaged_weights_are_what_later_stages_get(run_dir, teachers, engines, tmp_path):
    config = _config("distill.ema_decay=0.9")
    (tmp_path / "tokenizer").symlink_to(run_dir / "tokenizer")
    loop, _ = _loop(config, tmp_path, teachers, engines, taught=False)
    loop.advance()
    loop.advance()
    save_checkpoint(
        tmp_path / "checkpoints" / "any",
        step=loop.step,
        fingerprint=config.fingerprint(),
        weights=trained_weights(loop.objective),
        state=loop.state_dict(),
    )
    student, _ = load_trained_student(config, tmp_path, "any", teachers, taught=False)
    average = loop.average.state_dict()["weights"]
    weights = dict(loop.objective.named_parameters())
    found = dict(student.named_parameters())
    name = "core.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[name], average[f"student.{name}"])
    assert not torch.equal(found[name], weights[f"student.{name}"])
    assert student.core.lm_head.weight is student.core.embed_tokens.weight
    assert torch.equal(student.core.lm_head.weight, average["student.core.embed_tokens.weight"])


def test_a_pretrained_trunk_is_trained_by_updates_and_exported_without_them(
    run_dir, teachers, engines, tokenizer, tmp_path
):
    torch.manual_seed(5)
    trunk = tmp_path / "trunk"
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=max(len(tokenizer), *(teacher.vocabulary_size or 0 for teacher in teachers)),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=160,
            tie_word_embeddings=True,
        )
    ).save_pretrained(trunk)
    for name in ("tokenizer", "targets"):
        (tmp_path / name).symlink_to(run_dir / name)
    config = _config(
        f"student.trunk={trunk}", "student.tokenizer=null", "student.lora.rank=4", "distill.gradient_checkpointing=true"
    )
    assert student_positions(config) == 160
    loop, _ = _loop(config, tmp_path, teachers, engines)
    before = {name: tensor.clone() for name, tensor in loop.objective.named_parameters()}
    reports, _ = _run(loop)
    assert all(np.isfinite(report.total) for report in reports)
    changed = {name for name, tensor in loop.objective.named_parameters() if not torch.equal(tensor, before[name])}
    in_trunk = {name for name in changed if name.startswith("student.core.trunk.")}
    assert in_trunk
    assert all(".lora_" in name for name in in_trunk)
    assert {name for name in changed if name.startswith("student.core.ports.")}
    assert {name for name in changed if name.startswith("student.adapters.")}
    weights = trained_weights(loop.objective)
    assert not [name for name in weights if ".trunk." in name and ".lora_" not in name]
    sources = training_sources(config)
    state = loop.state_dict()
    save_checkpoint(
        tmp_path / "checkpoints" / "any",
        step=2,
        fingerprint=config.fingerprint(),
        sources=sources,
        weights=weights,
        state=state,
    )
    student, _ = load_trained_student(config, tmp_path, "any", teachers, taught=True)
    student.drop_alignments()
    student.save_pretrained(tmp_path / "student")
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = loop.objective.eval().student.core(ids).logits
    with (trunk / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(ArtifactError, match="Expected the pretrained trunk as it was when"):
        load_trained_student(config, tmp_path, "any", teachers, taught=True)
    shutil.rmtree(trunk)
    alone = NexusStudent.from_pretrained(tmp_path / "student").eval()
    assert not [name for name in alone.state_dict() if "lora" in name]
    torch.testing.assert_close(alone.core(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_passes_leave_weights_and_losses_in_float32(run_dir, teachers, engines):
    totals = []
    for precision in ("float32", "bfloat16"):
        loop, _ = _loop(_config(f"distill.precision={precision}"), run_dir, teachers, engines)
        reports, _ = _run(loop)
        totals.append([report.total for report in reports])
        assert {parameter.dtype for parameter in loop.objective.parameters()} == {torch.float32}
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.02)


def test_recomputed_activations_give_the_same_losses(run_dir, teachers, engines):
    totals = []
    for choice in ("false", "true"):
        loop, _ = _loop(_config(f"distill.gradient_checkpointing={choice}"), run_dir, teachers, engines)
        reports, _ = _run(loop)
        totals.append([report.total for report in reports])
    assert totals[1] == pytest.approx(totals[0], rel=1e-6)


def test_weights_of_another_student_are_refused_by_name(run_dir, teachers, engines):
    loop, _ = _loop(_config(), run_dir, teachers, engines, taught=False)
    weights = trained_weights(loop.objective)
    name = sorted(weights)[0]
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        load_trained(loop.objective, {key: tensor for key, tensor in weights.items() if key != name})


def test_a_transport_of_a_teacher_with_another_tokenizer_is_refused(run_dir, teachers, engines):
    config = _config("teachers.sample-code.transport=full")
    with pytest.raises(ConfigError, match=r"transport of teacher 'sample-code'.*found full, which has no effect"):
        _loop(config, run_dir, teachers, engines, taught=False)


def test_more_kept_ids_than_any_vocabulary_has_are_refused(run_dir, teachers, engines):
    with pytest.raises(ConfigError, match=r"distill\.top_k: expected at most the \d+ ids .* found 1000000"):
        _loop(_config("distill.top_k=1000000"), run_dir, teachers, engines, taught=False)


def test_labelled_rows_without_weight_are_not_read(run_dir, teachers, engines):
    config = _config("distill.gold_weight=0.0", "distill.labelled_batch_size=4", "distill.labels_only=false")
    loop, _ = _loop(config, run_dir, teachers, engines)
    assert not loop.batches.peek(0).labelled


def test_a_weight_of_answers_that_no_teacher_needs_is_refused(run_dir, teachers, engines):
    shared = tuple(replace(teacher, shares_tokenizer=True) for teacher in teachers)
    with pytest.raises(ConfigError, match="response_weight: expected the default"):
        _loop(_config("distill.response_weight=0.5"), run_dir, shared, engines, taught=False)


def test_a_teacher_of_another_tokenizer_is_also_compared_span_by_span_where_that_is_chosen(run_dir, teachers, engines):
    save_teacher_tokenizer(SAMPLES_DIR / "teachers" / "sample-code", run_dir, "sample-code")
    reports = {}
    for choice in ("responses", "spans"):
        loop, source = _loop(_config(f"distill.cross_tokenizer={choice}"), run_dir, teachers, engines)
        asked = []
        submit = source.submit
        source.submit = lambda key, teacher, request, asked=asked, submit=submit: (
            asked.append((teacher, request.temperature)),
            submit(key, teacher, request),
        )
        reports[choice] = loop.advance()
        assert ("sample-code", 1.0 if choice == "spans" else 2.0) in asked
        assert ("sample-reasoning", 2.0) in asked
    assert reports["responses"].aligned == {}
    assert set(reports["spans"].aligned) == {"sample-code"}
    assert 0.0 < reports["spans"].aligned["sample-code"] <= 1.0
    assert reports["spans"].kd["sample-code"] > reports["responses"].kd["sample-code"]
    assert reports["spans"].kd["sample-reasoning"] == reports["responses"].kd["sample-reasoning"]
    assert reports["spans"].grad_norm != reports["responses"].grad_norm


def test_spans_without_a_teacher_of_another_tokenizer_are_refused(run_dir, teachers, engines):
    shared = tuple(replace(teacher, shares_tokenizer=True) for teacher in teachers)
    with pytest.raises(ConfigError, match="cross_tokenizer: expected a language model whose tokenizer"):
        _loop(_config("distill.cross_tokenizer=spans"), run_dir, shared, engines, taught=False)
