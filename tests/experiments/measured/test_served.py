"""The closed loop of a measured row: lengths, what counts, and its limits."""

import dataclasses

import numpy as np
import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.metrics import tpot_s, ttft_s
from disagg_jax.sim.cost.step_terms import EngineFactors
from disagg_jax.sim.engines import get_engine
from disagg_jax.workload import ClosedLoop
from experiments.cli.progress import ProgressLines
from experiments.measured.described import simulation_of
from experiments.measured.served import (
    FIXED,
    INFERENCEX,
    Effort,
    RowTask,
    _least_tpot_s,
    client_of,
    serve,
    simulate_row,
    simulate_rows,
)
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


def simulate(row, profile=None):
    return simulate_row(RowTask(row=row, profile=profile))


def test_who_measured_a_row_is_its_client(tmp_path):
    assert client_of(read_one(tmp_path, fields(source=DUMP))) is INFERENCEX
    assert client_of(read_one(tmp_path, fields())) is FIXED


@pytest.mark.parametrize(
    "row",
    [
        fields(),
        fields(concurrency=64, source=DUMP, pp_size=2),
        workers((1, 2, 1, 0), (2, 1, 1, 0)),
    ],
)
def test_the_mean_tpot_is_made_of_its_terms(tmp_path, row):
    found = simulate(read_one(tmp_path, row))
    assert not found.skipped and not found.is_too_fast
    assert 0.001 < found.simulated.tpot_s < 0.02
    factors = dataclasses.astuple(get_engine(found.profile).factors)
    tpot = sum(f * t for f, t in zip(factors, found.tpot_terms, strict=True))
    assert tpot == pytest.approx(found.simulated.tpot_s)
    assert found == simulate(found.row)


def test_terms_of_decode_instances_have_no_prompts(tmp_path):
    found = simulate(read_one(tmp_path, workers((1, 2, 1, 0), (2, 1, 1, 0))))
    names = [field.name for field in dataclasses.fields(EngineFactors)]
    terms = dict(zip(names, found.tpot_terms, strict=True))
    assert terms["attention"] == 0 < terms["kv"]
    assert terms["reduce"] == 0  # the prefill instance has two devices
    # A step for each token, and a little for the KV to come; some of 8 in each step.
    assert 1 <= terms["step_s"] < 1.05 < terms["sequence_s"] < 8


@pytest.mark.parametrize(
    "engine, version, name",
    [
        ("vllm", "0.12.0", "vllm-0.12"),
        ("vllm", "", "vllm"),
        ("trtllm", "1.0.0", "trtllm-1.0"),
        ("trtllm", "1.2.0rc1", "trtllm"),
        ("sglang", "0.5.7", "sglang-0.5"),
    ],
)
def test_a_row_has_the_profile_of_its_engine(tmp_path, engine, version, name):
    row = read_one(tmp_path, fields(backend=engine, backend_version=version))
    assert simulate(row).profile == name
    assert simulate(row, get_engine("ideal")).profile == "ideal"


def test_a_first_token_is_late_by_steps(tmp_path):
    row, ideal = read_one(tmp_path, fields()), get_engine("ideal")
    late = dataclasses.replace(ideal, first_token_steps=3.0)
    (soon, later) = (simulate(row, each).simulated for each in (ideal, late))
    assert later.tpot_s == soon.tpot_s
    assert later.ttft_s == pytest.approx(soon.ttft_s + 3 * soon.tpot_s)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"model_path": "zai/GLM-5"}, "glm-5"),
        ({"system": "abacus"}, "hardware: expected one of"),
        ({"backend": "lmdeploy"}, "engine: expected one of"),
        ({"gemm_quant_mode": "fp3"}, "gemm: expected one of"),
        ({"tp_size": 12}, "expected tp to fit 32 query heads"),
        ({"model_path": "llama-3-70b", "tp_size": 1}, "of weights alone"),
        ({"isl": 10**7}, "KV blocks"),
    ],
)
def test_rows_that_cannot_be_simulated(tmp_path, change, why):
    found = simulate(read_one(tmp_path, fields(**change)))
    assert found.simulated is None and not found.profile
    assert why in found.skipped


def test_a_row_without_a_loop_is_skipped_with_its_reason(tmp_path):
    found = simulate(read_one(tmp_path, workers(("", 1, 1, 0), ("", 1, 1, 0))))
    assert (found.simulated, found.skipped) == (None, "no worker counts")


def test_rows_come_back_as_they_were_asked(tmp_path, capsys):
    # The longest loop is simulated first.
    asked = [
        read_one(tmp_path, fields(id, concurrency=n, osl=8))
        for id, n in (("a", 1), ("b", 8), ("c", 2), ("d", 4))
    ]
    order = []

    def one_by_one(function, tasks):
        order.extend(task.row.id for task in tasks)
        return map(function, tasks)

    tasks = [RowTask(row=row) for row in asked]
    found = simulate_rows(tasks, one_by_one, ProgressLines())
    assert [one.row for one in found] == asked
    assert order == ["b", "d", "c", "a"]
    assert found[0] == simulate(asked[0])


def least_s(row):
    """The TPOT of an ideal device, by any profile."""
    simulation = simulation_of(row, row.loop, get_engine("vllm"))
    return _least_tpot_s(simulation, row, Deployment.parse(row.loop.deployment))


def test_a_token_faster_than_memory(tmp_path):
    row = read_one(tmp_path, fields(concurrency=1, tp_size=2))
    # 7.5e9 weights of 2 bytes beside the embedding, on two devices of 3.35e12 byte/s.
    assert least_s(row) == pytest.approx(7.5e9 / 3.35e12, rel=0.01)
    # Of 64 clients, 186 of 206.5 ms decode: 57 requests of 272 tokens, 128 KiB each.
    many = read_one(tmp_path, fields(concurrency=64, tp_size=2))
    more_s = 56 * 272 * 2**17 / 2 / 3.35e12
    assert least_s(many) - least_s(row) == pytest.approx(more_s)
    fast = dataclasses.replace(row, tpot_s=0.9 * least_s(row))
    assert simulate(fast).is_too_fast
    slow = dataclasses.replace(row, tpot_s=1.1 * least_s(row))
    assert not simulate(slow).is_too_fast


def test_stages_share_weights_and_clients(tmp_path):
    two = read_one(tmp_path, fields(concurrency=64, tp_size=1, pp_size=2))
    one = read_one(tmp_path, fields(concurrency=32, tp_size=1))
    # Of one instance the batch is 28.8 requests.
    assert least_s(two) == pytest.approx(least_s(one))


def test_instances_that_decode_share_the_clients(tmp_path):
    # Of 16 requests all but the first token's share decode, half on each instance.
    sides = (1, 2, 1, 0), (2, 2, 1, 0)
    row = read_one(tmp_path, workers(*sides, concurrency=16, silicon_ttft_ms=1e-6))
    alone = read_one(tmp_path, fields(concurrency=8, tp_size=2, silicon_ttft_ms=1e-6))
    assert row.loop.clients == 16
    # 7 of each, as a request is never only decoding.
    assert least_s(row) == pytest.approx(least_s(alone))
