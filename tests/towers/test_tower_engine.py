"""TeacherEngine: the one object that an actor holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nexus.assembly.evaluate import divergence_per_item, score_answers
from nexus.data.records import Media, Record
from nexus.errors import ConfigError, ProfilingError
from nexus.profiling.consolidation import plan_confirmation
from nexus.profiling.niwt import EncoderProfileBatch, NIWTProfiler
from nexus.towers.engine import TeacherEngine
from nexus.towers.health import NotFiniteError, UniformOutputError
from nexus.towers.loader import LoadedTower, load_tower
from nexus.towers.registry import TeacherSpec
from nexus.towers.rows import RowsError
from nexus.towers.targets import ScoreRequest
from nexus.towers.tax import divergence


def engine(tower: LoadedTower) -> TeacherEngine:
    return TeacherEngine(tower, teacher_id="tiny")


@pytest.fixture(scope="module")
def text_records() -> list[Record]:
    rows = (("2+2?", "4"), ("a longer question", "an answer"), ("x", "yz"))
    return [Record(id=f"row-{i}", capability="c", prompt=p, completion=c) for i, (p, c) in enumerate(rows)]


# --- facts --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role", "labels"),
    [
        ("qwen", "causal_lm", None),
        ("siglip", "encoder", None),
        ("whisper", "encoder", None),
        ("whisper_classifier", "encoder", "abcd"),
    ],
)
def test_facts_about_the_teacher(request: pytest.FixtureRequest, name: str, role: str, labels: Any) -> None:
    tower = request.getfixturevalue(name)
    facts = engine(tower)
    assert (facts.role, facts.num_layers, facts.hidden_size) == (role, 3, 64)
    assert (facts.fingerprint, facts.tokenizer_hash) == (tower.fingerprint, tower.tokenizer_hash)
    assert facts.label_texts == (None if labels is None else tuple(labels))


# --- targets ------------------------------------------------------------------------------------------------------------------------


def test_a_language_model_gives_tokens_and_states(qwen: LoadedTower, text_request: Callable[..., ScoreRequest]) -> None:
    request = text_request(("a", "b"), ("c", "de"), layers=(1,))
    targets = engine(qwen).score(request)
    assert (targets.teacher, targets.fingerprint, targets.tokenizer_hash) == (
        "tiny",
        qwen.fingerprint,
        qwen.tokenizer_hash,
    )
    assert targets.row_ids == request.row_ids
    assert targets.tokens is not None
    assert targets.tokens.offsets_B1.tolist() == [0, 2, 5]
    assert targets.hidden[1].shape == (5, 64)
    assert (targets.pooled_BE, targets.label_texts, targets.label_logprobs_BC) == (None, None, None)
    assert engine(qwen).score(request) == targets


def test_a_classifier_gives_labels_embeddings_and_states(
    siglip_classifier: LoadedTower, png: Callable[[int], bytes], media_request: Callable[..., ScoreRequest]
) -> None:
    request = media_request((png(0), png(1)), temperature=2.0, layers=(0, 2))
    targets = engine(siglip_classifier).score(request)
    assert (targets.tokens, targets.tokenizer_hash) == (None, None)
    assert targets.label_texts == ("zero", "one", "two", "three", "four")
    assert targets.label_logprobs_BC is not None
    assert targets.label_logprobs_BC.shape == (2, 5)
    assert targets.pooled_BE is not None
    assert {layer: state.shape for layer, state in targets.hidden.items()} == {0: (2, 16, 64), 2: (2, 16, 64)}
    assert engine(siglip_classifier).score(request) == targets


def test_an_encoder_without_a_head_gives_no_labels(
    whisper: LoadedTower, wav: Callable[[int], bytes], media_request: Callable[..., ScoreRequest]
) -> None:
    targets = engine(whisper).score(media_request((wav(0),), snr_db=5.0))
    assert (targets.label_texts, targets.label_logprobs_BC) == (None, None)
    clean = engine(whisper).score(media_request((wav(0),)))
    assert not np.array_equal(targets.pooled_BE, clean.pooled_BE)


def test_requests_that_do_not_fit_the_role_are_refused(
    qwen: LoadedTower,
    siglip: LoadedTower,
    png: Callable[[int], bytes],
    text_request: Callable[..., ScoreRequest],
    media_request: Callable[..., ScoreRequest],
) -> None:
    text = text_request(("a",), ("b",))
    with pytest.raises(ConfigError, match="Expected completions to score for the language model 'tiny'"):
        engine(qwen).score(replace(text, completions=None))
    with pytest.raises(ConfigError, match="a processor of images or recordings for the language model 'tiny'"):
        engine(qwen).score(replace(text, media=(png(0),)))
    with pytest.raises(ConfigError, match="Expected media for the teacher 'tiny' of role encoder"):
        engine(siglip).score(replace(media_request((png(0),)), media=None))
    with pytest.raises(ConfigError, match="found the encoder 'tiny'"):
        engine(siglip).generate(["a"], max_new_tokens=3)


# --- answers ------------------------------------------------------------------------------------------------------------------------


def test_a_language_models_answer_is_its_greedy_completion(qwen: LoadedTower, text_records: list[Record]) -> None:
    prompts = [record.prompt for record in text_records]
    answers = engine(qwen).answer(text_records, max_new_tokens=6)
    assert answers == engine(qwen).generate(prompts, max_new_tokens=6, batch_size=1)


def test_a_classifiers_answer_is_its_most_probable_label(
    siglip_classifier: LoadedTower, image_records: list[Record], media_request: Callable[..., ScoreRequest]
) -> None:
    media = tuple(record.media.data for record in image_records)  # type: ignore[union-attr]
    targets = engine(siglip_classifier).score(media_request(media))
    assert targets.label_logprobs_BC is not None
    assert targets.label_texts is not None
    expected = tuple(targets.label_texts[i] for i in targets.label_logprobs_BC.argmax(axis=1))
    assert engine(siglip_classifier).answer(image_records, max_new_tokens=1) == expected
    assert len(set(expected)) > 1


def test_media_may_be_files(siglip_classifier: LoadedTower, image_records: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(image_records[0].media.data)  # type: ignore[union-attr, arg-type]
    record = replace(image_records[0], media=Media("image", str(path)))
    whole = engine(siglip_classifier).answer(image_records[:1], max_new_tokens=1)
    assert engine(siglip_classifier).answer([record], max_new_tokens=1) == whole


def test_noise_reaches_the_answers_inputs(whisper_classifier: LoadedTower, wav: Callable[[int], bytes]) -> None:
    records = [Record(id="a", capability="c", prompt="?", media=Media("audio", wav(1)))]
    clean, noisy = (next(engine(whisper_classifier).answer_logits(records, [""], snr_db=snr)) for snr in (None, -20.0))
    assert not torch.equal(clean, noisy)


def test_an_encoder_without_a_head_answers_nothing(siglip: LoadedTower, image_records: list[Record]) -> None:
    with pytest.raises(ConfigError, match="without a classification head"):
        engine(siglip).answer(image_records, max_new_tokens=1)


def test_rows_without_media_are_named(siglip_classifier: LoadedTower, image_records: list[Record]) -> None:
    bare = replace(image_records[1], media=None)
    with pytest.raises(RowsError, match="row-1: no media"):
        engine(siglip_classifier).answer([image_records[0], bare], max_new_tokens=1)


# --- layers -------------------------------------------------------------------------------------------------------------------------


def test_language_models_are_measured_on_the_rows_completions(qwen: LoadedTower, text_records: list[Record]) -> None:
    measured = engine(qwen).measure(text_records)
    assert measured.metric == "delta_nll"
    assert measured.sample_ids == ("row-0", "row-1", "row-2")
    assert measured.token_counts_B.tolist() == [2, 10, 3]
    assert measured.clean_nll_B is not None
    for row, record in enumerate(text_records):
        (logits_NV,) = engine(qwen).answer_logits([record], [record.completion or ""])
        ids = [*qwen.tokenizer(record.completion, add_special_tokens=False)["input_ids"], 1]
        nll = -torch.log_softmax(logits_NV.double(), dim=-1)[range(len(ids)), ids].sum().item()
        assert measured.clean_nll_B[row] == pytest.approx(nll, rel=1e-5)
    assert measured.delta_LB.shape == (3, 3)


def test_strategy_and_micro_batches_do_not_change_the_measurement(
    qwen: LoadedTower, text_records: list[Record]
) -> None:
    fast = engine(qwen).measure(text_records)
    slow = engine(qwen).measure(text_records, strategy="brute", micro_batch_size=1)
    np.testing.assert_allclose(fast.delta_LB, slow.delta_LB, rtol=1e-4, atol=1e-4)


def test_rows_without_a_completion_cannot_be_measured(qwen: LoadedTower, text_records: list[Record]) -> None:
    with pytest.raises(RowsError, match="row-2: no completion"):
        engine(qwen).measure([*text_records[:2], replace(text_records[2], completion=None)])


def test_classifiers_are_measured_on_the_rows_labels(
    siglip_classifier: LoadedTower, image_records: list[Record]
) -> None:
    golds = ("four", "zero", "one", "two", "three", "four")
    # An answer is the label also where the completion says more.
    rows = [
        replace(r, completion=f"It is {g}.", answer=g) if i % 2 else replace(r, completion=g)
        for i, (r, g) in enumerate(zip(image_records, golds, strict=True))
    ]
    measured = engine(siglip_classifier).measure(rows)
    assert measured.metric == "label_nll"
    logprobs = next(engine(siglip_classifier).answer_logits(rows, golds)).double()
    chosen = [("zero", "one", "two", "three", "four").index(gold) for gold in golds]
    np.testing.assert_allclose(measured.clean_nll_B, -torch.log_softmax(logprobs, -1)[range(6), chosen], rtol=1e-5)
    assert measured.correct_VB is not None


def test_classifiers_without_labels_are_measured_on_their_own_decisions(
    siglip_classifier: LoadedTower, image_records: list[Record]
) -> None:
    measured = engine(siglip_classifier).measure(image_records)
    assert measured.metric == "label_nll"
    assert measured.correct_VB is None
    with pytest.raises(RowsError, match="every row or in none") as refused:
        engine(siglip_classifier).measure([*image_records[:-1], replace(image_records[-1], answer="one")])
    assert refused.value.reasons == {record.id: "no answer" for record in image_records[:-1]}


def test_rows_for_which_alone_the_model_gives_nan_are_named_and_a_model_that_gives_nothing_else_is_not_their_fault(
    qwen: LoadedTower, text_records: list[Record]
) -> None:
    embedding = qwen.model.get_input_embeddings().weight
    assert qwen.tokenizer is not None
    token = qwen.tokenizer("x")["input_ids"][-1]
    kept = embedding.data.clone()
    rows = [replace(text_records[0], prompt="2+2"), text_records[2]]
    plan = plan_confirmation(engine(qwen).measure(rows), seed=0)
    try:
        embedding.data[token] = torch.nan
        for step in (lambda: engine(qwen).measure(rows), lambda: engine(qwen).confirm(rows, plan)):
            with pytest.raises(RowsError) as refused:
                step()
            assert refused.value.reasons == {"row-2": "NaN"}
        with pytest.raises(RowsError):
            engine(qwen).measure([text_records[2]])
        embedding.data.fill_(torch.nan)
        with pytest.raises(ProfilingError, match="found NaN"):
            engine(qwen).measure(text_records)
    finally:
        embedding.data.copy_(kept)
    assert engine(qwen).measure(text_records).delta_LB.shape == (3, 3)


def test_labels_that_a_classifier_does_not_have_are_named(
    siglip_classifier: LoadedTower, image_records: list[Record]
) -> None:
    rows = [replace(record, answer=answer) for record, answer in zip(image_records, ("one", "nine"), strict=False)]
    with pytest.raises(RowsError, match="row-1: label 'nine'"):
        engine(siglip_classifier).measure(rows)


def test_encoders_without_a_head_are_measured_on_their_embedding(
    whisper: LoadedTower, wav: Callable[[int], bytes]
) -> None:
    records = [Record(id=f"r{i}", capability="c", prompt="?", media=Media("audio", wav(i))) for i in range(3)]
    measured = engine(whisper).measure(records, snr_db=20.0)
    assert measured.metric == "cosine_drop"
    # The blocks are the encoder's: those of the decoder are not called at all.
    assert measured.delta_LB.shape == (3, 3)
    features = [torch.from_numpy(np.zeros((1, 16, 100), dtype=np.float32))]
    batch = EncoderProfileBatch(["z"], {"input_features": features[0]}, None)
    assert NIWTProfiler(whisper.model.get_encoder()).measure(batch).delta_LB.shape == (3, 1)


# --- the quantisation tax -----------------------------------------------------------------------------------------------------------


def test_tax_of_a_language_model_is_read_on_the_nf4_copys_own_answers(
    qwen: LoadedTower, text_records: list[Record]
) -> None:
    tax = engine(qwen).tax(text_records, max_new_tokens=6)
    assert tax.nf4_answers == engine(qwen).answer(text_records, max_new_tokens=6)
    tokens = sum(len(qwen.tokenizer(a, add_special_tokens=False)["input_ids"]) + 1 for a in tax.nf4_answers)
    assert tax.kl_N.shape == tax.same_top1_N.shape == (tokens,)
    assert (tax.kl_N.dtype, tax.same_top1_N.dtype) == (np.float64, bool)
    assert tax.kl_N.mean() > 1e-4
    assert 0 < tax.same_top1_N.mean() <= 1


def test_tax_of_a_classifier_is_read_on_every_row(siglip_classifier: LoadedTower, image_records: list[Record]) -> None:
    tax = engine(siglip_classifier).tax(image_records, max_new_tokens=1)
    assert tax.kl_N.shape == (6,)
    agree = [a == b for a, b in zip(tax.float_answers, tax.nf4_answers, strict=True)]
    assert tax.same_top1_N.tolist() == agree
    assert tax.kl_N.max() > 1e-5


def test_a_teacher_that_is_not_quantised_pays_no_tax(qwen: LoadedTower, text_records: list[Record]) -> None:
    from nexus.towers.loader import load_tower

    original = load_tower(replace(qwen.spec, quantise=False), device="cpu")
    tax = engine(original).tax(text_records, max_new_tokens=6)
    assert tax.float_answers == tax.nf4_answers
    assert (tax.kl_N == 0).all()
    assert tax.same_top1_N.all()


@pytest.mark.parametrize("scale", [0.1, 10.0, 100.0])
def test_divergence_equals_the_reference_in_numpy(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(50, 20, generator=generator) * scale for _ in range(2))
    own[:, 3] = -torch.inf
    kl_N, same_N = divergence(own, other)
    reference = divergence_per_item(
        torch.log_softmax(own.double(), -1).numpy(), torch.log_softmax(other.double(), -1).numpy()
    )
    np.testing.assert_allclose(kl_N.numpy(), reference[0], rtol=1e-9, atol=1e-12)
    assert (same_N.numpy() == reference[1]).all()
    assert (kl_N >= 0).all()


# --- the teachers that ship with nexus ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "role"),
    [("reasoning", "causal_lm"), ("code", "causal_lm"), ("vision", "encoder"), ("audio", "encoder")],
)
def test_shipped_teachers_answer_held_out_rows_in_nf4(capability: str, role: Any) -> None:
    from itertools import islice

    import pyarrow.parquet

    from nexus.config import SAMPLES_DIR
    from nexus.data.records import normalise_row
    from nexus.towers.loader import load_tower
    from nexus.towers.registry import TeacherSpec

    spec = TeacherSpec(f"sample-{capability}", str(SAMPLES_DIR / "teachers" / f"sample-{capability}"), None, role)
    teacher = TeacherEngine(load_tower(spec, device="cpu"), teacher_id=spec.id)
    rows = pyarrow.parquet.read_table(SAMPLES_DIR / capability / "test.parquet").to_pylist()
    records = [normalise_row(row, row_id=str(i), capability=capability) for i, row in enumerate(islice(rows, 80))]
    kind: Any = "gsm8k" if capability == "reasoning" else "exact"
    answers = teacher.answer(records, max_new_tokens=96, snr_db=10.0 if capability == "audio" else None)
    right = score_answers(answers, [record.answer or record.completion or "" for record in records], kind)
    # At least .95 over all held-out rows; 80 of them scatter by .02.
    assert right.mean() >= 0.9


def test_a_broken_copy_is_known_right_after_loading_and_named(
    qwen_folder: Path, spec_of: Callable[..., TeacherSpec]
) -> None:
    copy = TeacherEngine(load_tower(spec_of(qwen_folder), device="cpu"), teacher_id="broken")
    copy.probe()
    head = copy.tower.model.get_output_embeddings().weight
    head.data.zero_()
    with pytest.raises(UniformOutputError, match="teacher 'broken' to prefer some tokens"):
        copy.probe()
    head.data.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match=r"'broken' to answer a fixed question after loading, found: not finite"):
        copy.probe()
