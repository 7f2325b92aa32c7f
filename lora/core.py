"""LoRA for `torch.nn.Linear` layers: wrap, inject, count, merge.

A frozen layer computes W x + b, with W of shape (d_out, d_in). Low-rank adaptation
trains an update of rank r beside it (Hu et al. 2021, arXiv:2106.09685, section 4.1):

    y = W x + b + (alpha / r) B A x        A: (r, d_in)    B: (d_out, r)

Chapter 2 of the book builds this file piece by piece.
"""

import copy

import torch
from torch import nn

from lora import checks


def freeze_all(module):
    """Freeze every parameter of `module`, in place, and drop its gradient.

    An optimizer goes by `.grad`: one that was left over would move a frozen weight.
    """
    module.requires_grad_(False)
    module.zero_grad()


def count_trainable(module):
    """Number of entries of all trainable parameters; a shared one counts once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count_total(module):
    """Number of entries of all parameters, frozen or not; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable update of rank r (Hu et al. 2021, §4.1).

    Maps x of shape (..., d_in) to x Wᵀ + b + (alpha / r) (x Aᵀ) Bᵀ, of shape (...,
    d_out), in the dtype of the base's output. A is (r, d_in) with entries from
    N(0, 1/r²); B is (d_out, r) and zero, so the wrapper starts out equal to `base`.
    Both are on the device of the base's weight, in its dtype but at least in float32:
    in half precision small steps would be rounded away. `base` itself is kept, not
    copied, and frozen. Raises TypeError if it is neither a plain `nn.Linear` nor of a
    class that opts in (`lora.checks.check_base`), ValueError if `rank` is not a
    positive integer or `alpha` not finite, RuntimeError in inference mode. A subclass
    must, in eval mode, compute what `weight` says: that is what merging keeps.
    """

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0):
        super().__init__()
        checks.check_settings(rank, alpha)
        W = checks.check_base("base", base)
        self.base, self.rank, self.alpha = base, rank, alpha
        self.scale = float(alpha / rank)
        self.A = nn.Parameter(checks.wide(W.new_empty(rank, base.in_features)))
        self.B = nn.Parameter(checks.wide(W.new_empty(base.out_features, rank)))
        self.reset_parameters()
        self.train(base.training)
        freeze_all(base)

    def reset_parameters(self):
        """Draw A anew and set B to zero, in place; needed after `to_empty`."""
        nn.init.normal_(self.A, std=1 / self.rank)
        nn.init.zeros_(self.B)

    def forward(self, x):
        y, h = self.base(x), nn.functional.linear(x.to(self.A.dtype), self.A)
        rows, thin = y.to(h.dtype).reshape(-1, y.shape[-1]), h.reshape(-1, self.rank)
        out = torch.addmm(rows, thin, self.B.T, alpha=self.scale)  # y + s (x Aᵀ) Bᵀ
        return out.view(y.shape).to(y.dtype)

    @property
    def weight(self):
        """W + (alpha / r) B A, (d_out, d_in), rounded once to the dtype of W.

        Code that reads `layer.weight`, as attention does, gets the adapted weight: a
        new tensor, so that to write into it changes nothing.
        """
        dense = checks.dense_weight(self.base)
        W, A, B = (checks.wide(t) for t in (dense, self.A, self.B))
        with checks.no_autocast(W.device):
            return torch.addmm(W, B, A, alpha=self.scale).to(dense.dtype)

    @property
    def bias(self):
        """The base's bias, shape (d_out,), or None."""
        return self.base.bias

    def merged(self, name="base"):
        """A frozen `nn.Linear` with weight W + (alpha / r) B A and the base's bias.

        A new layer in the dtype of W; the wrapper and its base stay as they are. It is
        of the base's own class where that is an `nn.Linear`. Raises an error that calls
        the layer `name`: TypeError if the base is no base any more, ValueError if the
        wrapper has a hook or a forward that was put into it, or the sum overflows the
        dtype of W.
        """
        checks.check_base(name, self.base)
        base, bias, weight = self.base, self.bias, checks.merged_weight(name, self)
        if checks.opts_in(base):
            layer = nn.Linear(*reversed(weight.shape), device="meta")
            layer.weight = weight
            layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        else:  # keeps the class of the base and all but the weight
            layer = copy.deepcopy(base, {id(base.weight): weight})
        freeze_all(layer)
        return layer.train(self.training)

    def extra_repr(self):
        return f"rank={self.rank}, alpha={self.alpha}"


def find(module, kind):
    """Qualified name -> submodule of type `kind`, without looking inside of it.

    A submodule that has several names stands under each of them.
    """
    found, last = {}, "."
    for name, m in module.named_modules(remove_duplicate=False):
        if isinstance(m, kind) and not name.startswith(last):
            found[name], last = m, name and f"{name}."
    return found


def inject_lora(module, target_class=nn.Linear, rank=4, alpha=8.0, targets=None):
    """Wrap the linear layers inside `module`, in place; return the new wrappers.

    By default these are all bases: every `nn.Linear` and every layer that defines
    `dense_weight()`. `target_class` restricts them to a subclass, `targets` to those
    whose whole qualified name matches this regular expression. A layer that has several
    names gets one wrapper under all of them. A layer that is wrapped already is left
    alone: a second call changes nothing, not even the rank, and returns []. A layer
    whose weight another module uses, such as a tied head, is left alone with a warning.

    Parameters outside of the wrapped layers keep their `requires_grad`: call
    `freeze_all(module)` first to train the adapters alone. Raises ValueError if
    `module` is itself a layer or no layer is left, TypeError that names the layer if
    one is no base, and whatever `LoRALinear` raises; then nothing has changed.
    """
    checks.check_settings(rank, alpha)
    kinds = checks.kinds_of_base(target_class)
    found = find(module, (LoRALinear, kinds))
    layers = {n: m.base if isinstance(m, LoRALinear) else m for n, m in found.items()}
    wrappers = {layers[n]: m for n, m in found.items() if m is not layers[n]}
    chosen = checks.choose(module, found, layers, kinds, targets)
    new = [layer for layer in dict.fromkeys(chosen.values()) if layer not in wrappers]
    wrappers |= {layer: LoRALinear(layer, rank, alpha) for layer in new}
    for name, layer in chosen.items():
        module.set_submodule(name, wrappers[layer])
    return [wrappers[layer] for layer in new]


def merge_lora(module):
    """Fold adapters into weights: a LoRALinear becomes an `nn.Linear`, a model plain.

    Given a LoRALinear, returns `merged()`, a new layer. Given any other module,
    replaces each wrapper inside it by its merged layer, in place, and returns the
    module: layer types, `state_dict` keys and parameter count are the base model's
    again, where the bases were `nn.Linear`. Raises ValueError, before any change, if
    another part of `module` uses a wrapper's base, its weight or its bias too, and what
    `merged` raises. It cannot see what lies outside `module`: pass the whole model.
    """
    if isinstance(module, LoRALinear):
        return module.merged()
    wrappers = find(module, LoRALinear)
    checks.check_unshared(module, wrappers)
    merged = {w: w.merged(name) for name, w in wrappers.items()}
    for name, w in wrappers.items():
        module.set_submodule(name, merged[w])
    return module
