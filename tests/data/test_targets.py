"""Teacher completions in Parquet: continued after whole files, closed by a manifest, refused when of another teacher."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from nexus.data.loader import iter_records
from nexus.data.records import Record
from nexus.data.targets import TargetWriter, check_targets
from nexus.errors import ArtifactError


def _records(first: int, count: int) -> list[Record]:
    return [Record(id=f"r{n}", capability="math", prompt=f"p{n}") for n in range(first, first + count)]


def _writer(folder, fingerprint="f", rows_per_file=4) -> TargetWriter:
    return TargetWriter(folder, capability="math", fingerprint=fingerprint, rows_per_file=rows_per_file)


def test_what_is_written_is_read_as_records_with_completions(tmp_path):
    writer = _writer(tmp_path)
    writer.write(_records(0, 3), ["a", "b", "c"])
    writer.write(_records(3, 6), list("defghi"))
    writer.finish()
    files = TargetWriter.files(tmp_path, "math")
    assert [pq.ParquetFile(file).metadata.num_rows for file in files] == [4, 4, 1]
    records = list(iter_records(files, capability="math", quarantine=None))
    assert [(r.id, r.prompt, r.completion) for r in records][-1] == ("r8", "p8", "i")
    assert TargetWriter.rows_of(tmp_path, "math") == 9
    assert _writer(tmp_path).complete


def test_a_killed_extraction_continues_after_its_last_whole_file(tmp_path):
    whole = tmp_path / "whole"
    _write_all(_writer(whole), 0)
    writer = _writer(tmp_path / "cut")
    writer.write(_records(0, 6), [str(n) for n in range(6)])  # killed: two rows were never flushed
    again = _writer(tmp_path / "cut")
    assert again.rows == 4
    assert not again.complete
    _write_all(again, again.rows)
    for file in TargetWriter.files(whole, "math"):
        assert pq.read_table(file).equals(pq.read_table(tmp_path / "cut" / file.name))


def test_an_extraction_continues_behind_the_rows_that_its_teacher_could_not_take(tmp_path):
    writer = _writer(tmp_path)
    # Rows 1, 4 and 5 were rejected; the last two answers are lost with the process.
    writer.write(_records(0, 3), list("abc"), (0, 2, 3))
    writer.write(_records(3, 3), list("def"), (6, 7, 8))
    (tmp_path / ".math-00001.parquet.17.tmp").write_bytes(b"half a file")
    again = _writer(tmp_path)
    assert (again.rows, again.rows_read) == (4, 7)
    assert not list(tmp_path.glob(".*.tmp"))
    again.write(_records(4, 2), list("ef"))
    again.finish()
    assert _writer(tmp_path).rows_read == 9


@pytest.mark.parametrize("finished", [True, False])
def test_a_file_missing_in_the_middle_is_named_with_what_has_to_go_and_then_no_row_is_lost(tmp_path, finished):
    _write_all(_writer(tmp_path), 0)
    if not finished:
        (tmp_path / "math.json").unlink()
    (tmp_path / "math-00000.parquet").unlink()
    gone = ["math-00001.parquet", "math-00002.parquet", *(["math.json"] if finished else [])]
    with pytest.raises(ArtifactError, match=rf"found no math-00000\.parquet: .* Delete {', '.join(gone)} there"):
        _writer(tmp_path)
    for name in gone:
        (tmp_path / name).unlink()
    _write_all(_writer(tmp_path), 0)
    rows = [row for file in TargetWriter.files(tmp_path, "math") for row in pq.read_table(file)["id"].to_pylist()]
    assert rows == [record.id for record in _records(0, 10)]


def _write_all(writer: TargetWriter, first: int) -> None:
    writer.write(_records(first, 10 - first), [str(n) for n in range(first, 10)])
    writer.finish()


def test_targets_of_another_teacher_are_refused(tmp_path):
    _write_all(_writer(tmp_path), 0)
    with pytest.raises(ArtifactError, match="the teacher changed since"):
        _writer(tmp_path, fingerprint="g")


def test_a_foreign_or_broken_file_is_refused(tmp_path):
    (tmp_path / "math-00000.parquet").write_bytes(b"no parquet")
    with pytest.raises(ArtifactError, match="Delete the file"):
        check_targets(tmp_path / "math-00000.parquet", "f")


def test_a_disk_that_refuses_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    writer = _writer(tmp_path / "file")
    with pytest.raises(ArtifactError, match="Free disk space"):
        writer.write(_records(0, 4), list("abcd"))
