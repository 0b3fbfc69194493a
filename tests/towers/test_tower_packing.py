"""Packed replies: what comes back is what went in after one rounding to bfloat16, and the bytes are those that were promised."""

from __future__ import annotations

import math
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.towers.packing import (
    PackedTargets,
    PackedTokens,
    bits_per_id,
    bytes_per_token,
    from_bfloat16,
    join_rows,
    pack_ids,
    pack_targets,
    pack_tokens,
    split_rows,
    to_bfloat16,
    unpack_ids,
    unpack_targets,
    unpack_tokens,
)
from nexus.towers.targets import (
    FullTargets,
    HiddenTargets,
    SampledTargets,
    SparseTargets,
    TeacherTargets,
    TokenDistributions,
    TokensAlone,
    TokenTargets,
)

QWEN = 151_936


def distributions(kind: str, *, vocabulary: int = QWEN, lengths=(3, 0, 5), width: int = 6, seed: int = 0):
    random = np.random.default_rng(seed)
    total = sum(lengths)
    scored = (np.cumsum([0, *lengths], dtype=np.int64), random.integers(0, vocabulary, total, dtype=np.int32))
    values = -random.exponential(5.0, (total, width)).astype(np.float32)
    ids = random.integers(0, vocabulary, (total, width), dtype=np.int32)
    if kind == "topk":
        tail = np.where(np.arange(total) % 2, -np.inf, values[:, 0]).astype(np.float32)
        return TokenTargets(*scored, ids, values, tail)
    if kind == "sampled":
        return SampledTargets(*scored, ids, values)
    if kind == "none":
        return TokensAlone(*scored)
    return (HiddenTargets if kind == "hidden" else FullTargets)(*scored, values)


def rounded(array: np.ndarray) -> np.ndarray:
    return torch.from_numpy(array).bfloat16().float().numpy()


def equal(a: TokenDistributions | PackedTokens, b: TokenDistributions | PackedTokens) -> bool:
    return type(a) is type(b) and all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)
    )


KINDS = ("topk", "sampled", "hidden", "full", "none")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(3, 0, 5), (), (1,), (0,)])
def test_a_round_trip_is_exact_but_for_one_rounding(kind, lengths):
    before = distributions(kind, lengths=lengths)
    packed = pack_tokens(before, vocabulary_size=QWEN)
    after = unpack_tokens(packed)
    assert type(after) is type(before)
    for field in fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        np.testing.assert_array_equal(new, rounded(old) if old.dtype == np.float32 else old)
    again = pack_tokens(after, vocabulary_size=QWEN)
    assert equal(again, packed)
    assert equal(unpack_tokens(again), after)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2**31 - 1), st.data())
def test_ids_of_every_vocabulary_survive_in_as_few_bits_as_it_needs(vocabulary, data):
    bits = bits_per_id(vocabulary)
    assert bits == max(1, math.ceil(math.log2(vocabulary)))
    ids = np.array(data.draw(st.lists(st.integers(0, vocabulary - 1), max_size=40)), np.int32)
    packed = pack_ids(ids, bits)
    assert len(packed) == -(-len(ids) * bits // 8)
    np.testing.assert_array_equal(unpack_ids(packed, bits, len(ids)), ids)


@settings(deadline=None, max_examples=200)
@given(st.floats(width=32, allow_nan=False))
def test_bfloat16_is_that_of_torch(value):
    array = np.array([value], np.float32)
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(array)), rounded(array))


def test_sixty_four_ids_of_a_large_vocabulary_take_at_most_280_bytes():
    packed = pack_tokens(distributions("topk", lengths=(40,) * 8, width=64), vocabulary_size=QWEN)
    assert packed.ids.nbytes == 144 * packed.num_tokens
    assert packed.values_NW.nbytes == 128 * packed.num_tokens
    assert packed.num_bytes / packed.num_tokens <= 280
    # What a process of another machine receives is no more than the buffers and their names.
    assert len(pickle.dumps(packed)) < packed.num_bytes + 1024


@pytest.mark.parametrize(("kind", "width"), [("topk", 64), ("sampled", 12), ("hidden", 40), ("full", 50)])
def test_the_promised_bytes_are_the_buffers(kind, width):
    vocabulary = width if kind == "full" else QWEN
    packed = pack_tokens(
        distributions(kind, vocabulary=vocabulary, lengths=(64,), width=width), vocabulary_size=vocabulary
    )
    assert packed.num_bytes - packed.lengths_B.nbytes == 64 * bytes_per_token(
        kind, width=width, vocabulary_size=vocabulary
    )


def test_rounding_a_tail_costs_no_more_than_rounding_the_kept_ids():
    """The divergence between the exact bins and the rounded ones, with a tail of 16 and of 32 bits."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 3.0, 8.0):
        logprobs = (torch.randn(200, 5000, generator=generator, dtype=torch.float64) * scale).log_softmax(-1)
        kept, _ = logprobs.topk(16)
        tail = torch.log1p(-kept.exp().sum(-1, keepdim=True))
        exact = torch.cat([kept, tail], -1)

        def loss(tail_bits: torch.dtype, exact=exact, kept=kept, tail=tail) -> float:
            bins = torch.cat([kept.bfloat16().double(), tail.to(tail_bits).double()], -1).log_softmax(-1)
            return float((exact.exp() * (exact - bins)).sum(-1).mean())

        assert loss(torch.bfloat16) < 2 * loss(torch.float32) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_rows_apart_and_together_again_are_the_same(kind):
    packed = pack_tokens(distributions(kind, lengths=(3, 0, 5)), vocabulary_size=QWEN)
    rows = split_rows(packed)
    assert [row.num_tokens for row in rows] == [3, 0, 5]
    assert equal(join_rows(rows), packed)
    middle = unpack_tokens(join_rows([rows[2], rows[0]]))
    np.testing.assert_array_equal(
        middle.token_ids_N, np.concatenate([unpack_tokens(rows[2]).token_ids_N, unpack_tokens(rows[0]).token_ids_N])
    )


def test_what_does_not_fit_is_refused():
    good = distributions("topk", vocabulary=100)
    with pytest.raises(ValueError, match="ids from 0 to 99, found 0 to 100"):
        pack_tokens(replace(good, ids_NK=np.where(good.ids_NK < 50, 0, 100)), vocabulary_size=100)
    with pytest.raises(ValueError, match="from 0 to 99, found -1"):
        pack_tokens(replace(good, token_ids_N=np.full(8, -1, np.int32)), vocabulary_size=100)
    with pytest.raises(ValueError, match="found NaN"):
        pack_tokens(replace(good, tail_logprob_N=np.full(8, np.nan, np.float32)), vocabulary_size=100)
    with pytest.raises(ValueError, match="at least one id, found 0"):
        bits_per_id(0)


def test_a_reply_travels_with_all_that_it_holds():
    sparse = SparseTargets(np.arange(2), np.arange(2, dtype=np.int64), np.ones(1, np.int32), np.ones(1, np.float32), 8)
    reply = TeacherTargets(
        teacher="t",
        fingerprint="f",
        tokenizer_hash="h",
        row_ids=("a", "b", "c"),
        tokens=distributions("topk"),
        hidden={1: np.ones((8, 4), np.float16)},
        pooled_BE=np.ones((3, 2), np.float32),
        label_texts=("x",),
        label_logprobs_BC=np.zeros((3, 1), np.float32),
        features={0: sparse},
    )
    packed = pack_targets(reply, vocabulary_size=QWEN)
    assert isinstance(packed, PackedTargets)
    assert packed.row_ids == reply.row_ids
    sparse_bytes = 2 * 8 + 2 * 8 + 4 + 4
    assert packed.num_bytes == packed.tokens.num_bytes + 8 * 4 * 2 + 3 * 2 * 4 + 3 * 4 + sparse_bytes
    after = unpack_targets(packed)
    assert replace(after, tokens=None) == replace(reply, tokens=None)
    assert equal(after.tokens, unpack_tokens(pack_tokens(reply.tokens, vocabulary_size=QWEN)))
    without = replace(reply, tokens=None, pooled_BE=None, label_logprobs_BC=None, features=None)
    assert unpack_targets(pack_targets(without, vocabulary_size=None)) == without
    assert pack_targets(without, vocabulary_size=None).num_bytes == 8 * 4 * 2
