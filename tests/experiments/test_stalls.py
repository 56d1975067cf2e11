"""What a prompt does to decodes, with durations that are known."""

import dataclasses
import itertools

import pytest

from disagg_jax.engine.executor import as_measured
from disagg_jax.work import Step
from experiments import stalls
from experiments.benchmarks.stall import StallScenario, measure
from experiments.report.colours import system_colour
from models.config import get_config
from tests.engine.harness import random_params

CONFIG = dataclasses.replace(get_config("tiny"), layers=1)  # quick to compile
SCENE = StallScenario(decodes=3, prompts=(32, 80), chunk=19, repeats=1)


def timing(work, parts_s):
    """1 s a step and 1 s for each token of a prompt; transfers take 10 s."""
    seconds = 10.0
    if isinstance(work, Step):
        seconds = 1.0 + sum(count for _, count in work.load.chunks)
    return as_measured(work, [seconds / len(parts_s)] * len(parts_s))


@pytest.fixture(scope="module")
def found():
    stalled = measure(CONFIG, random_params(CONFIG), SCENE, timing=timing)
    return {(stall.system, stall.prompt): stall for stall in stalled}


@pytest.mark.parametrize("prompt", SCENE.prompts)
def test_each_system_stalls_decodes_as_it_must(found, prompt):
    # An ordinary gap is a decode step, 1 s. The prompt comes at the end of one.
    assert {stall.gap_s for stall in found.values()} == {1.0}
    # All of the prompt's step, and the decode step after it.
    assert found["vllm_v0", prompt].longest_s == pytest.approx(2.0 + prompt)
    # A step with the 16 prompt tokens that fit beside 3 decodes.
    for chunked in ("sarathi_serve", "vllm_v1"):
        assert found[chunked, prompt].longest_s == pytest.approx(1.0 + 16)
    assert found["disaggregated", prompt].longest_s == pytest.approx(1.0)


def test_the_price_of_chunks_is_paid_by_the_prompt(found):
    # 80 tokens in 5 steps of 16, where vLLM takes one; neither waits for a decode step.
    for chunked in ("sarathi_serve", "vllm_v1"):
        assert found[chunked, 80].ttft_s == pytest.approx(5 * 17.0)
    assert found["vllm_v0", 80].ttft_s == pytest.approx(81.0)
    assert found["disaggregated", 80].ttft_s == pytest.approx(81.0)


def test_the_table_and_the_picture_have_every_system(found, tmp_path):
    lines = stalls.table(list(found.values())).splitlines()
    assert len(lines) == 1 + len(found)
    assert lines[2].split() == [
        *("vllm_v0", "80", "tokens", "1000.00", "ms", "82000.00", "ms", "82.0"),
        *("81000.00", "ms"),
    ]
    left, right = stalls.panels(list(found.values()))
    assert [series.label for series in left.series] == [
        *("vllm_v0", "vllm_v1", "sarathi_serve", "disaggregated"),
    ]
    # Around the prompt only: it takes vLLM 81 s, and shown is a quarter of the slowest.
    assert all(-22 < x / 1e3 < 107 for s in left.series for x, _ in s.points)
    assert right.series[0].points == [(32.0, 34.0), (80.0, 82.0)]
    for series in (*left.series, *right.series):
        assert series.colour == system_colour(series.label)


def test_a_request_that_waits_is_drawn_for_as_long_as_it_waits(found):
    """With vLLM it waits from the prompt's arrival on, for 82 s; gaps are else 1 s."""
    left, _ = stalls.panels(list(found.values()))
    points = left.series[0].points
    waits = [(x / 1e3, gap / 1e3) for x, gap in points if gap > 1e3]
    assert waits == [(pytest.approx(0.0), 82.0), (pytest.approx(82.0), 82.0)]
    stamps = [x for x, _ in points]
    assert stamps == sorted(stamps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decodes": 0}, "decodes: expected >= 1, got 0"),
        ({"prompts": ()}, r"prompts: expected tokens >= 1, got \[\]"),
        ({"chunk": 8}, "chunk: expected more tokens than 8 decodes, got 8"),
        ({"repeats": 0}, "repeats: expected >= 1, got 0"),
    ],
)
def test_bad_scenes(changes, message):
    with pytest.raises(ValueError, match=message):
        StallScenario(**changes)


def test_a_prompt_longer_than_the_model_can_hold_is_refused_before_any_work():
    config = get_config("m32")
    with pytest.raises(ValueError, match="expected at most 511 tokens for m32"):
        measure(config, {}, StallScenario(prompts=(600,)))


def test_of_several_runs_the_one_in_the_middle_counts():
    factors = itertools.cycle([3, 1, 2])

    def uneven(work, parts_s):
        """A prompt of 80 tokens takes 3, 1 and 2 times as long, in turn."""
        known = timing(work, parts_s)
        if isinstance(work, Step) and work.load.chunks == ((0, 80),):
            return as_measured(work, [1.0 + 80 * next(factors)])
        return known

    scene = dataclasses.replace(SCENE, prompts=(80,), repeats=3)
    # Each of the warm-up runs has such a prompt as well, so that the cycle starts anew.
    vllm, *_ = measure(CONFIG, random_params(CONFIG), scene, timing=uneven)
    assert vllm.longest_s == pytest.approx(1.0 + 1.0 + 80 * 2)
    assert vllm.ttft_s == pytest.approx(1.0 + 80 * 2)
    assert max(gap_s for _, gap_s in vllm.gaps) == vllm.longest_s


def test_a_machine_that_became_too_fast_is_named():
    """All decodes end before the prompt comes, as a step takes a hundredth by then."""
    runs = itertools.count()

    def faster(work, parts_s):
        known = timing(work, parts_s)
        if next(runs) < 3 * 65:  # steps of the runs that say when the prompt comes
            return known
        return as_measured(work, [s / 100 for s in known.durations_s])

    scene = dataclasses.replace(SCENE, prompts=(80,))
    with pytest.raises(ValueError, match="ended before the prompt came"):
        measure(CONFIG, random_params(CONFIG), scene, timing=faster)
