"""News of a run on stderr: a progress bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from actors.session import Reporter

LOG_EVERY_S = 10.0


class ConsoleReporter(Reporter):
    """Writes to stderr, so that stdout carries results alone."""

    def __init__(self, *, shows_progress: bool = True) -> None:
        """Without progress there are lines of news alone."""
        self._shows_progress = shows_progress
        self._begun: dict[str, tuple[float, int]] = {}
        """When a stage was first heard of, and how far it was then."""
        self._bars: dict[str, tqdm[None]] = {}
        self._last: dict[str, float] = {}
        self._is_terminal = sys.stderr.isatty()

    def line(self, text: str) -> None:
        """One line of news, above any bar."""
        self.close()
        print(text, file=sys.stderr, flush=True)

    def progress(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """Move the stage's bar, or print where it is every few seconds."""
        if not self._shows_progress:
            return
        if not self._is_terminal:
            now = time.monotonic()
            self._begun.setdefault(stage, (now, done))
            if now - self._last.get(stage, now - LOG_EVERY_S) >= LOG_EVERY_S:
                self._last[stage] = now
                of = "" if total is None else f" of {total}"
                left = "" if total is None else self._time_left(stage, now, done, total)
                print(f"{stage}: {done}{of}{left} {note}".rstrip(), file=sys.stderr, flush=True)
            return
        bar = self._bars.get(stage)
        if bar is None:
            bar = self._bars[stage] = tqdm(
                total=total, initial=done, desc=stage, file=sys.stderr, leave=False, position=len(self._bars)
            )
        bar.total = total
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    def _time_left(self, stage: str, now: float, done: int, total: int) -> str:
        start, before = self._begun[stage]
        if not before < done < total:
            return ""
        return f", about {(now - start) / (done - before) * (total - done):.0f} s left"

    def close(self) -> None:
        """Remove all bars."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()
