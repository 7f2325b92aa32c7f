"""Chapters as files: executed, warning-free, folded, described; nothing to run here."""

import re
import subprocess

import nbformat
import pytest
from listings import CHAPTERS, ROOT, exports
from notebooks import faults

NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in CHAPTERS}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_fault(name):
    found = list(faults(NOTEBOOKS[name]))
    assert not found, f"{name}:\n" + "\n".join(found)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_exercises_have_solutions(name):
    chapter = int(name[:2])
    sources = [cell.source for cell in NOTEBOOKS[name].cells]
    asked = re.findall(r"^### Exercise (\d+\.\d+): .", "\n".join(sources), re.MULTILINE)
    solved = [m[1] for s in sources if (m := re.match(r"# Solution (\d+\.\d+)\b", s))]
    assert asked == solved == [f"{chapter}.{i + 1}" for i in range(len(asked))]
    assert len(asked) >= 4
    for source in sources:
        assert not source.startswith("# Solution") or "assert " in source, source


def test_chapters_open_alike():
    """A title with the chapter's number, and one and the same first code cell."""
    first = set()
    for name, notebook in NOTEBOOKS.items():
        assert notebook.cells[0].source.startswith(f"# {int(name[:2])}. ")
        first.add(next(c.source for c in notebook.cells if c.cell_type == "code"))
    assert len(first) == 1, "the import cells differ:\n" + "\n\n".join(first)


def test_the_landing_page_shows_figures_of_the_chapters():
    index, shown = (ROOT / "book" / "index.md").read_text(), 0
    for name, png in (e for nb in NOTEBOOKS.values() for e in exports(nb)):
        assert (ROOT / "book" / "_static" / name).read_bytes() == png, (
            f"{name}: make sync"
        )
        shown += f"_static/{name}" in index
    assert shown == 2


def test_reading_times():
    """200 words a minute, 3 seconds for a line of code or output; to 5 minutes."""
    index = (ROOT / "book" / "index.md").read_text()
    for name, notebook in NOTEBOOKS.items():
        words = lines = 0
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                words += len(cell.source.split())
            elif not {"hide-input", "hide-cell"} & set(cell.metadata.get("tags", [])):
                texts = [cell.source] + [o.get("text", "") for o in cell.outputs]
                lines += sum(len(text.splitlines()) for text in texts)
        minutes = words / 200 + lines / 20
        (said,) = re.findall(rf"\]\({name}\).* (\d+) min to read", index)
        assert abs(int(said) - minutes) <= 5, f"{name}: {minutes:.0f} minutes to read"


def test_one_repository():
    """The address in `_config.yml` is the one that every other file gives."""
    config = (ROOT / "_config.yml").read_text()
    (owner, name) = re.search(
        r"url: https://github.com/([\w-]+)/([\w-]+)", config
    ).groups()
    assert f"baseurl: https://{owner.lower()}.github.io/{name}/" in config
    command = ["git", "-C", ROOT, "grep", "-hoIE"]
    command += [
        r"(github\.com|github/|[a-z]+\.github\.io)[/:][A-Za-z0-9_/-]+",
        "--",
        ".",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours = re.findall(rf".*{owner}.*", found, re.IGNORECASE)
    assert len(ours) > 10
    for address in ours:
        assert re.search(
            rf"{owner}/{name}\b|{owner.lower()}\.github\.io/{name}\b", address
        )
