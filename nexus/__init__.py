"""nexus: many open-weight specialist teachers distilled into one small student.

Importing this package imports neither torch nor transformers, so that the command line answers at once. It only leaves
word that, as soon as transformers' Auto classes exist in the process, the student is to be registered with them: after
`import nexus`, `AutoModelForCausalLM.from_pretrained(bundle)` works, whichever of the two was imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType

import wrapt

__version__ = "0.1.0"
"""A literal, because a working directory uploaded to a Ray cluster carries no package metadata."""


def _knows_the_student() -> bool:
    """Whether this process has a transformers that the student is written for; those of vendors' environments are older."""
    return int(sys.modules["transformers"].__version__.partition(".")[0]) >= 5


def _register_config(configuration_auto: ModuleType) -> None:
    """Makes the student's `model_type` known to AutoConfig, and to whatever finds its class through AutoConfig."""
    if not _knows_the_student():
        return
    from nexus.student.config import NexusStudentConfig, PretrainedCoreConfig

    for kind in (NexusStudentConfig, PretrainedCoreConfig):
        configuration_auto.AutoConfig.register(kind.model_type, kind, exist_ok=True)


def _register_model(modeling_auto: ModuleType) -> None:
    """Makes AutoModelForCausalLM build the student for its configuration."""
    if not _knows_the_student():
        return
    from nexus.student.config import NexusStudentConfig, PretrainedCoreConfig
    from nexus.student.core import NexusStudentCore
    from nexus.student.trunk import PretrainedCore

    modeling_auto.AutoModelForCausalLM.register(NexusStudentConfig, NexusStudentCore, exist_ok=True)
    modeling_auto.AutoModelForCausalLM.register(PretrainedCoreConfig, PretrainedCore, exist_ok=True)


# Each runs once, at the import of the module it names, or now if that was imported before. The two are separate because
# modeling_auto imports configuration_auto first, at a moment when the model's registry does not exist yet.
wrapt.register_post_import_hook(_register_config, "transformers.models.auto.configuration_auto")
wrapt.register_post_import_hook(_register_model, "transformers.models.auto.modeling_auto")
