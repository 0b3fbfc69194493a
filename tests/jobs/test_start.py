"""The script `nexus` before its command line is there."""

from __future__ import annotations

import signal
import subprocess
import sys

EARLY = "difflib"
"""The first module that `jobs.cli` imports; hundreds follow."""


def test_ctrl_c_while_importing_ends_in_one_line():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-c", "from jobs.start import main; main()", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background deaf to Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stderr:
        if line.split("|")[-1].strip() == EARLY:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, out, said) == (130, "", ["nexus: stopped"])
