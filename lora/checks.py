"""What arguments must satisfy: the refusals that the modules of the package share."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
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
    """Raise ValueError unless `rank` is a positive integer and `alpha` is finite.

    Raises RuntimeError in inference mode: what is made there never gets a gradient.
    """
    check_number("rank", rank, 1, Integral)
    check_number("alpha", alpha)
    if torch.is_inference_mode_enabled():
        message = "adapters made in torch.inference_mode() could never be trained"
        raise RuntimeError(f"{message}: leave it first")


def hooks_of(module):
    """The kinds of hooks that a module has: "forward", "backward pre", ..."""
    kinds = "forward", "forward_pre", "backward", "backward_pre"
    return [k.replace("_", " ") for k in kinds if vars(module)[f"_{k}_hooks"]]


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
    if plain and not isinstance(base, nn.Linear):
        fault = f"got {kind.__name__}"
    elif plain and kind.forward is not nn.Linear.forward:
        fault = f"got {kind.__name__}, which has a forward of its own"
    elif "forward" in vars(base):
        fault = "but its forward was replaced"
    elif kind.__call__ is not nn.Module.__call__:
        fault = f"got {kind.__name__}, which has a __call__ of its own"
    elif hooks_of(base):
        fault = f"but it has a {hooks_of(base)[0]} hook"
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

    Raises ValueError if the wrapper has a hook or a forward that was put into it, which
    a merged layer would not have, or if the sum overflows the dtype of W: if it is not
    finite though W, A and B are.
    """
    own = [f"{kind} hook" for kind in hooks_of(wrapper)]
    own += ["forward of its own"] * ("forward" in vars(wrapper))
    if own:
        got = f"its wrapper has a {own[0]}"
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


def compiled(name, pattern):
    """`pattern` as a regular expression; TypeError or ValueError if it is none."""
    message = f"{name} must be a regular expression, got {pattern!r}"
    if not isinstance(pattern, str | re.Pattern):
        raise TypeError(message)
    try:
        return re.compile(pattern)
    except re.error as fault:
        raise ValueError(f"{message}: {fault}") from None


def choose(module, found, layers, kinds, targets, depth=3):
    """The named layers that `inject_lora` has to replace, in order.

    `found` holds, by name, each layer or the wrapper around it, `layers` the layer in
    either case. Chosen are those of the `kinds` whose name `targets` matches, without
    those whose weight another module uses, too, and without the wrapped ones. Warns of
    what is left out: of each tied layer, and, where all layers are asked for, of the
    matrices that are in none, `depth` calls up. Raises as `inject_lora` says.
    """
    if isinstance(module, kinds):
        kind = type(module).__name__
        raise ValueError(f"cannot replace the root {kind}: use LoRALinear(module)")
    pattern = None if targets is None else compiled("targets", targets)
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
            warnings.warn(note, stacklevel=depth)
    if targets is None and kinds == kinds_of_base(nn.Linear) and others:
        note = f"only linear layers are adapted, left as they are: {others}"
        warnings.warn(note, stacklevel=depth)
    return bare


def choose_bases(module, bases, layers, targets, exclude, quiet=False):
    """The named `bases` to adapt, those that have adapters already (`layers`) too.

    Chosen and refused as `choose` does, without those whose name `exclude` matches.
    Raises ValueError if `exclude` matches none of them, or all.
    """
    pattern = compiled("targets", ".*" if targets is None else targets)
    with warnings.catch_warnings(action="ignore" if quiet else None):
        kinds = kinds_of_base(nn.Linear)
        bare = choose(module, bases | layers, bases, kinds, targets, depth=4)
    known = {n for n in layers if pattern.fullmatch(n)}
    chosen = {n: base for n, base in bases.items() if n in bare or n in known}
    if exclude is None:
        return chosen
    out = compiled("exclude", exclude)
    left = {n: base for n, base in chosen.items() if not out.fullmatch(n)}
    if not 0 < len(left) < len(chosen):
        some = "all" if not left else "none"
        raise ValueError(f"exclude={exclude!r} matches {some} of {listed(chosen)}")
    return left


def by_pattern(name, patterns, layers, default):
    """Layer's name -> the value of the first of `patterns` that matches it whole."""
    patterns = {} if patterns is None else patterns
    if not isinstance(patterns, Mapping):
        message = f"{name} must be a dictionary, expression -> number, got {patterns!r}"
        raise TypeError(message)
    values = {}
    for expression, value in patterns.items():
        pattern = compiled(name, expression)
        matched = [n for n in layers if pattern.fullmatch(n)]
        if not matched:
            raise ValueError(f"{name}: {expression!r} matches none of {listed(layers)}")
        values = dict.fromkeys(matched, value) | values
    return dict.fromkeys(layers, default) | values


def check_new_name(name, names):
    """Raise TypeError or ValueError unless an adapter can be added with this name."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name must be a name without dots, not {name!r}")
    if name in names:
        raise ValueError(f"there is an adapter {name!r} already")


def check_known(names, known):
    """Raise ValueError unless each of the adapters' names is known."""
    for name in names:
        if name not in known:
            there = ", ".join(map(repr, known)) or "none"
            raise ValueError(f"there is no adapter {name!r}; there are: {there}")


def check_rows(names, known):
    """`names` as a list of known adapters or None, one a row, one at least."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names must be a list with one entry a row, got {names!r}")
    names = list(names)
    if not names:
        raise ValueError("names must have one entry a row of the batch, got none")
    check_known(names, [None, *known])
    return names


def check_batch(x, index):
    """Raise ValueError unless the first dimension of `x` has a row for each index."""
    if x.dim() < 2 or len(x) != len(index):
        message = f"{len(index)} rows are routed, but a layer was given {(*x.shape,)}"
        raise ValueError(f"{message}: the first dimension must be the batch")


def check_apart(shared, what):
    """Raise ValueError inside of a context or while an adapter is merged."""
    if shared.inside:
        raise ValueError(f"cannot {what} inside of {shared.inside}: leave it first")
    if shared.merged:
        message = f"cannot {what} while {shared.merged!r} is merged"
        raise ValueError(f"{message}: unmerge_adapter first")


def check_merged(shared):
    """Raise ValueError unless an adapter is merged."""
    if not shared.merged:
        raise ValueError("cannot unmerge: no adapter is merged")


def check_one_weight(rows):
    """Raise ValueError while rows are routed: then a layer has no one weight."""
    if rows is not None:
        message = "a layer's weight was read inside of route, as attention may do"
        raise ValueError(f"{message}: there each row has its own")


def check_one_model(count):
    """Raise ValueError if layers of one model share `count` > 1 states."""
    if count > 1:
        message = "adapters were added to parts of the model one by one"
        raise ValueError(f"{message}: always pass the same whole model")


def check_bare(wrapped):
    """Raise ValueError if a layer is wrapped by `inject_lora`."""
    if wrapped := list(wrapped):
        message = f"{listed(wrapped)}: wrapped by inject_lora"
        raise ValueError(f"{message}; merge_lora first, or use add_adapter throughout")


def check_weights(weights, known):
    """[(adapter, weight)] of a dictionary of them: known, finite, one at least."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights must be a dictionary, name -> weight, got {weights!r}"
        )
    if not weights:
        raise ValueError("weights must name one adapter or more, got none")
    check_known(weights, known)
    return [(n, float(check_number(f"weights[{n!r}]", w))) for n, w in weights.items()]


def check_head(head):
    """`head`, or TypeError unless it is a module with floating-point numbers only."""
    if not isinstance(head, nn.Module):
        raise TypeError(f"head must be a module, got {head!r:.80}")
    for name, value in head.state_dict().items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise TypeError(f"head must hold floating-point tensors, not {name}")
    return head


def check_values(name, tensor):
    """Raise ValueError if a number is not finite, or there is none (meta device)."""
    if tensor.is_meta or not tensor.isfinite().all():
        raise ValueError(f"{name}: numbers that are not finite")


def check_mark(file, found, expected):
    """Raise ValueError if a file is of another saving than the settings beside it."""
    if found not in (None, expected):
        raise ValueError(f"{file} and the settings beside it are of two savings")


def check_keys(file, found, expected):
    """Raise ValueError unless a file holds the tensors that are expected."""
    found, expected = set(found), set(expected)
    if missing := sorted(expected - found):
        raise ValueError(f"{file} lacks {listed(missing)}")
    if foreign := sorted(found - expected):
        raise ValueError(f"{file}: no place in the model for {listed(foreign)}")


def check_tensor(name, shape, dtype, expected):
    """Raise ValueError unless a stored tensor has this shape and is of floats."""
    if shape != expected:
        raise ValueError(f"{name} must be {expected}, got {shape}")
    if dtype not in ("F16", "BF16", "F32", "F64"):
        raise ValueError(f"{name} must be floating-point of 16 to 64 bits, got {dtype}")
