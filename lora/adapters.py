"""One frozen base, many adapters: add, set, route, sum, merge, save and load them.

The serving half of LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1: the tasks share
the base, switching is an exchange of B A). The names are PEFT's where it has one.
`model` is the root of the model throughout, layers are called by their qualified names
in the base model. Bad arguments raise ValueError or TypeError before anything changes.
Chapter 5 of the book builds this file.
"""

from contextlib import contextmanager
from pathlib import Path

import torch

from lora import checks, peft_files
from lora.core import LoRALinear, freeze_all
from lora.multi import Adapter, attach, bases_of, names_of, parts_of


def add_adapter(
    model,
    name,
    targets=None,
    rank=4,
    alpha=8.0,
    rank_pattern=None,
    alpha_pattern=None,
    exclude=None,
):
    """Give linear layers of `model` a new adapter, in place; return the layers' names.

    `targets`, a regular expression that must match a layer's whole qualified name,
    chooses them, by default all; those that `exclude` matches are left out. The two
    patterns are dictionaries, expression -> rank or alpha: of those that match a name
    the first holds. Until it is set, the outputs of the model stay as they are, bit for
    bit. The base of each layer is frozen; for the rest, `freeze_all(model)` first. What
    cannot be adapted is refused or left alone as in `inject_lora`.
    """
    layers, shared = parts_of(model)
    checks.check_new_name(name, names_of(layers))
    checks.check_apart(shared, "add an adapter")
    checks.check_settings(rank, alpha)
    bases = checks.choose_bases(model, bases_of(model), layers, targets, exclude)
    ranks = checks.by_pattern("rank_pattern", rank_pattern, bases, rank)
    alphas = checks.by_pattern("alpha_pattern", alpha_pattern, bases, alpha)
    for setting in zip(ranks.values(), alphas.values()):
        checks.check_settings(*setting)
    first = {base: n for n, base in reversed(bases.items())}  # some have two names
    new = {b: LoRALinear(b, ranks[first[b]], alphas[first[b]]) for b in bases.values()}
    made = {b: Adapter(lora.A, lora.B, lora.alpha) for b, lora in new.items()}
    return attach(model, name, {n: made[base] for n, base in bases.items()})


def set_adapter(model, name):
    """Use one adapter for all rows from now on; None is the base.

    It alone trains: its A and B require a gradient, those of the others do not, and
    what gradients they had are dropped, so that no optimizer moves them.
    """
    layers, shared = parts_of(model)
    checks.check_known([name], [None, *names_of(layers)])
    checks.check_apart(shared, "set an adapter")
    for layer in layers.values():
        for key, adapter in layer.adapters.items():
            if key == name:
                adapter.requires_grad_(True)
            else:
                freeze_all(adapter)
    shared.active = name


@contextmanager
def using(model, inside, active=None, rows=None):
    """What `shared` says while a context lasts, and afterwards what it said before."""
    _, shared = parts_of(model)
    checks.check_apart(shared, inside)
    before, shared.active = shared.active, active
    shared.rows, shared.inside = rows, inside
    try:
        yield
    finally:
        shared.active, shared.rows, shared.inside = before, None, None


def disable_adapters(model):
    """A context in which the model is the base; afterwards it is as it was before."""
    return using(model, "disable_adapters")


def route(model, names):
    """A context in which row i of each batch uses adapter `names[i]`, None the base.

    Rows are the first dimension of what each layer is given. A layer that is given
    another number of rows raises ValueError. A backward pass that computes activations
    again (checkpointing) belongs inside the context, too.
    """
    names = checks.check_rows(names, names_of(parts_of(model)[0]))
    kinds = list(dict.fromkeys(names))
    index = torch.tensor([kinds.index(name) for name in names])
    return using(model, "route", rows=(kinds, index))


def delete_adapter(model, name):
    """Remove an adapter; a layer without any is the plain base again.

    If it was the one that is set, none is.
    """
    layers, shared = parts_of(model)
    checks.check_known([name], names_of(layers))
    checks.check_apart(shared, "delete an adapter")
    if shared.active == name:
        shared.active = None
    for place, layer in layers.items():
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            model.set_submodule(place, layer.base)


def combine(model, weights, name):
    """Add an adapter whose update is the weighted sum of others', exactly.

    `weights` is a dictionary, adapter -> finite number. In each layer the factors are
    stacked, B = [w₁s₁B₁, w₂s₂B₂, ...] and A = [A₁; A₂; ...], so the ranks add up and
    the new scale is 1. Later changes of the parts do not change the sum. It trains
    none of them, and like any new adapter it is not set. Returns its layers' names.
    """
    layers, shared = parts_of(model)
    checks.check_new_name(name, names_of(layers))
    checks.check_apart(shared, "combine adapters")
    weights = checks.check_weights(weights, names_of(layers))
    new = {}
    for place, layer in layers.items():
        parts = [(w, layer.adapters[n]) for n, w in weights if n in layer.adapters]
        if parts:
            A = torch.cat([part.A for _, part in parts])
            B = torch.cat([w * part.scale * part.B for w, part in parts], 1)
            new[place] = Adapter(A, B, float(len(A)))
    return attach(model, name, new)


def merge_adapter(model, name):
    """Add an adapter's update to the weights of its layers, in place.

    The layers then cost what the base costs. The bases are kept beside the merged ones,
    so that `unmerge_adapter` restores them bit for bit. Until then switching and
    routing raise ValueError.
    """
    layers, shared = parts_of(model)
    checks.check_known([name], names_of(layers))
    checks.check_apart(shared, "merge an adapter")
    its = {n: layer for n, layer in layers.items() if name in layer.adapters}
    checks.check_unshared(model, its)
    merged = {layer: layer.with_one(name).merged(n) for n, layer in its.items()}
    for layer, whole in merged.items():
        layer.kept, layer.base = layer.base, whole
    shared.merged = name


def unmerge_adapter(model):
    """Put back the bases that `merge_adapter` kept; the adapter set before is set."""
    layers, shared = parts_of(model)
    checks.check_merged(shared)
    for layer in {id(layer): layer for layer in layers.values()}.values():
        if hasattr(layer, "kept"):
            layer.base = layer.kept
            del layer.kept
    shared.merged = None


def save_adapter(model, name, folder, head=None):
    """Write one adapter into `folder`, in PEFT's format; no weight of the base.

    Two files: `adapter_config.json` and `adapter_model.safetensors`. A new layer that
    was trained beside it, a module `head`, goes into `head.safetensors`. Each file is
    replaced in one go: a crash leaves the old one, and files of two savings are refused
    when they are loaded.
    """
    layers, _ = parts_of(model)
    checks.check_known([name], names_of(layers))
    its = {n: m.adapters[name] for n, m in layers.items() if name in m.adapters}
    peft_files.write_adapter(Path(folder), its, head)


def load_adapter(model, folder, name=None, head=None):
    """Add an adapter that `save_adapter` or PEFT wrote; return its name.

    By default it is called as the folder is. A saved head is put into the module
    `head`, which must be given then. Names, shapes, dtypes and values are checked
    before `model` or `head` changes. Nothing is unpickled. Raises ValueError for a
    file that is cut or foreign, and for settings other than plain LoRA on linear
    layers (`lora.peft_files.PLAIN`).
    """
    folder, (layers, shared) = Path(folder), parts_of(model)
    name = folder.resolve().name if name is None else name
    checks.check_new_name(name, names_of(layers))
    checks.check_apart(shared, "load an adapter")
    bases = checks.choose_bases(model, bases_of(model), layers, None, None, quiet=True)
    found, saved_head = peft_files.read_adapter(folder, bases, head)
    attach(model, name, {n: Adapter(*parts) for n, parts in found.items()})
    if head is not None:
        head.load_state_dict(saved_head)
    return name
