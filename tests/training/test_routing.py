"""Fitting the router: on rows of its own for each purpose, on a student that stays as it is."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest_training import text_rows
from PIL import Image

from nexus.config import TOWERS, RouterConfig
from nexus.data.collate import collate
from nexus.data.records import Media, Record
from nexus.student.memory import NexusStudent
from nexus.training import routing
from nexus.training.routing import train_router

NEEDED = {"math": ("reasoning",), "prose": (), "sight": ("vision",), "sound": ("audio",)}
SETTINGS = RouterConfig(steps=150, batch_size=32, learning_rate=3e-2, max_risk=0.5)


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), value % 256, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def _rows(count: int = 40) -> list[Record]:
    """Prompts that differ between capabilities; the media are not read, only their presence counts."""
    rows = []
    for n in range(count):
        rows += [
            Record(id=f"m{n}", capability="math", prompt=f"How many are {n} and {n + 3} altogether?"),
            Record(id=f"p{n}", capability="prose", prompt=f"def f{n}(x):"),
            Record(id=f"i{n}", capability="sight", prompt="Which digits?", media=Media("image", _png(n))),
            Record(id=f"s{n}", capability="sound", prompt="Which word was spoken?", media=Media("audio", b"RIFF")),
        ]
    return rows


def _student(spec, seed=0) -> NexusStudent:
    torch.manual_seed(seed)
    return NexusStudent(replace(spec, router=replace(spec.router, hidden_size=32))).eval()


def _fit(student, tokenizer, rows=None, *, seed=0, settings=SETTINGS):
    return train_router(student, tokenizer, rows or _rows(), NEEDED, settings, max_length=64, seed=seed)


def _decide(student, tokenizer, rows):
    batch = collate([replace(row, completion=None) for row in rows], tokenizer, max_length=64)
    available = torch.tensor(
        [
            [
                True,
                row.media is not None and row.media.kind != "audio",
                row.media is not None and row.media.kind == "audio",
            ]
            for row in rows
        ]
    )
    embedding = student.embed(batch.input_ids_BT, batch.attention_mask_BT.bool())
    return student.router.route(embedding, [row.prompt for row in rows], available)


def test_a_fitted_router_turns_on_the_towers_that_rows_need_and_no_other(spec, tokenizer):
    student = _student(spec)
    fit = _fit(student, tokenizer)
    assert fit.num_rows == 160
    assert fit.threshold.threshold is not None
    assert student.router.threshold == fit.threshold.threshold
    assert 0 <= fit.loss < 0.1
    new = [row for row in _rows(50) if int(row.id[1:]) >= 40]
    decision = _decide(student, tokenizer, new)
    wanted = torch.tensor([[tower in NEEDED[row.capability] for tower in TOWERS] for row in new])
    assert torch.equal(decision.mask_BN, wanted)
    assert not student.router.training


def test_only_the_router_changes(spec, tokenizer):
    student = _student(spec)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    _fit(student, tokenizer, settings=SETTINGS.model_copy(update={"steps": 2}))
    after = student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("router.") for name in changed)


def test_equal_seeds_fit_equal_routers_and_the_seed_matters(spec, tokenizer):
    def weights(seed):
        student = _student(spec)
        _fit(student, tokenizer, seed=seed, settings=SETTINGS.model_copy(update={"steps": 3}))
        return torch.cat([tensor.flatten().float() for tensor in student.router.state_dict().values()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_threshold_is_chosen_on_rows_that_nothing_was_fitted_to(spec, tokenizer):
    """A fifth of the rows bounds the risk, so its count is what the fit reports."""
    student = _student(spec)
    fit = _fit(student, tokenizer, _rows(10), settings=SETTINGS.model_copy(update={"steps": 2}))
    assert fit.num_rows == 40
    assert fit.threshold.num_rows == 8


def test_labels_without_pattern_leave_the_router_without_a_threshold(spec, tokenizer):
    """Equal prompts with unequal needs cannot be told apart: no threshold bounds the risk, and the heads decide nothing."""
    rows = [
        Record(id=f"{n}{capability}", capability=capability, prompt="The same words")
        for n in range(40)
        for capability in ("math", "prose")
    ]
    student = _student(spec)
    fit = _fit(student, tokenizer, rows, settings=RouterConfig(steps=20, max_risk=0.05))
    assert fit.threshold.threshold is None
    assert student.router.threshold is None
    assert set(_decide(student, tokenizer, rows[:4]).source) == {"trunk"}


def test_completions_and_media_are_not_part_of_the_embedding(spec, tokenizer, monkeypatch):
    student = _student(spec)
    bare = [replace(row, completion=None, answer=None) for row in text_rows(5)]
    with_more = [replace(row, media=Media("image", _png(1))) for row in text_rows(5)]
    expected = routing._embed(student, tokenizer, bare, 64)
    torch.testing.assert_close(routing._embed(student, tokenizer, with_more, 64), expected, rtol=0, atol=0)
    # Nor do the rows that happen to be embedded together matter.
    monkeypatch.setattr(routing, "EMBED_ROWS", 2)
    torch.testing.assert_close(routing._embed(student, tokenizer, bare, 64), expected)
    assert expected.shape == (5, spec.core.hidden_size)
    assert not expected.requires_grad


@pytest.mark.parametrize(("kind", "tower"), [("image", "vision"), ("video", "vision"), ("audio", "audio")])
def test_every_kind_of_media_has_its_tower(kind, tower):
    assert routing._tower_of_media(Record(id="r", capability="c", prompt="p", media=Media(kind, b"x"))) == tower
