"""Tells a broken teacher by what it says, before anything learns from it.

A copy that was loaded wrongly, woken from a bad copy, or restarted over other files goes on answering: with uniform distributions,
with NaN, for other rows, in other token ids. Each of these is a typed error that names the teacher. `check_targets` looks at one
reply alone and is run by `TeacherEngine.score`; `check_reply` is run by who receives it and knows what was asked and of whom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from nexus.errors import NexusError
from nexus.towers.targets import (
    FullTargets,
    HiddenTargets,
    SampledTargets,
    TeacherTargets,
    TokenDistributions,
    TokensAlone,
    TokenTargets,
)

UNIFORM_NATS = 1e-3
"""A distribution whose most probable token is no more than this above 1 / V is uniform: its entropy is ln V within as much. A trained
model is whole nats away from it at most tokens."""


class TeacherHealthError(NexusError, RuntimeError):
    """A teacher answers, but its answers cannot be learned from."""

    remedy: ClassVar[str] = "Load teacher {teacher!r} again, or remove it from the run."

    def __init__(self, teacher: str, what: str) -> None:
        """`what` says what was expected and what was found."""
        self.teacher = teacher
        self.what = what
        super().__init__(f"{what} {self.remedy.format(teacher=teacher)}")

    def __reduce__(self) -> tuple[type[TeacherHealthError], tuple[str, str]]:
        return type(self), (self.teacher, self.what)


class UniformOutputError(TeacherHealthError):
    """Every distribution is uniform: entropy ln V."""


class NotFiniteError(TeacherHealthError):
    """Targets hold NaN, or infinity where there can be none."""


class RowCountError(TeacherHealthError):
    """The reply has other rows than the request, or its arrays have other lengths than its rows."""


class FingerprintChangedError(TeacherHealthError):
    """The teacher's weights, configuration, tokenizer or quantisation are not those that the run began with."""

    remedy = "Profile and extract again in a new --out."


def check_targets(targets: TeacherTargets, *, vocabulary_size: int | None) -> None:
    """Look at a reply by itself.

    Args:
        vocabulary_size: V of the token distributions; None where the teacher gives none.

    Raises:
        RowCountError, NotFiniteError, UniformOutputError: naming the teacher.
    """
    num_rows = len(targets.row_ids)
    for name, length in _row_counts(targets):
        if length != num_rows:
            raise RowCountError(
                targets.teacher, f"Expected {num_rows} rows in {name} of teacher {targets.teacher!r}, found {length}."
            )
    for name, array in _arrays(targets):
        if not np.isfinite(array).all():
            raise NotFiniteError(
                targets.teacher, f"Expected finite {name} from teacher {targets.teacher!r}, found NaN or infinity."
            )
    tokens = targets.tokens
    if tokens is not None and vocabulary_size is not None and _is_uniform(tokens, vocabulary_size):
        raise UniformOutputError(
            targets.teacher,
            f"Expected teacher {targets.teacher!r} to prefer some tokens, found {len(tokens.token_ids_N)} uniform distributions "
            f"over {vocabulary_size} tokens.",
        )


def _is_uniform(tokens: TokenDistributions, vocabulary_size: int) -> bool:
    if not len(tokens.token_ids_N) or isinstance(tokens, TokensAlone):
        return False
    if isinstance(tokens, HiddenTargets):
        # What the head makes of a state is known to the receiver only; from states of zeros it makes one distribution.
        return not tokens.states_NH.any()
    largest_N = _logprobs(tokens).max(axis=1)
    return bool((np.abs(largest_N + math.log(vocabulary_size)) < UNIFORM_NATS).all())


def _logprobs(tokens: TokenTargets | SampledTargets | FullTargets) -> np.ndarray:
    if isinstance(tokens, TokenTargets):
        return tokens.logprobs_NK
    return tokens.logprobs_NS if isinstance(tokens, SampledTargets) else tokens.logprobs_NV


def check_reply(targets: TeacherTargets, *, row_ids: tuple[str, ...], fingerprint: str) -> None:
    """Compare a reply with what was asked, and its sender with who was asked.

    Args:
        row_ids: of the request.
        fingerprint: of the teacher when the run began.

    Raises:
        RowCountError, FingerprintChangedError: naming the teacher.
    """
    teacher = targets.teacher
    if targets.row_ids != row_ids:
        raise RowCountError(
            teacher,
            f"Expected the {len(row_ids)} rows of the request from teacher {teacher!r}, in its order, found "
            f"{len(targets.row_ids)} rows that are not those.",
        )
    if targets.fingerprint != fingerprint:
        raise FingerprintChangedError(
            teacher,
            f"Expected teacher {teacher!r} with fingerprint {fingerprint}, found {targets.fingerprint}: it changed during the run.",
        )


def _row_counts(targets: TeacherTargets) -> Iterable[tuple[str, int]]:
    if targets.tokens is not None:
        yield "tokens", len(targets.tokens.offsets_B1) - 1
    for layer, sparse in (targets.features or {}).items():
        yield f"features of layer {layer}", len(sparse.offsets_B1) - 1
    if targets.codec is not None:
        yield "reconstructions", len(targets.codec.sample_offsets_B1) - 1
    if targets.denoising is not None:
        yield "predictions", len(targets.denoising.predictions_BS)
    if targets.pooled_BE is not None:
        yield "embeddings", len(targets.pooled_BE)
    if targets.label_logprobs_BC is not None:
        yield "labels", len(targets.label_logprobs_BC)


def _arrays(targets: TeacherTargets) -> Iterable[tuple[str, np.ndarray]]:
    """All that has to be finite. The tail of a distribution may be -infinity: nothing may be left outside the kept ids."""
    tokens = targets.tokens
    if isinstance(tokens, HiddenTargets):
        yield "last hidden states", tokens.states_NH
    elif isinstance(tokens, FullTargets):
        # An id that cannot be has -infinity, but never all of them; NaN is larger than everything here.
        yield "probabilities", tokens.logprobs_NV.max(axis=1)
    elif isinstance(tokens, (TokenTargets, SampledTargets)):
        yield "log-probabilities", _logprobs(tokens)
    if isinstance(tokens, TokenTargets):
        yield "tail masses", np.exp(tokens.tail_logprob_N)
    for layer, state in targets.hidden.items():
        yield f"hidden states of layer {layer}", state
    for layer, sparse in (targets.features or {}).items():
        yield f"features of layer {layer}", sparse.values_Z
    if targets.codec is not None:
        yield "latents", targets.codec.latents_FE
        yield "reconstructions", targets.codec.samples_T
    if targets.denoising is not None:
        yield "noise predictions", targets.denoising.predictions_BS
        for name, state in targets.denoising.blocks.items():
            yield f"outputs of {name}", state
    if targets.pooled_BE is not None:
        yield "embeddings", targets.pooled_BE
    if targets.label_logprobs_BC is not None:
        # A label that cannot be has -infinity.
        yield "label probabilities", np.exp(targets.label_logprobs_BC)
