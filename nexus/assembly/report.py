"""The report of a run: one self-contained HTML file, and the retention table for a terminal.

What was not measured is said to be not measured. Every number on the page comes from `ReportData`; nothing is loaded when the page
is opened, and its content security policy forbids that it ever could be.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image
from pydantic import ConfigDict

import nexus
from nexus.artifacts import (
    LayerEffect,
    LayerProfile,
    Metrics,
    NIWTProfile,
    Retention,
    RouterMetrics,
    StrictModel,
    read_artifact,
    write_bytes_atomically,
)
from nexus.assembly import charts
from nexus.assembly.evaluate import score_answers
from nexus.config import DataConfig, RunConfig, dump_config, load_config
from nexus.data.media import decode_audio, decode_image
from nexus.data.records import MediaKind
from nexus.errors import ArtifactError
from nexus.run import student_profile_path, without_undone
from nexus.training.facts import profiled_importance

TEMPLATE = "report.html.jinja"
TABLE_HEADER = (
    "capability",
    "teacher",
    "teacher score",
    "student score",
    "retention",
    "95 % interval",
    "contract",
    "labels only",
)
TRANSPORTS_HEADER = ("teacher", "targets", "transport", "bytes per token", "bytes per row", "aligned")
MAX_INCIDENTS = 12
"""Skipped steps and rollbacks that the report lists one by one; their marks on the curves are never left out."""
MAX_IMAGE_SIZE = 512
"""Pixels along the longer side; larger samples are reduced, so that the file stays one that can be mailed."""
AUDIO_SAMPLING_RATE = 16_000
MAX_AUDIO_SECONDS = 20
"""16-bit samples at 16 kHz are 32 kB a second."""
MARKED_EVENTS = {
    "rollback": "rolled back",
    "skip": "skipped",
    "spike": "loss spike",
    "restart": "restarted",
    "quarantine": "rows quarantined",
    "rebaseline": "baselines renewed",
}
"""Kinds of events.jsonl lines that are marked on the loss curves, and their words."""
DISTILLED = "distilled"
"""The student that events belong to when they name none; the labels-only student has no teachers to draw."""
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

Verdict = Literal["right", "wrong", "unjudged"]


class SampleRow(StrictModel):
    """One held-out row as the report shows it: what was asked and what each model answered."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    id: str
    capability: str
    prompt: str
    media: bytes | None = None
    """Encoded image or audio, as it stands in the row."""
    media_kind: MediaKind | None = None
    gold: str | None
    teacher: str | None
    student: str | None
    labels_only: str | None = None
    """Answers; None where the model was not asked."""


class Samples(StrictModel):
    """samples.json."""

    rows: tuple[SampleRow, ...]


@dataclass(frozen=True)
class ReportData:
    """All that a report shows."""

    config: RunConfig
    metrics: Metrics
    profiles: Sequence[NIWTProfile]
    events: Sequence[Mapping[str, object]]
    """Lines of events.jsonl, oldest first."""
    samples: Sequence[SampleRow]
    finished: datetime
    """When the metrics were written."""
    student_profiles: Mapping[str, NIWTProfile] = field(default_factory=dict)
    """Capability -> profile of the finished student; empty unless `nexus profile --bundle` measured it."""
    version: str = nexus.__version__


def load_report_data(run_dir: Path) -> ReportData:
    """Read a run directory.

    `config.resolved.yaml` and `metrics.json` have to be there; profiles, events and samples may be absent, and the report then says
    so. A last line of events.jsonl without its newline is the trace of a killed process and is left out.

    Raises:
        ArtifactError: naming the file that is missing or damaged, and the stage to run.
        ConfigError: when the resolved configuration no longer parses.
    """
    config_path, metrics_path, samples_path = (
        run_dir / name for name in ("config.resolved.yaml", "metrics.json", "samples.json")
    )
    if not config_path.is_file():
        raise ArtifactError(
            f"Expected a run directory with {config_path.name}, found none in {run_dir}. "
            "Name the folder that was given to --out, or start a run with `nexus pipeline`."
        )
    if not metrics_path.is_file():
        raise ArtifactError(
            f"Expected {metrics_path}, found no such file. Run `nexus evaluate` (or `nexus pipeline`, which continues)."
        )
    config = load_config(config_path)
    return ReportData(
        config=config,
        metrics=read_artifact(metrics_path, Metrics),
        profiles=tuple(read_artifact(path, NIWTProfile) for path in sorted((run_dir / "profile").glob("*.json"))),
        events=tuple(_read_events(run_dir / "events.jsonl")),
        samples=read_artifact(samples_path, Samples).rows if samples_path.is_file() else (),
        finished=datetime.fromtimestamp(metrics_path.stat().st_mtime, tz=timezone.utc),
        student_profiles={
            source.capability: read_artifact(path, NIWTProfile)
            for source in config.data
            if (path := student_profile_path(run_dir, source.capability)).is_file()
        },
    )


def write_report(data: ReportData, path: Path) -> None:
    """Write the report as one HTML file, atomically. Equal data give equal bytes.

    Raises:
        DataError: when a sample's media cannot be decoded.
        ArtifactError: when the disk refuses.
    """
    html = _template().render(
        data=data,
        metrics=data.metrics,
        summary=_summarise(data),
        retention=_retention_rows(data.metrics),
        axis=_retention_axis(data.metrics),
        training=_training(data),
        profiles=[_heat_row(profile, data.config) for profile in data.profiles],
        comparisons=list(_comparisons(data)),
        max_layers=max((profile.num_layers for profile in data.profiles), default=0),
        router=None if data.metrics.router is None else _confusion(data.metrics.router),
        stages=_stage_rows(data.metrics),
        samples=_sample_groups(data),
        config_yaml=dump_config(data.config),
        chart=charts,
    )
    write_bytes_atomically(path, html.encode())


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=_percent, duration=_duration, parameters=_parameters, number=_number, percent_or_dash=_percent_or_dash
    )
    return environment.get_template(TEMPLATE)


def render_table(metrics: Metrics) -> str:
    """The retention table as aligned plain text, ending with a newline."""
    rows = [TABLE_HEADER]
    for capability, row in metrics.retention.items():
        rows.append(
            (
                capability,
                row.teacher,
                _percent(row.teacher_score),
                _percent(row.student_score),
                _percent(row.retention),
                f"[{_percent(row.ci95[0])}, {_percent(row.ci95[1])}]",
                f"{_percent(row.contract)} {'holds' if row.holds else 'BROKEN'}",
                _percent_or_dash(row.labels_only_retention),
            )
        )
    return _aligned_text(rows, names=2)


def render_transports(metrics: Metrics) -> str:
    """What each teacher's targets took, as aligned plain text, ending with a newline; empty when nothing came from a teacher."""
    rows = [TRANSPORTS_HEADER]
    for teacher, moved in metrics.transports.items():
        rows.append(
            (
                teacher,
                moved.targets,
                ", ".join(moved.transports) or "-",
                "-" if moved.bytes_per_token is None else _number(moved.bytes_per_token),
                _number(moved.bytes_per_row),
                _percent_or_dash(metrics.aligned_share.get(teacher)),
            )
        )
    return _aligned_text(rows, names=3) if len(rows) > 1 else ""


def _aligned_text(rows: Sequence[Sequence[str]], *, names: int) -> str:
    """Rows in columns under a ruled header. Names (the first columns) read from the left, numbers are compared from the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


# --- what the page says -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Summary:
    """The head of the page."""

    verdict: str
    context: str
    num_holding: int
    mean: float | None
    weakest: tuple[str, float] | None
    without_teachers: float | None
    teacher_parameters: int
    seconds: float
    peak_memory_gib: float | None


@dataclass(frozen=True)
class _RetentionRow:
    """One capability; places along the bar are percentages of its axis."""

    capability: str
    row: Retention
    bar: float
    whisker: tuple[float, float]
    contract: float
    labels_only_bar: float | None
    labels_only_whisker: tuple[float, float] | None


@dataclass(frozen=True)
class _TeacherCurve:
    """One teacher's training; `curve` is None for a teacher whose loss never reached the student."""

    teacher: str
    curve: charts.Curve | None
    aligned: float | None
    """Share of the student's tokens in spans of text that the teacher's tokenizer cuts out too; None where none was compared."""


@dataclass(frozen=True)
class _Incident:
    """A step that was not made as drawn."""

    step: int
    kind: str
    words: str
    loss: str
    grad_norm: str
    restored_step: int | None


@dataclass(frozen=True)
class _Training:
    num_steps: int
    curves: tuple[_TeacherCurve, ...]
    counts: tuple[tuple[str, str, int], ...]
    """(kind, words, how often) of the marked events that occurred."""
    conflicts: _Conflicts | None
    """None where no surgery was made."""
    incidents: tuple[_Incident, ...]
    num_incidents: int
    weights: tuple[tuple[str, charts.Curve], ...]
    """(what, curve) of the schedules: learning rate, anchors, and the teachers that come in later."""


@dataclass(frozen=True)
class _ConflictCell:
    cosine: float
    """Mean over the surgeries in which both teachers took part."""
    share: float
    """Of those surgeries, that found it below 0."""
    heat: float
    """0..1, the share of the largest magnitude off the diagonal."""


@dataclass(frozen=True)
class _Conflicts:
    """How the teachers' gradients stood to each other; `rows` has None on the diagonal and for teachers that never met."""

    teachers: tuple[str, ...]
    rows: tuple[tuple[_ConflictCell | None, ...], ...]
    num_surgeries: int
    num_with_conflict: int
    num_stationary: int


@dataclass(frozen=True)
class _HeatCell:
    layer: LayerProfile
    heat: float
    """0..1, the share of the teacher's largest effect."""
    critical_weight: float | None


@dataclass(frozen=True)
class _CapabilityRow:
    """One capability of a teacher that has several."""

    capability: str
    cells: tuple[tuple[LayerEffect, float], ...]
    """Effects and their heat, the share of the teacher's largest effect on this capability."""


@dataclass(frozen=True)
class _HeatRow:
    profile: NIWTProfile
    covers: tuple[str, ...]
    """Capabilities whose rows it was measured on."""
    cells: tuple[_HeatCell, ...]
    capabilities: tuple[_CapabilityRow, ...]


@dataclass(frozen=True)
class _Comparison:
    """One teacher's layers beside the student's, on the rows of one capability."""

    capability: str
    teacher: NIWTProfile
    student: NIWTProfile
    chart: charts.DepthChart
    """The teacher's curve first."""


@dataclass(frozen=True)
class _Confusion:
    metrics: RouterMetrics
    labels: tuple[str, ...]
    decisions: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """counts[label][decision]."""


@dataclass(frozen=True)
class _StageRow:
    stage: str
    seconds: float
    seconds_bar: float
    peak_memory_gib: float
    memory_bar: float
    """Bars are percentages of the largest stage."""


@dataclass(frozen=True)
class _Answer:
    who: str
    text: str | None
    verdict: Verdict


@dataclass(frozen=True)
class _Sample:
    row: SampleRow
    answers: tuple[_Answer, ...]
    image: str | None
    """data: URI."""
    image_size: tuple[int, int] | None
    audio: str | None
    waveform: str | None
    seconds: float | None
    snr_db: float | None
    """Noise that the models heard on top of the recording."""


def _summarise(data: ReportData) -> _Summary:
    metrics, retention = data.metrics, data.metrics.retention
    weights = {capability: _importance(data, row.teacher) for capability, row in retention.items()}
    total = sum(weights.values())
    mean = sum(weights[name] * row.retention for name, row in retention.items()) / total if retention else None
    alone = [row.labels_only_retention for row in retention.values()]
    without = (
        sum(weight * value for weight, value in zip(weights.values(), alone, strict=True) if value is not None) / total
        if retention and None not in alone
        else None
    )
    weakest = min(((name, row.retention) for name, row in retention.items()), key=lambda pair: pair[1], default=None)
    verdict, context = _verdict(metrics, mean, without)
    return _Summary(
        verdict=verdict,
        context=context,
        num_holding=sum(row.holds for row in retention.values()),
        mean=mean,
        weakest=weakest,
        without_teachers=without,
        teacher_parameters=sum(metrics.teacher_parameters.values()),
        seconds=sum(stage.seconds for stage in metrics.stages.values()),
        peak_memory_gib=max((stage.peak_memory_gib for stage in metrics.stages.values()), default=None),
    )


def _verdict(metrics: Metrics, mean: float | None, without: float | None) -> tuple[str, str]:
    """The page's first sentence, and the one that says how its numbers were made."""
    student = f"The student ({_parameters(metrics.student_parameters)} parameters)"
    if mean is None:
        return f"{student} has not been measured.", "No capability was evaluated."
    count = len({row.teacher for row in metrics.retention.values()})
    teachers, them = ("teacher", "it") if count == 1 else (f"{_count_word(count)} teachers", "them")
    verdict = f"{student} keeps {100 * mean:.0f} % of what its {teachers} can do"
    context = "Measured on held-out rows, above chance, averaged over the capabilities by their teachers' importance. "
    if without is None:
        return f"{verdict}.", context + "A student trained on the labelled rows alone was not measured."
    return (
        f"{verdict}; without {them} it would keep {100 * without:.0f} %.",
        context
        + "\u201cWithout\u201d is the same student, trained as long on the same labelled rows and nothing else.",
    )


def _importance(data: ReportData, teacher: str) -> float:
    """A teacher's weight in the mean; one that the configuration does not name is a damaged run."""
    found = next((entry.importance for entry in data.config.teachers if entry.id == teacher), None)
    if found == "profile":
        profile = next((profile for profile in data.profiles if profile.teacher == teacher), None)
        if profile is None:
            raise ArtifactError(
                f"Expected the profile of {teacher!r}, whose importance it says, found none. Run `nexus profile` again."
            )
        return profiled_importance(profile)
    if found is not None:
        return found
    raise ArtifactError(
        f"Expected metrics of the run's own teachers ({', '.join(entry.id for entry in data.config.teachers)}), found {teacher!r}. "
        "metrics.json belongs to another configuration: run `nexus evaluate` again."
    )


def _retention_rows(metrics: Metrics) -> list[_RetentionRow]:
    """Bars on one axis for all capabilities, from 0 to at least 100 %."""
    end = _axis_end(metrics)

    def place(value: float) -> float:
        return round(100 * value / end, 2)

    return [
        _RetentionRow(
            capability=capability,
            row=row,
            bar=place(row.retention),
            whisker=(place(row.ci95[0]), place(row.ci95[1])),
            contract=place(row.contract),
            labels_only_bar=None if row.labels_only_retention is None else place(row.labels_only_retention),
            labels_only_whisker=(
                None
                if row.labels_only_ci95 is None
                else (place(row.labels_only_ci95[0]), place(row.labels_only_ci95[1]))
            ),
        )
        for capability, row in metrics.retention.items()
    ]


def _axis_end(metrics: Metrics) -> float:
    """100 %, or what a student reaches that is better than its teacher."""
    return max([1.0, *(max(row.retention, row.ci95[1]) for row in metrics.retention.values())])


def _retention_axis(metrics: Metrics) -> list[charts.Tick]:
    """Quarters up to 100 %, as percentages of the axis."""
    return [charts.Tick(round(25 * quarter / _axis_end(metrics), 2), f"{25 * quarter} %") for quarter in range(5)]


def _training(data: ReportData) -> _Training | None:
    """Loss curves of all configured teachers; None when no step was recorded."""
    points: dict[str, list[tuple[int, float]]] = {teacher.id: [] for teacher in data.config.teachers}
    marks: list[tuple[int, str, str]] = []
    last_step, seen = 0, set()
    surgeries: list[Mapping[str, object]] = []
    incidents: list[_Incident] = []
    weights: dict[str, list[tuple[int, float]]] = {}
    for event in without_undone(data.events):
        kind, step = event.get("kind"), event.get("step")
        if not isinstance(step, int) or event.get("student", DISTILLED) != DISTILLED:
            continue
        last_step = max(last_step, step)
        if kind == "step":
            seen.add(step)
            losses = event.get("losses")
            for teacher, loss in (losses if isinstance(losses, Mapping) else {}).items():
                if isinstance(loss, (int, float)):
                    points.setdefault(str(teacher), []).append((step, float(loss)))
            for name, weight in _weights_of(event):
                weights.setdefault(name, []).append((step, weight))
            found = event.get("surgery")
            if isinstance(found, Mapping):
                surgeries.append(found)
        elif kind in MARKED_EVENTS:
            marks.append((step, str(kind), f"step {step:,}: {MARKED_EVENTS[str(kind)]}"))
            if kind in ("skip", "rollback"):
                incidents.append(_incident(step, event))
    if not seen:
        return None
    counts = [(kind, words, sum(mark[1] == kind for mark in marks)) for kind, words in MARKED_EVENTS.items()]
    return _Training(
        num_steps=len(seen),
        curves=tuple(
            _TeacherCurve(
                teacher,
                charts.curve(points[teacher], marks, last_step),
                data.metrics.aligned_share.get(teacher),
            )
            for teacher in points
        ),
        counts=tuple(count for count in counts if count[2]),
        conflicts=_conflicts(surgeries),
        incidents=tuple(incidents[:MAX_INCIDENTS]),
        num_incidents=len(incidents),
        weights=tuple(
            (name, drawn)
            for name, series in weights.items()
            if (drawn := charts.curve(series, (), last_step)) is not None
        ),
    )


def _weights_of(event: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """What a step was weighted with, as `actors.trainer` writes it."""
    for key, name in (("lr", "Learning rate"), ("anchor_weight", "Weight of the feature anchors")):
        value = event.get(key)
        if isinstance(value, (int, float)):
            yield name, float(value)
    shares = event.get("shares")
    for teacher, share in (shares if isinstance(shares, Mapping) else {}).items():
        yield f"Weight of {teacher}, ramped", float(share)


def _incident(step: int, event: Mapping[str, object]) -> _Incident:
    def told(key: str) -> str:
        value = event.get(key)
        # What is not finite was written as text.
        return _number(value) if isinstance(value, (int, float)) else str(value or "-")

    restored = event.get("restored_step")
    kind = str(event["kind"])
    return _Incident(
        step,
        kind,
        MARKED_EVENTS[kind],
        told("total"),
        told("grad_norm"),
        restored if isinstance(restored, int) else None,
    )


def _conflicts(surgeries: Sequence[Mapping[str, object]]) -> _Conflicts | None:
    """The conflict matrix of a run's surgeries, as `actors.trainer` writes them into the events of their steps."""
    cosines: dict[tuple[str, str], list[float]] = {}
    teachers: set[str] = set()
    for surgery in surgeries:
        matrix = surgery.get("cosines")
        for one, row in (matrix if isinstance(matrix, Mapping) else {}).items():
            teachers.add(one)
            for other, cosine in row.items():
                if other != one:
                    cosines.setdefault((one, other), []).append(float(cosine))
    if not teachers:
        return None
    means = {pair: sum(values) / len(values) for pair, values in cosines.items()}
    largest = max((abs(mean) for mean in means.values()), default=0.0) or 1.0
    cells = {
        pair: _ConflictCell(
            mean, sum(c < 0.0 for c in cosines[pair]) / len(cosines[pair]), round(abs(mean) / largest, 3)
        )
        for pair, mean in means.items()
    }
    names = tuple(sorted(teachers))
    return _Conflicts(
        teachers=names,
        rows=tuple(tuple(cells.get((one, other)) for other in names) for one in names),
        num_surgeries=len(surgeries),
        num_with_conflict=sum(bool(surgery.get("conflicts")) for surgery in surgeries),
        num_stationary=sum(bool(surgery.get("pareto_stationary")) for surgery in surgeries),
    )


def _heat_row(profile: NIWTProfile, config: RunConfig) -> _HeatRow:
    heats = _heats(profile.layers)
    weights = {layer.layer: layer.weight for layer in profile.critical_layers}
    return _HeatRow(
        profile=profile,
        covers=next((teacher.capabilities for teacher in config.teachers if teacher.id == profile.teacher), ()),
        cells=tuple(
            _HeatCell(layer=layer, heat=heat, critical_weight=weights.get(layer.layer))
            for layer, heat in zip(profile.layers, heats, strict=True)
        ),
        capabilities=tuple(
            _CapabilityRow(capability, tuple(zip(effects, _heats(effects), strict=True)))
            for capability, effects in profile.capabilities.items()
        ),
    )


def _comparisons(data: ReportData) -> Iterator[_Comparison]:
    """The student beside every teacher of each capability that it was profiled on."""
    for capability, student in data.student_profiles.items():
        taught = {teacher.id for teacher in data.config.teachers_of(capability)}
        for teacher in data.profiles:
            if teacher.teacher in taught:
                layers = teacher.capabilities.get(capability, teacher.layers)
                models = (layers, student.layers)
                yield _Comparison(
                    capability=capability,
                    teacher=teacher,
                    student=student,
                    chart=charts.depth_chart([[(layer.delta_nll, *layer.ci95) for layer in model] for model in models]),
                )


def _heats(layers: Sequence[LayerProfile] | Sequence[LayerEffect]) -> list[float]:
    """Each layer's effect as a share of the largest, 0 where it does no harm."""
    largest = max((layer.delta_nll for layer in layers), default=0.0)
    return [round(max(layer.delta_nll, 0.0) / largest, 3) if largest > 0 else 0.0 for layer in layers]


def _confusion(router: RouterMetrics) -> _Confusion:
    labels = sorted(router.confusion)
    others = {decision for counts in router.confusion.values() for decision in counts} - set(labels)
    decisions = [*labels, *sorted(others)]
    return _Confusion(
        metrics=router,
        labels=tuple(labels),
        decisions=tuple(decisions),
        counts=tuple(tuple(router.confusion[label].get(decision, 0) for decision in decisions) for label in labels),
    )


def _stage_rows(metrics: Metrics) -> list[_StageRow]:
    longest = max((stage.seconds for stage in metrics.stages.values()), default=0.0) or 1.0
    largest = max((stage.peak_memory_gib for stage in metrics.stages.values()), default=0.0) or 1.0
    return [
        _StageRow(
            stage=name,
            seconds=stage.seconds,
            seconds_bar=round(100 * stage.seconds / longest, 2),
            peak_memory_gib=stage.peak_memory_gib,
            memory_bar=round(100 * stage.peak_memory_gib / largest, 2),
        )
        for name, stage in metrics.stages.items()
    ]


def _sample_groups(data: ReportData) -> dict[str, list[_Sample]]:
    """Samples by capability, in the order of the configuration, then any others."""
    groups: dict[str, list[_Sample]] = {source.capability: [] for source in data.config.data}
    sources = {source.capability: source for source in data.config.data}
    for row in data.samples:
        if row.capability not in groups:
            raise ArtifactError(
                f"Expected samples of the run's capabilities ({', '.join(groups)}), found {row.capability!r}. "
                "samples.json belongs to another configuration: run `nexus evaluate` again."
            )
        groups[row.capability].append(_sample(row, sources[row.capability]))
    return {capability: rows for capability, rows in groups.items() if rows}


def _sample(row: SampleRow, source: DataConfig) -> _Sample:
    def judged(who: str, text: str | None) -> _Answer:
        if text is None or row.gold is None:
            return _Answer(who, text, "unjudged")
        return _Answer(who, text, "right" if score_answers([text], [row.gold], source.answer)[0] else "wrong")

    image = decode_image(row.media) if row.media is not None and row.media_kind == "image" else None
    if image is not None:
        image.thumbnail((MAX_IMAGE_SIZE, MAX_IMAGE_SIZE))
    samples_S = (
        decode_audio(row.media, AUDIO_SAMPLING_RATE)[: MAX_AUDIO_SECONDS * AUDIO_SAMPLING_RATE]
        if row.media is not None and row.media_kind == "audio"
        else None
    )
    return _Sample(
        row=row,
        answers=(
            judged("Teacher", row.teacher),
            judged("Student", row.student),
            judged("Labels only", row.labels_only),
        ),
        image=None if image is None else _data_uri("image/png", _png(image)),
        image_size=None if image is None else image.size,
        audio=None if samples_S is None else _data_uri("audio/wav", _wav(samples_S)),
        waveform=None if samples_S is None else charts.waveform_path(samples_S),
        seconds=None if samples_S is None else samples_S.size / AUDIO_SAMPLING_RATE,
        snr_db=source.snr_db if row.media_kind == "audio" else None,
    )


# --- formats ------------------------------------------------------------------------------------------------------------------


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _wav(samples_S: np.ndarray) -> bytes:
    """WAV plays in every browser; OGG/Opus does not."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples_S, AUDIO_SAMPLING_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _percent_or_dash(value: float | None) -> str:
    return "-" if value is None else _percent(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _parameters(count: int) -> str:
    """`512 k`, `0.52 M`, `8.2 B`: the largest unit of which there is at least a tenth, two figures."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= 0.1 * size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
    return f"{count / 1e3:.0f} k"


def _number(value: float) -> str:
    """Three figures, thousands grouped, no exponent for what people count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _count_word(count: int) -> str:
    return NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else str(count)


def _read_events(path: Path) -> Iterator[Mapping[str, object]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return
            try:
                event = json.loads(line)
            except json.JSONDecodeError as error:
                event = error
            if not isinstance(event, dict):
                raise ArtifactError(
                    f"Expected one JSON object per line in {path}, found {line[:40].strip()!r} on line {number}. Remove that line."
                )
            yield event
