"""What a whole student is made of, and the YAML that describes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nexus.adapters.audio import AudioAdapterConfig
from nexus.adapters.base import AdapterConfig, Alignment
from nexus.adapters.reasoning import ReasoningAdapterConfig
from nexus.adapters.vision import VisionAdapterConfig
from nexus.errors import ConfigError
from nexus.student.config import NexusStudentConfig, PretrainedCoreConfig
from nexus.student.router import SparseIntentRouterConfig
from nexus.student.trunk import pretrained_core_config

_ADAPTER_CONFIGS: dict[str, type[AdapterConfig]] = {
    "reasoning": ReasoningAdapterConfig,
    "vision": VisionAdapterConfig,
    "audio": AudioAdapterConfig,
}


@dataclass(frozen=True)
class StudentSpec:
    """Trunk, adapters and router of one student. A tower that is None does not exist.

    Raises:
        ConfigError: if an adapter or the router does not fit the trunk's width.
    """

    core: NexusStudentConfig
    reasoning: ReasoningAdapterConfig | None
    vision: VisionAdapterConfig | None
    audio: AudioAdapterConfig | None
    router: SparseIntentRouterConfig

    def __post_init__(self) -> None:
        widths = {f"{tower}.context_width": config.context_width for tower, config in self.adapters().items()}
        for name, width in {**widths, "router.embedding_size": self.router.embedding_size}.items():
            if width != self.core.hidden_size:
                raise ConfigError(
                    f"Expected {name} to be the trunk's width {self.core.hidden_size}, found {width}. Leave it out."
                )

    def adapters(self) -> dict[str, AdapterConfig]:
        """The configurations of the towers that exist, in the order of the router's heads."""
        return {tower: config for tower in _ADAPTER_CONFIGS if (config := getattr(self, tower)) is not None}

    def with_vocabulary(
        self, vocab_size: int, *, pad_token_id: int | None, eos_token_id: int | None, bos_token_id: int | None = None
    ) -> StudentSpec:
        """The same student for another tokenizer."""
        changes = {
            "vocab_size": vocab_size,
            "pad_token_id": pad_token_id,
            "eos_token_id": eos_token_id,
            "bos_token_id": bos_token_id,
        }
        return dataclasses.replace(self, core=type(self.core).from_dict({**self.core.to_dict(), **changes}))

    def with_alignments(self, tower: str, alignments: Iterable[Alignment]) -> StudentSpec:
        """The same student whose `tower` can be aligned with these teachers' features."""
        config = self.adapters().get(tower)
        if config is None:
            raise ConfigError(f"Expected one of the student's towers {', '.join(self.adapters())}, found {tower!r}.")
        changed: dict[str, Any] = {tower: dataclasses.replace(config, alignments=tuple(alignments))}
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        adapters = {tower: config.to_dict() for tower, config in self.adapters().items()}
        return {"core": self.core.to_diff_dict(), **adapters, "router": self.router.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudentSpec:
        """Parse sections core, router, and any of reasoning, vision, audio; widths that follow from the trunk's may be left out.

        Raises:
            ConfigError: naming a missing section or an unknown key.
        """
        expected = {"core", "router", *_ADAPTER_CONFIGS}
        unknown, missing = sorted(values.keys() - expected), sorted({"core", "router"} - values.keys())
        if unknown or missing:
            found = f"unknown {unknown[0]!r}" if unknown else f"no {missing[0]!r}"
            raise ConfigError(
                f"Expected the sections core, router and any of {', '.join(_ADAPTER_CONFIGS)}, found {found}."
            )
        kind = PretrainedCoreConfig if "trunk" in values["core"] else NexusStudentConfig
        known = {field.name for field in dataclasses.fields(kind)}
        strange = sorted(values["core"].keys() - known - {"model_type"})
        if strange:
            raise ConfigError(
                f"Expected keys of the trunk's configuration under core, found {strange[0]!r}. Remove it."
            )
        core = kind.from_dict(dict(values["core"]))
        adapters: dict[str, Any] = {
            tower: config.from_dict({"context_width": core.hidden_size, **values[tower]}) if tower in values else None
            for tower, config in _ADAPTER_CONFIGS.items()
        }
        router = SparseIntentRouterConfig.from_dict({"embedding_size": core.hidden_size, **values["router"]})
        return cls(core=core, router=router, **adapters)


def load_student_spec(path: Path, *, trunk: Path | None = None) -> StudentSpec:
    """Read a student's YAML, such as those in configs/student. Raises ConfigError.

    Args:
        trunk: folder of a pretrained language model that takes the place of the YAML's core, all but its `port_every`; the widths
            of adapters and router that were left out follow it.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"Expected a student's description in YAML at {path}, found: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"Expected a mapping at the top of {path}, found {type(values).__name__}.")
    if trunk is not None:
        port_every = values.get("core", {}).get("port_every", NexusStudentConfig.port_every)
        values = {**values, "core": pretrained_core_config(trunk, port_every=port_every).to_diff_dict()}
    return StudentSpec.from_dict(values)
