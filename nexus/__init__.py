"""nexus: many open-weight specialist teachers distilled into one small student.

Importing this package imports neither torch nor transformers, so that the command line answers at once. It only leaves
word that, as soon as transformers' Auto classes exist in the process, the student is to be registered with them: after
`import nexus`, `AutoModelForCausalLM.from_pretrained(bundle)` works, whichever of the two was imported first.
"""

from __future__ import annotations

from types import ModuleType

import wrapt

__version__ = "0.1.0"
"""A literal, because a working directory uploaded to a Ray cluster carries no package metadata."""


def _register_student(_: ModuleType) -> None:
    """Adds the student to transformers' Auto classes; runs once per process, after those have been imported."""
    from nexus.student.core import register_auto_classes

    register_auto_classes()


# modeling_auto imports configuration_auto first, so by then both registries exist.
wrapt.register_post_import_hook(_register_student, "transformers.models.auto.modeling_auto")
