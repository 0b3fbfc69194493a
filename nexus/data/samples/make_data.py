"""Makes the sample data of the quickstart: `<capability>/{teacher_train,pool,labelled,test}.parquet` beside this file.

Run as `python nexus/data/samples/make_data.py [--only CAPABILITY]`; the result is the same every time. Speech needs the
espeak-ng program, digit scans need scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

from nexus.data.samples import digit_images, expressions, splits, spoken_digits, word_problems  # noqa: E402

# What the teachers' own files hold: text teachers see nothing else; vision composes further images from the same scans.
NUM_TEACHER_TRAIN = {"reasoning": 40_000, "code": 40_000, "vision": 3_000, "audio": 6_000}
# Readers stream row groups; small ones keep a reader's memory small and still compress well.
_ROW_GROUP_SIZE = 1024
Row = dict[str, Any]


def main() -> None:
    """Writes the files of every capability, or of the one named by `--only`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(_MAKERS), help="make this capability's files only")
    only = parser.parse_args().only
    for capability, make in _MAKERS.items():
        if only in (None, capability):
            make(capability)
    total = sum(path.stat().st_size for path in HERE.glob("*/*.parquet"))
    print(f"all data files: {total / 1e6:.2f} MB")


def make_text(capability: str) -> None:
    """Writes reasoning or code: distinct prompts, split by a hash of the prompt."""
    draw, prompt, completion = {
        "reasoning": (word_problems.draw_problem, "question", "answer"),
        "code": (expressions.draw_expression, "prompt", "completion"),
    }[capability]
    rng = np.random.default_rng(0)
    student = splits.draw_distinct(draw, "student", splits.NUM_POOL[capability] + splits.NUM_LABELLED, rng)
    by_split = {
        "teacher_train": splits.draw_distinct(draw, "teacher", NUM_TEACHER_TRAIN[capability], rng),
        "pool": student[splits.NUM_LABELLED :],
        "labelled": student[: splits.NUM_LABELLED],
        "test": splits.draw_distinct(draw, "test", splits.NUM_TEST, rng),
    }
    for split, pairs in by_split.items():
        write(capability, split, [{prompt: text, completion: answer} for text, answer in pairs], completion)


def make_vision(capability: str) -> None:
    """Writes images of two digits; the three sets of scans are disjoint, no image occurs twice."""
    rng = np.random.default_rng(0)
    seen: set[bytes] = set()
    for split, count in _counts(capability):
        scans = digit_images.scans_of(_SOURCES[split])
        rows: list[Row] = []
        while len(rows) < count:
            first, second = rng.integers(len(scans.ids_S), size=2)
            image = digit_images.encode_png(
                digit_images.place_pair(scans.pixels_SHW[first], scans.pixels_SHW[second], rng)
            )
            if image in seen:
                continue
            seen.add(image)
            question = digit_images.QUESTIONS[rng.integers(len(digit_images.QUESTIONS))]
            answer = str(scans.labels_S[first] + scans.labels_S[second])
            scan_ids = [int(scans.ids_S[first]), int(scans.ids_S[second])]
            rows.append({"image": image, "question": question, "answer": answer, "scan_ids": scan_ids})
        write(capability, split, rows, "answer")


def make_audio(capability: str) -> None:
    """Writes spoken digits; the three sets of voices are disjoint, no recording occurs twice."""
    rng = np.random.default_rng(0)
    seen: set[bytes] = set()
    for split, count in _counts(capability):
        voices = [
            f"{accent}+{variant}"
            for variant in spoken_digits.variants_of(_SOURCES[split])
            for accent in spoken_digits.ACCENTS
        ]
        rows: list[Row] = []
        with ThreadPoolExecutor() as threads:
            while len(rows) < count:
                # A tenth more than needed: some recordings are too long or repeat another.
                takes = [
                    (
                        int(rng.integers(10)),
                        str(rng.choice(voices)),
                        int(rng.integers(130, 221)),
                        int(rng.integers(15, 86)),
                    )
                    for _ in range((count - len(rows)) * 11 // 10 + 1)
                ]
                for (digit, voice, _, _), clip in zip(takes, threads.map(_record, takes), strict=True):
                    if clip is None or clip in seen or len(rows) == count:
                        continue
                    seen.add(clip)
                    question = spoken_digits.QUESTIONS[rng.integers(len(spoken_digits.QUESTIONS))]
                    answer = spoken_digits.DIGITS[digit]
                    rows.append({"audio": clip, "question": question, "answer": answer, "voice": voice})
        write(capability, split, rows, "answer")


def write(capability: str, split: str, rows: list[Row], answer_column: str) -> None:
    """Writes one file with ids such as "reasoning-pool-00012"; the pool gets no answer, nor what would tell it."""
    hidden = {answer_column, "scan_ids"} if split == "pool" else set()
    columns: dict[str, list[Any]] = {"id": [f"{capability}-{split}-{index:05d}" for index in range(len(rows))]}
    for name in rows[0]:
        if name not in hidden:
            columns[name] = [row[name] for row in rows]
    path = HERE / capability / f"{split}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="zstd", compression_level=19, row_group_size=_ROW_GROUP_SIZE)
    print(f"{path.relative_to(HERE)}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB", flush=True)


def _record(take: tuple[int, str, int, int]) -> bytes | None:
    digit, voice, words_per_minute, pitch = take
    samples = spoken_digits.synthesise(spoken_digits.DIGITS[digit], voice, words_per_minute, pitch)
    return None if samples is None else spoken_digits.encode_opus(samples)


def _counts(capability: str) -> list[tuple[str, int]]:
    return [
        ("teacher_train", NUM_TEACHER_TRAIN[capability]),
        ("pool", splits.NUM_POOL[capability]),
        ("labelled", splits.NUM_LABELLED),
        ("test", splits.NUM_TEST),
    ]


_SOURCES = {"teacher_train": "teacher", "pool": "student", "labelled": "student", "test": "test"}
_MAKERS = {"reasoning": make_text, "code": make_text, "vision": make_vision, "audio": make_audio}

if __name__ == "__main__":
    main()
