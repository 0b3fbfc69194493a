"""What a checkpoint folder must hold before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from nexus.errors import TowerLoadError
from nexus.towers.checkpoint import BLOCK_BYTES, SAMPLED_BLOCKS, open_checkpoint, stored_tensors, weights_digest


def make(folder: Path, config: Any = None, **tensors: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"architectures": ["A"]}))
    save_file(tensors or {"w": np.zeros((2, 2), dtype=np.float32)}, folder / "model.safetensors")
    return folder


def test_keys_are_mapped_to_their_files(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path, a=np.zeros(2), b=np.ones(2)))
    assert checkpoint.config == {"architectures": ["A"]}
    assert checkpoint.weights == dict.fromkeys(("a", "b"), tmp_path / "model.safetensors")
    assert checkpoint.files == (tmp_path / "model.safetensors",)


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    make(tmp_path).joinpath("model.safetensors").unlink()
    for name, key in (("one.safetensors", "a"), ("two.safetensors", "b")):
        save_file({key: np.zeros(2)}, tmp_path / name)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(tmp_path).weights == {"a": tmp_path / "one.safetensors", "b": tmp_path / "two.safetensors"}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(TowerLoadError, match=r"shard .*two\.safetensors, found no such file"):
        open_checkpoint(tmp_path)


def test_an_index_without_shards_falls_back_to_the_single_file(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert list(open_checkpoint(tmp_path).weights) == ["w"]


@pytest.mark.parametrize("weight_map", [["a"], "a", None])
def test_an_index_that_maps_nothing_is_refused_by_its_name(tmp_path: Path, weight_map: Any) -> None:
    make(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        TowerLoadError, match=r"weight_map in .*model\.safetensors\.index\.json .*, found a \w+\. Fetch"
    ):
        open_checkpoint(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(TowerLoadError, match="found no such folder"):
        open_checkpoint(tmp_path / "none")


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(TowerLoadError, match=r"Expected config\.json in .*, found no such file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "Expected JSON"), ("[]", "a JSON object .* found a list")])
def test_broken_config(tmp_path: Path, text: str, message: str) -> None:
    make(tmp_path).joinpath("config.json").write_text(text)
    with pytest.raises(TowerLoadError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_broken_safetensors(tmp_path: Path, content: bytes) -> None:
    make(tmp_path).joinpath("model.safetensors").write_bytes(content)
    with pytest.raises(
        TowerLoadError, match=r"readable safetensors in .*model\.safetensors.*Fetch the file again"
    ) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_safetensors(tmp_path: Path) -> None:
    path = make(tmp_path, w=np.zeros(1000)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TowerLoadError, match="readable safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.nemo", "model.gguf"])
def test_other_formats_are_named_and_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path).joinpath("model.safetensors").rename(tmp_path / name)
    with pytest.raises(TowerLoadError, match=f"found {name}.*Only safetensors"):
        open_checkpoint(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    make(tmp_path).joinpath("model.safetensors").unlink()
    with pytest.raises(TowerLoadError, match="found no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8", "bits": 8}}, "fp8"),
        ({"thinker_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"quantization_config": {"bits": 4}}, "an unnamed method"),
        ({"quantization_config": "fp8"}, "fp8"),
    ],
)
def test_quantised_checkpoints_are_refused_wherever_they_say_so(tmp_path: Path, config: Any, method: str) -> None:
    with pytest.raises(TowerLoadError, match=f"already quantised by {method}"):
        open_checkpoint(make(tmp_path, config))


@pytest.mark.parametrize("whole", [True, False])
def test_digest_is_that_of_the_content_and_not_of_the_place(tmp_path: Path, whole: bool) -> None:
    limit = 10**9 if whole else 0
    numbers = np.random.default_rng(0).standard_normal(5000)
    first = weights_digest(open_checkpoint(make(tmp_path / "a", w=numbers)), full_hash_bytes=limit)
    assert first == weights_digest(open_checkpoint(make(tmp_path / "b", w=numbers)), full_hash_bytes=limit)
    numbers[777] += 1
    assert first != weights_digest(open_checkpoint(make(tmp_path / "c", w=numbers)), full_hash_bytes=limit)


def test_sampled_digest_sees_names_and_shapes(tmp_path: Path) -> None:
    first, second = (open_checkpoint(make(tmp_path / name, **{name: np.zeros(8)})) for name in ("v", "w"))
    assert weights_digest(first, full_hash_bytes=0) != weights_digest(second, full_hash_bytes=0)
    # 256 blocks of 1 MiB spread over a file: a 300 GB checkpoint is known by 0.1 % of its bytes and its header.
    assert SAMPLED_BLOCKS * BLOCK_BYTES == 256 * 1024**2


def test_tensors_are_read_when_they_are_indexed(tmp_path: Path) -> None:
    numbers = np.arange(6, dtype=np.float16).reshape(2, 3)
    tensor = stored_tensors(open_checkpoint(make(tmp_path, w=numbers)))["w"]
    assert (tensor.get_shape(), tensor.get_dtype()) == ([2, 3], "F16")
    assert tensor[...].tolist() == numbers.tolist()
    # Sums over misaligned memory may differ in their last bits.
    assert tensor[1:].data_ptr() % 64 == 0
