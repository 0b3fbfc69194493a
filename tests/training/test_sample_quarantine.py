"""Which samples are left out, when they come back, and what survives a restart."""

from __future__ import annotations

from pathlib import Path

from nexus.training.sample_quarantine import SampleQuarantine


def test_a_flagged_batch_is_suspect_until_the_epoch_ends() -> None:
    quarantine = SampleQuarantine()
    quarantine.add(["a", 7])
    assert quarantine.suspects == {"a", "7"}
    assert "a" in quarantine
    assert 7 in quarantine
    assert "b" not in quarantine
    assert not quarantine.confirmed
    quarantine.start_epoch(1)
    assert "a" not in quarantine
    assert not quarantine.suspects


def test_a_second_hit_confirms_only_when_it_is_independent() -> None:
    quarantine = SampleQuarantine()
    quarantine.add(["a", "b"])
    quarantine.add(["a", "b"])  # the same batch again, after a rollback
    assert not quarantine.confirmed
    quarantine.add(["a", "c"])  # other neighbours
    assert quarantine.confirmed == {"a"}
    quarantine.start_epoch(1)
    quarantine.add(["a", "b"])  # another epoch
    assert quarantine.confirmed == {"a", "b"}
    quarantine.start_epoch(2)
    assert "a" in quarantine
    assert "b" in quarantine
    assert "c" not in quarantine


def test_acquitted_batches_leave_no_hit() -> None:
    quarantine = SampleQuarantine()
    quarantine.add(["a"])
    quarantine.acquit([["a"], ["never seen"]])
    assert not quarantine.suspects
    quarantine.start_epoch(1)
    quarantine.add(["a"])
    assert not quarantine.confirmed


def test_the_quarantine_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "quarantine" / "suspects.jsonl"
    first = SampleQuarantine(path)
    first.add(["a", "b"])
    first.add(["d"])
    first.acquit([["d"]])
    first.start_epoch(1)
    first.add(["a", "c"])
    second = SampleQuarantine(path)
    assert second.epoch == 1
    assert second.suspects == first.suspects == {"a", "c"}
    assert second.confirmed == first.confirmed == {"a"}
    second.add(["c", "d"])
    third = SampleQuarantine(path)
    assert third.confirmed == {"a", "c"}
    third.start_epoch(2)
    third.add(["d"])
    assert "d" in SampleQuarantine(path).confirmed


def test_a_line_that_was_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "suspects.jsonl"
    SampleQuarantine(path).add(["a"])
    path.write_text(path.read_text() + '{"event": "susp')
    reopened = SampleQuarantine(path)
    assert reopened.suspects == {"a"}
    reopened.add(["b"])
    assert SampleQuarantine(path).suspects == {"a", "b"}


def test_a_batch_without_ids_is_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "suspects.jsonl"
    SampleQuarantine(path).add([])
    assert not path.exists()
