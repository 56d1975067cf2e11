"""DistServe's fitted step times, worked out by hand and from its published figures."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.deployment import Parallelism
from disagg_jax.sim.cost.distserve import (
    DecodeFit,
    FittedCost,
    PrefillFit,
    StepFit,
    profile_from_json,
)
from disagg_jax.work import StepLoad

PROFILE = Path(__file__).parents[3] / "experiments/profiles/distserve_a100_opt.json"
SIMPLE = FittedCost(
    name="simple",
    fits={
        1: StepFit(
            PrefillFit(100.0, 10.0, 1.0),
            DecodeFit(60.0, 2.0, 5.0),
            DecodeFit(40.0, 3.0, 4.0),
            large_decodes=3,
        )
    },
    stage_ms=0.25,
    first_stage_ms=0.5,
    first_stage_token_ms=0.125,
)


@pytest.fixture(scope="module")
def profile():
    return profile_from_json(json.loads(PROFILE.read_text()))


def stages_ms(cost, load, tp=1, pp=1):
    return [1000 * s for s in cost.instance(Parallelism(tp, pp)).stages_s(load)]


# ---- by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "pp", "expected_ms"),
    [
        # 100 + 10*3 + 9 + .25 = 139.25; the first stage also .5 + .125*3 = .875
        (StepLoad(((0, 3),), 0, 0), 1, [140.125]),
        # (100 + 10*5 + 9 + 4)/2 + .25*2 = 82; first also .5 + .125*5 = 1.125
        (StepLoad(((0, 3), (0, 2)), 0, 0), 2, [83.125, 82.0]),
        # tokens 2 and 3 after two: 100 + 10*2 + (16 - 4) + .25, first .5 + .125*4 = 1
        (StepLoad(((2, 2),), 0, 0), 1, [133.25]),
        # two decodes, the small set: 60 + 2*9 + 5*2 = 88, first .5 + .125*(9 - 2)
        (StepLoad((), 2, 9), 1, [89.375]),
        # three, the large set: 40 + 3*9 + 4*3 = 79, on each of four stages 19.75
        (StepLoad((), 3, 9), 4, [21.0, 19.75, 19.75, 19.75]),
        # mixed: 139.25 + 88 - min(100, 60); first .5 + .125*(3 + 7) = 1.75
        (StepLoad(((0, 3),), 2, 9), 1, [169.0]),
        # (139/2 + .5) + 44 - 60/2 = 84
        (StepLoad(((0, 3),), 2, 9), 2, [85.75, 84.0]),
    ],
)
def test_step_times_worked_out_by_hand(load, pp, expected_ms):
    assert stages_ms(SIMPLE, load, pp=pp) == pytest.approx(expected_ms, rel=1e-15)


def test_the_published_check_values(profile):
    cost = profile.cost_model("distserve", "opt-13b")
    # 18.1025 + 52.1791 + 1.8671 + 1 + 2 + 0.0512
    prefill_ms = stages_ms(cost, StepLoad(((0, 512),), 0, 0))
    assert prefill_ms == [pytest.approx(75.19988, abs=5e-6)]
    # One request with 512 cached tokens: 19.9347 + .32162 + .038507 + 2 + .0512
    decode_ms = stages_ms(cost, StepLoad((), 1, 513))
    assert decode_ms == [pytest.approx(22.346, abs=5e-4)]


@pytest.mark.parametrize(
    ("file", "engine"),
    [
        ("fixed512x64__disagg-p11-d11__rate4.csv", "distserve"),
        ("fixed512x64__vllm-11__rate2.csv", "vllm"),
    ],
)
def test_a_prompt_of_512_alone_is_its_simulators_to_a_nanosecond(
    profile, shared_dir, file, engine
):
    golden = shared_dir / "golden" / "simdistserve" / file
    if not golden.exists():
        pytest.skip(f"no golden outputs: {golden} is missing")
    with golden.open() as lines:  # the first request meets an idle system
        ttft_ms = float(next(csv.DictReader(lines))["ttft_ms"])
    cost = profile.cost_model(engine, "opt-13b")
    ours_ms = stages_ms(cost, StepLoad(((0, 512),), 0, 0))
    assert ours_ms == [pytest.approx(ttft_ms, abs=1e-6)]


def test_chunks_of_a_prompt_add_up_to_its_linear_and_quadratic_terms():
    whole = stages_ms(SIMPLE, StepLoad(((0, 10),), 0, 0))[0]
    parts = [StepLoad((chunk,), 0, 0) for chunk in ((0, 4), (4, 1), (5, 5))]
    # Three steps pay 100 + .25 + .5 each, and carry 4 + 5 + 10 tokens of context.
    more = 2 * 100.75 + 0.125 * (4 + 5)
    assert sum(stages_ms(SIMPLE, p)[0] for p in parts) == pytest.approx(whole + more)


# ---- properties ----------------------------------------------------------------------

ENGINES = st.sampled_from(
    [("distserve", "opt-13b", 1), ("distserve", "opt-66b", 8), ("vllm", "opt-66b", 2)]
)
PROMPT = st.tuples(st.integers(0, 1000), st.integers(1, 1000))
PROMPTS = st.lists(PROMPT, min_size=1, max_size=5).map(tuple)
DECODES = st.tuples(st.integers(1, 200), st.integers(1, 2000)).map(
    lambda pair: (pair[0], pair[0] * pair[1])
)


@given(ENGINES, DECODES)
def test_the_cheap_path_is_exactly_the_general_one(profile, engine, decode):
    name, model, tp = engine
    instance = profile.cost_model(name, model).instance(Parallelism(tp))
    assert (instance.decode_s(*decode),) == instance.stages_s(StepLoad((), *decode))


@given(ENGINES, PROMPTS, DECODES, st.integers(1, 4))
def test_mixing_saves_but_is_not_free(profile, engine, prompts, decode, pp):
    name, model, tp = engine
    instance = profile.cost_model(name, model).instance(Parallelism(tp, pp))
    prefill = instance.stages_s(StepLoad(prompts, 0, 0))
    decoding = instance.stages_s(StepLoad((), *decode))
    mixed = instance.stages_s(StepLoad(prompts, *decode))
    assert len(mixed) == pp
    for both, a, b in zip(mixed, prefill, decoding, strict=True):
        assert max(a, b) < both < a + b


@given(PROMPTS, DECODES, st.integers(1, 500))
def test_more_work_takes_longer(profile, prompts, decode, more):
    instance = profile.cost_model("distserve", "opt-13b").instance(Parallelism(2, 2))
    decodes, context = decode
    base = instance.stages_s(StepLoad(prompts, decodes, context))
    (start, count), *rest = prompts
    for load in (
        StepLoad(((start, count + more), *rest), decodes, context),
        StepLoad(((start + more, count), *rest), decodes, context),
        StepLoad(((0, more), *prompts), decodes, context),
        StepLoad(prompts, decodes, context + more),
    ):
        assert all(x < y for x, y in zip(base, instance.stages_s(load), strict=True))


def test_the_large_set_begins_at_95(profile):
    # As published: 94 requests use one fit, 95 the other, and the price drops there.
    instance = profile.cost_model("distserve", "opt-13b").instance(Parallelism(1))
    before, after = (instance.decode_s(n, n * 500) for n in (94, 95))
    assert 1000 * before == pytest.approx(
        19.934702624895458 + 0.0006269356524350583 * 47000 + 0.03850697740828398 * 94
        + 2 + 1e-4 * (47000 - 94)
    )  # fmt: skip
    assert after < before


# ---- the profile ---------------------------------------------------------------------


def test_the_profile_has_both_engines_and_says_where_it_comes_from(profile):
    assert {e: sorted(m) for e, m in profile.fits.items()} == {
        "distserve": ["opt-13b", "opt-66b"],
        "vllm": ["opt-13b", "opt-66b"],
    }
    for models in profile.fits.values():
        assert sorted(models["opt-13b"]) == [1, 2, 4]
        assert sorted(models["opt-66b"]) == [2, 3, 4, 8]
    assert "82831f16" in profile.provenance["source"]
    negative = [
        f"{engine}/{model}/tp{tp}"
        for engine, models in profile.fits.items()
        for model, fits in models.items()
        for tp, fit in fits.items()
        if fit.prefill.square_ms < 0
    ]
    assert negative == list(profile.warnings) == ["vllm/opt-66b/tp2"]
    assert profile.cost_model("vllm", "opt-13b").name == "distserve-a100/vllm/opt-13b"
    assert profile.kv_tokens("opt-13b", Parallelism(1)) == 66144
    assert profile.kv_tokens("opt-66b", Parallelism(2, 2)) == 78512


@pytest.mark.parametrize("engine", ["distserve", "vllm"])
def test_coefficients_are_the_published_ones_in_full(profile, shared_dir, engine):
    folder = shared_dir / "data" / "distserve_a100_profile"
    file = folder / f"profiler-a100-80g.{engine}.json"
    if not file.exists():
        pytest.skip(f"no published coefficients: {file} is missing")
    published = {
        (model.removeprefix("facebook/"), int(tp)): (
            *fit["prefill"],
            *fit["decoding_smallbs"],
            *fit["decoding_largebs"],
            fit["decoding_large_small_bs_threshold"],
        )
        for model, by_tp in json.loads(file.read_text()).items()
        for tp, fit in by_tp.items()
    }
    record = json.loads(PROFILE.read_text())["fits"][engine]
    ours = {
        (model, int(tp)): (
            *fit["prefill"],
            *fit["decode_small"],
            *fit["decode_large"],
            fit["large_decodes"],
        )
        for model, by_tp in record.items()
        for tp, fit in by_tp.items()
    }
    assert ours == published


def test_capacities_are_the_published_ones(profile, shared_dir):
    file = shared_dir / "data" / "distserve_a100_profile" / "max_num_tokens.csv"
    if not file.exists():
        pytest.skip(f"no published capacities: {file} is missing")
    rows = [line.split(",") for line in file.read_text().split()[1:]]
    published: dict[str, dict[Parallelism, int]] = {}
    for model, tp, pp, tokens in rows:
        sizes = published.setdefault(model.removeprefix("facebook/"), {})
        sizes[Parallelism(int(tp), int(pp))] = int(tokens)
    assert profile.capacities == published


# ---- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.cost_model("orca", "opt-13b"), r"\['distserve', 'vllm'\], got 'o"),
        (lambda p: p.cost_model("vllm", "opt-175b"), r"\['opt-13b', 'opt-66b'\], got"),
        (
            lambda p: p.cost_model("vllm", "opt-66b").instance(Parallelism(1)),
            r"vllm/opt-66b: expected tp in \[2, 3, 4, 8\], got 1",
        ),
        (
            lambda p: p.cost_model("vllm", "opt-13b").instance(Parallelism(1, dp=2)),
            "vllm/opt-13b: expected no dp and no ep, got tp1dp2",
        ),
        (
            lambda p: (
                p.cost_model("vllm", "opt-13b")
                .instance(Parallelism(1, 2))
                .decode_s(1, 2)
            ),
            "decode_s: expected pp = 1 .*, got 2",
        ),
        (
            lambda p: p.kv_tokens("opt-1b", Parallelism()),
            "model: expected .* got 'opt-1b'",
        ),
        (lambda p: p.kv_tokens("opt-66b", Parallelism()), "a100: .* tp2, .* got tp1"),
    ],
)
def test_what_it_does_not_have_is_named(profile, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(profile)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kind",), "tables", "profile.kind: expected 'fitted', got 'tables'"),
        (("fits",), [], r"profile.fits: expected an object, got \[\]"),
        (("fits", "vllm", "opt-13b", "two"), {}, "tp: expected an integer .* 'two'"),
        (
            ("fits", "vllm", "opt-13b", "1", "prefill"),
            [1.0, 2.0],
            r"vllm/opt-13b/tp1.prefill: expected 3 numbers, got \(1.0, 2.0\)",
        ),
        (
            ("fits", "vllm", "opt-13b", "1", "decode_small"),
            [1.0, -2.0, 3.0],
            "decode_small: expected numbers >= 0, got",
        ),
        (
            ("fits", "vllm", "opt-13b", "1", "prefill"),
            [1.0, "2", 3.0],
            "prefill: expected a number, got '2'",
        ),
        (
            ("fits", "vllm", "opt-13b", "1", "large_decodes"),
            0,
            "large_decodes: expected an integer >= 1, got 0",
        ),
        (("warnings",), {}, "vllm/opt-66b/tp2: expected a text in warnings .* got -7"),
        (("kv_tokens", "opt-13b", "1x1"), 5, "expected 'TP,PP', got '1x1'"),
        (("kv_tokens", "opt-13b", "1,1"), -5, "1,1: expected an integer >= 1, got -5"),
        (("provenance", "source"), "", "provenance.source: expected a text"),
    ],
)
def test_a_bad_record_is_refused(path, value, message):
    record = json.loads(PROFILE.read_text())
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        profile_from_json(record)


@pytest.mark.parametrize("key", ["name", "fits", "kv_tokens", "warnings", "provenance"])
def test_a_missing_part_is_named(key):
    record = json.loads(PROFILE.read_text())
    del record[key]
    with pytest.raises(ValueError, match=f"profile: expected the key '{key}', got"):
        profile_from_json(record)
