"""What a model's forward is given while its blocks are ablated: text, alone or beside other media, or what an encoder reads and the
text that its decoder writes.

Ablations of a decoder share one run of the encoder, and its projections too: the keys and values of cross-attention, which cost more
than all else where thousands of frames are heard for a few dozen tokens, are computed once per sample and read by every ablation.

Shape letters: B samples, R rows (some or all ablations of the samples), T time of the text, S positions of the encoder, H heads,
D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from nexus.errors import ProfilingError
from nexus.profiling.crossattention import PassThroughLayer, SharedCrossCache


class ModelInputs(Protocol):
    """Keyword arguments of a model's forward, for prompts and for each token that is appended to them."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor

    def prompt(self, num_variants: int, *, use_cache: bool) -> dict[str, Any]:
        """Return the arguments of a forward over the whole text, which ends with so many variants stacked on the batch axis."""
        ...

    def step(self, token_ids_R: Tensor, mask_RT: Tensor) -> dict[str, Any]:
        """Return the arguments of a forward that appends one token per row; `mask_RT` has its column."""
        ...

    def rows_are(self, sample_R: Tensor) -> None:
        """Say which sample each row of the next steps belongs to; until then they are the rows of the prompt."""
        ...


def model_inputs(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    beside: Mapping[str, Tensor] | None = None,
    *,
    ablates_encoder: bool = False,
) -> ModelInputs:
    """Return the inputs of text padded on either side, for the model's own kind.

    Args:
        input_ids_BT: of an encoder-decoder, the decoder's.
        beside: what else the model is given, each with the batch in front: all that the encoder of an encoder-decoder reads.
        ablates_encoder: whether variants arise in the encoder of an encoder-decoder.

    Raises:
        ValueError: `beside` is missing for an encoder-decoder, or rows are padded on a side at which the model miscounts positions.
        ProfilingError: an encoder-decoder that keeps no cross-attention cache.
    """
    if not model.config.is_encoder_decoder:
        return _TextInputs(model, input_ids_BT, attention_mask_BT, beside or {})
    if not beside:
        raise ValueError(
            f"Expected inputs= with what the encoder of {type(model).__name__} reads beside the ids of its decoder, found none."
        )
    return _EncoderDecoderInputs(model, input_ids_BT, attention_mask_BT, beside, ablates_encoder=ablates_encoder)


def position_ids_of(attention_mask_BT: Tensor) -> Tensor:
    """Return each token's position among the real tokens of its row, as `generate` counts it."""
    return (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)


def accepts(model: PreTrainedModel, name: str) -> bool:
    """Return whether the model's forward has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def encoding_part(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part that encodes without being asked for text: the model itself, or the encoder of an encoder-decoder."""
    is_whole = not (model.config.is_encoder_decoder and model.can_generate())
    part: PreTrainedModel = model if is_whole else cast(Any, model).get_encoder()
    return part


def left_aligned(mask_BT: Tensor, tensors_BT: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with each row's padding on the left moved to its right."""
    columns_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    order_BT = (mask_BT.bool().long().argmax(dim=1)[:, None] + columns_T) % len(columns_T)
    return [tensor_BT.gather(1, order_BT) for tensor_BT in tensors_BT]


class _TextInputs:
    """A decoder's text, positions counted from each row's first real token."""

    def __init__(
        self, model: PreTrainedModel, input_ids_BT: Tensor, attention_mask_BT: Tensor, beside: Mapping[str, Tensor]
    ) -> None:
        self.input_ids_BT, self.attention_mask_BT = input_ids_BT, attention_mask_BT
        self._beside = beside
        # Models that place media in their text have a way of their own to count positions.
        self._counts = accepts(model, "position_ids") and not beside

    def prompt(self, num_variants: int, *, use_cache: bool) -> dict[str, Any]:
        del num_variants  # Rows are stacked behind the first block only.
        inputs = {"input_ids": self.input_ids_BT, "attention_mask": self.attention_mask_BT, **self._beside}
        if self._counts:
            inputs["position_ids"] = position_ids_of(self.attention_mask_BT)
        return {**inputs, "use_cache": use_cache}

    def step(self, token_ids_R: Tensor, mask_RT: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": token_ids_R[:, None], "attention_mask": mask_RT}
        if self._counts:
            inputs["position_ids"] = position_ids_of(mask_RT)[:, -1:]
        return {**inputs, "use_cache": True}

    def rows_are(self, sample_R: Tensor) -> None:
        del sample_R  # A row's text is all there is.


class _EncoderDecoderInputs:
    """A decoder's text and what the encoder reads."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        encoder_inputs: Mapping[str, Tensor],
        *,
        ablates_encoder: bool,
    ) -> None:
        self.input_ids_BT, self.attention_mask_BT = input_ids_BT, attention_mask_BT
        self._model = model
        self._encoder_inputs = encoder_inputs
        self._counts = accepts(model, "decoder_position_ids")
        if not self._counts and not bool(attention_mask_BT[:, 0].all()):
            raise ValueError(
                f"Expected decoder ids without padding on the left, because {type(model).__name__} counts positions itself, found "
                "some. Pad on the right, or generate from prompts of one length."
            )
        self._sample_B = torch.arange(len(input_ids_BT), device=input_ids_BT.device)
        self._sample_R = self._sample_B
        self._blank_1SD: Tensor
        self._cross = None if ablates_encoder else self._project()

    def prompt(self, num_variants: int, *, use_cache: bool) -> dict[str, Any]:
        if self._cross is None:
            # The sweep stacks variants inside the encoder: the text has to follow.
            self._sample_R = self._sample_B.repeat(num_variants)
            states_RSD = self._encode()
            text = self._text(self.input_ids_BT[self._sample_R], self.attention_mask_BT[self._sample_R])
            return {**text, "encoder_outputs": BaseModelOutput(last_hidden_state=states_RSD), "use_cache": use_cache}
        self.rows_are(self._sample_B)
        past = DynamicCache()
        if not use_cache:
            past.layers = [PassThroughLayer() for _ in self._cross.layers]  # type: ignore[no-untyped-call]
        return {
            **self._text(self.input_ids_BT, self.attention_mask_BT),
            "encoder_outputs": self._heard(),
            "past_key_values": EncoderDecoderCache(past, self._cross),
            "use_cache": True,
        }

    def step(self, token_ids_R: Tensor, mask_RT: Tensor) -> dict[str, Any]:
        inputs = {**self._text(token_ids_R[:, None], mask_RT), "encoder_outputs": self._heard(), "use_cache": True}
        if self._counts:
            inputs["decoder_position_ids"] = inputs["decoder_position_ids"][:, -1:]
        return inputs

    def rows_are(self, sample_R: Tensor) -> None:
        self._sample_R = sample_R
        if self._cross is not None:
            self._cross.rows_are(sample_R)

    def _text(self, input_ids_RT: Tensor, mask_RT: Tensor) -> dict[str, Any]:
        inputs = {"decoder_input_ids": input_ids_RT, "decoder_attention_mask": mask_RT}
        if self._counts:
            inputs["decoder_position_ids"] = position_ids_of(mask_RT)
        if "attention_mask" in self._encoder_inputs:
            # Cross-attention leaves out what the encoder was told to leave out.
            inputs["attention_mask"] = self._encoder_inputs["attention_mask"][self._sample_R]
        return inputs

    def _encode(self) -> Tensor:
        states_RSD: Tensor = cast(Any, self._model).get_encoder()(**self._encoder_inputs).last_hidden_state
        self._blank_1SD = states_RSD.new_full((1, 1, 1), torch.nan).expand(1, *states_RSD.shape[1:])
        return states_RSD

    def _heard(self) -> BaseModelOutput:
        """Return encoder states that nothing reads, because cross-attention is cached: one NaN, repeated without being copied."""
        return BaseModelOutput(last_hidden_state=self._blank_1SD.expand(len(self._sample_R), -1, -1))

    def _project(self) -> SharedCrossCache:
        """Run the encoder, and the decoder on one token, for the keys and values of cross-attention."""
        states = BaseModelOutput(last_hidden_state=self._encode())
        text = self._text(self.input_ids_BT[:, :1], torch.ones_like(self.attention_mask_BT[:, :1]))
        cache = self._model(**text, encoder_outputs=states, use_cache=True).past_key_values
        if not isinstance(cache, EncoderDecoderCache):
            raise ProfilingError(
                f"Expected {type(self._model).__name__} to cache cross-attention in an EncoderDecoderCache, found "
                f"{type(cache).__name__}. Profile its encoder alone."
            )
        return SharedCrossCache(cache.cross_attention_cache.layers)
