"""The one register of chapters: `_toc.yml` lists the pages, a notebook says the rest.

A chapter's metadata hold `book`: the modules of lora/ that it builds, a word by which
the site's search must find it, and what a reader learns. Other lists come from here.
"""

import re
from collections import namedtuple
from functools import cache
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
REPOSITORY = CONFIG["repository"]["url"]
BRANCH = CONFIG["repository"]["branch"]
BASE = CONFIG["html"]["baseurl"]
PDF = ROOT / "_build" / "deconstructing-lora.pdf"  # by `make pdf`
COLAB = REPOSITORY.replace("github.com", "colab.research.google.com/github")

Chapter = namedtuple("Chapter", "path title modules search learn")


def pages():
    """The pages of the book in order, without a suffix: `book/index`, ..."""
    parts = TOC.get("parts", [TOC])
    return [TOC["root"], *(c["file"] for part in parts for c in part["chapters"])]


def executed():
    """Name -> notebook of each page that is one, read anew."""
    paths = [ROOT / f"{page}.ipynb" for page in pages()]
    return {p.stem: nbformat.read(p, as_version=4) for p in paths if p.exists()}


@cache
def chapters():
    """The chapters in order: the notebooks whose metadata say what they teach."""
    listed = []
    for name, notebook in executed().items():
        if "book" in notebook.metadata:
            title = re.match("# (.*)", notebook.cells[0].source)[1]
            path = BOOK / f"{name}.ipynb"
            listed.append(Chapter(path, title, **notebook.metadata["book"]))
    return listed


def notebooks():
    """Name -> notebook of each chapter, read anew."""
    names = [chapter.path.stem for chapter in chapters()]
    return {name: book for name, book in executed().items() if name in names}


def last_change():
    """When a source of the pages was last changed, as a file's time stamp."""
    files = [ROOT / "_config.yml", ROOT / "_toc.yml", *BOOK.rglob("*.*")]
    return max(f.stat().st_mtime for f in files if f.suffix != ".pyc")


def sources():
    """Name ("core", "study.moons") of each module of lora/ -> its file."""
    package = ROOT / "lora"
    files = sorted(package.rglob("[!_]*.py"))
    return {".".join(f.relative_to(package).with_suffix("").parts): f for f in files}


def colab(path):
    """The address that opens a notebook on Colab."""
    return f"{COLAB}/blob/{BRANCH}/book/{path.name}"
