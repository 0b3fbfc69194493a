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

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    _check(gradients_NP, method)
    coefficients = _checked_coefficients(coefficients_N, gradients_NP.shape[0])
    rows = gradients_NP.detach().unbind()
    if method in ("none", "sum"):
        return weighted_sum(rows, coefficients)
    plan = _plan(rows, method, generator)
    return weighted_sum(rows, plan.factors(coefficients))


@dataclass(frozen=True)
class SurgeryPlan:
    """What surgery does to the gradients of N teachers, whatever their coefficients: it is linear in them.

    So a plan may be kept for some steps: `factors` then gives the loss weights of each step's own coefficients, and one backward
    pass applies them. The gradients turn meanwhile, and what the method promises holds for those of the plan.
    """

    norms_N: NDArray[np.float64]
    """|g_t|."""
    cosines_NN: NDArray[np.float64]
    """The conflict matrix: negative where two teachers pull against each other; 0 in the row and column of a gradient of zeros."""
    projections_NN: NDArray[np.float64]
    """Row i: what g_i / n_i becomes, in multiples of the unit rows. The unit matrix where nothing conflicts."""

    @property
    def conflicts(self) -> int:
        """Number of pairs of teachers with a negative cosine."""
        return int((np.triu(self.cosines_NN, 1) < 0.0).sum())

    def factors(self, coefficients_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """f with d = sum_t f_t g_t [N]; all 0 where the teachers cancel (`is_stationary`)."""
        lengths = coefficients_N * self.norms_N
        if np.array_equal(self.projections_NN, np.eye(len(lengths))) or not lengths.any():
            return coefficients_N
        # Relative lengths: the square of a length of 1e200 overflows, that of 1e-200 vanishes.
        longest = lengths.max()
        weights = (lengths / longest) @ self.projections_NN
        factors = np.zeros_like(self.norms_N)
        if not self.is_stationary(coefficients_N):
            alive = self.norms_N > 0.0
            factors[alive] = weights[alive] / self.norms_N[alive] * longest
        return factors

    def is_stationary(self, coefficients_N: NDArray[np.float64]) -> bool:
        """True where |d| is rounding: a Pareto-stationary point, at which no step improves every teacher."""
        lengths = coefficients_N * self.norms_N
        if not lengths.any():
            return True
        lengths = lengths / lengths.max()
        weights = lengths @ self.projections_NN
        return bool(weights @ self.cosines_NN @ weights <= (STATIONARY_TOLERANCE * lengths.sum()) ** 2)


def plan_surgery(gradients_NP: Tensor, *, method: Method, generator: torch.Generator | None = None) -> SurgeryPlan:
    """The cosines between the teachers' gradients, and what `method` makes of them. Arguments and errors as `combine`."""
    _check(gradients_NP, method)
    return _plan(gradients_NP.detach().unbind(), method, generator)


def plan_scaled_surgery(
    rows: Sequence[Tensor], scales: Sequence[float], *, method: Method, generator: torch.Generator | None = None
) -> SurgeryPlan:
    """`plan_surgery` of the rows scale_t g_t, none of which is made: they would be a second copy of every gradient.

    Args:
        rows: g_t [P], finite, on one device.
        scales: above 0.
    """
    plan = _plan(rows, method, generator)
    return replace(plan, norms_N=plan.norms_N * np.array(scales, dtype=np.float64))


def _plan(rows: Sequence[Tensor], method: Method, generator: torch.Generator | None) -> SurgeryPlan:
    norms, cosines = _norms_and_cosines(rows)
    projections = np.eye(len(norms))
    if method in ("upgrad", "pcgrad") and cosines.min() < 0.0:
        alive = np.flatnonzero(norms)
        among = cosines[np.ix_(alive, alive)]
        projected = _projected_on_the_cone(among) if method == "upgrad" else _projected_in_turn(among, generator)
        projections[np.ix_(alive, alive)] = projected
    return SurgeryPlan(norms, cosines, projections)


def weighted_sum(rows: Sequence[Tensor] | Tensor, factors_N: NDArray[np.float64]) -> Tensor:
    """sum_t factors_t g_t [P], summed in float64 and returned in the dtype of the gradients, one row per teacher."""
    result_P = torch.empty_like(rows[0])
    factors = torch.from_numpy(factors_N).to(result_P.device)
    for start in range(0, len(result_P), COLUMNS_PER_CHUNK):
        columns = slice(start, start + COLUMNS_PER_CHUNK)
        result_P[columns] = (factors @ _chunk(rows, columns)).to(result_P.dtype)
    return result_P


def _projected_on_the_cone(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row i: argmin { v'Cv : v >= e_i }, for a matrix C of cosines (positive semidefinite, unit diagonal)."""
    # v = e_i + y with y >= 0 minimising y'Cy / 2 + C_i'y.
    return np.eye(len(cosines)) + np.stack([nonnegative_minimiser(cosines, row) for row in cosines])


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


def _projected_in_turn(cosines: NDArray[np.float64], generator: torch.Generator | None) -> NDArray[np.float64]:
    """PCGrad in coordinates: row i is the unit row i after its projections, in multiples of the unit rows."""
    projections = np.eye(len(cosines))
    for index, weights in enumerate(projections):
        others = [other for other in range(len(cosines)) if other != index]
        if generator is not None:
            others = [others[position] for position in torch.randperm(len(others), generator=generator).tolist()]
        for other in others:
            weights[other] -= min(0.0, float(cosines[other] @ weights))
    return projections


def _norms_and_cosines(rows: Sequence[Tensor]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """|g_t| [N] and the cosines [N, N] (0 for rows of zeros), summed in float64 over chunks of columns."""
    # Scaled by the largest entry first: the square of a gradient of 1e200 overflows even in float64.
    scales_N = torch.stack([torch.linalg.vector_norm(row, ord=math.inf) for row in rows]).double()
    divisors_N1 = torch.where(scales_N > 0.0, scales_N, torch.ones_like(scales_N))[:, None]
    gramian_NN = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=scales_N.device)
    for start in range(0, len(rows[0]), COLUMNS_PER_CHUNK):
        chunk = _chunk(rows, slice(start, start + COLUMNS_PER_CHUNK)).div_(divisors_N1)
        gramian_NN += chunk @ chunk.T
    gramian = gramian_NN.cpu().numpy()
    lengths = np.sqrt(np.diag(gramian))
    safe = np.where(lengths > 0.0, lengths, 1.0)
    cosines = gramian / safe[:, None] / safe[None, :]
    return lengths * scales_N.cpu().numpy(), cosines


def _chunk(rows: Sequence[Tensor] | Tensor, columns: slice) -> Tensor:
    """Some columns of all rows in float64, a tensor of its own."""
    chunk_NP = torch.empty(len(rows), len(rows[0][columns]), dtype=torch.float64, device=rows[0].device)
    for target_P, row_P in zip(chunk_NP, rows, strict=True):
        target_P.copy_(row_P.detach()[columns])
    return chunk_NP


def _check(gradients_NP: Tensor, method: str) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {list(get_args(Method))}, found {method!r}")
    if gradients_NP.ndim != 2 or 0 in gradients_NP.shape or not gradients_NP.is_floating_point():
        raise ValueError(
            f"gradients: expected a float tensor [teachers, parameters] with at least one of each, "
            f"found {tuple(gradients_NP.shape)} of {gradients_NP.dtype}"
        )
    finite_N = torch.isfinite(gradients_NP).all(dim=1)
    if not bool(finite_N.all()):
        raise ValueError(
            f"gradients: expected finite numbers, found nan or inf in rows {torch.nonzero(~finite_N).flatten().tolist()}; "
            "leave those teachers out of this step"
        )


def _checked_coefficients(coefficients_N: Tensor, num_teachers: int) -> NDArray[np.float64]:
    if coefficients_N.shape != (num_teachers,):
        raise ValueError(
            f"coefficients: expected {num_teachers}, one per teacher, found shape {tuple(coefficients_N.shape)}"
        )
    if not bool(torch.isfinite(coefficients_N).all()) or bool((coefficients_N < 0).any()):
        raise ValueError(f"coefficients: expected finite numbers >= 0, found {coefficients_N.tolist()}")
    coefficients: NDArray[np.float64] = coefficients_N.detach().double().cpu().numpy()
    return coefficients
