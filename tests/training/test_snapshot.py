"""Copies of the training state: exact, independent of what they were taken from, and usable more than once."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nexus.training.snapshot import (
    TrainingState,
    all_finite,
    capture_random_state,
    copy_buffers,
    copy_tree,
    drop_gradients,
    named_buffers,
    optimizer_tensors,
    restore_buffers,
    restore_random_state,
    return_tree,
    trained_parameters,
)


class Counting:
    """A stateful part whose state holds every kind of value."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {
            "count": 0,
            "tensor": torch.zeros(3),
            "list": [torch.ones(2), 1],
            "queue": deque([1, 2]),
        }

    def advance(self) -> None:
        self.state["count"] += 1
        self.state["tensor"] += 1.0
        self.state["list"][0] *= 2.0
        self.state["queue"].append(self.state["count"])

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Reassigning(nn.Module):
    """Replaces a buffer by another tensor in its forward pass, and lets one grow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("history", torch.zeros(1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * inputs.detach()
        self.history = torch.cat([self.history, inputs.detach()[:1]])
        return inputs * self.weight


def build() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 1e-2}, {"params": [*model[1].parameters(), *model[3].parameters()]}],
        lr=1e-3,
    )
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        inputs = torch.randn(6, 4) + random.random() + float(np.random.rand())
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        scheduler.step()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
    )


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, (Tensor, np.ndarray)):
        return (
            type(left) is type(right)
            and left.dtype == right.dtype
            and bool(np.array_equal(np.asarray(left), np.asarray(right)))
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


# The whole state.


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_restored_state_is_bit_for_bit_what_was_captured_however_often(steps_before: int) -> None:
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, steps_before)
    before = everything(model, optimizer, scheduler)
    state = TrainingState()
    state.capture(model, optimizer, {"scheduler": scheduler})
    after: list[dict[str, Any]] = []
    for _ in range(3):  # restoring by reference survives once and is corrupted by the steps that follow
        state.restore(model, optimizer, {"scheduler": scheduler})
        assert equal(everything(model, optimizer, scheduler), before)
        train(model, optimizer, scheduler, 4)
        after.append(everything(model, optimizer, scheduler))
    assert not equal(after[0], before)
    assert equal(after[0], after[1])
    assert equal(after[0], after[2])


def test_restoring_drops_gradients_and_keeps_the_parameter_objects() -> None:
    model, optimizer, scheduler = build()
    state = TrainingState()
    state.capture(model, optimizer, {})
    identities = [parameter.data_ptr() for parameter in model.parameters()]
    train(model, optimizer, scheduler, 1)
    state.restore(model, optimizer, {})
    assert [parameter.data_ptr() for parameter in model.parameters()] == identities
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not optimizer.state  # there were no moments yet when the state was captured


def test_moments_that_were_lost_are_made_anew() -> None:
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, 2)
    before = everything(model, optimizer, scheduler)
    state = TrainingState()
    state.capture(model, optimizer, {"scheduler": scheduler})
    optimizer.state.clear()
    state.restore(model, optimizer, {"scheduler": scheduler})
    assert equal(everything(model, optimizer, scheduler), before)


def test_a_slot_is_reused_without_allocating() -> None:
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, 1)
    state = TrainingState()
    state.capture(model, optimizer, {"scheduler": scheduler})
    held = {tensor.data_ptr() for tensor in (*state._parameters, *state._buffers.values())}
    size = state.num_bytes
    train(model, optimizer, scheduler, 1)
    latest = everything(model, optimizer, scheduler)
    state.capture(model, optimizer, {"scheduler": scheduler})
    assert {tensor.data_ptr() for tensor in (*state._parameters, *state._buffers.values())} == held
    assert state.num_bytes == size
    train(model, optimizer, scheduler, 1)
    state.restore(model, optimizer, {"scheduler": scheduler})
    assert equal(everything(model, optimizer, scheduler), latest)


def test_parts_are_copied_in_both_directions() -> None:
    model, optimizer, _ = build()
    part = Counting()
    part.advance()
    expected = copy.deepcopy(part.state)
    state = TrainingState()
    state.capture(model, optimizer, {"part": part})
    for _ in range(2):
        part.advance()
        state.restore(model, optimizer, {"part": part})
        assert equal(part.state, expected)


def test_only_what_trains_is_copied() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 2, bias=False))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    state = TrainingState()
    state.capture(model, optimizer, {})
    assert state.num_bytes == 64 * 2 * 4


def test_trained_parameters_are_the_models_and_the_optimizers_each_once() -> None:
    model, outside = nn.Linear(2, 2), nn.Parameter(torch.zeros(3))
    model.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([model.weight, model.bias, outside], lr=0.1)
    found = trained_parameters(model, optimizer)
    assert {id(parameter) for parameter in found} == {id(model.weight), id(model.bias), id(outside)}
    assert len(found) == 3
    for parameter in found:
        parameter.grad = torch.ones_like(parameter)
    drop_gradients(model, optimizer)
    assert all(parameter.grad is None for parameter in found)


def test_a_parameter_that_began_to_train_makes_new_room_in_the_slot() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    state = TrainingState()
    state.capture(model, optimizer, {})
    model.bias.requires_grad_(True)
    state.capture(model, optimizer, {})
    bias = model.bias.detach().clone()
    with torch.no_grad():
        model.bias += 1.0
    state.restore(model, optimizer, {})
    assert torch.equal(model.bias, bias)


# Buffers.


def test_buffers_that_the_forward_pass_replaced_get_their_value_back() -> None:
    model = Reassigning()
    saved = copy_buffers(model, {})
    model(torch.tensor([1.0, 2.0]))
    assert model.history.shape == (2,)
    restore_buffers(model, saved)
    assert not model.average.any()
    assert model.history.shape == (1,)
    assert {name for name, *_ in named_buffers(model)} == {"average", "history"}
    model(torch.tensor([1.0, 2.0]))
    restore_buffers(model, saved)  # the saved copy did not become the live buffer
    assert not model.average.any()


def test_a_buffer_that_holds_nothing_is_none() -> None:
    model = nn.BatchNorm1d(3, track_running_stats=False)
    model.register_buffer("kept", torch.ones(2))
    assert list(copy_buffers(model, {})) == ["kept"]


def test_buffers_registered_since_are_left_alone() -> None:
    model = nn.Sequential(Reassigning())
    saved = copy_buffers(model, {})
    assert set(saved) == {"0.average", "0.history"}
    model[0].register_buffer("late", torch.full((2,), 7.0))
    restore_buffers(model, saved)
    assert model[0].late.tolist() == [7.0, 7.0]


# Trees.


def test_a_copied_tree_is_equal_and_independent() -> None:
    tree = {
        "tensor": torch.arange(3.0),
        "ordered": OrderedDict(a=[torch.ones(1), (2, "x")]),
        "leaf": {1, 2},
        "none": None,
        "weight": nn.Parameter(torch.ones(2)),
    }
    copied = copy_tree(tree)
    assert equal(copied["tensor"], tree["tensor"])
    assert type(copied["ordered"]) is OrderedDict
    assert copied["ordered"]["a"][1] == (2, "x")
    assert copied["leaf"] == {1, 2}
    assert copied["leaf"] is not tree["leaf"]
    assert not copied["weight"].requires_grad
    tree["tensor"] += 1.0
    tree["ordered"]["a"][0] += 1.0
    assert copied["tensor"].tolist() == [0.0, 1.0, 2.0]
    assert copied["ordered"]["a"][0].item() == 1.0


@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(3, dtype=torch.float64), "text", None])
def test_a_slot_that_does_not_fit_is_replaced(other: object) -> None:
    source = torch.arange(3.0)
    copied = copy_tree({"a": source, "b": [source]}, {"a": other, "b": other})
    assert torch.equal(copied["a"], source)
    assert torch.equal(copied["b"][0], source)
    returned = return_tree({"a": other, "b": other}, copied)
    assert torch.equal(returned["a"], source)
    assert torch.equal(returned["b"][0], source)
    assert returned["a"].data_ptr() != copied["a"].data_ptr()


def test_a_slot_and_a_live_tree_that_fit_are_written_in_place() -> None:
    first, second = {"a": [torch.zeros(2)]}, {"a": [torch.ones(2)]}
    slot = copy_tree(first)
    pointer = slot["a"][0].data_ptr()
    assert copy_tree(second, slot)["a"][0].data_ptr() == pointer
    live = {"a": [torch.full((2,), 5.0)]}
    returned = return_tree(live, slot)
    assert returned["a"][0].data_ptr() == live["a"][0].data_ptr()
    assert live["a"][0].tolist() == [1.0, 1.0]


# Generators and finiteness.


def test_all_generators_return_to_the_captured_state() -> None:
    state = capture_random_state()

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw()
    restore_random_state(state)
    assert draw() == first
    assert draw() != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_is_found(dtype: torch.dtype, bad: float) -> None:
    tensors = [torch.zeros(5, dtype=dtype), torch.ones(3, 3, dtype=dtype)]
    assert all_finite(tensors)
    tensors[1][2, 1] = bad
    assert not all_finite(tensors)


def test_large_finite_numbers_are_finite_and_other_tensors_are_ignored() -> None:
    assert all_finite([torch.full((10,), 1e38)])  # their sum of squares is not
    assert all_finite([torch.full((10,), 6e4, dtype=torch.float16)])
    assert all_finite([torch.arange(3), torch.zeros(0), torch.tensor([True])])
    assert all_finite([])


def test_optimizer_tensors_are_all_moments_and_counters() -> None:
    model, optimizer, scheduler = build()
    assert optimizer_tensors(optimizer) == []
    train(model, optimizer, scheduler, 1)
    num_parameters = len(list(model.parameters()))
    assert len(optimizer_tensors(optimizer)) == 3 * num_parameters  # step, first and second moment


def test_plain_numbers_in_an_optimizers_state_are_kept() -> None:
    weight = nn.Parameter(torch.ones(2))
    model = nn.ParameterList([weight])
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"steps": 3, "moments": (torch.ones(2),)}
    state = TrainingState()
    state.capture(model, optimizer, {})
    optimizer.state[weight]["steps"] = 9
    optimizer.state[weight]["moments"][0].zero_()
    state.restore(model, optimizer, {})
    assert optimizer.state[weight]["steps"] == 3
    assert optimizer.state[weight]["moments"][0].tolist() == [1.0, 1.0]
    assert state.num_bytes == 2 * 8
    assert len(optimizer_tensors(optimizer)) == 1
