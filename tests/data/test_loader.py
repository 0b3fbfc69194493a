"""Streaming loaders: every row once, any resume exact, formats equal, memory flat, bad input told in one line."""

from __future__ import annotations

import csv
import gc
import json
import random
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nexus.data.loader as loader_module
from nexus.data.collate import TokenBatch
from nexus.data.loader import RecordBatches, SmartBatchLoader, check_unique_ids, iter_records
from nexus.data.quarantine import Quarantine, read_quarantine
from nexus.data.records import Media, Record
from nexus.data.samples.teacher_tokenizers import make_character_tokenizer
from nexus.errors import ArtifactError, DataError

TOKENIZER = make_character_tokenizer([])
FORMATS = ("parquet", "jsonl", "csv")
SAMPLES = Path(loader_module.__file__).parent / "samples"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)

Row = Mapping[str, object]


def write(path: Path, rows: Sequence[Row], *, row_group_size: int = 7) -> Path:
    """`rows` in the format of the path's ending; lists become JSON text in CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=row_group_size)
    elif path.suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in rows:
                writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()})
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int, seed: int = 0) -> list[Row]:
    """Rows of 10 to 45 tokens."""
    rng = random.Random(seed)
    return [{"question": f"{i}" + "+1" * rng.randint(1, 15), "answer": f"#### {i}"} for i in range(count)]


def make_loader(paths: Sequence[Path], **options) -> SmartBatchLoader:
    options = {
        "tokenizer": TOKENIZER,
        "batch_size": 4,
        "max_length": 64,
        "shuffle_seed": 0,
        "buffer_rows": 16,
    } | options
    return SmartBatchLoader(paths, **options)


def make_batches(paths: Sequence[Path], **options) -> RecordBatches:
    return RecordBatches(paths, **{"capability": "c", "batch_size": 4, "seed": 0, "buffer_rows": 16} | options)


def read(path: Path, quarantine: Quarantine | None = None) -> list[Record]:
    return list(iter_records([path], capability="c", quarantine=quarantine))


def ids(batches: Sequence[TokenBatch]) -> list[tuple[str, ...]]:
    return [batch.row_ids for batch in batches]


def assert_same_batches(left: Sequence[TokenBatch], right: Sequence[TokenBatch]) -> None:
    assert ids(left) == ids(right)
    for one, other in zip(left, right, strict=True):
        for name in ("input_ids_BT", "attention_mask_BT", "loss_mask_BT", "prompt_lengths_B"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.records == other.records


# --- reading ------------------------------------------------------------------------------------------------------------------

COLUMN_SETS: dict[str, Row] = {
    "messages": {"messages": [{"role": "user", "content": 'a,\n"b"'}, {"role": "assistant", "content": "c"}]},
    "prompt": {"id": "x", "prompt": "two\nlines", "completion": 'a "quoted", word'},
    "question": {"question": "q", "answer": "1+1=2\n#### 2"},
    "choices": {"question": "q", "choices": ["x", "y"], "answer": 1},
    "problem": {"problem": "p", "solution": r"\boxed{3}"},
    "instruction": {"instruction": "i", "input": "x", "output": "o"},
    "text": {"text": "h\u00e9llo \u4e16\u754c"},
    "contents": {"contents": "code"},
    "media path": {"prompt": "what?", "image": "image.png", "tower": "vision"},
}


@pytest.mark.parametrize("name", COLUMN_SETS)
def test_all_formats_give_equal_records(tmp_path: Path, name: str) -> None:
    (tmp_path / "image.png").write_bytes(PNG)
    unused = {"embedding": 1.5, "notes": "not read"}
    records = [read(write(tmp_path / f"rows.{ending}", [{**COLUMN_SETS[name], **unused}])) for ending in FORMATS]
    assert len(records[0]) == 1
    assert records[0] == records[1] == records[2]
    assert records[0][0].id in ("x", "rows:1")


def test_rows_without_an_id_are_named_by_file_and_row_also_where_file_names_agree(tmp_path: Path) -> None:
    row = [{"prompt": "p"}]
    paths = [write(tmp_path / name, row) for name in ("a/x.csv", "b/x.csv", "b/x.jsonl", "y.csv")]

    def names(*chosen: int) -> list[str]:
        files = [paths[index] for index in chosen]
        return [record.id for record in iter_records(files, capability="c", quarantine=None)]

    assert names(0, 3) == ["x:1", "y:1"]
    assert names(1, 2) == ["x.csv:1", "x.jsonl:1"]
    assert names(0, 1) == ["a/x.csv:1", "b/x.csv:1"]


def test_a_record_knows_its_file_and_row_counted_from_one(tmp_path: Path) -> None:
    for ending in FORMATS:
        path = write(tmp_path / f"rows.{ending}", sums(20))
        assert [(r.source.file, r.source.row) for r in read(path)] == [(str(path), row) for row in range(1, 21)]


def test_blank_lines_are_no_rows_and_keep_line_numbers_true(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "p"}\r\n\n  \n{"prompt": "q"}')
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfprompt,answer\r\n\r\np,1\r\n\r\n"q\r\nr",2')
    assert [(r.prompt, r.source.row) for r in read(tmp_path / "a.jsonl")] == [("p", 1), ("q", 4)]
    assert [(r.prompt, r.source.row) for r in read(tmp_path / "a.csv")] == [("p", 1), ("q\r\nr", 2)]


def test_media_paths_are_relative_to_the_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path / "sub" / "rows.jsonl", [{"prompt": "p", "image": "i.png"}, {"prompt": "p", "image": "none.png"}]
    )
    (path.parent / "i.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    quarantine = Quarantine(None, 1.0)
    assert [r.media for r in read(path, quarantine)] == [Media("image", str(path.parent / "i.png"))]
    assert quarantine.counts() == {str(path): 1}
    assert "No such file" in quarantine.first_reason()


def test_media_bytes_in_parquet_are_checked(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "image": {"bytes": data, "path": "i.png"}} for data in (PNG, b"text")]
    quarantine = Quarantine(None, 1.0)
    assert [r.media for r in read(write(tmp_path / "x.parquet", rows), quarantine)] == [Media("image", PNG)]
    assert "expected an image" in quarantine.first_reason()


def test_capability_comes_from_the_caller_else_from_the_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "p", "capability": "code"}, {"prompt": "p"}])
    assert [r.capability for r in iter_records([path], capability=None, quarantine=None)] == ["code", "text"]
    quarantine = Quarantine(None, 1.0)
    assert [r.capability for r in iter_records([path], capability="vision", quarantine=quarantine)] == ["vision"]
    assert "of capability 'vision', found 'code'" in quarantine.first_reason()


BAD_JSONL = [
    (b"{broken", "broken JSON at character 2"),
    (b"[1, 2]", "expected a JSON object, found list"),
    (b'{"prompt": "a\xff"}', "expected UTF-8 text in column 'prompt'"),
    (b'{"prompt": ' + b"[" * 100_000 + b"}", "cannot be read"),
    (b'{"prompt": 1' + b"0" * 5000 + b"}", "cannot be read"),
    (b'{"body": "x"}', "expected a value in one of the columns"),
]


@pytest.mark.parametrize(("line", "words"), BAD_JSONL, ids=range(len(BAD_JSONL)))
def test_a_broken_line_is_quarantined_with_its_number_and_the_next_is_read(
    tmp_path: Path, line: bytes, words: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "one"}\n' + line + b'\n{"prompt": "three"}\n')
    assert [r.prompt for r in read(path, Quarantine(tmp_path / "q", 1.0))] == ["one", "three"]
    [entry] = read_quarantine(tmp_path / "q")
    assert (entry.file, entry.row) == (str(path), 2)
    assert words in entry.reason


BAD_CSV = [
    (b"a,b,c", "expected 2 cells as in the header, found 3"),
    (b"a", "expected 2 cells as in the header, found 1"),
    (b'"a"b,c', "expected a CSV row, found ',' expected after '\"'"),
    (b"a\xff,b", "expected UTF-8 text in column 'prompt'"),
    (b",b", "expected a value in one of the columns"),
    (b"x" * 140_000 + b",b", "field larger than field limit"),
]


@pytest.mark.parametrize(("line", "words"), BAD_CSV, ids=range(len(BAD_CSV)))
def test_a_broken_csv_row_is_quarantined_and_the_next_is_read(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"prompt,answer\none,1\n" + line + b"\nthree,3\n")
    assert [r.prompt for r in read(path, Quarantine(tmp_path / "q", 1.0))] == ["one", "three"]
    [entry] = read_quarantine(tmp_path / "q")
    assert (entry.file, entry.row) == (str(path), 2)
    assert words in entry.reason


def test_a_quote_that_is_never_closed_costs_the_rest_of_the_file_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'prompt,answer\none,1\n"two,2\nthree,3\n')
    quarantine = Quarantine(None, 1.0)
    assert [r.prompt for r in read(path, quarantine)] == ["one"]
    assert "unexpected end of data" in quarantine.first_reason()


def test_a_line_too_long_to_hold_is_quarantined_and_the_next_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loader_module, "_MAX_LINE_BYTES", 64)
    for ending, lines in {
        "jsonl": [b'{"prompt": "one"}', b'{"prompt": "' + b"x" * 500 + b'"}', b'{"prompt": "three"}'],
        "csv": [b"one", b"x" * 500, b"three"],
    }.items():
        path = tmp_path / f"x.{ending}"
        path.write_bytes((b"prompt\n" if ending == "csv" else b"") + b"\n".join(lines))
        quarantine = Quarantine(None, 1.0)
        assert [(r.prompt, r.source.row) for r in read(path, quarantine)] == [("one", 1), ("three", 3)]
        assert "row 2" in quarantine.first_reason()
    path.write_bytes(b"prompt\none\n" + b"x" * 500)
    assert [r.prompt for r in read(path, Quarantine(None, 1.0))] == ["one"]


def test_without_a_quarantine_the_first_bad_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "one"}\n{broken\n')
    records = iter_records([path], capability="c", quarantine=None)
    assert next(records).prompt == "one"
    with pytest.raises(DataError, match=r"Expected readable rows in .*x\.jsonl, found row 2: expected a JSON object"):
        next(records)


def test_too_many_bad_rows_stop_the_reading_at_the_end_of_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "one"}\n' * 9 + "{broken\n")
    assert len(read(path, Quarantine(None, 0.1))) == 9
    with pytest.raises(DataError, match=r"at most 9\.00% bad rows in .*, found 1 of 10"):
        read(path, Quarantine(None, 0.09))


def test_too_many_bad_rows_stop_the_reading_of_a_large_file_early(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "one"}\n{broken\n' * 1000)
    records = iter_records([path], capability="c", quarantine=Quarantine(None, 0.1))
    assert len(list(islice(records, 500))) == 500
    with pytest.raises(DataError, match="found 500 of 1000"):
        next(records)


def test_a_file_of_bad_rows_only_is_an_error_at_any_share(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{broken\n")
    for take in (
        lambda: read(tmp_path / "x.jsonl", Quarantine(None, 1.0)),
        lambda: list(make_loader([tmp_path / "x.jsonl"])),
    ):
        with pytest.raises(
            DataError, match=r"Expected usable rows in .*, found only bad ones \(row 1: expected a JSON"
        ):
            take()


def broken_parquet(path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["p" * 100] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])


UNUSABLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("x.jsonl", lambda path: None, r"Expected a data file at .*x\.jsonl, found no such file\. Check"),
    "unknown ending": (
        "x.txt",
        lambda path: path.write_text("p"),
        r"ends in \.parquet, \.jsonl, \.ndjson, \.csv, found .*x\.txt\.",
    ),
    "a folder": ("x.csv", Path.mkdir, "found a folder or device. Name the files"),
    "a path too long": ("x" * 300 + ".csv", lambda path: None, r"Expected .*x\.csv, found"),
    "empty JSONL": ("x.jsonl", lambda path: path.touch(), "found an empty file"),
    "blank JSONL": ("x.jsonl", lambda path: path.write_text("\n \n"), "found only empty lines"),
    "empty Parquet": (
        "x.parquet",
        lambda path: pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path),
        "found a Parquet file with none",
    ),
    "no Parquet": (
        "x.parquet",
        lambda path: path.write_text("prompt\n" * 9),
        "Expected a readable Parquet file at .*, found: .*magic bytes",
    ),
    "half a Parquet": ("x.parquet", broken_parquet, "Expected a readable Parquet file"),
    "CSV without rows": ("x.csv", lambda path: path.write_text("prompt\n\n"), "Expected rows below the header"),
    "CSV without a header": ("x.csv", lambda path: path.write_text("\n\n"), "found none"),
    "CSV with a broken header": (
        "x.csv",
        lambda path: path.write_text('"prompt'),
        "Expected a header line in .*, found: unexpected end",
    ),
    "CSV with a double column": (
        "x.csv",
        lambda path: path.write_text("prompt,prompt\na,b\n"),
        "Expected each column once in .*, found 'prompt' twice",
    ),
    "CSV with semicolons": (
        "x.csv",
        lambda path: path.write_text("question;answer\na;b\n"),
        "found question;answer. Rename",
    ),
    "other columns in JSONL": (
        "x.jsonl",
        lambda path: path.write_text('{"body": 1, "b": 2}\n'),
        "Expected one of the columns messages, .*, found b, body. Rename",
    ),
    "other columns in Parquet": (
        "x.parquet",
        lambda path: pq.write_table(pa.table({"body": ["x"]}), path),
        "found body. Rename",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_file_is_one_line_before_the_first_row(tmp_path: Path, name: str) -> None:
    file, make, words = UNUSABLE[name]
    make(tmp_path / file)
    for use in (
        lambda: iter_records([tmp_path / file], capability="c", quarantine=None),
        lambda: make_loader([tmp_path / file]),
        lambda: make_batches([tmp_path / file]),
    ):
        with pytest.raises(DataError, match=words) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_no_file_and_a_file_named_twice_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", sums(1))
    with pytest.raises(DataError, match="at least one data file, found none"):
        make_loader([])
    with pytest.raises(DataError, match=r"found .*x\.csv twice"):
        make_loader([path, tmp_path / "." / "x.csv"])


def test_one_path_may_stand_without_a_list(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", sums(3))
    assert len(list(iter_records(path, capability="c", quarantine=None))) == 3
    assert len(list(iter_records(str(path), capability="c", quarantine=None))) == 3


def test_a_jsonl_file_may_begin_with_bad_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{broken\n{"body": 1}\n{"prompt": "p"}\n')
    assert [r.prompt for r in read(tmp_path / "x.jsonl", Quarantine(None, 1.0))] == ["p"]


def test_a_parquet_file_damaged_in_the_middle_is_an_error_when_it_is_reached(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", sums(400), row_group_size=100)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[at : at + 60] = b"\xff" * 60
    path.write_bytes(data)
    records = iter_records([path], capability="c", quarantine=Quarantine(None, 1.0))
    assert len(list(islice(records, 100))) == 100
    with pytest.raises(DataError, match=r"Expected a readable Parquet file at .*x\.parquet, found: .*[^.]\. Write"):
        list(records)


def test_a_set_that_lost_its_rows_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", sums(3))
    batches = make_batches([path])
    path.write_text("\n")
    with pytest.raises(DataError, match=r"Expected rows in .*x\.jsonl, found none\. Write at least one row"):
        batches.next_batch()


# --- ids ----------------------------------------------------------------------------------------------------------------------


def test_doubled_ids_are_found_and_named(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"id": name, "prompt": "p"} for name in "abc"])
    second = write(tmp_path / "b.csv", [{"id": name, "prompt": "p"} for name in "dbe"])
    assert check_unique_ids([first], capability="c", quarantine=None) == 3
    with pytest.raises(DataError, match=r"own id, found 'b' in row 2 of .*a\.jsonl and in row 2 of .*b\.csv\. Rename"):
        check_unique_ids([first, second], capability="c", quarantine=None)


def test_ids_that_only_share_a_hash_are_not_taken_for_doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": name, "prompt": "p"} for name in "abc"])
    monkeypatch.setattr(loader_module, "_hash_of", lambda text: 0)
    assert check_unique_ids([path], capability="c", quarantine=None) == 3


# --- SmartBatchLoader ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("num_rows", [1, 4, 15, 16, 17, 101])
def test_every_row_comes_exactly_once_per_epoch(tmp_path: Path, num_rows: int, shuffle_seed: int | None) -> None:
    rows = sums(num_rows)
    paths = [write(tmp_path / "a.parquet", rows), write(tmp_path / "b.jsonl", rows), write(tmp_path / "c.csv", rows)]
    loader = make_loader(paths, shuffle_seed=shuffle_seed)
    expected = sorted(f"{name}:{row}" for name in "abc" for row in range(1, num_rows + 1))
    for epoch in range(3):
        assert loader.epoch == epoch
        batches = ids(list(loader))
        assert sorted(name for batch in batches for name in batch) == expected
        assert {len(batch) for batch in batches[:-1]} <= {4}


def test_equal_seeds_give_equal_batches_and_other_seeds_and_epochs_another_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.parquet", sums(100)), write(tmp_path / "b.csv", sums(50))]
    loader = make_loader(paths)
    first, second = list(loader), list(loader)
    assert_same_batches(first, list(make_loader(paths)))
    assert ids(first) != ids(second)
    assert {frozenset(batch) for batch in ids(first)} != {frozenset(batch) for batch in ids(second)}
    assert ids(first) != ids(list(make_loader(paths, shuffle_seed=1)))


def test_without_a_seed_windows_keep_the_order_of_the_files(tmp_path: Path) -> None:
    loader = make_loader([write(tmp_path / "a.parquet", sums(100))], shuffle_seed=None)
    first, second = list(loader), list(loader)
    assert_same_batches(first, second)
    for window in range(0, len(first), 4):
        rows = sorted(record.source.row for batch in first[window : window + 4] for record in batch.records)
        assert rows == list(range(window * 4 + 1, window * 4 + 1 + len(rows)))


@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_bucketing_leaves_less_padding_than_the_order_of_the_file(tmp_path: Path, shuffle_seed: int | None) -> None:
    path = write(tmp_path / "a.parquet", sums(512))

    def padding(buffer_rows: int) -> float:
        batches = list(make_loader([path], shuffle_seed=shuffle_seed, buffer_rows=buffer_rows))
        tokens = sum(int(batch.attention_mask_BT.sum()) for batch in batches)
        return 1 - tokens / sum(batch.input_ids_BT.numel() for batch in batches)

    assert padding(4) > 0.2
    assert padding(256) < 0.05


def test_the_window_is_32_batches_unless_told_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(600))
    loader = make_loader([path], buffer_rows=None, batch_size=2, shuffle_seed=None)
    window = list(islice(loader, 32))
    assert sorted(record.source.row for batch in window for record in batch.records) == list(range(1, 65))


def test_rows_that_are_too_long_are_quarantined_with_both_lengths(tmp_path: Path) -> None:
    rows = [
        {"question": "short", "answer": "1"},
        {"question": "x" * 60, "answer": "abc"},
        {"question": "x" * 59, "answer": "abc"},
    ]
    loader = make_loader([write(tmp_path / "a.jsonl", rows)], quarantine_dir=tmp_path / "q")
    for _ in range(2):
        assert sorted(name for batch in loader for name in batch.row_ids) == ["a:1", "a:3"]
    [entry] = read_quarantine(tmp_path / "q")
    assert (entry.file, entry.row) == (str(tmp_path / "a.jsonl"), 2)
    assert "expected 1 to 64 tokens, found 65 (61 of the prompt, 4 of the completion) in row 'a:2'" in entry.reason


def test_rows_that_are_too_long_count_as_bad_when_their_file_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*sums(9), {"question": "x" * 100}])
    assert len(list(make_loader([path], max_bad_share=0.1))) == 3
    with pytest.raises(DataError, match="found 1 of 10"):
        list(make_loader([path], max_bad_share=0.05))


def test_each_bad_row_of_a_mixed_set_is_in_quarantine_once_after_many_epochs(tmp_path: Path) -> None:
    good = sums(40)
    lines = [json.dumps(row) for row in good]
    lines[10], lines[20] = "{", '{"question": 3}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    parquet = write(tmp_path / "b.parquet", [row if i % 9 else {"question": None} for i, row in enumerate(good)])
    loader = make_loader([tmp_path / "a.jsonl", parquet], quarantine_dir=str(tmp_path / "q"))
    for _ in range(3):
        assert sum(len(batch.row_ids) for batch in loader) == 38 + 35
    found = [(Path(entry.file).name, entry.row) for entry in read_quarantine(tmp_path / "q")]
    assert found == [("a.jsonl", 11), ("a.jsonl", 21), *(("b.parquet", row) for row in (1, 10, 19, 28, 37))]
    assert {
        name: len((tmp_path / "q" / f"{name}.jsonl").read_text().splitlines()) for name in ("a.jsonl", "b.parquet")
    } == {"a.jsonl": 2, "b.parquet": 5}
    assert sum(loader.quarantine.counts().values()) == 7


@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_resuming_at_any_batch_gives_what_an_undisturbed_run_gives(tmp_path: Path, shuffle_seed: int | None) -> None:
    rows = [*sums(8), {"question": "x" * 100}, *sums(5, seed=1)]
    paths = [write(tmp_path / f"{name}.{ending}", rows) for name, ending in zip("abc", FORMATS, strict=True)]
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("{broken\n\n")

    def rest_of_two_epochs(loader: SmartBatchLoader) -> list[TokenBatch | None]:
        batches: list[TokenBatch | None] = []
        while loader.epoch < 2:
            batches += [*loader, None]
        return batches

    loader = make_loader(paths, shuffle_seed=shuffle_seed)
    undisturbed: list[TokenBatch | None] = []
    states = [loader.state_dict()]
    while loader.epoch < 2:
        for batch in loader:
            undisturbed.append(batch)
            states.append(loader.state_dict())
        undisturbed.append(None)
        states.append(loader.state_dict())
    for index, state in enumerate(states[:-1]):
        resumed = make_loader(paths, shuffle_seed=shuffle_seed)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        rest = rest_of_two_epochs(resumed)
        assert [batch is None for batch in rest] == [batch is None for batch in undisturbed[index:]]
        assert_same_batches([b for b in rest if b], [b for b in undisturbed[index:] if b])


def test_a_loader_may_be_sent_back_and_a_left_loop_continues(tmp_path: Path) -> None:
    loader = make_loader([write(tmp_path / "a.csv", sums(50))])
    start = loader.state_dict()
    whole = list(loader)
    loader.load_state_dict(start)
    head = list(islice(loader, 5))
    assert_same_batches([*head, *loader], whole)


def test_an_interrupt_while_reading_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", sums(60))
    expected = list(make_loader([path]))
    loader = make_loader([path])
    calls = 0
    original = loader_module.normalise_row

    def interrupted(*args, **kwargs) -> Record:
        nonlocal calls
        calls += 1
        if calls in (5, 37):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(loader_module, "normalise_row", interrupted)
    batches: list[TokenBatch] = []
    interrupts = 0
    while loader.epoch == 0:
        try:
            batches += iter(loader)
        except KeyboardInterrupt:
            interrupts += 1
            loader.load_state_dict(loader.state_dict())
        else:
            break
    assert interrupts == 2
    assert_same_batches(batches, expected[-len(batches) :])


def test_next_after_an_interrupt_continues_without_a_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", sums(60))
    undisturbed, batches = make_batches([path]), make_batches([path])
    wanted = [undisturbed.next_batch() for _ in range(40)]
    original, calls = loader_module.normalise_row, 0

    def interrupted(*args, **kwargs) -> Record:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(loader_module, "normalise_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batches.next_batch()
    assert [batches.next_batch() for _ in range(40)] == wanted


CHANGES: dict[str, tuple[dict[str, object], str]] = {
    "seed": ({"shuffle_seed": 1}, "shuffle_seed 1, found 0"),
    "batch size": ({"batch_size": 2}, "batch_size 2, found 4"),
    "length": ({"max_length": 63}, "max_length 63, found 64"),
    "window": ({"buffer_rows": 20}, "buffer_rows 20, found 16"),
    "tokenizer": ({"tokenizer": make_character_tokenizer(["\u00e4"])}, "vocabulary 100, found 99"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_state_of_other_settings_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.csv", sums(5))
    options, words = CHANGES[name]
    with pytest.raises(ArtifactError, match=f"Expected a loader state with {words}"):
        make_loader([path], **options).load_state_dict(make_loader([path]).state_dict())


def test_the_state_of_other_files_or_no_state_is_refused(tmp_path: Path) -> None:
    loader = make_loader([write(tmp_path / "a.csv", sums(5))])
    state = loader.state_dict()
    with pytest.raises(ArtifactError, match=r"with files \[\['a.csv', \d+\]\], found \[\['b.csv', \d+\]\]"):
        loader.load_state_dict(make_loader([write(tmp_path / "b.csv", sums(5))]).state_dict())
    for damage in ({"epoch": -1}, {"taken": "3"}, {"offset": None}, {"settings": None}):
        with pytest.raises(ArtifactError, match="Expected a loader state with"):
            loader.load_state_dict(state | damage)
    assert len(list(loader)) == 2


def test_a_state_does_not_change_when_the_loader_goes_on(tmp_path: Path) -> None:
    loader = make_loader([write(tmp_path / "a.csv", sums(50))])
    state = loader.state_dict()
    before = json.dumps(state)
    list(loader)
    assert json.dumps(state) == before


def test_padding_goes_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", sums(8))
    left, right = (next(iter(make_loader([path], buffer_rows=4, padding_side=side))) for side in ("left", "right"))
    assert left.attention_mask_BT[:, -1].all()
    assert right.attention_mask_BT[:, 0].all()
    assert torch.equal(left.attention_mask_BT.flip(1), right.attention_mask_BT)


def test_heavy_rows_close_a_window_early_at_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "p", "image": PNG + bytes(1000)} for _ in range(50)]
    path = write(tmp_path / "a.parquet", rows)
    monkeypatch.setattr(loader_module, "WINDOW_BYTES", 5000)
    monkeypatch.setattr(loader_module, "CHUNK_ROWS", 3)
    loader = make_loader([path], shuffle_seed=None, buffer_rows=48)
    batches = list(loader)
    assert [len(batch.row_ids) for batch in batches] == [4] * 12 + [2]
    for window in range(0, 12, 2):  # 5000 bytes are passed at 6 rows, and a whole batch at 8
        rows_of_window = [record.source.row for batch in batches[window : window + 2] for record in batch.records]
        assert sorted(rows_of_window) == list(range(window * 4 + 1, window * 4 + 9))


def test_a_tokenizer_without_an_end_token_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_character_tokenizer([])
    tokenizer.eos_token = None
    loader = make_loader([write(tmp_path / "a.csv", sums(50))], tokenizer=tokenizer)
    list(loader)
    assert caplog.text.count("no end-of-sequence token") == 1


def test_sizes_and_seeds_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", sums(5))
    for options, words in (
        ({"batch_size": 0}, "batch_size of at least 1, found 0"),
        ({"max_length": 0}, "max_length"),
        ({"buffer_rows": 0}, "buffer_rows"),
        ({"shuffle_seed": -1}, "a seed of at least 0, found -1"),
    ):
        with pytest.raises(ValueError, match=words):
            make_loader([path], **options)
    with pytest.raises(ValueError, match="batch_size"):
        make_batches([path], batch_size=0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    batch_size=st.integers(1, 6),
    buffer_rows=st.integers(1, 50),
    seed=st.none() | st.integers(0, 5),
    stop=st.integers(0, 15),
    chunk=st.integers(1, 9),
)
def test_any_shape_gives_each_row_once_across_a_resume(
    tmp_path, monkeypatch, sizes, batch_size, buffer_rows, seed, stop, chunk
) -> None:
    monkeypatch.setattr(loader_module, "CHUNK_ROWS", chunk)
    paths = [write(tmp_path / f"{i}-{size}.{FORMATS[i]}", sums(size), row_group_size=5) for i, size in enumerate(sizes)]
    options = {"batch_size": batch_size, "buffer_rows": buffer_rows, "shuffle_seed": seed}
    loader = make_loader(paths, **options)
    head = list(islice(loader, stop))
    resumed = make_loader(paths, **options)
    resumed.load_state_dict(loader.state_dict())
    tail = list(loader) if loader.epoch == 0 else []
    again = list(resumed) if resumed.epoch == 0 else []
    assert_same_batches(tail, again)
    assert sorted(name for batch in [*head, *tail] for name in batch.row_ids) == sorted(
        f"{path.stem}:{row}" for path, size in zip(paths, sizes, strict=True) for row in range(1, size + 1)
    )


# --- RecordBatches ------------------------------------------------------------------------------------------------------------


def test_record_batches_have_one_size_and_give_each_row_once_per_epoch(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.parquet", sums(30)), write(tmp_path / "b.csv", sums(17))]
    batches = make_batches(paths)
    taken = [batches.next_batch() for _ in range(47)]
    assert {len(batch) for batch in taken} == {4}
    assert batches.epoch == 3
    names = [record.id for batch in taken for record in batch]
    for epoch in range(4):
        assert len(set(names[epoch * 47 : epoch * 47 + 47])) == 47
    assert names[:47] != names[47:94]


def test_a_set_smaller_than_a_batch_repeats_its_rows(tmp_path: Path) -> None:
    batches = make_batches([write(tmp_path / "a.csv", sums(3))], batch_size=6)
    assert sorted(record.id for record in batches.next_batch()) == ["a:1", "a:1", "a:2", "a:2", "a:3", "a:3"]


def test_record_batches_resume_exactly_from_any_batch(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.parquet", sums(30)), write(tmp_path / "b.jsonl", sums(17))]
    batches = make_batches(paths, seed=5)
    states, undisturbed = [], []
    for _ in range(40):
        states.append(json.dumps(batches.state_dict()))
        undisturbed.append(batches.next_batch())
    for index, state in enumerate(states):
        resumed = make_batches(paths, seed=5)
        resumed.load_state_dict(json.loads(state))
        assert [resumed.next_batch() for _ in range(40 - index)] == undisturbed[index:]
    with pytest.raises(ArtifactError, match="with seed 6, found 5"):
        make_batches(paths, seed=6).load_state_dict(json.loads(states[0]))


def test_record_batches_pass_over_bad_rows_where_a_quarantine_takes_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*sums(5), {"question": ""}])
    quarantine = Quarantine(tmp_path / "q", 1.0)
    batches = make_batches([path], quarantine=quarantine, batch_size=5)
    assert sorted(record.id for record in batches.next_batch()) == [f"a:{row}" for row in range(1, 6)]
    assert quarantine.counts() == {str(path): 1}
    with pytest.raises(DataError, match="row 6: expected text in column 'question', found it empty"):
        make_batches([path], batch_size=5).next_batch()


def test_the_shuffle_reaches_across_the_whole_window(tmp_path: Path) -> None:
    batches = make_batches([write(tmp_path / "a.jsonl", sums(400))], batch_size=100, buffer_rows=400)
    epochs = [[record.source.row for _ in range(4) for record in batches.next_batch()] for _ in range(3)]
    displacement = [sum(abs(row - place) for place, row in enumerate(rows)) / 400 for rows in epochs]
    assert max(displacement) > 60  # 133 is expected of a full window, 0 of none


# --- memory -------------------------------------------------------------------------------------------------------------------


def peak_of_batching(path: Path) -> int:
    """Peak bytes of Python and NumPy while a whole epoch is read."""
    loader = SmartBatchLoader([path], tokenizer=TOKENIZER, batch_size=4, max_length=128, shuffle_seed=0)
    gc.collect()
    tracemalloc.start()
    try:
        for _ in loader:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def random_texts(rows: int, num_bytes: int) -> list[Row]:
    """Rows of equal length that no codec makes smaller than half."""
    return [{"id": f"{i:06d}", "question": random.Random(i).randbytes(num_bytes).hex()} for i in range(rows)]


@pytest.mark.parametrize("ending", FORMATS)
def test_ten_times_the_rows_need_no_more_memory(tmp_path: Path, ending: str) -> None:
    warm, small, large = (
        write(tmp_path / f"{n}.{ending}", random_texts(n, 8), row_group_size=n) for n in (100, 400, 4000)
    )
    peak_of_batching(warm)  # what libraries keep for good is allocated here
    # 64 KiB for what a coverage tracer allocates meanwhile; holding the 3,600 further rows would take ten times that.
    assert peak_of_batching(large) < 1.1 * peak_of_batching(small) + 2**16


def test_reading_parquet_holds_pages_and_not_the_row_group(tmp_path: Path) -> None:
    def peak_of_reading(num_rows: int) -> int:
        path = tmp_path / f"{num_rows}.parquet"
        table = pa.Table.from_pylist([dict(row) for row in random_texts(num_rows, 400)]).select(["question"])
        pages = {"data_page_size": 32 << 10, "write_batch_size": 16, "use_dictionary": False}
        pq.write_table(table, path, row_group_size=num_rows, **pages)
        base = pa.total_allocated_bytes()
        return max(pa.total_allocated_bytes() - base for _ in iter_records([path], capability="c", quarantine=None))

    small, large = peak_of_reading(500), peak_of_reading(5000)
    assert 0 < large <= 1.1 * small
    assert large < 5000 * 800 / 10


# --- the sample data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", ["reasoning", "code", "vision", "audio"])
def test_the_sample_data_reads_without_a_bad_row(capability: str) -> None:
    files = {split: SAMPLES / capability / f"{split}.parquet" for split in ("pool", "labelled", "test")}
    pool, labelled, test = (
        list(iter_records([path], capability=capability, quarantine=None)) for path in files.values()
    )
    assert len(pool) >= 4000
    assert len(labelled) == 50
    assert len(test) == 500
    assert all(record.completion is None and record.answer is None for record in pool)
    assert all(record.answer and record.completion for record in labelled + test)
    kinds = {"vision": {"image"}, "audio": {"audio"}}.get(capability, {None})
    assert {record.media.kind if record.media else None for record in pool + labelled + test} == kinds
    assert check_unique_ids(list(files.values()), capability=capability, quarantine=None) == len(pool) + 550


def test_the_gold_of_a_sample_word_problem_is_its_last_number() -> None:
    for record in iter_records([SAMPLES / "reasoning" / "test.parquet"], capability="reasoning", quarantine=None):
        assert record.completion.endswith(f"#### {record.answer}")
        assert int(record.answer) == int(record.completion.splitlines()[-2].split("=")[-1])
