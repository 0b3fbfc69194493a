"""The adapter of sound: log-mel frames to context tokens, by an own small encoder or a wrapped Whisper encoder.

`log_mel` computes the input from waveforms, so that the student alone needs no teacher's feature extractor. It follows Whisper
(Radford et al. 2022, section 2.2): Hann window, power spectrum, Slaney mel filters, log10, floor 8 below the clip's maximum,
scaled by (x + 4) / 4.

Letters: B batch, S samples, R mel bands, T input frames, M frames after the stem (half as many), W inner width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.adapters.base import (
    Adapter,
    AdapterConfig,
    EncoderBlock,
    Features,
    check_encoder,
    full_mask,
    masked_mean,
    sinusoids,
)

_POWER_FLOOR = 1e-10
"""Silence; log10 of zero is not a number one can train on. Whisper's value."""
_DYNAMIC_RANGE = 8.0
"""Whisper clips what is more than 80 dB below the clip's loudest band."""
_SLANEY_BREAK_HZ = 1000.0
_SLANEY_HZ_PER_MEL = 200.0 / 3
_SLANEY_LOG_STEP = math.log(6.4) / 27
"""Slaney's scale is linear up to 1 kHz and then takes 27 mels from there to 6.4 kHz (Auditory Toolbox, 1998)."""


@dataclass(frozen=True)
class AudioAdapterConfig(AdapterConfig):
    """How clips become log-mel features, and with `encoder_width` the width of a wrapped encoder's output."""

    num_mels: int = 80
    sampling_rate: int = 16_000
    window_size: int = 400
    """Samples; 25 ms at 16 kHz."""
    hop_size: int = 160
    """Samples from one frame to the next; 10 ms at 16 kHz."""
    num_samples: int = 480_000
    """Samples that every clip is padded to; 30 s at 16 kHz."""
    encoder_width: int | None = None
    """Width of a wrapped encoder's `last_hidden_state`; None builds the own encoder."""

    @property
    def num_tokens(self) -> int:
        """M of the own encoder: two frames become one."""
        return (self.num_samples // self.hop_size + 1) // 2

    def log_mel(self, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Input features and frame mask of mono clips at `sampling_rate`; see the function of this name."""
        return log_mel(
            waveforms,
            num_samples=self.num_samples,
            sampling_rate=self.sampling_rate,
            num_mels=self.num_mels,
            window_size=self.window_size,
            hop_size=self.hop_size,
        )


class AudioAdapter(Adapter[AudioAdapterConfig]):
    """Reads input_features [B, R, T] (log-mel); `mask` [B, T] marks real frames. Two frames become one.

    Args:
        encoder: a module called as `encoder(input_features=...)` whose `last_hidden_state` is [B, M, encoder_width] (Whisper).
            Whether it is trained is the caller's choice.
    """

    def __init__(self, config: AudioAdapterConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config)
        check_encoder(encoder, config.encoder_width)
        self.encoder = encoder
        if config.encoder_width is not None:
            self.project = nn.Linear(config.encoder_width, config.width)
            return
        self.stem = nn.Conv1d(config.num_mels, config.width, kernel_size=3, padding=1)
        self.halve = nn.Conv1d(config.width, config.width, kernel_size=3, stride=2, padding=1)
        self.blocks = nn.ModuleList(EncoderBlock(config.width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)

    def features(self, inputs: Tensor, mask: Tensor | None = None) -> Features:
        """Frame features in time order; frame m covers input frames 2m and 2m + 1 and is real if frame 2m is."""
        if inputs.ndim != 3 or inputs.shape[1] != self.config.num_mels:
            raise ValueError(
                f"Expected input_features of shape (B, {self.config.num_mels}, frames), found {tuple(inputs.shape)}. "
                "Compute them with log_mel and the adapter's num_mels."
            )
        mask_BT = full_mask(mask, (inputs.shape[0], inputs.shape[2]), inputs.device)
        mask_BM = mask_BT[:, ::2]
        if self.encoder is not None:
            tokens_BMW = self.project(self.encoder(input_features=inputs).last_hidden_state)
            return Features(tokens_BMW, mask_BM, masked_mean(tokens_BMW, mask_BM))
        # Silence beyond the end must look to the convolutions like the edge of the clip, whatever the batch was padded to.
        frames_BWT = F.gelu(self.stem(inputs.masked_fill(~mask_BT[:, None], 0.0)), approximate="tanh")
        frames_BWM = F.gelu(self.halve(frames_BWT.masked_fill(~mask_BT[:, None], 0.0)), approximate="tanh")
        tokens_BMW = frames_BWM.transpose(1, 2)
        tokens_BMW = tokens_BMW + sinusoids(tokens_BMW.shape[1], self.config.width, inputs.device, tokens_BMW.dtype)
        blocks = []
        for block in self.blocks:
            tokens_BMW = block(tokens_BMW, mask_BM)
            blocks.append(tokens_BMW)
        tokens_BMW = self.norm(tokens_BMW)
        return Features(tokens_BMW, mask_BM, masked_mean(tokens_BMW, mask_BM), tuple(blocks))


def log_mel(
    waveforms: Sequence[Tensor],
    *,
    num_samples: int,
    sampling_rate: int,
    num_mels: int,
    window_size: int,
    hop_size: int,
) -> tuple[Tensor, Tensor]:
    """Whisper's log-mel features of mono clips, each padded with silence to `num_samples`.

    Args:
        waveforms: float tensors [S], values in [-1, 1], at `sampling_rate`. The mel bands cover 0 Hz to its half.
        num_samples: length of every clip after padding. It is fixed, not the longest of the batch: Whisper mirrors the edges
            of what it is given, so features would otherwise depend on the neighbours.
        window_size, hop_size: in samples.

    Returns:
        float32 [B, num_mels, num_samples // hop_size] and a bool mask [B, frames], True where a frame begins inside the clip.

    Raises:
        ValueError: if a clip is longer than `num_samples`, not one-dimensional, or not finite.
    """
    padded_BS = torch.zeros(len(waveforms), num_samples)
    num_frames = num_samples // hop_size
    mask_BT = torch.zeros(len(waveforms), num_frames, dtype=torch.bool)
    for row, waveform in enumerate(waveforms):
        if waveform.ndim != 1 or waveform.shape[0] > num_samples or not torch.isfinite(waveform).all():
            raise ValueError(
                f"Expected a finite mono waveform of at most {num_samples} samples, found shape {tuple(waveform.shape)} at "
                f"position {row}. Mix down, cut, or raise num_samples."
            )
        padded_BS[row, : waveform.shape[0]] = waveform
        mask_BT[row, : math.ceil(waveform.shape[0] / hop_size)] = True
    spectrum = torch.stft(padded_BS, window_size, hop_size, window=torch.hann_window(window_size), return_complex=True)
    power_BFT = spectrum[..., :num_frames].abs() ** 2
    filters_RF = mel_filters(num_mels, window_size, sampling_rate)
    log_BRT = (filters_RF @ power_BFT).clamp(min=_POWER_FLOOR).log10()
    log_BRT = log_BRT.maximum(log_BRT.amax(dim=(1, 2), keepdim=True) - _DYNAMIC_RANGE)
    return (log_BRT + 4.0) / 4.0, mask_BT


def mel_filters(num_mels: int, window_size: int, sampling_rate: int) -> Tensor:
    """float32 [num_mels, window_size // 2 + 1]: triangles evenly spaced on Slaney's mel scale, each of area 2 / bandwidth."""
    bins_F = torch.linspace(0.0, sampling_rate / 2, window_size // 2 + 1, dtype=torch.float64)
    top_mel = _SLANEY_BREAK_HZ / _SLANEY_HZ_PER_MEL + math.log(sampling_rate / 2 / _SLANEY_BREAK_HZ) / _SLANEY_LOG_STEP
    mels = torch.linspace(0.0, top_mel, num_mels + 2, dtype=torch.float64)
    break_mel = _SLANEY_BREAK_HZ / _SLANEY_HZ_PER_MEL
    edges = torch.where(
        mels < break_mel, mels * _SLANEY_HZ_PER_MEL, _SLANEY_BREAK_HZ * torch.exp((mels - break_mel) * _SLANEY_LOG_STEP)
    )
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins_F - low) / (centre - low), (high - bins_F) / (high - centre)
    return (torch.minimum(rising, falling).clamp(min=0.0) * (2.0 / (high - low))).float()
