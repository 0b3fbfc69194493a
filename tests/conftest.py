"""The environment of every test, set before any library reads it: no network, closed dashboards, one thread per process."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Ray's dashboard runs code that is posted to it; a token keeps other users of the machine out.
os.environ["RAY_AUTH_MODE"] = "token"
# Tiny models are slower on several threads than on one, and Ray's actors already share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
