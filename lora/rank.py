"""Rank, and what training costs: the tools of Chapter 1.

Shapes: a weight W is (d_out, d_in), its update BA has B (d_out, r) and A (r, d_in).
Leading batch dimensions are allowed where a function says `(..., m, n)`. Sources:
Eckart & Young 1936 (Psychometrika 1:211-218) for `truncate`; Hu et al. 2021
(arXiv:2106.09685, section 4) for the counts.
"""

from numbers import Integral

import torch

from lora.checks import check_number


def training_bytes(
    trainable,
    frozen=0,
    weight_bytes=4,
    frozen_bytes=4,
    gradient_bytes=4,
    moment_bytes=4,
):
    """Bytes that training with AdamW keeps for its parameters: a dict of three entries.

    `trainable` and `frozen` are numbers of parameters, the other arguments bytes for
    one number (4: float32, 2: bfloat16, 0.5: 4 bits). A frozen parameter costs its
    weight alone: by default 4 bytes against 16. Activations are not counted.
    """
    # as Python's numbers: NumPy's integers would overflow
    n = {name: check_number(name, value, 0) for name, value in locals().items()}
    return {
        "weights": n["trainable"] * n["weight_bytes"] + n["frozen"] * n["frozen_bytes"],
        "gradients": n["trainable"] * n["gradient_bytes"],
        "AdamW m and v": n["trainable"] * 2 * n["moment_bytes"],
    }


def truncate(matrix, rank):
    """A best approximation of `matrix` (..., m, n) by one of rank `rank` or less.

    It keeps the `rank` largest singular values: the least Frobenius norm of the
    difference (Eckart & Young 1936). Not made for backpropagation: where two singular
    values are equal, the gradient is NaN.
    """
    rank = check_number("rank", rank, least=0, kind=Integral)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def energy(matrix):
    """Share of the squared Frobenius norm that the best rank-k approximation keeps.

    `matrix` is (..., m, n); the result is (..., min(m, n)), entry k - 1 for rank k,
    rising to 1. Raises ValueError for a matrix of zeros, or one whose norm overflows.
    """
    S = torch.linalg.svdvals(matrix)
    largest = S[..., 0]
    if not ((largest > 0) & largest.isfinite()).all():
        raise ValueError("a matrix of norm 0 or infinity has no energy to share out")
    kept = (S / largest[..., None]).square().cumsum(-1)
    return kept / kept[..., -1:]


def rank_for_energy(matrix):
    """Smallest k such that rank k keeps 90% of the energy of `matrix`: int64, (...)."""
    return (energy(matrix) < 0.9).sum(-1) + 1


def lora_parameters(d_in, d_out, rank):
    """Entries of A (rank, d_in) and B (d_out, rank) together (Hu et al. 2021, §4.1)."""
    sizes = {"d_in": d_in, "d_out": d_out, "rank": rank}
    d_in, d_out, rank = (check_number(n, v, 1, Integral) for n, v in sizes.items())
    return rank * (d_in + d_out)


def break_even_rank(d_in, d_out):
    """The rank, a float, at which A and B have as many entries as W (d_out, d_in)."""
    return int(d_in) * int(d_out) / lora_parameters(d_in, d_out, 1)
