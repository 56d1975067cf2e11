"""Compiles the engine's programs for TPUs and GPUs that are not there.

    python -m experiments.compile_check --target=v6e:2x4 --out=runs/compiled
    python -m experiments.compile_check --target=v6e:2x4,v5e:2x4,v5p:2x2x1,h100:8 \\
        --model=llama-3-8b --deployment=prefill:tp2,decode:tp2 --out=runs/compiled
    python -m experiments.compile_check --target=v5p:2x4x2 --model=llama-3-70b \\
        --deployment=prefill:tp8,decode:tp8 --layers=4 --out=runs/70b

XLA's own compilers run on this machine (the extras `tpu` and `compile-cuda`), so
memory, layouts and copies are those of the device. Nothing is timed. For each target
the meshes of all instances are cut from one topology, and the smallest and the largest
program of each kind (prefill, decode, mixed, gather, insert) are compiled;
--programs=all compiles every one that would be served with. Each has a row, for one
device:

s           seconds that compiling took here
args        GiB of weights, KV pool and inputs
temp        MiB of temporary arrays
fits        in the device's memory, or the compiler's own error below the table
pool copies ops that copy an array of the KV pool, or half of it
GB          read from and written to HBM, by the text of the program, over the bound:
            weights and KV read once, new KV written; a transfer's KV read and written
            once (`experiments/compiled/`)
GFLOP       of matmuls, over the bound
roofline    ms that the bound takes at the spec sheet's peaks
estimate    ms that the program's bytes take at the peak bandwidth, or its matmuls by
            XLA's cycles, if they take longer: it has no time between ops, no links
            between devices and no host

With --layers fewer layers are compiled, and the figures of the model follow by
repetition. On a TPU equal layers cost little: 32 layers of a decode step compile in 1.3
times the time of two.

DIR gets compiled.json, written after each program: the figures of each row, what XLA
counts, and the ops that move most. With --minutes no other program is begun after that
time, and those left out are named.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.engine.memory_check import default_memory
from disagg_jax.errors import require
from disagg_jax.programs import Buckets
from disagg_jax.scheduling import DISAGGREGATED
from disagg_jax.scheduling.system import System
from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags
from experiments.cli.names import ENGINE_MODEL
from experiments.cli.progress import Deadline, MinutesFlag, ProgressLines
from experiments.compiled import report
from experiments.compiled.records import CompiledDeployment, ProgramRecord
from experiments.compiled.targets import CompileTarget
from experiments.report.table import numbers
from experiments.runs.folder import run_folder, write_json
from models.config import ModelConfig, get_engine_config
from sharding.rules import RULES

FLAGS = Flags()
_TARGET = FLAGS.list(
    "target",
    REQUIRED,
    "TPU topologies (v5e:2x4, v5p:2x2x1, v6e:2x4) and numbers of GPUs (a100-80g:8, "
    "h100:8, h200:8, b200:8).",
)
_MODEL = FLAGS.string("model", "llama-3-8b", ENGINE_MODEL)
_DTYPE = FLAGS.string("dtype", "bfloat16", "Of weights and KV.")
_DEPLOYMENT = FLAGS.string(
    "deployment", "prefill:tp1,decode:tp1", "Such as 2xcolocated:tp2."
)
_SYSTEM = FLAGS.string(
    "system",
    None,
    "Whose steps are compiled; by default disaggregated, of colocated instances "
    "vllm_v1. One of your own is module:attribute.",
)
_LAYERS = FLAGS.integer("layers", None, "To compile; by default all.", lower_bound=1)
_PROGRAMS = FLAGS.enum(
    "programs", "ends", ["ends", "all"], "The smallest and largest of a kind, or all."
)
_BATCH = FLAGS.integer("batch", None, "Most requests in a step.", lower_bound=1)
_STEP_TOKENS = FLAGS.integer(
    "step_tokens", None, "Most tokens in a step.", lower_bound=1
)
_CONTEXT = FLAGS.integer(
    "max_context", 2048, "Longest prompt and output, in tokens.", lower_bound=1
)
_BLOCKS = FLAGS.integer(
    "blocks", None, "KV blocks; by default what the device holds.", lower_bound=1
)
_BLOCK_TOKENS = FLAGS.integer("block_tokens", 16, "Tokens in a block.", lower_bound=1)
_MINUTES = MinutesFlag(FLAGS, "programs")
_OUT = FLAGS.string("out", REQUIRED, "Folder for compiled.json.")


def pools(
    config: ModelConfig, deployment: Deployment, target: CompileTarget
) -> list[KVMemory]:
    """Return the KV pool of each instance: --blocks, or what the device holds."""
    made: list[KVMemory] = []
    for spec in deployment.instances:
        pool = default_memory(
            config,
            spec,
            RULES[spec.role],
            int(target.memory_bytes),
            min(_CONTEXT.value, config.max_length),
        )
        held = pool.num_blocks * pool.block_tokens // _BLOCK_TOKENS.value
        blocks = _BLOCKS.value or held
        made.append(
            dataclasses.replace(
                pool, num_blocks=blocks, block_tokens=_BLOCK_TOKENS.value
            )
        )
    return made


def steps(deployment: Deployment, pools: Sequence[KVMemory]) -> list[Buckets]:
    """Return the listed shapes of each instance, by the policies of --system."""
    colocated = any(spec.role == "colocated" for spec in deployment.instances)
    name = _SYSTEM.value or ("vllm_v1" if colocated else DISAGGREGATED)
    system = System.of(name, str(deployment))
    if _BATCH.value or _STEP_TOKENS.value:
        system = system.within(
            tokens=_STEP_TOKENS.value or 10**9, rows=_BATCH.value or 10**9
        )
    listed: list[Buckets] = []
    for spec, pool in zip(deployment.instances, pools, strict=True):
        expected = f"system: expected a policy for '{spec}'"
        require(spec.role in system.policies, expected, name)
        listed.append(Buckets.for_limits(system.policies[spec.role].limits, pool))
    return listed


def run(
    config: ModelConfig,
    targets: Sequence[CompileTarget],
    out: pathlib.Path,
    deadline: Deadline,
) -> None:
    """Compile for each target, print its table, and write the records.

    Raises:
      ValueError: if a target has too few devices, or does not hold the model; before
        any program is compiled.
    """
    deployment = Deployment.parse(_DEPLOYMENT.value)
    progress = ProgressLines()
    planned = []
    for target in targets:
        memory = pools(config, deployment, target)
        compiled = CompiledDeployment(
            target, config, deployment, memory, _LAYERS.value or config.layers
        )
        programs = compiled.programs(
            steps(deployment, memory), every=_PROGRAMS.value == "all"
        )
        planned.append((compiled, programs))
    records: list[ProgramRecord] = []
    left_out: list[str] = []
    for compiled, programs in planned:
        name = compiled.target.name
        found: list[ProgramRecord] = []
        for i, program in enumerate(programs):
            if deadline.passed():
                left_out.append(f"{name} {program.name}")
                continue
            progress.step(name, i, len(programs), program.name)
            found.append(compiled.record(program))
            records.append(found[-1])
            content = [dataclasses.asdict(record) for record in records]
            write_json(out / "compiled.json", {"records": content})
        if found:
            progress.step(name, len(programs), len(programs))
            rows = [report.HEAD, *map(report.row, found)]
            print("\n".join([*numbers(rows, report.LABELS), *report.notes(found), ""]))
    if left_out:
        print(f"left out, as --minutes were spent: {', '.join(left_out)}")
    print(out / "compiled.json")


@command(FLAGS)
def main() -> None:
    deadline = _MINUTES.start()
    config = dataclasses.replace(get_engine_config(_MODEL.value), dtype=_DTYPE.value)
    targets = [CompileTarget.parse(text) for text in _TARGET.value]
    out = pathlib.Path(_OUT.value)
    with run_folder(out, FLAGS.asked(), "compiled.json", replace=True):
        run(config, targets, out, deadline)


if __name__ == "__main__":
    main()
