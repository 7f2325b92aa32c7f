"""One look for all figures: colours safe for the colour-blind and in grey, on white."""

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.collections import Collection
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

# Okabe and Ito's palette, dark to light, so that neighbours differ in grey too.
BLUE, RED, GREEN, ORANGE, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#6E6E6E",
)

# One object, one colour, in all chapters: figures, tables, diagrams, the laboratory.
FROZEN, A, B = GREY, SKY, GREEN
BASE, LORA, FULL = GREY, BLUE, RED


def panels(n, height=2.6, **options):
    """A figure and its n axes: abreast on a wide page, stacked on a narrow one.

    `height` of a panel in inches; `options` as for `matplotlib.pyplot.subplots`.
    """
    return plt.subplots(n, 1, figsize=(4.3, n * height), **options)


def heat(ax, table):
    """A DataFrame as coloured cells with rounded numbers: zero is white."""
    values = table.to_numpy()
    limit = abs(values).max()
    ax.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(values):
        color = "white" if abs(value) > 0.6 * limit else "black"
        text = f"{value:.0f}".replace("-0", "0").replace("-", "\N{MINUS SIGN}")
        ax.text(j, i, text, ha="center", va="center", color=color)
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(table.columns)), table.columns, **turned)
    ax.set_yticks(range(len(table)), table.index)
    ax.grid(visible=False)


def use_book_style():
    """Set matplotlib's defaults: opaque white, 150 dpi, colours paired with dashes."""
    lines = cycler(color=[BLUE, RED, GREEN, ORANGE, SKY, GREY])
    lines += cycler(linestyle=["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))])
    plt.rcParams.update(
        {
            "figure.figsize": (4.3, 2.9),
            "figure.dpi": 150,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "axes.grid": True,
            "axes.prop_cycle": lines,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": "medium",
            "font.size": 10,
            "grid.alpha": 0.3,
            "image.cmap": "cividis",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
        }
    )


def drawn(figure):
    """The numbers that a figure shows, as a list of floats: its data, not its pixels.

    Lines, markers, bars and areas in data coordinates, and the values of images, in
    the order of drawing. Not texts, ticks or colours.
    """
    values = []
    for ax in figure.axes:
        for artist in ax.get_children():
            if isinstance(artist, Line2D):
                values += artist.get_xydata().ravel().tolist()
            elif isinstance(artist, Rectangle) and artist is not ax.patch:
                values += artist.get_bbox().extents.tolist()
            elif isinstance(artist, AxesImage):
                values += artist.get_array().ravel().tolist()
            elif isinstance(artist, Collection):
                values += artist.get_offsets().ravel().tolist()
                for path in artist.get_paths() if len(artist.get_offsets()) < 2 else ():
                    values += path.vertices.ravel().tolist()
    return values
