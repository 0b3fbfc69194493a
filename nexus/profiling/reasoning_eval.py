"""Greedy answers to a set of questions, in batches, scored on the answer alone.

Prompts are padded on the left and masked, so that neither the batch size nor a prompt's neighbours change its prediction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nexus.data.answers import AnswerPattern, extract_answer, gold_answer
from nexus.profiling.decoding import stop_tokens
from nexus.profiling.layers import undisturbed

if TYPE_CHECKING:
    from nexus.profiling.niwt import NIWTProfiler

__all__ = ["AnswerPattern", "EvaluationResult", "ablated_answers", "evaluate_batch", "extract_answer"]


@dataclass(frozen=True)
class EvaluationResult:
    """Predictions in the order of the prompts."""

    predictions: tuple[str, ...]
    """The whole completions as text, special tokens left out."""
    correct: tuple[bool, ...]
    accuracy: float
    """Share of correct rows."""
    answers: tuple[str | None, ...]
    """What `extract_answer` found in each prediction; None where it found nothing."""


def evaluate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    answer_pattern: AnswerPattern = "gsm8k",
) -> EvaluationResult:
    """Generate greedily for every prompt and score the answers; `model` is left as it was found.

    Args:
        prompts: complete prompts (a chat template already applied), at least one.
        answers: gold answers, one per prompt; under "gsm8k" with or without the `####`.
        batch_size: prompts per `generate`; changes the speed, not the predictions.

    Raises:
        ValueError: lengths differ, there is no prompt, or a prompt or gold answer is empty.
    """
    if len(prompts) != len(answers) or not prompts:
        raise ValueError(f"Expected one answer per prompt and at least one, found {len(prompts)} and {len(answers)}.")
    if batch_size < 1:
        raise ValueError(f"Expected batch_size of at least 1, found {batch_size}.")
    gold = [gold_answer(answer, answer_pattern) for answer in answers]
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for row, (answer, ids) in enumerate(zip(gold, encoded, strict=True)):
        if answer is None or not ids:
            raise ValueError(
                f"Expected a non-empty prompt and answer in every row, found row {row} without. Leave it out."
            )
    predictions = [""] * len(prompts)
    # Prompts of similar length share a batch, which saves padding.
    order = sorted(range(len(prompts)), key=lambda row: len(encoded[row]))
    with undisturbed(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            completions = _generate(model, tokenizer, [encoded[row] for row in rows], max_new_tokens)
            for row, completion in zip(rows, completions, strict=True):
                predictions[row] = completion
    found = tuple(extract_answer(prediction, answer_pattern) for prediction in predictions)
    correct = tuple(a == b for a, b in zip(found, gold, strict=True))
    return EvaluationResult(tuple(predictions), correct, sum(correct) / len(correct), found)


def ablated_answers(
    profiler: NIWTProfiler,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    golds: Sequence[str],
    *,
    pattern: AnswerPattern,
    max_new_tokens: int,
    end_ids: Collection[int],
) -> np.ndarray:
    """Return bool [L+1, B]: whether the clean model's greedy completion of each prompt (row 0), and that with layer i skipped
    (row i+1), holds the gold answer; what else a completion says is not scored.

    Where the whole completion is the answer, verification gives the same without decoding (`BatchMeasurement.correct_VB`).

    Args:
        prompt_ids: at least one prompt, none empty.
        golds: normalised by `gold_answer`.
        end_ids: what ends a completion, beside the model's own stop tokens.
    """
    width = max(len(row) for row in prompt_ids)
    pad_id = stop_tokens(profiler.model).pad_id
    input_ids_BT = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in prompt_ids])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids])
    tokens_VBA = profiler.ablated_generations(input_ids_BT, mask_BT, max_new_tokens)
    ends = {*end_ids, *stop_tokens(profiler.model).eos_ids}
    return np.array(
        [
            [
                extract_answer(_text(tokenizer, completion, ends), pattern) == gold
                for completion, gold in zip(completions, golds, strict=True)
            ]
            for completions in tokens_VBA.tolist()
        ]
    )


def _text(tokenizer: PreTrainedTokenizerBase, completion: Sequence[int], ends: Collection[int]) -> str:
    """Return a completion up to its first end token as text."""
    # The pad id may be an ordinary token of the tokenizer: cut before decoding, not by skipping special tokens.
    length = next((position for position, token in enumerate(completion) if token in ends), len(completion))
    return str(tokenizer.decode(list(completion[:length]), skip_special_tokens=True))


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    stop = stop_tokens(model)
    pad_id = stop.pad_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(len(row) for row in ids)
    input_ids_BT = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in ids], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    generated: Tensor = cast(Any, model).generate(
        input_ids=input_ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_id,
    )
    return [_text(tokenizer, row, stop.eos_ids) for row in generated[:, width:].tolist()]
