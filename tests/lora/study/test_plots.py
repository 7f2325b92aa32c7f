"""`lora.study.plots`: what a figure shows, as numbers, and the style's promises."""

import io
from base64 import b64decode

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from IPython.core.pylabtools import print_figure
from matplotlib.figure import Figure
from PIL import Image

from lora.study import plots
from lora.study.plots import (
    NARROW,
    arrange,
    boundary,
    drawn,
    heat,
    panels,
    use_book_style,
)


@pytest.fixture
def axes():
    use_book_style()
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.mark.parametrize(
    ("draw", "numbers"),
    [
        (lambda ax: ax.plot([0, 1], [2, 3.5]), [0, 2, 1, 3.5]),
        (lambda ax: ax.bar([1], [4], width=0.5), [0.75, 0, 1.25, 4]),
        (lambda ax: ax.scatter([1, 2], [3, 4]), [1, 3, 2, 4]),
        (lambda ax: ax.imshow(np.array([[1.0, 2.0]])), [1, 2]),
        (lambda ax: ax.axhline(0.3), [0, 0.3, 1, 0.3]),
    ],
    ids=["line", "bar", "points", "image", "level"],
)
def test_what_is_drawn(axes, draw, numbers):
    draw(axes)
    assert drawn(axes.figure) == pytest.approx(numbers)


def test_intervals_and_bands_count(axes):
    axes.errorbar([1], [2], yerr=[0.5])
    assert {1.5, 2.5} <= set(drawn(axes.figure))
    before = drawn(axes.figure)
    axes.fill_between([0, 1], [2, 2], [3, 7])
    assert 7 in drawn(axes.figure)[len(before) :]


def outputs(figure):
    """Kind -> width and height in inches of what a notebook stores of a figure."""
    formatter = DisplayFormatter()
    png = formatter.formatters["image/png"]
    png.for_type(Figure, lambda figure: print_figure(figure, base64=True))
    data, _ = formatter.format(figure, include=["image/png", NARROW])
    return {
        kind: tuple(n / 150 for n in Image.open(io.BytesIO(b64decode(png))).size)
        for kind, png in data.items()
    }


def texts(axes):
    """The labels of each panel, and whether its ticks have numbers."""
    numbers = [
        [
            bool(axis.get_tick_params()[edge])
            for ax in axes
            for axis in [getattr(ax, name)]
        ]
        for name, edge in (("xaxis", "labelbottom"), ("yaxis", "labelleft"))
    ]
    labels = [[ax.get_xlabel() for ax in axes], [ax.get_ylabel() for ax in axes]]
    return labels, numbers


def test_a_figure_has_two_sizes(axes):
    axes.plot([1, 2])
    found = outputs(axes.figure)
    assert found[NARROW] == pytest.approx((4.3, 2.9), abs=0.2)
    assert found["image/png"] == pytest.approx((7.5, 2.9), abs=0.2)
    assert plt.rcParams["font.size"] == 10
    assert plt.rcParams["savefig.facecolor"] == "white"


def test_a_photograph_has_one_size(axes):
    axes.imshow(np.ones((8, 9)))
    assert outputs(axes.figure).keys() == {"image/png"}


@pytest.mark.parametrize(("n", "rows"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_panels_are_abreast_and_stacked(n, rows):
    use_book_style()
    figure, axes = panels(n, height=2)
    for ax in axes:
        ax.plot([1, 2])
    before, found = drawn(figure), outputs(figure)
    assert found["image/png"] == pytest.approx((7.5, 2 * rows), abs=0.3)
    assert found[NARROW] == pytest.approx((4.3, 2 * n), abs=0.3)
    assert drawn(figure) == before
    plt.close(figure)


def test_panels_that_share_an_axis_are_labelled_at_the_edge():
    use_book_style()
    figure, axes = panels(2, sharex=True, sharey=True)
    axes[0].set(ylabel="loss")
    axes[1].set(xlabel="step")
    arrange(figure, 1)
    assert texts(axes) == (
        [["", "step"], ["loss", "loss"]],
        [[False, True], [True, True]],
    )
    arrange(figure, 2)
    assert texts(axes) == (
        [["step", "step"], ["loss", ""]],
        [[True, True], [True, False]],
    )
    plt.close(figure)


def test_panels_with_axes_of_their_own_keep_their_labels():
    figure, axes = panels(2)
    axes[0].set(xlabel="rank", ylabel="loss")
    arrange(figure, 2)
    assert texts(axes)[0] == [["rank", ""], ["loss", ""]]
    plt.close(figure)


def test_a_boundary_is_drawn_where_the_classifier_changes_its_mind(axes):
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    boundary(
        axes,
        lambda p: torch.stack([torch.zeros(len(p)), 9 * (p[:, 0] - 1.5)], 1),
        x,
        torch.tensor([0, 1, 0]),
    )
    image = axes.images[0].get_array()
    assert image.shape == (80, 80) and image[0, 0] < 0.01 and image[0, -1] > 0.99
    low, high, *_ = axes.images[0].get_extent()
    assert low < 0 and high > 2  # the points lie inside
    points = {tuple(p) for c in axes.collections for p in c.get_offsets().tolist()}
    assert {(0.0, 0.0), (2.0, 0.0), (1.0, 1.0)} <= points
    (line,) = (
        p
        for c in axes.collections
        if not len(c.get_offsets()) > 1
        for p in c.get_paths()
        if len(p.vertices) > 9
    )
    assert line.vertices[:, 0] == pytest.approx(1.5, abs=0.03)


def test_the_diagram_has_the_parts_of_a_layer_in_their_colours():
    figure = plots.layer()
    (ax,) = figure.axes
    colours = [matplotlib.colors.to_hex(p.get_facecolor()).upper() for p in ax.patches]
    assert colours == [plots.FROZEN, plots.A, plots.B]
    wide, thin, tall = (p.get_bbox() for p in ax.patches)
    assert thin.height < wide.height / 3 and tall.width < wide.width / 3
    assert {"W\nfrozen", "A", "B", "x", "+", "y"} <= {t.get_text() for t in ax.texts}
    plt.close(figure)


@pytest.mark.parametrize(
    ("frozen", "vectors", "expected"),
    [
        ("", "", [plots.FROZEN, plots.A, plots.B]),
        ("A", "", [plots.FROZEN, plots.FROZEN, plots.B]),
        ("AB", "bd", [plots.FROZEN] * 3 + [plots.ORANGE] * 2),
    ],
)
def test_a_variant_shows_what_trains_in_colour(axes, frozen, vectors, expected):
    plots.variant(axes, "name", "formula", frozen, vectors)
    colours = [
        matplotlib.colors.to_hex(p.get_facecolor()).upper() for p in axes.patches
    ]
    assert colours == expected
    assert {"W", "A", "B", "formula"} <= {t.get_text() for t in axes.texts}
    assert axes.get_title() == "name"


def test_dots_stand_in_their_rows_with_their_intervals(axes):
    groups = {"one": [(1, 0.5, 2), (3, 2, 4)], "two": [(5, 4, 6), (7, 6, 8)]}
    plots.dots(axes, groups, ["first", "second"])
    drawn_lines = [line.get_xydata().tolist() for line in axes.lines]
    assert [[1, -0.1]] in drawn_lines and [[7, 1.1]] in drawn_lines
    assert [[2, 0.9], [4, 0.9]] in drawn_lines
    assert axes.get_legend_handles_labels()[1] == ["one", "two"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["first", "second"]
    top, bottom = axes.transData.transform([[0, 0], [0, 1]])[:, 1]
    assert top > bottom


def test_a_heat_map_shows_the_table(axes):
    table = pd.DataFrame([[-0.3, 12.0], [-8.0, 1.0]], ["a", "b"], ["c", "d"])
    heat(axes, table)
    assert drawn(axes.figure) == [-0.3, 12, -8, 1]
    texts = [(text.get_text(), text.get_color()) for text in axes.texts]
    assert texts == [("0", "black"), ("12", "white"), ("−8", "white"), ("1", "black")]
    names = [
        [t.get_text() for t in a.get_ticklabels()] for a in (axes.xaxis, axes.yaxis)
    ]
    assert names == [["c", "d"], ["a", "b"]]
    assert axes.images[0].get_clim() == (-12, 12)
