"""On a GPU everything that meets the student has to be there. Without one, a mode follows which tensors would be.

`Elsewhere` takes the parameters for tensors of another device, follows them through every function, and refuses what CUDA refuses:
a function of tensors of both devices. A tensor gets there by `to(tensor.device)` or `device=tensor.device`, back by `cpu()`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest_training import CAPABILITIES, facts, image_rows, label_targets, text_rows, token_targets
from test_loop import _loop
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nexus.student.memory import NexusStudent
from nexus.towers.targets import FullTargets, HiddenTargets, SampledTargets, TeacherHead
from nexus.training.batches import Assignment
from nexus.training.cross_tokenizer import CommonIds, SpanAlignment, cross_tokenizer_loss
from nexus.training.facts import TokenTransport
from nexus.training.objective import DistillationObjective, align_with_teachers

MOVES = {"copy_", "set_", "load_state_dict"}
"""Functions that may read one device and write the other."""
INDEXES = {"__getitem__", "__setitem__"}
"""An index may stay on the CPU."""
STRICT = {"stack", "cat"}
"""Others take a single number of the CPU beside tensors of a GPU."""


class DeviceError(RuntimeError):
    """What a GPU would have refused."""


class Elsewhere(TorchFunctionMode):
    """Every tensor over the memory of `parameters`, and what is made of them, counts as another device's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__()
        # Memory that is known stays alive, so that no address is used twice.
        self._there: dict[int, torch.UntypedStorage] = {}
        self.moved = 0
        for parameter in parameters:
            self._put(parameter)

    def _put(self, tensor: torch.Tensor) -> None:
        if tensor.numel():
            self._there[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    def is_there(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return bool(tensor.numel()) and tensor.untyped_storage().data_ptr() in self._there

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            name = getattr(func, "__name__", "")
            found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            there = [tensor for tensor in found if self.is_there(tensor)]
            here = [tensor for tensor in found if tensor.numel() and not self.is_there(tensor)]
            devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
            asked = [value for value in (*args[1:2], kwargs.get("device")) if isinstance(value, str)]
        if name == "cpu" or asked == ["cpu"]:
            return func(*args, **kwargs).clone() if name in ("cpu", "to") else func(*args, **kwargs)
        moves = name in MOVES or (name == "to" and len(found) > 1)
        if there and here and not moves:
            first_is_there = self.is_there(found[0]) if found else False
            strangers = [tensor for tensor in here if tensor.ndim or name in STRICT]
            if strangers and not (name in INDEXES and first_is_there):
                shapes = [tuple(tensor.shape) for tensor in strangers]
                raise DeviceError(f"{name}: tensors of two devices, {shapes} of the CPU among them")
        if name == "numpy" and there:
            raise DeviceError("numpy: a tensor of the other device")
        result = func(*args, **kwargs)
        if name == "to" and (devices or len(found) > 1):
            self.moved += 1
            result = result.clone()
            if devices or self.is_there(found[1]):
                self._mark(result)
        elif name not in MOVES and (there or devices):
            self._mark(result)
        return result

    def _mark(self, result: Any) -> None:
        with torch._C.DisableTorchFunction():
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._put(leaf)


def test_the_mode_refuses_what_cuda_refuses() -> None:
    weight, rows = torch.nn.Parameter(torch.randn(4, 3)), torch.randn(2, 4)
    with Elsewhere([weight]) as mode:
        assert mode.is_there(weight.detach().relu() * 2)
        with pytest.raises(DeviceError, match=r"matmul: tensors of two devices, \[\(2, 4\)\]"):
            rows @ weight
        out = rows.to(weight.device) @ weight
        assert mode.is_there(out)
        assert not mode.is_there(rows)
        assert not mode.is_there(out.cpu())
        with pytest.raises(DeviceError, match="numpy"):
            out.detach().numpy()
        out.detach().cpu().numpy()
        with pytest.raises(DeviceError, match="add"):
            out + torch.zeros(3)
        assert mode.is_there(out + torch.zeros(3, device=out.device))
        out = out + torch.tensor(1.0)  # a single number may come from anywhere
        with pytest.raises(DeviceError, match="stack"):
            torch.stack([out.sum(), torch.tensor(1.0)])
        assert mode.is_there(out[torch.tensor([0])])
        torch.zeros(2, 3).copy_(out.detach())
        out.sum().backward()
        assert mode.is_there(weight.grad)


def targets_of(kind: str, teacher: Any, rows: Any, tokenizer: Any) -> Any:
    targets = token_targets(teacher, rows, tokenizer)
    count, scored = len(targets.tokens.token_ids_N), (targets.tokens.offsets_B1, targets.tokens.token_ids_N)
    random = np.random.default_rng(1)
    tokens = {
        "topk": targets.tokens,
        "hidden": HiddenTargets(*scored, random.normal(size=(count, 64)).astype(np.float32)),
        "sampled": SampledTargets(
            *scored,
            random.integers(0, len(tokenizer), (count, 5)).astype(np.int32),
            -random.random((count, 5)).astype(np.float32),
        ),
        "full": FullTargets(
            *scored,
            torch.randn(count, len(tokenizer), generator=torch.Generator().manual_seed(2)).log_softmax(-1).numpy(),
        ),
    }
    return replace(targets, tokens=tokens[kind])


@pytest.mark.parametrize(
    ("kind", "divergence", "standardise"),
    [
        ("topk", "mix", "scale"),
        ("topk", "forward_kl", "phi_s"),
        ("hidden", "mix", "scale"),
        ("full", "forward_kl", "scale"),
        ("sampled", "mix", "phi_s"),
    ],
)
def test_all_that_meets_the_student_is_brought_to_its_device(spec, tokenizer, kind, divergence, standardise) -> None:
    teachers = [facts("same"), facts("other"), facts("labels")]
    spec = align_with_teachers(spec, teachers, {"same": ("reasoning",), "other": (), "labels": ("vision",)})
    torch.manual_seed(0)
    head = TeacherHead(torch.randn(len(tokenizer), 64).numpy(), torch.randn(len(tokenizer)).numpy(), 30.0)
    objective = DistillationObjective(
        NexusStudent(spec),
        tokenizer,
        teachers=teachers,
        capabilities=CAPABILITIES,
        temperature=2.0,
        top_k=8,
        response_weight=1.0,
        max_length=64,
        divergence=divergence,
        standardise=standardise,
        transports={"same": TokenTransport(kind)},
        head_of=lambda _: head,
        tokenizers={"other": tokenizer},
    )
    texts, images = text_rows(), image_rows()
    prose = tuple(replace(row, capability="prose") for row in texts)
    answers = {
        Assignment("same", "math"): (texts, targets_of(kind, teachers[0], texts, tokenizer)),
        Assignment("other", "prose"): (prose, token_targets(teachers[1], prose, tokenizer)),
        Assignment("labels", "sight"): (images, label_targets(teachers[2], images)),
    }
    with Elsewhere(objective.parameters()) as mode:
        total = objective.gold_loss({"math": texts})
        for assignment, (rows, targets) in answers.items():
            loss = objective.teacher_loss(assignment, rows, targets)
            total = total + loss.kd + loss.anchor
        assert mode.is_there(total)
        total.backward()
        assert all(mode.is_there(p.grad) for p in objective.parameters() if p.grad is not None)
    assert mode.moved > 10


@pytest.mark.parametrize(
    "changes",
    [
        {"surgery_method": "upgrad", "surgery_every": 2, "ema_decay": 0.9},
        {"accumulate": 2, "optimizer": "muon", "surgery_method": "pcgrad"},
        {"optimizer": "adamw8bit"},
    ],
)
def test_steps_snapshots_and_rollbacks_mix_no_devices(spec, tokenizer, changes) -> None:
    loop, _ = _loop(spec, tokenizer, standardise="phi_s", **changes)
    with Elsewhere([*loop.objective.parameters(), *loop.objective.buffers()]) as mode:
        if loop.average is not None:
            for tensor in loop.average.state_dict()["weights"].values():
                mode._put(tensor)
        loop.recovery.snapshot(0)
        reports = [loop.advance() for _ in range(4)]
        loop.step = loop.recovery.rollback()
        loop._forget()
        loop.advance()
    assert [report.action for report in reports] == ["step"] * 4


def test_spans_across_tokenizers_are_compared_on_the_students_device() -> None:
    logits_NV = torch.randn(5, 9, requires_grad=True)
    # Without the distance of what is unaligned: a part of it is empty, and so has no memory to follow.
    # A token each, three of the student against two of the teacher, and one whose own token the teacher did not keep.
    alignment = SpanAlignment(np.array([0, 1, 4, 5]), np.array([0, 1, 3, 5]))
    common = CommonIds(torch.arange(5), torch.arange(5))
    log_p_MK = torch.randn(5, 3).log_softmax(-1) - 0.1
    with Elsewhere([logits_NV]):
        moved = [
            tensor.to(logits_NV.device)
            for tensor in (
                torch.tensor([1, 2, 3, 4, 5]),
                torch.tensor([1, 2, 0, 8, 3]),
                torch.tensor([[1, 0, 2]] * 5),
                log_p_MK,
                torch.full((5,), -2.3),
            )
        ]
        found = cross_tokenizer_loss(
            logits_NV, *moved, alignment=alignment, common=common, num_loss_tokens=5, temperature=1.0, uld_weight=0.0
        )
        found.loss.backward()
    assert found.aligned_share == 0.8
