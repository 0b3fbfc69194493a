"""A classifier's distribution as the next-token distribution of a student that answers in text.

A distribution over finitely many label texts is an autoregressive model over tokens: given the tokens written so far, the
probability of a next token is the mass of the labels that continue with it, divided by the mass of those that begin with what
is written. Targets are given along the path of one label (the teacher's arg-max), end-of-sequence token included.

Shape letters: B rows, C classes, N path tokens of all rows, K largest number of continuations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelTokenTargets:
    """Exact next-token distributions; unused slots hold log-probability -inf."""

    offsets_B1: np.ndarray
    """int64 [B+1]; row b owns positions offsets[b]:offsets[b+1]."""
    token_ids_N: np.ndarray
    """int64 [N]; the path."""
    ids_NK: np.ndarray
    """int64 [N, K]; distinct ids within a row of the array."""
    logprobs_NK: np.ndarray
    """float32 [N, K]; each row sums to 1."""


class LabelTokens:
    """The label texts of one classifier in the student's tokens."""

    def __init__(self, label_tokens: Sequence[Sequence[int]], vocabulary_size: int) -> None:
        """`label_tokens[c]` are the tokens of class c, end-of-sequence included.

        Raises:
            ValueError: when two classes have the same tokens, so that the student could not tell them apart.
        """
        paths = [tuple(tokens) for tokens in label_tokens]
        if len(set(paths)) != len(paths):
            double = next(path for path in paths if paths.count(path) > 1)
            classes = [index for index, path in enumerate(paths) if path == double]
            raise ValueError(
                f"Expected each label to have its own tokens, found classes {classes} with the same. Rename one label."
            )
        self._paths = paths
        # next token of every class at every depth; -1 beyond a path's end never equals a token
        longest = max(len(path) for path in paths)
        self._next_CL = np.full((len(paths), longest), -1, dtype=np.int64)
        for index, path in enumerate(paths):
            self._next_CL[index, : len(path)] = path
        self._vocabulary_size = vocabulary_size

    def targets(self, label_logprobs_BC: np.ndarray) -> LabelTokenTargets:
        """Targets along each row's arg-max label.

        Args:
            label_logprobs_BC: float32, log-probabilities over the classes.
        """
        rows_ids: list[np.ndarray] = []
        rows_logprobs: list[np.ndarray] = []
        path_tokens: list[int] = []
        offsets = [0]
        for logprobs_C in label_logprobs_BC.astype(np.float64):
            path = self._paths[int(logprobs_C.argmax())]
            probabilities_C = np.exp(logprobs_C - logprobs_C.max())
            alive_C = np.ones(len(self._paths), dtype=bool)
            for depth, token in enumerate(path):
                mass_V = np.bincount(
                    self._next_CL[alive_C, depth], weights=probabilities_C[alive_C], minlength=self._vocabulary_size
                )
                ids = np.flatnonzero(np.bincount(self._next_CL[alive_C, depth], minlength=self._vocabulary_size))
                rows_ids.append(ids)
                with np.errstate(divide="ignore"):
                    rows_logprobs.append(np.log(mass_V[ids] / mass_V.sum()))
                path_tokens.append(token)
                alive_C &= self._next_CL[:, depth] == token
            offsets.append(len(path_tokens))
        width = max(len(ids) for ids in rows_ids)
        ids_NK = np.stack([_padded_ids(ids, width) for ids in rows_ids])
        logprobs_NK = np.full((len(rows_ids), width), -np.inf, dtype=np.float32)
        for index, logprobs in enumerate(rows_logprobs):
            logprobs_NK[index, : len(logprobs)] = logprobs
        return LabelTokenTargets(
            np.asarray(offsets, dtype=np.int64), np.asarray(path_tokens, dtype=np.int64), ids_NK, logprobs_NK
        )


def _padded_ids(ids: np.ndarray, width: int) -> np.ndarray:
    """`ids` filled up to `width` with other ids, so that each id stands once and the tail stays the true complement."""
    missing = width - len(ids)
    if not missing:
        return ids
    fill = np.setdiff1d(np.arange(width + len(ids)), ids)[:missing]
    return np.concatenate([ids, fill])
