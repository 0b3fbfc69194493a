"""Anchoring a student's states to a teacher's features: the loss, and the scale that makes teachers comparable.

Shape letters: B batch, T time, H width of the teacher's features, M scored positions (selected from B x T).

The loss is that of AM-RADIO (Ranzinger et al. 2024, arXiv 2312.06709, eq. 4): 0.9 of a cosine distance and 0.1 of a smooth L1
distance. Its second part has a unit, so a teacher with large features would own the sum; targets are therefore centred and divided
by *one* number, the square root of the mean variance over their dimensions. A scalar keeps all angles and relative sizes between
dimensions; a number per dimension would amplify the noise of dimensions that say nothing.

PHI-S (Ranzinger et al. 2024, arXiv 2410.01680, section 3.3) also rotates: y = H U^T (x - mean) / scale, with the eigenvectors U of
the covariance and a Hadamard matrix H, after which *every* dimension has variance 1. Cosines and squared errors do not see a
rotation; the smooth L1 distance does, whose threshold is then the same share of every dimension's spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from nexus.training.hadamard import spreading_rotation

Standardisation = Literal["scale", "phi_s"]

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
        if self._frozen:
            return
        rows_MH = features_BTH.detach()[mask_BT.bool()].double().cpu()
        count = rows_MH.shape[0]
        if count == 0:
            return
        mean_H = rows_MH.mean(dim=0)
        shift_H = mean_H - self._mean_H
        total = self._count + count
        self._squared_deviation += float((rows_MH - mean_H).square().sum())
        self._squared_deviation += float(shift_H.square().sum()) * self._count * count / total
        self._take_in(rows_MH - mean_H, shift_H, self._count * count / total)
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

    def rotate(self, scaled_BTH: Tensor) -> Tensor:
        """A prediction of the centred and scaled features, in the axes of `__call__`: here the same."""
        return scaled_BTH

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

    def _take_in(self, deviations_MH: Tensor, shift_H: Tensor, weight: float) -> None:
        """What a subclass gathers of rows around their own mean, which lies `shift_H` from the mean so far."""

    def _require_data(self) -> None:
        if self._count == 0:
            raise ValueError("standardiser: expected features before this call, found none; call `update` first")


class PhiSState(StandardiserState):
    """What a checkpoint keeps of a `PhiSStandardiser`."""

    scatter_HH: Tensor | None
    rotation_HH: Tensor | None
    rotated_at: int


class PhiSStandardiser(FeatureStandardiser):
    """PHI-S: centres, scales by one number, and rotates so that every dimension has variance 1 (arXiv 2410.01680, section 3.3).

    The rotation is computed anew when twice as many vectors were seen, and last when the statistics freeze; with fewer vectors than
    dimensions some directions have no variance, and share what the others have. A head that predicts the features would have to
    learn each new rotation, so it stays in the axes of the features: `rotate` turns its predictions, and only the loss sees it.

    It keeps H x H numbers in float64 while it gathers (128 MiB at a width of 4,096), then the rotation alone.

    Args:
        width: H.
        freeze_after: vectors, at least 2; None waits for eight to each dimension, and no fewer than the parent's default.
    """

    def __init__(self, width: int, *, freeze_after: int | None = None) -> None:
        super().__init__(width, freeze_after=max(4096, 8 * width) if freeze_after is None else freeze_after)
        self._scatter_HH: Tensor | None = torch.zeros(width, width, dtype=torch.float64)
        self._rotation_HH: Tensor | None = None
        self._rotated_at = 0
        self._working_HH: Tensor | None = None
        """The rotation in the dtype and on the device that it was last wanted in."""

    def update(self, features_BTH: Tensor, mask_BT: Tensor) -> None:
        """As the parent's; sometimes turns the axes."""
        super().update(features_BTH, mask_BT)
        if not self._frozen and self._count >= 2 * self._rotated_at and self._count:
            self._turn()

    def freeze(self) -> None:
        """As the parent's; the axes turn for the last time."""
        super().freeze()
        if self._scatter_HH is not None:
            self._turn()
            self._scatter_HH = None

    def __call__(self, features_BTH: Tensor) -> Tensor:
        """Return the standardised and rotated features, in their own dtype. Raises ValueError when nothing was seen yet."""
        return self.rotate(super().__call__(features_BTH))

    def rotate(self, scaled_BTH: Tensor) -> Tensor:
        """A prediction of the centred and scaled features, in the axes of `__call__`."""
        return scaled_BTH @ self._rotation(scaled_BTH).mT

    def inverse(self, standardised_BTH: Tensor) -> Tensor:
        """Undo `__call__`."""
        return super().inverse(standardised_BTH @ self._rotation(standardised_BTH))

    def state_dict(self) -> PhiSState:
        return {
            **super().state_dict(),
            "scatter_HH": None if self._scatter_HH is None else self._scatter_HH.clone(),
            "rotation_HH": None if self._rotation_HH is None else self._rotation_HH.clone(),
            "rotated_at": self._rotated_at,
        }

    def load_state_dict(self, state: PhiSState) -> None:  # type: ignore[override]
        """Continue from `state`. Raises ValueError if its width is another."""
        super().load_state_dict(state)
        self._scatter_HH = None if state["scatter_HH"] is None else state["scatter_HH"].clone()
        self._rotation_HH = None if state["rotation_HH"] is None else state["rotation_HH"].clone()
        self._rotated_at = state["rotated_at"]
        self._working_HH = None

    def _take_in(self, deviations_MH: Tensor, shift_H: Tensor, weight: float) -> None:
        assert self._scatter_HH is not None, "statistics that are frozen take in nothing"
        self._scatter_HH = (self._scatter_HH + deviations_MH.mT @ deviations_MH).addr(shift_H, shift_H, alpha=weight)

    def _turn(self) -> None:
        assert self._scatter_HH is not None
        # Rounding leaves a direction without variance a little on either side of 0.
        variances_H, axes_HH = torch.linalg.eigh(self._scatter_HH / self._count)
        self._rotation_HH = spreading_rotation(variances_H.clamp_min(0.0)) @ axes_HH.mT
        self._rotated_at, self._working_HH = self._count, None

    def _rotation(self, like: Tensor) -> Tensor:
        self._require_data()
        assert self._rotation_HH is not None, "the first vectors turn the axes"
        working_HH = self._working_HH
        if working_HH is None or (working_HH.dtype, working_HH.device) != (like.dtype, like.device):
            working_HH = self._working_HH = self._rotation_HH.to(like)
        return working_HH


STANDARDISERS: Mapping[Standardisation, Callable[[int], FeatureStandardiser]] = {
    "scale": FeatureStandardiser,
    "phi_s": PhiSStandardiser,
}
"""What each name of a standardisation stands for, made from the width of the features."""


def _unit(rows_MH: Tensor) -> Tensor:
    floor = NORM_FLOOR * math.sqrt(rows_MH.shape[-1])
    norms_M1: Tensor = torch.linalg.vector_norm(rows_MH, dim=-1, keepdim=True)
    return rows_MH / norms_M1.clamp_min(floor)
