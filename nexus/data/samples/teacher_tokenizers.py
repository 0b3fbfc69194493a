"""Builds the tokenizers of the two text teachers: byte-level BPE (which the sample student shares) and characters.

Both pad on the left, as batched generation wants, add no special token of their own, and end an answer with `<eos>`.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
BPE_VOCABULARY_SIZE = 512


def train_bpe(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer that can encode any text.

    Digits and capital letters stay single tokens: sums are then learnt digit by digit, and the strings of the code samples
    (capital letters) can be indexed by position.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]"), behavior="isolated"),
            pre_tokenizers.Split(Regex(" ?[A-Z]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY_SIZE,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, unknown=None)


def make_character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per printable ASCII character or newline, and any further character in `texts`."""
    characters = sorted({*map(chr, range(32, 127)), "\n"}.union(*map(set, texts)))
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unknown=UNKNOWN)


def _wrap(tokenizer: Tokenizer, unknown: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=unknown,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
