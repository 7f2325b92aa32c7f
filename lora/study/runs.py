"""Runs on the real model: how each is made, which there are, the file of those made.

A grid of runs takes longer than a chapter may. `make experiments` makes all `studies`
and writes a row for each run into `lora/study/data/runs.jsonl`; `recorded` reads them,
and a chapter makes some of them again. Chapter 4 of the book builds this file.
"""

import contextlib
import functools
import importlib.metadata
import json
import math
import random
import re
import time
from collections import deque
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lora import bases, core, formats, nf4, variants
from lora.rank import energy, rank_for_energy, truncate
from lora.study import search
from lora.study.docstrings import LIBRARIES, docstring_pairs, documented, split
from lora.study.evidence import Verdict, clustered, interval, shown

FOLDER = Path(__file__).parent / "data"
DATA = FOLDER / "runs.jsonl"
# What a row depends on: the model's libraries, and those whose docstrings are read.
PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "matplotlib")
PACKAGES += ("sympy", "networkx")
# How many pairs each library had when the rows were made: what a seed draws from them.
PAIRS = dict(zip(LIBRARIES, (461, 825, 375, 485, 815, 582, 457)))
TRAINED = LIBRARIES[:5]  # sympy and networkx are left out of training
ALL = r"encoder\.layer\.\d\..*"
DEFAULTS = {
    "method": "lora",  # or "full", or "none"
    "rank": 8,
    "scale": 1.0,  # alpha / r
    "init": "randn / r",  # of A; or "kaiming", PEFT's
    "lr": 2e-3,
    "steps": 48,
    "targets": ALL,
    "decay": 0.01,
    "shuffled": False,
    "base": "float32",  # or one of formats.LEVELS, with scales for blocks of
    "block": 64,
    "double": False,  # of NF4: whether its scales are in few bits, too
    "precision": "float32",  # or another of PRECISIONS
    "libraries": list(TRAINED),  # whose pairs are trained on
    "pairs": 0,  # how many of them, drawn with the seed; 0 is all
    "queries": "names",  # or "words" of the sentence, or "both": see data
    "elsewhere": False,  # whether questions and everyday sentences are tried, too
    "start": 0,  # adapters of one seed that start from other A's
    "variant": "lora",  # or another of VARIANTS
    "schedule": "up and down",  # or another of SCHEDULES
    "batch": 32,
    "clip": 0.0,  # the largest norm of all gradients together; 0 is none
    "average": 0,  # over the last so many steps; 0 takes the weights of the last
    "seed": 0,
}


class DroppedOut(core.LoRALinear):
    """LoRA with dropout of a tenth on the update's input while gradients are made."""

    def forward(self, x):
        thinned = F.dropout(x, 0.1, training=torch.is_grad_enabled())
        return core.LowRankUpdate.forward(self, thinned, self.base(x))


# How each variant is put into a model: (model, targets, rank, alpha) -> wrappers. That
# of LoRA+ is in the rates of its optimizer.
VARIANTS = {
    "lora": lambda m, t, r, a: core.inject_lora(m, rank=r, alpha=a, targets=t),
    "rsLoRA": lambda m, t, r, a: core.inject_lora(
        m, rank=r, alpha=variants.rslora_alpha(r, a), targets=t
    ),
    "LoRA+": lambda m, t, r, a: core.inject_lora(m, rank=r, alpha=a, targets=t),
    "PiSSA": lambda m, *s: variants.inject(m, variants.PiSSALinear, *s),
    "DoRA": lambda m, *s: variants.inject(m, variants.DoRALinear, *s),
    "LoRA-FA": lambda m, *s: variants.inject(m, variants.LoRAFALinear, *s),
    "dropout": lambda m, *s: variants.inject(m, DroppedOut, *s),
    "VeRA": lambda m, t, r, a: variants.inject_vera(m, t, r, torch.initial_seed()),
}
# The share of the rate at step t of n.
SCHEDULES = {
    "up and down": search.up_and_down,
    "cosine": lambda t, n: min(10 * (t + 1) / n, (1 + math.cos(math.pi * t / n)) / 2),
    "constant": lambda t, n: min(10 * (t + 1) / n, 1),
    "no warm-up": lambda t, n: 1 - t / n,
}
# What is stored or computed in half precision in a run: the products while it trains
# ("autocast", in bfloat16), the base, or the base and the adapters; or the products in
# float16, without and with a loss that is scaled.
PRECISIONS = "float32", "autocast", "bfloat16 base", "bfloat16 base and adapters"
PRECISIONS += "float16", "float16, scaled"
SCALE = 2.0**16
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm")}
KS = (1, 2, 4, 8, 16, 32, 64, 384)  # directions of a change that a row tells about
KEYS = [*DEFAULTS, "cut", "merged", "composed"]  # what tells two rows of a study apart
# Between processors, training in float32 goes other ways: what may lie between the mean
# reciprocal ranks of two runs of the same settings, in points.
TOLERANCE = 1.0


def prepare(model, settings):
    """Make trainable what the settings say, in place: adapters, everything, nothing.

    Where the base is to be in few bits, its linear layers are rounded to them before.
    """
    core.freeze_all(model)
    if "base" in settings["precision"]:
        model.to(torch.bfloat16)
    if settings["base"] != "float32":
        for layer in layers(model).values():
            layer.weight.data = few_bits(layer.weight, settings)
    if settings["method"] == "full":
        model.requires_grad_(True)
        model.pooler.requires_grad_(False)  # no part of an embedding
    elif settings["method"] == "lora":
        torch.manual_seed(settings["seed"] + 1000 * settings["start"])
        rank = settings["rank"]
        alpha = settings["scale"] * rank
        inject = VARIANTS[settings["variant"]]
        wrappers = inject(model, settings["targets"], rank, alpha)
        if settings["init"] == "kaiming":
            for wrapper in wrappers:
                nn.init.kaiming_uniform_(wrapper.A, a=math.sqrt(5))
        if "adapters" in settings["precision"]:
            model.to(torch.bfloat16)


def few_bits(weight, settings):
    """A weight as it comes back from the few bits that the settings name."""
    base, block = settings["base"], settings["block"]
    if settings["double"]:
        return nf4.NF4Linear(weight, block=block).dense_weight()
    return formats.round_trip(weight, base, block)


def layers(model):
    """Qualified name -> the linear layers of the six blocks, 36 of them."""
    return {n: m for n, m in bases.find(model, nn.Linear).items() if "encoder" in n}


def data(seed, libraries=TRAINED, shuffled=False, pairs=0, queries="names"):
    """(pairs to train on, pairs to choose by, pairs to report).

    The first is a list, of some `libraries`; the other two are dictionaries, library ->
    50 and 150 pairs, of all seven. `seed` draws the pairs to report; those to choose by
    stay. `shuffled` gives each name the sentence of another: nothing can be learned.
    `pairs` keeps that many of the first. `queries` are the "names", or "words" that
    stand for a question, `some_words` of the sentence, or "both", half and half.
    """
    parts = {library: split(docstring_pairs(library), seed) for library in LIBRARIES}
    train = [pair for library in libraries for pair in parts[library][0]]
    draw = random.Random(seed)
    if shuffled:
        names, sentences = zip(*train)
        train = list(zip(names, sentences[1:] + sentences[:1]))
    if pairs:
        train = draw.sample(train, pairs)
    if queries != "names":
        share = {"words": 1, "both": 0.5}[queries]
        train = [
            (some_words(sentence, draw) if draw.random() < share else name, sentence)
            for name, sentence in train
        ]
    _, choose, report = zip(*parts.values())
    return train, dict(zip(parts, choose)), dict(zip(parts, report))


def some_words(sentence, draw):
    """A question made of a sentence: about half of its words, shuffled, two at least.

    "Return the sum of array elements." might become "elements sum the". `draw` is a
    `random.Random`.
    """
    words = re.findall(r"[\w'-]+", sentence.lower())
    count = min(len(words), max(2, round(len(words) / 2)))
    return " ".join(draw.sample(words, count))


def ranks(model, tokenizer, tests):
    """Library -> the rank of each name's sentence among those of its library, ints."""
    scores = {
        library: search.search_score(model, tokenizer, pairs)
        for library, pairs in tests.items()
    }
    return {library: (1 / s).round().int().tolist() for library, s in scores.items()}


def asked(model, tokenizer):
    """The rank of the answer to each of `data/questions.csv`, among all functions."""
    table = pd.read_csv(FOLDER / "questions.csv")
    shelf = {name: line for part in documented().values() for name, _, line in part}
    answers = [shelf.pop(name) for name in table["answer"]]
    sides = list(table["question"]), [*answers, *shelf.values()]
    sides = [search.embed(model, tokenizer, side) for side in sides]
    return (1 / search.reciprocal_ranks(*sides)).round().int().tolist()


def everyday(model, tokenizer):
    """How a model does on `data/everyday.csv`, no word of it about functions.

    "everyday" is the rank of the sentence that means the same as the first, among those
    of all lines and what shares the words of another line; "nats" the cross-entropy of
    that choice, with the temperature of `search.contrastive_loss`.
    """
    table = pd.read_csv(FOLDER / "everyday.csv")
    start, same, other = (search.embed(model, tokenizer, list(table[c])) for c in table)
    scores = torch.cat([start @ same.T, start @ other.T], dim=1)
    scores.diagonal(len(start)).fill_(-1)  # what shares the sentence's own words
    own = scores.diagonal()
    nats = (20 * scores).logsumexp(1) - 20 * own
    return {
        "everyday": (scores >= own[:, None]).sum(1).tolist(),
        "nats": [round(n, 3) for n in nats.tolist()],
    }


def make_run(**settings):
    """Make one run; return its tokenizer, its model and its row, a dictionary.

    Settings that are not named are `DEFAULTS`. The row holds them, the rank of each
    query that is reported ("ranks") and of each query to choose by ("chosen"), the loss
    of each step, the time of a step in forward passes of the base ("step_time"), and
    the "device" that it was made on: PyTorch's default. What is tried elsewhere stands
    under "asked", "everyday" and "nats".
    Raises ValueError for a setting or a precision that there is none of, or "double"
    without NF4.
    """
    if strange := settings.keys() - DEFAULTS.keys():
        raise ValueError(f"settings are {[*DEFAULTS]}, got {sorted(strange)}")
    settings = DEFAULTS | settings
    if settings["double"] and settings["base"] != "NF4":
        raise ValueError(f"double is for NF4, got the base {settings['base']!r}")
    if settings["precision"] not in PRECISIONS:
        raise ValueError(f"precision is of {PRECISIONS}, got {settings['precision']!r}")
    seed = settings["seed"]
    tokenizer, model = search.load_minilm()
    of_data = ("libraries", "shuffled", "pairs", "queries")
    train, choose, report = data(seed, *(settings[name] for name in of_data))
    probe = [name for name, _ in train[:32]] + [s for _, s in train[:32]]
    clock = []
    for _ in range(4):
        start = time.process_time()
        search.embed(model, tokenizer, probe, batch=32)
        clock.append(time.process_time() - start)
    prepare(model, settings)
    losses, start = [], time.process_time()
    if settings["method"] != "none":
        steps, lr, decay = (settings[name] for name in ("steps", "lr", "decay"))
        plus = settings["variant"] == "LoRA+"
        groups = variants.loraplus_groups(model, lr) if plus else None
        precision = half_precision(model, settings["precision"])
        with precision, beside_steps(model, settings["clip"], settings["average"]):
            losses = search.fine_tune(
                model,
                tokenizer,
                train,
                steps,
                lr,
                settings["batch"],
                seed,
                weight_decay=decay,
                groups=groups,
                schedule=SCHEDULES[settings["schedule"]],
            )
    seconds = (time.process_time() - start) / max(1, len(losses))
    row = settings | {"versions": versions(), "device": model.device.type}
    row["step_time"] = round(seconds / min(clock), 2)
    row["losses"] = [round(loss, 3) for loss in losses]
    row["chosen"] = ranks(model, tokenizer, choose)
    row["ranks"] = ranks(model, tokenizer, report)
    if settings["elsewhere"]:
        row |= {"asked": asked(model, tokenizer)} | everyday(model, tokenizer)
    return tokenizer, model, row


class RoundedProducts(TorchDispatchMode):
    """Products of float16 come from float32's, rounded once.

    So Micikevicius et al. 2018 sum them (arXiv:1710.03740, section 3.3). A processor's
    own float16 takes thirty times as long.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket not in PRODUCTS or args[0].dtype != torch.float16:
            return function(*args, **(kwargs or {}))
        wide = tree_map_only(torch.Tensor, torch.Tensor.float, args)
        return function(*wide, **(kwargs or {})).half()


@contextlib.contextmanager
def half_precision(model, precision):
    """While it is open, the model's products are as one of `PRECISIONS` has them.

    A loss is scaled as by `torch.amp.GradScaler`, which begins with `SCALE`: gradients
    come into the model that much larger, and its parameters get them divided again.
    """
    dtypes = {"autocast": torch.bfloat16, "float16": torch.float16}
    dtype = dtypes.get(precision.removesuffix(", scaled"))
    with contextlib.ExitStack() as stack:
        if dtype is not None:
            # For a pass: around the loop it would keep weights of the first step.
            model.forward = torch.autocast(model.device.type, dtype)(model.forward)
            stack.callback(delattr, model, "forward")
        if dtype == torch.float16:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # attention by products
            stack.enter_context(RoundedProducts())
        if precision.endswith("scaled"):
            last = model.encoder.layer[-1].output
            hooks = [last.register_full_backward_pre_hook(lambda _, g: (g[0] * SCALE,))]
            trained = (p for p in model.parameters() if p.requires_grad)
            hooks += [p.register_hook(lambda g: g / SCALE) for p in trained]
            for hook in hooks:
                stack.enter_context(hook)
        yield


@contextlib.contextmanager
def beside_steps(model, clip, average):
    """While it is open, any optimizer's steps also clip, and the last are averaged.

    All gradients of `model` together get a norm of `clip` at most; in the end the
    trained numbers are their means after the last `average` steps. Zero is neither.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    recent = deque(maxlen=average)

    def before(*_):
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)

    def after(*_):
        if average:
            recent.append([p.detach().clone() for p in trained])

    hooks = (
        optimizer.register_optimizer_step_pre_hook(before),
        optimizer.register_optimizer_step_post_hook(after),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if average:
        for p, values in zip(trained, zip(*recent)):
            p.data = torch.stack(values).mean(0)


def versions():
    """The versions of `PACKAGES` as a row holds them: "torch=2.13.0 ..."."""
    return " ".join(f"{name}={importlib.metadata.version(name)}" for name in PACKAGES)


def other_versions(row):
    """Those of a row's versions that are not installed here, "" if all are.

    The build of a version ("+cpu") is left aside.
    """
    here = {entry.partition("+")[0] for entry in versions().split()}
    then = row["versions"].split()
    return " ".join(entry for entry in then if entry.partition("+")[0] not in here)


def points(row):
    """100 times the mean reciprocal rank over all queries that a row reports."""
    scores = [1 / rank for ranks in row["ranks"].values() for rank in ranks]
    return 100 * sum(scores) / len(scores)


@functools.cache
def reported(seed):
    """Library -> which of its pairs a row of this seed reports, in the order of ranks.

    A pair is told by its place in `docstring_pairs(library)` as it was when the rows
    were made, so that a query is known again under another seed.
    """
    return {name: split(range(n), seed)[2] for name, n in PAIRS.items()}


def scores(rows, libraries=LIBRARIES):
    """100 / rank of each query that rows report: a Series by seed, library and pair.

    `rows` is a DataFrame such as `recorded` gives, or a list of rows. A pair is told as
    `reported` tells it. What others of the same seeds score can be subtracted.
    """
    rows = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
    found = [
        (row["seed"], library, pair, 100 / rank)
        for row in rows
        for library in libraries
        for pair, rank in zip(reported(row["seed"])[library], row["ranks"][library])
    ]
    table = pd.DataFrame(found, columns=["seed", "library", "pair", "score"])
    return table.set_index(["seed", "library", "pair"])["score"]


def intervals(points, level=0.95):
    """(over names, over seeds): the mean of what `scores` gives, or of a difference.

    Each is (mean, low, high). Over names: had other names been asked, each counted once
    however many seeds drew it. Over seeds: had the runs been made anew.
    """
    names = points.index.droplevel("seed").to_flat_index()
    by_seed = points.groupby("seed").mean()
    return clustered(points, names, level), interval(by_seed, level)


def compared(first, second, libraries=TRAINED, level=0.95):
    """`intervals` of what rows score above others of the same seeds, in points.

    A seed that only one side has is left out.
    """
    ahead = scores(first, libraries) - scores(second, libraries)
    return intervals(ahead.dropna(), level)


def is_ahead(first, second, libraries=TRAINED):
    """Whether rows score above others of the same seeds: over names, one verdict."""
    over_names, _ = compared(first, second, libraries)
    return Verdict(over_names[1] > 0, *over_names)


def both(first, second, libraries=TRAINED):
    """`compared` as columns of a table, each a text like "1.5 [1.0, 2.0]"."""
    texts = (shown(*entry) for entry in compared(first, second, libraries))
    return dict(zip(("over names", "over seeds"), texts))


def recorded(study):
    """The recorded rows of one study, a DataFrame, as they were made.

    What does not name its device was made on a CPU.
    """
    return read_rows(DATA, DEFAULTS | {"device": "cpu"}, study)


def read_rows(file, older, study):
    """The rows of one study in a file of rows, a DataFrame.

    Settings that are younger than a row are as in `older`. Raises ValueError if there
    is no such study.
    """
    lines = file.read_text().splitlines()
    table = pd.DataFrame([older | json.loads(line) for line in lines])
    if study not in set(table["study"]):
        raise ValueError(f"study must be one of {[*table['study'].unique()]}")
    return table[table["study"] == study].reset_index(drop=True)


@functools.cache
def of_base(seed):
    """The row of the base with a seed's queries: recorded, or made if it is not."""
    main = recorded("main")
    found = main[(main["method"] == "none") & (main["seed"] == seed)]
    rows = found.to_dict("records") or [make_run(method="none", seed=seed)[2]]
    return rows[0]


def gains(*rows):
    """What each query gains over the base: a Series as `scores` gives it."""
    return scores(rows) - scores([of_base(row["seed"]) for row in rows])


def planned(settings):
    """The settings of each row that `make_rows` gives, in its order.

    Beside those of a run, `settings` may hold "cuts", the ranks to which the change of
    full fine-tuning is cut; "merges", the ways of `merged`; or "sums", name -> (how,
    libraries, weight). With sums there is an adapter for each library, from an A of its
    own if "start" is negative; or, with "starts", so many for the same pairs, each from
    an A of its own, whose numbers stand in place of libraries.
    """
    settings = DEFAULTS | settings
    cuts, merges = settings.pop("cuts", ()), settings.pop("merges", ())
    sums, starts = settings.pop("sums", {}), settings.pop("starts", 0)
    if starts:
        alike = [settings | {"start": i} for i in range(starts)]
        return alike + [settings | {"start": -1, "composed": name} for name in sums]
    if not sums:
        after = [{"cut": k} for k in cuts] + [{"merged": how} for how in merges]
        return [settings, *(settings | change for change in after)]
    own = settings["start"] < 0
    adapters = [
        {"libraries": [library], "start": i if own else settings["start"]}
        for i, library in enumerate(LIBRARIES, 1)
    ]
    together = [
        {"libraries": list(of), "composed": name} for name, (_, of, _) in sums.items()
    ]
    return [settings | change for change in adapters + together]


def make_rows(settings):
    """The rows that are `planned`: of runs, cuts of a change, merges, sums of adapters.

    A row of full fine-tuning also holds the `spectrum` of its change.
    """
    rows, change, factors = [], {}, {}
    for row in planned(settings):
        if row.keys() == DEFAULTS.keys():
            _, model, row = make_run(**row)
            which = row["start"] if "starts" in settings else row["libraries"][0]
            factors[which] = factors_of(model)
            if row["method"] == "full":
                change = change_of(model)
                row |= spectrum(change)
        else:
            if "cut" in row:
                update = {name: truncate(C, row["cut"]) for name, C in change.items()}
            elif "merged" in row:
                (adapter,) = factors.values()
                update = merged(adapter, row["merged"], row)
            else:
                how, of, weight = settings["sums"][row["composed"]]
                adapters = [factors[which] for which in of]
                update = joined(adapters, how, weight, row["seed"])
            tokenizer, model = base_with(update)
            row["ranks"] = ranks(model, tokenizer, data(row["seed"])[2])
        rows.append(row)
    return rows


def change_of(model):
    """Name -> how far training moved the weight of a layer of the blocks."""
    base = layers(search.load_minilm()[1])
    return {
        name: (layer.weight - base[name].weight).detach()
        for name, layer in layers(model).items()
    }


def spectrum(change):
    """Of each layer's change: the energy in its first `KS` directions, the rank of 90%.

    What the rows of full fine-tuning hold beside their ranks.
    """
    kept = {name: energy(C) for name, C in change.items()}
    return {
        "energy": {n: [round(e[k - 1].item(), 4) for k in KS] for n, e in kept.items()},
        "rank_90": {name: rank_for_energy(C).item() for name, C in change.items()},
    }


def factors_of(model):
    """Name -> (B with the scale, A) of each adapter."""
    wrappers = bases.find(model, core.LoRALinear)
    return {n: (w.scale * w.B.detach(), w.A.detach()) for n, w in wrappers.items()}


def merged(adapter, how, settings):
    """Name -> the change of a weight whose base was rounded and got an adapter merged.

    `adapter` is name -> (B, A), trained on the base of `settings`. "bfloat16" stores
    the sum of rounded weight and update in 16 bits, "again" rounds it as the base was,
    and "original" rounds the sum of exact weight and update.
    """
    update = {}
    for name, layer in layers(search.load_minilm()[1]).items():
        W, (B, A) = layer.weight.detach(), adapter[name]
        whole = (W if how == "original" else few_bits(W, settings)) + B @ A
        stored = whole.bfloat16() if how == "bfloat16" else few_bits(whole, settings)
        update[name] = stored - W
    return update


def base_with(update):
    """The base's tokenizer, and the base with an update of its layers added.

    `update` is name -> (d_out, d_in).
    """
    tokenizer, model = search.load_minilm()
    for name, layer in layers(model).items():
        layer.weight.data += update[name]
    return tokenizer, model


def joined(adapters, how, weight, seed=0):
    """Name -> the update of several adapters together; each is name -> (B, A).

    "sum" adds the updates B A; "rank 8" cuts that to its eight largest directions;
    "TIES 0.2" and "DARE 0.2" keep that share of each update's entries; "average"
    multiplies the mean B by the mean A; "linear" is PEFT's, the roots of the weights on
    both factors. `seed` is for what DARE drops.
    """
    kind, _, number = how.partition(" ")
    update, generator = {}, None
    for name in adapters[0]:
        Bs, As = zip(*(adapter[name] for adapter in adapters))
        if kind in ("average", "linear"):
            on_each = weight if kind == "average" else weight**0.5
            update[name] = (on_each * sum(Bs)) @ (on_each * sum(As))
            continue
        parts = [B @ A for B, A in zip(Bs, As)]
        if kind == "DARE":
            generator = generator or torch.Generator(Bs[0].device).manual_seed(seed)
            parts = [dare(part, float(number), generator) for part in parts]
        whole = ties(parts, float(number)) if kind == "TIES" else sum(parts)
        update[name] = weight * whole
        if kind == "rank":
            update[name] = truncate(update[name], int(number))
    return update


def ties(updates, density):
    """What several updates (d_out, d_in) agree on: one update.

    Yadav et al. 2023, arXiv:2306.01708, matrix by matrix. Of each update the largest
    entries are kept, a share `density`; each place takes the sign that has the larger
    sum there, and the mean of what is kept of that sign.
    """
    kept = torch.stack(updates)
    size = kept.abs().flatten(1)
    drop = size.shape[1] - int(density * size.shape[1])
    least = size.kthvalue(drop + 1, keepdim=True).values.unsqueeze(-1)
    kept = kept * (kept.abs() >= least)
    agree = kept.sign() == kept.sum(0).sign()
    return (kept * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(update, density, generator=None):
    """An update with a share `density` of its entries, drawn at random, the rest zero.

    Yu et al. 2023, arXiv:2311.03099. What is left is divided by `density`, so that the
    mean over many draws is the update.
    """
    draw = torch.rand(update.shape, generator=generator, device=update.device)
    return update * (draw < density) / density


def over(seeds, *runs):
    """Each of the runs with each of the seeds."""
    return [run | {"seed": seed} for seed in seeds for run in runs]


def studies():
    """Study -> the settings of its runs, as `make_rows` takes them.

    Seeds 0 and 6 serve to choose, by the pairs set aside for that; others report.
    """
    three, five = (1, 2, 3), (1, 2, 3, 4, 5)
    full, lora = {"method": "full", "lr": 2e-4}, {"method": "lora", "lr": 2e-3}
    rates = {"full": (5e-5, 1e-4, 2e-4, 4e-4), "lora": (5e-4, 1e-3, 2e-3, 4e-3)}
    grid = [{"method": m, "lr": lr} for m in rates for lr in rates[m]]

    seven = {
        f"{how}, {weight:.2f}": (how, LIBRARIES, weight)
        for how in ("sum", "rank 8", "linear")
        for weight in (1 / 7, 0.35, 1.0)
    }
    seven["average"] = ("average", LIBRARIES, 1 / 7)
    pairs = {
        f"{a} + {b}": ("sum", (a, b), 1.0)
        for i, a in enumerate(LIBRARIES)
        for b in LIBRARIES[i + 1 :]
    }
    own = lora | {"steps": 32, "start": -1, "sums": seven | pairs}
    uncut = {name: of for name, of in seven.items() if of[0] != "rank 8"}
    shared = own | {"start": 0, "sums": uncut}
    # Plain sums, TIES and DARE, each at four weights: a mean of what agrees is larger
    # than a share of the sum, so that TIES has weights of its own.
    ways = {"sum": (1 / 7, 0.25, 0.35, 0.5)}
    for density in ("0.1", "0.2", "0.5"):
        ways |= {
            f"TIES {density}": (0.3, 0.6, 1.0, 1.5),
            f"DARE {density}": ways["sum"],
        }
    merging = {
        f"{how}, {weight:.2f}": (how, LIBRARIES, weight)
        for how, weights in ways.items()
        for weight in weights
    }
    one_for_all = lora | {"libraries": list(LIBRARIES)}

    changes = [
        full | {"cuts": (8, 384)} | setting
        for setting in (
            {"lr": full["lr"] / 2},
            {"lr": full["lr"] * 2},
            {"steps": 96},
            {"shuffled": True, "cuts": ()},
        )
    ]
    # Divided by r, by its root, or not at all: each rule is scale 1 at rank 8.
    alpha = [
        {"method": "lora", "rank": r, "scale": round(scale, 4), "lr": lr}
        for r in (1, 64)
        for scale in (8 / r, (8 / r) ** 0.5, 1.0)
        for lr in rates["lora"]
    ]
    # A doubled rank, alpha and rate left as they are, under PEFT's start.
    peft = [lora | {"init": "kaiming", "rank": r, "scale": 8 / r} for r in (8, 1, 64)]
    forms = [(k, 64) for k in formats.LEVELS if k not in ("FP4", "affine int4")]
    forms += [(k, 32) for k in ("NF4", "affine int4", "int4")]
    bases = [{"method": "none", "base": k, "block": n} for k, n in forms]
    bases += [lora | {"base": k} for k in ("NF4", "NF2", "int3", "NF3", "int4", "int8")]
    bases += [lora | {"base": k, "steps": 96} for k in ("NF4", "NF2")]
    double = {"base": "NF4", "double": True}  # as a layer stores it
    merges = {"merges": ("bfloat16", "again", "original")}
    attention, last = r".*attention\..*\.(query|key|value|dense)", r".*\.[45]\..*"
    mlp = r".*\.\d\.(intermediate|output)\.dense"
    placed = [(attention, 18), (mlp, 14), (last, 24)]
    taught = [lora | {"queries": queries} for queries in ("names", "words", "both")]
    taught += [full | {"queries": "words"}, {"method": "none"}]
    # The same rules under PEFT's start, and where the best rate lay at an end.
    starts = [
        run | {"init": "kaiming", "lr": lr}
        for run in (lora, *alpha[:: len(rates["lora"])])
        for lr in (1e-3, 2e-3, 4e-3, 8e-3)
    ]
    starts += [
        {"method": "lora", "init": init, "rank": r, "scale": scale, "lr": lr}
        for init, r, scale, lr in (
            *(("randn / r", 1, 8.0, lr) for lr in (6.25e-5, 1.25e-4, 2.5e-4)),
            ("randn / r", 1, 2.8284, 2.5e-4),
            ("randn / r", 64, 0.125, 8e-3),
            *(("kaiming", 64, scale, 5e-4) for scale in (0.3536, 1.0)),
            *(("kaiming", r, 1.0, 1.6e-2) for r in (1, 8)),
            ("kaiming", 1, 2.8284, 1.6e-2),
        )
    ]
    # Each variant at rates around its best. VeRA's rank costs few numbers.
    tried = {
        "rsLoRA": (5e-4, 1e-3, 2e-3),
        "LoRA+": (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3),
        "PiSSA": (2.5e-4, 5e-4, 1e-3, 2e-3),
        "DoRA": (1e-3, 2e-3, 4e-3),
        "LoRA-FA": (1e-3, 2e-3, 4e-3, 8e-3),
        "VeRA": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128),
    }
    own_rank = {name: 256 if name == "VeRA" else 8 for name in tried}
    entries = [
        {"method": "lora", "variant": name, "rank": own_rank[name], "lr": lr}
        for name, some in tried.items()
        for lr in some
    ]
    # Each variant at the best of its rates.
    best = {"rsLoRA": 1e-3, "LoRA+": 1.25e-4, "PiSSA": 1e-3, "DoRA": 2e-3}
    best |= {"LoRA-FA": 2e-3, "VeRA": 6.4e-2}
    racers = [run for run in entries if run["lr"] == best[run["variant"]]]
    # What else is set in a run of LoRA, one thing at a time.
    dials = [{"schedule": name} for name in SCHEDULES if name != DEFAULTS["schedule"]]
    dials += [{"lr": lr} for lr in (5e-4, 1e-3, 4e-3, 8e-3)]
    dials += [{"batch": 16, "steps": 96}, {"batch": 64, "steps": 24}]
    dials += [{"decay": decay} for decay in (0.0, 0.1, 1.0)]
    dials += [{"scale": scale} for scale in (0.5, 2.0)]
    dials += [{"init": "kaiming"}, {"variant": "dropout"}, {"clip": 1.0}]
    dials += [{"average": 12}, {"average": 12, "schedule": "constant"}]
    # Three adapters that differ in where A started, as one.
    mean = {
        "mean of three": ("sum", (0, 1, 2), 1 / 3),
        "mean of two": ("sum", (0, 1), 1 / 2),
        "mean of three, rank 8": ("rank 8", (0, 1, 2), 1 / 3),
        "half of each": ("sum", (0, 1, 2), 1 / 2),
        "means of A and B": ("average", (0, 1, 2), 1 / 3),
    }
    places = [
        lora | {"targets": targets, "rank": rank, "lr": lr}
        for targets, rank in placed
        for lr in (1e-3, 2e-3, 4e-3, 8e-3)
    ]
    half = [lora | {"precision": precision} for precision in PRECISIONS[1:]]
    half += [full | {"precision": PRECISIONS[i]} for i in (1, 4, 5)]
    half += [{"method": "none", "precision": PRECISIONS[2]}]
    fewer = [run | {"pairs": n} for run in (lora, full) for n in (50, 200, 1_000)]
    return {
        "rates": over((0, 6), *grid),
        "main": over(five, {"method": "none"}, lora, full | {"cuts": KS}),
        "libraries": [
            *over(three, own, *(one_for_all | {"steps": n} for n in (32, 224))),
            *over((1, 2), own | {"steps": 16}, shared),
        ],
        "merging": over((1, 2), own | {"sums": merging}),
        "change": over(five, *changes),
        "decay": over(
            five, *(full | {"cuts": (8, 384), "decay": d} for d in (0.0, 1.0))
        ),
        "ranks": over(five, *(lora | {"rank": r} for r in (1, 2, 4, 16, 64))),
        "longer": over(five, lora | {"steps": 96}),
        "alpha": over((0, 6), *alpha),
        "rule": over((0,), *peft),
        "bases": [
            *over(three, {"method": "none"}, *bases),
            *over((1, 2, 3, 4), {"method": "none"} | double, lora | double | merges),
        ],
        "layers": over(five, *(lora | {"targets": t, "rank": r} for t, r in placed)),
        "questions": over(three, *(run | {"elsewhere": True} for run in taught)),
        "amount": over(five, *fewer),
        "half": over(five, *half),
        "places": over((0, 6), *places),
        "starts": over((0, 6), *starts),
        "race rates": over((0, 6), *entries),
        "race": [
            *over(five, *racers),
            *over(three, *(run | {"steps": 96} for run in racers)),
        ],
        "dials": over(three, *(lora | dial for dial in dials)),
        "averages": over(three, lora | {"starts": 3, "sums": mean}),
    }
