"""`make sceptic SEED=100`: every headline of the book, tried again with fresh seeds.

A headline is a function of a seed set, in a cell tagged `headline`, that returns a
`Verdict` (`lora.study.evidence`). The cell's metadata name the number of seeds, at
least two settings, and the chapter's own result for each. Of the chapter only that
runs which defines something: imports, functions, literals.
"""

import ast
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}  # as in tools/run.py

import nbformat
import pandas as pd
import torch

from tools.kit.register import chapters


def definitions(cells):
    """The source of those cells that only import, define and name literals."""
    for cell in cells:
        source = re.sub(r"^\s*!.*", "", cell.source, flags=re.MULTILINE)
        if cell.cell_type != "code" or cell.source.lstrip().startswith(
            "# @title Set-up"
        ):
            continue
        if all(map(defines, ast.parse(source).body)):
            yield source


def defines(statement):
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    if isinstance(statement, ast.Assign):
        return not any(isinstance(n, ast.Call) for n in ast.walk(statement.value))
    return isinstance(statement, kinds)


def headlines(path):
    """(function's name, claim, metadata) of each headline of a chapter."""
    for cell in nbformat.read(path, as_version=4).cells:
        if "headline" in cell.metadata.get("tags", []):
            (function,) = (
                f for f in ast.parse(cell.source).body if isinstance(f, ast.FunctionDef)
            )
            claim = ast.get_docstring(function).partition("\n")[0]
            yield function.name, claim, cell.metadata["headline"]


def attempt(path, name, seeds, setting):
    """Whether one headline stands with these seeds, its figure, and the seconds.

    Plain values: a chapter that lists `Verdict` has a class of its own, which no other
    process could read.
    """
    torch.set_num_threads(1)
    space, start = {"__name__": "chapter"}, time.time()
    cells = nbformat.read(path, as_version=4).cells
    for source in definitions(cells):
        exec(compile(source, path.name, "exec"), space)
    verdict = space[name](seeds, **setting)
    return bool(verdict.stands), str(verdict), time.time() - start


def trials(only=""):
    """(chapter, name, claim, setting, arguments, seeds, book) of each trial."""
    for chapter in chapters():
        stored = nbformat.read(chapter.path, as_version=4).metadata.get("bound", {})
        for name, claim, data in headlines(chapter.path):
            for setting, arguments in data["settings"].items():
                if re.search(only, name):
                    said = stored.get(data["book"][setting])
                    yield chapter, name, claim, setting, arguments, data["seeds"], said


def main(seed=100, only=""):
    """Try all headlines whose name matches `only`; 1 if one falls, 0 if all stand."""
    seed, rows = int(seed), []
    with ProcessPoolExecutor(2) as pool:
        started = [
            (
                trial,
                pool.submit(
                    attempt,
                    trial[0].path,
                    trial[1],
                    range(seed, seed + trial[5]),
                    trial[4],
                ),
            )
            for trial in trials(only)
        ]
        for (chapter, name, claim, setting, _, _, said), future in started:
            stands, fresh, seconds = future.result()
            row = {
                "chapter": chapter.path.stem[:2],
                "headline": name,
                "setting": setting,
            }
            row |= {"book": said, "fresh": fresh}
            row |= {
                "verdict": "stands" if stands else "FALLS",
                "s": round(seconds),
            }
            rows.append(row)
            print(f"{row['verdict']:7}{claim} ({setting})", flush=True)
    print(f"\nSeeds from {seed} on\n{pd.DataFrame(rows).to_string(index=False)}")
    return any(row["verdict"] == "FALLS" for row in rows) or not rows


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
