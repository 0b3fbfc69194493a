"""The memory meter counts what this process started, and what carries a Ray session's name; nothing twice, nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from actors.cluster import MALLOC_ENVIRONMENT
from actors.memory import MemoryMeter, _pss_bytes

ROOT = Path(__file__).parents[2]
MIB = 2**20
HELD_MIB = 200
HOLD = f"""
import sys
block = bytearray({HELD_MIB} << 20)
block[::4096] = b"x" * len(block[::4096])
print("holding", flush=True)
sys.stdin.read()
"""
INTERPRETER_MIB = 40
"""More than the memory of a bare interpreter; the tests compare with it as the slack above `HELD_MIB`."""


@contextmanager
def _holder(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A child process that holds `HELD_MIB` touched pages."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "holding\n"
        yield child
    finally:
        child.communicate()


# The meter watches an interpreter of its own: pages that pytest shares with ending Ray workers would move its sum meanwhile.
METER = f"""
import json, subprocess, sys
from actors.memory import MemoryMeter
import actors.memory
if sys.argv[1:] == ["background"]:
    actors.memory.SAMPLE_EVERY_S = 0.05
mib = []
with MemoryMeter() as meter:
    meter.reset()
    mib.append(meter.sample_bytes() / 2**20)
    child = subprocess.Popen([sys.executable, "-c", {HOLD!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "holding\\n"
    while sys.argv[1:] == ["background"] and meter._peak_bytes / 2**20 < mib[0] + {HELD_MIB - 5}:
        pass  # the test's own time limit ends a meter that never looks
    if not sys.argv[1:]:
        mib.append(meter.peak_gib * 1024)
    child.communicate()
    mib.append(meter.peak_gib * 1024)
    meter.reset()
    mib.append(meter.peak_gib * 1024)
print(json.dumps(mib))
"""


def _metered_mib(*arguments: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", METER, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_a_child_that_holds_200_mib_raises_the_peak_by_about_that_until_the_next_reset():
    before, during, after, reset = _metered_mib()
    assert HELD_MIB - 5 < during - before < HELD_MIB + INTERPRETER_MIB
    assert after - before > HELD_MIB - 5, "a peak stays after its process has ended"
    assert reset - before < INTERPRETER_MIB


def test_the_peak_is_seen_by_the_background_thread_while_nobody_asks():
    before, after, _ = _metered_mib("background")
    assert after - before > HELD_MIB - 5


def test_a_cluster_that_this_process_did_not_start_is_counted_by_its_session_name():
    name = "session_of_another_process"
    # The shell ends at once, so that its child descends from this process no longer.
    command = f"{sys.executable} -c 'import time; time.sleep(600)' {name} & echo $!"
    shell = subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    orphan = psutil.Process(int(shell.stdout.readline()))
    try:
        shell.wait()
        meter = MemoryMeter()
        assert orphan.pid not in meter._pids()
        meter.watch_session(name)
        assert orphan.pid in meter._pids()
    finally:
        orphan.kill()
        shell.stdout.close()


def test_a_process_that_is_gone_weighs_nothing():
    with _holder() as child:
        assert _pss_bytes(child.pid) > HELD_MIB * MIB
    assert _pss_bytes(child.pid) == 0


RELEASE = """
import sys
from actors.memory import _pss_bytes, release_freed_memory
import os
blocks = [bytearray(64 << 10) for _ in range(1600)]
del blocks
held = _pss_bytes(os.getpid())
release_freed_memory()
print((held - _pss_bytes(os.getpid())) >> 20)
"""


def test_freed_blocks_that_the_c_library_keeps_are_given_back_when_asked():
    done = subprocess.run(
        [sys.executable, "-c", RELEASE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **MALLOC_ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80  # of 100 MiB
