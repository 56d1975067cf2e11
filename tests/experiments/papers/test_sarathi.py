"""SARATHI's figures: by hand where the arithmetic is small, else by what must hold."""

from __future__ import annotations

import pytest

from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.sarathi import Sarathi
from experiments.papers import sarathi
from experiments.papers.colocated import step_s
from experiments.papers.figure import Lab

LAB = Lab()
A6000 = LAB.roofline("llama-13b", "a6000")


def test_the_decode_speedup_is_the_papers_definition(monkeypatch):
    # A prompt token takes 1 s, a decode 10 s alone and 2 s beside a chunk; C=8, B=4: a
    # chunk of 5 and 3 decodes. (4 * 10 / 4) / ((5 + 3 * 2 - 5) / 3) = 5.
    def fake(simulation, *, chunks=(), decodes=0, context=0):
        assert simulation is A6000 and context in (100, 0)
        tokens = sum(count for _, count in chunks)
        return tokens + decodes * (2 if chunks else 10)

    monkeypatch.setattr(sarathi, "step_s", fake)
    assert sarathi.decode_speedup(A6000, 100, batch=4, chunk=8) == 5


def test_requests_have_the_ratio_asked_for_and_stagger_their_ends():
    plain = sarathi.requests(110, 10.0, 3)
    assert [(r.prompt_tokens, r.max_tokens) for r in plain] == [(100, 10)] * 3
    staggered = sarathi.requests(110, 10.0, 7, staggered=5)
    assert [r.max_tokens for r in staggered] == [2, 4, 6, 8, 10, 10, 10]


def test_one_token_more_is_a_tile_more():
    ms = {n: step_s(A6000, chunks=((0, n),)) for n in (256, 257, 384, 385)}
    assert ms[257] > 1.25 * ms[256]
    assert ms[384] == pytest.approx(ms[257], rel=0.01)
    assert ms[385] > 1.1 * ms[384]


def test_chunks_cost_prefill_and_smaller_ones_more():
    costs = [sarathi.chunk_overhead(A6000, 1024, c) for c in (1024, 512, 256, 64)]
    assert costs[0] == 1
    assert costs == sorted(costs) and costs[1] > 1.05 and costs[-1] > 2


def test_orca_gains_nothing_where_all_come_together_and_sarathi_gains_most():
    row = sarathi.TABLE_4[0]
    ratio, n = row.balanced, 60
    orca = Orca(max_seqs=row.batch, max_batched_tokens=10**9)
    ours = Sarathi(chunk_tokens=sarathi.CHUNK, max_seqs=row.batch)
    on = row.simulation(LAB)
    worst = sarathi.gain(on, row, orca, ratio, n)
    best = sarathi.gain(on, row, orca, ratio, n, stagger=True)
    assert worst == pytest.approx(1.0, abs=1e-9)
    assert 1.02 < best < sarathi.gain(on, row, ours, ratio, n) - 0.1


def test_the_gain_peaks_where_chunks_and_decodes_balance():
    row = sarathi.TABLE_4[0]
    assert row.balanced == 256 / 5
    policy = Sarathi(chunk_tokens=sarathi.CHUNK, max_seqs=row.batch)
    few, balanced, many = (
        sarathi.gain(row.simulation(LAB), row, policy, x * row.balanced, 60)
        for x in (0.25, 1.0, 4.0)
    )
    assert balanced > few + 0.05 and balanced > many + 0.05
