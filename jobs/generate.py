"""`nexus generate`: questions for an exported student, from the command line or a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus.errors import DataError

if TYPE_CHECKING:
    from nexus.assembly.bundle import Answer, BundleStudent, InputRow

BATCH_ROWS = 64
"""Rows that are read and answered together; a file is never whole in memory."""
KNOWN_KEYS = ("id", "prompt", "question", "image", "audio")


def answer_one(bundle: Path, prompt: str, image: Path | None, audio: Path | None, max_new_tokens: int) -> Answer:
    """The student's answer to one question.

    Raises:
        ArtifactError: when `bundle` is none.
        DataError: when the prompt or a media file cannot be used.
    """
    from nexus.assembly.bundle import InputRow

    row = InputRow(prompt=prompt, image=_read(image, "--image"), audio=_read(audio, "--audio"))
    student = _student(bundle, max_new_tokens)
    media = image or audio
    return _answer(student, [("--prompt" if media is None else str(media), row)], max_new_tokens)[0]


def answer_file(bundle: Path, rows: Path, max_new_tokens: int) -> Iterator[tuple[dict[str, Any], Answer]]:
    """Each row of a JSONL file with its answer, in file order.

    Raises:
        ArtifactError: when `bundle` is none.
        DataError: naming the line that cannot be used; the batches before it have been answered.
    """
    student = _student(bundle, max_new_tokens)
    documents: list[dict[str, Any]] = []
    pending: list[tuple[str, InputRow]] = []
    any_row = False
    for place, document, row in _rows(rows):
        any_row = True
        documents.append(document)
        pending.append((place, row))
        if len(pending) == BATCH_ROWS:
            yield from zip(documents, _answer(student, pending, max_new_tokens), strict=True)
            documents, pending = [], []
    if pending:
        yield from zip(documents, _answer(student, pending, max_new_tokens), strict=True)
    if not any_row:
        raise DataError(f"Expected rows in {rows}, found an empty file. Write one JSON object a line, with a prompt.")


def to_document(answer: Answer) -> dict[str, Any]:
    """An answer as plain JSON values."""
    return {"answer": answer.text, "towers": list(answer.towers), "source": answer.source}


def _student(bundle: Path, max_new_tokens: int) -> BundleStudent:
    import transformers

    from nexus.assembly.bundle import load_bundle

    # A bar over 30 tensors says nothing to whoever waits for an answer.
    transformers.utils.logging.disable_progress_bar()
    student = load_bundle(bundle)
    longest = student.student.core.config.max_position_embeddings
    if max_new_tokens >= longest:
        raise DataError(
            f"Expected --max-new-tokens below {longest}, the positions of this student, found {max_new_tokens}. Lower it."
        )
    return student


def _answer(student: BundleStudent, rows: list[tuple[str, InputRow]], max_new_tokens: int) -> tuple[Answer, ...]:
    try:
        return student.answer([row for _, row in rows], max_new_tokens)
    except DataError:
        # Once more, row by row, to say which one it was.
        for place, row in rows:
            try:
                student.answer([row], max_new_tokens)
            except DataError as error:
                raise DataError(f"{place}: {str(error).removeprefix('row 0: ')}") from None
        raise


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any], InputRow]]:
    """Place, document and question of each line."""
    from nexus.assembly.bundle import InputRow

    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"Expected JSONL rows in {path}, found: {error.strerror}. Correct --input.") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"line {number} of {path}"
            document, prompt = _document(line, place)
            media = {kind: _media(document.get(kind), kind, place, path.parent) for kind in ("image", "audio")}
            yield place, document, InputRow(prompt=prompt, image=media["image"], audio=media["audio"])


def _document(line: bytes, place: str) -> tuple[dict[str, Any], str]:
    """The line's object and its prompt."""
    try:
        document = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise DataError(f"Expected a JSON object in {place}, found: {error}. Mend the line.") from None
    prompt = document.get("prompt", document.get("question")) if isinstance(document, dict) else None
    if not isinstance(prompt, str):
        shown = line.decode(errors="replace").strip()[:60]
        raise DataError(f'Expected an object with a text under "prompt" in {place}, found {shown!r}. Add the prompt.')
    unknown = sorted(set(document) - set(KNOWN_KEYS))
    if unknown:
        raise DataError(f"Expected the keys {', '.join(KNOWN_KEYS)} in {place}, found {unknown[0]!r}. Remove it.")
    return document, prompt


def _media(value: Any, kind: str, place: str, folder: Path) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"Expected the path of a file under {kind!r} in {place}, found {value!r}. Name a file.")
    return _read(folder / value, place)


def _read(path: Path | None, source: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{source}: expected a media file at {path}, found: {reason}. Correct the path.") from None
