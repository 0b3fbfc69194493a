"""VendorEngine: one loaded teacher of a vendor's package, as `nexus.towers.engine.TeacherEngine` is one of transformers 5.

Runs in the package's own environment. Weights are read from safetensors, must fit the vendor's class exactly, and are packed into NF4
one matrix at a time; the vendor's own loading, which may reach for a hub or fill gaps with random numbers, is not used.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from nexus.artifacts import fingerprint_of
from nexus.config import Role
from nexus.data.media import add_noise, decode_audio
from nexus.errors import ConfigError, DataError, TowerLoadError
from nexus.towers.checkpoint import open_checkpoint, weights_digest
from nexus.towers.codec import AskCodec, score_codec
from nexus.towers.filling import BLOCK, MAX_WEIGHT_ERROR, ReadTensor, dequantised, fill, reader_of, stored_bits
from nexus.towers.health import NotFiniteError, check_targets
from nexus.towers.probes import tone
from nexus.towers.registry import TeacherSpec
from nexus.towers.rows import RowsError
from nexus.towers.targets import CodecTargets, ScoreRequest, TeacherTargets, TokenTargets
from nexus.towers.transports import pack_topk


@dataclass(frozen=True)
class PackedShare:
    """How much of a vendor's model is in NF4; the numbers of `nexus.towers.nf4.CoverageReport`."""

    total_params: int
    quantised_params: int
    share: float
    quantisable_share: float
    bits_per_param: float
    max_weight_error: float
    stored_bytes: int


@dataclass(frozen=True)
class ScoredCodes:
    """One recording under a codec language model. Letters: F frames, Q codebooks, V codes, H width."""

    codes_FQ: Tensor
    logits_FQ: Sequence[Tensor]
    """For each codebook [F, V of that codebook]."""
    hidden: dict[int, Tensor]
    """Layer -> [F, H]."""


@dataclass(frozen=True)
class VendorModel:
    """What a vendor's module gives: exactly one of `codec` and `score`."""

    model: Any
    sampling_rate: int
    hidden_size: int
    blocks: Sequence[nn.Module]
    vocabulary_size: int | None = None
    score: Callable[[str, Tensor, Sequence[int]], ScoredCodes] | None = None
    """(prompt, samples [T], layers); of a codec language model."""
    codec: AskCodec | None = None


class VendorEngine:
    """Gives the targets of one teacher; raises as `TeacherEngine` does."""

    label_texts = None
    tokenizer_hash = None

    def __init__(self, spec: TeacherSpec, loaded: VendorModel, coverage: PackedShare, fingerprint: str) -> None:
        self.spec = spec
        self.teacher_id = spec.id
        self.coverage = coverage
        self.fingerprint = fingerprint
        self._loaded = loaded

    @property
    def role(self) -> Role:
        """codec_lm or codec."""
        return self.spec.role

    @property
    def num_layers(self) -> int:
        """Blocks whose hidden states can be asked for."""
        return len(self._loaded.blocks)

    @property
    def hidden_size(self) -> int:
        """Width of those states; of a codec's latents."""
        return self._loaded.hidden_size

    @property
    def vocabulary_size(self) -> int | None:
        """Codes of its distributions; None for a codec."""
        return self._loaded.vocabulary_size

    @property
    def sampling_rate(self) -> int:
        """Hertz that its codec hears."""
        return self._loaded.sampling_rate

    def score(self, request: ScoreRequest) -> TeacherTargets:
        """The teacher's targets for every row of `request`, in its order: text in the prompts, recordings in the media."""
        if request.media is None:
            raise ConfigError(
                f"Expected media for the teacher {self.teacher_id!r} of role {self.role}, found none. Give it rows with recordings."
            )
        if request.transport != "topk":
            raise ConfigError(
                f"Expected transport topk for the teacher {self.teacher_id!r} of role {self.role}, found {request.transport}. Set "
                "another transport for language models only."
            )
        unknown = [layer for layer in request.layers if not 0 <= layer < self.num_layers]
        if unknown and self._loaded.score is not None:
            raise ConfigError(
                f"Expected layers of {self.teacher_id!r} between 0 and {self.num_layers - 1}, found {unknown[0]}. Choose among them."
            )
        tokens: TokenTargets | None = None
        hidden: dict[int, np.ndarray] = {}
        codec: CodecTargets | None = None
        codebooks: int | None = None
        if self._loaded.codec is not None:
            codec = score_codec(self._loaded.model, self.sampling_rate, self._loaded.codec, request)
        else:
            tokens, hidden, codebooks = self._score_codes(request)
        targets = TeacherTargets(
            teacher=self.teacher_id,
            fingerprint=self.fingerprint,
            tokenizer_hash=None,
            row_ids=request.row_ids,
            tokens=tokens,
            hidden=hidden,
            pooled_BE=None,
            label_texts=None,
            label_logprobs_BC=None,
            codebooks=codebooks,
            codec=codec,
        )
        check_targets(targets, vocabulary_size=self.vocabulary_size)
        return targets

    def probe(self) -> None:
        """As `TeacherEngine.probe`."""
        try:
            self.score(probe_request(self))
        except RowsError as error:
            raise NotFiniteError(
                self.teacher_id,
                f"Expected teacher {self.teacher_id!r} to answer a fixed question after loading, found: "
                f"{'; '.join(sorted(set(error.reasons.values())))}.",
            ) from None

    def _score_codes(self, request: ScoreRequest) -> tuple[TokenTargets, dict[int, np.ndarray], int]:
        assert request.media is not None
        assert self._loaded.score is not None
        offsets, columns, codebooks = [0], [], 0
        hidden: dict[int, list[Tensor]] = {layer: [] for layer in request.layers}
        bad: dict[str, str] = {}
        for row_id, prompt, data in zip(request.row_ids, request.prompts, request.media, strict=True):
            try:
                waveform = decode_audio(data, self.sampling_rate)
                if request.snr_db is not None:
                    waveform = add_noise(waveform, row_id, request.snr_db)
                with torch.inference_mode():
                    scored = self._loaded.score(prompt, torch.from_numpy(waveform), request.layers)
            except DataError as error:
                bad[row_id] = str(error)
                continue
            kept = min(request.top_k, min(logits.shape[1] for logits in scored.logits_FQ))
            packed = [pack_topk(logits, top_k=kept, temperature=request.temperature) for logits in scored.logits_FQ]
            halves = {layer: state.to(torch.float16) for layer, state in scored.hidden.items()}
            if not all(p.finite_N.all() for p in packed) or not all(s.isfinite().all() for s in halves.values()):
                bad[row_id] = "not finite"
                continue
            codebooks = len(packed)
            # Frame by frame, and within a frame codebook by codebook.
            columns.append(
                (
                    scored.codes_FQ.flatten(),
                    torch.stack([p.ids_NK for p in packed], dim=1).flatten(0, 1),
                    torch.stack([p.logprobs_NK for p in packed], dim=1).flatten(0, 1),
                    torch.stack([p.tail_N for p in packed], dim=1).flatten(),
                )
            )
            offsets.append(offsets[-1] + scored.codes_FQ.numel())
            for layer, state in halves.items():
                hidden[layer].append(state)
        if bad:
            raise RowsError(
                "Expected text and a recording that the teacher can read in every row; mend or drop the rows.", bad
            )
        codes, ids, logprobs, tails = (torch.cat(parts).cpu().numpy() for parts in zip(*columns, strict=True))
        tokens = TokenTargets(np.array(offsets, dtype=np.int64), codes.astype(np.int32), ids, logprobs, tails)
        return tokens, {layer: torch.cat(states).cpu().numpy() for layer, states in hidden.items()}, codebooks


def probe_request(engine: VendorEngine, layers: tuple[int, ...] = ()) -> ScoreRequest:
    """Two spoken rows."""
    # Parler-TTS speaks with the voice that it is told; a codec reads no text.
    voice = "A calm voice.\n\n" if engine.spec.library == "parler-tts" else ""
    prompts = (f"{voice}Say hello.", f"{voice}Add.")
    media = (tone(0, engine.sampling_rate), tone(1, engine.sampling_rate))
    return ScoreRequest(("a", "b"), prompts, None, media, 1.0, 8, layers)


def load_vendor_engine(spec: TeacherSpec, *, quantise: bool = True) -> VendorEngine:
    """Load a teacher of the package `spec.library`, in whose environment this process runs.

    Raises:
        TowerLoadError: files that are not what the spec demands.
    """
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    module = importlib.import_module(
        {"qwen-tts": "nexus.vendors.qwen_tts", "parler-tts": "nexus.vendors.parler_tts"}[spec.library]
    )
    load: Callable[..., tuple[VendorModel, PackedShare, str]] = module.load
    loaded, coverage, digest = load(spec, device, quantise=quantise and spec.quantise)
    if quantise and spec.quantise and coverage.share < spec.min_coverage:
        raise TowerLoadError(
            f"Expected NF4 for at least {spec.min_coverage:.0%} of the parameters of {spec.id!r}, found {coverage.share:.1%}. Lower "
            "its min_coverage if the rest may stay in floating point."
        )
    fingerprint = fingerprint_of(
        {
            "weights": digest,
            "class": spec.model_class,
            "revision": spec.revision,
            "quantisation": ["nf4", "double", *sorted(spec.skip_modules)] if quantise and spec.quantise else "none",
        }
    )
    return VendorEngine(spec, loaded, coverage, fingerprint)


def read_model(
    spec: TeacherSpec, folder: Path, build: Callable[[dict[str, Any]], Any], device: torch.device, *, quantise: bool
) -> tuple[Any, PackedShare, str]:
    """A model from a folder, its share in NF4, and a hash of its files.

    Args:
        build: makes the model from config.json, without weights.

    Raises:
        TowerLoadError: files that do not describe or do not fit it.
    """
    checkpoint = open_checkpoint(folder)
    try:
        # Buffers that no checkpoint holds (position tables) are computed here and must not be lost.
        with init_empty_weights(include_buffers=False):
            model = build(json.loads(json.dumps(dict(checkpoint.config))))
    except Exception as error:  # configurations check little themselves, so that a damaged one can raise anything
        raise TowerLoadError(
            f"Expected config.json in {folder} to describe teacher {spec.id!r}, found: {' '.join(str(error).split())[:200]}. Fetch "
            "it again."
        ) from error
    read = reader_of(model, checkpoint, teacher_id=spec.id)
    matrices = _matrices(model, spec) if quantise else ()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    fill(model, matrices, read, device, dtype)
    model.eval()
    model.requires_grad_(False)
    digest = fingerprint_of({"weights": weights_digest(checkpoint), "config": dict(checkpoint.config)})
    return model, _share(model, matrices, read, spec), digest


def _matrices(model: nn.Module, spec: TeacherSpec) -> tuple[str, ...]:
    chosen = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or any(name == s or name.startswith(f"{s}.") for s in spec.skip_modules):
            continue
        if module.in_features % BLOCK:
            raise TowerLoadError(
                f"Expected the rows of every quantised matrix to be a multiple of {BLOCK} long, found {module.in_features} in "
                f"{name!r} of teacher {spec.id!r}. Add it to the teacher's skip_modules."
            )
        chosen.append(name)
    return tuple(chosen)


def _share(model: nn.Module, matrices: Sequence[str], read: ReadTensor, spec: TeacherSpec) -> PackedShare:
    packed: dict[str, Any] = {name: model.get_submodule(name) for name in matrices}
    own = {id(module.weight) for module in packed.values()}
    floats = {id(p): p for p in model.parameters() if id(p) not in own}
    in_float = sum(parameter.numel() for parameter in floats.values())
    left = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if type(module) is nn.Linear and module.in_features % BLOCK == 0
    }
    largest = 0.0
    for name, module in packed.items():
        original = read(f"{name}.weight").float()
        error = float((dequantised(module).cpu() - original).norm() / original.norm().clamp(min=1e-12))
        if not error < MAX_WEIGHT_ERROR:
            raise TowerLoadError(
                f"Expected a relative NF4 error below {MAX_WEIGHT_ERROR} in every matrix, found {error:.3f} in {name!r} of teacher "
                f"{spec.id!r}. Add it to the teacher's skip_modules."
            )
        largest = max(largest, error)
    quantised = sum(math.prod(module.weight.quant_state.shape) for module in packed.values())
    bits = sum(stored_bits(module) for module in packed.values())
    total = quantised + in_float
    float_bytes = sum(parameter.numel() * parameter.element_size() for parameter in floats.values())
    return PackedShare(
        total_params=total,
        quantised_params=quantised,
        share=quantised / total,
        quantisable_share=(quantised + sum(left.values())) / total,
        bits_per_param=bits / max(1, quantised),
        max_weight_error=largest,
        stored_bytes=bits // 8 + float_bytes,
    )
