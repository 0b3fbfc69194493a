"""Tiny checkpoints of the real classes, saved as their owners would save them, and rows to ask them about."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from nexus.data.records import Media, Record
from nexus.towers.loader import LoadedTower, load_tower
from nexus.towers.registry import TeacherSpec
from nexus.towers.targets import ScoreRequest

# Cannot be imported without that package; test_tower_check.py asserts what a user is told then.
collect_ignore = [] if find_spec("diffusers") else ["test_tower_diffusion.py"]

# 64 wide because NF4 needs rows that are a multiple of 64 long.
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 104,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
PIXELS = {"image_size": 16, "patch_size": 4}
SPEECH = {
    "d_model": 64,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
RATE = 16000


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_config() -> dict[str, Any]:
    return dict(TEXT)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """One token per printable character; `start` puts a token before every sequence, `end` one after it."""

    def make(*, start: bool = False, end: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(32, 127)), "\n"]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        backend.decoder = decoders.Fuse()
        if start or end:
            pieces = [*(["<bos>"] if start else []), "$A", *(["<eos>"] if end else [])]
            backend.post_processor = processors.TemplateProcessing(
                single=pieces, special_tokens=[("<bos>", 2), ("<eos>", 1)]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


def spread(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights of a size at which a random model's answers differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # Embeddings that are also the output head would otherwise only repeat the last token.
            scale = 0.05 if "embed" in name else 0.25
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a model in half precision, as most checkpoints are, with what prepares its inputs; returns the folder."""

    def write(model: PreTrainedModel, *companions: Any, name: str | None = None) -> Path:
        folder = tmp_path_factory.mktemp(name or type(model).__name__)
        spread(model).half().save_pretrained(folder)
        for companion in companions:
            companion.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def qwen_folder(save: Callable[..., Path], make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Path:
    return save(Qwen3ForCausalLM(Qwen3Config(**TEXT)), make_tokenizer())


@pytest.fixture(scope="session")
def gemma_folder(save: Callable[..., Path], make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Path:
    # A window shorter than the rows, so that padding on the left could shift it.
    config = Gemma3TextConfig(**TEXT, sliding_window=8, query_pre_attn_scalar=16, final_logit_softcapping=5.0)
    return save(Gemma3ForCausalLM(config), make_tokenizer(start=True))


@pytest.fixture(scope="session")
def image_processor() -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(do_resize=False, size={"height": 16, "width": 16})


@pytest.fixture(scope="session")
def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(
        feature_size=16, sampling_rate=RATE, hop_length=160, n_fft=400, chunk_length=1, return_attention_mask=False
    )


@pytest.fixture(scope="session")
def siglip_classifier_folder(save: Callable[..., Path], image_processor: SiglipImageProcessorPil) -> Path:
    labels = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four"}
    config = SiglipConfig(vision_config={**ENCODER, **PIXELS, "vision_use_head": False}, num_labels=5, id2label=labels)
    del config.text_config
    return save(SiglipForImageClassification(config), image_processor)


@pytest.fixture(scope="session")
def siglip_folder(save: Callable[..., Path], image_processor: SiglipImageProcessorPil) -> Path:
    return save(SiglipVisionModel(SiglipVisionConfig(**ENCODER, **PIXELS)), image_processor)


@pytest.fixture(scope="session")
def whisper_classifier_folder(save: Callable[..., Path], extractor: WhisperFeatureExtractor) -> Path:
    config = WhisperConfig(
        **SPEECH,
        decoder_layers=0,
        vocab_size=8,
        classifier_proj_size=64,
        num_labels=4,
        id2label=dict(enumerate("abcd")),
    )
    return save(WhisperForAudioClassification(config), extractor)


@pytest.fixture(scope="session")
def whisper_folder(save: Callable[..., Path], extractor: WhisperFeatureExtractor) -> Path:
    config = WhisperConfig(
        **SPEECH,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=128,
        vocab_size=64,
        max_target_positions=16,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return save(WhisperForConditionalGeneration(config), extractor)


@pytest.fixture(scope="session")
def spec_of() -> Callable[..., TeacherSpec]:
    def make(folder: Path, role: Any = "causal_lm", **changes: Any) -> TeacherSpec:
        return TeacherSpec(**{"id": "tiny", "path": str(folder), "revision": None, "role": role, **changes})

    return make


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path, spec_of: Callable[..., TeacherSpec]) -> LoadedTower:
    return load_tower(spec_of(qwen_folder), device="cpu")


@pytest.fixture(scope="session")
def gemma(gemma_folder: Path, spec_of: Callable[..., TeacherSpec]) -> LoadedTower:
    return load_tower(spec_of(gemma_folder), device="cpu")


@pytest.fixture(scope="session")
def siglip_classifier(siglip_classifier_folder: Path, spec_of: Callable[..., TeacherSpec]) -> LoadedTower:
    return load_tower(spec_of(siglip_classifier_folder, "encoder"), device="cpu")


@pytest.fixture(scope="session")
def siglip(siglip_folder: Path, spec_of: Callable[..., TeacherSpec]) -> LoadedTower:
    return load_tower(spec_of(siglip_folder, "encoder"), device="cpu")


@pytest.fixture(scope="session")
def whisper_classifier(whisper_classifier_folder: Path, spec_of: Callable[..., TeacherSpec]) -> LoadedTower:
    return load_tower(spec_of(whisper_classifier_folder, "encoder"), device="cpu")


@pytest.fixture(scope="session")
def whisper(whisper_folder: Path, spec_of: Callable[..., TeacherSpec]) -> LoadedTower:
    spec = spec_of(whisper_folder, "encoder", skip_modules=("model.encoder",), min_coverage=0.1)
    return load_tower(spec, device="cpu")


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    def make(seed: int) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def wav() -> Callable[[int], bytes]:
    def make(seed: int) -> bytes:
        buffer = io.BytesIO()
        time_T = np.arange(RATE // 2 + 800 * seed) / RATE
        tone_T = 0.3 * np.sin(2 * np.pi * (200 + 150 * seed) * time_T)
        soundfile.write(buffer, tone_T, RATE, format="WAV")
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def text_request() -> Callable[..., ScoreRequest]:
    def make(
        prompts: tuple[str, ...],
        completions: tuple[str, ...],
        *,
        temperature: float = 1.0,
        top_k: int = 8,
        layers: Any = (),
    ) -> ScoreRequest:
        ids = tuple(f"row-{i}" for i in range(len(prompts)))
        return ScoreRequest(ids, prompts, completions, None, temperature, top_k, tuple(layers))

    return make


@pytest.fixture(scope="session")
def media_request() -> Callable[..., ScoreRequest]:
    def make(
        media: tuple[bytes, ...], *, temperature: float = 1.0, layers: Any = (), snr_db: Any = None
    ) -> ScoreRequest:
        ids = tuple(f"row-{i}" for i in range(len(media)))
        return ScoreRequest(ids, ("",) * len(media), None, media, temperature, 8, tuple(layers), snr_db)

    return make


@pytest.fixture(scope="session")
def image_records(png: Callable[[int], bytes]) -> list[Record]:
    return [Record(id=f"row-{i}", capability="vision", prompt="?", media=Media("image", png(i))) for i in range(6)]


@pytest.fixture
def random_state_is_kept() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())
