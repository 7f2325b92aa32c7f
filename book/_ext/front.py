"""The landing page, the claims page, the footer, and what a page weighs.

Directives for `index.md`: `start`, `rank-dial`, `verdicts`, `terms`. The list of claims
becomes a table with a filter. When the pages are written, they are made lighter.
"""

import html
import logging
import re
import struct
import subprocess
import sys
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

import nbformat
import yaml
from docutils import nodes
from docutils.parsers.rst import Directive
from fontTools import subset
from fontTools.ttLib import TTFont

from tools.kit import ledger, register

ROOT = register.ROOT

LANDING = "book/index"
CLAIMS = "book/claims"
SIDE = 128  # the layers of Chapter 3, and the picture's units
RANKS = (1, 2, 4, 8, 16, 32, 64)
PYTHON = "{}.{}".format(*sys.version_info)
PACKAGES = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "matplotlib")


# The landing page -------------------------------------------------------------------


def start():
    """Where to begin: reading, on Colab, or on paper if tools/pdf.py has been there."""
    first = register.chapters()[0]
    return f"""<p class="start">
<a class="button main" href="{first.path.stem}.html">Start reading</a>
<a class="button" href="{register.colab(first)}">Run on Colab</a>
<span data-pdf="button" hidden></span>
</p>"""


def rank_dial(rank=8):
    """One layer to scale: an area is a count of numbers. front.js moves the slider."""
    x = SIDE + 24 + max(RANKS) // 2  # the middle of B
    thin = 2 * SIDE * rank
    return f"""<figure class="dial" id="rank-dial">
<svg viewBox="0 0 400 166" role="img" aria-labelledby="dial-title">
<title id="dial-title">A large grey square, the frozen weight W, plus a tall thin matrix
B times a flat thin matrix A. Together A and B hold far fewer numbers than W.</title>
<rect class="frozen" x="1" y="1" width="{SIDE}" height="{SIDE}"/>
<text x="{SIDE / 2}" y="{SIDE / 2 + 5}" class="name">W</text>
<text x="{SIDE / 2}" y="150">frozen</text>
<text x="{SIDE + 14}" y="{SIDE / 2 + 5}" class="sign">+</text>
<rect class="trained b" x="{x - rank / 2}" y="1" width="{rank}" height="{SIDE}"/>
<text x="{x}" y="150"><tspan class="name">B</tspan> trained</text>
<text x="{x + 46}" y="{SIDE / 2 + 5}" class="sign">×</text>
<rect class="trained a" x="{x + 62}" y="{SIDE / 2 + 1 - rank / 2}"
 width="{SIDE}" height="{rank}"/>
<text x="{x + 62 + SIDE / 2}" y="150"><tspan class="name">A</tspan> trained</text>
</svg>
<label hidden>Rank
<input type="range" min="0" max="{len(RANKS) - 1}" value="{RANKS.index(rank)}"
 data-ranks="{" ".join(map(str, RANKS))}" data-side="{SIDE}"></label>
<figcaption>A layer with {SIDE} inputs and {SIDE} outputs, to scale.
<span class="count">Rank <b>{rank}</b>: <b>{thin:,}</b> trained numbers beside
{SIDE**2:,} frozen ones, <b>{thin / SIDE**2:.1%}</b>.</span></figcaption>
</figure>"""


def verdicts():
    """How the claims fared, as a bar whose parts open the claims page, filtered."""
    counts = ledger.tally()
    parts = "".join(
        f'<li class="{ledger.key(v)}" style="flex-grow: {n}">'
        f'<a href="claims.html?verdict={ledger.key(v)}"><b>{n}</b> '
        f"<span>{ledger.short(v)}</span></a></li>"
        for v, n in counts.items()
    )
    return (
        f"<p>{sum(counts.values())} claims that the series makes or the field repeats "
        "were checked, one by one. Each part of the bar opens its list:</p>"
        f'<ul class="verdicts" aria-label="Verdicts on the claims">{parts}</ul>'
    )


@cache
def last_run():
    """The latest day of a chapter's run, and whether `make run` wrote it down."""
    days, written = [], True
    for chapter in register.chapters():
        meta = nbformat.read(chapter.path, as_version=4).metadata
        day = meta.get("ran")
        if not day:  # the day of the commit that changed it last
            written = False
            command = ["git", "log", "-1", "--format=%cs", "--", chapter.path]
            day = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT
            ).stdout.strip()
        days += [date.fromisoformat(str(day))] if day else []
    return max(days, default=None), written


def ran():
    """`Last run on 24 November 2026`, or what else is known; empty without git."""
    day, written = last_run()
    if not day:
        return ""
    return f"Chapters last {'run' if written else 'changed'} on {day:%-d %B %Y}"


@cache
def citation():
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def terms():
    """Licences, citation and versions, from the files that hold them."""
    cite = citation()
    authors = " and ".join(
        a.get("name") or f"{a['family-names']}, {a['given-names']}"
        for a in cite["authors"]
    )
    day, _ = last_run()
    bibtex = f"""@misc{{deconstructing-lora,
  title   = {{{cite["title"]}}},
  author  = {{{{{authors}}}}},
  year    = {{{(day or date.today()).year}}},
  version = {{{cite["version"]}}},
  url     = {{{cite["url"]}}},
}}"""
    rows = "".join(
        f"<tr><td>{name}</td><td>{number}</td></tr>"
        for name, number in [("Python", PYTHON), *((p, version(p)) for p in PACKAGES)]
    )
    blob = f"{register.REPOSITORY}/blob/{register.BRANCH}"
    return f"""<dl class="terms">
<dt>Licence</dt>
<dd>Prose and figures:
<a href="https://creativecommons.org/licenses/by/4.0/">CC BY 4.0</a>.
Code: <a href="{blob}/LICENSE">MIT</a>.</dd>
<dt>How to cite</dt>
<dd><pre tabindex="0" aria-label="BibTeX entry">{html.escape(bibtex)}</pre>
<a href="{blob}/CITATION.cff">CITATION.cff</a> has the same for other programs.</dd>
<dt>What ran</dt>
<dd>{ran()}, with these versions:
<table class="versions"><thead><tr><th>Package</th><th>Version</th></tr></thead>
<tbody>{rows}</tbody></table></dd>
</dl>"""


def directive(write):
    class Write(Directive):
        def run(self):
            env = self.state.document.settings.env
            for file in (*ROOT.glob("book/*.ipynb"), ROOT / "book" / "claims.md"):
                env.note_dependency(str(file))
            return [nodes.raw("", write(), format="html")]

    return Write


def footer(app, pagename, templatename, context, doctree):
    """Who, under what terms, and when it ran, at the foot of every page."""
    at = "" if pagename == LANDING else context["pathto"](LANDING)
    parts = [
        f'<a href="{at}#who-and-under-what-terms">Licence: CC BY 4.0, code MIT</a>',
        f'<a href="{at}#who-and-under-what-terms">How to cite</a>',
        f"{ran()}, with PyTorch {version('torch')}, Python {PYTHON}",
    ]
    place = '<span data-pdf="link" hidden></span>'  # for tools/pdf.py
    context["theme_extra_footer"] = f'<p class="terms">{" · ".join(parts)}{place}</p>'


# The claims page ----------------------------------------------------------------------


def raw(text):
    return nodes.raw("", text, format="html")


def is_tail(node):
    """True for what stands at a row's end: places, assertions, and what is between."""
    if isinstance(node, nodes.literal):
        return True
    if isinstance(node, nodes.Text):
        return not node.strip(" \n·,;")
    target = node.get("reftarget", "") or node.get("refuri", "")
    return re.search(r"(^|/)\d\d-[\w-]+", target) is not None


def row_of(item, number, part):
    """A table row for one item of the list: the claim, its verdict, where, by what."""
    content = list(item[0].children)
    tail = []
    while content and is_tail(content[-1]):
        tail.insert(0, content.pop())
    strong = next(
        n
        for n in content
        if isinstance(n, nodes.strong) and n.astext().rstrip(".") in ledger.VERDICTS
    )
    verdict = strong.astext().rstrip(".")
    at = content.index(strong)
    after = content[at + 1] if at + 1 < len(content) else nodes.Text("")
    opens = at == 1 or (at == 2 and not content[1].astext().strip())
    rest = after.astext() if isinstance(after, nodes.Text) else ""
    if opens and (strong.astext().endswith(".") or rest[:1] in {".", ":", ","}):
        # The badge says it; what follows becomes the sentence.
        rest = rest.lstrip(".:, ")
        content[at : at + 2] = [nodes.Text(rest[:1].upper() + rest[1:])]
    claim, finding = content[:1], content[1:]
    if finding and isinstance(finding[0], nodes.Text):
        finding[0] = nodes.Text(finding[0].lstrip())

    said = nodes.entry("", nodes.paragraph("", "", *claim, classes=["claim"]))
    said += nodes.paragraph("", "", *finding)
    checks = [n for n in tail if isinstance(n, nodes.literal)]
    if checks:
        said += raw("<details><summary>What asserts it</summary>")
        said += nodes.bullet_list(
            "", *(nodes.list_item("", nodes.paragraph("", "", c)) for c in checks)
        )
        said += raw("</details>")
    badge = nodes.strong("", verdict, classes=["verdict", ledger.key(verdict)])
    places = nodes.paragraph()
    for place in (n for n in tail if not isinstance(n, (nodes.literal, nodes.Text))):
        places += [place, raw("<br>")]
    anchor = nodes.reference("", str(number), refuri=f"#claim-{number}", internal=True)
    return nodes.row(
        "",
        nodes.entry("", nodes.paragraph("", "", anchor)),
        said,
        nodes.entry("", nodes.paragraph("", "", badge)),
        nodes.entry("", places),
        ids=[f"claim-{number}"],
        classes=[ledger.key(verdict), f"part-{part}"],
    )


def table_of(items, part):
    head = nodes.row()
    for title in ("No.", "Claim, and what came out", "Verdict", "Shown in"):
        head += nodes.entry("", nodes.paragraph("", title))
    group = nodes.tgroup("", cols=4)
    for width in (6, 58, 16, 20):
        group += nodes.colspec("", colwidth=width)
    body = nodes.tbody("", *(row_of(item, n, part) for n, item in items))
    group += [nodes.thead("", head), body]
    return nodes.table("", group, classes=["claims", "colwidths-given"])


def filters(found):
    """Links that show the claims of one verdict or one part; front.js follows them."""

    def links(name, choices):
        items = "".join(
            f'<li><a href="?{name}={value}" data-{name}="{value}"'
            f' class="{value}">{label} <span>{n}</span></a></li>'
            for value, label, n in choices
        )
        return f'<ul aria-label="{name.title()}">{items}</ul>'

    counts = ledger.tally(found)
    by_verdict = [("all", "All", len(found))]
    by_verdict += [(ledger.key(v), v, n) for v, n in counts.items()]
    parts = sorted({row.part for row in found})
    by_part = [("all", "All parts", len(found))]
    by_part += [
        (p, ledger.heading(p), sum(row.part == p for row in found)) for p in parts
    ]
    return (
        '<nav class="filters" aria-label="Filter the claims" hidden>'
        + links("verdict", by_verdict)
        + links("part", by_part)
        + '<p role="status"></p></nav>'
    )


def claims_table(app, doctree):
    """Turn the page's lists of claims into tables; the source stays a plain list."""
    if app.env.docname != CLAIMS:
        return
    found, first = ledger.rows(), None
    part = {row.number: row.part for row in found}
    for badge in list(doctree.findall(nodes.strong)):
        # where the page says what they are; a row gets its own
        if (
            badge.astext() in ledger.VERDICTS
            and badge.parent.parent.tagname == "section"
        ):
            badge["classes"] += ["verdict", ledger.key(badge.astext())]
    for items in list(doctree.findall(nodes.enumerated_list)):
        number = items.get("start", 1)
        numbered = list(enumerate(items.children, number))
        if first is None:
            section = items.parent
            first = section.parent.index(section)
            section.parent.insert(first, raw(filters(found)))
        items.replace_self(table_of(numbered, part[number]))


# What a page weighs -------------------------------------------------------------------


def size_of(picture):
    """Width and height in CSS pixels: those of a PNG's inches, where it states them."""
    data = picture.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    size, at = struct.unpack(">II", data[16:24]), data.find(b"pHYs")
    per_meter = struct.unpack(">I", data[at + 4 : at + 8])[0] if at > 0 else 96 / 0.0254
    return [round(n / per_meter / 0.0254 * 96) for n in size]


def lighter(text, folder):
    """A page that paints before scripts and pictures have come."""
    text = re.sub(r'\s*<script [^>]*src="[^"]*fontawesome\.js[^>]*></script>', "", text)
    if not re.search(r'class="[^"]*\bmath\b', text):
        text = re.sub(r"\s*<script [^>]*/mathjax/[^>]*></script>", "", text)
    text = re.sub(r"\s*<link [^>]*sphinx-thebe\.css[^>]*>", "", text)
    text = re.sub(r'<link rel="preload" as="script"[^>]*>\s*', "", text)
    # A script in the page itself needs the options at once, the rest can wait.
    text = re.sub(
        r"<script (?=[^>]*src=)(?![^>]*(documentation_options|\bdefer\b))",
        '<script defer="defer" ',
        text,
    )

    def picture(match):
        tag, source = match[0], re.search(r'src="([^"]*)"', match[0])
        if source and "://" not in source[1] and "data:" not in source[1]:
            file = folder / source[1].split("?")[0]
            if " loading=" not in tag:
                tag = tag.replace("<img", '<img loading="lazy" decoding="async"', 1)
            sized = re.search(r"\b(width|height)\s*[=:]", tag)
            size = None if sized or not file.is_file() else size_of(file)
            if size:
                width, height = size
                sizes = f'<img width="{width}" height="{height}"'
                tag = tag.replace("<img", sizes, 1)
        return tag

    return re.sub(r"<img\b[^>]*>", picture, text)


def icons(static, used):
    """Cut the icon font, and its list of names, down to the icons that are used."""
    sheet = static / "styles" / "pydata-sphinx-theme.css"
    css = sheet.read_text(encoding="utf-8")
    names = re.compile(r'((?:\.fa-[\w-]+:before,?)+)\{content:"([^"]+)"\}')
    wanted = set(re.findall(r'--pst-[\w-]+:"([^"]+)"', css))
    for match in names.finditer(css):
        if used & set(re.findall(r"fa-[\w-]+", match[1])):
            wanted.add(match[2])
    css = names.sub(lambda m: m[0] if m[2] in wanted else "", css)
    points = set()
    for text in wanted:
        code = re.fullmatch(r"\\([0-9a-fA-F]+) ?", text)
        points |= {int(code[1], 16)} if code else {ord(c) for c in text}
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    fonts = static / "vendor" / "fontawesome" / "webfonts"
    for file in fonts.glob("*.ttf"):
        font = TTFont(file)
        options = subset.Options(flavor="woff", notdef_outline=False, hinting=False)
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=points)
        cutter.subset(font)
        subset.save_font(font, str(file.with_suffix(".woff")), options)
        css = re.sub(
            rf'src:url\(([^)]*/{file.stem})\.woff2\) format\("woff2"\)[^;}}]*',
            r'src:url(\1.woff) format("woff")',
            css,
        )
    sheet.write_text(css, encoding="utf-8")


def lighten(app, exception):
    if exception or app.builder.format != "html":
        return
    out, used = Path(app.outdir), set()
    static = out / "_static"
    for file in out.rglob("*.html"):
        if "_static" not in file.parts:
            text = file.read_text(encoding="utf-8")
            new = lighter(text, file.parent)
            used |= set(re.findall(r"\bfa-[\w-]+", new))
            if new != text:
                file.write_text(new, encoding="utf-8")
    for script in ("pydata-sphinx-theme.js", "sphinx-book-theme.js"):
        text = (static / "scripts" / script).read_text(encoding="utf-8")
        used |= set(re.findall(r"\bfa-[\w-]+", text))
    icons(static, used)
    for file in {*static.glob("scripts/fontawesome.js*"), *static.rglob("*.map")}:
        file.unlink()


def setup(app):
    for name, write in [
        ("start", start),
        ("rank-dial", rank_dial),
        ("verdicts", verdicts),
        ("terms", terms),
    ]:
        app.add_directive(name, directive(write))
    app.connect("doctree-read", claims_table)
    app.connect("html-page-context", footer, priority=900)
    app.connect("build-finished", lighten, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
