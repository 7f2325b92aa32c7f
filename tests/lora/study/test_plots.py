"""`lora.study.plots`: what a figure shows, as numbers, and the style's promises."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lora.study import plots
from lora.study.plots import boundary, drawn, use_book_style


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


def test_figures_fit_a_phone(axes):
    assert axes.figure.get_size_inches()[0] <= 4.3
    assert plt.rcParams["font.size"] == 10
    assert plt.rcParams["savefig.facecolor"] == "white"


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
