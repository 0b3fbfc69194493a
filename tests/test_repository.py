"""What holds for the repository as a whole: import directions, declared dependencies, shipped files, secrets, documents."""

from __future__ import annotations

import ast
import fnmatch
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("nexus", "actors", "jobs")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# What .gitignore names: built or run, not written.
NOT_OURS = {".git", ".venv", ".teacher-envs", "__pycache__", "runs", "build", "dist", "htmlcov"}
# Run by hand to rebuild the sample data and teachers; they may use the `dev` extra.
SAMPLE_MAKERS = ROOT / "nexus" / "data" / "samples"
# Files that are imported, or reach the import, only where the extra is installed.
USES_AN_EXTRA = {"nexus/towers/pipelines.py": "diffusion", "nexus/towers/tiny.py": "diffusion"}
# Declared although no file imports them.
USED_WITHOUT_IMPORT = {"pandas": "Ray Data converts batches and writes Parquet through it"}


def project_files() -> Iterator[Path]:
    """Every written file, in a stable order."""
    for folder, subfolders, files in os.walk(ROOT):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in NOT_OURS and not name.endswith((".egg-info", "_cache")) and name != ".hypothesis"
        )
        yield from (Path(folder) / name for name in sorted(files) if not name.startswith(".coverage"))


def text_files() -> Iterator[tuple[str, str]]:
    """Path from the root and content of every file that is text."""
    for path in project_files():
        try:
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def python_files(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in project_files():
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders:
            yield path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.Module) -> set[str]:
    """Absolute names of all modules imported anywhere in a file, inside functions as well."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def pyproject() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def declared(group: str | None = None) -> dict[str, Requirement]:
    """Requirements by normalised name: those of the project, or of one extra."""
    project = pyproject()["project"]
    lines = project["optional-dependencies"][group] if group else project["dependencies"]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def run_python(code: str, *arguments: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- layout and imports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("nexus", {"ray", "actors", "jobs"}), ("actors", {"jobs"}), ("jobs", {"tests", "benchmarks"})],
)
def test_imports_run_from_jobs_to_actors_to_nexus_and_nexus_knows_no_ray(package: str, forbidden: set[str]) -> None:
    files = list(python_files(package))
    assert files
    offenders = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in files
        for name in top_level(imported_modules(tree)) & forbidden
    }
    assert not offenders


def test_the_import_check_sees_imports_inside_functions_and_of_submodules() -> None:
    tree = ast.parse("def f():\n    import ray.data as d\n    from jobs import cli\n")
    assert imported_modules(tree) == {"ray.data", "jobs", "jobs.cli"}


@pytest.mark.parametrize("module", ["nexus", "nexus.config", "nexus.artifacts", "nexus.errors", "jobs.cli"])
def test_importing_it_loads_neither_torch_nor_transformers_nor_ray(module: str) -> None:
    loaded = json.loads(run_python(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"))
    assert module in loaded
    assert {"torch", "transformers", "ray"}.isdisjoint(loaded)


def test_every_python_file_begins_with_a_docstring() -> None:
    without = [
        str(path.relative_to(ROOT))
        for path, tree in python_files(*PACKAGES, "tests", "benchmarks", "scripts")
        if tree.body and not ast.get_docstring(tree)
    ]
    assert not without


def test_no_test_file_imports_a_mocking_library() -> None:
    offenders = [
        str(path.relative_to(ROOT))
        for path, tree in python_files("tests")
        if any(name.startswith(("unittest.mock", "mock")) for name in imported_modules(tree))
    ]
    assert not offenders


def test_test_files_have_unique_names_and_no_packages() -> None:
    names = [path.name for path, _ in python_files("tests") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
    assert "__init__.py" not in names


# --- the student and transformers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nexus.student.config import NexusStudentConfig
    from nexus.student.core import NexusStudentCore

    folder = tmp_path_factory.mktemp("student")
    config = NexusStudentConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        port_every=1,
    )
    NexusStudentCore(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import nexus; from transformers import AutoConfig, AutoModelForCausalLM",
        # The second registry does not exist yet when the first is filled.
        "from transformers import AutoConfig; import nexus; from transformers import AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import nexus",
    ],
    ids=["nexus first", "nexus between", "nexus last"],
)
def test_auto_classes_load_a_saved_student_whenever_nexus_is_imported(imports: str, saved_student: Path) -> None:
    load = "".join(
        f"; print(type({auto}.from_pretrained(sys.argv[1])).__qualname__)"
        for auto in ("AutoConfig", "AutoModelForCausalLM")
    )
    assert run_python(f"import sys; {imports}{load}", str(saved_student)).split() == [
        "NexusStudentConfig",
        "NexusStudentCore",
    ]


# --- dependencies ---------------------------------------------------------------------------------------------------------------


@functools.cache
def distributions() -> dict[str, list[str]]:
    """Distributions by the module that they bring; asked once, because it reads every installed file list."""
    return dict(packages_distributions())


def third_party(tree: ast.Module) -> set[str]:
    """Normalised distribution names behind the imports of a file; an unknown module keeps its own name."""
    ours = {*PACKAGES, "configs", "tests", "scripts", "benchmarks"}
    return {
        canonicalize_name(distributions().get(name, [name])[0])
        for name in top_level(imported_modules(tree)) - ours - set(sys.stdlib_module_names)
    }


def test_every_imported_distribution_is_declared() -> None:
    runtime = set(declared())
    undeclared = set()
    for path, tree in python_files(*PACKAGES):
        extra = USES_AN_EXTRA.get(str(path.relative_to(ROOT)), "dev" if path.parent == SAMPLE_MAKERS else None)
        allowed = runtime if extra is None else runtime | set(declared(extra))
        if path.parent.name == "vendors":
            # Each runs in the environment of the package that it imports; scripts/environments pins them.
            allowed = allowed | {"parler-tts", "qwen-tts"}
        undeclared |= {f"{path.relative_to(ROOT)}: {name}" for name in third_party(tree) - allowed}
    assert not undeclared


def test_every_declared_dependency_is_imported_or_has_a_stated_reason() -> None:
    imported = set().union(
        *(third_party(tree) for path, tree in python_files(*PACKAGES) if path.parent != SAMPLE_MAKERS)
    )
    assert set(declared()) - imported == set(USED_WITHOUT_IMPORT)


def test_every_dependency_has_a_lower_bound_and_a_reason_beside_it() -> None:
    bounds = re.findall(
        r'^    "([a-z][^"]*[<>=][^"]*)",(.*)$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE
    )
    extras = pyproject()["project"]["optional-dependencies"]
    assert len(bounds) == len(declared()) + sum(len(declared(extra)) for extra in extras)
    assert [line for line, comment in bounds if ">=" not in line or len(comment.partition("#")[2]) < 5] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_each_dependency_once_within_its_bounds(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    pins = [pin for pin in constraints() if pin.marker is None or pin.marker.evaluate(environment)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)
    needed = declared() | declared("dev")
    assert set(needed) <= set(versions)
    assert [name for name, wanted in needed.items() if not wanted.specifier.contains(versions[name])] == []


# --- what a wheel carries -------------------------------------------------------------------------------------------------------


def test_every_shipped_data_file_matches_a_pattern_of_package_data() -> None:
    patterns = pyproject()["tool"]["setuptools"]["package-data"]["*"]
    data = [
        path
        for path in project_files()
        if path.relative_to(ROOT).parts[0] in (*PACKAGES, "configs") and path.suffix not in (".py", ".pyc")
    ]
    assert {"nexus", "configs"} <= {path.relative_to(ROOT).parts[0] for path in data}
    left_out = [path for path in data if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)]
    assert not left_out


def test_version_is_a_literal_and_the_newest_entry_of_the_changelog() -> None:
    tree = ast.parse((ROOT / "nexus" / "__init__.py").read_text())
    literals = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "__version__"
        and isinstance(node.value, ast.Constant)
    ]
    entries = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert literals == entries[:1]


# --- secrets, machine paths, hosts ----------------------------------------------------------------------------------------------

SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|\bxox[abpr]-[A-Za-z0-9-]{10,}|\bsk-[A-Za-z0-9_-]{32,}"
    r"|(?i:\b(?:password|passwd|secret|api_?key|auth_?token)\b['\"]?\s*[:=]\s*['\"][A-Za-z0-9+/_-]{12,}['\"])"
)
MACHINE_PATHS = re.compile(r"(?<![\w.}])/(?:home|root|work|Users|opt|mnt|srv)/[\w.-]|\b[A-Z]:\\\\?Users")
HOSTS = re.compile(r"\bpypi\.org|pythonhosted\.|download\.pytorch\.|--(?:extra-)?index-url|--find-link[s]")


@pytest.mark.parametrize(
    ("pattern", "example"),
    [
        (SECRETS, "hf_" + "a1" * 17),
        (SECRETS, "api_key" + " = '" + "Zx9" * 6 + "'"),
        (SECRETS, "-----BEGIN " + "PRIVATE KEY-----"),
        (MACHINE_PATHS, "open('" + "/home" + "/someone/data')"),
        (HOSTS, "https://" + "pypi" + ".org/simple"),
        (HOSTS, "pip install " + "--extra-" + "index-url"),
    ],
)
def test_patterns_of_secrets_paths_and_hosts_find_what_they_are_for(pattern: re.Pattern[str], example: str) -> None:
    assert pattern.search(example)


@pytest.mark.parametrize("pattern", [SECRETS, MACHINE_PATHS, HOSTS], ids=["secret", "path", "host"])
def test_no_file_holds_a_secret_a_path_of_a_machine_or_a_registry_host(pattern: re.Pattern[str]) -> None:
    found = [f"{path}: {match.group()[:40]}" for path, text in text_files() for match in pattern.finditer(text)]
    assert not found


# --- shipped configurations ------------------------------------------------------------------------------------------------------


def parse_shipped(path: Path) -> object:
    """Reads a file of configs/ the way nexus does; which way depends on where it lies."""
    place = path.relative_to(ROOT / "configs").parts
    if place[0] == "student":
        from nexus.student.presets import load_student_spec

        return load_student_spec(path)
    if place == ("teachers.yaml",):
        from nexus.towers.registry import load_registry

        return load_registry(path)
    from nexus.config import load_config

    return load_config(path)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT / "configs"))
)
def test_every_shipped_configuration_parses(path: Path) -> None:
    assert parse_shipped(path) is not None


# --- documents and commands -----------------------------------------------------------------------------------------------------

LICENSE_SHA256 = "0ffddef9e48f8a09aed5caf2d44f7ba1c1be2d9b8e0a6f693b1635b2d5566645"
"""Of the published text, with every run of white space made one space."""


def test_license_is_the_full_text_of_apache_2() -> None:
    text = " ".join((ROOT / "LICENSE").read_text().split())
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert hashlib.sha256(text.encode()).hexdigest() == LICENSE_SHA256
    assert pyproject()["project"]["license"] == "Apache-2.0"


def test_make_without_a_target_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    done = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, timeout=60, check=True)
    listed = re.findall(r"^  make ([\w-]+) +\S", done.stdout, flags=re.MULTILINE)
    assert sorted(listed) == sorted(phony.group(1).split())


def test_scripts_are_executable_and_parse() -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / "scripts").glob("*.sh")]
    for script in scripts:
        assert os.access(script, os.X_OK), script
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_path_named_in_a_document_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    folders = "nexus|actors|jobs|configs|tests|benchmarks|scripts|docs"
    named = set(re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./*-]*\w)", text))
    assert named
    assert [path for path in sorted(named) if not list(ROOT.glob(path))] == []


def test_file_tree_of_the_readme_names_every_source_file_with_a_phrase() -> None:
    tree = re.search(r"^```text\n(nexus/.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert tree is not None
    described: set[str] = set()
    folder = ""
    for line in tree.group(1).splitlines():
        match = re.fullmatch(r"( *)([\w./]+) {2,}\S.*", line)
        assert match is not None, f"expected 'name  phrase', found {line!r}"
        indent, name = match.groups()
        folder = name if not indent else folder
        described.add(name if not indent else folder + name)
    sources = {
        str(path.relative_to(ROOT))
        for path, _ in python_files(*PACKAGES)
        if path.name != "__init__.py" and path.parent != SAMPLE_MAKERS
    }
    assert sources - described == set()
    assert [name for name in sorted(described) if not (ROOT / name).exists()] == []
