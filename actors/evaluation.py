"""Held-out evaluation, export and the run's metrics: what the later stages do with teachers' and students' actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.session import Session
from nexus.artifacts import (
    TRANSPORTS_FILE,
    Metrics,
    QuantisationTax,
    Retention,
    RouterMetrics,
    StageMetrics,
    StageRecord,
    StrictModel,
    TransportsFile,
    read_artifact,
    write_artifact,
)
from nexus.assembly.evaluate import build_retention, quantisation_tax, router_metrics, score_answers
from nexus.assembly.report import SampleRow, Samples
from nexus.config import DataConfig, resolve_path
from nexus.data.collate import length_check
from nexus.data.loader import iter_records
from nexus.data.media import usable
from nexus.data.quarantine import Quarantine
from nexus.data.records import Record
from nexus.errors import DataError
from nexus.run import STAGES
from nexus.towers.rows import RowsError

if TYPE_CHECKING:
    from nexus.assembly.bundle import Answer
    from nexus.towers.tax import TaxMeasurement

EVALUATION_FILE = "evaluation.json"
SAMPLES_FILE = "samples.json"
METRICS_FILE = "metrics.json"
TEACHER_BATCH = 128


class Evaluation(StrictModel):
    """evaluation.json: what the evaluate stage measured; metrics.json adds the stages' cost."""

    retention: dict[str, Retention]
    quantisation_tax: dict[str, QuantisationTax]
    router: RouterMetrics | None
    student_parameters: int
    teacher_parameters: dict[str, int]
    throughput: dict[str, float]


def evaluate_run(session: Session) -> tuple[list[Path], dict[str, Retention]]:
    """Teachers (NF4 and float), the distilled student behind its router, and the labels-only student on the same rows."""
    config = session.config
    labels_only = config.distill.labels_only
    student = session.student
    retention: dict[str, Retention] = {}
    taxes: dict[str, QuantisationTax] = {}
    samples: list[SampleRow] = []
    labels: list[tuple[str, ...]] = []
    decisions: list[tuple[str, ...]] = []
    sources: list[str] = []
    rows_of: dict[str, list[Record]] = {source.capability: _test_rows(session, source) for source in config.data}
    for capability, rows in rows_of.items():
        _ask_teachers(session, capability, rows)
    answers: dict[str, dict[str, tuple[Answer, ...]]] = {}
    for source in config.data:
        rows = rows_of[source.capability]
        answers[source.capability] = {
            name: session.wait_for(
                student.answer.remote(
                    name,
                    tuple(rows),
                    max_new_tokens=source.max_new_tokens,
                    snr_db=source.snr_db,
                    towers=None if name == "distilled" else source.towers,
                    batch_size=config.evaluate.batch_size,
                    teachers=session.teacher_facts,
                )
            )
            for name in ("distilled", *(("labels_only",) if labels_only else ()))
        }
        session.reporter.progress("evaluate", len(answers), len(config.data), source.capability)
    measured = _measured(session, rows_of, answers)
    for source in config.data:
        rows = rows_of[source.capability]
        gold = [row.answer or "" for row in rows]
        teacher_id, correct = _best_teacher(session, source, gold, measured, taxes)
        said = answers[source.capability]
        student_correct = score_answers([answer.text for answer in said["distilled"]], gold, source.answer)
        baseline = (
            score_answers([answer.text for answer in said["labels_only"]], gold, source.answer) if labels_only else None
        )
        retention[source.capability] = build_retention(
            teacher=teacher_id,
            teacher_scores=correct,
            student_scores=student_correct,
            labels_only_scores=baseline,
            chance=source.chance,
            contract=source.contract,
            bootstrap=config.evaluate.bootstrap,
            seed=config.seed,
        )
        labels += [source.towers] * len(rows)
        decisions += [answer.towers for answer in said["distilled"]]
        sources += [answer.source for answer in said["distilled"]]
        samples += _samples(session, source, rows, measured[(teacher_id, source.capability)], said)
    route = read_artifact(session.run.path / "stages" / "route.json", StageRecord)
    distilled = read_artifact(session.run.path / "stages" / "distill.json", StageRecord).summary
    evaluation = Evaluation(
        retention=retention,
        quantisation_tax=taxes,
        router=router_metrics(
            labels, decisions, sources, threshold=float(route.summary["threshold"]), network_source="model"
        ),
        student_parameters=int(distilled["student_parameters"]),
        teacher_parameters={teacher: report.num_params for teacher, report in session.load_reports.items()},
        throughput={
            "distill_rows_per_second": float(distilled["rows_per_second"]),
            "distill_wait_share": float(distilled["wait_share"]),
        },
    )
    path, samples_path = session.run.path / EVALUATION_FILE, session.run.path / SAMPLES_FILE
    write_artifact(path, evaluation)
    write_artifact(samples_path, Samples(rows=tuple(samples)))
    return [path, samples_path], retention


def export_run(session: Session) -> tuple[list[Path], dict[str, Any]]:
    """The bundle, from the evaluated student."""
    from transformers import AutoTokenizer

    from actors.student import STUDENT_DIR
    from nexus.assembly.bundle import export_bundle
    from nexus.student.memory import NexusStudent

    folder = session.run.path / STUDENT_DIR
    bundle = session.run.path / "bundle"
    manifest = export_bundle(
        NexusStudent.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        session.config,
        build_metrics(session),
        bundle,
    )
    return sorted(path for path in bundle.iterdir() if path.is_file()), {"parameters": manifest.parameters["total"]}


def build_metrics(session: Session) -> Metrics:
    """The evaluation with the cost of every stage that is complete."""
    evaluation = read_artifact(session.run.path / EVALUATION_FILE, Evaluation)
    stages = {}
    for stage in STAGES:
        path = session.run.path / "stages" / f"{stage}.json"
        if path.is_file():
            record = read_artifact(path, StageRecord)
            stages[stage] = StageMetrics(seconds=record.seconds, peak_memory_gib=record.peak_memory_gib)
    return Metrics(
        retention=evaluation.retention,
        quantisation_tax=evaluation.quantisation_tax,
        throughput=evaluation.throughput,
        stages=stages,
        router=evaluation.router,
        transports=read_artifact(session.run.path / TRANSPORTS_FILE, TransportsFile).teachers,
        student_parameters=evaluation.student_parameters,
        teacher_parameters=evaluation.teacher_parameters,
        teacher_tokens={
            teacher.id: session.events.taught_tokens("distilled").get(teacher.id, 0)
            for teacher in session.config.teachers
        },
        aligned_share=session.events.aligned_shares("distilled"),
        seed=session.config.seed,
    )


def write_metrics(session: Session) -> Path:
    """Write metrics.json; derived from complete stages, so it is written anew after each."""
    path = session.run.path / METRICS_FILE
    write_artifact(path, build_metrics(session))
    return path


def _test_rows(session: Session, source: DataConfig) -> list[Record]:
    quarantine = Quarantine(session.run.path / "quarantine", session.config.quarantine.max_bad_share)
    records = iter_records(
        [resolve_path(text) for text in source.test], capability=source.capability, quarantine=quarantine
    )
    fits = _student_check(session, source)
    rows = list(islice(usable(records, quarantine, fits), session.config.evaluate.max_rows))
    unanswered = next((row.id for row in rows if not row.answer), None)
    if unanswered is not None:
        raise DataError(
            f"Expected an answer in every held-out row of {source.capability!r}, found none in {unanswered}. "
            f"Add the answers or choose another file under data.{source.capability}.test."
        )
    return rows


def _student_check(session: Session, source: DataConfig) -> Callable[[Record], None]:
    """Whether the student has room for a row's prompt and an answer."""
    from transformers import AutoTokenizer

    from nexus.student.shipped import student_positions
    from nexus.training.setup import TOKENIZER_DIR

    tokenizer = AutoTokenizer.from_pretrained(session.run.path / TOKENIZER_DIR)
    check = length_check(tokenizer, student_positions(session.config) - source.max_new_tokens)

    def check_prompt(record: Record) -> None:
        check(replace(record, completion=None))

    return check_prompt


def _measured(
    session: Session,
    rows_of: dict[str, list[Record]],
    answers: dict[str, dict[str, tuple[Answer, ...]]],
) -> dict[tuple[str, str], TaxMeasurement]:
    """What each teacher says to the rows of its capabilities, which it has been asked for.

    Rows that a teacher cannot take leave `rows_of` and `answers`, for the quarantine; the others are asked for again.
    """
    quarantine = Quarantine(session.run.path / "quarantine", session.config.quarantine.max_bad_share)
    measured: dict[tuple[str, str], TaxMeasurement] = {}
    waiting = list(rows_of)
    while waiting:
        rejected: dict[str, dict[str, str]] = {}
        for capability in waiting:
            for teacher in session.answering_teachers(capability):
                try:
                    measured[(teacher.id, capability)] = session.pool.collect(("tax", teacher.id, capability))
                except RowsError as error:
                    reasons = {row_id: f"{error.what} Found {found}." for row_id, found in error.reasons.items()}
                    rejected.setdefault(capability, {}).update(reasons)
        for capability, reasons in rejected.items():
            rows = rows_of[capability]
            kept = [index for index, row in enumerate(rows) if row.id not in reasons]
            for row in rows:
                if row.id in reasons:
                    quarantine.add_record(row, reasons[row.id])
            if not kept:
                raise DataError(
                    f"Expected held-out rows of {capability!r} that its teachers can take, found none of {len(rows)}: "
                    f"{next(iter(reasons.values()))} Choose another file under data.{capability}.test."
                )
            rows_of[capability] = [rows[index] for index in kept]
            answers[capability] = {
                name: tuple(said[index] for index in kept) for name, said in answers[capability].items()
            }
            _ask_teachers(session, capability, rows_of[capability])
        waiting = list(rejected)
    return measured


def _ask_teachers(session: Session, capability: str, rows: Sequence[Record]) -> None:
    source = session.config.data_of(capability)
    for teacher in session.answering_teachers(capability):
        key = ("tax", teacher.id, capability)
        session.pool.submit(key, teacher.id, "tax", tuple(rows), source.max_new_tokens, source.snr_db)


def _best_teacher(
    session: Session,
    source: DataConfig,
    gold: Sequence[str],
    measured: dict[tuple[str, str], TaxMeasurement],
    taxes: dict[str, QuantisationTax],
) -> tuple[str, Any]:
    """The capability's teacher with the highest NF4 score, and its right answers; adds every teacher's tax to `taxes`."""
    best: tuple[str, Any] | None = None
    for teacher in session.answering_teachers(source.capability):
        tax = measured[(teacher.id, source.capability)]
        report = session.load_reports[teacher.id]
        nf4_correct = score_answers(tax.nf4_answers, gold, source.answer)
        name = teacher.id if len(teacher.capabilities) == 1 else f"{teacher.id}/{source.capability}"
        # Without an original to compare with, as of a GPTQ checkpoint, there is no tax to tell.
        if len(tax.kl_N):
            taxes[name] = quantisation_tax(
                float_correct=score_answers(tax.float_answers, gold, source.answer),
                nf4_correct=nf4_correct,
                kl_N=tax.kl_N,
                same_top1_N=tax.same_top1_N,
                quantised_share=report.quantised_share,
                max_weight_error=report.max_weight_error,
            )
        if best is None or nf4_correct.mean() > best[1].mean():
            best = (teacher.id, nf4_correct)
    assert best is not None, "a capability without a teacher that answers is refused before training"
    return best


def _samples(
    session: Session,
    source: DataConfig,
    rows: Sequence[Record],
    tax: TaxMeasurement,
    said: dict[str, tuple[Answer, ...]],
) -> list[SampleRow]:
    """The first rows side by side; chosen before any answer is known."""
    from nexus.data.media import read_media

    return [
        SampleRow(
            id=row.id,
            capability=source.capability,
            prompt=row.prompt,
            media=None if row.media is None else read_media(row.media),
            media_kind=None if row.media is None else row.media.kind,
            gold=row.completion or row.answer,
            teacher=tax.nf4_answers[index],
            student=said["distilled"][index].text,
            labels_only=said["labels_only"][index].text if "labels_only" in said else None,
        )
        for index, row in enumerate(rows[: session.config.evaluate.num_samples])
    ]


def remote_student(session: Session) -> Any:
    """The student's actor, on this node."""
    from actors.student import StudentActor

    options = session.actor_options("student")
    return ray.remote(StudentActor).options(**options).remote(session.config, str(session.run.path), str(Path.cwd()))
