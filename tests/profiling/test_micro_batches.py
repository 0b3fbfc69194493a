"""What happens when memory ends: the micro-batch is halved, nothing is measured twice, and the results stay."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from nexus.errors import ProfilingError
from nexus.profiling.niwt import EncoderProfileBatch, NIWTProfiler, ProfileBatch


@contextmanager
def memory_for(block: nn.Module, max_rows: int, *, error: Exception | None = None) -> Iterator[None]:
    """Let `block` fail with more than `max_rows` rows: by torch's own allocator, asked for an exbibyte, or with `error`."""

    def allocate(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if len(hidden) > max_rows:
            if error is not None:
                raise error
            torch.empty(2**60, dtype=torch.uint8)

    hook = block.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture
def batch(text_batch) -> ProfileBatch:
    return ProfileBatch(
        [f"s{row}" for row in range(5)], text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT
    )


@pytest.mark.parametrize("strategy", ["brute", "prefix", "triangular"])
def test_scoring_goes_on_with_half_the_rows_and_says_so(qwen3, batch, strategy, caplog):
    expected = NIWTProfiler(qwen3, strategy=strategy, micro_batch_size=1).measure(batch)
    profiler = NIWTProfiler(qwen3, strategy=strategy, micro_batch_size=5)
    # The last block runs when others have been observed: their findings of the failed rows must be dropped.
    with memory_for(qwen3.model.layers[2].mlp, 3 if strategy == "triangular" else 1), caplog.at_level(logging.WARNING):
        result = profiler.measure(batch)
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory with 5 samples at once; going on with 2 at once.",
        "Out of memory with 2 samples at once; going on with 1 at once.",
    ]
    torch.testing.assert_close(
        torch.from_numpy(result.delta_LB), torch.from_numpy(expected.delta_LB), rtol=1e-5, atol=1e-5
    )
    for found, reference in zip(result.moments_L, expected.moments_L, strict=True):
        assert found.count == reference.count == int(batch.attention_mask_BT.sum())


def test_what_did_not_fit_once_is_not_tried_again(qwen3, batch, caplog):
    profiler = NIWTProfiler(qwen3, micro_batch_size=4)
    with memory_for(qwen3.model.layers[0], 2), caplog.at_level(logging.WARNING):
        profiler.measure(batch)
        profiler.measure(batch)
    assert len(caplog.records) == 1


# Once the tokens differ, three variants of each sample pass the first block in one stacked step.
@pytest.mark.parametrize(("strategy", "max_rows"), [("brute", 2), ("stacked", 6)])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_generation_goes_on_with_half_the_rows(qwen3, text_batch, strategy, max_rows, error, caplog):
    prompts = (text_batch.input_ids_BT, text_batch.attention_mask_BT)
    expected = NIWTProfiler(qwen3, strategy=strategy).ablated_generations(*prompts, 4)
    with memory_for(qwen3.model.layers[0], max_rows, error=error), caplog.at_level(logging.WARNING):
        result = NIWTProfiler(qwen3, strategy=strategy).ablated_generations(*prompts, 4)
    assert "5 samples at once; going on with 2" in caplog.text
    assert torch.equal(result, expected)


def test_an_encoder_goes_on_with_half_the_rows(siglip):
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder_batch = EncoderProfileBatch(["a", "b", "c", "d"], {"pixel_values": pixels}, torch.tensor([0, 1, 2, 3]))
    expected = NIWTProfiler(siglip).measure(encoder_batch)
    profiler = NIWTProfiler(siglip)
    with memory_for(profiler.stack.blocks[1], 2):
        result = profiler.measure(encoder_batch)
    torch.testing.assert_close(
        torch.from_numpy(result.delta_LB), torch.from_numpy(expected.delta_LB), rtol=1e-5, atol=1e-6
    )


def test_one_sample_that_does_not_fit_is_an_error_that_names_the_remedy(qwen3, batch):
    with (
        memory_for(qwen3.model.layers[1], 0),
        pytest.raises(ProfilingError, match=r"memory for one sample and its 3 ablations.*strategy='prefix'"),
    ):
        NIWTProfiler(qwen3).measure(batch)


def test_other_errors_are_not_taken_for_a_lack_of_memory(qwen3, batch):
    with (
        memory_for(qwen3.model.layers[1], 0, error=RuntimeError("broken")),
        pytest.raises(RuntimeError, match="broken"),
    ):
        NIWTProfiler(qwen3).measure(batch)


@pytest.mark.parametrize(("num_rows", "expected"), [(4, [4]), (5, [3, 2]), (9, [3, 3, 3])])
def test_micro_batches_are_of_equal_size(own_qwen3, num_rows, expected):
    sizes: list[int] = []
    own_qwen3.model.embed_tokens.register_forward_hook(lambda _, args, output: sizes.append(len(output)))
    ids_BT = torch.randint(3, 100, (num_rows, 6), generator=torch.Generator().manual_seed(0))
    NIWTProfiler(own_qwen3, micro_batch_size=4).delta_nll(ids_BT, torch.ones_like(ids_BT), torch.ones_like(ids_BT))
    assert sizes == expected


def test_narrow_keys_let_more_samples_generate_at_once():
    """Grouped-query attention: what is kept of a prompt is a quarter as wide as the hidden states."""
    sizes: list[int] = []
    for num_kv_heads in (4, 1):
        config = Qwen3Config(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=num_kv_heads,
            head_dim=16,
            vocab_size=64,
            initializer_range=0.2,
        )
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).eval()
        model.model.embed_tokens.register_forward_hook(lambda _, args, output: sizes.append(len(output)))
        # 2 x 8 blocks x 3000 positions x 9 variants x 64 wide in float32 is 105 MiB a sample: 4 of them fit, and more narrow ones.
        ids_BT = torch.randint(3, 60, (6, 1), generator=torch.Generator().manual_seed(0))
        model.generation_config.eos_token_id = list(range(64))
        NIWTProfiler(model).ablated_generations(ids_BT, torch.ones_like(ids_BT), 3000)
    assert sizes == [3, 3, 6]
