"""A chapter is added in one place: `_toc.yml`, and its notebook's own metadata."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from tools.kit.listings import listing_cells, package
from tools.kit.register import BASE, ROOT, chapters, notebooks, sources

MODULE = '''"""What the dummy chapter builds."""


def nine(x):
    """x + 9, for a number x."""
    return x + 9
'''


def faults(names, tested, owned, shown):
    """A sentence for each module that no test file or no chapter has."""
    for name in names:
        file = Path(*name.split("."))
        if name not in tested:
            test = file.with_name(f"test_{file.name}")
            yield f"lora/{file}.py has no test file tests/lora/{test}.py"
        if name not in owned and not shown[name]:
            yield f"lora/{file}.py is built by no chapter and shown in none"


def test_mutants_that_nothing_kills_are_of_lines_that_exist():
    listed = (ROOT / "tools/equivalent-mutants.md").read_text()
    code = {f"lora.{name}.": file.read_text() for name, file in sources().items()}
    diffs = re.findall(r"@@ (\S+) @@\n-(.*)", listed)
    assert diffs
    for place, line in diffs:
        (module,) = (name for name in code if place.startswith(name))
        lines = [known.strip() for known in code[module].splitlines()]
        assert line.strip() in lines, f"{place}: {line.strip()}"


def test_every_module_has_tests_and_a_chapter():
    tests = ROOT / "tests" / "lora"
    files = [f.relative_to(tests).with_suffix("") for f in tests.rglob("test_*.py")]
    tested = {".".join(f.parts).replace("test_", "") for f in files}
    owned = [name for chapter in chapters() for name in chapter.modules]
    assert len(owned) == len(set(owned)), "a module belongs to two chapters"
    cells = [cell for book in notebooks().values() for cell in listing_cells(book)]
    listed = {name for _, _, names in cells for name in names}
    shown = {name: listed & known.keys() for name, known in package().items()}
    shown["study.plots"] = {"use_book_style"}  # how figures look: called, not shown
    shown["checks"] = {"check_settings"}  # what no reader need write: linked
    shown["study.docstrings"] = {"docstring_pairs"}  # where the data are from: linked
    shown["memory"] = {"training_memory"}  # as a calculator, tried in recipe-run
    assert not list(faults(sources(), tested, owned, shown))
    (orphan,) = faults(["new"], {"new"}, owned, {"new": set()})
    assert "shown in none" in orphan
    (untested,) = faults(["study.moons"], {"moons"}, owned, shown)
    assert "no test file tests/lora/study/test_moons.py" in untested


@pytest.fixture(scope="module")
def ninth(tmp_path_factory, copy_book):
    """A copy of the book with a ninth chapter, added as CONTRIBUTING.md says."""
    folder = copy_book(tmp_path_factory.mktemp("ninth") / "book")
    (folder / "lora/ninth.py").write_text(MODULE)
    toc = yaml.safe_load((folder / "_toc.yml").read_text())
    toc["parts"][-1]["chapters"].insert(0, {"file": "book/09-dummy"})
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    code = nbformat.v4.new_code_cell
    cells = [
        nbformat.v4.new_markdown_cell("# A dummy\n\nThe quokka chapter."),
        code("def nine(x): ...", metadata={"tags": ["listing"]}),
        code("from lora import ninth\n\nninth.nine(2)"),
    ]
    book = {"modules": ["ninth"], "search": "quokka", "learn": "to add nine"}
    metadata = notebooks()[chapters()[0].path.stem].metadata | {"book": book}
    metadata.pop("bound", None)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, folder / "book/09-dummy.ipynb")
    run(folder, "-m", "tools.run", "run", "09-dummy")
    return folder


def run(folder, *command):
    """What a Python command in the copy prints; it must succeed."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_run_syncs_and_executes_it(ninth):
    notebook = nbformat.read(ninth / "book/09-dummy.ipynb", as_version=4)
    assert MODULE.split('"""\n\n\n')[1].strip() == notebook.cells[1].source
    assert notebook.cells[2].outputs[0].data["text/plain"] == "11"


def test_the_books_checks_see_it(ninth):
    out = run(
        ninth, "-m", "pytest", "--collect-only", "-q", "tests/book", "-k", "dummy"
    )
    for test in (
        "test_listings.py::test_listings_are_the_source",
        "test_notebooks.py::test_no_fault",
        "test_bound.py::test_numbers_of_chapters",
        "test_colab.py::test_runs_alone",
        "test_pages.py::test_a_search_lands_in_its_section",
        "test_pages.py::test_page_fits",
    ):
        assert f"{test}[" in out


def test_the_table_has_it(ninth):
    (row,) = [
        r for r in (ninth / "README.md").read_text().splitlines() if "09-dummy" in r
    ]
    assert "to add nine" in row and "book/09-dummy.ipynb" in row


def test_the_built_book_has_it(ninth):
    build = Path(sys.executable).with_name("jupyter-book")
    run(ninth, build, "build", "--quiet", "-W", "-n", "--keep-going", ".")
    html = ninth / "_build/html"
    assert f"{BASE}book/09-dummy.html" in (html / "sitemap.xml").read_text()
    index = (html / "book/index.html").read_text()
    assert "09-dummy.html" in index and "to add nine" in index
