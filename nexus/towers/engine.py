"""TeacherEngine: one loaded teacher as an actor talks to it. Plain data in, plain data out; no Ray.

Which of the two files does the work depends on the teacher's role alone: causal_lm.py or encoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from nexus.errors import ConfigError
from nexus.towers import causal_lm
from nexus.towers.loader import LoadedTower
from nexus.towers.targets import ScoreRequest, TeacherTargets


class TeacherEngine:
    """Gives the targets, answers and profile of one teacher.

    On a CPU every call is deterministic. Results of a row do not depend on the other rows of the call beyond rounding.
    """

    def __init__(self, tower: LoadedTower, *, teacher_id: str) -> None:
        self.tower = tower
        self.teacher_id = teacher_id

    def score(self, request: ScoreRequest) -> TeacherTargets:
        """The teacher's targets for every row of `request`, in its order.

        Raises:
            ConfigError: the request does not fit the teacher's role, or asks for a layer that it does not have.
            RowsError: rows that cannot be decoded, do not fit the model, or give results that are not finite.
        """
        if request.completions is None:
            raise ConfigError(
                f"Expected completions to score for the language model {self.teacher_id!r}, found none. Generate them first."
            )
        tokens, hidden = causal_lm.score_completions(self.tower.model, self.tower.tokenizer, request)
        return TeacherTargets(
            teacher=self.teacher_id,
            fingerprint=self.tower.fingerprint,
            tokenizer_hash=self.tower.tokenizer_hash,
            row_ids=request.row_ids,
            tokens=tokens,
            hidden=hidden,
            pooled_BE=None,
            label_texts=None,
            label_logprobs_BC=None,
        )

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int | None = None) -> tuple[str, ...]:
        """Greedy completions of a language model, in the prompts' order."""
        return causal_lm.generate_greedily(
            self.tower.model, self.tower.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
