"""How large a teacher is before it is loaded: from the headers of its safetensors files, or from its registry entry.

Reads no weight and imports no torch. A header lists every tensor with its type and shape, which is enough to say what NF4 will hold:
the same rules as `nexus.towers.nf4`, but for the modules that only the model class knows about, so the result is an estimate.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from nexus.config import Optimizer, RunConfig
from nexus.errors import ConfigError, TowerLoadError
from nexus.serving.placement import GIB, TenantNeed
from nexus.towers.registry import TeacherEntry, shipped_config

NF4_BITS = 4.13
"""With double quantisation, of matrices of 1024 x 1024 and more."""
NF4_BLOCK = 64
FLOAT_BITS = 16
"""Of what stays in floating point, on a GPU."""
HEADS = re.compile(r"(^|\.)(embed\w*|wte|wpe|lm_head|classifier|score|shared)(\.|$)")
"""Tensors that are never quantised: embeddings and output heads."""
WORKSPACE_BYTES = GIB // 4
"""Activations and logits of a batch, which are made in pieces of bounded size."""
WORKSPACE_SHARE = 0.1
MAX_GROWTH_BYTES = 2 * GIB
"""Of the weights, and at most, for what grows with the model: hidden states of a batch, the key-value cache of an answer."""
MAX_HEADER_BYTES = 100 * 2**20
"""The format's own limit."""

_LAYERS = ((20e9, 28), (100e9, 48), (math.inf, 60))
"""Parameters up to which a model has so many layers, for a registry entry without files: 7B models have 28 to 32, GLM-4.7-Flash 47,
Kimi-K2.5 61."""


@dataclass(frozen=True)
class TeacherSize:
    """What a teacher takes."""

    id: str
    weight_bytes: int
    """Quantised, in memory."""
    load_bytes: int
    """Of its files."""
    layer_bytes: int
    """Its largest layer (or single matrix outside the layers), quantised."""
    matrix_bytes: int
    """Its largest quantised matrix in 16 bits, as it is dequantised to compute."""
    active_parameters: float
    """That a token passes through: fewer than all in a mixture of experts."""
    source: Literal["checkpoint", "registry"]


def size_of_entry(entry: TeacherEntry) -> TeacherSize:
    """The registry's own estimate."""
    parameters = entry.billion_parameters * 1e9
    weight = int(entry.memory_gib * GIB)
    layers = next(number for limit, number in _LAYERS if parameters <= limit)
    return TeacherSize(
        id=entry.id,
        weight_bytes=weight,
        load_bytes=int(parameters * FLOAT_BITS / 8),
        layer_bytes=weight // layers,
        # A layer of a transformer holds about a dozen squares of its width, and its largest matrix a third of it.
        matrix_bytes=int(min(parameters / layers / 3, 2**29) * FLOAT_BITS / 8),
        active_parameters=(entry.active_billion_parameters or entry.billion_parameters) * 1e9,
        source="registry",
    )


def size_of_checkpoint(
    teacher: str, folder: Path, *, quantise: bool, skip_modules: tuple[str, ...] = (), active_share: float = 1.0
) -> TeacherSize:
    """The size that the headers of a folder's safetensors files promise.

    Args:
        quantise: False for teachers that stay as they are.
        skip_modules: kept in floating point.
        active_share: of the parameters that a token passes through.

    Raises:
        TowerLoadError: no such file, or one that is cut short or no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TowerLoadError(
            f"Expected safetensors files of teacher {teacher!r} in {folder}, found none. Correct its path, or fetch it with: "
            f"nexus teachers pull {teacher}"
        )
    total = parameters = largest = 0
    layers: dict[str, int] = {}
    for name, shape, bits in (tensor for file in files for tensor in _tensors(teacher, file)):
        count = math.prod(shape)
        nf4 = quantise and _is_quantisable(name, shape, skip_modules)
        stored = int(count * (NF4_BITS if nf4 else min(bits, FLOAT_BITS)) / 8)
        parameters += count
        total += stored
        if nf4:
            # Fused experts are dequantised one at a time.
            largest = max(largest, math.prod(shape[-2:]) * FLOAT_BITS // 8)
        found = re.search(r"^(.*?\.\d+)\.", name)
        key = found[1] if found else name
        layers[key] = layers.get(key, 0) + stored
    return TeacherSize(
        id=teacher,
        weight_bytes=total,
        load_bytes=sum(file.stat().st_size for file in files),
        layer_bytes=max(layers.values()),
        matrix_bytes=largest,
        active_parameters=parameters * active_share,
        source="checkpoint",
    )


def teacher_need(size: TeacherSize, tokens: float) -> TenantNeed:
    """What the planner wants to know of a teacher that will see so many tokens."""
    return TenantNeed(
        id=size.id,
        weight_bytes=size.weight_bytes,
        workspace_bytes=WORKSPACE_BYTES
        + min(int(WORKSPACE_SHARE * size.weight_bytes), MAX_GROWTH_BYTES)
        + size.matrix_bytes,
        load_bytes=size.load_bytes,
        layer_bytes=size.layer_bytes,
        flops=2 * size.active_parameters * tokens,
    )


def student_need(core: dict[str, Any], tokens: float, *, optimizer: Optimizer) -> TenantNeed:
    """What training takes of a student whose preset has the section `core`: weights and gradients in 32 bits, and two moments."""
    width, layers = core["hidden_size"], core["num_hidden_layers"]
    attention = width * width * (2 + 2 * core["num_key_value_heads"] / core["num_attention_heads"])
    feed_forward = 3 * width * core["intermediate_size"]
    parameters = layers * (attention + feed_forward) + width * core["vocab_size"]
    # Of each parameter: its value, its gradient, and two moments of 4 bytes or of 1.
    each = 4 + 4 + (2 if optimizer in ("adamw8bit", "paged_adamw8bit") else 8)
    return TenantNeed(
        id=STUDENT,
        weight_bytes=int(each * parameters),
        # A snapshot for the rollback lies in the node's memory, activations beside the weights.
        workspace_bytes=int(2 * WORKSPACE_BYTES + WORKSPACE_SHARE * each * parameters),
        load_bytes=0,
        layer_bytes=0,
        # Backward costs twice the forward pass.
        flops=6 * parameters * tokens,
        is_pinned=True,
    )


STUDENT = "student"
"""Id of the student among the planner's tenants; teachers' ids may not be it."""


def expected_rows(config: RunConfig, teacher: str) -> int:
    """Rows that training draws for one teacher."""
    chosen = next(item for item in config.teachers if item.id == teacher)
    return sum(config.distill.steps * config.data_of(name).batch_size for name in chosen.capabilities)


def run_needs(config: RunConfig, sizes: Sequence[TeacherSize]) -> list[TenantNeed]:
    """The student's need, then each teacher's, for the rows that training draws."""
    length = config.student.max_length
    tokens = {size.id: float(expected_rows(config, size.id) * length) for size in sizes}
    if STUDENT in tokens:
        raise ConfigError(f"Expected teachers with other ids than {STUDENT!r}, which the plan needs. Rename that one.")
    preset = shipped_config(f"student/{config.student.preset}.yaml")
    core = yaml.safe_load(preset.read_text(encoding="utf-8"))["core"]
    return [
        student_need(core, sum(tokens.values()), optimizer=config.distill.optimizer),
        *(teacher_need(size, tokens[size.id]) for size in sizes),
    ]


def _is_quantisable(name: str, shape: list[int], skip_modules: tuple[str, ...]) -> bool:
    module = name.rpartition(".")[0]
    skipped = any(module == skip or module.endswith(f".{skip}") or f"{skip}." in f"{module}." for skip in skip_modules)
    return len(shape) in (2, 3) and shape[-1] % NF4_BLOCK == 0 and not skipped and not HEADS.search(name)


def _tensors(teacher: str, file: Path) -> Iterator[tuple[str, list[int], int]]:
    """Name, shape and bits per element of every tensor."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= MAX_HEADER_BYTES:
                raise ValueError(length)
            header: dict[str, Any] = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                count = max(1, math.prod(tensor["shape"]))
                yield name, [int(size) for size in tensor["shape"]], 8 * (end - begin) // count
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise TowerLoadError(
            f"Expected a safetensors file of teacher {teacher!r} at {file}, found one that is cut short or of another kind. Fetch it "
            "again."
        ) from None
