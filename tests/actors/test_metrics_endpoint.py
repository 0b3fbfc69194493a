"""The custom metrics as Prometheus would read them from a real node of Ray, and the dashboard that draws them."""

from __future__ import annotations

import inspect
import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

import actors.metrics
from actors.metrics import TeacherMetrics, TrainerMetrics
from actors.pool import TeacherPool
from nexus.data.records import Record
from nexus.towers.targets import ScoreRequest

GRAFANA = Path(__file__).parents[2] / "configs" / "grafana.json"
DEADLINE_S = 120.0
"""Ray reports every few seconds; only a metric that never comes takes this long."""
SAMPLE = re.compile(r"(?P<name>\w+)\{(?P<labels>[^}]*)\} (?P<value>\S+)")


@pytest.fixture(scope="module")
def endpoint(ray_cluster: object) -> str:
    """URL of the node's metrics."""
    node = ray.nodes()[0]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def test_the_rows_of_a_teacher_are_counted_on_rays_endpoint(endpoint, reasoning_spec):
    pool, reports = TeacherPool.start(
        [reasoning_spec], torch_threads=1, num_gpus=0, window=2, timeout_s=120, max_retries=0, load_timeout_s=120
    )
    for number, rows in enumerate((1, 2, 4)):
        pool.submit(number, "sample-reasoning", "score", _request(rows))
    for number in range(3):
        pool.collect(number)
    measured = [Record(id=f"r{n}", capability="c", prompt=f"{n}+1", completion=str(n + 1)) for n in range(3)]
    pool.submit("profile", "sample-reasoning", "measure", measured, "auto", None)
    pool.collect("profile")
    seen = _until(endpoint, lambda samples: samples.get("ray_nexus_profile_rows_total") == {"sample-reasoning": 3.0})
    assert seen["ray_nexus_teacher_rows_total"] == {"sample-reasoning": 10.0}
    assert seen["ray_nexus_profile_seconds_total"]["sample-reasoning"] > 0
    assert (
        seen["ray_nexus_profile_seconds_total"]["sample-reasoning"]
        < seen["ray_nexus_teacher_busy_seconds_total"]["sample-reasoning"]
    )
    assert seen["ray_nexus_teacher_busy_seconds_total"]["sample-reasoning"] > 0
    assert seen["ray_nexus_teacher_weight_bytes"] == {
        "sample-reasoning": float(reports["sample-reasoning"].weight_bytes)
    }


def test_what_a_trainer_reports_arrives_with_its_student(endpoint):
    @ray.remote(num_cpus=0)
    class Trainer:
        def report(self) -> None:
            metrics = TrainerMetrics("distilled")
            for loss in (3.0, 2.0):
                metrics.stepped(total=loss, losses={"sample-reasoning": loss / 2}, wait_s=0.25)
            metrics.recovered("skip")
            metrics.recovered("rollback")

    trainer = Trainer.remote()
    ray.get(trainer.report.remote(), timeout=60)
    seen = _until(endpoint, lambda samples: "ray_nexus_trainer_rollbacks_total" in samples)
    assert seen["ray_nexus_trainer_steps_total"] == {"distilled": 2.0}
    assert seen["ray_nexus_trainer_skipped_steps_total"] == {"distilled": 1.0}
    assert seen["ray_nexus_trainer_rollbacks_total"] == {"distilled": 1.0}
    assert seen["ray_nexus_trainer_wait_seconds_total"] == {"distilled": 0.5}
    assert seen["ray_nexus_trainer_loss"] == {"distilled/total": 2.0, "distilled/sample-reasoning": 1.0}


def test_the_dashboard_draws_every_declared_metric_and_no_other():
    expressions = [target["expr"] for panel in json.loads(GRAFANA.read_text())["panels"] for target in panel["targets"]]
    drawn = {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)}
    assert drawn == set(_declared())


def test_the_dashboard_groups_and_filters_by_labels_that_the_metrics_have():
    declared = _declared()
    for panel in json.loads(GRAFANA.read_text())["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"\bray_\w+", target["expr"])
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            labels = {label.strip() for group in grouped for label in group.split(",")}
            labels |= set(re.findall(r'(\w+)\s*(?:=|!=|=~|!~)\s*"', target["expr"]))
            labels |= set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target.get("legendFormat", "")))
            for name in names:
                assert labels <= set(declared[name]), (target, declared[name])


def _declared() -> dict[str, tuple[str, ...]]:
    """Name on the endpoint -> labels, of every metric that `actors.metrics` declares."""
    found = {}
    for metric in (*vars(TeacherMetrics("t")).values(), *vars(TrainerMetrics("s")).values()):
        if isinstance(metric, ray.util.metrics.Metric):
            suffix = "_total" if isinstance(metric, ray.util.metrics.Counter) else ""
            found[f"ray_{metric.info['name']}{suffix}"] = metric.info["tag_keys"]
    # A third class of metrics would be missed above.
    assert len(found) == len(re.findall(r"= _(?:counter|gauge)\(", inspect.getsource(actors.metrics)))
    return found


def _request(rows: int) -> ScoreRequest:
    return ScoreRequest(
        row_ids=tuple(f"r{n}" for n in range(rows)),
        prompts=("Tom has 3 pens.",) * rows,
        completions=("#### 3",) * rows,
        media=None,
        temperature=1.0,
        top_k=4,
        layers=(),
    )


Samples = dict[str, dict[str, float]]


def _until(endpoint: str, condition: Callable[[Samples], bool]) -> Samples:
    """Poll the endpoint until `condition` holds of its nexus metrics: name -> student and teacher -> value."""
    limit = time.monotonic() + DEADLINE_S
    while True:
        samples = _scrape(endpoint)
        if condition(samples):
            return samples
        assert time.monotonic() < limit, samples
        time.sleep(0.5)


def _scrape(endpoint: str) -> Samples:
    with urllib.request.urlopen(endpoint, timeout=10) as answer:
        text = answer.read().decode()
    found: Samples = {}
    for line in text.splitlines():
        match = SAMPLE.match(line)
        if match and match["name"].startswith("ray_nexus_"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match["labels"]))
            key = "/".join(labels[label] for label in ("student", "teacher") if label in labels)
            values = found.setdefault(match["name"], {})
            # Each process exports its own series.
            values[key] = values.get(key, 0.0) + float(match["value"])
    return found
