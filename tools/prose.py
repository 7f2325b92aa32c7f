"""Numbers in the prose: each one stands in an output, in the code or in a source.

A number is an *orphan* if nothing shows it: no output and no code of its chapter
(`evidence`), and no entry of `book/references.md` for a source that its paragraph links
to (`literature`). Years and small counting numbers without a unit are not checked.
"""

import re
from collections import namedtuple
from pathlib import Path

BOOK = Path(__file__).resolve().parent.parent / "book"
COUNTING = 12  # "three seeds, 12 entries": counted, not measured

Number = namedtuple("Number", "text value unit percent")

NUMBER = re.compile(
    r"(?<![\w.])(?<!\w-)(?P<digits>\d+(?:[,_]\d{3})*(?:\.\d+)?)(?P<power>e[+-]?\d+)?"
    r"(?P<suffix>\s?%|\s?×|-fold|B\b|\s(?:thousand|million|billion)\b|\s?[KMGT]i?B\b)?"
    r"(?![\w^])"
)
SCALE = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "B": 1e9}
HEDGE = re.compile(r"\b(about|around|roughly|nearly|almost|some|over|than|or so)\W+$")


def numbers(text):
    """Every number in `text`, with the size of its last digit that carries meaning."""
    text = re.sub(r"(?<=\d)(\{,\}|\\,)(?=\d{3})", ",", text)
    for match in NUMBER.finditer(text):
        power, suffix = match["power"] or "", (match["suffix"] or "").strip()
        plain = re.sub("[,_]", "", match["digits"])
        unit = 10.0 ** -len(plain.partition(".")[2])
        if HEDGE.search(text[: match.start()]) and "." not in plain:
            unit = 10.0 ** (
                len(plain) - len(plain.rstrip("0"))
            )  # "about 50" is 48, too
        scale = float("1" + power) * SCALE.get(suffix, 1)
        value = float(plain) * scale
        yield Number(match.group().strip(), value, unit * scale, suffix == "%")


def is_checked(number):
    """False for years and for small whole numbers that have no unit."""
    if not re.fullmatch(r"\d+", number.text):
        return True
    return number.value > COUNTING and not 1900 <= number.value <= 2100


def shows(source, number):
    """True if `source`, a number of the evidence, is `number` up to rounding."""
    values = {source.value}
    if number.percent and not source.percent:
        values.add(100 * source.value)
    return any(abs(v - number.value) <= number.unit * 0.500001 for v in values)


def paragraphs(markdown):
    """The blocks of a page as they read: without code, addresses and HTML tags."""
    markdown = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=\s*[-*|] ?)|^\d+\. ", markdown, flags=re.M):
        links = re.findall(r"\]\((https?://[^)\s]+)\)", block)
        block = re.sub(r"\]\([^)]*\)|<[^>]*>|`[^`]*`|\bhttps?://\S+", " ", block)
        block = re.sub(
            r"\b(Exercise|Chapter|chapter|Table|table|Python) [\d.]+|\b\d+ min\b",
            " ",
            block,
        )
        yield block, links


def literature():
    """Address of a source -> the numbers that `references.md` quotes from it."""
    quoted = {}
    for block, links in paragraphs((BOOK / "references.md").read_text()):
        for link in links:
            quoted.setdefault(link, []).extend(numbers(block))
    return quoted


def text_of(output):
    """What a reader sees of an output that is not a picture."""
    data = output.get("data", {})
    return output.get("text", "") + (
        "" if "image/png" in data else data.get("text/plain", "")
    )


def evidence(cells):
    """All numbers in the code and the outputs of some cells."""
    code = [c for c in cells if c.cell_type == "code"]
    texts = [c.source for c in code] + [text_of(o) for c in code for o in c.outputs]
    # Code and outputs write 12x and 3s where prose does not.
    return [n for t in texts for n in numbers(re.sub(r"(?<=[\d.])(x|°|s)\b", " ", t))]


def is_specific(number):
    """Three digits or more: such a number is not met by chance."""
    return len(re.sub(r"\D", "", number.text).lstrip("0")) >= 3


def orphans(markdown, known, quoted):
    """(number, its paragraph) for each number of a text that nothing shows."""
    for block, links in paragraphs(markdown):
        sources = [*known, *(n for link in links for n in quoted.get(link, ()))]
        for number in numbers(block):
            if is_checked(number) and not any(shows(s, number) for s in sources):
                yield number, " ".join(block.split())


def sections(notebook):
    """The chapter cut at its `##` headings: each part's prose and its code cells."""
    parts = [([], [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            parts[-1][0].append(alt)
            parts[-1][1].append(cell)
            continue
        first, *others = re.split(r"^(?=## )", cell.source, flags=re.MULTILINE)
        parts[-1][0].append(first)
        parts += [([text], []) for text in others]
    return [("\n\n".join(texts), cells) for texts, cells in parts]


def with_evidence(notebook):
    """(prose, numbers that may stand in it) for each section of a chapter.

    A number is looked for in its own section, a specific one in the whole chapter. The
    introduction and the summary ("What was shown") may take theirs from anywhere.
    """
    everywhere = evidence(notebook.cells)
    specific = [n for n in everywhere if is_specific(n)]
    for i, (text, cells) in enumerate(sections(notebook)):
        overview = i == 0 or text.startswith("## What was shown")
        yield text, set(everywhere if overview else specific + evidence(cells))


def chapter_orphans(notebook, quoted):
    """Orphans of a chapter, as `orphans` gives them."""
    for text, known in with_evidence(notebook):
        yield from orphans(text, known, quoted)
