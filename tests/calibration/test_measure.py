"""Calibration: a device of known speed is recovered, and what is not is reported."""

import dataclasses
import itertools
import math
import operator

import numpy as np
import pytest

from disagg_jax.calibration import measure as module
from disagg_jax.calibration.measure import left_out_errors, unseen
from disagg_jax.calibration.profile_keys import (
    EngineWork,
    StepKey,
    TransferKey,
    key_of,
)
from disagg_jax.calibration.timing import drift, grid, measure, typical_s
from disagg_jax.deployment import KVMemory, Parallelism
from disagg_jax.programs import KINDS, Buckets
from disagg_jax.programs.slices import slices_of
from disagg_jax.request import Request
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.work import Step, StepLoad, Transfer
from experiments.calibrate import AIMS, table
from tests.experiments.calibrating import CONFIG, TRUE, calibrated, device, true_s

# ---- a device whose times are known --------------------------------------------------


def unmeasured(times, max_seqs):
    """Programs of systems with other steps and another pool, none beyond the grid."""
    edges = {
        kind: [max(sizes) for sizes in zip(*(p[1:] for p in measured), strict=True)]
        for kind in times.fits
        if (measured := [p for p in times.measured if p.kind == kind])
    }
    memory = KVMemory(num_blocks=200, max_context=400)
    sizes = {"token_budget": 200, "chunk_tokens": 200, "max_batched_tokens": 400}
    for system in CONFIG.systems.values():
        for policy in system.policies.values():
            own = {k: v for k, v in sizes.items() if hasattr(policy, k)}
            changed = dataclasses.replace(policy, max_seqs=max_seqs, **own)
            for shape in Buckets.for_limits(changed.limits, memory).step_shapes:
                if shape in times.measured or shape.kind not in edges:
                    continue
                if all(map(operator.le, shape[1:], edges[shape.kind])):
                    yield shape


@pytest.mark.parametrize(
    ("layout", "max_seqs"),
    # Rows follow from tokens in one system, so what a row takes is known only where
    # systems of several `max_seqs` were measured: with one stage.
    [(Parallelism(), 12), (Parallelism(), 16), (Parallelism(1, 2), 16)],
)
def test_programs_never_measured_are_predicted(exact, noisy, layout, max_seqs):
    worst = {"exact": 0.0, "noisy": 0.0}
    programs = list(unmeasured(exact.layouts[layout], max_seqs))
    if layout == Parallelism(1, 2):  # chunked prefills alone have other rows
        programs = [p for p in programs if p.kind == "decode" or p.decodes]
    for program in programs:
        expected_s = true_s(program, layout.pp)
        for name, profile in (("exact", exact), ("noisy", noisy)):
            found_s = profile.layouts[layout].fitted_s(program)
            for a, b in zip(found_s, expected_s, strict=True):
                worst[name] = max(worst[name], abs(a / b - 1))
    assert len(programs) > 30
    # Without noise what is left is the solver's: 8 digits of each term.
    assert worst["exact"] < 1e-6
    # A run is 2 % off, the median of 5 medians of 3 runs 0.7 % (0.67 and 0.54 of it).
    # A fit of several programs for each term is within twice that.
    assert 1e-4 < worst["noisy"] < 0.015


def test_coefficients_that_a_grid_decides_are_recovered(exact):
    # Of prefills, 1 and T are no others: there is none below 32, where T > 32 begins.
    for stage in (0, 1):
        found = exact.layouts[Parallelism(1, 2)].fits["decode"][stage]
        assert found == pytest.approx(TRUE[stage]["decode"], rel=1e-6, abs=1e-12)
    prefill = exact.layouts[Parallelism(1, 1)].fits["prefill"][0]
    for i in (2, 3, 5, 6, 7):
        assert prefill[i] == pytest.approx(TRUE[0]["prefill"][i], rel=1e-6, abs=1e-12)


def test_transfers_are_recovered(exact, noisy):
    assert set(exact.transfers) == {
        (Parallelism(), Parallelism()),
        (Parallelism(), Parallelism(1, 2)),
    }
    for pair, times in exact.transfers.items():
        assert (times.base_s, times.block_s) == pytest.approx((2e-4, 1e-5), rel=1e-6)
        assert noisy.transfers[pair].time_s(999) == pytest.approx(0.01019, rel=0.02)


def test_what_was_not_used_is_predicted_within_the_aims(exact, noisy):
    for profile in (exact, noisy):
        assert set(profile.held_out) == {*AIMS, "transfer"}
        for kind, aim in AIMS.items():
            assert profile.held_out[kind] < aim
        assert max(left_out_errors(profile).values()) < 0.02
        assert "MISSED" not in table(profile)
    # The extent of decodes is a guess, so that they may take another program than
    # predicted. Nothing else can be off.
    for kind in ("prefill", "chunk", "transfer"):
        assert exact.held_out[kind] == pytest.approx(0.0, abs=1e-12)


def test_a_form_that_is_wrong_is_reported(known):
    """Where larger programs take less time, programs left out are far off, while those
    that were measured are not."""

    def falling(engine, work):
        key = key_of(engine, work)
        size = key.blocks if isinstance(key, TransferKey) else key.program.tokens
        stages = engine.deployment.instances[work.instances[0]].parallelism.pp
        return [1e-3 + 1 / size] * stages

    profile = calibrated(known.values(), falling, count=1)
    found = left_out_errors(profile)
    assert min(found[kind] for kind in KINDS) > 0.2
    lines = {line.split()[0]: line for line in table(profile).splitlines()}
    for kind in KINDS:
        assert lines[kind].split()[-1] == f"{found[kind]:.1%}"
    assert profile.held_out["prefill"] < 1e-9 and " ok " in lines["prefill"]


def test_times_that_the_program_does_not_decide_miss_the_aim(known):
    def by_context(engine, work):
        (part_s,) = device()(engine, work)
        return [part_s * (1 + work.load.context)]

    profile = calibrated([known["vllm_v0"]], by_context)
    lines = {line.split()[0]: line for line in table(profile).splitlines()}
    assert " MISSED " in lines["decode"] and " ok " in lines["prefill"]
    assert profile.held_out["decode"] > 0.2


# ---- what is measured ----------------------------------------------------------------


def test_the_grid_has_every_program(known):
    probes = grid(known.values())
    assert all(key_of(*probe) == key for key, probe in probes.items())
    for engine in known.values():
        for i, instance in enumerate(engine.instances):
            layout = engine.deployment.instances[i].parallelism
            for shape in instance.buckets.step_shapes:
                assert StepKey(layout, shape) in probes


def test_loads_held_out_are_those_of_the_seed(known):
    def drawn(seed):
        works = [probe.work for probe in unseen([known["chunked"]], 5, seed)]
        return [w.context if isinstance(w, Transfer) else w.load for w in works]

    assert drawn(0) == drawn(0) != drawn(1)
    # Chunks of prompts; decodes; transfers.
    assert len(drawn(0)) == 5 + 5 + 5
    keys = grid([known["chunked"]])
    for probe in unseen([known["chunked"]], 5, 0):
        assert key_of(*probe) in keys


POLICIES = {
    f"{name}-{role}": dataclasses.replace(policy, max_seqs=16)
    for name, policies in SYSTEMS.items()
    for role, policy in policies.items()
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    "memory",
    [
        KVMemory(num_blocks=256, max_context=512),
        KVMemory(num_blocks=64, max_context=128),
        KVMemory(num_blocks=32, max_context=512),  # one request of the longest context
    ],
    ids=str,
)
def test_random_loads_are_such_as_the_engine_can_run(name, memory):
    buckets = Buckets.for_limits(POLICIES[name].limits, memory)
    pool = memory.num_blocks * memory.block_tokens
    limits = module._Limits(memory.max_context, pool, np.random.default_rng(0))
    steps = list(limits.steps(buckets, 200))
    assert len(steps) >= 200
    for parts in steps:
        slices = slices_of(parts, memory)
        assert [(p.start, p.count) for p in slices] == list(parts) != []
        assert all(p.start + p.count <= memory.max_context for p in slices)
        assert buckets.step_shape(slices) in buckets.step_shapes
        found = buckets.load_shape(StepLoad.of(slices), memory.block_tokens)
        assert found in buckets.step_shapes
    if buckets.most_decodes and pool > memory.max_context:  # else no room to differ
        decodes = [{start for start, n in parts if start and n == 1} for parts in steps]
        assert max(map(len, decodes)) > 1


def test_work_runs_a_few_times_a_round_and_the_first_round_is_left_out():
    request = Request(id=0, arrival_s=0, prompt_tokens=9, max_tokens=1)
    prompt, decode = (
        Step.of(0, 0, slices_of([part], KVMemory(num_blocks=8, max_context=64)))
        for part in ((0, 9), (9, 1))
    )
    works = {
        "prompt": prompt,
        "decode": decode,
        "transfer": Transfer(0, request, 0, 1, (), (), 1),
    }
    calls = {name: itertools.count() for name in works}
    probes = {name: EngineWork(name, work) for name, work in works.items()}
    found = measure(probes, 2, lambda name, _: [next(calls[name])])
    assert found["prompt"] == [[[3], [4], [5]], [[6], [7], [8]]]
    turns = [[[i], [i + 1], [i + 2]] for i in range(9, 27, 3)]
    assert found["decode"] == turns
    assert found["transfer"] == [[[i]] for i in range(3, 9)]


def test_the_typical_time_is_a_mean_of_medians():
    """Cold first, then warm; a slow moment in a third of the turns counts nowhere."""
    rounds = [
        [(5, 1), (2, 1), (2, 1)],
        [(5, 1), (9, 1), (2, 1)],
        [(9, 1), (2, 7), (2, 1)],
    ]
    assert typical_s(rounds) == (3, 1)
    assert typical_s([[(4.0,)]]) == (4.0,)


def test_rounds_are_in_orders_of_their_own():
    asked = []

    def time_parts(name, work):
        asked.append(name)
        return [1.0]

    request = Request(id=0, arrival_s=0, prompt_tokens=1, max_tokens=1)
    moved = Transfer(0, request, 0, 1, (), (), 1)
    probes = {name: EngineWork(name, moved) for name in range(6)}
    measure(probes, 3, time_parts)
    rounds = [asked[i : i + 18] for i in range(0, 72, 18)]
    assert all(sorted(each) == sorted([*probes] * 3) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 4
    # Three turns, not three runs in one.
    assert all(any(len({*r[i : i + 3]}) > 1 for i in range(16)) for r in rounds)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([[(1.0,)] * 9], 1.0),
        ([[(1.0,), (1.5,), (2.0,)]], 2.0),
        # Thirds of 9 rounds, each by its median: 2 / 1.
        ([[(t,) for t in (1, 1, 8, 9, 9, 9, 2, 0.1, 2)]], 2.0),
        ([[(1.0, 3.0), (1.0, 3.0), (3.0, 3.0)]], 1.5),  # both stages together
        # One piece of work in three is no change of the device.
        ([[(1.0,)] * 3, [(1.0,), (1.0,), (9.0,)], [(1.0,)] * 3], 1.0),
    ],
)
def test_drift_is_how_much_longer_work_took_at_the_end(samples, expected):
    once_a_round = [[[parts] for parts in rounds] for rounds in samples]
    assert drift(once_a_round) == pytest.approx(expected)


@pytest.mark.parametrize(("rate", "sign"), [(0.01, r"\+"), (-0.002, "-")])
def test_a_device_that_changes_its_speed_is_refused(known, rate, sign):
    def changing():
        calls, steady = itertools.count(), device()
        return lambda *work: [steady(*work)[0] * max(0.1, 1 + rate * next(calls))]

    message = rf"the device changed .* at most 20% .*, got {sign}\d\d+%; run it again"
    with pytest.raises(ValueError, match=message):
        calibrated([known["vllm_v0"]], changing(), max_drift=0.2)
    profile = calibrated([known["vllm_v0"]], changing(), max_drift=math.inf)
    assert profile.provenance["drift"][0] == sign[-1]


def test_left_out_errors_are_means_over_stages_and_layouts(exact):
    few = dict(list(exact.layouts[Parallelism(1, 1)].measured.items())[:3])
    times = dataclasses.replace(exact.layouts[Parallelism(1, 1)], measured=few)
    layouts = {**exact.layouts, Parallelism(2): times}
    found = left_out_errors(dataclasses.replace(exact, layouts=layouts))
    assert found == {"prefill": None, "decode": None, "mixed": None}


def test_an_error_of_0_is_an_error_too(exact, monkeypatch):
    errors = iter([0.0, 0.0, 0.3])
    monkeypatch.setattr(module, "left_out_error", lambda seconds: next(errors))
    layouts = {
        layout: dataclasses.replace(times, fits={"decode": times.fits["decode"]})
        for layout, times in exact.layouts.items()
    }
    found = left_out_errors(dataclasses.replace(exact, layouts=layouts))
    assert found == {"decode": pytest.approx(0.1)}
