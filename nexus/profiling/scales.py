"""Double-quantised weights in a decode, which multiplies each matrix with few rows many times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
from torch import nn


@contextmanager
def plain_scales(model: nn.Module) -> Iterator[None]:
    """While the body runs, hold the scales of double-quantised matrices in float32: many small products spend a sixth of their
    dequantising on scales.

    Results are the same bit for bit: the same operation runs once instead of at each product. It takes half a bit per parameter.
    Left alone are matrices that a forward may repack, and those on a GPU, whose kernels dequantise scales and weights at once.
    """
    nested: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            if not isinstance(module, bnb.nn.Linear4bit) or module.support_avx512bf16_for_cpu:
                continue
            weight: Any = module.weight
            state = weight.quant_state
            if weight.device.type == "cpu" and state.nested:
                nested.append((weight, state))
                weight.quant_state = bnb.functional.QuantState(
                    bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset,
                    shape=state.shape,
                    code=state.code,
                    blocksize=state.blocksize,
                    quant_type=state.quant_type,
                    dtype=state.dtype,
                )
        yield
    finally:
        for weight, state in nested:
            weight.quant_state = state
