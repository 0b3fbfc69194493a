"""The teachers of a run as one object: create or attach, a bounded window per teacher, timeouts, bounded retries per call.

Results are kept under the caller's key until collected, in whatever order they arrive; a caller that collects in its own order
therefore sees the same values whichever teacher was faster, slower or killed. Retries live here and not in Ray
(`max_task_retries=0`), because every call is a pure function of its request and a poisonous one must end.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

from actors.teacher import CONTROL_GROUP, ActorHealth, LoadReport, TeacherActor
from nexus.errors import NexusError, TeacherUnavailableError

if TYPE_CHECKING:
    from nexus.towers.registry import TeacherSpec

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
POLL_S = 0.5
"""Longest single wait inside Ray, so that signals and deadlines are seen."""


def actor_name(teacher: str) -> str:
    """Name under which a teacher's actor is found in the run's namespace."""
    return f"teacher:{teacher}"


@dataclass
class _Call:
    key: Hashable
    teacher: str
    method: str
    arguments: tuple[Any, ...]
    attempts: int = 0
    deadline: float = 0.0


@dataclass
class _Lane:
    """One teacher's queue and window."""

    handle: Any
    waiting: deque[_Call] = field(default_factory=deque)
    in_flight: dict[Any, _Call] = field(default_factory=dict)


class TeacherPool:
    """Calls teachers by id; not thread-safe."""

    def __init__(
        self,
        handles: Mapping[str, Any],
        *,
        window: int,
        timeout_s: float,
        max_retries: int,
        on_event: Callable[[str, str, str], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """`on_event(kind, teacher, reason)` hears of every retry; `check` is called while waiting and may raise to end the wait."""
        self._lanes = {teacher: _Lane(handle) for teacher, handle in handles.items()}
        self._window = window
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._on_event = on_event
        self._check = check
        self._done: dict[Hashable, Any] = {}
        self._pending: set[Hashable] = set()

    @classmethod
    def start(
        cls,
        specs: Sequence[TeacherSpec],
        *,
        torch_threads: int,
        num_gpus: float,
        window: int,
        timeout_s: float,
        max_retries: int,
        load_timeout_s: float,
        check: Callable[[], None] | None = None,
    ) -> tuple[TeacherPool, dict[str, LoadReport]]:
        """Create one actor per teacher, load them side by side, and wait for all.

        Raises:
            TowerLoadError: from the first teacher that cannot load.
            TeacherUnavailableError: when a teacher does not answer within `load_timeout_s`.
        """
        remote = ray.remote(concurrency_groups={CONTROL_GROUP: 1})(TeacherActor)  # type: ignore[call-overload]  # Ray left it out of its types
        handles = {
            spec.id: remote.options(
                name=actor_name(spec.id),
                get_if_exists=True,
                num_cpus=0,
                num_gpus=num_gpus,
                max_restarts=MAX_RESTARTS,
                max_task_retries=0,
                max_pending_calls=4 * window + 16,
                allow_out_of_order_execution=True,
            ).remote(spec, torch_threads)
            for spec in specs
        }
        pool = cls(handles, window=window, timeout_s=timeout_s, max_retries=max_retries, check=check)
        return pool, pool.load(load_timeout_s)

    @classmethod
    def attach(
        cls,
        teachers: Sequence[str],
        *,
        window: int,
        timeout_s: float,
        max_retries: int,
        on_event: Callable[[str, str, str], None] | None = None,
    ) -> TeacherPool:
        """The pool of actors that another process of the run created.

        Raises:
            TeacherUnavailableError: when a teacher's actor is not in the namespace.
        """
        handles = {}
        for teacher in teachers:
            try:
                handles[teacher] = ray.get_actor(actor_name(teacher))
            except ValueError:
                raise TeacherUnavailableError(
                    f"Expected the actor {actor_name(teacher)!r} in this run's namespace, found none. Start the run again."
                ) from None
        return cls(handles, window=window, timeout_s=timeout_s, max_retries=max_retries, on_event=on_event)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Ids in the order of creation."""
        return tuple(self._lanes)

    def load(self, timeout_s: float) -> dict[str, LoadReport]:
        """Load every teacher; returns the reports by id."""
        keys = {teacher: ("load", teacher) for teacher in self._lanes}
        for teacher, key in keys.items():
            self.submit(key, teacher, "load")
        return {teacher: self.collect(key, timeout_s=timeout_s) for teacher, key in keys.items()}

    def health(self, teacher: str, *, timeout_s: float = 5.0) -> ActorHealth:
        """Health of one teacher through its control group, also while it works."""
        handle = self._lanes[teacher].handle
        reference = handle.health.options(concurrency_group=CONTROL_GROUP).remote()
        try:
            return ray.get(reference, timeout=timeout_s)
        except (GetTimeoutError, RayActorError) as error:
            raise TeacherUnavailableError(
                f"Expected {actor_name(teacher)} to answer within {timeout_s:g} s, found {type(error).__name__}."
            ) from None

    def submit(self, key: Hashable, teacher: str, method: str, *arguments: Any) -> None:
        """Queue one call; it starts as soon as the teacher's window has room."""
        assert key not in self._pending | self._done.keys(), f"key {key!r} is in use"
        self._pending.add(key)
        self._lanes[teacher].waiting.append(_Call(key, teacher, method, arguments))
        self._pump()

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
            self._poll()
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

    def _pump(self) -> None:
        for lane in self._lanes.values():
            while lane.waiting and len(lane.in_flight) < self._window:
                call = lane.waiting.popleft()
                call.attempts += 1
                call.deadline = time.monotonic() + self._timeout_s
                reference = getattr(lane.handle, call.method).remote(*call.arguments)
                lane.in_flight[reference] = call

    def _poll(self) -> None:
        if self._check:
            self._check()
        flying = {reference: lane for lane in self._lanes.values() for reference in lane.in_flight}
        ready, _ = ray.wait(list(flying), num_returns=1, timeout=POLL_S, fetch_local=True)
        for reference in ready:
            self._receive(flying[reference], reference)
        now = time.monotonic()
        for lane in self._lanes.values():
            for reference, call in list(lane.in_flight.items()):
                if now > call.deadline:
                    del lane.in_flight[reference]
                    self._retry(lane, call, f"no answer within {self._timeout_s:g} s")
        self._pump()

    def _receive(self, lane: _Lane, reference: Any) -> None:
        call = lane.in_flight.pop(reference)
        try:
            self._finish(call, ray.get(reference))
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            self._finish(call, cause if isinstance(cause, NexusError) else error)
        except ActorDiedError as error:
            self._finish(
                call,
                TeacherUnavailableError(
                    f"{actor_name(call.teacher)} died for good after {MAX_RESTARTS} restarts: {_one_line(error)}. "
                    "Run the same command again; completed work is kept."
                ),
            )
        except RayActorError as error:
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
