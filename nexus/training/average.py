"""An exponential moving average of the weights that train, to be evaluated and exported in place of the last ones.

avg <- d_t avg + (1 - d_t) w after optimizer step t (1-based), with d_t = min(decay, (1 + t) / (10 + t)): the first steps, whose
weights are far from the last, are forgotten faster, so that short runs profit too (TensorFlow's `num_updates`; Polyak and Juditsky
1992 for the average itself).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn


class AverageState(TypedDict):
    """What a rollback and a resume restore."""

    count: int
    weights: dict[str, Tensor]


class WeightAverage:
    """Follows the parameters of `model` that require a gradient; buffers and frozen weights are not averaged.

    Args:
        decay: of the average, above 0 and below 1; 0.999 averages the last 1,000 steps.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._count = 0
        self._average = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights that an optimizer step has left."""
        self._count += 1
        decay = min(self.decay, (1 + self._count) / (10 + self._count))
        torch._foreach_lerp_(list(self._average.values()), list(self._parameters.values()), 1.0 - decay)

    def state_dict(self) -> AverageState:
        """The averages themselves, by name; not a copy."""
        return {"count": self._count, "weights": dict(self._average)}

    def load_state_dict(self, state: AverageState) -> None:
        """Continue from `state`."""
        self._count = state["count"]
        for name, average in self._average.items():
            average.copy_(state["weights"][name])


def averaged(weights: Mapping[str, Tensor], state: AverageState) -> dict[str, Tensor]:
    """`weights` by name, with the averages of `state` in place of those that train, under all names of a tied weight."""
    by_memory = {id(weights[name]): average for name, average in state["weights"].items()}
    return {name: by_memory.get(id(tensor), tensor) for name, tensor in weights.items()}
