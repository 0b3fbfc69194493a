"""Checkpoints compared with the registry: what is right, what is wrong in one line, and what only the repository can tell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from nexus.artifacts import sha256_of
from nexus.errors import TowerLoadError
from nexus.towers.loader import check_tensors
from nexus.towers.registry import TeacherRegistry, TeacherSpec, load_registry
from nexus.towers.verify import VerifyRow, verify_teachers

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def local(tmp_path: Path, qwen_folder: Path) -> Path:
    """The checkpoint of teacher `tiny` in a models folder."""
    return Path(shutil.copytree(qwen_folder, tmp_path / "tiny"))


def verify(models_dir: Path, **changes: Any) -> VerifyRow:
    registry = load_registry()
    parameters = sum(t.numel() for t in load_file(models_dir / "tiny" / "model.safetensors").values()) / 1e9
    settings = {"id": "tiny", "billion_parameters": parameters, "verify": ("revision",), **changes}
    entry = registry.get("agentcpm-explore").model_copy(update=settings)
    (row,) = verify_teachers(
        TeacherRegistry(contracts=registry.contracts, teachers=(entry,)), (), models_dir=models_dir
    )
    return row


def note(folder: Path, *, commit: str = COMMIT, digest: str | None = None) -> None:
    """What the hub's client leaves beside a file that it fetched into a folder."""
    path = folder / ".cache/huggingface/download/model.safetensors.metadata"
    path.parent.mkdir(parents=True)
    path.write_text(f"{commit}\n{digest or sha256_of(folder / 'model.safetensors')}\n0.0\n")


def test_a_whole_checkpoint_is_ok_and_says_what_only_the_repository_can_tell(local: Path, tmp_path: Path) -> None:
    row = verify(tmp_path)
    assert (row.status, row.reason) == ("ok", None)
    assert row.verified == ("files", "config", "tensors", "parameters")
    assert row.online == ("revision", "sha256 of model.safetensors")


def test_the_notes_of_the_hubs_client_prove_hash_and_revision(local: Path, tmp_path: Path) -> None:
    note(local)
    row = verify(tmp_path, revision=COMMIT, verify=())
    assert row.verified == ("files", "sha256", "revision", "config", "tensors", "parameters")
    assert row.online == ()
    row = verify(tmp_path, revision=OTHER, verify=())
    assert row.status == "failed"
    assert f"Expected revision {OTHER}" in (row.reason or "")
    assert f"found {COMMIT}" in (row.reason or "")


def test_the_hubs_cache_names_files_by_their_hash_and_folders_by_their_commit(
    qwen_folder: Path, tmp_path: Path
) -> None:
    snapshot = Path(shutil.copytree(qwen_folder, tmp_path / "snapshots" / COMMIT))
    weights = snapshot / "model.safetensors"
    blob = tmp_path / sha256_of(weights)
    weights.rename(blob)
    weights.symlink_to(blob)
    (tmp_path / "tiny").symlink_to(snapshot)
    assert verify(tmp_path, revision=COMMIT).verified[:3] == ("files", "sha256", "revision")
    with blob.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    row = verify(tmp_path, revision=COMMIT)
    assert row.status == "failed"
    assert f"Expected sha256 {blob.name}" in (row.reason or "")


def test_a_pinned_revision_without_any_note_needs_the_repository(local: Path, tmp_path: Path) -> None:
    assert "revision of the files" in verify(tmp_path, revision=COMMIT, verify=()).online


def test_a_truncated_file_a_missing_shard_and_a_wrong_type_are_one_line_each(local: Path, tmp_path: Path) -> None:
    def reason(**changes: Any) -> str:
        row = verify(tmp_path, **changes)
        assert row.status == "failed"
        assert "\n" not in (row.reason or "")
        return row.reason or ""

    assert "Expected model_type 'llama'" in reason(model_type="llama")
    assert "Expected 4 billion parameters" in reason(billion_parameters=4.0)
    index = local / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert "Expected the shard" in reason()
    index.unlink()
    tensors = load_file(local / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file({**tensors, "extra": torch.ones(1)}, local / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing (model.norm.weight)" in reason()
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, local / "model.safetensors", metadata={"format": "pt"})
    assert "Expected shape (64,) for 'model.norm.weight'" in reason()
    extra = {**tensors, "model.norm.weight": torch.ones(64), "extra": torch.ones(1)}
    save_file(extra, local / "model.safetensors", metadata={"format": "pt"})
    assert "1 unexpected (extra)" in reason()


def test_a_truncated_file_is_named(local: Path, tmp_path: Path) -> None:
    registry = load_registry()
    entry = registry.get("agentcpm-explore").model_copy(update={"id": "tiny"})
    path = local / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    (row,) = verify_teachers(
        TeacherRegistry(contracts=registry.contracts, teachers=(entry,)), ("tiny",), models_dir=tmp_path
    )
    assert row.status == "failed"
    assert f"Expected readable safetensors in {path}" in (row.reason or "")


def test_absent_teachers_are_absent_and_unknown_ids_refused(tmp_path: Path) -> None:
    (row,) = verify_teachers(load_registry(), ("qwen2.5-0.5b",), models_dir=tmp_path)
    assert (row.status, row.verified) == ("absent", ())
    assert "nexus teachers pull qwen2.5-0.5b" in (row.reason or "")
    assert row.online == ("revision", "licence")
    with pytest.raises(TowerLoadError, match="Did you mean"):
        list(verify_teachers(load_registry(), ("qwen2.5-0.5",), models_dir=tmp_path))


def test_folders_of_several_parts_are_compared_file_by_file(tmp_path: Path) -> None:
    registry = load_registry()
    entry = registry.get("gemma-scope-2-27b").model_copy(update={"id": "scope"})
    (tmp_path / "scope" / "layer").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, tmp_path / "scope" / "layer" / "params.safetensors")
    assert entry.base is not None
    (tmp_path / entry.base.partition("/")[2]).mkdir()
    (row,) = verify_teachers(TeacherRegistry(contracts=registry.contracts, teachers=(entry,)), (), models_dir=tmp_path)
    assert (row.status, row.verified) == ("ok", ("files",))


def test_tensors_that_a_class_merges_while_it_loads_have_a_place(
    text_config: dict[str, Any], tmp_path: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**text_config, **experts))
    model.save_pretrained(tmp_path)
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert check_tensors(spec_of(tmp_path)) == model.num_parameters()
    tied = Qwen3ForCausalLM(Qwen3Config(**text_config, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    assert check_tensors(spec_of(tmp_path / "tied")) == tied.num_parameters()
