"""`nexus teachers check` as a function: every architecture of the registry, built tiny and run, and each outcome's row."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from nexus.errors import TowerLoadError
from nexus.towers import check
from nexus.towers.check import CheckRow, check_teachers, exercise, what_it_needs
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import LoadedTower
from nexus.towers.registry import TeacherRegistry, load_registry, resolve_entry
from nexus.towers.tiny import write_tiny
from nexus.vendors.environments import DIRECTORY_VARIABLE

OK = {
    "agentcpm-explore": (0.6, ("tokens", "hidden", "text")),
    "glm-4.7-flash": (0.75, ("tokens", "hidden", "text")),
    "kimi-k2.5": (0.75, ("tokens", "hidden", "text")),
    "qwen2.5-0.5b": (0.6, ("tokens", "hidden", "text")),
    "qwen2.5-coder-7b": (0.6, ("tokens", "hidden", "text")),
    "translategemma-4b": (0.6, ("tokens", "hidden", "text", "media")),
    "gemma-scope-2-27b": (0.6, ("features",)),
    "qwen2.5-omni-7b": (0.2, ("tokens", "hidden", "text")),
    "qwen3-omni-30b": (0.75, ("tokens", "hidden", "text")),
    "siglip2-so400m": (0.5, ("hidden", "embedding")),
    "videomae-large": (0.7, ("hidden", "embedding")),
    "whisper-large-v3-turbo": (0.3, ("tokens", "hidden", "embedding")),
    "parakeet-tdt-0.6b-v3": (0.6, ("hidden", "embedding")),
    "vibevoice-asr": (0.45, ("tokens", "hidden", "text", "media")),
    "personaplex-7b": (0.2, ("tokens", "hidden")),
}
if find_spec("diffusers") is not None:
    OK |= {"sd3-medium": (0.5, ("noise", "blocks")), "svd-xt-1.1": (0.4, ("noise", "blocks"))}
"""Teacher -> smallest share of its tiny build in NF4 (Omni: in its authors' GPTQ); kinds of target."""


@pytest.fixture(scope="module")
def registry() -> TeacherRegistry:
    return load_registry()


@pytest.fixture(scope="module")
def rows(registry: TeacherRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, CheckRow]]:
    with pytest.MonkeyPatch.context() as patch:
        # As on a machine without the environments of vendors' packages.
        patch.setenv(DIRECTORY_VARIABLE, str(tmp_path_factory.mktemp("environments")))
        yield {row.id: row for row in check_teachers(registry, (), tiny=True)}


def test_every_teacher_has_a_row_and_none_failed(rows: dict[str, CheckRow], registry: TeacherRegistry) -> None:
    assert tuple(rows) == registry.ids()
    assert {row.id: row.reason for row in rows.values() if row.status == "failed"} == {}
    assert {row.role for row in rows.values()} == {"causal_lm", "encoder", "codec_lm", "codec", "diffusion", "sae"}


@pytest.mark.parametrize("teacher_id", OK)
def test_architectures_of_the_installed_transformers_load_quantise_and_answer(
    rows: dict[str, CheckRow], teacher_id: str
) -> None:
    share, targets = OK[teacher_id]
    row = rows[teacher_id]
    assert (row.status, row.reason, row.targets, row.quantised) == ("ok", None, targets, True)
    assert row.quantised_share is not None
    assert row.quantisable_share is not None
    assert row.quantised_share >= share
    assert row.quantisable_share >= row.quantised_share
    assert row.bits_per_param is not None
    assert 4.1 < row.bits_per_param < 6
    assert row.seconds > 0


def test_what_is_not_here_says_what_it_needs_and_what_to_type(rows: dict[str, CheckRow]) -> None:
    needing = {row.id: str(row.reason) for row in rows.values() if row.status == "needs"}
    assert needing.keys() == rows.keys() - OK.keys()
    assert "read and pinned" in needing["step3-vl-10b"]
    assert "authors' package" in needing["padt-ovd-3b"]
    assert "type: make teacher-env NAME=qwen-tts" in needing["qwen3-tts-tokenizer"]
    assert "type: make teacher-env NAME=parler-tts" in needing["parler-tts-large"]
    without_extra = set() if find_spec("diffusers") else {"sd3-medium", "svd-xt-1.1"}
    assert {
        name for name in needing if "type: pip install 'nexus-distill[diffusion]'" in needing[name]
    } == without_extra
    assert all(rows[name].quantised_share is None and rows[name].targets == () for name in needing)


def test_a_teacher_without_a_tiny_build_is_tried_with_its_files_alone(registry: TeacherRegistry) -> None:
    unknown = registry.get("qwen2.5-0.5b").model_copy(update={"id": "new"})
    assert "a tiny build" in str(what_it_needs(unknown, tiny=True))
    assert what_it_needs(unknown, tiny=False) is None


def test_without_diffusers_its_teachers_say_what_to_type(
    registry: TeacherRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "find_spec", lambda _: None)
    assert "type: pip install 'nexus-distill[diffusion]'" in str(what_it_needs(registry.get("sd3-medium"), tiny=True))


def test_an_unknown_id_is_refused_before_anything_is_tried(registry: TeacherRegistry) -> None:
    with pytest.raises(TowerLoadError, match=r"Did you mean 'qwen2.5-0.5b'"):
        next(check_teachers(registry, ("glm-4.7-flash", "qwen2.5-0.6b"), tiny=True))


def test_local_checkpoints_are_tried_where_they_lie(registry: TeacherRegistry, tmp_path: Path) -> None:
    write_tiny("qwen2.5-0.5b", tmp_path / "qwen2.5-0.5b")
    write_tiny("siglip2-so400m", tmp_path / "siglip2-so400m")
    (tmp_path / "siglip2-so400m" / "config.json").write_text("{}")
    write_tiny("gemma-scope-2-27b", tmp_path / "gemma-scope-2-27b")
    (tmp_path / "gemma-scope-2-27b" / "base").rename(tmp_path / "gemma-3-27b-pt")
    names = ("siglip2-so400m", "gemma-scope-2-27b", "qwen2.5-0.5b", "agentcpm-explore")
    rows = list(check_teachers(registry, names, tiny=False, models_dir=tmp_path))
    assert [row.status for row in rows] == ["failed", "ok", "ok", "needs"]
    assert "of teacher 'siglip2-so400m', found" in str(rows[0].reason)
    assert "nexus teachers pull agentcpm-explore" in str(rows[3].reason)


def test_a_librarys_own_mistake_is_a_failed_row_and_not_the_end(
    registry: TeacherRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("no\nattribute")

    monkeypatch.setitem(check.write_tiny.__globals__["_BUILDERS"], "qwen2.5-0.5b", broken)
    first, second = check_teachers(registry, ("qwen2.5-0.5b", "agentcpm-explore"), tiny=True)
    assert (first.status, first.reason) == ("failed", "AttributeError: no attribute")
    assert second.status == "ok"


def test_a_classifier_gives_labels_too(whisper_classifier: LoadedTower) -> None:
    assert exercise(TeacherEngine(whisper_classifier, teacher_id="tiny")) == ("hidden", "embedding", "labels")


def test_tiny_checkpoints_are_kept_where_asked_and_not_built_again(registry: TeacherRegistry, tmp_path: Path) -> None:
    (first,) = check_teachers(registry, ["qwen2.5-0.5b"], tiny=True, keep=tmp_path)
    assert first.status == "ok"
    weights = tmp_path / "qwen2.5-0.5b" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    (second,) = check_teachers(registry, ["qwen2.5-0.5b"], tiny=True, keep=tmp_path)
    assert second.status == "ok"
    assert weights.stat().st_mtime_ns == written
    # The kept folder is what a run finds by the teacher's id.
    assert resolve_entry(registry.get("qwen2.5-0.5b"), models_dir=tmp_path).path == str(tmp_path / "qwen2.5-0.5b")
