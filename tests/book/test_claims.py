"""Every row of `book/claims.md` has a verdict, a place and a check that exist."""

import ast
import re
from collections import Counter

import nbformat
import pytest
from bound import sources_of_literature
from myst_parser.mdit_to_docutils.base import default_slugify
from register import BOOK, ROOT, chapters

VERDICTS = "Holds with conditions|Holds|Too strong|Does not hold"
ROWS = re.findall(r"^\d+\. .*", (BOOK / "claims.md").read_text(), re.MULTILINE)
CLAIMS = {int(row.split(".")[0]): row for row in ROWS}


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
    assert list(CLAIMS) == list(range(1, 37))


def check_claim(row):
    """Fail unless a row has a verdict, and points to sections and checks that exist."""
    number = row.split(".")[0]
    verdicts = re.findall(rf"\*\*({VERDICTS})\.?\*\*", row)
    assert len(verdicts) == 1, f"claim {number} needs one verdict of {VERDICTS}"

    places = re.findall(r"\]\(([\w-]+\.ipynb)#([^)]+)\)", row)
    assert places, f"claim {number} does not say where it is shown"
    for page, anchor in places:
        assert anchor in SECTIONS[page], f"claim {number}: no #{anchor} in {page}"
    shown = [SECTIONS[page][anchor] for page, anchor in places]

    checks = re.findall(r"`([^`]+)`", row)
    sources = re.findall(r"\]\((https?://[^)]+)\)", row)
    assert checks or sources, f"claim {number} names no assertion, test or source"
    for check in checks:
        file, _, name = check.partition("::")
        if name:
            tests = ast.parse((ROOT / file).read_text()).body
            known = [t.name for t in tests if isinstance(t, ast.FunctionDef)]
            assert name in known, f"claim {number}: no {name} in {file}"
            continue
        lines = [line for _, code in shown for line in code.splitlines()]
        assert any(check in line and "assert " in line for line in lines), (
            f"claim {number}: no assertion {check!r} in the section it points to"
        )
    for source in sources:  # nothing to assert here: the section cites, we quote
        assert source in sources_of_literature().values(), (
            f"{source} is not in references.md"
        )
        assert all(source in prose for prose, _ in shown), (
            f"{source} is not cited there"
        )


@pytest.mark.parametrize("number", CLAIMS)
def test_claim(number):
    check_claim(CLAIMS[number])


def test_the_page_says_what_the_verdicts_are():
    text = (BOOK / "claims.md").read_text().split("## Part 1")[0]
    for verdict in VERDICTS.split("|"):
        assert f"**{verdict}**" in text
    count = Counter(re.search(rf"\*\*({VERDICTS})", row)[1] for row in ROWS)
    assert count["Does not hold"] >= 8
    assert count["Holds"] >= 8
