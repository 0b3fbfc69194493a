"""`nexus init`: a run's YAML for a user's own teachers and data, which parses as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nexus.config import DataConfig, parse_config
from nexus.errors import ConfigError
from nexus.towers.registry import load_registry

HEADER = """\
# A run of nexus: `nexus plan` has no part in it yet; `nexus pipeline --config {name}` runs it, and run again it continues.
# Keys that are left out take the defaults of nexus/config.py; a key that is not known is refused by name.
# Each capability wants three disjoint sets of rows: unlabelled (pool), a few labelled, and held-out (test).
"""
SUFFIXES = (".parquet", ".jsonl", ".csv")
SPLITS = ("pool", "labelled", "test")
DEFAULT_TEACHER = "qwen2.5-0.5b"
DEFAULT_CAPABILITY = "language"


def write_config(path: Path, *, teachers: tuple[str, ...], data: tuple[str, ...]) -> str:
    """Write `path` and return what to do next; an existing file is left alone.

    Args:
        path: the YAML to write.
        teachers: registry ids, checkpoint folders, or repo ids (`owner/name` or `owner/name@revision`).
        data: `capability=folder`; the folder holds pool, labelled and test files.

    Raises:
        ConfigError: when the file exists, or a teacher or folder is not what it should be.
    """
    if path.exists():
        raise ConfigError(f"Expected no file at {path}, found one. Choose another name or remove it.")
    sources = [_data(text) for text in data] or [_example_data(DEFAULT_CAPABILITY)]
    capabilities = [source["capability"] for source in sources]
    entries = [_teacher(text, capabilities) for text in teachers or (DEFAULT_TEACHER,)]
    document = {
        "name": path.stem.replace(" ", "-"),
        "seed": 0,
        "teachers": entries,
        "data": sources,
        "student": {"preset": "quickstart", "tokenizer": entries[0]["id"], "max_length": 512},
        "distill": {"steps": 2000, "learning_rate": 1.0e-3},
    }
    parse_config(document, source=str(path))
    text = HEADER.format(name=path).replace("`nexus plan` has no part in it yet; ", "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise ConfigError(f"Expected to write {path}, found: {error.strerror}. Choose another place.") from None
    return f"wrote {path}; look it over, then type `nexus pipeline --config {path}`"


def _teacher(text: str, capabilities: list[str]) -> dict[str, Any]:
    registry = load_registry()
    if text in registry.ids():
        return {"kind": "registry", "id": text, "capabilities": capabilities}
    if Path(text).is_dir():
        folder = Path(text)
        return {"kind": "path", "id": _identifier(folder.name), "path": text, "role": "causal_lm", "capabilities": capabilities}
    if text.count("/") == 1 and not text.startswith("."):
        repo, _, revision = text.partition("@")
        return {
            "kind": "hub",
            "id": _identifier(repo.split("/")[1]),
            "repo": repo,
            "revision": revision or "main",
            "role": "causal_lm",
            "capabilities": capabilities,
        }
    # The registry's own error names the nearest id.
    registry.get(text)
    raise AssertionError("an id that the registry does not list is refused above")


def _data(text: str) -> dict[str, Any]:
    capability, equals, folder_text = text.partition("=")
    if not equals or not capability:
        raise ConfigError(f"Expected --data CAPABILITY=FOLDER, found {text!r}. Example: --data code=data/code")
    folder = Path(folder_text)
    if not folder.is_dir():
        raise ConfigError(f"Expected a folder with pool, labelled and test files at {folder}, found none. Correct --data {text}.")
    files = {split: sorted(str(file) for file in folder.iterdir() if file.stem.startswith(split) and file.suffix in SUFFIXES) for split in SPLITS}
    for split in SPLITS:
        if not files[split]:
            raise ConfigError(
                f"Expected a file {split}*{{{','.join(SUFFIXES)}}} in {folder}, found none. Three disjoint sets are needed: pool, labelled, test."
            )
    source: dict[str, Any] = {"capability": capability, **files, "max_new_tokens": 128, "batch_size": 8}
    DataConfig.model_validate_json(yaml_to_json(source))
    return source


def _example_data(capability: str) -> dict[str, Any]:
    files = {split: [f"data/{capability}/{split}.parquet"] for split in SPLITS}
    return {"capability": capability, **files, "max_new_tokens": 128, "batch_size": 8}


def _identifier(name: str) -> str:
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in name.lower()).strip("._-") or "teacher"


def yaml_to_json(document: dict[str, Any]) -> str:
    """The document as JSON text, which strict models read."""
    import json

    return json.dumps(document)
