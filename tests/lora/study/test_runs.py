"""`lora.study.runs`: a run on a small model, the file of runs, what is read of it."""

import json
import math
from importlib.metadata import version

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel

from lora.study import runs, search

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
        for library in search.LIBRARIES
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
    monkeypatch.setattr(search, "documented", lambda: pairs)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of rows, in a folder of its own, not there yet."""
    monkeypatch.setattr(runs, "DATA", tmp_path / "runs.jsonl")
    return runs.DATA


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_data_of_a_seed(small):
    train, choose, report = runs.data(1)
    assert len(train) == 5 * 10
    assert not any("sympy" in s or "networkx" in s for _, s in train)
    assert list(choose) == list(report) == list(search.LIBRARIES)
    for library in search.LIBRARIES:
        held_out = {*choose[library], *report[library]}
        assert len(held_out) == 200 and not held_out & {*train}
        pairs = search.docstring_pairs(library)
        assert search.split(pairs, 1)[1:] == (choose[library], report[library])
    assert runs.data(2)[1] == choose and runs.data(2)[2] != report
    one = runs.data(1, ["sympy"])
    assert len(one[0]) == 10 and one[1:] == (choose, report)
    with pytest.raises(ValueError, match=r"libraries must be of .* got \['pandas'\]"):
        runs.data(1, ["numpy", "pandas"])


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


def test_a_run_and_its_row(small):
    settings = {"rank": 2, "steps": 2, "lr": 0.05, "seed": 3, "decay": 0.0}
    tokenizer, model, row = runs.run(**settings)
    assert row == json.loads(json.dumps(row))
    assert {k: row[k] for k in runs.DEFAULTS} == runs.DEFAULTS | settings
    assert len(row["losses"]) == 2 and row["step_time"] > 0
    assert {k: len(v) for k, v in row["chosen"].items()} == dict.fromkeys(
        search.LIBRARIES, 50
    )
    score = search.search_score(model, tokenizer, runs.data(3)[2]["scipy"])
    assert score.tolist() == pytest.approx([1 / r for r in row["ranks"]["scipy"]])
    assert all(1 <= r <= 150 for ranks in row["ranks"].values() for r in ranks)
    again = runs.run(**settings)[2]
    assert row | {"step_time": 0} == again | {"step_time": 0}
    other = runs.run(**settings | {"lr": 0.5})[2]
    assert other["ranks"] != row["ranks"]


def test_a_run_without_training_is_the_base(small):
    _, model, row = runs.run(method="none")
    assert row["losses"] == [] and row["step_time"] >= 0
    _, base = search.load_minilm()
    for name, value in base.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 4}, r"settings are \['method', .*got \['ranks'\]"),
        ({"method": "LoRA"}, "method must be 'lora', 'full' or 'none', got 'LoRA'"),
        ({"steps": 0}, "steps must be"),
        ({"rank": 0}, "rank must be"),
        ({"targets": "decoder.*"}, "no layer whose name is"),
        ({"seed": None}, "seed must be"),
        ({"base": "NF5"}, "NF5"),
    ],
)
def test_a_run_refuses(small, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        runs.run(**settings)


def test_versions_are_those_of_the_installed():
    found = dict(entry.split("=") for entry in runs.versions().split())
    assert found == {name: version(name) for name in runs.PACKAGES}
    row = {"versions": runs.versions()}
    assert runs.other_versions(row) == ""
    bare = " ".join(e.partition("+")[0] for e in row["versions"].split())
    assert runs.other_versions({"versions": bare + " "}) == ""
    old = row["versions"].replace(f"sympy={version('sympy')}", "sympy=1.0")
    assert runs.other_versions({"versions": old}) == "sympy=1.0"


def test_points_are_the_mean_over_all_queries():
    assert runs.points(ROW) == pytest.approx(100 * (1 + 1 / 2 + 1 / 4) / 3)


def test_rows_of_a_study(file):
    write(file, ROW, ROW | {"study": "rates", "lr": 3e-4}, ROW | {"seed": 2})
    table = runs.rows("main")
    assert list(table["seed"]) == [1, 2] and list(table.index) == [0, 1]
    assert list(table["lr"]) == [runs.DEFAULTS["lr"]] * 2, "younger than the row"
    assert table["ranks"][0] == ROW["ranks"]
    assert list(runs.rows("rates")["lr"] == 3e-4) == [True]
    assert isinstance(table, pd.DataFrame)


def test_figures_are_read_as_they_were_written(file):
    rates = [2e-4, 1 / 3, math.pi * 1e-4, 5e-324]
    write(file, *({"study": "x", "lr": rate} for rate in rates))
    assert list(runs.rows("x")["lr"]) == rates


def test_rows_without_a_file(file):
    with pytest.raises(FileNotFoundError, match="holds no runs: `make experiments`"):
        runs.rows("main")
    file.write_text("")
    with pytest.raises(FileNotFoundError, match="holds no runs"):
        runs.rows("main")


def test_rows_of_a_cut_file(file):
    write(file, ROW, ROW)
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match="line 2 of .* is no JSON, cut"):
        runs.rows("main")


def test_rows_of_no_study(file):
    write(file, ROW)
    with pytest.raises(ValueError, match=r"study must be one of \['main'\]"):
        runs.rows("no such study")
