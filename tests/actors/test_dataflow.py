"""Ray Data streams rows to the teachers' actors: every readable row once, in file order, errors as themselves."""

from __future__ import annotations

import json
import threading
import time

import pytest

from actors.dataflow import READER, TeacherWork, _watched, stream_answers
from actors.pool import TeacherPool
from nexus.errors import DataError, StageFailedError


@pytest.fixture(scope="module")
def teacher(ray_cluster, reasoning_spec):
    pool, _ = TeacherPool.start(
        [reasoning_spec], torch_threads=1, num_gpus=0, window=2, timeout_s=120, max_retries=2, load_timeout_s=120
    )
    return pool


def _work(path, **changes) -> TeacherWork:
    values = {
        "teacher": "sample-reasoning",
        "capability": "reasoning",
        "paths": (str(path),),
        "skip_rows": 0,
        "max_rows": None,
        "method": "answer",
        "arguments": (2, None),
        "batch_size": 5,
    }
    return TeacherWork(**{**values, **changes})


def _stream(works, pool, tmp_path, bad_share=0.5):
    return stream_answers(
        works,
        pool=pool,
        quarantine_dir=tmp_path / "quarantine",
        max_bad_share=bad_share,
        timeout_s=60,
        name="test",
    )


def test_rows_of_all_files_arrive_once_in_order_and_bad_ones_are_quarantined(
    teacher, rows_file, rows_parquet, tmp_path
):
    works = [_work(rows_file), _work(rows_parquet, skip_rows=3, max_rows=7, batch_size=2)]
    seen: dict[int, list[str]] = {0: [], 1: []}
    for answer in _stream(works, teacher, tmp_path):
        assert len(answer.result) == len(answer.records)
        seen[answer.work] += [record.id for record in answer.records]
    assert seen[0] == [f"r{n}" for n in range(12)]
    assert seen[1] == [f"r{n}" for n in range(3, 10)]
    lines = [json.loads(line) for path in (tmp_path / "quarantine").iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == 1


def test_a_row_that_the_teacher_cannot_take_is_quarantined_and_the_others_are_answered(teacher, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"r{n}", "question": "six " * (400 if n == 2 else 1)}) + "\n" for n in range(4))
    )
    for skip_rows in range(5):  # continued behind any row, it neither repeats one nor leaves one out
        answers = list(_stream([_work(path, skip_rows=skip_rows)], teacher, tmp_path))
        found = [place for answer in answers for place in answer.positions]
        assert found == [place for place in (0, 1, 3) if place >= skip_rows]
        assert [record.id for answer in answers for record in answer.records] == [f"r{place}" for place in found]
        assert all(len(answer.result or ()) == len(answer.records) for answer in answers)
    lines = [json.loads(line) for line in (tmp_path / "quarantine" / "long.jsonl.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [3]
    assert "at most 256 tokens of the teacher" in lines[0]["reason"]


def test_too_many_rows_that_the_teacher_cannot_take_stop_the_stream(teacher, tmp_path):
    path = tmp_path / "longer.jsonl"
    path.write_text("".join(json.dumps({"question": "six " * (400 if n else 1)}) + "\n" for n in range(3)))
    with pytest.raises(DataError, match=r"at most 10\.00% bad rows in .*, found 2 of 3 \(row 2: .*tokens of the"):
        list(_stream([_work(path)], teacher, tmp_path, bad_share=0.1))
    # Of a file whose first rows alone were wanted nobody knows how many are bad.
    (answer,) = _stream([_work(path, max_rows=2)], teacher, tmp_path, bad_share=0.1)
    assert (len(answer.records), answer.num_rejected) == (1, 1)


def test_an_unreadable_file_is_its_own_clear_error(teacher, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        list(_stream([_work(tmp_path / "empty.jsonl")], teacher, tmp_path))


def test_too_many_bad_rows_stop_the_stream(teacher, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a?"}\n' + "{broken\n" * 9)
    with pytest.raises(DataError, match="bad"):
        list(_stream([_work(path)], teacher, tmp_path, bad_share=0.1))


def test_the_wait_for_a_batch_that_never_comes_ends_when_the_check_raises():
    class StopAsked(BaseException):
        pass

    free, asked = threading.Event(), threading.Event()

    def batches():
        yield {"work": [0]}
        free.wait(60)

    def check() -> None:
        if asked.is_set():
            raise StopAsked

    stream = _watched(batches(), check, 60)
    assert next(stream) == {"work": [0]}
    asked.set()
    with pytest.raises(StopAsked):
        next(stream)
    free.set()
    for thread in threading.enumerate():
        if thread.name == READER:
            thread.join(60)
            assert not thread.is_alive()


def test_rows_that_never_come_are_an_error_but_a_caller_may_take_its_time_between_two():
    free = threading.Event()

    def batches():
        yield {"work": [0]}
        yield {"work": [1]}
        free.wait(60)

    stream = _watched(batches(), None, 0.2)
    assert next(stream) == {"work": [0]}
    time.sleep(0.3)
    assert next(stream) == {"work": [1]}
    with pytest.raises(StageFailedError, match=r"Expected rows from Ray Data within 0 s, found none"):
        next(stream)
    free.set()


def test_an_error_behind_the_batches_is_raised_after_them():
    def batches():
        yield {"work": [0]}
        raise OSError("disk is gone")

    stream = _watched(batches(), None, 60)
    assert next(stream) == {"work": [0]}
    with pytest.raises(OSError, match="disk is gone"):
        next(stream)
