"""The closed loop of a measured row: lengths, what counts, and its limits."""

import dataclasses
import math

import numpy as np
import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.metrics import tpot_s, ttft_s
from disagg_jax.workload import ClosedLoop
from experiments.measured.served import (
    FIXED,
    INFERENCEX,
    Effort,
    least_tpot_s,
    serve,
    simulate_row,
    simulation_of,
)
from models.lookup import find_model
from tests.experiments.measured.measurements import DUMP, fields, read_one, workers
from tests.sim.test_simulated_deployment import simulated

EVERY = Effort(requests=10_000, counted=0)


def test_lengths_of_clients(tmp_path):
    row = read_one(tmp_path, fields(isl=100, osl=50))
    drawn = INFERENCEX.requests(row, 2000, seed=0)
    for lengths, longest in (
        ([r.prompt_tokens for r in drawn], 100),
        ([r.max_tokens for r in drawn], 50),
    ):
        assert (min(lengths), max(lengths)) == (0.8 * longest, longest)
        assert np.mean(lengths) == pytest.approx(0.9 * longest, rel=0.01)
    fixed = FIXED.requests(row, 20, seed=0)
    assert {(r.prompt_tokens, r.max_tokens) for r in fixed} == {(100, 50)}
    assert {r.prompt for r in drawn} == {None}


def test_one_client_alone(tmp_path):
    # Every step takes 1 s: the prompt, then a decode for each token but the first.
    row = read_one(tmp_path, fields(concurrency=1, isl=4, osl=3))
    found = serve(simulated("colocated:tp1"), row, row.loop)
    assert (found.ttft_s, found.tpot_s) == (1.0, 1.0)


def test_clients_who_start_together_march_in_step(tmp_path):
    # 2 prompts of 2,048 tokens fill two steps: 1 s and 2 s, again and again.
    row = read_one(tmp_path, fields(concurrency=2, isl=600, osl=4))
    system = simulated("colocated:tp1")
    found = serve(system, row, row.loop)
    assert found.ttft_s == 1.0  # both in one step
    system = dataclasses.replace(
        system,
        memory=tuple(
            dataclasses.replace(m, num_blocks=10_000, max_context=4096)
            for m in system.memory
        ),
    )
    row = dataclasses.replace(row, prompt_tokens=2048)
    # 0 is prefilled until 1, 1 until 2; they decode until 5 and start again.
    found = serve(system, row, row.loop)
    assert (found.ttft_s, found.tpot_s) == (1.5, (4 / 3 + 1) / 2)


def test_means_of_inferencex_are_over_all_requests(tmp_path):
    row = read_one(tmp_path, fields(concurrency=4, isl=40, osl=30, source=DUMP))
    system = simulated("colocated:tp1")
    asked = INFERENCEX.requests(row, 40, seed=0)
    loop = ClosedLoop(asked, 4)
    timelines = system.run(loop.first(), followers=loop).timelines
    found = serve(system, row, row.loop, effort=EVERY)
    assert found.ttft_s == pytest.approx(np.mean([*map(ttft_s, timelines)]))
    assert found.tpot_s == pytest.approx(np.mean([*map(tpot_s, timelines)]))


def test_requests_between_count_for_those_left_out(tmp_path):
    # With three requests of each client, those of the middle count eightfold.
    row = read_one(tmp_path, fields(concurrency=50, isl=40, osl=30, source=DUMP))
    system = simulated("colocated:tp1")
    effort = Effort(requests=3, counted=0)
    asked = INFERENCEX.requests(row, 150, seed=0)
    loop = ClosedLoop(asked, 50)
    timelines = system.run(loop.first(), followers=loop).timelines
    by_id = {t.request.id: ttft_s(t) for t in timelines}
    first, middle, last = np.split(np.array([by_id[r.id] for r in asked]), 3)
    found = serve(system, row, row.loop, effort=effort)
    expected = (first.mean() + 8 * middle.mean() + last.mean()) / 10
    assert found.ttft_s == pytest.approx(expected)
    assert first.mean() != pytest.approx(middle.mean())


def test_effort():
    effort = Effort(requests=100, counted=30)
    assert effort.rounds(INFERENCEX, 10) == 10
    assert effort.rounds(INFERENCEX, 20) == 5
    assert effort.rounds(INFERENCEX, 1000) == 3
    assert effort.rounds(FIXED, 10) == 5
    assert effort.rounds(FIXED, 1) == 32  # so that 30 count
    shortened = [effort.is_shortened(INFERENCEX, n) for n in (1, 10, 20, 1000)]
    assert shortened == [False, False, True, True]


def test_a_simulated_row(tmp_path):
    found = simulate_row(read_one(tmp_path, fields()))
    assert not found.skipped and not found.is_too_fast
    assert 0.001 < found.simulated.tpot_s < 0.02
    assert found == simulate_row(found.row)


def test_a_disaggregated_row(tmp_path):
    row = read_one(tmp_path, workers((1, 2, 1, 0), (2, 1, 1, 0)))
    found = simulate_row(row)
    assert not found.skipped
    assert math.isfinite(found.simulated.ttft_s)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"model_path": "zai/GLM-5"}, "glm-5"),
        ({"system": "abacus"}, "system: expected one of"),
        ({"backend": "lmdeploy"}, "backend: expected one of"),
        ({"tp_size": 12}, "expected tp to divide 32 query heads"),
        ({"model_path": "llama-3-70b", "tp_size": 1}, "of weights alone"),
        ({"isl": 10**7}, "KV blocks"),
    ],
)
def test_rows_that_cannot_be_simulated(tmp_path, change, why):
    found = simulate_row(read_one(tmp_path, fields(**change)))
    assert found.simulated is None
    assert why in found.skipped


def test_a_token_faster_than_memory(tmp_path):
    row = read_one(tmp_path, fields(concurrency=1, tp_size=2))
    model = find_model("llama-3-8b")
    deployment = Deployment.parse(row.loop.deployment)
    least_s = least_tpot_s(model, row, deployment)
    # 7.5e9 weights of 2 bytes beside the embedding, on two devices of 3.35e12 byte/s.
    assert least_s == pytest.approx(7.5e9 / 3.35e12, rel=0.01)
    # Of 64 clients, 186 of 206.5 ms decode: 57.6 requests of 272 tokens, 128 KiB each.
    many = read_one(tmp_path, fields(concurrency=64, tp_size=2))
    kv_s = 64 * 186 / 206.5 * 272 * 2**17 / 2 / 3.35e12
    alone_s = 272 * 2**17 / 2 / 3.35e12
    more_s = least_tpot_s(model, many, deployment) - least_s
    assert more_s == pytest.approx(kv_s - alone_s)
    fast = dataclasses.replace(row, tpot_s=0.9 * least_s)
    assert simulate_row(fast).is_too_fast
    assert not simulate_row(dataclasses.replace(row, tpot_s=1.1 * least_s)).is_too_fast


def test_policies_follow_the_engine(tmp_path):
    names = {}
    for engine in ("sglang", "trtllm", "vllm"):
        row = read_one(tmp_path, fields(backend=engine, concurrency=300))
        policy = simulation_of(row, row.loop).policies["colocated"]
        names[engine] = type(policy).__name__
        assert policy.max_seqs == 300
    assert names == {
        "sglang": "PrefillFirst",
        "trtllm": "SarathiServe",
        "vllm": "SarathiServe",
    }
