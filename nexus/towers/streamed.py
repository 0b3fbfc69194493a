"""Teachers that exceed their device: run block by block from the quantised cache, all samples passing a block before the next comes.

The model stays transformers' own. Each micro-batch is one ordinary forward in a thread of its own that stops in front of every
block; the threads take turns, one at a time, so what is computed is what a model in memory computes, bit for bit, and what is held is
one block, the next one while it is read, and each micro-batch's state between two blocks. A pass reads the quantised weights once,
whatever the number of samples: it pays for scoring many rows, and never for generating them token by token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nexus.towers.cache import CacheEntry, install, read_tensors

T = TypeVar("T")

_STACK_BYTES = 4 * 2**20
"""Of a thread that runs a forward; the system's default of 8 MiB counts against a limited address space."""


class LayerStream:
    """Runs forwards of a model whose blocks lie in files."""

    def __init__(self, model: PreTrainedModel, entry: CacheEntry, blocks: Sequence[str], device: torch.device) -> None:
        """`model` has everything but its blocks, whose dotted names are `blocks`."""
        self._model = model
        self._blocks = tuple(model.get_submodule(name) for name in blocks)
        self._files = entry.block_files()
        self._device = device

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of `calls`, each of which runs the model's forward, in their order.

        Raises:
            Exception: what the first failing call raised; the others are abandoned.
        """
        lanes = [_Lane(call) for call in calls]
        by_thread: dict[int, _Lane[T]] = {}
        handles = [
            block.register_forward_pre_hook(_stop_at(index, by_thread)) for index, block in enumerate(self._blocks)
        ]
        stack = threading.stack_size(_STACK_BYTES)
        try:
            with ThreadPoolExecutor(max_workers=1) as reader:
                for lane in lanes:
                    by_thread[lane.start()] = lane
                    lane.go_on()
                # Once is enough for a forward; a model that goes through its blocks again gets another pass.
                while not all(lane.done for lane in lanes):
                    coming = reader.submit(_read_block, self._files[0])
                    for index in range(len(self._files)):
                        tensors = coming.result()
                        if index + 1 < len(self._files):
                            coming = reader.submit(_read_block, self._files[index + 1])
                        self._pass_block(index, tensors, lanes)
                        del tensors
        finally:
            threading.stack_size(stack)
            for lane in lanes:
                lane.abandon()
            for handle in handles:
                handle.remove()
        return [lane.result() for lane in lanes]

    def _pass_block(self, index: int, tensors: Mapping[str, Tensor], lanes: Sequence[_Lane[T]]) -> None:
        empty = _take_out(self._model, tensors)
        try:
            install(self._model, tensors, self._device)
            for lane in lanes:
                if lane.waits_at == index:
                    lane.go_on()
        finally:
            _put_back(empty)


class _Abandoned(BaseException):
    """Ends a forward that is not wanted any more."""


class _Lane(Generic[T]):
    """One call, in a thread that only runs while `go_on` waits for it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.waits_at: int | None = None
        """Index of the block before which it stands; None before the first and when it is done."""
        self.done = False
        self._call = call
        self._outcome: Future[T] = Future()
        self._may_run = threading.Semaphore(0)
        self._stands = threading.Semaphore(0)
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="forward-lane", daemon=True)

    def start(self) -> int:
        """Begin, standing; returns the thread's identity."""
        self._thread.start()
        identity = self._thread.ident
        assert identity is not None
        return identity

    def go_on(self) -> None:
        """Run up to the next block, or to the end; raises what the call raised."""
        self._may_run.release()
        self._stands.acquire()
        if self.done:
            self._outcome.result()

    def stand(self, index: int) -> None:
        """Called by the thread itself: wait in front of block `index`."""
        self.waits_at = index
        self._stands.release()
        self._may_run.acquire()
        self.waits_at = None
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End the thread, wherever it stands."""
        if self._thread.ident is not None:
            self._abandoned = True
            self._may_run.release()
            self._thread.join()

    def result(self) -> T:
        """What the call returned."""
        return self._outcome.result()

    def _run(self) -> None:
        self._may_run.acquire()
        try:
            self._outcome.set_result(self._call())
        except _Abandoned:
            pass
        except BaseException as error:  # whatever it is, it is the caller's
            self._outcome.set_exception(error)
        self.done = True
        self._stands.release()


def _stop_at(index: int, by_thread: Mapping[int, _Lane[Any]]) -> Callable[..., None]:
    def stop(_block: nn.Module, _inputs: tuple[Any, ...]) -> None:
        by_thread[threading.get_ident()].stand(index)

    return stop


def _read_block(files: Iterable[Path]) -> dict[str, Tensor]:
    return {name: tensor for path in files for name, tensor in read_tensors(path).items()}


def _take_out(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[tuple[nn.Module, str, Any]]:
    """What stands in the places of `tensors` now, for `_put_back`."""
    places = []
    for name in tensors:
        # Parts of a quantisation state have no place of their own.
        path, _, leaf = name.partition(".weight.")[0].rpartition(".")
        if ".weight." not in name:
            owner = model.get_submodule(path)
            places.append((owner, leaf, getattr(owner, leaf)))
    return places


def _put_back(places: Iterable[tuple[nn.Module, str, Any]]) -> None:
    for owner, leaf, value in places:
        for held in (owner._parameters, owner._buffers, owner.__dict__):
            if leaf in held:
                held[leaf] = value
        if isinstance(owner, bnb.nn.Linear4bit):
            owner.quant_state = None
