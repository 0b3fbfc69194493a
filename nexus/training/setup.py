"""From a run's configuration to a distillation loop: tokenizer, student, streams, losses. The same for trainers and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nexus.config import RunConfig, resolve_path
from nexus.data.collate import length_check
from nexus.data.loader import RecordBatches
from nexus.data.media import UsableBatches
from nexus.data.quarantine import Quarantine
from nexus.data.targets import TargetWriter, check_targets
from nexus.errors import ArtifactError, ConfigError
from nexus.student.memory import NexusStudent
from nexus.student.presets import StudentSpec, load_student_spec
from nexus.student.shipped import student_preset
from nexus.student.trunk import PretrainedCore, add_lora, load_pretrained, merge_lora
from nexus.towers.checkpoint import open_checkpoint, weights_digest
from nexus.training.average import averaged
from nexus.training.batches import Assignment, RecordStream, StepBatches
from nexus.training.checkpoint import load_checkpoint, load_trained
from nexus.training.facts import CapabilityFacts, TeacherFacts, TokenTransport
from nexus.training.loop import DistillationLoop, LoopSettings, TargetSource, parse_spike
from nexus.training.loss import GradientSurgeryLoss
from nexus.training.objective import DistillationObjective, align_with_teachers
from nexus.training.recovery import RecoveryConfig, SampleQuarantine

TOKENIZER_DIR = "tokenizer"
"""Folder of the run directory that keeps the student's tokenizer, so that later stages need no teacher."""


TEACHER_TOKENIZERS_DIR = "teacher_tokenizers"
"""Folder of the run directory with the tokenizers of teachers that are compared span by span."""


def build_student_spec(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, teachers: Sequence[TeacherFacts], *, taught: bool
) -> StudentSpec:
    """The preset with the tokenizer's vocabulary and the router's keywords; when taught, with an alignment per critical layer."""
    spec = load_student_spec(student_preset(config), trunk=_trunk(config))
    # A language model may have more output rows than its tokenizer has ids; targets can name any of them.
    sizes = [teacher.vocabulary_size or 0 for teacher in teachers if teacher.shares_tokenizer]
    spec = spec.with_vocabulary(
        max([len(tokenizer), *sizes, *([] if config.student.trunk is None else [spec.core.vocab_size])]),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    keywords = tuple((source.towers[0], source.keywords) for source in config.data if source.keywords)
    spec = replace(spec, router=replace(spec.router, keywords=keywords))
    if not taught:
        return spec
    towers = {
        teacher.id: tuple(tower for capability in teacher.capabilities for tower in config.data_of(capability).towers)
        for teacher in config.teachers
    }
    return align_with_teachers(spec, teachers, towers)


def build_loop(
    config: RunConfig,
    *,
    run_dir: Path,
    teachers: Sequence[TeacherFacts],
    source: TargetSource | None,
    taught: bool,
    inject_spike: str | None = None,
    steps_ahead: int | None = None,
    device: str = "cpu",
) -> DistillationLoop:
    """A loop at step 0 with freshly initialised weights; `config.seed` fixes everything.

    Args:
        run_dir: holds the tokenizer and the language teachers' answers.
        teachers: all teachers of the run.
        source: where targets come from; needed when taught.
        taught: False trains the same student from the labelled rows alone.
        inject_spike: see `parse_spike`.
        steps_ahead: whose targets are asked for while the student trains; None takes `distill.window`.
        device: of the student. Its weights are drawn on the CPU, so that they are the same everywhere.

    Raises:
        ConfigError, DataError, ArtifactError: when the configuration's parts do not fit each other or the data.
    """
    distill = config.distill
    _refuse_unused(config, teachers)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / TOKENIZER_DIR)
    torch.manual_seed(config.seed)
    student = _student(config, build_student_spec(config, tokenizer, teachers, taught=taught))
    if distill.gradient_checkpointing:
        student.core.save_activations_less()
    teachers = teachers if taught else ()
    objective = DistillationObjective(
        student,
        tokenizer,
        teachers=teachers,
        capabilities=[CapabilityFacts(data.capability, data.towers, data.snr_db) for data in config.data],
        temperature=distill.temperature,
        temperature_squared=distill.temperature_squared,
        top_k=distill.top_k,
        response_weight=distill.response_weight,
        max_length=config.student.max_length,
        divergence=distill.divergence,
        precision=distill.precision,
        standardise=distill.standardise,
        transports={teacher.id: transport_of(config, teacher.id) for teacher in teachers if teacher.shares_tokenizer},
        tokenizers=teacher_tokenizers(config, run_dir, teachers),
        head_of=None if source is None else lambda teacher: source.head(teacher),
    ).to(device)
    importance = {teacher.id: teacher.importance for teacher in teachers}
    surgery = (
        GradientSurgeryLoss(
            importance,
            mode=distill.variance.mode,
            penalty=distill.variance.penalty,
            ramp_steps=distill.variance.ramp_steps,
            warmup_steps=distill.variance.warmup_steps,
        )
        if teachers
        else None
    )
    return DistillationLoop(
        objective,
        _batches(config, run_dir, teachers, tokenizer),
        source,
        importance=importance,
        surgery=surgery,
        recovery=RecoveryConfig(max_rollbacks=distill.recovery.max_rollbacks),
        quarantine=SampleQuarantine(
            _prepared(run_dir / "quarantine") / f"samples-{'distilled' if teachers else 'labels_only'}.jsonl"
        ),
        settings=LoopSettings(
            steps=distill.steps,
            optimizer=distill.optimizer,
            learning_rate=distill.learning_rate,
            schedule=distill.schedule,
            warmup_steps=distill.warmup_steps,
            final_rate=distill.final_rate,
            decay_share=distill.decay_share,
            weight_decay=distill.weight_decay,
            grad_clip=distill.grad_clip,
            accumulate=distill.accumulate,
            ema_decay=distill.ema_decay,
            gold_weight=distill.gold_weight,
            anchor_start=distill.anchor_start,
            anchor_end=distill.anchor_end,
            window=distill.window if steps_ahead is None else steps_ahead,
            snapshot_every=distill.recovery.snapshot_every,
            checkpoint_every=distill.checkpoint_every,
            surgery_method=distill.surgery.method,
            surgery_every=distill.surgery.every,
            surgery_subset=distill.surgery.subset,
            ramps={
                teacher.id: (teacher.start_step, teacher.ramp_steps)
                for teacher in config.teachers
                if teacher.start_step or teacher.ramp_steps
            },
            seed=config.seed,
        ),
        spike=None if inject_spike is None else parse_spike(inject_spike, steps=distill.steps),
    )


def _trunk(config: RunConfig) -> Path | None:
    return None if config.student.trunk is None else resolve_path(config.student.trunk)


def _student(config: RunConfig, spec: StudentSpec) -> NexusStudent:
    """A student to train: a pretrained trunk has its weights, frozen, and updates of low rank beside them."""
    student = NexusStudent(spec)
    trunk = _trunk(config)
    if trunk is not None:
        assert isinstance(student.core, PretrainedCore)
        load_pretrained(student.core, trunk)
        add_lora(student.core, rank=config.student.lora.rank, alpha=config.student.lora.alpha)
    return student


def training_sources(config: RunConfig, teachers: Sequence[TeacherFacts] = ()) -> dict[str, str]:
    """What a checkpoint's weights are learned from besides the configuration, as `save_checkpoint` takes it.

    A teacher counts where it goes on teaching; what the trained student is used for afterwards needs the trunk alone.
    """
    trunk = _trunk(config)
    sources = {f"teacher {teacher.id}": teacher.fingerprint for teacher in teachers}
    return sources if trunk is None else {"the pretrained trunk": weights_digest(open_checkpoint(trunk)), **sources}


def _refuse_unused(config: RunConfig, teachers: Sequence[TeacherFacts]) -> None:
    """Refuse what the configuration alone could not: settings that the loaded teachers leave without effect."""
    for teacher in teachers:
        own = next(entry.transport for entry in config.teachers if entry.id == teacher.id)
        if own is not None and teacher.role == "causal_lm" and not teacher.shares_tokenizer:
            raise ConfigError(
                f"transport of teacher {teacher.id!r}: expected none, because its tokenizer is not the student's, found {own}, which "
                "has no effect: its spans travel as topk, and without spans no distributions do. Remove it."
            )
    sizes = [
        teacher.vocabulary_size
        for teacher in teachers
        if teacher.vocabulary_size is not None
        and (config.transport_of(teacher.id) == "topk" or not teacher.shares_tokenizer)
    ]
    if config.distill.top_k != type(config.distill).model_fields["top_k"].default and config.distill.top_k > max(
        sizes, default=config.distill.top_k
    ):
        raise ConfigError(
            f"distill.top_k: expected at most the {max(sizes)} ids of the teachers' largest vocabulary, found "
            f"{config.distill.top_k}. Lower it, or choose transport full."
        )
    default = type(config.distill).model_fields["response_weight"].default
    other = any(teacher.role == "causal_lm" and not teacher.shares_tokenizer for teacher in teachers)
    if config.distill.cross_tokenizer == "spans" and not other:
        raise ConfigError(
            "distill.cross_tokenizer: expected a language model whose tokenizer is not the student's, found none: spans has no "
            "effect. Remove it."
        )
    if config.distill.response_weight != default and not other:
        raise ConfigError(
            f"distill.response_weight: expected the default {default} while every language model shares the student's tokenizer, "
            f"found {config.distill.response_weight}, which has no effect. Remove it."
        )


def transport_of(config: RunConfig, teacher: str) -> TokenTransport:
    """How a teacher's token distributions are asked for."""
    distill, kind = config.distill, config.transport_of(teacher)
    return TokenTransport(
        kind,
        draws=distill.draws if kind == "sampled" else None,
        max_error=distill.transport_error if kind == "auto" else None,
    )


def save_tokenizer(checkpoint: Path, run_dir: Path) -> None:
    """Keep a teacher's tokenizer in the run directory: the student speaks it, and later stages need no teacher for it."""
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(run_dir / TOKENIZER_DIR)


def save_teacher_tokenizer(checkpoint: Path, run_dir: Path, teacher: str) -> None:
    """Keep the tokenizer of a teacher that is compared span by span; the trainer has no other way to it."""
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(run_dir / TEACHER_TOKENIZERS_DIR / teacher)


def compared_by_span(config: RunConfig, teachers: Sequence[TeacherFacts]) -> list[str]:
    """Language teachers of another tokenizer whose distributions are learned from."""
    if config.distill.cross_tokenizer != "spans":
        return []
    return [teacher.id for teacher in teachers if teacher.role == "causal_lm" and not teacher.shares_tokenizer]


def teacher_tokenizers(
    config: RunConfig, run_dir: Path, teachers: Sequence[TeacherFacts]
) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers that `save_teacher_tokenizer` kept, of the teachers that are compared by span."""
    folder = run_dir / TEACHER_TOKENIZERS_DIR
    return {name: AutoTokenizer.from_pretrained(folder / name) for name in compared_by_span(config, teachers)}


def _prepared(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _batches(
    config: RunConfig, run_dir: Path, teachers: Sequence[TeacherFacts], tokenizer: PreTrainedTokenizerBase
) -> StepBatches:
    quarantine = Quarantine(run_dir / "quarantine", config.quarantine.max_bad_share)
    facts = {teacher.id: teacher for teacher in teachers}
    unlabelled: dict[Assignment, RecordStream] = {}
    for number, teacher in enumerate(config.teachers):
        if teacher.id not in facts:
            continue
        for capability in teacher.capabilities:
            source = config.data_of(capability)
            paths = _unlabelled_paths(run_dir, facts[teacher.id], capability) or [
                resolve_path(text) for text in source.pool
            ]
            batches = RecordBatches(
                paths,
                capability=capability,
                batch_size=source.batch_size,
                seed=config.seed * 1000 + number,
                quarantine=quarantine,
            )
            # A classifier's label becomes the row's answer; a teacher of features alone gives none.
            answers = facts[teacher.id].label_texts or (("",) if facts[teacher.id].role == "encoder" else None)
            fits = length_check(tokenizer, config.student.max_length, answers=answers)
            unlabelled[Assignment(teacher.id, capability)] = UsableBatches(batches, quarantine, fits)
    labelled: dict[str, RecordStream] = {
        source.capability: UsableBatches(
            RecordBatches(
                [resolve_path(text) for text in source.labelled],
                capability=source.capability,
                batch_size=config.distill.labelled_batch_size,
                seed=config.seed,
                quarantine=quarantine,
            ),
            quarantine,
            length_check(tokenizer, config.student.max_length),
        )
        for source in config.data
        if source.labelled and config.distill.gold_weight
    }
    return StepBatches(unlabelled, labelled)


def _unlabelled_paths(run_dir: Path, teacher: TeacherFacts, capability: str) -> list[Path]:
    """Files with the language teacher's own answers; empty for encoders, which answer live."""
    if teacher.role != "causal_lm":
        return []
    files = TargetWriter.files(run_dir / "targets" / teacher.id, capability)
    if not files:
        raise ArtifactError(
            f"Expected {teacher.id}'s answers under {run_dir / 'targets' / teacher.id}, found none. Run `nexus extract` first."
        )
    for path in files:
        check_targets(path, teacher.fingerprint)
    return files


def load_trained_student(
    config: RunConfig, run_dir: Path, name: str, teachers: Sequence[TeacherFacts], *, taught: bool
) -> tuple[NexusStudent, PreTrainedTokenizerBase]:
    """Student and tokenizer of the newest checkpoint of `name`; `teachers` and `taught` as in `build_loop`.

    The weights are the averaged ones where the run keeps an average.

    Raises:
        ArtifactError: when there is no checkpoint, or it is damaged or of another configuration.
    """
    folder = run_dir / "checkpoints" / name
    found = load_checkpoint(folder, fingerprint=config.fingerprint(), sources=training_sources(config))
    if found is None:
        raise ArtifactError(f"Expected a checkpoint in {folder}, found none. Run `nexus distill` first.")
    _, weights, state = found
    if state["average"] is not None:
        weights = averaged(weights, state["average"])
    tokenizer = AutoTokenizer.from_pretrained(run_dir / TOKENIZER_DIR)
    student = _student(config, build_student_spec(config, tokenizer, teachers, taught=taught))
    prefix = "student."
    load_trained(student, {key[len(prefix) :]: tensor for key, tensor in weights.items() if key.startswith(prefix)})
    if isinstance(student.core, PretrainedCore):
        merge_lora(student.core)
    return student.eval(), tokenizer
