"""The command line before any work: help, mistakes in one line, what is imported, what the documents promise."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jobs.cli import app

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("profile", "extract", "distill", "route", "evaluate", "export", "pipeline")
COMMANDS = (
    ("quickstart",),
    *((stage,) for stage in STAGES),
    ("report",),
    ("generate",),
    ("doctor",),
    ("init",),
    ("plan",),
)
TEACHERS = tuple(("teachers", name) for name in ("list", "show", "pull", "check", "tax", "verify"))


def options_of(*command: str) -> set[str]:
    """Long and short options of a command, from the parser itself."""
    found = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]  # type: ignore[attr-defined]
    return {text for parameter in found.params for text in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("command", [(), ("teachers",), *COMMANDS, *TEACHERS], ids=" ".join)
def test_every_command_explains_itself(nexus, command):
    told = nexus(*command, "--help")
    assert told.code == 0
    assert told.err == ""
    assert told.out.startswith(" ".join(("Usage: nexus", *command)))
    _, _, rest = told.out.partition("\n")
    # A text that does not fit would end in dots; types that nobody understands stand in angle brackets.
    assert "..." not in rest
    assert not re.search(r"<(str|path|list|int)", rest.partition("Options:")[2])


def test_the_commands_of_the_design_are_there_and_no_others(nexus):
    told = nexus("--help").out.split("Commands:")[1].split("Exit codes")[0]
    listed = {line.split()[0] for line in told.splitlines() if line.startswith("  ") and line.strip()}
    assert listed == {command[0] for command in COMMANDS} | {"teachers"}


@pytest.mark.parametrize("command", [*COMMANDS, *TEACHERS], ids=" ".join)
def test_every_command_speaks_json(command):
    assert "--json" in options_of(*command)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_takes_the_same_options_of_a_run(stage):
    wanted = {"--config", "--out", "--set", "--cluster", "--dashboard", "--no-dashboard", "--json", "--models-dir"}
    assert wanted <= options_of(stage)


def test_the_version_is_the_package_s(nexus):
    import nexus as package

    assert nexus("--version").out == f"nexus {package.__version__}\n"


def test_the_bare_command_shows_its_help_and_is_no_success(nexus):
    told = nexus()
    assert told.code == 2
    assert told.err.startswith("Usage: nexus")
    assert "quickstart" in told.err


MISTAKES = {
    "unknown command": (["profil"], "found 'profil'. Did you mean 'profile'?"),
    "command like no other": (["xyzzy"], "found 'xyzzy'. `nexus --help` lists all."),
    "unknown command of a group": (["teachers", "shwo", "x"], "`nexus teachers`, found 'shwo'. Did you mean 'show'?"),
    "unknown option": (["pipeline", "--confg", "x"], "`nexus pipeline`, found --confg. Did you mean --config?"),
    "unknown option of the program": (["--verison"], "found --verison. Did you mean --version?"),
    "missing argument": (["report"], "argument 'RUN_DIR', found none"),
    "missing option": (["generate", "--prompt", "x"], "option '--bundle' / '-b', found none"),
    "missing value": (["pipeline", "--set"], "Option '--set' requires an argument"),
    "value for a flag": (["doctor", "--json=yes"], "Option '--json' does not take a value"),
    "bad value": (
        ["generate", "-b", "x", "-p", "y", "--max-new-tokens", "many"],
        "'--max-new-tokens': Input should be",
    ),
    "value out of range": (["generate", "-b", "x", "-p", "y", "--max-new-tokens", "0"], "greater than or equal to 1"),
    "extra argument": (["doctor", "now"], "unexpected extra argument(s) (now)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line_with_a_remedy(nexus, name):
    arguments, expected = MISTAKES[name]
    complaint = nexus(*arguments).complaint()
    assert complaint.startswith("nexus: Expected ")
    assert expected in complaint
    assert "--help`" in complaint


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["pipeline", "--help"], ["pipline"], ["teachers", "list"], ["pipeline", "--set", "distil.steps=3"]],
    ids=" ".join,
)
def test_what_needs_no_tensor_answers_without_torch_and_ray(arguments):
    code = f"""
import json, sys
from jobs.cli import app
try:
    app({arguments!r})
except SystemExit:
    print("\\n" + json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    loaded = set(json.loads(run_python(code).splitlines()[-1]))
    assert "jobs" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "ray", "bitsandbytes", "pyarrow"})


def command_lines(text: str) -> list[str]:
    """`nexus ...` lines of a document's code blocks, and `nexus ...` in back ticks."""
    blocks = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line.partition("  #")[0].strip() for line in blocks.splitlines()]
    spans = re.findall(r"`((?:\.venv/bin/)?nexus [^`]+)`", text)
    return [
        line.removeprefix(".venv/bin/") for line in (*lines, *spans) if re.match(r"(\.venv/bin/)?nexus [a-z-]", line)
    ]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_command_lines_in_the_documents_parse(document):
    lines = command_lines((ROOT / document).read_text())
    if document == "README.md":
        assert len(lines) > 5
    for line in lines:
        words = shlex.split(line)[1:]
        command = []
        while words and not words[0].startswith("-") and " ".join((*command, words[0])) in known_commands():
            command.append(words.pop(0))
        assert command, f"{document}: {line}"
        given = {word.split("=")[0] for word in words if word.startswith("-")}
        assert given <= options_of(*command) | {"--help"}, f"{document}: {line}"


def known_commands() -> set[str]:
    return {" ".join(command) for command in (*COMMANDS, *TEACHERS)} | {"teachers"}


def test_scripts_for_submitted_jobs_take_the_options_of_their_command():
    for script, command in {
        "distill": "distill",
        "extract": "extract",
        "pipeline": "pipeline",
        "evaluate": "evaluate",
        "profile_towers": "profile",
        "train_router": "route",
    }.items():
        text = (ROOT / "jobs" / f"{script}.py").read_text()
        assert f'run_script("{command}")' in text


def test_a_submitted_script_answers_from_anywhere_with_nothing_installed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "jobs" / "distill.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # -S hides site-packages, as an interpreter without Ray does: one line says so.
    assert done.returncode == 2
    assert "expected a Python that nexus is installed in" in done.stderr
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "distill.py"), "--stpes"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "`nexus distill`, found --stpes" in done.stderr


def test_typer_s_own_runner_sees_the_same_commands():
    assert CliRunner().invoke(app, ["teachers", "list"]).exit_code == 0
