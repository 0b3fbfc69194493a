"""Finds the blocks of a transformer and takes over their calls while the model's own forward runs.

A sweep never re-implements a model: masks, rotary embeddings, caches and heads stay the model's. It only decides, at each block,
what goes in and what comes out. Shape letters: B the rows of the model's call, R the rows given to a block (several ablations of
each of the B rows), T time, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nexus.errors import ProfilingError
from nexus.profiling.crossattention import SharedCrossCache

# Where a block's side inputs keep the batch when it is not in front: multi-axis rotary embeddings put their sections before it.
_BATCH_DIMS = {"position_ids": (-2,), "position_embeddings": (-3, 0)}


Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Rows:
    """Which row of the model's call each row given to a block takes its masks and positions from."""

    index_R: Tensor
    batch_size: int


class BlockCall:
    """One call of one block, as the model made it."""

    def __init__(
        self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.index = index
        self.extras: tuple[Any, ...] | None = None
        """What the block returned beside its hidden states, if it returns a tuple."""
        self._forward = forward
        self._args = args[1:]
        self._kwargs = dict(kwargs)
        self.hidden_RTD: Tensor = args[0] if args else self._kwargs.pop("hidden_states")

    def run(self, hidden_RTD: Tensor, rows: Rows | None = None) -> Tensor:
        """Return the block's hidden output for `hidden_RTD`; without `rows`, side inputs are passed as the model made them."""
        args, kwargs = self._args, self._kwargs
        for value in (*args, *kwargs.values()):
            if isinstance(value, EncoderDecoderCache) and isinstance(value.cross_attention_cache, SharedCrossCache):
                value.cross_attention_cache.read_by(None if rows is None else rows.index_R)
        if rows is not None:
            args = tuple(_select_rows("", value, rows) for value in args)
            kwargs = {name: _select_rows(name, value, rows) for name, value in kwargs.items()}
        output: Tensor | tuple[Any, ...] = self._forward(hidden_RTD, *args, **kwargs)
        if isinstance(output, Tensor):
            return output
        self.extras = output[1:]
        hidden: Tensor = output[0]
        return hidden

    def add_rows(self, rows: Rows) -> None:
        """Give what the block returned beside its hidden states `rows` of its rows: some models hand it on to the next block."""
        if self.extras is not None:
            self.extras = _select_rows("", self.extras, rows)

    def is_given(self, extras: Sequence[Any]) -> bool:
        """Return whether a tensor among what an earlier block returned beside its hidden states came with the call."""
        given = [id(value) for value in (*self._args, *self._kwargs.values())]
        return any(isinstance(extra, Tensor) and id(extra) in given for extra in extras)


BlockHandler = Callable[[BlockCall], Tensor]


class BlockStack:
    """The ordered blocks of one decoder or encoder, and the dotted path under which its model holds them."""

    def __init__(self, path: str, blocks: Sequence[nn.Module], side: Side = "decoder") -> None:
        self.path = path
        self.side = side
        self.blocks = tuple(blocks)
        # Only blocks that return tuples need it: a skipped block repeats the extras of its last real call.
        self._extras: list[tuple[Any, ...] | None] = [None] * len(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @contextmanager
    def intercept(self, handler: BlockHandler) -> Iterator[list[int]]:
        """Let `handler` compute every block's hidden output until the context ends; yields the number of calls per block.

        The blocks' forward is shadowed on the instances, so that hooks of the caller, of accelerate and of quantisers go on
        working, and is given back even after an exception.
        """
        calls = [0] * len(self.blocks)
        shadowed: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        try:
            for index, block in enumerate(self.blocks):
                shadowed.append((block, block.__dict__.get("forward")))
                block.__dict__["forward"] = self._shadow(index, block.forward, handler, calls)
            yield calls
        finally:
            for block, original in shadowed:
                if original is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = original

    def _shadow(
        self, index: int, forward: Callable[..., Any], handler: BlockHandler, calls: list[int]
    ) -> Callable[..., Any]:
        def shadow(*args: Any, **kwargs: Any) -> Any:
            calls[index] += 1
            call = BlockCall(index, forward, args, kwargs)
            hidden_RTD = handler(call)
            if call.extras is not None:
                self._extras[index] = call.extras
            extras = self._extras[index]
            return hidden_RTD if extras is None else (hidden_RTD, *extras)

        return shadow

    def require_called_once(self, calls: Sequence[int]) -> None:
        """Raise ProfilingError unless the model's forward went through every block exactly once."""
        if any(count != 1 for count in calls):
            raise self.not_in_the_path(f"calls {list(calls)}")

    def not_in_the_path(self, found: str) -> ProfilingError:
        """Return the error for blocks that the model's forward does not go through one after the other."""
        return ProfilingError(
            f"Expected one forward of the model to call each of the {len(self)} blocks at '{self.path}' once, found {found}: "
            "these blocks do not process this input. Pass layers= with the path of the blocks that do."
        )

    def not_a_number(self) -> ProfilingError:
        """Return the error for a model, or an ablation, that gives NaN."""
        return ProfilingError(
            f"Expected outputs of the model and of its ablations at '{self.path}' to be numbers, found NaN. Load the model in "
            "a wider compute dtype (float32), or leave out the rows that cause it."
        )

    def require_effect(self, readings_V: Tensor) -> None:
        """Raise ProfilingError when no ablation moved any reading, or when one is no number.

        Args:
            readings_V: [L+1, ...] numbers read off the model's output, the clean ones first; logits of tokens that a model
                rules out may be infinite.
        """
        if bool(readings_V.isnan().any()):
            raise self.not_a_number()
        clean, ablated = readings_V[:1], readings_V[1:]
        moves = torch.where(ablated == clean, 0.0, (ablated - clean).abs())
        scale = clean[clean.isfinite()].abs().max()
        # Rows computed in one stacked matrix product may differ in the last bits although nothing was ablated.
        if moves.max() <= 1e-6 * scale:
            raise ProfilingError(
                f"Expected skipping a block at '{self.path}' to change the model's output, found that none of {len(self)} "
                "ablations changes anything. Pass layers= with the path of the blocks that process this input."
            )


def find_blocks(model: PreTrainedModel, layers: str | Sequence[nn.Module] | None = None) -> BlockStack:
    """Return the blocks to profile: the text decoder's in multimodal models, the encoder's in encoders.

    Args:
        model: any transformers model.
        layers: the blocks themselves or their dotted path inside `model`; None finds them: the longest `ModuleList` inside
            `get_decoder()`, or failing that `get_encoder()`, whose elements are transformer blocks.

    Raises:
        ProfilingError: nothing fits, or `layers` names no list of modules.
    """
    if isinstance(layers, str):
        try:
            found = model.get_submodule(layers)
        except AttributeError as error:
            raise ProfilingError(
                f"Expected blocks at layers='{layers}', found no such module in {_name(model)}."
            ) from error
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            raise ProfilingError(f"Expected a list of blocks at layers='{layers}', found a {type(found).__name__}.")
        return _stack(model, layers, list(found))
    if layers is not None:
        path = _path_of(model, layers)
        if path is None:
            raise ProfilingError(
                f"Expected layers= to be None, a dotted path or all modules of one list inside {_name(model)}, found something "
                "else. Pass the whole list."
            )
        return _stack(model, path, layers)
    for base in _sides(model):
        blocks = _longest_list(base)
        if blocks is not None:
            return _stack(model, str(_path_of(model, blocks)), blocks)
    raise ProfilingError(
        f"Expected transformer blocks in the decoder or encoder of {_name(model)}, found no list of them. Pass their dotted "
        "path as layers=."
    )


def find_stacks(model: PreTrainedModel) -> tuple[BlockStack, ...]:
    """Return all block lists that are profiled, each on its own: the decoder's and then the encoder's of an encoder-decoder, one of
    any other model.

    Raises:
        ProfilingError: as `find_blocks`.
    """
    first = find_blocks(model)
    encoder = _sides(model)[1]
    if not model.config.is_encoder_decoder or first.side == "encoder" or first.blocks[0] in encoder.modules():
        return (first,)
    blocks = _longest_list(encoder)
    return (first,) if blocks is None else (first, _stack(model, str(_path_of(model, blocks)), blocks))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the body in eval mode without gradients; training flags and the random state come back whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
    # no_grad and not inference_mode: quantised modules initialise state in their first forward, which training reuses later.
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def _sides(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Return the decoder and the encoder; the model itself where it has no such part."""
    return cast(Any, model).get_decoder(), cast(Any, model).get_encoder()


def _stack(model: PreTrainedModel, path: str, blocks: Sequence[nn.Module]) -> BlockStack:
    decoder, _ = _sides(model)
    # A model that is no part of a larger one decodes if it writes.
    is_decoder = model.can_generate() if decoder is model else blocks[0] in decoder.modules()
    return BlockStack(path, blocks, "decoder" if is_decoder else "encoder")


def _longest_list(base: nn.Module) -> list[nn.Module] | None:
    candidates = [list(m) for m in base.modules() if isinstance(m, nn.ModuleList) and _holds_blocks(m)]
    # max keeps the first of equals: the outermost list.
    return max(candidates, key=len) if candidates else None


def _holds_blocks(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(isinstance(module, GradientCheckpointingLayer) for module in modules)


def _path_of(model: nn.Module, blocks: Sequence[nn.Module]) -> str | None:
    """Return the dotted path of the non-empty list inside `model` that holds exactly `blocks`, or None."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and blocks and list(module) == list(blocks):
            return str(name)
    return None


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _select_rows(name: str, value: Any, rows: Rows) -> Any:
    if isinstance(value, Tensor):
        if name == "alibi":
            # The heads of all rows lie on one axis.
            heads = value.view(rows.batch_size, -1, *value.shape[1:])
            return heads.index_select(0, rows.index_R).flatten(0, 1)
        for dim in _BATCH_DIMS.get(name, (0,)):
            # One-dimensional tensors (cache positions) count time.
            if max(2, -dim) <= value.ndim and value.shape[dim] == rows.batch_size:
                if value.stride(dim) == 0:
                    # All rows are one, repeated without being copied, and stay so.
                    shape = list(value.shape)
                    shape[dim] = len(rows.index_R)
                    return value.narrow(dim, 0, 1).expand(shape)
                return value.index_select(dim, rows.index_R)
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_select_rows(name, element, rows) for element in value)
    if type(value) is dict:
        return {key: _select_rows(key, element, rows) for key, element in value.items()}
    return value
