"""`lora.guards` where `test_adapters.py` does not get to it through the functions."""

import pytest
import torch
from torch import nn

from lora import guards


def test_settings_by_pattern():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    chosen = {"a.one": one, "a.two": two, "again.one": one}
    assert guards.settings(chosen, 3, 5.0) == {one: (3, 5.0), two: (3, 5.0)}
    found = guards.settings(chosen, {r".*two": 1, r"a.*": 2}, 4)
    assert found == {one: (2, 4), two: (1, 4)}
    # A layer that has several names takes the settings of its first.
    found = guards.settings(chosen, {r"again.*": 7, r"a\..*": 2}, 4)
    assert found[one] == (2, 4)


def test_known_names_come_once():
    layers = {"x": nn.Module(), "y": nn.Module()}
    layers["x"].adapters, layers["y"].adapters = {"b": 0, "a": 0}, {"a": 0, "c": 0}
    assert guards.known(layers) == ["b", "a", "c"]


def test_the_file_of_an_adapter_may_be_four_times_the_model():
    assert guards.most_bytes(nn.Linear(10, 10)) == 2**20 + 4 * 4 * 110
    with pytest.raises(TypeError, match="model must hold"):
        guards.most_bytes(3)


@pytest.mark.parametrize(
    ("A", "B", "fits"),
    [
        ((2, 4), (3, 2), True),
        ((2, 3), (4, 2), False),
        ((2, 5), (3, 2), False),
        ((2, 4), (5, 2), False),
    ],
)
def test_shapes_must_fit(A, B, fits):
    base = nn.Linear(4, 3)
    layers = {"x": (torch.zeros(A), torch.zeros(B), 1.0)}
    if fits:
        assert guards.fit({"x": base}, layers, "f")[base][:2] == (2, 1.0)
        return
    with pytest.raises(ValueError, match=r"x in f must update \(3, 4\)"):
        guards.fit({"x": base}, layers, "f")


@pytest.mark.parametrize(
    ("base", "stored", "fits"),
    [
        (torch.float32, torch.float16, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),  # adapters of a half base are float32
        (torch.float32, torch.float64, False),
        (torch.float64, torch.float64, True),
    ],
)
def test_dtypes_must_fit_without_rounding(base, stored, fits):
    layer = nn.Linear(4, 3, dtype=base)
    layers = {"x": (*(torch.zeros(s, dtype=stored) for s in ((1, 4), (3, 1))), 1.0)}
    if fits:
        guards.fit({"x": layer}, layers, "f")
        return
    with pytest.raises(ValueError, match=r"torch.float32, got .* torch.float64"):
        guards.fit({"x": layer}, layers, "f")
