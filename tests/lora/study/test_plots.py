"""`lora.study.plots`: what a figure shows, as numbers, and the style's promises."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lora.study.plots import drawn, heat, use_book_style


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
