"""The whole student: trunk, adapters and router, and what it remembers while it answers.

The trunk reads `[reasoning context] + [vision context] + [audio context]` through its ports. A tower runs only for the rows whose
mask asks for it: other rows are not gathered into its batch, and without any row it is not called. Each row's result depends on
that row alone.

Letters: B rows of text, T tokens, M images or clips, N towers, C context tokens, D the trunk's width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from nexus.adapters.audio import AudioAdapter
from nexus.adapters.base import Adapter, Features, masked_mean
from nexus.adapters.reasoning import ReasoningAdapter
from nexus.adapters.vision import VisionAdapter
from nexus.config import TOWERS
from nexus.errors import ArtifactError
from nexus.student.config import NexusStudentConfig, PretrainedCoreConfig
from nexus.student.core import NexusStudentCore
from nexus.student.presets import StudentSpec
from nexus.student.router import RouterDecision, SparseIntentRouter
from nexus.student.trunk import PretrainedCore, build_core

SPEC_FILE = "student.json"
ADAPTERS_FILE = "adapters.safetensors"

_REASONING, _VISION, _AUDIO = range(len(TOWERS))


@dataclass(frozen=True)
class MediaBatch:
    """The images and sounds of a batch, each with the row it belongs to; at most one image and one sound per row."""

    pixel_values: Tensor | None = None
    """float [M, channels, h, w]."""
    pixel_rows: Tensor | None = None
    """int64 [M], distinct rows of the batch."""
    input_features: Tensor | None = None
    """float [M, mels, frames], log-mel."""
    frame_mask: Tensor | None = None
    """bool [M, frames]; None where all frames are real."""
    audio_rows: Tensor | None = None
    """int64 [M], distinct rows of the batch."""

    def __post_init__(self) -> None:
        for name, inputs, rows in (
            ("pixel_rows", self.pixel_values, self.pixel_rows),
            ("audio_rows", self.input_features, self.audio_rows),
        ):
            if (inputs is None) != (rows is None) or (
                inputs is not None and rows is not None and len(inputs) != len(rows)
            ):
                raise ValueError(
                    f"Expected one row index per input in {name}, found {rows} for {None if inputs is None else len(inputs)} inputs."
                )
            if rows is not None and len(rows.unique()) != len(rows):
                raise ValueError(
                    f"Expected at most one input per row, found {name} {rows.tolist()}. Join a row's inputs first."
                )

    def to(self, device: torch.device) -> MediaBatch:
        """The same media with their tensors on `device`."""
        moved: dict[str, Tensor | None] = {
            field.name: None if (value := getattr(self, field.name)) is None else value.to(device)
            for field in fields(self)
        }
        return MediaBatch(**moved)

    def available(self, batch_size: int) -> Tensor:
        """bool [B, N]: which towers have input. Reasoning reads the text and always has."""
        available_BN = torch.zeros(batch_size, len(TOWERS), dtype=torch.bool)
        available_BN[:, _REASONING] = True
        for tower, rows in ((_VISION, self.pixel_rows), (_AUDIO, self.audio_rows)):
            if rows is not None:
                available_BN[rows.cpu(), tower] = True
        return available_BN


@dataclass(frozen=True)
class EncodedContext:
    """What the towers made of a batch."""

    context_BCD: Tensor | None
    """None where no tower ran."""
    context_mask_BC: Tensor | None
    features: Mapping[str, tuple[Tensor, Features]]
    """Tower -> (its rows, int64 ascending; their features), for anchoring; towers that did not run are absent."""


@dataclass(frozen=True)
class StudentOutput:
    """One differentiable pass of the whole student."""

    trunk: CausalLMOutputWithPast
    encoded: EncodedContext


class StudentMemory:
    """What an answer in progress needs: the encoded context, the keys and values of all tokens so far, and which are real.

    The context is projected to the ports' keys and values at the first step and kept in the cache from then on.
    """

    def __init__(
        self, core: NexusStudentCore, context_BCD: Tensor | None = None, context_mask_BC: Tensor | None = None
    ) -> None:
        self._core = core
        self._context: tuple[Tensor | None, Tensor | None] = (context_BCD, context_mask_BC)
        self._cache = DynamicCache(config=core.config)
        self._mask_BS: Tensor | None = None

    def step(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Read more tokens (None masks none of them); logits [B, V] after each row's last real one."""
        new_BT = (
            torch.ones_like(input_ids_BT, dtype=torch.bool) if attention_mask_BT is None else attention_mask_BT.bool()
        )
        self._mask_BS = new_BT if self._mask_BS is None else torch.cat((self._mask_BS, new_BT), dim=1)
        context_BCD, context_mask_BC = self._context
        output = self._core(
            input_ids_BT,
            self._mask_BS,
            context_BCD=context_BCD,
            context_mask_BC=context_mask_BC,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._context = (None, None)
        return output.logits[:, -1]

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but these (int64, in their new order); call after the first step."""
        assert self._mask_BS is not None
        self._cache.batch_select_indices(rows)
        self._mask_BS = self._mask_BS[rows]


class NexusStudent(nn.Module):
    """Trunk, adapters and router in one module; answers in text.

    Args:
        encoders: wrapped pretrained encoders for the towers ("vision", "audio") whose configuration declares one.
    """

    def __init__(self, spec: StudentSpec, *, encoders: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        encoders = encoders or {}
        self.spec = spec
        self.core = build_core(spec.core)
        adapters: dict[str, nn.Module] = {}
        if spec.reasoning is not None:
            adapters["reasoning"] = ReasoningAdapter(spec.reasoning)
        if spec.vision is not None:
            adapters["vision"] = VisionAdapter(spec.vision, encoders.get("vision"))
        if spec.audio is not None:
            adapters["audio"] = AudioAdapter(spec.audio, encoders.get("audio"))
        self.adapters = nn.ModuleDict(adapters)
        self.router = SparseIntentRouter(spec.router)

    def embed(self, input_ids_BT: Tensor, prompt_mask_BT: Tensor) -> Tensor:
        """The router's input [B, D]: the trunk's lower states, averaged over the prompt. 0 for an empty prompt."""
        mask_BT = prompt_mask_BT.bool()
        return masked_mean(self.core.lower_states(input_ids_BT, mask_BT), mask_BT)

    def available(self, media: MediaBatch, batch_size: int) -> Tensor:
        """bool [B, N]: the towers that exist in this student and have input in the row."""
        exists_N = torch.tensor([tower in self.adapters for tower in TOWERS])
        return media.available(batch_size) & exists_N

    @torch.no_grad()
    def route(
        self, input_ids_BT: Tensor, prompt_mask_BT: Tensor, texts: Sequence[str], media: MediaBatch
    ) -> RouterDecision:
        """The router's decision for prompts whose tokens and texts are given."""
        available_BN = self.available(media, len(texts)).to(input_ids_BT.device)
        return self.router.route(self.embed(input_ids_BT, prompt_mask_BT), texts, available_BN)

    def encode(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        media: MediaBatch,
        tower_mask_BN: Tensor,
        *,
        prompt_mask_BT: Tensor | None = None,
    ) -> EncodedContext:
        """Run the towers that the mask turns on, each on its own rows only. Differentiable.

        Args:
            prompt_mask_BT: the tokens that may be read into a context; None means all real ones, which is right while
                answering. In training it must leave the answer out: every position reads the whole context, so an answer in it
                would be copied instead of learned.

        Raises:
            ValueError: if a tower is on for a row in which it has no input.
        """
        batch_size = input_ids_BT.shape[0]
        tower_mask_BN = tower_mask_BN.bool().cpu()
        impossible_BN = tower_mask_BN & ~self.available(media, batch_size)
        if impossible_BN.any():
            row, tower = impossible_BN.nonzero()[0].tolist()
            raise ValueError(
                f"Expected tower {TOWERS[tower]!r} on only where it exists and has input, found it on in row {row}."
            )
        blocks: list[tuple[Tensor, Tensor]] = []
        features: dict[str, tuple[Tensor, Features]] = {}
        for tower, name in enumerate(TOWERS):
            rows_M = tower_mask_BN[:, tower].nonzero().flatten().to(input_ids_BT.device)
            if not len(rows_M):
                continue
            adapter = self.adapters[name]
            assert isinstance(adapter, Adapter)
            readable_MT: Tensor | None = None
            if tower == _REASONING:
                mask_MT = attention_mask_BT[rows_M].bool()
                encoded = adapter.features(self.core.lower_states(input_ids_BT[rows_M], mask_MT), mask_MT)
                readable_MT = None if prompt_mask_BT is None else prompt_mask_BT[rows_M].bool()
            elif tower == _VISION:
                assert media.pixel_values is not None
                assert media.pixel_rows is not None
                encoded = adapter.features(media.pixel_values[_places(media.pixel_rows, rows_M)])
            else:
                assert media.input_features is not None
                assert media.audio_rows is not None
                places_M = _places(media.audio_rows, rows_M)
                frame_mask = None if media.frame_mask is None else media.frame_mask[places_M]
                encoded = adapter.features(media.input_features[places_M], frame_mask)
            features[name] = (rows_M, encoded)
            blocks.append(_scatter(*adapter.context(encoded, readable_MT), rows_M, batch_size))
        if not blocks:
            return EncodedContext(None, None, features)
        contexts, masks = zip(*blocks, strict=True)
        return EncodedContext(torch.cat(contexts, dim=1), torch.cat(masks, dim=1), features)

    def encode_context(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        media: MediaBatch,
        tower_mask_BN: Tensor,
        *,
        prompt_mask_BT: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The context alone, as `core` takes it; see `encode`. (None, None) where no tower is on."""
        encoded = self.encode(input_ids_BT, attention_mask_BT, media, tower_mask_BN, prompt_mask_BT=prompt_mask_BT)
        return encoded.context_BCD, encoded.context_mask_BC

    def forward(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        *,
        prompt_mask_BT: Tensor,
        tower_mask_BN: Tensor,
        media: MediaBatch | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
    ) -> StudentOutput:
        """One training pass: towers, then trunk. `prompt_mask_BT` is True on prompt tokens only; see `encode`.

        `logits_to_keep` is the trunk's: losses that score few positions apply the head to those states alone.
        """
        encoded = self.encode(
            input_ids_BT, attention_mask_BT, media or MediaBatch(), tower_mask_BN, prompt_mask_BT=prompt_mask_BT
        )
        trunk = self.core(
            input_ids_BT,
            attention_mask_BT,
            context_BCD=encoded.context_BCD,
            context_mask_BC=encoded.context_mask_BC,
            labels=labels,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
        )
        return StudentOutput(trunk, encoded)

    @torch.no_grad()
    def generate(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        *,
        tower_mask_BN: Tensor,
        max_new_tokens: int,
        eos_token_id: int,
        pad_token_id: int,
        media: MediaBatch | None = None,
    ) -> Tensor:
        """Greedy answers, int64 [B, at most max_new_tokens], each ended by `eos_token_id` and then padded.

        Prompts may be padded on either side; rows may mix text, images and sounds. A finished row costs nothing more.
        """
        if max_new_tokens < 1:
            raise ValueError(f"Expected max_new_tokens of at least 1, found {max_new_tokens}.")
        batch_size = input_ids_BT.shape[0]
        context_BCD, context_mask_BC = self.encode_context(
            input_ids_BT, attention_mask_BT, media or MediaBatch(), tower_mask_BN
        )
        memory = StudentMemory(self.core, context_BCD, context_mask_BC)
        answers_BT = torch.full(
            (batch_size, max_new_tokens), pad_token_id, dtype=torch.long, device=input_ids_BT.device
        )
        rows_M = torch.arange(batch_size, device=input_ids_BT.device)
        next_M = memory.step(input_ids_BT, attention_mask_BT).argmax(dim=-1)
        length = 0
        while True:
            answers_BT[rows_M, length] = next_M
            length += 1
            open_M = next_M != eos_token_id
            if length == max_new_tokens or not open_M.any():
                return answers_BT[:, :length]
            if not open_M.all():
                memory.keep_rows(open_M.nonzero().flatten())
                rows_M, next_M = rows_M[open_M], next_M[open_M]
            next_M = memory.step(next_M[:, None]).argmax(dim=-1)

    def drop_alignments(self) -> None:
        """Remove the maps to teachers' spaces, which only training needs; answers stay as they are."""
        for name, adapter in self.adapters.items():
            assert isinstance(adapter, Adapter)
            adapter.drop_alignments()
            self.spec = self.spec.with_alignments(name, ())

    def save_pretrained(self, directory: Path) -> None:
        """Write the trunk as transformers does, and beside it student.json, adapters.safetensors and the router's files."""
        self.core.save_pretrained(directory)
        (directory / SPEC_FILE).write_text(
            json.dumps(self.spec.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8"
        )
        state = {name: tensor.contiguous() for name, tensor in self.adapters.state_dict().items()}
        save_file(state, directory / ADAPTERS_FILE)
        self.router.save(directory)

    @classmethod
    def from_pretrained(cls, directory: Path, *, encoders: Mapping[str, nn.Module] | None = None) -> NexusStudent:
        """Read what `save_pretrained` wrote.

        Raises:
            ArtifactError: if a file is missing or damaged, or the files do not belong together.
        """
        try:
            spec = StudentSpec.from_dict(json.loads((directory / SPEC_FILE).read_text(encoding="utf-8")))
            student = cls(spec, encoders=encoders)
            student.core = type(student.core).from_pretrained(directory, dtype="auto")
            student.adapters.load_state_dict(load_file(directory / ADAPTERS_FILE))
        except Exception as error:  # json, safetensors and transformers each raise their own
            raise ArtifactError(f"Expected a student in {directory}, found: {error}. Export it again.") from error
        student.router = SparseIntentRouter.load(directory)
        return student


def register_auto_classes() -> None:
    """Let `AutoConfig` and `AutoModelForCausalLM` find the trunk. Safe to call again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(NexusStudentConfig.model_type, NexusStudentConfig, exist_ok=True)
    AutoModelForCausalLM.register(NexusStudentConfig, NexusStudentCore, exist_ok=True)
    AutoConfig.register(PretrainedCoreConfig.model_type, PretrainedCoreConfig, exist_ok=True)
    AutoModelForCausalLM.register(PretrainedCoreConfig, PretrainedCore, exist_ok=True)


def _places(owners_M: Tensor, rows: Tensor) -> Tensor:
    """Where in a media batch each of `rows` has its input; every row has exactly one."""
    return (rows.to(owners_M.device)[:, None] == owners_M).long().argmax(dim=-1)


def _scatter(context_MCD: Tensor, mask_MC: Tensor, rows_M: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The rows' contexts at their places in the whole batch; other rows get masked zeros."""
    context_BCD = context_MCD.new_zeros(batch_size, *context_MCD.shape[1:]).index_copy(0, rows_M, context_MCD)
    mask_BC = mask_MC.new_zeros(batch_size, mask_MC.shape[1]).index_copy(0, rows_M, mask_MC)
    return context_BCD, mask_BC
