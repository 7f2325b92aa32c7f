"""Every listing is the package's source, and every definition is listed."""

import ast

import nbformat
import pytest
from listings import CHAPTERS, MODULES, drift, sync

chapters = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def test_there_are_chapters():
    assert {path.stem for path in CHAPTERS} == set(MODULES)


@chapters
def test_listings_are_the_source(path):
    notebook = nbformat.read(path, as_version=4)
    found = list(drift(notebook, CHAPTERS[path].read_text()))
    assert not found, f"{path.name} and {CHAPTERS[path].name}:\n" + "\n".join(found)


SOURCE = (
    "import math\n\n\n@decorated\ndef one():\n    return 1\n\n\nclass Two:\n    pass\n"
)


def notebook(*cells):
    cells = [
        nbformat.v4.new_code_cell(c, metadata={"tags": ["listing"]}) for c in cells
    ]
    return nbformat.v4.new_notebook(
        cells=[*cells, nbformat.v4.new_code_cell("def one(): 2")]
    )


def test_sync_rewrites_listings_and_nothing_else():
    nb = notebook("class Two:\n    changed\n\n\ndef one():\n    return 3")
    nb.cells[0].metadata["kept"] = True
    sync(nb, SOURCE)
    assert (
        nb.cells[0].source
        == "class Two:\n    pass\n\n\n@decorated\ndef one():\n    return 1"
    )
    assert nb.cells[0].metadata["kept"] and nb.cells[1].source == "def one(): 2"
    ast.parse(nb.cells[0].source)


@pytest.mark.parametrize("cell", ["x = 1", "def three(): pass"])
def test_sync_refuses_what_is_not_in_the_module(cell):
    with pytest.raises(ValueError, match="listing cell 0"):
        sync(notebook(cell), SOURCE)
