"""Cache layers with room for what is still to come, so that a decode step writes one column instead of copying the whole cache.

transformers' growing layers concatenate: every step copies all keys and values of all rows, which took more than half of a stacked
decode on a CPU. Here rows join and leave in place too. Shape letters: R rows, H heads, T positions, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


def with_room(layer: Any, max_rows: int, num_new: int) -> Any:
    """Return a cache layer that holds what `layer` holds and has room for `max_rows` rows and `num_new` more positions.

    Layers that keep anything but keys and values of all or of the newest positions (recurrent states, indexers) are returned as
    they are: their own `reorder_cache` moves rows.
    """
    # Exact types: a subclass keeps more.
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return layer
    return RoomyLayer(
        layer.keys,
        layer.values,
        max_rows=max_rows,
        num_new=num_new,
        past=layer.get_seq_length(),
        sliding_window=layer.sliding_window if layer.is_sliding else None,
    )


class RoomyLayer(CacheLayerMixin):
    """Keys and values in buffers [max_rows, H, positions, D] of which the first rows and positions are in use.

    Args:
        keys_RHTD: what is cached so far; copied.
        values_RHTD: likewise; heads may have another width.
        max_rows: rows that there will ever be.
        num_new: positions that will be appended.
        past: positions that the row went through; more than T where a window let the oldest go.
        sliding_window: positions that a query sees, its own included; None: all.
    """

    def __init__(
        self,
        keys_RHTD: Tensor,
        values_RHTD: Tensor,
        *,
        max_rows: int,
        num_new: int,
        past: int,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self.is_sliding = sliding_window is not None
        self._window = sliding_window
        self._past = past
        self._num_rows, _, self._num_columns, _ = keys_RHTD.shape
        rows, columns = max(max_rows, self._num_rows), self._num_columns + num_new
        # Empty and not zero: on a CPU, room takes memory only when it is used.
        self._buffers = [x.new_empty(rows, x.shape[1], columns, x.shape[3]) for x in (keys_RHTD, values_RHTD)]
        for buffer, states_RHTD in zip(self._buffers, (keys_RHTD, values_RHTD), strict=True):
            buffer[: self._num_rows, :, : self._num_columns] = states_RHTD

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer begins with a past."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append positions; return views of all keys and values that these may attend to."""
        num_queries = key_states.shape[-2]
        visible, _ = self.get_mask_sizes(num_queries)
        end = self._num_columns + num_queries
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self._num_rows, :, self._num_columns : end] = states
        self._num_columns = end
        self._past += num_queries
        self.keys, self.values = (buffer[: self._num_rows, :, end - visible : end] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row r become what row beam_idx[r] was, in place: only rows that move are copied."""
        moved_N = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero()[:, 0]
        for buffer in self._buffers:
            used = buffer[:, :, : self._num_columns]
            used[moved_N] = used[beam_idx[moved_N]]
        self._num_rows = len(beam_idx)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many positions `query_length` new ones see, themselves included, and how many came before those."""
        hidden = 0 if self._window is None else max(self._past - self._window + 1, 0)
        return self._past - hidden + query_length, hidden

    def get_seq_length(self) -> int:
        """Return the number of positions that each row went through."""
        return self._past

    def get_max_length(self) -> int:
        """Return the window, or -1 without one, as transformers' own layers do."""
        return -1 if self._window is None else self._window
