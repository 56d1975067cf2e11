"""What each system does to its requests: equal devices, equal requests.

    python -m experiments.interference
    python -m experiments.interference --model=llama-3-8b --hardware=h100 --rate=20

Simulated, by a roofline. Every system has its way of failing: vLLM V0 stalls decodes
while it prefills; chunks make prompts slower, the more the shorter they are, and the
decodes beside them too; disaggregation moves KV, and leaves devices of one phase idle.
Writes interference.txt and .png.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from disagg_jax import metrics
from disagg_jax.control.run import Run
from disagg_jax.deployment import Deployment, Parallelism, Role
from disagg_jax.request import Request, Timeline
from disagg_jax.scheduling.system import System
from disagg_jax.sim.cost.interface import InstanceCost
from disagg_jax.sim.simulation import Simulation
from disagg_jax.work import Event, Step, StepLoad, Work
from disagg_jax.workload import RandomWorkload, UniformLengths
from experiments.cli.command import command
from experiments.cli.flags import Flags
from experiments.cli.names import DEVICE, LINK, MODEL
from experiments.report.colours import system_colours
from experiments.report.draw import draw
from experiments.report.intervals import number
from experiments.report.panel import Panel, Series, curves
from experiments.report.table import side_by_side
from experiments.runs.folder import commit, run_folder, write_text

FLAGS = Flags()
_MODEL = FLAGS.string("model", "opt-13b", MODEL)
_HARDWARE = FLAGS.string("hardware", "a100-80g", DEVICE)
_LINK = FLAGS.string("link", None, f"That KV takes, instead of the hardware's. {LINK}")
_RATE = FLAGS.float("rate", 3.0, "Requests/s per device.", lower_bound=1e-9)
_BUDGET = FLAGS.integer("budget", 512, "Tokens of a chunked system's step.")
_REQUESTS = FLAGS.integer("num_requests", 500, "Requests.", lower_bound=1)
_SEED = FLAGS.integer("seed", 0, "Of the requests.")
_OUT = FLAGS.string("out", "runs/interference", "Folder.")

WORKLOAD = RandomWorkload(
    prompt=UniformLengths(low=256, high=1024), output=UniformLengths(low=64, high=192)
)
COLOCATED, APART = "2xcolocated:tp1", "prefill:tp1,decode:tp1"
_STALL = 2.0  # a gap that is so many times a request's median gap is a stall
_CHUNKS = (32, 64, 128, 256, 512, 1024, 2048)
_LONG_PROMPT = 2048
_DECODES, _CONTEXT = 32, 512  # beside a chunk


def systems(budget: int) -> dict[str, System]:
    """Return each system on two devices, with steps of `budget` tokens."""
    colocated = {
        "orca": {"max_seqs": 64},
        "vllm_v0": {},
        "vllm_v1": {"max_batched_tokens": budget, "max_seqs": min(budget, 256)},
        "sarathi": {"chunk_tokens": budget, "max_seqs": 64},
        "sarathi_serve": {"token_budget": budget},
        "splitfuse": {"token_budget": budget, "max_seqs": min(budget, 512)},
    }
    return {
        **{n: System.of(n, COLOCATED, colocated=c) for n, c in colocated.items()},
        "disaggregated": System.of("disaggregated", APART),
    }


@dataclasses.dataclass
class StepCounter:
    """An observer that counts steps by their kinds of work."""

    steps: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter[str]
    )
    beside_prompts: int = 0  # decode tokens computed in a step with prompts
    decodes: int = 0  # decode tokens in all steps

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
    """The figures of one system's run; times in s."""

    ttft_s: float  # mean
    tpot_s: float  # mean
    gaps_s: np.ndarray  # between tokens, of all requests
    stalls: float  # share of the requests with a gap of `_STALL` times their median
    stages: metrics.Stages  # means
    steps: Mapping[str, int]  # by kind of work
    beside_prompts: float  # share of the decode tokens computed in a step with prompts
    idle: Mapping[str, float]  # by role: the share of the time its devices had no step


def traits(deployment: Deployment, run: Run, counted: StepCounter) -> Traits:
    """Read the traits off a run."""
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
    """Return every system's traits at these requests.

    Raises:
      ValueError: if the model does not fit, or no system can have such a budget.
    """
    found: dict[str, Traits] = {}
    for name, system in systems(budget).items():
        deployment = Deployment.parse(system.deployment)
        asked = dataclasses.replace(simulation, policies=system.policies)
        # Without spans, so that each iteration is a step to count.
        simulated = dataclasses.replace(asked.build(deployment), spans=False)
        counter = StepCounter()
        run = simulated.run(requests, observer=counter)
        found[name] = traits(deployment, run, counter)
    return found


# -- without a queue -------------------------------------------------------------------


def chunked_prompt_s(cost: InstanceCost, prompt: int, chunk: int) -> float:
    """Return the seconds of a prompt alone, in chunks."""
    return sum(
        sum(cost.stages_s(StepLoad(((start, min(chunk, prompt - start)),), 0, 0)))
        for start in range(0, prompt, chunk)
    )


def stretch(cost: InstanceCost, chunk: int) -> float:
    """Return the factor by which a chunk lengthens a decode step."""
    context = _DECODES * (_CONTEXT + 1)
    alone, beside = (
        sum(cost.stages_s(StepLoad(chunks, _DECODES, context)))
        for chunks in ((), ((0, chunk),))
    )
    return beside / alone


# -- tables and pictures ---------------------------------------------------------------


def table(found: Mapping[str, Traits]) -> str:
    """Write a column for each system."""
    columns = {name: _column(traits) for name, traits in found.items()}
    return "\n".join(side_by_side("", columns))


def _column(of: Traits) -> dict[str, str]:
    gaps_ms = {p: np.percentile(of.gaps_s, p) * 1e3 for p in (50, 99, 100)}
    stages_ms = {name: s * 1e3 for name, s in dataclasses.asdict(of.stages).items()}
    return {
        "mean TTFT, ms": f"{of.ttft_s * 1e3:.0f}",
        "mean TPOT, ms": f"{of.tpot_s * 1e3:.1f}",
        **{f"gap between tokens P{p}, ms": f"{ms:.1f}" for p, ms in gaps_ms.items()},
        f"requests with a gap > {_STALL:g} x their median": f"{of.stalls:.0%}",
        "decode tokens beside prompts": f"{of.beside_prompts:.0%}",
        **{f"steps: {k}": str(of.steps[k]) for k in ("prompts", "mixed", "decodes")},
        **{
            f"mean {name.removesuffix('_s').replace('_', ' ')}, ms": f"{ms:.1f}"
            for name, ms in stages_ms.items()
        },
        **{
            f"{r.value} devices idle": number(of.idle.get(r.value), ".0%") for r in Role
        },
    }


def panels(found: Mapping[str, Traits], cost: InstanceCost) -> list[Panel]:
    """Return the gaps of all systems, and the cost of chunks without a queue."""
    whole_s = chunked_prompt_s(cost, _LONG_PROMPT, _LONG_PROMPT)

    def over_chunks(
        title: str, y: str, label: str, colour: int, value: Callable[[int], float]
    ) -> Panel:
        points = [(float(chunk), value(chunk)) for chunk in _CHUNKS]
        return Panel(
            title=title,
            x="chunk (tokens)",
            y=y,
            series=[Series(label=label, points=points, colour=colour)],
            line=1.0,
            log_x=True,
        )

    return [
        Panel(
            title="how often a gap between two tokens is longer",
            x="gap (ms)",
            y="share of gaps that are longer",
            series=curves(
                {name: _longer(t.gaps_s) for name, t in found.items()},
                colours=system_colours(found),
            ),
            log_x=True,
            log_y=True,
        ),
        over_chunks(
            f"a prompt of {_LONG_PROMPT} tokens alone, in chunks",
            "TTFT over that of the whole prompt",
            "re-read KV and weights",
            0,
            lambda chunk: chunked_prompt_s(cost, _LONG_PROMPT, chunk) / whole_s,
        ),
        over_chunks(
            f"{_DECODES} decodes at context {_CONTEXT} with a chunk beside them",
            "step over that of the decodes alone",
            "gap of every decode",
            1,
            lambda chunk: stretch(cost, chunk),
        ),
    ]


def _longer(gaps_s: np.ndarray) -> list[tuple[float, float]]:
    """Return (gap in ms, share of longer gaps), down to one in a thousand."""
    shares = np.geomspace(1e-3, 1, 40)
    at = np.quantile(gaps_s, 1 - shares)
    return [
        (float(gap) * 1e3, float(share)) for gap, share in zip(at, shares, strict=True)
    ]


@command(FLAGS)
def main() -> None:
    simulation = Simulation.of(_MODEL.value, _HARDWARE.value)
    if _LINK.value is not None:
        simulation = simulation.over(_LINK.value)
    rate = 2 * _RATE.value  # of both devices
    requests = WORKLOAD.requests(_REQUESTS.value, rate, _SEED.value)
    found = simulate(simulation, requests, _BUDGET.value)
    out = pathlib.Path(_OUT.value)
    deployment = Deployment.parse(COLOCATED)
    cost = simulation.cost_of(deployment.instances[0]).instance(Parallelism())
    title = (
        f"{_MODEL.value} on 2 x {_HARDWARE.value}, KV over {simulation.inside}, "
        f"{_RATE.value:g} requests/s per device, prompts of 256-1024 tokens, "
        f"outputs of 64-192, steps of {_BUDGET.value} tokens; "
        f"N={_REQUESTS.value}, seed {_SEED.value}"
    )
    text = f"# python -m experiments.interference   commit {commit()}\n"
    text += f"# {title}; roofline\n# {simulation.checked}\n{table(found)}\n"
    with run_folder(out, FLAGS.asked(), "interference.txt", replace=True):
        write_text(out / "interference.txt", text)
        notes = [simulation.checked]
        draw(panels(found, cost), title, out / "interference.png", notes=notes)
    print(text + f"\n{out}/interference.png")


if __name__ == "__main__":
    main()
