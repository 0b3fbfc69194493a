"""The sparse intent router: which towers a prompt needs, and how sure that is.

One sigmoid head per tower over a frozen embedding; calibrated on held-out rows; trusted only above a threshold whose risk is
bounded. Below it a keyword table decides, and without a keyword the trunk works alone. A modality that is present always
switches its tower on; a tower without input is never on.

Letters: B rows, N towers, E embedding width.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nexus.config import TOWERS
from nexus.errors import ArtifactError, ConfigError

WEIGHTS_FILE = "router.safetensors"
CONFIG_FILE = "router.json"

Source = Literal["model", "keyword", "modality", "trunk"]
"""Who decided a row: the calibrated heads, the keyword table, the presence of a modality alone, or nobody (trunk only)."""

_CALIBRATION_PENALTY = 1e-3
"""Ridge on log-scale and offset: on separable rows the likelihood alone has no finite optimum. At identity it is 0, so
calibration cannot raise the likelihood's cost above the uncalibrated one."""
_THRESHOLD_CANDIDATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Fixed before any row is seen. Few, because they share the allowed probability of a wrong bound."""


@dataclass(frozen=True)
class SparseIntentRouterConfig:
    """Sizes, towers and keywords of a router."""

    embedding_size: int = 4096
    hidden_size: int = 256
    towers: tuple[str, ...] = TOWERS
    modality_towers: tuple[str, ...] = ("vision", "audio")
    """Towers whose input is a modality: present means on."""
    max_towers: int = 2
    """Most towers on for one row."""
    keywords: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(tower, terms), the first entry with a match wins."""

    def __post_init__(self) -> None:
        named = [*self.modality_towers, *(tower for tower, _ in self.keywords)]
        unknown = sorted(set(named) - set(self.towers))
        if unknown:
            raise ConfigError(
                f"Expected towers among {', '.join(self.towers)}, found {unknown[0]!r}. Correct the router's configuration."
            )
        if not len(self.modality_towers) <= self.max_towers <= len(self.towers):
            raise ConfigError(
                f"Expected max_towers between the {len(self.modality_towers)} modality towers, which are never refused, and the "
                f"{len(self.towers)} towers, found {self.max_towers}."
            )
        if any(not _normalised(term).strip() for _, terms in self.keywords for term in terms):
            raise ConfigError("Expected keywords of at least one visible character, found an empty one. Remove it.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back to an equal configuration."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseIntentRouterConfig:
        """Raises ConfigError naming an unknown key."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ConfigError(
                f"Expected keys of the router ({', '.join(sorted(known))}), found {unknown[0]!r}. Remove it."
            )
        lists = {name: tuple(values[name]) for name in ("towers", "modality_towers") if name in values}
        keywords = tuple((tower, tuple(terms)) for tower, terms in values.get("keywords", ()))
        return cls(**{**values, **lists, "keywords": keywords})


@dataclass(frozen=True)
class RouterDecision:
    """Which towers run, per row."""

    mask_BN: Tensor
    """bool; a row of nothing but False means trunk only."""
    probabilities_BN: Tensor
    """float32, calibrated; 0 where the tower is unavailable or the embedding could not be used."""
    source: tuple[Source, ...]


@dataclass(frozen=True)
class ThresholdFit:
    """What the calibration rows say about a threshold."""

    threshold: float | None
    """The smallest one whose risk is bounded; None if there is none, and then the heads alone decide no row."""
    num_rows: int
    num_accepted: int
    """Rows that the heads would decide at this threshold, or at the best one where none qualifies."""
    num_errors: int
    """Accepted rows whose towers would be wrong."""
    risk_upper_bound: float
    """Clopper-Pearson bound on the risk of an accepted row, valid for all candidates at once; 1.0 without accepted rows."""
    reason: str


class SparseIntentRouter(nn.Module):
    """One sigmoid head per tower, calibrated; below its threshold a keyword table decides, else trunk only."""

    scale_N: Tensor
    offset_N: Tensor
    _forced_N: Tensor

    def __init__(self, config: SparseIntentRouterConfig) -> None:
        super().__init__()
        self.config = config
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.embedding_size),
            nn.Linear(config.embedding_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, len(config.towers)),
        )
        self.register_buffer("scale_N", torch.ones(len(config.towers)))
        self.register_buffer("offset_N", torch.zeros(len(config.towers)))
        self.threshold: float | None = None
        """None, as before any fit, trusts the heads with no row."""
        self._keywords = KeywordTable(config)
        forced = torch.tensor([tower in config.modality_towers for tower in config.towers])
        self.register_buffer("_forced_N", forced, persistent=False)

    def forward(self, embedding_BE: Tensor) -> Tensor:
        """Uncalibrated logits [B, N]; what `router_loss` trains."""
        logits_BN: Tensor = self.mlp(embedding_BE)
        return logits_BN

    @torch.no_grad()
    def route(self, embedding_BE: Tensor, texts: Sequence[str], available_BN: Tensor) -> RouterDecision:
        """Decide each row by itself; rows do not influence each other.

        Args:
            embedding_BE: float, the frozen student's pooled embedding. A row that is zero or not finite is nothing to judge by,
                nor is a width of 0: the heads abstain.
            texts: one prompt per row, for the keyword table.
            available_BN: bool, True where the tower has input for the row.
        """
        if len(texts) != embedding_BE.shape[0]:
            raise ValueError(f"Expected one text per row, found {len(texts)} texts for {embedding_BE.shape[0]} rows.")
        probabilities_BN, usable_B = self._probabilities(embedding_BE, available_BN)
        forced_BN = self._forced_N & available_BN
        confident_B = self._confident(probabilities_BN, usable_B, self.threshold)
        mask_BN = self._chosen(probabilities_BN, forced_BN)
        sources: list[Source] = []
        for row, text in enumerate(texts):
            if confident_B[row]:
                sources.append("model")
                continue
            mask_BN[row] = forced_BN[row]
            tower = self._keywords.first_match(text, available_BN[row].tolist())
            if tower is not None and (mask_BN[row, tower] or mask_BN[row].sum() < self.config.max_towers):
                mask_BN[row, tower] = True
                sources.append("keyword")
            else:
                sources.append("modality" if forced_BN[row].any() else "trunk")
        return RouterDecision(mask_BN, probabilities_BN, tuple(sources))

    def calibrate(
        self,
        embedding_BE: Tensor,
        labels_BN: Tensor,
        available_BN: Tensor | None = None,
        *,
        method: Literal["temperature", "platt"] = "platt",
    ) -> tuple[float, float]:
        """Fit the probabilities to held-out rows; returns their negative log-likelihood before and after, nats per label.

        "temperature" (Guo et al. 2017, https://arxiv.org/abs/1706.04599) divides all logits by one number, so no decision and no
        order of heads changes; "platt" (Platt 1999) scales and shifts each head by itself. Scales stay positive. Neither raises
        the negative log-likelihood of these rows.
        """
        with torch.no_grad():
            logits_BN = self(embedding_BE).double()
        labels_BN = labels_BN.double()
        counted_BN = torch.ones_like(labels_BN, dtype=torch.bool) if available_BN is None else available_BN
        size = logits_BN.shape[1] if method == "platt" else 1
        log_scale = torch.zeros(size, dtype=torch.float64, requires_grad=True)
        offset = torch.zeros(size, dtype=torch.float64, requires_grad=method == "platt")

        def likelihood_cost() -> Tensor:
            calibrated_BN = logits_BN * log_scale.exp() + offset
            return F.binary_cross_entropy_with_logits(calibrated_BN[counted_BN], labels_BN[counted_BN])

        fitted = [log_scale, offset] if method == "platt" else [log_scale]
        optimizer = torch.optim.LBFGS(fitted, max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            cost = likelihood_cost() + _CALIBRATION_PENALTY * (log_scale.square().mean() + offset.square().mean())
            cost.backward()
            return cost

        before = likelihood_cost().item()
        optimizer.step(closure)
        with torch.no_grad():
            self.scale_N.copy_(log_scale.exp().expand_as(self.scale_N))
            self.offset_N.copy_(offset.expand_as(self.offset_N))
            return before, likelihood_cost().item()

    @torch.no_grad()
    def fit_threshold(
        self,
        embedding_BE: Tensor,
        labels_BN: Tensor,
        available_BN: Tensor,
        *,
        max_risk: float = 0.05,
        confidence: float = 0.95,
    ) -> ThresholdFit:
        """Set and return the smallest threshold above which, with `confidence`, at most `max_risk` of decisions are wrong.

        Learn-then-Test (Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052) with a Bonferroni correction over the
        candidates, so that `confidence` holds for whichever is chosen. A decision is wrong if any tower is. Use rows that
        neither training nor calibration saw.
        """
        probabilities_BN, usable_B = self._probabilities(embedding_BE, available_BN)
        decided_BN = self._chosen(probabilities_BN, self._forced_N & available_BN)
        wrong_B = (decided_BN != (labels_BN.bool() & available_BN)).any(dim=-1)
        shared_confidence = 1 - (1 - confidence) / len(_THRESHOLD_CANDIDATES)
        fits = []
        for threshold in _THRESHOLD_CANDIDATES:
            accepted_B = self._confident(probabilities_BN, usable_B, threshold)
            accepted, errors = int(accepted_B.sum()), int((accepted_B & wrong_B).sum())
            bound = clopper_pearson_upper(errors, accepted, shared_confidence)
            reason = f"at {threshold}, {errors} of {accepted} decisions are wrong: risk at most {bound:.3f}, {confidence:.0%} sure"
            fits.append(ThresholdFit(threshold, len(wrong_B), accepted, errors, bound, reason))
        fit = next((fit for fit in fits if fit.risk_upper_bound <= max_risk), None)
        if fit is None:
            closest = min(fits, key=lambda fit: fit.risk_upper_bound)
            reason = f"no threshold keeps the risk below {max_risk}; the best: {closest.reason}"
            fit = dataclasses.replace(closest, threshold=None, reason=reason)
        self.threshold = fit.threshold
        return fit

    def save(self, directory: Path) -> None:
        """Write router.safetensors and router.json into `directory`."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, directory / WEIGHTS_FILE)
        document = {"config": self.config.to_dict(), "threshold": self.threshold}
        (directory / CONFIG_FILE).write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> SparseIntentRouter:
        """Read what `save` wrote. Raises ArtifactError if a file is missing or damaged."""
        try:
            document = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
            router = cls(SparseIntentRouterConfig.from_dict(document["config"]))
            router.load_state_dict(load_file(directory / WEIGHTS_FILE))
            router.threshold = document["threshold"]
        except Exception as error:  # safetensors and json each raise their own
            raise ArtifactError(
                f"Expected a router in {directory} ({CONFIG_FILE}, {WEIGHTS_FILE}), found: {error}. Run the route stage again."
            ) from error
        return router

    def _probabilities(self, embedding_BE: Tensor, available_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Calibrated probabilities and which rows have an embedding to judge by."""
        expected = (embedding_BE.shape[0], len(self.config.towers))
        if tuple(available_BN.shape) != expected:
            raise ValueError(f"Expected available_BN of shape {expected}, found {tuple(available_BN.shape)}.")
        if embedding_BE.shape[1] == 0:
            return torch.zeros(expected, device=available_BN.device), torch.zeros_like(available_BN[:, 0])
        if embedding_BE.shape[1] != self.config.embedding_size:
            raise ValueError(
                f"Expected embeddings of width {self.config.embedding_size}, found {embedding_BE.shape[1]}. "
                "Use the student that this router was trained with."
            )
        usable_B = embedding_BE.isfinite().all(dim=-1) & (embedding_BE != 0).any(dim=-1)
        logits_BN = self(embedding_BE.masked_fill(~usable_B[:, None], 0.0)) * self.scale_N + self.offset_N
        return logits_BN.float().sigmoid() * (usable_B[:, None] & available_BN), usable_B

    @staticmethod
    def _confident(probabilities_BN: Tensor, usable_B: Tensor, threshold: float | None) -> Tensor:
        if threshold is None:
            return torch.zeros_like(usable_B)
        return usable_B & (probabilities_BN.amax(dim=-1).double() >= threshold)

    def _chosen(self, probabilities_BN: Tensor, forced_BN: Tensor) -> Tensor:
        """Heads above one half, at most `max_towers` by probability; forced ones are in, and come first."""
        rank_BN = probabilities_BN + 2.0 * forced_BN  # above any probability
        kept_BN = torch.zeros_like(forced_BN).scatter_(
            1, rank_BN.argsort(dim=-1, descending=True, stable=True)[:, : self.config.max_towers], True
        )
        return kept_BN & (forced_BN | (probabilities_BN > 0.5))


class KeywordTable:
    """Finds the first tower, in order of priority, of which a term stands in a text as whole words."""

    def __init__(self, config: SparseIntentRouterConfig) -> None:
        self._towers = [config.towers.index(tower) for tower, _ in config.keywords]
        # One pass over the text: at every word's beginning each entry's lookahead either captures a term or captures nothing,
        # so that a longer term of one tower cannot hide a shorter one of another.
        entries = "".join(f"(?=({_alternation(terms)})?)" for _, terms in config.keywords)
        self._pattern = re.compile(rf"(?<!\w){entries}")

    def first_match(self, text: str, available: Sequence[bool]) -> int | None:
        """Index of the tower to use among the available ones, or None."""
        entries = [entry for entry, tower in enumerate(self._towers) if available[tower]]
        found = {
            entry
            for match in (self._pattern.finditer(_normalised(text)) if entries else ())
            for entry in entries
            if match.group(entry + 1) is not None
        }
        return self._towers[min(found)] if found else None


def router_loss(
    logits_BN: Tensor,
    labels_BN: Tensor,
    available_BN: Tensor | None = None,
    *,
    balance_weight: float = 0.01,
    z_weight: float = 1e-3,
) -> Tensor:
    """Binary cross-entropy over available heads, plus balance and z terms; scalar float32, nats per head.

    Balance: mean over heads of (mean probability - mean label)^2 in the batch. It pulls towards the labels' share and not towards
    uniform use, because real traffic is not uniform. z: mean square of log(e^{z/2} + e^{-z/2}), the log-partition of a head, which
    keeps logits small (ST-MoE, Zoph et al. 2022, https://arxiv.org/abs/2202.08906, eq. 5).

    Args:
        labels_BN: bool or 0/1, the towers each row needs.
        available_BN: bool; heads of towers without input are not scored. None scores all.
    """
    logits_BN, labels_BN = logits_BN.float(), labels_BN.float()
    counted_BN = torch.ones_like(labels_BN) if available_BN is None else available_BN.float()
    count_N = counted_BN.sum(dim=0).clamp(min=1)
    total = counted_BN.sum().clamp(min=1)
    cross_entropy = (
        F.binary_cross_entropy_with_logits(logits_BN, labels_BN, reduction="none") * counted_BN
    ).sum() / total
    surplus_N = ((logits_BN.sigmoid() - labels_BN) * counted_BN).sum(dim=0) / count_N
    log_partition_BN = F.softplus(logits_BN) - logits_BN / 2
    z = (log_partition_BN.square() * counted_BN).sum() / total
    return cross_entropy + balance_weight * surplus_N.square().mean() + z_weight * z


def clopper_pearson_upper(errors: int, trials: int, confidence: float) -> float:
    """Smallest rate p with P(Binomial(trials, p) <= errors) <= 1 - confidence (Clopper & Pearson 1934); 1.0 without trials."""
    if errors >= trials:
        return 1.0
    low, high = errors / trials, 1.0
    # Halving 1 so often reaches float64's spacing near 1; bounds are reported to three digits.
    for _ in range(52):
        middle = (low + high) / 2
        if _binomial_tail(errors, trials, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def collapsed_tower(mask_BN: Tensor, labels_BN: Tensor | None = None, *, share: float = 0.8) -> int | None:
    """The tower that more than `share` of the rows go to, unless their labels send as many there; None if there is none."""
    traffic_N = mask_BN.float().mean(dim=0)
    expected_N = torch.zeros_like(traffic_N) if labels_BN is None else labels_BN.float().mean(dim=0)
    suspect_N = (traffic_N > share) & (expected_N <= share)
    return int(traffic_N.masked_fill(~suspect_N, -1.0).argmax()) if suspect_N.any() else None


def _binomial_tail(errors: int, trials: int, rate: float) -> float:
    """P(Binomial(trials, rate) <= errors), for 0 < rate < 1."""
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    log_choose = [
        math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
        for count in range(errors + 1)
    ]
    return math.fsum(math.exp(c + k * log_rate + (trials - k) * log_rest) for k, c in enumerate(log_choose))


def _alternation(terms: Sequence[str]) -> str:
    """The terms as whole words, longest first; a blank in a term matches any white space."""
    ordered = sorted((_normalised(term).split() for term in terms), key=lambda words: -len(" ".join(words)))
    return "(?:" + "|".join(r"\s+".join(map(re.escape, words)) for words in ordered) + r")(?!\w)"


def _normalised(text: str) -> str:
    """Case and width folded, invisible format characters (zero-width joiners, soft hyphens) removed."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(character for character in folded if unicodedata.category(character) != "Cf")
