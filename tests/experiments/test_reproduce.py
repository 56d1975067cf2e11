"""Reproduced figures: every one runs, and its numbers come from the runs."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from disagg_jax.metrics import SLO
from disagg_jax.sim.engines import get_engine
from disagg_jax.sim.run import RunLatencies
from experiments import reproduce
from experiments.cli.progress import Deadline
from experiments.configs.named_simulations import get_simulation
from experiments.papers import FIGURES
from experiments.papers.distserve import motivation, published
from experiments.papers.distserve.published import paper_crossings, paper_panel
from experiments.papers.figure import (
    Claim,
    Drawn,
    Lab,
    PaperFigure,
)
from experiments.papers.runs import (
    Arm,
    ArmRuns,
    Goodputs,
)
from experiments.report.panel import Panel, Series
from tests.commands import run_command

# The list; `toy`, `goodput_n` and `devices` are what the paper does not show.
NAMES = (
    "fig1 fig2 fig3 fig4 fig5 fig8a fig8b fig8c fig9a fig9b fig10 fig11 fig12 table2 "
    "toy goodput_n devices sarathi_table4 sarathi_fig8 "
    "sarathi_serve_ablation sarathi_serve_capacity fastgen "
    "sarathi_gpt3 mlperf"
).split()
TINY = Lab(num_requests=4, seeds=2, workers=1)


def test_every_figure_asked_for_is_there():
    assert sorted(FIGURES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_runs_and_has_a_row_for_each_claim(name: str, tmp_path: pathlib.Path):
    lines = reproduce.run([name], TINY, tmp_path, f"--figure={name}")
    rows = [line for line in lines if line.startswith("| ")][1:]  # less the header
    assert len(rows) >= 1
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 5, row
        assert all(cells), row
        # Those flags that the figure reads, or the command would be refused.
        read = [f for f in ("seeds", "num_requests") if f in FIGURES[name].reads]
        flags = "".join(f" --{flag}={getattr(TINY, flag)}" for flag in read)
        assert f"`--figure={name}{flags}` at " in cells[-1]
    assert (tmp_path / "reproduction.md").read_text().splitlines() == lines
    picture = tmp_path / "figures" / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 60_000


@pytest.mark.parametrize(
    "name", [name for name in NAMES if "engine" in FIGURES[name].reads]
)
def test_a_figure_of_rooflines_has_the_overheads_of_an_engine(name, tmp_path):
    requests = 8 if name == "mlperf" else 4  # of fewer, its rates all pass
    ours = {}
    for engine in (None, "vllm"):
        lab = Lab(num_requests=requests, seeds=1, workers=1, engine=engine)
        drawn = FIGURES[name].make(lab)
        ours[engine] = [claim.ours for claim in drawn.claims]
        expected = f"engine {engine or 'none'}: not checked"
        assert drawn.checked and all(s.startswith(expected) for s in drawn.checked)
    assert ours[None] != ours["vllm"]


def test_an_engine_is_in_the_command_of_a_figure(tmp_path):
    lab = dataclasses.replace(TINY, engine="vllm")
    text = "\n".join(reproduce.run(["sarathi_fig8"], lab, tmp_path, "-"))
    assert "`--figure=sarathi_fig8 --engine=vllm` at " in text
    said = get_engine("vllm").checked("llama-13b", "a6000", "bf16")
    assert text.count(said) == 1


def test_a_figure_of_fitted_times_takes_no_engine():
    done = run_command("reproduce", "--figure=fig8a", "--engine=vllm")
    assert done.returncode == 1
    assert "--engine: expected --all or --figure=fig8c or " in done.stderr
    done = run_command("reproduce", "--figure=fig8c", "--engine=vlm")
    assert done.returncode == 1 and "engine: expected one of" in done.stderr


def test_a_report_says_what_its_claims_say(tmp_path: pathlib.Path, monkeypatch):
    claims = [
        Claim(claim=f"c{i}", paper=f"p{i}", ours=f"o{i}", why=f"w|{i}", runs=f"r{i}")
        for i in range(3)
    ]
    series = Series(label="s", points=[(1, 2), (2, 3)], colour=0)
    panel = Panel(title="t", x="x (s)", y="y (s)", series=[series])
    made = Drawn(panels=[panel], claims=claims)
    figure = PaperFigure(title="T", make=lambda lab: made)
    monkeypatch.setitem(reproduce.FIGURES, "mine", figure)
    lines = reproduce.run(["mine"], TINY, tmp_path, "--figure=mine")
    for i in range(3):
        # A bar within a cell would end it.
        (row,) = [line for line in lines if line.startswith(f"| c{i} ")]
        assert f"| c{i} | p{i} | o{i} | w/{i} | r{i}; `--figure=mine" in row


def test_a_caption_names_each_run_once():
    said = ("a: roofline/h100, N=9 x 2 seeds", "b: as above; a: as above", "-")
    said += ("b: N=7 x 2 seeds; a: roofline/h100, N=9 x 2 seeds",)
    claims = [
        Claim(claim="c", paper="p", ours="o", why="w", runs=runs) for runs in said
    ]
    drawn = Drawn(panels=[], claims=claims)
    expected = "a: roofline/h100, N=9 x 2 seeds; b: N=7 x 2 seeds"
    assert reproduce.runs_of(drawn) == [expected]
    assert reproduce.runs_of(Drawn(panels=[], claims=[])) == []


def test_numbers_come_from_the_runs(tmp_path: pathlib.Path):
    def ours(requests: int) -> list[str]:
        lab = Lab(num_requests=requests, seeds=2, workers=1)
        return [claim.ours for claim in FIGURES["fig8a"].make(lab).claims]

    few = ours(8)
    assert few == ours(8)
    # Other runs, other numbers; some rows may have none yet, or a bound.
    pairs = list(zip(few, ours(60), strict=True))
    assert sum(a != b for a, b in pairs) >= 6


def test_the_papers_numbers_come_from_its_points(monkeypatch):
    before = [claim.paper for claim in FIGURES["fig8a"].make(TINY).claims]
    data = json.loads(published.POINTS.read_text())["figures"]
    data["fig8a"]["crossings_at_90"]["rate"]["vLLM"] = 1.15
    monkeypatch.setattr(published, "_figures", lambda: data)
    after = [claim.paper for claim in FIGURES["fig8a"].make(TINY).claims]
    assert "4.60x" in before and "2.00x" not in before  # 2.30 / 0.50
    assert "2.00x" in after and "4.60x" not in after  # 2.30 / 1.15


def test_step_times_are_the_cost_models(monkeypatch):
    # One 512-token prompt, alone, by the artifact's coefficients of DistServe's tp 1.
    assert motivation.step_ms("fitted/distserve", prompts=(512,)) == [
        pytest.approx(75.19988, abs=1e-5)
    ]
    one = motivation.step_ms("fitted/distserve", decodes=1, context=512)
    assert one == [pytest.approx(22.346, abs=1e-3)]


def result(ttft_s: tuple[float, ...], tpot_s: tuple[float, ...], arrived: int):
    return RunLatencies(
        arrived=arrived,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        stages=(),
        steady=True,
        end_s=1.0,
    )


def test_goodputs_ratios_and_limits_are_by_seed():
    slo = SLO(ttft_s=1.0, tpot_s=0.1)
    good, late = result((0.5,), (0.05,), 1), result((2.0,), (0.05,), 1)
    arm = Arm("x", get_simulation("opt13b_a100"), "colocated:tp1", num_requests=1)
    # Seed 0 passes at 1 and fails at 2: 90 % is a tenth of the way. Seed 1 fails at 1.
    runs = ArmRuns(arm, {1.0: [good, late], 2.0: [late, late]})
    found = runs.goodputs(slo)
    assert found.rates == (pytest.approx(1.1), 0.0)
    assert not found.top and "1 of 2 seeds fail at the lowest rate" in str(found)
    assert runs.limit(slo) == "TTFT"
    one, two = (
        Goodputs(rates=(1.0, 2.0), top=True),
        Goodputs(rates=(3.0, 8.0), top=False),
    )
    assert two.over(one).startswith("3.50x [")  # (3 + 4) / 2
    assert str(one).startswith(">= 1.50")
    assert one.over(found).startswith("no ratio")


def test_the_published_points_are_whole():
    rate = paper_panel("fig8a", "rate")
    assert rate.series["DistServe"][-1] == (3.0, 74.6661)
    assert rate.x == "arrival rate (requests/s per GPU)"
    # Crossings are the drawing's own; they lie between its points around 90 %.
    for figure in ("fig8a", "fig8b", "fig8c", "fig9a", "fig9b"):
        series = paper_panel(figure, "rate").series
        for name, crossing in paper_crossings(figure, "rate").items():
            below = [y for x, y in series[name] if x < crossing - 1e-3]
            assert all(y > 89.9 or figure == "fig8a" for y in below), (figure, name)


def test_figures_that_there_is_no_time_for_are_left_out_and_named(tmp_path):
    times = iter([0.0, 59.0, 61.0])
    deadline = Deadline(1.0, clock=lambda: next(times))
    lines = reproduce.run(["fig12", "toy", "fig5"], TINY, tmp_path, "", deadline)
    assert lines[-1] == "Left out, as --minutes were spent: toy, fig5."
    assert f"## {FIGURES['fig12'].title}" in lines
    assert (tmp_path / "reproduction.md").read_text().splitlines() == lines


def test_an_unknown_figure_is_an_error_that_names_the_known():
    done = run_command("reproduce", "--figure=fig99")
    assert done.returncode == 1
    assert "--figure: expected one of ['devices'" in done.stderr
    assert "'fig8a'" in done.stderr and "got 'fig99'" in done.stderr
    assert "Traceback" not in done.stderr


def test_search_times_are_drawn_where_they_are_given(tmp_path: pathlib.Path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"Low": {"8": 1.5, "32": 9.25}}))
    times = reproduce.read_search_times(str(path))
    drawn = FIGURES["fig12"].make(Lab(search_times=times))
    assert [claim.ours for claim in drawn.claims] == [
        "1.5 s for 8 GPUs, 9.2 s for 32 GPUs",
        "not run",
    ]
    (ours,) = [s for s in drawn.panels[0].series if s.style != "paper"]
    assert list(ours.points) == [(8.0, 1.5), (32.0, 9.25)]
    path.write_text("[1]")
    with pytest.raises(ValueError, match="--search_times: expected"):
        reproduce.read_search_times(str(path))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_requests": 3}, "num_requests: expected >= 4, got 3"),
        ({"seeds": 0}, "seeds: expected >= 1, got 0"),
        ({"workers": 0}, "workers: expected >= 1, got 0"),
    ],
)
def test_a_lab_that_cannot_work_is_refused(bad: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Lab(**bad)


@pytest.mark.parametrize("name", [n for n in NAMES if "seeds" not in FIGURES[n].reads])
def test_a_figure_whose_numbers_are_of_no_seeds_says_what_they_are_of(name: str):
    (caption,) = reproduce.runs_of(FIGURES[name].make(TINY))
    assert "no runs" in caption or "no randomness" in caption
