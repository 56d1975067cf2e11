"""Holds the figures of DistServe and others, under the names that `reproduce` takes.

A figure is a `PaperFigure`: a function from a `Lab`, which runs simulations, to panels
and claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.papers import fastgen, mlperf, sarathi, sarathi_pipeline, sarathi_serve
from experiments.papers.distserve import (
    beyond,
    breakdown,
    motivation,
    placements,
    queueing,
    simulated,
    toy,
)
from experiments.papers.figure import ROOFLINE, PaperFigure

_NO_RUNS: Sequence[str] = ()
FIGURES: Mapping[str, PaperFigure] = {
    # DistServe
    "fig1": PaperFigure("Fig. 1: each phase alone and both together", toy.fig1),
    "toy": PaperFigure(
        "The blog's toy example, and its ratio with one engine for both", toy.toy
    ),
    "fig2": PaperFigure(
        "Fig. 2: a prompt in a batch of decodes", motivation.fig2, _NO_RUNS
    ),
    "fig3": PaperFigure(
        "Fig. 3: throughput of the two phases", motivation.fig3, _NO_RUNS
    ),
    "fig5": PaperFigure(
        "Fig. 5: decode under intra-op and inter-op", motivation.fig5, _NO_RUNS
    ),
    "fig4": PaperFigure(
        "Fig. 4: prefill on two GPUs, by queueing theory", queueing.make
    ),
    **placements.FIGURES,
    "fig10": PaperFigure("Fig. 10: latency breakdown and KV transfers", breakdown.make),
    "table2": PaperFigure("Table 2: accuracy of the simulator", simulated.table2),
    "fig11": PaperFigure(
        "Fig. 11: placement with slow and fast networks", simulated.fig11
    ),
    "fig12": PaperFigure(
        "Fig. 12: time of the placement search", simulated.fig12, ("search_times",)
    ),
    "goodput_n": PaperFigure(
        "Goodput against the number of requests of a run", beyond.goodput_n
    ),
    "devices": PaperFigure("Devices needed for a demand", beyond.devices),
    # others
    "sarathi_table4": PaperFigure(
        "SARATHI, Table 4: decodes that ride on chunks, and Orca",
        sarathi.table4,
        ("num_requests", "engine"),
    ),
    "sarathi_fig8": PaperFigure(
        "SARATHI, Fig. 8: decode speed-up, tiles, and chunks", sarathi.fig8, ("engine",)
    ),
    "sarathi_gpt3": PaperFigure(
        "SARATHI: GPT-3 on 64 A100s, with and without pipeline bubbles",
        sarathi_pipeline.make,
        ROOFLINE,
    ),
    "sarathi_serve_ablation": PaperFigure(
        "Sarathi-Serve: hybrid batches, chunks, and both (Yi-34B)",
        sarathi_serve.ablation,
        ROOFLINE,
    ),
    "sarathi_serve_capacity": PaperFigure(
        "Sarathi-Serve: capacity by P99 TBT and scheduling delay",
        sarathi_serve.capacity,
        ROOFLINE,
    ),
    "fastgen": PaperFigure(
        "DeepSpeed-FastGen: SplitFuse against vLLM, closed-loop clients",
        fastgen.make,
        ROOFLINE,
    ),
    "mlperf": PaperFigure(
        "MLPerf's server bounds: goodput of each system", mlperf.make, ROOFLINE
    ),
}
