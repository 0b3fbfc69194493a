"""The quarantine: nothing lost, nothing twice, and a stop when too much is bad."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from nexus.data.quarantine import MIN_ROWS, Quarantine, QuarantinedRow, read_quarantine
from nexus.data.records import Record, Source
from nexus.errors import ArtifactError, DataError


def entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_bad_row_is_on_disk_at_once_with_file_row_and_reason(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine", 1.0)
    quarantine.add(Path("data/train.jsonl"), 7, "broken\nJSON \u00e4")
    assert entries(tmp_path / "quarantine" / "train.jsonl.jsonl") == [
        {"file": "data/train.jsonl", "row": 7, "reason": "broken\nJSON \u00e4"}
    ]


def test_nothing_is_written_before_a_row_is_bad(tmp_path: Path) -> None:
    Quarantine(tmp_path / "quarantine", 1.0)
    assert not (tmp_path / "quarantine").exists()


def test_each_file_has_its_own_list_and_files_of_one_name_share_it(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 1.0)
    quarantine.add("a/x.csv", 1, "r")
    quarantine.add("b/x.csv", 1, "r")
    quarantine.add("y.csv", 2, "r")
    assert [(e["file"], e["row"]) for e in entries(tmp_path / "x.csv.jsonl")] == [("a/x.csv", 1), ("b/x.csv", 1)]
    assert quarantine.counts() == {"a/x.csv": 1, "b/x.csv": 1, "y.csv": 1}


def test_a_row_that_is_met_again_is_neither_written_nor_counted_again(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 1.0)
    for row in (5, 2, 5, 9, 2):
        quarantine.add("x.csv", row, "first" if row != 5 else "other")
    assert [e["row"] for e in entries(tmp_path / "x.csv.jsonl")] == [5, 2, 9]
    assert quarantine.counts() == {"x.csv": 3}


def test_another_process_and_a_later_run_do_not_write_the_same_row_again(tmp_path: Path) -> None:
    first, second = Quarantine(tmp_path, 1.0), Quarantine(tmp_path, 1.0)
    first.add("x.csv", 1, "r")
    second.add("x.csv", 1, "r")
    second.add("x.csv", 2, "r")
    first.add("x.csv", 2, "r")
    first.add("x.csv", 3, "r")
    assert [e["row"] for e in entries(tmp_path / "x.csv.jsonl")] == [1, 2, 3]
    assert first.counts() == {"x.csv": 3}
    assert second.counts() == {"x.csv": 2}


def test_a_row_is_listed_and_counted_once_however_its_file_is_spelt(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    folder = tmp_path / "quarantine"
    spellings = ("data/x.csv", "./data/x.csv", tmp_path / "data" / "x.csv", "link/x.csv")
    one = Quarantine(folder, 0.1)
    for spelling in spellings:
        one.add(spelling, 4, "r")
        Quarantine(folder, 1.0).add(spelling, 4, "r")  # another process
    assert entries(folder / "x.csv.jsonl") == [{"file": "data/x.csv", "row": 4, "reason": "r"}]
    assert one.counts() == {"data/x.csv": 1}
    for spelling in spellings:
        with pytest.raises(DataError, match=r"found 1 of 9 \(row 4: r\)"):
            one.check(spelling, 9)
        assert Quarantine(folder, 1.0).knows(Record("id", "c", "p", source=Source(str(spelling), 4)))
    assert not one.knows(Record("id", "c", "p", source=Source("other/x.csv", 4)))
    # Two processes that write at the same moment leave a double.
    line = json.dumps({"file": str(tmp_path / "data" / "x.csv"), "row": 4, "reason": "r"})
    with (folder / "x.csv.jsonl").open("a") as file:
        file.write(line + "\n")
    assert list(read_quarantine(folder)) == [QuarantinedRow("data/x.csv", 4, "r")]


def test_a_line_that_a_killed_process_left_half_written_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "x.csv.jsonl").write_text('{"file": "x.csv", "row": 1, "reason": "r"}\n{"file": "x.c')
    Quarantine(tmp_path, 1.0).add("x.csv", 2, "s")
    assert list(read_quarantine(tmp_path)) == [QuarantinedRow("x.csv", 1, "r"), QuarantinedRow("x.csv", 2, "s")]


def test_reading_back_passes_over_doubles_and_foreign_lines(tmp_path: Path) -> None:
    line = '{"file": "x.csv", "row": 1, "reason": "r"}\n'
    (tmp_path / "x.csv.jsonl").write_text(line + "[1]\n" + '{"file": "x.csv"}\n' + line)
    assert list(read_quarantine(tmp_path)) == [QuarantinedRow("x.csv", 1, "r")]
    assert list(read_quarantine(tmp_path / "absent")) == []


def test_without_a_folder_rows_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(None, 1.0)
    with caplog.at_level(logging.WARNING):
        quarantine.add("x.csv", 3, "no good")
    assert quarantine.counts() == {"x.csv": 1}
    assert "row 3 of x.csv: no good" in caplog.text
    assert "listed in" not in quarantine.remedy


def test_a_record_leads_back_to_its_row(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 1.0)
    quarantine.add_record(Record("id", "c", "p", source=Source("x.csv", 4)), "does not decode")
    assert list(read_quarantine(tmp_path)) == [QuarantinedRow("x.csv", 4, "does not decode")]
    with pytest.raises(ValueError, match="'id' without a source"):
        quarantine.add_record(Record("id", "c", "p"), "r")


def test_a_file_is_refused_only_above_the_share(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 0.1)
    quarantine.check("x.csv", 10)
    quarantine.add("x.csv", 3, "no good")
    quarantine.check("x.csv", 10)
    with pytest.raises(DataError, match=r"at most 10\.00% bad rows in x\.csv, found 1 of 9 \(row 3: no good\)\. Mend"):
        quarantine.check("x.csv", 9)
    quarantine.check("y.csv", 1)


def test_one_bad_row_is_too_many_for_a_small_file_and_few_in_a_large_one() -> None:
    quarantine = Quarantine(None, 0.01)
    quarantine.add("x.csv", 1, "r")
    with pytest.raises(DataError, match="found 1 of 50"):
        quarantine.check("x.csv", 50)
    quarantine.check("x.csv", 100)


def test_in_the_middle_of_a_file_nothing_is_decided_before_enough_rows() -> None:
    quarantine = Quarantine(None, 0.01)
    for row in range(1, 21):
        quarantine.add("x.csv", row, "r")
    quarantine.check("x.csv", MIN_ROWS - 1, final=False)
    with pytest.raises(DataError, match="found 20 of 1000"):
        quarantine.check("x.csv", MIN_ROWS, final=False)


def test_rows_behind_the_place_that_was_read_do_not_count_against_it() -> None:
    quarantine = Quarantine(None, 0.01)
    for row in range(5001, 5041):
        quarantine.add("x.csv", row, "r")
    quarantine.check("x.csv", 1000, final=False)
    quarantine.check("x.csv", 10_000)


def test_rows_of_an_older_state_of_the_file_do_not_count(tmp_path: Path) -> None:
    Quarantine(tmp_path, 0.0).add("x.csv", 1, "was broken before it was mended")
    later = Quarantine(tmp_path, 0.0)
    later.check("x.csv", 10)
    assert later.counts() == {}
    assert later.first_reason() is None


def test_the_first_reason_is_that_of_the_first_row_that_was_met() -> None:
    quarantine = Quarantine(None, 0.0)
    quarantine.add("x.csv", 9, "nine")
    quarantine.add("x.csv", 1, "one")
    assert quarantine.first_reason() == "row 9: nine"


def test_a_disk_that_refuses_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(ArtifactError, match=r"Expected to write .*x\.csv\.jsonl, found: .*\. Free disk space"):
        Quarantine(tmp_path / "taken", 1.0).add("x.csv", 1, "r")


def test_a_share_is_between_none_and_all() -> None:
    with pytest.raises(ValueError, match=r"0 <= max_bad_share <= 1, found 1\.5"):
        Quarantine(None, 1.5)
