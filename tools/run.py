"""`make sync` and `make run`: what of the chapters and pages is written by machine.

sync   listings from lora/, the tables of chapters, the exported pictures
run    the same, after executing the chapters and writing the bound numbers
"""

import json
import os
import re
import subprocess
import sys
from datetime import date

import nbformat
from nbclient import NotebookClient

from tools.kit import bound, ledger
from tools.kit.figures import pictures
from tools.kit.listings import package, sync
from tools.kit.notebooks import PLAIN
from tools.kit.register import BOOK, ROOT, chapters, colab, executed
from tools.kit.tolerance import drawn

# Kernels inherit it: no progress bars among the outputs, nothing from the network.
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

CHAPTERS = re.compile(r"(?<=<!-- chapters -->\n).*?(?=<!-- /chapters -->)", re.DOTALL)
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"


def client_of(notebook):
    """What executes a notebook's cells as a reader in `book/` would."""
    return NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(BOOK)}},
    )


def execute(notebook, wanted):
    """Run all cells in order in a fresh kernel, as a reader in `book/` would.

    Evaluates each cell's keys after the code cell above, and `wanted` at the end.
    """
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    client = client_of(notebook)
    with client.setup_kernel():
        for i, cell in enumerate(notebook.cells):
            client.execute_cell(cell, i, execution_count=None)
            values = bound.evaluate(client.kc, bound.local(cell))
            store(cell.metadata, values)
            show(cell, values)
            if tolerance := cell.metadata.get("tolerance"):
                cell.metadata["drawn"] = drawn(client.kc, tolerance)
        store(notebook.metadata, bound.evaluate(client.kc, wanted))
    notebook.metadata["ran"] = date.today().isoformat()  # the pages' footer says it
    # Kernels write their version here too, which would differ from machine to machine.
    notebook.metadata["language_info"] = {
        "name": "python",
        "pygments_lexer": "ipython3",
    }


def store(metadata, values):
    """Keep the values in the metadata of a cell or a notebook, or drop the entry."""
    metadata.pop("bound", None)
    if values:
        metadata["bound"] = values


def show(cell, values):
    """Write values into a cell's texts: prose, or caption and alternative text."""
    for what, text in bound.texts(cell).items():
        text = bound.write(text, values)
        plain = PLAIN.sub("", text)
        if cell.cell_type == "markdown":
            cell.source = text
            continue
        cell.metadata["book"][what] = text
        entry, field = ("image", "alt") if what == "alt" else ("figure", "caption")
        cell.metadata.setdefault("mystnb", {}).setdefault(entry, {})[field] = plain
        if what == "caption":
            cell.metadata["mystnb"][entry]["name"] = cell.metadata["book"]["name"]


def exports(notebook):
    """File name in `book/_static` -> PNG, of each figure that other pages show too."""
    for cell in notebook.cells:
        if "export" in cell.metadata:
            (png,) = pictures(cell.outputs, "image/png")
            yield f"{cell.metadata.export}.png", png


def tables():
    """Page -> its table of chapters, as the register has them."""
    readme = "| Chapter | You learn | Run it |\n|---|---|---|\n"
    for i, c in enumerate(chapters(), 1):
        readme += f"| [{i}. {c.title}](book/{c.path.name}) | {c.learn} "
        readme += f"| {BADGE}({colab(c.path)}) |\n"
    return {ROOT / "README.md": readme}


def written():
    """Path -> text of each page that is written, in part, by machine."""
    known = bound.known_values(executed())
    pages = {path: bound.write(text, known) for path, text in bound.outside().items()}
    for path, table in tables().items():
        pages[path] = CHAPTERS.sub(lambda _, t=table: f"\n{t}\n", pages[path])
    readme = ROOT / "README.md"
    pages[readme] = ledger.README.sub(lambda _: ledger.readme(), pages[readme])
    return pages | {ledger.PICTURE: ledger.picture()}


def main(command, *names):
    """`sync` or `run`; NAMES: notebooks, else all."""
    books = executed()
    names = names or tuple(books)
    if command == "run" and len(names) > 1:
        for name in names:  # each in its own process: a second kernel may hang
            again = [sys.executable, "-m", "tools.run", "run", name]
            subprocess.run(again, cwd=ROOT, check=True)
        return
    before = {name: json.dumps(notebook) for name, notebook in books.items()}
    for name in names:
        sync(books[name], package())
        if command == "run":
            print(f"{name} ...", flush=True)
            execute(books[name], bound.exported(name, books))
            # at once: it took minutes, and a later chapter may fail
            nbformat.write(books[name], BOOK / f"{name}.ipynb")
    known = bound.known_values(books)
    for name, notebook in books.items():
        for cell in notebook.cells:  # what comes from the literature and other chapters
            show(cell, known | cell.metadata.get("bound", {}))
        if json.dumps(notebook) != before[name]:
            nbformat.write(notebook, BOOK / f"{name}.ipynb")
            print(f"{name}.ipynb: written ({command})")
        for file, png in exports(notebook):
            (BOOK / "_static" / file).write_bytes(png)
    chapters.cache_clear()
    for path, text in written().items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"{path.name}: written ({command})")


if __name__ == "__main__":
    main(*sys.argv[1:])
