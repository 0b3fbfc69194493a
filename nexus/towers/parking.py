"""A model's weights set aside and brought back, bit for bit, without quantising again.

On a GPU they move to pinned memory of the node, from where they come at the speed of the bus. Elsewhere they move to an unnamed
file that the model reads them from, once; from then on it holds only what it used since it woke, and the system's file cache holds
the rest for as long as nobody wants the memory.

Every tensor of a model moves: parameters, buffers, and the scales that bitsandbytes keeps beside its packed weights, which are
neither.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SCALES = ("absmax", "code", "offset")
"""Tensors of a bitsandbytes QuantState; with double quantisation its `state2` has some as well."""
_ALIGNMENT = 64
"""Bytes: what PyTorch's own allocator gives, and vector instructions like."""


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


class FileWeights:
    """The weights of models on a CPU, in a file without a name that ends with the process."""

    def __init__(self, models: Iterable[nn.Module], folder: Path) -> None:
        """Write all tensors of `models` into a file in `folder` and let the models read them there.

        Raises:
            OSError: the disk refuses; the models are as before.
        """
        models = tuple(models)
        held = [tensor for model in models for tensor in _tensors(model) if _is_movable(tensor)]
        offsets = []
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for tensor in held:
                file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                offsets.append(file.tell())
                file.write(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
            self.num_bytes = file.tell()
            file.write(b"\0")  # nothing cannot be mapped
            file.flush()
            # A private mapping may be written to, which PyTorch asks of a tensor's memory, and never reaches the file.
            self._map = mmap.mmap(file.fileno(), self.num_bytes + 1, mmap.MAP_PRIVATE)
        homes = iter(offsets)

        def to_file(tensor: Tensor) -> Tensor:
            if not _is_movable(tensor):
                return tensor
            flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=next(homes))
            return flat.reshape(tensor.shape)

        for model in models:
            _replace(model, to_file)

    def release(self) -> None:
        """Let go of the memory; what is read again comes from the file, or from the system's cache of it."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def prefetch(self) -> None:
        """Ask the system to read the file ahead of its use."""
        self._map.madvise(mmap.MADV_WILLNEED)


def _is_movable(tensor: Tensor) -> bool:
    """Whether a tensor has bytes in the order of its elements; one of a streamed model's blocks has none."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and tensor.is_contiguous()


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """In the order in which `_replace` meets them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _replace(model, note)
    return iter(found)


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
