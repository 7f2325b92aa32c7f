"""`lora.layers` against PEFT, on small random models; the rest is refused by name."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from lora import (
    bases,
    count_trainable,
    freeze_all,
    inject_lora,
    layers,
    merge_lora,
    variants,
)
from lora.adapters import add_adapter, load_adapter, parts_of, save_adapter, set_adapter
from lora.nf4 import quantize_model
from lora.peft_files import CONFIG, WEIGHTS, layout
from tests.lora.models import assert_unchanged, snapshot

IDS = torch.arange(2, 12).view(2, 5)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a chapter registers, here for one test alone."""
    monkeypatch.setattr(bases, "REGISTERED", {})
    bases.register(Conv1D, lambda weight: weight.T)
    bases.register(FalconLinear, lambda weight: weight)
    bases.register(nn.Conv2d, lambda weight: weight.flatten(1), layers.LoRAConv2d)
    bases.register(nn.Embedding, lambda weight: weight.T, layers.LoRAEmbedding)


def real(kind, **settings):
    """A model of transformers', small and random."""
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**settings)).eval()


def gpt2(kind="GPT2LMHeadModel"):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}
    return real(kind, **sizes, n_positions=8)


def falcon():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return real("FalconModel", **sizes, vocab_size=50, multi_query=False)


def phi():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return real("PhiModel", **sizes, vocab_size=50, intermediate_size=24)


def resnet():
    return real(
        "ResNetModel",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
    )


def mixtral():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 24, "vocab_size": 50}
    return real("MixtralModel", **sizes, num_local_experts=4)


def out(model):
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if "pixel_values" in model.forward.__code__.co_varnames:
        image = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()
        return model(pixel_values=image).last_hidden_state
    found = model(input_ids=IDS)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


CASES = {  # the model, and which of its layers
    "GPT-2": (gpt2, r".*\.(c_attn|c_proj|c_fc)"),
    "GPT-2, lookups": (lambda: gpt2("GPT2Model"), r"wte|wpe|.*c_fc"),
    "Falcon": (falcon, r".*\.(query_key_value|dense)"),
    "Phi": (phi, r".*\.(q_proj|fc1)"),
    "ResNet": (resnet, r".*\.convolution"),
}


def quietly(function, *arguments, **options):
    """What PEFT says of Conv1D and lookups is not at issue."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def awake(model, targets):
    """The model with adapters that do something."""
    inject_lora(freeze(model), targets=targets, rank=2, alpha=3.0)
    for wrapper in bases.find(model, layers.LoRALinear).values():
        nn.init.normal_(wrapper.B, std=0.1)
    return model


def freeze(model):
    freeze_all(model)
    return model


def peft_twin(model, base):
    """PEFT's adapters with the same numbers; the key of each of its parameters."""
    wrappers = bases.find(model, layers.LoRALinear)
    theirs = quietly(
        get_peft_model,
        base,
        LoraConfig(r=2, lora_alpha=3, target_modules=[*wrappers]),
    )
    pairs = []
    for name, wrapper in wrappers.items():
        shapes = layout(wrapper.base, wrapper.rank)
        for factor, (key, shape) in zip((wrapper.A, wrapper.B), shapes.items()):
            part, *weight = key.split(".")
            path = ".".join(["base_model.model", name, part, "default", *weight])
            its = theirs.get_parameter(path)
            assert its.shape == torch.Size(shape)
            its.data = factor.detach().reshape(shape).clone()
            pairs.append((factor, its))
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    return theirs.eval(), pairs


close = torch.testing.assert_close


@pytest.mark.parametrize(("make", "targets"), CASES.values(), ids=CASES)
def test_equals_peft(make, targets):
    """Forward, one step of AdamW, merge."""
    base, model = make(), awake(make(), targets)
    theirs, pairs = peft_twin(model, make())
    assert not torch.allclose(out(model), out(base), atol=1e-3)
    close(out(model), out(theirs), atol=1e-5, rtol=1e-5)
    for m, factors in ((model, [p for p, _ in pairs]), (theirs, [p for _, p in pairs])):
        optimizer = torch.optim.SGD(factors, lr=0.1)
        out(m).square().mean().backward()
        optimizer.step()
    assert all(p.grad.any() for p, _ in pairs)
    for p, q in pairs:
        close(p.reshape(q.shape), q, atol=1e-6, rtol=1e-4)
    after = out(model)
    merged, plain = merge_lora(model), quietly(theirs.merge_and_unload)
    close(out(merged), after, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == base.state_dict().keys()
    for name, weight in plain.state_dict().items():
        close(merged.state_dict()[name], weight, atol=1e-6, rtol=1e-5)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]


@pytest.mark.parametrize(("make", "targets"), CASES.values(), ids=CASES)
def test_files_are_peft_s(make, targets, tmp_path):
    model = awake(make(), targets)
    layers.save_lora(model, tmp_path / "ours")
    theirs = quietly(PeftModel.from_pretrained, make(), tmp_path / "ours").eval()
    close(out(theirs), out(model), atol=1e-6, rtol=1e-5)
    config = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert config["fan_in_fan_out"] is (make not in (falcon, phi, resnet))
    theirs, _ = peft_twin(model, make())
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    again = make()
    assert len(layers.load_lora(again, tmp_path / "theirs")) == len(
        bases.find(model, layers.LoRALinear)
    )
    close(out(again), out(model), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="wrapped already, merge_lora first"):
        layers.load_lora(again, tmp_path / "theirs")


def test_gpt2_with_many_adapters(tmp_path):
    """Chapter 5's adapters know a registered layer, its weight as it lies, its file."""
    model = gpt2()
    for place in add_adapter(model, "a", r".*c_attn", rank=2):
        layer = model.get_submodule(place)
        nn.init.normal_(layer.adapters["a"].B)
    set_adapter(model, "a")
    x = torch.randn(3, 16)
    assert layer.weight.shape == (16, 48)
    close(layer(x), x @ layer.weight + layer.bias)
    save_adapter(model, "a", tmp_path)
    again = gpt2()
    load_adapter(again, tmp_path, "b")
    set_adapter(again, "b")
    assert torch.equal(out(again), out(model))


@pytest.mark.parametrize(
    ("make", "targets"), [CASES["ResNet"], CASES["GPT-2, lookups"]]
)
def test_many_adapters_refuse_what_is_given_no_rows(make, targets, tmp_path):
    model = make()
    layers.save_lora(awake(make(), targets), tmp_path)
    before = snapshot(model)
    for change in (
        lambda: add_adapter(model, "a", targets),
        lambda: load_adapter(model, tmp_path, "a"),
    ):
        with pytest.raises(TypeError, match="takes no rows of numbers"):
            change()
    assert_unchanged(model, before)
    assert not parts_of(model)[0]


def test_the_weight_lies_as_the_base_s_does():
    model = awake(resnet(), CASES["ResNet"][1])
    wrapper = next(iter(bases.find(model, layers.LoRALinear).values()))
    assert wrapper.weight.shape == wrapper.base.weight.shape
    merged = wrapper.merged()
    assert isinstance(merged, nn.Conv2d)
    close(wrapper.weight * 1, merged.weight)
    (wrapper.weight * 1).sum().backward()
    assert wrapper.A.grad.any() and wrapper.B.grad.any()


def copied(weight):
    return weight.T.clone()


def test_a_view_that_is_a_copy_is_refused():
    bases.register(Conv1D, copied)
    with pytest.raises(TypeError, match="c_fc: its W is a copy"):
        inject_lora(gpt2(), targets=".*c_fc")


def test_a_view_that_is_no_matrix_is_refused():
    bases.register(nn.Conv2d, lambda weight: weight)
    with pytest.raises(TypeError, match=r"\(d_out, d_in\)"):
        inject_lora(resnet())


class Loud(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (Loud(5, 3), TypeError, "a must be .*Loud, which has a forward of its own"),
        (nn.Embedding(5, 3, max_norm=1.0), ValueError, "Embedding without max_norm"),
        (nn.Conv2d(4, 4, 3, groups=2), ValueError, "Conv2d without groups, got 2"),
        (nn.Conv1d(4, 4, 3), ValueError, "other modules with matrices: 1 Conv1d"),
        (nn.GRU(4, 4), ValueError, "other modules with matrices: 1 GRU"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(layer, error, message):
    model = nn.ModuleDict({"a": layer})
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject_lora(model)
    assert_unchanged(model, before)


def test_a_tied_lookup_is_left_alone():
    with pytest.warns(UserWarning, match="transformer.wte is left as it is: another"):
        inject_lora(gpt2(), targets="transformer.*")


# --- Some rows of a fused weight ---


def value_rows_gpt2():
    return range(32, 48)


def value_rows_falcon():
    return [h * 24 + i for h in range(2) for i in range(16, 24)]


@pytest.mark.parametrize(
    ("make", "targets", "rows"),
    [
        (gpt2, r".*\.h\.0\..*c_attn", value_rows_gpt2()),
        (falcon, r"h\.0\..*query_key_value", value_rows_falcon()),
    ],
)
def test_rows_of_a_fused_weight(make, targets, rows, tmp_path):
    """With the rows of the values alone, who attends to whom stays as it was."""
    model, base = freeze(make()), make()
    (wrapper,) = inject_lora(model, targets=targets, rank=2)
    layers.adapt_rows(wrapper, rows)
    assert count_trainable(model) == 2 * 16 + len(rows) * 2
    assert torch.equal(out(model), out(base))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 0.1
    )
    out(model).square().mean().backward()
    optimizer.step()
    rest = [i for i in range(48) if i not in rows]
    assert wrapper.B[list(rows)].all() and not wrapper.B[rest].any()
    assert not torch.allclose(out(model), out(base), atol=1e-3)
    for m in (model, base):
        m.set_attn_implementation("eager")
    first, then = (m(IDS, output_attentions=True).attentions[0] for m in (base, model))
    assert torch.equal(first, then)
    layers.save_lora(copy.deepcopy(model), tmp_path)
    theirs = quietly(PeftModel.from_pretrained, make(), tmp_path).eval()
    close(out(theirs), out(model), atol=1e-6, rtol=1e-5)
    after = out(model)
    close(out(merge_lora(model)), after, atol=1e-5, rtol=1e-5)


def test_rows_that_recur_are_refused():
    (wrapper,) = inject_lora(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"rows must be different .* got \[1, 1\]"):
        layers.adapt_rows(wrapper, [1, 1])


# --- New tokens ---

NEW = [3, 7, 40]


def test_new_tokens_equal_peft_s(tmp_path):
    """A tied head has the same rows; forward, a step, merge, files."""
    base, model = gpt2(), freeze(gpt2())
    rows = layers.train_tokens(model, "transformer.wte", NEW)
    assert count_trainable(model) == rows.numel() == 3 * 16
    close(out(model), out(base), atol=1e-6, rtol=1e-6)
    config = TrainableTokensConfig(target_modules=["wte"], token_indices=NEW)
    theirs = get_peft_model(gpt2(), config).eval()
    (its,) = [p for p in theirs.parameters() if p.requires_grad]
    for m, p in ((model, rows), (theirs, its)):
        out(m).square().mean().backward()
        p.data -= p.grad
    close(rows, its)
    close(out(model), out(theirs), atol=1e-6, rtol=1e-6)
    layers.save_tokens(model, tmp_path / "ours")
    back = quietly(PeftModel.from_pretrained, gpt2(), tmp_path / "ours").eval()
    close(out(back), out(model), atol=1e-6, rtol=1e-6)
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = gpt2()
        layers.load_tokens(again, tmp_path / folder)
        close(out(again), out(model), atol=1e-6, rtol=1e-6)
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    tensors["base_model.model.lm_head.trainable_tokens_delta"] += 1
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(ValueError, match="a tied head has other rows than"):
        layers.load_tokens(gpt2(), tmp_path / "theirs")
    after, plain = out(model), layers.merge_tokens(model)
    close(out(plain), after)
    changed = (plain.lm_head.weight != base.lm_head.weight).any(1)
    assert changed.nonzero().flatten().tolist() == NEW
    assert plain.lm_head.weight is plain.transformer.wte.weight
    merged = theirs.merge_and_unload()
    close(merged.lm_head.weight, plain.lm_head.weight)


def test_the_head_s_bias_is_kept():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Linear(4, 9)})
    model["b"].weight, x = model["a"].weight, torch.randn(2, 4)
    before = model["b"](x)
    layers.train_tokens(model, "a", [2, 5])
    close(model["b"](x), before)
    close(model["b"].weight, model["b"].base.weight)


@pytest.mark.parametrize("ids", [[1, 1], [50], [-1]])
def test_ids_that_are_not_there(ids):
    model = gpt2()
    before = snapshot(model)
    with pytest.raises(ValueError, match="ids must differ and be below 50"):
        layers.train_tokens(model, "transformer.wte", ids)
    assert_unchanged(model, before)


def test_tokens_of_what_is_no_lookup():
    with pytest.raises(TypeError, match="lm_head must be an Embedding"):
        layers.train_tokens(gpt2(), "lm_head", [1])
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.EmbeddingBag(9, 4)})
    model["b"].weight = model["a"].weight
    with pytest.raises(TypeError, match="EmbeddingBag is tied to a"):
        layers.train_tokens(model, "a", [1])


def test_other_kinds_of_files_are_refused(tmp_path):
    layers.save_lora(awake(gpt2(), ".*c_fc"), tmp_path)
    with pytest.raises(ValueError, match="holds LORA, no TRAINABLE_TOKENS"):
        layers.load_tokens(gpt2(), tmp_path)
    with pytest.raises(ValueError, match="has no adapters: inject_lora first"):
        layers.save_lora(gpt2(), tmp_path)


# --- What is left ---


def test_experts_are_left_and_counted():
    """A three-dimensional weight counts as its matrices."""
    bases.REGISTERED.pop(nn.Embedding)
    model = freeze(mixtral())
    with pytest.warns(UserWarning, match="2 MixtralExperts, 2 MixtralTopKRouter|2 Mix"):
        inject_lora(model, rank=2)
    text = layers.left_out(model)
    assert text == (
        "adapts 8 of 27 matrices; left: 1 in 1 Embedding, 2 in 2 MixtralTopKRouter, "
        f"16 in 2 MixtralExperts; {count_trainable(model):,} of 12,208 numbers train"
    )


def test_layers_with_several_adapters_are_adapted():
    model = freeze(nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 3)]))
    for name in "ab":
        add_adapter(model, name, "0", rank=1)
    text = layers.left_out(model)
    assert text.startswith("adapts 1 of 2 matrices; left: 1 in 1 Linear; 0 of ")


def test_what_trains_whole_is_not_left():
    model = freeze(nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)]))
    inject_lora(model, targets="0", rank=1)
    model[2].requires_grad_(True)
    text = "adapts 1 of 3 matrices; left: 1 in 1 Linear; trained whole: 1 in 1 Linear; "
    assert layers.left_out(model) == text + "13 of 34 numbers train"


def test_what_trains_beside_an_adapter_is_said_when_it_is_saved(tmp_path):
    """An injected one's own base, too, which would be lost as well."""
    model = freeze(nn.ModuleDict({"a": nn.Linear(2, 3), "head": nn.Linear(3, 2)}))
    several = copy.deepcopy(model)
    inject_lora(model, targets="a")
    add_adapter(several, "b", "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers.save_lora(model, tmp_path / "one")
        save_adapter(several, "b", tmp_path / "b")
        several["head"].requires_grad_(True)
        save_adapter(several, "b", tmp_path / "with head", head=several["head"])
    model["a"].base.requires_grad_(True)
    with pytest.warns(UserWarning, match="is not in the file: a.base.weight, a.base.b"):
        layers.save_lora(model, tmp_path / "one")
    with pytest.warns(UserWarning, match="is not in the file: head.weight, head.bias"):
        save_adapter(several, "b", tmp_path / "b")


def test_a_convolution_counts_as_one_matrix():
    """Its weight has three or four dimensions, and one W."""
    model = freeze(nn.ModuleList([nn.Conv1d(2, 3, 5), nn.Conv2d(2, 3, 5)]))
    with pytest.warns(UserWarning, match="left as they are: 1 Conv1d"):
        inject_lora(model)
    text = layers.left_out(model)
    assert text.startswith("adapts 1 of 2 matrices; left: 1 in 1 Conv1d; ")


def test_rows_of_a_tied_head_count_once():
    model = freeze(gpt2())
    layers.train_tokens(model, "transformer.wte", NEW)
    assert layers.left_out(model).startswith("adapts 2 of 11 matrices; left: 1 in 1 Em")


# --- What would be silently wrong ---


def test_a_weight_in_another_order_of_memory():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with pytest.raises(TypeError, match="layer: its W is a copy, .*contiguous"):
        bases.check_base("layer", conv)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.rand(1, 3, 5, 5)
    awake(model, None)
    model.to(memory_format=torch.channels_last)
    read = nn.functional.conv2d(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(read, model(x))


def test_padding_stays():
    model, pad = nn.Sequential(nn.Embedding(6, 4, padding_idx=0)), torch.tensor([0])
    (wrapper,) = inject_lora(model)
    optimizer = torch.optim.SGD([wrapper.A, wrapper.B], lr=0.1)
    for _ in range(2):
        (model(torch.tensor([0, 1, 2])) - 1).square().sum().backward()
        optimizer.step()
    assert not model(pad).any() and model(torch.tensor([1])).any()
    assert not merge_lora(model)[0].weight[0].any()


def test_gradients_by_frequency_are_peft_s():
    base = nn.Sequential(nn.Embedding(6, 4, scale_grad_by_freq=True))
    model, theirs = copy.deepcopy(base), None
    (wrapper,) = inject_lora(model, rank=2, alpha=2.0)
    nn.init.normal_(wrapper.B)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
    theirs = get_peft_model(base, config)
    own = theirs.base_model.model[0]
    own.lora_embedding_A["default"].data = wrapper.A.detach().clone()
    own.lora_embedding_B["default"].data = wrapper.B.detach().clone()
    ids = torch.tensor([1, 1, 1, 2])
    for net in (model, theirs):
        net(ids).square().sum().backward()
    grad = own.lora_embedding_A["default"].grad
    torch.testing.assert_close(wrapper.A.grad, grad)


def wrapped(make, rank=2):
    (wrapper,) = variants.inject(nn.Sequential(nn.Linear(6, 6)), make, rank=rank)
    return wrapper


@pytest.mark.parametrize(
    ("make", "rows", "error", "message"),
    [
        (variants.PiSSALinear, [0, 1], ValueError, "B has numbers in other rows"),
        (variants.DoRALinear, [0, 1], TypeError, "DoRALinear changes other rows"),
        (layers.LoRALinear, [], ValueError, "rows must be different indices below 6"),
        (layers.LoRALinear, [-1], ValueError, "rows must be different indices"),
        (layers.LoRALinear, [6], ValueError, "rows must be different indices"),
        (layers.LoRALinear, [True, False], ValueError, "rows must be different"),
        (layers.LoRALinear, [1.0], ValueError, "rows must be different indices"),
    ],
)
def test_rows_that_cannot_be_had_change_nothing(make, rows, error, message):
    wrapper, x = wrapped(make), torch.rand(3, 6)
    before = wrapper(x)
    with pytest.raises(error, match=message):
        layers.adapt_rows(wrapper, rows)
    assert torch.equal(wrapper(x), before) and wrapper.B.shape == (6, 2)


def test_layers_of_two_names_stay_one(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    base = copy.deepcopy(model)
    awake(model, None)
    with pytest.warns(UserWarning, match="several names: PEFT adapts the first alone"):
        layers.save_lora(model, tmp_path)
    (wrapper,) = layers.load_lora(base, tmp_path)
    assert base["a"] is base["b"] is wrapper
    assert torch.equal(wrapper.B, model["a"].B)


def test_names_that_would_be_one_in_a_file(tmp_path):
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    model["module"] = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    inject_lora(model)
    with pytest.raises(ValueError, match="fc and module.fc have one name"):
        layers.save_lora(model, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_what_is_made_in_inference_mode_can_train(tmp_path):
    model, tokens = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Embedding(6, 4))
    inject_lora(model)
    layers.save_lora(model, tmp_path / "lora")
    layers.train_tokens(tokens, "0", [1])
    layers.save_tokens(tokens, tmp_path / "tokens")
    new = {
        "file": nn.Sequential(nn.Linear(4, 4)),
        "pissa": nn.Sequential(nn.Linear(4, 4)),
        "vera": nn.Sequential(nn.Linear(4, 4)),
        "rows": nn.Sequential(nn.Linear(4, 4)),
        "tokens": nn.Sequential(nn.Embedding(6, 4)),
        "file of tokens": nn.Sequential(nn.Embedding(6, 4)),
    }
    with torch.inference_mode():
        layers.load_lora(new["file"], tmp_path / "lora")
        variants.inject(new["pissa"], variants.PiSSALinear, rank=2)
        variants.inject_vera(new["vera"], rank=2)
        layers.adapt_rows(inject_lora(new["rows"])[0], [0])
        layers.train_tokens(new["tokens"], "0", [1])
        layers.load_tokens(new["file of tokens"], tmp_path / "tokens")
    for name, net in new.items():
        x = torch.tensor([1]) if "tokens" in name else torch.ones(1, 4)
        net(x).square().sum().backward()
        trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
        assert trained and all(p.grad is not None for p in trained.values()), name


def with_a_hook():
    model = nn.Sequential(nn.Embedding(6, 4))
    model[0].register_forward_hook(lambda module, inputs, out: 10 * out)
    return model


def with_another_holder():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Identity())
    model[1].decoder = model[0].weight
    return model


def with_rows_already():
    model = nn.Sequential(nn.Embedding(6, 4))
    layers.train_tokens(model, "0", [0])
    return model


@pytest.mark.parametrize(
    ("make", "place", "message"),
    [
        (with_a_hook, "0", "0 has a forward hook"),
        (with_another_holder, "0", "another module uses the weight of 0"),
        (with_rows_already, "0.base", "rows of 0.base train already"),
    ],
)
def test_new_tokens_where_old_rows_would_be_used(make, place, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        layers.train_tokens(model, place, [1])
    assert_unchanged(model, before)


def test_ids_may_be_a_tensor_and_not_none():
    model = nn.Sequential(nn.Embedding(6, 4))
    with pytest.raises(ValueError, match="ids must differ"):
        layers.train_tokens(model, "0", [])
    assert layers.train_tokens(model, "0", torch.tensor([4, 1])).shape == (2, 4)


def test_files_of_new_tokens_are_of_one_lookup(tmp_path):
    model = nn.ModuleDict({n: nn.Embedding(6, 4) for n in "ab"})
    with pytest.raises(ValueError, match="there are: none"):
        layers.save_tokens(model, tmp_path)
    layers.train_tokens(model, "a", [0])
    layers.save_tokens(model, tmp_path)
    layers.train_tokens(model, "b", [1])
    with pytest.raises(ValueError, match="there are: a, b"):
        layers.save_tokens(model, tmp_path)
    other = nn.ModuleDict({"c": nn.Embedding(6, 4)})
    with pytest.raises(ValueError, match="must hold rows of one of c"):
        layers.load_tokens(other, tmp_path)


def test_new_rows_are_not_written_into_what_wraps_the_lookup():
    model = nn.Sequential(nn.Embedding(6, 4))
    layers.train_tokens(model, "0", [1])
    inject_lora(model, targets="0.base")
    with pytest.raises(ValueError, match="0 holds a LoRAEmbedding: merge_lora first"):
        layers.merge_tokens(model)
    merge_lora(model)
    assert type(layers.merge_tokens(model)[0]) is nn.Embedding


def test_a_weight_in_few_bits_is_left_too():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_model(model)
    inject_lora(model, targets="0")
    assert "adapts 1 of 2 matrices; left: 1 in 1 NF4Linear" in layers.left_out(model)
