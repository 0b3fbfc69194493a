"""`nexus teachers list|show|pull`: the registry on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from nexus.towers.registry import load_registry, pull_teacher

COLUMNS = ("id", "role", "towers", "capabilities", "GiB in NF4", "needs")
MAX_NEEDS = 48
"""Characters of the last column; `nexus teachers show` has the whole text."""


def list_teachers(*, as_json: bool) -> str:
    """All entries as an aligned table, or as JSON."""
    registry = load_registry()
    if as_json:
        return json.dumps([entry.model_dump(mode="json") for entry in registry.teachers])
    rows = [COLUMNS]
    for entry in registry.teachers:
        needs = "; ".join(entry.needs)
        rows.append(
            (
                entry.id,
                entry.role,
                ",".join(entry.towers),
                ",".join(entry.capabilities),
                f"{entry.memory_gib:.1f}",
                needs if len(needs) <= MAX_NEEDS else needs[: MAX_NEEDS - 1] + "…",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def show_teacher(teacher: str, *, as_json: bool) -> str:
    """One entry as YAML, or as JSON."""
    import yaml

    document = load_registry().get(teacher).model_dump(mode="json")
    return json.dumps(document) if as_json else yaml.safe_dump(document, sort_keys=False, allow_unicode=True).rstrip()


def pull_teachers(teachers: tuple[str, ...], *, models_dir: Path | None) -> Iterator[str]:
    """Fetch checkpoints; one line for each that arrived.

    Raises:
        TowerLoadError: unknown id, no network, gated or missing repository.
    """
    registry = load_registry()
    entries = [registry.get(teacher) for teacher in teachers]
    for entry in entries:
        yield f"{entry.id}: {pull_teacher(entry, models_dir=models_dir)}"
