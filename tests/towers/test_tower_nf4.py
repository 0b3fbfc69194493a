"""NF4 as stored and as planned: the format against an independent reference, the gates against models that must not pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from nexus.errors import TowerLoadError
from nexus.towers.loader import LoadedTower, load_tower
from nexus.towers.nf4 import (
    NOTHING_QUANTISED,
    QuantisationPlan,
    classification_heads,
    dequantised,
    measure_coverage,
    plan_quantisation,
    stored_bits,
)

# Dettmers et al. 2023, appendix E.
CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def quantise(matrix: torch.Tensor) -> Any:
    """A Linear4bit as the loader makes them: NF4 with double quantisation."""
    linear = bnb.nn.Linear4bit(
        matrix.shape[1], matrix.shape[0], bias=False, quant_type="nf4", compute_dtype=torch.float32
    )
    linear.weight = bnb.nn.Params4bit(
        matrix.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear
    )
    linear.weight = linear.weight.to("cpu")
    linear.source_cls = torch.nn.Linear
    return linear


def indices(module: Any) -> torch.Tensor:
    """The stored 4-bit indices [out * in], high nibble first."""
    packed = module.weight.data.flatten()
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()


def scales(module: Any) -> torch.Tensor:
    """The scales of the blocks, after double quantisation."""
    state = module.weight.quant_state
    groups = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    return state.state2.code[state.absmax.long()] * groups + state.offset


# --- the format -----------------------------------------------------------------------------------------------------------------


def test_the_code_is_the_papers() -> None:
    assert torch.equal(quantise(torch.randn(64, 64)).weight.quant_state.code, CODE)


@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_stored_matrices_equal_a_reference_in_plain_torch(rows: int, blocks: int, seed: int, scale: float) -> None:
    matrix = torch.randn(rows, 64 * blocks, generator=torch.Generator().manual_seed(seed)) * scale
    linear = quantise(matrix)
    absmax = matrix.view(-1, 64).abs().amax(dim=1)
    nearest = torch.bucketize(matrix.view(-1, 64) / absmax[:, None], (CODE[1:] + CODE[:-1]) / 2).flatten()
    assert torch.equal(indices(linear), nearest)
    reference = (CODE[nearest].view(-1, 64) * scales(linear)[:, None]).view_as(matrix)
    # One multiplication in float32.
    torch.testing.assert_close(dequantised(linear), reference, rtol=1e-6, atol=0)


@given(rows=st.integers(1, 33), seed=st.integers(0, 1000))
def test_no_weight_is_further_off_than_the_widest_gap_of_the_code(rows: int, seed: int) -> None:
    matrix = torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed))
    linear = quantise(matrix)
    absmax = matrix.view(-1, 64).abs().amax(dim=1, keepdim=True)
    # Half the gap between -1 and -.6962, and what double quantisation adds to the scale itself.
    bound = 0.1520 * absmax + (scales(linear)[:, None] - absmax).abs()
    assert ((dequantised(linear) - matrix).view(-1, 64).abs() <= bound + 1e-6).all()


def test_quantising_what_was_dequantised_changes_no_index() -> None:
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    once = quantise(matrix)
    twice = quantise(dequantised(once))
    assert torch.equal(once.weight.data, twice.weight.data)


def test_zero_blocks_stay_zero() -> None:
    matrix = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    matrix[1, 64:] = 0
    assert (dequantised(quantise(matrix))[1, 64:] == 0).all()


@pytest.mark.parametrize("size", [64, 128, 1024])
def test_stored_bits_follow_the_formula(size: int) -> None:
    linear = quantise(torch.randn(size, size))
    weights = size * size
    groups = -(-weights // 64 // 256)
    # Indices, 8-bit scales, scales of scales, the offset and the two tables.
    assert stored_bits(linear) == 4 * weights + 8 * (weights // 64) + 32 * groups + 32 + 32 * 16 + 32 * 256
    if size == 1024:
        assert stored_bits(linear) / weights == pytest.approx(4.135, abs=5e-4)


def test_bits_without_double_quantisation_hold_whole_scales() -> None:
    matrix = torch.randn(64, 64)
    linear = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=False)
    linear.weight = bnb.nn.Params4bit(
        matrix, requires_grad=False, quant_type="nf4", compress_statistics=False, module=linear
    )
    linear.weight = linear.weight.to("cpu")
    assert stored_bits(linear) == 4 * 4096 + 32 * 64 + 32 * 16


# --- the coverage of loaded teachers ---------------------------------------------------------------------------------------------


def test_coverage_counts_every_parameter_once(qwen: LoadedTower, qwen_folder: Path) -> None:
    original = Qwen3ForCausalLM.from_pretrained(qwen_folder)
    coverage = qwen.coverage
    assert coverage.total_params == sum(p.numel() for p in original.parameters())
    quantised = [
        name for name, module in original.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert {module.name for module in coverage.modules if module.quantised} == set(quantised)
    assert coverage.quantised_params == sum(original.get_submodule(name).weight.numel() for name in quantised)
    assert coverage.share == coverage.quantised_params / coverage.total_params


def test_tied_weights_count_once(gemma: LoadedTower) -> None:
    assert gemma.model.lm_head.weight is gemma.model.get_input_embeddings().weight
    assert gemma.coverage.total_params == sum(
        p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in gemma.model.parameters()
    )


def test_bits_per_parameter_are_the_sum_of_what_is_stored(qwen: LoadedTower) -> None:
    matrices = [module for module in qwen.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    stored = sum(
        8 * t.numel() * t.element_size()
        for m in matrices
        for s in [m.weight.quant_state]
        for t in (m.weight.data, s.absmax, s.code, s.state2.absmax, s.state2.code, s.offset)
    )
    assert qwen.coverage.bits_per_param == stored / qwen.coverage.quantised_params


def test_weight_errors_are_those_of_the_checkpoint(qwen: LoadedTower, qwen_folder: Path) -> None:
    original = Qwen3ForCausalLM.from_pretrained(qwen_folder)
    for module in qwen.coverage.modules:
        if module.quantised:
            weight = original.get_submodule(module.name).weight.detach().float()
            error = (dequantised(qwen.model.get_submodule(module.name)) - weight).norm() / weight.norm()
            assert module.weight_error == pytest.approx(float(error), rel=1e-5)
            # Normally distributed weights: .092; a matrix of 64 x 32 scatters around it.
            assert 0.08 < module.weight_error < 0.105
    assert qwen.coverage.max_weight_error == max(
        m.weight_error for m in qwen.coverage.modules if m.weight_error is not None
    )


def test_everything_in_floating_point_has_a_reason(siglip: LoadedTower, whisper: LoadedTower) -> None:
    for tower in (siglip, whisper):
        assert {m.name for m in tower.coverage.modules if not m.quantised} == tower.coverage.left_float.keys()
    assert siglip.coverage.left_float["embeddings.patch_embedding"] == "Conv2d is not linear"
    assert siglip.coverage.left_float["head.attention.out_proj"] == "subclass of Linear"
    assert siglip.coverage.left_float["encoder.layers.0.mlp.fc1 (bias)"] == "bias"
    assert whisper.coverage.left_float["model.encoder.layers.0.fc1"] == "output head or skipped by policy"


@pytest.mark.parametrize("name", ["qwen", "gemma", "siglip_classifier", "siglip", "whisper_classifier", "whisper"])
def test_output_heads_stay_in_floating_point(name: str, request: pytest.FixtureRequest) -> None:
    tower = request.getfixturevalue(name)
    heads = [tower.model.get_output_embeddings(), getattr(tower.model, "classifier", None)]
    for head in heads:
        assert head is None or type(head) is torch.nn.Linear


def test_a_skip_list_does_not_expose_the_output_head(qwen_folder: Path, spec_of: Callable[..., Any]) -> None:
    tower = load_tower(spec_of(qwen_folder, skip_modules=("q_proj",)), device="cpu")
    assert type(tower.model.lm_head) is torch.nn.Linear
    layer = tower.model.model.layers[0]
    assert type(layer.self_attn.q_proj) is torch.nn.Linear
    assert isinstance(layer.self_attn.k_proj, bnb.nn.Linear4bit)


def test_classification_heads_are_linear_children_with_one_output_per_label(
    siglip_classifier: LoadedTower, whisper_classifier: LoadedTower, siglip: LoadedTower, qwen: LoadedTower
) -> None:
    assert classification_heads(siglip_classifier.model) == ("classifier",)
    assert classification_heads(whisper_classifier.model) == ("classifier",)
    assert classification_heads(siglip.model) == ()
    assert classification_heads(qwen.model) == ()


# --- the gates --------------------------------------------------------------------------------------------------------------------


def on_meta(model_class: Any, config: Any) -> Any:
    with torch.device("meta"):
        return model_class(config)


def plan(model: Any, **changes: Any) -> QuantisationPlan:
    return plan_quantisation(model, **{"teacher_id": "tiny", "skip_modules": (), "min_coverage": 0.5, **changes})


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}


def test_fused_experts_are_planned_and_experts_of_another_form_are_refused(text_config: dict[str, Any]) -> None:
    model = on_meta(Qwen3MoeForCausalLM, Qwen3MoeConfig(**text_config, **MOE))
    planned = plan(model, min_coverage=0.7)
    assert planned.experts == tuple(f"model.layers.{layer}.mlp.experts" for layer in range(3))
    model.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(TowerLoadError, match=r"teacher 'tiny', found 'model\.layers\.1\.mlp\.experts': .*transposed"):
        plan(model, min_coverage=0.7)


def test_the_experts_of_mixtral_and_the_matrices_of_clip_are_reached(text_config: dict[str, Any]) -> None:
    mixtral = on_meta(MixtralForCausalLM, MixtralConfig(**{**text_config, "num_local_experts": 4}))
    planned = plan(mixtral, min_coverage=0.9)
    assert len(planned.experts) == 3
    assert not [name for name in planned.matrices if name.endswith(("gate", "router", "lm_head"))]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = on_meta(CLIPVisionModel, CLIPVisionConfig(**sizes, image_size=16, patch_size=8))
    linear = {name for name, module in clip.named_modules() if type(module) is torch.nn.Linear}
    assert set(plan(clip, min_coverage=0.7).matrices) == linear


@pytest.mark.parametrize(
    ("model_class", "sizes", "routers"),
    [
        ("HunYuanMoEV1ForCausalLM", {"num_experts": 4, "moe_topk": 2}, ["gate.wg"]),
        ("Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 64}, ["shared_expert_gate"]),
        ("JetMoeForCausalLM", {"kv_channels": 16, "num_local_experts": 4}, ["router.layer", "experts.router.layer"]),
        ("Qwen3MoeForCausalLM", MOE, []),
        ("Qwen3ForCausalLM", {}, []),
    ],
)
def test_routers_stay_in_floating_point_and_nothing_else_does_for_them(
    text_config: dict[str, Any], model_class: str, sizes: dict[str, Any], routers: list[str]
) -> None:
    found: Any = getattr(transformers, model_class)
    model = on_meta(found, found.config_class(**{**text_config, **sizes}))
    planned = plan(model, min_coverage=0.0)
    assert {name.split(".", 4)[-1] for name in planned.routers} == set(routers)
    assert len(planned.routers) == 3 * len(routers)
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert linear - set(planned.matrices) == {*planned.routers, "lm_head"}


def test_routers_beside_a_list_of_experts_are_known_by_their_number_of_outputs() -> None:
    block = torch.nn.Module()
    block.experts = torch.nn.ModuleList(torch.nn.Linear(64, 3) for _ in range(3))
    block.choose, block.weigh, block.other = (torch.nn.Linear(64, size) for size in (3, 1, 64))
    model = torch.nn.ModuleDict({"block": block})
    planned = plan(model, min_coverage=0.0)
    assert planned.routers == ("block.choose", "block.weigh")
    assert set(planned.matrices) == {"block.experts.0", "block.experts.1", "block.experts.2", "block.other"}


def test_a_routers_reason_is_that_it_is_one(
    save: Callable[..., Path],
    make_tokenizer: Callable[..., Any],
    text_config: dict[str, Any],
    spec_of: Callable[..., Any],
) -> None:
    config = transformers.Qwen2MoeConfig(**text_config, **MOE, shared_expert_intermediate_size=64)
    folder = save(transformers.Qwen2MoeForCausalLM(config), make_tokenizer())
    tower = load_tower(spec_of(folder, min_coverage=0.5), device="cpu")
    assert tower.coverage.left_float["model.layers.1.mlp.shared_expert_gate"] == "router"
    assert type(tower.model.model.layers[1].mlp.shared_expert_gate) is torch.nn.Linear


def test_experts_that_the_policy_leaves_in_floating_point_are_gated_by_the_share(text_config: dict[str, Any]) -> None:
    model = on_meta(Qwen3MoeForCausalLM, Qwen3MoeConfig(**text_config, **MOE))
    left = r"left in floating point: model\.layers\.0\.mlp\.experts \(49,152\), .*Lower its min_coverage"
    with pytest.raises(TowerLoadError, match=left):
        plan(model, skip_modules=("mlp.experts",))
    assert "model.layers.0.self_attn.q_proj" in plan(model, skip_modules=("mlp.experts",), min_coverage=0.1).matrices


def test_a_share_below_the_policy_is_refused_with_both_numbers(text_config: dict[str, Any]) -> None:
    model = on_meta(Qwen3ForCausalLM, Qwen3Config(**text_config))
    total = sum(p.numel() for p in model.parameters())
    with pytest.raises(TowerLoadError, match=rf"at least 99%.*of {total:,}\)"):
        plan(model, min_coverage=0.99)


@pytest.mark.parametrize("columns", [48, 80, 96, 127])
def test_rows_that_are_no_multiple_of_64_are_refused(text_config: dict[str, Any], columns: int) -> None:
    model = on_meta(Qwen3ForCausalLM, Qwen3Config(**{**text_config, "intermediate_size": columns}))
    with pytest.raises(
        TowerLoadError, match=rf"multiple of 64 long, found {columns} in 'model\.layers\.0\.mlp\.down_proj'"
    ):
        plan(model)
    # Left in floating point by the policy, they hinder nothing.
    assert not [
        name for name in plan(model, skip_modules=("down_proj",), min_coverage=0.1).matrices if "down_proj" in name
    ]


def test_odd_numbers_of_rows_are_quantised(text_config: dict[str, Any]) -> None:
    model = on_meta(Qwen3ForCausalLM, Qwen3Config(**{**text_config, "intermediate_size": 127}))
    assert "model.layers.0.mlp.gate_proj" in plan(model, skip_modules=("down_proj",), min_coverage=0.1).matrices


def test_a_skip_name_that_matches_nothing_is_refused(text_config: dict[str, Any]) -> None:
    model = on_meta(Qwen3ForCausalLM, Qwen3Config(**text_config))
    with pytest.raises(
        TowerLoadError, match=r"'layers\.0' matches none.*such as 'model\.layers\.0\.self_attn\.q_proj'"
    ):
        plan(model, skip_modules=("layers.0",))


def test_plans_of_a_real_sized_architecture_reach_the_counted_share() -> None:
    size = {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "head_dim": 128,
    }
    config = Qwen3Config(**size, num_key_value_heads=8, vocab_size=151_936, tie_word_embeddings=True)
    model = on_meta(Qwen3ForCausalLM, config)
    matrices = plan(model, min_coverage=0.9).matrices
    total = sum(p.numel() for p in model.parameters())
    assert sum(model.get_submodule(name).weight.numel() for name in matrices) / total == pytest.approx(0.903, abs=2e-3)


def test_transposed_matrices_are_compared_the_right_way_round(
    save: Callable[..., Path], make_tokenizer: Callable[..., Any], spec_of: Callable[..., Any]
) -> None:
    config = GPT2Config(vocab_size=104, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=1)
    folder = save(GPT2LMHeadModel(config), make_tokenizer())
    coverage = load_tower(spec_of(folder), device="cpu").coverage
    assert coverage.share > 0.8
    assert 0.08 < coverage.max_weight_error < 0.105


def test_transposed_matrices_are_gated_by_their_input_size() -> None:
    config = GPT2Config(vocab_size=104, n_positions=64, n_embd=64, n_inner=96, n_layer=1, n_head=2)
    with pytest.raises(TowerLoadError, match=r"found 96 in 'transformer\.h\.0\.mlp\.c_proj'"):
        plan(on_meta(GPT2LMHeadModel, config))


class Pair(torch.nn.Module):
    """Two quantised matrices and a bias, as a loaded model holds them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.originals = {f"{name}.weight": torch.randn(64, 64, generator=generator) for name in ("first", "second")}
        self.first = quantise(self.originals["first.weight"])
        self.second = quantise(self.originals["second.weight"])
        self.third = quantise(torch.zeros(64, 128))


PAIR = QuantisationPlan((), ("first", "second", "third"))


def test_a_matrix_that_is_far_from_its_original_is_refused() -> None:
    model = Pair()
    stored_wrongly = {
        **model.originals,
        "second.weight": model.originals["second.weight"].roll(1),
        "third.weight": torch.zeros(64, 128),
    }
    with pytest.raises(TowerLoadError, match=r"below 0\.12 in every matrix, found 1\.\d+ in 'second'"):
        measure_coverage(model, PAIR, stored_wrongly.__getitem__, teacher_id="tiny")


def test_a_matrix_without_an_original_needs_the_error_of_its_packing() -> None:
    model = Pair()
    with pytest.raises(TowerLoadError, match=r"original of 'first' of teacher 'tiny'.*skip_modules"):
        measure_coverage(model, PAIR, {}.get, teacher_id="tiny")
    for index, module in enumerate((model.first, model.second, model.third)):
        module.packing_error = 0.01 * index
    errors = [m.weight_error for m in measure_coverage(model, PAIR, {}.get, teacher_id="tiny").modules]
    assert errors == [0.0, 0.01, 0.02]


def test_not_a_number_is_no_small_error() -> None:
    model = Pair()
    broken = {**model.originals, "first.weight": torch.full((64, 64), torch.nan)}
    with pytest.raises(TowerLoadError, match="found nan in 'first'"):
        measure_coverage(model, PAIR, broken.__getitem__, teacher_id="tiny")


def test_a_matrix_of_zeros_has_no_error() -> None:
    model = Pair()
    originals = {**model.originals, "third.weight": torch.zeros(64, 128)}
    coverage = measure_coverage(model, PAIR, originals.__getitem__, teacher_id="tiny")
    assert [m.weight_error for m in coverage.modules][2] == 0.0


def test_huge_models_are_verified_on_a_choice_that_has_every_shape() -> None:
    model = Pair()
    originals = {**model.originals, "third.weight": torch.zeros(64, 128)}
    coverage = measure_coverage(model, PAIR, originals.__getitem__, teacher_id="tiny", verified_parameters=1000)
    assert [m.weight_error is not None for m in coverage.modules] == [True, False, True]
    assert coverage.quantised_params == 2 * 64 * 64 + 64 * 128


def test_a_planned_matrix_in_floating_point_is_refused(text_config: dict[str, Any]) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**text_config))
    matrices = QuantisationPlan((), ("model.layers.0.mlp.up_proj",))
    with pytest.raises(
        TowerLoadError, match=r"'model\.layers\.0\.mlp\.up_proj' of teacher 'tiny' in NF4, found it in floating point"
    ):
        measure_coverage(model, matrices, dict(model.named_parameters()).__getitem__, teacher_id="tiny")


def test_a_model_in_floating_point_has_a_coverage_of_nothing(text_config: dict[str, Any]) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**text_config))
    coverage = measure_coverage(model, NOTHING_QUANTISED, {}.__getitem__, teacher_id="tiny")
    assert (coverage.share, coverage.quantised_params, coverage.bits_per_param, coverage.max_weight_error) == (
        0.0,
        0,
        0.0,
        0.0,
    )
    assert coverage.total_params == sum(p.numel() for p in model.parameters())
