"""What each system does to its requests: equal devices, equal requests.

    python -m experiments.interference
    python -m experiments.interference --model=llama-3-8b --hardware=h100 --rate=20

Simulated, by a roofline. Every system has its way of failing: vLLM stalls decodes while
it prefills; chunks make prompts slower, the more the shorter they are, and the decodes
beside them too; disaggregation moves KV, and leaves devices of one phase idle. Writes
interference.txt and .png.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from absl import app, flags

from disagg_jax import metrics
from disagg_jax.deployment import Deployment, Role
from disagg_jax.request import Request, Timeline
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.splitfuse import SplitFuse
from disagg_jax.sim.cost.interface import InstanceCost
from disagg_jax.sim.run import SimWorkload
from disagg_jax.sim.simulated_deployment import SimulatedRun
from disagg_jax.work import Event, Step, StepLoad, Work
from disagg_jax.workload.lengths import UniformLengths
from experiments.cli.command import command, own_flags
from experiments.configs.named_simulations import Simulation, roofline_simulation
from experiments.papers.figure import Panel, Series
from experiments.report.draw import draw
from experiments.report.table import align
from experiments.runs.folder import run_folder, write_text
from experiments.runs.provenance import commit

_MODEL = flags.DEFINE_string(
    "model", "opt-13b", "A name of sim/model_shape.py.", allow_override=True
)
_HARDWARE = flags.DEFINE_string(
    "hardware", "a100-80g", "A name of sim/hardware/presets.py.", allow_override=True
)
_RATE = flags.DEFINE_float(
    "rate", 3.0, "Requests/s per device.", allow_override=True, lower_bound=1e-9
)
_BUDGET = flags.DEFINE_integer(
    "budget", 512, "Tokens of a chunked system's step.", allow_override=True
)
_REQUESTS = flags.DEFINE_integer(
    "num_requests", 500, "Requests.", allow_override=True, lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the requests.", allow_override=True)
_OUT = flags.DEFINE_string("out", "runs/interference", "Folder.", allow_override=True)

WORKLOAD = SimWorkload(
    prompt=UniformLengths(low=256, high=1024), output=UniformLengths(low=64, high=192)
)
COLOCATED, APART = "2xcolocated:tp1", "prefill:tp1,decode:tp1"
_STALL = 2.0  # a gap that is so many times a request's median gap is a stall
_CHUNKS = (32, 64, 128, 256, 512, 1024, 2048)
_LONG_PROMPT = 2048
_DECODES, _CONTEXT = 32, 512  # beside a chunk


def systems(budget: int) -> dict[str, tuple[str, Mapping[Role, Policy]]]:
    """(deployment, policies) of each system, with steps of `budget` tokens."""
    chunked = {
        "sarathi": Sarathi(chunk_tokens=budget, max_seqs=64),
        "sarathi_serve": SarathiServe(token_budget=budget),
        "splitfuse": SplitFuse(token_budget=budget, max_seqs=min(budget, 512)),
    }
    return {
        "orca": (COLOCATED, {Role.COLOCATED: Orca(max_seqs=64)}),
        "vllm_v0": (COLOCATED, SYSTEMS["vllm_v0"]),
        **{n: (COLOCATED, {Role.COLOCATED: policy}) for n, policy in chunked.items()},
        "disaggregated": (APART, SYSTEMS["disaggregated"]),
    }


@dataclasses.dataclass
class StepCounter:
    """An observer that counts steps by what is in them."""

    steps: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter[str]
    )
    beside_prompts: int = 0  # decode tokens computed in a step with prompts
    decodes: int = 0  # all of them

    def __call__(
        self, now_s: float, events: Sequence[Event], works: Sequence[Work]
    ) -> None:
        for work in works:
            if isinstance(work, Step):
                load = work.load
                self.decodes += load.decodes
                self.beside_prompts += load.decodes if load.chunks else 0
                mixed = load.chunks and load.decodes
                kind = "mixed" if mixed else "prompts" if load.chunks else "decodes"
                self.steps[kind] += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What a system's run shows; times in s."""

    ttft_s: float  # mean
    tpot_s: float  # mean
    gaps_s: np.ndarray  # between tokens, of all requests
    stalls: float  # share of the requests with a gap of `_STALL` times their median
    stages: metrics.Stages  # means
    steps: Mapping[str, int]  # by what is in them
    beside_prompts: float  # share of the decode tokens computed in a step with prompts
    idle: Mapping[str, float]  # by role: the share of the time its devices had no step


def traits(deployment: Deployment, run: SimulatedRun, counted: StepCounter) -> Traits:
    """Reads a run."""
    done = [t for t in run.timelines if t.token_s]
    stages = [dataclasses.asdict(metrics.stages_s(t)) for t in done]
    return Traits(
        ttft_s=statistics.fmean(map(metrics.ttft_s, done)),
        tpot_s=statistics.fmean(map(metrics.tpot_s, done)),
        gaps_s=metrics.pooled_itl_s(done),
        stalls=statistics.fmean(map(_stalled, done)),
        stages=metrics.Stages(
            **{name: statistics.fmean(s[name] for s in stages) for name in stages[0]}
        ),
        steps=counted.steps,
        beside_prompts=counted.beside_prompts / counted.decodes,
        idle={
            role.value: statistics.fmean(
                1 - run.busy_s[(i,)] / run.end_s for i in deployment.of(role)
            )
            for role in Role
            if deployment.of(role)
        },
    )


def _stalled(timeline: Timeline) -> bool:
    gaps_s = metrics.itl_s(timeline)
    return bool(gaps_s) and max(gaps_s) > _STALL * statistics.median(gaps_s)


def simulate(
    simulation: Simulation, requests: Sequence[Request], budget: int
) -> dict[str, Traits]:
    """Every system's traits at these requests.

    Raises:
      ValueError: if the model does not fit, or no system can have such a budget.
    """
    found: dict[str, Traits] = {}
    for name, (text, policies) in systems(budget).items():
        deployment = Deployment.parse(text)
        asked = dataclasses.replace(simulation, policies=policies)
        # Without spans, so that each iteration is a step to count.
        simulated = dataclasses.replace(asked.build(deployment), spans=False)
        counter = StepCounter()
        run = simulated.run(requests, observer=counter)
        found[name] = traits(deployment, run, counter)
    return found


# -- without a queue -------------------------------------------------------------------


def chunked_prompt_s(cost: InstanceCost, prompt: int, chunk: int) -> float:
    """Seconds of a prompt alone, in chunks."""
    return sum(
        sum(cost.stages_s(StepLoad(((start, min(chunk, prompt - start)),), 0, 0)))
        for start in range(0, prompt, chunk)
    )


def stretch(cost: InstanceCost, chunk: int) -> float:
    """How many times longer a decode step is with a chunk beside it."""
    context = _DECODES * (_CONTEXT + 1)
    alone, beside = (
        sum(cost.stages_s(StepLoad(chunks, _DECODES, context)))
        for chunks in ((), ((0, chunk),))
    )
    return beside / alone


# -- what is shown ---------------------------------------------------------------------


def table(found: Mapping[str, Traits]) -> str:
    """A column for each system."""
    rows: list[Sequence[str]] = [("", *found)]

    def row(label: str, cells: Sequence[str]) -> None:
        rows.append((label, *cells))

    all_traits = list(found.values())
    row("mean TTFT, ms", [f"{t.ttft_s * 1e3:.0f}" for t in all_traits])
    row("mean TPOT, ms", [f"{t.tpot_s * 1e3:.1f}" for t in all_traits])
    for p in (50, 99, 100):
        values = [np.percentile(t.gaps_s, p) * 1e3 for t in all_traits]
        row(f"gap between tokens P{p}, ms", [f"{value:.1f}" for value in values])
    row(
        f"requests with a gap > {_STALL:g} x their median",
        [f"{t.stalls:.0%}" for t in all_traits],
    )
    row("decode tokens beside prompts", [f"{t.beside_prompts:.0%}" for t in all_traits])
    for kind in ("prompts", "mixed", "decodes"):
        row(f"steps: {kind}", [str(t.steps[kind]) for t in all_traits])
    for field in dataclasses.fields(metrics.Stages):
        values = [getattr(t.stages, field.name) * 1e3 for t in all_traits]
        label = field.name.removesuffix("_s").replace("_", " ")
        row(f"mean {label}, ms", [f"{value:.1f}" for value in values])
    for role in Role:
        cells = [t.idle.get(role.value) for t in all_traits]
        shown = ["-" if cell is None else f"{cell:.0%}" for cell in cells]
        row(f"{role.value} devices idle", shown)
    return "\n".join(align(rows, right=range(1, len(rows[0]))))


def panels(found: Mapping[str, Traits], cost: InstanceCost) -> list[Panel]:
    """The gaps of all systems, and what chunks cost without any queue."""
    whole_s = chunked_prompt_s(cost, _LONG_PROMPT, _LONG_PROMPT)
    slower = [
        (float(chunk), chunked_prompt_s(cost, _LONG_PROMPT, chunk) / whole_s)
        for chunk in _CHUNKS
    ]
    beside = [(float(chunk), stretch(cost, chunk)) for chunk in _CHUNKS]
    return [
        Panel(
            title="how often a gap between two tokens is longer",
            x="gap (ms)",
            y="share of gaps that are longer",
            series=[
                Series(label=name, points=_longer(t.gaps_s), colour=i)
                for i, (name, t) in enumerate(found.items())
            ],
            log_x=True,
            log_y=True,
        ),
        Panel(
            title=f"a prompt of {_LONG_PROMPT} tokens alone, in chunks",
            x="chunk (tokens)",
            y="TTFT over that of the whole prompt",
            series=[Series(label="re-read KV and weights", points=slower, colour=0)],
            line=1.0,
            log_x=True,
        ),
        Panel(
            title=f"{_DECODES} decodes at context {_CONTEXT} with a chunk beside them",
            x="chunk (tokens)",
            y="step over that of the decodes alone",
            series=[Series(label="gap of every decode", points=beside, colour=1)],
            line=1.0,
            log_x=True,
        ),
    ]


def _longer(gaps_s: np.ndarray) -> list[tuple[float, float]]:
    """(gap in ms, share of gaps that are longer), down to one in a thousand."""
    shares = np.geomspace(1e-3, 1, 40)
    at = np.quantile(gaps_s, 1 - shares)
    return [
        (float(gap) * 1e3, float(share)) for gap, share in zip(at, shares, strict=True)
    ]


@command
def main() -> None:
    simulation = roofline_simulation(_MODEL.value, _HARDWARE.value)
    rate = 2 * _RATE.value  # of both devices
    requests = WORKLOAD.requests(_REQUESTS.value, rate, _SEED.value)
    found = simulate(simulation, requests, _BUDGET.value)
    out = pathlib.Path(_OUT.value)
    deployment = Deployment.parse(COLOCATED)
    cost = simulation.cost_of(deployment.instances[0]).instance(1)
    title = (
        f"{_MODEL.value} on 2 x {_HARDWARE.value}, {_RATE.value:g} requests/s per "
        f"device, prompts of 256-1024 tokens, outputs of 64-192, steps of "
        f"{_BUDGET.value} tokens; N={_REQUESTS.value}, seed {_SEED.value}"
    )
    text = f"# python -m experiments.interference   commit {commit()}\n"
    text += f"# {title}; roofline\n{table(found)}\n"
    with run_folder(out, own_flags(), "interference.txt", replace=True):
        write_text(out / "interference.txt", text)
        draw(panels(found, cost), title, out / "interference.png")
    print(text + f"\n{out}/interference.png")


if __name__ == "__main__":
    app.run(main)
