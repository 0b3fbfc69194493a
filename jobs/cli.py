"""The `nexus` command.

Exit codes: 0 all work is done, 1 the work failed, 2 a user's mistake (one line: expected, found, remedy), 130 after Ctrl-C and 143
after SIGTERM with the state saved. Heavy imports happen inside the commands, so that `--help` and typos answer at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import nexus
from jobs.execute import DEFAULT_CONFIG_NOTE, ExitCodes, RunOptions, execute_stages, guarded
from nexus.errors import UserError

ConfigOption = Annotated[
    Optional[Path],
    typer.Option("--config", "-c", help=f"YAML of the run. {DEFAULT_CONFIG_NOTE}", show_default=False),
]
OutOption = Annotated[
    Optional[Path],
    typer.Option("--out", "-o", help="Run directory; the same command continues in it. Default: runs/<name of the run>.", show_default=False),
]
SetOption = Annotated[
    Optional[list[str]],
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key, e.g. --set distill.steps=100. Repeatable.", show_default=False),
]
ClusterOption = Annotated[
    str,
    typer.Option("--cluster", help="auto: join the running Ray cluster or start a local one. local: start one. HOST:PORT: join that one."),
]
DashboardOption = Annotated[
    bool, typer.Option("--dashboard/--no-dashboard", help="Serve the Ray dashboard when a local cluster is started.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout; everything else goes to stderr.")]
ModelsOption = Annotated[
    Optional[Path],
    typer.Option("--models-dir", help="Folder with one checkpoint folder per teacher id. Default: models, then the Hugging Face cache.", show_default=False),
]
SpikeOption = Annotated[
    Optional[str],
    typer.Option("--inject-spike", metavar="STEP:nan|xF", help="Spoil the loss of one step, to see the recovery at work.", show_default=False),
]


class _App(typer.Typer):
    """A Typer app whose mistakes are one line and whose exit codes are those of this module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and exit."""
        sys.exit(guarded(lambda: super(_App, self).__call__(*args, standalone_mode=False, **kwargs)))


app = _App(
    name="nexus",
    help="Distil many specialist teachers into one small student that runs alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
teachers_app = typer.Typer(help="The registry of teachers.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(teachers_app, name="teachers")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"nexus {nexus.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
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
    """Four small teachers and their data, shipped with nexus: all stages, a retention table and a report in minutes."""
    options = RunOptions(None, out or Path("runs/quickstart"), tuple(overrides or ()), cluster, dashboard, as_json, None)
    execute_stages(options, "report", inject_spike=inject_spike)


@app.command()
def pipeline(
    config: ConfigOption = None,
    out: OutOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = "auto",
    dashboard: DashboardOption = False,
    as_json: JsonOption = False,
    models_dir: ModelsOption = None,
    inject_spike: SpikeOption = None,
) -> None:
    """All stages of a run; run again it continues."""
    options = RunOptions(config, out, tuple(overrides or ()), cluster, dashboard, as_json, models_dir)
    execute_stages(options, "report", inject_spike=inject_spike)


@app.command()
def profile(
    config: ConfigOption = None,
    out: OutOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = "auto",
    dashboard: DashboardOption = False,
    as_json: JsonOption = False,
    models_dir: ModelsOption = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Rows of one measurement.", show_default=False)] = None,
    max_samples: Annotated[Optional[int], typer.Option(help="Rows of each capability.", show_default=False)] = None,
) -> None:
    """Find the layers of each teacher that carry its capability."""
    extra = [
        f"profile.{key}={value}" for key, value in (("batch_size", batch_size), ("max_samples", max_samples)) if value is not None
    ]
    options = RunOptions(config, out, (*(overrides or ()), *extra), cluster, dashboard, as_json, models_dir)
    execute_stages(options, "profile")


@app.command()
def extract(
    config: ConfigOption = None,
    out: OutOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = "auto",
    dashboard: DashboardOption = False,
    as_json: JsonOption = False,
    models_dir: ModelsOption = None,
) -> None:
    """Let the language teachers answer the unlabelled prompts, once, to Parquet."""
    execute_stages(RunOptions(config, out, tuple(overrides or ()), cluster, dashboard, as_json, models_dir), "extract")


@app.command()
def distill(
    config: ConfigOption = None,
    out: OutOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = "auto",
    dashboard: DashboardOption = False,
    as_json: JsonOption = False,
    models_dir: ModelsOption = None,
    inject_spike: SpikeOption = None,
) -> None:
    """Train the student from its teachers."""
    options = RunOptions(config, out, tuple(overrides or ()), cluster, dashboard, as_json, models_dir)
    execute_stages(options, "distill", inject_spike=inject_spike)


@app.command()
def route(
    config: ConfigOption = None,
    out: OutOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = "auto",
    dashboard: DashboardOption = False,
    as_json: JsonOption = False,
    models_dir: ModelsOption = None,
) -> None:
    """Fit the router that picks which of the student's towers run."""
    execute_stages(RunOptions(config, out, tuple(overrides or ()), cluster, dashboard, as_json, models_dir), "route")


@app.command()
def evaluate(
    config: ConfigOption = None,
    out: OutOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = "auto",
    dashboard: DashboardOption = False,
    as_json: JsonOption = False,
    models_dir: ModelsOption = None,
) -> None:
    """Score teachers and student on held-out rows."""
    execute_stages(RunOptions(config, out, tuple(overrides or ()), cluster, dashboard, as_json, models_dir), "evaluate")


@app.command()
def export(
    config: ConfigOption = None,
    out: OutOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = "auto",
    dashboard: DashboardOption = False,
    as_json: JsonOption = False,
    models_dir: ModelsOption = None,
) -> None:
    """Write the student as a bundle that runs without any teacher."""
    execute_stages(RunOptions(config, out, tuple(overrides or ()), cluster, dashboard, as_json, models_dir), "export")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run directory with metrics.json.")],
    as_json: JsonOption = False,
) -> None:
    """Draw report.html of a run from its files alone."""
    from nexus.assembly.report import load_report_data, render_table, write_report

    data = load_report_data(run_dir)
    path = run_dir / "report.html"
    write_report(data, path)
    if as_json:
        typer.echo(json.dumps({"report": str(path)}))
    else:
        typer.echo(render_table(data.metrics), nl=False)
        typer.echo(f"report: {path}")


# --- the student alone --------------------------------------------------------------------------------------------------------


@app.command()
def generate(
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="Folder that `nexus export` wrote.")],
    prompt: Annotated[Optional[str], typer.Option("--prompt", "-p", help="The question.", show_default=False)] = None,
    image: Annotated[Optional[Path], typer.Option(help="Image file that the question is about.", show_default=False)] = None,
    audio: Annotated[Optional[Path], typer.Option(help="Audio file that the question is about.", show_default=False)] = None,
    rows: Annotated[
        Optional[Path],
        typer.Option("--input", "-i", help="JSONL, one object a line: prompt, and image or audio as a path beside the file.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Let an exported student answer; no teacher is read."""
    from jobs.generate import answer_file, answer_one

    if (prompt is None) == (rows is None):
        raise UserError("Expected either --prompt TEXT or --input ROWS.jsonl, found both or neither. Give one of them.")
    if rows is not None:
        if image is not None or audio is not None:
            raise UserError("Expected --image and --audio beside --prompt, found them beside --input. Name media inside the rows.")
        answers = answer_file(bundle, rows, max_new_tokens)
        for row, answer in answers:
            typer.echo(json.dumps({**row, "answer": answer.text, "towers": list(answer.towers), "source": answer.source}, ensure_ascii=False))
        return
    assert prompt is not None
    answer = answer_one(bundle, prompt, image, audio, max_new_tokens)
    if as_json:
        typer.echo(json.dumps({"answer": answer.text, "towers": list(answer.towers), "source": answer.source}, ensure_ascii=False))
    else:
        typer.echo(answer.text)


# --- the machine, the configuration, the teachers -----------------------------------------------------------------------------


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, what is missing, and what to type."""
    from jobs.doctor import examine, render

    findings = examine()
    typer.echo(json.dumps([finding.to_dict() for finding in findings]) if as_json else render(findings))
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(ExitCodes.FAILED)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("nexus.yaml"),
    teacher: Annotated[
        Optional[list[str]],
        typer.Option("--teacher", "-t", help="Registry id, checkpoint folder, or repo id; repeatable.", show_default=False),
    ] = None,
    data: Annotated[
        Optional[list[str]],
        typer.Option("--data", "-d", metavar="CAPABILITY=FOLDER", help="Folder with pool, labelled and test files; repeatable.", show_default=False),
    ] = None,
) -> None:
    """Write a run's YAML for your own teachers and data."""
    from jobs.initialise import write_config

    typer.echo(write_config(path, teachers=tuple(teacher or ()), data=tuple(data or ())))


@teachers_app.command("list")
def teachers_list(as_json: JsonOption = False) -> None:
    """All teachers of the registry."""
    from jobs.teachers import list_teachers

    typer.echo(list_teachers(as_json=as_json))


@teachers_app.command("show")
def teachers_show(
    teacher: Annotated[str, typer.Argument(help="Id of a teacher.")], as_json: JsonOption = False
) -> None:
    """Everything that the registry holds about one teacher."""
    from jobs.teachers import show_teacher

    typer.echo(show_teacher(teacher, as_json=as_json))


@teachers_app.command("pull")
def teachers_pull(
    teacher: Annotated[list[str], typer.Argument(help="Ids of teachers.")],
    models_dir: ModelsOption = None,
) -> None:
    """Fetch checkpoints from the Hugging Face Hub, where there is a network."""
    from jobs.teachers import pull_teachers

    for line in pull_teachers(tuple(teacher), models_dir=models_dir):
        typer.echo(line)


if __name__ == "__main__":
    app()
