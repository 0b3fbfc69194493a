"""Reads hidden states where they arise: at the output of chosen blocks, in one ordinary forward.

Hooks and not `output_hidden_states`, whose last entry is taken after the final norm in decoders and before it in some encoders.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from nexus.errors import ConfigError
from nexus.profiling.layers import find_blocks

T = TypeVar("T")


class Passes(Protocol):
    """Runs calls that each contain forwards of one model; their results, in order."""

    def __call__(self, calls: Sequence[Callable[[], T]]) -> Iterable[T]:
        """A model in memory makes them one after the other; a streamed one makes them together (streamed.py)."""
        ...


def one_by_one(calls: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Each call when its result is asked for."""
    for call in calls:
        yield call()


@contextmanager
def recorded_blocks(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Yields a dict that a forward of `model` fills: layer -> output [B, T, H] of that block (block 0 is the first).

    Raises:
        ConfigError: a layer that the model does not have.
    """
    recorded: dict[int, Tensor] = {}
    blocks = find_blocks(model).blocks if layers else ()
    unknown = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if unknown:
        raise ConfigError(
            f"Expected layers of {type(model).__name__} between 0 and {len(blocks) - 1}, found {unknown[0]}. "
            "Profile this teacher again."
        )

    # The forwards of a streamed model go through its blocks in turns, each in a thread of its own.
    thread = threading.get_ident()

    def record(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() == thread:
                recorded[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[layer].register_forward_hook(record(layer)) for layer in layers]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def block_width(model: PreTrainedModel) -> int:
    """Width H of the hidden states between the blocks: by the configuration of the innermost model that holds them."""
    parts = find_blocks(model).path.split(".")
    owners = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
    return int(next(owner for owner in owners if isinstance(owner, PreTrainedModel)).config.hidden_size)
