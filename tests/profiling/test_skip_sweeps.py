"""delta_nll against references: every strategy, padding, batching, and what must not change anything."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nexus.errors import ProfilingError
from nexus.profiling.niwt import NIWTProfiler, ProfileBatch
from nexus.profiling.perturbation import token_readings

STRATEGIES = ["brute", "prefix", "triangular"]


def naive_sums(model: PreTrainedModel, blocks, skipping: Callable, batch) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihoods [L+1, B] and token counts [B]: one unpadded sample, one ablation, one token at a time."""
    sums_VB = torch.zeros(len(blocks) + 1, len(batch.input_ids_BT), dtype=torch.float64)
    counts_B = torch.zeros(len(batch.input_ids_BT), dtype=torch.int64)
    for row, mask_T in enumerate(batch.attention_mask_BT.bool()):
        ids_T, scored_T = batch.input_ids_BT[row, mask_T], batch.loss_mask_BT[row, mask_T]
        for variant in range(len(blocks) + 1):
            with skipping(blocks, variant - 1 if variant else None), torch.no_grad():
                log_probs = model(input_ids=ids_T[None]).logits[0].double().log_softmax(-1)
            for position in range(1, len(ids_T)):
                if scored_T[position]:
                    sums_VB[variant, row] -= log_probs[position - 1, ids_T[position]]
                    counts_B[row] += variant == 0
    return sums_VB, counts_B


def test_left_padded_batch_equals_one_unpadded_sample_at_a_time(causal_lm, text_batch, skipping):
    sums_VB, counts_B = naive_sums(causal_lm, NIWTProfiler(causal_lm).stack.blocks, skipping, text_batch)
    arguments = (text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    delta_LB = sums_VB[1:] - sums_VB[:1]
    for strategy in STRATEGIES:
        profiler = NIWTProfiler(causal_lm, strategy=strategy)
        pooled = profiler.delta_nll(*arguments)
        assert pooled.dtype == torch.float32
        # float32 forwards of a few hundred multiply-adds per value, in another order: a few 1e-6.
        torch.testing.assert_close(pooled.double(), delta_LB.sum(1) / counts_B.sum(), rtol=1e-5, atol=1e-5)
        per_sample = profiler.delta_nll_per_sample(*arguments)
        assert per_sample.shape == (len(profiler.stack), 5)
        torch.testing.assert_close(per_sample.double(), delta_LB / counts_B, rtol=1e-5, atol=2e-5)
        assert pooled.abs().min() > 1e-3


@pytest.mark.parametrize("strategy", ["prefix", "triangular"])
def test_strategies_agree_in_float64_to_rounding(own_qwen3, text_batch, strategy):
    model = own_qwen3.double()
    arguments = (text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    reference = NIWTProfiler(model, strategy="brute").delta_nll_per_sample(*arguments)
    # The results are float32; equal float64 values round to equal or neighbouring ones.
    torch.testing.assert_close(
        NIWTProfiler(model, strategy=strategy).delta_nll_per_sample(*arguments), reference, rtol=2e-7, atol=1e-9
    )


def test_prefix_equals_brute_bit_for_bit_in_float32(qwen3, text_batch):
    arguments = (text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    results = [
        NIWTProfiler(qwen3, strategy=strategy).delta_nll_per_sample(*arguments) for strategy in ("brute", "prefix")
    ]
    assert torch.equal(*results)


def test_bfloat16_keeps_the_order_of_the_layers(own_qwen3, text_batch):
    arguments = (text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    exact = NIWTProfiler(own_qwen3).delta_nll(*arguments)
    model = own_qwen3.bfloat16()
    results = [NIWTProfiler(model, strategy=strategy).delta_nll(*arguments) for strategy in STRATEGIES]
    for result in results:
        # bfloat16 keeps 8 bits: 0.4 % per operation, a few operations deep, relative to losses of about 6 nats.
        torch.testing.assert_close(result, results[0], rtol=2e-2, atol=2e-2)
        assert torch.equal(result.argsort(), exact.argsort())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_block_without_effect_has_a_delta_of_exactly_zero(own_qwen3, text_batch, strategy):
    with torch.no_grad():
        own_qwen3.model.layers[1].self_attn.o_proj.weight.zero_()
        own_qwen3.model.layers[1].mlp.down_proj.weight.zero_()
    delta = NIWTProfiler(own_qwen3, strategy=strategy).delta_nll(
        text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT
    )
    assert delta[1] == 0
    assert (delta[[0, 2]] != 0).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_right_padding_changes_nothing(qwen3, text_batch, strategy):
    rolled = [torch.zeros_like(text_batch.input_ids_BT) for _ in range(3)]
    for row, mask_T in enumerate(text_batch.attention_mask_BT.bool()):
        for target, source in zip(
            rolled, (text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT), strict=True
        ):
            target[row, : int(mask_T.sum())] = source[row, mask_T]
    profiler = NIWTProfiler(qwen3, strategy=strategy)
    left = profiler.delta_nll_per_sample(text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    torch.testing.assert_close(profiler.delta_nll_per_sample(*rolled), left, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("micro_batch_size", "expected_calls"), [(None, 1), (2, 3), (5, 1)])
def test_triangular_calls_every_block_once_per_micro_batch(own_qwen3, text_batch, micro_batch_size, expected_calls):
    calls = [0, 0, 0]
    for index, layer in enumerate(own_qwen3.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    NIWTProfiler(own_qwen3, micro_batch_size=micro_batch_size).delta_nll(
        text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT
    )
    assert calls == [expected_calls] * 3


def test_prefix_runs_no_block_before_the_skipped_one(own_qwen3, text_batch):
    calls = [0, 0, 0]
    for index, layer in enumerate(own_qwen3.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    NIWTProfiler(own_qwen3, strategy="prefix").delta_nll(
        text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT
    )
    # Once clean, then block j for the ablations of every block before it.
    assert calls == [1, 2, 3]


def test_the_head_sees_scored_positions_only(own_qwen3, text_batch):
    widths = []
    own_qwen3.lm_head.register_forward_hook(lambda _, args, output: widths.append(output.shape[:-1].numel()))
    NIWTProfiler(own_qwen3).delta_nll(text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    assert widths == [4 * int(text_batch.loss_mask_BT.sum())]


def test_tokens_without_context_are_never_scored(qwen3, text_batch):
    profiler = NIWTProfiler(qwen3)
    loss_mask = text_batch.loss_mask_BT.clone()
    expected = profiler.delta_nll(text_batch.input_ids_BT, text_batch.attention_mask_BT, loss_mask)
    loss_mask[:, 0] = 1  # position 0, real in rows 0 and 4 and padding elsewhere
    loss_mask[1, 5] = 1  # the first real token after padding
    assert torch.equal(profiler.delta_nll(text_batch.input_ids_BT, text_batch.attention_mask_BT, loss_mask), expected)


def test_rows_without_a_target_do_not_count_in_the_pool(qwen3, text_batch):
    profiler = NIWTProfiler(qwen3)
    loss_mask = text_batch.loss_mask_BT.clone()
    loss_mask[[1, 3]] = 0
    rows = [0, 2, 4]
    expected = profiler.delta_nll(
        text_batch.input_ids_BT[rows], text_batch.attention_mask_BT[rows], text_batch.loss_mask_BT[rows]
    )
    result = profiler.delta_nll(text_batch.input_ids_BT, text_batch.attention_mask_BT, loss_mask)
    assert torch.equal(result, expected)


def test_rows_without_a_target_are_named_where_each_row_is_asked_for(qwen3, text_batch):
    loss_mask = text_batch.loss_mask_BT.clone()
    loss_mask[[1, 3]] = 0
    with pytest.raises(ProfilingError, match="row 1: no scored token; row 3: no scored token"):
        NIWTProfiler(qwen3).delta_nll_per_sample(text_batch.input_ids_BT, text_batch.attention_mask_BT, loss_mask)
    with pytest.raises(ProfilingError, match="2 bad samples: b: no scored token; d: no scored token"):
        NIWTProfiler(qwen3).measure(
            ProfileBatch(list("abcde"), text_batch.input_ids_BT, text_batch.attention_mask_BT, loss_mask)
        )


def test_a_batch_without_any_target_is_refused(qwen3, text_batch):
    nothing = torch.zeros_like(text_batch.loss_mask_BT)
    with pytest.raises(ProfilingError, match="mark target tokens"):
        NIWTProfiler(qwen3).delta_nll(text_batch.input_ids_BT, text_batch.attention_mask_BT, nothing)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_of_any_integer_or_bool_type_are_the_same(qwen3, text_batch, strategy):
    profiler = NIWTProfiler(qwen3, strategy=strategy)
    expected = profiler.delta_nll(text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    result = profiler.delta_nll(
        text_batch.input_ids_BT.int(), text_batch.attention_mask_BT.bool(), text_batch.loss_mask_BT.bool()
    )
    assert torch.equal(result, expected)


def test_shapes_that_differ_are_refused(qwen3, text_batch):
    with pytest.raises(ValueError, match=r"\(5, 11\)"):
        NIWTProfiler(qwen3).delta_nll(
            text_batch.input_ids_BT, text_batch.attention_mask_BT[:, 1:], text_batch.loss_mask_BT
        )
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        NIWTProfiler(qwen3).delta_nll(*(torch.zeros(0, 4, dtype=torch.int64) for _ in range(3)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_that_return_tuples_are_profiled_too(text_batch, skipping, strategy):
    torch.manual_seed(0)
    config = FalconConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=128,
        eos_token_id=2,
        initializer_range=0.2,
    )
    model = FalconForCausalLM(config).eval()
    profiler = NIWTProfiler(model, strategy=strategy)
    sums_VB, counts_B = naive_sums(model, profiler.stack.blocks, skipping, text_batch)
    result = profiler.delta_nll(text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    expected = (sums_VB[1:] - sums_VB[:1]).sum(1) / counts_B.sum()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["auto", "prefix"])
def test_blocks_that_share_keys_and_values_are_profiled_by_brute_force(text_batch, skipping, strategy):
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        num_kv_shared_layers=2,
        sliding_window=6,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = Gemma4ForCausalLM(config).eval()
    profiler = NIWTProfiler(model, strategy=strategy)
    sums_VB, _ = naive_sums(model, profiler.stack.blocks, skipping, text_batch)
    batch = ProfileBatch(list("abcde"), text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    measurement = profiler.measure(batch)
    assert measurement.strategy == "brute"
    torch.testing.assert_close(torch.from_numpy(measurement.delta_LB), sums_VB[1:] - sums_VB[:1], rtol=1e-5, atol=5e-5)


def test_a_model_that_gives_nan_is_refused(own_qwen3, text_batch):
    with torch.no_grad():
        own_qwen3.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
    for strategy in STRATEGIES:
        with pytest.raises(ProfilingError, match=r"'model\.layers' to be numbers, found NaN"):
            NIWTProfiler(own_qwen3, strategy=strategy).delta_nll(
                text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT
            )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_whose_ablations_change_nothing_is_refused_with_the_path(own_qwen3, text_batch, strategy):
    with torch.no_grad():
        for layer in own_qwen3.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    with pytest.raises(ProfilingError, match=r"'model\.layers' to change the model's output"):
        NIWTProfiler(own_qwen3, strategy=strategy).delta_nll(
            text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_certain_answers_are_no_sign_of_ablations_without_effect(qwen3, text_batch, strategy):
    class Certain(nn.Module):
        """Logits so large that every variant gives the argmax a likelihood of exactly 1."""

        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Tensor) -> Tensor:
            logits = self.head(hidden)
            logits[..., 9] += 1000
            return logits

    model = copy.deepcopy(qwen3)
    model.set_output_embeddings(Certain(model.lm_head))
    always_nine = torch.where(text_batch.loss_mask_BT.bool(), 9, text_batch.input_ids_BT)
    delta = NIWTProfiler(model, strategy=strategy).delta_nll(
        always_nine, text_batch.attention_mask_BT, text_batch.loss_mask_BT
    )
    assert delta.tolist() == [0, 0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_that_never_run_are_refused_with_the_path(gemma3_multimodal, text_batch, strategy):
    profiler = NIWTProfiler(gemma3_multimodal, layers="model.vision_tower.encoder.layers", strategy=strategy)
    with pytest.raises(ProfilingError, match=r"'model\.vision_tower\.encoder\.layers' once, found"):
        profiler.delta_nll(text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)


def test_a_model_without_a_language_head_is_refused(qwen3, text_batch):
    with pytest.raises(ProfilingError, match="language-model head, found none in Qwen3Model"):
        NIWTProfiler(qwen3.model).delta_nll(
            text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT
        )


def test_readings_of_many_chunks_equal_the_plain_formula():
    # One row fills a chunk of 2**24 values.
    logits_NV = torch.randn(2, 2**23 + 1, generator=torch.Generator().manual_seed(0))
    targets_N = torch.tensor([5, int(logits_NV[1].argmax())])
    readings = token_readings(logits_NV, targets_N)
    expected = -logits_NV.double().log_softmax(-1)[torch.arange(2), targets_N]
    torch.testing.assert_close(readings[:, 0], expected, rtol=1e-5, atol=0)
    assert readings[:, 1].tolist() == [0, 1]
    assert torch.equal(readings[:, 2].float(), logits_NV[torch.arange(2), targets_N])


def test_quantised_weights_are_used_and_left_as_they_are(qwen3_nf4, qwen3, text_batch):
    arguments = (text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    with torch.no_grad():
        before = qwen3_nf4(text_batch.input_ids_BT).logits
        quantised = NIWTProfiler(qwen3_nf4).delta_nll(*arguments)
        after = qwen3_nf4(text_batch.input_ids_BT).logits
    assert not torch.allclose(quantised, NIWTProfiler(qwen3).delta_nll(*arguments), atol=1e-3)
    assert torch.equal(before, after)


def test_one_block_is_enough(text_batch, skipping):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
        )
    ).eval()
    profiler = NIWTProfiler(model)
    sums_VB, counts_B = naive_sums(model, profiler.stack.blocks, skipping, text_batch)
    result = profiler.delta_nll(text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    torch.testing.assert_close(
        result.double(), (sums_VB[1:] - sums_VB[:1]).sum(1) / counts_B.sum(), rtol=1e-5, atol=1e-5
    )
