"""The planner: nobody over memory, nobody left out, equal inputs equal plans, and a GPU more is never worse."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.serving.placement import (
    GIB,
    PROCESS_GPU_BYTES,
    PROCESS_HOST_BYTES,
    NodeShape,
    Placement,
    PlacementError,
    TenantNeed,
    parse_cluster,
    plan_placement,
)


def need(name: str, gib: float, *, flops: float = 1e15, layers: int = 32, work_gib: float = 0.25) -> TenantNeed:
    weight = int(gib * GIB)
    return TenantNeed(name, weight, int(work_gib * GIB), 4 * weight, weight // layers, flops)


def student(gib: float = 1.0) -> TenantNeed:
    return dataclasses.replace(need("student", gib), is_pinned=True, load_bytes=0, layer_bytes=0)


GIBS = st.floats(0.05, 40).map(lambda size: round(size, 2))
NEEDS = st.lists(st.tuples(GIBS, st.floats(1e12, 1e18)), min_size=1, max_size=9).map(
    lambda items: [need(f"t{n}", gib, flops=flops) for n, (gib, flops) in enumerate(items)]
)
NODES = st.lists(
    st.builds(
        NodeShape,
        st.lists(st.sampled_from([8, 16, 24, 24.3, 80]).map(lambda size: int(size * GIB)), max_size=3).map(tuple),
        st.sampled_from([16, 64, 256]).map(lambda size: size * GIB),
    ),
    min_size=1,
    max_size=2,
)
PURPOSES = st.sampled_from(["train", "extract"])


def device_peaks(placement: Placement, needs: list[TenantNeed]) -> dict[tuple[int, int | None], int]:
    """Bytes of each device at its fullest, counted anew from the places alone."""
    by_id = {item.id: item for item in needs}
    awake: dict[tuple[int, int | None, int], int] = {}
    asleep: dict[tuple[int, int | None], list[tuple[int, int]]] = {}
    for place in placement.places:
        item = by_id[place.id]
        for slot in place.slots:
            process = PROCESS_HOST_BYTES if slot.gpu is None else PROCESS_GPU_BYTES
            weights = 2 * item.layer_bytes if place.mode == "streamed" else item.weight_bytes
            working = weights + item.workspace_bytes + process
            if place.mode == "sleeper":
                held = process if place.wakes_from == "host" else 0
                asleep.setdefault((slot.node, slot.gpu), []).append((working, held))
            else:
                key = slot.node, slot.gpu, place.wave
                awake[key] = awake.get(key, 0) + working
    peaks: dict[tuple[int, int | None], int] = {}
    for (node, gpu, _), used in awake.items():
        peaks[node, gpu] = max(peaks.get((node, gpu), 0), used)
    for device, sleepers in asleep.items():
        # Whoever is awake, the others that sleep in the node's memory keep their processes.
        held = sum(process for _, process in sleepers)
        peaks[device] = peaks.get(device, 0) + max(working + held - process for working, process in sleepers)
    return peaks


@settings(max_examples=30, deadline=None)
@given(NEEDS, NODES, PURPOSES, st.booleans())
def test_no_device_and_no_node_is_ever_over_its_memory_and_nobody_is_left_out(needs, nodes, purpose, has_student):
    needs = [student(), *needs] if has_student and purpose == "train" else needs
    try:
        placement = plan_placement(needs, nodes, purpose=purpose)
    except PlacementError:
        return
    assert [place.id for place in placement.places] == [item.id for item in needs]
    assert all(place.slots for place in placement.places)
    for (node, gpu), peak in device_peaks(placement, needs).items():
        free = nodes[node].host_bytes if gpu is None else nodes[node].gpu_bytes[gpu]
        assert peak <= free
        use = next(use for use in placement.devices if (use.node, use.gpu) == (node, gpu))
        assert peak <= use.planned_bytes <= use.capacity_bytes == free
    for number, node in enumerate(nodes):
        held = sum(place.host_bytes for place in placement.places if place.slots[0].node == number)
        assert held <= node.host_bytes


@settings(max_examples=20, deadline=None)
@given(NEEDS, NODES, PURPOSES, st.sampled_from([4, 24, 80]), st.integers(0, 3))
def test_adding_a_gpu_never_makes_the_estimate_worse(needs, nodes, purpose, gib, where):
    try:
        before = plan_placement(needs, nodes, purpose=purpose).seconds
    except PlacementError:
        return
    grown = list(nodes)
    if where < len(nodes):
        grown[where] = NodeShape((*nodes[where].gpu_bytes, gib * GIB), nodes[where].host_bytes)
    else:
        grown.append(NodeShape((gib * GIB,), 16 * GIB))
    assert plan_placement(needs, grown, purpose=purpose).seconds <= before


@settings(max_examples=12, deadline=None)
@given(NEEDS, NODES, PURPOSES)
def test_shares_are_unit_fractions_that_never_exceed_a_device_and_copies_lie_on_different_devices(
    needs, nodes, purpose
):
    try:
        placement = plan_placement(needs, nodes, purpose=purpose)
    except PlacementError:
        return
    assert placement == plan_placement(list(needs), list(nodes), purpose=purpose)
    shares: dict[tuple[int, int | None, int], list[int]] = {}
    for place in placement.places:
        assert len({(slot.node, slot.gpu) for slot in place.slots}) == len(place.slots)
        for slot in place.slots:
            shares.setdefault((slot.node, slot.gpu, place.wave), []).append(slot.sharers)
    for sharers in shares.values():
        # 1 / n each, and at most n of them at a time.
        assert len(set(sharers)) == 1
        assert len(sharers) <= sharers[0]


def test_what_fits_is_resident_and_costs_no_swapping():
    placement = plan_placement([need("a", 4), need("b", 6)], parse_cluster("1x24GiB"), purpose="train")
    assert [place.mode for place in placement.places] == ["resident", "resident"]
    assert placement.devices[0].turns == 0


def test_a_second_gpu_halves_the_work_by_a_copy_of_the_slowest():
    one = plan_placement([need("a", 4, flops=1e17)], parse_cluster("1x24GiB"), purpose="train")
    two = plan_placement([need("a", 4, flops=1e17)], parse_cluster("2x24GiB"), purpose="train")
    assert len(two.places[0].slots) == 2
    assert two.places[0].compute_seconds == pytest.approx(one.places[0].compute_seconds / 2)


def test_training_puts_to_sleep_what_does_not_fit_and_extraction_runs_it_in_waves():
    needs = [need(name, 9, flops=1e17) for name in "abcd"]
    nodes = parse_cluster("1x24GiB/64GiB")
    training = plan_placement(needs, nodes, purpose="train")
    modes = [place.mode for place in training.places]
    assert modes.count("resident") == 1
    assert modes.count("sleeper") == 3
    assert {place.wakes_from for place in training.places} == {None, "host"}
    extraction = plan_placement(needs, nodes, purpose="extract")
    assert sorted(place.wave for place in extraction.places) == [0, 0, 1, 1]
    assert extraction.num_waves == 2


def test_swapping_stays_below_a_tenth_of_the_computation_where_there_is_enough_of_it():
    needs = [need(name, 9, flops=1e18) for name in "abc"]
    placement = plan_placement(needs, parse_cluster("1x24GiB/64GiB"), purpose="train")
    swapping = sum(place.move_seconds for place in placement.places)
    assert swapping < 0.1 * sum(place.compute_seconds for place in placement.places) + 3 * 40
    assert placement.devices[0].turns == 20


def test_sleepers_that_cost_nothing_to_wake_are_gone_through_as_often_as_any():
    needs = [dataclasses.replace(need(name, 9), load_bytes=0) for name in "abc"]
    placement = plan_placement(needs, parse_cluster("1x24GiB/0.5GiB"), purpose="train")
    assert placement.devices[0].turns == 20


def test_without_node_memory_a_sleeper_wakes_from_disk_and_keeps_nothing_on_the_gpu():
    needs = [need(name, 9, flops=1e17) for name in "abc"]
    placement = plan_placement(needs, parse_cluster("1x24GiB/0.5GiB"), purpose="train")
    assert {place.wakes_from for place in placement.places if place.mode == "sleeper"} == {"disk"}
    assert all(place.host_bytes == 0 for place in placement.places)


def test_a_teacher_larger_than_every_gpu_is_streamed_in_two_layers():
    placement = plan_placement(
        [need("huge", 536, layers=64), need("a", 2)], parse_cluster("2x24GiB"), purpose="extract"
    )
    huge = placement.place_of("huge")
    assert huge.mode == "streamed"
    assert huge.device_bytes == 2 * (536 * GIB // 64) + GIB // 4 + PROCESS_GPU_BYTES
    assert placement.place_of("a").mode == "resident"


def test_the_student_never_sleeps_and_has_one_copy():
    placement = plan_placement(
        [student(10), *(need(name, 9, flops=1e17) for name in "abc")], parse_cluster("2x24GiB"), purpose="train"
    )
    assert placement.place_of("student").mode == "resident"
    assert len(placement.place_of("student").slots) == 1


def test_a_machine_without_gpus_holds_teachers_in_its_memory():
    placement = plan_placement([need("a", 4), need("b", 4)], [NodeShape((), 16 * GIB)], purpose="train")
    assert all(slot.gpu is None for place in placement.places for slot in place.slots)


def test_a_large_and_some_small_cards_are_used_together():
    needs = [need("large", 40, flops=1e17), *(need(name, 9, flops=1e17) for name in "abcd")]
    placement = plan_placement(needs, parse_cluster("1x80GiB+2x24GiB"), purpose="extract")
    assert placement.place_of("large").slots[0].gpu == 0
    assert {slot.gpu for place in placement.places for slot in place.slots} == {0, 1, 2}


def test_what_cannot_fit_at_all_is_refused_with_need_and_have():
    with pytest.raises(PlacementError, match=r"30\.\d GiB free for 'student', found 24\.0 GiB on the largest GPU"):
        plan_placement([student(28)], parse_cluster("4x24GiB/8GiB"), purpose="train")


def test_the_cost_of_every_way_of_living_is_told():
    placement = plan_placement([need("a", 4), need("huge", 99)], parse_cluster("1x24GiB"), purpose="extract")
    cells = {(place.id, choice.mode): choice for place in placement.places for choice in place.choices}
    assert {mode for _, mode in cells} == {"resident", "sleeper", "wave", "streamed"}
    assert cells["a", "resident"].fits
    assert not cells["huge", "resident"].fits
    assert cells["a", "streamed"].device_bytes < cells["a", "resident"].device_bytes
    assert cells["a", "wave"].device_bytes == 0


def test_sixty_four_gpus_and_twenty_three_teachers_are_planned_for():
    needs = [need(f"t{n}", 0.5 + n, flops=1e16 * (n + 1)) for n in range(23)]
    placement = plan_placement(needs, parse_cluster(",".join(["8x80GiB"] * 8)), purpose="extract")
    assert {place.mode for place in placement.places} == {"resident"}
    assert max(len(place.slots) for place in placement.places) > 1


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("4x24GiB", [NodeShape((24 * GIB,) * 4, 96 * GIB)]),
        ("1x80GB/100GiB", [NodeShape((80 * 10**9,), 100 * GIB)]),
        ("1x24GiB+1x80GiB, 2x8GiB/1TiB", [NodeShape((24 * GIB, 80 * GIB), 104 * GIB), NodeShape((8 * GIB,) * 2, 1024 * GIB)]),
        ("0x0GiB/64GiB", [NodeShape((), 64 * GIB)]),
    ],
)  # fmt: skip
def test_a_cluster_is_read_from_its_text(text, nodes):
    assert list(parse_cluster(text)) == nodes


@pytest.mark.parametrize(
    "text", ["", "four", "4x24", "4x24GiB/", "x24GiB", "4x-1GiB", "4x0GiB", "4x24GiB,,", "0x24GiB"]
)
def test_a_cluster_that_cannot_be_read_is_refused_in_one_line(text):
    with pytest.raises(PlacementError, match="Expected GPUs as 4x24GiB") as caught:
        parse_cluster(text)
    assert "\n" not in str(caught.value)
