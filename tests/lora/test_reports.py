"""What users of LoRA libraries have reported, as kinds; for each, where it could occur.

1. Torch's defaults (dtype, device, mode) when the package is imported or called: the
   constants of `formats` (LEVELS, NF4, FP4, DYNAMIC); what is made at a call without a
   tensor to go by (P of `rank.RandomSubspace`, the index of `adapters.route`, the
   rotation, network and order of `study.moons` and `study.training`, the values of
   `study.evidence`). All else is made by `new_…` or `…_like` of a given tensor.
"""

import contextlib
import importlib
import sys
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file
from torch import nn


def numbers(*shape, seed=0):
    """Random numbers that no default of torch changes."""
    draws = torch.Generator("cpu").manual_seed(seed)
    wide = torch.randn(shape, generator=draws, dtype=torch.float64, device="cpu")
    return wide.float()


def linear(d_in=8, d_out=8, seed=0):
    layer = nn.Linear(d_in, d_out, device="cpu", dtype=torch.float32)
    layer.weight.data = numbers(d_out, d_in, seed=seed)
    layer.bias.data = numbers(d_out, seed=seed + 1)
    return layer


def stack(*names):
    """A model of square layers with these names, one after the other."""
    return nn.Sequential(OrderedDict((n, linear(seed=i)) for i, n in enumerate(names)))


# --- 1. Torch's defaults ---


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@contextlib.contextmanager
def imported_anew(state):
    """A function that imports modules of the package, as if for the first time."""
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "lora"}
    try:
        for name in before:
            del sys.modules[name]
        names = "formats", "nf4", "rank", "core", "adapters", "peft_files"
        names += "study.moons", "study.training", "study.evidence"
        with state():
            yield {name: importlib.import_module(f"lora.{name}") for name in names}
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "lora"]:
            del sys.modules[name]
        sys.modules.update(before)


def everything(lora, folder):
    """What the package computes, name -> tensor or bytes, of fixed arguments."""
    formats, nf4, rank, core, adapters = (
        lora[n] for n in ("formats", "nf4", "rank", "core", "adapters")
    )
    moons, training = lora["study.moons"], lora["study.training"]
    results = {f"LEVELS {kind}": v for kind, v in formats.LEVELS.items()}
    results |= {"NF4": formats.NF4, "FP4": formats.FP4, "DYNAMIC": formats.DYNAMIC}
    results |= {f"normal {b}": formats.normal_float(b) for b in range(2, 9)}
    W, x = numbers(8, 300), numbers(4, 8)
    results |= {k: formats.round_trip(W, k) for k in formats.LEVELS}
    codes, scales = nf4.quantize(W)
    results |= {"codes": codes, "scales": scales}
    results["dequantized"] = nf4.dequantize(codes, scales, W.shape)
    model = stack("a", "b")
    nf4.quantize_model(model)
    results |= {f"stored {k}": v for k, v in model.state_dict().items()}
    results["quantized"] = model(x)
    adapters.add_adapter(model, "one", alpha=10, rank=3)
    for update in (layer.adapters["one"] for layer in model):
        update.A.data, update.B.data = numbers(3, 8), numbers(8, 3)
    adapters.combine(model, {"one": 0.3}, "sum")
    with adapters.route(model, ["one", None, "sum", "one"]):
        results["routed"] = model(x)
    adapters.set_adapter(model, "one")
    results["set"] = model(x)
    adapters.save_adapter(model, "one", folder)
    results["config"] = (folder / "adapter_config.json").read_bytes()
    results |= load_file(folder / "adapter_model.safetensors")
    adapters.load_adapter(model, folder, "again")
    adapters.merge_adapter(model, "again")
    results["merged"] = model(x)
    model = stack("a", "b")
    for wrapper in core.inject_lora(model, rank=3, alpha=10):
        wrapper.A.data, wrapper.B.data = numbers(3, 8), numbers(8, 3)
    results |= {f"wrapped {k}": v for k, v in model.state_dict().items()}
    results["wrapped"] = model(x)
    results["merged wrapper"] = core.merge_lora(model)(x)
    results["truncated"] = rank.truncate(W, 2)
    results["energy"] = rank.energy(W)
    subspace = rank.RandomSubspace(stack("a", "b"), 5, seed=1)
    subspace.z.data = numbers(5)
    results |= {"P": subspace.P, "subspace": subspace(x)}
    data = moons.moons_batch([0], n=32, degrees=30.0)
    results |= {"moons": data[0], "labels": data[1]}
    models = [moons.moons_mlp(0)]
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        return results  # nothing trains there
    results["losses"] = training.train(models, *data, epochs=1)
    interval = lora["study.evidence"].interval([1.0, 2.0, 4.0])
    results["interval"] = torch.tensor(interval, device="cpu", dtype=torch.float64)
    return results


def assert_same(found, expected):
    assert found.keys() <= expected.keys()
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == expected[name].dtype, name
            assert torch.equal(value, expected[name]), name
        else:
            assert value == expected[name], name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with imported_anew(contextlib.nullcontext) as lora:
        return everything(lora, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("state", DEFAULTS)
def test_torch_s_defaults_at_import_change_nothing(state, plain, tmp_path):
    with imported_anew(DEFAULTS[state]) as lora:
        pass
    assert_same(everything(lora, tmp_path), plain)


@pytest.mark.parametrize("state", [s for s in DEFAULTS if s != "autocast"])
def test_torch_s_defaults_at_a_call_change_nothing(state, plain, tmp_path):
    with imported_anew(contextlib.nullcontext) as lora, DEFAULTS[state]():
        assert_same(everything(lora, tmp_path), plain)
