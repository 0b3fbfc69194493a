"""Matrices that spread a variance evenly: orthogonal, and exact for every width."""

from __future__ import annotations

import pytest
import torch

from nexus.training.hadamard import hadamard_matrix, spreading_rotation

KNOWN = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 64, 72, 768)
"""Widths up to 64 that are built, and a common one."""


@pytest.mark.parametrize("width", KNOWN)
def test_a_hadamard_matrix_has_entries_of_one_size_and_orthogonal_rows(width: int) -> None:
    matrix = hadamard_matrix(width)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(width, width, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.mT, width * torch.eye(width, dtype=torch.float64))


@pytest.mark.parametrize("width", [3, 5, 6, 7, 14, 18, 92, 100 + 2])
def test_there_is_none_for_odd_widths_twice_odd_ones_and_those_that_two_constructions_do_not_reach(width: int) -> None:
    assert hadamard_matrix(width) is None


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 12, 14, 22, 31, 64, 92])
@pytest.mark.parametrize("kind", ["random", "steep", "one", "equal", "zero"])
def test_every_dimension_gets_the_mean_variance_by_a_rotation(width: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(width)
    variances = {
        "random": torch.rand(width, generator=generator, dtype=torch.float64),
        "steep": 10.0 ** -torch.arange(width, dtype=torch.float64),
        "one": torch.eye(width, dtype=torch.float64)[-1],
        "equal": torch.full((width,), 0.3, dtype=torch.float64),
        "zero": torch.zeros(width, dtype=torch.float64),
    }[kind]
    rotation = spreading_rotation(variances)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    spread = (rotation * variances) @ rotation.mT
    torch.testing.assert_close(spread.diagonal(), variances.mean().expand(width), rtol=0, atol=1e-12)


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 1, found 0"):
        hadamard_matrix(0)
