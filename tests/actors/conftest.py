"""One real local Ray per module, and tiny real teachers and data for it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.cluster import connect, prepare_environment, resolve_cluster

SAMPLES = Path(__file__).parents[2] / "nexus" / "data" / "samples"
TEACHER = SAMPLES / "teachers" / "sample-reasoning"


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    """A connected local cluster; its session ends with the module."""
    import ray

    target = resolve_cluster("local")
    prepare_environment(target)
    session = connect(
        target, namespace="nexus-tests", num_cpus=4, object_store_mib=128, torch_threads=1, dashboard=False
    )
    yield session
    ray.shutdown()


@pytest.fixture(scope="session")
def reasoning_spec():
    """The shipped reasoning teacher, as an actor gets it."""
    from nexus.towers.registry import TeacherSpec

    return TeacherSpec(id="sample-reasoning", path=str(TEACHER), revision=None, role="causal_lm")


@pytest.fixture
def rows_file(tmp_path) -> Path:
    """12 rows of arithmetic, one of them unreadable, as JSONL."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"id": f"r{n}", "question": f"Tom has {n} pens. He buys 2 more. How many?"}) for n in range(12)]
    lines.insert(5, "{broken")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def rows_parquet(tmp_path) -> Path:
    """12 readable rows as Parquet in 3 row groups."""
    path = tmp_path / "rows.parquet"
    table = pa.table(
        {"id": [f"r{n}" for n in range(12)], "question": [f"Tom has {n} pens. How many?" for n in range(12)]}
    )
    pq.write_table(table, path, row_group_size=4)
    return path
