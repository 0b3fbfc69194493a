"""`nexus init`: a run's YAML for a user's own teachers and data, which parses as it stands.

What a teacher is (a language model, an encoder of images or of recordings) is read from its registry entry or from the config.json of
its checkpoint; what the rows of a capability carry is read from the first row of its data. Each teacher gets the capabilities
whose rows it can read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml

from nexus.config import Role, parse_config
from nexus.errors import ConfigError, TowerLoadError
from nexus.towers.registry import check_role, load_registry

HEADER = """\
# A run of nexus: `nexus pipeline --config {name}` runs it, and run again it continues.
# Keys that are left out take the defaults of nexus/config.py; a key that is not known is refused by name.
# Each capability wants three disjoint sets of rows: unlabelled (pool), a few labelled, and held-out (test).
"""
SUFFIXES = (".parquet", ".jsonl", ".csv")
SPLITS = ("pool", "labelled", "test")
DEFAULT_TEACHER = "qwen2.5-0.5b"

Input = Literal["text", "image", "audio"]
EXAMPLE_CAPABILITY: dict[Input, str] = {"text": "language", "image": "vision", "audio": "audio"}
"""Names a capability for which no data were given."""
TOWER_OF: dict[Input, tuple[str, ...]] = {"text": (), "image": ("vision",), "audio": ("audio",)}
MAX_NEW_TOKENS: dict[Input, int] = {"text": 128, "image": 16, "audio": 16}
"""A classifier's label is short; a language model's answer is not."""
LOOKED_AT_ROWS = 8


@dataclass(frozen=True)
class Written:
    """What was written, for the person who asked for it."""

    notes: tuple[str, ...]
    """How each teacher was understood."""
    command: str
    """What to type next."""


@dataclass(frozen=True)
class _Teacher:
    entry: dict[str, Any]
    reads: Input
    note: str


def write_config(path: Path, *, teachers: tuple[str, ...], data: tuple[str, ...]) -> Written:
    """Write `path`; an existing file is left alone.

    Args:
        path: the YAML to write.
        teachers: registry ids, checkpoint folders, or repositories (`owner/name` or `owner/name@revision`).
        data: `capability=folder`; the folder holds pool, labelled and test files.

    Raises:
        ConfigError: when the file exists, or teachers and data are not what they should be, or do not fit each other.
        TowerLoadError: for an unknown teacher, or one that this version cannot load.
        DataError: when the data cannot be read.
    """
    if path.exists():
        raise ConfigError(f"Expected no file at {path}, found one. Choose another name or remove it.")
    chosen = [_teacher(text) for text in teachers or (DEFAULT_TEACHER,)]
    sources = dict(_data(text) for text in data)
    if not data:
        sources = {EXAMPLE_CAPABILITY[t.reads]: (t.reads, _example(t.reads)) for t in chosen}
    entries = [_with_capabilities(teacher, sources) for teacher in chosen]
    speaker = next((t.entry["id"] for t in chosen if t.reads == "text"), None)
    if speaker is None:
        raise ConfigError(
            f"Expected a language model among the teachers, whose tokenizer the student takes over, found only "
            f"{', '.join(t.entry['id'] for t in chosen)}. Add one, e.g. --teacher {DEFAULT_TEACHER}."
        )
    document = {
        "name": _identifier(path.stem, "run"),
        "seed": 0,
        "teachers": entries,
        "data": [source for _, source in sources.values()],
        "student": {"preset": "quickstart", "tokenizer": speaker, "max_length": 512},
        "distill": {"steps": 2000, "learning_rate": 1.0e-3},
    }
    parse_config(document, source=str(path))
    text = HEADER.format(name=path) + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"Expected to write {path}, found: {error.strerror}. Choose another place.") from None
    notes = [teacher.note for teacher in chosen]
    if not data:
        notes.append("no --data given: the paths under data are examples, to be replaced by yours")
    return Written(tuple(notes), f"nexus pipeline --config {path}")


# --- teachers -----------------------------------------------------------------------------------------------------------------


def _teacher(text: str) -> _Teacher:
    registry = load_registry()
    if text in registry.ids():
        entry = registry.get(text)
        check_role(entry.id, entry.role, entry.needs)
        reads = _reads(entry.role, entry.processor)
        return _Teacher({"kind": "registry", "id": text}, reads, f"{text}: of the registry, {_NOUNS[reads]}")
    folder = Path(text)
    if folder.is_dir():
        role, reads = _role_of(folder / "config.json", text)
        identifier = _identifier(folder.resolve().name, "teacher")
        entry_dict = {"kind": "path", "id": identifier, "path": text, "role": role}
        return _Teacher(entry_dict, reads, f"{identifier}: the checkpoint in {text}, {_NOUNS[reads]}")
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/"):
        return _hub_teacher(text)
    if "/" in text:
        raise TowerLoadError(
            f"Expected a checkpoint folder at {text}, found none. Name a folder, a registry id or a repository (owner/name)."
        )
    registry.get(text)  # refuses, naming the nearest id
    raise AssertionError("an id that the registry does not list is refused above")


def _hub_teacher(text: str) -> _Teacher:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repo, at, revision = text.partition("@")
    if at and not re.fullmatch(r"[\w./-]+", revision):
        raise TowerLoadError(
            f"Expected a branch, tag or commit behind @, found {revision!r} in {text!r}. Correct --teacher, e.g. owner/name@main."
        )
    entry = {
        "kind": "hub",
        "id": _identifier(repo.split("/")[1], "teacher"),
        "repo": repo,
        "revision": revision or "main",
    }
    try:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision or None)
    except HFValidationError:
        raise TowerLoadError(
            f"Expected a repository as owner/name or owner/name@revision, found {text!r}. Correct --teacher."
        ) from None
    if isinstance(cached, str):
        role, reads = _role_of(Path(cached), text)
        how = _NOUNS[reads]
    else:
        role, reads = "causal_lm", "text"
        how = "taken for a language model (its files are not here to look at; correct `role` if it is an encoder)"
    return _Teacher(entry | {"role": role}, reads, f"{entry['id']}: the repository {repo}, {how}")


_NOUNS: dict[Input, str] = {
    "text": "a language model",
    "image": "an encoder of images",
    "audio": "an encoder of recordings",
}


def _reads(role: Role, processor: str | None) -> Input:
    if role == "causal_lm":
        return "text"
    if processor == "audio":
        return "audio"
    if processor == "image":
        return "image"
    raise ConfigError(
        f"Expected a language model or an encoder of images or recordings, found an encoder of {processor}, which this version "
        "does not decode. Choose another teacher."
    )


def _role_of(config: Path, name: str) -> tuple[Role, Input]:
    """Role and input of a checkpoint, from the class that its config.json names."""
    try:
        document = json.loads(config.read_bytes())
        architecture = str(document["architectures"][0])
    except OSError as error:
        raise TowerLoadError(
            f"Expected a checkpoint with config.json in {name}, found: {error.strerror}. Name the folder that save_pretrained wrote."
        ) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise TowerLoadError(
            f"Expected config.json of {name} to name its class under `architectures`, found none. Save it with save_pretrained."
        ) from None
    processor = _preprocessor(config.parent)
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm", "text"
    if architecture.endswith(("ForAudioClassification", "ForCTC")) or architecture.startswith("Whisper"):
        return "encoder", "audio"
    if "VideoMAE" in architecture or architecture.endswith("ForVideoClassification"):
        return "encoder", _reads("encoder", "video")
    if architecture.endswith(("ForImageClassification", "VisionModel")) or processor == "image":
        return "encoder", "image"
    if processor == "audio":
        return "encoder", "audio"
    if architecture.endswith("ForConditionalGeneration"):
        return "causal_lm", "text"
    raise TowerLoadError(
        f"Expected a language model (...ForCausalLM) or an encoder of images or recordings (...ForImageClassification, "
        f"...ForAudioClassification, ...VisionModel), found {architecture} in {name}. Choose another teacher."
    )


def _preprocessor(folder: Path) -> Literal["image", "audio"] | None:
    """What an encoder's processor prepares; None beside a tokenizer, whose model takes text as well."""
    if any(folder.glob("tokenizer*")):
        return None
    try:
        document = json.loads((folder / "preprocessor_config.json").read_bytes())
    except (OSError, ValueError):
        return None
    if "image_processor_type" in document:
        return "image"
    return "audio" if "feature_extractor_type" in document else None


def _with_capabilities(teacher: _Teacher, sources: dict[str, tuple[Input, dict[str, Any]]]) -> dict[str, Any]:
    capabilities = [capability for capability, (reads, _) in sources.items() if reads == teacher.reads]
    if not capabilities:
        raise ConfigError(
            f"Expected data with {_ROWS[teacher.reads]} for {teacher.entry['id']}, {_NOUNS[teacher.reads]}, found none among "
            f"{', '.join(sources)}. Add --data CAPABILITY=DIR, or leave the teacher out."
        )
    return teacher.entry | {"capabilities": capabilities}


_ROWS: dict[Input, str] = {"text": "rows of text", "image": "images", "audio": "recordings"}


# --- data ---------------------------------------------------------------------------------------------------------------------


def _data(text: str) -> tuple[str, tuple[Input, dict[str, Any]]]:
    from nexus.data.loader import iter_records
    from nexus.data.quarantine import Quarantine

    capability, equals, folder_text = text.partition("=")
    if not equals or not capability or not folder_text:
        raise ConfigError(f"Expected --data CAPABILITY=DIR, found {text!r}. Example: --data code=data/code")
    folder = Path(folder_text)
    if not folder.is_dir():
        raise ConfigError(
            f"Expected a folder with pool, labelled and test files at {folder}, found none. Correct --data {text}."
        )
    files = {
        split: sorted(str(file) for file in folder.iterdir() if file.stem.startswith(split) and file.suffix in SUFFIXES)
        for split in SPLITS
    }
    for split in SPLITS:
        if not files[split]:
            raise ConfigError(
                f"Expected a file {split}*{{{','.join(SUFFIXES)}}} in {folder}, found none. Three disjoint sets are needed: "
                f"{', '.join(SPLITS)}."
            )
    # Everything may be bad here: the run itself counts and quarantines.
    records = iter_records(
        [Path(file) for file in files["test"]], capability=capability, quarantine=Quarantine(None, 1.0)
    )
    rows = list(islice(records, LOOKED_AT_ROWS))
    reads: Input = "text"
    for row in rows:
        if row.media is not None:
            if row.media.kind == "video":
                raise ConfigError(
                    f"Expected text, images or recordings in {folder}, found video, which this version does not decode. Remove it."
                )
            reads = row.media.kind
    source = _source(capability, files, reads)
    if any("####" in (row.completion or "") for row in rows):
        source["answer"] = "gsm8k"
    return capability, (reads, source)


def _example(reads: Input) -> dict[str, Any]:
    capability = EXAMPLE_CAPABILITY[reads]
    return _source(capability, {split: [f"data/{capability}/{split}.parquet"] for split in SPLITS}, reads)


def _source(capability: str, files: dict[str, list[str]], reads: Input) -> dict[str, Any]:
    towers = TOWER_OF[reads] or (("reasoning",) if capability == "reasoning" else ())
    return {
        "capability": capability,
        **files,
        **({"towers": list(towers)} if towers else {}),
        "max_new_tokens": MAX_NEW_TOKENS[reads],
        "batch_size": 8,
    }


def _identifier(name: str, otherwise: str) -> str:
    """`name` with the characters that an id may have."""
    plain = "".join(
        char if char.isascii() and char.isalnum() else "-" if char not in "._-" else char for char in name.lower()
    )
    return plain.strip("._-") or otherwise
