"""What a language model gives as a teacher: the distribution of every completion token, the states that predict them, and answers.

Rows are laid out around the border between prompt and completion: prompts are padded on the left, completions on the right, so that
the scored positions of all rows are the same last columns and only their logits are computed.
Shape letters: B rows, P longest prompt, C longest completion with its end token, N scored tokens, K kept ids, S draws, V vocabulary,
H width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from nexus.towers.blocks import Passes, one_by_one, recorded_blocks
from nexus.towers.media_lm import MediaPrompt, same_noise
from nexus.towers.rows import RowsError, micro_batches
from nexus.towers.targets import ScoreRequest, TeacherHead, TokenDistributions
from nexus.towers.transports import keep_columns, to_targets

MAX_LOGIT_ELEMENTS = 2**26
"""Logits of one micro-batch: 256 MiB in float32, and as much again for their softmax."""
MAX_POSITIONS = 2**15
"""Positions of one micro-batch: the widest activations of a 7B model (18,944 wide, bfloat16) then take 1.2 GB."""
MAX_GENERATION_ROWS = 256
"""Rows that decode together: beyond it a GPU's decoding gains little, and a finished row waits for the longest one."""


@dataclass(frozen=True)
class TokenisedRow:
    """One row in the teacher's own ids."""

    prompt_ids: list[int]
    completion_ids: list[int]
    """The tokens that are scored, the end-of-sequence token last."""
    media: MediaPrompt | None = None
    """What stands in the prompt beside text; such a row is a batch of its own."""


def tokenise_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt up to where the completion begins.

    By the tokenizer's chat template where it has one, else followed by a line feed. An empty prompt (plain text) is only what the
    tokenizer itself puts before a sequence, which may be nothing.
    """
    if tokenizer.chat_template:
        texts = [_render(tokenizer, prompt) if prompt else "" for prompt in prompts]
    else:
        texts = [f"{prompt}\n" if prompt else "" for prompt in prompts]
    # A template writes its special tokens itself; an empty prompt has only those of the tokenizer.
    with_start = [not (tokenizer.chat_template and prompt) for prompt in prompts]
    ids: list[list[int]] = [[]] * len(prompts)
    for start in (True, False):
        rows = [row for row, wanted in enumerate(with_start) if wanted is start]
        for row, encoded in zip(rows, _encode(tokenizer, [texts[row] for row in rows], special=start), strict=True):
            # Some tokenizers end every text with their end token, after which a model would have nothing to say.
            ids[row] = encoded[:-1] if start and encoded and encoded[-1] == tokenizer.eos_token_id else encoded
    return ids


def tokenise_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> list[TokenisedRow]:
    """Ids of prompts and completions, tokenised apart, the end-of-sequence token appended.

    Without any prompt id the completion's first token is predicted by nothing: it is context and is not scored.
    """
    rows = []
    encoded = _encode(tokenizer, completions, special=False)
    for prompt_ids, ids in zip(tokenise_prompts(tokenizer, prompts), encoded, strict=True):
        completion_ids = [*ids, tokenizer.eos_token_id]
        split = 0 if prompt_ids else 1
        rows.append(TokenisedRow([*prompt_ids, *completion_ids[:split]], completion_ids[split:]))
    return rows


def tokenise_media_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[MediaPrompt], completions: Sequence[str]
) -> list[TokenisedRow]:
    """As `tokenise_rows`, behind prompts with media."""
    encoded = _encode(tokenizer, completions, special=False)
    return [
        TokenisedRow(prompt.prompt_ids, [*ids, tokenizer.eos_token_id], prompt)
        for prompt, ids in zip(prompts, encoded, strict=True)
    ]


def _render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    return str(
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    )


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return ids


def score_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: ScoreRequest,
    media: Sequence[MediaPrompt] | None = None,
    *,
    passes: Passes = one_by_one,
) -> tuple[TokenDistributions, dict[int, np.ndarray]]:
    """Distributions and hidden states at every completion token, rows in the request's order.

    `media` are the prompts of rows with media, made of the request's own by `nexus.towers.media_lm`.

    The softmax runs in float32 on logits / temperature. `hidden` holds the output of each requested block at the position *before*
    the scored token, float16 [N, H].

    Raises:
        RowsError: rows that are too long or whose results are not finite.
    """
    assert request.completions is not None
    if media is None:
        rows = tokenise_rows(tokenizer, request.prompts, request.completions)
    else:
        rows = tokenise_media_rows(tokenizer, media, request.completions)
    _refuse_unfit(model, request.row_ids, [_scored_length(row) for row in rows])
    parts: list[dict[str, np.ndarray]] = [{}] * len(rows)
    hidden: dict[int, list[np.ndarray]] = {layer: [np.empty(0)] * len(rows) for layer in request.layers}
    read = {"hidden": "states", "auto": "both", "none": "nothing"}.get(request.transport, "logits")
    bad: dict[str, str] = {}

    def score(chosen: list[int]) -> _Parts:
        with nullcontext() if media is None else same_noise(request.row_ids[chosen[0]], model.device):
            batch = _forward(model, tokenizer, [rows[i] for i in chosen], request.layers, read=read)
        counts = [len(rows[i].completion_ids) for i in chosen]
        columns, finite_N = keep_columns(
            batch.logits_NV, batch.states_NH, request, [request.row_ids[i] for i in chosen], counts
        )
        states = {layer: state_NH.to(torch.float16) for layer, state_NH in batch.hidden.items()}
        for state_NH in states.values():
            finite_N = finite_N.to(state_NH.device) & torch.isfinite(state_NH).all(dim=-1)
        column_parts = {name: column.cpu().split(counts) for name, column in columns.items()}
        state_parts = {layer: state.cpu().split(counts) for layer, state in states.items()}
        return _Parts(chosen, column_parts, state_parts, finite_N.cpu().split(counts))

    calls = [partial(score, chosen) for chosen in _micro_batches(model, rows)]
    for scored in passes(calls):
        for b, (row, finite_T) in enumerate(zip(scored.rows, scored.finite, strict=True)):
            parts[row] = {name: split[b].numpy() for name, split in scored.columns.items()}
            for layer, split in scored.hidden.items():
                hidden[layer][row] = split[b].numpy()
            if not finite_T.all():
                bad[request.row_ids[row]] = "not finite"
    if bad:
        raise RowsError(
            "Expected finite results (hidden states within float16) from the teacher for every row; quarantine the rows or profile "
            "other layers.",
            {row_id: bad[row_id] for row_id in request.row_ids if row_id in bad},
        )
    width = model.config.get_text_config().hidden_size
    # Without rows there are still columns, of no length.
    nothing = keep_columns(torch.empty(0, vocabulary_size(model)), torch.empty(0, width), request, (), ())[0]
    tokens = to_targets(
        {name: _concatenate([part[name] for part in parts], empty.numpy()) for name, empty in nothing.items()},
        request,
        offsets_B1=np.cumsum([0, *(len(row.completion_ids) for row in rows)], dtype=np.int64),
        token_ids_N=np.array([token for row in rows for token in row.completion_ids], dtype=np.int32),
        vocabulary_size=vocabulary_size(model),
    )
    empty_0H = np.empty((0, width), np.float16)
    return tokens, {layer: _concatenate(parts_B, empty_0H) for layer, parts_B in hidden.items()}


def completion_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    passes: Passes = one_by_one,
) -> Iterator[Tensor]:
    """Yields the logits [N, V] of all scored tokens, some rows at a time, on the model's device.

    The order of the tokens depends on the rows' lengths alone.
    """
    rows = tokenise_rows(tokenizer, prompts, completions)

    def logits(chosen: list[int]) -> Tensor:
        logits_NV = _forward(model, tokenizer, [rows[i] for i in chosen], ()).logits_NV
        assert logits_NV is not None
        return logits_NV

    yield from passes([partial(logits, chosen) for chosen in _micro_batches(model, rows)])


def completion_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: ScoreRequest, layers: Sequence[int]
) -> tuple[np.ndarray, dict[int, Tensor]]:
    """Outputs of blocks at the positions that predict the completions' tokens, in the model's own precision and on its device.

    Returns:
        int64 [B+1], row b owns positions offsets[b]:offsets[b+1]; and layer -> [N, H].

    Raises:
        RowsError: rows that do not fit the model.
    """
    assert request.completions is not None
    rows = tokenise_rows(tokenizer, request.prompts, request.completions)
    _refuse_unfit(model, request.row_ids, [len(row.prompt_ids) + len(row.completion_ids[:-1]) for row in rows])
    offsets_B1 = np.cumsum([0, *(len(row.completion_ids) for row in rows)], dtype=np.int64)
    parts: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}
    for chosen in _micro_batches(model, rows):
        batch = _forward(model, tokenizer, [rows[i] for i in chosen], layers)
        counts = [len(rows[i].completion_ids) for i in chosen]
        for layer, state_NH in batch.hidden.items():
            parts[layer].update(zip(chosen, state_NH.split(counts), strict=True))
    return offsets_B1, {layer: torch.cat([by_row[b] for b in range(len(rows))]) for layer, by_row in parts.items()}


def profile_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row_ids: Sequence[str],
    prompts: Sequence[str],
    completions: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and target mask, all int64 or bool [B, T], padded on the left, for layer profiling.

    Raises:
        RowsError: rows that do not fit the model.
    """
    rows = tokenise_rows(tokenizer, prompts, completions)
    _refuse_unfit(model, row_ids, [_length(row) for row in rows])
    return _left_padded(tokenizer, rows)


def media_profile_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row_ids: Sequence[str],
    prompts: Sequence[MediaPrompt],
    completions: Sequence[str],
) -> list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
    """As `profile_inputs`, each row apart (B = 1, without padding), with what the model is given beside the ids, on its device.

    Raises:
        RowsError: rows that do not fit the model.
    """
    rows = tokenise_media_rows(tokenizer, prompts, completions)
    _refuse_unfit(model, row_ids, [_length(row) for row in rows])
    return [
        (*_left_padded(tokenizer, [row]), prompt.inputs_for(_length(row), model.device, model.dtype))
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def _left_padded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenisedRow]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = [_length(row) for row in rows]
    width = max(lengths)
    input_ids_BT = torch.full((len(rows), width), _pad_id(tokenizer))
    attention_mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
    loss_mask_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids_BT[b, width - length :] = torch.tensor([*row.prompt_ids, *row.completion_ids])
        attention_mask_BT[b, width - length :] = 1
        loss_mask_BT[b, width - len(row.completion_ids) :] = True
    return input_ids_BT, attention_mask_BT, loss_mask_BT


def output_head(model: PreTrainedModel, *, passes: Passes = one_by_one) -> TeacherHead:
    """The head from which a receiver of `hidden` targets computes this model's logits.

    Raises:
        ValueError: the model does more to its logits than a linear map and a soft cap.
    """
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    weight_VH = head.weight.detach().cpu()
    if not isinstance(head, nn.Linear) or not weight_VH.is_floating_point():
        raise ValueError(f"expected an output head that is a linear map in floating point, found {type(head).__name__}")
    # A few tokens tell whether anything else happens to the logits: a scale, a shift, a second projection.
    probe_BT = torch.arange(min(8, weight_VH.shape[0]))[None]

    def probe() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            logits_BTV: Tensor = model(input_ids=probe_BT.to(model.device), use_cache=False).logits
            decoder: Any = model.get_decoder()
            return logits_BTV, head(decoder(input_ids=probe_BT.to(model.device), use_cache=False).last_hidden_state)

    ((logits_BTV, expected_BTV),) = passes([probe])
    if softcap is not None:
        expected_BTV = softcap * torch.tanh(expected_BTV / softcap)
    if not torch.allclose(logits_BTV.float(), expected_BTV.float(), rtol=1e-2, atol=1e-3):
        raise ValueError("expected logits that are a linear map of the last hidden state, found others")
    bias_V = None if head.bias is None else head.bias.detach().float().cpu().numpy()
    if weight_VH.dtype == torch.bfloat16:
        # NumPy has no bfloat16: its bits travel.
        return TeacherHead(weight_VH.view(torch.int16).numpy().view(np.uint16), bias_V, softcap)
    return TeacherHead(weight_VH.float().numpy(), bias_V, softcap)


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row_ids: Sequence[str],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
) -> tuple[str, ...]:
    """Greedy completions that `score_completions` can score.

    Raises:
        RowsError: rows whose prompt does not fit the model, or whose answer does not: cut into tokens again, a text may have more of
            them than were generated.
    """
    try:
        answers = generate_greedily(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    except RowsError as error:
        names = prompt_names(len(prompts))
        raise RowsError(
            error.what,
            {row_id: error.reasons[name] for row_id, name in zip(row_ids, names, strict=True) if name in error.reasons},
        ) from None
    rows = tokenise_rows(tokenizer, prompts, answers)
    _refuse_unfit(model, row_ids, [_scored_length(row) for row in rows])
    return answers


def prompt_names(count: int) -> list[str]:
    """How errors of `generate_greedily` name its prompts."""
    return [f"prompt {index}" for index in range(count)]


def generate_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
) -> tuple[str, ...]:
    """Greedy completions, in the prompts' order, without special tokens; what stands after the first end token is cut off.

    Raises:
        RowsError: prompts that do not fit the model; rows are named by their index.
    """
    prompt_ids = tokenise_prompts(tokenizer, prompts)
    _refuse_unfit(model, prompt_names(len(prompts)), [len(ids) + max_new_tokens if ids else 0 for ids in prompt_ids])
    ends = end_token_ids(model, tokenizer)
    pad = _pad_id(tokenizer)
    greedy = _greedy(max_new_tokens, ends, pad)
    completions = [""] * len(prompts)
    rows_cap = batch_size or MAX_GENERATION_ROWS
    lengths = [len(ids) + max_new_tokens for ids in prompt_ids]
    for chosen in micro_batches(lengths, max_rows=rows_cap, max_positions=8 * MAX_POSITIONS):
        longest = max(len(prompt_ids[i]) for i in chosen)
        input_ids_BP = torch.tensor([[pad] * (longest - len(prompt_ids[i])) + prompt_ids[i] for i in chosen])
        mask_BP = torch.tensor([[0] * (longest - len(prompt_ids[i])) + [1] * len(prompt_ids[i]) for i in chosen])
        with torch.inference_mode(), _without_sampling_defaults(model):
            generate: Any = model.generate
            output_BT = generate(
                input_ids=input_ids_BP.to(model.device),
                attention_mask=mask_BP.to(model.device),
                generation_config=greedy,
            )
        for row, new_ids in zip(chosen, output_BT[:, longest:].tolist(), strict=True):
            completions[row] = _decoded(tokenizer, new_ids, ends)
    return tuple(completions)


def answer_media_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row_ids: Sequence[str],
    prompts: Sequence[MediaPrompt],
    *,
    max_new_tokens: int,
) -> tuple[str, ...]:
    """Greedy completions behind prompts with media, one row at a time.

    Raises:
        RowsError: rows whose prompt does not fit the model with an answer behind it.
    """
    _refuse_unfit(model, row_ids, [len(prompt.prompt_ids) + max_new_tokens for prompt in prompts])
    ends = end_token_ids(model, tokenizer)
    answers = []
    for row_id, prompt in zip(row_ids, prompts, strict=True):
        length = len(prompt.prompt_ids)
        input_ids_1P = torch.tensor([prompt.prompt_ids], device=model.device)
        with torch.inference_mode(), _without_sampling_defaults(model), same_noise(row_id, model.device):
            generate: Any = model.generate
            output_1T = generate(
                input_ids=input_ids_1P,
                attention_mask=torch.ones_like(input_ids_1P),
                generation_config=_greedy(max_new_tokens, ends, _pad_id(tokenizer)),
                **prompt.inputs_for(length, model.device, model.dtype),
            )
        answers.append(_decoded(tokenizer, output_1T[0, length:].tolist(), ends))
    return tuple(answers)


def _greedy(max_new_tokens: int, ends: Sequence[int], pad: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(ends),
        pad_token_id=pad,
        use_cache=True,
    )


def _decoded(tokenizer: PreTrainedTokenizerBase, new_ids: Sequence[int], ends: Sequence[int]) -> str:
    """Text up to the first end token."""
    end = next((i for i, token in enumerate(new_ids) if token in ends), len(new_ids))
    return str(tokenizer.decode(list(new_ids[:end]), skip_special_tokens=True))


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's, and those of the checkpoint's generation_config (chat models have several)."""
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *more]))


@dataclass(frozen=True)
class _Scored:
    """The scored positions of one micro-batch, row after row."""

    logits_NV: Tensor | None
    hidden: dict[int, Tensor]
    """Layer -> [N, H]."""
    states_NH: Tensor | None
    """What the output head read; None unless asked for."""


@dataclass(frozen=True)
class _Parts:
    """What is kept of one micro-batch, on the CPU and row by row."""

    rows: list[int]
    columns: dict[str, Sequence[Tensor]]
    hidden: dict[int, Sequence[Tensor]]
    finite: Sequence[Tensor]


def _micro_batches(model: PreTrainedModel, rows: Sequence[TokenisedRow]) -> Iterator[list[int]]:
    if any(row.media for row in rows):
        yield from ([row] for row in range(len(rows)))
        return
    longest = max((len(row.completion_ids) for row in rows), default=0)
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
    max_rows = max(1, MAX_LOGIT_ELEMENTS // (max(1, longest) * vocabulary_size(model)))
    yield from micro_batches(lengths, max_rows=max_rows, max_positions=MAX_POSITIONS)


def _forward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenisedRow],
    layers: Sequence[int],
    *,
    read: str = "logits",
) -> _Scored:
    """`read` says what is wanted: logits, the states that the head reads, both, or nothing but the layers."""
    pad = _pad_id(tokenizer)
    longest_prompt = max(len(row.prompt_ids) for row in rows)
    # Keeping 0 logits would mean all of them.
    longest_completion = max(1, *(len(row.completion_ids) for row in rows))
    # The end token is scored but never read, hence one position fewer.
    width = longest_prompt + longest_completion - 1
    input_ids_BT = torch.full((len(rows), width), pad)
    attention_mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
    scored_BC = torch.zeros(len(rows), longest_completion, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids = torch.tensor([*row.prompt_ids, *row.completion_ids[:-1]])
        start = longest_prompt - len(row.prompt_ids)
        input_ids_BT[b, start : start + len(ids)] = ids
        attention_mask_BT[b, start : start + len(ids)] = 1
        scored_BC[b, : len(row.completion_ids)] = True
    # Positions count real tokens only, so that a row means the same whatever it is padded with.
    position_ids_BT = (attention_mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
    device = model.device
    inputs: dict[str, Any] = {
        "input_ids": input_ids_BT.to(device),
        "attention_mask": attention_mask_BT.to(device),
        "position_ids": position_ids_BT.to(device),
        "use_cache": False,
    }
    media = rows[0].media
    if media is not None:
        # Positions of pictures and clips are in three dimensions: the model's own work, and without padding it needs no help.
        del inputs["position_ids"]
        inputs |= media.inputs_for(width, device, model.dtype)
    with torch.inference_mode(), recorded_blocks(model, layers) as recorded, _head_input(model) as seen:
        if read in ("states", "nothing") and media is None:
            # The head over the vocabulary is the receiver's work then.
            seen.append(model.get_decoder()(**inputs).last_hidden_state)
            logits_NV = None
        else:
            # Some classes (the omni thinkers) take logits_to_keep and return all the same.
            logits_BTV = model(**inputs, logits_to_keep=longest_completion).logits
            logits_NV = _rows_at(logits_BTV[:, -longest_completion:], scored_BC)
    hidden = {layer: _rows_at(state_BTH[:, -longest_completion:], scored_BC) for layer, state_BTH in recorded.items()}
    states_NH = None if read in ("logits", "nothing") else _rows_at(seen[0][:, -longest_completion:], scored_BC)
    return _Scored(logits_NV, hidden, states_NH)


def _rows_at(values_BCX: Tensor, scored_BC: Tensor) -> Tensor:
    """[N, X]: the values where `scored_BC`, which is on the CPU, says so. Rows of one length are not copied."""
    return values_BCX.flatten(0, 1) if bool(scored_BC.all()) else values_BCX[scored_BC.to(values_BCX.device)]


def _length(row: TokenisedRow) -> int:
    return len(row.prompt_ids) + len(row.completion_ids)


def _scored_length(row: TokenisedRow) -> int:
    """Tokens that the model reads; the last one is only scored."""
    return len(row.prompt_ids) + len(row.completion_ids[:-1])


def _refuse_unfit(model: PreTrainedModel, row_ids: Sequence[str], lengths: Sequence[int]) -> None:
    """Raise RowsError for rows without a token to start from (length 0), or longer than the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    bad = {
        row_id: f"{length} tokens"
        for row_id, length in zip(row_ids, lengths, strict=True)
        if length == 0 or (limit is not None and length > limit)
    }
    if bad:
        raise RowsError(
            f"Expected a prompt of at least one token and, with its completion, at most {limit} tokens of the teacher; "
            "shorten or drop the rows.",
            bad,
        )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the output head: some heads are padded beyond the configured vocabulary."""
    return int(model.get_output_embeddings().weight.shape[0])


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _concatenate(parts: Sequence[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate([empty, *parts]).astype(empty.dtype, copy=False)


@contextmanager
def _head_input(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Gets the states that the output head reads while the context lasts."""
    seen: list[Tensor] = []

    # As in `recorded_blocks`: a streamed model has several forwards under way.
    thread = threading.get_ident()

    def remember(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            seen.append(inputs[0])

    handle = model.get_output_embeddings().register_forward_pre_hook(remember)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _without_sampling_defaults(model: PreTrainedModel) -> Iterator[None]:
    """A checkpoint's own generation_config adds penalties and minimum lengths to every call: no longer the model's arg-max."""
    configured = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = configured
