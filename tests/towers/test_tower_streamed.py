"""Teachers run block by block: equal to the same teacher in memory, holding one block, and refusing what would never end."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ResNetModel,
)

from nexus.data.records import Record
from nexus.errors import ConfigError, TowerLoadError
from nexus.profiling.layers import find_blocks
from nexus.towers import causal_lm, encoder
from nexus.towers.engine import AnswerCheck, TeacherEngine
from nexus.towers.loader import LoadedTower, TowerLoader, _refuse_unstreamable, block_names, load_tower
from nexus.towers.registry import TeacherRegistry, TeacherSpec, load_registry
from nexus.towers.targets import ScoreRequest, TokenTargets

ROOT = Path(__file__).resolve().parents[2]


def spread(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    return model


PROMPTS, COMPLETIONS = ("ab", "what is", "", "x"), ("yes it is", "no", "plain text", "so and so on")


@pytest.fixture(scope="module")
def blocks_on_disk(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("blocks"))


@pytest.fixture(scope="module")
def moe_folder(save: Callable[..., Path], make_tokenizer: Callable[..., Any], text_config: dict[str, Any]) -> Path:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    return save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**text_config, **experts)), make_tokenizer())


@pytest.fixture(scope="module")
def stream(spec_of: Callable[..., TeacherSpec], blocks_on_disk: str) -> Callable[..., LoadedTower]:
    def load(folder: Path, role: Any = "causal_lm", **changes: Any) -> LoadedTower:
        return load_tower(
            spec_of(folder, role, **{"cache_dir": blocks_on_disk, "streamed": True, **changes}), device="cpu"
        )

    return load


@pytest.fixture(scope="module")
def streamed_qwen(qwen_folder: Path, stream: Callable[..., LoadedTower]) -> LoadedTower:
    return stream(qwen_folder)


@pytest.fixture(scope="module")
def streamed_siglip(siglip_classifier_folder: Path, stream: Callable[..., LoadedTower]) -> LoadedTower:
    return stream(siglip_classifier_folder, "encoder")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several micro-batches from a few rows."""
    monkeypatch.setattr(causal_lm, "MAX_POSITIONS", 24)
    monkeypatch.setattr(encoder, "MAX_ROWS", 2)


def engines(*towers: LoadedTower) -> Iterator[TeacherEngine]:
    return (TeacherEngine(tower, teacher_id="tiny") for tower in towers)


def on_meta(model: PreTrainedModel) -> list[bool]:
    """Per block: all of its matrices are on meta."""
    return [all(p.is_meta for p in block.parameters() if p.ndim > 1) for block in find_blocks(model).blocks]


# --- equality -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["topk", "hidden"])
@pytest.mark.usefixtures("small_batches")
def test_targets_of_a_streamed_language_model_are_those_of_the_one_in_memory(
    transport: str, qwen: LoadedTower, streamed_qwen: LoadedTower
) -> None:
    ids = tuple("abcd")
    request = ScoreRequest(ids, PROMPTS, COMPLETIONS, None, 1.0, 8, (0, 2), transport=transport)  # type: ignore[arg-type]
    whole, streamed = engines(qwen, streamed_qwen)
    assert whole.score(request) == streamed.score(request)
    assert (whole.fingerprint, whole.num_layers, whole.hidden_size) == (
        streamed.fingerprint,
        streamed.num_layers,
        streamed.hidden_size,
    )
    assert qwen.coverage == streamed_qwen.coverage
    assert on_meta(streamed_qwen.model) == [True, True, True]
    assert not any("forward-lane" in thread.name for thread in threading.enumerate())


def test_logits_of_given_answers_are_equal_too(qwen: LoadedTower, streamed_qwen: LoadedTower) -> None:
    rows = [Record(id=str(i), capability="c", prompt=prompt) for i, prompt in enumerate(PROMPTS)]
    whole, streamed = (list(engine.answer_logits(rows, COMPLETIONS)) for engine in engines(qwen, streamed_qwen))
    assert all(torch.equal(a, b) for a, b in zip(whole, streamed, strict=True))


@pytest.mark.usefixtures("small_batches")
def test_a_streamed_encoder_answers_scores_and_is_profiled_as_in_memory(
    siglip_classifier: LoadedTower,
    streamed_siglip: LoadedTower,
    image_records: list[Record],
    png: Callable[[int], bytes],
    media_request: Callable[..., ScoreRequest],
) -> None:
    whole, streamed = engines(siglip_classifier, streamed_siglip)
    request = media_request(tuple(png(i) for i in range(5)), layers=(0, 2))
    assert whole.score(request) == streamed.score(request)
    assert whole.answer(image_records, max_new_tokens=1) == streamed.answer(image_records, max_new_tokens=1)
    # Forwards with layers skipped: several passes over the blocks.
    measured, again = (
        engine.measure(image_records, strategy="brute", micro_batch_size=3) for engine in (whole, streamed)
    )
    assert (measured.delta_LB == again.delta_LB).all()
    assert streamed.tax(image_records, max_new_tokens=1).nf4_answers == whole.answer(image_records, max_new_tokens=1)


def test_experts_and_what_was_written_block_by_block_serve_a_load_into_memory(
    moe_folder: Path, stream: Callable[..., LoadedTower]
) -> None:
    first, again, whole = stream(moe_folder), stream(moe_folder), stream(moe_folder, streamed=False)
    assert [tower.from_cache for tower in (first, again, whole)] == [False, True, True]
    request = ScoreRequest(tuple("abcd"), PROMPTS, COMPLETIONS, None, 1.0, 8, (1,))
    results = [engine.score(request) for engine in engines(first, again, whole)]
    assert results[0] == results[1] == results[2]
    assert first.coverage.share > 0.6


# --- what is held -------------------------------------------------------------------------------------------------------------


def test_one_block_is_in_memory_at_a_time_and_all_calls_pass_it(streamed_qwen: LoadedTower) -> None:
    model = streamed_qwen.model
    seen: list[tuple[int, list[bool]]] = []
    handles = [
        block.register_forward_hook(lambda *_, index=index: seen.append((index, on_meta(model))))
        for index, block in enumerate(find_blocks(model).blocks)
    ]

    def forward() -> float:
        with torch.inference_mode():
            return float(model(torch.arange(5)[None]).logits.sum())

    def twice() -> float:
        return forward() + forward()

    one, two, three = streamed_qwen.passes([forward, twice, forward])
    for handle in handles:
        handle.remove()
    assert two == one + three
    assert one == three
    # Three calls share the first pass, the second forward of one of them has another for itself.
    assert [index for index, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2]
    assert all(meta == [block != index for block in range(3)] for index, meta in seen)
    assert streamed_qwen.passes([]) == []


def test_a_call_that_fails_ends_the_others_and_leaves_nothing_behind(streamed_qwen: LoadedTower) -> None:
    model = streamed_qwen.model
    reached = []

    def fail() -> None:
        with torch.inference_mode():
            model(torch.arange(5)[None])
        raise KeyError("mine")

    def pass_through() -> None:
        with torch.inference_mode():
            model(torch.arange(5)[None])
        reached.append(True)

    threads = threading.active_count()
    with pytest.raises(KeyError, match="mine"):
        streamed_qwen.passes([fail, pass_through])
    assert reached == []
    assert threading.active_count() == threads
    assert on_meta(model) == [True, True, True]

    def fail_at_once() -> None:
        raise KeyError("early")

    with pytest.raises(KeyError, match="early"):
        streamed_qwen.passes([fail_at_once, pass_through])
    assert threading.active_count() == threads
    assert all(not block._forward_pre_hooks for block in find_blocks(model).blocks)


CAPPED = """
import hashlib, resource, sys
import torch
from nexus.errors import TowerLoadError
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.registry import TeacherSpec
from nexus.towers.targets import ScoreRequest
import psutil

torch.set_num_threads(1)
small, folder, blocks, headroom = *sys.argv[1:4], int(sys.argv[4])
request = ScoreRequest(tuple("abc"), ("ab", "c", "d"), ("yes it is", "no", "so"), None, 1.0, 8, (0, 2))


def score(path):
    spec = TeacherSpec(id="big", path=path, revision=None, role="causal_lm", cache_dir=blocks, streamed=True)
    return TeacherEngine(load_tower(spec, device="cpu"), teacher_id="big").score(request).tokens


# Libraries are loaded with the first teacher, and are not what is limited.
score(small)
limit = psutil.Process().memory_info().vms + headroom
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    load_tower(TeacherSpec(id="big", path=folder, revision=None, role="causal_lm"), device="cpu")
except TowerLoadError as error:
    print("refused" if "GiB of memory" in str(error) else error)
tokens = score(folder)
print(hashlib.sha256(tokens.ids_NK.tobytes() + tokens.logprobs_NK.tobytes()).hexdigest())
"""


def test_a_teacher_four_times_as_large_as_the_memory_is_scored_exactly(
    qwen_folder: Path,
    make_tokenizer: Callable[..., Any],
    text_config: dict[str, Any],
    spec_of: Callable[..., TeacherSpec],
    tmp_path: Path,
) -> None:
    size = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16, "head_dim": 64}
    folder = tmp_path / "model"
    # In shards, because each is mapped for a moment to read its header, and addresses are what is limited here.
    spread(Qwen3ForCausalLM(Qwen3Config(**{**text_config, **size}))).half().save_pretrained(
        folder, max_shard_size="4MB"
    )
    make_tokenizer().save_pretrained(folder)
    headroom = 15 * 2**20
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 4 * headroom
    # Packed once without the limit, to compare with; benchmarks/teachers.py packs a larger one under it.
    tower = load_tower(spec_of(folder, id="big", cache_dir=str(tmp_path / "blocks")), device="cpu")
    finished = subprocess.run(
        [sys.executable, "-c", CAPPED, str(qwen_folder), str(folder), str(tmp_path / "blocks"), str(headroom)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # One heap that gives back what is freed: the C library reserves 64 MiB of addresses for each further one.
        env={
            **os.environ,
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "131072",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    refused, digest = finished.stdout.split()
    assert refused == "refused"
    # Its packed weights alone exceed what the process could have held.
    assert sum(path.stat().st_size for path in tmp_path.rglob("block-*")) > headroom
    request = ScoreRequest(tuple("abc"), ("ab", "c", "d"), ("yes it is", "no", "so"), None, 1.0, 8, (0, 2))
    tokens = TeacherEngine(tower, teacher_id="big").score(request).tokens
    assert isinstance(tokens, TokenTargets)
    assert hashlib.sha256(tokens.ids_NK.tobytes() + tokens.logprobs_NK.tobytes()).hexdigest() == digest


# --- refusals -----------------------------------------------------------------------------------------------------------------


def test_a_streamed_language_model_scores_but_does_not_generate(streamed_qwen: LoadedTower) -> None:
    (engine,) = engines(streamed_qwen)
    rows = [Record(id="a", capability="c", prompt="x", completion="y", answer="y")]
    for refused in (
        lambda: engine.generate(["x"], max_new_tokens=2),
        lambda: engine.answer(rows, max_new_tokens=2),
        lambda: engine.confirm(rows, None, answers=AnswerCheck("exact", 2)),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=r"'tiny' in memory to generate .* found it streamed"):
            refused()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cache_dir": None}, r"folder for the blocks .* Set cache\.dir"),
        ({"quantise": False}, "found floating point, or weights that their authors quantised, in teacher"),
        ({"role": "codec_lm"}, "found role codec_lm|MoshiForConditionalGeneration"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    changes: dict[str, Any], expected: str, qwen_folder: Path, stream: Callable[..., LoadedTower]
) -> None:
    with pytest.raises(TowerLoadError, match=expected):
        stream(qwen_folder, **changes)


def test_a_model_without_blocks_has_nothing_to_stream(spec_of: Callable[..., TeacherSpec], tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    assert block_names(ResNetModel(config), "encoder") == ()
    with pytest.raises(TowerLoadError, match="found no transformer blocks in teacher 'tiny'"):
        _refuse_unstreamable(spec_of(tmp_path, "encoder"), (), quantise=True)
    with pytest.raises(TowerLoadError, match="role codec"):
        _refuse_unstreamable(spec_of(tmp_path, "codec"), ("layers.0",), quantise=True)


def test_a_checkpoint_that_does_not_fit_its_class_is_refused_as_in_memory(
    qwen_folder: Path, tmp_path: Path, stream: Callable[..., LoadedTower]
) -> None:
    folder = Path(shutil.copytree(qwen_folder, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerLoadError, match=r"1 missing \(model\.norm\.weight\)"):
        stream(folder, cache_dir=str(tmp_path / "blocks"))
    assert list((tmp_path / "blocks").iterdir()) == []


def test_blocks_that_cannot_be_written_are_an_error(
    qwen_folder: Path, tmp_path: Path, stream: Callable[..., LoadedTower]
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TowerLoadError, match="write the blocks of the streamed teacher 'tiny'"):
        stream(qwen_folder, cache_dir=str(tmp_path / "file"))


def test_the_loader_streams_a_teacher_of_the_registry(qwen_folder: Path, tmp_path: Path, blocks_on_disk: str) -> None:
    registry = load_registry()
    entry = registry.get("agentcpm-explore").model_copy(update={"id": "tiny"})
    (tmp_path / "tiny").symlink_to(qwen_folder)
    one = TeacherRegistry(contracts=registry.contracts, teachers=(entry,))
    loader = TowerLoader(one, models_dir=tmp_path, cache_dir=Path(blocks_on_disk), device="cpu")
    tower = loader.load("tiny", streamed=True)
    assert tower.is_streamed
    assert not loader.load("tiny").is_streamed
    assert on_meta(tower.model) == [True, True, True]


def test_rows_with_media_are_refused_by_a_streamed_language_model(streamed_qwen: LoadedTower) -> None:
    request = ScoreRequest(("a",), ("b",), ("c",), (b"",), 1.0, 8, ())
    with pytest.raises(ConfigError, match="'streamed' in memory to read media, found it streamed"):
        TeacherEngine(streamed_qwen, teacher_id="streamed").score(request)
