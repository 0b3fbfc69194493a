"""Diffusion teachers: what a denoising shows, what it depends on, and what is refused. Collected where diffusers is installed.

Without it `nexus teachers check` says what to type, which test_tower_check.py asserts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus.errors import ConfigError, TowerLoadError
from nexus.towers import loader
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.registry import TeacherSpec, load_registry, spec_of_entry
from nexus.towers.rows import RowsError
from nexus.towers.targets import Denoising, DenoisingTargets, ScoreRequest
from nexus.towers.tiny import write_tiny

IMAGES, CLIPS = "sd3-medium", "svd-xt-1.1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    saved = {name: tmp_path_factory.mktemp(name) / name for name in (IMAGES, CLIPS)}
    for name, folder in saved.items():
        write_tiny(name, folder)
    return saved


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, TeacherEngine]:
    return {
        name: TeacherEngine(load_tower(spec(folder, name), device="cpu"), teacher_id=name)
        for name, folder in folders.items()
    }


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[IMAGES], tmp_path / "copy"))


def spec(folder: Path, name: str, **changes: Any) -> TeacherSpec:
    return replace(spec_of_entry(load_registry().get(name), folder), **changes)


def request(*prompts: str, pictures: tuple[bytes, ...] | None = None, **changes: Any) -> ScoreRequest:
    ids = tuple(f"row-{prompt}" for prompt in prompts)
    return replace(ScoreRequest(ids, prompts, None, pictures, 1.0, 8, ()), **changes)


def ask(engine: TeacherEngine, asked: ScoreRequest) -> DenoisingTargets:
    denoised = engine.score(asked).denoising
    assert denoised is not None
    return denoised


def test_predictions_belong_to_the_prompt_and_the_seed_and_not_to_the_company(
    engines: dict[str, TeacherEngine],
) -> None:
    engine = engines[IMAGES]
    assert (engine.num_layers, engine.hidden_size, engine.label_texts) == (3, 64, None)
    both = ask(engine, request("a dog", "a cat", layers=(0, 2)))
    assert both.predictions_BS.shape == both.latents_BS.shape == (2, 4, 4, 8, 8)
    assert {name: state.shape for name, state in both.blocks.items()} == {
        "transformer_blocks.0": (2, 4, 64, 64),
        "transformer_blocks.2": (2, 4, 64, 64),
    }
    assert both.timesteps_S[0] == 1000
    assert (np.diff(both.timesteps_S) < 0).all()
    alone = ask(engine, request("a cat", layers=(2,)))
    np.testing.assert_array_equal(alone.predictions_BS[0], both.predictions_BS[1])
    np.testing.assert_array_equal(alone.blocks["transformer_blocks.2"][0], both.blocks["transformer_blocks.2"][1])
    other_prompt = ask(engine, replace(request("a hat"), row_ids=("row-a cat",)))
    np.testing.assert_array_equal(other_prompt.latents_BS[0, 0], alone.latents_BS[0, 0])
    assert np.abs(other_prompt.predictions_BS - alone.predictions_BS).max() > 0.01
    other_seed = ask(engine, request("a cat", denoising=Denoising(seed=1, num_steps=2)))
    assert other_seed.predictions_BS.shape[1] == 2
    assert np.abs(other_seed.latents_BS[0, 0] - alone.latents_BS[0, 0]).max() > 0.1


def test_a_prediction_is_the_denoisers_own_for_the_latents_that_went_in(engines: dict[str, TeacherEngine]) -> None:
    engine = engines[IMAGES]
    assert engine.tower.denoiser is not None
    denoised = ask(engine, request("a cat"))
    pipeline = engine.tower.denoiser.pipeline
    with torch.no_grad():
        prompt, _, pooled, _ = pipeline.encode_prompt("a cat", None, None, do_classifier_free_guidance=False)
        expected = engine.tower.model(
            hidden_states=torch.from_numpy(denoised.latents_BS[0]),
            timestep=torch.from_numpy(denoised.timesteps_S),
            encoder_hidden_states=prompt.expand(4, -1, -1),
            pooled_projections=pooled.expand(4, -1),
        ).sample
    np.testing.assert_allclose(denoised.predictions_BS[0], expected.numpy(), atol=1e-4)


def test_clips_are_denoised_from_a_picture(engines: dict[str, TeacherEngine], png: Callable[[int], bytes]) -> None:
    engine = engines[CLIPS]
    assert (engine.num_layers, engine.hidden_size) == (5, 64)
    both = ask(engine, request("", " ", pictures=(png(0), png(1)), layers=(0, 2)))
    # Two frames; four channels of noise, and four of the picture behind them.
    assert both.latents_BS.shape == (2, 4, 2, 8, 8, 8)
    assert both.predictions_BS.shape == (2, 4, 2, 4, 8, 8)
    assert {name: state.shape for name, state in both.blocks.items()} == {
        "down_blocks.0": (2, 4, 2, 64, 4, 4),
        "mid_block": (2, 4, 2, 128, 4, 4),
    }
    swapped = ask(engine, request("", pictures=(png(1),)))
    assert np.abs(swapped.predictions_BS[0] - both.predictions_BS[0]).max() > 0.01
    with pytest.raises(ConfigError, match="Expected pictures for StableVideoDiffusionPipeline"):
        engine.score(request(""))
    with pytest.raises(RowsError, match=r"row- : expected an image file"):
        engine.score(request("", " ", pictures=(png(0), b"text")))


def test_four_bits_reach_the_denoiser_and_the_text_encoders_and_not_the_autoencoder(
    engines: dict[str, TeacherEngine], folders: dict[str, Path]
) -> None:
    coverage = engines[IMAGES].tower.coverage
    quantised = {module.name for module in coverage.modules if module.quantised}
    assert {name.partition(".")[0] for name in quantised} == {
        "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"
    }  # fmt: skip
    assert "transformer.proj_out" in coverage.left_float
    assert 0.5 < coverage.share < coverage.quantisable_share < 1
    assert coverage.total_params == sum(module.parameters for module in coverage.modules)
    assert 0.08 < coverage.max_weight_error < 0.12
    plain = TeacherEngine(load_tower(spec(folders[IMAGES], IMAGES), device="cpu", quantise=False), teacher_id=IMAGES)
    assert plain.tower.coverage.quantised_params == 0
    assert plain.fingerprint != engines[IMAGES].fingerprint
    ours, theirs = (ask(engine, request("a cat")).predictions_BS.ravel() for engine in (engines[IMAGES], plain))
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.98
    original = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folders[IMAGES], local_files_only=True, torch_dtype=torch.float32
    )
    latents = torch.from_numpy(ask(plain, request("a cat")).latents_BS[0, :1])
    expected = original(
        "a cat", height=16, width=16, num_inference_steps=4, guidance_scale=1.0, latents=latents, output_type="latent"
    ).images
    last = ask(plain, request("a cat"))
    step = last.timesteps_S[-1] / 1000
    np.testing.assert_allclose(
        last.latents_BS[0, -1] - step * last.predictions_BS[0, -1], expected[0].numpy(), atol=1e-3
    )


def test_blocks_that_are_not_there_and_results_that_are_not_finite_are_told(folders: dict[str, Path]) -> None:
    engine = TeacherEngine(load_tower(spec(folders[IMAGES], IMAGES), device="cpu"), teacher_id=IMAGES)
    with pytest.raises(ConfigError, match="blocks of SD3Transformer2DModel between 0 and 2, found 3"):
        engine.score(request("a", layers=(3,)))
    engine.tower.model.proj_out.bias.fill_(torch.nan)
    with pytest.raises(RowsError, match="row-a: not finite"):
        engine.score(request("a"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"skip_modules": ("vea",)}, r"begin with one of its components \(.*vae.*found 'vea'"),
        ({"skip_modules": ("transformer.nothing",)}, "'nothing' matches none"),
        ({"min_coverage": 0.95}, "Expected NF4 for at least 95% of the parameters of 'sd3-medium'"),
        ({"model_class": "StableVideoDiffusionPipeline"}, "found 'StableDiffusion3Pipeline' in"),
    ],
)
def test_policies_that_do_not_fit_the_pipeline_are_refused(
    folders: dict[str, Path], changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(TowerLoadError, match=match):
        load_tower(spec(folders[IMAGES], IMAGES, **changes), device="cpu")


def _drop_a_tensor(copy: Path) -> None:
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path)


def _change_a_shape(copy: Path) -> None:
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "proj_out.bias": torch.zeros(3)}, path)


def _break_a_config(copy: Path) -> None:
    (copy / "transformer" / "config.json").write_text(json.dumps({"num_layers": "three"}))


def _foreign_class(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "vae": ["my_code", "MyVae"]}))


def _break_a_tokenizer(copy: Path) -> None:
    shutil.rmtree(copy / "scheduler")


def _pickle(copy: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").rename(copy / "vae" / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_drop_a_tensor, r"found 1 missing \(proj_out.bias\)"),
        (_change_a_shape, r"Expected shape \(4,\) for 'proj_out.bias' of teacher 'sd3-medium', found \(3,\)"),
        (_break_a_config, "to describe a SD3Transformer2DModel, found"),
        (_foreign_class, "'vae' of teacher 'sd3-medium' .*found my_code.MyVae"),
        (_break_a_tokenizer, "to hold a FlowMatchEulerDiscreteScheduler, found"),
        (_pickle, "Only safetensors are read"),
    ],
)
def test_damaged_pipelines_are_refused_in_one_line(copy: Path, damage: Callable[[Path], None], match: str) -> None:
    damage(copy)
    with pytest.raises(TowerLoadError, match=match) as caught:
        load_tower(spec(copy, IMAGES), device="cpu")
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_says_what_to_type(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "find_spec", lambda _: None)
    with pytest.raises(TowerLoadError, match=r"Type: pip install 'nexus-distill\[diffusion\]'"):
        load_tower(spec(folders[IMAGES], IMAGES), device="cpu")
