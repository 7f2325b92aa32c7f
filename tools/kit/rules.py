"""The rules to keep, collected from the chapters: `> **Rule to keep.** …` in each.

The recipe page shows them by decision: a rule belongs to the last one that links to the
rule's section, and where none does, to its chapter.
"""

import re
from collections import namedtuple
from functools import cache

from myst_parser.mdit_to_docutils.base import default_slugify

from tools.kit.notebooks import PLAIN
from tools.kit.register import BOOK, chapters, notebooks

RECIPE = BOOK / "recipe.md"
LINE = re.compile(r"^(?:(#{1,3}) (.+)|> \*\*Rule to keep\.\*\* (.+))$", re.MULTILINE)
Rule = namedtuple("Rule", "chapter number section link text")


@cache
def rules():
    """All rules in the order of the book; `text` is Markdown."""
    found = []
    for number, chapter in enumerate(chapters(), 1):
        name, title = chapter.path.name, ""
        for cell in notebooks()[chapter.path.stem].cells:
            if cell.cell_type != "markdown":
                continue
            for match in LINE.finditer(cell.source):
                title = match[2] or title
                if match[3]:
                    link = f"{name}#{default_slugify(title)}"
                    text = PLAIN.sub("", match[3]).replace("](#", f"]({name}#")
                    found.append(Rule(chapter.title, number, title, link, text))
    return found


def questions():
    """Heading of the recipe -> the sections of chapters that it links to."""
    parts = re.split(r"^## (.+)\n", RECIPE.read_text(), flags=re.MULTILINE)[1:]
    links = re.compile(r"\]\((\d\d-[\w-]+\.ipynb#[\w-]+)\)")
    return {t: links.findall(text) for t, text in zip(parts[::2], parts[1::2])}


def grouped():
    """A decision, or else a chapter's title, -> its rules."""
    asked, groups = questions(), {}
    for rule in rules():
        homes = [q for q, links in asked.items() if rule.link in links]
        groups.setdefault(homes[-1] if homes else rule.chapter, []).append(rule)
    return {q: groups.pop(q) for q in asked if q in groups} | groups
