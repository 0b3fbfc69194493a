"""The schema of one run's YAML. Imports no torch, so that a typo is found in milliseconds on any machine.

`load_config` reads a file, applies `--set a.b=c` overrides, and returns a frozen `RunConfig` or raises `ConfigError` with one
line that names every bad key and the nearest known one. Defaults live here and nowhere else.

Paths: a path that begins with `samples:` lies in the data that ship with nexus; any other is relative to the working directory.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nexus.artifacts import StrictModel, fingerprint_of
from nexus.errors import ConfigError

SAMPLES_PREFIX = "samples:"
SAMPLES_DIR = Path(__file__).parent / "data" / "samples"

Role = Literal["causal_lm", "encoder", "codec_lm", "codec", "diffusion", "sae"]
Transport = Literal["topk", "hidden", "sampled", "full", "auto"]
Divergence = Literal["mix", "forward_kl"]
Optimizer = Literal["adamw", "muon", "adamw8bit", "paged_adamw8bit"]
Tower = Literal["reasoning", "vision", "audio"]
TOWERS: tuple[Tower, ...] = get_args(Tower)
"""The student's towers, in the order of the router's heads."""


class ConfigSection(StrictModel):
    """Base of the sections: numbers are finite, so that no comparison with a bound passes or fails by being NaN."""

    model_config = ConfigDict(allow_inf_nan=False)


def resolve_path(text: str) -> Path:
    """The file or folder that a path of the configuration means."""
    if text.startswith(SAMPLES_PREFIX):
        return SAMPLES_DIR / text[len(SAMPLES_PREFIX) :]
    return Path(text)


# --- teachers -----------------------------------------------------------------------------------------------------------------


class _TeacherBase(ConfigSection):
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the teacher in this run; its actor is `teacher:<id>`."""
    capabilities: tuple[str, ...] = Field(min_length=1)
    """Rows of these capabilities go to this teacher."""
    importance: Annotated[float, Field(gt=0, le=1.0e6)] | Literal["profile"] = 1.0
    """Weight among the teachers; normalised to sum 1. `profile` takes the geometric mean of the probabilities that the teacher gave
    to the right tokens (or labels) of the rows that it was profiled on: a weak teacher then has little say."""
    anchor: bool = True
    """Anchor the student to the hidden states of this teacher's critical layers."""
    placement: Literal["memory", "streamed"] = "memory"
    """`streamed` leaves the teacher's blocks in `cache.dir` and runs a batch through one after the other, for an encoder that exceeds
    the device. A run asks language models for answers, token by token, so they cannot be streamed in it."""
    replicas: int = Field(1, gt=0, le=64)
    """Copies of this teacher, each an actor with all its weights; work is spread over them and comes to the same results."""
    transport: Transport | None = None
    """How this language model's token distributions travel; None takes `distill.transport`."""
    targets: Literal["live", "cached"] | None = None
    """Whether this teacher answers while the student trains; None takes `distill.targets`."""
    start_step: int = Field(0, ge=0)
    """First optimizer step that this teacher takes part in."""
    ramp_steps: int = Field(0, ge=0)
    """Steps over which its importance then rises from 0."""


class RegistryTeacher(_TeacherBase):
    """A row of configs/teachers.yaml, found by its id in --models-dir or the Hugging Face cache."""

    kind: Literal["registry"]


class PathTeacher(_TeacherBase):
    """A checkpoint folder on this machine (or on a disk that all nodes share)."""

    kind: Literal["path"]
    path: str
    role: Role
    skip_modules: tuple[str, ...] = ()
    """Module names that stay in floating point."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Smallest share of the parameters that must be stored in NF4."""


class HubTeacher(_TeacherBase):
    """A Hugging Face repository, read from the local cache (`nexus teachers pull` fills it)."""

    kind: Literal["hub"]
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str
    role: Role
    skip_modules: tuple[str, ...] = ()
    min_coverage: float = Field(0.5, ge=0, le=1)


TeacherConfig = Annotated[Union[RegistryTeacher, PathTeacher, HubTeacher], Field(discriminator="kind")]


# --- data ---------------------------------------------------------------------------------------------------------------------


class DataConfig(ConfigSection):
    """One capability: its rows, how an answer is scored, and which student towers its rows need."""

    capability: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    pool: tuple[str, ...] = Field(min_length=1)
    """Unlabelled rows for distillation: Parquet, JSONL or CSV files."""
    labelled: tuple[str, ...] = ()
    """A few rows with gold answers; they train the student's cross-entropy and the labels-only baseline."""
    test: tuple[str, ...] = Field(min_length=1)
    """Held-out rows; never trained on."""
    towers: tuple[Tower, ...] = ()
    """Towers that these rows need; empty means the trunk alone. The router learns them."""
    answer: Literal["gsm8k", "exact"] = "exact"
    """`gsm8k` scores the number after `####`, `exact` the whole completion without outer white space."""
    max_new_tokens: int = Field(gt=0, le=4096)
    """Longest completion, in tokens of whoever generates."""
    chance: float = Field(0.0, ge=0, lt=1)
    """Score of guessing, removed from both sides of the retention."""
    contract: float = Field(0.9, gt=0, le=1)
    """Share of the teacher's score that the student has to keep."""
    batch_size: int = Field(gt=0)
    """Unlabelled rows of this capability in one optimizer step."""
    snr_db: float | None = None
    """Noise added to audio at load, as signal-to-noise ratio; None adds none."""
    keywords: tuple[str, ...] = ()
    """Words that send a row to the first of `towers` when the router is unsure."""

    @model_validator(mode="after")
    def _keywords_need_a_tower(self) -> DataConfig:
        if self.keywords and not self.towers:
            raise ValueError(f"keywords of capability {self.capability!r} have no effect without towers; remove them")
        return self


class QuarantineConfig(ConfigSection):
    """What happens to rows that cannot be read."""

    max_bad_share: float = Field(0.01, ge=0, le=1)
    """A run stops when more than this share of a file's rows is bad."""


# --- student ------------------------------------------------------------------------------------------------------------------


class LoraSection(ConfigSection):
    """Low-rank updates on every linear map of a pretrained trunk's layers (LoRA, arXiv 2106.09685)."""

    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    """The update is scaled by alpha / rank."""


class StudentConfig(ConfigSection):
    """The student: a preset of configs/student and the tokenizer it speaks."""

    preset: str = "quickstart"
    """Name of a file in configs/student, without its ending."""
    tokenizer: str | None = None
    """Id of the teacher whose tokenizer the student takes over; that teacher's token distributions then need no alignment. A
    pretrained trunk brings its own."""
    trunk: str | None = None
    """Folder of a causal language model of transformers whose layers take the place of the preset's core; None trains one from
    scratch. Its weights are frozen: what trains is the updates of `lora`, the ports, and the adapters."""
    lora: LoraSection = LoraSection()
    max_length: int = Field(256, gt=0)
    """Longest prompt plus completion, in student tokens; longer rows are quarantined."""

    @model_validator(mode="after")
    def _one_tokenizer(self) -> StudentConfig:
        if (self.tokenizer is None) == (self.trunk is None):
            found = "neither" if self.trunk is None else "both"
            raise ValueError(
                f"expected either tokenizer (the id of a teacher) or trunk (a pretrained model with its own), found {found}"
            )
        for name in ("rank", "alpha"):
            _refuse_changed(self.lora, name, f"lora.{name}", "there is no trunk" if self.trunk is None else None)
        return self


# --- stages -------------------------------------------------------------------------------------------------------------------


class ProfileConfig(ConfigSection):
    """NIWT layer profiling."""

    max_samples: int = Field(256, gt=0)
    """Rows of each capability at most."""
    min_samples: int = Field(64, gt=0)
    """Rows of each capability (at most max_samples) before the critical layers are first looked at; sampling of a teacher ends when
    they are stable at 95 %, checked again at twice, four times, ... as many."""
    confirm_samples: int = Field(32, ge=0)
    """Rows of each teacher that are measured again with mean and noise ablation, the causal check and, where the answer is only a
    part of the completion, generated answers; 0 measures none."""
    budget_seconds: float | None = Field(None, gt=0)
    """No further rows are begun after so long, once every teacher has some; the profiles are then marked partial."""
    batch_size: int = Field(32, gt=0)
    strategy: Literal["auto", "brute", "prefix", "triangular"] = "auto"


class ExtractConfig(ConfigSection):
    """Feature extraction: the teachers' answers to the unlabelled prompts, written once to Parquet."""

    batch_size: int = Field(128, gt=0)
    rows_per_file: int = Field(2048, gt=0)
    max_rows: int | None = Field(None, gt=0)
    """Readable rows of each capability that are answered at most; None answers all. Training draws from the answered ones."""


class RecoverySection(ConfigSection):
    """Loss-spike detection and rollback."""

    snapshot_every: int = Field(50, gt=0)
    """Steps between in-memory snapshots."""
    max_rollbacks: int = Field(3, ge=0)
    """Rollbacks allowed in 1,000 steps before the run stops with its last good state."""


class VarianceSection(ConfigSection):
    """The variance penalty across teachers (V-REx with importance weights)."""

    mode: Literal["variance", "std"] = "variance"
    penalty: float = Field(1.0, ge=0)
    ramp_steps: int = Field(500, gt=0)
    warmup_steps: int = Field(32, gt=0)


class SurgerySection(ConfigSection):
    """Projection of conflicting teacher gradients on the adapters' and trunk's parameters."""

    method: Literal["none", "upgrad", "pcgrad"] = "none"
    every: int = Field(10, gt=0)
    """Steps from one surgery to the next; those between use its weights."""
    subset: Literal["adapters_and_trunk", "adapters", "trunk"] = "adapters_and_trunk"
    """Parameters whose gradients are projected; the maps to the teachers' spaces, which each belong to one teacher, never are."""

    @model_validator(mode="after")
    def _settings_need_a_method(self) -> SurgerySection:
        if self.method == "none":
            chosen = ["every"] if "every" in self.model_fields_set else []
            chosen += ["subset"] if self.subset != "adapters_and_trunk" else []
            if chosen:
                raise ValueError(
                    f"{chosen[0]} has no effect while method is none; remove it or choose upgrad or pcgrad"
                )
        return self


class DistillConfig(ConfigSection):
    """The distillation loop."""

    steps: int = Field(gt=0)
    optimizer: Optimizer = "adamw"
    """muon: orthogonalised updates for the matrices of trunk and adapters, AdamW for the rest; it takes AdamW's rate and decay.
    adamw8bit: AdamW with two moments of 8 bits each in place of 32. paged_adamw8bit: the same, in memory that leaves the GPU when
    something else wants it; it needs a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the student trains; auto takes a GPU where the cluster has one. Its part of that follows cluster.placement."""
    learning_rate: float = Field(gt=0, le=1)
    """Peak. Both kinds of optimizer move a weight by about the rate at each step, so a rate of 1 already forgets all weights."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """The learning rate after its warm-up: a half cosine, the peak with a fall at the end (wsd), or the peak."""
    warmup_steps: int = Field(20, ge=0)
    final_rate: float = Field(0.02, ge=0, le=1)
    """Of the peak, at the last step: a short run gains most of its accuracy while the rate falls."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """Of all steps: the fall of the schedule wsd."""
    weight_decay: float = Field(0.01, ge=0)
    grad_clip: float = Field(1.0, ge=1.0e-6)
    temperature: float = Field(2.0, ge=1.0e-3, le=1.0e3)
    """Softmax temperature of the distillation loss, for teachers and student alike. Beyond its bounds distributions are one-hot or
    uniform in float32."""
    temperature_squared: bool = True
    """Multiply divergences at a temperature T by T^2, which keeps their gradient, and so their balance with the other terms, the
    same at every T (Hinton et al. 2015, arXiv 1503.02531, section 2.1). false leaves them in nats per token."""
    divergence: Divergence = "mix"
    """Of token distributions: `mix` is half a skewed KL(teacher || student) and half a skewed KL(student || teacher), bounded. Draws
    (transport sampled) have the forward KL alone."""
    transport: Transport = "topk"
    """How token distributions travel from teachers that share the student's tokenizer: `topk` (the most probable ids, and a tail
    mass), `hidden` (last hidden states; the trainer holds the teacher's output head and computes exact logits), `sampled` (unbiased
    draws; the divergence is then the forward KL), `full`, or `auto` (of topk, hidden and full the one of fewest bytes that keeps
    `transport_error`)."""
    targets: Literal["live", "cached"] = "live"
    """`live` asks the teachers while the student trains; `cached` lets extraction ask them once, and training needs none of them."""
    top_k: int = Field(64, gt=0)
    """Kept ids per scored token of transport topk; the rest travels as one tail mass."""
    draws: int = Field(12, gt=0)
    """Draws per scored token of transport sampled; 12 match the whole distribution (RS-KD, arXiv 2503.16870)."""
    transport_error: float = Field(0.01, ge=1.0e-4)
    """What transport auto may lose of a distribution, KL in nats per token. Below the least value bfloat16 rounding would count."""
    response_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy on a teacher's own answers, where its vocabulary is not the student's."""
    cross_tokenizer: Literal["responses", "spans"] = "responses"
    """What is learned from a teacher whose vocabulary is not the student's: the text of its answers, or also its distributions, over
    the spans of text that both tokenizers cut out (the others by a distance of sorted probabilities)."""
    gold_weight: float = Field(0.5, ge=0)
    """Weight of the cross-entropy on labelled rows."""
    labelled_batch_size: int = Field(4, gt=0)
    """Labelled rows of each capability in one optimizer step."""
    anchor_start: float = Field(1.0, ge=0)
    anchor_end: float = Field(0.3, ge=0)
    """The hidden-state anchor's weight decays from start to end along a cosine."""
    standardise: Literal["scale", "phi_s"] = "scale"
    """What makes the teachers' hidden states comparable before the student is anchored to them: `scale` centres and divides them by
    one number; `phi_s` also rotates them so that every dimension has variance 1 (PHI-S, arXiv 2410.01680), at the cost of a matrix of
    the teacher's width squared for each anchored layer."""
    window: int = Field(3, gt=0, le=1024)
    """Steps whose teacher targets are in flight while the student trains."""
    target_timeout_s: float = Field(120.0, gt=0)
    """Longest wait for one batch of targets before it is asked for again."""
    max_retries: int = Field(3, ge=0)
    """Repeats of one batch after a teacher died or timed out."""
    checkpoint_every: int = Field(100, gt=0)
    accumulate: int = Field(1, gt=0, le=1024)
    """Draws of `batch_size` rows that make one optimizer step, one in memory at a time; the step equals that of the larger batch."""
    gradient_checkpointing: bool = False
    """Recompute the trunk's activations in the backward pass instead of keeping them: less memory, about a third more time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the student's forward and backward pass; weights, losses and the optimizer stay in float32."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights that is evaluated and exported in place of the last ones; None keeps the last ones."""
    variance: VarianceSection = VarianceSection()
    surgery: SurgerySection = SurgerySection()
    recovery: RecoverySection = RecoverySection()
    labels_only: bool = True
    """Also train the same student on the labelled rows alone, for comparison."""

    @model_validator(mode="after")
    def _factor_of_a_temperature(self) -> DistillConfig:
        reason = "temperature is 1" if self.temperature == 1 else None
        _refuse_changed(self, "temperature_squared", "distill.temperature_squared", reason)
        return self

    @model_validator(mode="after")
    def _pages_have_a_gpu(self) -> DistillConfig:
        if self.device == "cpu" and self.optimizer == "paged_adamw8bit":
            raise ValueError(
                "optimizer paged_adamw8bit needs a GPU, whose memory it pages, found device cpu; choose adamw8bit, or set "
                "distill.device to cuda"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> DistillConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"expected warmup_steps below steps, found {self.warmup_steps} and {self.steps}; raise steps or set "
                "distill.warmup_steps lower"
            )
        return self


TRANSPORT_SETTINGS: Mapping[str, Transport] = {"top_k": "topk", "draws": "sampled", "transport_error": "auto"}
"""Settings of `distill` that only one transport reads."""


class RouterConfig(ConfigSection):
    """Training of the sparse intent router on the frozen student's embedding."""

    steps: int = Field(300, gt=0)
    batch_size: int = Field(64, gt=0)
    learning_rate: float = Field(3.0e-3, gt=0, le=1)
    max_rows: int = Field(500, gt=0)
    """Pool rows of each capability that the router learns from; a fifth of them calibrates it."""
    max_risk: float = Field(0.05, gt=0, lt=1)
    """Largest risk of a wrong confident decision that the threshold admits, at 95 % confidence."""


class EvaluateConfig(ConfigSection):
    """Held-out evaluation."""

    max_rows: int = Field(500, gt=0)
    batch_size: int = Field(100, gt=0)
    bootstrap: int = Field(2000, gt=0)
    num_samples: int = Field(6, ge=0)
    """Rows of each capability that the report shows side by side."""

    @model_validator(mode="after")
    def _samples_are_rows(self) -> EvaluateConfig:
        default = EvaluateConfig.model_fields["num_samples"].default
        if self.num_samples != default and self.num_samples > self.max_rows:
            raise ValueError(
                f"expected num_samples of at most max_rows ({self.max_rows}), found {self.num_samples}; lower it, or raise max_rows"
            )
        return self


class ClusterConfig(ConfigSection):
    """The local Ray instance that is started when no cluster is joined."""

    num_cpus: int = Field(4, gt=1)
    """Logical CPUs; Ray Data needs at least 2 that no actor holds."""
    object_store_mib: int = Field(256, ge=80)
    torch_threads: int = Field(1, gt=0)
    """Threads of each actor's tensor operations."""
    placement: Literal["even", "planned"] = "even"
    """even: all actors hold equal parts of the GPUs. planned: as `nexus plan` says for the cluster that is joined; who does not fit
    sleeps on its own GPU, and spare GPUs get copies of the slowest teachers."""
    gpu_gib: float | None = Field(None, gt=0)
    """Free memory of each GPU for the plan; None asks the GPUs."""
    resident_teachers: int | None = Field(None, gt=0)
    """Teachers that are awake at a time; the others sleep, and the least recently used one is put to sleep for the next. None keeps
    all awake. `nexus plan` says how many fit."""
    sleeper_mib: int = Field(600, gt=0)
    """Private memory that the process of a sleeping teacher may keep; beyond it the process is restarted, which gives back all of it
    and lengthens the wake by some seconds. Without a model a process keeps about 400."""
    turn_batches: int = Field(16, gt=0)
    """Batches that wait for a sleeping teacher before it is woken while nobody needs it yet; distillation asks for the targets of
    twice as many steps ahead, so that waking pays for at least as many. More cost memory, fewer time."""

    @model_validator(mode="after")
    def _sleepers_need_a_limit(self) -> ClusterConfig:
        for name in ("sleeper_mib", "turn_batches"):
            default = ClusterConfig.model_fields[name].default
            if self.resident_teachers is None and self.placement == "even" and getattr(self, name) != default:
                raise ValueError(
                    f"{name} has no effect while all teachers stay awake; remove it or set resident_teachers"
                )
        if self.gpu_gib is not None and self.placement == "even":
            raise ValueError("gpu_gib has no effect while placement is even; remove it or set placement: planned")
        if self.resident_teachers is not None and self.placement == "planned":
            raise ValueError(
                "resident_teachers has no effect while placement is planned, which chooses it; remove one of them"
            )
        return self


class CacheConfig(ConfigSection):
    """Quantised weights of teachers, kept on each node for the next load."""

    dir: str | None = "~/.cache/nexus/nf4"
    """Folder; `~` is the home of whoever loads the teacher. null keeps nothing."""
    min_parameters: int = Field(50_000_000, ge=0)
    """Smaller teachers are quantised anew at every load, which takes them a few seconds."""

    @model_validator(mode="after")
    def _limit_needs_a_folder(self) -> CacheConfig:
        if self.dir is None and "min_parameters" in self.model_fields_set:
            raise ValueError("min_parameters has no effect while dir is null; remove it or name a folder")
        return self


class RunConfig(ConfigSection):
    """One run, from Parquet to report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    teachers: tuple[TeacherConfig, ...] = Field(min_length=1)
    data: tuple[DataConfig, ...] = Field(min_length=1)
    student: StudentConfig
    quarantine: QuarantineConfig = QuarantineConfig()
    profile: ProfileConfig = ProfileConfig()
    extract: ExtractConfig = ExtractConfig()
    distill: DistillConfig
    router: RouterConfig = RouterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _names_agree(self) -> RunConfig:
        ids = [teacher.id for teacher in self.teachers]
        capabilities = [source.capability for source in self.data]
        for names, what in ((ids, "teacher id"), (capabilities, "capability")):
            doubles = sorted({name for name in names if names.count(name) > 1})
            if doubles:
                raise ValueError(f"each {what} may stand once, found {doubles[0]!r} twice; rename one")
        if self.student.tokenizer is not None and self.student.tokenizer not in ids:
            raise ValueError(
                f"student.tokenizer must be the id of a teacher of this run ({', '.join(ids)}), found "
                f"{self.student.tokenizer!r}{_nearest(self.student.tokenizer, ids)}"
            )
        taught = {capability for teacher in self.teachers for capability in teacher.capabilities}
        for capability in capabilities:
            if capability not in taught:
                raise ValueError(
                    f"capability {capability!r} has data but no teacher lists it{_nearest(capability, sorted(taught))}; "
                    "add it to a teacher's capabilities or remove the data"
                )
        for teacher in self.teachers:
            for capability in teacher.capabilities:
                if capability not in capabilities:
                    raise ValueError(
                        f"teacher {teacher.id!r} lists capability {capability!r} but no data carry it"
                        f"{_nearest(capability, capabilities)}; a teacher without rows would starve"
                    )
        return self

    @model_validator(mode="after")
    def _blocks_have_a_folder(self) -> RunConfig:
        streamed = [teacher.id for teacher in self.teachers if teacher.placement == "streamed"]
        if streamed and self.cache.dir is None:
            raise ValueError(
                f"teacher {streamed[0]!r} is streamed from cache.dir, which is null; name a folder, or set its placement to memory"
            )
        return self

    @model_validator(mode="after")
    def _transports_are_used(self) -> RunConfig:
        for teacher in self.teachers:
            if (
                teacher.transport is not None
                and not isinstance(teacher, RegistryTeacher)
                and teacher.role != "causal_lm"
            ):
                raise ValueError(
                    f"transport of teacher {teacher.id!r} has no effect: only language models give token distributions; remove it"
                )
            if self.targets_of(teacher.id) == "cached" and self.transport_of(teacher.id) in ("hidden", "auto"):
                raise ValueError(
                    f"cached targets of teacher {teacher.id!r} travel as topk, sampled or full, found transport "
                    f"{self.transport_of(teacher.id)}, whose receiver asks the teacher for its output head; choose one of them"
                )
        used = {self.transport_of(teacher.id) for teacher in self.teachers}
        if self.distill.cross_tokenizer == "spans":
            used.add("topk")
        for name, transport in TRANSPORT_SETTINGS.items():
            is_default = getattr(self.distill, name) == DistillConfig.model_fields[name].default
            if not is_default and transport not in used:
                raise ValueError(f"distill.{name} has no effect while no teacher's transport is {transport}; remove it")
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> RunConfig:
        """Refuses what would change nothing, where it differs from the default; `nexus.training.setup` refuses what facts decide."""
        distill = self.distill
        for name, reason in {
            "final_rate": "schedule is constant" if distill.schedule == "constant" else None,
            "decay_share": None if distill.schedule == "wsd" else "schedule is not wsd",
            "anchor_start": None if any(teacher.anchor for teacher in self.teachers) else "no teacher is anchored",
            "anchor_end": None if any(teacher.anchor for teacher in self.teachers) else "no teacher is anchored",
            "standardise": None if any(teacher.anchor for teacher in self.teachers) else "no teacher is anchored",
            "gold_weight": None if any(source.labelled for source in self.data) else "no data have labelled rows",
            "labelled_batch_size": "no data have labelled rows"
            if not any(source.labelled for source in self.data)
            else "gold_weight is 0"
            if distill.gold_weight == 0
            else None,
            # A teacher of the registry may be an encoder, which its own file tells; nothing else reads the divergence then either.
            "divergence": "all token distributions are draws, which have the forward KL alone"
            if all(self.transport_of(teacher.id) == "sampled" for teacher in self.teachers if _may_answer(teacher))
            else None,
        }.items():
            _refuse_changed(distill, name, f"distill.{name}", reason)
        if distill.gold_weight == 0 and distill.labels_only and any(source.labelled for source in self.data):
            raise ValueError(
                "labels_only trains on the labelled rows alone, found distill.gold_weight 0, at which nothing would; set "
                "distill.labels_only to false, or raise distill.gold_weight"
            )
        for source in self.data:
            # A teacher of the registry may be an encoder, which its own file tells.
            reads_text = all(
                not isinstance(teacher, RegistryTeacher) and teacher.role == "causal_lm"
                for teacher in self.teachers_of(source.capability)
            )
            if source.snr_db is not None and (reads_text or source.towers) and "audio" not in source.towers:
                raise ValueError(
                    f"snr_db of capability {source.capability!r} has no effect without audio among its towers or an encoder among "
                    "its teachers; remove it"
                )
        alone = "there is one teacher" if len(self.teachers) == 1 else None
        for name in ("mode", "penalty", "ramp_steps"):
            unused = "penalty is 0" if distill.variance.penalty == 0 and name != "penalty" else None
            _refuse_changed(distill.variance, name, f"distill.variance.{name}", alone or unused)
        _refuse_changed(distill.surgery, "method", "distill.surgery.method", alone)
        for teacher in self.teachers:
            for name in ("start_step", "ramp_steps"):
                _refuse_changed(teacher, name, f"{name} of teacher {teacher.id!r}", alone)
            if teacher.start_step >= distill.steps:
                raise ValueError(
                    f"expected start_step of teacher {teacher.id!r} below distill.steps ({distill.steps}), found "
                    f"{teacher.start_step}: it would never take part; lower it"
                )
            if teacher.start_step + teacher.ramp_steps > distill.steps:
                raise ValueError(
                    f"expected start_step + ramp_steps of teacher {teacher.id!r} of at most distill.steps ({distill.steps}), found "
                    f"{teacher.start_step} + {teacher.ramp_steps}: it would never take part in full; lower them"
                )
        return self

    def transport_of(self, teacher: str) -> Transport:
        """How the token distributions of `teacher` travel."""
        own = next(entry.transport for entry in self.teachers if entry.id == teacher)
        return self.distill.transport if own is None else own

    def targets_of(self, teacher: str) -> Literal["live", "cached"]:
        """Whether `teacher` answers while the student trains."""
        own = next(entry.targets for entry in self.teachers if entry.id == teacher)
        return self.distill.targets if own is None else own

    @property
    def cached_teachers(self) -> tuple[str, ...]:
        """Ids of the teachers whose targets are written beforehand."""
        return tuple(teacher.id for teacher in self.teachers if self.targets_of(teacher.id) == "cached")

    def teachers_of(self, capability: str) -> tuple[TeacherConfig, ...]:
        """The teachers that label rows of `capability`, in the order of the file."""
        return tuple(teacher for teacher in self.teachers if capability in teacher.capabilities)

    def data_of(self, capability: str) -> DataConfig:
        """The data section of `capability`."""
        return next(source for source in self.data if source.capability == capability)

    def fingerprint(self, *sections: str) -> str:
        """Hash of the named top-level sections (all of them when none is named)."""
        document = self.model_dump(mode="json")
        return fingerprint_of({key: document[key] for key in (sections or sorted(document))})


def _may_answer(teacher: TeacherConfig) -> bool:
    """Whether it may be a language model."""
    return isinstance(teacher, RegistryTeacher) or teacher.role == "causal_lm"


def _refuse_changed(section: BaseModel, name: str, place: str, reason: str | None) -> None:
    """Raise ValueError for a setting that is not its default although, for `reason`, nothing reads it; None reads it."""
    if reason is not None and getattr(section, name) != type(section).model_fields[name].default:
        raise ValueError(f"{place} has no effect while {reason}; remove it")


# --- loading ------------------------------------------------------------------------------------------------------------------


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Parse the YAML file `path` with `a.b=c` overrides applied; list items are addressed by index or by their id.

    Raises:
        ConfigError: one line naming every bad key, what was expected and the nearest known name.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"Expected a configuration at {path}, found no such file. `nexus init` writes one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Expected a readable YAML file at {path}, found: {error}. Correct --config, or save the file as UTF-8."
        ) from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}, column {place.column + 1}" if place else ""
        problem = getattr(error, "problem", None) or "a syntax error"
        raise ConfigError(f"Expected YAML in {path}, found {problem}{where}. Mend that line.") from None
    if not isinstance(document, dict):
        raise ConfigError(
            f"Expected a mapping at the top of {path}, found {type(document).__name__}. `nexus init` writes one."
        )
    for override in overrides:
        _apply_override(document, override)
    return parse_config(document, source=str(path))


def parse_config(document: dict[str, Any], *, source: str) -> RunConfig:
    """Validate a configuration document; `source` is named in errors.

    Raises:
        ConfigError: one line naming every bad key.
    """
    try:
        # Through JSON: in strict mode only JSON input may spell a tuple as a list.
        return RunConfig.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(error))) from None
    except TypeError as error:
        raise ConfigError(f"{source}: expected plain YAML values, found: {error}. Quote dates and times.") from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    document = config.model_dump(mode="json", exclude_unset=False)
    if config.distill.surgery.method == "none":
        # `every` has no effect then, and a setting without effect is refused when read back.
        document["distill"]["surgery"].pop("every")
    if config.cache.dir is None:
        document["cache"].pop("min_parameters")
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"Expected --set KEY=VALUE, found {override!r}. Example: --set distill.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"Expected a YAML value in --set {override!r}. Quote it.") from None
    *parents, last = key.split(".")
    place: Any = document
    for depth, part in enumerate(parents):
        place = _descend(place, part, ".".join(parents[: depth + 1]), override)
    if isinstance(place, list):
        place[_index(place, last, key, override)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ConfigError(
            f"--set {override!r}: expected a section above {last!r}, found the value {place!r}. Correct the key."
        )


def _descend(place: Any, part: str, path: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, path, override)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise ConfigError(
        f"--set {override!r}: expected a section at {path!r}, found the value {place!r}. Correct the key."
    )


def _index(items: list[Any], part: str, path: str, override: str) -> int:
    names = [item.get("id", item.get("capability")) if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = [name for name in names if name]
    raise ConfigError(
        f"--set {override!r}: expected an index below {len(items)} or one of {', '.join(known)} at {path!r}, found {part!r}. "
        "Correct the key."
    )


def _explain(error: ValidationError) -> Iterator[str]:
    """One clause per mistake: where, what was expected, what was found, what to do."""
    mistakes = error.errors()
    places = [item["loc"] for item in mistakes]
    for item in mistakes:
        if item["type"] == "too_short" and any(place[: len(item["loc"])] == item["loc"] != place for place in places):
            continue  # its items were there, and each bad one is named by itself
        place = ".".join(str(part) for part in item["loc"] if part not in _TEACHER_KINDS or part == item["loc"][-1])
        context = item.get("ctx", {})
        if item["type"] == "extra_forbidden":
            *_, name = item["loc"]
            known = _fields_at(RunConfig, item["loc"][:-1])
            yield f"unknown key {place!r}{_nearest(str(name), known)} (known here: {', '.join(known)}); correct or remove it"
        elif item["type"] == "missing":
            yield f"key {place!r} is missing; add it"
        elif item["type"] == "value_error":
            yield f"{place + ': ' if place else ''}{context['error']}"
        elif item["type"] == "union_tag_invalid":
            kinds = list(_TEACHER_KINDS)
            kind = str(context["tag"])
            yield (
                f"expected one of {', '.join(kinds)} at '{place}.kind', found {kind!r}{_nearest(kind, kinds)}; correct it"
            )
        elif item["type"] == "union_tag_not_found":
            yield f"key '{place}.kind' is missing; add it with one of {', '.join(_TEACHER_KINDS)}"
        else:
            yield f"expected {_wanted(item)} at {place!r}, found {_shown(item['input'])}; {_remedy(item)}"


_YAML_NOUNS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "model": "a section of keys and values",
    "model_attributes": "a section of keys and values",
}
"""What pydantic's types, such as `int_type`, are called in YAML."""
_MAX_SHOWN = 60
"""Characters of a wrong value that a message repeats: enough to find it, and one line stays one line."""


def _wanted(item: Mapping[str, Any]) -> str:
    """What the schema demands, in the words of a YAML file."""
    noun = _YAML_NOUNS.get(str(item["type"]).removesuffix("_type"))
    if noun is not None:
        return noun
    if item["type"] == "string_pattern_mismatch":
        return f"text that matches {item['ctx']['pattern']}"
    if item["type"] == "too_short":
        return f"at least {item['ctx']['min_length']} item"
    return str(item["msg"]).removeprefix("Input should be ")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _remedy(item: Mapping[str, Any]) -> str:
    """What to do about a value of a wrong type or outside its bounds."""
    if isinstance(item["input"], str):
        if item["type"] == "float_type":
            return "write it without quotes and with a dot, as 1.0e-4 (YAML takes 1e-4 for text)"
        if item["type"] == "int_type":
            return "write it without quotes"
        if item["type"] == "tuple_type":
            return f"write [{item['input']}]"
    if item["type"] == "string_type" and isinstance(item["input"], (int, float)):
        return "quote it"
    return "correct it"


_TEACHER_KINDS: dict[str, type[BaseModel]] = {"registry": RegistryTeacher, "path": PathTeacher, "hub": HubTeacher}
"""What `kind` of a teacher means; pydantic puts it into an error's location."""


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the schema at an error's location."""
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        chosen = _TEACHER_KINDS.get(part)
        if field is None and chosen is not None:
            model = chosen
            continue
        if field is None:
            return []
        candidates = [field.annotation, *get_args(field.annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return sorted(model.model_fields)


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f", did you mean {match[0]!r}?" if match else ""
