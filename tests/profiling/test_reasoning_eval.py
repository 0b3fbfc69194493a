"""Batched greedy evaluation: the batch size is no part of the answer, and only the answer is scored."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nexus.profiling.reasoning_eval import evaluate_batch


def word_tokenizer(tokens: list[str], **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def lookup_tokenizer(lookup_task) -> PreTrainedTokenizerFast:
    return word_tokenizer(list(lookup_task.tokens), pad_token="<pad>", eos_token="<eos>")


QUESTIONS = [f"ask {value}" for value in range(8)]
ANSWERS = [str((3 * value + 1) % 8) for value in range(8)]


def test_a_model_that_knows_the_answers_is_right(lookup_task, lookup_tokenizer):
    result = evaluate_batch(lookup_task.model, lookup_tokenizer, QUESTIONS, ANSWERS, max_new_tokens=4, batch_size=3)
    assert result.accuracy == 1
    assert result.correct == (True,) * 8
    assert result.predictions == tuple(f"#### {answer}" for answer in ANSWERS)
    assert result.answers == tuple(ANSWERS)


def test_wrong_answers_are_counted_row_by_row(lookup_task, lookup_tokenizer):
    answers = [*ANSWERS[:6], "7.5", "#### 7.5"]
    result = evaluate_batch(lookup_task.model, lookup_tokenizer, QUESTIONS, answers, max_new_tokens=4, batch_size=8)
    assert result.correct == (True,) * 6 + (False,) * 2
    assert result.accuracy == 0.75


def test_gold_answers_may_be_whole_solutions(lookup_task, lookup_tokenizer):
    answers = [f"Three times it, and one more.\n#### {answer}" for answer in ANSWERS]
    result = evaluate_batch(lookup_task.model, lookup_tokenizer, QUESTIONS, answers, max_new_tokens=4, batch_size=8)
    assert result.accuracy == 1


def test_exact_scores_the_whole_completion(lookup_task, lookup_tokenizer):
    gold = [f" #### {answer}\n" for answer in ANSWERS[:-1]] + [ANSWERS[-1]]
    result = evaluate_batch(
        lookup_task.model, lookup_tokenizer, QUESTIONS, gold, max_new_tokens=4, batch_size=8, answer_pattern="exact"
    )
    assert result.correct == (True,) * 7 + (False,)


def test_a_completion_cut_before_its_answer_has_none(lookup_task, lookup_tokenizer):
    result = evaluate_batch(lookup_task.model, lookup_tokenizer, QUESTIONS, ANSWERS, max_new_tokens=1, batch_size=8)
    assert result.answers == (None,) * 8
    assert result.accuracy == 0


@pytest.fixture(scope="module")
def random_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=40,
        initializer_range=0.2,
        pad_token_id=None,
        eos_token_id=7,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (17,), generator=generator).tolist()
    return [" ".join(f"w{t}" for t in torch.randint(10, 40, (n,), generator=generator).tolist()) for n in lengths]


@pytest.mark.parametrize("special", [{}, {"eos_token": "w7"}, {"pad_token": "w3"}])
def test_batch_sizes_give_equal_predictions(random_model, prompts, special):
    tokenizer = word_tokenizer([f"w{index}" for index in range(40)], **special)
    results = [
        evaluate_batch(
            random_model,
            tokenizer,
            prompts,
            ["w1"] * len(prompts),
            max_new_tokens=12,
            batch_size=batch_size,
            answer_pattern="exact",
        )
        for batch_size in (1, 4, 8, 16)
    ]
    assert results[0] == results[1] == results[2] == results[3]
    assert len(set(results[0].predictions)) > 10


def test_predictions_keep_the_order_of_the_prompts(random_model, prompts):
    tokenizer = word_tokenizer([f"w{index}" for index in range(40)])
    arguments = {"max_new_tokens": 6, "batch_size": 4, "answer_pattern": "exact"}
    forward = evaluate_batch(random_model, tokenizer, prompts, ["w1"] * 17, **arguments)
    backward = evaluate_batch(random_model, tokenizer, prompts[::-1], ["w1"] * 17, **arguments)
    assert backward.predictions == forward.predictions[::-1]


@pytest.mark.parametrize("eos", [None, [7, 8]])
def test_a_pad_id_is_found_without_tokenizer_and_model_naming_one(prompts, eos):
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=40,
        initializer_range=0.2,
        pad_token_id=None,
        eos_token_id=eos,
    )
    model = Qwen3ForCausalLM(config).eval()
    tokenizer = word_tokenizer([f"w{index}" for index in range(40)])
    result, alone = (
        evaluate_batch(
            model, tokenizer, prompts, ["w1"] * 17, max_new_tokens=4, batch_size=size, answer_pattern="exact"
        )
        for size in (17, 1)
    )
    assert result == alone


def test_the_model_is_left_in_training_mode(lookup_task, lookup_tokenizer):
    lookup_task.model.train()
    try:
        state = torch.get_rng_state()
        evaluate_batch(lookup_task.model, lookup_tokenizer, QUESTIONS, ANSWERS, max_new_tokens=1, batch_size=8)
        assert lookup_task.model.training
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        lookup_task.model.eval()


@pytest.mark.parametrize(
    ("prompts", "answers", "batch_size", "message"),
    [
        (["ask 1"], [], 1, "one answer per prompt and at least one, found 1 and 0"),
        ([], [], 1, "found 0 and 0"),
        (["ask 1"], ["4"], 0, "batch_size of at least 1, found 0"),
        (["ask 1", ""], ["4", "4"], 1, "found row 1 without"),
        (["ask 1", "ask 2"], [" ", "4"], 1, "found row 0 without"),
        (["ask 1"], ["reasons only ####"], 1, "found row 0 without"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(lookup_task, lookup_tokenizer, prompts, answers, batch_size, message):
    with pytest.raises(ValueError, match=message):
        evaluate_batch(lookup_task.model, lookup_tokenizer, prompts, answers, max_new_tokens=1, batch_size=batch_size)
