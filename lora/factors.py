"""The algebra of low-rank updates B A: several at once, their sum, a shorter sum.

A is (r, d_in), B is (d_out, r), and a scale goes with them (Hu et al. 2021,
arXiv:2106.09685, section 4.1). Chapter 5 of the book builds this file.
"""

import torch
from torch.nn.utils.rnn import pad_sequence


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

    x is (n, ..., d_in), y (n, ..., d_out), `updates` as in `stack`. `owner` holds for
    each row the index of its update, -1 for none. Each row gets copies of its thin
    factors, filled up with zeros to the largest rank; then two batched products do.
    """
    A = [u.A for _, u in updates] + [updates[0][1].A.new_zeros(1, x.shape[-1])]
    B = [w * u.scale * u.B.T for w, u in updates] + [A[-1].new_zeros(1, y.shape[-1])]
    A, B = (pad_sequence(f, batch_first=True)[owner] for f in (A, B))  # -1: the zeros
    rows, sums = (t.to(A.dtype).reshape(len(x), -1, t.shape[-1]) for t in (x, y))
    return torch.baddbmm(sums, rows @ A.mT, B).view(y.shape).to(y.dtype)
