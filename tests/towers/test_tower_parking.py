"""Weights set aside and brought back: all of them, and the model answers as before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.parking import FileWeights, park, unpark
from nexus.towers.registry import TeacherSpec
from nexus.towers.targets import ScoreRequest

TEACHER = Path(__file__).parents[2] / "nexus" / "data" / "samples" / "teachers" / "sample-reasoning"


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """All that the model reads, the scales of packed weights included."""
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    assert states, "an NF4 teacher has packed weights"
    scales = [scale for state in states for scale in (state.absmax, state.code, state.offset, state.state2.absmax)]
    return [*model.parameters(), *model.buffers(), *scales]


def test_a_parked_model_wakes_with_equal_answers_and_every_tensor_moved():
    engine = TeacherEngine(load_tower(TeacherSpec("t", str(TEACHER), None, "causal_lm"), device="cpu"), teacher_id="t")
    request = ScoreRequest(("a",), ("Tom has 3 pens.",), ("3+2=5\n#### 5",), None, 1.0, 8, (0,))
    before = engine.score(request)
    model = engine.tower.model
    # Held, so that no new tensor can lie where they do.
    held = [tensor.data for tensor in _tensors(model)]
    homes = {tensor.data_ptr() for tensor in held}
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    copies = [tensor.clone() for tensor in _tensors(model)]
    parked = park(model)
    assert not homes & {tensor.data_ptr() for tensor in _tensors(model)}
    assert parked.num_bytes > 0
    for tensor, copy in zip(_tensors(model), copies, strict=True):
        assert torch.equal(tensor, copy)
    unpark(model, parked)
    assert engine.score(request) == before
    assert tied == (model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr())


def test_a_models_weights_in_a_file_are_let_go_and_read_again_with_equal_answers(tmp_path):
    engine = TeacherEngine(load_tower(TeacherSpec("t", str(TEACHER), None, "causal_lm"), device="cpu"), teacher_id="t")
    request = ScoreRequest(("a",), ("Tom has 3 pens.",), ("3+2=5\n#### 5",), None, 1.0, 8, (0,))
    before = engine.score(request)
    model = engine.tower.model
    copies = [tensor.clone() for tensor in _tensors(model)]
    homes = {tensor.data_ptr() for tensor in _tensors(model)}
    weights = FileWeights([model], tmp_path)
    assert not homes & {tensor.data_ptr() for tensor in _tensors(model)}
    assert weights.num_bytes >= sum(copy.numel() * copy.element_size() for copy in copies)
    assert not list(tmp_path.iterdir()), "the file has no name, so that it ends with the process"
    assert engine.score(request) == before
    resident = _resident_bytes(model)
    weights.release()
    assert _resident_bytes(model) < resident / 2
    for tensor, copy in zip(_tensors(model), copies, strict=True):
        assert torch.equal(tensor, copy)
    weights.prefetch()
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def test_tensors_without_bytes_of_their_own_stay_where_they_are(tmp_path):
    model = torch.nn.Linear(4, 4)
    model.register_buffer("empty", torch.empty(0))
    model.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
    model.register_buffer("elsewhere", torch.empty(3, device="meta"))
    homes = {name: tensor.data_ptr() for name, tensor in model.named_buffers()}
    FileWeights([model], tmp_path)
    assert {name: tensor.data_ptr() for name, tensor in model.named_buffers()} == homes
    assert FileWeights([torch.nn.Identity()], tmp_path).num_bytes == 0


def test_a_disk_that_refuses_leaves_the_model_as_it_was(tmp_path):
    (tmp_path / "file").write_text("no folder")
    model = torch.nn.Linear(4, 4)
    home = model.weight.data_ptr()
    with pytest.raises(OSError, match="file"):
        FileWeights([model], tmp_path / "file")
    assert model.weight.data_ptr() == home


def _resident_bytes(model: torch.nn.Module) -> int:
    """Memory behind the mapping that holds the model's first weight."""
    address = next(model.parameters()).data_ptr()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the weight lies in no mapping")
