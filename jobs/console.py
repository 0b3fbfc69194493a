"""News of a run on stderr: a progress bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from actors.session import Reporter

LOG_EVERY_S = 10.0


class ConsoleReporter(Reporter):
    """Writes to stderr, so that stdout carries results alone."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[None]] = {}
        self._last: dict[str, float] = {}
        self._is_terminal = sys.stderr.isatty()

    def line(self, text: str) -> None:
        """One line of news, above any bar."""
        self.close()
        print(text, file=sys.stderr, flush=True)

    def progress(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """Move the stage's bar, or print where it is every few seconds."""
        if not self._is_terminal:
            now = time.monotonic()
            if now - self._last.get(stage, now - LOG_EVERY_S) >= LOG_EVERY_S:
                self._last[stage] = now
                of = "" if total is None else f" of {total}"
                print(f"{stage}: {done}{of} {note}".rstrip(), file=sys.stderr, flush=True)
            return
        bar = self._bars.get(stage)
        if bar is None:
            bar = self._bars[stage] = tqdm(
                total=total, desc=stage, file=sys.stderr, leave=False, position=len(self._bars)
            )
        bar.total = total
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    def close(self) -> None:
        """Remove all bars."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()
