"""Filling a model that was built without weights: exactly the checkpoint's, packed where asked, tied where tied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nexus.errors import TowerLoadError
from nexus.towers.checkpoint import open_checkpoint
from nexus.towers.filling import MAX_WEIGHT_ERROR, dequantised, fill, reader_of, tied_names


class Model(nn.Module):
    """Everything that a tensor can be: matrix with bias, tied embedding, norm, integer buffer, buffer that is not stored."""

    steps: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        self.again = self.embedding
        self.inner = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("nothing", None, persistent=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {name: tensor for name, tensor in Model().state_dict().items() if name != "again.weight"}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    return tmp_path


def test_a_filled_model_has_the_checkpoints_tensors_ties_and_computed_buffers(folder: Path) -> None:
    with init_empty_weights(include_buffers=False):
        model = Model()
    assert tied_names(model)["again.weight"] == "embedding.weight"
    read = reader_of(model, open_checkpoint(folder), teacher_id="tiny")
    fill(model, ("inner.0",), read, torch.device("cpu"), torch.float32)
    stored = load_file(folder / "model.safetensors")
    assert model.again.weight is model.embedding.weight
    assert torch.equal(read("again.weight"), stored["embedding.weight"])
    assert torch.equal(model.embedding.weight, stored["embedding.weight"])
    assert torch.equal(model.inner[1].weight, stored["inner.1.weight"])
    assert int(model.steps) == 7
    assert model.steps.dtype == torch.int64
    assert model.table.tolist() == [0, 1, 2, 3]
    matrix, original = dequantised(model.inner[0]), stored["inner.0.weight"]
    assert 0 < (matrix - original).norm() / original.norm() < MAX_WEIGHT_ERROR
    states = torch.randn(3, 64)
    expected = states @ matrix.T + stored["inner.0.bias"]
    torch.testing.assert_close(model.inner[0](states), expected, rtol=1e-4, atol=1e-4)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())


def test_tensors_that_are_missing_unexpected_or_of_another_shape_are_refused(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    cases = {
        r"1 missing \(inner.0.bias\)": {name: t for name, t in stored.items() if name != "inner.0.bias"},
        r"1 unexpected \(extra\)": {**stored, "extra": torch.zeros(1)},
        r"shape \(128,\) for 'inner.0.bias' of teacher 'tiny', found \(5,\)": {
            **stored,
            "inner.0.bias": torch.zeros(5),
        },
    }
    for match, state in cases.items():
        save_file(state, folder / "model.safetensors")
        with pytest.raises(TowerLoadError, match=match):
            reader_of(Model(), open_checkpoint(folder), teacher_id="tiny")
