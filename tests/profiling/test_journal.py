"""The journal of a profile: what is read back is what was written, bit for bit, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch

from nexus.profiling import journal as journal_module
from nexus.profiling.activation import ActivationMoments, MeanUpdate
from nexus.profiling.consolidation import BatchMeasurement, merge_measurements, plan_confirmation
from nexus.profiling.journal import ConfirmedRows, MeasuredRows, ProfileJournal
from nexus.profiling.niwt import EncoderProfileBatch, NIWTProfiler, ProfileBatch
from nexus.profiling.spectral import Comoment


@pytest.fixture(scope="module")
def measured(siglip) -> MeasuredRows:
    """Of an encoder with labels: every part of a measurement is there but the language model's."""
    generator = torch.Generator().manual_seed(0)
    size = siglip.config.vision_config.image_size
    images = torch.randn(4, 3, size, size, generator=generator)
    batch = EncoderProfileBatch(["a", "b", "c", "d"], {"pixel_values": images}, torch.tensor([0, 1, 0, 1]))
    return MeasuredRows(5, NIWTProfiler(siglip).measure(batch), 1.5)


def leaves(value) -> list[object]:
    """Arrays as bytes with type and shape, everything else as it is, in order."""
    if isinstance(value, np.ndarray):
        return [(value.dtype.str, value.shape, value.tobytes())]
    if dataclasses.is_dataclass(value):
        return [
            type(value),
            *(leaf for field in dataclasses.fields(value) for leaf in leaves(getattr(value, field.name))),
        ]
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *leaves(item))]
    return [value]


def test_entries_come_back_bit_for_bit(measured, qwen3, text_batch, tmp_path):
    rows = ProfileBatch(list("vwxyz"), text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    profiler = NIWTProfiler(qwen3)
    text = profiler.measure(rows)
    confirmed = ConfirmedRows(tuple("vwxyz"), profiler.confirm(rows, plan_confirmation(text, seed=0)))
    written = {
        ("teacher", "images"): measured,
        ("teacher", "text"): MeasuredRows(5, text, 0.25),
        ("teacher", "second"): confirmed,
        ("other", "nothing"): MeasuredRows(3, None, 0.0),
    }
    journal = ProfileJournal(tmp_path / "journal")
    for name, entry in written.items():
        journal.write(name, "f", entry)
    for name, entry in written.items():
        found = ProfileJournal(tmp_path / "journal").read(name, "f", type(entry))
        assert leaves(found) == leaves(entry)


def test_an_absent_damaged_or_foreign_entry_is_none(measured, tmp_path):
    journal = ProfileJournal(tmp_path / "journal")
    assert journal.read(("t", "c"), "f", MeasuredRows) is None
    journal.write(("t", "c"), "f", measured)
    assert journal.read(("t", "c"), "g", MeasuredRows) is None
    assert journal.read(("t", "c"), "f", ConfirmedRows) is None
    path = tmp_path / "journal" / "t" / "c.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert journal.read(("t", "c"), "f", MeasuredRows) is None
    journal.write(("t", "c"), "f", measured)
    journal.remove()
    assert not path.parent.parent.exists()


def test_what_grows_is_written_at_once_then_as_often_as_its_share_of_the_time_allows(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "MAX_WRITING_SHARE", 1e-9)
    journal = ProfileJournal(tmp_path)

    def rows() -> int:
        entry = ProfileJournal(tmp_path).read(("t", "c"), "f", MeasuredRows)
        assert entry is not None
        return entry.num_rows

    for count in (1, 2, 3):
        journal.note(("t", "c"), "f", dataclasses.replace(measured, num_rows=count))
    assert rows() == 1
    journal.flush()
    assert rows() == 3
    monkeypatch.setattr(journal_module, "MAX_WRITING_SHARE", 1.0)
    journal.note(("t", "d"), "f", measured)
    for count in (4, 5):
        journal.note(("t", "d"), "f", dataclasses.replace(measured, num_rows=count))
        entry = journal.read(("t", "d"), "f", MeasuredRows)
        assert entry is not None
        assert entry.num_rows == count


def test_memory_of_folding_and_journalling_does_not_grow_with_the_rows(tmp_path):
    def measured(number: int, layers: int = 4, width: int = 128) -> BatchMeasurement:
        states = torch.randn(8, width, generator=torch.Generator().manual_seed(number))
        ids = tuple(f"{number}-{row}" for row in range(2))
        zeros_LB = np.zeros((layers, 2))
        return BatchMeasurement(
            metric="delta_nll",
            strategy="brute",
            sample_ids=ids,
            token_counts_B=np.ones(2, dtype=np.int64),
            clean_nll_B=np.zeros(2),
            delta_LB=zeros_LB,
            kl_LB=zeros_LB,
            cosine_drop_LB=None,
            correct_VB=None,
            moments_L=(ActivationMoments.of(states),) * layers,
            comoments_L=tuple(Comoment.of(states) for _ in range(layers)),
            updates_L=(MeanUpdate.of(states),) * layers,
            probe=None,
        )

    def peak_of(batches: int) -> int:
        journal, known = ProfileJournal(tmp_path / str(batches)), None
        tracemalloc.start()
        for number in range(batches):
            known = merge_measurements([measured(number)] if known is None else [known, measured(number)])
            journal.note(("t", "c"), "f", MeasuredRows(2 * number, known, 0.0))
        journal.flush()
        return tracemalloc.get_traced_memory()[1]

    try:
        few, many = peak_of(5), peak_of(50)
    finally:
        tracemalloc.stop()
    assert many <= 1.05 * few
