"""Greedy decoding of a model and of all its skip-one-layer ablations at once, exactly.

A decoder is bound by reading its weights, so all ablations share each read: they are rows of one decode with one KV cache. A block
never computes a row that skips it, nor one that would repeat the clean row: an ablation whose tokens are still the clean ones is
the clean row up to the block it skips. The prompt is swept triangularly for the same reason. Rows that reached the end of sequence
leave the batch. Shape letters: L blocks, B samples, R live rows of L+1 ablations, T prompt length, A new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache

from nexus.errors import ProfilingError
from nexus.profiling.caches import with_room
from nexus.profiling.inputs import ModelInputs, model_inputs
from nexus.profiling.layers import BlockCall, BlockStack, Rows
from nexus.profiling.perturbation import language_model_head, run_and_skip, stacked_rows


class NotStackableError(ProfilingError):
    """A model whose ablations cannot share one decode; one decode per ablation gives the same."""


@dataclass(frozen=True)
class StopTokens:
    """The ids that end a generation (possibly none) and the id that fills what follows them."""

    eos_ids: tuple[int, ...]
    pad_id: int


def stop_tokens(model: PreTrainedModel) -> StopTokens:
    """Return the model's own stop tokens; like `generate`, a missing pad id is replaced by the first end-of-sequence id."""
    config = model.generation_config
    eos = config.eos_token_id
    eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    if config.pad_token_id is not None:
        return StopTokens(eos_ids, config.pad_token_id)
    # Without an end of sequence nothing is ever padded.
    return StopTokens(eos_ids, eos_ids[0] if eos_ids else 0)


class GreedyDecode:
    """One greedy decode: the loop that the brute and the stacked strategy share."""

    def __init__(self, model: PreTrainedModel, inputs: ModelInputs) -> None:
        self.model = model
        self.inputs = inputs
        self.mask_RT = inputs.attention_mask_BT
        self.cache: Cache

    @property
    def past(self) -> Cache:
        """What the blocks remember of the tokens, one entry per block."""
        return self.cache.self_attention_cache if isinstance(self.cache, EncoderDecoderCache) else self.cache

    def prefill(self, num_variants: int) -> Tensor:
        """Run the prompt; return the logits [variants * B, V] that follow it."""
        output = _last_logits(self.model, self.inputs.prompt(num_variants, use_cache=True))
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise NotStackableError(
                f"Expected {type(self.model).__name__} to keep its past in a transformers Cache, found none: ablations cannot share "
                "one decode. Use strategy='brute'."
            )
        self.cache = cache
        self.mask_RT = self.mask_RT.repeat(num_variants, 1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def step(self, token_ids_R: Tensor) -> Tensor:
        """Append one token per row; return the next logits [R, V]."""
        self.mask_RT = torch.cat([self.mask_RT, self.mask_RT.new_ones(len(self.mask_RT), 1)], dim=1)
        output = self.model(**self.inputs.step(token_ids_R, self.mask_RT), past_key_values=self.cache)
        logits: Tensor = output.logits[:, -1]
        return logits


class RereadingDecode:
    """A greedy decode of a model that keeps its past in a way of its own, or not at all: each step reads the whole text again."""

    def __init__(self, model: PreTrainedModel, inputs: ModelInputs) -> None:
        self.model = model
        self.input_ids_BT, self.attention_mask_BT = inputs.input_ids_BT, inputs.attention_mask_BT

    def prefill(self, num_variants: int) -> Tensor:
        """Run the prompt; return the logits [B, V] that follow it."""
        inputs = model_inputs(self.model, self.input_ids_BT, self.attention_mask_BT)
        logits: Tensor = _last_logits(self.model, inputs.prompt(num_variants, use_cache=False)).logits[:, -1]
        return logits

    def step(self, token_ids_B: Tensor) -> Tensor:
        """Append one token per row; return the next logits [B, V]."""
        self.input_ids_BT = torch.cat([self.input_ids_BT, token_ids_B[:, None]], dim=1)
        self.attention_mask_BT = torch.cat(
            [self.attention_mask_BT, self.attention_mask_BT.new_ones(len(token_ids_B), 1)], dim=1
        )
        return self.prefill(1)


def _last_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """Return the model's output with logits of the last position alone."""

    def keep_last(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, -1:], *args[1:])

    hook = language_model_head(model).register_forward_pre_hook(keep_last)
    try:
        return model(**inputs)
    finally:
        hook.remove()


def brute_generations(
    model: PreTrainedModel, stack: BlockStack, inputs: ModelInputs, max_new_tokens: int, stop: StopTokens
) -> Tensor:
    """Return int64 [L+1, B, A] by one decode per ablation: the reference for `stacked_generations`."""
    input_ids_BT = inputs.input_ids_BT
    eos_E = torch.tensor(stop.eos_ids, device=input_ids_BT.device)
    generations, first_logits = [], []
    kind: type[GreedyDecode | RereadingDecode] = GreedyDecode
    for skipped in (None, *range(len(stack))):
        next_B = input_ids_BT[:, -1]
        tokens_BA = input_ids_BT.new_full((len(input_ids_BT), max_new_tokens), stop.pad_id)
        alive_B = torch.ones(len(input_ids_BT), dtype=torch.bool, device=input_ids_BT.device)
        decode = kind(model, inputs)
        with stack.intercept(run_and_skip(skipped)) as calls:
            try:
                logits = decode.prefill(1)
            except NotStackableError:
                kind = RereadingDecode
                decode = kind(model, inputs)
                calls[:] = [0] * len(calls)
                logits = decode.prefill(1)
            stack.require_called_once(calls)
            first_logits.append(logits)
            for step in range(max_new_tokens):
                logits = decode.step(next_B) if step > 0 else logits
                next_B = _greedy(logits, stack).to(logits.device)
                tokens_BA[alive_B, step] = next_B[alive_B]
                alive_B &= ~torch.isin(next_B, eos_E)
                if not alive_B.any():
                    break
        generations.append(tokens_BA)
    stack.require_effect(torch.stack(first_logits))
    return torch.stack(generations)


def stacked_generations(
    model: PreTrainedModel, stack: BlockStack, inputs: ModelInputs, max_new_tokens: int, stop: StopTokens
) -> Tensor:
    """Return int64 [L+1, B, A]: greedy tokens of the clean model (row 0) and with block i the identity (row i+1).

    Raises:
        NotStackableError: the model keeps no cache of one entry per block.
        ProfilingError: no ablation changes the first logits, or these are NaN.
    """
    num_variants, batch_size, device = len(stack) + 1, len(inputs.input_ids_BT), inputs.input_ids_BT.device
    eos_E = torch.tensor(stop.eos_ids)
    tokens_RA = torch.full((num_variants * batch_size, max_new_tokens), stop.pad_id)
    decode = GreedyDecode(model, inputs)

    handed_on: list[Any] = []

    def sweep_prompt(call: BlockCall) -> Tensor:
        if call.is_given(handed_on):
            raise NotStackableError(
                f"Expected blocks at '{stack.path}' to give the next one their hidden states alone, found more: rows that skip a "
                "block have nothing else to hand on. Use strategy='brute'."
            )
        live = call.index + 1
        output = call.run(call.hidden_RTD, stacked_rows(live, batch_size, device) if live > 1 else None)
        handed_on[:] = call.extras or ()
        return torch.cat([output, call.hidden_RTD[:batch_size]])

    with stack.intercept(sweep_prompt) as calls:
        logits = decode.prefill(num_variants)
    stack.require_called_once(calls)
    stack.require_effect(logits.view(num_variants, batch_size, -1))
    if stack.side == "encoder":
        return _decode_apart(decode, logits, tokens_RA, stack, eos_E).view(num_variants, batch_size, -1).to(device)
    cache_layers: list[Any] = list(decode.past.layers)
    if len(cache_layers) != len(stack):
        raise NotStackableError(
            f"Expected a cache entry for each of the {len(stack)} blocks at '{stack.path}', found {len(cache_layers)}: ablations "
            "cannot be stacked in this model. Use strategy='brute'."
        )

    live = _LiveRows(len(stack), batch_size)
    decode.past.layers = [with_room(layer, live.num_rows - batch_size, max_new_tokens - 1) for layer in cache_layers]
    inputs.rows_are((live.id_R % batch_size).to(device))
    next_R, alive_R = live.id_R, torch.ones(live.num_rows, dtype=torch.bool)
    present, born = live.of_blocks(device)

    def run_present(call: BlockCall) -> Tensor:
        rows_S, (born_N, clean_N) = present[call.index], born[call.index]
        output = call.run(call.hidden_RTD.index_select(0, rows_S), Rows(rows_S, len(call.hidden_RTD)))
        hidden_RTD = call.hidden_RTD.index_copy(0, rows_S, output)
        return (
            hidden_RTD.index_copy_(0, born_N, call.hidden_RTD.index_select(0, clean_N)) if len(born_N) else hidden_RTD
        )

    with stack.intercept(run_present):
        for step in range(max_new_tokens):
            if step > 0:
                logits = decode.step(next_R.to(device))
            next_R = _greedy(logits, stack)
            tokens_RA[live.id_R[alive_R], step] = next_R[alive_R]
            alive_R &= ~torch.isin(next_R, eos_E)
            if not alive_R.any():
                break
            change = live.advance(next_R, alive_R)
            if change is not None:
                keep_R, entries = change
                layers: list[Any] = decode.past.layers
                for layer, entries_S in zip(layers, entries, strict=True):
                    layer.reorder_cache(entries_S.to(device))
                decode.mask_RT = decode.mask_RT[keep_R.to(device)]
                inputs.rows_are((live.id_R % batch_size).to(device))
                next_R, alive_R = next_R[keep_R], alive_R[keep_R]
                present, born = live.of_blocks(device)
    return tokens_RA.view(num_variants, batch_size, max_new_tokens).to(device)


def _decode_apart(
    decode: GreedyDecode, logits_RV: Tensor, tokens_RA: Tensor, stack: BlockStack, eos_E: Tensor
) -> Tensor:
    """Fill in and return the tokens [R, A] of rows that share nothing: each ablation of an encoder is heard differently."""
    batch_size, device = len(decode.inputs.input_ids_BT), logits_RV.device
    id_R = next_R = torch.arange(len(tokens_RA))
    for step in range(tokens_RA.shape[1]):
        logits_RV = logits_RV if step == 0 else decode.step(next_R.to(device))
        next_R = _greedy(logits_RV, stack)
        tokens_RA[id_R, step] = next_R
        alive_R = ~torch.isin(next_R, eos_E)
        if not alive_R.any():
            return tokens_RA
        if not alive_R.all():
            keep_R = alive_R.nonzero()[:, 0].to(device)
            id_R, next_R = id_R[alive_R], next_R[alive_R]
            decode.cache.reorder_cache(cast(torch.LongTensor, keep_R))
            decode.mask_RT = decode.mask_RT[keep_R]
            decode.inputs.rows_are((id_R % batch_size).to(device))
    return tokens_RA


class _LiveRows:
    """The rows of a stacked decode: whose they are, and which of them each block computes and caches. Kept on the CPU.

    While an ablation generates what the clean model generates, the blocks before the skipped one would compute and cache for it
    what they compute and cache for the clean row: they leave it out. It is born at the block it skips, as the clean input of that
    block, and joins the earlier blocks' caches, as a copy of the clean row, when its first other token makes it go its own way.
    """

    def __init__(self, num_blocks: int, batch_size: int) -> None:
        self._num_blocks = num_blocks
        self.id_R = torch.arange((num_blocks + 1) * batch_size)
        """Variant * batch size + sample."""
        # The block that each row skips; clean rows name the one past the last.
        self._skips_R = (self.id_R // batch_size - 1) % (num_blocks + 1)
        self._clean_R = self.id_R % batch_size
        self._agrees_R = self._skips_R < num_blocks
        # In the order of the cache. A triangular sweep of the prompt leaves the clean rows and those born before.
        self._present = [self.id_R[: (index + 1) * batch_size] for index in range(num_blocks)]

    @property
    def num_rows(self) -> int:
        """Rows of the model's call."""
        return len(self.id_R)

    def of_blocks(self, device: torch.device) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Return for each block the rows that it computes, and those born there with the clean rows that they are born from."""
        born = []
        for index in range(self._num_blocks):
            born_N = (self._agrees_R & (self._skips_R == index)).nonzero()[:, 0]
            born.append((born_N.to(device), self._clean_R[born_N].to(device)))
        return [rows_S.to(device) for rows_S in self._present], born

    def advance(self, next_R: Tensor, alive_R: Tensor) -> tuple[Tensor, list[Tensor]] | None:
        """Let rows part from the clean ones and finished rows leave.

        Args:
            next_R: the token that each row generated.
            alive_R: whether its generation goes on.

        Returns:
            Which rows stay, and for each block's cache the entry that each of its new entries copies (mostly itself). None if
            nothing changes.
        """
        parts_R = self._agrees_R & (next_R != next_R[self._clean_R])
        self._agrees_R &= ~parts_R
        keep_R = alive_R.clone()
        skipped = self._skips_R[keep_R]
        if bool((skipped == skipped[0]).all()) and skipped[0] < self._num_blocks:
            # A block without rows would lose count of the positions: one finished row stays beside the last ablation's. The first
            # is a clean one or has parted from it: it needs no other.
            keep_R[(self._skips_R != skipped[0]).nonzero()[0, 0]] = True
        if bool(keep_R.all()) and not bool(parts_R.any()):
            return None
        new_index_R = keep_R.cumsum(0) - 1
        entries = []
        for index, rows_S in enumerate(self._present):
            joins_N = (parts_R & keep_R & (self._skips_R > index)).nonzero()[:, 0]
            entry_of_R = torch.full_like(self.id_R, -1)
            entry_of_R[rows_S] = torch.arange(len(rows_S))
            stays_S = keep_R[rows_S].nonzero()[:, 0]
            num_entries = len(stays_S) + len(joins_N)
            # Entries that can stay where they are do; holes and the end take the others.
            entries_S, row_of_S = torch.arange(num_entries), torch.empty(num_entries, dtype=torch.int64)
            is_free_S = torch.ones(num_entries, dtype=torch.bool)
            in_place = stays_S[stays_S < num_entries]
            beyond = stays_S[stays_S >= num_entries]
            is_free_S[in_place] = False
            row_of_S[in_place] = rows_S[in_place]
            entries_S[is_free_S] = torch.cat([beyond, entry_of_R[self._clean_R[joins_N]]])
            row_of_S[is_free_S] = torch.cat([rows_S[beyond], joins_N])
            entries.append(entries_S)
            self._present[index] = new_index_R[row_of_S]
        self.id_R, self._skips_R, self._agrees_R = (x[keep_R] for x in (self.id_R, self._skips_R, self._agrees_R))
        # Of rows that no longer agree, whose clean row may be gone, it is never asked.
        self._clean_R = new_index_R[self._clean_R[keep_R]]
        return keep_R, entries


def _greedy(logits_RV: Tensor, stack: BlockStack) -> Tensor:
    """Return the greedy tokens [R] on the CPU."""
    chosen_R = logits_RV.argmax(dim=-1)
    # argmax takes NaN for the largest, so looking at what it chose is enough.
    if bool(logits_RV.gather(1, chosen_R[:, None]).isnan().any()):
        raise stack.not_a_number()
    return chosen_R.cpu()
