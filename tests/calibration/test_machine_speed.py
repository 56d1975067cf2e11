"""Probes tell how fast a machine is, and nothing about a profile."""

import dataclasses
import itertools

import pytest

from disagg_jax.calibration import machine_speed
from disagg_jax.calibration.machine_speed import Speedometer, choose_probes
from disagg_jax.calibration.profile_keys import StepKey, key_of
from disagg_jax.control.backend import Outcome
from tests.experiments.calibrating import (
    calibrated,
    device,
    make_engines,
    make_model,
    true_s,
)


@pytest.fixture(scope="module")
def engines():
    return make_engines(make_model())


def slower(decode, prompt):
    """A device whose programs take longer, by their kind."""
    steady = device()

    def time_parts(engine, work):
        key = key_of(engine, work)
        decodes = isinstance(key, StepKey) and key.program.kind == "decode"
        return [(decode if decodes else prompt) * s for s in steady(engine, work)]

    return time_parts


def run(speedometer, works):
    for _ in range(works):
        speedometer.tick()


def test_two_programs_of_each_kind_are_probes(engines):
    kinds = {}
    for layout, program in choose_probes([engines["vllm_v0"]]):
        assert layout == (1, 1)
        kinds.setdefault(program.kind, []).append(program.tokens)
    assert {kind: len(found) for kind, found in kinds.items()} == {
        "prefill": 2,
        "decode": 2,
    }
    assert all(small < large for small, large in kinds.values())
    # Those of all engines are found again in what was measured for all.
    every = choose_probes(engines.values())
    assert {*choose_probes([engines["sarathi_serve"]])} <= {*every}


def test_probes_take_turns_and_their_second_run_counts(engines):
    probes = choose_probes([engines["vllm_v0"]])
    asked = []

    def time_parts(engine, work):
        asked.append(key_of(engine, work))
        return [float(len(asked)), 100.0]

    speedometer = Speedometer(probes, time_parts)
    run(speedometer, machine_speed._EVERY - 1)
    assert not asked
    run(speedometer, 1)
    first = list(dict.fromkeys(asked))
    assert asked == [first[0], first[0], first[1], first[1]]
    assert [key.program.kind for key in first] == ["prefill", "decode"]
    assert speedometer.times_s["prefill"] == [(first[0], 102.0)]
    run(speedometer, 2 * machine_speed._EVERY)
    assert {*asked} == {*probes}
    assert asked[8:] == asked[:4]


def test_a_slower_machine_is_told_from_the_one_of_the_profile(engines):
    profile = calibrated([engines["vllm_v0"], engines["stages"]], device())
    for name in ("vllm_v0", "stages"):
        speedometer = Speedometer(choose_probes([engines[name]]), slower(1.25, 0.9))
        run(speedometer, 3 * machine_speed._EVERY)
        found = speedometer.slowdown(profile)
        assert found.decode == pytest.approx([1.25] * 3)
        assert found.prompt == pytest.approx([0.9] * 3)
        assert found.works == machine_speed._EVERY


def test_the_mean_of_a_run_is_held_against_the_profiles_median(engines):
    """A slow moment counts in what a run's steps add up to."""
    engine = engines["vllm_v0"]
    key, probe = next(
        item for item in choose_probes([engine]).items() if item[0][1].kind == "decode"
    )
    profile = calibrated([engine], device())
    factors = iter([1, 1, 1, 1, 1, 4])  # of every other run
    speedometer = Speedometer(
        {key: probe}, lambda *work: [true_s(key.program)[0] * next(factors)]
    )
    run(speedometer, 3 * machine_speed._EVERY)
    found = speedometer.slowdown(profile)
    assert found.decode == pytest.approx([2.0] * 3) and found.prompt == (1.0,)
    assert speedometer.medians_s() == {
        (1, 1): {key.program: pytest.approx(true_s(key.program)[0])}
    }


def test_each_section_of_a_run_has_the_speed_around_it(engines):
    """Means of six probes, three of them to come, as far as there are so many."""
    profile = calibrated([engines["vllm_v0"]], device())
    factors = itertools.chain([1.0] * 4, [4.0] * 4)
    calls, steady = itertools.count(), device()

    def time_parts(engine, work):
        if next(calls) % 4 == 0:  # two probes, each twice
            time_parts.factor = next(factors)
        return [time_parts.factor * s for s in steady(engine, work)]

    speedometer = Speedometer(choose_probes([engines["vllm_v0"]]), time_parts)
    run(speedometer, 8 * machine_speed._EVERY)
    means = [(4 * 1) / 4, (4 + 4) / 5, (4 + 8) / 6, (3 + 12) / 6]
    found = speedometer.slowdown(profile)
    assert found.decode[:4] == pytest.approx(means)
    assert found.decode[-1] == pytest.approx(4.0)


def test_what_a_profile_has_wrong_is_not_taken_for_the_machine(engines):
    profile = calibrated([engines["vllm_v0"]], device())
    times = profile.layouts[1, 1]
    halved = {p: tuple(s / 2 for s in parts) for p, parts in times.measured.items()}
    wrong = dataclasses.replace(
        profile, layouts={(1, 1): dataclasses.replace(times, measured=halved)}
    )
    speedometer = Speedometer(choose_probes([engines["vllm_v0"]]), device())
    run(speedometer, 2 * machine_speed._EVERY)
    found = speedometer.slowdown(wrong)
    assert [*found.decode, *found.prompt] == pytest.approx([1.0] * 4)


def test_without_probes_nothing_is_said_of_the_machine(engines):
    profile = calibrated([engines["vllm_v0"]], device())
    older = dataclasses.replace(profile.layouts[1, 1], probes={})
    unknown = dataclasses.replace(profile, layouts={(1, 1): older})
    speedometer = Speedometer(choose_probes([engines["vllm_v0"]]), slower(2.0, 2.0))
    run(speedometer, 2 * machine_speed._EVERY)
    for found in (
        speedometer.slowdown(unknown),
        Speedometer({}, device()).slowdown(profile),
    ):
        assert (found.decode, found.prompt) == ((1.0,), (1.0,))


def test_an_executor_is_the_same_with_probes_around_it():
    class Executor:
        def run(self, work):
            return Outcome((1.0,), tokens=(work,))

    ticks = []

    class Counting(Speedometer):
        def tick(self):
            ticks.append(None)

    around = Counting({}, device()).around(Executor())
    assert [around.run(i).tokens for i in range(3)] == [(0,), (1,), (2,)]
    assert len(ticks) == 3
