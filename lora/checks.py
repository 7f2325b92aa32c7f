"""What arguments must satisfy: the refusals that the modules of the package share."""

import sys
from numbers import Integral, Real


def check_number(name, value, least, kind=Real):
    """Raise ValueError unless `value` is a finite `kind`, `least` or greater."""
    real = isinstance(value, kind) and not isinstance(value, bool)
    if real and least <= value <= sys.float_info.max:
        return
    noun = "an integer" if kind is Integral else "a finite number"
    raise ValueError(f"{name} must be {noun} of at least {least}, got {value!r}")
