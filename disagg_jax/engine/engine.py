"""The engine: a deployment's instances on their meshes, doing steps and transfers."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import (
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Sequence,
)
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine import kv_cache, sampling
from disagg_jax.engine.batch import StepShape
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.programs import ModelOnMesh
from disagg_jax.engine.transfer import PiecePlan, move, piece_plan
from disagg_jax.engine.weights import Weights
from disagg_jax.request import Request
from disagg_jax.work import Slice, Step, Task, Transfer
from models.config import ModelConfig
from sharding.mesh import Device, cut_meshes
from sharding.rules import RULES

# What running work yields: arrays to wait for before it can go on; and what it returns:
# the tokens of a step, the bytes of a transfer.
Result = tuple[tuple[int, ...], int]
Running = Generator[Sequence[Array], None, Result]
# What programs depend on: model, layer groups, rule table, device ids, KV pool.
ModelKey = tuple[Hashable, ...]


@dataclasses.dataclass
class Instance:
    """A model on a mesh with a KV pool of its own."""

    role: Role
    model: ModelOnMesh
    buckets: Buckets
    cache: list[kv_cache.Cache]  # one for each layer group

    def step_shape(self, slices: Sequence[Slice]) -> StepShape:
        """The smallest listed shape that holds `slices`."""
        return self.buckets.step_shape(slices)


@dataclasses.dataclass
class StepTotals:
    """What steps of one kind have done: how much of it was padding."""

    steps: int = 0
    tokens: int = 0  # computed
    width: int = 0  # that went through the layers, padding included


class Engine:
    """Runs the work of one deployment. Each instance is on devices of its own.

    Args:
      deployment: the instances; their meshes are cut from `devices` in order.
      memory: the KV pool of each instance.
      buckets: the listed shapes of each instance; only these can run.
      models: weights and programs made before from the same `params`; missing ones are
        added, so that engines of several deployments share them.
      share_devices: give equal instances the same devices, each with a KV pool of its
        own: for the virtual clock, where only one program runs at a time.

    Attributes:
      totals: by kind of step ("prefill", "decode", "mixed"), over all instances, since
        the latest `serving` began.

    Raises:
      ValueError: if an instance has pipeline stages, the devices are too few, `memory`
        or `buckets` is not one for each instance, a context is longer than the model's,
        or a dimension of the model does not divide over an instance's mesh.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Weights,
        deployment: Deployment,
        devices: Sequence[Device],
        memory: Sequence[KVMemory],
        buckets: Sequence[Buckets],
        *,
        layer_groups: int = 1,
        models: dict[ModelKey, ModelOnMesh] | None = None,
        share_devices: bool = False,
    ):
        _check_pools(config, deployment, memory, buckets)
        models = {} if models is None else models
        self.config = config
        meshes = _meshes(deployment, devices, share_devices)
        self.deployment = deployment
        self.instances: list[Instance] = []
        self.totals: dict[str, StepTotals] = {}
        for i, (spec, mesh) in enumerate(
            zip(deployment.instances, meshes, strict=True)
        ):
            rules = RULES[spec.role]
            ids = tuple(device.id for device in mesh.devices.flat)
            table = tuple(sorted(rules.items()))
            key = (config, layer_groups, table, ids, memory[i])
            if key not in models:
                models[key] = ModelOnMesh(
                    config, params, mesh, rules, memory[i], layer_groups
                )
            model = models[key]
            cache = model.new_cache()
            self.instances.append(Instance(spec.role, model, buckets[i], cache))
        self._plans: dict[tuple[int, int], PiecePlan] = {
            (src, dst): self._piece_plan(src, dst)
            for src in deployment.of(Role.PREFILL)
            for dst in deployment.of(Role.DECODE)
        }

    def _piece_plan(self, src: int, dst: int) -> PiecePlan:
        a, b = self.instances[src].model, self.instances[dst].model
        return piece_plan(a.layout.kv, a.tp, b.layout.kv, b.tp)

    # -- before serving -------------------------------------------------------------

    def compile(self, *, sampled: bool = True) -> None:
        """Compiles every program that the deployment can need.

        Args:
          sampled: whether requests may come that are not greedy.
        """
        for instance in self.instances:
            for shape in instance.buckets.step_shapes:
                instance.model.compile_step(shape)
                if sampled:
                    instance.model.compile_draw(shape.rows)
        for (src, dst), plan in self._plans.items():
            for blocks in self.instances[src].buckets.transfer_blocks:
                self.instances[src].model.compile_gather(blocks, plan)
                self.instances[dst].model.compile_insert(blocks, plan)

    def check(self, requests: Iterable[Request]) -> None:
        """Raises ValueError on a request that would break a step, or its own output."""
        vocab = self.config.vocab_size
        for request in requests:
            what = f"request {request.id}"
            if request.prompt is None:
                raise ValueError(f"{what}: expected token ids, got lengths only")
            wrong = [token for token in request.prompt if not 0 <= token < vocab]
            if wrong:
                raise ValueError(
                    f"{what}: expected token ids in [0, {vocab}), got {wrong[0]}"
                )
            if request.sampling.top_k >= 2**31:
                raise ValueError(
                    f"{what}: expected top_k < 2**31, got {request.sampling.top_k}"
                )

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Guards a run: a compile or an implicit transfer in it raises.

        It begins with empty `totals`. The objects made so far are kept out of garbage
        collection meanwhile, so that no pause for them falls on a token.
        """
        self.totals.clear()
        gc.collect()
        gc.freeze()
        try:
            with jax.no_tracing(True), jax.transfer_guard("disallow"):
                yield
        finally:
            gc.unfreeze()

    # -- work -----------------------------------------------------------------------

    def start(self, work: Task) -> Running:
        """Work to be advanced with `next` whenever the arrays it yielded are ready.

        Raises:
          ValueError: on a transfer that goes along with a step.
        """
        if isinstance(work, Transfer) and work.step:
            raise ValueError("the engine moves KV after its prompt only; got a stream")
        return self._step(work) if isinstance(work, Step) else self._transfer(work)

    def program_key(self, work: Task) -> str:
        """Which programs `work` runs: work with equal keys takes equally long."""
        if isinstance(work, Step):
            instance = self.instances[work.instance]
            return f"tp{instance.model.tp}/{instance.step_shape(work.slices)}"
        src, dst = self.instances[work.src], self.instances[work.dst]
        size = src.buckets.transfer_size(len(work.src_blocks))
        return f"tp{src.model.tp}->tp{dst.model.tp}/transfer_{size}"

    def transfer_bytes(self, transfer: Transfer) -> int:
        """What `transfer` moves, padding included."""
        src, dst = self.instances[transfer.src], self.instances[transfer.dst]
        size = src.buckets.transfer_size(len(transfer.src_blocks))
        return dst.model.payload_bytes(size, self._plans[transfer.src, transfer.dst])

    def _step(self, step: Step) -> Running:
        instance, slices = self.instances[step.instance], tuple(step.slices)
        model = instance.model
        shape = instance.step_shape(slices)
        self._count(shape, slices)
        packed = shape.pack(slices, model.memory.block_tokens, model.scratch_block)
        # The program copies its input to the devices itself: an explicit device_put
        # before costs 60 us more.
        with jax.transfer_guard_host_to_device("allow"):
            tokens, logits = model.step(shape, instance.cache, packed)
        if any(part.samples and part.request.sampling.temperature for part in slices):
            params = model.put(sampling.pack(slices, shape.rows))
            tokens = model.draw(logits, params)
        if not model.on_host:
            # The one copy to the host there is. jax counts it as implicit, and the
            # guard of `serving` would refuse it.
            with jax.transfer_guard_device_to_host("allow"):
                tokens.copy_to_host_async()
        yield (tokens,)
        each = zip(np.asarray(tokens)[: len(slices)].tolist(), slices, strict=True)
        return tuple(token for token, part in each if part.samples), 0

    def _count(self, shape: StepShape, slices: Sequence[Slice]) -> None:
        totals = self.totals.setdefault(shape.kind, StepTotals())
        totals.steps += 1
        totals.tokens += sum(part.count for part in slices)
        totals.width += shape.width

    def _transfer(self, transfer: Transfer) -> Running:
        """Gather on the source, copy device to device, insert at the destination.

        Each is dispatched only when the one before is there, so that neither instance's
        queue of steps ever waits for the link.
        """
        src, dst = self.instances[transfer.src], self.instances[transfer.dst]
        plan = self._plans[transfer.src, transfer.dst]
        size = src.buckets.transfer_size(len(transfer.src_blocks))
        src_ids = src.model.put(_pad(transfer.src_blocks, size, src.model))
        dst_ids = dst.model.put(_pad(transfer.dst_blocks, size, dst.model))
        groups = range(len(src.cache))
        gathered = [src.model.gather(g, src.cache[g], src_ids, plan) for g in groups]
        yield jax.tree.leaves(gathered)
        moved = [move(pieces, plan, dst.model.payload_sharding) for pieces in gathered]
        yield jax.tree.leaves(moved)
        landed: list[Array] = []
        for g, pieces in enumerate(moved):
            dst.cache[g], flag = dst.model.insert(
                g, dst.cache[g], dst_ids, pieces, plan
            )
            landed.append(flag)
        yield landed
        return (), sum(array.nbytes for array in jax.tree.leaves(moved))


def _check_pools(
    config: ModelConfig,
    deployment: Deployment,
    memory: Sequence[KVMemory],
    buckets: Sequence[Buckets],
) -> None:
    deployment.check_one_stage()
    n = len(deployment.instances)
    for name, values in (("memory", memory), ("buckets", buckets)):
        if len(values) != n:
            raise ValueError(
                f"{name}: expected one for each of the {n} instances, got {len(values)}"
            )
    longest = max(pool.max_context for pool in memory)
    if longest > config.max_length:
        raise ValueError(
            f"max_context: expected at most the {config.max_length} tokens of model "
            f"{config.name}, got {longest}"
        )


def _meshes(
    deployment: Deployment, devices: Sequence[Any], share_devices: bool
) -> list[Mesh]:
    specs = deployment.instances
    if not share_devices:
        return cut_meshes(devices, [spec.tp for spec in specs])
    kinds = list(dict.fromkeys(specs))
    meshes = dict(
        zip(kinds, cut_meshes(devices, [spec.tp for spec in kinds]), strict=True)
    )
    return [meshes[spec] for spec in specs]


def _pad(blocks: Sequence[int], size: int, model: ModelOnMesh) -> np.ndarray:
    ids = np.full(size, model.scratch_block, np.int32)
    ids[: len(blocks)] = blocks
    return ids
