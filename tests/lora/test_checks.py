"""`lora.checks`: what is accepted, and what the refusals say."""

import math
import sys
from fractions import Fraction
from numbers import Integral

import numpy as np
import pytest

from lora.bases import listed
from lora.checks import check_number


def test_check_number_accepts_what_is_finite_and_large_enough():
    for value in (0, 0.5, np.float64(2), np.float16(2), np.int64(3), Fraction(1, 3)):
        check_number("x", value, least=0)
    check_number("x", sys.float_info.max, least=0)
    check_number("x", -sys.float_info.max)
    check_number("x", -3, least=-math.inf)
    check_number("x", np.int64(3), 3, Integral)


@pytest.mark.parametrize(
    ("value", "arguments", "message"),
    [
        (0.5, {"least": 1}, "x must be a finite number of at least 1, got 0.5"),
        (2.0, {"least": 1, "kind": Integral}, "x must be an integer of at least 1, "),
        (True, {}, "x must be a finite number, got True"),
        (np.bool_(True), {}, "got np.True_"),
        ("1", {}, "got '1'"),
        (None, {}, "got None"),
        (math.nan, {}, "got nan"),
        (-math.inf, {}, "got -inf"),
        (np.float32("inf"), {}, r"got np.float32\(inf\)"),
        (10**400, {}, "got 1000"),
        (-(10**400), {}, "got -1000"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_check_number_says_what_it_was_given(value, arguments, message):
    with pytest.raises(ValueError, match=message):
        check_number("x", value, **arguments)


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


def test_names_that_differ_in_a_number_are_shortened_from_five_on():
    names = [f"layer.{i}.query" for i in range(5)] + ["head"]
    assert listed(names[1:]) == ", ".join(names[1:])
    assert listed(names) == "layer.0.query, ..., layer.4.query (5), head"
    assert listed([]) == "none"
