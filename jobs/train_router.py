"""Fit the router on the distilled student: `ray job submit -- python jobs/train_router.py`.

Takes the options of `nexus route`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A submitted job runs from the uploaded tree, where nothing is installed and only this folder is on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from jobs.script import run_script

    run_script("route")
