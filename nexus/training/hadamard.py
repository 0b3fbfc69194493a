"""Orthogonal matrices that spread a variance evenly over all dimensions: Hadamard matrices, and a substitute where none is known.

H diag(v) H^T has the mean of v all along its diagonal when every entry of the orthogonal H has the same size. Such matrices exist for
1, 2 and, as far as anyone knows, all multiples of 4. Built here: Sylvester's (powers of 2), Paley's (q + 1 for primes q = 3 mod 4,
2 (q + 1) for primes q = 1 mod 4) and their products with powers of 2, which are almost all widths of models: 768 = 64 x 12, 896 =
32 x 28, 1152 = 32 x 36. For other widths an orthogonal matrix that does the same for one given v (Schur 1923, Horn 1954).

Shape letters: H dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spreading_rotation(variances_H: Tensor) -> Tensor:
    """Orthogonal float64 [H, H], such that H diag(v) H^T has the mean of v in every place of its diagonal.

    Args:
        variances_H: v, finite and at least 0; only widths without a known Hadamard matrix depend on their values.
    """
    width = len(variances_H)
    hadamard = hadamard_matrix(width)
    if hadamard is not None:
        return hadamard / math.sqrt(width)
    power = width & -width
    inner = _sylvester(power) / math.sqrt(power)
    # Each block of `power` dimensions is evened out by Sylvester's matrix, and the blocks' means among each other.
    means = variances_H.double().reshape(-1, power).mean(dim=1)
    return torch.kron(_even_out(means), inner)


def hadamard_matrix(width: int) -> Tensor | None:
    """float64 [H, H] of 1 and -1 whose rows are orthogonal; None where none is known to this module."""
    if width < 1:
        raise ValueError(f"width: expected at least 1, found {width}")
    power = 1
    while width % power == 0:
        base = _paley(width // power)
        if base is not None:
            return torch.kron(_sylvester(power), base)
        power *= 2
    return None


def _sylvester(power: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.kron(step, matrix)
    return matrix


def _paley(width: int) -> Tensor | None:
    """Paley's constructions (1933), or the trivial one."""
    if width == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(width - 1) and (width - 1) % 4 == 3:
        skew = _bordered(width - 1, -1.0)
        return skew + torch.eye(width, dtype=torch.float64)
    half = width // 2
    if width % 2 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        symmetric = _bordered(half - 1, 1.0)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, plus) + torch.kron(torch.eye(half, dtype=torch.float64), minus)
    return None


def _bordered(prime: int, corner: float) -> Tensor:
    """[q + 1, q + 1]: Legendre symbols of i - j, with a first row of ones and a first column of `corner`."""
    squares = {number * number % prime for number in range(1, prime)}
    symbols = torch.tensor([0.0, *(1.0 if n in squares else -1.0 for n in range(1, prime))], dtype=torch.float64)
    places = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, corner
    matrix[1:, 1:] = symbols[(places[:, None] - places[None]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _even_out(variances_H: Tensor) -> Tensor:
    """The matrix for one diagonal: each of H - 1 rotations of two dimensions around the mean settles one of them."""
    values = variances_H.tolist()
    mean = sum(values) / len(values)
    rotation = torch.eye(len(values), dtype=torch.float64)
    open_ = set(range(len(values)))
    while len(open_) > 1:
        low, high = min(open_, key=values.__getitem__), max(open_, key=values.__getitem__)
        span = values[high] - values[low]
        # Rotated by the angle with sin^2 = share, the low one gets exactly the mean.
        share = min(1.0, max(0.0, (mean - values[low]) / span)) if span > 0.0 else 0.0
        cosine, sine = math.sqrt(1.0 - share), math.sqrt(share)
        rows = cosine * rotation[low] + sine * rotation[high], cosine * rotation[high] - sine * rotation[low]
        rotation[low], rotation[high] = rows
        values[high] = values[low] + values[high] - mean
        open_.discard(low)
    return rotation
