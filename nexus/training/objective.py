"""What one optimizer step asks of the student: a distillation loss per teacher and a cross-entropy on labelled rows.

For teacher t on its unlabelled rows: l_t = KD_t + gamma * A_t.
KD_t depends on what the teacher gives (T^2 is left out where the configuration says so):
- a language model with the student's tokenizer: T^2 (0.5 SKL + 0.5 SRKL), or T^2 KL(teacher || student), at every token of its own
  answer, on its top-k and tail, its whole distribution, or its last hidden states; from draws, T^2 times an unbiased estimate of
  KL(teacher || student), because the mix has none;
- a language model with another tokenizer: cross-entropy on the text of its answer, in the student's tokens (sequence-level
  distillation, Kim and Rush 2016, https://arxiv.org/abs/1606.07947), and, where that is chosen, the divergence over the spans of
  text that both tokenizers cut out (`training.cross_tokenizer`), at temperature 1;
- an encoder without a head: none; A_t then also holds the distance to its pooled embedding;
- a classifier: T^2 KL(teacher || student) on the next-token distribution that its label distribution implies (`training.labels`),
  and the same divergence over the labels themselves, from the pooled features of the tower.
A_t anchors the student to the teacher's critical layers, each through an affine map that only training has, and depth to depth: the
block of the tower, or the layer of the trunk, at the teacher's layer's relative depth. Language teachers anchor the trunk, and the
reasoning tower where their rows use it; encoders anchor their modality's tower.

Shape letters: B rows, T tokens, V vocabulary, N scored tokens, H a teacher's width, M feature tokens, P a teacher's positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from nexus.adapters.base import POOLED, Adapter, AdapterConfig, Alignment, Features
from nexus.config import TOWERS, Divergence
from nexus.data.collate import TokenBatch, collate, tokenise_rows
from nexus.data.records import Record
from nexus.errors import ConfigError, TowerLoadError
from nexus.student.inputs import record_media
from nexus.student.memory import NexusStudent
from nexus.student.presets import StudentSpec
from nexus.towers.health import check_reply
from nexus.towers.targets import (
    FullTargets,
    HiddenTargets,
    SampledTargets,
    ScoreRequest,
    TeacherHead,
    TeacherTargets,
    TokenTargets,
)
from nexus.training.batches import Assignment
from nexus.training.cross_tokenizer import CrossTokenizerLoss, TextAligner, cross_tokenizer_loss
from nexus.training.divergence import kd_loss, sampled_kl, topk_tail_kl
from nexus.training.facts import CapabilityFacts, TeacherFacts, TokenTransport
from nexus.training.features import STANDARDISERS, Standardisation, cosine_smooth_l1_anchor
from nexus.training.hidden_divergence import DISTILL_MIX, FORWARD_KL, OutputHead, Term, hidden_divergence
from nexus.training.labels import LabelTokens
from nexus.training.one_pass import StudentRows, dense_one_pass, hidden_one_pass, topk_one_pass
from nexus.training.requests import completion_of, is_asked, score_request

TERMS: Mapping[Divergence, tuple[Term, ...]] = {"mix": DISTILL_MIX, "forward_kl": FORWARD_KL}
"""What each name of a divergence stands for."""

ONE_PASS_HEAD_BYTES = 128 << 20
"""Largest output head whose gradient is kept for each teacher between its loss and the backward pass: 32,000 ids over 1,024
dimensions in float32. Beyond it the logits are computed a second time instead."""


@dataclass(frozen=True)
class TeacherLoss:
    """One teacher's loss on one batch, nats per scored token and anchor units."""

    kd: Tensor
    anchor: Tensor
    tokens: int
    """Student tokens that it scored or, where it gives features alone, the feature tokens that it is matched at."""
    aligned: float | None = None
    """Of the student's tokens, those whose text the teacher's tokens cut out too; None where no spans were compared."""


@dataclass(frozen=True)
class Whole:
    """What a loss is divided by where its rows are a part of an optimizer step: the step's scored tokens and rows."""

    tokens: int
    rows: int

    def __add__(self, other: Whole) -> Whole:
        """Of both parts together."""
        return Whole(self.tokens + other.tokens, self.rows + other.rows)


class DistillationObjective(nn.Module):
    """The student with the affine maps that only training needs; gives losses, never steps."""

    def __init__(
        self,
        student: NexusStudent,
        tokenizer: PreTrainedTokenizerBase,
        *,
        teachers: Sequence[TeacherFacts],
        capabilities: Sequence[CapabilityFacts],
        temperature: float,
        top_k: int,
        response_weight: float,
        max_length: int,
        temperature_squared: bool = True,
        divergence: Divergence = "mix",
        precision: Literal["float32", "bfloat16"] = "float32",
        standardise: Standardisation = "scale",
        transports: Mapping[str, TokenTransport] | None = None,
        head_of: Callable[[str], TeacherHead] | None = None,
        tokenizers: Mapping[str, PreTrainedTokenizerBase] | None = None,
    ) -> None:
        """
        Args:
            temperature_squared: multiply the divergences of tempered distributions by T^2.
            divergence: of the token distributions; draws have only the forward KL.
            precision: of the student's passes; bfloat16 runs them under autocast.
            standardise: what makes the teachers' features comparable.
            transports: how token distributions come from teachers that share the tokenizer; top-k from those that it leaves out.
            head_of: gives a teacher's output head; asked once for each teacher whose hidden states arrive.
            tokenizers: of the teachers whose distributions are learned from although their tokenizer is another.
        """
        super().__init__()
        self.student = student
        self.tokenizer = tokenizer
        self.teachers = {teacher.id: teacher for teacher in teachers}
        self.capabilities = {capability.name: capability for capability in capabilities}
        self._temperature = temperature
        # What `kd_loss` squares.
        self._factor = temperature if temperature_squared else 1.0
        self._top_k = top_k
        self._response_weight = response_weight
        self._max_length = max_length
        self._divergence = divergence
        self._precision = precision
        self._transports = dict(transports or {})
        self._head_of = head_of
        self._heads: dict[str, OutputHead] = {}
        self._aligners = {
            teacher: TextAligner(tokenizer, other, name=teacher) for teacher, other in (tokenizers or {}).items()
        }
        width = student.spec.core.hidden_size
        self.trunk_alignments = nn.ModuleDict(
            {
                _key(teacher.id, layer): nn.Linear(width, teacher.hidden_size)
                for teacher in teachers
                if teacher.role == "causal_lm"
                for layer, _ in teacher.critical_layers
            }
        )
        self.standardisers = {
            _key(teacher.id, layer): STANDARDISERS[standardise](teacher.hidden_size)
            for teacher in teachers
            for layer in _anchored(teacher)
        }
        vocabulary = student.spec.core.vocab_size
        self._label_tokens = {
            teacher.id: LabelTokens(label_token_ids(teacher.label_texts, tokenizer), vocabulary)
            for teacher in teachers
            if teacher.label_texts is not None
        }

    @property
    def device(self) -> torch.device:
        """Where the student is; everything that meets it is made or brought there."""
        return next(self.student.parameters()).device

    def _array(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    # --- requests -------------------------------------------------------------------------------------------------------------

    def request(self, assignment: Assignment, records: Sequence[Record]) -> ScoreRequest | None:
        """What to ask the teacher about these rows; None when its answers in the rows already say everything."""
        teacher = self.teachers[assignment.teacher]
        by_span = teacher.id in self._aligners
        if not records or not is_asked(teacher, by_span=by_span):
            return None
        return score_request(
            teacher,
            records,
            temperature=self._temperature,
            by_span=by_span,
            top_k=self._top_k,
            transport=self._transports.get(teacher.id),
            capability=self.capabilities[assignment.capability],
        )

    # --- losses ---------------------------------------------------------------------------------------------------------------

    def size(self, assignment: Assignment, records: Sequence[Record], targets: TeacherTargets | None) -> Whole:
        """Scored tokens and rows of one micro-batch; the sum over a step's micro-batches is what `teacher_loss` divides by."""
        completions = self._completions(self.teachers[assignment.teacher], records, targets)
        return Whole(self._collate(records, completions).num_loss_tokens, len(records))

    def observe(self, step: Mapping[Assignment, Sequence[TeacherTargets | None]]) -> None:
        """Take the teachers' features of one optimizer step into the statistics that `teacher_loss` standardises them with.

        They are taken in at once, so that the statistics are the same bit by bit however the step is cut into micro-batches.

        Args:
            step: the targets of all its micro-batches, in their order.

        Raises:
            TowerLoadError: pooled embeddings of another width than the teacher's blocks.
        """
        parts: dict[str, list[Tensor]] = {}
        for assignment, replies in step.items():
            teacher = self.teachers[assignment.teacher]
            for feature in _anchored(teacher):
                key = _key(teacher.id, feature)
                if not self.standardisers[key].frozen:
                    found = [self._target(teacher, feature, reply).flatten(0, 1) for reply in replies]
                    parts.setdefault(key, []).extend(found)
        for key, found in parts.items():
            rows_MH = torch.cat(found)
            self.standardisers[key].update(rows_MH, torch.ones(len(rows_MH), dtype=torch.bool, device=self.device))

    def num_gold_tokens(self, records: Sequence[Record]) -> int:
        """Scored tokens of labelled rows."""
        return self._collate(records, [completion_of(record) for record in records]).num_loss_tokens

    def teacher_loss(
        self,
        assignment: Assignment,
        records: Sequence[Record],
        targets: TeacherTargets | None,
        *,
        whole: Whole | None = None,
        observed: bool = False,
    ) -> TeacherLoss:
        """l_t's two parts on unlabelled rows.

        Args:
            whole: of the optimizer step that these rows are a part of; the parts' losses then add up to the step's. None means
                that they are all of it.
            observed: `observe` has taken in the step's features; otherwise those of these rows are taken in here.

        Raises:
            TowerLoadError: when the targets are in another tokenizer's ids.
            TeacherHealthError: when they are for other rows, or come from another checkpoint.
        """
        teacher = self.teachers[assignment.teacher]
        if targets is not None:
            check_reply(targets, row_ids=tuple(record.id for record in records), fingerprint=teacher.fingerprint)
        if not observed:
            self.observe({assignment: [targets]})
        completions = self._completions(teacher, records, targets)
        passed = self._forward(records, completions)
        aligned = None
        tokens = 1.0 if whole is None else passed.batch.num_loss_tokens / whole.tokens
        rows = 1.0 if whole is None else len(records) / whole.rows
        if teacher.label_texts is not None:
            assert targets is not None
            assert targets.label_logprobs_BC is not None
            divergence = tokens * self._classifier_divergence(teacher, passed, targets)
            divergence = divergence + rows * self._tower_divergence(teacher, passed, targets)
            kd = kd_loss(divergence, temperature=self._factor)
        elif _is_feature_only(teacher):
            kd = passed.states[0].new_zeros(())
        elif teacher.shares_tokenizer:
            assert targets is not None
            kd = kd_loss(tokens * self._token_divergence(passed, targets), temperature=self._factor)
        else:
            kd = tokens * self._response_weight * passed.cross_entropy()
            if teacher.id in self._aligners:
                assert targets is not None
                spans = self._span_divergence(teacher, passed, completions, targets)
                kd, aligned = kd + tokens * spans.loss, spans.aligned_share
        # The states of a language model in the student's tokens count by token; means over answers and towers' features by row.
        by_token = teacher.role == "causal_lm" and teacher.shares_tokenizer
        scored = passed.batch.num_loss_tokens
        if _is_feature_only(teacher):
            scored = int(self._tower(teacher, passed)[1].mask_BM.sum())
        return TeacherLoss(
            kd, (tokens if by_token else rows) * self._anchor(teacher, passed, targets, kd), scored, aligned
        )

    def gold_loss(
        self, labelled: Mapping[str, Sequence[Record]], *, num_tokens: Mapping[str, int] | None = None
    ) -> Tensor:
        """Cross-entropy on the gold completions of labelled rows, nats per token, mean over capabilities. One forward pass.

        Args:
            labelled: capability -> rows, at least one.
            num_tokens: scored tokens of each capability in the optimizer step that these rows are a part of; None counts these.
        """
        records = [record for rows in labelled.values() for record in rows]
        passed = self._forward(records, [completion_of(record) for record in records])
        parts = passed.row_cross_entropy().split([len(rows) for rows in labelled.values()], dim=1)
        if num_tokens is not None:
            shares = [nats_B.sum() / num_tokens[name] for name, (nats_B, _) in zip(labelled, parts, strict=True)]
            return torch.stack(shares).sum() / len(num_tokens)
        return torch.stack([nats_B.sum() / tokens_B.sum() for nats_B, tokens_B in parts]).mean()

    def _completions(
        self, teacher: TeacherFacts, records: Sequence[Record], targets: TeacherTargets | None
    ) -> list[str]:
        """What the student is to say: the label that a classifier chose, the answer in the row, or nothing (features alone)."""
        if _is_feature_only(teacher):
            return [""] * len(records)
        if teacher.label_texts is None:
            return [completion_of(record) for record in records]
        assert targets is not None
        assert targets.label_logprobs_BC is not None
        return [teacher.label_texts[index] for index in targets.label_logprobs_BC.argmax(axis=1)]

    def _collate(self, records: Sequence[Record], completions: Sequence[str]) -> TokenBatch:
        return collate(
            records, self.tokenizer, max_length=self._max_length, padding_side="right", completions=completions
        )

    def _forward(self, records: Sequence[Record], completions: Sequence[str]) -> _Passed:
        """One pass over rows of any capabilities, each with the towers of its own."""
        facts = [self.capabilities[record.capability] for record in records]
        batch = self._collate(records, completions).to(self.device)
        with torch.autocast(batch.input_ids_BT.device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            output = self.student(
                batch.input_ids_BT,
                batch.attention_mask_BT,
                prompt_mask_BT=batch.attention_mask_BT.bool() & ~batch.loss_mask_BT,
                tower_mask_BN=torch.tensor([[tower in fact.towers for tower in TOWERS] for fact in facts]),
                media=record_media(records, self.student.spec, snr_db=[fact.snr_db for fact in facts]).to(self.device),
                output_hidden_states=True,
                logits_to_keep=1,
            )
        # Most positions are prompt: the head over the vocabulary is applied to the scored ones only.
        head = self.student.core.lm_head
        # The losses run in float32, whatever the student did.
        states = tuple(
            state_BTD.to(torch.promote_types(state_BTD.dtype, torch.float32))
            for state_BTD in output.trunk.hidden_states
        )
        features = {
            tower: (rows_M, found.at_least_float32()) for tower, (rows_M, found) in output.encoded.features.items()
        }
        return _Passed(batch, head, states, features)

    def _token_divergence(self, passed: _Passed, targets: TeacherTargets) -> Tensor:
        tokens = targets.tokens
        assert tokens is not None
        ids_N = passed.scored_ids_N
        if not torch.equal(ids_N, self._array(tokens.token_ids_N).long()):
            raise TowerLoadError(
                f"Expected {targets.teacher} to score the student's {len(ids_N)} completion tokens, found "
                f"{len(tokens.token_ids_N)} others: the tokenizers differ. Set student.tokenizer to a teacher that shares it."
            )
        student = StudentRows(passed.scored(passed.states[-1]), self.student.core.lm_head.weight)
        count = len(ids_N)
        if isinstance(tokens, HiddenTargets):
            return self._hidden_divergence(targets.teacher, student, tokens)
        if isinstance(tokens, FullTargets):
            # A head may be padded beyond the ids that another model of the same tokenizer knows.
            shared = min(len(student.weight_VD), tokens.logprobs_NV.shape[1])
            return dense_one_pass(
                replace(student, weight_VD=student.weight_VD[:shared]),
                self._array(tokens.logprobs_NV)[:, :shared],
                terms=TERMS[self._divergence],
                num_loss_tokens=count,
                temperature=self._temperature,
            )
        mask_1N = torch.ones(1, count, dtype=torch.bool, device=self.device)
        if isinstance(tokens, SampledTargets):
            return sampled_kl(
                passed.scored_logits_NV[None],
                self._array(tokens.ids_NS).long()[None],
                self._array(tokens.logprobs_NS)[None],
                mask_1N,
                num_loss_tokens=count,
                temperature=self._temperature,
            )
        assert isinstance(tokens, TokenTargets), "a teacher of the student's tokenizer is asked for its distributions"
        ids_NK, logprobs_NK = self._array(tokens.ids_NK).long(), self._array(tokens.logprobs_NK)
        tail_N = self._array(tokens.tail_logprob_N)
        if self._divergence == "forward_kl":
            return topk_tail_kl(
                passed.scored_logits_NV[None],
                ids_NK[None],
                logprobs_NK[None],
                mask_1N,
                num_loss_tokens=count,
                temperature=self._temperature,
                tail_logprob_BT=tail_N[None],
            )
        return topk_one_pass(
            student,
            ids_NK,
            logprobs_NK,
            terms=DISTILL_MIX,
            num_loss_tokens=count,
            temperature=self._temperature,
            tail_logprob_M=tail_N,
        )

    def _span_divergence(
        self, teacher: TeacherFacts, passed: _Passed, completions: Sequence[str], targets: TeacherTargets
    ) -> CrossTokenizerLoss:
        tokens = targets.tokens
        assert isinstance(tokens, TokenTargets), "asked for as topk"
        aligner = self._aligners[teacher.id]
        rows = aligner.align(completions, passed.scored_mask_BT.sum(dim=1).tolist(), tokens)
        return cross_tokenizer_loss(
            passed.scored_logits_NV[rows.student_N],
            passed.scored_ids_N[rows.student_N],
            self._array(tokens.token_ids_N).long()[rows.teacher_M],
            self._array(tokens.ids_NK).long()[rows.teacher_M],
            self._array(tokens.logprobs_NK)[rows.teacher_M],
            self._array(tokens.tail_logprob_N)[rows.teacher_M],
            alignment=rows.alignment,
            common=aligner.common,
            num_loss_tokens=passed.batch.num_loss_tokens,
            temperature=1.0,
        )

    def _hidden_divergence(self, teacher: str, student: StudentRows, tokens: HiddenTargets) -> Tensor:
        """The exact divergence from both models' last states; logits exist a block or a tile at a time."""
        head = self._teacher_head(teacher)
        shared = min(len(student.weight_VD), len(head.weight_VD))
        weight_VD, states_NE = student.weight_VD[:shared], self._array(tokens.states_NH)
        cut = OutputHead(head.weight_VD[:shared], None if head.bias_V is None else head.bias_V[:shared], head.softcap)
        if weight_VD.nbytes <= ONE_PASS_HEAD_BYTES:
            return hidden_one_pass(
                replace(student, weight_VD=weight_VD),
                states_NE,
                cut,
                terms=TERMS[self._divergence],
                num_loss_tokens=len(states_NE),
                temperature=self._temperature,
            )
        return hidden_divergence(
            student.states_MD[None],
            OutputHead(weight_VD),
            states_NE[None],
            cut,
            torch.ones(1, len(states_NE), dtype=torch.bool, device=self.device),
            terms=TERMS[self._divergence],
            num_loss_tokens=len(states_NE),
            temperature=self._temperature,
        )

    def _teacher_head(self, teacher: str) -> OutputHead:
        """A teacher's head, held from its first use: it never changes."""
        if teacher not in self._heads:
            assert self._head_of is not None, "hidden states come from a source that also gives the head"
            sent = self._head_of(teacher)
            # Arrays from the object store are read-only, which PyTorch warns of.
            weight_VH = self._array(sent.weight_VH.copy())
            if sent.weight_VH.dtype == np.uint16:
                weight_VH = weight_VH.view(torch.bfloat16)
            bias_V = None if sent.bias_V is None else self._array(sent.bias_V.copy())
            self._heads[teacher] = OutputHead(weight_VH, bias_V, sent.softcap)
        return self._heads[teacher]

    def _classifier_divergence(self, teacher: TeacherFacts, passed: _Passed, targets: TeacherTargets) -> Tensor:
        assert targets.label_logprobs_BC is not None
        implied = self._label_tokens[teacher.id].targets(targets.label_logprobs_BC)
        count = len(implied.token_ids_N)
        return topk_tail_kl(
            passed.scored_logits_NV[None],
            self._array(implied.ids_NK)[None],
            self._array(implied.logprobs_NK)[None],
            torch.ones(1, count, dtype=torch.bool, device=self.device),
            num_loss_tokens=count,
            temperature=self._temperature,
            tail_logprob_BT=torch.full((1, count), -torch.inf, device=self.device),
        )

    def _tower_divergence(self, teacher: TeacherFacts, passed: _Passed, targets: TeacherTargets) -> Tensor:
        """KL(teacher || tower) over the labels, from the tower's pooled features alone; nats per row.

        Through the ports the labels say little while the tower is untrained and the gates are nearly shut.
        """
        adapter, features = self._tower(teacher, passed)
        logits_BC = adapter.predict(teacher.id, POOLED, features) / self._temperature
        assert targets.label_logprobs_BC is not None
        label_logprobs_BC = self._array(targets.label_logprobs_BC)
        return F.kl_div(logits_BC.log_softmax(dim=-1), label_logprobs_BC, log_target=True, reduction="batchmean")

    def _anchor(self, teacher: TeacherFacts, passed: _Passed, targets: TeacherTargets | None, like: Tensor) -> Tensor:
        """Weighted distance to the critical layers, and to the pooled embedding of a teacher that has nothing else; exactly 0
        without any."""
        total = like.new_zeros(())
        if _is_feature_only(teacher):
            target_B1H = self._target(teacher, POOLED, targets)
            adapter, features = self._tower(teacher, passed)
            predicted_BH = adapter.predict(teacher.id, POOLED, features)
            total = total + self._distance(_key(teacher.id, POOLED), predicted_BH[:, None], target_B1H)
        for layer, weight in teacher.critical_layers:
            target_BMH = self._target(teacher, layer, targets)
            distances = [
                self._distance(_key(teacher.id, layer), predicted_BMH, target_BMH)
                for predicted_BMH in self._predictions(teacher, layer, passed)
            ]
            total = total + weight * torch.stack(distances).mean()
        return total

    def _distance(self, key: str, predicted_BMH: Tensor, target_BMH: Tensor) -> Tensor:
        mask_BM = torch.ones(target_BMH.shape[:-1], dtype=torch.bool, device=self.device)
        standardiser = self.standardisers[key]
        return cosine_smooth_l1_anchor(standardiser.rotate(predicted_BMH), standardiser(target_BMH), mask_BM)

    def _target(self, teacher: TeacherFacts, feature: int | str, targets: TeacherTargets | None) -> Tensor:
        """What the student's features are compared with, by row: [B, M, H] of an encoder, [B, 1, H] where one vector is all that both
        have, and [1, N, H] of a language model with the student's tokens."""
        assert targets is not None, "a teacher with features to match is asked for them"
        if isinstance(feature, str):
            assert targets.pooled_BE is not None
            if targets.pooled_BE.shape[1] != teacher.hidden_size:
                raise TowerLoadError(
                    f"Expected pooled embeddings of {teacher.hidden_size} dimensions from {teacher.id!r}, the width of its blocks, "
                    f"found {targets.pooled_BE.shape[1]}. Remove it from the run."
                )
            return self._array(targets.pooled_BE)[:, None]
        states = self._array(targets.hidden[feature]).float()
        if teacher.role != "causal_lm":
            # Another number of patches or frames: average the teacher's neighbouring positions to the student's grid.
            num_tokens = _num_tower_tokens(self.student.spec, teacher.id)
            if states.shape[1] == num_tokens:
                return states
            return F.adaptive_avg_pool1d(states.transpose(1, 2), num_tokens).transpose(1, 2)
        if teacher.shares_tokenizer:
            return states[None]
        # Other tokens, other positions: the means over the answer are what both have.
        assert targets.tokens is not None
        lengths = torch.from_numpy(targets.tokens.offsets_B1).diff().tolist()
        return torch.stack([part.mean(dim=0) for part in states.split(lengths)])[:, None]

    def _predictions(self, teacher: TeacherFacts, layer: int, passed: _Passed) -> list[Tensor]:
        """What the student says of one layer, each in the shape of `_target`: by the tower of an encoder; by the trunk's layer of the
        same depth, and by the reasoning tower where a language model has one."""
        if teacher.role != "causal_lm":
            adapter, features = self._tower(teacher, passed)
            return [adapter.predict(teacher.id, layer, features)]
        align = self.trunk_alignments[_key(teacher.id, layer)]
        trunk_BTD = passed.trunk_at_depth((layer + 1) / teacher.num_layers)
        if not teacher.shares_tokenizer:
            return [align(passed.mean_over_answer(trunk_BTD))[:, None]]
        found = [align(passed.scored(trunk_BTD))[None]]
        # A teacher may have rows of a capability that needs the tower, and rows of one that does not.
        if _tower_of(self.student.spec, teacher.id) in passed.features:
            adapter, features = self._tower(teacher, passed)
            found.append(passed.scored(adapter.predict(teacher.id, layer, features))[None])
        return found

    def _tower(self, teacher: TeacherFacts, passed: _Passed) -> tuple[Adapter[AdapterConfig], Features]:
        tower = _tower_of(self.student.spec, teacher.id)
        assert tower is not None
        adapter = self.student.adapters[tower]
        assert isinstance(adapter, Adapter)
        return adapter, passed.features[tower][1]


@dataclass(frozen=True)
class _Passed:
    """One forward pass with what the losses read from it."""

    batch: TokenBatch
    head: nn.Module
    """From the trunk's last states to logits."""
    states: tuple[Tensor, ...]
    """The trunk's embeddings and each layer's output [B, T, D]."""
    features: Mapping[str, tuple[Tensor, Features]]

    @property
    def scored_mask_BT(self) -> Tensor:
        """[B, T-1]: positions whose next token is scored."""
        return self.batch.loss_mask_BT[:, 1:]

    @property
    def scored_ids_N(self) -> Tensor:
        return self.batch.input_ids_BT[:, 1:][self.scored_mask_BT]

    @property
    def scored_logits_NV(self) -> Tensor:
        logits_NV: Tensor = self.head(self.scored(self.states[-1]))
        return logits_NV

    def scored(self, values_BTX: Tensor) -> Tensor:
        """[N, X]: the values at the positions that predict scored tokens."""
        return values_BTX[:, :-1][self.scored_mask_BT]

    def mean_over_answer(self, values_BTX: Tensor) -> Tensor:
        """[B, X]: their mean over each row."""
        mask_BT1 = self.scored_mask_BT[..., None]
        return (values_BTX[:, :-1] * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)

    def trunk_at_depth(self, depth: float) -> Tensor:
        """[B, T, D]: output of the trunk's layer at a relative depth in (0, 1]."""
        return self.states[max(1, round(depth * (len(self.states) - 1)))]

    def cross_entropy(self) -> Tensor:
        """Nats per scored token."""
        return F.cross_entropy(self.scored_logits_NV.float(), self.scored_ids_N)

    def row_cross_entropy(self) -> Tensor:
        """[2, B]: summed nats and number of scored tokens of each row."""
        nats_N = F.cross_entropy(self.scored_logits_NV.float(), self.scored_ids_N, reduction="none")
        rows_N = self.scored_mask_BT.nonzero()[:, 0]
        sums_B = nats_N.new_zeros(len(self.scored_mask_BT)).index_add(0, rows_N, nats_N)
        return torch.stack([sums_B, self.scored_mask_BT.sum(dim=1).to(sums_B)])


def align_with_teachers(
    spec: StudentSpec, teachers: Sequence[TeacherFacts], towers: Mapping[str, Sequence[str]]
) -> StudentSpec:
    """`spec` with an affine map for every critical layer whose teacher has a tower.

    Args:
        towers: teacher id -> towers that its rows need. An encoder aligns with the first of vision and audio among them, a
            language model that shares the student's tokenizer with reasoning; others align with the trunk.
    """
    alignments: dict[str, list[Alignment]] = {}
    for teacher in teachers:
        wanted = ("reasoning",) if teacher.role == "causal_lm" else ("vision", "audio")
        tower = next((name for name in towers[teacher.id] if name in wanted and name in spec.adapters()), None)
        if teacher.role == "causal_lm" and not teacher.shares_tokenizer:
            continue
        if teacher.role == "encoder" and tower is None:
            raise ConfigError(
                f"Expected the encoder teacher {teacher.id!r} to come with vision or audio under data.<capability>.towers, found "
                "none: no part of the student would learn from it. Add it, or remove the teacher."
            )
        if tower is not None:
            alignments.setdefault(tower, []).extend(
                Alignment(teacher.id, layer, teacher.hidden_size, depth=(layer + 1) / teacher.num_layers)
                for layer, _ in teacher.critical_layers
            )
            if teacher.label_texts is not None:
                alignments[tower].append(Alignment(teacher.id, POOLED, len(teacher.label_texts)))
            elif _is_feature_only(teacher):
                alignments[tower].append(Alignment(teacher.id, POOLED, teacher.hidden_size))
    for tower, entries in alignments.items():
        spec = spec.with_alignments(tower, entries)
    return spec


def check_answered(teachers: Sequence[TeacherFacts], capabilities: Mapping[str, Sequence[str]]) -> None:
    """Refuse a capability whose teachers give features alone: nobody would say what its answers are.

    Args:
        capabilities: name -> ids of its teachers.

    Raises:
        ConfigError: naming the capability.
    """
    silent = {teacher.id for teacher in teachers if _is_feature_only(teacher)}
    for capability, ids in capabilities.items():
        if silent.issuperset(ids):
            raise ConfigError(
                f"Expected a teacher of {capability!r} that answers in text, a language model or a classifier with label texts, "
                f"found only {', '.join(ids)}, which give features. Add one."
            )


def _anchored(teacher: TeacherFacts) -> tuple[int | str, ...]:
    """What of it the student is matched with."""
    layers = tuple(layer for layer, _ in teacher.critical_layers)
    return (*layers, POOLED) if _is_feature_only(teacher) else layers


def _is_feature_only(teacher: TeacherFacts) -> bool:
    """An encoder without a classification head: its rows have no answer, its features anchor a tower."""
    return teacher.role == "encoder" and teacher.label_texts is None


def label_token_ids(label_texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Each label text as completion tokens of the student, end-of-sequence included."""
    records = [
        Record(id=str(index), capability="label", prompt="", completion=text) for index, text in enumerate(label_texts)
    ]
    return [tuple(int(token) for token in row.completion_ids) for row in tokenise_rows(records, tokenizer)]


def _key(teacher: str, layer: int | str) -> str:
    # Module names may not hold dots, teacher ids may.
    return f"{teacher.replace('.', '_')}:{layer}"


def _declared(spec: StudentSpec, tower: str, teacher: str) -> bool:
    config = spec.adapters().get(tower)
    return config is not None and any(alignment.teacher == teacher for alignment in config.alignments)


def _num_tower_tokens(spec: StudentSpec, teacher: str) -> int:
    """Feature tokens of the tower that an encoder teaches."""
    config = spec.vision if _tower_of(spec, teacher) == "vision" else spec.audio
    assert config is not None, "an encoder teaches a tower of media"
    return config.num_tokens


def _tower_of(spec: StudentSpec, teacher: str) -> str | None:
    return next((tower for tower in spec.adapters() if _declared(spec, tower, teacher)), None)
