"""The claims of the series and of the field and what came out: `book/claims.md`.

A row there is one line:
N. *claim* **Verdict**: text. [section](NN-name.ipynb#anchor) · `assertion` · `test`
The claims page, the landing page and the README take their counts from here; `make
sync` writes the README's.
"""

import re
from collections import Counter, namedtuple
from functools import cache

from myst_parser.mdit_to_docutils.base import default_slugify

from tools.kit.register import BASE, BOOK, ROOT

# Verdict -> how it reads after a count, and its colour: Okabe-Ito, dark enough for
# white letters.
VERDICTS = {
    "Holds": ("held", "#00664b"),
    "Holds with conditions": ("held with conditions", "#0067a0"),
    "Too strong": ("were too strong", "#8a5a00"),
    "Does not hold": ("did not hold", "#a33a00"),
}
VERDICT = re.compile(
    rf"\*\*({'|'.join(sorted(VERDICTS, key=len, reverse=True))})\.?\*\*"
)
README = re.compile(r"(?<=<!-- verdicts -->\n).*?(?=<!-- /verdicts -->)", re.DOTALL)
PICTURE = BOOK / "_static" / "verdicts.svg"

Claim = namedtuple("Claim", "number part verdict source")


def key(verdict):
    """The verdict as it stands in an address: `does-not-hold`."""
    return verdict.lower().replace(" ", "-")


def heading(part):
    """What the page calls a part: the series has three, then chapters follow."""
    return f"{'Part' if part <= 3 else 'Chapter'} {part}"


def short(verdict):
    """The verdict as a label: `too strong`."""
    return VERDICTS[verdict][0].removeprefix("were ")


@cache
def claims():
    """The page's claims in order; `verdict` is None unless there is just one.

    `part` is that of the series, 1 to 3, or the chapter of Part II, from 4 on.
    """
    part, listed = 0, []
    for line in (BOOK / "claims.md").read_text(encoding="utf-8").splitlines():
        if title := re.match(r"## (?:Part|Chapter) (\d+)", line):
            part = int(title[1])
        elif item := re.match(r"(\d+)\. \*", line):
            verdicts = VERDICT.findall(line)
            verdict = verdicts[0] if len(verdicts) == 1 else None
            listed.append(Claim(int(item[1]), part, verdict, line))
    return listed


def checks(source):
    """The assertions and tests that a row names, after the first place it links to."""
    tail = re.search(r"\]\([\w-]+\.ipynb#.*", source)
    return re.findall(r"`([^`]+)`", tail[0]) if tail else []


def tally():
    """Verdict -> how many claims, in the order of VERDICTS."""
    count = Counter(claim.verdict for claim in claims())
    return {verdict: count[verdict] for verdict in VERDICTS}


# --- What is written from it ---


def picture():
    """The counts as a bar, an SVG file of its own: a README holds no style sheet."""
    counts = tally()
    width, total, x, parts = 640, sum(counts.values()), 0, []
    for verdict, n in counts.items():
        words, colour = short(verdict), VERDICTS[verdict][1]
        w = round(width * n / total, 1)
        parts.append(
            f'<rect x="{x}" width="{w - 2:.1f}" height="40" rx="4" fill="{colour}"/>'
            f'<text x="{x + w / 2:.1f}" y="27" class="n">{n}</text>'
            f'<text x="{x + w / 2:.1f}" y="58" class="w">{words}</text>'
        )
        x = round(x + w, 1)
    style = (
        "text{font:13px system-ui,sans-serif;text-anchor:middle}.n{font-size:18px;"
        "font-weight:600;fill:#fff}.w{fill:#333a42}"
        "@media(prefers-color-scheme:dark){.w{fill:#e4e6e8}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 66" '
        f'width="{width}" height="66">\n<style>{style}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def readme():
    """The README's lines between its marks."""
    total, page = len(claims()), f"{BASE}book/claims.html"
    *most, last = (f"{n} {VERDICTS[verdict][0]}" for verdict, n in tally().items())
    said = f"{', '.join(most)} and {last}"
    return (
        f"\nOf {total} claims that the series makes or the field repeats, {said}: "
        f"[each with what shows it]({page}).\n\n"
        f"[![A bar of {total} claims: {said}.](book/_static/verdicts.svg)]({page})\n\n"
    )


# --- Faults ---


def sections(notebook):
    """Anchor -> [prose, code] from that heading to the next of its level or above."""
    texts, above = {}, []
    for cell in notebook.cells:
        blocks = [cell.source + "\n"]
        if cell.cell_type == "markdown":
            blocks = re.split(r"^(?=#+ )", cell.source, flags=re.MULTILINE)
        for block in blocks:
            title = re.match(r"(#+) (.*)", block)
            if title and cell.cell_type == "markdown":
                level, anchor = len(title[1]), default_slugify(title[2])
                above = [(n, a) for n, a in above if n < level] + [(level, anchor)]
                if anchor in texts:
                    raise ValueError(f"two headings make the anchor #{anchor}")
                texts[anchor] = ["", ""]
            for _, anchor in above:
                texts[anchor][cell.cell_type == "code"] += block
    return texts


def faults(source, book):
    """A sentence for each verdict, place or check of a row that is not there.

    `book` holds the `sections` of each chapter, by the notebook's name.
    """
    if len(VERDICT.findall(source)) != 1:
        yield f"needs one verdict of {list(VERDICTS)}"
    places = re.findall(r"\]\(([\w-]+\.ipynb)#([^)]+)\)", source)
    shown = [book[page].get(anchor) for page, anchor in places]
    for (page, anchor), text in zip(places, shown):
        if text is None:
            yield f"no #{anchor} in {page}"
    prose, code = zip(*filter(None, shown)) if any(shown) else ((), ())
    quoted = re.findall(r"\]\((https?://[^)]+)\)", source)
    if not places or not (checks(source) or quoted):
        yield "names no place, or no assertion, test or source"
    # An assertion may take several lines in its cell.
    asserted = " ".join(" ".join(code).split()).split("assert ")[1:]
    for check in checks(source):
        file, _, test = check.partition("::")
        wanted = " ".join(check.removeprefix("assert ").split())
        whole = check.startswith("assert ")
        there = [a.startswith(wanted) if whole else wanted in a for a in asserted]
        if test and f"def {test}(" not in (ROOT / file).read_text():
            yield f"no {test} in {file}"
        elif not test and not any(there):
            yield f"no assertion {check!r} in the section it points to"
    references = (BOOK / "references.md").read_text()
    for link in quoted:  # nothing to assert here: the section cites, we quote
        if not all(link in text for text in (references, *prose)):
            yield f"{link} is not in references.md, or not cited there"


def unnamed_settings(source, headlines):
    """A sentence for each headline that a row rests on without naming two settings.

    It rests on a headline if a check or a bound number of it names the function, or an
    expression that holds the chapter's own result.
    """

    def has(text, part):
        return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text)

    text = " ".join(re.sub("<!--.*?-->", "", source).split())
    named = " ".join([*checks(source), *re.findall("<!--(.*?)-->", source)])
    for function, _, data in headlines:
        rests = any(has(named, part) for part in (function, *data["book"].values()))
        said = [setting for setting in data["settings"] if has(text, setting)]
        if rests and len(said) < 2:
            yield (
                f"rests on {function} and must name two of its settings "
                f"{list(data['settings'])}; it names {said}"
            )
