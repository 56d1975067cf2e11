"""Engines of a config and the durations of their steps, by a formula; none compiles."""

import dataclasses
import types
from typing import ClassVar

import jax
import pytest

from disagg_jax.deployment import Deployment, Role
from disagg_jax.engine.step_durations import StepDurations
from disagg_jax.metrics import SLO
from disagg_jax.request import Request
from disagg_jax.scheduling import tuning
from disagg_jax.scheduling.interface import StepLimits
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.work import StepLoad
from experiments.configs.config import Config, Memory, System, Targets
from experiments.sweep.serving import (
    build_engine,
    check_modelled,
    instance_memory,
    known_timing,
    most_devices,
    resolve_slo,
)
from experiments.sweep.targets import resolve_criteria
from models.config import get_config
from tests.experiments.calibrating import CONFIG, seqs

# Seconds of a step, of each prompt token, decode and token of its context.
COST = LinearCost(
    step_base_s=1.0, prefill_token_s=0.1, decode_token_s=0.01, context_token_s=1e-3
)
CHUNKS = System.of(
    "sarathi_serve", "colocated:tp1", colocated=seqs(16, token_budget=128)
)
STAGES = System.of("sarathi", "colocated:tp1pp2", colocated=seqs(16))
SPLIT = System.of(
    "disaggregated",
    "2xprefill:tp1,decode:tp1",
    prefill=seqs(8, token_budget=256),
    decode=seqs(4),
)
TABLE = dataclasses.replace(CONFIG, durations="table")
MODELLED = dataclasses.replace(CONFIG, durations="modelled", cost=COST)


def durations(model, system, config=MODELLED, kind=StepDurations):
    engine = build_engine(config, system, model, {})
    return kind(engine, known_timing(config, engine, {}))


def config_of(*deployments, **fields):
    systems = {
        str(i): dataclasses.replace(CHUNKS, deployment=d)
        for i, d in enumerate(deployments)
    }
    return Config(systems=systems, **fields)


@pytest.mark.parametrize(
    ("deployment", "layers", "blocks"),
    [
        ("colocated:tp1", 3, [10]),
        ("2xcolocated:tp2", 3, [20, 20]),
        # Two of three layers on one stage: its device has room for 3 / 2 as many.
        ("colocated:tp1pp2", 3, [15]),
        ("colocated:tp1pp2", 4, [20]),
        ("colocated:tp1pp2", 5, [16]),  # 50 / 3, rounded down
        ("prefill:tp2pp3,decode:tp1", 3, [60, 10]),
    ],
)
def test_a_device_has_equally_many_blocks_whatever_its_stage(
    deployment, layers, blocks
):
    memory = Memory(tokens_per_device=80, block_tokens=8, max_context=99)
    model = dataclasses.replace(get_config("tiny"), layers=layers)
    found = instance_memory(
        config_of("colocated:tp1", memory=memory), Deployment.parse(deployment), model
    )
    assert [pool.num_blocks for pool in found] == blocks
    assert {(pool.block_tokens, pool.max_context) for pool in found} == {(8, 99)}


@pytest.mark.parametrize(("clock", "devices"), [("virtual", 4), ("wall", 5)])
def test_equal_instances_share_devices_on_the_virtual_clock(clock, devices):
    """2 + 1 + 1 of different ones, and 5 in all; the largest deployment counts."""
    deployments = ("3xcolocated:tp1", "prefill:tp2,decode:tp1,decode:tp1pp1")
    assert most_devices(config_of(*deployments[:1])) == 1
    assert most_devices(config_of(*deployments[:1], clock="wall")) == 3
    mixed = "prefill:tp2,2xdecode:tp1,prefill:tp1"
    assert most_devices(config_of(*deployments, mixed, clock=clock)) == devices


def test_what_an_engine_does_not_run_is_refused_as_its_devices_are_counted():
    with pytest.raises(ValueError, match="engine: expected no dp .*, got tp1dp2ep2"):
        most_devices(config_of("colocated:tp1", "prefill:tp1,decode:tp1dp2ep2"))


def test_one_instance_of_several_devices_makes_measured_durations_contention():
    mixed = config_of("colocated:tp1", "prefill:tp1,decode:tp2")
    with pytest.raises(ValueError, match="systems.1: with tp > 1 on host devices"):
        check_modelled(mixed)
    check_modelled(dataclasses.replace(mixed, durations="modelled"))
    check_modelled(dataclasses.replace(mixed, clock="wall"))
    check_modelled(config_of("colocated:tp1pp2"))


@pytest.mark.parametrize(
    ("tokens", "steps"), [(1, 1), (128, 1), (130, 2), (256, 2), (300, 3)]
)
def test_a_prompt_takes_as_few_steps_as_it_can(random_model, tokens, steps):
    """Of 128 tokens; each takes a second and a tenth for each token of the prompt."""
    one = durations(random_model, CHUNKS)
    assert one.prefill_s(tokens) == pytest.approx(steps + 0.1 * tokens)


def test_the_largest_decode_step_has_all_rows_and_blocks(random_model):
    """256 blocks of 16 tokens; of a pair, the decode instance's 4 rows."""
    seconds, rows = durations(random_model, CHUNKS).decode_s()
    assert rows == 16 and seconds == pytest.approx(1 + 0.16 + 4.096)
    seconds, rows = durations(random_model, SPLIT).decode_s()
    assert rows == 4 and seconds == pytest.approx(1 + 0.04 + 4.096)


def test_a_step_takes_what_its_stages_take_together(random_model):
    one = durations(random_model, STAGES)
    load = StepLoad((), 4, 64)
    stages_s = dataclasses.replace(COST, pp=(2,)).stages_s(0, load)
    assert len(stages_s) == 2
    assert one.step_s(0, load) == pytest.approx(sum(stages_s))


def test_a_step_takes_what_its_programs_took(random_model):
    """A second and two for the two stages, whatever the load."""
    times = Stages()
    engine = build_engine(TABLE, STAGES, random_model, {})
    one = StepDurations(engine, known_timing(TABLE, engine, times))
    assert one.step_s(0, StepLoad((), 4, 64)) == 3.0
    assert one.decode_s() == (3.0, 16)
    assert len(times.asked) == 4


class Stages(dict):
    """Step times by stage, and which were asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __missing__(self, key):
        self.asked.append(key)
        return 1.0 if key.endswith("1of2") else 2.0


def test_a_request_alone_decodes_at_its_mean_context(random_model):
    found = durations(random_model, SPLIT)
    alone = found.alone(Request(id=0, arrival_s=0.0, prompt_tokens=100, max_tokens=41))
    assert alone.ttft_s == pytest.approx(1 + 10)
    assert alone.tpot_s == pytest.approx(1 + 0.01 + 0.120)


class Asked(StepDurations):
    """Keeps the loads that it was asked about."""

    def step_s(self, instance, load):
        self.__dict__.setdefault("loads", []).append((instance, load))
        return super().step_s(instance, load)


def requests(*lengths):
    return [
        Request(id=i, arrival_s=0.0, prompt_tokens=prompt, max_tokens=output)
        for i, (prompt, output) in enumerate(lengths)
    ]


def test_step_sizes_are_for_the_mean_lengths_and_the_target_of_later_tokens(
    random_model,
):
    """Prompts of 40.67 tokens and outputs of 21.67, rounded to the nearest."""
    one = durations(random_model, CHUNKS, kind=Asked)
    served = requests((40, 10), (41, 21), (41, 34))
    policies, reasons = one.tuned(CHUNKS.policies, 7.0, served)
    asked = list(one.loads)

    def step_s(load):
        expected.append((0, load))
        return durations(random_model, CHUNKS).step_s(0, load)

    expected = []
    profile = tuning.TuningInputs(
        step_s=step_s,
        sizes=one.engine.instances[0].buckets.prompt_sizes,
        prompt_tokens=41,
        output_tokens=22,
        kv_tokens=256 * 16,
    )
    tuned = tuning.tune(CHUNKS.policies[Role.COLOCATED], profile, 7.0)
    assert asked == expected and expected
    assert reasons == [f"colocated {tuned.choice}"]
    assert policies == {Role.COLOCATED: tuned.policy}
    assert policies != CHUNKS.policies


def test_memory_limits_the_decodes_beside_a_prompt(random_model):
    """1024 tokens are 4 requests of 256."""
    small = dataclasses.replace(MODELLED, memory=Memory(tokens_per_device=1024))
    one = durations(random_model, CHUNKS, small, kind=Asked)
    one.tuned(CHUNKS.policies, 7.0, requests((206, 100)))
    assert max(load.decodes for _, load in one.loads) == 4


def test_only_what_a_paper_has_a_rule_for_is_tuned(random_model):
    """vLLM's step stays, and so does the decode side of a pair."""
    vllm, served = CONFIG.systems["vllm_v0"], requests((40, 10))
    one = durations(random_model, vllm)
    assert one.tuned(vllm.policies, 7.0, served) == (vllm.policies, [])
    split = durations(random_model, SPLIT)
    policies, (reason,) = split.tuned(SPLIT.policies, 7.0, served)
    assert reason.startswith("prefill ")
    assert policies[Role.DECODE] == SPLIT.policies[Role.DECODE]


@dataclasses.dataclass(frozen=True)
class DeclaresNone:
    """A policy of one's own that says nothing about its step size."""

    limits: ClassVar[StepLimits] = StepLimits.of_chunks(64, 8)


def test_a_policy_without_a_step_size_is_said_to_be_not_tuned(random_model):
    own = System(deployment="colocated:tp1", policies={Role.COLOCATED: DeclaresNone()})
    policies, reasons = durations(random_model, own).tuned(
        own.policies, 7.0, requests((40, 10))
    )
    assert policies == own.policies
    assert reasons == ["colocated not tuned: DeclaresNone declares no step size"]


def test_on_the_virtual_clock_one_device_stands_for_several(random_model, monkeypatch):
    """Not for the several of one instance, which run one program together."""
    only = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: only)
    assert len(durations(random_model, SPLIT).engine.instances) == 3
    wide = dataclasses.replace(SPLIT, deployment="prefill:tp2,decode:tp1")
    wall = dataclasses.replace(MODELLED, clock="wall")
    for system, config in ((wide, MODELLED), (SPLIT, wall)):
        with pytest.raises(ValueError, match="devices, got 1"):
            durations(random_model, system, config)


def test_targets_are_multiples_of_the_longest_prompt_and_of_the_largest_step(
    random_model,
):
    config = dataclasses.replace(MODELLED, slo=Targets(ttft_scale=3.0, tpot_scale=2.0))
    one = durations(random_model, CHUNKS, config)
    longest = types.SimpleNamespace(longest_prompt=lambda: 200)
    found = resolve_slo(config, one, longest)
    assert found.ttft_s == pytest.approx(3 * (2 + 20))
    assert found.tpot_s == pytest.approx(2 * (1 + 0.16 + 4.096))


def test_criteria_have_the_target_that_is_searched_for(random_model):
    config = dataclasses.replace(MODELLED, search=SearchPlan(target=0.55))
    longest = types.SimpleNamespace(longest_prompt=lambda: 200)
    slo = SLO(ttft_s=1.0, tpot_s=1.0)
    one = durations(random_model, CHUNKS, config)
    found = resolve_criteria(config, slo, one.unloaded([]), longest)
    assert found["distserve"].target == found["mooncake"].target == 0.55
