"""Small things that several modules share: settings, patterns, precision, numbers."""

import math
import re
from numbers import Integral, Real

import torch
from torch._subclasses import FakeTensor


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


def compiled(name, pattern):
    """`pattern` as a regular expression; TypeError or ValueError if it is none."""
    message = f"{name} must be a regular expression, got {pattern!r}"
    if not isinstance(pattern, str | re.Pattern):
        raise TypeError(message)
    try:
        return re.compile(pattern)
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


def wide(tensor):
    """The tensor in its own dtype, in half precision in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def no_autocast(device):
    """A context in which products keep the dtype of their factors."""
    # On some devices, such as "meta", there is no autocast, not even to switch off.
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type if known else "cpu", enabled=False)


def has_numbers(tensor):
    """Whether there are numbers to ask for: not on "meta", nor in fake tensors."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def finite(tensor):
    """Whether all numbers are finite, or there are none to ask for."""
    return not has_numbers(tensor) or bool(tensor.isfinite().all())
