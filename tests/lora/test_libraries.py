"""`lora.libraries` on a model of two layers, against sums of matrices."""

import copy

import pytest
import torch
from test_adapters import awake, wrapped
from torch import nn

from lora import libraries, recorded, search
from lora.adapters import add_adapter, set_adapter


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for name in ("x", "y"):
        add_adapter(model, name, rank=2, alpha=4)
    return awake(model)


def changes(model, name):
    return [m.adapters[name].weight - m.base.weight for m in wrapped(model).values()]


def test_the_average_has_the_cross_terms(model):
    libraries.average(model, {"x": 1, "y": 1}, "linear")
    for layer, D in zip(wrapped(model).values(), changes(model, "linear")):
        x, y = (layer.adapters[n] for n in "xy")
        assert torch.allclose(D, 2 * (x.B + y.B) @ (x.A + y.A))  # 2: their scale
        assert layer.adapters["linear"].rank == 2


def test_the_ways_to_put_adapters_together(model):
    x, y = changes(model, "x"), changes(model, "y")
    found = {}
    for how, name in libraries.combinations(model, ["x", "y"]):
        set_adapter(model, name)
        found[how] = changes(model, name)
        set_adapter(model, None)
    assert list(found) == ["sum", "mean", "sum, rank 8", "linear"]
    for i, D in enumerate(found["sum"]):
        assert torch.allclose(D, x[i] + y[i])
        assert torch.allclose(found["mean"][i], D / 2)
        assert torch.allclose(found["sum, rank 8"][i], D)  # its rank is 4
        assert not torch.allclose(found["linear"][i], D)


def test_the_rows_of_a_seed(monkeypatch, model):
    trained = []

    def fine_tune(model, tokenizer, pairs, steps, lr, **how):
        trained.append((len(pairs), steps, lr, how))
        return [1.0] * 2

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleList([nn.ModuleList([nn.Linear(3, 3)])])

    small = nn.Module()
    small.encoder = Block()
    pairs = [(str(i), str(i)) for i in range(220)]
    monkeypatch.setattr(search, "fine_tune", fine_tune)
    monkeypatch.setattr(search, "load_minilm", lambda: (None, copy.deepcopy(small)))
    monkeypatch.setattr(search, "docstring_pairs", lambda library: pairs)
    monkeypatch.setattr(
        recorded, "ranks", lambda m, t, tests: {key: [1] for key in tests}
    )
    rows = list(libraries.runs(seed=3, steps=5))
    alone = [r for r in rows if not r["how"]]
    names = list(libraries.NAMES)
    assert [r["adapter"] for r in alone] == ["base", *names, "all"]
    assert all(set(r["ranks"]) == set(names) for r in alone)
    assert trained[0] == (20, 5, 1e-3, {"seed": 3, "weight_decay": 0.01})
    assert trained[-1][:2] == (140, 35)
    sums = [r for r in rows if r["how"]]
    assert len(sums) == 4 * 8
    assert all(set(r["ranks"]) == set(r["adapter"].split("+")) for r in sums)
    assert len(list(libraries.runs(seed=3, steps=5, sums=False))) == 8
