"""A profile of compiled programs: which they are, and what it makes of their estimates.

Host devices stand in for a target. Records are made up where nothing need be compiled.
"""

import dataclasses
import itertools
import json

import pytest

from disagg_jax.calibration.profile_keys import device_name, read_profile
from disagg_jax.deployment import Deployment, Parallelism, Role
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.sim import Simulation
from disagg_jax.sim.cost import step_time_terms
from disagg_jax.sim.cost.measured_profile import profile_from_json, profile_to_json
from disagg_jax.work import StepLoad
from experiments import calibrate
from experiments.compile_check import CheckOptions, run_profile
from experiments.compiled import targets
from experiments.compiled.profile import ProfilePlan
from experiments.compiled.records import ProgramRecord
from experiments.compiled.targets import CompileTarget
from models.config import get_config
from tests.commands import run_command
from tests.deadlines import After
from tests.experiments.host_target import HERE

ONE, TWO = Parallelism(), Parallelism(2)
DEEP = dataclasses.replace(get_config("tiny"), layers=4)
OPTIONS = CheckOptions(
    config=DEEP,
    deployment=Deployment.parse("prefill:tp2,decode:tp1,2xcolocated:tp1"),
    layers=2,
    batch=16,
    step_tokens=128,
    max_context=512,
    blocks=512,
    block_tokens=16,
)
# Small enough that all its programs compile in seconds.
SMALL = dataclasses.replace(
    OPTIONS,
    config=dataclasses.replace(DEEP, layers=1),
    deployment=Deployment.parse("prefill:tp1,decode:tp1"),
    layers=1,
    batch=2,
    max_context=96,
    blocks=64,
)


def plan(every=False, **changes):
    deployed = dataclasses.replace(OPTIONS, **changes).deployed(HERE)
    return ProfilePlan.of(*deployed, every=every)


def test_of_each_kind_the_ends_and_some_between_are_compiled():
    chosen, every = plan().steps, plan(every=True).steps
    # Sizes of T, and of others for each.
    sizes = {"prefill": (5, 1), "mixed": (2, 3), "decode": (3, 2)}
    kinds = {
        layout: {shape.kind for shape in shapes} for layout, shapes in every.items()
    }
    assert kinds == {ONE: {"mixed", "decode"}, TWO: {"prefill"}}
    for layout, kind in ((ONE, "mixed"), (ONE, "decode"), (TWO, "prefill")):
        some, listed = (
            sorted(shape for shape in of[layout] if shape.kind == kind)
            for of in (chosen, every)
        )
        assert set(some) < set(listed)
        assert some[-1] == listed[-1] and some[0].tokens == listed[0].tokens
        tokens = sorted({shape.tokens for shape in some})
        assert len(tokens) == sizes[kind][0]
        for T in tokens:
            here, there = (
                [shape for shape in of if shape.tokens == T] for of in (some, listed)
            )
            assert len(here) == sizes[kind][1] and here[-1] == there[-1]
            assert kind == "prefill" or here[0] == there[0]
    # The largest comes first: it may not fit.
    assert [str(shape) for shape in chosen[ONE]][0] == str(max(every[ONE]))
    moves = [n for sizes in plan().moves.values() for n in sizes]
    assert (moves[0], moves[-1], len(moves)) == (32, 1, 3)


def test_all_are_compiled_if_all_are_asked_for():
    """Those that instances of one layout share, once."""
    compiled, buckets = OPTIONS.deployed(HERE)
    served = compiled.programs(buckets, every=True)
    asked = ProfilePlan.of(compiled, buckets, every=True).programs
    assert {program.name for program in asked} == {program.name for program in served}
    assert len(asked) < len(served)


# -- by records that are made up -------------------------------------------------------

TERMS = {
    "prefill": (1e-3, 1e-5, 1e-8, 2e-5, 0.0, 0.0, 3e-6, 0.0),
    "decode": (2e-3, 1e-5, 2e-6, 1e-7),
    "mixed": (1e-3, 2e-5, 1e-8, 3e-6, 0.0, 5e-6, *(0.0,) * 5),
}


def made_up(program):
    """A record with a time by `TERMS`, or of 3 ms and 1 ms a block, for each layer."""
    if isinstance(program.size, int):
        estimate_s = len(program.layers) * (3e-3 + 1e-3 * program.size)
    else:
        time_s = step_time_terms.time_s(program.size, TERMS[program.kind])
        estimate_s = len(program.layers) * time_s
    return ProgramRecord(
        target="cpu:8",
        instance="",
        program=program.name,
        kind=program.kind,
        layers=1,
        model_layers=1,
        compile_s=1.0,
        fits=True,
        bound_bytes=1.0,
        bound_flops=1.0,
        roofline_s=1.0,
        estimate_s=estimate_s,
    )


ABOUT = {"model": "tiny", "dtype": "float32", "device": "x", "date": "x", "commit": "x"}


def profile_of(asked):
    return asked.profile(list(map(made_up, asked.programs)), provenance=ABOUT)


def test_each_program_takes_its_estimate_and_others_the_fit():
    found = profile_of(plan())
    for layout, kinds in ((TWO, {"prefill"}), (ONE, {"decode", "mixed"})):
        times = found.layouts[layout]
        assert {shape.kind for shape in times.measured} == times.fits.keys() == kinds
        assert kinds <= found.held_out.keys()
        for shape, (time_s,) in times.measured.items():
            expected_s = 2 * step_time_terms.time_s(shape, TERMS[shape.kind])
            assert time_s == expected_s
            assert times.fitted_s(shape) == pytest.approx([expected_s], rel=1e-3)


def test_the_fit_of_all_programs_has_no_error_where_times_are_of_its_form():
    """Where few are compiled, one that is left out shows: there are more terms."""
    every = profile_of(plan(every=True)).held_out
    assert max(every.values()) < 0.02
    some = profile_of(plan()).held_out
    assert some["decode"] < 1e-3 < min(some["prefill"], some["mixed"])


def test_stages_have_times_of_their_own():
    deployment = Deployment.parse("prefill:tp1pp2,decode:tp1")
    found = profile_of(plan(deployment=deployment, layers=3))
    for shape, stages_s in found.layouts[Parallelism(1, 2)].measured.items():
        time_s = step_time_terms.time_s(shape, TERMS["prefill"])
        assert stages_s == (2 * time_s, time_s)


@pytest.mark.parametrize(
    ("deployment", "wires"),
    [("prefill:tp2,decode:tp1", 1), ("prefill:tp2,decode:tp2", 2)],
)
def test_a_transfer_is_a_gather_the_links_and_an_insert(deployment, wires):
    """Two of four layers are compiled; all four go over the links."""
    found = profile_of(plan(deployment=Deployment.parse(deployment)))
    ((ends, times),) = found.transfers.items()
    assert ends == (TWO, Parallelism(wires))
    token_bytes = 2 * 4 * 4 * 16 * 4  # keys and values, layers, heads, of float32
    for blocks, time_s in times.measured.items():
        link_s = 16 * blocks * token_bytes / (wires * 5e9)
        programs_s = 2 * 2 * (3e-3 + 1e-3 * blocks)
        assert time_s == pytest.approx(programs_s + link_s, rel=1e-9)
        assert times.base_s + blocks * times.block_s == pytest.approx(time_s)


def test_each_pair_of_layouts_has_transfers():
    deployment = Deployment.parse("prefill:tp1,prefill:tp2,decode:tp1,decode:tp2")
    found = profile_of(plan(deployment=deployment))
    assert set(found.transfers) == set(itertools.product((ONE, TWO), repeat=2))
    kinds = {layout: set(times.fits) for layout, times in found.layouts.items()}
    assert kinds == dict.fromkeys((ONE, TWO), {"prefill", "decode"})


def test_a_fit_of_too_few_programs_is_refused_before_any_is_compiled():
    message = "at least 4 decode programs of tp1 for a fit .*got .'decode_B1_P64', 'dec"
    with pytest.raises(ValueError, match=message):
        plan(batch=1, blocks=64)


# -- by programs that are compiled -----------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A profile in a file, and the records that it was made of."""
    out = tmp_path_factory.mktemp("compiled")
    found = run_profile(SMALL, HERE, out)
    (out / "profile.json").write_text(json.dumps(profile_to_json(found)))
    records = json.loads((out / "compiled.json").read_text())["records"]
    return out / "profile.json", {record["program"]: record for record in records}


def test_the_file_has_the_estimates_of_the_records(compiled):
    path, records = compiled
    found = profile_from_json(json.loads(path.read_text()))
    assert found.compiled and found.name == "tiny-cpu-compiled"
    assert found.provenance["layers"] == "1 of 1 compiled"
    assert found.provenance["method"].startswith("compiled, not measured")
    assert found.kv_blocks == {ONE: 64} and found.block_tokens == 16
    for shape, (time_s,) in found.layouts[ONE].measured.items():
        assert time_s == records[str(shape)]["estimate_s"]
    moved = found.transfers[ONE, ONE].measured
    assert set(moved) == {1, 3, 6}
    for blocks, time_s in moved.items():
        ends_s = sum(
            records[f"{e}_{blocks}"]["estimate_s"] for e in ("gather", "insert")
        )
        link_s = blocks * 16 * 2 * 4 * 16 * 4 / 5e9
        assert time_s == pytest.approx(ends_s + link_s, rel=1e-9)
    assert set(found.held_out) == {"prefill", "decode"}


def test_a_simulation_takes_the_estimates(compiled):
    path, records = compiled
    policies = {
        Role.PREFILL: PrefillOnly(token_budget=128, max_seqs=2),
        Role.DECODE: DecodeOnly(max_seqs=2),
    }
    simulation = Simulation.of(
        *("tiny", "cpu"), cost=str(path), policies=policies, max_context=96
    )
    cost = simulation.build("prefill:tp1,decode:tp1").cost
    for instance, load, name in (
        (0, (((0, 30),), 0, 0), "prefill_T32_R2"),
        (0, (((0, 60), (0, 60)), 0, 0), "prefill_T128_R2"),
        (1, ((), 2, 30), "decode_B2_P16"),
        (1, ((), 1, 300), "decode_B1_P64"),
    ):
        (time_s,) = cost.stages_s(instance, StepLoad(*load))
        assert time_s == records[name]["estimate_s"]


def test_the_outputs_of_commands_say_that_it_was_compiled(compiled, tmp_path):
    path, _ = compiled
    asked = {
        "simulate": (
            *("--workload=fixed:32,fixed:4", "--rate=9", "--num_requests=20"),
            *("--max_context=96", "--deployment=prefill:tp1,decode:tp1"),
        ),
        "compare_systems": (
            *("--systems=disaggregated,vllm_v0", "--devices=2", "--max_tokens=96"),
            *("--map=targets", "--ttfts=1", "--tpots=1", "--workload=fixed:32x4"),
            *("--num_requests=5", "--max_requests=5", "--seeds=1", "--workers=1"),
        ),
    }
    for command, flags in asked.items():
        out = tmp_path / command
        about = (f"--cost={path}", "--model=tiny", "--hardware=cpu", f"--out={out}")
        done = run_command(command, *about, *flags)
        assert done.returncode == 0, done.stderr
        assert "tiny-cpu-compiled" in done.stdout
        assert "compiled, not measured" in done.stdout
        results = {"simulate": "summary.json", "compare_systems": "maps.json"}
        assert "compiled, not measured" in (out / results[command]).read_text()
        config = json.loads((out / "config.json").read_text())
        assert config["profile"] == json.loads(path.read_text())
    shown = calibrate.show(str(path))
    assert shown.startswith("tiny-cpu-compiled: compiled, not measured")


def test_an_engine_takes_it_where_it_is_on_that_device(compiled, tmp_path):
    """`accuracy` may hold it against the engine then; elsewhere it says why not."""
    path, _ = compiled
    model = dataclasses.replace(SMALL.config, dtype="bfloat16")
    with pytest.raises(ValueError, match="--profile: expected one of dtype bfloat16"):
        read_profile(str(path), model)
    record = json.loads(path.read_text())
    assert record["provenance"]["device"] == device_name()
    assert read_profile(str(path), SMALL.config).compiled
    record["provenance"]["device"] = "TPU v6 lite"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="one of device cpu, got .* TPU v6 lite"):
        read_profile(str(other), SMALL.config)


# -- what cannot be --------------------------------------------------------------------


def test_a_target_whose_programs_do_not_fit_is_an_error(tmp_path):
    """The pool takes 80 % of what weights leave; a step of 128 tokens needs more."""
    small = dataclasses.replace(HERE, memory_bytes=2**20)
    message = (
        "programs that fit on cpu:8, but prefill_T128_R2 of prefill:tp1 does not: "
    )
    with pytest.raises(ValueError, match=f"{message}needs .*; fewer --blocks leave"):
        run_profile(SMALL, small, tmp_path)
    (record,) = json.loads((tmp_path / "compiled.json").read_text())["records"]
    assert not record["fits"]


def test_a_profile_needs_time_for_all_its_programs(tmp_path):
    with pytest.raises(
        ValueError, match="time for 15 programs, got 0 before --minutes"
    ):
        run_profile(SMALL, HERE, tmp_path, deadline=After(0))


def test_a_profile_is_of_one_target(tmp_path):
    flags = ("--target=v6e:2x2,v5e:2x2", f"--profile={tmp_path / 'profile.json'}")
    done = run_command("compile_check", *flags, f"--out={tmp_path}")
    assert done.returncode == 1
    assert "one --target" in done.stderr and "v6e:2x2,v5e:2x2" in done.stderr


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_a_profile_of_a_tpu_that_is_not_there(tmp_path):
    if targets.missing_wheel("v6e:2x2") is not None:
        pytest.skip("needs the extra tpu")
    target, path = CompileTarget.parse("v6e:2x2"), tmp_path / "profile.json"
    found = run_profile(SMALL, target, tmp_path)
    path.write_text(json.dumps(profile_to_json(found)))
    assert found.name == "tiny-tpu-v6e-compiled"
    assert found.provenance["device"] == "TPU v6 lite"
    simulation = Simulation.of("tiny", "tpu-v6e", cost=str(path), max_context=96)
    for shape, (time_s,) in found.layouts[ONE].measured.items():
        assert 0 < time_s < 1e-3, shape
    assert simulation.build("prefill:tp1,decode:tp1")
