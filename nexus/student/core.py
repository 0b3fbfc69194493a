"""The student's trunk: a causal language model that reads outside context through gated ports.

RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021, eq. 34), grouped-query attention (Ainslie et al. 2023), SwiGLU
(Shazeer 2020), and cross-attention ports whose tanh gates start at 0 (Flamingo, Alayrac et al. 2022, section 2.2), so that an
untrained port changes nothing.

Letters: B batch, T new tokens, S all tokens so far (cached ones and new ones), C context tokens, D width, H heads, G key-value
heads, d head size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from nexus.student.config import NexusStudentConfig

IGNORED_LABEL = -100
"""The label that cross-entropy leaves out; the value that transformers and PyTorch use."""


class NexusStudentCore(PreTrainedModel, GenerationMixin):
    """Decoder-only trunk with context ports. `generate` takes `context_BCD` and `context_mask_BC` as model arguments."""

    config: NexusStudentConfig
    config_class = NexusStudentConfig
    base_model_prefix = ""
    _no_split_modules = ["DecoderLayer", "CrossAttentionPort"]  # noqa: RUF012
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NexusStudentConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.ports = nn.ModuleDict({str(index): CrossAttentionPort(config) for index in config.port_layers})
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._recomputes = False
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, CrossAttentionPort):
            init.zeros_(module.gate_D)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        context_BCD: Tensor | None = None,
        context_mask_BC: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token at each position.

        Args:
            input_ids: int64 [B, T]; exactly one of `input_ids` and `inputs_embeds` [B, T, D].
            attention_mask: bool or int [B, S], nonzero at real tokens, cached ones included. Padding may stand on either side:
                positions count real tokens only, and padding changes no real token's logits.
            context_BCD: what the ports read. It is projected to keys and values once per cache: later calls with the same
                tensor, or with None, reuse the projection; another tensor replaces it.
            context_mask_BC: bool, True at real context tokens; None means all. A row without any gets exactly no context.
            labels: int64 [B, T]; position t is scored against label t + 1, and -100 is not scored.
            cache_position: int64 [T], indices of the new tokens in the cache; only checked, since the cache knows them.
            logits_to_keep: return logits of the last so many positions of each row only, counted back from its last real
                token, so that a prompt padded on the right is continued after its text. 0 keeps all.

        Returns:
            `loss` (float32 scalar, nats per scored label; 0 when nothing is scored), `logits` [B, T or kept, V],
            `past_key_values`, and `hidden_states`: embeddings, then each layer's output, the last one normalised.

        Raises:
            ValueError: if shapes contradict each other; the message names both.
        """
        require_one_way(input_ids, inputs_embeds, labels, logits_to_keep)
        hidden_BTD: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        num_new = hidden_BTD.shape[1]

        # A training step has labels, and would pay for a cache that nobody reads.
        use_cache = (self.config.use_cache and labels is None) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        require_cached(cache_position, num_past)
        mask_BS = token_mask(attention_mask, hidden_BTD, num_past)
        if position_ids is None:
            position_ids = token_positions(mask_BS, hidden_BTD, num_past)
        rotary = _rotary(position_ids, self.config, hidden_BTD.dtype)
        attention_bias = _causal_mask(mask_BS, num_new, num_past, hidden_BTD.device)
        contexts = self._project_context(context_BCD, context_mask_BC, past_key_values, hidden_BTD)

        states = [hidden_BTD]
        for index, layer in enumerate(self.layers):
            if index in contexts:
                hidden_BTD = self.ports[str(index)](hidden_BTD, contexts[index])
            if self._recomputes and self.training and past_key_values is None:
                hidden_BTD = checkpoint(layer, hidden_BTD, rotary, attention_bias, None, use_reentrant=False)
            else:
                hidden_BTD = layer(hidden_BTD, rotary, attention_bias, past_key_values)
            states.append(hidden_BTD)
        hidden_BTD = states[-1] = self.norm(hidden_BTD)

        kept_BTD = hidden_BTD if logits_to_keep == 0 else last_positions(hidden_BTD, mask_BS, logits_to_keep)
        logits_BTV = self.lm_head(kept_BTD)
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        output = CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits_BTV, labels),
            logits=logits_BTV,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if output_hidden_states else None,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def save_activations_less(self) -> None:
        """Recompute the layers' activations in the backward pass instead of keeping them; the gradient stays the same."""
        self._recomputes = True

    def lower_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """States [B, T, D] below the first port, which no context can have touched.

        Equal to `hidden_states[config.port_every]` of `forward`, at the cost of those layers only.
        """
        hidden_BTD: Tensor = self.embed_tokens(input_ids)
        mask_BS = token_mask(attention_mask, hidden_BTD, 0)
        rotary = _rotary(token_positions(mask_BS, hidden_BTD, 0), self.config, hidden_BTD.dtype)
        attention_bias = _causal_mask(mask_BS, hidden_BTD.shape[1], 0, hidden_BTD.device)
        for layer in self.layers[: self.config.port_every]:
            hidden_BTD = layer(hidden_BTD, rotary, attention_bias, None)
        return hidden_BTD

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The inputs of one step of `generate`, with positions that always follow the mask.

        transformers numbers padding 0 and continues from the last column, which restarts a row that is padded on the right.
        """
        inputs: dict[str, Any] = GenerationMixin.prepare_inputs_for_generation(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]
        inputs.pop("position_ids", None)
        return inputs

    def _project_context(
        self, context_BCD: Tensor | None, context_mask_BC: Tensor | None, cache: Cache | None, hidden_BTD: Tensor
    ) -> dict[int, ContextLayer]:
        """Per port layer, the context's keys and values; empty where there is no context."""
        if context_BCD is None and context_mask_BC is not None:
            raise ValueError("Expected context_BCD beside context_mask_BC, found None. Pass both or neither.")
        if context_BCD is None:
            held = {} if cache is None else _held_layers(cache, self.config)
            return {index: layer for index, layer in held.items() if layer.source is not None}
        context_BCD, mask_BC = _checked_context(context_BCD, context_mask_BC, hidden_BTD)
        held = {} if cache is None else _context_layers(cache, self.config)
        contexts = {}
        for index in self.config.port_layers:
            layer = held.get(index) or ContextLayer()
            if layer.source is not context_BCD:
                port = self.ports[str(index)]
                assert isinstance(port, CrossAttentionPort)
                layer.hold(port.project(context_BCD, mask_BC), mask_BC, source=context_BCD)
            contexts[index] = layer
        return contexts


class DecoderLayer(nn.Module):
    """Pre-normalised self-attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: NexusStudentConfig, index: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, index)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | bool, cache: Cache | None
    ) -> Tensor:
        hidden_BTD = hidden_BTD + self.self_attn(self.input_norm(hidden_BTD), rotary, mask, cache)
        out_BTD: Tensor = hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))
        return out_BTD


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: NexusStudentConfig, index: int) -> None:
        super().__init__()
        self._index, self._head_dim = index, config.head_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = _projections(config)

    def forward(
        self, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | bool, cache: Cache | None
    ) -> Tensor:
        query_BHTd = _rotate(_split_heads(self.q_proj(hidden_BTD), self._head_dim), rotary)
        key_BGSd = _rotate(_split_heads(self.k_proj(hidden_BTD), self._head_dim), rotary)
        value_BGSd = _split_heads(self.v_proj(hidden_BTD), self._head_dim)
        if cache is not None:
            key_BGSd, value_BGSd = cache.update(key_BGSd, value_BGSd, self._index)
        out_BTD: Tensor = self.o_proj(_attend(query_BHTd, key_BGSd, value_BGSd, mask))
        return out_BTD


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 6."""

    def __init__(self, config: NexusStudentConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.down_proj(F.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD))
        return out_BTD


class CrossAttentionPort(nn.Module):
    """Adds tanh(gate) * attention(hidden -> context). The gate has one number per channel and starts at 0."""

    def __init__(self, config: NexusStudentConfig) -> None:
        super().__init__()
        self._head_dim = config.head_size
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Adapters are trained apart from the trunk, so their scale is not the trunk's.
        self.context_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = _projections(config)
        self.gate_D = nn.Parameter(torch.zeros(config.hidden_size))

    def project(self, context_BCD: Tensor, mask_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, C, d] of the context. What stands at masked places is never read, not even inf or nan."""
        normed_BCD = self.context_norm(context_BCD.masked_fill(~mask_BC[..., None], 0.0))
        return _split_heads(self.k_proj(normed_BCD), self._head_dim), _split_heads(
            self.v_proj(normed_BCD), self._head_dim
        )

    def forward(self, hidden_BTD: Tensor, context: ContextLayer) -> Tensor:
        keys_BGCd, values_BGCd, mask_BC = context.content
        query_BHTd = _split_heads(self.q_proj(self.norm(hidden_BTD)), self._head_dim)
        some_B11 = mask_BC.any(dim=-1)[:, None, None]
        # A softmax over nothing is nan; rows without context attend everywhere and are then zeroed.
        mask_B11C = (mask_BC[:, None, :] | ~some_B11)[:, None]
        read_BTD: Tensor = self.o_proj(_attend(query_BHTd, keys_BGCd, values_BGCd, mask_B11C))
        return hidden_BTD + self.gate_D.tanh() * read_BTD.masked_fill(~some_B11, 0.0)


class ContextLayer(DynamicLayer):
    """A port's projected context inside a transformers cache, behind the layers of self-attention.

    Living there, it follows the cache wherever a generation strategy reorders, repeats or selects rows. `crop` drops generated
    tokens and leaves the context alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mask_BC: Tensor | None = None
        self.source: Tensor | None = None
        """The tensor that the keys and values were projected from; None while nothing is held."""

    def hold(self, keys_and_values_BGCd: tuple[Tensor, Tensor], mask_BC: Tensor, *, source: Tensor) -> None:
        """Replace what is held."""
        self.lazy_initialization(*keys_and_values_BGCd)
        self.keys, self.values = keys_and_values_BGCd
        self.mask_BC, self.source = mask_BC, source

    @property
    def content(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, G, C, d] and mask [B, C] of what is held."""
        assert self.keys is not None
        assert self.values is not None
        assert self.mask_BC is not None
        return self.keys, self.values, self.mask_BC

    def reset(self) -> None:
        super().reset()
        self.mask_BC = self.source = None

    def crop(self, tokens_to_remove: int) -> None:
        del tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.mask_BC is not None:
            rows = torch.arange(self.mask_BC.shape[0], device=self.mask_BC.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.source is not None:
            self.keys, self.values, self.mask_BC = (part[indices] for part in self.content)


def _projections(config: NexusStudentConfig) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    width = config.hidden_size
    heads, key_value_heads = (
        config.num_attention_heads * config.head_size,
        config.num_key_value_heads * config.head_size,
    )
    return (
        nn.Linear(width, heads, bias=False),
        nn.Linear(width, key_value_heads, bias=False),
        nn.Linear(width, key_value_heads, bias=False),
        nn.Linear(heads, width, bias=False),
    )


def _split_heads(flat: Tensor, head_dim: int) -> Tensor:
    """[B, T, heads * d] -> [B, heads, T, d]."""
    return flat.view(*flat.shape[:-1], -1, head_dim).transpose(1, 2)


def _attend(query_BHTd: Tensor, key_BGSd: Tensor, value_BGSd: Tensor, mask: Tensor | bool) -> Tensor:
    """Attention output [B, T, H * d]. `mask` is bool, broadcastable to [B, H, T, S]; the value True means plain causal."""
    groups = query_BHTd.shape[1] // key_BGSd.shape[1]
    attended_BHTd = F.scaled_dot_product_attention(
        query_BHTd,
        key_BGSd.repeat_interleave(groups, dim=1),
        value_BGSd.repeat_interleave(groups, dim=1),
        attn_mask=mask if isinstance(mask, Tensor) else None,
        is_causal=mask is True,
    )
    return attended_BHTd.transpose(1, 2).flatten(2)


def require_one_way(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, labels: Tensor | None, logits_to_keep: int
) -> None:
    """Raise ValueError for arguments of a trunk's forward that contradict each other."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Expected exactly one of input_ids and inputs_embeds, found both or none. Pass one.")
    if labels is not None and logits_to_keep:
        raise ValueError(f"Labels score every position, found logits_to_keep={logits_to_keep}. Pass 0.")


def require_cached(cache_position: Tensor | None, num_past: int) -> None:
    """Raise ValueError unless the new tokens follow the `num_past` cached ones."""
    if cache_position is not None and int(cache_position[0]) != num_past:
        raise ValueError(
            f"Expected cache_position to begin at the {num_past} cached tokens, found {int(cache_position[0])}. "
            "Pass the cache that belongs to these tokens, or leave cache_position out."
        )


def token_mask(attention_mask: Tensor | None, hidden_BTD: Tensor, num_past: int) -> Tensor | None:
    """bool [B, S], or None when every token is real."""
    if attention_mask is None:
        return None
    expected = (hidden_BTD.shape[0], num_past + hidden_BTD.shape[1])
    if tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"Expected an attention_mask over cached and new tokens, {expected}, found {tuple(attention_mask.shape)}. "
            "Extend it by one column per token."
        )
    return attention_mask.to(device=hidden_BTD.device, dtype=torch.bool)


def token_positions(mask_BS: Tensor | None, hidden_BTD: Tensor, num_past: int) -> Tensor:
    """int64 [B or 1, T]: how many real tokens came before; padding before the first real token stands at 0."""
    num_new = hidden_BTD.shape[1]
    if mask_BS is None:
        return torch.arange(num_past, num_past + num_new, device=hidden_BTD.device)[None]
    return (mask_BS.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -num_new:]


def _rotary(position_ids: Tensor, config: NexusStudentConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, 1, T, d]. Angles need float32 at least: bfloat16 cannot tell position 257 from 258."""
    precise = torch.promote_types(dtype, torch.float32)
    pair = torch.arange(0, config.head_size, 2, dtype=precise, device=position_ids.device) / config.head_size
    angles = position_ids[:, None, :, None].to(precise) * config.rope_theta**-pair
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(heads_BHTd: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + d/2) by their angles."""
    cos, sin = rotary
    first, second = heads_BHTd.chunk(2, dim=-1)
    return heads_BHTd * cos + torch.cat((-second, first), dim=-1) * sin


def _causal_mask(mask_BS: Tensor | None, num_new: int, num_past: int, device: torch.device) -> Tensor | bool:
    """bool [B or 1, 1, T, S], or True for plain causal attention over unpadded new tokens."""
    if mask_BS is None and num_past == 0:
        return True
    own_T = torch.arange(num_past, num_past + num_new, device=device)
    all_S = torch.arange(num_past + num_new, device=device)
    causal_TS = all_S[None] <= own_T[:, None]
    if mask_BS is None:
        return causal_TS[None, None]
    # Padding attends to itself: a row of nothing would be nan.
    return ((causal_TS & mask_BS[:, None, :]) | (all_S[None] == own_T[:, None]))[:, None]


def last_positions(hidden_BTD: Tensor, mask_BS: Tensor | None, count: int) -> Tensor:
    """[B, count, D]: the last `count` positions of each row up to its last real token."""
    num_new = hidden_BTD.shape[1]
    if mask_BS is None:
        return hidden_BTD[:, -count:]
    trailing_B = mask_BS[:, -num_new:].flip(-1).long().argmax(dim=-1)
    back_N = torch.arange(min(count, num_new) - 1, -1, -1, device=hidden_BTD.device)
    places_BN = (num_new - 1 - trailing_B[:, None] - back_N).clamp(min=0)
    return hidden_BTD.gather(1, places_BN[..., None].expand(-1, -1, hidden_BTD.shape[-1]))


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy, nats per scored label. Zero, still attached to the graph, when no label is scored."""
    targets = labels_BT[:, 1:].to(logits_BTV.device)
    total = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).to(torch.promote_types(logits_BTV.dtype, torch.float32)),
        targets.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
    return total / (targets != IGNORED_LABEL).sum().clamp(min=1)


def _checked_context(context_BCD: Tensor, context_mask_BC: Tensor | None, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    batch, width = hidden_BTD.shape[0], hidden_BTD.shape[2]
    if context_BCD.ndim != 3 or context_BCD.shape[0] != batch or context_BCD.shape[2] != width:
        raise ValueError(
            f"Expected context_BCD of shape ({batch}, C, {width}), found {tuple(context_BCD.shape)}. "
            "Give one context per row, in the trunk's width."
        )
    if context_mask_BC is None:
        return context_BCD, torch.ones(context_BCD.shape[:2], dtype=torch.bool, device=context_BCD.device)
    if context_mask_BC.shape != context_BCD.shape[:2]:
        raise ValueError(
            f"Expected context_mask_BC of shape {tuple(context_BCD.shape[:2])}, found {tuple(context_mask_BC.shape)}. "
            "Give one value per context token."
        )
    return context_BCD, context_mask_BC.bool()


def _context_layers(cache: Cache, config: NexusStudentConfig) -> dict[int, ContextLayer]:
    """The cache's layers that hold the ports' contexts, appended on first use behind those of self-attention."""
    # A cache made without a configuration grows its layers on demand.
    while len(cache.layers) < config.num_hidden_layers:
        cache.layers.append(DynamicLayer())
    while len(cache.layers) < config.num_hidden_layers + len(config.port_layers):
        cache.layers.append(ContextLayer())
    return _held_layers(cache, config)


def _held_layers(cache: Cache, config: NexusStudentConfig) -> dict[int, ContextLayer]:
    """Per port layer, the cache's layer for its context; empty before the first context."""
    layers = cache.layers[config.num_hidden_layers :]
    return {
        index: layer
        for index, layer in zip(config.port_layers, layers, strict=False)
        if isinstance(layer, ContextLayer)
    }
