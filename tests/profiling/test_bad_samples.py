"""Samples that cannot be measured are named, so that the others can be; memory does not grow with the number of batches."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from nexus.errors import ProfilingError
from nexus.profiling.batches import BadSamplesError, EncoderProfileBatch, ProfileBatch, rows_of
from nexus.profiling.consolidation import plan_confirmation
from nexus.profiling.niwt import NIWTProfiler
from nexus.profiling.spectral import Comoment

POISON = 101
"""A token that the rows of the test batch do not have."""


@pytest.fixture
def batch(text_batch) -> ProfileBatch:
    return ProfileBatch(
        list("abcde"), text_batch.input_ids_BT.clone(), text_batch.attention_mask_BT, text_batch.loss_mask_BT
    )


@pytest.fixture
def poisoned(own_qwen3) -> PreTrainedModel:
    """Its state is no number once it has read one token."""
    with torch.no_grad():
        own_qwen3.model.embed_tokens.weight[POISON] = torch.nan
    return own_qwen3


@pytest.mark.parametrize("strategy", ["auto", "brute", "triangular"])
def test_rows_that_give_nan_are_named_and_the_others_measured(poisoned, batch, strategy):
    profiler = NIWTProfiler(poisoned, strategy=strategy)
    clean = profiler.measure(batch)
    plan = plan_confirmation(clean, seed=0)
    for row in (1, 3):
        batch.input_ids_BT[row, -2] = POISON
    for run in (lambda: profiler.measure(batch), lambda: profiler.confirm(batch, plan)):
        with pytest.raises(
            BadSamplesError, match=r"'model\.layers' to be numbers.*Found 2 bad samples: b: NaN; d: NaN"
        ) as caught:
            run()
        assert caught.value.reasons == {"b": "NaN", "d": "NaN"}
    with pytest.raises(BadSamplesError, match="row 1: NaN; row 3: NaN"):
        profiler.delta_nll(batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT)
    good = [0, 2, 4]
    rest = ProfileBatch(
        ["a", "c", "e"], batch.input_ids_BT[good], batch.attention_mask_BT[good], batch.loss_mask_BT[good]
    )
    np.testing.assert_allclose(profiler.measure(rest).delta_LB, clean.delta_LB[:, good], rtol=0, atol=2e-5)
    with pytest.raises(BadSamplesError, match="1 bad samples: b: NaN"):
        profiler.measure(rows_of(batch, slice(1, 2)))


def test_a_model_that_gives_nan_for_every_row_is_what_is_wrong(poisoned, batch):
    batch.input_ids_BT[:, -1] = batch.input_ids_BT[:, -2] = POISON
    with pytest.raises(ProfilingError, match=r"found NaN\. Load the model in a wider compute dtype") as caught:
        NIWTProfiler(poisoned).measure(batch)
    assert not isinstance(caught.value, BadSamplesError)


def test_images_that_give_nan_are_named(siglip):
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels[2] = torch.nan
    with pytest.raises(BadSamplesError, match="1 bad samples: z: NaN"):
        NIWTProfiler(siglip).measure(EncoderProfileBatch(["x", "y", "z"], {"pixel_values": pixels}, None))


def test_rows_longer_than_the_context_are_named(own_qwen3, batch, speech_model, speech_batch):
    own_qwen3.config.max_position_embeddings = 10
    profiler = NIWTProfiler(own_qwen3)
    with pytest.raises(
        BadSamplesError, match=r"context of Qwen3ForCausalLM, 10 tokens; shorten.*a: 12 tokens; e: 12 tokens"
    ):
        profiler.measure(batch)
    # What counts is the row, not its padding.
    assert profiler.measure(rows_of(batch, slice(1, 4))).sample_ids == ("b", "c", "d")
    with pytest.raises(BadSamplesError, match=r"10 tokens with the 4 to be generated.*row 1: 7 tokens"):
        profiler.ablated_generations(batch.input_ids_BT, batch.attention_mask_BT, 4)
    model = copy.deepcopy(speech_model)
    model.config.max_target_positions = 8
    with pytest.raises(BadSamplesError, match=r"WhisperForConditionalGeneration, 8 tokens.*row 0: 9 tokens"):
        NIWTProfiler(model).delta_nll(
            speech_batch.input_ids_BT,
            speech_batch.attention_mask_BT,
            speech_batch.loss_mask_BT,
            inputs=speech_batch.inputs,
        )


def test_errors_about_samples_pickle_and_show_a_few():
    error = BadSamplesError("Expected numbers.", {f"s{row}": "NaN" for row in range(7)})
    assert str(error).endswith("Found 7 bad samples: s0: NaN; s1: NaN; s2: NaN; s3: NaN; s4: NaN and 2 more.")
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.reasons) == (str(error), error.reasons)


def covariances() -> int:
    return sum(type(found) is Comoment for found in gc.get_objects())


def test_one_covariance_per_layer_is_kept_however_many_batches_there_are(qwen3, batch):
    # What earlier tests left behind would be counted before and gone after.
    gc.collect()
    before, seen = covariances(), []

    def batches() -> Iterator[ProfileBatch]:
        for turn in range(6):
            rows = rows_of(batch, slice(0, 2))
            yield ProfileBatch(
                [f"{turn}-{row}" for row in range(2)], rows.input_ids_BT, rows.attention_mask_BT, rows.loss_mask_BT
            )
            gc.collect()
            seen.append(covariances() - before)

    profile = NIWTProfiler(qwen3).profile(batches(), confirm_samples=0)
    assert profile.num_samples == 12
    assert seen == [3] * 6


def test_micro_batches_add_up_in_the_memory_of_the_first(qwen3, batch):
    """A second covariance exists only of the layer that is being looked at."""
    before, seen = covariances(), []
    hook = qwen3.lm_head.register_forward_hook(lambda *_: seen.append(covariances() - before))
    try:
        NIWTProfiler(qwen3, micro_batch_size=1, strategy="triangular").measure(batch)
    finally:
        hook.remove()
    assert seen == [3] * 5


def test_a_token_that_the_model_rules_out_names_its_rows(own_qwen3, batch):
    token = int(batch.input_ids_BT[1, -1])
    hook = own_qwen3.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([token]), -torch.inf)
    )
    has_token = [row for row, ids_T in enumerate(batch.input_ids_BT.tolist()) if token in ids_T]
    with pytest.raises(BadSamplesError, match="infinite nats") as caught:
        NIWTProfiler(own_qwen3).measure(batch)
    assert "b" in caught.value.reasons
    assert set(caught.value.reasons) <= {"abcde"[row] for row in has_token}
    hook.remove()
    assert np.isfinite(NIWTProfiler(own_qwen3).measure(batch).delta_LB).all()


def test_an_encoder_has_no_answers_to_score(siglip, batch):
    with pytest.raises(ProfilingError, match="Expected a language-model head, found none"):
        NIWTProfiler(siglip).delta_nll(batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT)


def test_rows_that_share_an_id_count_in_an_order_of_their_own(qwen3, batch):
    same = ProfileBatch(["a"] * 5, batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT)
    whole = NIWTProfiler(qwen3).profile([same], confirm_samples=0)
    for order in ((0, 1, 2, 3, 4), (3, 0, 4, 1, 2)):
        apart = NIWTProfiler(qwen3).profile([rows_of(same, slice(row, row + 1)) for row in order], confirm_samples=0)
        for left, right in zip(whole.layers, apart.layers, strict=True):
            np.testing.assert_allclose(left.ci95, right.ci95, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", ["brute", "prefix"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, None])
def test_what_is_said_of_each_token_goes_where_the_tokens_go(batch, strategy, micro_batch_size):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=32, n_layer=3, n_head=2, n_positions=64, eos_token_id=None)
    ).eval()
    types_BT = torch.randint(0, 128, batch.input_ids_BT.shape)
    typed = ProfileBatch(
        batch.sample_ids,
        batch.input_ids_BT,
        batch.attention_mask_BT,
        batch.loss_mask_BT,
        {"token_type_ids": types_BT},
    )
    assert not bool(batch.attention_mask_BT[:, 0].all()), "some rows are padded on the left"
    profiler = NIWTProfiler(model, strategy=strategy, micro_batch_size=micro_batch_size)
    found_LB = profiler.measure(typed).delta_LB
    for row in range(typed.num_rows):
        alone = rows_of(typed, slice(row, row + 1))
        assert alone.inputs is not None
        assert alone.inputs["token_type_ids"].shape == alone.input_ids_BT.shape
        expected_L = [_nll(model, alone, layer) - _nll(model, alone, None) for layer in range(3)]
        np.testing.assert_allclose(found_LB[:, row], expected_L, rtol=0, atol=2e-4)


def _nll(model: PreTrainedModel, row: ProfileBatch, skipped: int | None) -> float:
    """Nats of the scored tokens of one row, by the model's own forward."""
    blocks = model.transformer.h
    kept = nn.ModuleList(block for layer, block in enumerate(blocks) if layer != skipped)
    model.transformer.h = kept
    try:
        with torch.no_grad():
            logits_TV = model(row.input_ids_BT, **row.inputs, use_cache=False).logits[0, :-1].double()
    finally:
        model.transformer.h = blocks
    nll_T = F.cross_entropy(logits_TV, row.input_ids_BT[0, 1:], reduction="none")
    return float(nll_T[row.loss_mask_BT[0, 1:].bool()].sum())
