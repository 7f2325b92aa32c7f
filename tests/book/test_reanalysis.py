"""What the chapters of Part II print is what the rows say, by other code."""

import pytest

from tools.kit.register import notebooks
from tools.reanalysis import comparisons, pooled, rows_of

PRINTED = {  # what is compared -> the value that a chapter prints, over names
    "full above LoRA": "ahead_48",
    "full above LoRA, 96 steps": "ahead_96",
    "rank 2 above the cut to it": "ahead[2]",
    "at home, above the six others": "home_32",
    "LoRA on NF4, above LoRA on float32": "little_48",
}


def test_the_chapters_print_what_the_rows_say():
    books = {int(name[:2]): book for name, book in notebooks().items()}
    found = {}
    for chapter, what, (mean, (low, high), _) in comparisons():
        text = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "\N{MINUS SIGN}")
        found[what] = text, books[chapter].metadata["bound"].get(PRINTED.get(what))
    for what in PRINTED:
        rows, printed = found[what]
        assert rows == printed, what


def test_an_interval_by_hand(monkeypatch):
    """Two names in two seeds: the sandwich and Student's t, by hand."""
    monkeypatch.setattr(
        "tools.reanalysis.scores",
        lambda rows, libraries: {(s, n): rows[s][n] for s in (0, 1) for n in "ab"},
    )
    mean, names, seeds = pooled(
        [
            (
                [{"a": 3, "b": 1}, {"a": 5, "b": 3}],
                [{"a": 0, "b": 0}, {"a": 0, "b": 0}],
                None,
            )
        ]
    )
    assert mean == 3
    # residuals by name: a 0 + 2, b -2 + 0; error sqrt(2 (4 + 4)) / 4 = 1
    assert names == pytest.approx((3 - 12.7062, 3 + 12.7062), abs=1e-3)
    # means by seed: 2 and 4; error 1
    assert seeds == pytest.approx((3 - 12.7062, 3 + 12.7062), abs=1e-3)


def test_rows_are_chosen_by_all_their_settings():
    assert len(rows_of("main", method="full")) == 5
    assert len(rows_of("main", method="full", cut=8)) == 5
    assert not rows_of("main", method="full", cut=3)
