"""Named adapters on one frozen base: add, switch, mix in a batch, sum, save, merge.

An adapted layer keeps its base once and an update (alpha / r) B A for each name (Hu et
al. 2021, arXiv:2106.09685, section 4). Functions are named as in PEFT where it has
them, and take the qualified names of the base model. Bad arguments raise ValueError or
TypeError and leave the model as it was. Chapter 5 of the book builds this file.
"""

import re
from contextlib import contextmanager

from torch import nn

from lora import checks, factors, files, guards
from lora.core import LoRALinear, find, freeze_all


class AdapterLinear(LoRALinear):
    """A frozen linear layer and its named updates, of which a shared `state` chooses.

    `adapters` maps names to `LoRALinear`s around the same base. `inject_lora` leaves
    such a layer alone, and `merge_lora` folds in the update that is active.
    """

    def __init__(self, base, state):
        nn.Module.__init__(self)
        self.base, self.state, self.folded = base, state, None
        self.adapters = nn.ModuleDict()
        self.train(base.training)

    @property
    def chosen(self):
        """The layer that computes, where it is the same one for all rows."""
        if self.state.rows is not None:
            return self.base
        if self.state.merged is not None:
            return self.folded or self.base
        if self.state.active in self.adapters:
            return self.adapters[self.state.active]
        return self.base

    def forward(self, x):
        rows = self.state.rows or ()
        here = [name for name in dict.fromkeys(rows) if name in self.adapters]
        if not here:
            return self.chosen(x)
        guards.check_batch(x, rows)
        updates = [(1, self.adapters[name]) for name in here]
        owner = [here.index(name) if name in here else -1 for name in rows]
        return factors.mixed(x, self.base(x), updates, owner)

    @property
    def weight(self):
        """The weight of the layer that computes, (d_out, d_in)."""
        guards.check_one_weight(self.state)
        return checks.dense_weight(self.chosen)

    def extra_repr(self):
        return f"active={self.state.active!r}"


def adapted(model, *names, idle=()):
    """(name -> AdapterLinear, their state), if all `names` are adapters of `model`.

    Raises ValueError if one is not, or a field of the state in `idle` is in use.
    """
    layers = find(model, AdapterLinear)
    return layers, guards.check_layers(layers, names, idle)


def bases(model):
    """Qualified name -> layer, for each layer that has or may get an adapter."""
    found = find(model, (LoRALinear, checks.kinds_of_base(nn.Linear)))
    return {n: m.base if isinstance(m, AdapterLinear) else m for n, m in found.items()}


def attach(model, name, settings):
    """Give bases the update `name`: `settings` maps them to (rank, alpha[, A, B])."""
    layers, state = adapted(model)
    guards.check_new(layers, bases(model), name)
    updates = {base: LoRALinear(base, *s[:2]) for base, s in settings.items()}
    for base, update in updates.items():
        for parameter, given in zip((update.A, update.B), settings[base][2:]):
            parameter.data.copy_(given.detach())
        freeze_all(update)
        vars(update)["base"] = update._modules.pop("base")  # held, but owned once
    wrappers = {m.base: m for m in layers.values()}
    if not wrappers:
        freeze_all(model)  # what all adapters share
    for n, base in bases(model).items():
        if base in updates:
            wrapper = wrappers.setdefault(base, AdapterLinear(base, state))
            wrapper.adapters[name] = updates[base]
            model.set_submodule(n, wrapper)


def add_adapter(model, name, targets=None, rank=4, alpha=8.0):
    """Add an adapter to linear layers of `model`, in place; it is not switched on.

    `targets` is a regular expression for whole qualified names in the base model; by
    default all layers get one. `rank` and `alpha` are numbers, or map such expressions
    to numbers: the first that matches counts. A starts random, B zero. The first
    adapter freezes the whole model, which all of them share. Layers are left out or
    refused as by `lora.inject_lora`. Raises ValueError or TypeError for a name in use
    or one that is not of letters, digits, `_` and `-`, for an expression that matches
    nothing, and for ranks and alphas that `LoRALinear` refuses.
    """
    chosen = guards.choose(model, bases(model), targets, adapted(model)[0])
    attach(model, name, guards.settings(chosen, rank, alpha))


def set_adapter(model, name):
    """Let `model` compute with the adapter `name`, None for the base alone.

    Its A and B become trainable; the others are frozen, and lose a gradient that was
    left. Raises ValueError for an unknown name, while an adapter is merged, and inside
    of `route` and `disable_adapters`.
    """
    layers, state = adapted(model, *{name} - {None}, idle=("merged", "rows"))
    for layer in layers.values():
        for n, update in layer.adapters.items():
            update.requires_grad_() if n == name else freeze_all(update)
    state.active = name


@contextmanager
def using(model, rows):
    """What `route` and `disable_adapters` return; at the end, all is as before."""
    _, state = adapted(model, *{*rows} - {None}, idle=["merged"])
    before, state.rows = state.rows, rows
    try:
        yield model
    finally:
        state.rows = before


def disable_adapters(model):
    """A context in which `model` is its base, bit for bit; gradients are kept.

    Raises ValueError while an adapter is merged.
    """
    return using(model, ())


def route(model, names):
    """A context in which row i of a batch uses the adapter names[i], None the base.

    Rows are counted along the first dimension of what each adapted layer gets, and one
    that gets another number of rows raises ValueError. So do unknown names and a merged
    adapter, when the context is entered. What is trainable stays as it is.
    """
    return using(model, guards.check_rows(names))


def delete_adapter(model, name):
    """Remove an adapter; a layer that has none left is the plain base layer again.

    If it was active, the base is. Raises ValueError for an unknown name, while an
    adapter is merged, and inside of `route` and `disable_adapters`.
    """
    layers, state = adapted(model, name, idle=("merged", "rows"))
    state.active = None if state.active == name else state.active
    for n, layer in layers.items():
        layer.adapters._modules.pop(name, None)  # not there: it has been, or never was
        if not layer.adapters:
            model.set_submodule(n, layer.base)


def combine(model, weights, name, rank=None):
    """Add an adapter whose update is the sum of weights[n] times the update of each n.

    Exact, by stacked factors: the ranks add up. With `rank`, each layer's sum is cut to
    its best approximation of that rank. It is not switched on. Raises TypeError unless
    `weights` is a mapping, ValueError for unknown names, weights that are not finite,
    and a `name` that `add_adapter` refuses.
    """
    weights, settings = guards.check_weights(weights, rank), {}
    for m in adapted(model, *weights)[0].values():
        there = [(w, m.adapters[n]) for n, w in weights.items() if n in m.adapters]
        if there:
            A, B = factors.stack(there, rank)
            settings[m.base] = len(A), len(A), A, B
    attach(model, name, settings)


def save_adapter(model, name, folder):
    """Write an adapter, and nothing of the base, to `folder` in PEFT's format.

    The folder is made if need be; a file in it is replaced as a whole or not at all.
    Raises ValueError for an unknown name and for factors that are not finite.
    """
    layers = adapted(model, name)[0]
    first = {m: n for n, m in reversed(layers.items()) if name in m.adapters}
    files.write_adapter(folder, name, {n: m.adapters[name] for m, n in first.items()})


def load_adapter(model, folder, name=None):
    """Add the adapter in `folder`, ours or PEFT's; not switched on. Return its name.

    That is `name`, else the one it was saved under, else (PEFT's) the folder's. All is
    checked before the model is touched. Raises ValueError for what is not a complete,
    finite adapter of plain LoRA, or whose layers, shapes or dtypes do not fit `model`.
    """
    said, layers = files.read_adapter(folder, guards.most_bytes(model))
    name, targets = said if name is None else name, "|".join(map(re.escape, layers))
    chosen = guards.choose(model, bases(model), targets, True)
    attach(model, name, guards.fit(chosen, layers, folder))
    return name


def merge_adapter(model, name):
    """Compute with weights W + (alpha / r) B A, at the base's speed, until un-merged.

    The base's weights are kept beside them. Raises ValueError for an unknown name,
    while an adapter is merged, inside of `route` and `disable_adapters`, and if a
    merged weight overflows.
    """
    layers, state = adapted(model, name, idle=("merged", "rows"))
    there = [m for m in layers.values() if name in m.adapters]
    folded = {m: m.adapters[name].merged() for m in there}
    guards.check_finite(name, folded.values())
    for m, layer in folded.items():
        m.folded = layer
    state.merged = name


def unmerge_adapter(model):
    """Undo `merge_adapter`, bit for bit: what was active before is so again.

    Raises ValueError if nothing is merged, or if a merged weight is not the base's plus
    the update any more: whatever changed it, training say, would be lost.
    """
    layers, state = adapted(model)
    guards.check_folded(layers, state)
    for layer in layers.values():
        layer.folded = None
    state.merged = None
