"""Stacked greedy decoding against transformers' own `generate` under a hook that skips one block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nexus.errors import ProfilingError
from nexus.profiling.decoding import StopTokens, stacked_generations, stop_tokens
from nexus.profiling.inputs import model_inputs
from nexus.profiling.layers import BlockStack
from nexus.profiling.niwt import NIWTProfiler, ProfileBatch

STRATEGIES = ["brute", "stacked"]


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    """Four left-padded prompts; the longest is longer than the sliding window of the test models."""
    input_ids_BT = torch.randint(3, 100, (4, 9), generator=torch.Generator().manual_seed(3))
    attention_mask_BT = torch.ones_like(input_ids_BT)
    for row, padding in enumerate([0, 3, 7, 1]):
        attention_mask_BT[row, :padding] = 0
        input_ids_BT[row, :padding] = 0
    return input_ids_BT, attention_mask_BT


def one_at_a_time(model: PreTrainedModel, blocks, skipping, prompts, max_new_tokens: int) -> Tensor:
    """The sequential loop that stacking replaces: batch 1, no padding, one `generate` per (ablation, sample)."""
    pad_id = stop_tokens(model).pad_id
    tokens_VBA = torch.full((len(blocks) + 1, len(prompts[0]), max_new_tokens), pad_id)
    for variant in range(len(blocks) + 1):
        for row, (ids_T, mask_T) in enumerate(zip(*prompts, strict=True)):
            prompt = ids_T[mask_T.bool()][None]
            with skipping(blocks, variant - 1 if variant else None):
                output = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad_id,
                )
            generated = output[0, prompt.shape[1] :]
            tokens_VBA[variant, row, : len(generated)] = generated
    return tokens_VBA


def test_tokens_equal_generating_one_ablation_and_sample_at_a_time(causal_lm, prompts, skipping):
    expected_VBA = one_at_a_time(causal_lm, NIWTProfiler(causal_lm).stack.blocks, skipping, prompts, 8)
    assert len(expected_VBA.flatten(1).unique(dim=0)) == 4
    for strategy in STRATEGIES:
        tokens_VBA = NIWTProfiler(causal_lm, strategy=strategy).ablated_generations(*prompts, 8)
        assert tokens_VBA.dtype == torch.int64
        assert torch.equal(tokens_VBA, expected_VBA)


def test_models_that_count_positions_themselves_are_stacked_too(prompts, skipping):
    torch.manual_seed(0)
    config = BloomConfig(
        hidden_size=64, n_layer=2, n_head=4, vocab_size=128, pad_token_id=0, eos_token_id=2, initializer_range=0.2
    )
    model = BloomForCausalLM(config).eval()
    profiler = NIWTProfiler(model)
    tokens_VBA = profiler.ablated_generations(*prompts, 5)
    assert torch.equal(tokens_VBA, one_at_a_time(model, profiler.stack.blocks, skipping, prompts, 5))


@pytest.fixture(params=["one", "several"])
def stopping_qwen3(own_qwen3, prompts, request) -> PreTrainedModel:
    """A model whose rows stop at different steps: its stop tokens are ones that it is seen to generate."""
    tokens = NIWTProfiler(own_qwen3, strategy="brute").ablated_generations(*prompts, 10)
    ids, counts = tokens.unique(return_counts=True)
    frequent = ids[counts.argsort(descending=True)]
    own_qwen3.generation_config.eos_token_id = int(frequent[1]) if request.param == "one" else frequent[1:6].tolist()
    return own_qwen3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_positions_after_a_stop_token_hold_the_pad_id(stopping_qwen3, prompts, skipping, strategy):
    profiler = NIWTProfiler(stopping_qwen3, strategy=strategy)
    tokens_VBA = profiler.ablated_generations(*prompts, 10)
    assert torch.equal(tokens_VBA, one_at_a_time(stopping_qwen3, profiler.stack.blocks, skipping, prompts, 10))
    eos = torch.tensor(stopping_qwen3.generation_config.eos_token_id).flatten()
    has_ended = torch.isin(tokens_VBA, eos).cumsum(-1) - torch.isin(tokens_VBA, eos).long() > 0
    assert has_ended.any()
    assert not has_ended[..., -1].all()
    assert (tokens_VBA[has_ended] == 0).all()


def test_finished_rows_leave_the_batch(stopping_qwen3, prompts):
    sizes = []
    stopping_qwen3.lm_head.register_forward_hook(lambda _, args, output: sizes.append(len(output)))
    tokens_VBA = NIWTProfiler(stopping_qwen3).ablated_generations(*prompts, 10)
    eos = torch.tensor(stopping_qwen3.generation_config.eos_token_id).flatten()
    ended_by_step = (torch.isin(tokens_VBA, eos).cumsum(-1) > 0).flatten(0, 1).sum(0)
    # The batch of step t is what was alive after step t-1.
    assert sizes[0] == 16
    assert sizes[1:] == (16 - ended_by_step[: len(sizes) - 1]).tolist()
    assert sizes[-1] < 16


def test_decoding_ends_with_the_last_row(own_qwen3, prompts):
    first = NIWTProfiler(own_qwen3).ablated_generations(*prompts, 1)
    own_qwen3.generation_config.eos_token_id = first.unique().tolist()
    for strategy in STRATEGIES:
        calls = []
        hook = own_qwen3.lm_head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tokens_VBA = NIWTProfiler(own_qwen3, strategy=strategy).ablated_generations(*prompts, 10)
        hook.remove()
        assert torch.equal(tokens_VBA[..., :1], first)
        assert (tokens_VBA[..., 1:] == 0).all()
        assert len(calls) == (1 if strategy == "stacked" else 4)


def test_a_single_ablation_may_outlive_all_others(own_qwen3, prompts, skipping):
    # Stop tokens: everything that any other variant says first, so that the ablation of block 1 goes on alone.
    first_VB = NIWTProfiler(own_qwen3).ablated_generations(*prompts, 1)[..., 0]
    others = set(first_VB[[0, 1, 3]].flatten().tolist())
    alone = [row for row in range(4) if int(first_VB[2, row]) not in others]
    assert alone
    own_qwen3.generation_config.eos_token_id = sorted(others)
    profiler = NIWTProfiler(own_qwen3)
    tokens_VBA = profiler.ablated_generations(*prompts, 6)
    assert torch.equal(tokens_VBA, one_at_a_time(own_qwen3, profiler.stack.blocks, skipping, prompts, 6))
    assert (tokens_VBA[[0, 1, 3], :, 1:] == 0).all()
    assert (tokens_VBA[2, alone, 1] != 0).all()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batch_size_changes_no_token(qwen3, prompts, micro_batch_size):
    expected = NIWTProfiler(qwen3).ablated_generations(*prompts, 8)
    result = NIWTProfiler(qwen3, micro_batch_size=micro_batch_size).ablated_generations(*prompts, 8)
    assert torch.equal(result, expected)


def test_a_block_computes_no_row_that_skips_it_and_none_that_equals_the_clean_one(own_qwen3, prompts):
    """While an ablation generates the clean tokens, the blocks before the skipped one have nothing to do for it."""
    rows: list[list[int]] = [[], [], []]
    for index, layer in enumerate(own_qwen3.model.layers):
        layer.mlp.register_forward_hook(lambda _, args, output, index=index: rows[index].append(len(output)))
    own_qwen3.generation_config.eos_token_id = None
    tokens_VBA = NIWTProfiler(own_qwen3).ablated_generations(*prompts, 5)
    has_parted_LBA = (tokens_VBA[1:] != tokens_VBA[:1]).cumsum(-1) > 0
    shares = 0
    for index in range(3):
        expected = [4 * (index + 1)]
        for step in range(4):
            later = 4 * (2 - index) - int(has_parted_LBA[index + 1 :, :, step].sum())
            shares += later
            expected.append(4 * 3 - later)
        assert rows[index] == expected
    assert shares > 0


def test_an_ablation_that_parts_late_is_copied_from_the_clean_row(own_qwen3, prompts, skipping):
    with torch.no_grad():
        # The last block does little: its ablation says what the clean model says for a while.
        own_qwen3.model.layers[2].self_attn.o_proj.weight.mul_(0.2)
        own_qwen3.model.layers[2].mlp.down_proj.weight.mul_(0.2)
    own_qwen3.generation_config.eos_token_id = None
    profiler = NIWTProfiler(own_qwen3)
    tokens_VBA = profiler.ablated_generations(*prompts, 12)
    num_agreeing_B = ((tokens_VBA[3] != tokens_VBA[0]).cumsum(-1) == 0).sum(-1)
    assert ((num_agreeing_B > 2) & (num_agreeing_B < 11)).any()
    assert torch.equal(tokens_VBA, one_at_a_time(own_qwen3, profiler.stack.blocks, skipping, prompts, 12))


def test_states_that_no_window_and_no_column_holds_follow_their_rows(prompts, skipping):
    """Recurrent layers keep one state per row."""
    torch.manual_seed(0)
    config = Lfm2Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        layer_types=["conv", "full_attention", "conv"],
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = Lfm2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    profiler = NIWTProfiler(model)
    prompts = tuple(tensor[:1] for tensor in prompts)
    stacked = profiler.ablated_generations(*prompts, 6)
    assert torch.equal(stacked, one_at_a_time(model, profiler.stack.blocks, skipping, prompts, 6))


def test_one_block_is_enough(prompts, skipping):
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    profiler = NIWTProfiler(model)
    tokens_VBA = profiler.ablated_generations(*prompts, 6)
    assert torch.equal(tokens_VBA, one_at_a_time(model, profiler.stack.blocks, skipping, prompts, 6))


def test_teacher_forced_exact_match_equals_greedy_exact_match(qwen3, prompts):
    """Greedy decoding gives exactly the gold answer iff the argmax is right at each gold position, given the gold so far."""
    input_ids_BT, attention_mask_BT = prompts
    profiler = NIWTProfiler(qwen3)
    tokens_VBA = profiler.ablated_generations(input_ids_BT, attention_mask_BT, 2)
    agreements = []
    for gold_BA in (tokens_VBA[0], tokens_VBA[2]):
        batch = ProfileBatch(
            [str(row) for row in range(4)],
            torch.cat([input_ids_BT, gold_BA], dim=1),
            torch.cat([attention_mask_BT, torch.ones_like(gold_BA)], dim=1),
            torch.cat([torch.zeros_like(input_ids_BT), torch.ones_like(gold_BA)], dim=1),
        )
        expected_VB = (tokens_VBA == gold_BA).all(-1)
        assert profiler.measure(batch).correct_VB.tolist() == expected_VB.tolist()
        agreements.append(expected_VB.float().mean())
    assert min(agreements) > 0
    assert max(agreements) < 1


def test_stop_tokens_are_the_models_own(own_qwen3):
    config = own_qwen3.generation_config
    assert stop_tokens(own_qwen3) == StopTokens((2,), 0)
    config.eos_token_id, config.pad_token_id = [7, 5], None
    assert stop_tokens(own_qwen3) == StopTokens((7, 5), 7)
    config.eos_token_id = None
    assert stop_tokens(own_qwen3) == StopTokens((), 0)


def test_right_padded_prompts_are_refused(qwen3, prompts):
    input_ids_BT, attention_mask_BT = prompts
    with pytest.raises(ValueError, match="padded on the left"):
        NIWTProfiler(qwen3).ablated_generations(input_ids_BT, attention_mask_BT.flip(1), 3)


def test_generating_nothing_is_refused(qwen3, prompts):
    with pytest.raises(ValueError, match="max_new_tokens of at least 1, found 0"):
        NIWTProfiler(qwen3).ablated_generations(*prompts, 0)


def test_a_model_that_cannot_generate_is_refused(siglip, prompts):
    with pytest.raises(ProfilingError, match="SiglipForImageClassification, which cannot generate"):
        NIWTProfiler(siglip).ablated_generations(*prompts, 3)


@pytest.fixture(scope="module")
def recurrent() -> MambaForCausalLM:
    """Keeps a past of its own kind."""
    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=128, state_size=8, initializer_range=0.2, eos_token_id=None
    )
    return MambaForCausalLM(config).eval()


@pytest.mark.parametrize("strategy", ["auto", "brute"])
def test_a_model_without_a_cache_of_its_past_reads_the_text_again(recurrent, prompts, strategy):
    found_VBA = NIWTProfiler(recurrent, strategy=strategy).ablated_generations(*prompts, 3)
    layers = recurrent.backbone.layers
    for variant in range(3):
        recurrent.backbone.layers = torch.nn.ModuleList(
            layer for index, layer in enumerate(layers) if index != variant - 1
        )
        try:
            tokens_BT = recurrent.generate(
                prompts[0], attention_mask=prompts[1], max_new_tokens=3, do_sample=False, use_cache=False
            )
        finally:
            recurrent.backbone.layers = layers
        torch.testing.assert_close(found_VBA[variant], tokens_BT[:, -3:], rtol=0, atol=0)


def test_ablations_of_a_model_without_a_cache_of_its_past_are_not_stacked(recurrent, prompts):
    with pytest.raises(ProfilingError, match="MambaForCausalLM to keep its past"):
        NIWTProfiler(recurrent, strategy="stacked").ablated_generations(*prompts, 3)


def test_stacking_is_refused_where_blocks_have_no_cache_entry_of_their_own(qwen3, prompts):
    input_ids_BT, attention_mask_BT = (tensor[:1] for tensor in prompts)
    part = BlockStack("model.layers", list(qwen3.model.layers)[1:])
    with torch.no_grad(), pytest.raises(ProfilingError, match=r"each of the 2 blocks at 'model\.layers', found 3"):
        stacked_generations(qwen3, part, model_inputs(qwen3, input_ids_BT, attention_mask_BT), 3, StopTokens((), 0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_whose_ablations_change_nothing_is_refused_with_the_path(own_qwen3, prompts, strategy):
    with torch.no_grad():
        for layer in own_qwen3.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    with pytest.raises(ProfilingError, match=r"'model\.layers' to change the model's output"):
        NIWTProfiler(own_qwen3, strategy=strategy).ablated_generations(*prompts, 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_that_never_run_are_refused_with_the_path(gemma3_multimodal, prompts, strategy):
    profiler = NIWTProfiler(gemma3_multimodal, layers="model.vision_tower.encoder.layers", strategy=strategy)
    with pytest.raises(
        ProfilingError, match=r"'model\.vision_tower\.encoder\.layers' once, found calls \[0, 0, 0, 0, 0\]"
    ):
        profiler.ablated_generations(*prompts, 3)


def test_logits_that_rule_tokens_out_are_no_error(own_qwen3, prompts):
    class RulesOutTokenNine(torch.nn.Module):
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Tensor) -> Tensor:
            logits = self.head(hidden)
            logits[..., 9] = -torch.inf
            return logits

    own_qwen3.set_output_embeddings(RulesOutTokenNine(own_qwen3.lm_head))
    tokens = [NIWTProfiler(own_qwen3, strategy=strategy).ablated_generations(*prompts, 4) for strategy in STRATEGIES]
    assert torch.equal(*tokens)
    assert not (tokens[0] == 9).any()


def test_logits_that_are_nan_are_refused(own_qwen3, prompts):
    with torch.no_grad():
        own_qwen3.lm_head.weight[5, 0] = torch.nan
    with pytest.raises(ProfilingError, match="found NaN"):
        NIWTProfiler(own_qwen3).ablated_generations(*prompts, 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_that_become_nan_while_decoding_are_refused(own_qwen3, prompts, strategy):
    tokens_VBA = NIWTProfiler(own_qwen3).ablated_generations(*prompts, 2)
    generated = set(tokens_VBA[..., 0].flatten().tolist()) - set(prompts[0].flatten().tolist())
    assert generated
    with torch.no_grad():
        own_qwen3.model.embed_tokens.weight[min(generated)] = torch.nan
    with pytest.raises(ProfilingError, match="found NaN"):
        NIWTProfiler(own_qwen3, strategy=strategy).ablated_generations(*prompts, 3)
