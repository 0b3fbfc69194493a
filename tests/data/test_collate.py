"""Token batches: what is padded, masked and scored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nexus.data.collate import TokenBatch, collate, length_check, tokenise_rows
from nexus.data.records import Record, RowError
from nexus.data.samples.teacher_tokenizers import make_character_tokenizer

TOKENIZER = make_character_tokenizer([])


def record(prompt: str, completion: str | None = None, name: str = "r") -> Record:
    return Record(name, "c", prompt, completion)


def word_tokenizer(*, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Words `a`, `b`, `c`; `template` puts special tokens around a sequence."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        model.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", **special)


def decode(batch: TokenBatch, row: int, mask_BT: torch.Tensor) -> str:
    text = TOKENIZER.decode(batch.input_ids_BT[row][mask_BT[row].bool()].tolist())
    assert isinstance(text, str)
    return text


TEXTS = st.text("ab +=", min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TEXTS, st.none() | TEXTS), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_every_token_is_at_its_place_and_only_the_completion_is_scored(rows, side) -> None:
    batch = collate([record(*row) for row in rows], TOKENIZER, max_length=64, padding_side=side)
    lengths = [len(p) + 1 + (0 if c is None else len(c) + 1) for p, c in rows]
    assert (
        batch.input_ids_BT.shape
        == batch.attention_mask_BT.shape
        == batch.loss_mask_BT.shape
        == (len(rows), max(lengths))
    )
    assert (batch.input_ids_BT.dtype, batch.attention_mask_BT.dtype) == (torch.int64, torch.int64)
    assert (batch.loss_mask_BT.dtype, batch.prompt_lengths_B.dtype) == (torch.bool, torch.int64)
    for index, (prompt, completion) in enumerate(rows):
        scored = "" if completion is None else completion + TOKENIZER.eos_token
        assert decode(batch, index, batch.attention_mask_BT) == prompt + "\n" + scored
        assert decode(batch, index, batch.loss_mask_BT) == scored
        start = max(lengths) - lengths[index] if side == "left" else 0
        expected = [start <= place < start + lengths[index] for place in range(max(lengths))]
        assert batch.attention_mask_BT[index].bool().tolist() == expected
        assert batch.prompt_lengths_B[index] == len(prompt) + 1
    assert batch.num_loss_tokens == sum(len(c) + 1 for _, c in rows if c is not None)
    assert batch.input_ids_BT[batch.attention_mask_BT == 0].eq(TOKENIZER.pad_token_id).all()


def test_the_ids_of_a_prompt_do_not_depend_on_the_completion() -> None:
    from nexus.data.samples.teacher_tokenizers import train_bpe

    bpe = train_bpe(["ab ab\nab ab"] * 50)
    joined = bpe("x\n\n")["input_ids"]
    one, other = (tokenise_rows([record("x", text)], bpe)[0] for text in ("\n", "ab"))
    assert one.prompt_ids.tolist() == other.prompt_ids.tolist() == bpe("x\n")["input_ids"]
    assert len(joined) <= len(one)


def test_rows_keep_their_order_ids_and_records() -> None:
    records = [record("a", "b", "one"), record("aaaa", None, "two")]
    batch = collate(records, TOKENIZER, max_length=9)
    assert batch.row_ids == ("one", "two")
    assert batch.records == tuple(records)


def test_given_completions_take_the_place_of_the_records_own() -> None:
    batch = collate([record("a"), record("b", "x")], TOKENIZER, max_length=9, completions=["1", "22"])
    assert [decode(batch, row, batch.loss_mask_BT) for row in (0, 1)] == [
        f"{c}{TOKENIZER.eos_token}" for c in ("1", "22")
    ]
    with pytest.raises(ValueError, match="for each of 1 records, found 2"):
        collate([record("a")], TOKENIZER, max_length=9, completions=["1", "2"])


def test_an_empty_given_completion_is_the_end_of_sequence_alone() -> None:
    batch = collate([record("a")], TOKENIZER, max_length=9, completions=[""])
    assert batch.input_ids_BT[0, -1] == TOKENIZER.eos_token_id
    assert batch.num_loss_tokens == 1


def test_a_row_that_is_too_long_is_refused_and_never_cut() -> None:
    assert collate([record("aaa", "bbb")], TOKENIZER, max_length=8).input_ids_BT.shape == (1, 8)
    with pytest.raises(
        RowError, match=r"expected 1 to 7 tokens, found 8 \(4 of the prompt, 4 of the completion\) in row 'r'"
    ):
        collate([record("aaa", "bbb")], TOKENIZER, max_length=7)


def test_the_first_token_of_plain_text_is_not_scored_because_nothing_predicts_it() -> None:
    for side in ("left", "right"):
        batch = collate([record("", "abc"), record("", "abcdef")], TOKENIZER, max_length=9, padding_side=side)
        assert [decode(batch, row, batch.loss_mask_BT) for row in (0, 1)] == [
            f"{c}{TOKENIZER.eos_token}" for c in ("bc", "bcdef")
        ]
        assert batch.prompt_lengths_B.tolist() == [0, 0]


def test_a_start_token_of_the_tokenizer_is_kept_once_and_makes_the_first_word_scored() -> None:
    tokenizer = word_tokenizer(template="<s> $A", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    assert tokenise_rows([record("a b", "c")], tokenizer)[0].prompt_ids.tolist() == [1, 3, 4]
    assert tokenise_rows([record("a b", "c")], tokenizer)[0].completion_ids.tolist() == [5, 2]
    plain = collate([record("", "a b")], tokenizer, max_length=9)
    assert plain.input_ids_BT.tolist() == [[1, 3, 4, 2]]
    assert plain.loss_mask_BT.tolist() == [[False, True, True, True]]


def test_an_end_token_that_the_tokenizer_puts_behind_a_prompt_is_taken_off() -> None:
    tokenizer = word_tokenizer(template="<s> $A </s>", bos_token="<s>", eos_token="</s>")
    row = tokenise_rows([record("a", "b")], tokenizer)[0]
    assert (row.prompt_ids.tolist(), row.completion_ids.tolist()) == ([1, 3], [4, 2])


def test_without_a_padding_token_another_id_hides_under_the_mask() -> None:
    records = [record("a"), record("a b")]
    with_end = collate(records, word_tokenizer(eos_token="</s>"), max_length=9)
    without = collate(records, word_tokenizer(), max_length=9)
    assert with_end.input_ids_BT.tolist() == [[2, 3], [3, 4]]
    assert without.input_ids_BT.tolist() == [[0, 3], [3, 4]]
    assert without.attention_mask_BT.tolist() == [[0, 1], [1, 1]]


def test_without_an_end_token_a_completion_ends_where_its_text_ends() -> None:
    row = tokenise_rows([record("a", "b")], word_tokenizer())[0]
    assert row.completion_ids.tolist() == [4]


# --- what fits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [None, ("ab", "a==b", "a")])
def test_the_length_check_refuses_exactly_what_collate_refuses(answers: tuple[str, ...] | None) -> None:
    check = length_check(TOKENIZER, 10, answers=answers)
    completion = "a+b=" if answers is None else None
    longest = completion or "a==b"
    for length in range(1, 5):  # with a line's end, the answer and the end of sequence at most 10
        check(record("a" * length, completion))
        collate([record("a" * length)], TOKENIZER, max_length=10, completions=[longest])
    for length in range(5, 12):
        with pytest.raises(RowError, match="expected 1 to 10 tokens"):
            check(record("a" * length, completion))
        with pytest.raises(RowError, match="expected 1 to 10 tokens"):
            collate([record("a" * length)], TOKENIZER, max_length=10, completions=[longest])
