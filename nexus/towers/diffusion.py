"""What an image or video generator gives as a teacher: the noise prediction along its own denoising, and what its blocks held.

The teacher starts from noise that the row's id and a seed decide and walks down its own scheduler in `num_steps` steps, without
guidance, so that every prediction is the denoiser's and no mixture of two. At each step the latents that went in, the prediction
that came out and the outputs of the asked blocks are kept. Images come from a prompt (rectified flow, Esser et al. 2024,
https://arxiv.org/abs/2403.03206), clips from a picture (Blattmann et al. 2023, https://arxiv.org/abs/2311.15127).

Rows run one by one: what a row gives does not depend on its company. The generator of the noise is the CPU's on every device.
Shape letters: B rows, S steps; latents have the teacher's own shape behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nexus.data.media import decode_image
from nexus.errors import ConfigError, DataError
from nexus.towers.rows import RowsError
from nexus.towers.targets import DenoisingTargets, ScoreRequest

_INDEX_OF_IMAGE_STREAM = 1
"""The blocks of a joint transformer return the states of the text, and then those of the image."""


@dataclass(frozen=True)
class PipelineKind:
    """What has to be known of one pipeline class of diffusers to run it as a teacher."""

    denoiser: str
    """Component that predicts the noise."""
    block_lists: tuple[str, ...]
    """Where its blocks are, in the order in which they run: lists of modules, or single ones."""
    state: Callable[[Any], Tensor]
    """Hidden state in what a block returns."""
    from_image: bool
    """Its condition is a picture; otherwise a prompt."""
    settings: Callable[[Any], Mapping[str, Any]]
    """Arguments of a call that turn guidance off and ask for latents of the size that the denoiser was trained on."""


def _first(output: Any) -> Tensor:
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


def _image_stream(output: Any) -> Tensor:
    state: Tensor = output[_INDEX_OF_IMAGE_STREAM]
    return state


def _image_settings(pipeline: Any) -> Mapping[str, Any]:
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    return {"height": size, "width": size, "guidance_scale": 1.0}


def _video_settings(pipeline: Any) -> Mapping[str, Any]:
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return {
        "height": size,
        "width": size,
        "num_frames": pipeline.unet.config.num_frames,
        "min_guidance_scale": 1.0,
        "max_guidance_scale": 1.0,
    }


PIPELINES: Mapping[str, PipelineKind] = {
    "StableDiffusion3Pipeline": PipelineKind(
        "transformer", ("transformer_blocks",), _image_stream, from_image=False, settings=_image_settings
    ),
    "StableVideoDiffusionPipeline": PipelineKind(
        "unet", ("down_blocks", "mid_block", "up_blocks"), _first, from_image=True, settings=_video_settings
    ),
}
"""Class of diffusers -> how it runs."""


class Denoiser:
    """A loaded pipeline as a teacher."""

    def __init__(self, pipeline: Any, kind: PipelineKind) -> None:
        self.pipeline = pipeline
        self.kind = kind
        pipeline.set_progress_bar_config(disable=True)

    @property
    def model(self) -> Any:
        """The component that predicts the noise."""
        return getattr(self.pipeline, self.kind.denoiser)

    @property
    def blocks(self) -> Mapping[str, nn.Module]:
        """Name -> block, in the order in which they run."""
        found: dict[str, nn.Module] = {}
        for name in self.kind.block_lists:
            part = getattr(self.model, name)
            if isinstance(part, nn.ModuleList):
                found.update({f"{name}.{index}": block for index, block in enumerate(part)})
            else:
                found[name] = part
        return found

    @property
    def hidden_size(self) -> int:
        """Width of a transformer's blocks; channels of the outermost blocks of a U-Net."""
        config = self.model.config
        if "block_out_channels" in config:
            return int(config.block_out_channels[0])
        return int(config.num_attention_heads * config.attention_head_dim)


def denoise(denoiser: Denoiser, request: ScoreRequest) -> DenoisingTargets:
    """Predictions and block outputs along the denoising of every row, rows in the request's order.

    Raises:
        ConfigError: a block that the denoiser does not have, or a request without the condition that it takes.
        RowsError: rows whose picture cannot be decoded or whose results are not finite.
    """
    names = tuple(denoiser.blocks)
    unknown = [layer for layer in request.layers if not 0 <= layer < len(names)]
    if unknown:
        raise ConfigError(
            f"Expected blocks of {type(denoiser.model).__name__} between 0 and {len(names) - 1}, found {unknown[0]}. "
            "Choose among them."
        )
    if denoiser.kind.from_image and request.media is None:
        raise ConfigError(
            f"Expected pictures for {type(denoiser.pipeline).__name__}, which animates them, found none. Give it rows with images."
        )
    wanted = [names[layer] for layer in request.layers]
    walks: list[_Walk] = []
    bad: dict[str, str] = {}
    for index, row_id in enumerate(request.row_ids):
        try:
            walk = _walk(denoiser, request, index, wanted)
        except DataError as error:
            bad[row_id] = str(error)
            continue
        if not walk.is_finite():
            bad[row_id] = "not finite"
        walks.append(walk)
    if bad:
        raise RowsError("Expected rows that the teacher can denoise to finite results; mend or drop the rows.", bad)
    return DenoisingTargets(
        timesteps_S=np.array(walks[0].timesteps, dtype=np.float32),
        latents_BS=_stack([walk.latents for walk in walks], torch.float32),
        predictions_BS=_stack([walk.predictions for walk in walks], torch.float32),
        blocks={name: _stack([walk.states[name] for walk in walks], torch.float16) for name in wanted},
    )


# --- one row ------------------------------------------------------------------------------------------------------------------


class _Walk:
    """What one row's denoising showed, step by step."""

    def __init__(self, names: Sequence[str]) -> None:
        self.timesteps: list[float] = []
        self.latents: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.states: dict[str, list[Tensor]] = {name: [] for name in names}

    def is_finite(self) -> bool:
        """Whether all of it is, hidden states within half precision."""
        states = [state.to(torch.float16) for parts in self.states.values() for state in parts]
        return all(bool(part.isfinite().all()) for part in (*self.predictions, *states))


def _walk(denoiser: Denoiser, request: ScoreRequest, index: int, wanted: Sequence[str]) -> _Walk:
    pipeline = denoiser.pipeline
    asked = request.denoising
    if denoiser.kind.from_image:
        assert request.media is not None
        condition: dict[str, Any] = {"image": decode_image(request.media[index])}
    else:
        condition = {"prompt": request.prompts[index]}
    settings = dict(denoiser.kind.settings(pipeline))
    if denoiser.kind.from_image:
        # The codec sees the picture at the size of the clip; the pipeline resizes what is given, but never its shape.
        condition["image"] = condition["image"].resize((settings["width"], settings["height"]))
    digest = hashlib.sha256(f"{asked.seed} {request.row_ids[index]}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    walk = _Walk(wanted)
    with torch.inference_mode(), _recorded(denoiser, walk):
        pipeline(
            **condition,
            **settings,
            num_inference_steps=asked.num_steps,
            generator=generator,
            output_type="latent",
            return_dict=False,
        )
    return walk


@contextmanager
def _recorded(denoiser: Denoiser, walk: _Walk) -> Iterator[None]:
    """Fills `walk` with every call of the denoiser until the context ends."""

    def record_call(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        latents, timestep = (*args, *(kwargs[name] for name in ("hidden_states", "timestep") if name in kwargs))[:2]
        walk.timesteps.append(float(torch.as_tensor(timestep).flatten()[0]))
        walk.latents.append(latents[0].cpu())
        walk.predictions.append(_first(output)[0].cpu())

    def record_block(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            state = denoiser.kind.state(output)
            # A U-Net runs the frames of a clip as a batch; a transformer has the one row in front.
            walk.states[name].append((state if denoiser.kind.from_image else state[0]).cpu())

        return hook

    handles = [denoiser.model.register_forward_hook(record_call, with_kwargs=True)]
    handles += [denoiser.blocks[name].register_forward_hook(record_block(name)) for name in walk.states]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stack(rows: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> np.ndarray:
    stacked: np.ndarray = torch.stack([torch.stack(list(steps)).to(dtype) for steps in rows]).numpy()
    return stacked
