"""What a person sees while a stage works: in a log how far each teacher is and how long it will take, for a machine nothing."""

from __future__ import annotations

import re

import pytest

from jobs import console
from jobs.console import ConsoleReporter


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LOG_EVERY_S", 0.0)


def test_a_log_says_how_far_each_stage_is_and_how_long_it_will_take(every_line, capsys):
    reporter = ConsoleReporter()
    reporter.progress("profile a", 32, 256)
    reporter.progress("profile b", 0, None, "reading")
    reporter.progress("profile a", 128, 256)
    reporter.progress("profile a", 256, 256)
    first, second, third, last = capsys.readouterr().err.splitlines()
    assert (first, second, last) == ("profile a: 32 of 256", "profile b: 0 reading", "profile a: 256 of 256")
    assert re.fullmatch(r"profile a: 128 of 256, about \d+ s left", third)


def test_a_machine_gets_lines_of_news_and_no_progress(every_line, capsys):
    reporter = ConsoleReporter(shows_progress=False)
    reporter.progress("profile a", 32, 256)
    reporter.line("profile: done")
    assert capsys.readouterr().err == "profile: done\n"
