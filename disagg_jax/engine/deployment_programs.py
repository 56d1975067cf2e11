"""Every program of a deployment, from shapes alone: no weights, no device in use."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import TypeAlias

from jax.sharding import Mesh

from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.attention.registry import AUTO, choose_kernel
from disagg_jax.engine.kv_transfer.segments import Segment, find_segments
from disagg_jax.engine.model_programs import ModelPrograms
from disagg_jax.engine.program_table import Program
from disagg_jax.errors import require
from disagg_jax.programs import Buckets
from models.config import ModelConfig
from sharding.mesh import Device, cut_meshes
from sharding.rules import RULES

# The inputs of programs: model, layer groups, rule table, stages, device ids, KV pool,
# attention kernel.
ModelKey: TypeAlias = tuple[Hashable, ...]


class DeploymentPrograms:
    """The programs of a deployment's instances and of the transfers between them.

    Args:
      devices: the meshes of the stages are cut from them in order. They may be those of
        a topology that is not here, which is enough to compile.
      memory: the KV pool of each instance.
      attention: the kernel; see `choose_kernel`.
      layer_groups: programs that the layers of each stage are cut into.
      made: programs to use again where they have the same inputs; new ones are added.
      share_devices: give equal instances the same devices.

    Attributes:
      models: the programs of each instance, and `keys` their keys in `made`.
      segments: the parts of a transfer, by (source, destination).
      attention: the kernel of all instances, and why.

    Raises:
      ValueError: if the devices or the layers are too few, `memory` is not one for each
        instance, a context is longer than the model's, a dimension of the model does
        not divide over an instance's mesh, an instance has dp or ep, or the attention
        kernel cannot serve the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        deployment: Deployment,
        devices: Sequence[Device],
        memory: Sequence[KVMemory],
        *,
        attention: str = AUTO,
        layer_groups: int = 1,
        made: dict[ModelKey, ModelPrograms] | None = None,
        share_devices: bool = False,
    ):
        deployment.require_tp_pp_only("engine")
        deployment.require_each("memory", memory)
        longest, most = max(pool.max_context for pool in memory), config.max_length
        expected = f"max_context: expected at most the {most} tokens of model "
        require(longest <= most, expected + config.name, longest)
        made = {} if made is None else made
        self.deployment = deployment
        self.keys: list[ModelKey] = []
        self.attention = choose_kernel(
            attention, devices[0], config, memory[0].block_tokens
        )
        kernel = self.attention.kernel
        meshes = _meshes(deployment, devices, share_devices)
        for spec, pool, cut in zip(deployment.instances, memory, meshes, strict=True):
            rules = RULES[spec.role]
            ids = tuple(d.id for mesh in cut for d in mesh.devices.flat)
            table = tuple(sorted(rules.items()))
            key = (config, layer_groups, table, spec.parallelism.pp, ids, pool, kernel)
            if key not in made:
                made[key] = ModelPrograms(
                    config, cut, rules, pool, kernel, layer_groups
                )
            self.keys.append(key)
        self.models = [made[key] for key in self.keys]
        self.segments: dict[tuple[int, int], list[Segment]] = {
            (src, dst): find_segments(self.models[src], self.models[dst])
            for src in deployment.of(Role.PREFILL)
            for dst in deployment.of(Role.DECODE)
        }

    def programs(
        self, buckets: Sequence[Buckets], *, sampled: bool = True
    ) -> list[Program]:
        """List the programs of the listed shapes, each once.

        A program that several instances share is listed for the first of them.

        Args:
          buckets: the listed shapes of each instance.
          sampled: whether some requests may not be greedy, which needs the draws.

        Raises:
          ValueError: if `buckets` is not one for each instance.
        """
        self.deployment.require_each("buckets", buckets)
        listed: dict[tuple[int, Hashable], Program] = {}
        for program in self._each(buckets, sampled):
            listed.setdefault((id(program.table), program.key), program)
        return list(listed.values())

    def _each(self, buckets: Sequence[Buckets], sampled: bool) -> Iterator[Program]:
        for i, (model, shapes) in enumerate(zip(self.models, buckets, strict=True)):
            found = [p for s in shapes.step_shapes for p in model.step_programs(s)]
            if sampled:
                rows = {shape.rows for shape in shapes.step_shapes}
                found += [model.groups[-1].draw_program(each) for each in sorted(rows)]
            for program in found:
                yield dataclasses.replace(program, instance=i)
        for ends, parts in self.segments.items():
            for blocks in buckets[ends[0]].transfer_blocks:
                for segment in parts:
                    pair = zip(segment.programs(blocks), ends, strict=True)
                    for program, instance in pair:
                        yield dataclasses.replace(program, instance=instance)


def _meshes(
    deployment: Deployment, devices: Sequence[Device], share_devices: bool
) -> list[list[Mesh]]:
    """Return the meshes of each instance's stages."""
    specs = deployment.instances
    kinds = list(dict.fromkeys(specs)) if share_devices else specs
    cut = iter(
        cut_meshes(
            devices, [s.parallelism.tp for s in kinds for _ in range(s.parallelism.pp)]
        )
    )
    meshes = [list(itertools.islice(cut, spec.parallelism.pp)) for spec in kinds]
    if not share_devices:
        return meshes
    return [meshes[kinds.index(spec)] for spec in specs]
