"""The custom metrics of nexus on Ray's metrics endpoint, declared once.

Ray prefixes each name with `ray_` and a counter with `_total`. Means are computed from the `_seconds` counter: the `_sum` of a
Ray histogram is an estimate from bucket midpoints. `configs/grafana.json` draws them.
"""

from __future__ import annotations

from functools import cache

from ray.util.metrics import Counter, Gauge


class TeacherMetrics:
    """What one teacher actor reports; every value carries the teacher's id."""

    def __init__(self, teacher: str) -> None:
        tags = {"teacher": teacher}
        self.rows = _counter("nexus_teacher_rows", "Rows that the teacher answered", ("teacher",))
        self.seconds = _counter(
            "nexus_teacher_busy_seconds", "Seconds inside the teacher's forward passes", ("teacher",)
        )
        self.weight_bytes = _gauge("nexus_teacher_weight_bytes", "Bytes of the loaded weights", ("teacher",))
        self.profile_rows = _counter("nexus_profile_rows", "Rows that the teacher was profiled on", ("teacher",))
        self.profile_seconds = _counter(
            "nexus_profile_seconds", "Seconds that profiling the teacher took its actors", ("teacher",)
        )
        self._tags = tags

    def answered(self, rows: int, seconds: float) -> None:
        """Count one finished call."""
        self.rows.inc(rows, tags=self._tags)
        self.seconds.inc(max(seconds, 1e-9), tags=self._tags)

    def profiled(self, rows: int, seconds: float) -> None:
        """Count one finished measurement of a profile."""
        self.profile_rows.inc(rows, tags=self._tags)
        self.profile_seconds.inc(max(seconds, 1e-9), tags=self._tags)

    def loaded(self, weight_bytes: int) -> None:
        """Show the size of the loaded weights."""
        self.weight_bytes.set(weight_bytes, tags=self._tags)


class TrainerMetrics:
    """What one trainer actor reports; `student` tells the distilled student from the labels-only one."""

    def __init__(self, student: str) -> None:
        self._student = {"student": student}
        self.steps = _counter("nexus_trainer_steps", "Optimizer steps done", ("student",))
        self.skipped = _counter("nexus_trainer_skipped_steps", "Steps that the recovery skipped", ("student",))
        self.rollbacks = _counter("nexus_trainer_rollbacks", "Rollbacks to an earlier snapshot", ("student",))
        self.wait = _counter("nexus_trainer_wait_seconds", "Seconds spent waiting for teacher targets", ("student",))
        self.loss = _gauge(
            "nexus_trainer_loss", "Loss of the newest step; teacher `total` is the weighted sum", ("student", "teacher")
        )

    def stepped(self, *, total: float, losses: dict[str, float], wait_s: float) -> None:
        """Show one optimizer step."""
        self.steps.inc(1, tags=self._student)
        self.wait.inc(max(wait_s, 1e-9), tags=self._student)
        for teacher, loss in {"total": total, **losses}.items():
            self.loss.set(loss, tags={**self._student, "teacher": teacher})

    def recovered(self, action: str) -> None:
        """Count a skip or a rollback."""
        (self.rollbacks if action == "rollback" else self.skipped).inc(1, tags=self._student)


@cache
def _counter(name: str, description: str, tags: tuple[str, ...]) -> Counter:
    return Counter(name, description=description, tag_keys=tags)


@cache
def _gauge(name: str, description: str, tags: tuple[str, ...]) -> Gauge:
    return Gauge(name, description=description, tag_keys=tags)
