"""A change of known rank, planted in one layer, and what LoRA learns of it.

The layer's inputs x (n, d) are Gaussian, and y = x Dᵀ for a D (d, d) of rank 4. LoRA is
trained to find D with AdamW, over many learning rates and seeds at once, in float64.
Chapter 2 of the book asks here which learning rate is best, and what becomes of
adapters that are stored in half precision.
"""

import math
from functools import cache

import torch

RATES = [2.0**k for k in range(-12, -2)]
BUDGETS = {False: (30, 120), True: (50, 200)}  # fresh rows? -> numbers of steps


def there(tensor):
    """The tensor, drawn on the CPU, on PyTorch's default device."""
    return tensor.to(torch.get_default_device())


def gaussian(r, d, g):
    """The series' start of A, (r, d): N(0, 1/r²)."""
    draw = torch.randn(r, d, generator=g, dtype=torch.float64, device="cpu")
    return there(draw / r)


def kaiming(r, d, g):
    """PEFT's start of A, (r, d): uniform on ±1/√d, whatever r is."""
    draw = torch.rand(r, d, generator=g, dtype=torch.float64, device="cpu")
    return there((2 * draw - 1) / d**0.5)


STARTS = {"Kaiming": kaiming, "Gaussian": gaussian}


def plant(seeds, start, r, d, k=4):
    """A source of draws (S, 1, 1, ...), a change D of rank k (S, 1, 1, d, d), and A.

    A is (S, r, d). `start` is a key of STARTS.
    """
    gs = [torch.Generator("cpu").manual_seed(s) for s in seeds]

    def normal(*shape):
        kind = {"dtype": torch.float64, "device": "cpu"}
        draws = [torch.randn(shape, generator=g, **kind) for g in gs]
        return there(torch.stack(draws)[:, None, None])

    D = normal(d, k) @ normal(k, d) / d
    return normal, D, torch.stack([STARTS[start](r, d, g) for g in gs])


def error(update, D):
    """Squared norm of what is missing, relative to that of D."""
    off = (update - D).detach().square().sum((-2, -1))
    return off / D.square().sum((-2, -1))


@cache
def remaining(seeds, start, r, fresh, d=64):
    """Relative error after each number of steps, (2, S, 3 scales, 10 rates).

    The scales are 8/r, 4/√r and 2, equal at rank 4. The rows are the same in each step
    and exact, or, if `fresh`, new ones with noise.
    """
    normal, D, A = plant(seeds, start, r, d)
    A = A[:, None].repeat(1, 3, 1, 1)  # beside each other: the three scales
    As = [A.clone().requires_grad_() for _ in RATES]
    Bs = [A.new_zeros(*A.shape[:2], d, r).requires_grad_() for _ in RATES]
    groups = [{"params": ab, "lr": lr} for *ab, lr in zip(As, Bs, RATES)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0, fused=True)
    scale = D.new_tensor([8 / r, 4 / r**0.5, 2.0])[:, None, None, None]
    x, errors = normal(2 * d, d), []
    for step in range(max(BUDGETS[fresh]) + 1):
        A, B = torch.stack(As, 2), torch.stack(Bs, 2)
        if step in BUDGETS[fresh]:
            errors.append(error(scale * B @ A, D).cpu())
        x = normal(32, d) if fresh else x
        y = x @ D.mT + (0.1 * normal(32, d) if fresh else 0)
        loss = ((x @ A.mT * scale) @ B.mT - y).square().mean((-2, -1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(errors)


def best_rate(errors):
    """log2 of the best rate: the tip of a parabola through the three lowest points."""
    e = errors.log()
    i = e.argmin(-1, keepdim=True).clamp(1, len(RATES) - 2)
    left, low, right = (e.gather(-1, i + j) for j in (-1, 0, 1))
    tip = (left - right) / 2 / (left - 2 * low + right)
    return (i + tip.clamp(-1, 1)).squeeze(-1) + math.log2(RATES[0])


@cache
def shifts(seeds, start, fresh, d=64):
    """How far the best rate moves from rank 4 to d, in doublings: (2, S, 3 scales)."""
    wide, narrow = (remaining(seeds, start, r, fresh, d) for r in (d, 4))
    return best_rate(wide) - best_rate(narrow)


def stored_in(dtype, seeds, lr, steps=500, d=64, r=4):
    """Relative error (S,), and the share of A's entries that moved, after training.

    A and B are stored in `dtype`; all else is in float64.
    """
    normal, D, first = plant(seeds, "Gaussian", r, d)
    D, x = D.squeeze(1, 2), normal(2 * d, d).squeeze(1, 2)
    A = first.to(dtype).requires_grad_()
    B = A.new_zeros(len(seeds), d, r).requires_grad_()
    optimizer = torch.optim.AdamW([A, B], lr=lr, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        update = 8 / r * B.double() @ A.double()
        (x @ (update - D).mT).square().mean((-2, -1)).sum().backward()
        optimizer.step()
    moved = (A != first.to(dtype)).double().mean().item()
    return error(8 / r * B.double() @ A.double(), D).cpu(), moved


def update(seed, optimizer, alpha, lr, size=1.0, both=True, steps=20, d=32):
    """What LoRA of rank 4 has learned of a random D (d, d) after some steps, (d, d).

    A starts `size` times as large as the series'; `both` or B alone is trained.
    """
    g = torch.Generator("cpu").manual_seed(seed)
    A, D = size * gaussian(4, d, g), gaussian(d, d, g)
    B = A.new_zeros(d, 4).requires_grad_()
    # eps: a tiny gradient would feel AdamW's usual one
    exact = {"eps": 1e-30} if optimizer is torch.optim.AdamW else {}
    trained = [A.requires_grad_(), B] if both else [B]
    optimizer = optimizer(trained, lr=lr, weight_decay=0, **exact)
    for _ in range(steps):
        optimizer.zero_grad()
        (alpha / 4 * B @ A - D).square().sum().backward()
        optimizer.step()
    return (alpha / 4 * B @ A).detach()


def apart(seed, optimizer, factor, size=1.0, **options):
    """Relative distance of two updates: 4 alpha, or `factor` times the rate.

    The second starts from an A that is `size` times as large.
    """
    one = update(seed, optimizer, 32, 1e-3, **options)
    other = update(seed, optimizer, 8, factor * 1e-3, size, **options)
    return ((one - other).norm() / one.norm()).item()
