"""Scales of double-quantised weights, dequantised once for many products."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, Qwen3ForCausalLM

from nexus.profiling.niwt import NIWTProfiler
from nexus.profiling.scales import plain_scales
from nexus.towers.nf4 import freeze


@pytest.fixture(scope="module")
def frozen(qwen3, tmp_path_factory) -> PreTrainedModel:
    """A model as towers are loaded: no forward repacks its weights."""
    path = tmp_path_factory.mktemp("frozen")
    qwen3.save_pretrained(path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = Qwen3ForCausalLM.from_pretrained(path, quantization_config=config, device_map="cpu")
    freeze(model)
    return model


def states(model) -> list:
    return [parameter.quant_state for parameter in model.parameters() if hasattr(parameter, "quant_state")]


@torch.no_grad()
def test_a_forward_is_the_same_bit_for_bit_with_scales_dequantised_beforehand(frozen):
    ids_BT = torch.randint(3, 100, (3, 7), generator=torch.Generator().manual_seed(0))
    before = states(frozen)
    assert before
    assert all(state.nested for state in before)
    expected = frozen(ids_BT).logits
    with plain_scales(frozen):
        assert not any(state.nested for state in states(frozen))
        assert torch.equal(frozen(ids_BT).logits, expected)
        with plain_scales(frozen):
            assert torch.equal(frozen(ids_BT).logits, expected)
        assert not any(state.nested for state in states(frozen))
    assert all(found is state for found, state in zip(states(frozen), before, strict=True))


def test_weights_are_as_found_after_an_error(frozen):
    before = states(frozen)
    with pytest.raises(ValueError, match="stop"), plain_scales(frozen):
        raise ValueError("stop")
    assert all(found is state for found, state in zip(states(frozen), before, strict=True))


def test_matrices_that_a_forward_may_repack_are_left_alone(frozen):
    first, *_ = (module for module in frozen.modules() if hasattr(module, "support_avx512bf16_for_cpu"))
    first.support_avx512bf16_for_cpu = True
    try:
        with plain_scales(frozen):
            assert [state.nested for state in states(frozen)] == [True] + [False] * (len(states(frozen)) - 1)
    finally:
        first.support_avx512bf16_for_cpu = False


def test_generating_leaves_scales_as_it_found_them(frozen):
    before = states(frozen)
    seen = []
    hook = frozen.lm_head.register_forward_pre_hook(lambda *_: seen.append(any(s.nested for s in states(frozen))))
    ids_BT = torch.randint(3, 100, (2, 5), generator=torch.Generator().manual_seed(0))
    NIWTProfiler(frozen).ablated_generations(ids_BT, torch.ones_like(ids_BT), 3)
    hook.remove()
    assert seen == [False] * 3
    assert all(found is state for found, state in zip(states(frozen), before, strict=True))
