"""A simulation by a profile: an engine's own programs, padding, pool and transfers."""

import dataclasses
import json
import math

import pytest

from disagg_jax.deployment import InstanceSpec, Parallelism, Role
from disagg_jax.metrics import tpot_s, ttft_s
from disagg_jax.programs import StepShape
from disagg_jax.request import Request
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.sim import Simulation
from disagg_jax.sim.cost.measured import (
    CalibratedProfile,
    LayoutTimes,
    TransferTimes,
)
from disagg_jax.sim.cost.measured_profile import profile_to_json
from disagg_jax.work import StepLoad
from models.config import get_config

ONE, TWO = Parallelism(), Parallelism(2)
TINY = get_config("tiny")
# A prefill takes 1 ms a token, but one of 32 tokens 20 ms; a decode 10 ms, a row 1 ms
# and a block 0.1 ms; on two devices there are prefills alone, at half of it.
PREFILL = (0.0, 1e-3, *(0.0,) * 6)
PROFILE = CalibratedProfile(
    name="toy",
    block_tokens=8,
    block_bytes=8 * TINY.kv_bytes_per_token,
    layouts={
        ONE: LayoutTimes(
            1,
            {StepShape.prefill(32, 4): (0.02,)},
            {"prefill": (PREFILL,), "decode": ((1e-2, 1e-3, 1e-4, 0.0),)},
        ),
        TWO: LayoutTimes(
            1,
            {StepShape.prefill(32, 4): (0.01,)},
            {"prefill": (tuple(x / 2 for x in PREFILL),)},
        ),
    },
    transfers={(ONE, ONE): TransferTimes({1: 0.2}, 0.5, 0.01)},
    provenance={
        **{"model": "tiny", "dtype": "float32", "hardware": "tpu-v6e"},
        **{"device": "TPU v6 lite", "date": "today", "commit": "none"},
    },
    held_out={},
    kv_blocks={ONE: 64, TWO: 128},
    compiled=True,
)
PAIR = "prefill:tp1,decode:tp1"


@pytest.fixture
def simulated(tmp_path):
    def make(profile=PROFILE, model="tiny", hardware="tpu-v6e", **fields):
        path = tmp_path / "toy.json"
        path.write_text(json.dumps(profile_to_json(profile)))
        given = {"cost": str(path), "max_context": 256, **fields}
        return Simulation.of(model, hardware, **given)

    return make


def test_a_request_takes_the_programs_that_hold_it_and_the_profiles_transfer(simulated):
    """The prompt of 100 tokens is padded to 128, its transfer of 13 blocks to 16.

    The first decode has 101 tokens, in 13 or 14 blocks; 16 and 64 are listed.
    """
    request = Request(id=0, arrival_s=0.0, prompt_tokens=100, max_tokens=3)
    (done,) = simulated().build(PAIR).run([request]).timelines
    assert ttft_s(done) == pytest.approx(0.128)
    steps_s = 2 * (1e-2 + 1e-3 + 16 * 1e-4)
    assert tpot_s(done) == pytest.approx((0.5 + 16 * 0.01 + steps_s) / 2)
    assert done.transfer_bytes == 16 * PROFILE.block_bytes
    short = dataclasses.replace(request, prompt_tokens=8)
    (done,) = simulated().build(PAIR).run([short]).timelines
    assert ttft_s(done) == pytest.approx(0.02)
    assert tpot_s(done) == pytest.approx((0.2 + steps_s) / 2)


def test_programs_follow_from_the_policies(simulated):
    """With steps of 48 tokens and 2 rows at most there are other programs."""
    policies = {
        Role.PREFILL: PrefillOnly(token_budget=48, max_seqs=1),
        Role.DECODE: DecodeOnly(max_seqs=3),
    }
    simulation = simulated(policies=policies, max_context=48)
    cost = simulation.build(PAIR).cost
    assert cost.stages_s(0, StepLoad(((0, 40),), 0, 0)) == (pytest.approx(0.048),)
    assert cost.stages_s(1, StepLoad((), 3, 9)) == (pytest.approx(0.0146),)
    other = simulated().build(PAIR).cost
    assert other.stages_s(0, StepLoad(((0, 49),), 0, 0)) == (pytest.approx(0.064),)
    assert other.stages_s(1, StepLoad((), 3, 9)) == (pytest.approx(0.0156),)


def test_the_pool_is_the_one_that_the_programs_are_for(simulated):
    simulation = simulated()
    for layout, blocks in ((ONE, 64), (TWO, 128)):
        memory = simulation.memory_of(
            InstanceSpec(role=Role.DECODE, parallelism=layout)
        )
        assert (memory.num_blocks, memory.block_tokens) == (blocks, 8)
    unknown = simulated(dataclasses.replace(PROFILE, kv_blocks={}))
    with pytest.raises(ValueError, match="toy: expected a layout with kv_blocks"):
        unknown.build(PAIR)


def test_outputs_say_that_it_was_compiled(simulated):
    simulation = simulated()
    assert simulation.cost.name == "profile/toy"
    assert simulation.checked.startswith("compiled, not measured: without links")
    assert simulation.wires == "the links of its profile"
    measured = simulated(dataclasses.replace(PROFILE, compiled=False))
    assert measured.checked == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "m32"}, "toy.json is of model tiny: expected it, got 'm32'"),
        ({"hardware": "tpu-v5e"}, "of hardware tpu-v6e: expected it, got 'tpu-v5e'"),
        ({"inside": "100gb"}, "link: .* none, as profile/toy has transfers, .*100gb"),
        ({"between": "100gb"}, "link: expected none, as profile/toy has transfers"),
        ({"streamed_groups": 1}, "streamed_groups: expected 0, as profile/toy has"),
        ({"engine": "vllm"}, "engine: expected the cost model roofline"),
        ({"cost": "none.json"}, "none.json"),
    ],
)
def test_what_a_profile_is_not_for_is_refused(simulated, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        simulated(**fields)


def test_a_file_that_is_no_profile_is_refused(simulated, tmp_path):
    (tmp_path / "other.json").write_text('{"kind": "fitted"}')
    with pytest.raises(
        ValueError, match="cost: expected a profile .*other.json': prof"
    ):
        simulated(cost=str(tmp_path / "other.json"))


def test_all_instances_have_the_profile(simulated):
    simulation = simulated()
    other = Simulation.of("tiny", "a100-80g").cost
    for which in ("colocated_cost", "prefill_cost"):
        with pytest.raises(ValueError, match="cost: expected profile/toy for all inst"):
            dataclasses.replace(simulation, **{which: other})


@pytest.mark.parametrize(
    ("deployment", "fields", "message"),
    [
        ("prefill:tp4,decode:tp1", {}, "expected a layout with kv_blocks"),
        ("prefill:tp1,decode:tp2", {}, r"tp2: expected steps of \['prefill'\], got"),
        ("prefill:tp2,decode:tp1", {}, r"transfers between .*, got \(tp2, tp1\)"),
        ("colocated:tp1", {"system": "vllm_v1"}, r"tp1: .*, got \['decode', 'mixed'\]"),
        (PAIR, {"block_tokens": 16}, "toy: expected blocks of 8 tokens, got 16"),
    ],
)
def test_what_was_not_compiled_is_refused_before_a_run(
    simulated, deployment, fields, message
):
    with pytest.raises(ValueError, match=message):
        simulated(**fields).build(deployment)


def test_step_sizes_are_chosen_by_programs_without_padding(simulated):
    cost = simulated().cost.instance(ONE)
    assert math.isclose(sum(cost.stages_s(StepLoad(((0, 49),), 0, 0))), 0.049)
