"""One look for all figures: colours safe for the colour-blind and in grey, on white."""

import matplotlib.pyplot as plt
import numpy as np
import torch
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
# Of a step's memory, beside frozen weights: for the update, and for the backward pass.
GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS = "#A99FE0", "#6A5FB5", ORANGE, "#C05A93"

# Widths in inches: of a phone, and of the text on a wide page. NARROW is the type of
# the output for the phone: notebooks show the other, the book's pages choose.
PHONE, PAGE = 4.3, 7.5
NARROW = "image/x-narrow+png"


def panels(n, height=2.6, **options):
    """A figure and its n axes: abreast on a wide page, stacked on a narrow one.

    `height` of a panel in inches; `options` as for `matplotlib.pyplot.subplots`. Of
    panels that share an axis, those at the edge have its label, wherever it was set.
    """
    figure, axes = plt.subplots(n, 1, figsize=(PHONE, n * height), **options)
    figure.panels, figure.height = list(axes), height
    return figure, axes


def arrange(figure, columns):
    """Set the panels of a figure in so many columns."""
    axes, rows = figure.panels, -(-len(figure.panels) // columns)
    figure.set_size_inches(PHONE if columns == 1 else PAGE, rows * figure.height)
    grid = figure.add_gridspec(rows, columns)
    shared = {
        "x": axes[0].get_shared_x_axes().joined(axes[0], axes[-1]),
        "y": axes[0].get_shared_y_axes().joined(axes[0], axes[-1]),
    }
    labels = {
        side: next(filter(None, (getattr(ax, f"get_{side}label")() for ax in axes)), "")
        for side in "xy"
    }
    for i, ax in enumerate(axes):
        ax.set_subplotspec(grid[i // columns, i % columns])
        outer = {"x": i + columns >= len(axes), "y": i % columns == 0}
        for side, edge in (("x", "labelbottom"), ("y", "labelleft")):
            if shared[side]:
                ax.tick_params(axis=side, **{edge: outer[side]})
                ax.set(**{f"{side}label": labels[side] if outer[side] else ""})


def two_sizes(figure):
    """Let notebooks store a new figure of a phone's width for a wide page, too.

    matplotlib calls it for each figure (`figure.hooks`). What has a size of its own, or
    axes of a fixed aspect, such as a photograph, stays as it is.
    """

    def for_the_phone(include=None, exclude=None):
        from IPython.core.pylabtools import print_figure  # only Jupyter calls it

        panels, fixed = (
            hasattr(figure, "panels"),
            "auto" not in {ax.get_aspect() for ax in figure.axes},
        )
        if round(figure.get_figwidth(), 2) != PHONE or (fixed and not panels):
            return {}
        if panels:
            arrange(figure, 1)
        narrow = print_figure(figure, base64=True)
        if panels:
            n = len(figure.panels)
            arrange(figure, n if n < 4 else -(-n // 2))
        else:
            figure.set_figwidth(PAGE)
        return {NARROW: narrow}

    figure._repr_mimebundle_ = for_the_phone


@torch.no_grad()
def boundary(ax, model, x, y, shown=200):
    """Draw a classifier of the plane: where it says class 1, and points of both.

    `model` maps (n, 2) to two logits. White is undecided, the line is where it changes
    its mind. Of the points x (n, 2) with labels y (n,) the first `shown` are drawn.
    """
    low, high = x.amin(0) - 0.4, x.amax(0) + 0.4
    across, up = (torch.linspace(a.item(), b.item(), 80) for a, b in zip(low, high))
    grid = torch.cartesian_prod(across, up).to(x)
    sure = model(grid).softmax(1)[:, 1].view(80, 80).T.cpu().numpy()
    extent = (across[0].item(), across[-1].item(), up[0].item(), up[-1].item())
    look = {"cmap": "PuOr", "alpha": 0.5, "interpolation": "bilinear"}
    ax.imshow(
        sure, vmin=0, vmax=1, origin="lower", extent=extent, aspect="auto", **look
    )
    ax.contour(sure, [0.5], origin="lower", extent=extent, colors="black")
    for label, marker, color in ((0, "o", "#7f3b08"), (1, "^", "#2d004b")):
        mine = x[:shown][y[:shown] == label].cpu().numpy()
        ax.scatter(*mine.T, s=9, c=color, marker=marker, linewidths=0)
    ax.grid(False)


def layer():
    """Draw a LoRA layer: the frozen W above, the detour through A and B below."""
    figure, ax = plt.subplots(figsize=(4.3, 2.4))
    ax.axis("off")
    ax.set(xlim=(0, 10), ylim=(-0.2, 5.2), aspect="equal")
    for (x, y, width, height), text, color, ink in [
        ((3.1, 2.6, 2.4, 2.4), "W\nfrozen", FROZEN, "white"),
        ((2.3, 0.8, 2.2, 0.7), "A", A, "black"),
        ((6.6, 0.0, 0.7, 2.2), "B", B, "white"),
    ]:
        box = plt.Rectangle((x, y), width, height, facecolor=color, edgecolor="black")
        ax.add_patch(box)
        middle = x + width / 2, y + height / 2
        ax.text(*middle, text, ha="center", va="center", color=ink)
    for x, y, text, size in [
        (5.55, 1.15, r"$\times\,\alpha / r$", 10),
        (3.4, 0.3, r"$r \times d_{in}$", 10),
        (8.35, 0.2, r"$d_{out} \times r$", 10),
        (6.6, 4.6, r"$d_{out} \times d_{in}$", 10),
        (0.3, 2.5, "x", 13),
        (8.7, 2.5, "+", 15),
        (9.8, 2.5, "y", 13),
    ]:
        ax.text(x, y, text, ha="center", va="center", fontsize=size)
    for start, end in [
        ((0.5, 2.6), (3.05, 3.8)),
        ((0.5, 2.4), (2.25, 1.15)),
        ((4.5, 1.15), (4.85, 1.15)),
        ((6.2, 1.15), (6.55, 1.15)),
        ((5.55, 3.8), (8.45, 2.7)),
        ((7.35, 1.15), (8.45, 2.3)),
        ((8.95, 2.5), (9.55, 2.5)),
    ]:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "linewidth": 1.5})
    return figure


def variant(ax, name, formula, frozen="", vectors=""):
    """Draw a variant of LoRA, W + B A: what is in colour trains, what is grey does not.

    `frozen` names those of A and B that do not train, `vectors` those that do beside
    them: m before W, b before B, d between B and A.
    """
    ax.axis("off")
    ax.set(title=name, xlim=(-0.6, 3.4), ylim=(-0.55, 1.1), aspect="equal")
    places = {"W": (0, 0, 1, 1), "B": (1.75, 0, 0.3, 1), "A": (2.2, 0.7, 1, 0.3)}
    places |= {
        "m": (-0.3, 0, 0.12, 1),
        "b": (1.5, 0, 0.12, 1),
        "d": (2.2, 0.4, 0.3, 0.12),
    }
    colors = {"W": FROZEN, "A": A, "B": B} | dict.fromkeys("mbd", ORANGE)
    for part in ("W", "A", "B", *vectors):
        x, y, width, height = places[part]
        color = FROZEN if part in frozen else colors[part]
        box = plt.Rectangle((x, y), width, height, facecolor=color, edgecolor="black")
        ax.add_patch(box)
        if part in "WAB":
            where, ink = (x + width / 2, y + height / 2), "black"
            ink = "white" if color != A else "black"
            ax.text(*where, part, ha="center", va="center", color=ink, fontsize=9)
    ax.text(1.25, 0.5, "+", ha="center", va="center")
    ax.text(1.35, -0.4, formula, ha="center", va="center", fontsize=9)


def dots(ax, groups, labels):
    """Dots with intervals, a row for each label, in the colour and form of their group.

    `groups`: name -> (mean, low, high) for each of the labels, from the top.
    """
    looks = zip((BLUE, ORANGE, LOGITS, GREEN), "os^D")
    for j, ((name, values), (color, marker)) in enumerate(zip(groups.items(), looks)):
        for i, (mean, low, high) in enumerate(values):
            y = i + 0.2 * (j - (len(groups) - 1) / 2)
            ax.plot([low, high], [y, y], "-", color=color, linewidth=1.4)
            ax.plot(
                [mean], [y], marker, color=color, ms=5, label=name if not i else None
            )
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(labels)), labels=labels, fontsize=8.5)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def heat(ax, table):
    """A DataFrame as coloured cells with rounded numbers: zero is white."""
    values = table.to_numpy()
    limit = abs(values).max()
    image = ax.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(values):
        light = image.to_rgba(value)[:3] @ np.array([0.3, 0.59, 0.11])
        color = "white" if light < 0.5 else "black"
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
            "figure.figsize": (PHONE, 2.9),
            "figure.hooks": ["lora.study.plots:two_sizes"],
            "figure.dpi": 150,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "axes.grid": True,
            "axes.axisbelow": True,
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
