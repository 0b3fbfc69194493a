"""Moshi over the codes of a recording: what is scored, what it depends on, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from nexus.artifacts import sha256_of
from nexus.errors import ConfigError, TowerLoadError
from nexus.towers.codec_lm import _delayed
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.registry import TeacherSpec, load_registry, spec_of_entry
from nexus.towers.rows import RowsError
from nexus.towers.targets import ScoreRequest
from nexus.towers.tiny import write_tiny

ID = "personaplex-7b"
RATE = 400
"""Hertz of the tiny codec, whose frames are 8 samples long."""
Q, V = 4, 64


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TeacherEngine:
    folder = tmp_path_factory.mktemp("moshi")
    write_tiny(ID, folder)
    return TeacherEngine(load_tower(spec_of_entry(load_registry().get(ID), folder), device="cpu"), teacher_id=ID)


def recording(seed: int, samples: int = 80) -> bytes:
    buffer = io.BytesIO()
    waveform_T = np.random.default_rng(seed).uniform(-0.5, 0.5, samples)
    soundfile.write(buffer, waveform_T, RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def test_every_code_after_the_first_frame_has_a_distribution(
    engine: TeacherEngine, media_request: Callable[..., ScoreRequest]
) -> None:
    request = replace(media_request((recording(0), recording(1, 120)), layers=(0, 2)), top_k=V)
    targets = engine.score(request)
    tokens = targets.tokens
    assert tokens is not None
    assert targets.codebooks == Q
    frames = np.diff(tokens.offsets_B1) // Q
    assert frames[0] < frames[1]
    assert {state.shape for state in targets.hidden.values()} == {(frames.sum(), 64)}
    np.testing.assert_allclose(np.exp(tokens.logprobs_NK).sum(axis=1), 1, atol=1e-5)
    assert len(set(tokens.token_ids_N.tolist())) > 5
    alone = engine.score(replace(media_request((recording(1, 120),), layers=(0,)), top_k=V)).tokens
    assert alone is not None
    np.testing.assert_array_equal(alone.logprobs_NK, tokens.logprobs_NK[tokens.offsets_B1[1] :])


def test_distributions_are_those_of_the_classes_own_forward(
    engine: TeacherEngine, media_request: Callable[..., ScoreRequest]
) -> None:
    """Moshi's forward with labels runs the depth decoder on text labels; given the same text it must agree."""
    model = engine.tower.model
    tokens = engine.score(replace(media_request((recording(0),)), top_k=V)).tokens
    assert tokens is not None
    codes_QF = model.audio_encoder.encode(
        torch.tensor(np.random.default_rng(0).uniform(-0.5, 0.5, 80), dtype=torch.float32)[None, None], num_quantizers=Q
    )[0]
    delayed_QF = model.build_delay_pattern_mask(codes_QF, V, V, max_length=codes_QF.shape[2] + 1)[0]
    own_QF = torch.cat([torch.full((1, Q, 1), V), delayed_QF[..., :-1]], dim=2)
    silence_QF = model.audio_encoder.encode(torch.zeros(1, 1, 80), num_quantizers=Q)[0]
    inputs = {
        "input_ids": torch.full((1, own_QF.shape[2]), model.config.vocab_size),
        "moshi_audio_codes": own_QF,
        "user_audio_codes": silence_QF,
        "use_cache": False,
    }
    with torch.no_grad():
        text_F = model(**inputs).logits.argmax(dim=-1)
        output = model(**inputs, text_labels=text_F, audio_labels=codes_QF)
    expected_NV = torch.log_softmax(output.audio_logits[1:].flatten(0, 1), dim=-1).numpy()
    np.testing.assert_array_equal(tokens.token_ids_N, delayed_QF[0, :, 1:].T.flatten().numpy())
    given_NV = np.zeros_like(expected_NV)
    np.put_along_axis(given_NV, tokens.ids_NK.astype(np.int64), tokens.logprobs_NK, axis=1)
    np.testing.assert_allclose(given_NV, expected_NV, atol=1e-3)


def test_later_codes_do_not_change_earlier_distributions(
    engine: TeacherEngine, media_request: Callable[..., ScoreRequest]
) -> None:
    codes = torch.arange(Q * 6).reshape(Q, 6)
    from nexus.towers.codec_lm import _forward

    changed = codes.clone()
    changed[:, 4:] += 20
    first, _ = _forward(engine.tower.model, codes, ())
    second, _ = _forward(engine.tower.model, changed, ())
    # Frame 4 is the first with a changed code; its first codebook's distribution does not see it yet.
    torch.testing.assert_close(first[: 3 * Q + 1], second[: 3 * Q + 1], rtol=0, atol=1e-5)
    assert not torch.allclose(first[3 * Q + 1], second[3 * Q + 1], atol=1e-3)


def test_the_delay_leaves_the_first_codebook_and_moves_the_others_by_one() -> None:
    assert _delayed(torch.tensor([[1, 2, 3], [4, 5, 6]]), 9).tolist() == [[1, 2, 3], [9, 4, 5]]


def test_noise_is_added_where_it_is_asked_for(
    engine: TeacherEngine, media_request: Callable[..., ScoreRequest]
) -> None:
    clean, noisy, again = (engine.score(media_request((recording(0),), snr_db=snr)) for snr in (None, 0.0, 0.0))
    assert noisy == again
    assert noisy != clean


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"text", "cannot be decoded"), (recording(0, 6), "2 to 128 frames"), (recording(0, 2400), "2 to 128 frames")],
)
def test_rows_that_cannot_be_heard_are_named(
    engine: TeacherEngine, media_request: Callable[..., ScoreRequest], data: bytes, reason: str
) -> None:
    with pytest.raises(RowsError, match="Found 1 bad rows: row-1") as caught:
        engine.score(media_request((recording(0), data)))
    assert list(caught.value.reasons) == ["row-1"]
    assert reason in caught.value.reasons["row-1"]


def test_results_that_are_not_finite_are_named(
    engine: TeacherEngine, media_request: Callable[..., ScoreRequest]
) -> None:
    weight = engine.tower.model.decoder.lm_head.weight
    norm = engine.tower.model.decoder.model.norm.weight
    kept = norm.clone()
    norm.fill_(torch.nan)
    with pytest.raises(RowsError, match="row-0: not finite"):
        engine.score(media_request((recording(0),)))
    norm.copy_(kept)
    assert weight.isfinite().all()


def test_text_alone_is_no_request_for_it(engine: TeacherEngine, text_request: Callable[..., ScoreRequest]) -> None:
    with pytest.raises(ConfigError, match="media for the teacher 'personaplex-7b' of role codec_lm"):
        engine.score(text_request(("a",), ("b",)))


def test_another_class_is_no_codec_lm(qwen_folder: Path, spec_of: Callable[..., TeacherSpec]) -> None:
    with pytest.raises(TowerLoadError, match=r"Expected MoshiForConditionalGeneration .*found Qwen3ForCausalLM"):
        load_tower(spec_of(qwen_folder, "codec_lm"), device="cpu")


def test_a_tiny_build_is_the_same_every_time(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "other"):
        torch.rand(1)  # whatever was drawn before
        write_tiny("personaplex-7b", tmp_path / name)
        digests.add(sha256_of(tmp_path / name / "model.safetensors"))
    assert len(digests) == 1
