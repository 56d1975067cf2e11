"""The programs of a model on the meshes of an instance: stages and layer groups."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import Mesh

from disagg_jax.deployment import KVMemory, Parallelism, cut_layers
from disagg_jax.engine.attention.kernel import AttentionKernel
from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.engine.layer_group import LayerGroup
from disagg_jax.engine.place_weights import LayerPlacement, weight_specs
from disagg_jax.engine.program_table import Program
from disagg_jax.engine.stage import Stage
from disagg_jax.errors import require
from disagg_jax.programs.shapes import StepShape
from models.config import ModelConfig
from sharding.mesh import Device
from sharding.rules import Rules


class ModelPrograms:
    """A model cut into layer groups, each on the mesh of one of the pipeline stages.

    A forward pass is a sequence of layer groups, each a program of its own with its own
    part of the cache. One group is the ordinary case. Groups on different meshes are
    pipeline stages, and several groups on one mesh let KV leave while later layers
    compute.

    Programs are made from shapes and shardings alone. They hold no weights and no
    cache, and can be compiled for devices that are not there: those of a topology, see
    `jax.experimental.topologies`.

    Args:
      meshes: the meshes of the stages, in order; equally many devices each.
      layer_groups: groups in each stage.

    Attributes:
      tp: devices of a stage.
      groups: the layer groups in order.

    Raises:
      ValueError: if there are too few layers, or a dimension does not divide.
    """

    def __init__(
        self,
        config: ModelConfig,
        meshes: Sequence[Mesh],
        rules: Rules,
        memory: KVMemory,
        kernel: AttentionKernel,
        layer_groups: int = 1,
    ):
        self.config, self.memory, self.kernel = config, memory, kernel
        self.tp: int = meshes[0].size
        cut = _cut_layers(config, len(meshes), layer_groups)
        self.stages = [
            Stage(
                config,
                range(groups[0].start, groups[-1].stop),
                mesh,
                rules,
                memory,
                kernel,
            )
            for groups, mesh in zip(cut, meshes, strict=True)
        ]
        self.layout = self.stages[0].layout  # equal on all stages
        placed = [
            (stage, layers)
            for groups, stage in zip(cut, self.stages, strict=True)
            for layers in groups
        ]
        places = [LayerPlacement(layers, stage.mesh) for stage, layers in placed]
        specs = weight_specs(config, self.layout, places, rules)
        self.groups = [
            LayerGroup(stage, layers, part)
            for (stage, layers), part in zip(placed, specs, strict=True)
        ]

    def __str__(self) -> str:
        """Return the parallelism, tp2pp2, then g4 for 4 layer groups a stage.

        Behind it stands @ and the attention kernel, unless that is plain XLA.
        """
        groups, kernel = len(self.groups) // self.pp, self.kernel.name
        said = f"g{groups}" if groups > 1 else ""
        said += f"@{kernel}" if kernel != XlaAttention.name else ""
        return f"{Parallelism(self.tp, self.pp)}{said}"

    @property
    def device(self) -> Device:
        """The first device of all."""
        return self.stages[0].mesh.devices.flat[0]

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return len(self.stages)

    def new_cache(self) -> Cache:
        """Make an empty pool: the cache of every layer, on its stage."""
        return [layer for stage in self.stages for layer in stage.new_cache()]

    def step_programs(self, shape: StepShape) -> list[Program]:
        """Return the programs of the step of `shape`, one for each layer group."""
        return [group.step_program(shape) for group in self.groups]

    def compile_step(self, shape: StepShape) -> None:
        """Compile the step of `shape`, unless done before."""
        for program in self.step_programs(shape):
            program.compile()


def _cut_layers(config: ModelConfig, pp: int, layer_groups: int) -> list[list[range]]:
    """Return the layer groups of each stage; stages and groups are as even as can be.

    Raises:
      ValueError: if a stage, or a group, would have no layer.
    """
    layers = config.layers
    expected = f"pp: expected at most {layers}, the layers of {config.name}"
    require(pp <= layers, expected, pp)
    most = layers // pp  # of the smallest stage
    expected = f"layer_groups: expected 1 to {most}, the layers of the smallest of {pp}"
    in_range = 1 <= layer_groups <= most
    require(in_range, f"{expected} stages of {config.name}", layer_groups)
    return [cut_layers(stage, layer_groups) for stage in cut_layers(range(layers), pp)]
