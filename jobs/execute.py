"""Runs stages for a person or a script: the first line, the news, the closing table, the exit code."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus.config import RunConfig, load_config
from nexus.errors import NexusError, UserError

if TYPE_CHECKING:
    from nexus.artifacts import StageRecord

DEFAULT_CONFIG = "quickstart.yaml"
DEFAULT_CONFIG_NOTE = "Default: the quickstart's, shipped with nexus."


class ExitCodes:
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    USER = 2


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


def execute_stages(options: RunOptions, last: str, *, inject_spike: str | None = None) -> None:
    """Bring a run up to the stage `last` and print what it came to.

    Raises:
        NexusError: what a stage raised; earlier stages stay complete.
        Interrupted: after Ctrl-C or SIGTERM, with the state saved.
    """
    # Before the libraries that read them are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from jobs.console import ConsoleReporter

    reporter = ConsoleReporter()
    config, path, note = _load(options)
    out = options.out or Path("runs") / config.name
    reporter.line(f"configuration {path}{note}, run directory {out}")
    if inject_spike is not None:
        _check_spike(inject_spike)
    from actors.session import Session
    from actors.stages import run_stages

    start = time.perf_counter()
    with Session(
        config,
        out,
        cluster=options.cluster,
        dashboard=options.dashboard,
        reporter=reporter,
        models_dir=options.models_dir,
    ) as session:
        records = run_stages(session, last, inject_spike=inject_spike)
    reporter.close()
    _print_result(options, last, out, records, time.perf_counter() - start)


def guarded(command: Callable[[], Any]) -> int:
    """Run a command and turn what it raises into an exit code and, on stderr, one line."""
    import typer
    from typer.exceptions import TyperException

    from actors.session import Interrupted

    logging.basicConfig(level=os.environ.get("NEXUS_LOG_LEVEL", "ERROR").upper(), format="%(name)s: %(message)s")
    try:
        result = command()
    except Interrupted as interrupt:
        _complain("stopped; the state is saved and the same command continues")
        return interrupt.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped")
        return 130
    except UserError as error:
        _complain(str(error))
        return ExitCodes.USER
    except TyperException as error:
        _complain(error.format_message())
        return ExitCodes.USER
    except NexusError as error:
        _complain(str(error))
        return ExitCodes.FAILED
    except OSError as error:
        _complain(f"the system refused: {error}")
        return ExitCodes.FAILED
    return result if isinstance(result, int) else ExitCodes.DONE


def _load(options: RunOptions) -> tuple[RunConfig, Path, str]:
    from nexus.towers.registry import shipped_config

    if options.config is not None:
        return load_config(options.config, options.overrides), options.config, ""
    path = shipped_config(DEFAULT_CONFIG)
    return load_config(path, options.overrides), Path("configs") / DEFAULT_CONFIG, " (shipped; --config names another)"


def _check_spike(text: str) -> None:
    from nexus.training.loop import parse_spike

    parse_spike(text)


def _print_result(options: RunOptions, last: str, out: Path, records: dict[str, StageRecord], seconds: float) -> None:
    from nexus.artifacts import Metrics, read_artifact

    metrics = read_artifact(out / "metrics.json", Metrics) if last == "report" else None
    if options.as_json:
        document = {
            "run": str(out),
            "seconds": round(seconds, 1),
            "stages": {name: record.model_dump(mode="json", exclude={"outputs"}) for name, record in records.items()},
            "metrics": None if metrics is None else metrics.model_dump(mode="json"),
        }
        print(json.dumps(document))
        return
    if metrics is not None:
        from nexus.assembly.report import render_table

        print(render_table(metrics), end="")
        print(f"report: {out / 'report.html'}")
        print(f"bundle: {out / 'bundle'}")
    print(f"{last}: complete in {seconds:.1f} s")


def _complain(text: str) -> None:
    print(f"nexus: {' '.join(text.split())}", file=sys.stderr)
