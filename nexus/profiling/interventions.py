"""What a block can be made to return beside its input: an average update, a random one, or less of its own output.

Shape letters: B rows, T time, D width, K principal components.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nexus.profiling.perturbation import Replacement
from nexus.profiling.spectral import Subspace


def mean_update(update_D: np.ndarray) -> Replacement:
    """Return mean-ablation: the block adds the mean of its updates over the data to every token, whatever the token.

    What is left of a layer that only shifts its input is then the layer itself, unlike when it is skipped.
    """

    def replace(input_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        return input_BTD + torch.from_numpy(update_D).to(output_BTD)

    return replace


def noise(layer: int, sample_ids_B: Sequence[str], mask_BT: Tensor | None, *, seed: int) -> Replacement:
    """Return noise ablation: the update of each token is replaced by Gaussian noise of the same root mean square.

    The draws belong to the seed, the layer, the sample and the token's place among the real tokens: neither padding nor the other
    samples of a batch change them.

    Args:
        mask_BT: 1 at real tokens; None where all are, or where the mask is not the blocks'.
    """

    def replace(input_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        update_BTD = (output_BTD - input_BTD).float()
        size_BT1 = update_BTD.square().mean(dim=-1, keepdim=True).sqrt()
        unit_BTD = torch.zeros(update_BTD.shape)
        real_BT = None if mask_BT is None or mask_BT.shape != update_BTD.shape[:2] else mask_BT.bool().cpu()
        for row, sample_id in enumerate(sample_ids_B):
            digest = hashlib.sha256(f"{seed}/{layer}/{sample_id}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
            if real_BT is None:
                unit_BTD[row] = torch.randn(unit_BTD.shape[1:], generator=generator)
            else:
                num_real = int(real_BT[row].sum())
                unit_BTD[row, real_BT[row]] = torch.randn(num_real, unit_BTD.shape[-1], generator=generator)
        return input_BTD + (size_BT1 * unit_BTD.to(size_BT1.device)).to(input_BTD.dtype)

    return replace


def reconstruction(subspace: Subspace) -> Replacement:
    """Return the projection of the block's own output x onto its principal subspace: mean + (x - mean) V^T V."""

    def replace(input_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        del input_BTD
        mean_D, basis_KD = (
            torch.from_numpy(array).to(output_BTD.device, torch.float32)
            for array in (subspace.mean_D, subspace.basis_KD)
        )
        centred_BTD = output_BTD.float() - mean_D
        return (mean_D + (centred_BTD @ basis_KD.T) @ basis_KD).to(output_BTD.dtype)

    return replace
