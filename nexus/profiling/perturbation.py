"""Exact skip-one-layer sweeps over a model's own forward, and what is read off its output.

Ablation i replaces block i by the identity. The strategies differ only in cost and give equal readings:

* brute: one forward per ablation, each running all blocks; the reference.
* prefix: ablation i resumes from the clean input of block i, half of brute's block calls.
* triangular: one forward for all; at block j the live ablations 0..j-1 and the clean rows are stacked on the batch axis and
  ablation j is born as the clean input of j. The arithmetic of prefix, but each block's weights are read and dequantised once.

Shape letters: L blocks, V = L+1 variants (the clean one first), B rows, N scored tokens of all rows, T time, D width, C classes or
embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nexus.errors import ProfilingError
from nexus.profiling.layers import BlockCall, BlockHandler, BlockStack, Rows

SweepStrategy = Literal["brute", "prefix", "triangular"]

# Runs the model once, with so many variants stacked on the batch axis behind the blocks, and returns [variants, ...].
Reader = Callable[[int], Tensor]
# Is shown the index of a block and its clean output [B, T, D].
Observer = Callable[[int, Tensor], None]

# Logits turned into float32 log-probabilities at a time: 2**24 values are 64 MiB.
_LOGITS_PER_CHUNK = 2**24


def sweep_skips(stack: BlockStack, read: Reader, strategy: SweepStrategy, observe: Observer | None = None) -> Tensor:
    """Return the readings [L+1, ...] of the clean model (row 0) and with block i the identity (row i+1).

    A block whose output equals its input bit for bit is given the clean readings themselves.

    Raises:
        ProfilingError: the model does not call each block once, gives NaN, or no ablation changes anything.
    """
    is_identity = [False] * len(stack)
    clean_inputs: list[Tensor] = []

    def watch(call: BlockCall, input_BTD: Tensor, output_BTD: Tensor) -> None:
        is_identity[call.index] = torch.equal(input_BTD, output_BTD)
        if observe is not None:
            observe(call.index, output_BTD)

    def run_clean(call: BlockCall) -> Tensor:
        output_BTD = call.run(call.hidden_RTD)
        watch(call, call.hidden_RTD, output_BTD)
        if strategy == "prefix":
            clean_inputs.append(call.hidden_RTD)
        return output_BTD

    def run_stacked(call: BlockCall) -> Tensor:
        num_variants = call.index + 1
        rows = stacked_rows(num_variants, call.hidden_RTD.shape[0] // num_variants, call.hidden_RTD.device)
        output_RTD = call.run(call.hidden_RTD, rows if num_variants > 1 else None)
        input_BTD = call.hidden_RTD[: rows.batch_size]
        watch(call, input_BTD, output_RTD[: rows.batch_size])
        return torch.cat([output_RTD, input_BTD])

    if strategy == "triangular":
        with stack.intercept(run_stacked) as calls:
            readings_V = read(len(stack) + 1)
        stack.require_called_once(calls)
    else:
        with stack.intercept(run_clean) as calls:
            clean = read(1)
        stack.require_called_once(calls)
        readings = [clean]
        for skipped in range(len(stack)):
            handler = run_and_skip(skipped) if strategy == "brute" else _resume_and_skip(skipped, clean_inputs)
            with stack.intercept(handler):
                readings.append(read(1))
        readings_V = torch.cat(readings)
    for index, unchanged in enumerate(is_identity):
        if unchanged:
            readings_V[index + 1] = readings_V[0]
    stack.require_effect(readings_V)
    return readings_V


def stacked_rows(num_variants: int, batch_size: int, device: torch.device) -> Rows:
    """Return the rows of `num_variants` whole copies of a batch, one after the other."""
    return Rows(torch.arange(batch_size, device=device).repeat(num_variants), batch_size)


def run_and_skip(skipped: int | None) -> BlockHandler:
    """Return the handler that runs every block and discards what block `skipped` (None: no block) made of its input.

    The skipped block runs too, because others may depend on what it leaves behind: its entry in the cache, or keys and values
    that later blocks share.
    """

    def handle(call: BlockCall) -> Tensor:
        output_BTD = call.run(call.hidden_RTD)
        return call.hidden_RTD if call.index == skipped else output_BTD

    return handle


def _resume_and_skip(skipped: int, clean_inputs: list[Tensor]) -> BlockHandler:
    """Return the handler that makes block `skipped` the identity and replays the clean run of those before it."""

    def handle(call: BlockCall) -> Tensor:
        if call.index < skipped:
            # Exactly what the block returned in the clean run, also for models that collect hidden states.
            return clean_inputs[call.index + 1]
        return call.hidden_RTD if call.index == skipped else call.run(call.hidden_RTD)

    return handle


@dataclass(frozen=True)
class ScoredTokens:
    """The scored targets of a batch and the logit positions (one before) that predict them, row by row."""

    rows_N: Tensor
    positions_N: Tensor
    targets_N: Tensor


def scorable_targets(attention_mask_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """Return bool [B, T]: the targets that `loss_mask_BT` marks and that have a context.

    Position 0 has none, and neither has the first token after left padding: there the model would predict from a pad.
    """
    targets_BT = loss_mask_BT.bool() & attention_mask_BT.bool()
    targets_BT[:, 1:] &= attention_mask_BT[:, :-1].bool()
    targets_BT[:, 0] = False
    return targets_BT


def scored_tokens(input_ids_BT: Tensor, targets_BT: Tensor) -> ScoredTokens:
    """Return the targets marked by `targets_BT` (of `scorable_targets`) as lists."""
    rows_N, columns_N = targets_BT.nonzero(as_tuple=True)
    return ScoredTokens(rows_N, columns_N - 1, input_ids_BT[rows_N, columns_N])


def language_model_head(model: PreTrainedModel) -> nn.Module:
    """Return the module that turns hidden states into logits.

    Raises:
        ProfilingError: the model has none.
    """
    head: nn.Module | None = cast(Any, model).get_output_embeddings()
    if head is None:
        raise ProfilingError(
            f"Expected a language-model head, found none in {type(model).__name__}. Profile it as an encoder."
        )
    return head


def token_reader(
    model: PreTrainedModel, stack: BlockStack, inputs: Mapping[str, Tensor], scored: ScoredTokens
) -> Reader:
    """Return a reader of [variants, N, 3]: each scored token's negative log-likelihood (nats), argmax hit and logit.

    The logit is there to see an effect where the likelihood is saturated.

    The head sees the scored positions only, through a hook, because not every model can be told which logits to keep.
    """
    head = language_model_head(model)

    def read(num_variants: int) -> Tensor:
        def keep_scored(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if len(args[0]) != num_variants * len(inputs["input_ids"]):
                raise stack.not_in_the_path(
                    f"{len(args[0])} rows behind them where {num_variants} variants were stacked"
                )
            hidden_VBTD = args[0].view(num_variants, -1, *args[0].shape[1:])
            return (hidden_VBTD[:, scored.rows_N, scored.positions_N].flatten(0, 1)[None], *args[1:])

        hook = head.register_forward_pre_hook(keep_scored)
        try:
            logits = model(**inputs, use_cache=False).logits[0]
        finally:
            hook.remove()
        return token_readings(logits, scored.targets_N.repeat(num_variants)).view(num_variants, -1, 3)

    return read


class OutputReader:
    """Reads [1, B, C] class log-probabilities or, from a model without a classification head, pooled embeddings.

    Pooling is the model's own where it has one, else the mean over (unmasked) positions.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
        self.classifies = False
        """Whether the readings are log-probabilities; known after the first reading."""
        self._model = model
        self._inputs = inputs

    def __call__(self, num_variants: int) -> Tensor:
        """Return float64 [1, B, C]; encoders are never stacked, because what follows their blocks may know the batch size."""
        output = self._model(**self._inputs)
        logits = getattr(output, "logits", None)
        if logits is not None:
            self.classifies = True
            return F.log_softmax(logits.double(), dim=-1)[None]
        pooled = getattr(output, "pooler_output", None)
        return (pooled if pooled is not None else _mean_pool(output.last_hidden_state, self._inputs)).double()[None]


def _mean_pool(hidden_BTD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    mask_BT = inputs.get("attention_mask")
    if mask_BT is None or mask_BT.shape != hidden_BTD.shape[:2]:
        # Convolutional front ends shorten time: their mask is not the encoder's.
        return hidden_BTD.mean(dim=1)
    weights_BT1 = mask_BT.to(hidden_BTD.dtype)[..., None]
    return (hidden_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)


def token_readings(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return float64 [N, 3]: negative log-likelihood, argmax hit, the target's logit. Logits are widened chunk by chunk."""
    readings = []
    size = max(1, _LOGITS_PER_CHUNK // logits_NV.shape[-1])
    for logits, targets in zip(torch.split(logits_NV, size), torch.split(targets_N, size), strict=True):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        target_logit = wide.gather(-1, targets[:, None])[:, 0]
        nll = torch.logsumexp(wide, dim=-1) - target_logit
        is_hit = wide.argmax(dim=-1) == targets
        readings.append(torch.stack([nll.double(), is_hit.double(), target_logit.double()], dim=-1))
    return torch.cat(readings)
