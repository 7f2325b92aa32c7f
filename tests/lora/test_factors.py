"""`lora.factors` against dense matrices."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.factors import cut, mixed, stack


def updates(ranks, d_in=5, d_out=7, seed=0):
    """(weight, update) pairs of these ranks, in float64."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return [
        (i + 0.5, SimpleNamespace(scale=2.0 - i, A=draw(r, d_in), B=draw(d_out, r)))
        for i, r in enumerate(ranks)
    ]


def dense(pairs):
    return sum(w * u.scale * u.B @ u.A for w, u in pairs)


ranks = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(ranks=ranks)
def test_a_stack_is_the_sum(ranks):
    A, B = stack(updates(ranks))
    assert A.shape == (sum(ranks), 5) and B.shape == (7, sum(ranks))
    assert torch.allclose(B @ A, dense(updates(ranks)), atol=1e-12)


@given(ranks=ranks, rank=st.integers(1, 9))
def test_a_cut_is_the_best_of_its_rank(ranks, rank):
    D = dense(updates(ranks))
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    for A, B in (cut(*stack(updates(ranks)), rank), stack(updates(ranks), rank)):
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert torch.allclose(B @ A, best, atol=1e-10)
        assert len(A) == B.shape[1] == min(rank, sum(ranks), 5)


def test_a_cut_of_zeros_is_zero():
    A, B = cut(torch.zeros(3, 5), torch.zeros(7, 3), 2)
    assert not (B @ A).any()


@given(
    ranks=ranks,
    owner=st.lists(st.integers(-1, 4), min_size=1, max_size=6),
    middle=st.lists(st.integers(0, 3), max_size=2),
)
def test_mixed_rows(ranks, owner, middle):
    pairs = updates(ranks)
    owner = [min(i, len(pairs) - 1) for i in owner]
    x, y = (torch.randn(len(owner), *middle, d).double() for d in (5, 7))
    out = mixed(x, y, pairs, owner)
    assert out.shape == y.shape
    for i, k in enumerate(owner):
        update = x[i] @ dense([pairs[k]]).T if k >= 0 else 0
        assert torch.allclose(out[i], y[i] + update, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_in_float32_and_rounded_once(dtype):
    (pair,) = updates([4])
    pair[1].A, pair[1].B = pair[1].A.float(), pair[1].B.float()
    x, y = torch.randn(3, 5).to(dtype), torch.randn(3, 7).to(dtype)
    wanted = y.double() + x.double() @ dense([pair]).double().T
    out = mixed(x, y, [pair], [0, 0, 0])
    assert out.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert torch.allclose(out.double(), wanted, rtol=unit, atol=unit / 4)
