"""How a notebook's cells look: labels of folds, captions, tables, no comments."""

import html
import re

from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode
from sphinx.domains.math import MathDomain
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
TITLE = re.compile(r"# @title (.*)\n*")
ANCHOR = re.compile(r'<a id="(eq-[\w-]+)"></a>')
DATAFRAME = re.compile(r'<table border="1" class="dataframe">.*</table>', re.DOTALL)
LONG = re.compile(r"(?<=<th>)[a-z][\w.*=]{15,}(?=</th>)")  # a name in code
FRAME = '<div class="table-frame" role="region" tabindex="0" aria-label="{}">'
logger = logging.getLogger(__name__)


class TableFigure(nodes.figure):
    """A captioned output that is a table: "Table 1.2", not "Figure 1.2"."""


class Cells(SphinxTransform):
    """Before Sphinx gives numbers (priority 210) and MyST resolves links (879)."""

    default_priority = 205

    def apply(self):
        self.drop_comments()
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
            text = table[0].replace(' border="1"', "")
            text = text.replace("<th></th>", "<td></td>")  # it heads nothing
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


def visit_fold(self, node):
    label = self.encode(node["prompt_show"])
    self.body.append(f'<details class="hide"><summary>{label}</summary>\n')


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


def frame_markdown_tables(app, pagename, templatename, context, doctree):
    """Tables written in Markdown scroll as DataFrames do."""
    parts = context.get("body", "").split(
        '<div class="pst-scrollable-table-container">'
    )
    for i in range(1, len(parts)):
        parts[i] = FRAME.format(f"Unnumbered table {i}") + parts[i]
    context["body"] = "".join(parts)


def setup(app):
    app.add_transform(Cells)
    app.add_enumerable_node(TableFigure, "table", html=(visit_table, depart_table))
    app.add_node(HideCodeCellNode, override=True, html=(visit_fold, depart_fold))
    app.connect("env-get-updated", number_chapters_only, priority=900)
    app.connect("html-page-context", frame_markdown_tables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
