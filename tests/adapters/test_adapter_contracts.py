"""What every adapter promises: shapes, masks, alignments, configuration as JSON, and that each does its own thing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nexus.adapters import (
    Adapter,
    Alignment,
    AudioAdapter,
    AudioAdapterConfig,
    ReasoningAdapter,
    ReasoningAdapterConfig,
    VisionAdapter,
    VisionAdapterConfig,
)
from nexus.adapters.base import Attention, masked_mean
from nexus.errors import ConfigError

D, W = 24, 16
ALIGNMENTS = (Alignment("tiny/teacher.a", 3, 40), Alignment("tiny/teacher.a", "pooled", 12), Alignment("b", 3, 8))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _reasoning(**changes: object) -> ReasoningAdapter:
    torch.manual_seed(0)
    sizes = {"context_width": D, "width": W, "num_layers": 2, "num_heads": 2, "num_context_tokens": 3}
    return ReasoningAdapter(ReasoningAdapterConfig(**{**sizes, "alignments": ALIGNMENTS, **changes})).double()


def _vision(encoder: nn.Module | None = None, **changes: object) -> VisionAdapter:
    torch.manual_seed(0)
    sizes = {
        "context_width": D,
        "width": W,
        "num_layers": 2,
        "num_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
    }
    return VisionAdapter(VisionAdapterConfig(**{**sizes, "alignments": ALIGNMENTS, **changes}), encoder).double()


def _audio(encoder: nn.Module | None = None, **changes: object) -> AudioAdapter:
    torch.manual_seed(0)
    sizes = {"context_width": D, "width": W, "num_layers": 2, "num_heads": 2, "num_mels": 6}
    return AudioAdapter(AudioAdapterConfig(**{**sizes, "alignments": ALIGNMENTS, **changes}), encoder).double()


def _inputs(adapter: Adapter, batch: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = {ReasoningAdapter: (7, D), VisionAdapter: (1, 8, 8), AudioAdapter: (6, 7)}[type(adapter)]
    return torch.randn(batch, *shape, dtype=torch.float64, generator=generator)


def _mask(adapter: Adapter, batch: int = 3) -> Tensor:
    """Rows with all, some and no real inputs."""
    length = {ReasoningAdapter: 7, VisionAdapter: 4, AudioAdapter: 7}[type(adapter)]
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0], mask[1, :3] = True, True
    return mask


MAKERS = [_reasoning, _vision, _audio]


@pytest.mark.parametrize(("make", "tokens", "features"), [(_reasoning, 3, 7), (_vision, 4, 4), (_audio, 4, 4)])
def test_shapes_and_a_full_mask_by_default(make, tokens: int, features: int) -> None:
    adapter = make()
    context_BCD, mask_BC = adapter(_inputs(adapter))
    assert context_BCD.shape == (3, tokens, D)
    assert mask_BC.shape == (3, tokens)
    assert mask_BC.dtype == torch.bool
    assert mask_BC.all()
    encoded = adapter.features(_inputs(adapter))
    assert encoded.tokens_BMW.shape == (3, features, W)
    torch.testing.assert_close(encoded.pooled_BW, encoded.tokens_BMW.mean(1))


@pytest.mark.parametrize("make", [_vision, _audio])
def test_learned_queries_give_the_number_of_context_tokens_asked_for(make) -> None:
    context_BCD, mask_BC = make(num_context_tokens=2)(_inputs(make()))
    assert context_BCD.shape == (3, 2, D)
    assert mask_BC.all()
    assert not torch.allclose(context_BCD[:, 0], context_BCD[:, 1])


@pytest.mark.parametrize("make", MAKERS)
def test_a_sample_does_not_depend_on_its_neighbours(make) -> None:
    adapter = make()
    inputs, mask = _inputs(adapter), _mask(adapter)
    together, _ = adapter(inputs, mask)
    for row in range(2):
        alone, _ = adapter(inputs[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [_reasoning, _audio, _vision])
def test_masked_inputs_change_no_real_context_token(make, poison: float) -> None:
    adapter = make()
    inputs, mask = _inputs(adapter), _mask(adapter)
    poisoned = inputs.clone()
    if make is _vision:
        poisoned[1, 0, 4:, 4:] = poison  # the fourth patch
    elif make is _reasoning:
        poisoned[1, 3:] = poison
    else:
        poisoned[1, :, 3:] = poison
    clean, mask_BC = adapter(inputs, mask)
    dirty, _ = adapter(poisoned, mask)
    assert torch.equal(clean[mask_BC], dirty[mask_BC])
    assert torch.isfinite(dirty).all()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("num_context_tokens", [2, None])
def test_a_sample_without_real_input_has_no_real_context_and_finite_gradients(
    make, num_context_tokens: int | None
) -> None:
    if make is _reasoning and num_context_tokens is None:
        num_context_tokens = 5
    adapter = make(num_context_tokens=num_context_tokens)
    inputs = _inputs(adapter).requires_grad_()
    context_BCD, mask_BC = adapter(inputs, _mask(adapter))
    assert mask_BC[0].all()
    assert not mask_BC[2].any()
    assert mask_BC[1].any()
    assert (adapter.features(inputs, _mask(adapter)).pooled_BW[2] == 0).all()
    context_BCD[mask_BC].pow(2).sum().backward()
    assert torch.isfinite(inputs.grad).all()
    assert (inputs.grad[2] == 0).all()
    assert inputs.grad[0].abs().max() > 0


@pytest.mark.parametrize("make", MAKERS)
def test_a_mask_of_another_shape_is_refused(make) -> None:
    adapter = make()
    with pytest.raises(ValueError, match=r"mask of shape \(3, \d\), found \(3, 2\)"):
        adapter(_inputs(adapter), torch.ones(3, 2))


@pytest.mark.parametrize("make", MAKERS)
def test_predictions_are_affine_in_the_features_and_have_the_teachers_width(make) -> None:
    adapter = make()
    encoded = adapter.features(_inputs(adapter), _mask(adapter))
    layer = adapter.predict("tiny/teacher.a", 3, encoded)
    assert layer.shape == (*encoded.tokens_BMW.shape[:2], 40)
    assert adapter.predict("tiny/teacher.a", "pooled", encoded).shape == (3, 12)
    assert adapter.predict("b", 3, encoded).shape == (*encoded.tokens_BMW.shape[:2], 8)
    linear = adapter.alignments[0]
    torch.testing.assert_close(layer, encoded.blocks[-1] @ linear.weight.T + linear.bias)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("depth", "block"), [(0.01, 0), (0.3, 0), (0.5, 0), (0.8, 1), (1.0, 1)])
def test_an_alignment_reads_the_block_of_its_depth(make, depth: float, block: int) -> None:
    adapter = make(alignments=(Alignment("b", 3, 8, depth=depth), Alignment("b", "pooled", 8, depth=depth)))
    encoded = adapter.features(_inputs(adapter))
    assert len(encoded.blocks) == 2
    linear, pooled = adapter.alignments
    states = encoded.blocks[block]
    torch.testing.assert_close(adapter.predict("b", 3, encoded), states @ linear.weight.T + linear.bias)
    torch.testing.assert_close(
        adapter.predict("b", "pooled", encoded), encoded.pooled_BW @ pooled.weight.T + pooled.bias
    )
    assert not torch.allclose(encoded.blocks[0], encoded.blocks[1])


@pytest.mark.parametrize("make", MAKERS)
def test_anchoring_a_prediction_trains_what_the_context_is_made_of(make) -> None:
    adapter = make()
    inputs = _inputs(adapter)
    before, _ = adapter(inputs)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter.predict("tiny/teacher.a", 3, adapter.features(inputs)).pow(2).mean().backward()
    assert adapter.to_context.weight.grad is None
    optimizer.step()
    after, _ = adapter(inputs)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("make", MAKERS)
def test_dropping_alignments_keeps_the_context_and_forgets_the_teachers(make) -> None:
    adapter = make()
    inputs = _inputs(adapter)
    before, _ = adapter(inputs)
    encoded = adapter.features(inputs)
    adapter.drop_alignments()
    after, _ = adapter(inputs)
    assert torch.equal(before, after)
    assert not any("alignments" in name for name, _ in adapter.named_parameters())
    assert adapter.config.alignments == ()
    with pytest.raises(KeyError, match="declared alignments"):
        adapter.predict("tiny/teacher.a", 3, encoded)


@pytest.mark.parametrize("make", MAKERS)
def test_a_configuration_survives_json(make) -> None:
    config = make().config
    read = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert read == config
    assert type(config).from_dict({}) == type(config)()


@pytest.mark.parametrize("make", MAKERS)
def test_weights_reload_into_an_equal_adapter(make) -> None:
    first, second = make(), make(alignments=ALIGNMENTS)
    for parameter in second.parameters():
        nn.init.normal_(parameter)
    second.load_state_dict(first.state_dict())
    inputs = _inputs(first)
    assert torch.equal(first(inputs)[0], second(inputs)[0])


def test_mistakes_in_a_configuration_are_named() -> None:
    with pytest.raises(ConfigError, match=r"multiple of its heads, found 16 and 3"):
        _vision(num_heads=3)
    with pytest.raises(ConfigError, match=r"aligned once, found \('b', 3\) twice"):
        _audio(alignments=(Alignment("b", 3, 8), Alignment("b", 3, 9)))
    with pytest.raises(ConfigError, match="'pooled' as the feature to align, found 'patches'"):
        Alignment("b", "patches", 8)
    with pytest.raises(ConfigError, match="width of teacher 'b' above 0, found 0"):
        Alignment("b", 3, 0)
    for depth in (0.0, 1.1):
        with pytest.raises(ConfigError, match=rf"depth of teacher 'b''s feature in \(0, 1\], found {depth}"):
            Alignment("b", 3, 8, depth=depth)
    with pytest.raises(ConfigError, match="found 'widht'"):
        AudioAdapterConfig.from_dict({"widht": 3})
    with pytest.raises(ConfigError, match="num_context_tokens above 0"):
        _reasoning(num_context_tokens=None)
    with pytest.raises(ConfigError, match="multiple of patch_size, found 9 and 4"):
        _vision(image_size=9)


def test_the_thought_of_a_token_depends_on_that_token_alone() -> None:
    adapter = _reasoning()
    inputs = _inputs(adapter)
    changed = inputs.clone()
    changed[:, 4] *= -1.0  # adding a constant would be normalised away
    before, after = adapter.features(inputs).tokens_BMW, adapter.features(changed).tokens_BMW
    same = torch.arange(7) != 4
    torch.testing.assert_close(before[:, same], after[:, same], rtol=0, atol=1e-13)
    assert not torch.allclose(before[:, 4], after[:, 4])


def test_a_narrower_mask_keeps_the_answer_out_of_the_context() -> None:
    adapter = _reasoning()
    inputs = _inputs(adapter)
    prompt = torch.zeros(3, 7, dtype=torch.bool)
    prompt[:, :4] = True
    answered = inputs.clone()
    answered[:, 4:] += 3.0
    narrow, _ = adapter.context(adapter.features(answered), prompt)
    torch.testing.assert_close(narrow, adapter(inputs[:, :4])[0], rtol=0, atol=1e-12)
    wide, _ = adapter.context(adapter.features(answered))
    assert not torch.allclose(wide, narrow)


def test_the_place_of_a_patch_and_of_a_frame_is_seen() -> None:
    vision, audio = _vision(), _audio()
    image = _inputs(vision, 1)
    swapped = torch.cat((image[..., 4:], image[..., :4]), dim=-1)
    tokens = [vision.features(pixels).tokens_BMW[0] for pixels in (image, swapped)]
    assert not torch.allclose(tokens[0][[1, 0, 3, 2]], tokens[1])
    pulses = torch.zeros(2, 6, 16, dtype=torch.float64)
    pulses[0, :, 4], pulses[1, :, 8] = 1.0, 1.0
    frames = audio.features(pulses).tokens_BMW
    assert not torch.allclose(frames[0, 2], frames[1, 4])


def test_patches_mix_in_the_encoder_and_thoughts_do_not() -> None:
    vision = _vision()
    image = _inputs(vision, 1)
    changed = image.clone()
    changed[..., :4, :4] += 1.0
    before, after = vision.features(image).tokens_BMW, vision.features(changed).tokens_BMW
    assert ((before - after).abs().amax(-1) > 1e-6).all()


def test_an_image_or_sound_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\), found \(2, 1, 8, 12\)"):
        _vision()(torch.zeros(2, 1, 8, 12).double())
    with pytest.raises(ValueError, match=r"\(B, 6, frames\), found \(2, 5, 9\)"):
        _audio()(torch.zeros(2, 5, 9).double())
    with pytest.raises(ValueError, match=r"\(B, 6, frames\), found \(6, 9\)"):
        _audio()(torch.zeros(6, 9).double())


class _RecordedEncoder(nn.Module):
    """Stands for a pretrained encoder: gives out what it is given, and counts."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states, self.calls = states, 0

    def forward(self, pixel_values: Tensor | None = None, input_features: Tensor | None = None) -> SimpleNamespace:
        assert (pixel_values is None) != (input_features is None)
        self.calls += 1
        return SimpleNamespace(last_hidden_state=self.states)


@pytest.mark.parametrize("make", [_vision, _audio])
def test_a_wrapped_encoder_replaces_the_own_one(make) -> None:
    states = torch.randn(3, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    encoder = _RecordedEncoder(states)
    adapter = make(encoder, encoder_width=10)
    mask = torch.ones(3, 7 if make is _audio else 4, dtype=torch.bool)
    mask[2] = False
    context_BCD, mask_BC = adapter(_inputs(adapter), mask)
    projected = states @ adapter.project.weight.T + adapter.project.bias
    torch.testing.assert_close(adapter.features(_inputs(adapter)).tokens_BMW, projected)
    assert encoder.calls == 2
    assert context_BCD.shape == (3, 4, D)
    assert mask_BC.tolist() == [[True] * 4, [True] * 4, [False] * 4]
    assert not hasattr(adapter, "blocks")
    linear = adapter.alignments[0]  # a wrapped encoder shows its last states only
    torch.testing.assert_close(
        adapter.predict("tiny/teacher.a", 3, adapter.features(_inputs(adapter))),
        projected @ linear.weight.T + linear.bias,
    )


def test_a_wrapped_encoder_and_its_width_come_together() -> None:
    for make in (_vision, _audio):
        with pytest.raises(ConfigError, match="encoder_width=None"):
            make(_RecordedEncoder(torch.zeros(1)))
        with pytest.raises(ConfigError, match="encoder=NoneType and encoder_width=10"):
            make(encoder_width=10)


def test_real_pretrained_encoder_classes_can_be_wrapped() -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel, WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_channels=1,
        )
    ).double()
    context_BCD, mask_BC = _vision(siglip, encoder_width=32)(_inputs(_vision()))
    assert context_BCD.shape == (3, 4, D)
    assert mask_BC.all()
    whisper = WhisperEncoder(
        WhisperConfig(
            d_model=32,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            num_mel_bins=6,
            max_source_positions=4,
        )
    ).double()
    features = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    context_BCD, mask_BC = _audio(whisper, encoder_width=32)(features, mask)
    assert context_BCD.shape == (2, 4, D)
    assert mask_BC.tolist() == [[True] * 4, [True, True, True, False]]


def test_attention_equals_torchs_own_multi_head_attention() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(W, 2).double(), nn.MultiheadAttention(W, 2, batch_first=True).double()
    theirs.in_proj_weight.data = torch.cat((ours.query.weight, ours.key_value.weight)).detach()
    theirs.in_proj_bias.data = torch.cat((ours.query.bias, ours.key_value.bias)).detach()
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    queries, tokens = torch.randn(2, 3, W, dtype=torch.float64), torch.randn(2, 5, W, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool()
    expected, _ = theirs(queries, tokens, tokens, key_padding_mask=~mask)
    torch.testing.assert_close(ours(queries, tokens, mask), expected)


def test_a_masked_mean_counts_real_tokens_only() -> None:
    tokens = torch.tensor([[[1.0], [3.0], [50.0]], [[1.0], [2.0], [3.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(tokens, mask).tolist() == [[2.0], [0.0]]
