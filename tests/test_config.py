"""The configuration: strict, one line per mistake, overrides, and every shipped file parses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nexus.config import RunConfig, dump_config, load_config, parse_config, resolve_path
from nexus.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


def _document() -> dict:
    return yaml.safe_load(QUICKSTART.read_text())


def _error(document: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(document, source="run.yaml")
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_shipped_run_configuration_parses():
    runs = [QUICKSTART, *(CONFIGS / "distill").glob("*.yaml")]
    assert runs
    for path in runs:
        assert isinstance(load_config(path), RunConfig)


def test_a_resolved_configuration_reads_back_equal(tmp_path):
    config = load_config(QUICKSTART, ["distill.surgery.method=upgrad", "seed=7"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config
    plain = load_config(QUICKSTART)
    (tmp_path / "d.yaml").write_text(dump_config(plain))
    assert load_config(tmp_path / "d.yaml").fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    ("place", "name", "nearest"),
    [
        ((), "distil", "distill"),
        (("distill",), "temprature", "temperature"),
        (("teachers", 0), "capabilites", "capabilities"),
        (("data", 1), "max_tokens", "max_new_tokens"),
        (("student",), "tokeniser", "tokenizer"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(place, name, nearest):
    document = _document()
    section = document
    for part in place:
        section = section[part]
    section[name] = 1
    text = _error(document)
    assert f"{name}'" in text
    assert f"did you mean {nearest!r}" in text


def test_every_mistake_is_named_not_only_the_first():
    document = _document()
    document["distill"]["steps"] = 0
    document["seed"] = "many"
    text = _error(document)
    assert "'distill.steps'" in text
    assert "'seed'" in text


def test_values_are_not_coerced():
    document = _document()
    document["distill"]["steps"] = "100"
    assert "expected a whole number at 'distill.steps', found '100'; write it without quotes" in _error(document)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.steps=1.5", "expected a whole number at 'distill.steps', found 1.5; correct it"),
        ("distill.steps=0", "expected greater than 0 at 'distill.steps', found 0; correct it"),
        ("distill.learning_rate=1e-4", "found '1e-4'; write it without quotes and with a dot, as 1.0e-4"),
        ("distill.learning_rate=.inf", "expected a finite number at 'distill.learning_rate', found inf; correct it"),
        (
            "distill.surgery.method=foo",
            "expected 'none', 'upgrad' or 'pcgrad' at 'distill.surgery.method', found 'foo'",
        ),
        ("distill.labels_only=1", "expected true or false at 'distill.labels_only', found 1; correct it"),
        ("distill=5", "expected a section of keys and values at 'distill', found 5; correct it"),
        ("distill=null", "expected a section of keys and values at 'distill', found None; correct it"),
        ("data.code.pool=x.csv", "expected a list at 'data.1.pool', found 'x.csv'; write [x.csv]"),
        ("data.code.pool=[]", "expected at least 1 item at 'data.1.pool', found []; correct it"),
        ("teachers=5", "expected a list at 'teachers', found 5; correct it"),
        ("teachers=[]", "expected at least 1 item at 'teachers', found []; correct it"),
        ("teachers.0.kind=regisry", "at 'teachers.0.kind', found 'regisry', did you mean 'registry'?; correct it"),
        ("teachers.0={}", "key 'teachers.0.kind' is missing; add it with one of registry, path, hub"),
        ("name=5", "expected text at 'name', found 5; quote it"),
        ("name=a b", "expected text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$ at 'name', found 'a b'; correct it"),
        (f"seed={'9' * 90}x", f"found '{'9' * 56}...; write it without quotes"),
    ],
)
def test_a_value_of_the_wrong_kind_is_answered_with_expected_found_and_remedy(override, words):
    with pytest.raises(ConfigError, match=r"quickstart\.yaml: ") as caught:
        load_config(QUICKSTART, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["teachers"].append(dict(d["teachers"][0])), "'sample-reasoning' twice"),
        (lambda d: d["student"].update(tokenizer="sample-resoning"), "did you mean 'sample-reasoning'"),
        (lambda d: d["teachers"].pop(), "capability 'audio' has data but no teacher"),
        (lambda d: d["data"].pop(), "no data carry it"),
        (lambda d: d["data"].append(dict(d["data"][0])), "'reasoning' twice"),
        (lambda d: d["data"][1].update(keywords=["print"]), "no effect without towers"),
        (lambda d: d["distill"].update(surgery={"every": 5}), "every has no effect"),
        (lambda d: d["distill"].update(steps=20), "expected warmup_steps below steps, found 20 and 20"),
        (lambda d: d["teachers"][0].update(kind="pth"), "pth"),
        (lambda d: d.pop("distill"), "'distill' is missing; add it"),
    ],
)
def test_contradictions_are_refused_in_words(change, words):
    document = _document()
    change(document)
    assert words in _error(document)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("distill.steps=70", lambda c: c.distill.steps, 70),
        ("distill.learning_rate=1.0e-4", lambda c: c.distill.learning_rate, 1e-4),
        ("teachers.sample-code.importance=2.5", lambda c: c.teachers[1].importance, 2.5),
        ("teachers.sample-code.importance=profile", lambda c: c.teachers[1].importance, "profile"),
        ("data.vision.batch_size=3", lambda c: c.data[2].batch_size, 3),
        ("data.0.batch_size=5", lambda c: c.data[0].batch_size, 5),
        ("evaluate.max_rows=9", lambda c: c.evaluate.max_rows, 9),
        ("data.reasoning.keywords.0=each", lambda c: c.data[0].keywords[0], "each"),
    ],
)
def test_set_overrides_a_key(override, read, value):
    assert read(load_config(QUICKSTART, [override])) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.steps", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("teachers.nobody.importance=1", "sample-reasoning"),
        ("seed.a=1", "the value 0"),
        ("seed.a.b=1", "the value 0"),
        ("distill.stepps=3", "did you mean 'steps'"),
        ("name=[", "Quote it"),
    ],
)
def test_a_wrong_override_is_one_clear_line(override, words):
    with pytest.raises(ConfigError, match=r".") as caught:
        load_config(QUICKSTART, [override])
    assert words in str(caught.value)


def test_unreadable_files_are_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="found list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(ConfigError, match=r"at line 2"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="readable YAML"):
        load_config(tmp_path / "binary.yaml")
    (tmp_path / "date.yaml").write_text("name: x\nseed: 2020-01-01\n")
    with pytest.raises(ConfigError, match="plain YAML"):
        load_config(tmp_path / "date.yaml")


def test_teachers_and_data_are_found_by_capability():
    config = load_config(QUICKSTART)
    assert [teacher.id for teacher in config.teachers_of("code")] == ["sample-code"]
    assert config.data_of("audio").towers == ("audio",)
    assert config.fingerprint("distill") != config.fingerprint("data")


def test_sample_paths_lie_in_the_package():
    assert resolve_path("samples:code/test.parquet").is_file()
    assert resolve_path("somewhere/x.parquet") == Path("somewhere/x.parquet")


def test_the_schema_imports_no_torch():
    code = "import sys, nexus.config; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("setting", "transport"), [("top_k", "topk"), ("draws", "sampled"), ("transport_error", "auto")]
)
def test_a_setting_of_a_transport_that_no_teacher_uses_is_refused(tmp_path, setting, transport):
    document = _document()
    document["distill"][setting] = 1
    document["distill"].update(transport="full", cross_tokenizer="responses")
    assert f"distill.{setting} has no effect while no teacher's transport is {transport}" in _error(document)
    document["teachers"][1]["transport"] = transport
    config = parse_config(document, source="run.yaml")
    assert [config.transport_of(teacher.id) for teacher in config.teachers] == ["full", transport, "full", "full"]
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml").fingerprint() == config.fingerprint()


def test_spans_read_top_k_whatever_the_other_transports_are():
    document = _document()
    document["distill"].update(transport="hidden", cross_tokenizer="spans", top_k=8)
    assert parse_config(document, source="x").distill.top_k == 8


def test_a_transport_of_an_encoder_is_refused():
    document = _document()
    document["teachers"][2]["transport"] = "hidden"
    assert "transport of teacher 'sample-vision' has no effect" in _error(document)


def test_cached_targets_are_chosen_for_all_teachers_or_for_one():
    document = _document()
    document["teachers"][0]["targets"] = "cached"
    config = parse_config(document, source="run.yaml")
    assert config.cached_teachers == ("sample-reasoning",)
    document["distill"]["targets"] = "cached"
    document["teachers"][0]["targets"] = "live"
    config = parse_config(document, source="run.yaml")
    assert config.cached_teachers == ("sample-code", "sample-vision", "sample-audio")
    document["distill"]["transport"] = "hidden"
    assert "cached targets of teacher 'sample-code' travel as topk, sampled or full" in _error(document)


def test_a_cache_that_is_off_has_no_limit_and_no_streamed_teachers(tmp_path):
    off = load_config(QUICKSTART, ["cache.dir=null"])
    (tmp_path / "c.yaml").write_text(dump_config(off))
    assert load_config(tmp_path / "c.yaml") == off
    for override, expected in (
        ("cache.min_parameters=5", "min_parameters has no effect while dir is null"),
        ("teachers.sample-vision.placement=streamed", "is streamed from cache.dir, which is null"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load_config(QUICKSTART, ["cache.dir=null", override])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"distill.final_rate": 0.5, "distill.schedule": "constant"},
            "distill.final_rate has no effect while schedule is constant",
        ),
        ({"distill.decay_share": 0.5}, "distill.decay_share has no effect while schedule is not wsd"),
        ({"data.1.snr_db": 3.0}, "snr_db of capability 'code' has no effect without audio"),
        (
            {"distill.variance.penalty": 0.0, "distill.variance.mode": "std"},
            "distill.variance.mode has no effect while penalty is 0",
        ),
        (
            {f"teachers.{n}.anchor": False for n in range(4)}
            | {"distill.anchor_start": 1.0, "distill.anchor_end": 0.3, "distill.standardise": "phi_s"},
            "distill.standardise has no effect while no teacher is anchored",
        ),
        (
            {"distill.optimizer": "paged_adamw8bit", "distill.device": "cpu"},
            "optimizer paged_adamw8bit needs a GPU, whose memory it pages, found device cpu; choose adamw8bit",
        ),
        ({"distill.surgery.subset": "trunk"}, "subset has no effect while method is none"),
        ({"teachers.0.start_step": 700}, "it would never take part; lower it"),
        (
            {f"teachers.{n}.anchor": False for n in range(4)},
            "distill.anchor_start has no effect while no teacher is anchored",
        ),
        (
            {f"data.{n}.labelled": [] for n in range(4)},
            "distill.gold_weight has no effect while no data have labelled rows",
        ),
    ],
)
def test_settings_that_would_change_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [f"{key}={value}" for key, value in changes.items()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("distill.variance.mode=std", "distill.variance.mode"),
        ("distill.variance.ramp_steps=5", "distill.variance.ramp_steps"),
        ("distill.surgery.method=upgrad", "distill.surgery.method"),
        ("teachers.0.ramp_steps=5", "ramp_steps of teacher 'sample-reasoning'"),
    ],
)
def test_settings_between_teachers_are_refused_where_there_is_one(override, place):
    document = _document()
    document["teachers"], document["data"] = document["teachers"][:1], document["data"][:1]
    key, _, value = override.partition("=")
    *parents, last = key.split(".")
    section = document
    for part in parents:
        section = section[int(part)] if isinstance(section, list) else section.setdefault(part, {})
    section[last] = yaml.safe_load(value)
    assert f"{place} has no effect while there is one teacher" in _error(document)


def test_the_settings_of_training_read_back_equal(tmp_path):
    changes = ["distill.schedule=wsd", "distill.decay_share=0.3", "distill.ema_decay=0.9", "teachers.1.start_step=5"]
    config = load_config(QUICKSTART, changes)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"distill.gold_weight": 0.0, "distill.labels_only": False, "distill.labelled_batch_size": 8},
            "distill.labelled_batch_size has no effect while gold_weight is 0",
        ),
        (
            {"distill.gold_weight": 0.0, "distill.labelled_batch_size": 4},
            "labels_only trains on the labelled rows alone",
        ),
        (
            {"distill.transport": "sampled", "distill.divergence": "forward_kl"},
            "distill.divergence has no effect while all token distributions are draws",
        ),
        ({"data.2.snr_db": 3.0}, "snr_db of capability 'vision' has no effect without audio"),
        ({"teachers.0.ramp_steps": 100_000}, r"found 0 \+ 100000: it would never take part in full"),
        ({"teachers.0.start_step": 690, "teachers.0.ramp_steps": 100}, "it would never take part in full"),
        ({"evaluate.num_samples": 9, "evaluate.max_rows": 8}, "expected num_samples of at most max_rows"),
        (
            {"distill.temperature": 1.0, "distill.temperature_squared": False},
            "distill.temperature_squared has no effect while temperature is 1",
        ),
    ],
)
def test_contradictions_are_refused_and_say_what_they_contradict(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(QUICKSTART, [f"{place}={value}" for place, value in changes.items()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        "distill.learning_rate=1.0e+9",
        "router.learning_rate=2.0",
        "distill.temperature=1.0e-30",
        "distill.temperature=1.0e+30",
        "distill.grad_clip=1.0e-30",
        "distill.accumulate=100000",
        "distill.window=100000",
        "teachers.sample-code.importance=1.0e+300",
    ],
)
def test_absurd_magnitudes_are_refused_with_their_bound(change):
    with pytest.raises(
        ConfigError, match=r"expected (greater|less) than or equal to .* found .*; correct it"
    ) as caught:
        load_config(QUICKSTART, [change])
    assert "\n" not in str(caught.value)
    assert change.split("=")[0].rsplit(".", 1)[1] in str(caught.value)


def test_the_limits_themselves_are_accepted():
    changes = [
        "distill.learning_rate=1.0",
        "distill.temperature=1.0e-3",
        "distill.accumulate=1024",
        "distill.window=1024",
    ]
    changes += ["teachers.sample-code.start_step=600", "teachers.sample-code.ramp_steps=100"]
    changes += ["distill.gold_weight=0.0", "distill.labels_only=false", "distill.labelled_batch_size=4"]
    assert load_config(QUICKSTART, changes).distill.accumulate == 1024
