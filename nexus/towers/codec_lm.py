"""What a language model over codec tokens gives as a teacher: the distribution of every code of a recording, and its hidden states.

Moshi (Defossez et al. 2024, https://arxiv.org/abs/2410.00037, section 3.4) writes one frame of its voice at a time: a temporal
decoder reads all codes of the frames before, a depth decoder then writes the codes of the frame one after the other. Here a recording
is what Moshi says while its listener is silent: its codes are given (teacher forcing), and each code's distribution is asked for. The
text stream is not given (its start token stands in every frame), and the depth decoder is given the most probable text token.

Codebooks after the first are delayed by one frame, as in training. The first frame, in which they are not yet written, is not scored.
Shape letters: Q codebooks, F scored frames, N = F * Q codes (frame by frame), K kept codes, V codes of a codebook, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nexus.data.media import add_noise, decode_audio
from nexus.errors import DataError
from nexus.towers.blocks import recorded_blocks
from nexus.towers.rows import RowsError
from nexus.towers.targets import ScoreRequest, TokenTargets
from nexus.towers.transports import pack_topk

MODEL_CLASS = "MoshiForConditionalGeneration"
"""The class of transformers whose two decoders and codec are known here."""


def score_recordings(
    model: PreTrainedModel, processor: Any, request: ScoreRequest
) -> tuple[TokenTargets, dict[int, np.ndarray]]:
    """Distributions of every code, rows in the request's order, and the temporal decoder's states.

    Returns:
        Targets whose positions run over frames, and within a frame over codebooks; and layer -> float16 [F of all rows, H], the
        states from which a frame's codes are written.

    Raises:
        RowsError: recordings that cannot be decoded, are shorter than two frames or longer than the model's context, or whose results
            are not finite.
    """
    assert request.media is not None
    offsets, codes, ids, logprobs, tails = [0], [], [], [], []
    hidden: dict[int, list[Tensor]] = {layer: [] for layer in request.layers}
    bad: dict[str, str] = {}
    for row_id, data in zip(request.row_ids, request.media, strict=True):
        try:
            codes_QF = _encode(model, processor, row_id, data, request.snr_db)
        except DataError as error:
            bad[row_id] = str(error)
            continue
        logits_NV, states = _forward(model, codes_QF, request.layers)
        packed = pack_topk(logits_NV, top_k=min(request.top_k, logits_NV.shape[1]), temperature=request.temperature)
        halves = {layer: state_FH.to(torch.float16) for layer, state_FH in states.items()}
        if not (packed.finite_N.all() and all(state.isfinite().all() for state in halves.values())):
            bad[row_id] = "not finite"
            continue
        codes.append(_delayed(codes_QF)[:, 1:].T.flatten().cpu().numpy())
        ids.append(packed.ids_NK.cpu().numpy())
        logprobs.append(packed.logprobs_NK.cpu().numpy())
        tails.append(packed.tail_N.cpu().numpy())
        offsets.append(offsets[-1] + len(codes[-1]))
        for layer, state_FH in halves.items():
            hidden[layer].append(state_FH.cpu())
    if bad:
        raise RowsError("Expected recordings that the teacher can hear in every row; mend or drop the rows.", bad)
    tokens = TokenTargets(
        offsets_B1=np.array(offsets, dtype=np.int64),
        token_ids_N=np.concatenate(codes).astype(np.int32),
        ids_NK=np.concatenate(ids),
        logprobs_NK=np.concatenate(logprobs),
        tail_logprob_N=np.concatenate(tails),
    )
    return tokens, {layer: torch.cat(states).numpy() for layer, states in hidden.items()}


def num_codebooks(model: PreTrainedModel) -> int:
    """Codes Q of one frame."""
    return int(model.config.num_codebooks)


def _encode(model: Any, processor: Any, row_id: str, data: bytes, snr_db: float | None) -> Tensor:
    """Codes [Q, frames] of a recording, by the teacher's own codec."""
    rate = processor.sampling_rate
    waveform = decode_audio(data, rate)
    if snr_db is not None:
        waveform = add_noise(waveform, row_id, snr_db)
    with torch.inference_mode():
        codes_QF: Tensor = model.audio_encoder.encode(
            torch.from_numpy(waveform)[None, None].to(model.device, model.dtype), num_quantizers=model.num_codebooks
        )[0][0]
    limit = model.config.max_position_embeddings
    if not 2 <= codes_QF.shape[1] <= limit:
        raise DataError(
            f"Expected a recording of 2 to {limit} frames of the codec, found {codes_QF.shape[1]}. Cut or drop the row."
        )
    return codes_QF


def _forward(model: Any, codes_QF: Tensor, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [N, V] of the scored codes and the states [F, H] of their frames."""
    start = model.config.audio_vocab_size
    delayed_QF = _delayed(codes_QF, start)
    num_frames = delayed_QF.shape[1]
    # Frame t is written from the frames before it.
    own_QF = torch.cat([torch.full_like(delayed_QF[:, :1], start), delayed_QF[:, :-1]], dim=1)
    samples = torch.zeros(1, 1, num_frames * _samples_per_frame(model), device=model.device, dtype=model.dtype)
    with torch.inference_mode(), recorded_blocks(model, layers) as recorded:
        silence_QF = model.audio_encoder.encode(samples, num_quantizers=model.num_codebooks)[0][0][:, :num_frames]
        output = model(
            input_ids=torch.full((1, num_frames), model.config.vocab_size, device=model.device),
            moshi_audio_codes=own_QF[None],
            user_audio_codes=silence_QF[None],
            use_cache=False,
        )
        text_F1 = output.logits[0, 1:].argmax(dim=-1, keepdim=True)
        scored_FQ = delayed_QF[:, 1:].T
        logits_FQV = model.depth_decoder(
            last_hidden_state=output.last_hidden_state[0, 1:, None],
            input_ids=torch.cat([text_F1, scored_FQ[:, :-1]], dim=1),
            use_cache=False,
        ).logits
    return logits_FQV.flatten(0, 1), {layer: state_BTH[0, 1:] for layer, state_BTH in recorded.items()}


def _delayed(codes_QF: Tensor, start: int = 0) -> Tensor:
    """The first codebook as it is, the others one frame later, behind `start`."""
    later_QF = torch.cat([torch.full_like(codes_QF[1:, :1], start), codes_QF[1:, :-1]], dim=1)
    return torch.cat([codes_QF[:1], later_QF])


def _samples_per_frame(model: Any) -> int:
    codec = model.config.audio_encoder_config
    return round(codec.sampling_rate / codec.frame_rate)
