"""Bases: which layers can be adapted, and which of a model's layers are.

A base maps x to x Wᵀ + b and does no more. It is a plain `nn.Linear`, a layer of any
class that says itself what its weight is, or one of a class about which `register` was
told. Chapter 2 of the book builds this file.
"""

import copy
import re
import warnings
from collections import Counter
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from lora import checks


@runtime_checkable
class DenseWeight(Protocol):
    """What a class that is no `nn.Linear` defines so that its layers are bases.

    Beside `dense_weight` these are `in_features`, `out_features`, `bias` (or None) and
    a forward that is linear in x: x Wᵀ + b.
    """

    def dense_weight(self):
        """W, of shape (out_features, in_features)."""


REGISTERED = {}  # class -> (how W lies in its weight, the wrapper of its layers)
# What a LazyWeight says without a computation.
FREE = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__}
FREE |= {
    getattr(torch.Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "is_meta", "is_cuda")
}
# What would change a LazyWeight, beside the functions whose names end in "_".
WRITES = {"__set__", "__setitem__", "register_hook", "retain_grad"}
WRITES |= {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow")}
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


def register(kind, view, wrapper=None):
    """Let layers of a class that is not ours be bases: say how W lies in their weight.

    `view` is a function of the layer's `weight` that returns W, (d_out, d_in), in the
    same memory, such as `lambda weight: weight.T`. `wrapper`: a `LoRALinear` with a
    forward of its own, where the layer is given something other than rows of numbers;
    its `check(name, layer)`, if it has one, raises for a layer that it cannot adapt.
    """
    REGISTERED[kind] = view, wrapper


def kinds():
    """The classes whose layers may be bases, as `isinstance` takes them."""
    return nn.Linear, DenseWeight, *REGISTERED


def known(layer):
    """The class, registered or `nn.Linear`, that says how W lies in a layer's weight.

    None for one that defines `dense_weight()`.
    """
    if not isinstance(layer, DenseWeight):
        classes = (nn.Linear, *REGISTERED)
        return next((c for c in type(layer).__mro__ if c in classes), None)


def wrapper_of(base, default=None):
    """What wraps a base: what was registered with its class, or the default."""
    return REGISTERED.get(known(base), (None, None))[1] or default


def matrix_of(base, weight):
    """W, (d_out, d_in), as it lies in a `weight` of the form of the base's own."""
    view, _ = REGISTERED.get(known(base), (None, None))
    return view(weight) if view else weight


def laid_out(base, W):
    """The inverse of `matrix_of`: W in the form of the base's own weight."""
    if known(base) not in REGISTERED:
        return W
    kind = {"dtype": W.dtype, "memory_format": torch.contiguous_format}
    weight = torch.empty_like(base.weight, requires_grad=False, **kind)
    matrix_of(base, weight).copy_(W)
    return weight


def dense_weight(base):
    """W of a base, (d_out, d_in): what `dense_weight()` returns, else its `weight`."""
    return base.dense_weight() if isinstance(base, DenseWeight) else base.weight


def weight_of(base):
    """W of a base, (d_out, d_in), as a view of its weight where a class registered."""
    return matrix_of(base, dense_weight(base))


class LazyWeight(torch.Tensor):
    """A weight that is computed where its numbers are used, each time anew.

    Its dtype, device and shape, which models read in passing, are those of `like`. What
    would write into it raises RuntimeError: it would be lost.
    """

    __torch_dispatch__ = None  # below autograd: it is never called

    def __new__(cls, like, compute):
        if torch.compiler.is_compiling():  # a compiler leaves out what is not used
            return compute()
        kind = {"dtype": like.dtype, "device": like.device}
        lazy = torch.Tensor._make_wrapper_subclass(cls, like.shape, **kind)
        lazy.compute = compute
        return lazy

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in FREE:
            return super().__torch_function__(function, types, args, kwargs)
        if function == torch.Tensor.data.__get__:
            return cls(args[0], lambda: args[0].compute().detach())
        kwargs, name = kwargs or {}, function.__name__
        writes = name in WRITES or (name[-1] == "_" and name[-2:] != "__")
        into = [kwargs.get("out")]
        if writes:
            into += [*args[:1], kwargs.get("tensor")]  # as nn.init calls it
        if any(isinstance(t, cls) for t in into):
            message = f"{name} would change a weight that is computed, and be lost"
            raise RuntimeError(f"{message}: change the base, A or B")
        args, kwargs = tree_map_only(cls, lambda w: w.compute(), (args, kwargs))
        return function(*args, **kwargs)


def lazily(change, base):
    """`change`(W of a base), computed where its numbers are used, in its own form."""
    own = getattr(base, "weight", None)
    like = own if isinstance(own, LazyWeight) or known(base) else dense_weight(base)
    return LazyWeight(like, lambda: laid_out(base, change(weight_of(base))))


def check_base(name, layer):
    """Return W of a base, (d_out, d_in); TypeError if `layer` does more than x Wᵀ + b.

    An adapter beside such a layer would be wrong without a word: merging knows W and b
    alone. The message calls the layer `name`.
    """
    kind, opts_in = type(layer), isinstance(layer, DenseWeight)
    if not isinstance(layer, kinds()):
        fault = f"got {kind.__name__}"
    elif not opts_in and kind.forward is not known(layer).forward:
        fault = f"got {kind.__name__}, which has a forward of its own"
    elif "forward" in vars(layer):
        fault = "but its forward was replaced"
    elif kind.__call__ is not nn.Module.__call__:
        fault = f"got {kind.__name__}, which has a __call__ of its own"
    elif hooks := hooks_of(layer):
        fault = f"but it has a {hooks[0]} hook"
    elif not opts_in and "weight" not in layer._parameters:
        fault = "but its weight is computed, no parameter"
    elif not opts_in and list(layer.children()):
        fault = f"but it has submodules: {[n for n, _ in layer.named_children()]}"
    else:
        W = weight_of(layer)
        if known(layer) in REGISTERED:  # a copy would be adapted, and not merged
            shape, fits = "(d_out, d_in)", W.dim() == 2
            if not torch._C._is_alias_of(W, layer.weight):
                message = "its W is a copy, and must share the memory of its weight"
                raise TypeError(f"{name}: {message} (which may need .contiguous())")
        else:
            shape = layer.out_features, layer.in_features
            fits = W.shape == shape
        if W.dtype in DTYPES and fits:
            if check := getattr(wrapper_of(layer), "check", None):
                check(name, layer)
            return W
        got = f"{tuple(W.shape)} in {W.dtype}"
        fault = f"with a weight of shape {shape} in one of {DTYPES}, got {got}"
    what = "a plain nn.Linear or define dense_weight()"
    raise TypeError(f"{name} must be {what}, {fault}")


def check_rows(places):
    """Raise TypeError if a base, name -> base, takes images or indices, no rows.

    What was registered wraps it, and nothing else can.
    """
    for place, base in places.items():
        if wrapper := wrapper_of(base):
            message = f"{place}: {type(base).__name__} takes no rows of numbers"
            remedy = f"inject_lora adapts it, by {wrapper.__name__}; else leave it out"
            raise TypeError(f"{message}: {remedy}")


def hooks_of(module):
    """The kinds of hooks that a module has: "forward", "backward pre", ..."""
    kinds = "forward", "forward_pre", "backward", "backward_pre"
    return [k.replace("_", " ") for k in kinds if vars(module)[f"_{k}_hooks"]]


def find(module, kind):
    """Qualified name -> submodule of type `kind`, without looking inside of it.

    A submodule that has several names stands under each of them.
    """
    layers, last = {}, "."
    for name, m in module.named_modules(remove_duplicate=False):
        if isinstance(m, kind) and not name.startswith(last):
            layers[name], last = m, name and f"{name}."
    return layers


def layers_of(model, kind=nn.Linear, wrapper=()):
    """Qualified name -> layer of this kind, also of one that is inside a `wrapper`.

    Every base, for the kind `nn.Linear`.
    """
    wanted = kinds() if kind is nn.Linear else kind
    layers = find(model, (wrapper, wanted))
    for name, layer in layers.items():
        while isinstance(layer, wrapper):
            layer = layer.base
        layers[name] = layer
    return {name: layer for name, layer in layers.items() if isinstance(layer, wanted)}


def check_not_parallel(model):
    """Raise ValueError if a part of `model` is in DistributedDataParallel.

    What trains only afterwards is sent to no other process: the copies drift apart.
    """
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        message = "DistributedDataParallel sends what trained when it was made"
        raise ValueError(f"{message}: change the model itself, then wrap it again")


@runtime_checkable
class Update(Protocol):
    """What can be added to a weight, as `lora.core.LowRankUpdate`."""

    def add_to(self, W): ...


def check_one_way(model, wrapper):
    """Raise ValueError if updates are in `model` that stand in no `wrapper`."""
    its = find(model, (wrapper, Update)) if wrapper else {}
    if beside := [name for name, m in its.items() if not isinstance(m, wrapper)]:
        message = "put there by add_adapter: use add_adapter throughout"
        raise ValueError(f"{listed(beside)}: {message}")


def choose(model, targets=None, exclude=None, kind=nn.Linear, wrapper=()):
    """Qualified name -> base, of the layers to adapt: all, or those that are named.

    `targets` must match the whole name, `exclude` must not; both are regular
    expressions. A base that is inside a `wrapper` already stands under its name. A
    layer whose weight another module uses is left out, with a warning, and without
    `targets` a warning says which matrices are in no linear layer. Raises ValueError if
    `model` is itself a layer, is wrapped by DistributedDataParallel, has adapters that
    stand in no `wrapper`, or none is left, TypeError if one is no base.
    """
    if isinstance(model, kinds()):
        name = type(model).__name__
        raise ValueError(f"cannot replace the root {name}: pass what holds it")
    check_not_parallel(model)
    check_one_way(model, wrapper)
    layers = layers_of(model, kind, wrapper)
    wanted = matching("targets", targets, layers) if targets is not None else [*layers]
    if exclude is not None:
        out = set(matching("exclude", exclude, wanted))
        if len(out) in (0, len(wanted)):
            message = f"exclude={exclude!r} matches {'all' if out else 'none'} of"
            raise ValueError(f"{message} {listed(wanted)}")
        wanted = [name for name in wanted if name not in out]
    chosen = {layers[name] for name in wanted}  # one layer may have several names
    tied = tied_of(model, chosen)
    others = other_matrices(model, map(model.get_submodule, layers))
    if not chosen - tied:
        asked = "" if targets is None else f" whose name is {targets!r}"
        raise ValueError(
            f"no layer{asked} to adapt in {type(model).__name__}. "
            f"Layers: {listed(layers)}; tied to another module: "
            f"{listed(n for n in layers if layers[n] in tied)}; "
            f"other modules with matrices: {others or 'none'}"
        )
    names = {n: layer for n, layer in layers.items() if n and layer in chosen - tied}
    for name, layer in names.items():
        if model.get_submodule(name) is layer:  # it is not wrapped yet
            check_base(name, layer)
    for name, layer in layers.items():
        if layer in tied:
            note = f"{name} is left as it is: another module uses its weight"
            warnings.warn(note, stacklevel=3)
    if targets is None and issubclass(nn.Linear, kind) and others:
        note = f"only linear layers are changed, left as they are: {others}"
        warnings.warn(note, stacklevel=3)
    return names


def matching(name, expression, names):
    """Those of `names` that a regular expression, called `name`, matches whole.

    Or those that a function of a name accepts.
    """
    if callable(expression):
        return [n for n in names if expression(n)]
    message = f"{name} must be a regular expression, got {expression!r}"
    if not isinstance(expression, str | re.Pattern):
        raise TypeError(message)
    try:
        return [n for n in names if re.fullmatch(expression, n)]
    except re.error as fault:
        raise ValueError(f"{message}: {fault}") from None


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


def uses(model):
    """How many modules inside `model` hold a given submodule or parameter."""
    return Counter(
        part
        for module in model.modules()
        for part in (*module.children(), *module.parameters(recurse=False))
    )


def tied_of(model, layers):
    """Those of `layers` whose weight another module inside `model` holds, too."""
    count = uses(model)
    return {
        layer
        for layer in layers
        if any(count[p] > 1 for name, p in layer.named_parameters() if name != "bias")
    }


def other_matrices(model, layers):
    """'2 Conv1D, …': what holds a matrix and is neither in `layers` nor a lookup."""
    inside = {m for layer in layers for m in layer.modules()}
    kinds = Counter(
        type(m).__name__
        for m in model.modules()
        if m not in inside and not isinstance(m, nn.Embedding)
        if any(p.ndim > 1 for p in m.parameters(recurse=False))
    )
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


@contextmanager
def all_or_nothing(model):
    """Give parameters back what they had, their gradient too, if the block raises."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    state = torch.get_rng_state()
    try:
        yield
    except BaseException:
        for p, needs, grad in before:
            p.requires_grad_(needs).grad = grad
        torch.set_rng_state(state)
        raise


def check_unshared(model, wrappers):
    """Raise ValueError if `model` uses the base of a wrapper elsewhere, too.

    `wrappers`: qualified name -> wrapper. A merge would change what is shared. So it is
    for an update that has no base of its own, one of several beside a layer.
    """
    count = uses(model)
    for name, wrapper in wrappers.items():
        if (base := getattr(wrapper, "base", None)) is None:
            message = "merge_adapter merges what add_adapter has put there"
            raise ValueError(f"cannot merge {name} by merge_lora: {message}")
        if max(count[part] for part in (base, *base.parameters())) > 1:
            raise ValueError(f"cannot merge {name}: another module shares its base")
        check_base(name, base)


@torch.inference_mode(False)  # what is made there could not be trained through
def merge(name, base, update):
    """A new frozen linear layer: W + s B A in the dtype of W, and the base's bias.

    Of the base's own class, unless that defines `dense_weight()`. `base` and `update`,
    a `lora.core.LowRankUpdate`, stay as they are. Raises ValueError, which calls the
    layer `name`, if the update has a hook or a forward that was put into it, which the
    new layer would not have, or if the sum overflows; and what `check_base` raises.
    """
    W = check_base(name, base)
    own = [f"{kind} hook" for kind in hooks_of(update)]
    own += ["forward of its own"] * ("forward" in vars(update))
    if own:
        got = f"its wrapper has a {own[0]}"
        raise ValueError(f"cannot merge {name}: {got}, which would be lost")
    weight = nn.Parameter(laid_out(base, update.add_to(W).detach()))
    parts = W, update.A, update.B
    if not checks.finite(weight) and all(map(checks.finite, parts)):
        raise ValueError(f"cannot merge {name}: the sum overflows {weight.dtype}")
    if isinstance(base, DenseWeight):
        layer = nn.Linear(*reversed(weight.shape), device="meta")
        layer.weight = weight
        layer.bias = None if base.bias is None else nn.Parameter(base.bias.clone())
    else:  # keeps the class of the base and all but the weight
        layer = copy.deepcopy(base, {id(base.weight): weight})
    return layer.requires_grad_(False).train(update.training)
