"""The teachers of a run as one object: create or attach, a bounded window per actor, timeouts, bounded retries per call.

Where not all teachers fit together, `Sleep` says how many may be awake: another is woken when one without work has been put to
sleep, the least recently used first. A teacher that is awake does all that waits for it before it may be put to sleep, and a sleeper
is left asleep until a whole turn waits for it or a caller cannot go on without it: so a swap pays for many calls.

A teacher may have several replicas; its calls go to whichever has least to do, and it is there as long as one of them is.
Results are kept under the caller's key until collected, in whatever order they arrive; a caller that collects in its own order
therefore sees the same values whichever teacher was faster, slower or killed. Retries live here and not in Ray
(`max_task_retries=0`), because every call is a pure function of its request and a poisonous one must end.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

from actors.teacher import CONTROL_GROUP, ActorHealth, LoadReport, TeacherActor, replica_suffix
from nexus.errors import NexusError, TeacherUnavailableError
from nexus.vendors.environments import ENVIRONMENTS, interpreter_of, process_environment, what_to_type

if TYPE_CHECKING:
    from nexus.config import RunConfig
    from nexus.towers.registry import TeacherSpec

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
LOADS_AT_ONCE = 2
"""Teachers of one node that start at once: one loads while the next imports its libraries. Fifteen at once on two cores kept each
other from answering Ray until it ended them."""
POLL_S = 0.5
"""Longest single wait inside Ray, so that signals and deadlines are seen."""


def runtime_environment(spec: TeacherSpec) -> dict[str, Any] | None:
    """A vendor's teacher runs in the environment of its package; all others run where the driver does.

    Raises:
        TeacherUnavailableError: the environment has not been made.
    """
    if spec.library not in ENVIRONMENTS:
        return None
    python = interpreter_of(spec.library)
    if python is None:
        raise TeacherUnavailableError(
            f"Expected the environment of teacher {spec.id!r}, found none. It needs {what_to_type(spec.library)}"
        )
    return {"py_executable": str(python), "env_vars": process_environment()}


def actor_name(teacher: str, replica: int = 0) -> str:
    """Name under which an actor of a teacher is found in the run's namespace: `teacher:ID`, `teacher:ID#2`, `teacher:ID#3`."""
    return f"teacher:{teacher}{replica_suffix(replica)}"


FIRST_BACKOFF_S = 1.0
"""Wait before a call is repeated to an actor that died, doubled each time."""
SLEEP_TIMEOUT_S = 120.0
"""Putting a model aside copies its weights at most once; longer than that, the process is restarted."""


@dataclass(frozen=True)
class Sleep:
    """How teachers share memory that does not hold them all."""

    residents: int
    """Teachers that are awake at a time; on each device, the pinned ones aside."""
    max_kept_bytes: int
    """Private memory that the process of a sleeping teacher may keep; beyond it, it is restarted, which gives back everything."""
    turn: int = 1
    """Calls that have to wait for a sleeper before it is woken while nobody needs it yet."""
    pinned: frozenset[str] = frozenset()
    """Teachers that never sleep."""
    device_of: Mapping[str, str] = field(default_factory=dict)
    """Teacher -> device; those that it leaves out share one."""


@dataclass
class _Call:
    key: Hashable
    teacher: str
    method: str
    arguments: tuple[Any, ...]
    timeout_s: float
    """Longest wait for this call alone."""
    replica: int | None = None
    """The only replica that may answer; None for any."""
    attempts: int = 0
    deadline: float = 0.0
    not_before: float = 0.0
    """Of a repeat: a process takes seconds to start, on a busy machine more."""


@dataclass
class _Lane:
    """One teacher's queue and the windows of its replicas."""

    handles: dict[int, Any]
    """By replica; those that died for good are taken out."""
    waiting: deque[_Call] = field(default_factory=deque)
    in_flight: dict[Any, tuple[int, _Call]] = field(default_factory=dict)

    def load_of(self, replica: int) -> int:
        """Calls that a replica has in flight."""
        return sum(flying == replica for flying, _ in self.in_flight.values())


def sleep_of(config: RunConfig) -> Sleep | None:
    """How the teachers of a run share memory; None when all stay awake."""
    residents = config.cluster.resident_teachers
    if residents is None or residents >= len(config.teachers):
        return None
    return Sleep(residents, config.cluster.sleeper_mib * 2**20, config.cluster.turn_batches)


class TeacherPool:
    """Calls teachers by id; not thread-safe."""

    def __init__(
        self,
        handles: Mapping[str, Sequence[Any]],
        *,
        window: int,
        timeout_s: float,
        max_retries: int,
        on_event: Callable[[str, str, str], None] | None = None,
        check: Callable[[], None] | None = None,
        sleep: Sleep | None = None,
    ) -> None:
        """`handles` are the replicas of each teacher.

        `on_event(kind, teacher, reason)` hears of every retry; `check` is called while waiting and may raise to end the wait.
        """
        self._lanes = {teacher: _Lane(dict(enumerate(replicas))) for teacher, replicas in handles.items()}
        self._window = window
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._on_event = on_event
        self._check = check
        self._done: dict[Hashable, Any] = {}
        self._pending: set[Hashable] = set()
        self._sleep = sleep
        self._awake: dict[str, None] = {}
        """The least recently used first; kept only where teachers sleep."""
        self.swaps = 0
        """Times that a teacher was put to sleep."""
        self._before = {teacher: self._cost(teacher) for teacher in self._lanes} if sleep is not None else {}
        """Seconds of swaps and of computation when this pool came."""

    @classmethod
    def start(
        cls,
        specs: Sequence[TeacherSpec],
        *,
        replicas: Mapping[str, int] | None = None,
        torch_threads: int,
        num_gpus: float = 0.0,
        places: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        window: int,
        timeout_s: float,
        max_retries: int,
        load_timeout_s: float,
        check: Callable[[], None] | None = None,
        sleep: Sleep | None = None,
    ) -> tuple[TeacherPool, dict[str, LoadReport]]:
        """Create the teachers' actors and load them, a few at a time on each node.

        Args:
            replicas: actors of each teacher; one where nothing is said.
            num_gpus: of each actor, where `places` says nothing.
            places: options of each replica of a teacher: its part of a GPU, and which one.
            sleep: None keeps all awake.

        Raises:
            TowerLoadError: from the first teacher that cannot load.
            TeacherUnavailableError: when a teacher does not answer within `load_timeout_s`.
        """
        remote = ray.remote(concurrency_groups={CONTROL_GROUP: 1})(TeacherActor)  # type: ignore[call-overload]  # Ray left it out of its types
        pool = cls(
            {spec.id: () for spec in specs},
            window=window,
            timeout_s=timeout_s,
            max_retries=max_retries,
            check=check,
            sleep=sleep,
        )
        at_once = LOADS_AT_ONCE * sum(node["Alive"] for node in ray.nodes())
        reports: dict[Hashable, LoadReport] = {}
        loading: list[Hashable] = []
        for spec in specs:
            for replica in range((replicas or {}).get(spec.id, 1)):
                if len(loading) == at_once:
                    first = pool.collect_first(loading)
                    loading.remove(first)
                    reports[first] = pool.collect(first)
                pool._lanes[spec.id].handles[replica] = remote.options(
                    name=actor_name(spec.id, replica),
                    get_if_exists=True,
                    num_cpus=0,
                    **(places[spec.id][replica] if places else {"num_gpus": num_gpus}),
                    # A restart that gives back a sleeper's memory counts as well.
                    max_restarts=MAX_RESTARTS if sleep is None else -1,
                    max_task_retries=0,
                    max_pending_calls=4 * window + 16,
                    allow_out_of_order_execution=True,
                    runtime_env=runtime_environment(spec),
                ).remote(spec, torch_threads, replica)
                key = ("load", spec.id, replica)
                pool._queue(_Call(key, spec.id, "load", (), load_timeout_s, replica))
                loading.append(key)
        reports.update({key: pool.collect(key) for key in loading})
        return pool, {spec.id: reports["load", spec.id, 0] for spec in specs}

    @classmethod
    def attach(
        cls,
        teachers: Sequence[str],
        *,
        window: int,
        timeout_s: float,
        max_retries: int,
        on_event: Callable[[str, str, str], None] | None = None,
        sleep: Sleep | None = None,
    ) -> TeacherPool:
        """The pool of actors that another process of the run created, with all their replicas.

        Raises:
            TeacherUnavailableError: when a teacher's actor is not in the namespace.
        """
        handles = {}
        for teacher in teachers:
            handles[teacher] = list(_existing(teacher))
            if not handles[teacher]:
                raise TeacherUnavailableError(
                    f"Expected the actor {actor_name(teacher)!r} in this run's namespace, found none. Start the run again."
                )
        return cls(handles, window=window, timeout_s=timeout_s, max_retries=max_retries, on_event=on_event, sleep=sleep)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Ids in the order of creation."""
        return tuple(self._lanes)

    def num_replicas(self, teacher: str) -> int:
        """Actors of a teacher that have not died for good."""
        return len(self._lanes[teacher].handles)

    def capacity(self, teacher: str) -> int:
        """Calls that a teacher's actors take at once, running and next in line; where teachers sleep, those of a turn."""
        return max(self._window * self.num_replicas(teacher), 0 if self._sleep is None else self._sleep.turn)

    def health(self, teacher: str, *, replica: int = 0, timeout_s: float = 5.0) -> ActorHealth:
        """Health of one actor of a teacher through its control group, also while it works."""
        handle = self._lanes[teacher].handles[replica]
        reference = handle.health.options(concurrency_group=CONTROL_GROUP).remote()
        try:
            return ray.get(reference, timeout=timeout_s)
        except (GetTimeoutError, RayActorError) as error:
            raise TeacherUnavailableError(
                f"Expected {actor_name(teacher, replica)} to answer within {timeout_s:g} s, found {type(error).__name__}."
            ) from None

    def busy_share(self, teacher: str) -> float | None:
        """Of the time between its first and its last answer to calls like the last one, the share in which a teacher computed, by its
        own clock; the mean over replicas, None where none has answered twice."""
        healths = [self.health(teacher, replica=replica) for replica in self._lanes[teacher].handles]
        shares = [health.busy_share for health in healths if health.busy_share is not None]
        return sum(shares) / len(shares) if shares else None

    def swap_share(self) -> float:
        """Seconds in which teachers fell asleep and woke, against those in which they computed, since this pool came."""
        totals = [0.0, 0.0]
        for teacher, before in self._before.items():
            for index, (now, then) in enumerate(zip(self._cost(teacher), before, strict=True)):
                # A process that was restarted counts anew.
                totals[index] += now - then if now >= then else now
        swapped, computed = totals
        return swapped / computed if computed else 0.0

    def _cost(self, teacher: str) -> tuple[float, float]:
        """Seconds of swaps and of computation over all replicas, as far as they answer."""
        found = []
        for replica in self._lanes[teacher].handles:
            with suppress(TeacherUnavailableError):
                found.append(self.health(teacher, replica=replica))
        return sum(item.swap_seconds for item in found), sum(item.busy_seconds for item in found)

    def submit(self, key: Hashable, teacher: str, method: str, *arguments: Any) -> None:
        """Queue one call; it starts as soon as the window of a replica has room."""
        self._queue(_Call(key, teacher, method, arguments, self._timeout_s))

    def collect_first(self, keys: Sequence[Hashable]) -> Hashable:
        """The first of `keys` whose call is done, as soon as one is; its result, or error, is for `collect`."""
        assert all(key in self._pending or key in self._done for key in keys), "nothing was submitted under a key"
        while True:
            for key in keys:
                if key in self._done:
                    return key
            self._poll(keys)

    def collect(self, key: Hashable, *, timeout_s: float | None = None) -> Any:
        """The result of the call under `key`; other results that arrive meanwhile are kept.

        Raises:
            NexusError: what the teacher itself raised.
            TeacherUnavailableError: when the call failed `max_retries + 1` times, or `timeout_s` is over.
        """
        assert key in self._pending or key in self._done, f"nothing was submitted under {key!r}"
        limit = None if timeout_s is None else time.monotonic() + timeout_s
        while key not in self._done:
            if limit is not None and time.monotonic() > limit:
                raise TeacherUnavailableError(
                    f"Expected an answer within {timeout_s:g} s for {key!r}, found none. Raise the timeout or free the machine."
                )
            self._poll((key,))
        result = self._done.pop(key)
        if isinstance(result, BaseException):
            raise result
        return result

    def forget(self) -> None:
        """Drop every queued, running and finished call (after a rollback their batches are no longer wanted)."""
        for lane in self._lanes.values():
            lane.waiting.clear()
            lane.in_flight.clear()
        self._done.clear()
        self._pending.clear()

    def _queue(self, call: _Call) -> None:
        assert call.key not in self._pending | self._done.keys(), f"key {call.key!r} is in use"
        if self._sleep is not None and not self._pending:
            # Another pool of this run may have worked with the teachers meanwhile.
            self._look_who_is_awake(call.teacher)
        self._pending.add(call.key)
        self._lanes[call.teacher].waiting.append(call)
        self._pump()

    def _pump(self, keys: Sequence[Hashable] = ()) -> None:
        """Start what there is room for; `keys` are those that the caller waits for."""
        needed = self._who_is_needed(keys) if self._sleep is not None else frozenset()
        for teacher, lane in self._lanes.items():
            while lane.waiting and self._wake(teacher, is_needed=teacher in needed):
                call = lane.waiting[0]
                if call.not_before > time.monotonic():
                    break
                # Of equals the first.
                replica = min(lane.handles, key=lane.load_of) if call.replica is None else call.replica
                if lane.load_of(replica) >= self._window:
                    break
                lane.waiting.popleft()
                call.attempts += 1
                # An actor takes one call after the other.
                call.deadline = time.monotonic() + call.timeout_s * (lane.load_of(replica) + 1)
                reference = getattr(lane.handles[replica], call.method).remote(*call.arguments)
                lane.in_flight[reference] = (replica, call)

    # --- sleep --------------------------------------------------------------------------------------------------------------------

    def _wake(self, teacher: str, *, is_needed: bool) -> bool:
        """Whether a teacher may be asked; its first call then wakes it. Not while all that are awake have work, nor for little."""
        if self._sleep is None:
            return True
        if teacher not in self._awake and teacher not in self._sleep.pinned:
            while len(neighbours := self._awake_beside(teacher)) >= self._sleep.residents:
                if not is_needed and len(self._lanes[teacher].waiting) < self._sleep.turn:
                    return False
                idle = [
                    name for name in neighbours if not self._lanes[name].waiting and not self._lanes[name].in_flight
                ]
                if not idle:
                    return False
                self._put_to_sleep(idle[0])
        self._awake.pop(teacher, None)
        self._awake[teacher] = None
        return True

    def _who_is_needed(self, keys: Sequence[Hashable]) -> frozenset[str]:
        """Teachers of the calls under `keys`; none while one that is awake is about to answer one of them."""
        wanted = set(keys) & self._pending
        asked = frozenset(
            teacher
            for teacher, lane in self._lanes.items()
            if any(call.key in wanted for call in (*lane.waiting, *(call for _, call in lane.in_flight.values())))
        )
        return asked if asked.isdisjoint(self._awake) else frozenset()

    def _awake_beside(self, teacher: str) -> list[str]:
        """Those on the same device that might make room, the least recently used first."""
        assert self._sleep is not None
        device = self._sleep.device_of.get(teacher)
        return [
            name for name in self._awake if name not in self._sleep.pinned and self._sleep.device_of.get(name) == device
        ]

    def _put_to_sleep(self, teacher: str) -> None:
        assert self._sleep is not None
        self.swaps += 1
        self._awake.pop(teacher)
        for replica, handle in self._lanes[teacher].handles.items():
            try:
                kept = ray.get(handle.sleep.remote(), timeout=SLEEP_TIMEOUT_S)
            except (GetTimeoutError, RayActorError):
                kept = None
            if kept is None or kept > self._sleep.max_kept_bytes:
                self._restart(teacher, replica)

    def _restart(self, teacher: str, replica: int) -> None:
        """End an actor's process and wait for the next one: calls to an actor that is restarting would count as its failures."""
        before = self._incarnation(teacher, replica)
        ray.kill(self._lanes[teacher].handles[replica], no_restart=False)
        limit = time.monotonic() + SLEEP_TIMEOUT_S
        while time.monotonic() < limit:
            if self._check:
                self._check()
            if self._incarnation(teacher, replica) not in (None, before):
                logger.info("teacher %s: process restarted to give back its memory", teacher)
                return
            time.sleep(POLL_S)

    def _incarnation(self, teacher: str, replica: int) -> str | None:
        """None while it does not answer."""
        try:
            return self.health(teacher, replica=replica).incarnation
        except TeacherUnavailableError:
            return None

    def _look_who_is_awake(self, wanted: str) -> None:
        """Ask the actors, and put to sleep who is too many, `wanted` last."""
        assert self._sleep is not None
        found = [
            teacher for teacher, lane in self._lanes.items() if any(self._is_loaded(teacher, r) for r in lane.handles)
        ]
        self._awake = {**{name: None for name in self._awake if name in found}, **dict.fromkeys(found)}
        for teacher in [*(name for name in found if name != wanted), wanted]:
            if len(beside := self._awake_beside(teacher)) > self._sleep.residents and teacher in beside:
                self._put_to_sleep(teacher)

    def _is_loaded(self, teacher: str, replica: int) -> bool:
        try:
            return self.health(teacher, replica=replica).loaded
        except TeacherUnavailableError:
            return False  # it is restarting, and a restarted process holds no model

    # --- calls --------------------------------------------------------------------------------------------------------------------

    def _poll(self, keys: Sequence[Hashable]) -> None:
        """Wait for any call to end; the caller waits for one of `keys`."""
        if self._check:
            self._check()
        self._pump(keys)
        flying = {reference: lane for lane in self._lanes.values() for reference in lane.in_flight}
        if not flying:  # all that waits is about to be repeated
            time.sleep(POLL_S)
        ready = ray.wait(list(flying), num_returns=1, timeout=POLL_S, fetch_local=True)[0] if flying else []
        for reference in ready:
            self._receive(flying[reference], reference)
        now = time.monotonic()
        for lane in self._lanes.values():
            for reference, (_, call) in list(lane.in_flight.items()):
                if now > call.deadline:
                    del lane.in_flight[reference]
                    self._retry(lane, call, f"no answer within {call.timeout_s:g} s")
        self._pump()

    def _receive(self, lane: _Lane, reference: Any) -> None:
        replica, call = lane.in_flight.pop(reference)
        try:
            self._finish(call, ray.get(reference))
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            self._finish(call, cause if isinstance(cause, NexusError) else error)
        except ActorDiedError as error:
            if len(lane.handles) > 1 and call.replica is None:
                lane.handles.pop(replica, None)
                logger.warning("%s died for good, the other replicas go on", actor_name(call.teacher, replica))
                lane.waiting.appendleft(call)
                return
            self._finish(
                call,
                TeacherUnavailableError(
                    f"{actor_name(call.teacher, replica)} died for good after {MAX_RESTARTS} restarts: {_one_line(error)}. "
                    "Run the same command again; completed work is kept."
                ),
            )
        except RayActorError as error:
            call.not_before = time.monotonic() + FIRST_BACKOFF_S * 2 ** (call.attempts - 1)
            self._retry(lane, call, _one_line(error))

    def _retry(self, lane: _Lane, call: _Call, reason: str) -> None:
        logger.warning(
            "teacher %s: call repeated (%d of %d): %s", call.teacher, call.attempts, self._max_retries, reason
        )
        if self._on_event:
            self._on_event("retry", call.teacher, reason)
        if call.attempts > self._max_retries:
            self._finish(
                call,
                TeacherUnavailableError(
                    f"{actor_name(call.teacher)} failed {call.attempts} times on one batch: {reason}. "
                    "Run the same command again; completed work is kept."
                ),
            )
        else:
            lane.waiting.appendleft(call)

    def _finish(self, call: _Call, result: Any) -> None:
        self._pending.discard(call.key)
        self._done[call.key] = result


def _existing(teacher: str) -> Iterator[Any]:
    """Handles of a teacher's actors: their numbers have no gaps."""
    for replica in itertools.count():
        try:
            yield ray.get_actor(actor_name(teacher, replica))
        except ValueError:
            return


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
