"""The registry of teachers: configs/teachers.yaml as strict models, and where a teacher's files are.

`load_registry` parses the file, `resolve_teacher` turns a teacher of a run's YAML into a `TeacherSpec`: plain data that crosses to an
actor and is all that `nexus.towers.loader` needs. Nothing here imports torch, and nothing but `pull_teacher` uses a network.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from nexus.artifacts import StrictModel
from nexus.config import HubTeacher, PathTeacher, RegistryTeacher, Role, resolve_path
from nexus.errors import ConfigError, TowerLoadError, UnsupportedRoleError

SUPPORTED_ROLES: tuple[Role, ...] = ("causal_lm", "encoder")
"""Roles that a run can distil from."""


DEFAULT_MODELS_DIR = Path("models")
"""Where `nexus teachers pull` puts a checkpoint when nothing else is said, relative to the working directory."""

BASE = "base"
"""Folder, inside that of an sae, where the model that it reads may lie; else it lies where any other teacher does."""

PULLED_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What a checkpoint needs; pickled weights (*.bin, *.pt) can run code when read and are never fetched."""


# --- the file -----------------------------------------------------------------------------------------------------------------


class Contract(StrictModel):
    """How well the student must keep a capability of its teacher."""

    benchmark: str
    metric: str
    share: float | None = Field(None, gt=0, le=1)
    """Smallest share of the teacher's score that must be kept."""
    factor: float | None = Field(None, gt=1)
    """Largest factor by which an error rate may grow."""

    @model_validator(mode="after")
    def _one_bound(self) -> Contract:
        if (self.share is None) == (self.factor is None):
            raise ValueError("a contract has either a share (of a score) or a factor (of an error rate)")
        return self


class Nf4Policy(StrictModel):
    """How a teacher is quantised."""

    skip_modules: tuple[str, ...] = ()
    """Modules that stay in floating point: a path from the root of the model, or the end of one."""
    min_coverage: float = Field(ge=0, le=1)
    """Smallest share of the parameters that must be stored in NF4. It lies between the share of a tiny build of the same
    architecture, whose embeddings weigh more, and that of the real one, so that both pass by one policy."""


class RemoteCode(StrictModel):
    """Python files that a repository brings along."""

    needed: bool = False
    """The checkpoint cannot be used without them."""
    allowed: bool = False
    """They may be executed."""
    reason: str | None = None
    """Why they are, or are not, allowed."""


def _is_commit(revision: str | None) -> str | None:
    if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError("a pinned revision is a commit of 40 hexadecimal digits; branches and tags can move")
    return revision


class TeacherEntry(StrictModel):
    """One row of configs/teachers.yaml."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: Annotated[str | None, AfterValidator(_is_commit)] = None
    """Pinned commit; None needs `revision` in `verify` and means the newest one when pulled."""
    verify: tuple[Literal["revision", "licence", "model_class", "parameters", "files"], ...] = ()
    """Facts that could not be checked without a network."""
    model_class: str | None
    """Class in `library`; None where the library has none."""
    model_type: str | None
    """`model_type` of the checkpoint's config.json."""
    library: Literal["transformers", "diffusers", "qwen-tts", "parler-tts", "sae"]
    """Package that loads it; `sae` is a plain safetensors file."""
    role: Role
    towers: tuple[str, ...] = Field(min_length=1)
    capabilities: tuple[str, ...] = Field(min_length=1)
    """Each has a row in the file's table of contracts."""
    processor: (
        Literal["tokenizer", "tokenizer+image", "tokenizer+audio", "tokenizer+image+audio", "image", "video", "audio"]
        | None
    )
    """What prepares its inputs; None where nothing does."""
    nf4: Nf4Policy | None
    """None: never quantised, or already quantised by its authors."""
    unused_weights: tuple[str, ...] = ()
    """Beginnings of the tensor names that the checkpoint holds besides this class (another tower, a decoder)."""
    base: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository of the model whose activations an sae reads; nf4 is then the policy of that model."""
    licence: str | None
    """None where it could not be checked."""
    gated: bool = False
    """The repository answers only after its licence was accepted with a Hugging Face account."""
    remote_code: RemoteCode = RemoteCode()
    billion_parameters: float = Field(gt=0)
    active_billion_parameters: float | None = Field(None, gt=0)
    """That one token passes through, in a mixture of experts; None where that is all of them."""
    memory_gib: float = Field(gt=0)
    """Estimate of the weights in memory: quantised share x 4.13 bits, the rest x 16 bits."""
    needs: tuple[str, ...] = ()
    """What it takes beyond the library, or why it is refused."""
    source: str
    """Where these facts come from."""

    @model_validator(mode="after")
    def _can_be_reproduced(self) -> TeacherEntry:
        if self.revision is None and "revision" not in self.verify:
            raise ValueError(
                f"teacher {self.id!r} has no pinned revision; pin a commit or add `revision` to its verify list"
            )
        if self.remote_code.allowed and self.revision is None:
            raise ValueError(f"teacher {self.id!r} may run remote code only at a pinned revision; pin a commit")
        return self


class TeacherRegistry(StrictModel):
    """All of configs/teachers.yaml."""

    contracts: Mapping[str, Contract | None]
    """Capability -> contract; None where no bound has been set."""
    teachers: tuple[TeacherEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_agree(self) -> TeacherRegistry:
        ids = [entry.id for entry in self.teachers]
        doubles = sorted({name for name in ids if ids.count(name) > 1})
        if doubles:
            raise ValueError(f"each teacher id may stand once, found {doubles[0]!r} twice")
        for entry in self.teachers:
            for capability in entry.capabilities:
                if capability not in self.contracts:
                    raise ValueError(f"capability {capability!r} of teacher {entry.id!r} has no row under contracts")
        return self

    def get(self, teacher_id: str) -> TeacherEntry:
        """The entry of `teacher_id`.

        Raises:
            TowerLoadError: naming the nearest known id.
        """
        for entry in self.teachers:
            if entry.id == teacher_id:
                return entry
        raise TowerLoadError(
            f"Expected the id of a teacher in the registry, found {teacher_id!r}{nearest(teacher_id, self.ids())} "
            "`nexus teachers list` shows all."
        )

    def ids(self) -> tuple[str, ...]:
        """All ids, in the order of the file."""
        return tuple(entry.id for entry in self.teachers)

    def contracts_of(self, teacher_id: str) -> dict[str, Contract | None]:
        """The contract of each capability of a teacher."""
        return {capability: self.contracts[capability] for capability in self.get(teacher_id).capabilities}


def nearest(name: str, known: tuple[str, ...]) -> str:
    """`. Did you mean 'x'?` for the known name most like `name`, or a full stop when none is like it."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f". Did you mean {match[0]!r}?" if match else "."


def shipped_config(name: str) -> Path:
    """The path of `configs/<name>` as shipped: beside the package, where a source tree and a wheel both have it.

    A folder `configs` in the working directory is the user's own and is not looked at.

    Raises:
        ConfigError: when it is not there.
    """
    path = Path(__file__).resolve().parents[2] / "configs" / name
    if not path.is_file():
        raise ConfigError(f"Expected configs/{name} beside nexus, found no {path}. Reinstall nexus.")
    return path


def load_registry(path: Path | None = None) -> TeacherRegistry:
    """Parse `path`, or the registry that ships with nexus.

    Raises:
        ConfigError: one line naming every mistake.
    """
    path = path or shipped_config("teachers.yaml")
    try:
        document = yaml.safe_load(path.read_text())
        # Through JSON: in strict mode only JSON input may spell a tuple as a list.
        return TeacherRegistry.model_validate_json(json.dumps(document))
    except OSError as error:
        raise ConfigError(f"Expected a registry of teachers at {path}, found: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"Expected YAML in {path}, found: {' '.join(str(error).split())}. Mend that line.") from None
    except ValidationError as error:
        clauses = (f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"{path}: " + "; ".join(clauses)) from None


# --- what crosses to an actor ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherSpec:
    """All that is needed to load one teacher: strings, numbers and tuples, so that it crosses to any process."""

    id: str
    path: str
    """Folder of the checkpoint; on a cluster a folder that every node sees."""
    revision: str | None
    role: Role
    model_class: str | None = None
    """Class in transformers; None takes the one that the checkpoint's config.json names."""
    quantise: bool = True
    skip_modules: tuple[str, ...] = ()
    min_coverage: float = 0.5
    unused_weights: tuple[str, ...] = ()
    """Beginnings of tensor names that the class leaves aside; any other tensor without a place is refused."""
    remote_code: bool = False
    base_path: str | None = None
    """Folder of the model that an sae reads; None for all other roles."""
    library: str = "transformers"
    """Package of its class; a vendor's runs in an environment of its own (nexus/vendors/environments.py)."""
    cache_dir: str | None = None
    """Where quantised weights are kept for the next load; None keeps none."""
    cache_min_parameters: int = 0
    """Models with fewer parameters are not kept, because quantising them takes no time."""
    streamed: bool = False
    """Run block by block from that folder: for a teacher that exceeds the device."""


def resolve_teacher(
    teacher: RegistryTeacher | PathTeacher | HubTeacher,
    registry: TeacherRegistry,
    *,
    models_dir: Path | None = None,
    cache_dir: Path | None = None,
) -> TeacherSpec:
    """The spec of a teacher of a run's YAML; its files must be on this machine.

    Args:
        teacher: an item of `RunConfig.teachers`.
        registry: gives the rows of `kind: registry`.
        models_dir: searched first, for a folder named like the teacher's id. None means `models`.
        cache_dir: the Hugging Face cache; None means the user's own.

    Raises:
        TowerLoadError: unknown id, or no files on this machine.
        UnsupportedRoleError: a role that this version cannot load.
        ConfigError: a language model that is to be streamed.
    """
    streamed = teacher.placement == "streamed"
    role = registry.get(teacher.id).role if isinstance(teacher, RegistryTeacher) else teacher.role
    if streamed and role != "encoder":
        raise ConfigError(
            f"Expected an encoder with placement streamed, found teacher {teacher.id!r} of role {role}: a run asks it for answers, "
            "and each of their tokens would read all its weights again. Set its placement to memory."
        )
    if isinstance(teacher, RegistryTeacher):
        entry = registry.get(teacher.id)
        check_role(entry.id, entry.role, entry.needs)
        return replace(resolve_entry(entry, models_dir=models_dir, cache_dir=cache_dir), streamed=streamed)
    check_role(teacher.id, teacher.role)
    if isinstance(teacher, PathTeacher):
        path = resolve_path(teacher.path)
        if not path.is_dir():
            raise TowerLoadError(
                f"Expected the checkpoint folder of teacher {teacher.id!r} at {path}, found no such folder. Correct its path."
            )
        revision = None
    else:
        path = find_checkpoint(teacher.id, teacher.repo, teacher.revision, models_dir=models_dir, cache_dir=cache_dir)
        revision = teacher.revision
    return TeacherSpec(
        id=teacher.id,
        path=str(path),
        revision=revision,
        role=teacher.role,
        skip_modules=teacher.skip_modules,
        min_coverage=teacher.min_coverage,
        streamed=streamed,
    )


def resolve_entry(entry: TeacherEntry, *, models_dir: Path | None = None, cache_dir: Path | None = None) -> TeacherSpec:
    """The spec of a registry entry; raises as `resolve_teacher` does."""
    if (entry.model_class is None and entry.role != "sae") or (
        entry.remote_code.needed and not entry.remote_code.allowed
    ):
        raise TowerLoadError(
            f"Expected a class of transformers for teacher {entry.id!r}, found that it needs: {'; '.join(entry.needs)}. "
            "Choose another teacher of its capabilities."
        )
    path = find_checkpoint(entry.id, entry.repo, entry.revision, models_dir=models_dir, cache_dir=cache_dir)
    base = None
    if entry.base is not None:
        base = path / BASE
        if not base.is_dir():
            name = base_of(entry).id
            base = find_checkpoint(
                name, entry.base, None, models_dir=models_dir, cache_dir=cache_dir, pulled_as=entry.id
            )
    return spec_of_entry(entry, path, base=base)


def spec_of_entry(entry: TeacherEntry, folder: Path, *, base: Path | None = None) -> TeacherSpec:
    """The spec of a registry entry whose files lie in `folder`, those of the model that it reads in `base`."""
    return TeacherSpec(
        id=entry.id,
        path=str(folder),
        revision=entry.revision,
        role=entry.role,
        model_class=entry.model_class,
        quantise=entry.nf4 is not None,
        skip_modules=entry.nf4.skip_modules if entry.nf4 else (),
        min_coverage=entry.nf4.min_coverage if entry.nf4 else 0.0,
        unused_weights=entry.unused_weights,
        remote_code=entry.remote_code.allowed,
        base_path=None if base is None else str(base),
        library=entry.library,
    )


def check_role(teacher_id: str, role: Role, needs: tuple[str, ...] = ()) -> None:
    """Raises UnsupportedRoleError unless a run can distil from teachers of `role`."""
    if role not in SUPPORTED_ROLES:
        because = f" (it needs: {'; '.join(needs)})" if needs else ""
        raise UnsupportedRoleError(
            f"Expected a teacher of role {' or '.join(SUPPORTED_ROLES)}, found {teacher_id!r} of role {role}, for which this version "
            f"of nexus has no distillation{because}. Remove it from the run."
        )


def base_of(entry: TeacherEntry) -> TeacherEntry:
    """The model that an sae reads, as an entry that can be fetched: it has no row of its own."""
    assert entry.base is not None, "only an sae reads another model"
    name = entry.base.partition("/")[2]
    return entry.model_copy(update={"id": name, "repo": entry.base, "revision": None, "base": None})


def find_checkpoint(
    teacher_id: str,
    repo: str,
    revision: str | None,
    *,
    models_dir: Path | None = None,
    cache_dir: Path | None = None,
    pulled_as: str | None = None,
) -> Path:
    """The folder of a repository's files on this machine; uses no network.

    Args:
        pulled_as: the id whose pull fetches it; None means `teacher_id`.

    Raises:
        TowerLoadError: when neither `models_dir/<id>` nor the Hugging Face cache has it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    local = (models_dir or DEFAULT_MODELS_DIR) / teacher_id
    if local.is_dir():
        return local
    try:
        # Without the patterns, a folder that `pull_teacher` filled counts as incomplete: it left the pickled weights out.
        return Path(
            snapshot_download(
                repo, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=list(PULLED_FILES)
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        at = f" at revision {revision}" if revision else ""
        raise TowerLoadError(
            f"Expected the files of teacher {teacher_id!r} in {local} or {repo}{at} in the Hugging Face cache, found neither. "
            f"Fetch them with: nexus teachers pull {pulled_as or teacher_id}"
        ) from None


def pull_teacher(
    teacher: TeacherEntry | HubTeacher,
    *,
    models_dir: Path | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Fetch a repository's safetensors, configuration and tokenizer; returns their folder.

    Args:
        models_dir: fetched to `models_dir/<id>`; None fetches to the Hugging Face cache instead.
        cache_dir: the Hugging Face cache; None means the user's own.
        endpoint: a mirror of the hub; None means the hub.

    Raises:
        TowerLoadError: one line saying what kept the files away (no network, gated, no such repository or revision, disk).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Which HTTP library the hub's client uses depends on its version; the base of its error is that library's own.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    folder = None if models_dir is None else models_dir / teacher.id
    runs_code = isinstance(teacher, TeacherEntry) and teacher.remote_code.allowed
    at = f" at revision {teacher.revision}" if teacher.revision else ""
    expected = f"Expected to fetch teacher {teacher.id!r} from {teacher.repo}{at}, found"
    try:
        return Path(
            snapshot_download(
                teacher.repo,
                revision=teacher.revision,
                cache_dir=cache_dir,
                local_dir=folder,
                endpoint=endpoint,
                allow_patterns=[*PULLED_FILES, *(["*.py"] if runs_code else [])],
            )
        )
    except GatedRepoError:
        raise TowerLoadError(
            f"{expected} a gated repository. Accept its licence on its page and log in with `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise TowerLoadError(
            f"{expected} no such repository, or a private one. Check its name, or `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise TowerLoadError(f"{expected} no such revision. Name a commit of that repository.") from None
    except (http_error, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TowerLoadError(
            f"{expected} no usable answer ({reason}). Connect to a network, unset HF_HUB_OFFLINE, or copy the files to "
            f"{folder or 'the Hugging Face cache'}."
        ) from None
    except OSError as error:
        raise TowerLoadError(
            f"{expected} that the files cannot be written: {error}. Free disk space or choose another folder."
        ) from None
