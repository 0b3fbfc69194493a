"""Checkpoints: complete or absent, verified on reading, tied weights stored once."""

from __future__ import annotations

import os
import resource

import pytest
import torch

from nexus.errors import ArtifactError
from nexus.training.checkpoint import STATE_FILE, WEIGHTS_FILE, list_checkpoints, load_checkpoint, save_checkpoint


def _save(folder, step, **changes):
    tied = torch.arange(6.0).reshape(2, 3) + step
    values = {
        "step": step,
        "fingerprint": "f",
        "weights": {
            "head": tied,
            "embed": tied,
            "other": torch.ones(3),
            "empty": torch.empty(0),
            "empty2": torch.empty(0),
        },
        "state": {"step": step, "rng": torch.get_rng_state(), "list": [1, 2.5, "x"]},
    }
    return save_checkpoint(folder, **{**values, **changes})


def test_a_checkpoint_reads_back_equal_with_tied_weights_stored_once(tmp_path):
    folder = _save(tmp_path, 3)
    step, weights, state = load_checkpoint(tmp_path, fingerprint="f")
    assert step == 3
    assert set(weights) == {"head", "embed", "other", "empty", "empty2"}
    assert torch.equal(weights["head"], weights["embed"])
    assert torch.equal(weights["head"], torch.arange(6.0).reshape(2, 3) + 3)
    assert state["list"] == [1, 2.5, "x"]
    assert (folder / WEIGHTS_FILE).stat().st_size < 700


def test_the_newest_is_loaded_and_only_the_newest_two_are_kept(tmp_path):
    for step in (1, 2, 30):
        _save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000030"]
    assert load_checkpoint(tmp_path, fingerprint="f")[0] == 30


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "nowhere", fingerprint="f") is None


def test_a_folder_left_by_a_killed_process_is_no_checkpoint(tmp_path):
    _save(tmp_path, 1)
    (tmp_path / ".step-00000002.99.tmp").mkdir()
    assert load_checkpoint(tmp_path, fingerprint="f")[0] == 1


def test_saving_the_same_step_again_replaces_it(tmp_path):
    _save(tmp_path, 1)
    _save(tmp_path, 1, state={"step": 7})
    assert load_checkpoint(tmp_path, fingerprint="f")[2] == {"step": 7}


def test_another_configuration_is_refused(tmp_path):
    _save(tmp_path, 1)
    with pytest.raises(ArtifactError, match="Choose another --out"):
        load_checkpoint(tmp_path, fingerprint="g")


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    folder = _save(tmp_path, 1)
    if damage == "change":
        (folder / STATE_FILE).write_bytes(b"x")
    else:
        (folder / STATE_FILE).unlink()
    with pytest.raises(ArtifactError, match=f"Delete {folder}"):
        load_checkpoint(tmp_path, fingerprint="f")


def test_a_disk_that_refuses_leaves_the_previous_checkpoint(tmp_path):
    _save(tmp_path, 1)
    # A file where the folder has to go makes the system refuse.
    (tmp_path / f".step-00000002.{os.getpid()}.tmp").write_text("")
    with pytest.raises(ArtifactError, match="Free disk space"):
        _save(tmp_path, 2)
    assert load_checkpoint(tmp_path, fingerprint="f")[0] == 1


def test_a_disk_that_is_full_while_the_state_is_written_is_named_and_keeps_the_previous_checkpoint(tmp_path):
    _save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # the system refuses as a full disk does
    try:
        with pytest.raises(ArtifactError, match=r"found: .*File too large"):
            _save(tmp_path, 2, state={"moments": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path, fingerprint="f")[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_the_weights_were_learned_from_is_compared_by_name(tmp_path):
    _save(tmp_path, 1, sources={"teacher a": "1", "teacher b": "2", "the pretrained trunk": "3"})
    assert load_checkpoint(tmp_path, fingerprint="f", sources={"teacher a": "1", "teacher b": "2"})[0] == 1
    with pytest.raises(
        ArtifactError, match=r"Expected teacher b as it was when .* was written \(2\), found another \(9\)"
    ):
        load_checkpoint(tmp_path, fingerprint="f", sources={"teacher a": "1", "teacher b": "9"})
