"""Every number in the prose is bound to the value that it reports, and says it."""

import re

import nbformat
import pytest

from tools.kit.bound import (
    KEY,
    computed,
    expression,
    faults,
    faults_of_text,
    keys,
    known_values,
    literature,
    outside,
    reads,
    texts,
    write,
)
from tools.kit.register import BOOK, COLAB, REPOSITORY, executed
from tools.kit.tolerance import differs

NOTEBOOKS = executed()
KNOWN = known_values(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_numbers_of_chapters(name):
    found = list(faults(NOTEBOOKS[name], KNOWN))
    assert not found, f"{name}:\n" + "\n".join(found)


@pytest.mark.parametrize("path", outside(), ids=lambda path: path.name)
def test_numbers_of_pages(path):
    found = list(faults_of_text(outside()[path], KNOWN))
    assert not found, f"{path.name}:\n" + "\n".join(found)


def texts_and_values():
    """All that a reader reads, pages, prose, captions, alts, with the values there."""
    for path, text in outside().items():
        if path.name != "references.md":  # the source of quotations
            yield text, KNOWN
    for cell in (cell for notebook in NOTEBOOKS.values() for cell in notebook.cells):
        for text in texts(cell).values():
            yield text, KNOWN | cell.metadata.get("bound", {})


def changed(token):
    """Another token of the same form: the next digit, or the opposite word."""
    opposite = {"lower": "higher", "higher": "lower", "three": "five"}
    if not re.search(r"\d", token):
        return opposite.get(token, token + "s")
    return re.sub(r"\d(?=\D*$)", lambda m: str((int(m[0]) + 3) % 10), token)


def test_every_bound_number_and_word_is_noticed_when_it_changes():
    """16 bytes to 19, 0.12 points to 0.15, three runs to five, lower to higher."""
    planted = 0
    for text, values in texts_and_values():
        for match in re.finditer(r"([+−]?\w(?:[\w.,-]*\w)?%?)" + KEY, text):
            new = text[: match.start(1)] + changed(match[1]) + text[match.end(1) :]
            assert "is said" in "".join(faults_of_text(new, values)), match.group()
            planted += 1
    assert planted > 100


def test_each_figure_of_the_literature_is_used_once_defined_and_in_the_bibliography():
    text = (BOOK / "references.md").read_text()
    defined = [key for key in keys(text) if key in literature()]
    assert len(defined) == len(set(defined))
    entries = re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text(), re.M)
    assert {key.partition(":")[0] for key in defined} <= set(entries)
    used = {
        key
        for notebook in NOTEBOOKS.values()
        for cell in notebook.cells
        for text in texts(cell).values()
        for key in keys(text)
    }
    used |= set(keys(outside()[BOOK / "claims.md"]))
    assert set(defined) <= used, "quoted, but bound to nowhere"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "It is 2.0<!-- m:.1f -->, in 2021, with 12 of them and GPT-2 at rank 8.",
            None,
        ),
        ("It is 2.1<!-- m:.1f -->.", "'2.1' is said, '2.0' is the value"),
        ("It is higher<!-- word -->.", "'higher' is said, 'lower' is the value"),
        ("It is 2.0<!-- n -->.", "has no value yet"),
        ("## Of 2.0<!-- m:.1f -->", "stands in a heading"),
        ("<!-- m:.1f -->", "nothing to bind"),
        ("It is 2.0<!-- m[0] | n -->.", "must not contain"),
        ("13 of them", "'13' is not bound"),
        ("### What fits on a 24 GB GPU?", None),
        ("### It fits on 24 GB", "'24 GB' is not bound"),
        ("12% of them", "'12%' is not bound"),
        ("3 million", "'3 million' is not bound"),
        ("$r = 16$", "'16' is not bound"),
        ("at $0.5$", "'0.5' is not bound"),
        ("$33{,}666$", "'33,666' is not bound"),
        ("`x = 16`, [here](page-17.html), Exercise 1.13, a 70B model", None),
        ("a 95% interval, but 95% of them", "'95%' is not bound"),
    ],
)
def test_faults_of_a_text(text, fault):
    found = list(faults_of_text(text, {"m:.1f": "2.0", "word": "lower"}))
    assert len(found) == (fault is not None), found
    assert fault is None or fault in found[0]


@pytest.mark.parametrize(
    ("code", "is_computed"),
    [
        ("x = 98.88", False),
        ("x = {'a': [98.88, 3 * 4]}", False),
        ("x = range(10)", False),
        ("y = 98.88\nx = y", False),
        ("y = 98.88\nx = float(y)", False),
        ("y = {'a': 1}\nfor x in y.items():\n    pass", False),
        ("y = f()\nx = 98.88", False),
        ("def x():\n    y = f()\n    return y", False),
        ("x = f()\nx = 98.88", False),
        ("x = f(98.88)", True),
        ("y = 3\nx = 4 * y", True),
        ("x, y = 98.88, f()", False),
        ("y, x = 98.88, f()", True),
        ("y = f()\nx = [y, 3]", True),
        ("y = f()\nfor x in y:\n    pass", True),
        ("x = {}\nx['a'] = f()", True),
        ("x = []\nx.append(f())", True),
        ("x = []\nx.append(3)", False),
        ("x = 0\nx += f()", True),
        ("with f() as x:\n    pass", True),
        ("!pip install x\nx = len(f())", True),
    ],
)
def test_what_is_computed(code, is_computed):
    cell = nbformat.v4.new_code_cell(code)
    assert ("x" in computed([cell])) == is_computed
    assert bool(reads("x:.2f", computed([cell]))) == is_computed


def test_a_tolerance_follows_its_values():
    loose = nbformat.v4.new_code_cell(
        "x = f()", metadata={"tolerance": {"absolute": 2}}
    )
    later = nbformat.v4.new_code_cell("y = 2 * x\nz = g()")
    assert computed([loose, later]) == {"x": 2, "y": 2, "z": 0}


def test_expressions():
    assert expression("x[1:3]") == "str(x[1:3])"
    assert expression('x["a"].mean():.2f') == """format(x["a"].mean(), '.2f')"""
    assert write("0<!-- x -->%, 1<!-- y -->", {"x": "4"}) == "4<!-- x -->%, 1<!-- y -->"
    assert write("<!-- chapters -->\n", {}) == "<!-- chapters -->\n"
    interval = "+1.00 [−0.10, +2.10]"
    assert write("−1.00 [+0.00, +0.00]<!-- v -->", {"v": interval}).startswith(interval)


@pytest.mark.parametrize(
    ("stored", "new", "tolerance", "different"),
    [
        ("76.4 ± 0.2", "76.4 ± 0.2", 0, False),
        ("76.4 ± 0.2", "76.5 ± 0.2", 0, True),
        ("76.4 ± 0.2", "76.5 ± 0.2", 0.11, False),
        ("76.4 points", "76.4 pounds", 1, True),
        ("−0.06", "0.06", 0.1, True),
        ("−0.06", "−0.16", 0.05, True),
        ("1,024", "1024", 0, False),
        ("a 3", "a 3 4", 9, True),
    ],
)
def test_differences_within_a_tolerance(stored, new, tolerance, different):
    assert differs(stored, new, tolerance) == different


def check_links(text):
    """A sentence for each link to GitHub or Colab that opens another repository.

    Reports of users, issues of a library, are literature.
    """
    for link in re.findall(r"https://(?:colab[\w.]*|github\.com)/[^)\s>]+", text):
        known = REPOSITORY, COLAB, "https://colab.research.google.com/assets/"
        report = re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+/issues/\d+", link)
        if not link.startswith(known) and not report:
            yield f"{link} is not this book's repository"


@pytest.mark.parametrize("path", outside(), ids=lambda path: path.name)
def test_links_to_the_repository(path):
    assert not list(check_links(outside()[path]))


@pytest.mark.parametrize("link", [REPOSITORY, COLAB])
def test_a_link_to_another_repository(link):
    assert not list(check_links(f"[here]({link})"))
    owner = link.split("/")[-2]
    (fault,) = check_links(f"[here]({link.replace(owner, 'someone')})")
    assert "someone" in fault
