"""Reproduces SARATHI (arXiv 2308.16369): decodes that ride on prompt chunks.

Table 4 and Fig. 8 are drawn; claims cover Figs. 3 and 4, the chunk overhead and the
comparison with Orca. All numbers are step times of the roofline, or come from a run of
equal requests that all wait from the start: nothing is random, so there is no interval.
The published numbers are in the paper's Tables 2 and 4, its Fig. 8 and its text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from disagg_jax.request import Request
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.sim import Simulation
from experiments.papers.colocated import ROOFLINE, colocated, step_s
from experiments.papers.figure import Claim, Drawn, Lab
from experiments.report.colours import system_colours
from experiments.report.panel import XY, Panel, Series, curves

CHUNK = 256  # C of Table 4
_ROUNDS = 40  # requests of a run, in batches of B: start and end then weigh little
_NO_CAP = 10**9  # prompt tokens in a step
_A6000 = ("llama-13b", "a6000")
_STEPS = "no runs: step times of llama-13b on a6000, roofline"
_A100 = ("llama-33b", "a100-80g")
# P:D of the runs, as a share of C/(B - 1), where the paper's peak is.
_AROUND = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of Table 4."""

    model: str
    hardware: str
    length: int  # prompt and output tokens of a request
    batch: int  # B
    decode_speedup: float  # published
    gain: float  # published, of the whole run

    @property
    def balanced(self) -> float:
        """P:D at which there are as many chunks as decode iterations."""
        return CHUNK / (self.batch - 1)

    def simulation(self, lab: Lab) -> Simulation:
        """Return the model on its device."""
        return lab.roofline(self.model, self.hardware)

    @property
    def name(self) -> str:
        return f"{self.model} on {self.hardware}, {self.length} tokens, B={self.batch}"


TABLE_4 = (
    Row(*_A6000, 1024, 6, 5.45, 1.33),
    Row(*_A6000, 2048, 6, 3.26, 1.26),
    Row(*_A6000, 3072, 6, 2.51, 1.22),
    Row(*_A100, 1024, 10, 3.83, 1.25),
    Row(*_A100, 2048, 5, 4.25, 1.22),
    Row(*_A100, 3072, 3, 3.51, 1.14),
)


def decode_speedup(
    simulation: Simulation, length: int, batch: int, chunk: int = CHUNK
) -> float:
    """Divide a decode's time in a batch of its own by the time it adds to a chunk."""
    riding = piggybacked_s(simulation, length, batch, chunk)
    return alone_s(simulation, length, batch) / riding


def alone_s(simulation: Simulation, length: int, batch: int) -> float:
    """Return the seconds for each token of a step of decodes only."""
    return step_s(simulation, decodes=batch, context=length) / batch


def piggybacked_s(
    simulation: Simulation, length: int, batch: int, chunk: int = CHUNK
) -> float:
    """Return the seconds that each of B - 1 decodes adds to a prompt's first chunk."""
    decodes = batch - 1
    part = ((0, chunk - decodes),)
    mixed = step_s(simulation, chunks=part, decodes=decodes, context=length)
    return (mixed - step_s(simulation, chunks=part)) / decodes


# ---- runs ----------------------------------------------------------------------------


def requests(
    length: int, prompts_per_decode: float, n: int, staggered: int = 0
) -> list[Request]:
    """Return `n` equal requests that wait from the start.

    Args:
      prompts_per_decode: P:D, prompt tokens for each output token.
      staggered: the first requests, in this number, end one after the other, so that
        prompts come one at a time from then on.
    """
    output = max(1, round(length / (1 + prompts_per_decode)))
    prompt = length - output
    outputs = [max(1, output * (i + 1) // staggered) for i in range(min(n, staggered))]
    outputs += [output] * (n - len(outputs))
    return [
        Request(id=i, arrival_s=0.0, prompt_tokens=prompt, max_tokens=tokens)
        for i, tokens in enumerate(outputs)
    ]


def tokens_per_s(
    simulation: Simulation, row: Row, policy: Policy, asked: Sequence[Request]
) -> float:
    """Return the prompt and output tokens per second of a run."""
    simulated = colocated(
        simulation,
        policy,
        "colocated:tp1",
        max_context=row.length,
        kv_memory=False,  # B says what fits
    )
    run = simulated.run(asked)
    return sum(r.prompt_tokens + r.max_tokens for r in asked) / run.end_s


def gain(
    simulation: Simulation,
    row: Row,
    policy: Policy,
    ratio: float,
    n: int,
    stagger: bool = False,
) -> float:
    """Return throughput over the baseline's: B prompts together, then their decodes."""
    baseline = PrefillFirst(max_seqs=row.batch, max_batched_tokens=_NO_CAP)
    asked = requests(row.length, ratio, n)
    before = tokens_per_s(simulation, row, baseline, asked)
    asked = requests(row.length, ratio, n, row.batch if stagger else 0)
    return tokens_per_s(simulation, row, policy, asked) / before


def _gains(
    lab: Lab, row: Row, policy: Policy, ratios: Sequence[float], stagger: bool = False
) -> list[XY]:
    """Return (P:D, gain) at each ratio."""
    n, on = lab.requests(_ROUNDS * row.batch), row.simulation(lab)
    return [(ratio, gain(on, row, policy, ratio, n, stagger)) for ratio in ratios]


def _peak(points: Sequence[XY]) -> XY:
    return max(points, key=lambda point: point[1])


def _sarathi(row: Row, chunk: int = CHUNK) -> Sarathi:
    return Sarathi(chunk_tokens=chunk, max_seqs=row.batch)


# ---- Table 4 -------------------------------------------------------------------------


def table4(lab: Lab) -> Drawn:
    """Draw decode speed-up and end-to-end gain, and Orca beside them."""
    gains = {
        row.name: _gains(lab, row, _sarathi(row), [x * row.balanced for x in _AROUND])
        for row in TABLE_4
    }
    orca = _orca_curves(lab)
    claims = [claim for row in TABLE_4 for claim in _claims(lab, row, gains[row.name])]
    return Drawn(
        panels=[*(_gain_panel(on, gains) for on in (_A6000, _A100)), _orca_panel(orca)],
        claims=[*claims, *_orca_claims(lab, orca)],
        checked=[row.simulation(lab).checked for row in TABLE_4],
    )


def _gain_panel(on: tuple[str, str], gains: dict[str, list[XY]]) -> Panel:
    rows = [row for row in TABLE_4 if row.model == on[0]]
    ours = curves({f"{r.length} tokens, B={r.batch}": gains[r.name] for r in rows})
    paper = {r.length: [(r.balanced, r.gain)] for r in rows}
    theirs = curves(paper, "{} tokens, paper", style="paper")
    return _gain_axes(f"{on[0]} on {on[1]}, C={CHUNK}", [*ours, *theirs])


def _gain_axes(title: str, series: Sequence[Series]) -> Panel:
    return Panel(
        title=title,
        x="prompt tokens per output token (P:D)",
        y="throughput over the baseline",
        series=series,
        line=1.0,
    )


def _claims(lab: Lab, row: Row, curve: Sequence[XY]) -> list[Claim]:
    at, best = _peak(curve)
    speedup = decode_speedup(row.simulation(lab), row.length, row.batch)
    balanced = dict(curve)[row.balanced]
    return [
        Claim(
            claim=f"Decodes are faster on a chunk of {CHUNK}: {row.name}",
            paper=f"{row.decode_speedup:.2f}x",
            ours=f"{speedup:.2f}x",
            why="Ours adds to a chunk only a decode's attention, its launch in each "
            f"layer and a row of logits; an engine's mixed step adds more. {ROOFLINE}",
            runs="no runs: step times, first chunk of a prompt",
        ),
        Claim(
            claim=f"End-to-end gain at P:D = C/(B-1), its peak: {row.name}",
            paper=f"{row.gain:.2f}x at {row.balanced:.0f}:1",
            ours=f"{balanced:.2f}x at {row.balanced:.0f}:1; of P:D tried, the peak is "
            f"{best:.2f}x at {at:.0f}:1",
            why="A chunk of 256 costs our prefill more (sarathi_fig8). P:D tried: "
            f"{', '.join(f'{x:g}' for x in _AROUND)} of C/(B-1)",
            runs=f"N={lab.requests(_ROUNDS * row.batch)} equal requests at once, no "
            "randomness",
        ),
    ]


# ---- Orca beside it ------------------------------------------------------------------

_WIDE = Row(*_A6000, 1024, 18, 0.0, 1.27)
_ORCA_PD = (3.5, 7.0, 10.0, 14.0, 20.0, 28.0, 56.0)


def _orca_curves(lab: Lab) -> dict[str, list[XY]]:
    """Return gains over P:D with B=18 and 1K tokens."""
    orca = Orca(max_seqs=_WIDE.batch, max_batched_tokens=_NO_CAP)
    return {
        "SARATHI, C=256": _gains(lab, _WIDE, _sarathi(_WIDE, 256), _ORCA_PD),
        "SARATHI, C=512": _gains(lab, _WIDE, _sarathi(_WIDE, 512), _ORCA_PD),
        "Orca, best case": _gains(lab, _WIDE, orca, _ORCA_PD, stagger=True),
        "Orca, worst case": _gains(lab, _WIDE, orca, _ORCA_PD),
    }


# label -> (P:D, gain) as published; Orca's worst case is the baseline.
_ORCA_PAPER = {
    "SARATHI, C=256": (14.0, 1.27),
    "SARATHI, C=512": (28.0, 1.23),
    "Orca, best case": (None, 1.11),
    "Orca, worst case": (None, 1.0),
}


# The system whose colour a label has; the other labels are variants.
_PLAIN = {"SARATHI, C=256": "SARATHI", "Orca, worst case": "Orca"}


def _orca_panel(gains: dict[str, list[XY]]) -> Panel:
    paper = {label: [(at, y)] for label, (at, y) in _ORCA_PAPER.items() if at}
    others = [label for label in gains if label not in _PLAIN]
    found = system_colours([*_PLAIN.values(), *others])
    colours = {label: found[_PLAIN.get(label, label)] for label in gains}
    theirs = curves(paper, "{}, paper", colours=colours, style="paper")
    title = f"{_A6000[0]} on {_A6000[1]}, 1024 tokens, B={_WIDE.batch}"
    return _gain_axes(title, [*curves(gains, colours=colours), *theirs])


def _orca_claims(lab: Lab, gains: dict[str, list[XY]]) -> list[Claim]:
    why = {
        "SARATHI, C=512": "A chunk of 512 costs our prefill more than the paper's 10 % "
        "at most (sarathi_fig8)",
        "Orca, best case": "The paper's P:D is not given; ours still rises at the "
        "largest tried, where each decode step has a prompt beside it",
    }
    claims: list[Claim] = []
    for label, (at, best) in _ORCA_PAPER.items():
        ours_at, ours = _peak(gains[label])
        where = "" if at is None else f" at P:D {at:g}"
        claims.append(
            Claim(
                claim=f"{label}: best gain with B={_WIDE.batch}, 1K tokens",
                paper=f"{best:.2f}x{where}",
                ours=f"{ours:.2f}x at P:D {ours_at:g}",
                why=why.get(label, ROOFLINE),
                runs=f"N={lab.requests(_ROUNDS * _WIDE.batch)} equal requests at once; "
                "best case: their ends are spread over a request's decodes",
            )
        )
    return claims


# ---- Fig. 8, tiles, chunks -----------------------------------------------------------

_LENGTHS = (1024, 2048, 3072)
_TOKENS = (64, 128, 129, 192, 256, 257, 320, 384, 385, 448, 512, 513, 640)
_TILE_MS = {128: 55.0, 256: 69.8, 257: 92.33}  # published
_CHUNKS = (64, 128, 256, 512, 1024)
_BATCHES = (2, 3, 4, 6, 8, 10, 12, 15, 18)


def fig8(lab: Lab) -> Drawn:
    """Draw decode speed-ups, one step's time over its tokens, the price of chunks."""
    on = lab.roofline(*_A6000)
    speedups = {
        length: [
            (float(b), decode_speedup(on, length, b))
            for b in _BATCHES
            if b * length <= _BATCHES[-1] * _LENGTHS[0]  # what fits, by the paper
        ]
        for length in _LENGTHS
    }
    overheads = {
        length: [(float(c), chunk_overhead(on, length, c)) for c in _CHUNKS]
        for length in _LENGTHS
    }
    return Drawn(
        panels=[
            Panel(
                title=f"{_A6000[0]} on {_A6000[1]}, C={CHUNK}",
                x="requests in the batch (B)",
                y="decode speed-up",
                series=curves(speedups, "{} tokens"),
            ),
            _tile_panel(on),
            Panel(
                title="a prompt in chunks, over the prompt at once",
                x="chunk (tokens)",
                y="prefill time in chunks / at once",
                series=curves(overheads, "{} tokens"),
            ),
        ],
        claims=[
            _fig8_claim(speedups),
            _table2_claim(on),
            *(_tile_claim(on, *pair) for pair in ((128, 256), (256, 257))),
            *(_overhead_claim(on, c, said) for c, said in _OVERHEADS.items()),
        ],
        checked=[on.checked],
    )


def chunk_overhead(simulation: Simulation, prompt: int, chunk: int) -> float:
    """Divide the time of a prompt in chunks by its time in one step."""
    parts_s = sum(
        step_s(simulation, chunks=((start, min(chunk, prompt - start)),))
        for start in range(0, prompt, chunk)
    )
    return parts_s / step_s(simulation, chunks=((0, prompt),))


def _tile_ms(simulation: Simulation, tokens: int) -> float:
    return 1000 * step_s(simulation, chunks=((0, tokens),))


def _tile_panel(simulation: Simulation) -> Panel:
    ours = [(float(n), _tile_ms(simulation, n)) for n in _TOKENS]
    paper = [(float(n), ms) for n, ms in _TILE_MS.items()]
    return Panel(
        title=f"one prompt, {_A6000[0]} on {_A6000[1]}: tiles of 128",
        x="tokens in the step",
        y="step time (ms)",
        series=[
            Series(label="ours", points=ours, colour=0),
            Series(label="paper", points=paper, colour=0, style="paper"),
        ],
    )


def _fig8_claim(speedups: dict[int, list[XY]]) -> Claim:
    found = [y for points in speedups.values() for _, y in points]
    return Claim(
        claim=f"Fig. 8: range of decode speed-ups, {_A6000[0]}, C={CHUNK}",
        paper="2.8x to 10x, most at small B",
        ours=f"{min(found):.1f}x to {max(found):.1f}x; most at B="
        f"{_peak(speedups[_LENGTHS[0]])[0]:g}",
        why="Few decodes share the launch of decode attention in each layer, which we "
        "take from the A100's measured kernels",
        runs=_STEPS,
    )


def _table2_claim(simulation: Simulation) -> Claim:
    alone, riding = (
        1000 * f(simulation, length=1024, batch=4) for f in (alone_s, piggybacked_s)
    )
    return Claim(
        claim="Table 2: a decode's time, batch 4, 1K tokens: alone, on a chunk",
        paper="12.49 ms, 1.2 ms",
        ours=f"{alone:.2f} ms, {riding:.2f} ms",
        why=f"Three decodes ride on the chunk here; {ROOFLINE}",
        runs=_STEPS,
    )


def _tile_claim(simulation: Simulation, few: int, more: int) -> Claim:
    a, b = _TILE_MS[few], _TILE_MS[more]
    x, y = (_tile_ms(simulation, tokens) for tokens in (few, more))
    return Claim(
        claim=f"Tiles: a step of {more} tokens against one of {few}",
        paper=f"{a:g} -> {b:g} ms, +{100 * (b / a - 1):.0f} %",
        ours=f"{x:.1f} -> {y:.1f} ms, +{100 * (y / x - 1):.0f} %",
        why="The A6000's efficiencies are assumed to be the A100's; one token more is "
        "billed a tile of 128 rows",
        runs=_STEPS,
    )


_OVERHEADS = {64: "about 5x", 256: "at most 1.20x", 512: "at most 1.10x"}


def _overhead_claim(simulation: Simulation, chunk: int, said: str) -> Claim:
    found = [chunk_overhead(simulation, length, chunk) for length in _LENGTHS]
    return Claim(
        claim=f"Prefill in chunks of {chunk} takes longer than at once",
        paper=said,
        ours=f"{min(found):.2f}x to {max(found):.2f}x for 1K to 3K tokens",
        why="All of ours is matmul efficiency by rows, the A100's for want of the "
        "A6000's, and below a tile streaming the weights; reading earlier KV again is "
        "free in the roofline",
        runs=_STEPS,
    )
