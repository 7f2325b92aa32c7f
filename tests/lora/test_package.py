"""The package as a whole: what it loads, and that the method needs little."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.unmutated  # all mutants of a file are in it, and load slowly

CHAPTERS_ONLY = ["scipy", "pandas", "matplotlib", "sklearn", "transformers"]
CHAPTERS_ONLY += ["huggingface_hub", "tqdm", "sympy", "networkx", "peft"]
USE = """
from tempfile import TemporaryDirectory

import torch
from torch import nn

from lora import inject_lora, merge_lora
from lora.adapters import add_adapter, load_adapter, merge_adapter, save_adapter
from lora.nf4 import quantize_model
from lora.rank import truncate

x = torch.randn(3, 8)
model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
inject_lora(model, rank=2)
model(x).sum().backward()
merge_lora(model)
quantize_model(model)
add_adapter(model, "a", rank=2, alpha=4)
with TemporaryDirectory() as folder:
    save_adapter(model, "a", folder)
    load_adapter(model, folder, "b")
print(truncate(model[0].base.dense_weight(), 2).shape)
"""


def run(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True)


def test_import_loads_torch_and_nothing_of_the_study():
    names = [*CHAPTERS_ONLY, "lora.study", "lora.peft_files"]
    code = "import sys, torch; before = set(sys.modules); import lora, lora.rank; "
    code += f"print(sorted({{*sys.modules}} - before & {{*{names}}}))"
    assert run(code).stdout == "[]\n"
    assert all(map(find_spec, CHAPTERS_ONLY)), "so that their absence means something"


def test_the_method_works_without_what_only_the_chapters_need():
    """Packages that are None in `sys.modules` cannot be imported."""
    missing = f"import sys; sys.modules |= dict.fromkeys({CHAPTERS_ONLY})\n"
    done = run(missing + USE)
    assert done.returncode == 0, done.stderr
    assert "None in sys.modules" in run(missing + "import lora.study.evidence").stderr
