"""Every listing is the package's source, and no module goes unlisted."""

import nbformat
import pytest

from tools.kit.listings import definitions, drift, package, sync
from tools.kit.register import chapters

each = pytest.mark.parametrize("chapter", chapters(), ids=lambda c: c.path.stem)
SOURCE = (
    "import math\n\n\n@decorated\ndef one():\n    return 1\n\n\nclass Two:\n    pass"
)
MODULES = {"module": definitions(SOURCE)}


@each
def test_listings_are_the_source(chapter):
    notebook = nbformat.read(chapter.path, as_version=4)
    found = list(drift(notebook, package(), chapter.modules))
    assert not found, f"{chapter.path.name}:\n" + "\n".join(found)


def notebook(*cells):
    listing = {"tags": ["listing"]}
    cells = [nbformat.v4.new_code_cell(c, metadata=dict(listing)) for c in cells]
    other = nbformat.v4.new_code_cell("def one(): 2")
    return nbformat.v4.new_notebook(cells=[*cells, other])


def test_sync_rewrites_listings_and_nothing_else():
    nb = notebook("class Two:\n    changed\n\n\ndef one():\n    return 3")
    nb.cells[0].metadata["kept"] = True
    sync(nb, MODULES)
    wanted = "class Two:\n    pass\n\n\n@decorated\ndef one():\n    return 1"
    assert nb.cells[0].source == wanted
    assert nb.cells[0].metadata["kept"] and nb.cells[1].source == "def one(): 2"


@pytest.mark.parametrize("cell", ["x = 1", "def three(): pass"])
def test_sync_refuses_what_is_not_in_the_package(cell):
    with pytest.raises(ValueError, match="listing cell 0"):
        sync(notebook(cell), MODULES)


@pytest.mark.parametrize(("old", "new"), [(" 1", " 2"), ("    ", "   "), ("@", "#")])
def test_a_changed_listing(old, new):
    nb = notebook("@decorated\ndef one():\n    return 1", "class Two:\n    pass")
    assert not list(drift(nb, MODULES, ["module"]))
    nb.cells[0].source = nb.cells[0].source.replace(old, new)
    (message,) = drift(nb, MODULES, ["module"])
    assert "the listing of one differs" in message


def test_a_chapter_lists_something_of_what_it_owns_and_nothing_twice():
    modules = MODULES | {"guards": {"check": "def check(): pass"}}
    nb = notebook("class Two:\n    pass", "class Two:\n    pass")
    twice, missing = drift(nb, modules, ["module", "guards"])
    assert twice.startswith("Two is listed twice")
    assert missing.startswith("nothing of guards is listed")
    first, second = drift(notebook("def new(): pass"), modules, [])
    assert "the listing of new differs" in first
    assert second.startswith("new is listed twice, or is not in the package")
