"""Fused experts in NF4: equal to bitsandbytes expert by expert, sparse, plain to store, and refused where they cannot be held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from nexus.errors import TowerLoadError
from nexus.towers.experts import NF4Experts, relative_error, replace_experts, why_not_packed
from nexus.towers.loader import LoadedTower, load_tower
from nexus.towers.nf4 import QuantisationPlan, measure_coverage
from nexus.towers.registry import TeacherSpec

X, D, WIDTH = 4, 128, 64
MOE = {"num_experts": X, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def float_experts(seed: int = 0) -> Any:
    config = Qwen3MoeConfig(hidden_size=D, num_experts=X, moe_intermediate_size=WIDTH, experts_implementation="eager")
    experts = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return experts.requires_grad_(False)


def packed_experts(seed: int = 0) -> NF4Experts:
    stacks = {name: parameter.data.clone() for name, parameter in float_experts(seed).named_parameters()}
    module = NF4Experts(float_experts(seed), torch.float32)
    for name, stack_XOI in stacks.items():
        for buffer, tensor in module.pack(name, stack_XOI).items():
            module.get_buffer(buffer).copy_(tensor)
    return module


def routing(tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.stack([torch.randperm(X, generator=generator)[:2] for _ in range(tokens)])
    return torch.randn(tokens, D, generator=generator), index_TK, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_each_expert_is_bit_for_bit_what_bitsandbytes_makes_of_its_matrix(name: str) -> None:
    module, stack_XOI = packed_experts(), getattr(float_experts(), name)
    for expert, matrix_OI in enumerate(stack_XOI):
        linear = bnb.nn.Linear4bit(matrix_OI.shape[1], matrix_OI.shape[0], bias=False, compute_dtype=torch.float32)
        linear.weight = bnb.nn.Params4bit(matrix_OI.clone(), requires_grad=False, quant_type="nf4", module=linear).to(
            "cpu"
        )
        theirs = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        assert torch.equal(module.matrix(name, expert), theirs)


def test_no_block_belongs_to_two_experts() -> None:
    module, experts = packed_experts(), float_experts()
    before = module.pack("down_proj", experts.down_proj.data)
    changed_XOI = experts.down_proj.data.clone()
    changed_XOI[2] *= 100
    after = module.pack("down_proj", changed_XOI)
    for part, tensor in before.items():
        same_X = (tensor == after[part]).reshape(X, -1).all(dim=1)
        assert same_X[[0, 1, 3]].all(), part


def test_the_output_is_that_of_the_dequantised_experts_in_float64() -> None:
    module, experts = packed_experts(), float_experts()
    hidden_TD, index_TK, weights_TK = routing(9)
    reference_TD = torch.zeros(9, D, dtype=torch.float64)
    for t in range(9):
        for k in range(2):
            expert = int(index_TK[t, k])
            gate, up = (module.matrix("gate_up_proj", expert).double() @ hidden_TD[t].double()).chunk(2)
            inner = F.silu(gate) * up
            reference_TD[t] += weights_TK[t, k].double() * (module.matrix("down_proj", expert).double() @ inner)
    torch.testing.assert_close(module(hidden_TD, index_TK, weights_TK).double(), reference_TD, rtol=1e-5, atol=1e-5)
    exact_TD = experts(hidden_TD, index_TK, weights_TK)
    assert 0 < float((reference_TD - exact_TD).norm() / exact_TD.norm()) < 0.3


def test_experts_without_a_token_are_not_touched() -> None:
    module = packed_experts()
    hidden_TD, _, weights_TK = routing(5)
    index_TK = torch.tensor([[0, 2]] * 5)
    expected_TD = module(hidden_TD, index_TK, weights_TK)
    for name in ("gate_up_proj_offset", "down_proj_offset"):
        module.get_buffer(name)[[1, 3]] = torch.nan
    assert torch.equal(module(hidden_TD, index_TK, weights_TK), expected_TD)
    assert module(hidden_TD, index_TK + 1, weights_TK).isnan().all()


def test_a_plain_state_dict_holds_all_of_it(tmp_path: Path) -> None:
    module = packed_experts()
    save_file(module.state_dict(), tmp_path / "experts.safetensors")
    other = NF4Experts(float_experts(seed=5), torch.float32)
    assert other.load_state_dict(load_file(tmp_path / "experts.safetensors")).missing_keys == []
    arguments = routing(6)
    assert torch.equal(other(*arguments), module(*arguments))
    assert not list(module.parameters())


def test_gradients_reach_the_tokens_and_no_weight() -> None:
    module = packed_experts()
    hidden_TD, index_TK, weights_TK = routing(4)
    hidden_TD.requires_grad_()
    module(hidden_TD, index_TK, weights_TK).square().sum().backward()
    assert hidden_TD.grad is not None
    assert (hidden_TD.grad.abs().sum(dim=1) > 0).all()


def test_stored_bits_stay_below_4_point_2_at_the_size_of_real_experts() -> None:
    with torch.device("meta"):
        config = Qwen3MoeConfig(hidden_size=2048, num_experts=8, moe_intermediate_size=1024)
        module = NF4Experts(Qwen3MoeExperts(config), torch.bfloat16)
    for name, (rows, columns) in module.shapes.items():
        size = rows * columns
        assert module.stored_bits(name) / (8 * size) == 4 + 8 / 64 + 32 / (64 * 256) + 32 / size < 4.2


def test_errors_are_the_largest_of_an_expert_and_see_nan() -> None:
    module, stack_XOI = packed_experts(), float_experts().down_proj.data.clone()
    assert 0.08 < module.weight_errors["down_proj"] < 0.105
    worst = max(relative_error(module.matrix("down_proj", expert), stack_XOI[expert]) for expert in range(X))
    assert module.weight_errors["down_proj"] == worst
    stack_XOI[1, 0, 0] = torch.nan
    module.pack("down_proj", stack_XOI)
    assert module.weight_errors["down_proj"] != module.weight_errors["down_proj"]
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


def test_a_stack_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected experts \(4, 128, 64\) for 'down_proj', found \(3, 128, 64\)"):
        packed_experts().pack("down_proj", torch.zeros(3, 128, 64))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_transposed": True}, "transposed"),
        ({"has_bias": True}, "biases"),
        ({"has_gate": False}, "no gate"),
        ({"down_proj": torch.nn.Parameter(torch.zeros(4, 8, 48))}, "48 long"),
    ],
)
def test_experts_of_another_form_say_what_hinders(changes: dict[str, Any], reason: str) -> None:
    experts = float_experts()
    assert why_not_packed(experts) is None
    for name, value in changes.items():
        setattr(experts, name, value)
    assert reason in str(why_not_packed(experts))


# --- in a model -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe_folder(save: Callable[..., Path], make_tokenizer: Callable[..., Any], text_config: dict[str, Any]) -> Path:
    return save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**text_config, **MOE)), make_tokenizer())


@pytest.fixture(scope="module")
def moe(moe_folder: Path, spec_of: Callable[..., TeacherSpec]) -> LoadedTower:
    return load_tower(spec_of(moe_folder, min_coverage=0.7), device="cpu")


def test_experts_are_part_of_the_coverage(moe: LoadedTower, moe_folder: Path) -> None:
    original = Qwen3MoeForCausalLM.from_pretrained(moe_folder)
    coverage = moe.coverage
    assert coverage.total_params == sum(p.numel() for p in original.parameters())
    stacks = [m for m in coverage.modules if ".experts." in m.name]
    assert [m.name.rpartition(".")[2] for m in stacks] == ["gate_up_proj", "down_proj"] * 3
    assert all(m.quantised and m.weight_error is not None and 0.08 < m.weight_error < 0.11 for m in stacks)
    assert coverage.stored_bytes == sum(m.stored_bits for m in coverage.modules) // 8
    # The router is no nn.Linear of the class's own choice; the output head could be quantised and is not.
    head = original.lm_head.weight.numel()
    assert coverage.quantisable_share == pytest.approx((coverage.quantised_params + head) / coverage.total_params)


def test_logits_are_those_of_the_dequantised_experts(moe: LoadedTower, moe_folder: Path) -> None:
    reference = Qwen3MoeForCausalLM.from_pretrained(moe_folder, dtype=torch.float32).eval()
    for name, module in moe.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            reference.get_submodule(name).weight.data = bnb.functional.dequantize_4bit(module.weight.data, state)
        elif isinstance(module, NF4Experts):
            for stack in module.shapes:
                matrices = [module.matrix(stack, expert) for expert in range(X)]
                reference.get_submodule(name).get_parameter(stack).data = torch.stack(matrices)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(moe.model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_experts_that_the_policy_keeps_in_floating_point_could_be_quantised(
    moe: LoadedTower, moe_folder: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    kept = load_tower(spec_of(moe_folder, skip_modules=("mlp.experts",), min_coverage=0.1), device="cpu").coverage
    assert kept.share < 0.2
    assert kept.quantisable_share == pytest.approx(moe.coverage.quantisable_share)


def test_a_stack_that_is_missing_in_the_checkpoint_is_refused(
    moe_folder: Path, tmp_path: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    for path in moe_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(moe_folder / "model.safetensors")
    kept = {
        name: tensor for name, tensor in weights.items() if "layers.1.mlp.experts" not in name or "down" not in name
    }
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerLoadError, match=r"found 4 missing \(model\.layers\.1\.mlp\.experts\.down_proj"):
        load_tower(spec_of(tmp_path, min_coverage=0.7), device="cpu")


class Holder(torch.nn.Module):
    """A model of nothing but experts."""

    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.experts = experts


def test_experts_whose_name_is_kept_are_not_replaced() -> None:
    model = Holder(float_experts())
    replace_experts(model, ["experts"], torch.float32)
    assert isinstance(model.experts, Qwen3MoeExperts)
    replace_experts(model, [], torch.float32)
    assert isinstance(model.experts, NF4Experts)


def test_packed_experts_are_measured_by_the_same_limit_as_matrices() -> None:
    plan = QuantisationPlan((), (), ("experts",))
    module = packed_experts()
    assert measure_coverage(Holder(module), plan, {}.get, teacher_id="tiny").share == 1.0
    module.weight_errors["down_proj"] = 0.3
    with pytest.raises(TowerLoadError, match=r"below 0\.12 .*found 0\.300 in 'experts\.down_proj'"):
        measure_coverage(Holder(module), plan, {}.get, teacher_id="tiny")
    with pytest.raises(TowerLoadError, match="'experts' of teacher 'tiny' in NF4, found it in floating point"):
        measure_coverage(Holder(float_experts()), plan, {}.get, teacher_id="tiny")
    module.weight_errors.clear()
    assert [m.weight_error for m in measure_coverage(Holder(module), plan, {}.get, teacher_id="tiny").modules] == [
        None
    ] * 2
