"""`lora.checks`: what is accepted, and what the refusals say."""

import math
import sys

import numpy as np
import pytest

from lora.checks import check_number


def test_check_number_accepts_and_says_what_it_was_given():
    for value in (0, 0.5, np.float64(2), np.int64(3)):
        check_number("x", value, least=0)
    check_number("x", sys.float_info.max, least=0)
    check_number("x", -3, least=-math.inf)
    with pytest.raises(
        ValueError, match="x must be a finite number of at least 1, got 0.5"
    ):
        check_number("x", 0.5, least=1)


def test_check_number_returns_a_python_number_that_does_not_overflow():
    """Kept as NumPy's int32, 700 million bytes times 4 would come out negative."""
    given = np.int32(700_000_000), np.uint8(200), np.float32(0.5), 2, 2.0
    numbers = [check_number("x", value, least=0) for value in given]
    assert numbers == [700_000_000, 200, 0.5, 2, 2.0]
    assert [type(n) for n in numbers] == [int, int, float, int, float]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble])
def test_check_number_refuses_every_kind_of_infinity(kind):
    for text in ("inf", "-inf", "nan"):
        with pytest.raises(ValueError, match="x must be a finite number of at least 0"):
            check_number("x", kind(text), least=0)
