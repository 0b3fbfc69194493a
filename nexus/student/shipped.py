"""The student presets that ship with nexus, as far as a command has to know them before it starts anything. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from nexus.config import RunConfig, resolve_path
from nexus.errors import ConfigError
from nexus.towers.registry import nearest, shipped_config


def student_preset(config: RunConfig) -> Path:
    """The YAML of the run's preset.

    Raises:
        ConfigError: no preset has that name.
    """
    preset = config.student.preset
    presets = tuple(sorted(path.stem for path in shipped_config("student/quickstart.yaml").parent.glob("*.yaml")))
    if preset not in presets:
        raise ConfigError(
            f"Expected student.preset to be one of {', '.join(presets)}, found {preset!r}{nearest(preset, presets)} Correct it."
        )
    return shipped_config(f"student/{preset}.yaml")


def student_positions(config: RunConfig) -> int:
    """Tokens that the student has positions for: prompt and answer together.

    Raises:
        ConfigError: no such preset, or a trunk without a readable config.json.
    """
    if config.student.trunk is not None:
        path = resolve_path(config.student.trunk) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            text = values.get("text_config", values)
            # GPT-2's name for it, which its class translates.
            return int(text["n_positions"] if "n_positions" in text else text["max_position_embeddings"])
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"Expected a causal language model's config.json with max_position_embeddings at student.trunk, found {path}: "
                f"{' '.join(str(error).split())}. Correct the folder."
            ) from None
    return int(yaml.safe_load(student_preset(config).read_text(encoding="utf-8"))["core"]["max_position_embeddings"])
