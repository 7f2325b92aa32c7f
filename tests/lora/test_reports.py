"""What users of LoRA libraries have reported, as kinds; for each, where it could occur.

1. Torch's defaults (dtype, device, mode) when the package is imported or called: the
   constants of `formats` (LEVELS, NF4, FP4, DYNAMIC); what is made at a call without a
   tensor to go by (P of `training.RandomSubspace`, the index of `adapters.route`, the
   rotation, network and order of `study.moons` and `study.training`, the values of
   `study.evidence`). All else is made by `new_…` or `…_like` of a given tensor.
2. A folder that does not determine the function: overlapping `alpha_pattern` and
   `rank_pattern`; a `scale` that was set by hand; two tensors for one layer; a layer
   with two names; weights and settings that name other layers.
3. Settings outside the state: rank, alpha and scale of `LoRALinear` and of each update
   in `Adapters`; shape, block and `double` of `NF4Linear`. `RandomSubspace` has P and
   theta_0 in its state. Which adapter is set or merged is no part of it, as train() and
   eval() are not; merged ones have other keys.
4. A size that agrees by chance: `route` alone goes by a size. It cannot know.
5. One object, two callers: `route` and `disable_adapters` are the only contexts, and
   belong to the thread or task that entered them. What changes the model for all
   (set, merge, add, delete, combine, load) is refused while anyone is inside.
6. What is made in inference mode: A and B (`LoRALinear`, `inject_lora`, `add_adapter`,
   `load_adapter`, `combine`), what is merged (`merge_lora`, `merge_adapter`), the bytes
   and bias of `NF4Linear`, P and z of `RandomSubspace`, the index of `route`.
7. Layers that were not asked for: `inject_lora`, `add_adapter`, `load_adapter` and
   `quantize_model` check those that they touch; `merge_…`, `save_adapter`,
   `set_adapter` those with adapters.
8. Cost against the number of layers: all that goes over layers.
9. How a text is written: only `adapter_config.json` is one.
10. Attributes that forward to the base: `weight` and `bias` of `LoRALinear`, `Adapters`
    and, for the stored weight, `NF4Linear`.
11. Refusals of a name: that of an adapter, given or taken from its folder.
12. Plain LoRA in PEFT's files: each setting that selects layers, names with what PEFT,
    DDP and torch.compile put in front, the output layer with the weights beside it.
13. What does not compose: `FrozenProduct` is the only `autograd.Function`.
15. Expressions from a stranger: `target_modules`, `exclude_modules`, `layers_pattern`,
    `rank_pattern`, `alpha_pattern`.
"""

import asyncio
import contextlib
import copy
import importlib
import io
import json
import sys
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5Model

from lora import LoRALinear, inject_lora, merge_lora, peft_files
from lora.adapters import (
    add_adapter,
    combine,
    delete_adapter,
    disable_adapters,
    load_adapter,
    merge_adapter,
    route,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora.nf4 import NF4Linear, quantize_model
from lora.study.training import RandomSubspace, train


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
    subspace = training.RandomSubspace(stack("a", "b"), 5, seed=1)
    subspace.z.data = numbers(5)
    results |= {"P": subspace.P, "subspace": subspace(x)}
    if torch.get_default_device().type != "cpu":
        return results  # the study makes its data and models there
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


# --- 2. The file determines the function ---


def awake(model, seed=0):
    """The model with each B drawn at random, so that its adapters do something."""
    for i, (name, p) in enumerate(model.named_parameters()):
        if name.endswith(".B"):
            p.data = numbers(*p.shape, seed=seed + i)
    return model


def saved(folder, names=("q", "v"), **settings):
    """A folder with an adapter of a stack, and the model that it is of."""
    model = stack(*names)
    add_adapter(model, "a", rank=2, **settings)
    save_adapter(awake(model), "a", folder)
    set_adapter(model, "a")
    return model


def change(folder, **settings):
    """Other settings in the folder, as one would write them with an editor."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("second", ["1.q", "^1.q", r"^1\.q", r".*q", r"1\.(q|v)"])
def test_two_patterns_for_one_layer_are_refused(tmp_path, key, second):
    """PEFT sorts them when it saves, and takes the first that matches."""

    def model():
        return nn.ModuleDict({i: stack("q", "v") for i in "01"})

    given = model()
    add_adapter(given, "a", ".*q", rank=2)
    save_adapter(given, "a", tmp_path)
    for patterns in ({"q": 3, second: 2}, {second: 2, "q": 3}):
        change(tmp_path, **{key: patterns})
        with pytest.raises(ValueError, match=rf"{key} gives [01]\.q both . and ., by"):
            load_adapter(model(), tmp_path, "x")
    change(tmp_path, **{key: {"q": 2, second: 2.0}})
    load_adapter(model(), tmp_path, "x")


def test_a_scale_that_was_set_is_saved(tmp_path):
    model, x = saved(tmp_path / "before"), numbers(3, 8)
    for layer in model:
        layer.adapters["a"].scale = 0.3
    save_adapter(model, "a", tmp_path / "after")
    again = stack("q", "v")
    load_adapter(again, tmp_path / "after")
    set_adapter(again, "after")
    torch.testing.assert_close(again(x), model(x))


def test_two_tensors_for_one_layer_are_refused(tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"module.{k}": 2 * v for k, v in tensors.items()}, file)
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(stack("q", "v"), tmp_path, "x")


def test_two_adapters_for_two_names_of_a_layer_are_refused(tmp_path):
    def model():
        q = linear()
        return nn.Sequential(OrderedDict(q=q, again=q))

    given, file = model(), tmp_path / "adapter_model.safetensors"
    add_adapter(given, "a")
    save_adapter(awake(given), "a", tmp_path)
    load_adapter(other := model(), tmp_path, "x")
    assert other.q is other.again
    tensors = load_file(file)
    tensors["base_model.model.again.lora_B.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match="again has another adapter under another name"
    ):
        load_adapter(model(), tmp_path, "x")


# --- 3. The state holds the settings ---


def injected(**settings):
    model = stack("q", "v")
    inject_lora(model, **settings)
    return awake(model)


def several(**settings):
    model = stack("q", "v")
    add_adapter(model, "a", **settings)
    set_adapter(model, "a")
    return awake(model)


def quantized(**settings):
    model = stack("q", "v")
    model.q = NF4Linear.from_linear(model.q, **settings)
    return model


def by_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_safetensors(state, folder):
    save_file(state, folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


WAYS = {
    "as it is": lambda state, _: state,
    "torch": lambda state, _: by_torch(state),
    "safetensors": by_safetensors,
    "a dictionary": lambda state, _: {k: v.cpu() for k, v in state.items()},
    "half": lambda state, _: {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()
    },
}
OTHERS = [
    (injected, {"alpha": 16}, {}),
    (injected, {"alpha": 10, "rank": 3}, {"alpha": 10.1, "rank": 3}),
    (several, {"alpha": 16}, {}),
    (several, {"alpha_pattern": {"v": 1}}, {}),
    (quantized, {"block": 32}, {}),
    (quantized, {"double": False}, {}),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("make", "settings", "others"), OTHERS)
def test_a_state_of_other_settings_is_refused(make, settings, others, way, tmp_path):
    state = WAYS[way](make(**settings).state_dict(), tmp_path)
    same, other = make(**settings), make(**others)
    same.load_state_dict(state)
    for strict in (True, False):
        with pytest.raises(
            RuntimeError, match=r"[qv][\w.]* was saved with .*, and has"
        ):
            other.load_state_dict(state, strict=strict)


def test_a_scale_that_was_set_is_in_the_state():
    model, other = injected(), injected()
    model.q.scale = 0.5
    with pytest.raises(
        RuntimeError, match="'scale': 0.5}, and has .*'scale': 2.0} here"
    ):
        other.load_state_dict(model.state_dict())
    other.q.scale = 0.5
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(numbers(3, 8)), other(numbers(3, 8)))


def test_a_state_without_settings_is_not_taken_for_whole():
    model = injected()
    state = {k: v for k, v in model.state_dict().items() if "_extra_state" not in k}
    assert {k.split(".", 1)[1] for k in state} == {"A", "B", "base.weight", "base.bias"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"q._extra_state"'):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)


# --- 4 and 5. Contexts ---


def routable():
    """A model with adapters "a", which is set, and "b"; x, and what each gives."""
    model, x = stack("q", "v"), numbers(4, 8, seed=9)
    answers = {None: model(x)}
    for name in "ab":
        add_adapter(model, name)
    awake(model)
    for name in "ba":
        set_adapter(model, name)
        answers[name] = model(x)
    return model, x, answers


def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


CONTEXTS = {
    "route": lambda model: route(model, ["b"] * 4),
    "disable_adapters": disable_adapters,
}


@pytest.mark.parametrize("kind", CONTEXTS)
def test_a_context_is_of_its_own_thread(kind):
    model, x, answers = routable()
    with CONTEXTS[kind](model):
        mine = answers["b" if kind == "route" else None]
        torch.testing.assert_close(model(x), mine)
        assert torch.equal(in_thread(lambda: model(x)), answers["a"])
        assert torch.equal(
            in_thread(lambda: model.q.weight + 0),
            model.q.adapters["a"].add_to(model.q.base.weight),
        )

        def inside():
            with route(model, [None, "a", "a", "b"]):
                return model(x)

        rows = [answers[n][i] for i, n in enumerate([None, "a", "a", "b"])]
        torch.testing.assert_close(in_thread(inside), torch.stack(rows))
        torch.testing.assert_close(model(x), mine)
    assert torch.equal(model(x), answers["a"])


@pytest.mark.parametrize("kind", CONTEXTS)
def test_a_context_is_of_its_own_task(kind):
    model, x, answers = routable()

    async def first(entered, left):
        with CONTEXTS[kind](model):
            entered.set()
            await left.wait()
            return model(x)

    async def second(entered, left):
        await entered.wait()
        y = model(x)
        left.set()
        return y

    async def both():
        events = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(first(*events), second(*events))

    with ThreadPoolExecutor(1) as pool:  # in this thread a browser's loop may run
        mine, other = pool.submit(asyncio.run, both()).result()
    torch.testing.assert_close(mine, answers["b" if kind == "route" else None])
    assert torch.equal(other, answers["a"])


def test_contexts_of_two_models_may_be_left_in_any_order():
    (one, x, ones), (two, _, twos) = routable(), routable()
    first, second = route(one, ["b"] * 4), disable_adapters(two)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(one(x), ones["a"]) and torch.equal(two(x), twos[None])
    second.__exit__(None, None, None)
    assert torch.equal(two(x), twos["a"])


SWITCHES = [
    lambda model: set_adapter(model, "b"),
    lambda model: merge_adapter(model, "b"),
    lambda model: delete_adapter(model, "b"),
    lambda model: add_adapter(model, "c"),
    lambda model: combine(model, {"a": 1.0}, "c"),
    lambda model: load_adapter(model, "nowhere"),
]


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kind", CONTEXTS)
def test_no_thread_changes_a_model_that_another_is_inside_of(kind, switch):
    model, x, answers = routable()

    def refused():
        with pytest.raises(
            ValueError, match=f"inside of {kind}: leave it first, in all"
        ):
            switch(model)

    with CONTEXTS[kind](model):
        refused()
        in_thread(refused)
    assert torch.equal(model(x), answers["a"])


def test_a_copy_made_inside_of_a_context_is_not_inside():
    model, x, answers = routable()
    with route(model, ["b"] * 4):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(x), answers["a"])
    set_adapter(twin, "b")


@pytest.mark.unmutated  # torch.compile cannot trace the switch inside a mutant
def test_a_compiled_model_knows_where_it_is():
    model, x, answers = routable()
    compiled = torch.compile(model, backend="eager")
    whole = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), answers["a"]) and torch.equal(
        whole(x), answers["a"]
    )
    with route(model, ["b"] * 4):
        torch.testing.assert_close(compiled(x), answers["b"])
        assert torch.equal(in_thread(lambda: compiled(x)), answers["a"])
    with disable_adapters(model):
        assert torch.equal(compiled(x), answers[None])
    assert torch.equal(compiled(x), answers["a"])


def recompute(reentrant, run, device="cpu"):
    """x's gradient through checkpoints inside of `route`; `run` calls `backward`."""
    model, x, _ = routable()
    model, x = model.to(device), x.to(device).requires_grad_()
    with route(model, ["b"] * 4):
        run(checkpoint(model, x, use_reentrant=reentrant).square().sum().backward)
    return x.grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_pass_in_another_thread_is_refused(reentrant):
    """As on a GPU, where it would compute again without the routed adapters."""

    def refused(backward):
        with pytest.raises(ValueError, match="inside of route a backward pass calls a"):
            in_thread(lambda: backward())

    def in_thread(function):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(function).result()

    assert recompute(reentrant, refused) is None
    assert recompute(reentrant, lambda backward: backward()) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_pass_on_a_gpu(reentrant):
    def refused(backward):
        with pytest.raises(ValueError, match="inside of route a backward pass calls a"):
            backward()

    def kept(backward):
        with torch.autograd.set_multithreading_enabled(False):
            backward()

    recompute(reentrant, refused, "cuda")
    got = recompute(reentrant, kept, "cuda").cpu()
    torch.testing.assert_close(got, recompute(reentrant, lambda backward: backward()))


class Experts(nn.Module):
    """Each token goes to one of two linear layers, as in a mixture of experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(linear(seed=i) for i in range(2))

    def forward(self, x, choice):
        y = torch.empty_like(x)
        for i, expert in enumerate(self.experts):
            y[choice == i] = expert(x[choice == i])
        return y


def test_what_route_cannot_know():
    """As many tokens as rows: each gets the adapter of another row, without a word."""
    model, x = Experts(), numbers(2, 2, 8)
    add_adapter(model, "a")
    awake(model)
    with disable_adapters(model):
        base = model(x, torch.tensor([[0, 0], [1, 1]]))
    with route(model, [None, "a"]):
        wrong = model(x, torch.tensor([[0, 0], [1, 1]]))
        with pytest.raises(
            ValueError, match="2 rows are routed, but a layer was given"
        ):
            model(x, torch.tensor([[0, 0], [0, 1]]))
    assert not torch.allclose(wrong[0, 1], base[0, 1]), "of the row without an adapter"


# --- 6. Parameters that can be trained ---


def trainable_adapters(model):
    add_adapter(model, "a")
    set_adapter(model, "a")


def sum_of_adapters(model):
    add_adapter(model, "a")
    combine(model, {"a": 0.5}, "b")
    set_adapter(model, "b")


def merged_adapter(model):
    add_adapter(model, "a")
    merge_adapter(model, "a")


def merged_wrappers(model):
    inject_lora(model)
    merge_lora(model)


MADE = [inject_lora, trainable_adapters, sum_of_adapters, merged_adapter]
MADE += [merged_wrappers, quantize_model]


@pytest.mark.parametrize("make", MADE)
def test_what_is_made_in_inference_mode_can_be_trained(make):
    model, x = stack("q", "v"), numbers(3, 8).requires_grad_()
    with torch.inference_mode():
        make(model)
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    model(x).square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_is_loaded_in_inference_mode_can_be_trained(tmp_path):
    saved(tmp_path)
    model = stack("q", "v")
    with torch.inference_mode():
        load_adapter(model, tmp_path, "a")
    set_adapter(model, "a")
    model(numbers(3, 8)).sum().backward()
    assert model.q.adapters["a"].A.grad is not None


def test_a_subspace_made_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        subspace = RandomSubspace(stack("q", "v"), 3)
    subspace(numbers(3, 8)).sum().backward()
    assert subspace.z.grad.abs().sum() > 0


def test_a_route_made_in_inference_mode_can_be_trained():
    model, x, _ = routable()
    with torch.inference_mode():
        context = route(model, ["a"] * 4)
    with context:
        model(x).sum().backward()
    assert model.q.adapters["a"].A.grad is not None


# --- 7. Only what was asked for ---


class Router(nn.Linear):
    """More than x Wᵀ + b, as in Phimoe and Llama 4."""

    def forward(self, x):
        return super().forward(x).softmax(-1)


def with_router():
    model = stack("q", "v", "router")
    model.router = Router(8, 8)
    return model


def test_a_layer_that_is_not_asked_for_is_not_checked(tmp_path):
    saved(tmp_path)
    model, x = with_router(), numbers(3, 8)
    load_adapter(model, tmp_path, "loaded")
    add_adapter(model, "a", "q|v")
    add_adapter(model, "b", exclude="router")
    save_adapter(model, "a", tmp_path / "again")
    merge_adapter(model, "a")
    unmerge_adapter(model)
    inject_lora(other := with_router(), targets="q|v")
    merge_lora(other)
    quantize_model(other, "q|v")
    other(x)
    for refused in (inject_lora, lambda m: add_adapter(m, "c"), quantize_model):
        with pytest.raises(TypeError, match="router must be a plain nn.Linear"):
            refused(with_router())


# --- 8. Cost ---


def calls(function):
    """How many functions are called, Python's and C's."""
    count = [0]

    def watch(frame, event, _):
        count[0] += event in ("call", "c_call")

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count[0]


def test_thousands_of_layers_are_saved_and_loaded(tmp_path):
    """Twice the layers, twice the work; to load 1,500 once took two minutes."""

    def model(n):
        return nn.ModuleList(nn.Linear(1, 1) for _ in range(n))

    def all_of_it(n):
        one, other, folder = model(n), model(n), tmp_path / str(n)
        add_adapter(one, "a", rank_pattern={".*7": 2}, alpha_pattern={".*3": 1.0})
        save_adapter(one, "a", folder)
        load_adapter(other, folder)
        for i in (0, 3, 7):
            update, again = (m[i].adapters[k] for m, k in ((one, "a"), (other, str(n))))
            assert (update.rank, update.alpha) == (again.rank, again.alpha)
        merge_adapter(other, str(n))
        third = model(n)
        inject_lora(third)
        merge_lora(third)
        quantize_model(model(n))

    all_of_it(100)
    all_of_it(600)
    few, many = (calls(lambda n=n: all_of_it(n)) for n in (200, 400))
    assert many < 2.1 * few


def test_settings_that_are_alike_are_written_once(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    saved(tmp_path, ["q", "v", "k"], alpha_pattern={"v": 1.0})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == {"^v": 1.0} and config["lora_alpha"] == 8


# --- 9. How a text is written ---


def test_settings_written_otherwise_are_the_same_saving(tmp_path):
    model, x = saved(tmp_path, alpha_pattern={"v": 1.0}), numbers(3, 8)
    file = tmp_path / "adapter_config.json"
    text = file.read_bytes()
    config = json.loads(text)
    of_peft = {"base_model_name_or_path": "me/mine", "task_type": "CAUSAL_LM"}
    for data in (
        text.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + text,
        json.dumps(config, sort_keys=True, separators=(",", ":")).encode(),
        text.replace(b"8.0", b"8").replace(b"1.0", b"1e0"),
        json.dumps(config | of_peft, indent=4).encode(),
        json.dumps(config).encode("utf-16"),
    ):
        file.write_bytes(data)
        again = stack("q", "v")
        load_adapter(again, tmp_path, "x")
        set_adapter(again, "x")
        assert torch.equal(again(x), model(x))
    for other in ({"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"v": 2}}):
        file.write_text(json.dumps(config | other))
        with pytest.raises(ValueError, match="of two savings"):
            load_adapter(stack("q", "v"), tmp_path, "x")


# --- 10. Attributes ---


def adapted_layers():
    for base in (linear(), NF4Linear.from_linear(linear())):
        yield base
        yield LoRALinear(copy.deepcopy(base))
        model = nn.ModuleDict({"q": copy.deepcopy(base)})
        add_adapter(model, "a")
        set_adapter(model, "a")
        yield model["q"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dtype_a_device_and_a_shape_cost_nothing(dtype, monkeypatch):
    for layer in adapted_layers():
        layer.to(dtype)
        whole = layer.weight.clone()
        with monkeypatch.context() as patch:
            for function in ("addmm", "cartesian_prod"):
                patch.setattr(torch, function, lambda *_, **__: 1 / 0)
            W = layer.weight
            assert isinstance(W, torch.Tensor)
            assert (W.dtype, W.shape, W.device) == (dtype, whole.shape, whole.device)
            assert (W.ndim, W.dim(), W.size(), W.size(0)) == (2, 2, (8, 8), 8)
            assert (len(W), W.numel(), W.is_meta, W.is_cuda) == (8, 64, False, False)
            assert layer.bias.dtype == dtype
            if type(layer) is not nn.Linear:
                with pytest.raises(ZeroDivisionError):
                    W + 0


def test_a_lazy_weight_is_used_as_any_tensor():
    layer = awake(nn.ModuleDict({"q": LoRALinear(linear())}))["q"]
    W = layer.add_to(layer.base.weight)
    for function in (
        lambda w: w @ w.T,
        lambda w: torch.cat([w, w]),
        lambda w: nn.functional.linear(numbers(3, 8), w),
        lambda w: w[0],
        lambda w: w.to(torch.float64),
        lambda w: torch.from_numpy(w.detach().numpy()),
        lambda w: torch.linalg.svdvals(w),
        lambda w: copy.deepcopy(w.detach()),
        lambda w: by_torch({"w": w.detach()})["w"],
    ):
        assert torch.equal(function(layer.weight), function(W))
    assert repr(layer.weight) == repr(W)
    assert layer.weight.requires_grad
    layer.weight.square().sum().backward()
    grads = layer.A.grad, layer.B.grad
    layer.A.grad = layer.B.grad = None
    W.square().sum().backward()
    assert torch.equal(grads[0], layer.A.grad) and torch.equal(grads[1], layer.B.grad)


def test_a_model_that_reads_a_dtype_is_routed():
    """T5 reads `wo.weight.dtype` in each block."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    model = T5Model(T5Config(vocab_size=30, **sizes)).eval()
    add_adapter(model, "a", r".*\.(wo|q)")
    ids = torch.randint(30, (3, 5))
    expected = []
    for name in (None, "a", "a"):
        set_adapter(awake(model), name)
        whole = model(input_ids=ids, decoder_input_ids=ids).last_hidden_state
        expected.append(whole[len(expected)])
    with route(model, [None, "a", "a"]):
        got = model(input_ids=ids, decoder_input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, torch.stack(expected))


# --- 11. Names ---


@pytest.mark.parametrize("name", ["train", "keys", "training", "forward"])
def test_a_name_that_torch_has_says_why(name):
    message = f"^name {name!r} is taken: nn.ModuleDict, .*: choose another"
    with pytest.raises(ValueError, match=message):
        add_adapter(stack("q"), name)


def test_a_folder_whose_name_cannot_be_an_adapter_s(tmp_path):
    saved(tmp_path / "checkpoint-1.5")
    model = stack("q", "v")
    with pytest.raises(
        ValueError, match="without dots, got 'checkpoint-1.5': give name="
    ):
        load_adapter(model, tmp_path / "checkpoint-1.5")
    assert load_adapter(model, tmp_path / "checkpoint-1.5", "mine") == "mine"


# --- 12. Plain LoRA in PEFT's files ---


def llama(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes | settings)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6)).logits


def peft_s(folder, model, **settings):
    """An adapter of PEFT's with random numbers, saved; the logits with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(model, LoraConfig(**settings))
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.data = numbers(*p.shape, seed=len(name)) / 2
        theirs.save_pretrained(folder)
    return logits(theirs)


UNSLOTH = (
    r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn)"
    r".*?(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj|q_proj)))"
)
PLAIN = [
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    {
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["layers"],
    },
    {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.1.self_attn.q_proj"],
    },
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": "all-linear"},
    {"target_modules": UNSLOTH},
    {"target_modules": r".*layers\.(0|2).*(self_attn|mlp).*(q|up)_proj$"},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": "lm_head"},
    {"target_modules": ["q_proj"], "alpha_pattern": {r".*layers\.1\.(self_attn).*": 3}},
    {
        "target_modules": ["q_proj"],
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 3},
    },
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", PLAIN, ids=range(len(PLAIN)))
def test_what_is_plain_lora_gives_peft_s_output(tmp_path, settings, tied):
    expected = peft_s(tmp_path, llama(tie_word_embeddings=tied), **settings)
    model = llama(tie_word_embeddings=tied)
    plain = logits(model)
    load_adapter(model, tmp_path, "x")
    assert torch.equal(logits(model), plain)
    set_adapter(model, "x")
    torch.testing.assert_close(logits(model), expected)
    assert not torch.allclose(plain, expected)


def test_another_base_beside_an_output_layer_is_refused(tmp_path):
    peft_s(tmp_path, llama(), target_modules=["lm_head"])
    model = llama()
    model.lm_head.weight.data[0, 0] += 1
    before = {k: v.clone() for k, v in model.state_dict().items()}
    message = "lm_head.base_layer.weight is not the weight that the model has"
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path, "x")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(
        ValueError, match=r"lm_head.*must be \(40, 16\), got \(39, 16\)|39"
    ):
        load_adapter(llama(vocab_size=39), tmp_path, "x")


def rename(folder, function):
    file = folder / "adapter_model.safetensors"
    save_file({function(k): v for k, v in load_file(file).items()}, file)


PREFIXES = [
    lambda key: f"_orig_mod.{key}",
    lambda key: f"module.{key}",
    lambda key: f"module._orig_mod.{key}",
    lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    lambda key: key.replace("base_model.model.", "base_model.model.module."),
    lambda key: key.replace(".layers.1.", ".layers.1._orig_mod."),
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_with_what_wrappers_put_in_front(tmp_path, prefix):
    expected = peft_s(tmp_path, llama(), target_modules=["q_proj"])
    rename(tmp_path, prefix)
    model = llama()
    load_adapter(model, tmp_path, "x")
    set_adapter(model, "x")
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize(
    "wrap", [torch.compile, lambda m: nn.ModuleDict({"module": m})]
)
def test_a_wrapped_model_reads_and_writes_the_names_of_the_plain_one(tmp_path, wrap):
    expected = peft_s(tmp_path / "x", llama(), target_modules=["q_proj"])
    model = llama()
    wrapped = wrap(model)
    load_adapter(wrapped, tmp_path / "x")
    set_adapter(wrapped, "x")
    torch.testing.assert_close(logits(model), expected)
    save_adapter(wrapped, "x", tmp_path / "again")
    plain = llama()
    load_adapter(plain, tmp_path / "again", "y")
    set_adapter(plain, "y")
    torch.testing.assert_close(logits(plain), expected)


def test_a_refusal_says_what_is_there(tmp_path):
    model = stack("q", "v")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    (tmp_path / "default").mkdir()
    there = "holds no adapter_config.json; it holds adapter_model.bin, default\n"
    with pytest.raises(FileNotFoundError, match=there):
        load_adapter(model, tmp_path, "x")
    saved(tmp_path / "other", ["k"])
    message = "'k' names none of q, v"
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "other")


# --- 13. A quantized model composes ---


def quantized_and_injected(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    quantize_model(model)
    inject_lora(model)
    return awake(model, seed)


def dense(model):
    """The same model with the weights as they are dequantized."""
    model = copy.deepcopy(model)
    for wrapper in (model[0], model[2]):
        base, wrapper.base = wrapper.base, nn.Linear(8, 8)
        wrapper.base.weight.data, wrapper.base.bias = base.dense_weight(), base.bias
        wrapper.base.requires_grad_(False)
    return model


def gradients(model, x):
    state = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def loss(state, x):
        return torch.func.functional_call(model, state, (x,)).square().sum()

    return torch.vmap(torch.func.grad(loss), (None, 0))(state, x)


def recomputed(model, x):
    x = x.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    return x.grad


TRANSFORMS = [
    lambda model, x: torch.vmap(model)(x),
    lambda model, x: torch.func.jacrev(model)(x),
    lambda model, x: torch.func.vjp(model, x)[1](torch.ones_like(x))[0],
    lambda model, x: gradients(model, x)["0.A"],
    lambda model, x: torch.func.jacrev(torch.func.jacrev(lambda v: model(v).sum()))(x),
    recomputed,
]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_quantized_model(transform):
    model, x = quantized_and_injected(), numbers(3, 8)
    torch.testing.assert_close(transform(model, x), transform(dense(model), x))


@pytest.mark.unmutated
def test_a_quantized_model_compiles():
    model, x = quantized_and_injected(), numbers(3, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_forward_mode_is_refused():
    model, x = quantized_and_injected(), numbers(3, 8)
    with pytest.raises(NotImplementedError, match="implement the jvp function"):
        torch.func.jvp(model, (x,), (x,))


def test_quantized_models_are_trained_together():
    models = [quantized_and_injected(i) for i in range(2)]
    copies = [dense(model) for model in models]
    x, y = numbers(2, 128, 8), torch.arange(256).view(2, 128) % 8
    losses = [train(group, x, y, epochs=3) for group in (models, copies)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(models[1][0].B, copies[1][0].B)


# --- 15. Expressions from a stranger ---

HOSTILE = [
    r"(a+)+$", r"(.*)*x", r"(.|.)*x", r"((a*)*)*b", ".*" * 9 + "x", ".?" * 40 + "x",
    "(.|.)" * 40 + "x", r"(.*a){20}x", r"(?:.+)+x", "(?=(.+)+x)", r"(\w|\w\w)*x",
    r"([a-z.]+)*x", "(" * 50 + ".*" + ")*" * 50 + "x", r"(?P<n>.+)+\bx", "a{1,99}" * 9,
    "(xt|xt)*" * 20 + "x", ".*?" * 9 + "x", r"(?:(?:.)*)*x", "[" * 10**6,
    "(?#[)(.+)+x(?#])", r"(?x)(.+)+x # ]", r"[\][](.*)*]x", "(" + "a|" * 10**5 + "x)x",
]  # fmt: skip


@pytest.mark.parametrize("expression", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
def test_a_costly_pattern_is_refused_at_once(tmp_path, key, expression):
    names = ["q" * 60, "text_" * 12]
    saved(tmp_path, names)
    change(tmp_path, **{key: {expression: 2}})
    message = f"{key} has an expression too costly"
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(stack(*names), tmp_path, "x")
    assert repr(expression)[:80] in str(error.value)


@pytest.mark.parametrize("expression", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_costly_selection_is_not_tried(tmp_path, key, expression):
    """Which layers there are the weights say, too."""
    names, x = ["q" * 60, "text_" * 12], numbers(3, 8)
    model = saved(tmp_path, names)
    change(tmp_path, **{key: expression})
    again = stack(*names)
    load_adapter(again, tmp_path, "x")
    set_adapter(again, "x")
    assert torch.equal(again(x), model(x))


def test_many_expressions_are_refused(tmp_path):
    saved(tmp_path)
    change(tmp_path, alpha_pattern={f".*.*[x{i}]": 2 for i in range(10**4)})
    with pytest.raises(ValueError, match=r"too costly to try: '\.\*\.\*\[x50\]'"):
        load_adapter(stack("q", "v"), tmp_path, "x")


def test_the_costliest_expression_that_is_tried():
    """On each of 800 layers with long names: it ends, in half a second or so."""
    names = [f"{i:04}" + "." + "a." * 20 + "b" for i in range(800)]
    slow = [".*.*.*x", ".*.*(a|.|a.|.a)x", ".*[a-z].*[a-z.]x", "(a.a|a.a)(.a.|.a.)x"]
    for expression in slow:
        assert peft_files.quick(expression)
        values = peft_files.pattern_values("x", {"x": {expression: 1}}, names, 2)
        assert values == dict.fromkeys(names, 2)
