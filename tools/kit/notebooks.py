"""What every chapter's notebook has to satisfy before it is run."""

import ast
import base64
import hashlib
import itertools
import re

LONGEST_CELL = 15  # visible lines with code; listings may be longer
LONGEST_PRINT = 3  # lines; more is a table
MARKERS = ("nbval-skip", "nbval-check-output", "nbval-raises-exception")
FOLDED = {"hide-input", "hide-cell"}
PLAIN = re.compile(r"<!-- [^\n]*? -->")  # a comment that binds a number


def start(source):
    """The first words of a cell, to find it by."""
    return re.sub(r"\s+", " ", source).strip()[:60]


def has(output, kind):
    return kind in output.get("data", {})


def minutes(notebook):
    """Time to read: 200 words a minute, 3 seconds for a line of code, to 5 minutes."""
    words = lines = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            words += len(PLAIN.sub("", cell.source).split())
        elif not FOLDED & set(cell.metadata.get("tags", [])):
            shown = [cell.source] + [o.get("text", "") for o in cell.outputs]
            lines += sum(len(text.splitlines()) for text in shown)
    return 5 * round((words / 200 + lines / 20) / 5)


def faults(notebook):
    """A sentence for each fault of a chapter: where, what is wrong, how to mend it."""
    executed, known = 0, {}
    for i, cell in enumerate(notebook.cells):
        kinds = [faults_of_prose(cell)]
        if cell.cell_type == "code":
            executed += 1
            kinds = [faults_of_execution(cell, executed), faults_of_form(cell)]
            kinds += [faults_of_outputs(cell, i, known)]
        for fault in itertools.chain(*kinds):
            yield f"cell {i} ({start(cell.source)!r}): {fault}"


def faults_of_prose(cell):
    if re.search(r"^:{3,}|\{[a-z:-]+\}`", cell.source, re.MULTILINE):
        yield "a MyST role or directive, which Colab shows as source"


def faults_of_execution(cell, executed):
    """Not run, run with a warning, or not compared with its stored output."""
    tags, tolerance = cell.metadata.get("tags", []), cell.metadata.get("tolerance")
    if cell.execution_count != executed:
        yield (
            f"execution count {cell.execution_count} instead of {executed}. "
            "Execute all cells in order: make run"
        )
    for output in cell.outputs:
        if output.get("name") == "stderr" or output.output_type == "error":
            yield "a warning or an error is stored. Mend its cause: make run"
    if set(tags) & set(MARKERS) or re.search(r"#\s*NBVAL_", cell.source):
        yield "skips or weakens nbval. Let the cell run and be compared"
    if "nbval-ignore-output" in tags:
        if len(cell.metadata.get("nbval_reason", "")) < 20:
            yield "output ignored without a reason: set nbval_reason"
        if not cell.metadata.get("bench"):
            yield "output ignored, and no goal for `make bench`: set bench"
    elif "nbval_reason" in cell.metadata:
        yield "a reason to ignore the output, but no tag nbval-ignore-output"
    if tolerance and len(tolerance.get("reason", "")) < 20:
        yield "a tolerance without a reason: set it in the metadata"


def faults_of_form(cell):
    """Too long, or not folded on all surfaces under a line that says what it is."""
    tags, jupyter = set(cell.metadata.get("tags", [])), cell.metadata.get("jupyter", {})
    title = re.match(r"# @title (\S.*)", cell.source)
    if tags & FOLDED:
        closed = jupyter.get("source_hidden") and cell.metadata.get("cellView")
        if not closed or ("hide-cell" in tags and not jupyter.get("outputs_hidden")):
            yield (
                "folded here, open in JupyterLab (source_hidden, outputs_hidden) "
                "or Colab (cellView: form)"
            )
        if not title:
            yield "folded without a label: begin it with `# @title LABEL`"
    elif title:
        yield "has a label, but is not folded: tag it hide-input or hide-cell"
    if title and title[1].startswith("Checked"):
        count = sum(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(cell.source)))
        plural = "" if count == 1 else "s"
        if title[1] != f"Checked: {count} assertion{plural}":
            yield f"{title[1]!r}, but it holds {count} assertions"
    if cell.source.startswith("# @title Solution") and "hide-cell" not in tags:
        yield "a solution that is not folded: tag it hide-cell"
    lines = len([line for line in cell.source.split("\n") if line.strip()])
    if not tags & {*FOLDED, "listing"} and lines > LONGEST_CELL:
        yield f"{lines} lines, {LONGEST_CELL} at most: cut it, fold plotting"


def faults_of_outputs(cell, i, known):
    """Pictures and tables without caption or description, or shown twice; printing."""
    rich = cell.metadata.get("mystnb", {})
    solution = "hide-cell" in cell.metadata.get("tags", [])
    figures = [o.data["image/png"] for o in cell.outputs if has(o, "image/png")]
    tables = [o for o in cell.outputs if has(o, "text/html")]
    if len(figures) + len(tables) > 1:
        yield "more than one figure or table, but one caption: cut the cell"
    if (figures or tables) and not solution:
        caption = rich.get("figure", {}).get("caption", "")
        name = rich.get("figure", {}).get("name", "")
        kind = "fig" if figures else "tab"
        if len(caption) < 20:
            yield "no caption: set `caption` in the metadata `book`, then make run"
        if not name.startswith(f"{kind}-") or name in known:
            yield f"the name {name!r} must begin with {kind}- and be its own"
        known[name] = i
    for png in figures:
        alt = rich.get("image", {}).get("alt", "")
        if len(alt) < 40 or re.search(r"\.(png|svg|jpe?g)\b", alt):
            yield "the figure's alt text must tell what is to be seen"
        digest = hashlib.sha256(base64.b64decode(png)).hexdigest()
        for key in (alt, digest):
            if key in known:
                yield f"the same figure or alt text as in cell {known[key]}"
            known[key] = i
    for output in cell.outputs:
        printed = output.get("text", "").count("\n")
        if printed > LONGEST_PRINT and not solution:
            yield f"{printed} printed lines: show a DataFrame"
