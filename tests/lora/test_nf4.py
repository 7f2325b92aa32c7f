"""`lora.nf4` against bitsandbytes' own CPU functions and against dense layers."""

import copy
import io
import pickle
import warnings

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lora import LoRALinear, freeze_all, inject_lora, merge_lora
from lora.formats import DYNAMIC, NF4
from lora.nf4 import (
    FrozenProduct,
    NF4Linear,
    dequantize,
    double_dequantize,
    double_quantize,
    quantize,
    quantize_model,
)
from lora.study.search import load_minilm

BLOCKS = 32, 64, 128, 1024  # that bitsandbytes has, too


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles a kernel for each odd shape: minutes, same numbers."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def minilm():
    return load_minilm()[1]


def theirs(weight, block=64, double=False):
    """Codes and state of bitsandbytes, and the weight that it gives back.

    Flat: where a block spans rows, version 0.50.2 with AVX-512 takes the wrong scale
    (384 x 384 at block 256 comes back wrong by four times the largest error).
    """
    codes, state = bnb.quantize_4bit(
        weight.flatten(), blocksize=block, quant_type="nf4", compress_statistics=double
    )
    back = bnb.dequantize_4bit(codes, state)
    return codes.flatten(), state, back.view(weight.shape)


def linear(d_in=48, d_out=40, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(d_in, d_out, bias=bias, dtype=dtype)


# --- Bytes and round trips ---


@pytest.mark.parametrize("block", BLOCKS)
def test_real_weights_give_the_bytes_of_bitsandbytes(minilm, block):
    for name, layer in minilm.named_modules():
        if isinstance(layer, nn.Linear) and "layer.3" in name:
            W = layer.weight.detach()
            codes, scales = quantize(W, block)
            q, state, back = theirs(W, block)
            assert torch.equal(codes, q) and torch.equal(scales, state.absmax)
            assert torch.equal(dequantize(codes, scales, W.shape, block), back)
            assert codes.numel() == W.numel() // 2
            assert scales.numel() == W.numel() // block


ADVERSARIAL = {
    "constant": torch.full((8, 64), 0.3),
    "negative constant": torch.full((8, 64), -0.3),
    "zeros": torch.zeros(8, 64),
    "a block of zeros": torch.cat([torch.zeros(1, 64), torch.randn(7, 64)]),
    "one outlier": torch.randn(8, 64).index_fill(1, torch.tensor([5]), 1e4),
    "denormals": torch.randn(8, 64) * 1e-40,
    "the smallest": torch.full((8, 64), 1.4e-45),
    "huge": torch.randn(8, 64).clamp(-3, 3) * 1e38,
    "half": torch.randn(8, 64).half(),
    "bfloat16": torch.randn(8, 64).bfloat16(),
    "a partial block": torch.randn(7, 46),
    "odd": torch.randn(7, 33),
    "a single number": torch.tensor([[-2.5]]),
    "not contiguous": torch.randn(64, 8).T,
    "the levels": NF4.repeat(4).view(1, 64),
    "midpoints": torch.cat([(NF4[1:] + NF4[:-1]) / 2, NF4[-1:]]).repeat(4).view(1, 64),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("block", BLOCKS)
def test_adversarial_weights_give_those_of_bitsandbytes(name, block):
    W = ADVERSARIAL[name]
    codes, scales = quantize(W, block)
    q, state, back = theirs(W.contiguous(), block)
    ours = dequantize(codes, scales, W.shape, block)
    assert ours.isfinite().all()
    if not W.numel() % block:
        assert torch.equal(codes, q) and torch.equal(scales, state.absmax)
    assert torch.equal(ours.to(W.dtype), back.view(W.shape))


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=200),
    st.sampled_from([32, 64]),
)
@example([0.0] * 65 + [1e-45], 64)
@example([3e38] * 3, 32)
def test_any_weight_is_as_near_as_with_bitsandbytes(values, block):
    W = torch.tensor([values])
    back = dequantize(*quantize(W, block), W.shape, block)
    scale = W.abs().max()
    # in a last block that is shorter, bitsandbytes divides where we multiply
    both = back, theirs(W, block)[2]
    ours, their = ((w.double() - W.double()).abs() for w in both)
    assert (ours <= their + 1e-6 * scale + 1e-37).all()
    assert (their <= ours + 1e-6 * scale + 1e-37).all()


def test_two_codes_a_byte_the_first_in_the_upper_half():
    codes, scales = quantize(torch.tensor([[-2.0, 2.0, 0.0]]))
    assert codes.tolist() == [0 * 16 + 15, 7 * 16 + 7] and scales.tolist() == [2.0]
    assert dequantize(codes, scales, (1, 3)).tolist() == [[-2.0, 2.0, 0.0]]


def test_the_error_is_at_most_half_the_widest_gap():
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    back = dequantize(*quantize(W), W.shape)
    scale = W.view(-1, 64).abs().amax(1)
    assert ((back - W).view(-1, 64).abs().amax(1) <= scale * NF4.diff().max() / 2).all()
    assert (back.view(-1, 64).abs().amax(1) == scale).all()
    again = dequantize(*quantize(back), W.shape)
    assert torch.equal(again, back), "quantizing a second time changes nothing"


# --- Double quantization ---


def test_double_quantization_of_real_scales(minilm):
    differ = total = 0
    for layer in minilm.encoder.layer[0].modules():
        if isinstance(layer, nn.Linear):
            W = layer.weight.detach()
            scales = quantize(W)[1]
            codes, wide, mean = double_quantize(scales)
            state = theirs(W, double=True)[1]
            assert torch.equal(wide, state.state2.absmax) and mean == state.offset
            assert codes.dtype == torch.uint8 and codes.shape == scales.shape
            # bitsandbytes' kernel is inexact near the midpoints of 256 levels
            apart = (codes.int() - state.absmax.int()).abs()
            differ, total = differ + apart.bool().sum().item(), total + len(codes)
            back = double_dequantize(codes, wide, mean)
            other = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            ours, their = ((b - scales).abs() for b in (back, other))
            assert (ours <= their + 1e-7).all()
    assert differ < 0.01 * total


@pytest.mark.parametrize("n", [1, 255, 256, 257, 700])
def test_double_quantization_by_hand(n):
    scales = torch.rand(n, generator=torch.Generator().manual_seed(n))
    codes, wide, mean = double_quantize(scales)
    assert len(codes) == n and len(wide) == -(-n // 256) and mean.shape == ()
    back = double_dequantize(codes, wide, mean)
    for i in range(0, n, 256):
        part = (scales[i : i + 256] - mean).double()
        nearest = (part[:, None] - part.abs().max() * DYNAMIC.double()).abs().amin(1)
        off = (back[i : i + 256] - scales[i : i + 256]).abs().double()
        assert torch.allclose(off, nearest, atol=1e-6)


def test_a_quiet_block_among_loud_ones_is_lost_but_zeros_stay():
    """What double quantization costs: its error follows the loudest of 256 blocks."""
    layer = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1] *= 1e-4
    kept = NF4Linear.from_linear(layer, double=False).dense_weight()
    lost = NF4Linear.from_linear(layer).dense_weight()
    assert torch.equal(kept[0], torch.zeros(64)) and torch.equal(lost[0], kept[0])
    W = layer.weight[1].detach()
    assert (kept[1] - W).norm() < 0.2 * W.norm() < (lost[1] - W).norm()
    assert (lost[1] - W).abs().max() < 0.01 * layer.weight.abs().max()


# --- Bad input ---


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_numbers_that_are_none_are_refused(bad, dtype):
    W = torch.ones(4, 64, dtype=dtype)
    W[2, 3] = bad
    for function in (quantize, double_quantize):
        with pytest.raises(ValueError, match="must be finite in float32"):
            function(W)


def test_what_is_too_large_for_float32_is_refused():
    with pytest.raises(ValueError, match="must be finite in float32"):
        quantize(torch.tensor([1e300], dtype=torch.float64))
    with pytest.raises(ValueError, match="must be finite in float32"):
        double_quantize(torch.tensor([3e38, 3e38, -3e38, 3e38]) * 1.1)


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.tril(), self.bias)


def hooked():
    layer = linear()
    layer.register_forward_hook(lambda *args: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Embedding(4, 4), "got Embedding"),
        (Masked(4, 4), "got Masked, which has a forward of its own"),
        (LoRALinear(nn.Linear(4, 4)), "got LoRALinear"),
        (hooked(), "forward hook"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_base_is_refused(layer, text):
    with pytest.raises(TypeError, match=f"^linear must be a plain nn.Linear.*{text}"):
        NF4Linear.from_linear(layer)


# --- The layer ---


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40, 48), (7, 33), (1, 1), (300, 640)])
def test_the_layer_is_a_dense_one_with_the_weight_of_bitsandbytes(shape, bias, double):
    base = linear(*reversed(shape), bias=bias)
    before = copy.deepcopy(base.state_dict())
    layer = NF4Linear.from_linear(base, double=double)
    expected = theirs(base.weight.detach(), double=double)[2].view(shape)
    W = layer.dense_weight()
    # a scale's code may be the neighbour at a midpoint, see above
    near = 0.01 * quantize(base.weight)[1].max() if double else 0
    assert (W - expected).abs().max() <= near
    assert (layer.out_features, layer.in_features) == shape == W.shape
    x = torch.randn(2, 5, shape[1])
    assert torch.equal(layer(x), F.linear(x, W, base.bias))
    assert torch.equal(layer(x[0, 0]), F.linear(x[0, 0], W, base.bias))
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert not any(p.requires_grad for p in layer.parameters())
    assert torch.equal(layer.weight, W)


def test_bits_a_parameter():
    base = nn.Linear(1024, 1024, bias=False)
    bits = {
        double: 8 * sum(t.nbytes for t in layer.stored()) / 1024**2
        for double in (True, False)
        for layer in [NF4Linear.from_linear(base, double=double)]
    }
    assert bits[False] == 4 + 32 / 64
    assert bits[True] == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 1024**2
    layer = NF4Linear.from_linear(base)
    held = sum(t.nbytes for t in (*layer.buffers(), *layer.parameters()))
    assert held == sum(t.nbytes for t in layer.stored())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (3, 5, 48), (2, 3, 5, 48)])
def test_gradients_are_those_of_a_dense_layer(shape, double):
    layer, dense = NF4Linear.from_linear(linear(), double=double), linear()
    dense.weight.data = layer.weight.detach()
    grads = []
    for each in (layer, dense):
        each.bias.requires_grad_()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        y = each(x.requires_grad_())
        y.square().sum().backward()
        grads.append((x.grad, each.bias.grad))
    torch.testing.assert_close(*grads)


def test_backward_dequantizes_only_for_a_gradient_that_is_asked_for():
    layer, calls = NF4Linear.from_linear(linear()), []
    layer.bias.requires_grad_()

    def dense(*stored):
        calls.append(len(stored))
        return layer.dense(*stored)

    for needed in (False, True):
        x = torch.ones(2, 48, requires_grad=needed)
        y = FrozenProduct.apply(x, layer.bias, dense, *layer.stored())
        y.sum().backward()
    assert calls == [4] * 3  # forward; forward and backward


def test_by_default_blocks_of_64_with_scales_quantized():
    layer = NF4Linear(linear().weight)
    assert (layer.block, layer.is_double) == (64, True)
    state = NF4Linear.from_linear(linear()).get_extra_state()
    assert state.tolist() == [48, 40, 64, True]


def test_what_a_state_holds():
    parts = ["codes", "scales", "scales_of_scales", "mean", "_extra_state"]
    assert [*NF4Linear.from_linear(linear()).state_dict()] == ["bias", *parts]
    plain = NF4Linear.from_linear(linear(bias=False), double=False)
    assert [*plain.state_dict()] == ["codes", "scales", "_extra_state"]


def test_gradients_are_those_of_finite_differences():
    layer = NF4Linear.from_linear(linear(6, 4)).double()
    layer.bias.requires_grad_()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    function = lambda x, b: torch.func.functional_call(layer, {"bias": b}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, layer.bias))
    assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), (x,))


def test_no_dense_weight_is_kept_for_backward():
    layer = NF4Linear.from_linear(nn.Linear(256, 512))
    x, kept = torch.randn(3, 256, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or t, lambda t: t
    ):
        y = layer(x)
    own = {t.data_ptr() for t in layer.stored()}
    assert {t.data_ptr() for t in kept} == own
    assert sum(t.nbytes for t in kept) < 256 * 512
    y.sum().backward()
    assert torch.allclose(x.grad, layer.dense_weight().sum(0).expand(3, -1), atol=1e-5)


def test_a_change_between_forward_and_backward_is_noticed():
    layer = NF4Linear.from_linear(linear())
    y = layer(torch.randn(3, 48, requires_grad=True))
    layer.codes.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_move_to_another_dtype_leaves_the_stored_bytes(dtype):
    layer = NF4Linear.from_linear(linear())
    before, W = [t.clone() for t in layer.stored()], layer.dense_weight()
    layer.to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(layer.stored(), before, strict=True))
    assert layer.dense_weight().dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.dense_weight(), W.to(dtype))
    assert layer(torch.ones(2, 48, dtype=dtype)).dtype == dtype
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.ones(2, 48))
    assert torch.equal(layer.float().dense_weight(), W), "there and back"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_in_another_dtype_is_quantized_as_bitsandbytes_does(dtype):
    base = linear(dtype=dtype)
    layer = NF4Linear.from_linear(base, double=False)
    assert layer.dense_weight().dtype == dtype
    known = base.weight.detach().to(dtype if dtype.itemsize < 4 else torch.float32)
    assert torch.equal(layer.dense_weight(), theirs(known)[2].to(dtype))


def test_autocast_works_forward_and_backward():
    layer = NF4Linear.from_linear(linear())
    x = torch.randn(3, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    expected = layer.dense_weight().sum(0).expand(3, -1)
    assert torch.allclose(x.grad, expected, atol=0.02)


def test_copies_and_pickles():
    layer = NF4Linear.from_linear(linear())
    x = torch.randn(2, 48)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.codes.data_ptr() != layer.codes.data_ptr()


def test_no_memory_is_shared_with_the_source():
    base = linear()
    layer = NF4Linear.from_linear(base)
    y = layer(torch.ones(48))
    with torch.no_grad():
        base.weight.zero_()
        base.bias.zero_()
    assert torch.equal(layer(torch.ones(48)), y)


def test_mode_and_text():
    layer = NF4Linear.from_linear(linear().eval(), block=32, double=False)
    assert not layer.training
    text = "in_features=48, out_features=40, block=32, is_double=False, bias=True"
    assert text in repr(layer)
    assert "bias=False" in repr(NF4Linear.from_linear(linear(bias=False)))


# --- Saving and loading ---


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_layer_is_loaded(double, dtype):
    first, second = (
        NF4Linear.from_linear(linear(seed=i), double=double) for i in range(2)
    )
    second.to(dtype)
    second.load_state_dict(saved(first))
    assert torch.equal(second.dense_weight(), first.dense_weight().to(dtype))
    assert second.bias.dtype == dtype


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            lambda: NF4Linear.from_linear(linear(), block=32),
            "with .*'block': 32.* has .*'block': 64.* here",
        ),
        (lambda: NF4Linear.from_linear(linear(40, 48)), "with .*'in_features': 40"),
        (lambda: NF4Linear.from_linear(linear(), double=False), "'is_double': 0"),
        (lambda: linear(), "Missing key"),
    ],
)
def test_a_file_of_another_layer_is_refused(other, text):
    layer = NF4Linear.from_linear(linear(seed=1))
    before = layer.dense_weight()
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(saved(other()))
    if "Missing" not in text:  # a file of other bytes does not even begin to load
        assert torch.equal(layer.dense_weight(), before)
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict(saved(other()), strict=False)


def test_a_model_is_saved_and_loaded_with_its_adapter():
    def model(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 3))
        quantize_model(net)
        inject_lora(net, rank=2)
        for layer in (net[0], net[2]):
            nn.init.normal_(layer.B)
        return net

    first, second = model(0), model(1)
    x = torch.randn(5, 48)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(saved(first))
    assert torch.equal(first(x), second(x))


# --- A base for LoRA ---


def test_lora_wraps_it_and_trains_the_adapter_only():
    net = nn.Sequential(linear(), nn.Tanh(), linear(40, 3))
    quantize_model(net)
    freeze_all(net)
    first, second = inject_lora(net, rank=2)
    assert isinstance(first.base, NF4Linear) and first.A.dtype == torch.float32
    dense = copy.deepcopy(net)
    for i in (0, 2):
        base = nn.Linear(net[i].base.in_features, net[i].base.out_features)
        base.weight.data = net[i].base.dense_weight()
        base.bias.data = net[i].base.bias.detach().clone()
        dense[i].base = base.requires_grad_(False)
    for layer, twin in zip((first, second), (dense[0], dense[2])):
        nn.init.normal_(layer.B)
        twin.B.data = layer.B.detach().clone()
    x = torch.randn(7, 48)
    outs = [m(x) for m in (net, dense)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    for layer, twin in zip((first, second), (dense[0], dense[2])):
        for a, b in ((layer.A, twin.A), (layer.B, twin.B)):
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-5)
        assert layer.base.bias.grad is None
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    assert names == ["0.A", "0.B", "2.A", "2.B"]


def test_merging_gives_a_dense_layer_that_can_be_quantized_again():
    wrapper = LoRALinear(NF4Linear.from_linear(linear()), rank=2)
    nn.init.normal_(wrapper.B, std=0.01)
    merged = merge_lora(wrapper)
    assert type(merged) is nn.Linear
    expected = wrapper.base.dense_weight() + wrapper.scale * wrapper.B @ wrapper.A
    assert torch.allclose(merged.weight, expected, atol=1e-6)
    assert torch.equal(merged.bias, wrapper.base.bias)
    again = NF4Linear.from_linear(merged, double=False)
    expected = theirs(merged.weight.detach())[2]
    assert torch.equal(again.dense_weight(), expected)


def test_attention_reads_the_weight():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 2, batch_first=True)
    dense = copy.deepcopy(attention)
    with pytest.warns(UserWarning, match="only linear layers are changed"):
        quantize_model(attention)
    dense.out_proj.weight.data = attention.out_proj.dense_weight()
    x = torch.randn(2, 5, 64)
    assert torch.allclose(attention(x, x, x)[0], dense(x, x, x)[0], atol=1e-6)


# --- A whole model ---


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 4)))


def kinds(model):
    return {n: type(m) for n, m in model.named_modules() if not list(m.children())}


def test_all_layers_or_those_that_are_asked_for():
    model = small()
    new = quantize_model(model)
    assert [model[0], model[2][0]] == new and all(type(m) is NF4Linear for m in new)
    model = small()
    assert quantize_model(model, r"2\.\d") == [model[2][0]]
    assert type(model[0]) is nn.Linear
    assert quantize_model(model) == [model[0]], "the rest, not again"


def test_what_is_left_is_said_where_all_is_asked_for():
    def model():
        return nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))

    with pytest.warns(UserWarning, match="left as they are: 1 Conv1d$"):
        quantize_model(model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model(), "0")


@pytest.mark.unmutated  # a mutant's switch is a caller of its own
def test_a_warning_points_to_the_line_that_quantizes():
    parts = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
    model = nn.Sequential(*parts)
    model[2].weight = model[0].weight
    with pytest.warns(UserWarning, match="left as") as caught:
        quantize_model(model)
    assert [w.filename for w in caught] == [__file__] * 2


def test_a_model_that_is_quantized_twice_stays_as_it_is():
    model = small()
    model[0] = NF4Linear.from_linear(model[0], block=4, double=False)
    quantize_model(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = list(model.modules())
    assert quantize_model(model) == []
    assert list(model.modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_with_adapters_keeps_them():
    model = small()
    wrappers = inject_lora(model, rank=2)
    nn.init.normal_(wrappers[0].B)
    A = wrappers[0].A
    with pytest.warns(UserWarning, match="left as they are: 2 LoRALinear"):
        quantize_model(model)
    assert model[0] is wrappers[0] and model[0].A is A
    assert type(model[0].base) is NF4Linear


def test_a_layer_under_two_names_is_one_layer():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer})
    (new,) = quantize_model(model)
    assert model["a"] is model["b"] is new


def test_a_tied_head_is_left_with_a_warning():
    model = nn.ModuleDict({"e": nn.Embedding(9, 4), "l": nn.Linear(4, 9, bias=False)})
    model["body"] = nn.Linear(4, 4)
    model["l"].weight = model["e"].weight
    with pytest.warns(UserWarning, match="l is left as it is"):
        new = quantize_model(model)
    assert new == [model["body"]] and type(model["l"]) is nn.Linear


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: quantize_model(m, "q_proj"), ValueError, r"Layers: 0, 2\.0"),
        (lambda m: quantize_model(m, "("), ValueError, "targets must be a regular"),
        (lambda m: quantize_model(m, ["0"]), TypeError, "targets must be a regular"),
        (lambda m: quantize_model(m[0]), ValueError, "cannot replace the root Linear"),
        (lambda m: quantize_model(nn.Sequential(m[1])), ValueError, "no layer"),
    ],
)
def test_refused_and_unchanged(call, error, text):
    model = small()
    before = kinds(model)
    with pytest.raises(error, match=text):
        call(model)
    assert kinds(model) == before


def test_one_bad_layer_leaves_the_whole_model():
    model = small()
    with torch.no_grad():
        model[2][0].weight[1, 1] = torch.nan
    before = kinds(model)
    with pytest.raises(ValueError, match=r"^2\.0: a weight must be finite"):
        quantize_model(model)
    assert kinds(model) == before


def test_a_real_model(minilm):
    model = copy.deepcopy(minilm)
    new = quantize_model(model.encoder)
    assert len(new) == 36
    bits = 8 * sum(t.nbytes for m in new for t in m.stored())
    numbers = sum(m.in_features * m.out_features for m in new)
    assert 4.126 < bits / numbers < 4.128


def test_parts_that_do_not_belong_together_are_refused():
    codes, scales = quantize(torch.randn(5, 12), block=16)
    for wrong in (codes[:-1], torch.cat([codes, codes[:3]])):
        with pytest.raises(RuntimeError, match=rf"\[30\]' is .* size {len(wrong)}"):
            dequantize(wrong, scales, (5, 12), block=16)
    with pytest.raises(RuntimeError, match=r"\[4, 1\]' is invalid .* size 1"):
        dequantize(codes, scales[:1], (5, 12), block=16)
    with pytest.raises(RuntimeError, match=r"\[2, 1\]' is invalid .* size 4"):
        dequantize(codes, scales, (5, 12), block=32)
    codes, wide, mean = double_quantize(scales)
    with pytest.raises(RuntimeError, match=r"\[2, 1\]' is invalid .* size 1"):
        double_dequantize(codes, wide, mean, block=2)
