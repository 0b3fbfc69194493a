"""Recordings with the text that is said in them, as a speech recogniser of an encoder and a decoder is profiled on them.

The decoder is given what it is given when it transcribes (Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 2.3): its
start token; in a multilingual model the language that it hears and the task; and that no timestamps are wanted. The text and the end
token are scored. Shape letters: B rows, T time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nexus.profiling.layers import find_stacks
from nexus.profiling.niwt import ProfileBatch
from nexus.towers.rows import RowsError


def can_transcribe(model: PreTrainedModel) -> bool:
    """Whether a decoder of blocks writes what the encoder hears; a transducer's does not."""
    return model.can_generate() and len(find_stacks(model)) == 2


def transcript_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row_ids: Sequence[str],
    texts: Sequence[str | None],
    inputs: Mapping[str, Tensor],
) -> ProfileBatch:
    """The rows as a batch to profile, padded on the right.

    Args:
        texts: what is said in each row.
        inputs: what the encoder reads, the batch in front.

    Raises:
        RowsError: rows without text, or with more of it than the decoder's context holds.
    """
    missing = {row_id: "no text" for row_id, text in zip(row_ids, texts, strict=True) if not (text or "").strip()}
    if missing:
        raise RowsError(
            "Expected the text of every recording that a speech recogniser is profiled on; add or drop them.", missing
        )
    encoded: list[list[int]] = tokenizer([text or "" for text in texts], add_special_tokens=False)["input_ids"]
    completions = [[*ids, cast(int, tokenizer.eos_token_id)] for ids in encoded]
    prompts = _prompts(model, inputs)
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    limit = int(model.config.max_target_positions)
    long = {row_id: f"{length} tokens" for row_id, length in zip(row_ids, lengths, strict=True) if length > limit}
    if long:
        raise RowsError(
            f"Expected texts of at most {limit} tokens, start and end included; shorten or drop the rows.", long
        )
    shape = (len(prompts), max(lengths))
    input_ids_BT = torch.full(shape, cast(int, tokenizer.eos_token_id))
    attention_mask_BT, loss_mask_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        input_ids_BT[b, : lengths[b]] = torch.tensor([*prompt, *completion])
        attention_mask_BT[b, : lengths[b]] = 1
        loss_mask_BT[b, len(prompt) : lengths[b]] = True
    return ProfileBatch(list(row_ids), input_ids_BT, attention_mask_BT, loss_mask_BT, inputs)


def _prompts(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """The ids that ask for a transcript of each row."""
    config: Any = model.generation_config
    start = (
        model.config.decoder_start_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    )
    # Only multilingual models know languages and tasks, only Whisper's generation configurations say how.
    tail = [] if getattr(config, "no_timestamps_token_id", None) is None else [config.no_timestamps_token_id]
    num_rows = len(next(iter(inputs.values())))
    if not getattr(config, "is_multilingual", False):
        return [[start, *tail]] * num_rows
    languages_B = cast(Any, model).detect_language(
        input_features=inputs["input_features"],
        generation_config=config,
        num_segment_frames=inputs["input_features"].shape[-1],
    )
    return [[start, language, config.task_to_id["transcribe"], *tail] for language in languages_B.tolist()]
