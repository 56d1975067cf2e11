"""What `calibrate` does: the grid, the rounds, the fits and what they are off by."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from disagg_jax.calibration.fit import fit_line, fit_programs, left_out_error
from disagg_jax.calibration.profile_keys import (
    Probe,
    StepKey,
    TimeParts,
    TransferKey,
    cost_of,
    key_of,
    program_list,
)
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import every_work, slices_of
from disagg_jax.sim.cost.measured import (
    CalibratedProfile,
    Layout,
    LayoutTimes,
    TransferTimes,
)
from disagg_jax.sim.programs import KINDS, Program, ProgramList
from disagg_jax.work import Step, Task, Transfer

Key = TypeVar("Key")
Progress = Callable[[str], None]
Turn = Sequence[Sequence[float]]  # runs of one piece of work; seconds of its parts
Parts = Sequence[tuple[int, int]]  # (start, count) of the slices of a step

_TURNS = 3  # of decode steps and transfers in a round


# -- what is measured ------------------------------------------------------------------


def grid(engines: Iterable[Engine]) -> dict[StepKey | TransferKey, Probe]:
    """Work that needs each program, and each size of a transfer, once."""
    return {
        key_of(engine, work): Probe(engine, work)
        for engine in engines
        for work in every_work(engine)
    }


def unseen(engines: Iterable[Engine], count: int, seed: int) -> list[Probe]:
    """`count` random pieces of work of each kind for each instance, on no grid."""
    rng = np.random.default_rng(seed)
    probes: list[Probe] = []
    for engine in engines:
        for i, instance in enumerate(engine.instances):
            memory = instance.model.memory
            most = memory.num_blocks * memory.block_tokens
            limits = _Limits(min(memory.max_context, most), most, rng)
            for parts in limits.steps(program_list(engine, i), count):
                step = Step.of(0, i, slices_of(parts, memory))
                probes.append(Probe(engine, step))
        transfers = [w for w in every_work(engine) if isinstance(w, Transfer)]
        for i in rng.choice(len(transfers), count) if transfers else ():
            probes.append(Probe(engine, _shortened(engine, transfers[i], rng)))
    return probes


def _shortened(
    engine: Engine, transfer: Transfer, rng: np.random.Generator
) -> Transfer:
    """A transfer of some of the blocks."""
    n = int(rng.integers(1, len(transfer.src_blocks), endpoint=True))
    blocks = transfer.src_blocks[:n]
    tokens = n * engine.instances[transfer.src].model.memory.block_tokens
    return dataclasses.replace(
        transfer, src_blocks=blocks, dst_blocks=blocks, context=tokens
    )


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Random steps of an instance, each as (start, count) of its slices."""

    longest: int  # tokens of a request
    pool: int  # tokens of all
    rng: np.random.Generator

    def steps(self, listed: ProgramList, count: int) -> Iterator[Parts]:
        """`count` of each kind that there are programs for."""
        kinds = listed.of_kind
        for _ in range(count):
            if kinds["decode"]:
                yield self._decodes(listed.most_decodes)
            if kinds["prefill"]:
                largest = kinds["prefill"][-1]
                yield self._prompts(self._upto(largest.tokens), largest.rows)
            if kinds["mixed"]:
                tokens = max(p.tokens for p in kinds["mixed"][:-1] or kinds["mixed"])
                chunk = self._chunk(tokens // 2)
                yield [chunk]
                most = min(listed.most_decodes, tokens // 2)
                if most:
                    yield [self._chunk(tokens // 2), *self._decodes(most)]

    def _upto(self, most: int, least: int = 1) -> int:
        return int(self.rng.integers(least, most, endpoint=True))

    def _decodes(self, most: int) -> Parts:
        n = self._upto(most)
        # Room for a chunk beside them, where there is any.
        room = (self.pool - self.longest) // n
        longest = self._upto(max(2, min(self.longest, room)), 2)
        return [(self._upto(longest - 1), 1) for _ in range(n)]

    def _prompts(self, tokens: int, most: int) -> Parts:
        """Prompts of `tokens` tokens together, but none longer than the longest."""
        rows = self._upto(min(most, tokens))
        cuts = np.sort(self.rng.choice(tokens - 1, rows - 1, replace=False)) + 1
        lengths = np.diff([0, *cuts.tolist(), tokens]).tolist()
        return [(0, min(n, self.longest)) for n in lengths]

    def _chunk(self, most: int) -> tuple[int, int]:
        """(start, count) of a part of a prompt."""
        count = self._upto(min(most, self.longest), 2)
        return self._upto(self.longest - count, 0), count


def measure(
    probes: Mapping[Key, Probe],
    rounds: int,
    time_parts: TimeParts,
    progress: Progress,
) -> dict[Key, list[Turn]]:
    """Times each probe in so many rounds; see `typical_s`.

    The rounds go over all probes, so that a slow moment of the machine falls on
    different ones in different rounds; each in an order of its own, so that what ran
    before does not stay the same. What is short, and so varies most, has `_TURNS` turns
    in a round. One round before is the warm-up.

    In its turn a step runs three times: the first finds the caches cold, as a step does
    that follows one of another kind. A transfer always follows other work, so it runs
    once: those of m32 take twice as long then, and more.
    """
    found: dict[Key, list[Turn]] = {key: [] for key in probes}
    turns = [key for key, probe in probes.items() for _ in range(_turns(probe.work))]
    for i in range(rounds + 1):
        progress(f"timing {len(probes)} pieces of work, round {i} of {rounds}")
        for n in np.random.default_rng(i).permutation(len(turns)).tolist():
            probe = probes[turns[n]]
            times = 3 if isinstance(probe.work, Step) else 1
            runs = [time_parts(*probe) for _ in range(times)]
            if i:
                found[turns[n]].append(runs)
    return found


def _turns(work: Task) -> int:
    """In a round."""
    return 1 if isinstance(work, Step) and work.load.chunks else _TURNS


def typical_s(turns: Sequence[Turn]) -> tuple[float, ...]:
    """Seconds of each part: the median over the turns, the mean over a turn's runs.

    In this order: then a slow moment of the machine counts in no run.
    """
    return tuple(
        statistics.fmean(statistics.median(run) for run in zip(*part, strict=True))
        for part in zip(*(zip(*runs, strict=True) for runs in turns), strict=True)
    )


def drift(samples: Iterable[Sequence[Turn]]) -> float:
    """How much longer work took in the last third of its turns than in the first.

    The median over all pieces of work; 1 is not at all.
    """
    ratios: list[float] = []
    for turns in samples:
        n = max(1, len(turns) // 3)
        first, last = (sum(typical_s(part)) for part in (turns[:n], turns[-n:]))
        ratios.append(last / first)
    return statistics.median(ratios)


# -- what is made of it ----------------------------------------------------------------


def fit_profile(
    samples: Mapping[StepKey | TransferKey, Sequence[Turn]],
    *,
    name: str,
    block_tokens: int,
    block_bytes: int,
    provenance: Mapping[str, str],
    probes: Mapping[Layout, Mapping[Program, float]],
) -> CalibratedProfile:
    """What was measured took typically, and fits for what was not.

    Args:
      probes: what `Speedometer.medians_s` found meanwhile.
    """
    steps: dict[Layout, dict[Program, tuple[float, ...]]] = {}
    moves: dict[tuple[Layout, Layout], dict[int, float]] = {}
    for key, turns in samples.items():
        if isinstance(key, StepKey):
            steps.setdefault(key.layout, {})[key.program] = typical_s(turns)
        else:
            pair = moves.setdefault((key.src, key.dst), {})
            pair[key.blocks] = sum(typical_s(turns))
    return CalibratedProfile(
        name=name,
        block_tokens=block_tokens,
        block_bytes=block_bytes,
        layouts={
            layout: LayoutTimes(
                layout[1],
                measured,
                _fits(layout[1], measured),
                probes.get(layout, {}),
            )
            for layout, measured in steps.items()
        },
        transfers={
            pair: TransferTimes(sizes, *fit_line(sizes))
            for pair, sizes in moves.items()
        },
        provenance=provenance,
        held_out={},
    )


def _fits(
    pp: int, measured: Mapping[Program, tuple[float, ...]]
) -> dict[str, tuple[tuple[float, ...], ...]]:
    return {
        kind: tuple(fit_programs(_stage(measured, kind, i)) for i in range(pp))
        for kind in KINDS
        if _stage(measured, kind, 0)
    }


def _stage(
    measured: Mapping[Program, tuple[float, ...]], kind: str, stage: int
) -> dict[Program, float]:
    return {p: parts[stage] for p, parts in measured.items() if p.kind == kind}


# -- what it is off by -----------------------------------------------------------------


def prediction_errors(
    profile: CalibratedProfile,
    probes: Sequence[Probe],
    samples: Sequence[Sequence[Turn]],
) -> dict[str, list[float]]:
    """By kind, predicted over measured seconds less 1, of each probe.

    A kind is prefill, decode, mixed, chunk (of a prompt alone) or transfer.
    """
    errors: dict[str, list[float]] = {}
    costs = {id(probe.engine): cost_of(profile, probe.engine) for probe in probes}
    for i, (engine, work) in enumerate(probes):
        cost = costs[id(engine)]
        measured_s = sum(typical_s(samples[i]))
        if isinstance(work, Transfer):
            kind, predicted_s = "transfer", cost.hop(work).duration_s
        else:
            kind = _kind(engine, work)
            predicted_s = sum(cost.stages_s(work.instance, work.load))
        errors.setdefault(kind, []).append(predicted_s / measured_s - 1)
    return errors


def _kind(engine: Engine, step: Step) -> str:
    kind = program_list(engine, step.instance).find(step.load).kind
    return "chunk" if kind == "mixed" and not step.load.decodes else kind


def left_out_errors(profile: CalibratedProfile) -> dict[str, float | None]:
    """Return by kind the mean of `left_out_error` over layouts and stages."""
    found: dict[str, list[float | None]] = {}
    for (_, pp), times in profile.layouts.items():
        for kind in times.fits:
            found.setdefault(kind, []).extend(
                left_out_error(_stage(times.measured, kind, i)) for i in range(pp)
            )
    means: dict[str, float | None] = {}
    for kind, errors in found.items():
        known = [error for error in errors if error is not None]
        means[kind] = statistics.fmean(known) if len(known) == len(errors) else None
    return means
