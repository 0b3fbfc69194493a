"""What a teacher is asked and what it returns: plain frozen dataclasses of NumPy arrays.

Columnar NumPy crosses Ray's object store without a copy (Python lists of the same content are 40-85 times slower). Shape letters:
B rows, N scored completion tokens of all rows together, K kept ids, S draws, V vocabulary, Z active features of all tokens together,
P positions (patches, frames), C classes, E embedding width, H hidden width of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Union

import numpy as np

Transport = Literal["topk", "hidden", "sampled", "full", "auto", "none"]
"""How a token distribution travels: the K most probable ids and a tail; the last hidden state, from which whoever holds the teacher's
output head computes exact logits; unbiased draws; every log-probability; whichever of topk, hidden and full takes the fewest bytes
for the error that the request allows; or not at all, for a receiver that reads the states of inner layers alone."""


@dataclass(frozen=True)
class Denoising:
    """How a diffusion teacher walks from noise to its result."""

    seed: int = 0
    """With the row's id it decides the noise that is started from."""
    num_steps: int = 4
    """Steps of the teacher's own scheduler; each gives targets."""


@dataclass(frozen=True)
class ScoreRequest:
    """Rows to score. Text crosses, not ids: each teacher has its own tokenizer."""

    row_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    completions: tuple[str, ...] | None
    """Text to score under a language model; None for encoders."""
    media: tuple[bytes, ...] | None
    """Encoded image or audio bytes per row, for teachers that take media."""
    temperature: float
    """Softmax temperature of the returned distributions."""
    top_k: int
    layers: tuple[int, ...]
    """Blocks whose hidden states are returned; empty returns none."""
    snr_db: float | None = None
    """Noise added to decoded audio (deterministic per row id)."""
    transport: Transport = "topk"
    """How a language model's token distributions come back."""
    draws: int | None = None
    """S of `sampled`; None for the other transports."""
    max_error: float | None = None
    """What `auto` may lose: KL(teacher || what its targets say), nats per scored token of the reply; None for the others."""
    capability: str | None = None
    """Of the rows; finds targets that were cached, and is nothing to a teacher."""
    denoising: Denoising = Denoising()
    """For diffusion teachers."""


@dataclass(frozen=True)
class ScoredTokens:
    """The completion tokens that distributions belong to, end-of-sequence included; prompts never travel."""

    offsets_B1: np.ndarray
    """int64 [B+1]; row b owns positions offsets[b]:offsets[b+1]."""
    token_ids_N: np.ndarray
    """int32 [N]; the scored tokens themselves, in the teacher's vocabulary."""


@dataclass(frozen=True)
class TokenTargets(ScoredTokens):
    """Top-k with a tail."""

    ids_NK: np.ndarray
    """int32 [N, K], most probable first."""
    logprobs_NK: np.ndarray
    """float32 [N, K], at the request's temperature."""
    tail_logprob_N: np.ndarray
    """float32 [N]; log of the mass outside the kept ids (-inf when nothing is outside)."""


@dataclass(frozen=True)
class SampledTargets(ScoredTokens):
    """Draws from the teacher with replacement (RS-KD, arXiv 2503.16870): unbiased, whatever their number."""

    ids_NS: np.ndarray
    """int32 [N, S]."""
    logprobs_NS: np.ndarray
    """float32 [N, S]; the teacher's, at the request's temperature."""


@dataclass(frozen=True)
class HiddenTargets(ScoredTokens):
    """The states that the teacher's output head reads."""

    states_NH: np.ndarray
    """float32 [N, H]."""


@dataclass(frozen=True)
class FullTargets(ScoredTokens):
    """The whole distribution."""

    logprobs_NV: np.ndarray
    """float32 [N, V]; at the request's temperature."""


@dataclass(frozen=True)
class TokensAlone(ScoredTokens):
    """No distributions: only what the hidden states of `TeacherTargets` belong to."""


TokenDistributions = Union[TokenTargets, SampledTargets, HiddenTargets, FullTargets, TokensAlone]


@dataclass(frozen=True)
class TeacherHead:
    """A language model's output head: its logits are softcap tanh((W h + b) / softcap), or W h + b without a soft cap."""

    weight_VH: np.ndarray
    """float32, or uint16 that holds the bits of bfloat16."""
    bias_V: np.ndarray | None
    """float32."""
    softcap: float | None


@dataclass(frozen=True)
class SparseTargets:
    """Active features of a dictionary at each scored token: compressed rows, only what is active."""

    offsets_B1: np.ndarray
    """int64 [B+1]; row b owns tokens offsets[b]:offsets[b+1]."""
    token_offsets_N1: np.ndarray
    """int64 [N+1]; token n owns entries token_offsets[n]:token_offsets[n+1]."""
    feature_ids_Z: np.ndarray
    """int32 [Z]; ascending within a token."""
    values_Z: np.ndarray
    """float32 [Z]; activations, all different from 0."""
    num_features: int


@dataclass(frozen=True)
class DenoisingTargets:
    """What a diffusion teacher predicts along its denoising, without guidance. Latents have their own shape behind B and S."""

    timesteps_S: np.ndarray
    """float32 [S]; as the denoiser is told them."""
    latents_BS: np.ndarray
    """float32 [B, S, ...]; what was denoised, in the form in which the denoiser takes it."""
    predictions_BS: np.ndarray
    """float32 [B, S, ...]; the noise prediction (the velocity of a rectified flow)."""
    blocks: Mapping[str, np.ndarray]
    """Name of a block -> float16 [B, S, P, H], or [B, S, frames, channels, height, width] of a U-Net's."""


@dataclass(frozen=True)
class CodecTargets:
    """What a codec makes of recordings. F frames and T samples of all rows together, Q quantisers, E width of the latents."""

    frame_offsets_B1: np.ndarray
    """int64 [B+1]; row b owns frames offsets[b]:offsets[b+1]."""
    codes_FQ: np.ndarray
    """int32 [F, Q]."""
    latents_FE: np.ndarray
    """float16 [F, E]; the sum over the quantisers, which the codec's decoder reads."""
    sample_offsets_B1: np.ndarray
    """int64 [B+1]; row b owns samples offsets[b]:offsets[b+1]."""
    samples_T: np.ndarray
    """float32 [T]; the reconstruction, as long as the recording."""
    sampling_rate: int
    """Hertz, of the reconstruction and of the recording that it was made from."""
    mse_B: np.ndarray
    """float32 [B]; mean square of reconstruction minus recording."""


@dataclass(frozen=True)
class TeacherTargets:
    """The answer to a `ScoreRequest`, rows in the request's order."""

    teacher: str
    fingerprint: str
    """Hash of checkpoint, revision, quantisation, tokenizer and schema; cached rows of another fingerprint are refused."""
    tokenizer_hash: str | None
    """Equal hashes mean equal vocabularies: then token ids need no alignment."""
    row_ids: tuple[str, ...]
    tokens: TokenDistributions | None
    hidden: Mapping[int, np.ndarray]
    """Layer -> float16 [N, H] at scored tokens (causal_lm: the state that predicts the token) or [B, P, H] (encoder)."""
    pooled_BE: np.ndarray | None
    """float32 [B, E]; an encoder's pooled embedding."""
    label_texts: tuple[str, ...] | None
    label_logprobs_BC: np.ndarray | None
    """float32 [B, C] at the request's temperature; a classification head's distribution."""
    features: Mapping[int, SparseTargets] | None = None
    """Layer -> active features of its dictionary; None for all roles but sae."""
    codebooks: int | None = None
    """Codes of one frame of a codec_lm: `tokens` then run over frames and codebooks, `hidden` over frames; None otherwise."""
    denoising: DenoisingTargets | None = None
    """None for all roles but diffusion."""
    codec: CodecTargets | None = None
    """None for all roles but codec."""

    def __eq__(self, other: object) -> bool:
        """Equality of every field, arrays compared bit by bit."""
        if not isinstance(other, TeacherTargets):
            return NotImplemented
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]  # arrays inside


def _equal(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    for columns in (
        TokenTargets,
        SampledTargets,
        HiddenTargets,
        FullTargets,
        TokensAlone,
        SparseTargets,
        DenoisingTargets,
        CodecTargets,
    ):
        if isinstance(a, columns) and isinstance(b, columns):
            return all(_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(columns))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    # An array against None has no single truth value.
    return type(a) is type(b) and a == b
