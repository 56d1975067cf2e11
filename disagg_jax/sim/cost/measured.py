"""Step and transfer times of an engine: measured, or estimates of compiled programs.

`experiments.calibrate` measures them, `experiments.compile_check` estimates those of a
device that is not there; here both are called measured. The time of a step is that of
its program (`programs/buckets.py`): the measured median, or the fitted form
(`sim/cost/step_time_terms.py`) where the program was not measured.
The time of a transfer depends likewise on the blocks that it is padded to. Programs
were measured alone, one after itself; among other steps, as in serving, a step takes
longer or shorter by the factor of its kind (`LayoutTimes.serving_factor`).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain

from disagg_jax.deployment import Deployment, KVMemory, Parallelism, Role
from disagg_jax.errors import require
from disagg_jax.programs.buckets import Buckets, exact_shape, most_context
from disagg_jax.programs.shapes import StepShape
from disagg_jax.sim.cost import step_time_terms
from disagg_jax.sim.cost.interface import Decoder, require_one_stage
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.work import StepLoad, Transfer


@dataclasses.dataclass(frozen=True)
class LayoutTimes:
    """Seconds of programs on each pipeline stage of one layout.

    Attributes:
      fits: by kind, for each stage the coefficients of `step_time_terms.TERMS[kind]`.
      serving_factor: by kind, the time of steps in serving over that of their programs
        alone; 1 where missing.

    Raises:
      ValueError: where stages are missing, or a time is not positive.
    """

    pp: int
    measured: Mapping[StepShape, tuple[float, ...]]
    fits: Mapping[str, tuple[tuple[float, ...], ...]]
    serving_factor: Mapping[str, float] = dataclasses.field(
        default_factory=dict[str, float]
    )

    def __post_init__(self) -> None:
        for program, stages_s in self.measured.items():
            expected = f"{program}: expected {self.pp} times > 0"
            ok = len(stages_s) == self.pp and min(stages_s) > 0
            require(ok, expected, stages_s)
        for kind, factor in self.serving_factor.items():
            require(factor > 0, f"{kind}: expected a factor > 0", factor)
        for kind, stages in self.fits.items():
            require(len(stages) == self.pp, f"{kind}: expected {self.pp} fits", stages)
            for fit in stages:
                n = len(step_time_terms.TERMS[kind])
                ok = len(fit) == n and min(fit) >= 0
                require(ok, f"{kind}: expected {n} coefficients >= 0", fit)

    def served_s(self, program: StepShape) -> tuple[float, ...]:
        """Return the seconds on each stage among other steps; see `stages_s`."""
        factor = self.serving_factor.get(program.kind, 1.0)
        return tuple(factor * time_s for time_s in self.stages_s(program))

    def stages_s(self, program: StepShape) -> tuple[float, ...]:
        """Return the seconds on each stage, alone.

        Raises:
          ValueError: if no program of that kind was measured.
        """
        if program in self.measured:
            return self.measured[program]
        return self.fitted_s(program)

    def fitted_s(self, program: StepShape) -> tuple[float, ...]:
        """Return `stages_s` by the fit, even if the program was measured."""
        expected = f"{program}: expected one of kind {sorted(self.fits)}"
        require(program.kind in self.fits, expected, program.kind)
        return tuple(
            step_time_terms.time_s(program, fit) for fit in self.fits[program.kind]
        )


@dataclasses.dataclass(frozen=True)
class TransferTimes:
    """Seconds of a transfer, by the blocks that it is padded to.

    Raises:
      ValueError: where a time is not positive, or the fit has a negative coefficient.
    """

    measured: Mapping[int, float]
    base_s: float  # the fit: base + blocks * block
    block_s: float

    def __post_init__(self) -> None:
        for blocks, seconds in self.measured.items():
            require(seconds > 0, f"{blocks} blocks: expected a time > 0", seconds)
        for name in ("base_s", "block_s"):
            value = getattr(self, name)
            require(value >= 0, f"{name}: expected >= 0", value)

    def time_s(self, blocks: int) -> float:
        """Return the seconds of a transfer of `blocks`, padding included."""
        return self.measured.get(blocks, self.base_s + self.block_s * blocks)


class CalibratedInstance:
    """An `InstanceCost`: the times of a layout, by the programs of an instance.

    Args:
      buckets: the shapes that the instance has programs for.
      block_tokens: tokens in a KV block.
    """

    __slots__ = ("_block_tokens", "_buckets", "_decodes", "_times")

    def __init__(self, times: LayoutTimes, buckets: Buckets, block_tokens: int):
        self._times, self._buckets = times, buckets
        self._block_tokens = block_tokens
        # decodes -> contexts up to which a program serves, and its seconds
        self._decodes: dict[int, tuple[list[int], list[float]]] = {}

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Return the seconds on each stage."""
        return self._times.served_s(self.program(load))

    def program(self, load: StepLoad) -> StepShape:
        """Return the shape whose program the step runs.

        No step of a policy is larger than all of them, but estimates ask for whole
        prompts where a policy splits them: these have a shape of their own.
        """
        try:
            return self._buckets.load_shape(load, self._block_tokens)
        except ValueError:
            mixed = bool(self._buckets.mixed)
            return exact_shape(load, self._block_tokens, mixed=mixed)

    def decode_s(self, decodes: int, context: int) -> float:
        """Return the seconds of a decode-only step on the one stage."""
        if decodes not in self._decodes:
            require_one_stage(self._times.pp)
            self._decodes[decodes] = self._steps(decodes)
        most, seconds = self._decodes[decodes]
        return seconds[min(bisect.bisect_left(most, context), len(seconds) - 1)]

    def _steps(self, decodes: int) -> tuple[list[int], list[float]]:
        most: list[int] = []
        seconds: list[float] = []
        for blocks in self._buckets.pool_blocks:
            context = most_context(decodes, blocks, self._block_tokens)
            program = self.program(StepLoad((), decodes, context))
            most.append(context)
            seconds.append(self._times.served_s(program)[0])
        return most, seconds


class UnpaddedInstance:
    """An `InstanceCost`: the times of a layout, by a program as large as each step.

    It answers what is asked before an instance has programs, as they follow from its
    policy: which size of a step to choose.
    """

    __slots__ = ("_block_tokens", "_times")

    def __init__(self, times: LayoutTimes, block_tokens: int):
        self._times, self._block_tokens = times, block_tokens

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Return the seconds on each stage."""
        mixed = "prefill" not in self._times.fits or any(s for s, _ in load.chunks)
        shape = exact_shape(load, self._block_tokens, mixed=mixed)
        return self._times.served_s(shape)

    def decode_s(self, decodes: int, context: int) -> float:
        """Return the seconds of a decode-only step on the one stage."""
        require_one_stage(self._times.pp)
        return self.stages_s(StepLoad((), decodes, context))[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedCost:
    """A `DeploymentCost` by the times of a profile.

    Raises:
      ValueError: on transfers that leave while their prompt is computed: transfers are
        measured whole.
    """

    instances: Sequence[CalibratedInstance]  # in the deployment's order
    transfers: Mapping[tuple[int, int], TransferTimes]  # by (src, dst)
    buckets: Sequence[Buckets]  # of each instance
    block_tokens: int
    block_bytes: int  # KV of all layers

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        return self.instances[instance].stages_s(load)

    def decoder(self, instance: int) -> Decoder:
        return self.instances[instance].decode_s

    def hop(self, transfer: Transfer) -> Hop:
        require(not transfer.step, "transfer: expected one of a whole prompt", transfer)
        needed = -(-transfer.context // self.block_tokens)
        blocks = self.buckets[transfer.src].transfer_size(needed)
        times = self.transfers[transfer.src, transfer.dst]
        return Hop((times.time_s(blocks),), blocks * self.block_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedProfile:
    """The times of one model on one kind of device.

    Attributes:
      name: marks the outputs of a simulation.
      block_bytes: KV of a block, all layers.
      provenance: the model, dtype and device, and how and when they were measured.
      held_out: by kind, the mean relative error for loads that the fit did not have.
      probes: seconds of some programs, all stages together, that ran now and then while
        the others were measured; see `calibration/machine_speed.py`.
      kv_blocks: of the pool of an instance, which its programs are for. Profiles of
        before they were kept have none.
      compiled: whether the times are estimates of compiled programs, not measurements.
    """

    name: str
    block_tokens: int
    block_bytes: int
    layouts: Mapping[Parallelism, LayoutTimes]
    transfers: Mapping[tuple[Parallelism, Parallelism], TransferTimes]
    provenance: Mapping[str, str]
    held_out: Mapping[str, float]
    probes: Mapping[tuple[Parallelism, StepShape], float] = dataclasses.field(
        default_factory=dict[tuple[Parallelism, StepShape], float]
    )
    kv_blocks: Mapping[Parallelism, int] = dataclasses.field(
        default_factory=dict[Parallelism, int]
    )
    compiled: bool = False

    @property
    def mark(self) -> str:
        """Return what to print with its name; '' if it was measured."""
        return "compiled, not measured" if self.compiled else ""

    def __post_init__(self) -> None:
        for layout in chain(self.layouts, *self.transfers):
            layout.require_tp_pp_only(self.name)  # all that an engine runs
        for (_, program), seconds in self.probes.items():
            require(seconds > 0, f"probes: {program}: expected a time > 0", seconds)

    def cost(
        self,
        deployment: Deployment,
        buckets: Sequence[Buckets],
        memory: Sequence[KVMemory],
    ) -> CalibratedCost:
        """Return the durations of a deployment.

        Args:
          buckets: the shapes that each instance has programs for.
          memory: the KV pool of each instance.

        Raises:
          ValueError: on a layout, a pair of them, a kind of step or a block size that
            was not measured.
        """
        layouts = [spec.parallelism for spec in deployment.instances]
        for layout, listed, pool in zip(layouts, buckets, memory, strict=True):
            times, size = self._times(layout), self.block_tokens
            kinds = {shape.kind for shape in listed.step_shapes}
            expected = f"{self.name}: {layout}: expected steps of {sorted(times.fits)}"
            require(kinds <= times.fits.keys(), expected, sorted(kinds))
            expected = f"{self.name}: expected blocks of {size} tokens"
            require(pool.block_tokens == size, expected, pool.block_tokens)
        transfers: dict[tuple[int, int], TransferTimes] = {}
        for src in deployment.of(Role.PREFILL):
            for dst in deployment.of(Role.DECODE):
                pair, known = (layouts[src], layouts[dst]), sorted(self.transfers)
                expected = f"{self.name}: expected transfers between {known}"
                require(pair in known, expected, pair)
                transfers[src, dst] = self.transfers[pair]
        return CalibratedCost(
            instances=[
                CalibratedInstance(self.layouts[layout], listed, self.block_tokens)
                for layout, listed in zip(layouts, buckets, strict=True)
            ],
            transfers=transfers,
            buckets=buckets,
            block_tokens=self.block_tokens,
            block_bytes=self.block_bytes,
        )

    def instance(self, layout: Parallelism) -> UnpaddedInstance:
        """Return the durations on an instance whose programs are not known yet.

        Raises:
          ValueError: on a layout without measurement.
        """
        return UnpaddedInstance(self._times(layout), self.block_tokens)

    def kv_tokens(self, layout: Parallelism) -> int:
        """Return the tokens that the pool of an instance holds.

        Raises:
          ValueError: on a layout whose pool is not known.
        """
        expected = f"{self.name}: expected a layout with kv_blocks, one of "
        expected += f"{sorted(self.kv_blocks)}"
        require(layout in self.kv_blocks, expected, layout)
        return self.kv_blocks[layout] * self.block_tokens

    def _times(self, layout: Parallelism) -> LayoutTimes:
        expected = f"{self.name}: expected one of {sorted(self.layouts)}"
        require(layout in self.layouts, expected, layout)
        return self.layouts[layout]
