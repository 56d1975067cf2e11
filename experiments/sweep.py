"""The goodput sweep: every system at every rate with every seed, and what it shows."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax import metrics
from disagg_jax.metrics import SLO, Interval
from disagg_jax.request import Status, Timeline
from disagg_jax.search import GoodputEstimate, estimate, search
from disagg_jax.summary import summarise
from experiments.config import Config
from experiments.run_dir import Point, RunDir
from experiments.serving import Model, Progress, RequestSource, Server

RATIO_BASE = "vllm"  # ratios are over this system, where it takes part


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs points that are not done yet, and reads those that are."""

    config: Config
    model: Model
    source: RequestSource
    servers: Mapping[str, Server]
    step_times: Mapping[str, float]
    slo: SLO
    run_dir: RunDir
    progress: Progress

    def run(self) -> dict[str, Any]:
        """Searches each system's goodput and returns the summary."""
        rates: dict[str, list[float]] = {}
        for name, server in self.servers.items():
            tried: list[float] = []
            devices = server.deployment.devices
            if self.config.rates:
                for rate in self.config.rates:
                    self._attainments(name, rate * devices, tried)
            else:
                search(
                    lambda rate, name=name, tried=tried: self._attainments(
                        name, rate, tried
                    ),
                    self._start_rps(),
                    self.config.search,
                )
            rates[name] = sorted(tried)
        self.run_dir.write_requests(
            Point(name, rate, replica)
            for name, tried in rates.items()
            for rate in tried
            for replica in range(self.config.num_seeds)
        )
        return self._summary(rates)

    def _start_rps(self) -> float:
        """Where all searches begin: half of what the devices could do if always busy.

        The estimate is that of the first system, so that all try the same rates first.
        """
        server = next(iter(self.servers.values()))
        requests = self.source(1.0, 0)
        decode_s, rows = server.decode_s(self.step_times)
        busy_s = statistics.mean(
            server.prefill_s(request.prompt_tokens, self.step_times)
            + request.max_tokens * decode_s / rows
            for request in requests
        )
        return float(f"{0.5 * server.deployment.devices / busy_s:.3g}")

    def _attainments(self, name: str, rate: float, tried: list[float]) -> list[float]:
        rate = float(f"{rate:.4g}")
        if rate not in tried:
            tried.append(rate)
        points = [Point(name, rate, i) for i in range(self.config.num_seeds)]
        values = [self._point(point)["attainment"] for point in points]
        per_device = rate / self.servers[name].deployment.devices
        self.progress(
            f"{name:>14}  {per_device:8.2f} requests/s per device: "
            f"attainment {statistics.mean(values):6.1%}  "
            f"({', '.join(f'{value:.0%}' for value in values)})"
        )
        return values

    def _point(self, point: Point) -> dict[str, Any]:
        if not self.run_dir.has(point):
            server = self.servers[point.system]
            run = server.run(
                self.source(point.rate_rps, point.replica), self.step_times
            )
            devices = server.deployment.devices
            found: dict[str, Any] = {
                **summarise(run.timelines, self.slo, devices),
                "steady": metrics.is_steady(run.timelines),
            }
            rows = [self._request_row(timeline) for timeline in run.timelines]
            self.run_dir.save(point, found, rows, run.log.lines)
        return self.run_dir.load(point)

    def _request_row(self, timeline: Timeline) -> dict[str, Any]:
        request = timeline.request
        row: dict[str, Any] = {
            "request_id": request.id,
            "status": str(timeline.status),
            "arrival_s": request.arrival_s,
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": len(timeline.token_s),
            "preemptions": timeline.preemptions,
            "transfer_bytes": timeline.transfer_bytes,
            "token_s": timeline.token_s,
            "tokens": timeline.tokens,
        }
        if timeline.status is Status.FINISHED:
            row |= {
                "ttft_s": metrics.ttft_s(timeline),
                "tpot_s": metrics.tpot_s(timeline),
                "e2e_s": metrics.e2e_s(timeline),
                **dataclasses.asdict(metrics.stages_s(timeline)),
                "meets_slo": metrics.meets(timeline, self.slo),
            }
        else:
            row["error"] = timeline.error
        if self.config.weights != "random":
            row["text"] = self.model.tokenizer.decode(timeline.tokens)
        return row

    # -- summary ------------------------------------------------------------------

    def _summary(self, rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        systems = {name: self._system(name, tried) for name, tried in rates.items()}
        return {
            "model": self.config.model,
            "clock": self.config.clock,
            "durations": "live"
            if self.config.clock == "wall"
            else self.config.durations,
            "slo": dataclasses.asdict(self.slo),
            "target": self.config.search.target,
            "num_requests": self.config.workload.num_requests,
            "num_seeds": self.config.num_seeds,
            "systems": systems,
            "ratios": _ratios(systems),
        }

    def _system(self, name: str, rates: Sequence[float]) -> dict[str, Any]:
        devices = self.servers[name].deployment.devices
        runs = {
            rate: [
                self.run_dir.load(Point(name, rate, replica))
                for replica in range(self.config.num_seeds)
            ]
            for rate in rates
        }
        found = estimate(
            {
                rate: [run["attainment"] for run in points]
                for rate, points in runs.items()
            },
            self.config.search.target,
        )
        return {
            "deployment": self.servers[name].system.deployment,
            "devices": devices,
            "goodput": _goodput(found, runs, devices),
            "points": [_point_row(rate, points) for rate, points in runs.items()],
        }


def _goodput(
    found: GoodputEstimate, runs: Mapping[float, Sequence[dict[str, Any]]], devices: int
) -> dict[str, Any]:
    def per_device(value: float | None) -> float | None:
        return None if value is None else value / devices

    at_pass = runs[found.pass_rps] if found.pass_rps else None
    return {
        "max_goodput_rate_per_device": {
            key: per_device(value)
            for key, value in dataclasses.asdict(found.interval).items()
        },
        "per_seed_rps_per_device": [rate / devices for rate in found.per_seed_rps],
        "pass_rps_per_device": per_device(found.pass_rps),
        "fail_rps_per_device": per_device(found.fail_rps),
        "bracketed": found.bracketed,
        "resolved": found.resolved,
        "steady": all(run["steady"] for run in at_pass) if at_pass else None,
        "at_pass_rate": _mean_metrics(at_pass) if at_pass else None,
    }


def _point_row(rate: float, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def across(key: str) -> dict[str, float | None]:
        interval: Interval = metrics.interval_across([run[key] for run in runs])
        return dataclasses.asdict(interval)

    return {
        "request_rate": rate,
        "request_rate_per_device": rate / runs[0]["devices"],
        **{
            key: across(key)
            for key in ("attainment", "attainment_ttft", "attainment_tpot")
        },
        "steady": all(run["steady"] for run in runs),
        "metrics": _mean_metrics(runs),
    }


def _mean_metrics(runs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Each metric's mean over the seeds; None where a run lacks it."""
    means: dict[str, float | None] = {}
    for key, value in runs[0].items():
        if isinstance(value, bool):
            continue
        values = [run[key] for run in runs]
        means[key] = None if None in values else statistics.mean(values)
    return means


def _ratios(systems: Mapping[str, Any]) -> dict[str, Any]:
    """Goodput of each system over the base's, paired by seed."""
    if RATIO_BASE not in systems:
        return {}
    base = systems[RATIO_BASE]["goodput"]["per_seed_rps_per_device"]
    ratios: dict[str, Any] = {}
    for name, system in systems.items():
        rates = system["goodput"]["per_seed_rps_per_device"]
        if name == RATIO_BASE or not all(base):
            continue
        paired = [rate / other for rate, other in zip(rates, base, strict=True)]
        interval = dataclasses.asdict(metrics.interval_across(paired))
        ratios[f"{name}/{RATIO_BASE}"] = {**interval, "per_seed": paired}
    return ratios
