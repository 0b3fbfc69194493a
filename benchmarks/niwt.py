"""How much faster NIWT profiles than the usual loops, and what memory it takes; every baseline is measured in the same run.

    python benchmarks/niwt.py [--json] [--threads N] [--repeats N] [--device cpu|cuda] [--parts generation scoring memory cost]

CPU: a 12-layer Qwen3 of width 256 in NF4, 16 samples, prompt 32, 32 new tokens. GPU (when there is one): a Qwen3 of 1.7 billion
parameters in NF4, 128 new tokens. Weights are random, so ablations part from the clean model within a few tokens: the hard case.

* Generation: `ablated_generations` against `generate` for one (ablation, sample) at a time, and against one `generate` of all
  samples per ablation. Tokens must be identical. If the first loop would take more than `--sequential-seconds`, fewer samples of
  it are run, and its time is scaled to all; the printed line says so. Twice on CPUs with AVX-512 BF16: as nexus loads teachers
  (products in the model's dtype), and with the kernel that bitsandbytes takes there if it is let, which computes in bfloat16.
  "Products" are the matrix products that no exact stacked decode can leave out, on weights that are dequantised already: what is
  above them is dequantising, attention, normalisation and Python; where they end, no ratio can be better.
* Scoring: `delta_nll` against one forward per ablation (strategy "brute"), and its error against float64.
* Cost: the figures of `nexus.profiling.cost`, measured, and whether the strategy that it takes for the cheapest is.
* Memory: peak of a profile and of a generation against one plain forward or `generate` of the clean model over as many rows as
  were live at once, and of 10 times as many samples. On a CPU each is a process of its own, and the peak is that of resident
  memory (Linux); on a GPU it is the allocator's.

Timings are medians over interleaved repeats; CPU seconds stand beside wall-clock seconds because other programs disturb them less.
Ends with exit code 1 when tokens differ or an error is above its bound, whatever the timings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch allocates: without it glibc returns every large tensor to the kernel, and both sides of a ratio measure page faults.
if os.environ.get("NIWT_BENCHMARK") is None and __name__ == "__main__":
    _THRESHOLDS = {"MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824"}
    os.execve(
        sys.executable,
        [sys.executable, *sys.argv],
        {**os.environ, **_THRESHOLDS, "NIWT_BENCHMARK": "1", "HF_HUB_OFFLINE": "1"},
    )

import torch
import torch.nn.functional as F
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from nexus.profiling.cost import MACHINES
from nexus.profiling.niwt import NIWTProfiler, ProfileBatch
from nexus.towers.nf4 import freeze

MAX_DELTA_ERROR = 1e-5
# Samples at once where memory is measured, so that the number of live rows is the same for any number of samples.
MICRO_BATCH_SIZE = 4
# What the speed and the memory of a profile are meant to be.
TARGETS = {
    "generation_over_sequential": 40.0,
    "generation_over_batched": 3.5,
    "scoring_over_brute": 1.5,
    "profile_memory": 1.25,
    "generation_memory": 1.25,
    "memory_of_ten_times_the_rows": 1.05,
}
GPU_TARGETS = {**TARGETS, "generation_over_sequential": 100.0}
# Marks what was measured with the kernel that nexus does not let bitsandbytes take.
OTHER_KERNEL = "_bf16_kernel"


@dataclass(frozen=True)
class Setting:
    """One reference model and its work."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: str
    num_samples: int
    prompt_length: int
    num_new_tokens: int


CPU_SETTING = Setting(12, 256, 768, 4, 2, 64, 4096, "float32", 16, 32, 32)
GPU_SETTING = Setting(28, 2048, 6144, 16, 8, 128, 151_936, "bfloat16", 16, 32, 128)


def build(setting: Setting, device: str, *, quantised: bool = True, as_loaded: bool = True) -> PreTrainedModel:
    """Return a randomly initialised Qwen3; the same weights every time.

    Args:
        as_loaded: compute as nexus makes its teachers compute; False leaves the kernel to bitsandbytes.
    """
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=setting.hidden_size,
        intermediate_size=setting.intermediate_size,
        num_hidden_layers=setting.num_layers,
        num_attention_heads=setting.num_heads,
        num_key_value_heads=setting.num_kv_heads,
        head_dim=setting.head_dim,
        vocab_size=setting.vocab_size,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        # Every row generates all its tokens: nothing is saved by ending early.
        eos_token_id=None,
    )
    dtype = getattr(torch, setting.dtype)
    model = Qwen3ForCausalLM(config).to(dtype)
    if not quantised:
        return model.to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        loaded = Qwen3ForCausalLM.from_pretrained(
            folder, quantization_config=quantisation, device_map=device, dtype=dtype
        )
    if as_loaded:
        freeze(loaded)
    return loaded.eval()


def prompts(setting: Setting, num_samples: int, length: int) -> tuple[Tensor, Tensor]:
    """Return random ids and a full mask."""
    ids_BT = torch.randint(3, setting.vocab_size, (num_samples, length), generator=torch.Generator().manual_seed(1))
    return ids_BT, torch.ones_like(ids_BT)


@contextmanager
def skipping(block: nn.Module | None) -> Iterator[None]:
    """Make one block the identity, as the loops of other profilers do: a hook that gives its input back."""
    hook = None
    if block is not None:
        hook = block.register_forward_hook(
            lambda _, args, kwargs, output: args[0] if args else kwargs["hidden_states"], with_kwargs=True
        )
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def generate(model: PreTrainedModel, ids_BT: Tensor, num_new_tokens: int) -> Tensor:
    """Greedy tokens [B, A] by transformers' own loop."""
    ids_BT = ids_BT.to(model.device)
    output = model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=num_new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[:, ids_BT.shape[1] :].cpu()


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return wall-clock seconds, CPU seconds, and what `work` returned."""
    synchronise()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    synchronise()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def generation(
    setting: Setting, device: str, repeats: int, sequential_seconds: float, *, as_loaded: bool = True
) -> dict[str, Any]:
    """Measure both loops and the stacked decode."""
    model = build(setting, device, as_loaded=as_loaded)
    profiler = NIWTProfiler(model)
    ids_BT, mask_BT = prompts(setting, setting.num_samples, setting.prompt_length)
    variants: list[nn.Module | None] = [None, *profiler.stack.blocks]

    def batched() -> Tensor:
        tokens = []
        for block in variants:
            with skipping(block):
                tokens.append(generate(model, ids_BT, setting.num_new_tokens))
        return torch.stack(tokens)

    def stacked() -> Tensor:
        return profiler.ablated_generations(ids_BT, mask_BT, setting.num_new_tokens)

    # The first forward packs weights and fills pools.
    profiler.ablated_generations(ids_BT, mask_BT, 2)
    generate(model, ids_BT[:1], 2)
    rounds = [(timed(stacked), timed(batched)) for _ in range(repeats)]
    tokens_VBA, expected_VBA = rounds[0][0][2], rounds[0][1][2]

    one = timed(lambda: generate(model, ids_BT[:1], setting.num_new_tokens))[0]
    num_sequential = min(setting.num_samples, max(1, int(sequential_seconds / (one * len(variants)))))

    def sequential() -> Tensor:
        tokens = []
        for block in variants:
            with skipping(block):
                rows = [generate(model, ids_BT[row : row + 1], setting.num_new_tokens) for row in range(num_sequential)]
            tokens.append(torch.cat(rows))
        return torch.stack(tokens)

    wall, cpu, sequential_VBA = timed(sequential)
    scale = setting.num_samples / num_sequential
    stacked_wall, stacked_cpu = (statistics.median(r[0][i] for r in rounds) for i in (0, 1))
    agreeing = (tokens_VBA[1:] == tokens_VBA[:1]).long().cumprod(-1).float().mean()
    figures = {
        "stacked_seconds": stacked_wall,
        "stacked_cpu_seconds": stacked_cpu,
        "batched_seconds": statistics.median(r[1][0] for r in rounds),
        "batched_cpu_seconds": statistics.median(r[1][1] for r in rounds),
        "sequential_seconds": wall * scale,
        "sequential_cpu_seconds": cpu * scale,
        "sequential_samples_run": num_sequential,
        "generation_over_batched": statistics.median(r[1][0] / r[0][0] for r in rounds),
        "generation_over_batched_cpu": statistics.median(r[1][1] / r[0][1] for r in rounds),
        "generation_over_sequential": wall * scale / stacked_wall,
        "generation_over_sequential_cpu": cpu * scale / stacked_cpu,
        "tokens_differing_from_batched": int((tokens_VBA != expected_VBA).sum()),
        "tokens_differing_from_sequential": int((tokens_VBA[:, :num_sequential] != sequential_VBA).sum()),
        "tokens": tokens_VBA.numel(),
        "share_agreeing_with_clean": float(agreeing),
    }
    products_wall, products_cpu = products(setting, device, getattr(torch, setting.dtype if as_loaded else "bfloat16"))
    figures |= {
        "products_seconds": products_wall,
        "products_cpu_seconds": products_cpu,
        "stacked_over_products": stacked_wall / products_wall,
        "stacked_over_products_cpu": stacked_cpu / products_cpu,
        "batched_over_products": figures["batched_seconds"] / products_wall,
        "sequential_over_products": figures["sequential_seconds"] / products_wall,
    }
    if device == "cuda":
        figures |= bandwidth(model, setting, stacked_wall)
    return figures if as_loaded else {name + OTHER_KERNEL: value for name, value in figures.items()}


def products(setting: Setting, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of the matrix products in a stacked decode of which no ablation repeats the clean tokens.

    Block j is given j+1 variants of the prompt, then each token of all variants but its own; the head each last position.
    """
    heads, kv_heads = (n * setting.head_dim for n in (setting.num_heads, setting.num_kv_heads))
    width, inner = setting.hidden_size, setting.intermediate_size
    block = [
        (heads, width),
        (kv_heads, width),
        (kv_heads, width),
        (width, heads),
        *[(inner, width)] * 2,
        (width, inner),
    ]
    num_layers, num_steps = setting.num_layers, setting.num_new_tokens - 1
    num_rows = setting.num_samples * num_layers

    def seconds(num_tokens: int, shapes: list[tuple[int, int]]) -> tuple[float, float]:
        inputs = [torch.randn(num_tokens, columns, device=device, dtype=dtype) for _, columns in shapes]
        weights = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

        def run() -> None:
            for x, weight in zip(inputs, weights, strict=True):
                F.linear(x, weight)

        run()
        runs = [timed(run) for _ in range(5)]
        return min(run[0] for run in runs), min(run[1] for run in runs)

    prompt = [seconds((j + 1) * setting.num_samples * setting.prompt_length, block) for j in range(num_layers)]
    step = seconds(num_rows, block)
    head = seconds(num_rows + setting.num_samples, [(setting.vocab_size, width)])
    wall, cpu = (
        sum(part[i] for part in prompt) + num_steps * num_layers * step[i] + (num_steps + 1) * head[i] for i in (0, 1)
    )
    return wall, cpu


def bandwidth(model: PreTrainedModel, setting: Setting, seconds: float) -> dict[str, float]:
    """Bytes that the stacked decode must read per second, and what the card copies per second (reads and writes).

    Of a step these are the packed weights of the blocks and of the head once, and the keys and values of all rows.
    """
    stored = [p for module in (model.model.layers, model.lm_head) for p in module.parameters()]
    weights = sum(p.numel() * p.element_size() for p in stored)
    positions = setting.prompt_length + setting.num_new_tokens / 2
    per_position = 2 * setting.num_kv_heads * setting.head_dim * getattr(torch, setting.dtype).itemsize
    cached = setting.num_samples * setting.num_layers**2 * positions * per_position
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(block)
    target.copy_(block)
    copying = statistics.median(timed(lambda: target.copy_(block))[0] for _ in range(5))
    return {
        "weights_gb": weights / 1e9,
        "mean_cached_gb": cached / 1e9,
        "achieved_gb_per_second": (weights + cached) * setting.num_new_tokens / seconds / 1e9,
        "card_gb_per_second": 2 * block.numel() / copying / 1e9,
    }


def scoring(setting: Setting, device: str, repeats: int) -> dict[str, Any]:
    """Measure delta_nll of prompts with answers as long as the prompts, and its error on unquantised weights."""
    ids_BT, mask_BT = prompts(setting, setting.num_samples, 2 * setting.prompt_length)
    loss_mask_BT = torch.zeros_like(ids_BT)
    loss_mask_BT[:, setting.prompt_length :] = 1
    model = build(setting, device)
    swept, brute = NIWTProfiler(model), NIWTProfiler(model, strategy="brute")
    brute.delta_nll(ids_BT[:2], mask_BT[:2], loss_mask_BT[:2])
    rounds = [
        tuple(timed(lambda p=p: p.delta_nll(ids_BT, mask_BT, loss_mask_BT)) for p in (swept, brute))
        for _ in range(repeats)
    ]
    del model, swept, brute
    figures = {
        "scoring_seconds": statistics.median(r[0][0] for r in rounds),
        "scoring_cpu_seconds": statistics.median(r[0][1] for r in rounds),
        "brute_seconds": statistics.median(r[1][0] for r in rounds),
        "brute_cpu_seconds": statistics.median(r[1][1] for r in rounds),
        "scoring_over_brute": statistics.median(r[1][0] / r[0][0] for r in rounds),
        "scoring_over_brute_cpu": statistics.median(r[1][1] / r[0][1] for r in rounds),
        "nf4_strategies_differ_by": float((rounds[0][0][2] - rounds[0][1][2]).abs().max()),
    }
    if setting.dtype == "float32":
        few = [tensor[:4] for tensor in (ids_BT, mask_BT, loss_mask_BT)]
        full = build(setting, device, quantised=False)
        result_L = NIWTProfiler(full).delta_nll(*few)
        exact_L = NIWTProfiler(full.double(), strategy="brute").delta_nll(*few)
        figures["delta_error_nats"] = float((result_L - exact_L).abs().max())
    return figures


def scoring_seconds(profiler: NIWTProfiler, *arguments: Tensor) -> float:
    """CPU seconds, which other programs disturb less, or wall-clock seconds where a GPU does the work."""
    index = 0 if profiler.model.device.type == "cuda" else 1
    return min(timed(lambda: profiler.delta_nll(*arguments))[index] for _ in range(2))


def cost(setting: Setting, device: str) -> dict[str, Any]:
    """Measure the figures of the cost model, and how the strategy that it chooses compares with the other one."""
    figures: dict[str, Any] = {}
    parameters = 0
    for name, quantised in (("", False), ("quantised_", True)):
        model = build(setting, device, quantised=quantised)
        profiler = NIWTProfiler(model, strategy="brute")
        parameters = parameters or sum(p.numel() for p in profiler.stack.blocks[0].parameters())

        def forward_seconds(num_tokens: int, model: PreTrainedModel = model) -> float:
            ids_BT = torch.randint(3, setting.vocab_size, (1, num_tokens), device=device)
            with torch.no_grad():
                return min(
                    timed(lambda: model(input_ids=ids_BT, use_cache=False, logits_to_keep=1))[0] for _ in range(5)
                )

        forward_seconds(2)
        one, many = forward_seconds(1), forward_seconds(512)
        figures[f"{name}call_ms"] = one / setting.num_layers * 1e3
        figures[f"{name}gflops"] = 511 * 2 * parameters * setting.num_layers / (many - one) / 1e9
        for num_samples, num_columns in ((1, 8), (setting.num_samples, 2 * setting.prompt_length), (1, 1024)):
            ids_BT, mask_BT = prompts(setting, num_samples, num_columns)
            loss_mask_BT = torch.zeros_like(ids_BT)
            loss_mask_BT[:, -4:] = 1
            batch = ProfileBatch([str(row) for row in range(num_samples)], ids_BT, mask_BT, loss_mask_BT)
            seconds = {
                strategy: scoring_seconds(NIWTProfiler(model, strategy=strategy), ids_BT, mask_BT, loss_mask_BT)
                for strategy in ("prefix", "triangular")
            }
            chosen = NIWTProfiler(model).measure(batch).strategy
            figures[f"{name}{num_samples}x{num_columns}"] = (
                f"{chosen} chosen, {seconds[chosen] / min(seconds.values()):.2f} of the best one's time "
                f"({', '.join(f'{strategy} {time:.3f} s' for strategy, time in seconds.items())})"
            )
    machine = MACHINES["cpu" if device == "cpu" else "accelerator"]
    assumed = (
        machine.call_s + parameters / machine.weights_per_s,
        (machine.quantised_call_s + parameters / machine.quantised_weights_per_s),
    )
    return {
        **figures,
        "assumed_call_ms": assumed[0] * 1e3,
        "assumed_quantised_call_ms": assumed[1] * 1e3,
        "assumed_gflops": machine.flops_per_s / 1e9,
    }


def peak(work: str, setting: Setting, device: str, num_samples: int, num_live: int) -> tuple[int, int]:
    """Return the bytes that `work` takes on top of the loaded model at its peak, and the most rows that a block was given.

    Args:
        num_live: rows of the clean model's forward or generation.
    """
    model = build(setting, device)
    length = 2 * setting.prompt_length
    ids_BT, mask_BT = prompts(setting, num_samples, length)
    loss_mask_BT = torch.zeros_like(ids_BT)
    loss_mask_BT[:, setting.prompt_length :] = 1
    profiler = NIWTProfiler(model, micro_batch_size=MICRO_BATCH_SIZE)
    most_rows = 0

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal most_rows
        most_rows = max(most_rows, len(args[0]))

    profiler.stack.blocks[-1].mlp.register_forward_pre_hook(count)

    def profile(rows: int) -> None:
        step = setting.num_samples
        profiler.profile(
            ProfileBatch([str(row) for row in range(first, first + step)], *(t[first : first + step] for t in batch))
            for batch in [(ids_BT[:rows], mask_BT[:rows], loss_mask_BT[:rows])]
            for first in range(0, rows, step)
        )

    @torch.no_grad()
    def forward() -> None:
        live_RT = ids_BT[:1].repeat(num_live, 1).to(device)
        model(input_ids=live_RT, logits_to_keep=setting.prompt_length, use_cache=False)

    prompt_BT = ids_BT[:, : setting.prompt_length]
    works: dict[str, Callable[[], object]] = {
        "profile": lambda: profile(num_samples),
        "forward": forward,
        "stacked": lambda: profiler.ablated_generations(
            prompt_BT, mask_BT[:, : setting.prompt_length], setting.num_new_tokens
        ),
        "generate": lambda: generate(model, prompt_BT[:1].repeat(num_live, 1), setting.num_new_tokens),
    }
    # Once small: what libraries set up in their first call is no part of the work.
    generate(model, prompt_BT[:1], 2)
    NIWTProfiler(model, micro_batch_size=1).profile(
        [ProfileBatch(["0", "1"], ids_BT[:2], mask_BT[:2], loss_mask_BT[:2])]
    )
    most_rows = 0
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        works[work]()
        return torch.cuda.max_memory_allocated() - before, most_rows
    before = resident_bytes("VmRSS")
    # Sets the high-water mark to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    works[work]()
    return resident_bytes("VmHWM") - before, most_rows


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"Expected {field} in /proc/self/status, found none. Measure memory on Linux.")


def memory(setting: Setting, device: str, threads: int) -> dict[str, float]:
    """Compare peaks; on a CPU in fresh processes whose allocator gives back what is freed."""

    def measured(work: str, num_samples: int, num_live: int = 0) -> tuple[int, int]:
        if device == "cuda":
            return peak(work, setting, device, num_samples, num_live)
        arguments = ["--peak", work, "--rows", str(num_samples), "--live", str(num_live), "--threads", str(threads)]
        # Tensors of 64 KiB and more are mapped one by one: resident memory is then what is in use.
        thresholds = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536", "NIWT_BENCHMARK": "1"}
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | thresholds,
        )
        num_bytes, num_rows = done.stdout.splitlines()[-1].split()
        return int(num_bytes), int(num_rows)

    few, num_live = measured("profile", setting.num_samples)
    many, _ = measured("profile", 10 * setting.num_samples)
    forward, _ = measured("forward", setting.num_samples, num_live)
    # All variants of a micro-batch.
    num_decoded = (setting.num_layers + 1) * MICRO_BATCH_SIZE
    stacked, _ = measured("stacked", setting.num_samples)
    generated, _ = measured("generate", setting.num_samples, num_decoded)
    peaks = {"profile": few, "forward": forward, "stacked": stacked, "generate": generated}
    return {
        **{f"{name}_peak_mib": value / 2**20 for name, value in peaks.items()},
        "profile_live_rows": num_live,
        "generation_live_rows": num_decoded,
        "profile_memory": few / forward,
        "generation_memory": stacked / generated,
        "memory_of_ten_times_the_rows": many / few,
    }


def main() -> int:
    """Measure, print, and say whether results are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sequential-seconds", type=float, default=180.0)
    parts = ("generation", "scoring", "memory", "cost")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--peak", choices=("profile", "forward", "stacked", "generate"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=16, help=argparse.SUPPRESS)
    parser.add_argument("--live", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    setting, targets = (GPU_SETTING, GPU_TARGETS) if arguments.device == "cuda" else (CPU_SETTING, TARGETS)
    if arguments.peak:
        print(*peak(arguments.peak, setting, arguments.device, arguments.rows, arguments.live))
        return 0
    figures: dict[str, Any] = {
        "device": arguments.device,
        "threads": arguments.threads,
        "load_before": os.getloadavg()[0],
    }
    if "generation" in arguments.parts:
        measured = setting, arguments.device, arguments.repeats, arguments.sequential_seconds
        figures |= generation(*measured)
        if arguments.device == "cpu" and has_avx512bf16():
            figures |= generation(*measured, as_loaded=False)
    if "scoring" in arguments.parts:
        figures |= scoring(setting, arguments.device, arguments.repeats)
    if "memory" in arguments.parts:
        figures |= memory(setting, arguments.device, arguments.threads)
    if "cost" in arguments.parts:
        figures |= cost(setting, arguments.device)
    figures["load_after"] = os.getloadavg()[0]
    wrong = sum(value for name, value in figures.items() if name.startswith("tokens_differing")) + (
        figures.get("delta_error_nats", 0.0) > MAX_DELTA_ERROR
    )
    print(json.dumps(figures) if arguments.json else table(figures, setting, targets))
    return 1 if wrong else 0


def table(figures: dict[str, Any], setting: Setting, targets: dict[str, float]) -> str:
    """Return the figures as lines, ratios beside what they are meant to be."""
    lines = []
    for name, value in figures.items():
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        target = targets.get(name.removesuffix(OTHER_KERNEL).removesuffix("_cpu"))
        if target is not None:
            is_memory = "memory" in name
            met = value <= target if is_memory else value >= target
            text += f"x (target {'at most' if is_memory else 'at least'} {target:g}x: {'met' if met else 'missed'})"
        lines.append(f"{name.replace('_', ' '):38} {text}")
    run = figures.get("sequential_samples_run")
    if run is not None and run < setting.num_samples:
        lines.append(
            f"The sequential loop ran all ablations of {run} of {setting.num_samples} samples; its seconds are scaled."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
