"""Runs on the real model: one function that makes a run, and the file of those made.

A grid of runs takes longer than a chapter may. `make experiments` makes them all with
`run` and writes one row each into `lora/study/data/runs.jsonl`; `rows` reads them,
and a chapter makes some of them again. Chapter 4 of the book builds this file.
"""

import importlib.metadata
import json
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from lora import bases, core, formats
from lora.study import search

DATA = Path(__file__).parent / "data" / "runs.jsonl"
STAMP = DATA.with_suffix(".json")  # its SHA-256 and the commits that made it
# What a row depends on: the model's libraries, and those whose docstrings are read.
PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "matplotlib")
PACKAGES += ("sympy", "networkx")
TRAINED = search.LIBRARIES[:5]  # sympy and networkx are left out of training
ALL = r"encoder\.layer\.\d\..*"
DEFAULTS = {
    "method": "lora",  # or "full", or "none"
    "rank": 8,
    "scale": 1.0,  # alpha / r
    "lr": 2e-3,
    "steps": 48,
    "targets": ALL,
    "decay": 0.01,
    "shuffled": False,
    "base": "float32",  # or one of formats.LEVELS, with scales for blocks of
    "block": 64,
    "libraries": list(TRAINED),  # whose pairs are trained on
    "start": 0,  # adapters of one seed that start from other A's
    "seed": 0,
}


def prepare(model, settings):
    """Make trainable what the settings say, in place: adapters, everything, nothing.

    Where the base is to be in few bits, its linear layers are rounded to them before.
    """
    core.freeze_all(model)
    if settings["base"] != "float32":
        for layer in layers(model).values():
            form = settings["base"], settings["block"]
            layer.weight.data = formats.round_trip(layer.weight, *form)
    if settings["method"] == "full":
        model.requires_grad_(True)
        model.pooler.requires_grad_(False)  # no part of an embedding
    elif settings["method"] == "lora":
        torch.manual_seed(settings["seed"] + 1000 * settings["start"])
        rank = settings["rank"]
        alpha = settings["scale"] * rank
        core.inject_lora(model, rank=rank, alpha=alpha, targets=settings["targets"])
    return model


def data(seed, libraries=TRAINED, shuffled=False):
    """(pairs to train on, pairs to choose by, pairs to report).

    The first is a list, of some `libraries`; the other two are dictionaries, library ->
    50 and 150 pairs, of all seven. `seed` draws the pairs to report; those to choose by
    stay. `shuffled` gives each name the sentence of another: nothing can be learned.
    """
    parts = {
        library: search.split(search.docstring_pairs(library), seed)
        for library in search.LIBRARIES
    }
    if strange := [library for library in libraries if library not in parts]:
        raise ValueError(f"libraries must be of {search.LIBRARIES}, got {strange}")
    train = [pair for library in libraries for pair in parts[library][0]]
    if shuffled:
        names, sentences = zip(*train)
        train = list(zip(names, sentences[1:] + sentences[:1]))
    _, choose, report = zip(*parts.values())
    return train, dict(zip(parts, choose)), dict(zip(parts, report))


def ranks(model, tokenizer, tests):
    """Library -> the rank of each name's sentence among those of its library, ints."""
    found = {}
    for library, pairs in tests.items():
        score = search.search_score(model, tokenizer, pairs)
        found[library] = (1 / score).round().int().tolist()
    return found


def run(**settings):
    """Make one run; return its tokenizer, its model and its row, a dictionary.

    Settings that are not named are `DEFAULTS`. The row holds them, the rank of each
    query that is reported ("ranks") and of each query to choose by ("chosen"), the loss
    of each step, and the time of a step in forward passes of the base ("step_time").
    Raises ValueError for a setting or a method that there is none of.
    """
    if strange := settings.keys() - DEFAULTS.keys():
        raise ValueError(f"settings are {[*DEFAULTS]}, got {sorted(strange)}")
    settings = DEFAULTS | settings
    if settings["method"] not in ("lora", "full", "none"):
        method = settings["method"]
        raise ValueError(f"method must be 'lora', 'full' or 'none', got {method!r}")
    tokenizer, model = search.load_minilm()
    pairs = settings["seed"], settings["libraries"], settings["shuffled"]
    train, choose, report = data(*pairs)
    probe = [name for name, _ in train[:32]] + [s for _, s in train[:32]]
    clock = []
    for _ in range(4):
        start = time.process_time()
        search.embed(model, tokenizer, probe, batch=32)
        clock.append(time.process_time() - start)
    prepare(model, settings)
    losses, start = [], time.process_time()
    if settings["method"] != "none":
        losses = search.fine_tune(
            model,
            tokenizer,
            train,
            settings["steps"],
            settings["lr"],
            seed=settings["seed"],
            weight_decay=settings["decay"],
        )
    seconds = (time.process_time() - start) / max(1, len(losses))
    row = settings | {"versions": versions()}
    row["step_time"] = round(seconds / min(clock), 2)
    row["losses"] = [round(x, 3) for x in losses]
    row["chosen"] = ranks(model, tokenizer, choose)
    row["ranks"] = ranks(model, tokenizer, report)
    return tokenizer, model, row


def versions():
    """The versions of `PACKAGES` as a row holds them: "torch=2.13.0 ..."."""
    found = ((name, importlib.metadata.version(name)) for name in PACKAGES)
    return " ".join(f"{name}={version}" for name, version in found)


def other_versions(row):
    """Those of a row's versions that are not installed here, "" if all are.

    The build of a version ("+cpu") is left aside.
    """
    here = {entry.partition("+")[0] for entry in versions().split()}
    return " ".join(
        entry
        for entry in row["versions"].split()
        if entry.partition("+")[0] not in here
    )


def points(row):
    """100 times the mean reciprocal rank over all queries that a row reports."""
    found = [1 / rank for ranks in row["ranks"].values() for rank in ranks]
    return 100 * sum(found) / len(found)


def layers(model):
    """Qualified name -> the linear layers of the six blocks, 36 of them."""
    return {n: m for n, m in bases.find(model, nn.Linear).items() if "encoder" in n}


def rows(study):
    """The recorded runs of one study, a DataFrame with a row a run, as they were made.

    Settings that are younger than a row have their default. Raises FileNotFoundError if
    there is no file or nothing in it, ValueError if a line is cut or there is no such
    study.
    """
    if not DATA.is_file() or not DATA.stat().st_size:
        raise FileNotFoundError(f"{DATA} holds no runs: `make experiments` makes them")
    found = []
    for i, line in enumerate(DATA.read_text().splitlines(), 1):
        try:
            found.append(DEFAULTS | json.loads(line))
        except ValueError:
            message = f"line {i} of {DATA} is no JSON, cut? `make experiments` mends it"
            raise ValueError(message) from None
    table = pd.DataFrame(found)
    if study not in set(table["study"]):
        raise ValueError(f"study must be one of {[*table['study'].unique()]}")
    return table[table["study"] == study].reset_index(drop=True)
