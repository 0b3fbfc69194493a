"""Whether a teacher fits is told before any of its weights is read."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from nexus.errors import TowerLoadError
from nexus.towers import memory
from nexus.towers.loader import LoadedTower, load_tower
from nexus.towers.memory import available_bytes, needed_bytes
from nexus.towers.nf4 import QuantisationPlan
from nexus.towers.registry import TeacherSpec

CPU = torch.device("cpu")


@pytest.fixture
def keep_limits() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def test_what_a_teacher_needs_is_what_it_takes_and_its_largest_tensor(qwen: LoadedTower, qwen_folder: Path) -> None:
    original = Qwen3ForCausalLM.from_pretrained(qwen_folder)
    plan = QuantisationPlan((), tuple(m.name for m in qwen.coverage.modules if m.quantised))
    tables = sum(32 * 16 + 32 * 256 + 32 for m in qwen.coverage.modules if m.quantised) // 8
    expected = qwen.coverage.stored_bytes - tables + 4 * max(p.numel() for p in original.parameters())
    # A matrix of less than 256 blocks still has one whole scale of scales.
    assert needed_bytes(original, plan, torch.float32) == pytest.approx(expected, rel=1e-3)


def test_experts_count_as_packed() -> None:
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    for stack in ("gate_up_proj", "down_proj"):
        model.experts.register_parameter(stack, torch.nn.Parameter(torch.empty(8, 128, 64)))
    plan = QuantisationPlan((), (), ("experts",))
    stack = 8 * 128 * 64
    assert needed_bytes(model, plan, torch.float32) == int(2 * stack * memory.NF4_BITS / 8 + 4 * stack)


def test_a_streamed_teacher_needs_two_of_its_blocks() -> None:
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(64, size, bias=False) for size in (64, 256)])
    model.head = torch.nn.Linear(64, 128, bias=False)
    plan = QuantisationPlan((), ("blocks.0", "blocks.1"))
    needed = needed_bytes(model, plan, torch.float32, ("blocks.0", "blocks.1"))
    assert needed == int(4 * 64 * 128 + 2 * 64 * 256 * memory.NF4_BITS / 8 + 4 * 64 * 256)


def test_a_teacher_larger_than_the_machine_is_refused_before_its_weights_are_read(
    qwen_folder: Path, tmp_path: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    folder = Path(shutil.copytree(qwen_folder, tmp_path / "copy"))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2**36}))
    # Nothing but a header and a hole: reading it would take the machine down.
    size = 2**36 * 64 * 2
    header = json.dumps({"lm_head.weight": {"dtype": "F16", "shape": [2**36, 64], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(
        TowerLoadError, match=r"Expected \d{5}\.\d\d GiB of memory on cpu for teacher 'tiny', found .* free"
    ) as caught:
        load_tower(spec_of(folder, min_coverage=0.0), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("streamed_blocks", "advises"), [((), True), (("blocks.0",), False)])
def test_streaming_is_advised_to_teachers_that_do_not_stream_yet(
    streamed_blocks: tuple[str, ...], advises: bool
) -> None:
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(2**25, 2**25, bias=False, device="meta")])
    plan = QuantisationPlan((), ("blocks.0",))
    with pytest.raises(TowerLoadError, match="for teacher 't', found") as caught:
        memory.require_memory("t", model, plan, torch.float32, CPU, streamed_blocks=streamed_blocks)
    assert ("placement: streamed" in str(caught.value)) is advises


def test_weights_that_cannot_even_be_opened_are_told_with_need_and_have(
    qwen_folder: Path, tmp_path: Path, spec_of: Callable[..., TeacherSpec], keep_limits: None
) -> None:
    folder = Path(shutil.copytree(qwen_folder, tmp_path / "copy"))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**30)
    used = memory.psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with pytest.raises(TowerLoadError, match=r"Expected 1\.00 GiB of memory to open .* 'tiny', found 0\.\d\d GiB free"):
        load_tower(spec_of(folder), device="cpu")


def test_the_limit_of_this_process_counts(keep_limits: None) -> None:
    used = memory.psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 50 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    assert 0 < available_bytes(CPU) <= 50 * 2**20


def test_the_limit_of_the_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = available_bytes(CPU)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 100000\n")
    assert available_bytes(CPU) == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(CPU) > min(free, 10**7) // 2
    (tmp_path / "memory").mkdir()
    for name, text in (("limit_in_bytes", "500"), ("usage_in_bytes", "100"), ("stat", "cache 7\n")):
        (tmp_path / "memory" / f"memory.{name}").write_text(text)
    assert available_bytes(CPU) == 400
