"""A chapter is added in one place: `_toc.yml`, and its notebook's own metadata."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from tools.kit.listings import listing_cells, package
from tools.kit.register import BASE, ROOT, chapters, sources

MODULE = '''"""What the dummy chapter builds."""


def nine(x):
    """x + 9, for a number x."""
    return x + 9
'''
TEST = '''"""`lora.ninth` against arithmetic."""

from lora.ninth import nine


def test_nine():
    assert nine(1) == 10
'''


def faults(names, tested, owned, listed):
    """A sentence for each module that no test file or no chapter has."""
    for name in names:
        if name not in tested:
            yield f"lora/{name}.py has no test file tests/lora/test_{name}.py"
        if name not in owned and not listed[name]:
            yield f"lora/{name}.py is built by no chapter and shown in none"


def test_every_module_has_tests_and_a_chapter():
    tested = {f.stem.removeprefix("test_") for f in (ROOT / "tests/lora").glob("*.py")}
    owned = [name for chapter in chapters() for name in chapter.modules]
    assert len(owned) == len(set(owned)), "a module belongs to two chapters"
    shown = {
        name
        for chapter in chapters()
        for cell in listing_cells(nbformat.read(chapter.path, as_version=4))
        for name in cell[2]
    }
    listed = {name: shown & known.keys() for name, known in package().items()}
    listed["plots"] = {"use_book_style"}  # called where it is used; how figures look
    assert not list(faults(sources(), tested, owned, listed))
    (orphan,) = faults(["new"], {"new"}, owned, {"new": set()})
    assert "shown in none" in orphan
    assert any("no test file" in f for f in faults(["rank"], set(), owned, listed))


@pytest.fixture(scope="module")
def ninth(tmp_path_factory, copy_book):
    """A copy of the book with a ninth chapter, added as CONTRIBUTING.md says."""
    folder = copy_book(tmp_path_factory.mktemp("ninth") / "book")
    (folder / "lora/ninth.py").write_text(MODULE)
    (folder / "tests/lora/test_ninth.py").write_text(TEST)
    toc = yaml.safe_load((folder / "_toc.yml").read_text())
    place = toc.get("parts", [toc])[-1]["chapters"]
    place.insert(0, {"file": "book/09-dummy"})
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    first = nbformat.read(chapters()[0].path, as_version=4)
    install = next(cell for cell in first.cells if cell.cell_type == "code")
    cells = [
        nbformat.v4.new_markdown_cell("# A dummy\n\nThe quokka chapter."),
        nbformat.v4.new_code_cell(install.source, metadata=install.metadata),
        nbformat.v4.new_code_cell("def nine(x): ...", metadata={"tags": ["listing"]}),
        nbformat.v4.new_code_cell("from lora import ninth\n\nninth.nine(2)"),
    ]
    book = {"modules": ["ninth"], "search": "quokka", "learn": "to add nine"}
    metadata = first.metadata | {"book": book}
    metadata.pop("bound", None)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, folder / "book/09-dummy.ipynb")
    run(folder, "tools/run.py", "run", "09-dummy")
    return folder


def run(folder, *command):
    """What a Python command in the copy prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_run_syncs_and_executes_it(ninth):
    notebook = nbformat.read(ninth / "book/09-dummy.ipynb", as_version=4)
    assert MODULE.split('"""\n\n\n')[1].strip() == notebook.cells[2].source
    assert notebook.cells[3].outputs[0].data["text/plain"] == "11"


@pytest.mark.parametrize(
    "test",
    [
        "test_listings.py::test_listings_are_the_source[09-dummy]",
        "test_notebooks.py::test_no_fault[09-dummy]",
        "test_bound.py::test_numbers_of_chapters[09-dummy]",
        "test_colab.py::test_runs_alone[09-dummy]",
        "test_pages.py::test_a_search_lands_in_its_section[book/09-dummy]",
        "test_pages.py::test_page_fits[book/09-dummy]",
    ],
)
def test_the_books_checks_see_it(ninth, test):
    out = run(ninth, "-m", "pytest", "--collect-only", "-q", f"tests/book/{test}")
    assert "1 test collected" in out


def test_mutants_and_tables_have_it(ninth):
    mutated = "import sys; sys.path.insert(0, 'tools'); import mutants\n"
    assert "lora/ninth.py" in run(ninth, "-c", mutated + "print(mutants.mutated())")
    for page in ("README.md", "book/index.md"):
        (row,) = [r for r in (ninth / page).read_text().splitlines() if "09-dummy" in r]
        assert "to add nine" in row
        assert f"{chapters()[0].path.parent.name}/09-dummy.ipynb" in row


def test_the_built_book_has_it(ninth):
    build = Path(sys.executable).with_name("jupyter-book")
    run(ninth, build, "build", "--quiet", "-W", "-n", "--keep-going", ".")
    html = ninth / "_build/html"
    assert f"{BASE}book/09-dummy.html" in (html / "sitemap.xml").read_text()
    assert "09-dummy.html" in (html / "book/index.html").read_text()
