"""AdamW with moments of 8 bits: near AdamW, a fraction of its memory, and a state that returns bit for bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from nexus.training.eight_bit import AdamW8bit
from nexus.training.snapshot import TrainingState, optimizer_tensors

BETAS = (0.9, 0.95)


def make_model() -> nn.Sequential:
    """Weights above and biases below the size that bitsandbytes quantises."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


def make_optimizer(model: nn.Module) -> AdamW8bit:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return AdamW8bit(groups, lr=1e-2, betas=BETAS)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 64, generator=generator)
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_it_learns_as_adamw_does_with_a_third_of_the_moments_memory() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    losses = train(model, optimizer, range(60))
    reference = make_model()
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=BETAS, weight_decay=0.1)
    expected = train(reference, plain, range(60))
    assert losses[0] == expected[0]
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] == pytest.approx(expected[-1], rel=0.1)
    sizes = [sum(tensor.nbytes for tensor in optimizer_tensors(o)) for o in (optimizer, plain)]
    assert sizes[0] < sizes[1] / 3
    large = optimizer.state[next(model.parameters())]
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8


def test_a_rollback_returns_weights_and_moments_bit_for_bit_and_twice() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    start, later = TrainingState(), TrainingState()
    start.capture(model, optimizer, {})
    train(model, optimizer, range(5))
    later.capture(model, optimizer, {})
    undisturbed = train(model, optimizer, range(5, 12))
    final = weights_of(model)
    for _ in range(2):
        train(model, optimizer, range(100, 103))
        buffers = {id(tensor) for tensor in optimizer_tensors(optimizer)}
        later.restore(model, optimizer, {})
        # In place: moments that are paged stay so.
        assert {id(tensor) for tensor in optimizer_tensors(optimizer)} == buffers
        assert train(model, optimizer, range(5, 12)) == undisturbed
        assert equal(weights_of(model), final)
    start.restore(model, optimizer, {})
    assert not optimizer.state
    train(model, optimizer, range(12))
    assert equal(weights_of(model), final)


def test_a_resumed_run_continues_bit_for_bit_in_buffers_of_its_own() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(5))
    optimizer.param_groups[0]["lr"] = 3e-3
    file = io.BytesIO()
    torch.save({"weights": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(5, 12))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    untouched = copy.deepcopy(saved)
    for earlier in (0, 3):  # steps of the optimizer that loads
        resumed = make_model()
        other = make_optimizer(resumed)
        train(resumed, other, range(200, 200 + earlier))
        resumed.load_state_dict(saved["weights"])
        other.load_state_dict(saved["optimizer"])
        assert [group["lr"] for group in other.param_groups] == [3e-3, 1e-2]
        train(resumed, other, range(5, 12))
        assert equal(weights_of(resumed), weights_of(model))
    for one, other_state in zip(
        untouched["optimizer"]["state"].values(), saved["optimizer"]["state"].values(), strict=True
    ):
        hidden = [next(value for value in state.values() if isinstance(value, dict)) for state in (one, other_state)]
        assert all(torch.equal(hidden[0][key], hidden[1][key]) for key in hidden[0])


def test_parameters_without_a_saved_state_start_anew() -> None:
    fresh, worked = make_model(), make_model()
    optimizer, other = make_optimizer(fresh), make_optimizer(worked)
    state = optimizer.state_dict()
    train(worked, other, range(3))
    other.load_state_dict(state)
    assert not other.state


def test_the_state_of_other_parameters_is_refused() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"groups of \[1, 1\] parameters, found \[2, 2\]"):
        make_optimizer(model[0]).load_state_dict(state)
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    with pytest.raises(ValueError, match="Expected moments of the shapes"):
        make_optimizer(wide).load_state_dict(state)
