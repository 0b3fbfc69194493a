"""NF4 for a whole model: what will be quantised, what was, and how far the stored weights are from the originals.

NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3) stores blocks of 64 weights as indices into 16 quantiles of
a normal distribution and one scale; double quantisation stores the scales in 8 bits. bitsandbytes does the arithmetic. This module
holds what it and transformers leave to the caller:

* transformers forgets its own protection of `lm_head` when it is given a skip list (issue 45674), and never protects a
  classification head;
* bitsandbytes is silently wrong on CPUs when the last dimension is no multiple of its block (weight error .39 at 48 columns, .09
  at 64), so such matrices are refused and every error is measured;
* a router decides by small differences between few numbers, and nothing protects those that are an `nn.Linear`;
* experts fused into 3-D parameters are no `nn.Linear` and stay in floating point without a word: experts.py packs them, and the
  quantised share is gated;
* on CPUs with AVX-512 BF16, bitsandbytes repacks the weights in the first forward, drops double quantisation and computes in
  bfloat16 whatever was asked: results would then depend on the machine and the stored weights would change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from nexus.errors import TowerLoadError
from nexus.towers.experts import STACKS, NF4Config, NF4Experts, is_fused_experts, relative_error, why_not_packed
from nexus.towers.filling import BLOCK, MAX_WEIGHT_ERROR, dequantised, stored_bits
from nexus.towers.gptq import GptqLinear

VERIFIED_PARAMETERS = 2 * 10**9
"""Above this many quantised parameters, an evenly spaced choice of matrices is compared with the originals, and at least one of
every shape: reading all of a 30B checkpoint twice would double its loading time. A wrong kernel fails on every matrix of a shape."""

ROUTER_NAMES = {"router", "shared_expert_gate"}
"""Parts of the path to a router in the models of transformers whose experts are not a module of that name."""


@dataclass(frozen=True)
class ModuleCoverage:
    """One module that holds parameters of its own."""

    name: str
    parameters: int
    quantised: bool
    stored_bits: int
    weight_error: float | None
    """Relative Frobenius error of the stored matrix; None for modules in floating point and for matrices outside the sample."""
    reason: str | None
    """Why it was left in floating point."""


@dataclass(frozen=True)
class CoverageReport:
    """How much of a model is stored in NF4. Tied parameters count once."""

    total_params: int
    quantised_params: int
    share: float
    """quantised_params / total_params."""
    bits_per_param: float
    """Stored bits per quantised parameter, scales and tables included; 0 when none is quantised."""
    max_weight_error: float
    """Largest relative error of a quantised matrix; 0 when none is quantised."""
    quantisable_share: float
    """Share of the parameters in matrices and stacks of experts that NF4 could hold, whatever the policy says."""
    stored_bytes: int
    """What the parameters take, quantised or not."""
    modules: tuple[ModuleCoverage, ...]
    already: str | None = None
    """What its authors had quantised it with; its matrices are left as they are, and all that is said of NF4 is said of that."""

    @property
    def method(self) -> str:
        """How the parameters are stored that `share` counts."""
        return "in NF4" if self.already is None else f"already quantised ({self.already})"

    @property
    def left_float(self) -> dict[str, str]:
        """Name -> reason, of every module in floating point."""
        return {module.name: module.reason for module in self.modules if module.reason is not None}


@dataclass(frozen=True)
class QuantisationPlan:
    """Decided on the architecture alone, before a weight is read."""

    keep: tuple[str, ...]
    """Name patterns of the modules that stay in floating point; what transformers is told to skip."""
    matrices: tuple[str, ...]
    """Names of the modules whose weight is quantised."""
    experts: tuple[str, ...] = ()
    """Names of the fused experts whose stacks are quantised."""
    routers: tuple[str, ...] = ()
    """Names of the linear routers of experts, which stay in floating point."""


NOTHING_QUANTISED = QuantisationPlan((), ())
"""The plan of a model that is loaded in floating point."""


def plan_quantisation(
    skeleton: nn.Module, *, teacher_id: str, skip_modules: Sequence[str], min_coverage: float
) -> QuantisationPlan:
    """Decide what is quantised, and refuse what cannot be quantised as the policy demands.

    Args:
        skeleton: the model in floating point; may lie on the meta device. The output heads of a model of transformers are kept in
            floating point, and so are the routers of all models; other models name their heads in `skip_modules`.
        skip_modules: kept in floating point besides output heads and routers.
        min_coverage: smallest share of parameters in NF4.

    Raises:
        TowerLoadError: a skip name that matches nothing, a matrix whose rows are no multiple of 64, experts of a form that cannot be
            packed, or a share below `min_coverage`.
    """
    linears: dict[str, Any] = {
        name: module
        for name, module in skeleton.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }
    experts = [name for name, module in skeleton.named_modules() if is_fused_experts(module)]
    idle = [skip for skip in skip_modules if all(should_convert_module(name, [skip]) for name in (*linears, *experts))]
    if idle:
        raise TowerLoadError(
            f"Expected the skip_modules of teacher {teacher_id!r} to name linear modules, found that {idle[0]!r} matches none. "
            f"Give the path from the root of {type(skeleton).__name__}, such as {next(iter(linears), '')!r}."
        )
    # Sorted, because transformers collects them in a set, whose order differs between processes.
    heads: set[str] = set()
    if isinstance(skeleton, PreTrainedModel):
        heads = {*get_keys_to_not_convert(skeleton), *classification_heads(skeleton)}
    in_float = getattr(skeleton, "_keep_in_fp32_modules", None) or ()
    routers = router_names(skeleton)
    # One pattern for all layers, since every pattern is tried on every module.
    routed = {re.sub(r"\.\d+\.", r".\\d+.", name) for name in routers}
    keep = sorted({*heads, *skip_modules, *in_float, *routed})
    matrices = tuple(name for name in linears if should_convert_module(name, keep))
    reached = tuple(name for name in experts if should_convert_module(name, keep))
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    quantised = sum(linears[name].weight.numel() for name in matrices) + sum(
        getattr(skeleton.get_submodule(name), stack).numel() for name in reached for stack in STACKS
    )
    for name in reached:
        hindrance = why_not_packed(skeleton.get_submodule(name))
        if hindrance is not None:
            raise TowerLoadError(
                f"Expected experts that NF4 can hold in teacher {teacher_id!r}, found {name!r}: {hindrance}. Add it to the teacher's "
                "skip_modules."
            )
    for name in matrices:
        # GPT-2's Conv1D keeps its matrix transposed.
        columns = linears[name].weight.shape[0 if isinstance(linears[name], Conv1D) else 1]
        if columns % BLOCK:
            raise TowerLoadError(
                f"Expected the rows of every quantised matrix to be a multiple of {BLOCK} long, found {columns} in {name!r} of "
                f"teacher {teacher_id!r}, which bitsandbytes stores wrongly on CPUs. Add it to the teacher's skip_modules."
            )
    _require_share(quantised, total, min_coverage, _largest_left(skeleton, {*matrices, *reached}), teacher_id)
    return QuantisationPlan(tuple(keep), matrices, reached, routers)


def require_quantised(
    skeleton: nn.Module, *, teacher_id: str, skip_modules: Sequence[str], min_coverage: float
) -> None:
    """Hold a checkpoint that its authors quantised against the policy of its teacher.

    Raises:
        TowerLoadError: modules to skip, which nothing would, or a share below `min_coverage`.
    """
    if skip_modules:
        raise TowerLoadError(
            f"Expected no skip_modules for teacher {teacher_id!r}, whose authors quantised it already, found "
            f"{', '.join(skip_modules)}. Remove them."
        )
    packed = {name: module for name, module in skeleton.named_modules() if isinstance(module, GptqLinear)}
    quantised = sum(module.in_features * module.out_features for module in packed.values())
    total = quantised + sum(parameter.numel() for parameter in skeleton.parameters())
    _require_share(quantised, total, min_coverage, _largest_left(skeleton, set(packed)), teacher_id)


def quantisation_config(
    plan: QuantisationPlan, compute_dtype: torch.dtype, *, own_quantiser: bool = False
) -> BitsAndBytesConfig:
    """What `from_pretrained` needs to follow `plan`.

    Args:
        own_quantiser: quantise by experts.py's, which measures each matrix as it packs it. A plan with experts always does.
    """
    # Without experts the plain one, which any installation of transformers reads back from a saved config.json.
    config_class = NF4Config if plan.experts or own_quantiser else BitsAndBytesConfig
    config: BitsAndBytesConfig = config_class(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=list(plan.keep),
    )
    return config


def prepare_modules(
    skeleton: PreTrainedModel, plan: QuantisationPlan, compute_dtype: torch.dtype, *, own_quantiser: bool
) -> None:
    """Give a model on meta, in place, the modules and settings that `from_pretrained` gives one that it quantises by `plan`."""
    parts = (getattr(skeleton.config, name, None) for name in skeleton.config.sub_configs)
    for config in filter(None, (skeleton.config, *parts)):
        config.dtype = compute_dtype
    quantiser = AutoHfQuantizer.from_config(
        quantisation_config(plan, compute_dtype, own_quantiser=own_quantiser), pre_quantized=False
    )
    quantiser.preprocess_model(model=skeleton, dtype=compute_dtype, device_map=None)
    skeleton.hf_quantizer = quantiser
    quantiser.postprocess_model(skeleton)


def freeze(model: nn.Module) -> None:
    """Evaluation mode, no gradients, and stored NF4 weights that no forward repacks (see the module's docstring)."""
    model.eval()
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def measure_coverage(
    model: nn.Module,
    plan: QuantisationPlan,
    original: Callable[[str], Tensor | None],
    *,
    teacher_id: str,
    verified_parameters: int = VERIFIED_PARAMETERS,
) -> CoverageReport:
    """Count what a loaded model stores, and compare its matrices with the originals, one at a time.

    Args:
        model: loaded by `quantisation_config(plan)`.
        original: name of a parameter -> its floating-point original, as the checkpoint holds it; None for one that was merged or
            cut while it was loaded, whose error was measured when it was packed.
        verified_parameters: above this many, only a choice of matrices is compared.

    Raises:
        TowerLoadError: a matrix of the plan is not in NF4, or its relative error reaches MAX_WEIGHT_ERROR.
    """
    planned = set(plan.matrices)
    # The module stores packed bytes; its quantisation state knows the shape. Without one the matrix is reported below.
    states = {name: getattr(model.get_submodule(name).weight, "quant_state", None) for name in plan.matrices}
    verified = _sample(
        {name: tuple(state.shape) for name, state in states.items() if state is not None}, verified_parameters
    )
    modules: list[ModuleCoverage] = []
    seen: set[int] = set()
    already = None
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        if name in plan.experts:
            modules.extend(_measure_experts(name, module, teacher_id))
            continue
        if isinstance(module, GptqLinear):
            size = module.in_features * module.out_features
            modules.append(ModuleCoverage(name, size, True, module.stored_bits(), None, None))
            already = str(module.packed.format)
        if name in planned:
            state = states[name]
            if state is None:
                raise TowerLoadError(
                    f"Expected {name!r} of teacher {teacher_id!r} in NF4, found it in floating point. Report this."
                )
            error = _weight_error(name, module, original, teacher_id) if name in verified else None
            if error is not None:
                _refuse_far(error, name, teacher_id)
            size = math.prod(state.shape)
            modules.append(ModuleCoverage(name, size, True, stored_bits(module), error, None))
            own = [p for p in own if p is not module.weight]
        if own:
            size = sum(p.numel() for p in own)
            bits = sum(p.numel() * p.element_size() * 8 for p in own)
            is_packed = name in planned or isinstance(module, GptqLinear)
            label = f"{name} (bias)" if is_packed else name
            modules.append(ModuleCoverage(label, size, False, bits, None, _reason(name, module, plan)))
    total = sum(module.parameters for module in modules)
    matrices = [module for module in modules if module.quantised]
    quantised = sum(module.parameters for module in matrices)
    return CoverageReport(
        total_params=total,
        quantised_params=quantised,
        share=quantised / total,
        bits_per_param=sum(module.stored_bits for module in matrices) / max(1, quantised),
        max_weight_error=max((m.weight_error for m in matrices if m.weight_error is not None), default=0.0),
        quantisable_share=(quantised + _quantisable_left(model, {module.name for module in matrices})) / total,
        stored_bytes=sum(module.stored_bits for module in modules) // 8,
        modules=tuple(modules),
        already=already,
    )


def merge_coverage(reports: Mapping[str, CoverageReport]) -> CoverageReport:
    """One report over the parts of a teacher; module names begin with the part's."""
    total = sum(report.total_params for report in reports.values())
    quantised = sum(report.quantised_params for report in reports.values())
    modules = tuple(
        replace(module, name=f"{part}.{module.name}") for part, report in reports.items() for module in report.modules
    )
    return CoverageReport(
        total_params=total,
        quantised_params=quantised,
        share=quantised / total,
        bits_per_param=sum(module.stored_bits for module in modules if module.quantised) / max(1, quantised),
        max_weight_error=max(report.max_weight_error for report in reports.values()),
        quantisable_share=sum(report.quantisable_share * report.total_params for report in reports.values()) / total,
        stored_bytes=sum(report.stored_bytes for report in reports.values()),
        modules=modules,
    )


def classification_heads(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of classification heads: linear children of the model itself that give one number per label."""
    if "Classification" not in type(model).__name__:
        return ()
    return tuple(
        name
        for name, child in model.named_children()
        if isinstance(child, nn.Linear) and child.out_features == model.config.num_labels
    )


def router_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the linear modules that choose experts, or weigh a shared one.

    By their place: beside the experts, with an output for each of them or a single one. By their name: where a model keeps its
    experts in another form.
    """
    found = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ROUTER_NAMES & set(name.split("."))
    }
    for prefix, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        count = len(experts) if isinstance(experts, nn.ModuleList) else getattr(experts, "num_experts", None)
        inside = {id(part) for part in experts.modules()}
        found |= {
            f"{prefix}.{name}"
            for name, part in module.named_modules()
            if isinstance(part, nn.Linear) and id(part) not in inside and part.out_features in (1, count)
        }
    return tuple(name for name, _ in model.named_modules() if name in found)


def _measure_experts(name: str, module: nn.Module, teacher_id: str) -> list[ModuleCoverage]:
    if not isinstance(module, NF4Experts):
        raise TowerLoadError(
            f"Expected {name!r} of teacher {teacher_id!r} in NF4, found it in floating point. Report this."
        )
    measured = []
    for stack, (rows, columns) in module.shapes.items():
        # A quantised cache has been compared with the originals when it was written.
        error = module.weight_errors.get(stack)
        if error is not None:
            _refuse_far(error, f"{name}.{stack}", teacher_id)
        size = module.num_experts * rows * columns
        measured.append(ModuleCoverage(f"{name}.{stack}", size, True, module.stored_bits(stack), error, None))
    return measured


def _quantisable_left(model: nn.Module, quantised: set[str]) -> int:
    """Parameters that were left in floating point although NF4 could hold them; tied ones count once."""
    left: dict[int, int] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name not in quantised and module.in_features % BLOCK == 0:
            left[id(module.weight)] = module.weight.numel()
        elif is_fused_experts(module) and why_not_packed(module) is None:
            left.update((id(p), p.numel()) for p in (getattr(module, stack) for stack in STACKS))
    return sum(left.values())


def _require_share(quantised: int, total: int, min_coverage: float, left: str, teacher_id: str) -> None:
    if quantised < min_coverage * total:
        raise TowerLoadError(
            f"Expected NF4 for at least {min_coverage:.0%} of the parameters of teacher {teacher_id!r}, found "
            f"{quantised / total:.1%} ({quantised:,} of {total:,}); left in floating point: {left}. Lower its min_coverage if they "
            "may stay so."
        )


def _refuse_far(error: float, name: str, teacher_id: str) -> None:
    if not error < MAX_WEIGHT_ERROR:
        raise TowerLoadError(
            f"Expected a relative NF4 error below {MAX_WEIGHT_ERROR} in every matrix, found {error:.3f} in {name!r} of "
            f"teacher {teacher_id!r}. Add it to the teacher's skip_modules."
        )


def _largest_left(skeleton: nn.Module, quantised: set[str]) -> str:
    """The three modules in floating point that hold most, largest first."""
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for name, module in skeleton.named_modules()
        if name not in quantised
    }
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:3]
    return ", ".join(f"{name} ({sizes[name]:,})" for name in largest)


def _sample(shapes: dict[str, tuple[int, ...]], verified_parameters: int) -> set[str]:
    """The matrices that are compared with their originals: all, or an evenly spaced choice that has every shape."""
    total = sum(math.prod(shape) for shape in shapes.values())
    stride = max(1, math.ceil(total / verified_parameters))
    first_of_shape = {shape: name for name, shape in reversed(shapes.items())}
    return {*list(shapes)[::stride], *first_of_shape.values()}


def _weight_error(name: str, module: Any, original: Callable[[str], Tensor | None], teacher_id: str) -> float:
    reference = original(f"{name}.weight")
    if reference is None:
        error: float | None = getattr(module, "packing_error", None)
        if error is None:
            raise TowerLoadError(
                f"Expected the original of {name!r} of teacher {teacher_id!r} to compare NF4 with, found no tensor that maps to it "
                "alone. Add it to the teacher's skip_modules."
            )
        return error
    if issubclass(module.source_cls, Conv1D):
        reference = reference.T
    return relative_error(dequantised(module), reference.to(module.weight.device))


def _reason(name: str, module: nn.Module, plan: QuantisationPlan) -> str:
    if name in plan.matrices or isinstance(module, GptqLinear):
        return "bias"
    if name in plan.routers:
        return "router"
    if not isinstance(module, nn.Linear | Conv1D):
        return f"{type(module).__name__} is not linear"
    return "subclass of Linear" if should_convert_module(name, list(plan.keep)) else "output head or skipped by policy"
