"""Sparse autoencoders: the encoder against a loop in float64, the files, and what a loaded one gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus.errors import ConfigError, TowerLoadError
from nexus.towers.blocks import recorded_blocks
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.registry import TeacherSpec, load_registry, spec_of_entry
from nexus.towers.rows import RowsError
from nexus.towers.sae import JumpReluSae, load_dictionaries
from nexus.towers.targets import ScoreRequest
from nexus.towers.tiny import write_tiny

ID = "gemma-scope-2-27b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sae")
    write_tiny(ID, path)
    return path


@pytest.fixture(scope="module")
def spec(folder: Path) -> TeacherSpec:
    return spec_of_entry(load_registry().get(ID), folder, base=folder / "base")


@pytest.fixture(scope="module")
def engine(spec: TeacherSpec) -> TeacherEngine:
    return TeacherEngine(load_tower(spec, device="cpu"), teacher_id=ID)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "resid_post", tmp_path / "copy" / "resid_post")).parent


def test_activations_and_reconstruction_equal_a_loop_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w_enc": (6, 9), "b_enc": (9,), "threshold": (9,), "w_dec": (9, 6), "b_dec": (6,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["threshold"].abs_()
    sae, states_NH = JumpReluSae(tensors), torch.randn(5, 6, generator=generator)
    expected_NF = np.zeros((5, 9))
    for n in range(5):
        for f in range(9):
            z = sum(float(states_NH[n, h]) * float(tensors["w_enc"][h, f]) for h in range(6)) + float(
                tensors["b_enc"][f]
            )
            expected_NF[n, f] = z if z > float(tensors["threshold"][f]) else 0.0
    active_NF = sae.encode(states_NH)
    np.testing.assert_allclose(active_NF.numpy(), expected_NF, atol=1e-5)
    assert 0 < (expected_NF == 0).mean() < 1
    expected_NH = expected_NF @ tensors["w_dec"].double().numpy() + tensors["b_dec"].double().numpy()
    np.testing.assert_allclose(sae.decode(active_NF).numpy(), expected_NH, atol=1e-5)
    assert sae.num_features == 9


def test_features_are_those_of_the_base_models_states_before_each_token(
    engine: TeacherEngine, text_request: Callable[..., ScoreRequest]
) -> None:
    targets = engine.score(text_request(("ab", "a longer one"), ("cd", "e")))
    assert (engine.role, targets.tokens, dict(targets.hidden)) == ("sae", None, {})
    assert targets.features is not None
    assert list(targets.features) == [0, 2]
    tokenizer, dictionaries = engine.tower.tokenizer, engine.tower.dictionaries
    assert tokenizer is not None
    assert dictionaries is not None
    ids = tokenizer("ab\ncd")["input_ids"]
    with torch.no_grad(), recorded_blocks(engine.tower.model, (0, 2)) as recorded:
        engine.tower.model(input_ids=torch.tensor([ids]))
    for layer, sparse in targets.features.items():
        dense_NF = np.zeros((5, sparse.num_features), np.float32)
        for n in range(5):
            part = slice(sparse.token_offsets_N1[n], sparse.token_offsets_N1[n + 1])
            dense_NF[n, sparse.feature_ids_Z[part]] = sparse.values_Z[part]
        assert sparse.offsets_B1.tolist() == [0, 3, 5]
        # Three tokens: c, d and the end, predicted at the line feed, c and d.
        expected_NF = dictionaries.by_layer[layer].encode(recorded[layer][0, 2:5])
        np.testing.assert_allclose(dense_NF[:3], expected_NF.numpy(), atol=1e-3)
        assert (sparse.values_Z > 1).all()
        assert 0 < len(sparse.values_Z) < dense_NF.size


def test_a_layer_may_be_chosen_among_those_with_a_dictionary(
    engine: TeacherEngine, text_request: Callable[..., ScoreRequest]
) -> None:
    assert list(engine.score(text_request(("ab",), ("cd",), layers=(2,))).features or ()) == [2]
    with pytest.raises(ConfigError, match=r"layers with a dictionary \(0, 2\), found 1"):
        engine.score(text_request(("ab",), ("cd",), layers=(1,)))


def test_equality_of_targets_sees_a_feature(engine: TeacherEngine, text_request: Callable[..., ScoreRequest]) -> None:
    targets = engine.score(text_request(("ab",), ("cd",)))
    assert targets.features is not None
    assert engine.score(text_request(("ab",), ("cd",))) == targets
    other = replace(targets.features[0], values_Z=targets.features[0].values_Z * 2)
    assert replace(targets, features={**targets.features, 0: other}) != targets


def test_states_that_are_not_finite_name_their_row(
    engine: TeacherEngine, text_request: Callable[..., ScoreRequest]
) -> None:
    assert engine.tower.dictionaries is not None
    bias = engine.tower.dictionaries.by_layer[0].b_enc
    kept = bias.clone()
    bias[3] = torch.inf
    with pytest.raises(RowsError, match="row-1: not finite"):
        engine.score(text_request(("ab", "c"), ("cd", "e")))
    bias.copy_(kept)


def test_the_fingerprint_is_that_of_base_and_dictionaries(engine: TeacherEngine, spec: TeacherSpec, copy: Path) -> None:
    path = copy / "resid_post" / "layer_2_width_256_l0_small" / "params.safetensors"
    same = load_tower(replace(spec, path=str(copy)), device="cpu")
    assert same.fingerprint == engine.fingerprint
    tensors = load_file(path)
    save_file({**tensors, "threshold": tensors["threshold"] * 2}, path)
    assert load_tower(replace(spec, path=str(copy)), device="cpu").fingerprint != engine.fingerprint
    assert engine.tower.coverage.share > 0.6


def test_a_spec_without_a_base_model_is_refused(spec: TeacherSpec) -> None:
    with pytest.raises(TowerLoadError, match="the model that the dictionaries"):
        load_tower(replace(spec, base_path=None), device="cpu")


def load(folder: Path, *, width: int = 64, num_layers: int = 3) -> None:
    load_dictionaries(folder, width=width, num_layers=num_layers, device=torch.device("cpu"))


def test_files_that_are_no_dictionaries_of_the_base_model_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(TowerLoadError, match=r"found none\. Fetch the dictionaries"):
        load(tmp_path / "nowhere")
    with pytest.raises(TowerLoadError, match="below 2 in the name of"):
        load(copy, num_layers=2)
    with pytest.raises(TowerLoadError, match=r"\(128, 256\) for 'w_enc'.*128 wide, found \(64, 256\)"):
        load(copy, width=128)
    site = copy / "resid_post"
    shutil.copytree(site / "layer_2_width_256_l0_small", site / "layer_2_width_256_l0_big")
    with pytest.raises(TowerLoadError, match=r"one dictionary for layer 2 .*l0_big and layer_2_width_256_l0_small"):
        load(copy)
    shutil.rmtree(site / "layer_2_width_256_l0_big")
    path = site / "layer_0_width_256_l0_small" / "params.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "threshold"}, path)
    with pytest.raises(TowerLoadError, match="found no threshold"):
        load(copy)
    path.write_bytes(b"broken")
    with pytest.raises(TowerLoadError, match="readable safetensors"):
        load(copy)
    (site / "layer_x").mkdir()
    shutil.copy(path, site / "layer_x")
    with pytest.raises(TowerLoadError, match=r"in the name of .*layer_x"):
        load(copy)


def test_rows_with_media_are_refused(engine: TeacherEngine) -> None:
    with pytest.raises(ConfigError, match="rows of text for the sae 'gemma-scope-2-27b', found media"):
        engine.score(ScoreRequest(("a",), ("b",), ("c",), (b"",), 1.0, 8, ()))
