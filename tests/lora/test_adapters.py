"""`lora.adapters` on a small BERT, against PEFT and against the merged weights."""

import copy
import math
import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora import core, freeze_all, inject_lora, merge_lora, variants
from lora.adapters import (
    EVERYWHERE,
    HERE,
    Context,
    Shared,
    add_adapter,
    combine,
    delete_adapter,
    disable_adapters,
    load_adapter,
    merge_adapter,
    names_of,
    parts_of,
    route,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora.nf4 import quantize_model
from tests.lora.models import small

QUERY = r".*\.(query|value)"


def draw(model, name, seed=1):
    """Fill the B of one adapter, so that it does something."""
    torch.manual_seed(seed)
    for layer in parts_of(model)[0].values():
        if name in layer.adapters:
            nn.init.normal_(layer.adapters[name].B, std=0.3)


@pytest.fixture
def ids():
    torch.manual_seed(9)
    return torch.randint(50, (5, 7))


def out(model, ids):
    return model(input_ids=ids).last_hidden_state


@pytest.fixture
def model():
    """With adapters of different ranks on different layers, none of them set."""
    model = small()
    add_adapter(model, "a", QUERY, rank=2, alpha=4.0)
    add_adapter(model, "b", rank=3, alpha=1.0, exclude=".*dense")
    add_adapter(model, "c", r"encoder\.layer\.1\..*", rank=1, alpha=-2.0)
    for i, name in enumerate("abc"):
        draw(model, name, i)
    return model


def with_updates(weights):
    """A plain small BERT with the weighted sum of updates in its weights, float64."""
    adapted = small().double()
    for name, weight in weights.items():
        for place, layer in parts_of(name[0])[0].items():
            if name[1] in layer.adapters:
                part = layer.adapters[name[1]]
                A, B = part.A.double(), part.B.double()
                update = weight * part.alpha / part.rank * B @ A
                adapted.get_submodule(place).weight.data += update
    return adapted


def snapshot(model):
    """All that a refused call must leave: modules, values, what trains, what is set."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    kinds = [(n, type(m)) for n, m in model.named_modules()]
    return state, trained, kinds, copy.copy(parts_of(model)[1])


def same(a, b):
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    return a[1:] == b[1:]


# --- adding ---


def test_adding_changes_no_output(ids):
    model = small()
    before = out(model, ids)
    names = add_adapter(model, "a", QUERY, rank=2)
    draw(model, "a")
    assert torch.equal(out(model, ids), before)
    assert names == [
        f"encoder.layer.{i}.attention.self.{kind}"
        for i in range(2)
        for kind in ("query", "value")
    ]
    assert parts_of(model)[1].active is None
    trained = [n for n, p in model.named_parameters() if n.endswith((".A", ".B"))]
    assert len(trained) == 8
    assert not any(p.requires_grad for p in model.get_submodule(names[0]).parameters())


def test_it_starts_as_inject_lora_does(ids):
    ours, theirs = small(), small()
    torch.manual_seed(3)
    add_adapter(ours, "a", QUERY, rank=2, alpha=6.0)
    torch.manual_seed(3)
    wrappers = inject_lora(theirs, rank=2, alpha=6.0, targets=QUERY)
    for (_, layer), w in zip(parts_of(ours)[0].items(), wrappers):
        part = layer.adapters["a"]
        assert torch.equal(part.A, w.A) and torch.equal(part.B, w.B)
        assert part.scale == w.scale and part.A.dtype == w.A.dtype


def test_only_what_is_wrapped_is_frozen():
    model = small()
    add_adapter(model, "a", QUERY)
    assert model.embeddings.word_embeddings.weight.requires_grad
    assert not model.encoder.layer[0].attention.self.query.base.weight.requires_grad


def test_rank_and_alpha_by_pattern_against_peft(ids):
    """The first pattern that matches holds; each layer's rank and scale as PEFT's."""
    ranks, alphas = {r".*query": 5, r".*layer\.1\..*": 7}, {r".*value": 3.0}
    model = small()
    names = add_adapter(
        model, "a", QUERY, 2, 4.0, rank_pattern=ranks, alpha_pattern=alphas
    )
    config = LoraConfig(
        r=2,
        lora_alpha=4.0,
        target_modules=QUERY,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    theirs = get_peft_model(small(), config).base_model.model
    for name in names:
        part = model.get_submodule(name).adapters["a"]
        other = theirs.get_submodule(name)
        assert part.A.shape == other.lora_A["default"].weight.shape
        assert part.scale == other.scaling["default"]
    ranks = [model.get_submodule(n).adapters["a"].rank for n in names]
    assert ranks == [5, 2, 5, 7]


def test_exclude_against_peft():
    model = small()
    names = add_adapter(model, "a", exclude=r".*(dense|key)")
    config = LoraConfig(target_modules=".*[a-z]", exclude_modules=r".*(dense|key)")
    config.target_modules = r"encoder.*(query|key|value|dense)"
    theirs = get_peft_model(small(), config)
    kinds = {n.removeprefix("base_model.model.") for n in theirs.targeted_module_names}
    assert set(names) == kinds


def test_a_layer_with_two_names_and_a_tied_head():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "head": nn.Linear(3, 4, bias=False)})
    model["twin"], model["embedding"] = model["a"], nn.Embedding(4, 3)
    model["head"].weight = model["embedding"].weight
    with pytest.warns(UserWarning, match="head is left as it is"):
        assert add_adapter(model, "one") == ["a", "twin"]
    assert model["a"] is model["twin"] and isinstance(model["head"], nn.Linear)
    # again: the wrapped layer counts as one that there is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert add_adapter(model, "two", "a|twin") == ["a", "twin"]
    assert list(model["a"].adapters) == ["one", "two"]
    delete_adapter(model, "one")
    delete_adapter(model, "two")
    assert type(model["a"]) is nn.Linear and model["a"] is model["twin"]


def model_with_a_tied_head():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "head": nn.Linear(3, 4, bias=False)})
    model["embedding"] = nn.Embedding(4, 3)
    model["head"].weight = model["embedding"].weight
    return model


def test_the_reader_decides_whether_a_warning_is_an_error(tmp_path):
    """And a saved adapter is put back without one: its layers are in the file."""
    model = model_with_a_tied_head()
    freeze_all(model)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="head is left as it is"):
            add_adapter(model, "one")
        assert same(before, snapshot(model))
        add_adapter(model, "one", "a")
        save_adapter(model, "one", tmp_path)
        load_adapter(model_with_a_tied_head(), tmp_path, "one")


@pytest.mark.unmutated  # a mutant's switch is a caller of its own
def test_a_warning_points_to_the_line_that_adds():
    with pytest.warns(UserWarning, match="left as") as caught:
        add_adapter(model_with_a_tied_head(), "one")
    assert [w.filename for w in caught] == [__file__]


def test_by_default_rank_4_and_alpha_8():
    model = nn.Sequential(nn.Linear(9, 9))
    add_adapter(model, "one")
    part = model[0].adapters["one"]
    assert (part.rank, part.alpha, part.A.shape[0]) == (4, 8, 4)


def test_one_layer_may_be_left():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    assert add_adapter(model, "one", exclude="a") == ["b"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": 3}, ValueError, "name must be a text without dots, got 3"),
        ({"name": ""}, ValueError, "a text without dots, got ''"),
        ({"name": "x.y"}, ValueError, "a text without dots, got 'x.y'"),
        (
            {"name": "keys"},
            ValueError,
            "name 'keys' is taken: nn.Mod",
        ),
        ({"name": "training"}, ValueError, "name 'training' is taken"),
        ({"name": "a"}, ValueError, "there is an adapter 'a' already"),
        ({"targets": "query"}, ValueError, "no layer whose name is 'query' to adapt"),
        ({"targets": "("}, ValueError, "targets must be a regular expression"),
        ({"targets": 3}, TypeError, "targets must be a regular expression, got 3"),
        ({"exclude": ".*"}, ValueError, "exclude='.*' matches all of"),
        ({"exclude": "typo"}, ValueError, "exclude='typo' matches none of"),
        ({"exclude": 3}, TypeError, "exclude must be a regular expression, got 3"),
        ({"rank": 0}, ValueError, "rank must be"),
        ({"alpha": math.nan}, ValueError, "alpha must be"),
        ({"rank_pattern": {"q": 2}}, ValueError, "rank_pattern: 'q' matches none of"),
        ({"rank_pattern": {".*": 0}}, ValueError, "rank must be"),
        ({"alpha_pattern": {".*": "x"}}, ValueError, "alpha must be"),
        ({"alpha_pattern": {3: 1.0}}, TypeError, "alpha_pattern must be a regular"),
    ],
)
def test_adding_refuses(model, arguments, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(message)):
        add_adapter(model, **{"name": "new"} | arguments)
    assert same(before, snapshot(model))


def test_an_unsuitable_layer_is_refused_by_its_name():
    model = small()
    model.encoder.layer[1].output.dense.register_forward_hook(lambda *a: None)
    before = snapshot(model)
    with pytest.raises(TypeError, match="encoder.layer.1.output.dense must be"):
        add_adapter(model, "a")
    assert same(before, snapshot(model))


# --- setting, disabling ---


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_the_set_adapter_is_the_sum_of_weights(model, ids, name):
    set_adapter(model, name)
    expected = out(with_updates({(model, name): 1}), ids).float()
    torch.testing.assert_close(out(model, ids), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, out(small(), ids), atol=1e-3)
    set_adapter(model, None)
    assert torch.equal(out(model, ids), out(small(), ids))


def test_only_the_set_adapter_trains(model, ids):
    def trained():
        return {
            n.split(".")[-2]
            for n, p in model.named_parameters()
            if p.requires_grad and n.endswith((".A", ".B"))
        }

    freeze_all(model)
    assert trained() == set()
    set_adapter(model, "a")
    assert trained() == {"a"}
    out(model, ids).sum().backward()
    assert model.encoder.layer[0].attention.self.query.adapters["a"].B.grad is not None
    set_adapter(model, "b")
    assert trained() == {"b"}
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    assert grads == [], "a gradient that is left over would move the adapter"
    set_adapter(model, None)
    assert trained() == set()


def test_an_optimizer_of_all_leaves_the_others(model, ids):
    set_adapter(model, "a")
    out(model, ids).sum().backward()
    set_adapter(model, "b")
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    freeze_all(model)
    set_adapter(model, "b")
    out(model, ids).square().sum().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert {n.split(".")[-2] for n in moved} == {"b"}


def test_disabled_is_the_base_and_comes_back(model, ids):
    set_adapter(model, "a")
    before = snapshot(model), out(model, ids)
    with disable_adapters(model):
        assert torch.equal(out(model, ids), out(small(), ids))
    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError
    assert same(before[0], snapshot(model))
    assert torch.equal(before[1], out(model, ids))


@pytest.mark.parametrize("name", ["d", 3, ["a"], "A", "base"])
def test_an_unknown_adapter_is_refused(model, name):
    before = snapshot(model)
    calls = [set_adapter, delete_adapter, merge_adapter]
    for call in calls:
        with pytest.raises(ValueError, match="there is no adapter .*; there are: "):
            call(model, name)
    for call in (delete_adapter, merge_adapter):
        with pytest.raises(ValueError, match="there is no adapter None"):
            call(model, None)
    assert same(before, snapshot(model))


def test_a_model_without_adapters():
    model = small()
    set_adapter(model, None)
    with pytest.raises(ValueError, match="no adapter 'a'; there are: none"):
        set_adapter(model, "a")
    with pytest.raises(ValueError, match="no adapter 'a'; there are: none"):
        merge_adapter(model, "a")


# --- routing ---


def test_a_mixed_batch_is_row_by_row(model, ids):
    names = ["c", None, "a", "b", "a"]
    with route(model, names):
        mixed = out(model, ids)
    for i, name in enumerate(names):
        set_adapter(model, name)
        torch.testing.assert_close(
            mixed[i : i + 1], out(model, ids[i : i + 1]), atol=2e-6, rtol=1e-5
        )


def test_after_routing_all_is_as_before(model, ids):
    set_adapter(model, "b")
    before = snapshot(model)
    with route(model, ["a"] * 5):
        out(model, ids)
    with (
        pytest.raises(ValueError, match="2 rows are routed"),
        route(model, ["a", "b"]),
    ):
        out(model, ids)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "d"], ValueError, "^there is no adapter 'd'; there are: 'a', 'b'"),
        (["a", 1], ValueError, "there is no adapter 1"),
    ],
)
def test_routing_refuses(model, names, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message), route(model, names):
        pass
    assert same(before, snapshot(model))


def test_training_a_mixed_batch_with_checkpoints(model, ids):
    """Backward inside of the context: gradients as without checkpoints."""
    found = []
    for inside in (False, True):
        twin = copy.deepcopy(model)
        for layer in parts_of(twin)[0].values():
            layer.adapters.requires_grad_(True)
        block = twin.encoder.layer[1]
        hidden = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
        with route(twin, ["a", "b", "c", None, "a"]):
            y = checkpoint(block, hidden, use_reentrant=False) if inside else None
            y = block(hidden) if y is None else y
            (y if torch.is_tensor(y) else y[0]).square().sum().backward()
        found.append({n: p.grad for n, p in block.named_parameters()})
    assert any(g is not None for n, g in found[0].items() if ".adapters." in n)
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name])


@pytest.mark.parametrize("context", ["route", "disable_adapters"])
def test_nothing_is_switched_inside_of_a_context(model, context, tmp_path):
    save_adapter(model, "a", tmp_path)
    enter = {"route": lambda: route(model, ["a"]), "disable_adapters": None}
    enter = enter[context] or (lambda: disable_adapters(model))
    calls = {
        "set an adapter": lambda: set_adapter(model, "a"),
        "add an adapter": lambda: add_adapter(model, "d"),
        "delete an adapter": lambda: delete_adapter(model, "a"),
        "merge an adapter": lambda: merge_adapter(model, "a"),
        "combine adapters": lambda: combine(model, {"a": 1}, "d"),
        "load an adapter": lambda: load_adapter(model, tmp_path, "d"),
        "disable_adapters": lambda: disable_adapters(model).__enter__(),
        "route": lambda: route(model, ["a"]).__enter__(),
    }
    before = snapshot(model)
    with enter():
        for what, call in calls.items():
            message = f"cannot {what} inside of {context}: leave it first"
            with pytest.raises(ValueError, match=message):
                call()
    assert same(before, snapshot(model))


# --- deleting, combining ---


def test_deleting_restores_the_base(model, ids):
    set_adapter(model, "b")
    delete_adapter(model, "b")
    assert parts_of(model)[1].active is None
    assert torch.equal(out(model, ids), out(small(), ids))
    assert type(model.encoder.layer[0].attention.self.key) is nn.Linear
    delete_adapter(model, "a")
    delete_adapter(model, "c")
    plain, before = small(), model.state_dict()
    assert list(before) == list(plain.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_deleting_another_leaves_the_set_one(model, ids):
    set_adapter(model, "b")
    before = out(model, ids)
    delete_adapter(model, "a")
    assert torch.equal(out(model, ids), before)


@pytest.mark.parametrize(
    "weights", [{"a": 1, "b": 1}, {"a": 0.3, "b": -2.0, "c": 0.5}, {"c": 2}, {"a": 0}]
)
def test_a_sum_is_the_sum_of_the_updates(model, ids, weights):
    names = combine(model, weights, "sum")
    assert parts_of(model)[1].active is None
    expected = with_updates({(model, n): w for n, w in weights.items()})
    set_adapter(model.double(), "sum")
    torch.testing.assert_close(out(model, ids), out(expected, ids))
    for place in names:
        held = model.get_submodule(place).adapters
        ranks = [held[n].rank for n in weights if n in held]
        assert held["sum"].rank == sum(ranks) and held["sum"].scale == 1


def test_a_sum_is_peft_s_cat(model, ids):
    """PEFT's combination_type="cat" is the exact sum, too."""
    config = LoraConfig(r=2, lora_alpha=4.0, target_modules=QUERY)
    theirs = get_peft_model(small(), config, adapter_name="a")
    theirs.add_adapter("b", LoraConfig(r=3, lora_alpha=1.0, target_modules=QUERY))
    ours = small()
    for name, rank, alpha in (("a", 2, 4.0), ("b", 3, 1.0)):
        torch.manual_seed(rank)
        for place in add_adapter(ours, name, QUERY, rank, alpha):
            part = ours.get_submodule(place).adapters[name]
            nn.init.normal_(part.B)
            other = theirs.base_model.model.get_submodule(place)
            other.lora_A[name].weight.data = part.A.data.clone()
            other.lora_B[name].weight.data = part.B.data.clone()
    weights = {"a": 0.7, "b": 1.5}
    theirs.add_weighted_adapter(list(weights), [*weights.values()], "c", "cat")
    theirs.set_adapter("c")
    combine(ours, weights, "c")
    set_adapter(ours, "c")
    with torch.no_grad():
        torch.testing.assert_close(
            out(ours, ids), out(theirs, ids), atol=5e-6, rtol=1e-5
        )


def test_a_sum_is_its_own(model, ids):
    state = torch.get_rng_state()
    combine(model, {"a": 1, "b": 1}, "sum")
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    set_adapter(model, "sum")
    before = out(model, ids)
    draw(model, "a", seed=5)
    delete_adapter(model, "b")
    assert torch.equal(out(model, ids), before)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({}, ValueError, "weights must name one adapter or more, got none"),
        ({"d": 1}, ValueError, "there is no adapter 'd'"),
        ({None: 1}, ValueError, "there is no adapter None"),
        ({"a": math.inf}, ValueError, "weights['a'] must be a finite number"),
        ({"a": "1"}, ValueError, "weights['a'] must be a finite number"),
    ],
)
def test_combining_refuses(model, weights, error, message):
    before = snapshot(model)
    with pytest.raises(error, match="^" + re.escape(message)):
        combine(model, weights, "sum")
    with pytest.raises(ValueError, match="there is an adapter 'b' already"):
        combine(model, {"a": 1}, "b")
    assert same(before, snapshot(model))


# --- merging ---


@pytest.mark.parametrize("mode", [True, False])
def test_merged_and_unmerged(model, ids, mode):
    set_adapter(model, "b")
    before, state = snapshot(model), torch.get_rng_state()
    merge_adapter(model, "a")
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    expected = out(with_updates({(model, "a"): 1}), ids).float()
    torch.testing.assert_close(out(model, ids), expected, atol=1e-5, rtol=1e-5)
    model.train(mode)
    model.eval()
    unmerge_adapter(model)
    assert same(before, snapshot(model))
    set_adapter(model, None)
    assert torch.equal(out(model, ids), out(small(), ids))


def test_merged_again_and_again(model, ids):
    before = snapshot(model)
    for name in "abcabc":
        merge_adapter(model, name)
        unmerge_adapter(model)
    assert same(before, snapshot(model))


def test_merged_moves_with_the_model(model, ids):
    merge_adapter(model, "b")
    model.double()
    unmerge_adapter(model)
    weight = model.encoder.layer[0].attention.self.key.base.weight
    original = small().encoder.layer[0].attention.self.key.weight
    assert weight.dtype == torch.float64 and torch.equal(weight, original.double())


def test_while_one_is_merged_the_rest_is_refused(model, ids, tmp_path):
    merge_adapter(model, "a")
    save_adapter(model, "a", tmp_path)
    before = snapshot(model)
    calls = [
        lambda: set_adapter(model, "b"),
        lambda: set_adapter(model, None),
        lambda: merge_adapter(model, "b"),
        lambda: delete_adapter(model, "a"),
        lambda: add_adapter(model, "d"),
        lambda: combine(model, {"a": 1}, "d"),
        lambda: load_adapter(model, tmp_path, "d"),
        lambda: disable_adapters(model).__enter__(),
        lambda: route(model, ["a"]).__enter__(),
    ]
    for call in calls:
        message = "cannot .* while 'a' is merged: unmerge_adapter first"
        with pytest.raises(ValueError, match=message):
            call()
    assert same(before, snapshot(model))
    unmerge_adapter(model)
    with pytest.raises(ValueError, match="^cannot unmerge: no adapter is merged$"):
        unmerge_adapter(model)


def test_what_cannot_be_merged(model):
    """Both the overflow and the shared weight are seen before anything is merged."""
    place = model.encoder.layer[1].attention.self
    place.value.adapters["a"].B.data.fill_(3e38)
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer.1.attention.self.value: the sum over"):
        merge_adapter(model, "a")
    assert same(before, snapshot(model))
    model.tied = nn.Linear(16, 16)
    model.tied.weight = place.query.base.weight
    before = snapshot(model)
    with pytest.raises(ValueError, match="another module shares its base"):
        merge_adapter(model, "a")
    assert same(before, snapshot(model))


def test_beside_a_four_bit_base(ids):
    """The base is four bits as long as nothing is merged, and again afterwards."""
    model = small()
    quantize_model(model, QUERY)
    base = out(model, ids)
    add_adapter(model, "a", QUERY)
    draw(model, "a")
    assert torch.equal(out(model, ids), base)
    set_adapter(model, "a")
    adapted = out(model, ids)
    assert not torch.allclose(adapted, base, atol=1e-3)
    kind = type(model.encoder.layer[0].attention.self.query.base)
    merge_adapter(model, "a")
    torch.testing.assert_close(out(model, ids), adapted, atol=2e-6, rtol=1e-5)
    unmerge_adapter(model)
    assert type(model.encoder.layer[0].attention.self.query.base) is kind
    assert torch.equal(out(model, ids), adapted)


def test_training_is_that_of_inject_lora(ids):
    """The same steps give the same numbers as Chapter 2's wrapper, bit for bit."""
    found = []
    for kind in ("inject", "add"):
        model = small()
        freeze_all(model)
        torch.manual_seed(4)
        if kind == "inject":
            inject_lora(model, rank=2, alpha=2.0)
        else:
            add_adapter(model, "a", rank=2, alpha=2.0)
            set_adapter(model, "a")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            out(model, ids).square().sum().backward()
            optimizer.step()
        found.append([p.detach() for p in trained])
    assert core.count_trainable(model) == sum(p.numel() for p in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found))


# --- one layer, against sums written out in float64 ---


def draw_all(model, seed=0):
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
    return draw_all(model)["linear"]


@contextmanager
def routed(layer, names, rows):
    """`layer` inside of `route`, also for a name that it has no adapter of."""
    context = Context(layer.shared, "route", (names, torch.tensor(rows)))
    token = HERE.set((context,))
    EVERYWHERE.append(context)
    try:
        yield
    finally:
        HERE.reset(token)
        EVERYWHERE.remove(context)


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
    expected = torch.stack([by_hand(layer, row, n) for row, n in zip(x, names)])
    with routed(layer, ["two", None, "three"], [0, 1, 2, 0]):
        torch.testing.assert_close(layer(x), expected)
        assert torch.equal(layer(x)[1], layer.base(x)[1])


def test_rows_of_adapters_that_the_layer_has_not(layer):
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = [by_hand(layer, x[i], n) for i, n in enumerate([None, None, "one"])]
    with routed(layer, ["elsewhere", None, "one"], [0, 1, 2]):
        torch.testing.assert_close(layer(x), torch.stack(expected))
    with routed(layer, ["elsewhere", None], [0, 1, 0]):
        assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (5, 2, 6)])
def test_another_number_of_rows_is_refused(layer, shape):
    message = "2 rows are routed, but a layer was given"
    with routed(layer, ["one"], [0, 0]), pytest.raises(ValueError, match=message):
        layer(torch.randn(shape, dtype=torch.float64))


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(layer):
    """Finite differences, and each adapter learns from its own rows alone."""
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    parts = {n: layer.adapters[n].requires_grad_(True) for n in ("one", "three")}
    tensors = [p for part in parts.values() for p in (part.A, part.B)]

    def loss(*_):
        return layer(x).square().sum()

    with routed(layer, ["one", "three"], [0, 1, 0]):
        assert torch.autograd.gradcheck(loss, tensors)
        loss().backward()
    mixed = parts["three"].A.grad.clone()
    layer.zero_grad()
    layer.shared.active = "three"
    layer(x[1:2]).square().sum().backward()
    torch.testing.assert_close(parts["three"].A.grad, mixed)
    assert layer.adapters["two"].A.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(dtype):
    """A and B stay in float32, products are in the dtype of the rows.

    They are rounded to it, and so are x Aᵀ and the sum: by half a unit each.
    """
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(8, 8)}).to(dtype)
    add_adapter(model, "a")
    layer, x = draw_all(model)["linear"], torch.randn(3, 2, 8).to(dtype)
    part, y, unit = layer.adapters["a"], layer.base(x), torch.finfo(dtype).eps
    assert part.A.dtype == part.B.dtype == torch.float32
    A, B = part.A.double(), part.B.double() * part.scale
    expected = y.double() + (x.double() @ A.T) @ B.T
    sizes = (x.double().abs() @ A.abs().T) @ B.abs().T
    bound = unit * (0.5 * expected.abs() + 1.6 * sizes)
    set_adapter(model, "a")
    assert ((layer(x) - expected).abs() <= bound).all()
    set_adapter(model, None)
    with route(model, ["a", None, "a"]):
        got = layer(x)
    assert ((got - expected).abs() <= bound)[::2].all()
    assert torch.equal(got[1], y[1]) and got.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_routed_rows_are_the_same_bits_as_ever(dtype):
    """Recorded answers depend on how two batched products are rounded."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(8, 5)}).to(dtype)
    for name, rank in (("one", 1), ("three", 3)):
        add_adapter(model, name, rank=rank)
    layer, x = draw_all(model)["linear"], torch.randn(3, 4, 8, dtype=dtype)
    for part in layer.adapters.values():
        part.requires_grad_(True)
    with route(model, ["three", None, "one"]):
        A, B = layer.stacked(["three", None, "one"])
        theirs = torch.baddbmm(layer.base(x), torch.bmm(x, A.mT), B.mT)
        results = [
            (y, *torch.autograd.grad(y.square().sum(), tensors))
            for tensors in [[p for u in layer.adapters.values() for p in (u.A, u.B)]]
            for y in (layer(x), theirs)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("routed", [False, True])
def test_half_precision_keeps_no_wider_input(dtype, routed):
    """Of all that is kept for backward, only x itself is as large as x."""
    model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    add_adapter(model, "a", rank=2)
    set_adapter(model, "a")
    x, saved = torch.randn(2, 128, 64).to(dtype), []

    def note(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        if routed:
            set_adapter(model, None)
            model[0].adapters["a"].requires_grad_(True)
            with route(model, ["a", None]):
                model(x)
        else:
            model(x)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert large and {t.data_ptr() for t in large} == {x.data_ptr()}


def test_the_weight_that_others_read(layer):
    assert torch.equal(layer.weight, layer.base.weight)
    assert layer.bias is layer.base.bias
    layer.shared.active = "two"
    x = torch.randn(3, 6, dtype=torch.float64)
    got = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(got, by_hand(layer, x, "two"))
    message = "^a layer's weight was read inside"
    with routed(layer, ["two"], [0]), pytest.raises(ValueError, match=message):
        layer.weight + 1


def test_attention_reads_the_weight_of_the_adapter():
    """`nn.MultiheadAttention` never calls its output projection."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    before = model(x, x, x)[0]
    add_adapter(model, "a", "out_proj")
    draw_all(model)
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


def test_a_copy_shares_nothing_with_the_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_adapter(model, "a")
    twin = copy.deepcopy(draw_all(model))
    set_adapter(twin, "a")
    assert model[0].shared is model[1].shared and twin[0].shared is twin[1].shared
    assert model[0].shared.active is None and twin[0].shared.active == "a"


def test_parts_and_names():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    assert parts_of(model) == ({}, Shared())
    add_adapter(model, "second", "b")
    add_adapter(model, "first", "a|b")
    layers, shared = parts_of(model)
    assert list(layers) == ["a", "b"] and shared is model["a"].shared
    assert names_of(layers) == ["first", "second"]


def test_adapters_given_to_parts_are_refused():
    parts = [nn.Sequential(nn.Linear(3, 3)) for _ in range(2)]
    for part in parts:
        add_adapter(part, "a")
    with pytest.raises(ValueError, match="^adapters were added to parts of the"):
        set_adapter(nn.Sequential(*parts), "a")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (merge_lora, "cannot merge .*query.* by merge_lora: merge_adapter merges"),
        (inject_lora, "query.*: put there by add_adapter: use add_adapter throughout"),
        (lambda m: variants.inject(m, variants.DoRALinear), "put there by add_adapter"),
        (variants.inject_vera, "put there by add_adapter"),
    ],
)
def test_adapters_are_not_mixed_with_another_method(model, method, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        method(model)
    assert same(before, snapshot(model))


def test_layers_that_are_wrapped_by_inject_lora_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    core.inject_lora(model, targets="1")
    before = snapshot(model)
    for targets in "01":  # also beside: its update would act on every adapter
        with pytest.raises(ValueError, match="1: wrapped by inject_lora; merge_lora"):
            add_adapter(model, "b", targets)
    assert same(before, snapshot(model))
    with pytest.raises(ValueError, match="'b'; there are: none .*: save_lora"):
        save_adapter(model, "b", "nowhere")


def test_a_merged_model_is_not_quantized():
    """The base that was kept would be rounded, too, and come back as another."""
    model = nn.Sequential(nn.Linear(8, 8))
    add_adapter(model, "one")
    merge_adapter(model, "one")
    before = snapshot(model)
    with pytest.raises(ValueError, match="merged: unmerge_adapter first"):
        quantize_model(model)
    assert same(before, snapshot(model))
