"""What a sparse autoencoder gives as a teacher: which features of its dictionary are active at each completion token.

JumpReLU autoencoders (Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435, equation 3) read the residual stream of a base
model: z = x W_enc + b_enc, f = z where z > threshold, else 0. The base model is a language model in NF4; the dictionaries stay in
floating point. Only dictionaries of the stream behind a layer (`resid_post`) are read.
Shape letters: N scored tokens, F features, H width of the base model, Z active features of all tokens together.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nexus.errors import ConfigError, TowerLoadError
from nexus.towers.causal_lm import completion_states
from nexus.towers.rows import RowsError
from nexus.towers.targets import ScoreRequest, SparseTargets

SITE = "resid_post"
TENSORS = ("b_dec", "b_enc", "threshold", "w_dec", "w_enc")


class JumpReluSae(nn.Module):
    """One dictionary of features of the residual stream."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    threshold: Tensor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """`w_enc` [H, F], `b_enc` [F], `threshold` [F], `w_dec` [F, H], `b_dec` [H]."""
        super().__init__()
        for name in TENSORS:
            self.register_buffer(name, tensors[name].float())

    @property
    def num_features(self) -> int:
        """Features F of the dictionary."""
        return int(self.w_enc.shape[1])

    def encode(self, states_NH: Tensor) -> Tensor:
        """Activations [N, F] in float32, never negative where the thresholds are not."""
        z_NF = states_NH.float() @ self.w_enc + self.b_enc
        return torch.where(z_NF > self.threshold, z_NF, 0.0)

    def decode(self, active_NF: Tensor) -> Tensor:
        """The states [N, H] that the activations stand for."""
        return active_NF @ self.w_dec + self.b_dec


@dataclass(frozen=True)
class Dictionaries:
    """The dictionaries of one teacher."""

    by_layer: dict[int, JumpReluSae]
    digest: str
    """SHA-256 of their files."""


def load_dictionaries(folder: Path, *, width: int, num_layers: int, device: torch.device) -> Dictionaries:
    """Read `<folder>/resid_post/layer_<L>.../params.safetensors`, one dictionary for a layer.

    Args:
        width: H of the base model.
        num_layers: of the base model.

    Raises:
        TowerLoadError: no dictionary, two for one layer, unreadable files, or tensors that do not fit the base model.
    """
    files: dict[int, Path] = {}
    for path in sorted(folder.glob(f"**/{SITE}/layer_*/params.safetensors")):
        layer = (
            int(re.findall(r"^layer_(\d+)", path.parent.name)[0]) if re.match(r"layer_\d+", path.parent.name) else -1
        )
        if not 0 <= layer < num_layers:
            raise TowerLoadError(
                f"Expected a layer of the base model below {num_layers} in the name of {path.parent}, found another. Correct it."
            )
        if layer in files:
            raise TowerLoadError(
                f"Expected one dictionary for layer {layer} in {folder}, found {files[layer].parent.name} and {path.parent.name}. "
                "Keep one of them."
            )
        files[layer] = path
    if not files:
        raise TowerLoadError(
            f"Expected {SITE}/layer_<number>.../params.safetensors in {folder}, found none. Fetch the dictionaries of that site."
        )
    digest = hashlib.sha256()
    loaded = {}
    for layer, path in sorted(files.items()):
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise TowerLoadError(
                f"Expected readable safetensors in {path}, found: {error}. Fetch the file again."
            ) from None
        digest.update(f"{layer} ".encode() + path.read_bytes())
        _refuse_unfit(path, tensors, width)
        loaded[layer] = JumpReluSae(tensors).to(device)
    return Dictionaries(loaded, digest.hexdigest())


def score_features(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dictionaries: Dictionaries, request: ScoreRequest
) -> dict[int, SparseTargets]:
    """Active features at every completion token, by layer; rows in the request's order.

    The state that is encoded is the one behind the layer at the position before the scored token, as for a language model.

    Raises:
        ConfigError: a layer without a dictionary.
        RowsError: rows that are too long or whose results are not finite.
    """
    layers = request.layers or tuple(dictionaries.by_layer)
    unknown = [layer for layer in layers if layer not in dictionaries.by_layer]
    if unknown:
        known = ", ".join(map(str, dictionaries.by_layer))
        raise ConfigError(f"Expected layers with a dictionary ({known}), found {unknown[0]}. Choose among them.")
    rows, states = completion_states(model, tokenizer, request, layers)
    bad = {}
    targets = {}
    for layer, state_NH in states.items():
        active_NF = dictionaries.by_layer[layer].encode(state_NH)
        wrong_N = ~active_NF.isfinite().all(dim=-1)
        for b, row_id in enumerate(request.row_ids):
            if wrong_N[rows[b] : rows[b + 1]].any():
                bad[row_id] = "not finite"
        places_Z2 = active_NF.nonzero()
        counts_N = torch.bincount(places_Z2[:, 0], minlength=len(active_NF))
        targets[layer] = SparseTargets(
            offsets_B1=rows,
            token_offsets_N1=np.concatenate([[0], counts_N.cumsum(0).cpu().numpy()]).astype(np.int64),
            feature_ids_Z=places_Z2[:, 1].to(torch.int32).cpu().numpy(),
            values_Z=active_NF[places_Z2[:, 0], places_Z2[:, 1]].cpu().numpy(),
            num_features=active_NF.shape[1],
        )
    if bad:
        raise RowsError("Expected finite results from the teacher for every row; quarantine the rows.", bad)
    return targets


def _refuse_unfit(path: Path, tensors: dict[str, Tensor], width: int) -> None:
    missing = [name for name in TENSORS if name not in tensors]
    if missing:
        raise TowerLoadError(
            f"Expected {', '.join(TENSORS)} in {path}, found no {missing[0]}. Only JumpReLU dictionaries are read; fetch one."
        )
    features = tensors["w_enc"].shape[-1]
    expected = {"w_enc": (width, features), "w_dec": (features, width), "b_enc": (features,), "b_dec": (width,)}
    expected["threshold"] = (features,)
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise TowerLoadError(
                f"Expected shape {shape} for {name!r} in {path}, to fit a base model {width} wide, found "
                f"{tuple(tensors[name].shape)}. Use the base model that it was trained on."
            )
