"""On a GPU: the package's tests, then each chapter up to its first training.

python -m tools.gpu            all; says so where there is no GPU
python -m tools.gpu CHAPTER    that notebook, up to the cell that trains first
"""

import os
import subprocess
import sys

import nbformat
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch.optim.optimizer import register_optimizer_step_post_hook

from tools.kit.register import ROOT, chapters


def first_training(path):
    """Run a notebook until an optimizer has made steps: that cell, and their devices.

    (None, empty set) if none makes any. A cell that fails raises its error.
    """
    devices = set()

    def note(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            devices.update(p.device.type for p in group["params"])

    handle, shell = register_optimizer_step_post_hook(note), InteractiveShell()
    try:
        for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "code":
                shell.run_cell(cell.source).raise_error()
            if devices:
                return i, devices
        return None, devices
    finally:
        handle.remove()


def check_chapter(path):
    """Exit with a sentence unless the chapter's first training is on the GPU."""
    cell, devices = first_training(path)
    if cell is None:
        print(f"{path.stem} trains nothing")
    elif devices != {"cuda"}:
        sys.exit(f"{path.stem}: cell {cell} trains on {', '.join(sorted(devices))}")
    else:
        print(f"{path.stem}: cell {cell} trains on {torch.cuda.get_device_name()}")


def main(names):
    if not torch.cuda.is_available():
        return print("There is no GPU that PyTorch can use: nothing was run.")
    if names:
        return check_chapter(ROOT / "book" / f"{names[0]}.ipynb")
    environ = os.environ | {"LORA_DEVICE": "cuda", "MPLBACKEND": "agg"}
    commands = [["pytest", "-q", "tests/lora"]]
    commands += [["tools.gpu", chapter.path.stem] for chapter in chapters()]
    failed = 0
    for command in commands:  # a process each: no chapter leaves anything to another
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environ)
        failed += done.returncode != 0
    sys.exit(f"{failed} of {len(commands)} failed" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
