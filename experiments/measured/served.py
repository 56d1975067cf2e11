"""What a measured row describes, simulated as it was measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from disagg_jax.control.loop import Observer
from disagg_jax.deployment import Deployment, Role
from disagg_jax.errors import require
from disagg_jax.metrics import tpot_s, ttft_s
from disagg_jax.request import Request, Timeline
from disagg_jax.scheduling import get_system
from disagg_jax.scheduling.interface import Policy
from disagg_jax.sim import SimulatedDeployment, Simulation
from disagg_jax.sim.hardware import get_hardware
from disagg_jax.sim.hardware.memory import Partition
from disagg_jax.workload import (
    ClosedLoop,
    RandomWorkload,
    UniformLengths,
)
from experiments.measured.rows import Loop, MeasuredRow
from models.config import ModelConfig

# An engine's steps by default. SGLang computes waiting prompts first; TensorRT-LLM and
# vLLM put chunks of them beside decodes.
_STEP_TOKENS = 8192
_SYSTEMS = {"sglang": "vllm_v0", "trtllm": "sarathi_serve", "vllm": "sarathi_serve"}
_HARDWARE = {"h100_sxm": "h100", "h200_sxm": "h200", "a100_sxm": "a100-80g"}


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
class SimulatedRow:
    """A measured row, and what its simulation says."""

    row: MeasuredRow
    simulated: MeanLatencies | None  # None where it was skipped
    skipped: str = ""  # the reason
    # The measured TPOT is below the time in which memory gives what one token needs.
    is_too_fast: bool = False

    @property
    def latencies(self) -> tuple[MeanLatencies, MeanLatencies]:
        """Return the measured and the simulated latencies of a row not skipped."""
        if self.simulated is None:
            raise RuntimeError(f"row {self.row.id} was skipped: {self.skipped}")
        measured = MeanLatencies(ttft_s=self.row.ttft_s, tpot_s=self.row.tpot_s)
        return measured, self.simulated


def simulation_of(row: MeasuredRow, loop: Loop) -> Simulation:
    """Return the simulation of a row's model, engine and devices.

    Raises:
      ValueError: if the model, its precision, the devices or the engine are unknown.
    """
    known = sorted(_HARDWARE)
    require(row.hardware in known, f"system: expected one of {known}", row.hardware)
    require(row.gemm == row.experts == "bf16", "precision: expected bf16", row.gemm)
    return Simulation.of(
        row.model,
        _HARDWARE[row.hardware],
        policies=_policies(row.engine, loop.clients),
        max_context=row.prompt_tokens + row.output_tokens,
    )


def _policies(engine: str, clients: int) -> Mapping[Role, Policy]:
    """Return the policies of an engine that was started for so many clients."""
    known = sorted(_SYSTEMS)
    require(engine in known, f"backend: expected one of {known}", engine)
    seqs = min(clients, _STEP_TOKENS)
    budget = "max_batched_tokens" if engine == "sglang" else "token_budget"
    colocated = {budget: _STEP_TOKENS, "max_seqs": seqs}
    return {
        **get_system(_SYSTEMS[engine], colocated=colocated),
        **get_system(
            "disaggregated",
            prefill={"token_budget": _STEP_TOKENS},
            decode={"max_seqs": seqs},
        ),
    }


def simulate_row(row: MeasuredRow) -> SimulatedRow:
    """Simulate a row, or say why it cannot be simulated."""
    if row.loop is None:
        return SimulatedRow(row=row, simulated=None, skipped=row.skipped)
    try:
        simulation = simulation_of(row, row.loop)
        simulated = simulation.build(row.loop.deployment)
        found = serve(simulated, row, row.loop)
    except ValueError as error:
        return SimulatedRow(row=row, simulated=None, skipped=str(error))
    least_s = least_tpot_s(simulation.model, row, simulated.deployment)
    return SimulatedRow(row=row, simulated=found, is_too_fast=row.tpot_s < least_s)


def least_tpot_s(model: ModelConfig, row: MeasuredRow, deployment: Deployment) -> float:
    """Return the seconds in which memory at its peak gives what a decode step reads.

    It reads all weights, and the KV of the requests that decode together. How many do
    follows from the measured latencies, by Little's law. With speculative decoding a
    step makes several tokens, so that the time of a token may be below that of a step.
    """
    decoders = deployment.of(Role.DECODE, Role.COLOCATED)
    spec = deployment.instances[decoders[0]]
    partition = Partition(model, spec.parallelism)
    decode_s = (row.output_tokens - 1) * row.tpot_s
    share = decode_s / (row.ttft_s + decode_s)
    clients = row.loop.clients if row.loop else 1
    batch = max(1.0, clients * share / len(decoders))
    context = row.prompt_tokens + row.output_tokens / 2
    weights = (model.layers * model.layer_bytes + model.table_bytes) / spec.tp
    kv = batch * context * model.kv_bytes_per_token / partition.kv_shards
    return (weights + kv) / get_hardware(_HARDWARE[row.hardware]).hbm_bytes_s


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
