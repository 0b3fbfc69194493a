"""The `nexus` command.

Exit codes: 0 all work is done, 1 the work failed, 2 a user's mistake (one line: expected, found, remedy), 130 after Ctrl-C and 143
after SIGTERM with the state saved. Heavy imports happen inside the commands, so that `--help` and typos answer at once.
"""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import nexus
from jobs.execute import DEFAULT_CONFIG_NOTE, ExitCodes, RunOptions, execute_stages, guarded
from nexus.errors import UserError

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help=f"YAML of the run. {DEFAULT_CONFIG_NOTE}", show_default=False),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Run directory; the same command continues in it. Default: runs/<name of the run>.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Override a key, e.g. --set distill.steps=100. Repeatable.",
        show_default=False,
    ),
]
ClusterOption = Annotated[
    str,
    typer.Option(
        "--cluster",
        metavar="auto|local|HOST:PORT",
        help="auto joins the running Ray cluster or starts a local one, local starts one, HOST:PORT joins that one.",
    ),
]
DashboardOption = Annotated[
    bool, typer.Option("--dashboard/--no-dashboard", help="Serve the Ray dashboard when a local cluster is started.")
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object to stdout, {error, exit_code} after a failure; the rest goes to stderr."
    ),
]
ModelsOption = Annotated[
    Path | None,
    typer.Option(
        "--models-dir",
        metavar="DIR",
        help="Folder with one checkpoint folder per teacher id. Default: models, then the Hugging Face cache.",
        show_default=False,
    ),
]
SpikeOption = Annotated[
    str | None,
    typer.Option(
        "--inject-spike",
        metavar="STEP:nan|xF",
        help="Spoil the loss of one step, to see the recovery at work.",
        show_default=False,
    ),
]


class _Commands(TyperGroup):
    """A group of commands that answers an unknown one with the nearest known."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the base class, whose own message names no remedy."""
        name = args[0]
        if self.get_command(ctx, name) is None:
            close = difflib.get_close_matches(name, self.list_commands(ctx), n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"Expected a command of `{ctx.command_path}`, found {name!r}.{hint} `{ctx.command_path} --help` lists all."
            )
        return super().resolve_command(ctx, args)


class _App(typer.Typer):
    """A Typer app whose mistakes are one line and whose exit codes are those of this module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and exit."""
        kwargs = {"prog_name": "nexus", **kwargs, "standalone_mode": False}
        # Looked for here and not by the parser, whose own complaints are wanted as JSON too.
        arguments = args[0] if args else kwargs.get("args")
        as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
        sys.exit(guarded(lambda: super(_App, self).__call__(*args, **kwargs), as_json=as_json))


app = _App(
    name="nexus",
    cls=_Commands,
    help="Distil many specialist teachers into one small student that runs alone.",
    epilog="Exit codes: 0 all work done, 1 failed, 2 a mistake in what was typed or supplied, 130 and 143 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
teachers_app = typer.Typer(
    cls=_Commands,
    help="List, show, fetch, check, verify and weigh teachers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(teachers_app, name="teachers")


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"nexus {nexus.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil many specialist teachers into one small student that runs alone."""
    del version


# --- runs ---------------------------------------------------------------------------------------------------------------------


@app.command()
def quickstart(
    out: OutOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = "local",
    dashboard: DashboardOption = False,
    as_json: JsonOption = False,
    inject_spike: SpikeOption = None,
) -> None:
    """All stages on four small teachers that ship with nexus.

    Their data ship as well. Ends with a retention table, a report and a student that runs alone.
    """
    options = RunOptions(
        None, out or Path("runs/quickstart"), tuple(overrides or ()), cluster, dashboard, as_json, None
    )
    execute_stages(options, "report", inject_spike=inject_spike)


def _stages(last: str, text: str) -> None:
    """Add the command `last`, which runs the stages up to it."""

    @app.command(last, help=text)
    def command(
        config: ConfigOption = None,
        out: OutOption = None,
        overrides: SetOption = None,
        cluster: ClusterOption = "auto",
        dashboard: DashboardOption = False,
        as_json: JsonOption = False,
        models_dir: ModelsOption = None,
    ) -> None:
        execute_stages(RunOptions(config, out, tuple(overrides or ()), cluster, dashboard, as_json, models_dir), last)


def _training_stages(name: str, last: str, text: str) -> None:
    """As `_stages`, with a spike on request, since the student trains on the way."""

    @app.command(name, help=text)
    def command(
        config: ConfigOption = None,
        out: OutOption = None,
        overrides: SetOption = None,
        cluster: ClusterOption = "auto",
        dashboard: DashboardOption = False,
        as_json: JsonOption = False,
        models_dir: ModelsOption = None,
        inject_spike: SpikeOption = None,
    ) -> None:
        options = RunOptions(config, out, tuple(overrides or ()), cluster, dashboard, as_json, models_dir)
        execute_stages(options, last, inject_spike=inject_spike)


_training_stages("pipeline", "report", "All stages of a run; run again it continues.")


@app.command()
def profile(
    config: ConfigOption = None,
    out: OutOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = "auto",
    dashboard: DashboardOption = False,
    as_json: JsonOption = False,
    models_dir: ModelsOption = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Rows of one measurement.", show_default=False)
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option(metavar="N", help="Rows of each capability.", show_default=False)
    ] = None,
    budget_seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="End after so long with what is known, marked partial.", show_default=False),
    ] = None,
    teachers: Annotated[
        str | None,
        typer.Option(
            "--teachers",
            metavar="ID,ID",
            help="Only these; the stage is complete when all have been profiled. Default: all.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh", help="Continue with what an unfinished command has measured, or measure anew."
        ),
    ] = True,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            "-b",
            metavar="DIR",
            help="Profile this exported student instead, on the same rows; the run's report lays it beside its teachers.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Find the layers of each teacher that carry its capability.

    Killed at any moment and typed again, it continues.
    """
    settings = {"batch_size": batch_size, "max_samples": max_samples, "budget_seconds": budget_seconds}
    extra = [f"profile.{key}={value}" for key, value in settings.items() if value is not None]
    options = RunOptions(config, out, (*(overrides or ()), *extra), cluster, dashboard, as_json, models_dir)
    if bundle is not None:
        unused = {
            "--cluster": cluster != "auto",
            "--dashboard": dashboard,
            "--models-dir": models_dir is not None,
            "--budget-seconds": budget_seconds is not None,
            "--teachers": teachers is not None,
            "--fresh": not resume,
        }
        for name, is_given in unused.items():
            if is_given:
                raise UserError(
                    f"Expected --bundle without {name}, which has no effect on a student alone, found both. Leave one out."
                )
        from jobs.structure import profile_bundle

        profile_bundle(options, bundle)
        return
    chosen = None if teachers is None else tuple(name.strip() for name in teachers.split(",") if name.strip())
    if chosen == ():
        raise UserError(f"Expected --teachers ID,ID, found {teachers!r}. Name at least one, or leave it out for all.")
    execute_stages(options, "profile", teachers=chosen, resume=resume)


_stages("extract", "Write the language teachers' answers to Parquet, once.")
_training_stages("distill", "distill", "Train the student from its teachers.")
_stages("route", "Fit the router that picks the student's towers.")
_stages("evaluate", "Score teachers and student on held-out rows.")
_stages("export", "Write the student as a bundle that runs without any teacher.")


@app.command()
def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="Run directory with metrics.json.", show_default=False)
    ],
    as_json: JsonOption = False,
) -> None:
    """Draw report.html of a run from its files alone."""
    from nexus.assembly.report import load_report_data, render_table, render_transports, write_report

    data = load_report_data(run_dir)
    path = run_dir / "report.html"
    write_report(data, path)
    if as_json:
        _print_json({"report": str(path), "metrics": data.metrics.model_dump(mode="json")})
    else:
        typer.echo(render_table(data.metrics), nl=False)
        typer.echo(render_transports(data.metrics), nl=False)
        typer.echo(f"report: {path}")


# --- the student alone --------------------------------------------------------------------------------------------------------


@app.command()
def generate(
    bundle: Annotated[
        Path,
        typer.Option("--bundle", "-b", metavar="DIR", help="Folder that `nexus export` wrote.", show_default=False),
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The question.", show_default=False)
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Image that the question is about.", show_default=False)
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Recording that the question is about.", show_default=False)
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--input",
            "-i",
            metavar="ROWS.jsonl",
            help="One JSON object a line: prompt, and image or audio as a path beside the file. Answers come as JSON lines.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, metavar="N", help="Longest answer, in tokens.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Let an exported student answer; no teacher is read."""
    from jobs.generate import answer_file, answer_one, to_document

    if (prompt is None) == (rows is None):
        found = "neither" if prompt is None else "both"
        raise UserError(f"Expected either --prompt TEXT or --input ROWS.jsonl, found {found}. Give one of them.")
    if rows is not None:
        if image is not None or audio is not None:
            raise UserError(
                "Expected --image and --audio beside --prompt, found them beside --input. Name media inside the rows."
            )
        documents = ({**row, **to_document(answer)} for row, answer in answer_file(bundle, rows, max_new_tokens))
        if as_json:
            _print_json({"answers": list(documents)})
            return
        for document in documents:
            _print_json(document)
        return
    assert prompt is not None
    answer = answer_one(bundle, prompt, image, audio, max_new_tokens)
    if as_json:
        _print_json(to_document(answer))
    else:
        typer.echo(answer.text)


# --- the machine, the configuration, the teachers -----------------------------------------------------------------------------


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, what is missing, and what to type."""
    from jobs.doctor import examine, render

    findings = examine()
    ready = all(finding.state != "missing" for finding in findings)
    if as_json:
        _print_json({"ready": ready, "findings": [finding.to_dict() for finding in findings]})
    else:
        typer.echo(render(findings))
    if not ready:
        raise typer.Exit(ExitCodes.FAILED)


@app.command()
def plan(
    config: ConfigOption = None,
    overrides: SetOption = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="4x24GiB",
            help="The cluster: NxSIZE, + within a node, a comma between nodes, a node's memory behind /. Default: this machine.",
            show_default=False,
        ),
    ] = None,
    every_teacher: Annotated[
        bool, typer.Option("--all", help="Plan for every teacher of the registry instead of the run's own.")
    ] = False,
    models_dir: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say where each teacher would live, at what cost.

    Starts nothing: sizes come from the headers of checkpoints on this machine, else from the registry.
    """
    from jobs.execute import load_run_config
    from jobs.plan import plan_document, plan_run, render_plan

    found, path, note = load_run_config(config, tuple(overrides or ()))
    result = plan_run(found, gpus=gpus, models_dir=models_dir, every_teacher=every_teacher)
    if as_json:
        _print_json(plan_document(result))
        return
    typer.echo(f"configuration {path}{note}")
    typer.echo(render_plan(result))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("nexus.yaml"),
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher",
            "-t",
            metavar="ID|DIR|OWNER/NAME",
            help="Registry id, checkpoint folder, or repository (owner/name or owner/name@revision). Repeatable.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            metavar="CAPABILITY=DIR",
            help="Folder with pool*, labelled* and test* files (Parquet, JSONL or CSV). Repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a run's YAML for your own teachers and data."""
    from jobs.initialise import write_config

    written = write_config(path, teachers=tuple(teacher or ()), data=tuple(data or ()))
    if as_json:
        _print_json({"config": str(path), "notes": list(written.notes), "next": written.command})
        return
    for note in written.notes:
        typer.echo(note)
    typer.echo(f"wrote {path}; look it over, then type `{written.command}`")


@teachers_app.command("list")
def teachers_list(as_json: JsonOption = False) -> None:
    """All teachers of the registry."""
    from jobs.teachers import list_teachers, teachers_document

    if as_json:
        _print_json(teachers_document())
    else:
        typer.echo(list_teachers())


@teachers_app.command("show")
def teachers_show(
    teacher: Annotated[str, typer.Argument(metavar="ID", help="Id of a teacher.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Everything that the registry holds about one teacher."""
    from jobs.teachers import show_teacher, teacher_document

    if as_json:
        _print_json(teacher_document(teacher))
    else:
        typer.echo(show_teacher(teacher))


@teachers_app.command("pull")
def teachers_pull(
    teacher: Annotated[list[str], typer.Argument(metavar="ID", help="Ids of teachers.", show_default=False)],
    models_dir: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch checkpoints where there is a network.

    They come from the Hugging Face Hub: safetensors, configuration and tokenizer, never pickled weights.
    """
    from jobs.teachers import pull_teachers

    pulled = {}
    for name, folder in pull_teachers(tuple(teacher), models_dir=models_dir):
        pulled[name] = str(folder)
        if not as_json:
            typer.echo(f"{name}: {folder}")
    if as_json:
        _print_json({"pulled": pulled})


@teachers_app.command("check")
def teachers_check(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Build each architecture tiny and try that; needs no files and no network.")
    ] = False,
    teachers: Annotated[
        str | None, typer.Option("--teachers", metavar="ID,ID", help="Only these. Default: all.", show_default=False)
    ] = None,
    models_dir: ModelsOption = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --tiny: leave the tiny checkpoints in DIR, for a run with --models-dir DIR.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON array to stdout; everything else goes to stderr.")
    ] = False,
) -> None:
    """Load teachers in NF4, run their role, and say what works.

    A row is ok, needs something (and says what to type), or failed. The exit code is 1 when one failed.
    """
    from jobs.teachers import check_document, check_rows, render_check

    if tiny and models_dir is not None:
        raise UserError("Expected --models-dir without --tiny, which reads no checkpoints, found both. Leave one out.")
    if keep is not None and not tiny:
        raise UserError("Expected --keep beside --tiny, which builds the checkpoints, found it alone. Add --tiny.")
    rows = []
    for row in check_rows(teachers, tiny=tiny, models_dir=models_dir, keep=keep):
        rows.append(row)
        if not as_json:
            typer.echo(render_check(row))
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "needs", "failed")}
    if as_json:
        typer.echo(json.dumps([check_document(row) for row in rows], ensure_ascii=False))
    else:
        typer.echo(f"{counts['ok']} of {len(rows)} ok, {counts['needs']} with needs, {counts['failed']} failed")
    if counts["failed"]:
        raise typer.Exit(ExitCodes.FAILED)


@teachers_app.command("tax")
def teachers_tax(
    config: ConfigOption = None,
    overrides: SetOption = None,
    teachers: Annotated[
        str | None,
        typer.Option("--teachers", metavar="ID,ID", help="Only these of the run. Default: all.", show_default=False),
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Held-out rows of each capability. Default: 64.", show_default=False),
    ] = None,
    registry: Annotated[
        bool, typer.Option("--registry", help="The registry's teachers of every role, on fixed inputs.")
    ] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="As --registry, each built tiny first.")] = False,
    models_dir: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what NF4 costs a run's teachers on held-out rows.

    KL(original || NF4) per token, agreement of the most probable token or label, scores of both; cosine for embeddings. With
    --registry or --tiny also of sae features, noise predictions and reconstructions, which no run scores.
    """
    from dataclasses import asdict

    from jobs.execute import load_run_config
    from jobs.tax import measure_taxes, registry_taxes, render_tax
    from jobs.teachers import quiet_libraries

    if registry or tiny:
        if config is not None or overrides or max_rows is not None or (tiny and (models_dir is not None or registry)):
            from nexus.errors import ConfigError

            raise ConfigError(
                "Expected --registry or --tiny by itself, found an option that would have no effect beside it. Leave out --config, "
                "--set and --max-rows, and --models-dir with --tiny."
            )
        source = Path("--tiny" if tiny else "--registry")
        measured = registry_taxes(_ids(teachers), tiny=tiny, models_dir=models_dir)
    else:
        run, source, note = load_run_config(config, tuple(overrides or ()))
        typer.echo(f"configuration {source}{note}", err=True)
        measured = measure_taxes(run, _ids(teachers), max_rows=max_rows or 64, models_dir=models_dir)
    quiet_libraries()
    rows = []
    for row in measured:
        rows.append(row)
        if not as_json:
            typer.echo(render_tax(row))
    if as_json:
        _print_json({"config": str(source), "taxes": [asdict(row) for row in rows]})


@teachers_app.command("verify")
def teachers_verify(
    teachers: Annotated[
        str | None, typer.Option("--teachers", metavar="ID,ID", help="Only these. Default: all.", show_default=False)
    ] = None,
    models_dir: ModelsOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON array to stdout; everything else goes to stderr.")
    ] = False,
) -> None:
    """Compare local checkpoints with the registry.

    Files, hashes, revision, class and tensors. Uses no network and says what only the repository can tell. The exit code is 1 when
    one failed.
    """
    from dataclasses import asdict

    from jobs.teachers import quiet_libraries, render_verification
    from nexus.towers.registry import load_registry
    from nexus.towers.verify import verify_teachers

    quiet_libraries()
    rows = []
    for row in verify_teachers(load_registry(), _ids(teachers), models_dir=models_dir):
        rows.append(row)
        if not as_json:
            typer.echo(render_verification(row))
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], ensure_ascii=False))
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(ExitCodes.FAILED)


def _ids(text: str | None) -> tuple[str, ...]:
    return tuple(name for name in (text or "").split(",") if name)


if __name__ == "__main__":
    app()
