"""The four transports of a language model's distributions, and the choice among them, against its own dense logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Cohere2Config, Cohere2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nexus.errors import ConfigError
from nexus.towers.causal_lm import completion_logits, output_head
from nexus.towers.engine import TeacherEngine
from nexus.towers.health import UniformOutputError, check_targets
from nexus.towers.packing import bytes_per_token, pack_tokens
from nexus.towers.rows import RowsError
from nexus.towers.targets import FullTargets, HiddenTargets, SampledTargets, TokenTargets
from nexus.towers.transports import keep_columns, to_targets

PROMPTS, COMPLETIONS = ("2+2?", "one", "a longer question"), ("4", "", "because")
V = 104


@pytest.fixture(params=["qwen", "gemma"])
def engine(request: pytest.FixtureRequest) -> TeacherEngine:
    return TeacherEngine(request.getfixturevalue(request.param), teacher_id="tiny")


@pytest.fixture
def asked(text_request):
    return text_request(PROMPTS, COMPLETIONS, temperature=1.5)


@pytest.fixture
def dense(engine) -> torch.Tensor:
    """float64 log-probabilities [N, V] at temperature 1.5, in the rows' order."""
    rows = [
        next(completion_logits(engine.tower.model, engine.tower.tokenizer, [prompt], [text]))
        for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    return (torch.cat(rows).double() / 1.5).log_softmax(-1)


def test_the_full_transport_is_the_whole_distribution(engine, asked, dense):
    tokens = engine.score(replace(asked, transport="full")).tokens
    assert isinstance(tokens, FullTargets)
    assert tokens.offsets_B1.tolist() == [0, 2, 3, 11]
    np.testing.assert_allclose(tokens.logprobs_NV, dense, atol=2e-5)


@pytest.mark.parametrize("completions", [("4", "5"), ("4", "55")], ids=["rows of one length", "padded rows"])
def test_at_temperature_1_the_distribution_is_that_of_the_logits(engine, text_request, completions):
    prompts = ("2+2?", "2+3?")
    request = replace(text_request(prompts, completions, temperature=1.0), transport="full")
    tokens = engine.score(request).tokens
    assert (len(set(np.diff(tokens.offsets_B1).tolist())) == 1) is (completions == ("4", "5"))
    rows = [
        next(completion_logits(engine.tower.model, engine.tower.tokenizer, [prompt], [text]))
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    np.testing.assert_allclose(tokens.logprobs_NV, torch.cat(rows).double().log_softmax(-1), atol=2e-5)


def test_hidden_states_and_the_head_give_the_teacher_s_own_logits(engine, asked, dense):
    tokens = engine.score(replace(asked, transport="hidden")).tokens
    assert isinstance(tokens, HiddenTargets)
    head = engine.output_head()
    assert engine.output_head() is head
    logits = tokens.states_NH @ head.weight_VH.T
    if head.softcap is not None:
        logits = head.softcap * np.tanh(logits / head.softcap)
    np.testing.assert_allclose(torch.from_numpy(logits / 1.5).log_softmax(-1), dense, atol=2e-5)


def test_draws_are_those_of_the_teacher_and_of_their_row(engine, asked, dense):
    request = replace(asked, transport="sampled", draws=4000)
    tokens = engine.score(request).tokens
    assert isinstance(tokens, SampledTargets)
    drawn = np.stack([np.bincount(ids, minlength=V) / 4000 for ids in tokens.ids_NS])
    # Frequencies of 4,000 draws: a standard deviation is at most 0.008.
    np.testing.assert_allclose(drawn, dense.exp(), atol=0.04)
    np.testing.assert_allclose(
        tokens.logprobs_NS, np.take_along_axis(dense.numpy(), tokens.ids_NS.astype(int), 1), atol=2e-5
    )
    turned = replace(
        request, row_ids=request.row_ids[::-1], prompts=request.prompts[::-1], completions=request.completions[::-1]
    )
    again = engine.score(turned).tokens
    np.testing.assert_array_equal(again.ids_NS[:8], tokens.ids_NS[3:])
    renamed = engine.score(replace(request, row_ids=("x", "y", "z"))).tokens
    assert (renamed.ids_NS != tokens.ids_NS).any()


def _logits(scale: float, *, tokens: int = 20, vocabulary: int = 600) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(0)) * scale


def _auto(logits, asked, max_error, *, width=400):
    request = replace(asked, transport="auto", max_error=max_error, temperature=1.0)
    columns, finite = keep_columns(logits, torch.zeros(len(logits), width), request, ["a"], [len(logits)])
    assert finite.all()
    found = to_targets(
        {name: column.numpy() for name, column in columns.items()},
        request,
        offsets_B1=np.array([0, len(logits)]),
        token_ids_N=np.zeros(len(logits), np.int32),
        vocabulary_size=logits.shape[1],
    )
    return found, columns["errors"]


def test_the_error_of_every_k_is_the_divergence_to_an_even_tail(text_request):
    asked = text_request(PROMPTS, COMPLETIONS)
    logits = _logits(2.0)
    logprobs = logits.double().log_softmax(-1)
    _, errors = _auto(logits, asked, 1.0)
    for j, k in enumerate([1, 2, 4, 8, 16, 32, 64, 128, 256, 512]):
        kept, ids = logprobs.topk(k)
        outside = torch.log1p(-kept.exp().sum(-1, keepdim=True)) - np.log(600 - k)
        said = outside.expand_as(logprobs).scatter(-1, ids, kept)
        reference = (logprobs.exp() * (logprobs - said)).sum(-1)
        # The kept log-probabilities are float32: relative roundings of numbers of size 10.
        torch.testing.assert_close(errors[:, j].double(), reference, atol=5e-6, rtol=1e-4)


def test_auto_takes_the_fewest_bytes_that_keep_the_error(text_request):
    asked = text_request(PROMPTS, COMPLETIONS)
    sizes = []
    for max_error in (0.5, 0.1, 0.02):
        found, errors = _auto(_logits(3.0), asked, max_error)
        assert isinstance(found, TokenTargets)
        k = found.ids_NK.shape[1]
        j = k.bit_length() - 1
        assert errors[:, j].mean() <= max_error < errors[:, j - 1].mean()
        np.testing.assert_allclose(np.exp(found.logprobs_NK).sum(1) + np.exp(found.tail_logprob_N), 1.0, rtol=1e-5)
        packed = pack_tokens(found, vocabulary_size=600)
        assert packed.num_bytes - 4 == len(found.token_ids_N) * bytes_per_token("topk", width=k, vocabulary_size=600)
        sizes.append(packed.num_bytes)
    assert sizes == sorted(set(sizes))
    # Flat distributions need so many ids that the states are smaller; of a small vocabulary all of it is.
    assert isinstance(_auto(_logits(0.5), asked, 1e-3, width=200)[0], HiddenTargets)
    flat = _logits(0.5, vocabulary=64)
    found, _ = _auto(flat, asked, 1e-4)
    assert isinstance(found, FullTargets)
    torch.testing.assert_close(torch.from_numpy(found.logprobs_NV), flat.log_softmax(-1))
    assert isinstance(_auto(flat, asked, 1e-4, width=30)[0], HiddenTargets)


def test_auto_without_a_token_still_answers(text_request):
    found, _ = _auto(_logits(1.0, tokens=0), text_request((), ()), 0.1)
    assert isinstance(found, TokenTargets)
    assert found.ids_NK.shape == (0, 1)


def test_auto_of_a_real_teacher_keeps_its_error(engine, asked, dense):
    tokens = engine.score(replace(asked, transport="auto", max_error=0.3)).tokens
    assert isinstance(tokens, TokenTargets)
    k = tokens.ids_NK.shape[1]
    kept, _ = dense.topk(k)
    np.testing.assert_allclose(tokens.logprobs_NK, kept, atol=2e-5)
    np.testing.assert_allclose(np.exp(tokens.tail_logprob_N), 1 - kept.exp().sum(-1), atol=1e-5)


@pytest.mark.parametrize("transport", ["hidden", "sampled", "full", "auto"])
def test_rows_without_end_are_columns_of_no_length(qwen, text_request, transport):
    request = replace(text_request((), ()), transport=transport, draws=3, max_error=0.1)
    targets = TeacherEngine(qwen, teacher_id="tiny").score(request)
    assert targets.tokens.offsets_B1.tolist() == [0]
    assert len(targets.tokens.token_ids_N) == 0


def test_results_that_are_not_finite_name_their_row(engine, asked):
    layer = engine.tower.model.model.norm
    handle = layer.register_forward_hook(
        lambda _m, _i, out: out.index_fill(0, torch.tensor([out.shape[0] - 1]), torch.nan)
    )
    engine._head = object()  # a broken model's head is not what is looked at here
    try:
        for transport in ("hidden", "sampled", "full", "auto"):
            with pytest.raises(RowsError, match="finite"):
                engine.score(replace(asked, transport=transport, draws=2, max_error=0.1))
    finally:
        handle.remove()


def test_a_uniform_teacher_is_told_in_every_transport(qwen, text_request):
    request = text_request(PROMPTS, COMPLETIONS)
    sound = TeacherEngine(qwen, teacher_id="tiny").score(request)
    scored = (sound.tokens.offsets_B1, sound.tokens.token_ids_N)
    flat = np.full((11, V), -np.log(V), np.float32)
    for tokens in (
        FullTargets(*scored, flat),
        SampledTargets(*scored, np.zeros((11, 3), np.int32), flat[:, :3]),
        HiddenTargets(*scored, np.zeros((11, 8), np.float32)),
    ):
        with pytest.raises(UniformOutputError, match="11 uniform"):
            check_targets(replace(sound, tokens=tokens), vocabulary_size=V)


def test_a_head_that_is_more_than_a_head_is_refused(text_config, qwen, text_request):
    scaled = Cohere2ForCausalLM(Cohere2Config(**text_config, sliding_window=8, logit_scale=0.25)).eval()
    with pytest.raises(ValueError, match="a linear map of the last hidden state"):
        output_head(scaled)
    engine = TeacherEngine(replace(qwen, model=scaled), teacher_id="tiny")
    with pytest.raises(ConfigError, match=r"'tiny'.*Choose topk"):
        engine.score(replace(text_request(PROMPTS, COMPLETIONS), transport="hidden"))
    model = Qwen3ForCausalLM(Qwen3Config(**text_config))
    model.lm_head = torch.nn.Sequential(model.lm_head)
    model.lm_head.weight = model.lm_head[0].weight
    with pytest.raises(ValueError, match="found Sequential"):
        output_head(model)


def test_a_bfloat16_head_travels_bit_by_bit(text_config):
    model = Qwen3ForCausalLM(Qwen3Config(**text_config)).bfloat16().eval()
    model.lm_head.bias = torch.nn.Parameter(torch.arange(V, dtype=torch.bfloat16) / 8)
    head = output_head(model)
    assert head.weight_VH.dtype == np.uint16
    torch.testing.assert_close(torch.from_numpy(head.weight_VH).view(torch.bfloat16), model.lm_head.weight.data)
    np.testing.assert_array_equal(head.bias_V, np.arange(V, dtype=np.float32) / 8)


def test_other_roles_have_one_transport(siglip, media_request, png):
    engine = TeacherEngine(siglip, teacher_id="eyes")
    with pytest.raises(ConfigError, match="found hidden"):
        engine.score(replace(media_request((png(0),)), transport="hidden"))
