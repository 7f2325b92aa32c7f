"""Listing cells are the package's source, letter for letter. `make sync` rewrites them.

A cell tagged `listing` holds whole top-level definitions of the package. Which ones is
read from the cell itself: every line that begins with `def NAME` or `class NAME`.
"""

import ast
import re
from collections import ChainMap

from tools.kit.register import sources


def definitions(source):
    """Name -> text of each top-level function or class, decorators included."""
    lines = source.splitlines()
    texts = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            texts[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return texts


def package():
    """Module -> its definitions, of the whole package."""
    return {name: definitions(file.read_text()) for name, file in sources().items()}


def listing_cells(notebook):
    """(index, cell, names defined in it) of each cell tagged `listing`."""
    for i, cell in enumerate(notebook.cells):
        if "listing" in cell.metadata.get("tags", []):
            names = re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE)
            yield i, cell, names


def title(cell):
    """The label of a folded listing, such as guards: its first line, or nothing."""
    return re.match(r"(# @title .*\n)?", cell.source)[0]


def sync(notebook, modules):
    """Put the package's definitions into the notebook's listing cells, in place."""
    known = dict(ChainMap(*modules.values()))
    for i, cell, names in listing_cells(notebook):
        missing = [name for name in names if name not in known]
        if missing or not names:
            raise ValueError(
                f"listing cell {i} defines {names}, not in the package: {missing}"
            )
        cell.source = title(cell) + "\n\n\n".join(known[name] for name in names)


def drift(notebook, modules, owned):
    """A sentence for each listing that is not the package's, letter for letter.

    Nothing is listed twice, and of each module in `owned` the chapter lists something.
    """
    known = dict(ChainMap(*modules.values()))
    listed = []
    for i, cell, names in listing_cells(notebook):
        listed += names
        code = "\n\n\n".join(known.get(name, "") for name in names)
        if cell.source != title(cell) + code:
            yield (
                f"cell {i}: the listing of {', '.join(names) or 'nothing'} differs "
                "from the package. Edit lora/, then call `make sync`"
            )
    for name in dict.fromkeys(listed):
        if not listed.count(name) == 1 == (name in known):
            yield f"{name} is listed twice, or is not in the package"
    for module in owned:
        if not modules[module].keys() & set(listed):
            yield f"nothing of {module} is listed, in a cell tagged `listing`"
