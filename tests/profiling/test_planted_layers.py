"""A layer that alone does the work is ranked first, whatever kind of model it is planted in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nexus.profiling.layers import find_blocks
from nexus.profiling.niwt import EncoderProfileBatch, NIWTProfiler, ProfileBatch

PLANTED = 1
# The last linear maps of the residual branches, by the names that the architectures give them.
OUTPUTS = ("o_proj", "out_proj", "down_proj", "fc2")


def plant(model) -> nn.Module:
    """Return a copy of the model in which all blocks but one add next to nothing."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for index, block in enumerate(find_blocks(model).blocks):
            if index == PLANTED:
                continue
            for name, parameter in block.named_parameters():
                if any(output in name for output in OUTPUTS):
                    parameter.mul_(0.02)
            if hasattr(block, "post_feedforward_layernorm"):
                # Gemma normalises what a branch adds, and scales it by one more than these weights.
                block.post_attention_layernorm.weight.fill_(-0.98)
                block.post_feedforward_layernorm.weight.fill_(-0.98)
    return model


def require_first(profile) -> None:
    critical = profile.critical_layers[0]
    assert critical.layer == PLANTED
    planted, *others = sorted(profile.layers, key=lambda layer: layer.layer != PLANTED)
    assert planted.ci95[0] > max(layer.delta_nll for layer in others)
    assert planted.kl_nats > max(layer.kl_nats for layer in others)
    assert planted.noise_ablation.kl_nats > max(layer.noise_ablation.kl_nats for layer in others)
    assert planted.mean_ablation.kl_nats > max(layer.mean_ablation.kl_nats for layer in others)
    # What the layer is needed for lies, at least in part, in the components that hold 95 % of its variance.
    assert critical.reconstruction.kl_nats < planted.kl_nats


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "glm4_moe"])
def test_the_planted_layer_of_a_language_model_is_ranked_first(planted_text_models, architecture):
    """Scored on the model's own greedy choices, which only its working layer makes."""
    model = plant(planted_text_models[architecture])
    ids_BT = torch.randint(3, 100, (12, 8), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    with torch.no_grad():
        ids_BT[:, -1] = model(ids_BT).logits[:, -2].argmax(-1)
    loss_mask_BT = torch.zeros_like(ids_BT)
    loss_mask_BT[:, -1] = 1
    batch = ProfileBatch([f"s{row:02}" for row in range(12)], ids_BT, mask_BT, loss_mask_BT)
    require_first(NIWTProfiler(model).profile([batch]))


@pytest.mark.parametrize("architecture", ["siglip", "whisper"])
def test_the_planted_layer_of_an_encoder_is_ranked_first(request, architecture):
    model = plant(request.getfixturevalue(architecture))
    generator = torch.Generator().manual_seed(0)
    inputs = (
        {"pixel_values": torch.randn(12, 3, 16, 16, generator=generator)}
        if architecture == "siglip"
        else {"input_features": torch.randn(12, 16, 40, generator=generator)}
    )
    with torch.no_grad():
        labels_B = model(**inputs).logits.argmax(-1)
    profile = NIWTProfiler(model).profile([EncoderProfileBatch([f"s{row:02}" for row in range(12)], inputs, labels_B)])
    require_first(profile)
    drops = [layer.cosine_drop for layer in profile.layers]
    assert drops[PLANTED] == max(drops)
