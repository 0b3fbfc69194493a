"""Experts fused into 3-D parameters, held in NF4: the module that replaces them, and how transformers fills it while it loads.

bitsandbytes quantises `nn.Linear` only. In mixtures of experts most weights (93 % of GLM-4.7-Flash) are stacks [X, O, I] that it
skips without a word. `NF4Experts` stores such a stack as packed bytes and scales in ordinary buffers, so that a state dict of it is
plain, and dequantises the routed experts alone. Each expert is quantised by itself: equal, bit for bit, to a `Linear4bit` of its
matrix, and no block of 64 weights belongs to two experts.

A stack is packed as soon as transformers has put it together, so the floating-point model is never whole in memory.
Shape letters: X experts, O and I output and input features, T tokens, K experts per token, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from nexus.towers.filling import BLOCK

NESTED_BLOCK = 256
"""Scales that share one scale of their own: fixed inside bitsandbytes."""
STACKS = ("gate_up_proj", "down_proj")
"""Parameters of a fused experts module of transformers."""
METHOD = "nexus_nf4"
"""Name under which transformers finds the quantiser below."""


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds the weights of all its experts in 3-D parameters, as transformers' MoE models do."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate") and hasattr(module, "down_proj")


def why_not_packed(experts: Any) -> str | None:
    """What keeps a fused experts module from NF4, or None when nothing does."""
    if experts.is_transposed:
        return "their matrices are stored transposed"
    if experts.has_bias or not experts.has_gate or getattr(experts, "has_post_expert_norm", False):
        return "they have biases, a norm of their own or no gate"
    columns = [stack.shape[2] for stack in (getattr(experts, name) for name in STACKS)]
    wrong = [size for size in columns if size % BLOCK]
    return f"their rows are {wrong[0]} long, no multiple of {BLOCK}" if wrong else None


class NF4Experts(nn.Module):
    """Fused experts in NF4 with double quantisation; takes the place of the module that it is built from.

    Per stack [X, O, I] it has four buffers: the packed indices uint8 [X, O*I/2] under the stack's own name, and `_absmax` uint8
    [X, O*I/64], `_nested_absmax` float32 [X, ceil(O*I/16384)] and `_offset` float32 [X] behind it. The constant tables of NF4 are
    bitsandbytes' and are not stored.
    """

    def __init__(self, experts: Any, dtype: torch.dtype) -> None:
        """Empty buffers on the device of `experts`, whose gate, activation and sizes are kept; `dtype` is computed in."""
        super().__init__()
        self.num_experts = int(experts.num_experts)
        self.dtype = dtype
        self.shapes = {name: tuple(getattr(experts, name).shape[1:]) for name in STACKS}
        """Stack -> (O, I)."""
        self.weight_errors: dict[str, float] = {}
        """Stack -> largest relative error of an expert's matrix, measured when it was packed."""
        for name, (rows, columns) in self.shapes.items():
            size = rows * columns
            device = getattr(experts, name).device
            blocks = size // BLOCK
            empty = {
                name: torch.empty(self.num_experts, size // 2, dtype=torch.uint8, device=device),
                f"{name}_absmax": torch.empty(self.num_experts, blocks, dtype=torch.uint8, device=device),
                f"{name}_nested_absmax": torch.empty(self.num_experts, -(-blocks // NESTED_BLOCK), device=device),
                f"{name}_offset": torch.empty(self.num_experts, device=device),
            }
            for buffer, tensor in empty.items():
                self.register_buffer(buffer, tensor)
            delattr(experts, name)
        # What is left of the module is its gate, with whatever settings that has. transformers must not give it new weights.
        experts._is_hf_initialized = True
        self.gate = experts

    def pack(self, name: str, stack_XOI: Tensor) -> dict[str, Tensor]:
        """The four buffers of a stack in floating point; notes how far they are from it.

        Raises:
            ValueError: a stack of another shape.
        """
        expected = (self.num_experts, *self.shapes[name])
        if tuple(stack_XOI.shape) != expected:
            raise ValueError(f"Expected experts {expected} for {name!r}, found {tuple(stack_XOI.shape)}.")
        parts: dict[str, list[Tensor]] = {
            name: [],
            f"{name}_absmax": [],
            f"{name}_nested_absmax": [],
            f"{name}_offset": [],
        }
        errors = []
        for matrix_OI in stack_XOI:
            matrix_OI = matrix_OI.to(self.dtype)
            packed, state = bnb.functional.quantize_4bit(
                matrix_OI.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
            for part, tensor in zip(
                parts.values(), (packed.flatten(), state.absmax, state.state2.absmax, state.offset), strict=True
            ):
                part.append(tensor)
            errors.append(relative_error(bnb.functional.dequantize_4bit(packed, state), matrix_OI))
        # max() would pass over a NaN that does not come first.
        self.weight_errors[name] = float(torch.tensor(errors).max())
        return {part: torch.stack(tensors) for part, tensors in parts.items()}

    def matrix(self, name: str, expert: int) -> Tensor:
        """The dequantised matrix [O, I] of one expert, in the compute dtype."""
        packed = self.get_buffer(name)[expert]
        state = QuantState(
            absmax=self.get_buffer(f"{name}_absmax")[expert],
            shape=torch.Size(self.shapes[name]),
            dtype=self.dtype,
            blocksize=BLOCK,
            code=None,
            quant_type="nf4",
            offset=self.get_buffer(f"{name}_offset")[expert],
            state2=QuantState(
                absmax=self.get_buffer(f"{name}_nested_absmax")[expert],
                blocksize=NESTED_BLOCK,
                code=_nested_code(packed.device),
                dtype=torch.float32,
            ),
        )
        matrix_OI: Tensor = bnb.functional.dequantize_4bit(packed[:, None], state)
        return matrix_OI

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the routed experts' outputs.

        Args:
            hidden_states: [T, D].
            top_k_index: int64 [T, K], experts of each token.
            top_k_weights: [T, K].

        Returns:
            [T, D] in the type of `hidden_states`; summed in float32.
        """
        total_TD = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            tokens, slots = torch.where(top_k_index == expert)
            inner = self.gate._apply_gate(F.linear(hidden_states[tokens], self.matrix("gate_up_proj", expert)))
            output = F.linear(inner, self.matrix("down_proj", expert))
            total_TD.index_add_(0, tokens, (output * top_k_weights[tokens, slots, None]).float())
        return total_TD.to(hidden_states.dtype)

    def stored_bits(self, name: str) -> int:
        """Bits that a stack occupies: indices, scales, scales of scales and offsets."""
        parts = (name, f"{name}_absmax", f"{name}_nested_absmax", f"{name}_offset")
        return sum(self.get_buffer(part).numel() * self.get_buffer(part).element_size() * 8 for part in parts)


def relative_error(stored: Tensor, original: Tensor) -> float:
    """|stored - original| / |original| (Frobenius, in float32); 0 for a matrix of zeros."""
    reference = original.float()
    norm = reference.norm()
    return 0.0 if norm == 0 else float((stored.float() - reference).norm() / norm)


@cache
def _nested_code(device: torch.device) -> Tensor:
    code: Tensor = bnb.functional.create_dynamic_map().to(device)
    return code


Spill = Callable[[dict[str, Tensor]], bool]
"""Is given the packed tensors of one matrix or stack by their stored names; True when it keeps them and the model need not."""

_spill: ContextVar[Spill | None] = ContextVar("spill", default=None)


@contextmanager
def spilling(spill: Spill) -> Iterator[None]:
    """While the context lasts, what is packed goes to `spill`, and the model is left with tensors of the same form on meta.

    A model whose packed weights exceed the memory can so be quantised by an ordinary `from_pretrained`.
    """
    token = _spill.set(spill)
    try:
        yield
    finally:
        _spill.reset(token)


def packed_tensors(name: str, weight: Any) -> dict[str, Tensor]:
    """A packed matrix as bitsandbytes stores it: `name`, and `name.<part of its quantisation state>`."""
    state = weight.quant_state.as_dict(packed=True)
    return {name: weight.data, **{f"{name}.{part}": tensor for part, tensor in state.items()}}


def _hollow(weight: Any) -> Any:
    """A packed matrix without its bytes: what `nexus.towers.nf4.measure_coverage` asks of it can still be told."""
    states = [weight.quant_state, weight.quant_state.state2]
    hollow, nested = (
        QuantState(
            absmax=state.absmax.to("meta"), shape=state.shape, code=state.code.to("meta"), blocksize=state.blocksize,
            quant_type=state.quant_type, dtype=state.dtype,
        )
        for state in states
    )  # fmt: skip
    hollow.state2, hollow.nested, hollow.offset = nested, True, weight.quant_state.offset.to("meta")
    # The module keeps a reference of its own.
    weight.module.quant_state = hollow
    return bnb.nn.Params4bit(
        weight.data.to("meta"), requires_grad=False, quant_state=hollow, blocksize=weight.blocksize,
        compress_statistics=True, quant_type=weight.quant_type, quant_storage=weight.quant_storage, module=weight.module,
        bnb_quantized=True,
    )  # fmt: skip


def replace_experts(model: nn.Module, keep: list[str], dtype: torch.dtype) -> None:
    """Put empty `NF4Experts` in place of all fused experts whose name no pattern of `keep` matches."""
    names = [name for name, module in model.named_modules() if is_fused_experts(module)]
    for name in names:
        if should_convert_module(name, keep):
            model.set_submodule(name, NF4Experts(model.get_submodule(name), dtype))


# --- how transformers fills them ------------------------------------------------------------------------------------------------


@register_quantization_config(METHOD)
class NF4Config(BitsAndBytesConfig):
    """A BitsAndBytesConfig whose quantiser packs fused experts too."""

    def __init__(self, *settings: Any, **named: Any) -> None:
        """Takes what BitsAndBytesConfig takes: transformers makes it anew from a dictionary."""
        super().__init__(*settings, **named)  # type: ignore[no-untyped-call]
        # A registered method is a plain string; transformers' own are an enumeration of strings.
        self.quant_method = METHOD  # type: ignore[assignment]


class _PackExperts(ConversionOps):
    """Turns one finished stack into the buffers of its `NF4Experts`."""

    def convert(  # type: ignore[override]  # called with names only
        self, input_dict: Any, *, model: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        """Called by transformers with {name of the stack: tensor, or a list with it}."""
        packed = {}
        spill = _spill.get()
        for name, value in input_dict.items():
            module, stack = get_module_from_name(model, name)
            prefix = name.removesuffix(stack)
            buffers = module.pack(stack, value[0] if isinstance(value, list) else value)
            tensors = {prefix + buffer: tensor for buffer, tensor in buffers.items()}
            if spill is not None and spill(tensors):
                tensors = {buffer: tensor.to("meta") for buffer, tensor in tensors.items()}
            packed.update(tensors)
        return packed


class _Quantise(ConversionOps):
    """bitsandbytes for matrices, `_PackExperts` for stacks: transformers asks for an operation before it says for which.

    Matrices too are compared with what arrived, for the sake of those that are cut out of a larger tensor while they are loaded and
    therefore have no original of their own in the checkpoint.
    """

    def __init__(self, linear: ConversionOps) -> None:
        self._linear = linear
        self._experts = _PackExperts()

    def convert(  # type: ignore[override]  # as above
        self, input_dict: Any, *, model: Any = None, **context: Any
    ) -> dict[str, Tensor]:
        """As the operation that the tensor's module needs."""
        module, _ = get_module_from_name(model, next(iter(input_dict)))
        if isinstance(module, NF4Experts):
            return self._experts.convert(input_dict, model=model)
        converted: dict[str, Any] = self._linear.convert(input_dict, model=model, **context)
        for name, weight in converted.items():
            arrived = input_dict[name][0] if isinstance(input_dict[name], list) else input_dict[name]
            owner, _ = get_module_from_name(model, name)
            original = arrived.T if issubclass(owner.source_cls, Conv1D) else arrived
            owner.packing_error = relative_error(
                bnb.functional.dequantize_4bit(weight.data, weight.quant_state), original
            )
            spill = _spill.get()
            if spill is not None and spill(packed_tensors(name, weight)):
                converted[name] = _hollow(weight)
        return converted


@register_quantizer(METHOD)
class NF4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantiser with fused experts."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **settings: Any) -> bool:
        """Whether a tensor of the checkpoint is packed on arrival."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, NF4Experts):
            return name in STACKS
        return bool(super().param_needs_quantization(model, param_name, **settings))

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that packs such a tensor."""
        return _Quantise(super().get_quantize_ops())  # type: ignore[no-untyped-call]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **settings: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map, **settings)
        replace_experts(model, self.modules_to_not_convert, self.quantization_config.bnb_4bit_compute_dtype)
