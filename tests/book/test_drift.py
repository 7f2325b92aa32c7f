"""The checks are checked: each kind of drift, planted in a copy, is found."""

import copy
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from test_bound import check_links
from test_claims import CLAIMS, check_claim

from lora.study.plots import use_book_style
from tools.kit.bound import KEY, faults_of_text, known_values, outside, texts
from tools.kit.bound import faults as unbound
from tools.kit.figures import difference
from tools.kit.listings import drift, listing_cells, package
from tools.kit.notebooks import FOLDED, faults
from tools.kit.register import BASE, BOOK, BRANCH, COLAB, REPOSITORY, chapters
from tools.run import run as store_run
from tools.run import tables

NOTEBOOKS = {c.path.stem: nbformat.read(c.path, as_version=4) for c in chapters()}
PACKAGE = package()
SCRIPTS = Path(sys.executable).parent
DRAW = """import matplotlib.pyplot as plt

fig, ax = plt.subplots()
_ = ax.plot([0, 1], [0, y])"""


def has_figure(cell):
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def first(notebook, what):
    """The first code cell with this tag, or with a figure or table."""
    for cell in code_cells(notebook):
        if what in cell.metadata.get("tags", []):
            return cell
        if what == "open" and not {*FOLDED, "listing"} & set(
            cell.metadata.get("tags", [])
        ):
            return cell
        kind = {"figure": "image/png", "table": "text/html"}.get(what)
        if kind and any(kind in output.get("data", {}) for output in cell.outputs):
            return cell
    return None


def with_(what):
    """A copy of the first chapter that has such a cell, and that cell."""
    for name, notebook in NOTEBOOKS.items():
        if first(notebook, what):
            planted = copy.deepcopy(notebook)
            return name, planted, first(planted, what)
    raise LookupError(f"no chapter has a cell with {what}")


# --- What can be seen without running anything ---


@pytest.mark.parametrize(("old", "new"), [("(", "( "), ("    ", "   ")])
def test_a_changed_listing(old, new):
    name, notebook, cell = with_("listing")
    owned = next(c.modules for c in chapters() if c.path.stem == name)
    assert not list(drift(notebook, PACKAGE, owned))
    assert old in cell.source
    cell.source = cell.source.replace(old, new, 1)
    (_, _, names), *_ = listing_cells(notebook)
    assert any(names[0] in message for message in drift(notebook, PACKAGE, owned))


def test_a_definition_that_is_not_listed():
    name, notebook, _ = with_("listing")
    owned = next(c.modules for c in chapters() if c.path.stem == name)
    grown = PACKAGE | {owned[0]: PACKAGE[owned[0]] | {"new": "def new(): pass"}}
    (message,) = drift(notebook, grown, owned)
    assert "new must be listed" in message


def places():
    """(name, text, values) of all that a reader reads: pages, prose, captions, alts."""
    known = known_values(NOTEBOOKS)
    for path, text in outside().items():
        yield path.name, text, known
    for name, notebook in NOTEBOOKS.items():
        for cell in notebook.cells:
            for text in texts(cell).values():
                yield name, text, known | cell.metadata.get("bound", {})


def changed(token):
    """Another token of the same form: the next digit, or the opposite word."""
    opposite = {"lower": "higher", "higher": "lower", "three": "five"}
    if not re.search(r"\d", token):
        return opposite.get(token, token + "s")
    return re.sub(r"\d(?=\D*$)", lambda m: str((int(m[0]) + 3) % 10), token)


def test_every_bound_number_and_word_is_noticed_when_it_changes():
    """16 bytes to 19, 0.12 points to 0.15, three directions to five, lower to higher:
    whatever the text says beside a key, on any page, in a caption or quoted."""
    planted = 0
    for name, text, values in places():
        if name == "references.md":
            continue  # the source of quotations: the next test
        assert not list(faults_of_text(text, values))
        for match in re.finditer(r"([+−]?\w(?:[\w.,-]*\w)?%?)" + KEY, text):
            new = text[: match.start(1)] + changed(match[1]) + text[match.end(1) :]
            found = list(faults_of_text(new, values))
            assert any("is said" in fault for fault in found), (name, match.group())
            planted += 1
    assert planted > 100


def test_a_changed_quotation(monkeypatch):
    """A figure of the literature that is changed where it is defined."""
    text = (BOOK / "references.md").read_text()
    match = re.search(r"(\w[\w.,]*)" + KEY, text)
    new = text[: match.start(1)] + changed(match[1]) + text[match.end(1) :]
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda p, *a: new if p.name == "references.md" else read(p, *a),
    )
    known = known_values(NOTEBOOKS)
    found = [f for notebook in NOTEBOOKS.values() for f in unbound(notebook, known)]
    assert any(match["key"] in fault and "is said" in fault for fault in found)


@pytest.mark.parametrize("page", ["README.md", "index.md"])
def test_a_badge_that_opens_another_chapter(page):
    (text,) = (t for path, t in tables().items() if path.name == page)
    names = [c.path.name for c in chapters()]
    shown = next(t for path, t in outside().items() if path.name == page)
    assert f"\n{text}\n" in shown
    wrong = text.replace(f"{BRANCH}/book/{names[0]}", f"{BRANCH}/book/{names[1]}", 1)
    assert wrong != text and f"\n{wrong}\n" not in shown


@pytest.mark.parametrize("link", [REPOSITORY, COLAB])
def test_a_link_to_another_repository(link):
    (text,) = (t for path, t in outside().items() if path.name == "README.md")
    assert link in text and not list(check_links(text))
    owner = link.split("/")[-2]
    (fault,) = check_links(text.replace(link, link.replace(owner, "someone"), 1))
    assert "someone" in fault
    assert BASE not in fault


def set_outputs(cell, **output):
    cell.outputs = [nbformat.v4.new_output("stream", **output)]


def add_tag(tag):
    return lambda cell: cell.metadata.setdefault("tags", []).append(tag)


def prefix(text):
    return lambda cell: cell.update(source=text + cell.source)


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
    "a skipped cell": ("listing", add_tag("nbval-skip"), "skips or weakens nbval"),
    "a comment that weakens nbval": (
        "listing",
        prefix("# NBVAL_IGNORE_OUTPUT\n"),
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
    "a reason without its tag": (
        "nbval-ignore-output",
        lambda cell: cell.metadata.tags.remove("nbval-ignore-output"),
        "no tag nbval-ignore-output",
    ),
    "a tolerance without a reason": (
        "listing",
        lambda cell: cell.metadata.update(tolerance={"absolute": 1}),
        "a tolerance without a reason",
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
    "a figure without a caption": (
        "figure",
        lambda cell: cell.metadata.mystnb.pop("figure"),
        "no caption",
    ),
    "a table without a caption": (
        "table",
        lambda cell: cell.metadata.mystnb.pop("figure"),
        "no caption",
    ),
    "a table that is called a figure": (
        "table",
        lambda cell: cell.metadata.mystnb.figure.update(name="fig-one"),
        "must begin with tab-",
    ),
    "a printed table": (
        "table",
        lambda cell: set_outputs(cell, name="stdout", text="row\n" * 4),
        "4 printed lines",
    ),
    "a solution that is not folded": (
        "hide-cell",
        lambda cell: cell.metadata.pop("tags"),
        "has a label, but is not folded",
    ),
    "a folded cell without a label": (
        "hide-cell",
        lambda cell: cell.update(source=cell.source.partition("\n")[2]),
        "folded without a label",
    ),
    "code hidden in the book only": (
        "hide-input",
        lambda cell: cell.metadata.pop("cellView"),
        "folded here, open in JupyterLab",
    ),
    "a long cell": (
        "open",
        lambda cell: cell.update(source=cell.source + "\nx = 1" * 15),
        "15 at most",
    ),
    "a wrong count of assertions": (
        "hide-cell",
        lambda cell: cell.update(source="# @title Checked: 3 assertions\nassert 1"),
        "but it holds 1 assertions",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_notebook(name):
    what, plant, message = FAULTS[name]
    _, notebook, cell = with_(what)
    assert not list(faults(notebook))
    plant(cell)
    assert any(message in fault for fault in faults(notebook))


def test_one_figure_in_place_of_another():
    _, notebook, figure = with_("figure")
    other = [cell for cell in code_cells(notebook) if has_figure(cell)][1]
    other.outputs = copy.deepcopy(figure.outputs)
    assert any("the same figure" in fault for fault in faults(notebook))


def test_a_directive_that_colab_cannot_show():
    _, notebook, _ = with_("listing")
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
def clone(tmp_path_factory, copy_book):
    """A copy of the book in which things are broken."""
    return copy_book(tmp_path_factory.mktemp("clone"))


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


def test_edited_outputs_numbers_and_figures(clone):
    """A small chapter, once as it ran and once with each output changed by hand."""
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
            code(DRAW.replace("y]", "y + 1]")),
        ],
        metadata=NOTEBOOKS[next(iter(NOTEBOOKS))].metadata | {"bound": {}},
    )
    store_run(notebook, [])
    file = clone / "book" / "small.ipynb"

    def failed():
        nbformat.write(notebook, file)
        command = ["pytest", "--nbval", "--nbval-current-env", "-q", "book/small.ipynb"]
        _, text = run(clone, *command)
        assert re.search(r"\d+ passed", text), text
        return set(
            re.findall(r"^FAILED book/small.ipynb::Cell (\d+)", text, re.M)
        ), text

    assert failed()[0] == set()
    cells = notebook.cells
    assert cells[2].source == "There are 3<!-- x -->."
    cells[3].outputs[0].data["text/plain"] = "0.4399"  # within the tolerance
    cells[4].metadata["bound"] = {"y:.2f": "0.42"}
    assert failed()[0] == set()
    cells[1].outputs[0].text = "4 of 32\n"
    cells[3].outputs[0].data["text/plain"] = "0.5299"
    png = cells[6].outputs[0].data["image/png"]
    cells[5].outputs[0].data["image/png"] = png
    found, text = failed()
    assert found == {"0", "1", "2"}
    assert "The figure differs" in text and "make run ONLY=small" in text
    cells[1].outputs[0].text = "3 of 32\n"
    cells[2].metadata["bound"] = {"x": "4"}
    found, text = failed()
    assert found == {"0", "1", "2"} and "x: 3 now, 4 stored" in text
    file.unlink()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("module.requires_grad_(False)", "module.requires_grad_(True)"),
        ("self.scale = float(alpha / rank)", "self.scale = float(2 * alpha / rank)"),
    ],
)
def test_a_changed_package(clone, old, new):
    module = clone / "lora" / "core.py"
    source = module.read_text()
    assert source.count(old) == 1
    module.write_text(source.replace(old, new))
    code, text = run(clone, "pytest", "-q", "-x", "tests/lora/test_core.py")
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
