"""`nexus teachers tax` and `verify`: what NF4 costs a run's teachers, and whether checkpoints are what the registry says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nexus.config import SAMPLES_DIR
from nexus.towers.tiny import write_tiny


@pytest.mark.parametrize("as_json", [True, False])
def test_tax_weighs_the_runs_teachers_on_their_held_out_rows(nexus: Callable[..., Any], as_json: bool) -> None:
    asked = nexus(
        "teachers", "tax", "--teachers", "sample-vision,sample-reasoning", "--max-rows", 4, *(["--json"] if as_json else [])
    )  # fmt: skip
    assert asked.code == 0, asked.err
    if not as_json:
        assert "4 rows  KL 0." in asked.out
        assert "in NF4, weight error at most 0." in asked.out
        return
    taxes = asked.document()["taxes"]
    assert [(tax["teacher"], tax["rows"]) for tax in taxes] == [("sample-reasoning", 4), ("sample-vision", 4)]
    for tax in taxes:
        assert 0 < tax["mean_kl_nats"] < 0.5
        assert 0.5 < tax["top1_agreement"] <= 1
        assert 0 <= tax["nf4_score"] <= 1
        assert tax["mean_cosine"] is None
    # A language model's tokens, a classifier's rows.
    assert taxes[0]["items"] > 4
    assert taxes[1]["items"] == 4


def test_tax_of_an_encoder_without_labels_is_the_cosine_of_its_embeddings(
    nexus: Callable[..., Any], tmp_path: Path
) -> None:
    write_tiny("siglip2-so400m", tmp_path / "siglip")
    settings = {
        "teachers.sample-vision.path": tmp_path / "siglip",
        "teachers.sample-vision.min_coverage": 0.1,
    }
    asked = nexus(
        "teachers", "tax", "--json", "--teachers", "sample-vision", "--max-rows", 3,
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    )  # fmt: skip
    (tax,) = asked.document()["taxes"]
    assert 0.9 < tax["mean_cosine"] < 1
    assert (tax["mean_kl_nats"], tax["nf4_score"], tax["items"]) == (None, None, 3)


def test_tax_of_the_registry_needs_no_run_and_knows_every_role(nexus: Callable[..., Any]) -> None:
    names = "gemma-scope-2-27b,qwen2.5-omni-7b,step3-vl-10b"
    taxes = nexus("teachers", "tax", "--tiny", "--json", "--teachers", names).document()["taxes"]
    sae, packed, absent = taxes
    assert (sae["measure"], sae["mean_kl_nats"]) == ("cosine of features", None)
    assert 0.8 < sae["mean_cosine"] < 1
    assert sae["stored_bytes"] > 0
    assert packed["needs"].endswith("already quantised (GPTQ 4 bit, group 64)")
    assert "Python files" in absent["needs"]
    for option in (("--max-rows", 3), ("--set", "seed=1"), ("--models-dir", "x")):
        asked = nexus("teachers", "tax", "--tiny", *option)
        assert (asked.code, asked.err.count("no effect beside it")) == (2, 1)


def test_tax_refuses_a_teacher_that_the_run_does_not_have(nexus: Callable[..., Any]) -> None:
    asked = nexus("teachers", "tax", "--teachers", "sample-visio")
    assert (asked.code, asked.out) == (2, "")
    assert asked.err.splitlines()[-1].startswith("nexus: Expected ids of the run's teachers")
    assert "Did you mean 'sample-vision'?" in asked.err


def test_verify_says_what_is_wrong_and_what_is_absent(nexus: Callable[..., Any], tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(SAMPLES_DIR / "teachers" / "sample-reasoning", models / "qwen2.5-0.5b")
    asked = nexus("teachers", "verify", "--models-dir", models, "--json")
    assert asked.code == 1
    rows = {row["id"]: row for row in json.loads(asked.out)}
    assert len(rows) == 23
    assert rows["qwen2.5-0.5b"]["status"] == "failed"
    assert rows["qwen2.5-coder-7b"]["status"] == "absent"
    assert "revision" in rows["qwen2.5-coder-7b"]["online"]
    told = nexus("teachers", "verify", "--models-dir", models, "--teachers", "qwen2.5-coder-7b")
    assert told.code == 0
    assert "absent: Expected the files of teacher 'qwen2.5-coder-7b'" in told.out
    assert "verify: online (revision, licence)" in told.out


def test_a_streamed_language_model_is_refused_before_anything_starts(nexus: Callable[..., Any]) -> None:
    asked = nexus("profile", "--set", "teachers.sample-reasoning.placement=streamed")
    assert (asked.code, asked.out) == (2, "")
    told = asked.err.splitlines()[-1]
    assert told.startswith("nexus: Expected an encoder with placement streamed, found teacher 'sample-reasoning'")
