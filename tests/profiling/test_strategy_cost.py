"""The cost model against what blocks are really called with, and "auto" against the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from nexus.profiling.cost import (
    CPU_TOKENS,
    MACHINES,
    Machine,
    Work,
    cheapest,
    decode_seconds,
    sweep_seconds,
)
from nexus.profiling.niwt import NIWTProfiler, ProfileBatch

# The reference of benchmarks/niwt.py.
WORK = Work(num_layers=12, layer_parameters=786_432, is_quantised=True, num_rows=16, num_columns=64)
SWEEPS = ["brute", "prefix", "triangular"]
NOTHING = Machine(
    forward_s=0.0,
    call_s=0.0,
    quantised_call_s=0.0,
    weights_per_s=torch.inf,
    quantised_weights_per_s=torch.inf,
    flops_per_s=torch.inf,
    spill=0.0,
)


class Counted:
    """Counts the forwards of a model, the calls of its blocks, and the tokens that these are given."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.forwards = self.calls = self.tokens = 0
        model.register_forward_pre_hook(self._forward)
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(self._call)

    def _forward(self, *_: object) -> None:
        self.forwards += 1

    def _call(self, _: object, args: tuple[torch.Tensor]) -> None:
        self.calls += 1
        self.tokens += args[0].shape[:-1].numel()


def work_of(rows: int, columns: int) -> Work:
    return Work(num_layers=3, layer_parameters=1, is_quantised=False, num_rows=rows, num_columns=columns)


@pytest.mark.parametrize("strategy", SWEEPS)
@pytest.mark.parametrize("micro_batch_size", [2, 5])
def test_scoring_is_charged_the_forwards_calls_and_tokens_that_it_makes(own_qwen3, strategy, micro_batch_size):
    ids_BT = torch.randint(3, 100, (4, 7), generator=torch.Generator().manual_seed(0))
    counted = Counted(own_qwen3)
    NIWTProfiler(own_qwen3, strategy=strategy, micro_batch_size=micro_batch_size).delta_nll(
        ids_BT, torch.ones_like(ids_BT), torch.ones_like(ids_BT)
    )
    arguments = (work_of(4, 7), strategy, [1, 1, 1], micro_batch_size)
    assert sweep_seconds(replace(NOTHING, forward_s=1), *arguments) == counted.forwards
    assert sweep_seconds(replace(NOTHING, call_s=1), *arguments) == counted.calls
    assert sweep_seconds(replace(NOTHING, weights_per_s=1), *arguments) == counted.calls
    assert sweep_seconds(replace(NOTHING, flops_per_s=2), *arguments) == counted.tokens


@pytest.mark.parametrize("strategy", ["brute", "stacked"])
@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_generation_is_charged_the_forwards_calls_and_at_least_the_tokens_that_it_makes(
    own_qwen3, strategy, micro_batch_size
):
    own_qwen3.generation_config.eos_token_id = None
    ids_BT = torch.randint(3, 100, (4, 7), generator=torch.Generator().manual_seed(0))
    counted = Counted(own_qwen3)
    NIWTProfiler(own_qwen3, strategy=strategy, micro_batch_size=micro_batch_size).ablated_generations(
        ids_BT, torch.ones_like(ids_BT), 4
    )
    arguments = (work_of(4, 7), strategy, 4, micro_batch_size)
    assert decode_seconds(replace(NOTHING, forward_s=1), *arguments) == counted.forwards
    assert decode_seconds(replace(NOTHING, call_s=1), *arguments) == counted.calls
    tokens = decode_seconds(replace(NOTHING, flops_per_s=2), *arguments)
    # How many rows will equal the clean one, and cost nothing, is not known beforehand.
    assert tokens == counted.tokens if strategy == "brute" else 0 <= tokens - counted.tokens <= 3 * 4 * 3


def test_several_interventions_per_block_are_charged():
    tokens = replace(NOTHING, flops_per_s=2)
    # Clean: 3 calls. Two born at block 0 go through two more blocks, one born at block 1 through one.
    for strategy in ("prefix", "triangular"):
        assert sweep_seconds(tokens, work_of(1, 1), strategy, [2, 1, 0], 1) == 3 + 2 * 2 + 1
    assert sweep_seconds(tokens, work_of(1, 1), "brute", [2, 1, 0], 1) == 4 * 3


def test_quantised_blocks_are_charged_for_dequantising():
    plain, quantised = replace(NOTHING, call_s=1), replace(NOTHING, quantised_call_s=1)
    work = replace(work_of(1, 1), is_quantised=True)
    assert sweep_seconds(plain, work, "triangular", [1, 1, 1], 1) == 0
    assert sweep_seconds(quantised, work, "triangular", [1, 1, 1], 1) == 3
    assert sweep_seconds(replace(NOTHING, quantised_weights_per_s=0.5), work, "triangular", [1, 1, 1], 1) == 6


def test_calls_that_fall_out_of_the_caches_cost_more():
    machine = replace(NOTHING, flops_per_s=2, spill=0.5)
    assert sweep_seconds(machine, work_of(1, CPU_TOKENS), "brute", [0, 0, 0], 1) == 3 * CPU_TOKENS
    assert sweep_seconds(machine, work_of(1, CPU_TOKENS + 1), "brute", [0, 0, 0], 1) == 4.5 * (CPU_TOKENS + 1)


def best_sweep(machine: Machine, work: Work, size: int) -> str:
    return cheapest({name: sweep_seconds(machine, work, name, [1] * work.num_layers, size) for name in SWEEPS})


def test_the_cheapest_sweep_stacks_unless_one_sample_and_its_ablations_fall_out_of_a_cpus_caches():
    cpu, accelerator = MACHINES["cpu"], MACHINES["accelerator"]
    assert best_sweep(cpu, WORK, 4) == "triangular"
    long = replace(WORK, num_columns=1024)
    assert best_sweep(cpu, long, 1) == "prefix"
    assert best_sweep(accelerator, long, 1) == "triangular"
    # Many small blocks: what is saved is calls, not arithmetic.
    assert best_sweep(cpu, replace(long, layer_parameters=10_000), 1) == "triangular"


def test_the_cheapest_generation_stacks_unless_it_must_go_sample_by_sample():
    def best(num_new_tokens: int, stacked_size: int) -> str:
        sizes = {"stacked": stacked_size, "brute": 16}
        return cheapest(
            {name: decode_seconds(MACHINES["cpu"], WORK, name, num_new_tokens, size) for name, size in sizes.items()}
        )

    assert best(32, 16) == best(128, 4) == "stacked"
    assert best(128, 1) == "brute"


def test_auto_follows_the_model_and_gives_what_every_strategy_gives():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=64,
            # Arithmetic outweighs the overhead of calls.
            intermediate_size=4096,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=128,
            initializer_range=0.1,
        )
    ).eval()
    for columns, expected, others in ((12, "triangular", SWEEPS), (1400, "prefix", ["triangular"])):
        ids_BT = torch.randint(3, 100, (1, columns), generator=torch.Generator().manual_seed(0))
        loss_mask_BT = torch.zeros_like(ids_BT)
        loss_mask_BT[:, -4:] = 1
        batch = ProfileBatch(["a"], ids_BT, torch.ones_like(ids_BT), loss_mask_BT)
        chosen = NIWTProfiler(model).measure(batch)
        assert chosen.strategy == expected
        for strategy in others:
            other = NIWTProfiler(model, strategy=strategy).measure(batch)
            assert other.strategy == strategy
            torch.testing.assert_close(
                torch.from_numpy(other.delta_LB), torch.from_numpy(chosen.delta_LB), rtol=1e-5, atol=1e-4
            )
