"""`lora.bases`: what may be adapted, which layers, and what is refused by its name."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from lora import (
    LoRALinear,
    freeze_all,
    inject_lora,
    merge_lora,
)
from lora.bases import find
from tests.lora.models import assert_unchanged, attention, awake, mlp, snapshot

# --- What is a base ---


class Masked(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class Parent(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.inner = nn.Linear(4, 4)


def hooked(register):
    layer = nn.Linear(4, 4)
    getattr(layer, register)(lambda module, *args: None)
    return layer


def replaced():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    return layer


NO_BASE = {
    "own forward": (lambda: Masked(4, 4), "got Masked, which has a forward of its own"),
    "hook": (lambda: hooked("register_forward_hook"), "has a forward hook"),
    "pre-hook": (lambda: hooked("register_forward_pre_hook"), "has a forward pre hook"),
    "backward": (lambda: hooked("register_full_backward_hook"), "has a backward hook"),
    "backward pre": (
        lambda: hooked("register_full_backward_pre_hook"),
        "has a backward pre hook",
    ),
    "replaced": (replaced, r"dense_weight\(\), but its forward was replaced$"),
    "own call": (lambda: Called(4, 4), "got Called, which has a __call__ of its own"),
    "child": (lambda: Parent(4, 4), r"it has submodules: \['inner'\]"),
}


@pytest.mark.parametrize(("make", "message"), NO_BASE.values(), ids=NO_BASE)
def test_what_is_no_plain_linear_call_is_refused_by_name(make, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"odd": make()}))
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"^1\.odd must be a plain .*" + message):
        inject_lora(model)
    assert_unchanged(model, before)
    with pytest.raises(TypeError, match=r"^base must be a plain .*" + message):
        LoRALinear(make())
    assert len(inject_lora(model, targets="0")) == 1  # the rest can be adapted


@pytest.mark.parametrize("single", [True, False])
def test_a_base_that_got_a_hook_later_is_not_merged(single):
    model = mlp()
    layer = inject_lora(model)[1]
    layer.base.register_forward_hook(lambda module, args, y: 2 * y)
    before = snapshot(model)
    with pytest.raises(TypeError, match="base must" if single else "^2 must"):
        merge_lora(layer if single else model)
    assert_unchanged(model, before)


class Packed(nn.Module):
    """No nn.Linear: keeps twice the transposed weight, and opts in."""

    def __init__(self, d_in, d_out, bias=True, dtype=torch.float64):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("codes", 2 * torch.randn(d_in, d_out, dtype=dtype))
        self.register_buffer("bias", torch.randn(d_out, dtype=dtype) if bias else None)
        self.inner = nn.Linear(2, 2)  # an affair of its own

    def dense_weight(self):
        return self.codes.T / 2

    def forward(self, x):
        y = x @ self.codes / 2
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_class_that_opts_in_is_a_base(dtype, bias, training):
    torch.manual_seed(0)
    model = nn.Sequential(Packed(5, 3, bias, dtype), nn.Tanh(), nn.Linear(3, 3))
    model.to(dtype).train(training)
    x = torch.randn(4, 5, dtype=dtype)
    layer, _ = inject_lora(model, rank=2)
    assert type(layer.base) is Packed and type(layer.base.inner) is nn.Linear
    assert layer.A.dtype == torch.promote_types(dtype, torch.float32)
    awake(layer)
    y, rng = layer(x), torch.get_rng_state()
    merged = merge_lora(model)[0]
    assert torch.equal(torch.get_rng_state(), rng)
    assert type(merged) is nn.Linear and merged.weight.dtype == dtype
    assert merged.training is training
    assert not any(p.requires_grad for p in merged.parameters())
    # the weight is rounded once, y at each product: by units of the largest entries
    unit = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-13
    assert (merged(x) - y).abs().max() <= unit * y.abs().max()
    wide = copy.deepcopy(layer).double()
    exact = wide.base.dense_weight() + 4 * wide.B @ wide.A
    assert torch.equal(merged.weight, exact.to(dtype)) or dtype == torch.float64


def test_a_wrong_dense_weight_is_refused():
    layer = Packed(5, 3)
    layer.out_features = 4
    with pytest.raises(TypeError, match=r"shape \(4, 5\) in one of .*, got \(3, 5\)"):
        inject_lora(nn.Sequential(layer))


def test_a_root_that_opts_in_is_refused():
    with pytest.raises(ValueError, match="cannot replace the root Packed"):
        inject_lora(Packed(5, 3))


def test_the_plain_subclass_of_attention_is_a_base_and_keeps_its_class():
    model = attention()
    kind = type(model.out_proj)
    assert kind is not nn.Linear
    with pytest.warns(UserWarning, match="left as they are: 1 MultiheadAttention"):
        (layer,) = inject_lora(model)
    assert type(merge_lora(awake(layer))) is kind


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (r".*\.(q|v)", ["0.q", "0.v", "1.q", "1.v"]),
        (r"1\..*", ["1.q", "1.k", "1.v"]),
        ("0.q", ["0.q"]),
        (re.compile("0.Q", re.IGNORECASE), ["0.q"]),
        ("", None),
        ("q", None),  # part of a name is not enough
        (r"0\.", None),
    ],
)
def test_targets_match_whole_names(targets, names):
    blocks = [nn.ModuleDict({n: nn.Linear(2, 2) for n in "qkv"}) for _ in range(2)]
    model = nn.Sequential(*blocks)
    if names is None:
        before = snapshot(model)
        there = r"Layers: 0\.q, 1\.q, 0\.k, 1\.k, 0\.v, 1\.v; tied"
        with pytest.raises(ValueError, match=there):
            inject_lora(model, targets=targets)
        assert_unchanged(model, before)
    else:
        layers = inject_lora(model, targets=targets)
        assert list(find(model, LoRALinear)) == names
        assert [model.get_submodule(n) for n in names] == layers
        assert inject_lora(model, targets=targets) == []


@pytest.mark.parametrize(
    ("number", "there"),
    [(4, "0.q, 1.q, 2.q, 3.q, head"), (12, "0.q, ..., 11.q (12), head")],
)
def test_the_layers_that_there_are_are_listed_by_name(number, there):
    blocks = [nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(number)]
    model = nn.Sequential(*blocks)
    model.head = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=re.escape(f"Layers: {there}; tied")):
        inject_lora(model, targets="none")


def test_a_target_gets_its_wrapper_under_all_its_names():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(2, 2)})
    assert inject_lora(model, targets="b") == [model["a"]] == [model["b"]]
    assert type(model["c"]) is nn.Linear


def test_a_name_that_begins_like_another_is_found():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    assert len(inject_lora(model)) == 2
    merge_lora(model)
    assert type(model["fc"]) is type(model["fc2"]) is nn.Linear


def test_layers_that_share_their_bias_alone_are_wrapped():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["a"].bias = model["b"].bias
    assert len(inject_lora(model)) == 2
    with pytest.raises(ValueError, match="cannot merge a: another module shares"):
        merge_lora(model)


def test_layers_tied_to_each_other_are_all_named():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["a"].weight = model["b"].weight
    with pytest.raises(ValueError, match="tied to another module: a, b; "):
        inject_lora(model)


def test_a_tied_layer_is_left_alone_with_a_warning():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["embed"].weight
    before = snapshot(model)
    for targets in (None, "head"):
        message = "no layer .*Layers: head; tied to another module: head"
        with pytest.raises(ValueError, match=message):
            inject_lora(model, targets=targets)
        assert_unchanged(model, before)
    model["body"] = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="^head is left as it is: another module uses"):
        assert inject_lora(model) == [model["body"]]
    assert model["head"].weight is model["embed"].weight
    assert model["head"].weight.requires_grad
    merge_lora(model)


@pytest.mark.parametrize("arguments", [{}, {"targets": ".*"}])
def test_what_is_no_layer_is_said_unless_targets_are_given(arguments):
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inject_lora(model, **arguments)
    expected = ["only linear layers are changed, left as they are: 1 Conv1d"]
    assert [str(w.message) for w in caught] == ([] if arguments else expected)


@pytest.mark.unmutated  # a mutant's switch is a caller of its own
def test_a_warning_points_to_the_line_that_injects():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["embed"].weight
    model["body"], model["conv"] = nn.Linear(4, 4), nn.Conv1d(2, 2, 1)
    with pytest.warns(UserWarning, match="left as") as caught:
        inject_lora(model)
    assert [w.filename for w in caught] == [__file__] * 2


def test_an_ordinary_injection_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mlp()
        inject_lora(model)
        inject_lora(model)


# --- Real models, small and random ---

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
LLAMA = SMALL | {"num_key_value_heads": 1}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
WHISPER = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
WHISPER |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
WHISPER |= {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
WHISPER |= {"vocab_size": 50, "num_mel_bins": 4, "pad_token_id": 0}
WHISPER |= {"max_source_positions": 8, "decoder_start_token_id": 1}
IDS = torch.arange(2, 12).view(2, 5)
TEXT = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS}
SPEECH = {"input_features": torch.ones(2, 4, 16), "decoder_input_ids": IDS}
TIED = "is left as it is: another module uses its weight"
LEFT = "only linear layers are changed, left as they are: "

REAL = {  # class, configuration, input, number of adapters, what is said
    "BERT": ("BertForMaskedLM", SMALL, TEXT, 13, [f"cls.predictions.decoder {TIED}"]),
    "Llama": ("LlamaForCausalLM", LLAMA, TEXT, 15, []),
    "Llama, tied": (
        "LlamaForCausalLM",
        LLAMA | {"tie_word_embeddings": True},
        TEXT,
        14,
        [f"lm_head {TIED}"],
    ),
    "T5": (
        "T5ForConditionalGeneration",
        T5 | {"vocab_size": 50},
        PAIR,
        32,
        [f"lm_head {TIED}"],
    ),
    "ViT": (
        "ViTForImageClassification",
        SMALL | {"image_size": 8, "patch_size": 4},
        {"pixel_values": torch.ones(2, 3, 8, 8)},
        13,
        [f"{LEFT}1 ViTEmbeddings, 1 Conv2d"],
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        WHISPER,
        SPEECH,
        32,
        [f"proj_out {TIED}", f"{LEFT}2 Conv1d"],
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        LLAMA | {"num_local_experts": 2},
        TEXT,
        9,
        [f"{LEFT}2 MixtralTopKRouter, 2 MixtralExperts"],
    ),
}


def real(kind, config):
    import transformers

    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    return kind(kind.config_class(**config)).eval()


@pytest.mark.parametrize(
    ("kind", "config", "inputs", "adapted", "said"), REAL.values(), ids=REAL
)
def test_a_real_model_is_adapted_trained_and_merged(
    kind, config, inputs, adapted, said
):
    model = real(kind, config)
    keys = list(model.state_dict())
    # Without gradients: torch.matmul takes another path where its input asks for one.
    with torch.no_grad():
        before = model(**inputs).logits
    freeze_all(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers = inject_lora(model)
    assert [str(w.message) for w in caught if w.category is UserWarning] == said
    assert len(layers) == adapted
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * adapted
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        assert all(layer.B.grad is not None for layer in layers)
        optimizer.step()
    after = model(**inputs).logits
    assert not torch.allclose(after, before, atol=1e-2)
    assert list(merge_lora(model).state_dict()) == keys
    assert torch.allclose(model(**inputs).logits, after, atol=1e-4)
    model.tie_weights()
    assert torch.allclose(model(**inputs).logits, after, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "there"),
    [
        ("GPT2LMHeadModel", "Layers: lm_head; tied to another module: lm_head; .*"),
        ("GPT2Model", "Layers: none; tied to another module: none; .*"),
    ],
)
def test_gpt2_has_no_linear_layers_and_is_told_so(kind, there):
    model = real(kind, {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50})
    with pytest.raises(ValueError, match=there + "with matrices: 8 Conv1D$"):
        inject_lora(model)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(0),
        lambda w: w.data.clamp_(0, 0),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1),
        lambda w: setattr(w, "data", torch.zeros(4, 4)),
        lambda w: setattr(w, "requires_grad", True),
        lambda w: w.requires_grad_(False),
        lambda w: w.register_hook(print),
        lambda w: torch.add(torch.ones(4, 4), 1, out=w),
        nn.init.zeros_,
        nn.init.kaiming_uniform_,
    ],
)
def test_what_would_write_into_a_computed_weight_is_refused(write):
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)
    inject_lora(model)
    before = model(x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight that is computed"):
        write(model[0].weight)
    assert torch.equal(model(x), before)
    assert torch.equal(model[0].weight.data, model[0].base.weight)


@pytest.mark.parametrize(
    "write",
    [
        lambda plain, w: plain.copy_(w),
        lambda plain, w: plain.zero_().add_(w),
        lambda plain, w: plain.__setitem__(slice(None), w),
        lambda plain, w: setattr(plain, "data", w.data.clone()),
        lambda plain, w: torch.mul(w, 1, out=plain),
    ],
)
def test_a_computed_weight_may_be_written_into_another_tensor(write):
    model, plain = nn.Sequential(nn.Linear(4, 4)), torch.zeros(4, 4)
    awake(inject_lora(model)[0])
    with torch.no_grad():
        write(plain, model[0].weight)
    assert torch.equal(plain, model[0].add_to(model[0].base.weight))
