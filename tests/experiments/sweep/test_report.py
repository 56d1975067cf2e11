"""A sweep's table and picture from a summary made by hand: each number in its place."""

import itertools
import pathlib

import pytest

from experiments.report.colours import system_colour
from experiments.sweep import report
from tests.experiments import summaries

GOODPUT = """\
SLO: TTFT <= 12.30 ms and TPOT <= 4.56 ms for 90% of requests: vllm_v0 > pair
  told apart, paired by seed: 1 of 1 pairs
model tiny; 70 requests x 3 seeds a point
clock: virtual, durations: table (each program timed alone; valid for devices that \
are really separate)
goodput                          vllm_v0                    pair
deployment               2xcolocated:tp1  prefill:tp1,decode:tp3
requests/s per device  12.3 [11.0, 13.5]                     5.0
passes at / fails at         12.0 / 14.0                 - / 6.0
every seed bracketed                 yes                      no
resolved                              no                     yes
steady                               yes                       -
goodput pair/vllm_v0, paired by seed: 0.40 [0.30, 0.50]
vllm_v0: colocated max_batched_tokens = 64: the default
at its highest passing rate                                 vllm_v0       pair
attainment: both / TTFT / TPOT                10.0% / 11.0% / 12.0%  - / - / -
TTFT P50 / P90 / P99, ms                   100.00 / 101.00 / 102.00  - / - / -
TPOT P50 / P90 / P99, ms                   103.00 / 104.00 / 105.00  - / - / -
ITL P50 / P90 / P99, ms                    106.00 / 107.00 / 108.00  - / - / -
mean prefill queue, ms                                       109.00          -
mean prefill, ms                                             110.00          -
mean transfer, ms                                            111.00          -
mean decode queue, ms                                        112.00          -
mean decode, ms                                              113.00          -
output tokens/s per device                                     1001          -
preemptions                                                     1.8          -
padding of prefill / mixed / decode steps           11% / 12% / 13%  - / - / -
prefill stages busy, mean / idlest                          - / 50%      - / -
decode stages busy, mean / idlest                         61% / 51%      - / -
colocated stages busy, mean / idlest                      62% / 52%      - / -
KV moved between instances, MB                                 2.50          -
rank by each criterion                           1
distserve *, requests/s per device   vllm_v0 12.35
fastgen, good requests/s per device      pair ~9.5
not listed: 2 values, of 2 systems, of which only a bound is known (criteria.NAME.rank \
in summary.json)"""

THROUGHPUT = """\
fastgen: good requests: vllm_v0 > pair
model tiny; 70 requests x 3 seeds a point
throughput by fastgen               vllm_v0                    pair
deployment                  2xcolocated:tp1  prefill:tp1,decode:tp3
good requests/s per device     2.123 [1, 9]            3.123 [1, 9]
at requests/s per device               20.0                    30.0
bracketed                               yes                      no
steady                                   no                     yes
throughput pair/vllm_v0, paired by seed: 0.40 [0.30, 0.50]
at its best rate                                            vllm_v0                      pair
attainment: both / TTFT / TPOT                20.0% / 21.0% / 22.0%     30.0% / 31.0% / 32.0%
mean transfer, ms                                            211.00                    311.00
KV moved between instances, MB                                 2.50                      2.50
distserve, requests/s per device       vllm_v0 12.35
fastgen *, good requests/s per device      pair ~9.5"""  # noqa: E501


def expect_lines(expected: str, summary) -> None:
    """All of these lines are there, in this order; others may be between them."""
    lines = iter(report.table(summary).splitlines())
    missing = [line for line in expected.splitlines() if line not in lines]
    assert not missing


def test_a_goodput_has_each_number_in_its_place():
    expect_lines(GOODPUT, summaries.goodput())


def test_a_throughput_has_each_number_in_its_place():
    expect_lines(THROUGHPUT, summaries.throughput())


def test_another_criterions_goodput_is_called_by_it():
    table = report.table(summaries.goodput(criterion="fastgen"))
    assert table.startswith("fastgen: good requests: vllm_v0 > pair")
    assert "\ngoodput by fastgen " in table and "\nfastgen *, " in table


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clock": "wall", "durations": "live"}, "real time on this machine's devices"),
        ({"durations": "modelled"}, "times come from a formula; tokens are real"),
        ({"durations": "live"}, "each program timed alone"),
    ],
)
def test_the_table_says_what_durations_are_worth(changes, said):
    clock = f"clock: {changes.get('clock', 'virtual')}, durations: "
    expected = f"{clock}{changes['durations']} ({said}"
    assert f"\n{expected}" in report.table(summaries.goodput(**changes))


def test_the_table_says_where_programs_ran():
    said = "programs ran on the first 50 requests of the first seed"
    assert said not in report.table(summaries.goodput())
    assert said in report.table(summaries.goodput(executed="passing"))


@pytest.mark.parametrize(
    ("moved_bytes", "shown"),
    [(2.5e6, "2.50"), (0.0, "0.00"), (12_345.0, "0.01"), (7e9, "7000.00")],
)
def test_bytes_are_shown_in_megabytes_of_a_million(moved_bytes, shown):
    summary = summaries.goodput()
    at = summary["systems"]["vllm_v0"]["goodput"]
    at["at_pass_rate"] = summaries.metrics(1.0, transfer_bytes=moved_bytes)
    (line,) = [
        x for x in report.table(summary).splitlines() if x.startswith("KV moved")
    ]
    assert line.split() == [*"KV moved between instances, MB".split(), shown, "-"]


# -- the picture -----------------------------------------------------------------------


def drawn(summary):
    """The curves of the scores: style, x and y of the points."""
    series = report.scores(summary).series
    return [
        (one.style, [x for x, _ in one.points], [y for _, y in one.points])
        for one in series
    ]


def test_the_picture_has_scores_in_percent_over_the_rate_of_a_device():
    panel, curves = report.scores(summaries.goodput()), drawn(summaries.goodput())
    assert ("dots", [12.0, 14.0], pytest.approx([70.0, 40.0])) in curves
    assert ("dotted", [12.0, 14.0], pytest.approx([71.0, 41.0])) in curves  # TTFT only
    assert ("dashed", [12.0, 14.0], pytest.approx([72.0, 42.0])) in curves
    # 24 requests/s on 4 devices.
    assert ("dots", [6.0], pytest.approx([5.0])) in curves
    assert ("diamond", [12.34], [90.0]) in curves  # the goodput
    assert panel.line == 90.0
    vllm, pair = (one for one in panel.series if one.style == "dots")
    # The band is the interval, cut at 0 and 100 %.
    assert vllm.band == [pytest.approx((60.0, 90.0)), pytest.approx((30.0, 60.0))]
    assert pair.band == [pytest.approx((0.0, 25.0))]
    assert vllm.colour == system_colour("vllm_v0") != pair.colour
    assert pair.colour == system_colour("pair")
    labels = [one.label for one in panel.series if one.label]
    assert labels[:2] == ["vllm_v0 (2xcolocated:tp1)", "pair (prefill:tp1,decode:tp3)"]
    assert labels[2:] == ["TTFT only", "TPOT only", "goodput at the target"]


def test_the_picture_names_its_axes_and_cuts_no_point():
    panel = report.scores(summaries.goodput())
    assert panel.x == "arrival rate (requests/s per device)"
    assert panel.y == "requests within the SLO (%)"
    assert panel.ylim is not None and panel.ylim[0] <= 0 and panel.ylim[1] >= 100
    # An interval of shares may reach beyond all of them.
    summary = summaries.goodput()
    for point in summary["systems"]["vllm_v0"]["points"]:
        point["criteria"]["distserve"] |= {"mean": 0.95, "low": -0.2, "high": 1.3}
    assert set(report.scores(summary).series[0].band or ()) == {(0.0, 100.0)}


def picture(monkeypatch, summary):
    """The title and the notes of the picture."""
    said = []
    monkeypatch.setattr(
        report, "draw", lambda _, title, path, notes, dpi: said.append((title, notes))
    )
    report.plot(summary, "an H100", pathlib.Path("x.png"))
    return said[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "95 % intervals"),
        ({"num_seeds": 2}, "no intervals"),
        ({"no_intervals": "runs share rows"}, "no intervals"),
    ],
)
def test_the_picture_says_whether_it_has_intervals(changes, said, monkeypatch):
    title, _ = picture(monkeypatch, summaries.goodput(**changes))
    assert f" seeds a point, {said}; virtual clock, durations" in title


def test_the_picture_of_another_criterion_says_what_it_is(monkeypatch):
    summary = summaries.goodput(criterion="fastgen")
    title, _ = picture(monkeypatch, summary)
    assert title.startswith("tiny on an H100: fastgen: good requests\n")
    assert report.scores(summary).y == "fastgen: score (%)"


def test_the_picture_and_the_table_say_all_that_is_to_be_said_of_a_trace(monkeypatch):
    said = {"trace": {"said": ["first line", "second line"]}, "no_intervals": "a why"}
    summary = summaries.goodput(**said)
    lines = ["first line", "second line", "no intervals, and nothing resolved: a why"]
    assert picture(monkeypatch, summary)[1] == lines
    assert report.table(summary).splitlines()[4:7] == lines
    assert not picture(monkeypatch, summaries.goodput())[1]


def test_the_stages_of_every_system_that_passed_are_in_a_row():
    bars = report.stages(summaries.throughput())
    begins = [[begin for begin, *_ in bar.spans] for bar in bars.bars]
    # 209, 210, 211 and 212 ms; the other's begin with 309.
    assert len(begins) == 2 and begins[0][:4] == [0.0, 209.0, 419.0, 630.0]
    assert begins[1][1] == 309.0
    assert bars.x == "mean time of a request (ms)"


def test_an_order_that_is_open_is_marked_wherever_it_is():
    """By the second criterion, where a lower rate fails."""
    summary = summaries.goodput()
    note = "! not monotone: a lower rate fails, or a higher one passes again"
    assert note not in report.table(summary)
    summary["criteria"]["fastgen"]["rank"][0]["monotone"] = False
    lines = report.table(summary).splitlines()
    assert note in lines
    (row,) = [line for line in lines if line.startswith("fastgen, ")]
    assert row.endswith("pair ~!9.5")


def test_a_system_of_which_only_a_bound_is_known_is_not_ranked():
    """By distserve the pair is below 6; by fastgen vllm_v0 has at least 7.5."""
    summary = summaries.goodput()
    ranks = [found["rank"] for found in summary["criteria"].values()]
    assert "not listed: 2 values, of 2 systems, " in report.table(summary)
    for rows in ranks:
        rows[:] = [row | {"known": "below", "bound": 6.0} for row in rows]
    table = report.table(summary)
    assert "not listed: 4 values, of 2 systems, " in table
    assert "\nfastgen, good requests/s per device\n" in table
    for rows in ranks:
        rows[:] = [row | {"known": "yes", "bound": None} for row in rows]
    table = report.table(summary)
    assert "not listed" not in table and "pair 9.5  vllm_v0 8.5\n" in table


def test_the_picture_of_a_throughput_is_per_device():
    panel, curves = report.scores(summaries.throughput()), drawn(summaries.throughput())
    # 40 and 30 times the shares, on 2 devices and on 4.
    assert ("dots", [12.0, 14.0], pytest.approx([14.0, 8.0])) in curves
    assert ("dots", [6.0], pytest.approx([0.5])) in curves
    assert panel.y == "good requests/s per device" and panel.line is None
    # Where one end of an interval is not known the band ends at the mean.
    assert panel.series[0].band == [pytest.approx((10.5, 14.0)), pytest.approx((6, 8))]


def test_the_picture_stacks_the_stages_of_what_passed():
    bars = report.stages(summaries.goodput())
    (vllm,) = bars.bars
    stamps = (0.0, 109.0, 219.0, 330.0, 442.0, 555.0)
    assert [span[:2] for span in vllm.spans] == list(itertools.pairwise(stamps))
    labels = ["prefill queue", "prefill", "transfer", "decode queue", "decode"]
    assert list(bars.legend) == labels
    assert list(bars.legend.values()) == [colour for *_, colour in vllm.spans]
    assert bars.title == "at each one's highest passing rate"
    assert report.stages(summaries.throughput()).title == "at each one's best rate"


def test_the_picture_says_what_was_run(monkeypatch, tmp_path):
    said = {}
    monkeypatch.setattr(
        report, "draw", lambda panels, title, path, **more: said.update(title=title)
    )
    report.plot(summaries.goodput(), "an H100", tmp_path / "x.png")
    asked = "tiny on an H100: TTFT <= 12 ms, TPOT <= 4.56 ms\n70 requests x 3 seeds"
    assert said["title"].startswith(asked)
    assert "95 % intervals; virtual clock" in said["title"]
    report.plot(summaries.goodput(num_seeds=1), "an H100", tmp_path / "x.png")
    assert "no intervals" in said["title"]


def test_a_rank_that_is_coarse_or_not_monotone_is_marked():
    row = {"mean": 2.0, "bound": None, "known": "coarsely", "monotone": False}
    assert report._ranked(row) == "~!2"


@pytest.mark.parametrize("made", [summaries.goodput, summaries.two_targets])
def test_a_run_that_is_not_finished_says_so_and_what_it_lacks(made, monkeypatch):
    missing = ["the look after 8 seeds", "the programs of orca"]
    summary = {**made(), "missing": missing}
    said = "NOT FINISHED, as --minutes were spent; the same command goes on with "
    said += "; ".join(missing)
    assert said in report.table(summary).splitlines()
    assert picture(monkeypatch, summary)[1][0] == said
    assert "NOT FINISHED" not in report.table(made())


# -- two targets -----------------------------------------------------------------------

TWO = """\
tight SLO: TTFT <= 12.30 ms and TPOT <= 4.56 ms for 90% of requests: vllm_v0 > pair
  told apart, paired by seed: 1 of 1 pairs
  settled by these timings: vllm_v0 is ahead by either half of them
relaxed SLO: TTFT <= 20.00 ms and TPOT <= 8.00 ms for 90% of requests: pair ~ vllm_v0
  told apart, paired by seed: 0 of 1 pairs
  not settled by these timings: pair is ahead by the first half of them, vllm_v0 by \
the second
model tiny; 70 requests x 3 (tight) or 6 (relaxed) seeds a point
step times: 8 rounds, steady: the medians of their halves differ by over 5 % for 5% of \
programs
deployment                        2xcolocated:tp1  prefill:tp1,decode:tp3
tight: requests/s per device    12.3 [11.0, 13.5]                     5.0
relaxed: requests/s per device  12.3 [11.0, 13.5]                     5.0
goodput pair/vllm_v0, paired by seed: tight 0.40 [0.30, 0.50], relaxed 0.40 [0.30, 0.50]
pair: no step size meets TPOT <= 4.56 ms: its smallest full step with a prompt beside \
decodes takes 5.10 ms
relaxed: fastgen, good requests/s per device      pair ~9.5
not listed: 4 values, of 2 systems, of which only a bound is known (criteria.NAME.rank \
in summary.json)
intervals: 97.5% each, so that they hold with 95 % together over 2 looks, after 3, 6 \
seeds"""


def test_two_targets_stand_side_by_side_below_who_is_ahead():
    expect_lines(TWO, summaries.two_targets())
    table = report.table(summaries.two_targets())
    assert table.startswith(TWO.splitlines()[0])
    assert table.count("no step size meets") == 1  # the relaxed one every system meets


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("resolved", "--set num_seeds=32"),
        ("steady", "--set workload.num_requests=3000"),
        ("settled", "--set timing_repeats=40"),
    ],
)
def test_a_word_of_the_table_is_explained_below_it_with_what_to_do(word, remedy):
    lines = report.table(summaries.two_targets()).splitlines()
    (line,) = [line for line in lines if line.startswith(f"{word}: ")]
    assert remedy in line


def test_pairs_that_are_not_told_apart_are_named():
    summary = summaries.goodput()
    (first,) = summary["pairs"]
    summary["pairs"] = [
        {**first, "ahead": "a", "behind": "b", "told_apart": False},
        {**first, "ahead": "a", "behind": "c"},
        {**first, "ahead": "b", "behind": "c"},
    ]
    lines = report.table(summary).splitlines()
    assert lines[0].endswith(": a ~ b > c")
    assert lines[1] == "  told apart, paired by seed: 2 of 3 pairs, all but a ~ b"


def test_step_times_of_one_round_say_nothing_of_their_steadiness():
    taken = {"rounds": 1, "unsteady_share": None, "steady": False}
    table = report.table(summaries.goodput(step_times=taken))
    assert "step times: one median a program, so nothing says how steady" in table


def test_the_picture_has_a_panel_of_each_target(monkeypatch):
    said = {}
    monkeypatch.setattr(
        report,
        "draw",
        lambda panels, title, path, **more: said.update(panels=panels, title=title),
    )
    report.plot(summaries.two_targets(), "an H100", pathlib.Path("x.png"))
    assert [panel.title for panel in said["panels"]] == ["tight", "relaxed"]
    assert said["title"].splitlines()[:2] == [
        "tiny on an H100: tight TTFT <= 12 ms, TPOT <= 4.56 ms",
        "tiny on an H100: relaxed TTFT <= 20 ms, TPOT <= 8 ms",
    ]
    assert "97.5 % intervals" in said["title"]


def test_a_point_of_fewer_seeds_has_no_band():
    summary = summaries.goodput()
    for seeds, point in zip(
        (2, 3), summary["systems"]["vllm_v0"]["points"], strict=True
    ):
        point["num_seeds"] = seeds
    bands = report.scores(summary).series[0].band
    assert bands == [pytest.approx((70.0, 70.0)), pytest.approx((30.0, 60.0))]
    bands = report.scores({**summary, "num_seeds": 2}).series[0].band
    assert bands == [pytest.approx((70.0, 70.0)), pytest.approx((30.0, 60.0))]


def test_two_seeds_have_no_band():
    bands = report.scores(summaries.goodput(num_seeds=2)).series[0].band
    assert bands == [pytest.approx((70.0, 70.0)), pytest.approx((40.0, 40.0))]
