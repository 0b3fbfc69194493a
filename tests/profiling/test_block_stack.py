"""Finding the blocks, taking over their calls, and leaving the model as it was found."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from nexus.errors import ProfilingError
from nexus.profiling.layers import BlockCall, BlockStack, Rows, find_blocks, undisturbed
from nexus.profiling.niwt import NIWTProfiler


def test_the_text_decoder_is_found_although_the_vision_tower_is_deeper(gemma3_multimodal):
    stack = find_blocks(gemma3_multimodal)
    assert stack.path == "model.language_model.layers"
    assert len(stack) == 3 < len(gemma3_multimodal.model.vision_tower.encoder.layers)


def test_blocks_are_found_in_decoders(causal_lm):
    assert find_blocks(causal_lm).path in ("model.layers", "model.language_model.layers")


def test_blocks_are_found_in_encoders(siglip, whisper):
    assert find_blocks(siglip).path == "vision_model.encoder.layers"
    assert find_blocks(whisper).path == "encoder.layers"
    assert find_blocks(siglip).blocks == tuple(siglip.vision_model.encoder.layers)


def test_blocks_can_be_named_or_given(gemma3_multimodal):
    path = "model.vision_tower.encoder.layers"
    by_name = find_blocks(gemma3_multimodal, path)
    given = find_blocks(gemma3_multimodal, gemma3_multimodal.model.vision_tower.encoder.layers)
    as_list = find_blocks(gemma3_multimodal, list(gemma3_multimodal.model.vision_tower.encoder.layers))
    assert by_name.path == given.path == as_list.path == path
    assert by_name.blocks == given.blocks == as_list.blocks


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("model.blocks", "layers='model.blocks', found no such module in Qwen3ForCausalLM"),
        ("model.norm", "list of blocks at layers='model.norm', found a Qwen3RMSNorm"),
        ([0, 2], "all modules of one list inside Qwen3ForCausalLM, found something else"),
        ([], "all modules of one list"),
        ([nn.Identity()], "all modules of one list"),
    ],
)
def test_layers_that_are_no_block_list_are_refused(qwen3, layers, message):
    with pytest.raises(ProfilingError, match=message.replace(".", r"\.")):
        NIWTProfiler(qwen3, layers=layers)


def test_a_part_of_the_blocks_is_refused(qwen3):
    with pytest.raises(ProfilingError, match="Pass the whole list"):
        find_blocks(qwen3, list(qwen3.model.layers)[:2])


def test_an_empty_list_is_no_block_list(own_qwen3):
    own_qwen3.model.layers = nn.ModuleList()
    with pytest.raises(ProfilingError, match=r"list of blocks at layers='model\.layers'"):
        find_blocks(own_qwen3, "model.layers")
    with pytest.raises(ProfilingError, match="found no list of them"):
        find_blocks(own_qwen3)


def test_lists_of_other_modules_are_no_blocks():
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )
    model.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
    assert find_blocks(model).path.endswith("encoder.layers")


@pytest.mark.parametrize(("keyword", "value"), [("strategy", "fast"), ("micro_batch_size", 0)])
def test_settings_out_of_range_are_refused(qwen3, keyword, value):
    with pytest.raises(ValueError, match=f"Expected {keyword}"):
        NIWTProfiler(qwen3, **{keyword: value})


class Recorder(nn.Module):
    """A block that keeps the side inputs it was called with."""

    def forward(self, hidden_states, mask=None, **kwargs):
        self.seen = (mask, kwargs)
        return hidden_states


def test_rows_are_selected_in_every_side_input_that_has_a_batch():
    block, batch = Recorder(), 3
    index_R = torch.tensor([2, 0, 2, 1])
    inputs = {
        "position_ids": torch.randn(3, batch, 5),  # sections first, as many as rows
        "position_embeddings": (torch.randn(3, batch, 5, 4), torch.randn(batch, 5, 4)),
        "bias": [torch.randn(batch, 2)],
        "masks": {"full": torch.randn(batch, 1, 5, 5), "shared": torch.randn(1, 1, 5, 5)},
        "cache_position": torch.arange(batch),
        "past": "kept",
    }
    mask = torch.randn(batch, 5)
    stack = BlockStack("blocks", [block])
    with stack.intercept(lambda call: call.run(torch.zeros(4, 5, 8), Rows(index_R, batch))) as calls:
        output = block(torch.zeros(batch, 5, 8), mask, **inputs)
    assert output.shape == (4, 5, 8)
    assert calls == [1]
    seen_mask, seen = block.seen
    assert torch.equal(seen_mask, mask[index_R])
    assert torch.equal(seen["position_ids"], inputs["position_ids"][:, index_R])
    assert torch.equal(seen["position_embeddings"][0], inputs["position_embeddings"][0][:, index_R])
    assert torch.equal(seen["position_embeddings"][1], inputs["position_embeddings"][1][index_R])
    assert torch.equal(seen["bias"][0], inputs["bias"][0][index_R])
    assert torch.equal(seen["masks"]["full"], inputs["masks"]["full"][index_R])
    assert seen["masks"]["shared"] is inputs["masks"]["shared"]
    assert seen["cache_position"] is inputs["cache_position"]
    assert seen["past"] == "kept"


def test_hidden_states_may_be_passed_by_name():
    block = Recorder()
    hidden = torch.randn(2, 3, 4)
    with BlockStack("blocks", [block]).intercept(lambda call: call.run(call.hidden_RTD) + 1):
        assert torch.equal(block(hidden_states=hidden), hidden + 1)


def test_shadowed_forwards_are_given_back_also_those_set_on_the_instance(own_qwen3):
    blocks = own_qwen3.model.layers
    own_forward = blocks[1].forward
    blocks[1].forward = own_forward  # what accelerate's hooks do
    stack = find_blocks(own_qwen3)
    with pytest.raises(KeyError), stack.intercept(lambda call: call.hidden_RTD):
        raise KeyError
    assert "forward" not in blocks[0].__dict__
    assert blocks[1].__dict__["forward"] is own_forward
    assert "forward" not in blocks[2].__dict__


def hook_counts(model: PreTrainedModel) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


@pytest.mark.parametrize("strategy", ["brute", "prefix", "triangular"])
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was_found_also_after_an_exception(own_qwen3, text_batch, strategy, failing):
    model = own_qwen3.train()
    model.model.layers[1].eval()  # a mixed state has to come back as it was
    fail_at = model.model.layers[2].mlp
    hook = (
        fail_at.register_forward_hook(lambda *_: 1 / 0) if failing else fail_at.register_forward_hook(lambda *_: None)
    )
    modes = [module.training for module in model.modules()]
    parameters = {name: parameter.clone() for name, parameter in model.named_parameters()}
    hooks, attributes = hook_counts(model), [set(module.__dict__) for module in model.modules()]
    random_state = torch.get_rng_state()
    arguments = (text_batch.input_ids_BT, text_batch.attention_mask_BT)
    for call in (
        lambda: NIWTProfiler(model, strategy=strategy).delta_nll(*arguments, text_batch.loss_mask_BT),
        lambda: NIWTProfiler(model, strategy=strategy).ablated_generations(*arguments, 3),
    ):
        if failing:
            with pytest.raises(ZeroDivisionError):
                call()
        else:
            call()
    assert [module.training for module in model.modules()] == modes
    assert hook_counts(model) == hooks
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name])
        assert parameter.requires_grad
        assert parameter.dtype == torch.float32
    hook.remove()
    # A model that was measured can still be trained.
    if not failing:
        model(input_ids=text_batch.input_ids_BT, labels=text_batch.input_ids_BT).loss.backward()


def test_random_numbers_drawn_inside_do_not_shift_those_after():
    module = nn.Dropout()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with undisturbed(module):
        torch.rand(10)
        assert not module.training
    assert module.training
    assert torch.equal(torch.rand(3), expected)


def test_dropout_is_off_while_measuring(text_batch):
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        initializer_range=0.2,
        attention_dropout=0.5,
    )
    profiler = NIWTProfiler(Qwen3ForCausalLM(config).train())
    arguments = (text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    assert torch.equal(profiler.delta_nll(*arguments), profiler.delta_nll(*arguments))


def test_a_block_call_keeps_what_a_block_returns_beside_its_states():
    call = BlockCall(0, lambda hidden: (hidden * 2, "weights"), (torch.ones(1, 1, 1),), {})
    assert call.run(call.hidden_RTD).item() == 2
    assert call.extras == ("weights",)
