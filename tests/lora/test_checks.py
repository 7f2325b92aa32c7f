"""`lora.checks`: what is accepted, and what the refusals say."""

import math
import sys

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
