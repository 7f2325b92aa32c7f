"""The whole book as one page, which tools/pdf.py prints: Sphinx's builder `singlehtml`.

It puts the chapters into the first page's section, and makes of each link to a section
its bare anchor, which several chapters may have (`#exercises`).
"""

import re

from docutils import nodes
from sphinx.addnodes import start_of_file


def load_mathjax(app):
    if app.builder.name == "singlehtml":
        app.set_html_assets_policy("always")  # the first page has no formula


def one_page(app, doctree, docname):
    """Each page becomes a part of its own, each link to a section finds its page."""
    for page in list(doctree.findall(start_of_file)):
        page.parent.remove(page)
        doctree += page
        own = {section["ids"][0]: section for section in page.findall(nodes.section)}
        for name, section in own.items():
            section["ids"].append(f"{page['docname']}--{name}")
        for link in page.findall(nodes.reference):
            name = link.get("refid") or link.get("refuri", "").removeprefix("#")
            if name in own:
                link.attributes.pop("refid", None)
                link["refuri"] = f"#{page['docname']}--{name}"
    sections = {name for s in doctree.findall(nodes.section) for name in s["ids"]}
    for link in doctree.findall(nodes.reference):
        if match := re.fullmatch("#document-(.*)#(.*)", link.get("refuri", "")):
            own, anchor = "--".join(match.groups()), match[2]
            link["refuri"] = f"#{own if own in sections else anchor}"


def setup(app):
    app.connect("builder-inited", load_mathjax)
    app.connect("doctree-resolved", one_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
