"""`nexus plan`: where every teacher of a run would live, and what that costs. Starts nothing: no Ray, no torch, no model.

Sizes come from the headers of the checkpoints that are on this machine, else from the registry. Times are estimates for cards and
disks of the stated speeds.
"""

from __future__ import annotations

import shutil
import subprocess  # nosec B404 # asks the driver's own tool for free memory
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from nexus.config import RegistryTeacher, Role, RunConfig, resolve_path
from nexus.serving.placement import (
    GIB,
    NodeShape,
    Place,
    Placement,
    Speeds,
    TenantNeed,
    parse_cluster,
    plan_placement,
)
from nexus.serving.sizes import (
    STUDENT,
    TeacherSize,
    run_needs,
    size_of_checkpoint,
    size_of_entry,
    student_need,
    teacher_need,
)
from nexus.towers.registry import (
    DEFAULT_MODELS_DIR,
    SUPPORTED_ROLES,
    TeacherRegistry,
    find_checkpoint,
    load_registry,
    shipped_config,
)

PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RunPlan:
    """Both plans of a run, and what they were made from."""

    cluster: str
    """In words."""
    nodes: tuple[NodeShape, ...]
    sizes: tuple[TeacherSize, ...]
    training: Placement
    extraction: Placement
    speeds: Speeds
    refused: dict[str, str]
    """Teacher -> why this version of nexus cannot distil from it, though it has a place here."""


def plan_run(config: RunConfig, *, gpus: str | None, models_dir: Path | None, every_teacher: bool = False) -> RunPlan:
    """Plan a run.

    Args:
        gpus: the cluster as text (`nexus.serving.placement.parse_cluster`); None looks at this machine.
        models_dir: where checkpoints are looked for before the registry is believed.
        every_teacher: plan for the whole registry, each with as many rows as the run's largest capability.

    Raises:
        PlacementError: a cluster that cannot be read, or on which something does not fit.
        ConfigError, TowerLoadError: a teacher of unknown size.
    """
    nodes, words = (parse_cluster(gpus), f"as given: {gpus}") if gpus is not None else this_machine()
    registry = load_registry()
    if every_teacher:
        most = max(source.batch_size for source in config.data)
        sizes = tuple(_registry_size(registry, entry.id, models_dir) for entry in registry.teachers)
        rows = config.distill.steps * most
        roles = {entry.id: entry.role for entry in registry.teachers}
        student, needs = _needs_of_all(config, sizes, float(rows * config.student.max_length))
    else:
        sizes = tuple(_size(config, index, registry, models_dir) for index in range(len(config.teachers)))
        roles = {
            teacher.id: registry.get(teacher.id).role if isinstance(teacher, RegistryTeacher) else teacher.role
            for teacher in config.teachers
        }
        student, *needs = run_needs(config, sizes)
    speeds = Speeds()
    training = plan_placement([student, *needs], nodes, purpose="train", speeds=speeds)
    return RunPlan(
        cluster=words,
        nodes=nodes,
        sizes=sizes,
        training=training,
        extraction=plan_placement(needs, nodes, purpose="extract", speeds=speeds),
        speeds=speeds,
        refused=_refused(roles, training),
    )


def _refused(roles: Mapping[str, Role], training: Placement) -> dict[str, str]:
    """Teachers that a run does not take yet, by what the plan shows of them."""
    streamed = {place.id for place in training.places if place.mode == "streamed"}
    return {
        teacher: f"role {role}" if role not in SUPPORTED_ROLES else "a run streams encoders alone"
        for teacher, role in roles.items()
        if role not in SUPPORTED_ROLES or (teacher in streamed and role != "encoder")
    }


def _needs_of_all(
    config: RunConfig, sizes: Sequence[TeacherSize], tokens: float
) -> tuple[TenantNeed, list[TenantNeed]]:
    """The student's need and those of teachers that the configuration does not name, each with so many tokens."""
    preset = shipped_config(f"student/{config.student.preset}.yaml")
    core = yaml.safe_load(preset.read_text(encoding="utf-8"))["core"]
    return student_need(core, tokens * len(sizes), optimizer=config.distill.optimizer), [
        teacher_need(size, tokens) for size in sizes
    ]


def this_machine() -> tuple[tuple[NodeShape, ...], str]:
    """The node that this command runs on, as its free memory is now, and how it was found."""
    free = psutil.virtual_memory().available
    gpus = _free_gpu_bytes()
    return (NodeShape(gpus, free),), "this machine now (--gpus describes another, such as --gpus 4x24GiB)"


def plan_document(plan: RunPlan) -> dict[str, Any]:
    """Everything as plain JSON values."""
    return {
        "cluster": plan.cluster,
        "nodes": [asdict(node) for node in plan.nodes],
        "speeds": asdict(plan.speeds),
        "teachers": [asdict(size) for size in plan.sizes],
        "training": asdict(plan.training),
        "extraction": asdict(plan.extraction),
        "refused": plan.refused,
    }


def render_plan(plan: RunPlan) -> str:
    """Two tables and what they come to."""
    parts = [f"cluster: {plan.cluster}: {_nodes(plan.nodes)}"]
    known = sum(size.source == "checkpoint" for size in plan.sizes)
    parts.append(
        f"teachers: {len(plan.sizes)}; sizes of {known} from the headers of their checkpoints, of {len(plan.sizes) - known} from the "
        "registry's estimate"
    )
    parts += ["", *_section("training, every teacher at every step", plan.training)]
    residents = sum(place.mode == "resident" and place.id != STUDENT for place in plan.training.places)
    if any(use.turns for use in plan.training.devices):
        parts.append(
            f"not all fit at once: cluster.resident_teachers={residents + 1} keeps {residents} awake and a place for whoever is woken"
        )
    parts += ["", *_section("extraction, each teacher once", plan.extraction)]
    if plan.refused:
        parts += [
            "",
            "A run would refuse " + ", ".join(f"{teacher} ({why})" for teacher, why in plan.refused.items()) + ".",
        ]
    parts += ["", "What each way of living would cost:", *_costs(plan.training)]
    speeds = plan.speeds
    parts += [
        "",
        f"Times assume {speeds.gpu_flops / 1e12:g} TFLOP/s a GPU, {speeds.cpu_flops / 1e9:g} GFLOP/s a CPU core, "
        f"{speeds.wake_bytes_per_s / 1e9:g} GB/s to wake and {speeds.disk_bytes_per_s / 1e9:g} GB/s to load: trust their ratios.",
    ]
    return "\n".join(parts)


# --- sizes --------------------------------------------------------------------------------------------------------------------


def _size(config: RunConfig, index: int, registry: TeacherRegistry, models_dir: Path | None) -> TeacherSize:
    teacher = config.teachers[index]
    if isinstance(teacher, RegistryTeacher):
        return _registry_size(registry, teacher.id, models_dir)
    folder = (
        resolve_path(teacher.path)
        if teacher.kind == "path"
        else find_checkpoint(teacher.id, teacher.repo, teacher.revision, models_dir=models_dir)
    )
    return size_of_checkpoint(teacher.id, folder, quantise=True, skip_modules=teacher.skip_modules)


def _registry_size(registry: TeacherRegistry, teacher: str, models_dir: Path | None) -> TeacherSize:
    entry = registry.get(teacher)
    folder = (models_dir or DEFAULT_MODELS_DIR) / teacher
    if not any(folder.glob("*.safetensors")):
        return size_of_entry(entry)
    return size_of_checkpoint(
        teacher,
        folder,
        quantise=entry.nf4 is not None,
        skip_modules=entry.nf4.skip_modules if entry.nf4 else (),
        active_share=(entry.active_billion_parameters or entry.billion_parameters) / entry.billion_parameters,
    )


def _free_gpu_bytes() -> tuple[int, ...]:
    """Free memory of each GPU as the driver's tool tells it; none where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    try:
        found = subprocess.run(  # nosec B603 # no shell, fixed arguments
            [tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True,
        )  # fmt: skip
        return tuple(int(line) * 2**20 for line in found.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()


# --- tables -------------------------------------------------------------------------------------------------------------------


def _section(title: str, placement: Placement) -> list[str]:
    rows = [("teacher", "GiB", "place", "where", "share", "computes", "moves", "moved GiB")]
    for place in placement.places:
        rows.append(
            (
                place.id,
                f"{place.device_bytes / GIB:.1f}",
                _mode(placement, place),
                " ".join(_device(slot.node, slot.gpu) for slot in place.slots),
                "" if place.slots[0].gpu is None else " ".join(f"1/{slot.sharers}" for slot in place.slots),
                _seconds(place.compute_seconds),
                _seconds(place.move_seconds),
                f"{place.moved_bytes / GIB:.1f}",
            )
        )
    lines = [
        f"{title}: {_seconds(placement.seconds)} in all, {placement.moved_bytes / GIB:.1f} GiB moved",
        *_table(rows),
    ]
    for use in placement.devices:
        turns = f", sleepers woken {use.turns} times" if use.turns else ""
        lines.append(
            f"{_device(use.node, use.gpu)}: {use.planned_bytes / GIB:.1f} of {use.capacity_bytes / GIB:.1f} GiB planned, "
            f"{_seconds(use.seconds)}{turns}"
        )
    return lines


def _mode(placement: Placement, place: Place) -> str:
    mode = f"sleeps ({place.wakes_from})" if place.mode == "sleeper" else place.mode
    if placement.num_waves > 1:
        mode += f", wave {place.wave + 1}"
    return mode if len(place.slots) == 1 else f"{mode}, {len(place.slots)} copies"


def _costs(placement: Placement) -> list[str]:
    rows = [("teacher", "resident", "asleep, per wake", "in a wave, per load", "streamed, per pass")]
    for place in placement.places:
        if place.id == STUDENT:
            continue
        cells = {
            choice.mode: f"{choice.device_bytes / GIB:.1f} GiB, moves {choice.moved_bytes / GIB:.1f} GiB, {_seconds(choice.seconds)}"
            if choice.fits
            else "does not fit"
            for choice in place.choices
        }
        rows.append((place.id, cells["resident"], cells["sleeper"], cells["wave"], cells["streamed"]))
    return _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _device(node: int, gpu: int | None) -> str:
    return f"node{node}" if gpu is None else f"node{node}:gpu{gpu}"


def _nodes(nodes: Sequence[NodeShape]) -> str:
    words = []
    for node in nodes:
        kinds = {size: node.gpu_bytes.count(size) for size in node.gpu_bytes}
        gpus = " + ".join(f"{number} x {size / GIB:.1f} GiB" for size, number in kinds.items()) or "no GPU"
        words.append(f"{gpus}, {node.host_bytes / GIB:.1f} GiB of memory")
    return "; ".join(words)


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds >= 0.05 or seconds == 0 else f"{seconds * 1000:.2g} ms"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
