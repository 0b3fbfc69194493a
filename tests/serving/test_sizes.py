"""Sizes before loading: what the headers promise is what loading measures, and broken files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nexus.config import load_config
from nexus.errors import ConfigError, TowerLoadError
from nexus.serving.placement import GIB
from nexus.serving.sizes import (
    expected_rows,
    run_needs,
    size_of_checkpoint,
    size_of_entry,
    student_need,
    teacher_need,
)
from nexus.towers.registry import load_registry, shipped_config

SAMPLES = Path(__file__).parents[2] / "nexus" / "data" / "samples" / "teachers"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two layers, one of them with fused experts; an embedding; a matrix whose rows NF4 cannot take."""
    tensors = {
        "model.embed_tokens.weight": torch.zeros(128, 64),
        "model.layers.0.mlp.weight": torch.zeros(256, 64),
        "model.layers.0.norm.weight": torch.zeros(64),
        "model.layers.1.experts.up": torch.zeros(4, 64, 64),
        "model.layers.1.odd.weight": torch.zeros(64, 48),
        "lm_head.weight": torch.zeros(128, 64),
    }
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_headers_say_what_nf4_holds_and_what_stays(checkpoint):
    size = size_of_checkpoint("t", checkpoint, quantise=True)
    nf4 = 256 * 64 + 4 * 64 * 64
    floats = 2 * 128 * 64 + 64 + 64 * 48
    assert size.weight_bytes == pytest.approx(nf4 * 4.13 / 8 + floats * 2, abs=4)
    assert size.active_parameters == nf4 + floats
    # Experts are dequantised one at a time: the largest matrix is the other one.
    assert size.matrix_bytes == 2 * 256 * 64
    assert size.layer_bytes == 2 * 128 * 64
    assert size.load_bytes == (checkpoint / "model.safetensors").stat().st_size
    assert size.source == "checkpoint"


def test_skipped_modules_and_teachers_that_are_never_quantised_stay_in_sixteen_bits(checkpoint):
    nothing = size_of_checkpoint("t", checkpoint, quantise=False)
    assert nothing.weight_bytes == 2 * nothing.active_parameters
    assert nothing.matrix_bytes == 0
    skipped = size_of_checkpoint("t", checkpoint, quantise=True, skip_modules=("mlp",))
    whole = size_of_checkpoint("t", checkpoint, quantise=True)
    assert skipped.weight_bytes - whole.weight_bytes == pytest.approx(256 * 64 * (16 - 4.13) / 8, abs=2)


def test_the_estimate_of_a_real_checkpoint_is_near_what_loading_it_measures():
    from nexus.towers.loader import load_tower
    from nexus.towers.registry import TeacherSpec

    teacher = "sample-vision"
    coverage = load_tower(TeacherSpec(teacher, str(SAMPLES / teacher), None, "encoder"), device="cpu").coverage
    estimate = size_of_checkpoint(teacher, SAMPLES / teacher, quantise=True)
    quantised = coverage.share * coverage.total_params
    # On a CPU floats take 32 bits, and small matrices more bits than large ones.
    stored = quantised * 4.13 / 8 + (coverage.total_params - quantised) * 2
    assert estimate.weight_bytes == pytest.approx(stored, rel=0.1)


@pytest.mark.parametrize(
    "content", [b"", b"\x10", b"\xff" * 16, (8).to_bytes(8, "little") + b"[1, 2]  ", (9).to_bytes(8, "little") + b'{"a": {}}']
)  # fmt: skip
def test_a_file_that_is_cut_short_or_no_safetensors_is_refused_by_name(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(TowerLoadError, match="safetensors file of teacher 'broken'"):
        size_of_checkpoint("broken", tmp_path, quantise=True)


def test_a_folder_without_weights_is_refused_with_what_to_type(tmp_path):
    with pytest.raises(TowerLoadError, match="nexus teachers pull t"):
        size_of_checkpoint("t", tmp_path, quantise=True)


def test_every_entry_of_the_registry_has_a_size_and_experts_cost_only_those_that_are_asked():
    sizes = {entry.id: size_of_entry(entry) for entry in load_registry().teachers}
    assert len(sizes) == 23
    assert all(0 < size.layer_bytes < size.weight_bytes < size.load_bytes * 1.2 for size in sizes.values())
    assert sizes["kimi-k2.5"].weight_bytes == 536 * GIB
    assert sizes["glm-4.7-flash"].active_parameters == 3e9
    assert teacher_need(sizes["glm-4.7-flash"], 10).flops == 2 * 3e9 * 10


def test_the_students_need_is_its_training_state_and_it_is_pinned():
    core = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 100,
    }  # fmt: skip
    parameters = 2 * (3 * 64 * 64 + 3 * 64 * 128) + 64 * 100
    need = student_need(core, tokens=7, optimizer="adamw")
    assert need.weight_bytes == 16 * parameters
    assert student_need(core, tokens=7, optimizer="adamw8bit").weight_bytes == 10 * parameters
    assert need.flops == 6 * parameters * 7
    assert need.is_pinned


def test_a_teacher_sees_its_capabilities_batches_at_every_step():
    config = load_config(shipped_config("quickstart.yaml"), ["distill.steps=100"])
    assert expected_rows(config, "sample-reasoning") == 100 * config.data_of("reasoning").batch_size


def test_a_run_needs_its_student_and_each_teacher_for_the_rows_that_it_draws():
    config = load_config(shipped_config("quickstart.yaml"), ["distill.steps=100"])
    sizes = [size_of_checkpoint(t.id, SAMPLES / t.id, quantise=True) for t in config.teachers]
    student, *teachers = run_needs(config, sizes)
    assert student.is_pinned
    assert [need.id for need in teachers] == [teacher.id for teacher in config.teachers]
    tokens = expected_rows(config, "sample-code") * config.student.max_length
    assert teachers[1] == teacher_need(sizes[1], tokens)


def test_a_teacher_with_the_student_s_name_is_refused():
    config = load_config(shipped_config("quickstart.yaml"), ["teachers.sample-code.id=student"])
    sizes = [size_of_checkpoint(t.id, SAMPLES / "sample-code", quantise=True) for t in config.teachers]
    with pytest.raises(ConfigError, match="other ids than 'student'"):
        run_needs(config, sizes)
