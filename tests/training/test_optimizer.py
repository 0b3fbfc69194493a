"""Muon with AdamW: orthogonal updates of one size for matrices, PyTorch's own AdamW for the rest, and a state that restores."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nexus.training.optimizer import ITERATIONS, MuonAdamW, hidden_matrices, orthogonalise

BETAS = (0.9, 0.95)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 6, 3), nn.Flatten(), nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 8)).double()


def make_optimizer(model: nn.Module, *, lr: float = 0.01, weight_decay: float = 0.1) -> MuonAdamW:
    matrices = hidden_matrices([model])
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [{"params": others, "weight_decay": 0.0}]
    return MuonAdamW(matrices, groups, lr=lr, betas=BETAS, weight_decay=weight_decay)


def backward(model: nn.Module, seed: int) -> float:
    inputs = torch.randn(5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    loss = model(inputs).square().sum()
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("shape", [(7, 16, 16), (1, 8, 40), (3, 40, 8)])
def test_orthogonalising_keeps_the_singular_vectors_and_brings_the_values_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    # Condition numbers up to 10, as Newton-Schulz reaches smaller values only partly.
    vectors = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(0.1, 1.0, min(shape[1:]), dtype=torch.float64)
    matrices = vectors.U * values @ vectors.Vh
    inside = vectors.U.mT @ orthogonalise(matrices) @ vectors.Vh.mT
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3
    torch.testing.assert_close(inside, torch.diag_embed(diagonal), atol=1e-9, rtol=0)


def test_the_scale_of_a_gradient_does_not_change_its_direction_and_zero_stays_zero() -> None:
    torch.manual_seed(2)
    matrices = torch.randn(2, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(orthogonalise(1e3 * matrices), orthogonalise(matrices), atol=1e-6, rtol=0)
    assert not orthogonalise(torch.zeros(1, 4, 4)).any()


def test_the_singular_values_follow_the_published_quintic() -> None:
    value = 0.3
    matrix = torch.diag(torch.tensor([value, (1 - value**2) ** 0.5], dtype=torch.float64))
    for _ in range(ITERATIONS):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    assert float(orthogonalise(matrix[None])[0, 0, 0]) == pytest.approx(value, abs=1e-5)


def test_matrices_move_as_torchs_own_muon_moves_them() -> None:
    torch.manual_seed(3)
    ours = nn.Parameter(torch.randn(16, 32))
    theirs = nn.Parameter(ours.detach().clone())
    mine = MuonAdamW([ours], [], lr=0.02, betas=BETAS, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for step in range(4):
        ours.grad = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    moved = ours.detach() - start
    # PyTorch's iteration is in bfloat16, which has 8 bits.
    assert float((moved - (theirs.detach() - start)).norm() / moved.norm()) < 0.02


def test_everything_else_moves_exactly_as_adamw_moves_it() -> None:
    model, twin = make_model(), make_model()
    mine = make_optimizer(model)
    others = [p for p in twin.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW(others, lr=0.01, betas=BETAS, weight_decay=0.0)
    for seed in range(3):
        backward(model, seed)
        for parameter, source in zip(twin.parameters(), model.parameters(), strict=True):
            parameter.grad = source.grad.clone()
        mine.step()
        reference.step()
    for parameter, source in zip(others, [p for p in model.parameters() if p.ndim < 2], strict=True):
        assert torch.equal(parameter, source)


def test_weight_decay_shrinks_a_matrix_whose_gradient_is_zero_and_a_missing_gradient_changes_nothing() -> None:
    decayed, left = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = MuonAdamW([decayed, left], [], lr=0.5, betas=BETAS, weight_decay=0.1)
    decayed.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(decayed.detach(), torch.full((4, 4), 0.95))
    assert torch.equal(left.detach(), torch.ones(4, 4))
    assert left not in optimizer.state
    decayed.grad = None
    optimizer.step()
    torch.testing.assert_close(decayed.detach(), torch.full((4, 4), 0.95))


def test_a_run_continued_from_a_saved_state_is_the_undisturbed_run() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    for seed in range(2):
        backward(model, seed)
        optimizer.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed = make_model()
    resumed.load_state_dict(weights)
    other = make_optimizer(resumed)
    other.load_state_dict(state)
    for seed in (2, 3):
        for each, its in ((model, optimizer), (resumed, other)):
            backward(each, seed)
            its.step()
    for mine, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_loss_falls_and_a_closure_recomputes_it() -> None:
    model = make_model()
    optimizer = make_optimizer(model, lr=0.05)
    losses = [optimizer.step(lambda: backward(model, 0)) for _ in range(60)]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < 0.2 * losses[0]


def test_hidden_matrices_are_the_linear_and_convolution_weights_that_train_each_once() -> None:
    model = make_model()
    model[4].weight.requires_grad_(False)
    tied = nn.Linear(8, 8)
    tied.weight = model[2].weight
    found = hidden_matrices([model, tied, nn.Embedding(4, 4)])
    assert [id(weight) for weight in found] == [id(model[0].weight), id(model[2].weight)]


def test_a_vector_among_the_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least two dimensions, found the shape \(3,\)"):
        MuonAdamW([nn.Parameter(torch.ones(3))], [], lr=0.1, betas=BETAS, weight_decay=0.0)
