"""The registry of teachers, where their files are, and what keeps them away."""

from __future__ import annotations

import errno
import http.server
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from nexus.config import HubTeacher, PathTeacher, RegistryTeacher
from nexus.errors import ConfigError, TowerLoadError, UnsupportedRoleError
from nexus.towers.registry import (
    BASE,
    TeacherEntry,
    TeacherRegistry,
    base_of,
    load_registry,
    nearest,
    pull_teacher,
    resolve_entry,
    resolve_teacher,
    shipped_config,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def registry() -> TeacherRegistry:
    return load_registry()


@pytest.fixture
def document() -> dict[str, Any]:
    return yaml.safe_load(shipped_config("teachers.yaml").read_text())


def write(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "teachers.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


# --- the shipped file ---------------------------------------------------------------------------------------------------------


def test_all_23_teachers_parse(registry: TeacherRegistry) -> None:
    assert len(registry.teachers) == 23
    assert len(set(registry.ids())) == 23
    assert {entry.role for entry in registry.teachers} == {
        "causal_lm",
        "encoder",
        "codec_lm",
        "codec",
        "diffusion",
        "sae",
    }


def test_every_class_of_transformers_exists_and_has_the_entrys_model_type(registry: TeacherRegistry) -> None:
    import transformers

    checked = 0
    for entry in registry.teachers:
        if entry.library == "transformers" and entry.model_class is not None:
            config = getattr(transformers, entry.model_class).config_class
            # Parts of a model (a vision tower, a thinker) have a longer name than the whole that the checkpoint names.
            assert config.model_type.startswith(entry.model_type), entry.id
            checked += 1
    assert checked == 14


def test_every_teacher_has_contracts_with_its_bound(registry: TeacherRegistry) -> None:
    for entry in registry.teachers:
        assert registry.contracts_of(entry.id).keys() == set(entry.capabilities)
    reasoning = registry.contracts_of("agentcpm-explore")["reasoning"]
    assert reasoning is not None
    assert (reasoning.benchmark, reasoning.metric, reasoning.share, reasoning.factor) == (
        "gsm8k",
        "accuracy",
        0.97,
        None,
    )
    asr = registry.contracts_of("vibevoice-asr")["asr"]
    assert asr is not None
    assert (asr.share, asr.factor) == (None, 1.03)


def test_memory_estimates_are_at_least_the_bits_of_nf4(registry: TeacherRegistry) -> None:
    for entry in registry.teachers:
        if entry.role != "sae":
            assert entry.memory_gib > 0.9 * entry.billion_parameters * 1e9 * 4.1275 / 8 / 2**30, entry.id


def test_the_registry_needs_no_torch() -> None:
    code = "import sys; from nexus.towers.registry import load_registry; load_registry(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "False"


def test_a_user_s_own_folder_of_configurations_does_not_hide_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "configs"
    own.mkdir()
    (own / "__init__.py").write_text("")
    (own / "teachers.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    assert shipped_config("teachers.yaml") == Path(__file__).parents[2] / "configs" / "teachers.yaml"


def test_missing_shipped_configuration_says_where_it_was_looked_for() -> None:
    with pytest.raises(ConfigError, match=r"configs/nowhere\.yaml.*Reinstall"):
        shipped_config("nowhere.yaml")


# --- mistakes in a registry ----------------------------------------------------------------------------------------------------


def test_unknown_id_names_the_nearest(registry: TeacherRegistry) -> None:
    with pytest.raises(TowerLoadError, match=r"'qwen2\.5-codr-7b'\. Did you mean 'qwen2\.5-coder-7b'\?"):
        registry.get("qwen2.5-codr-7b")


def test_id_like_no_other_gets_no_suggestion() -> None:
    assert nearest("zzz", ("agentcpm-explore",)) == "."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "main"}, "40 hexadecimal digits"),
        ({"verify": []}, "no pinned revision"),
        ({"remote_code": {"allowed": True}}, "only at a pinned revision"),
        ({"capabilities": ["flying"]}, "'flying' .* has no row under contracts"),
        ({"role": "writer"}, "Input should be"),
        ({"colour": "red"}, "Extra inputs"),
        ({"nf4": {"min_coverage": 2.0}}, "less than or equal to 1"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line(
    tmp_path: Path, document: Any, changes: dict[str, Any], message: str
) -> None:
    document["teachers"][0].update(changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load_registry(write(tmp_path, document))
    assert "\n" not in str(caught.value)


def test_a_pinned_entry_needs_no_verification_and_may_run_code(tmp_path: Path, document: Any) -> None:
    document["teachers"][0].update(revision=COMMIT, verify=[], remote_code={"allowed": True})
    entry = load_registry(write(tmp_path, document)).teachers[0]
    assert (entry.revision, entry.remote_code.allowed) == (COMMIT, True)


def test_an_id_may_stand_once(tmp_path: Path, document: Any) -> None:
    document["teachers"].append(document["teachers"][3])
    with pytest.raises(ConfigError, match=r"found 'qwen2\.5-0\.5b' twice"):
        load_registry(write(tmp_path, document))


@pytest.mark.parametrize("bounds", [{}, {"share": 0.9, "factor": 1.1}])
def test_a_contract_has_exactly_one_bound(tmp_path: Path, document: Any, bounds: dict[str, float]) -> None:
    document["contracts"]["code"] = {"benchmark": "b", "metric": "m", **bounds}
    with pytest.raises(ConfigError, match=r"contracts\.code: .*either a share"):
        load_registry(write(tmp_path, document))


@pytest.mark.parametrize(("text", "message"), [("a: [", "Expected YAML"), ("- 1", "the file: Input should be")])
def test_a_file_that_is_no_registry_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "teachers.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_registry(path)


def test_a_missing_registry_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_registry(tmp_path / "none.yaml")


# --- from a run's YAML to files --------------------------------------------------------------------------------------------------


def registry_teacher(teacher_id: str) -> RegistryTeacher:
    return RegistryTeacher(kind="registry", id=teacher_id, capabilities=("c",))


def hub_teacher(**changes: Any) -> HubTeacher:
    return HubTeacher(**{
        "kind": "hub", "id": "mine", "capabilities": ("c",), "repo": "me/mine", "revision": COMMIT, "role": "causal_lm", **changes
    })  # fmt: skip


def path_teacher(path: Path, **changes: Any) -> PathTeacher:
    return PathTeacher(
        **{"kind": "path", "id": "mine", "capabilities": ("c",), "path": str(path), "role": "encoder", **changes}
    )


def in_cache(cache: Path, repo: str, commit: str, ref: str | None = None) -> Path:
    """A repository in the layout of the Hugging Face cache."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    if ref is not None:
        (root / "refs").mkdir()
        (root / "refs" / ref).write_text(commit)
    return snapshot


def test_registry_teacher_in_the_models_folder(registry: TeacherRegistry, tmp_path: Path) -> None:
    (tmp_path / "whisper-large-v3-turbo").mkdir()
    spec = resolve_teacher(
        registry_teacher("whisper-large-v3-turbo"), registry, models_dir=tmp_path, cache_dir=tmp_path
    )
    assert asdict(spec) == {
        "id": "whisper-large-v3-turbo",
        "path": str(tmp_path / "whisper-large-v3-turbo"),
        "revision": None,
        "role": "encoder",
        "model_class": "WhisperForConditionalGeneration",
        "quantise": True,
        "skip_modules": ("model.encoder",),
        "min_coverage": 0.1,
        "unused_weights": (),
        "remote_code": False,
        "base_path": None,
        "library": "transformers",
        "cache_dir": None,
        "cache_min_parameters": 0,
        "streamed": False,
    }
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_registry_teacher_in_the_cache(registry: TeacherRegistry, tmp_path: Path) -> None:
    snapshot = in_cache(tmp_path, "Qwen/Qwen2.5-0.5B", COMMIT, ref="main")
    spec = resolve_teacher(
        registry_teacher("qwen2.5-0.5b"), registry, models_dir=tmp_path / "models", cache_dir=tmp_path
    )
    assert Path(spec.path).resolve() == snapshot.resolve()


def test_teacher_that_is_never_quantised_says_so(registry: TeacherRegistry, tmp_path: Path) -> None:
    (tmp_path / "qwen2.5-omni-7b").mkdir()
    spec = resolve_teacher(registry_teacher("qwen2.5-omni-7b"), registry, models_dir=tmp_path)
    assert (spec.quantise, spec.skip_modules, spec.min_coverage) == (False, (), 0.0)
    assert spec.unused_weights == ("talker.", "token2wav.")


def test_hub_teacher_at_its_revision(registry: TeacherRegistry, tmp_path: Path) -> None:
    snapshot = in_cache(tmp_path, "me/mine", COMMIT)
    teacher = hub_teacher(skip_modules=("q_proj",), min_coverage=0.3)
    spec = resolve_teacher(teacher, registry, models_dir=tmp_path / "models", cache_dir=tmp_path)
    assert Path(spec.path).resolve() == snapshot.resolve()
    assert (spec.revision, spec.model_class, spec.skip_modules, spec.min_coverage) == (COMMIT, None, ("q_proj",), 0.3)


def test_path_teacher(registry: TeacherRegistry, tmp_path: Path) -> None:
    spec = resolve_teacher(path_teacher(tmp_path), registry)
    assert (spec.path, spec.revision, spec.role) == (str(tmp_path), None, "encoder")


def test_path_that_is_no_folder(registry: TeacherRegistry, tmp_path: Path) -> None:
    with pytest.raises(TowerLoadError, match="found no such folder"):
        resolve_teacher(path_teacher(tmp_path / "none"), registry)


@pytest.mark.parametrize("teacher", [registry_teacher("qwen2.5-0.5b"), hub_teacher(id="qwen2.5-0.5b")])
def test_files_that_are_nowhere_name_the_command_that_fetches_them(
    registry: TeacherRegistry, tmp_path: Path, teacher: Any
) -> None:
    with pytest.raises(TowerLoadError, match=r"nexus teachers pull qwen2\.5-0\.5b"):
        resolve_teacher(teacher, registry, models_dir=tmp_path, cache_dir=tmp_path)


def test_the_model_that_an_sae_reads_lies_beside_it_or_inside_it_and_is_fetched_with_it(
    registry: TeacherRegistry, tmp_path: Path
) -> None:
    entry = registry.get("gemma-scope-2-27b")
    folder = tmp_path / "gemma-scope-2-27b"
    folder.mkdir()
    with pytest.raises(TowerLoadError, match=r"'gemma-3-27b-pt'.*nexus teachers pull gemma-scope-2-27b$"):
        resolve_entry(entry, models_dir=tmp_path, cache_dir=tmp_path / "none")
    (tmp_path / "gemma-3-27b-pt").mkdir()
    assert resolve_entry(entry, models_dir=tmp_path).base_path == str(tmp_path / "gemma-3-27b-pt")
    (folder / BASE).mkdir()
    assert resolve_entry(entry, models_dir=tmp_path).base_path == str(folder / BASE)
    base = base_of(entry)
    assert (base.id, base.repo, base.base, base.revision) == ("gemma-3-27b-pt", "google/gemma-3-27b-pt", None, None)


@pytest.mark.parametrize(
    ("teacher_id", "reason"),
    [("sd3-medium", "of role diffusion"), ("personaplex-7b", "Mimi codec"), ("gemma-scope-2-27b", "gemma-3-27b-pt")],
)
def test_unsupported_roles_are_refused_with_the_reason(registry: TeacherRegistry, teacher_id: str, reason: str) -> None:
    with pytest.raises(UnsupportedRoleError, match=reason):
        resolve_teacher(registry_teacher(teacher_id), registry)


@pytest.mark.parametrize("teacher", [hub_teacher(role="codec"), path_teacher(Path("."), role="sae")])
def test_unsupported_roles_of_own_teachers_are_refused(registry: TeacherRegistry, teacher: Any) -> None:
    with pytest.raises(UnsupportedRoleError, match=f"of role {teacher.role}"):
        resolve_teacher(teacher, registry)


@pytest.mark.parametrize("teacher_id", ["step3-vl-10b", "padt-ovd-3b"])
def test_teachers_whose_code_cannot_be_had_are_refused_with_the_reason(
    registry: TeacherRegistry, teacher_id: str
) -> None:
    with pytest.raises(TowerLoadError, match=registry.get(teacher_id).needs[0][:30]):
        resolve_teacher(registry_teacher(teacher_id), registry)


# --- fetching -----------------------------------------------------------------------------------------------------------------------

FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"print('code')",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as fetching a repository takes; repositories are named for what is wrong with them."""

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        import json

        problem = next((name for name in ("gated", "absent", "unknown-revision", "broken") if name in self.path), None)
        if problem == "gated":
            self.answer(403, headers={"X-Error-Code": "GatedRepo"})
        elif problem == "absent":
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        elif problem == "unknown-revision":
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif problem == "broken":
            self.answer(403)
        elif "/tree/" in self.path:
            entries = [
                {"type": "file", "path": n, "size": len(c), "oid": f"{i:040d}"}
                for i, (n, c) in enumerate(FILES.items())
            ]
            self.answer(200, json.dumps(entries).encode())
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(200, json.dumps({"id": "me/fine", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            name = self.path.rsplit("/", 1)[1]
            self.answer(200, FILES[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_pull_fetches_what_a_checkpoint_needs_and_no_code_or_pickles(hub: str, tmp_path: Path) -> None:
    folder = pull_teacher(hub_teacher(repo="me/fine"), models_dir=tmp_path / "models", cache_dir=tmp_path, endpoint=hub)
    assert folder == tmp_path / "models" / "mine"
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_pull_to_the_cache_is_found_there_without_a_network(
    hub: str, tmp_path: Path, registry: TeacherRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull_teacher(hub_teacher(repo="me/fine"), cache_dir=tmp_path, endpoint=hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    spec = resolve_teacher(hub_teacher(repo="me/fine"), registry, models_dir=tmp_path / "none", cache_dir=tmp_path)
    assert spec.path == str(folder)


def test_pull_fetches_code_only_for_an_allow_listed_entry(hub: str, tmp_path: Path, document: Any) -> None:
    document["teachers"][0].update(repo="me/fine", revision=COMMIT, remote_code={"allowed": True})
    entry = load_registry(write(tmp_path, document)).teachers[0]
    folder = pull_teacher(entry, models_dir=tmp_path, endpoint=hub)
    assert (folder / "modeling.py").is_file()


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("me/gated", "gated repository.*Accept its licence"),
        ("me/absent", "no such repository"),
        ("me/unknown-revision", "no such revision"),
        ("me/broken", "no usable answer .*403"),
    ],
)
def test_pull_says_in_one_line_what_the_hub_refused(hub: str, tmp_path: Path, repo: str, message: str) -> None:
    with pytest.raises(TowerLoadError, match=message) as caught:
        pull_teacher(hub_teacher(repo=repo), models_dir=tmp_path, cache_dir=tmp_path, endpoint=hub)
    assert "\n" not in str(caught.value)


def test_pull_without_a_network_says_so(tmp_path: Path) -> None:
    with pytest.raises(TowerLoadError, match=r"no usable answer \(.*unset HF_HUB_OFFLINE"):
        pull_teacher(hub_teacher(), models_dir=tmp_path / "models", cache_dir=tmp_path)


def test_pull_to_a_place_that_cannot_be_written_says_so(hub: str, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(TowerLoadError, match="cannot be written") as caught:
        pull_teacher(hub_teacher(repo="me/fine"), models_dir=tmp_path / "models", cache_dir=tmp_path, endpoint=hub)
    assert errno.errorcode[errno.ENOTDIR] == "ENOTDIR"
    assert "Free disk space or choose another folder" in str(caught.value)


def test_entries_do_not_change(registry: TeacherRegistry) -> None:
    entry: TeacherEntry = registry.teachers[0]
    with pytest.raises(ValueError, match="frozen"):
        entry.repo = "other/repo"  # type: ignore[misc]


def test_encoders_can_be_streamed_in_a_run_and_language_models_cannot(
    registry: TeacherRegistry, tmp_path: Path
) -> None:
    (tmp_path / "whisper-large-v3-turbo").mkdir()
    known = RegistryTeacher(kind="registry", id="whisper-large-v3-turbo", capabilities=("asr",), placement="streamed")
    for teacher in (path_teacher(tmp_path, placement="streamed"), known):
        assert resolve_teacher(teacher, registry, models_dir=tmp_path).streamed
    assert not resolve_teacher(path_teacher(tmp_path), registry).streamed
    with pytest.raises(ConfigError, match="'mine' of role causal_lm: a run asks it for answers"):
        resolve_teacher(path_teacher(tmp_path, role="causal_lm", placement="streamed"), registry)
