"""Language models that see and hear: distributions of answers behind a picture or a recording, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from nexus.data.media import read_media
from nexus.data.records import Media, Record
from nexus.errors import ConfigError
from nexus.profiling.consolidation import plan_confirmation
from nexus.profiling.layers import find_blocks
from nexus.towers.engine import AnswerCheck, TeacherEngine
from nexus.towers.loader import LoadedTower, load_tower
from nexus.towers.media_lm import MediaPrompt, prepare_prompts, same_noise
from nexus.towers.probes import clip, probe_media
from nexus.towers.registry import load_registry, spec_of_entry
from nexus.towers.rows import RowsError
from nexus.towers.targets import HiddenTargets, ScoreRequest, TokenTargets
from nexus.towers.tiny import write_tiny

SEES, HEARS = "translategemma-4b", "vibevoice-asr"
TEMPLATE = "<bos>{% for part in messages[0]['content'] %}{{ '<boi>' if part['type'] == 'image' else part['text'] }}{% endfor %}:"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TeacherEngine]:
    made = {}
    for name in (SEES, HEARS):
        folder = tmp_path_factory.mktemp(name)
        write_tiny(name, folder)
        made[name] = TeacherEngine(
            load_tower(spec_of_entry(load_registry().get(name), folder), device="cpu"), teacher_id=name
        )
    return made


def request_of(engine: TeacherEngine, **changes: object) -> ScoreRequest:
    rows = ScoreRequest(("a", "b"), ("What?", "Which one?"), ("Yes.", "4"), probe_media(engine.tower), 1.0, 8, (0, 2))
    return replace(rows, **changes)  # type: ignore[arg-type]


def topk(engine: TeacherEngine, request: ScoreRequest) -> TokenTargets:
    tokens = engine.score(request).tokens
    assert isinstance(tokens, TokenTargets)
    return tokens


@pytest.mark.parametrize("name", [SEES, HEARS])
def test_answers_are_scored_behind_their_own_picture_or_recording(engines: dict[str, TeacherEngine], name: str) -> None:
    engine = engines[name]
    request = request_of(engine)
    targets = engine.score(request)
    assert isinstance(targets.tokens, TokenTargets)
    assert targets.tokens.offsets_B1.tolist() == [0, 5, 7]
    assert {state.shape for state in targets.hidden.values()} == {(7, 64)}
    assert engine.score(request) == targets
    second = {"row_ids": ("b",), "prompts": ("Which one?",), "completions": ("4",), "media": request.media[1:]}  # type: ignore[index]
    np.testing.assert_allclose(
        topk(engine, replace(request, **second)).logprobs_NK, targets.tokens.logprobs_NK[5:], atol=1e-5
    )
    other = topk(engine, replace(request, media=request.media[::-1]))  # type: ignore[index]
    assert np.abs(other.logprobs_NK - targets.tokens.logprobs_NK).max() > 1e-3


def test_a_scored_token_is_the_models_own_prediction_behind_the_processors_prompt(
    engines: dict[str, TeacherEngine],
) -> None:
    engine = engines[SEES]
    request = request_of(engine)
    assert request.media is not None
    tokens = topk(engine, request)
    (prompt, _) = prepare_prompts(
        engine.tower.processor, request.row_ids, request.prompts, request.media, teacher_id=SEES
    )
    ids = [*prompt.prompt_ids, *tokens.token_ids_N[:4].tolist()]
    inputs = dict(prompt.inputs)
    inputs["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, 4))
    with torch.no_grad():
        logits_TV = engine.tower.model(input_ids=torch.tensor([ids]), **inputs).logits[0]
    expected_NV = torch.log_softmax(logits_TV[len(prompt.prompt_ids) - 1 :], dim=-1).numpy()
    given = np.take_along_axis(expected_NV, tokens.ids_NK[:5].astype(np.int64), axis=1)
    np.testing.assert_allclose(tokens.logprobs_NK[:5], given, atol=1e-4)
    # Four image tokens stand where the one placeholder stood.
    assert prompt.prompt_ids.count(engine.tower.model.config.image_token_id) == 4


def test_the_transport_hidden_sends_what_the_head_reads_behind_media(engines: dict[str, TeacherEngine]) -> None:
    engine = engines[SEES]
    request = request_of(engine, layers=())
    states = engine.score(replace(request, transport="hidden")).tokens
    assert isinstance(states, HiddenTargets)
    with torch.no_grad():
        logits_NV = engine.tower.model.get_output_embeddings()(torch.from_numpy(states.states_NH))
    tokens = topk(engine, request)
    given = np.take_along_axis(torch.log_softmax(logits_NV, -1).numpy(), tokens.ids_NK.astype(np.int64), axis=1)
    np.testing.assert_allclose(tokens.logprobs_NK, given, atol=1e-4)


def test_answers_to_rows_with_media_are_greedy_and_depend_on_them(engines: dict[str, TeacherEngine]) -> None:
    engine = engines[SEES]
    first, second = probe_media(engine.tower)
    records = [Record(str(i), "c", "What?", media=Media("image", data)) for i, data in enumerate((first, second))]
    answers = engine.answer(records, max_new_tokens=6)
    assert engine.answer(records[1:], max_new_tokens=6) == answers[1:]
    tokens = topk(engine, request_of(engine, prompts=("What?",) * 2, completions=answers))
    for row, answer in enumerate(answers):
        best = tokens.ids_NK[tokens.offsets_B1[row], 0]
        assert engine.tower.tokenizer is not None
        assert answer.startswith(engine.tower.tokenizer.decode([best], skip_special_tokens=True))
    with pytest.raises(RowsError, match="an image or a recording in every row"):
        engine.answer([records[0], Record("t", "c", "What?")], max_new_tokens=6)
    with pytest.raises(RowsError, match="at most 256 tokens"):
        engine.answer(records, max_new_tokens=300)


def test_a_processors_template_places_the_medium(engines: dict[str, TeacherEngine]) -> None:
    engine = engines[SEES]
    processor = engine.tower.processor
    processor.chat_template = TEMPLATE
    try:
        (prompt,) = prepare_prompts(processor, ("a",), ("Hi",), probe_media(engine.tower)[:1], teacher_id=SEES)
    finally:
        processor.chat_template = None
    tokenizer = engine.tower.tokenizer
    assert tokenizer is not None
    assert prompt.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt.prompt_ids[-3:]) == "Hi:"


def test_media_of_another_kind_and_broken_ones_are_named(
    engines: dict[str, TeacherEngine], wav: Callable[[int], bytes]
) -> None:
    engine = engines[SEES]
    picture, _ = probe_media(engine.tower)
    with pytest.raises(RowsError, match=r"b: expected image, found audio"):
        engine.score(request_of(engine, media=(picture, wav(0))))
    with pytest.raises(RowsError, match=r"b: expected an audio file"):
        engines[HEARS].score(request_of(engines[HEARS], media=(wav(0), b"text")))


def test_noise_is_added_to_recordings_where_it_is_asked_for(
    engines: dict[str, TeacherEngine], random_state_is_kept: None
) -> None:
    engine = engines[HEARS]
    clean, noisy = (topk(engine, request_of(engine, snr_db=snr)) for snr in (None, 0.0))
    assert np.abs(clean.logprobs_NK - noisy.logprobs_NK).max() > 1e-3


def test_without_a_processor_rows_with_media_are_refused_and_text_is_read(
    qwen: LoadedTower, text_request: Callable[..., ScoreRequest]
) -> None:
    engine = TeacherEngine(qwen, teacher_id="tiny")
    request = text_request(("a",), ("b",))
    assert engine.score(request).tokens is not None
    with pytest.raises(ConfigError, match=r"Expected a processor .*'tiny', found none.*pip install torchvision"):
        engine.score(replace(request, media=(b"",)))


def test_a_processor_that_does_not_load_leaves_a_reader_of_text(tmp_path: Path) -> None:
    write_tiny(SEES, tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    tower = load_tower(spec_of_entry(load_registry().get(SEES), tmp_path), device="cpu")
    assert tower.processor is None
    assert len(find_blocks(tower.model)) == 3


def test_clips_are_given_where_a_processor_takes_them_and_their_first_frame_where_not(
    engines: dict[str, TeacherEngine],
) -> None:
    animation = clip(0)
    processor = engines[SEES].tower.processor
    (prompt,) = prepare_prompts(processor, ("a",), ("Hi",), (animation,), teacher_id=SEES)
    assert prompt.inputs["pixel_values"].shape == (1, 3, 32, 32)

    class Clips:
        """Takes clips alone, as the processors that need torchvision do."""

        chat_template = None
        video_processor = object()
        video_token = "<video>"

        def __call__(self, **given: object) -> dict[str, torch.Tensor]:
            assert given["text"] == ["<video>Hi\n"]
            (frames,) = given["videos"]  # type: ignore[misc]
            return {"input_ids": torch.tensor([[1, 2]]), "frames": torch.tensor([len(frames)])}

    (prompt,) = prepare_prompts(Clips(), ("a",), ("Hi",), (animation,), teacher_id="tiny")
    assert prompt == MediaPrompt([1, 2], prompt.inputs)
    assert prompt.inputs["frames"].item() == 8


def test_noise_inside_a_model_is_the_same_for_a_row_and_leaves_the_process_alone(random_state_is_kept: None) -> None:
    drawn = []
    for row_id in ("a", "b", "a"):
        with same_noise(row_id, torch.device("cpu")):
            drawn.append(torch.randn(4))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


# --- layer profiling ----------------------------------------------------------------------------------------------------------------


def rows_of(engine: TeacherEngine, media: tuple[bytes, ...], kind: Literal["image", "audio"]) -> list[Record]:
    texts = (("What?", "Yes."), ("Which one of them?", "4"))
    return [
        Record(f"row-{i}", "c", prompt, completion, media=Media(kind, data))
        for i, ((prompt, completion), data) in enumerate(zip(texts, media, strict=True))
    ]


def nll_behind_media(engine: TeacherEngine, record: Record, skipped: int | None) -> float:
    """Of the completion, summed in float64, by one plain forward in which block `skipped` hands on what it was given."""
    assert record.media is not None
    assert record.completion is not None
    tower = engine.tower
    assert tower.tokenizer is not None
    (prompt,) = prepare_prompts(
        tower.processor, (record.id,), (record.prompt,), (read_media(record.media),), teacher_id=SEES
    )
    answer = [*tower.tokenizer(record.completion, add_special_tokens=False)["input_ids"], tower.tokenizer.eos_token_id]
    inputs = dict(prompt.inputs)
    inputs["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, len(answer)))

    def identity(_: nn.Module, args: tuple[torch.Tensor, ...], output: object) -> object:
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    hooks = [] if skipped is None else [find_blocks(tower.model).blocks[skipped].register_forward_hook(identity)]
    try:
        with torch.no_grad():
            logits_TV = tower.model(input_ids=torch.tensor([[*prompt.prompt_ids, *answer]]), **inputs).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    logprobs_CV = torch.log_softmax(logits_TV[len(prompt.prompt_ids) - 1 : -1].double(), dim=-1)
    return -float(logprobs_CV[range(len(answer)), answer].sum())


def test_a_layers_effect_is_measured_behind_the_rows_own_picture(engines: dict[str, TeacherEngine]) -> None:
    engine = engines[SEES]
    pictures = probe_media(engine.tower)
    records = rows_of(engine, pictures, "image")
    measured = engine.measure(records)
    assert measured.sample_ids == ("row-0", "row-1")
    for row, record in enumerate(records):
        clean = nll_behind_media(engine, record, None)
        assert measured.clean_nll_B is not None
        assert measured.clean_nll_B[row] == pytest.approx(clean, abs=1e-3)
        reference = [nll_behind_media(engine, record, layer) - clean for layer in range(engine.num_layers)]
        np.testing.assert_allclose(measured.delta_LB[:, row], reference, atol=2e-3)
    exchanged = engine.measure(rows_of(engine, pictures[::-1], "image"))
    assert (np.abs(exchanged.delta_LB - measured.delta_LB).max(axis=0) > 1e-2).all()


def test_rows_of_text_among_rows_with_media_are_measured_as_they_are_alone(engines: dict[str, TeacherEngine]) -> None:
    engine = engines[SEES]
    first, second = rows_of(engine, probe_media(engine.tower), "image")
    records = [first, replace(second, media=None)]
    mixed = engine.measure(records)
    alone = [engine.measure([record]).delta_LB[:, 0] for record in records]
    np.testing.assert_allclose(mixed.delta_LB, np.stack(alone, axis=1), atol=1e-5)
    plan = plan_confirmation(mixed, seed=0)
    confirmed = engine.confirm(records, plan, answers=AnswerCheck("exact", 4))
    # Nothing is generated behind media with layers skipped: verification judges all rows of such a call.
    assert confirmed.generated_correct_VB is None
    again = engine.confirm([first], plan)
    np.testing.assert_allclose(confirmed.noise_ablation.delta_KB[:, :1], again.noise_ablation.delta_KB, atol=1e-5)
    other = engine.confirm([replace(first, media=second.media)], plan)
    assert np.abs(other.noise_ablation.delta_KB - again.noise_ablation.delta_KB).max() > 1e-2


def test_noise_inside_a_speech_tower_is_no_effect_of_a_layer(
    engines: dict[str, TeacherEngine], wav: Callable[[int], bytes], random_state_is_kept: None
) -> None:
    engine = engines[HEARS]
    records = rows_of(engine, (wav(0), wav(1)), "audio")
    # The one runs the speech tower anew for every variant, the other resumes behind its states.
    slow, fast = (engine.measure(records, strategy=strategy) for strategy in ("brute", "prefix"))
    np.testing.assert_allclose(slow.delta_LB, fast.delta_LB, atol=1e-4)
    assert len(engine.tower.model._forward_pre_hooks) == 0


def test_all_rows_with_media_that_cannot_be_measured_are_named_at_once(engines: dict[str, TeacherEngine]) -> None:
    engine = engines[SEES]
    records = rows_of(engine, probe_media(engine.tower), "image")
    long = [replace(record, completion="no " * 300) for record in records]
    with pytest.raises(RowsError, match="at most 256 tokens") as refused:
        engine.measure(long)
    assert set(refused.value.reasons) == {"row-0", "row-1"}
    embedding = engine.tower.model.get_input_embeddings().weight
    kept = embedding.data.clone()
    try:
        embedding.data.fill_(torch.nan)
        with pytest.raises(RowsError) as refused:
            engine.measure(records)
    finally:
        embedding.data.copy_(kept)
    assert refused.value.reasons == {"row-0": "NaN", "row-1": "NaN"}


def test_media_are_never_dropped_where_layers_cannot_be_measured_behind_them(engines: dict[str, TeacherEngine]) -> None:
    engine = engines[SEES]
    first, second = rows_of(engine, probe_media(engine.tower), "image")
    reader = TeacherEngine(replace(engine.tower, role="sae"), teacher_id="reads")
    with pytest.raises(RowsError, match=r"Expected rows of text .*'reads'.*row-0: media") as refused:
        reader.measure([first, replace(second, media=None)])
    assert refused.value.reasons == {"row-0": "media"}
