"""Encoder teachers against the plain use of the same transformers classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    VideoMAEConfig,
    VideoMAEModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperFeatureExtractor,
)

from nexus.data.media import add_noise, decode_audio, decode_image
from nexus.errors import ConfigError, TowerLoadError
from nexus.profiling.layers import find_blocks
from nexus.towers.encoder import MAX_ROWS, encode, encoder_of, label_texts, prepare_inputs
from nexus.towers.loader import LoadedTower
from nexus.towers.rows import RowsError

IMAGES = ["siglip_classifier", "siglip"]
RECORDINGS = ["whisper_classifier", "whisper"]
# One forward of several rows against one of a single row, in float32.
ROUNDING = 2e-5


@pytest.fixture(params=[*IMAGES, *RECORDINGS])
def tower(request: pytest.FixtureRequest) -> LoadedTower:
    return request.getfixturevalue(request.param)


@pytest.fixture
def media(request: pytest.FixtureRequest, tower: LoadedTower) -> list[bytes]:
    make = request.getfixturevalue("wav" if hasattr(tower.processor, "sampling_rate") else "png")
    return [make(seed) for seed in range(4)]


def ids(count: int) -> list[str]:
    return [f"row-{i}" for i in range(count)]


def run(
    tower: LoadedTower, media: list[bytes], *, layers: Any = (), temperature: float = 1.0, snr_db: Any = None
) -> Any:
    inputs = prepare_inputs(tower.model, tower.processor, ids(len(media)), media, snr_db)
    return encode(tower.model, inputs, row_ids=ids(len(media)), layers=layers, temperature=temperature)


def plain(tower: LoadedTower, data: bytes) -> tuple[Any, list[torch.Tensor]]:
    """Output and block outputs of one row, by the classes' own processor and forward."""
    if hasattr(tower.processor, "sampling_rate"):
        rate = tower.processor.sampling_rate
        inputs = tower.processor(decode_audio(data, rate), sampling_rate=rate, return_tensors="pt")
    else:
        inputs = tower.processor(images=decode_image(data), return_tensors="pt")
    encoder = encoder_of(tower.model)
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o))
        for block in find_blocks(encoder).blocks
    ]
    with torch.no_grad():
        output = encoder(**inputs)
    for handle in handles:
        handle.remove()
    return output, seen


def test_batches_equal_the_plain_use_of_each_row(tower: LoadedTower, media: list[bytes]) -> None:
    encoded = run(tower, media, layers=(0, 2))
    for row, data in enumerate(media):
        output, states = plain(tower, data)
        for layer in (0, 2):
            np.testing.assert_allclose(encoded.hidden[layer][row], states[layer][0].numpy(), rtol=2**-10, atol=1e-3)
        if hasattr(output, "logits"):
            expected = torch.log_softmax(output.logits.double(), dim=-1)[0].numpy()
            np.testing.assert_allclose(encoded.label_logprobs_BC[row], expected, atol=ROUNDING)


def test_shapes_and_types_are_those_of_the_contract(tower: LoadedTower, media: list[bytes]) -> None:
    encoded = run(tower, media, layers=(1,))
    positions = 16 if not hasattr(tower.processor, "sampling_rate") else 50
    assert (encoded.pooled_BE.dtype, encoded.pooled_BE.shape) == (np.float32, (4, 64))
    assert (encoded.hidden[1].dtype, encoded.hidden[1].shape) == (np.float16, (4, positions, 64))
    labels = label_texts(encoder_of(tower.model))
    if labels is None:
        assert encoded.label_logprobs_BC is None
    else:
        assert (encoded.label_logprobs_BC.dtype, encoded.label_logprobs_BC.shape) == (np.float32, (4, len(labels)))
        np.testing.assert_allclose(np.exp(encoded.label_logprobs_BC).sum(axis=1), 1, atol=1e-6)


def test_rows_differ(tower: LoadedTower, media: list[bytes]) -> None:
    pooled_BE = run(tower, media).pooled_BE
    assert all(np.abs(pooled_BE[i] - pooled_BE[j]).max() > 1e-3 for i in range(4) for j in range(i))


def test_more_rows_than_one_forward_takes_change_nothing(
    siglip_classifier: LoadedTower, png: Callable[[int], bytes]
) -> None:
    media = [png(seed) for seed in range(MAX_ROWS + 3)]
    whole = run(siglip_classifier, media, layers=(1,))
    for row in (0, MAX_ROWS - 1, MAX_ROWS, MAX_ROWS + 2):
        alone = run(siglip_classifier, [media[row]], layers=(1,))
        np.testing.assert_allclose(whole.label_logprobs_BC[row], alone.label_logprobs_BC[0], atol=ROUNDING)
        np.testing.assert_allclose(whole.hidden[1][row], alone.hidden[1][0], rtol=2**-9, atol=2e-3)


def test_labels_are_the_checkpoints_in_the_order_of_its_classes(
    siglip_classifier: LoadedTower, whisper_classifier: LoadedTower, siglip: LoadedTower, whisper: LoadedTower
) -> None:
    assert label_texts(siglip_classifier.model) == ("zero", "one", "two", "three", "four")
    assert label_texts(whisper_classifier.model) == ("a", "b", "c", "d")
    assert label_texts(siglip.model) is label_texts(whisper.model) is None


def test_temperature_flattens_the_labels_as_it_should(
    siglip_classifier: LoadedTower, png: Callable[[int], bytes]
) -> None:
    cold = run(siglip_classifier, [png(0)]).label_logprobs_BC.astype(np.float64)
    warm = run(siglip_classifier, [png(0)], temperature=2.0).label_logprobs_BC
    np.testing.assert_allclose(warm, cold / 2 - np.log(np.exp(cold / 2).sum()), atol=ROUNDING)


def test_pooled_embedding_of_a_classifier_is_what_its_head_sees(
    siglip_classifier: LoadedTower,
    whisper_classifier: LoadedTower,
    png: Callable[[int], bytes],
    wav: Callable[[int], bytes],
) -> None:
    for tower, data in ((siglip_classifier, png(0)), (whisper_classifier, wav(0))):
        encoded = run(tower, [data])
        with torch.no_grad():
            logits = tower.model.classifier(torch.from_numpy(encoded.pooled_BE))
        np.testing.assert_allclose(torch.log_softmax(logits, dim=-1), encoded.label_logprobs_BC, atol=ROUNDING)


def test_pooled_embedding_without_a_head_is_the_encoders_own_or_the_mean(
    siglip: LoadedTower, whisper: LoadedTower, png: Callable[[int], bytes], wav: Callable[[int], bytes]
) -> None:
    np.testing.assert_allclose(run(siglip, [png(0)]).pooled_BE, plain(siglip, png(0))[0].pooler_output, atol=ROUNDING)
    mean = plain(whisper, wav(0))[0].last_hidden_state.mean(dim=1)
    np.testing.assert_allclose(run(whisper, [wav(0)]).pooled_BE, mean, atol=ROUNDING)


def test_a_speech_recogniser_is_heard_through_its_encoder(whisper: LoadedTower) -> None:
    assert encoder_of(whisper.model) is whisper.model.model.encoder


def test_noise_is_that_of_the_row_and_changes_only_recordings(
    whisper_classifier: LoadedTower, siglip: LoadedTower, png: Callable[[int], bytes], wav: Callable[[int], bytes]
) -> None:
    extractor: WhisperFeatureExtractor = whisper_classifier.processor
    inputs = prepare_inputs(whisper_classifier.model, extractor, ["a", "b"], [wav(0), wav(0)], 10.0)["input_features"]
    noisy = add_noise(decode_audio(wav(0), extractor.sampling_rate), "b", 10.0)
    expected = extractor(noisy, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
    assert torch.equal(inputs[1:], expected)
    assert not torch.equal(inputs[0], inputs[1])
    clean = prepare_inputs(siglip.model, siglip.processor, ["a"], [png(0)], None)["pixel_values"]
    assert torch.equal(prepare_inputs(siglip.model, siglip.processor, ["a"], [png(0)], 10.0)["pixel_values"], clean)


def test_media_that_cannot_be_decoded_are_named_with_the_reason(tower: LoadedTower, media: list[bytes]) -> None:
    damaged = [media[0], b"nothing of the kind", media[1], b""]
    with pytest.raises(RowsError, match="can be decoded in every row") as caught:
        run(tower, damaged)
    assert list(caught.value.reasons) == ["row-1", "row-3"]
    assert "found 19 bytes that cannot be decoded" in caught.value.reasons["row-1"]


def test_rows_that_are_no_clips_are_named_by_an_encoder_of_video() -> None:
    config = VideoMAEConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, num_frames=2
    )
    with pytest.raises(RowsError, match="Found 1 bad rows: a: expected a clip"):
        prepare_inputs(VideoMAEModel(config), None, ["a"], [b""], None)


def test_not_finite_rows_are_named(tower: LoadedTower, media: list[bytes]) -> None:
    inputs = prepare_inputs(tower.model, tower.processor, ids(4), media, None)
    for tensor in inputs.values():
        tensor[2] = torch.nan
    with pytest.raises(RowsError, match="Found 1 bad rows: row-2: not finite"):
        encode(tower.model, inputs, row_ids=ids(4), layers=(0,), temperature=1.0)


def test_an_encoder_without_hidden_states_is_told_in_one_line() -> None:
    sizes = {"conv_dim": (32,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1}
    config = Wav2Vec2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8, **sizes
    )
    model = Wav2Vec2ForCTC(config).eval()
    with pytest.raises(
        TowerLoadError, match=r"gives its last hidden states .*, found CausalLMOutput alone\. Name the class"
    ):
        encode(model, {"input_values": torch.zeros(1, 400)}, row_ids=["a"], layers=(), temperature=1.0)


def test_unknown_layer_is_refused(siglip: LoadedTower, png: Callable[[int], bytes]) -> None:
    with pytest.raises(ConfigError, match="SiglipVisionModel between 0 and 2, found -1"):
        run(siglip, [png(0)], layers=(-1,))


def test_hooks_are_gone_after_a_call(tower: LoadedTower, media: list[bytes]) -> None:
    run(tower, media, layers=(0,))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tower.model.modules())
