"""Loading teachers: what is accepted, what is refused, and what identifies the result."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import tokenizers
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model, Qwen3MoeConfig, Qwen3MoeForCausalLM

from nexus.errors import TowerLoadError
from nexus.towers.loader import LoadedTower, TowerLoader, load_tower, tokenizer_hash
from nexus.towers.nf4 import dequantised
from nexus.towers.registry import TeacherRegistry, TeacherSpec, load_registry

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tmp_path: Path, qwen_folder: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(qwen_folder, tmp_path / "copy"))


def rewrite(folder: Path, name: str = "config.json", **changes: Any) -> None:
    document = json.loads((folder / name).read_text())
    document.update(changes)
    (folder / name).write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def one_registry(**changes: Any) -> TeacherRegistry:
    registry = load_registry()
    entry = registry.get("agentcpm-explore").model_copy(update={"id": "tiny", **changes})
    return TeacherRegistry(contracts=registry.contracts, teachers=(entry,))


# --- the good case ----------------------------------------------------------------------------------------------------------------


def test_a_registry_id_is_loaded_from_the_models_folder(qwen_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").symlink_to(qwen_folder)
    tower = TowerLoader(one_registry(), models_dir=tmp_path, device="cpu").load("tiny")
    assert (type(tower.model).__name__, tower.role, tower.processor) == ("Qwen3ForCausalLM", "causal_lm", None)
    assert tower.coverage.share > 0.6
    assert not tower.model.training
    assert tower.spec.model_class == "Qwen3ForCausalLM"


def test_unknown_ids_and_absent_files_are_refused(tmp_path: Path) -> None:
    loader = TowerLoader(one_registry(), models_dir=tmp_path)
    with pytest.raises(TowerLoadError, match="Did you mean 'tiny'"):
        loader.load("tny")
    with pytest.raises(TowerLoadError, match="nexus teachers pull tiny"):
        loader.load("tiny")


def test_the_class_is_the_one_that_the_checkpoint_names(
    qwen: LoadedTower, gemma: LoadedTower, siglip_classifier: LoadedTower, siglip: LoadedTower,
    whisper_classifier: LoadedTower, whisper: LoadedTower,
) -> None:  # fmt: skip
    towers = (qwen, gemma, siglip_classifier, siglip, whisper_classifier, whisper)
    assert [type(tower.model).__name__ for tower in towers] == [
        "Qwen3ForCausalLM",
        "Gemma3ForCausalLM",
        "SiglipForImageClassification",
        "SiglipVisionModel",
        "WhisperForAudioClassification",
        "WhisperForConditionalGeneration",
    ]
    assert [tower.tokenizer is None for tower in towers] == [False, False, True, True, True, True]
    assert [tower.processor is None for tower in towers] == [True, True, False, False, False, False]


def test_logits_are_those_of_the_dequantised_weights(qwen: LoadedTower, qwen_folder: Path) -> None:
    reference = Qwen3ForCausalLM.from_pretrained(qwen_folder, dtype=torch.float32).eval()
    for name, module in qwen.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            reference.get_submodule(name).weight.data = dequantised(module)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(qwen.model(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_forward_leaves_the_stored_weights_as_they_are(
    qwen_folder: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    model = load_tower(spec_of(qwen_folder), device="cpu").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        first = model(torch.arange(20)[None]).logits
        second = model(torch.arange(20)[None]).logits
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(first, second)


def test_gradients_reach_what_feeds_a_teacher_and_never_its_weights(qwen: LoadedTower) -> None:
    adapted = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    qwen.model(inputs_embeds=adapted).logits.square().mean().backward()
    assert adapted.grad is not None
    assert adapted.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in qwen.model.parameters())


def test_training_through_a_teacher_leaves_its_weights_bit_by_bit(qwen: LoadedTower) -> None:
    before = {name: tensor.clone() for name, tensor in qwen.model.state_dict().items()}
    adapter = torch.nn.Linear(8, 64)
    optimizer = torch.optim.AdamW([*adapter.parameters(), *qwen.model.parameters()], lr=0.1, weight_decay=0.1)
    start = adapter.weight.detach().clone()
    for _ in range(2):
        qwen.model(inputs_embeds=adapter(torch.ones(1, 5, 8))).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(adapter.weight, start)
    assert all(torch.equal(tensor, before[name]) for name, tensor in qwen.model.state_dict().items())


def test_quantised_weights_survive_saving_and_loading_bit_by_bit(qwen: LoadedTower, tmp_path: Path) -> None:
    qwen.model.save_pretrained(tmp_path)
    again = Qwen3ForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    for module in again.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(qwen.model(ids).logits, again(ids).logits)


def test_loading_uses_no_network(
    qwen_folder: Path, spec_of: Callable[..., TeacherSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_tower(spec_of(qwen_folder), device="cpu").coverage.share > 0.6


def test_the_floating_point_original_is_the_checkpoint(qwen_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").symlink_to(qwen_folder)
    tower = TowerLoader(one_registry(), models_dir=tmp_path, device="cpu").load("tiny", quantise=False)
    stored = load_file(qwen_folder / "model.safetensors")
    assert all(torch.equal(tower.model.state_dict()[name], tensor.float()) for name, tensor in stored.items())
    assert tower.coverage.quantised_params == 0


def test_an_entry_that_is_never_quantised_stays_in_floating_point(
    qwen_folder: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    tower = load_tower(spec_of(qwen_folder, quantise=False), device="cpu")
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in tower.model.modules())


def test_settings_of_generation_may_stand_in_the_configuration(copy: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    (copy / "generation_config.json").unlink()
    assert load_tower(spec_of(copy), device="cpu").model.generation_config.eos_token_id == 1


# --- identity ----------------------------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_for_the_same_teacher_anywhere(
    qwen: LoadedTower, copy: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    assert load_tower(spec_of(copy), device="cpu").fingerprint == qwen.fingerprint


def test_fingerprint_changes_with_everything_that_changes_targets(
    qwen: LoadedTower, copy: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    spec = spec_of(copy)
    seen = {
        "nothing": qwen.fingerprint,
        "revision": load_tower(replace(spec, revision=COMMIT), device="cpu").fingerprint,
        "skip list": load_tower(replace(spec, skip_modules=("q_proj",)), device="cpu").fingerprint,
        "no quantisation": load_tower(spec, device="cpu", quantise=False).fingerprint,
    }
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    seen["template"] = load_tower(spec, device="cpu").fingerprint
    (copy / "chat_template.jinja").unlink()
    rewrite(copy, rms_norm_eps=1e-5)
    seen["config"] = load_tower(spec, device="cpu").fingerprint
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    seen["weights"] = load_tower(spec, device="cpu").fingerprint
    assert len(set(seen.values())) == len(seen)


def test_fingerprint_of_an_encoder_holds_its_processor(
    siglip: LoadedTower, siglip_folder: Path, tmp_path: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    folder = Path(shutil.copytree(siglip_folder, tmp_path / "copy"))
    assert load_tower(spec_of(folder, "encoder"), device="cpu").fingerprint == siglip.fingerprint
    rewrite(folder, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    assert load_tower(spec_of(folder, "encoder"), device="cpu").fingerprint != siglip.fingerprint


def test_tokenizer_hash_is_that_of_the_mapping_and_not_of_its_use(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    first = make_tokenizer()
    digest = tokenizer_hash(first)
    first.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again.padding_side = "right"
    again.chat_template = "{{ messages }}"
    again(["pad", "and truncate"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(again) == digest
    again.add_tokens(["new"])
    assert tokenizer_hash(again) != digest


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip", "normalized"])
def test_tokenizers_that_differ_in_their_added_tokens_alone_have_different_hashes(
    make_tokenizer: Callable[..., Any], flag: str
) -> None:
    plain, whole, other = make_tokenizer(), make_tokenizer(), make_tokenizer()
    for tokenizer in (plain, whole, other):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend["model"]["vocab"]["ab"] = len(tokenizer)
        tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(backend))
    # The word is in every vocabulary, at one place; only where it is an added token is it ever found.
    whole.add_tokens([transformers.AddedToken("ab", normalized=False)])
    other.add_tokens([transformers.AddedToken("ab", **{"normalized": False, flag: True})])
    assert plain.get_vocab() == whole.get_vocab() == other.get_vocab()
    assert plain("xabx")["input_ids"] != whole("xabx")["input_ids"]
    assert len({tokenizer_hash(plain), tokenizer_hash(whole), tokenizer_hash(other)}) == 3


def test_tokenizer_hash_of_a_tokenizer_without_a_rust_backend() -> None:
    class Letters(transformers.PreTrainedTokenizer):  # type: ignore[misc]
        """The smallest tokenizer in plain Python."""

        def __init__(self, letters: str) -> None:
            self.letters = letters
            super().__init__()

        @property
        def vocab_size(self) -> int:
            return len(self.letters)

        def get_vocab(self) -> dict[str, int]:
            return {letter: i for i, letter in enumerate(self.letters)}

    assert tokenizer_hash(Letters("abc")) == tokenizer_hash(Letters("abc"))
    assert tokenizer_hash(Letters("abc")) != tokenizer_hash(Letters("acb"))


def test_same_tokenizer_gives_the_same_hash_in_different_teachers(qwen: LoadedTower, gemma: LoadedTower) -> None:
    # Gemma's starts a sequence with a token of its own; that changes which text is tokenised, not how.
    assert qwen.tokenizer_hash == gemma.tokenizer_hash is not None


# --- what is refused ----------------------------------------------------------------------------------------------------------------


def test_errors_cross_processes(tmp_path: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    with pytest.raises(TowerLoadError) as caught:
        load_tower(spec_of(tmp_path / "none"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_encoder_is_no_language_model(siglip_folder: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    with pytest.raises(TowerLoadError, match=r"generates text .* found SiglipVisionModel\. Set its role to encoder"):
        load_tower(spec_of(siglip_folder))


def test_a_language_model_is_no_encoder(qwen_folder: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    with pytest.raises(TowerLoadError, match=r"images or audio .* found Qwen3ForCausalLM, which reads text"):
        load_tower(spec_of(qwen_folder, "encoder"))


def test_a_checkpoint_without_a_class_is_refused(copy: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    rewrite(copy, architectures=None)
    with pytest.raises(TowerLoadError, match=r"`architectures` in config\.json"):
        load_tower(spec_of(copy))


def test_a_class_that_is_named_outside_a_list_is_refused_with_what_to_write(
    copy: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    rewrite(copy, architectures="Qwen3ForCausalLM")
    with pytest.raises(
        TowerLoadError, match=r"list as `architectures`.*found 'Qwen3ForCausalLM'. Write \[\"Qwen3ForCausalLM\"\]"
    ):
        load_tower(spec_of(copy))


@pytest.mark.parametrize("name", ["Step3VL10BForCausalLM", "BitsAndBytesConfig", "is_torch_available"])
def test_a_class_that_is_no_model_of_transformers_is_refused(
    copy: Path, spec_of: Callable[..., TeacherSpec], name: str
) -> None:
    rewrite(copy, architectures=[name])
    with pytest.raises(TowerLoadError, match=f"found '{name}', which it does not have.*is not run"):
        load_tower(spec_of(copy))


def test_missing_weights_are_refused_and_not_invented(copy: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    weights = load_file(copy / "model.safetensors")
    # What is left of a GPTQ checkpoint whose class has dropped the quantisation setting: packed tensors without a place.
    for name in [name for name in weights if "mlp" in name]:
        weights[name.replace(".weight", ".qweight")] = weights.pop(name)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerLoadError, match=r"found 9 missing \(model\.layers\.0\.mlp\.down_proj\.weight.*, \.\.\.\)"):
        load_tower(spec_of(copy))


def test_weights_without_a_place_are_refused_unless_the_entry_leaves_them_aside(
    copy: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["talker.weight"] = torch.zeros(2)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerLoadError, match=r"found 1 unexpected \(talker\.weight\)"):
        load_tower(spec_of(copy))
    assert load_tower(spec_of(copy, unused_weights=("talker.",)), device="cpu").coverage.share > 0.6


def test_weights_of_another_shape_are_refused(copy: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    rewrite(copy, vocab_size=96)
    with pytest.raises(
        TowerLoadError, match=r"shape \(96, 64\) for 'lm_head\.weight' of teacher 'tiny', found \(104, 64\)"
    ):
        load_tower(spec_of(copy))


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_attention_heads": 0}])
def test_a_config_that_describes_no_model_is_refused(
    copy: Path, spec_of: Callable[..., TeacherSpec], changes: dict[str, Any]
) -> None:
    rewrite(copy, **changes)
    with pytest.raises(TowerLoadError, match="to describe a Qwen3ForCausalLM, found: ") as caught:
        load_tower(spec_of(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_that_are_no_floating_point_numbers_are_refused_and_not_cast(
    copy: Path, spec_of: Callable[..., TeacherSpec], name: str, dtype: torch.dtype, kind: str
) -> None:
    weights = load_file(copy / "model.safetensors")
    weights[name] = weights[name].to(dtype)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        TowerLoadError, match=rf"floating-point numbers .* in '{name}' of teacher 'tiny', found {kind} in"
    ):
        load_tower(spec_of(copy))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.1.mlp.experts.3.down_proj.weight", None, r"found no such tensor\."),
        ("model.layers.0.mlp.experts.0.gate_proj.weight", torch.t, r"found \(64, 128\)\."),
    ],
)
def test_an_experts_matrix_that_is_missing_or_turned_is_named(
    save: Callable[..., Path], text_config: dict[str, Any], spec_of: Callable[..., TeacherSpec], make_tokenizer: Any,
    name: str, change: Any, message: str,
) -> None:  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1}
    folder = save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**text_config, **experts)), make_tokenizer())
    weights = load_file(folder / "model.safetensors")
    matrix = weights.pop(name)
    if change is not None:
        weights[name] = change(matrix).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerLoadError, match=rf"Expected shape .* for '{name}' of teacher 'tiny', .*{message}"):
        load_tower(spec_of(folder))


def test_a_matrix_of_another_shape_is_not_quantised_unseen(copy: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 64)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        TowerLoadError, match=r"shape \(128, 64\) for 'model\.layers\.0\.mlp\.up_proj\.weight'.*found \(64, 64\)"
    ):
        load_tower(spec_of(copy))


@pytest.fixture
def experts_folder(
    save: Callable[..., Path], make_tokenizer: Callable[..., Any], text_config: dict[str, Any], tmp_path: Path
) -> Path:
    """Experts are merged into 3-D parameters while they are loaded; on disk there is a matrix for each."""
    config = Qwen3MoeConfig(**text_config, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    return Path(shutil.copytree(save(Qwen3MoeForCausalLM(config), make_tokenizer()), tmp_path / "experts"))


EXPERTS_IN_FLOAT = {"skip_modules": ("mlp.experts",), "min_coverage": 0.1}


def test_tensors_that_are_merged_while_loading_are_neither_missing_nor_unexpected(
    experts_folder: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in load_file(experts_folder / "model.safetensors")
    coverage = load_tower(spec_of(experts_folder, **EXPERTS_IN_FLOAT), device="cpu").coverage
    assert 0.1 < coverage.share < 0.2
    assert coverage.left_float["model.layers.0.mlp.experts"] == "Qwen3MoeExperts is not linear"


def test_what_transformers_cannot_load_is_told_in_one_line(
    experts_folder: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    weights = load_file(experts_folder / "model.safetensors")
    # Half of what it merges is absent from every expert of a layer.
    weights = {name: tensor for name, tensor in weights.items() if not ("layers.0" in name and "up_proj" in name)}
    save_file(weights, experts_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerLoadError, match="to load as Qwen3MoeForCausalLM, found: ") as caught:
        load_tower(spec_of(experts_folder, **EXPERTS_IN_FLOAT))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_tokenizer_is_refused(copy: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(TowerLoadError, match=r"tokenizer\.json in .*, found none\. Save or fetch"):
        load_tower(spec_of(copy))


def test_a_broken_tokenizer_is_refused(copy: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    (copy / "tokenizer_config.json").write_text("{")
    with pytest.raises(TowerLoadError, match=r"Expected a tokenizer in .*Save or fetch"):
        load_tower(spec_of(copy))


def test_a_tokenizer_without_an_end_token_is_refused(copy: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    rewrite(copy, "tokenizer_config.json", eos_token=None)
    with pytest.raises(TowerLoadError, match="end-of-sequence token"):
        load_tower(spec_of(copy))


def test_an_encoder_without_a_processor_is_refused(
    siglip_folder: Path, tmp_path: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    folder = Path(shutil.copytree(siglip_folder, tmp_path / "copy"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(
        TowerLoadError, match=r"image processor or a feature extractor .*preprocessor_config\.json there"
    ):
        load_tower(spec_of(folder, "encoder"))


def test_a_device_that_is_not_there_is_refused(qwen_folder: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    with pytest.raises(TowerLoadError, match=r"GPU for device 'cuda:99', found \d+ GPUs"):
        load_tower(spec_of(qwen_folder), device="cuda:99")


def test_auto_takes_a_device_that_is_there(qwen_folder: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    assert load_tower(spec_of(qwen_folder)).model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


# --- code that comes with a checkpoint --------------------------------------------------------------------------------

MODELING = """
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model, Qwen3MoeConfig, Qwen3MoeForCausalLM


class OwnConfig(Qwen3Config):
    model_type = "own"


class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig


class OwnModel(Qwen3Model):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copy / "modeling_own.py").write_text(MODELING)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    rewrite(copy, architectures=["OwnForCausalLM"], model_type="own", auto_map=auto_map)
    return copy


def test_code_of_a_checkpoint_is_not_run_by_default(with_code: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    with pytest.raises(TowerLoadError, match="'OwnForCausalLM', which it does not have"):
        load_tower(spec_of(with_code))


def test_code_of_an_allow_listed_checkpoint_is_run(
    with_code: Path, spec_of: Callable[..., TeacherSpec], qwen: LoadedTower
) -> None:
    tower = load_tower(spec_of(with_code, remote_code=True, revision=COMMIT), device="cpu")
    assert type(tower.model).__name__ == "OwnForCausalLM"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(tower.model(ids).logits, qwen.model(ids).logits)


def test_an_encoders_own_code_needs_its_own_class(
    with_code: Path, spec_of: Callable[..., TeacherSpec], image_processor: Any
) -> None:
    image_processor.save_pretrained(with_code)
    # The folder maps no AutoModel.
    with pytest.raises(TowerLoadError, match="to describe a AutoModel"):
        load_tower(spec_of(with_code, "encoder", remote_code=True, revision=COMMIT))


def test_models_without_a_base_prefix_are_loaded_by_their_own_names(
    save: Callable[..., Path], spec_of: Callable[..., TeacherSpec]
) -> None:
    from nexus.towers.checkpoint import open_checkpoint
    from nexus.towers.loader import _keys_by_parameter

    folder = save(
        Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1))
    )
    with torch.device("meta"):
        base = Qwen3Model(Qwen3Config.from_pretrained(folder))
    keys = _keys_by_parameter(spec_of(folder), base, open_checkpoint(folder))
    assert keys["layers.0.mlp.up_proj.weight"][1] == "model.layers.0.mlp.up_proj.weight"
