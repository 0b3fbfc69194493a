"""Greedy decoding of a model and of all its skip-one-layer ablations at once, exactly.

A decoder is bound by reading its weights, so all ablations share each read: they are rows of one decode with one KV cache. A block
never sees the rows that skip it, so its cache holds one entry per other row, at the same length as everywhere else. The prompt is
swept triangularly: ablations that have not diverged yet share the clean rows and copy their cache afterwards. Rows that reached
the end of sequence leave the batch. Shape letters: L blocks, B samples, R live rows of L+1 ablations, T prompt length, A new tokens.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from nexus.errors import ProfilingError
from nexus.profiling.layers import BlockCall, BlockStack, Rows
from nexus.profiling.perturbation import language_model_head, run_and_skip, stacked_rows


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


def position_ids_of(attention_mask_BT: Tensor) -> Tensor:
    """Return each token's position among the real tokens of its row, as `generate` counts it."""
    return (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)


def text_inputs(model: PreTrainedModel, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a forward over left- or right-padded text, positions counted from each row's first real token."""
    inputs = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}
    if accepts_position_ids(model):
        inputs["position_ids"] = position_ids_of(attention_mask_BT)
    return inputs


def accepts_position_ids(model: PreTrainedModel) -> bool:
    """Return whether the model's forward can be told the positions (otherwise it derives them itself)."""
    return "position_ids" in inspect.signature(model.forward).parameters


class GreedyDecode:
    """One greedy decode: the loop that the brute and the stacked strategy share."""

    def __init__(self, model: PreTrainedModel, attention_mask_BT: Tensor) -> None:
        self.model = model
        self.mask_RT = attention_mask_BT
        self.cache: Cache

    def prefill(self, input_ids_BT: Tensor, num_variants: int) -> Tensor:
        """Run the prompt; return the logits [variants * B, V] that follow it."""

        def keep_last(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0][:, -1:], *args[1:])

        hook = language_model_head(self.model).register_forward_pre_hook(keep_last)
        try:
            output = self.model(**text_inputs(self.model, input_ids_BT, self.mask_RT), use_cache=True)
        finally:
            hook.remove()
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise ProfilingError(
                f"Expected {type(self.model).__name__} to keep its past in a transformers Cache, found none. Use delta_nll, which "
                "needs no cache."
            )
        self.cache = cache
        self.mask_RT = self.mask_RT.repeat(num_variants, 1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def step(self, token_ids_R: Tensor) -> Tensor:
        """Append one token per row; return the next logits [R, V]."""
        self.mask_RT = torch.cat([self.mask_RT, self.mask_RT.new_ones(len(self.mask_RT), 1)], dim=1)
        inputs = {"input_ids": token_ids_R[:, None], "attention_mask": self.mask_RT}
        if accepts_position_ids(self.model):
            inputs["position_ids"] = position_ids_of(self.mask_RT)[:, -1:]
        output = self.model(**inputs, past_key_values=self.cache, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits


def brute_generations(
    model: PreTrainedModel,
    stack: BlockStack,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    max_new_tokens: int,
    stop: StopTokens,
) -> Tensor:
    """Return int64 [L+1, B, A] by one decode per ablation: the reference for `stacked_generations`."""
    eos_E = torch.tensor(stop.eos_ids, device=input_ids_BT.device)
    generations, first_logits = [], []
    for skipped in (None, *range(len(stack))):
        next_B = input_ids_BT[:, -1]
        tokens_BA = input_ids_BT.new_full((len(input_ids_BT), max_new_tokens), stop.pad_id)
        alive_B = torch.ones(len(input_ids_BT), dtype=torch.bool, device=input_ids_BT.device)
        decode = GreedyDecode(model, attention_mask_BT)
        with stack.intercept(run_and_skip(skipped)) as calls:
            logits = decode.prefill(input_ids_BT, 1)
            stack.require_called_once(calls)
            first_logits.append(logits)
            for step in range(max_new_tokens):
                logits = decode.step(next_B) if step > 0 else logits
                next_B = logits.argmax(dim=-1)
                tokens_BA[alive_B, step] = next_B[alive_B]
                alive_B &= ~torch.isin(next_B, eos_E)
                if not alive_B.any():
                    break
        generations.append(tokens_BA)
    stack.require_effect(torch.stack(first_logits))
    return torch.stack(generations)


def stacked_generations(
    model: PreTrainedModel,
    stack: BlockStack,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    max_new_tokens: int,
    stop: StopTokens,
) -> Tensor:
    """Return int64 [L+1, B, A]: greedy tokens of the clean model (row 0) and with block i the identity (row i+1).

    Raises:
        ProfilingError: no ablation changes the first logits, these are NaN, or the model keeps no cache of one entry per block.
    """
    num_variants, batch_size, device = len(stack) + 1, len(input_ids_BT), input_ids_BT.device
    eos_E = torch.tensor(stop.eos_ids, device=device)
    tokens_RA = input_ids_BT.new_full((num_variants * batch_size, max_new_tokens), stop.pad_id)
    decode = GreedyDecode(model, attention_mask_BT)

    def sweep_prompt(call: BlockCall) -> Tensor:
        live = call.index + 1
        output = call.run(call.hidden_RTD, stacked_rows(live, batch_size, device) if live > 1 else None)
        return torch.cat([output, call.hidden_RTD[:batch_size]])

    with stack.intercept(sweep_prompt) as calls:
        logits = decode.prefill(input_ids_BT, num_variants)
    stack.require_called_once(calls)
    stack.require_effect(logits.view(num_variants, batch_size, -1))
    cache_layers: list[Any] = list(decode.cache.layers)
    if len(cache_layers) != len(stack):
        raise ProfilingError(
            f"Expected a cache entry for each of the {len(stack)} blocks at '{stack.path}', found {len(cache_layers)}: ablations "
            "cannot be stacked in this model. Use strategy='brute'."
        )

    row_R = torch.arange(num_variants * batch_size, device=device)
    # The block that each row skips; clean rows name the one past the last.
    skips_R = (row_R // batch_size - 1) % num_variants
    rows_of_block = [(skips_R != index).nonzero()[:, 0] for index in range(len(stack))]
    for index, (layer, rows_S) in enumerate(zip(cache_layers, rows_of_block, strict=True)):
        # Ablations of this block and of later ones ran as the clean rows so far.
        layer.reorder_cache(torch.where(rows_S // batch_size <= index, rows_S, rows_S % batch_size))

    def run_others(call: BlockCall) -> Tensor:
        rows_S = rows_of_block[call.index]
        output = call.run(call.hidden_RTD.index_select(0, rows_S), Rows(rows_S, len(call.hidden_RTD)))
        return call.hidden_RTD.index_copy(0, rows_S, output)

    alive_R = torch.ones_like(row_R, dtype=torch.bool)
    next_R = row_R
    with stack.intercept(run_others):
        for step in range(max_new_tokens):
            if step > 0:
                # A block without rows would lose count of the tokens: finished rows stay while a single ablation is left.
                if not alive_R.all() and len(torch.unique(skips_R[alive_R])) > 1:
                    for layer, rows_S in zip(cache_layers, rows_of_block, strict=True):
                        layer.reorder_cache(alive_R[rows_S].nonzero()[:, 0])
                    decode.mask_RT, next_R, row_R, skips_R = (
                        x[alive_R] for x in (decode.mask_RT, next_R, row_R, skips_R)
                    )
                    alive_R = torch.ones_like(row_R, dtype=torch.bool)
                    rows_of_block[:] = [(skips_R != index).nonzero()[:, 0] for index in range(len(stack))]
                logits = decode.step(next_R)
            next_R = logits.argmax(dim=-1)
            tokens_RA[row_R[alive_R], step] = next_R[alive_R]
            alive_R &= ~torch.isin(next_R, eos_E)
            if not alive_R.any():
                break
    return tokens_RA.view(num_variants, batch_size, max_new_tokens)
