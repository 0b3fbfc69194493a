"""`nexus init`, `nexus teachers` and `nexus doctor`: what a person types before the first run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from jobs.doctor import Finding, render
from nexus.config import SAMPLES_DIR, load_config
from nexus.towers.registry import load_registry

TEACHERS = SAMPLES_DIR / "teachers"


# --- init -----------------------------------------------------------------------------------------------------------------------


def test_the_bare_command_writes_an_example_that_parses(nexus):
    told = nexus("init")
    assert told.code == 0
    assert "nexus pipeline --config nexus.yaml" in told.out
    assert "examples, to be replaced by yours" in told.out
    config = load_config(Path("nexus.yaml"))
    assert [(t.kind, t.capabilities) for t in config.teachers] == [("registry", ("language",))]
    assert config.name == "nexus"


def test_local_checkpoints_get_their_role_and_the_data_that_they_can_read(nexus):
    arguments = []
    for name in ("reasoning", "code", "vision", "audio"):
        arguments += ["-t", TEACHERS / f"sample-{name}", "-d", f"{name}={SAMPLES_DIR / name}"]
    assert nexus("init", "own.yaml", *arguments, "--json").document()["next"] == "nexus pipeline --config own.yaml"
    config = load_config(Path("own.yaml"))
    roles = {teacher.id: (teacher.role, teacher.capabilities) for teacher in config.teachers}
    assert roles == {
        "sample-reasoning": ("causal_lm", ("reasoning", "code")),
        "sample-code": ("causal_lm", ("reasoning", "code")),
        "sample-vision": ("encoder", ("vision",)),
        "sample-audio": ("encoder", ("audio",)),
    }
    assert {source.capability: source.towers for source in config.data} == {
        "reasoning": ("reasoning",),
        "code": (),
        "vision": ("vision",),
        "audio": ("audio",),
    }
    assert {source.capability: source.answer for source in config.data if source.answer == "gsm8k"} == {
        "reasoning": "gsm8k"
    }
    assert config.student.tokenizer == "sample-reasoning"
    assert config.data_of("audio").test == (str(SAMPLES_DIR / "audio" / "test.parquet"),)


def test_every_loadable_language_model_of_the_registry_makes_a_run(nexus):
    ids = [entry.id for entry in load_registry().teachers if entry.role == "causal_lm"]
    assert len(ids) > 3
    for number, name in enumerate(ids):
        assert nexus("init", f"{number}.yaml", "--teacher", name).code == 0
        assert load_config(Path(f"{number}.yaml")).student.tokenizer == name


def test_encoders_of_the_registry_come_with_the_tower_of_their_input(nexus):
    arguments = ("-t", "qwen2.5-0.5b", "-t", "siglip2-so400m", "-t", "whisper-large-v3-turbo")
    assert nexus("init", "a.yaml", *arguments).code == 0
    config = load_config(Path("a.yaml"))
    assert [(source.capability, source.towers) for source in config.data] == [
        ("language", ()),
        ("vision", ("vision",)),
        ("audio", ("audio",)),
    ]


@pytest.mark.parametrize(("text", "revision"), [("Owner/Some.Model", "main"), ("Owner/Some.Model@v1.0", "v1.0")])
def test_a_repository_becomes_a_hub_teacher_and_what_was_assumed_is_said(nexus, text, revision):
    told = nexus("init", "a.yaml", "-t", text)
    assert "taken for a language model" in told.out
    (teacher,) = load_config(Path("a.yaml")).teachers
    assert (teacher.kind, teacher.id, teacher.repo) == ("hub", "some.model", "Owner/Some.Model")
    assert (teacher.revision, teacher.role) == (revision, "causal_lm")


ARCHITECTURES = {
    "LlamaForCausalLM": ("causal_lm", "language"),
    "GPT2LMHeadModel": ("causal_lm", "language"),
    "Gemma3ForConditionalGeneration": ("causal_lm", "language"),
    "ViTForImageClassification": ("encoder", "vision"),
    "SiglipVisionModel": ("encoder", "vision"),
    "WhisperForConditionalGeneration": ("encoder", "audio"),
    "Wav2Vec2ForCTC": ("encoder", "audio"),
    "ASTForAudioClassification": ("encoder", "audio"),
}


def checkpoint(folder: Path, architecture: str, **processor: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def role_of(nexus, folder: Path) -> tuple[str, str]:
    told = nexus("init", "a.yaml", "-t", folder, "-t", "qwen2.5-0.5b")
    assert told.code == 0, told.err
    teacher = load_config(Path("a.yaml")).teachers[0]
    return teacher.role, teacher.capabilities[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_role_of_a_checkpoint_is_read_from_its_class(nexus, tmp_path, architecture):
    assert role_of(nexus, checkpoint(tmp_path / "My Model!", architecture)) == ARCHITECTURES[architecture]


def test_where_the_class_says_nothing_the_processor_does(nexus, tmp_path):
    pictures = checkpoint(tmp_path / "pictures", "ViTModel", image_processor_type="ViTImageProcessor")
    assert role_of(nexus, pictures) == ("encoder", "vision")
    Path("a.yaml").unlink()
    sounds = checkpoint(tmp_path / "sounds", "HubertModel", feature_extractor_type="Wav2Vec2FeatureExtractor")
    assert role_of(nexus, sounds) == ("encoder", "audio")


def init_mistakes(folder: Path) -> dict[str, tuple[str, str]]:
    return {
        "unknown id": ("-t qwen2.5-0.6b", "Did you mean 'qwen2.5-0.5b'?"),
        "no folder": ("-t ./none", "Expected a checkpoint folder at ./none"),
        "a deep path": ("-t a/b/c", "Expected a checkpoint folder at a/b/c"),
        "no checkpoint": (f"-t {folder}", "Expected a checkpoint with config.json"),
        "nameless": (f"-t {folder}/nameless", "under `architectures`"),
        "a class of no use": (f"-t {folder}/bert", "found BertModel"),
        "a teacher of video": (f"-t {folder}/video", "found an encoder of video"),
        "video of the registry": ("-t videomae-large", "found an encoder of video"),
        "a role without loader": ("-t sd3-medium", "role diffusion"),
        "a wrong repository": ("-t -/.-", "Expected a repository as owner/name"),
        "a wrong revision": ("-t a/b@@", "Expected a branch, tag or commit"),
        "encoders alone": ("-t siglip2-so400m", "Expected a language model among the teachers"),
        "a teacher twice": ("-t qwen2.5-0.5b -t qwen2.5-0.5b", "found 'qwen2.5-0.5b' twice"),
        "data of nowhere": (f"-d code={folder}/none", "Expected a folder with pool, labelled and test files"),
        "data without a name": (f"-d ={folder}", "Expected --data CAPABILITY=DIR"),
        "data without a folder": ("-d code=", "Expected --data CAPABILITY=DIR"),
        "data with a strange name": (f"-d Code!={SAMPLES_DIR}/code", "'data.0.capability'"),
        "a missing split": (f"-d code={folder}/split", "Expected a file labelled*"),
        "an encoder without data": (
            f"-t {TEACHERS}/sample-reasoning -t {TEACHERS}/sample-vision -d code={SAMPLES_DIR}/code",
            "Expected data with images for sample-vision",
        ),
    }


@pytest.mark.parametrize("name", init_mistakes(Path()))
def test_nonsense_is_refused_in_one_line_and_writes_nothing(nexus, tmp_path, name):
    checkpoint(tmp_path / "bert", "BertModel")
    checkpoint(tmp_path / "video", "VideoMAEForVideoClassification")
    (tmp_path / "nameless").mkdir()
    (tmp_path / "nameless" / "config.json").write_text("{}")
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "pool.jsonl").write_text('{"prompt": "x"}\n')
    arguments, expected = init_mistakes(tmp_path)[name]
    assert expected in nexus("init", "a.yaml", *arguments.split()).complaint()
    assert not Path("a.yaml").exists()


def test_an_existing_file_is_left_alone(nexus):
    Path("a.yaml").write_text("mine")
    assert "Choose another name" in nexus("init", "a.yaml").complaint()
    assert Path("a.yaml").read_text() == "mine"
    assert "Choose another place" in nexus("init", "a.yaml/b.yaml").complaint()


# --- teachers -------------------------------------------------------------------------------------------------------------------


def test_the_registry_is_listed_for_people_and_for_machines(nexus):
    listed = nexus("teachers", "list").out.splitlines()
    entries = nexus("teachers", "list", "--json").document()["teachers"]
    assert listed[0].split()[0] == "id"
    assert [line.split()[0] for line in listed[1:]] == [entry["id"] for entry in entries]
    assert max(map(len, listed)) < 140


def test_one_teacher_is_shown_in_both_forms_alike(nexus):
    shown = yaml.safe_load(nexus("teachers", "show", "qwen2.5-0.5b").out)
    assert shown == nexus("teachers", "show", "qwen2.5-0.5b", "--json").document()
    assert "Did you mean" in nexus("teachers", "show", "qwen2.5-0.6b").complaint()


def test_pulling_without_a_network_is_one_line(nexus, tmp_path):
    complaint = nexus("teachers", "pull", "qwen2.5-0.5b", "--models-dir", tmp_path / "m").complaint()
    assert "unset HF_HUB_OFFLINE" in complaint
    assert "Did you mean" in nexus("teachers", "pull", "qwen2.5-0.5b", "qwen2.5-0.6b").complaint()


KEYS = [
    "id", "status", "reason", "role", "quantised", "quantised_share", "quantisable_share", "bits_per_param", "targets", "seconds",
]  # fmt: skip


def test_teachers_are_checked_tiny_for_people_and_for_machines(nexus):
    told = nexus("teachers", "check", "--tiny", "--teachers", "qwen2.5-0.5b,padt-ovd-3b", "--json")
    assert told.code == 0
    fine, needing = json.loads(told.out)
    assert list(fine) == list(needing) == KEYS
    assert (fine["id"], fine["status"], fine["quantised"], fine["targets"]) == (
        "qwen2.5-0.5b", "ok", True, ["tokens", "hidden", "text"]
    )  # fmt: skip
    assert (needing["id"], needing["status"], needing["targets"]) == ("padt-ovd-3b", "needs", [])
    lines = nexus("teachers", "check", "--tiny", "--teachers", "qwen2.5-omni-7b,step3-vl-10b").out.splitlines()
    assert "already quantised (GPTQ 4 bit, group 64), 4.76 bits; tokens, hidden, text)" in lines[0]
    assert "needs: the repository's own Python files" in lines[1]
    assert lines[2] == "1 of 2 ok, 1 with needs, 0 failed"


def test_a_teacher_that_fails_its_check_is_the_exit_code(nexus, tmp_path):
    folder = tmp_path / "m" / "qwen2.5-0.5b"
    folder.mkdir(parents=True)
    told = nexus("teachers", "check", "--teachers", "qwen2.5-0.5b", "--models-dir", folder.parent)
    assert told.code == 1
    assert "failed: Expected config.json in" in told.out


def test_checking_what_is_unknown_or_contradictory_is_one_line(nexus, tmp_path):
    assert "Did you mean" in nexus("teachers", "check", "--tiny", "--teachers", "qwen2.5-0.6b").complaint()
    assert "without --tiny" in nexus("teachers", "check", "--tiny", "--models-dir", tmp_path).complaint()


# --- doctor ---------------------------------------------------------------------------------------------------------------------


def test_the_doctor_finds_this_machine_fit_and_says_one_line_each(nexus):
    told = nexus("doctor", "--json")
    document = told.document()
    names = [finding["name"] for finding in document["findings"]]
    assert {"python", "torch", "ray", "NF4", "memory", "disk", "samples", "Ray cluster"} <= set(names)
    # Free memory is the machine's affair; everything else is the installation's.
    missing = {f["name"] for f in document["findings"] if f["state"] == "missing"} - {"memory"}
    assert missing == set()
    assert told.code == (0 if document["ready"] else 1)


def test_the_doctor_names_a_cluster_that_does_not_answer(nexus, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    told = nexus("doctor")
    assert told.code == 1
    (line,) = [line for line in told.out.splitlines() if "Ray cluster" in line]
    assert line.startswith("missing")
    assert "1 missing: see above" in told.out or "2 missing: see above" in told.out


def test_a_remedy_stands_below_its_finding():
    text = render([Finding("disk", "missing", "0.1 GiB free", "free 1 GiB"), Finding("torch", "ok", "2")])
    assert text.splitlines() == [
        "missing  disk   0.1 GiB free",
        "                -> free 1 GiB",
        "ok       torch  2",
        "1 missing: see above",
    ]
