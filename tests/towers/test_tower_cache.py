"""Quantised teachers on disk: equal to the first load, believed only when whole and of the same checkpoint, safe to share."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from nexus.errors import TowerLoadError
from nexus.towers.cache import (
    MANIFEST,
    BlockSpill,
    CacheEntry,
    CacheManifest,
    QuantisedCache,
    install,
    read_tensors,
    stored_state,
)
from nexus.towers.checkpoint import open_checkpoint
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import LoadedTower, TowerLoader, load_tower
from nexus.towers.nf4 import CoverageReport
from nexus.towers.registry import TeacherRegistry, TeacherSpec, load_registry
from nexus.towers.targets import ScoreRequest

Load = Callable[..., LoadedTower]


@pytest.fixture
def load(tmp_path: Path, spec_of: Callable[..., TeacherSpec]) -> Load:
    """Loads with the cache of this test."""

    def read(folder: Path, role: Any = "causal_lm", **changes: Any) -> LoadedTower:
        return load_tower(spec_of(folder, role, **{"cache_dir": str(tmp_path / "cache"), **changes}), device="cpu")

    return read


@pytest.fixture
def copy(tmp_path: Path, qwen_folder: Path) -> Path:
    return Path(shutil.copytree(qwen_folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def moe_folder(save: Callable[..., Path], make_tokenizer: Callable[..., Any], text_config: dict[str, Any]) -> Path:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    return save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**text_config, **experts)), make_tokenizer())


def entries(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").iterdir() if path.is_dir())


def logits(tower: LoadedTower) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = tower.model(torch.arange(20)[None]).logits
    return result


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_same(first: LoadedTower, second: LoadedTower) -> None:
    assert (first.from_cache, second.from_cache) == (False, True)
    assert (first.fingerprint, first.coverage) == (second.fingerprint, second.coverage)
    assert same_tensors(first.model.state_dict(), second.model.state_dict())
    assert str(first.model) == str(second.model)
    assert first.model.config == second.model.config
    assert not any(parameter.requires_grad for parameter in second.model.parameters())
    assert not second.model.training


# --- equality -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["gemma_folder", "moe_folder"])
def test_a_second_load_gives_the_same_logits_bit_by_bit(
    folder: str, load: Load, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(folder)
    first, second = load(path), load(path)
    assert_same(first, second)
    assert torch.equal(logits(first), logits(second))
    assert first.model.generation_config == second.model.generation_config
    model: Any = second.model
    tied = folder == "gemma_folder"
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


def test_a_second_load_of_an_encoder_gives_the_same_targets(
    load: Load, whisper_folder: Path, wav: Callable[[int], bytes], media_request: Callable[..., ScoreRequest]
) -> None:
    policy = {"skip_modules": ("model.encoder",), "min_coverage": 0.1}
    towers = [load(whisper_folder, "encoder", **policy) for _ in range(2)]
    assert_same(*towers)
    asked = media_request((wav(0), wav(1)), layers=(0, 2))
    first, second = (TeacherEngine(tower, teacher_id="tiny").score(asked) for tower in towers)
    assert first == second


def test_the_loader_keeps_what_it_quantised(qwen_folder: Path, tmp_path: Path) -> None:
    registry = load_registry()
    entry = registry.get("agentcpm-explore").model_copy(update={"id": "tiny"})
    (tmp_path / "tiny").symlink_to(qwen_folder)
    loader = TowerLoader(
        TeacherRegistry(contracts=registry.contracts, teachers=(entry,)),
        models_dir=tmp_path,
        cache_dir=tmp_path / "cache",
        device="cpu",
    )
    first, second = loader.load("tiny"), loader.load("tiny")
    assert_same(first, second)
    assert torch.equal(logits(first), logits(second))
    assert not loader.load("tiny", quantise=False).from_cache


def test_tensors_that_are_no_parameters_and_no_buffers_come_back(tmp_path: Path) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(3.0))
            self.register_buffer("frequencies", torch.arange(4.0), persistent=False)
            self.register_buffer("absent", None)
            self.padding = torch.tensor(5)
            self.never_loaded = torch.empty(2, device="meta")

    tensors, ties = stored_state(Padded())
    assert (set(tensors), ties) == ({"weight", "frequencies", "padding"}, {})
    save_file(tensors, tmp_path / "a.safetensors")
    with torch.device("meta"):
        empty: Any = Padded()
    install(empty, read_tensors(tmp_path / "a.safetensors"), torch.device("cpu"))
    assert (empty.weight.tolist(), empty.frequencies.tolist(), empty.padding.item()) == ([0, 1, 2], [0, 1, 2, 3], 5)
    assert set(empty.state_dict()) == {"weight"}


# --- identity -----------------------------------------------------------------------------------------------------------------


def test_a_second_load_reads_no_floating_point_tensor_and_a_changed_one_is_noticed(
    save: Callable[..., Path],
    make_tokenizer: Callable[..., Any],
    text_config: dict[str, Any],
    load: Load,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Large enough for the sample of its bytes to leave gaps.
    folder = save(Qwen3ForCausalLM(Qwen3Config(**{**text_config, "vocab_size": 16_384})), make_tokenizer())
    policy = {"min_coverage": 0.01}
    before = load(folder, **policy).model.state_dict()
    path = folder / "model.safetensors"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(stat.st_size // 2 + 20_000)
        file.write(bytes(2_000))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    # Nothing tells the files apart now, so this load shows where its tensors come from.
    assert same_tensors(load(folder, **policy).model.state_dict(), before)
    os.utime(path)
    with caplog.at_level(logging.WARNING):
        changed = load(folder, **policy)
    assert not changed.from_cache
    assert "the checkpoint has changed since" in caplog.text
    assert not same_tensors(changed.model.state_dict(), before)
    assert len(entries(tmp_path)) == 1


def test_a_touched_or_copied_checkpoint_is_still_the_same(
    load: Load, copy: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    load(qwen_folder)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert load(copy).from_cache
    assert len(entries(tmp_path)) == 1


def test_whatever_changes_the_stored_tensors_is_another_entry(
    load: Load, copy: Path, tmp_path: Path, qwen_folder: Path
) -> None:
    load(copy)
    assert not load(copy, skip_modules=("q_proj",)).from_cache
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert not load(copy).from_cache
    (copy / "config.json").write_text(json.dumps(config))
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert not load(copy).from_cache
    assert load(qwen_folder).from_cache
    assert len(entries(tmp_path)) == 4
    recipe = json.loads((entries(tmp_path)[0] / MANIFEST).read_text())["recipe"]
    assert {"versions", "dtype", "device", "class", "code"} < recipe.keys()


def test_the_fingerprint_follows_what_is_read_beside_the_weights(load: Load, copy: Path) -> None:
    first = load(copy)
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    second = load(copy)
    assert second.from_cache
    assert second.fingerprint != first.fingerprint


# --- damage -------------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "block-00001-0.safetensors does not have the hash": lambda entry: flip(entry / "block-00001-0.safetensors"),
    "No such file": lambda entry: (entry / "rest.safetensors").unlink(),
    "to hold a CacheManifest": lambda entry: (entry / MANIFEST).write_text("{"),
    "found no such file": lambda entry: (entry / MANIFEST).unlink(),
}


def test_a_damaged_entry_is_named_and_made_again(
    load: Load, qwen_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(qwen_folder)
    (entry,) = entries(tmp_path)
    shutil.copytree(entry, tmp_path / "whole")
    cache = QuantisedCache(tmp_path / "cache")
    recipe = json.loads((entry / MANIFEST).read_text())["recipe"]
    for reason, damage in DAMAGE.items():
        shutil.rmtree(entry)
        shutil.copytree(tmp_path / "whole", entry)
        assert cache.find("tiny", recipe, open_checkpoint(qwen_folder)) is not None
        damage(entry)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert cache.find("tiny", recipe, open_checkpoint(qwen_folder)) is None
        assert f"{entry} cannot be used" in caplog.text
        assert reason in caplog.text
    second = load(qwen_folder)
    assert not second.from_cache
    assert entries(tmp_path) == [entry]
    assert_same(first, load(qwen_folder))


def test_a_file_that_vanishes_between_the_check_and_the_reading_is_named(tmp_path: Path) -> None:
    with pytest.raises(TowerLoadError, match=r"read .*gone\.safetensors of the quantised cache"):
        read_tensors(tmp_path / "gone.safetensors")


def test_a_folder_that_cannot_be_written_costs_a_warning_and_not_the_teacher(
    load: Load, qwen_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        tower = load(qwen_folder)
    assert tower.coverage.share > 0.6
    assert "cannot be written" in caplog.text


def test_small_models_are_not_kept(load: Load, qwen_folder: Path, tmp_path: Path) -> None:
    load(qwen_folder, cache_min_parameters=10**6)
    assert not (tmp_path / "cache").exists()


# --- several processes --------------------------------------------------------------------------------------------------------

NOTHING = CoverageReport(1, 0, 0.0, 0.0, 0.0, 0.0, 4, ())


def manifest(files: dict[str, str], digest: str) -> CacheManifest:
    return CacheManifest(
        teacher="t", recipe={}, source=(), weights_digest=digest, own_quantiser=False, coverage=NOTHING, files=files, ties={}
    )  # fmt: skip


def test_of_two_writers_at_once_the_first_to_finish_stays(tmp_path: Path, qwen_folder: Path) -> None:
    cache = QuantisedCache(tmp_path)
    with cache.writing("t", {}) as first, cache.writing("t", {}) as second:
        for draft in (first, second):
            draft.add("rest.safetensors", {"a": torch.ones(2)})
        kept = first.publish(manifest(first.files, "first"))
        assert second.publish(manifest(second.files, "second")).folder == kept.folder
    assert json.loads((kept.folder / MANIFEST).read_text())["weights_digest"] == "first"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [kept.folder.name]
    # Without a source the content decides, and this is no checkpoint of that content.
    assert cache.find("t", {}, open_checkpoint(qwen_folder)) is None


def test_blocks_that_share_parameters_cannot_come_and_go(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "rest.safetensors")
    shared = manifest({}, "").model_copy(update={"ties": {"blocks.1.weight": "blocks.0.weight"}})
    with pytest.raises(TowerLoadError, match=r"found that 'blocks\.1\.weight' is shared"):
        CacheEntry(tmp_path, shared).fill_rest(None, torch.device("cpu"))  # type: ignore[arg-type]


def test_a_block_that_cannot_be_written_is_remembered(tmp_path: Path) -> None:
    with QuantisedCache(tmp_path / "cache").writing("t", {}) as draft:
        spill = BlockSpill(draft, ("a", "b"))
        assert not spill({"rest.weight": torch.ones(1)})
        assert spill({"a.weight": torch.ones(1)})
        (tmp_path / "cache").write_text("a file in the way")
        with pytest.raises(OSError, match="cache"):
            spill({"b.weight": torch.ones(1)})
        assert isinstance(spill.failure, OSError)


def test_what_a_failing_writer_began_is_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with QuantisedCache(tmp_path).writing("t", {}) as draft:
            draft.add("rest.safetensors", {"a": torch.ones(2)})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_writers_that_were_killed_are_removed_after_a_day(tmp_path: Path) -> None:
    for name, age in ((".t-1.a.tmp", 2 * 86400), (".t-2.b.tmp", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (os.stat(tmp_path).st_mtime - age,) * 2)
    with QuantisedCache(tmp_path).writing("t", {}) as draft:
        draft.add("rest.safetensors", {"a": torch.ones(2)})
        draft.publish(manifest(draft.files, ""))
    assert {path.name for path in tmp_path.glob(".*.tmp")} == {".t-2.b.tmp"}
