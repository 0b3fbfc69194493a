"""Training of the router on a frozen student: which towers does a prompt need?

The rows are split by a seeded shuffle: three fifths train, one fifth calibrates the probabilities, one fifth chooses the threshold,
so that the risk bound of the threshold holds for rows that nothing was fitted to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nexus.config import TOWERS, RouterConfig
from nexus.data.collate import collate
from nexus.data.records import Record
from nexus.student.memory import NexusStudent
from nexus.student.router import ThresholdFit, router_loss

EMBED_ROWS = 128
"""Rows that are embedded at a time; bounds the memory."""


@dataclass(frozen=True)
class RouterFit:
    """What training the router gave."""

    threshold: ThresholdFit
    loss: float
    """Of the last step."""
    num_rows: int


def train_router(
    student: NexusStudent,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Record],
    towers: Mapping[str, Sequence[str]],
    config: RouterConfig,
    *,
    max_length: int,
    seed: int,
) -> RouterFit:
    """Fit, calibrate and set the threshold of `student.router` in place; the rest of the student stays as it is.

    Args:
        rows: prompts of all capabilities; completions are not read.
        towers: capability -> towers that its rows need.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    rows = [rows[index] for index in order]
    embedding_RE = _embed(student, tokenizer, rows, max_length)
    labels_RN = torch.tensor([[tower in towers[row.capability] for tower in TOWERS] for row in rows])
    available_RN = torch.tensor(
        [
            [tower == "reasoning" or (row.media is not None and _tower_of_media(row) == tower) for tower in TOWERS]
            for row in rows
        ]
    )
    first, second = (len(rows) * 3) // 5, (len(rows) * 4) // 5
    router = student.router
    router.train()
    optimizer = torch.optim.AdamW(router.parameters(), lr=config.learning_rate)
    loss = torch.tensor(0.0)
    for _ in range(config.steps):
        chosen_B = torch.randint(first, (min(config.batch_size, first),), generator=generator)
        loss = router_loss(router(embedding_RE[chosen_B]), labels_RN[chosen_B], available_RN[chosen_B])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    router.eval()
    calibration = slice(first, second)
    router.calibrate(embedding_RE[calibration], labels_RN[calibration], available_RN[calibration])
    fit = router.fit_threshold(
        embedding_RE[second:], labels_RN[second:], available_RN[second:], max_risk=config.max_risk
    )
    return RouterFit(fit, float(loss.detach()), len(rows))


@torch.no_grad()
def _embed(
    student: NexusStudent, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Record], max_length: int
) -> Tensor:
    """[R, E]: the frozen student's pooled embedding of each prompt."""
    parts = []
    for start in range(0, len(rows), EMBED_ROWS):
        prompts = [
            Record(id=row.id, capability=row.capability, prompt=row.prompt) for row in rows[start : start + EMBED_ROWS]
        ]
        batch = collate(prompts, tokenizer, max_length=max_length)
        parts.append(student.embed(batch.input_ids_BT, batch.attention_mask_BT.bool()))
    return torch.cat(parts)


def _tower_of_media(row: Record) -> str:
    assert row.media is not None
    return {"image": "vision", "video": "vision", "audio": "audio"}[row.media.kind]
