"""Memory of all processes of a run together: the sum of their proportional set sizes (PSS), sampled in the background.

PSS divides a shared page among its users, so the sum over processes counts Ray's object store and the shared libraries once.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SAMPLE_EVERY_S = 5.0
"""Reading the PSS of 15 processes takes about 0.1 s of one core."""


class MemoryMeter:
    """Largest PSS sum since the last `reset`, over this process, its descendants and the processes of its Ray session."""

    def __init__(self, session_name: str | None = None) -> None:
        """`session_name` (Ray's session folder name) also counts a cluster that this process did not start."""
        self._session_name = session_name
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="memory-meter", daemon=True)

    def __enter__(self) -> MemoryMeter:
        """Begin sampling."""
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()

    def reset(self) -> None:
        """Begin a new peak with the present value."""
        present = self.sample_bytes()
        with self._lock:
            self._peak_bytes = present

    @property
    def peak_gib(self) -> float:
        """Largest sum since `reset`, GiB."""
        present = self.sample_bytes()
        with self._lock:
            self._peak_bytes = max(self._peak_bytes, present)
            return self._peak_bytes / 2**30

    def sample_bytes(self) -> int:
        """The sum now."""
        return sum(_pss_bytes(pid) for pid in self._pids())

    def watch_session(self, session_name: str) -> None:
        """Also count the processes of this Ray session from now on."""
        self._session_name = session_name

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            present = self.sample_bytes()
            with self._lock:
                self._peak_bytes = max(self._peak_bytes, present)

    def _pids(self) -> set[int]:
        roots = [psutil.Process()]
        if self._session_name:
            roots += [process for process in psutil.process_iter(["cmdline"]) if self._belongs(process)]
        pids: set[int] = set()
        for root in roots:
            try:
                pids.update({root.pid, *(child.pid for child in root.children(recursive=True))})
            except psutil.Error:
                continue  # ended meanwhile
        return pids

    def _belongs(self, process: psutil.Process) -> bool:
        return any(self._session_name in argument for argument in process.info["cmdline"] or ())


def release_freed_memory() -> None:
    """Give back to the system what the C library keeps of freed blocks.

    It keeps them for the next step, as MALLOC_TRIM_THRESHOLD_ asks; after a rare large piece of work nobody wants them again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's alone
        trim(0)


@contextmanager
def load_turn() -> Iterator[None]:
    """Waits until no other teacher of this user on this machine is loading: each needs up to two shards beside its weights.

    The system frees the turn of a process that ends, however it ends.
    """
    path = Path(tempfile.gettempdir()) / f"nexus-load-{os.getuid()}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def private_bytes() -> int:
    """Memory of this process that no other shares."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:  # no Linux
        return int(psutil.Process().memory_info().rss)
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # ended meanwhile, another user's, or a system without smaps_rollup
    try:
        return int(psutil.Process(pid).memory_info().rss) if not Path("/proc/self/smaps_rollup").exists() else 0
    except psutil.Error:
        return 0
