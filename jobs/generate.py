"""`nexus generate`: questions for an exported student, from the command line or a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus.errors import DataError

if TYPE_CHECKING:
    from nexus.assembly.bundle import Answer, InputRow

BATCH_ROWS = 64
"""Rows that are read and answered together; a file is never whole in memory."""
KNOWN_KEYS = ("id", "prompt", "question", "image", "audio")


def answer_one(bundle: Path, prompt: str, image: Path | None, audio: Path | None, max_new_tokens: int) -> Answer:
    """The student's answer to one question.

    Raises:
        ArtifactError: when `bundle` is none.
        DataError: when a media file cannot be read or decoded.
    """
    from nexus.assembly.bundle import InputRow, load_bundle

    row = InputRow(prompt=prompt, image=_read(image, "--image"), audio=_read(audio, "--audio"))
    return load_bundle(bundle).answer([row], max_new_tokens)[0]


def answer_file(bundle: Path, rows: Path, max_new_tokens: int) -> Iterator[tuple[dict[str, Any], Answer]]:
    """Each row of a JSONL file with its answer, in file order.

    Raises:
        DataError: naming the line that cannot be read.
    """
    from nexus.assembly.bundle import load_bundle

    student = load_bundle(bundle)
    pending: list[tuple[dict[str, Any], InputRow]] = []
    any_row = False
    for document, row in _rows(rows):
        any_row = True
        pending.append((document, row))
        if len(pending) == BATCH_ROWS:
            yield from zip([d for d, _ in pending], student.answer([r for _, r in pending], max_new_tokens))
            pending = []
    if pending:
        yield from zip([d for d, _ in pending], student.answer([r for _, r in pending], max_new_tokens))
    if not any_row:
        raise DataError(f"Expected rows in {rows}, found an empty file. Write one JSON object a line, with a prompt.")


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], InputRow]]:
    from nexus.assembly.bundle import InputRow

    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"Expected JSONL rows in {path}, found: {error.strerror}. Correct --input.") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"Expected a JSON object in line {number} of {path}, found: {error}. Mend the line.") from None
            prompt = document.get("prompt", document.get("question")) if isinstance(document, dict) else None
            if not isinstance(prompt, str):
                raise DataError(
                    f'Expected an object with "prompt" in line {number} of {path}, found {line.strip()[:60]!r}. Add the prompt.'
                )
            unknown = sorted(set(document) - set(KNOWN_KEYS))
            if unknown:
                raise DataError(
                    f"Expected the keys {', '.join(KNOWN_KEYS)} in line {number} of {path}, found {unknown[0]!r}. Remove it."
                )
            media = {
                kind: _read(path.parent / document[kind], f"line {number} of {path}") if kind in document else None
                for kind in ("image", "audio")
            }
            yield document, InputRow(prompt=prompt, image=media["image"], audio=media["audio"])


def _read(path: Path | None, source: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: expected a media file at {path}, found: {error.strerror}. Correct the path.") from None
