"""How fast the simulator is: one JSON line for each workload.

    python -m experiments.simulator_speed
    python -m experiments.simulator_speed --golden=../shared/golden/simdistserve
    python -m experiments.simulator_speed --instances=2,16,128,1024,2048
    python -m experiments.simulator_speed --pools=1,2,ray

Each line has `requests_per_cpu_s`: requests over the CPU seconds of drawing nothing,
simulating everything (block accounting and preemption included) and taking the metrics
of every request and the gaps between all its tokens. The best of `--repeats` runs
counts, since other work on the machine only slows one down.

The golden workloads are simdistserve's (the same files and rules), and every TTFT and
TPOT is compared with its results in the same run: `worst_difference_ms`. simdistserve
does about 670 requests/CPU-s, Vidur 535-649, splitwise-sim 304-1841 and 60 when
overloaded (each with its own command). `saturated` offers twice what its deployment can
serve.

With `--instances` it measures how the speed depends on the size of a fleet instead: for
each number of instances a line with half of them for prefill and half for decode, and a
line with all colocated, at 8 requests/s an instance. N = max(2000, 20 x instances).

With `--pools` it measures workers instead, a line each: seconds to start them, the
milliseconds that a task costs which does nothing, and the seconds of 16 runs of 3,000
requests. Runs of all pools must be equal.

A checkout runs its source. To measure a compiled core, install one where nothing else
is, and run it from there:

    DISAGG_JAX_COMPILE=1 pip install --no-deps --target=/tmp/compiled .
    ln -s "$PWD/experiments" /tmp/compiled/
    cd /tmp/compiled && python -m experiments.simulator_speed --golden=FOLDER
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.errors import require
from disagg_jax.metrics import pooled_itl_s, stages_s, tpot_s, ttft_s
from disagg_jax.request import Request, Timeline
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.run import SimulationTask, run_task
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.workload import RandomWorkload, UniformLengths
from experiments.cli.command import command
from experiments.cli.flags import Flags, expect_used, integers
from experiments.cli.workers import Workers, open_workers, parse_workers
from experiments.configs.named_simulations import get_simulation, trace_requests
from experiments.configs.paper_workloads import get_workload

FLAGS = Flags()
_GOLDEN = FLAGS.string(
    "golden", "../shared/golden/simdistserve", "Folder of simdistserve's results."
)
_REPEATS = FLAGS.integer("repeats", 3, "Runs; the fastest counts.")
_INSTANCES = FLAGS.list(
    "instances", [], "Numbers of instances, for the speed of fleets of these sizes."
)
_POOLS = FLAGS.list(
    "pools", [], "Workers to compare, as --workers takes them elsewhere."
)

# simdistserve's file -> the deployment it was made with.
GOLDEN_RUNS = {
    "fixed512x64__disagg-p11-d11__rate4": "prefill:tp1,decode:tp1",
    "fixed512x64__vllm-11__rate2": "colocated:tp1",
    "sharegptlike__disagg-p11-d11__rate5": "prefill:tp1,decode:tp1",
    "sharegptlike__disagg-p21-d11__rate3": "prefill:tp2,decode:tp1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedWorkload:
    """Requests, what serves them, and what is known of the result."""

    name: str
    simulated: SimulatedDeployment
    requests: Sequence[Request]
    instances: int = 0  # of a fleet
    worst_difference_ms: Callable[[Sequence[Timeline]], float] | None = None


def workloads(golden: pathlib.Path) -> Iterator[SpeedWorkload]:
    """The golden workloads, as far as their files are there, and a saturated one."""
    simulation = get_simulation("simdistserve_opt13b")
    for name, deployment in GOLDEN_RUNS.items():
        path = golden / f"{name}.csv"
        if not path.exists():
            print(f"{path} is missing: left out", file=sys.stderr)
            continue
        yield SpeedWorkload(
            name=name,
            simulated=simulation.build(Deployment.parse(deployment)),
            requests=trace_requests(str(path), simulation),
            worst_difference_ms=_compare(path),
        )
    for name in ("prefill:tp1,decode:tp1", "2xcolocated:tp1"):
        yield SpeedWorkload(
            name=f"saturated {name}",
            simulated=get_simulation("opt13b_a100").build(Deployment.parse(name)),
            requests=get_workload("fixed:512x64").requests(3000, 20.0, seed=0),
        )


def fleets(sizes: Sequence[int]) -> Iterator[SpeedWorkload]:
    """Yield fleets of so many instances, each with 8 requests/s an instance.

    Raises:
      ValueError: on a fleet of fewer than two instances.
    """
    for size in sizes:
        require(size >= 2, "instances: expected at least 2", size)
    for size in sizes:
        half = size // 2
        for system, text in (
            ("disaggregated", f"{half}xprefill:tp1,{size - half}xdecode:tp1"),
            ("vllm_v0", f"{size}xcolocated:tp1"),
        ):
            deployment = Deployment.parse(text)
            yield SpeedWorkload(
                name=f"fleet {deployment}",
                instances=size,
                simulated=SimulatedDeployment(
                    deployment=deployment,
                    policies=SYSTEMS[system],
                    memory=(_FLEET_MEMORY,) * size,
                    cost=_FLEET_COST,
                ),
                requests=_FLEET_WORKLOAD.requests(
                    max(2000, 20 * size), 8.0 * size, seed=0
                ),
            )


_FLEET_WORKLOAD = RandomWorkload(
    prompt=UniformLengths(low=256, high=768), output=UniformLengths(low=32, high=96)
)
# Far from saturated, so that speed does not depend on queues.
_FLEET_MEMORY = KVMemory(num_blocks=4000, block_tokens=16, max_context=2048)
_FLEET_COST = LinearCost(
    step_base_s=5e-3,
    prefill_token_s=2e-5,
    decode_token_s=2e-5,
    context_token_s=1e-8,
    transfer_base_s=1e-4,
    transfer_token_s=1e-6,
)


def _compare(path: pathlib.Path) -> Callable[[Sequence[Timeline]], float]:
    """The largest difference of any request's TTFT or TPOT from those in a file."""
    with path.open() as file:
        theirs = [
            (float(row["ttft_ms"]), float(row["tpot_ms"]))
            for row in csv.DictReader(file)
        ]

    def worst_ms(timelines: Sequence[Timeline]) -> float:
        ours = [(ttft_s(t) * 1000, tpot_s(t) * 1000) for t in timelines]
        return float(np.abs(np.array(ours) - np.array(theirs)).max())

    return worst_ms


def measure(workload: SpeedWorkload, repeats: int) -> dict[str, Any]:
    """The line of one workload."""
    runs = [_cpu_s(workload) for _ in range(repeats)]
    cpu_s = min(seconds for seconds, _ in runs)
    timelines = runs[0][1]
    line: dict[str, Any] = {
        "workload": workload.name,
        "deployment": str(workload.simulated.deployment),
        "requests_per_cpu_s": len(timelines) / cpu_s,
        "requests": len(timelines),
        "tokens": sum(len(t.token_s) for t in timelines),
        "cpu_s": cpu_s,
    }
    if workload.instances:
        line["instances"] = workload.instances
    if workload.worst_difference_ms is not None:
        line["worst_difference_ms"] = workload.worst_difference_ms(timelines)
    return line


def _cpu_s(workload: SpeedWorkload) -> tuple[float, list[Timeline]]:
    gc.collect()  # what others left behind is not this run's work
    start_s = time.process_time()
    timelines = workload.simulated.run(workload.requests).timelines
    latencies_s = [(ttft_s(t), tpot_s(t), stages_s(t)) for t in timelines]
    np.percentile(pooled_itl_s(timelines), (50, 90, 99))
    assert len(latencies_s) == len(workload.requests)
    return time.process_time() - start_s, timelines


# -- pools -----------------------------------------------------------------------------

_EMPTY_TASKS = 500
_POOL_RUNS = 16


def pool_line(workers: Workers, tasks: Sequence[SimulationTask]) -> dict[str, Any]:
    """Return the line of one kind of workers, with a digest of the results."""
    start_s = time.perf_counter()
    with open_workers(workers) as mapper:
        list(mapper(abs, [0]))
        begun_s = time.perf_counter()
        list(mapper(abs, range(_EMPTY_TASKS)))
        empty_s = time.perf_counter()
        found = list(mapper(run_task, tasks))
        end_s = time.perf_counter()
    return {
        "workers": workers,
        "start_s": begun_s - start_s,
        "task_ms": (empty_s - begun_s) / _EMPTY_TASKS * 1e3,
        "runs": len(tasks),
        "runs_s": end_s - empty_s,
        "results": hashlib.sha256(repr(found).encode()).hexdigest()[:16],
    }


def pool_tasks(num_requests: int = 3000) -> list[SimulationTask]:
    """Return the runs that pools are compared by."""
    deployment = Deployment.parse("prefill:tp1,decode:tp1")
    return [
        SimulationTask(
            simulated=get_simulation("opt13b_a100").build(deployment),
            workload=get_workload("fixed:512x64"),
            rate_rps=4.0,
            num_requests=num_requests,
            seed=seed,
        )
        for seed in range(_POOL_RUNS)
    ]


def report_pools(pools: Sequence[Workers], tasks: Sequence[SimulationTask]) -> None:
    """Print a line of each pool; results that differ end the program."""
    results: set[str] = set()
    for workers in pools:
        line = pool_line(workers, tasks)
        print(json.dumps(line), flush=True)
        results.add(line["results"])
    if len(results) > 1:
        sys.exit("error: workers of different kinds gave different results")


@command(FLAGS)
def main() -> None:
    sizes = integers("instances", _INSTANCES.value)
    pools = [parse_workers(text) for text in _POOLS.value]
    expect_used(not sizes, _GOLDEN, expected="no --instances", got="--instances")
    if pools:
        others = (_GOLDEN, _INSTANCES, _REPEATS)
        expect_used(False, *others, expected="no --pools", got="--pools")
        report_pools(pools, pool_tasks())
        return
    golden = pathlib.Path(_GOLDEN.value)
    report(fleets(sizes) if sizes else workloads(golden), _REPEATS.value)


def report(found: Iterable[SpeedWorkload], repeats: int) -> None:
    """Prints the lines; a result that is not the golden one ends the program."""
    for workload in found:
        line = measure(workload, repeats)
        print(json.dumps(line), flush=True)
        if line.get("worst_difference_ms", 0.0) > 1e-6:
            sys.exit(f"error: {workload.name} is not simdistserve's result")


if __name__ == "__main__":
    main()
