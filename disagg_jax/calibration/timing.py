"""Time work of engines, each piece alone: the one way for sweeps and for profiles."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from disagg_jax.calibration.profile_keys import (
    EngineWork,
    StepKey,
    TimeParts,
    TransferKey,
    key_of,
)
from disagg_jax.calibration.works import every_work
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import run_alone
from disagg_jax.progress import Progress, Stop, never, silent
from disagg_jax.work import Step, Task

Key = TypeVar("Key")
Turn = Sequence[Sequence[float]]  # runs of one piece of work; seconds of its parts


def grid(engines: Iterable[Engine]) -> dict[StepKey | TransferKey, EngineWork]:
    """Return work that needs each program, and each size of a transfer, once."""
    return {
        key_of(engine, work): EngineWork(engine, work)
        for engine in engines
        for work in every_work(engine)
    }


def time_alone(engine: Engine, work: Task) -> Sequence[float]:
    """Run `work` with nothing beside it; return the seconds of each part."""
    return run_alone(engine, work)[0]


def measure(
    works: Mapping[Key, EngineWork],
    rounds: int,
    time_parts: TimeParts,
    progress: Progress = silent,
    *,
    turns: int = 3,
    runs: int = 3,
    enough: Callable[[Mapping[Key, list[Turn]]], bool] = lambda _: False,
    stop: Stop = never,
) -> dict[Key, list[Turn]]:
    """Time each piece of work in every round; see `typical_s`.

    The rounds go over all works in turn, so that a slow moment of the machine falls on
    different works in different rounds, and on no system more than on another. Each
    round has an order of its own, so that the work before is not always the same. One
    round before the others is the warm-up. The pools hold garbage afterwards.

    In its turn a step runs several times: the first run finds the caches full of other
    data, as does a step in serving that follows one of another kind. In the order of
    the list the first decode steps came after the longest prompt and took 1.4 to 2.2
    times as long as the decode steps after them (smoke on a CPU: 0.87 ms with one row,
    0.57 with two; in turn 0.43 and 0.40). A transfer always follows other work, so it
    runs once; transfers of m32 take twice as long then, and more.

    Args:
      turns: in a round, of decode steps and transfers: they are short, so vary most.
      runs: of a step in its turn.
      enough: asked after each round; `rounds` are the most.
      stop: asked before each round, also the first: there may be none.
    """
    found: dict[Key, list[Turn]] = {key: [] for key in works}
    listed = [
        key
        for key, (_, work) in works.items()
        for _ in range(1 if isinstance(work, Step) and work.load.chunks else turns)
    ]
    part = f"rounds of timing {len(works)} programs, at most"
    for i in range(rounds + 1):
        if stop():
            break
        progress(part, i, rounds + 1, "")
        for at in np.random.default_rng(i).permutation(len(listed)).tolist():
            engine, work = works[listed[at]]
            times = runs if isinstance(work, Step) else 1
            turn = [time_parts(engine, work) for _ in range(times)]
            if i:
                found[listed[at]].append(turn)
        if i and enough(found):
            break
    return found


def typical_s(turns: Sequence[Turn]) -> tuple[float, ...]:
    """Return the seconds of each part: the mean over runs of the median over turns.

    In this order a slow moment of the machine counts in no run.
    """
    return tuple(
        statistics.fmean(statistics.median(run) for run in zip(*part, strict=True))
        for part in zip(*(zip(*runs, strict=True) for runs in turns), strict=True)
    )


def drift(samples: Iterable[Sequence[Turn]]) -> float:
    """Return the time of work in the last third of its turns over the first third.

    It is the median over all works; 1 means that the machine kept its speed.
    """
    ratios: list[float] = []
    for turns in samples:
        n = max(1, len(turns) // 3)
        first, last = (sum(typical_s(part)) for part in (turns[:n], turns[-n:]))
        ratios.append(last / first)
    return statistics.median(ratios)
