"""What the functions of `lora.adapters` refuse, each with what they accept."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from lora import checks
from lora.core import LoRALinear


@dataclass
class State:
    """What all adapted layers of one model share."""

    active: str | None = None  # the adapter that `set_adapter` chose
    rows: tuple | None = None  # inside of `route`: its names; () while disabled
    merged: str | None = None  # the adapter that `merge_adapter` folded in


def known(layers):
    """The names of the adapters of the AdapterLinears in `layers`, each once."""
    return list(dict.fromkeys(n for m in layers.values() for n in m.adapters))


def check_layers(layers, names, idle):
    """Return the state of `layers`; ValueError unless all `names` are adapters there.

    The fields `idle` of the state must be None.
    """
    states = {id(m.state): m.state for m in layers.values()}
    if len(states) > 1:
        raise ValueError("parts of model have adapters of their own: pass such a part")
    state = states.popitem()[1] if states else State()
    for name in names:
        if name not in known(layers):
            raise ValueError(f"no adapter {name!r}, there are: {known(layers)}")
    if "merged" in idle and state.merged is not None:
        raise ValueError(f"{state.merged!r} is merged: call unmerge_adapter first")
    if "rows" in idle and state.rows is not None:
        raise ValueError("leave route or disable_adapters first")
    return state


def check_new(layers, bases, name):
    """Raise TypeError or ValueError unless `name` may be that of a new adapter."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}")
    # A name is a key of nn.ModuleDict and part of parameters' names, never of a path.
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        what = "consist of letters, digits, _ and -, and be no method of nn.ModuleDict"
        raise ValueError(f"name must {what}, got {name!r}")
    if name in known(layers):
        raise ValueError(f"there is an adapter {name!r}: delete it, or take a new name")
    for n, m in bases.items():
        if isinstance(m, LoRALinear):
            raise ValueError(f"{n} has an update without a name: call merge_lora first")


def choose(model, bases, targets, adapted):
    """The layers (name -> base) that `targets` matches, as `inject_lora` has it."""
    if not isinstance(model, nn.Module) or isinstance(model, LoRALinear):
        raise TypeError(f"model must hold linear layers, got {type(model).__name__}")
    kinds = checks.kinds_of_base(nn.Linear)
    # Without `targets`, A and B of other adapters would be warned of as left out.
    targets = ".*" if targets is None and adapted else targets
    return checks.choose(model, bases, bases, kinds, targets)


def settings(chosen, rank, alpha):
    """Base -> (rank, alpha); each is one number, or a mapping from patterns to numbers.

    A pattern is a regular expression for the whole qualified name; the first that
    matches counts. Raises ValueError if none matches a layer, or one matches no layer.
    """
    found = {}
    for field, value in (("rank", rank), ("alpha", alpha)):
        patterns = value if isinstance(value, Mapping) else {".*": value}
        for pattern in patterns:
            check_expression(field, pattern)
            if not any(re.fullmatch(pattern, n) for n in chosen):
                raise ValueError(f"{field}: no chosen layer's name is {pattern!r}")
        for n, base in chosen.items():
            fitting = [v for p, v in patterns.items() if re.fullmatch(p, n)]
            if not fitting:
                raise ValueError(f"{field} has no pattern for {n}: {list(patterns)}")
            found.setdefault(base, {}).setdefault(field, fitting[0])
    for pair in found.values():
        checks.check_settings(**pair)
    return {base: tuple(pair.values()) for base, pair in found.items()}


def check_expression(field, text):
    """Raise TypeError or ValueError unless `text` is a regular expression."""
    if not isinstance(text, str):
        raise TypeError(f"{field} must have regular expressions as keys, got {text!r}")
    try:
        re.compile(text)
    except re.error as fault:
        message = f"{field} must have regular expressions as keys, got {text!r}"
        raise ValueError(f"{message}: {fault}") from None


def check_rows(names):
    """Return `names` as a tuple if it is a list or tuple with a name for each row."""
    if not isinstance(names, list | tuple):
        raise TypeError(f"names must be a list with a name for each row, got {names!r}")
    if not names or not all(isinstance(n, str | None) for n in names):
        raise ValueError(f"names must hold a name or None for each row, got {names!r}")
    return tuple(names)


def check_batch(x, rows):
    """Raise ValueError unless `x` has a row for each name of `rows`."""
    if x.ndim < 2 or len(x) != len(rows):
        shape = tuple(x.shape)
        raise ValueError(f"route got {len(rows)} names, a layer an input of {shape}")


def check_one_weight(state):
    """Raise ValueError inside of `route`: there, no weight holds for all rows."""
    if state.rows:
        raise ValueError("inside of route a layer has no single weight to be read")


def check_weights(weights, rank):
    """Return `weights` with finite floats, or raise TypeError or ValueError."""
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError(f"weights must map names to numbers, got {weights!r}")
    if rank is not None:
        checks.check_number("rank", rank, 1, Integral)
    return {n: checks.check_number(f"weights[{n!r}]", w) for n, w in weights.items()}


def most_bytes(model):
    """How large the file of an adapter for `model` may be: four times the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return 2**20 + 4 * sum(p.nbytes for p in model.parameters())


def fit(chosen, layers, folder):
    """Base -> (rank, alpha, A, B) of a file's `layers`, if they fit the chosen ones."""
    found = {}
    for n, (A, B, alpha) in layers.items():
        base = chosen.get(n)
        if base is None or base in found:
            raise ValueError(f"{n!r} in {folder} is no layer of its own in the model")
        got, wanted = (len(B), A.shape[1]), (base.out_features, base.in_features)
        dtype = checks.wide(checks.dense_weight(base).new_empty(0)).dtype
        exact = all(torch.promote_types(f.dtype, dtype) == dtype for f in (A, B))
        if got != wanted or not exact:
            message = f"{n} in {folder} must update {wanted} in {dtype}"
            raise ValueError(f"{message}, got {got} in {A.dtype} and {B.dtype}")
        found[base] = len(A), alpha, A, B
    return found


def check_finite(name, layers):
    """Raise ValueError if a merged weight is not finite."""
    for layer in layers:
        if not layer.weight.isfinite().all():
            raise ValueError(f"merging {name!r} overflows {layer.weight.dtype}")


def check_folded(layers, state):
    """Raise ValueError unless an adapter is merged, and its weights are as merged."""
    if state.merged is None:
        raise ValueError("no adapter is merged")
    for n, m in layers.items():
        update = m.adapters[state.merged] if m.folded is not None else None
        if update is not None and not torch.equal(m.folded.weight, update.weight):
            raise ValueError(
                f"{n} has changed since {state.merged!r} was merged, which un-merging "
                "would lose: merge_lora(model) makes it permanent"
            )
