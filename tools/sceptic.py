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
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}  # as in tools/run.py

import nbformat
import pandas as pd
import torch

from tools.kit.register import chapters

Trial = namedtuple("Trial", "path name claim setting arguments seeds book")


def definitions(cells):
    """The source of those cells that only import, define and name literals."""
    for cell in cells:
        setup = cell.source.startswith("# @title Set-up")
        if cell.cell_type == "code" and not setup:
            source = re.sub(r"^(\s*)!.*", r"\1pass", cell.source, flags=re.MULTILINE)
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
            body = ast.parse(cell.source).body
            (function,) = (f for f in body if isinstance(f, ast.FunctionDef))
            claim = ast.get_docstring(function).partition("\n")[0]
            yield function.name, claim, cell.metadata["headline"]


def trials(only):
    """Each headline whose name matches `only`, in each of its settings."""
    for path in (chapter.path for chapter in chapters()):
        stored = nbformat.read(path, as_version=4).metadata.get("bound", {})
        for name, claim, data in headlines(path):
            for setting, arguments in data["settings"].items():
                if re.search(only, name):
                    said = stored.get(data["book"][setting])
                    yield Trial(
                        path, name, claim, setting, arguments, data["seeds"], said
                    )


def attempt(trial, first):
    """Whether a headline stands with the seeds from `first` on, its figure, seconds.

    Plain values: a chapter that lists `Verdict` has a class of its own, which no other
    process could read.
    """
    torch.set_num_threads(1)
    space, start = {"__name__": "chapter"}, time.time()
    for source in definitions(nbformat.read(trial.path, as_version=4).cells):
        exec(compile(source, trial.path.name, "exec"), space)
    seeds = range(first, first + trial.seeds)
    verdict = space[trial.name](seeds, **trial.arguments)
    return bool(verdict.stands), str(verdict), time.time() - start


def main(seed=100, only=""):
    """Try all headlines whose name matches `only`; 1 if one falls, 0 if all stand."""
    tried = list(trials(only))
    table = []
    with ProcessPoolExecutor(2) as pool:
        results = pool.map(attempt, tried, [int(seed)] * len(tried))
        for trial, (stands, fresh, seconds) in zip(tried, results):
            word = "stands" if stands else "FALLS"
            print(f"{word:7}{trial.claim} ({trial.setting})", flush=True)
            chapter = trial.path.stem[:2]
            table.append(
                [chapter, trial.name, trial.setting, trial.book, fresh, word, seconds]
            )
    columns = ["chapter", "headline", "setting", "book", "fresh", "verdict", "s"]
    table = pd.DataFrame(table, columns=columns).round({"s": 0})
    print(f"\nSeeds from {seed} on\n{table.to_string(index=False)}")
    return "FALLS" in table["verdict"].values or table.empty


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
