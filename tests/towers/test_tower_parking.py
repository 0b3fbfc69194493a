"""Weights set aside and brought back: all of them, and the model answers as before."""

from __future__ import annotations

from pathlib import Path

import torch

from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.parking import park, unpark
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
