"""What a measured row describes, simulated as it was measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

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
    FixedLengths,
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
class Rounds:
    """How a closed loop is simulated, and which of its requests count.

    Each client's first request has a part of its output alone, each client another
    part, as if it had begun before: the loop is at once in the state that clients drift
    into who start together. The first and the last request of each client are left out.

    Attributes:
      rounds: requests of each client.
      least: requests in all, for loops of few clients.
      most: requests in all, but for at least three of each client.
      shortest: the shortest output, as a share of the longest.
    """

    rounds: int = 5
    least: int = 32
    most: int = 20_000
    shortest: float = 0.8
    seed: int = 0

    def count(self, clients: int) -> int:
        """Return how many requests are simulated."""
        wanted = max(self.rounds * clients, self.least + 2 * clients)
        return max(min(wanted, self.most), 3 * clients)

    def is_shortened(self, clients: int) -> bool:
        """Return whether so many clients have fewer than `rounds` requests each."""
        return self.count(clients) < self.rounds * clients

    def requests(self, row: MeasuredRow, clients: int) -> list[Request]:
        """Return the requests in the order in which they are sent."""
        longest = row.output_tokens
        lengths = UniformLengths(
            low=max(1, round(self.shortest * longest)), high=longest
        )
        workload = RandomWorkload(
            prompt=FixedLengths(tokens=row.prompt_tokens), output=lengths
        )
        # The rate does not matter: requests are sent when others end.
        asked = workload.requests(self.count(clients), 1.0, self.seed)
        for i, request in enumerate(asked[:clients]):
            left = max(1, round(request.max_tokens * (i + 1) / clients))
            asked[i] = dataclasses.replace(request, max_tokens=left)
        return asked


STANDARD = Rounds()


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
        found = serve(simulated, row, row.loop.clients)
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
    clients: int,
    rounds: Rounds = STANDARD,
    observer: Observer | None = None,
) -> MeanLatencies:
    """Simulate a row's closed loop.

    Raises:
      ValueError: if a request would never be served.
    """
    asked = rounds.requests(row, clients)
    loop = ClosedLoop(asked, clients)
    latencies_s: dict[int, tuple[float, float]] = {}  # by the requests' ids

    def follow(
        now_s: float, timelines: Sequence[Timeline], ended: Sequence[Timeline]
    ) -> list[Request]:
        for timeline in ended:
            if timeline.error:
                raise ValueError(timeline.error)
            latencies_s[timeline.request.id] = ttft_s(timeline), tpot_s(timeline)
            timeline.token_s.clear()  # thousands of clients would fill the memory
        return loop(now_s, timelines, ended)

    simulated.run(loop.first(), followers=follow, observer=observer)
    counted = [latencies_s[request.id] for request in asked[clients:-clients]]
    ttfts_s, tpots_s = zip(*counted, strict=True)
    return MeanLatencies(
        ttft_s=statistics.fmean(ttfts_s), tpot_s=statistics.fmean(tpots_s)
    )
