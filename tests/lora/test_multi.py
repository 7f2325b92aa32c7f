"""`lora.multi`: layers with several adapters, against sums written out in float64."""

import copy

import pytest
import torch
from torch import nn

from lora import core, multi
from lora.adapters import add_adapter, route, set_adapter


def draw(model, seed=0):
    """Every A and B of the model at random, so that each adapter does something."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith((".A", ".B")):
            nn.init.normal_(p)
    return model


@pytest.fixture
def layer():
    """A linear layer from 6 to 4 in float64, with adapters of ranks 1, 3 and 2."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(6, 4)}).double()
    for name, rank in (("one", 1), ("three", 3), ("two", 2)):
        add_adapter(model, name, rank=rank, alpha=float(rank + 1))
    return draw(model)["linear"]


def by_hand(layer, x, name):
    """The formula at the head of the module, for one adapter or none."""
    y = torch.einsum("...i,oi->...o", x, layer.base.weight) + layer.base.bias
    if name is not None:
        part = layer.adapters[name]
        update = torch.einsum("or,ri->oi", part.B, part.A) * (part.alpha / part.rank)
        y = y + torch.einsum("...i,oi->...o", x, update)
    return y


@pytest.mark.parametrize("name", [None, "one", "two", "three"])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (0, 6), (2, 3, 5, 6)])
def test_the_adapter_that_is_set(layer, name, shape):
    x = torch.randn(shape, dtype=torch.float64)
    layer.shared.active = name
    torch.testing.assert_close(layer(x), by_hand(layer, x, name))
    if name is None:
        assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 2, 5, 6), (4, 0, 6)])
def test_each_row_with_its_own(layer, shape):
    x, names = torch.randn(shape, dtype=torch.float64), ["two", None, "three", "two"]
    layer.shared.rows = ["two", None, "three"], torch.tensor([0, 1, 2, 0])
    expected = torch.stack([by_hand(layer, row, n) for row, n in zip(x, names)])
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer(x)[1], layer.base(x)[1])


def test_rows_of_adapters_that_the_layer_has_not(layer):
    x = torch.randn(3, 6, dtype=torch.float64)
    layer.shared.rows = ["elsewhere", None, "one"], torch.tensor([0, 1, 2])
    expected = [by_hand(layer, x[i], n) for i, n in enumerate([None, None, "one"])]
    torch.testing.assert_close(layer(x), torch.stack(expected))
    layer.shared.rows = ["elsewhere", None], torch.tensor([0, 1, 0])
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (5, 2, 6)])
def test_another_number_of_rows_is_refused(layer, shape):
    layer.shared.rows = ["one"], torch.tensor([0, 0])
    with pytest.raises(ValueError, match="2 rows are routed, but a layer was given"):
        layer(torch.randn(shape, dtype=torch.float64))


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(layer):
    """Finite differences, and each adapter learns from its own rows alone."""
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    layer.shared.rows = ["one", "three"], torch.tensor([0, 1, 0])
    parts = {n: layer.adapters[n].requires_grad_(True) for n in ("one", "three")}
    tensors = [p for part in parts.values() for p in (part.A, part.B)]

    def loss(*_):
        return layer(x).square().sum()

    assert torch.autograd.gradcheck(loss, tensors)
    loss().backward()
    mixed = parts["three"].A.grad.clone()
    layer.zero_grad()
    layer.shared.rows, layer.shared.active = None, "three"
    layer(x[1:2]).square().sum().backward()
    torch.testing.assert_close(parts["three"].A.grad, mixed)
    assert layer.adapters["two"].A.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(dtype):
    """Products with A and B are in float32, whatever the rows; rounded once."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(8, 8)}).to(dtype)
    add_adapter(model, "a")
    layer, x = draw(model)["linear"], torch.randn(3, 2, 8).to(dtype)
    part = layer.adapters["a"]
    assert part.A.dtype == part.B.dtype == torch.float32
    y = layer.base(x)
    update = (x.double() @ part.A.double().T) @ part.B.double().T * part.scale
    expected = (y.double() + update).to(dtype)
    set_adapter(model, "a")
    torch.testing.assert_close(layer(x), expected)
    set_adapter(model, None)
    with route(model, ["a", None, "a"]):
        got = layer(x)
    torch.testing.assert_close(got[::2], expected[::2])
    assert torch.equal(got[1], y[1]) and got.dtype == dtype


def test_the_weight_that_others_read(layer):
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    layer.shared.active = "two"
    x = torch.randn(3, 6, dtype=torch.float64)
    got = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(got, by_hand(layer, x, "two"))
    layer.shared.rows = ["two"], torch.tensor([0])
    with pytest.raises(ValueError, match="^a layer's weight was read inside"):
        layer.weight  # noqa: B018


def test_attention_reads_the_weight_of_the_adapter():
    """`nn.MultiheadAttention` never calls its output projection."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    before = model(x, x, x)[0]
    add_adapter(model, "a", "out_proj")
    draw(model)
    assert torch.equal(model(x, x, x)[0], before)
    set_adapter(model, "a")
    part = model.out_proj.adapters["a"]
    lone = copy.deepcopy(model)
    lone.out_proj = nn.Linear(8, 8)
    lone.out_proj.weight.data = (
        model.out_proj.base.weight + part.scale * part.B @ part.A
    )
    lone.out_proj.bias.data = model.out_proj.bias.data
    torch.testing.assert_close(model(x, x, x)[0], lone(x, x, x)[0])
    assert not torch.allclose(model(x, x, x)[0], before, atol=1e-3)


def test_with_one_is_the_layer_of_chapter_2(layer):
    x, state = torch.randn(3, 6, dtype=torch.float64), torch.get_rng_state()
    lora = layer.eval().with_one("three")
    assert isinstance(lora, core.LoRALinear) and not lora.study.training
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    assert lora.A is layer.adapters["three"].A and lora.base is layer.base
    torch.testing.assert_close(lora(x), by_hand(layer, x, "three"))
    assert repr(layer.adapters["three"]) == "Adapter(rank=3, alpha=4.0)"


def test_a_copy_shares_nothing_with_the_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_adapter(model, "a")
    twin = copy.deepcopy(draw(model))
    set_adapter(twin, "a")
    assert model[0].shared is model[1].shared and twin[0].shared is twin[1].shared
    assert model[0].shared.active is None and twin[0].shared.active == "a"


def test_parts_and_bases():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    assert multi.parts_of(model) == ({}, multi.Shared())
    whole = dict(model.items())
    add_adapter(model, "second", "b")
    add_adapter(model, "first", "a|b")
    layers, shared = multi.parts_of(model)
    assert list(layers) == ["a", "b"] and shared is model["a"].shared
    assert multi.names_of(layers) == ["first", "second"]
    assert multi.bases_of(model) == whole


def test_adapters_given_to_parts_are_refused():
    parts = [nn.Sequential(nn.Linear(3, 3)) for _ in range(2)]
    for part in parts:
        add_adapter(part, "a")
    with pytest.raises(ValueError, match="^adapters were added to parts of the"):
        set_adapter(nn.Sequential(*parts), "a")


@pytest.mark.parametrize("first", ["inject", "add"])
def test_layers_that_are_wrapped_by_inject_lora_are_refused(first):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if first == "add":
        add_adapter(model, "a")
    core.inject_lora(model, targets="0|1.base")
    with pytest.raises(ValueError, match="wrapped by inject_lora; merge_lora first"):
        add_adapter(model, "b", "1")
