"""The two targets that follow from step times, by a formula; nothing compiles."""

import dataclasses

import pytest

from disagg_jax.request import Request
from disagg_jax.scheduling.system import System
from experiments.configs.config import Targets
from experiments.sweep.targets import resolve_slos
from tests.experiments.calibrating import seqs
from tests.experiments.sweep.test_serving import CHUNKS, MODELLED, SPLIT, durations

ORCA = System.of("orca", "colocated:tp1", colocated=seqs(16, max_batched_tokens=256))
REQUESTS = [Request(id=0, arrival_s=0.0, prompt_tokens=100, max_tokens=11)]


class Source:
    """One request, whatever the rate."""

    def __call__(self, rate_rps, seed=0):
        return REQUESTS

    def longest_prompt(self):
        return 100


def smallest_s(model, system):
    return durations(model, system).smallest_mixed_s(system.policies, REQUESTS)


def test_the_smallest_step_is_that_of_a_prompts_part_where_prompts_are_split(
    random_model,
):
    # Of 32 tokens 2 decode, at a context of 105: 1 + 30 x 0.1 + 2 x (0.01 + 0.105).
    assert smallest_s(random_model, CHUNKS) == pytest.approx(4.23)
    # A whole prompt at least, in 128 tokens of which 11 decode: 117 x 0.1.
    assert smallest_s(random_model, ORCA) == pytest.approx(1 + 11.7 + 11 * 0.115)
    assert smallest_s(random_model, SPLIT) == 0  # no step has both


def slos(model, **systems):
    """Of targets whose TPOT is tight; `systems` by name."""
    config = dataclasses.replace(
        MODELLED, systems=systems, relaxed=2.0, slo=Targets(ttft_s=0.0, tpot_scale=0.5)
    )
    found = {name: durations(model, each, config) for name, each in systems.items()}
    return resolve_slos(config, found, Source())


def test_the_relaxed_target_has_room_for_the_slowest_systems_smallest_step(
    random_model,
):
    found = slos(random_model, split=SPLIT, chunks=CHUNKS)
    tight, relaxed = found["tight"], found["relaxed"]
    assert relaxed.tpot_s == pytest.approx(2 * 4.23)
    assert relaxed.ttft_s / tight.ttft_s == pytest.approx(8.46 / tight.tpot_s)
    slower = slos(random_model, split=SPLIT, chunks=CHUNKS, orca=ORCA)
    assert slower["relaxed"].tpot_s == pytest.approx(2 * (12.7 + 11 * 0.115))
    # Where every step meets the tight target, both are equal.
    alike = slos(random_model, split=SPLIT)
    assert alike["relaxed"] == alike["tight"]


def test_without_a_relaxed_target_there_is_one_without_a_name(random_model):
    one = {"chunks": durations(random_model, CHUNKS)}
    config = dataclasses.replace(MODELLED, systems={"chunks": CHUNKS})
    assert list(resolve_slos(config, one, Source())) == [""]
