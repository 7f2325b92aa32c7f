"""One look for all figures: colours safe for the colour-blind and in grey, on white."""

import matplotlib.pyplot as plt
from cycler import cycler

# Okabe and Ito's palette, dark to light, so that neighbours differ in grey too.
BLUE, RED, GREEN, ORANGE, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#6E6E6E",
)


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
