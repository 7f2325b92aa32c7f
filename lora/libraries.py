"""The recorded runs of Chapter 5: an adapter a library, their sums, one for all.

`make experiments` makes them, a seed at a time; the chapter makes some of them again.
"""

import torch

from lora import recorded, search
from lora.adapters import (
    adapted,
    add_adapter,
    combine,
    delete_adapter,
    disable_adapters,
    set_adapter,
)

NAMES = search.LIBRARIES
STEPS = 32  # for an adapter of one library; the one for all gets seven times as many


def learn(model, tokenizer, name, pairs, settings):
    """Add an adapter `name`, train it on `pairs`, leave it on; the loss of each step.

    `settings` holds rank, scale, targets, steps, lr, decay and seed of a recorded run.
    """
    torch.manual_seed(settings["seed"])
    rank, targets = settings["rank"], settings["targets"]
    add_adapter(model, name, targets, rank, settings["scale"] * rank)
    set_adapter(model, name)
    how = {"seed": settings["seed"], "weight_decay": settings["decay"]}
    return search.fine_tune(
        model, tokenizer, pairs, settings["steps"], settings["lr"], **how
    )


@torch.no_grad()
def average(model, weights, name):
    """Add what PEFT calls a linear combination: A's and B's, each summed apart.

    With the root of weight times scale on both; all adapters need the same layers and
    rank. (B₁ + B₂)(A₁ + A₂) holds B₁A₂ and B₂A₁, too: it is not the sum of updates.
    """
    combine(model, {next(iter(weights)): 1}, name)
    for layer in adapted(model)[0].values():
        parts = [(w, layer.adapters[n]) for n, w in weights.items()]
        roots = [(w * u.scale) ** 0.5 for w, u in parts]
        for letter in "AB":
            total = sum(r * getattr(u, letter) for r, (_, u) in zip(roots, parts))
            getattr(layer.adapters[name], letter).copy_(total)


def combinations(model, names):
    """(how, adapter) of each way to put the adapters `names` together, one by one."""
    n = len(names)
    ways = {
        "sum": lambda: combine(model, dict.fromkeys(names, 1), "together"),
        "mean": lambda: combine(model, dict.fromkeys(names, 1 / n), "together"),
        "sum, rank 8": lambda: combine(model, dict.fromkeys(names, 1), "together", 8),
        "linear": lambda: average(model, dict.fromkeys(names, 1), "together"),
    }
    for how, make in ways.items():
        make()
        yield how, "together"
        delete_adapter(model, "together")


def runs(**settings):
    """The rows of one seed: each has the `ranks` of the queries of some libraries.

    `adapter` says whose: "base", a library, "all" (trained on all), or names of
    libraries joined by "+", put together as `how` says. `sums` False leaves out the
    last two.
    """
    sums = settings.pop("sums", True)
    settings = recorded.DEFAULTS | {"steps": STEPS} | settings
    shared = settings | {"versions": recorded.versions()}
    tokenizer, model = search.load_minilm()
    parts = {
        k: search.split(search.docstring_pairs(k), settings["seed"]) for k in NAMES
    }
    tests = {k: part[2] for k, part in parts.items()}

    def row(adapter, whose=NAMES, how="", losses=()):
        with torch.no_grad():
            ranks = recorded.ranks(model, tokenizer, {k: tests[k] for k in whose})
        losses = [round(x, 3) for x in losses]
        return shared | {
            "adapter": adapter,
            "how": how,
            "losses": losses,
            "ranks": ranks,
        }

    with disable_adapters(model):
        yield row("base")
    for name in NAMES:
        losses = learn(model, tokenizer, name, parts[name][0], settings)
        yield row(name, losses=losses)
    if not sums:
        return
    neighbours = [[a, b] for a, b in zip(NAMES, NAMES[1:] + NAMES[:1])]
    for names in [list(NAMES), *neighbours]:
        for how, together in combinations(model, names):
            set_adapter(model, together)
            yield row("+".join(names), names, how)
            set_adapter(model, None)
    everything = [pair for name in NAMES for pair in parts[name][0]]
    longer = settings | {"steps": len(NAMES) * settings["steps"]}
    yield row("all", losses=learn(model, tokenizer, "all", everything, longer))
