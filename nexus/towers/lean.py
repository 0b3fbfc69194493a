"""Importing a teacher's libraries without what no teacher uses: PyTorch's compiler, and scipy for the losses of object detection.

bitsandbytes hands a few functions to `torch.compile` when it is imported, and transformers looks for scipy: a fifth of the private
memory and a third of the time of a process that has loaded nothing yet, and a run has a process for each teacher. Nothing is ever
compiled here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lean_imports() -> Iterator[None]:
    """While it lasts, imported modules compile nothing and take scipy to be absent; afterwards both are as before.

    For the time of an import alone, in a process whose other threads import nothing.
    """
    import torch
    import transformers.utils

    stand_ins: list[tuple[Any, str, Any]] = [
        (torch, "compile", _as_it_is),
        (transformers.utils, "is_scipy_available", lambda: False),
    ]
    before = [getattr(module, name) for module, name, _ in stand_ins]
    for module, name, stand_in in stand_ins:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name, _), found in zip(stand_ins, before, strict=True):
            setattr(module, name, found)


def _as_it_is(function: Callable[..., Any] | None = None, **_options: object) -> Any:
    """As `torch.compile` is called, with a function and as a decorator with options; the function stays as it is."""
    return function if function is not None else lambda decorated: decorated
