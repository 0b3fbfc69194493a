"""A recogniser's decoder as a teacher: distributions of a transcript's tokens, given the recording."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from nexus.towers import encoder
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import LoadedTower, load_tower
from nexus.towers.registry import load_registry, spec_of_entry
from nexus.towers.rows import RowsError
from nexus.towers.seq2seq import decoder_prompt
from nexus.towers.targets import ScoreRequest, TokenTargets
from nexus.towers.tiny import write_tiny

WHISPER = "whisper-large-v3-turbo"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TeacherEngine:
    folder = tmp_path_factory.mktemp(WHISPER)
    write_tiny(WHISPER, folder)
    return TeacherEngine(
        load_tower(spec_of_entry(load_registry().get(WHISPER), folder), device="cpu"), teacher_id=WHISPER
    )


def spoken(media_request: Callable[..., ScoreRequest], media: tuple[bytes, ...], *texts: str) -> ScoreRequest:
    return replace(media_request(media), completions=texts)


def tokens_of(engine: TeacherEngine, request: ScoreRequest) -> TokenTargets:
    tokens = engine.score(request).tokens
    assert isinstance(tokens, TokenTargets)
    return tokens


def test_every_token_of_a_transcript_has_the_decoders_own_distribution(
    engine: TeacherEngine, wav: Callable[[int], bytes], media_request: Callable[..., ScoreRequest]
) -> None:
    request = spoken(media_request, (wav(0), wav(1)), "Yes.", "4")
    both = engine.score(request)
    assert both.pooled_BE is not None
    assert engine.tokenizer_hash is None
    tokens = tokens_of(engine, request)
    assert tokens.offsets_B1.tolist() == [0, 5, 7]
    assert engine.tower.transcriber is not None
    assert tokens.token_ids_N[4] == tokens.token_ids_N[6] == engine.tower.transcriber.eos_token_id
    alone = tokens_of(engine, replace(spoken(media_request, (wav(1),), "4"), row_ids=("row-1",)))
    np.testing.assert_allclose(alone.logprobs_NK, tokens.logprobs_NK[5:], atol=1e-4)
    model = engine.tower.model
    inputs = encoder.prepare_inputs(model, engine.tower.processor, ("a",), (wav(0),), None)
    ids = torch.tensor([[3, *tokens.token_ids_N[:4].tolist()]])
    with torch.no_grad():
        expected_NV = model(**inputs, decoder_input_ids=ids).logits[0].log_softmax(-1).numpy()
    given = np.take_along_axis(expected_NV, tokens.ids_NK[:5].astype(np.int64), axis=1)
    np.testing.assert_allclose(tokens.logprobs_NK[:5], given, atol=1e-4)


def test_the_transcript_depends_on_the_recording_and_embeddings_do_not_on_the_transcript(
    engine: TeacherEngine, wav: Callable[[int], bytes], media_request: Callable[..., ScoreRequest]
) -> None:
    first, second = (tokens_of(engine, spoken(media_request, (wav(i),), "Yes.")) for i in (0, 1))
    assert np.abs(first.logprobs_NK - second.logprobs_NK).max() > 1e-3
    with_text, without = engine.score(spoken(media_request, (wav(0),), "Yes.")), engine.score(media_request((wav(0),)))
    assert without.tokens is None
    np.testing.assert_array_equal(with_text.pooled_BE, without.pooled_BE)


def test_transcripts_that_are_too_long_or_not_finite_are_named(
    engine: TeacherEngine, wav: Callable[[int], bytes], media_request: Callable[..., ScoreRequest]
) -> None:
    with pytest.raises(RowsError, match=r"at most 32 tokens .*row-1: 33 tokens"):
        engine.score(spoken(media_request, (wav(0), wav(1)), "Yes.", "x" * 32))
    assert tokens_of(engine, spoken(media_request, (wav(0),), "x" * 31)).offsets_B1[-1] == 32
    norm = engine.tower.model.get_decoder().layer_norm.weight
    kept = norm.clone()
    norm.data.fill_(torch.nan)
    with pytest.raises(RowsError, match="row-0: not finite"):
        engine.score(spoken(media_request, (wav(0),), "Yes."))
    norm.data.copy_(kept)


def test_a_tokenizers_own_prompt_stands_in_front(whisper: LoadedTower, engine: TeacherEngine) -> None:
    tokenizer = engine.tower.transcriber
    assert tokenizer is not None
    assert decoder_prompt(engine.tower.model, tokenizer) == [3]

    class Prompted:
        prefix_tokens = (50, 51)

    assert decoder_prompt(engine.tower.model, Prompted()) == [50, 51]  # type: ignore[arg-type]
    # Without a tokenizer the encoder alone is of use.
    assert whisper.transcriber is None
