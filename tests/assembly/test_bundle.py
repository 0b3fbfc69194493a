"""The bundle: what goes in comes out bit for bit, damage is refused, and the student runs where no teacher is."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nexus.artifacts import Metrics, read_artifact, sha256_of
from nexus.assembly.bundle import (
    MANIFEST_FILE,
    BundleManifest,
    BundleStudent,
    InputRow,
    export_bundle,
    load_bundle,
    verify_bundle,
)
from nexus.assembly.report import ReportData
from nexus.config import RunConfig
from nexus.errors import ArtifactError, DataError
from nexus.student.memory import NexusStudent
from nexus.student.preprocess import MediaInput, Noise, media_batch
from nexus.student.presets import StudentSpec

REPOSITORY = Path(__file__).parents[2]
Media = Callable[[], bytes]


@pytest.fixture(scope="module")
def config(report_data: ReportData) -> RunConfig:
    return report_data.config


@pytest.fixture(scope="module")
def metrics(report_data: ReportData) -> Metrics:
    return report_data.metrics


@pytest.fixture(scope="module")
def exported(
    student: NexusStudent,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    metrics: Metrics,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle that no test may change."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("export") / "bundle"
    export_bundle(student, tokenizer, config, metrics, directory)
    return directory


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def loaded(exported: Path) -> BundleStudent:
    return load_bundle(exported)


@pytest.fixture(scope="module")
def rows(report_data: ReportData) -> list[InputRow]:
    """Text, an image, a recording, and both, with prompts of different lengths."""
    image, audio = (
        next(sample.media for sample in report_data.samples if sample.media_kind == kind) for kind in ("image", "audio")
    )
    return [
        InputRow("What is the sum of the two digits in the image?", image=image),
        InputRow("x"),
        InputRow("Which number is spoken?", audio=audio),
        InputRow("How many stones are left after seven of the twenty were thrown into the lake?"),
        InputRow("Both?", image=image, audio=audio),
        InputRow("Which number is spoken?", audio=audio, noise=Noise("row-5", 0.0)),
        InputRow("Print the sum."),
    ]


# --- round trip ---------------------------------------------------------------------------------------------------------------


def test_a_loaded_student_gives_bit_equal_logits(
    student: NexusStudent, loaded: BundleStudent, rows: list[InputRow]
) -> None:
    media = media_batch([MediaInput(image=row.image, audio=row.audio) for row in rows], student.spec)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(2, 270, (len(rows), 9), generator=generator)
    mask = torch.ones_like(input_ids)
    towers = student.available(media, len(rows))
    before, after = (
        whole.eval()(input_ids, mask, prompt_mask_BT=mask.bool(), tower_mask_BN=towers, media=media).trunk.logits
        for whole in (student, loaded.student)
    )
    assert torch.equal(before, after)
    # The towers take part: without them the logits are others.
    alone = student.core(input_ids, mask).logits
    assert not torch.allclose(before, alone, atol=1e-2)


def test_every_weight_but_the_alignments_survives(student: NexusStudent, loaded: BundleStudent) -> None:
    before, after = student.state_dict(), loaded.student.state_dict()
    kept = {name for name in before if ".alignments." not in name}
    assert kept < before.keys()
    assert after.keys() == kept
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_the_tokenizer_survives(tokenizer: PreTrainedTokenizerBase, loaded: BundleStudent) -> None:
    text = "How many stones?\n ünïcode \u2713"
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text
    assert loaded.tokenizer.eos_token_id == tokenizer.eos_token_id


def test_a_loaded_student_answers_as_the_one_that_was_trained(
    student: NexusStudent, tokenizer: PreTrainedTokenizerBase, loaded: BundleStudent, rows: list[InputRow]
) -> None:
    trained = BundleStudent(student, tokenizer, max_length=64)
    answers = loaded.answer(rows, 12)
    assert answers == trained.answer(rows, 12)
    assert len({answer.text for answer in answers}) > 3
    assert not loaded.student.training
    assert loaded.device == torch.device("cpu")


def test_the_trunk_loads_as_any_causal_language_model(student: NexusStudent, exported: Path) -> None:
    trunk = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert type(trunk).__name__ == "NexusStudentCore"
    inputs = tokenizer("How many stones are left?\n", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(trunk.eval()(**inputs).logits, student.core.eval()(**inputs).logits)
    generated = trunk.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] <= inputs["input_ids"].shape[1] + 5
    assert trunk.generation_config.eos_token_id == tokenizer.eos_token_id


# --- what is in it ------------------------------------------------------------------------------------------------------------


def test_the_manifest_describes_every_file(exported: Path, config: RunConfig) -> None:
    manifest = read_artifact(exported / MANIFEST_FILE, BundleManifest)
    assert {path.name for path in exported.iterdir()} == {*manifest.files, MANIFEST_FILE}
    for name, file in manifest.files.items():
        assert (file.sha256, file.size) == (sha256_of(exported / name), (exported / name).stat().st_size)
    assert (manifest.name, manifest.config_fingerprint) == (config.name, config.fingerprint())
    assert verify_bundle(exported) == manifest


def test_the_manifest_counts_the_parameters_that_are_in_the_files(exported: Path) -> None:
    manifest = verify_bundle(exported)
    towers = load_file(exported / "adapters.safetensors")
    for tower in ("reasoning", "vision", "audio"):
        assert manifest.parameters[tower] == sum(
            t.numel() for name, t in towers.items() if name.startswith(f"{tower}.")
        )
    assert manifest.parameters["core"] == sum(t.numel() for t in load_file(exported / "model.safetensors").values())
    assert manifest.parameters["total"] == sum(count for part, count in manifest.parameters.items() if part != "total")
    assert manifest.towers == ("reasoning", "vision", "audio")


def test_the_manifest_says_how_input_is_prepared(exported: Path) -> None:
    manifest = verify_bundle(exported)
    assert manifest.image is not None
    assert manifest.audio is not None
    assert manifest.image.model_dump() == {"image_size": 16, "num_channels": 1, "low": -1.0, "high": 1.0}
    assert manifest.audio.model_dump() == {
        "sampling_rate": 8000,
        "num_samples": 8000,
        "num_mels": 16,
        "window_size": 256,
        "hop_size": 160,
    }
    assert manifest.max_length == 256


def test_nothing_that_only_training_needs_is_exported(exported: Path) -> None:
    assert not [name for name in load_file(exported / "adapters.safetensors") if "alignments" in name]
    for path in exported.iterdir():
        if path.suffix == ".json":
            assert "qwen3-math" not in path.read_text(), path.name
            assert "siglip-digits" not in path.read_text(), path.name


def test_a_bundle_names_no_place_of_this_machine(
    student: NexusStudent, exported: Path, config: RunConfig, metrics: Metrics, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    export_bundle(student, AutoTokenizer.from_pretrained(exported), config, metrics, again)
    for path in again.iterdir():
        content = path.read_bytes()
        assert str(exported).encode() not in content, path.name
        assert str(tmp_path).encode() not in content, path.name
        assert str(Path.home()).encode() + b"/" not in content, path.name


def test_the_model_card_says_what_was_measured(exported: Path, metrics: Metrics) -> None:
    card = (exported / "README.md").read_text()
    for capability, row in metrics.retention.items():
        assert (
            f"| {capability} | {row.num_rows} | {row.teacher} | {row.teacher_score:.3f} | {row.student_score:.3f} | "
            f"{row.retention:.3f} | {row.ci95[0]:.3f} to {row.ci95[1]:.3f} | {row.labels_only_retention:.3f} |"
        ) in card
    total = verify_bundle(exported).parameters["total"]
    assert f"{total:,} parameters" in card
    assert "16 x 16, grey" in card
    assert "8000 Hz; the first 1 s" in card


def test_the_model_card_says_when_nothing_was_measured(
    student: NexusStudent, tokenizer: PreTrainedTokenizerBase, config: RunConfig, metrics: Metrics, tmp_path: Path
) -> None:
    export_bundle(student, tokenizer, config, metrics.model_copy(update={"retention": {}}), tmp_path / "bundle")
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "Nothing was measured." in card
    assert "| capability |" not in card


def test_labels_only_that_was_not_measured_is_not_claimed(
    student: NexusStudent, tokenizer: PreTrainedTokenizerBase, config: RunConfig, metrics: Metrics, tmp_path: Path
) -> None:
    row = metrics.retention["code"].model_copy(update={"labels_only_retention": None})
    export_bundle(
        student, tokenizer, config, metrics.model_copy(update={"retention": {"code": row}}), tmp_path / "bundle"
    )
    assert "| not measured |" in (tmp_path / "bundle" / "README.md").read_text()


def test_a_student_of_text_alone_has_no_media_in_its_manifest(
    tokenizer: PreTrainedTokenizerBase, student: NexusStudent, config: RunConfig, metrics: Metrics, tmp_path: Path
) -> None:
    values = student.spec.to_dict()
    plain = NexusStudent(StudentSpec.from_dict({key: values[key] for key in ("core", "router")}))
    manifest = export_bundle(plain, tokenizer, config, metrics, tmp_path / "bundle")
    assert (manifest.image, manifest.audio, manifest.towers) == (None, None, ())
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "Images" not in card
    assert "Recordings" not in card
    (answer,) = load_bundle(tmp_path / "bundle").answer([InputRow("How many?")], 3)
    assert (answer.towers, answer.source) == ((), "trunk")


# --- exporting ----------------------------------------------------------------------------------------------------------------


def test_exporting_leaves_the_student_as_it_is(
    student: NexusStudent, tokenizer: PreTrainedTokenizerBase, config: RunConfig, metrics: Metrics, tmp_path: Path
) -> None:
    core, spec = student.core, student.spec
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    export_bundle(student, tokenizer, config, metrics, tmp_path / "bundle")
    assert student.core is core
    assert student.spec is spec
    after = student.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [len(adapter.alignments) for adapter in student.adapters.values()] == [1, 1, 0]


def test_whoever_may_read_the_card_may_read_the_weights(bundle: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in bundle.iterdir()}
    assert modes["model.safetensors"] == modes["README.md"]
    assert len(set(modes.values())) == 1, modes


def test_a_bundle_replaces_an_older_one_and_leaves_nothing_behind(
    bundle: Path, student: NexusStudent, tokenizer: PreTrainedTokenizerBase, config: RunConfig, metrics: Metrics
) -> None:
    (bundle / "README.md").write_text("older")
    export_bundle(student, tokenizer, config, metrics, bundle)
    verify_bundle(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_an_empty_folder_is_filled(
    student: NexusStudent, tokenizer: PreTrainedTokenizerBase, config: RunConfig, metrics: Metrics, tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    export_bundle(student, tokenizer, config, metrics, tmp_path / "bundle")
    verify_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_not_overwritten(
    kind: str,
    student: NexusStudent,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    metrics: Metrics,
    tmp_path: Path,
) -> None:
    target = tmp_path / "mine"
    keepsake = target / "thesis.txt" if kind == "folder" else target
    keepsake.parent.mkdir(exist_ok=True)
    keepsake.write_text("years of work")
    with pytest.raises(ArtifactError, match="found other files"):
        export_bundle(student, tokenizer, config, metrics, target)
    assert keepsake.read_text() == "years of work"


def test_a_failed_export_keeps_the_older_bundle(
    bundle: Path, tokenizer: PreTrainedTokenizerBase, student: NexusStudent, config: RunConfig, metrics: Metrics
) -> None:
    # A file stands where the old bundle would be set aside, so that the last rename fails as it would on a refusing disk.
    blocked = bundle.with_name(f".bundle.{os.getpid()}.old")
    blocked.write_text("in the way")
    with pytest.raises(ArtifactError, match=r"Expected to write the bundle .* found: "):
        export_bundle(student, tokenizer, config, metrics, bundle)
    verify_bundle(bundle)
    assert not list(bundle.parent.glob("*.tmp"))


def test_a_wrapped_encoder_of_a_teacher_is_not_exported(
    tokenizer: PreTrainedTokenizerBase, student: NexusStudent, config: RunConfig, metrics: Metrics, tmp_path: Path
) -> None:
    spec = student.spec
    assert spec.vision is not None
    wrapping = dataclasses.replace(spec, vision=dataclasses.replace(spec.vision, encoder_width=24))
    encoder = torch.nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match="wrapped encoder in the vision tower"):
        export_bundle(
            NexusStudent(wrapping, encoders={"vision": encoder}), tokenizer, config, metrics, tmp_path / "bundle"
        )
    assert not list(tmp_path.iterdir())


# --- damage -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "adapters.safetensors",
        "router.safetensors",
        "student.json",
        "config.json",
        "tokenizer.json",
        "README.md",
    ],
)
def test_one_changed_bit_is_refused(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"'{name}'.*found other content.*nexus export"):
        load_bundle(bundle)


def test_a_truncated_file_is_refused(bundle: Path) -> None:
    path = bundle / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=rf"found {path.stat().st_size} bytes"):
        load_bundle(bundle)


def test_a_missing_file_is_refused(bundle: Path) -> None:
    (bundle / "router.json").unlink()
    with pytest.raises(ArtifactError, match=r"'router\.json'.*found no such file"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", ["added_tokens.json", "chat_template.jinja", "model.safetensors.index.json"])
def test_a_foreign_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_text("{}")
    with pytest.raises(ArtifactError, match=f"found '{name}'"):
        load_bundle(bundle)


def test_hidden_files_of_version_control_do_not_matter(bundle: Path) -> None:
    (bundle / ".gitattributes").write_text("*.safetensors filter=lfs")
    verify_bundle(bundle)


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "..", "a/b"])
def test_a_manifest_cannot_reach_outside_its_folder(bundle: Path, name: str) -> None:
    document = json.loads((bundle / MANIFEST_FILE).read_text())
    document["files"][name] = {"sha256": "0" * 64, "size": 1}
    (bundle / MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="found no such file"):
        verify_bundle(bundle)


@pytest.mark.parametrize("change", [{"format": 2}, {"kind": "other"}, {"surprise": 1}, {"towers": None}])
def test_a_manifest_of_another_kind_is_refused(bundle: Path, change: dict[str, object]) -> None:
    document = json.loads((bundle / MANIFEST_FILE).read_text())
    (bundle / MANIFEST_FILE).write_text(json.dumps({**document, **change}))
    with pytest.raises(ArtifactError, match="BundleManifest"):
        load_bundle(bundle)


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, make: bool) -> None:
    if make:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"manifest\.json.*found none.*nexus export"):
        load_bundle(tmp_path / "model")


# --- answering ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_neighbours_and_batch_size_change_no_answer(
    loaded: BundleStudent, rows: list[InputRow], batch_size: int
) -> None:
    alone = tuple(loaded.answer([row], 12)[0] for row in rows)
    assert loaded.answer(rows, 12, batch_size=batch_size) == alone
    assert loaded.answer(rows[::-1], 12, batch_size=batch_size) == alone[::-1]


def test_the_image_and_the_recording_change_the_answer(loaded: BundleStudent, rows: list[InputRow]) -> None:
    picture, clip = rows[0].image, rows[2].audio
    for row in (InputRow("What?", image=picture), InputRow("What?", audio=clip)):
        with_media, without = loaded.answer([row, InputRow("What?")], 12)
        assert with_media.text != without.text


def test_noise_changes_what_is_heard(loaded: BundleStudent, rows: list[InputRow]) -> None:
    spec = loaded.student.spec
    clear, noisy = (
        media_batch([MediaInput(audio=row.audio, noise=row.noise)], spec).input_features for row in (rows[2], rows[5])
    )
    assert clear is not None
    assert noisy is not None
    assert not torch.allclose(clear, noisy, atol=0.1)
    assert loaded.answer([rows[2]], 12)[0].text != loaded.answer([rows[5]], 12)[0].text


def test_answers_say_which_towers_ran_and_who_chose_them(loaded: BundleStudent, rows: list[InputRow]) -> None:
    answers = loaded.answer(rows, 2)
    assert [(answer.towers, answer.source) for answer in answers] == [
        (("vision",), "modality"),
        ((), "trunk"),
        (("audio",), "modality"),
        (("reasoning",), "keyword"),
        (("vision", "audio"), "modality"),
        (("audio",), "modality"),
        ((), "trunk"),
    ]


def test_towers_that_are_given_replace_the_routers_choice(loaded: BundleStudent, rows: list[InputRow]) -> None:
    given = [("vision",), ("reasoning",)]
    answers = loaded.answer(rows[:2], 12, towers=given)
    assert [(answer.towers, answer.source) for answer in answers] == [(("vision",), "given"), (("reasoning",), "given")]
    routed = loaded.answer(rows[:2], 12)
    assert answers[0].text == routed[0].text
    assert answers[1].text != routed[1].text


def test_a_given_tower_without_input_is_refused(loaded: BundleStudent) -> None:
    with pytest.raises(ValueError, match="vision"):
        loaded.answer([InputRow("text")], 2, towers=[("vision",)])


def test_towers_have_to_be_given_for_every_row(loaded: BundleStudent) -> None:
    with pytest.raises(ValueError, match="2 rows, found 1"):
        loaded.answer([InputRow("a"), InputRow("b")], 2, towers=[()])


def test_an_answer_ends_at_the_end_of_sequence_and_does_not_show_it(
    student: NexusStudent, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = "Print the sum."
    inputs = tokenizer(prompt + "\n", return_tensors="pt")
    ids = student.generate(
        inputs["input_ids"],
        inputs["attention_mask"],
        tower_mask_BN=torch.zeros(1, 3, dtype=torch.bool),
        max_new_tokens=12,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )[0].tolist()
    # The first token that the student says after another one becomes the end of sequence.
    end = next(place for place in range(1, len(ids)) if ids[place] not in ids[:place])
    ending = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), eos_token=tokenizer.convert_ids_to_tokens(ids[end])
    )
    assert ending.eos_token_id == ids[end]
    (answer,) = BundleStudent(student, ending, max_length=64).answer([InputRow(prompt)], 12)
    assert answer.text == tokenizer.decode(ids[:end])


def test_no_rows_give_no_answers(loaded: BundleStudent) -> None:
    assert loaded.answer([], 5) == ()


def test_a_prompt_that_is_too_long_is_named(loaded: BundleStudent) -> None:
    with pytest.raises(DataError, match=r"row 1.*Shorten the prompt"):
        loaded.answer([InputRow("short"), InputRow("7 " * 200)], 5)


def test_an_empty_prompt_is_named(loaded: BundleStudent) -> None:
    with pytest.raises(DataError, match="row 0"):
        loaded.answer([InputRow("")], 5)


@pytest.mark.parametrize("bad", [InputRow("look", image=b"text"), InputRow("listen", audio=b"text")])
def test_media_that_cannot_be_decoded_are_named_by_their_row(
    loaded: BundleStudent, rows: list[InputRow], bad: InputRow
) -> None:
    with pytest.raises(DataError, match=r"^row 2: .*cannot be decoded"):
        loaded.answer([rows[0], rows[2], bad], 2)


def test_a_tokenizer_without_an_end_is_refused(student: NexusStudent, tokenizer: PreTrainedTokenizerBase) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer))
    with pytest.raises(ArtifactError, match="end-of-sequence"):
        BundleStudent(student, endless, max_length=64)


# --- alone --------------------------------------------------------------------------------------------------------------------

ALONE = """
import json, os, sys
from pathlib import Path

import nexus

samples = Path(sys.argv[2])
assert not Path(nexus.__file__).is_relative_to(samples.parents[2]), "the copy without samples has to be in use"

def refuse(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        if os.path.abspath(os.fsdecode(arguments[0])).startswith(str(samples)):
            raise PermissionError(f"a teacher's file was opened: {arguments[0]}")

sys.addaudithook(refuse)
try:
    open(samples / "teachers" / "any" / "model.safetensors")
except PermissionError:
    pass
else:
    raise SystemExit("the hook does not work")

from nexus.assembly.bundle import InputRow, load_bundle

bundle = Path(sys.argv[1])
student = load_bundle(bundle)
image, audio = (Path(name).read_bytes() for name in sys.argv[3:5])
rows = [InputRow("How many stones?"), InputRow("Sum?", image=image), InputRow("Which number?", audio=audio)]
answers = student.answer(rows, 8)

from transformers import AutoModelForCausalLM

assert type(AutoModelForCausalLM.from_pretrained(bundle)).__name__ == "NexusStudentCore"
assert not [name for name in sys.modules if name.split(".")[0] in ("ray", "bitsandbytes")]
assert not [name for name in sys.modules if name.startswith(("nexus.towers", "nexus.training"))]
print(json.dumps([answer.text for answer in answers]))
"""


def test_a_bundle_answers_in_a_process_without_any_teacher(
    exported: Path, loaded: BundleStudent, rows: list[InputRow], tmp_path: Path
) -> None:
    image, audio = rows[0].image, rows[2].audio
    assert image is not None
    assert audio is not None
    # The package itself without its sample teachers and data, so that they cannot be reached by any means.
    shutil.copytree(
        REPOSITORY / "nexus", tmp_path / "lib" / "nexus", ignore=shutil.ignore_patterns("samples", "__pycache__")
    )
    shutil.copytree(exported, tmp_path / "elsewhere")
    (tmp_path / "image.png").write_bytes(image)
    (tmp_path / "clip.wav").write_bytes(audio)
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            ALONE,
            str(tmp_path / "elsewhere"),
            str(REPOSITORY / "nexus" / "data" / "samples"),
            str(tmp_path / "image.png"),
            str(tmp_path / "clip.wav"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    expected = loaded.answer(
        [InputRow("How many stones?"), InputRow("Sum?", image=image), InputRow("Which number?", audio=audio)], 8
    )
    assert json.loads(finished.stdout.splitlines()[-1]) == [answer.text for answer in expected]
