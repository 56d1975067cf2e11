"""What steps take in serving over alone: measured, kept, and counted with."""

import dataclasses
import itertools

import pytest

from disagg_jax.calibration.profile_keys import cost_of, key_of
from disagg_jax.deployment import Parallelism
from disagg_jax.work import StepLoad
from experiments.accuracy_study.serving_factor import (
    ServedStep,
    serve_each,
    with_serving_factors,
)
from experiments.configs.config import WorkloadConfig
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import build_engine, serve_with
from tests.experiments.calibrating import CONFIG, calibrated, device, make_model

PROMPT, DECODE = StepLoad(((0, 9),), 0, 0), StepLoad((), 2, 20)


def test_what_steps_took_together_counts_by_layout_and_kind(exact):
    steps = [
        ServedStep(Parallelism(1, 1), "decode", 1.0, 2.0),
        ServedStep(Parallelism(1, 1), "decode", 8.0, 4.0),  # longer ones weigh more
        ServedStep(Parallelism(1, 1), "prefill", 1.1, 1.0),
        ServedStep(Parallelism(1, 2), "decode", 0.5, 1.0),
    ]
    found = with_serving_factors(exact, steps)
    assert found.layouts[Parallelism(1, 1)].serving_factor == pytest.approx(
        {"decode": 1.5, "prefill": 1.1}
    )
    assert found.layouts[Parallelism(1, 2)].serving_factor == {"decode": 0.5}
    alone = dataclasses.replace(found.layouts[Parallelism(1, 1)], serving_factor={})
    assert alone == exact.layouts[Parallelism(1, 1)]


def test_the_simulator_counts_with_it_and_what_runs_alone_does_not(exact, known):
    found = with_serving_factors(
        exact, [ServedStep(Parallelism(1, 1), "decode", 1.5, 1.0)]
    )
    before, after = (cost_of(profile, known["vllm_v0"]) for profile in (exact, found))
    (alone_s,), (serving_s,) = (cost.stages_s(0, DECODE) for cost in (before, after))
    assert serving_s == pytest.approx(1.5 * alone_s)
    assert after.decoder(0)(2, 20) == serving_s
    assert after.stages_s(0, PROMPT) == before.stages_s(0, PROMPT)
    program = after.instances[0].program(DECODE)
    assert found.layouts[Parallelism(1, 1)].stages_s(program) == (alone_s,)


@pytest.fixture(scope="module")
def machine():
    """Servers whose engines run nothing, and a profile of their programs."""
    config = dataclasses.replace(
        CONFIG,
        systems={name: CONFIG.systems[name] for name in ("vllm_v0", "sarathi_serve")},
        workload=WorkloadConfig(num_requests=60, prompt_tokens="uniform:8:60"),
        durations="live",
        num_seeds=1,
    )
    model = make_model()
    servers = [
        serve_with(config, build_engine(config, system, model, {}), system.policies, {})
        for system in config.systems.values()
    ]
    profile = calibrated([server.engine for server in servers], device())
    return servers, RequestSource.load(config, model), profile


@pytest.mark.parametrize("slower", [1.0, 1.5])
def test_a_machine_on_which_serving_takes_longer(machine, monkeypatch, slower):
    """Probes are as slow as the machine; only what comes in serving is held against
    the programs alone, whatever the machine's speed was then."""
    servers, source, profile = machine
    steady, alone = device(), itertools.count()
    times = {"decode": 1.25, "prefill": 0.9, "mixed": 1.1}

    def in_serving(engine, work):
        (part_s,) = steady(engine, work)
        if not work.id:  # of probes
            next(alone)
            return [slower * part_s], ((), 0)
        part_s *= times[key_of(engine, work).program.kind]
        # Whatever tokens: none of them ends a request.
        tokens = (0,) * sum(part.samples for part in work.slices)
        return [slower * part_s], (tokens, 0)

    monkeypatch.setattr("disagg_jax.calibration.timing.run_alone", in_serving)
    monkeypatch.setattr("disagg_jax.engine.executor.run_alone", in_serving)
    monkeypatch.setattr("disagg_jax.engine.engine.Engine.warm_up", lambda *_: None)
    of_each = list(serve_each(servers, source, profile))
    found = with_serving_factors(profile, itertools.chain(*of_each))
    assert next(alone) > 10
    assert found.layouts[Parallelism(1, 1)].serving_factor == pytest.approx(times)
    stops = iter([False, True])
    said = []
    (first,) = serve_each(
        servers, source, profile, lambda *step: said.append(step), lambda: next(stops)
    )
    assert [step[:2] for step in first] == [step[:2] for step in of_each[0]]
    assert said == [("systems that serve", 0, 2, "")]
