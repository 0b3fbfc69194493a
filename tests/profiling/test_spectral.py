"""Streaming covariance and the dimensions counted from it."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch

from nexus.profiling.spectral import Comoment, effective_rank, intrinsic_dimension, participation_ratio


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[300], [1, 299], [100, 150, 50], [1] * 300])
def test_chunks_merge_to_the_covariance_of_all_rows(sizes):
    states = normal(300, 5) @ normal(5, 5, seed=1) + 50
    merged = reduce(Comoment.merge, [Comoment.of(chunk) for chunk in states.split(sizes)])
    np.testing.assert_allclose(merged.comoment_DD / 300, np.cov(states.numpy().T, bias=True), rtol=1e-10)
    np.testing.assert_allclose(merged.mean_D, states.mean(0).numpy(), rtol=1e-12)


def test_the_order_of_chunks_does_not_matter():
    chunks = [Comoment.of(chunk) for chunk in (normal(300, 5) + 50).split([20, 200, 80])]
    forward, backward = reduce(Comoment.merge, chunks), reduce(Comoment.merge, chunks[::-1])
    np.testing.assert_allclose(forward.comoment_DD, backward.comoment_DD, rtol=1e-10)


def test_one_direction_has_one_dimension():
    eigenvalues = Comoment.of(normal(50, 1) @ normal(1, 8, seed=1)).eigenvalues()
    assert participation_ratio(eigenvalues) == pytest.approx(1)
    assert intrinsic_dimension(eigenvalues) == 1


def test_isotropic_states_use_every_dimension():
    eigenvalues = Comoment.of(normal(20000, 10)).eigenvalues()
    assert participation_ratio(eigenvalues) == pytest.approx(10, rel=0.01)
    assert intrinsic_dimension(eigenvalues) == 10


def test_rotation_shift_and_scale_change_nothing():
    states = normal(500, 6) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1, 0.01])
    rotation, _ = torch.linalg.qr(normal(6, 6, seed=2))
    plain, moved = (Comoment.of(x).eigenvalues() for x in (states, 7 * states @ rotation + 30))
    assert participation_ratio(moved) == pytest.approx(participation_ratio(plain))
    assert intrinsic_dimension(moved) == intrinsic_dimension(plain)


def test_eigenvalues_are_sorted_and_never_negative():
    eigenvalues = Comoment.of(normal(4, 9)).eigenvalues()
    assert (np.diff(eigenvalues) <= 0).all()
    assert (eigenvalues >= 0).all()


@pytest.mark.parametrize(
    ("eigenvalues", "share", "expected"),
    [
        ([90.0, 6.0, 4.0], 0.95, 2),
        ([94.9, 5.1, 0.0], 0.95, 2),
        ([95.1, 4.9, 0.0], 0.95, 1),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2),
        ([1.0, 1.0, 1.0], 1.0, 3),
    ],
)
def test_intrinsic_dimension_is_the_fewest_components_that_hold_the_share(eigenvalues, share, expected):
    assert intrinsic_dimension(np.array(eigenvalues), share) == expected


def test_states_that_never_vary_have_no_dimension():
    eigenvalues = Comoment.of(torch.ones(5, 3)).eigenvalues()
    assert intrinsic_dimension(eigenvalues) == 0
    assert participation_ratio(eigenvalues) == 0
    assert effective_rank(eigenvalues) == 0
    assert Comoment.of(torch.ones(5, 3)).subspace().basis_KD.shape == (0, 3)


def test_effective_rank_counts_even_directions():
    assert effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(np.array([5.0, 0.0])) == pytest.approx(1)


def test_the_subspace_has_the_leading_eigenvectors_with_a_fixed_sign():
    states = normal(300, 5) @ normal(5, 5, seed=1)
    subspace = Comoment.of(states).subspace(share=0.8)
    covariance_DD = np.cov(states.numpy().T, bias=True)
    rank = len(subspace.basis_KD)
    assert rank == intrinsic_dimension(subspace.eigenvalues_D, 0.8)
    np.testing.assert_allclose(
        subspace.basis_KD @ covariance_DD @ subspace.basis_KD.T, np.diag(subspace.eigenvalues_D[:rank]), atol=1e-10
    )
    largest_K = np.take_along_axis(subspace.basis_KD, np.abs(subspace.basis_KD).argmax(1)[:, None], axis=1)
    assert (largest_K > 0).all()
