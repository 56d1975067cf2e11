"""A deployment's programs compiled for a target, a record for each.

A model of many layers may be compiled with a few of them: further layers are equal, so
that bytes and FLOPs of the whole model follow by repetition.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.stages import Compiled

from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.engine.attention.kernel import DeviceHeads, KernelCost
from disagg_jax.engine.attention.registry import AUTO
from disagg_jax.engine.deployment_programs import DeploymentPrograms
from disagg_jax.engine.program_table import Program
from disagg_jax.engine.stage import Stage
from disagg_jax.errors import require
from disagg_jax.programs import Buckets
from disagg_jax.programs.slices import full_slices
from disagg_jax.work import StepLoad
from experiments.compiled.bounds import ProgramBound, step_bound, transfer_bound
from experiments.compiled.targets import CompileTarget
from experiments.compiled.traffic import OpTraffic, traffic
from models.config import ModelConfig

_LAYER = re.compile(r"/layer_(\d+)/")  # a layer's scope, from 0 on in each program


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramRecord:
    """One program on one device of its mesh.

    `compile_s`, `temp_bytes`, `pool_copies` and what XLA counts are those of the
    program as it was compiled, with `layers` layers. All other figures are for the
    `model_layers` that it has in the whole model.
    """

    target: str
    instance: str  # such as prefill:tp2
    program: str
    kind: str
    layers: int
    model_layers: int
    compile_s: float
    fits: bool
    error: str = ""  # why it does not fit
    # None of a program that the compiler found no memory for:
    argument_bytes: float | None = None
    needed_bytes: float | None = None  # with temp, results and code; see `_memory`
    temp_bytes: int | None = None
    code_bytes: int | None = None
    pool_copies: int | None = None
    hbm_bytes: float | None = None
    flops: float | None = None
    # As XLA counts, which does not for a GPU, and as counted here, for the same layers:
    xla_bytes: float | None = None
    xla_flops: float | None = None
    compiled_bytes: float | None = None
    compiled_flops: float | None = None
    bound_bytes: float
    bound_flops: float
    bytes_over_bound: float | None = None
    flops_over_bound: float | None = None  # None of a transfer too: it has none
    roofline_s: float
    estimate_s: float | None = None  # see `_estimate_s`
    unknown_loops: Sequence[str] = ()
    unstated_kernels: Sequence[str] = ()
    largest: Sequence[str] = ()  # the ops that move most


class _Part(NamedTuple):
    """A program, and the pipeline stage that it is of."""

    program: Program
    stage: Stage  # as it is compiled
    whole: Stage  # with all its layers
    index: int  # of the stage

    @property
    def is_transfer(self) -> bool:
        return self.program.kind in ("gather", "insert")

    @property
    def repeats(self) -> float:
        """Layers in the whole model for each that is compiled."""
        return len(self.whole.layers) / len(self.stage.layers)

    @property
    def layers(self) -> int:
        """Layers that the program has in the whole model."""
        # A transfer may be of a part of a stage, where the stages of its ends differ.
        return round(len(self.program.layers) * self.repeats)


class CompiledDeployment:
    """A deployment of a model on the devices of a target.

    Args:
      memory: the KV pool of each instance.
      layers: of the model, that are compiled.
      attention: the kernel; see `choose_kernel`.

    Raises:
      ValueError: if the layers are too few or too many, or `DeploymentPrograms` refuses
        the deployment.
    """

    def __init__(
        self,
        target: CompileTarget,
        config: ModelConfig,
        deployment: Deployment,
        memory: Sequence[KVMemory],
        layers: int,
        attention: str = AUTO,
    ):
        least = max(spec.parallelism.pp for spec in deployment.instances)
        expected = f"layers: expected {least} to {config.layers} of {config.name}"
        require(least <= layers <= config.layers, expected, layers)
        self.target, self.config, self.deployment = target, config, deployment
        some = dataclasses.replace(config, layers=layers)
        # Equal instances have equal programs.
        self._compiled, self._whole = (
            DeploymentPrograms(
                each,
                deployment,
                target.devices,
                memory,
                attention=attention,
                share_devices=True,
            )
            for each in (some, config)
        )

    @property
    def compiled(self) -> DeploymentPrograms:
        """Return the programs as they are compiled, with some of the layers."""
        return self._compiled

    def programs(self, buckets: Sequence[Buckets], *, every: bool) -> list[Program]:
        """Return the programs of the listed shapes, for greedy requests.

        Args:
          every: all of them; else the smallest and the largest of each kind.
        """
        found = self._compiled.programs(buckets, sampled=False)
        if every:
            return found
        kinds: dict[Any, list[Program]] = collections.defaultdict(list)
        for program in found:
            key = (program.instance, program.kind, program.layers.start)
            kinds[key].append(program)
        sorted_kinds = [sorted(some, key=_size) for some in kinds.values()]
        return [each for some in sorted_kinds for each in (some[0], *some[1:][-1:])]

    def record(self, program: Program) -> ProgramRecord:
        """Compile a program and account for it."""
        part = self._part(program)
        bound = self._bound(part)
        start_s = time.perf_counter()
        try:
            compiled, error = program.compile(), ""
        except jax.errors.JaxRuntimeError as raised:
            if "RESOURCE_EXHAUSTED" not in str(raised):
                raise
            # What follows is a list of allocations.
            compiled, error = None, str(raised).split("\n\n")[0].strip()
        record = ProgramRecord(
            target=self.target.name,
            instance=str(self.deployment.instances[program.instance]),
            program=program.name,
            kind=program.kind,
            layers=len(program.layers),
            model_layers=part.layers,
            compile_s=time.perf_counter() - start_s,
            fits=not error,
            error=error,
            bound_bytes=bound.size_bytes,
            bound_flops=bound.flops,
            roofline_s=bound.seconds(self.target.hardware),
        )
        if compiled is None:
            return record
        found = {
            **self._memory(part, compiled),
            **self._figures(part, bound, compiled),
            **_as_xla_counts(compiled),
        }
        return dataclasses.replace(record, **found)

    def _part(self, program: Program) -> _Part:
        stages, whole = (
            each.models[program.instance].stages
            for each in (self._compiled, self._whole)
        )
        return next(
            _Part(program, stage, whole[i], i)
            for i, stage in enumerate(stages)
            if program.layers.start in stage.layers
        )

    def _bound(self, part: _Part) -> ProgramBound:
        size, memory = part.program.size, part.stage.memory
        spread = self.deployment.instances[part.program.instance].parallelism
        if isinstance(size, int):
            tokens = size * memory.block_tokens
            return transfer_bound(self.config, tokens, part.layers, spread.tp)
        load = StepLoad.of(full_slices(size, memory))
        return step_bound(self.config, load, spread.tp, spread.pp, part.index)

    def _figures(
        self, part: _Part, bound: ProgramBound, compiled: Compiled
    ) -> dict[str, Any]:
        on_device = _on_device(part.stage)
        found = traffic(
            compiled, pool=on_device.part.shape, kernels=_costs(part, on_device)
        )
        size_bytes, flops, cycles = (
            _repeated(part, [(op, getattr(op, name)) for op in found.ops])
            for name in ("size_bytes", "flops", "matmul_cycles")
        )
        return {
            "pool_copies": len(found.pool_copies),
            "hbm_bytes": size_bytes,
            "flops": flops,
            "compiled_bytes": found.size_bytes,
            "compiled_flops": found.flops,
            "bytes_over_bound": size_bytes / bound.size_bytes,
            "flops_over_bound": flops / bound.flops if bound.flops else None,
            "estimate_s": self._estimate_s(size_bytes, flops, cycles),
            "unknown_loops": found.unknown_loops,
            "unstated_kernels": found.unstated_kernels,
            "largest": [str(op) for op in found.largest(12)],
        }

    def _estimate_s(self, size_bytes: float, flops: float, cycles: float) -> float:
        """Return the longest of moving the bytes, the FLOPs at the peak, and cycles.

        XLA's cycles of matmuls are 2 to 40 % above the roofline on a v5e or v6e; those
        of other ops, which do not count here, are 3 to 4 times what their bytes take
        (matmuls of 8 to 4096 rows of Llama-3-8B, and an add of three arrays).
        """
        hardware = self.target.hardware
        moving_s = size_bytes / hardware.hbm_bytes_s
        computing_s = flops / hardware.peak_flops
        return max(moving_s, computing_s, cycles / self.target.clock_hz)

    def _memory(self, part: _Part, compiled: Compiled) -> dict[str, Any]:
        """Return what a device needs when it runs the program, and whether it has it.

        Weights and pool are the whole model's, also where a transfer is not given the
        weights.
        """
        said = compiled.memory_analysis()
        if said is None:
            raise ValueError(f"{part.program.name}: expected XLA to say its memory")
        instance = part.program.instance
        weights, pool = _held_bytes(self._compiled, instance, part.stage)
        all_weights, all_pool = _held_bytes(self._whole, instance, part.whole)
        # Arguments are scaled, as a TPU pads some of them to whole tiles.
        results = max(0, said.output_size_in_bytes - said.alias_size_in_bytes)
        if part.is_transfer:
            arguments = said.argument_size_in_bytes * all_pool / pool
            others = all_weights + results * all_pool / pool
        else:
            factor = (all_weights + all_pool) / (weights + pool)
            arguments, others = said.argument_size_in_bytes * factor, results
        temp_bytes = int(said.temp_size_in_bytes)
        code_bytes = int(said.generated_code_size_in_bytes)
        needed, limit = (
            arguments + others + temp_bytes + code_bytes,
            self.target.memory_bytes,
        )
        error = f"needs {needed / 2**30:.2f} GiB, the device has {limit / 2**30:.2f}"
        return {
            "argument_bytes": arguments,
            "needed_bytes": needed,
            "temp_bytes": temp_bytes,
            "code_bytes": code_bytes,
            "fits": needed <= limit,
            "error": "" if needed <= limit else error,
        }


def _on_device(stage: Stage) -> DeviceHeads:
    """Return what a device of a stage has of a layer."""
    part = stage.cache_spec(1)[0][0]
    shape = part.sharding.shard_shape(part.shape)
    q_heads = len(stage.layout.q) // stage.mesh.size
    return DeviceHeads(q_heads, jax.ShapeDtypeStruct(shape, part.dtype))


def _costs(part: _Part, heads: DeviceHeads) -> Mapping[str, KernelCost]:
    """Return what the attention kernel says that its programs move."""
    size = part.program.size
    return {} if isinstance(size, int) else part.stage.kernel.costs(size, heads)


def _size(program: Program) -> tuple[int, ...]:
    """Return what programs of a kind are ordered by."""
    size = program.size
    return (size,) if isinstance(size, int) else tuple(size[1:])


def _repeated(part: _Part, values: Sequence[tuple[OpTraffic, float]]) -> float:
    """Return the sum over all ops of the program with all its layers.

    Further layers are as those between the first and the last, if there are any.
    """
    total = sum(value for _, value in values)
    if part.is_transfer:
        return total * part.repeats
    layers = [0.0] * len(part.program.layers)
    for op, value in values:
        place = _LAYER.search(op.op_name)
        if place:
            layers[int(place[1])] += value
    between = layers[1:-1] or layers
    more = part.layers - len(layers)
    return total + more * sum(between) / len(between)


def _held_bytes(
    programs: DeploymentPrograms, instance: int, stage: Stage
) -> tuple[int, int]:
    """Return the bytes of weights and of the KV pool on a device of a stage."""
    groups = [each for each in programs.models[instance].groups if each.stage is stage]
    weights = jax.tree.leaves([group.specs for group in groups])
    cache = jax.tree.leaves(stage.cache_spec(len(stage.layers)))
    return sum(map(_device_bytes, weights)), sum(map(_device_bytes, cache))


def _device_bytes(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.sharding.shard_shape(spec.shape)) * spec.dtype.itemsize


def _as_xla_counts(compiled: Compiled) -> dict[str, float]:
    """Return XLA's own counts: a loop's body once, VMEM as if it were HBM."""
    said = compiled.cost_analysis() or {}
    names = {"xla_bytes": "bytes accessed", "xla_flops": "flops"}
    return {ours: said[theirs] for ours, theirs in names.items() if theirs in said}
