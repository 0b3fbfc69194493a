"""What each strategy of a profile costs, estimated from the work alone, so that "auto" takes the cheapest.

The time of a micro-batch is a sum over the calls of blocks. A call costs a fixed overhead, the reading (and dequantising) of the
block's weights, and the arithmetic of its tokens:

    seconds(call) = call_s + parameters / weights_per_s + tokens * 2 * parameters / flops_per_s * (1 + spill)

where spill applies to calls of more tokens than a CPU's caches hold. The estimate reads no clock: equal work is given equal
strategies on every machine and in every repetition, which a resumed or merged profile relies on. Strategies give equal results, so
a wrong estimate costs time only.

Shape letters: L blocks, K interventions, V = K+1 variants, B rows, T columns, A new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

SweepStrategy = Literal["brute", "prefix", "triangular"]
DecodeStrategy = Literal["brute", "stacked"]
Name = TypeVar("Name", bound=str)

CPU_TOKENS = 4096
"""Tokens of all live rows together that keep a CPU busy in one call of a block; more of them only take memory and fall out of its
caches."""


@dataclass(frozen=True)
class Machine:
    """Seconds and rates of one kind of device; only their proportions matter."""

    forward_s: float
    """Of the model's forward around its blocks: masks, embeddings, head."""
    call_s: float
    """Of one call of a block: Python, launches."""
    quantised_call_s: float
    """The same with 4-bit weights, whose every matrix product is several operations."""
    weights_per_s: float
    """Parameters read per second."""
    quantised_weights_per_s: float
    """Parameters dequantised per second."""
    flops_per_s: float
    spill: float
    """Relative rise of the arithmetic's time above CPU_TOKENS."""


MACHINES: Mapping[str, Machine] = {
    # One thread of an AVX-512 server core, float32. `benchmarks/niwt.py --parts cost` measures these figures.
    "cpu": Machine(
        forward_s=1e-3,
        call_s=5e-4,
        quantised_call_s=1e-3,
        weights_per_s=2.5e9,
        quantised_weights_per_s=2e9,
        flops_per_s=6e10,
        spill=0.1,
    ),
    # From data sheets, not measured: 3 TB/s, bfloat16 products at a third of their peak, launches as in plain transformers.
    "accelerator": Machine(
        forward_s=1e-3,
        call_s=5e-4,
        quantised_call_s=1e-3,
        weights_per_s=1.5e12,
        quantised_weights_per_s=1e12,
        flops_per_s=3e14,
        spill=0.0,
    ),
}


@dataclass(frozen=True)
class Work:
    """What is to be profiled, whatever the strategy."""

    num_layers: int
    layer_parameters: int
    """Parameters that one token goes through in one block."""
    is_quantised: bool
    num_rows: int
    num_columns: int
    """Of the rows, or of the prompts of a generation."""


def cheapest(seconds: Mapping[Name, float]) -> Name:
    """Return the strategy of the smallest cost, the first of equals."""
    return min(seconds, key=lambda name: seconds[name])


def sweep_seconds(
    machine: Machine, work: Work, strategy: SweepStrategy, born_L: Sequence[int], micro_batch_size: int
) -> float:
    """Return the estimated time of scoring all rows.

    Args:
        born_L: how many interventions each block has.
        micro_batch_size: rows at once under this strategy.
    """
    num_layers, num_interventions = work.num_layers, sum(born_L)
    if strategy == "triangular":
        forwards = 1
        variants = [1 + sum(born_L[:layer]) for layer in range(num_layers)]
    elif strategy == "prefix":
        forwards = 1 + num_interventions
        variants = [1] * (num_layers + sum(born * (num_layers - 1 - layer) for layer, born in enumerate(born_L)))
    else:
        forwards = 1 + num_interventions
        variants = [1] * (num_layers * forwards)
    parts, rows = _parts(work, micro_batch_size)
    calls = sum(_call_seconds(machine, work, count * rows * work.num_columns) for count in variants)
    return parts * (forwards * machine.forward_s + calls)


def decode_seconds(
    machine: Machine, work: Work, strategy: DecodeStrategy, num_new_tokens: int, micro_batch_size: int
) -> float:
    """Return the estimated time of generating under every skipped block.

    Args:
        micro_batch_size: samples at once under this strategy, each with all its ablations when stacked.
    """
    num_layers, num_steps = work.num_layers, num_new_tokens - 1
    parts, rows = _parts(work, micro_batch_size)
    if strategy == "stacked":
        decodes = 1
        prompt_variants = list(range(1, num_layers + 1))
        # All variants but the one that skips the block.
        step_variants = num_layers
    else:
        decodes = num_layers + 1
        prompt_variants = [1] * num_layers
        step_variants = 1
    prompt = sum(_call_seconds(machine, work, count * rows * work.num_columns) for count in prompt_variants)
    step = num_layers * _call_seconds(machine, work, step_variants * rows)
    return parts * decodes * ((1 + num_steps) * machine.forward_s + prompt + num_steps * step)


def _parts(work: Work, micro_batch_size: int) -> tuple[int, float]:
    """Return the number of micro-batches and their average rows."""
    parts = math.ceil(work.num_rows / micro_batch_size)
    return parts, work.num_rows / parts


def _call_seconds(machine: Machine, work: Work, num_tokens: float) -> float:
    overhead = machine.quantised_call_s if work.is_quantised else machine.call_s
    weights_per_s = machine.quantised_weights_per_s if work.is_quantised else machine.weights_per_s
    arithmetic = num_tokens * 2 * work.layer_parameters / machine.flops_per_s
    spill = machine.spill if num_tokens > CPU_TOKENS else 0.0
    return overhead + work.layer_parameters / weights_per_s + arithmetic * (1 + spill)
