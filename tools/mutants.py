"""Mutation testing: make one place of lora/ wrong at a time; some test must fail.

`make mutants` runs it. mutmut makes the mutants and runs the tests that reach each of
them. Those that no test can tell from the original are listed, with the reason, in
equivalent-mutants.md. Any other survivor is printed, and the exit code is 1.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from tools.kit.register import ROOT, sources

WORK = ROOT / "_mutants"
LISTED = Path(__file__).with_name("equivalent-mutants.md")
MUTMUT = Path(sys.executable).with_name("mutmut")
# One thread each: mutmut forks, which OpenMP's threads do not outlive.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
CONFIG = """
[tool.mutmut]
source_paths = ["lora"]
only_mutate = {files}
pytest_add_cli_args_test_selection = ["tests/lora", "-m", "not unmutated"]
use_git_change_detection = false
"""


def mutated():
    """The files in which mutants are made: all but how figures look."""
    files = [file for name, file in sources().items() if name != "study.plots"]
    return [str(file.relative_to(ROOT)) for file in files]


def without_decorators(source):
    """Replace each `@decorator`, for mutmut skips those, by `f = decorator(f)`."""
    lines = source.splitlines()
    functions = [n for n in ast.walk(ast.parse(source)) if type(n) is ast.FunctionDef]
    for f in sorted(functions, key=lambda f: f.lineno, reverse=True):
        for decorator in f.decorator_list:  # the last one is applied first
            call = f"{f.name} = {ast.unparse(decorator)}({f.name})"
            lines.insert(f.end_lineno, " " * f.col_offset + call)
        if f.decorator_list:
            del lines[f.decorator_list[0].lineno - 1 : f.lineno - 1]
    return "\n".join(lines) + "\n"


def mutmut(*arguments, **options):
    return subprocess.run(
        [MUTMUT, *arguments], cwd=WORK, env=ENVIRONMENT, text=True, **options
    )


def outcomes():
    """Name of each mutant -> killed, survived, timeout, ..."""
    out = mutmut("results", "--all", "true", check=True, capture_output=True).stdout
    return dict(line.strip().split(": ") for line in out.splitlines())


def description(mutant):
    """Where it is and the lines that differ, as they stand in equivalent-mutants.md."""
    out = mutmut("show", mutant, check=True, capture_output=True).stdout
    changed = re.findall(r"^[-+](?![-+]{2} ).*", out, re.MULTILINE)
    function = re.sub(r"\.x_?|ǁ", ".", mutant.partition("__mutmut")[0])
    return "\n".join([f"@@ {function.replace('..', '.')} @@", *changed])


def main(*names):
    """NAMES: patterns such as 'lora.core.*', else all."""
    shutil.rmtree(WORK, ignore_errors=True)
    for folder in ("tests", "tools", "lora", "book"):
        ignore = shutil.ignore_patterns("*.ipynb", "__pycache__")
        shutil.copytree(ROOT / folder, WORK / folder, ignore=ignore)
    config = (ROOT / "pyproject.toml").read_text() + CONFIG.format(files=mutated())
    (WORK / "pyproject.toml").write_text(config)
    for path in (WORK / "lora").rglob("*.py"):
        path.write_text(without_decorators(path.read_text()))
    mutmut("run", *names, check=True)

    results = outcomes()
    alive = [m for m, result in results.items() if result not in ("killed", "timeout")]
    survivors = {description(m): m for m in alive if results[m] != "not checked"}
    listed = set(re.findall(r"```diff\n(.*?)\n```", LISTED.read_text(), re.DOTALL))
    modules = defaultdict(Counter)
    for mutant, result in results.items():
        modules[mutant.rpartition(".")[0]][result] += 1
    for module, counts in sorted(modules.items()):
        said = ", ".join(f"{n} {result}" for result, n in counts.most_common())
        print(f"{module}: {counts.total()} mutants: {said}")
    unknown = [text for text in survivors if text not in listed]
    for text in unknown:
        print(f"\nNot killed: {survivors[text]} ({results[survivors[text]]})\n{text}")
    obsolete = [] if names else sorted(listed - survivors.keys())
    for text in obsolete:
        print(f"\nListed in {LISTED.name}, but killed or gone:\n{text}")
    return bool(unknown or obsolete)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
