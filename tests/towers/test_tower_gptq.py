"""Checkpoints that their authors quantised by GPTQ: read as they are, against a reference that decodes number by number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3ForCausalLM

from nexus.data.records import Record
from nexus.errors import TowerLoadError
from nexus.towers.checkpoint import GptqFormat, open_checkpoint
from nexus.towers.engine import TeacherEngine
from nexus.towers.gptq import GptqLinear, PackedMatrix, refuse_damaged
from nexus.towers.loader import LoadedTower, TowerLoader, check_tensors, load_tower
from nexus.towers.memory import needed_bytes
from nexus.towers.nf4 import NOTHING_QUANTISED
from nexus.towers.registry import TeacherSpec, load_registry
from nexus.towers.tiny import as_gptq, write_tiny

CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 64,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def encoded(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 rows of 32 / bits codes each, lowest bits first: the reverse of what is under test, in Python's own numbers."""
    rows = []
    for start in range(0, len(codes), 32 // bits):
        word = sum(codes[start + k].astype(object) << (bits * k) for k in range(32 // bits))
        rows.append([int(value) - 2**32 if value >= 2**31 else int(value) for value in word])
    return np.array(rows, dtype=np.int32)


def decoded(parts: dict[str, np.ndarray], bits: int, group: int, offset: int) -> np.ndarray:
    """float64 [O, I], one weight at a time."""
    inputs, outputs = len(parts["qweight"]) * 32 // bits, parts["qweight"].shape[1]
    matrix, per_word, highest = np.empty((outputs, inputs)), 32 // bits, 2**bits - 1
    for i in range(inputs):
        g = int(parts["g_idx"][i]) if "g_idx" in parts else i // group
        for o in range(outputs):
            code = (int(parts["qweight"][i // per_word, o]) >> (bits * (i % per_word))) & highest
            zero = (int(parts["qzeros"][g, o // per_word]) >> (bits * (o % per_word))) & highest
            matrix[o, i] = float(parts["scales"][g, o]) * (code - (zero + offset) % (highest + 1))
    return matrix


def random_parts(bits: int, group: int, inputs: int, outputs: int, *, ordered: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(bits)
    groups = inputs // group
    parts = {
        "qweight": encoded(random.integers(0, 2**bits, (inputs, outputs)), bits),
        "qzeros": encoded(random.integers(0, 2**bits, (outputs, groups)), bits).T.copy(),
        "scales": random.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16),
    }
    if not ordered:
        parts["g_idx"] = random.permutation(np.arange(inputs) // group).astype(np.int32)
    return parts


def layer(bits: int, group: int | None, offset: int, parts: dict[str, np.ndarray], *, bias: bool = False) -> GptqLinear:
    inputs, outputs = len(parts["qweight"]) * 32 // bits, parts["qweight"].shape[1]
    packed = PackedMatrix("layer", GptqFormat(bits, group, offset), torch.float16, "g_idx" not in parts)
    module = GptqLinear(nn.Linear(inputs, outputs, bias=bias), packed)
    module.load_state_dict({name: torch.from_numpy(part) for name, part in parts.items()}, strict=not bias)
    return module


@pytest.fixture(scope="module")
def folder(qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen with every matrix of its blocks in GPTQ, and a bias that GPTQ leaves alone elsewhere."""
    folder = tmp_path_factory.mktemp("gptq") / "qwen"
    shutil.copytree(qwen_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts = as_gptq(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def tower(folder: Path, spec_of: Callable[..., TeacherSpec]) -> LoadedTower:
    return load_tower(spec_of(folder), device="cpu")


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of `Q_PROJ`; None takes one away."""
    stored = load_file(folder / "model.safetensors")
    for part, tensor in tensors.items():
        stored.pop(f"{Q_PROJ}.{part}", None)
        if tensor is not None:
            stored[f"{Q_PROJ}.{part}"] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("bits", "offset"), [(2, 1), (4, 1), (4, 0), (8, 1)])
def test_weights_are_those_of_the_format(bits: int, offset: int, ordered: bool) -> None:
    parts = random_parts(bits, 16, 64, 32, ordered=ordered)
    expected = decoded(parts, bits, 16, offset)
    # Codes and scales are exact in float32, and so is all but the last rounding of their product.
    np.testing.assert_allclose(layer(bits, 16, offset, parts).matrix().numpy(), expected, rtol=1e-6)


def test_one_group_may_span_the_whole_matrix() -> None:
    parts = random_parts(4, 64, 64, 32, ordered=True)
    np.testing.assert_allclose(layer(4, None, 1, parts).matrix().numpy(), decoded(parts, 4, 64, 1), rtol=1e-6)


def test_a_layer_keeps_its_bias_and_the_type_of_its_input() -> None:
    parts = random_parts(4, 16, 64, 32, ordered=False)
    module = layer(4, 16, 1, parts, bias=True)
    x_BI = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = x_BI.double() @ torch.from_numpy(decoded(parts, 4, 16, 1)).T + module.bias.double()
    torch.testing.assert_close(module(x_BI).double(), expected, rtol=1e-5, atol=1e-5)
    assert module.to(torch.bfloat16)(x_BI.bfloat16()).dtype == torch.bfloat16


def test_gradients_pass_through_a_packed_layer_and_none_reaches_it() -> None:
    module = layer(4, 16, 1, random_parts(4, 16, 64, 32, ordered=True))
    x_BI = torch.ones(1, 64, requires_grad=True)
    module(x_BI).sum().backward()
    assert x_BI.grad is not None
    torch.testing.assert_close(x_BI.grad[0], module.matrix().sum(0))
    assert list(module.parameters()) == []


def test_packed_tensors_are_left_as_they_are(tower: LoadedTower, folder: Path) -> None:
    before = load_file(folder / "model.safetensors")
    TeacherEngine(tower, teacher_id="tiny").generate(("abc",), max_new_tokens=2)
    stored = tower.model.state_dict()
    packed = [name for name in before if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    assert len(packed) == 3 * 7 * 4
    for name in packed:
        assert stored[name].dtype == before[name].dtype
        assert torch.equal(stored[name], before[name])


def test_logits_are_those_of_the_decoded_weights(tower: LoadedTower, qwen_folder: Path, folder: Path) -> None:
    original = Qwen3ForCausalLM.from_pretrained(qwen_folder, dtype=torch.float32)
    tensors = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, module in original.named_modules():
        if f"{name}.qweight" in tensors:
            parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
            module.weight.data = torch.from_numpy(decoded(parts, 4, 64, 1)).float()
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        torch.testing.assert_close(tower.model(ids).logits, original.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_coverage_says_what_the_authors_did(tower: LoadedTower, qwen: LoadedTower) -> None:
    coverage = tower.coverage
    assert (coverage.already, coverage.method) == ("GPTQ 4 bit, group 64", "already quantised (GPTQ 4 bit, group 64)")
    assert (qwen.coverage.already, qwen.coverage.method) == (None, "in NF4")
    assert coverage.total_params == qwen.coverage.total_params
    assert (coverage.quantised_params, coverage.share) == (qwen.coverage.quantised_params, qwen.coverage.share)
    # A code of 4 bits, a scale of 16 and a zero point of 4 for 64 of them, and each input feature's group in 32.
    (q_proj,) = [module for module in coverage.modules if module.name == Q_PROJ]
    assert q_proj.stored_bits == 64 * 64 * (4 + 20 / 64) + 64 * 32
    assert {"lm_head", "model.embed_tokens", "model.norm"} <= coverage.left_float.keys()
    assert coverage.stored_bytes == sum(module.stored_bits for module in coverage.modules) // 8


def test_the_thinker_of_an_omni_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "qwen2.5-omni-7b"
    write_tiny("qwen2.5-omni-7b", folder)
    tensors = load_file(folder / "model.safetensors")
    # The talker, which no teacher needs, may be packed as well.
    tensors["talker.model.layers.0.self_attn.q_proj.qweight"] = torch.zeros(8, 64, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tower = TowerLoader(load_registry(), models_dir=tmp_path, device="cpu").load("qwen2.5-omni-7b")
    assert tower.coverage.method == "already quantised (GPTQ 4 bit, group 64)"
    names = {module.name for module in tower.coverage.modules if module.quantised}
    assert len(names) == 3 * 7
    assert {tower.coverage.left_float[f"{name} (bias)"] for name in names if "q_proj" in name} == {"bias"}
    # NF4 is not put on the rest.
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in tower.model.modules())
    assert {
        "lm_head",
        "model.audio_tower.layers.0.fc1",
        "model.visual.blocks.0.mlp.up_proj",
    } <= tower.coverage.left_float.keys()


def test_nothing_packs_it_again_and_float_is_not_to_be_had(tower: LoadedTower, tmp_path: Path) -> None:
    again = load_tower(tower.spec, device="cpu", quantise=False)
    assert again.fingerprint == tower.fingerprint
    assert again.coverage == tower.coverage
    assert not tower.from_cache
    with pytest.raises(ValueError, match="not serializable"):
        tower.model.save_pretrained(tmp_path)


def test_there_is_no_tax_without_an_original(tower: LoadedTower) -> None:
    rows = [Record(id="a", capability="text", prompt="ab", completion="c")]
    measured = TeacherEngine(tower, teacher_id="tiny").tax(rows, max_new_tokens=3)
    assert measured.float_answers == measured.nf4_answers
    assert len(measured.nf4_answers) == 1
    assert (len(measured.kl_N), len(measured.same_top1_N)) == (0, 0)
    assert TeacherEngine(tower, teacher_id="tiny").probe_tax() is None


def test_memory_is_that_of_the_packed_tensors(tower: LoadedTower) -> None:
    largest = 104 * 64 * 4
    widest = 64 * 128 * 8
    need = needed_bytes(tower.model, NOTHING_QUANTISED, torch.float32)
    assert need == tower.coverage.stored_bytes + max(largest, widest)


def test_tensors_are_checked_without_loading(folder: Path, copy: Path, qwen: LoadedTower, spec_of: Any) -> None:
    assert check_tensors(spec_of(folder)) == qwen.coverage.total_params
    change(copy, qzeros=torch.zeros(2, 8, dtype=torch.int32))
    with pytest.raises(
        TowerLoadError, match=r"Expected shape \(1, 8\) for 'model.layers.0.self_attn.q_proj.qzeros'.*\(2, 8\)"
    ):
        check_tensors(spec_of(copy))


@pytest.mark.parametrize(
    ("change_of", "message"),
    [
        ({"qzeros": None}, r"1 missing \(model.layers.0.self_attn.q_proj.qzeros\)"),
        ({"scales": None}, "Expected 'model.layers.0.self_attn.q_proj.scales' beside .*, found none"),
        ({"weight": torch.ones(64, 64)}, "1 unexpected"),
        ({"scales": torch.full((1, 64), torch.inf, dtype=torch.float16)}, "found scales that are not finite"),
        ({"g_idx": torch.full((64,), 1, dtype=torch.int32)}, "found groups 1 to 1 of 1"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "found groups -1 to -1 of 1"),
    ],
)
def test_damaged_tensors_are_refused(
    copy: Path, spec_of: Callable[..., TeacherSpec], change_of: dict[str, Any], message: str
) -> None:
    change(copy, **change_of)
    with pytest.raises(TowerLoadError, match=message):
        load_tower(spec_of(copy), device="cpu")


def test_groups_that_follow_one_another_need_no_index(copy: Path, tower: LoadedTower, spec_of: Any) -> None:
    change(copy, g_idx=None)
    plain = load_tower(spec_of(copy), device="cpu").model
    refuse_damaged(plain, teacher_id="tiny")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, tower.model(ids).logits)


def test_sizes_that_do_not_fill_whole_numbers_are_refused(
    tmp_path: Path, make_tokenizer: Any, text_config: Any, spec_of: Any
) -> None:
    from transformers import Qwen3Config

    model = Qwen3ForCausalLM(Qwen3Config(**{**text_config, "intermediate_size": 68}))
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    del tensors[f"{name}.weight"]
    tensors |= {f"{name}.qweight": torch.zeros(8, 68, dtype=torch.int32), f"{name}.scales": torch.ones(1, 68)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    with pytest.raises(TowerLoadError, match=r"multiples of 8 in every GPTQ matrix.*found 68 x 64"):
        load_tower(spec_of(tmp_path), device="cpu")


def test_the_policy_of_a_teacher_holds_for_its_authors_quantisation_too(
    folder: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    with pytest.raises(TowerLoadError, match=r"at least 99% of the parameters.*left in floating point: lm_head"):
        load_tower(spec_of(folder, min_coverage=0.99), device="cpu")
    with pytest.raises(TowerLoadError, match=r"Expected no skip_modules.*found mlp"):
        load_tower(spec_of(folder, skip_modules=("mlp",)), device="cpu")


def test_a_gptq_teacher_cannot_be_streamed(tower: LoadedTower, tmp_path: Path) -> None:
    with pytest.raises(TowerLoadError, match="weights that their authors quantised"):
        load_tower(replace(tower.spec, streamed=True, cache_dir=str(tmp_path)), device="cpu")


@pytest.mark.parametrize(
    ("changed", "format_"),
    [
        ({}, GptqFormat(4, 64, 1)),
        ({"group_size": -1, "checkpoint_format": "gptq_v2"}, GptqFormat(4, None, 0)),
        ({"bits": 8}, GptqFormat(8, 64, 1)),
    ],
)
def test_the_format_is_read_from_the_configuration(copy: Path, changed: dict[str, Any], format_: GptqFormat) -> None:
    rewrite(copy, changed)
    assert open_checkpoint(copy).gptq == format_
    assert str(format_).startswith(f"GPTQ {format_.bits} bit, ")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 3}, "found 3 bits; use a checkpoint of 2, 4, 8 bits"),
        ({"group_size": 0}, "found groups of 0"),
        ({"group_size": "all"}, "found groups of all"),
        ({"checkpoint_format": "marlin"}, "found the layout marlin; use a checkpoint in one of gptq, gptq_v2"),
    ],
)
def test_formats_that_cannot_be_read_are_refused(copy: Path, changed: dict[str, Any], message: str) -> None:
    rewrite(copy, changed)
    with pytest.raises(TowerLoadError, match=message):
        open_checkpoint(copy)


def rewrite(folder: Path, changed: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changed
    (folder / "config.json").write_text(json.dumps(config))
