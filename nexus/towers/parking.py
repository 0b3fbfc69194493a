"""A model's weights set aside in the node's memory and brought back, bit for bit, without quantising again.

Every tensor of the model moves: parameters, buffers, and the scales that bitsandbytes keeps beside its packed weights, which are
neither.
Pinned memory lets a GPU fetch them at the speed of its bus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SCALES = ("absmax", "code", "offset")
"""Tensors of a bitsandbytes QuantState; with double quantisation its `state2` has some as well."""


@dataclass(frozen=True)
class ParkedWeights:
    """Where the weights belong."""

    device: torch.device
    num_bytes: int


def park(model: nn.Module) -> ParkedWeights:
    """Move all tensors of `model` to the node's memory, pinned where there is a GPU; until `unpark` it must not run."""
    device = next(model.parameters()).device
    moved = 0

    def to_host(tensor: Tensor) -> Tensor:
        nonlocal moved
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
        host.copy_(tensor)
        moved += host.numel() * host.element_size()
        return host

    _replace(model, to_host)
    if device.type == "cuda":  # pragma: no cover  # needs a GPU: PyTorch keeps freed memory for itself otherwise
        torch.cuda.empty_cache()
    return ParkedWeights(device, moved)


def unpark(model: nn.Module, parked: ParkedWeights) -> None:
    """Bring the tensors back to where they were."""
    _replace(model, lambda tensor: tensor.to(parked.device, non_blocking=True))
    if parked.device.type == "cuda":  # pragma: no cover  # needs a GPU: its copies run behind the program
        torch.cuda.synchronize(parked.device)


def _replace(model: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
    """Give every tensor of the model new storage; tied weights are one tensor, and stay tied."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = move(tensor.data)
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            _replace_scales(state, move)


def _replace_scales(state: Any, move: Callable[[Tensor], Tensor]) -> None:
    for name in _SCALES:
        scale = getattr(state, name)
        if scale is not None:
            setattr(state, name, move(scale))
    if state.state2 is not None:
        _replace_scales(state.state2, move)
