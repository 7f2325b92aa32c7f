"""`lora.formats`: levels against their definitions, rounding against brute force."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from lora.formats import (
    DYNAMIC,
    LEVELS,
    NF4,
    dynamic_float,
    integers,
    normal_float,
    round_trip,
    to_codes,
)


def test_nf4_is_bitsandbytes_and_its_own_derivation():
    assert torch.equal(NF4, bnb.get_4bit_type("nf4", "cpu"))
    assert NF4.dtype == torch.float32 and NF4.shape == (16,)
    assert (normal_float(4) - NF4).abs().max() < 1e-6
    assert NF4[7] == 0 and NF4[0] == -1 and NF4[15] == 1
    assert (NF4 < 0).sum() == 7 and (NF4 > 0).sum() == 8


def test_fp4_and_the_dynamic_float_are_those_of_bitsandbytes():
    fp4 = bnb.get_4bit_type("fp4", "cpu").unique()
    assert (LEVELS["FP4"] - fp4).abs().max() < 1e-7
    assert torch.equal(dynamic_float(), bnb.create_dynamic_map())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_levels_of_a_normal_float_are_quantiles(bits):
    """Their probabilities under the normal distribution are evenly spaced."""
    levels, half = normal_float(bits), 2 ** (bits - 1)
    assert levels.shape == (2**bits,) and levels[half - 1] == 0
    assert (levels.diff() > 0).all() and levels[0] == -1 and levels[-1] == 1
    top = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    below, above = (norm.ppf(np.linspace(0.5, top, n)) for n in (half, half + 1))
    exact = torch.tensor([*-below[::-1], *above[1:]] / above[-1])
    assert (levels.double() - exact).abs().max() <= 2**-25  # rounded once, to float32
    p = torch.tensor(norm.cdf(levels.double() * norm.ppf(top)))
    for side in (p[:half], p[half - 1 :]):
        assert side.diff().max() - side.diff().min() < 1e-6


def test_sets_of_levels():
    for kind, levels in LEVELS.items():
        assert (levels.diff() > 0).all() and levels[0] == -1 and levels[-1] == 1
        assert (0 in levels) == (kind != "affine int4"), kind
        assert len(levels) <= 2 ** int(kind[-1])
    assert len(DYNAMIC) == 256
    assert torch.equal(integers(2), torch.tensor([-1.0, 0, 1]))
    assert torch.equal(integers(3), torch.arange(-3, 4) / 3)
    assert torch.equal(integers(5), torch.arange(-15, 16) / 15)
    assert integers(3).dtype == torch.float32


def by_hand(weight, levels, block, affine):
    """Number by number, block by block, in float64, without any of the package."""
    out = []
    flat = weight.double().flatten().tolist()
    levels = levels.double().tolist()
    for i in range(0, len(flat), block):
        part = flat[i : i + block]
        middle = (max(part) + min(part)) / 2 if affine else 0
        scale = max(abs(v - middle) for v in part)
        for v in part:
            grid = [middle + scale * level for level in levels]
            out.append(min(abs(v - g) for g in grid))
    return torch.tensor(out, dtype=torch.float64).view(weight.shape)


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("shape", [(3, 40), (2, 7, 5), (13,), ()])
def test_round_trip_takes_the_nearest_level_of_each_block(kind, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for block in (1, 8, 16, 1000):
        back = round_trip(weight, kind, block)
        least = by_hand(weight, LEVELS[kind], block, kind.startswith("affine"))
        assert back.shape == weight.shape and back.dtype == weight.dtype
        assert torch.allclose((back - weight).abs().double(), least, atol=2e-6)


def test_round_trip_keeps_the_ends():
    weight = torch.tensor([-3.0, 0.5, 1.0, 2.0])
    assert round_trip(weight, "NF4", 4)[0] == -3
    ends = round_trip(weight, "affine int4", 4)
    assert ends[0] == -3 and ends[3] == 2
    assert torch.equal(round_trip(torch.zeros(5), "affine int4"), torch.zeros(5))
    assert torch.equal(
        round_trip(torch.full((5,), 2.0), "affine int4"), 2 * torch.ones(5)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_round_trip_keeps_the_dtype(dtype):
    weight = torch.randn(4, 8).to(dtype)
    back = round_trip(weight, "NF4")
    assert back.dtype == dtype
    assert torch.equal(back, round_trip(weight.float(), "NF4").to(dtype))


def test_by_default_nf4_in_blocks_of_64():
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(weight), round_trip(weight, "NF4", 64))
    assert not torch.equal(round_trip(weight), round_trip(weight, "NF4", 65))


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan, 1e300])
def test_what_is_not_finite_in_float32_is_refused(odd):
    with pytest.raises(ValueError, match="^a weight must be finite in float32, got"):
        round_trip(torch.tensor([1.0, odd], dtype=torch.float64))


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.integers(1, 20),
)
def test_codes_point_to_the_nearest_level(values, block):
    flat = torch.tensor(values)
    codes, scales = to_codes(flat, NF4, block)
    assert codes.dtype == torch.uint8 and len(codes) == len(flat)
    assert len(scales) == -(-len(flat) // block)
    scale = scales.repeat_interleave(block)[: len(flat)].double()
    distance = (flat.double()[:, None] - scale[:, None] * NF4.double()).abs()
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    # a float32 rounding of the scaled number may tip the balance at a midpoint
    assert (chosen <= distance.amin(1) + 1e-6 * scale + 1e-37).all()
