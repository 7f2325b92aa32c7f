"""`make sync` and `make run`: what of the chapters and pages is written by machine.

sync   listings from lora/, the tables of chapters, the exported pictures
run    the same, after executing the chapters and writing the bound numbers
"""

import json
import os
import re
import sys
from datetime import date

import nbformat
from nbclient import NotebookClient

from tools.kit import ledger
from tools.kit.bound import (
    evaluate,
    exported,
    known_values,
    local,
    outside,
    texts,
    write,
)
from tools.kit.figures import pictures
from tools.kit.listings import package, sync
from tools.kit.register import BOOK, ROOT, chapters, colab
from tools.kit.tolerance import drawn

# Kernels inherit it: no progress bars among the outputs, nothing from the network.
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

PLAIN = re.compile(r"<!-- [^\n]*? -->")


def run(notebook, wanted):
    """Execute all cells in order in a fresh kernel, as a reader in `book/` would.

    Evaluates each cell's keys after the code cell above, and `wanted` at the end.
    """
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(BOOK)}},
    )
    with client.setup_kernel():
        for i, cell in enumerate(notebook.cells):
            client.execute_cell(cell, i, execution_count=None)
            bind(cell, evaluate(client.kc, local(cell)))
            if tolerance := cell.metadata.get("tolerance"):
                cell.metadata["drawn"] = drawn(client.kc, tolerance)
        store(notebook.metadata, evaluate(client.kc, wanted))
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


def bind(cell, values):
    """Store a cell's values and write them into its texts."""
    store(cell.metadata, values)
    show(cell, values)


def show(cell, values):
    """Write values into a cell's texts: prose, or caption and alternative text."""
    for what, text in texts(cell).items():
        text = write(text, values)
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
            (png,) = pictures(cell.outputs)
            yield f"{cell.metadata.export}.png", png


def tables():
    """Page -> its table of chapters, as the register has them."""
    readme = "| Chapter | You learn | Run it |\n|---|---|---|\n"
    index = "| Chapter | You learn | Time |\n|---|---|---|\n"
    badge = (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    )
    for i, c in enumerate(chapters(), 1):
        page = c.path.stem
        readme += f"| [{i}. {c.title}](book/{page}.ipynb) | {c.learn} "
        readme += f"| {badge}({colab(c)}) |\n"
        index += f"| []({page})<br>[Colab]({colab(c)}), "
        index += f"{{download}}`file <{page}.ipynb>` | {c.learn} | {minutes(c)} min |\n"
    return {ROOT / "README.md": readme, BOOK / "index.md": index}


def minutes(chapter):
    """Time to read: 200 words a minute, 3 seconds for a line of code, to 5 minutes."""
    words = lines = 0
    for cell in nbformat.read(chapter.path, as_version=4).cells:
        if cell.cell_type == "markdown":
            words += len(PLAIN.sub("", cell.source).split())
        elif not {"hide-input", "hide-cell"} & set(cell.metadata.get("tags", [])):
            shown = [cell.source] + [o.get("text", "") for o in cell.outputs]
            lines += sum(len(text.splitlines()) for text in shown)
    return 5 * round((words / 200 + lines / 20) / 5)


def written():
    """Path -> text of each page that is written, in part, by machine."""
    notebooks = {c.path.stem: nbformat.read(c.path, as_version=4) for c in chapters()}
    known = known_values(notebooks)
    done = {path: write(text, known) for path, text in outside().items()}
    for path, table in tables().items():
        block = r"(?<=<!-- chapters -->\n).*?(?=<!-- /chapters -->)"
        done[path] = re.sub(
            block, lambda _, t=table: f"\n{t}\n", done[path], flags=re.DOTALL
        )
    counts, readme = ledger.tally(), ROOT / "README.md"
    done[readme] = ledger.README.sub(lambda _: ledger.readme(counts), done[readme])
    done[ledger.PICTURE] = ledger.picture(counts)
    return done


def main(command, *names):
    """`sync` or `run`; NAMES: chapters, else all."""
    notebooks = {c.path.stem: nbformat.read(c.path, as_version=4) for c in chapters()}
    before = {name: json.dumps(notebook) for name, notebook in notebooks.items()}
    selected = {
        name: nb for name, nb in notebooks.items() if not names or name in names
    }
    for name, notebook in selected.items():
        sync(notebook, package())
        if command == "run":
            print(f"{name} ...", flush=True)
            run(notebook, exported(name, notebooks))
            # at once: it took minutes, and a later chapter may fail
            nbformat.write(notebook, BOOK / f"{name}.ipynb")
    for name, notebook in notebooks.items():
        for cell in notebook.cells:  # what comes from the literature and other chapters
            show(cell, known_values(notebooks) | cell.metadata.get("bound", {}))
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
