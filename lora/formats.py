"""Numbers in few bits: sets of levels, and rounding to them by blocks.

A number is stored as the index of the nearest level; a block of numbers shares one
scale, the largest absolute value in it. NF4 and normal floats: Dettmers et al. 2023,
QLoRA, arXiv:2305.14314, section 3. Chapter 6 of the book builds this file.
"""

import torch
from torch.nn import functional as F

from lora import checks

# Torch's defaults may be others when this file is imported.
CPU = {"dtype": torch.float32, "device": "cpu"}


def normal_float(bits):
    """The 2 ** bits levels of a normal float, (2 ** bits,), float32, from -1 to 1.

    Evenly spaced quantiles of the normal distribution, one more above zero than below,
    and zero itself (QLoRA, section 3 and appendix E).
    """
    half = 2 ** (bits - 1)
    top = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2  # the last quantile: not 1
    wide = {"dtype": torch.float64, "device": "cpu"}
    below, above = (
        torch.special.ndtri(torch.linspace(0.5, top, n, **wide))
        for n in (half, half + 1)
    )
    return (torch.cat([-below.flip(0), above[1:]]) / above[-1]).float()


def integers(bits):
    """The levels of signed integers, symmetric: 2 ** bits - 1 from -1 to 1."""
    most = 2 ** (bits - 1) - 1
    return torch.arange(-most, most + 1, **CPU) / most


def dynamic_float():
    """The 256 levels of bitsandbytes' 8-bit "dynamic" float, float32, from -1 to 1.

    Seven decades below and above zero, each with twice the levels of the one before
    (Dettmers 2015, arXiv:1511.04561, section 2).
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, **CPU)
        decades.append(10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2)
    half = torch.cat(decades)
    return torch.cat([half, -half, torch.tensor([0.0, 1.0], **CPU)]).sort().values


# The digits that bitsandbytes has; `normal_float(4)` gives them to 2e-7.
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    + [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
    + [0.07958029955625534, 0.16093020141124725, 0.24611230194568634]
    + [0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    + [0.7229568362236023, 1.0],
    **CPU,
)
FP4 = torch.tensor([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1], **CPU)
DYNAMIC = dynamic_float()
LEVELS = {
    "int8": integers(8),
    "NF4": NF4,
    "FP4": torch.cat([-FP4[1:].flip(0), FP4]),
    "int4": integers(4),
    # Between each block's least and largest number.
    "affine int4": torch.linspace(-1, 1, 16, **CPU),
    "NF3": normal_float(3),
    "int3": integers(3),
    "NF2": normal_float(2),
    "int2": integers(2),
}


def flat_numbers(tensor):
    """The numbers of a tensor in a row, (n,), in float32; ValueError if not finite."""
    flat = tensor.detach().float().flatten()
    if not checks.finite(flat):  # as a scale, an infinity would erase its block
        raise ValueError("a weight must be finite in float32, got an inf or a nan")
    return flat


def in_blocks(flat, block):
    """n numbers as (⌈n / block⌉, block), the last block filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % block)).view(-1, block)


def to_codes(flat, levels, block):
    """The nearest level to each of n numbers (n,), relative to its block's largest.

    Returns codes (n,), indices in uint8, and scales (⌈n / block⌉,) in float32.
    """
    blocks = in_blocks(flat, block)
    scales = blocks.abs().amax(1)
    # as bitsandbytes: times the inverse, and a block below 1e-38 counts as zeros
    scaled = blocks * (1 / scales.clamp(min=1e-38))[:, None]
    midpoints = (levels[1:] + levels[:-1]).to(flat.device) / 2
    codes = torch.bucketize(scaled, midpoints)
    return codes.to(torch.uint8).flatten()[: len(flat)], scales


def scaled_back(values, scales, block):
    """`values` (n,), each times the scale of its block: (n,)."""
    blocks = in_blocks(values, block)
    scales = scales.view(len(blocks), 1)  # refuses one scale for all blocks
    return (blocks * scales).flatten()[: len(values)]


def round_trip(weight, kind="NF4", block=64):
    """`weight` as it comes back from one of `LEVELS`, in its own shape and dtype.

    For comparisons: nothing is packed.
    """
    levels, flat = LEVELS[kind].to(weight.device), flat_numbers(weight)
    middle = torch.zeros_like(flat)
    if kind.startswith("affine"):
        last = flat[-1].expand(-len(flat) % block)  # fills up without a new extreme
        blocks = torch.cat([flat, last]).view(-1, block)
        middle = ((blocks.amax(1) + blocks.amin(1)) / 2).repeat_interleave(block)
    middle = middle[: len(flat)]
    codes, scales = to_codes(flat - middle, levels, block)
    back = scaled_back(levels[codes.int()], scales, block) + middle
    return back.view_as(weight).to(weight)
