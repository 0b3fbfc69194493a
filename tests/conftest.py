"""The environment of every test: no network, closed dashboards, one thread per process, the same examples every time.

The variables are set before any library can read them.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
# Ray's dashboard runs code that is posted to it; a token keeps other users of the machine out.
os.environ["RAY_AUTH_MODE"] = "token"
# Tiny models are slower on several threads than on one, and Ray's actors already share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The same examples on every machine, and no wall-clock limit on one: a busy machine is not a failed property.
settings.register_profile("nexus", deadline=None, derandomize=True)
settings.load_profile("nexus")
