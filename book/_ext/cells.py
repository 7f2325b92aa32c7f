"""How a notebook's cells look: folds, captions, tables, notes, no comments."""

import html
import re
from itertools import groupby

from bs4 import BeautifulSoup
from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode, HideInputCells
from sphinx.domains.math import MathDomain
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
TITLE = re.compile(r"# @title (.*)\n*")
ANCHOR = re.compile(r'<a id="(eq-[\w-]+)"></a>')
DATAFRAME = re.compile(r'<table border="1" class="dataframe">.*</table>', re.DOTALL)
LONG = re.compile(r"(?<=>)[a-z][\w.*=]{15,}(?=</th>)")  # a name in code
MINUS = re.compile(r"(?<![\w)\].-])-(?=\.?\d)")
THOUSANDS = re.compile(r"(?<![\d.,])\d{4,}")
NUMBER = re.compile(r"[<≈]?\s*[+−±]?\.?\d[^A-Za-z→]*\s?[A-Za-z]{0,3}|nan|[-–—]?")
POINT = re.compile(
    r'(<span class="math notranslate nohighlight">[^<]*</span>)([,.;:!?)]+)'
)
PLAIN = re.compile(r'<code[^>]*><span class="pre">([−+]?[\d.,]+)</span></code>')
SHORT = re.compile(r'(<span class="pre)(">[^<]{1,16}</span>)')
NOTE = re.compile(r"<details>(?=\s*<summary>Fine print</summary>)")
RULE = "Rule to keep."
FRAME = '<div class="table-frame" role="region" tabindex="0" aria-label="{}">'
# In the dark, figures' white becomes the page's #121212, black becomes white, and each
# colour of lora/study/plots.py keeps its hue: least squares, as inverting turns orange
# into brown.
DARK = """<svg width="0" height="0" style="position: absolute" aria-hidden="true">
<filter id="dark" color-interpolation-filters="sRGB"><feColorMatrix values="
.32 -.75 -.46 0 .96  -.66 .22 -.42 0 .93  -.55 -.9 .56 0 .96  0 0 0 1 0"/></filter>
</svg>"""
logger = logging.getLogger(__name__)


class TableFigure(nodes.figure):
    """A captioned output that is a table: "Table 1.2", not "Figure 1.2"."""


class Cells(SphinxTransform):
    """Before Sphinx gives numbers (priority 210) and MyST resolves links (879)."""

    default_priority = 205

    def apply(self):
        self.drop_comments()
        self.mark_notes()
        self.label_folds()
        self.number_equations()
        self.frame_tables()
        self.announce_targets()

    def drop_comments(self):
        """The comments that bind numbers to values are for the tools alone."""
        for raw in list(self.document.findall(nodes.raw)):
            text = COMMENT.sub("", raw.astext())
            if not text.strip():
                raw.parent.remove(raw)
            elif text != raw.astext():
                raw.replace_self(nodes.raw("", text, format=raw["format"]))

    def mark_notes(self):
        """Fine print and rules to keep get a class; their source is plain Markdown."""
        for raw in list(self.document.findall(nodes.raw)):
            if NOTE.search(raw.astext()):
                text = NOTE.sub('<details class="note">', raw.astext())
                raw.replace_self(nodes.raw("", text, format=raw["format"]))
        for quote in self.document.findall(nodes.block_quote):
            first = next(quote.findall(nodes.strong), None)
            if first and first.astext() == RULE:
                quote["classes"].append("rule")

    def label_folds(self):
        """A fold's label is the cell's first line, `# @title LABEL`, as on Colab."""
        for cell in self.document.findall(nodes.container):
            if not cell.get("hide_mode"):
                continue
            label = "Code"
            code = next(cell.findall(nodes.literal_block), None)
            if code and (title := TITLE.match(code.astext())):
                label = title[1].strip()
                code.rawsource = code.astext()[title.end() :]
                code.children = [nodes.Text(code.rawsource)]
            cell["prompt_show"] = cell["prompt_hide"] = label
            if label.startswith("Solution"):
                cell["classes"].append("solution")  # is printed, other folds are not

    def number_equations(self):
        """An equation after an anchor, `<a id="eq-NAME"></a>`, has a number."""
        domain: MathDomain = self.env.get_domain("math")
        for paragraph in list(self.document.findall(nodes.paragraph)):
            raws = [child for child in paragraph if isinstance(child, nodes.raw)]
            anchor = ANCHOR.search("".join(raw.astext() for raw in raws))
            if not anchor:
                continue
            equation = paragraph.next_node(descend=False, siblings=True)
            if not isinstance(equation, nodes.math_block) or len(raws) < len(paragraph):
                logger.warning(
                    "%s is not in a paragraph of its own before an equation", anchor[0]
                )
                continue
            equation["names"], equation["label"] = [anchor[1]], anchor[1]
            self.document.note_explicit_target(equation)
            domain.note_equation(self.env.docname, anchor[1], location=equation)
            equation["number"] = domain.get_equation_number_for(anchor[1])
            equation["docname"] = self.env.docname
            paragraph.parent.remove(paragraph)

    def frame_tables(self):
        """A DataFrame scrolls in a frame of its own, which the keyboard reaches."""
        for number, raw in enumerate(list(self.document.findall(nodes.raw)), 1):
            if not (table := DATAFRAME.search(raw.astext())):
                continue
            figure, name = raw.parent, f"Table {number} of this page"
            while figure and not isinstance(figure, nodes.figure):
                figure = figure.parent
            if figure:
                figure.__class__ = TableFigure  # in place: its name is registered
                figure["classes"].append("table-figure")
                captions = figure.findall(nodes.caption)
                name = next((caption.astext() for caption in captions), name)
            text = tidy(BeautifulSoup(table[0], "html.parser").table)
            text = LONG.sub(lambda name: re.sub("([._=])", r"\1<wbr>", name[0]), text)
            text = FRAME.format(html.escape(name)) + text + "</div>"
            raw.replace_self(nodes.raw("", text, format="html"))

    def announce_targets(self):
        """Links from other pages, `[](page.ipynb#fig-name)`, know headings alone."""
        slugs = self.env.metadata[self.env.docname].setdefault("myst_slugs", {})
        for node in self.document.findall(nodes.Element):
            if isinstance(node, nodes.figure | nodes.math_block) and node["ids"]:
                captions = node.findall(nodes.caption)
                text = next((caption.astext() for caption in captions), "equation")
                for name in node["names"]:
                    slugs[name] = (node.line, node["ids"][0], text)


def tidy(table):
    """The HTML of a DataFrame: one header, text left, numbers right, one minus sign."""
    del table["border"]
    head, rows = table.thead.find_all("tr"), table.tbody.find_all("tr")
    if len(head) == 2 and not any(t.get_text() for t in head[1].find_all("th")[1:]):
        head[0].th.string = head[1].th.get_text()  # the index has a name
        head.pop().extract()
    for text in table.find_all(string=MINUS):
        text.replace_with(MINUS.sub("−", text))
    for tag in table.find_all(style=True):
        del tag["style"]
    for column in zip(*(row.find_all(["th", "td"]) for row in [*head, *rows])):
        cells = [c for c in column[len(head) :] if c.name == "td"]
        if cells and all(NUMBER.fullmatch(c.get_text().strip()) for c in cells):
            for cell in column:
                cell["class"] = "number"
            for cell in filter(lambda cell: cell.string, cells):
                cell.string = THOUSANDS.sub(lambda n: f"{int(n[0]):,}", cell.string)
    first = [row.find(["th", "td"]).get_text() for row in rows]
    if max(map(len, " ".join(first).split()), default=0) < 26:
        table["class"] = [*table["class"], "words"]  # none is broken on a phone
    if max(map(len, first), default=0) > 20:
        table["class"] = [*table["class"], "sentences"]
    for cell in table.thead.find_all("th"):
        if not cell.get_text():
            cell.name = "td"  # it heads nothing
    return str(table)


def is_fold(node):
    """A folded cell, other than a solution, which stands by itself."""
    return node.get("hide_mode") and "solution" not in node["classes"]


class Rows(SphinxPostTransform):
    """Folds that follow each other are one row, under the output that they made."""

    default_priority = HideInputCells.default_priority + 1
    formats = ("html",)

    def run(self):
        cells = filter(is_fold, self.document.findall(nodes.container))
        for parent in {id(cell.parent): cell.parent for cell in cells}.values():
            for folded, run in groupby(
                list(parent), lambda n: isinstance(n, nodes.container) and is_fold(n)
            ):
                if folded:
                    self.gather(list(run))

    def gather(self, run):
        """The folds of a run of cells, under its first output or what comes after."""
        row, home = nodes.container(classes=["made"]), None
        for cell in run:
            folds = [node for node in cell if isinstance(node, HideCodeCellNode)]
            for fold in folds:
                cell.remove(fold)
                fold["classes"] = cell["classes"][1:]  # not `cell`
            if cell.children and home:  # another output has another row
                row, home = nodes.container(classes=["made"]), None
            row += folds
            if cell.children:
                cell += row
                home = cell
        if not home:
            run[-1] += row
        for cell in run:
            if not cell.children:
                cell.parent.remove(cell)


def visit_fold(self, node):
    label, classes = self.encode(node["prompt_show"]), " ".join(node["classes"])
    self.body.append(f'<details class="hide {classes}"><summary>{label}</summary>\n')


def depart_fold(self, node):
    self.body.append("</details>\n")


def visit_table(self, node):
    self.visit_figure(node)


def depart_table(self, node):
    self.body[-5:] = [
        part.replace("Link to this image", "Link to this table")
        for part in self.body[-5:]
    ]
    self.depart_figure(node)


def number_chapters_only(app, env):
    """Figures of pages that are no chapter have captions without a number."""
    for page in env.toc_fignumbers.keys() - {
        p for p, n in env.toc_secnumbers.items() if n
    }:
        env.toc_fignumbers[page] = {}
    return []


def finish_body(app, pagename, templatename, context, doctree):
    """Tables written in Markdown scroll as DataFrames do; figures know the dark.

    A formula keeps the point after it on its line, and short code is not broken. A
    number is set as one, also where its source is code.
    """
    body = POINT.sub(r'<span class="nowrap">\1\2</span>', context.get("body", ""))
    body = SHORT.sub(r"\1 nowrap\2", PLAIN.sub(r"\1", body))
    parts = body.split('<div class="pst-scrollable-table-container">')
    for i in range(1, len(parts)):
        parts[i] = FRAME.format(f"Unnumbered table {i}") + parts[i]
    context["body"] = "".join([*parts, DARK])


def setup(app):
    app.add_transform(Cells)
    app.add_post_transform(Rows)
    app.add_enumerable_node(TableFigure, "table", html=(visit_table, depart_table))
    app.add_node(HideCodeCellNode, override=True, html=(visit_fold, depart_fold))
    app.connect("env-get-updated", number_chapters_only, priority=900)
    app.connect("html-page-context", finish_body)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
