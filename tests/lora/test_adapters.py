"""`lora.adapters` against PEFT and row by row; then all that it must refuse."""

import copy
import pickle
import time
import warnings
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from lora import LoRALinear, count_total, inject_lora, merge_lora
from lora.adapters import (
    AdapterLinear,
    adapted,
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
from lora.core import find

BLOCKS = r"encoder\.layer\.\d\..*"
PEFT_BLOCKS = r"encoder\.layer\.\d\..*(query|key|value|dense)"


def bert(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = BertConfig(num_hidden_layers=2, vocab_size=50, **sizes)
    return BertModel(config).eval().to(dtype)


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def wrapped(model):
    """Qualified name -> AdapterLinear."""
    return adapted(model)[0]


def ids(rows=6, length=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 50, (rows, length), generator=generator)


def out(model, x):
    found = model(x)
    return found if isinstance(found, torch.Tensor) else found[0]


def awake(model, seed=0):
    """Give each B random entries: no update is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data = torch.randn(p.shape, generator=generator).to(p) / 4
    return model


def three(model=None, targets=BLOCKS):
    """A model with adapters a, b (another rank) and c (other layers, too)."""
    model = bert() if model is None else model
    add_adapter(model, "a", targets, rank=2, alpha=3)
    add_adapter(model, "b", targets, rank=3, alpha=5.0)
    add_adapter(model, "c", r".*0.*" if targets is None else r".*output\.dense", rank=1)
    return awake(model)


def snapshot(model):
    """All of a model that an operation which was refused must leave as it was."""
    modules = [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]
    parameters = [
        (n, id(p), p.requires_grad, p.grad is None, p.detach().clone())
        for n, p in model.named_parameters()
    ]
    states = [copy.copy(m.state) for m in find(model, AdapterLinear).values()]
    return modules, parameters, states


def same(first, second):
    return (
        first[0] == second[0]
        and first[2] == second[2]
        and [p[:4] for p in first[1]] == [p[:4] for p in second[1]]
        and all(torch.equal(p[4], q[4]) for p, q in zip(first[1], second[1]))
    )


@contextmanager
def refused(model, *messages, kind=ValueError):
    """The block raises `kind` with all `messages`, and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(kind) as fault:
        yield
    assert type(fault.value) is kind
    for message in messages:
        assert message in str(fault.value)
    assert same(snapshot(model), before)


# --- Against PEFT ---


@pytest.fixture(scope="module")
def both():
    """The same adapters a and b in our model and in PEFT's."""
    ours = three()
    configs = {
        "a": LoraConfig(r=2, lora_alpha=3, target_modules=PEFT_BLOCKS),
        "b": LoraConfig(r=3, lora_alpha=5, target_modules=PEFT_BLOCKS),
    }
    theirs = get_peft_model(bert(), configs["a"], adapter_name="a")
    theirs.add_adapter("b", configs["b"])
    for n, layer in wrapped(ours).items():
        other = theirs.base_model.model.get_submodule(n)
        for name in "ab":
            other.lora_A[name].weight.data = layer.adapters[name].A.data.clone()
            other.lora_B[name].weight.data = layer.adapters[name].B.data.clone()
    return ours, theirs.eval()


@pytest.mark.parametrize("name", ["a", "b"])
def test_outputs_and_gradients_are_those_of_peft(both, name):
    ours, theirs = copy.deepcopy(both)
    set_adapter(ours, name)
    theirs.set_adapter(name)
    y, z = out(ours, ids()), out(theirs, ids())
    assert torch.allclose(y, z, atol=1e-6)
    for output in (y, z):
        output.square().sum().backward()
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in ours.named_parameters() if p.grad is not None}
    assert trained and all(f".adapters.{name}." in n for n in trained)
    for n, layer in wrapped(ours).items():
        other = theirs.base_model.model.get_submodule(n)
        grad = layer.adapters[name].B.grad
        assert torch.allclose(grad, other.lora_B[name].weight.grad, atol=1e-4)


def test_a_mixed_batch_is_that_of_peft(both):
    ours, theirs = both
    rows = ["a", "b", None, "b", "a", "a"]
    with route(ours, rows), torch.no_grad():
        y = out(ours, ids())
    named = [n or "__base__" for n in rows]
    with torch.no_grad():
        z = theirs(ids(), adapter_names=named)[0]
    assert torch.allclose(y, z, atol=1e-6)


def test_a_sum_is_pefts_cat_and_not_its_linear(both):
    ours, theirs = (model.double() for model in copy.deepcopy(both))
    combine(ours, {"a": 0.5, "b": -2}, "sum")
    set_adapter(ours, "sum")
    theirs.add_weighted_adapter(["a", "b"], [0.5, -2], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    assert torch.allclose(out(ours, ids()), out(theirs, ids()), atol=1e-10)
    combine(ours, {"a": 1.0}, "a2")
    theirs.add_weighted_adapter(["a", "a"], [1, 1], "bad", combination_type="linear")
    theirs.set_adapter("bad")  # (2A)(2B) times the scale: four times a, not twice
    combine(ours, {"a": 4.0}, "a4")
    set_adapter(ours, "a4")
    assert torch.allclose(out(ours, ids()), out(theirs, ids()), atol=1e-10)


@pytest.mark.parametrize("name", ["a", "b", "c", "sum"])
def test_peft_reads_our_files(name, tmp_path):
    model = three()
    combine(model, {"a": 0.5, "c": 2.0}, "sum")  # other ranks and alphas in some layers
    set_adapter(model, name)
    save_adapter(model, name, tmp_path)
    theirs = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.allclose(out(model, ids()), out(theirs, ids()), atol=1e-6)


SETTINGS = [
    {"target_modules": ["query", "value"]},
    {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 7},
    {
        "target_modules": PEFT_BLOCKS,
        "rank_pattern": {"query": 5, r"layer\.1\..*\.dense": 1},
        "alpha_pattern": {"^encoder.layer.0.attention.self.query": 32},
        "use_rslora": True,
    },
    {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
    {"target_modules": ["key"], "layers_to_transform": [1]},
    {"target_modules": ["key"], "init_lora_weights": "gaussian"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_we_read_pefts_files(settings, tmp_path):
    theirs = get_peft_model(bert(), LoraConfig(**{"r": 3} | settings)).eval()
    for n, p in theirs.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path)
    model = bert()
    before = out(model, ids())
    assert load_adapter(model, tmp_path, "theirs") == "theirs"
    assert torch.equal(out(model, ids()), before)
    save_adapter(model, "theirs", tmp_path / "again")
    again = PeftModel.from_pretrained(bert(), tmp_path / "again").eval()
    set_adapter(model, "theirs")
    assert not torch.equal(out(model, ids()), before)
    for m in (model, theirs, again):
        m.double()  # where rounding hides nothing
    assert torch.allclose(out(model, ids()), out(theirs, ids()), atol=1e-12)
    assert torch.allclose(out(theirs, ids()), out(again, ids()), atol=1e-12)


# --- The base, and switching ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_base_stays_itself(dtype, tmp_path):
    model = bert(dtype)
    before, weights = out(model, ids()), dict(model.named_parameters())
    copies = {n: p.detach().clone() for n, p in weights.items()}
    three(model)
    assert torch.equal(out(model, ids()), before)
    set_adapter(model, "a")
    assert not torch.equal(out(model, ids()), before)
    with disable_adapters(model):
        assert torch.equal(out(model, ids()), before)
    with route(model, [None] * 6):
        assert torch.equal(out(model, ids()), before)
    with route(model, ["a", None, "b", None, "a", "b"]):
        assert torch.equal(out(model, ids())[1::2][:1], before[1:2])
    merge_adapter(model, "b"), unmerge_adapter(model)
    combine(model, {"a": 1, "b": 1}, "ab"), save_adapter(model, "ab", tmp_path)
    set_adapter(model, None)
    assert torch.equal(out(model, ids()), before)
    for name in ("ab", "c", "b", "a"):
        assert torch.equal(out(model, ids()), before)
        delete_adapter(model, name)
    now = dict(model.named_parameters())
    assert now.keys() == weights.keys() and all(now[n] is weights[n] for n in weights)
    assert all(torch.equal(now[n], copies[n]) for n in now)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_names_of_parameters_and_of_the_state():
    model = mlp()
    add_adapter(model, "one", r"2", rank=2)
    names = [n for n, _ in model.named_parameters()]
    assert names[-2:] == ["2.adapters.one.A", "2.adapters.one.B"]
    assert list(model.state_dict()) == names
    assert count_total(model) == count_total(mlp()) + 2 * (7 + 3)
    assert "one" in repr(model) and "active=None" in repr(model)
    other = mlp()
    add_adapter(other, "one", r"2", rank=2)
    awake(model)
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        set_adapter(m, "one")
    assert torch.equal(model(torch.ones(2, 5)), other(torch.ones(2, 5)))


def test_the_first_adapter_freezes_the_model_and_a_later_one_nothing():
    model = mlp()
    model[0].weight.grad = torch.ones(7, 5)
    add_adapter(model, "a", "2")
    assert not any(p.requires_grad for p in model.parameters())
    assert model[0].weight.grad is None
    model[0].requires_grad_(True)  # a part that is meant to be trained, such as a head
    set_adapter(model, "a")
    model(torch.ones(2, 5)).sum().backward()
    add_adapter(model, "b", "2"), set_adapter(model, "a")
    assert model[0].weight.requires_grad and model[0].weight.grad is not None
    assert model[2].adapters["a"].B.grad is not None  # a is still in use


def test_only_the_active_adapter_trains():
    model = three()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)  # all of them, on purpose
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name in ("a", "b"):
        set_adapter(model, name)
        out(model, ids()).sum().backward()
        if name == "b":  # a's gradient is gone: it does not move once more
            optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    wanted = {n for n in before if ".adapters.b." in n and "pooler" not in n}
    assert moved == wanted


def test_contexts_keep_gradients_and_come_back_after_an_error():
    model = three()
    set_adapter(model, "a")
    out(model, ids()).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    on = out(model, ids())
    for context in (disable_adapters(model), route(model, ["b"] * 6)):
        with suppress(KeyError), context:
            off = out(model, ids())
            with disable_adapters(model), route(model, ["a"] * 6):  # nested
                assert torch.allclose(out(model, ids()), on, atol=1e-6)
            assert torch.equal(out(model, ids()), off) and not torch.equal(off, on)
            raise KeyError
        assert torch.equal(out(model, ids()), on)
    after = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == after.keys()
    assert all(torch.equal(grads[n], after[n]) for n in grads)


def test_copies_and_pickles_are_models_of_their_own():
    model = three()
    set_adapter(model, "a")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        y = out(model, ids())
        assert torch.equal(out(twin, ids()), y)
        set_adapter(twin, None)
        assert torch.equal(out(model, ids()), y)
        assert not torch.equal(out(twin, ids()), y)
        for layer in wrapped(twin).values():
            assert all(u.base is layer.base for u in layer.adapters.values())


def test_moving_the_model_moves_all_adapters():
    model = three()
    model.double().train()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(u.training for m in wrapped(model).values() for u in m.adapters.values())


def test_deleting_the_active_adapter_leaves_the_base():
    model = three()
    set_adapter(model, "a")
    delete_adapter(model, "a")
    assert torch.equal(out(model, ids()), out(bert(), ids()))


def test_a_layer_with_two_names_gets_one_adapter(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    plain, x = copy.deepcopy(model), torch.ones(2, 4)
    add_adapter(model, "a", "2")
    assert model[0] is model[2]
    set_adapter(awake(model), "a")
    save_adapter(model, "a", tmp_path)
    load_adapter(plain, tmp_path), set_adapter(plain, "a")
    assert torch.equal(plain(x), model(x)) and plain[0] is plain[2]
    delete_adapter(model, "a")
    assert type(model[0]) is nn.Linear and model[0] is model[2]


class Layer(nn.Module):
    """A base that opts in, as a quantised layer does."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.bias = 5, 7, None
        self.packed = nn.Parameter(torch.randn(7, 5, dtype=torch.float16))

    def dense_weight(self):
        return self.packed.float()

    def forward(self, x):
        return x @ self.dense_weight().T


def test_a_base_that_opts_in():
    model = nn.Sequential(Layer())
    x = torch.randn(3, 5)
    before = model(x)
    add_adapter(model, "a")
    set_adapter(awake(model), "a")
    y = model(x)
    assert torch.allclose(y, x @ model[0].weight.T, atol=1e-5)
    merge_adapter(model, "a")
    assert torch.allclose(model(x), y, atol=1e-5)
    unmerge_adapter(model), set_adapter(model, None)
    assert torch.equal(model(x), before)


def test_attention_that_reads_the_weight_gets_the_adapted_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    model.forward = lambda x: model[0](x, x, x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_adapter(model, "a")
    x = torch.randn(2, 3, 8)
    before = model(x)
    set_adapter(awake(model), "a")
    assert not torch.allclose(model(x), before)
    with disable_adapters(model):
        assert torch.equal(model(x), before)
    with refused(model, "single weight"), route(model, ["a", None]):
        model(x)


def test_the_functions_of_core_and_named_adapters():
    model = three(bert(torch.float64))
    set_adapter(model, "b")
    y = out(model, ids())
    with refused(model, "no layer"):
        inject_lora(model, targets="nothing")
    layers = wrapped(model)
    assert inject_lora(model, targets=BLOCKS) == [] and wrapped(model) == layers
    merged = merge_lora(copy.deepcopy(model))
    assert list(merged.state_dict()) == list(bert().state_dict())
    assert torch.allclose(out(merged, ids()), y, atol=1e-5)
    plain = mlp()
    inject_lora(plain)
    with refused(plain, "merge_lora"):
        add_adapter(plain, "a")


# --- Mixed batches ---


names = st.sampled_from(["a", "b", "c", "sum", None])


@given(rows=st.lists(names, min_size=1, max_size=9), length=st.integers(1, 4))
def test_a_mixed_batch_is_row_by_row(rows, length):
    model = three(bert(torch.float64))
    combine(model, {"a": 1, "c": -1}, "sum")
    x = ids(len(rows), length)
    with route(model, rows):
        y = out(model, x)
    for i, name in enumerate(rows):
        set_adapter(model, name)
        assert torch.allclose(y[i : i + 1], out(model, x[i : i + 1]), atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 5), (4, 2, 5), (4, 2, 3, 5), (4, 0, 5)])
def test_a_mixed_batch_of_any_shape_and_its_gradients(shape):
    model = three(mlp(torch.float64), None)
    x = torch.randn(shape, dtype=torch.float64)
    rows = ["a", None, "c", "b"]
    for p in model.parameters():
        p.requires_grad_(True)
    with route(model, rows):
        y = model(x)
        y.square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for i, name in enumerate(rows):
        with route(model, [name]):
            z = model(x[i : i + 1])
        assert torch.allclose(y[i : i + 1], z) and y.shape == (*shape[:-1], 3)
        z.square().sum().backward()
    assert all(torch.allclose(mixed[n], p.grad) for n, p in model.named_parameters())


def test_one_bad_adapter_does_not_spoil_the_rows_of_others():
    model = three(mlp(), None)
    model[0].adapters["b"].A.data.fill_(float("nan"))
    with route(model, ["a", "b", None]):
        y = model(torch.ones(3, 5))
    assert y[[0, 2]].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mixed_batch_in_half_precision(dtype):
    model = three(mlp(dtype), None)
    with route(model, ["a", None, "c"]):
        y = model(torch.ones(3, 5, dtype=dtype))
    assert y.dtype == dtype
    set_adapter(model, "a")
    z = model(torch.ones(1, 5, dtype=dtype))
    assert torch.allclose(y[:1].float(), z.float(), rtol=0.02)


@pytest.mark.unmutated
def test_a_mixed_batch_has_two_products_a_layer_however_many_rows():
    model = three(mlp(), None)
    counts = []
    for n in (3, 30):
        calls = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                calls.append(func.overloadpacket.__name__)  # noqa: B023
                return func(*args, **(kwargs or {}))

        with route(model, ["a", "b", None] * (n // 3)), torch.no_grad(), Watch():
            model(torch.ones(n, 5))
        counts.append([calls.count(k) for k in ("addmm", "bmm", "baddbmm")])
    assert counts[0] == counts[1] == [2, 2, 2]


@pytest.mark.unmutated
def test_a_mixed_batch_costs_little_more_than_a_single_adapter():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(384, 384) for _ in range(6)))
    for i in range(7):
        add_adapter(model, f"l{i}", rank=8)
    x, rows = torch.randn(64, 16, 384), [f"l{i % 7}" for i in range(64)]
    clock = {"single": [], "mixed": []}
    with torch.no_grad():
        for _ in range(15):
            for kind in clock:
                names = rows if kind == "mixed" else ["l0"] * 64
                set_adapter(model, "l0")
                start = time.process_time()
                if kind == "single":
                    model(x)
                else:
                    with route(model, names):
                        model(x)
                clock[kind].append(time.process_time() - start)
    assert min(clock["mixed"]) < 1.5 * min(clock["single"])


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        ("ab", TypeError, "list"),
        (None, TypeError, "list"),
        ([], ValueError, "a name or None"),
        (["a", 3], ValueError, "a name or None"),
        (["a", "d"], ValueError, "'d'"),
        ({"a": 1}, TypeError, "list"),
    ],
)
def test_routes_that_are_refused(names, kind, message):
    model = three()
    with refused(model, message, kind=kind), route(model, names):
        pass


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_batch_of_another_size_is_refused(rows):
    model = three(mlp(), None)
    with refused(model, "3 names"), route(model, ["a", "b", None]):
        model(torch.ones(rows, 5))
    with refused(model, "5 names"), route(model, ["a"] * 5):
        model(torch.ones(5))


# --- Sums ---


@given(weights=st.dictionaries(st.sampled_from("abc"), st.floats(-4, 4), min_size=1))
def test_a_sum_is_exact(weights):
    model = three(mlp(torch.float64), None)
    combine(model, weights, "sum")
    for layer in wrapped(model).values():
        there = [n for n in weights if n in layer.adapters]
        if not there:
            assert "sum" not in layer.adapters
            continue
        W = layer.base.weight
        wanted = sum(weights[n] * (layer.adapters[n].weight - W) for n in there)
        assert torch.allclose(layer.adapters["sum"].weight - W, wanted, atol=1e-12)
        ranks = [layer.adapters[n].rank for n in there]
        assert layer.adapters["sum"].rank == sum(ranks)


def test_a_sum_cut_to_a_rank_is_the_best_of_that_rank():
    model = three(mlp(torch.float64), None)
    combine(model, {"a": 1, "b": 1}, "sum")
    for rank in (1, 2, 4, 50):
        combine(model, {"a": 1, "b": 1}, f"cut{rank}", rank=rank)
    for layer in wrapped(model).values():
        D = layer.adapters["sum"].weight - layer.base.weight
        U, S, Vh = torch.linalg.svd(D)
        for rank in (1, 2, 4, 50):
            update = layer.adapters[f"cut{rank}"]
            k = min(rank, len(S))
            best = (U[:, :k] * S[:k]) @ Vh[:k]
            assert update.rank <= rank
            assert torch.allclose(update.weight - layer.base.weight, best, atol=1e-10)


# --- Merging ---


@pytest.mark.parametrize("active", [None, "a", "b"])
def test_merge_and_unmerge(active):
    model = three()
    set_adapter(model, active)
    before = out(model, ids())
    set_adapter(model, "a")
    y = out(model, ids())
    set_adapter(model, active)
    merge_adapter(model, "a")
    assert torch.allclose(out(model, ids()), y, atol=1e-6)
    assert wrapped(model)["encoder.layer.0.output.dense"].weight is not None
    for switch in (
        lambda: set_adapter(model, "b"),
        lambda: set_adapter(model, None),
        lambda: merge_adapter(model, "b"),
        lambda: delete_adapter(model, "a"),
        lambda: disable_adapters(model).__enter__(),
        lambda: route(model, ["a"] * 6).__enter__(),
    ):
        with refused(model, "'a' is merged", "unmerge_adapter"):
            switch()
    add_adapter(model, "new", BLOCKS)
    assert torch.allclose(out(model, ids()), y, atol=1e-6)
    unmerge_adapter(model)
    assert torch.equal(out(model, ids()), before)
    with refused(model, "no adapter is merged"):
        unmerge_adapter(model)


def test_merging_c_leaves_a_out_where_c_is_not():
    model = three()
    set_adapter(model, "c")
    y = out(model, ids())
    set_adapter(model, "a")
    merge_adapter(model, "c")
    assert torch.allclose(out(model, ids()), y, atol=1e-6)


@pytest.mark.parametrize("what", ["merged", "base", "A"])
def test_what_changed_while_merged_is_not_lost_silently(what):
    model = three(mlp(), None)
    merge_adapter(model, "a")
    changed = {
        "merged": model[0].folded.weight,
        "base": model[0].base.weight,
        "A": model[0].adapters["a"].A,
    }[what]
    changed.data[0, 0] += 1
    with refused(model, "0 has changed", "merge_lora"):
        unmerge_adapter(model)


def test_a_merge_that_overflows_is_refused():
    model = three(mlp(torch.float16), None)
    model[0].adapters["a"].B.data.fill_(1e5)
    with refused(model, "overflows torch.float16"):
        merge_adapter(model, "a")


# --- What is refused ---


@pytest.mark.parametrize(
    "call",
    [
        lambda m: set_adapter(m, "d"),
        lambda m: delete_adapter(m, "d"),
        lambda m: merge_adapter(m, "d"),
        lambda m: save_adapter(m, "d", "/nowhere"),
        lambda m: combine(m, {"d": 1}, "e"),
        lambda m: delete_adapter(m, None),
        lambda m: merge_adapter(m, None),
        lambda m: save_adapter(m, None, "/nowhere"),
    ],
)
def test_unknown_names(call):
    with refused(model := three(), "there are: ['a', 'b', 'c']"):
        call(model)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("a", ValueError), ("", ValueError), ("x/y", ValueError), ("..", ValueError)),
        *(("x.y", ValueError), ("x\\y", ValueError), ("x\n", ValueError)),
        *(("items", ValueError), ("training", ValueError), ("x y", ValueError)),
        *((None, TypeError), (3, TypeError), (b"x", TypeError)),
    ],
)
def test_names_that_are_refused(name, kind, tmp_path):
    model = three()
    with refused(model, "name" if name != "a" else "'a'", kind=kind):
        add_adapter(model, name, BLOCKS)
    with refused(model, kind=kind):
        combine(model, {"a": 1}, name)
    save_adapter(model, "b", tmp_path)
    if name is not None:
        with refused(model, kind=kind):
            load_adapter(model, tmp_path, name)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"targets": "nothing"}, ValueError, "encoder.layer.*.output.dense"),
        ({"targets": "("}, ValueError, "regular expression"),
        ({"targets": ["query"]}, TypeError, "regular expression"),
        ({"rank": 0}, ValueError, "rank"),
        ({"rank": 2.5}, ValueError, "rank"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"rank": {"encoder.*query": 2}}, ValueError, "no pattern for"),
        ({"rank": {".*": 2, "query": 3}}, ValueError, "'query'"),
        ({"rank": {".*query": 0, ".*": 2}}, ValueError, "rank"),
        ({"rank": {"(": 2}}, ValueError, "regular expression"),
        ({"rank": {3: 2}}, TypeError, "regular expression"),
        ({"rank": {}}, ValueError, "no pattern for"),
        ({"alpha": {".*": "x"}}, ValueError, "alpha"),
    ],
)
def test_arguments_that_are_refused(arguments, kind, message):
    for model in (bert(), three()):
        with refused(model, message, kind=kind):
            add_adapter(model, "new", **{"targets": BLOCKS} | arguments)


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        *(({}, TypeError), (["a"], TypeError), ({"a": float("inf")}, ValueError)),
        *(({"a": "1"}, ValueError), ({"a": True}, ValueError), (None, TypeError)),
    ],
)
def test_weights_that_are_refused(weights, kind):
    model = three()
    with refused(model, "weights", kind=kind):
        combine(model, weights, "sum")
    with refused(model, "rank"):
        combine(model, {"a": 1}, "sum", rank=0)


def test_rank_and_alpha_by_pattern():
    model = bert()
    attention, first = r".*\.self\..*", r"encoder\.layer\.0\..*"
    add_adapter(model, "a", BLOCKS, {attention: 1, ".*": 3}, {first: 5.0, ".*": 7})
    for n, layer in wrapped(model).items():
        update = layer.adapters["a"]
        assert update.rank == (1 if ".self." in n else 3)
        assert update.alpha == (5.0 if "layer.0" in n else 7)
        assert update.scale == update.alpha / update.rank
    without = bert()
    add_adapter(without, "a", r"(?!.*\.1\.)encoder.*")
    assert len(wrapped(without)) == 6


def test_switching_inside_of_a_context_is_refused():
    model = three()
    for call in (set_adapter, delete_adapter, merge_adapter):
        with disable_adapters(model), refused(model, "leave route"):
            call(model, "a")
        with route(model, ["b"] * 6), refused(model, "leave route"):
            call(model, "a")


def test_tied_layers_stay_out(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 9, bias=False)

    apart, model = Tied(), Tied()
    model.head.weight = model.table.weight
    with pytest.warns(UserWarning, match="head is left as it is"):
        add_adapter(model, "a")
    assert list(wrapped(model)) == ["body"]
    with refused(model, "tied to another module: head"):
        add_adapter(model, "b", "head")
    add_adapter(apart, "b")
    save_adapter(apart, "b", tmp_path)
    with pytest.warns(UserWarning, match="head is left"), refused(model, "'head'"):
        load_adapter(model, tmp_path)


def test_models_that_are_refused(tmp_path):
    save_adapter(three(), "a", tmp_path)
    for model in (
        nn.Linear(2, 2),
        LoRALinear(nn.Linear(2, 2)),
        None,
        [nn.Linear(2, 2)],
    ):
        with pytest.raises((ValueError, TypeError)):
            add_adapter(model, "a")
        with pytest.raises((ValueError, TypeError)):
            load_adapter(model, tmp_path)
    parts = nn.ModuleList([mlp(), mlp()])
    for part in parts:
        add_adapter(part, "a")
    with refused(parts, "parts of model"):
        set_adapter(parts, "a")
    set_adapter(parts[0], "a")


def test_a_layer_with_a_hook_is_refused():
    model = three(mlp(), None)
    model[2].base.register_forward_hook(lambda *_: None)
    with refused(model, "2 must be", kind=TypeError):
        add_adapter(model, "new")


def test_a_second_adapter_on_all_layers_warns_of_nothing():
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapter(model, "a"), add_adapter(model, "b")
    assert all(isinstance(m, AdapterLinear) for m in (model[0], model[2]))


# --- Resuming ---


def test_training_resumes_bit_for_bit(tmp_path):
    x, y = torch.randn(8, 5), torch.randn(8, 3)

    def steps(model, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()

    def start():
        model = three(mlp(), None)
        set_adapter(model, "a")
        return model, torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.1
        )

    through, optimizer = start()
    steps(through, optimizer, 6)
    first, optimizer = start()
    steps(first, optimizer, 3)
    save_adapter(first, "a", tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    second = mlp()
    load_adapter(second, tmp_path), set_adapter(second, "a")
    optimizer = torch.optim.AdamW(
        [p for p in second.parameters() if p.requires_grad], lr=9.0
    )
    optimizer.load_state_dict(state)
    steps(second, optimizer, 3)
    for n, layer in wrapped(second).items():
        ours, theirs = layer.adapters["a"], wrapped(through)[n].adapters["a"]
        assert torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B)
