"""The main job's second table: what is simulated, and what its lines say."""

import copy
import dataclasses
import json

import pytest

from disagg_jax.deployment import Parallelism
from disagg_jax.scheduling.system import System
from disagg_jax.scheduling.tuning import TuningInputs, smallest_mixed_s
from disagg_jax.work import StepLoad
from experiments.configs.config import Targets
from experiments.sweep.hardware import Question, hardware_table
from experiments.sweep.hardware_report import hardware_lines
from experiments.sweep.step_prices import Device, Shape, this_machine
from tests.experiments.calibrating import seqs
from tests.experiments.sweep.test_serving import CHUNKS, MODELLED, SPLIT, durations
from tests.experiments.sweep.test_targets import REQUESTS

ORCA = System.of("orca", "colocated:tp1", colocated=seqs(16, max_batched_tokens=256))
SMALL = Question(workload="fixed:200x8", num_requests=30, max_requests=30, seeds=2)
SYSTEMS = {"sarathi_serve": CHUNKS, "disaggregated": SPLIT, "placed_low": ORCA}
CONFIG = dataclasses.replace(
    MODELLED, systems=SYSTEMS, relaxed=1.25, slo=Targets(), hardware_table=True
)


def made(model, stop=lambda: False, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    timed = {name: durations(model, each) for name, each in config.systems.items()}
    return hardware_table(
        config, timed, REQUESTS, map, lambda *_: None, stop, question=SMALL
    )


@pytest.fixture(scope="module")
def table(random_model):
    return made(random_model)


# ---- what is simulated ---------------------------------------------------------------


def test_the_systems_that_are_listed_are_asked_by_both_targets(table):
    assert list(table["targets"]) == ["tight", "relaxed"]
    for found in table["targets"].values():
        assert list(found["systems"]) == ["sarathi_serve", "disaggregated"]
        for system in found["systems"].values():
            goodputs = system["goodput"]["per_seed_rps_per_device"]
            assert len(goodputs) == 2 and min(goodputs) > 0
        (pair,) = found["pairs"]
        assert {pair["ahead"], pair["behind"]} == {"sarathi_serve", "disaggregated"}
    assert table["left_out"] == ["placed_low"]
    json.dumps(table, allow_nan=False)


def test_the_profile_is_one_that_was_held_against_this_model_on_this_gpu(table):
    assert "measured rows of llama-3.1-8b on h100 (cross-validated)" in table["checked"]


def test_targets_are_multiples_of_steps_on_the_hardware(table):
    spec, layout = SMALL.spec(CONFIG), Parallelism(1)
    cost = spec.simulation.cost.instance(layout)

    def step_s(load):
        return sum(cost.stages_s(load))

    tight, relaxed = (found["slo"] for found in table["targets"].values())
    rows = table["decodes"]
    assert rows == 16  # of a full step of the first system here
    assert tight["ttft_s"] == pytest.approx(5 * step_s(StepLoad(((0, 200),), 0, 0)))
    full = StepLoad((), rows, rows * SMALL.max_context)
    assert tight["tpot_s"] == pytest.approx(1.5 * step_s(full))
    inputs = TuningInputs(
        step_s=step_s,
        sizes=spec.sizes,
        prompt_tokens=200,
        output_tokens=8,
        kv_tokens=spec.simulation.cost.kv_tokens(layout),
    )
    policies = spec.systems["sarathi_serve"].values()
    smallest_s = smallest_mixed_s((policy, inputs) for policy in policies)
    scale = max(1.0, 1.25 * smallest_s / tight["tpot_s"])
    assert relaxed["tpot_s"] == pytest.approx(scale * tight["tpot_s"])
    assert relaxed["ttft_s"] == pytest.approx(scale * tight["ttft_s"])


def test_without_a_relaxed_target_there_is_one_without_a_name(random_model):
    assert list(made(random_model, relaxed=0.0)["targets"]) == [""]


def test_a_table_for_which_there_is_no_time_is_none(random_model):
    assert made(random_model, stop=lambda: True) is None


# ---- prices of steps -----------------------------------------------------------------


def test_prices_follow_from_the_times_of_steps():
    # 10 ms, and 1 ms a token beyond 48: 40 tokens are free beside 8 decodes.
    def step_s(load):
        tokens = sum(count for _, count in load.chunks) + load.decodes
        return 0.01 + 0.001 * max(0, tokens - 48)

    device = Device(
        name="made up",
        step_s=step_s,
        alone_s=lambda tokens: step_s(StepLoad(((0, tokens),), 0, 0)),
        context=100,
        overhead_s=lambda load: load.decodes * 1e-4,
    )
    found = device.prices(Shape(decodes=8, tokens=64, few_tokens=16))
    assert found == {
        "device": "made up",
        "one_decode_s": 0.01,
        "decodes_s": 0.01,
        "part_s": pytest.approx(0.026),
        "few_s": 0.01,
        "both_s": pytest.approx(0.034),
        "free_tokens": 32,  # 40, in steps of 16
        "overhead_s": pytest.approx(8e-4),
    }


def test_here_a_part_fills_the_largest_step_that_has_decodes_too(random_model):
    timed = {"sarathi_serve": durations(random_model, CHUNKS)}
    config = dataclasses.replace(CONFIG, systems={"sarathi_serve": CHUNKS})
    device, shape = this_machine(config, timed, REQUESTS)
    assert (shape.decodes, shape.tokens) == (16, 112)  # 128 tokens in all
    prices = device.prices(shape)
    # By the formula, beside decodes each token of a prompt takes its full 0.1 s.
    assert prices["both_s"] - prices["decodes_s"] == pytest.approx(11.2)
    assert prices["part_s"] == pytest.approx(1 + 11.2)
    assert prices["overhead_s"] is None


def test_where_no_system_mixes_nothing_is_said_of_prices(random_model):
    timed = {"disaggregated": durations(random_model, SPLIT)}
    config = dataclasses.replace(CONFIG, systems={"disaggregated": SPLIT})
    assert this_machine(config, timed, REQUESTS) is None


def test_on_the_hardware_overheads_are_those_of_the_engine(table):
    here, there = table["prices"]["devices"]
    assert here["overhead_s"] is None
    assert 0 < there["overhead_s"] < there["decodes_s"]


# ---- what its lines say --------------------------------------------------------------


def side(values, told_apart, ratio):
    """One target: (system, deployment, goodput), the better first."""
    systems = {
        name: {
            "deployment": deployment,
            "goodput": {
                "goodput_rps_per_device": {"mean": rps, "low": None, "high": None},
                "per_seed_rps_per_device": [rps, rps],
            },
        }
        for name, deployment, rps in values
    }
    ahead, behind = systems
    pair = {
        "ahead": ahead,
        "behind": behind,
        "ratio": dict(zip(("mean", "low", "high"), ratio, strict=True)),
        "told_apart": told_apart,
    }
    return {
        "model": "tiny",
        "criterion": "distserve",
        "target": 0.9,
        "slo": {"ttft_s": 0.1, "tpot_s": 0.01},
        "systems": systems,
        "pairs": [pair],
        "choices": {name: [f"size of {name}"] for name in systems},
        "requests": "30 of 70",
    }


APART = ("apart", "prefill:tp1,decode:tp1", 4.0)
TOGETHER = ("together", "2xcolocated:tp1", 5.0)
PRICES = {
    "device": "tiny on cpu",
    "one_decode_s": 0.001,
    "decodes_s": 0.002,
    "part_s": 0.010,
    "few_s": 0.004,
    "both_s": 0.011,
    "free_tokens": 0,
    "overhead_s": None,
}


def lines_of(table, **changes):
    here = side([("apart", APART[1], 6.0), TOGETHER], True, (1.2, 1.1, 1.3))
    there = side([TOGETHER, APART], False, (1.25, 0.8, 2.0))
    gpu = {
        **PRICES,
        "device": "big on gpu",
        "both_s": 0.003,
        "few_s": 0.006,
        "free_tokens": 48,
        "overhead_s": 0.0005,
    }
    content = {
        **copy.deepcopy(table),
        "targets": {"": there},
        "prices": {
            "decodes": 16,
            "tokens": 48,
            "few_tokens": 16,
            "devices": [PRICES, gpu],
        },
        **changes,
    }
    return hardware_lines({**here, "hardware_table": content})


def cells(lines, label):
    (line,) = (line for line in lines if line.startswith(label))
    return line.removeprefix(label).split()


def test_goodputs_stand_beside_those_of_this_machine(table):
    lines = lines_of(table)
    # The first columns are this machine's: 6 is the best here, 5 on the hardware.
    assert cells(lines, "apart ") == ["6", "100%", "4", "80%"]
    assert cells(lines, "together ") == ["5", "83%", "5", "100%"]


def test_the_ratio_is_of_disaggregated_over_colocated_whoever_is_ahead(table):
    (line,) = (one for one in lines_of(table) if "over the best colocated" in one)
    assert line == (
        "disaggregated over the best colocated system: 1.20 [1.10, 1.30] (together) "
        "here, 0.80 [0.50, 1.25] (together, undecided) on h100"
    )


def test_systems_that_are_not_told_apart_are_marked(table):
    (line,) = (one for one in lines_of(table) if one.startswith("SLO: "))
    assert line.endswith("together ~ apart")


def test_the_lines_say_how_long_runs_are_and_what_is_left_out(table):
    text = "\n".join(lines_of(table))
    assert "requests a run: 30 of 70 that the targets ask for" in text
    assert "left out, as they are made for the first table: placed_low" in text
    assert table["checked"] in text
    assert "apart: prefill:tp1,decode:tp1; size of apart" in text


def test_what_a_prompt_costs_beside_decodes_is_read_off_the_steps(table):
    lines = lines_of(table)
    share = "48 tokens beside 16 decodes, over their time alone"
    assert cells(lines, share) == ["90%", "10%"]  # (11 - 2) / 10 and (3 - 2) / 10
    free = "most tokens that make 16 decodes at most 10 % longer"
    assert cells(lines, free) == "fewer than 16 48 or more".split()
    overhead = "host work and launches of 16 decodes"
    assert cells(lines, overhead) == "not told apart 0.50 (25%)".split()
    assert lines[-1] == (
        "so what a prompt costs beside decodes, of its time alone, is 90% with tiny on "
        "cpu and 10% with big on gpu"
    )


def test_what_bounds_a_prompt_is_read_off_how_its_time_grows(table):
    line = lines_of(table)[-2]
    # 3 x the tokens: sqrt(3) = 1.7 is halfway between compute and anything else.
    assert line == (
        "3.0 x the tokens of a prompt take 2.5 x the time with tiny on cpu (bound by "
        "compute) and 1.7 x the time with big on gpu (bound by weights, launches or "
        "host work)"
    )


def test_without_prices_nothing_is_said_of_why(table):
    assert not any("why" in line for line in lines_of(table, prices=None))


def test_a_sweep_without_the_table_has_no_lines():
    assert hardware_lines({"targets": {}}) == []
