"""From a plan to Ray: each planned device is reserved as a whole GPU, and its actors take their parts of that reservation.

Ray packs fractions as it likes; inside a placement group of one GPU an actor cannot land on another. Which of a node's GPUs a group
gets is Ray's choice: GPUs of one node are taken to be alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.pool import Sleep
from nexus.errors import ClusterError
from nexus.serving.placement import GIB, NodeShape, Placement, PlacementError, plan_placement
from nexus.serving.sizes import STUDENT, run_needs, size_of_checkpoint
from nexus.vendors.environments import ENVIRONMENTS

if TYPE_CHECKING:
    from nexus.config import RunConfig
    from nexus.towers.registry import TeacherSpec

RESERVE_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 120.0
"""A process that imports torch and opens a CUDA context on a busy machine."""


@dataclass(frozen=True)
class ClusterShape:
    """What the planner is told of the cluster that is joined."""

    nodes: tuple[NodeShape, ...]
    node_ids: tuple[str, ...]
    """Ray's, in the same order."""


def cluster_shape(gpu_gib: float | None) -> ClusterShape:
    """The nodes that are alive, this one first, then those with the most GPUs.

    Args:
        gpu_gib: free memory of each GPU; None asks a process on each node.

    Raises:
        ClusterError: when a node's GPUs do not say how much memory they have.
    """
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            number = int(resources.get("GPU", 0))
            found.append((number, node["NodeID"], int(resources.get("memory", 0))))
    # Of equal devices the planner takes the first, and begins with the student's, which has to be here.
    here = ray.get_runtime_context().get_node_id()
    found.sort(key=lambda item: (item[1] != here, -item[0], item[1]))
    shapes = []
    for number, node_id, memory in found:
        sizes = (int(gpu_gib * GIB),) * number if gpu_gib is not None else _probe(node_id, number)
        shapes.append(NodeShape(sizes, memory))
    return ClusterShape(tuple(shapes), tuple(node_id for _, node_id, _ in found))


@dataclass(frozen=True)
class PlannedPlaces:
    """Places that are reserved."""

    options: Mapping[str, list[dict[str, Any]]]
    """Tenant -> options of each of its copies; students are `student:NAME`."""
    sleep: Sleep | None
    streamed: frozenset[str]
    """Teachers that exceed their device and run layer by layer."""
    description: str
    """For the person who started the run."""


def plan_places(config: RunConfig, specs: Sequence[TeacherSpec]) -> PlannedPlaces:
    """Plan for the cluster that is joined, and reserve.

    Raises:
        PlacementError: something does not fit, or would have to be streamed and cannot.
        ClusterError: a GPU does not tell its memory or is not to be had, or a student would be far from its run directory.
    """
    shape = cluster_shape(config.cluster.gpu_gib)
    sizes = [
        size_of_checkpoint(spec.id, Path(spec.path), quantise=spec.quantise, skip_modules=spec.skip_modules)
        for spec in specs
    ]
    student, *teachers = run_needs(config, sizes)
    names = ["distilled", *(["labels_only"] if config.distill.labels_only else [])]
    students = [replace(student, id=f"{STUDENT}:{name}") for name in names]
    placement = plan_placement([*students, *teachers], shape.nodes, purpose="train")
    streamed = frozenset(place.id for place in placement.places if place.mode == "streamed")
    _refuse_unstreamed([spec for spec in specs if spec.id in streamed])
    here = ray.get_runtime_context().get_node_id()
    for name in students:
        slot = placement.place_of(name.id).slots[0]
        if shape.node_ids[slot.node] != here:
            raise ClusterError(
                f"Expected the student's GPU on this node, where the run directory is, found it on {shape.node_ids[slot.node]}. "
                "Start the command there, or set cluster.placement: even."
            )
    sleepers = {place.id for place in placement.places if place.mode == "sleeper"}
    sleep = None
    if sleepers:
        pinned = frozenset(spec.id for spec in specs) - sleepers
        kept = config.cluster.sleeper_mib * 2**20
        sleep = Sleep(1, kept, config.cluster.turn_batches, pinned=pinned, device_of=devices_of(placement))
    description = (
        f"placed by plan: {len(specs)} teachers on {len(placement.devices)} devices, {len(sleepers)} sleep by turns"
    )
    if streamed:
        description += f", streamed layer by layer: {', '.join(sorted(streamed))}"
    return PlannedPlaces(reserve_places(placement, shape), sleep, streamed, description)


def _refuse_unstreamed(specs: Sequence[TeacherSpec]) -> None:
    """Refuse teachers that exceed their device and cannot run from their files during a run."""
    for spec in specs:
        why = None
        if spec.role != "encoder":
            why = f"its role {spec.role}, which a run asks for more than one pass over a batch"
        elif not spec.quantise or spec.library in ENVIRONMENTS:
            why = "weights that are not quantised here"
        elif spec.cache_dir is None:
            why = "no folder for its layers (cache.dir)"
        if why is not None:
            raise PlacementError(
                f"Expected a GPU that holds teacher {spec.id!r}, or an encoder that can be streamed layer by layer, found {why}. Use "
                "larger GPUs, or leave it out."
            )


def reserve_places(placement: Placement, shape: ClusterShape) -> dict[str, list[dict[str, Any]]]:
    """Options of every replica of every tenant, with its device reserved for as long as this process lives.

    Raises:
        ClusterError: when a GPU of the plan is not to be had in time.
    """
    groups: dict[tuple[int, int], Any] = {}
    for use in placement.devices:
        if use.gpu is not None:
            groups[use.node, use.gpu] = placement_group(
                [{"GPU": 1}],
                strategy="STRICT_PACK",
                bundle_label_selector=[{"ray.io/node-id": shape.node_ids[use.node]}],
            )
    for (node, _), group in groups.items():
        if not group.wait(RESERVE_TIMEOUT_S):
            raise ClusterError(
                f"Expected a free GPU on node {shape.node_ids[node]} within {RESERVE_TIMEOUT_S:.0f} s, found none: something else "
                "holds it. End that, or lower the number of GPUs of the cluster."
            )
    return {
        place.id: [
            {
                "num_gpus": 1 / slot.sharers,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(groups[slot.node, slot.gpu]),
            }
            if slot.gpu is not None
            else {
                "num_gpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(shape.node_ids[slot.node], soft=True),
            }
            for slot in place.slots
        ]
        for place in placement.places
    }


def devices_of(placement: Placement) -> Mapping[str, str]:
    """Tenant -> its (first) device in words."""
    return {place.id: f"node{place.slots[0].node}:gpu{place.slots[0].gpu}" for place in placement.places}


def _probe(node_id: str, number: int) -> tuple[int, ...]:
    """Free bytes of each GPU of one node."""
    if not number:
        return ()
    options = {"num_cpus": 0, "num_gpus": number, "max_retries": 0}
    task = ray.remote(_free_bytes).options(
        **options, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    )
    reference: Any = task.remote()
    try:
        sizes: Sequence[int] = ray.get(reference, timeout=PROBE_TIMEOUT_S)
    except GetTimeoutError:
        raise ClusterError(
            f"Expected the {number} GPUs of node {node_id} to say what is free within {PROBE_TIMEOUT_S:.0f} s, found no answer: "
            "something else holds them. End that, or set cluster.gpu_gib."
        ) from None
    if len(sizes) != number:
        raise ClusterError(
            f"Expected {number} GPUs that CUDA can open on node {node_id}, found {len(sizes)}. Set cluster.gpu_gib to their free "
            "memory, or start Ray there with as many as there are."
        )
    return tuple(sizes)


def _free_bytes() -> list[int]:
    import torch

    return [int(torch.cuda.mem_get_info(index)[0]) for index in range(torch.cuda.device_count())]
