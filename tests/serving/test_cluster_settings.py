"""Settings of where teachers live: each has an effect, and one without is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus.config import dump_config, load_config
from nexus.errors import ConfigError
from nexus.towers.registry import shipped_config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("cluster.sleeper_mib=100",), "sleeper_mib has no effect while all teachers stay awake"),
        (("cluster.turn_batches=4",), "turn_batches has no effect while all teachers stay awake"),
        (("cluster.gpu_gib=24",), "gpu_gib has no effect while placement is even"),
        (
            ("cluster.placement=planned", "cluster.resident_teachers=2"),
            "resident_teachers has no effect while placement is planned",
        ),
        (("cluster.resident_teachers=0",), "greater than 0"),
        (("cluster.placement=best",), "'even' or 'planned'"),
    ],
)
def test_a_setting_without_effect_is_refused(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config(shipped_config("quickstart.yaml"), overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("cluster.resident_teachers=2", "cluster.sleeper_mib=100"),
        ("cluster.placement=planned", "cluster.gpu_gib=24"),
        ("cluster.placement=planned", "cluster.sleeper_mib=100", "cluster.turn_batches=4"),
    ],
)
def test_settings_that_fit_survive_their_file(tmp_path: Path, overrides):
    config = load_config(shipped_config("quickstart.yaml"), overrides)
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
