"""Copies of everything that a training step changes, and their exact return.

A copy shares no memory with the live state, in either direction: a snapshot that aliases the optimizer's moments is corrupted by the
next step, and one that is handed out by reference survives only its first rollback. Tensors are copied into buffers that a slot
keeps and reuses, so a snapshot in a steady state allocates nothing.
"""

from __future__ import annotations

import copy
import math
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

Tree: TypeAlias = Any
"""Tensors in dicts, lists and tuples, with anything that `copy.deepcopy` copies at the leaves."""


_DICTS = (dict, OrderedDict)


class Stateful(Protocol):
    """A part of the training state that can be put aside and returned: a data cursor, a schedule, a loss with baselines."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass(frozen=True)
class RandomState:
    """The generators that a forward pass may draw from: Python's, NumPy's global one, torch's on the CPU and on every GPU."""

    python: Any
    numpy: Any
    torch_cpu: Tensor
    torch_cuda: tuple[Tensor, ...]


def capture_random_state() -> RandomState:
    """Return a copy of the state of all generators."""
    return RandomState(
        python=random.getstate(),
        numpy=np.random.get_state(),
        torch_cpu=torch.get_rng_state(),
        # Asking for the state would start CUDA in a process that has not used it.
        torch_cuda=tuple(torch.cuda.get_rng_state_all()) if _cuda_in_use() else (),
    )


def restore_random_state(state: RandomState) -> None:
    """Set all generators to `state`."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch_cpu)
    torch.cuda.set_rng_state_all(list(state.torch_cuda))


def copy_tree(value: Tree, slot: Tree = None) -> Tree:
    """Return a deep copy of `value` on the CPU, written into the tensors of `slot` (an earlier copy) where they fit.

    Tensors of a GPU go to pinned memory, which the device writes at full speed.
    """
    if isinstance(value, Tensor):
        source = value.detach()
        fits = isinstance(slot, Tensor) and slot.shape == source.shape and slot.dtype == source.dtype
        target = slot if fits else torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
        return target.copy_(source)
    if type(value) in _DICTS:
        slots = slot if type(slot) in _DICTS else {}
        return type(value)((key, copy_tree(item, slots.get(key))) for key, item in value.items())
    if type(value) in (list, tuple):
        parts = slot if type(slot) is type(value) and len(slot) == len(value) else [None] * len(value)
        return type(value)(copy_tree(item, part) for item, part in zip(value, parts, strict=True))
    return copy.deepcopy(value)


def return_tree(live: Tree, saved: Tree) -> Tree:
    """Return `saved` as live state: into the tensors of `live` where they fit, so that other references to them stay valid."""
    if isinstance(saved, Tensor):
        if isinstance(live, Tensor) and live.shape == saved.shape and live.dtype == saved.dtype:
            with torch.no_grad():
                return live.copy_(saved)
        return saved.clone()
    if type(saved) in _DICTS:
        lives = live if type(live) in _DICTS else {}
        return type(saved)((key, return_tree(lives.get(key), item)) for key, item in saved.items())
    if type(saved) in (list, tuple):
        parts = live if type(live) is type(saved) and len(live) == len(saved) else [None] * len(saved)
        return type(saved)(return_tree(part, item) for part, item in zip(parts, saved, strict=True))
    return copy.deepcopy(saved)


def named_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield (qualified name, owning module, name in it, buffer) for every buffer, non-persistent ones included."""
    for prefix, module in model.named_modules():
        # Not `module.named_buffers`, which takes three times as long and is asked before and after every step.
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield f"{prefix}.{name}" if prefix else name, module, name, buffer


def copy_buffers(model: nn.Module, slot: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the buffers of `model` by qualified name, written into `slot` where they fit."""
    return {qualified: copy_tree(buffer, slot.get(qualified)) for qualified, _, _, buffer in named_buffers(model)}


def restore_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give every buffer of `saved` its value back, also one that the forward pass replaced by another tensor."""
    for qualified, module, name, buffer in list(named_buffers(model)):
        if qualified in saved:
            returned = return_tree(buffer, saved[qualified])
            if returned is not buffer:
                setattr(module, name, returned.to(buffer.device))


class TrainingState:
    """One slot for the state of model, optimizer, schedule, data, random generators and whatever else is `Stateful`.

    Only what trains is copied: parameters that require a gradient or belong to the optimizer, all buffers, and the optimizer's
    state. Frozen weights, quantised teachers among them, do not change and are not copied. Take it between optimizer steps: gradients
    are not part of it.
    """

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []
        self._buffers: dict[str, Tensor] = {}
        self._moments: list[Tree] = []
        self._groups: list[Tree] = []
        self._parts: dict[str, Tree] = {}
        self._random: RandomState | None = None

    def capture(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: Mapping[str, Stateful]) -> None:
        """Overwrite the slot with the present state."""
        parameters = trained_parameters(model, optimizer)
        slots = self._parameters if len(self._parameters) == len(parameters) else [None] * len(parameters)
        self._parameters = [copy_tree(parameter, slot) for parameter, slot in zip(parameters, slots, strict=True)]
        self._buffers = copy_buffers(model, self._buffers)
        # A parameter without state yet (before its first step) must be without state again after the return.
        moments = [optimizer.state.get(parameter) for parameter in _grouped(optimizer)]
        self._moments = copy_tree(moments, self._moments)
        self._groups = copy_tree([_without_parameters(group) for group in optimizer.param_groups], self._groups)
        self._parts = {name: copy_tree(part.state_dict(), self._parts.get(name)) for name, part in parts.items()}
        self._random = capture_random_state()

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: Mapping[str, Stateful]) -> None:
        """Return the state that `capture` saw; gradients are dropped. The slot stays as it is, for a second return."""
        assert self._random is not None, "capture comes first"
        # Parts first: a schedule may set learning rates when it loads, and the groups below have the last word.
        for name, part in parts.items():
            part.load_state_dict(return_tree(None, self._parts[name]))
        for parameter, saved in zip(trained_parameters(model, optimizer), self._parameters, strict=True):
            return_tree(parameter, saved)
        restore_buffers(model, self._buffers)
        for parameter, saved in zip(_grouped(optimizer), self._moments, strict=True):
            if saved is None:
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = _on_device(return_tree(optimizer.state.get(parameter), saved), parameter)
        for group, saved in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(return_tree(_without_parameters(group), saved))
        drop_gradients(model, optimizer)
        restore_random_state(self._random)

    @property
    def num_bytes(self) -> int:
        """Memory that the slot holds in tensors."""
        return sum(tensor.nbytes for tensor in _tensors([self._parameters, self._buffers, self._moments, self._parts]))


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters that a step can change, each once: the model's that require a gradient, and all of the optimizer's."""
    found = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in _grouped(optimizer):
        found.setdefault(id(parameter), parameter)
    return list(found.values())


def drop_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Set every gradient to None: what a refused batch left behind must not reach the next step."""
    for parameter in trained_parameters(model, optimizer):
        parameter.grad = None


def all_finite(tensors: list[Tensor]) -> bool:
    """True if no floating-point tensor of the list holds nan or inf. One pass at memory bandwidth, one transfer."""
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floating or math.isfinite(float(torch.nn.utils.get_total_norm(floating))):
        return True
    # A sum of squares can overflow where every entry is finite; the largest magnitude cannot, but takes 16 times as long.
    return math.isfinite(float(torch.nn.utils.get_total_norm(floating, norm_type=math.inf)))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor in the optimizer's per-parameter state."""
    return list(_tensors(list(optimizer.state.values())))


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())


def _tensors(tree: Tree) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from _tensors(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)


def _on_device(state: Tree, parameter: nn.Parameter) -> Tree:
    """Move moments that had to be made anew to their parameter; a step counter (0-dimensional) stays on the CPU as torch keeps it."""
    return {
        key: value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
        for key, value in state.items()
    }


def _grouped(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
