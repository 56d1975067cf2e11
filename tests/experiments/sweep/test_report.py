"""A sweep's table and picture from a summary made by hand: each number in its place."""

import dataclasses

import matplotlib.figure
import pytest

from disagg_jax.metrics import interval_across
from experiments.report.table import align
from experiments.sweep import report
from tests.experiments import summaries

GOODPUT = """\
model tiny; SLO: TTFT <= 12.30 ms and TPOT <= 4.56 ms for 90% of requests; \
70 requests x 3 seeds a point
clock: virtual, durations: table (each program timed alone; valid for devices that \
are really separate)
vllm_v0: colocated max_batched_tokens = 64: the default
goodput                          vllm_v0                    pair
deployment               2xcolocated:tp1  prefill:tp1,decode:tp3
requests/s per device  12.3 [11.0, 13.5]                     5.0
passes at / fails at         12.0 / 14.0                 - / 6.0
every seed bracketed                 yes                      no
resolved                              no                     yes
steady                               yes                       -
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
goodput pair/vllm_v0, paired by seed: 0.40 [0.30, 0.50]
rank by each criterion                           1               2
distserve *, requests/s per device   vllm_v0 12.35        pair < 6
fastgen, good requests/s per device      pair ~9.5  vllm_v0 >= 7.5"""

THROUGHPUT = """\
model tiny; fastgen: good requests; 70 requests x 3 seeds a point
throughput by fastgen               vllm_v0                    pair
deployment                  2xcolocated:tp1  prefill:tp1,decode:tp3
good requests/s per device     2.123 [1, 9]            3.123 [1, 9]
at requests/s per device               20.0                    30.0
bracketed                               yes                      no
steady                                   no                     yes
at its best rate                                            vllm_v0                      pair
attainment: both / TTFT / TPOT                20.0% / 21.0% / 22.0%     30.0% / 31.0% / 32.0%
mean transfer, ms                                            211.00                    311.00
KV moved between instances, MB                                 2.50                      2.50
throughput pair/vllm_v0, paired by seed: 0.40 [0.30, 0.50]
distserve, requests/s per device       vllm_v0 12.35        pair < 6
fastgen *, good requests/s per device      pair ~9.5  vllm_v0 >= 7.5"""  # noqa: E501


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
    assert table.startswith("model tiny; fastgen: good requests; 70 requests")
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
    said = "programs ran at the rates of the second table"
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


def test_an_interval_is_shown_where_there_is_one():
    found = dataclasses.asdict(interval_across([1.0, 2.0, 6.0]))
    for low, high in ((None, None), (None, 3.0), (1.0, None)):
        unknown = {"mean": 2.0, "low": low, "high": high}
        assert report.interval_text(unknown, ".2f") == "2.00"
    # t of two degrees of freedom is 4.303: 3 +- 4.303 * sqrt(7 / 3).
    assert report.interval_text(found, ".1f").startswith("3.0 [")
    assert report.interval_text(found, ".1f").endswith(", 9.6]")


def test_columns_end_or_begin_together():
    rows = [("a", "long", "x"), ("bcd", "1", "")]
    assert align(rows) == ["a    long  x", "bcd  1"]
    assert align(rows, right=(1,)) == ["a    long  x", "bcd     1"]


# -- the picture -----------------------------------------------------------------------


def lines_of(axes):
    """The curves by label and colour: x and y of the points."""
    return [
        (line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
    ]


def test_the_picture_has_scores_in_percent_over_the_rate_of_a_device():
    axes = matplotlib.figure.Figure().subplots()
    report._plot_scores(axes, summaries.goodput())
    lines = lines_of(axes)
    assert ("-", [12.0, 14.0], pytest.approx([70.0, 40.0])) in lines
    assert (":", [12.0, 14.0], pytest.approx([71.0, 41.0])) in lines  # TTFT only
    assert ("--", [12.0, 14.0], pytest.approx([72.0, 42.0])) in lines
    assert ("-", [6.0], pytest.approx([5.0])) in lines  # 24 requests/s on 4 devices
    assert ([12.34], [90.0]) in [(x, y) for _, x, y in lines]  # the goodput
    (_, _, target) = next(line for line in lines if line[1] == [0, 1])
    assert target == [90.0, 90.0]
    # The band is the interval, cut at 0 and 100 %.
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (low, high) == (pytest.approx(30.0), pytest.approx(90.0))
    (cut, _) = axes.collections[1].get_datalim(axes.transData).intervaly
    assert cut == 0.0
    assert axes.get_title().startswith("tiny: TTFT <= 12 ms, TPOT <= 4.56 ms\n70 req")
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[:2] == ["vllm_v0 (2xcolocated:tp1)", "pair (prefill:tp1,decode:tp3)"]
    assert legend[2:] == ["TTFT only", "TPOT only", "goodput at the target"]


def test_the_picture_of_a_throughput_is_per_device():
    axes = matplotlib.figure.Figure().subplots()
    report._plot_scores(axes, summaries.throughput())
    # 40 and 30 times the shares, on 2 devices and on 4.
    assert ("-", [12.0, 14.0], pytest.approx([14.0, 8.0])) in lines_of(axes)
    assert ("-", [6.0], pytest.approx([0.5])) in lines_of(axes)
    assert axes.get_ylabel() == "good requests/s per device"
    # Where one end of an interval is not known the band ends at the mean.
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (low, high) == (pytest.approx(6.0), pytest.approx(14.0))


def test_the_picture_stacks_the_stages_of_what_passed():
    axes = matplotlib.figure.Figure().subplots()
    report._plot_stages(axes, summaries.goodput())
    bars = [(bar.get_y(), bar.get_height()) for bar in axes.patches]
    tops = (0.0, 109.0, 219.0, 330.0, 442.0)
    assert bars == [*zip(tops, (109.0, 110.0, 111.0, 112.0, 113.0), strict=True)]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[::-1] == [
        *("prefill queue", "prefill", "transfer", "decode queue", "decode")
    ]
    assert axes.get_title() == "at each one's highest passing rate"
    report._plot_stages(axes, summaries.throughput())
    assert axes.get_title() == "at each one's best rate"
