"""`tools.gpu` on the processor: where a notebook trains first, and on which device."""

import nbformat
import pytest

from tools.gpu import first_training, main

STEP = """p = torch.nn.Parameter(torch.ones(1))
p.grad = torch.ones(1)
torch.optim.SGD([p], 1.0).step()"""


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["import torch", "x = 1", STEP, "1 / 0"], (2, {"cpu"})),
        (["import torch", "x = 1"], (None, set())),
    ],
)
def test_the_first_training_of_a_notebook(tmp_path, sources, expected):
    cells = map(nbformat.v4.new_code_cell, sources)
    nbformat.write(nbformat.v4.new_notebook(cells=[*cells]), tmp_path / "a.ipynb")
    assert first_training(tmp_path / "a.ipynb") == expected


def test_a_cell_that_fails_says_so(tmp_path):
    cells = [nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(ZeroDivisionError):
        first_training(tmp_path / "a.ipynb")


def test_without_a_gpu_nothing_is_run(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    main([])
    assert capsys.readouterr().out.startswith("There is no GPU")
