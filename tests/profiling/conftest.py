"""Tiny randomly initialised models of every kind that is profiled, and references written with plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

# The initialisation is ten times wider than usual: random models of the usual width are nearly linear, and blocks change little.
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# The window is shorter than the prompts, so that cached keys fall out of it.
SLIDING = {
    # With tied weights a random Gemma only repeats its last token, whatever is ablated.
    "tie_word_embeddings": False,
    "sliding_window": 6,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True, eq=False)
class TextBatch:
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_mask_BT: Tensor
    """Targets to score."""


@pytest.fixture(scope="session")
def text_batch() -> TextBatch:
    """Five left-padded rows of lengths 4 to 12 with one to four scored targets at their ends."""
    generator = torch.Generator().manual_seed(7)
    input_ids_BT = torch.randint(3, 100, (5, 12), generator=generator)
    attention_mask_BT = torch.ones_like(input_ids_BT)
    loss_mask_BT = torch.zeros_like(input_ids_BT)
    for row, (padding, answer) in enumerate([(0, 4), (5, 1), (8, 3), (2, 2), (0, 3)]):
        attention_mask_BT[row, :padding] = 0
        input_ids_BT[row, :padding] = 0
        loss_mask_BT[row, -answer:] = 1
    return TextBatch(input_ids_BT, attention_mask_BT, loss_mask_BT)


def build_qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**TEXT))


def build_gemma3() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**TEXT, **SLIDING))


def build_gemma3_multimodal() -> PreTrainedModel:
    config = Gemma3Config(
        text_config={**TEXT, **SLIDING},
        # More blocks than the text decoder: the longest list of the whole model is the wrong one.
        vision_config={**ENCODER, "num_hidden_layers": 5, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        image_token_id=120,
        boi_token_index=121,
        eoi_token_index=122,
    )
    return Gemma3ForConditionalGeneration(config)


def build_glm4_moe() -> PreTrainedModel:
    dimensions = {key: value for key, value in TEXT.items() if key not in ("head_dim", "num_key_value_heads")}
    config = Glm4MoeLiteConfig(
        **dimensions,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )
    return Glm4MoeLiteForCausalLM(config)


@pytest.fixture(scope="session")
def qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    return build_qwen3().eval()


@pytest.fixture
def own_qwen3() -> PreTrainedModel:
    """A Qwen3 that one test may change."""
    torch.manual_seed(0)
    return build_qwen3().eval()


@pytest.fixture(scope="session")
def qwen3_nf4(qwen3: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    path: Path = tmp_path_factory.mktemp("qwen3")
    qwen3.save_pretrained(path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return Qwen3ForCausalLM.from_pretrained(path, quantization_config=config, device_map="cpu").eval()


@pytest.fixture(scope="session", params=["qwen3", "qwen3_nf4", "gemma3", "gemma3_multimodal", "glm4_moe"])
def causal_lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param in ("qwen3", "qwen3_nf4"):
        return request.getfixturevalue(request.param)
    torch.manual_seed(0)
    builders = {"gemma3": build_gemma3, "gemma3_multimodal": build_gemma3_multimodal, "glm4_moe": build_glm4_moe}
    return builders[request.param]().eval()


@pytest.fixture(scope="session")
def gemma3_multimodal() -> PreTrainedModel:
    torch.manual_seed(0)
    return build_gemma3_multimodal().eval()


@pytest.fixture(scope="session")
def siglip() -> PreTrainedModel:
    torch.manual_seed(0)
    config = SiglipConfig(
        vision_config={**ENCODER, "image_size": 16, "patch_size": 8},
        text_config={**ENCODER, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
        num_labels=5,
    )
    return _wider(SiglipForImageClassification(config)).eval()


def build_whisper(*, use_weighted_layer_sum: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=64,
        encoder_layers=3,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=20,
        num_labels=5,
        classifier_proj_size=32,
        use_weighted_layer_sum=use_weighted_layer_sum,
    )
    return _wider(WhisperForAudioClassification(config)).eval()


@pytest.fixture(scope="session")
def whisper() -> PreTrainedModel:
    return build_whisper(use_weighted_layer_sum=False)


@pytest.fixture(scope="session")
def whisper_weighted() -> PreTrainedModel:
    """Its head reads the outputs of all blocks."""
    return build_whisper(use_weighted_layer_sum=True)


@pytest.fixture(scope="session")
def speech_model() -> PreTrainedModel:
    """Writes what it hears: two sides, of different depths."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=64,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=64,
        vocab_size=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        # A random decoder with tied weights only repeats its last token.
        tie_word_embeddings=False,
    )
    return _wider(WhisperForConditionalGeneration(config)).eval()


@dataclass(frozen=True, eq=False)
class SpeechBatch:
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_mask_BT: Tensor
    inputs: dict[str, Tensor]
    """What is heard."""


@pytest.fixture(scope="session")
def speech_batch() -> SpeechBatch:
    """Four recordings and left-padded texts of lengths 5 to 9, two to four targets at their ends."""
    generator = torch.Generator().manual_seed(0)
    input_ids_BT = torch.randint(4, 100, (4, 9), generator=generator)
    attention_mask_BT, loss_mask_BT = torch.ones_like(input_ids_BT), torch.zeros_like(input_ids_BT)
    for row, (padding, answer) in enumerate([(0, 4), (3, 2), (4, 3), (1, 4)]):
        attention_mask_BT[row, :padding] = 0
        input_ids_BT[row, :padding] = 0
        input_ids_BT[row, padding] = 3
        loss_mask_BT[row, -answer:] = 1
    frames = torch.randn(4, 16, 40, generator=generator)
    return SpeechBatch(input_ids_BT, attention_mask_BT, loss_mask_BT, {"input_features": frames})


def _wider(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def skipping() -> Callable[..., object]:
    """Return the reference ablation: a hook that gives a block's input back as its output."""

    @contextmanager
    def skip(blocks: Sequence[nn.Module], index: int | None) -> Iterator[None]:
        def identity(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> object:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        # First in line: what a model collects through hooks of its own is the skipped block's output then.
        hook = None if index is None else blocks[index].register_forward_hook(identity, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    return skip


LOOKUP_VALUES = 8
LOOKUP_CRITICAL_LAYER = 1


@dataclass(frozen=True, eq=False)
class LookupTask:
    """`ask x -> #### f(x) <eos>` for a fixed permutation f; only one block of the model was trained to do it."""

    model: PreTrainedModel
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_mask_BT: Tensor
    critical_layer: int
    tokens: tuple[str, ...]


@pytest.fixture(scope="session")
def lookup_task() -> LookupTask:
    torch.manual_seed(0)
    tokens = ("<pad>", "<eos>", "ask", "####", *(str(value) for value in range(LOOKUP_VALUES)))
    config = {**TEXT, "vocab_size": len(tokens), "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.05}
    model = Qwen3ForCausalLM(Qwen3Config(**config))
    model.requires_grad_(False)
    model.model.layers[LOOKUP_CRITICAL_LAYER].requires_grad_(True)
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.model.embed_tokens.weight.normal_()
        for index, layer in enumerate(model.model.layers):
            if index != LOOKUP_CRITICAL_LAYER:
                layer.self_attn.o_proj.weight.mul_(0.05)
                layer.mlp.down_proj.weight.mul_(0.05)
    value_B = torch.arange(LOOKUP_VALUES)
    ask_B, mark_B, eos_B = (torch.full_like(value_B, token) for token in (2, 3, 1))
    input_ids_BT = torch.stack([ask_B, 4 + value_B, mark_B, 4 + (3 * value_B + 1) % LOOKUP_VALUES, eos_B], dim=1)
    loss_mask_BT = torch.tensor([0, 0, 1, 1, 1]).repeat(LOOKUP_VALUES, 1)
    labels_BT = input_ids_BT.masked_fill(loss_mask_BT == 0, -100)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(120):
        loss = model(input_ids=input_ids_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A test of what was learned means nothing when nothing was.
    assert loss.item() < 0.01
    return LookupTask(
        model.requires_grad_(True).eval(),
        input_ids_BT,
        torch.ones_like(input_ids_BT),
        loss_mask_BT,
        LOOKUP_CRITICAL_LAYER,
        tokens,
    )


@pytest.fixture(scope="session")
def planted_text_models() -> dict[str, PreTrainedModel]:
    """One model of each architecture, whose blocks may be changed in a copy."""
    models = {}
    for name, build in (("qwen3", build_qwen3), ("gemma3", build_gemma3), ("glm4_moe", build_glm4_moe)):
        torch.manual_seed(0)
        models[name] = build().eval()
    return models
