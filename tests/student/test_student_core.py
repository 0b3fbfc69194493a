"""The trunk against a naive float64 reference, and the properties that padding, context and caches must have."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers.cache_utils import DynamicCache

from nexus.student.config import NexusStudentConfig
from nexus.student.core import ContextLayer, NexusStudentCore

VOCAB, WIDTH = 61, 32


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _config(**changes: object) -> NexusStudentConfig:
    sizes: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "port_every": 1,
        "rope_theta": 100.0,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    return NexusStudentConfig(**{**sizes, **changes})


def _core(
    *, gate: float = 0.7, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object
) -> NexusStudentCore:
    """A random trunk whose ports stand open by `gate`."""
    torch.manual_seed(seed)
    core = NexusStudentCore(_config(**changes)).to(dtype).eval()
    for port in core.ports.values():
        torch.nn.init.constant_(port.gate_D, gate)
    return core


def _ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _context(batch: int, length: int = 5, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _pad(rows: list[Tensor], side: str, width: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids padded with random ids to `width`, and their mask."""
    ids, mask = _ids(len(rows), width, seed=99), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def _reference_logits(core: NexusStudentCore, ids_T: Tensor, context_CD: Tensor | None) -> Tensor:
    """One unpadded row, position by position and head by head, straight from the papers' formulas."""
    config, state = core.config, core.state_dict()
    size = config.head_size
    share = config.num_attention_heads // config.num_key_value_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + config.rms_norm_eps).sqrt() * state[name]

    def turn(x_d: Tensor, position: int) -> Tensor:
        out = x_d.clone()
        for pair in range(size // 2):
            angle = position * config.rope_theta ** (-2 * pair / size)
            a, b = x_d[pair], x_d[pair + size // 2]
            out[pair] = a * math.cos(angle) - b * math.sin(angle)
            out[pair + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def attend(prefix: str, queries: list[Tensor], memory: list[Tensor], *, causal: bool) -> list[Tensor]:
        results = []
        for t, query in enumerate(queries):
            heads = []
            for head in range(config.num_attention_heads):
                rows, kv = slice(head * size, (head + 1) * size), head // share
                kv_rows = slice(kv * size, (kv + 1) * size)
                q = state[f"{prefix}.q_proj.weight"][rows] @ query
                scores, values = [], []
                for s, item in enumerate(memory[: t + 1] if causal else memory):
                    k = state[f"{prefix}.k_proj.weight"][kv_rows] @ item
                    pair = (turn(q, t), turn(k, s)) if causal else (q, k)
                    scores.append(pair[0] @ pair[1] / math.sqrt(size))
                    values.append(state[f"{prefix}.v_proj.weight"][kv_rows] @ item)
                weights = torch.stack(scores).softmax(0)
                heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
            results.append(state[f"{prefix}.o_proj.weight"] @ torch.cat(heads))
        return results

    hidden = [state["embed_tokens.weight"][token] for token in ids_T]
    for index in range(config.num_hidden_layers):
        if context_CD is not None and index in config.port_layers:
            name = f"ports.{index}"
            queries = [norm(h, f"{name}.norm.weight") for h in hidden]
            memory = [norm(c, f"{name}.context_norm.weight") for c in context_CD]
            read = attend(name, queries, memory, causal=False)
            hidden = [h + state[f"{name}.gate_D"].tanh() * r for h, r in zip(hidden, read, strict=True)]
        name = f"layers.{index}"
        normed = [norm(h, f"{name}.input_norm.weight") for h in hidden]
        attended = attend(f"{name}.self_attn", normed, normed, causal=True)
        hidden = [h + a for h, a in zip(hidden, attended, strict=True)]
        for t, h in enumerate(hidden):
            x = norm(h, f"{name}.mlp_norm.weight")
            gate = state[f"{name}.mlp.gate_proj.weight"] @ x
            inner = gate * gate.sigmoid() * (state[f"{name}.mlp.up_proj.weight"] @ x)
            hidden[t] = h + state[f"{name}.mlp.down_proj.weight"] @ inner
    return torch.stack([state["lm_head.weight"] @ norm(h, "norm.weight") for h in hidden])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("with_context", [True, False])
def test_logits_equal_a_naive_float64_reference(tied: bool, with_context: bool) -> None:
    core = _core(tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(1)
    for norm in [m for m in core.modules() if isinstance(m, torch.nn.RMSNorm)]:
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    ids_BT, context_BCD = _ids(2, 6), _context(2)
    with torch.no_grad():
        logits_BTV = core(ids_BT, context_BCD=context_BCD if with_context else None).logits
    for row in range(2):
        expected = _reference_logits(core, ids_BT[row], context_BCD[row] if with_context else None)
        torch.testing.assert_close(logits_BTV[row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_padding_and_neighbours_change_no_logit(side: str, dtype: torch.dtype, atol: float) -> None:
    core = _core(dtype=dtype)
    rows = [_ids(1, length, seed=length)[0] for length in (3, 7, 5)]
    context_BCD = _context(3, dtype=dtype)
    ids_BT, mask_BT = _pad(rows, side, 9)
    with torch.no_grad():
        padded_BTV = core(ids_BT, mask_BT, context_BCD=context_BCD).logits
        for index, row in enumerate(rows):
            alone_TV = core(row[None], context_BCD=context_BCD[index : index + 1]).logits[0]
            torch.testing.assert_close(padded_BTV[index][mask_BT[index].bool()], alone_TV, rtol=0, atol=atol)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_padding_cannot_reach_a_real_token(side: str) -> None:
    core = _core()
    ids_BT, mask_BT = _pad([_ids(1, 4)[0]], side, 7)
    other_BT = torch.where(mask_BT.bool(), ids_BT, (ids_BT + 13) % VOCAB)
    with torch.no_grad():
        first, second = (core(ids, mask_BT).logits[mask_BT.bool()] for ids in (ids_BT, other_BT))
    assert torch.equal(first, second)
    assert not torch.equal(ids_BT, other_BT)


def test_a_later_token_cannot_change_an_earlier_logit() -> None:
    core = _core()
    ids_BT = _ids(2, 8)
    changed_BT = ids_BT.clone()
    changed_BT[:, 5] = (changed_BT[:, 5] + 1) % VOCAB
    with torch.no_grad():
        before, after = core(ids_BT).logits, core(changed_BT).logits
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_only_distances_between_positions_matter() -> None:
    core = _core()
    ids_BT = _ids(2, 6)
    shifted = torch.arange(6)[None] + 11
    with torch.no_grad():
        torch.testing.assert_close(core(ids_BT, position_ids=shifted).logits, core(ids_BT).logits, rtol=0, atol=1e-10)
        stretched = core(ids_BT, position_ids=2 * torch.arange(6)[None]).logits
    assert not torch.allclose(stretched, core(ids_BT).logits)


def test_bfloat16_tells_neighbouring_far_positions_apart() -> None:
    core = _core(dtype=torch.bfloat16)
    near = torch.tensor([[256, 257, 258]])
    same = torch.tensor([[256, 258, 258]])  # what bfloat16 positions would round to
    ids_BT = _ids(1, 3)
    with torch.no_grad():
        assert not torch.equal(core(ids_BT, position_ids=near).logits, core(ids_BT, position_ids=same).logits)


def test_an_untrained_port_changes_nothing_at_all() -> None:
    torch.manual_seed(0)
    core = NexusStudentCore(_config())
    assert all((port.gate_D == 0).all() for port in core.ports.values())
    ids_BT = _ids(2, 6)
    with torch.no_grad():
        assert torch.equal(core(ids_BT, context_BCD=_context(2, dtype=torch.float32)).logits, core(ids_BT).logits)


def test_a_shut_gate_still_receives_gradient_so_that_it_can_open() -> None:
    core = _core(gate=0.0)
    ids_BT, context_BCD = _ids(2, 6), _context(2).requires_grad_()
    core(ids_BT, context_BCD=context_BCD, labels=ids_BT).loss.backward()
    assert all(port.gate_D.grad.abs().max() > 0 for port in core.ports.values())
    assert (context_BCD.grad == 0).all()
    core = _core(gate=0.5)
    core(ids_BT, context_BCD=context_BCD, labels=ids_BT).loss.backward()
    assert context_BCD.grad.abs().max() > 0


def test_a_row_without_context_gets_exactly_none_and_no_nan() -> None:
    core = _core(dtype=torch.float32)
    ids_BT, context_BCD = _ids(2, 6), _context(2, dtype=torch.float32).requires_grad_()
    mask_BC = torch.tensor([[True] * 5, [False] * 5])
    output = core(ids_BT, context_BCD=context_BCD, context_mask_BC=mask_BC, labels=ids_BT)
    output.loss.backward()
    assert torch.isfinite(context_BCD.grad).all()
    assert (context_BCD.grad[1] == 0).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in core.parameters())
    assert torch.equal(output.logits[1], core(ids_BT).logits[1])
    assert not torch.equal(output.logits[0], core(ids_BT).logits[0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_context_tokens_are_as_good_as_absent(poison: float) -> None:
    core = _core()
    ids_BT, context_BCD = _ids(2, 6), _context(2)
    mask_BC = torch.tensor([[1, 1, 0, 1, 0]] * 2)
    poisoned_BCD = context_BCD.masked_fill(mask_BC[..., None] == 0, poison)
    with torch.no_grad():
        masked = core(ids_BT, context_BCD=poisoned_BCD, context_mask_BC=mask_BC).logits
        absent = core(ids_BT, context_BCD=context_BCD[:, [0, 1, 3]]).logits
    torch.testing.assert_close(masked, absent, rtol=0, atol=1e-12)


def _greedy_without_cache(core: NexusStudentCore, ids_T: Tensor, steps: int, context_CD: Tensor | None) -> Tensor:
    """The definition of greedy decoding: the whole text through the trunk for every token."""
    for _ in range(steps):
        context_BCD = None if context_CD is None else context_CD[None]
        with torch.no_grad():
            logits_BTV = core(ids_T[None], context_BCD=context_BCD, use_cache=False).logits
        ids_T = torch.cat((ids_T, logits_BTV[0, -1:].argmax(-1)))
    return ids_T[-steps:]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_context", [True, False])
def test_generate_equals_steps_without_cache_whatever_the_batch_and_padding(side: str, with_context: bool) -> None:
    core = _core()
    rows = [_ids(1, length, seed=length)[0] for length in (3, 6, 4)]
    context_BCD = _context(3)
    mask_BC = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    ids_BT, mask_BT = _pad(rows, side, 8)
    contexts = {"context_BCD": context_BCD, "context_mask_BC": mask_BC} if with_context else {}
    generated = core.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=7, do_sample=False, pad_token_id=0, **contexts
    )[:, 8:]
    for index, row in enumerate(rows):
        own_CD = context_BCD[index][mask_BC[index]] if with_context and mask_BC[index].any() else None
        assert torch.equal(generated[index], _greedy_without_cache(core, row, 7, own_CD)), index


def test_cached_steps_equal_one_pass_over_the_whole_text() -> None:
    core = _core()
    ids_BT, context_BCD = _ids(2, 9), _context(2)
    with torch.no_grad():
        whole_BTV = core(ids_BT, context_BCD=context_BCD).logits
        cache = DynamicCache()  # without a configuration: its layers grow on demand
        parts = []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            output = core(
                ids_BT[:, start:stop],
                context_BCD=context_BCD,
                past_key_values=cache,
                cache_position=torch.arange(start, stop),
            )
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV, rtol=0, atol=1e-11)


def test_a_returned_cache_continues_the_text_also_with_gradients_on() -> None:
    core = _core()
    ids_BT, context_BCD = _ids(2, 6), _context(2)
    first = core(ids_BT[:, :4], context_BCD=context_BCD)
    second = core(ids_BT[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, core(ids_BT, context_BCD=context_BCD).logits[:, 4:], rtol=0, atol=1e-11)
    assert core(ids_BT, use_cache=False).past_key_values is None
    assert core(ids_BT, labels=ids_BT).past_key_values is None


def _count_projections(core: NexusStudentCore) -> list[int]:
    calls: list[int] = []
    for index, port in core.ports.items():
        port.k_proj.register_forward_hook(lambda *_, index=index: calls.append(int(index)))
    return calls


def test_a_context_is_projected_once_per_port_and_generation() -> None:
    core = _core()
    calls = _count_projections(core)
    core.generate(_ids(2, 4), context_BCD=_context(2), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert sorted(calls) == [1, 2]


def test_another_context_replaces_the_one_in_the_cache_and_none_keeps_it() -> None:
    core = _core()
    calls = _count_projections(core)
    ids_BT, context_BCD, other_BCD = _ids(1, 4), _context(1), _context(1, seed=8)
    with torch.no_grad():
        cache = core(ids_BT, context_BCD=context_BCD).past_key_values
        core(ids_BT[:, :1], past_key_values=cache)
        assert len(calls) == 2
        changed = core(ids_BT[:, :1], past_key_values=cache, context_BCD=other_BCD).logits
        assert len(calls) == 4
        cache = core(ids_BT, context_BCD=context_BCD).past_key_values
        core(ids_BT[:, :1], past_key_values=cache)
        kept = core(ids_BT[:, :1], past_key_values=cache).logits
    assert not torch.allclose(changed, kept)


def test_beam_search_with_a_cache_equals_beam_search_without() -> None:
    core = _core()
    ids_BT, mask_BT = _pad([_ids(1, 3)[0], _ids(1, 5, seed=2)[0]], "left", 5)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "context_BCD": _context(2)}
    cached = core.generate(ids_BT, attention_mask=mask_BT, **options)
    uncached = core.generate(ids_BT, attention_mask=mask_BT, use_cache=False, **options)
    assert torch.equal(cached, uncached)


def test_a_held_context_follows_the_rows_of_its_cache() -> None:
    core = _core()
    ids_BT, context_BCD = _ids(3, 4), _context(3)
    mask_BC = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    next_BT = _ids(3, 1, seed=5)

    def continued(rows: Tensor, change: str, argument: Tensor | int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            cache = core(ids_BT, context_BCD=context_BCD, context_mask_BC=mask_BC).past_key_values
            getattr(cache, change)(argument)
            got = core(next_BT[rows], past_key_values=cache).logits
            whole = torch.cat((ids_BT, next_BT), dim=1)[rows]
            expected = core(whole, context_BCD=context_BCD[rows], context_mask_BC=mask_BC[rows]).logits[:, -1:]
        return got, expected

    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(*continued(order, "reorder_cache", order), rtol=0, atol=1e-11)
    few = torch.tensor([1])
    torch.testing.assert_close(*continued(few, "batch_select_indices", few), rtol=0, atol=1e-11)
    twice = torch.tensor([0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(*continued(twice, "batch_repeat_interleave", 2), rtol=0, atol=1e-11)


def test_cropping_a_cache_forgets_tokens_but_not_the_context() -> None:
    core = _core()
    ids_BT, context_BCD = _ids(1, 6), _context(1)
    with torch.no_grad():
        cache = core(ids_BT, context_BCD=context_BCD).past_key_values
        cache.crop(-2)
        again = core(ids_BT[:, 4:], past_key_values=cache).logits
        expected = core(ids_BT, context_BCD=context_BCD).logits[:, 4:]
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-11)


def test_a_reset_or_empty_context_layer_holds_nothing_and_follows_no_row() -> None:
    core = _core()
    with torch.no_grad():
        cache = core(_ids(1, 3), context_BCD=_context(1)).past_key_values
        cache.reset()
        assert torch.equal(core(_ids(1, 3), past_key_values=cache).logits, core(_ids(1, 3)).logits)
    layer = ContextLayer()
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([0]))
    assert layer.source is None
    assert layer.mask_BC is None


def test_loss_scores_the_next_token_and_leaves_out_ignored_labels() -> None:
    core = _core()
    ids_BT = _ids(2, 7)
    labels_BT = ids_BT.clone()
    labels_BT[0, :4] = -100
    labels_BT[1, 6] = -100
    output = core(ids_BT, labels=labels_BT)
    log_probs = output.logits.log_softmax(-1)
    expected = [
        -log_probs[b, t, labels_BT[b, t + 1]] for b in range(2) for t in range(6) if labels_BT[b, t + 1] != -100
    ]
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())
    changed_BT = labels_BT.clone()
    changed_BT[:, 0] = 1  # nothing predicts the first token
    assert torch.equal(core(ids_BT, labels=changed_BT).loss, output.loss)


def test_a_batch_without_a_scored_label_has_zero_loss_that_still_trains() -> None:
    core = _core()
    loss = core(_ids(2, 5), labels=torch.full((2, 5), -100)).loss
    loss.backward()
    assert loss == 0
    assert (core.embed_tokens.weight.grad == 0).all()


def test_low_precision_logits_are_scored_in_float32() -> None:
    core = _core(dtype=torch.bfloat16)
    ids_BT = _ids(1, 5)
    output = core(ids_BT, labels=ids_BT)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    expected = F.cross_entropy(output.logits[0, :-1].float(), ids_BT[0, 1:])
    torch.testing.assert_close(output.loss, expected)


def test_kept_logits_are_the_last_ones_of_each_rows_text() -> None:
    core = _core()
    rows = [_ids(1, length, seed=length)[0] for length in (2, 6)]
    with torch.no_grad():
        for side in ("left", "right"):
            ids_BT, mask_BT = _pad(rows, side, 6)
            full = core(ids_BT, mask_BT).logits
            kept = core(ids_BT, mask_BT, logits_to_keep=2).logits
            for index in range(2):
                assert torch.equal(kept[index], full[index][mask_BT[index].bool()][-2:])
        torch.testing.assert_close(core(ids_BT, logits_to_keep=3).logits, core(ids_BT).logits[:, -3:])
        assert core(ids_BT, mask_BT, logits_to_keep=50).logits.shape[1] == 6


def test_lower_states_are_those_below_the_first_port() -> None:
    core = _core(num_hidden_layers=5, port_every=2)
    ids_BT, mask_BT = _pad([_ids(1, 3)[0], _ids(1, 5)[0]], "left", 5)
    with torch.no_grad():
        output = core(ids_BT, mask_BT, context_BCD=_context(2), output_hidden_states=True)
        assert torch.equal(core.lower_states(ids_BT, mask_BT), output.hidden_states[2])
        assert torch.equal(core.lower_states(ids_BT), core(ids_BT, output_hidden_states=True).hidden_states[2])
    assert len(output.hidden_states) == 6
    torch.testing.assert_close(core.lm_head(output.hidden_states[-1]), output.logits)


def test_embeddings_may_be_passed_instead_of_ids() -> None:
    core = _core()
    ids_BT = _ids(2, 5)
    with torch.no_grad():
        assert torch.equal(core(inputs_embeds=core.embed_tokens(ids_BT)).logits, core(ids_BT).logits)


def test_a_tuple_is_returned_when_no_dictionary_is_wanted() -> None:
    core = _core()
    ids_BT = _ids(1, 4)
    with torch.no_grad():
        logits, cache = core(ids_BT, return_dict=False)
        assert torch.equal(logits, core(ids_BT).logits)
    assert isinstance(cache, DynamicCache)


@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_keeps_every_bit(tmp_path, tied: bool) -> None:
    core = _core(dtype=torch.float32, tie_word_embeddings=tied)
    core.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    loaded = NexusStudentCore.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == core.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in core.state_dict().items())
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) is tied
    where = {"_name_or_path", "dtype", "architectures"}  # what saving and loading may fill in
    kept, found = ({k: v for k, v in c.to_dict().items() if k not in where} for c in (core.config, loaded.config))
    assert found == kept
    with torch.no_grad():
        context_BCD = _context(1, dtype=torch.float32)
        assert torch.equal(
            loaded(_ids(1, 4), context_BCD=context_BCD).logits, core(_ids(1, 4), context_BCD=context_BCD).logits
        )


def test_equal_seeds_build_equal_trunks() -> None:
    first, second, third = _core(), _core(), _core(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embed_tokens.weight, third.embed_tokens.weight)


def test_contradictory_inputs_are_named() -> None:
    core = _core()
    ids_BT = _ids(2, 4)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        core()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        core(ids_BT, inputs_embeds=core.embed_tokens(ids_BT))
    with pytest.raises(ValueError, match="logits_to_keep=1"):
        core(ids_BT, labels=ids_BT, logits_to_keep=1)
    with pytest.raises(ValueError, match=r"\(2, 4\), found \(2, 3\)"):
        core(ids_BT, torch.ones(2, 3))
    with pytest.raises(ValueError, match="begin at the 0 cached tokens, found 2"):
        core(ids_BT, cache_position=torch.arange(2, 6))
    with pytest.raises(ValueError, match=r"context_BCD of shape \(2, C, 32\), found \(3, 5, 32\)"):
        core(ids_BT, context_BCD=_context(3))
    with pytest.raises(ValueError, match=r"context_mask_BC of shape \(2, 5\), found \(2, 4\)"):
        core(ids_BT, context_BCD=_context(2), context_mask_BC=torch.ones(2, 4))
    with pytest.raises(ValueError, match="context_BCD beside context_mask_BC"):
        core(ids_BT, context_mask_BC=torch.ones(2, 4))
