"""What is compared beside the text of outputs is seen to fail: book/conftest.py."""

import base64
import io
import os
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import pytest

from lora.study.plots import use_book_style
from tools.kit.figures import difference
from tools.kit.register import chapters
from tools.run import execute

DRAW = """import matplotlib.pyplot as plt

fig, ax = plt.subplots()
_ = ax.plot([0, 1], [0, y])"""


def draw(label="error (%)", top=1.0):
    """A small figure in the book's style, as PNG."""
    use_book_style()
    fig, ax = plt.subplots()
    ax.plot([0, 1, 2], [0, top, 0.5])
    ax.set(xlabel="epoch", ylabel=label, ylim=(0, 1.2))
    file = io.BytesIO()
    fig.savefig(file)
    plt.close(fig)
    return file.getvalue()


@pytest.mark.parametrize("change", [{"label": "errer (%)"}, {"top": 1.01}])
def test_a_figure_with_a_small_change(tmp_path, change):
    assert difference([draw()], [draw()], tmp_path) is None
    said = difference([draw()], [draw(**change)], tmp_path)
    assert "Error: Image files did not match" in said
    assert "1 figures are stored, 0 were drawn" in difference([draw()], [], tmp_path)


def test_edited_outputs_numbers_and_figures(tmp_path, copy_book):
    """A small chapter, once as it ran and once with each output changed by hand."""
    clone = copy_book(tmp_path)
    figure = {"name": "fig-x", "caption": "Ends at 0<!-- y:.2f -->.", "alt": "A line."}
    code, prose = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    tolerance = {"absolute": 0.02, "reason": "it is a trial", "half_width": "0.06"}
    notebook = nbformat.v4.new_notebook(
        cells=[
            prose("# Small"),
            code("x = sum([1, 2])\nprint(x, 'of 32')"),
            prose("There are 0<!-- x -->."),
            code("y = x / 7\ny", metadata={"tolerance": tolerance}),
            prose("It is 0<!-- y:.2f -->."),
            code(DRAW, metadata={"book": figure}),
            code(DRAW, metadata={"tolerance": tolerance | {"figure": "fig"}}),
            code(DRAW, metadata={"tags": ["nbval-ignore-output"]}),
        ],
        metadata=nbformat.read(chapters()[0].path, as_version=4).metadata,
    )
    notebook.metadata.pop("bound")
    execute(notebook, [])
    assert notebook.cells[2].source == "There are 3<!-- x -->."

    def failed():
        """The cells, counted by nbval from 0, that fail, and what is said."""
        nbformat.write(notebook, clone / "book" / "small.ipynb")
        command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env"]
        environment = {**os.environ, "PYTHONPATH": str(clone)}
        done = subprocess.run(
            [*command, "book/small.ipynb"],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return re.findall(r"^FAILED .*::Cell (\d)", done.stdout, re.M), done.stdout

    _, first, _, second, beside, third, fourth, timing = notebook.cells
    second.outputs[0].data["text/plain"] = "0.4399"  # within the tolerance
    beside.metadata["bound"] = {"y:.2f": "0.42"}
    timing.outputs[0].data["image/png"] = base64.b64encode(draw()).decode()
    assert failed()[0] == []
    first.outputs[0].text = "4 of 32\n"
    second.outputs[0].data["text/plain"] = "0.5299"
    fourth.metadata["drawn"][-1] = 0.5299
    third.outputs[0].data["image/png"] = base64.b64encode(draw()).decode()
    cells, text = failed()
    assert cells == ["0", "1", "2", "3"]
    assert "The figure differs" in text and "make run ONLY=small" in text
    first.outputs[0].text = "3 of 32\n"
    notebook.cells[2].metadata["bound"] = {"x": "4"}
    cells, text = failed()
    assert "0" in cells and "x: 3 now, 4 stored" in text
