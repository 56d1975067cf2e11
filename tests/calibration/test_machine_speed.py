"""Probes tell how fast a machine is, and nothing about a profile."""

import dataclasses
import itertools

import pytest

from disagg_jax.calibration import machine_speed
from disagg_jax.calibration.machine_speed import Slowdown, SpeedProbe, choose_probes
from disagg_jax.calibration.profile_keys import StepKey, key_of
from disagg_jax.control.backend import Outcome
from disagg_jax.deployment import Parallelism
from disagg_jax.work import StepLoad, Transfer
from tests.experiments.calibrating import (
    calibrated,
    device,
    make_engines,
    make_model,
    true_s,
)
from tests.serving import make_request
from tests.sim.linear_runs import COST, DEPLOYMENTS, burst, run


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


def tick(speed_probe, works):
    for _ in range(works):
        speed_probe.tick()


def test_two_programs_of_each_kind_are_probes(engines):
    kinds = {}
    for layout, program in choose_probes([engines["vllm_v0"]]):
        assert layout == Parallelism()
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

    speed_probe = SpeedProbe(probes, time_parts)
    tick(speed_probe, machine_speed._EVERY - 1)
    assert not asked
    tick(speed_probe, 1)
    first = list(dict.fromkeys(asked))
    assert asked == [first[0], first[0], first[1], first[1]]
    assert [key.program.kind for key in first] == ["prefill", "decode"]
    assert speed_probe.times_s["prefill"] == [(first[0], 102.0)]
    tick(speed_probe, 2 * machine_speed._EVERY)
    assert {*asked} == {*probes}
    assert asked[8:] == asked[:4]


def test_a_slower_machine_is_told_from_the_one_of_the_profile(engines):
    profile = calibrated([engines["vllm_v0"], engines["stages"]], device())
    for name in ("vllm_v0", "stages"):
        speed_probe = SpeedProbe(choose_probes([engines[name]]), slower(1.25, 0.9))
        tick(speed_probe, 3 * machine_speed._EVERY)
        found = speed_probe.slowdown(profile)
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
    speed_probe = SpeedProbe(
        {key: probe}, lambda *work: [true_s(key.program)[0] * next(factors)]
    )
    tick(speed_probe, 3 * machine_speed._EVERY)
    found = speed_probe.slowdown(profile)
    assert found.decode == pytest.approx([2.0] * 3) and found.prompt == (1.0,)
    assert speed_probe.medians_s() == {key: pytest.approx(true_s(key.program)[0])}


def test_each_section_of_a_run_has_the_speed_around_it(engines):
    """Means of six probes, three of them to come, as far as there are so many."""
    profile = calibrated([engines["vllm_v0"]], device())
    factors = itertools.chain([1.0] * 4, [4.0] * 4)
    calls, steady = itertools.count(), device()

    def time_parts(engine, work):
        if next(calls) % 4 == 0:  # two probes, each twice
            time_parts.factor = next(factors)
        return [time_parts.factor * s for s in steady(engine, work)]

    speed_probe = SpeedProbe(choose_probes([engines["vllm_v0"]]), time_parts)
    tick(speed_probe, 8 * machine_speed._EVERY)
    means = [(4 * 1) / 4, (4 + 4) / 5, (4 + 8) / 6, (3 + 12) / 6]
    found = speed_probe.slowdown(profile)
    assert found.decode[:4] == pytest.approx(means)
    assert found.decode[-1] == pytest.approx(4.0)


def test_what_a_profile_has_wrong_is_not_taken_for_the_machine(engines):
    profile = calibrated([engines["vllm_v0"]], device())
    times = profile.layouts[Parallelism(1, 1)]
    halved = {p: tuple(s / 2 for s in parts) for p, parts in times.measured.items()}
    wrong = dataclasses.replace(
        profile, layouts={Parallelism(): dataclasses.replace(times, measured=halved)}
    )
    speed_probe = SpeedProbe(choose_probes([engines["vllm_v0"]]), device())
    tick(speed_probe, 2 * machine_speed._EVERY)
    found = speed_probe.slowdown(wrong)
    assert [*found.decode, *found.prompt] == pytest.approx([1.0] * 4)


def test_without_probes_nothing_is_said_of_the_machine(engines):
    profile = calibrated([engines["vllm_v0"]], device())
    unknown = dataclasses.replace(profile, probes={})
    speed_probe = SpeedProbe(choose_probes([engines["vllm_v0"]]), slower(2.0, 2.0))
    tick(speed_probe, 2 * machine_speed._EVERY)
    for found in (
        speed_probe.slowdown(unknown),
        SpeedProbe({}, device()).slowdown(profile),
    ):
        assert (found.decode, found.prompt) == ((1.0,), (1.0,))


def test_a_calibration_without_probes_finds_the_same_times(engines):
    calls = {True: 0, False: 0}

    def profile(speed_probes):
        def time_parts(engine, work):
            calls[speed_probes] += 1
            return device()(engine, work)

        changes = {"speed_probes": speed_probes, "count": 1}
        return calibrated([engines["vllm_v0"]], time_parts, **changes)

    probed, alone = profile(True), profile(False)
    assert probed.probes and alone == dataclasses.replace(probed, probes={})
    assert calls[False] < calls[True]


def test_an_executor_is_the_same_with_probes_around_it():
    class Executor:
        def run(self, work):
            return Outcome((1.0,), tokens=(work,))

    ticks = []

    class Counting(SpeedProbe):
        def tick(self):
            ticks.append(None)

    around = Counting({}, device()).around(Executor())
    assert [around.run(i).tokens for i in range(3)] == [(0,), (1,), (2,)]
    assert len(ticks) == 3


def test_a_slower_machine_takes_longer_for_steps_by_their_kind():
    slowed = Slowdown(decode=(2.0,), prompt=(3.0,)).of(COST)
    decodes = StepLoad((), 2, 10)
    (decode_s,) = COST.stages_s(0, decodes)
    assert slowed.stages_s(0, decodes) == (2 * decode_s,)
    for load in (StepLoad(((0, 4),), 0, 0), StepLoad(((4, 2),), 2, 10)):
        (step_s,) = COST.stages_s(0, load)
        assert slowed.stages_s(0, load) == (3 * step_s,)
    transfer = Transfer(1, make_request(0, 0.0, prompt=5), 0, 1, (), (), 5)
    assert slowed.hop(transfer) == COST.hop(transfer)
    with pytest.raises(ValueError, match="without spans"):
        slowed.decoder(0)


def test_a_machine_changes_its_speed_by_sections_of_works():
    """Of two pieces of work each, transfers counted; the last goes on."""
    slowed = Slowdown(decode=(2.0, 4.0, 8.0), works=2).of(COST)
    decodes = StepLoad((), 1, 4)
    (decode_s,) = COST.stages_s(0, decodes)
    transfer = Transfer(1, make_request(0, 0.0, prompt=5), 0, 1, (), (), 5)
    found = []
    for _ in range(4):
        found.append(slowed.stages_s(0, decodes)[0] / decode_s)
        slowed.hop(transfer)
    assert found == [2.0, 4.0, 8.0, 8.0]


def test_a_machine_of_the_same_speed_changes_nothing():
    for deployment in DEPLOYMENTS[:2]:
        same = Slowdown().of(COST)
        assert run(deployment, same, burst())[1] == run(deployment, COST, burst())[1]
