"""The router: its decisions, its calibration, its bounded risk, its keywords, and what it does when it cannot judge."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from nexus.errors import ArtifactError, ConfigError
from nexus.student.router import (
    KeywordTable,
    SparseIntentRouter,
    SparseIntentRouterConfig,
    clopper_pearson_upper,
    collapsed_tower,
    router_loss,
)

E = 6
KEYWORDS = (("reasoning", ("solve", "art", "word problem", "Straße", "c++")), ("vision", ("picture", "art history")))
ALL = [True, True, True]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _config(**changes: object) -> SparseIntentRouterConfig:
    return SparseIntentRouterConfig(**{"embedding_size": E, "hidden_size": 16, "keywords": KEYWORDS, **changes})


def _router(threshold: float | None = 0.6, **changes: object) -> SparseIntentRouter:
    torch.manual_seed(0)
    router = SparseIntentRouter(_config(**changes))
    torch.nn.init.normal_(router.mlp[3].weight, std=2.0)  # decided heads, both ways
    router.threshold = threshold
    return router


def _embedding(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, E, generator=torch.Generator().manual_seed(seed))


def _available(batch: int, *, vision: bool = True, audio: bool = True) -> Tensor:
    return torch.tensor([[True, vision, audio]] * batch)


class _Fixed(SparseIntentRouter):
    """A router whose probabilities are its embedding's first three numbers, to decide cases by hand."""

    def forward(self, embedding_BE: Tensor) -> Tensor:
        return embedding_BE[:, :3].clamp(1e-6, 1 - 1e-6).logit()


def _decide(
    probabilities: list[float],
    text: str = "",
    available: list[bool] = ALL,
    *,
    threshold: float | None = 0.6,
    **changes: object,
) -> tuple[list[bool], str]:
    router = _Fixed(_config(**changes))
    router.threshold = threshold
    embedding = torch.tensor([probabilities + [1.0] * (E - 3)])
    decision = router.route(embedding, [text], torch.tensor([available]))
    return decision.mask_BN[0].tolist(), decision.source[0]


# --- decisions ----------------------------------------------------------------------------------------------------------------


def test_a_confident_head_decides_and_heads_below_one_half_stay_off() -> None:
    free = {"modality_towers": ()}
    assert _decide([0.9, 0.4, 0.1], **free) == ([True, False, False], "model")
    assert _decide([0.9, 0.55, 0.1], **free) == ([True, True, False], "model")
    assert _decide([0.59, 0.55, 0.1], **free) == ([False, False, False], "trunk")


def test_at_most_max_towers_run_and_the_most_probable_win() -> None:
    free = {"modality_towers": ()}
    assert _decide([0.7, 0.9, 0.8], **free)[0] == [False, True, True]
    assert _decide([0.7, 0.9, 0.8], **free, max_towers=1)[0] == [False, True, False]
    assert _decide([0.9, 0.1, 0.1], available=ALL) == ([False, True, True], "model")  # two modalities leave no place


def test_a_present_modality_is_on_whatever_the_heads_say() -> None:
    assert _decide([0.1, 0.1, 0.1], available=[True, True, False]) == ([False, True, False], "modality")
    assert _decide([0.9, 0.1, 0.1], available=[True, True, False]) == ([True, True, False], "model")
    assert _decide([0.1, 0.1, 0.1], "solve it", [True, False, True]) == ([True, False, True], "keyword")
    assert _decide([0.1, 0.1, 0.1], "solve it", ALL) == ([False, True, True], "modality")  # no place for a third


def test_an_unavailable_tower_is_never_on_and_has_probability_zero() -> None:
    assert _decide([0.1, 0.9, 0.9], available=[True, False, False]) == ([False, False, False], "trunk")
    assert _decide([0.1, 0.1, 0.1], "a picture", [True, False, False]) == ([False, False, False], "trunk")
    decision = _router().route(_embedding(4), [""] * 4, _available(4, vision=False))
    assert (decision.probabilities_BN[:, 1] == 0).all()
    assert not decision.mask_BN[:, 1].any()


def test_without_a_threshold_the_heads_decide_nothing() -> None:
    assert _decide([1.0, 0.0, 0.0], available=[True, False, False], threshold=None) == ([False] * 3, "trunk")
    assert _decide([1.0, 0.0, 0.0], "solve", [True, False, False], threshold=None) == ([True, False, False], "keyword")


def test_a_keyword_of_a_tower_that_is_on_anyway_is_the_source() -> None:
    assert _decide([0.1, 0.1, 0.1], "picture", [True, True, True]) == ([False, True, True], "keyword")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_an_embedding_without_information_abstains_then_keyword_then_trunk_never_all(value: float) -> None:
    router = _router(threshold=0.0)
    embedding = _embedding(3)
    embedding[:2] = value
    if value != 0.0:
        embedding[:2, 1:] = 1.0  # one bad number is enough
    decision = router.route(embedding, ["solve", "hello", "hello"], _available(3, vision=False, audio=False))
    assert decision.source == ("keyword", "trunk", "model")
    assert decision.mask_BN[:2].tolist() == [[True, False, False], [False, False, False]]
    assert (decision.probabilities_BN[:2] == 0).all()
    assert torch.isfinite(decision.probabilities_BN).all()


def test_an_embedding_of_no_width_abstains_for_all_rows() -> None:
    decision = _router(threshold=0.0).route(torch.zeros(2, 0), ["solve", ""], _available(2, vision=False, audio=False))
    assert decision.source == ("keyword", "trunk")
    assert (decision.probabilities_BN == 0).all()


def test_an_empty_batch_is_routed_to_nothing() -> None:
    decision = _router().route(torch.zeros(0, E), [], torch.zeros(0, 3, dtype=torch.bool))
    assert decision.mask_BN.shape == (0, 3)
    assert decision.source == ()


def test_decisions_are_deterministic_and_no_row_depends_on_others_or_their_order() -> None:
    router = _router()
    embedding, texts = _embedding(16), [("solve" if row % 3 == 0 else "picture") for row in range(16)]
    available = _available(16)
    available[::2, 1:] = False
    first = router.route(embedding, texts, available)
    assert torch.equal(router.route(embedding, texts, available).mask_BN, first.mask_BN)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = router.route(embedding[order], [texts[i] for i in order], available[order])
    assert torch.equal(shuffled.mask_BN, first.mask_BN[order])
    assert shuffled.source == tuple(first.source[i] for i in order)
    for row in range(16):
        alone = router.route(embedding[row : row + 1], texts[row : row + 1], available[row : row + 1])
        assert torch.equal(alone.mask_BN[0], first.mask_BN[row])
        torch.testing.assert_close(alone.probabilities_BN[0], first.probabilities_BN[row])
    assert len({*first.source}) > 1


@pytest.mark.parametrize("max_towers", [1, 2, 3])
def test_no_row_ever_gets_more_than_max_towers(max_towers: int) -> None:
    router = _router(threshold=0.5, max_towers=max_towers, modality_towers=("vision",))
    decision = router.route(_embedding(200), ["solve a picture"] * 200, _available(200))
    counts = decision.mask_BN.sum(1)
    assert counts.max() <= max_towers
    assert decision.mask_BN[:, 1].all()


def test_coverage_never_grows_with_the_threshold() -> None:
    router = _router()
    covered = []
    for threshold in [step / 20 for step in range(21)]:
        router.threshold = threshold
        sources = router.route(_embedding(100), [""] * 100, _available(100)).source
        covered.append(sources.count("model"))
    assert covered == sorted(covered, reverse=True)
    assert covered[0] == 100
    assert covered[-1] < 100


def test_contradictory_shapes_are_named() -> None:
    router = _router()
    with pytest.raises(ValueError, match="found 1 texts for 2 rows"):
        router.route(_embedding(2), ["x"], _available(2))
    with pytest.raises(ValueError, match=r"available_BN of shape \(2, 3\), found \(3, 3\)"):
        router.route(_embedding(2), ["x"] * 2, _available(3))
    with pytest.raises(ValueError, match="embeddings of width 6, found 4"):
        router.route(torch.ones(2, 4), ["x"] * 2, _available(2))


# --- keywords -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tower"),
    [
        ("we went to a party", None),  # "art" is no word of it
        ("smart", None),
        ("artful", None),
        ("art_work", None),
        ("modern ART.", 0),
        ("(art)", 0),
        ("art", 0),
        ("SOLVE this", 0),
        ("sOlVe", 0),
        ("\uff33\uff2f\uff2c\uff36\uff25", 0),  # full width
        ("so\u200blve", 0),  # zero-width space inside
        ("so\u00adlve", 0),  # soft hyphen inside
        ("unsolved", None),
        ("STRASSE 5", 0),
        ("strasse", 0),
        ("a word   \n problem", 0),
        ("a wordproblem", None),
        ("word problems", None),
        ("a picture", 1),
        ("picture to solve", 0),  # the table's order, not the text's
        ("art history", 0),
        ("C++ code", 0),
        ("c++11", None),
        ("", None),
        ("\N{SNAKE}\U0001f600\u0000", None),
    ],
)
def test_keywords_match_whole_words_in_any_case_and_spelling(text: str, tower: int | None) -> None:
    assert KeywordTable(_config()).first_match(text, ALL) == tower


def test_a_longer_term_of_one_tower_hides_no_shorter_term_of_another() -> None:
    table = KeywordTable(_config())
    assert table.first_match("art history", [False, True, True]) == 1
    assert table.first_match("art history", ALL) == 0
    assert table.first_match("art", [False, True, True]) is None


def test_a_table_without_entries_or_terms_matches_nothing() -> None:
    assert KeywordTable(_config(keywords=())).first_match("solve", ALL) is None
    assert KeywordTable(_config(keywords=(("reasoning", ("x.y",)),))).first_match("xzy", ALL) is None


# --- training -----------------------------------------------------------------------------------------------------------------


def test_the_loss_equals_its_formula_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 3, generator=generator) * 3, torch.randint(0, 2, (7, 3), generator=generator)
    available = torch.randint(0, 2, (7, 3), generator=generator).bool()
    available[:, 0] = True
    bce, z, surplus = 0.0, 0.0, [0.0] * 3
    for row, head in itertools.product(range(7), range(3)):
        if not available[row, head]:
            continue
        logit, label = logits[row, head].item(), labels[row, head].item()
        p = 1 / (1 + math.exp(-logit))
        bce -= label * math.log(p) + (1 - label) * math.log(1 - p)
        z += math.log(math.exp(logit / 2) + math.exp(-logit / 2)) ** 2
        surplus[head] += (p - label) / int(available[:, head].sum())
    count = int(available.sum())
    expected = bce / count + 0.5 * sum(s**2 for s in surplus) / 3 + 0.25 * z / count
    got = router_loss(logits, labels, available, balance_weight=0.5, z_weight=0.25)
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("balance", "z"), [(0.0, 0.0), (10.0, 0.0), (0.0, 10.0)])
def test_each_term_of_the_loss_changes_the_gradients(balance: float, z: float) -> None:
    labels = torch.randint(0, 2, (8, 3), generator=torch.Generator().manual_seed(1))

    def gradient(balance_weight: float, z_weight: float) -> Tensor:
        router = _router()
        router_loss(router(_embedding(8)), labels, balance_weight=balance_weight, z_weight=z_weight).backward()
        return router.mlp[1].weight.grad

    plain = gradient(0.0, 0.0)
    assert plain.abs().max() > 0
    assert torch.allclose(gradient(balance, z), plain) is (balance == z == 0.0)


def test_unavailable_heads_receive_no_gradient_and_nothing_to_score_gives_zero() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    available = torch.tensor([[True, False, True]] * 4)
    router_loss(logits, torch.ones(4, 3), available).backward()
    assert (logits.grad[:, 1] == 0).all()
    assert (logits.grad[:, [0, 2]] != 0).all()
    assert router_loss(logits, torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.bool)).item() == 0.0


def test_balance_pulls_to_the_labels_share_and_not_to_uniform_use() -> None:
    labels = torch.tensor([[1.0, 0.0, 0.0]] * 9 + [[0.0, 1.0, 0.0]])
    faithful = labels.clamp(0.01, 0.99).logit()
    uniform = torch.zeros_like(labels)
    balance = [
        (router_loss(x, labels, balance_weight=1.0) - router_loss(x, labels, balance_weight=0.0)).item()
        for x in (faithful, uniform)
    ]
    assert balance[0] < 1e-3 < balance[1]


def _labelled(batch: int, seed: int, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows that each need one tower, which follows from the embedding; some labels are another tower's."""
    embedding = _embedding(batch, seed)
    labels = F.one_hot(embedding[:, :3].argmax(dim=1), 3).bool()
    flips = torch.rand(batch, 1, generator=torch.Generator().manual_seed(seed + 1)) < noise
    return embedding, torch.where(flips, labels.roll(1, dims=1), labels)


def _trained(noise: float = 0.0, steps: int = 150, **changes: object) -> SparseIntentRouter:
    torch.manual_seed(0)
    router = SparseIntentRouter(_config(modality_towers=(), max_towers=3, **changes))
    embedding, labels = _labelled(2000, 1, noise)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        router_loss(router(embedding), labels).backward()
        optimizer.step()
    return router


# --- calibration --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_calibration_never_raises_the_likelihoods_cost_and_mends_overconfidence(method: str) -> None:
    router = _trained(noise=0.2)
    torch.nn.init.zeros_(router.mlp[3].bias)
    router.mlp[3].weight.data *= 4.0  # four times too sure
    embedding, labels = _labelled(500, 2, 0.2)
    before, after = router.calibrate(embedding, labels, method=method)
    assert after < 0.8 * before
    # an independent count of the same costs
    with torch.no_grad():
        raw = router(embedding)
        assert before == pytest.approx(F.binary_cross_entropy_with_logits(raw, labels.float()).item(), rel=1e-5)
        calibrated = router.route(embedding, [""] * 500, _available(500)).probabilities_BN
    assert after == pytest.approx(F.binary_cross_entropy(calibrated, labels.float()).item(), rel=1e-4)


def test_a_temperature_keeps_every_decision_and_the_order_of_heads() -> None:
    router = _trained(noise=0.2)
    embedding, labels = _labelled(300, 2, 0.2)
    router.threshold = 0.0
    before = router.route(embedding, [""] * 300, _available(300))
    router.calibrate(embedding, labels, method="temperature")
    after = router.route(embedding, [""] * 300, _available(300))
    assert not torch.allclose(before.probabilities_BN, after.probabilities_BN)
    assert torch.equal(before.mask_BN, after.mask_BN)
    assert torch.equal(before.probabilities_BN.argsort(1), after.probabilities_BN.argsort(1))
    assert router.scale_N.unique().numel() == 1
    assert (router.offset_N == 0).all()


def test_platt_treats_heads_apart_and_survives_perfectly_separable_rows() -> None:
    router = _trained()
    embedding, _ = _labelled(300, 2)
    with torch.no_grad():
        labels = router(embedding) > 0
    before, after = router.calibrate(embedding, labels, method="platt")
    assert after <= before
    assert torch.isfinite(router.scale_N).all()
    assert (router.scale_N > 1).all()
    assert router.scale_N.unique().numel() == 3


def test_unavailable_heads_do_not_enter_the_calibration() -> None:
    embedding, labels = _labelled(300, 2, 0.2)
    available = _available(300)
    available[::2, 1] = False
    poisoned = labels.clone()
    poisoned[::2, 1] ^= True
    scales = []
    for rows in (labels, poisoned):
        router = _trained(noise=0.2)
        router.calibrate(embedding, rows, available)
        scales.append(router.scale_N)
    assert torch.equal(*scales)


# --- threshold ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("errors", "trials"), [(0, 1), (0, 59), (1, 60), (3, 100), (7, 30), (29, 30), (25, 2000), (400, 2000)]
)
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_clopper_pearson_bound_equals_scipys(errors: int, trials: int, confidence: float) -> None:
    expected = stats.beta.ppf(confidence, errors + 1, trials - errors)
    assert clopper_pearson_upper(errors, trials, confidence) == pytest.approx(expected, rel=1e-9)


def test_the_bound_is_one_without_evidence() -> None:
    assert clopper_pearson_upper(0, 0, 0.95) == 1.0
    assert clopper_pearson_upper(5, 5, 0.95) == 1.0


def test_the_threshold_is_the_smallest_whose_risk_is_bounded() -> None:
    router = _trained()
    embedding, labels = _labelled(1500, 5, 0.03)
    available = _available(1500)
    router.calibrate(*_labelled(500, 4, 0.03))
    fit = router.fit_threshold(embedding, labels, available)
    assert fit.threshold is not None
    assert router.threshold == fit.threshold
    assert fit.num_rows == 1500
    assert fit.risk_upper_bound <= 0.05
    # counted again, by routing
    decision = router.route(embedding, [""] * 1500, available)
    accepted = torch.tensor([source == "model" for source in decision.source])
    wrong = (decision.mask_BN != labels).any(1)
    assert int(accepted.sum()) == fit.num_accepted
    assert int((accepted & wrong).sum()) == fit.num_errors
    assert fit.num_errors / fit.num_accepted <= fit.risk_upper_bound
    # twelve candidates share the 5 % of wrong bounds
    assert fit.risk_upper_bound == clopper_pearson_upper(fit.num_errors, fit.num_accepted, 1 - 0.05 / 12)
    assert "95% sure" in fit.reason
    assert fit.threshold > 0
    router.threshold = fit.threshold - 0.1  # the next smaller candidate
    decision = router.route(embedding, [""] * 1500, available)
    accepted = torch.tensor([source == "model" for source in decision.source])
    wrong = (decision.mask_BN != labels).any(1)
    assert clopper_pearson_upper(int((accepted & wrong).sum()), int(accepted.sum()), 1 - 0.05 / 12) > 0.05


def test_the_risk_bound_holds_on_fresh_rows_in_nearly_all_repetitions() -> None:
    router = _trained(noise=0.05)
    fresh, fresh_labels = _labelled(20_000, 77, 0.02)
    broken = decided = 0
    for seed in range(40):
        fit = router.fit_threshold(*_labelled(300, 100 + 3 * seed, 0.02), _available(300), max_risk=0.12)
        if fit.threshold is None:
            continue
        decided += 1
        decision = router.route(fresh, [""] * 20_000, _available(20_000))
        accepted = torch.tensor([source == "model" for source in decision.source])
        risk = ((decision.mask_BN != fresh_labels).any(1) & accepted).sum() / accepted.sum()
        broken += bool(risk > 0.12)
    # at 95 % confidence 2 of 40 are expected at most; 6 or more have a probability of 1.4 %, and the seeds are fixed
    assert broken <= 5
    assert decided >= 20


def test_no_threshold_is_given_when_the_heads_know_nothing() -> None:
    router = _trained(steps=1)
    embedding, labels = _labelled(500, 5, 0.5)
    fit = router.fit_threshold(embedding, labels, _available(500))
    assert fit.threshold is None
    assert router.threshold is None
    assert fit.risk_upper_bound > 0.05
    assert fit.reason.startswith("no threshold keeps the risk below 0.05; the best: at ")
    assert set(router.route(embedding, [""] * 500, _available(500)).source) == {"trunk"}


def test_no_threshold_is_given_for_too_few_rows_however_good() -> None:
    # Twelve candidates share 5 %: without an error, 1 - 0.05 needs ln(0.05 / 12) / ln(0.95) = 106.8 rows.
    router = _trained()
    embedding, _ = _labelled(107, 5)
    with torch.no_grad():
        labels = router(embedding) > 0
    assert router.fit_threshold(embedding, labels, _available(107)).threshold == 0.0
    fit = router.fit_threshold(embedding[:106], labels[:106], _available(106))
    assert fit.threshold is None
    assert (fit.num_errors, fit.num_accepted) == (0, 106)


def test_rows_without_embedding_are_never_accepted_by_a_threshold() -> None:
    router = _trained()
    embedding, _ = _labelled(400, 5)
    with torch.no_grad():
        labels = router(embedding) > 0
    embedding[::2] = float("nan")
    fit = router.fit_threshold(embedding, labels, _available(400))
    assert fit.threshold == 0.0
    assert fit.num_accepted == 200


# --- collapse, files, mistakes ------------------------------------------------------------------------------------------------


def test_a_collapse_on_one_tower_is_seen_unless_the_labels_say_so() -> None:
    mask = torch.tensor([[True, False, False]] * 9 + [[False, True, False]])
    assert collapsed_tower(mask) == 0
    assert collapsed_tower(mask, mask) is None
    balanced_labels = torch.tensor([[True, False, False]] * 5 + [[False, True, False]] * 5)
    assert collapsed_tower(mask, balanced_labels) == 0
    assert collapsed_tower(mask, share=0.95) is None
    assert collapsed_tower(balanced_labels) is None


def test_a_saved_router_decides_as_before(tmp_path: Path) -> None:
    router = _trained(noise=0.1)
    router.calibrate(*_labelled(300, 2, 0.1))
    router.threshold = 0.83
    router.save(tmp_path)
    loaded = SparseIntentRouter.load(tmp_path)
    assert loaded.config == router.config
    assert loaded.threshold == 0.83
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in router.state_dict().items())
    texts = ["solve"] * 50
    first, second = (r.route(_embedding(50), texts, _available(50)) for r in (router, loaded))
    assert torch.equal(first.mask_BN, second.mask_BN)
    assert torch.equal(first.probabilities_BN, second.probabilities_BN)
    assert first.source == second.source


def test_a_missing_or_damaged_router_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Run the route stage again"):
        SparseIntentRouter.load(tmp_path)
    _router().save(tmp_path)
    (tmp_path / "router.safetensors").write_bytes(b"half")
    with pytest.raises(ArtifactError, match="Run the route stage again"):
        SparseIntentRouter.load(tmp_path)


def test_a_configuration_survives_json() -> None:
    config = _config(max_towers=3, towers=("reasoning", "vision", "audio"))
    assert SparseIntentRouterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert SparseIntentRouterConfig.from_dict({}) == SparseIntentRouterConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality_towers": ("smell",)}, "found 'smell'"),
        ({"keywords": (("touch", ("x",)),)}, "found 'touch'"),
        ({"max_towers": 1}, "found 1"),
        ({"max_towers": 4}, "found 4"),
        ({"keywords": (("vision", ("\u200b ",)),)}, "found an empty one"),
    ],
)
def test_mistakes_in_a_configuration_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(_config(), **changes)


def test_an_unknown_key_of_a_configuration_is_named() -> None:
    with pytest.raises(ConfigError, match="found 'hidden'"):
        SparseIntentRouterConfig.from_dict({"hidden": 3})
