"""What every chapter's notebook has to satisfy before it is run."""

import base64
import hashlib
import re

LONGEST_CELL = 15  # lines with code; listings and hidden plotting code may be longer
MARKERS = ("nbval-skip", "nbval-check-output", "nbval-raises-exception")


def text(source):
    """The first words of a cell, to find it by."""
    return re.sub(r"\s+", " ", source).strip()[:60]


def faults(notebook):
    """A sentence for each fault of a chapter: where, what is wrong, how to mend it."""
    executed, alts, images = 0, {}, {}
    for i, cell in enumerate(notebook.cells):
        where = f"cell {i} ({text(cell.source)!r}): "
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "markdown":
            if re.search(r"^:{3,}|\{[a-z:-]+\}`", cell.source, re.MULTILINE):
                yield where + "a MyST role or directive, which Colab shows as source"
            continue

        executed += 1
        if cell.execution_count != executed:
            yield (
                f"{where}execution count {cell.execution_count} instead of {executed}. "
                "Execute all cells in order: make run"
            )
        for output in cell.outputs:
            if output.get("name") == "stderr" or output.output_type == "error":
                yield (
                    where + "a warning or an error is stored. Mend its cause: make run"
                )
        if tags & set(MARKERS) or re.search(r"#\s*NBVAL_", cell.source):
            yield where + "skips or weakens nbval. Let the cell run and be compared"
        if "nbval-ignore-output" in tags:
            if len(cell.metadata.get("nbval_reason", "")) < 20:
                yield where + "output ignored without a reason: set nbval_reason"
            if "assert " not in cell.source:
                yield where + "output ignored, and no assert beside it in the cell"

        hidden = tags & {"hide-input", "hide-cell"}
        jupyter = cell.metadata.get("jupyter", {})
        open_elsewhere = not jupyter.get("source_hidden") or (
            "hide-cell" in tags and not jupyter.get("outputs_hidden")
        )
        if hidden and (open_elsewhere or cell.metadata.get("cellView") != "form"):
            yield (
                where
                + "folded here, open in JupyterLab (source_hidden, outputs_hidden) "
                "or Colab (cellView: form)"
            )
        lines = len(cell.source.split("\n")) - cell.source.count("\n\n")
        shown = not hidden and "listing" not in tags
        if shown and lines > LONGEST_CELL and not cell.source.startswith("import "):
            yield f"{where}{lines} lines, {LONGEST_CELL} at most: cut it, hide plotting"
        if cell.source.startswith("# Solution") and "hide-cell" not in tags:
            yield where + "a solution that is not folded: tag it hide-cell"

        figures = [
            o.data["image/png"]
            for o in cell.outputs
            if "image/png" in o.get("data", {})
        ]
        if len(figures) > 1:
            yield (
                where
                + "more than one figure, but a cell has one alt text: cut the cell"
            )
        if figures:
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            if len(alt) < 40 or re.search(r"\.(png|svg|jpe?g)\b", alt):
                yield where + "the figure's alt text must tell what is to be seen"
            digest = hashlib.sha256(base64.b64decode(figures[0])).hexdigest()
            for known, key in ((alts, alt), (images, digest)):
                if key in known:
                    yield f"{where}the same figure or alt text as in cell {known[key]}"
                known[key] = i
