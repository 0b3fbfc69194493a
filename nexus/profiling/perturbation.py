"""Exact one-layer interventions swept over a model's own forward, and what is read off its output.

Each intervention replaces what one block returns: by its input (skipping the block), by its input and an average or random update
(`nexus.profiling.interventions`). The strategies differ only in cost and give equal readings:

* brute: one forward per intervention, each running all blocks; the reference.
* prefix: an intervention resumes from the clean states around its block, half of brute's block calls.
* triangular: one forward for all; at block j the live variants and the clean rows are stacked on the batch axis, and those of
  block j are born from its clean input and output. The arithmetic of prefix, but each block's weights are read and dequantised
  once.

Shape letters: L blocks, K interventions, V = K+1 variants (the clean one first), B rows, N scored tokens of all rows, M = V*N,
T time, D width, C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nexus.errors import ProfilingError
from nexus.profiling.cost import SweepStrategy
from nexus.profiling.inputs import ModelInputs
from nexus.profiling.layers import BlockCall, BlockHandler, BlockStack, Rows

# Runs the model once, with so many variants stacked on the batch axis behind the blocks, and returns [variants, ...].
Reader = Callable[[int], Tensor]
# Is shown the index of a block, its clean input and its clean output [B, T, D].
Observer = Callable[[int, Tensor, Tensor], None]
# Makes what a block is to return from its clean input and its clean output [B, T, D].
Replacement = Callable[[Tensor, Tensor], Tensor]

# Logits turned into float32 log-probabilities at a time: 2**24 values are 64 MiB, of which half a dozen copies are made. A share of
# all of them keeps the copies small beside the logits themselves, in small models too.
_LOGITS_PER_CHUNK = 2**24
_MIN_CHUNKS = 32


@dataclass(frozen=True, eq=False)
class Intervention:
    """What one block is made to return."""

    layer: int
    replace: Replacement


def skip(input_BTD: Tensor, output_BTD: Tensor) -> Tensor:
    """Return the input: the block is the identity."""
    del output_BTD
    return input_BTD


def skip_each(stack: BlockStack) -> list[Intervention]:
    """Return one intervention per block, which skips it."""
    return [Intervention(layer, skip) for layer in range(len(stack))]


def sweep(
    stack: BlockStack,
    read: Reader,
    strategy: SweepStrategy,
    interventions: Sequence[Intervention],
    observe: Observer | None = None,
) -> Tensor:
    """Return the readings [K+1, ...] of the clean model (row 0) and under intervention k alone (row k+1).

    An intervention that gives a block's own output back bit for bit has the clean readings themselves.

    Raises:
        ProfilingError: the model does not call each block once.
    """
    changes_nothing = [False] * len(interventions)
    # Variants are stacked in the order in which they are born.
    order = sorted(range(len(interventions)), key=lambda k: interventions[k].layer)
    born_at = [[k for k in order if interventions[k].layer == layer] for layer in range(len(stack))]
    clean_states: list[tuple[Tensor, Tensor]] = []

    def make(k: int, input_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        made_BTD = interventions[k].replace(input_BTD, output_BTD)
        changes_nothing[k] = torch.equal(made_BTD, output_BTD)
        return made_BTD

    def run_clean(call: BlockCall) -> Tensor:
        output_BTD = call.run(call.hidden_RTD)
        if observe is not None:
            observe(call.index, call.hidden_RTD, output_BTD)
        if strategy == "prefix":
            clean_states.append((call.hidden_RTD, output_BTD))
        return output_BTD

    def run_stacked(call: BlockCall) -> Tensor:
        num_variants = 1 + sum(len(born) for born in born_at[: call.index])
        rows = stacked_rows(num_variants, call.hidden_RTD.shape[0] // num_variants, call.hidden_RTD.device)
        output_RTD = call.run(call.hidden_RTD, rows if num_variants > 1 else None)
        input_BTD, output_BTD = call.hidden_RTD[: rows.batch_size], output_RTD[: rows.batch_size]
        if observe is not None:
            observe(call.index, input_BTD, output_BTD)
        made = [make(k, input_BTD, output_BTD) for k in born_at[call.index]]
        # What clean rows hand on, those born of them hand on too.
        clean_B = torch.arange(rows.batch_size, device=output_RTD.device)
        call.add_rows(
            Rows(
                torch.cat([torch.arange(len(output_RTD), device=clean_B.device), clean_B.repeat(len(made))]),
                len(output_RTD),
            )
        )
        return torch.cat([output_RTD, *made])

    def run_and_replace(k: int) -> BlockHandler:
        def handle(call: BlockCall) -> Tensor:
            output_BTD = call.run(call.hidden_RTD)
            return make(k, call.hidden_RTD, output_BTD) if call.index == interventions[k].layer else output_BTD

        return handle

    def resume_and_replace(k: int) -> BlockHandler:
        def handle(call: BlockCall) -> Tensor:
            if call.index > interventions[k].layer:
                return call.run(call.hidden_RTD)
            input_BTD, output_BTD = clean_states[call.index]
            # Exactly what the block returned in the clean run, also for models that collect hidden states.
            return output_BTD if call.index < interventions[k].layer else make(k, input_BTD, output_BTD)

        return handle

    if strategy == "triangular":
        with stack.intercept(run_stacked) as calls:
            readings_V = read(len(interventions) + 1)
        stack.require_called_once(calls)
        place = {k: row for row, k in enumerate(order, start=1)}
        readings_V = readings_V[[0, *(place[k] for k in range(len(order)))]]
    else:
        with stack.intercept(run_clean) as calls:
            clean = read(1)
        stack.require_called_once(calls)
        readings = [clean]
        for k in range(len(interventions)):
            with stack.intercept(run_and_replace(k) if strategy == "brute" else resume_and_replace(k)):
                readings.append(read(1))
        readings_V = torch.cat(readings)
    for k, unchanged in enumerate(changes_nothing):
        if unchanged:
            readings_V[k + 1] = readings_V[0]
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


@dataclass(frozen=True)
class ScoredTokens:
    """The scored targets of a batch and the logit positions (one before) that predict them, row by row."""

    rows_N: Tensor
    positions_N: Tensor
    targets_N: Tensor
    num_rows: int


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
    return ScoredTokens(rows_N, columns_N - 1, input_ids_BT[rows_N, columns_N], len(input_ids_BT))


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


class TokenReader:
    """Reads [variants, N, 3]: each scored token's negative log-likelihood (nats), argmax hit and logit; where asked for, a fourth
    column holds KL(clean || variant) of the token's whole distribution.

    The logit is there to see an effect where the likelihood is saturated. The head sees the scored positions only, through a hook,
    because not every model can be told which logits to keep.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stack: BlockStack,
        inputs: ModelInputs,
        scored: ScoredTokens,
        *,
        with_kl: bool = False,
    ) -> None:
        self._model = model
        self._stack = stack
        self._inputs = inputs
        self._scored = scored
        self._with_kl = with_kl
        self._head = language_model_head(model)
        self._clean_logits_NV: Tensor | None = None

    def __call__(self, num_variants: int) -> Tensor:
        """Return the readings of stacked variants, the clean one first; or of one, the clean one in the first call."""
        num_rows = self._scored.num_rows

        def keep_scored(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if len(args[0]) != num_variants * num_rows:
                raise self._stack.not_in_the_path(
                    f"{len(args[0])} rows behind them where {num_variants} variants were stacked"
                )
            hidden_VBTD = args[0].view(num_variants, -1, *args[0].shape[1:])
            return (hidden_VBTD[:, self._scored.rows_N, self._scored.positions_N].flatten(0, 1)[None], *args[1:])

        hook = self._head.register_forward_pre_hook(keep_scored)
        try:
            logits_MV = self._model(**self._inputs.prompt(num_variants, use_cache=False)).logits[0]
        finally:
            hook.remove()
        targets_N = self._scored.targets_N
        if self._with_kl and self._clean_logits_NV is None:
            self._clean_logits_NV = logits_MV[: len(targets_N)]
        readings = token_readings(logits_MV, targets_N.repeat(num_variants), self._clean_logits_NV)
        return readings.view(num_variants, len(targets_N), -1)


class OutputReader:
    """Reads an encoder: class log-probabilities where it has a classification head, followed by the pooled embedding.

    The embedding is what the classification head (a linear child of the model, one row per class) is given, else the model's own
    pooled output, else the mean over (unmasked) positions. A classifier with a head of another kind has none.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
        self.num_classes = 0
        """Log-probabilities at the front of a reading, 0 without a head; known after the first reading."""
        self._model = model
        self._inputs = inputs
        self._linear_children = [child for child in model.children() if isinstance(child, nn.Linear)]

    def __call__(self, num_variants: int) -> Tensor:
        """Return float64 [1, B, C+E]; encoders are never stacked, because what follows their blocks may know the batch size."""
        seen: dict[nn.Linear, Tensor] = {}

        def record(child: nn.Linear, args: tuple[Tensor, ...]) -> None:
            seen[child] = args[0]

        hooks = [child.register_forward_pre_hook(record) for child in self._linear_children]
        try:
            output = self._model(**self._inputs)
        finally:
            for hook in hooks:
                hook.remove()
        logits_BC = getattr(output, "logits", None)
        if logits_BC is None:
            pooled_BE = getattr(output, "pooler_output", None)
            return (_mean_pool(output.last_hidden_state, self._inputs) if pooled_BE is None else pooled_BE).double()[
                None
            ]
        self.num_classes = logits_BC.shape[-1]
        log_probs_BC = F.log_softmax(logits_BC.double(), dim=-1)
        given_to_head = [
            x_BE for child, x_BE in seen.items() if child.out_features == self.num_classes and x_BE.ndim == 2
        ]
        return torch.cat([log_probs_BC, *(x_BE.double() for x_BE in given_to_head)], dim=-1)[None]


def _mean_pool(hidden_BTD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    mask_BT = inputs.get("attention_mask")
    if mask_BT is None or mask_BT.shape != hidden_BTD.shape[:2]:
        # Convolutional front ends shorten time: their mask is not the encoder's.
        return hidden_BTD.mean(dim=1)
    weights_BT1 = mask_BT.to(hidden_BTD.dtype)[..., None]
    return (hidden_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)


def token_readings(logits_MV: Tensor, targets_M: Tensor, clean_logits_NV: Tensor | None = None) -> Tensor:
    """Return float64 [M, 3]: negative log-likelihood, argmax hit, the target's logit; with `clean_logits_NV` a fourth column, the
    KL divergence from those of the same token to these, nats. Logits are widened chunk by chunk.

    Args:
        clean_logits_NV: of the tokens that the M rows repeat, variant after variant.
    """
    readings = []
    size = max(1, min(_LOGITS_PER_CHUNK // logits_MV.shape[-1], len(logits_MV) // _MIN_CHUNKS))
    for start in range(0, len(logits_MV), size):
        logits, targets = logits_MV[start : start + size], targets_M[start : start + size]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        normaliser = torch.logsumexp(wide, dim=-1)
        target_logit = wide.gather(-1, targets[:, None])[:, 0]
        is_hit = wide.argmax(dim=-1) == targets
        columns = [normaliser - target_logit, is_hit, target_logit]
        if clean_logits_NV is not None:
            tokens = torch.arange(start, start + len(wide), device=wide.device) % len(clean_logits_NV)
            clean = clean_logits_NV[tokens].to(wide.dtype)
            # Normalised in the same way, so that equal logits diverge by exactly 0.
            log_p = clean - torch.logsumexp(clean, dim=-1, keepdim=True)
            columns.append(kl_divergence(log_p, wide - normaliser[:, None]))
        readings.append(torch.stack([column.double() for column in columns], dim=-1))
    return torch.cat(readings)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return sum p (log p - log q) over the last axis, nats, at least 0; what p rules out (log p of minus infinity) adds nothing."""
    difference = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
    return (log_p.exp() * difference).sum(dim=-1).clamp(min=0)
