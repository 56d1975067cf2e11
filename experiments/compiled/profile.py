"""A profile of programs that were compiled for a device that is not there.

It has the form of a measured one (`disagg_jax/sim/cost/measured.py`), so that a
simulation runs on a TPU slice with this engine's own programs. Each program takes its
record's estimate; between those that were compiled lies the fit of a calibration. A
transfer takes its gather, the time of its bytes on the links, and its insert, one after
the other. The links are those of the smaller end, at the bandwidth of the data sheet.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from disagg_jax.calibration.fit import (
    fit_layout,
    fit_transfers,
    left_out_error,
    of_stage,
)
from disagg_jax.deployment import Parallelism
from disagg_jax.engine.kv_transfer.segments import Segment
from disagg_jax.engine.program_table import Program
from disagg_jax.errors import require
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.sim.cost.measured import CalibratedProfile, LayoutTimes
from experiments.compiled.records import CompiledDeployment, ProgramRecord

# Of each kind, how many sizes of T, and of (R, C, P) for each: for a v6e two layers of
# llama-3-8b compile in 80 s of a core (mixed), 45 s (prefill) and 20 s (decode). Those
# that need most memory come first, so that one that does not fit is known soon.
_SIZES = {"mixed": (2, 3), "prefill": (5, 1), "decode": (3, 2)}
_TRANSFERS = 3
_LEAST = 4  # programs of a kind: two halves, of which either can be held out

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Move:
    """A transfer between two layouts: its programs, and its time between them."""

    programs: Sequence[Program]  # gathers and inserts
    link_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfilePlan:
    """The programs that a profile is made of, and the profile by their records.

    Attributes:
      steps: by layout and shape, a program for each pipeline stage.
      moves: by the layouts of both ends, and by blocks.
    """

    deployed: CompiledDeployment
    steps: Mapping[Parallelism, Mapping[StepShape, Sequence[Program]]]
    moves: Mapping[tuple[Parallelism, Parallelism], Mapping[int, Move]]

    @classmethod
    def of(
        cls,
        deployed: CompiledDeployment,
        buckets: Sequence[Buckets],
        *,
        every: bool = False,
    ) -> ProfilePlan:
        """Choose among the programs that each layout would serve with.

        Args:
          buckets: the listed shapes of each instance.
          every: take all; else the smallest and the largest of a kind and a few others.

        Raises:
          ValueError: if there are too few of a kind to see how far a fit is off.
        """
        steps = _steps(deployed, buckets, every)
        for layout, programs in steps.items():
            for kind in {shape.kind for shape in programs}:
                found = [str(shape) for shape in programs if shape.kind == kind]
                expected = f"profile: expected at least {_LEAST} {kind} programs of "
                expected += f"{layout} for a fit (more --batch, --blocks or "
                expected += "--max_context list more)"
                require(len(found) >= _LEAST, expected, found)
        return cls(
            deployed=deployed,
            steps=steps,
            moves=_moves(deployed, buckets, every),
        )

    @property
    def programs(self) -> list[Program]:
        """Return the programs, each once; of a kind the largest first."""
        listed: dict[Hashable, Program] = {}
        for programs in self._groups():
            for program in programs:
                listed.setdefault(_key(program), program)
        return list(listed.values())

    def _groups(self) -> Iterator[Sequence[Program]]:
        for shapes in self.steps.values():
            yield from shapes.values()
        for sizes in self.moves.values():
            yield from (move.programs for move in sizes.values())

    def profile(
        self,
        records: Sequence[ProgramRecord],
        provenance: Mapping[str, str],
    ) -> CalibratedProfile:
        """Return the profile.

        Args:
          records: of `programs`, in their order; all fit.
        """
        seconds = {
            _key(program): _estimate_s(record)
            for program, record in zip(self.programs, records, strict=True)
        }

        def each_s(programs: Iterable[Program]) -> tuple[float, ...]:
            return tuple(seconds[_key(program)] for program in programs)

        layouts = {
            layout: fit_layout(
                layout.pp,
                {shape: each_s(programs) for shape, programs in shapes.items()},
            )
            for layout, shapes in self.steps.items()
        }
        moves = {
            ends: {n: sum(each_s(m.programs)) + m.link_s for n, m in of.items()}
            for ends, of in self.moves.items()
        }
        config, models = self.deployed.config, self.deployed.compiled.models
        specs = self.deployed.deployment.instances
        block_tokens = models[0].memory.block_tokens
        return CalibratedProfile(
            name=f"{config.name}-{self.deployed.target.hardware.name}-compiled",
            block_tokens=block_tokens,
            block_bytes=config.kv_bytes_per_token * block_tokens,
            layouts=layouts,
            transfers={ends: fit_transfers(sizes) for ends, sizes in moves.items()},
            provenance=provenance,
            held_out=_held_out(layouts.values()),
            kv_blocks={
                spec.parallelism: model.memory.num_blocks
                for spec, model in zip(specs, models, strict=True)
            },
            compiled=True,
        )


def _key(program: Program) -> Hashable:
    """Return the key of a program among those of all instances."""
    return id(program.table), program.key


def _estimate_s(record: ProgramRecord) -> float:
    assert record.estimate_s is not None  # it fits
    return record.estimate_s


# -- which programs --------------------------------------------------------------------


def _steps(
    deployed: CompiledDeployment, buckets: Sequence[Buckets], every: bool
) -> dict[Parallelism, dict[StepShape, Sequence[Program]]]:
    specs, models = deployed.deployment.instances, deployed.compiled.models
    # Of several instances of a layout the first that has a shape: they run it alike.
    listed: dict[Parallelism, dict[StepShape, int]] = {}
    for i, (spec, shapes) in enumerate(zip(specs, buckets, strict=True)):
        for shape in shapes.step_shapes:
            listed.setdefault(spec.parallelism, {}).setdefault(shape, i)

    def programs(shape: StepShape, instance: int) -> list[Program]:
        found = models[instance].step_programs(shape)
        return [dataclasses.replace(program, instance=instance) for program in found]

    return {
        layout: {
            shape: programs(shape, instances[shape])
            for kind in _SIZES
            for shape in _chosen([s for s in instances if s.kind == kind], every)
        }
        for layout, instances in listed.items()
    }


def _chosen(shapes: Sequence[StepShape], every: bool) -> list[StepShape]:
    """Return some shapes of one kind, the largest first."""
    if every or not shapes:
        return sorted(shapes, reverse=True)
    sizes, others = _SIZES[shapes[0].kind]
    by_tokens: dict[int, list[StepShape]] = {}
    for shape in sorted(shapes, reverse=True):
        by_tokens.setdefault(shape.tokens, []).append(shape)
    groups = _spread(list(by_tokens.values()), sizes)
    return [shape for group in groups for shape in _spread(group, others)]


def _moves(
    deployed: CompiledDeployment, buckets: Sequence[Buckets], every: bool
) -> dict[tuple[Parallelism, Parallelism], dict[int, Move]]:
    specs = deployed.deployment.instances
    found: dict[tuple[Parallelism, Parallelism], dict[int, Move]] = {}
    for ends, segments in deployed.compiled.segments.items():
        src, dst = ends
        sizes = sorted(buckets[src].transfer_blocks, reverse=True)
        found[specs[src].parallelism, specs[dst].parallelism] = {
            blocks: _move(deployed, ends, segments, blocks)
            for blocks in (sizes if every else _spread(sizes, _TRANSFERS))
        }
    return found


def _move(
    deployed: CompiledDeployment,
    ends: tuple[int, int],
    segments: Sequence[Segment],
    blocks: int,
) -> Move:
    programs = [
        dataclasses.replace(program, instance=instance)
        for segment in segments
        for program, instance in zip(segment.programs(blocks), ends, strict=True)
    ]
    # The KV of layers that are not compiled arrives too.
    repeats = deployed.config.layers / deployed.compiled.models[0].config.layers
    size_bytes = repeats * sum(each.payload_bytes(blocks) for each in segments)
    link, lanes = deployed.target.hardware.hop, deployed.deployment.lanes(*ends)
    return Move(programs, link.ideal().transfer_s(size_bytes, lanes))


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` items, or all: the first, the last, and those evenly between."""
    last = len(items) - 1
    if last < count:
        return list(items)
    return [items[round(i * last / max(1, count - 1))] for i in range(count)]


# -- how far its fit is off ------------------------------------------------------------


def fit_errors(profile: CalibratedProfile) -> str:
    """Say how far the fit is from programs that it did not have."""
    said = (f"{kind} {error:.1%}" for kind, error in sorted(profile.held_out.items()))
    return f"the fit is off programs that it did not have by {', '.join(said)}"


def _held_out(layouts: Iterable[LayoutTimes]) -> dict[str, float]:
    """Return by kind the mean of `left_out_error` over layouts and stages."""
    errors: dict[str, list[float]] = {}
    for times in layouts:
        for kind in times.fits:
            for stage in range(times.pp):
                seconds = of_stage(times.measured, kind, stage)
                error = left_out_error(seconds, parts=min(5, len(seconds) // 2))
                assert error is not None  # there are `_LEAST` at least
                errors.setdefault(kind, []).append(error)
    return {kind: statistics.fmean(each) for kind, each in errors.items()}
