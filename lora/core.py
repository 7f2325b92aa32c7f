"""LoRA for `torch.nn.Linear` layers: wrap, inject, count, merge.

A frozen layer computes W x + b, with W of shape (d_out, d_in). Low-rank adaptation
trains an update of rank r beside it (Hu et al. 2021, arXiv:2106.09685, section 4.1):

    y = W x + b + (alpha / r) B A x        A: (r, d_in)    B: (d_out, r)

Chapter 2 of the book builds this file piece by piece.
"""

import torch
from torch import nn

from lora import bases, checks


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


class LowRankUpdate(checks.Described):
    """s B A, with s = alpha / r: what is added to W (Hu et al. 2021, section 4.1).

    A is (r, d_in), B is (d_out, r). They are kept in their dtype, but at least in
    float32: in half precision small steps would be rounded away.
    """

    settings = "rank", "alpha", "scale"

    def __init__(self, A, B, alpha):
        super().__init__()
        self.rank, self.alpha, self.scale = len(A), alpha, float(alpha / len(A))
        self.A, self.B = checks.parameter(A), checks.parameter(B)

    def reset_parameters(self):
        """Draw A from N(0, 1/r²), set B to zero, in place; needed after `to_empty`."""
        nn.init.normal_(self.A, std=1 / self.rank)
        nn.init.zeros_(self.B)

    def forward(self, x, y):
        """y + s (x Aᵀ) Bᵀ for x (..., d_in) and y (..., d_out), in the dtype of y.

        Products are in the dtype of x: a wider copy of x would be kept for backward.
        """
        thin = nn.functional.linear(x, self.A.to(x.dtype)).reshape(-1, self.rank)
        rows = y.to(thin.dtype).reshape(-1, y.shape[-1])
        out = torch.addmm(rows, thin, self.B.T.to(x.dtype), alpha=self.scale)
        return out.view(y.shape).to(y.dtype)

    def add_to(self, W):
        """W + s B A, (d_out, d_in): a new tensor, rounded once to the dtype of W."""
        wide, A, B = (checks.wide(t) for t in (W, self.A, self.B))
        with checks.no_autocast(W.device):
            return torch.addmm(wide, B, A, alpha=self.scale).to(W.dtype)


class LoRALinear(LowRankUpdate):
    """A frozen linear layer plus a trainable update of rank r (Hu et al. 2021, §4.1).

    Maps x (..., d_in) to x Wᵀ + b + (alpha / r) (x Aᵀ) Bᵀ, (..., d_out). B is zero, so
    the wrapper starts out equal to `base`, which is kept, not copied, and frozen.
    """

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0):
        checks.check_settings(rank, alpha)
        W = bases.check_base("base", base)
        A, B = W.new_empty(rank, W.shape[1]), W.new_empty(len(W), rank)
        super().__init__(A, B, alpha)
        self.base = base
        self.reset_parameters()
        self.train(base.training)
        freeze_all(base)

    def forward(self, x):
        return super().forward(x, self.base(x))

    @property
    def weight(self):
        """The adapted weight, (d_out, d_in), computed if its numbers are used."""
        return bases.lazily(self.add_to, self.base)

    bias = property(lambda self: self.base.bias)

    def merged(self, name="base"):
        """A frozen `nn.Linear` that computes the same: see `lora.bases.merge`."""
        return bases.merge(name, self.base, self)


def inject_lora(module, target_class=nn.Linear, rank=4, alpha=8.0, targets=None):
    """Wrap the linear layers inside `module`, in place; return the new wrappers.

    By default all bases (`lora.bases`); `target_class` restricts them to a subclass,
    `targets` to those whose whole qualified name matches this regular expression. One
    that is wrapped already is left alone. Other parameters keep their `requires_grad`:
    call `freeze_all(module)` first. If this raises, nothing has changed.
    """
    chosen = bases.choose(module, targets, kind=target_class, wrapper=LoRALinear)
    wrappers, new = {w.base: w for w in bases.find(module, LoRALinear).values()}, []
    for layer in chosen.values():
        if layer not in wrappers:
            wrappers[layer] = bases.wrapper_of(layer, LoRALinear)(layer, rank, alpha)
            new.append(wrappers[layer])
    for name, layer in chosen.items():
        module.set_submodule(name, wrappers[layer])
    return new


def merge_lora(module):
    """Fold adapters into weights: a LoRALinear becomes an `nn.Linear`, a model plain.

    Given a LoRALinear, returns `merged()`, a new layer. Given any other module,
    replaces each wrapper inside it by its merged layer, in place, and returns the
    module. If this raises, nothing has changed. Pass the whole model: what lies outside
    `module` it cannot see.
    """
    if isinstance(module, LoRALinear):
        return module.merged()
    wrappers = bases.find(module, LowRankUpdate)
    bases.check_unshared(module, wrappers)
    merged = {wrapper: wrapper.merged(name) for name, wrapper in wrappers.items()}
    for name, wrapper in wrappers.items():
        module.set_submodule(name, merged[wrapper])
    return module
