"""`make sceptic`: a headline that fresh seeds overturn is seen to fall."""

import builtins
import dis
import inspect

import nbformat
import pytest

from lora.study import evidence
from tools import sceptic
from tools.kit.register import Chapter, chapters

CELL = '''def holds(seeds, shift=0.0):
    """The mean is above zero."""
    values = 1 + shift + torch.sin(torch.tensor(list(seeds))) / 9
    mean, low, high = interval(values)
    return Verdict(low > 0, mean, low, high)'''


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """A chapter with one headline, of which one cell must not run."""
    code = nbformat.v4.new_code_cell
    settings = {"plain": {}, "shifted": {"shift": -9.0}}
    headline = {
        "seeds": 5,
        "settings": settings,
        "book": {"plain": "a", "shifted": "b"},
    }
    cells = [
        code("import torch\n\nfrom lora.study.evidence import interval"),
        code("from dataclasses import dataclass"),
        code("slow = torch.zeros(1) / 0\nraise SystemExit"),
        code(inspect.getsource(evidence.Verdict), metadata={"tags": ["listing"]}),
        code(CELL, metadata={"tags": ["headline"], "headline": headline}),
    ]
    metadata = {"bound": {"a": "+0.50 [+0.20, +0.80]", "b": "−8.50 [−8.80, −8.20]"}}
    path = tmp_path / "07-trial.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    monkeypatch.setattr(
        sceptic, "chapters", lambda: [Chapter(path, "Trial", [], "", "")]
    )


def test_a_headline_stands_or_falls(chapter, capsys):
    assert sceptic.main("3") == 1
    out = capsys.readouterr().out
    assert "stands The mean is above zero. (plain)" in out
    assert "FALLS  The mean is above zero. (shifted)" in out
    assert "+0.50 [+0.20, +0.80]" in out and "from 3 on" in out


def test_no_headline_is_no_success(chapter):
    assert sceptic.main("3", "nothing_of_this_name") == 1


def globals_of(code):
    """The names that a function, or one inside it, reads from its module."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = [const for const in code.co_consts if hasattr(const, "co_code")]
    return names.union(*map(globals_of, inner))


@pytest.mark.parametrize("path", [c.path for c in chapters()], ids=lambda p: p.stem)
def test_a_headline_finds_all_that_it_uses(path):
    """Also what it reaches through the chapter's other functions."""
    space = {"__name__": "chapter"}
    for source in sceptic.definitions(nbformat.read(path, as_version=4).cells):
        exec(compile(source, path.name, "exec"), space)
    left, seen = [name for name, _, _ in sceptic.headlines(path)], set()
    while left:
        seen.add(name := left.pop())
        assert name in space or hasattr(builtins, name), f"{name} is not defined"
        found = inspect.unwrap(space.get(name, len))
        if getattr(found, "__globals__", None) is space:
            left += globals_of(found.__code__) - seen


def test_every_chapter_has_headlines_with_two_settings():
    for chapter in chapters():
        found = list(sceptic.headlines(chapter.path))
        assert found, chapter.path.name
        stored = nbformat.read(chapter.path, as_version=4).metadata.get("bound", {})
        for name, claim, data in found:
            assert claim.endswith(".") and len(data["settings"]) >= 2, name
            assert data["book"].keys() == data["settings"].keys(), name
            assert {str(v) for v in data["book"].values()} <= stored.keys(), name
