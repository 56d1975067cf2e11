"""Step and transfer times of an engine, as `experiments.calibrate` measured them.

A step takes what the program that it runs takes (`sim/programs.py`): the measured
median where that program was measured, else the fitted form (`sim/cost/terms.py`). So
does a transfer, by the number of blocks it is padded to. These are of programs that
run alone, time after time; between others, as in serving, a step of its kind takes so
much longer or shorter (`LayoutTimes.in_service`).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

from disagg_jax.deployment import Deployment, Role
from disagg_jax.errors import require
from disagg_jax.sim.cost import terms
from disagg_jax.sim.cost.interface import Decoder, require_one_stage
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.sim.programs import Program, ProgramList
from disagg_jax.work import StepLoad, Transfer

Layout = tuple[int, int]  # (tp, pp)


@dataclasses.dataclass(frozen=True)
class LayoutTimes:
    """Seconds of programs on each pipeline stage of one layout.

    Raises:
      ValueError: where stages are missing, or a time is not positive.
    """

    pp: int
    measured: Mapping[Program, tuple[float, ...]]
    # By kind, for each stage the coefficients of `terms.TERMS[kind]`, in seconds.
    fits: Mapping[str, tuple[tuple[float, ...], ...]]
    # What tells a machine's speed, see `agreement.Slowdown`: seconds of some programs
    # on all stages together, run now and then while the others were measured.
    probes: Mapping[Program, float] = dataclasses.field(
        default_factory=dict[Program, float]
    )
    # By kind, what steps took in serving over what they take alone; 1 if not there.
    in_service: Mapping[str, float] = dataclasses.field(
        default_factory=dict[str, float]
    )

    def __post_init__(self) -> None:
        for program, stages_s in self.measured.items():
            expected = f"{program}: expected {self.pp} times > 0"
            ok = len(stages_s) == self.pp and min(stages_s) > 0
            require(ok, expected, stages_s)
        for program, seconds in self.probes.items():
            require(seconds > 0, f"{program}: expected a time > 0", seconds)
        for kind, factor in self.in_service.items():
            require(factor > 0, f"{kind}: expected a factor > 0", factor)
        for kind, stages in self.fits.items():
            require(len(stages) == self.pp, f"{kind}: expected {self.pp} fits", stages)
            for fit in stages:
                n = len(terms.TERMS[kind])
                ok = len(fit) == n and min(fit) >= 0
                require(ok, f"{kind}: expected {n} coefficients >= 0", fit)

    def serving_s(self, program: Program) -> tuple[float, ...]:
        """Seconds on each stage between other steps; see `stages_s`."""
        factor = self.in_service.get(program.kind, 1.0)
        return tuple(factor * time_s for time_s in self.stages_s(program))

    def stages_s(self, program: Program) -> tuple[float, ...]:
        """Seconds on each stage, alone.

        Raises:
          ValueError: if nothing of that kind was measured.
        """
        if program in self.measured:
            return self.measured[program]
        return self.fitted_s(program)

    def fitted_s(self, program: Program) -> tuple[float, ...]:
        """The same by the fit, even if it was measured."""
        expected = f"{program}: expected one of kind {sorted(self.fits)}"
        require(program.kind in self.fits, expected, program.kind)
        return tuple(terms.time_s(program, fit) for fit in self.fits[program.kind])


@dataclasses.dataclass(frozen=True)
class TransferTimes:
    """Seconds of a transfer by the blocks that it is padded to.

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
        """Seconds of so many blocks, after padding."""
        return self.measured.get(blocks, self.base_s + self.block_s * blocks)


class CalibratedInstance:
    """An `InstanceCost`: the times of a layout, by the programs of an instance."""

    __slots__ = ("_decodes", "_list", "_times")

    def __init__(self, times: LayoutTimes, programs: ProgramList):
        self._times, self._list = times, programs
        # decodes -> contexts up to which a program serves, and its seconds
        self._decodes: dict[int, tuple[list[int], list[float]]] = {}

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Seconds on each stage."""
        return self._times.serving_s(self.program(load))

    def program(self, load: StepLoad) -> Program:
        """What it runs; see `ProgramList.find`."""
        return self._list.find(load)

    def decode_s(self, decodes: int, context: int) -> float:
        """Seconds of a decode-only step on the one stage."""
        if decodes not in self._decodes:
            require_one_stage(self._times.pp)
            self._decodes[decodes] = self._steps(decodes)
        most, seconds = self._decodes[decodes]
        return seconds[min(bisect.bisect_left(most, context), len(seconds) - 1)]

    def _steps(self, decodes: int) -> tuple[list[int], list[float]]:
        most: list[int] = []
        seconds: list[float] = []
        for blocks in sorted({p.blocks for p in self._list.of_kind["decode"]}):
            context = self._list.context(decodes, blocks)
            program = self._list.decode(decodes, context)
            most.append(context)
            seconds.append(self._times.serving_s(program)[0])
        return most, seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedCost:
    """A `DeploymentCost` of what was measured.

    Raises:
      ValueError: on transfers that leave while their prompt is computed: they are
        measured whole.
    """

    instances: Sequence[CalibratedInstance]  # in the deployment's order
    transfers: Mapping[tuple[int, int], TransferTimes]  # by (src, dst)
    sizes: Sequence[int]  # blocks that transfers are padded to, increasing
    block_tokens: int
    block_bytes: int  # KV of all layers

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        return self.instances[instance].stages_s(load)

    def decoder(self, instance: int) -> Decoder:
        return self.instances[instance].decode_s

    def hop(self, transfer: Transfer) -> Hop:
        require(not transfer.step, "transfer: expected one of a whole prompt", transfer)
        needed = -(-transfer.context // self.block_tokens)
        i = bisect.bisect_left(self.sizes, needed)
        require(i < len(self.sizes), f"blocks: expected <= {self.sizes[-1]}", needed)
        blocks = self.sizes[i]
        times = self.transfers[transfer.src, transfer.dst]
        return Hop(times.time_s(blocks), blocks * self.block_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedProfile:
    """What was measured of one model on one kind of device.

    `provenance` says of which model, dtype and device, when and how; `held_out` how far
    predictions were off for work that was not used, as a share, by kind.
    """

    name: str  # what outputs are marked with
    block_tokens: int
    block_bytes: int  # KV of all layers
    layouts: Mapping[Layout, LayoutTimes]
    transfers: Mapping[tuple[Layout, Layout], TransferTimes]
    provenance: Mapping[str, str]
    held_out: Mapping[str, float]

    def cost(
        self,
        deployment: Deployment,
        programs: Sequence[ProgramList],
        sizes: Sequence[int],
    ) -> CalibratedCost:
        """The durations of a deployment.

        Args:
          programs: of each instance.
          sizes: blocks that transfers are padded to, increasing.

        Raises:
          ValueError: on a layout, a pair of them or a block size without measurement.
        """
        layouts = [(spec.tp, spec.pp) for spec in deployment.instances]
        for layout, listed in zip(layouts, programs, strict=True):
            known = sorted(self.layouts)
            require(
                layout in known, f"{self.name}: expected (tp, pp) in {known}", layout
            )
            size = self.block_tokens
            expected = f"{self.name}: expected blocks of {size} tokens"
            require(listed.block_tokens == size, expected, listed.block_tokens)
        transfers: dict[tuple[int, int], TransferTimes] = {}
        for src in deployment.of(Role.PREFILL):
            for dst in deployment.of(Role.DECODE):
                pair, known = (layouts[src], layouts[dst]), sorted(self.transfers)
                expected = f"{self.name}: expected transfers between {known}"
                require(pair in known, expected, pair)
                transfers[src, dst] = self.transfers[pair]
        return CalibratedCost(
            instances=[
                CalibratedInstance(self.layouts[layout], listed)
                for layout, listed in zip(layouts, programs, strict=True)
            ],
            transfers=transfers,
            sizes=sizes,
            block_tokens=self.block_tokens,
            block_bytes=self.block_bytes,
        )
