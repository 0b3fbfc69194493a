"""The shipped sample data and teachers: sizes, disjoint splits, true answers, and weights that NF4 can hold."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
)

import nexus.data.samples
from nexus.data.media import add_noise, decode_audio, decode_image
from nexus.data.samples import digit_images, expressions, splits, spoken_digits, word_problems
from nexus.data.samples.teacher_tokenizers import make_character_tokenizer, train_bpe

SAMPLES = Path(nexus.data.samples.__file__).parent
CAPABILITIES = ("reasoning", "code", "vision", "audio")
SPLITS = ("teacher_train", "pool", "labelled", "test")
CONTENT = {"reasoning": "question", "code": "prompt", "vision": "image", "audio": "audio"}
ANSWER = {"reasoning": "answer", "code": "completion", "vision": "answer", "audio": "answer"}
SOURCES = {"teacher_train": "teacher", "pool": "student", "labelled": "student", "test": "test"}
AUTO_CLASSES = {
    "sample-reasoning": AutoModelForCausalLM,
    "sample-code": AutoModelForCausalLM,
    "sample-vision": AutoModelForImageClassification,
    "sample-audio": AutoModelForAudioClassification,
}


def read(capability: str, split: str) -> list[dict]:
    return pq.read_table(SAMPLES / capability / f"{split}.parquet").to_pylist()


def teacher(name: str) -> nn.Module:
    return AUTO_CLASSES[name].from_pretrained(SAMPLES / "teachers" / name, dtype=torch.float32).eval()


def test_all_data_files_together_stay_within_fourteen_megabytes() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.glob("*/*.parquet")) <= 14e6


def test_all_teacher_files_together_stay_within_six_megabytes() -> None:
    folder = SAMPLES / "teachers"
    assert sorted(path.name for path in folder.iterdir()) == sorted(AUTO_CLASSES)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 6e6


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_has_its_four_files_with_the_promised_numbers_of_rows(capability: str) -> None:
    assert sorted(path.stem for path in (SAMPLES / capability).iterdir()) == sorted(SPLITS)
    assert len(read(capability, "pool")) == {"reasoning": 4000, "code": 5000, "vision": 6000, "audio": 4000}[capability]
    assert len(read(capability, "labelled")) == 50
    assert len(read(capability, "test")) == 500
    assert len(read(capability, "teacher_train")) >= 3000


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_pool_has_no_answer_and_the_other_files_have_one_in_every_row(capability: str) -> None:
    visible = {"reasoning": {"question"}, "code": {"prompt"}, "vision": {"image", "question"}}
    pool = set(pq.read_schema(SAMPLES / capability / "pool.parquet").names)
    assert pool == {"id"} | visible.get(capability, {"audio", "question", "voice"})
    for split in ("teacher_train", "labelled", "test"):
        assert all(row[ANSWER[capability]] for row in read(capability, split))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_id_and_no_content_occurs_twice_in_or_across_splits(capability: str) -> None:
    rows = [(split, row) for split in SPLITS for row in read(capability, split)]
    assert all(row["id"].startswith(f"{capability}-{split}-") for split, row in rows)
    assert len({row["id"] for _, row in rows}) == len(rows)
    assert len({row[CONTENT[capability]] for _, row in rows}) == len(rows)


@pytest.mark.parametrize("capability", ["reasoning", "code"])
def test_every_text_is_in_the_split_that_its_hash_names(capability: str) -> None:
    for split in SPLITS:
        assert {splits.split_of(row[CONTENT[capability]]) for row in read(capability, split)} == {SOURCES[split]}


def test_the_split_of_a_text_is_fixed_by_the_first_eight_bytes_of_its_sha256() -> None:
    for text in ("print(1+2-3)", "", "é", "How many eggs?"):
        bucket = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 100
        assert splits.split_of(text) == ("teacher" if bucket < 50 else "student" if bucket < 85 else "test")


@pytest.mark.parametrize(
    ("capability", "draw"), [("reasoning", word_problems.draw_problem), ("code", expressions.draw_expression)]
)
def test_drawing_again_gives_the_shipped_rows_of_the_student(capability: str, draw: Callable) -> None:
    shipped = read(capability, "labelled")
    drawn = splits.draw_distinct(draw, "student", len(shipped), np.random.default_rng(0))
    assert drawn == [(row[CONTENT[capability]], row[ANSWER[capability]]) for row in shipped]


@pytest.mark.parametrize("split", ["teacher_train", "pool", "test"])
def test_every_kind_of_expression_is_in_every_large_file(split: str) -> None:
    prompts = [row["prompt"] for row in read("code", split)]
    parts = [
        "00+",
        "100*",
        "len(",
        "max(",
        "min(",
        "sorted(",
        "][",
        "]+[",
        '"+"',
        '"*',
        "[::-1]",
        '"[',
        ":]",
        "[:",
        "<",
        ">",
    ]
    assert [part for part in parts if not any(part in prompt for prompt in prompts)] == []


def test_every_gold_number_follows_from_the_steps_of_its_answer() -> None:
    for split in ("teacher_train", "labelled", "test"):
        for row in read("reasoning", split)[:2000]:
            *steps, last = row["answer"].split("\n")
            results = [(eval(left), int(right)) for left, right in (step.split("=") for step in steps)]
            assert all(computed == stated for computed, stated in results)
            assert len(steps) == 2
            assert last == f"#### {results[-1][1]}"
            assert word_problems.gold_of(row["answer"]) == str(results[-1][1])


def test_the_gold_of_a_text_without_the_mark_is_empty() -> None:
    assert word_problems.gold_of("12+7=19") == ""
    assert word_problems.gold_of("#### 3 \n#### 14 ") == "14"


@pytest.mark.parametrize("split", ["teacher_train", "labelled", "test"])
def test_every_completion_is_what_python_prints(split: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read("code", split)[:3000]
    for row in rows:
        exec(row["prompt"], {})
    assert capsys.readouterr().out.splitlines() == [row["completion"] for row in rows]
    assert all(len(row["prompt"]) <= 32 for row in rows)
    assert all(len(row["completion"]) <= 9 for row in rows)
    assert all(expressions.evaluate(row["prompt"]) == row["completion"] for row in rows[:100])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_always_giving_the_commonest_answer_is_far_from_enough(capability: str) -> None:
    answers = [row[ANSWER[capability]].split("####")[-1] for row in read(capability, "test")]
    assert Counter(answers).most_common(1)[0][1] / len(answers) < 0.2


def test_scans_are_shared_out_without_overlap() -> None:
    scans = {split: digit_images.scans_of(split) for split in ("teacher", "student", "test")}
    ids = np.concatenate([part.ids_S for part in scans.values()])
    assert len(set(ids.tolist())) == len(ids) == 1797
    pixels = {part.tobytes() for split in scans.values() for part in split.pixels_SHW}
    assert len(pixels) == 1797, "no scan is a copy of another"


@pytest.mark.parametrize("split", SPLITS)
def test_images_hold_two_scans_of_their_own_split_and_of_no_other(split: str) -> None:
    digit_of = {}
    for source in ("teacher", "student", "test"):
        scans = digit_images.scans_of(source)
        for pixels, label in zip(scans.pixels_SHW, scans.labels_S, strict=True):
            digit_of[pixels.tobytes()] = (source, int(label))
    layouts = [((0, 8), range(9)), (range(9), (0, 8))]
    for row in read("vision", split)[:1000]:
        image = Image.open(io.BytesIO(row["image"]))
        assert (image.mode, image.size, image.format) == ("L", (16, 16), "PNG")
        pixels = np.asarray(image)
        windows = {(y, x) for ys, xs in layouts for y in ys for x in xs}
        found = [digit_of.get(pixels[y : y + 8, x : x + 8].tobytes()) for y, x in windows]
        known = [hit for hit in found if hit is not None]
        assert len(known) >= 2
        assert {source for source, _ in known} == {SOURCES[split]}
        if split != "pool" and len(known) == 2:
            assert row["answer"] == str(sum(label for _, label in known))


def test_a_pair_of_scans_never_overlaps_and_lands_in_many_places() -> None:
    rng = np.random.default_rng(0)
    first, second = np.full((8, 8), 1, np.uint8), np.full((8, 8), 2, np.uint8)
    images = [digit_images.place_pair(first, second, rng) for _ in range(400)]
    assert all((image == 1).sum() == 64 and (image == 2).sum() == 64 for image in images)
    assert len({image.tobytes() for image in images}) > 100


def test_scans_are_neither_turned_nor_mirrored_when_placed() -> None:
    rng = np.random.default_rng(0)
    first, second = np.arange(1, 65, dtype=np.uint8).reshape(8, 8), np.arange(101, 165, dtype=np.uint8).reshape(8, 8)
    for _ in range(50):
        image = digit_images.place_pair(first, second, rng)
        y, x = np.argwhere(image == 1)[0]
        assert np.array_equal(image[y : y + 8, x : x + 8], first)


def test_no_voice_is_heard_in_two_splits_and_eighteen_or_more_are_kept_for_the_test() -> None:
    variants = {
        split: {row["voice"].split("+")[1] for row in read("audio", split)}
        for split in ("teacher_train", "pool", "test")
    }
    variants["pool"] |= {row["voice"].split("+")[1] for row in read("audio", "labelled")}
    assert sum(map(len, variants.values())) == len(set().union(*variants.values()))
    assert len(variants["test"]) >= 18
    for split in ("teacher_train", "pool", "test"):
        assert variants[split] <= set(spoken_digits.variants_of(SOURCES[split]))


@pytest.mark.parametrize("split", SPLITS)
def test_clips_are_short_mono_opus_at_eight_kilohertz(split: str) -> None:
    for row in read("audio", split)[:300]:
        information = soundfile.info(io.BytesIO(row["audio"]))
        assert (information.samplerate, information.channels, information.subtype) == (8000, 1, "OPUS")
        assert 0.1 <= information.duration <= 0.8
        assert row["audio"][14:18] == (1).to_bytes(4, "little")
        assert row["voice"].count("+") == 1


def test_encoding_a_clip_twice_gives_the_same_bytes() -> None:
    samples = 0.5 * np.sin(np.arange(4000) * 0.3)
    first = spoken_digits.encode_opus(samples)
    assert spoken_digits.encode_opus(samples) == first
    # libogg checks each page's checksum, so a decoded clip proves that they were renewed rightly.
    assert np.corrcoef(decode_audio(first, 8000)[:4000], samples)[0, 1] > 0.5


@pytest.mark.parametrize("capability", ["vision", "audio"])
def test_questions_are_varied_and_answers_are_the_capabilitys_words(capability: str) -> None:
    rows = read(capability, "labelled") + read(capability, "test")
    questions, answers = {
        "vision": (digit_images.QUESTIONS, {str(total) for total in range(19)}),
        "audio": (spoken_digits.QUESTIONS, set(spoken_digits.DIGITS)),
    }[capability]
    assert {row["question"] for row in rows} == set(questions)
    assert {row["answer"] for row in rows} == answers


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_every_linear_reads_a_multiple_of_sixty_four_so_that_nf4_is_right(name: str) -> None:
    linears = [module for module in teacher(name).modules() if isinstance(module, nn.Linear)]
    assert len(linears) >= 12
    assert {linear.in_features % 64 for linear in linears} == {0}


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_no_teachers_weight_is_missing_left_over_or_not_finite(name: str) -> None:
    folder = SAMPLES / "teachers" / name
    model, information = AUTO_CLASSES[name].from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    assert not information["mismatched_keys"]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("name", ["sample-reasoning", "sample-code"])
def test_tokenizers_round_trip_all_samples_and_pad_on_the_left(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SAMPLES / "teachers" / name)
    capability = name.removeprefix("sample-")
    for row in read(capability, "test"):
        text = f"{row[CONTENT[capability]]}\n{row[ANSWER[capability]]}"
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    batch = tokenizer(["1", "1+1"], padding=True)
    assert batch.input_ids[0][:2] == [tokenizer.pad_token_id] * 2


def test_the_shared_tokenizer_keeps_digits_and_capitals_apart_and_encodes_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SAMPLES / "teachers" / "sample-reasoning")
    assert len(tokenizer("120").input_ids) == 3
    assert len(tokenizer('"ABC"').input_ids) >= 4
    text = "Grüße, 世界 \U0001f600 \t\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) <= 512


def test_the_shipped_bpe_tokenizer_is_the_one_that_its_maker_trains() -> None:
    shipped = AutoTokenizer.from_pretrained(SAMPLES / "teachers" / "sample-reasoning")
    problems = [f"{row['question']}\n{row['answer']}" for row in read("reasoning", "teacher_train")[:10_000]]
    code = [f"{row['prompt']}\n{row['completion']}" for row in read("code", "teacher_train")[:10_000]]
    questions = [f"{text}\n" for text in (*digit_images.QUESTIONS, *spoken_digits.QUESTIONS)] * 200
    again = train_bpe([*problems, *code, *questions, *(list(spoken_digits.DIGITS) * 200)])
    assert again.get_vocab() == shipped.get_vocab()
    text = 'Tom has 12 apples.\nprint(len("ABC"))'
    assert again(text).input_ids == shipped(text).input_ids


def test_the_character_tokenizer_knows_ascii_and_what_its_texts_add() -> None:
    tokenizer = make_character_tokenizer(["é"])
    assert tokenizer.decode(tokenizer("Aé\n ~").input_ids) == "Aé\n ~"
    assert tokenizer("世").input_ids == [tokenizer.unk_token_id]


def test_reasoning_texts_are_short_in_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SAMPLES / "teachers" / "sample-reasoning")
    rows = read("reasoning", "test")
    assert max(len(tokenizer(row["question"] + "\n").input_ids) for row in rows) <= 48
    assert max(len(tokenizer(row["answer"]).input_ids) for row in rows) <= 25


@torch.no_grad()
def test_the_vision_teacher_adds_up_the_digits_of_held_out_scans() -> None:
    rows = read("vision", "test")[:200]
    processor = AutoImageProcessor.from_pretrained(SAMPLES / "teachers" / "sample-vision")
    inputs = processor(images=[decode_image(row["image"]) for row in rows], return_tensors="pt")
    model = teacher("sample-vision")
    labels = [model.config.id2label[int(index)] for index in model(**inputs).logits.argmax(dim=-1)]
    assert np.mean([label == row["answer"] for label, row in zip(labels, rows, strict=True)]) >= 0.93


@torch.no_grad()
def test_the_audio_teacher_knows_the_digits_of_held_out_voices_in_noise() -> None:
    rows = read("audio", "test")[:200]
    extractor = AutoFeatureExtractor.from_pretrained(SAMPLES / "teachers" / "sample-audio")
    clips = [add_noise(decode_audio(row["audio"], 8000), row["id"], 10.0) for row in rows]
    inputs = extractor(clips, sampling_rate=8000, return_tensors="pt")
    model = teacher("sample-audio")
    labels = [model.config.id2label[int(index)] for index in model(**inputs).logits.argmax(dim=-1)]
    assert np.mean([label == row["answer"] for label, row in zip(labels, rows, strict=True)]) >= 0.93
