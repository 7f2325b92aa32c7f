"""What nbval leaves out: figures, bound numbers, results within a stated tolerance."""

import os

import pytest
from nbval.plugin import IPyNbCell

from lora.study.plots import NARROW
from tools.kit.bound import computed, evaluate, local, reads
from tools.kit.figures import difference, pictures
from tools.kit.tolerance import differs, drawn, words

# As in tools/run.py: no progress bars among the outputs, nothing from the network.
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """After a cell has run, compare with what is stored all that nbval does not."""
    if not isinstance(item, IPyNbCell):
        return (yield)
    # Pictures are compared as such, below.
    item.parent.skip_compare = {*item.parent.skip_compare, NARROW}
    tolerance = item.cell.metadata.get("tolerance")
    if tolerance:
        item.options["check"] = False
    result = yield
    messages = near(item, tolerance) if tolerance else figure(item)
    messages += numbers(item)
    if messages:
        item.raise_cell_error(
            "This differs from what is stored. If the change is meant, store it: "
            f"make run ONLY={item.path.stem}",
            "\n".join(messages),
        )
    return result


def figure(item):
    """What tells the figure that the cell drew from the stored one, pixel by pixel."""
    if not item.options["check"]:  # nbval-ignore-output: a picture of timings
        return []
    folder = item.config.rootpath / "_build" / "figures" / item.path.stem / item.name
    new = pictures(item.test_outputs)
    message = difference(pictures(item.cell.outputs), new, folder)
    return [f"The figure differs: {message}"] if message else []


def near(item, tolerance):
    """Outputs, and data drawn, that differ by more than the cell's tolerance."""
    data = drawn(item.parent.kernel.kc, tolerance)
    stored = [*words(item.cell.outputs), str(item.cell.metadata["drawn"])]
    pairs = zip(stored, [*words(item.test_outputs), str(data)], strict=True)
    return [
        f"More than {tolerance['absolute']} apart:\n{a}\n{b}"
        for a, b in pairs
        if differs(a, b, tolerance["absolute"])
    ]


def numbers(item):
    """Bound numbers that differ: the cell's own, of the prose below, of other pages."""
    cells = item.parent.nb.cells
    first = next(i for i, cell in enumerate(cells) if cell is item.cell)
    after = [i for i, c in enumerate(cells) if c.cell_type == "code" and i > first]
    here = cells[first : after[0] if after else None]
    stored = [
        (key, c.metadata.get("bound", {}).get(key)) for c in here for key in local(c)
    ]
    if not after:
        stored += item.parent.nb.metadata.get("bound", {}).items()
    new = evaluate(item.parent.kernel.kc, [key for key, _ in stored])
    known = computed(c for c in cells[: first + 1] if c.cell_type == "code")
    return [
        f"{key}: {new[key]} now, {value} stored"
        for key, value in stored
        if differs(str(value), new[key], max([0, *map(known.get, reads(key, known))]))
    ]
