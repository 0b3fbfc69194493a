"""Images and waveforms become the adapters' inputs without any teacher's processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from nexus.adapters import AudioAdapter, AudioAdapterConfig, VisionAdapterConfig, log_mel
from nexus.adapters.audio import mel_filters

RATES = [(16_000, 80, 400, 160), (16_000, 128, 400, 160), (8_000, 32, 400, 160)]


def _waveforms(sampling_rate: int, *lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    clips = []
    for index, length in enumerate(lengths):
        tone = np.sin(2 * np.pi * 220 * (index + 1) * np.arange(length) / sampling_rate)
        clips.append((0.4 * tone + 0.05 * rng.standard_normal(length)).astype(np.float32))
    return clips


@pytest.mark.parametrize(("sampling_rate", "num_mels", "window_size", "hop_size"), RATES)
def test_mel_filters_equal_those_of_transformers(
    sampling_rate: int, num_mels: int, window_size: int, hop_size: int
) -> None:
    del hop_size
    expected = mel_filter_bank(
        1 + window_size // 2, num_mels, 0.0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney"
    )
    torch.testing.assert_close(
        mel_filters(num_mels, window_size, sampling_rate), torch.from_numpy(expected.T).float(), rtol=0, atol=1e-7
    )


def test_log_mel_equals_whispers_feature_extractor() -> None:
    extractor = WhisperFeatureExtractor(
        feature_size=80, sampling_rate=16_000, hop_length=160, n_fft=400, chunk_length=1
    )
    clips = _waveforms(16_000, 16_000, 9_000, 3_210)
    expected = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    features, mask = log_mel(
        [torch.from_numpy(clip) for clip in clips],
        num_samples=16_000,
        sampling_rate=16_000,
        num_mels=80,
        window_size=400,
        hop_size=160,
    )
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)
    assert mask.shape == (3, 100)
    assert mask.sum(1).tolist() == [100, 57, 21]  # ceil(9000 / 160), ceil(3210 / 160)


def test_a_clips_features_do_not_depend_on_the_other_clips() -> None:
    config = AudioAdapterConfig(width=16, num_heads=2, num_mels=32, sampling_rate=8_000, num_samples=8_000)
    clips = [torch.from_numpy(clip) for clip in _waveforms(8_000, 8_000, 4_000)]
    together, mask = config.log_mel(clips)
    alone, own_mask = config.log_mel(clips[1:])
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-6)
    assert torch.equal(mask[1], own_mask[0])
    assert together.shape == (2, 32, 50)


def test_the_frames_of_a_clip_fit_the_adapter() -> None:
    config = AudioAdapterConfig(
        context_width=24, width=16, num_heads=2, num_layers=1, num_mels=32, sampling_rate=8_000, num_samples=8_000
    )
    features, mask = config.log_mel([torch.from_numpy(clip) for clip in _waveforms(8_000, 8_000, 4_000)])
    context_BCD, mask_BC = AudioAdapter(config)(features, mask)
    assert context_BCD.shape == (2, 25, 24)
    assert mask_BC.sum(1).tolist() == [25, 13]


@pytest.mark.parametrize(
    "clip", [torch.zeros(8_001), torch.zeros(2, 100), torch.tensor([0.0, float("nan")]), torch.tensor([float("inf")])]
)
def test_a_waveform_that_cannot_be_heard_whole_is_refused(clip: torch.Tensor) -> None:
    config = AudioAdapterConfig(num_samples=8_000)
    with pytest.raises(ValueError, match="finite mono waveform of at most 8000 samples"):
        config.log_mel([torch.zeros(10), clip])


def test_pixels_are_scaled_to_plus_minus_one_and_keep_their_place() -> None:
    config = VisionAdapterConfig(image_size=4, patch_size=2, num_channels=1)
    image = np.zeros((4, 4), dtype=np.uint8)
    image[1, 2] = 255
    pixels = config.pixel_values([image, 255 - image])
    assert pixels.shape == (2, 1, 4, 4)
    assert pixels[0, 0, 1, 2] == 1.0
    assert (pixels[0].flatten() == -1.0).sum() == 15
    assert torch.equal(pixels[1], -pixels[0])


def test_grey_fills_the_channels_and_colours_are_averaged_to_one() -> None:
    grey = np.full((2, 2), 51, dtype=np.uint8)
    colour = np.stack([grey, grey, np.full((2, 2), 255, dtype=np.uint8)], axis=-1)
    three = VisionAdapterConfig(image_size=2, patch_size=1, num_channels=3)
    one = VisionAdapterConfig(image_size=2, patch_size=1, num_channels=1)
    torch.testing.assert_close(three.pixel_values([grey]), torch.full((1, 3, 2, 2), 51 / 127.5 - 1))
    torch.testing.assert_close(three.pixel_values([colour])[0, 2], torch.ones(2, 2))
    torch.testing.assert_close(one.pixel_values([colour]), torch.full((1, 1, 2, 2), (51 + 51 + 255) / 3 / 127.5 - 1))


def test_images_of_another_size_are_resized() -> None:
    config = VisionAdapterConfig(image_size=4, patch_size=2, num_channels=1)
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:, 4:] = 255
    pixels = config.pixel_values([half])[0, 0]
    assert pixels.shape == (4, 4)
    torch.testing.assert_close(pixels[:, [0, 3]], torch.tensor([[-1.0, 1.0]] * 4))


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), dtype=np.float32), np.zeros((4, 4, 2), dtype=np.uint8), np.zeros((1, 4, 4, 1), dtype=np.uint8)],
)
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="Expected a uint8 image"):
        VisionAdapterConfig(image_size=4, patch_size=2, num_channels=3).pixel_values([image])
