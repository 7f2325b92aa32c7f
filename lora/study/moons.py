"""The rotated two-moons task: data, network, pretrained bases.

A network is trained on two interleaved half circles and then adapted to the same two
half circles rotated by 45 degrees. Chapter 3 of the book runs this experiment. Points
are (n, 2) tensors without a unit, labels are 0 or 1 in int64, angles are in degrees.
Everything is float64, so that results agree between machines, drawn on the CPU and then
moved to PyTorch's default device. scikit-learn is loaded on the first call of
`two_moons` and not before.
"""

import copy
import math
from functools import partial

import torch
from torch import nn

from lora.core import inject_lora
from lora.study.training import train


def two_moons(n=1000, noise=0.15, degrees=0.0, seed=0):
    """Draw n points of two interleaved half circles: x (n, 2), y (n,).

    scikit-learn's `make_moons` with Gaussian noise of standard deviation `noise`, then
    rotated by `degrees` counter-clockwise about the origin, without centering. The same
    seed gives the same points at every angle, up to the rotation.
    """
    from sklearn.datasets import make_moons

    points, labels = make_moons(n_samples=n, noise=noise, random_state=seed)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    plain = {"dtype": torch.float64, "device": "cpu"}  # whatever the defaults are
    rotation = torch.tensor([[c, -s], [s, c]], **plain)
    x = torch.from_numpy(points) @ rotation.T  # a row vector p becomes R p
    there = torch.get_default_device()
    return x.to(there), torch.from_numpy(labels).to(there)


def moons_batch(seeds, n=1000, degrees=0.0):
    """`two_moons` for each of S seeds, stacked: x (S, n, 2), y (S, n)."""
    x, y = zip(*(two_moons(n, degrees=degrees, seed=seed) for seed in seeds))
    return torch.stack(x), torch.stack(y)


def moons_mlp(seed=0):
    """The series' network, 2 -> 128 -> 128 -> 128 -> 2 with tanh: 33,666 parameters.

    PyTorch's default initialization, drawn from `seed` in float32 and then converted.
    The global random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's; leaves a GPU's alone
        linear = partial(nn.Linear, dtype=torch.float32, device="cpu")
        layers = [linear(2, 128), nn.Tanh(), linear(128, 128), nn.Tanh()]
        layers += [linear(128, 128), nn.Tanh(), linear(128, 2)]
        return nn.Sequential(*layers).double().to(torch.get_default_device())


def pretrained(seeds, epochs=60):
    """The base models of the experiment, one a seed, and the data they learned from.

    Model i is `moons_mlp(seeds[i])`, trained on `two_moons(seed=seeds[i])`. Returns
    (models, x, y), with x of shape (S, n, 2) and y of shape (S, n). Raises ValueError
    if a seed occurs twice: its run would count twice.
    """
    seeds = list(seeds)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, got {seeds}")
    x, y = moons_batch(seeds)
    models = [moons_mlp(seed) for seed in seeds]
    train(models, x, y, epochs)
    return models, x, y


def disturbed(models, seeds, rank, size=None):
    """Copies of the models with A and B random, of standard deviation 1/rank.

    Model i draws from seeds[i]. With `size`, B is scaled so that the update has this
    norm, relative to W. Returns (copies, mean relative norm before that).
    """
    models, sizes = copy.deepcopy(models), []
    for seed, model in zip(seeds, models):
        torch.manual_seed(seed)
        for layer in inject_lora(model, rank=rank, alpha=8):
            nn.init.normal_(layer.B, std=1 / rank)
            W = layer.base.weight
            sizes.append(((layer.weight - W).norm() / W.norm()).item())
            layer.B.data *= size / sizes[-1] if size else 1
    return models, sum(sizes) / len(sizes)


@torch.no_grad()
def held_out_loss(models, seeds, degrees=0.0):
    """Cross-entropy of model i on 2,000 new points, drawn for seeds[i]: (S,)."""
    x, y = moons_batch([1000 + seed for seed in seeds], n=2000, degrees=degrees)
    pairs = ((model(points), labels) for model, points, labels in zip(models, x, y))
    return torch.stack([nn.functional.cross_entropy(*pair) for pair in pairs]).cpu()
