"""The report is one file that loads nothing, says what the metrics say, and says so when something was not measured."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from nexus.artifacts import Metrics, NIWTProfile, TransportMetrics, write_artifact
from nexus.assembly.report import (
    MAX_AUDIO_SECONDS,
    MAX_IMAGE_SIZE,
    TABLE_HEADER,
    TRANSPORTS_HEADER,
    ReportData,
    SampleRow,
    Samples,
    load_report_data,
    render_table,
    render_transports,
    write_report,
)
from nexus.config import dump_config, parse_config
from nexus.data.records import MediaKind
from nexus.errors import ArtifactError, DataError

DASH, TIMES = "\u2013", "\u00d7"
VOID = {"meta", "img", "line", "circle", "path", "link", "br", "input"}
LOADING = {"src", "href", "action", "data", "poster", "srcset", "xlink:href", "formaction", "background"}
NOT_MEASURED = (
    "no capability was evaluated",
    "events.jsonl holds no optimizer step",
    "no teacher was profiled",
    "no router was evaluated",
    "no stage was timed",
    "no teacher was compared",
    "no sample was kept",
)


class Page(HTMLParser):
    """Elements, attributes and visible text of a report; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.by_class: dict[str, list[str]] = {}
        self._classes: list[set[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
            self._classes.append(set((dict(attrs).get("class") or "").split()))
            for name in self._classes[-1]:
                self.by_class.setdefault(name, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        self._classes.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.texts.append(data)
        for classes in self._classes:
            for name in classes:
                self.by_class[name][-1] += f" {data}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of_class(self, name: str) -> list[str]:
        return [" ".join(text.split()) for text in self.by_class.get(name, [])]


def page_of(data: ReportData, folder: Path) -> Page:
    write_report(data, folder / "report.html")
    return Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def page(report_data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(report_data, tmp_path_factory.mktemp("report"))


@pytest.fixture
def bare(report_data: ReportData) -> ReportData:
    """A run of which nothing optional was measured."""
    metrics = report_data.metrics.model_copy(
        update={
            "retention": {},
            "quantisation_tax": {},
            "throughput": {},
            "stages": {},
            "router": None,
            "teacher_parameters": {},
        }
    )
    return dataclasses.replace(report_data, metrics=metrics, profiles=(), events=(), samples=())


def with_retention(data: ReportData, **changes: object) -> ReportData:
    """The same run with every retention row changed."""
    retention = {name: row.model_copy(update=changes) for name, row in data.metrics.retention.items()}
    return dataclasses.replace(data, metrics=data.metrics.model_copy(update={"retention": retention}))


def with_transports(data: ReportData) -> ReportData:
    """The same run, two of whose teachers sent targets."""
    moved = {
        "gemma3-code": TransportMetrics(
            transports=("topk",), targets="live", rows=20, tokens=1500, bytes_per_token=262.4, bytes_per_row=48_211.5
        ),
        "siglip-digits": TransportMetrics(
            transports=(), targets="cached", rows=20, tokens=0, bytes_per_token=None, bytes_per_row=512.0
        ),
    }
    update = {"transports": moved, "aligned_share": {"gemma3-code": 0.625}}
    return dataclasses.replace(data, metrics=data.metrics.model_copy(update=update))


def media_row(kind: MediaKind, media: bytes) -> SampleRow:
    """A row of which only the media matter."""
    capability = "audio" if kind == "audio" else "vision"
    return SampleRow(
        id="x", capability=capability, prompt="?", media=media, media_kind=kind, gold=None, teacher=None, student=None
    )


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# --- one file ---------------------------------------------------------------------------------------------------------------


def test_the_report_loads_nothing_from_anywhere(page: Page, report_data: ReportData, tmp_path: Path) -> None:
    write_report(report_data, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert re.search(r"https?://|//[a-z]+\.|url\(|@import", html) is None
    assert all(value.startswith("data:") for _, name, value in page.attributes if name in LOADING)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    policy = next(
        value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value and name == "content"
    )
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


def test_nothing_but_the_report_is_left_in_its_folder(report_data: ReportData, tmp_path: Path) -> None:
    write_report(report_data, tmp_path / "deep" / "report.html")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_equal_data_give_equal_bytes(report_data: ReportData, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(report_data, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_it_is_made_for_light_and_dark_and_for_narrow_screens(
    page: Page, report_data: ReportData, tmp_path: Path
) -> None:
    write_report(report_data, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in html
    assert "max-width: 720px" in html
    assert ("meta", "content", "light dark") in page.attributes
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes


def test_what_a_row_says_cannot_become_markup(report_data: ReportData, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&<img src=x>"
    row = SampleRow(id="x", capability="code", prompt=hostile, gold=hostile, teacher=hostile, student=hostile)
    shown = page_of(dataclasses.replace(report_data, samples=(row,)), tmp_path)
    assert "script" not in shown.tags
    assert "img" not in shown.tags
    assert shown.of_class("prompt") == [hostile]


# --- the head ---------------------------------------------------------------------------------------------------------------


def test_the_head_names_the_run_its_date_its_configuration_and_its_seed(page: Page, report_data: ReportData) -> None:
    for fact in ("quickstart", "2025-03-14 09:26 UTC", report_data.config.fingerprint(), "Seed 0", report_data.version):
        assert fact in page.text


def test_the_verdict_is_the_mean_over_the_capabilities(page: Page, report_data: ReportData) -> None:
    rows = report_data.metrics.retention.values()
    kept = sum(row.retention for row in rows) / 4
    alone = sum(row.labels_only_retention or 0.0 for row in rows) / 4
    assert (
        f"The student (0.52 M parameters) keeps {100 * kept:.0f} % of what its four teachers can do; "
        f"without them it would keep {100 * alone:.0f} %."
    ) in page.text.replace("\u00a0", " ")


def test_the_verdict_weighs_teachers_by_their_importance(report_data: ReportData, tmp_path: Path) -> None:
    document = report_data.config.model_dump(mode="json")
    document["distill"]["surgery"].pop("every")
    document["teachers"][1]["importance"] = 5.0
    shown = page_of(dataclasses.replace(report_data, config=parse_config(document, source="test")), tmp_path)
    kept = [row.retention for row in report_data.metrics.retention.values()]
    expected = (kept[0] + 5 * kept[1] + kept[2] + kept[3]) / 8
    assert f"keeps {100 * expected:.0f} % of" in shown.text.replace("\u00a0", " ")


def test_the_verdict_takes_an_importance_from_the_profile_where_the_run_did(
    report_data: ReportData, tmp_path: Path
) -> None:
    document = report_data.config.model_dump(mode="json")
    document["distill"]["surgery"].pop("every")
    document["teachers"][1]["importance"] = "profile"
    data = dataclasses.replace(report_data, config=parse_config(document, source="test"))
    weak = [
        profile.model_copy(update={"baseline": profile.baseline.model_copy(update={"nll": 3.0})})
        for profile in report_data.profiles
    ]
    shown = page_of(dataclasses.replace(data, profiles=weak), tmp_path)
    kept = [row.retention for row in report_data.metrics.retention.values()]
    weight = math.exp(-3.0)
    expected = (kept[0] + weight * kept[1] + kept[2] + kept[3]) / (3.0 + weight)
    assert f"keeps {100 * expected:.0f} % of" in shown.text.replace("\u00a0", " ")
    with pytest.raises(ArtifactError, match="Run `nexus profile` again"):
        page_of(dataclasses.replace(data, profiles=()), tmp_path)


def test_without_a_labels_only_student_the_verdict_makes_no_claim_about_it(
    report_data: ReportData, tmp_path: Path
) -> None:
    absent = with_retention(report_data, labels_only_score=None, labels_only_retention=None, labels_only_ci95=None)
    shown = page_of(absent, tmp_path)
    assert "without them" not in shown.text
    assert "was not measured" in shown.text
    assert shown.text.count("kept by labels only not measured") == 4
    assert not shown.of_class("alone")


def test_one_teacher_is_written_in_the_singular(report_data: ReportData, tmp_path: Path) -> None:
    metrics = report_data.metrics
    one = metrics.model_copy(update={"retention": {"code": metrics.retention["code"]}})
    shown = page_of(dataclasses.replace(report_data, metrics=one), tmp_path)
    assert "of what its teacher can do; without it it would keep" in shown.text.replace("\u00a0", " ")


def test_more_than_twelve_teachers_are_counted_in_figures(report_data: ReportData, tmp_path: Path) -> None:
    document = report_data.config.model_dump(mode="json")
    document["distill"]["surgery"].pop("every")
    document["teachers"] += [{**document["teachers"][1], "id": f"extra{index}"} for index in range(13)]
    row = report_data.metrics.retention["code"]
    many = {f"skill{index}": row.model_copy(update={"teacher": f"extra{index}"}) for index in range(13)}
    data = dataclasses.replace(
        report_data,
        config=parse_config(document, source="test"),
        metrics=report_data.metrics.model_copy(update={"retention": many}),
    )
    assert "its 13 teachers can do" in page_of(data, tmp_path).text


def test_the_cards_count_contracts_and_name_the_weakest_capability(page: Page, report_data: ReportData) -> None:
    cards = page.of_class("card")
    rows = report_data.metrics.retention
    assert cards[0] == "Contracts 3 of 4 hold"
    assert cards[1] == f"Weakest capability {percent(rows['code'].retention)} code"
    assert cards[2] == "Size 0.52 M parameters, 30 % of the teachers' 1.8 M"
    assert cards[3] == "Cost 5 min 14 s 2.54 GiB at most, all processes"


def test_all_contracts_held_is_said_so(report_data: ReportData, tmp_path: Path) -> None:
    shown = page_of(with_retention(report_data, holds=True), tmp_path)
    assert shown.of_class("card")[0] == "Contracts 4 of 4 all hold"
    assert "✗ broken" not in shown.text


# --- retention --------------------------------------------------------------------------------------------------------------


def test_the_retention_table_says_what_the_metrics_say(page: Page, report_data: ReportData) -> None:
    shown = page.of_class("capability")
    assert len(shown) == 5  # four capabilities and the scale below them
    for text, (capability, row) in zip(shown, report_data.metrics.retention.items(), strict=False):
        assert row.labels_only_retention is not None
        assert text == (
            f"{capability} {row.teacher} {row.num_rows} rows, chance {percent(row.chance)} contract {percent(row.contract)} "
            f"{percent(row.retention)} {'✓ holds' if row.holds else '✗ broken'} "
            f"95 % interval {percent(row.ci95[0])} {DASH} {percent(row.ci95[1])} student score {percent(row.student_score)} "
            f"teacher score {percent(row.teacher_score)} kept by labels only {percent(row.labels_only_retention)}"
        )


def widths_of(page: Page) -> list[float]:
    """Widths of all bars, percent, in reading order."""
    styles = [value for tag, name, value in page.attributes if tag == "i" and name == "style"]
    return [float(found.group(1)) for style in styles if (found := re.fullmatch(r"width:([\d.]+)%", style))]


def test_bars_are_as_long_as_what_they_stand_for(page: Page, report_data: ReportData) -> None:
    expected = []
    for row in report_data.metrics.retention.values():
        assert row.labels_only_retention is not None
        expected += [100 * row.retention, 100 * row.labels_only_retention]
    assert widths_of(page)[:8] == pytest.approx(expected, abs=0.01)
    whiskers = [value for tag, _, value in page.attributes if tag == "b" and value.startswith("left:")]
    assert whiskers[0] == "left:99.0%;width:1.0%"
    assert "left:90.0%" in [value for tag, name, value in page.attributes if tag == "div" and name == "style"]


def test_a_student_better_than_its_teacher_shortens_the_scale_and_not_its_bar(
    report_data: ReportData, tmp_path: Path
) -> None:
    shown = page_of(with_retention(report_data, retention=1.25, ci95=(1.1, 1.6)), tmp_path)
    assert widths_of(shown)[0] == pytest.approx(100 * 1.25 / 1.6, abs=0.01)
    assert all(width <= 100 for width in widths_of(shown))
    assert [value for tag, name, value in shown.attributes if tag == "span" and name == "style"][-1] == "left:62.5%"


def test_the_terminal_table_says_what_the_metrics_say(report_data: ReportData) -> None:
    lines = render_table(report_data.metrics).splitlines()
    assert re.split(r"\s{2,}", lines[0]) == list(TABLE_HEADER)
    assert set(lines[1]) == {"-", " "}
    for line, (capability, row) in zip(lines[2:], report_data.metrics.retention.items(), strict=True):
        assert row.labels_only_retention is not None
        assert re.split(r"\s{2,}", line) == [
            capability,
            row.teacher,
            percent(row.teacher_score),
            percent(row.student_score),
            percent(row.retention),
            f"[{percent(row.ci95[0])}, {percent(row.ci95[1])}]",
            f"{percent(row.contract)} {'holds' if row.holds else 'BROKEN'}",
            percent(row.labels_only_retention),
        ]


def test_the_terminal_table_is_aligned(report_data: ReportData) -> None:
    table = render_table(report_data.metrics)
    assert table.endswith("\n")
    assert len({len(line) for line in table.splitlines()}) == 1


def test_the_terminal_table_has_a_dash_where_nothing_was_measured(report_data: ReportData) -> None:
    table = render_table(with_retention(report_data, labels_only_retention=None).metrics)
    assert all(line.endswith("  -") for line in table.splitlines()[2:])


# --- training ---------------------------------------------------------------------------------------------------------------


def test_every_teacher_has_a_curve_with_the_events_marked(page: Page) -> None:
    labels = [value for tag, name, value in page.attributes if name == "aria-label" and value.startswith("Loss of")]
    assert [label.split(",")[0] for label in labels] == [
        "Loss of qwen3-math",
        "Loss of gemma3-code",
        "Loss of siglip-digits",
        "Loss of whisper-digits",
    ]
    for kind in ("rollback", "skip", "restart"):
        assert len([1 for tag, name, value in page.attributes if tag == "g" and value == f"mark {kind}"]) == 4
    assert page.text.count("step 420: rolled back") == 4
    assert f"800 steps rolled back 1{TIMES} skipped 1{TIMES} restarted 1{TIMES}" in page.text


def test_a_starved_teacher_is_shown_as_starved(report_data: ReportData, tmp_path: Path) -> None:
    events = [{**event, "losses": {"qwen3-math": 1.0}} for event in report_data.events if event["kind"] == "step"]
    shown = page_of(dataclasses.replace(report_data, events=events), tmp_path)
    assert shown.text.count("no row reached this teacher; it is starved") == 3
    assert "no step was skipped or rolled back" in shown.text


def test_each_teachers_share_of_the_tokens_is_shown(report_data: ReportData, tmp_path: Path) -> None:
    tokens = {"qwen3-math": 75, "gemma3-code": 25, "hungry": 0}
    metrics = report_data.metrics.model_copy(update={"teacher_tokens": tokens})
    text = page_of(dataclasses.replace(report_data, metrics=metrics), tmp_path).text
    assert "qwen3-math 75.0 %" in text
    assert "gemma3-code 25.0 %" in text
    assert "hungry starved" in text


def test_events_that_are_no_numbers_change_no_curve(report_data: ReportData, tmp_path: Path) -> None:
    odd = [
        {"time": 1.0, "kind": "stage", "stage": "distill"},
        {"kind": "step", "step": 3, "losses": None},
        {"kind": "step", "step": 4, "losses": {"qwen3-math": None}},
        {"kind": "unknown", "step": 5},
    ]
    first, second = tmp_path / "a.html", tmp_path / "b.html"
    write_report(dataclasses.replace(report_data, events=[*odd, *report_data.events]), first)
    write_report(report_data, second)
    assert first.read_bytes() == second.read_bytes()


def test_the_labels_only_students_events_are_not_mixed_in(report_data: ReportData, tmp_path: Path) -> None:
    own = [{**event, "student": "distilled"} for event in report_data.events]
    other = [
        {"kind": "step", "student": "labels_only", "step": 5, "losses": {"qwen3-math": 99.0}},
        {"kind": "rollback", "student": "labels_only", "step": 2000},
    ]
    write_report(dataclasses.replace(report_data, events=[*own, *other]), tmp_path / "a.html")
    write_report(report_data, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def _operated(teachers: dict[str, dict[str, float]], *, conflicts: int, stationary: bool = False) -> dict[str, object]:
    surgery = {"cosines": teachers, "factors": {}, "conflicts": conflicts, "pareto_stationary": stationary}
    return {"kind": "step", "step": 3, "losses": {}, "surgery": surgery}


def test_the_conflict_matrix_shows_the_mean_cosine_and_how_often_two_teachers_disagreed(
    report_data: ReportData, tmp_path: Path
) -> None:
    pair = {
        "gemma3-code": {"gemma3-code": 1.0, "qwen3-math": -0.3},
        "qwen3-math": {"gemma3-code": -0.3, "qwen3-math": 1.0},
    }
    agreed = {
        "gemma3-code": {"gemma3-code": 1.0, "qwen3-math": 0.1},
        "qwen3-math": {"gemma3-code": 0.1, "qwen3-math": 1.0},
    }
    alone = {"siglip-digits": {"siglip-digits": 1.0}}
    events = [
        *report_data.events,
        _operated(pair, conflicts=1, stationary=True),
        _operated(agreed, conflicts=0),
        _operated(alone, conflicts=0),
    ]
    shown = page_of(dataclasses.replace(report_data, events=events), tmp_path)
    assert "mean of 3 surgeries" in shown.text
    assert "1 surgeries found a conflict, 1 found that the teachers cancel" in shown.text
    assert shown.text.count("-0.100 against in 50 %") == 2
    assert shown.of_class("against") == ["-0.100 against in 50 %"] * 2
    assert (
        shown.text.count("·") - page_of(report_data, tmp_path).text.count("·") == 7
    )  # the diagonal, and who never met


def test_the_aligned_share_of_a_teacher_of_another_tokenizer_stands_over_its_curve(
    report_data: ReportData, tmp_path: Path, page: Page
) -> None:
    shown = page_of(with_transports(report_data), tmp_path)
    assert shown.text.count("another tokenizer; 62.5 % of the student's tokens are in spans that both cut out") == 1
    assert "another tokenizer" not in page.text


def test_skipped_steps_and_rollbacks_are_listed_with_what_they_were_refused_for(
    report_data: ReportData, tmp_path: Path
) -> None:
    refused = [
        {"kind": "skip", "step": 30, "total": 41.25, "grad_norm": 9.5, "restored_step": None},
        {"kind": "rollback", "step": 1234, "total": "nan", "grad_norm": "inf", "restored_step": 1200},
        {"kind": "restart", "step": 40},
    ]
    events = [event for event in report_data.events if event["kind"] == "step"]
    shown = page_of(dataclasses.replace(report_data, events=[*events, *refused]), tmp_path)
    (table,) = shown.of_class("incidents")
    assert table.endswith("30 skipped 41.2 9.5 30 1,234 rolled back nan inf 1,200")
    many = [{**refused[0], "step": step} for step in range(40)]
    shown = page_of(dataclasses.replace(report_data, events=[*events, *many]), tmp_path)
    assert "The first 12 of 40" in shown.text
    assert shown.of_class("incidents")[0].count("skipped") == 12
    calm = page_of(dataclasses.replace(report_data, events=events), tmp_path)
    assert calm.of_class("incidents") == []
    assert "What was survived" not in calm.text


def test_the_schedules_are_drawn_as_they_were_used(report_data: ReportData, tmp_path: Path, page: Page) -> None:
    steps = [
        {
            "kind": "step",
            "step": step,
            "losses": {},
            "lr": 0.5 - 0.1 * step,
            "anchor_weight": 50.0 - 7.0 * step,
            "shares": {"gemma3-code": step / 4},
        }
        for step in range(5)
    ]
    shown = page_of(dataclasses.replace(report_data, events=steps), tmp_path)
    for drawn in (
        "Learning rate 0.5 \N{RIGHTWARDS ARROW} 0.1",
        "Weight of the feature anchors 50 \N{RIGHTWARDS ARROW} 22",
        "Weight of gemma3-code, ramped 0 \N{RIGHTWARDS ARROW} 1",
    ):
        assert drawn in shown.text
    assert "How it was weighted" not in page.text


def test_without_surgery_there_is_no_conflict_matrix(page: Page, report_data: ReportData, tmp_path: Path) -> None:
    assert "disagree" not in page.text
    odd = {"kind": "step", "step": 3, "losses": {}, "surgery": {"cosines": None}}
    shown = page_of(dataclasses.replace(report_data, events=[*report_data.events, odd]), tmp_path)
    assert "disagree" not in shown.text


# --- layers, router, cost, tax ----------------------------------------------------------------------------------------------


def test_every_layer_shows_its_effect_and_interval_and_critical_ones_are_outlined(
    page: Page, report_data: ReportData
) -> None:
    cells = [text for text in page.of_class("cell") if DASH in text]
    layers = [layer for profile in report_data.profiles for layer in profile.layers]
    assert cells == [f"{layer.delta_nll:.3g} {layer.ci95[0]:.3g} {DASH} {layer.ci95[1]:.3g}" for layer in layers]
    assert len(page.of_class("critical")) == sum(len(profile.critical_layers) for profile in report_data.profiles)
    titles = [
        " ".join(value.split()) for tag, name, value in page.attributes if name == "title" and value.startswith("layer")
    ]
    assert titles[0] == "layer 0: 3.12, 95 % interval 2.86 to 3.41, accuracy drop 78.0 %, critical with weight 0.603"
    assert "accuracy drop" not in titles[-1]
    assert "no layer is significant: nothing is anchored" in page.text


def test_the_darkest_cell_of_each_teacher_is_its_largest_effect(page: Page, report_data: ReportData) -> None:
    heats = [
        float(value.split(":")[1])
        for tag, name, value in page.attributes
        if name == "style" and value.startswith("--heat")
    ]
    start = 0
    for profile in report_data.profiles:
        row = heats[start : start + profile.num_layers]
        effects = [layer.delta_nll for layer in profile.layers]
        assert row[effects.index(max(effects))] == 1.0
        assert all(0.0 <= heat <= 1.0 for heat in row)
        start += profile.num_layers


def test_a_teacher_that_no_layer_hurts_has_no_heat(report_data: ReportData, tmp_path: Path) -> None:
    profile = report_data.profiles[3]
    harmless = profile.model_copy(
        update={
            "layers": tuple(layer.model_copy(update={"delta_nll": -0.01}) for layer in profile.layers),
            "partial": True,
        }
    )
    shown = page_of(dataclasses.replace(report_data, profiles=(harmless,)), tmp_path)
    heats = [value for tag, name, value in shown.attributes if name == "style" and value.startswith("--heat")]
    assert heats[:2] == ["--heat:0.0"] * 2
    assert "256 samples, partial" in shown.text


def test_the_confusion_counts_every_row_and_marks_the_diagonal(page: Page) -> None:
    rows = page.text.split("threshold 0.81")[1].split("What it cost")[0]
    assert rows.startswith(" needs audio reasoning trunk vision audio+vision audio 497 99.4 % 0 0.0 %")
    assert len(page.of_class("hit")) == 4
    assert "accuracy 98.5 %" in page.text
    assert "decided by the network 96.4 %" in page.text


def test_stages_show_seconds_and_memory_and_their_sums(page: Page, report_data: ReportData) -> None:
    shown = page.of_class("stage")
    assert shown[0] == "stage time peak memory"
    assert shown[1].startswith("profile 21.4 s 2.0")
    assert shown[-1] == "all stages 5 min 14 s 2.54 GiB"
    assert [text.split()[0] for text in shown[1:-1]] == list(report_data.metrics.stages)
    assert "student tokens per second 41,233" in page.text


def test_a_run_of_hours_is_told_in_hours(report_data: ReportData, tmp_path: Path) -> None:
    stages = {name: stage.model_copy(update={"seconds": 3725.0}) for name, stage in report_data.metrics.stages.items()}
    data = dataclasses.replace(report_data, metrics=report_data.metrics.model_copy(update={"stages": stages}))
    assert "profile 1 h 2 min" in page_of(data, tmp_path).text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (9_000, "9 k"),
        (99_999, "100 k"),
        (580_419, "0.58 M"),
        (12_345_678, "12 M"),
        (8_200_000_000, "8.2 B"),
        (70_000_000_000, "70 B"),
    ],
)
def test_parameters_are_told_in_their_unit(count: int, text: str, report_data: ReportData, tmp_path: Path) -> None:
    metrics = report_data.metrics.model_copy(update={"student_parameters": count})
    shown = page_of(dataclasses.replace(report_data, metrics=metrics), tmp_path)
    assert f"The student ({text} parameters)" in shown.text.replace("\u00a0", " ")


def test_what_every_teacher_sent_is_shown_in_the_report_and_in_the_terminal(
    report_data: ReportData, tmp_path: Path, page: Page
) -> None:
    data = with_transports(report_data)
    (table,) = page_of(data, tmp_path).of_class("transports")
    assert "gemma3-code live topk 1,500 262 48,212 62.5 %" in table
    assert "siglip-digits cached - - - 512 -" in table
    assert page.of_class("transports") == []
    header, rule, *rows = render_transports(data.metrics).splitlines()
    assert [re.split(r"\s{2,}", row) for row in rows] == [
        ["gemma3-code", "live", "topk", "262", "48,212", "62.5 %"],
        ["siglip-digits", "cached", "-", "-", "512", "-"],
    ]
    assert re.split(r"\s{2,}", header) == list(TRANSPORTS_HEADER)
    assert set(rule) == {"-", " "}
    assert render_transports(report_data.metrics) == ""


def test_the_tax_of_every_teacher_is_shown(page: Page) -> None:
    assert "qwen3-math 98.0 % 97.4 % -0.6 pt 0.0031 nats 99.1 % 87.0 % 0.093" in page.text


# --- samples ----------------------------------------------------------------------------------------------------------------


def test_samples_show_the_question_all_answers_and_who_was_right(page: Page) -> None:
    shown = page.of_class("sample")
    assert len(shown) == 8
    assert (
        shown[3]
        == "print(sorted([4, 1, 3])[::-1]) Teacher [4, 3, 1] ✓ Student [4, 1, 3] ✗ Labels only [1, 4] ✗ Gold [4, 3, 1]"
    )
    assert shown[5].endswith("Teacher 7 ✗ Student 9 ✓ Labels only 11 ✗ Gold 9")
    assert shown[7].endswith("Student seven ✓ Labels only not asked · Gold seven")


def test_numbers_are_judged_as_the_capability_says(report_data: ReportData, tmp_path: Path) -> None:
    row = SampleRow(id="x", capability="reasoning", prompt="?", gold="1+1=2\n#### 2", teacher="#### 2.0", student="2")
    shown = page_of(dataclasses.replace(report_data, samples=(row,)), tmp_path)
    assert "Teacher #### 2.0 ✓ Student 2 ✗" in shown.of_class("sample")[0]


def test_without_gold_nobody_is_judged(report_data: ReportData, tmp_path: Path) -> None:
    row = SampleRow(id="x", capability="code", prompt="?", gold=None, teacher="a", student="b")
    shown = page_of(dataclasses.replace(report_data, samples=(row,)), tmp_path)
    assert shown.of_class("sample")[0] == "? Teacher a · Student b · Labels only not asked · Gold unknown"


def test_the_image_that_is_shown_has_the_pixels_that_were_asked_about(page: Page, report_data: ReportData) -> None:
    source = next(value for tag, name, value in page.attributes if tag == "img" and name == "src")
    shown = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
    asked = next(row.media for row in report_data.samples if row.media_kind == "image")
    assert asked is not None
    assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(Image.open(io.BytesIO(asked)).convert("RGB")))


def test_a_large_image_is_reduced(report_data: ReportData, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 1500), "teal").save(buffer, format="JPEG")
    row = media_row("image", buffer.getvalue())
    shown = page_of(dataclasses.replace(report_data, samples=(row,)), tmp_path)
    sizes = {name: value for tag, name, value in shown.attributes if tag == "img" and name in ("width", "height")}
    assert sizes == {"width": str(MAX_IMAGE_SIZE), "height": str(MAX_IMAGE_SIZE // 2)}


def recording_of(page: Page) -> tuple[np.ndarray, int]:
    source = next(value for tag, name, value in page.attributes if tag == "audio" and name == "src")
    return soundfile.read(io.BytesIO(base64.b64decode(source.removeprefix("data:audio/wav;base64,"))))


def test_a_recording_can_be_played_and_is_drawn(page: Page) -> None:
    samples, rate = recording_of(page)
    assert len(samples) / rate == pytest.approx(0.6)
    assert np.abs(samples).max() == pytest.approx(0.6, abs=0.02)
    assert ("svg", "aria-label", "Waveform, 0.6 s") in page.attributes


def test_noise_that_the_models_heard_is_told(report_data: ReportData, page: Page, tmp_path: Path) -> None:
    document = report_data.config.model_dump(mode="json")
    document["distill"]["surgery"].pop("every")
    document["data"][3]["snr_db"] = 20.0
    shown = page_of(dataclasses.replace(report_data, config=parse_config(document, source="test")), tmp_path)
    assert shown.text.count("the models heard it with noise, 20 dB below the voice") == 2
    assert "with noise" not in page.text


def test_a_long_recording_is_cut(report_data: ReportData, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(8000 * (MAX_AUDIO_SECONDS + 5)), 8000, format="WAV")
    row = media_row("audio", buffer.getvalue())
    samples, rate = recording_of(page_of(dataclasses.replace(report_data, samples=(row,)), tmp_path))
    assert len(samples) / rate == MAX_AUDIO_SECONDS


def test_a_video_is_named_and_not_drawn(report_data: ReportData, tmp_path: Path) -> None:
    row = media_row("video", b"mp4")
    shown = page_of(dataclasses.replace(report_data, samples=(row,)), tmp_path)
    assert shown.of_class("media") == ["video, not drawn"]


def test_media_that_cannot_be_decoded_are_an_error(report_data: ReportData, tmp_path: Path) -> None:
    row = media_row("image", b"no image")
    with pytest.raises(DataError, match="image file"):
        write_report(dataclasses.replace(report_data, samples=(row,)), tmp_path / "report.html")


# --- not measured -----------------------------------------------------------------------------------------------------------


def test_what_was_not_measured_is_said_to_be_not_measured(bare: ReportData, page: Page, tmp_path: Path) -> None:
    shown = page_of(bare, tmp_path)
    for words in NOT_MEASURED:
        assert f"Not measured: {words}" in shown.text
        assert words not in page.text
    assert "The student (0.52 M parameters) has not been measured." in shown.text.replace("\u00a0", " ")
    assert shown.of_class("card") == [
        "Contracts - not measured",
        "Weakest capability - not measured",
        "Size 0.52 M parameters; teachers not counted",
        "Cost - not measured",
    ]


def test_a_missing_measurement_is_never_shown_as_zero(bare: ReportData, tmp_path: Path) -> None:
    shown = page_of(bare, tmp_path)
    before_configuration = shown.text.split("What was asked for")[0]
    assert re.search(r"\b0(\.0)? ?(%|s\b|GiB)", before_configuration) is None


def test_metrics_of_another_runs_teachers_are_refused(report_data: ReportData, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"found 'stranger'.*nexus evaluate"):
        write_report(with_retention(report_data, teacher="stranger"), tmp_path / "report.html")


def test_samples_of_another_run_are_refused(report_data: ReportData, tmp_path: Path) -> None:
    row = SampleRow(id="x", capability="cooking", prompt="?", gold=None, teacher=None, student=None)
    with pytest.raises(ArtifactError, match=r"found 'cooking'.*nexus evaluate"):
        write_report(dataclasses.replace(report_data, samples=(row,)), tmp_path / "report.html")


# --- the run directory ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(report_data: ReportData, tmp_path: Path) -> Path:
    """The whole run, as its stages write it."""
    (tmp_path / "config.resolved.yaml").write_text(dump_config(report_data.config))
    write_artifact(tmp_path / "metrics.json", report_data.metrics)
    write_artifact(tmp_path / "samples.json", Samples(rows=tuple(report_data.samples)))
    for profile in report_data.profiles:
        write_artifact(tmp_path / "profile" / f"{profile.teacher}.json", profile)
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in report_data.events))
    return tmp_path


def test_a_run_directory_is_read_back_whole(run_dir: Path, report_data: ReportData) -> None:
    loaded = load_report_data(run_dir)
    assert loaded.config == report_data.config
    assert loaded.metrics == report_data.metrics
    assert sorted(loaded.profiles, key=lambda p: p.teacher) == sorted(report_data.profiles, key=lambda p: p.teacher)
    assert list(loaded.events) == list(report_data.events)
    assert list(loaded.samples) == list(report_data.samples)
    assert loaded.finished == datetime.fromtimestamp((run_dir / "metrics.json").stat().st_mtime, tz=timezone.utc)


def test_media_bytes_of_any_value_survive_the_samples_file(tmp_path: Path) -> None:
    row = media_row("image", bytes(range(256)))
    write_artifact(tmp_path / "samples.json", Samples(rows=(row,)))
    assert Samples.model_validate_json((tmp_path / "samples.json").read_text()).rows == (row,)


def test_only_the_configuration_and_the_metrics_have_to_be_there(run_dir: Path, tmp_path: Path) -> None:
    for name in ("samples.json", "events.jsonl"):
        (run_dir / name).unlink()
    for path in (run_dir / "profile").iterdir():
        path.unlink()
    loaded = load_report_data(run_dir)
    assert (loaded.profiles, loaded.events, loaded.samples) == ((), (), ())
    assert "Not measured: no teacher was profiled" in page_of(loaded, tmp_path).text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("config.resolved.yaml", r"config\.resolved\.yaml.*--out"), ("metrics.json", r"metrics\.json.*nexus evaluate")],
)
def test_a_missing_required_file_is_named_with_the_stage_to_run(run_dir: Path, name: str, expected: str) -> None:
    (run_dir / name).unlink()
    with pytest.raises(ArtifactError, match=expected):
        load_report_data(run_dir)


def test_a_damaged_profile_is_refused(run_dir: Path) -> None:
    (run_dir / "profile" / "qwen3-math.json").write_text("{}")
    with pytest.raises(ArtifactError, match=NIWTProfile.__name__):
        load_report_data(run_dir)


def test_metrics_of_another_shape_are_refused(run_dir: Path) -> None:
    (run_dir / "metrics.json").write_text('{"retention": 1}')
    with pytest.raises(ArtifactError, match=Metrics.__name__):
        load_report_data(run_dir)


def test_the_half_line_of_a_killed_process_is_left_out(run_dir: Path, report_data: ReportData) -> None:
    with (run_dir / "events.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    assert list(load_report_data(run_dir).events) == list(report_data.events)


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", ""])
def test_a_broken_line_within_the_events_is_named_by_its_number(run_dir: Path, line: str) -> None:
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], line, *lines[6:]]) + "\n")
    with pytest.raises(ArtifactError, match="on line 7"):
        load_report_data(run_dir)
