"""Loads a pipeline of diffusers component by component: denoiser and text encoders in NF4, the autoencoder in floating point.

diffusers refuses to quantise without a GPU, and its pipelines load whatever `model_index.json` names. Here every component's class
must be one of diffusers or transformers, its weights come from safetensors and must fit exactly, and a matrix is packed as soon as it
is read, so that the floating-point model is never whole in memory. `skip_modules` of a pipeline begin with the component's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from nexus.artifacts import fingerprint_of
from nexus.errors import TowerLoadError
from nexus.towers.checkpoint import open_checkpoint, read_json, weights_digest
from nexus.towers.diffusion import PIPELINES, Denoiser
from nexus.towers.filling import fill, reader_of
from nexus.towers.nf4 import (
    NOTHING_QUANTISED,
    CoverageReport,
    freeze,
    measure_coverage,
    merge_coverage,
    plan_quantisation,
)
from nexus.towers.registry import TeacherSpec

WEIGHTS = "diffusion_pytorch_model"
"""Name of the weights of a component of diffusers."""

LoadTransformer = Callable[..., tuple[Any, CoverageReport, str]]
"""`nexus.towers.loader.load_component`."""


def load_pipeline(
    spec: TeacherSpec, device: torch.device, *, quantise: bool, load_transformer: LoadTransformer
) -> tuple[Denoiser, CoverageReport, str]:
    """The pipeline of `spec`, its coverage over all components, and a hash of all that its targets depend on.

    Args:
        load_transformer: loads a component whose class is transformers' own.

    Raises:
        TowerLoadError: files that are not what the spec demands, or less in NF4 than its policy wants.
    """
    folder = Path(spec.path)
    index = read_json(folder / "model_index.json")
    name = spec.model_class or str(index.get("_class_name"))
    kind = PIPELINES.get(name)
    if kind is None or index.get("_class_name") != name:
        raise TowerLoadError(
            f"Expected a pipeline of class {' or '.join(PIPELINES)} for teacher {spec.id!r}, found {index.get('_class_name')!r} in "
            f"{folder / 'model_index.json'}. Fetch the checkpoint that belongs to it."
        )
    listed = {part: tuple(entry) for part, entry in index.items() if isinstance(entry, list) and None not in entry}
    idle = [skip for skip in spec.skip_modules if skip.partition(".")[0] not in listed]
    if idle:
        raise TowerLoadError(
            f"Expected the skip_modules of teacher {spec.id!r} to begin with one of its components ({', '.join(listed)}), found "
            f"{idle[0]!r}. Correct the name."
        )
    parts: dict[str, Any] = {part: None for part, entry in index.items() if isinstance(entry, list)}
    reports: dict[str, CoverageReport] = {}
    digests: dict[str, Any] = {}
    for part, (library, class_name) in listed.items():
        component = _component_class(spec, part, library, class_name)
        inner = replace(
            spec,
            path=str(folder / part),
            skip_modules=_inner_skips(spec, part),
            min_coverage=0.0,
            unused_weights=(),
            model_class=class_name,
        )
        packed = quantise and part not in spec.skip_modules
        if issubclass(component, transformers.PreTrainedModel):
            parts[part], reports[part], digests[part] = load_transformer(inner, component, device, quantise=packed)
        elif issubclass(component, diffusers.ModelMixin):
            parts[part], reports[part], digests[part] = _load_diffuser(inner, component, device, quantise=packed)
        else:
            parts[part] = _plain(inner, component)
            digests[part] = {path.name: path.read_text() for path in sorted((folder / part).glob("*.json"))}
    coverage = merge_coverage(reports)
    if quantise and coverage.share < spec.min_coverage:
        raise TowerLoadError(
            f"Expected NF4 for at least {spec.min_coverage:.0%} of the parameters of {spec.id!r}, found {coverage.share:.1%}. "
            "Lower its min_coverage if the rest may stay in floating point."
        )
    fingerprint = fingerprint_of(
        {
            "class": name,
            "components": digests,
            "revision": spec.revision,
            "quantisation": ["nf4", "double", *sorted(spec.skip_modules)] if quantise else "none",
        }
    )
    return Denoiser(getattr(diffusers, name)(**parts), kind), coverage, fingerprint


def _inner_skips(spec: TeacherSpec, part: str) -> tuple[str, ...]:
    return tuple(skip.removeprefix(f"{part}.") for skip in spec.skip_modules if skip.startswith(f"{part}."))


def _component_class(spec: TeacherSpec, part: str, library: str, class_name: str) -> Any:
    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    component = getattr(module, class_name, None)
    if not isinstance(component, type):
        raise TowerLoadError(
            f"Expected {part!r} of teacher {spec.id!r} to be of a class of diffusers or transformers, found {library}.{class_name}. "
            "Update it; code that comes with a checkpoint is not run."
        )
    return component


def _plain(spec: TeacherSpec, component: Any) -> Any:
    """A tokenizer, an image processor or a scheduler: files without weights."""
    try:
        return component.from_pretrained(spec.path, local_files_only=True)
    except Exception as error:  # these check little themselves, so that damaged files can raise anything
        raise TowerLoadError(
            f"Expected {spec.path} to hold a {component.__name__}, found: {' '.join(str(error).split())[:200]}. Fetch it again."
        ) from error


def _load_diffuser(
    spec: TeacherSpec, component: Any, device: torch.device, *, quantise: bool
) -> tuple[nn.Module, CoverageReport, str]:
    checkpoint = open_checkpoint(Path(spec.path), stem=WEIGHTS)
    try:
        # Buffers that no checkpoint holds (position tables) are computed here and must not be lost.
        with init_empty_weights(include_buffers=False):
            model: Any = component.from_config(dict(checkpoint.config))
    except Exception as error:  # as in _plain
        raise TowerLoadError(
            f"Expected config.json in {spec.path} to describe a {component.__name__}, found: {' '.join(str(error).split())[:200]}. "
            "Fetch it again."
        ) from error
    read = reader_of(model, checkpoint, teacher_id=spec.id)
    plan = NOTHING_QUANTISED
    if quantise:
        plan = plan_quantisation(model, teacher_id=spec.id, skip_modules=spec.skip_modules, min_coverage=0.0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    fill(model, plan.matrices, read, device, dtype)
    freeze(model)
    report = measure_coverage(model, plan, read, teacher_id=spec.id)
    digest = fingerprint_of({"weights": weights_digest(checkpoint), "config": dict(checkpoint.config)})
    return model, report, digest
