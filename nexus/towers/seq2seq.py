"""What a speech recogniser's decoder gives beside its encoder: the distribution of every token of a transcript, given the recording.

The transcript is given (teacher forcing) behind the decoder's own prompt, such as Whisper's language and task tokens. Padding stands
behind the scored tokens, where a causal decoder does not look. Shape letters: B rows, C longest transcript with its end token,
N scored tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nexus.towers.rows import RowsError
from nexus.towers.targets import ScoreRequest, TokenTargets
from nexus.towers.transports import pack_topk

MAX_ROWS = 16
"""Rows of one forward: 448 tokens of each over Whisper's 51,866 ids take 1.5 GB in float32, and as much again for their softmax."""


def score_transcripts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Tensor], request: ScoreRequest
) -> TokenTargets:
    """Distributions of every token of the completions, the end token included, rows in the request's order.

    Args:
        inputs: prepared recordings, batch in front, on the model's device.

    Raises:
        RowsError: transcripts that are longer than the decoder's positions, or whose results are not finite.
    """
    assert request.completions is not None
    prompt = decoder_prompt(model, tokenizer)
    encoded: list[list[int]] = tokenizer(list(request.completions), add_special_tokens=False)["input_ids"]
    rows = [[*ids, int(tokenizer.eos_token_id)] for ids in encoded]
    limit = int(model.config.max_target_positions)
    _refuse(
        f"Expected transcripts of at most {limit - len(prompt) + 1} tokens of the teacher; shorten or drop the rows.",
        {
            row_id: f"{len(ids)} tokens"
            for row_id, ids in zip(request.row_ids, rows, strict=True)
            if len(prompt) + len(ids) - 1 > limit
        },
    )
    parts, bad = [], {}
    for start in range(0, len(rows), MAX_ROWS):
        chosen = rows[start : start + MAX_ROWS]
        batch = {name: tensor[start : start + MAX_ROWS] for name, tensor in inputs.items()}
        logits_NV = _forward(model, batch, prompt, chosen)
        packed = pack_topk(logits_NV, top_k=min(request.top_k, logits_NV.shape[1]), temperature=request.temperature)
        counts = [len(ids) for ids in chosen]
        for row_id, finite in zip(request.row_ids[start:], packed.finite_N.split(counts), strict=False):
            if not finite.all():
                bad[row_id] = "not finite"
        parts.append(tuple(column.cpu().numpy() for column in (packed.ids_NK, packed.logprobs_NK, packed.tail_N)))
    _refuse("Expected finite results from the teacher for every row; quarantine the rows.", bad)
    ids_NK, logprobs_NK, tail_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TokenTargets(
        offsets_B1=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        token_ids_N=np.array([token for ids in rows for token in ids], dtype=np.int32),
        ids_NK=ids_NK,
        logprobs_NK=logprobs_NK,
        tail_logprob_N=tail_N,
    )


def decoder_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids in front of every transcript: what the tokenizer puts there (start, language, task), else the decoder's start token."""
    own: Sequence[int] | None = getattr(tokenizer, "prefix_tokens", None)
    return list(own) if own else [int(model.config.decoder_start_token_id)]


def _forward(model: Any, inputs: Mapping[str, Tensor], prompt: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits [N, V] of all rows' tokens, row after row."""
    longest = max(map(len, rows))
    # The end token is scored but never read.
    ids_BT = torch.tensor(
        [[*prompt, *ids[:-1], *[ids[-1]] * (longest - len(ids))] for ids in rows], device=model.device
    )
    scored_BC = torch.tensor([[True] * len(ids) + [False] * (longest - len(ids)) for ids in rows], device=model.device)
    with torch.inference_mode():
        logits_BTV: Tensor = model(**inputs, decoder_input_ids=ids_BT, use_cache=False).logits
    return logits_BTV[:, len(prompt) - 1 :][scored_BC]


def _refuse(what: str, bad: dict[str, str]) -> None:
    if bad:
        raise RowsError(what, bad)
