"""The adapter of images: patches to context tokens, by an own small encoder or a wrapped pretrained one.

Letters: B batch, h and w pixels, M patches (row by row), W inner width, D the trunk's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.adapters.base import Adapter, AdapterConfig, EncoderBlock, Features, check_encoder, full_mask, masked_mean
from nexus.errors import ConfigError


@dataclass(frozen=True)
class VisionAdapterConfig(AdapterConfig):
    """The image that the own encoder takes; with `encoder_width`, that of the wrapped encoder's output."""

    image_size: int = 224
    """Height and width in pixels."""
    patch_size: int = 16
    num_channels: int = 3
    encoder_width: int | None = None
    """Width of a wrapped encoder's `last_hidden_state`; None builds the own encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"Expected image_size to be a multiple of patch_size, found {self.image_size} and {self.patch_size}. Change one."
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """M of the own encoder."""
        return self.num_patches

    def pixel_values(self, images: Sequence[np.ndarray]) -> Tensor:
        """float32 [B, channels, image_size, image_size] in [-1, 1] of uint8 images [h, w] or [h, w, channels].

        Images of another size are resized (bilinear, antialiased). Grey images fill all channels, and colours are averaged for
        an adapter of one channel.

        Raises:
            ValueError: if an image is not uint8 or its channels are none of these.
        """
        return torch.stack([self._pixel_values(torch.from_numpy(np.array(image))) for image in images])

    def _pixel_values(self, image: Tensor) -> Tensor:
        channels = 1 if image.ndim == 2 else image.shape[-1]
        known = channels in (1, self.num_channels) or (channels, self.num_channels) == (3, 1)
        if image.dtype != torch.uint8 or image.ndim not in (2, 3) or not known:
            raise ValueError(
                f"Expected a uint8 image [h, w] or [h, w, {max(self.num_channels, 3)}], found {image.dtype} of shape "
                f"{tuple(image.shape)}. Convert it."
            )
        planes = image.reshape(*image.shape[:2], channels).permute(2, 0, 1)[None].float()
        if channels > self.num_channels:
            planes = planes.mean(dim=1, keepdim=True)
        if planes.shape[2:] != (self.image_size, self.image_size):
            planes = F.interpolate(planes, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        return planes[0].expand(self.num_channels, -1, -1) / 127.5 - 1.0


class VisionAdapter(Adapter[VisionAdapterConfig]):
    """Reads pixel_values [B, channels, h, w] (frames and all, if the wrapped encoder takes them); `mask` [B, M] marks real patches.

    Args:
        encoder: a module called as `encoder(pixel_values=...)` whose `last_hidden_state` [B, M, encoder_width] holds the patches
            (SigLIP, CLIP, VideoMAE). Whether it is trained is the caller's choice.
    """

    def __init__(self, config: VisionAdapterConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config)
        check_encoder(encoder, config.encoder_width)
        self.encoder = encoder
        if config.encoder_width is not None:
            self.project = nn.Linear(config.encoder_width, config.width)
            return
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.width)
        # Small beside a patch embedding, about 0.5 for unit pixels: at equal scale the content was measured to be found later.
        self.positions_MW = nn.Parameter(0.1 * torch.randn(config.num_patches, config.width))
        self.blocks = nn.ModuleList(EncoderBlock(config.width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)

    def features(self, inputs: Tensor, mask: Tensor | None = None) -> Features:
        """Patch features in reading order."""
        if self.encoder is not None:
            tokens_BMW = self.project(self.encoder(pixel_values=inputs).last_hidden_state)
            mask_BM = full_mask(mask, (tokens_BMW.shape[0], tokens_BMW.shape[1]), inputs.device)
            return Features(tokens_BMW, mask_BM, masked_mean(tokens_BMW, mask_BM))
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if tuple(inputs.shape[1:]) != expected:
            raise ValueError(
                f"Expected pixel_values of shape (B, {', '.join(map(str, expected))}), found {tuple(inputs.shape)}. Resize."
            )
        mask_BM = full_mask(mask, (inputs.shape[0], config.num_patches), inputs.device)
        patches = F.unfold(inputs, config.patch_size, stride=config.patch_size).transpose(1, 2)
        # What stands in a masked patch is never read, not even inf or nan.
        tokens_BMW = self.patch_embedding(patches.masked_fill(~mask_BM[..., None], 0.0)) + self.positions_MW
        blocks = []
        for block in self.blocks:
            tokens_BMW = block(tokens_BMW, mask_BM)
            blocks.append(tokens_BMW)
        tokens_BMW = self.norm(tokens_BMW)
        return Features(tokens_BMW, mask_BM, masked_mean(tokens_BMW, mask_BM), tuple(blocks))
