"""Muon for the matrices of the network, AdamW for everything else, as one optimizer.

Muon replaces the momentum of a matrix by the nearest semi-orthogonal matrix, so that all directions of an update have one size
(Jordan 2024, https://kellerjordan.github.io/posts/muon/). Scaled to the root mean square of AdamW's updates, it takes AdamW's
learning rate and weight decay (Liu et al. 2025, https://arxiv.org/abs/2502.16982, eq. 4).

`torch.optim.Muon` orthogonalises one matrix after the other in bfloat16, which has no unit on most CPUs; here the matrices of one
shape go together, in their own dtype. Shape letters: N matrices of one shape, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
"""Of Muon; Jordan's default."""
RMS_OF_ADAMW = 0.2
"""Typical root mean square of AdamW's updates over the learning rate (Liu et al. 2025, section 2.2)."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of a quintic that carries singular values from [0.01, 1] to about [0.7, 1.2] within five iterations (Jordan 2024)."""
ITERATIONS = 5
_TINY = 1e-7
"""Keeps the norm of a gradient that is zero from dividing."""


class MuonAdamW(torch.optim.Optimizer):
    """Muon on `matrices`, AdamW on `others`; both with decoupled weight decay.

    A convolution's weight counts as a matrix from everything that it reads to its outputs. Parameters without a gradient keep their
    value and state.

    Args:
        matrices: parameters of at least two dimensions, [O, ...].
        others: parameter groups as of `torch.optim.AdamW`; `weight_decay` may differ from group to group.
        betas: AdamW's.

    Raises:
        ValueError: for a matrix of fewer than two dimensions.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        matrices = list(matrices)
        flat = [tuple(matrix.shape) for matrix in matrices if matrix.ndim < 2]
        if flat:
            raise ValueError(
                f"Expected matrices of at least two dimensions, found the shape {flat[0]}. AdamW takes it."
            )
        # It gets our groups and state at each step. Hooks are registered with this class and run here alone.
        self._adamw = torch.optim.AdamW([{"params": []}], lr=lr, betas=betas, foreach=True)
        super().__init__(
            [
                {"params": matrices, "weight_decay": weight_decay, "muon": True},
                *({**group, "muon": False} for group in others),
            ],
            {**self._adamw.defaults},
        )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns what `closure`, which recomputes the loss, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a state replaces the dicts, so they are handed over every time.
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._update_matrices(group)
        return loss

    @torch.no_grad()
    def _update_matrices(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self._momentum(parameter) for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        # Nesterov's momentum: the gradient of this step counts once more.
        updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
        for index, update in enumerate(updates):
            by_shape.setdefault((update.flatten(1).shape, update.dtype, update.device), []).append(index)
        for indices in by_shape.values():
            matrices_NOI = orthogonalise(torch.stack([updates[index].flatten(1) for index in indices]))
            rate = group["lr"] * RMS_OF_ADAMW * max(matrices_NOI.shape[1:]) ** 0.5
            for index, matrix_OI in zip(indices, matrices_NOI, strict=True):
                parameters[index].sub_(rate * matrix_OI.view_as(parameters[index]))

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        return momentum


def orthogonalise(matrices_NOI: Tensor) -> Tensor:
    """[N, O, I], each with the singular vectors of its input and singular values near 1; zero stays zero.

    Newton-Schulz iteration of odd quintics: X <- a X + b (X X^T) X + c (X X^T)^2 X (Jordan 2024).
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices_NOI.shape[1] > matrices_NOI.shape[2]
    # X X^T is the smaller of the two products when X is wide.
    wide = matrices_NOI.mT if is_tall else matrices_NOI
    wide = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + _TINY)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if is_tall else wide


def hidden_matrices(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Weights of the linear and convolution layers in `modules` that train, each once.

    Embeddings and output heads are not among them: their rows are looked up or scored one by one, and AdamW serves them better
    (Jordan 2024).
    """
    weights = {
        id(layer.weight): cast(nn.Parameter, layer.weight)
        for module in modules
        for layer in module.modules()
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) and layer.weight.requires_grad
    }
    return list(weights.values())
