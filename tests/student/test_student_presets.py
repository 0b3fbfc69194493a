"""Every student of configs/student can be read, and what a description may not say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from nexus.adapters import Alignment
from nexus.errors import ConfigError
from nexus.student.config import parameter_count
from nexus.student.memory import NexusStudent
from nexus.student.presets import StudentSpec, load_student_spec

PRESETS = Path(__file__).parents[2] / "configs" / "student"


def _quickstart() -> StudentSpec:
    return load_student_spec(PRESETS / "quickstart.yaml")


def _values() -> dict:
    return yaml.safe_load((PRESETS / "quickstart.yaml").read_text())


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_builds_on_meta_and_survives_json(path: Path) -> None:
    spec = load_student_spec(path)
    with torch.device("meta"):
        student = NexusStudent(spec)
    assert sum(parameter.numel() for parameter in student.core.parameters()) == parameter_count(spec.core)
    again = StudentSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again.to_dict() == spec.to_dict()
    assert again.adapters() == spec.adapters()
    assert again.router == spec.router


def test_the_quickstart_student_is_small_and_whole() -> None:
    student = NexusStudent(_quickstart())
    assert list(student.adapters) == ["reasoning", "vision", "audio"]
    assert sum(parameter.numel() for parameter in student.parameters()) < 550_000


def test_the_4096_wide_preset_has_the_stated_shape() -> None:
    core = load_student_spec(PRESETS / "width-4096.yaml").core
    assert (core.hidden_size, core.num_hidden_layers, core.num_attention_heads) == (4096, 32, 32)
    assert (core.num_key_value_heads, core.intermediate_size, core.vocab_size) == (8, 14_336, 151_936)


def test_a_tokenizer_changes_the_vocabulary_and_nothing_else() -> None:
    spec = _quickstart()
    changed = spec.with_vocabulary(97, pad_token_id=3, eos_token_id=4, bos_token_id=5)
    assert (changed.core.vocab_size, changed.core.pad_token_id, changed.core.eos_token_id) == (97, 3, 4)
    assert changed.core.bos_token_id == 5
    before, after = spec.to_dict(), changed.to_dict()
    for key in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id"):
        before["core"].pop(key, None), after["core"].pop(key, None)
    assert after == before
    assert spec.core.vocab_size == 448


def test_alignments_are_given_to_one_tower() -> None:
    alignments = [Alignment("sample-vision", 1, 64), Alignment("sample-vision", "pooled", 64)]
    spec = _quickstart().with_alignments("vision", alignments)
    assert spec.vision.alignments == tuple(alignments)
    assert spec.audio.alignments == ()
    with pytest.raises(ConfigError, match="found 'smell'"):
        spec.with_alignments("smell", alignments)


def test_widths_that_follow_from_the_trunk_may_be_left_out_but_not_contradict_it() -> None:
    spec = _quickstart()
    assert {config.context_width for config in spec.adapters().values()} == {128}
    assert spec.router.embedding_size == 128
    with pytest.raises(ConfigError, match=r"audio.context_width to be the trunk's width 128, found 64"):
        dataclasses.replace(spec, audio=dataclasses.replace(spec.audio, context_width=64))
    with pytest.raises(ConfigError, match=r"router.embedding_size to be the trunk's width 128, found 64"):
        dataclasses.replace(spec, router=dataclasses.replace(spec.router, embedding_size=64))


def test_a_tower_that_is_not_described_does_not_exist() -> None:
    values = _values()
    del values["audio"]
    spec = StudentSpec.from_dict(values)
    assert spec.audio is None
    assert list(spec.adapters()) == ["reasoning", "vision"]
    assert "audio" not in spec.to_dict()


def test_mistakes_in_a_description_are_named(tmp_path: Path) -> None:
    values = _values()
    with pytest.raises(ConfigError, match="found unknown 'smell'"):
        StudentSpec.from_dict({**values, "smell": {}})
    with pytest.raises(ConfigError, match="found no 'core'"):
        StudentSpec.from_dict({"router": {}})
    with pytest.raises(ConfigError, match="under core, found 'hidden'"):
        StudentSpec.from_dict({**values, "core": {**values["core"], "hidden": 3}})
    with pytest.raises(ConfigError, match="found 'widht'"):
        StudentSpec.from_dict({**values, "vision": {"widht": 3}})
    with pytest.raises(ConfigError, match="No such file"):
        load_student_spec(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="description in YAML"):
        load_student_spec(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"mapping at the top of .*, found list"):
        load_student_spec(tmp_path / "list.yaml")


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_says_how_many_positions_it_has(path: Path) -> None:
    # Read before Ray starts, without building the configuration's class.
    written = yaml.safe_load(path.read_text())["core"]["max_position_embeddings"]
    assert load_student_spec(path).core.max_position_embeddings == written
