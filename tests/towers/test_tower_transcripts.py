"""Speech recognisers of an encoder and a decoder, profiled on the text of what they hear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus.data.records import Media, Record
from nexus.errors import TowerLoadError
from nexus.profiling.consolidation import consolidate, plan_confirmation
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import LoadedTower, load_tower
from nexus.towers.rows import RowsError
from nexus.towers.tiny import write_tiny
from nexus.towers.transcripts import can_transcribe, transcript_batch


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory, spec_of: Callable[..., object]) -> LoadedTower:
    folder: Path = tmp_path_factory.mktemp("recogniser")
    write_tiny("whisper-large-v3-turbo", folder)
    return load_tower(spec_of(folder, role="encoder"), device="cpu")


@pytest.fixture(scope="module")
def spoken(wav: Callable[[int], bytes]) -> list[Record]:
    texts = ("a tone", "another one", "higher")
    return [
        Record(id=f"row-{i}", capability="asr", prompt="", completion=text, media=Media("audio", wav(i)))
        for i, text in enumerate(texts)
    ]


def skipped(model, block, run: Callable[[], Tensor]) -> Tensor:
    hook = None
    if block is not None:
        hook = block.register_forward_hook(
            lambda _, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
        )
    try:
        with torch.no_grad():
            return run()
    finally:
        if hook is not None:
            hook.remove()


def test_the_layers_of_both_sides_are_measured_on_the_text(recogniser: LoadedTower, spoken: list[Record]) -> None:
    engine = TeacherEngine(recogniser, teacher_id="t")
    measured = engine.measure(spoken, strategy="triangular")
    assert (measured.side, measured.path, measured.metric) == ("encoder", "model.encoder.layers", "delta_nll")
    assert (measured.other_side.side, measured.other_side.path) == ("decoder", "model.decoder.layers")
    assert len(measured.delta_LB) == engine.num_layers == 3
    model, writer = recogniser.model, engine._writer
    assert measured.token_counts_B.tolist() == [len(record.completion) + 1 for record in spoken]
    for row, record in enumerate(spoken):
        heard = engine._prepared([record], None)
        ids = [3, *writer(record.completion, add_special_tokens=False)["input_ids"], writer.eos_token_id]
        decoder_ids = torch.tensor([ids])

        def nll(heard=heard, decoder_ids=decoder_ids) -> Tensor:
            log_probs = model(**heard, decoder_input_ids=decoder_ids).logits[0, :-1].double().log_softmax(-1)
            return -log_probs.gather(1, decoder_ids[0, 1:, None]).sum()

        clean = skipped(model, None, nll)
        # NF4 computes in float32: sums of up to a dozen tokens.
        assert measured.clean_nll_B[row] == pytest.approx(float(clean), rel=1e-4)
        for part, blocks in ((measured, model.model.encoder.layers), (measured.other_side, model.model.decoder.layers)):
            expected = [float(skipped(model, block, nll) - clean) for block in blocks]
            np.testing.assert_allclose(part.delta_LB[:, row], expected, rtol=1e-3, atol=1e-3)


def test_both_passes_give_a_profile_of_both_sides(recogniser: LoadedTower, spoken: list[Record]) -> None:
    engine = TeacherEngine(recogniser, teacher_id="t")
    measured = engine.measure(spoken)
    confirmed = engine.confirm(spoken, plan_confirmation(measured, seed=0))
    profile = consolidate([measured], teacher="t", revision="r", seconds=1.0, seed=0, confirmations=[confirmed])
    assert (profile.side, profile.num_layers, profile.num_confirmed) == ("encoder", 3, 3)
    assert (profile.other_side.side, profile.other_side.num_layers, profile.other_side.num_confirmed) == (
        "decoder",
        2,
        3,
    )
    assert all(layer.noise_ablation.kl_nats > 0 for layer in (*profile.layers, *profile.other_side.layers))


def test_without_text_the_encoder_is_measured_on_its_embedding(recogniser: LoadedTower, spoken: list[Record]) -> None:
    engine = TeacherEngine(recogniser, teacher_id="t")
    measured = engine.measure([replace(record, completion=None) for record in spoken])
    assert (measured.metric, measured.other_side) == ("cosine_drop", None)
    with pytest.raises(RowsError, match="row-1: no text"):
        engine.measure([spoken[0], replace(spoken[1], completion=None)])


def test_what_is_scored_is_the_answer_where_there_is_one(recogniser: LoadedTower, spoken: list[Record]) -> None:
    engine = TeacherEngine(recogniser, teacher_id="t")
    measured = engine.measure([replace(spoken[0], answer="tone")])
    assert measured.token_counts_B.tolist() == [5]


def test_texts_that_do_not_fit_are_named(recogniser: LoadedTower, spoken: list[Record]) -> None:
    engine = TeacherEngine(recogniser, teacher_id="t")
    fits, long = replace(spoken[0], completion="x" * 30), replace(spoken[1], completion="x" * 31)
    assert engine.measure([fits]).token_counts_B.tolist() == [31]
    with pytest.raises(RowsError, match=r"texts of at most 32 tokens.*row-1: 33 tokens"):
        engine.measure([fits, long])


def test_a_recogniser_without_a_tokenizer_says_so(whisper: LoadedTower, spoken: list[Record]) -> None:
    with pytest.raises(TowerLoadError, match=r"found none\. Save or fetch the tokenizer"):
        TeacherEngine(whisper, teacher_id="t").measure(spoken)


def test_multilingual_models_are_told_what_they_hear(
    recogniser: LoadedTower, spoken: list[Record], monkeypatch
) -> None:
    engine = TeacherEngine(recogniser, teacher_id="t")
    model, config = recogniser.model, recogniser.model.generation_config
    for name, value in {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 50, "<|de|>": 51, "<|fr|>": 52},
        "task_to_id": {"transcribe": 60},
        "no_timestamps_token_id": 61,
        "decoder_start_token_id": 3,
    }.items():
        monkeypatch.setattr(config, name, value, raising=False)
    heard = engine._prepared(spoken, None)
    batch = transcript_batch(model, engine._writer, ["a", "b", "c"], ["xy", "x", "xyz"], heard)
    with torch.no_grad():
        logits = model(**heard, decoder_input_ids=torch.full((3, 1), 3)).logits[:, 0]
    languages = 50 + logits[:, 50:53].argmax(-1)
    assert batch.input_ids_BT[:, :4].tolist() == [[3, language, 60, 61] for language in languages.tolist()]
    assert batch.loss_mask_BT.sum(1).tolist() == [3, 2, 4]
    assert not batch.loss_mask_BT[:, :4].any()
    assert batch.attention_mask_BT.sum(1).tolist() == [7, 6, 8]


def test_only_decoders_of_blocks_transcribe(
    recogniser: LoadedTower, whisper_classifier: LoadedTower, siglip: LoadedTower, qwen: LoadedTower
) -> None:
    towers = (recogniser, whisper_classifier, siglip, qwen)
    assert [can_transcribe(tower.model) for tower in towers] == [True, False, False, False]
