"""NIWT (neuron importance weighted by task): what each layer of a teacher is worth, measured by skipping it.

`NIWTProfiler` measures batches on the model; `nexus.profiling.consolidation` turns measurements of any workers into the profile.
Layer ablation by block removal follows ShortGPT (https://arxiv.org/abs/2403.03853) and SLEB (https://arxiv.org/abs/2402.09025),
with their proxy scores replaced by the exact change of the answer's likelihood. Shape letters: B samples, T time, L blocks,
V = L+1 variants (the clean one first), N scored tokens, D width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nexus.artifacts import NIWTProfile
from nexus.errors import ProfilingError
from nexus.profiling.activation import ActivationMoments
from nexus.profiling.consolidation import BatchMeasurement, Metric, consolidate, merge_measurements
from nexus.profiling.decoding import brute_generations, stacked_generations, stop_tokens, text_inputs
from nexus.profiling.layers import find_blocks, undisturbed
from nexus.profiling.perturbation import (
    Observer,
    OutputReader,
    SweepStrategy,
    scorable_targets,
    scored_tokens,
    sweep_skips,
    token_reader,
)
from nexus.profiling.spectral import Comoment

logger = logging.getLogger(__name__)

Strategy = Literal["auto", "brute", "prefix", "triangular", "stacked"]
Part = TypeVar("Part")

# What the live rows of one micro-batch may take when its size is not given: hidden states, scored logits, cached keys and values.
# A block's own intermediates come on top (about six times its hidden states in a usual MLP).
_WORKSPACE_BYTES = {"cpu": 2**29, "accelerator": 2**34}

# Tokens of all live rows together that keep a CPU busy in one forward of a block; more of them only take memory and fall out of its
# caches.
_CPU_TOKENS = 4096

# Is shown the index of a block and the clean outputs [N, D] of its real tokens.
StatesObserver = Callable[[int, Tensor], None]


@dataclass(frozen=True, eq=False)
class ProfileBatch:
    """Tokenised samples: prompt and answer, padded on either side."""

    sample_ids: Sequence[str]
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_mask_BT: Tensor
    """True at the *target tokens* to score (the answer); position 0 is never scored."""

    @property
    def num_rows(self) -> int:
        """Number of samples."""
        return len(self.input_ids_BT)


@dataclass(frozen=True, eq=False)
class EncoderProfileBatch:
    """Inputs of an image, audio or text encoder."""

    sample_ids: Sequence[str]
    inputs: Mapping[str, Tensor]
    """The model's keyword arguments, each with the batch in front."""
    labels_B: Tensor | None
    """int64 true classes. Without them a classifier is measured on its own decisions, and has no accuracy."""

    @property
    def num_rows(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values())))


class NIWTProfiler:
    """Profiles every layer of one model; leaves it (weights, hooks, training flags, random state) as it found it.

    Args:
        model: a transformers model; NF4 and other quantised weights are used as they are.
        layers: the block list, its dotted path, or None to find it (`nexus.profiling.layers.find_blocks`).
        strategy: "auto", or one that gives equal results at another cost. Scoring: "brute", "prefix" or "triangular";
            generation: "brute" or "stacked". A strategy of the other kind stands for its nearest relative: "stacked" scores
            triangularly, "prefix" and "triangular" generate stacked.
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
        self.stack = find_blocks(model, layers)
        self.strategy = strategy
        self.micro_batch_size = micro_batch_size
        # Set when memory ran out.
        self._fitting_size: int | None = None

    def ablated_generations(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, max_new_tokens: int) -> Tensor:
        """Return int64 [L+1, B, max_new_tokens]: greedy tokens of the clean model (row 0) and with layer i the identity (row i+1).

        Tokens are the argmax of the model's logits; a generation config's samplers and penalties do not apply. Positions after
        an end-of-sequence token hold the pad id.

        Args:
            input_ids_BT: prompts, padded on the left.
            attention_mask_BT: 1 or True at real tokens.

        Raises:
            ValueError: shapes differ, a prompt is padded on the right, or nothing is to be generated.
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
        generate = brute_generations if self._sweep_strategy(is_text=True) == "brute" else stacked_generations
        stop = stop_tokens(self.model)
        prompt_length = input_ids_BT.shape[1]
        size = self._text_batch_size(
            num_variants=1 if generate is brute_generations else len(self.stack) + 1,
            num_columns=prompt_length,
            num_logits=1,
            num_cached=prompt_length + max_new_tokens,
        )

        def run(part: list[Tensor]) -> Tensor:
            ids_BT, mask_BT = _without_padding(part)
            return generate(self.model, self.stack, ids_BT, mask_BT, max_new_tokens, stop)

        with undisturbed(self.model):
            parts = self._in_micro_batches(size, [input_ids_BT, attention_mask_BT], run)
        return torch.cat(parts, dim=1).to(input_ids_BT.device)

    def delta_nll(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
        """Return float32 [L]: the rise of the negative log-likelihood when layer i is skipped, nats per scored token.

        Scored tokens of the whole batch are pooled. Raises as `delta_nll_per_sample`, but lets rows without scored tokens pass
        as long as one row has some.
        """
        targets_BT = self._targets(input_ids_BT, attention_mask_BT, loss_mask_BT)
        has_targets_B = targets_BT.any(dim=1)
        if not bool(has_targets_B.any()):
            raise ProfilingError("Expected loss_mask to mark target tokens, found none after position 0 of any row.")
        rows = has_targets_B.nonzero()[:, 0]
        scores = self._score(input_ids_BT[rows], attention_mask_BT[rows], targets_BT[rows])
        return (scores.delta_LB.sum(dim=1) / scores.counts_B.sum()).float().to(input_ids_BT.device)

    def delta_nll_per_sample(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
        """Return float32 [L, B]: as `delta_nll`, per sample (its own scored tokens pooled).

        Args:
            input_ids_BT: prompts with their answers, padded on either side.
            attention_mask_BT: 1 or True at real tokens.
            loss_mask_BT: True at the target tokens to score. The first real token of a row is never scored: it has no context.

        Raises:
            ValueError: shapes differ.
            ProfilingError: a row has no scored token, the model has no language-model head or gives NaN, or no ablation changes
                its output.
        """
        targets_BT = self._targets(input_ids_BT, attention_mask_BT, loss_mask_BT)
        _require_scored(targets_BT, [f"row {row}" for row in range(len(input_ids_BT))])
        scores = self._score(input_ids_BT, attention_mask_BT, targets_BT)
        return (scores.delta_LB / scores.counts_B).float().to(input_ids_BT.device)

    def measure(self, batch: ProfileBatch | EncoderProfileBatch) -> BatchMeasurement:
        """Return what one batch says about every layer, to be merged with others by `consolidate`.

        Raises:
            ProfilingError: as `delta_nll_per_sample`, naming samples.
        """
        sample_ids = tuple(str(sample_id) for sample_id in batch.sample_ids)
        if len(sample_ids) != batch.num_rows:
            raise ValueError(f"Expected one sample id per row, found {len(sample_ids)} ids for {batch.num_rows} rows.")
        statistics = _LayerStatistics()
        if isinstance(batch, ProfileBatch):
            targets_BT = self._targets(batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT)
            _require_scored(targets_BT, sample_ids)
            scores = self._score(batch.input_ids_BT, batch.attention_mask_BT, targets_BT, statistics)
        else:
            scores = self._score_encoder(batch, statistics)
        return BatchMeasurement(
            metric=scores.metric,
            strategy=self._sweep_strategy(is_text=isinstance(batch, ProfileBatch)),
            sample_ids=sample_ids,
            token_counts_B=scores.counts_B.numpy(),
            clean_nll_B=None if scores.clean_nll_B is None else scores.clean_nll_B.numpy(),
            delta_LB=scores.delta_LB.numpy(),
            correct_VB=None if scores.correct_VB is None else scores.correct_VB.numpy(),
            moments_L=tuple(statistics.moments),
            comoments_L=tuple(statistics.comoments),
        )

    def profile(self, batches: Iterable[ProfileBatch | EncoderProfileBatch], *, seed: int = 0) -> NIWTProfile:
        """Return the profile over all batches, streamed: memory does not grow with their number beyond a few floats per sample.

        Raises:
            ProfilingError: as `measure`; or there is no batch.
        """
        start = time.monotonic()
        merged: list[BatchMeasurement] = []
        for batch in batches:
            # Folded at once: one covariance per layer is kept, not one per batch.
            merged = [merge_measurements([*merged, self.measure(batch)])]
        config = self.model.config
        return consolidate(
            merged,
            teacher=self.model.name_or_path or type(self.model).__name__,
            revision=getattr(config, "_commit_hash", None) or "local",
            seconds=time.monotonic() - start,
            seed=seed,
        )

    def _targets(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
        _require_text(input_ids_BT, attention_mask_BT, loss_mask_BT)
        return scorable_targets(attention_mask_BT, loss_mask_BT)

    def _score(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        targets_BT: Tensor,
        statistics: _LayerStatistics | None = None,
    ) -> _Scores:
        """Sweep all micro-batches; every row has targets."""
        strategy = self._sweep_strategy(is_text=True)
        size = self._text_batch_size(
            num_variants=len(self.stack) + 1 if strategy == "triangular" else 1,
            num_columns=input_ids_BT.shape[1],
            num_logits=int(targets_BT.sum(dim=1).max()),
            num_cached=0,
        )

        def run(part: list[Tensor]) -> Tensor:
            ids_BT, mask_BT, chosen_BT = _without_padding(part)
            scored = scored_tokens(ids_BT, chosen_BT)
            read = token_reader(self.model, self.stack, text_inputs(self.model, ids_BT, mask_BT), scored)
            with _observed(statistics) as observe:
                readings_VN3 = sweep_skips(self.stack, read, strategy, _of_real_tokens(mask_BT, observe))
            return _sums_per_sample(readings_VN3[..., :2].cpu(), scored.rows_N.cpu(), len(ids_BT))

        with undisturbed(self.model):
            parts = self._in_micro_batches(size, [input_ids_BT, attention_mask_BT, targets_BT], run)
        nll_VB, hits_VB = torch.cat(parts, dim=1).unbind(dim=-1)
        counts_B = targets_BT.sum(dim=1).cpu()
        return _Scores("delta_nll", counts_B, nll_VB[1:] - nll_VB[:1], nll_VB[0], hits_VB == counts_B)

    def _score_encoder(self, batch: EncoderProfileBatch, statistics: _LayerStatistics) -> _Scores:
        """Sweep all micro-batches of an encoder's inputs."""
        strategy = self._sweep_strategy(is_text=False)
        size = self.micro_batch_size or batch.num_rows

        def run(part: list[Tensor]) -> tuple[Tensor, bool]:
            inputs = dict(zip(batch.inputs, part, strict=True))
            read = OutputReader(self.model, inputs)
            with _observed(statistics) as observe:
                readings = sweep_skips(
                    self.stack, read, strategy, _of_real_tokens(inputs.get("attention_mask"), observe)
                )
            return readings.cpu(), read.classifies

        with undisturbed(self.model):
            parts = self._in_micro_batches(size, list(batch.inputs.values()), run)
        readings_VBC, classifies = torch.cat([readings for readings, _ in parts], dim=1), parts[0][1]
        return _label_scores(readings_VBC, batch.labels_B) if classifies else _embedding_scores(readings_VBC)

    def _sweep_strategy(self, *, is_text: bool) -> SweepStrategy:
        """Return how scoring sweeps, given what was asked for and what the model allows."""
        config = self.model.config.get_text_config()
        if self.strategy == "brute" or getattr(config, "num_kv_shared_layers", None):
            # Blocks that reuse another block's keys and values need all blocks to run, on the same rows.
            return "brute"
        if not is_text or self.strategy == "prefix":
            # What follows an encoder's blocks may know the batch size, so ablations are not stacked there.
            return "prefix"
        return "triangular"

    def _text_batch_size(self, *, num_variants: int, num_columns: int, num_logits: int, num_cached: int) -> int:
        """Return how many samples of text to run at once, so that their live rows (`num_variants` each) fit the workspace."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        config = self.model.config.get_text_config()
        # Keys and values are at most as wide as the hidden states.
        states = num_columns + 2 * len(self.stack) * num_cached
        values = states * config.hidden_size + num_logits * config.vocab_size
        device = "cpu" if self.model.device.type == "cpu" else "accelerator"
        size = _WORKSPACE_BYTES[device] // int(num_variants * values * self.model.dtype.itemsize)
        if device == "cpu" and num_cached == 0:
            size = min(size, _CPU_TOKENS // (num_variants * num_columns))
        return max(1, size)

    def _in_micro_batches(
        self, size: int, tensors: Sequence[Tensor], run: Callable[[list[Tensor]], Part]
    ) -> list[Part]:
        """Return what `run` gives for `size` rows at a time of tensors that share their first axis, on the model's device.

        Running out of memory halves the size, for this and for all later calls, and runs the same rows again.

        Raises:
            ProfilingError: a single sample is too much.
        """
        results: list[Part] = []
        start = 0
        while start < len(tensors[0]):
            size = min(size, self._fitting_size or size)
            part = [tensor[start : start + size].to(self.model.device) for tensor in tensors]
            num_rows = len(part[0])
            failure: str | None = None
            try:
                results.append(run(part))
                start += num_rows
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                # Only the text is kept: the error's traceback would keep the tensors.
                failure = f"{type(error).__name__} {error}".splitlines()[0]
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
    counts_B: Tensor
    delta_LB: Tensor
    clean_nll_B: Tensor | None
    correct_VB: Tensor | None


def _without_padding(tensors_BT: Sequence[Tensor]) -> list[Tensor]:
    """Return (ids, attention mask, ...) without the columns that are padding in all rows; ids and mask as int64."""
    ids_BT, mask_BT, *others = tensors_BT
    columns = mask_BT.any(dim=0).nonzero()
    used = slice(int(columns[0]), int(columns[-1]) + 1)
    return [tensor[:, used] for tensor in (ids_BT.long(), mask_BT.long(), *others)]


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Return whether an allocation failed; torch's CPU allocator has no type of its own for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


class _LayerStatistics:
    """Accumulates the activation statistics of every layer over micro-batches."""

    def __init__(self) -> None:
        self.moments: list[ActivationMoments] = []
        self.comoments: list[Comoment] = []

    def observe(self, index: int, states_ND: Tensor) -> None:
        # One sweep, in which blocks are called in order.
        assert index == len(self.moments)
        self.moments.append(ActivationMoments.of(states_ND))
        self.comoments.append(Comoment.of(states_ND))

    def merge(self, part: _LayerStatistics) -> None:
        if not self.moments:
            self.moments, self.comoments = part.moments, part.comoments
        else:
            self.moments = [a.merge(b) for a, b in zip(self.moments, part.moments, strict=True)]
            self.comoments = [a.merge(b) for a, b in zip(self.comoments, part.comoments, strict=True)]


@contextmanager
def _observed(statistics: _LayerStatistics | None) -> Iterator[StatesObserver | None]:
    """Yield an observer whose findings are added when the body ends, and dropped when it fails: its rows are run again."""
    if statistics is None:
        yield None
        return
    part = _LayerStatistics()
    yield part.observe
    statistics.merge(part)


def _sums_per_sample(readings_VN2: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Return [V, B, 2]. On the CPU, because index_add of float64 has no fixed order on a GPU."""
    return readings_VN2.new_zeros(len(readings_VN2), num_rows, 2).index_add(1, rows_N, readings_VN2)


def _label_scores(log_probs_VBC: Tensor, labels_B: Tensor | None) -> _Scores:
    chosen_B = log_probs_VBC[0].argmax(dim=-1) if labels_B is None else labels_B.cpu()
    nll_VB = -log_probs_VBC.gather(-1, chosen_B.expand(len(log_probs_VBC), -1)[..., None])[..., 0]
    correct_VB = None if labels_B is None else log_probs_VBC.argmax(dim=-1) == chosen_B
    return _Scores("label_nll", torch.ones_like(chosen_B), nll_VB[1:] - nll_VB[:1], nll_VB[0], correct_VB)


def _embedding_scores(embeddings_VBE: Tensor) -> _Scores:
    clean, ablated = embeddings_VBE[:1], embeddings_VBE[1:]
    # The cosine of a vector with itself is 1 only to rounding.
    is_same_LB = (ablated == clean).all(dim=-1)
    drop_LB = (1 - F.cosine_similarity(ablated, clean, dim=-1)).masked_fill(is_same_LB, 0.0)
    return _Scores("cosine_drop", torch.ones(clean.shape[1], dtype=torch.int64), drop_LB, None, None)


def _of_real_tokens(mask_BT: Tensor | None, observe: StatesObserver | None) -> Observer | None:
    """Return an observer that hands on the states [N, D] of unmasked positions."""
    if observe is None:
        return None

    def select(index: int, hidden_BTD: Tensor) -> None:
        # Convolutional front ends shorten time: their mask is not the blocks'.
        if mask_BT is not None and mask_BT.shape == hidden_BTD.shape[:2]:
            observe(index, hidden_BTD[mask_BT.bool()])
        else:
            observe(index, hidden_BTD.flatten(0, -2))

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
        raise ProfilingError(
            f"Expected every sample to have a scored token after its first, found none in: {', '.join(missing)}. Give them an "
            "answer or leave them out."
        )
