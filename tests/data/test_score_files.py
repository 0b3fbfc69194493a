"""Cached targets in Parquet: what is read is what was packed, by row id, and files of other settings are refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nexus.data import targets as module
from nexus.data.targets import ScoreReader, ScoreSettings, ScoreWriter
from nexus.errors import ArtifactError
from nexus.towers.packing import pack_targets, unpack_targets
from nexus.towers.targets import FullTargets, SampledTargets, TeacherTargets, TokenTargets

V, H = 1000, 4
SETTINGS = ScoreSettings(
    teacher="t", fingerprint="f", temperature=2.0, transport="topk", width=3, layers=(1, 5), hidden_size=H, snr_db=None
)
LABELS = ScoreSettings(
    teacher="t", fingerprint="f", temperature=2.0, transport=None, width=None, layers=(0,), hidden_size=H, snr_db=10.0
)


def language(first: int, lengths, kind: str = "topk") -> TeacherTargets:
    random = np.random.default_rng(first)
    total = sum(lengths)
    scored = (np.cumsum([0, *lengths], dtype=np.int64), random.integers(0, V, total, dtype=np.int32))
    ids = random.integers(0, V, (total, 3), dtype=np.int32)
    values = -random.exponential(size=(total, 3)).astype(np.float32)
    tokens = {
        "topk": lambda: TokenTargets(*scored, ids, values, values[:, 0]),
        "sampled": lambda: SampledTargets(*scored, ids, values),
        "full": lambda: FullTargets(*scored, values),
    }[kind]()
    return TeacherTargets(
        teacher="t",
        fingerprint="f",
        tokenizer_hash=None,
        row_ids=tuple(f"r{first + n}" for n in range(len(lengths))),
        tokens=tokens,
        hidden={layer: random.normal(size=(total, H)).astype(np.float16) for layer in (1, 5)},
        pooled_BE=None,
        label_texts=None,
        label_logprobs_BC=None,
    )


def labels(first: int, count: int) -> TeacherTargets:
    random = np.random.default_rng(first)
    return TeacherTargets(
        teacher="t",
        fingerprint="f",
        tokenizer_hash=None,
        row_ids=tuple(f"r{first + n}" for n in range(count)),
        tokens=None,
        hidden={0: random.normal(size=(count, 6, H)).astype(np.float16)},
        pooled_BE=random.normal(size=(count, 5)).astype(np.float32),
        label_texts=("a", "b"),
        label_logprobs_BC=random.normal(size=(count, 2)).astype(np.float32),
    )


def write(folder, batches, settings=SETTINGS, rows_per_file=4, *, finish=True) -> ScoreWriter:
    writer = ScoreWriter(folder, capability="math", settings=settings, rows_per_file=rows_per_file)
    for batch in batches:
        writer.write(pack_targets(batch, vocabulary_size=V))
    if finish:
        writer.finish()
    return writer


def read(folder, row_ids, settings=SETTINGS, label_texts=None) -> TeacherTargets:
    reader = ScoreReader(folder, capability="math", settings=settings)
    return unpack_targets(reader.read(row_ids, label_texts=label_texts))


@pytest.mark.parametrize("kind", ["topk", "sampled", "full"])
def test_rows_come_back_as_they_would_have_travelled(tmp_path, kind):
    settings = SETTINGS.model_copy(update={"transport": kind})
    batches = [language(0, (3, 0, 2), kind), language(3, (1, 4, 2, 2), kind)]
    write(tmp_path, batches, settings)
    assert [path.name for path in ScoreWriter.files(tmp_path, "math")] == ["math-00000.parquet", "math-00001.parquet"]
    for batch in batches:
        assert read(tmp_path, batch.row_ids, settings) == unpack_targets(pack_targets(batch, vocabulary_size=V))
    # Any rows in any order, a row twice.
    mixed = read(tmp_path, ("r4", "r0", "r4"), settings)
    assert np.diff(mixed.tokens.offsets_B1).tolist() == [4, 3, 4]
    np.testing.assert_array_equal(mixed.tokens.token_ids_N[:4], batches[1].tokens.token_ids_N[1:5])
    np.testing.assert_array_equal(mixed.hidden[5][4:7], batches[0].hidden[5][:3])


def test_an_encoder_s_rows_keep_their_shapes(tmp_path):
    whole = labels(0, 7)
    write(tmp_path, [whole], LABELS)
    assert read(tmp_path, whole.row_ids, LABELS, ("a", "b")) == whole
    assert read(tmp_path, ("r6", "r2"), LABELS, ("a", "b")).hidden[0].shape == (2, 6, H)


def test_the_types_are_those_of_the_schema(tmp_path):
    write(tmp_path, [language(0, (2, 3))])
    schema = pq.read_schema(ScoreWriter.files(tmp_path, "math")[0])
    assert schema.field("values").type == pa.list_(pa.uint16())
    assert schema.field("ids").type == pa.binary()
    assert schema.field("hidden_1").type == pa.list_(pa.list_(pa.float16(), H))
    assert schema.field("label_logprobs").type == pa.list_(pa.float32())


def test_a_killed_extraction_continues_after_its_last_whole_file(tmp_path):
    cut = write(tmp_path, [language(0, (1, 2, 3)), language(3, (1, 1, 1))], finish=False)
    assert (cut.rows, cut.complete) == (4, False)
    with pytest.raises(ArtifactError, match="no complete set"):
        read(tmp_path, ("r0",))
    again = ScoreWriter(tmp_path, capability="math", settings=SETTINGS, rows_per_file=4)
    assert again.rows == 4
    again.write(pack_targets(language(4, (1, 1)), vocabulary_size=V))
    again.finish()
    assert (again.rows, again.complete) == (6, True)
    assert ScoreWriter.rows_of(tmp_path, "math") == 6
    assert read(tmp_path, ("r5", "r0")).row_ids == ("r5", "r0")


def test_a_row_without_targets_is_named(tmp_path):
    write(tmp_path, [language(0, (1, 1))])
    with pytest.raises(ArtifactError, match=r"'r7'.*the data changed"):
        read(tmp_path, ("r7",))
    write(tmp_path / "none", [])
    with pytest.raises(ArtifactError, match="'r0'"):
        read(tmp_path / "none", ("r0",))


def test_two_ids_of_one_hash_do_not_take_each_other_s_targets(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_hash_of", lambda _row_id: 5)
    write(tmp_path, [language(0, (1,))])
    assert read(tmp_path, ("r0",)).row_ids == ("r0",)
    with pytest.raises(ArtifactError, match="'r1'"):
        read(tmp_path, ("r1",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 1.0}, "temperature 1.0, found 2.0"),
        ({"width": 64, "transport": "sampled"}, "transport sampled, found topk; width 64, found 3"),
        ({"layers": (1,)}, r"layers \(1,\), found \(1, 5\)"),
        ({"snr_db": 3.0}, "snr_db 3.0, found None"),
        ({"teacher": "other"}, "teacher other, found t"),
        ({"fingerprint": "new"}, "fingerprint new"),
    ],
)
def test_targets_of_other_settings_are_refused_by_name(tmp_path, changes, words):
    write(tmp_path, [language(0, (1,))])
    settings = SETTINGS.model_copy(update=changes)
    with pytest.raises(ArtifactError, match=words):
        ScoreReader(tmp_path, capability="math", settings=settings)
    with pytest.raises(ArtifactError, match=words):
        ScoreWriter(tmp_path, capability="math", settings=settings, rows_per_file=4)


def test_a_file_that_says_nothing_of_its_settings_is_refused(tmp_path):
    table = pa.table({"id": ["r0"]}).replace_schema_metadata({"nexus_fingerprint": "f"})
    pq.write_table(table, tmp_path / "math-00000.parquet")
    (tmp_path / "math.json").write_text("{}")
    with pytest.raises(ArtifactError, match="what its targets depend on"):
        ScoreReader(tmp_path, capability="math", settings=SETTINGS)


def test_few_groups_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(module, "GROUPS_IN_MEMORY", 2)
    whole = language(0, (1,) * 9)
    write(tmp_path, [whole], rows_per_file=5)
    reader = ScoreReader(tmp_path, capability="math", settings=SETTINGS)
    for _ in range(2):
        for row_id in whole.row_ids:
            tokens = unpack_targets(reader.read((row_id,), label_texts=None)).tokens
            place = whole.row_ids.index(row_id)
            assert tokens.token_ids_N.tolist() == [whole.tokens.token_ids_N[place]]
            assert len(reader._read) <= 2


def test_no_layers_and_empty_rows_are_kept(tmp_path):
    settings = SETTINGS.model_copy(update={"layers": ()})
    bare = replace(language(0, (0, 2)), hidden={})
    write(tmp_path, [bare], settings)
    assert read(tmp_path, ("r0", "r1"), settings) == unpack_targets(pack_targets(bare, vocabulary_size=V))
