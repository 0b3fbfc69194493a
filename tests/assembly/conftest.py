"""Data for the tests of assembly: invented numbers in the run directory's own models, media and a student made on the spot."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from datetime import datetime, timezone

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nexus.adapters.base import Alignment
from nexus.artifacts import (
    ActivationSummary,
    CriticalLayer,
    LayerProfile,
    Metrics,
    NIWTProfile,
    ProfileBaseline,
    QuantisationTax,
    Retention,
    RouterMetrics,
    StageMetrics,
)
from nexus.assembly.report import ReportData, SampleRow
from nexus.config import RunConfig, parse_config
from nexus.student.memory import NexusStudent
from nexus.student.presets import StudentSpec

TEACHERS = {"qwen3-math": "reasoning", "gemma3-code": "code", "siglip-digits": "vision", "whisper-digits": "audio"}
NUM_STEPS = 800


def png(size: int = 16) -> bytes:
    """Two thick strokes on black, as a PNG of size x size grey pixels."""
    pixels_HW = np.zeros((size, size), dtype=np.uint8)
    pixels_HW[size // 5 : size - size // 5, size // 4 : size // 4 + max(size // 8, 1)] = 220
    for row in range(size // 5, size - size // 5):
        pixels_HW[row, size - size // 6 - row // 3 : size - row // 3] = 160
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, format="PNG")
    return buffer.getvalue()


def wav(seconds: float = 0.6, rate: int = 8000) -> bytes:
    """A fading chirp as WAV bytes."""
    time_S = np.arange(int(seconds * rate)) / rate
    samples_S = 0.6 * np.sin(2 * np.pi * (200 + 500 * time_S) * time_S) * np.sin(np.pi * time_S / seconds) ** 2
    buffer = io.BytesIO()
    soundfile.write(buffer, samples_S, rate, format="WAV")
    return buffer.getvalue()


def run_config() -> RunConfig:
    """Four path teachers, one for each capability."""
    return parse_config(
        {
            "name": "quickstart",
            "seed": 0,
            "teachers": [
                {
                    "kind": "path",
                    "id": teacher,
                    "capabilities": [capability],
                    "path": f"teachers/{teacher}",
                    "role": role,
                }
                for (teacher, capability), role in zip(
                    TEACHERS.items(), ["causal_lm"] * 2 + ["encoder"] * 2, strict=True
                )
            ],
            "data": [
                {
                    "capability": capability,
                    "pool": [f"{capability}/pool.parquet"],
                    "test": [f"{capability}/test.parquet"],
                    "answer": "gsm8k" if capability == "reasoning" else "exact",
                    "max_new_tokens": 48,
                    "batch_size": 16,
                }
                for capability in TEACHERS.values()
            ],
            "student": {"tokenizer": "qwen3-math"},
            "distill": {"steps": NUM_STEPS, "learning_rate": 3.0e-3},
        },
        source="test",
    )


def run_metrics() -> Metrics:
    """One broken contract (code), so that both badges show."""
    scores = {
        "reasoning": (1.0, 0.996, 0.31, (0.99, 1.0), (0.27, 0.35)),
        "code": (0.972, 0.862, 0.55, (0.859, 0.914), (0.52, 0.61)),
        "vision": (0.961, 0.915, 0.162, (0.927, 0.976), (0.135, 0.203)),
        "audio": (0.968, 0.944, 0.712, (0.954, 0.995), (0.69, 0.78)),
    }
    retention = {}
    for teacher, capability in TEACHERS.items():
        score, student, alone, interval, alone_interval = scores[capability]
        retention[capability] = Retention(
            teacher=teacher,
            teacher_score=score,
            student_score=student,
            chance=0.0,
            retention=student / score,
            ci95=interval,
            contract=0.9,
            holds=student / score >= 0.9,
            num_rows=500,
            labels_only_score=alone,
            labels_only_retention=alone / score,
            labels_only_ci95=alone_interval,
        )
    tax = {
        teacher: QuantisationTax(
            float_score=0.98 - 0.004 * index,
            nf4_score=0.974 - 0.006 * index,
            mean_kl_nats=0.0031 * (index + 1),
            top1_agreement=0.991 - 0.003 * index,
            quantised_share=0.87,
            max_weight_error=0.0931 + 0.001 * index,
        )
        for index, teacher in enumerate(TEACHERS)
    }
    seconds = {
        "profile": 21.4,
        "extract": 12.0,
        "distill": 171.9,
        "labels_only": 63.2,
        "route": 9.8,
        "evaluate": 34.1,
        "export": 1.7,
    }
    return Metrics(
        retention=retention,
        quantisation_tax=tax,
        throughput={"student_tokens_per_second": 41_233.0, "teacher_rows_per_second": 612.4},
        stages={
            stage: StageMetrics(seconds=value, peak_memory_gib=1.2 + 0.6 * math.log10(value + 1))
            for stage, value in seconds.items()
        },
        router=RouterMetrics(
            accuracy=0.985,
            threshold=0.81,
            coverage=0.964,
            confusion={
                "reasoning": {"reasoning": 496, "trunk": 4},
                "trunk": {"trunk": 489, "reasoning": 11},
                "vision": {"vision": 500},
                "audio": {"audio": 497, "audio+vision": 3},
            },
        ),
        student_parameters=523_456,
        teacher_parameters={
            "qwen3-math": 601_000,
            "gemma3-code": 588_000,
            "siglip-digits": 152_000,
            "whisper-digits": 431_000,
        },
        seed=0,
    )


def run_profiles() -> tuple[NIWTProfile, ...]:
    """Two to three layers per teacher, one teacher without a critical layer."""
    effects = {
        "qwen3-math": ("delta_nll", [3.12, 2.05]),
        "gemma3-code": ("delta_nll", [1.44, 0.61]),
        "siglip-digits": ("label_nll", [2.21, 1.02, 0.13]),
        "whisper-digits": ("cosine_drop", [0.01, -0.002]),
    }
    profiles = []
    for teacher, (metric, deltas) in effects.items():
        critical = [layer for layer, delta in enumerate(deltas) if delta > 0.5]
        total = sum(deltas[layer] for layer in critical)
        profiles.append(
            NIWTProfile.model_validate(
                {
                    "teacher": teacher,
                    "revision": "samples",
                    "num_layers": len(deltas),
                    "num_samples": 256,
                    "metric": metric,
                    "strategy": "triangular",
                    "baseline": ProfileBaseline(nll=0.021, accuracy=0.98),
                    "layers": tuple(
                        LayerProfile(
                            layer=layer,
                            delta_nll=delta,
                            ci95=(delta - 0.08 * abs(delta) - 0.01, delta + 0.09 * abs(delta) + 0.01),
                            accuracy_drop=None if metric == "cosine_drop" else min(1.0, max(0.0, delta / 4)),
                            activation=ActivationSummary(mean_abs=0.8, variance=1.1, kurtosis=3.4, abs_max=9.0),
                            intrinsic_dim=21.0,
                        )
                        for layer, delta in enumerate(deltas)
                    ),
                    "critical_layers": tuple(
                        CriticalLayer(layer=layer, weight=deltas[layer] / total) for layer in critical
                    ),
                    "seconds": 4.2,
                    "speedup_over_sequential": 2.6 if metric == "delta_nll" else None,
                    "note": None if critical else "no layer is significant: nothing is anchored",
                }
            )
        )
    return tuple(profiles)


def run_events() -> tuple[Mapping[str, object], ...]:
    """NUM_STEPS noisy, falling losses with one skip, one rollback of forty steps, and a restart."""
    generator = np.random.default_rng(0)
    events: list[Mapping[str, object]] = []
    for step in [*range(421), *range(380, NUM_STEPS)]:
        losses = {
            teacher: float(
                (0.03 + (2.9 - 0.4 * index) * math.exp(-step / (70 + 40 * index))) * generator.lognormal(0, 0.16)
            )
            for index, teacher in enumerate(TEACHERS)
        }
        events.append(
            {"time": 1.0e9 + len(events), "kind": "step", "step": step, "losses": losses, "total": sum(losses.values())}
        )
        if step == 214:
            events.append({"time": 1.0e9 + len(events), "kind": "skip", "step": step})
        if len(events) == 422:
            events.append({"time": 1.0e9 + len(events), "kind": "rollback", "step": step})
        if step == 610:
            events.append({"time": 1.0e9 + len(events), "kind": "restart", "step": step})
    return tuple(events)


def sample(
    capability: str, prompt: str, answers: tuple[str, str, str, str | None], media: bytes | None = None
) -> SampleRow:
    """A sample row; `answers` are gold, teacher, student, labels only."""
    gold, teacher, student, labels_only = answers
    return SampleRow(
        id=f"{capability}-{prompt}",
        capability=capability,
        prompt=prompt,
        media=media,
        media_kind=None if media is None else "audio" if capability == "audio" else "image",
        gold=gold,
        teacher=teacher,
        student=student,
        labels_only=labels_only,
    )


def run_samples() -> tuple[SampleRow, ...]:
    """Two rows of each capability, right and wrong answers among them, one that the labels-only student was not asked."""
    stones, pens = "20-2=18\n18-4=14\n#### 14", "6*7=42\n42-5=37\n#### 37"
    return (
        sample(
            "reasoning",
            "Mia has 20 stones, loses 2 and gives Tom 4. How many stones does Mia have now?",
            (stones, stones, stones, "20-4=16\n16-4=12\n#### 12"),
        ),
        sample(
            "reasoning",
            "A box holds 6 rows of 7 pens. 5 are broken. How many still write?",
            (pens, pens, pens, "6*7=41\n41-5=36\n#### 36"),
        ),
        sample("code", 'print("A" in "FFBE")', ("False", "False", "False", "True")),
        sample("code", "print(sorted([4, 1, 3])[::-1])", ("[4, 3, 1]", "[4, 3, 1]", "[4, 1, 3]", "[1, 4]")),
        sample("vision", "What is the sum of the two digits in the image?", ("12", "12", "12", "8"), png()),
        sample("vision", "Add the two digits in the picture.", ("9", "7", "9", "11"), png()),
        sample("audio", "Which number is spoken in the audio?", ("zero", "zero", "zero", "zero"), wav()),
        sample("audio", "What digit do you hear in the audio?", ("seven", "seven", "seven", None), wav(0.4)),
    )


@pytest.fixture(scope="session")
def report_data() -> ReportData:
    return ReportData(
        config=run_config(),
        metrics=run_metrics(),
        profiles=run_profiles(),
        events=run_events(),
        samples=run_samples(),
        finished=datetime(2025, 3, 14, 9, 26, tzinfo=timezone.utc),
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, trained on the spot."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    model.train_from_iterator(["how many stones are left", "print the sum", "which digit is spoken"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def student(tokenizer: PreTrainedTokenizerBase) -> NexusStudent:
    """A small student with random weights large enough, and ports open enough, that every input shows in its answers."""
    spec = StudentSpec.from_dict(
        {
            "core": {
                "vocab_size": 280,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "port_every": 1,
                "max_position_embeddings": 128,
                "tie_word_embeddings": True,
                "initializer_range": 0.4,
            },
            "reasoning": {"width": 32, "num_layers": 1, "num_heads": 2, "num_context_tokens": 3},
            "vision": {
                "width": 32,
                "num_layers": 1,
                "num_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "num_channels": 1,
            },
            "audio": {
                "width": 32,
                "num_layers": 1,
                "num_heads": 2,
                "num_mels": 16,
                "sampling_rate": 8000,
                "window_size": 256,
                "hop_size": 160,
                "num_samples": 8000,
            },
            "router": {"hidden_size": 16, "keywords": [["reasoning", ["how many"]]]},
        }
    )
    spec = spec.with_vocabulary(
        len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    spec = spec.with_alignments("reasoning", [Alignment("qwen3-math", 1, 48)])
    spec = spec.with_alignments("vision", [Alignment("siglip-digits", "pooled", 40)])
    torch.manual_seed(0)
    whole = NexusStudent(spec)
    with torch.no_grad():
        for port in whole.core.ports.values():
            port.gate_D.fill_(1.5)
    return whole
