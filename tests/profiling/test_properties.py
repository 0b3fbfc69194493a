"""What has to hold of every profile, whatever the architecture: decoders, mixtures of experts, encoders, and both sides of a speech
recogniser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nexus.profiling.batches import concatenate_rows, rows_of
from nexus.profiling.consolidation import (
    BatchMeasurement,
    consolidate,
    fold_measurement,
    merge_measurements,
    plan_confirmation,
)
from nexus.profiling.layers import find_blocks
from nexus.profiling.niwt import EncoderProfileBatch, NIWTProfiler, ProfileBatch

NUM_ROWS = 16
# The last linear maps of the residual branches, by the names that the architectures give them.
OUTPUTS = ("o_proj", "out_proj", "down_proj", "fc2")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, one of its block lists, and rows that it answers itself: skipping what it needs shows."""

    model: PreTrainedModel
    path: str
    batch: ProfileBatch | EncoderProfileBatch

    def profiler(self, model: PreTrainedModel | None = None, **settings: object) -> NIWTProfiler:
        return NIWTProfiler(self.model if model is None else model, layers=self.path, **settings)

    @property
    def is_text(self) -> bool:
        return isinstance(self.batch, ProfileBatch)


def text_rows(answer: Callable[[Tensor, Tensor], Tensor], inputs: dict[str, Tensor] | None = None) -> ProfileBatch:
    """Left-padded rows of lengths 4 to 9; the last two tokens are what `answer` (of ids and mask) says next, one after the other."""
    ids_BT = torch.randint(4, 100, (NUM_ROWS, 9), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    for row in range(NUM_ROWS):
        mask_BT[row, : row % 6] = 0
    ids_BT = ids_BT * mask_BT
    for column in (7, 8):
        ids_BT[:, column] = answer(ids_BT[:, :column], mask_BT[:, :column])
    loss_mask_BT = torch.zeros_like(ids_BT)
    loss_mask_BT[:, 7:] = 1
    return ProfileBatch([f"s{row:02}" for row in range(NUM_ROWS)], ids_BT, mask_BT, loss_mask_BT, inputs)


@pytest.fixture(scope="module", params=["qwen3", "gemma3", "glm4_moe", "siglip", "speech_decoder", "speech_encoder"])
def subject(request: pytest.FixtureRequest) -> Subject:
    generator = torch.Generator().manual_seed(1)
    if request.param == "siglip":
        model = request.getfixturevalue("siglip")
        inputs = {"pixel_values": torch.randn(NUM_ROWS, 3, 16, 16, generator=generator)}
        with torch.no_grad():
            labels_B = model(**inputs).logits.argmax(-1)
        batch = EncoderProfileBatch([f"s{row:02}" for row in range(NUM_ROWS)], inputs, labels_B)
        return Subject(model, find_blocks(model).path, batch)
    if request.param.startswith("speech"):
        model = request.getfixturevalue("speech_model")
        heard = {"input_features": torch.randn(NUM_ROWS, 16, 40, generator=generator)}

        def transcribe(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
            positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
            inputs = {"decoder_input_ids": ids_BT, "decoder_attention_mask": mask_BT}
            with torch.no_grad():
                return model(**heard, **inputs, decoder_position_ids=positions_BT).logits[:, -1].argmax(-1)

        return Subject(model, f"model.{request.param[7:]}.layers", text_rows(transcribe, heard))
    model = request.getfixturevalue("planted_text_models")[request.param]

    def write(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            return model(ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits[:, -1].argmax(-1)

    return Subject(model, "model.layers", text_rows(write))


@pytest.fixture(scope="module")
def measured(subject: Subject) -> BatchMeasurement:
    return subject.profiler().measure(subject.batch)


def effects(measurement: BatchMeasurement) -> np.ndarray:
    """Effect and divergence per counted token, [2, L, B]."""
    return np.stack([measurement.delta_LB, measurement.kl_LB]) / measurement.token_counts_B


def profile_of(measurements: list[BatchMeasurement]):
    return consolidate(measurements, teacher="t", revision="r", seconds=1.0, seed=0)


def test_strategies_agree_bit_for_bit_where_shapes_are_equal_and_to_rounding_elsewhere(subject: Subject) -> None:
    brute, prefix, triangular = (
        subject.profiler(strategy=strategy).measure(subject.batch) for strategy in ("brute", "prefix", "triangular")
    )
    np.testing.assert_array_equal(effects(prefix), effects(brute))
    np.testing.assert_allclose(effects(triangular), effects(brute), rtol=0, atol=1e-5)
    if subject.is_text:
        model = copy.deepcopy(subject.model).double()
        # Grouped matrix products know no float64.
        model.set_experts_implementation("eager")
        rows = rows_of(subject.batch, slice(0, 4))
        if rows.inputs is not None:
            rows = replace(rows, inputs={name: tensor.double() for name, tensor in rows.inputs.items()})
        exact = [
            effects(subject.profiler(model, strategy=strategy).measure(rows)) for strategy in ("brute", "triangular")
        ]
        np.testing.assert_allclose(exact[1], exact[0], rtol=0, atol=1e-12)


def test_a_block_that_adds_nothing_is_worth_exactly_nothing(subject: Subject) -> None:
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for name, parameter in find_blocks(model, subject.path).blocks[1].named_parameters():
            if any(output in name for output in OUTPUTS):
                parameter.zero_()
    for strategy in ("brute", "prefix", "triangular"):
        profiler = subject.profiler(model, strategy=strategy)
        measurement = profiler.measure(rows_of(subject.batch, slice(0, 5)))
        others = [layer for layer in range(len(profiler.stack)) if layer != 1]
        assert (measurement.delta_LB[1] == 0).all()
        assert (measurement.kl_LB[1] == 0).all()
        assert (measurement.kl_LB[others] > 0).all()


def test_batch_sizes_give_the_same_layers_and_values(subject: Subject, measured: BatchMeasurement) -> None:
    whole = profile_of([measured])
    assert whole.critical_layers
    for size in (1, 4, 8):
        batches = [rows_of(subject.batch, slice(first, first + size)) for first in range(0, NUM_ROWS, size)]
        profile = profile_of([subject.profiler().measure(batch) for batch in batches])
        assert [c.layer for c in profile.critical_layers] == [c.layer for c in whole.critical_layers]
        for found, expected in zip(profile.layers, whole.layers, strict=True):
            assert found.delta_nll == pytest.approx(expected.delta_nll, abs=1e-5)
            assert found.ci95 == pytest.approx(expected.ci95, abs=1e-5)
            assert found.kl_nats == pytest.approx(expected.kl_nats, abs=1e-5)
            assert found.accuracy_drop == expected.accuracy_drop
        weights = [c.weight for c in profile.critical_layers]
        assert weights == pytest.approx([c.weight for c in whole.critical_layers], abs=1e-4)


@pytest.mark.parametrize("size", [5])
def test_micro_batches_change_nothing(subject: Subject, measured: BatchMeasurement, size: int) -> None:
    split = subject.profiler(micro_batch_size=size).measure(subject.batch)
    np.testing.assert_allclose(effects(split), effects(measured), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(split.correct_VB, measured.correct_VB)
    assert [m.count for m in split.moments_L] == [m.count for m in measured.moments_L]


def test_order_and_copies_of_samples_change_no_pooled_value(subject: Subject, measured: BatchMeasurement) -> None:
    order = [*np.random.default_rng(0).permutation(NUM_ROWS), *range(NUM_ROWS)]
    rows = [rows_of(subject.batch, slice(int(row), int(row) + 1)) for row in order]
    (shuffled,) = concatenate_rows(rows)
    found, expected = profile_of([subject.profiler().measure(shuffled)]), profile_of([measured])
    assert found.num_samples == 2 * NUM_ROWS
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a.delta_nll == pytest.approx(b.delta_nll, abs=1e-5)
        assert a.kl_nats == pytest.approx(b.kl_nats, abs=1e-5)
        assert a.accuracy_drop == b.accuracy_drop
        assert a.activation.kurtosis == pytest.approx(b.activation.kurtosis, rel=1e-4)
        assert a.intrinsic_dim == b.intrinsic_dim


def test_neighbours_and_padding_change_no_row(subject: Subject, measured: BatchMeasurement) -> None:
    for row in (0, 5, 11):
        alone = subject.profiler().measure(rows_of(subject.batch, slice(row, row + 1)))
        np.testing.assert_allclose(effects(alone)[..., 0], effects(measured)[..., row], rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def single_rows(subject: Subject) -> list[BatchMeasurement]:
    profiler = subject.profiler()
    return [profiler.measure(rows_of(subject.batch, slice(row, row + 1))) for row in range(8)]


@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5], [4, 1, 3]])
def test_measurements_merge_exactly_whatever_the_grouping(
    single_rows: list[BatchMeasurement], sizes: list[int]
) -> None:
    """All at once, in groups, and folded one after the other as they come in."""
    reference = merge_measurements(single_rows)
    ends = np.cumsum(sizes)
    groups = [single_rows[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    folded = None
    for group in groups:
        # A fold uses its arguments up.
        folded = fold_measurement(folded, merge_measurements(copy.deepcopy(group)))
    for merged in (folded, merge_measurements([merge_measurements(group) for group in groups][::-1])):
        assert merged.sample_ids == reference.sample_ids
        np.testing.assert_array_equal(merged.delta_LB, reference.delta_LB)
        for found, expected in zip(merged.comoments_L, reference.comoments_L, strict=True):
            scale = np.abs(expected.comoment_DD).max()
            np.testing.assert_allclose(found.comoment_DD, expected.comoment_DD, rtol=0, atol=1e-10 * scale)
        for found, expected in zip(merged.moments_L, reference.moments_L, strict=True):
            np.testing.assert_allclose(found.m4_D, expected.m4_D, rtol=1e-10)
            np.testing.assert_allclose(found.mean_D, expected.mean_D, rtol=0, atol=1e-10 * expected.abs_max_D.max())


def state_of(model: PreTrainedModel) -> tuple[object, ...]:
    return (
        [module.training for module in model.modules()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        [set(module.__dict__) for module in model.modules()],
        [(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


@contextmanager
def failing_at(block: torch.nn.Module, call: int) -> Iterator[None]:
    """Let the block raise when it is called for the given time."""
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == call:
            raise ZeroDivisionError

    hook = block.register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("strategy", ["brute", "auto"])
def test_the_model_is_left_as_it_was_found(subject: Subject, measured: BatchMeasurement, strategy: str) -> None:
    model = copy.deepcopy(subject.model).train()
    profiler = subject.profiler(model, strategy=strategy)
    profiler.stack.blocks[0].eval()  # a mixed state has to come back as it was
    rows, plan = rows_of(subject.batch, slice(0, 3)), plan_confirmation(measured, seed=0)
    weights = [parameter.clone() for parameter in model.parameters()]
    before = state_of(model)
    for _ in range(2):
        profiler.measure(rows)
        profiler.confirm(rows, plan)
        assert state_of(model) == before
    for run in (lambda: profiler.measure(rows), lambda: profiler.confirm(rows, plan)):
        with pytest.raises(ZeroDivisionError), failing_at(profiler.stack.blocks[-1], 1):
            run()
        assert state_of(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    # What a failed run left behind would show in the next one.
    after = subject.profiler(model, strategy=strategy).measure(rows)
    np.testing.assert_allclose(effects(after), effects(measured)[..., :3], rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [8])
def test_every_block_runs_as_often_as_the_strategy_promises(subject: Subject, size: int) -> None:
    """Counted inside the blocks: their own forward is what a sweep takes over."""
    calls: dict[int, int] = {}
    strategies = ["triangular", "prefix", "brute"] if subject.is_text else ["prefix", "brute"]
    profiler = subject.profiler()
    num_layers, num_batches = len(profiler.stack), NUM_ROWS // size
    norms = [next(m for m in block.modules() if "norm" in type(m).__name__.lower()) for block in profiler.stack.blocks]

    def count(layer: int) -> Callable[..., None]:
        return lambda *_: calls.__setitem__(layer, calls[layer] + 1)

    hooks = [norm.register_forward_hook(count(layer)) for layer, norm in enumerate(norms)]
    # A decoder runs once more, on one token, to project what was heard for all its ablations.
    extra = num_batches if subject.path == "model.decoder.layers" else 0
    try:
        for strategy in strategies:
            calls |= dict.fromkeys(range(num_layers), 0)
            subject.profiler(strategy=strategy, micro_batch_size=size).measure(subject.batch)
            runs = {
                "triangular": [1] * num_layers,
                "prefix": [1 + layer for layer in range(num_layers)],
                "brute": [1 + num_layers] * num_layers,
            }[strategy]
            assert list(calls.values()) == [num_batches * each + extra for each in runs]
    finally:
        for hook in hooks:
            hook.remove()


def test_verified_answers_are_those_that_would_be_generated(subject: Subject, monkeypatch) -> None:
    """Greedy decoding gives exactly the gold answer iff the argmax is right at each of its positions, given those before."""
    if not subject.is_text:
        assert not subject.model.can_generate()
        return
    # Behind an end token nothing would be generated.
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", None)
    batch, prompts = subject.batch, slice(0, 7)
    tokens_VBA = subject.profiler().ablated_generations(
        batch.input_ids_BT[:, prompts], batch.attention_mask_BT[:, prompts], 2, inputs=batch.inputs
    )
    expected_VB = (tokens_VBA == batch.input_ids_BT[:, 7:]).all(-1).numpy()
    np.testing.assert_array_equal(subject.profiler().measure(batch).correct_VB, expected_VB)
    assert expected_VB[0].all()
    assert not expected_VB.all()
