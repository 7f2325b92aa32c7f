"""The whole method on a second device, without one: PyTorch's fake tensors.

They have shapes, dtypes and devices, but no numbers. As on a GPU, an operation on
tensors of two devices raises: what the package leaves on the processor would show.
"lazy" is a device that a build of torch for processors knows by name. With the variable
LORA_DEVICE=cuda (`make gpu`) the same tests run there, and numbers are compared.
"""

import copy
import os

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora import LoRALinear, count_total, freeze_all, inject_lora, merge_lora
from lora.adapters import (
    add_adapter,
    combine,
    delete_adapter,
    disable_adapters,
    merge_adapter,
    route,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora.formats import LEVELS, round_trip
from lora.nf4 import NF4Linear, quantize_model
from lora.study.training import RandomSubspace
from tests.lora.models import small

DEVICE = os.environ.get("LORA_DEVICE", "lazy")
REAL = DEVICE != "lazy"


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    if REAL:
        yield
        return
    # torch copies the mode with a tensor, and tensors of two modes do not mix
    keep = {"__deepcopy__": lambda self, memo: self}
    monkeypatch.setattr(FakeTensorMode, *keep.popitem(), raising=False)
    # the package's tables of levels are real
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def linear(d_in=64, d_out=64, dtype=torch.float32):
    return nn.Linear(d_in, d_out, device=DEVICE, dtype=dtype)


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)


def bert():
    with torch.device(DEVICE):
        return small()


def out(model):
    ids = torch.ones(3, 5, dtype=torch.long, device=DEVICE)
    return model(input_ids=ids).last_hidden_state


def step(model):
    """Forward and backward; the names of the parameters that got a gradient."""
    out(model).sum().backward()
    return [n for n, p in model.named_parameters() if p.grad is not None]


def all_there(model):
    """All tensors of a model, and their gradients, are on the second device."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    return {t.device.type for t in tensors} == {DEVICE}


def test_a_tensor_that_was_left_behind_would_show():
    layer = linear()
    with pytest.raises(RuntimeError, match="same device"):
        layer(torch.randn(2, 64))
    layer.bias = nn.Parameter(torch.zeros(64))
    with pytest.raises(RuntimeError, match="same device"):
        layer(numbers(2, 64))


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer(shape, dtype):
    layer, x = LoRALinear(linear(dtype=dtype), 3), numbers(*shape, dtype=dtype)
    layer(x).sum().backward()
    assert all_there(layer) and x.grad.device == layer.weight.device
    layer.reset_parameters()
    plain = layer.merged()
    assert all_there(plain) and plain(x).shape == shape and plain.weight.dtype == dtype


def test_a_model_injected_and_merged():
    model = bert()
    total = count_total(model)
    freeze_all(model)
    wrappers = inject_lora(model)
    assert len(step(model)) == 2 * len(wrappers) == 24 and all_there(model)
    assert count_total(merge_lora(model)) == total and all_there(model)
    step(model.requires_grad_(True))


def test_adapters_added_set_routed_combined_and_merged():
    model = bert()
    freeze_all(model)
    add_adapter(model, "a", rank=2)
    add_adapter(model, "b", r".*\.query", rank=3, alpha_pattern={r".*\.0\..*": 1.0})
    for name, trained in (("a", 24), ("b", 4)):
        set_adapter(model, name)
        model.zero_grad()
        assert len(step(model)) == trained
    for name in ("a", "b"):
        layer = model.get_submodule("encoder.layer.1.attention.self.query")
        layer.adapters[name].requires_grad_(True)
    with route(model, ["a", None, "b"]):
        model.zero_grad()
        assert len(step(model)) == 6  # b of two layers, a of one
    combine(model, {"a": 0.5, "b": -1}, "c")
    merge_adapter(model, "c")
    assert all_there(model) and out(model).shape == (3, 5, 16)
    unmerge_adapter(model)
    delete_adapter(model, "a")
    set_adapter(model, "c")
    assert step(copy.deepcopy(model)) and all_there(model)
    with disable_adapters(model):
        assert not out(model).requires_grad


@pytest.mark.skipif(REAL, reason="a real device has numbers")
def test_files_need_numbers(tmp_path):
    model = bert()
    add_adapter(model, "a")
    with pytest.raises(ValueError, match="cannot save .*lora_A.weight: FakeTensor on"):
        save_adapter(model, "a", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer_in_four_bits(double, dtype):
    layer = NF4Linear.from_linear(linear(dtype=dtype), double=double)
    x = numbers(2, 64, dtype=dtype)
    layer(x).sum().backward()
    assert all_there(layer) and x.grad.device == layer.dense_weight().device
    adapted = LoRALinear(layer)
    adapted(x).sum().backward()
    assert all_there(adapted) and all_there(adapted.merged())


def test_a_model_in_four_bits():
    model = bert()
    assert len(quantize_model(model)) == 12
    freeze_all(model)
    inject_lora(model, targets=r".*\.(query|value)")
    assert len(step(model)) == 8 and all_there(model)
    assert all_there(merge_lora(model))


@pytest.mark.parametrize("kind", LEVELS)
def test_levels(kind):
    assert round_trip(numbers(3, 50), kind).device.type == DEVICE


def test_a_random_subspace():
    model = RandomSubspace(nn.Sequential(linear(4, 3), nn.Tanh(), linear(3, 2)), 5)
    model(numbers(7, 4)).sum().backward()
    assert all_there(model) and model.z.grad is not None


@pytest.mark.skipif(not REAL, reason="fake tensors have no numbers")
@pytest.mark.parametrize("quantized", [False, True])
def test_the_numbers_are_those_of_the_processor(quantized):
    torch.manual_seed(0)
    base, x = nn.Linear(64, 48), torch.randn(5, 64)
    A, B, found = torch.randn(2, 64), torch.randn(48, 2), []
    for device in ("cpu", DEVICE):
        layer = copy.deepcopy(base).to(device)
        layer = LoRALinear(NF4Linear.from_linear(layer) if quantized else layer, 2)
        layer.A.data, layer.B.data = A.to(device), B.to(device)
        y = layer(x.to(device))
        y.square().sum().backward()
        numbers = y, layer.A.grad, layer.B.grad, layer.merged().weight
        found.append([t.detach().cpu() for t in numbers])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
