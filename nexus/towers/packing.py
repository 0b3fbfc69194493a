"""Teachers' replies as they travel and rest: a few contiguous buffers instead of wide arrays.

Ids take ceil(log2 V) bits each; log-probabilities, tails and states are rounded once to bfloat16, which is declared here and nowhere
else: unpacking gives the rounded numbers back bit for bit, and packing those again gives the same bytes. At a vocabulary of 151,936
a token's 64 best ids travel in 144 + 128 + 2 bytes, with 2.25 for the scored token itself. The tail needs no more than bfloat16: its
logarithm is rounded by a relative 2^-9 as those of the kept ids are, and the loss divides the k + 1 bins by their sum.

Shape letters: B rows, N scored tokens of all rows, W numbers per token (K kept ids, S draws, H the teacher's width, or V), M ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from nexus.towers.targets import (
    FullTargets,
    HiddenTargets,
    SampledTargets,
    TeacherTargets,
    TokenDistributions,
    TokensAlone,
    TokenTargets,
)

PackedKind = Literal["topk", "sampled", "hidden", "full", "none"]


@dataclass(frozen=True)
class PackedTokens:
    """Token distributions of some rows in one of the five transports."""

    kind: PackedKind
    vocabulary_size: int
    width: int
    """W: numbers per token."""
    lengths_B: np.ndarray
    """int32 [B]; scored tokens of each row."""
    token_ids: np.ndarray
    """uint8; the N scored tokens, packed."""
    ids: np.ndarray
    """uint8; N * W ids, packed; empty where the numbers stand in a fixed order."""
    values_NW: np.ndarray
    """uint16 [N, W]; bfloat16 log-probabilities or states."""
    tail_N: np.ndarray
    """uint16 [N]; bfloat16 log of the mass outside the kept ids; empty but for topk."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.values_NW)

    @property
    def num_bytes(self) -> int:
        """Length of all buffers together: what crosses."""
        buffers = (self.lengths_B, self.token_ids, self.ids, self.values_NW, self.tail_N)
        return sum(buffer.nbytes for buffer in buffers)


@dataclass(frozen=True)
class PackedTargets:
    """A reply as it crosses between processes."""

    rest: TeacherTargets
    """Everything but the token distributions."""
    tokens: PackedTokens | None

    @property
    def row_ids(self) -> tuple[str, ...]:
        """Rows in the request's order."""
        return self.rest.row_ids

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        rest = self.rest
        arrays = [*rest.hidden.values(), rest.pooled_BE, rest.label_logprobs_BC]
        for sparse in (rest.features or {}).values():
            arrays += [sparse.offsets_B1, sparse.token_offsets_N1, sparse.feature_ids_Z, sparse.values_Z]
        own = 0 if self.tokens is None else self.tokens.num_bytes
        return own + sum(array.nbytes for array in arrays if array is not None)


def pack_targets(targets: TeacherTargets, *, vocabulary_size: int | None) -> PackedTargets:
    """`targets` with packed token distributions.

    Args:
        vocabulary_size: V of those distributions; None where there are none.

    Raises:
        ValueError: as `pack_tokens`.
    """
    if targets.tokens is None:
        return PackedTargets(targets, None)
    assert vocabulary_size is not None, "a teacher with token distributions has a vocabulary"
    return PackedTargets(replace(targets, tokens=None), pack_tokens(targets.tokens, vocabulary_size=vocabulary_size))


def unpack_targets(packed: PackedTargets) -> TeacherTargets:
    """The reply that was packed, its token distributions rounded to bfloat16."""
    return packed.rest if packed.tokens is None else replace(packed.rest, tokens=unpack_tokens(packed.tokens))


def pack_tokens(tokens: TokenDistributions, *, vocabulary_size: int) -> PackedTokens:
    """Raises ValueError for ids outside the vocabulary, and for NaN."""
    bits = bits_per_id(vocabulary_size)
    ids_NW = np.empty((0, 0), np.int32)
    tail_N = np.empty(0, np.float32)
    kind: PackedKind
    if isinstance(tokens, TokenTargets):
        kind, ids_NW, values_NW, tail_N = "topk", tokens.ids_NK, tokens.logprobs_NK, tokens.tail_logprob_N
    elif isinstance(tokens, SampledTargets):
        kind, ids_NW, values_NW = "sampled", tokens.ids_NS, tokens.logprobs_NS
    elif isinstance(tokens, HiddenTargets):
        kind, values_NW = "hidden", tokens.states_NH
    elif isinstance(tokens, FullTargets):
        kind, values_NW = "full", tokens.logprobs_NV
    else:
        kind, values_NW = "none", np.empty((len(tokens.token_ids_N), 0), np.float32)
    for ids in (ids_NW, tokens.token_ids_N):
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary_size:
            raise ValueError(
                f"token targets: expected ids from 0 to {vocabulary_size - 1}, found {int(ids.min())} to {int(ids.max())}"
            )
    return PackedTokens(
        kind=kind,
        vocabulary_size=vocabulary_size,
        width=values_NW.shape[1],
        lengths_B=np.diff(tokens.offsets_B1).astype(np.int32),
        token_ids=pack_ids(tokens.token_ids_N, bits),
        ids=pack_ids(ids_NW.reshape(-1), bits),
        values_NW=to_bfloat16(values_NW),
        tail_N=to_bfloat16(tail_N),
    )


def unpack_tokens(packed: PackedTokens) -> TokenDistributions:
    """The distributions that were packed, in float32."""
    bits = bits_per_id(packed.vocabulary_size)
    num_tokens, width = packed.values_NW.shape
    offsets_B1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(packed.lengths_B, dtype=np.int64)])
    token_ids_N = unpack_ids(packed.token_ids, bits, num_tokens)
    values_NW = from_bfloat16(packed.values_NW)
    if packed.kind == "hidden":
        return HiddenTargets(offsets_B1, token_ids_N, values_NW)
    if packed.kind == "full":
        return FullTargets(offsets_B1, token_ids_N, values_NW)
    if packed.kind == "none":
        return TokensAlone(offsets_B1, token_ids_N)
    ids_NW = unpack_ids(packed.ids, bits, num_tokens * width).reshape(num_tokens, width)
    if packed.kind == "sampled":
        return SampledTargets(offsets_B1, token_ids_N, ids_NW, values_NW)
    return TokenTargets(offsets_B1, token_ids_N, ids_NW, values_NW, from_bfloat16(packed.tail_N))


def split_rows(packed: PackedTokens) -> list[PackedTokens]:
    """The same distributions row by row: each begins at a byte of its own."""
    tokens = unpack_tokens(packed)
    bounds = list(zip(tokens.offsets_B1[:-1].tolist(), tokens.offsets_B1[1:].tolist(), strict=True))
    bits = bits_per_id(packed.vocabulary_size)
    rows = []
    for begin, end in bounds:
        own = slice(begin, end)
        ids = (
            tokens.ids_NK[own]
            if isinstance(tokens, TokenTargets)
            else tokens.ids_NS[own]
            if isinstance(tokens, SampledTargets)
            else np.empty(0, np.int32)
        )
        rows.append(
            replace(
                packed,
                lengths_B=np.array([end - begin], np.int32),
                token_ids=pack_ids(tokens.token_ids_N[own], bits),
                ids=pack_ids(ids.reshape(-1), bits),
                values_NW=packed.values_NW[own],
                tail_N=packed.tail_N[own],
            )
        )
    return rows


def join_rows(rows: Sequence[PackedTokens]) -> PackedTokens:
    """The inverse of `split_rows`; rows of one kind, vocabulary and width, at least one."""
    first = rows[0]
    bits = bits_per_id(first.vocabulary_size)
    per_id = 0 if first.kind in ("hidden", "full") else first.width
    token_ids = [unpack_ids(row.token_ids, bits, row.num_tokens) for row in rows]
    ids = [unpack_ids(row.ids, bits, row.num_tokens * per_id) for row in rows]
    return replace(
        first,
        lengths_B=np.concatenate([row.lengths_B for row in rows]),
        token_ids=pack_ids(np.concatenate(token_ids), bits),
        ids=pack_ids(np.concatenate(ids), bits),
        values_NW=np.concatenate([row.values_NW for row in rows]),
        tail_N=np.concatenate([row.tail_N for row in rows]),
    )


def bytes_per_token(kind: PackedKind, *, width: int, vocabulary_size: int) -> float:
    """What one token of a transport takes, the scored token's own id included, without its row's length."""
    bits = bits_per_id(vocabulary_size)
    ids = 1 + (width if kind in ("topk", "sampled") else 0)
    return ids * bits / 8 + 2 * width + (2 if kind == "topk" else 0)


def bits_per_id(vocabulary_size: int) -> int:
    """ceil(log2 V), at least 1. Raises ValueError for an empty vocabulary."""
    if vocabulary_size < 1:
        raise ValueError(f"vocabulary: expected at least one id, found {vocabulary_size}")
    return max(1, (vocabulary_size - 1).bit_length())


def pack_ids(ids_M: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [ceil(M * bits / 8)]: the ids' lowest `bits` bits one after the other, least significant first."""
    bytes_M4 = np.ascontiguousarray(ids_M, "<u4").view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(bytes_M4, axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack_ids(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 [count]: the inverse of `pack_ids`."""
    bits_MJ = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    bytes_M4 = np.zeros((count, 4), np.uint8)
    bytes_M4[:, : -(-bits // 8)] = np.packbits(bits_MJ, axis=1, bitorder="little")
    return bytes_M4.view("<u4")[:, 0].astype(np.int32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """uint16 of the same shape: the upper half of each float32, rounded to nearest, ties to even.

    Raises:
        ValueError: for NaN, which such rounding could turn into infinity.
    """
    single = np.ascontiguousarray(values, np.float32)
    if np.isnan(single).any():
        raise ValueError("bfloat16: expected numbers or infinities, found NaN")
    whole = single.view(np.uint32)
    return ((whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(halves: np.ndarray) -> np.ndarray:
    """float32 of the same shape, exactly."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
