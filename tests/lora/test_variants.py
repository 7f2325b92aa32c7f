"""`lora.variants` against PEFT's own: forward, one training step, merge, files."""

import ast
import inspect
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora import (
    LoRALinear,
    bases,
    count_trainable,
    freeze_all,
    inject_lora,
    layers,
    merge_lora,
    variants,
)
from lora.nf4 import quantize_model
from lora.variants import DoRALinear, LoRAFALinear, PiSSALinear, inject
from tests.lora.models import assert_unchanged, snapshot

PLACES = ["0", "2"]
RANK, ALPHA = 3, 6.0
close = torch.testing.assert_close


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).requires_grad_(
        False
    )


def x():
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def peft_s(**settings):
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": PLACES} | settings
    torch.manual_seed(2)
    return get_peft_model(base(), LoraConfig(**settings))


# Our parameter -> PEFT's, in a layer.
PAIRS = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
MORE = PAIRS | {"magnitude": "lora_magnitude_vector.default.weight"}
VECTORS = {"d": "vera_lambda_d.default", "b": "vera_lambda_b.default"}


def same(model, theirs, names=PAIRS):
    """Give both the same numbers, B not zero, and return the pairs of parameters."""
    pairs = []
    for place in PLACES:
        layer = model.get_submodule(place)
        for ours, its in names.items():
            path = f"base_model.model.{place}.{its}"
            pairs.append((layer.get_parameter(ours), theirs.get_parameter(path)))
    torch.manual_seed(3)
    for p, q in pairs:
        p.data += 0.1 * torch.randn_like(p)
        q.data = p.detach().clone()
    return pairs


def equal(model, theirs, pairs, optimizers=None):
    """The forward pass, a step of AdamW on a squared loss, and the merged weights."""
    close(model(x()), theirs(x()))
    before = [p.detach().clone() for p, _ in pairs]
    if optimizers is None:
        trained = [
            [p for p in m.parameters() if p.requires_grad] for m in (model, theirs)
        ]
        optimizers = [torch.optim.AdamW(part, 0.1) for part in trained]
    for m, optimizer in zip((model, theirs), optimizers):
        m(x()).square().sum().backward()
        optimizer.step()
    for p, q in pairs:
        close(p.detach(), q.detach(), rtol=1e-5, atol=1e-5)
    assert not any(torch.equal(p, q) for (p, _), q in zip(pairs, before))
    close(model(x()), theirs(x()), rtol=1e-4, atol=1e-5)
    after = model(x())
    merged, plain = merge_lora(model), theirs.merge_and_unload()
    assert [type(m) for m in merged] == [type(m) for m in base()]
    close(merged(x()), after, rtol=1e-4, atol=1e-5)
    for p, q in zip(merged.parameters(), plain.parameters()):
        close(p, q, rtol=1e-4, atol=1e-5)


def test_rslora():
    model, theirs = base(), peft_s(use_rslora=True)
    inject_lora(model, rank=RANK, alpha=variants.rslora_alpha(RANK, ALPHA))
    equal(model, theirs, same(model, theirs))


def test_loraplus():
    model, theirs = base(), peft_s()
    inject_lora(model, rank=RANK, alpha=ALPHA)
    pairs = same(model, theirs)
    groups = variants.loraplus_groups(model, 0.01, ratio=8)
    ours = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = {"lr": 0.01, "loraplus_lr_ratio": 8}
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates)
    equal(model, theirs, pairs, (ours, optimizer))


def test_loraplus_gives_each_parameter_one_rate():
    model = base()
    wrapper, _ = inject_lora(model)
    layers.adapt_rows(wrapper, [0, 1])
    slow, fast = variants.loraplus_groups(model, 0.5)
    assert len(slow["params"]) == len(fast["params"]) == 2
    assert (slow["lr"], fast["lr"]) == (0.5, 8.0)


def test_pissa():
    model, theirs = base(), peft_s(init_lora_weights="pissa")
    new = inject(model, PiSSALinear, rank=RANK, alpha=ALPHA)
    close(model(x()), base()(x()))
    for place, layer in zip(PLACES, new):
        its = theirs.get_submodule(f"base_model.model.{place}")
        close(layer.base.weight, its.base_layer.weight)
        close(layer.B @ layer.A, its.get_delta_weight("default") / layer.scale)
    equal(model, theirs, same(model, theirs))


def test_pissa_needs_a_weight_of_its_own():
    model = base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_model(model)
    before = snapshot(model)
    with pytest.raises(TypeError, match="base must hold its weight, got NF4Linear"):
        inject(model, PiSSALinear, rank=2)
    assert_unchanged(model, before)


def test_dora():
    model, theirs = base(), peft_s(use_dora=True)
    inject(model, DoRALinear, rank=RANK, alpha=ALPHA)
    close(model(x()), base()(x()))
    for layer in (model[0], model[2]):
        close(layer.magnitude, layer.base.weight.norm(dim=1))
    equal(model, theirs, same(model, theirs, MORE))


def test_lora_fa():
    """PEFT's layer with A frozen, and any optimizer."""
    model, theirs = base(), peft_s()
    inject(model, LoRAFALinear, rank=RANK, alpha=ALPHA)
    same(model, theirs)
    for n, p in theirs.named_parameters():
        p.requires_grad_("lora_B" in n)
    equal(model, theirs, same(model, theirs, {"B": PAIRS["B"]}))


def test_where_peft_s_lora_fa_departs(monkeypatch):
    """Its optimizer's first step, had we put (A Aᵀ)⁻¹ / s² before Adam's."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    model, theirs = base(), peft_s()
    new = inject(model, LoRAFALinear, rank=RANK, alpha=ALPHA)
    pairs = same(model, theirs)
    its = create_lorafa_optimizer(theirs, RANK, ALPHA, lr=0.1)
    for m in (model, theirs):
        m(x()).square().sum().backward()
    moved = [q.detach().clone() for _, q in pairs]
    its.step()
    for layer, (_, q), old in zip(new, pairs[1::2], moved[1::2]):
        right = layer.B.grad @ torch.linalg.inv(layer.A @ layer.A.T) / layer.scale**2
        close(q - old, -0.1 * right.sign(), atol=0.01, rtol=0)  # its eps is larger
        assert (right.sign() != layer.B.grad.sign()).any(), "not the plain step"


def test_lora_fa_keeps_no_input_for_backward():
    kept = {}
    for wrapper in (LoRALinear, LoRAFALinear):
        layer, sizes = wrapper(nn.Linear(64, 64), rank=2), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.shape) or t, lambda t: t
        ):
            layer(torch.randn(9, 64))
        kept[wrapper] = torch.Size((9, 64)) in sizes
    assert kept == {LoRALinear: True, LoRAFALinear: False}


def vera():
    return get_peft_model(base(), VeraConfig(r=RANK, target_modules=PLACES))


def test_vera():
    model, theirs = base(), vera()
    new = variants.inject_vera(model, rank=RANK)
    for layer, place in zip(new, PLACES):
        its = theirs.get_submodule(f"base_model.model.{place}")
        close(layer.A, its.vera_A["default"][:, : layer.A.shape[1]])
        close(layer.B, its.vera_B["default"][: len(layer.B)])
    assert torch.equal(model(x()), base()(x()))
    assert count_trainable(model) == RANK + 8 + RANK + 5
    layers_share = [layer.A.untyped_storage().data_ptr() for layer in new]
    assert len(set(layers_share)) == 1
    equal(model, theirs, same(model, theirs, VECTORS))


KINDS = {
    "LoRA-FA": (lambda m: inject(m, LoRAFALinear, rank=2), 2),
    "PiSSA": (lambda m: inject(m, PiSSALinear, rank=2), 4),
    "VeRA": (lambda m: variants.inject_vera(m, rank=7), 7),
    "rsLoRA": (lambda m: inject_lora(m, rank=2, alpha=3 * 2**0.5), 2),
}


@pytest.mark.parametrize(("kind", "rank"), KINDS.values(), ids=KINDS)
def test_saved_as_plain_lora_that_peft_loads(kind, rank, tmp_path):
    model = base()
    for layer in kind(model):
        for p in layer.parameters():
            p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    layers.save_lora(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base(), tmp_path)
    close(theirs(x()), model(x()), rtol=1e-4, atol=1e-5)
    again = base()
    (first, _) = layers.load_lora(again, tmp_path)
    assert first.rank == rank
    close(again(x()), model(x()), rtol=1e-4, atol=1e-5)


def test_dora_is_no_plain_lora(tmp_path):
    model = base()
    inject(model, DoRALinear)
    with pytest.raises(ValueError, match=r"0: DoRA is no s B A"):
        layers.save_lora(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "wrapper", [LoRAFALinear, PiSSALinear, DoRALinear, "VeRA"], ids=str
)
def test_the_weight_is_what_forward_applies(wrapper, monkeypatch):
    """Of a registered base, too: W lies there the other way round."""
    monkeypatch.setattr(bases, "REGISTERED", {})
    bases.register(Conv1D, lambda weight: weight.T)
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 6))
    nn.init.normal_(model[0].bias)
    freeze_all(model)
    if wrapper == "VeRA":
        (layer,) = variants.inject_vera(model, rank=2)
    else:
        (layer,) = inject(model, wrapper, rank=2)
    for p in layer.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    y = layer(x())
    assert layer.weight.shape == (6, 5)
    close(x() @ layer.weight + layer.bias, y, rtol=1e-4, atol=1e-5)
    assert type(layer.merged()) is Conv1D
    close(layer.merged()(x()), y, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no layer|cannot replace"):
        inject(layer.merged(), LoRAFALinear)


def test_what_is_given_no_rows_is_refused(monkeypatch):
    monkeypatch.setattr(bases, "REGISTERED", {})
    flat = lambda weight: weight.flatten(1)  # noqa: E731
    bases.register(nn.Conv2d, flat, layers.LoRAConv2d)
    model = nn.Sequential(nn.Conv2d(2, 2, 1))
    with pytest.raises(TypeError, match="0: Conv2d takes no rows of numbers"):
        inject(model, DoRALinear)
    assert type(model[0]) is nn.Conv2d


def test_injecting_twice_changes_nothing():
    model = base()
    inject(model, LoRAFALinear)
    assert inject(model, DoRALinear) == []


@pytest.mark.unmutated  # a mutant's source is that of all of them
def test_each_is_at_most_twenty_lines():
    """Without blank lines, comments and docstrings, as `core` is counted."""
    names = "inject", "rslora_alpha", "loraplus_groups", "inject_vera"
    names += "LoRAFALinear", "PiSSALinear", "DoRALinear", "VeRALinear"
    for name in names:
        tree = ast.parse(inspect.getsource(getattr(variants, name)))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                first = node.body[0]
                if isinstance(first, ast.Expr) and isinstance(
                    first.value, ast.Constant
                ):
                    node.body = node.body[1:] or [ast.Pass()]
        assert len(ast.unparse(tree).replace("\n\n", "\n").splitlines()) <= 20, name


def test_loraplus_goes_by_the_factor_not_by_a_part_s_name():
    model = nn.ModuleDict({"B": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    wrappers = inject_lora(model)
    layers.adapt_rows(wrappers[1], [0, 1])
    slow, fast = variants.loraplus_groups(model, 1.0)
    assert [id(p) for p in slow["params"]] == [id(w.A) for w in wrappers]
    shapes = [p.shape for p in fast["params"]]
    assert fast["params"][0] is wrappers[0].B and shapes == [(4, 4), (2, 4)]


@pytest.mark.parametrize(
    ("wrapper", "rank", "alpha", "change", "message"),
    [
        (PiSSALinear, 2, -8.0, None, "PiSSA needs alpha > 0"),
        (PiSSALinear, 4, 4.0, None, "a rank up to 3, got 4.0 and 4"),
        (DoRALinear, 2, 2.0, lambda W: W[1].zero_(), "a row of W is zero"),
        (PiSSALinear, 2, 2.0, lambda W: W.fill_(torch.nan), "svd"),
    ],
)
def test_what_a_variant_cannot_start_from(wrapper, rank, alpha, change, message):
    """The second layer is at fault, and the first one stays as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    if change:
        with torch.no_grad():
            change(model[1].weight)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(model)
    with pytest.raises(Exception, match=message) as caught:
        inject(model, wrapper, rank=rank, alpha=alpha)
    wanted = "while 0 was" if alpha < 0 else "while 1 was"
    assert any(wanted in note for note in caught.value.__notes__)
    if message != "svd":  # a NaN is not equal to itself
        assert_unchanged(model, before)
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_vera_on_a_base_in_half_precision():
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    (wrapper,) = variants.inject_vera(model, rank=4)
    nn.init.ones_(wrapper.b)
    x = torch.ones(2, 8).bfloat16()
    out = model(x)
    assert out.dtype == torch.bfloat16
    exact = x.float() @ wrapper.add_to(wrapper.base.weight.float()).T
    torch.testing.assert_close(
        out.float(), exact + wrapper.bias.float(), atol=0.1, rtol=0.05
    )
