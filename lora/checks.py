"""What arguments must satisfy: the refusals that the modules of the package share."""

import math
import re
import warnings
from collections import Counter
from numbers import Integral, Real
from typing import Protocol, runtime_checkable

import torch
from torch import nn


def check_number(name, value, least=-math.inf, kind=Real):
    """Return `value` as an int or a float if it is a finite `kind`, `least` or greater.

    Raises ValueError otherwise. Count with what is returned: NumPy's integers overflow.
    """
    try:
        if isinstance(value, kind) and not isinstance(value, bool):
            # converted first: NumPy would round the limit to inf for a float32
            number = int(value) if isinstance(value, Integral) else float(value)
            if math.isfinite(number) and number >= least:
                return number
    except OverflowError:  # a number beyond all floating-point numbers
        pass
    noun = "an integer" if kind is Integral else "a finite number"
    bound = "" if least == -math.inf else f" of at least {least}"
    raise ValueError(f"{name} must be {noun}{bound}, got {value!r}")


def check_settings(rank, alpha):
    """Raise ValueError unless `rank` is a positive integer and `alpha` is finite."""
    check_number("rank", rank, 1, Integral)
    check_number("alpha", alpha)


@runtime_checkable
class DenseWeight(Protocol):
    """What a layer that is no `nn.Linear` defines to be a base: see `check_base`."""

    def dense_weight(self):
        """W, of shape (out_features, in_features)."""


def opts_in(layer):
    """Whether the layer says itself what its weight is."""
    return hasattr(layer, "dense_weight")


def dense_weight(base):
    """W of a base, (d_out, d_in): what `dense_weight()` returns, else its `weight`."""
    return base.dense_weight() if opts_in(base) else base.weight


def check_base(name, base):
    """Return W of `base`, or raise TypeError unless it maps x to x Wᵀ + b, no more.

    A base is a plain `nn.Linear`, or of a class that opts in by defining
    `dense_weight()`, which returns W of shape (out_features, in_features), beside
    `in_features`, `out_features`, `bias` and a forward that is linear in x.
    """
    kind, plain = type(base), not opts_in(base)
    fault = None
    if plain and not isinstance(base, nn.Linear):
        fault = f"got {kind.__name__}"
    elif plain and kind.forward is not nn.Linear.forward:
        fault = f"got {kind.__name__}, which has a forward of its own"
    elif "forward" in vars(base):
        fault = "but its forward was replaced"
    elif base._forward_hooks or base._forward_pre_hooks:
        fault = "but it has a forward hook or pre-hook"
    elif plain and type(base.weight) is not nn.Parameter:
        fault = f"but its weight is no nn.Parameter: {type(base.weight).__name__}"
    elif plain and list(base.children()):
        fault = f"but it has submodules: {[n for n, _ in base.named_children()]}"
    else:
        W, shape = dense_weight(base), (base.out_features, base.in_features)
        dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
        if W.dtype in dtypes and W.shape == shape:
            return W
        got = f"{tuple(W.shape)} in {W.dtype}"
        fault = f"with a weight of shape {shape} in one of {dtypes}, got {got}"
    what = "a plain nn.Linear or define dense_weight()"
    raise TypeError(f"{name} must be {what}, {fault}")


def wide(tensor):
    """The tensor in its own dtype, in half precision in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def no_autocast(device):
    """A context in which products keep the dtype of their factors."""
    # There is no autocast on the "meta" device, not even one to switch off.
    return torch.autocast(device.type.replace("meta", "cpu"), enabled=False)


def merged_weight(name, wrapper):
    """W + (alpha / r) B A of a LoRALinear, as a parameter (d_out, d_in).

    Raises ValueError if the wrapper has a hook, which a merged layer would not have, or
    if the sum overflows the dtype of W: if it is not finite though W, A and B are.
    """
    kinds = "forward", "forward_pre", "backward", "backward_pre"
    hooks = [kind for kind in kinds if vars(wrapper)[f"_{kind}_hooks"]]
    if hooks:
        got = f"its wrapper has a {hooks[0].replace('_', ' ')} hook"
        raise ValueError(f"cannot merge {name}: {got}, which would be lost")
    weight = wrapper.weight.detach()
    if not weight.is_meta and not weight.isfinite().all():
        parts = dense_weight(wrapper.base), wrapper.A, wrapper.B
        if all(part.isfinite().all() for part in parts):
            raise ValueError(f"cannot merge {name}: the sum overflows {weight.dtype}")
    return nn.Parameter(weight)


def kinds_of_base(target_class):
    """`target_class`; by default every `nn.Linear` and every class that opts in."""
    return (nn.Linear, DenseWeight) if target_class is nn.Linear else target_class


def uses(module):
    """How many modules inside `module` hold a given submodule or parameter."""
    return Counter(
        part
        for m in module.modules()
        for part in (*m.children(), *m.parameters(recurse=False))
    )


def check_unshared(module, wrappers):
    """Raise ValueError if `module` uses the base of a wrapper elsewhere, too."""
    count = uses(module)
    for name, base in ((n, wrapper.base) for n, wrapper in wrappers.items()):
        if max(count[part] for part in (base, *base.parameters())) > 1:
            raise ValueError(f"cannot merge {name}: another module shares its base")
        check_base(name, base)


def find_tied(module, layers):
    """Those of `layers` whose weight another module inside `module` holds, too."""
    count = uses(module)
    return {
        layer
        for layer in layers
        if any(count[p] > 1 for name, p in layer.named_parameters() if name != "bias")
    }


def other_matrices(module, found):
    """'2 Conv1D, …': what holds a matrix and is neither in `found` nor a lookup."""
    inside = {m for layer in found for m in layer.modules()}
    kinds = Counter(
        type(m).__name__
        for m in module.modules()
        if m not in inside and not isinstance(m, nn.Embedding)
        if any(p.ndim > 1 for p in m.parameters(recurse=False))
    )
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def listed(names):
    """The names as a text; of five or more that differ in a number, the outer two."""
    groups = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    texts = (
        ", ".join(g) if len(g) < 5 else f"{g[0]}, ..., {g[-1]} ({len(g)})"
        for g in groups.values()
    )
    return ", ".join(texts) or "none"


def choose(module, found, layers, kinds, targets):
    """The named layers that `inject_lora` has to replace, in order.

    `found` holds, by name, each layer or the wrapper around it, `layers` the layer in
    either case. Chosen are those of the `kinds` whose name `targets` matches, without
    those whose weight another module uses, too, and without the wrapped ones. Warns of
    what is left out: of each tied layer, and, where all layers are asked for, of the
    matrices that are in none. Raises TypeError or ValueError as `inject_lora` says.
    """
    if isinstance(module, kinds):
        kind = type(module).__name__
        raise ValueError(f"cannot replace the root {kind}: use LoRALinear(module)")
    if not isinstance(targets, str | re.Pattern | None):
        raise TypeError(f"targets must be a regular expression, got {targets!r}")
    try:
        pattern = None if targets is None else re.compile(targets)
    except re.error as fault:
        message = f"targets must be a regular expression, got {targets!r}: {fault}"
        raise ValueError(message) from None
    there = {name: layer for name, layer in layers.items() if isinstance(layer, kinds)}
    wanted = {
        layer
        for name, layer in there.items()
        if pattern is None or pattern.fullmatch(name)
    }
    tied = find_tied(module, wanted)
    chosen = wanted - tied
    others = other_matrices(module, found.values())
    if not chosen:
        asked = "" if targets is None else f" whose name is {targets!r}"
        raise ValueError(
            f"no layer{asked} to adapt in {type(module).__name__}. "
            f"Layers: {listed(there)}; tied to another module: "
            f"{listed(n for n in there if there[n] in tied)}; "
            f"other modules with matrices: {others or 'none'}"
        )
    bare = {n: m for n, m in there.items() if m in chosen and found[n] is m}
    for name, layer in bare.items():
        check_base(name, layer)
    for name, layer in there.items():
        if layer in tied:
            note = f"{name} is left as it is: another module uses its weight"
            warnings.warn(note, stacklevel=3)
    if targets is None and kinds == kinds_of_base(nn.Linear) and others:
        note = f"only linear layers are adapted, left as they are: {others}"
        warnings.warn(note, stacklevel=3)
    return bare
