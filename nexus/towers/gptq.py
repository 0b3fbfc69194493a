"""Matrices that a checkpoint's authors quantised by GPTQ: read as they are, kept packed, dequantised in every forward.

GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) rounds a matrix column by column to codes of a few bits; each group of
input features shares a scale and a zero point per output:

    weight[o, i] = scales[g[i], o] * (code[i, o] - zero[g[i], o])

A checkpoint stores four tensors in place of each `weight`: `qweight` int32 [I * bits / 32, O], the codes of 32 / bits input features
per number, lowest bits first; `qzeros` int32 [G, O * bits / 32], likewise along the outputs and, in the first version of the format,
less one (modulo the number of codes); `scales` [G, O]; and `g_idx` int32 [I], the group of each input feature, which some leave out
where groups simply follow one another.

transformers reads it through two packages that only take models of text, and the thinker of an Omni checkpoint drops the setting
and comes up with random layers. Here the checkpoint's own tensors say which matrices are packed.
Shape letters: I and O input and output features, G groups, P packed numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nexus.errors import TowerLoadError
from nexus.towers.checkpoint import Checkpoint, GptqFormat

METHOD = "nexus_gptq"
"""Name under which transformers finds the quantiser below."""
_WORD_BITS = 32
_PACKED = ".qweight"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Number types of scales, as safetensors writes them."""


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix of a model that the checkpoint holds in GPTQ."""

    name: str
    """Of its linear layer in the model."""
    format: GptqFormat
    scale_dtype: torch.dtype
    ordered: bool
    """Its groups follow one another, and no `g_idx` is stored."""


class GptqLinear(nn.Module):
    """A linear layer whose matrix stays packed; takes the place of `linear`, whose device and bias it keeps."""

    def __init__(self, linear: nn.Linear, packed: PackedMatrix) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = packed
        device, bits = linear.weight.device, packed.format.bits
        groups = -(-self.in_features // (packed.format.group_size or self.in_features))
        empty = {
            "qweight": torch.empty(self.in_features * bits // _WORD_BITS, self.out_features, dtype=torch.int32, device=device),
            "qzeros": torch.empty(groups, self.out_features * bits // _WORD_BITS, dtype=torch.int32, device=device),
            "scales": torch.empty(groups, self.out_features, dtype=packed.scale_dtype, device=device),
        }  # fmt: skip
        if not packed.ordered:
            empty["g_idx"] = torch.empty(self.in_features, dtype=torch.int32, device=device)
        for name, tensor in empty.items():
            self.register_buffer(name, tensor)
        self.bias = linear.bias

    def matrix(self) -> Tensor:
        """The dequantised matrix, float32 [O, I]."""
        bits = self.packed.format.bits
        codes_IO = unpacked(self.get_buffer("qweight"), bits, dim=0)
        zeros_GO = unpacked(self.get_buffer("qzeros"), bits, dim=1)
        # Modulo the number of codes: a zero point of 0 is stored as the highest code.
        zeros_GO = (zeros_GO + self.packed.format.zero_offset) & (2**bits - 1)
        groups_I = self._groups()
        scales_IO = self.get_buffer("scales").float()[groups_I]
        return (scales_IO * (codes_IO - zeros_GO[groups_I])).T

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., I] -> [..., O], in the type of `hidden_states`."""
        return F.linear(hidden_states, self.matrix().to(hidden_states.dtype), self.bias)

    def stored_bits(self) -> int:
        """Bits that the matrix occupies: codes, zero points, scales and groups."""
        return sum(tensor.numel() * tensor.element_size() * 8 for tensor in self.buffers())

    def _groups(self) -> Tensor:
        if "g_idx" in self._buffers:
            return self.get_buffer("g_idx").long()
        size = self.packed.format.group_size or self.in_features
        return torch.arange(self.in_features, device=self.get_buffer("qweight").device) // size


def unpacked(packed: Tensor, bits: int, *, dim: int) -> Tensor:
    """The codes in the int32 numbers of a matrix, lowest bits first along `dim`; int32, 32 / bits times as long there."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32, device=packed.device)
    # The shift is arithmetic; the mask takes away the copies of the sign.
    codes = (packed.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (1 - dim))) & (2**bits - 1)
    return codes.flatten(dim, dim + 1)


def packed_matrices(
    skeleton: nn.Module, checkpoint: Checkpoint, place: Callable[[str], str | None], *, teacher_id: str
) -> tuple[PackedMatrix, ...]:
    """The linear layers of `skeleton` whose matrix the checkpoint holds in GPTQ.

    Args:
        place: key of a tensor -> the one parameter that it is loaded into; None when it is merged or cut on the way.

    Raises:
        TowerLoadError: stored tensors of other sizes than the format gives the layer.
    """
    assert checkpoint.gptq is not None, "asked of GPTQ checkpoints alone"
    modules = dict(skeleton.named_modules())
    found = []
    for key in checkpoint.weights:
        if not key.endswith(_PACKED):
            continue
        stem = key.removesuffix(_PACKED)
        name = (place(f"{stem}.weight") or "").removesuffix(".weight")
        linear = modules.get(name)
        # What has no such layer is told as unexpected, unless the entry leaves it aside.
        if type(linear) is not nn.Linear:
            continue
        scales = f"{stem}.scales"
        if scales not in checkpoint.weights:
            raise TowerLoadError(
                f"Expected {scales!r} beside {key!r} of teacher {teacher_id!r}, found none. Fetch the checkpoint again."
            )
        with safe_open(checkpoint.weights[scales], framework="pt", backend="pread") as file:
            scale_dtype = _DTYPES.get(file.get_slice(scales).get_dtype(), torch.float32)
        packed = PackedMatrix(name, checkpoint.gptq, scale_dtype, f"{stem}.g_idx" not in checkpoint.weights)
        _refuse_uneven(linear, packed, teacher_id)
        found.append(packed)
    return tuple(found)


def place_packed(model: nn.Module, packed: Sequence[PackedMatrix]) -> None:
    """Put empty `GptqLinear`s in place of the layers that `packed` names."""
    for matrix in packed:
        linear: Any = model.get_submodule(matrix.name)
        model.set_submodule(matrix.name, GptqLinear(linear, matrix))


def refuse_damaged(model: nn.Module, *, teacher_id: str) -> None:
    """Raises TowerLoadError for scales that are not finite, or features of groups that are not there: both would show as noise."""
    for name, module in model.named_modules():
        if not isinstance(module, GptqLinear):
            continue
        groups_I, scales_GO = module._groups(), module.get_buffer("scales")
        wrong = None
        if not bool(scales_GO.isfinite().all()):
            wrong = "scales that are not finite"
        elif not 0 <= int(groups_I.min()) <= int(groups_I.max()) < len(scales_GO):
            wrong = f"groups {int(groups_I.min())} to {int(groups_I.max())} of {len(scales_GO)}"
        if wrong is not None:
            raise TowerLoadError(
                f"Expected sound GPTQ tensors of {name!r} in teacher {teacher_id!r}, found {wrong}. Fetch the checkpoint again."
            )


def _refuse_uneven(linear: nn.Linear, packed: PackedMatrix, teacher_id: str) -> None:
    """Sizes that do not fill whole numbers are packed by nobody in one agreed way."""
    per_word = _WORD_BITS // packed.format.bits
    if linear.in_features % per_word or linear.out_features % per_word:
        raise TowerLoadError(
            f"Expected sizes that are multiples of {per_word} in every GPTQ matrix of teacher {teacher_id!r}, found "
            f"{linear.out_features} x {linear.in_features} in {packed.name!r}. Use the original checkpoint."
        )


# --- how transformers fills them ------------------------------------------------------------------------------------------------


@register_quantization_config(METHOD)
class GptqConfig(QuantizationConfigMixin):
    """Tells transformers which layers of the model are packed."""

    def __init__(self, packed: Sequence[PackedMatrix]) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # as NF4Config
        self.packed = tuple(packed)


@register_quantizer(METHOD)
class GptqQuantizer(HfQuantizer):
    """Makes room for packed matrices; everything else is loaded as without it."""

    quantization_config: GptqConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        place_packed(model, self.quantization_config.packed)

    def is_serializable(self) -> bool:
        """Its checkpoint is the authors' own."""
        return False

    is_trainable = False
    """Codes have no gradient."""
