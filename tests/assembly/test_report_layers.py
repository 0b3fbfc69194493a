"""The heat map of layers: capabilities of one teacher, and what the second pass adds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nexus.artifacts import AblationEffect, LayerEffect
from nexus.assembly.report import ReportData, write_report


def html_of(data: ReportData, folder: Path) -> str:
    path = folder / "report.html"
    write_report(data, path)
    return path.read_text()


def test_capabilities_of_one_teacher_have_rows_of_their_own(report_data: ReportData, tmp_path: Path) -> None:
    profile = report_data.profiles[0]

    def effects(size: float) -> tuple[LayerEffect, ...]:
        return tuple(
            LayerEffect(layer=layer, delta_nll=size * layer, ci95=(size * layer - 0.125, size * layer + 0.375))
            for layer in range(profile.num_layers)
        )

    several = profile.model_copy(update={"capabilities": {"sums": effects(0.25), "products": effects(-0.25)}})
    html = html_of(dataclasses.replace(report_data, profiles=(several,)), tmp_path)
    for capability in ("sums", "products"):
        assert f"{profile.teacher} on {capability} alone" in html
    sums, products = html.split(" on sums alone")[1].split("</tbody>")[0].split(" on products alone")
    assert "--heat:1.0" in sums
    assert "<b>0.25</b><small>0.125 \u2013 0.625</small>" in sums
    # What helps when it is left out has no heat.
    assert products.count("--heat:0.0") == profile.num_layers


def test_cells_say_what_the_second_pass_found(report_data: ReportData, tmp_path: Path) -> None:
    profile = report_data.profiles[0]
    assert "nats, with its mean update" not in html_of(report_data, tmp_path)
    measured = profile.layers[0].model_copy(
        update={
            "kl_nats": 0.75,
            "mean_ablation": AblationEffect(delta_nll=0.5, ci95=(0.4, 0.6), kl_nats=0.5),
            "noise_ablation": AblationEffect(delta_nll=1.5, ci95=(1.4, 1.6), kl_nats=2.5),
        }
    )
    data = dataclasses.replace(
        report_data, profiles=(profile.model_copy(update={"layers": (measured, *profile.layers[1:])}),)
    )
    html = html_of(data, tmp_path)
    assert html.count("KL 0.75 nats, with its mean update 0.5, with noise for it 1.5") == 1
