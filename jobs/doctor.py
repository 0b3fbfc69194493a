"""`nexus doctor`: what this machine has, what is missing, and what to type."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from nexus.errors import NexusError

State = Literal["ok", "note", "missing"]

SUPPORTED_PYTHON = ((3, 10), (3, 13))
QUICKSTART_MEMORY_GIB = 5.0
"""The quickstart was held to 4.5 GiB over all processes."""
MIN_DISK_GIB = 1.0
MIN_SHM_GIB = 0.3
"""Ray's object store of a local start, 256 MiB, lies in /dev/shm."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    remedy: str = ""
    """What to type; empty when nothing is wrong."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def examine() -> list[Finding]:
    """Look at everything; a check that fails is a finding, never an exception."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        lambda: _package("torch", (2, 11)),
        lambda: _package("transformers", (5, 17)),
        lambda: _package("ray", (2, 56)),
        lambda: _package("bitsandbytes", (0, 50)),
        lambda: _package("accelerate", (1, 0)),
        _accelerator,
        _nf4,
        _memory,
        _disk,
        _shared_memory,
        _cluster,
        _auth_token,
        _samples,
    )
    return [check() for check in checks]


def render(findings: list[Finding]) -> str:
    """Aligned text, a remedy below each finding that needs one."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<7}  {finding.name:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.remedy}")
    missing = sum(finding.state == "missing" for finding in findings)
    lines.append("ready: type `nexus quickstart`" if not missing else f"{missing} missing: see above")
    return "\n".join(lines)


def _python() -> Finding:
    version = sys.version_info[:2]
    ok = SUPPORTED_PYTHON[0] <= version <= SUPPORTED_PYTHON[1]
    return Finding(
        "python",
        "ok" if ok else "missing",
        platform.python_version(),
        "" if ok else "make the environment with Python 3.10 to 3.13",
    )


def _package(name: str, minimum: tuple[int, int]) -> Finding:
    wanted = ".".join(map(str, minimum))
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", f"pip install '{name}>={wanted}'")
    parts = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    ok = parts >= minimum
    return Finding(name, "ok" if ok else "missing", version, "" if ok else f"pip install '{name}>={wanted}'")


def _accelerator() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("accelerator", "missing", "torch does not import", "make setup")
    if not torch.cuda.is_available():
        return Finding(
            "accelerator", "note", f"none; {os.cpu_count()} CPU cores", "teachers above 1B parameters want a GPU"
        )
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info()
    return Finding(
        "accelerator", "ok", f"{', '.join(names)}; {free / 2**30:.0f} of {total / 2**30:.0f} GiB free on the first"
    )


def _nf4() -> Finding:
    try:
        import torch
        from bitsandbytes import functional

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(device)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        distance = float((functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm())
    except Exception as error:  # bitsandbytes raises whatever its backend raises
        return Finding("NF4", "missing", f"{type(error).__name__}: {error}"[:120], "pip install 'bitsandbytes>=0.50'")
    ok = distance < 0.12
    return Finding(
        "NF4",
        "ok" if ok else "missing",
        f"relative weight error {distance:.3f} on {device}",
        "" if ok else "update bitsandbytes",
    )


def _memory() -> Finding:
    available = psutil.virtual_memory().available / 2**30
    ok = available >= QUICKSTART_MEMORY_GIB
    return Finding(
        "memory",
        "ok" if ok else "missing",
        f"{available:.1f} GiB available",
        "" if ok else f"free {QUICKSTART_MEMORY_GIB:g} GiB for the quickstart",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    ok = free >= MIN_DISK_GIB
    return Finding(
        "disk",
        "ok" if ok else "missing",
        f"{free:.1f} GiB free here",
        "" if ok else "free 1 GiB or use --out on another disk",
    )


def _shared_memory() -> Finding:
    path = Path("/dev/shm")  # nosec B108 # Ray's object store lies there
    if not path.is_dir():
        return Finding("shared memory", "note", "no /dev/shm", "Ray falls back to its temporary folder, which is slow")
    free = shutil.disk_usage(path).free / 2**30
    ok = free >= MIN_SHM_GIB
    return Finding(
        "shared memory", "ok" if ok else "missing", f"{free:.1f} GiB free", "" if ok else "in Docker: --shm-size 1g"
    )


def _cluster() -> Finding:
    from actors.cluster import resolve_cluster

    try:
        target = resolve_cluster("auto")
    except NexusError as error:
        return Finding("Ray cluster", "missing", str(error), "unset RAY_ADDRESS, or start that cluster")
    if target.mode == "local":
        return Finding("Ray cluster", "note", "none running; a local one is started when needed")
    return Finding("Ray cluster", "ok", f"{target.address or 'that of this job'} ({target.reason})")


def _auth_token() -> Finding:
    token = Path.home() / ".ray" / "auth_token"
    if not token.exists():
        return Finding("Ray token", "note", "none yet; a local start makes one")
    if token.stat().st_mode & 0o077:
        return Finding("Ray token", "note", f"{token} can be read by others", f"chmod 600 {token}")
    return Finding("Ray token", "ok", str(token))


def _samples() -> Finding:
    from nexus.config import load_config, resolve_path
    from nexus.towers.registry import shipped_config

    config = load_config(shipped_config("quickstart.yaml"))
    paths = [text for source in config.data for text in (*source.pool, *source.labelled, *source.test)]
    paths += [teacher.path for teacher in config.teachers if teacher.kind == "path"]
    missing = [text for text in paths if not resolve_path(text).exists()]
    if missing:
        return Finding(
            "samples",
            "missing",
            f"{len(missing)} of {len(paths)} absent, first {missing[0]}",
            "make samples, or install again",
        )
    return Finding("samples", "ok", f"{len(paths)} files and teachers of the quickstart")
