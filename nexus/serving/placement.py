"""A place for every teacher: sizes and GPUs in; residents, sleepers, waves, streamed ones, replicas and their cost out.

Pure: no torch, no Ray, no clock, no randomness; equal inputs give equal plans. Two purposes have two plans. While a student *trains*,
every teacher is asked at every step: what does not fit sleeps (in the node's memory where that has room, else on disk) and is woken
for many batches at once, so that swapping stays below a tenth of the computation. *Extraction* asks each teacher once: what does not
fit together runs in waves. A teacher that exceeds the largest device is streamed layer by layer.

Adding a GPU never makes the estimate worse, by construction: the plan is the best one over a family of sub-clusters, and the
family of a larger cluster contains that of a smaller one. A sub-cluster is `k` devices of `m` bytes (or two such tiers), each with
`h` bytes of its node's memory; it belongs to every cluster that has so much.

Times are estimates from `Speeds`; only their ratios should be trusted. Fractions of a GPU are always 1/n: Ray cannot always place
others. Bytes are bytes, seconds are seconds, FLOPs are multiply-adds times two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nexus.errors import UserError

GIB = 2**30
PROCESS_GPU_BYTES = 512 * 2**20
"""A CUDA context with its libraries' workspaces, which no other process shares."""
PROCESS_HOST_BYTES = 440 * 2**20
"""Private memory of a Python process that has imported torch, transformers and bitsandbytes: 0.40 GiB measured, and room for Ray."""
USABLE = 0.95
"""Share of a device that is planned with; the rest is lost to fragments of the allocator."""
SWAP_SHARE = 0.1
"""Largest share of the computation that swapping may add, where there are batches enough to wake a teacher for."""
MAX_LINEAR_DEVICES = 48
"""Up to so many devices every number of them is tried, beyond it every fourth power of two's quarter."""
MAX_DEVICES = 256
"""Of one size that a plan uses: more would only take further copies of the slowest teacher, and seconds to try."""

STREAMED_PASSES = 4
"""Times that a streamed teacher's files are read: the hidden states of all rows between two layers seldom fit the memory at once."""
STREAMED_SPEED = 0.5
"""Of a device that waits for the next layer, against one that holds them all."""
TURNS = 20
"""How often training goes through its sleepers, where swapping so often stays below that share: a student that met a teacher only
once would forget it."""

Purpose = Literal["train", "extract"]
Mode = Literal["resident", "sleeper", "streamed"]
WakeSource = Literal["host", "disk"]


class PlacementError(UserError):
    """Something does not fit, however it is arranged."""


# --- what is known ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TenantNeed:
    """What one teacher (or the student) needs."""

    id: str
    weight_bytes: int
    """Quantised weights in memory."""
    workspace_bytes: int
    """Beside the weights while it answers: activations, logits, one dequantised matrix."""
    load_bytes: int
    """Read from disk to load it once."""
    layer_bytes: int
    """Largest part that has to be in memory at once when it is streamed."""
    flops: float
    """Of all rows that it is expected to see."""
    is_pinned: bool = False
    """Never sleeps, is never streamed, never has a second copy: the student."""


@dataclass(frozen=True)
class NodeShape:
    """One machine: free bytes of each GPU, and of its memory."""

    gpu_bytes: tuple[int, ...]
    host_bytes: int


@dataclass(frozen=True)
class Speeds:
    """What the times are estimated with."""

    gpu_flops: float = 2.5e13
    """Of NF4 weights dequantised to bfloat16, batches of some thousand tokens; a quarter of what a data-centre card reaches."""
    cpu_flops: float = 2e10
    """Of one core in float32."""
    wake_bytes_per_s: float = 2e10
    """From pinned host memory over PCIe 4.0 x16."""
    disk_bytes_per_s: float = 1.5e9
    """From a local NVMe disk."""
    start_seconds: float = 5.0
    """Of a process that imports torch and transformers, before it reads a byte."""


# --- the plan -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Where one copy runs."""

    node: int
    gpu: int | None
    """Index within the node; None on a machine without GPUs."""
    sharers: int
    """The copy holds 1 / sharers of the device."""


@dataclass(frozen=True)
class Choice:
    """What one way of living would cost a teacher on its device."""

    mode: Literal["resident", "sleeper", "wave", "streamed"]
    fits: bool
    device_bytes: int
    """Held all the time."""
    host_bytes: int
    moved_bytes: int
    """Each time it is loaded, woken or passed through."""
    seconds: float
    """Each time likewise; for streaming one pass with all rows, computation included."""


@dataclass(frozen=True)
class Place:
    """One teacher's place."""

    id: str
    mode: Mode
    slots: tuple[Slot, ...]
    """One for each copy; rows are divided evenly."""
    wave: int
    """Counted from 0; always 0 in training."""
    wakes_from: WakeSource | None
    """Of a sleeper."""
    device_bytes: int
    """Of each copy while it works, its process included."""
    host_bytes: int
    """Of a sleeper in its node's memory."""
    compute_seconds: float
    """Of each copy."""
    move_seconds: float
    """Loading, and all its wakes or passes."""
    moved_bytes: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class DeviceUse:
    """What one device is given."""

    node: int
    gpu: int | None
    capacity_bytes: int
    """Free now."""
    planned_bytes: int
    """At the fullest moment."""
    seconds: float
    turns: int
    """How often the sleepers are gone through; 0 without any."""


@dataclass(frozen=True)
class Placement:
    """A place for every teacher, and what it costs."""

    purpose: Purpose
    places: tuple[Place, ...]
    """In the order of the needs."""
    devices: tuple[DeviceUse, ...]
    """Those in use."""
    num_waves: int
    seconds: float
    """Until the slowest device is done."""
    moved_bytes: int

    def place_of(self, tenant: str) -> Place:
        """The place of one teacher."""
        return next(place for place in self.places if place.id == tenant)


def plan_placement(
    needs: Sequence[TenantNeed], nodes: Sequence[NodeShape], *, purpose: Purpose, speeds: Speeds | None = None
) -> Placement:
    """The best placement found.

    Args:
        needs: at least one; ids are distinct.
        nodes: at least one. Machines without GPUs are used when none has one, or when what the GPUs offer is worse.
        purpose: decides whether what does not fit sleeps (`train`) or waits for its wave (`extract`).
        speeds: None takes the defaults.

    Raises:
        PlacementError: when something does not fit even alone and streamed; the message says what, and how much there is.
    """
    assert needs, "a run has teachers"
    assert len({need.id for need in needs}) == len(needs), "ids are distinct"
    planner = _Planner(tuple(needs), tuple(nodes), purpose, speeds or Speeds())
    best: _Draft | None = None
    for family in planner.families():
        draft = planner.draft(family)
        if draft is not None and (best is None or draft.rank < best.rank):
            best = draft
    if best is None:
        raise planner.refusal()
    return planner.realise(best)


# --- sub-clusters -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """Devices of one or two sizes, each with a share of its node's memory; what the search enumerates."""

    is_gpu: bool
    capacities: tuple[int, ...]
    """Descending."""
    host_share: int


_HOST_SHARES = (0, *(GIB << power for power in range(12)))
"""A fixed ladder, so that a larger cluster's family contains a smaller one's."""


def _counts(limit: int) -> Iterator[int]:
    """Numbers of devices that are tried, ascending; those of a larger limit contain those of a smaller one."""
    number = 1
    while number <= min(limit, MAX_DEVICES):
        yield number
        number += 1 if number < MAX_LINEAR_DEVICES else 1 << (number.bit_length() - 3)


def _tier_counts(limit: int) -> list[int]:
    """As `_counts`, sparser: numbers for one of two tiers."""
    return [number for number in _counts(limit) if number <= 8 or number % 4 == 0]


def _rounded(size: int) -> int:
    """At most 3 % less: cards of one kind differ by some megabytes, and every size more squares the search."""
    shift = max(0, size.bit_length() - 6)
    return size >> shift << shift


# --- one draft ----------------------------------------------------------------------------------------------------------------


@dataclass
class _Tenancy:
    """One device of a draft while it is filled."""

    capacity: int
    tenants: list[int] = field(default_factory=list)
    seconds: float = 0.0
    used: int = 0
    fixed: int = 0
    """Of those who can neither sleep nor wait."""


_Modes = dict[int, tuple[Mode, int, "WakeSource | None"]]
"""Need -> mode, wave, where it wakes from."""


@dataclass(frozen=True)
class _DevicePlan:
    modes: _Modes
    planned_bytes: int
    seconds: float
    turns: int
    moves: dict[int, tuple[float, int]]
    """Need -> seconds and bytes moved."""
    num_waves: int


@dataclass(frozen=True)
class _Draft:
    family: _Family
    tenants: tuple[tuple[int, ...], ...]
    devices: tuple[_DevicePlan, ...]
    copies: dict[int, int]

    @property
    def rank(self) -> tuple[float, ...]:
        """Less is better: the slowest device's time, then that of the next, and so on; of equal ones fewer devices.

        One slow teacher can decide the first for every plan, and the others are to have their GPUs all the same.
        """
        return tuple(sorted((device.seconds for device in self.devices), reverse=True))


class _Planner:
    def __init__(
        self, needs: tuple[TenantNeed, ...], nodes: tuple[NodeShape, ...], purpose: Purpose, speeds: Speeds
    ) -> None:
        self.needs = needs
        self.nodes = nodes
        self.purpose = purpose
        self.speeds = speeds
        self._awake: set[tuple[bool, tuple[int, ...]]] = set()
        """Sub-clusters on which nobody has to sleep."""

    # --- families -----------------------------------------------------------------------------------------------------------------

    def families(self) -> Iterator[_Family]:
        """All sub-clusters that are tried, those without node memory first."""
        for is_gpu in (True, False):
            sizes = sorted({size for _, _, size in self._devices(is_gpu)}, reverse=True)
            # A machine without GPUs wakes its sleepers from disk: their memory would be its own.
            for share in _HOST_SHARES if is_gpu and self.purpose == "train" else (0,):
                for size in sizes:
                    for count in _counts(self._count(is_gpu, size, share)):
                        yield _Family(is_gpu, (size,) * count, share)
                for index, large in enumerate(sizes):
                    for small in sizes[index + 1 :]:
                        total = self._count(is_gpu, small, share)
                        for first in _tier_counts(self._count(is_gpu, large, share)):
                            for second in _tier_counts(total - first):
                                yield _Family(is_gpu, (large,) * first + (small,) * second, share)

    def _devices(self, is_gpu: bool) -> list[tuple[int, int | None, int]]:
        """(node, gpu, bytes to plan with) of every device, in order."""
        if is_gpu:
            return [
                (n, g, _rounded(size)) for n, node in enumerate(self.nodes) for g, size in enumerate(node.gpu_bytes)
            ]
        return [(n, None, _rounded(node.host_bytes)) for n, node in enumerate(self.nodes)]

    def _count(self, is_gpu: bool, size: int, share: int) -> int:
        """Devices of at least `size` bytes that can each have `share` bytes of their node's memory."""
        per_node: dict[int, int] = {}
        for node, _, found in self._devices(is_gpu):
            per_node[node] = per_node.get(node, 0) + (found >= size)
        return sum(min(number, self._shares(node, share)) for node, number in per_node.items())

    def _shares(self, node: int, share: int) -> int:
        return len(self.nodes[node].gpu_bytes) + 1 if share == 0 else self.nodes[node].host_bytes // share

    # --- drafts -------------------------------------------------------------------------------------------------------------------

    def draft(self, family: _Family) -> _Draft | None:
        """The better of two ways to fill the family's devices; None when neither fits."""
        shape = family.is_gpu, family.capacities
        if shape in self._awake:
            return None  # nobody sleeps there: node memory changes nothing
        drafts = [self._fill(family, by_work=by_work) for by_work in (True, False)]
        found = [draft for draft in drafts if draft is not None]
        if not found:
            return None
        best = min(found, key=lambda draft: draft.rank)
        if not any(plan.turns for plan in best.devices):
            self._awake.add(shape)
        return best

    def _fill(self, family: _Family, *, by_work: bool) -> _Draft | None:
        devices = [_Tenancy(int(USABLE * capacity)) for capacity in family.capacities]
        order = sorted(
            range(len(self.needs)),
            key=lambda i: (
                not self.needs[i].is_pinned,
                not self._is_fixed(i, family),
                -self.needs[i].flops if by_work else -self._footprint(self.needs[i], family),
                -self._footprint(self.needs[i], family),
                self.needs[i].id,
            ),
        )
        for index in order:
            footprint = self._footprint(self.needs[index], family)
            able = [device for device in devices if device.fixed + footprint <= device.capacity]
            if not able:
                return None
            roomy = [device for device in able if device.used + footprint <= device.capacity]
            # Without room for one more resident, the device with the least to do gets one that sleeps or waits.
            chosen = min(roomy or able, key=lambda d: (d.seconds if by_work or not roomy else d.used, d.used))
            chosen.tenants.append(index)
            chosen.used += footprint
            chosen.fixed += footprint if self._is_fixed(index, family) else 0
            chosen.seconds += self._compute(index, 1, family) + self._load(index, family)[0]
        copies = dict.fromkeys(range(len(self.needs)), 1)
        if all(device.used <= device.capacity for device in devices):
            self._replicate(devices, copies, family)
        devices = [device for device in devices if device.tenants]
        plans = tuple(self._settle(device, copies, family) for device in devices)
        return _Draft(family, tuple(tuple(device.tenants) for device in devices), plans, copies)

    def _replicate(self, devices: list[_Tenancy], copies: dict[int, int], family: _Family) -> None:
        """Give the slowest device's largest teacher another copy elsewhere, as long as that shortens the whole."""

        while True:
            slowest = max(devices, key=lambda d: d.seconds)
            able = [i for i in slowest.tenants if not self.needs[i].is_pinned and not self._is_streamed(i, family)]
            if not able:
                return
            index = max(able, key=lambda i: (self._compute(i, copies[i], family), self.needs[i].id))
            footprint = self._footprint(self.needs[index], family)
            roomy = [d for d in devices if index not in d.tenants and d.used + footprint <= d.capacity]
            if not roomy:
                return
            target = min(roomy, key=lambda d: (d.seconds, d.used))
            part = self._compute(index, copies[index] + 1, family)
            saved = self._compute(index, copies[index], family) - part
            after = [
                d.seconds + (part + self._load_seconds(index) if d is target else -saved if index in d.tenants else 0.0)
                for d in devices
            ]
            if max(after) >= slowest.seconds * (1 - 1e-9):
                return
            for device, seconds in zip(devices, after, strict=True):
                device.seconds = seconds
            target.tenants.append(index)
            target.used += footprint
            copies[index] += 1

    def _settle(self, device: _Tenancy, copies: dict[int, int], family: _Family) -> _DevicePlan:
        """Who stays on one device, who sleeps or waits."""
        compute = sum(self._compute(i, copies[i], family) for i in device.tenants)
        if device.used <= device.capacity:
            moves = {i: self._load(i, family) for i in device.tenants}
            modes: _Modes = {i: (self._mode(i, family), 0, None) for i in device.tenants}
            seconds = compute + sum(s for s, _ in moves.values())
            return _DevicePlan(modes, device.used, seconds, 0, moves, 1)
        if self.purpose == "extract":
            return self._waves(device, compute, family)
        return self._sleepers(device, compute, family)

    def _waves(self, device: _Tenancy, compute: float, family: _Family) -> _DevicePlan:
        """First fit, largest first."""
        waves: list[list[int]] = []
        used: list[int] = []
        for index in sorted(device.tenants, key=lambda i: (-self._footprint(self.needs[i], family), self.needs[i].id)):
            footprint = self._footprint(self.needs[index], family)
            number = next((w for w, bytes_ in enumerate(used) if bytes_ + footprint <= device.capacity), len(waves))
            if number == len(waves):
                waves.append([])
                used.append(0)
            waves[number].append(index)
            used[number] += footprint
        moves = {i: self._load(i, family) for i in device.tenants}
        modes: _Modes = {i: (self._mode(i, family), number, None) for number, wave in enumerate(waves) for i in wave}
        return _DevicePlan(modes, max(used), compute + sum(s for s, _ in moves.values()), 0, moves, len(waves))

    def _sleepers(self, device: _Tenancy, compute: float, family: _Family) -> _DevicePlan:
        """The choice that swaps the fastest: one place is kept for whoever is awake, the rest is filled with residents.

        A sleeper in its node's memory keeps its process, and that a piece of the GPU; one on disk keeps nothing.
        """
        able = [i for i in device.tenants if not self._is_fixed(i, family)]
        found: list[tuple[float, int, dict[int, WakeSource]]] = []
        for largest in sorted(able, key=lambda i: (self._footprint(self.needs[i], family), self.needs[i].id)):
            for held in (PROCESS_GPU_BYTES, 0) if family.host_share else (0,):
                sleepers = self._asleep(device, able, largest, held, family)
                if sleepers is not None:
                    used, asleep = sleepers
                    sources, used = self._wake_sources(
                        asleep, family.host_share, None if held else device.capacity - used, used
                    )
                    found.append((sum(self._wake_seconds(i, source) for i, source in sources.items()), used, sources))
        assert found, "whoever was put here fits beside those who never sleep"
        once, used, sources = min(found, key=lambda item: item[:2])
        # Waking that costs nothing is no reason for fewer turns.
        turns = max(1, min(TURNS, int(SWAP_SHARE * compute / once))) if once else TURNS
        moves = {i: self._load(i, family) for i in device.tenants}
        for i, source in sources.items():
            bytes_ = self.needs[i].weight_bytes if source == "host" else self.needs[i].load_bytes
            moves[i] = moves[i][0] + turns * self._wake_seconds(i, source), moves[i][1] + turns * bytes_
        modes: _Modes = {
            i: ("sleeper", 0, sources[i]) if i in sources else (self._mode(i, family), 0, None) for i in device.tenants
        }
        return _DevicePlan(modes, used, compute + sum(s for s, _ in moves.values()), turns, moves, 1)

    def _asleep(
        self, device: _Tenancy, able: list[int], largest: int, held: int, family: _Family
    ) -> tuple[int, list[int]] | None:
        """Planned bytes and who sleeps, when nobody larger than `largest` may and a sleeper holds `held` bytes."""
        size = {i: self._footprint(self.needs[i], family) for i in device.tenants}
        asleep = {i for i in able if size[i] <= size[largest]}
        used = size[largest] + held * len(asleep) + sum(size[i] for i in device.tenants if i not in asleep)
        if used > device.capacity:
            return None
        order = sorted(asleep, key=lambda i: (-self.needs[i].weight_bytes, self.needs[i].id))
        for index in order:
            if used + size[index] - held <= device.capacity and len(asleep) > 1:
                asleep.discard(index)
                used += size[index] - held
        return used, [i for i in order if i in asleep]

    def _wake_sources(
        self, asleep: list[int], host_room: int, room: int | None, used: int
    ) -> tuple[dict[int, WakeSource], int]:
        """Node memory for the first ones, as long as there is some; `room` is None where the processes are counted in `used`."""
        sources: dict[int, WakeSource] = {}
        for index in asleep:
            weight = self.needs[index].weight_bytes
            fits = weight <= host_room and (room is None or room >= PROCESS_GPU_BYTES)
            sources[index] = "host" if fits else "disk"
            if fits:
                host_room -= weight
                if room is not None:
                    room -= PROCESS_GPU_BYTES
                    used += PROCESS_GPU_BYTES
        return sources, used

    # --- sizes and times ----------------------------------------------------------------------------------------------------------

    def _process(self, family: _Family) -> int:
        return PROCESS_GPU_BYTES if family.is_gpu else PROCESS_HOST_BYTES

    def _room(self, family: _Family) -> int:
        """What a teacher may take at most: all of the largest device, but for the student where there is only one such."""
        largest = family.capacities[0]
        alone = family.capacities.count(largest) == 1
        pinned = sum(self._whole(need, family) for need in self.needs if need.is_pinned) if alone else 0
        return int(USABLE * largest) - pinned

    def _whole(self, need: TenantNeed, family: _Family) -> int:
        return need.weight_bytes + need.workspace_bytes + self._process(family)

    def _is_streamed(self, index: int, family: _Family) -> bool:
        need = self.needs[index]
        return not need.is_pinned and self._whole(need, family) > self._room(family)

    def _is_fixed(self, index: int, family: _Family) -> bool:
        """Whether it holds its part of a device all the time."""
        return self.needs[index].is_pinned or (self.purpose == "train" and self._is_streamed(index, family))

    def _mode(self, index: int, family: _Family) -> Mode:
        return "streamed" if self._is_streamed(index, family) else "resident"

    def _footprint(self, need: TenantNeed, family: _Family) -> int:
        """Bytes of a device that a copy takes while it works."""
        whole = self._whole(need, family)
        if need.is_pinned or whole <= self._room(family):
            return whole
        return 2 * need.layer_bytes + need.workspace_bytes + self._process(family)

    def _compute(self, index: int, copies: int, family: _Family) -> float:
        speed = self.speeds.gpu_flops if family.is_gpu else self.speeds.cpu_flops
        if self._is_streamed(index, family):
            speed *= STREAMED_SPEED
        return self.needs[index].flops / copies / speed

    def _load(self, index: int, family: _Family) -> tuple[float, int]:
        """Seconds and bytes of loading, or of all passes of a streamed teacher."""
        times = STREAMED_PASSES if self._is_streamed(index, family) else 1
        return times * self._load_seconds(index), times * self.needs[index].load_bytes

    def _load_seconds(self, index: int) -> float:
        """Of one load, or of one pass of a streamed teacher."""
        need = self.needs[index]
        return self.speeds.start_seconds + need.load_bytes / self.speeds.disk_bytes_per_s if need.load_bytes else 0.0

    def _wake_seconds(self, index: int, source: WakeSource) -> float:
        if source == "host":
            return self.needs[index].weight_bytes / self.speeds.wake_bytes_per_s
        return self._load_seconds(index)

    # --- the result ---------------------------------------------------------------------------------------------------------------

    def realise(self, draft: _Draft) -> Placement:
        """Choose real devices for the draft's."""
        family = draft.family
        devices = self._choose(family)
        slots: dict[int, list[Slot]] = {}
        uses = []
        settled: _Modes = {}
        moves: dict[int, tuple[float, int]] = {}
        for (node, gpu, _), tenants, plan in zip(devices, draft.tenants, draft.devices, strict=False):
            waves = [plan.modes[i][1] for i in tenants]
            sharers = max(waves.count(wave) for wave in set(waves))
            for index in tenants:
                slots.setdefault(index, []).append(Slot(node, gpu, sharers))
                seconds, bytes_ = moves.get(index, (0.0, 0))
                moves[index] = max(seconds, plan.moves[index][0]), bytes_ + plan.moves[index][1]
            settled.update(plan.modes)
            free = self.nodes[node].host_bytes if gpu is None else self.nodes[node].gpu_bytes[gpu]
            uses.append(DeviceUse(node, gpu, free, plan.planned_bytes, plan.seconds, plan.turns))
        places = []
        for index, need in enumerate(self.needs):
            mode, wave, source = settled[index]
            places.append(
                Place(
                    id=need.id,
                    mode=mode,
                    slots=tuple(slots[index]),
                    wave=wave,
                    wakes_from=source,
                    device_bytes=self._footprint(need, family),
                    host_bytes=need.weight_bytes if source == "host" else 0,
                    compute_seconds=self._compute(index, draft.copies[index], family),
                    move_seconds=moves[index][0],
                    moved_bytes=moves[index][1],
                    choices=self._choices(index, family),
                )
            )
        return Placement(
            purpose=self.purpose,
            places=tuple(places),
            devices=tuple(uses),
            num_waves=max(plan.num_waves for plan in draft.devices),
            seconds=draft.rank[0],
            moved_bytes=sum(place.moved_bytes for place in places),
        )

    def _choose(self, family: _Family) -> list[tuple[int, int | None, int]]:
        """Real devices for the family's, in its order; those of a node never more than its memory has shares for."""
        left = {node: self._shares(node, family.host_share) for node in range(len(self.nodes))}
        free = sorted(self._devices(family.is_gpu), key=lambda device: (-device[2], device[0], device[1] or 0))
        chosen = []
        for capacity in family.capacities:
            device = next(d for d in free if d[2] >= capacity and left[d[0]] > 0)
            free.remove(device)
            left[device[0]] -= 1
            chosen.append(device)
        return chosen

    def _choices(self, index: int, family: _Family) -> tuple[Choice, ...]:
        """What each way of living would cost; the same for all devices of a cluster."""
        need = self.needs[index]
        process = self._process(family)
        whole = self._whole(need, family)
        sliced = 2 * need.layer_bytes + need.workspace_bytes + process
        room = int(USABLE * family.capacities[0]) if need.is_pinned else self._room(family)
        load = self._load_seconds(index)
        resident = Choice("resident", whole <= room, whole, 0, need.load_bytes, load)
        if need.is_pinned:
            return (resident,)
        host = family.host_share >= need.weight_bytes if family.is_gpu else False
        asleep = process if host else 0
        source: WakeSource = "host" if host else "disk"
        moved = need.weight_bytes if host else need.load_bytes
        return (
            resident,
            Choice("sleeper", whole <= room, asleep, need.weight_bytes if host else 0, moved, self._wake_seconds(index, source)),
            Choice("wave", whole <= room, 0, 0, need.load_bytes, load),
            Choice(
                "streamed", sliced <= room, sliced, 0, need.load_bytes, max(load, self._compute(index, 1, family))
            ),
        )  # fmt: skip

    def refusal(self) -> PlacementError:
        """Why nothing fits: whoever needs the most, on the largest device."""
        gpus, hosts = (max((size for _, _, size in self._devices(kind)), default=0) for kind in (True, False))
        largest = max(self.needs, key=lambda need: (self._least(need), need.id))
        pinned = [need for need in self.needs if need.is_pinned and need is not largest]
        together = f" beside {pinned[0].id!r} ({_gib(self._least(pinned[0]))})" if pinned else ""
        found = f"{_gib(gpus)} on the largest GPU and {_gib(hosts)} of memory" if gpus else f"{_gib(hosts)} of memory"
        return PlacementError(
            f"Expected a device with {_gib(self._least(largest))} free for {largest.id!r}{together}, found {found}. "
            "Use a larger device, a smaller batch, or leave it out."
        )

    def _least(self, need: TenantNeed) -> int:
        """Bytes without which it cannot work at all, on a GPU."""
        part = need.weight_bytes if need.is_pinned else min(need.weight_bytes, 2 * need.layer_bytes)
        return int((part + need.workspace_bytes + PROCESS_GPU_BYTES) / USABLE)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


# --- the shape of a cluster as text -------------------------------------------------------------------------------------------


_SIZE = r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)"
_UNITS = {
    "B": 1,
    **{f"{letter}{i}B": (1024 if i else 1000) ** n for n, letter in enumerate("KMGT", 1) for i in ("", "i")},
}
_EXAMPLES = "4x24GiB, 4x24GiB+2x80GiB (one node), 8x80GiB/512GiB,8x80GiB/512GiB (two nodes with their memory), 0x0GiB/64GiB (no GPU)"


def parse_cluster(text: str) -> tuple[NodeShape, ...]:
    """The nodes that `--gpus` describes: groups `NxSIZE` joined by `+`, nodes by `,`, a node's own memory behind `/`.

    Where no memory is given, a node is taken to have as much as its GPUs together.

    Raises:
        PlacementError: one line that shows what is admitted.
    """
    nodes = []
    for part in text.split(","):
        gpus_text, slash, host_text = part.partition("/")
        gpus: list[int] = []
        for group in gpus_text.split("+"):
            match = re.fullmatch(rf"\s*(\d{{1,4}})x{_SIZE}\s*", group)
            if match is None:
                raise _no_cluster(text, group)
            gpus += [int(float(match[2]) * _UNITS[match[3]])] * int(match[1])
        host = sum(gpus)
        if slash:
            match = re.fullmatch(rf"\s*{_SIZE}\s*", host_text)
            if match is None:
                raise _no_cluster(text, host_text)
            host = int(float(match[1]) * _UNITS[match[2]])
        if host == 0 or 0 in gpus:
            raise _no_cluster(text, part)
        nodes.append(NodeShape(tuple(gpus), host))
    return tuple(nodes)


def _no_cluster(text: str, part: str) -> PlacementError:
    found = f"{part.strip()!r} in {text!r}" if part.strip() != text.strip() else repr(text)
    return PlacementError(f"Expected GPUs as {_EXAMPLES}, found {found}. Correct --gpus.")
