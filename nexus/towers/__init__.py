"""Towers: the teachers, from a row of configs/teachers.yaml to the targets that they return.

registry.py names them, checkpoint.py reads their folders, nf4.py and loader.py hold their weights in NF4, causal_lm.py and encoder.py
run them, engine.py is what an actor talks to, targets.py is what crosses. Importing this package imports nothing heavy.
"""

from __future__ import annotations

import logging

# On CPUs with AVX-512 BF16, importing bitsandbytes warns that a kernel from the hub is absent. nexus never uses it (see nf4.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
