"""Anchoring a student's states to a teacher's features: the loss, and the scale that makes teachers comparable.

Shape letters: B batch, T time, H width of the teacher's features, M scored positions (selected from B x T).

The loss is that of AM-RADIO (Ranzinger et al. 2024, arXiv 2312.06709, eq. 4): 0.9 of a cosine distance and 0.1 of a smooth L1
distance. Its second part has a unit, so a teacher with large features would own the sum; targets are therefore centred and divided
by *one* number, the square root of the mean variance over their dimensions. A scalar keeps all angles and relative sizes between
dimensions, and is the whole effect of PHI-S (arXiv 2410.01680) on a squared error; a number per dimension would amplify the noise
of dimensions that say nothing.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

COSINE_WEIGHT = 0.9
SMOOTH_L1_WEIGHT = 0.1
"""The shares of arXiv 2312.06709, section 3.3: direction first, size enough to keep the scale."""

NORM_FLOOR = 1e-2
"""Root mean square, in units of a standardised feature, below which a vector has no direction. It bounds the gradient of the cosine
at a predictor that still gives zeros, where it would be infinite."""

SCALE_FLOOR = 1e-6
"""Standard deviation below which features count as constant and are only centred."""


def cosine_smooth_l1_anchor(
    predicted_BTH: Tensor, target_BTH: Tensor, mask_BT: Tensor, *, num_positions: int | None = None
) -> Tensor:
    """0.9 (1 - cosine) + 0.1 smooth L1 (threshold 1, mean over H), averaged over the masked positions; dimensionless.

    Args:
        predicted_BTH: the student's prediction of the teacher's features, any float dtype.
        target_BTH: the teacher's features, standardised; detached.
        mask_BT: bool or 0/1, set where the position counts. Nothing else enters value or gradient, not even inf.
        num_positions: positions of the whole optimizer step, where it is made of several micro-batches; None counts this mask.

    Returns:
        Scalar float32 (float64 for float64 inputs). 0 where prediction and target are equal, and 0, attached to the graph, where
        nothing is masked in.

    Raises:
        ValueError: shapes that disagree, or a count below 1 while some position is masked in.
    """
    if predicted_BTH.shape != target_BTH.shape or mask_BT.shape != predicted_BTH.shape[:-1]:
        raise ValueError(
            f"anchor: expected prediction and target of one shape [..., H] and a mask of shape [...], found prediction "
            f"{tuple(predicted_BTH.shape)}, target {tuple(target_BTH.shape)} and mask {tuple(mask_BT.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(predicted_BTH.dtype, target_BTH.dtype), torch.float32)
    selected_BT = mask_BT.bool()
    predicted_MH = predicted_BTH[selected_BT].to(dtype)
    target_MH = target_BTH.detach()[selected_BT].to(dtype)
    # |u - v|^2 / 2 = 1 - cosine for unit vectors, and is exactly 0 at equality, which 1 - <u, v> is not.
    cosine_M = 0.5 * (_unit(predicted_MH) - _unit(target_MH)).square().sum(dim=-1)
    smooth_l1_M = F.smooth_l1_loss(predicted_MH, target_MH, reduction="none").mean(dim=-1)
    total = (COSINE_WEIGHT * cosine_M + SMOOTH_L1_WEIGHT * smooth_l1_M).sum()
    if predicted_MH.shape[0] == 0:
        return total
    count = predicted_MH.shape[0] if num_positions is None else num_positions
    if count < 1:
        raise ValueError(f"num_positions: expected at least {predicted_MH.shape[0]}, found {count}")
    return total / count


class StandardiserState(TypedDict):
    """What a checkpoint keeps of a `FeatureStandardiser`."""

    count: int
    mean_H: Tensor
    squared_deviation: float
    frozen: bool


class FeatureStandardiser:
    """Centres a teacher's features and divides them by one number, so that their mean variance per dimension is 1.

    Statistics stream in float64 (Chan, Golub and LeVeque 1983: chunks in any order and of any size give one result) until
    `freeze_after` vectors were seen; then they stay, because a moving target would be one more thing for the student to follow.

    Args:
        width: H.
        freeze_after: vectors, at least 2. The default gives the scale to about 1 % at a width of 64 and better above.
    """

    def __init__(self, width: int, *, freeze_after: int = 4096) -> None:
        if width < 1 or freeze_after < 2:
            raise ValueError(
                f"standardiser: expected width >= 1 and freeze_after >= 2, found {width} and {freeze_after}"
            )
        self.width = width
        self.freeze_after = freeze_after
        self._count = 0
        self._mean_H = torch.zeros(width, dtype=torch.float64)
        self._squared_deviation = 0.0
        self._frozen = False

    @property
    def frozen(self) -> bool:
        """True once the statistics no longer move."""
        return self._frozen

    @property
    def scale(self) -> float:
        """Square root of the mean variance over the dimensions; 1 for features that are constant."""
        self._require_data()
        deviation = math.sqrt(self._squared_deviation / (self._count * self.width))
        return deviation if deviation > SCALE_FLOOR else 1.0

    def update(self, features_BTH: Tensor, mask_BT: Tensor) -> None:
        """Take in the masked features [..., H]; does nothing once frozen. Raises ValueError on shapes that disagree."""
        if features_BTH.shape[-1:] != (self.width,) or mask_BT.shape != features_BTH.shape[:-1]:
            raise ValueError(
                f"standardiser: expected features [..., {self.width}] and a mask of the same leading shape, "
                f"found {tuple(features_BTH.shape)} and {tuple(mask_BT.shape)}"
            )
        rows_MH = features_BTH.detach()[mask_BT.bool()].double().cpu()
        count = rows_MH.shape[0]
        if self._frozen or count == 0:
            return
        mean_H = rows_MH.mean(dim=0)
        shift_H = mean_H - self._mean_H
        total = self._count + count
        self._squared_deviation += float((rows_MH - mean_H).square().sum())
        self._squared_deviation += float(shift_H.square().sum()) * self._count * count / total
        self._mean_H = self._mean_H + shift_H * (count / total)
        self._count = total
        if total >= self.freeze_after:
            self.freeze()

    def freeze(self) -> None:
        """Keep the statistics as they are. Raises ValueError when nothing was seen yet."""
        self._require_data()
        self._frozen = True

    def __call__(self, features_BTH: Tensor) -> Tensor:
        """Return the standardised features, in their own dtype. Raises ValueError when nothing was seen yet."""
        scale = self.scale
        return ((features_BTH - self._mean_H.to(features_BTH)) / scale).to(features_BTH.dtype)

    def inverse(self, standardised_BTH: Tensor) -> Tensor:
        """Undo `__call__`."""
        return standardised_BTH * self.scale + self._mean_H.to(standardised_BTH)

    def state_dict(self) -> StandardiserState:
        return {
            "count": self._count,
            "mean_H": self._mean_H.clone(),
            "squared_deviation": self._squared_deviation,
            "frozen": self._frozen,
        }

    def load_state_dict(self, state: StandardiserState) -> None:
        """Continue from `state`. Raises ValueError if its width is another."""
        if state["mean_H"].shape != (self.width,):
            raise ValueError(
                f"standardiser: expected statistics of width {self.width}, found {tuple(state['mean_H'].shape)}"
            )
        self._count = state["count"]
        self._mean_H = state["mean_H"].clone()
        self._squared_deviation = state["squared_deviation"]
        self._frozen = state["frozen"]

    def _require_data(self) -> None:
        if self._count == 0:
            raise ValueError("standardiser: expected features before this call, found none; call `update` first")


def _unit(rows_MH: Tensor) -> Tensor:
    floor = NORM_FLOOR * math.sqrt(rows_MH.shape[-1])
    norms_M1: Tensor = torch.linalg.vector_norm(rows_MH, dim=-1, keepdim=True)
    return rows_MH / norms_M1.clamp_min(floor)
