"""Runs stages for a person or a script: the first line, the news, the closing table, the exit code."""

from __future__ import annotations

import difflib
import errno
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus.config import RunConfig, load_config
from nexus.errors import NexusError, UserError

if TYPE_CHECKING:
    from typer.exceptions import TyperException

    from nexus.artifacts import Metrics, StageRecord

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = "quickstart.yaml"
JOB_COPY = "_ray_pkg_"
"""How the folder begins in which `ray job submit --working-dir` runs a job."""
DEFAULT_CONFIG_NOTE = "Default: the quickstart's, shipped with nexus."


class ExitCodes:
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    USER = 2
    INTERRUPTED = 130


@dataclass(frozen=True)
class RunOptions:
    """What every stage's command takes."""

    config: Path | None
    out: Path | None
    overrides: tuple[str, ...]
    cluster: str
    dashboard: bool
    as_json: bool
    models_dir: Path | None


def execute_stages(
    options: RunOptions,
    last: str,
    *,
    inject_spike: str | None = None,
    teachers: tuple[str, ...] | None = None,
    resume: bool = True,
) -> None:
    """Bring a run up to the stage `last` and print what it came to.

    Args:
        teachers: ids of those to profile; None for all.
        resume: False profiles anew what an earlier command has profiled.

    Raises:
        NexusError: what a stage raised; earlier stages stay complete.
        Interrupted: after Ctrl-C or SIGTERM, with the state saved.
    """
    # Before the libraries that read them are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from jobs.console import ConsoleReporter

    reporter = ConsoleReporter(shows_progress=not options.as_json)
    config, path, note = load_run_config(options.config, options.overrides)
    out = options.out or Path("runs") / config.name
    if inject_spike is not None:
        _check_spike(inject_spike, config)
    from actors.session import Session
    from actors.stages import profile_journal, run_stages

    start = time.perf_counter()
    session = Session(
        config,
        out,
        cluster=options.cluster,
        dashboard=options.dashboard,
        reporter=reporter,
        models_dir=options.models_dir,
        teachers=teachers,
    )
    # Only now: a mistake in what was typed is answered by its own line alone.
    reporter.line(f"configuration {path}{note}, run directory {out}")
    if any(part.startswith(JOB_COPY) for part in out.absolute().parts):
        reporter.line(
            f"{out.absolute()} lies in Ray's copy of the job's files and goes away with the cluster's session; "
            "give an absolute --out to keep the run"
        )
    try:
        with session:
            if not resume:
                session.run.reset("profile")
                profile_journal(session).remove()
            records = run_stages(session, last, inject_spike=inject_spike)
    finally:
        reporter.close()
        quarantined = _quarantined(out)
        if quarantined:
            rows = sum(quarantined.values())
            reporter.line(
                f"{rows} bad {'row' if rows == 1 else 'rows'} left out, each with its reason in {out / 'quarantine'}"
            )
    _print_result(options, last, out, records, quarantined, time.perf_counter() - start)


def guarded(command: Callable[[], Any], *, as_json: bool = False) -> int:
    """Run a command and turn what it raises into an exit code and, on stderr, one line.

    NEXUS_LOG_LEVEL=DEBUG shows where an error came from as well.

    Args:
        as_json: print `{"error": LINE, "exit_code": CODE}` to stdout besides; a command prints its own object last, so that there
            is always one.
    """
    level = os.environ.get("NEXUS_LOG_LEVEL", "ERROR").upper()
    known = logging.getLevelNamesMapping() if sys.version_info >= (3, 11) else logging._nameToLevel
    logging.basicConfig(level=level if level in known else "ERROR", format="%(name)s: %(message)s")
    try:
        result = command()
    except BaseException as error:
        logger.debug("raised", exc_info=True)
        code, line = _verdict(error)
        if line is None:
            raise
        _complain(line, code, as_json=as_json)
        return code
    if result == ExitCodes.INTERRUPTED:
        _complain("stopped", result, as_json=as_json)  # Typer turns a KeyboardInterrupt into its exit code
    return result if isinstance(result, int) else ExitCodes.DONE


def _verdict(error: BaseException) -> tuple[int, str | None]:
    """Exit code and line of what a command raised; no line for what is not for us to explain."""
    import typer
    from typer.exceptions import TyperException

    from actors.session import Interrupted

    if isinstance(error, Interrupted):
        return error.exit_code, "stopped; the state is saved and the same command continues"
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return ExitCodes.INTERRUPTED, "stopped"
    if isinstance(error, TyperException):
        return ExitCodes.USER, _usage(error)
    # Ray wraps what an actor raised; the wrapper's text is a traceback of many lines.
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        error = cause
    if isinstance(error, UserError):
        return ExitCodes.USER, str(error)
    if isinstance(error, NexusError):
        return ExitCodes.FAILED, str(error)
    if isinstance(error, OSError):
        return _refusal(error)
    if isinstance(error, Exception):
        text = str(error).strip().splitlines()
        return ExitCodes.FAILED, (
            f"Expected no such error, found {type(error).__name__}: {text[-1] if text else 'without a message'}. Completed work is "
            "kept. This is a fault of nexus: NEXUS_LOG_LEVEL=DEBUG shows where it came from."
        )
    return ExitCodes.FAILED, None


def _refusal(error: OSError) -> tuple[int, str]:
    """What the operating system refused; a full or forbidden disk is for the user to mend."""
    place = f" at {error.filename}" if error.filename else ""
    found = f"{error.strerror or error}{place}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExitCodes.USER, f"Expected room on the disk, found: {found}. Free some, or choose another --out."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            ExitCodes.USER,
            f"Expected to be allowed to, found: {found}. Change its permissions, or choose another place.",
        )
    return (
        ExitCodes.FAILED,
        f"Expected the system to comply, found: {found}. Completed work is kept; the same command continues.",
    )


def _usage(error: TyperException) -> str:
    """What Typer found wrong on the command line, as expected, found, remedy."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the class has no public name
        return error.format_message()
    context = getattr(error, "ctx", None)
    path = "nexus" if context is None else context.command_path
    remedy = f"`{path} --help` shows what it takes."
    message = error.format_message().rstrip(".")
    name = getattr(error, "option_name", None)
    if name is not None and hasattr(error, "possibilities"):
        known = [option for parameter in context.command.params for option in parameter.opts] if context else []
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        return f"Expected an option of `{path}`, found {name}.{f' Did you mean {close[0]}?' if close else ''} {remedy}"
    if name is not None:
        return f"Expected a proper use of {name}, found: {message}. {remedy}"
    if message.startswith("Missing "):
        return f"Expected {message.removeprefix('Missing ')}, found none. {remedy}"
    return f"Expected a proper use of `{path}`, found: {message}. {remedy}"


def load_run_config(config: Path | None, overrides: tuple[str, ...]) -> tuple[RunConfig, Path, str]:
    """The configuration of a command, its path as a person should read it, and a note when it is the shipped one."""
    from nexus.towers.registry import shipped_config

    if config is not None:
        return load_config(config, overrides), config, ""
    path = shipped_config(DEFAULT_CONFIG)
    return load_config(path, overrides), Path("configs") / DEFAULT_CONFIG, " (shipped; --config names another)"


def _check_spike(text: str, config: RunConfig) -> None:
    from nexus.training.loop import parse_spike

    parse_spike(text, steps=config.distill.steps)


def _quarantined(out: Path) -> dict[str, int]:
    """Bad rows of each input file that this run met, in this command or an earlier one."""
    from nexus.data.quarantine import read_quarantine

    counts = Counter(str(Path(row.file).resolve()) for row in read_quarantine(out / "quarantine"))
    return dict(sorted(counts.items()))


def _print_result(
    options: RunOptions,
    last: str,
    out: Path,
    records: dict[str, StageRecord],
    quarantined: dict[str, int],
    seconds: float,
) -> None:
    from nexus.artifacts import Metrics, read_artifact

    metrics = read_artifact(out / "metrics.json", Metrics) if last == "report" else None
    if options.as_json:
        document = {
            "run": str(out),
            "seconds": round(seconds, 1),
            "stages": {name: record.model_dump(mode="json", exclude={"outputs"}) for name, record in records.items()},
            "quarantined": quarantined,
            "metrics": None if metrics is None else metrics.model_dump(mode="json"),
        }
        print(json.dumps(document))
        return
    if metrics is not None:
        from nexus.assembly.report import render_table, render_transports

        print(render_table(metrics), end="")
        print(_shares(metrics))
        print(render_transports(metrics), end="")
        print(f"report: {out / 'report.html'}")
        print(f"bundle: {out / 'bundle'}")
    print(f"{last}: complete in {seconds:.1f} s")


def _shares(metrics: Metrics) -> str:
    """Who taught how much, in one line."""
    tokens = metrics.teacher_tokens
    taught = {teacher: count for teacher, count in tokens.items() if count}
    starved = [teacher for teacher in tokens if teacher not in taught]
    whole = sum(taught.values())
    shares = (
        f", each with {min(taught.values()) / whole:.1%} to {max(taught.values()) / whole:.1%} of them"
        if taught
        else ""
    )
    hungry = f"; starved: {', '.join(starved)}" if starved else ""
    return f"teachers: {len(taught)} of {len(tokens)} taught {whole:,} tokens{shares}{hungry}"


def _complain(text: str, code: int, *, as_json: bool) -> None:
    """One line on stderr; the help that a bare `nexus` asks for keeps its lines."""
    if text.startswith("Usage: "):
        print(text, file=sys.stderr)
        return
    line = " ".join(text.split())
    print(f"nexus: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": line, "exit_code": code}, ensure_ascii=False))
