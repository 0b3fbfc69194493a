"""Divergences in one pass against the autograd forms in float64: values, gradients, and the corners where logarithms end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nexus.training import one_pass
from nexus.training.divergence import (
    distill_divergence,
    distill_divergence_topk,
    forward_kl,
    generalized_jsd,
    reverse_kl,
)
from nexus.training.hidden_divergence import DISTILL_MIX, FORWARD_KL, REVERSE_KL, OutputHead, Term, jsd_terms
from nexus.training.one_pass import StudentRows, dense_one_pass, hidden_one_pass, topk_one_pass

M, V, D, E, K = 37, 50, 8, 6, 5
COUNT, TEMPERATURE = 40, 1.7
SETTING = {"num_loss_tokens": COUNT, "temperature": TEMPERATURE}


def _inputs(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((M, D), (V, D), (M, E), (V, E))
    states, weight, teacher, head = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (
        (scale * states).to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        teacher.to(dtype),
        head.to(dtype),
    )


def _gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, inputs))


def _dense(name, states, weight, teacher_logits):
    functions = {
        "forward": forward_kl,
        "reverse": reverse_kl,
        "mix": distill_divergence,
        "jsd": lambda *a, **k: generalized_jsd(*a, beta=0.3, **k),
    }
    return functions[name](states @ weight.T, teacher_logits, torch.ones(len(states)), **SETTING)


TERMS = {"forward": FORWARD_KL, "reverse": REVERSE_KL, "mix": DISTILL_MIX, "jsd": jsd_terms(0.3)}


@pytest.fixture(params=[1 << 20, 3000], ids=["one block", "many blocks"])
def _blocks(request, monkeypatch):
    # A constant of the machine's caches, not of the result.
    monkeypatch.setattr(one_pass, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_those_of_the_dense_form(name):
    states, weight, teacher, head = _inputs()
    logits = teacher @ head.T
    student = StudentRows(states, weight)
    reference = _gradients(_dense(name, states, weight, logits), states, weight)
    hidden = hidden_one_pass(student, teacher, OutputHead(head), terms=TERMS[name], **SETTING)
    dense = dense_one_pass(student, (logits / TEMPERATURE).log_softmax(-1), terms=TERMS[name], **SETTING)
    for loss in (hidden, dense):
        for found, expected in zip(_gradients(loss, states, weight), reference, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_soft_cap_and_a_bias_of_the_teacher_count():
    states, weight, teacher, head = _inputs()
    bias = torch.linspace(-1, 1, V, dtype=torch.float64)
    logits = 3.0 * torch.tanh((teacher @ head.T + bias) / 3.0)
    reference = _gradients(_dense("mix", states, weight, logits), states, weight)
    loss = hidden_one_pass(
        StudentRows(states, weight), teacher, OutputHead(head, bias, 3.0), terms=DISTILL_MIX, **SETTING
    )
    for found, expected in zip(_gradients(loss, states, weight), reference, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def _kept(logits: Tensor, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, ids = (logits / TEMPERATURE).log_softmax(-1).topk(k)
    return ids, logprobs, torch.log1p(-logprobs.exp().sum(-1))


def _both_topk(states, weight, ids, logprobs, tail):
    one = topk_one_pass(StudentRows(states, weight), ids, logprobs, terms=DISTILL_MIX, tail_logprob_M=tail, **SETTING)
    two = distill_divergence_topk(
        states @ weight.T, ids, logprobs, torch.ones(len(states)), tail_logprob_BT=tail, **SETTING
    )
    return _gradients(one, states, weight), _gradients(two, states, weight)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_kept_ids_and_tail_give_the_autograd_form(scale):
    """At scale 40 the student is certain, mostly of the wrong id."""
    states, weight, teacher, head = _inputs(scale=scale)
    for found, expected in zip(*_both_topk(states, weight, *_kept(teacher @ head.T)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_a_student_without_a_tail_and_a_teacher_without_one_are_finite():
    _, _, teacher, head = _inputs()
    ids, logprobs, tail = _kept(teacher @ head.T)
    # The student is certain of a kept id, so that in float32 nothing is left outside; every other teacher is certain too.
    certain = torch.zeros(M, V).scatter_(1, ids[:, :1], 300.0)
    logprobs[::2] = torch.tensor([0.0] + [-torch.inf] * (K - 1), dtype=torch.float64)
    tail[::2] = -torch.inf
    eye = torch.eye(V).requires_grad_()
    rows = certain.requires_grad_()
    one, two = _both_topk(rows, eye, ids, logprobs.float(), tail.float())
    assert all(bool(part.isfinite().all()) for part in one)
    for found, expected in zip(one, two, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["forward", "mix"])
def test_ids_that_cannot_be_add_nothing(name):
    states, weight, teacher, head = _inputs()
    logits = (teacher @ head.T).index_fill(1, torch.arange(10), -torch.inf)
    reference = _gradients(_dense(name, states, weight, logits), states, weight)
    loss = dense_one_pass(
        StudentRows(states, weight), (logits / TEMPERATURE).log_softmax(-1), terms=TERMS[name], **SETTING
    )
    for found, expected in zip(_gradients(loss, states, weight), reference, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_gradient_can_be_asked_for_twice_and_is_scaled():
    states, weight, teacher, head = _inputs()
    setting = {**SETTING, "temperature": 1.0}
    loss = hidden_one_pass(StudentRows(states, weight), teacher, OutputHead(head), terms=DISTILL_MIX, **setting)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    second = torch.autograd.grad(3.0 * loss, weight)[0]
    torch.testing.assert_close(second, 3.0 * first)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_wants_no_gradient_gets_none(frozen):
    inputs = list(_inputs())
    inputs[frozen] = inputs[frozen].detach()
    states, weight, teacher, head = inputs
    loss = hidden_one_pass(StudentRows(states, weight), teacher, OutputHead(head), terms=DISTILL_MIX, **SETTING)
    loss.backward()
    reference = _gradients(_dense("mix", states, weight, teacher @ head.T), inputs[1 - frozen])[1]
    torch.testing.assert_close(inputs[1 - frozen].grad, reference, rtol=1e-9, atol=1e-12)
    assert inputs[frozen].grad is None


def test_bfloat16_states_under_autocast_are_computed_in_float32():
    states, weight, teacher, head = _inputs(torch.float32)
    half = states.detach().bfloat16().requires_grad_()
    whole = half.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hidden_one_pass(StudentRows(half, weight), teacher, OutputHead(head), terms=DISTILL_MIX, **SETTING)
    exact = hidden_one_pass(StudentRows(whole, weight), teacher, OutputHead(head), terms=DISTILL_MIX, **SETTING)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)
    rounded, expected = (torch.autograd.grad(x, y)[0] for x, y in ((loss, half), (exact, whole)))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, expected.bfloat16())
    # Where both are bfloat16, so is the matrix product, and the head's gradient is summed in float32.
    frozen = weight.detach().bfloat16()
    torch.autograd.grad(
        hidden_one_pass(StudentRows(half, frozen), teacher, OutputHead(head), terms=DISTILL_MIX, **SETTING), half
    )
    small = weight.detach().bfloat16().requires_grad_()
    loss = hidden_one_pass(StudentRows(half, small), teacher, OutputHead(head), terms=DISTILL_MIX, **SETTING)
    found = torch.autograd.grad(loss, small)[0]
    assert found.dtype == torch.bfloat16
    expected = torch.autograd.grad(
        hidden_one_pass(
            StudentRows(whole, small.detach().float().requires_grad_()),
            teacher,
            OutputHead(head),
            terms=DISTILL_MIX,
            **SETTING,
        ),
        whole,
    )[0]
    torch.testing.assert_close(
        torch.autograd.grad(
            hidden_one_pass(StudentRows(half, small), teacher, OutputHead(head), terms=DISTILL_MIX, **SETTING), half
        )[0].float(),
        expected,
        rtol=0.1,
        atol=2e-3,
    )


def test_nothing_scored_is_zero_and_attached():
    weight = torch.randn(V, D, requires_grad=True)
    states = torch.empty(0, D, requires_grad=True)
    loss = dense_one_pass(StudentRows(states, weight), torch.empty(0, V), terms=DISTILL_MIX, **SETTING)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not weight.grad.any()


def test_mistakes_are_those_of_the_autograd_form():
    states, weight, teacher, head = _inputs()
    ids, logprobs, tail = _kept(teacher @ head.T)
    student = StudentRows(states, weight)
    wrong = {
        "from 0 to 49": (ids + 40, logprobs, SETTING),
        "repeated id": (ids * 0, logprobs, SETTING),
        "kept mass": (ids, logprobs * 0, SETTING),
        "temperature": (ids, logprobs, {**SETTING, "temperature": 0.0}),
        "num_loss_tokens": (ids, logprobs, {**SETTING, "num_loss_tokens": 0}),
    }
    for words, (bad_ids, bad_logprobs, setting) in wrong.items():
        with pytest.raises(ValueError, match=words):
            topk_one_pass(
                student, bad_ids, bad_logprobs, terms=(Term(1.0, "teacher", 0.1),), tail_logprob_M=tail, **setting
            )
