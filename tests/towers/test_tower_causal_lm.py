"""Scores and answers of language-model teachers, against a plain unpadded forward of the same model."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from nexus.config import SAMPLES_DIR
from nexus.errors import ConfigError
from nexus.profiling.layers import find_blocks
from nexus.towers.blocks import block_width, recorded_blocks
from nexus.towers.causal_lm import (
    answer_rows,
    completion_logits,
    end_token_ids,
    generate_greedily,
    profile_inputs,
    score_completions,
    tokenise_prompts,
    tokenise_rows,
)
from nexus.towers.loader import LoadedTower
from nexus.towers.rows import RowsError
from nexus.towers.targets import ScoreRequest, TokensAlone
from nexus.towers.transports import pack_topk

PROMPTS = ("2+2?", "a much longer question than the others", "x", "Tom has 3 apples")
COMPLETIONS = ("4", "ok", "a completion that is longer than its own prompt", "")
# One forward of four padded rows against four forwards: float32 rounding of sums of 128 products.
ROUNDING = 2e-5

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"


@pytest.fixture(params=["qwen", "gemma"])
def tower(request: pytest.FixtureRequest) -> LoadedTower:
    return request.getfixturevalue(request.param)


def reference(tower: LoadedTower, prompt: str, completion: str, layer: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """float64 log-probabilities [N, V] and block outputs [N, H] of one row, by a forward without padding or shortcuts."""
    prompt_ids = tower.tokenizer(prompt + "\n")["input_ids"]
    completion_ids = [*tower.tokenizer(completion, add_special_tokens=False)["input_ids"], tower.tokenizer.eos_token_id]
    seen = []
    handle = find_blocks(tower.model).blocks[layer].register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        logits = tower.model(input_ids=torch.tensor([prompt_ids + completion_ids])).logits[0]
    handle.remove()
    states = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    predicting = slice(len(prompt_ids) - 1, -1)
    logprobs = torch.log_softmax(logits[predicting].double(), dim=-1).numpy()
    return logprobs, states.reshape(-1, 64)[predicting].numpy(), completion_ids


def test_padded_batch_equals_an_unpadded_forward_of_each_row(
    tower: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    targets, hidden = score_completions(
        tower.model, tower.tokenizer, text_request(PROMPTS, COMPLETIONS, top_k=104, layers=(0, 2))
    )
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        own = slice(*targets.offsets_B1[row : row + 2])
        logprobs_NV, states_NH, completion_ids = reference(tower, prompt, completion, 2)
        assert targets.token_ids_N[own].tolist() == completion_ids
        dense_NV = np.zeros_like(logprobs_NV)
        np.put_along_axis(
            dense_NV, targets.ids_NK[own].astype(np.int64), targets.logprobs_NK[own].astype(np.float64), axis=1
        )
        np.testing.assert_allclose(dense_NV, logprobs_NV, atol=ROUNDING)
        # float16 keeps 11 bits.
        np.testing.assert_allclose(hidden[2][own].astype(np.float32), states_NH, rtol=2**-10, atol=1e-3)


def test_results_do_not_depend_on_the_other_rows_or_their_order(
    tower: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    whole, hidden = score_completions(tower.model, tower.tokenizer, text_request(PROMPTS, COMPLETIONS, layers=(1,)))
    for row in range(4):
        alone, alone_hidden = score_completions(
            tower.model, tower.tokenizer, text_request(PROMPTS[row : row + 1], COMPLETIONS[row : row + 1], layers=(1,))
        )
        own = slice(*whole.offsets_B1[row : row + 2])
        np.testing.assert_allclose(alone.logprobs_NK, whole.logprobs_NK[own], atol=ROUNDING)
        np.testing.assert_allclose(alone.tail_logprob_N, whole.tail_logprob_N[own], atol=ROUNDING)
        assert (alone.ids_NK[:, 0] == whole.ids_NK[own, 0]).all()
        np.testing.assert_allclose(alone_hidden[1], hidden[1][own], rtol=2**-9, atol=2e-3)


def test_same_request_gives_the_same_bits(qwen: LoadedTower, text_request: Callable[..., ScoreRequest]) -> None:
    request = text_request(PROMPTS, COMPLETIONS, layers=(0,))
    first, first_hidden = score_completions(qwen.model, qwen.tokenizer, request)
    second, second_hidden = score_completions(qwen.model, qwen.tokenizer, request)
    assert np.array_equal(first.logprobs_NK, second.logprobs_NK)
    assert np.array_equal(first_hidden[0], second_hidden[0])


def test_shapes_and_types_are_those_of_the_contract(
    qwen: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    targets, hidden = score_completions(
        qwen.model, qwen.tokenizer, text_request(PROMPTS, COMPLETIONS, top_k=5, layers=(0, 1))
    )
    lengths = [len(completion) + 1 for completion in COMPLETIONS]
    assert targets.offsets_B1.dtype == np.int64
    assert targets.offsets_B1.tolist() == [0, *np.cumsum(lengths)]
    assert (targets.ids_NK.dtype, targets.ids_NK.shape) == (np.int32, (sum(lengths), 5))
    assert (targets.logprobs_NK.dtype, targets.logprobs_NK.shape) == (np.float32, (sum(lengths), 5))
    assert (targets.tail_logprob_N.dtype, targets.tail_logprob_N.shape) == (np.float32, (sum(lengths),))
    assert targets.token_ids_N.dtype == np.int32
    assert {layer: (state.dtype, state.shape) for layer, state in hidden.items()} == {
        0: (np.float16, (sum(lengths), 64)),
        1: (np.float16, (sum(lengths), 64)),
    }


def test_without_distributions_no_logit_is_computed_and_the_states_stay_the_same(
    qwen: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    request = text_request(PROMPTS, COMPLETIONS, layers=(0, 1))
    whole, expected = score_completions(qwen.model, qwen.tokenizer, request)
    calls = []
    handle = qwen.model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    alone, hidden = score_completions(qwen.model, qwen.tokenizer, replace(request, transport="none"))
    handle.remove()
    assert not calls
    assert isinstance(alone, TokensAlone)
    assert alone.offsets_B1.tolist() == whole.offsets_B1.tolist()
    assert alone.token_ids_N.tolist() == whole.token_ids_N.tolist()
    for layer, states_NH in expected.items():
        np.testing.assert_array_equal(hidden[layer], states_NH)


def test_empty_request_gives_empty_targets(qwen: LoadedTower, text_request: Callable[..., ScoreRequest]) -> None:
    targets, hidden = score_completions(qwen.model, qwen.tokenizer, text_request((), (), top_k=5, layers=(1,)))
    assert targets.offsets_B1.tolist() == [0]
    assert targets.logprobs_NK.shape == (0, 5)
    assert hidden[1].shape == (0, 64)


@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 300.0]),
    temperature=st.sampled_from([0.25, 1.0, 2.0, 8.0]),
    top_k=st.integers(1, 32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_kept_and_tail_mass_sum_to_one_and_match_float64(
    seed: int, scale: float, temperature: float, top_k: int, dtype: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_NV = (torch.randn(5, 32, generator=generator) * scale).to(dtype)
    packed = pack_topk(logits_NV, top_k=top_k, temperature=temperature)
    log_p_NV = torch.log_softmax(logits_NV.double() / temperature, dim=-1)
    kept_NK = log_p_NV.gather(-1, packed.ids_NK.long())
    # Logits of up to 1200 have a spacing of 1.2e-4 in float32.
    torch.testing.assert_close(packed.logprobs_NK.double(), kept_NK, rtol=1e-6, atol=3e-4)
    assert (packed.logprobs_NK.diff(dim=-1) <= 0).all()
    rest_NV = log_p_NV.scatter(-1, packed.ids_NK.long(), -torch.inf)
    torch.testing.assert_close(packed.tail_N.double(), rest_NV.logsumexp(dim=-1), rtol=1e-6, atol=3e-4)
    total_N = packed.logprobs_NK.double().exp().sum(dim=-1) + packed.tail_N.double().exp()
    torch.testing.assert_close(total_N, torch.ones_like(total_N), rtol=0, atol=5e-4)


def test_tail_keeps_its_digits_where_the_kept_mass_is_nearly_one() -> None:
    logits = torch.tensor([[0.0, -60.0, -70.0]])
    tail = pack_topk(logits, top_k=1, temperature=1.0).tail_N
    # log(exp(-60) + exp(-70)); 1 - kept mass is 0 in float32.
    assert tail.item() == pytest.approx(-60 + np.log1p(np.exp(-10)), rel=1e-6)


def test_keeping_the_whole_vocabulary_leaves_no_tail(
    qwen: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    targets, _ = score_completions(qwen.model, qwen.tokenizer, text_request(PROMPTS, COMPLETIONS, top_k=10_000))
    assert targets.ids_NK.shape[1] == 104
    assert np.isneginf(targets.tail_logprob_N).all()
    assert (np.sort(targets.ids_NK, axis=1) == np.arange(104)).all()


def test_temperature_flattens_the_distribution_as_it_should(
    qwen: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    cold, _ = score_completions(qwen.model, qwen.tokenizer, text_request(PROMPTS, COMPLETIONS, top_k=104))
    warm, _ = score_completions(
        qwen.model, qwen.tokenizer, text_request(PROMPTS, COMPLETIONS, top_k=104, temperature=2.0)
    )
    assert (cold.ids_NK[:, 0] == warm.ids_NK[:, 0]).all()
    # softmax(z / 2) is softmax(z) to the power 1/2, normalised.
    half_NK = cold.logprobs_NK.astype(np.float64) / 2
    half_NK -= np.log(np.exp(half_NK).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(warm.logprobs_NK, half_NK, atol=ROUNDING)


def test_prompts_follow_the_chat_template_where_there_is_one(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(start=True, template=TEMPLATE)
    (ids,) = tokenise_prompts(tokenizer, ["hi"])
    assert tokenizer.decode(ids) == "<hi>!"


def test_prompts_without_a_template_are_a_line_after_the_tokenizers_own_start(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(start=True, end=True)
    (ids,) = tokenise_prompts(tokenizer, ["hi"])
    assert tokenizer.decode(ids) == "<bos>hi\n"


@pytest.mark.parametrize(("start", "prompt_ids", "scored"), [(True, [2], "abc<eos>"), (False, [69], "bc<eos>")])
def test_plain_text_is_scored_from_its_first_predictable_token(
    make_tokenizer: Callable[..., Any], start: bool, prompt_ids: list[int], scored: str
) -> None:
    tokenizer = make_tokenizer(start=start, template=TEMPLATE)
    (row,) = tokenise_rows(tokenizer, [""], ["abc"])
    assert row.prompt_ids == prompt_ids
    assert tokenizer.decode(row.completion_ids) == scored


def test_a_row_without_any_predictable_token_scores_nothing(
    qwen: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    targets, _ = score_completions(qwen.model, qwen.tokenizer, text_request(("",), ("",)))
    assert targets.offsets_B1.tolist() == [0, 0]
    assert targets.logprobs_NK.shape == (0, 8)


def test_rows_longer_than_the_models_positions_are_named(
    qwen: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    with pytest.raises(RowsError, match="at most 96 tokens") as caught:
        score_completions(qwen.model, qwen.tokenizer, text_request(("a", "b" * 95, "c" * 94), ("", "dd", "d")))
    assert list(caught.value.reasons) == ["row-1"]
    assert caught.value.reasons["row-1"] == "98 tokens"


def test_not_finite_rows_are_named_and_the_error_survives_pickling(
    qwen: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    embedding = qwen.model.get_input_embeddings().weight
    letter = qwen.tokenizer.convert_tokens_to_ids("Z")
    clean = embedding.data[letter].clone()
    embedding.data[letter] = torch.nan
    try:
        with pytest.raises(RowsError, match="Found 1 bad rows: row-1: not finite") as caught:
            score_completions(qwen.model, qwen.tokenizer, text_request(("a", "b"), ("ok", "oZok")))
    finally:
        embedding.data[letter] = clean
    assert list(caught.value.reasons) == ["row-1"]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.reasons) == (str(caught.value), caught.value.reasons)


def test_states_beyond_float16_are_refused_and_not_turned_into_infinity(
    qwen: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    request = text_request(("a",), ("ok",), layers=(0,))
    block = find_blocks(qwen.model).blocks[0]
    handle = block.register_forward_hook(lambda m, i, o: o * 1e6)
    try:
        with pytest.raises(RowsError, match="float16"):
            score_completions(qwen.model, qwen.tokenizer, request)
    finally:
        handle.remove()


def test_unknown_layer_is_refused_before_any_work(qwen: LoadedTower, text_request: Callable[..., ScoreRequest]) -> None:
    with pytest.raises(ConfigError, match="between 0 and 2, found 3"):
        score_completions(qwen.model, qwen.tokenizer, text_request(("a",), ("b",), layers=(0, 3)))


def test_recording_hooks_are_gone_after_an_exception(qwen: LoadedTower) -> None:
    blocks = find_blocks(qwen.model).blocks
    with pytest.raises(RuntimeError, match="halfway"), recorded_blocks(qwen.model, (0, 1)):
        raise RuntimeError("halfway")
    assert all(not block._forward_hooks for block in blocks)


def test_recorded_states_of_blocks_that_return_tuples(qwen: LoadedTower) -> None:
    # Blocks of some architectures return (hidden, ...); a hook that does the same stands for them.
    block = find_blocks(qwen.model).blocks[0]
    handle = block.register_forward_hook(lambda m, i, o: o)
    try:
        with recorded_blocks(qwen.model, (0,)) as recorded, torch.no_grad():
            for hook in list(block._forward_hooks.values())[1:]:
                hook(block, (), (torch.ones(1, 2, 3), None))
        assert torch.equal(recorded[0], torch.ones(1, 2, 3))
    finally:
        handle.remove()


def test_width_of_the_blocks_is_found_in_the_model_that_holds_them(qwen: LoadedTower, gemma: LoadedTower) -> None:
    assert block_width(qwen.model) == block_width(gemma.model) == 64


# --- answers ------------------------------------------------------------------------------------------------------------------


def greedy(tower: LoadedTower, prompt: str, max_new_tokens: int) -> str:
    """One token at a time, the whole sequence read again for each."""
    ids = tower.tokenizer(prompt + "\n")["input_ids"]
    new: list[int] = []
    while len(new) < max_new_tokens:
        with torch.no_grad():
            token = int(tower.model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tower.tokenizer.eos_token_id:
            break
        new.append(token)
    return tower.tokenizer.decode(new, skip_special_tokens=True)


def test_answers_equal_a_loop_of_arg_max_without_cache_or_padding(tower: LoadedTower) -> None:
    answers = generate_greedily(tower.model, tower.tokenizer, PROMPTS, max_new_tokens=12)
    assert answers == tuple(greedy(tower, prompt, 12) for prompt in PROMPTS)
    assert len(set(answers)) > 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_do_not_depend_on_the_batch(tower: LoadedTower, batch_size: int) -> None:
    whole = generate_greedily(tower.model, tower.tokenizer, PROMPTS, max_new_tokens=8)
    parts = generate_greedily(tower.model, tower.tokenizer, PROMPTS[::-1], max_new_tokens=8, batch_size=batch_size)
    assert parts == whole[::-1]


def test_an_answer_ends_before_its_first_end_token(qwen: LoadedTower) -> None:
    long = generate_greedily(qwen.model, qwen.tokenizer, PROMPTS, max_new_tokens=8)
    # Declare the third token of the first answer an end token, as chat models have several.
    end = qwen.tokenizer.convert_tokens_to_ids(long[0][2])
    configured = qwen.model.generation_config
    qwen.model.generation_config = GenerationConfig(eos_token_id=[1, end])
    try:
        assert end_token_ids(qwen.model, qwen.tokenizer) == (1, end)
        short = generate_greedily(qwen.model, qwen.tokenizer, PROMPTS, max_new_tokens=8)
    finally:
        qwen.model.generation_config = configured
    assert short == tuple(answer.split(long[0][2])[0] for answer in long)


@pytest.mark.parametrize(("configured", "expected"), [(None, (1,)), (7, (1, 7)), (1, (1,))])
def test_end_tokens_are_the_tokenizers_and_the_checkpoints(
    qwen: LoadedTower, configured: Any, expected: tuple[int, ...]
) -> None:
    before = qwen.model.generation_config
    qwen.model.generation_config = GenerationConfig(eos_token_id=configured)
    try:
        assert end_token_ids(qwen.model, qwen.tokenizer) == expected
    finally:
        qwen.model.generation_config = before


def test_a_checkpoints_own_penalties_do_not_change_the_answers(qwen: LoadedTower) -> None:
    plain = generate_greedily(qwen.model, qwen.tokenizer, PROMPTS, max_new_tokens=8)
    before = qwen.model.generation_config
    penal = GenerationConfig(
        repetition_penalty=5.0, do_sample=True, temperature=3.0, no_repeat_ngram_size=1, eos_token_id=1
    )
    qwen.model.generation_config = penal
    try:
        assert generate_greedily(qwen.model, qwen.tokenizer, PROMPTS, max_new_tokens=8) == plain
        assert qwen.model.generation_config is penal
    finally:
        qwen.model.generation_config = before


def test_no_prompts_give_no_answers(qwen: LoadedTower) -> None:
    assert generate_greedily(qwen.model, qwen.tokenizer, [], max_new_tokens=8) == ()


def test_prompts_that_cannot_be_answered_are_named(qwen: LoadedTower) -> None:
    with pytest.raises(RowsError, match="Found 2 bad rows: prompt 1: 0 tokens; prompt 2: 100 tokens"):
        generate_greedily(qwen.model, qwen.tokenizer, ["a", "", "b" * 91], max_new_tokens=8)


def test_rows_that_cannot_be_answered_are_named_by_their_ids(qwen: LoadedTower) -> None:
    answers = answer_rows(qwen.model, qwen.tokenizer, ["x", "y"], PROMPTS[:2], max_new_tokens=8)
    assert answers == generate_greedily(qwen.model, qwen.tokenizer, PROMPTS[:2], max_new_tokens=8)
    with pytest.raises(RowsError) as caught:
        answer_rows(qwen.model, qwen.tokenizer, ["x", "y", "z"], ["a", "", "b" * 91], max_new_tokens=8)
    assert caught.value.reasons == {"y": "0 tokens", "z": "100 tokens"}


def test_an_answer_that_is_longer_once_it_is_text_is_refused_where_the_model_could_not_score_it() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SAMPLES_DIR / "teachers" / "sample-reasoning")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    # Always one of two bytes that are no text alone: as text each becomes a replacement character, which has three bytes.
    first, second = (tokenizer.convert_tokens_to_ids(token) for token in ("Ģ", "ģ"))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[first, 0], model.lm_head.weight[second, 0] = 1.0, -1.0
    assert len(answer_rows(model, tokenizer, ["x"], ["six"], max_new_tokens=4)) == 1
    with pytest.raises(RowsError, match=r"at most 32 tokens of the teacher; .* Found 1 bad rows: x: \d\d tokens"):
        answer_rows(model, tokenizer, ["x"], ["six"], max_new_tokens=20)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(
    qwen: LoadedTower, make_tokenizer: Callable[..., Any], text_request: Callable[..., ScoreRequest]
) -> None:
    bare = make_tokenizer()
    bare.pad_token = None
    request = text_request(PROMPTS, COMPLETIONS)
    with_pad, _ = score_completions(qwen.model, qwen.tokenizer, request)
    without, _ = score_completions(qwen.model, bare, request)
    np.testing.assert_allclose(without.logprobs_NK, with_pad.logprobs_NK, atol=ROUNDING)
    assert generate_greedily(qwen.model, bare, PROMPTS, max_new_tokens=6) == generate_greedily(
        qwen.model, qwen.tokenizer, PROMPTS, max_new_tokens=6
    )


# --- what profiling and the tax read ------------------------------------------------------------------------------------------


def test_profile_inputs_mark_exactly_the_completion_tokens(qwen: LoadedTower) -> None:
    ids_BT, mask_BT, loss_mask_BT = profile_inputs(
        qwen.model, qwen.tokenizer, ["a", "b"], ["hi", "hello"], ["abc", "d"]
    )
    for row, (prompt, completion) in enumerate([("hi", "abc"), ("hello", "d")]):
        assert qwen.tokenizer.decode(ids_BT[row][mask_BT[row].bool()]) == f"{prompt}\n{completion}<eos>"
        assert qwen.tokenizer.decode(ids_BT[row][loss_mask_BT[row]]) == f"{completion}<eos>"
    assert mask_BT[:, -1].all()


def test_profile_inputs_name_rows_that_do_not_fit(qwen: LoadedTower) -> None:
    with pytest.raises(RowsError, match="b: 105 tokens"):
        profile_inputs(qwen.model, qwen.tokenizer, ["a", "b"], ["hi", "x" * 100], ["abc", "def"])


def test_completion_logits_cover_every_scored_token_once(
    qwen: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    logits_NV = torch.cat(list(completion_logits(qwen.model, qwen.tokenizer, PROMPTS, COMPLETIONS)))
    targets, _ = score_completions(qwen.model, qwen.tokenizer, text_request(PROMPTS, COMPLETIONS, top_k=1))
    assert sorted(logits_NV.argmax(dim=-1).tolist()) == sorted(targets.ids_NK[:, 0].tolist())
