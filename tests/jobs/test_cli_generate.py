"""`nexus generate` on an exported student: text, media, JSONL, and everything that can be wrong with them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoTokenizer

from nexus.artifacts import Metrics
from nexus.assembly.bundle import export_bundle
from nexus.config import SAMPLES_DIR, load_config
from nexus.student.memory import NexusStudent
from nexus.towers.registry import shipped_config
from nexus.training.setup import build_student_spec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained student of the quickstart's preset, exported."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = load_config(shipped_config("quickstart.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(SAMPLES_DIR / "teachers" / "sample-reasoning")
    student = NexusStudent(build_student_spec(config, tokenizer, (), taught=False))
    metrics = Metrics(
        retention={},
        quantisation_tax={},
        throughput={},
        stages={},
        student_parameters=student.core.num_parameters(),
        teacher_parameters={},
        seed=0,
    )
    folder = tmp_path_factory.mktemp("generate") / "bundle"
    export_bundle(student, tokenizer, config, metrics, folder)
    return folder


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with an image, a recording, and files that are neither."""
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    (tmp_path / "image.png").write_bytes(buffer.getvalue())
    (tmp_path / "half.png").write_bytes(buffer.getvalue()[:80])
    (tmp_path / "text.png").write_text("no image")
    soundfile.write(tmp_path / "clip.wav", np.sin(np.arange(4000) / 10), 8000)
    return tmp_path


def test_a_question_is_answered_in_text(nexus, bundle):
    told = nexus("generate", "--bundle", bundle, "--prompt", "How many?", "--max-new-tokens", 4)
    assert (told.code, told.err) == (0, "")
    assert told.out.endswith("\n")


def test_one_answer_as_json_names_the_towers_and_who_chose_them(nexus, bundle, media):
    for option, file in (("--image", "image.png"), ("--audio", "clip.wav")):
        told = nexus("generate", "-b", bundle, "-p", "What?", option, media / file, "--max-new-tokens", 4, "--json")
        assert set(told.document()) == {"answer", "towers", "source"}


def rows_file(folder: Path, rows: list[object]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_of_a_file_come_back_with_their_answers_in_order(nexus, bundle, media):
    rows = [
        {"id": "a", "prompt": "How many?"},
        {"question": "What is the sum?", "image": "image.png"},
        {"prompt": "Which digit?", "audio": "clip.wav", "image": None},
    ]
    path = rows_file(media, [*rows, ""])
    told = nexus("generate", "-b", bundle, "--input", path, "--max-new-tokens", 4)
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [{key: line[key] for key in row} for line, row in zip(lines, rows, strict=True)] == rows
    # As one object, the same answers; and each as if asked alone.
    assert nexus("generate", "-b", bundle, "-i", path, "--max-new-tokens", 4, "--json").document() == {"answers": lines}
    alone = nexus("generate", "-b", bundle, "-p", "How many?", "--max-new-tokens", 4, "--json").document()
    assert alone["answer"] == lines[0]["answer"]


WRONG_ROWS = {
    "no JSON": ("{broken", "Expected a JSON object in line 2"),
    "no object": ([1], 'Expected an object with a text under "prompt" in line 2'),
    "no prompt": ({"text": "x"}, 'Expected an object with a text under "prompt" in line 2'),
    "unknown key": ({"prompt": "x", "img": "a.png"}, "line 2 of"),
    "missing image": ({"prompt": "x", "image": "none.png"}, "line 2 of"),
    "image that is a number": ({"prompt": "x", "image": 3}, "Expected the path of a file under 'image' in line 2"),
    "image that is none": ({"prompt": "x", "image": "text.png"}, "expected an image file"),
    "damaged image": ({"prompt": "x", "image": "half.png"}, "expected an image file"),
    "NUL in the path": ({"prompt": "x", "image": "a\0b"}, "expected a media file"),
    "endless prompt": ({"prompt": "x " * 2000}, "Shorten the prompt"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_row_is_named_by_its_line(nexus, bundle, media, name):
    row, expected = WRONG_ROWS[name]
    path = rows_file(media, [{"prompt": "good"}, row])
    complaint = nexus("generate", "-b", bundle, "-i", path, "--max-new-tokens", 2).complaint()
    assert expected in complaint
    assert f"line 2 of {path}" in complaint


def test_a_wrong_row_does_not_take_earlier_batches_along(nexus, bundle, media):
    path = rows_file(media, [*({"prompt": "good"} for _ in range(64)), "{broken"])
    told = nexus("generate", "-b", bundle, "-i", path, "--max-new-tokens", 1)
    assert told.code == 2
    assert len(told.out.splitlines()) == 64
    assert "line 65" in told.err


MISTAKES = {
    "no question": ("-b {bundle}", "found neither"),
    "two questions": ("-b {bundle} -p x -i y", "found both"),
    "media beside a file": ("-b {bundle} -i y --image z", "Name media inside the rows"),
    "no bundle": ("-b {media} -p x", "Expected a bundle with manifest.json"),
    "missing bundle": ("-b none -p x", "Expected a bundle with manifest.json"),
    "missing image": ("-b {bundle} -p x --image none.png", "--image: expected a media file"),
    "image that is none": ("-b {bundle} -p x --image {media}/text.png", "expected an image file"),
    "image as audio": ("-b {bundle} -p x --audio {media}/image.png", "expected an audio file"),
    "no rows": ("-b {bundle} -i {media}/none.jsonl", "Correct --input"),
    "a folder of rows": ("-b {bundle} -i {media}", "Correct --input"),
    "empty rows": ("-b {bundle} -i {media}/empty.jsonl", "found an empty file"),
    "rows in another encoding": ("-b {bundle} -i {media}/latin.jsonl", "Mend the line"),
    "too many tokens": ("-b {bundle} -p x --max-new-tokens 4096", "Expected --max-new-tokens below"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(nexus, bundle, media, name):
    (media / "empty.jsonl").write_text("\n")
    (media / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    arguments, expected = MISTAKES[name]
    filled = [argument.format(bundle=bundle, media=media) for argument in arguments.split()]
    assert expected in nexus("generate", *filled).complaint()


def test_an_empty_prompt_is_one_line(nexus, bundle):
    assert "prompt" in nexus("generate", "-b", bundle, "-p", "").complaint()


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_a_damaged_bundle_is_refused_in_one_line(nexus, bundle, tmp_path, file, harm):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    if harm == "cut":
        data = (copy / file).read_bytes()
        (copy / file).write_bytes(data[: len(data) // 2])
    else:
        (copy / file).unlink()
    complaint = nexus("generate", "-b", copy, "-p", "x").complaint()
    assert file in complaint


WITHOUT_TEACHERS = """
import os, sys
samples = os.path.abspath(sys.argv[1])

def refuse(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        if os.path.abspath(os.fsdecode(arguments[0])).startswith(samples):
            raise PermissionError(f"a teacher's file was opened: {arguments[0]}")

sys.addaudithook(refuse)
try:
    open(os.path.join(samples, "teachers", "any"))
except PermissionError:
    pass
else:
    raise SystemExit("the hook does not work")
from jobs.cli import app
try:
    app(sys.argv[2:])
finally:
    assert not [name for name in sys.modules if name.split(".")[0] in ("ray", "bitsandbytes")]
    assert not [name for name in sys.modules if name.startswith(("nexus.towers", "nexus.training"))]
"""


def test_the_command_answers_where_no_teacher_can_be_read(bundle, media):
    command = [
        "generate",
        "-b",
        bundle,
        "-p",
        "Sum?",
        "--image",
        media / "image.png",
        "--max-new-tokens",
        "2",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TEACHERS, str(SAMPLES_DIR), *map(str, command)],
        cwd=media,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"answer", "towers", "source"}
