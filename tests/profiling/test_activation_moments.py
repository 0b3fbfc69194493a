"""Streaming moments against the moments of all values at once."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from scipy import stats

from nexus.profiling.activation import ActivationMoments, MeanUpdate, important_dimensions


@pytest.fixture
def states_ND() -> torch.Tensor:
    """Skewed, heavy-tailed and far from zero: what makes naive sums of powers lose digits."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 6, generator=generator, dtype=torch.float64).exp() * torch.arange(1, 7) + 100


@pytest.mark.parametrize("sizes", [[200], [1, 199], [50, 50, 50, 50], [1] * 200, [3, 120, 77]])
def test_chunks_merge_to_the_moments_of_all_values(states_ND, sizes):
    merged = reduce(ActivationMoments.merge, [ActivationMoments.of(chunk) for chunk in states_ND.split(sizes)])
    values = states_ND.numpy()
    deviation = values - values.mean(0)
    assert merged.count == 200
    for found, expected in [
        (merged.mean_D, values.mean(0)),
        (merged.m2_D, (deviation**2).sum(0)),
        (merged.m3_D, (deviation**3).sum(0)),
        (merged.m4_D, (deviation**4).sum(0)),
        (merged.abs_sum_D, np.abs(values).sum(0)),
        (merged.abs_max_D, np.abs(values).max(0)),
    ]:
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_the_order_of_chunks_does_not_matter(states_ND):
    chunks = [ActivationMoments.of(chunk) for chunk in states_ND.split([20, 100, 80])]
    forward, backward = reduce(ActivationMoments.merge, chunks), reduce(ActivationMoments.merge, chunks[::-1])
    np.testing.assert_allclose(forward.m3_D, backward.m3_D, rtol=1e-10)
    np.testing.assert_allclose(forward.m4_D, backward.m4_D, rtol=1e-10)


def test_the_summary_is_the_textbook_moments(states_ND):
    values = states_ND.numpy()
    summary = ActivationMoments.of(states_ND).summary()
    assert summary.mean_abs == pytest.approx(np.abs(values).mean())
    assert summary.variance == pytest.approx(values.var(0).mean())
    assert summary.kurtosis == pytest.approx(stats.kurtosis(values, axis=0, fisher=False).mean())
    assert summary.abs_max == pytest.approx(np.abs(values).max())


def test_the_kurtosis_of_normal_numbers_is_three():
    states = torch.randn(20000, 4, generator=torch.Generator().manual_seed(1))
    # Standard error of one dimension's kurtosis: sqrt(24 / n) = 0.035.
    assert ActivationMoments.of(states).summary().kurtosis == pytest.approx(3, abs=0.1)


def test_negative_values_count_by_size():
    moments = ActivationMoments.of(torch.tensor([[-5.0, 1.0], [2.0, -1.0]]))
    assert moments.abs_max_D.tolist() == [5, 1]
    assert moments.summary().mean_abs == pytest.approx(9 / 4)


def test_dimensions_that_never_vary_have_no_kurtosis(states_ND):
    with_constant = torch.cat([states_ND, torch.full((200, 1), 3.0)], dim=1)
    assert ActivationMoments.of(with_constant).summary().kurtosis == pytest.approx(
        ActivationMoments.of(states_ND).summary().kurtosis
    )
    assert ActivationMoments.of(torch.full((5, 2), 3.0)).summary().kurtosis == 0


def test_half_precision_states_are_summed_in_float64():
    states = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    assert ActivationMoments.of(states).abs_sum_D.tolist() == [4096]
    assert ActivationMoments.of(states).abs_sum_D.dtype == np.float64


def test_dimensions_have_their_own_moments(states_ND):
    states_ND[:, 2] = 4.0
    found = ActivationMoments.of(states_ND).per_dimension()
    values = states_ND.numpy()
    varies = np.arange(6) != 2
    np.testing.assert_allclose(found["mean"], values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["variance"], values.var(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found["abs_max"], np.abs(values).max(0), rtol=1e-6)
    np.testing.assert_allclose(
        found["kurtosis"][varies], stats.kurtosis(values[:, varies], axis=0, fisher=False), rtol=1e-5
    )
    assert found["kurtosis"][2] == 0
    assert not found["importance_mask"][2]


def test_important_dimensions_are_the_fewest_that_hold_the_share():
    assert important_dimensions(np.array([1.0, 90.0, 4.0, 5.0])).tolist() == [False, True, False, True]
    assert important_dimensions(np.array([2.0, 2.0]), share=0.5).tolist() == [True, False]
    assert not important_dimensions(np.zeros(3)).any()


def test_mean_updates_merge_to_the_mean_of_all(states_ND):
    merged = reduce(MeanUpdate.merge, [MeanUpdate.of(chunk) for chunk in states_ND.split([3, 120, 77])])
    np.testing.assert_allclose(merged.mean_D, states_ND.numpy().mean(0), rtol=1e-12)
