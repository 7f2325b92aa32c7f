"""LoRA for `torch.nn.Linear` layers: wrap, inject, count, merge.

A frozen layer computes W x + b, with W of shape (d_out, d_in). Low-rank adaptation
trains an update of rank r beside it (Hu et al. 2021, arXiv:2106.09685, section 4.1):

    y = W x + b + (alpha / r) B A x        A: (r, d_in)    B: (d_out, r)

Chapter 2 of the book builds this file piece by piece.
"""

import copy
import sys
from collections import Counter
from numbers import Integral, Real

import torch
from torch import nn


def freeze_all(module):
    """Set `requires_grad` to False on every parameter of `module`, in place."""
    for p in module.parameters():
        p.requires_grad_(False)


def count_trainable(module):
    """Number of entries of all trainable parameters; a shared one counts once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count_total(module):
    """Number of entries of all parameters, frozen or not; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())


def check_settings(base, rank, alpha):
    """Raise TypeError or ValueError if `LoRALinear(base, rank, alpha)` cannot work."""
    if not isinstance(base, nn.Linear):
        raise TypeError(f"base must be an nn.Linear, got {type(base).__name__}")
    kind, weight = type(base.weight), base.weight
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
    if kind is not nn.Parameter or weight.dtype not in dtypes:
        raise TypeError(
            f"base.weight must be an nn.Parameter in one of {dtypes}, "
            f"got {kind.__name__} in {weight.dtype}"
        )
    if not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if not isinstance(alpha, Real) or not abs(alpha) <= sys.float_info.max:
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` plus a trainable update of rank r (Hu et al. 2021, §4.1).

    Maps x of shape (..., d_in) to x Wᵀ + b + (x Aᵀ · alpha / r) Bᵀ, of shape (...,
    d_out). A is (r, d_in) with entries from N(0, 1/r²); B is (d_out, r) and zero, so
    the wrapper starts out equal to `base`. Both take dtype and device of `base.weight`.
    `base` itself is kept, not copied, and frozen. Raises TypeError if `base` is not an
    `nn.Linear` with a floating-point weight, ValueError if `rank` is not a positive
    integer or `alpha` not finite.
    """

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0):
        super().__init__()
        check_settings(base, rank, alpha)
        self.base, self.rank, self.alpha = base, rank, alpha
        self.scale = float(alpha / rank)
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.A = nn.Parameter(torch.randn(rank, base.in_features, **like) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        self.train(base.training)
        freeze_all(base)  # last: if memory runs out above, the base is as it was

    def forward(self, x):
        # The scale meets rank numbers a token here; on the output it would meet d_out.
        return self.base(x) + (x @ self.A.T * self.scale) @ self.B.T

    @property
    def weight(self):
        """W + (alpha / rank) B A, (d_out, d_in), for code that reads `layer.weight`."""
        return torch.addmm(self.base.weight, self.B, self.A, alpha=self.scale)

    @property
    def bias(self):
        """The base's bias, shape (d_out,), or None."""
        return self.base.bias

    def extra_repr(self):
        return f"rank={self.rank}, alpha={self.alpha}"


def find(module, kind):
    """Name -> submodule of type `kind`; one with two names stands under both."""
    named = module.named_modules(remove_duplicate=False)
    return {name: m for name, m in named if isinstance(m, kind)}


def inject_lora(module, target_class=nn.Linear, rank=4, alpha=8.0):
    """Wrap every `target_class` layer in `module`, in place; return the new wrappers.

    `target_class` is nn.Linear or a subclass of it. A layer that has several names gets
    one wrapper under all of them. A layer that is wrapped already is left alone, so
    that a second call changes nothing, not even the rank, and returns []. Parameters
    outside the wrapped layers keep their `requires_grad`: call `freeze_all(module)`
    first to train the adapters alone. Raises ValueError if `module` is itself such a
    layer or contains none, and whatever `LoRALinear` raises; then nothing has changed.
    """
    if isinstance(module, target_class):
        raise ValueError(
            f"cannot replace the root {type(module).__name__}: use LoRALinear(module)"
        )
    found = find(module, target_class)
    if not found:
        sought = getattr(target_class, "__name__", target_class)
        raise ValueError(f"no {sought} found in {type(module).__name__}")
    wrappers = {m.base: m for m in find(module, LoRALinear).values()}
    new = [layer for layer in dict.fromkeys(found.values()) if layer not in wrappers]
    for layer in found.values():
        check_settings(layer, rank, alpha)
    trained = [p for layer in new for p in layer.parameters() if p.requires_grad]
    try:
        wrappers.update({layer: LoRALinear(layer, rank, alpha) for layer in new})
    except Exception:  # out of memory, say
        for p in trained:
            p.requires_grad_(True)
        raise
    for name, layer in found.items():
        if not isinstance(module.get_submodule(name.rpartition(".")[0]), LoRALinear):
            module.set_submodule(name, wrappers[layer])
    return [wrappers[layer] for layer in new]


def merge_lora(module):
    """Fold adapters into weights: a LoRALinear becomes an `nn.Linear`, a model plain.

    Given a LoRALinear, returns a copy of its base with weight W + (alpha / rank) B A,
    in the base's dtype; the wrapper and its base stay as they are. Given any other
    module, replaces each wrapper inside it by such a copy, in place, and returns the
    module: layer types, `state_dict` keys and parameter count are the base model's
    again. Merged layers are frozen. Raises ValueError, before any change, if another
    part of `module` uses a wrapper's base, its weight or its bias too. It cannot see
    what lies outside `module`: pass the whole model.
    """
    if isinstance(module, LoRALinear):
        merged = copy.deepcopy(module.base)
        merged.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
        return merged
    wrappers = find(module, LoRALinear)
    uses = Counter()
    for m in module.modules():
        uses.update([*m.children(), *m.parameters(recurse=False)])
    for name, layer in wrappers.items():
        if max(uses[part] for part in (layer.base, *layer.base.parameters())) > 1:
            raise ValueError(f"cannot merge {name}: another module shares its base")
    merged = {layer: merge_lora(layer) for layer in dict.fromkeys(wrappers.values())}
    for name, layer in wrappers.items():
        module.set_submodule(name, merged[layer])
    return module
