"""Audio codecs: what they give for a recording, that it is the codec's own, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file

from nexus.data.media import decode_audio
from nexus.errors import ConfigError, TowerLoadError
from nexus.towers.check import exercise
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.registry import TeacherSpec
from nexus.towers.rows import RowsError
from nexus.towers.targets import CodecTargets, ScoreRequest

RATE = 400
SIZES: dict[str, dict[str, Any]] = {
    "Mimi": {
        "hidden_size": 32, "num_filters": 8, "upsampling_ratios": [2, 2], "codebook_size": 64, "codebook_dim": 16,
        "num_quantizers": 4, "vector_quantization_hidden_dimension": 16, "upsample_groups": 32, "num_hidden_layers": 2,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 32,
    },
    "Encodec": {
        "target_bandwidths": [0.6, 2.4], "sampling_rate": RATE, "audio_channels": 1, "num_filters": 8, "upsampling_ratios": [2, 2],
        "hidden_size": 32, "codebook_size": 64, "codebook_dim": 32, "num_lstm_layers": 1,
    },
    "Dac": {
        "encoder_hidden_size": 16, "downsampling_ratios": [2, 2], "decoder_hidden_size": 32, "n_codebooks": 4, "codebook_size": 64,
        "codebook_dim": 8, "sampling_rate": RATE,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny codecs with codebooks that tell frames apart: new ones hold nothing."""
    saved = {}
    for name, sizes in SIZES.items():
        torch.manual_seed(0)
        model_class: Any = getattr(transformers, f"{name}Model")
        model = model_class(model_class.config_class(**sizes))
        for key, buffer in model.named_buffers():
            if key.endswith(("embed_sum", "codebook.embed")):
                buffer.copy_(torch.randn(buffer.shape))
        saved[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(saved[name])
        transformers.EncodecFeatureExtractor(sampling_rate=RATE).save_pretrained(saved[name])
    return saved


@pytest.fixture(scope="module", params=SIZES)
def engine(
    request: pytest.FixtureRequest, folders: dict[str, Path], spec_of: Callable[..., TeacherSpec]
) -> TeacherEngine:
    tower = load_tower(spec_of(folders[request.param], "codec"), device="cpu")
    return TeacherEngine(tower, teacher_id="tiny")


def recording(seed: int, samples: int = 200) -> bytes:
    buffer = io.BytesIO()
    waveform_T = np.random.default_rng(seed).uniform(-0.5, 0.5, samples)
    soundfile.write(buffer, waveform_T, RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def ask(engine: TeacherEngine, request: ScoreRequest) -> CodecTargets:
    coded = engine.score(request).codec
    assert coded is not None
    return coded


def test_codes_decode_to_the_reconstruction_and_rows_do_not_see_each_other(
    engine: TeacherEngine, media_request: Callable[..., ScoreRequest]
) -> None:
    both = ask(engine, media_request((recording(0), recording(1, 121))))
    assert engine.tower.coverage.quantised_params == 0
    assert (engine.num_layers, engine.hidden_size) == (0, both.latents_FE.shape[1])
    assert both.frame_offsets_B1[-1] == len(both.codes_FQ) == len(both.latents_FE)
    assert np.diff(both.sample_offsets_B1).tolist() == [200, 121]
    assert len(np.unique(both.codes_FQ)) > 5
    alone = ask(engine, media_request((recording(1, 121),)))
    np.testing.assert_array_equal(alone.codes_FQ, both.codes_FQ[both.frame_offsets_B1[1] :])
    np.testing.assert_array_equal(alone.samples_T, both.samples_T[200:])
    # The library's own way from the codes to the sound.
    model = engine.tower.model
    codes_1QF = torch.from_numpy(alone.codes_FQ.T[None]).long()
    arguments: Any = {"audio_codes": codes_1QF}
    if type(model).__name__ == "EncodecModel":
        arguments = {"audio_codes": codes_1QF[None], "audio_scales": [None]}
    with torch.no_grad():
        expected_T = model.decode(**arguments).audio_values.flatten()[:121].numpy()
    np.testing.assert_allclose(alone.samples_T, expected_T, atol=1e-4)
    original_T = decode_audio(recording(1, 121), RATE)
    np.testing.assert_allclose(alone.mse_B, np.square(alone.samples_T - original_T).mean(), rtol=1e-4)


def test_latents_are_what_the_decoder_reads(folders: dict[str, Path], spec_of: Callable[..., TeacherSpec]) -> None:
    tower = load_tower(spec_of(folders["Encodec"], "codec"), device="cpu")
    coded = ask(
        TeacherEngine(tower, teacher_id="tiny"),
        ScoreRequest(("a",), ("",), None, (recording(0),), 1.0, 8, ()),
    )
    with torch.no_grad():
        samples_T = tower.model.decoder(torch.from_numpy(coded.latents_FE.T[None]).float()).flatten()[:200]
    np.testing.assert_allclose(coded.samples_T, samples_T.numpy(), atol=2e-3)


def test_noise_is_added_where_it_is_asked_for(
    folders: dict[str, Path], spec_of: Callable[..., TeacherSpec], media_request: Callable[..., ScoreRequest]
) -> None:
    engine = TeacherEngine(load_tower(spec_of(folders["Mimi"], "codec"), device="cpu"), teacher_id="tiny")
    clean, noisy, again = (engine.score(media_request((recording(0),), snr_db=snr)) for snr in (None, 0.0, 0.0))
    assert noisy == again
    assert noisy != clean
    assert exercise(engine) == ("codes", "latents", "reconstruction")
    with pytest.raises(ConfigError, match=r"no layers for the codec MimiModel, .*found 1"):
        engine.score(media_request((recording(0),), layers=(1,)))


def test_recordings_that_cannot_be_encoded_are_named(
    folders: dict[str, Path], spec_of: Callable[..., TeacherSpec], media_request: Callable[..., ScoreRequest]
) -> None:
    engine = TeacherEngine(load_tower(spec_of(folders["Dac"], "codec"), device="cpu"), teacher_id="tiny")
    with pytest.raises(RowsError) as caught:
        engine.score(media_request((recording(0), b"text")))
    assert list(caught.value.reasons) == ["row-1"]
    assert "cannot be decoded" in caught.value.reasons["row-1"]
    assert engine.score(media_request((recording(0, 1),))).codec is not None
    engine.tower.model.decoder.conv2.bias.fill_(torch.nan)
    with pytest.raises(RowsError, match="row-0: not finite"):
        engine.score(media_request((recording(0),)))


def test_another_class_is_no_codec(qwen_folder: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    with pytest.raises(TowerLoadError, match=r"Expected DacModel, EncodecModel, .*found Qwen3ForCausalLM"):
        load_tower(spec_of(qwen_folder, "codec"), device="cpu")


def test_a_codec_with_a_tensor_too_few_is_refused(
    folders: dict[str, Path], spec_of: Callable[..., TeacherSpec], tmp_path: Path
) -> None:
    for path in folders["Mimi"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    removed = next(name for name in tensors if name.startswith("decoder."))
    save_file(
        {name: t for name, t in tensors.items() if name != removed}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(TowerLoadError, match="found 1 missing"):
        load_tower(replace(spec_of(tmp_path, "codec")), device="cpu")
