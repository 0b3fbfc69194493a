"""The normaliser: every accepted column set, and every refusal in the words of the user."""

from __future__ import annotations

import json
import pickle
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.data.records import (
    MEDIA_KINDS,
    PROMPT_COLUMNS,
    READ_COLUMNS,
    Media,
    Message,
    Record,
    RowError,
    Source,
    check_media_bytes,
    check_media_file,
    has_prompt_column,
    normalise_row,
    prompt_text,
)

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "
HEADS = {
    "PNG": (PNG, ["image"]),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(8), ["image"]),
    "GIF": (b"GIF89a" + bytes(8), ["image", "video"]),
    "WEBP": (b"RIFF\x24\x00\x00\x00WEBPVP8 ", ["image"]),
    "WAV": (WAV, ["audio"]),
    "OGG": (b"OggS" + bytes(8), ["audio"]),
    "FLAC": (b"fLaC" + bytes(8), ["audio"]),
    "MP3 with a tag": (b"ID3\x04" + bytes(8), ["audio"]),
    "MP3 frame": (b"\xff\xfb\x90\x00" + bytes(8), ["audio"]),
    "MP4": (b"\x00\x00\x00\x18ftypmp42", ["video"]),
    "WEBM": (b"\x1aE\xdf\xa3" + bytes(8), ["video"]),
    "AVI": (b"RIFF\x24\x00\x00\x00AVI LIST", ["video"]),
}


def normalise(row: dict[str, object]) -> Record:
    return normalise_row(row, row_id="file:1", capability="reasoning")


def triple(row: dict[str, object]) -> tuple[str, str | None, str | None]:
    record = normalise(row)
    return record.prompt, record.completion, record.answer


def reason(row: dict[str, object]) -> str:
    with pytest.raises(RowError) as caught:
        normalise(row)
    return str(caught.value)


ACCEPTED: dict[str, tuple[dict[str, object], tuple[str, str | None, str | None]]] = {
    "prompt and completion": ({"prompt": "2+2", "completion": " 4 "}, ("2+2", " 4 ", "4")),
    "prompt alone is unlabelled": ({"prompt": "2+2"}, ("2+2", None, None)),
    "prompt and answer": ({"prompt": "2+2", "answer": 4}, ("2+2", "4", "4")),
    "prompt, completion and a scored answer": (
        {"prompt": "2+2", "completion": "It is 4.", "answer": "4"},
        ("2+2", "It is 4.", "4"),
    ),
    "completion of a code row keeps ####": ({"prompt": "p", "completion": "#### 4"}, ("p", "#### 4", "#### 4")),
    "GSM8K": ({"question": "q?", "answer": "1+1=2\n#### 2"}, ("q?", "1+1=2\n#### 2", "2")),
    "GSM8K with thousands": ({"question": "q?", "answer": "s\n#### 1,234,567"}, ("q?", "s\n#### 1,234,567", "1234567")),
    "GSM8K keeps other commas": ({"question": "q?", "answer": "s #### 1,23"}, ("q?", "s #### 1,23", "1,23")),
    "only the last line holds the gold": (
        {"question": "q?", "answer": "#### 3\nno"},
        ("q?", "#### 3\nno", "#### 3\nno"),
    ),
    "a short answer": ({"question": "q?", "answer": "red\n"}, ("q?", "red\n", "red")),
    "a number as answer": ({"question": "q?", "answer": 2.5}, ("q?", "2.5", "2.5")),
    "question alone is unlabelled": ({"question": "q?", "answer": None}, ("q?", None, None)),
    "MMLU by index": (
        {"question": "q?", "choices": ["x", "y", "z"], "answer": 1},
        ("q?\nA. x\nB. y\nC. z", "B", "B"),
    ),
    "MMLU by letter": ({"question": "q?", "choices": ["x", "y"], "answer": "a"}, ("q?\nA. x\nB. y", "A", "A")),
    "MMLU from CSV": (
        {"question": "q?", "choices": '["x", 2, 0.5]', "answer": "2"},
        ("q?\nA. x\nB. 2\nC. 0.5", "C", "C"),
    ),
    "MMLU without an answer": ({"question": "q?", "choices": ["x", "y"]}, ("q?\nA. x\nB. y", None, None)),
    "choices beside a prompt are not looked at": (
        {"prompt": "p", "question": "q?", "choices": ["x", "y"], "answer": "7"},
        ("p", "7", "7"),
    ),
    "MATH with a box": (
        {"problem": "p", "solution": r"So \boxed{1} or \boxed{\frac{1}{2}}."},
        ("p", r"So \boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    ),
    "a box that is not closed is no box": (
        {"problem": "p", "solution": r"So \boxed{1"},
        ("p", r"So \boxed{1", r"So \boxed{1"),
    ),
    "an empty box is no answer": ({"problem": "p", "solution": r"\boxed{} #### 3"}, ("p", r"\boxed{} #### 3", "3")),
    "a solution without a box": ({"problem": "p", "solution": "so\n#### 3"}, ("p", "so\n#### 3", "3")),
    "problem alone is unlabelled": ({"problem": "p"}, ("p", None, None)),
    "an answer column beats the box": (
        {"problem": "p", "solution": r"\boxed{1}", "answer": "one"},
        ("p", r"\boxed{1}", "one"),
    ),
    "Alpaca": ({"instruction": "i", "input": "x", "output": "o"}, ("i\nx", "o", "o")),
    "Alpaca with an empty input": ({"instruction": "i", "input": "", "output": "o"}, ("i", "o", "o")),
    "Alpaca without an output": ({"instruction": "i"}, ("i", None, None)),
    "text": ({"text": "once upon a time"}, ("", "once upon a time", None)),
    "contents": ({"contents": "def f(): ...", "answer": "not looked at"}, ("", "def f(): ...", None)),
    "a null column is an absent one": ({"messages": None, "prompt": None, "text": "t"}, ("", "t", None)),
    "a lone user turn stands as it is": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        ("hi", "hello", "hello"),
    ),
    "a longer conversation names the roles": (
        {
            "messages": json.dumps(
                [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "hello"},
                    {"role": "user", "content": "bye"},
                ]
            )
        },
        ("system: be brief\nuser: hi\nassistant: hello\nuser: bye", None, None),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_each_accepted_column_set_gives_its_record(name: str) -> None:
    row, expected = ACCEPTED[name]
    assert triple(row) == expected


def test_the_completion_of_a_conversation_is_not_among_its_messages() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert normalise({"messages": turns}).messages == (Message("user", "hi"),)
    assert normalise({"prompt": "hi"}).messages is None


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no accepted column": (
        {"body": "x", "id": 3, "y": None},
        "expected a value in one of the columns messages, prompt, ",
    ),
    "no accepted column names what is there": ({"body": "x", "id": 3, "y": None}, "found values in: body, id"),
    "an empty row": ({}, "found values in: none"),
    "an empty prompt": ({"prompt": " \n"}, "expected text in column 'prompt', found it empty"),
    "a prompt that is a number": ({"prompt": 3}, "expected text in column 'prompt', found a number"),
    "a prompt that is a list": ({"prompt": ["a"]}, "found a list"),
    "a prompt that is bytes": ({"prompt": b"a"}, "found bytes"),
    "a prompt of an odd type": ({"prompt": {1}}, "found set"),
    "an answer that is true": ({"question": "q", "answer": True}, "found true or false"),
    "an answer that is no number": ({"question": "q", "answer": float("nan")}, "found the number nan"),
    "an empty answer": ({"question": "q", "answer": ""}, "expected text in column 'answer', found it empty"),
    "half of a surrogate pair": ({"prompt": "a\ud800"}, "expected UTF-8 text in column 'prompt'"),
    "no gold after the mark": ({"question": "q", "answer": "so\n#### "}, "after '####', found nothing"),
    "another capability": ({"prompt": "p", "capability": "code"}, "of capability 'reasoning', found 'code'"),
    "choices that are no list": (
        {"question": "q", "choices": {"a": 1}},
        "expected a list in column 'choices', found an object",
    ),
    "choices that are broken JSON": ({"question": "q", "choices": "[1"}, "text that is no JSON list"),
    "choices that nest without end": ({"question": "q", "choices": "[" * 100_000}, "text that is no JSON list"),
    "no choices": ({"question": "q", "choices": []}, "found it empty"),
    "one choice": ({"question": "q", "choices": ["a"]}, "expected 2 to 26 entries in column 'choices', found 1"),
    "an empty choice": ({"question": "q", "choices": ["a", ""]}, "an entry of column 'choices', found it empty"),
    "a choice that is true": ({"question": "q", "choices": ["a", True]}, "found true or false"),
    "a choice out of range": (
        {"question": "q", "choices": ["a", "b"], "answer": 2},
        "0 to 1 or A to B in column 'answer', found '2'",
    ),
    "a choice below range": ({"question": "q", "choices": ["a", "b"], "answer": -1}, "found '-1'"),
    "a letter out of range": ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "found 'C'"),
    "an answer in words": (
        {"question": "q", "choices": ["a", "b"], "answer": "the first one"},
        "found 'the first one'",
    ),
    "a conversation without a user": ({"messages": [{"role": "assistant", "content": "x"}]}, "expected a user turn"),
    "a turn that is text": ({"messages": ["hi"]}, "expected an object with role and content in turn 1"),
    "an unknown role": (
        {"messages": [{"role": "human", "content": "x"}]},
        "in turn 1 of column 'messages', found 'human'",
    ),
    "a role that is a list": (
        {"messages": [{"role": ["user"], "content": "x"}]},
        "expected the role system, user, assistant",
    ),
    "a turn without content": (
        {"messages": [{"role": "user"}]},
        "the content of turn 1 of column 'messages', found NoneType",
    ),
    "two kinds of media": ({"prompt": "p", "image": PNG, "audio": WAV}, "found image and audio"),
    "media of a wrong type": (
        {"prompt": "p", "image": 3},
        "expected bytes or a path in column 'image', found a number",
    ),
    "media without bytes or path": (
        {"prompt": "p", "image": {"bytes": None}},
        "expected bytes or a path in column 'image'",
    ),
    "an empty path": ({"prompt": "p", "image": ""}, "expected text in column 'image', found it empty"),
    "an image that is text": (
        {"prompt": "p", "image": b"hello world"},
        "expected an image (PNG, JPEG, GIF, WEBP), found bytes that begin with b'hello wo'",
    ),
    "an image that is a sound": ({"prompt": "p", "image": WAV}, "found WAV"),
    "an image of no bytes": ({"prompt": "p", "image": b""}, "found nothing (0 bytes)"),
    "an audio file that is an image": (
        {"prompt": "p", "audio": PNG},
        "expected an audio file (WAV, OGG, FLAC, MP3), found PNG",
    ),
    "a video that is an image": ({"prompt": "p", "video": PNG}, "expected a video (GIF, MP4, WEBM, AVI), found PNG"),
    "an id that is a list": ({"prompt": "p", "id": [1]}, "expected text in column 'id', found a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_bad_row_is_refused_in_words(name: str) -> None:
    row, words = REFUSED[name]
    assert words in reason(row)


def test_ids_come_from_the_row_and_else_from_its_place() -> None:
    assert normalise({"prompt": "p", "id": 7}).id == "7"
    assert normalise({"prompt": "p", "id": "seven"}).id == "seven"
    assert normalise({"prompt": "p", "id": ""}).id == "file:1"
    assert normalise({"prompt": "p"}).id == "file:1"


def test_a_row_may_name_its_tower_and_agree_on_its_capability() -> None:
    record = normalise({"prompt": "p", "tower": "vision", "capability": "reasoning"})
    assert (record.tower, record.capability) == ("vision", "reasoning")


@pytest.mark.parametrize("name", HEADS)
def test_each_media_format_is_known_by_its_first_bytes(name: str) -> None:
    head, kinds = HEADS[name]
    for kind in MEDIA_KINDS:
        if kind in kinds:
            assert normalise({"prompt": "p", kind: head}).media == Media(kind, head)
        else:
            with pytest.raises(RowError, match=name.split()[0]):
                check_media_bytes(kind, head)


@pytest.mark.parametrize("head", [b"\xff", b"\xff\xf1\x50\x80", b"\xff\xe8\x00\x00", b"RIFF\x00\x00\x00\x00PAL "])
def test_bytes_that_only_resemble_a_sound_are_refused(head: bytes) -> None:
    with pytest.raises(RowError, match="bytes that begin with"):
        check_media_bytes("audio", head)


def test_media_may_be_bytes_or_a_path_and_bytes_win() -> None:
    assert normalise({"prompt": "p", "image": {"bytes": PNG, "path": "x.png"}}).media == Media("image", PNG)
    assert normalise({"prompt": "p", "image": {"bytes": None, "path": "x.png"}}).media == Media("image", "x.png")
    assert normalise({"prompt": "p", "image": "x.png"}).media == Media("image", "x.png")


def test_a_media_file_is_looked_into(tmp_path) -> None:
    (tmp_path / "good.png").write_bytes(PNG)
    (tmp_path / "bad.png").write_bytes(b"<html>")
    check_media_file("image", tmp_path / "good.png")
    with pytest.raises(RowError, match=r"expected an image .*b'<html>'"):
        check_media_file("image", tmp_path / "bad.png")
    with pytest.raises(RowError, match=r"expected an image at .*none\.png, found: No such file"):
        check_media_file("image", tmp_path / "none.png")
    with pytest.raises(RowError, match=r"expected an audio file at .*, found: .*null"):
        check_media_file("audio", tmp_path / "nul\0")


def test_the_prompt_is_a_line_of_its_own_and_plain_text_has_none() -> None:
    assert prompt_text(normalise({"prompt": "2+2"})) == "2+2\n"
    assert prompt_text(normalise({"text": "once"})) == ""


def test_every_prompt_column_is_read_and_makes_a_file_acceptable() -> None:
    assert set(PROMPT_COLUMNS) <= READ_COLUMNS
    assert all(has_prompt_column({"id", name}) for name in PROMPT_COLUMNS)
    assert not has_prompt_column({"id", "answer", "completion", "image"})


def test_where_a_record_was_read_is_no_part_of_its_value() -> None:
    here = Record("a", "c", "p", source=Source("x.csv", 1))
    assert here == Record("a", "c", "p", source=Source("y.jsonl", 9))
    assert pickle.loads(pickle.dumps(here)).source == Source("x.csv", 1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=16),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "bytes", "path"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(READ_COLUMNS)), VALUES, max_size=5))
def test_any_row_becomes_a_whole_record_or_a_row_error(row: dict[str, object]) -> None:
    try:
        record = normalise(row)
    except RowError:  # any other error fails the test
        return
    assert record.id
    assert record.prompt.strip() or record.completion
    assert record.completion is None or record.completion.strip()
    assert record.answer is None or (record.answer and record.answer == record.answer.strip())
    json.dumps([record.id, record.prompt, record.completion, record.answer, record.tower]).encode()


@given(st.integers(), st.text(string.ascii_letters + " \n", max_size=30))
def test_the_gold_number_is_found_behind_any_working(gold: int, working: str) -> None:
    assert normalise({"question": "q", "answer": f"{working}\n#### {gold:,}"}).answer == str(gold)


@given(st.text("ab{}", max_size=12).filter(lambda text: text.strip()))
def test_a_box_gives_back_any_balanced_content(content: str) -> None:
    depth = 0
    for character in content:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return
    solution = rf"thus \boxed{{{content}}} holds"
    expected = content.strip() if depth == 0 else solution
    assert normalise({"problem": "p", "solution": solution}).answer == expected
