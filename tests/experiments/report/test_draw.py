"""Pictures: everything that a panel says is on the axes."""

import pytest
from matplotlib.colors import to_rgba

from experiments.report import draw
from experiments.report.panel import (
    Bar,
    Bars,
    CellMap,
    ColouredCell,
    Panel,
    Series,
    banded,
    banded_curves,
    curves,
)

PANEL = Panel(
    title="t",
    x="x (s)",
    y="y (s)",
    series=[
        Series(label="a", points=[(1, 2), (2, 3)], colour=0, band=[(1, 3), (2, 5)]),
        Series(label="b", points=[(1, 4)], colour=1, style="paper"),
        Series(label="", points=[(2, 4)], colour=2, style="diamond"),
    ],
    line=0.5,
    log_x=True,
)
BARS = Bars(
    title="stages",
    x="ms",
    bars=[
        Bar(label="one", spans=[(0, 1, 7), (1, 3, 2)], ticks=[1.5]),
        Bar(label="two", spans=[(0, 2, 7)], interval=(1.5, 2.5)),
    ],
    legend={"queue": 7, "decode": 2},
    ticks="a token",
)
MAP = CellMap(
    title="m",
    x="TTFT (s)",
    y="TPOT (s)",
    columns=["1", "2"],
    rows=["3"],
    cells={
        (0, 0): ColouredCell(text="orca", colour=2, hatched=True),
        (1, 0): ColouredCell(text="nobody", colour=None),
    },
    legend={"orca": 2},
    hatched="unclear",
    notes=["a note"],
)


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draws; the figure that was written."""
    made = []
    inner = draw._figure
    monkeypatch.setattr(draw, "_figure", lambda *a: made.append(inner(*a)) or made[0])

    def drawn(*panels, **more):
        draw.draw(panels, "the title", tmp_path / "x.png", **more)
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        return made[0]

    return drawn


def texts(found):
    return [text.get_text() for text in found]


def test_curves_have_their_points_bands_and_labels(figure):
    (axes,) = figure(PANEL).axes
    a, b, goodput, line = axes.lines
    assert (a.get_color(), list(a.get_ydata())) == (draw.COLOURS[0], [2, 3])
    assert (b.get_marker(), b.get_markerfacecolor()) == ("s", "none")
    assert goodput.get_marker() == "D" and list(line.get_ydata()) == [0.5, 0.5]
    box = axes.collections[0].get_datalim(axes.transData)
    assert tuple(box.intervaly) == (1.0, 5.0)
    assert texts(axes.get_legend().get_texts()) == ["a", "b"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x (s)", "y (s)")


def test_bars_have_their_spans_ticks_and_intervals(figure):
    drawn = figure(BARS)
    (axes,) = drawn.axes
    spans = [
        (bar.get_x(), bar.get_width(), bar.get_facecolor()) for bar in axes.patches
    ]
    colours = [to_rgba(draw.COLOURS[i]) for i in (7, 2, 7)]
    assert spans == [(0, 1, colours[0]), (1, 2, colours[1]), (0, 2, colours[2])]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1.5], [1.5, 2.5]]
    assert texts(axes.get_yticklabels()) == ["one", "two"] and axes.yaxis_inverted()
    assert texts(drawn.legends[0].get_texts()) == ["queue", "decode", "a token"]


def test_a_map_has_its_cells_at_their_places(figure):
    drawn = figure(MAP)
    (axes,) = drawn.axes
    at = {text.get_position(): text.get_text() for text in axes.texts}
    assert at == {(0, 0): "orca", (1, 0): "nobody"}
    assert [text.get_color() for text in axes.texts] == ["white", "black"]
    assert [patch.get_hatch() for patch in axes.patches] == ["///", None]
    assert [patch.get_x() for patch in axes.patches] == [-0.5, 0.5]
    assert texts(axes.get_xticklabels()) == ["1", "2"]
    assert texts(drawn.legends[0].get_texts()) == ["orca", "unclear", "a note"]


def test_panels_of_all_kinds_share_a_picture(figure):
    drawn = figure(PANEL, BARS, notes=["something is in doubt"])
    assert [axes.get_title() for axes in drawn.axes] == ["t", "stages"]
    assert drawn.get_suptitle() == "the title\nsomething is in doubt"


def test_equal_panels_give_equal_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw.draw([PANEL], "t", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_curve_over_seeds_has_an_interval_at_each_point():
    series = banded("a", {1.0: [2.0, 3.0, 7.0], 2.0: [5.0]}, 3)
    assert list(series.points) == [(1.0, 4.0), (2.0, 5.0)]
    # t of two degrees of freedom is 4.303, the deviation sqrt(7): 4 +- 6.572, and no
    # rate is negative.
    assert series.band[0] == (0.0, pytest.approx(10.572, abs=1e-3))
    assert series.band[1] == (5.0, 5.0)  # one seed gives no interval


def test_two_seeds_give_no_band_that_hides_the_curves():
    assert banded("a", {1.0: [2.0, 4.0]}, 3).band == [(3.0, 3.0)]


def test_banded_curves_have_the_colours_that_are_given():
    values = {"a": {1.0: [2.0]}, "b": {1.0: [3.0]}}
    assert [one.colour for one in banded_curves(values)] == [0, 1]
    given = banded_curves(values, colours={"a": 4, "b": 2})
    assert [one.colour for one in given] == [4, 2]


def test_curves_count_their_colours_up_unless_they_are_given():
    points = {"a": [(0.0, 1.0)], "b": [(0.0, 2.0)]}
    counted = curves(points, "{}, paper", style="paper")
    assert [(one.label, one.colour) for one in counted] == [
        ("a, paper", 0),
        ("b, paper", 1),
    ]
    given = curves(points, colours={"a": 4, "b": 2})
    assert [one.colour for one in given] == [4, 2]
