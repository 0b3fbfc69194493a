"""Tries teachers of a vendor's package in its environment; started by `nexus teachers check` as `python -m nexus.vendors.check`.

Argument: a JSON list of [registry id, folder of the checkpoint]. Where there is no such folder it is built tiny there, and for null
anywhere. With `--tax` behind it each teacher is loaded in floating point too and weighed. Standard output: one JSON object a line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nexus.errors import NexusError
from nexus.towers.registry import TeacherEntry, load_registry, spec_of_entry
from nexus.towers.targets import TeacherTargets
from nexus.towers.tax import target_tax, whole_distributions
from nexus.vendors.engine import VendorEngine, load_vendor_engine, probe_request
from nexus.vendors.tiny import write_tiny

WEIGH = "--tax"


def try_teacher(entry: TeacherEntry, folder: Path | None, *, weigh: bool = False) -> dict[str, Any]:
    """What became of one teacher, as fields of `nexus.towers.check.CheckRow`; `weigh` adds those of `TargetTax`."""
    start = time.perf_counter()
    row: dict[str, Any] = {"id": entry.id, "status": "ok", "reason": None}
    try:
        with tempfile.TemporaryDirectory(prefix="nexus-check-") as scratch:
            folder = folder or Path(scratch) / entry.id
            if not folder.exists():
                write_tiny(entry.library, entry.role, folder)
            engine = load_vendor_engine(spec_of_entry(entry, folder))
            targets = exercise(engine)
            if weigh:
                request = whole_distributions(probe_request(engine), engine.vocabulary_size)
                original = load_vendor_engine(engine.spec, quantise=False)
                row["tax"] = asdict(target_tax(original.score(request), engine.score(request)))
                row["max_weight_error"] = engine.coverage.max_weight_error
        coverage = engine.coverage
        row |= {
            "quantised": coverage.quantised_params > 0,
            "quantised_share": coverage.share,
            "quantisable_share": coverage.quantisable_share,
            "stored_bytes": coverage.stored_bytes,
            "bits_per_param": coverage.bits_per_param if coverage.quantised_params else None,
            "targets": kinds(targets),
        }
    except NexusError as error:
        row |= {"status": "failed", "reason": str(error)}
    except Exception as error:  # the one place that decides: a library's own mistake is this row's result
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {**row, "seconds": time.perf_counter() - start}


def exercise(engine: VendorEngine) -> TeacherTargets:
    """Targets of two spoken rows."""
    layers = tuple(sorted({0, engine.num_layers - 1})) if engine.num_layers else ()
    return engine.score(probe_request(engine, layers))


def kinds(targets: TeacherTargets) -> list[str]:
    """Kinds of target, by the names of `nexus.towers.check`."""
    found = []
    if targets.tokens is not None:
        found.append("tokens")
    if targets.hidden:
        found.append("hidden")
    if targets.codec is not None:
        found += ["codes", "latents", "reconstruction"]
    return found


def main() -> None:
    """Try every teacher of the argument."""
    rows = sys.stdout
    # The packages' greetings are not rows.
    sys.stdout = sys.stderr
    registry = load_registry()
    for teacher, folder in json.loads(sys.argv[1]):
        row = try_teacher(registry.get(teacher), None if folder is None else Path(folder), weigh=WEIGH in sys.argv)
        print(json.dumps(row), file=rows, flush=True)


if __name__ == "__main__":
    main()
