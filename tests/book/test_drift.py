"""The checks are checked: each kind of drift, planted in a copy, is found."""

import copy
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from figures import difference
from listings import CHAPTERS, ROOT, drift
from notebooks import faults
from prose import chapter_orphans, literature
from test_claims import CLAIMS, check_claim

from lora.plots import use_book_style

(PATH,) = [path for path in CHAPTERS if path.stem == "02-implementation"]
SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def has_figure(cell):
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def first(notebook, what):
    """The first code cell with this tag; with a figure, if `what` is "figure"."""
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    if what == "figure":
        return next(filter(has_figure, code))
    return next(cell for cell in code if what in cell.metadata.get("tags", []))


# --- What can be seen without running anything ---


@pytest.mark.parametrize(
    ("old", "new"), [("requires_grad_(False)", "requires_grad_(True)"), ("    ", "   ")]
)
def test_a_changed_listing(notebook, old, new):
    source = CHAPTERS[PATH].read_text()
    assert not list(drift(notebook, source))
    cell = first(notebook, "listing")
    assert old in cell.source
    cell.source = cell.source.replace(old, new, 1)
    assert any("freeze_all" in message for message in drift(notebook, source))


def test_a_definition_that_is_not_listed(notebook):
    source = CHAPTERS[PATH].read_text() + "\n\ndef new():\n    pass\n"
    assert any("new must be listed" in message for message in drift(notebook, source))


def test_a_changed_digit_in_the_prose(notebook):
    (cell,) = [c for c in notebook.cells if "take 140 GB, at 4 bits 35 GB" in c.source]
    before = set(chapter_orphans(notebook, literature()))
    cell.source = cell.source.replace("140 GB", "160 GB")
    (orphan,) = set(chapter_orphans(notebook, literature())) - before
    assert orphan[0].text == "160 GB"


def set_outputs(cell, **output):
    cell.outputs = [nbformat.v4.new_output("stream", **output)]


FAULTS = {
    "a cell that was not run": (
        "listing",
        lambda cell: cell.update(execution_count=None),
        "execution count None",
    ),
    "a warning": (
        "listing",
        lambda cell: set_outputs(cell, name="stderr", text="UserWarning"),
        "a warning or an error is stored",
    ),
    "a skipped cell": (
        "listing",
        lambda cell: cell.metadata.tags.append("nbval-skip"),
        "skips or weakens nbval",
    ),
    "a comment that weakens nbval": (
        "listing",
        lambda cell: cell.update(source="# NBVAL_IGNORE_OUTPUT\n" + cell.source),
        "skips or weakens nbval",
    ),
    "no reason for ignoring": (
        "nbval-ignore-output",
        lambda cell: cell.metadata.pop("nbval_reason"),
        "without a reason",
    ),
    "no assertion beside it": (
        "nbval-ignore-output",
        lambda cell: cell.update(source=cell.source.replace("assert ", "check = ")),
        "no assert beside it",
    ),
    "a dropped alt text": (
        "figure",
        lambda cell: cell.metadata.mystnb.image.pop("alt"),
        "alt text must tell",
    ),
    "a file name for an alt text": (
        "figure",
        lambda cell: cell.metadata.mystnb.image.update(alt="figure-1.png " * 5),
        "alt text must tell",
    ),
    "a solution that is not folded": (
        "hide-cell",
        lambda cell: cell.metadata.pop("tags"),
        "a solution that is not folded",
    ),
    "code hidden in the book only": (
        "hide-input",
        lambda cell: cell.metadata.pop("cellView"),
        "folded here, open in JupyterLab",
    ),
    "a long cell": (
        "nbval-ignore-output",
        lambda cell: cell.update(source=cell.source + "\nx = 1" * 15),
        "15 at most",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_notebook(notebook, name):
    tag, plant, message = FAULTS[name]
    assert not list(faults(notebook))
    plant(first(notebook, tag))
    assert any(message in fault for fault in faults(notebook))


def test_one_figure_in_place_of_another(notebook):
    figure = first(notebook, "figure")
    other = [c for c in notebook.cells if c.cell_type == "code" and has_figure(c)][1]
    other.outputs = copy.deepcopy(figure.outputs)
    assert any("the same figure" in fault for fault in faults(notebook))


def test_a_directive_that_colab_cannot_show(notebook):
    notebook.cells[0].source += "\n:::{note}\nnot here\n:::"
    assert any("MyST role or directive" in fault for fault in faults(notebook))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("#the-layer", "#the-layers", "no #the-layers"),
        ("torch.equal(layer(x)", "torch.equal(other(x)", "no assertion"),
        ("::test_starts_bit_equal", "::test_ends_bit_equal", "no test_ends"),
        ("**Holds**", "**Probably**", "needs one verdict"),
    ],
)
def test_a_claim_that_leads_nowhere(old, new, message):
    row = CLAIMS[5]
    check_claim(row)
    assert old in row
    with pytest.raises(AssertionError, match=message):
        check_claim(row.replace(old, new))


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


@pytest.mark.parametrize(
    "changed", [{"label": "errer (%)"}, {"top": 1.01}], ids=["letter", "curve"]
)
def test_a_figure_with_a_small_change(tmp_path, changed):
    assert difference([draw()], [draw()], tmp_path) is None
    assert "Error: Image files did not match" in difference(
        [draw()], [draw(**changed)], tmp_path
    )
    assert "1 figures are stored, 0 were drawn" in difference([draw()], [], tmp_path)


# --- What shows when something runs ---


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of all files that git would commit."""
    folder = tmp_path_factory.mktemp("clone")
    command = ["git", "-C", ROOT, "ls-files", "-z", "-co", "--exclude-standard"]
    files = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for file in filter(None, files.split("\0")):
        if (ROOT / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    return folder


def run(clone, *command):
    """Exit status and all that was printed; the copy's `lora` is found first."""
    done = subprocess.run(
        [SCRIPTS / command[0], *command[1:]],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_an_edited_output_and_a_swapped_figure(clone, notebook):
    """The chapter's first cells, once as they are and once with two outputs changed."""
    code = [c for c in notebook.cells if c.cell_type == "code"]
    figures = list(filter(has_figure, code))
    (counts,) = [c for c in code if "trainable 20 of 32" in str(c.outputs)]
    notebook.cells = code[: code.index(counts) + 1]
    assert figures[0] in notebook.cells
    file = clone / "book" / "opening.ipynb"

    def failed():
        nbformat.write(notebook, file)
        _, text = run(
            clone,
            "pytest",
            "--nbval",
            "--nbval-current-env",
            "-q",
            "book/opening.ipynb",
        )
        assert re.search(r"\d+ passed", text), text
        return set(
            re.findall(r"^FAILED book/opening.ipynb::(Cell \d+)", text, re.M)
        ), text

    assert failed()[0] == set()
    counts.outputs[0].text = counts.outputs[0].text.replace("20 of 32", "21 of 32")
    figures[0].outputs[0].data["image/png"] = figures[1].outputs[0].data["image/png"]
    cells, text = failed()
    assert cells == {f"Cell {code.index(c)}" for c in (counts, figures[0])}
    assert "The figure differs from the stored one" in text
    assert "make run ONLY=opening" in text
    file.unlink()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("p.requires_grad_(False)", "p.requires_grad_(True)"),
        ("self.scale = float(alpha / rank)", "self.scale = float(2 * alpha / rank)"),
    ],
)
def test_a_changed_package(clone, old, new):
    module = clone / "lora" / "core.py"
    source = module.read_text()
    assert source.count(old) == 1
    module.write_text(source.replace(old, new))
    code, text = run(clone, "pytest", "-q", "-x", "tests/test_core.py")
    module.write_text(source)
    assert code == 1, text
    assert "1 failed" in text


def test_a_broken_link(clone):
    page = clone / "book" / "index.md"
    page.write_text(
        page.read_text() + "\n[gone](02-implementation.ipynb#no-such-place)\n"
    )
    build = ["jupyter-book", "build", "--quiet", "-W", "-n", "--keep-going", "."]
    code, text = run(clone, *build)
    assert code != 0
    assert "no-such-place" in text


@pytest.mark.parametrize(
    ("file", "added", "command"),
    [
        ("lora/core.py", "x=1\n", ["ruff", "format", "--check", "."]),
        ("lora/core.py", "import os\n", ["ruff", "check", "."]),
        ("book/index.md", "Rec" + "ieve this.\n", ["codespell", "book"]),
    ],
)
def test_bad_style(clone, file, added, command):
    path = clone / file
    source = path.read_text()
    assert run(clone, *command)[0] == 0
    path.write_text(source + added)
    assert run(clone, *command)[0] != 0
    path.write_text(source)
