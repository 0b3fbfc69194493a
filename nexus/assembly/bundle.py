"""The bundle: a trained student as one folder that runs alone, and the student that answers from it.

    model.safetensors config.json generation_config.json    the trunk; `AutoModelForCausalLM.from_pretrained` reads it
    student.json adapters.safetensors                       the towers, without their maps to teachers' spaces
    router.json router.safetensors                          the router
    tokenizer files                                         as transformers writes them
    README.md                                               the model card, with what was measured
    manifest.json                                           sha256 and size of all of these, and what the student takes

A bundle is written under another name and renamed when it is whole. Loading compares every byte with the manifest first.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import Field
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import nexus
from nexus.artifacts import Metrics, StrictModel, read_artifact, sha256_of, write_artifact
from nexus.config import TOWERS, RunConfig
from nexus.data.collate import collate
from nexus.data.records import Record, RowError
from nexus.errors import ArtifactError, DataError
from nexus.student.memory import MediaBatch, NexusStudent
from nexus.student.preprocess import MediaInput, Noise, media_batch
from nexus.student.router import Source

MANIFEST_FILE = "manifest.json"
CARD_FILE = "README.md"
CARD_TEMPLATE = "model_card.md.jinja"
DEFAULT_BATCH_SIZE = 32

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""File names of a bundle: no folder, nothing hidden."""


class BundleFile(StrictModel):
    """What a file has to be."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)
    """Bytes."""


class ImageInput(StrictModel):
    """How an image becomes `pixel_values`: resized to a square (bilinear, antialiased), scaled from 0..255 to low..high."""

    image_size: int
    num_channels: int
    low: float
    high: float


class AudioInput(StrictModel):
    """How a recording becomes `input_features`: mono, resampled, cut or padded to `num_samples`, log-mel as Whisper's."""

    sampling_rate: int
    num_samples: int
    num_mels: int
    window_size: int
    hop_size: int


class BundleManifest(StrictModel):
    """manifest.json."""

    kind: Literal["nexus-bundle"]
    format: Literal[1]
    version: str
    """The nexus that wrote the bundle."""
    name: str
    """The run's name."""
    config_fingerprint: str
    parameters: dict[str, int]
    """Of `core`, of each tower, of `router`, and in `total`."""
    towers: tuple[str, ...]
    max_length: int
    """Longest prompt plus answer that the student was trained on, in tokens."""
    image: ImageInput | None
    audio: AudioInput | None
    files: dict[str, BundleFile]
    """Every other file of the folder."""


@dataclass(frozen=True)
class InputRow:
    """One question."""

    prompt: str
    image: bytes | None = None
    """Encoded image file."""
    audio: bytes | None = None
    """Encoded audio file."""
    noise: Noise | None = None
    """Added to the recording; for held-out rows that are to be heard with noise."""


@dataclass(frozen=True)
class Answer:
    """What the student said, and which towers it used for it."""

    text: str
    towers: tuple[str, ...]
    source: Source | Literal["given"]
    """Who chose the towers; `given` when the caller did."""


class BundleStudent:
    """A student that answers questions in text: router, then the towers that it asks for, then greedy generation.

    Works for a loaded bundle as for a student that is still in training; its module is put into evaluation mode.
    """

    def __init__(self, student: NexusStudent, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ArtifactError(
                "Expected a tokenizer with an end-of-sequence token, found none: answers would not end. "
                "Choose another teacher as student.tokenizer."
            )
        self.student = student.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def device(self) -> torch.device:
        """Where the student's weights are."""
        return self.student.core.device

    def answer(
        self,
        rows: Sequence[InputRow],
        max_new_tokens: int,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        towers: Sequence[Sequence[str]] | None = None,
    ) -> tuple[Answer, ...]:
        """Greedy answers in the order of the rows; neither a row's neighbours nor the batch size change its answer.

        Args:
            rows: may mix text, images and recordings.
            max_new_tokens: longest answer.
            batch_size: rows at a time; bounds the memory.
            towers: the towers of each row, in place of the router's decision.

        Raises:
            DataError: naming the row whose prompt is empty or too long, or whose media cannot be used.
            ValueError: when `towers` names one without input in its row.
        """
        if towers is not None and len(towers) != len(rows):
            raise ValueError(
                f"Expected towers for each of {len(rows)} rows, found {len(towers)}. Give one set per row."
            )
        answers: list[Answer | None] = [None] * len(rows)
        # Prompts of similar length share a batch, which saves padding.
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].prompt))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            given = None if towers is None else [towers[place] for place in places]
            for place, answer in zip(
                places,
                self._answer_batch([rows[place] for place in places], places, max_new_tokens, given),
                strict=True,
            ):
                answers[place] = answer
        return tuple(answer for answer in answers if answer is not None)

    @torch.no_grad()
    def _answer_batch(
        self,
        rows: Sequence[InputRow],
        places: Sequence[int],
        max_new_tokens: int,
        towers: Sequence[Sequence[str]] | None,
    ) -> Iterator[Answer]:
        records = [
            Record(id=f"row {place}", capability="", prompt=row.prompt) for row, place in zip(rows, places, strict=True)
        ]
        room = self.student.core.config.max_position_embeddings - max_new_tokens
        try:
            batch = collate(records, self.tokenizer, max_length=room)
        except RowError as error:
            raise DataError(
                f"Expected prompts that the student can read, found: {error}. Shorten the prompt."
            ) from None
        media = self._media(rows, places)
        input_ids_BT = batch.input_ids_BT.to(self.device)
        attention_mask_BT = batch.attention_mask_BT.to(self.device)
        sources: Sequence[Source | Literal["given"]]
        if towers is None:
            decision = self.student.route(input_ids_BT, attention_mask_BT, [row.prompt for row in rows], media)
            mask_BN, sources = decision.mask_BN, decision.source
        else:
            mask_BN = torch.tensor([[tower in chosen for tower in TOWERS] for chosen in towers])
            sources = ["given"] * len(rows)
        tokens_BT = self.student.generate(
            input_ids_BT,
            attention_mask_BT,
            tower_mask_BN=mask_BN,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
            media=media,
        )
        for tokens_T, chosen_N, source in zip(tokens_BT.tolist(), mask_BN.tolist(), sources, strict=True):
            # What stands behind the end of sequence is padding, whatever id it has.
            end = (
                tokens_T.index(self.tokenizer.eos_token_id)
                if self.tokenizer.eos_token_id in tokens_T
                else len(tokens_T)
            )
            text = self.tokenizer.decode(tokens_T[:end], skip_special_tokens=True)
            assert isinstance(text, str)  # a list of texts only for a list of rows
            yield Answer(
                text=text,
                towers=tuple(tower for tower, on in zip(TOWERS, chosen_N, strict=True) if on),
                source=source,
            )

    def _media(self, rows: Sequence[InputRow], places: Sequence[int]) -> MediaBatch:
        inputs = [MediaInput(image=row.image, audio=row.audio, noise=row.noise) for row in rows]
        try:
            media = media_batch(inputs, self.student.spec)
        except DataError:
            # Once more, row by row, to say which one it was.
            problems = {
                place: problem for place, row in zip(places, inputs, strict=True) if (problem := self._problem(row))
            }
            place, problem = min(problems.items())
            raise DataError(f"row {place}: {problem}") from None
        moved = {
            field.name: value.to(self.device)
            for field in dataclasses.fields(media)
            if (value := getattr(media, field.name)) is not None
        }
        return dataclasses.replace(media, **moved)

    def _problem(self, media: MediaInput) -> str | None:
        """Why one row's media cannot be used; None when they can."""
        try:
            media_batch([media], self.student.spec)
        except DataError as error:
            return str(error)
        return None


def export_bundle(
    student: NexusStudent, tokenizer: PreTrainedTokenizerBase, config: RunConfig, metrics: Metrics, directory: Path
) -> BundleManifest:
    """Write `student` as a bundle; a bundle that stands in `directory` is replaced, anything else is left alone.

    The student itself stays as it is, alignments with its teachers included; they are not exported.

    Raises:
        ArtifactError: when the folder holds something else, the disk refuses, or the student wraps an encoder of a teacher (a bundle
            holds only what nexus itself can build again).
    """
    for tower, adapter in student.spec.adapters().items():
        if getattr(adapter, "encoder_width", None) is not None:
            raise ArtifactError(
                f"Expected towers with encoders of their own, found a wrapped encoder in the {tower} tower. "
                "Leave encoder_width out of the student's preset; a wrapped encoder cannot be exported yet."
            )
    if directory.exists() and not (
        directory.is_dir() and ((directory / MANIFEST_FILE).is_file() or not any(directory.iterdir()))
    ):
        raise ArtifactError(
            f"Expected a bundle or nothing at {directory}, found other files. Choose another folder, or empty this one."
        )
    # The trunk is shared, not copied: it is nearly all of the student's memory.
    exported: NexusStudent = copy.deepcopy(student, {id(student.core): student.core})
    exported.drop_alignments()
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        exported.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        manifest = _manifest(exported, config)
        card = temporary / CARD_FILE
        card.write_text(_model_card(manifest, config, metrics), encoding="utf-8")
        for path in temporary.iterdir():  # safetensors writes for the owner alone; a bundle is there to be given away
            path.chmod(card.stat().st_mode)
        files = {
            path.name: BundleFile(sha256=sha256_of(path), size=path.stat().st_size)
            for path in sorted(temporary.iterdir())
        }
        manifest = manifest.model_copy(update={"files": files})
        write_artifact(temporary / MANIFEST_FILE, manifest)
        if directory.exists():
            directory.rename(old)
        temporary.rename(directory)
    except OSError as error:
        raise ArtifactError(
            f"Expected to write the bundle {directory}, found: {error.strerror or error}. Free disk space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return manifest


def load_bundle(directory: Path, device: str | torch.device = "cpu") -> BundleStudent:
    """The student of a bundle, ready to answer. Reads nothing outside the folder.

    Raises:
        ArtifactError: when the folder is no bundle, or any of its files is missing, damaged or not the bundle's own.
    """
    manifest = verify_bundle(directory)
    student = NexusStudent.from_pretrained(directory).to(device)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return BundleStudent(student, tokenizer, max_length=manifest.max_length)


def verify_bundle(directory: Path) -> BundleManifest:
    """The manifest, after every file was compared with it.

    Raises:
        ArtifactError: as `load_bundle`.
    """
    if not (directory / MANIFEST_FILE).is_file():
        raise ArtifactError(
            f"Expected a bundle with {MANIFEST_FILE} at {directory}, found none. Name the bundle/ folder of a finished run "
            "(`nexus export` writes it)."
        )
    manifest = read_artifact(directory / MANIFEST_FILE, BundleManifest)
    for name, expected in manifest.files.items():
        path = directory / name
        if not _PLAIN_NAME.fullmatch(name) or not path.is_file():
            found = "no such file"
        elif path.stat().st_size != expected.size:
            found = f"{path.stat().st_size} bytes"
        elif sha256_of(path) != expected.sha256:
            found = "other content"
        else:
            continue
        raise ArtifactError(
            f"Expected {name!r} of {expected.size} bytes in {directory} as its manifest says, found {found}. "
            "The bundle is damaged: copy it again, or run `nexus export`."
        )
    for path in sorted(directory.iterdir()):
        # transformers reads files by their names alone, so a stray one could change the student. Hidden ones it never reads.
        if path.name not in manifest.files and path.name != MANIFEST_FILE and not path.name.startswith("."):
            raise ArtifactError(
                f"Expected only the bundle's own files in {directory}, found {path.name!r}. Move it elsewhere, or run `nexus export`."
            )
    return manifest


def _manifest(student: NexusStudent, config: RunConfig) -> BundleManifest:
    spec = student.spec
    parameters = {
        "core": student.core.num_parameters(),
        **{tower: _count(adapter) for tower, adapter in student.adapters.items()},
        "router": _count(student.router),
    }
    return BundleManifest(
        kind="nexus-bundle",
        format=1,
        version=nexus.__version__,
        name=config.name,
        config_fingerprint=config.fingerprint(),
        parameters={**parameters, "total": sum(parameters.values())},
        towers=tuple(spec.adapters()),
        max_length=config.student.max_length,
        image=(
            None
            if spec.vision is None
            else ImageInput(
                image_size=spec.vision.image_size, num_channels=spec.vision.num_channels, low=-1.0, high=1.0
            )
        ),
        audio=(
            None
            if spec.audio is None
            else AudioInput(
                sampling_rate=spec.audio.sampling_rate,
                num_samples=spec.audio.num_samples,
                num_mels=spec.audio.num_mels,
                window_size=spec.audio.window_size,
                hop_size=spec.audio.hop_size,
            )
        ),
        files={},
    )


def _model_card(manifest: BundleManifest, config: RunConfig, metrics: Metrics) -> str:
    """Markdown. The names in it are limited to letters, digits and `._-` by the schema, so that escaping changes nothing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(CARD_TEMPLATE).render(manifest=manifest, config=config, metrics=metrics)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
