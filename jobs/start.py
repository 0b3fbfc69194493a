"""Where the `nexus` script begins: Ctrl-C while the command line is still being imported ends in one line as later does."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of `jobs.cli` and exit with its code."""
    try:
        from jobs.cli import app
    except KeyboardInterrupt:
        print("nexus: stopped", file=sys.stderr)
        sys.exit(130)  # as the shell counts it; the constant's own module may be what was being imported
    app()
