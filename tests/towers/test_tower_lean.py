"""What a teacher's process imports: neither compiler nor scipy, and what was set aside meanwhile is back afterwards."""

from __future__ import annotations

import subprocess
import sys

import torch
import transformers.utils

from nexus.towers.lean import lean_imports

SCRIPT = """
import sys
from nexus.towers.lean import lean_imports
with lean_imports():
    import nexus.towers.engine
print(*(name for name in ("scipy", "torch._inductor.compile_fx", "pandas", "sklearn", "ray") if name in sys.modules))
"""


def test_an_engine_is_imported_without_compiler_and_scipy():
    assert subprocess.check_output([sys.executable, "-c", SCRIPT], text=True).strip() == ""


def test_functions_stay_as_they_are_while_it_lasts_and_all_is_as_before_afterwards():
    before = torch.compile, transformers.utils.is_scipy_available
    with lean_imports():
        assert torch.compile(len) is len
        assert torch.compile(dynamic=False)(len) is len
        assert not transformers.utils.is_scipy_available()
    assert (torch.compile, transformers.utils.is_scipy_available) == before
