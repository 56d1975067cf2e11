"""What a measured row describes, simulated as it was measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from disagg_jax.control.loop import Observer
from disagg_jax.deployment import Deployment, Role
from disagg_jax.metrics import tpot_s, ttft_s
from disagg_jax.request import Request, Timeline
from disagg_jax.sim import SimulatedDeployment, Simulation
from disagg_jax.sim.cost.roofline import RooflineCost, RooflineInstance
from disagg_jax.sim.cost.term_totals import TermTotals
from disagg_jax.sim.engines import EngineProfile, engine_of
from disagg_jax.sim.hardware import get_hardware
from disagg_jax.sim.workers import Mapper
from disagg_jax.work import StepLoad
from disagg_jax.workload import ClosedLoop, RandomWorkload, UniformLengths
from experiments.cli.progress import ProgressLines
from experiments.measured.described import simulation_of
from experiments.measured.rows import Loop, MeasuredRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Client:
    """A benchmark's client: what it asks, and which requests its means are over.

    All clients of a loop start at once. So prompts queue at first, and again whenever
    many requests end together, which they do the more, the less their lengths differ.
    """

    rounds: int  # requests of each client; at least 3
    shortest: float  # prompt and output, as shares of the longest
    counts_all: bool  # else the first and the last request of each client are left out

    @property
    def weights(self) -> tuple[float, float, float]:
        """Return what first, middle and last requests of the clients weigh in means."""
        ends = float(self.counts_all)
        return ends, self.rounds - 2.0, ends

    def requests(self, row: MeasuredRow, n: int, seed: int) -> list[Request]:
        """Draw `n` requests, in the order in which they are sent."""
        workload = RandomWorkload(
            prompt=self._lengths(row.prompt_tokens),
            output=self._lengths(row.output_tokens),
        )
        # The rate does not matter: requests are sent when others end.
        return workload.requests(n, 1.0, seed)

    def _lengths(self, longest: int) -> UniformLengths:
        return UniformLengths(low=max(1, int(self.shortest * longest)), high=longest)


# utils/bench_serving/benchmark_serving.py of SemiAnalysisAI/InferenceX, called with
# --num-prompts=10C --max-concurrency=C --request-rate=inf --random-range-ratio=0.8: it
# draws both lengths from [0.8, 1], and averages over all requests.
INFERENCEX = Client(rounds=10, shortest=0.8, counts_all=True)
# The others' files say fixed lengths. SGLang's rows show it: 64 clients wait 2.5 s for
# a first token of 1,024 + 128, and 0.3 s where lengths differ by a fifth.
FIXED = Client(rounds=5, shortest=1.0, counts_all=False)


def client_of(row: MeasuredRow) -> Client:
    """Return the client that measured a row."""
    return INFERENCEX if row.is_public else FIXED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How much of a loop is simulated: of many clients fewer requests than were sent.

    The first and the last request of each client are, and some between them, which
    count for all that were between. Clients who started together drift apart, so the
    mean TTFT of fewer is larger: with 5 instead of 10 by 4 % (at most 15 %), and the
    mean TPOT smaller by 0.4 %, on the calibration rows of dense BF16 models.
    """

    requests: int = 2560  # simulated at most, but for three of each client
    counted: int = 32  # at least, that are neither a client's first nor its last
    seed: int = 0

    def rounds(self, client: Client, clients: int) -> int:
        """Return how many requests each of so many clients has."""
        most = max(3, self.requests // clients)
        return min(most, max(client.rounds, math.ceil(self.counted / clients) + 2))

    def is_shortened(self, client: Client, clients: int) -> bool:
        """Return whether these clients have fewer requests than they sent."""
        return self.rounds(client, clients) < client.rounds


STANDARD = Effort()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanLatencies:
    """Mean latencies of a row's requests."""

    ttft_s: float
    tpot_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTask:
    """A row to simulate, by the profile of its engine or another."""

    row: MeasuredRow
    profile: EngineProfile | None = None  # None: the preset for its engine and version


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedRow:
    """A measured row, and what its simulation says."""

    row: MeasuredRow
    simulated: MeanLatencies | None  # None where it was skipped
    skipped: str = ""  # the reason
    profile: str = ""  # the name of the engine's profile
    # The measured TPOT is below the time of an ideal device for one token a step.
    is_too_fast: bool = False
    # What the factors of the profile multiply in the mean TPOT; see `EngineFactors`.
    tpot_terms: tuple[float, ...] = ()

    @property
    def latencies(self) -> tuple[MeanLatencies, MeanLatencies]:
        """Return the measured and the simulated latencies of a row not skipped."""
        if self.simulated is None:
            raise RuntimeError(f"row {self.row.id} was skipped: {self.skipped}")
        measured = MeanLatencies(ttft_s=self.row.ttft_s, tpot_s=self.row.tpot_s)
        return measured, self.simulated


def simulate_row(task: RowTask) -> SimulatedRow:
    """Simulate a row, or say why it cannot be simulated."""
    row = task.row
    if row.loop is None:
        return SimulatedRow(row=row, simulated=None, skipped=row.skipped)
    try:
        profile = task.profile or engine_of(row.engine, row.version)
        simulation = simulation_of(row, row.loop, profile)
        simulated = simulation.build(row.loop.deployment)
        totals = term_totals(simulation, simulated.deployment)
        found = serve(simulated, row, row.loop, observer=totals)
    except ValueError as error:
        return SimulatedRow(row=row, simulated=None, skipped=str(error))
    late_s = profile.first_token_steps * found.tpot_s
    found = dataclasses.replace(found, ttft_s=found.ttft_s + late_s)
    return SimulatedRow(
        row=row,
        simulated=found,
        profile=profile.name,
        is_too_fast=row.tpot_s < _least_tpot_s(simulation, row, simulated.deployment),
        tpot_terms=_tpot_terms(totals, simulated.deployment, found.tpot_s),
    )


def simulate_rows(
    tasks: Sequence[RowTask], workers: Mapper, progress: ProgressLines
) -> list[SimulatedRow]:
    """Return what the simulation says of each row, in the order of `tasks`.

    Loops of many clients take longest, so they come first and no worker ends late.
    """
    order = sorted(range(len(tasks)), key=lambda i: -_work(tasks[i].row))
    found: dict[int, SimulatedRow] = {}
    progress.step("rows", 0, len(tasks))
    results = workers(simulate_row, [tasks[i] for i in order])
    for i, result in zip(order, results, strict=True):
        found[i] = result
        progress.step("rows", len(found), len(tasks))
    return [found[i] for i in range(len(tasks))]


def _work(row: MeasuredRow) -> int:
    return row.loop.clients * row.output_tokens if row.loop else 0


def term_totals(simulation: Simulation, deployment: Deployment) -> TermTotals:
    """Return an observer that sums the terms of a run's steps."""
    costs = [
        simulation.cost.instance(spec.parallelism) for spec in deployment.instances
    ]
    return TermTotals([cost for cost in costs if isinstance(cost, RooflineInstance)])


def _tpot_terms(
    totals: TermTotals, deployment: Deployment, tpot_s: float
) -> tuple[float, ...]:
    """Return the mean TPOT by terms: its time consists of them as all steps' time does.

    Of prefill and decode instances the decodes' steps count.
    """
    instances = deployment.of(Role.DECODE, Role.COLOCATED)
    sums = np.sum([totals.of(i) for i in instances], axis=0)
    busy_s = sum(sum(totals.seconds(i).values()) for i in instances)
    return tuple((sums * (tpot_s / busy_s)).tolist())


def _least_tpot_s(
    simulation: Simulation, row: MeasuredRow, deployment: Deployment
) -> float:
    """Return the seconds of a decode step on a device that reaches its peaks.

    How many requests decode together follows from the measured latencies, by Little's
    law. With speculative decoding a step makes several tokens, so that the time of a
    token may be below that of a step.
    """
    decoders = deployment.of(Role.DECODE, Role.COLOCATED)
    decode_s = (row.output_tokens - 1) * row.tpot_s
    share = decode_s / (row.ttft_s + decode_s)
    clients = row.loop.clients if row.loop else 1
    spec = deployment.instances[decoders[0]]
    # On stages as many batches are under way, one after the other.
    batch = max(1, int(clients * share / len(decoders) / spec.parallelism.pp))
    context = row.prompt_tokens + row.output_tokens // 2
    ideal = get_hardware(row.hardware).ideal()
    cost = RooflineCost(model=simulation.model, hardware=ideal)
    load = StepLoad((), batch, batch * context)
    return sum(cost.instance(spec.parallelism).stages_s(load))


def serve(
    simulated: SimulatedDeployment,
    row: MeasuredRow,
    loop: Loop,
    *,
    effort: Effort = STANDARD,
    observer: Observer | None = None,
) -> MeanLatencies:
    """Simulate a row's closed loop.

    Raises:
      ValueError: if a request would never be served.
    """
    client = client_of(row)
    n = effort.rounds(client, loop.clients) * loop.clients
    asked = client.requests(row, n, effort.seed)
    closed = ClosedLoop(asked, loop.clients)
    latencies_s = np.empty((n, 2))

    def follow(
        now_s: float, timelines: Sequence[Timeline], ended: Sequence[Timeline]
    ) -> list[Request]:
        for timeline in ended:
            if timeline.error:
                raise ValueError(timeline.error)
            latencies_s[timeline.request.id] = ttft_s(timeline), tpot_s(timeline)
            timeline.token_s.clear()  # thousands of clients would fill the memory
        return closed(now_s, timelines, ended)

    simulated.run(closed.first(), followers=follow, observer=observer)
    parts = np.split(latencies_s, [loop.clients, -loop.clients])
    means = [part.mean(axis=0) for part in parts]
    ttft, tpot = np.average(means, axis=0, weights=client.weights).tolist()
    return MeanLatencies(ttft_s=ttft, tpot_s=tpot)
