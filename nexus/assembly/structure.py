"""A finished student's own layers, profiled as its teachers' were: on the same labelled rows, by skipping one block of its trunk at
a time. Teacher and student can then be laid side by side (`nexus.assembly.report`).

The context that the towers give is made once per row by the whole student and kept while blocks are skipped: what is measured is
the trunk that reads it. Shape letters: B rows, T time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch

from nexus.artifacts import NIWTProfile
from nexus.assembly.bundle import BundleStudent
from nexus.config import TOWERS, DataConfig
from nexus.data.collate import collate, length_check
from nexus.data.media import usable
from nexus.data.quarantine import Quarantine
from nexus.data.records import Record, RowError
from nexus.errors import DataError
from nexus.profiling.niwt import NIWTProfiler, ProfileBatch
from nexus.student.inputs import record_media


def profile_student(
    student: BundleStudent,
    records: Iterable[Record],
    source: DataConfig,
    *,
    quarantine: Quarantine,
    max_samples: int,
    batch_size: int,
    confirm_samples: int,
    seed: int,
    revision: str,
) -> NIWTProfile:
    """The profile of a student's trunk on the first rows of one capability that it can take.

    Every block is skipped in a forward of its own: between the blocks stand the ports, which the faster sweeps would pass by.

    Args:
        records: labelled rows; those that the student cannot take go to the quarantine.
        source: whose towers are on.
        revision: written into the profile.

    Raises:
        DataError: no row can be used.
        ProfilingError: as `NIWTProfiler.profile`.
    """
    fits = length_check(student.tokenizer, student.student.core.config.max_position_embeddings)

    def check(record: Record) -> None:
        if not record.completion:
            raise RowError("expected an answer to score, found none; add it or drop the row")
        fits(record)

    rows = itertools.islice(usable(records, quarantine, check), max_samples)
    batches = student_batches(student, rows, source, batch_size)
    first = next(batches, None)
    if first is None:
        raise DataError(
            f"Expected labelled rows of {source.capability!r} to profile the student on, found none that it can take "
            f"({quarantine.first_reason() or 'no row at all'}). Name others under data.{source.capability}.labelled."
        )
    found = NIWTProfiler(student.student.core, layers="layers", strategy="brute").profile(
        itertools.chain([first], batches), seed=seed, confirm_samples=confirm_samples
    )
    return found.model_copy(update={"teacher": "student", "revision": revision})


def student_batches(
    student: BundleStudent, records: Iterable[Record], source: DataConfig, batch_size: int
) -> Iterator[ProfileBatch]:
    """Rows as the trunk reads them, prompt and answer, with what the capability's towers made of the prompt beside them."""
    rows = iter(records)
    towers_N = torch.tensor([tower in source.towers for tower in TOWERS])
    while batch := list(itertools.islice(rows, batch_size)):
        tokens = collate(batch, student.tokenizer, max_length=student.student.core.config.max_position_embeddings)
        with torch.no_grad():
            context_BCD, context_mask_BC = student.student.encode_context(
                tokens.input_ids_BT,
                tokens.attention_mask_BT,
                record_media(batch, student.student.spec, snr_db=[source.snr_db] * len(batch)),
                towers_N.expand(len(batch), -1),
                prompt_mask_BT=tokens.attention_mask_BT.bool() & ~tokens.loss_mask_BT,
            )
        context = (
            None
            if context_BCD is None or context_mask_BC is None
            else {"context_BCD": context_BCD, "context_mask_BC": context_mask_BC}
        )
        yield ProfileBatch(
            list(tokens.row_ids), tokens.input_ids_BT, tokens.attention_mask_BT, tokens.loss_mask_BT, context
        )
