"""The rotated two-moons task: data, network, training over many seeds, evaluation.

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
from torch.func import functional_call, stack_module_state, vmap

from lora.rank import check_number


def two_moons(n=1000, noise=0.15, degrees=0.0, seed=0, dtype=torch.float64):
    """Draw n points of two interleaved half circles: x (n, 2) in `dtype`, y (n,) int64.

    scikit-learn's `make_moons` with Gaussian noise of standard deviation `noise`, then
    rotated by `degrees` counter-clockwise about the origin, without centering. The same
    seed gives the same points at every angle, up to the rotation. Raises ValueError for
    n < 2, a negative or non-finite noise, a non-finite angle, a negative seed.
    """
    from sklearn.datasets import make_moons

    check_number("n", n, least=2, kind=Integral)
    check_number("seed", seed, least=0, kind=Integral)
    check_number("noise", noise, least=0)
    check_number("degrees", degrees, least=-math.inf)
    points, labels = make_moons(n_samples=n, noise=noise, random_state=seed)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotation = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
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
        layers = [nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh()]
        layers += [nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2)]
        return nn.Sequential(*layers).to(dtype)


def check_stack(models, x, y):
    """Raise ValueError unless model i can be given x[i] (n, d) and y[i] (n,)."""
    models = list(models)
    if not models:
        raise ValueError("models must hold at least one model, got none")

    def layout(model):
        """What has to be the same in all models: all but the values of tensors."""
        settings = [
            (type(m), [v for v in vars(m).values() if isinstance(v, (int, float, str))])
            for m in model.modules()
        ]
        parameters = model.named_parameters()
        return settings, [(k, p.shape, p.dtype, p.requires_grad) for k, p in parameters]

    if len({id(m) for m in models}) < len(models):
        raise ValueError("models holds one model twice: use copy.deepcopy")
    for i, model in enumerate(models):
        if layout(model) != layout(models[0]):
            raise ValueError(
                f"models[{i}] and models[0] differ in layers, settings or parameters"
            )
    n = y.shape[-1] if y.dim() else 0
    if n == 0 or not x.shape[:-1] == y.shape == (len(models), n):
        raise ValueError(
            f"for {len(models)} models, x must be ({len(models)}, n, d) "
            f"and y ({len(models)}, n) with n >= 1, "
            f"got x {tuple(x.shape)} and y {tuple(y.shape)}"
        )
    kinds = {p.dtype for p in models[0].parameters()}
    if kinds != {x.dtype} or y.dtype != torch.int64:
        raise ValueError(
            f"x must have the models' dtype and y int64, got x {x.dtype}, y {y.dtype} "
            f"and models in {', '.join(sorted(map(str, kinds)))}"
        )
    return models


def train(models, x, y, epochs=60, lr=1e-3, batch_size=64, seed=0, after_epoch=None):
    """Train S models of one architecture together, in place: model i on x[i], y[i].

    x is (S, n, d) in the models' dtype, y is (S, n) in int64. Minimizes the mean
    cross-entropy of each batch with AdamW (PyTorch's defaults but for `lr`; weight
    decay 0.01) over the parameters that require a gradient; the others stay as they
    are, bit for bit. `seed` draws the order of the rows, anew in each epoch and the
    same for all models. The models' losses are summed, and AdamW works entry by entry,
    so that no model influences another: the result is that of S separate runs up to
    rounding.

    After each epoch calls `after_epoch(epoch, predict)`, if given: `epoch` counts from
    1, and `predict` maps (S, m, d) to the logits (S, m, classes) of the models as they
    are then. Returns the mean training loss of each epoch, (S, epochs). Raises
    ValueError for arguments that do not fit together, before any training.
    """
    models = check_stack(models, x, y)
    check_number("epochs", epochs, least=0, kind=Integral)
    check_number("batch_size", batch_size, least=1, kind=Integral)
    check_number("seed", seed, least=0, kind=Integral)
    check_number("lr", lr, least=0)
    if any(getattr(m, "running_mean", None) is not None for m in models[0].modules()):
        raise ValueError("batch norm is not supported: its running mean would be lost")
    params, buffers = stack_module_state(models)  # all gain a first dimension of size S
    for name, p in params.items():
        if p.dim() == 3:  # laid out as backward() lays out a gradient: spares a copy
            params[name] = p.detach().mT.contiguous().mT.requires_grad_(p.requires_grad)
    trainable = {name: p for name, p in params.items() if p.requires_grad}
    if not trainable:
        raise ValueError("no parameter requires a gradient: nothing to train")
    network = vmap(lambda state, x: functional_call(models[0], state, (x,)))
    forward = partial(network, (params, buffers))
    # fused: one pass over memory. It needs gradients laid out as their parameters are,
    # which backward() ensures; handed those of torch.autograd.grad, it updates the
    # wrong entries.
    optimizer = torch.optim.AdamW(trainable.values(), lr=lr, fused=True)
    order = torch.Generator().manual_seed(seed)
    losses = x.new_zeros(len(models), epochs)
    for epoch in range(epochs):
        rows = torch.randperm(x.shape[1], generator=order)
        batches = (t[:, rows].split(batch_size, dim=1) for t in (x, y))
        for points, labels in zip(*batches):
            logits = forward(points).transpose(
                1, 2
            )  # cross_entropy wants (S, classes, n)
            loss = nn.functional.cross_entropy(logits, labels, reduction="none")
            optimizer.zero_grad()
            loss.mean(1).sum().backward()
            optimizer.step()
            losses[:, epoch] += loss.detach().sum(1) / x.shape[1]
        if after_epoch is not None:
            after_epoch(epoch + 1, torch.no_grad()(forward))
    with torch.no_grad():
        for i, model in enumerate(models):
            for name, p in model.named_parameters():
                if name in trainable:
                    p.copy_(trainable[name][i])
    return losses


@torch.no_grad()
def accuracy(models, x, y):
    """Fraction of x[i] (n, d) that model i assigns to its class y[i] (n,): (S,)."""
    models = check_stack(models, x, y)
    correct = [
        model(points).argmax(-1) == labels
        for model, points, labels in zip(models, x, y)
    ]
    return torch.stack(correct).double().mean(1)


def pretrained(seeds, n=1000, noise=0.15, epochs=60, lr=1e-3):
    """The base models of the experiment, one a seed, and the data they learned from.

    Model i is `moons_mlp(seeds[i])`, trained on `two_moons(n, noise, seed=seeds[i])`.
    Returns (models, x, y), with x of shape (S, n, 2) and y of shape (S, n).
    """
    seeds = list(seeds)
    x, y = moons_batch(seeds, n, noise)
    models = [moons_mlp(seed) for seed in seeds]
    train(models, x, y, epochs, lr)
    return models, x, y
