"""What the search knows: the text of each section, and words that mean the same.

`search.js` loads the file that is written here, `_static/sections.js`, when somebody
searches, and ranks. `tests/book/searches.csv` lists what people type and must find.
"""

import json
import re
from pathlib import Path

from bs4 import BeautifulSoup

# The reader's word -> the book's words. Stems, as `search.js` cuts them.
SYNONYMS = {
    "accelerator": ["gpu"],
    "alpha": ["α"],
    "amp": ["bfloat16", "precision"],
    "checkpoint": ["save", "file"],
    "combin": ["sum", "add", "merge"],
    "comput": ["operations"],
    "dataset": ["examples", "pairs"],
    "deploy": ["merge", "serve"],
    "doubl": ["twice"],
    "fit": ["gb", "memory"],
    "forget": ["lost", "keeps"],
    "hyperparameter": ["rate", "scale"],
    "initialization": ["start", "kaiming"],
    "initializ": ["start", "kaiming"],
    "latency": ["operations", "time"],
    "load": ["read", "file"],
    "lr": ["rate"],
    "memory": ["gb", "bytes"],
    "mix": ["mixed", "precision"],
    "module": ["layers", "target"],
    "multi": ["many", "several"],
    "ollama": ["llama"],
    "overfitting": ["overfit"],
    "overhead": ["operations"],
    "parallel": ["ddp"],
    "precision": ["bfloat16", "half"],
    "qlora": ["nf4", "four"],
    "resum": ["optimizer", "save", "knows"],
    "remov": ["unmerge", "undo", "off"],
    "rslora": ["root", "scale"],
    "speed": ["time", "operations"],
    "stop": ["end"],
    "switch": ["set", "adapters"],
    "tip": ["rule", "keep"],
    "vram": ["gb", "memory"],
    "zero": ["0"],
    "α": ["alpha"],
}
STOP = "a an and are can do does for how i in is it many much my need of on or should "
STOP += "that the to use what with you your"
TEX = re.compile(r"\\[()\[\]]|\\[a-zA-Z]+|[{}$\\]")
NAMES = re.compile(r"\b[a-z]\w*_\w+|\b[A-Z]\w+[A-Z]\w*")


def sections(page, uri):
    """Of each section the address, titles, names in code and what is read in it."""
    for tag in page.select("article .headerlink, article script, article style"):
        tag.decompose()
    page_title = page.select_one("article h1").get_text()
    for part in reversed(page.select("article section[id]")):  # the inner ones first
        title = part.find(["h1", "h2", "h3"], recursive=False)
        if not title:
            continue
        code = " ".join(tag.get_text() for tag in part.select("pre, code"))
        heading = title.get_text()
        for tag in [title, *part.select("details.hide, pre")]:
            tag.decompose()
        text = part.get_text(" ").replace(r"\alpha", "α")
        yield {
            "url": f"{uri}#{part['id']}",
            "page": page_title,
            "title": heading,
            "names": " ".join(dict.fromkeys(NAMES.findall(code))),
            "text": " ".join(TEX.sub("", text).split()),
        }
        part.extract()


def write_sections(app, exception):
    if exception or app.builder.name != "html":
        return
    found = []
    for docname in app.env.found_docs:
        uri = app.builder.get_target_uri(docname)
        page = BeautifulSoup(Path(app.outdir, uri).read_bytes(), "html.parser")
        found += reversed(list(sections(page, uri)))
    data = {"synonyms": SYNONYMS, "stop": STOP.split(), "sections": found}
    file = Path(app.outdir, "_static", "sections.js")
    text = json.dumps(data, ensure_ascii=False)
    file.write_text(f"window.bookSections = {text};\n", encoding="utf-8")


def setup(app):
    app.connect("build-finished", write_sections, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
