"""NIWT (neuron importance weighted by task): what each layer of a teacher is worth, measured by skipping it.

`NIWTProfiler` measures batches on the model; `nexus.profiling.consolidation` turns measurements of any workers into the profile.
Layer ablation by block removal follows ShortGPT (https://arxiv.org/abs/2403.03853) and SLEB (https://arxiv.org/abs/2402.09025),
with their proxy scores replaced by the exact change of the answer's likelihood. Shape letters: B samples, T time, L blocks,
V = L+1 variants (the clean one first), N scored tokens, D width.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nexus.artifacts import NIWTProfile
from nexus.errors import ProfilingError
from nexus.profiling.activation import ActivationMoments, MeanUpdate
from nexus.profiling.batches import (
    BadSamplesError,
    EncoderProfileBatch,
    ProfileBatch,
    concatenate_rows,
    per_token,
    rows_of,
    split_at,
)
from nexus.profiling.consolidation import (
    BatchMeasurement,
    ConfirmationMeasurement,
    ConfirmationPlan,
    Effects,
    Metric,
    consolidate,
    fold_measurement,
    merge_measurements,
    plan_confirmation,
    write_tensors,
)
from nexus.profiling.cost import (
    CPU_TOKENS,
    MACHINES,
    DecodeStrategy,
    Machine,
    SweepStrategy,
    Work,
    cheapest,
    decode_seconds,
    sweep_seconds,
)
from nexus.profiling.decoding import NotStackableError, brute_generations, stacked_generations, stop_tokens
from nexus.profiling.inputs import ModelInputs, encoding_part, left_aligned, model_inputs
from nexus.profiling.interventions import mean_update, noise, reconstruction
from nexus.profiling.layers import BlockStack, Side, find_blocks, find_stacks, undisturbed
from nexus.profiling.perturbation import (
    Intervention,
    Observer,
    OutputReader,
    Reader,
    TokenReader,
    kl_divergence,
    language_model_head,
    scorable_targets,
    scored_tokens,
    skip_each,
    sweep,
)
from nexus.profiling.probe import ProbeStatistics
from nexus.profiling.sampling import Reservoir, SamplingPlan, budget_note, is_stable
from nexus.profiling.scales import plain_scales
from nexus.profiling.spectral import Comoment

__all__ = ["EncoderProfileBatch", "NIWTProfiler", "ProfileBatch", "SamplingPlan"]

logger = logging.getLogger(__name__)

Strategy = Literal["auto", "brute", "prefix", "triangular", "stacked"]
Part = TypeVar("Part")

# What the live rows of one micro-batch may take when its size is not given: hidden states, scored logits, cached keys and values.
# A block's own intermediates come on top (about six times its hidden states in a usual MLP).
_WORKSPACE_BYTES = {"cpu": 2**29, "accelerator": 2**34}

# Is shown the index of a block and the clean inputs and outputs [N, D] of its real tokens.
StatesObserver = Callable[[int, Tensor, Tensor], None]
# Makes the interventions on some rows, given their range in the batch and their mask [B, T], if any.
InterventionsOf = Callable[[slice, Tensor | None], Sequence[Intervention]]

CONFIRM_SAMPLES = 64
"""Samples of the second pass, unless told otherwise: their intervals are twice as wide as those of four times as many, and they all
stay in memory."""


class NIWTProfiler:
    """Profiles every layer of one model; leaves it (weights, hooks, training flags, random state) as it found it.

    Args:
        model: a transformers model; NF4 and other quantised weights are used as they are. The ids of an encoder-decoder are its
            decoder's; what its encoder reads is given as `inputs`.
        layers: the block list, its dotted path, or None to find it (`nexus.profiling.layers.find_blocks`). Where an encoder-decoder's
            are found, profiles tell of its encoder's blocks too, apart (`find_stacks`).
        strategy: "auto" (the cheapest by `nexus.profiling.cost`), or one that gives equal results at another cost. Scoring: "brute",
            "prefix" or "triangular"; generation: "brute" or "stacked". A strategy of the other kind stands for its nearest
            relative: "stacked" scores triangularly, "prefix" and "triangular" generate stacked.
        micro_batch_size: samples per forward; None chooses.

    Raises:
        ProfilingError: no block list is found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layers: str | Sequence[nn.Module] | None = None,
        strategy: Strategy = "auto",
        micro_batch_size: int | None = None,
    ) -> None:
        if strategy not in ("auto", "brute", "prefix", "triangular", "stacked"):
            raise ValueError(f"Expected strategy auto, brute, prefix, triangular or stacked, found '{strategy}'.")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"Expected micro_batch_size of at least 1 or None, found {micro_batch_size}.")
        self.model = model
        stacks = find_stacks(model) if layers is None else (find_blocks(model, layers),)
        self.stack = stacks[0]
        self._other_side = (
            NIWTProfiler(model, layers=stacks[1].path, strategy=strategy, micro_batch_size=micro_batch_size)
            if len(stacks) > 1
            else None
        )
        self.strategy = strategy
        self.micro_batch_size = micro_batch_size
        # Set when memory ran out.
        self._fitting_size: int | None = None
        # Unset when a model turned out not to take stacked rows.
        self._stacks = {"scoring": True, "decoding": True}

    @classmethod
    def of_both_sides(
        cls,
        model: PreTrainedModel,
        *,
        first: Side,
        strategy: Strategy = "auto",
        micro_batch_size: int | None = None,
    ) -> NIWTProfiler:
        """Return the profiler of an encoder-decoder whose profiles tell of both sides, of the side `first` in front.

        Raises:
            ProfilingError: the model has one side.
        """
        paths = {stack.side: stack.path for stack in find_stacks(model)}
        if len(paths) < 2:
            raise ProfilingError(
                f"Expected blocks in an encoder and in a decoder of {type(model).__name__}, found one side."
            )
        profilers = {
            side: cls(model, layers=path, strategy=strategy, micro_batch_size=micro_batch_size)
            for side, path in paths.items()
        }
        profiler = profilers.pop(first)
        profiler._other_side = profilers.popitem()[1]
        return profiler

    def ablated_generations(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        max_new_tokens: int,
        *,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return int64 [L+1, B, max_new_tokens]: greedy tokens of the clean model (row 0) and with layer i the identity (row i+1).

        Tokens are the argmax of the model's logits; a generation config's samplers and penalties do not apply. Positions after
        an end-of-sequence token hold the pad id.

        Args:
            input_ids_BT: prompts, padded on the left.
            attention_mask_BT: 1 or True at real tokens.
            inputs: of an encoder-decoder, what its encoder reads.

        Raises:
            ValueError: shapes differ, a prompt is padded on the right, or nothing is to be generated.
            BadSamplesError: prompts that leave no room for the new tokens in the model's context.
            ProfilingError: the model cannot generate or gives NaN, or no ablation changes its output.
        """
        _require_text(input_ids_BT, attention_mask_BT)
        if max_new_tokens < 1:
            raise ValueError(f"Expected max_new_tokens of at least 1, found {max_new_tokens}.")
        if not bool(attention_mask_BT[:, -1].all()):
            raise ValueError("Expected prompts padded on the left, found padding in the last column. Pad on the left.")
        if not self.model.can_generate():
            raise ProfilingError(
                f"Expected a model with a text decoder, found {type(self.model).__name__}, which cannot generate. Use profile() "
                "with EncoderProfileBatch."
            )
        if inputs and not self.model.config.is_encoder_decoder:
            raise ProfilingError(
                f"Expected text alone to generate from with {type(self.model).__name__}, found {', '.join(inputs)} beside it. Use "
                "delta_nll, which takes media."
            )
        self._require_fitting(attention_mask_BT, [f"row {row}" for row in range(len(input_ids_BT))], max_new_tokens)
        beside = _beside(inputs, len(input_ids_BT))
        stop = stop_tokens(self.model)
        batch_size, prompt_length = input_ids_BT.shape
        strategies: tuple[DecodeStrategy, ...] = ("stacked", "brute") if self.strategy == "auto" else ("stacked",)
        if self._sweep_strategies(is_text=True) == ("brute",) or not self._stacks["decoding"]:
            strategies = ("brute",)
        sizes = {
            strategy: self._text_batch_size(
                num_variants=1 if strategy == "brute" else len(self.stack) + 1,
                num_columns=prompt_length,
                num_logits=1,
                num_cached=prompt_length + max_new_tokens,
                num_heard=self._num_heard(beside),
            )
            for strategy in strategies
        }
        work = self._work(batch_size, prompt_length)
        chosen = cheapest(
            {name: decode_seconds(self._machine, work, name, max_new_tokens, size) for name, size in sizes.items()}
        )

        def run(_: slice, part: list[Tensor]) -> Tensor:
            ids_BT, mask_BT = _without_padding(part[:2])
            prompts = self._model_inputs(ids_BT, mask_BT, dict(zip(beside, part[2:], strict=True)))

            def brute() -> Tensor:
                return brute_generations(self.model, self.stack, prompts, max_new_tokens, stop)

            def stacked() -> Tensor:
                return stacked_generations(self.model, self.stack, prompts, max_new_tokens, stop)

            if chosen == "brute":
                return brute()
            return self._stacked_or("decoding", stacked, brute, "one decode per ablation")

        with undisturbed(self.model), plain_scales(self.model):
            parts = self._in_micro_batches(sizes[chosen], [input_ids_BT, attention_mask_BT, *beside.values()], run)
        return torch.cat(parts, dim=1).to(input_ids_BT.device)

    def delta_nll(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        loss_mask_BT: Tensor,
        *,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return float32 [L]: the rise of the negative log-likelihood when layer i is skipped, nats per scored token.

        Scored tokens of the whole batch are pooled. Raises as `delta_nll_per_sample`, but lets rows without scored tokens pass
        as long as one row has some.
        """
        targets_BT = self._targets(input_ids_BT, attention_mask_BT, loss_mask_BT)
        has_targets_B = targets_BT.any(dim=1)
        if not bool(has_targets_B.any()):
            raise ProfilingError("Expected loss_mask to mark target tokens, found none after position 0 of any row.")
        rows = has_targets_B.nonzero()[:, 0]
        beside = {name: tensor[rows] for name, tensor in _beside(inputs, len(input_ids_BT)).items()}
        names = [f"row {row}" for row in rows.tolist()]
        scores = self._score(names, input_ids_BT[rows], attention_mask_BT[rows], targets_BT[rows], beside)
        return (scores.delta_LB.sum(dim=1) / scores.counts_B.sum()).float().to(input_ids_BT.device)

    def delta_nll_per_sample(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        loss_mask_BT: Tensor,
        *,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return float32 [L, B]: as `delta_nll`, per sample (its own scored tokens pooled).

        Args:
            input_ids_BT: prompts with their answers, padded on either side.
            attention_mask_BT: 1 or True at real tokens.
            loss_mask_BT: True at the target tokens to score. The first real token of a row is never scored: it has no context.
            inputs: what the model is given beside its text, each with the batch in front.

        Raises:
            ValueError: shapes differ.
            BadSamplesError: rows without a scored token, longer than the model's context, or that give NaN where others do not.
            ProfilingError: the model has no language-model head or gives NaN, or no ablation changes its output.
        """
        targets_BT = self._targets(input_ids_BT, attention_mask_BT, loss_mask_BT)
        names = [f"row {row}" for row in range(len(input_ids_BT))]
        _require_scored(targets_BT, names)
        scores = self._score(names, input_ids_BT, attention_mask_BT, targets_BT, _beside(inputs, len(input_ids_BT)))
        return (scores.delta_LB / scores.counts_B).float().to(input_ids_BT.device)

    def measure(self, batch: ProfileBatch | EncoderProfileBatch) -> BatchMeasurement:
        """Return what one batch says about every layer, to be merged with others by `consolidate`.

        Raises:
            ProfilingError: as `delta_nll_per_sample`, naming samples.
        """
        sample_ids = tuple(str(sample_id) for sample_id in batch.sample_ids)
        if len(sample_ids) != batch.num_rows:
            raise ValueError(f"Expected one sample id per row, found {len(sample_ids)} ids for {batch.num_rows} rows.")
        if self._other_side is not None and self.stack.side == "decoder" and isinstance(batch, EncoderProfileBatch):
            return self._other_side.measure(batch)
        statistics = _LayerStatistics()
        scores = self._scores_of(batch, sample_ids, statistics=statistics)
        return BatchMeasurement(
            metric=scores.metric,
            strategy=scores.strategy,
            sample_ids=sample_ids,
            token_counts_B=scores.counts_B.numpy(),
            clean_nll_B=_numpy(scores.clean_nll_B),
            delta_LB=scores.delta_LB.numpy(),
            kl_LB=_numpy(scores.kl_LB),
            cosine_drop_LB=_numpy(scores.cosine_drop_LB),
            correct_VB=_numpy(scores.correct_VB),
            moments_L=tuple(statistics.moments),
            comoments_L=tuple(statistics.comoments),
            updates_L=tuple(statistics.updates),
            probe=_probe_statistics(batch, scores),
            side=self.stack.side,
            path=self.stack.path,
            other_side=None
            if self._other_side is None or isinstance(batch, EncoderProfileBatch)
            else self._other_side.measure(batch),
        )

    def confirm(self, batch: ProfileBatch | EncoderProfileBatch, plan: ConfirmationPlan) -> ConfirmationMeasurement:
        """Return what the second pass says about one batch, to be given to `consolidate`.

        Raises:
            ProfilingError: as `delta_nll_per_sample`, naming samples.
        """
        if self._other_side is not None and self.stack.side == "decoder" and isinstance(batch, EncoderProfileBatch):
            return self._other_side.confirm(batch, plan)
        sample_ids = tuple(str(sample_id) for sample_id in batch.sample_ids)
        num_layers = len(self.stack)
        # Only the probe needs to see the layers skipped once more.
        skips = [] if plan.probe is None else skip_each(self.stack)

        def interventions(rows: slice, mask_BT: Tensor | None) -> list[Intervention]:
            noises = (noise(layer, sample_ids[rows], mask_BT, seed=plan.seed) for layer in range(num_layers))
            return [
                *skips,
                *(Intervention(layer, mean_update(update_D)) for layer, update_D in enumerate(plan.mean_updates_LD)),
                *(Intervention(layer, replace) for layer, replace in enumerate(noises)),
                *(
                    Intervention(layer, reconstruction(subspace))
                    for layer, subspace in zip(plan.critical_layers, plan.subspaces, strict=True)
                ),
            ]

        scores = self._scores_of(batch, sample_ids, interventions=interventions)

        def effects(start: int, count: int) -> Effects:
            chosen = slice(len(skips) + start, len(skips) + start + count)
            return Effects(
                scores.delta_LB[chosen].numpy(), None if scores.kl_LB is None else scores.kl_LB[chosen].numpy()
            )

        probe_correct_VB = None
        if plan.probe is not None and isinstance(batch, EncoderProfileBatch):
            assert scores.embeddings_VBE is not None
            assert batch.labels_B is not None
            embeddings_VBE = scores.embeddings_VBE[: num_layers + 1].numpy()
            probe_correct_VB = plan.probe.correct(embeddings_VBE, batch.labels_B.cpu().numpy())
        return ConfirmationMeasurement(
            sample_ids=sample_ids,
            token_counts_B=scores.counts_B.numpy(),
            mean_ablation=effects(0, num_layers),
            noise_ablation=effects(num_layers, num_layers),
            reconstruction=effects(2 * num_layers, len(plan.critical_layers)),
            probe_correct_VB=probe_correct_VB,
            generated_correct_VB=None,
            other_side=None
            if self._other_side is None or plan.other_side is None
            else self._other_side.confirm(batch, plan.other_side),
        )

    def profile(
        self,
        batches: Iterable[ProfileBatch | EncoderProfileBatch],
        *,
        seed: int = 0,
        sampling: SamplingPlan | None = None,
        confirm_samples: int = CONFIRM_SAMPLES,
        tensors_path: Path | None = None,
    ) -> NIWTProfile:
        """Return the profile over all batches, streamed: memory does not grow with their number beyond a few floats per sample.

        Args:
            seed: of the bootstrap and of the noise.
            sampling: ends the stream early; None reads all of it. Batches are cut at the plan's counts, so that their sizes do not
                change where it ends.
            confirm_samples: rows kept for the second pass (mean and noise ablation, causal check, probe); 0 leaves it out.
            tensors_path: where to write the critical layers' statistics per dimension and principal components (`write_tensors`).

        Raises:
            ProfilingError: as `measure`; or there is no batch.
        """
        start = time.monotonic()
        merged: BatchMeasurement | None = None
        kept: Reservoir[ProfileBatch | EncoderProfileBatch] = Reservoir(confirm_samples)
        looks = () if sampling is None else sampling.look_counts
        num_samples, stopped_early, note = 0, False, None
        for batch in _cut_at(batches, looks):
            budget = None if sampling is None else sampling.budget_seconds
            if merged is not None and budget is not None and time.monotonic() - start >= budget:
                note = budget_note(num_samples, budget)
                break
            # Folded at once: one covariance per layer is kept, not one per batch.
            merged = fold_measurement(merged, self.measure(batch))
            num_samples += batch.num_rows
            if confirm_samples:
                rows = [rows_of(batch, slice(row, row + 1)) for row in range(batch.num_rows)]
                kept.offer([str(sample_id) for sample_id in batch.sample_ids], rows)
            if sampling is not None and num_samples in looks:
                stopped_early = num_samples < sampling.max_samples and is_stable(merged, seed=seed)
                if stopped_early or num_samples == sampling.max_samples:
                    break
        whole = merge_measurements([] if merged is None else [merged])
        plan = plan_confirmation(whole, seed=seed)
        confirmations = [self.confirm(batch, plan) for batch in concatenate_rows(list(kept.rows()))]
        if tensors_path is not None and plan.critical_layers:
            write_tensors(tensors_path, whole, plan)
        config = self.model.config
        return consolidate(
            [whole],
            teacher=self.model.name_or_path or type(self.model).__name__,
            revision=getattr(config, "_commit_hash", None) or "local",
            seconds=time.monotonic() - start,
            seed=seed,
            partial=note is not None,
            note=note,
            confirmations=confirmations,
            stopped_early=stopped_early,
            tensors=None if tensors_path is None else tensors_path.name,
        )

    def _scores_of(
        self,
        batch: ProfileBatch | EncoderProfileBatch,
        sample_ids: Sequence[str],
        *,
        statistics: _LayerStatistics | None = None,
        interventions: InterventionsOf | None = None,
    ) -> _Scores:
        if isinstance(batch, EncoderProfileBatch):
            return self._score_encoder(batch, sample_ids, statistics, interventions)
        targets_BT = self._targets(batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT)
        _require_scored(targets_BT, sample_ids)
        return self._score(
            sample_ids,
            batch.input_ids_BT,
            batch.attention_mask_BT,
            targets_BT,
            _beside(batch.inputs, batch.num_rows),
            statistics,
            interventions,
            with_kl=True,
        )

    def _targets(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
        _require_text(input_ids_BT, attention_mask_BT, loss_mask_BT)
        return scorable_targets(attention_mask_BT, loss_mask_BT)

    def _score(
        self,
        names_B: Sequence[str],
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        targets_BT: Tensor,
        beside: Mapping[str, Tensor],
        statistics: _LayerStatistics | None = None,
        interventions: InterventionsOf | None = None,
        *,
        with_kl: bool = False,
    ) -> _Scores:
        """Sweep all micro-batches; every row has targets. Without interventions each block is skipped."""
        # Refuses what has none before its vocabulary is asked for.
        language_model_head(self.model)
        self._require_fitting(attention_mask_BT, names_B)
        swept = skip_each(self.stack) if interventions is None else interventions(slice(0, 0), None)
        born_L = [sum(each.layer == layer for each in swept) for layer in range(len(self.stack))]
        num_scored = int(targets_BT.sum(dim=1).max())
        aligned = per_token(beside, input_ids_BT)
        sizes = {
            strategy: self._text_batch_size(
                num_variants=len(swept) + 1 if strategy == "triangular" else 1,
                num_columns=input_ids_BT.shape[1],
                num_logits=num_scored,
                num_cached=0,
                num_heard=self._num_heard(beside),
                num_kept=len(self.stack) if strategy == "prefix" else 0,
            )
            for strategy in self._sweep_strategies(is_text=True, has_media=bool(beside))
        }
        work = self._work(len(input_ids_BT), input_ids_BT.shape[1])
        chosen = cheapest(
            {name: sweep_seconds(self._machine, work, name, born_L, size) for name, size in sizes.items()}
        )

        def run(rows: slice, part: list[Tensor]) -> Tensor:
            own = dict(zip(beside, part[3:], strict=True))
            ids_BT, mask_BT, *rest = _without_padding([*part[:3], *(own[name] for name in aligned)])
            # Causal models never see what follows, but not all of them can be told to leave out what came before.
            ids_BT, mask_BT, chosen_BT, *rest = left_aligned(mask_BT, [ids_BT, mask_BT, *rest])
            own |= dict(zip(aligned, rest, strict=True))
            scored = scored_tokens(ids_BT, chosen_BT)
            inputs = self._model_inputs(ids_BT, mask_BT, own)
            # Of what the blocks see: an encoder's own mask where it has one.
            seen_BT = own.get("attention_mask") if self._ablates_encoder else mask_BT

            def swept(strategy: SweepStrategy) -> Tensor:
                read = TokenReader(self.model, self.stack, inputs, scored, with_kl=with_kl)
                made = None if interventions is None else interventions(rows, seen_BT)
                # Its likelihood and divergence; the logit of a token that a model rules out is infinite.
                finite_C = (0, 3) if with_kl else (0,)
                return self._swept(read, strategy, made, statistics, seen_BT, scored.rows_N, names_B[rows], finite_C)

            readings_VNC = (
                self._stacked_or("scoring", lambda: swept("triangular"), lambda: swept("prefix"), "strategy prefix")
                if chosen == "triangular"
                else swept(chosen)
            )
            # Without the logits, which only show whether anything changed.
            summed_VNC = torch.cat([readings_VNC[..., :2], readings_VNC[..., 3:]], dim=-1).cpu()
            return _sums_per_sample(summed_VNC, scored.rows_N.cpu(), len(ids_BT))

        with undisturbed(self.model):
            parts = self._in_micro_batches(
                sizes[chosen], [input_ids_BT, attention_mask_BT, targets_BT, *beside.values()], run, statistics
            )
        nll_VB, hits_VB, *kl = torch.cat(parts, dim=1).unbind(dim=-1)
        counts_B = targets_BT.sum(dim=1).cpu()
        return _Scores(
            metric="delta_nll",
            # As it went, where stacking was tried in vain.
            strategy="prefix" if chosen == "triangular" and not self._stacks["scoring"] else chosen,
            counts_B=counts_B,
            delta_LB=nll_VB[1:] - nll_VB[:1],
            clean_nll_B=nll_VB[0],
            correct_VB=hits_VB == counts_B,
            kl_LB=kl[0][1:] if kl else None,
        )

    def _score_encoder(
        self,
        batch: EncoderProfileBatch,
        names_B: Sequence[str],
        statistics: _LayerStatistics | None,
        interventions: InterventionsOf | None,
    ) -> _Scores:
        """Sweep all micro-batches of an encoder's inputs. Without interventions each block is skipped."""
        (strategy,) = self._sweep_strategies(is_text=False)
        model = encoding_part(self.model)
        size = self.micro_batch_size or batch.num_rows

        def run(rows: slice, part: list[Tensor]) -> tuple[Tensor, int]:
            inputs = dict(zip(batch.inputs, part, strict=True))
            read = OutputReader(model, inputs)
            mask_BT = inputs.get("attention_mask")
            made = None if interventions is None else interventions(rows, mask_BT)
            row_B = torch.arange(rows.stop - rows.start)
            readings_VBC = self._swept(read, strategy, made, statistics, mask_BT, row_B, names_B[rows])
            return readings_VBC.cpu(), read.num_classes

        with undisturbed(self.model):
            parts = self._in_micro_batches(size, list(batch.inputs.values()), run, statistics)
        readings_VBC, num_classes = torch.cat([readings for readings, _ in parts], dim=1), parts[0][1]
        embeddings_VBE = readings_VBC[..., num_classes:] if readings_VBC.shape[-1] > num_classes else None
        if num_classes:
            return _label_scores(strategy, readings_VBC[..., :num_classes], batch.labels_B, embeddings_VBE)
        return _embedding_scores(strategy, readings_VBC)

    def _swept(
        self,
        read: Reader,
        strategy: SweepStrategy,
        interventions: Sequence[Intervention] | None,
        statistics: _LayerStatistics | None,
        mask_BT: Tensor | None,
        rows_N: Tensor,
        names_B: Sequence[str],
        finite_C: Sequence[int] = (),
    ) -> Tensor:
        """Return the readings [V, N, C] of one micro-batch, all of them numbers; without interventions each block is skipped.

        Args:
            rows_N: which row each reading is of.
            finite_C: columns that may not be infinite either, as a likelihood is of a token that the model rules out.

        Raises:
            BadSamplesError: some rows, or the only one, give NaN, or infinity where it may not be.
            ProfilingError: all rows do, or no ablation changes anything.
        """
        observe = None if statistics is None or interventions is not None else statistics.observe
        chosen = skip_each(self.stack) if interventions is None else interventions
        readings_VNC = sweep(self.stack, read, strategy, chosen, _of_real_tokens(mask_BT, observe))
        is_nan_N = readings_VNC.isnan().any(dim=0).any(dim=-1)
        is_bad_N = is_nan_N | readings_VNC[..., list(finite_C)].isinf().any(dim=0).any(dim=-1)
        nan = set(rows_N.cpu()[is_nan_N.cpu()].tolist())
        bad = sorted(set(rows_N.cpu()[is_bad_N.cpu()].tolist()))
        if len(nan) == len(names_B) > 1:
            raise self.stack.not_a_number()
        if bad:
            raise BadSamplesError(
                f"Expected outputs of the model and of its ablations at '{self.stack.path}' to be numbers; leave the rows out, or "
                "load the model in a wider compute dtype (float32).",
                {names_B[row]: "NaN" if row in nan else "infinite nats" for row in bad},
            )
        if interventions is None:
            self.stack.require_effect(readings_VNC)
        return readings_VNC

    def _require_fitting(self, attention_mask_BT: Tensor, names_B: Sequence[str], num_new: int = 0) -> None:
        """Raise BadSamplesError for rows that are longer than the model's context, with so many tokens still to come."""
        config = self.model.config
        limit = getattr(config, "max_target_positions", None) if config.is_encoder_decoder else None
        limit = limit or getattr(config.get_text_config(), "max_position_embeddings", None)
        lengths = attention_mask_BT.bool().sum(dim=1).tolist()
        long = {
            name: f"{length} tokens"
            for name, length in zip(names_B, lengths, strict=True)
            if limit is not None and length + num_new > limit
        }
        if long:
            raise BadSamplesError(
                f"Expected rows that fit the context of {type(self.model).__name__}, {limit} tokens"
                + (f" with the {num_new} to be generated" if num_new else "")
                + "; shorten or drop them.",
                long,
            )

    @property
    def _ablates_encoder(self) -> bool:
        """Whether a decoder follows the blocks."""
        return self.stack.side == "encoder" and self.model.config.is_encoder_decoder

    def _model_inputs(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, beside: Mapping[str, Tensor]
    ) -> ModelInputs:
        return model_inputs(self.model, input_ids_BT, attention_mask_BT, beside, ablates_encoder=self._ablates_encoder)

    def _num_heard(self, beside: Mapping[str, Tensor]) -> int:
        """Return the positions of an encoder-decoder's encoder, or more; 0 for other models."""
        if not beside or not self.model.config.is_encoder_decoder:
            return 0
        longest = max(max(tensor.shape[1:], default=0) for tensor in beside.values())
        return min(longest, getattr(self.model.config, "max_source_positions", longest))

    def _stacked_or(
        self, what: Literal["scoring", "decoding"], stacked: Callable[[], Part], apart: Callable[[], Part], other: str
    ) -> Part:
        """Return what `stacked` gives; of a model that does not take stacked rows, under "auto", what `apart` gives. A model that is
        broken fails again there.

        Raises:
            _StartOver: this is the first that is known of it.
        """
        if self._stacks[what]:
            try:
                return stacked()
            except (RuntimeError, IndexError, ValueError) as error:
                is_ours = isinstance(error, ProfilingError) and not isinstance(error, NotStackableError)
                if self.strategy != "auto" or is_ours or _is_out_of_memory(error):
                    raise
                failure = f"{type(error).__name__} {error}".splitlines()[0]
            self._stacks[what] = False
            logger.warning(
                "Ablations of %s cannot be stacked (%s); going on with %s.", type(self.model).__name__, failure, other
            )
            raise _StartOver
        return apart()

    def _sweep_strategies(self, *, is_text: bool, has_media: bool = False) -> tuple[SweepStrategy, ...]:
        """Return how scoring may sweep, given what was asked for and what the model allows."""
        config = self.model.config.get_text_config()
        if self.strategy == "brute" or getattr(config, "num_kv_shared_layers", None):
            # Blocks that reuse another block's keys and values need all blocks to run, on the same rows.
            return ("brute",)
        has_unstacked_media = has_media and not self.model.config.is_encoder_decoder
        if not is_text or self.strategy == "prefix" or has_unstacked_media or not self._stacks["scoring"]:
            # What follows an encoder's blocks, or puts media between a decoder's, may know the batch size: ablations are not
            # stacked there.
            return ("prefix",)
        if self.strategy != "auto" or self.model.config.is_encoder_decoder:
            # Prefix has no advantage where the encoder, and cross-attention's keys and values, are computed once for all.
            return ("triangular",)
        return ("triangular", "prefix")

    @property
    def _machine(self) -> Machine:
        return MACHINES["cpu" if self.model.device.type == "cpu" else "accelerator"]

    def _work(self, num_rows: int, num_columns: int) -> Work:
        block = self.stack.blocks[0]
        stored = [*block.parameters(), *block.buffers()]
        # 4-bit weights lie in pairs in bytes.
        is_packed = [tensor.dtype == torch.uint8 for tensor in stored]
        return Work(
            num_layers=len(self.stack),
            layer_parameters=sum(
                tensor.numel() * (2 if packed else 1) for tensor, packed in zip(stored, is_packed, strict=True)
            ),
            is_quantised=any(is_packed),
            num_rows=num_rows,
            num_columns=num_columns,
        )

    def _text_batch_size(
        self,
        *,
        num_variants: int,
        num_columns: int,
        num_logits: int,
        num_cached: int,
        num_heard: int,
        num_kept: int = 0,
    ) -> int:
        """Return how many samples of text to run at once, so that their live rows (`num_variants` each, and the states of
        `num_kept` more) fit the workspace."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        config = self.model.config.get_text_config()
        # Keys and values of cross-attention are kept once per sample, and copied for the rows of one block at a time; where the
        # encoder is ablated each row has its own.
        states = num_columns * (1 + num_kept) + 3 * num_heard
        if num_heard:
            num_columns = num_columns if self.stack.side == "decoder" else num_heard
            num_shares = num_variants if self.stack.side == "decoder" or num_cached == 0 else 1
            states += 2 * len(self.stack) * num_heard // num_shares
        cached = 2 * len(self.stack) * num_cached * _cached_width(self.stack, config.hidden_size)
        values = states * config.hidden_size + cached + num_logits * config.vocab_size
        device = "cpu" if self.model.device.type == "cpu" else "accelerator"
        size = _WORKSPACE_BYTES[device] // int(num_variants * values * self.model.dtype.itemsize)
        if device == "cpu" and num_cached == 0:
            size = min(size, CPU_TOKENS // (num_variants * (1 + num_kept) * num_columns))
        return max(1, size)

    def _in_micro_batches(
        self,
        size: int,
        tensors: Sequence[Tensor],
        run: Callable[[slice, list[Tensor]], Part],
        statistics: _LayerStatistics | None = None,
    ) -> list[Part]:
        """Return what `run` gives for `size` rows at a time of tensors that share their first axis.

        `run` is given the range of the rows and the rows themselves, on the model's device.

        Running out of memory halves the size, for this and for all later calls, and begins again with the first row, as `_StartOver`
        does: what a failed run added to `statistics` cannot be taken out.

        Raises:
            ProfilingError: a single sample is too much.
        """
        results: list[Part] = []
        start = 0
        # Evenly: a last micro-batch of one row costs as many calls as a full one.
        size = math.ceil(len(tensors[0]) / math.ceil(len(tensors[0]) / size))
        while start < len(tensors[0]):
            size = min(size, self._fitting_size or size)
            # What stands beside a single row is all its own: some models have the patches of its pictures in front.
            is_alone = len(tensors[0]) == 1
            part = [(t if is_alone else t[start : start + size]).to(self.model.device) for t in tensors]
            num_rows = len(part[0])
            failure: str | None = None
            try:
                results.append(run(slice(start, start + num_rows), part))
                start += num_rows
                continue
            except _StartOver:
                pass
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                # Only the text is kept: the error's traceback would keep the tensors.
                failure = f"{type(error).__name__} {error}".splitlines()[0]
            start = 0
            results.clear()
            if statistics is not None:
                statistics.forget()
            if failure is not None:
                del part
                if num_rows == 1:
                    raise ProfilingError(
                        f"Expected memory for one sample and its {len(self.stack)} ablations, found none left ({failure}). Use "
                        "strategy='prefix', shorter rows, or a device with more memory."
                    )
                self._fitting_size = num_rows // 2
                logger.warning(
                    "Out of memory with %d samples at once; going on with %d at once.", num_rows, self._fitting_size
                )
                if torch.cuda.is_available():  # pragma: no cover - needs a GPU: only there freed memory stays reserved
                    torch.cuda.empty_cache()
        return results


@dataclass(frozen=True, eq=False)
class _Scores:
    """Sums per sample over its scored tokens; fields as in BatchMeasurement, on the CPU."""

    metric: Metric
    strategy: SweepStrategy
    counts_B: Tensor
    delta_LB: Tensor
    clean_nll_B: Tensor | None = None
    correct_VB: Tensor | None = None
    kl_LB: Tensor | None = None
    cosine_drop_LB: Tensor | None = None
    embeddings_VBE: Tensor | None = None
    """An encoder's pooled embeddings."""


class _StartOver(Exception):  # noqa: N818 - says what to do, not what went wrong
    """The rows of a call have to be run again from the first one."""


def _beside(inputs: Mapping[str, Tensor] | None, num_rows: int) -> dict[str, Tensor]:
    """Return what a model is given beside text.

    Raises:
        ValueError: the batch is not in front, and there is more than one row to belong to.
    """
    wrong = {name: tuple(tensor.shape) for name, tensor in (inputs or {}).items() if tensor.shape[:1] != (num_rows,)}
    if wrong and num_rows > 1:
        raise ValueError(f"Expected inputs with the batch of {num_rows} rows in front, found shapes {wrong}.")
    return dict(inputs or {})


def _cached_width(stack: BlockStack, hidden_size: int) -> int:
    """Return how many numbers a token's keys take in one block, and its values again: what the key projection gives where there is
    one, else at most the width of the hidden states."""
    modules = (named for block in stack.blocks for named in block.named_modules())
    widths = [int(module.out_features) for name, module in modules if name.endswith("k_proj")]
    return max(widths, default=hidden_size)


def _numpy(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()


def _cut_at(
    batches: Iterable[ProfileBatch | EncoderProfileBatch], counts: Sequence[int]
) -> Iterator[ProfileBatch | EncoderProfileBatch]:
    """Yield the rows of the batches so that one ends at each of the cumulative `counts`, in ascending order."""
    num_rows = 0
    waiting = list(counts)
    for batch in batches:
        rest: ProfileBatch | EncoderProfileBatch = batch
        while waiting and num_rows + rest.num_rows > waiting[0]:
            first, rest = split_at(rest, waiting[0] - num_rows)
            num_rows = waiting.pop(0)
            yield first
        num_rows += rest.num_rows
        if waiting and num_rows == waiting[0]:
            waiting.pop(0)
        yield rest


def _probe_statistics(batch: ProfileBatch | EncoderProfileBatch, scores: _Scores) -> ProbeStatistics | None:
    if isinstance(batch, ProfileBatch) or batch.labels_B is None or scores.embeddings_VBE is None:
        return None
    return ProbeStatistics.of(scores.embeddings_VBE[0].numpy(), batch.labels_B.cpu().numpy())


def _without_padding(tensors_BT: Sequence[Tensor]) -> list[Tensor]:
    """Return (ids, attention mask, ...) without the columns that are padding in all rows; ids and mask as int64."""
    ids_BT, mask_BT, *others = tensors_BT
    columns = mask_BT.any(dim=0).nonzero()
    used = slice(int(columns[0]), int(columns[-1]) + 1)
    return [tensor[:, used] for tensor in (ids_BT.long(), mask_BT.long(), *others)]


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed; torch's CPU allocator has no type of its own for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


class _LayerStatistics:
    """Accumulates the activation statistics of every layer over micro-batches, each state where it arises: one covariance per layer
    is kept, and a second one only of the layer that is being looked at."""

    def __init__(self) -> None:
        self.moments: list[ActivationMoments] = []
        self.comoments: list[Comoment] = []
        self.updates: list[MeanUpdate] = []

    def observe(self, index: int, inputs_ND: Tensor, outputs_ND: Tensor) -> None:
        moments, comoment = ActivationMoments.of(outputs_ND), Comoment.of(outputs_ND)
        update = MeanUpdate.of(outputs_ND - inputs_ND)
        if index == len(self.moments):
            self.moments.append(moments)
            self.comoments.append(comoment)
            self.updates.append(update)
        else:
            self.moments[index] = self.moments[index].merge(moments)
            self.comoments[index] = self.comoments[index].absorb(comoment)
            self.updates[index] = self.updates[index].merge(update)

    def forget(self) -> None:
        """Begin again."""
        self.moments.clear()
        self.comoments.clear()
        self.updates.clear()


def _sums_per_sample(readings_VNC: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Return [V, B, C]. On the CPU, because index_add of float64 has no fixed order on a GPU."""
    shape = (len(readings_VNC), num_rows, readings_VNC.shape[-1])
    return readings_VNC.new_zeros(shape).index_add(1, rows_N, readings_VNC)


def _label_scores(
    strategy: SweepStrategy, log_probs_VBC: Tensor, labels_B: Tensor | None, embeddings_VBE: Tensor | None
) -> _Scores:
    chosen_B = log_probs_VBC[0].argmax(dim=-1) if labels_B is None else labels_B.cpu()
    nll_VB = -log_probs_VBC.gather(-1, chosen_B.expand(len(log_probs_VBC), -1)[..., None])[..., 0]
    correct_VB = None if labels_B is None else log_probs_VBC.argmax(dim=-1) == chosen_B
    return _Scores(
        metric="label_nll",
        strategy=strategy,
        counts_B=torch.ones_like(chosen_B),
        delta_LB=nll_VB[1:] - nll_VB[:1],
        clean_nll_B=nll_VB[0],
        correct_VB=correct_VB,
        kl_LB=kl_divergence(log_probs_VBC[:1], log_probs_VBC[1:]),
        cosine_drop_LB=None if embeddings_VBE is None else _cosine_drops(embeddings_VBE),
        embeddings_VBE=embeddings_VBE,
    )


def _embedding_scores(strategy: SweepStrategy, embeddings_VBE: Tensor) -> _Scores:
    drop_LB = _cosine_drops(embeddings_VBE)
    counts_B = torch.ones(drop_LB.shape[1], dtype=torch.int64)
    return _Scores("cosine_drop", strategy, counts_B, drop_LB, cosine_drop_LB=drop_LB, embeddings_VBE=embeddings_VBE)


def _cosine_drops(embeddings_VBE: Tensor) -> Tensor:
    clean, ablated = embeddings_VBE[:1], embeddings_VBE[1:]
    # The cosine of a vector with itself is 1 only to rounding.
    is_same_LB = (ablated == clean).all(dim=-1)
    return (1 - F.cosine_similarity(ablated, clean, dim=-1)).masked_fill(is_same_LB, 0.0)


def _of_real_tokens(mask_BT: Tensor | None, observe: StatesObserver | None) -> Observer | None:
    """Return an observer that hands on the states [N, D] of unmasked positions."""
    if observe is None:
        return None

    def select(index: int, input_BTD: Tensor, output_BTD: Tensor) -> None:
        # Convolutional front ends shorten time: their mask is not the blocks'.
        if mask_BT is not None and mask_BT.shape == output_BTD.shape[:2]:
            # Some models carry several streams of width D for each token.
            observe(index, *(states[mask_BT.bool()].flatten(0, -2) for states in (input_BTD, output_BTD)))
        else:
            observe(index, input_BTD.flatten(0, -2), output_BTD.flatten(0, -2))

    return select


def _require_text(input_ids_BT: Tensor, *masks_BT: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (input_ids_BT, *masks_BT)]
    if input_ids_BT.ndim != 2 or len(set(shapes)) > 1 or 0 in input_ids_BT.shape:
        raise ValueError(f"Expected ids and masks of one shape [batch, time], neither 0, found {shapes}.")


def _require_scored(targets_BT: Tensor, names_B: Sequence[str]) -> None:
    missing = [
        str(name) for name, is_scored in zip(names_B, targets_BT.any(dim=1).tolist(), strict=True) if not is_scored
    ]
    if missing:
        raise BadSamplesError(
            "Expected every sample to have a scored token after its first; give them an answer or leave them out.",
            dict.fromkeys(missing, "no scored token"),
        )
