"""What is measured for a profile, the profile from it, and how far it is off."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from disagg_jax.calibration.fit import (
    fit_layout,
    fit_transfers,
    left_out_error,
    of_stage,
)
from disagg_jax.calibration.machine_speed import SpeedProbe, choose_probes
from disagg_jax.calibration.profile_keys import (
    EngineWork,
    StepKey,
    TimeParts,
    TransferKey,
    cost_of,
)
from disagg_jax.calibration.timing import (
    Turn,
    drift,
    grid,
    measure,
    time_alone,
    typical_s,
)
from disagg_jax.calibration.works import every_work
from disagg_jax.deployment import Parallelism
from disagg_jax.engine.engine import Engine
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.programs.slices import slices_of
from disagg_jax.progress import Progress, Stop, never, silent
from disagg_jax.sim.cost.measured import (
    CalibratedProfile,
    LayoutTimes,
    TransferTimes,
)
from disagg_jax.work import Step, Task, Transfer

LEAST_ROUNDS = 3  # behind a median, and for thirds of which the drift is told
Parts = Sequence[tuple[int, int]]  # (start, count) of the slices of a step
Samples = Mapping[StepKey | TransferKey, Sequence[Turn]]


# -- what is measured ------------------------------------------------------------------


def unseen(engines: Iterable[Engine], count: int, seed: int) -> list[EngineWork]:
    """Return `count` random works of each kind for each instance, on no grid."""
    rng = np.random.default_rng(seed)
    works: list[EngineWork] = []
    for engine in engines:
        for i, instance in enumerate(engine.instances):
            memory = instance.programs.memory
            most = memory.num_blocks * memory.block_tokens
            limits = _Limits(min(memory.max_context, most), most, rng)
            for parts in limits.steps(instance.buckets, count):
                step = Step.of(0, i, slices_of(parts, memory))
                works.append(EngineWork(engine, step))
        transfers = [w for w in every_work(engine) if isinstance(w, Transfer)]
        for i in rng.choice(len(transfers), count) if transfers else ():
            works.append(EngineWork(engine, _shortened(engine, transfers[i], rng)))
    return works


def _shortened(
    engine: Engine, transfer: Transfer, rng: np.random.Generator
) -> Transfer:
    """Return a transfer of some of the blocks."""
    n = int(rng.integers(1, len(transfer.src_blocks), endpoint=True))
    blocks = transfer.src_blocks[:n]
    tokens = n * engine.instances[transfer.src].programs.memory.block_tokens
    return dataclasses.replace(
        transfer, src_blocks=blocks, dst_blocks=blocks, context=tokens
    )


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Random steps of an instance, each as (start, count) of its slices."""

    longest: int  # tokens of a request
    pool: int  # tokens of all requests
    rng: np.random.Generator

    def steps(self, buckets: Buckets, count: int) -> Iterator[Parts]:
        """Yield `count` steps of each kind that there are programs for."""
        mixed = buckets.mixed
        for _ in range(count):
            if buckets.decode:
                yield self._decodes(buckets.most_decodes)
            if buckets.prefill:
                largest = buckets.prefill[-1]
                yield self._prompts(self._upto(largest.tokens), largest.rows)
            if mixed:
                tokens = max(shape.tokens for shape in mixed[:-1] or mixed)
                chunk = self._chunk(tokens // 2)
                yield [chunk]
                most = min(buckets.most_decodes, tokens // 2)
                if most:
                    yield [self._chunk(tokens // 2), *self._decodes(most)]

    def _upto(self, most: int, least: int = 1) -> int:
        return int(self.rng.integers(least, most, endpoint=True))

    def _decodes(self, most: int) -> Parts:
        n = self._upto(most)
        # Leave room for a chunk beside the decodes, if there is any.
        room = (self.pool - self.longest) // n
        longest = self._upto(max(2, min(self.longest, room)), 2)
        return [(self._upto(longest - 1), 1) for _ in range(n)]

    def _prompts(self, tokens: int, most: int) -> Parts:
        """Return prompts of `tokens` in all, or less if some would be too long."""
        rows = self._upto(min(most, tokens))
        cuts = np.sort(self.rng.choice(tokens - 1, rows - 1, replace=False)) + 1
        lengths = np.diff([0, *cuts.tolist(), tokens]).tolist()
        return [(0, min(n, self.longest)) for n in lengths]

    def _chunk(self, most: int) -> tuple[int, int]:
        """Return (start, count) of a part of a prompt."""
        count = self._upto(min(most, self.longest), 2)
        return self._upto(self.longest - count, 0), count


# -- the profile -----------------------------------------------------------------------


def calibrate(
    engines: Sequence[Engine],
    time_parts: TimeParts = time_alone,
    *,
    name: str,
    provenance: Mapping[str, str],
    rounds: int,
    count: int,
    max_drift: float,
    progress: Progress = silent,
    speed_probes: bool = True,
    stop: Stop = never,
) -> CalibratedProfile:
    """Measure the programs and transfers of engines, and fit a profile to them.

    Args:
      count: random loads of each kind and instance that are held out.
      max_drift: share by which the device may change its speed meanwhile.
      speed_probes: whether probes run between the programs; see `machine_speed`.
      stop: asked before each round of timing.

    Raises:
      ValueError: if the device changed its speed by more than `max_drift`, or there was
        time for fewer rounds than a fit needs.
    """
    model, memory = engines[0].config, engines[0].instances[0].programs.memory
    probe = SpeedProbe(choose_probes(engines) if speed_probes else {}, time_parts)

    def watched(engine: Engine, work: Task) -> Sequence[float]:
        probe.tick()
        return time_parts(engine, work)

    known, others = grid(engines), unseen(engines, count, seed=0)
    # Time both sets in the same rounds; otherwise machine drift would count as
    # prediction error.
    works = {**known, **dict(enumerate(others))}
    found = measure(works, rounds, watched, progress, stop=stop)
    # A prompt has one turn in a round, and every system computes prompts.
    taken = min(map(len, found.values()))
    if taken < min(LEAST_ROUNDS, rounds):
        raise ValueError(
            f"no time for a fit: expected {LEAST_ROUNDS} rounds of timing after the "
            f"warm-up, got {taken}; give it more --minutes, or fewer systems"
        )
    changed = drift(found.values())
    if abs(changed - 1) > max_drift:
        raise ValueError(
            "the device changed while it was measured: expected at most "
            f"{max_drift:.0%} between the first and the last rounds, got "
            f"{changed - 1:+.0%}; run it again, or raise --max_drift"
        )
    samples = {key: found[key] for key in known}
    profile = CalibratedProfile(
        name=name,
        block_tokens=memory.block_tokens,
        block_bytes=model.kv_bytes_per_token * memory.block_tokens,
        layouts=_layouts(samples),
        transfers=_transfers(samples),
        provenance={**provenance, "rounds": f"{taken}", "drift": f"{changed - 1:+.1%}"},
        held_out={},
        probes=probe.medians_s(),
        kv_blocks={
            spec.parallelism: pool.num_blocks
            for engine in engines
            for spec, pool in zip(
                engine.deployment.instances, engine.memory, strict=True
            )
        },
    )
    turns = [found[i] for i in range(len(others))]
    held_out = held_out_errors(profile, others, turns)
    return dataclasses.replace(profile, held_out=held_out)


def _layouts(samples: Samples) -> dict[Parallelism, LayoutTimes]:
    """Return the typical time of each measured program, and fits for others."""
    steps: dict[Parallelism, dict[StepShape, tuple[float, ...]]] = {}
    for key, turns in samples.items():
        if isinstance(key, StepKey):
            steps.setdefault(key.layout, {})[key.program] = typical_s(turns)
    return {
        layout: fit_layout(layout.pp, measured) for layout, measured in steps.items()
    }


def _transfers(
    samples: Samples,
) -> dict[tuple[Parallelism, Parallelism], TransferTimes]:
    """Return the typical time of each size of a transfer, and fits for others."""
    moves: dict[tuple[Parallelism, Parallelism], dict[int, float]] = {}
    for key, turns in samples.items():
        if isinstance(key, TransferKey):
            pair = moves.setdefault((key.src, key.dst), {})
            pair[key.blocks] = sum(typical_s(turns))
    return {pair: fit_transfers(sizes) for pair, sizes in moves.items()}


# -- how far it is off -----------------------------------------------------------------


def held_out_errors(
    profile: CalibratedProfile,
    works: Sequence[EngineWork],
    samples: Sequence[Sequence[Turn]],
) -> dict[str, float]:
    """Return by kind the mean relative error of the predicted times.

    A kind is prefill, decode, mixed, chunk (of a prompt alone) or transfer.
    """
    errors: dict[str, list[float]] = {}
    costs = {id(engine): cost_of(profile, engine) for engine, _ in works}
    for (engine, work), turns in zip(works, samples, strict=True):
        cost, measured_s = costs[id(engine)], sum(typical_s(turns))
        if isinstance(work, Transfer):
            kind, predicted_s = "transfer", cost.hop(work).duration_s
        else:
            kind = _kind(engine, work)
            predicted_s = sum(cost.stages_s(work.instance, work.load))
        errors.setdefault(kind, []).append(abs(predicted_s / measured_s - 1))
    return {kind: statistics.fmean(each) for kind, each in errors.items()}


def _kind(engine: Engine, step: Step) -> str:
    instance = engine.instances[step.instance]
    kind = instance.buckets.load_shape(
        step.load, instance.programs.memory.block_tokens
    ).kind
    return "chunk" if kind == "mixed" and not step.load.decodes else kind


def left_out_errors(profile: CalibratedProfile) -> dict[str, float | None]:
    """Return by kind the mean of `left_out_error` over layouts and stages."""
    found: dict[str, list[float | None]] = {}
    for layout, times in profile.layouts.items():
        for kind in times.fits:
            found.setdefault(kind, []).extend(
                left_out_error(of_stage(times.measured, kind, i))
                for i in range(layout.pp)
            )
    means: dict[str, float | None] = {}
    for kind, errors in found.items():
        known = [error for error in errors if error is not None]
        means[kind] = statistics.fmean(known) if len(known) == len(errors) else None
    return means
