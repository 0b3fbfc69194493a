"""Caches of an encoder-decoder whose ablated rows share what was heard.

Cross-attention's keys and values depend on the sample alone as long as only the decoder is ablated. Projecting them costs more than
all else where a decoder writes a few dozen tokens about thousands of frames, and keeping them for every ablation takes as many times
the memory. Here they are kept once per sample, and copied for the rows of one block while that block runs.

Shape letters: B samples, R rows of the model's call, H heads, S positions of the encoder, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class PassThroughLayer(DynamicLayer):
    """Self-attention of a forward over whole texts, which needs no past: nothing is kept."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what was given."""
        return key_states, value_states


class SharedCrossCache(DynamicCache):
    """Keys and values of B samples, read by any number of rows.

    Args:
        layers: of a cache that one run of the decoder over the B samples filled.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = [_SharedLayer(self, layer.keys, layer.values) for layer in layers]
        self._sample_R: Tensor | None = None
        self._read_N: Tensor | None = None

    def rows_are(self, sample_R: Tensor | None) -> None:
        """Say which sample each row of the model's call belongs to; None: each to its own."""
        self._sample_R = self._read_N = sample_R

    def read_by(self, index_N: Tensor | None) -> None:
        """Say which rows of the model's call the block runs that reads next; None: all of them."""
        if index_N is None:
            self._read_N = self._sample_R
        else:
            self._read_N = index_N if self._sample_R is None else self._sample_R[index_N]

    def of_rows(self, states_BHSD: Tensor) -> Tensor:
        """Return the states of the rows that read now."""
        return states_BHSD if self._read_N is None else states_BHSD.index_select(0, self._read_N)


class _SharedLayer(DynamicLayer):
    """The cross-attention of one block. Attention reads `keys` and `values` and never updates them."""

    # The base's constructor would set keys and values, which are computed here.
    def __init__(self, owner: SharedCrossCache, keys_BHSD: Tensor, values_BHSD: Tensor) -> None:
        self._owner = owner
        self._states = (keys_BHSD, values_BHSD)
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """[rows, H, S, D]."""
        return self._owner.of_rows(self._states[0])

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """[rows, H, S, D]."""
        return self._owner.of_rows(self._states[1])

    def get_seq_length(self) -> int:
        """Return the number of positions of the encoder, without copying any."""
        return self._states[0].shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: a model that projects again does not read what is shared."""
        raise NotImplementedError("Expected cross-attention to read its cache, found new keys and values.")
