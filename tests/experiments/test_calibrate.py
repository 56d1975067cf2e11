"""Calibration recovers costs that are known, and accuracy says if they are wrong."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import scipy.optimize

from disagg_jax.calibration.fit import fit, fit_programs, left_out_error
from disagg_jax.calibration.profile_keys import key_of, read_profile
from disagg_jax.calibration.timing import drift
from disagg_jax.deployment import Parallelism
from disagg_jax.engine.engine import Engine
from disagg_jax.metrics import interval_across, rate_interval
from disagg_jax.programs import StepShape
from disagg_jax.sim.cost import step_time_terms
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.cost.measured import CalibratedProfile
from disagg_jax.sim.cost.measured_profile import profile_from_json, profile_to_json
from disagg_jax.work import Step
from experiments import accuracy, calibrate
from experiments.accuracy_study import report
from experiments.configs.config import Config, Memory, System, WorkloadConfig
from experiments.configs.named import get_config
from experiments.sweep.serving import build_engine, build_engines, load_model
from models.config import get_config as get_model
from tests.deadlines import After

SMOKE = get_config("smoke")
TRUE = {
    "prefill": (2e-3, 1e-5, 2e-8, 3e-6, 0, 4e-6, 0, 0),
    "decode": (1e-3, 2e-5, 3e-6, 1e-7),
    "mixed": (3e-3, 1e-5, 2e-8, 1e-6, 0, 2e-6, 1e-7, 0, 3e-6, 0, 0),
}
BASE_S, BLOCK_S = 1e-4, 2e-5  # of a transfer


@pytest.fixture(scope="module")
def engines() -> list[Engine]:
    """Of all systems of the main job; nothing is compiled."""
    config = get_config("tiny")
    model = load_model(dataclasses.replace(config, weights="random"))
    return [
        build_engine(config, system, model, {}) for system in config.systems.values()
    ]


def calibrated(engines, time_parts, **changes) -> CalibratedProfile:
    options = dict(
        name="known",
        provenance={
            **{"model": "tiny", "dtype": "float32", "device": "cpu"},
            **{"date": "today", "commit": "none"},
        },
        rounds=3,
        count=4,
        max_drift=0.3,
    )
    return calibrate.calibrate(engines, time_parts, **{**options, **changes})


def true_s(engine, work) -> float:
    key = key_of(engine, work)
    if isinstance(work, Step):
        return step_time_terms.time_s(key.program, TRUE[key.program.kind])
    return BASE_S + BLOCK_S * key.blocks


def test_known_costs_are_recovered(engines):
    """With 2 % of noise a median of 3 is off by about 1.3 %, a fit by less."""
    rng = np.random.default_rng(0)

    def time_parts(engine, work):
        return [true_s(engine, work) * rng.lognormal(sigma=0.02)]

    profile = calibrated(engines, time_parts)
    times = profile.layouts[Parallelism(1, 1)]
    unmeasured = {
        "prefill": StepShape("prefill", 300, 16),
        "decode": StepShape("decode", 12, 12, 0, 12, 100),
        "mixed": StepShape("mixed", 200, 32, 40, 16, 100),
    }
    for kind, program in unmeasured.items():
        assert program not in times.measured
        expected = step_time_terms.time_s(program, TRUE[kind])
        assert times.stages_s(program)[0] == pytest.approx(expected, rel=0.03)
    (moves,) = profile.transfers.values()
    assert moves.time_s(1000) == pytest.approx(BASE_S + BLOCK_S * 1000, rel=0.03)
    for kind, error in profile.held_out.items():
        assert error <= calibrate.AIMS.get(kind, 0.03), kind
    assert "MISSED" not in calibrate.table(profile)


def test_a_profile_is_of_the_rounds_there_was_time_for(engines):
    """After the warm-up and three rounds; two are too few for a fit."""

    def exact(engine, work):
        return [true_s(engine, work)]

    def taken(asked):
        return calibrated(engines[:1], exact, rounds=9, stop=After(asked).passed)

    assert taken(4).provenance["rounds"] == "3"
    with pytest.raises(ValueError, match="expected 3 rounds .*, got 2; give it more"):
        taken(3)
    with pytest.raises(ValueError, match="expected 3 rounds .*, got 0; give it more"):
        taken(0)


def test_a_device_that_slows_down_under_the_run_is_refused(engines):
    runs = iter(range(10**9))

    def time_parts(engine, work):
        return [true_s(engine, work) * (1 + next(runs) / 500)]

    with pytest.raises(ValueError, match="device changed while it was measured"):
        calibrated(engines, time_parts)


def test_drift_is_of_the_last_rounds_over_the_first():
    steady, slower = [[[1.0]]] * 6, [[[1.0]]] * 4 + [[[1.5]]] * 2
    assert drift([steady]) == 1.0
    assert drift([slower, slower, steady]) == 1.5


def test_the_fit_is_the_best_without_negative_coefficients():
    rng = np.random.default_rng(0)
    rows = rng.uniform(0, 10, (30, 5)) * [1, 10, 1e-3, 1, 1]
    seconds = rows @ [1, 0.1, 0, 2, -0.5] + 20 + rng.normal(size=30)
    found = fit(rows.tolist(), seconds.tolist())
    best, _ = scipy.optimize.nnls(rows / seconds[:, None], np.ones(30))
    np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-9)
    assert min(found) >= 0
    twice = fit(rows.tolist(), (2 * seconds).tolist())
    np.testing.assert_allclose(twice, 2 * best, rtol=1e-5, atol=1e-9)


def test_a_wrong_form_shows_in_what_is_left_out():
    programs = [
        StepShape("decode", b, b, 0, b, p) for b in (1, 2, 4, 8) for p in (8, 32, 128)
    ]
    right = {p: step_time_terms.time_s(p, TRUE["decode"]) for p in programs}
    wrong = {p: 1.0 + 5.0 * (p.tokens % 3) for p in programs}
    assert left_out_error(right) == pytest.approx(0, abs=1e-6)
    error = left_out_error(wrong)
    assert error is not None and error > max(calibrate.AIMS.values())
    assert left_out_error(dict(list(right.items())[:9])) is None
    assert fit_programs(right) == pytest.approx(TRUE["decode"], rel=1e-4)


@pytest.mark.parametrize(
    "key, value", [("model", "m32"), ("dtype", "x"), ("device", "x")]
)
def test_a_profile_of_something_else_is_refused(tmp_path, engines, key, value):
    profile = calibrated(engines[:1], lambda *args: [true_s(*args)])
    record = profile_to_json(profile)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(record))
    assert read_profile(str(path), get_model("tiny")) == profile
    record["provenance"][key] = value
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{key}.* {value}"):
        read_profile(str(path), get_model("tiny"))


def test_what_cannot_be_calibrated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="what experiments.calibrate wrote"):
        read_profile(str(tmp_path / "none.json"), get_model("tiny"))
    with pytest.raises(ValueError, match="--deployment: expected the roles"):
        calibrate.on_deployments(
            dataclasses.replace(SMOKE, systems={"vllm_v0": SMOKE.systems["vllm_v0"]}),
            ["prefill:tp1,decode:tp1"],
        )
    streams = dataclasses.replace(SMOKE, streams=True)
    with pytest.raises(ValueError, match="streams: expected false"):
        calibrate.run(streams, 3, 1, 0.3)
    with pytest.raises(ValueError, match="durations"):
        calibrate.run(get_config("tiny_tp2"), 3, 1, 0.3)


# -- accuracy --------------------------------------------------------------------------

CONSTANT = LinearCost(step_base_s=2e-3, transfer_base_s=1e-3)
# Few programs, and small ones.
VLLM = {"max_seqs": 2, "max_batched_tokens": 32}
PREFILL, DECODE = {"max_seqs": 2, "token_budget": 32}, {"max_seqs": 2}
COMPARED = Config(
    systems={
        "vllm_v0": System.of("vllm_v0", "2xcolocated:tp1", colocated=VLLM),
        "disaggregated": System.of(
            "disaggregated", "prefill:tp1,decode:tp1", prefill=PREFILL, decode=DECODE
        ),
    },
    workload=WorkloadConfig(
        num_requests=16, prompt_tokens="uniform:8:20", output_tokens="uniform:4:12"
    ),
    memory=Memory(tokens_per_device=64, block_tokens=16, max_context=32),
    num_seeds=2,
    durations="modelled",  # so that the engine's durations are known
    cost=CONSTANT,
    tune=False,
)

SHOWN = 200  # steps of a kind in the picture: fewer than there are
FACTORS = {"right": (0.6, 0.95, 1.05), "wrong": (0.35, 0.6, 1.05)}


def write_profile(path: pathlib.Path, factor: float) -> str:
    model = load_model(COMPARED)
    engines = list(build_engines(COMPARED, model).values())

    def time_parts(engine, work):
        constant = CONSTANT.step_base_s if isinstance(work, Step) else 1e-3
        return [factor * constant]

    profile = calibrated(engines, time_parts)
    path.write_text(json.dumps(profile_to_json(profile)))
    return str(path)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """With the engine's true durations, and with half as long ones.

    Under "limited" with the true ones, in the time for so many points.
    """
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_SHOWN", SHOWN)
        for name, factor in (("right", 1.0), ("wrong", 0.5)):
            folder = tmp_path_factory.mktemp(name)
            profile = write_profile(folder / "profile.json", factor)
            asked = (COMPARED, profile, FACTORS[name], folder / "out")
            if name == "right":
                found["limited"] = [accuracy.run(*asked, After(n)) for n in (1, 8)]
            found[name] = accuracy.run(*asked)
    return found


def test_a_simulation_with_the_engines_durations_is_the_engine(results):
    result = results["right"]
    for system in result.systems.values():
        assert system.error(system.simulated) == 0 and system.again == 0
        for compared in system.rates:
            assert compared.difference == compared.by_durations == 0
            assert all(a.decided == a.shared for a in compared.agreements)
        for kind, errors in system.steps.items():
            assert errors.ratio == pytest.approx(1)
            shown = [step for step in system.shown if step.kind == kind]
            assert min(errors.steps, SHOWN // 2) <= len(shown) <= SHOWN
        assert max(errors.steps for errors in system.steps.values()) > SHOWN
    asked = (result.num_requests, result.seeds, result.target, result.clock)
    assert asked == (16, 2, 0.9, "virtual")
    assert not [line for line in report.verdicts(result) if "MISSED" in line]


def test_accuracy_reports_the_rates_that_are_done_and_goes_on(results):
    """Of two systems x two seeds at each rate, nearest to the goodput first: 8 points
    are 0.95 and 1.05, and a 9th is one seed of the third rate."""
    none, found = results["limited"]
    assert none is None
    assert found.missing == 2 * (2 * 3 + 1) - 9
    whole = results["right"]
    for name, system in found.systems.items():
        compared = whole.systems[name].rates[1:]
        assert [c.rate_rps for c in system.rates] == [c.rate_rps for c in compared]
        assert [c.engine for c in system.rates] == [c.engine for c in compared]
        assert system.again is None
    text = report.text(found)
    assert "NOT FINISHED, as --minutes were spent; the same command goes on" in text
    assert "before the runs\n" in text and "after" not in text.splitlines()[4]
    json.dumps(report.to_json(found))
    assert not whole.missing


def test_a_wrong_cost_model_is_said_to_be_wrong(results, tmp_path):
    result = results["wrong"]
    attainment, goodput, _, _, cost = report.verdicts(result)
    assert "MISSED" in attainment and "by durations" in attainment
    assert "MISSED" in goodput
    assert "-50.0% of what they took" in cost
    text = report.text(result)
    assert "disaggregated" in text and "allowed" in text
    json.dumps(report.to_json(result))
    report.plot(result, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def with_goodputs(result, **per_seed_rps):
    """`result` with systems of these goodputs: engine's, and simulated."""
    system = result.systems["vllm_v0"]

    def estimate_of(rates):
        return dataclasses.replace(
            system.engine, per_seed_rps=tuple(rates), interval=interval_across(rates)
        )

    systems = {
        name: dataclasses.replace(
            system, engine=estimate_of(engine), simulated=estimate_of(simulated)
        )
        for name, (engine, simulated) in per_seed_rps.items()
    }
    return dataclasses.replace(result, systems=systems)


def test_only_what_the_engine_tells_apart_must_be_in_order(results):
    """b is above a on average, in one seed by far; c is always a little below a."""
    a, b, c = (10.0, 20.0, 30.0), (9.0, 19.0, 40.0), (9.0, 18.1, 27.0)
    swapped = with_goodputs(results["right"], a=(a, b), b=(b, a), c=(c, c))
    assert swapped.order("engine") == ["b", "a", "c"]
    assert swapped.order("simulated") == ["a", "b", "c"]
    assert swapped.told_apart() == [("a", "c")]
    _, _, order, pairs, _ = report.verdicts(swapped)
    assert order.endswith("simulated a > b > c   MISSED")
    assert "1 of 3 apart" in pairs and "has 1 of these" in pairs
    assert pairs.endswith("   ok")
    wrong = with_goodputs(results["right"], a=(a, c), b=(b, b), c=(c, a))
    assert report.verdicts(wrong)[3].endswith("0 of these in the same order   MISSED")
    goodputs = report.text(wrong).split("# goodput")[1]
    each = dataclasses.astuple(rate_interval(c))
    mean, low, high = (rps / wrong.systems["c"].devices for rps in each)
    assert f"{mean:.4g} [{low:.4g}, {high:.4g}]" in goodputs


def test_what_the_machine_explains_is_not_held_against_the_profile(
    results, tmp_path_factory
):
    """A machine that takes twice as long as the profile, and is known to."""
    wrong = results["wrong"].systems["vllm_v0"]
    assert wrong.error(wrong.simulated) != 0
    folder = tmp_path_factory.getbasetemp() / "wrong0"
    for path in (folder / "out/points").glob("*.json"):
        found = json.loads(path.read_text())
        assert found["slowdown"] == {"decode": [1.0], "prompt": [1.0], "works": 60}
        found["slowdown"] |= {"decode": [2.0], "prompt": [2.0]}
        path.write_text(json.dumps(found))
    profile = str(folder / "profile.json")
    again = accuracy.run(COMPARED, profile, FACTORS["wrong"], folder / "out")
    vllm = again.systems["vllm_v0"]  # no transfers, which probes say nothing of
    assert vllm.error(vllm.simulated) == pytest.approx(0)
    assert vllm.error(vllm.profiled) == wrong.error(wrong.simulated)
    for compared in vllm.rates:
        assert compared.difference == pytest.approx(0)
        assert compared.slowdown("decode") == 2.0
    for errors in again.systems["disaggregated"].steps.values():
        assert errors.ratio == pytest.approx(1)
    text = report.text(again)
    assert "+100% +100%" in text and "as profiled" in text


def test_lengths_must_be_known(tmp_path):
    open_ended = dataclasses.replace(
        COMPARED, workload=WorkloadConfig(ignore_eos=False)
    )
    with pytest.raises(ValueError, match="ignore_eos: expected true"):
        accuracy.run(open_ended, "", [1.0, 2.0], tmp_path)
    with pytest.raises(ValueError, match="factors: expected two"):
        accuracy.run(COMPARED, "", [1.0], tmp_path)


def test_show_prints_the_errors_of_a_profile_and_says_what_is_none(tmp_path):
    text = calibrate.show(write_profile(tmp_path / "p.json", factor=1.5))
    profile = profile_from_json(json.loads((tmp_path / "p.json").read_text()))
    errors, service = text.split("\n\n")
    kinds = [line.split()[0] for line in errors.splitlines()]
    assert kinds == ["kind", *sorted(profile.held_out)]
    factors = profile.layouts[Parallelism()].serving_factor
    assert [line.split()[:2] for line in service.splitlines()] == [
        ["layout", "kind"],
        *(["tp1", kind] for kind in sorted(factors)),
    ]
    for text in ("", "{}", "[1]"):
        (tmp_path / "none.json").write_text(text)
        with pytest.raises(ValueError, match="--show: expected a profile"):
            calibrate.show(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="--show: expected a profile"):
        calibrate.show(str(tmp_path / "missing.json"))
