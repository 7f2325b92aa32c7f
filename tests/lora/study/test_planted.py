"""`lora.study.planted`: many trainings at once are what each would be alone."""

import math

import pytest
import torch

from lora.study import planted


@pytest.mark.parametrize("start", planted.STARTS)
def test_a_planted_change_has_its_rank_and_the_start_its_size(start):
    _, D, A = planted.plant(range(3), start, r=16, d=64)
    assert torch.linalg.matrix_rank(D).unique().tolist() == [4]
    spread = {"Gaussian": 1 / 16, "Kaiming": 1 / math.sqrt(3 * 64)}[start]
    assert A.shape == (3, 16, 64)
    assert A.std().item() == pytest.approx(spread, rel=0.05)


def alone(seed, start, r, fresh, d, scale, rate, steps):
    """The error of one training, by the book: one seed, one scale, one rate."""
    normal, D, A = planted.plant([seed], start, r, d)
    D, A = D[0, 0, 0], A[0].clone().requires_grad_()
    B = torch.zeros(d, r, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([A, B], lr=rate, weight_decay=0)
    x = normal(2 * d, d)[0, 0, 0]
    for _ in range(steps):
        x = normal(32, d)[0, 0, 0] if fresh else x
        noise = 0.1 * normal(32, d)[0, 0, 0] if fresh else 0
        optimizer.zero_grad()
        (scale * (x @ A.T) @ B.T - (x @ D.T + noise)).square().mean().backward()
        optimizer.step()
    return ((scale * B @ A - D).norm() / D.norm()).item() ** 2


@pytest.mark.parametrize(("start", "fresh"), [("Kaiming", False), ("Gaussian", True)])
def test_trained_together_is_trained_alone(start, fresh):
    errors = planted.remaining(range(2, 4), start, 8, fresh, d=12)
    assert errors.shape == (2, 2, 3, len(planted.RATES))
    scales = 8 / 8, 4 / 8**0.5, 2.0
    for budget, seed, scale, rate in [(0, 3, 0, 6), (1, 2, 1, 8), (0, 2, 2, 3)]:
        steps = planted.BUDGETS[fresh][budget]
        settings = scales[scale], planted.RATES[rate], steps
        wanted = alone(seed, start, 8, fresh, 12, *settings)
        found = errors[budget, seed - 2, scale, rate].item()
        assert found == pytest.approx(wanted, rel=1e-6)


def test_the_best_rate_is_the_tip_of_a_parabola():
    exponents = torch.arange(-12.0, -2.0, dtype=torch.float64)
    tips = torch.tensor([-7.3, -4.0, -10.8], dtype=torch.float64)
    errors = (0.3 * (exponents - tips[:, None]) ** 2 - 5).exp()
    assert planted.best_rate(errors) == pytest.approx(tips, abs=1e-9)


def test_a_shift_is_from_rank_4_to_full_rank():
    narrow = planted.remaining(range(2), "Gaussian", 4, False, 12)
    wide = planted.remaining(range(2), "Gaussian", 12, False, 12)
    wanted = planted.best_rate(wide) - planted.best_rate(narrow)
    assert torch.equal(planted.shifts(range(2), "Gaussian", False, 12), wanted)


def test_half_precision_rounds_small_steps_away():
    lost, moved = planted.stored_in(torch.bfloat16, range(2), 1e-6, steps=20, d=8)
    assert moved < 0.05
    found, all_moved = planted.stored_in(torch.float32, range(2), 1e-2, 400, d=8)
    assert all_moved > 0.99
    assert found.max() < 0.05 < 0.9 < lost.min()


def test_an_update_is_what_the_equations_say():
    """One step of gradient descent on B alone: B = 2 lr s D Aᵀ."""
    g = torch.Generator().manual_seed(5)
    A, D = 3 * planted.gaussian(4, 6, g), planted.gaussian(6, 6, g)
    found = planted.update(5, torch.optim.SGD, 8, 0.1, 3.0, False, steps=1, d=6)
    assert torch.allclose(found, 2 * 0.1 * 2 * 2 * D @ A.T @ A)


def test_alpha_is_the_rate_for_b_alone():
    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    assert planted.apart(0, adamw, 4, both=False) < 1e-6
    assert planted.apart(0, sgd, 16, both=False) < 1e-6
    assert planted.apart(0, adamw, 2, size=2.0) < 1e-6
    assert planted.apart(0, adamw, 4) > 0.1
