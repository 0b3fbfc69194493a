"""Gives a model that was built without weights its weights: exactly those of its class, matrices packed into NF4 as they are read.

For models that transformers' own loading does not reach: those of diffusers, and those of vendors' packages that pin an old
transformers. The floating-point model is never whole in memory. Needs torch, bitsandbytes and safetensors alone, whatever the
version of transformers. Shape letters: O and I output and input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import safe_open
from torch import Tensor, nn

from nexus.errors import TowerLoadError
from nexus.towers.checkpoint import Checkpoint

BLOCK = 64
"""Weights that share one scale; bitsandbytes' default and the format of NF4 checkpoints."""
MAX_WEIGHT_ERROR = 0.12
"""Largest admitted |dequantised - original| / |original|. Normally distributed weights give .092, the silent errors .26 and more."""

ReadTensor = Callable[[str], Tensor]
"""Name in the model -> the checkpoint's tensor."""


def tied_names(model: nn.Module) -> dict[str, str]:
    """Name of every parameter -> the first name of the same parameter."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def reader_of(model: nn.Module, checkpoint: Checkpoint, *, teacher_id: str) -> ReadTensor:
    """Reads the tensors of `model` from a checkpoint that was found to fit it.

    A tied parameter may be stored under any of its names.

    Raises:
        TowerLoadError: missing or unexpected tensors, or one of another shape.
    """
    expected = model.state_dict()
    ties = tied_names(model)
    stored = {ties.get(name, name): name for name in checkpoint.weights}
    unknown = sorted(checkpoint.weights.keys() - expected.keys())
    missing = sorted(name for name in expected if ties.get(name, name) not in stored)
    for kind, names in (("missing", missing), ("unexpected", unknown)):
        if names:
            raise TowerLoadError(
                f"Expected the weights in {checkpoint.folder} to fit teacher {teacher_id!r} exactly, found {len(names)} {kind} "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}). Fetch the checkpoint again."
            )
    for name, path in checkpoint.weights.items():
        with safe_open(path, framework="pt") as file:
            shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(expected[name].shape):
            raise TowerLoadError(
                f"Expected shape {tuple(expected[name].shape)} for {name!r} of teacher {teacher_id!r}, found {shape} in {path}. "
                "Fetch the checkpoint again."
            )

    def read(name: str) -> Tensor:
        key = stored[ties.get(name, name)]
        with safe_open(checkpoint.weights[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    return read


def fill(model: nn.Module, matrices: Sequence[str], read: ReadTensor, device: torch.device, dtype: torch.dtype) -> None:
    """Give `model` its tensors, one at a time, on `device`.

    Args:
        model: parameters on the meta device; buffers that no checkpoint holds are there.
        matrices: names of the linear layers that become NF4.
        dtype: of whatever stays in floating point, and computed in.
    """
    packed = set(matrices)
    names = [name for name in model.state_dict() if name.rpartition(".")[0] not in packed or name.endswith(".bias")]
    ties = tied_names(model)
    for name in matrices:
        empty = model.get_submodule(name)
        assert isinstance(empty, nn.Linear), "only linear layers are packed"
        model.set_submodule(name, packed_linear(read(f"{name}.weight"), empty.bias is not None, device, dtype))
    filled: dict[str, nn.Parameter] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            first = ties[name]
            if first not in filled:
                filled[first] = nn.Parameter(_placed(read(name), device, dtype), requires_grad=False)
            module._parameters[leaf] = filled[first]
        else:
            module._buffers[leaf] = _placed(read(name), device, dtype)
    for module in model.modules():
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers[leaf]
            module._buffers[leaf] = None if buffer is None else buffer.to(device)


def packed_linear(weight_OI: Tensor, bias: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A linear layer of bitsandbytes with `weight_OI` in NF4 with double quantisation, and an empty bias."""
    rows, columns = weight_OI.shape
    with torch.device("meta"):
        linear = bnb.nn.Linear4bit(columns, rows, bias=bias, compute_dtype=dtype)
    linear.weight = bnb.nn.Params4bit(
        weight_OI.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear
    ).to(device)
    # As transformers notes it, for those who read the layer back; and see nf4.py on repacking.
    linear.source_cls = nn.Linear
    linear.support_avx512bf16_for_cpu = False
    return linear


def stored_bits(module: Any) -> int:
    """Bits that the weight of a `Linear4bit` occupies: indices, scales, scales of scales, and both tables."""
    state = module.weight.quant_state
    tensors = [module.weight.data, state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    return sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors)


def dequantised(module: Any) -> Tensor:
    """The stored matrix of a `Linear4bit` as float32 [out_features, in_features]."""
    matrix: Tensor = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return matrix.float()


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
