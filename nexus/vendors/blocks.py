"""Reads hidden states at the output of chosen blocks: `nexus.towers.blocks` for models of any version of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def recorded(blocks: Sequence[nn.Module], layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Yields a dict that a forward fills: layer -> output [B, T, H] of that block."""
    states: dict[int, Tensor] = {}

    def record(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[layer].register_forward_hook(record(layer)) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
