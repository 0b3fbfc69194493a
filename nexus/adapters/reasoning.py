"""The adapter of thought: from the trunk's own lower states to what a reasoning teacher would be thinking, and from there to context.

In training each token's thought is anchored, through one affine map per teacher and layer, to the teacher's critical-layer
state; at inference the same thoughts stand in for the teacher's. The context is read from the thoughts, so whatever the anchor
teaches them reaches the ports.

Letters: B batch, T text tokens, W inner width, D the trunk's width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nexus.adapters.base import Adapter, AdapterConfig, Features, full_mask, masked_mean
from nexus.errors import ConfigError


@dataclass(frozen=True)
class ReasoningAdapterConfig(AdapterConfig):
    """`num_layers` counts the feed-forward blocks that turn a trunk state into a thought."""

    num_layers: int = 2
    num_context_tokens: int | None = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_context_tokens:
            # One context token per text token would let later positions be read by earlier ones through the ports.
            raise ConfigError(
                f"Expected num_context_tokens above 0 in a reasoning adapter, found {self.num_context_tokens}. Thoughts are "
                "pooled into a fixed number of tokens; set it."
            )


class ReasoningAdapter(Adapter[ReasoningAdapterConfig]):
    """Predicts reasoning teachers' states from lower trunk states [B, T, D]; `mask` [B, T] says which tokens may be read.

    The trunk is causal but a context is seen by every position, so a mask that includes the answer would show the answer to its
    own first token. Pass the prompt's mask.
    """

    def __init__(self, config: ReasoningAdapterConfig) -> None:
        super().__init__(config)
        self.input = nn.Sequential(nn.LayerNorm(config.context_width), nn.Linear(config.context_width, config.width))
        self.thought = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(config.width),
                nn.Linear(config.width, 2 * config.width),
                nn.GELU(approximate="tanh"),
                nn.Linear(2 * config.width, config.width),
            )
            for _ in range(config.num_layers)
        )

    def features(self, inputs: Tensor, mask: Tensor | None = None) -> Features:
        """Thoughts: one per text token, each from its own state alone, so a later token changes no earlier thought."""
        mask_BT = full_mask(mask, (inputs.shape[0], inputs.shape[1]), inputs.device)
        # What stands at a masked token is never read, not even inf or nan.
        thoughts_BTW = self.input(inputs.masked_fill(~mask_BT[..., None], 0.0))
        blocks = []
        for block in self.thought:
            thoughts_BTW = thoughts_BTW + block(thoughts_BTW)
            blocks.append(thoughts_BTW)
        return Features(thoughts_BTW, mask_BT, masked_mean(thoughts_BTW, mask_BT), tuple(blocks))
