"""The claims of the series and of the field and what came out: `book/claims.md`.

A row there is one line:
N. *claim* **Verdict**: text. [section](NN-name.ipynb#anchor) · `assertion` · `test`
The claims page, the landing page and the README take their counts from here; `make
sync` writes the README's.
"""

import re
from collections import Counter, namedtuple

from tools.kit.register import BASE, BOOK

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

Row = namedtuple("Row", "number part verdict source")


def key(verdict):
    """The verdict as it stands in an address: `does-not-hold`."""
    return verdict.lower().replace(" ", "-")


def heading(part):
    """What the page calls a part: the series has three, then chapters follow."""
    return f"{'Part' if part <= 3 else 'Chapter'} {part}"


def short(verdict):
    """The verdict as a label: `too strong`."""
    return VERDICTS[verdict][0].removeprefix("were ")


def rows(text=None):
    """The rows of the page in order; `verdict` is None unless there is just one.

    `part` is that of the series, 1 to 3, or the chapter of Part II, from 4 on.
    """
    part, found = 0, []
    text = text or (BOOK / "claims.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        if heading := re.match(r"## (?:Part|Chapter) (\d+)", line):
            part = int(heading[1])
        elif row := re.match(r"(\d+)\. \*", line):
            verdicts = VERDICT.findall(line)
            verdict = verdicts[0] if len(verdicts) == 1 else None
            found.append(Row(int(row[1]), part, verdict, line))
    return found


def checks(source):
    """The assertions and tests that a row names, after the first place it links to."""
    tail = re.search(r"\]\([\w-]+\.ipynb#.*", source)
    return re.findall(r"`([^`]+)`", tail[0]) if tail else []


def tally(found=None):
    """Verdict -> how many claims, in the order of VERDICTS."""
    count = Counter(row.verdict for row in found or rows())
    return {verdict: count[verdict] for verdict in VERDICTS}


def sentence(counts):
    """The counts in words, as the README and a picture's alternative text have them."""
    *most, last = (f"{n} {VERDICTS[verdict][0]}" for verdict, n in counts.items())
    return f"{', '.join(most)} and {last}"


def picture(counts):
    """The counts as a bar, an SVG file of its own: a README holds no style sheet."""
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


def readme(counts):
    """The README's lines between its marks."""
    said, total, page = (
        sentence(counts),
        sum(counts.values()),
        f"{BASE}book/claims.html",
    )
    return (
        f"\nOf {total} claims that the series makes or the field repeats, {said}: "
        f"[each with what shows it]({page}).\n\n"
        f"[![A bar of {total} claims: {said}.](book/_static/verdicts.svg)]({page})\n\n"
    )
