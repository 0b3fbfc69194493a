"""The average of the weights: against its formula, restored exactly, and put in place of trained weights under all their names."""

from __future__ import annotations

import torch
from torch import nn

from nexus.training.average import WeightAverage, averaged


def test_the_average_is_that_of_the_formula_and_leaves_frozen_weights_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.requires_grad_(False)
    average = WeightAverage(model, decay=0.5)
    expected = model[0].weight.detach().double().clone()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 30):
        with torch.no_grad():
            model[0].weight.normal_(generator=generator)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach().double()
    state = average.state_dict()
    assert state["count"] == 29
    assert list(state["weights"]) == ["0.weight"]
    torch.testing.assert_close(state["weights"]["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_restored_average_continues_bit_for_bit() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    one, two = WeightAverage(first, decay=0.9), WeightAverage(second, decay=0.9)
    one.update()
    saved = {"count": 1, "weights": {name: tensor.clone() for name, tensor in one.state_dict()["weights"].items()}}
    two.load_state_dict(saved)
    second.load_state_dict(first.state_dict())
    for average in (one, two):
        average.update()
    for name, tensor in one.state_dict()["weights"].items():
        assert torch.equal(tensor, two.state_dict()["weights"][name])
    assert one.state_dict()["count"] == two.state_dict()["count"] == 2


def test_averages_take_the_place_of_weights_under_all_names_of_a_tied_one() -> None:
    weight, other = torch.zeros(2), torch.ones(2)
    replaced = averaged({"a": weight, "b": weight, "c": other}, {"count": 1, "weights": {"a": torch.full((2,), 7.0)}})
    assert replaced["a"] is replaced["b"]
    assert replaced["a"].tolist() == [7.0, 7.0]
    assert replaced["c"] is other
