"""`nexus teachers list|show|pull|check|verify`: the registry on the command line; tax is in tax.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus.towers.registry import base_of, load_registry, pull_teacher

if TYPE_CHECKING:
    from nexus.towers.check import CheckRow
    from nexus.towers.verify import VerifyRow

COLUMNS = ("id", "role", "towers", "capabilities", "GiB in NF4", "needs")
MAX_NEEDS = 46
"""Characters of the last column; `nexus teachers show` has the whole text."""


def teachers_document() -> dict[str, Any]:
    """All entries as plain JSON values."""
    return {"teachers": [entry.model_dump(mode="json") for entry in load_registry().teachers]}


def list_teachers() -> str:
    """All entries as an aligned table."""
    registry = load_registry()
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
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def teacher_document(teacher: str) -> dict[str, Any]:
    """One entry as plain JSON values."""
    return load_registry().get(teacher).model_dump(mode="json")


def show_teacher(teacher: str) -> str:
    """One entry as YAML."""
    import yaml

    return yaml.safe_dump(teacher_document(teacher), sort_keys=False, allow_unicode=True).rstrip()


def pull_teachers(teachers: tuple[str, ...], *, models_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """Fetch checkpoints, and the models that they read; id and folder of each that arrived.

    Raises:
        TowerLoadError: unknown id, no network, gated or missing repository.
    """
    registry = load_registry()
    # All ids are looked up before the first gigabyte is fetched.
    entries = [registry.get(teacher) for teacher in teachers]
    for entry in entries:
        for part in (entry, *([base_of(entry)] if entry.base else [])):
            yield part.id, pull_teacher(part, models_dir=models_dir)


def check_rows(teachers: str | None, *, tiny: bool, models_dir: Path | None, keep: Path | None) -> Iterator[CheckRow]:
    """Try teachers, given as ids between commas or None for all; tiny ones are left in `keep`.

    Raises:
        TowerLoadError: an unknown id.
    """
    from nexus.towers.check import check_teachers

    quiet_libraries()
    ids = tuple(name for name in (teachers or "").split(",") if name)
    yield from check_teachers(load_registry(), ids, tiny=tiny, models_dir=models_dir, keep=keep)


def quiet_libraries() -> None:
    """One bar and several hints per checkpoint would bury the rows."""
    import logging

    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def render_verification(row: VerifyRow) -> str:
    """One row for people."""
    outcome = row.status if row.status == "ok" else f"{row.status}: {row.reason}"
    notes = [f"verified: {', '.join(row.verified)}"] if row.verified else []
    notes += [f"verify: online ({', '.join(row.online)})"] if row.online else []
    return f"{row.id:<24} {outcome}" + (f"  [{'; '.join(notes)}]" if notes else "")


def check_document(row: CheckRow) -> dict[str, Any]:
    """One row as plain JSON values."""
    document = asdict(row)
    # Told to people only; the columns for machines are fixed.
    del document["method"]
    return {**document, "targets": list(row.targets)}


def render_check(row: CheckRow) -> str:
    """One row for people."""
    if row.status == "ok":
        nf4 = f"{row.quantised_share:.1%} {row.method}" if row.quantised else "floating point"
        bits = "" if row.bits_per_param is None else f", {row.bits_per_param:.2f} bits"
        outcome = f"ok ({nf4}{bits}; {', '.join(row.targets)})"
    else:
        outcome = f"{row.status}: {row.reason}"
    return f"{row.id:<24} {row.role:<10} {row.seconds:5.1f} s  {outcome}"
