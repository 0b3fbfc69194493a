"""The files of a run directory: one strict model each, read by the model that wrote them.

A stage writes its artefact through `write_artifact` (temporary file, fsync, rename), so that a killed process leaves either the
old file or the new one, never half of one. Layer indices count decoder or encoder blocks from 0.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexus.errors import ArtifactError


class StrictModel(BaseModel):
    """Base of all schemas: unknown keys are errors, nothing is coerced, instances cannot be changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


ModelT = TypeVar("ModelT", bound=BaseModel)


# --- profile/<teacher>.json ---------------------------------------------------------------------------------------------------


class ProfileBaseline(StrictModel):
    """The clean teacher on the profiled samples."""

    nll: float | None
    """Mean negative log-likelihood of the scored tokens (or of the label), nats."""
    accuracy: float | None
    """Share of samples that are right; how they are judged says the profile's `accuracy_by`."""
    probe_accuracy: float | None = None
    """Share of samples whose label a linear probe on the pooled embedding names."""


class ActivationSummary(StrictModel):
    """Moments of one layer's output over all samples, tokens and dimensions."""

    mean_abs: float
    variance: float
    kurtosis: float
    abs_max: float


class AblationEffect(StrictModel):
    """What one intervention on one layer costs; measured on the samples of a profile's second pass."""

    delta_nll: float
    """Nats per scored token (or the metric named by the profile)."""
    ci95: tuple[float, float]
    """Paired bootstrap interval of `delta_nll`."""
    kl_nats: float | None
    """KL(clean || ablated) per scored token (or label); None where there is no distribution."""


class LayerProfile(StrictModel):
    """What ablating one layer costs."""

    layer: int = Field(ge=0)
    delta_nll: float
    """Of skipping the layer: nats per scored token (or the metric named by the profile)."""
    ci95: tuple[float, float]
    """Paired bootstrap interval of `delta_nll`."""
    accuracy_drop: float | None
    """Of skipping the layer; how a sample is judged says the profile's `accuracy_by`."""
    activation: ActivationSummary
    intrinsic_dim: float
    """Number of principal components that hold 95 % of the output's variance."""
    participation_ratio: float | None = None
    effective_rank: float | None = None
    kl_nats: float | None = None
    """KL(clean || skipped) per scored token (or label); None where there is no distribution."""
    accuracy_drop_ci95: tuple[float, float] | None = None
    cosine_drop: float | None = None
    """Of skipping the layer, in an encoder: 1 - cosine of the pooled embedding with the clean one."""
    probe_accuracy_drop: float | None = None
    """Of skipping the layer: how many labels less a linear probe on the pooled embedding names."""
    mean_ablation: AblationEffect | None = None
    """The layer's update is replaced by its mean over the data."""
    noise_ablation: AblationEffect | None = None
    """The layer's update is replaced by Gaussian noise of the same root mean square."""


class CriticalLayer(StrictModel):
    """One layer that the student is anchored to; the weights of a profile sum to 1."""

    layer: int = Field(ge=0)
    weight: float = Field(gt=0, le=1)
    reconstruction: AblationEffect | None = None
    """The causal check: the layer's output is replaced by its projection onto the `intrinsic_dim` first principal components. A KL
    near 0 says that what the layer is needed for lies in them."""


class LayerEffect(StrictModel):
    """What skipping one layer costs on the rows of one capability."""

    layer: int = Field(ge=0)
    delta_nll: float
    ci95: tuple[float, float]


class NIWTProfile(StrictModel):
    """Which layers of a teacher carry a capability, with intervals."""

    teacher: str
    revision: str
    num_layers: int = Field(ge=1)
    num_samples: int = Field(ge=0)
    metric: Literal["delta_nll", "label_nll", "cosine_drop"]
    strategy: str
    baseline: ProfileBaseline
    layers: tuple[LayerProfile, ...]
    critical_layers: tuple[CriticalLayer, ...]
    """Empty when no layer is significant: then nothing is anchored."""
    seconds: float
    speedup_over_sequential: float | None = None
    partial: bool = False
    note: str | None = None
    accuracy_by: Literal["verification", "generation", "label"] | None = None
    """How a sample is judged. Verification: every scored token is the argmax given those before it, which is what greedy decoding
    would answer. Generation: the answer found in the greedy completion. Label: the most probable class."""
    num_confirmed: int = Field(0, ge=0)
    """Samples of the second pass, which measures mean and noise ablation, the causal check, the probe and generated answers."""
    critical_stability: float | None = None
    """Share of bootstrap resamples with the same critical layers."""
    stopped_early: bool = False
    """Whether sampling ended before its limit, because the critical layers were stable at 95 %."""
    tensors: str | None = None
    """File beside this one with the critical layers' statistics per dimension and their principal components."""
    capabilities: dict[str, tuple[LayerEffect, ...]] = {}
    """The layers' effects on each capability's rows alone, where a teacher has several."""
    side: Literal["encoder", "decoder"] | None = None
    """Which part of the teacher the layers are of."""
    path: str | None = None
    """Dotted path of the profiled blocks inside the teacher's model."""
    other_side: NIWTProfile | None = None
    """Of an encoder-decoder, the profile of its other side's layers on the same samples."""


# --- metrics.json -------------------------------------------------------------------------------------------------------------


class Retention(StrictModel):
    """How much of its teacher's held-out score the student keeps on one capability."""

    teacher: str
    teacher_score: float
    student_score: float
    chance: float
    retention: float = Field(ge=0)
    """max(0, (student - chance) / (teacher - chance))."""
    ci95: tuple[float, float]
    """Paired bootstrap interval of `retention` over held-out rows."""
    contract: float
    """The share that has to be kept."""
    holds: bool
    num_rows: int = Field(ge=1)
    labels_only_score: float | None = None
    """The same student trained as long on the labelled rows alone, without a teacher."""
    labels_only_retention: float | None = None
    labels_only_ci95: tuple[float, float] | None = None


class QuantisationTax(StrictModel):
    """What NF4 costs a teacher, on held-out rows."""

    float_score: float
    nf4_score: float
    mean_kl_nats: float
    """KL(float || NF4), per scored token for language models, per row for classifiers."""
    top1_agreement: float
    quantised_share: float
    """Share of the parameters that are stored in NF4."""
    max_weight_error: float
    """Largest relative Frobenius error of a quantised matrix."""


class TransportMetrics(StrictModel):
    """What one teacher's targets took on their way to the trainer; lengths of the buffers that were moved."""

    transports: tuple[str, ...]
    """Of its token distributions; empty without any."""
    targets: Literal["live", "cached"]
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)
    """Scored tokens."""
    bytes_per_token: float | None
    """Of the token distributions."""
    bytes_per_row: float
    """Of everything, the states of critical layers and labels included."""


TRANSPORTS_FILE = "transports.json"


class TransportsFile(StrictModel):
    """transports.json, written by the distill stage; a resumed run counts its last part."""

    teachers: dict[str, TransportMetrics]


class StageMetrics(StrictModel):
    """Cost of one stage, all processes of the run together."""

    seconds: float
    peak_memory_gib: float
    """Largest summed proportional set size (PSS) seen, GiB."""


class RouterMetrics(StrictModel):
    """Held-out routing: `confusion[label][decision]` counts rows."""

    accuracy: float
    threshold: float
    coverage: float
    """Share of rows decided by the network (not by keywords or the trunk-only last resort)."""
    confusion: dict[str, dict[str, int]]


class Metrics(StrictModel):
    """metrics.json."""

    retention: dict[str, Retention]
    quantisation_tax: dict[str, QuantisationTax]
    throughput: dict[str, float]
    stages: dict[str, StageMetrics]
    router: RouterMetrics | None = None
    transports: dict[str, TransportMetrics] = {}
    """Of each teacher that targets came from."""
    student_parameters: int
    teacher_parameters: dict[str, int]
    teacher_tokens: dict[str, int] = {}
    """Tokens that the student learned from each teacher, over the whole training; 0 for a starved one."""
    aligned_share: dict[str, float] = {}
    """Of the student's tokens that were compared with a teacher of another tokenizer, those in spans of text that both tokenizers
    cut out; the distributions at the others were compared by sorted probabilities alone. Over the whole training."""
    seed: int


# --- stage markers ------------------------------------------------------------------------------------------------------------


class StageRecord(StrictModel):
    """stages/<stage>.json: written only after all work of a stage is done."""

    stage: str
    fingerprint: str
    """Hash of the configuration that the stage depends on."""
    seconds: float
    peak_memory_gib: float
    outputs: dict[str, str]
    """Relative path -> sha256 of what the stage produced."""
    summary: dict[str, float | int | str]


# --- reading and writing ------------------------------------------------------------------------------------------------------


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file and a rename, so that no reader ever sees half a file.

    Raises:
        ArtifactError: when the disk refuses (full, read-only, missing rights), with the system's reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"Expected to write {path}, found: {error.strerror or error}. Free disk space or choose another --out."
        ) from error


def write_artifact(path: Path, artifact: BaseModel) -> None:
    """Write `artifact` as indented JSON, atomically."""
    write_bytes_atomically(path, artifact.model_dump_json(indent=1).encode() + b"\n")


def read_artifact(path: Path, model: type[ModelT]) -> ModelT:
    """Parse `path` with the model that wrote it.

    Raises:
        ArtifactError: when the file is missing or does not parse.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ArtifactError(
            f"Expected {path}, found no such file. Run the stage that writes it (`nexus pipeline`)."
        ) from None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "top level"
        raise ArtifactError(
            f"Expected {path} to hold a {model.__name__}, found {first['msg']} at {place}. Delete it and run its stage again."
        ) from None


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_of(value: object) -> str:
    """First 16 hex digits of the sha256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
