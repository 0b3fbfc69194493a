"""Trains the four sample teachers into `teachers/<id>` beside this file and measures them on the held-out rows.

Run as `python nexus/data/samples/train_teachers.py [--only ID]`. Teachers see their own split only (`teacher_train.parquet`,
and for vision and audio further images, noise and speeds made from the same scans and recordings). The last part of each
training rounds the weights to NF4 in the forward pass and lets gradients through (straight-through estimator, Bengio et al.
2013, https://arxiv.org/abs/1308.3432), so that a teacher keeps its accuracy when it is loaded in NF4. Ends with exit code 1
when a teacher is below `REQUIRED_ACCURACY` in NF4.

Shape letters: B batch, T time, C channels, H height, W width.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes.functional as bnb
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import transformers
from scipy.ndimage import affine_transform
from torch import Tensor, nn
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessorPil,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
)
from transformers.quantizers.base import get_keys_to_not_convert

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

from nexus.data.media import add_noise, decode_audio, decode_image  # noqa: E402
from nexus.data.samples import digit_images, spoken_digits, word_problems  # noqa: E402
from nexus.data.samples.teacher_tokenizers import make_character_tokenizer, train_bpe  # noqa: E402

REQUIRED_ACCURACY = 0.95
# Held-out recordings are heard through this much noise (README.md); training noise spans both sides of it.
SNR_DB = 10.0
_TRAIN_SNR_DB = (3.0, 25.0)
_TEACHERS = HERE / "teachers"
# Heads stay in floating point, as TowerLoader keeps them.
_HEADS = ("lm_head", "classifier")
_SEED = 0
_WARMUP_STEPS = 100
_VISION_WIDTH = 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one teacher trains; the last `nf4_steps` of `steps` round the weights to NF4."""

    steps: int
    nf4_steps: int
    batch_size: int
    peak_lr: float


def main() -> int:
    """Trains and measures every teacher, or the one named by `--only`; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(_TRAINERS), help="train this teacher only")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, measure what is there")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # The bands above 4 kHz hear nothing at 8 kHz, which is known and harmless.
    warnings.filterwarnings("ignore", message="At least one mel filter")
    missed = False
    for teacher, train in _TRAINERS.items():
        if arguments.only not in (None, teacher):
            continue
        start = time.perf_counter()
        if not arguments.evaluate:
            torch.manual_seed(_SEED)
            train(_TEACHERS / teacher)
        seconds = time.perf_counter() - start
        accuracy = {nf4: evaluate(_TEACHERS / teacher, nf4=nf4) for nf4 in (False, True)}
        missed = missed or accuracy[True] < REQUIRED_ACCURACY
        print(f"{teacher}: accuracy {accuracy[False]:.3f} float, {accuracy[True]:.3f} NF4; {seconds:.0f} s", flush=True)
    total = sum(path.stat().st_size for path in _TEACHERS.rglob("*") if path.is_file())
    print(f"all teacher files: {total / 1e6:.2f} MB")
    return int(missed)


def train_reasoning(folder: Path) -> None:
    """Trains the Qwen3 teacher on word problems; its BPE tokenizer also knows the texts of the other capabilities."""
    problems = [(row["question"], row["answer"]) for row in read("reasoning", "teacher_train")]
    code = [(row["prompt"], row["completion"]) for row in read("code", "teacher_train")]
    questions = [*digit_images.QUESTIONS, *spoken_digits.QUESTIONS] * 200
    texts = [f"{prompt}\n{completion}" for prompt, completion in problems[:10_000] + code[:10_000]]
    tokenizer = train_bpe([*texts, *(f"{question}\n" for question in questions), *(list(spoken_digits.DIGITS) * 200)])
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    schedule = Schedule(steps=1000, nf4_steps=250, batch_size=64, peak_lr=3e-3)
    _train_text(Qwen3ForCausalLM(config), tokenizer, problems, schedule, folder)


def train_code(folder: Path) -> None:
    """Trains the Gemma3 teacher on Python expressions, character by character."""
    expressions = [(row["prompt"], row["completion"]) for row in read("code", "teacher_train")]
    tokenizer = make_character_tokenizer(text for pair in expressions for text in pair)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=128,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    schedule = Schedule(steps=3000, nf4_steps=500, batch_size=64, peak_lr=2e-3)
    _train_text(Gemma3ForCausalLM(config), tokenizer, expressions, schedule, folder)


def train_vision(folder: Path) -> None:
    """Trains the SigLIP teacher on pairs of the teacher's own scans, each pair and place new."""
    labels = [str(total) for total in range(19)]
    config = SiglipConfig(
        vision_config={
            "hidden_size": _VISION_WIDTH,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": digit_images.IMAGE_SIZE,
            "patch_size": 4,
            "vision_use_head": False,
        },
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    del config.text_config
    model = SiglipForImageClassification(config)
    size = {"height": digit_images.IMAGE_SIZE, "width": digit_images.IMAGE_SIZE}
    processor = SiglipImageProcessorPil(size=size)
    scans = digit_images.scans_of("teacher")
    rng = np.random.default_rng(_SEED)
    schedule = Schedule(steps=8000, nf4_steps=1200, batch_size=64, peak_lr=2e-3)
    # Only while training: naming the digit under each patch teaches far more per image than the sum alone.
    patch_head = nn.Linear(_VISION_WIDTH, 11)

    def losses() -> Iterator[Tensor]:
        for _ in range(schedule.steps):
            pairs = rng.integers(len(scans.ids_S), size=(schedule.batch_size, 2))
            images, patches = zip(*(_compose(scans, pair, rng) for pair in pairs), strict=True)
            pixels_BCHW = torch.from_numpy(np.stack(images)).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
            hidden_BTD = model.vision_model(pixels_BCHW).last_hidden_state
            totals = torch.from_numpy(scans.labels_S[pairs].sum(axis=1))
            sum_loss = F.cross_entropy(model.classifier(hidden_BTD.mean(dim=1)), totals, label_smoothing=0.02)
            patch_loss = F.cross_entropy(
                patch_head(hidden_BTD).flatten(0, 1), torch.from_numpy(np.concatenate(patches))
            )
            yield sum_loss + patch_loss

    optimise(model, losses(), schedule, extra=patch_head)
    save(model, processor, folder)


def train_audio(folder: Path) -> None:
    """Trains the Whisper-encoder teacher on the teacher's own recordings under new noise, loudness, speed and start."""
    config = WhisperConfig(
        d_model=128,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        num_mel_bins=32,
        max_source_positions=25,
        classifier_proj_size=128,
        # The classifier has no decoder; this keeps the configuration from describing one.
        decoder_layers=0,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        id2label=dict(enumerate(spoken_digits.DIGITS)),
        label2id={word: index for index, word in enumerate(spoken_digits.DIGITS)},
    )
    model = WhisperForAudioClassification(config)
    rate = spoken_digits.SAMPLING_RATE
    extractor = WhisperFeatureExtractor(
        feature_size=32, sampling_rate=rate, hop_length=160, n_fft=400, chunk_length=1, return_attention_mask=False
    )
    rows = read("audio", "teacher_train")
    clips = [decode_audio(row["audio"], rate) for row in rows]
    targets = torch.tensor([spoken_digits.DIGITS.index(row["answer"]) for row in rows])
    rng = np.random.default_rng(_SEED)
    schedule = Schedule(steps=2000, nf4_steps=400, batch_size=64, peak_lr=2e-3)

    def losses() -> Iterator[Tensor]:
        for step in range(schedule.steps):
            chosen = rng.integers(len(clips), size=schedule.batch_size)
            heard = [_distort(clips[index], f"{step}-{index}", rng) for index in chosen]
            features = extractor(heard, sampling_rate=rate, return_tensors="pt").input_features
            yield F.cross_entropy(model(_mask_bands(features, rng)).logits, targets[chosen], label_smoothing=0.05)

    optimise(model, losses(), schedule)
    save(model, extractor, folder)


def optimise(
    model: PreTrainedModel, losses: Iterator[Tensor], schedule: Schedule, extra: nn.Module | None = None
) -> None:
    """Takes one AdamW step per loss, linear warm-up and decay to zero; `losses` computes each from the model's current weights."""
    model.train()
    parameters = [*model.parameters(), *(extra.parameters() if extra is not None else ())]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.peak_lr, betas=(0.9, 0.98), weight_decay=0.02)
    start = time.perf_counter()
    for step in range(schedule.steps):
        warm_up = min(1.0, (step + 1) / _WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = schedule.peak_lr * warm_up * (1 - step / schedule.steps)
        rounding = nf4_weights(model) if step >= schedule.steps - schedule.nf4_steps else contextlib.nullcontext()
        with rounding:
            loss = next(losses)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == schedule.steps - 1:
            print(f"  step {step}: loss {loss.item():.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


@contextlib.contextmanager
def nf4_weights(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the weights of all Linears but the heads are what NF4 with double quantisation makes of them."""
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in _HEADS]
    exact = [linear.weight.data for linear in linears]
    for linear in linears:
        linear.weight.data = _nf4_rounded(linear.weight.data)
    try:
        yield
    finally:
        for linear, weight in zip(linears, exact, strict=True):
            linear.weight.data = weight


def save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Saves the model as float16 safetensors with its tokenizer or processor."""
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)


def evaluate(folder: Path, *, nf4: bool) -> float:
    """Returns the teacher's accuracy on its capability's held-out rows, loaded from `folder` in float32 or NF4."""
    capability = folder.name.removeprefix("sample-")
    rows = read(capability, "test")
    return {
        "reasoning": _text_accuracy,
        "code": _text_accuracy,
        "vision": _vision_accuracy,
        "audio": _audio_accuracy,
    }[capability](folder, rows, nf4)


def load(auto_class: Any, folder: Path, *, nf4: bool) -> Any:
    """Returns the model in float32, its Linears in NF4 with double quantisation when asked."""
    model = auto_class.from_pretrained(folder, dtype=torch.float32)
    if nf4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            # A list of our own replaces the library's protection of heads, so its choice is merged in.
            llm_int8_skip_modules=sorted({*_HEADS, *get_keys_to_not_convert(model)}),
        )
        model = auto_class.from_pretrained(
            folder, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
        )
    return model.eval()


def read(capability: str, split: str) -> list[Row]:
    """Returns the rows of one sample file."""
    return pq.read_table(HERE / capability / f"{split}.parquet").to_pylist()


def _train_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    schedule: Schedule,
    folder: Path,
) -> None:
    """Trains on prompt, newline, completion, end; only the completion and its end are scored."""
    prompts = tokenizer([f"{prompt}\n" for prompt, _ in pairs]).input_ids
    completions = tokenizer([completion for _, completion in pairs]).input_ids
    lengths = [len(p) + len(c) + 1 for p, c in zip(prompts, completions, strict=True)]
    # -100 marks what cross_entropy ignores; padding on the right needs no attention mask under causal attention.
    tokens_BT = torch.full((len(pairs), max(lengths)), tokenizer.pad_token_id)
    labels_BT = torch.full((len(pairs), max(lengths)), -100)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion) + 1
        tokens_BT[row, :end] = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
        labels_BT[row, len(prompt) : end] = tokens_BT[row, len(prompt) : end]
    lengths_B = torch.tensor(lengths)
    generator = torch.Generator().manual_seed(_SEED)

    def losses() -> Iterator[Tensor]:
        order = torch.randperm(len(pairs), generator=generator)
        for _ in range(schedule.steps):
            if len(order) < schedule.batch_size:
                order = torch.randperm(len(pairs), generator=generator)
            chosen, order = order[: schedule.batch_size], order[schedule.batch_size :]
            longest = int(lengths_B[chosen].max())
            hidden = model.model(input_ids=tokens_BT[chosen, :longest], use_cache=False).last_hidden_state
            labels = labels_BT[chosen, 1:longest]
            scored = labels != -100
            yield F.cross_entropy(model.lm_head(hidden[:, :-1][scored]), labels[scored])

    optimise(model, losses(), schedule)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    save(model, tokenizer, folder)


def _text_accuracy(folder: Path, rows: list[Row], nf4: bool) -> float:
    model = load(AutoModelForCausalLM, folder, nf4=nf4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    correct = 0
    for start in range(0, len(rows), 100):
        batch = rows[start : start + 100]
        inputs = tokenizer(
            [f"{row.get('question') or row['prompt']}\n" for row in batch], return_tensors="pt", padding=True
        )
        with torch.no_grad():
            tokens_BT = model.generate(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=32, do_sample=False
            )
        texts = tokenizer.batch_decode(tokens_BT[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for row, text in zip(batch, texts, strict=True):
            if "answer" in row:
                correct += word_problems.gold_of(text) == word_problems.gold_of(row["answer"])
            else:
                correct += text == row["completion"]
    return correct / len(rows)


def _vision_accuracy(folder: Path, rows: list[Row], nf4: bool) -> float:
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=[decode_image(row["image"]) for row in rows], return_tensors="pt")
    return _label_accuracy(load(AutoModelForImageClassification, folder, nf4=nf4), inputs.pixel_values, rows)


def _audio_accuracy(folder: Path, rows: list[Row], nf4: bool) -> float:
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    rate = extractor.sampling_rate
    clips = [add_noise(decode_audio(row["audio"], rate), row["id"], SNR_DB) for row in rows]
    inputs = extractor(clips, sampling_rate=rate, return_tensors="pt")
    return _label_accuracy(load(AutoModelForAudioClassification, folder, nf4=nf4), inputs.input_features, rows)


@torch.no_grad()
def _label_accuracy(model: Any, inputs: Tensor, rows: list[Row]) -> float:
    predicted = [model.config.id2label[int(index)] for index in model(inputs).logits.argmax(dim=-1)]
    return float(np.mean([label == row["answer"] for label, row in zip(predicted, rows, strict=True)]))


def _nf4_rounded(weight: Tensor) -> Tensor:
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return bnb.dequantize_4bit(packed, state)


def _compose(scans: digit_images.Scans, pair: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image [16, 16] of two scans and, for its 16 patches of 4x4, the digit most of each belongs to, plus 1 (0: none)."""
    seed = int(rng.integers(2**32))
    first_HW, second_HW = (_jitter(scans.pixels_SHW[scan], rng) for scan in pair)
    image_HW = digit_images.place_pair(first_HW, second_HW, np.random.default_rng(seed))
    first_owner_HW, second_owner_HW = (np.full((8, 8), scans.labels_S[scan] + 1, np.uint8) for scan in pair)
    owner_HW = digit_images.place_pair(first_owner_HW, second_owner_HW, np.random.default_rng(seed))
    # The two scans meet on a border between patches, so that no patch belongs to both.
    blocks = owner_HW.reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(16, 16)
    return image_HW, np.where((blocks > 0).sum(axis=1) >= 8, blocks.max(axis=1), 0).astype(np.int64)


def _jitter(scan_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the scan as it is half of the time, else turned by up to 12 degrees, stretched by up to 12 %, moved by up to half a
    pixel, and contrasted anew."""
    if rng.integers(2):
        return scan_HW
    angle = rng.uniform(-0.21, 0.21)
    stretch_y, stretch_x = rng.uniform(0.88, 1.12, size=2)
    centre = (digit_images.SCAN_SIZE - 1) / 2
    matrix = np.array([[math.cos(angle) * stretch_y, -math.sin(angle)], [math.sin(angle), math.cos(angle) * stretch_x]])
    offset = centre - matrix @ np.array([centre, centre]) + rng.uniform(-0.5, 0.5, size=2)
    turned_HW = affine_transform(scan_HW.astype(np.float32), matrix, offset=offset, order=1)
    return np.clip(turned_HW * rng.uniform(0.85, 1.15), 0, 255).astype(np.uint8)


def _distort(clip_T: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
    """Returns the clip at a new speed, loudness and noise; `key` seeds the noise."""
    moments = np.arange(0, len(clip_T) - 1, rng.uniform(0.88, 1.14))
    clip_T = np.interp(moments, np.arange(len(clip_T)), clip_T)
    noisy_T = add_noise(clip_T * rng.uniform(0.4, 1.2), key, rng.uniform(*_TRAIN_SNR_DB))
    return np.concatenate([np.zeros(rng.integers(0, 200), np.float32), noisy_T])


def _mask_bands(features_BMT: Tensor, rng: np.random.Generator) -> Tensor:
    """Returns the log-mel features with a few neighbouring mel bands flattened per clip (SpecAugment, Park et al. 2019)."""
    for features_MT in features_BMT:
        width = int(rng.integers(0, 6))
        first = int(rng.integers(0, features_BMT.shape[1] - width))
        features_MT[first : first + width] = features_MT.mean()
    return features_BMT


_TRAINERS: dict[str, Callable[[Path], None]] = {
    "sample-reasoning": train_reasoning,
    "sample-code": train_code,
    "sample-vision": train_vision,
    "sample-audio": train_audio,
}

if __name__ == "__main__":
    sys.exit(main())
