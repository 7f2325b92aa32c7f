"""Chapters as files: executed, warning-free, folded, described; nothing to run here."""

import re

import nbformat
import pytest

from tools.kit.notebooks import faults, has
from tools.kit.register import REPOSITORY, ROOT, chapters
from tools.run import exports, written

NOTEBOOKS = {c.path.stem: nbformat.read(c.path, as_version=4) for c in chapters()}
each = pytest.mark.parametrize("name", NOTEBOOKS)


@each
def test_no_fault(name):
    found = list(faults(NOTEBOOKS[name]))
    assert not found, f"{name}:\n" + "\n".join(found)


@each
def test_exercises_have_solutions(name):
    sources = [cell.source for cell in NOTEBOOKS[name].cells]
    asked = re.findall(r"^### Exercise (\d+\.\d+): .", "\n".join(sources), re.MULTILINE)
    title = r"# @title Solution (\d+\.\d+)\b"
    solved = {m[1]: s for s in sources if (m := re.match(title, s))}
    wanted = [f"{int(name[:2])}.{i + 1}" for i in range(len(asked))]
    assert asked == list(solved) == wanted
    assert len(asked) >= 3
    for source in solved.values():
        assert "assert " in source, source


@each
def test_results_are_tables(name):
    code = [c for c in NOTEBOOKS[name].cells if c.cell_type == "code"]
    shown = [c for c in code if "hide-cell" not in c.metadata.get("tags", [])]
    assert sum(has(o, "text/html") for c in shown for o in c.outputs) >= 4


def test_chapters_open_alike():
    """The same first code cell, folded, after the idea; no digit in the title."""
    first = set()
    for notebook in NOTEBOOKS.values():
        assert re.match(r"# [^\d\n]+\n", notebook.cells[0].source)
        first.add(next(c.source for c in notebook.cells if c.cell_type == "code"))
    assert len(first) == 1, "the first cells differ:\n" + "\n\n".join(first)
    line = f'    !{{pip}} "deconstructing-lora[book] @ git+{REPOSITORY}"\n'
    assert line in first.pop(), "what Colab installs: the package and its extra"


def test_what_is_written_by_machine_is_up_to_date():
    for path, text in written().items():
        assert path.read_text() == text, f"{path.name}: make sync"


def test_exported_pictures_are_those_of_the_chapters():
    found = dict(e for notebook in NOTEBOOKS.values() for e in exports(notebook))
    assert found
    for name, png in found.items():
        assert (ROOT / "book/_static" / name).read_bytes() == png, f"{name}: make sync"


def test_names_of_figures_and_tables_are_unique_in_the_book():
    names = [
        cell.metadata.book.name
        for notebook in NOTEBOOKS.values()
        for cell in notebook.cells
        if "name" in cell.metadata.get("book", {})
    ]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice
