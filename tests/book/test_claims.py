"""Every row of `book/claims.md` has a verdict, a place and a check that exist."""

import ast
import re

import nbformat
import pytest
from myst_parser.mdit_to_docutils.base import default_slugify

from tools.kit import ledger
from tools.kit.register import BOOK, ROOT, chapters
from tools.sceptic import headlines

ROWS = ledger.rows()
CLAIMS = {row.number: row.source for row in ROWS}
REFERENCES = (BOOK / "references.md").read_text()
HEADLINES = [headline for c in chapters() for headline in headlines(c.path)]


def sections(notebook):
    """Anchor -> (prose, code) from that heading to the next of its level or above."""
    found, open_now = {}, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for _, anchor in open_now:
                found[anchor][1] += cell.source + "\n"
            continue
        for block in re.split(r"^(?=#+ )", cell.source, flags=re.MULTILINE):
            heading = re.match(r"(#+) (.*)", block)
            if heading:
                level, anchor = len(heading[1]), default_slugify(heading[2])
                open_now = [(n, a) for n, a in open_now if n < level]
                open_now.append((level, anchor))
                assert anchor not in found, f"two headings make the anchor #{anchor}"
                found[anchor] = ["", ""]
            for _, anchor in open_now:
                found[anchor][0] += block
    return found


SECTIONS = {
    c.path.name: sections(nbformat.read(c.path, as_version=4)) for c in chapters()
}


def test_the_ledger_is_complete():
    assert list(CLAIMS) == list(range(1, len(ROWS) + 1))
    assert sum(row.part <= 3 for row in ROWS) == 36  # the series' own


def check_claim(row):
    """Fail unless a row has a verdict, and points to sections and checks that exist."""
    number = row.split(".")[0]
    verdicts = ledger.VERDICT.findall(row)
    assert len(verdicts) == 1, (
        f"claim {number} needs one verdict of {list(ledger.VERDICTS)}"
    )

    places = re.findall(r"\]\(([\w-]+\.ipynb)#([^)]+)\)", row)
    assert places, f"claim {number} does not say where it is shown"
    for page, anchor in places:
        assert anchor in SECTIONS[page], f"claim {number}: no #{anchor} in {page}"
    shown = [SECTIONS[page][anchor] for page, anchor in places]

    checks = ledger.checks(row)
    sources = re.findall(r"\]\((https?://[^)]+)\)", row)
    assert checks or sources, f"claim {number} names no assertion, test or source"
    for check in checks:
        file, _, name = check.partition("::")
        if name:
            tests = ast.parse((ROOT / file).read_text()).body
            known = [t.name for t in tests if isinstance(t, ast.FunctionDef)]
            assert name in known, f"claim {number}: no {name} in {file}"
            continue
        # An assertion may take several lines in its cell.
        code = " ".join(" ".join(code for _, code in shown).split())
        wanted = " ".join(check.split())
        asserted = ["assert " + part for part in code.split("assert ")[1:]]
        begins = wanted.startswith("assert ")
        assert any(
            part.startswith(wanted) if begins else wanted in part for part in asserted
        ), f"claim {number}: no assertion {check!r} in the section it points to"
    for source in sources:  # nothing to assert here: the section cites, we quote
        assert source in REFERENCES, f"{source} is not in references.md"
        assert all(source in prose for prose, _ in shown), (
            f"{source} is not cited there"
        )


@pytest.mark.parametrize("number", CLAIMS)
def test_claim(number):
    check_claim(CLAIMS[number])


def unnamed_settings(row, known):
    """A sentence for each headline that a row rests on without naming two settings.

    It rests on a headline if a check or a bound number of it names the function, or an
    expression that holds the chapter's own result.
    """
    text = " ".join(re.sub("<!--.*?-->", "", row).split())
    named = " ".join([*ledger.checks(row), *re.findall("<!--(.*?)-->", row)])
    for function, _, data in known:
        results = [function, *data["book"].values()]
        rests = any(re.search(rf"(?<!\w){re.escape(r)}(?!\w)", named) for r in results)
        said = [
            setting
            for setting in data["settings"]
            if re.search(rf"(?<!\w){re.escape(setting)}(?!\w)", text)
        ]
        if rests and len(said) < 2:
            yield (
                f"claim {row.split('.')[0]} rests on {function} and must name two "
                f"of its settings {list(data['settings'])}; it names {said}"
            )


@pytest.mark.parametrize("number", CLAIMS)
def test_a_row_of_a_headline_names_the_setting_and_a_second_one(number):
    assert not list(unnamed_settings(CLAIMS[number], HEADLINES))


@pytest.mark.parametrize(
    ("text", "faulty"),
    [
        ("0.1<!-- 03-x: m60.mean:.1f --> after 60 epochs and after 120 epochs.", False),
        ("0.1<!-- 03-x: m60.mean:.1f --> after 60 epochs.", True),
        ("0.1<!-- 03-x: m600.mean:.1f --> after 60 epochs.", False),
        ("Equal. [There](03-x.ipynb#a) · `assert rank_2(range(40)).holds`", True),
        ("Equal. [There](03-x.ipynb#a) · `assert other(range(40)).holds`", False),
    ],
)
def test_a_missing_setting_is_noticed(text, faulty):
    settings = {"60 epochs": {}, "120 epochs": {"epochs": 120}}
    book = {"60 epochs": "m60", "120 epochs": "m120"}
    known = [("rank_2", "Rank 2 matches.", {"settings": settings, "book": book})]
    found = list(unnamed_settings(f"1. *A.* **Holds**: {text}", known))
    assert bool(found) == faulty


def test_the_page_says_what_the_verdicts_are():
    text = (BOOK / "claims.md").read_text().split("## Part 1")[0]
    for verdict in ledger.VERDICTS:
        assert f"**{verdict}**" in text


def test_the_tally_is_that_of_the_rows():
    by_hand = {
        verdict: sum(
            f"**{verdict}**" in r or f"**{verdict}.**" in r for r in CLAIMS.values()
        )
        for verdict in ledger.VERDICTS
    }
    assert ledger.tally() == by_hand
    assert sum(by_hand.values()) == len(ROWS)
    assert min(by_hand.values()) > 0
    numbers = [int(n) for n in re.findall(r"\d+", ledger.sentence(by_hand))]
    assert numbers == list(by_hand.values())
