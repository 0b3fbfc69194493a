"""Errors that belong to single rows, and batches of rows of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nexus.errors import DataError


class RowsError(DataError):
    """Some rows of a request cannot be answered; the others can be asked for again without them."""

    def __init__(self, what: str, reasons: dict[str, str]) -> None:
        """`what` says what was expected and what to do, `reasons` maps each bad row's id to what was found."""
        self.what = what
        self.reasons = reasons
        shown = "; ".join(f"{row_id}: {reason}" for row_id, reason in list(reasons.items())[:5])
        more = f" and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        super().__init__(f"{what} Found {len(reasons)} bad rows: {shown}{more}.")

    def __reduce__(self) -> tuple[type[RowsError], tuple[str, dict[str, str]]]:
        return type(self), (self.what, self.reasons)


def micro_batches(lengths: Sequence[int], *, max_rows: int, max_positions: int) -> Iterator[list[int]]:
    """Row indices in batches of like length, the longest first, so that memory peaks at once.

    A batch holds at most `max_rows` rows and at most `max_positions` padded positions, but always one row.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    while order:
        size = max(1, min(max_rows, max_positions // max(1, lengths[order[0]])))
        yield order[:size]
        order = order[size:]
