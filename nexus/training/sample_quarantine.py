"""Which samples were in a batch that looked wrong, across rollbacks, epochs and restarts."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

BatchKey: TypeAlias = tuple[str, ...]
"""A batch by the ids of its samples, because a step index means another batch after a rollback."""


class SampleQuarantine:
    """Samples that were in a flagged batch, by id.

    A sample is a *suspect* until the end of its epoch, because its neighbours, or the state of the model, may be to blame. It is
    *confirmed* by a second, independent hit: in another epoch or among other neighbours. Rollbacks do not undo anything here.

    Args:
        path: JSON lines, one per decision, appended to; what an earlier run wrote is read first. None keeps it in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.epoch = 0
        self._hits: dict[str, set[tuple[int, BatchKey]]] = {}
        self._suspects: set[str] = set()
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8")
            complete = text[: text.rfind("\n") + 1]
            if complete != text:  # the process was killed while it wrote its last line
                path.write_text(complete, encoding="utf-8")
            for line in complete.splitlines():
                entry = json.loads(line)
                if entry["event"] == "epoch":
                    self._release(entry["epoch"])
                elif entry["event"] == "acquitted":
                    self._drop(tuple(entry["sample_ids"]), entry["epoch"])
                else:
                    self._add(tuple(entry["sample_ids"]), entry["epoch"])

    @property
    def suspects(self) -> frozenset[str]:
        """Samples to leave out until the epoch ends."""
        return frozenset(self._suspects)

    @property
    def confirmed(self) -> frozenset[str]:
        """Samples to leave out for good."""
        return frozenset(sample_id for sample_id, hits in self._hits.items() if len(hits) > 1)

    def __contains__(self, sample_id: Hashable) -> bool:
        """True for a sample that should not be drawn now."""
        return str(sample_id) in self._suspects or len(self._hits.get(str(sample_id), ())) > 1

    def add(self, sample_ids: Iterable[Hashable]) -> None:
        """Record one flagged batch."""
        key = tuple(str(sample_id) for sample_id in sample_ids)
        if key:
            self._add(key, self.epoch)
            self._append({"event": "suspect", "epoch": self.epoch, "sample_ids": list(key)})

    def acquit(self, batches: Iterable[Iterable[Hashable]]) -> None:
        """Take back the hits of these batches in this epoch: the level of the loss had changed, and not they were to blame."""
        for sample_ids in batches:
            key = tuple(str(sample_id) for sample_id in sample_ids)
            self._drop(key, self.epoch)
            self._append({"event": "acquitted", "epoch": self.epoch, "sample_ids": list(key)})

    def start_epoch(self, epoch: int) -> None:
        """Release the suspects: they are drawn again in epoch number `epoch`, and a second hit there confirms them."""
        self._release(epoch)
        self._append({"event": "epoch", "epoch": epoch})

    def _add(self, key: BatchKey, epoch: int) -> None:
        for sample_id in key:
            self._hits.setdefault(sample_id, set()).add((epoch, key))
        self._suspects.update(key)

    def _drop(self, key: BatchKey, epoch: int) -> None:
        for sample_id in key:
            self._hits.get(sample_id, set()).discard((epoch, key))
        self._suspects.difference_update(key)

    def _release(self, epoch: int) -> None:
        self.epoch = epoch
        self._suspects.clear()

    def _append(self, entry: Mapping[str, object]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
