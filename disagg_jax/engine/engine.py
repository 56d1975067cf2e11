"""The engine: a deployment's instances on their meshes run steps and transfers."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from disagg_jax.control.run import StepTotals
from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.engine import sampling
from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.engine.attention.registry import AUTO
from disagg_jax.engine.deployment_programs import DeploymentPrograms, ModelKey
from disagg_jax.engine.kv_transfer.segments import Segment
from disagg_jax.engine.memory_check import check_fits, memory_bytes
from disagg_jax.engine.model_programs import ModelPrograms
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.engine.program_table import compile_all
from disagg_jax.errors import require
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.request import Request
from disagg_jax.work import Slice, Step, Task, Transfer
from models.checkpoint import Weights
from models.config import ModelConfig
from sharding.mesh import Device


class Pause(NamedTuple):
    """A point at which running work waits for arrays before it can go on."""

    arrays: Sequence[Array]
    # Whether a part of the work is over when the arrays are ready: a step has left a
    # stage, or the KV of some layers has landed.
    ends_part: bool = False


Result = tuple[tuple[int, ...], int]  # the tokens of a step, the bytes of a transfer
Running = Generator[Pause, None, Result]
Progress = Callable[[str], None]  # told what is done next


@dataclasses.dataclass
class Instance:
    """A model on its meshes with a KV pool of its own."""

    model: PlacedModel
    buckets: Buckets
    cache: Cache  # of all layers

    @property
    def programs(self) -> ModelPrograms:
        """Return the programs of its model."""
        return self.model.programs

    def step_shape(self, slices: Sequence[Slice]) -> StepShape:
        """Return the smallest listed shape that holds `slices`."""
        return self.buckets.step_shape(slices)

    def pack(self, slices: Sequence[Slice]) -> tuple[StepShape, np.ndarray]:
        """Return that shape, and `slices` as its program takes them."""
        shape = self.step_shape(slices)
        programs = self.programs
        return shape, programs.kernel.pack(shape, slices, programs.memory)


class Engine:
    """Runs the work of one deployment. Each instance is on devices of its own.

    Args:
      deployment: the instances; the meshes of their stages are cut from `devices` in
        order.
      memory: the KV pool of each instance.
      buckets: the listed shapes of each instance; only these can run.
      attention: the attention kernel; see `choose_kernel`.
      layer_groups: programs that the layers of each stage are cut into; KV that leaves
        while its prompt is computed goes in as many parts.
      models: weights and programs made before from the same `params`; the engine adds
        missing ones, so that engines of several deployments share them.
      share_devices: give equal instances the same devices, each with a KV pool of its
        own: for the virtual clock, where only one program runs at a time.

    Attributes:
      programs: of all instances, and of the transfers between them.
      totals: by kind of step ("prefill", "decode", "mixed"), over all instances, since
        the last `serving` began.

    Raises:
      ValueError: if the devices or the layers are too few, `memory` or `buckets` is not
        one for each instance, a context is longer than the model's, a dimension of the
        model does not divide over an instance's mesh, an instance has dp or ep, the
        attention kernel cannot serve the model, or weights and pool are larger than a
        device's memory.
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
        attention: str = AUTO,
        layer_groups: int = 1,
        models: dict[ModelKey, PlacedModel] | None = None,
        share_devices: bool = False,
    ):
        models = {} if models is None else models
        self.programs = DeploymentPrograms(
            config,
            deployment,
            devices,
            memory,
            attention=attention,
            layer_groups=layer_groups,
            made={key: model.programs for key, model in models.items()},
            share_devices=share_devices,
        )
        deployment.require_each("buckets", buckets)
        self.config = config
        self.deployment, self.memory = deployment, tuple(memory)
        self._check_fits()
        self.instances: list[Instance] = []
        self.totals: dict[str, StepTotals] = {}
        each = zip(self.programs.keys, self.programs.models, buckets, strict=True)
        for key, programs, listed in each:
            if key not in models:
                models[key] = PlacedModel(programs, params)
            self.instances.append(Instance(models[key], listed, programs.new_cache()))
        # By running step, the outputs of the groups dispatched so far.
        self._outputs: dict[int, list[Pause]] = {}

    # -- before serving -------------------------------------------------------------

    def compile(
        self, *, sampled: bool = True, progress: Progress = lambda text: None
    ) -> None:
        """Compile every program of the listed shapes, unless done before.

        Then they are known to fit beside weights and pools; see `compile_all`.

        Args:
          sampled: whether some requests may not be greedy.
          progress: see `compile_all`.

        Raises:
          ValueError: if an instance's weights, pool and largest program together are
            larger than a device's memory.
        """
        buckets = [instance.buckets for instance in self.instances]
        compile_all(self.programs.programs(buckets, sampled=sampled), progress)
        self._check_fits()

    def _check_fits(self) -> None:
        """Check every instance; see `memory_check.check_fits`."""
        each = zip(self.deployment.instances, self.programs.models, strict=True)
        for spec, programs in each:
            check_fits(spec, programs, memory_bytes(programs.device))

    def list_shapes(self, buckets: Sequence[Buckets]) -> None:
        """Replace the listed shapes of each instance; `compile` those that are new."""
        for instance, listed in zip(self.instances, buckets, strict=True):
            instance.buckets = listed

    def check(self, requests: Iterable[Request]) -> None:
        """Raise ValueError on a request that would break a step, or its own output."""
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
            top_k = request.sampling.top_k
            require(top_k < 2**31, f"{what}: expected top_k < 2**31", top_k)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Guard a run: a compile or an implicit transfer in it raises.

        The run begins with empty `totals`. Objects made before it are kept out of
        garbage collection, so that no pause for them delays a token.
        """
        self.totals.clear()
        self._outputs.clear()
        gc.collect(1)  # of old objects too it would take longer than a short run
        gc.freeze()
        try:
            with jax.no_tracing(True), jax.transfer_guard("disallow"):
                yield
        finally:
            gc.unfreeze()

    # -- work -----------------------------------------------------------------------

    def start(self, work: Task) -> Running:
        """Start work; advance it with `next` when the arrays of its pause are ready.

        Work of one instance must be started in the order it was submitted.
        """
        return self._step(work) if isinstance(work, Step) else self._transfer(work)

    def warm_up(self, step: Step) -> None:
        """Run `step` and discard the result.

        This is safe: running the step again writes the same KV.
        """
        instance = self.instances[step.instance]
        shape, packed = instance.pack(tuple(step.slices))
        with jax.transfer_guard_host_to_device("allow"):
            jax.block_until_ready(instance.model.step(shape, instance.cache, packed))

    def part_keys(self, work: Task) -> list[str]:
        """Return a key of each part of `work`: equal keys take equally long.

        The parts of a step are its pipeline stages; the parts of a transfer are the
        layers that go at once.
        """
        if isinstance(work, Step):
            instance = self.instances[work.instance]
            what = instance.step_shape(work.slices)
            key, parts = f"{instance.programs}/{what}", instance.programs.pp
        else:
            src, dst = self.instances[work.src], self.instances[work.dst]
            size = src.buckets.transfer_size(len(work.src_blocks))
            key = f"{src.programs}->{dst.programs}/transfer_{size}"
            parts = len(self._parts(work))
        if parts == 1:
            return [key]
        return [f"{key}/{i + 1}of{parts}" for i in range(parts)]

    def part_bytes(self, transfer: Transfer) -> list[int]:
        """Return the bytes that each part of `transfer` moves, padding included."""
        src = self.instances[transfer.src]
        size = src.buckets.transfer_size(len(transfer.src_blocks))
        return [
            sum(segment.payload_bytes(size) for segment in segments)
            for segments in self._parts(transfer)
        ]

    def transfer_bytes(self, transfer: Transfer) -> int:
        """Return the bytes that `transfer` moves, padding included."""
        return sum(self.part_bytes(transfer))

    def _step(self, step: Step) -> Running:
        """Run a step; dispatch each layer group when the second one before it is done.

        So the devices always have a next group to go on with, and work between two
        groups, such as KV that leaves early, need not wait for all groups.
        """
        instance, slices = self.instances[step.instance], tuple(step.slices)
        groups = instance.programs.groups
        shape, packed = instance.pack(slices)
        self._count(shape, slices)
        forward = instance.model.forward(shape, instance.cache, packed)
        outputs = self._outputs[step.id] = list[Pause]()
        for _ in groups:
            # The program copies its input to the devices: an explicit device_put before
            # costs 60 us more.
            with jax.transfer_guard_host_to_device("allow"):
                group, out = next(forward)
            outputs.append(Pause(jax.tree.leaves(out), group.ends_stage))
            if len(outputs) > 1:
                yield outputs[-2]
        tokens, logits = outputs[-1].arrays
        if any(part.samples and part.request.sampling.temperature for part in slices):
            parameters = sampling.pack(slices, shape.rows)
            tokens = groups[-1].draw(logits, parameters)
        if not instance.model.on_host:
            # The only copy to the host. jax counts it as implicit, and the guard of
            # `serving` would refuse it.
            with jax.transfer_guard_device_to_host("allow"):
                tokens.copy_to_host_async()
        yield Pause((tokens,), ends_part=True)
        del self._outputs[step.id]
        each = zip(np.asarray(tokens)[: len(slices)].tolist(), slices, strict=True)
        return tuple(token for token, part in each if part.samples), 0

    def _count(self, shape: StepShape, slices: Sequence[Slice]) -> None:
        totals = self.totals.setdefault(shape.kind, StepTotals())
        totals.steps += 1
        totals.tokens += sum(part.count for part in slices)
        totals.width += shape.tokens

    def _transfer(self, transfer: Transfer) -> Running:
        """Gather on the source, copy device to device, insert at the destination.

        Each is dispatched only when the one before is done, so that neither instance's
        queue of steps ever waits for the link.
        """
        src, dst = self.instances[transfer.src], self.instances[transfer.dst]
        blocks = len(transfer.src_blocks), len(transfer.dst_blocks)
        if blocks[0] != blocks[1]:
            raise RuntimeError(
                f"transfer {transfer.id}: expected equally many blocks on both sides, "
                f"got {blocks[0]} and {blocks[1]}"
            )
        size = src.buckets.transfer_size(blocks[0])
        src_ids = _ids(transfer.src_blocks, size, src.programs.memory)
        dst_ids = _ids(transfer.dst_blocks, size, dst.programs.memory)
        size_bytes = 0
        for segments in self._parts(transfer):
            yield from self._until_computed(transfer, segments[-1])
            # The ids go with the calls: device_puts before them cost 0.3 ms at TP 4.
            with jax.transfer_guard_host_to_device("allow"):
                gathered = [segment.gather(src.cache, src_ids) for segment in segments]
            yield Pause(jax.tree.leaves(gathered))
            both = zip(segments, gathered, strict=True)
            moved = [segment.move(pieces) for segment, pieces in both]
            yield Pause(jax.tree.leaves(moved))
            both = zip(segments, moved, strict=True)
            with jax.transfer_guard_host_to_device("allow"):
                landed = [
                    segment.insert(dst.cache, dst_ids, pieces)
                    for segment, pieces in both
                ]
            yield Pause(landed, ends_part=True)
            size_bytes += sum(array.nbytes for array in jax.tree.leaves(moved))
        return (), size_bytes

    def _parts(self, transfer: Transfer) -> list[list[Segment]]:
        """Return the segments that go at once; each alone while they are computed."""
        segments = self.programs.segments[transfer.src, transfer.dst]
        return [[segment] for segment in segments] if transfer.step else [segments]

    def _until_computed(self, transfer: Transfer, segment: Segment) -> Iterator[Pause]:
        """Wait until the step that computes `segment` has computed it.

        The last segment waits for the end of the step: its KV must not land before.
        """
        groups = self.instances[transfer.src].programs.groups
        done = groups.index(segment.src) + 1
        while outputs := self._outputs.get(transfer.step):
            if len(outputs) >= done < len(groups):
                break
            yield Pause(outputs[-1].arrays)


def _ids(blocks: Sequence[int], size: int, memory: KVMemory) -> np.ndarray:
    """Return `blocks`, padded to `size` with the scratch block after the pool."""
    ids = np.full(size, memory.num_blocks, np.int32)
    ids[: len(blocks)] = blocks
    return ids
