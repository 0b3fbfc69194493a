"""Fixtures of the training tests; the plain helpers are in conftest_training.py, which tests import."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest_training import spec, tokenizer  # noqa: F401  # fixtures
