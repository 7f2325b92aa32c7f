"""Every number in the prose is shown by an output, the code or a quoted source."""

import random

import nbformat
import pytest
from listings import CHAPTERS, ROOT
from prose import (
    BOOK,
    NUMBER,
    chapter_orphans,
    evidence,
    is_checked,
    literature,
    numbers,
    orphans,
    paragraphs,
    with_evidence,
)

NOTEBOOKS = {path: nbformat.read(path, as_version=4) for path in CHAPTERS}
PAGES = [*sorted(BOOK.glob("*.md")), ROOT / "README.md"]


def report(found, page):
    return "".join(
        f"\n{page}: {number.text!r} in {text[:300]!r}" for number, text in found
    ) + (
        "\nNo output and no code shows this number. Print it, correct it, or, if it is "
        "quoted, add it to book/references.md and link the source in this paragraph."
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_of_chapters(path):
    found = list(chapter_orphans(NOTEBOOKS[path], literature()))
    assert not found, report(found, path.name)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_numbers_of_pages(path):
    known = {n for nb in NOTEBOOKS.values() for n in evidence(nb.cells)}
    quoted = literature()
    if path.name == "references.md":  # the source of quotations, not a user of them
        known |= {n for ns in quoted.values() for n in ns}
    found = list(orphans(path.read_text(), known, quoted))
    assert not found, report(found, path.name)


@pytest.mark.parametrize(
    ("prose", "source", "shown"),
    [
        ("about 4.6%", "4.586", True),
        ("4.6%", "0.04586", True),
        ("4.7%", "4.586", False),
        ("about 50 GB", "48.3 GB", True),
        ("50 GB", "48.3 GB", False),
        ("8.39 million", "8,388,608", True),
        ("8.38 million", "8,388,608", False),
        ("a 70B model", "70e9", True),
        ("33,666", "33_666", True),
        ("$33{,}666$", "33666", True),
        ("33,667", "33666", False),
        ("256-fold", "256", True),
        ("a learning rate of 0.003", "3e-3", True),
        ("float32, GPT-2, `17 cells`, in 2021, three, 12 of them", "", True),
        ("13 of them", "", False),
        ("12% of them", "", False),
        ("see [Hu, 99 pages](https://arxiv.org/abs/2106.09685)", "", False),
    ],
)
def test_rounding_is_understood_and_wrong_digits_are_not(prose, source, shown):
    assert (not list(orphans(prose, set(numbers(source)), {}))) == shown


def test_most_changed_digits_are_noticed():
    """Of 500 single digits changed at random, four in five or more make an orphan.

    The others are mostly numbers of two digits that happen to stand in their section.
    """
    places = [
        (block, known, match.start() + i)
        for notebook in NOTEBOOKS.values()
        for text, known in with_evidence(notebook)
        for block, links in paragraphs(text)
        for match in NUMBER.finditer(block)
        if not links and is_checked(next(numbers(match.group())))
        for i, character in enumerate(match.group())
        if character.isdigit()
    ]
    generator, noticed = random.Random(0), 0
    for block, known, at in generator.sample(places, 500):
        digit = generator.choice("123456789".replace(block[at], ""))
        changed = block[:at] + digit + block[at + 1 :]
        noticed += any(True for _ in orphans(changed, known, {}))
    assert noticed >= 400
