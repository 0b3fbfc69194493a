"""Artefacts: written whole or not at all, read by the model that wrote them; errors survive the way between processes."""

from __future__ import annotations

import hashlib
import os
import pickle

import pytest

from nexus import errors
from nexus.artifacts import (
    CriticalLayer,
    StageRecord,
    fingerprint_of,
    read_artifact,
    sha256_of,
    write_artifact,
    write_bytes_atomically,
)
from nexus.errors import ArtifactError


def _record() -> StageRecord:
    return StageRecord(
        stage="profile",
        fingerprint="ab",
        seconds=1.5,
        peak_memory_gib=0.1,
        outputs={"a": "b"},
        summary={"rows": 3, "x": "y"},
    )


def test_an_artifact_reads_back_equal(tmp_path):
    write_artifact(tmp_path / "deep" / "record.json", _record())
    assert read_artifact(tmp_path / "deep" / "record.json", StageRecord) == _record()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["record.json"]


def test_a_missing_or_damaged_artifact_names_the_remedy(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        read_artifact(tmp_path / "none.json", StageRecord)
    (tmp_path / "bad.json").write_text('{"stage": 3}')
    with pytest.raises(ArtifactError, match="Delete it and run its stage again"):
        read_artifact(tmp_path / "bad.json", StageRecord)
    (tmp_path / "half.json").write_text('{"stage": "pro')
    with pytest.raises(ArtifactError, match="Delete it"):
        read_artifact(tmp_path / "half.json", StageRecord)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "file"
    target.mkdir()  # a rename over a folder fails as a full disk would: after the temporary file was written
    (target / "inside").write_text("old")
    with pytest.raises(ArtifactError, match="Free disk space"):
        write_bytes_atomically(target, b"new")
    assert (target / "inside").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="greater than 0"):
        CriticalLayer(layer=0, weight=0.0)


def test_hashes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 10)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc" * 10).hexdigest()
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})


@pytest.mark.parametrize(
    "kind",
    [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.NexusError)],
    ids=lambda kind: kind.__name__,
)
def test_every_error_survives_the_way_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("expected a, found b. Do c.")))
    assert type(error) is kind
    assert str(error) == "expected a, found b. Do c."


def test_mistakes_of_a_user_are_told_from_failures():
    assert issubclass(errors.DataError, errors.UserError)
    assert issubclass(errors.ArtifactError, ValueError)
    assert not issubclass(errors.TrainingDivergedError, errors.UserError)
