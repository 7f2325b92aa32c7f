"""The algebra of low-rank updates B A: several at once, their sum, a shorter sum.

A is (r, d_in), B is (d_out, r), and a scale goes with them (Hu et al. 2021,
arXiv:2106.09685, section 4.1). Chapter 5 of the book builds this file.
"""

import torch
from torch import nn


def stack(updates, rank=None):
    """Factors (A, B) of the sum of w times the update u over the pairs (w, u).

    u has `scale`, `A` and `B`, as a `LoRALinear`. The A's stand on top of each other,
    (R, d_in), the scaled B's side by side, (d_out, R), where R is the sum of the ranks:
    the product is exactly the sum. With `rank`, it is `cut` to that rank.
    """
    A = torch.cat([u.A for _, u in updates])
    B = torch.cat([w * u.scale * u.B for w, u in updates], dim=1)
    return (A, B) if rank is None else cut(A, B, rank)


def cut(A, B, rank):
    """Factors of the best approximation of B A (d_out, d_in) of rank `rank` or less.

    Best in the Frobenius norm (Eckart & Young 1936). B A is not formed: the singular
    values of a product of thin factors are those of a small (R, R) core.
    """
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    root = S[:rank].sqrt()
    return root[:, None] * (Vh[: len(root)] @ Qa.T), Qb @ U[:, : len(root)] * root


def mixed(x, y, updates, owner):
    """y + the update of row i of x, for rows that belong to different updates.

    x is (n, ..., d_in), y (n, ..., d_out); `updates` as in `stack`. `owner` (n,) says
    which of them row i gets, -1 for none. Two thin products with all factors, stacked;
    in between, a row keeps only the numbers of its own update.
    """
    A, B = stack(updates)
    ranks = torch.tensor([len(u.A) for _, u in updates])
    column = torch.arange(len(ranks)).repeat_interleave(ranks).to(x.device)
    other = torch.tensor(owner, device=x.device)[:, None] != column
    h = nn.functional.linear(x.to(A.dtype), A).reshape(len(x), -1, len(A))
    h = h.masked_fill(other[:, None], 0).flatten(0, 1)
    flat = y.to(h.dtype).reshape(-1, y.shape[-1])
    return torch.addmm(flat, h, B.T).view(y.shape).to(y.dtype)
