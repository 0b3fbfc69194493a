"""Whether a teacher fits, told before a weight is read: what it will take, and what the device or this process may still have."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from nexus.errors import TowerLoadError
from nexus.towers.experts import STACKS
from nexus.towers.gptq import GptqLinear
from nexus.towers.nf4 import QuantisationPlan

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight in NF4 with double quantisation: the index, an 8-bit scale of 64, a 32-bit scale of 256 scales."""
CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Limit, use and the parts of the use, of the second and the first version of control groups."""


def require_memory(
    teacher_id: str,
    skeleton: nn.Module,
    plan: QuantisationPlan,
    dtype: torch.dtype,
    device: torch.device,
    *,
    streamed_blocks: Sequence[str] = (),
) -> None:
    """Refuse a teacher that cannot fit on `device`.

    Args:
        streamed_blocks: names of the blocks that are not held; one of them is in use while the next one is read.

    Raises:
        TowerLoadError: naming what it needs and what there is.
    """
    need, have = needed_bytes(skeleton, plan, dtype, streamed_blocks), available_bytes(device)
    if need > have:
        remedy = "another GPU or the CPU" if device.type == "cuda" else "a machine with more memory"
        if not streamed_blocks:
            remedy += ", or stream it (placement: streamed)"
        raise TowerLoadError(
            f"Expected {need / 2**30:.2f} GiB of memory on {device} for teacher {teacher_id!r}, found {have / 2**30:.2f} GiB free. "
            f"Free some, or choose {remedy}."
        )


def needed_bytes(
    skeleton: nn.Module, plan: QuantisationPlan, dtype: torch.dtype, streamed_blocks: Sequence[str] = ()
) -> int:
    """What a model takes once loaded, and its largest tensor in floating point, which is there while it is packed."""
    packed = {f"{name}.weight" for name in plan.matrices} | {
        f"{name}.{stack}" for name in plan.experts for stack in STACKS
    }
    held = largest = 0.0
    blocks = dict.fromkeys(streamed_blocks, 0.0)
    for name, parameter in skeleton.named_parameters():
        size = parameter.numel()
        stored = size * NF4_BITS / 8 if name in packed else size * dtype.itemsize
        largest = max(largest, size * dtype.itemsize)
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            held += stored
        else:
            blocks[block] += stored
    for module in skeleton.modules():
        if isinstance(module, GptqLinear):
            held += module.stored_bits() / 8
            # Dequantised in float32 and once more in the compute type, whenever it is used.
            largest = max(largest, module.in_features * module.out_features * (4 + dtype.itemsize))
    return int(held + 2 * max(blocks.values(), default=0.0) + largest)


def available_bytes(device: torch.device) -> int:
    """Free memory of a GPU; for the CPU the least of the machine's, the control group's and this process's own limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])  # pragma: no cover  # needs a GPU
    return min(psutil.virtual_memory().available, *_limits(CGROUP))


def _limits(cgroup: Path) -> Iterable[int]:
    """What each limit on this process still allows."""
    for files in _CGROUP_FILES:
        limit, used, parts = (cgroup / name for name in files)
        try:
            # Pages of files count as used, but are given up as soon as memory is asked for.
            cached = dict(line.split() for line in parts.read_text().splitlines()).get("inactive_file", "0")
            # Without a limit the file says `max`, which is no number.
            yield int(limit.read_text()) - int(used.read_text()) + int(cached)
        except (OSError, ValueError):
            continue
    used_bytes = psutil.Process().memory_info().vms
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    yield psutil.virtual_memory().total if soft == resource.RLIM_INFINITY else soft - used_bytes
