"""Cache layers with room against transformers' own growing layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from nexus.profiling.caches import with_room


def states(num_rows: int, num_positions: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Keys and values of different widths, as in multi-head latent attention.
    return (
        torch.randn(num_rows, 2, num_positions, 3, generator=generator),
        torch.randn(num_rows, 2, num_positions, 5, generator=generator),
    )


@pytest.mark.parametrize("past", [2, 4, 9])
@pytest.mark.parametrize("window", [None, 5])
def test_every_step_sees_what_transformers_own_layer_shows(window, past):
    reference = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    reference.update(*states(3, past, 0))
    roomy = with_room(reference, 4, 7)
    assert type(roomy) is not type(reference)
    assert roomy.is_sliding == reference.is_sliding
    assert roomy.get_max_length() == reference.get_max_length()
    # Rows are repeated, dropped, swapped, and stay.
    orders = [None, [0, 1, 2, 1], [3, 1], None, [1, 0], [0, 1, 0, 1]]
    num_rows = 3
    for step, order in enumerate(orders):
        if order is not None:
            reference.reorder_cache(torch.tensor(order))
            roomy.reorder_cache(torch.tensor(order))
            num_rows = len(order)
        assert roomy.get_mask_sizes(1) == reference.get_mask_sizes(1)
        new = states(num_rows, 1, step + 1)
        for found, expected in zip(roomy.update(*new), reference.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert roomy.get_seq_length() == reference.get_seq_length() == past + step + 1


def test_what_a_step_writes_is_one_column():
    layer = DynamicLayer()
    layer.update(*states(2, 4, 0))
    roomy = with_room(layer, 2, 2)
    first, _ = roomy.update(*states(2, 1, 1))
    second, _ = roomy.update(*states(2, 1, 2))
    assert first.data_ptr() == second.data_ptr()
    assert second.shape == (2, 2, 6, 3)


def test_the_layer_that_was_copied_is_left_alone():
    layer = DynamicLayer()
    layer.update(*states(2, 4, 0))
    before = layer.keys.clone()
    roomy = with_room(layer, 3, 2)
    roomy.reorder_cache(torch.tensor([1, 0, 1]))
    roomy.update(*states(3, 1, 1))
    assert torch.equal(layer.keys, before)


def test_room_comes_with_its_past_already_initialised():
    layer = DynamicLayer()
    layer.update(*states(2, 4, 0))
    roomy = with_room(layer, 2, 2)
    assert roomy.is_initialized
    roomy.lazy_initialization(*states(2, 1, 1))
    assert roomy.get_seq_length() == 4


def test_layers_that_keep_other_states_stay_as_they_are():
    layer = LinearAttentionLayer()
    assert with_room(layer, 2, 2) is layer
