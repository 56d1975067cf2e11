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

With --profile=FILE some more programs of each kind are compiled, of one target, and
FILE gets a profile of them: step and transfer times by these estimates, marked as
compiled, for the --cost of simulate, compare_systems and placement_search
(experiments/README.md says what it cannot know). For a v6e and two layers of llama-3-8b
the 17 steps of one layout take about 14 minutes of a core, 6 without colocated ones.

DIR gets compiled.json, written after each program: the figures of each row, what XLA
counts, and the ops that move most. With --minutes no other program is begun after that
time, and those left out are named.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.engine.attention.registry import AUTO, choose_kernel
from disagg_jax.engine.deployment_programs import DeploymentPrograms
from disagg_jax.engine.memory_check import held_blocks
from disagg_jax.engine.program_table import Program
from disagg_jax.errors import require
from disagg_jax.programs import Buckets
from disagg_jax.progress import Progress, silent
from disagg_jax.scheduling import DISAGGREGATED
from disagg_jax.scheduling.system import System, get_systems
from disagg_jax.sim.cost.measured import CalibratedProfile
from disagg_jax.sim.cost.measured_profile import profile_to_json
from experiments.cli.attention import attention_flag
from experiments.cli.command import command, command_line
from experiments.cli.flags import REQUIRED, Flags, expect_used
from experiments.cli.names import ENGINE_MODEL
from experiments.cli.progress import ENDLESS, Deadline, MinutesFlag, ProgressLines
from experiments.compiled import report
from experiments.compiled.profile import ProfilePlan, fit_errors
from experiments.compiled.records import CompiledDeployment, ProgramRecord
from experiments.compiled.targets import CompileTarget
from experiments.report.table import numbers
from experiments.runs.folder import environment, run_folder, write_json
from models.config import ModelConfig, get_engine_config

_UNLIMITED = 10**9  # of a step, where only the other limit is given
_SYSTEMS = (DISAGGREGATED, "vllm_v1")

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
_SYSTEM = FLAGS.list(
    "system",
    list(_SYSTEMS),
    "Whose steps are compiled; of several, each serves the roles it has. One of your "
    "own is module:attribute.",
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
    "blocks",
    None,
    "KV blocks of an instance; by default 0.8 of what the weights leave of a device.",
    lower_bound=1,
)
_BLOCK_TOKENS = FLAGS.integer(
    "block_tokens",
    None,
    "Tokens in a block; by default as the engine has on the device.",
    lower_bound=1,
)
_ATTENTION = attention_flag(FLAGS)
_PROFILE = FLAGS.string(
    "profile",
    None,
    "File for a profile of one target: step times for simulate and compare_systems. "
    "It compiles a few more programs of each kind.",
)
_MINUTES = MinutesFlag(FLAGS, "programs")
_OUT = FLAGS.string("out", REQUIRED, "Folder for compiled.json.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What is compiled for each target."""

    config: ModelConfig
    deployment: Deployment
    systems: Sequence[str] = _SYSTEMS  # each for the roles it has
    layers: int | None = None  # None: all
    every: bool = False  # all programs, not only the smallest and largest of a kind
    batch: int | None = None  # most requests in a step, instead of the policies'
    step_tokens: int | None = None  # most tokens in a step, instead of the policies'
    max_context: int = 2048
    blocks: int | None = None  # of an instance; None: what the device holds
    block_tokens: int | None = None  # None: as the engine has on the device
    attention: str = AUTO  # the kernel

    def pools(self, target: CompileTarget) -> list[KVMemory]:
        """Return the KV pool of each instance.

        Raises:
          ValueError: if the target has too few devices.
        """
        needed, have = self.deployment.devices, len(target.devices)
        expected = f"{target.name}: expected at least {needed} devices, which "
        require(needed <= have, f"{expected}'{self.deployment}' takes", have)
        asked = self.attention, target.devices[0], self.config, self.block_tokens
        one = KVMemory(
            num_blocks=1,
            block_tokens=self.block_tokens or choose_kernel(*asked).kernel.block_tokens,
            max_context=min(self.max_context, self.config.max_length),
        )
        programs = DeploymentPrograms(
            self.config,
            self.deployment,
            target.devices,
            [one] * len(self.deployment.instances),
            attention=self.attention,
            share_devices=True,
        )
        limit_bytes = int(target.memory_bytes)
        return [
            dataclasses.replace(
                one, num_blocks=self.blocks or held_blocks(model, limit_bytes)
            )
            for model in programs.models
        ]

    def buckets(self, pools: Sequence[KVMemory]) -> list[Buckets]:
        """Return the listed shapes of each instance.

        Raises:
          ValueError: if the system has no policy for one.
        """
        roles = {spec.role for spec in self.deployment.instances}
        policies = get_systems(self.systems)
        expected = f"system: expected one for {sorted(roles)} instances"
        require(roles <= policies.keys(), expected, list(self.systems))
        system = System(deployment=str(self.deployment), policies=policies)
        if self.batch or self.step_tokens:
            system = system.within(
                tokens=self.step_tokens or _UNLIMITED, rows=self.batch or _UNLIMITED
            )
        return [
            Buckets.for_limits(system.policies[spec.role].limits, pool)
            for spec, pool in zip(self.deployment.instances, pools, strict=True)
        ]

    def deployed(
        self, target: CompileTarget
    ) -> tuple[CompiledDeployment, list[Buckets]]:
        """Return the deployment on a target, and its listed shapes.

        Raises:
          ValueError: if there are too few devices, or the model does not divide.
        """
        pools, config = self.pools(target), self.config
        layers = self.layers or config.layers
        made = CompiledDeployment(
            target,
            config,
            self.deployment,
            pools,
            layers=layers,
            attention=self.attention,
        )
        return made, self.buckets(pools)


def run(
    options: CheckOptions,
    targets: Sequence[CompileTarget],
    out: pathlib.Path,
    progress: Progress = silent,
    deadline: Deadline = ENDLESS,
) -> list[ProgramRecord]:
    """Compile for each target, print its table, and write the records.

    Raises:
      ValueError: if a target has too few devices, or the model does not divide over
        them; before any program is compiled.
    """
    made = [options.deployed(target) for target in targets]
    planned = [(c, c.programs(buckets, every=options.every)) for c, buckets in made]
    return _compile(planned, out, progress, deadline)


def run_profile(
    options: CheckOptions,
    target: CompileTarget,
    out: pathlib.Path,
    progress: Progress = silent,
    deadline: Deadline = ENDLESS,
) -> CalibratedProfile:
    """Compile what a profile needs, as `run` does, and return the profile.

    Raises:
      ValueError: as `run`, or if there are too few programs for a fit; if one does not
        fit on the target, or there was no time for all.
    """
    compiled, buckets = options.deployed(target)
    plan = ProfilePlan.of(compiled, buckets, every=options.every)
    planned = [(compiled, plan.programs)]
    records = _compile(planned, out, progress, deadline, must_fit=True)
    if len(records) < len(plan.programs):
        raise ValueError(
            f"profile: expected time for {len(plan.programs)} programs, got "
            f"{len(records)} before --minutes were spent"
        )
    return plan.profile(records, provenance=_provenance(options, compiled))


def _provenance(options: CheckOptions, compiled: CompiledDeployment) -> dict[str, str]:
    target, config, now = compiled.target, options.config, environment()
    return {
        "model": config.name,
        "dtype": config.dtype,
        "attention": compiled.compiled.attention.kernel.name,
        # As JAX says where the device is; of GPUs that are not there it does not.
        "device": target.devices[0].device_kind or target.hardware.name,
        "hardware": target.hardware.name,
        "target": target.name,
        "date": now["date"],
        "commit": now["commit"] or "none",
        "jax": now["packages"]["jax"],
        "python": now["python"],
        "command": command_line(),
        "systems": f"{', '.join(options.systems)} on {options.deployment}",
        "memory": f"{compiled.compiled.models[0].memory}",
        "layers": f"{options.layers or config.layers} of {config.layers} compiled",
        "method": "compiled, not measured: of each program the longest of its bytes at "
        "the peak bandwidth, its FLOPs at the peak, and XLA's cycles of its matmuls; "
        f"of a transfer also its bytes over {target.hardware.hop.name}",
    }


def _compile(
    planned: Sequence[tuple[CompiledDeployment, Sequence[Program]]],
    out: pathlib.Path,
    progress: Progress,
    deadline: Deadline,
    *,
    must_fit: bool = False,
) -> list[ProgramRecord]:
    records: list[ProgramRecord] = []
    left_out: list[str] = []
    for compiled, programs in planned:
        name, first = compiled.target.name, len(records)
        progress(name, 0, len(programs), str(compiled.compiled.attention))
        for i, program in enumerate(programs):
            if deadline.passed():
                left_out.append(f"{name} {program.name}")
                continue
            progress(name, i, len(programs), program.name)
            record = compiled.record(program)
            records.append(record)
            content = [dataclasses.asdict(record) for record in records]
            write_json(out / "compiled.json", {"records": content})
            if must_fit and not record.fits:
                raise ValueError(
                    f"profile: expected programs that fit on {name}, but "
                    f"{record.program} of {record.instance} does not: {record.error}; "
                    "fewer --blocks leave a step more, and with less --max_context, "
                    "--batch or --step_tokens it needs less"
                )
        if found := records[first:]:
            rows = [report.HEAD, *map(report.row, found)]
            print(*numbers(rows, report.LABELS), *report.notes(found), "", sep="\n")
    if left_out:
        print(f"left out, as --minutes were spent: {', '.join(left_out)}")
    return records


@command(FLAGS)
def main() -> None:
    deadline = _MINUTES.start()
    options = CheckOptions(
        config=dataclasses.replace(get_engine_config(_MODEL.value), dtype=_DTYPE.value),
        deployment=Deployment.parse(_DEPLOYMENT.value),
        systems=_SYSTEM.value,
        layers=_LAYERS.value,
        every=_PROGRAMS.value == "all",
        batch=_BATCH.value,
        step_tokens=_STEP_TOKENS.value,
        max_context=_CONTEXT.value,
        blocks=_BLOCKS.value,
        block_tokens=_BLOCK_TOKENS.value,
        attention=_ATTENTION.value,
    )
    several = f"--target={','.join(_TARGET.value)}"
    one = len(_TARGET.value) == 1
    expect_used(one, _PROFILE, expected="one --target", got=several)
    targets = [CompileTarget.parse(text) for text in _TARGET.value]
    out, progress = pathlib.Path(_OUT.value), ProgressLines().step
    with run_folder(out, FLAGS.asked(), "compiled.json", replace=True):
        if _PROFILE.value is None:
            run(options, targets, out, progress, deadline)
        else:
            made = run_profile(options, targets[0], out, progress, deadline)
            write_json(pathlib.Path(_PROFILE.value), profile_to_json(made))
            print(f"{_PROFILE.value}: {made.name}, {made.mark}; {fit_errors(made)}")
    print(out / "compiled.json")


if __name__ == "__main__":
    main()
