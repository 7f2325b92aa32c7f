"""Each chapter runs alone, as on Colab: no repository around it, `lora` from git.

A chapter gets an empty folder and a fresh environment that holds COLAB and what that
needs, and runs from the first cell to the last. Its first cell installs `lora` with the
line that readers run; git alone is told to take the repository from this work tree.
"""

import json
import os
import subprocess
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution, distributions

import nbformat
import pytest
import yaml
from jupyter_client import AsyncKernelManager
from listings import CHAPTERS, ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement

URL = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
COLAB = "torch", "numpy", "matplotlib", "scikit-learn", "ipykernel", "pip"
AT_A_TIME = 2  # with one thread each, so that timings within a chapter stay undisturbed
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
            if not (folder / top).is_symlink():
                (folder / top).symlink_to(found.locate_file(top))
        needs = [Requirement(line) for line in found.requires or ()]
        names += [
            n.name for n in needs if not n.marker or n.marker.evaluate({"extra": ""})
        ]


def redirect(url, folder):
    """Environment variables under which git finds `url`, and nothing else, here."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "PYTHON"))
    }
    repository = folder / "repository"
    subprocess.run(["git", "init", "-q", "--bare", repository], env=clean, check=True)
    git = ["git", f"--git-dir={repository}", f"--work-tree={ROOT}"]
    git += ["-c", "user.name=test", "-c", "user.email=test", "-c", "commit.gpgsign=no"]
    # The work tree as it is, uncommitted edits and new files included.
    for command in ["add", "--all"], ["commit", "--quiet", "--message=work tree"]:
        subprocess.run([*git, *command], env=clean, cwd=ROOT, check=True)
    return clean | {
        "GIT_ALLOW_PROTOCOL": "file",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": url,
    }


def run_alone(path, folder, installed, environ):
    """Execute a chapter in a new environment in `folder`; return what is wrong."""
    venv.create(folder / "venv", symlinks=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "colab.pth").write_text(str(installed))
    python = str(folder / "venv" / "bin" / "python")
    kernel = AsyncKernelManager(kernel_name="python3")
    kernel.kernel_spec.argv[0] = python
    (folder / "content").mkdir()
    resources = {"metadata": {"path": str(folder / "content")}}
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    last = nbformat.v4.new_code_cell(WHENCE)
    notebook.cells.append(last)
    try:
        NotebookClient(notebook, km=kernel, timeout=600, resources=resources).execute(
            env=environ | {"IPYTHONDIR": str(folder / "ipython")}
        )
    except CellExecutionError:
        pass  # it stands in the cell's outputs
    wrong = []
    for i, cell in enumerate(notebook.cells):
        for out in cell.get("outputs", []):
            if out.output_type == "error":
                wrong.append(f"cell {i} fails with {out.ename}: {out.evalue}")
            elif out.get("name") == "stderr" or cell is first:
                wrong.append(f"cell {i} must not print: {out.get('text', out)}")
    if not wrong:
        for file in last.outputs[0].text.split():
            if not file.startswith(str(site)):
                wrong.append(f"{file} does not come from the line that installs lora")
    before = {d.name: d.version for d in distributions(path=[str(installed)])}
    pip = [python, "-m", "pip", "list", "--format=json"]
    found = subprocess.run(pip, env=environ, capture_output=True, check=True).stdout
    after = {d["name"]: d["version"] for d in json.loads(found)}
    after.pop("deconstructing-lora", None)
    for name, version in sorted(after.items() ^ before.items()):
        change = "installs" if name in after else "hides"
        wrong.append(
            f"to install lora {change} {name} {version}: loosen pyproject.toml"
        )
    return wrong


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory):
    """Path of a chapter -> what is wrong with it, for the chapters that are tested."""
    installed = tmp_path_factory.mktemp("installed")  # in no environment: pip keeps off
    link_installed(COLAB, installed)
    environ = redirect(URL, tmp_path_factory.mktemp("git")) | {
        "OMP_NUM_THREADS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    tests = [item for item in request.session.items if "runs" in item.fixturenames]
    pool = ThreadPoolExecutor(AT_A_TIME)
    yield {
        path: pool.submit(
            run_alone, path, tmp_path_factory.mktemp("alone"), installed, environ
        )
        for path in [test.callspec.params["path"] for test in tests]
    }
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_runs_alone(path, runs):
    wrong = runs[path].result()
    assert not wrong, f"{path.name}, alone as on Colab:\n" + "\n".join(wrong)
