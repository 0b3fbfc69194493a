"""A trunk of another model's layers: the model's own results, ports between, low-rank updates that merge, a file that runs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nexus.config import load_config
from nexus.errors import ConfigError
from nexus.student.presets import StudentSpec
from nexus.student.shipped import student_positions
from nexus.student.trunk import (
    PretrainedCore,
    add_lora,
    build_core,
    load_pretrained,
    merge_lora,
    pretrained_core_config,
)

VOCABULARY = 96


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ).eval()


@pytest.fixture(scope="module")
def folder(model: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trunk") / "checkpoint"
    model.save_pretrained(path)
    return path


@pytest.fixture
def core(folder: Path) -> PretrainedCore:
    torch.manual_seed(1)
    made = build_core(pretrained_core_config(folder, port_every=1))
    assert isinstance(made, PretrainedCore)
    load_pretrained(made, folder)
    return made.eval()


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Ids [2, 7], the first row padded on the left, and a context."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    return torch.randint(0, VOCABULARY, (2, 7), generator=generator), mask, torch.randn(2, 3, 32, generator=generator)


def opened(core: PretrainedCore) -> PretrainedCore:
    """With ports that let the context through, and updates that are not 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for port in core.ports.values():
            port.gate_D.normal_(generator=generator)
        for name, parameter in core.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    return core


def test_an_untrained_port_changes_nothing_of_the_model(model, core, rows):
    ids, mask, context = rows
    expected = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    for given in (None, context):
        output = core(ids, mask, context_BCD=given, output_hidden_states=True)
        torch.testing.assert_close(output.logits[mask.bool()], expected[mask.bool()])
    assert len(output.hidden_states) == 4
    torch.testing.assert_close(core.lm_head(output.hidden_states[-1]), output.logits)
    assert output.past_key_values is not None
    assert len(core.layers) == 3
    assert core.embed_tokens.weight.shape == (VOCABULARY, 32)


def test_a_context_reaches_the_logits_through_the_ports_and_never_the_lower_states(core, rows):
    ids, mask, context = rows
    plain = opened(core)(ids, mask, output_hidden_states=True)
    read = core(ids, mask, context_BCD=context, output_hidden_states=True)
    assert not torch.allclose(plain.logits, read.logits, atol=1e-3)
    lower = core.lower_states(ids, mask)
    torch.testing.assert_close(lower, plain.hidden_states[1])
    torch.testing.assert_close(lower, read.hidden_states[1])
    # Nothing of the pass that ended early stays behind.
    torch.testing.assert_close(core(ids, mask, context_BCD=context).logits, read.logits)


def test_cached_steps_equal_one_pass_and_generate_runs(core, rows):
    ids, mask, context = rows
    whole = opened(core)(ids, mask, context_BCD=context).logits
    first = core(ids[:, :5], mask[:, :5], context_BCD=context, use_cache=True)
    rest = core(ids[:, 5:], mask, past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits[:, -1], whole[:, -1])
    last = core(ids, mask, context_BCD=context, use_cache=False, logits_to_keep=1)
    torch.testing.assert_close(last.logits[:, 0], whole[:, -1])
    answers = core.generate(ids, attention_mask=mask, context_BCD=context, max_new_tokens=2, do_sample=False)
    assert torch.equal(answers[:, 7], whole[:, -1].argmax(-1))


def test_labels_are_scored_and_contradictions_refused(core, rows):
    ids, mask, _ = rows
    labels = ids.masked_fill(mask == 0, -100)
    loss = core(ids, mask, labels=labels).loss
    logits = core(ids, mask).logits
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(core(ids, mask, position_ids=positions).logits, logits)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    as_tuple = core(inputs_embeds=core.embed_tokens(ids), attention_mask=None, return_dict=False, use_cache=False)
    assert as_tuple[0].shape == (2, 7, VOCABULARY)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        core()
    with pytest.raises(ValueError, match="Labels score every position"):
        core(ids, labels=labels, logits_to_keep=1)
    with pytest.raises(ValueError, match="cache_position to begin at the 0 cached tokens, found 3"):
        core(ids, cache_position=torch.arange(3, 5))


def test_only_ports_and_updates_train_and_an_untrained_update_changes_nothing(core, rows):
    ids, mask, context = rows
    before = opened(core)(ids, mask, context_BCD=context).logits
    add_lora(core, rank=4, alpha=8)
    torch.testing.assert_close(core(ids, mask, context_BCD=context).logits, before)
    trained = [name for name, parameter in core.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name or name.startswith("ports.") for name in trained)
    # Seven maps in each of three layers, two factors each; the ports have seven parameters each.
    assert sum(".lora_" in name for name in trained) == 42
    assert sum(name.startswith("ports.") for name in trained) == 14


def test_merged_updates_give_the_same_answers_from_a_file_without_the_model_they_came_from(core, rows, tmp_path):
    ids, mask, context = rows
    add_lora(core, rank=4, alpha=8)
    expected = opened(core)(ids, mask, context_BCD=context).logits
    merge_lora(core)
    torch.testing.assert_close(core(ids, mask, context_BCD=context).logits, expected, rtol=1e-4, atol=1e-5)
    assert not [name for name in core.state_dict() if "lora" in name or "base_layer" in name]
    core.save_pretrained(tmp_path / "alone")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone").eval()
    assert type(alone) is PretrainedCore
    torch.testing.assert_close(
        alone(ids, mask, context_BCD=context).logits, core(ids, mask, context_BCD=context).logits
    )
    assert alone.lm_head.weight.data_ptr() == alone.embed_tokens.weight.data_ptr()


def test_recomputed_activations_give_the_same_gradient_even_when_passes_with_other_contexts_came_between(core, rows):
    ids, mask, context = rows
    add_lora(core, rank=4, alpha=8)
    opened(core).train()

    def gradients():
        core.zero_grad()
        losses = [
            core(ids, mask, context_BCD=given, use_cache=False).logits.square().mean()
            for given in (context, -context, None)
        ]
        (losses[0] + 2.0 * losses[1] + 3.0 * losses[2]).backward()
        return {name: p.grad.clone() for name, p in core.named_parameters() if p.grad is not None}

    expected = gradients()
    core.save_activations_less()
    core.train()
    found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_of_any_family_keep_their_logits_and_take_updates_on_every_linear_map(family, rows, tmp_path):
    torch.manual_seed(0)
    ids, mask, context = rows
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    model.save_pretrained(tmp_path)
    core = build_core(pretrained_core_config(tmp_path, port_every=1))
    assert isinstance(core, PretrainedCore)
    load_pretrained(core, tmp_path)
    ids, mask = ids[1:], mask[1:]
    torch.testing.assert_close(core.eval()(ids, mask).logits, model(input_ids=ids, attention_mask=mask).logits)
    add_lora(core, rank=2, alpha=4)
    opened(core).train()(ids, mask, context_BCD=context[1:]).logits.square().sum().backward()
    trained = {name for name, parameter in core.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in core.named_parameters() if parameter.requires_grad}
    # Experts that are one tensor have no map of their own to update.
    updated = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if ".lora_" in name}
    assert updated >= ({"c_attn", "c_fc", "c_proj"} if family == "gpt2" else {"q_proj", "k_proj", "v_proj", "o_proj"})
    before = core.eval()(ids, mask, context_BCD=context[1:]).logits
    merge_lora(core)
    torch.testing.assert_close(core(ids, mask, context_BCD=context[1:]).logits, before, rtol=1e-4, atol=1e-4)


def test_more_output_rows_than_the_model_has_are_added(folder, rows):
    ids, mask, _ = rows
    config = pretrained_core_config(folder, port_every=1)
    config.vocab_size = VOCABULARY + 4
    core = PretrainedCore(config)
    load_pretrained(core, folder)
    assert core(ids, mask).logits.shape[-1] == VOCABULARY + 4


def test_a_specification_with_a_trunk_reads_back_equal(folder):
    core = pretrained_core_config(folder, port_every=1)
    spec = StudentSpec.from_dict({"core": core.to_diff_dict(), "router": {}})
    again = StudentSpec.from_dict(spec.to_dict())
    assert again.core.to_dict() == spec.core.to_dict()
    assert again.with_vocabulary(99, pad_token_id=0, eos_token_id=1).core.vocab_size == 99
    assert type(again.core) is type(core)


def test_what_is_no_language_model_is_refused_in_one_line(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"Expected a causal language model .* in student.trunk"):
        pretrained_core_config(tmp_path, port_every=1)
    config = pretrained_core_config(folder, port_every=1)
    with pytest.raises(ConfigError, match=r"Expected the weights .* in student.trunk") as caught:
        load_pretrained(PretrainedCore(config), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=2.0,
            final_logit_softcapping=1.0,
        )
    )
    capped.save_pretrained(tmp_path)
    core = PretrainedCore(pretrained_core_config(tmp_path, port_every=1))
    with pytest.raises(ConfigError, match="which scales or caps"):
        load_pretrained(core, tmp_path)


def test_a_factor_behind_the_output_layer_is_one_in_front_of_it(tmp_path):
    torch.manual_seed(0)
    scaled = AutoModelForCausalLM.from_config(
        CohereConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            logit_scale=0.25,
        )
    ).eval()
    scaled.save_pretrained(tmp_path)
    core = PretrainedCore(pretrained_core_config(tmp_path, port_every=1))
    load_pretrained(core, tmp_path)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        output = core.eval()(ids, output_hidden_states=True)
        torch.testing.assert_close(output.logits, scaled(ids).logits)
        torch.testing.assert_close(core.lm_head(output.hidden_states[-1]), output.logits)


def test_a_recurrent_model_is_refused_with_the_reason(tmp_path):
    MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^Expected a trunk with attention .* which is recurrent") as caught:
        pretrained_core_config(tmp_path, port_every=1)
    assert "\n" not in str(caught.value)


def test_the_positions_of_a_trunk_are_those_of_its_own_configuration(folder, tmp_path):
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    assert student_positions(load_config(quickstart, [f"student.trunk={folder}", "student.tokenizer=null"])) == 64
    FAMILIES["gpt2"].save_pretrained(tmp_path / "gpt2")
    assert (
        student_positions(load_config(quickstart, [f"student.trunk={tmp_path}/gpt2", "student.tokenizer=null"])) == 64
    )
    missing = load_config(quickstart, [f"student.trunk={tmp_path}", "student.tokenizer=null"])
    with pytest.raises(ConfigError, match=r"max_position_embeddings at student.trunk"):
        student_positions(missing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["student.trunk=somewhere"], "expected either tokenizer .* found both"),
        (["student.tokenizer=null"], "expected either tokenizer .* found neither"),
        (["student.lora.rank=3"], "lora.rank has no effect while there is no trunk"),
    ],
)
def test_a_student_has_one_tokenizer_and_updates_only_beside_a_trunk(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml", changes)
