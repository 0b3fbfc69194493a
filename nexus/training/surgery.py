"""Combining the gradients of several teachers into one step that does not undo any of them.

Rows g_t of the gradients [N, P] (N teachers, P parameters), coefficients c_t >= 0, norms n_t = |g_t|, a_t = c_t n_t, and
C_ij = <g_i, g_j> / (n_i n_j), the matrix of cosines:

    sum     d = sum_t c_t g_t: no surgery, the baseline that any surgery must beat at equal wall time
            (Kurin et al. 2022, arXiv 2201.04122; Xin et al. 2022, arXiv 2209.11379)
    upgrad  v_i = argmin { v'Cv : v >= a_i e_i }, d = sum_t (sum_i v_i)_t g_t / n_t: each c_i g_i is projected on the dual cone
            {d : <g_t, d> >= 0 for all t}, and the projections are added (Quinton and Rey 2024, arXiv 2406.16232, eq. 3-4)
    pcgrad  each c_i g_i is projected off every other g_j that it conflicts with, one after another
            (Yu et al. 2020, arXiv 2001.06782, algorithm 1); with three or more teachers conflicts can remain

Departure from the UPGrad paper: the problem is solved in the cosine matrix. The cone does not change when a row is scaled, but the
Gramian of rows whose norms differ by e^4 is so ill-conditioned that its solution violates the cone in 2-42 % of random draws;
with unit rows none of them does. Because v_i / a_i does not depend on the coefficients, d is linear in each row's scale.

Where nothing conflicts (min C_ij >= 0) every method returns the plain weighted sum.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Method = Literal["none", "sum", "upgrad", "pcgrad"]
"""`none` and `sum` are two names of the weighted sum: what a config calls `none` is what the formula calls a sum."""

COLUMNS_PER_CHUNK = 1 << 20
"""Parameters that are converted to float64 at a time: 128 MiB for 16 teachers, whatever the size of the model."""

STATIONARY_TOLERANCE = 1e-9
"""|d| below this share of sum_t a_t is rounding: the teachers cancel (a Pareto-stationary point) and the step is exactly 0."""

DUAL_TOLERANCE = 1e-12
"""Cosine by which a projected row may miss the cone; 1e4 times the rounding of a float64 dot product of unit rows."""


def combine(
    gradients_NP: Tensor, coefficients_N: Tensor, *, method: Method, generator: torch.Generator | None = None
) -> Tensor:
    """Return d [P], the combined gradient, in the dtype and on the device of `gradients_NP`.

    For "upgrad", <g_t, d> >= -1e-8 |g_t| sum_s c_s |g_s| for every teacher, whatever the scales of the rows. That is a property
    of d: it survives clipping by norm, but not a diagonal preconditioner (Adam) nor weight decay. Computed in float64.

    Args:
        gradients_NP: one row per teacher, any float dtype. A row of zeros takes no part.
        coefficients_N: c_t, not negative. A teacher of coefficient 0 adds nothing, but is still not to be conflicted with.
        method: see the module.
        generator: CPU generator that fixes the order in which "pcgrad" projects; None projects in the order of the rows.

    Raises:
        ValueError: shapes that disagree, an unknown method, a negative coefficient, or a number that is not finite.
    """
    _check(gradients_NP, coefficients_N, method)
    coefficients = coefficients_N.detach().double().cpu().numpy()
    if method in ("none", "sum"):
        return _weighted_sum(gradients_NP, coefficients)
    norms, cosines = _norms_and_cosines(gradients_NP)
    alive = np.flatnonzero(norms)
    cosines = cosines[np.ix_(alive, alive)]
    lengths = coefficients[alive] * norms[alive]
    if not lengths.any() or cosines.min() >= 0.0:
        return _weighted_sum(gradients_NP, coefficients)
    # Relative lengths: the square of a length of 1e200 overflows, that of 1e-200 vanishes.
    longest = lengths.max()
    lengths = lengths / longest
    upgrad = method == "upgrad"
    weights = sum_of_projections(cosines, lengths) if upgrad else _project_in_turn(cosines, lengths, generator)
    if weights @ cosines @ weights <= (STATIONARY_TOLERANCE * lengths.sum()) ** 2:
        return torch.zeros_like(gradients_NP[0])
    factors = np.zeros_like(norms)
    factors[alive] = weights / norms[alive] * longest
    return _weighted_sum(gradients_NP, factors)


def sum_of_projections(cosines: NDArray[np.float64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over i of argmin { v'Cv : v >= lengths_i e_i } [N], for a matrix C of cosines (positive semidefinite, unit diagonal)."""
    total = np.zeros_like(lengths)
    for index, length in enumerate(lengths):
        # v = length (e_i + y) with y >= 0 minimising y'Cy / 2 + C_i'y: the same y for every length.
        correction = nonnegative_minimiser(cosines, cosines[index])
        correction[index] += 1.0
        total += length * correction
    return total


def nonnegative_minimiser(
    matrix: NDArray[np.float64], linear: NDArray[np.float64], *, max_iterations: int | None = None
) -> NDArray[np.float64]:
    """argmin over y >= 0 of y'My / 2 + linear'y, for M positive semidefinite [N, N] and `linear` in its range.

    The active-set method of Lawson and Hanson (1974, chapter 23) on the normal equations: variables are freed one at a time, the
    one with the steepest descent first, and the free system is solved exactly. After `max_iterations` freed variables (10 N unless
    told; rounding could cycle) the best point so far is returned, which is feasible.
    """
    solution = np.zeros_like(linear)
    free = np.zeros(linear.shape, dtype=bool)
    for _ in range(10 * len(linear) if max_iterations is None else max_iterations):
        descent = np.where(free, -np.inf, -(matrix @ solution + linear))
        candidate = int(descent.argmax())
        if descent[candidate] <= DUAL_TOLERANCE:
            break
        free[candidate] = True
        while True:
            target = np.zeros_like(linear)
            # Least squares: duplicated teachers make the free system singular, and any of its solutions gives the same d.
            target[free] = np.linalg.lstsq(matrix[np.ix_(free, free)], -linear[free], rcond=None)[0]
            blocked = free & (target <= 0.0)
            if not blocked.any():
                solution = target
                break
            # Walk towards the target until the first variable reaches 0, and bind it there.
            steps = np.full(linear.shape, np.inf)
            steps[blocked] = solution[blocked] / (solution[blocked] - target[blocked])
            solution = solution + steps.min() * (target - solution)
            free &= steps > steps.min()
            solution[~free] = 0.0
    return solution


def _project_in_turn(
    cosines: NDArray[np.float64], lengths: NDArray[np.float64], generator: torch.Generator | None
) -> NDArray[np.float64]:
    """PCGrad in coordinates: the weights of the unit rows in the sum of the projected gradients [N]."""
    total = np.zeros_like(lengths)
    for index, length in enumerate(lengths):
        others = [other for other in range(len(lengths)) if other != index]
        if generator is not None:
            others = [others[position] for position in torch.randperm(len(others), generator=generator).tolist()]
        weights = np.zeros_like(lengths)
        weights[index] = length
        for other in others:
            weights[other] -= min(0.0, float(cosines[other] @ weights))
        total += weights
    return total


def _norms_and_cosines(gradients_NP: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """|g_t| [N] and the cosines [N, N] (0 for rows of zeros), summed in float64 over chunks of columns."""
    num_teachers, num_parameters = gradients_NP.shape
    # Scaled by the largest entry first: the square of a gradient of 1e200 overflows even in float64.
    scales_N = gradients_NP.detach().abs().amax(dim=1).double()
    divisors_N1 = torch.where(scales_N > 0.0, scales_N, torch.ones_like(scales_N))[:, None]
    gramian_NN = torch.zeros(num_teachers, num_teachers, dtype=torch.float64, device=gradients_NP.device)
    for start in range(0, num_parameters, COLUMNS_PER_CHUNK):
        chunk = gradients_NP.detach()[:, start : start + COLUMNS_PER_CHUNK].double() / divisors_N1
        gramian_NN += chunk @ chunk.T
    gramian = gramian_NN.cpu().numpy()
    lengths = np.sqrt(np.diag(gramian))
    safe = np.where(lengths > 0.0, lengths, 1.0)
    cosines = gramian / safe[:, None] / safe[None, :]
    return lengths * scales_N.cpu().numpy(), cosines


def _weighted_sum(gradients_NP: Tensor, factors: NDArray[np.float64]) -> Tensor:
    factors_N = torch.from_numpy(factors).to(gradients_NP.device)
    result_P = torch.empty_like(gradients_NP[0])
    for start in range(0, gradients_NP.shape[1], COLUMNS_PER_CHUNK):
        columns = slice(start, start + COLUMNS_PER_CHUNK)
        result_P[columns] = (factors_N @ gradients_NP.detach()[:, columns].double()).to(result_P.dtype)
    return result_P


def _check(gradients_NP: Tensor, coefficients_N: Tensor, method: str) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {list(get_args(Method))}, found {method!r}")
    if gradients_NP.ndim != 2 or 0 in gradients_NP.shape or not gradients_NP.is_floating_point():
        raise ValueError(
            f"gradients: expected a float tensor [teachers, parameters] with at least one of each, "
            f"found {tuple(gradients_NP.shape)} of {gradients_NP.dtype}"
        )
    if coefficients_N.shape != gradients_NP.shape[:1]:
        raise ValueError(
            f"coefficients: expected {gradients_NP.shape[0]}, one per teacher, found shape {tuple(coefficients_N.shape)}"
        )
    if not bool(torch.isfinite(coefficients_N).all()) or bool((coefficients_N < 0).any()):
        raise ValueError(f"coefficients: expected finite numbers >= 0, found {coefficients_N.tolist()}")
    finite_N = torch.isfinite(gradients_NP).all(dim=1)
    if not bool(finite_N.all()):
        raise ValueError(
            f"gradients: expected finite numbers, found nan or inf in rows {torch.nonzero(~finite_N).flatten().tolist()}; "
            "leave those teachers out of this step"
        )
