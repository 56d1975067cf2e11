"""Cases, and what became of their requests."""

import dataclasses
import math

import pytest

from disagg_jax.deployment import Deployment, Role
from disagg_jax.metrics import SLO
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.sim import Simulation
from experiments.simulated.served import list_cases
from tests.serving import make_request

SIMULATION = Simulation.of("llama-3-8b", "h100", max_context=10_000)
PAIR, TWO = map(Deployment.parse, ("prefill:tp1pp2,decode:tp1", "2xcolocated:tp1"))
THREE = [make_request(i, arrival_s=1.0 + i, prompt=100, out=5) for i in range(3)]


def only(deployment, requests, rate_rps=None, simulation=SIMULATION):
    (case,) = list_cases(simulation, [deployment], {rate_rps: requests})
    return case


def test_a_case_for_each_deployment_and_rate():
    cases = list_cases(SIMULATION, [PAIR, TWO], {2.0: THREE, 0.25: THREE})
    assert [(case.name, case.offered_rps) for case in cases] == [
        ("prefill-tp1pp2_decode-tp1_2.0rps", 2.0),
        ("prefill-tp1pp2_decode-tp1_0.25rps", 0.25),
        ("2xcolocated-tp1_2.0rps", 2.0),
        ("2xcolocated-tp1_0.25rps", 0.25),
    ]


def test_a_traces_own_rate_is_that_of_its_arrivals():
    case = only(TWO, THREE)
    assert (case.name, case.offered_rps) == ("2xcolocated-tp1_own-times", 1.0)
    assert only(TWO, THREE[:1]).offered_rps is None


def test_a_case_names_the_system_that_serves():
    """By the policies of the roles that are there; unlisted ones by their own names."""
    assert [only(d, THREE).system for d in (PAIR, TWO)] == ["disaggregated", "vllm_v0"]
    few = {**SIMULATION.policies, Role.DECODE: DecodeOnly(max_seqs=3)}
    changed = dataclasses.replace(SIMULATION, policies=few)
    assert only(PAIR, THREE, simulation=changed).system == "PrefillOnly+DecodeOnly"
    assert only(TWO, THREE, simulation=changed).system == "vllm_v0"


def test_one_deployment_twice_is_refused():
    same = Deployment.parse("1xcolocated:tp1,colocated:tp1")
    with pytest.raises(ValueError, match="--deployment: expected different ones, got"):
        list_cases(SIMULATION, [TWO, same], {None: THREE})


def test_refusals_are_counted_by_their_limit():
    """KV memory of 96 tokens: 100 are too many; 10,001 are beyond the context."""
    cost = dataclasses.replace(SIMULATION.cost, kv_tokens=lambda _: 96)
    small = dataclasses.replace(SIMULATION, cost=cost)
    requests = [
        make_request(i, arrival_s=float(i), prompt=prompt, out=5)
        for i, prompt in enumerate((20, 100, 9_996, 30))
    ]
    for deployment in (TWO, PAIR):
        served = only(deployment, requests, simulation=small).serve()
        assert served.refused == {"context": 1, "KV memory": 1}
        assert "KV blocks" in served.run.timelines[1].error
        assert "tokens" in served.run.timelines[2].error


def test_a_summary_has_vllms_keys_and_what_was_busy():
    served = only(PAIR, THREE, 2.0).serve()
    summary = served.summary(SLO(ttft_s=1.0, tpot_s=math.inf))
    # Of `vllm bench serve`'s result file.
    vllms = {
        *("request_rate", "duration", "num_prompts", "completed", "failed"),
        *("total_input_tokens", "total_output_tokens", "request_throughput"),
        *("output_throughput", "total_token_throughput", "mean_ttft_ms"),
        *("median_tpot_ms", "std_itl_ms", "p99_ttft_ms"),
    }
    assert vllms <= summary.keys()
    assert summary["slo"] == {"type": "SLO", "ttft_s": 1.0, "tpot_s": None}
    assert (summary["num_prompts"], summary["completed"]) == (3, 3)
    prefill, decode = summary["busy_instances"]
    assert (prefill["instance"], len(prefill["stages"])) == ("prefill:tp1pp2", 2)
    for stage in prefill["stages"]:
        assert stage["prefill"] > 0 == stage["mixed"]
        assert stage["decode"] == pytest.approx(0, abs=1e-12)
    (stage,) = decode["stages"]
    assert stage["decode"] > 0 == stage["prefill"]
    # Three transfers over the one link into instance 1.
    moved_s = sum(t.transfer_end_s - t.transfer_start_s for t in served.run.timelines)
    share = summary["busy_links"].pop("into instance 1")
    assert summary["busy_links"] == {}
    assert share == pytest.approx(moved_s / served.run.end_s)


def test_another_observer_sees_the_run_and_changes_nothing():
    turns = []
    case = only(PAIR, THREE)
    served = case.serve(lambda now_s, events, works: turns.append(now_s))
    assert turns[-1] == served.run.end_s
    alone = case.simulated.run(THREE)
    assert [t.token_s for t in served.run.timelines] == [
        t.token_s for t in alone.timelines
    ]
