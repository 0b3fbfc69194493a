"""`nexus profile --bundle`: the layers of an exported student beside those of its teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nexus.config import load_config, resolve_path
from nexus.errors import ConfigError

if TYPE_CHECKING:
    from jobs.execute import RunOptions
    from nexus.artifacts import NIWTProfile
    from nexus.config import RunConfig


def profile_bundle(options: RunOptions, bundle: Path) -> None:
    """Profile a student on its capabilities' labelled rows, write the profiles, and draw the run's report anew if there is one.

    The run is the one that the bundle lies in, unless `options` name another.

    Raises:
        NexusError: the bundle, the configuration or the rows cannot be used.
    """
    import transformers

    from jobs.console import ConsoleReporter
    from nexus.artifacts import read_artifact, write_artifact
    from nexus.assembly.bundle import MANIFEST_FILE, BundleManifest, load_bundle
    from nexus.assembly.report import load_report_data, write_report
    from nexus.assembly.structure import profile_student
    from nexus.data.loader import iter_records
    from nexus.data.quarantine import Quarantine
    from nexus.run import student_profile_path

    # A bar over 30 tensors says nothing to whoever waits for a profile.
    transformers.utils.logging.disable_progress_bar()
    config, out = _run_of(options, bundle)
    student = load_bundle(bundle)
    revision = read_artifact(bundle / MANIFEST_FILE, BundleManifest).config_fingerprint
    reporter = ConsoleReporter(shows_progress=not options.as_json)
    quarantine = Quarantine(out / "quarantine", config.quarantine.max_bad_share)
    document = {}
    for number, source in enumerate(config.data):
        teachers = _teacher_profiles(config, source.capability, out)
        if not source.labelled:
            raise ConfigError(
                f"Expected labelled rows of {source.capability!r} to profile the student on, found none. "
                f"Name a file under data.{source.capability}.labelled."
            )
        reporter.progress("profile student", number, len(config.data), source.capability)
        records = iter_records(
            [resolve_path(text) for text in source.labelled], capability=source.capability, quarantine=quarantine
        )
        # As many rows as the teachers were profiled on, which are the first ones, too.
        counts = [profile.num_samples // num_capabilities for profile, num_capabilities in teachers]
        found = profile_student(
            student,
            records,
            source,
            quarantine=quarantine,
            max_samples=max(counts, default=config.profile.max_samples),
            batch_size=config.profile.batch_size,
            confirm_samples=config.profile.confirm_samples,
            seed=config.seed,
            revision=revision,
        )
        write_artifact(student_profile_path(out, source.capability), found)
        described = {"student": found, **{profile.teacher: profile for profile, _ in teachers}}
        document[source.capability] = {
            name: {
                "num_layers": profile.num_layers,
                "critical_layers": [item.layer for item in profile.critical_layers],
            }
            for name, profile in described.items()
        }
        reporter.line(f"{source.capability}: " + "; ".join(_described(*item) for item in described.items()))
    reporter.close()
    report = out / "report.html"
    if (out / "metrics.json").is_file():
        write_report(load_report_data(out), report)
    if options.as_json:
        print(json.dumps({"run": str(out), "structure": document}))
    else:
        print(f"profiles of the student: {student_profile_path(out, 'x').parent}")
        if report.is_file():
            print(f"report: {report}")


def _run_of(options: RunOptions, bundle: Path) -> tuple[RunConfig, Path]:
    from nexus.run import CONFIG_FILE

    own = bundle.absolute().parent
    path = options.config
    if path is None:
        path = own / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(
                f"Expected {CONFIG_FILE} beside the bundle {bundle}, found none in {own}. Name the run's configuration with --config."
            )
    config = load_config(path, options.overrides)
    return config, options.out or (own if (own / CONFIG_FILE).is_file() else Path("runs") / config.name)


def _teacher_profiles(config: RunConfig, capability: str, out: Path) -> list[tuple[NIWTProfile, int]]:
    """The run's profiles of the capability's teachers, and how many capabilities each has."""
    from nexus.artifacts import NIWTProfile, read_artifact

    return [
        (read_artifact(path, NIWTProfile), len(teacher.capabilities))
        for teacher in config.teachers_of(capability)
        if (path := out / "profile" / f"{teacher.id}.json").is_file()
    ]


def _described(name: str, profile: NIWTProfile) -> str:
    """Critical layers of one model and how deep they lie, 0 at its input and 1 at its output."""
    layers = ", ".join(
        f"{item.layer} (depth {(item.layer + 0.5) / profile.num_layers:.2f})" for item in profile.critical_layers
    )
    return f"{name} {'critical layers ' + layers if layers else 'no critical layer'} of {profile.num_layers}"
