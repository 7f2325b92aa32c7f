"""One frozen base, many adapters: add, set, route, sum, merge, save and load them.

The tasks share the base, switching is an exchange of B A (Hu et al. 2021,
arXiv:2106.09685, section 4.1). Each adapter i of a layer has a rank of its own:

    y = W x + b + s_i B_i A_i x        A_i: (r_i, d_in)    B_i: (d_out, r_i)

The names are PEFT's where it has one. `model` is the root of the model throughout,
layers are called by their names in the base model. Bad arguments raise before anything
changes. Chapter 5 of the book builds this file.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora import bases, checks, peft_files
from lora.core import LoRALinear, LowRankUpdate, freeze_all


@dataclass
class Shared:
    """What the layers of one model share: the adapter that is in use for all rows."""

    active: str | None = None
    merged: str | None = None  # the adapter that is in the weights


@dataclass(eq=False)
class Context:
    """What a model is inside of; in `route` with names, and which of them rows use."""

    shared: Shared
    kind: str
    rows: tuple | None = None


HERE = ContextVar("HERE", default=())  # the contexts of this thread or task
EVERYWHERE = []  # and of all


def context_of(shared, contexts):
    """That of these contexts which the model is inside of, or None."""
    return next((c for c in contexts if c.shared is shared), None)


def context_here(shared):
    """The context that the model is inside of in this thread or task, or None.

    A backward pass that computes a layer again may do so in a thread of its own, as on
    a GPU: to which context it belongs cannot be known, so that is refused.
    """
    if not EVERYWHERE:  # a compiler need not look further
        return None
    here, other = (context_of(shared, c) for c in (HERE.get(), EVERYWHERE))
    if other and not here and torch._C._current_graph_task_id() != -1:
        message = (
            f"inside of {other.kind} a backward pass calls a layer in a new thread"
        )
        remedy = "torch.autograd.set_multithreading_enabled(False) keeps it in this one"
        raise ValueError(f"{message}: {remedy}")
    return here


class Adapters(nn.Module):
    """A frozen base, and named updates beside it.

    Maps x (..., d_in) to (..., d_out). Which update acts it reads from `shared`.
    """

    def __init__(self, base, shared):
        super().__init__()
        self.base, self.adapters, self.shared = base, nn.ModuleDict(), shared
        self.train(base.training)

    def forward(self, x):
        y, (rows, update) = self.base(x), self.in_use()
        if rows:
            return self.routed(x, y, *rows)
        return y if update is None else update(x, y)

    def in_use(self):
        """What `route` says of the rows, and the update that acts on all; or None."""
        context, name = context_here(self.shared), self.shared.active
        if context or self.shared.merged or name not in self.adapters:
            return context and context.rows, None
        return None, self.adapters[name]

    def routed(self, x, y, names, index):
        """Each row of the batch with its own update: two batched products."""
        if x.dim() < 2 or len(x) != len(index):
            message = (
                f"{len(index)} rows are routed, but a layer was given {(*x.shape,)}"
            )
            raise ValueError(f"{message}: the first dimension must be the batch")
        if not any(name in self.adapters for name in names):
            return y
        A, B = (part.to(x.dtype) for part in self.stacked(names))
        index = index.to(A.device)
        thin = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), A[index].mT)
        rows = y.reshape(len(y), -1, y.shape[-1]).to(thin.dtype)
        return torch.baddbmm(rows, thin, B[index].mT).view(y.shape).to(y.dtype)

    def stacked(self, names):
        """A (k, r, d_in) and s B (k, d_out, r) of k names, filled up with zeros."""
        updates = {n: self.adapters[n] for n in names if n in self.adapters}
        first = next(iter(updates.values()))
        rank = max(update.rank for update in updates.values())
        A = first.A.new_zeros(len(names), rank, first.A.shape[1])
        B = first.B.new_zeros(len(names), len(first.B), rank)
        for i, name in enumerate(names):
            if name in updates:
                update = updates[name]
                A[i, : update.rank] = update.A
                B[i, :, : update.rank] = update.scale * update.B
        return A, B

    @property
    def weight(self):
        """W with the update that is set, computed if its numbers are used."""
        return bases.lazily(self.changed, self.base)

    def changed(self, W):
        rows, update = self.in_use()
        if rows:
            message = "a layer's weight was read inside of route, as attention may do"
            raise ValueError(f"{message}: there each row has its own")
        return W if update is None else update.add_to(W)

    bias = property(lambda self: self.base.bias)


# --- What a model has ---

WRAPPERS = Adapters, LoRALinear


def parts_of(model):
    """The layers that hold adapters, name -> layer, and what they share."""
    layers = bases.find(model, Adapters)
    shared = {id(layer.shared): layer.shared for layer in layers.values()}
    if len(shared) > 1:
        message = "adapters were added to parts of the model one by one"
        raise ValueError(f"{message}: always pass the same whole model")
    return layers, next(iter(shared.values()), Shared())


def names_of(layers):
    """The names of the adapters in these layers, in the order of their adding."""
    return list(dict.fromkeys(n for layer in layers.values() for n in layer.adapters))


def known(model, what, *names, alone=True):
    """`parts_of` a model that has adapters of these names, and where one can do `what`.

    Nothing can be done while an adapter is merged, or inside of a context: of any
    thread's, where one must be `alone`.
    """
    layers, shared = parts_of(model)
    there = names_of(layers)
    for name in names:
        if name not in there:
            message = f"there is no adapter {name!r}; there are: "
            message += ", ".join(map(repr, there)) or "none"
            if bases.find(model, LoRALinear):
                message += " (what inject_lora put there has no name: save_lora)"
            raise ValueError(message)
    context = context_of(shared, EVERYWHERE if alone else HERE.get())
    if what and context:
        message = f"cannot {what} inside of {context.kind}: leave it first"
        raise ValueError(f"{message}, in all threads")
    if what and shared.merged:
        message = f"cannot {what} while {shared.merged!r} is merged"
        raise ValueError(f"{message}: unmerge_adapter first")
    return layers, shared


def check_new_name(model, name):
    """Raise ValueError unless an adapter can be added with this name."""
    if not isinstance(name, str) or not name or "." in name:
        message = f"name must be a text without dots, got {name!r}"
        raise ValueError(f"{message}: give name=, which is a part of parameters' names")
    if hasattr(nn.ModuleDict(), name):
        message = "nn.ModuleDict, which holds adapters, has an attribute of that name"
        raise ValueError(f"name {name!r} is taken: {message}: choose another")
    if name in names_of(parts_of(model)[0]):
        raise ValueError(f"there is an adapter {name!r} already")


def check_not_injected(model):
    """Raise ValueError if `inject_lora` has wrapped a layer of the model.

    Its update would act on every adapter, and be in no adapter's file.
    """
    if inside := [*bases.find(model, LoRALinear)]:
        message = f"{bases.listed(inside)}: wrapped by inject_lora"
        raise ValueError(f"{message}; merge_lora first, or use add_adapter throughout")


def attach(model, name, updates):
    """Put updates beside their bases, layer's name -> update; return the names.

    In place; bases and updates are frozen, and no output of the model changes.
    """
    layers, shared = parts_of(model)
    wrappers = {layer.base: layer for layer in layers.values()}
    for place, update in updates.items():
        layer = model.get_submodule(place)
        if not isinstance(layer, Adapters):
            if layer not in wrappers:  # a layer may have several names
                wrappers[layer] = Adapters(layer, shared)
            model.set_submodule(place, wrappers[layer])
            layer = wrappers[layer]
        layer.adapters[name] = update.train(layer.base.training)
        freeze_all(update)
        freeze_all(layer.base)
    return list(updates)


# --- What one does with adapters ---


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

    `targets` and `exclude` are regular expressions for whole names
    (`lora.bases.choose`). The two patterns are dictionaries, expression -> rank or
    alpha: of those that match a name the first holds. Until it is set, the outputs stay
    as they are, bit for bit. The base of each layer is frozen; for the rest,
    `freeze_all(model)` first.
    """
    known(model, "add an adapter")
    check_new_name(model, name)
    checks.check_settings(rank, alpha)
    chosen = bases.choose(model, targets, exclude, wrapper=WRAPPERS)
    check_not_injected(model)
    bases.check_rows(chosen)
    ranks = by_pattern("rank_pattern", rank_pattern, chosen, rank)
    alphas = by_pattern("alpha_pattern", alpha_pattern, chosen, alpha)
    for setting in zip(ranks.values(), alphas.values()):
        checks.check_settings(*setting)
    updates = {}
    for place, base in chosen.items():
        if base not in updates:  # a layer may have several names
            lora = LoRALinear(base, ranks[place], alphas[place])
            updates[base] = LowRankUpdate(lora.A, lora.B, lora.alpha)
    return attach(model, name, {place: updates[base] for place, base in chosen.items()})


def by_pattern(name, patterns, places, default):
    """Layer's name -> the value of the first of `patterns` that matches it whole."""
    values = {}
    for expression, value in (patterns or {}).items():
        matched = bases.matching(name, expression, places)
        if not matched:
            message = f"{name}: {expression!r} matches none of {bases.listed(places)}"
            raise ValueError(message)
        values = dict.fromkeys(matched, value) | values
    return dict.fromkeys(places, default) | values


def set_adapter(model, name):
    """Use one adapter for all rows from now on, in all threads; None is the base.

    It alone trains, and the gradients of the others are dropped. Which one is set is no
    part of the model's state, as train() and eval() are not.
    """
    layers, shared = known(model, "set an adapter", *[name] * (name is not None))
    bases.check_not_parallel(model)
    for layer in layers.values():
        for key, update in layer.adapters.items():
            freeze_all(update) if key != name else update.requires_grad_(True)
    shared.active = name


@contextmanager
def using(model, kind, rows=None):
    """A context of this thread or task alone; afterwards all is as it was."""
    _, shared = known(model, kind, alone=False)
    context = Context(shared, kind, rows)
    EVERYWHERE.append(context)
    HERE.set((*HERE.get(), context))
    try:
        yield
    finally:
        HERE.set(tuple(c for c in HERE.get() if c is not context))
        EVERYWHERE.remove(context)


def disable_adapters(model):
    """A context in which the model is the base; afterwards it is as it was before."""
    return using(model, "disable_adapters")


@torch.inference_mode(False)  # what is made there could not be trained through
def route(model, names):
    """A context in which row i of each batch uses adapter `names[i]`, None the base.

    Rows are the first dimension of what each layer is given. Whether they are *these*
    rows it cannot know: a layer that is given some of the tokens, as an expert is, may
    get as many by chance. It acts in this thread or task alone. A backward pass that
    computes activations again (checkpointing) belongs inside, too.
    """
    kinds = list(dict.fromkeys(names))
    adapters = [name for name in kinds if name is not None]
    known(model, None, *adapters)
    index = torch.tensor([kinds.index(name) for name in names], device="cpu")
    return using(model, "route", rows=(kinds, index))


def delete_adapter(model, name):
    """Remove an adapter; a layer without any is the plain base again.

    If it was the one that is set, none is.
    """
    layers, shared = known(model, "delete an adapter", name)
    if shared.active == name:
        shared.active = None
    for place, layer in layers.items():
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            model.set_submodule(place, layer.base)


def combine(model, weights, name):
    """Add an adapter whose update is the weighted sum of others', exactly.

    `weights` is a dictionary, adapter -> number. In each layer the factors are stacked,
    B = [w₁s₁B₁, w₂s₂B₂, ...] and A = [A₁; A₂; ...], so the ranks add up and the new
    scale is 1. Later changes of the parts do not change it. Returns its layers' names.
    """
    layers, _ = known(model, "combine adapters", *weights)
    check_new_name(model, name)
    weights = {n: checks.check_number(f"weights[{n!r}]", weights[n]) for n in weights}
    if not weights:
        raise ValueError("weights must name one adapter or more, got none")
    updates = {}
    for place, layer in layers.items():
        parts = [
            (weights[n], layer.adapters[n]) for n in weights if n in layer.adapters
        ]
        if parts:
            A = torch.cat([update.A.detach() for _, update in parts])
            B = torch.cat(
                [w * update.scale * update.B.detach() for w, update in parts], 1
            )
            updates[place] = LowRankUpdate(A, B, float(len(A)))
    return attach(model, name, updates)


def merge_adapter(model, name):
    """Add an adapter's update to the weights of its layers, in place.

    The bases are kept beside the merged ones, so that `unmerge_adapter` restores them
    bit for bit. Until then nothing is switched or routed.
    """
    layers, shared = known(model, "merge an adapter", name)
    its = {place: layer for place, layer in layers.items() if name in layer.adapters}
    bases.check_unshared(model, its)
    merged = {
        layer: bases.merge(place, layer.base, layer.adapters[name])
        for place, layer in its.items()
    }
    for layer, whole in merged.items():
        layer.kept, layer.base = layer.base, whole
    shared.merged = name


def unmerge_adapter(model):
    """Put back the bases that `merge_adapter` kept; the adapter set before is set."""
    layers, shared = parts_of(model)
    if not shared.merged:
        raise ValueError("cannot unmerge: no adapter is merged")
    for layer in layers.values():
        if hasattr(layer, "kept"):  # under its second name it is done already
            layer.base = layer.kept
            del layer.kept
    shared.merged = None


def save_adapter(model, name, folder, head=None):
    """Write one adapter into `folder`, in PEFT's format; no weight of the base.

    A new layer that was trained beside it, a module `head`, goes into a file of its
    own. Each file is replaced in one go: a crash leaves the old one, and files of two
    savings are refused when they are loaded.
    """
    layers, _ = known(model, None, name)
    its = {n: m for n, m in layers.items() if name in m.adapters}
    updates = {n: m.adapters[name] for n, m in its.items()}
    its = {n: m.base for n, m in its.items()}
    peft_files.warn_of_the_rest(model, layers, head)
    peft_files.write_adapter(Path(folder), updates, its, head)


def load_adapter(model, folder, name=None, head=None):
    """Add an adapter that `save_adapter` or PEFT wrote; return its name.

    By default it is called as the folder is. A saved head is put into the module
    `head`. Nothing is unpickled. Raises an error for a file that is cut or foreign, and
    for settings other than plain LoRA on linear layers (`lora.peft_files.PLAIN`).
    """
    folder = Path(folder)
    name = folder.resolve().name if name is None else name
    known(model, "load an adapter")
    check_new_name(model, name)
    places = bases.layers_of(model, wrapper=WRAPPERS)
    try:
        factors, saved_head = peft_files.read_adapter(folder, model, places, head)
    except Exception as fault:  # of json or safetensors, which name no file
        fault.add_note(f"while an adapter was read from {folder}")
        raise
    check_not_injected(model)
    bases.check_rows({place: places[place] for place in factors})
    its = peft_files.by_base(folder, factors, places)
    updates = {base: LowRankUpdate(*parts) for base, parts in its.items()}
    attach(model, name, {place: updates[places[place]] for place in factors})
    if head is not None:
        head.load_state_dict(saved_head)
    return name
