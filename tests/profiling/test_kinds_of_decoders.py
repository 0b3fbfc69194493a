"""Hybrid, mixed and multimodal decoders: what can be stacked is stacked, what cannot is run apart, and both are exact."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from nexus.errors import ProfilingError
from nexus.profiling.crossattention import SharedCrossCache
from nexus.profiling.decoding import NotStackableError
from nexus.profiling.layers import find_blocks
from nexus.profiling.niwt import NIWTProfiler, ProfileBatch

TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
HEADED = {**TEXT, "head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
SEEING = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 64,
}

HYBRIDS = {
    "Qwen3NextForCausalLM": {
        **HEADED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "GraniteMoeHybridForCausalLM": {
        **TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64, "mamba_n_heads": 4,
        "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "GptOssForCausalLM": {
        **HEADED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
# Fewer caches than blocks; blocks that hand more than hidden states on; rows that are counted behind the blocks.
UNSTACKABLE = {
    "MiniMaxForCausalLM": {
        **HEADED, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "HYV4ForCausalLM": {
        **HEADED, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "kv_lora_rank": 32, "q_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    },
    "GPTBigCodeForCausalLM": {
        "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "initializer_range": 0.2, "tie_word_embeddings": False,
    },
}  # fmt: skip


def build(name: str, config: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**config)).eval()


def naive_sums(model, blocks, skipping, batch) -> Tensor:
    """Summed negative log-likelihoods [L+1, B]: one unpadded sample and one ablation at a time."""
    sums_VB = torch.zeros(len(blocks) + 1, len(batch.input_ids_BT), dtype=torch.float64)
    for variant in range(len(blocks) + 1):
        for row, mask_T in enumerate(batch.attention_mask_BT.bool()):
            ids_T, scored_T = batch.input_ids_BT[row, mask_T], batch.loss_mask_BT[row, mask_T].bool()
            with skipping(blocks, variant - 1 if variant else None), torch.no_grad():
                log_probs = model(input_ids=ids_T[None]).logits[0].double().log_softmax(-1)
            sums_VB[variant, row] = -log_probs[:-1][scored_T[1:], ids_T[1:][scored_T[1:]]].sum()
    return sums_VB


def generated(model, blocks, skipping, batch, max_new_tokens: int) -> Tensor:
    """The library's own greedy tokens [L+1, B, A]: one unpadded sample and one ablation at a time."""
    rows = []
    for variant in range(len(blocks) + 1):
        for row, mask_T in enumerate(batch.attention_mask_BT.bool()):
            prompt = batch.input_ids_BT[row, mask_T][None]
            with skipping(blocks, variant - 1 if variant else None):
                output = model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
            rows.append(output[0, prompt.shape[1] :])
    return torch.stack(rows).view(len(blocks) + 1, -1, max_new_tokens)


@pytest.mark.parametrize("name", [*HYBRIDS, *UNSTACKABLE])
def test_every_kind_of_block_is_ablated_exactly(name, text_batch, skipping, caplog):
    model = build(name, {**HYBRIDS, **UNSTACKABLE}[name])
    model.generation_config.eos_token_id = None
    # The state of MiniMax's linear attention takes padding in while it decodes, in the library's own generate too.
    profiler = NIWTProfiler(model, micro_batch_size=1 if name == "MiniMaxForCausalLM" else None)
    sums_VB = naive_sums(model, profiler.stack.blocks, skipping, text_batch)
    batch = ProfileBatch(list("abcde"), text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    prompts = text_batch.input_ids_BT, text_batch.attention_mask_BT
    with caplog.at_level(logging.WARNING, logger="nexus.profiling.niwt"):
        measurement = profiler.measure(batch)
        tokens_VBA = profiler.ablated_generations(*prompts, 3)
        profiler.ablated_generations(*prompts, 1)
    # float32 forwards in another order; recurrent states add up over the row.
    torch.testing.assert_close(torch.from_numpy(measurement.delta_LB), sums_VB[1:] - sums_VB[:1], rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens_VBA, generated(model, profiler.stack.blocks, skipping, text_batch, 3))
    said = [r.getMessage().split(";")[1] for r in caplog.records if r.name == "nexus.profiling.niwt"]
    apart = " going on with one decode per ablation."
    if name in HYBRIDS:
        assert (measurement.strategy, said) == ("triangular", [])
    elif name == "GPTBigCodeForCausalLM":
        assert (measurement.strategy, said) == ("prefix", [" going on with strategy prefix.", apart])
    else:
        assert (measurement.strategy, said) == ("triangular", [apart])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MiniMaxForCausalLM", "found 2: ablations cannot be stacked"),
        ("HYV4ForCausalLM", "hidden states alone, found more"),
    ],
)
def test_stacking_that_was_asked_for_is_refused_where_it_cannot_be(name, message, text_batch):
    model = build(name, UNSTACKABLE[name])
    with pytest.raises(NotStackableError, match=message):
        NIWTProfiler(model, strategy="stacked").ablated_generations(
            text_batch.input_ids_BT, text_batch.attention_mask_BT, 3
        )
    model = build("GPTBigCodeForCausalLM", UNSTACKABLE["GPTBigCodeForCausalLM"])
    with pytest.raises(RuntimeError, match="shape"):
        NIWTProfiler(model, strategy="triangular").delta_nll(
            text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT
        )


MULTIMODAL = {
    "Qwen3VLForConditionalGeneration": {
        "text_config": {**HEADED, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        "vision_config": {**SEEING, "depth": 5, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        "image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123,
        "tie_word_embeddings": False,
    },
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {
            **SEEING, "depth": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        "audio_config": {
            "num_mel_bins": 16, "encoder_layers": 5, "encoder_attention_heads": 4, "encoder_ffn_dim": 128, "d_model": 64,
            "max_source_positions": 64, "output_dim": 64, "n_window": 20,
        },
        "audio_token_index": 120, "image_token_index": 121, "video_token_index": 122, "vision_start_token_id": 123,
        "vision_end_token_id": 124, "audio_end_token_id": 125,
    },
}  # fmt: skip
TOWERS = {
    "Qwen3VLForConditionalGeneration": ("model.language_model.layers", "model.visual.blocks"),
    "Qwen2_5OmniThinkerForConditionalGeneration": ("model.language_model.layers", "model.audio_tower.layers"),
}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_decoder_of_a_multimodal_model_is_what_is_ablated(name, text_batch, skipping):
    """Its other towers have more blocks, and reading text goes past them."""
    model = build(name, MULTIMODAL[name])
    path, tower = TOWERS[name]
    profiler = NIWTProfiler(model)
    assert (profiler.stack.path, profiler.stack.side, len(profiler.stack)) == (path, "decoder", 3)
    found = profiler.delta_nll_per_sample(
        text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT
    )
    sums_VB = naive_sums(model, profiler.stack.blocks, skipping, text_batch)
    expected_LB = (sums_VB[1:] - sums_VB[:1]) / text_batch.loss_mask_BT.sum(1)
    torch.testing.assert_close(found.double(), expected_LB, rtol=1e-4, atol=1e-4)
    assert found.abs().max() > 1e-2
    other = find_blocks(model, tower)
    assert len(other) > 3
    assert other.side == "encoder"
    with pytest.raises(ProfilingError, match=rf"'{tower}' once, found"):
        NIWTProfiler(model, layers=tower).delta_nll(
            text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT
        )


def test_images_beside_the_text_are_seen_by_every_ablation(gemma3_multimodal, text_batch, skipping):
    """Rows with an image each: the model's own placeholders, one row at a time by hand."""
    model = copy.deepcopy(gemma3_multimodal)
    # Zero before training: no image would be seen.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    image_T = torch.tensor([121, 120, 120, 120, 120, 122])
    rows = slice(0, 3)
    ids_BT = torch.cat(
        [text_batch.input_ids_BT[rows], image_T.expand(3, -1), text_batch.input_ids_BT[rows, -4:]], dim=1
    )
    mask_BT = torch.cat([text_batch.attention_mask_BT[rows], torch.ones(3, 10, dtype=torch.int64)], dim=1)
    loss_BT = torch.zeros_like(ids_BT)
    loss_BT[:, -4:] = 1
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels}
    blocks = find_blocks(model).blocks
    for strategy in ("auto", "brute"):
        profiler = NIWTProfiler(model, strategy=strategy, micro_batch_size=2)
        found = profiler.delta_nll_per_sample(ids_BT, mask_BT, loss_BT, inputs=inputs)
        for layer in (0, 2):
            for row in range(3):
                real = mask_BT[row].bool()
                nll = []
                for index in (None, layer):
                    with skipping(blocks, index), torch.no_grad():
                        logits = model(input_ids=ids_BT[row, real][None], pixel_values=pixels[row : row + 1]).logits
                    nll.append(torch.nn.functional.cross_entropy(logits[0, -5:-1].double(), ids_BT[row, -4:]))
                assert float(found[layer, row]) == pytest.approx(float(nll[1] - nll[0]), abs=1e-4)
    other = profiler.delta_nll_per_sample(ids_BT, mask_BT, loss_BT, inputs={"pixel_values": pixels.flip(0)})
    assert not torch.allclose(other, found, atol=1e-3)
    batch = ProfileBatch(["a", "b", "c"], ids_BT, mask_BT, loss_BT, inputs)
    assert NIWTProfiler(model).measure(batch).strategy == "prefix"


def test_a_model_that_projects_again_does_not_read_what_is_shared(speech_model):
    layer = SharedCrossCache([transformers.cache_utils.DynamicLayer()]).layers[0]
    with pytest.raises(NotImplementedError, match="found new keys and values"):
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


def test_a_single_sample_may_have_media_of_any_shape_beside_it():
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=60,
        vision_start_token_id=61,
        video_token_id=62,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    ids_BT = torch.tensor([[1, 61, 60, 60, 60, 60, 5, 6, 7]])
    mask_BT, loss_BT = torch.ones_like(ids_BT), torch.arange(9)[None] >= 7
    media = {
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids_BT == 60).long(),
    }
    fast, slow = (
        NIWTProfiler(model, strategy=strategy).measure(ProfileBatch(["a"], ids_BT, mask_BT, loss_BT, media))
        for strategy in ("prefix", "brute")
    )
    assert fast.delta_LB.shape == (3, 1)
    np.testing.assert_allclose(fast.delta_LB, slow.delta_LB, atol=1e-5)
    with torch.no_grad():
        logits_TV = model(input_ids=ids_BT, **media).logits[0].double()
    nll = -torch.log_softmax(logits_TV, -1)[[6, 7], [6, 7]].sum()
    assert fast.clean_nll_B[0] == pytest.approx(float(nll), abs=1e-5)
    twice = [tensor.repeat(2, 1) for tensor in (ids_BT, mask_BT, loss_BT)]
    with pytest.raises(ValueError, match="batch of 2 rows in front"):
        NIWTProfiler(model).measure(ProfileBatch(["a", "b"], *twice, media))
