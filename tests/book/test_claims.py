"""Every row of `book/claims.md` has a verdict, a place and a check that exist."""

import nbformat
import pytest

from tools.kit.ledger import claims, faults, sections, unnamed_settings
from tools.kit.register import chapters
from tools.sceptic import headlines

CLAIMS = {claim.number: claim for claim in claims()}
SECTIONS = {
    c.path.name: sections(nbformat.read(c.path, as_version=4)) for c in chapters()
}
HEADLINES = [headline for c in chapters() for headline in headlines(c.path)]


def test_the_ledger_is_complete():
    assert list(CLAIMS) == list(range(1, len(claims()) + 1))
    assert sum(claim.part <= 3 for claim in claims()) == 36  # the series' own


@pytest.mark.parametrize("number", CLAIMS)
def test_claim(number):
    source = CLAIMS[number].source
    assert not list(faults(source, SECTIONS))
    assert not list(unnamed_settings(source, HEADLINES))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("#the-layer", "#the-layers", "no #the-layers"),
        ("torch.equal(layer(x)", "torch.equal(other(x)", "no assertion"),
        ("::test_starts_bit_equal", "::test_ends_bit_equal", "no test_ends"),
        ("**Holds**", "**Probably**", "needs one verdict"),
    ],
)
def test_a_claim_that_leads_nowhere(old, new, fault):
    source = CLAIMS[5].source
    assert old in source
    assert any(fault in f for f in faults(source.replace(old, new), SECTIONS))


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
    assert bool(list(unnamed_settings(f"1. *A.* **Holds**: {text}", known))) == faulty
