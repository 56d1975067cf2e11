"""A deployment's programs have a record each; host devices stand in for a target."""

import contextlib
import dataclasses
import io
import json
import math

import jax
import pytest

from disagg_jax.deployment import Deployment
from experiments.compile_check import CheckOptions, run
from experiments.compiled import report, targets
from experiments.compiled.records import CompiledDeployment
from models.config import get_config
from tests.commands import run_command
from tests.deadlines import After
from tests.experiments.host_target import HERE

TINY = dataclasses.replace(get_config("tiny"), layers=1)
DEEP = dataclasses.replace(TINY, layers=4)
OPTIONS = CheckOptions(
    config=TINY,
    deployment=Deployment.parse("prefill:tp2,decode:tp1"),
    batch=4,
    step_tokens=64,
    max_context=128,
    blocks=32,
    block_tokens=16,
)


SHALLOW = {"batch": 1, "step_tokens": 16, "max_context": 16}  # one size of each kind


def records(tmp_path, target=HERE, **changes):
    return run(dataclasses.replace(OPTIONS, **changes), [target], tmp_path)


def names(found):
    return [(record.instance, record.program) for record in found]


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The records, what was printed, and the folder."""
    folder, printed = tmp_path_factory.mktemp("checked"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        return records(folder), printed.getvalue(), folder


def test_the_smallest_and_the_largest_of_each_kind_are_compiled(checked):
    found, printed, folder = checked
    assert names(found) == [
        ("prefill:tp2", "prefill_T32_R4"),
        ("prefill:tp2", "prefill_T128_R4"),
        ("decode:tp1", "decode_B1_P16"),
        ("decode:tp1", "decode_B4_P32"),
        ("prefill:tp2", "gather_1"),
        ("prefill:tp2", "gather_8"),
        ("decode:tp1", "insert_1"),
        ("decode:tp1", "insert_8"),
    ]
    # One printed row and one record in the file for each.
    assert all(printed.count(f" {record.program} ") == 1 for record in found)
    saved = json.loads((folder / "compiled.json").read_text())["records"]
    assert [(r["instance"], r["program"]) for r in saved] == names(found)
    asked = "target, instance, program, layers, compile_s, temp_bytes, pool_copies, "
    asked += "bytes_over_bound, flops_over_bound, fits"
    assert all(set(asked.split(", ")) <= record.keys() for record in saved)


def test_all_programs_are_those_that_would_be_served_with():
    pools = OPTIONS.pools(HERE)
    made = CompiledDeployment(HERE, TINY, OPTIONS.deployment, pools, layers=1)
    buckets = OPTIONS.buckets(pools)
    every = [program.name for program in made.programs(buckets, every=True)]
    ends = [program.name for program in made.programs(buckets, every=False)]
    assert set(ends) < set(every) and len(every) == len(set(every))
    assert [name for name in every if "gather" in name] == [
        f"gather_{blocks}" for blocks in buckets[0].transfer_blocks
    ]


def test_chunks_beside_decodes_are_compiled_where_a_system_mixes_them(tmp_path):
    deployment = Deployment.parse("2xcolocated:tp1")
    found = records(tmp_path, deployment=deployment, step_tokens=32)
    assert {record.kind for record in found} == {"mixed", "decode"}
    # Equal instances have equal programs, and each is compiled once.
    assert len(found) == 4 and {r.instance for r in found} == {"colocated:tp1"}
    whole = records(tmp_path, deployment=deployment, systems=("vllm_v0",))
    assert {record.kind for record in whole} == {"prefill", "decode"}
    with pytest.raises(ValueError, match="system: expected one for"):
        records(tmp_path, systems=("vllm_v0",))


def test_figures_are_those_of_the_model_on_one_device(checked):
    found = {record.program: record for record in checked[0]}
    decode, prefill = found["decode_B4_P32"], found["prefill_T128_R4"]
    # Matmuls of 4 rows: at least those of the bound, and no more than attention over
    # the whole pool by every row adds.
    assert decode.flops_over_bound == pytest.approx(1, abs=0.5)
    assert decode.flops_over_bound >= 1
    # Half of the weights are on each of two devices.
    assert prefill.bound_flops < 128 * 2 * weights(TINY) / 2 < prefill.flops * 1.5
    assert decode.argument_bytes > 4 * weights(TINY)
    assert decode.fits and not decode.error
    assert decode.xla_flops == pytest.approx(decode.flops, rel=0.5)
    assert decode.compiled_flops == decode.flops
    assert decode.compiled_bytes == decode.hbm_bytes
    assert decode.roofline_s == max(
        decode.bound_bytes / HERE.hardware.hbm_bytes_s,
        decode.bound_flops / HERE.hardware.peak_flops,
    )
    assert decode.estimate_s >= decode.roofline_s
    insert = found["insert_8"]
    assert insert.bound_bytes == 2 * 8 * 16 * 1 * 2 * 4 * 16 * 4
    assert insert.bytes_over_bound >= 1 and insert.flops_over_bound is None


def weights(config) -> int:
    """Those of matmuls; `tiny` has a table of its own for logits."""
    kv = 2 * config.kv_heads * config.head_dim
    q = 2 * config.q_heads * config.head_dim
    layer = config.embed * (kv + q + 3 * config.mlp)
    return config.layers * layer + config.embed * config.vocab_size


def test_further_layers_follow_by_repetition(tmp_path, capsys):
    """As if all had been compiled, but for what XLA fuses otherwise."""
    deep = {"config": DEEP, **SHALLOW}
    every = {record.program: record for record in records(tmp_path, **deep)}
    assert "By repetition" not in capsys.readouterr().out
    some = records(tmp_path, **deep, layers=2)
    few = {record.program: record for record in some}
    assert "By repetition" in capsys.readouterr().out
    for name, whole in every.items():
        some = few[name]
        assert (some.layers, some.model_layers) == (2, 4)
        assert (whole.layers, whole.model_layers) == (4, 4)
        assert some.bound_bytes == whole.bound_bytes
        assert some.compiled_bytes < 0.8 * some.hbm_bytes
        assert some.flops == pytest.approx(whole.flops, rel=0.01)
        assert some.hbm_bytes == pytest.approx(whole.hbm_bytes, rel=0.1)
        assert some.argument_bytes == pytest.approx(whole.argument_bytes, rel=0.05)
        assert some.needed_bytes == pytest.approx(whole.needed_bytes, rel=0.05)


def test_pipeline_stages_have_programs_and_bounds_of_their_own(tmp_path):
    deployment = Deployment.parse("prefill:tp1pp2,decode:tp1")
    found = records(tmp_path, config=DEEP, deployment=deployment, layers=2, **SHALLOW)
    stages = [r for r in found if r.kind == "prefill"]
    assert [(r.layers, r.model_layers) for r in stages] == [(1, 2), (1, 2)]
    first, last = stages
    assert last.bound_bytes - first.bound_bytes == 4 * DEEP.embed * DEEP.vocab_size
    with pytest.raises(ValueError, match="layers: expected 2 to 4 of tiny, got 1"):
        records(tmp_path, config=DEEP, deployment=deployment, layers=1)


def test_a_device_that_is_too_small_says_what_it_lacks(tmp_path, capsys):
    """Weights of 2.5 MB do not fit on it; half of them do."""
    small = dataclasses.replace(HERE, memory_bytes=2**21)
    for blocks in (8, None):
        asked = SHALLOW | {"config": DEEP, "blocks": blocks, "layers": 1}
        found = records(tmp_path, target=small, **asked)
        fit = {record.instance for record in found if record.fits}
        assert fit == {"prefill:tp2"}
        assert "decode:tp1 insert_1: needs 0.00 GiB, the" in capsys.readouterr().out


def test_a_program_that_the_compiler_has_no_memory_for_is_a_record(tmp_path):
    pools = OPTIONS.pools(HERE)
    made = CompiledDeployment(HERE, TINY, OPTIONS.deployment, pools, layers=1)
    program, *_ = made.programs(OPTIONS.buckets(pools), every=False)
    said = "Ran out of memory on HBM, 18.31G exceeds available HBM (15.75G)."

    def fails(error):
        def build():
            raise jax.errors.JaxRuntimeError(error)

        return dataclasses.replace(program, build=build)

    record = made.record(fails(f"RESOURCE_EXHAUSTED: {said}\n\nAllocations: ..."))
    assert not record.fits and record.error == f"RESOURCE_EXHAUSTED: {said}"
    assert record.temp_bytes is None and record.roofline_s > 0
    assert report.row(record)[report.HEAD.index("fits")] == "NO"
    assert said in "\n".join(report.notes([record]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        made.record(fails("INTERNAL: another fault"))


def test_too_few_devices_are_an_error_with_the_number_needed(tmp_path):
    few = dataclasses.replace(HERE, devices=HERE.devices[:2])
    with pytest.raises(ValueError, match="cpu:8: expected at least 3 devices.*got 2"):
        records(tmp_path, target=few)
    # Also where equal instances could share devices.
    with pytest.raises(ValueError, match="expected at least 3 devices.*got 2"):
        records(tmp_path, target=few, deployment=Deployment.parse("3xcolocated:tp1"))


def test_the_pool_is_what_the_device_holds(tmp_path):
    held = dataclasses.replace(OPTIONS, blocks=None)
    small = dataclasses.replace(HERE, memory_bytes=2**21)
    prefill, decode = held.pools(small)
    # Two devices have half of the weights each, and half of the heads of a block.
    assert 100 < 2 * decode.num_blocks < prefill.num_blocks
    wide, _ = dataclasses.replace(held, block_tokens=64).pools(small)
    assert wide.num_blocks + 1 == (prefill.num_blocks + 1) // 4  # and a scratch block
    found = records(tmp_path, target=small, blocks=None, **SHALLOW)
    steps = [record for record in found if record.kind in ("prefill", "decode")]
    # Temporary arrays of a step take of what the pool leaves.
    assert all(0.5 < record.argument_bytes / 2**21 < 1 for record in steps)


def test_what_cannot_be_counted_is_named():
    record = dataclasses.replace(
        _record(), unknown_loops=("while.3",), unstated_kernels=("attend",)
    )
    said = "\n".join(report.notes([record]))
    assert "counted once: while.3" in said
    assert "kernels counted by their arrays alone: attend" in said


def _record():
    pools = OPTIONS.pools(HERE)
    made = CompiledDeployment(HERE, TINY, OPTIONS.deployment, pools, layers=1)
    return made.record(made.programs(OPTIONS.buckets(pools), every=False)[-2])


def test_programs_after_the_deadline_are_named(tmp_path, capsys):
    found = run(OPTIONS, [HERE], tmp_path, deadline=After(3))
    assert len(found) == 3
    said = capsys.readouterr().out
    assert "left out, as --minutes were spent: cpu:8 decode_B4_P32, cpu:8 gath" in said
    saved = json.loads((tmp_path / "compiled.json").read_text())["records"]
    assert len(saved) == 3


def test_a_missing_wheel_ends_the_command_with_one_line(tmp_path):
    if targets.missing_wheel("v6e:2x2") is None:
        pytest.skip("the wheel is there")
    args = ("--target=v6e:2x2", f"--out={tmp_path}")
    done = run_command("compile_check", *args)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("pip install -e '.[tpu]'")


def slow(target: str):
    return pytest.param(target, marks=pytest.mark.slow)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("target", ["v6e:2x2", slow("v5e:2x2"), slow("v5p:2x2x1")])
def test_the_command_compiles_for_tpus_that_are_not_there(tmp_path, target):
    check(tmp_path, target, "tpu")


@pytest.mark.gpu_aot
@pytest.mark.parametrize(
    "target", ["h100:2", slow("h200:2"), slow("a100-80g:2"), slow("b200:2")]
)
def test_the_command_compiles_for_gpus_that_are_not_there(tmp_path, target):
    check(tmp_path, target, "compile-cuda")


def check(tmp_path, target, extra):
    if targets.missing_wheel(target) is not None:
        pytest.skip(f"needs the extra {extra}")
    args = ("--model=tiny", "--max_context=64", "--batch=4", "--blocks=32")
    done = run_command(
        "compile_check", f"--target={target}", f"--out={tmp_path}", *args
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "compiled.json").read_text())["records"]
    assert {r["kind"] for r in saved} == {"prefill", "decode", "gather", "insert"}
    for record in saved:
        assert record["fits"] and math.isfinite(record["bytes_over_bound"])
        assert not record["unknown_loops"] and not record["unstated_kernels"]
