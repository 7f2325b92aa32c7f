"""`lora.rank` against numpy, PyTorch's bookkeeping, the chain rule, counts by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora import LoRALinear, count_trainable
from lora.rank import (
    break_even_rank,
    energy,
    lora_parameters,
    rank_for_energy,
    training_bytes,
    truncate,
)


def matrix(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def known(values, m=7, n=5, seed=0):
    """An m x n matrix with these singular values, built from QR factors."""
    U = torch.linalg.qr(matrix(m, len(values), seed=seed))[0]
    V = torch.linalg.qr(matrix(n, len(values), seed=seed + 1))[0]
    return U * torch.tensor(values, dtype=torch.float64) @ V.T


# The bill

BYTES = ("weight_bytes", "frozen_bytes", "gradient_bytes", "moment_bytes")


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_training_bytes_are_those_of_a_real_adamw_step(dtype, size):
    layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
    layers[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(layers.parameters())
    layers(torch.ones(2, 5, dtype=dtype)).sum().backward()
    optimizer.step()

    def size_of(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    moments = [
        s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    ]
    bill = training_bytes(7 * 3 + 3, frozen=5 * 7 + 7, **dict.fromkeys(BYTES, size))
    assert bill == {
        "weights": size_of(layers.parameters()),
        "gradients": size_of(p.grad for p in layers.parameters() if p.grad is not None),
        "AdamW m and v": size_of(moments),
    }


def test_each_size_has_its_own_line():
    bill = training_bytes(
        10, 100, weight_bytes=2, frozen_bytes=0.5, gradient_bytes=3, moment_bytes=7
    )
    assert bill == {"weights": 20 + 50, "gradients": 30, "AdamW m and v": 140}
    assert training_bytes(1, 1) == {"weights": 8, "gradients": 4, "AdamW m and v": 8}
    # the series' 7B figures
    assert list(training_bytes(7e9).values()) == [28e9, 28e9, 56e9]


# The best approximation


@pytest.mark.parametrize("name", ["trainable", "frozen", *BYTES])
@pytest.mark.parametrize(
    "value", [-1, math.inf, np.float32("inf"), np.float16("nan"), "4", None, True]
)
def test_training_bytes_refuses(name, value):
    with pytest.raises(
        ValueError, match=f"{name} must be a finite number of at least 0"
    ):
        training_bytes(**{"trainable": 1, name: value})


def test_the_bill_of_numpys_small_integers_does_not_overflow():
    bill = training_bytes(np.int32(700_000_000), frozen=np.uint8(200))
    assert bill == training_bytes(700_000_000, frozen=200)
    assert bill["AdamW m and v"] == 5_600_000_000
    # float32 has 24 bits: 1e7 + 1 is exact in it, four times as much is not
    assert training_bytes(np.float32(2**24 - 1))["weights"] == 4 * (2**24 - 1)
    assert type(bill["weights"]) is int


# The best approximation


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (2, 3, 6, 4)])
def test_truncate_equals_numpy_and_has_its_rank(shape):
    M = matrix(*shape)
    U, S, Vh = np.linalg.svd(M.numpy(), full_matrices=False)
    for k in range(min(shape[-2:]) + 1):
        expected = np.einsum(
            "...ik,...k,...kj->...ij", U[..., :k], S[..., :k], Vh[..., :k, :]
        )
        got = truncate(M, k)
        np.testing.assert_allclose(got, expected, atol=1e-12)
        assert got.shape == M.shape and got.dtype == M.dtype
        assert (torch.linalg.matrix_rank(got) == k).all()
    torch.testing.assert_close(truncate(M, 100), M)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 8),
    st.integers(0, 10**6),
    st.floats(-6, 1),
)
def test_no_competitor_beats_truncate(m, n, k, seed, exponent):
    M, nudge = matrix(m, n, seed=seed), 10**exponent
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    k = min(k, m, n)
    B = U[:, :k] * S[:k] + nudge * matrix(m, k, seed=seed + 1)
    A = Vh[:k] + nudge * matrix(k, n, seed=seed + 2)
    best = (M - truncate(M, k)).norm()
    assert best <= (M - B @ A).norm() + 1e-12
    assert best.item() == pytest.approx(S[k:].norm().item(), abs=1e-12)


def test_energy_is_one_minus_the_relative_error_of_truncate():
    M = matrix(3, 6, 4)
    for k in range(1, 5):
        error = (M - truncate(M, k)).norm(dim=(1, 2)) ** 2 / M.norm(dim=(1, 2)) ** 2
        torch.testing.assert_close(energy(M)[:, k - 1], 1 - error)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_energy_of_known_singular_values(scale):
    kept = energy(known([4, 2, 1]) * scale)
    expected = torch.tensor([16, 20, 21, 21, 21], dtype=torch.float64) / 21
    torch.testing.assert_close(kept, expected)
    assert kept[-1] == 1


def test_gradients_of_truncate():
    """Right at a gap between all singular values, NaN without: as documented."""
    M = known([4, 2, 1], m=3, n=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda M: truncate(M, 2), M)
    for equal in (torch.eye(3), torch.diag(torch.tensor([1.0, 0.0, 0.0]))):
        equal.requires_grad_()
        truncate(equal, 1).sum().backward()
        assert equal.grad.isnan().any()


def test_of_several_best_approximations_truncate_gives_one():
    """Equal singular values: the last and the last but one cost the same."""
    M = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    other = torch.diag(torch.tensor([2.0, 0.0, 1.0]))
    error = (M - truncate(M, 2)).norm()
    torch.testing.assert_close(error, (M - other).norm())
    assert torch.linalg.matrix_rank(truncate(M, 2)) == 2


def test_energy_of_diagonal_matrices_is_exact():
    assert energy(torch.diag(torch.tensor([3.0, 0.0]))).tolist() == [1, 1]
    assert energy(torch.tensor([[2.0], [1.0]])).tolist() == [1]
    quarters = torch.eye(4)
    assert energy(quarters).tolist() == [0.25, 0.5, 0.75, 1]
    # nine tenths, kept exactly, need no rank more
    assert rank_for_energy(torch.eye(10, dtype=torch.float64)) == 9


def test_rank_for_energy_of_known_singular_values():
    values = [4, 2, 1], [1, 1, 1, 1, 1], [9], [3, 1.01], [3, 0.99]
    batch = rank_for_energy(torch.stack([known(v) for v in values]))
    assert batch.tolist() == [2, 5, 1, 2, 1] and batch.dtype == torch.int64
    assert rank_for_energy(known([4, 2, 1])).shape == ()


@pytest.mark.parametrize("rank", [-1, 1.0, True, "1", None])
def test_truncate_refuses_a_rank(rank):
    with pytest.raises(ValueError, match="rank must be an integer of at least 0"):
        truncate(torch.eye(2), rank)


@pytest.mark.parametrize("size", [0, 3e38])  # 4 * 3e38 is not finite in float32
def test_what_has_no_energy_is_refused(size):
    odd = torch.stack([torch.eye(4), torch.full((4, 4), size)])
    for function in (energy, rank_for_energy):
        with pytest.raises(ValueError, match="norm 0 or infinity has no energy"):
            function(odd)


# The counts


@pytest.mark.parametrize(
    ("d_in", "d_out", "rank"), [(2, 128, 2), (128, 128, 8), (3, 5, 1)]
)
def test_lora_parameters_are_those_of_a_lora_layer(d_in, d_out, rank):
    layer = LoRALinear(nn.Linear(d_in, d_out), rank=rank)
    assert lora_parameters(d_in, d_out, rank) == count_trainable(layer)


def test_the_series_counts():
    shapes = [(2, 128), (128, 128), (128, 128), (128, 2)]
    counts = [sum(lora_parameters(*s, r) for s in shapes) for r in (2, 4, 8)]
    assert counts == [1544, 3088, 6176]
    assert 4096**2 / lora_parameters(4096, 4096, 8) == 256
    assert lora_parameters(2, 128, 2) == 260


@pytest.mark.parametrize(("d_in", "d_out"), [(2, 128), (64, 64), (8192, 1024), (1, 1)])
def test_lora_costs_more_exactly_above_the_break_even_rank(d_in, d_out):
    limit = break_even_rank(d_in, d_out)
    for rank in range(1, math.ceil(limit) + 2):
        assert (lora_parameters(d_in, d_out, rank) > d_in * d_out) == (rank > limit)


def test_counts_of_numpys_small_integers_do_not_overflow():
    wide = np.int32(65536)
    assert lora_parameters(wide, wide, np.int32(65536)) == 65536 * 131072
    assert break_even_rank(wide, wide) == 32768
    assert lora_parameters(np.uint8(200), np.uint8(100), np.uint8(2)) == 600


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2.0, 1, 1), (1, -1, 1), (1, 1, True)])
def test_what_is_no_size_is_refused(sizes):
    with pytest.raises(ValueError, match="must be an integer of at least 1, got"):
        lora_parameters(*sizes)
    if sizes[2] == 1 and sizes[2] is not True:
        with pytest.raises(ValueError, match="must be an integer of at least 1, got"):
            break_even_rank(*sizes[:2])
