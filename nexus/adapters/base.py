"""What all adapters share: features, context tokens, alignments with teachers, and the small encoder they are built from.

An adapter works in two steps. `features` encodes its input; the trainer aligns these with teachers through `predict`. The call
`adapter(inputs, mask)` goes on to the context tokens that the trunk's ports read. A pass that needs both computes the features
once and hands them to `context`.

Letters: B batch, M feature tokens (text tokens, patches, frames), C context tokens, W the adapter's inner width, D the trunk's
width, H a teacher's width.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.errors import ConfigError

POOLED = "pooled"
"""The feature name of a teacher's one embedding per sample; an integer names a layer's per-token states."""

ConfigT = TypeVar("ConfigT", bound="AdapterConfig")


@dataclass(frozen=True)
class Alignment:
    """One affine map from the adapter's features to a teacher's space."""

    teacher: str
    feature: int | str
    """A layer index for per-token states [B, M, H], or "pooled" for one embedding [B, H]."""
    width: int
    """H, the teacher's width."""
    depth: float = 1.0
    """Relative depth of the layer in the teacher, in (0, 1]. The map reads the adapter's block of that depth: on the sample images,
    aligning depth with depth was measured to reach 86 % accuracy where maps from the last block reached 14 %."""

    def __post_init__(self) -> None:
        if not 0.0 < self.depth <= 1.0:
            raise ConfigError(
                f"Expected the depth of teacher {self.teacher!r}'s feature in (0, 1], found {self.depth}. Correct it."
            )
        if isinstance(self.feature, str) and self.feature != POOLED:
            raise ConfigError(
                f"Expected a layer index or {POOLED!r} as the feature to align, found {self.feature!r}. Name one."
            )
        if self.width <= 0:
            raise ConfigError(
                f"Expected the width of teacher {self.teacher!r} above 0, found {self.width}. Correct it."
            )


@dataclass(frozen=True)
class AdapterConfig:
    """What every adapter's configuration holds; subclasses add what their input needs."""

    context_width: int = 4096
    """D, the trunk's width."""
    width: int = 1024
    """W, the adapter's inner width."""
    num_layers: int = 4
    """Encoder blocks; each mixes all tokens of a sample."""
    num_heads: int = 16
    num_context_tokens: int | None = None
    """C learned queries read the features; None passes every feature token on."""
    alignments: tuple[Alignment, ...] = ()
    """The teachers' spaces that `predict` can reach. Training only."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ConfigError(
                f"Expected the adapter's width to be a multiple of its heads, found {self.width} and {self.num_heads}. Change one."
            )
        keys = [(alignment.teacher, alignment.feature) for alignment in self.alignments]
        doubles = sorted({str(key) for key in keys if keys.count(key) > 1})
        if doubles:
            raise ConfigError(f"Expected each teacher's feature aligned once, found {doubles[0]} twice. Remove one.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back to an equal configuration."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Raises ConfigError naming an unknown key."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ConfigError(
                f"Expected keys of {cls.__name__} ({', '.join(sorted(known))}), found {unknown[0]!r}. Remove it."
            )
        alignments = tuple(Alignment(**alignment) for alignment in values.get("alignments", ()))
        return cls(**{**values, "alignments": alignments})


@dataclass(frozen=True)
class Features:
    """An encoded input. Masked tokens are finite and mean nothing."""

    tokens_BMW: Tensor
    mask_BM: Tensor
    """bool, True at real tokens."""
    pooled_BW: Tensor
    """Mean of the real tokens; 0 where there are none."""
    blocks: tuple[Tensor, ...] = ()
    """Output [B, M, W] of each encoder block, for maps to a teacher's inner layers; empty for a wrapped encoder."""

    def at_least_float32(self) -> Features:
        """The same, as losses need it after a pass in half precision."""
        return Features(
            _at_least_float32(self.tokens_BMW),
            self.mask_BM,
            _at_least_float32(self.pooled_BW),
            tuple(_at_least_float32(block) for block in self.blocks),
        )

    def at_depth(self, depth: float) -> Tensor:
        """Tokens [B, M, W] of the block at a relative depth in (0, 1], before the last norm; the final ones for a wrapped encoder."""
        if not self.blocks:
            return self.tokens_BMW
        return self.blocks[max(1, round(depth * len(self.blocks))) - 1]


class Adapter(nn.Module, ABC, Generic[ConfigT]):
    """Turns one kind of input into context tokens for the trunk's ports."""

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config
        self.alignments = nn.ModuleList(nn.Linear(config.width, alignment.width) for alignment in config.alignments)
        self.pool = (
            QueryPool(config.width, config.num_heads, config.num_context_tokens) if config.num_context_tokens else None
        )
        self.to_context = nn.Linear(config.width, config.context_width)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """context_BCD and its bool mask [B, C]; a sample without any real input has no real context token."""
        return self.context(self.features(inputs, mask))

    @abstractmethod
    def features(self, inputs: Tensor, mask: Tensor | None = None) -> Features:
        """The encoded input; what `inputs` and `mask` are, each adapter says."""

    def context(self, features: Features, mask_BM: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Context tokens of `features`; `mask_BM` narrows the tokens that may be read."""
        mask_BM = features.mask_BM if mask_BM is None else mask_BM & features.mask_BM
        if self.pool is None:
            return self.to_context(features.tokens_BMW), mask_BM
        pooled_BCW = self.pool(features.tokens_BMW, mask_BM)
        return self.to_context(pooled_BCW), mask_BM.any(dim=-1, keepdim=True).expand(pooled_BCW.shape[:2])

    def predict(self, teacher: str, feature: int | str, features: Features) -> Tensor:
        """The teacher's feature as this adapter sees it: [B, M, H] for a layer, read at its depth, or [B, H] for "pooled".

        Raises:
            KeyError: if the configuration declares no such alignment, or it was dropped for export.
        """
        declared = [(alignment.teacher, alignment.feature) for alignment in self.config.alignments]
        if (teacher, feature) not in declared:
            raise KeyError(
                f"Expected one of the declared alignments {declared}, found {(teacher, feature)}. Declare it."
            )
        index = declared.index((teacher, feature))
        depth = self.config.alignments[index].depth
        states = features.pooled_BW if feature == POOLED else features.at_depth(depth)
        predicted: Tensor = self.alignments[index](states)
        return predicted

    def drop_alignments(self) -> None:
        """Remove what only training needs; the context tokens stay as they are."""
        self.alignments = nn.ModuleList()
        self.config = dataclasses.replace(self.config, alignments=())


class QueryPool(nn.Module):
    """C learned queries attend to the tokens of a sample (Perceiver resampler without its stack; Jaegle et al. 2021)."""

    def __init__(self, width: int, num_heads: int, num_queries: int) -> None:
        super().__init__()
        # Unit scale: the queries are normalised like the tokens, and equal queries would stay equal for ever.
        self.queries_CW = nn.Parameter(torch.randn(num_queries, width))
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)

    def forward(self, tokens_BMW: Tensor, mask_BM: Tensor) -> Tensor:
        queries_BCW = self.queries_CW.expand(tokens_BMW.shape[0], -1, -1)
        read_BCW: Tensor = self.attention(queries_BCW, self.norm(tokens_BMW), mask_BM)
        return read_BCW


class EncoderBlock(nn.Module):
    """Pre-normalised attention over all real tokens, then a GELU feed-forward of twice the width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )

    def forward(self, tokens_BMW: Tensor, mask_BM: Tensor) -> Tensor:
        normed_BMW = self.attention_norm(tokens_BMW)
        tokens_BMW = tokens_BMW + self.attention(normed_BMW, normed_BMW, mask_BM)
        out_BMW: Tensor = tokens_BMW + self.mlp(tokens_BMW)
        return out_BMW


class Attention(nn.Module):
    """Multi-head attention in which masked keys weigh exactly nothing."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries_BQW: Tensor, tokens_BMW: Tensor, mask_BM: Tensor) -> Tensor:
        key, value = self.key_value(tokens_BMW).chunk(2, dim=-1)
        # A softmax over nothing is nan: rows without a real token attend everywhere, and their result is masked by the caller.
        mask_BM = mask_BM | ~mask_BM.any(dim=-1, keepdim=True)
        attended = F.scaled_dot_product_attention(
            self._heads(self.query(queries_BQW)),
            self._heads(key),
            self._heads(value),
            attn_mask=mask_BM[:, None, None, :],
        )
        out_BQW: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out_BQW

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(*flat.shape[:-1], self._num_heads, -1).transpose(1, 2)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def masked_mean(tokens_BMW: Tensor, mask_BM: Tensor) -> Tensor:
    """Mean over the real tokens of each sample; 0 where there are none."""
    kept_BMW = tokens_BMW.masked_fill(~mask_BM[..., None], 0.0)
    return kept_BMW.sum(dim=1) / mask_BM.sum(dim=1, keepdim=True).clamp(min=1)


def full_mask(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """`mask` as bool, or all True. Raises ValueError if its shape is not `shape`."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"Expected a mask of shape {shape}, found {tuple(mask.shape)}. Give one value per input token."
        )
    return mask.to(device=device, dtype=torch.bool)


def check_encoder(encoder: nn.Module | None, encoder_width: int | None) -> None:
    """A wrapped encoder and its declared width come together or not at all."""
    if (encoder is None) != (encoder_width is None):
        raise ConfigError(
            f"Expected a wrapped encoder together with encoder_width, found encoder={type(encoder).__name__} and "
            f"encoder_width={encoder_width}. Give both, or neither for the adapter's own encoder."
        )


def sinusoids(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[length, width]: sines of positions, then cosines (Vaswani et al. 2017, section 3.5, with wavelengths up to 10,000)."""
    rates = 10_000.0 ** -(torch.arange(width // 2, device=device, dtype=dtype) / (width // 2))
    angles = torch.arange(length, device=device, dtype=dtype)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
