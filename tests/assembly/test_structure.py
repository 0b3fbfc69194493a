"""The student's own profile: each block of its trunk skipped, what the towers read of the prompt kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nexus.artifacts import LayerEffect, NIWTProfile, write_artifact
from nexus.assembly.bundle import BundleStudent
from nexus.assembly.charts import HEIGHT, LEFT, RIGHT, WIDTH, depth_chart
from nexus.assembly.report import ReportData, load_report_data, write_report
from nexus.assembly.structure import profile_student, student_batches
from nexus.config import TOWERS, DataConfig, dump_config
from nexus.data.collate import collate
from nexus.data.quarantine import Quarantine, read_quarantine
from nexus.data.records import Media, Record, Source
from nexus.errors import DataError
from nexus.run import student_profile_path
from nexus.student.inputs import record_media


def records(media: bytes | None, count: int) -> list[Record]:
    return [
        Record(
            id=f"r{number}",
            capability="sums",
            prompt=f"what is the sum of {number} and {number + 1}",
            completion=f"{2 * number + 1}",
            media=None if media is None else Media("image", media),
            source=Source("rows.jsonl", number + 1),
        )
        for number in range(count)
    ]


def source(*towers: str) -> DataConfig:
    document = {"capability": "sums", "pool": ("x",), "test": ("x",), "max_new_tokens": 4, "batch_size": 1}
    return DataConfig.model_validate({**document, "towers": towers})


@pytest.fixture(scope="module")
def bundle_student(student, tokenizer) -> BundleStudent:
    return BundleStudent(student, tokenizer, max_length=128)


def profile(student: BundleStudent, rows: list[Record], given: DataConfig, **changes: object) -> NIWTProfile:
    values = {"quarantine": Quarantine(None, 1.0), "max_samples": 6, "batch_size": 2, "confirm_samples": 0, "seed": 0}
    return profile_student(student, rows, given, revision="r", **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("towers", [(), ("reasoning",), ("vision",)])
def test_a_layers_effect_is_that_of_the_trunk_without_it_under_the_same_context(
    bundle_student, tokenizer, report_data, towers
):
    image = next(row.media for row in report_data.samples if row.media_kind == "image")
    rows = records(image if "vision" in towers else None, 3)
    found = profile(bundle_student, rows, source(*towers))
    whole, core = bundle_student.student, bundle_student.student.core
    scored = 0
    summed = torch.zeros(len(core.layers) + 1, dtype=torch.float64)
    for row in rows:
        batch = collate([row], tokenizer, max_length=128)
        context, mask = whole.encode_context(
            batch.input_ids_BT,
            batch.attention_mask_BT,
            record_media([row], whole.spec, snr_db=[None]),
            torch.tensor([[tower in towers for tower in TOWERS]]),
            prompt_mask_BT=batch.attention_mask_BT.bool() & ~batch.loss_mask_BT,
        )
        targets = batch.input_ids_BT[0, 1:][batch.loss_mask_BT[0, 1:]]
        scored += len(targets)
        for variant in range(len(core.layers) + 1):
            skip = None if variant == 0 else core.layers[variant - 1].register_forward_hook(lambda _, args, __: args[0])
            with torch.no_grad():
                logits = core(
                    batch.input_ids_BT, batch.attention_mask_BT, context_BCD=context, context_mask_BC=mask
                ).logits
            if skip is not None:
                skip.remove()
            kept = logits[0, :-1][batch.loss_mask_BT[0, 1:]].double()
            summed[variant] += F.cross_entropy(kept, targets, reduction="sum")
    expected = (summed[1:] - summed[0]) / scored
    assert [layer.delta_nll for layer in found.layers] == pytest.approx(expected.tolist(), abs=1e-4)
    assert found.strategy == "brute"
    assert (found.teacher, found.revision, found.num_samples) == ("student", "r", 3)


def test_rows_come_in_batches_with_the_context_of_their_prompts(bundle_student):
    rows = records(None, 3)
    first, second = student_batches(bundle_student, rows, source("reasoning"), 2)
    assert (list(first.sample_ids), list(second.sample_ids)) == (["r0", "r1"], ["r2"])
    assert first.inputs is not None
    assert len(first.inputs["context_BCD"]) == 2
    (plain,) = student_batches(bundle_student, rows, source(), 8)
    assert plain.inputs is None
    # Another answer to the same question leaves the context as it is.
    other = [dataclasses.replace(row, completion="9") for row in rows[:2]]
    (changed,) = student_batches(bundle_student, other, source("reasoning"), 2)
    assert changed.inputs is not None
    assert torch.allclose(changed.inputs["context_BCD"], first.inputs["context_BCD"], atol=1e-5)


def test_rows_that_the_student_cannot_take_are_quarantined_and_too_few_are_an_error(bundle_student, tmp_path):
    rows = records(None, 4)
    rows[1] = dataclasses.replace(rows[1], completion=None)
    rows[2] = dataclasses.replace(rows[2], prompt="how many " * 200)
    quarantine = Quarantine(tmp_path, 1.0)
    assert profile(bundle_student, rows, source(), quarantine=quarantine).num_samples == 2
    reasons = {row.row: row.reason for row in read_quarantine(tmp_path)}
    assert reasons.keys() == {2, 3}
    assert "expected an answer to score, found none" in reasons[2]
    with pytest.raises(DataError, match=r"found none that it can take \(row 2: expected an answer"):
        profile(bundle_student, rows[1:3], source())


def test_models_of_any_depth_share_one_axis_and_effects_are_shares_of_the_largest():
    chart = depth_chart([[(4.0, 3.0, 5.0), (2.0, 2.0, 2.0)], [(0.0, 0.0, 0.0)] * 3])
    deep, flat = chart.curves
    width = WIDTH - LEFT - RIGHT
    assert [x for x, _ in deep.points] == pytest.approx([LEFT + width / 4, LEFT + 3 * width / 4], abs=0.1)
    assert [x for x, _ in flat.points] == pytest.approx([LEFT + width * n / 6 for n in (1, 3, 5)], abs=0.1)
    height_of = {tick.text: tick.position for tick in chart.y_ticks}
    assert deep.points[0][1] == height_of["100 %"]
    assert deep.points[1][1] == height_of["50 %"]
    assert {y for _, y in flat.points} == {height_of["0 %"]}
    _, top, bottom = deep.whiskers[0]
    assert top < deep.points[0][1] < bottom <= HEIGHT
    assert bottom - deep.points[0][1] == pytest.approx(deep.points[0][1] - top, abs=0.2)
    assert [tick.text for tick in chart.x_ticks] == ["0", "0.25", "0.5", "0.75", "1"]


def test_the_report_lays_teacher_and_student_side_by_side_where_the_student_was_profiled(
    report_data: ReportData, tmp_path: Path
):
    write_report(report_data, tmp_path / "without.html")
    assert "Where the student keeps it" not in (tmp_path / "without.html").read_text()
    teacher = report_data.profiles[0]
    capability = next(entry for entry in report_data.config.teachers if entry.id == teacher.teacher).capabilities[0]
    own = teacher.model_copy(update={"teacher": "student", "num_samples": 7})
    alone = (LayerEffect(layer=0, delta_nll=2.0, ci95=(1.0, 3.0)), LayerEffect(layer=1, delta_nll=1.0, ci95=(0.0, 2.0)))
    others = tuple(report_data.profiles[1:])
    for profiles in ((teacher, *others), (teacher.model_copy(update={"capabilities": {capability: alone}}), *others)):
        data = dataclasses.replace(report_data, profiles=profiles, student_profiles={capability: own})
        write_report(data, tmp_path / "with.html")
        section = (tmp_path / "with.html").read_text().split('id="structure"')[1].split("</section>")[0]
        assert f"Layers of {teacher.teacher} and of the student on {capability}" in section
        drawn = [part.count("<circle") for part in section.split('<g class="model ')[1:]]
        assert drawn == [len(alone) if profiles[0].capabilities else teacher.num_layers, own.num_layers]
        assert "7 rows" in section


def test_a_run_directory_gives_the_report_its_students_profiles(report_data: ReportData, tmp_path: Path):
    (tmp_path / "config.resolved.yaml").write_text(dump_config(report_data.config))
    write_artifact(tmp_path / "metrics.json", report_data.metrics)
    capability = report_data.config.data[1].capability
    own = report_data.profiles[0].model_copy(update={"teacher": "student"})
    write_artifact(student_profile_path(tmp_path, capability), own)
    assert load_report_data(tmp_path).student_profiles == {capability: own}
