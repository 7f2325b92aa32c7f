"""Listing cells are the package's source, letter for letter. `make sync` rewrites them.

A cell tagged `listing` holds whole top-level definitions of its chapter's module. Which
ones is read from the cell itself: every line that begins with `def NAME` or `class
NAME`.
"""

import ast
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    "01-intrinsic-rank": "rank",
    "02-implementation": "core",
    "03-experiment": "moons",
}
CHAPTERS = {
    path: ROOT / "lora" / f"{MODULES[path.stem]}.py"
    for path in sorted((ROOT / "book").glob("*.ipynb"))
}


def definitions(source):
    """Name -> text of each top-level function or class, decorators included."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def listing_cells(notebook):
    """(index, cell, names defined in it) of each cell tagged `listing`."""
    for i, cell in enumerate(notebook.cells):
        if "listing" in cell.metadata.get("tags", []):
            yield (
                i,
                cell,
                re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE),
            )


def sync(notebook, source):
    """Put the definitions from `source` into the notebook's listing cells, in place."""
    known = definitions(source)
    for i, cell, names in listing_cells(notebook):
        missing = [name for name in names if name not in known]
        if missing or not names:
            raise ValueError(
                f"listing cell {i} defines {names}, not in the module: {missing}"
            )
        cell.source = "\n\n\n".join(known[name] for name in names)


def drift(notebook, source):
    """A sentence for each listing that is not the module's, letter for letter."""
    known, listed = definitions(source), []
    for i, cell, names in listing_cells(notebook):
        listed += names
        if cell.source != "\n\n\n".join(known.get(name, "") for name in names):
            yield (
                f"cell {i}: the listing of {', '.join(names) or 'nothing'} differs "
                "from the module. Edit the module, then call `make sync`"
            )
    for name in {*listed, *known}:
        if not listed.count(name) == 1 == (name in known):
            yield f"{name} must be listed once, in a cell tagged `listing`"


def run(notebook):
    """Execute all cells in order in a fresh kernel, as a reader in `book/` would."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT / "book")}},
    ).execute()
    # Kernels write their version here too, which would differ from machine to machine.
    notebook.metadata["language_info"] = {
        "name": "python",
        "pygments_lexer": "ipython3",
    }


def main(command, *names):
    """`sync` rewrites the listings; `run` executes too. NAMES: chapters, else all."""
    for path, module in CHAPTERS.items():
        if names and path.stem not in names:
            continue
        notebook = nbformat.read(path, as_version=4)
        before = nbformat.writes(notebook)
        sync(notebook, module.read_text())
        if command == "run":
            run(notebook)
        if nbformat.writes(notebook) != before:
            nbformat.write(notebook, path)
            print(f"{path.name}: written ({command})")


if __name__ == "__main__":
    main(*sys.argv[1:])
