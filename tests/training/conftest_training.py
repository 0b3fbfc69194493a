"""A tiny student over the shipped tokenizer, rows of three kinds, and targets of chosen content."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from nexus.adapters import AudioAdapterConfig, ReasoningAdapterConfig, VisionAdapterConfig
from nexus.data.collate import tokenise_rows
from nexus.data.records import Media, Record
from nexus.student.config import NexusStudentConfig
from nexus.student.presets import StudentSpec
from nexus.student.router import SparseIntentRouterConfig
from nexus.towers.targets import TeacherTargets, TokenTargets
from nexus.training.facts import CapabilityFacts, TeacherFacts

TOKENIZER = Path(__file__).parents[2] / "nexus" / "data" / "samples" / "teachers" / "sample-reasoning"
WIDTH = 64
"""Of the pretended teachers."""


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="session")
def spec(tokenizer) -> StudentSpec:
    adapter = {"context_width": 32, "width": 16, "num_layers": 1, "num_heads": 2}
    return StudentSpec(
        core=NexusStudentConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            port_every=1,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        reasoning=ReasoningAdapterConfig(**{**adapter, "num_context_tokens": 2}),
        vision=VisionAdapterConfig(**adapter, image_size=8, patch_size=4, num_channels=1),
        audio=AudioAdapterConfig(
            **adapter, num_mels=8, sampling_rate=8000, window_size=256, hop_size=160, num_samples=1600
        ),
        router=SparseIntentRouterConfig(embedding_size=32, hidden_size=16),
    )


def text_rows(count: int = 3, capability: str = "math") -> tuple[Record, ...]:
    """Rows with completions of different lengths."""
    return tuple(
        Record(
            id=f"{capability}{n}",
            capability=capability,
            prompt="Add " * (n + 1),
            completion="1+1=2\n#### 2"[: 6 + 2 * n],
            answer="2",
        )
        for n in range(count)
    )


def image_rows(count: int = 3) -> tuple[Record, ...]:
    """Rows with a small picture each."""
    rows = []
    for n in range(count):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8), 40 * n, dtype=np.uint8)).save(buffer, format="PNG")
        rows.append(
            Record(
                id=f"image{n}",
                capability="sight",
                prompt="Which?",
                completion="12",
                answer="12",
                media=Media("image", buffer.getvalue()),
            )
        )
    return tuple(rows)


def facts(kind: str, **changes) -> TeacherFacts:
    """Teachers of the three kinds that losses are made for."""
    base = TeacherFacts(
        id=kind,
        role="causal_lm",
        importance=1.0,
        shares_tokenizer=True,
        vocabulary_size=None,
        num_layers=4,
        hidden_size=WIDTH,
        label_texts=None,
        fingerprint="print",
        critical_layers=((0, 0.25), (3, 0.75)),
    )
    kinds = {
        "same": {},
        "other": {"shares_tokenizer": False},
        "labels": {"role": "encoder", "shares_tokenizer": False, "label_texts": ("1", "12", "3")},
    }
    return replace(base, **{**kinds[kind], **changes})


CAPABILITIES = (
    CapabilityFacts("math", ("reasoning",), None),
    CapabilityFacts("prose", (), None),
    CapabilityFacts("sight", ("vision",), None),
)


def token_targets(teacher: TeacherFacts, rows, tokenizer, *, seed: int = 0, top_k: int = 8) -> TeacherTargets:
    """A language model's targets on the rows' own completions, from random logits."""
    random = np.random.default_rng(seed)
    lengths = [len(row.completion_ids) for row in tokenise_rows(rows, tokenizer)]
    ids = np.concatenate([row.completion_ids for row in tokenise_rows(rows, tokenizer)]).astype(np.int32)
    logits = torch.from_numpy(random.normal(size=(len(ids), len(tokenizer))) * 2)
    logprobs, kept = logits.log_softmax(-1).topk(top_k)
    tail = torch.log1p(-logprobs.exp().sum(-1))
    return TeacherTargets(
        teacher=teacher.id,
        fingerprint=teacher.fingerprint,
        tokenizer_hash="same",
        row_ids=tuple(row.id for row in rows),
        tokens=TokenTargets(
            np.cumsum([0, *lengths]),
            ids,
            kept.numpy().astype(np.int32),
            logprobs.numpy().astype(np.float32),
            tail.numpy().astype(np.float32),
        ),
        hidden={
            layer: random.normal(size=(len(ids), WIDTH)).astype(np.float16) for layer, _ in teacher.critical_layers
        },
        pooled_BE=None,
        label_texts=None,
        label_logprobs_BC=None,
    )


def label_targets(teacher: TeacherFacts, rows, *, seed: int = 0, positions: int = 4) -> TeacherTargets:
    """A classifier's targets, from random logits."""
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(len(rows), len(teacher.label_texts))))
    return TeacherTargets(
        teacher=teacher.id,
        fingerprint=teacher.fingerprint,
        tokenizer_hash=None,
        row_ids=tuple(row.id for row in rows),
        tokens=None,
        hidden={
            layer: random.normal(size=(len(rows), positions, WIDTH)).astype(np.float16)
            for layer, _ in teacher.critical_layers
        },
        pooled_BE=None,
        label_texts=teacher.label_texts,
        label_logprobs_BC=logits.log_softmax(-1).numpy().astype(np.float32),
    )
