"""Rank, and what training costs: the tools of Chapter 1.

Shapes: a weight W is (d_out, d_in), its update BA has B (d_out, r) and A (r, d_in).
Leading batch dimensions are allowed where a function says `(..., m, n)`. Sources:
Eckart & Young 1936 (Psychometrika 1:211-218) for `truncate`; Hu et al. 2021
(arXiv:2106.09685, section 4) for the counts; Li et al. 2018 (arXiv:1804.08838, section
2) for `RandomSubspace`. Bad arguments raise TypeError or ValueError that name the
argument.
"""

from numbers import Integral

import torch
from torch import nn
from torch.func import functional_call

from lora.checks import check_number
from lora.core import freeze_all


def training_bytes(
    trainable,
    frozen=0,
    weight_bytes=4,
    frozen_bytes=4,
    gradient_bytes=4,
    moment_bytes=4,
):
    """Bytes that training with AdamW keeps for its parameters: a dict of three entries.

    `trainable` and `frozen` are numbers of parameters; the other arguments are bytes
    for one number (4: float32, 2: bfloat16, 0.5: 4 bits). A trainable parameter costs
    its weight, its gradient and two moments (AdamW's m and v); a frozen one costs its
    weight alone. With the defaults that is 16 bytes against 4. Activations, which
    depend on the batch, are not counted. Raises ValueError for an argument that is not
    a finite number of at least 0.
    """
    n = {name: check_number(name, value, 0) for name, value in locals().items()}
    return {
        "weights": n["trainable"] * n["weight_bytes"] + n["frozen"] * n["frozen_bytes"],
        "gradients": n["trainable"] * n["gradient_bytes"],
        "AdamW m and v": n["trainable"] * 2 * n["moment_bytes"],
    }


def check_matrix(matrix):
    """The largest absolute entry of each matrix of (..., m, n), as (..., 1, 1).

    1 for a matrix of zeros. Divided by it, no matrix is so large that its norm
    overflows. Raises TypeError unless `matrix` is a tensor in float32 or float64,
    ValueError unless it has m, n and at least one entry, all finite.
    """
    tensor = isinstance(matrix, torch.Tensor)
    kind = matrix.dtype if tensor else type(matrix).__name__
    if kind not in (torch.float32, torch.float64):
        raise TypeError(f"matrix must be a tensor in float32 or float64, got {kind}")
    shape = tuple(matrix.shape)
    if len(shape) < 2:
        raise ValueError(f"matrix must have shape (..., m, n), got {shape}")
    if 0 in shape:
        raise ValueError(f"matrix must have at least one entry, got shape {shape}")
    if not matrix.isfinite().all():
        raise ValueError("matrix must be finite, got an entry that is inf or nan")
    largest = matrix.detach().abs().amax((-2, -1), keepdim=True)
    return largest.masked_fill(largest == 0, 1)


def truncate(matrix, rank):
    """A best approximation of `matrix` (..., m, n) by one of rank `rank` or less.

    "Best" is the least Frobenius norm of the difference (Eckart & Young 1936): keep the
    `rank` largest singular values. Where the last one kept equals the next, there are
    several best ones, and this is one of them. Rank 0 gives zeros; from min(m, n) on,
    `matrix` up to rounding. Float32 or float64, as the result. Not made for
    backpropagation: where two singular values are equal, also where both are zero, the
    gradient is NaN, as that of `torch.linalg.svd`. Raises what `check_matrix` raises,
    and ValueError unless `rank` is an integer of at least 0.
    """
    scale = check_matrix(matrix)
    rank = check_number("rank", rank, least=0, kind=Integral)
    U, S, Vh = torch.linalg.svd(matrix / scale, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :] * scale


def energy(matrix):
    """Share of the squared Frobenius norm that the best rank-k approximation keeps.

    `matrix` is (..., m, n); the result is (..., min(m, n)), entry k - 1 for rank k,
    rising to 1. Raises what `check_matrix` raises, and ValueError for a matrix of
    zeros.
    """
    S = torch.linalg.svdvals(matrix / check_matrix(matrix))
    if (S[..., 0] == 0).any():
        raise ValueError("a matrix of zeros has no energy to share out")
    kept = S.square().cumsum(-1)
    return kept / kept[..., -1:]


def rank_for_energy(matrix, share=0.9):
    """Smallest k such that rank k keeps `share` of the energy of `matrix` (..., m, n).

    `share` lies strictly between 0 and 1. Returns an int64 tensor of shape (...).
    Raises ValueError for another share, and what `energy` raises.
    """
    share = check_number("share", share)
    if not 0 < share < 1:
        raise ValueError(f"share must lie strictly between 0 and 1, got {share!r}")
    return (energy(matrix) < share).sum(-1) + 1


class RandomSubspace(nn.Module):
    """`model`, moved along d random directions of all its D parameters.

    Li et al. 2018, section 2: the parameters are theta = theta_0 + P z. theta_0 (D,)
    are those of `model`, which is kept, not copied, and frozen. P (D, d) is Gaussian,
    drawn from `seed`, with columns of length one. z (d,) starts at zero and is all that
    trains. P takes dtype and device of the parameters and costs D · d numbers. Raises
    ValueError if `dimension` is not an integer from 1 to D or `seed` not one from 0 to
    2**64 - 1, TypeError if `model` is not a module or its parameters are not all of one
    floating-point dtype.
    """

    def __init__(self, model, dimension, seed=0):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        parameters = list(model.parameters())
        dtypes = sorted({str(p.dtype) for p in parameters})
        if len(dtypes) != 1 or not parameters[0].is_floating_point():
            raise TypeError(f"the parameters must share one float dtype, got {dtypes}")
        total = sum(p.numel() for p in parameters)
        dimension = check_number("dimension", dimension, least=1, kind=Integral)
        seed = check_number("seed", seed, least=0, kind=Integral)
        if dimension > total:
            raise ValueError(f"dimension must be at most {total}, got {dimension}")
        if seed >= 2**64:
            raise ValueError(f"seed must be at most 2**64 - 1, got {seed}")
        self.model = model
        generator = torch.Generator().manual_seed(seed)
        P = torch.randn(total, dimension, generator=generator, dtype=torch.float64)
        self.register_buffer("P", (P / P.norm(dim=0)).to(parameters[0]))
        self.z = nn.Parameter(torch.zeros_like(self.P[0]))
        freeze_all(model)  # last: if memory runs out above, the model is as it was

    def theta(self):
        """theta_0 + P z, as a dict from parameter name to tensor."""
        named = dict(self.model.named_parameters())
        moves = (self.P @ self.z).split([p.numel() for p in named.values()])
        return {
            name: p + move.view_as(p) for (name, p), move in zip(named.items(), moves)
        }

    def forward(self, *inputs):
        return functional_call(self.model, self.theta(), inputs)


def lora_parameters(d_in, d_out, rank):
    """Number of entries of A (rank, d_in) and B (d_out, rank) together, an int.

    Hu et al. 2021, section 4.1. Raises ValueError unless all three are integers of at
    least 1.
    """
    sizes = {"d_in": d_in, "d_out": d_out, "rank": rank}
    d_in, d_out, rank = (check_number(n, v, 1, Integral) for n, v in sizes.items())
    return rank * (d_in + d_out)


def break_even_rank(d_in, d_out):
    """The rank, a float, at which A and B have as many entries as W (d_out, d_in).

    Raises ValueError unless both are integers of at least 1.
    """
    sizes = {"d_in": d_in, "d_out": d_out}
    d_in, d_out = (check_number(n, v, 1, Integral) for n, v in sizes.items())
    return d_in * d_out / (d_in + d_out)
