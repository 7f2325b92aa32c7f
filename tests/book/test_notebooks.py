"""Chapters as files: executed, warning-free, folded, described; nothing to run here."""

import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.kit.notebooks import FOLDED, faults, has, minutes
from tools.kit.register import REPOSITORY, ROOT, executed, notebooks
from tools.run import exports, written

NOTEBOOKS = notebooks()
each = pytest.mark.parametrize("name", NOTEBOOKS)


@pytest.mark.parametrize("name", executed())
def test_no_fault(name):
    found = list(faults(executed()[name]))
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


def folded(cell):
    return bool(FOLDED & {*cell.metadata.get("tags", [])})


@each
def test_half_of_the_code_is_in_view(name):
    """Lines of code without blanks and comments, also those of solutions."""
    cells = [c for c in NOTEBOOKS[name].cells if c.cell_type == "code"]
    lines = [re.findall(r"^\s*[^#\s]", c.source, re.MULTILINE) for c in cells]
    seen = sum(len(found) for found, c in zip(lines, cells) if not folded(c))
    assert seen >= sum(map(len, lines)) / 2, f"{name}: {seen} lines; drop folded code"


@each
def test_tables_are_few(name):
    """Tables in view, of Markdown and of results."""
    cells = NOTEBOOKS[name].cells
    written = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    shown = [c for c in cells if "hide-cell" not in c.metadata.get("tags", [])]
    tables = len(re.findall(r"^\|[\s:|-]+\|$", written, re.MULTILINE))
    tables += sum(has(o, "text/html") for c in shown for o in c.get("outputs", []))
    assert tables <= 10, f"{name}: {tables} tables; draw them, or say it in a sentence"


@each
def test_a_chapter_has_rules_to_keep(name):
    cells = NOTEBOOKS[name].cells
    written = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    rules = re.findall(r"^> \*\*Rule to keep\.\*\* (.+)", written, re.MULTILINE)
    assert rules, f"{name}: no blockquote that begins with **Rule to keep.**"


READING = {30: "thirty", 35: "thirty-five", 40: "forty", 45: "forty-five"}


@each
def test_the_time_to_read_is_that_of_the_landing_page(name):
    text = "\n".join(c.source for c in NOTEBOOKS[name].cells)
    (said,) = re.findall(r"\*\*It takes\*\* ([\w-]+) minutes to read", text)
    assert said == READING[minutes(NOTEBOOKS[name])]


def test_chapters_open_alike():
    """The same first code cell, folded, after the idea; no digit in the title."""
    first = set()
    for notebook in NOTEBOOKS.values():
        assert re.match(r"# [^\d\n]+\n", notebook.cells[0].source)
        first.add(next(c.source for c in notebook.cells if c.cell_type == "code"))
    assert len(first) == 1, "the first cells differ:\n" + "\n\n".join(first)
    line = f'    !{{pip}} "deconstructing-lora[book] @ git+{REPOSITORY}"'
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


# The checks are checked: a notebook without a fault, and one planted in it.

TIMED = {"nbval_reason": "z" * 20, "bench": {"ratio": 2}}
FOLD = {"cellView": "form", "jupyter": {"source_hidden": True, "outputs_hidden": True}}


def sample():
    """Cells of each kind by name, as `make run` leaves them, without a fault."""

    def cell(source, output=None, **metadata):
        kind = "image/png" if "fig" in source else "text/html"
        data = {kind: output} if output else {}
        shown = [new_output("display_data", data)] if output else []
        return new_code_cell(source, outputs=shown, metadata=metadata)

    def rich(name):
        alt = "Two lines that fall, one of them faster than the other."
        figure = {"caption": f"What is shown in {name}, at length.", "name": name}
        return {"figure": figure, "image": {"alt": alt}}

    cells = {
        "prose": new_markdown_cell("# Title"),
        "open": cell("x = 1"),
        "fig": cell("fig", "AAAA", mystnb=rich("fig-a")),
        "tab": cell("table", "<table>", mystnb=rich("tab-a")),
        "timed": cell("x", tags=["nbval-ignore-output"], **TIMED),
        "fold": cell("# @title Plotting code\ny", tags=["hide-input"], **FOLD),
        "answer": cell("# @title Solution 1.1\ny", tags=["hide-cell"], **FOLD),
    }
    for count, code in enumerate([*cells.values()][1:], 1):
        code.execution_count = count
    return cells


def source(text):
    return lambda cell: cell.update(source=text)


def output(**stream):
    return lambda cell: cell.update(outputs=[new_output("stream", **stream)])


def alt(text):
    return lambda cell: cell.metadata.mystnb.image.update(alt=text)


def drop(key):
    return lambda cell: cell.metadata.pop(key)


def tag(*tags):
    return lambda cell: cell.metadata.update(tags=list(tags))


def name(text):
    return lambda cell: cell.metadata.mystnb.figure.update(name=text)


def tolerance(cell):
    cell.metadata.update(tolerance={"absolute": 1})


@pytest.mark.parametrize(
    ("kind", "plant", "fault"),
    [
        ("prose", source(":::{note}\n:::"), "a MyST role or directive"),
        ("open", lambda cell: cell.update(execution_count=None), "count None instead"),
        ("open", output(name="stderr", text="Warning"), "a warning or an error is"),
        ("open", tag("nbval-skip"), "skips or weakens nbval"),
        ("open", source("# NBVAL_IGNORE_OUTPUT\nx"), "skips or weakens nbval"),
        ("timed", drop("nbval_reason"), "without a reason"),
        ("timed", drop("bench"), "no goal for `make bench`"),
        ("timed", drop("tags"), "no tag nbval-ignore-output"),
        ("open", tolerance, "a tolerance without a reason"),
        ("fig", alt(""), "alt text must tell"),
        ("fig", alt("figure-1.png " * 5), "alt text must tell"),
        ("fig", lambda cell: cell.metadata.mystnb.pop("figure"), "no caption"),
        ("tab", drop("mystnb"), "no caption"),
        ("tab", name("fig-one"), "must begin with tab-"),
        ("tab", name("fig-a"), "must begin with tab- and be its own"),
        ("tab", output(name="stdout", text="row\n" * 4), "4 printed lines"),
        ("answer", drop("tags"), "has a label, but is not folded"),
        ("answer", tag("hide-input"), "a solution that is not folded"),
        ("answer", source("y"), "folded without a label"),
        ("fold", drop("cellView"), "folded here, open in JupyterLab"),
        ("open", source("x = 1\n" * 16), "15 at most"),
        ("fold", source("# @title Checked: 3 assertions\nassert 1"), "holds 1 assert"),
    ],
)
def test_a_planted_fault(kind, plant, fault):
    cells = sample()
    assert not list(faults(new_notebook(cells=[*cells.values()])))
    plant(cells[kind])
    assert any(fault in f for f in faults(new_notebook(cells=[*cells.values()])))


def test_one_figure_in_place_of_another():
    cells = sample()
    cells["tab"].update(outputs=cells["fig"].outputs)
    found = faults(new_notebook(cells=[*cells.values()]))
    assert any("the same figure or alt text as in cell 2" in f for f in found)
