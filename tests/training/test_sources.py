"""Sources of the loop: teachers in threads, and cached targets: the losses of live ones, some teachers cached and others live,
mismatches refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest_training import CAPABILITIES, facts, image_rows, label_targets, text_rows, token_targets

from nexus.config import SAMPLES_DIR
from nexus.data.targets import ScoreWriter
from nexus.errors import ArtifactError, ConfigError, TowerLoadError
from nexus.student.memory import NexusStudent
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import load_tower
from nexus.towers.packing import pack_targets, unpack_targets
from nexus.towers.registry import TeacherSpec
from nexus.towers.rows import RowsError
from nexus.towers.targets import FullTargets, ScoreRequest, TeacherHead
from nexus.training.batches import Assignment
from nexus.training.facts import TokenTransport
from nexus.training.objective import DistillationObjective, align_with_teachers
from nexus.training.requests import is_asked, score_request, settings_of
from nexus.training.sources import SCORES_DIR, CachedSource, EngineSource, MixedSource, MovedBytes

SAME, LABELS = facts("same"), facts("labels")
CASES = {
    "same": (SAME, text_rows(4), Assignment("same", "math")),
    "labels": (LABELS, image_rows(4), Assignment("labels", "sight")),
}


@pytest.fixture
def objective(spec, tokenizer) -> DistillationObjective:
    torch.manual_seed(0)
    spec = align_with_teachers(spec, [SAME, LABELS], {"same": ("reasoning",), "labels": ("vision",)})
    return DistillationObjective(
        NexusStudent(spec),
        tokenizer,
        teachers=[SAME, LABELS],
        capabilities=CAPABILITIES,
        temperature=2.0,
        top_k=8,
        response_weight=1.0,
        max_length=64,
    )


def _live(name: str, tokenizer):
    """What travels from a live teacher."""
    teacher, rows, _ = CASES[name]
    targets = token_targets(teacher, rows, tokenizer) if name == "same" else label_targets(teacher, rows)
    return pack_targets(targets, vocabulary_size=None if targets.tokens is None else len(tokenizer))


@pytest.fixture
def folder(tmp_path, objective, tokenizer):
    for name, (teacher, rows, assignment) in CASES.items():
        settings = settings_of(objective.request(assignment, rows), teacher)
        writer = ScoreWriter(
            tmp_path / name / SCORES_DIR, capability=assignment.capability, settings=settings, rows_per_file=3
        )
        writer.write(_live(name, tokenizer))
        writer.finish()
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_cached_targets_give_the_losses_of_live_ones(folder, objective, tokenizer, name):
    teacher, rows, assignment = CASES[name]
    source = CachedSource(folder, {name: teacher})
    # The rows of a step come in another order and number than they were written.
    for chosen in (rows, rows[::-1], rows[1:2]):
        source.submit("key", name, objective.request(assignment, chosen))
        cached = source.collect("key")
        losses = [objective.teacher_loss(assignment, chosen, cached)]
        if chosen is rows:
            losses.append(objective.teacher_loss(assignment, chosen, unpack_targets(_live(name, tokenizer))))
            # The standardisers have seen the targets twice now; the divergence keeps no state.
            assert float(losses[0].kd.detach()) == float(losses[1].kd.detach())
            assert unpack_targets(_live(name, tokenizer)).hidden.keys() == cached.hidden.keys()
    moved = source.moved[name].metrics("cached")
    assert (moved.targets, moved.rows) == ("cached", 9)
    if name == "same":
        assert moved.transports == ("topk",)
        assert moved.bytes_per_token > 8 * 2


def test_a_request_of_other_settings_is_refused_by_name(folder, objective):
    teacher, rows, assignment = CASES["same"]
    source = CachedSource(folder, {"same": teacher})
    request = objective.request(assignment, rows)
    for changes, words in (
        ({"temperature": 1.0}, "temperature 1.0, found 2.0"),
        ({"top_k": 4}, "width 4, found 8"),
        ({"layers": (0,)}, "layers"),
    ):
        with pytest.raises(ArtifactError, match=words):
            source.submit("key", "same", replace(request, **changes))
    changed = CachedSource(folder, {"same": replace(teacher, fingerprint="new")})
    with pytest.raises(ArtifactError, match="the teacher changed since"):
        changed.submit("key", "same", request)


def test_what_was_asked_can_be_forgotten(folder, objective):
    teacher, rows, assignment = CASES["same"]
    source = CachedSource(folder, {"same": teacher})
    source.submit("key", "same", objective.request(assignment, rows))
    source.forget()
    with pytest.raises(KeyError):
        source.collect("key")
    with pytest.raises(ConfigError, match="cached targets of 'same'"):
        source.head("same")


@pytest.fixture(scope="module")
def engine() -> TeacherEngine:
    spec = TeacherSpec("sample", str(SAMPLES_DIR / "teachers" / "sample-reasoning"), None, "causal_lm")
    return TeacherEngine(load_tower(spec, device="cpu"), teacher_id="sample")


def _request(completion: str) -> ScoreRequest:
    return ScoreRequest(
        ("a", "b"), ("What is 1 + 1?",) * 2, (completion, "no"), None, 1.0, 8, (), None, transport="full"
    )


def test_a_teacher_in_a_thread_answers_bit_for_bit_as_when_it_is_asked(engine):
    source = EngineSource({"sample": engine})
    requests = {number: _request("yes " * (number + 1)) for number in range(4)}
    for number, request in requests.items():
        source.submit(number, "sample", request)
    # In any order, while the next ones are still being made.
    for number in (2, 0, 1, 3):
        found, expected = source.collect(number).tokens, engine.score(requests[number]).tokens
        assert isinstance(found, FullTargets)
        assert isinstance(expected, FullTargets)
        assert np.array_equal(found.logprobs_NV, expected.logprobs_NV)
        assert np.array_equal(found.token_ids_N, expected.token_ids_N)
    assert source.head("sample") is engine.output_head()
    source.close()


def test_a_thread_drops_what_is_forgotten_and_goes_on_after_an_error(engine):
    source = EngineSource({"sample": engine})
    for number in range(8):
        source.submit(number, "sample", _request("yes"))
    source.forget()
    with pytest.raises(KeyError):
        source.collect(0)
    source.submit("long", "sample", _request("yes " * 5000))
    source.submit("good", "sample", _request("yes"))
    with pytest.raises(RowsError, match="a: "):
        source.collect("long")
    assert source.collect("good").row_ids == ("a", "b")
    with pytest.raises(ConfigError, match="'sample' of this process, found media"):
        source.submit("seen", "sample", replace(_request("yes"), media=(b"", b"")))
    source.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        source.submit("late", "sample", _request("yes"))


class _Live:
    """A teacher that answers from memory."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def submit(self, key, teacher, request):
        self.asked.append(key)

    def collect(self, key):
        self.asked.remove(key)
        return self.answer

    def head(self, teacher):
        return TeacherHead(torch.zeros(2, 2).numpy(), None, None)

    def forget(self):
        self.asked.clear()


def test_a_run_may_mix_live_and_cached_teachers(folder, objective, tokenizer):
    live = _Live(unpack_targets(_live("labels", tokenizer)))
    mixed = MixedSource(live, CachedSource(folder, {"same": SAME}), {"same"})
    for name, (_, rows, assignment) in CASES.items():
        mixed.submit(name, name, objective.request(assignment, rows))
    assert live.asked == ["labels"]
    assert mixed.collect("labels") is live.answer
    assert mixed.collect("same") == unpack_targets(_live("same", tokenizer)).__class__(
        **{**vars(unpack_targets(_live("same", tokenizer))), "tokenizer_hash": None}
    )
    assert mixed.head("labels").softcap is None
    with pytest.raises(ConfigError):
        mixed.head("same")
    mixed.submit("again", "labels", objective.request(CASES["labels"][2], CASES["labels"][1]))
    mixed.forget()
    assert not live.asked


def test_hidden_states_and_auto_cannot_be_cached():
    _, rows, _ = CASES["same"]
    for kind in ("hidden", "auto"):
        request = score_request(
            SAME,
            rows,
            temperature=1.0,
            by_span=False,
            top_k=4,
            transport=TokenTransport(kind, max_error=0.1),
            capability=CAPABILITIES[0],
        )
        with pytest.raises(ConfigError, match=f"found {kind}"):
            settings_of(request, SAME)


def test_settings_name_the_number_that_a_transport_has():
    for transport, width in (
        (TokenTransport("topk"), 4),
        (TokenTransport("sampled", draws=7), 7),
        (TokenTransport("full"), None),
    ):
        request = score_request(
            SAME, text_rows(), temperature=1.0, by_span=False, top_k=4, transport=transport, capability=CAPABILITIES[0]
        )
        found = settings_of(request, SAME)
        assert (found.transport, found.width, request.capability) == (transport.kind, width, "math")


def test_only_a_teacher_whose_answers_say_everything_is_not_asked():
    assert not is_asked(facts("other", critical_layers=()), by_span=False)
    assert is_asked(facts("other", critical_layers=()), by_span=True)
    assert is_asked(facts("other"), by_span=False)
    assert is_asked(facts("same", critical_layers=()), by_span=False)
    assert is_asked(facts("labels", critical_layers=()), by_span=False)


def test_spans_are_compared_at_temperature_1():
    for by_span, temperature in ((False, 2.0), (True, 1.0)):
        request = score_request(
            facts("other"),
            text_rows(),
            temperature=2.0,
            by_span=by_span,
            top_k=4,
            transport=None,
            capability=CAPABILITIES[0],
        )
        assert request.temperature == temperature


def test_a_language_model_needs_completions():
    row = replace(text_rows(1)[0], completion=None)
    with pytest.raises(TowerLoadError, match="Extract the teacher's answers first"):
        score_request(SAME, [row], temperature=1.0, by_span=False, top_k=4, transport=None, capability=CAPABILITIES[0])


def test_nothing_moved_is_no_bytes_per_token():
    metrics = MovedBytes().metrics("live")
    assert (metrics.rows, metrics.bytes_per_token, metrics.transports) == (0, None, ())
