"""Sarathi-Serve's figures: its two ideas apart, and its definition of capacity."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from disagg_jax.request import Request, Status, Timeline
from disagg_jax.search.goodput import find_goodput
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.work import StepLoad
from experiments.configs.paper_workloads import get_workload
from experiments.papers import sarathi_serve
from experiments.papers.figure import Lab
from experiments.papers.sarathi_serve import Latencies, TwoPasses, ordering


def test_two_passes_share_nothing():
    # A pass: 1 s, a prompt token .01 s, a decode .1 s, a token of context .001 s.
    cost = LinearCost(
        step_base_s=1.0,
        prefill_token_s=0.01,
        decode_token_s=0.1,
        context_token_s=0.001,
    )
    apart = TwoPasses(cost=cost)
    mixed = StepLoad(((0, 50),), 2, 300)
    assert cost.stages_s(0, mixed) == pytest.approx((1 + 0.5 + 0.2 + 0.3,))
    assert apart.stages_s(0, mixed) == pytest.approx((2 + 0.5 + 0.2 + 0.3,))
    for alone in (dataclasses.replace(mixed, chunks=()), StepLoad(((0, 50),), 0, 0)):
        assert apart.stages_s(0, alone) == cost.stages_s(0, alone)


def test_the_order_of_the_ablation_is_the_papers():
    found = sarathi_serve.run_ablation(
        Lab(num_requests=48, seeds=2, workers=1), sarathi_serve._CHAT
    )
    for field, expected in (
        ("ttft_p50_s", "hybrid-only < both < chunked-only"),
        ("tbt_p99_s", "both < chunked-only < hybrid-only"),
    ):
        means = {
            name: statistics.mean(getattr(run, field) for run in runs)
            for name, runs in found.items()
        }
        assert ordering(means) == expected


def timeline(arrival_s: float, start_s: float, *token_s: float) -> Timeline:
    return Timeline(
        request=Request(id=0, arrival_s=arrival_s, prompt_tokens=1, max_tokens=2),
        status=Status.FINISHED,
        prefill_start_s=start_s,
        decode_start_s=token_s[0],
        token_s=list(token_s),
    )


def test_latencies_by_hand():
    # TTFTs 2, 8 and 3; gaps 1, 1, 3 and 5 s, whose P99 is .97 of the way from 3 to 5.
    found = sarathi_serve.latencies(
        [timeline(0, 1, 2, 3, 4, 7), timeline(1, 5, 9, 14), timeline(0, 0, 3)]
    )
    assert found == Latencies(ttft_p50_s=3, tbt_p99_s=pytest.approx(3 + 0.97 * 2))


def test_sarathi_serve_has_the_capacity_and_its_tokens_are_in_time():
    case = ("Mistral-7B", sarathi_serve._CHAT, True)
    searches = sarathi_serve._searches(Lab(num_requests=96, seeds=1), case)
    rates = {name: find_goodput(asked).rps for name, asked in searches.items()}
    assert rates["Sarathi-Serve"] > 1.5 * rates["vLLM"] > 0
    assert rates["Sarathi-Serve"] > 1.5 * rates["Orca"] > 0


def test_lengths_have_the_published_quantiles():
    requests = get_workload("openchat_sharegpt4").requests(4000, 1.0, seed=0)
    prompts = statistics.quantiles([r.prompt_tokens for r in requests], n=10)
    outputs = statistics.quantiles([r.max_tokens for r in requests], n=10)
    assert (prompts[4], outputs[4]) == pytest.approx((1730, 415), rel=0.06)
    assert (prompts[8], outputs[8]) == pytest.approx((5696, 834), rel=0.06)
    assert max(r.prompt_tokens + r.max_tokens for r in requests) <= 8192
