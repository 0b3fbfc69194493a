"""The whole student: towers that really are skipped, rows that do not influence each other, and what is kept while answering."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from nexus.adapters import Alignment, AudioAdapterConfig, ReasoningAdapterConfig, VisionAdapterConfig
from nexus.errors import ArtifactError
from nexus.student.config import NexusStudentConfig
from nexus.student.core import NexusStudentCore
from nexus.student.memory import MediaBatch, NexusStudent, StudentMemory, register_auto_classes
from nexus.student.presets import StudentSpec
from nexus.student.router import SparseIntentRouterConfig

VOCAB, WIDTH, EOS, PAD = 40, 32, 1, 0
REASONING, VISION, AUDIO = range(3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _spec(**changes: object) -> StudentSpec:
    core = NexusStudentConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        port_every=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    shape = {"context_width": WIDTH, "width": 16, "num_layers": 1, "num_heads": 2}
    parts: dict[str, object] = {
        "core": core,
        "reasoning": ReasoningAdapterConfig(**shape, num_context_tokens=3, alignments=(Alignment("t", 1, 8),)),
        "vision": VisionAdapterConfig(**shape, image_size=8, patch_size=4, num_channels=1),
        "audio": AudioAdapterConfig(**shape, num_mels=4),
        "router": SparseIntentRouterConfig(embedding_size=WIDTH, hidden_size=8, keywords=(("reasoning", ("solve",)),)),
    }
    return StudentSpec(**{**parts, **changes})


def _student(dtype: torch.dtype = torch.float64, **changes: object) -> NexusStudent:
    """A random student whose ports stand open."""
    torch.manual_seed(0)
    student = NexusStudent(_spec(**changes)).to(dtype)
    for port in student.core.ports.values():
        nn.init.constant_(port.gate_D, 1.0)
    return student.eval()


LENGTHS = (4, 6, 5, 3, 6)
TOWERS = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]]).bool()
"""Trunk only, reasoning, image, sound, reasoning with sound."""


def _media(dtype: torch.dtype = torch.float64) -> MediaBatch:
    """An image for rows 2 and 0, sounds for rows 4 and 3, in this order."""
    generator = torch.Generator().manual_seed(5)
    frame_mask = torch.ones(2, 6, dtype=torch.bool)
    frame_mask[1, 4:] = False
    return MediaBatch(
        pixel_values=torch.randn(2, 1, 8, 8, dtype=dtype, generator=generator),
        pixel_rows=torch.tensor([2, 0]),
        input_features=torch.randn(2, 4, 6, dtype=dtype, generator=generator),
        frame_mask=frame_mask,
        audio_rows=torch.tensor([4, 3]),
    )


def _only(media: MediaBatch, row: int) -> MediaBatch:
    """The media of one row, as a batch of its own."""
    image, sound = (media.pixel_rows == row).nonzero().flatten(), (media.audio_rows == row).nonzero().flatten()
    zero = torch.zeros(1, dtype=torch.long)
    return MediaBatch(
        pixel_values=media.pixel_values[image] if len(image) else None,
        pixel_rows=zero if len(image) else None,
        input_features=media.input_features[sound] if len(sound) else None,
        frame_mask=media.frame_mask[sound] if len(sound) else None,
        audio_rows=zero if len(sound) else None,
    )


def _text(side: str = "left", lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    width = max(lengths) + 1
    ids = torch.randint(2, VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        if side == "right":
            mask[row], ids[row] = mask[row].flip(0), ids[row].roll(length - width)
    return ids, mask


def _count_rows(student: NexusStudent) -> dict[str, list[int]]:
    """Rows of every call of a tower's parts, recorded as they happen."""
    seen: dict[str, list[int]] = {"reasoning": [], "vision": [], "audio": [], "lower": []}
    parts = {
        "reasoning": student.adapters["reasoning"].input,
        "vision": student.adapters["vision"].patch_embedding,
        "audio": student.adapters["audio"].stem,
        "lower": student.core.layers[0],
    }
    for name, part in parts.items():
        part.register_forward_hook(lambda _, inputs, __, name=name: seen[name].append(inputs[0].shape[0]))
    return seen


# --- towers ---------------------------------------------------------------------------------------------------------------------


def test_each_tower_runs_once_and_only_for_the_rows_that_ask_for_it() -> None:
    student = _student()
    seen = _count_rows(student)
    student.encode_context(*_text(), _media(), TOWERS)
    assert seen == {"reasoning": [2], "vision": [1], "audio": [2], "lower": [2]}


@pytest.mark.parametrize("tower", range(3))
def test_a_tower_that_is_off_everywhere_is_not_called(tower: int) -> None:
    student = _student()
    seen = _count_rows(student)
    mask = TOWERS.clone()
    mask[:, tower] = False
    student.encode_context(*_text(), _media(), mask)
    name = ("reasoning", "vision", "audio")[tower]
    assert seen[name] == []
    assert all(calls for other, calls in seen.items() if other not in (name, "lower"))
    assert bool(seen["lower"]) is (tower != REASONING)


def test_without_towers_there_is_no_context_at_all() -> None:
    student = _student()
    seen = _count_rows(student)
    assert student.encode_context(*_text(), _media(), torch.zeros(5, 3)) == (None, None)
    assert not any(seen.values())


def test_the_context_is_reasoning_then_vision_then_sound_each_at_its_rows() -> None:
    student, media = _student(), _media()
    ids, mask = _text()
    context_BCD, mask_BC = student.encode_context(ids, mask, media, TOWERS)
    reasoning_BCD, _ = student.adapters["reasoning"](student.core.lower_states(ids, mask), mask)
    vision_MCD, _ = student.adapters["vision"](media.pixel_values)
    audio_MCD, audio_mask = student.adapters["audio"](media.input_features, media.frame_mask)
    assert context_BCD.shape == (5, 3 + 4 + 3, WIDTH)
    torch.testing.assert_close(context_BCD[[1, 4], :3], reasoning_BCD[[1, 4]])
    torch.testing.assert_close(context_BCD[2, 3:7], vision_MCD[0])
    torch.testing.assert_close(context_BCD[[4, 3], 7:], audio_MCD)
    expected = torch.zeros(5, 10, dtype=torch.bool)
    expected[1, :3] = expected[4, :3] = expected[2, 3:7] = True
    expected[[4, 3], 7:] = audio_mask
    assert torch.equal(mask_BC, expected)
    assert (context_BCD[~TOWERS.any(1)] == 0).all()


def test_each_rows_logits_depend_on_that_row_alone() -> None:
    student, media = _student(), _media()
    ids, mask = _text()
    with torch.no_grad():
        together = student(ids, mask, prompt_mask_BT=mask, tower_mask_BN=TOWERS, media=media).trunk.logits
        for row, length in enumerate(LENGTHS):
            own, ones = ids[row : row + 1, -length:], torch.ones(1, length, dtype=torch.long)
            alone = student(
                own, ones, prompt_mask_BT=ones, tower_mask_BN=TOWERS[row : row + 1], media=_only(media, row)
            ).trunk.logits
            torch.testing.assert_close(together[row, -length:], alone[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("tower", range(3))
def test_every_tower_that_is_on_changes_the_logits_of_its_rows_only(tower: int) -> None:
    student = _student()
    ids, mask = _text()
    off = TOWERS.clone()
    off[:, tower] = False
    with torch.no_grad():
        outputs = [
            student(ids, mask, prompt_mask_BT=mask, tower_mask_BN=towers, media=_media()).trunk.logits[:, -1]
            for towers in (TOWERS, off)
        ]
    changed = (outputs[0] - outputs[1]).abs().amax(-1) > 1e-6
    assert torch.equal(changed, TOWERS[:, tower])


def test_a_tower_without_input_is_refused_by_name_and_row() -> None:
    student = _student()
    ids, mask = _text()
    towers = TOWERS.clone()
    towers[1, VISION] = True
    with pytest.raises(ValueError, match="'vision' on only where it exists and has input, found it on in row 1"):
        student.encode_context(ids, mask, _media(), towers)
    with pytest.raises(ValueError, match="'audio'"):
        _student(audio=None).encode_context(ids, mask, _media(), TOWERS)
    assert _student(audio=None).available(_media(), 5)[:, AUDIO].any().item() is False


def test_media_without_a_frame_mask_are_real_throughout() -> None:
    student = _student()
    media = dataclasses.replace(_media(), frame_mask=None)
    _, mask_BC = student.encode_context(*_text(), media, TOWERS)
    assert mask_BC[[3, 4], -3:].all()


def test_media_that_do_not_match_their_rows_are_refused() -> None:
    pixels = torch.zeros(2, 1, 8, 8)
    for rows in (None, torch.tensor([1])):
        with pytest.raises(ValueError, match="one row index per input in pixel_rows"):
            MediaBatch(pixel_values=pixels, pixel_rows=rows)
    with pytest.raises(ValueError, match="in audio_rows, found"):
        MediaBatch(audio_rows=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"at most one input per row, found pixel_rows \[1, 1\]"):
        MediaBatch(pixel_values=pixels, pixel_rows=torch.tensor([1, 1]))


def test_media_say_where_they_are_available() -> None:
    assert _media().available(5).tolist() == [
        [True, True, False],
        [True, False, False],
        [True, True, False],
        [True, False, True],
        [True, False, True],
    ]
    assert MediaBatch().available(2).tolist() == [[True, False, False]] * 2


# --- training -------------------------------------------------------------------------------------------------------------------


def test_the_answer_cannot_reach_its_own_first_token_through_the_reasoning_context() -> None:
    student = _student()
    ids, mask = _text()
    prompt_mask = mask.clone()
    prompt_mask[:, -2:] = 0
    changed = ids.clone()
    changed[:, -2:] = (ids[:, -2:] - 2 + 7) % (VOCAB - 2) + 2
    towers = torch.tensor([[True, False, False]] * 5)

    def prompt_logits(tokens: Tensor, readable: Tensor) -> Tensor:
        with torch.no_grad():
            return student(tokens, mask, prompt_mask_BT=readable, tower_mask_BN=towers).trunk.logits[:, -3]

    torch.testing.assert_close(prompt_logits(ids, prompt_mask), prompt_logits(changed, prompt_mask), rtol=0, atol=1e-11)
    assert not torch.allclose(prompt_logits(ids, mask), prompt_logits(changed, mask))


def test_the_context_of_training_is_that_of_answering() -> None:
    student = _student()
    ids, mask = _text(lengths=(6, 6))
    towers = torch.tensor([[True, False, False]] * 2)
    prompt = torch.ones_like(mask)
    prompt[:, 4:] = 0
    with torch.no_grad():
        training, _ = student.encode_context(ids, torch.ones_like(mask), MediaBatch(), towers, prompt_mask_BT=prompt)
        answering, _ = student.encode_context(ids[:, :4], torch.ones(2, 4), MediaBatch(), towers)
    torch.testing.assert_close(training, answering, rtol=0, atol=1e-12)


def test_a_training_pass_gives_gradients_to_every_part_and_features_to_anchor() -> None:
    student = _student()
    ids, mask = _text()
    output = student(
        ids, mask, prompt_mask_BT=mask, tower_mask_BN=TOWERS, media=_media(), labels=ids, output_hidden_states=True
    )
    assert len(output.trunk.hidden_states) == 4
    rows, thoughts = output.encoded.features["reasoning"]
    assert rows.tolist() == [1, 4]
    predicted = student.adapters["reasoning"].predict("t", 1, thoughts)
    assert predicted.shape == (2, ids.shape[1], 8)
    assert output.encoded.features["vision"][0].tolist() == [2]
    assert output.encoded.features["audio"][0].tolist() == [3, 4]
    (output.trunk.loss + predicted.pow(2).mean()).backward()
    idle = {name for name, p in student.named_parameters() if p.grad is None or (p.grad == 0).all()}
    assert {name.split(".")[0] for name in idle} == {"router"}


def test_the_routers_embedding_is_the_mean_over_the_prompt_and_zero_without_one() -> None:
    student = _student()
    ids, mask = _text()
    mask[3] = 0
    embedding_BD = student.embed(ids, mask)
    for row in (0, 1, 2, 4):
        length = LENGTHS[row]
        torch.testing.assert_close(
            embedding_BD[row], student.core.lower_states(ids[row : row + 1, -length:])[0].mean(0)
        )
    assert (embedding_BD[3] == 0).all()


def test_routing_sees_text_media_and_the_towers_that_exist() -> None:
    texts = ["hello", "solve it", "hello", "hello", "solve it"]
    decision = _student(torch.float32).route(*_text(), texts, _media())
    assert decision.source == ("modality", "keyword", "modality", "modality", "keyword")
    assert decision.mask_BN.tolist() == [
        [False, True, False],
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [True, False, True],
    ]
    deaf = _student(torch.float32, audio=None).route(*_text(), texts, _media())
    assert deaf.mask_BN[3].tolist() == [False, False, False]


# --- answering ------------------------------------------------------------------------------------------------------------------


def _answer_by_definition(
    student: NexusStudent, ids_T: Tensor, towers_N: Tensor, media: MediaBatch, eos: int, steps: int
) -> list[int]:
    """Greedy decoding of one row: context from the prompt alone, then the whole text through the trunk per token."""
    context, mask = student.encode_context(ids_T[None], torch.ones(1, len(ids_T)), media, towers_N[None])
    answer: list[int] = []
    while len(answer) < steps and (not answer or answer[-1] != eos):
        text = torch.cat((ids_T, torch.tensor(answer, dtype=torch.long)))[None]
        logits = student.core(text, context_BCD=context, context_mask_BC=mask, use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_of_mixed_rows_equal_greedy_decoding_of_each_row_alone(side: str) -> None:
    student, media = _student(), _media()
    ids, mask = _text(side)
    with torch.no_grad():
        # Ends that do occur, at different places: the end token is one that this random student likes to say.
        free = [
            _answer_by_definition(student, ids[r][mask[r].bool()], TOWERS[r], _only(media, r), -5, 8) for r in range(5)
        ]
        eos = free[1][2]
        expected = [
            _answer_by_definition(student, ids[r][mask[r].bool()], TOWERS[r], _only(media, r), eos, 8) for r in range(5)
        ]
    answers = student.generate(
        ids, mask, tower_mask_BN=TOWERS, media=media, max_new_tokens=8, eos_token_id=eos, pad_token_id=PAD
    )
    assert len({len(answer) for answer in expected}) > 1
    assert answers.shape == (5, max(map(len, expected)))
    for row, answer in enumerate(expected):
        assert answers[row].tolist() == answer + [PAD] * (answers.shape[1] - len(answer))


def test_answering_stops_when_every_row_has_ended() -> None:
    student = _student()
    ids, mask = _text(lengths=(3,))
    towers = torch.zeros(1, 3, dtype=torch.bool)
    options = {"tower_mask_BN": towers, "pad_token_id": PAD}
    first = student.generate(ids, mask, max_new_tokens=1, eos_token_id=-5, **options)
    steps: list[int] = []
    student.core.layers[0].register_forward_hook(lambda *_: steps.append(1))
    answers = student.generate(ids, mask, max_new_tokens=9, eos_token_id=int(first[0, 0]), **options)
    assert answers.tolist() == first.tolist()
    assert len(steps) == 1


def test_an_answer_has_at_least_one_token() -> None:
    towers = torch.zeros(5, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        _student().generate(*_text(), tower_mask_BN=towers, max_new_tokens=0, eos_token_id=EOS, pad_token_id=PAD)


def test_answering_equals_transformers_generate_on_the_trunk() -> None:
    student, media = _student(), _media()
    ids, mask = _text()
    context, context_mask = student.encode_context(ids, mask, media, TOWERS)
    ours = student.generate(
        ids, mask, tower_mask_BN=TOWERS, media=media, max_new_tokens=6, eos_token_id=-5, pad_token_id=PAD
    )
    theirs = student.core.generate(
        ids,
        attention_mask=mask,
        context_BCD=context,
        context_mask_BC=context_mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=PAD,
    )
    assert torch.equal(ours, theirs[:, ids.shape[1] :])


def test_towers_run_once_per_answer_and_the_context_is_projected_once() -> None:
    student = _student()
    seen = _count_rows(student)
    projected: list[int] = []
    for port in student.core.ports.values():
        port.v_proj.register_forward_hook(lambda *_: projected.append(1))
    student.generate(
        *_text(), tower_mask_BN=TOWERS, media=_media(), max_new_tokens=6, eos_token_id=-5, pad_token_id=PAD
    )
    assert seen["reasoning"] == [2]
    assert seen["vision"] == [1]
    assert seen["audio"] == [2]
    assert len(projected) == 2  # two ports, once each
    # the prompt's lower layers for reasoning, then one trunk pass per new token
    assert seen["lower"] == [2] + [5] * 6


def test_memory_continues_where_the_text_stopped_and_forgets_rows() -> None:
    student = _student()
    ids, mask = _text(lengths=(6, 6, 6))
    ids, mask = ids[:, 1:], mask[:, 1:]
    context_BCD = torch.randn(3, 2, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        memory = StudentMemory(student.core, context_BCD)
        memory.step(ids[:, :2], mask[:, :2])
        memory.step(ids[:, 2:4])
        rows = torch.tensor([2, 0])
        memory.keep_rows(rows)
        logits = memory.step(ids[rows, 4:])
        expected = student.core(ids[rows], context_BCD=context_BCD[rows]).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


# --- files ----------------------------------------------------------------------------------------------------------------------


def test_a_saved_student_is_bit_equal_and_answers_alike(tmp_path: Path) -> None:
    student = _student(torch.float32)
    student.router.threshold = 0.7
    student.save_pretrained(tmp_path)
    loaded = NexusStudent.from_pretrained(tmp_path)
    assert loaded.spec.to_dict() == student.spec.to_dict()
    assert loaded.router.threshold == 0.7
    assert loaded.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in student.state_dict().items())
    options = {
        "tower_mask_BN": TOWERS,
        "media": _media(torch.float32),
        "max_new_tokens": 4,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    assert torch.equal(loaded.generate(*_text(), **options), student.generate(*_text(), **options))


def test_an_exported_student_has_no_alignment_and_answers_as_before(tmp_path: Path) -> None:
    student = _student(torch.float32)
    options = {
        "tower_mask_BN": TOWERS,
        "media": _media(torch.float32),
        "max_new_tokens": 4,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    before = student.generate(*_text(), **options)
    student.drop_alignments()
    student.save_pretrained(tmp_path)
    loaded = NexusStudent.from_pretrained(tmp_path)
    assert not any("alignments" in name for name in loaded.state_dict())
    assert all(config.alignments == () for config in loaded.spec.adapters().values())
    assert torch.equal(loaded.generate(*_text(), **options), before)


def test_a_student_may_lack_towers(tmp_path: Path) -> None:
    student = _student(torch.float32, vision=None, audio=None, reasoning=None)
    student.save_pretrained(tmp_path)
    loaded = NexusStudent.from_pretrained(tmp_path)
    assert list(loaded.adapters) == []
    assert loaded.spec.vision is None


def test_a_wrapped_encoder_is_given_again_when_loading(tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    torch.manual_seed(0)
    spec = _spec(vision=dataclasses.replace(_spec().vision, encoder_width=32))
    student = NexusStudent(spec, encoders={"vision": SiglipVisionModel(config)})
    student.save_pretrained(tmp_path)
    loaded = NexusStudent.from_pretrained(tmp_path, encoders={"vision": SiglipVisionModel(config)})
    pixels = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.adapters["vision"](pixels)[0], student.adapters["vision"](pixels)[0])


@pytest.mark.parametrize("name", ["student.json", "adapters.safetensors", "model.safetensors", "router.json"])
def test_a_missing_file_is_an_artifact_error(tmp_path: Path, name: str) -> None:
    _student(torch.float32).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=r"Export it again|Run the route stage again"):
        NexusStudent.from_pretrained(tmp_path)


def test_registered_auto_classes_find_the_trunk(tmp_path: Path) -> None:
    register_auto_classes()
    register_auto_classes()
    student = _student(torch.float32)
    student.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is NexusStudentCore
    assert isinstance(AutoConfig.from_pretrained(tmp_path), NexusStudentConfig)
    with torch.no_grad():
        assert torch.equal(model(_text()[0]).logits, student.core(_text()[0]).logits)
