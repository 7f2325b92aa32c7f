"""`lora.core` against PEFT, finite differences, closed forms; then all the traps."""

import copy
import io
import math
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora import (
    LoRALinear,
    core,
    count_total,
    count_trainable,
    freeze_all,
    inject_lora,
    merge_lora,
)
from lora.nf4 import NF4Linear
from tests.lora.models import assert_unchanged, attention, awake, encoder, mlp, snapshot

# --- The layer against other people's mathematics ---


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 8.0), (4, 8.0), (3, 0.5), (9, 16)])
def test_equals_peft(dtype, tolerance, bias, rank, alpha):
    torch.manual_seed(1)
    base = nn.Linear(6, 5, bias=bias, dtype=dtype)
    ours = awake(LoRALinear(copy.deepcopy(base), rank, alpha))
    config = LoraConfig(r=rank, lora_alpha=alpha)
    theirs = PeftLinear(copy.deepcopy(base), "a", config, r=rank, lora_alpha=alpha).to(
        dtype
    )
    theirs.lora_A["a"].weight.data = ours.A.data.clone()
    theirs.lora_B["a"].weight.data = ours.B.data.clone()

    def close(a, b):
        # relative to the largest entry: summing in another order moves the small ones
        # more
        return (a - b).abs().max() <= tolerance * b.abs().max()

    x = torch.randn(2, 3, 6, dtype=dtype)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [layer(x) for layer, x in zip((ours, theirs), xs, strict=True)]
    assert close(*ys)
    direction = torch.randn_like(ys[0])
    for y in ys:
        (y * direction).sum().backward()
    assert close(xs[0].grad, xs[1].grad)
    assert close(ours.A.grad, theirs.lora_A["a"].weight.grad)
    assert close(ours.B.grad, theirs.lora_B["a"].weight.grad)
    theirs.merge()
    assert close(merge_lora(ours).weight, theirs.base_layer.weight)


@pytest.mark.parametrize("scale_by", [1.0, 4.0])
def test_gradients_are_those_of_finite_differences(scale_by):
    layer = awake(
        LoRALinear(nn.Linear(4, 3, dtype=torch.float64), rank=2, alpha=2 * scale_by)
    )
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def function(x, A, B):
        return torch.func.functional_call(layer, {"A": A, "B": B}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.A, layer.B))


def test_weight_is_the_matrix_that_forward_applies():
    layer = awake(LoRALinear(nn.Linear(6, 5, dtype=torch.float64), rank=3, alpha=7.0))
    identity = torch.eye(6, dtype=torch.float64)
    assert torch.allclose(layer.weight.T, layer(identity) - layer.bias, atol=1e-12)
    assert layer.bias is layer.base.bias
    assert LoRALinear(nn.Linear(2, 2, bias=False)).bias is None


def test_starts_bit_equal_to_the_base():
    model = mlp(torch.float32)
    x = torch.randn(11, 5)
    before = model(x)
    inject_lora(model)
    assert torch.equal(model(x), before)


def test_initialization():
    torch.manual_seed(3)
    layer = LoRALinear(nn.Linear(20_000, 2), rank=4)
    assert layer.A.shape == (4, 20_000) and layer.B.shape == (2, 4)
    assert layer.A.std().item() == pytest.approx(
        1 / 4, rel=0.02
    )  # 80,000 draws: 8 standard errors
    assert abs(layer.A.mean().item()) < 0.01
    assert not layer.B.any()
    assert (layer.rank, layer.alpha, layer.scale) == (4, 8.0, 2.0)
    assert "rank=4, alpha=8.0" in repr(layer)


def test_defaults_and_argument_order_are_the_series():
    assert LoRALinear(nn.Linear(2, 2)).rank == 4
    (layer,) = inject_lora(nn.Sequential(nn.Linear(2, 2)))
    assert (layer.rank, layer.scale) == (4, 2.0)
    (layer,) = inject_lora(nn.Sequential(nn.Linear(2, 2)), nn.Linear, 3, 6.0)
    assert (layer.rank, layer.scale) == (3, 2.0)


def test_only_a_and_b_get_gradients():
    layer = awake(LoRALinear(nn.Linear(4, 3)))
    layer(torch.randn(5, 4)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"A", "B"}
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}


def test_flops_are_those_of_two_thin_products():
    d_in, d_out, rank, rows = 64, 48, 4, 10
    layer, x = LoRALinear(nn.Linear(d_in, d_out), rank), torch.randn(rows, d_in)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * rows * (
        d_in * d_out + rank * (d_in + d_out)
    )


@pytest.mark.parametrize("needs_input_gradient", [False, True])
def test_saves_no_full_matrix_for_backward(needs_input_gradient):
    layer = awake(LoRALinear(nn.Linear(64, 64), rank=2))
    x = torch.randn(3, 64, requires_grad=needs_input_gradient)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or t, lambda t: t
    ):
        layer(x)
    base = (
        layer.base.weight.untyped_storage().data_ptr()
    )  # already there, so saving it costs nothing
    assert saved
    new = [t.numel() for t in saved if t.untyped_storage().data_ptr() != base]
    assert max(new) < 64 * 64


def test_the_scale_and_the_sum_cost_no_pass_over_the_output():
    layer, sizes = LoRALinear(nn.Linear(64, 64), rank=2), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.add):
                sizes.append(out.numel())
            return out

    with Watch():
        layer(torch.randn(10, 64)).sum().backward()
    assert max(sizes) < 10 * 64  # only the gradients of the thin factors are scaled


# --- Shapes, dtypes, devices ---


@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    d_in=st.integers(1, 6),
    d_out=st.integers(1, 6),
    rank=st.integers(1, 8),
    alpha=st.floats(-32, 32),
    bias=st.booleans(),
    dtype=st.sampled_from(
        [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    ),
)
@settings(deadline=None, max_examples=150)
def test_any_shape_rank_and_dtype(lead, d_in, d_out, rank, alpha, bias, dtype):
    layer = LoRALinear(nn.Linear(d_in, d_out, bias=bias, dtype=dtype), rank, alpha)
    x = torch.randn(*lead, d_in).to(dtype)
    assert torch.equal(layer(x), layer.base(x))
    awake(layer)
    y = layer(x)
    assert y.shape == (*lead, d_out) and y.dtype == dtype
    assert {p.dtype for p in layer.base.parameters()} == {dtype}
    assert layer.A.dtype == layer.B.dtype == torch.promote_types(dtype, torch.float32)
    # The closed form, in float64 and in one product.
    wide = copy.deepcopy(layer).double()
    expected = nn.functional.linear(
        x.double(), wide.base.weight + alpha / rank * (wide.B @ wide.A), wide.bias
    )
    size = 1 + expected.detach().abs().amax() if expected.numel() else 1
    unit = torch.finfo(dtype).eps * (1 + abs(alpha)) * 40
    assert torch.allclose(y.double(), expected, rtol=0, atol=float(unit * size))


def planted(dtype, adapter_dtype, rate=1e-3, steps=1000):
    """Relative error after LoRA has been trained on a planted update of rank 4."""
    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(64, 64, generator=generator) / 8 for _ in range(2))
    P, Q = (torch.randn(64, 4, generator=generator) for _ in range(2))
    x, D = 8 * x, P @ Q.T / 64
    base = nn.Linear(64, 64, bias=False, dtype=dtype)
    base.weight.data = W.to(dtype)
    torch.manual_seed(0)
    layer = LoRALinear(base, 4)
    if adapter_dtype:
        layer.A.data, layer.B.data = (t.to(adapter_dtype) for t in (layer.A, layer.B))
    optimizer = torch.optim.AdamW([layer.A, layer.B], lr=rate, weight_decay=0)
    for _ in range(steps):
        error = layer(x.to(dtype)).float() - x @ (base.weight.float() + D).T
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    return (error.norm() / (x @ D.T).norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_learns_as_a_float32_base_does(dtype):
    full = planted(torch.float32, None)
    assert planted(dtype, None) < full + 0.01
    # The trap: adapters in half precision. In float16 they even end as NaN.
    assert not planted(dtype, dtype) < 3 * full


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_peft_on_a_base_in_half_precision(dtype):
    """PEFT multiplies in float32, we in the dtype of x: no more apart than roundings.

    A, B and x Aᵀ are rounded once each, by half a unit; both sums by half a unit.
    """
    torch.manual_seed(1)
    base = nn.Linear(6, 5, dtype=dtype)
    ours = awake(LoRALinear(copy.deepcopy(base), 4, 8))
    config = LoraConfig(r=4, lora_alpha=8)
    theirs = PeftLinear(copy.deepcopy(base), "a", config, r=4, lora_alpha=8)
    # PEFT's get_peft_model does so by default (autocast_adapter_dtype)
    theirs.lora_A.float(), theirs.lora_B.float()
    theirs.lora_A["a"].weight.data = ours.A.data.clone()
    theirs.lora_B["a"].weight.data = ours.B.data.clone()
    x = torch.randn(30, 6).to(dtype)
    unit, y = torch.finfo(dtype).eps, theirs(x).float()
    sizes = ours.scale * (x.float().abs() @ ours.A.abs().T) @ ours.B.abs().T
    assert ((ours(x) - y).abs() <= unit * (y.abs() + 1.6 * sizes)).all()


def in_float32(layer, x):
    """The layer with products in the dtype of A, whatever x is: exact, but x twice."""
    y = layer.base(x)
    thin = nn.functional.linear(x.to(layer.A.dtype), layer.A).reshape(-1, layer.rank)
    rows = y.to(thin.dtype).reshape(-1, y.shape[-1])
    out = torch.addmm(rows, thin, layer.B.T, alpha=layer.scale)
    return out.view(y.shape).to(y.dtype)


def gradients(layer, forward, x, g):
    """Output, and gradients of x, A and B, for the gradient g of the output."""
    x = x.clone().requires_grad_()
    y = forward(x)
    return y, *torch.autograd.grad(y, (x, layer.A, layer.B), g.to(y.dtype))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (33, 7), (2, 3, 7), (0, 7)])
def test_single_and_double_precision_are_the_same_bits(dtype, shape, autocast):
    """Recorded runs depend on the rounding of one sum, formed by one `addmm`."""
    torch.manual_seed(0)
    layer = awake(LoRALinear(nn.Linear(7, 5, dtype=dtype), rank=3, alpha=5.0))
    x, g = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 5, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = gradients(layer, layer, x, g)
        theirs = gradients(layer, lambda x: in_float32(layer, x), x, g)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_in_half_precision(dtype, quantized):
    """Against float64 they are off by one rounding, as an exact gradient would be."""
    torch.manual_seed(0)
    base = nn.Linear(128, 64, dtype=dtype)
    if quantized:
        base = NF4Linear.from_linear(base)
        assert base.dense_weight().dtype == dtype
    layer = awake(LoRALinear(base, 8))
    x, g = torch.randn(200, 128).to(dtype), torch.randn(200, 64).to(dtype)
    exact = copy.deepcopy(layer).double()
    wanted = gradients(exact, exact, x.double(), g.double())
    for got, true in zip(gradients(layer, layer, x, g), wanted, strict=True):
        assert (got - true).norm() < 0.5 * torch.finfo(dtype).eps * true.norm()
    assert layer.A.dtype == layer.B.dtype == torch.float32


HALVES = {
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "float32, autocast": (torch.float32, torch.bfloat16),
    "bfloat16, autocast": (torch.bfloat16, torch.bfloat16),
    "float16, autocast": (torch.float16, torch.float16),
}


@pytest.mark.parametrize(("dtype", "low"), HALVES.values(), ids=HALVES)
def test_half_precision_keeps_no_wider_input(dtype, low):
    """For backward a stack keeps at most 105% of what full fine-tuning keeps of it."""

    def kept(model):
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {}

        def note(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.zeros(1, 512, 64, dtype=dtype)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
            torch.autocast("cpu", low, enabled=low is not None),
        ):
            model(x)
        return sum(size for key, size in sizes.items() if key not in known)

    parts = [nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64)]
    full = nn.Sequential(*(copy.deepcopy(p) for p in 3 * parts)).to(dtype)
    ours = copy.deepcopy(full)
    freeze_all(ours)
    inject_lora(ours, rank=8)
    assert kept(ours) <= 1.05 * kept(full)


def test_meta_base():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096))
    layers = inject_lora(model, rank=8)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert count_trainable(model) == 2 * 8 * (4096 + 4096)
    assert layers[0](torch.empty(3, 4096, device="meta")).shape == (3, 4096)
    merge_lora(model)
    assert count_total(model) == 2 * (4096 * 4096 + 4096)


def test_reset_parameters_after_to_empty():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(500, 3))
    (layer,) = inject_lora(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        layer.A.fill_(torch.nan), layer.B.fill_(torch.nan)
    layer.reset_parameters()
    assert layer.A.std().item() == pytest.approx(1 / 4, rel=0.1)
    assert not layer.B.any() and layer.A.requires_grad and layer.B.requires_grad
    torch.manual_seed(5)
    layer.reset_parameters()
    A = layer.A.detach().clone()
    torch.manual_seed(5)
    assert torch.equal(
        LoRALinear(nn.Linear(500, 3, device="meta").to_empty(device="cpu")).A, A
    )


def test_autocast():
    layer = awake(LoRALinear(nn.Linear(4, 3)))
    x = torch.randn(2, 5, 4)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), y, rtol=0.03, atol=0.1)


def test_merging_under_autocast_is_that_without():
    model = mlp(torch.float32)
    awake(inject_lora(model)[0])
    expected = merge_lora(copy.deepcopy(model)).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        one = model[0].merged()
        merge_lora(model)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name])
    assert torch.equal(one.weight, expected["0.weight"])


# --- Freezing ---


@pytest.mark.parametrize("freeze", [freeze_all, inject_lora])
def test_a_frozen_weight_does_not_move_by_an_old_gradient(freeze):
    model = mlp()
    model(torch.randn(4, 5, dtype=torch.float64)).sum().backward()
    before = [p.clone() for p in model.parameters()]
    parameters = list(model.parameters())
    freeze(model)
    assert all(p.grad is None and not p.requires_grad for p in parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert not any(optimizer.state.get(p) for p in parameters)


# --- Injection ---


class Plain(nn.Module):
    """A parameter of its own and a few children, called one after the other."""

    def __init__(self, children):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        for i, child in enumerate(children):
            self.add_module(f"part{i}", child)

    def forward(self, x):
        for child in self.children():
            x = self.gain * child(x)
        return x


def linears(dtype):
    return st.booleans().map(lambda bias: nn.Linear(4, 4, bias=bias, dtype=dtype))


def trees(dtype):
    leaves = (
        linears(dtype)
        | st.builds(nn.Tanh)
        | st.builds(lambda: nn.LayerNorm(4, dtype=dtype))
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3).map(
                lambda parts: nn.Sequential(*parts)
            )
            | st.lists(inner, min_size=1, max_size=3).map(Plain)
        ),
        max_leaves=8,
    )


@given(tree=trees(torch.float64), rank=st.integers(1, 5), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=80)
def test_inject_train_merge_on_random_trees(tree, rank, seed):
    model = Plain([tree, nn.Linear(4, 4, dtype=torch.float64)])
    torch.manual_seed(seed)
    original = copy.deepcopy(model)
    targets = [n for n, m in original.named_modules() if isinstance(m, nn.Linear)]
    x = torch.randn(3, 4, dtype=torch.float64)

    freeze_all(model)
    layers = inject_lora(model, rank=rank)
    assert [n for n, m in model.named_modules() if isinstance(m, LoRALinear)] == targets
    assert len(layers) == len(targets)
    assert count_trainable(model) == rank * 8 * len(targets)
    assert count_total(model) == count_total(original) + rank * 8 * len(targets)
    assert torch.equal(model(x), original(x))

    for i, layer in enumerate(layers):
        awake(layer, seed + i)
    y = model(x)
    assert merge_lora(model) is model
    assert torch.allclose(model(x), y, rtol=1e-9, atol=1e-9)
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in original.named_modules()
    }
    assert list(model.state_dict()) == list(original.state_dict())
    assert count_total(model) == count_total(original)
    model.load_state_dict(original.state_dict())
    assert torch.equal(model(x), original(x))


def test_injecting_twice_leaves_one_layer_of_wrappers():
    model = mlp()
    layers = inject_lora(model)
    before = snapshot(model)
    assert inject_lora(model, rank=2) == []
    assert_unchanged(model, before)
    model.append(nn.Linear(3, 3, dtype=torch.float64))
    (new,) = inject_lora(model, rank=2)
    assert new is model[3] and [model[0], model[2]] == layers
    assert inject_lora(layers[0]) == []


@pytest.mark.parametrize("training", [True, False])
def test_wrappers_are_in_the_mode_of_their_model(training):
    model = mlp().train(training)
    inject_lora(model)
    assert all(module.training is training for module in model.modules())
    merge_lora(model)
    assert all(module.training is training for module in model.modules())


def test_one_linear_under_two_names_gets_one_wrapper():
    shared = nn.Linear(4, 4)
    inner = nn.ModuleDict({"c": shared})
    model = nn.ModuleDict({"a": shared, "b": shared, "d": inner, "e": inner})
    (layer,) = inject_lora(model)
    assert model["a"] is model["b"] is model["d"]["c"] is layer and layer.base is shared
    awake(layer)
    x = torch.randn(2, 4)
    y = layer(x)
    merge_lora(model)
    assert model["a"] is model["b"] is model["d"]["c"] and type(model["a"]) is nn.Linear
    assert torch.allclose(model["a"](x), y, atol=1e-6)


def test_a_bare_use_of_a_wrapped_layer_gets_that_wrapper():
    shared = nn.Linear(4, 4)
    wrapper = LoRALinear(shared)
    model = nn.ModuleList([wrapper, shared])
    assert inject_lora(model) == []
    assert model[1] is wrapper and wrapper.base is shared


def test_only_the_target_class_is_wrapped():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Special(2, 2))
    assert inject_lora(model, target_class=Special) == [model[1]]
    assert type(model[0]) is nn.Linear


def test_parameters_outside_stay_trainable_unless_frozen():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    inject_lora(model)
    assert model[0].weight.requires_grad
    freeze_all(model)
    assert count_trainable(model) == 0


@pytest.mark.parametrize("no_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "adapted"), [(attention, 1), (encoder, 3)])
def test_modules_that_read_weights_themselves(make, adapted, training, no_grad):
    torch.manual_seed(0)
    model = make().train(training)
    by_hand = copy.deepcopy(model)
    layers = inject_lora(model)
    assert len(layers) == adapted
    # Oracle: torch's own module, with the update added to its weights.
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            awake(layer, len(name))
            with torch.no_grad():
                by_hand.get_submodule(name).weight += layer.scale * (layer.B @ layer.A)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    inputs = [x] * (3 if make is attention else 1)
    with torch.set_grad_enabled(not no_grad):
        outputs = [m(*inputs) for m in (model, by_hand)]
    y, expected = (out[0] if make is attention else out for out in outputs)
    assert torch.allclose(y, expected, atol=1e-10)
    if not no_grad:
        y.square().sum().backward()
        assert all(layer.A.grad.any() and layer.B.grad.any() for layer in layers)


# --- Merging ---


def test_merging_one_layer_leaves_the_wrapper_alone():
    layer = awake(LoRALinear(nn.Linear(4, 3, dtype=torch.float64)))
    x = torch.randn(2, 4, dtype=torch.float64)
    before, y = snapshot(layer), layer(x)
    merged = merge_lora(layer)
    assert type(merged) is nn.Linear and torch.allclose(merged(x), y, atol=1e-12)
    assert_unchanged(layer, before)
    assert not any(p.requires_grad for p in merged.parameters())


def test_merging_rounds_once_in_bfloat16():
    layer = awake(LoRALinear(nn.Linear(64, 64, dtype=torch.bfloat16), rank=4))
    wide = copy.deepcopy(layer).double()
    exact = wide.base.weight + wide.scale * (wide.B @ wide.A)
    error = (merge_lora(layer).weight.double() - exact).abs()
    assert (error <= 0.51 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-4).all()


def test_merging_is_in_float32_even_if_the_adapters_are_not():
    layer = awake(LoRALinear(nn.Linear(64, 64)))
    layer.to(torch.bfloat16)
    wide = copy.deepcopy(layer).double()
    exact = wide.base.weight + wide.scale * (wide.B @ wide.A)
    error = (layer.merged().weight.double() - exact).abs()
    assert (error <= 0.51 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_sum_that_overflows_is_not_merged(single, dtype):
    model = mlp(dtype)
    wrapper = inject_lora(model, rank=1, alpha=1)[1]
    nn.init.constant_(wrapper.A, 1)
    nn.init.constant_(wrapper.B, torch.finfo(dtype).max / 2)
    assert merge_lora(copy.deepcopy(wrapper)).weight.isfinite().all()
    wrapper.scale = 3.0
    before = snapshot(model)
    name, kind = "base" if single else "2", str(dtype)
    with pytest.raises(ValueError, match=f"^cannot merge {name}: .* overflows {kind}$"):
        merge_lora(wrapper if single else model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("part", ["base.weight", "A", "B"])
def test_what_is_not_finite_already_is_merged_as_it_is(part):
    layer = awake(LoRALinear(nn.Linear(3, 2)))
    layer.get_parameter(part).data[0, 0] = math.inf
    merged = merge_lora(layer).weight
    assert torch.equal(merged.isfinite(), layer.weight.isfinite())
    assert not merged.isfinite().all()


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(
    ("register", "what"),
    [
        ("register_forward_hook", "forward"),
        ("register_forward_pre_hook", "forward pre"),
        ("register_full_backward_hook", "backward"),
        ("register_full_backward_pre_hook", "backward pre"),
    ],
)
def test_a_wrapper_with_a_hook_is_not_merged(register, what, single):
    model = mlp()
    wrapper = inject_lora(model)[1]
    hook = getattr(wrapper, register)(lambda *args: None)
    before, name = snapshot(model), "base" if single else "2"
    with pytest.raises(ValueError, match=f"^cannot merge {name}: .* a {what} hook, wh"):
        merge_lora(wrapper if single else model)
    assert_unchanged(model, before)
    hook.remove()
    assert type(merge_lora(wrapper)) is nn.Linear


@pytest.mark.parametrize("single", [True, False])
def test_a_wrapper_whose_forward_was_replaced_is_not_merged(single):
    """Some libraries add hooks in this way."""
    model = mlp()
    wrapper = inject_lora(model)[1]
    wrapper.forward = lambda x: 2 * LoRALinear.forward(wrapper, x)
    before, name = snapshot(model), "base" if single else "2"
    with pytest.raises(
        ValueError, match=f"^cannot merge {name}: .* a forward of its o"
    ):
        merge_lora(wrapper if single else model)
    assert_unchanged(model, before)
    del wrapper.forward
    assert type(merge_lora(wrapper)) is nn.Linear


def test_merging_a_model_without_wrappers_changes_nothing():
    model = mlp()
    before = snapshot(model)
    assert merge_lora(merge_lora(model)) is model
    assert_unchanged(model, before)


@pytest.mark.parametrize("case", ["tied", "tied bias", "two wrappers", "bare use"])
def test_merging_a_shared_weight_is_refused(case):
    head, other = nn.Linear(4, 9), nn.Linear(4, 4)
    if case == "tied bias":
        partner = nn.LayerNorm(9)
        head.bias = partner.bias
    model = nn.ModuleDict({"other": other, "head": head})
    inject_lora(model)
    if case == "tied":  # after the injection, which would have left it alone
        partner = nn.Embedding(9, 4)
        partner.weight = head.weight
    elif case == "two wrappers":
        partner = LoRALinear(head)
    elif case == "bare use":
        partner = head
    model["partner"] = partner
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot merge head"):
        merge_lora(model)
    assert_unchanged(model, before)


# --- Bad input ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be an integer of at least 1, got 0"),
        ({"rank": -1}, ValueError, "got -1"),
        ({"rank": 2.0}, ValueError, "got 2.0"),
        ({"rank": "4"}, ValueError, "got '4'"),
        ({"rank": True}, ValueError, "got True"),
        ({"rank": None}, ValueError, "got None"),
        ({"alpha": float("nan")}, ValueError, "alpha must be a finite number, got nan"),
        ({"alpha": float("inf")}, ValueError, "got inf"),
        ({"alpha": 10**400}, ValueError, "alpha must be a finite number, got 1000"),
        ({"rank": 10**13}, RuntimeError, "not enough memory|allocate"),
        (
            {"base": nn.Linear(2, 2).to(torch.float8_e4m3fn)},
            TypeError,
            r"one of .*, got \(2, 2\) in torch.float8_e4m3fn",
        ),
        ({"alpha": "8"}, ValueError, "got '8'"),
        ({"alpha": True}, ValueError, "alpha must be a finite number, got True"),
        ({"alpha": -float("inf")}, ValueError, "got -inf"),
        ({"alpha": np.float32("inf")}, ValueError, "alpha must be .* got np.float32"),
        (
            {"base": nn.Conv2d(1, 1, 1)},
            TypeError,
            "base must be a plain nn.Linear or define dense_weight\\(\\), got Conv2d",
        ),
        ({"base": LoRALinear(nn.Linear(2, 2))}, TypeError, "got LoRALinear"),
        ({"base": nn.LazyLinear(2)}, TypeError, "it has a forward pre hook"),
        (
            {"base": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))},
            TypeError,
            "its weight is computed, no parameter",
        ),
    ],
)
def test_bad_settings_are_refused(arguments, error, message):
    arguments = {"base": nn.Linear(2, 2)} | arguments
    trainable = [p.requires_grad for p in arguments["base"].parameters()]
    with pytest.raises(error, match=message):
        LoRALinear(**arguments)
    assert [p.requires_grad for p in arguments["base"].parameters()] == trainable


def test_integer_weights_are_refused():
    base = nn.Linear(2, 2)
    base.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"got \(2, 2\) in torch\.int8"):
        LoRALinear(base)


def test_the_largest_alpha_is_accepted():
    assert (
        LoRALinear(nn.Linear(2, 2), 1, sys.float_info.max).scale == sys.float_info.max
    )


def test_an_injection_that_breaks_off_replaces_nothing(monkeypatch):
    """As when memory runs out at the second layer."""
    model, made = mlp(), []

    def parameter(tensor):
        made.append(tensor)
        if len(made) > 2:
            raise MemoryError
        return nn.Parameter(tensor)

    monkeypatch.setattr(core.checks, "parameter", parameter)
    with pytest.raises(MemoryError):
        inject_lora(model)
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_numbers_of_other_libraries_are_accepted():
    layer = LoRALinear(nn.Linear(2, 2), np.int64(3), np.float32(6))
    assert layer.scale == 2.0 and type(layer.scale) is float


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (
            nn.Linear(2, 2),
            {},
            ValueError,
            "cannot replace the root Linear: pass what holds it",
        ),
        (
            nn.Sequential(nn.Tanh()),
            {},
            ValueError,
            "^no layer to adapt in Sequential. Layers: none; tied .*: none; .*: none$",
        ),
        (
            nn.Sequential(nn.Tanh(), nn.Conv1d(1, 1, 1)),
            {"target_class": (nn.Linear,)},
            ValueError,
            "Layers: none; tied .*: none; other modules with matrices: 1 Conv1d$",
        ),
        (mlp(), {"target_class": nn.Conv2d}, ValueError, "Layers: none; .* 2 Linear$"),
        (mlp(), {"targets": "3"}, ValueError, "name is '3' to adapt .*: 0, 2; tied"),
        (mlp(), {"targets": ["0"]}, TypeError, r"regular expression, got \['0'\]"),
        (mlp(), {"targets": "("}, ValueError, r"regular expression, got '\(': miss"),
        (mlp(), {"rank": 0}, ValueError, "rank must be an integer of at least 1"),
        (mlp(), {"alpha": float("nan")}, ValueError, "alpha must be a finite number"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1)),
            {"target_class": (nn.Linear, nn.Conv2d)},
            TypeError,
            "^1 must .*, got Conv2d",
        ),
        (
            nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)),
            {},
            TypeError,
            "^1 must .* it has a forward pre hook",
        ),
    ],
)
def test_a_refused_injection_leaves_the_model_as_it_was(
    model, arguments, error, message
):
    modules = [(name, id(m)) for name, m in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    with pytest.raises(error, match=message):
        inject_lora(model, **arguments)
    assert [(name, id(m)) for name, m in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), rng)


# --- Living in PyTorch ---


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: inject_and_load(model.state_dict()),
    ],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_survives_copies(duplicate):
    model = mlp()
    for i, layer in enumerate(inject_lora(model)):
        awake(layer, i)
    x = torch.randn(3, 5, dtype=torch.float64)
    y = model(x)
    twin = duplicate(model)
    assert torch.equal(twin(x), y)
    assert count_trainable(twin) == count_trainable(model)
    with torch.no_grad():
        model[0].B.zero_()
    assert torch.equal(twin(x), y)


def inject_and_load(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    model = mlp()
    inject_lora(model)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    return model


def test_functional_call_and_vmap():
    layer = awake(LoRALinear(nn.Linear(4, 3, dtype=torch.float64)))
    x = torch.randn(5, 4, dtype=torch.float64)
    As = torch.randn(6, *layer.A.shape, dtype=torch.float64)
    ys = torch.vmap(lambda A: torch.func.functional_call(layer, {"A": A}, (x,)))(As)
    for A, y in zip(As, ys, strict=True):
        layer.A.data = A
        assert torch.allclose(layer(x), y, atol=1e-12)


def backends():
    # Inductor compiles C++ at run time; without a compiler only the tracing can be
    # tested.
    reason = "inductor needs a C++ compiler (g++ or clang++), and none is on the PATH"
    missing = not (shutil.which("g++") or shutil.which("clang++"))
    yield "aot_eager"
    yield pytest.param("inductor", marks=pytest.mark.skipif(missing, reason=reason))


@pytest.mark.unmutated  # torch.compile cannot trace the switch inside a mutant
@pytest.mark.parametrize("backend", backends())
def test_compiles_without_graph_breaks(backend):
    model = mlp()
    for i, layer in enumerate(inject_lora(model)):
        awake(layer, i)
    x = torch.randn(3, 5, dtype=torch.float64)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-12)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_counts_shared_parameters_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert count_total(model) == count_trainable(model) == 16
    freeze_all(model)
    assert (count_total(model), count_trainable(model)) == (16, 0)
