"""What timing an engine takes: figures with their bounds, and engines of one shape."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from disagg_jax.backend import serve
from disagg_jax.controller import Controller
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.batch import StepShape
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.executor import Engine, full_slices
from disagg_jax.engine.wall import WallBackend
from disagg_jax.request import Request, Timeline
from disagg_jax.scheduling.view import Policy
from disagg_jax.workload import FixedLengths, make_requests
from models import transformer
from models.config import ModelConfig

# -- figures ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number beside its bound."""

    part: str  # which part of the report
    name: str
    measured: float
    bound: float
    unit: str  # of both
    bound_name: str  # what the bound is
    better: Literal["more", "less"] = "more"
    aim: float | None = None  # of the ratio; None where it is only for information

    @property
    def ratio(self) -> float:
        return self.measured / self.bound

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches its aim."""
        if self.aim is None:
            return None
        more = self.better == "more"
        return self.ratio >= self.aim if more else self.ratio <= self.aim

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ratio": self.ratio, "met": self.met}


def table(figures: Sequence[Figure]) -> str:
    """A line for each figure: measured, bound, ratio, aim."""
    head = (
        "part",
        "figure",
        "measured",
        "bound",
        "unit",
        "ratio",
        "aim",
        "",
        "bound is",
    )
    rows = [head, *(_row(figure) for figure in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    numbers = (2, 3, 5)  # columns to the right
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(figure: Figure) -> tuple[str, ...]:
    sign = ">=" if figure.better == "more" else "<="
    return (
        figure.part,
        figure.name,
        _digits(figure.measured),
        _digits(figure.bound),
        figure.unit,
        f"{figure.ratio:.2f}",
        "" if figure.aim is None else f"{sign} {figure.aim:g}",
        {True: "ok", False: "MISSED", None: ""}[figure.met],
        figure.bound_name,
    )


def _digits(value: float) -> str:
    """Four digits, so that a reader can check the ratio."""
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value) or 1)))}f}"


# -- timing -----------------------------------------------------------------------------


def timed_s(run: Callable[[], object]) -> float:
    """Seconds until `run` returns, which must wait for its own result."""
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def interleaved(
    repeats: int, measures: Mapping[str, Callable[[], float]]
) -> dict[str, float]:
    """The median of each measure. A first round is thrown away: it is the warm-up.

    The rounds go over all measures in turn, so that a slow moment of the machine falls
    on both sides of a ratio.
    """
    values: dict[str, list[float]] = {name: [] for name in measures}
    for i in range(repeats + 1):
        for name, measure in measures.items():
            value = measure()
            if i:
                values[name].append(value)
    return {name: statistics.median(found) for name, found in values.items()}


# -- engines ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rig:
    """An engine with just the programs of one measurement, and the system it serves."""

    engine: Engine
    policies: Mapping[Role, Policy]

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        params: transformer.Params,
        deployment: str,
        policies: Mapping[Role, Policy],
        memory: Sequence[KVMemory],
        buckets: Sequence[Buckets],
    ) -> Rig:
        """Compiles every program."""
        parsed = Deployment.parse(deployment)
        engine = Engine(config, params, parsed, jax.devices(), memory, buckets)
        engine.compile()
        return cls(engine, policies)

    def controller(self, kind: type[Controller] = Controller) -> Controller:
        """A new one, for one run."""
        memory = [instance.model.memory for instance in self.engine.instances]
        return kind(self.engine.deployment, self.policies, memory)

    def serve(
        self, requests: Sequence[Request], controller: Controller | None = None
    ) -> list[Timeline]:
        """Serves `requests` on the clock of this machine, guarded as any run is."""
        controller = controller or self.controller()
        with self.engine.serving():
            return serve(controller, WallBackend(self.engine), requests)


def burst(config: ModelConfig, n: int, prompt: int, output: int) -> list[Request]:
    """`n` requests at once: `prompt` random tokens, then `output` greedy ones."""
    return make_requests(
        n=n,
        rate_rps=math.inf,
        prompt_lengths=FixedLengths(tokens=prompt),
        output_lengths=FixedLengths(tokens=output),
        seed=0,
        vocab_size=config.vocab_size,
    )


def bare_step_s(engine: Engine, instance: int, shape: StepShape, steps: int) -> float:
    """Mean seconds of the compiled program in a tight loop, its cache donated.

    Each step is waited for. Its inputs are on the device before, and the tokens stay.
    """
    model, cache = engine.instances[instance].model, engine.instances[instance].cache
    slices = full_slices(shape, model.memory)
    packed = model.put(
        shape.pack(slices, model.memory.block_tokens, model.scratch_block)
    )

    def loop() -> None:
        for _ in range(steps):
            jax.block_until_ready(model.step(shape, cache, packed))

    return timed_s(loop) / steps
