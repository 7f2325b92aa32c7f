"""`lora.study.runs`: runs of a small model, sums and cuts by hand, the file of rows."""

import json
import math
from collections import Counter
from importlib.metadata import version
from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertModel

from lora import core, formats, nf4
from lora.study import docstrings, runs, search
from lora.study.docstrings import LIBRARIES, docstring_pairs, split
from lora.study.evidence import clustered, interval

ROW = {"study": "main", "method": "none", "seed": 1, "versions": "a=1", "losses": []}
ROW |= {"ranks": {"numpy": [1, 2], "torch": [4]}}


@pytest.fixture(scope="session")
def tokenizer():
    return search.load_minilm()[0]


@pytest.fixture
def small(monkeypatch, tokenizer):
    """One narrow block with random weights in MiniLM's place, 210 pairs a library."""
    pairs = {
        library: [
            (f"{library}.f{i}", f"name {i} {library}", f"sentence {i} of {library}")
            for i in range(210)
        ]
        for library in LIBRARIES
    }

    def load():
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
        return tokenizer, BertModel(config).eval()

    monkeypatch.setattr(search, "load_minilm", load)
    monkeypatch.setattr(docstrings, "documented", lambda: pairs)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of rows, in a folder of its own, not there yet."""
    monkeypatch.setattr(runs, "DATA", tmp_path / "runs.jsonl")
    return runs.DATA


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- One run ---


def test_data_of_a_seed(small):
    train, choose, report = runs.data(1)
    assert len(train) == 5 * 10
    assert not any("sympy" in s or "networkx" in s for _, s in train)
    assert list(choose) == list(report) == list(LIBRARIES)
    for library in LIBRARIES:
        held_out = {*choose[library], *report[library]}
        assert len(held_out) == 200 and not held_out & {*train}
        parts = split(docstring_pairs(library), 1)
        assert parts[1:] == (choose[library], report[library])
    assert runs.data(2)[1] == choose and runs.data(2)[2] != report
    one = runs.data(1, ["sympy"])
    assert len(one[0]) == 10 and one[1:] == (choose, report)


def test_fewer_pairs_and_questions_made_of_words(small):
    train, *held_out = runs.data(1)
    some = runs.data(1, pairs=20)
    assert len(set(some[0])) == 20 and {*some[0]} < {*train} and [*some[1:]] == held_out
    assert runs.data(2, pairs=20)[0] != some[0]
    words, *same = runs.data(1, queries="words")
    assert same == held_out and [s for _, s in words] == [s for _, s in train]
    for query, sentence in words:
        assert len(query.split()) == 2 and {*query.split()} < {*sentence.split()}
    both = runs.data(1, queries="both")[0]
    assert 10 < sum(pair in train for pair in both) < 40


def test_words_of_a_sentence():
    sentence = "Return the n-th root of 2."
    drawn = {runs.some_words(sentence, runs.random.Random(seed)) for seed in range(20)}
    assert {len(query.split()) for query in drawn} == {3} and len(drawn) > 15
    assert {*" ".join(drawn).split()} == {"return", "the", "n-th", "root", "of", "2"}
    assert len(runs.some_words("One word", runs.random.Random(0)).split()) == 2


def test_shuffled_pairs_are_all_wrong(small):
    train, right = runs.data(1, shuffled=True)[0], runs.data(1)[0]
    assert not {*train} & {*right}
    for side in (0, 1):
        assert sorted(p[side] for p in train) == sorted(p[side] for p in right)


@pytest.mark.parametrize(
    ("method", "trainable"), [("none", 0), ("full", None), ("lora", 6 * 2 * 2 * 8)]
)
def test_what_a_method_trains(small, method, trainable):
    """Rank 2 on six layers of width 8 has 2 · 2 · 8 parameters a layer."""
    _, model = search.load_minilm()
    settings = runs.DEFAULTS | {"method": method, "rank": 2}
    runs.prepare(model, settings)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pooler = sum(p.numel() for p in model.pooler.parameters())
    if trainable is None:
        trainable = sum(p.numel() for p in model.parameters()) - pooler
    assert count == trainable
    assert not any(p.requires_grad for p in model.pooler.parameters())


def test_the_start_of_peft(small, monkeypatch, tokenizer):
    """A is uniform on ±1 / sqrt(d_in), whatever the rank, and is trained from there."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 1}
    model = BertModel(BertConfig(num_hidden_layers=1, **sizes)).eval()
    monkeypatch.setattr(search, "load_minilm", lambda: (tokenizer, model))
    settings = runs.DEFAULTS | {"init": "kaiming", "rank": 16, "scale": 2.0}
    runs.prepare(model, settings)
    first = {n: w.A.clone() for n, w in runs.bases.find(model, core.LoRALinear).items()}
    assert {A.shape[1] for A in first.values()} == {16, 64}
    for A in first.values():
        most = A.shape[1] ** -0.5
        assert 0.9 * most < A.abs().max() <= most
        assert abs(A.std() - most / 3**0.5) < 0.1 * most
    pairs = runs.data(0)[0]
    search.fine_tune(model, tokenizer, pairs, steps=2, lr=0.05)
    for name, wrapper in runs.bases.find(model, core.LoRALinear).items():
        assert wrapper.scale == 2 and wrapper.A.requires_grad
        assert wrapper.B.any() and not torch.equal(wrapper.A, first[name]), name


def test_a_run_and_its_row(small):
    settings = {"rank": 2, "steps": 2, "lr": 0.05, "seed": 3, "decay": 0.0}
    tokenizer, model, row = runs.make_run(**settings)
    assert row == json.loads(json.dumps(row))
    assert {k: row[k] for k in runs.DEFAULTS} == runs.DEFAULTS | settings
    assert len(row["losses"]) == 2 and row["step_time"] > 0
    assert {k: len(v) for k, v in row["chosen"].items()} == dict.fromkeys(LIBRARIES, 50)
    score = search.search_score(model, tokenizer, runs.data(3)[2]["scipy"])
    assert score.tolist() == pytest.approx([1 / r for r in row["ranks"]["scipy"]])
    assert all(1 <= r <= 150 for ranks in row["ranks"].values() for r in ranks)
    again = runs.make_run(**settings)[2]
    assert row | {"step_time": 0} == again | {"step_time": 0}
    other = runs.make_run(**settings | {"lr": 0.5})[2]
    assert other["ranks"] != row["ranks"]


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_gradients_are_clipped_together(clip):
    """Seen by an optimizer of gradients alone: a step is as long as their norm."""
    model = nn.Linear(4, 4)
    before = [p.detach().clone() for p in model.parameters()]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    with runs.beside_steps(model, clip, 0):
        model(torch.ones(2, 4)).square().sum().backward()
        full = sum(p.grad.square().sum() for p in model.parameters()) ** 0.5
        sgd.step()
    moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), before))
    expected = clip or full.item()
    assert moved.item() ** 0.5 == pytest.approx(expected, rel=1e-3) and full > 1


def test_the_last_steps_are_averaged_and_the_hooks_go():
    """A gradient of one, five steps of one: 0, −1, ... −5, of which the last three."""
    number = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(number.weight)
    sgd = torch.optim.SGD(number.parameters(), lr=1.0)

    def steps(n):
        for _ in range(n):
            number.weight.grad = torch.ones(1, 1)
            sgd.step()

    with runs.beside_steps(number, 0, 3):
        steps(5)
    assert number.weight.item() == -4
    with pytest.raises(KeyError), runs.beside_steps(number, 1e-9, 3):
        raise KeyError
    steps(1)
    assert number.weight.item() == -5, "no hook is left"


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("up and down", [0.5, 1 - 1 / 20, 1 - 10 / 20, 1 - 19 / 20]),
        ("cosine", [0.5, 0.9938, 0.5, 0.0062]),
        ("constant", [0.5, 1, 1, 1]),
        ("no warm-up", [1, 1 - 1 / 20, 1 - 10 / 20, 1 - 19 / 20]),
    ],
)
def test_schedules(name, rates):
    """At the first, the second, the middle and the last of twenty steps."""
    found = [runs.SCHEDULES[name](t, 20) for t in (0, 1, 10, 19)]
    assert found == pytest.approx(rates, abs=1e-4)


def test_dropout_is_for_training(small):
    _, model, _ = runs.make_run(variant="dropout", rank=2, steps=2, lr=0.05)
    x, layers = torch.ones(64, 8), runs.bases.find(model, runs.DroppedOut).values()
    for layer in layers:
        with torch.no_grad():
            exact = core.LoRALinear.forward(layer, x)
            assert torch.equal(layer(x), exact)
        off = layer(x) - layer.base(x)
        assert len(off.unique(dim=0)) > 5, "rows lose other entries"
    assert len(layers) == 6


# What a layer of width 8 trains at rank 2; VeRA's vectors are of lengths 2 and 8.
TRAINS = {"lora": 32, "rsLoRA": 32, "LoRA+": 32, "PiSSA": 32, "LoRA-FA": 16}
TRAINS |= {"DoRA": 32 + 8, "VeRA": 2 + 8, "dropout": 32}


@pytest.mark.parametrize("variant", runs.VARIANTS)
def test_a_variant_is_another_way_from_the_same_start(small, variant):
    settings = {"rank": 2, "steps": 4, "lr": 0.05, "seed": 3}
    plain = runs.make_run(**settings)[2]["losses"]
    _, model, row = runs.make_run(**settings, variant=variant)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 6 * TRAINS[variant]
    assert row["variant"] == variant
    assert row["losses"][0] == pytest.approx(plain[0], abs=2e-3)
    assert (row["losses"] == plain) == (variant == "lora")


def test_a_run_without_training_is_the_base(small):
    _, model, row = runs.make_run(method="none")
    assert row["losses"] == [] and row["step_time"] >= 0
    _, base = search.load_minilm()
    for name, value in base.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_base_in_few_bits(small):
    """Two bits a number: each block of 8 has four values at most."""
    _, model, _ = runs.make_run(method="none", base="NF2", block=8)
    for name, layer in runs.layers(model).items():
        blocks = layer.weight.detach().reshape(-1, 8)
        assert max(len(block.unique()) for block in blocks) <= 4, name


def test_nf4_with_its_scales_in_few_bits(small):
    """The weights are those of the layer that stores them."""
    before = {n: m.weight for n, m in runs.layers(search.load_minilm()[1]).items()}
    _, model, row = runs.make_run(method="none", base="NF4", block=8, double=True)
    assert row["double"]
    for name, layer in runs.layers(model).items():
        stored = nf4.NF4Linear(before[name], block=8).dense_weight()
        assert torch.equal(layer.weight, stored), name
        assert not torch.equal(stored, formats.round_trip(before[name], block=8))
    with pytest.raises(ValueError, match="double is for NF4, got the base 'int4'"):
        runs.make_run(method="none", base="int4", double=True)


def test_what_is_in_half_precision(small):
    """The base, the adapters too, or the products only, which what is trained shows."""
    float32, bfloat16, trained = torch.float32, torch.bfloat16, []
    kinds = [
        {float32},
        {float32},
        {float32, bfloat16},
        {bfloat16},
        {float32},
        {float32},
    ]
    for precision, dtypes in zip(runs.PRECISIONS, kinds, strict=True):
        _, model, _ = runs.make_run(precision=precision, steps=1, lr=0.1)
        assert {p.dtype for p in model.parameters()} == dtypes, precision
        adapters = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in adapters} == {max(dtypes, key=lambda d: d.itemsize)}
        trained.append(adapters[-1].detach().float())
    assert not any(torch.equal(trained[0], other) for other in trained[1:])
    with pytest.raises(ValueError, match="precision is of .*, got 'half'"):
        runs.make_run(precision="half")


def test_products_of_float16_are_rounded_once():
    """As float64's are, and as the processor's own, which may round parts of a sum."""
    torch.manual_seed(0)
    a, b, c = (torch.randn(16, 16, dtype=torch.float16) for _ in range(3))
    own, exact = a @ b, (a.double() @ b.double()).half()
    added, batch = torch.addmm(c, a, b), a[None] @ b[None]
    with runs.RoundedProducts():
        found = a @ b, torch.addmm(c, a, b), a[None] @ b[None]
        assert torch.equal(a.float() @ b.float(), a.float() @ b.float())
    assert {t.dtype for t in found} == {torch.float16}
    assert (found[0] != exact).float().mean() < 0.02
    for product, other in zip(found, (own, added, batch)):
        torch.testing.assert_close(product, other, rtol=2**-9, atol=2**-8)
    with runs.RoundedProducts():
        assert (a * 300 @ b * 300).isinf().any(), "the range is float16's"


def by_the_manual(model, tokenizer, batches, optimizer, scaled):
    """Steps in float16 as PyTorch's manual has them: autocast for each forward pass."""
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)

    def vectors(side):
        with torch.autocast("cpu", torch.float16):
            return search.unit_vectors(model, tokenizer, list(side))

    with runs.RoundedProducts(), sdpa_kernel(SDPBackend.MATH):
        for part in batches:
            loss = 1e-4 * search.contrastive_loss(*map(vectors, zip(*part)))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_loop_in_float16_is_that_of_the_manual(small, monkeypatch, scaled):
    """Bit for bit, with a loss so small that unscaled gradients vanish."""
    pairs, trained, loss = runs.data(0)[0], [], search.contrastive_loss
    for by_hand in (True, False):
        tokenizer, model = search.load_minilm()
        runs.prepare(model, runs.DEFAULTS | {"rank": 2})
        trained.append([p for p in model.parameters() if p.requires_grad])
        if by_hand:
            optimizer = torch.optim.AdamW(trained[0], 0.1)
            some = islice(search.batches(pairs, 8), 3)
            by_the_manual(model, tokenizer, some, optimizer, scaled)
            continue
        monkeypatch.setattr(search, "contrastive_loss", lambda *s: 1e-4 * loss(*s))
        with runs.half_precision(model, "float16" + ", scaled" * scaled):
            search.fine_tune(
                model, tokenizer, pairs, 3, 0.1, 8, schedule=lambda t, n: 1
            )
    assert all(map(torch.equal, *trained))
    assert all(p.grad.equal(q.grad) for p, q in zip(*trained))
    vanished = sum((p.grad == 0).sum().item() for p in trained[1])
    assert (vanished > 50) != scaled, vanished
    assert not any(p._backward_hooks for p in trained[1])
    assert not any(m._backward_pre_hooks for m in model.modules())
    assert "forward" not in vars(model)


def test_a_setting_that_there_is_none_of_is_refused(small):
    with pytest.raises(ValueError, match=r"settings are \['method', .*got \['ranks'\]"):
        runs.make_run(ranks=4)


def test_versions_are_those_of_the_installed():
    named = dict(entry.split("=") for entry in runs.versions().split())
    assert named == {name: version(name) for name in runs.PACKAGES}
    row = {"versions": runs.versions()}
    assert runs.other_versions(row) == ""
    bare = " ".join(e.partition("+")[0] for e in row["versions"].split())
    assert runs.other_versions({"versions": bare + " "}) == ""
    old = row["versions"].replace(f"sympy={version('sympy')}", "sympy=1.0")
    old = old.replace(f"numpy={version('numpy')}", "numpy=1.0")
    assert runs.other_versions({"versions": old}) == "numpy=1.0 sympy=1.0"


def test_points_are_the_mean_over_all_queries():
    assert runs.points(ROW) == pytest.approx(100 * (1 + 1 / 2 + 1 / 4) / 3)


# --- Which query a rank is of ---


def test_a_query_is_known_again_under_another_seed():
    """With the pinned libraries: the places are those of the pairs that were drawn."""
    for seed in (1, 4):
        for library, places in runs.reported(seed).items():
            pairs = docstring_pairs(library)
            assert len(pairs) == runs.PAIRS[library]
            assert [pairs[i] for i in places] == runs.data(seed)[2][library]


def test_scores_of_rows():
    ranks = {library: [*range(1, 151)] for library in LIBRARIES}
    rows = [{"seed": seed, "ranks": ranks} for seed in (1, 2)]
    found = runs.scores(rows)
    assert found.index.names == ["seed", "library", "pair"]
    assert found.index.is_unique and len(found) == 2 * 7 * 150
    assert found.index[0] == (1, "numpy", runs.reported(1)["numpy"][0])
    last = found[found.index.isin([2], "seed") & found.index.isin(["sympy"], "library")]
    assert list(last.index.get_level_values("pair")) == runs.reported(2)["sympy"]
    assert list(last) == [100 / rank for rank in range(1, 151)]
    some = found[found.index.isin(["scipy"], "library")]
    assert runs.scores(runs.pd.DataFrame(rows), ["scipy"]).equals(some)
    twice = found.groupby(["library", "pair"]).size()
    assert set(twice) == {1, 2}, "some names are drawn by both seeds, not all"


def test_gains_over_the_base(file, monkeypatch):
    """By query, so that runs of the same seeds can be subtracted."""
    made, base = [], {library: [2] * 150 for library in LIBRARIES}
    row = ROW | {"ranks": base}
    monkeypatch.setattr(runs, "make_run", lambda **s: made.append(s) or (0, 0, row | s))
    write(file, row)
    runs.of_base.cache_clear()
    better = row | {"method": "lora", "ranks": base | {"torch": [1] * 150}}
    found = runs.gains(better, better | {"seed": 2})
    assert list(found.index.names) == ["seed", "library", "pair"]
    assert found.index.is_unique and len(found) == 2 * 7 * 150
    assert (found == 50 * (found.index.get_level_values("library") == "torch")).all()
    assert made == [{"method": "none", "seed": 2}], "a seed that is not recorded, once"
    runs.of_base.cache_clear()


@pytest.mark.filterwarnings("ignore:Precision loss occurred")
def test_what_two_sets_of_rows_differ_in():
    """One query is right in `better` and second in `worse`, in each of two seeds."""
    worse, better = (
        [
            {"seed": s, "ranks": {"numpy": [rank, *[3] * 149], "scipy": [1] * 150}}
            for s in seeds
        ]
        for rank, seeds in ((2, (1, 2)), (1, (2, 1, 3)))
    )
    both = ["numpy", "scipy"]
    found = (runs.scores(better, both) - runs.scores(worse, both)).dropna()
    assert len(found) == 2 * 2 * 150, "a seed that one side lacks is left out"
    moved = found[found != 0]
    assert list(moved) == [50, 50] and set(moved.index.get_level_values(1)) == {"numpy"}
    names, seeds = runs.compared(better, worse, both)
    assert (names, seeds) == runs.intervals(found)
    assert names[0] == pytest.approx(100 / 600) and names[1] < 0 < names[2]
    assert seeds == pytest.approx((100 / 600,) * 3), "all seeds alike: no width"
    asked = [f"{library} {pair}" for _, library, pair in found.index]
    assert names == pytest.approx(clustered(found, asked)) != interval(found)
    wide = runs.compared(better, worse, both, level=0.99)
    assert wide[0] == pytest.approx(clustered(found, asked, 0.99))
    assert runs.compared(better, worse, ["scipy"])[0] == (0, 0, 0)
    assert not runs.is_ahead(better, worse, both).stands, "one name is no lead"
    shown = runs.both(better, worse, both)
    assert shown["over names"].startswith("0.2 [−") and shown["over seeds"] == (
        "0.2 [0.2, 0.2]"
    )


def test_questions_by_hand(monkeypatch):
    """A sentence is two numbers; there are three functions, two of them answers."""
    shelf = {"numpy": [("f", "", "F"), ("g", "", "G")], "scipy": [("h", "", "H")]}
    places = {"to f": (1, 0), "to h": (0, 1), "F": (0.8, 0.6), "G": (1, 0), "H": (0, 1)}
    table = runs.pd.DataFrame({"question": ["to f", "to h"], "answer": ["f", "h"]})
    monkeypatch.setattr(runs.pd, "read_csv", lambda file: table)
    monkeypatch.setattr(runs, "documented", lambda: shelf)
    monkeypatch.setattr(
        search,
        "embed",
        lambda m, t, some: torch.tensor([places[s] for s in some]) * 1.0,
    )
    assert runs.asked(None, None) == [2, 1]  # G is as near to "to f" as can be


def test_everyday_sentences_are_sixty_and_all_different():
    table = runs.pd.read_csv(runs.FOLDER / "everyday.csv")
    assert list(table) == ["sentence", "same", "other"] and len(table) == 60
    assert len(set(table.to_numpy().ravel())) == 180


def test_everyday_sentences_by_hand(monkeypatch):
    """A sentence is two numbers. What shares its own words does not count."""
    places = {"a": (1, 0), "A": (0.8, 0.6), "a?": (1, 0), "b": (0, 1), "B": (0.6, 0.8)}
    places["b?"] = (0.8, 0.6)
    table = {"sentence": ["a", "b"], "same": ["A", "B"], "other": ["a?", "b?"]}
    monkeypatch.setattr(runs.pd, "read_csv", lambda file: runs.pd.DataFrame(table))
    monkeypatch.setattr(
        search,
        "embed",
        lambda m, t, some: torch.tensor([places[s] for s in some]) * 1.0,
    )
    found = runs.everyday(None, None)
    # a: own 0.8, B 0.6, b? 0.8, which ties; b: own 0.8, A 0.6, a? 0
    assert found["everyday"] == [2, 1]
    logits = torch.tensor([[0.8, 0.6, 0.8], [0.8, 0.6, 0.0]])
    nats = (20 * logits).logsumexp(1) - 16
    assert found["nats"] == pytest.approx(nats.tolist(), abs=6e-4)


# --- Cuts of a change, sums of adapters: on one layer, by hand ---


@pytest.fixture
def one_layer(monkeypatch):
    """A base of one layer, all zeros; what is measured of a model is its weight."""

    def base(width):
        model = nn.ModuleDict({"encoder": nn.ModuleDict({"a": nn.Linear(*width)})})
        nn.init.zeros_(model["encoder"]["a"].weight)
        return model

    def use(width, make):
        monkeypatch.setattr(search, "load_minilm", lambda: (None, base(width)))
        monkeypatch.setattr(runs, "make_run", lambda **s: make(base(width), s))

    def weight(model, _, seed):
        return seed, model["encoder"]["a"].weight.tolist()

    monkeypatch.setattr(runs, "data", lambda seed: ((), (), seed))
    monkeypatch.setattr(runs, "ranks", weight)
    return use


def test_a_full_run_keeps_the_spectrum_of_its_change(one_layer, monkeypatch):
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(6, 6))[0]
    values = torch.tensor([3.0, 2, 1, 0, 0, 0])
    change = directions * values @ directions.T

    def make(model, settings):
        model["encoder"]["a"].weight.data += change
        return None, model, settings | {"ranks": {}}

    one_layer((6, 6), make)
    monkeypatch.setattr(runs, "KS", (1, 2, 6))
    settings = {"method": "full", "cuts": (1, 2, 6), "seed": 4}
    whole, *cuts = runs.make_rows(settings)
    assert whole["energy"] == {"encoder.a": [round(9 / 14, 4), round(13 / 14, 4), 1]}
    assert (
        whole["rank_90"] == {"encoder.a": 2} == json.loads(json.dumps(whole))["rank_90"]
    )
    assert [row["cut"] for row in cuts] == [1, 2, 6]
    assert all(row["ranks"][0] == 4 for row in cuts), "the seed's own queries"
    gaps = [(torch.tensor(row["ranks"][1]) - change).norm().item() for row in cuts]
    assert gaps == pytest.approx([5**0.5, 1, 0], abs=1e-5)
    kept = [
        {k: row[k] for k in plan} for row, plan in zip(cuts, runs.planned(settings)[1:])
    ]
    assert kept == runs.planned(settings)[1:]
    assert settings == {"method": "full", "cuts": (1, 2, 6), "seed": 4}, "as it was"


# Two adapters of rank 1 on a layer from 2 to 2, with scale 2, put together by hand.
SUMS = {
    "both": ("sum", ("numpy", "scipy"), 1.0),
    "half": ("sum", ("numpy", "scipy"), 0.5),
    "means": ("average", ("numpy", "scipy"), 0.5),
    "roots": ("linear", ("numpy", "scipy"), 0.25),
    "cut": ("rank 8", ("numpy", "scipy"), 1.0),
}
B, A = {"numpy": [1.0, 0], "scipy": [0.0, 1]}, {"numpy": [1.0, 0], "scipy": [3.0, 4]}
BY_HAND = {
    "both": [[2, 0], [6, 8]],
    "half": [[1, 0], [3, 4]],
    "means": [[2, 2], [2, 2]],  # 2 · (1/2, 1/2) times (4/2, 4/2)
    "roots": [[2, 2], [2, 2]],
    "cut": [[2, 0], [6, 8]],
}


@pytest.mark.parametrize("start", [-1, 0])
def test_adapters_and_their_sums(one_layer, start):
    """Which runs are made, from which starts, and what each sum adds to the base."""
    log = []

    def make(model, settings):
        (library,) = settings["libraries"]
        log.append((library, settings["start"]))
        (layer,) = core.inject_lora(model, rank=1, alpha=2.0)
        layer.A.data = torch.tensor([A.get(library, [0.0, 0])])
        layer.B.data = torch.tensor([B.get(library, [0.0, 0])]).T
        return None, model, settings | {"ranks": {}}

    one_layer((2, 2), make)
    settings = {"start": start, "seed": 1, "steps": 3, "sums": SUMS}
    rows = runs.make_rows(settings)
    starts = [1, 2, 3, 4, 5, 6, 7] if start < 0 else [0] * 7
    assert log == list(zip(LIBRARIES, starts))
    sums = {row["composed"]: row for row in rows[7:]}
    assert sums.keys() == SUMS.keys()
    for name, row in sums.items():
        seed, weight = row["ranks"]
        assert (row["libraries"], row["start"], seed) == (["numpy", "scipy"], start, 1)
        torch.testing.assert_close(
            torch.tensor(weight), torch.tensor(BY_HAND[name]) * 1.0
        )
    kept = [
        {k: row[k] for k in plan} for row, plan in zip(rows, runs.planned(settings))
    ]
    assert kept == runs.planned(settings)


def test_adapters_that_differ_in_their_start_alone_as_one(one_layer):
    def make(model, settings):
        assert settings["libraries"] == list(runs.TRAINED)
        (layer,) = core.inject_lora(model, rank=1, alpha=1.0)
        layer.A.data = torch.tensor([[1.0, settings["start"]]])
        layer.B.data = torch.tensor([[2.0], [settings["start"] * 3.0]])
        return None, model, settings | {"ranks": {}}

    one_layer((2, 2), make)
    mean = {"mean": ("sum", (0, 1), 0.5), "one": ("sum", (1,), 1.0)}
    settings = {"starts": 2, "seed": 1, "sums": mean}
    first, second, both, alone = runs.make_rows(settings)
    assert [first["start"], second["start"]] == [0, 1]
    assert both["ranks"] == (1, [[2, 1], [1.5, 1.5]])
    assert alone["ranks"] == (1, [[2, 2], [3, 3]])
    plan = runs.planned(settings)
    kept = [
        {k: row[k] for k in p} for row, p in zip((first, second, both, alone), plan)
    ]
    assert kept == plan


def test_a_sum_that_is_cut_keeps_its_largest_directions():
    directions = torch.linalg.qr(torch.randn(20, 12))[0]
    values = torch.arange(12.0, 0, -1)
    parts = [
        {"a": (directions[:, half] * values[half], directions[:, half].T)}
        for half in (slice(0, 12, 2), slice(1, 12, 2))
    ]
    update = runs.joined(parts, "rank 8", 1.0)["a"]
    expected = torch.cat([values[:8], torch.zeros(12)])
    torch.testing.assert_close(
        torch.linalg.svdvals(update), expected, atol=1e-4, rtol=1e-4
    )


def test_ways_to_merge(small):
    """Each by hand: 16 bits, rounded again, and the sum with the exact weight."""
    weights = {n: m.weight for n, m in runs.layers(search.load_minilm()[1]).items()}
    adapter = {
        name: (torch.randn(len(W), 2) / 9, torch.randn(2, W.shape[1]) / 9)
        for name, W in weights.items()
    }
    form = runs.DEFAULTS | {"base": "int4", "block": 8}
    for name, W in weights.items():
        grid, (B, A) = formats.round_trip(W, "int4", 8), adapter[name]
        by_hand = {
            "bfloat16": (grid + B @ A).bfloat16().float(),
            "again": formats.round_trip(grid + B @ A, "int4", 8),
            "original": formats.round_trip(W + B @ A, "int4", 8),
        }
        for how, expected in by_hand.items():
            change = runs.merged(adapter, how, form)[name]
            torch.testing.assert_close(W + change, expected)


def test_a_run_and_what_its_merges_score(small, monkeypatch):
    settings = {"base": "NF4", "block": 8, "steps": 2, "rank": 2, "lr": 0.05}
    ways = "bfloat16", "again", "original"
    asked = []
    monkeypatch.setattr(runs, "merged", lambda a, how, s: asked.append((a, how, s)))
    monkeypatch.setattr(runs, "base_with", lambda update: search.load_minilm())
    apart, *rows = runs.make_rows(settings | {"merges": ways})
    assert apart["losses"] and [row["merged"] for row in rows] == list(ways)
    assert rows[0].items() >= (runs.DEFAULTS | settings).items()
    adapters, hows, forms = zip(*asked)
    assert hows == ways and all(f["base"] == "NF4" for f in forms)
    assert all(B.any() for B, A in adapters[0].values()), "the trained one"


def test_ties_keeps_what_is_large_and_agrees():
    """By hand: half of each update; where two of three say plus, their mean."""
    first = torch.tensor([[4.0, 1], [-3, 0]])
    second = torch.tensor([[2.0, 5], [1, -1]])
    third = torch.tensor([[-1.0, 0], [-5, 3]])
    expected = torch.tensor([[3.0, 5], [-4, 3]])
    assert torch.equal(runs.ties([first, second, third], 0.5), expected)
    against = torch.tensor([[-9.0, 0], [0, 2]])
    expected = torch.tensor([[-9.0, 5], [-3, 2]])
    assert torch.equal(runs.ties([first, second, against], 0.5), expected)
    assert torch.equal(runs.ties([first], 1.0), first)


def test_dare_drops_at_random_and_keeps_the_mean():
    update = torch.full((200, 200), 3.0)
    draw = runs.dare(update, 0.25, torch.Generator().manual_seed(0))
    assert set(draw.unique().tolist()) == {0, 12}
    assert abs(draw.mean() - 3) < 0.2
    again = runs.dare(update, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(draw, again)
    assert torch.equal(runs.dare(update, 1.0), update)


def test_ties_and_dare_as_recorded():
    """Each adapter and layer has a draw of its own; a seed repeats them."""
    torch.manual_seed(0)
    parts = [{n: (torch.randn(9, 2), torch.randn(2, 9)) for n in "ab"} for _ in "xyz"]
    updates = [B @ A for B, A in (part["b"] for part in parts)]
    (found,) = [runs.joined(parts, "TIES 0.2", 0.5)["b"]]
    assert torch.equal(found, 0.5 * runs.ties(updates, 0.2))
    draws = [runs.joined(parts, "DARE 0.5", 2.0, seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0]["b"], draws[1]["b"])
    assert not torch.equal(draws[0]["b"], draws[2]["b"])
    same = [{"a": part["a"], "b": part["a"]} for part in parts]
    twice = runs.joined(same, "DARE 0.5", 1.0, 1)
    assert not torch.equal(twice["a"], twice["b"])
    whole = runs.joined(parts, "DARE 1.0", 2.0)["b"]
    torch.testing.assert_close(whole, 2 * sum(updates))


# --- What is planned ---


def test_what_is_planned():
    assert runs.planned({"seed": 2}) == [runs.DEFAULTS | {"seed": 2}]
    first, second = runs.planned({"method": "full", "cuts": (8,)})
    assert second == first | {"cut": 8}


def test_no_run_is_planned_twice():
    rows = (
        json.dumps([study, *row.items()])
        for study, entries in runs.studies().items()
        for settings in entries
        for row in runs.planned(settings)
    )
    assert Counter(rows).most_common(1)[0][1] == 1


CHOOSING = "rates", "alpha", "rule", "places", "starts", "race rates"


def test_a_seed_that_chooses_does_not_report():
    for study, entries in runs.studies().items():
        for settings in entries:
            chooses = study in CHOOSING
            assert (settings["seed"] in (0, 6)) == chooses


# --- The file ---


def test_recorded_rows_of_a_study(file):
    rates = [2e-4, 1 / 3, math.pi * 1e-4, 5e-324]  # are read as they were written
    fast = [ROW | {"study": "rates", "lr": rate} for rate in rates]
    write(file, ROW, *fast, ROW | {"seed": 2})
    table = runs.recorded("main")
    assert list(table["seed"]) == [1, 2] and list(table.index) == [0, 1]
    assert list(table["lr"]) == [runs.DEFAULTS["lr"]] * 2, "younger than the row"
    assert table["ranks"][0] == ROW["ranks"]
    assert list(runs.recorded("rates")["lr"]) == rates
    with pytest.raises(ValueError, match=r"study must be one of \['main', 'rates'\]"):
        runs.recorded("no such study")
