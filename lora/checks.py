"""What arguments must satisfy: the refusals that the modules of the package share."""

import sys
from numbers import Integral, Real


def check_number(name, value, least, kind=Real):
    """Return `value` as an int or a float if it is a finite `kind`, `least` or greater.

    Raises ValueError otherwise. Count with what is returned: NumPy's integers overflow.
    """
    if isinstance(value, kind) and not isinstance(value, bool):
        # converted first: NumPy would round the limit to inf for a float32
        number = int(value) if isinstance(value, Integral) else float(value)
        if least <= number <= sys.float_info.max:
            return number
    noun = "an integer" if kind is Integral else "a finite number"
    raise ValueError(f"{name} must be {noun} of at least {least}, got {value!r}")
