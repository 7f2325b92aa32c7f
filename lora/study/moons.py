"""The rotated two-moons task: data, network, pretrained bases.

A network is trained on two interleaved half circles and then adapted to the same two
half circles rotated by 45 degrees. Chapter 3 of the book runs this experiment. Points
are (n, 2) tensors without a unit, labels are 0 or 1 in int64, angles are in degrees.
Everything is float64 by default, so that results agree between machines. scikit-learn
is loaded on the first call of `two_moons` and not before.
"""

import math
from functools import partial
from numbers import Integral

import torch
from torch import nn

from lora.checks import check_number
from lora.study.training import train


def two_moons(n=1000, noise=0.15, degrees=0.0, seed=0, dtype=torch.float64):
    """Draw n points of two interleaved half circles: x (n, 2) in `dtype`, y (n,) int64.

    scikit-learn's `make_moons` with Gaussian noise of standard deviation `noise`, then
    rotated by `degrees` counter-clockwise about the origin, without centering. The same
    seed gives the same points at every angle, up to the rotation. Raises ValueError for
    n < 2, a negative or non-finite noise, a non-finite angle, a negative seed, a dtype
    that is not a floating-point one.
    """
    from sklearn.datasets import make_moons

    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    check_number("n", n, least=2, kind=Integral)
    check_number("seed", seed, least=0, kind=Integral)
    check_number("noise", noise, least=0)
    check_number("degrees", degrees)
    points, labels = make_moons(n_samples=n, noise=noise, random_state=seed)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    plain = {"dtype": torch.float64, "device": "cpu"}  # whatever the defaults are
    rotation = torch.tensor([[c, -s], [s, c]], **plain)
    x = torch.from_numpy(points) @ rotation.T  # a row vector p becomes R p
    return x.to(dtype), torch.from_numpy(labels)


def moons_batch(seeds, n=1000, noise=0.15, degrees=0.0, dtype=torch.float64):
    """`two_moons` for each of S seeds, stacked: x (S, n, 2), y (S, n)."""
    samples = [two_moons(n, noise, degrees, seed, dtype) for seed in seeds]
    if not samples:
        raise ValueError("seeds must hold at least one seed, got none")
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


def moons_mlp(seed=0, dtype=torch.float64):
    """The series' network, 2 -> 128 -> 128 -> 128 -> 2 with tanh: 33,666 parameters.

    PyTorch's default initialization, drawn from `seed` in float32 and then converted,
    so that every dtype starts from the same weights. The global random state stays as
    it was.
    """
    check_number("seed", seed, least=0, kind=Integral)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's; leaves a GPU's alone
        linear = partial(nn.Linear, dtype=torch.float32, device="cpu")
        layers = [linear(2, 128), nn.Tanh(), linear(128, 128), nn.Tanh()]
        layers += [linear(128, 128), nn.Tanh(), linear(128, 2)]
        return nn.Sequential(*layers).to(dtype)


def pretrained(seeds, n=1000, noise=0.15, epochs=60, lr=1e-3):
    """The base models of the experiment, one a seed, and the data they learned from.

    Model i is `moons_mlp(seeds[i])`, trained on `two_moons(n, noise, seed=seeds[i])`.
    Returns (models, x, y), with x of shape (S, n, 2) and y of shape (S, n). Raises
    ValueError if a seed occurs twice: its run would count twice.
    """
    seeds = list(seeds)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, got {seeds}")
    x, y = moons_batch(seeds, n, noise)
    models = [moons_mlp(seed) for seed in seeds]
    train(models, x, y, epochs, lr)
    return models, x, y
