"""The feature anchor and the scale of its targets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nexus.training.features import STANDARDISERS, FeatureStandardiser, PhiSStandardiser, cosine_smooth_l1_anchor

B, T, H = 2, 4, 6


def features(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def mask() -> Tensor:
    return torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1]])


# The anchor.


def test_the_anchor_is_nine_parts_cosine_and_one_part_smooth_l1(mask: Tensor) -> None:
    predicted, target = features(0), features(1) * 2
    expected = []
    for b, t in mask.nonzero().tolist():
        p, y = predicted[b, t], target[b, t]
        cosine = float(p @ y / (p.norm() * y.norm()))
        distance = (p - y).abs()
        smooth = torch.where(distance < 1, 0.5 * distance.square(), distance - 0.5).mean()
        expected.append(0.9 * (1 - cosine) + 0.1 * float(smooth))
    value = cosine_smooth_l1_anchor(predicted, target, mask)
    assert value.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_features_cost_exactly_nothing(dtype: torch.dtype, mask: Tensor) -> None:
    target = features(2, dtype)
    target[0, 0] = 0.0  # a vector without direction equals itself too
    predicted = target.clone().requires_grad_()
    loss = cosine_smooth_l1_anchor(predicted, target, mask)
    loss.backward()
    assert loss.item() == 0.0
    assert predicted.grad is not None
    assert not predicted.grad.any()


def test_the_cosine_part_does_not_see_the_size_and_the_other_part_does(mask: Tensor) -> None:
    target = features(3)
    twice = cosine_smooth_l1_anchor(2 * target, target, mask).item()
    opposite = cosine_smooth_l1_anchor(-target, target, mask).item()
    assert 0.0 < twice < 0.1  # smooth L1 alone
    assert opposite > 1.8  # the full cosine distance of 2


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_masked_positions_cannot_change_value_or_gradient(poison: float, mask: Tensor) -> None:
    results = []
    for fill in (0.0, poison):
        off = ~mask.bool()[..., None]
        predicted = features(4).masked_fill(off, fill).requires_grad_()
        loss = cosine_smooth_l1_anchor(predicted, features(5).masked_fill(off, fill), mask)
        loss.backward()
        assert predicted.grad is not None
        results.append((loss.detach(), predicted.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[1][1][~mask.bool()].any()


def test_the_gradient_reaches_the_predictor_and_never_the_target(mask: Tensor) -> None:
    predicted, target = features(6).requires_grad_(), features(7).requires_grad_()
    loss = cosine_smooth_l1_anchor(predicted, target, mask)
    loss.backward()
    assert target.grad is None
    assert predicted.grad is not None
    stepped = cosine_smooth_l1_anchor(predicted.detach() - 0.1 * predicted.grad, target, mask)
    assert stepped.item() < loss.item()


def test_the_gradient_equals_finite_differences(mask: Tensor) -> None:
    predicted, target = features(8).requires_grad_(), features(9)
    (gradient,) = torch.autograd.grad(cosine_smooth_l1_anchor(predicted, target, mask), predicted)
    for index in [(0, 0, 0), (0, 1, 5), (1, 3, 2)]:
        ends = []
        for sign in (1, -1):
            moved = predicted.detach().clone()
            moved[index] += sign * 1e-6
            ends.append(cosine_smooth_l1_anchor(moved, target, mask).item())
        assert gradient[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)


def test_a_predictor_of_zeros_gets_a_bounded_gradient_towards_the_target(mask: Tensor) -> None:
    predicted = torch.zeros(B, T, H).requires_grad_()
    target = features(10, torch.float32)
    loss = cosine_smooth_l1_anchor(predicted, target, mask)
    loss.backward()
    assert predicted.grad is not None
    assert bool(torch.isfinite(predicted.grad).all())
    assert predicted.grad.abs().max() < 100.0
    assert float((predicted.grad[mask.bool()] * target[mask.bool()]).sum()) < 0.0


def test_nothing_masked_in_is_zero_and_attached() -> None:
    predicted = torch.full((B, T, H), math.inf).requires_grad_()
    loss = cosine_smooth_l1_anchor(predicted, features(11), torch.zeros(B, T), num_positions=0)
    loss.backward()
    assert loss.item() == 0.0
    assert predicted.grad is not None
    assert not predicted.grad.any()


def test_micro_batches_add_up_to_the_full_batch(mask: Tensor) -> None:
    predicted, target = features(12), features(13)
    count = int(mask.sum())
    parts = [
        cosine_smooth_l1_anchor(predicted[b : b + 1], target[b : b + 1], mask[b : b + 1], num_positions=count)
        for b in range(B)
    ]
    assert sum(parts).item() == pytest.approx(cosine_smooth_l1_anchor(predicted, target, mask).item(), rel=1e-12)


def test_half_precision_is_upcast_and_float64_stays(mask: Tensor) -> None:
    predicted, target = features(14, torch.bfloat16), features(15, torch.bfloat16)
    value = cosine_smooth_l1_anchor(predicted, target, mask)
    assert value.dtype == torch.float32
    exact = cosine_smooth_l1_anchor(predicted.double(), target.double(), mask)
    assert exact.dtype == torch.float64
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_shapes_and_counts_that_disagree_are_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="anchor: expected prediction and target of one shape"):
        cosine_smooth_l1_anchor(features(16), features(17)[..., :-1], mask)
    with pytest.raises(ValueError, match="a mask of shape"):
        cosine_smooth_l1_anchor(features(16), features(17), mask[:, :-1])
    with pytest.raises(ValueError, match="num_positions: expected at least 5"):
        cosine_smooth_l1_anchor(features(16), features(17), mask, num_positions=0)


# The scale.


def stretched(seed: int, rows: int) -> Tensor:
    """Rows with another mean and another deviation in every dimension."""
    plain = torch.randn(rows, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return plain * torch.tensor([0.1, 1.0, 2.0, 5.0, 10.0, 30.0]) + torch.arange(H) * 100.0


def test_standardised_features_are_centred_with_mean_variance_one() -> None:
    data = stretched(0, 500)
    standardiser = FeatureStandardiser(H)
    standardiser.update(data, torch.ones(500))
    result = standardiser(data)
    assert result.mean(dim=0).abs().max().item() < 1e-10
    assert result.var(dim=0, unbiased=False).mean().item() == pytest.approx(1.0, rel=1e-12)
    # One scalar: the proportions between the dimensions stay.
    ratios = data.std(dim=0) / result.std(dim=0)
    assert ratios.max().item() == pytest.approx(ratios.min().item(), rel=1e-9)
    assert standardiser.scale == pytest.approx(ratios[0].item(), rel=1e-9)
    torch.testing.assert_close(standardiser.inverse(result), data, rtol=1e-12, atol=1e-9)


def test_statistics_do_not_depend_on_the_chunks_nor_on_masked_rows() -> None:
    data = stretched(1, 60)
    whole = FeatureStandardiser(H)
    whole.update(data, torch.ones(60))
    chunked = FeatureStandardiser(H)
    for start, stop in ((0, 1), (1, 30), (30, 30), (30, 60)):
        part = data[start:stop]
        padded = torch.cat([part, torch.full((2, H), math.nan, dtype=torch.float64)])
        mask = torch.cat([torch.ones(stop - start), torch.zeros(2)])
        chunked.update(padded[None], mask[None])
    torch.testing.assert_close(chunked(data), whole(data), rtol=1e-10, atol=1e-10)


def test_statistics_stay_once_enough_was_seen() -> None:
    standardiser = FeatureStandardiser(H, freeze_after=20)
    standardiser.update(stretched(2, 19), torch.ones(19))
    assert not standardiser.frozen
    standardiser.update(stretched(3, 5), torch.ones(5))
    assert standardiser.frozen
    scale, probe = standardiser.scale, stretched(4, 3)
    before = standardiser(probe)
    standardiser.update(1e6 * stretched(5, 50), torch.ones(50))
    assert standardiser.scale == scale
    assert torch.equal(standardiser(probe), before)


def test_freezing_by_hand_keeps_the_statistics() -> None:
    standardiser = FeatureStandardiser(H)
    with pytest.raises(ValueError, match="found none"):
        standardiser.freeze()
    standardiser.update(stretched(6, 4), torch.ones(4))
    standardiser.freeze()
    scale = standardiser.scale
    standardiser.update(1e6 * stretched(7, 4), torch.ones(4))
    assert standardiser.scale == scale


def test_constant_features_are_only_centred() -> None:
    standardiser = FeatureStandardiser(H)
    constant = torch.full((8, H), 3.0)
    standardiser.update(constant, torch.ones(8))
    assert standardiser.scale == 1.0
    assert not standardiser(constant).any()


def test_features_keep_their_dtype() -> None:
    standardiser = FeatureStandardiser(H)
    data = features(8, torch.bfloat16)
    standardiser.update(data, torch.ones(B, T))
    assert standardiser(data).dtype == torch.bfloat16


def test_a_restored_standardiser_continues_bit_for_bit() -> None:
    original = FeatureStandardiser(H, freeze_after=50)
    original.update(stretched(9, 20), torch.ones(20))
    state = original.state_dict()
    restored = FeatureStandardiser(H, freeze_after=50)
    restored.load_state_dict(state)
    for standardiser in (original, restored):
        standardiser.update(stretched(10, 40), torch.ones(40))
    assert restored.frozen
    probe = stretched(11, 3)
    assert torch.equal(original(probe), restored(probe))
    again = FeatureStandardiser(H)
    again.load_state_dict(state)  # the handed-out state did not move with the updates
    assert not again.frozen
    assert again.scale != original.scale


def test_a_standardiser_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="width >= 1"):
        FeatureStandardiser(0)
    with pytest.raises(ValueError, match="freeze_after >= 2"):
        FeatureStandardiser(H, freeze_after=1)
    standardiser = FeatureStandardiser(H)
    with pytest.raises(ValueError, match="call `update` first"):
        standardiser(features(12))
    with pytest.raises(ValueError, match=r"expected features \[..., 6\]"):
        standardiser.update(torch.ones(3, H + 1), torch.ones(3))
    with pytest.raises(ValueError, match="a mask of the same leading shape"):
        standardiser.update(torch.ones(3, H), torch.ones(4))
    standardiser.update(torch.ones(3, H), torch.ones(3))
    with pytest.raises(ValueError, match="statistics of width 7"):
        FeatureStandardiser(H + 1).load_state_dict(standardiser.state_dict())


# The rotation.


def mixed(seed: int, rows: int, *, rank: int = H) -> Tensor:
    """Rows whose dimensions differ in spread and are correlated; `rank` below H leaves directions without variance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, H, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, H)
    return torch.randn(rows, rank, generator=generator, dtype=torch.float64) @ mixing + torch.arange(H) * 10.0


@pytest.mark.parametrize("rank", [H, 2, 1])
def test_phi_s_gives_every_dimension_variance_one_and_is_undone_exactly(rank: int) -> None:
    data = mixed(20, 400, rank=rank)
    standardiser = PhiSStandardiser(H)
    standardiser.update(data, torch.ones(400))
    result = standardiser(data)
    assert result.mean(dim=0).abs().max().item() < 1e-10
    torch.testing.assert_close(
        result.var(dim=0, unbiased=False), torch.ones(H, dtype=torch.float64), rtol=1e-9, atol=0.0
    )
    torch.testing.assert_close(standardiser.inverse(result), data, rtol=1e-12, atol=1e-9)


def test_phi_s_is_the_scalar_standardisation_turned() -> None:
    data, probe = mixed(21, 100), mixed(22, 5)
    scalar, turned = (make(H) for make in STANDARDISERS.values())
    for standardiser in (scalar, turned):
        standardiser.update(data, torch.ones(100))
    torch.testing.assert_close(turned.rotate(scalar(probe)), turned(probe), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turned(probe).norm(dim=-1), scalar(probe).norm(dim=-1), rtol=1e-12, atol=0.0)
    assert torch.equal(scalar.rotate(probe), probe)
    # Squared errors are the same in both axes; smooth L1, whose threshold is per dimension, is not.
    student = torch.zeros_like(probe)
    smooth = [torch.nn.functional.smooth_l1_loss(s.rotate(student), s(probe)).item() for s in (scalar, turned)]
    assert abs(smooth[0] - smooth[1]) > 1e-3


def test_the_axes_turn_when_twice_as_much_was_seen_and_then_stay() -> None:
    standardiser = PhiSStandardiser(H, freeze_after=64)
    axes = []
    for step in range(9):
        standardiser.update(mixed(30 + step, 8), torch.ones(8))
        axes.append(standardiser.state_dict()["rotation_HH"])
    turned = [not torch.equal(one, other) for one, other in itertools.pairwise(axes)]
    # At 16, 32 and, frozen, 64 vectors; the ninth update finds it frozen.
    assert turned == [True, False, True, False, False, False, True, False]
    state = standardiser.state_dict()
    assert (state["frozen"], state["rotated_at"], state["scatter_HH"]) == (True, 64, None)
    standardiser.freeze()  # a second time changes nothing
    assert torch.equal(standardiser.state_dict()["rotation_HH"], axes[-1])


@pytest.mark.parametrize("seen", [3, 40])
def test_a_restored_rotation_continues_bit_for_bit(seen: int) -> None:
    def make() -> PhiSStandardiser:
        return PhiSStandardiser(H, freeze_after=30)

    original, restored = make(), make()
    original.update(mixed(40, seen), torch.ones(seen))
    restored.update(mixed(41, 7), torch.ones(7))  # what it knew before is gone
    state = original.state_dict()
    probe = mixed(42, 3)
    before = original(probe)
    restored.load_state_dict(state)
    assert torch.equal(restored(probe), before)
    for standardiser in (original, restored):
        standardiser.update(mixed(43, 50), torch.ones(50))
    assert torch.equal(original(probe), restored(probe))
    restored.load_state_dict(state)  # the state that was handed out did not move with the updates
    assert torch.equal(restored(probe), before)


def test_a_rotation_keeps_dtypes_and_waits_for_features() -> None:
    standardiser = PhiSStandardiser(H)
    with pytest.raises(ValueError, match="call `update` first"):
        standardiser(features(44))
    standardiser.update(features(44, torch.bfloat16), torch.ones(B, T))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert standardiser(features(45, dtype)).dtype == dtype
    assert PhiSStandardiser(1000).freeze_after == 8000
