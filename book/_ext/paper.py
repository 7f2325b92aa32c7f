"""The whole book as one page, which tools/pdf.py prints: Sphinx's builder `singlehtml`.

It puts the chapters into the first page's section, and makes of each link to a section
its bare anchor, which several chapters may have (`#exercises`).
"""

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
        for section in page.findall(nodes.section):
            section["ids"].append(f"{page['docname']}--{section['ids'][0]}")
    sections = {name for s in doctree.findall(nodes.section) for name in s["ids"]}
    for link in doctree.findall(nodes.reference):
        page, _, anchor = (
            link.get("refuri", "").removeprefix("#document-").partition("#")
        )
        if page and anchor and app.builder.name == "singlehtml":
            own = f"{page}--{anchor}"
            link["refuri"] = f"#{own if own in sections else anchor}"


def setup(app):
    app.connect("builder-inited", load_mathjax)
    app.connect("doctree-resolved", one_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
