"""The landing page, the claims page, the footer, and what a page weighs.

Directives for `index.md`: see `setup`. The list of claims becomes a table with a
filter. When the pages are written, they are made lighter.
"""

import hashlib
import html
import io
import logging
import re
import shutil
import struct
import sys
from collections import Counter
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
from PIL import Image

from lora.study import plots
from tools.kit import ledger, register
from tools.kit.figures import pictures
from tools.kit.notebooks import minutes

ROOT, PDF = register.ROOT, register.PDF
LANDING = "book/index"
CLAIMS = "book/claims"
SIDE = 128  # the layers of Chapter 3, and the picture's units
WIDE = "image/png"
PHONE = "screen and (max-width: 767px)"  # shows the narrow of a figure's two files
RANKS = (1, 2, 4, 8, 16, 32, 64)
PYTHON = "{}.{}".format(*sys.version_info)
PACKAGES = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "matplotlib")


# The landing page -------------------------------------------------------------------


def start():
    """Where to begin: reading, on Colab, or on paper."""
    first = register.chapters()[0]
    return f"""<p class="start">
<a class="button main" href="{first.path.stem}.html">Start reading</a>
<a class="button" href="recipe.html">Fine-tune tomorrow</a>
<a class="button" href="{register.colab(first.path)}">Run on Colab</a>
{paper(f"../{PDF.name}", "button")}
</p>"""


def paper(address, kind="link"):
    """A link to what `make pdf` printed, where it is there and of today's pages."""
    if not PDF.exists() or PDF.stat().st_mtime < register.last_change():
        return ""
    size = PDF.stat().st_size / 1e6
    return f'<a class="{kind}" href="{address}">PDF, {size:.1f} MB</a>'


def rank_dial():
    """One layer to scale: an area is a count of numbers. front.js moves the slider."""
    rank = 8  # where the slider starts
    x = SIDE + 24 + max(RANKS) // 2  # the middle of B
    thin = 2 * SIDE * rank
    return f"""<figure class="dial" id="rank-dial">
<svg viewBox="0 0 400 166" role="img" aria-labelledby="dial-title">
<title id="dial-title">A large grey square, the frozen weight W, plus a tall thin matrix
B times a flat thin matrix A. Together A and B hold far fewer numbers than W.</title>
<rect class="frozen" x="1" y="1" width="{SIDE}" height="{SIDE}"/>
<text x="{SIDE / 2}" y="{SIDE / 2 + 5}" class="name">W</text>
<text x="{SIDE / 2}" y="150"><tspan class="name">W</tspan>&#160; frozen</text>
<text x="{SIDE + 14}" y="{SIDE / 2 + 5}" class="sign">+</text>
<rect class="trained b" x="{x - rank / 2}" y="1" width="{rank}" height="{SIDE}"/>
<text x="{x}" y="150"><tspan class="name">B</tspan>&#160; trained</text>
<text x="{x + 46}" y="{SIDE / 2 + 5}" class="sign">×</text>
<rect class="trained a" x="{x + 62}" y="{SIDE / 2 + 1 - rank / 2}"
 width="{SIDE}" height="{rank}"/>
<text x="{x + 62 + SIDE / 2}" y="150"><tspan class="name">A</tspan>&#160; trained</text>
</svg>
<label hidden>Rank
<input type="range" min="0" max="{len(RANKS) - 1}" value="{RANKS.index(rank)}"
 data-ranks="{" ".join(map(str, RANKS))}" data-side="{SIDE}"></label>
<figcaption>A layer with {SIDE} inputs and {SIDE} outputs, to scale.
<span class="count">Rank <b>{rank}</b>: <b>{thin:,}</b> trained numbers beside
{SIDE**2:,} frozen ones, <b>{thin / SIDE**2:.1%}</b>.</span></figcaption>
</figure>"""


def contents():
    """The chapters by number, each with its first picture and what a reader learns."""
    items = ""
    for number, chapter in enumerate(register.chapters(), 1):
        notebook = nbformat.read(chapter.path, as_version=4)
        image = ""
        for cell in notebook.cells:
            if found := pictures(cell.get("outputs", ()), WIDE):
                tags = " ".join(cell.metadata.get("tags", ()))
                source = f"../_images/{name_of(found[0])}.png"
                image = f'<img class="{tags}" src="{source}" alt="">'
                break
        name = chapter.path.stem
        items += f"""<li>
<a class="picture" href="{name}.html" tabindex="-1" aria-hidden="true">{image}</a>
<a class="title" href="{name}.html"><b>{number}</b> {html.escape(chapter.title)}</a>
<p>You learn {html.escape(chapter.learn).replace("&#x27;", "’")}.</p>
<p class="how">{minutes(notebook)} min ·
<a href="{register.colab(chapter.path)}">Colab</a> ·
<a href="../_sources/book/{chapter.path.name}" download>notebook</a></p></li>
"""
    return f'<ol class="contents">\n{items}</ol>'


def name_of(picture):
    """What MyST-NB calls the file of a picture."""
    return hashlib.sha256(picture).hexdigest()


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
    """The latest day of a chapter's run, as `make run` writes it down."""
    notebooks = [nbformat.read(c.path, as_version=4) for c in register.chapters()]
    return date.fromisoformat(max(n.metadata["ran"] for n in notebooks))


def ran():
    return f"Chapters last run on {last_run():%-d %B %Y}"


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
    bibtex = f"""@misc{{deconstructing-lora,
  title   = {{{cite["title"]}}},
  author  = {{{{{authors}}}}},
  year    = {{{last_run().year}}},
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
<dd>{ran()}.
<details><summary>With these versions</summary><table class="versions">
<thead><tr><th>Package</th><th>Version</th></tr></thead>
<tbody>{rows}</tbody></table></details></dd>
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
    parts += filter(None, [paper(context["pathto"](PDF.name, 1))])
    context["theme_extra_footer"] = f'<p class="terms">{" · ".join(parts)}</p>'


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


def take_verdict(finding):
    """The verdict in a row's text, for a badge. The text keeps it inside a sentence."""
    bold = [n for n in finding if isinstance(n, nodes.strong)]
    strong = next(n for n in bold if n.astext().rstrip(".") in ledger.VERDICTS)
    verdict, at = strong.astext().rstrip("."), finding.index(strong)
    before = "".join(node.astext() for node in finding[:at])
    after = "".join(node.astext() for node in finding[at + 1 : at + 2])
    ends = strong.astext().endswith(".") or after.startswith((".", ":", ","))
    if not before.strip() and ends:
        sentence = after.lstrip(".:, ")
        finding[: at + 2] = [nodes.Text(sentence[:1].upper() + sentence[1:])]
    return verdict


def after_first_sentence(finding):
    """Take from the nodes what follows their first sentence, and return it."""
    for i, node in enumerate(finding):
        end = isinstance(node, nodes.Text) and re.search(r"[.](?= +\S)", node)
        if end:
            rest = [nodes.Text(node[end.end() :].lstrip()), *finding[i + 1 :]]
            finding[i:] = [nodes.Text(node[: end.end()])]
            return rest
    return []


def cell(*parts, **options):
    """A cell of a table with one paragraph of these nodes."""
    return nodes.entry("", nodes.paragraph("", "", *parts, **options))


def row_of(item, number, part):
    """A table row for one item of the list: the claim, its verdict, where, by what."""
    claim, *finding = item[0].children
    places, checks = [], []
    while is_tail(finding[-1]):
        node = finding.pop()
        if isinstance(node, nodes.literal):
            checks.insert(0, nodes.list_item("", nodes.paragraph("", "", node)))
        elif not isinstance(node, nodes.Text):
            places[:0] = [node, raw("<br>")]
    verdict = take_verdict(finding)

    rest = after_first_sentence(finding)
    said = cell(claim, classes=["claim"])
    said += nodes.paragraph("", "", *finding)
    if rest or checks:
        said += raw("<details><summary>In full, and what asserts it</summary>")
        said += nodes.paragraph("", "", *rest)
        said += [nodes.bullet_list("", *checks), raw("</details>")]
    anchor = nodes.reference("", str(number), refuri=f"#claim-{number}", internal=True)
    badge = nodes.strong("", verdict, classes=["verdict", ledger.key(verdict)])
    cells = [cell(anchor), said, cell(badge), cell(*places)]
    classes = [ledger.key(verdict), f"part-{part}"]
    return nodes.row("", *cells, ids=[f"claim-{number}"], classes=classes)


def table_of(items, part):
    """The table of a part, from the (number, item) of each of its claims."""
    titles = {"No.": 6, "Claim, and what came out": 58, "Verdict": 16, "Shown in": 20}
    group = nodes.tgroup("", cols=len(titles))
    group += [nodes.colspec("", colwidth=width) for width in titles.values()]
    group += nodes.thead("", nodes.row("", *(cell(nodes.Text(t)) for t in titles)))
    group += nodes.tbody("", *(row_of(item, n, part) for n, item in items))
    return nodes.table("", group, classes=["claims", "colwidths-given"])


def filters():
    """Links that show the claims of one verdict or one part; front.js follows them."""

    def links(name, choices):
        items = "".join(
            f'<li><a href="?{name}={value}" data-{name}="{value}"'
            f' class="{value}">{label} <span>{n}</span></a></li>'
            for value, label, n in choices
        )
        return f'<ul aria-label="{name.title()}">{items}</ul>'

    total = len(ledger.claims())
    verdicts = [(ledger.key(v), v, n) for v, n in ledger.tally().items()]
    parts = Counter(claim.part for claim in ledger.claims())
    parts = [(part, ledger.heading(part), n) for part, n in sorted(parts.items())]
    return (
        '<nav class="filters" aria-label="Filter the claims" hidden>'
        + links("verdict", [("all", "All", total), *verdicts])
        + links("part", [("all", "All parts", total), *parts])
        + '<p role="status"></p></nav>'
    )


def claims_table(app, doctree):
    """Turn the page's lists of claims into tables; the source stays a plain list."""
    if app.env.docname != CLAIMS:
        return
    part = {claim.number: claim.part for claim in ledger.claims()}
    for badge in doctree.findall(nodes.strong):
        # where the page says what they are; a row gets its own
        explains = badge.parent.parent.tagname == "section"
        if explains and badge.astext() in ledger.VERDICTS:
            badge["classes"] += ["verdict", ledger.key(badge.astext())]
    lists = list(doctree.findall(nodes.enumerated_list))
    page, first = lists[0].parent.parent, lists[0].parent
    page.insert(page.index(first), raw(filters()))
    for items in lists:
        number = items.get("start", 1)
        items.replace_self(table_of(enumerate(items.children, number), part[number]))


# What a page weighs -------------------------------------------------------------------


def size_of(picture):
    """Width and height in CSS pixels: those of a PNG's inches, where it states them.

    Of a figure, which does not, by what makes `plots.PAGE` as wide as a page's code.
    """
    data = picture.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    size, at = struct.unpack(">II", data[16:24]), data.find(b"pHYs")
    per_inch = struct.unpack(">I", data[at + 4 : at + 8])[0] * 0.0254 if at > 0 else 137
    return [round(n / per_inch * 96) for n in size]


def narrow_figures(app):
    """Beside each figure's file the one for a phone, for `lighter` to find."""
    for name in app.env.found_docs:
        path = Path(app.env.doc2path(name))
        cells = nbformat.read(path, 4).cells if path.suffix == ".ipynb" else ()
        for output in (o for cell in cells for o in cell.get("outputs", ())):
            if plots.NARROW in output.get("data", {}):
                wide, narrow = pictures([output])
                file = Path(app.outdir, "_images", f"{name_of(wide)}-narrow.png")
                file.write_bytes(narrow)


def lighter(text, folder):
    """A page that paints before scripts and pictures have come."""
    text = re.sub(r'\s*<script [^>]*src="[^"]*fontawesome\.js[^>]*></script>', "", text)
    if not re.search(r'class="[^"]*\bmath\b', text):
        text = re.sub(r"\s*<script [^>]*/mathjax/[^>]*></script>", "", text)
    sphinx = "searchtools|language_data|sphinx_highlight|searchindex"  # see search.js
    text = re.sub(rf'\s*<script [^>]*src="[^"]*({sphinx})\.js[^>]*></script>', "", text)
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
            narrow = file.with_stem(f"{file.stem}-narrow")
            if narrow.is_file() and 'alt=""' not in tag:  # none for a thumbnail
                width, height = size_of(narrow)
                address = source[1].replace(file.stem, narrow.stem)
                tag = (
                    f'<picture><source media="{PHONE}" srcset="{address}"'
                    f' width="{width}" height="{height}">{tag}</picture>'
                )
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


def fewer_colours(file):
    """Store a figure in 256 colours, where that takes fewer bytes."""
    with Image.open(file) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    data = io.BytesIO()
    small.save(data, "png")
    if data.tell() < file.stat().st_size:
        file.write_bytes(data.getvalue())


def lighten(app, exception):
    if exception or app.builder.name != "html":
        return
    out, used = Path(app.outdir), set()
    if paper(""):
        shutil.copy(PDF, out)
    narrow_figures(app)
    for figure in (out / "_images").glob("*.png"):
        fewer_colours(figure)
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
        ("contents-of-the-book", contents),
        ("verdicts", verdicts),
        ("terms", terms),
    ]:
        app.add_directive(name, directive(write))
    app.connect("doctree-read", claims_table)
    app.connect("html-page-context", footer, priority=900)
    app.connect("build-finished", lighten, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
