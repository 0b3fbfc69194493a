"""What the stages of one command share, made when first needed: the cluster, the loaded teachers, the memory meter.

A stage that finds its work done never starts Ray. Everything that a session started ends with it: its actors are not detached, and
a local cluster is shut down.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import time
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from actors.cluster import ClusterSession, ClusterTarget, connect, prepare_environment, resolve_cluster
from actors.memory import MemoryMeter
from nexus.artifacts import read_artifact
from nexus.config import Role, RunConfig, TeacherConfig
from nexus.errors import ConfigError, NexusError, StageFailedError
from nexus.run import EVENTS_FILE, EventLog, RunDirectory

if TYPE_CHECKING:
    from actors.dataflow import TeacherAnswer, TeacherWork
    from actors.places import PlannedPlaces
    from actors.pool import TeacherPool
    from actors.teacher import LoadReport
    from nexus.towers.registry import TeacherSpec
    from nexus.training.facts import TeacherFacts

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 1800.0
"""A 30B checkpoint quantises at 10-24 million parameters per second and core."""


READ_TIMEOUT_S = 600.0
"""A batch of rows is read in milliseconds; only a cluster without a free CPU takes this long."""

FACTS_FILE = "teachers.json"
"""What the distilled student was trained with; written once the teachers are known."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; like KeyboardInterrupt it is no Exception, so that no handler of errors swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class Reporter:
    """Tells a person what happens; `jobs.cli` prints it. The base class is silent."""

    def line(self, text: str) -> None:
        """One line of news."""

    def progress(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """How far a stage is; `total` is None where only the end of the data tells."""


class Session:
    """One command's run directory and lazily made cluster."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        *,
        cluster: str,
        dashboard: bool,
        reporter: Reporter,
        models_dir: Path | None = None,
        teachers: Sequence[str] | None = None,
    ) -> None:
        """Resolves `cluster` and claims `out`, but starts nothing; `teachers` are the ids of those to load, None for all.

        Raises:
            ConfigError: the run has no teacher of such an id.
        """
        self.config = config
        self.teachers = _chosen(config, teachers)
        self.reporter = reporter
        self.target: ClusterTarget = resolve_cluster(cluster)
        self.run = RunDirectory(out.resolve(), config)
        self.events = EventLog(self.run.path / EVENTS_FILE)
        self.memory = MemoryMeter()
        self._dashboard = dashboard
        self._models_dir = models_dir
        self._cluster: ClusterSession | None = None
        self._pool: TeacherPool | None = None
        self._reports: dict[str, LoadReport] = {}
        self._places: PlannedPlaces | None = None
        self._student: Any = None
        self._signum: int | None = None

    def __enter__(self) -> Session:
        """Begin to measure memory and to watch for signals."""
        # Here and not on connecting: the stages import modules that import Ray.
        prepare_environment(self.target)
        self.memory.__enter__()
        self._watch_signals()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the cluster and free the run directory."""
        # A second Ctrl-C while leaving would only leave processes behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        try:
            if self._cluster is not None:
                import ray

                if kind is not None:
                    # What the threads of Ray Data meet when their cluster goes away, in tracebacks of 60 lines.
                    for name in ("ray", "ray.data"):
                        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
                ray.shutdown()
        finally:
            self.memory.__exit__()
            self.run.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def check_signals(self) -> None:
        """Raise `Interrupted` when Ctrl-C or SIGTERM came; called wherever a stage waits."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def _watch_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        # The first signal is only noted: raising here would tear Ray's compiled calls in the middle. Whoever insists, ends it.
        if self._signum is not None:
            raise Interrupted(signum)
        self._signum = signum

    @property
    def cluster(self) -> ClusterSession:
        """The connected cluster, joined or started on first use."""
        if self._cluster is None:
            settings = self.config.cluster
            self._cluster = connect(
                self.target,
                namespace=f"nexus-{self.config.name}-{time.time_ns():x}",
                num_cpus=settings.num_cpus,
                object_store_mib=settings.object_store_mib,
                torch_threads=settings.torch_threads,
                dashboard=self._dashboard,
            )
            # ray.init replaces the handler of SIGTERM by one that loses the state.
            self._watch_signals()
            self.memory.watch_session(self._cluster.session_name)
            self.reporter.line(self._cluster.description)
        return self._cluster

    @property
    def has_all_teachers(self) -> bool:
        """Whether no teacher of the run is left out."""
        return self.teachers == self.config.teachers

    @property
    def pool(self) -> TeacherPool:
        """The teachers, all loaded."""
        return self.load([teacher.id for teacher in self.teachers])

    def load(self, ids: Collection[str]) -> TeacherPool:
        """A pool in which at least these teachers are loaded; the others get no process before they are asked for here."""
        if self._pool is None or not self._reports.keys() >= set(ids):
            self.cluster  # noqa: B018  # connects
            from actors.pool import TeacherPool, sleep_of

            present = self._reports
            specs = [spec for spec in self.specs if spec.id in ids or spec.id in present]
            replicas = {teacher.id: teacher.replicas for teacher in self.teachers}
            planned = self.planned_places
            if planned is not None:
                replicas = {spec.id: len(planned.options[spec.id]) for spec in specs}
                specs = [
                    dataclasses.replace(spec, streamed=spec.streamed or spec.id in planned.streamed) for spec in specs
                ]
            start = time.perf_counter()
            # Actors that run already are found by their names; the earlier pool keeps them alive until then.
            self._pool, self._reports = TeacherPool.start(
                specs,
                replicas=replicas,
                torch_threads=self.config.cluster.torch_threads,
                num_gpus=0.0 if planned else self.gpu_share(sum(replicas.values()) + 1),
                places=None if planned is None else planned.options,
                window=self.config.distill.window,
                timeout_s=self.config.distill.target_timeout_s,
                max_retries=self.config.distill.max_retries,
                load_timeout_s=LOAD_TIMEOUT_S,
                check=self.check_signals,
                sleep=sleep_of(self.config) if planned is None else planned.sleep,
            )
            for report in (report for name, report in self._reports.items() if name not in present):
                self.reporter.line(
                    f"teacher {report.teacher}: {report.num_params:,} parameters, {report.quantised_share:.0%} in NF4 "
                    f"({report.bits_per_param:.2f} bits per parameter over all), weight error at most {report.max_weight_error:.3f}"
                    + (", from the quantised cache" if report.from_cache else "")
                )
            logger.info("teachers loaded in %.1f s", time.perf_counter() - start)
        return self._pool

    @property
    def planned_places(self) -> PlannedPlaces | None:
        """Where the plan puts teachers and students, reserved; None where the GPUs are shared evenly, or there is none."""
        if self.config.cluster.placement == "even":
            return None
        if self._places is None:
            self.cluster  # noqa: B018  # connects
            from actors.places import plan_places

            self._places = plan_places(self.config, self.specs)
            self.reporter.line(self._places.description)
        return self._places

    @property
    def load_reports(self) -> dict[str, LoadReport]:
        """What each teacher said after loading."""
        self.pool  # noqa: B018  # loads
        return self._reports

    def reports_of(self, ids: Collection[str]) -> dict[str, LoadReport]:
        """What these teachers said after loading; loads no others."""
        if ids:
            self.load(ids)
        return {teacher: self._reports[teacher] for teacher in ids}

    def answering_teachers(self, capability: str) -> tuple[TeacherConfig, ...]:
        """The teachers of `capability` that answer in text: language models, and encoders with label texts."""
        roles, reports = self.roles, self.load_reports
        return tuple(
            teacher
            for teacher in self.config.teachers_of(capability)
            if roles[teacher.id] == "causal_lm" or reports[teacher.id].label_texts is not None
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each loaded teacher."""
        return {teacher: report.fingerprint for teacher, report in self.load_reports.items()}

    @property
    def specs(self) -> list[TeacherSpec]:
        """What each teacher to load is loaded from; absolute paths, because Ray's workers have another working directory.

        Raises:
            TowerLoadError: when a teacher's files are not on this machine.
        """
        from nexus.towers.registry import load_registry, resolve_teacher

        registry = load_registry()
        cache = self.config.cache
        found = [resolve_teacher(teacher, registry, models_dir=self._models_dir) for teacher in self.teachers]
        return [
            dataclasses.replace(
                spec,
                id=teacher.id,
                path=str(Path(spec.path).absolute()),
                base_path=None if spec.base_path is None else str(Path(spec.base_path).absolute()),
                cache_dir=cache.dir,
                cache_min_parameters=cache.min_parameters,
            )
            for teacher, spec in zip(self.teachers, found, strict=True)
        ]

    def check_inputs(self) -> None:
        """Look at the student's preset, every data file and every teacher's folder: a mistake there need not wait for Ray.

        Raises:
            ConfigError: no preset has that name, or it has too few positions for the configured lengths.
            DataError: a data file is missing, empty, or of an unknown kind.
            TowerLoadError: a teacher's files are not on this machine, or its role has no loader.
        """
        import torch

        from nexus.config import resolve_path
        from nexus.data.loader import iter_records

        check_trained(self.config)
        self._check_positions()
        if self.target.mode == "local":
            check_device(self.config, torch.cuda.device_count(), "this machine, where a local Ray starts")
        self.specs  # noqa: B018  # resolves
        for source in self.config.data:
            for texts in (source.pool, source.labelled, source.test):
                if texts:
                    iter_records([resolve_path(text) for text in texts], capability=source.capability, quarantine=None)

    def _check_positions(self) -> None:
        """Refuse lengths that the student has no positions for."""
        from nexus.student.shipped import student_positions

        preset, positions = self.config.student.preset, student_positions(self.config)
        if self.config.student.max_length > positions:
            raise ConfigError(
                f"Expected student.max_length of at most {positions}, the positions of preset {preset!r}, found "
                f"{self.config.student.max_length}. Lower it."
            )
        for source in self.config.data:
            if source.max_new_tokens >= positions:
                raise ConfigError(
                    f"Expected data.{source.capability}.max_new_tokens to leave room for a prompt in the {positions} positions of "
                    f"preset {preset!r}, found {source.max_new_tokens}. Lower it."
                )

    def checkpoint_of(self, teacher_id: str) -> Path:
        """Checkpoint folder of one teacher."""
        return next(Path(spec.path) for spec in self.specs if spec.id == teacher_id)

    @property
    def roles(self) -> dict[str, Role]:
        """Role of each teacher, known without loading it."""
        from nexus.config import RegistryTeacher
        from nexus.towers.registry import load_registry

        registry = load_registry()
        return {
            teacher.id: registry.get(teacher.id).role if isinstance(teacher, RegistryTeacher) else teacher.role
            for teacher in self.config.teachers
        }

    @property
    def teacher_facts(self) -> tuple[TeacherFacts, ...]:
        """What training and its checkpoints depend on; written by the distill stage, read by the later ones."""
        from nexus.training.facts import TeacherFactsFile

        return read_artifact(self.run.path / FACTS_FILE, TeacherFactsFile).to_facts()

    @property
    def student(self) -> Any:
        """Handle of the student's actor."""
        if self._student is None:
            self.cluster  # noqa: B018  # connects
            from actors.evaluation import remote_student

            self._student = remote_student(self)
        return self._student

    def stream(self, works: Sequence[TeacherWork], name: str) -> Generator[TeacherAnswer, None, None]:
        """The loaded teachers' answers to the works' rows (`actors.dataflow.stream_answers`); `name` is shown on Ray's dashboard.

        Signals are looked at before each answer is given out.
        """
        from actors.dataflow import stream_answers

        for answer in stream_answers(
            works,
            pool=self.pool,
            quarantine_dir=self.run.path / "quarantine",
            max_bad_share=self.config.quarantine.max_bad_share,
            timeout_s=READ_TIMEOUT_S,
            name=name,
            check=self.check_signals,
        ):
            self.check_signals()
            yield answer

    def wait_for(self, reference: Any, *, timeout_s: float = 3600.0) -> Any:
        """The result behind a reference of this run's own actors.

        Raises:
            NexusError: what the actor raised.
            StageFailedError: when the actor died or did not answer in time.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        limit = time.monotonic() + timeout_s
        ready: list[Any] = []
        while not ready:
            if time.monotonic() > limit:
                raise StageFailedError(
                    f"Expected an answer within {timeout_s:.0f} s, found none. Run the same command again."
                )
            self.check_signals()
            ready, _ = ray.wait([reference], timeout=1.0)
        try:
            return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, NexusError):
                raise error.cause from None
            raise
        except RayActorError:
            raise StageFailedError(
                "An actor of this run died (killed, or out of memory). Completed work is kept: run the same command again."
            ) from None

    def gpu_share(self, sharers: int) -> float:
        """GPUs of one actor when `sharers` actors divide the cluster's GPUs; 0 without a GPU. Always 1/n: Ray cannot always
        place other fractions."""
        self.cluster  # noqa: B018  # connects
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0))
        return 0.0 if not gpus else 1.0 / -(-sharers // gpus)

    def student_device(self) -> str:
        """Where students train: `cuda` where the configuration and the cluster have it, else `cpu`.

        Raises:
            ConfigError: the cluster has no GPU, and the configuration needs one.
        """
        if self.config.distill.device == "cpu":
            return "cpu"
        self.cluster  # noqa: B018  # connects
        import ray

        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        check_device(self.config, num_gpus, self.cluster.description)
        return "cuda" if num_gpus else "cpu"

    def actor_options(self, name: str) -> dict[str, Any]:
        """Options of a controlling actor: named, on this node (the run directory is here), holding no CPU."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return {
            "name": name,
            "num_cpus": 0,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(self.cluster.node_id, soft=False),
        }


def check_trained(config: RunConfig) -> None:
    """Refuse a student that has nothing to train on, at its first step or at any.

    Raises:
        ConfigError: naming the setting and the remedy.
    """
    distill = config.distill
    if distill.gold_weight and any(source.labelled for source in config.data):
        return
    if distill.labels_only:
        raise ConfigError(
            f"Expected labelled rows and distill.gold_weight above 0 for the student of distill.labels_only, found the weight "
            f"{distill.gold_weight} and {sum(bool(source.labelled) for source in config.data)} capabilities with labelled rows. "
            "Add labelled files, or set distill.labels_only to false."
        )
    first = min(teacher.start_step for teacher in config.teachers)
    if first:
        raise ConfigError(
            f"Expected a teacher from the first step on, because no labelled row trains the student, found the earliest start_step "
            f"{first}. Leave it out of one teacher."
        )


def check_device(config: RunConfig, num_gpus: int, where: str) -> None:
    """Refuse a student that needs a GPU where there is none.

    Raises:
        ConfigError: naming device, setting and remedy.
    """
    distill = config.distill
    if num_gpus:
        return
    for is_wanted, setting, remedy in (
        (distill.device == "cuda", "device cuda", "Set distill.device to cpu or auto"),
        (distill.optimizer == "paged_adamw8bit", "optimizer paged_adamw8bit", "Set distill.optimizer to adamw8bit"),
    ):
        if is_wanted:
            raise ConfigError(
                f"Expected a GPU for distill.{setting}, found the device cpu alone ({where}). {remedy}, or join a cluster with a GPU."
            )


def _chosen(config: RunConfig, ids: Sequence[str] | None) -> tuple[TeacherConfig, ...]:
    """The teachers with these ids, in the order of the configuration."""
    from nexus.towers.registry import nearest

    known = tuple(teacher.id for teacher in config.teachers)
    for name in ids or ():
        if name not in known:
            raise ConfigError(
                f"Expected teachers of this run ({', '.join(known)}), found {name!r}{nearest(name, known)} Correct --teachers."
            )
    return tuple(teacher for teacher in config.teachers if ids is None or teacher.id in ids)
