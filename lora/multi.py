"""Layers that hold several named adapters, and what the layers of one model share.

Each adapter i of a layer is an update of its own rank (Hu et al. 2021, section 4.1):

    y = W x + b + s_i B_i A_i x        A_i: (r_i, d_in)    B_i: (d_out, r_i)

i is the adapter that is set, or belongs to the row of the batch that x stands in; with
none the layer is the base. Chapter 5 of the book builds this file.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from lora import checks
from lora.core import LoRALinear, find, freeze_all


@dataclass
class Shared:
    """What the layers of one model share: the adapter that is in use."""

    active: str | None = None  # set for all rows
    rows: tuple | None = None  # or: distinct names, and which of them each row uses
    inside: str | None = None  # the context that lasts
    merged: str | None = None  # the adapter that is in the weights


class Adapter(nn.Module):
    """One update of a layer: A (r, d_in), B (d_out, r), and its scale alpha / r.

    It is frozen until it is set.
    """

    def __init__(self, A, B, alpha):
        super().__init__()
        self.rank, self.alpha, self.scale = len(A), alpha, float(alpha / len(A))
        self.A = nn.Parameter(A.detach(), requires_grad=False)
        self.B = nn.Parameter(B.detach(), requires_grad=False)

    def forward(self, x, y):
        """y + s (x Aᵀ) Bᵀ for x (..., d_in) and y (..., d_out), in the dtype of y."""
        h = F.linear(x.to(self.A.dtype), self.A)
        rows, thin = y.to(h.dtype).reshape(-1, y.shape[-1]), h.reshape(-1, self.rank)
        out = torch.addmm(rows, thin, self.B.T, alpha=self.scale)
        return out.view(y.shape).to(y.dtype)

    def extra_repr(self):
        return f"rank={self.rank}, alpha={self.alpha}"


class Adapters(nn.Module):
    """A frozen base, and the named adapters beside it; no two layers share any.

    Maps x of shape (..., d_in) to (..., d_out), in the dtype of the base's output.
    Which adapter acts the layer reads from `shared`.
    """

    def __init__(self, base, shared):
        super().__init__()
        self.base, self.adapters, self.shared = base, nn.ModuleDict(), shared
        self.train(base.training)

    def forward(self, x):
        y = self.base(x)
        if self.shared.rows is not None:
            return self.routed(x, y)
        adapter = self.in_use()
        return y if adapter is None else adapter(x, y)

    def in_use(self):
        """The adapter that acts on all rows, or None: the base alone."""
        name = None if self.shared.merged else self.shared.active
        return dict(self.adapters.items()).get(name)

    def routed(self, x, y):
        """Each row of the batch with its own adapter: two batched products."""
        names, index = self.shared.rows
        checks.check_batch(x, index)
        if not any(name in self.adapters for name in names):
            return y
        A, B = self.stacked(names)
        index = index.to(A.device)
        thin = torch.bmm(x.reshape(len(x), -1, x.shape[-1]).to(A.dtype), A[index].mT)
        rows = y.reshape(len(y), -1, y.shape[-1]).to(A.dtype)
        return torch.baddbmm(rows, thin, B[index].mT).view(y.shape).to(y.dtype)

    def stacked(self, names):
        """A (k, r, d_in) and scale · B (k, d_out, r) of k names, zero where one lacks.

        Lower ranks than the largest, r, are filled up with zeros.
        """
        some = [dict(self.adapters.items()).get(name) for name in names]
        like = next(adapter for adapter in some if adapter is not None)
        rank = max(adapter.rank for adapter in some if adapter is not None)
        empty = like.A.new_zeros(0, like.A.shape[1]), like.B.new_zeros(len(like.B), 0)
        As, Bs = zip(*((a.A, a.scale * a.B) if a else empty for a in some))
        A = torch.stack([F.pad(A, (0, 0, 0, rank - len(A))) for A in As])
        return A, torch.stack([F.pad(B, (0, rank - B.shape[1])) for B in Bs])

    def with_one(self, name):
        """The base with one of its adapters, as a `LoRALinear` that shares both."""
        lora = LoRALinear.__new__(LoRALinear)  # __init__ would draw random numbers
        nn.Module.__init__(lora)
        part, lora.base, lora.training = (
            self.adapters[name],
            self.base,
            self.training,
        )
        lora.rank, lora.alpha, lora.scale = part.rank, part.alpha, part.scale
        lora.A, lora.B = part.A, part.B
        return lora

    @property
    def weight(self):
        """W, with the update of the adapter that is set: (d_out, d_in).

        Code that reads `layer.weight`, as attention does, gets the adapted weight.
        Raises ValueError inside of `route`, where there is no one weight.
        """
        checks.check_one_weight(self.shared.rows)
        adapter = self.in_use()
        if adapter is None:
            return checks.dense_weight(self.base)
        return self.with_one(self.shared.active).weight

    @property
    def bias(self):
        """The base's bias, shape (d_out,), or None."""
        return self.base.bias


def parts_of(model):
    """The layers that hold adapters, name -> layer, and what they share.

    Raises ValueError if parts of `model` were given adapters one by one.
    """
    layers = find(model, Adapters)
    found = {id(layer.shared): layer.shared for layer in layers.values()}
    checks.check_one_model(len(found))
    return layers, next(iter(found.values()), Shared())


def names_of(layers):
    """The names of the adapters in these layers, in the order of their adding."""
    return list(dict.fromkeys(n for layer in layers.values() for n in layer.adapters))


def bases_of(model):
    """Qualified name -> base of each layer that has adapters or could have them."""
    found = find(model, (Adapters, LoRALinear, *checks.kinds_of_base(nn.Linear)))
    bases = {n: m.base if isinstance(m, Adapters) else m for n, m in found.items()}
    checks.check_bare(n for n, m in bases.items() if isinstance(m, LoRALinear))
    return bases


def attach(model, name, new):
    """Put adapters beside their bases, layer's name -> Adapter; return the names.

    In place; the bases are frozen, and what the model computes does not change.
    """
    layers, shared = parts_of(model)
    bases, wrappers = bases_of(model), {m.base: m for m in layers.values()}
    for place, adapter in new.items():
        base = bases[place]
        if base not in wrappers:
            wrappers[base] = Adapters(base, shared)
        wrappers[base].adapters[name] = adapter.train(base.training)
        model.set_submodule(place, wrappers[base])
        freeze_all(base)
    return list(new)
