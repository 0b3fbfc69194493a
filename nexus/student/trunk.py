"""A student's trunk taken from a pretrained causal language model of transformers: the model's own layers, read through our ports.

The model runs its own forward pass (masks, rotary positions, caches and norms stay its own); before the layers that a port precedes,
a hook adds what the port reads from the context. The pretrained weights are frozen. What trains is the ports and, in every linear map
of the layers, a low-rank update W + (alpha / rank) B A (LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1; by PEFT), which
`merge_lora` adds to W before the student is exported, so that it runs without PEFT.

Letters: B batch, T new tokens, S all tokens so far, C context tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from nexus.errors import ConfigError
from nexus.student.config import NexusStudentConfig, PretrainedCoreConfig
from nexus.student.core import (
    ContextLayer,
    CrossAttentionPort,
    NexusStudentCore,
    last_positions,
    next_token_loss,
    require_cached,
    require_one_way,
    token_mask,
    token_positions,
)

LORA_NAME = "student"
"""PEFT's name of the one adapter."""
HEAD_TOLERANCE = 1e-3
"""Relative difference between a model's logits and its output layer on its last states; beyond it, something stands between them."""


_INNER_SIZES = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
"""What configurations call the width of their feed-forward layers."""


class _LowerStatesReachedError(Exception):
    """Ends a forward pass at the first port."""


class PretrainedCore(NexusStudentCore):
    """The trunk of `NexusStudentCore`, with the layers of another causal language model."""

    config: PretrainedCoreConfig
    config_class = PretrainedCoreConfig
    # The pretrained model ties its own.
    _tied_weights_keys = {}  # noqa: RUF012
    supports_gradient_checkpointing = True

    def __init__(self, config: PretrainedCoreConfig) -> None:
        # Importing the Auto classes registers this module's with them (`nexus.__init__`), so nothing above may import them.
        from transformers import AutoModelForCausalLM

        PreTrainedModel.__init__(self, config)
        self.trunk: PreTrainedModel = AutoModelForCausalLM.from_config(trunk_config(config))
        self.ports = nn.ModuleDict({str(index): CrossAttentionPort(config) for index in config.port_layers})
        self._contexts: dict[int, ContextLayer] = {}
        """What the ports of the forward pass in progress read."""
        self._lower: Tensor | None = None
        """States at the first port, while `lower_states` runs."""
        self._wants_lower = False
        self._hook_ports()
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def lm_head(self) -> nn.Module:
        """The map from last states to logits."""
        head: nn.Module = self.trunk.get_output_embeddings()
        return head

    @property
    def embed_tokens(self) -> nn.Module:  # type: ignore[override]
        """The map from ids to the first states."""
        embeddings: nn.Module = self.trunk.get_input_embeddings()
        return embeddings

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The decoder's layers."""
        from nexus.profiling.layers import find_blocks

        return nn.ModuleList(find_blocks(self.trunk).blocks)

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
        """As `NexusStudentCore.forward`."""
        require_one_way(input_ids, inputs_embeds, labels, logits_to_keep)
        use_cache = (self.config.use_cache and labels is None) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.trunk.config)
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        require_cached(cache_position, num_past)
        like_BTD = self._shape(input_ids if input_ids is not None else inputs_embeds)
        mask_BS = token_mask(attention_mask, like_BTD, num_past)
        if position_ids is None:
            position_ids = token_positions(mask_BS, like_BTD, num_past)
        self._contexts = self._project_context(context_BCD, context_mask_BC, past_key_values, like_BTD)
        decoded = self.trunk.base_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=None if mask_BS is None else mask_BS.long(),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=bool(output_hidden_states),
        )
        # A factor behind the output layer is one in front of it; who applies `lm_head` to the last states then has the logits.
        hidden_BTD = decoded.last_hidden_state * _logit_factor(self.trunk)
        kept_BTD = hidden_BTD if logits_to_keep == 0 else last_positions(hidden_BTD, mask_BS, logits_to_keep)
        logits_BTV = self.lm_head(kept_BTD)
        output = CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits_BTV, labels),
            logits=logits_BTV,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*decoded.hidden_states[:-1], hidden_BTD) if output_hidden_states else None,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def lower_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """States [B, T, D] below the first port, at the cost of the layers before it."""
        like_BTD = self._shape(input_ids)
        mask_BS = token_mask(attention_mask, like_BTD, 0)
        self._wants_lower = True
        try:
            self.trunk.base_model(
                input_ids=input_ids,
                attention_mask=None if mask_BS is None else mask_BS.long(),
                position_ids=token_positions(mask_BS, like_BTD, 0),
                use_cache=False,
            )
        except _LowerStatesReachedError:
            pass
        finally:
            self._wants_lower = False
        lower, self._lower = self._lower, None
        assert lower is not None
        return lower

    def save_activations_less(self) -> None:
        """Recompute the layers' activations in the backward pass instead of keeping them."""
        self.trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in self.trunk.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                setattr(module, "_gradient_checkpointing_func", self._recomputed)  # noqa: B010  # modules type their attributes

    def _recomputed(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function` under checkpointing; the recomputation reads the contexts that this forward pass had."""
        contexts = self._contexts

        def again(*inputs: Any) -> Any:
            present, self._contexts = self._contexts, contexts
            try:
                return function(*inputs)
            finally:
                self._contexts = present

        return checkpoint(again, *args, use_reentrant=False)

    def _shape(self, inputs: Tensor | None) -> Tensor:
        """[B, T, D] without memory, for the functions that read shape and device off the states."""
        assert inputs is not None
        return torch.zeros((), device=inputs.device).expand(*inputs.shape[:2], self.config.hidden_size)

    def _hook_ports(self) -> None:
        blocks = self.layers
        for index in self.config.port_layers:
            blocks[index].register_forward_pre_hook(_PortHook(self, index), with_kwargs=True)


class _PortHook:
    """Runs a port on what goes into its layer."""

    def __init__(self, core: PretrainedCore, index: int) -> None:
        # In a list, or the core would become a part of its own layers.
        self._core = [core]
        self._index = index

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        (core,) = self._core
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        if core._wants_lower and self._index == core.config.port_every:
            core._lower = hidden_BTD
            raise _LowerStatesReachedError
        if self._index not in core._contexts:
            return None
        read_BTD = core.ports[str(self._index)](hidden_BTD, core._contexts[self._index])
        return ((read_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": read_BTD})


def trunk_config(config: PretrainedCoreConfig) -> Any:
    """The configuration of the pretrained model that `config` carries."""
    from transformers import AutoConfig

    values = dict(config.trunk)
    model = AutoConfig.for_model(values.pop("model_type"), **values)
    model.get_text_config(decoder=True).vocab_size = config.vocab_size
    return model


def pretrained_core_config(folder: Path, *, port_every: int) -> PretrainedCoreConfig:
    """The configuration of a trunk made of the checkpoint in `folder`; no weight is read.

    Raises:
        ConfigError: no such checkpoint, or none of a causal language model with layers to put ports between.
    """
    from transformers import AutoConfig

    try:
        model = AutoConfig.from_pretrained(folder, local_files_only=True)
        text = model.get_text_config(decoder=True)
        _refuse_unfit(text, folder)
        return PretrainedCoreConfig(
            trunk={**model.to_diff_dict(), "model_type": model.model_type},
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            # It goes by several names, and four widths where a model does not say. Nothing of ours is built from it.
            intermediate_size=next(
                (size for name in _INNER_SIZES if (size := getattr(text, name, None))), 4 * text.hidden_size
            ),
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None),
            rms_norm_eps=getattr(text, "rms_norm_eps", 1.0e-6),
            max_position_embeddings=text.max_position_embeddings,
            tie_word_embeddings=bool(text.tie_word_embeddings),
            port_every=port_every,
        )
    except ConfigError:
        raise
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"Expected a causal language model of transformers in student.trunk, found {folder}: "
            f"{' '.join(str(error).split())}. Name the folder of its config.json and safetensors."
        ) from error


def load_pretrained(core: PretrainedCore, folder: Path) -> None:
    """Read the weights of the trunk from `folder`, freeze them, and give the model as many output rows as `core` declares.

    Raises:
        ConfigError: a checkpoint that does not load, or a model whose logits are not its output layer's on its last states.
    """
    from transformers import AutoModelForCausalLM

    try:
        trunk = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"Expected the weights of a causal language model in student.trunk, found {folder}: "
            f"{' '.join(str(error).split())[:300]}. Fetch the checkpoint again."
        ) from error
    _check_head(trunk, folder)
    head = trunk.get_output_embeddings()
    if core.config.vocab_size != head.weight.shape[0]:
        trunk.resize_token_embeddings(core.config.vocab_size)
    core.trunk = trunk.requires_grad_(False)
    core._hook_ports()


def add_lora(core: PretrainedCore, *, rank: int, alpha: int) -> None:
    """Put a low-rank update, 0 at first, on every linear map of the trunk's layers; only the updates and the ports then train."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    core.trunk.requires_grad_(False)
    names = {id(module): name for name, module in core.trunk.named_modules()}
    # GPT-2's linear maps keep their weights the other way round, under this misleading name.
    maps = [module for block in core.layers for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))]
    turned = bool(maps) and all(isinstance(module, Conv1D) for module in maps)
    targets = [names[id(module)] for module in maps]
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=turned),
        core.trunk,
        adapter_name=LORA_NAME,
    )


def merge_lora(core: PretrainedCore) -> None:
    """Add the updates to the weights that they belong to and take them out: the model is then one of transformers alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(core.trunk.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(core.trunk.get_submodule(parent), leaf, module.get_base_layer())


def build_core(config: NexusStudentConfig) -> NexusStudentCore:
    """The trunk that `config` describes, freshly initialised."""
    return PretrainedCore(config) if isinstance(config, PretrainedCoreConfig) else NexusStudentCore(config)


def _check_head(trunk: PreTrainedModel, folder: Path) -> None:
    """The losses apply the output layer themselves: soft caps or scales behind it would be lost."""
    ids_1T = torch.arange(min(8, trunk.config.get_text_config(decoder=True).vocab_size))[None]
    with torch.no_grad():
        states = trunk.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state
        expected = trunk(input_ids=ids_1T, use_cache=False).logits
        found = trunk.get_output_embeddings()(states * _logit_factor(trunk))
    if float((found - expected).norm()) > HEAD_TOLERANCE * float(expected.norm()):
        raise ConfigError(
            f"Expected a trunk whose logits are its output layer's, found {type(trunk).__name__} in {folder}, which scales or caps "
            "them (final_logit_softcapping is a cap). Choose a decoder without one for student.trunk, such as Qwen3 or Llama."
        )


def _refuse_unfit(text: Any, folder: Path) -> None:
    """Raise ConfigError for layers that keep no keys and values."""
    try:
        DynamicCache(config=text).get_seq_length()
    except ValueError:
        raise ConfigError(
            f"Expected a trunk with attention layers, found {text.model_type} in {folder}, which is recurrent: it keeps no keys "
            "and values of an answer so far. Choose a decoder with attention for student.trunk, such as Qwen3 or Llama."
        ) from None


def _logit_factor(trunk: PreTrainedModel) -> float:
    """What the model multiplies its output layer's results by (Cohere, Granite)."""
    text = trunk.config.get_text_config(decoder=True)
    # MPT has the first name and None.
    return float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
