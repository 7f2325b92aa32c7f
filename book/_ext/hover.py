"""What the pages show on hover and focus: terms, papers and other chapters.

The first occurrence of each glossary term in a chapter becomes a link. After the build
the texts stand in one file, `_static/hover-texts.js`, which hover.js loads when a
pointer or the focus first rests on a link: no page is heavier for it.
"""

import copy
import json
import re
from pathlib import Path

from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.addnodes import start_of_file
from sphinx.util.nodes import make_refnode

# Prose in which a term may become a link.
TEXT = (nodes.paragraph, nodes.strong, nodes.emphasis)
# "To rank" is something else, and so is a reciprocal rank.
OTHER_SENSE = r"(?<!reciprocal )(?<!\bto )(?<!\bwe )(?<!\bcan )"


def link_terms(app, doctree, docname):
    """Chapters are plain Markdown, so that no role can mark a term in them."""
    parts = {part["docname"]: part for part in doctree.findall(start_of_file)}
    for name, part in (parts or {docname: doctree}).items():
        if str(app.env.doc2path(name)).endswith(".ipynb"):
            link_terms_of(app, part, name)


def link_terms_of(app, doctree, docname):
    objects = app.env.get_domain("std").objects
    terms = {name: at for (kind, name), at in objects.items() if kind == "term"}
    for text in list(doctree.findall(nodes.Text)):
        if not terms or not isinstance(text.parent, TEXT):
            continue
        words = "|".join(re.escape(term) for term in sorted(terms, key=len)[::-1])
        # Not in the plural: "ranks" may be a verb, and a model has other "blocks".
        pattern = rf"(?<![\w-])({words})(?![\w-])"
        pattern = re.sub(r"(?<=[|(])rank(?=[|)])", OTHER_SENSE + "rank", pattern)
        found = re.search(pattern, text, re.IGNORECASE)
        if found and in_prose(text):
            known = {term.lower(): term for term in terms}
            page, anchor = terms.pop(known[found[1].lower()])
            link = make_refnode(
                app.builder, docname, page, anchor, nodes.inline("", found[0])
            )
            link["classes"].append("term")
            before, after = text[: found.start()], text[found.end() :]
            parts = [nodes.Text(before), link, nodes.Text(after)]
            text.parent.replace(text, [part for part in parts if part.astext()])


def in_prose(node):
    """Directly in a section, a list or a quotation: not in a link, title or caption."""
    while not isinstance(node, nodes.section | nodes.document):
        if isinstance(node, nodes.reference | nodes.figure | nodes.table):
            return False
        node = node.parent
    return True


def text_of(*tags):
    """The HTML of some tags, without their links and anchors."""
    html = []
    for tag in map(copy.copy, tags):
        for anchor in tag.select(".headerlink"):
            anchor.decompose()
        for link in tag.select("a"):
            link.unwrap()
        for marked in tag.select("[id]"):
            del marked["id"]
        html.append(tag.decode_contents().strip())
    return html


def write_texts(app, exception):
    """The texts by address: relative to the site's root, or a paper's own address."""
    if exception or app.builder.name != "html":
        return
    texts = {}
    for docname in app.env.found_docs:
        uri = app.builder.get_target_uri(docname)
        page = BeautifulSoup(Path(app.outdir, uri).read_bytes(), "html.parser")
        for section in page.select("article section[id]"):
            title = section.find(["h1", "h2", "h3"], recursive=False)
            first = section.find("p", recursive=False)
            if title and first:
                title, first = text_of(title, first)
                text = f"<strong>{title}</strong><p>{first}</p>"
                texts[f"{uri}#{section['id']}"] = text
                if section.parent.name != "section":
                    texts[uri] = text
        for term in page.select("dl.glossary dt[id]"):
            name, text = text_of(term, term.find_next_sibling("dd"))
            texts[f"{uri}#{term['id']}"] = f"<strong>{name}</strong>{text}"
        for entry in page.select("[role=doc-biblioentry]"):
            for link in entry.select("a.external"):
                texts[link["href"]] = text_of(entry.p)[0]
    file = Path(app.outdir, "_static", "hover-texts.js")
    file.write_text(f"window.hoverTexts = {json.dumps(texts)};\n", encoding="utf-8")


def setup(app):
    app.connect("doctree-resolved", link_terms)
    app.connect("build-finished", write_texts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
