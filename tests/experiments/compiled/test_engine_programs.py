"""The engine's programs on devices that are not there: what they move, what they hold.

Each is of a model in bf16, one layer of which is compiled.

A limit is the bytes, or FLOPs, over what the program cannot do without. The whole
model's follow from the layer by repetition.
"""

import dataclasses
import math

import jax
import pytest

from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.engine.attention.registry import AUTO
from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.programs import Buckets, StepShape
from experiments.compiled.records import CompiledDeployment, ProgramRecord
from experiments.compiled.targets import CompileTarget
from models.config import get_config

# k of a layer on a device. Less than 128 MiB XLA moves into a TPU's VMEM, where what is
# done to the pool is not seen.
PART_BYTES = 160 * 2**20
LLAMA, SMOLLM2 = "llama-3-8b", "smollm2-135m"
XLA = XlaAttention.name
NO_SHAPES = Buckets(prefill=(), decode_rows=(), pool_blocks=(), transfer_blocks=())
DECODE, WIDE = StepShape.decode(64, 512), StepShape.decode(256, 2048)  # of 128 tokens
GPU_DECODE = StepShape.decode(64, 1024)  # of 64 tokens
PREFILL = StepShape.prefill(2048, 4)
MIXED = StepShape.mixed(512, 68, 32, 64, 512)


def case(target: str, *rest, slow: bool = False):
    """A case of a test; without the name of an attention kernel it is the auto one."""
    if rest and isinstance(rest[-1], float):
        rest = *rest, AUTO
    marks = [pytest.mark.gpu_aot if target[0] in "hab" else pytest.mark.tpu_aot]
    return pytest.param(
        target, *rest, marks=[*marks, pytest.mark.slow] if slow else marks
    )


def one_layer(
    target: CompileTarget,
    model: str,
    deployment: str,
    part_bytes: int = PART_BYTES,
    attention: str = AUTO,
) -> CompiledDeployment:
    """Return a layer of a model, with k (and v) of `part_bytes` on a device."""
    config = dataclasses.replace(get_config(model), dtype="bfloat16")
    parsed = Deployment.parse(deployment)
    block_tokens = XlaAttention(target.devices[0].platform).block_tokens

    def pool(tp: int) -> KVMemory:
        block_bytes = 2 * config.kv_heads * block_tokens * config.head_dim // tp
        return KVMemory(
            num_blocks=part_bytes // block_bytes,
            block_tokens=block_tokens,
            max_context=2048,
        )

    pools = [pool(spec.parallelism.tp) for spec in parsed.instances]
    return CompiledDeployment(
        target, config, parsed, pools, layers=1, attention=attention
    )


def records(compiled: CompiledDeployment, **shapes) -> list[ProgramRecord]:
    """Compile the programs of listed shapes, each with its record."""
    buckets = dataclasses.replace(NO_SHAPES, **shapes)
    instances = compiled.deployment.instances
    programs = compiled.programs([buckets] * len(instances), every=True)
    return [compiled.record(program) for program in programs]


def step_record(compiled: CompiledDeployment, shape: StepShape) -> ProgramRecord:
    match shape.kind:
        case "prefill":
            shapes = {"prefill": (shape,)}
        case "decode":
            shapes = {"decode_rows": (shape.rows,), "pool_blocks": (shape.blocks,)}
        case _:
            shapes = {"mixed": (shape,)}
    (record,) = records(compiled, **shapes)
    return record


def smallest_part_bytes(compiled: CompiledDeployment) -> int:
    """Return the bytes of k of a layer on a device, of the instance with fewest."""
    parts = [model.stages[0].cache_spec(1)[0][0] for model in compiled.compiled.models]
    return min(
        math.prod(k.sharding.shard_shape(k.shape)) * k.dtype.itemsize for k in parts
    )


def check_moves(
    compiled: CompiledDeployment, record: ProgramRecord, bytes_limit: float
) -> None:
    assert record.fits, record.error
    assert record.pool_copies == 0, record.largest
    assert 0.9 < record.bytes_over_bound < bytes_limit, record.largest
    assert not record.unknown_loops and not record.unstated_kernels


@pytest.mark.parametrize(
    "target, model, deployment, shape, bytes_limit, flops_limit, attention",
    [
        case("v6e:2x2", LLAMA, "colocated:tp1", DECODE, 1.1, 1.1),
        case("v6e:2x2", LLAMA, "colocated:tp1", DECODE, 1.1, 1.1, XLA),
        # head_dim 64 is padded to 128, so that twice the KV is read.
        case("v6e:2x2", SMOLLM2, "colocated:tp1", DECODE, 2.2, 2.2),
        case("h100:4", LLAMA, "colocated:tp1", GPU_DECODE, 1.5, 1.1),
        # Of one row a GPU gathered the table of embeddings, 1 GB of temp.
        case("h100:4", LLAMA, "colocated:tp2", StepShape.decode(1, 16), 1.3, 1.1),
        case("v6e:2x2", LLAMA, "colocated:tp4", WIDE, 1.3, 1.3, slow=True),
        case("v5e:2x2", LLAMA, "colocated:tp4", DECODE, 1.3, 1.3, slow=True),
        case("v5p:2x2x1", LLAMA, "colocated:tp1", DECODE, 1.3, 1.3, slow=True),
        case("h100:4", LLAMA, "colocated:tp4", GPU_DECODE, 1.8, 1.3, slow=True),
        case("v6e:2x2", LLAMA, "colocated:tp1", MIXED, 1.3, 1.1, slow=True),
    ],
    indirect=["target"],
)
def test_decodes_read_kv_once(
    target, model, deployment, shape, bytes_limit, flops_limit, attention
):
    """Temp has no copy of KV, and no logits of other devices."""
    compiled = one_layer(target, model, deployment, attention=attention)
    record = step_record(compiled, shape)
    check_moves(compiled, record, bytes_limit)
    assert 0.9 < record.flops_over_bound < flops_limit, record.largest
    assert record.temp_bytes < smallest_part_bytes(compiled) / 4


@pytest.mark.parametrize(
    "target, deployment, shape, bytes_limit, attention",
    [
        case("v6e:2x2", "colocated:tp1", StepShape.prefill(512, 4), 1.1),
        case("v6e:2x2", "colocated:tp1", PREFILL, 1.8, slow=True),
        case("v6e:2x2", "colocated:tp1", PREFILL, 2.5, XLA, slow=True),
        case("h100:4", "colocated:tp1", StepShape.prefill(512, 4), 2.5),
        case("v6e:2x2", "colocated:tp4", PREFILL, 2.5, slow=True),
        case("v5e:2x2", "colocated:tp4", PREFILL, 2.5, slow=True),
        # Its compiler keeps activations between matmuls in HBM.
        case("v5p:2x2x1", "colocated:tp1", PREFILL, 2.8, slow=True),
    ],
    indirect=["target"],
)
def test_prompts_write_their_own_blocks(
    target, deployment, shape, bytes_limit, attention
):
    """Temp is activations, 3 times those between the MLP's matmuls; no pool beside."""
    compiled = one_layer(target, LLAMA, deployment, attention=attention)
    record = step_record(compiled, shape)
    check_moves(compiled, record, bytes_limit)
    assert 0.9 < record.flops_over_bound < 1.2, record.largest
    mlp_bytes = 2 * shape.tokens * get_config(LLAMA).mlp
    assert record.temp_bytes < 4 * mlp_bytes


PAIRS = ["tp1-tp2", "tp2-tp1", "tp1-tp4", "tp2-tp4"]


@pytest.mark.parametrize(
    "target, pair",
    [
        case("v6e:2x4", "tp1-tp1"),
        case("v6e:2x4", "tp4-tp2"),
        case("h100:8", "tp1-tp1"),
        case("h100:8", "tp4-tp2"),
        *[case(target, pair, slow=True) for target in ("v6e:2x4",) for pair in PAIRS],
        case("v5e:2x4", "tp4-tp4", slow=True),
        case("v5p:2x2x1", "tp1-tp1", slow=True),
        *[case("h100:8", pair, slow=True) for pair in PAIRS],
    ],
    indirect=["target"],
)
def test_a_transfer_moves_its_own_blocks(target, pair):
    source, destination = pair.split("-")
    compiled = one_layer(target, LLAMA, f"prefill:{source},decode:{destination}")
    block_tokens = XlaAttention(target.devices[0].platform).block_tokens
    found = records(compiled, transfer_blocks=(2048 // block_tokens,))
    assert [record.kind for record in found] == ["gather", "insert"]
    for record in found:
        check_moves(compiled, record, 1.1)
        assert record.temp_bytes < smallest_part_bytes(compiled) / 4


@pytest.mark.parametrize(
    ("target", "pair"),
    [
        case("v5e:2x4", "tp1-tp1"),
        case("v5e:2x4", "tp2-tp1", slow=True),
        case("v6e:2x4", "tp2-tp4", slow=True),
    ],
    indirect=["target"],
)
def test_a_small_pool_is_not_fetched_for_a_transfer(target, pair):
    """Into VMEM, which has room for 32 MiB."""
    source, destination = pair.split("-")
    deployment = f"prefill:{source},decode:{destination}"
    compiled = one_layer(target, LLAMA, deployment, 2**25)
    for record in records(compiled, transfer_blocks=(16,)):
        assert record.bytes_over_bound <= 1.1, record.largest


@pytest.mark.parametrize(
    "target", [case("v6e:2x2"), case("h100:4"), case("v5e:2x2")], indirect=True
)
def test_a_pool_that_is_too_large_does_not_fit(target):
    """k and v of a layer as large as the device, each."""
    compiled = one_layer(
        target, LLAMA, "prefill:tp1,decode:tp1", int(target.memory_bytes)
    )
    for record in records(compiled, transfer_blocks=(1,)):
        assert not record.fits
        assert "memory" in record.error or "GiB" in record.error


@pytest.mark.tpu_aot
@pytest.mark.parametrize("target", ["v6e:2x2"], indirect=True)
def test_a_pool_that_is_too_large_does_not_compile_for_a_tpu(target):
    compiled = one_layer(target, LLAMA, "prefill:tp1,decode:tp1", 2**35)
    buckets = dataclasses.replace(NO_SHAPES, transfer_blocks=(1,))
    for program in compiled.programs([buckets] * 2, every=True):
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            program.compile()
