"""What the built pages need beyond the settings in _config.yml."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes

# MathJax from the package sphinx-mathjax-offline: what a page may ask for, 3 MB of 24.
MATHJAX = (
    "tex-chtml.js",
    "output/chtml/fonts/woff-v2/*.woff",
    "input/tex/extensions/*.js",
    "a11y/*.js",
    "sre/mathmaps/base.json",
    "sre/mathmaps/en.json",
)
REDIRECT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta http-equiv="Refresh" content="0; url={page}" />
<link rel="canonical" href="{base}{page}" />
<title>{title}</title>
{tags}
</head>
<body><p><a href="{page}">{title}</a></p></body>
</html>
"""


def drop_thebe(app, config):
    """Thebe is not in use, fails with a script error and names a foreign host."""
    for listeners in app.events.listeners.values():
        listeners[:] = [
            listener
            for listener in listeners
            if getattr(listener.handler, "__name__", "")
            not in ("init_thebe_core", "update_thebe_context")
        ]


def undated_pages_keep_their_source(app, env):
    """Without git's history a page has no date; the launch buttons need its source."""
    for name, dated in env.git_last_updated.items():
        env.git_last_updated[name] = dated or (None, True)


def no_formulas_in_descriptions(app, pagename, templatename, context, doctree):
    """The page is rendered; its description is made from the doctree after this."""
    for formula in list(doctree.findall(nodes.math_block)) if doctree else ():
        formula.parent.remove(formula)


def keep_root_tags(app, pagename, templatename, context, doctree):
    if pagename == app.config.root_doc:
        tags = re.findall("<meta [^>]*>", context.get("metatags", ""))
        app.root_tags = [tag for tag in tags if re.search("og:|twitter:|descr", tag)]


def copy_mathjax(app, exception):
    """A page loads nothing from elsewhere, so the book works offline too."""
    if exception or app.builder.format != "html":
        return
    source = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
    for pattern in MATHJAX:
        for file in source.glob(pattern):
            target = Path(app.outdir, "_static/mathjax", file.relative_to(source))
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def copy_static(app, exception):
    """Sphinx itself skips this when no page has changed."""
    if not exception:
        own = Path(app.confdir, app.config.html_static_path[0])
        shutil.copytree(own, Path(app.outdir, "_static"), dirs_exist_ok=True)


def write_root(app, exception):
    """The site's root leads to the first page, with that page's title and card."""
    if not exception and hasattr(app, "root_tags"):
        Path(app.outdir, "index.html").write_text(
            REDIRECT.format(
                page=app.config.root_doc + ".html",
                base=app.config.html_baseurl,
                title=app.config.html_title or app.config.project,
                tags="\n".join(app.root_tags),
            ),
            encoding="utf-8",
        )


def setup(app):
    app.connect("config-inited", drop_thebe)
    app.connect("env-updated", undated_pages_keep_their_source, priority=900)
    app.connect("html-page-context", no_formulas_in_descriptions, priority=400)
    app.connect("html-page-context", keep_root_tags, priority=900)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", copy_static)
    app.connect("build-finished", write_root, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
