"""TeacherEngine: one loaded teacher as an actor talks to it. Plain data in, plain data out; no Ray.

What a teacher can do follows from its role alone: causal_lm.py, encoder.py, codec.py, codec_lm.py, diffusion.py or
sae.py does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nexus.config import Role
from nexus.data.answers import AnswerPattern, gold_answer
from nexus.data.media import read_media
from nexus.data.records import Record
from nexus.errors import ConfigError
from nexus.profiling.batches import BadSamplesError
from nexus.profiling.consolidation import (
    BatchMeasurement,
    ConfirmationMeasurement,
    ConfirmationPlan,
    merge_confirmations,
    merge_measurements,
)
from nexus.profiling.layers import find_blocks
from nexus.profiling.niwt import EncoderProfileBatch, NIWTProfiler, ProfileBatch
from nexus.profiling.reasoning_eval import ablated_answers
from nexus.towers import causal_lm, codec_lm, encoder
from nexus.towers.blocks import block_width
from nexus.towers.codec import CODECS, score_codec
from nexus.towers.diffusion import denoise
from nexus.towers.health import NotFiniteError, check_targets
from nexus.towers.loader import LoadedTower, load_tower, tokenizer_of
from nexus.towers.media_lm import MediaPrompt, prepare_prompts, same_noise_in_every_forward
from nexus.towers.probes import probe_request
from nexus.towers.rows import RowsError
from nexus.towers.sae import score_features
from nexus.towers.seq2seq import score_transcripts
from nexus.towers.targets import (
    CodecTargets,
    DenoisingTargets,
    ScoreRequest,
    SparseTargets,
    TeacherHead,
    TeacherTargets,
    TokenDistributions,
)
from nexus.towers.tax import (
    TargetTax,
    TaxMeasurement,
    feature_cosines,
    measure_tax,
    target_tax,
    whole_distributions,
)
from nexus.towers.transcripts import can_transcribe, transcript_batch

_Result = TypeVar("_Result")

ProfileStrategy = Literal["auto", "brute", "prefix", "triangular"]


@dataclass(frozen=True)
class AnswerCheck:
    """How a generated completion is scored on its answer alone."""

    pattern: AnswerPattern
    max_new_tokens: int


class TeacherEngine:
    """Gives the targets, answers and layer measurements of one teacher.

    On a CPU every call is deterministic. The results of a row do not depend on the other rows of the call beyond rounding.
    """

    def __init__(self, tower: LoadedTower, *, teacher_id: str) -> None:
        self.tower = tower
        self.teacher_id = teacher_id
        self._head: TeacherHead | None = None

    @property
    def role(self) -> Role:
        """What kind of targets it gives."""
        return self.tower.role

    @property
    def fingerprint(self) -> str:
        """Hash of everything that its targets depend on."""
        return self.tower.fingerprint

    @property
    def tokenizer_hash(self) -> str | None:
        """Equal hashes mean equal ids for equal text; None without a tokenizer."""
        return self.tower.tokenizer_hash

    @property
    def num_layers(self) -> int:
        """Blocks whose hidden states can be asked for."""
        if self.tower.denoiser is not None:
            return len(self.tower.denoiser.blocks)
        return 0 if self.role == "codec" else len(find_blocks(self._runner))

    @property
    def hidden_size(self) -> int:
        """Width H of those hidden states; of a codec's latents."""
        if self.tower.denoiser is not None:
            return self.tower.denoiser.hidden_size
        return int(self.tower.model.config.hidden_size) if self.role == "codec" else block_width(self._runner)

    @property
    def vocabulary_size(self) -> int | None:
        """Tokens of its distributions; None without any."""
        if self.role == "codec_lm":
            return int(self.tower.model.config.audio_vocab_size)
        if self.tower.transcriber is not None:
            return causal_lm.vocabulary_size(self.tower.model)
        return causal_lm.vocabulary_size(self.tower.model) if self.role == "causal_lm" else None

    @property
    def label_texts(self) -> tuple[str, ...] | None:
        """Labels of a classification head, by class index; None without one."""
        return encoder.label_texts(self._runner) if self.role == "encoder" else None

    def score(self, request: ScoreRequest) -> TeacherTargets:
        """The teacher's targets for every row of `request`, in its order.

        Raises:
            ConfigError: the request does not fit the teacher's role, or asks for a layer that it does not have.
            RowsError: rows that cannot be decoded, do not fit the model, or give results that are not finite.
            TeacherHealthError: the reply is of a broken teacher.
        """
        if request.transport != "topk" and self.role != "causal_lm":
            raise ConfigError(
                f"Expected transport topk for the teacher {self.teacher_id!r} of role {self.role}, found {request.transport}. "
                "Set another transport for language models only."
            )
        if request.transport in ("hidden", "auto"):
            # A head that cannot be sent is better known before its states are.
            self.output_head()
        tokens: TokenDistributions | None = None
        hidden: dict[int, np.ndarray] = {}
        encoded: encoder.Encoded | None = None
        features: dict[int, SparseTargets] | None = None
        denoised: DenoisingTargets | None = None
        coded: CodecTargets | None = None
        if self.role in ("causal_lm", "sae"):
            if request.completions is None:
                raise ConfigError(
                    f"Expected completions to score for the language model {self.teacher_id!r}, found none. Generate them first."
                )
            if self.tower.dictionaries is None:
                if request.media is not None and self.tower.is_streamed:
                    raise ConfigError(
                        f"Expected the teacher {self.teacher_id!r} in memory to read media, found it streamed, where rows run side "
                        "by side. Give it rows of text, or a device that holds it."
                    )
                media = self._media_prompts(request.row_ids, request.prompts, request.media, request.snr_db)
                tokens, hidden = causal_lm.score_completions(
                    *self._language_model(), request, media, passes=self.tower.passes
                )
            elif request.media is not None:
                raise ConfigError(
                    f"Expected rows of text for the sae {self.teacher_id!r}, found media. Choose another teacher for these rows."
                )
            else:
                features = score_features(*self._language_model(), self.tower.dictionaries, request)
        elif self.tower.denoiser is not None:
            denoised = denoise(self.tower.denoiser, request)
        else:
            if request.media is None:
                raise ConfigError(
                    f"Expected media for the teacher {self.teacher_id!r} of role {self.role}, found none. Give it rows with "
                    "images or audio."
                )
            if self.role == "codec":
                model, processor = self.tower.model, self.tower.processor
                assert processor is not None, "a codec does not load without one"
                coded = score_codec(model, processor.sampling_rate, CODECS[type(model).__name__], request)
            elif self.role == "codec_lm":
                tokens, hidden = codec_lm.score_recordings(self.tower.model, self.tower.processor, request)
            else:
                model = self.tower.model
                inputs = encoder.prepare_inputs(
                    model, self.tower.processor, request.row_ids, request.media, request.snr_db
                )
                encoded = encoder.encode(
                    model,
                    inputs,
                    row_ids=request.row_ids,
                    layers=request.layers,
                    temperature=request.temperature,
                    passes=self.tower.passes,
                )
                hidden = encoded.hidden
                if request.completions is not None and self.tower.transcriber is not None:
                    tokens = score_transcripts(model, self.tower.transcriber, inputs, request)
        targets = TeacherTargets(
            teacher=self.teacher_id,
            fingerprint=self.fingerprint,
            tokenizer_hash=self.tokenizer_hash,
            row_ids=request.row_ids,
            tokens=tokens,
            hidden=hidden,
            pooled_BE=None if encoded is None else encoded.pooled_BE,
            label_texts=self.label_texts,
            label_logprobs_BC=None if encoded is None else encoded.label_logprobs_BC,
            features=features,
            codebooks=codec_lm.num_codebooks(self.tower.model) if self.role == "codec_lm" else None,
            denoising=denoised,
            codec=coded,
        )
        check_targets(targets, vocabulary_size=self.vocabulary_size)
        return targets

    def probe(self) -> None:
        """Ask a fixed question, so that a copy that was loaded or woken wrongly is known before any row is.

        Raises:
            TeacherHealthError: the answer is of a broken teacher; it names the teacher.
        """
        try:
            self.score(probe_request(self.tower))
        except RowsError as error:
            raise NotFiniteError(
                self.teacher_id,
                f"Expected teacher {self.teacher_id!r} to answer a fixed question after loading, found: "
                f"{'; '.join(sorted(set(error.reasons.values())))}.",
            ) from None

    def output_head(self) -> TeacherHead:
        """What turns the states of `hidden` targets into this teacher's logits; made once.

        Raises:
            ConfigError: the teacher is no language model, or more than a head stands between its states and its logits.
        """
        if self._head is None:
            model, _ = self._language_model()
            try:
                self._head = causal_lm.output_head(model, passes=self.tower.passes)
            except ValueError as error:
                raise ConfigError(
                    f"Transport hidden of teacher {self.teacher_id!r}: {error}. Choose topk, sampled or full for it."
                ) from None
        return self._head

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int | None = None
    ) -> tuple[str, ...]:
        """Greedy completions of a language model, in the prompts' order.

        Raises:
            ConfigError: the teacher is an encoder, or is streamed.
            RowsError: prompts that do not fit the model.
        """
        model, tokenizer = self._language_model()
        self._refuse_streamed("generate text")
        return causal_lm.generate_greedily(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
        )

    def answer(self, records: Sequence[Record], *, max_new_tokens: int, snr_db: float | None = None) -> tuple[str, ...]:
        """The teacher's answer to each row as text: a greedy completion, or the most probable label.

        Args:
            max_new_tokens: of a language model.
            snr_db: noise added to recordings.

        Raises:
            ConfigError: an encoder without a classification head, or a streamed language model.
            RowsError: as `score`; also rows whose answer, tokenised as text, would not fit the model, which could not score it.
        """
        if self.role == "causal_lm":
            model, tokenizer = self._language_model()
            self._refuse_streamed("generate answers")
            if any(record.media is not None for record in records):
                ids, prompts = [record.id for record in records], [record.prompt for record in records]
                media = self._media_prompts(ids, prompts, _media_of(records), snr_db)
                assert media is not None
                return causal_lm.answer_media_rows(model, tokenizer, ids, media, max_new_tokens=max_new_tokens)
            return causal_lm.answer_rows(
                model,
                tokenizer,
                [record.id for record in records],
                [record.prompt for record in records],
                max_new_tokens=max_new_tokens,
            )
        texts, logprobs_BC = self._labels(), self._label_logprobs(records, snr_db)
        return tuple(texts[index] for index in logprobs_BC.argmax(axis=1))

    def measure(
        self,
        records: Sequence[Record],
        *,
        strategy: ProfileStrategy = "auto",
        snr_db: float | None = None,
        micro_batch_size: int | None = None,
    ) -> BatchMeasurement:
        """What skipping each block does to the rows' answers; `nexus.profiling.consolidation` turns batches into a profile.

        A language model is measured on the rows' completions, behind their media where they have any, and so is what reads an sae's
        features. A classifier is measured on the
        rows' labels, or on its own decisions when no row has one. A speech recogniser of an encoder and a decoder is measured on the
        rows' texts, where they have any, its encoder's layers in front and its decoder's as the other side; any other encoder without
        a head on its embedding.

        Raises:
            RowsError: rows without completion, without a label where others have one, with a label that the classifier does not have,
                for which the model alone gives NaN, with media that the language model does not take, or as `score`.
            ProfilingError: see `NIWTProfiler.measure`.
        """
        profiler, batches = self._profiled(records, strategy, snr_db, micro_batch_size)
        measured = self._of_each(batches, profiler.measure)
        return measured[0] if len(measured) == 1 else merge_measurements(measured)

    def confirm(
        self,
        records: Sequence[Record],
        plan: ConfirmationPlan,
        *,
        strategy: ProfileStrategy = "auto",
        snr_db: float | None = None,
        answers: AnswerCheck | None = None,
    ) -> ConfirmationMeasurement:
        """The second pass of a profile over some rows of the first, as `NIWTProfiler.confirm`.

        Args:
            answers: makes a language model answer with each layer skipped; None leaves its accuracy to verification, and so do
                rows with media, behind which nothing is generated with layers skipped.

        Raises:
            RowsError: as `measure`; or rows without an answer to find.
        """
        if answers is not None and self.role == "causal_lm":
            self._refuse_streamed("generate answers with layers skipped")
        profiler, batches = self._profiled(records, strategy, snr_db, None)
        parts = self._of_each(batches, lambda batch: profiler.confirm(batch, plan))
        confirmed = parts[0] if len(parts) == 1 else merge_confirmations(parts)
        if self.role != "causal_lm" or answers is None or any(record.media is not None for record in records):
            return confirmed
        golds = [
            gold_answer((record.completion if record.answer is None else record.answer) or "", answers.pattern)
            for record in records
        ]
        missing = {record.id: "no answer" for record, gold in zip(records, golds, strict=True) if gold is None}
        if missing:
            raise RowsError(
                "Expected an answer to find in every row whose answers are generated; add or drop them.", missing
            )
        model, tokenizer = self._language_model()
        correct_VB = ablated_answers(
            profiler,
            tokenizer,
            causal_lm.tokenise_prompts(tokenizer, [record.prompt for record in records]),
            [gold for gold in golds if gold is not None],
            pattern=answers.pattern,
            max_new_tokens=answers.max_new_tokens,
            end_ids=causal_lm.end_token_ids(model, tokenizer),
        )
        return replace(confirmed, generated_correct_VB=correct_VB)

    def tax(self, records: Sequence[Record], *, max_new_tokens: int, snr_db: float | None = None) -> TaxMeasurement:
        """What NF4 costs on these rows; the floating-point copy is loaded beside the quantised one and dropped afterwards.

        That of a streamed teacher is loaded into the machine's memory, wherever the teacher itself runs. A teacher that its authors
        quantised has no original here: its answers are measured, no item is compared.
        """
        if self.tower.coverage.already is not None:
            answers = self.answer(records, max_new_tokens=max_new_tokens, snr_db=snr_db)
            return TaxMeasurement(answers, answers, np.empty(0), np.empty(0, dtype=bool))
        return measure_tax(self._original(), self, records, max_new_tokens=max_new_tokens, snr_db=snr_db)

    def feature_tax(self, records: Sequence[Record]) -> np.ndarray:
        """As `tax`, for an encoder without labels: `nexus.towers.tax.feature_cosines`."""
        return feature_cosines(self._original(), self, records)

    def probe_tax(self) -> TargetTax | None:
        """What NF4 costs this teacher's targets for the fixed inputs of the health probe; None without an original to compare."""
        if self.tower.coverage.already is not None:
            return None
        request = whole_distributions(probe_request(self.tower), self.vocabulary_size)
        return target_tax(self._original().score(request), self.score(request))

    def embed(self, records: Sequence[Record]) -> np.ndarray:
        """An encoder's pooled embeddings, float32 [B, E]; raises as `score` does."""
        return self._encode([record.id for record in records], _media_of(records), snr_db=None).pooled_BE

    def answer_logits(
        self, records: Sequence[Record], answers: Sequence[str], *, snr_db: float | None = None
    ) -> Iterator[Tensor]:
        """Yields the logits [N, C] behind `answers`, batch by batch: of every answer token, or of every row for a classifier.

        Two copies of a teacher give the same items in the same order.
        """
        if self.role == "causal_lm":
            model, tokenizer = self._language_model()
            yield from causal_lm.completion_logits(
                model, tokenizer, [record.prompt for record in records], answers, passes=self.tower.passes
            )
        else:
            yield torch.from_numpy(self._label_logprobs(records, snr_db))

    # --- parts ------------------------------------------------------------------------------------------------------------------

    @property
    def _runner(self) -> PreTrainedModel:
        """The model whose blocks count: the whole one, or the encoder of a speech recogniser."""
        return encoder.encoder_of(self.tower.model) if self.role == "encoder" else self.tower.model

    def _original(self) -> TeacherEngine:
        spec = replace(self.tower.spec, streamed=False)
        device = "cpu" if self.tower.is_streamed else str(self.tower.model.device)
        return TeacherEngine(load_tower(spec, device=device, quantise=False), teacher_id=self.teacher_id)

    def _in_passes(self, call: Callable[[], _Result]) -> _Result:
        """The result of a call that runs forwards of the model."""
        (result,) = self.tower.passes([call])
        return result

    def _refuse_streamed(self, what: str) -> None:
        """A pass through all files for every token of an answer would never end."""
        if self.tower.is_streamed:
            raise ConfigError(
                f"Expected the teacher {self.teacher_id!r} in memory to {what}, found it streamed: it reads all its weights once for "
                "a whole batch, and would for every token. Score completions with it, or give it a device that holds it."
            )

    def _language_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self.tower.tokenizer is None:
            raise ConfigError(
                f"Expected a language model to generate text, found the encoder {self.teacher_id!r}. Ask for answer()."
            )
        return self.tower.model, self.tower.tokenizer

    def _media_prompts(
        self, row_ids: Sequence[str], prompts: Sequence[str], media: Sequence[bytes] | None, snr_db: float | None
    ) -> list[MediaPrompt] | None:
        """Prompts with media as the model reads them; None for rows of text."""
        if media is None:
            return None
        return prepare_prompts(self.tower.processor, row_ids, prompts, media, teacher_id=self.teacher_id, snr_db=snr_db)

    def _encode(
        self,
        row_ids: Sequence[str],
        media: Sequence[bytes],
        *,
        snr_db: float | None,
        layers: Sequence[int] = (),
        temperature: float = 1.0,
    ) -> encoder.Encoded:
        model = self.tower.model
        inputs = encoder.prepare_inputs(model, self.tower.processor, row_ids, media, snr_db)
        return encoder.encode(
            model, inputs, row_ids=row_ids, layers=layers, temperature=temperature, passes=self.tower.passes
        )

    def _labels(self) -> tuple[str, ...]:
        texts = self.label_texts
        if texts is None:
            raise ConfigError(
                f"Expected a teacher that answers in text, found the encoder {self.teacher_id!r} without a "
                "classification head. Use it for features only."
            )
        return texts

    def _label_logprobs(self, records: Sequence[Record], snr_db: float | None) -> np.ndarray:
        self._labels()
        logprobs_BC = self._encode(
            [record.id for record in records], _media_of(records), snr_db=snr_db
        ).label_logprobs_BC
        assert logprobs_BC is not None
        return logprobs_BC

    def _profiled(
        self, records: Sequence[Record], strategy: ProfileStrategy, snr_db: float | None, micro_batch_size: int | None
    ) -> tuple[NIWTProfiler, list[ProfileBatch | EncoderProfileBatch]]:
        """What measures the teacher's layers, and the rows as it takes them, in at least one batch."""
        model = self.tower.model
        texts = [record.completion if record.answer is None else record.answer for record in records]
        if self.role == "encoder" and any(texts) and self.label_texts is None and can_transcribe(model):
            batch = transcript_batch(
                model, self._writer, [record.id for record in records], texts, self._prepared(records, snr_db)
            )
            both = NIWTProfiler.of_both_sides(
                model, first="encoder", strategy=strategy, micro_batch_size=micro_batch_size
            )
            return both, [batch]
        profiler = NIWTProfiler(self._runner, strategy=strategy, micro_batch_size=micro_batch_size)
        if self.role in ("causal_lm", "sae"):
            return profiler, [*self._text_batches(records, snr_db)]
        return profiler, [self._media_batch(records, snr_db)]

    def _of_each(
        self,
        batches: Sequence[ProfileBatch | EncoderProfileBatch],
        call: Callable[[ProfileBatch | EncoderProfileBatch], _Result],
    ) -> list[_Result]:
        """What a profiler's `call` gives of each batch; the bad rows of all of them are named at once."""
        found: list[_Result] = []
        what, bad = "", dict[str, str]()
        for batch in batches:
            has_media = self.role == "causal_lm" and batch.inputs is not None
            # The clean model and all variants hear a row with the same noise: their difference is the layer's alone.
            noise = same_noise_in_every_forward(batch.sample_ids[0], self.tower.model) if has_media else nullcontext()
            try:
                with noise:
                    found.append(self._in_passes(partial(call, batch)))
            except BadSamplesError as error:
                what, bad = error.what, {**bad, **error.reasons}
        if bad:
            raise RowsError(what, bad)
        return found

    def _text_batches(self, records: Sequence[Record], snr_db: float | None) -> Iterator[ProfileBatch]:
        """All rows of text together; each row with media apart, because its media have shapes of their own."""
        missing = {record.id: "no completion" for record in records if record.completion is None}
        if missing:
            raise RowsError(
                "Expected a completion in every row that a language model is profiled on; add or drop them.", missing
            )
        seen = [record for record in records if record.media is not None]
        if seen and (self.tower.is_streamed or self.role == "sae"):
            raise RowsError(
                f"Expected rows of text to profile the teacher {self.teacher_id!r} on, which is streamed or read by an sae; drop the "
                "rows with media, or give them to another teacher.",
                {record.id: "media" for record in seen},
            )
        if seen:
            row_ids, prompts = [record.id for record in seen], [record.prompt for record in seen]
            media = self._media_prompts(row_ids, prompts, _media_of(seen), snr_db)
            assert media is not None
            completions = [record.completion or "" for record in seen]
            rows = causal_lm.media_profile_inputs(*self._language_model(), row_ids, media, completions)
            for row_id, (ids, mask, loss_mask, inputs) in zip(row_ids, rows, strict=True):
                yield ProfileBatch([row_id], ids, mask, loss_mask, inputs)
        read = [record for record in records if record.media is None]
        if read:
            ids, mask, loss_mask = causal_lm.profile_inputs(
                *self._language_model(),
                [record.id for record in read],
                [record.prompt for record in read],
                [record.completion or "" for record in read],
            )
            yield ProfileBatch([record.id for record in read], ids, mask, loss_mask)

    def _prepared(self, records: Sequence[Record], snr_db: float | None) -> dict[str, Tensor]:
        row_ids = [record.id for record in records]
        return encoder.prepare_inputs(self.tower.model, self.tower.processor, row_ids, _media_of(records), snr_db)

    @cached_property
    def _writer(self) -> PreTrainedTokenizerBase:
        """Turns text into what a speech recogniser's decoder writes."""
        return tokenizer_of(self.tower.spec)

    def _media_batch(self, records: Sequence[Record], snr_db: float | None) -> EncoderProfileBatch:
        row_ids = [record.id for record in records]
        inputs = self._prepared(records, snr_db)
        texts = self.label_texts
        golds = [record.completion if record.answer is None else record.answer for record in records]
        unlabelled = {row_id: "no answer" for row_id, gold in zip(row_ids, golds, strict=True) if gold is None}
        if texts is None or len(unlabelled) == len(records):
            return EncoderProfileBatch(row_ids, inputs, None)
        if unlabelled:
            raise RowsError("Expected an answer in every row or in none; add or drop them.", unlabelled)
        unknown = {row_id: f"label {gold!r}" for row_id, gold in zip(row_ids, golds, strict=True) if gold not in texts}
        if unknown:
            raise RowsError(
                f"Expected a label of the teacher {self.teacher_id!r} in every row; mend or drop the rows.", unknown
            )
        return EncoderProfileBatch(
            row_ids, inputs, torch.tensor([texts.index(gold) for gold in golds if gold is not None])
        )


def _media_of(records: Sequence[Record]) -> list[bytes]:
    missing = {record.id: "no media" for record in records if record.media is None}
    if missing:
        raise RowsError("Expected an image or a recording in every row of an encoder; drop the others.", missing)
    return [read_media(record.media) for record in records if record.media is not None]
