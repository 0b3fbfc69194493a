"""From records to one padded batch of token ids.

Prompt and completion are tokenised apart and then joined, so that the ids of a prompt never depend on what follows it: the ids
that a model is trained on are those that it meets when it generates. Shape letters: B rows, T padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nexus.data.records import Record, RowError, prompt_text

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class TokenisedRow:
    """One record as token ids, unpadded; int32, because lists of Python integers take nine times the memory."""

    record: Record
    prompt_ids: np.ndarray
    """int32; with the tokenizer's own start of sequence, where it has one."""
    completion_ids: np.ndarray
    """int32; ends with the end-of-sequence token, where the tokenizer has one; empty for an unlabelled row."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Rows padded to the longest of them."""

    row_ids: tuple[str, ...]
    records: tuple[Record, ...]
    input_ids_BT: Tensor
    """int64."""
    attention_mask_BT: Tensor
    """int64; 1 on tokens, 0 on padding."""
    loss_mask_BT: Tensor
    """bool; True on *target tokens*: the completion and its end of sequence, and never a row's very first token, because
    nothing predicts it. The logits that predict token t stand at t - 1."""
    prompt_lengths_B: Tensor
    """int64; tokens of the prompt, padding not counted."""

    @property
    def num_loss_tokens(self) -> int:
        """Scored tokens of all rows."""
        return int(self.loss_mask_BT.sum())

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device),
            attention_mask_BT=self.attention_mask_BT.to(device),
            loss_mask_BT=self.loss_mask_BT.to(device),
            prompt_lengths_B=self.prompt_lengths_B.to(device),
        )


def collate(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    padding_side: PaddingSide = "left",
    completions: Sequence[str] | None = None,
) -> TokenBatch:
    """Tokenise and pad `records`; `completions` (one per record, for example a teacher's answers) replace their own.

    Raises:
        RowError: when a row has more than `max_length` tokens; nothing is ever cut off.
    """
    rows = tokenise_rows(records, tokenizer, completions=completions)
    for row in rows:
        check_length(row, max_length)
    return pad_rows(rows, tokenizer, padding_side=padding_side)


def tokenise_rows(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, completions: Sequence[str] | None = None
) -> list[TokenisedRow]:
    """The token ids of each record, in the given order.

    Raises:
        ValueError: when `completions` are not one per record.
    """
    if completions is not None and len(completions) != len(records):
        raise ValueError(f"expected a completion for each of {len(records)} records, found {len(completions)}")
    texts = [record.completion for record in records] if completions is None else list(completions)
    prompt_ids = _encode([prompt_text(record) for record in records], tokenizer, start=True)
    completion_ids = _encode([text or "" for text in texts], tokenizer, start=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        TokenisedRow(
            record,
            np.array(prompt, dtype=np.int32),
            np.array([] if text is None else completion + end, dtype=np.int32),
        )
        for record, text, prompt, completion in zip(records, texts, prompt_ids, completion_ids, strict=True)
    ]


def check_length(row: TokenisedRow, max_length: int) -> None:
    """Refuse a row that has no token, or more than `max_length` tokens.

    Raises:
        RowError: naming both lengths.
    """
    if not 0 < len(row) <= max_length:
        raise RowError(
            f"expected 1 to {max_length} tokens, found {len(row)} "
            f"({len(row.prompt_ids)} of the prompt, {len(row.completion_ids)} of the completion) in row {row.record.id!r}"
        )


def length_check(
    tokenizer: PreTrainedTokenizerBase, max_length: int, *, answers: Sequence[str] | None = None
) -> Callable[[Record], None]:
    """A check that raises RowError for a record that `collate` would refuse with the same `max_length`.

    Args:
        answers: one of these stands in place of the record's completion; the longest has to fit.
    """
    longest = None if not answers else max(answers, key=lambda text: len(_encode([text], tokenizer, start=False)[0]))

    def check(record: Record) -> None:
        completions = None if longest is None else [longest]
        check_length(tokenise_rows([record], tokenizer, completions=completions)[0], max_length)

    return check


def pad_rows(
    rows: Sequence[TokenisedRow], tokenizer: PreTrainedTokenizerBase, *, padding_side: PaddingSide = "left"
) -> TokenBatch:
    """One batch of already tokenised rows, padded to the longest of them."""
    longest = max(len(row) for row in rows)
    input_ids_BT = np.full((len(rows), longest), _padding_id(tokenizer), dtype=np.int64)
    attention_mask_BT = np.zeros((len(rows), longest), dtype=np.int64)
    loss_mask_BT = np.zeros((len(rows), longest), dtype=np.bool_)
    for index, row in enumerate(rows):
        start = longest - len(row) if padding_side == "left" else 0
        middle, end = start + len(row.prompt_ids), start + len(row)
        input_ids_BT[index, start:middle] = row.prompt_ids
        input_ids_BT[index, middle:end] = row.completion_ids
        attention_mask_BT[index, start:end] = 1
        loss_mask_BT[index, max(middle, start + 1) : end] = True
    # Tuples of lists, not of generators: CPython grows the latter and then keeps up to 2,000 freed ones of each length.
    return TokenBatch(
        row_ids=tuple([row.record.id for row in rows]),
        records=tuple([row.record for row in rows]),
        input_ids_BT=torch.from_numpy(input_ids_BT),
        attention_mask_BT=torch.from_numpy(attention_mask_BT),
        loss_mask_BT=torch.from_numpy(loss_mask_BT),
        prompt_lengths_B=torch.tensor([len(row.prompt_ids) for row in rows], dtype=torch.int64),
    )


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, start: bool) -> list[list[int]]:
    """Ids of each text; with `start`, after whatever the tokenizer puts before a sequence, but without its end."""
    if not texts:  # which tokenizers refuse
        return []
    # Lengths are judged by max_length here, so the tokenizer's own warning about model_max_length would only mislead.
    encoded = tokenizer(
        list(texts),
        add_special_tokens=start,
        return_attention_mask=False,
        truncation=False,
        padding=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    if start and tokenizer.eos_token_id is not None:
        ids = [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in ids]
    return ids


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id under padding; any id serves, because the attention mask hides it."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id or 0)
