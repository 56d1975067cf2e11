"""What a profile is used for, what it is refused for, and one of a real engine."""

import dataclasses
import json
import math
from typing import ClassVar

import pytest

from disagg_jax.calibration.profile_keys import (
    cost_of,
    key_of,
    read_profile,
)
from disagg_jax.calibration.step_times import check_step_times, step_times_of
from disagg_jax.calibration.works import every_work
from disagg_jax.deployment import Parallelism
from disagg_jax.programs import split_decodes
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.cost.measured_profile import profile_to_json
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import Step, StepLoad, Transfer
from disagg_jax.workload import RandomWorkload, UniformLengths
from experiments import calibrate
from experiments.calibrate import on_deployments
from experiments.configs.config import Config, Memory, System, WorkloadConfig
from experiments.configs.named import get_config
from experiments.sweep.serving import build_engine
from tests.experiments.calibrating import CONFIG, TINY, device, seqs


def test_a_profile_has_the_step_times_of_its_engines(known, exact):
    for engine in known.values():
        step_times = step_times_of(exact, engine)
        check_step_times(engine, step_times)
        for work in every_work(engine):
            found_s = [step_times[key] for key in engine.part_keys(work)]
            assert found_s == pytest.approx(device()(engine, work), rel=1e-12)


@pytest.mark.parametrize("use", [cost_of, step_times_of])
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("stages", {}, r"known: expected one of \[tp1\], got tp1pp2"),
        (
            "chunked",
            {"transfers": {}},
            r"known: expected transfers between \[\], got \(tp1, tp1\)",
        ),
        ("vllm_v0", {"block_tokens": 8}, "known: expected blocks of 8 tokens, got 16"),
    ],
)
def test_what_was_not_measured_is_refused(known, exact, use, name, changes, message):
    layouts = {Parallelism(): exact.layouts[Parallelism(1, 1)]}
    profile = dataclasses.replace(exact, layouts=layouts, **changes)
    with pytest.raises(ValueError, match=message):
        use(profile, known[name])


def write(path, profile):
    path.write_text(json.dumps(profile_to_json(profile)))
    return str(path)


def test_a_profile_is_read_back_exactly(tmp_path, noisy):
    assert read_profile(write(tmp_path / "p.json", noisy), TINY) == noisy


@pytest.mark.parametrize(
    ("key", "here", "value"),
    [
        ("model", "tiny", "m32"),
        ("dtype", "float32", "bfloat16"),
        ("device", "cpu", "TPU v5e"),
    ],
)
def test_a_profile_of_something_else_is_refused(tmp_path, exact, key, here, value):
    provenance = {**exact.provenance, key: value}
    other = dataclasses.replace(exact, provenance=provenance)
    message = f"--profile: .* {key} {here}, got '.*p.json' of {key} {value}$"
    with pytest.raises(ValueError, match=message):
        read_profile(write(tmp_path / "p.json", other), TINY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("step times", "Expecting value"),
        ("[]", "profile: expected an object"),
        ('{"kind": "fitted"}', "profile.kind: expected 'calibrated'.*, got 'fitted'"),
    ],
)
def test_a_file_that_is_no_profile_is_named(tmp_path, text, message):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    expected = "--profile: expected what experiments.calibrate wrote, .*p.json': .*"
    with pytest.raises(ValueError, match=expected + message):
        read_profile(str(path), TINY)


# ---- the command ---------------------------------------------------------------------


def test_systems_move_to_deployments_that_have_their_roles():
    assert on_deployments(CONFIG, []) == CONFIG
    moved = on_deployments(CONFIG, ["colocated:tp4", "2xprefill:tp1,decode:tp2"])
    colocated = ("vllm_v0", "orca", "sarathi_serve", "stages")
    assert {name: system.deployment for name, system in moved.systems.items()} == {
        **{f"{name}@colocated:tp4": "colocated:tp4" for name in colocated},
        **{
            f"{name}@2xprefill:tp1,decode:tp2": "2xprefill:tp1,decode:tp2"
            for name in ("disaggregated", "chunked")
        },
    }


@pytest.mark.parametrize("clock", ["virtual", "wall"])
@pytest.mark.parametrize("durations", ["table", "live", "modelled"])
def test_tensor_parallel_host_devices_are_not_timed(clock, durations):
    config = get_config("tiny_tp2")
    config = dataclasses.replace(config, clock=clock, durations=durations)
    with pytest.raises(ValueError, match="vllm_v0: .*expected durations=modelled"):
        calibrate.run(config, 3, 2, math.inf)


def test_an_engine_is_measured_and_its_profile_used(
    random_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(calibrate, "load_model", lambda config: random_model)
    policies = {"prefill": seqs(1, token_budget=32), "decode": seqs(1)}
    pair = System.of("disaggregated", "prefill:tp1,decode:tp1", **policies)
    memory = Memory(tokens_per_device=64, block_tokens=16, max_context=32)
    lengths = {"prompt_tokens": "uniform:4:16", "output_tokens": "uniform:2:8"}
    workload = WorkloadConfig(num_requests=10, **lengths)
    config = Config(systems={"pair": pair}, memory=memory, workload=workload)
    profile = calibrate.run(config, 3, 2, math.inf)
    assert profile.name == "tiny-cpu"
    assert {"commit", "date", "jax", "drift"} <= profile.provenance.keys()
    assert set(profile.held_out) == {"prefill", "decode", "transfer"}
    (times,) = profile.layouts.values()
    assert all(0 < seconds < 10 for (seconds,) in times.measured.values())
    assert set(times.serving_factor) == {"prefill", "decode"}
    assert profile.block_bytes == 16 * TINY.kv_bytes_per_token
    again = read_profile(write(tmp_path / "p.json", profile), TINY)
    engine = build_engine(config, pair, random_model, {})
    step_times = step_times_of(again, engine)
    check_step_times(engine, step_times)
    # A prefill, a decode, and transfers of 1 and 2 blocks.
    assert len(step_times) == 1 + 1 + 2
    cost = cost_of(again, engine)
    for work in every_work(engine):
        if isinstance(work, Transfer):
            full = dataclasses.replace(work, context=16 * len(work.src_blocks))
            assert cost.hop(full).bytes == engine.transfer_bytes(work)


class Asked(LinearCost):
    """Remembers what it was asked for."""

    loads: ClassVar[list[StepLoad]] = []

    def stages_s(self, instance, load):
        self.loads.append(load)
        return super().stages_s(instance, load)


@pytest.mark.parametrize(
    "system", ["vllm_v0", "orca", "sarathi_serve", "disaggregated"]
)
def test_where_blocks_are_counted_the_program_is_the_engines(known, system):
    """Without, it is a guess; requests come and go, so that it is often wrong."""
    engine, policies = known[system], CONFIG.systems[system].policies
    memory = tuple(instance.programs.memory for instance in engine.instances)
    stages = tuple(spec.parallelism.pp for spec in engine.deployment.instances)
    simulated = SimulatedDeployment(
        deployment=engine.deployment,
        policies=policies,
        memory=memory,
        cost=Asked(step_base_s=2e-3, pp=stages),
        spans=False,
        counts_blocks=True,
    )
    workload = RandomWorkload(
        prompt=UniformLengths(low=8, high=200), output=UniformLengths(low=2, high=60)
    )
    requests = workload.requests(150, 60.0, seed=0)
    steps: list[Step] = []

    def observe(_, __, works):
        steps.extend(work for work in works if isinstance(work, Step))
        for step in steps[-len(works) :]:
            len(step.slices)  # are read, with the blocks of now

    Asked.loads.clear()
    simulated.run(requests, observer=observe)
    guesses = 0
    for step, load in zip(steps, Asked.loads, strict=True):
        instance = engine.instances[step.instance]
        buckets, size = instance.buckets, instance.programs.memory.block_tokens
        program = key_of(engine, step).program
        assert buckets.load_shape(load, size) == program
        _, decodes = split_decodes(step.slices, buckets.most_decodes)
        one = sum(len(part.blocks) for part in decodes if part.is_decode)
        assert load.decode_blocks <= one
        unknown = dataclasses.replace(load, decode_blocks=0)
        guesses += buckets.load_shape(unknown, size) == program
    assert 0.2 * len(steps) < guesses < len(steps)
