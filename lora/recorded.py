"""Runs on the real model: one function that makes a run, and the file of those made.

A grid of runs takes longer than a chapter may. `make experiments` makes them all with
`run` and writes one row each into `lora/data/runs.jsonl`; `rows` reads them, and a
chapter makes some of them again. Chapter 4 of the book builds this file.
"""

import importlib.metadata
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from lora import core, search

DATA = Path(__file__).parent / "data" / "runs.jsonl"
TRAINED = search.LIBRARIES[:5]  # sympy and networkx are left out of training
ALL = r"encoder\.layer\.\d\..*"
DEFAULTS = {
    "method": "lora",  # or "full", or "none"
    "rank": 8,
    "scale": 1.0,  # alpha / r
    "lr": 1e-3,
    "steps": 48,
    "targets": ALL,
    "decay": 0.01,
    "shuffled": False,
    "seed": 0,
}


def prepare(model, settings):
    """Make trainable what the settings say, in place: adapters, everything, nothing."""
    core.freeze_all(model)
    if settings["method"] == "full":
        model.requires_grad_(True)
        model.pooler.requires_grad_(False)  # no part of an embedding
    elif settings["method"] == "lora":
        torch.manual_seed(settings["seed"])
        rank = settings["rank"]
        alpha = settings["scale"] * rank
        core.inject_lora(model, rank=rank, alpha=alpha, targets=settings["targets"])
    return model


def data(seed, libraries=TRAINED, shuffled=False):
    """Training pairs of some libraries, and the pairs to report of all seven.

    `shuffled` gives each name the sentence of another: there is nothing to learn.
    """
    parts = {
        library: search.split(search.docstring_pairs(library), seed)
        for library in search.LIBRARIES
    }
    train = [pair for library in libraries for pair in parts[library][0]]
    if shuffled:
        names, sentences = zip(*train)
        train = list(zip(names, sentences[1:] + sentences[:1]))
    return (
        train,
        {k: part[1] for k, part in parts.items()},
        {k: part[2] for k, part in parts.items()},
    )


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
    """
    settings = DEFAULTS | settings
    tokenizer, model = search.load_minilm()
    train, choose, tests = data(settings["seed"], shuffled=settings["shuffled"])
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
    row["ranks"] = ranks(model, tokenizer, tests)
    return tokenizer, model, row


def versions():
    """The versions that a row depends on: of the model's libraries, of the data."""
    names = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "matplotlib")
    names += ("sympy", "networkx")
    return " ".join(f"{name}={importlib.metadata.version(name)}" for name in names)


def layers(model):
    """Qualified name -> the linear layers of the six blocks, 36 of them."""
    return {n: m for n, m in core.find(model, nn.Linear).items() if "encoder" in n}


def rows(study):
    """The recorded runs of one study, a DataFrame with a row a run."""
    table = pd.read_json(DATA, lines=True)
    return table[table["study"] == study].reset_index(drop=True)
