"""AdamW whose two moments take 8 bits each, with a state that returns bit for bit (Dettmers et al. 2022, arXiv 2110.02861).

bitsandbytes keeps the moments of a parameter in blocks of 256 numbers, each block with its own scale and 256 unevenly spaced
values; parameters below 4,096 numbers stay in 32 bits. Paged, the moments lie in memory that GPU and CPU share, and leave the GPU
when something else wants it; it needs CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import bitsandbytes
import torch
from torch import Tensor

_WRAPPED = bitsandbytes.optim.AdamW8bit._FSDP_WRAPPED_QUANT_STATE_KEY
"""Where bitsandbytes hides the moments in a state dict, from those who would gather them by the shape of their parameter."""


class AdamW8bit(bitsandbytes.optim.AdamW8bit):  # type: ignore[misc]  # bitsandbytes has no types
    """AdamW of bitsandbytes, but for loading: the saved moments go into the buffers that a new optimizer would make.

    The base class takes the loaded tensors themselves, which are never paged: a resumed run would hold all moments on the GPU.

    Args:
        groups: parameter groups as of `torch.optim.AdamW`.
        betas: the decays of the two moments.
        paged: let the moments leave the GPU.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], paged: bool = False
    ) -> None:
        super().__init__(list(groups), lr=lr, betas=betas, is_paged=paged)

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Continue from `state_dict`; what it holds is copied to where each parameter is.

        Raises:
            ValueError: when it belongs to other parameters.
        """
        saved_groups = state_dict["param_groups"]
        found, expected = ([len(group["params"]) for group in groups] for groups in (saved_groups, self.param_groups))
        if found != expected:
            raise ValueError(f"Expected a state for parameter groups of {expected} parameters, found {found}.")
        for number, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            group.update({key: value for key, value in saved.items() if key != "params"})
            for place, (parameter, index) in enumerate(zip(group["params"], saved["params"], strict=True)):
                entry = state_dict["state"].get(index)
                if entry is None:
                    self.state.pop(parameter, None)
                    continue
                if not self.state.get(parameter):
                    self.init_state(group, parameter, number, place)
                own = self.state[parameter]
                own["step"] = entry["step"]
                _copy_moments(own, entry[_WRAPPED])


@torch.no_grad()
def _copy_moments(own: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
    shapes = [
        {key: (value.shape, value.dtype) for key, value in moments.items() if isinstance(value, Tensor)}
        for moments in (own, saved)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Expected moments of the shapes {shapes[0]}, found {shapes[1]}.")
    for key, value in saved.items():
        own[key].copy_(value)
