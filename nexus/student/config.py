"""The shape of the student's trunk, and how many parameters that shape has.

Letters in the closed formula: V vocabulary, D width, F inner width of the feed-forward, H heads, G key-value heads, d head size,
L layers, Q ports.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from nexus.errors import ConfigError

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "port_every",
)


class NexusStudentConfig(PreTrainedConfig):
    """Configuration of `NexusStudentCore`; the defaults are the 4096-wide student.

    A cross-attention port stands before every layer whose index is a positive multiple of `port_every`, so the layers below
    index `port_every` never see a context.

    Raises:
        ConfigError: if a size is not positive, the heads cannot share the key-value heads evenly, the head size is odd (rotary
            positions turn pairs), or no port would exist.
    """

    model_type = "nexus_student"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  # the base class declares it without ClassVar

    vocab_size: int = 151_936
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    """Defaults to hidden_size / num_attention_heads."""
    port_every: int = 4
    """Layers between two ports; 4 in 32 layers gives 7 ports, 4 % of the parameters."""
    rope_theta: float = 1.0e6
    """Base of the rotary wavelengths; 1e6 keeps 32k positions apart (the value of Qwen3)."""
    rms_norm_eps: float = 1.0e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 32_768
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"Expected hidden_size to be a multiple of num_attention_heads, found {self.hidden_size} and "
                    f"{self.num_attention_heads}. Change one, or set head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name in _SIZES:
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"Expected {name} above 0, found {getattr(self, name)}. Correct the student's configuration."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"Expected num_attention_heads to be a multiple of num_key_value_heads, found {self.num_attention_heads} and "
                f"{self.num_key_value_heads}. Choose a divisor."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"Expected an even head_dim, found {self.head_dim}. Rotary positions turn pairs of numbers."
            )
        if self.port_every >= self.num_hidden_layers:
            raise ConfigError(
                f"Expected port_every below num_hidden_layers ({self.num_hidden_layers}), found {self.port_every}: no port would "
                "exist and no context could be read. Lower port_every."
            )
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def head_size(self) -> int:
        """d, which `__post_init__` has settled."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def port_layers(self) -> tuple[int, ...]:
        """Indices of the layers that a port precedes, ascending."""
        return tuple(range(self.port_every, self.num_hidden_layers, self.port_every))


class PretrainedCoreConfig(NexusStudentConfig):
    """Configuration of a trunk whose layers are those of another causal language model (`nexus.student.trunk`)."""

    model_type = "nexus_student_pretrained"

    trunk: dict[str, Any] = dataclasses.field(default_factory=dict)
    """That model's own configuration, `model_type` included."""


def parameter_count(config: NexusStudentConfig) -> int:
    """Parameters of a `NexusStudentCore`, without building it.

    Embedding V*D (twice when untied) + L * (attention + 3*D*F + 2*D) + Q * (attention + 3*D) + D, where
    attention = 2*D*H*d + 2*D*G*d. A port holds two norms and one gate per channel beside its attention.
    """
    width, head = config.hidden_size, config.head_size
    attention = 2 * width * config.num_attention_heads * head + 2 * width * config.num_key_value_heads * head
    layer = attention + 3 * width * config.intermediate_size + 2 * width
    port = attention + 3 * width
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + len(config.port_layers) * port + width
