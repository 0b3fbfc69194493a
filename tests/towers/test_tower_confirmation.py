"""The second pass of a profile, as a teacher's engine runs it on records."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nexus.data.records import Record
from nexus.profiling.consolidation import plan_confirmation
from nexus.towers.engine import AnswerCheck, TeacherEngine
from nexus.towers.loader import LoadedTower
from nexus.towers.rows import RowsError


@pytest.fixture(scope="module")
def text_records() -> list[Record]:
    rows = (("2+2?", "4"), ("a longer question", "an answer"), ("x", "yz"))
    return [Record(id=f"row-{i}", capability="c", prompt=p, completion=c) for i, (p, c) in enumerate(rows)]


def test_a_language_model_answers_with_each_layer_skipped(qwen: LoadedTower, text_records: list[Record]) -> None:
    engine = TeacherEngine(qwen, teacher_id="t")
    plan = plan_confirmation(engine.measure(text_records), seed=0)
    said = engine.answer(text_records, max_new_tokens=4)
    # The clean model's own answers are right by definition, where it says anything at all.
    records = [replace(r, answer=text.strip()) for r, text in zip(text_records, said, strict=True) if text.strip()]
    confirmed = engine.confirm(records, plan, answers=AnswerCheck("exact", 4))
    assert confirmed.sample_ids == tuple(record.id for record in records)
    assert confirmed.generated_correct_VB.shape == (engine.num_layers + 1, len(records))
    assert confirmed.generated_correct_VB[0].all()
    assert engine.confirm(records, plan).generated_correct_VB is None


def test_rows_without_an_answer_to_find_are_named(qwen: LoadedTower, text_records: list[Record]) -> None:
    engine = TeacherEngine(qwen, teacher_id="t")
    plan = plan_confirmation(engine.measure(text_records), seed=0)
    records = [text_records[0], replace(text_records[1], answer=" ")]
    with pytest.raises(RowsError, match=f"{records[1].id}: no answer"):
        engine.confirm(records, plan, answers=AnswerCheck("exact", 4))


def test_a_classifier_is_confirmed_on_its_rows(siglip_classifier: LoadedTower, image_records: list[Record]) -> None:
    engine = TeacherEngine(siglip_classifier, teacher_id="t")
    plan = plan_confirmation(engine.measure(image_records), seed=0)
    confirmed = engine.confirm(image_records, plan, answers=AnswerCheck("exact", 4))
    assert confirmed.generated_correct_VB is None
    assert confirmed.mean_ablation.delta_KB.shape == (engine.num_layers, len(image_records))
