"""A plan on simulated clusters: actors land where it says, waves and sleepers included, and what cannot be had is refused."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.cluster import prepare_environment, resolve_cluster
from actors.places import cluster_shape, plan_places, reserve_places
from nexus.config import load_config
from nexus.errors import ClusterError
from nexus.serving.placement import GIB, PlacementError, TenantNeed, plan_placement
from nexus.towers.registry import load_registry, resolve_teacher, shipped_config

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def eight_gpus():
    """Two nodes on this machine, five and three GPUs that do not exist."""
    prepare_environment(resolve_cluster("local"))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 5, "object_store_memory": 80 * 2**20}
    )
    leaver = cluster.add_node(num_cpus=1, num_gpus=3, object_store_memory=80 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, leaver
    ray.shutdown()
    cluster.shutdown()


class Where:
    """Says which GPU it was given."""

    def where(self) -> tuple[str, str]:
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"][0]


def need(name: str, gib: int, *, flops: float = 1e16) -> TenantNeed:
    return TenantNeed(name, gib * GIB, GIB // 4, gib * GIB, gib * GIB // 16, flops)


def test_actors_share_the_gpus_that_the_plan_gives_them_and_no_other(eight_gpus):
    shape = cluster_shape(24.0)
    assert [len(node.gpu_bytes) for node in shape.nodes] == [5, 3]
    placement = plan_placement([need(f"t{n}", 9) for n in range(16)], shape.nodes, purpose="train")
    options = reserve_places(placement, shape)
    actors = {
        (place.id, copy): ray.remote(Where).options(num_cpus=0, **options[place.id][copy]).remote()
        for place in placement.places
        for copy in range(len(place.slots))
    }
    found = {key: ray.get(actor.where.remote(), timeout=120) for key, actor in actors.items()}
    planned: dict[tuple[int, int | None], set[tuple[str, str]]] = {}
    for place in placement.places:
        for copy, slot in enumerate(place.slots):
            assert found[place.id, copy][0] == shape.node_ids[slot.node]
            planned.setdefault((slot.node, slot.gpu), set()).add(found[place.id, copy])
    # Tenants of one planned device share one real one, and different devices are different.
    assert all(len(real) == 1 for real in planned.values())
    assert len(set.union(*planned.values())) == len(planned) == 8
    for actor in actors.values():
        ray.kill(actor)
    _release(options)


def test_a_runs_teachers_and_students_all_have_places_on_the_gpus(eight_gpus):
    config = load_config(shipped_config("quickstart.yaml"), ["cluster.placement=planned", "cluster.gpu_gib=3"])
    registry = load_registry()
    specs = [resolve_teacher(teacher, registry) for teacher in config.teachers]
    places = plan_places(config, specs)
    assert set(places.options) == {"student:distilled", "student:labels_only", *(spec.id for spec in specs)}
    assert places.sleep is None
    assert {1 / choice["num_gpus"] % 1 for choices in places.options.values() for choice in choices} == {0}
    _release(places.options)


def test_an_encoder_larger_than_every_gpu_is_streamed_and_a_language_model_is_refused(eight_gpus, tmp_path):
    config = load_config(shipped_config("quickstart.yaml"), ["cluster.placement=planned", "cluster.gpu_gib=3"])
    registry = load_registry()
    specs = {teacher.id: resolve_teacher(teacher, registry) for teacher in config.teachers}
    _write_headers(tmp_path / "model.safetensors", layers=24, matrix=(8192, 32768))
    large = {"path": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    specs["sample-vision"] = dataclasses.replace(specs["sample-vision"], **large)
    places = plan_places(config, list(specs.values()))
    assert places.streamed == {"sample-vision"}
    assert "streamed layer by layer: sample-vision" in places.description
    _release(places.options)
    for teacher, changes, words in (
        ("sample-code", large, "its role causal_lm"),
        ("sample-vision", {**large, "cache_dir": None}, r"no folder for its layers \(cache\.dir\)"),
    ):
        wrong = {**specs, teacher: dataclasses.replace(specs[teacher], **changes)}
        with pytest.raises(PlacementError, match=words):
            plan_places(config, list(wrong.values()))


def _write_headers(path, *, layers: int, matrix: tuple[int, int]) -> None:
    """A safetensors file that says how large it is and takes no room: the planner reads headers alone."""
    size = 2 * matrix[0] * matrix[1]
    header = {
        f"layers.{n}.weight": {"dtype": "BF16", "shape": list(matrix), "data_offsets": [n * size, (n + 1) * size]}
        for n in range(layers)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + layers * size)


def test_gpus_that_nobody_can_open_are_refused_with_the_remedy(eight_gpus):
    with pytest.raises(ClusterError, match=r"Set cluster\.gpu_gib"):
        cluster_shape(None)


def test_a_node_that_left_is_planned_without(eight_gpus):
    cluster, leaver = eight_gpus
    cluster.remove_node(leaver, allow_graceful=True)
    limit = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) > 1 and time.monotonic() < limit:
        time.sleep(0.2)
    shape = cluster_shape(24.0)
    assert [len(node.gpu_bytes) for node in shape.nodes] == [5]
    placement = plan_placement([need(f"t{n}", 9) for n in range(12)], shape.nodes, purpose="train")
    # More teachers than slots: two fit on each GPU.
    assert {place.mode for place in placement.places} == {"resident", "sleeper"}


def _release(options) -> None:
    from ray.util import remove_placement_group

    groups = {choice["scheduling_strategy"].placement_group for choices in options.values() for choice in choices}
    for group in groups:
        remove_placement_group(group)
