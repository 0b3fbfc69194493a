"""Loads a teacher: its class, its weights in NF4 with a coverage report, its tokenizer or processor, and a fingerprint.

The class is the registry's, or the one that the checkpoint's config.json names. Weights come from safetensors only; any that are
missing, unexpected or of another shape are refused, because transformers would fill them with random numbers and go on.

On a GPU the compute type is bfloat16. On every CPU it is float32, although some could use bfloat16: a teacher's answers then do not
depend on the machine or on how rows are batched (measured: float32 costs a factor 1.2 to 1.6 in batched scoring of 1024 to 2048 wide
matrices on a CPU with AVX-512 BF16).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from nexus.artifacts import fingerprint_of
from nexus.config import Role
from nexus.errors import ProfilingError, TowerLoadError
from nexus.profiling.layers import find_blocks
from nexus.towers.blocks import Passes, block_width, one_by_one
from nexus.towers.cache import BlockSpill, CacheEntry, CacheManifest, QuantisedCache, recipe_of
from nexus.towers.checkpoint import Checkpoint, open_checkpoint, source_files, stored_tensors, weights_digest
from nexus.towers.codec import CODECS
from nexus.towers.codec_lm import MODEL_CLASS as CODEC_LM_CLASS
from nexus.towers.diffusion import Denoiser
from nexus.towers.encoder import encoder_of
from nexus.towers.experts import spilling
from nexus.towers.gptq import GptqConfig, GptqLinear, packed_matrices, place_packed, refuse_damaged
from nexus.towers.memory import available_bytes, require_memory
from nexus.towers.nf4 import (
    NOTHING_QUANTISED,
    CoverageReport,
    QuantisationPlan,
    freeze,
    measure_coverage,
    plan_quantisation,
    prepare_modules,
    quantisation_config,
    require_quantised,
)
from nexus.towers.registry import TeacherRegistry, TeacherSpec, resolve_entry
from nexus.towers.sae import Dictionaries, load_dictionaries
from nexus.towers.streamed import LayerStream
from nexus.vendors.environments import ENVIRONMENTS

logger = logging.getLogger(__name__)

TARGETS_SCHEMA = 1
"""Version of what `TeacherTargets` mean; part of every fingerprint, so that older cached targets are refused."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Number types that hold weights by themselves; smaller ones need scales, which only their own formats have."""
EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")
"""Key of one expert's matrix."""


@dataclass(frozen=True)
class LoadedTower:
    """A teacher that is ready to run, on one device, frozen."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None for encoders."""
    processor: Any | None
    """The checkpoint's own image processor or feature extractor; of a language model what prepares media, None without."""
    role: Role
    coverage: CoverageReport
    fingerprint: str
    """Hash of weights, configuration, revision, quantisation, tokenizer or processor, and schema."""
    tokenizer_hash: str | None
    """None without a tokenizer."""
    spec: TeacherSpec
    """What it was loaded from; loads it again, for example in floating point."""
    dictionaries: Dictionaries | None = None
    """Of an sae, whose `model` is the base model that it reads; None for all other roles."""
    transcriber: PreTrainedTokenizerBase | None = None
    """Of an encoder with a decoder that writes text, whose rows may come with completions to score; None otherwise."""
    denoiser: Denoiser | None = None
    """The pipeline of a diffusion teacher, whose `model` is the component that predicts the noise; None for all other roles."""
    from_cache: bool = False
    """Its weights were quantised by an earlier load."""
    passes: Passes = one_by_one
    """How forwards of `model` are run."""

    @property
    def is_streamed(self) -> bool:
        """Its blocks are not in memory; `model` runs within `passes` alone."""
        return self.passes is not one_by_one


class TowerLoader:
    """Loads teachers by their registry id, or by a spec.

    Args:
        registry: gives the entries of `load`.
        models_dir: searched first, for a folder named like the id; None means `models`.
        cache_dir: where quantised weights are kept for the next load, whatever their size; None keeps none.
        device: `auto` takes the first GPU, or the CPU without one.
    """

    def __init__(
        self,
        registry: TeacherRegistry,
        *,
        models_dir: Path | None = None,
        cache_dir: Path | None = None,
        device: str = "auto",
    ) -> None:
        self._registry = registry
        self._models_dir = None if models_dir is None else Path(models_dir)
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._device = device

    def load(self, teacher_id: str, *, quantise: bool = True, streamed: bool = False) -> LoadedTower:
        """Load the registry's teacher `teacher_id`; `quantise=False` gives the floating-point original.

        Args:
            streamed: leave its blocks in `cache_dir` and run it block by block, for a teacher that exceeds the device.

        Raises:
            TowerLoadError: unknown id, no files on this machine, or files that are not what the entry demands.
        """
        spec = resolve_entry(self._registry.get(teacher_id), models_dir=self._models_dir)
        return self.load_spec(replace(spec, streamed=streamed), quantise=quantise)

    def load_spec(self, spec: TeacherSpec, *, quantise: bool = True) -> LoadedTower:
        """Load any resolved teacher; raises as `load` does."""
        if self._cache_dir is not None:
            spec = replace(spec, cache_dir=str(self._cache_dir), cache_min_parameters=0)
        return load_tower(spec, device=self._device, quantise=quantise)


def load_tower(spec: TeacherSpec, *, device: str = "auto", quantise: bool = True) -> LoadedTower:
    """Load the teacher of `spec`; `quantise=False` gives the floating-point original (for the quantisation tax).

    Raises:
        TowerLoadError: files that are not what the spec demands, or too little memory for them.
    """
    try:
        return _load(spec, device, quantise=quantise)
    except MemoryError:
        # Opening a file of weights takes as many addresses as it has bytes, before anything of it is read.
        need = sum(path.stat().st_size for path in Path(spec.path).glob("**/*.safetensors"))
        have = available_bytes(torch.device("cpu"))
    raise TowerLoadError(
        f"Expected {need / 2**30:.2f} GiB of memory to open the weights of teacher {spec.id!r}, found {have / 2**30:.2f} GiB free. "
        "Free some, raise the limit of this process (ulimit -v), or choose a machine with more memory."
    )


def _load(spec: TeacherSpec, device: str, *, quantise: bool) -> LoadedTower:
    if spec.library in ENVIRONMENTS:
        raise TowerLoadError(
            f"Expected a class of transformers {transformers.__version__} for teacher {spec.id!r}, found one of {spec.library}, "
            f"whose teachers run in an environment of their own. Make it with: make teacher-env NAME={spec.library}"
        )
    if spec.role == "sae":
        return _load_sae(spec, device, quantise=quantise)
    target = _device(device)
    if spec.role == "diffusion":
        return _load_diffusion(spec, target, quantise=quantise and spec.quantise)
    checkpoint = open_checkpoint(Path(spec.path))
    model_class = _model_class(spec, checkpoint)
    skeleton = _skeleton(spec, model_class, checkpoint)
    # Preparing inputs fails far sooner than loading weights does, so it comes first.
    tokenizer = tokenizer_of(spec) if spec.role == "causal_lm" else None
    transcriber = _transcriber(spec, skeleton)
    processor = _media_processor(spec) if spec.role == "causal_lm" else _processor(spec)
    # Codecs stay in floating point: four bits are heard. What is quantised already is left as it is.
    quantise = quantise and spec.quantise and spec.role != "codec" and checkpoint.gptq is None
    loaded = _load_model(spec, checkpoint, skeleton, model_class, target, quantise=quantise)
    model, coverage = loaded.model, loaded.coverage
    digest = None if tokenizer is None else tokenizer_hash(tokenizer)
    fingerprint = fingerprint_of(
        {
            "schema": TARGETS_SCHEMA,
            "weights": loaded.digest,
            "config": dict(checkpoint.config),
            "class": type(model).__name__,
            "role": spec.role,
            "revision": spec.revision,
            "quantisation": ["nf4", "double", *sorted(spec.skip_modules)]
            if quantise
            else str(checkpoint.gptq or "none"),
            "tokenizer": digest,
            "chat_template": None if tokenizer is None else tokenizer.chat_template,
            "processor": None if processor is None else json.loads(processor.to_json_string()),
            **({} if transcriber is None else {"transcriber": tokenizer_hash(transcriber)}),
        }
    )
    logger.info(
        "teacher %s: %.1f %% of %d parameters %s, %.3f bits each, largest weight error %.3f",
        spec.id, 100 * coverage.share, coverage.total_params, coverage.method, coverage.bits_per_param, coverage.max_weight_error,
    )  # fmt: skip
    return LoadedTower(
        model, tokenizer, processor, spec.role, coverage, fingerprint, digest, spec,
        from_cache=loaded.from_cache, passes=loaded.passes, transcriber=transcriber if loaded.passes is one_by_one else None,
    )  # fmt: skip


def load_component(
    spec: TeacherSpec, model_class: Any, device: torch.device, *, quantise: bool
) -> tuple[PreTrainedModel, CoverageReport, str]:
    """One model of transformers by itself, its coverage, and a hash of weights and configuration; raises as `load_tower`."""
    checkpoint = open_checkpoint(Path(spec.path))
    skeleton = _skeleton(spec, model_class, checkpoint)
    quantise = quantise and checkpoint.gptq is None
    loaded = _load_model(spec, checkpoint, skeleton, model_class, device, quantise=quantise)
    digest = fingerprint_of({"weights": loaded.digest, "config": dict(checkpoint.config)})
    return loaded.model, loaded.coverage, digest


def _load_diffusion(spec: TeacherSpec, device: torch.device, *, quantise: bool) -> LoadedTower:
    """The pipeline as one teacher; diffusers is an extra, and is imported for these alone."""
    if find_spec("diffusers") is None:
        raise TowerLoadError(
            f"Expected the package diffusers for teacher {spec.id!r}, found none. Type: pip install 'nexus-distill[diffusion]'"
        )
    from nexus.towers.pipelines import load_pipeline

    denoiser, coverage, components = load_pipeline(spec, device, quantise=quantise, load_transformer=load_component)
    fingerprint = fingerprint_of({"pipeline": components, "role": spec.role, "schema": TARGETS_SCHEMA})
    return LoadedTower(denoiser.model, None, None, spec.role, coverage, fingerprint, None, spec, denoiser=denoiser)


def _load_sae(spec: TeacherSpec, device: str, *, quantise: bool) -> LoadedTower:
    """The base model as a language model, and the dictionaries beside it."""
    if spec.base_path is None:
        raise TowerLoadError(
            f"Expected the folder of the model that the dictionaries of teacher {spec.id!r} read, found none. Load it by its "
            "registry id, whose entry names that model."
        )
    base = load_tower(
        replace(spec, role="causal_lm", path=spec.base_path, base_path=None), device=device, quantise=quantise
    )
    dictionaries = load_dictionaries(
        Path(spec.path),
        width=block_width(base.model),
        num_layers=len(find_blocks(base.model)),
        device=base.model.device,
    )
    fingerprint = fingerprint_of(
        {"base": base.fingerprint, "dictionaries": dictionaries.digest, "schema": TARGETS_SCHEMA}
    )
    return replace(base, role="sae", fingerprint=fingerprint, spec=spec, dictionaries=dictionaries)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what turns text into ids: vocabulary, merges, normaliser, splitter, and the added tokens cut out before these.

    Templates, special-token roles, truncation and padding are not part of it: they change which text is tokenised, not how. Nor is
    the post-processor, which only sets tokens around a text.
    """
    rules: dict[str, Any] = {
        "vocabulary": tokenizer.get_vocab(),
        # A word of the vocabulary that is also an added token is cut out of longer words.
        "added": [
            [index, token.content, token.single_word, token.lstrip, token.rstrip, token.normalized]
            for index, token in sorted(tokenizer.added_tokens_decoder.items())
        ],
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.update({part: backend[part] for part in ("model", "normalizer", "pre_tokenizer")})
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def check_tensors(spec: TeacherSpec) -> int:
    """Compare the names and shapes of a checkpoint's tensors with the class that is to hold them; reads headers only.

    Returns:
        Parameters of the class.

    Raises:
        TowerLoadError: a tensor that is missing, has no place or has another shape; also as `load_tower`.
    """
    checkpoint = open_checkpoint(Path(spec.path))
    skeleton = _skeleton(spec, _model_class(spec, checkpoint), checkpoint)
    _keys_by_parameter(spec, skeleton, checkpoint)
    names = skeleton.state_dict().keys()
    given = {name for targets, _ in _places(skeleton, checkpoint).values() for name in targets}
    info = LoadStateDictInfo(
        missing_keys=names - given - skeleton.all_tied_weights_keys.keys(),
        unexpected_keys=given - names,
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    skeleton._adjust_missing_and_unexpected_keys(info)
    _refuse_incomplete(spec, info.to_dict())
    packed = sum(m.in_features * m.out_features for m in skeleton.modules() if isinstance(m, GptqLinear))
    return int(skeleton.num_parameters()) + packed


def block_names(model: PreTrainedModel, role: Role) -> tuple[str, ...]:
    """Dotted names of the blocks whose layers count for `role`; empty for a model without any."""
    runner = encoder_of(model) if role == "encoder" else model
    try:
        blocks = find_blocks(runner).blocks
    except ProfilingError:
        return ()
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(names[id(block)] for block in blocks)


# --- parts --------------------------------------------------------------------------------------------------------------------


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    target = torch.device(device)
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise TowerLoadError(
            f"Expected a GPU for device {device!r}, found {torch.cuda.device_count()} GPUs. Use device='cpu' or 'auto'."
        )
    return target


def _model_class(spec: TeacherSpec, checkpoint: Checkpoint) -> Any:
    """A subclass of PreTrainedModel, or the Auto class that runs the code of an allow-listed checkpoint."""
    named = checkpoint.config.get("architectures") or []
    if not isinstance(named, list):
        raise TowerLoadError(
            f"Expected a list as `architectures` in config.json of teacher {spec.id!r}, found {named!r}. Write [{json.dumps(named)}]."
        )
    name = spec.model_class or (named[0] if named else None)
    if name is None:
        raise TowerLoadError(
            f"Expected `architectures` in config.json of teacher {spec.id!r}, found none. Save the model with save_pretrained."
        )
    if spec.remote_code:
        # The Auto classes run the folder's own Python files; the registry allows it only at a pinned revision.
        return AutoModelForCausalLM if spec.role == "causal_lm" else AutoModel
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise TowerLoadError(
            f"Expected a class of transformers {transformers.__version__} for teacher {spec.id!r}, found {name!r}, which it does "
            "not have. Update transformers; code that comes with a checkpoint is not run."
        )
    if spec.role == "codec_lm" and found.__name__ != CODEC_LM_CLASS:
        raise TowerLoadError(
            f"Expected {CODEC_LM_CLASS} for teacher {spec.id!r} of role codec_lm, found {name}, whose codes this version cannot ask "
            "for. Remove it from the run."
        )
    if spec.role == "codec" and name not in CODECS:
        raise TowerLoadError(
            f"Expected {', '.join(CODECS)} for teacher {spec.id!r} of role codec, found {name}, which this version cannot ask. "
            "Remove it from the run."
        )
    if spec.role == "causal_lm" and not found.can_generate():
        raise TowerLoadError(
            f"Expected a model that generates text for teacher {spec.id!r} of role causal_lm, found {name}. Set its role to encoder."
        )
    if spec.role == "encoder" and found.main_input_name == "input_ids":
        raise TowerLoadError(
            f"Expected a model of images or audio for teacher {spec.id!r} of role encoder, found {name}, which reads text. "
            "Set its role to causal_lm."
        )
    return found


def tokenizer_of(spec: TeacherSpec) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer.

    Raises:
        TowerLoadError: it has none, or one without an end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.path, local_files_only=True, trust_remote_code=spec.remote_code)
    except Exception as error:  # as in _skeleton
        raise TowerLoadError(
            f"Expected a tokenizer in {spec.path}, found: {_one_line(error)}. Save or fetch the tokenizer's files there."
        ) from None
    # Without files, some classes come up with an empty vocabulary instead of an error.
    if not any((Path(spec.path) / name).is_file() for name in tokenizer.vocab_files_names.values()):
        raise TowerLoadError(
            f"Expected one of {', '.join(tokenizer.vocab_files_names.values())} in {spec.path}, found none. Save or fetch the "
            "tokenizer's files there."
        )
    if tokenizer.eos_token_id is None:
        raise TowerLoadError(
            f"Expected an end-of-sequence token in the tokenizer of teacher {spec.id!r}, found none. Set eos_token in "
            "tokenizer_config.json."
        )
    return tokenizer


def _transcriber(spec: TeacherSpec, skeleton: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a recogniser whose decoder writes token after token; its encoder is of use without one."""
    if spec.role != "encoder" or not (skeleton.can_generate() and hasattr(skeleton.config, "max_target_positions")):
        return None
    try:
        return tokenizer_of(spec)
    except TowerLoadError as error:
        logger.warning("teacher %s: embeddings only, no text: %s", spec.id, error)
        return None


def _media_processor(spec: TeacherSpec) -> ProcessorMixin | None:
    """What prepares the media in a language model's prompts; None without one, or where a package of its is absent.

    Rows of text need none, so that its absence is an error of the first row with media.
    """
    if not any((Path(spec.path) / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return None
    try:
        processor = AutoProcessor.from_pretrained(spec.path, local_files_only=True, trust_remote_code=spec.remote_code)
    except (ImportError, OSError, ValueError, TypeError) as error:
        logger.warning("teacher %s: no media in its prompts: %s", spec.id, _one_line(error))
        return None
    return processor if isinstance(processor, ProcessorMixin) else None


def _processor(spec: TeacherSpec) -> Any:
    # Images first: an image processor's file also satisfies AutoFeatureExtractor in some versions, the reverse is never so.
    errors = []
    candidates: tuple[Any, ...] = (AutoImageProcessor, AutoFeatureExtractor)
    for auto in candidates:
        try:
            return auto.from_pretrained(spec.path, local_files_only=True, trust_remote_code=spec.remote_code)
        except Exception as error:  # as in _skeleton
            errors.append(_one_line(error))
    raise TowerLoadError(
        f"Expected an image processor or a feature extractor in {spec.path}, found: {'; '.join(errors)}. Save or fetch "
        "preprocessor_config.json there."
    )


@dataclass(frozen=True)
class _LoadedModel:
    """A model on its device, frozen, and what its weights are known by."""

    model: PreTrainedModel
    coverage: CoverageReport
    digest: str
    """`weights_digest` of the checkpoint."""
    from_cache: bool = False
    passes: Passes = one_by_one


def _load_model(
    spec: TeacherSpec,
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    model_class: Any,
    device: torch.device,
    *,
    quantise: bool,
) -> _LoadedModel:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plan = NOTHING_QUANTISED
    if quantise:
        plan = plan_quantisation(
            skeleton, teacher_id=spec.id, skip_modules=spec.skip_modules, min_coverage=spec.min_coverage
        )
    elif checkpoint.gptq is not None:
        require_quantised(skeleton, teacher_id=spec.id, skip_modules=spec.skip_modules, min_coverage=spec.min_coverage)
    is_small = skeleton.num_parameters() < spec.cache_min_parameters
    is_kept = quantise and spec.cache_dir is not None and not is_small
    blocks = block_names(skeleton, spec.role) if is_kept or spec.streamed else ()
    if spec.streamed:
        _refuse_unstreamable(spec, blocks, quantise=quantise)
    require_memory(spec.id, skeleton, plan, dtype, device, streamed_blocks=blocks if spec.streamed else ())
    if spec.cache_dir is None or not (is_kept or spec.streamed):
        model, coverage, _ = _read_checkpoint(spec, checkpoint, skeleton, model_class, device, dtype, plan)
        return _LoadedModel(model, coverage, weights_digest(checkpoint))
    cache = QuantisedCache(Path(spec.cache_dir).expanduser())
    # What exceeds a GPU is quantised beside it.
    packed_on = torch.device("cpu") if spec.streamed else device
    recipe = recipe_of(
        checkpoint,
        model_class=type(skeleton).__name__,
        plan=plan,
        dtype=dtype,
        device_type=packed_on.type,
        blocks=blocks,
        code=spec.remote_code,
    )
    entry = cache.find(spec.id, recipe, checkpoint)
    if entry is not None:
        logger.info("teacher %s: quantised weights from %s", spec.id, entry.folder)
        return _from_entry(spec, skeleton, entry, plan, dtype, device, blocks, from_cache=True)
    if spec.streamed:
        entry = _quantise_to(cache, recipe, spec, checkpoint, skeleton, model_class, dtype, plan, blocks)
        return _from_entry(spec, skeleton, entry, plan, dtype, device, blocks, from_cache=False)
    model, coverage, own_quantiser = _read_checkpoint(spec, checkpoint, skeleton, model_class, device, dtype, plan)
    digest = weights_digest(checkpoint)
    cache.write(
        spec.id,
        recipe,
        checkpoint,
        model,
        blocks=blocks,
        coverage=coverage,
        digest=digest,
        own_quantiser=own_quantiser,
    )
    return _LoadedModel(model, coverage, digest)


def _from_entry(
    spec: TeacherSpec,
    skeleton: PreTrainedModel,
    entry: CacheEntry,
    plan: QuantisationPlan,
    dtype: torch.dtype,
    device: torch.device,
    blocks: tuple[str, ...],
    *,
    from_cache: bool,
) -> _LoadedModel:
    """The model of a cache entry, in place of its skeleton."""
    prepare_modules(skeleton, plan, dtype, own_quantiser=entry.manifest.own_quantiser)
    passes: Passes = one_by_one
    if spec.streamed:
        entry.fill_rest(skeleton, device)
        passes = LayerStream(skeleton, entry, blocks, device).run
    else:
        entry.fill(skeleton, device)
    _finish(spec, skeleton)
    return _LoadedModel(
        skeleton, entry.manifest.coverage, entry.manifest.weights_digest, from_cache=from_cache, passes=passes
    )


def _quantise_to(
    cache: QuantisedCache,
    recipe: Mapping[str, Any],
    spec: TeacherSpec,
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    model_class: Any,
    dtype: torch.dtype,
    plan: QuantisationPlan,
    blocks: tuple[str, ...],
) -> CacheEntry:
    """The entry of a model that is never whole in memory: each block is written as soon as it is packed."""
    with cache.writing(spec.id, recipe) as draft:
        spill = BlockSpill(draft, blocks)
        try:
            with spilling(spill):
                model, coverage, _ = _read_checkpoint(
                    spec, checkpoint, skeleton, model_class, torch.device("cpu"), dtype, plan, spilled=True
                )
        except TowerLoadError:
            if spill.failure is not None:
                raise spill.failure from None
            raise
        spill.flush()
        manifest = CacheManifest(
            teacher=spec.id,
            recipe=recipe,
            source=source_files(checkpoint),
            weights_digest=weights_digest(checkpoint),
            own_quantiser=True,
            coverage=coverage,
            files={},
            ties={},
        )
        return draft.finish(model, blocks=blocks, manifest=manifest)
    raise TowerLoadError(
        f"Expected to write the blocks of the streamed teacher {spec.id!r} to {cache.directory}, found that this failed (see the "
        "warning above). Free disk space or choose another folder under cache.dir."
    )


def _refuse_unstreamable(spec: TeacherSpec, blocks: tuple[str, ...], *, quantise: bool) -> None:
    found = None
    if spec.role not in ("causal_lm", "encoder"):
        found = f"role {spec.role}"
    elif not quantise:
        found = "floating point, or weights that their authors quantised,"
    elif not blocks:
        found = "no transformer blocks"
    elif spec.cache_dir is None:
        raise TowerLoadError(
            f"Expected a folder for the blocks of the streamed teacher {spec.id!r}, found none. Set cache.dir, or give TowerLoader "
            "a cache_dir."
        )
    if found is not None:
        raise TowerLoadError(
            f"Expected a quantised language model or encoder to stream block by block, found {found} in teacher {spec.id!r}. Give it "
            "a device that holds it."
        )


def _read_checkpoint(
    spec: TeacherSpec,
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    model_class: Any,
    device: torch.device,
    dtype: torch.dtype,
    plan: QuantisationPlan,
    *,
    spilled: bool = False,
) -> tuple[PreTrainedModel, CoverageReport, bool]:
    """The model from its floating-point tensors, what NF4 reached, and whether experts.py's quantiser did it.

    Args:
        spilled: the packed tensors leave the model as they are made, and cannot be compared with their originals afterwards.
    """
    keys = _keys_by_parameter(spec, skeleton, checkpoint)
    converted = spilled or any(f"{name}.weight" not in keys for name in plan.matrices)
    quantisation: Any = None
    if plan is not NOTHING_QUANTISED:
        quantisation = quantisation_config(plan, dtype, own_quantiser=converted)
    elif checkpoint.gptq is not None:
        quantisation = GptqConfig([m.packed for m in skeleton.modules() if isinstance(m, GptqLinear)])
    # The code of an allow-listed checkpoint is found through its folder.
    source: dict[str, Any] = (
        {"use_safetensors": True, "local_files_only": True, "trust_remote_code": True}
        if spec.remote_code
        else {"config": _config(spec, model_class), "state_dict": stored_tensors(checkpoint)}
    )
    try:
        model, info = model_class.from_pretrained(
            spec.path if spec.remote_code else None,
            quantization_config=quantisation,
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            **source,
        )
    except Exception as error:  # as in _skeleton
        raise TowerLoadError(
            f"Expected {spec.path} to load as {model_class.__name__}, found: {_one_line(error)}. Check that the checkpoint "
            "belongs to that class."
        ) from error
    _refuse_incomplete(spec, info)
    refuse_damaged(model, teacher_id=spec.id)
    _finish(spec, model)
    original = _original({} if spilled else keys)
    return model, measure_coverage(model, plan, original, teacher_id=spec.id), converted


def _finish(spec: TeacherSpec, model: PreTrainedModel) -> None:
    """What `from_pretrained` takes from the folder beside the weights, and `freeze`."""
    model.config.name_or_path = spec.path
    if model.can_generate():
        try:
            configured = GenerationConfig.from_pretrained(spec.path, local_files_only=True)
        except OSError:
            # Older checkpoints keep it inside config.json.
            configured = GenerationConfig.from_pretrained(
                spec.path, config_file_name="config.json", _from_model_config=True, local_files_only=True
            )
        model.generation_config = configured
    freeze(model)


def _config(spec: TeacherSpec, model_class: Any) -> Any:
    config = model_class.config_class.from_pretrained(spec.path, local_files_only=True)
    for part in (config, config.get_text_config(decoder=True)):
        # transformers would look for its own reader of what gptq.py reads.
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _skeleton(spec: TeacherSpec, model_class: Any, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model without weights, to plan on; matrices that its authors quantised already are in their places."""
    try:
        if spec.remote_code:
            config = transformers.AutoConfig.from_pretrained(spec.path, local_files_only=True, trust_remote_code=True)
            with torch.device("meta"):
                skeleton = model_class.from_config(config, trust_remote_code=True)
        else:
            config = _config(spec, model_class)
            with torch.device("meta"):
                skeleton = model_class(config)
    except Exception as error:  # configurations and models check little themselves, so a damaged one can raise anything
        raise TowerLoadError(
            f"Expected config.json in {spec.path} to describe a {model_class.__name__}, found: {_one_line(error)}. Fetch it again."
        ) from error
    assert isinstance(skeleton, PreTrainedModel)
    if checkpoint.gptq is not None:
        place_of = _placing(skeleton)

        def parameter(key: str) -> str | None:
            (name, *_), is_converted = place_of(key)
            return None if is_converted else name

        place_packed(skeleton, packed_matrices(skeleton, checkpoint, parameter, teacher_id=spec.id))
    return skeleton


def _keys_by_parameter(
    spec: TeacherSpec, skeleton: PreTrainedModel, checkpoint: Checkpoint
) -> dict[str, tuple[Path, str]]:
    """Parameter name -> file and key of its original, by the very renamings that from_pretrained applies.

    Tensors that a class merges or splits while it loads are left out.

    Raises:
        TowerLoadError: a tensor of another shape than the parameter's, which transformers does not look at in those that it
            quantises; one that holds no floating-point numbers where the parameter does, which would be cast; an expert's matrix
            that is missing or unlike those of the other experts.
    """
    names = skeleton.state_dict()
    places = _places(skeleton, checkpoint)
    found = {}
    experts: dict[tuple[str, str, str], dict[int, tuple[int, ...]]] = {}
    for path in checkpoint.files:
        with safe_open(path, framework="pt", backend="pread") as file:
            for key in file.keys():  # noqa: SIM118  # the file is no mapping
                (name, *_), is_converted = places[key]
                if name not in names:
                    continue
                stored = file.get_slice(key)
                shape, kind = tuple(stored.get_shape()), str(stored.get_dtype())
                if names[name].is_floating_point() and kind not in FLOATS:
                    raise TowerLoadError(
                        f"Expected floating-point numbers ({', '.join(FLOATS)}) in {key!r} of teacher {spec.id!r}, found {kind} in "
                        f"{path}. Use the original checkpoint that this one was made from."
                    )
                if is_converted:
                    if expert := EXPERT.match(key):
                        before, index, after = expert.groups()
                        experts.setdefault((name, before, after), {})[int(index)] = shape
                    continue
                found[name] = (path, key)
                if shape != tuple(names[name].shape):
                    raise TowerLoadError(
                        f"Expected shape {tuple(names[name].shape)} for {name!r} of teacher {spec.id!r}, found {shape} in {path}. "
                        "Fetch the checkpoint again, or name the class that it was saved from."
                    )
    for (name, before, after), shapes in experts.items():
        usual = Counter(shapes.values()).most_common(1)[0][0]
        for index in range(len(names[name])):
            if shapes.get(index) != usual:
                raise TowerLoadError(
                    f"Expected shape {usual} for {f'{before}.{index}.{after}'!r} of teacher {spec.id!r}, as for other experts, found "
                    f"{shapes.get(index, 'no such tensor')}. Fetch the checkpoint again."
                )
    return found


def _places(skeleton: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, tuple[list[str], bool]]:
    """Key of each stored tensor -> the parameters that it becomes (a part of), and whether it is changed on the way."""
    place_of = _placing(skeleton)
    return {key: place_of(key) for key in checkpoint.weights}


def _placing(skeleton: PreTrainedModel) -> Callable[[str], tuple[list[str], bool]]:
    """As `_places`, for one key."""
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    names = skeleton.state_dict()

    def place_of(key: str) -> tuple[list[str], bool]:
        name, pattern = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, names)
        targets = [name]
        if pattern is not None:
            first, *more = next(each for each in converters if pattern in each.source_patterns).target_patterns
            targets += [name.replace(first, other) for other in more]
        return targets, pattern is not None

    return place_of


def _original(keys: dict[str, tuple[Path, str]]) -> Callable[[str], Tensor | None]:
    def read(name: str) -> Tensor | None:
        if name not in keys:
            return None
        path, key = keys[name]
        with safe_open(path, framework="pt", backend="pread") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    return read


def _refuse_incomplete(spec: TeacherSpec, info: dict[str, Any]) -> None:
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(spec.unused_weights)]
    for kind, names in (("missing", sorted(info["missing_keys"])), ("unexpected", sorted(unexpected))):
        if names:
            raise TowerLoadError(
                f"Expected the weights in {spec.path} to fit teacher {spec.id!r} exactly, found {len(names)} "
                f"{kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}). Fetch the "
                "checkpoint again, or name the class that it was saved from."
            )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
