"""Answers of all ablations, generated and scored on the answer alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nexus.profiling.niwt import NIWTProfiler
from nexus.profiling.reasoning_eval import ablated_answers, evaluate_batch


@pytest.fixture(scope="module")
def tokenizer(lookup_task) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(lookup_task.tokens)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def found(task, tokenizer, golds: Sequence[str], end_ids: Sequence[int] = ()) -> np.ndarray:
    prompts = [tokenizer(f"ask {value}")["input_ids"] for value in range(8)]
    return ablated_answers(
        NIWTProfiler(task.model), tokenizer, prompts, golds, pattern="gsm8k", max_new_tokens=4, end_ids=end_ids
    )


GOLDS = [str((3 * value + 1) % 8) for value in range(8)]


def test_each_ablation_is_judged_as_a_model_of_its_own(lookup_task, tokenizer, skipping):
    judged_VB = found(lookup_task, tokenizer, [*GOLDS[:6], "7", "7.5"])
    blocks = lookup_task.model.model.layers
    for variant in range(4):
        with skipping(blocks, variant - 1 if variant else None):
            alone = evaluate_batch(
                lookup_task.model,
                tokenizer,
                [f"ask {value}" for value in range(8)],
                [*GOLDS[:6], "7", "7.5"],
                max_new_tokens=4,
                batch_size=8,
            )
        assert judged_VB[variant].tolist() == list(alone.correct)
    assert judged_VB[0].sum() in (6, 7)
    assert not judged_VB[lookup_task.critical_layer + 1].any()


def test_what_follows_an_end_token_is_no_answer(lookup_task, tokenizer):
    marker = lookup_task.tokens.index("####")
    assert found(lookup_task, tokenizer, GOLDS)[0].all()
    assert not found(lookup_task, tokenizer, GOLDS, end_ids=[marker]).any()


def test_the_batch_is_padded_on_the_left(lookup_task, tokenizer):
    prompts = [tokenizer("ask 3")["input_ids"], tokenizer("ask ask ask 3")["input_ids"]]
    arguments = {"pattern": "gsm8k", "max_new_tokens": 4, "end_ids": []}
    profiler = NIWTProfiler(lookup_task.model)
    together = ablated_answers(profiler, tokenizer, prompts, [GOLDS[3]] * 2, **arguments)
    alone = [ablated_answers(profiler, tokenizer, [prompt], [GOLDS[3]], **arguments) for prompt in prompts]
    assert np.array_equal(together, np.concatenate(alone, axis=1))
    assert together[0, 0]
