"""Training many small networks of one architecture at once, and their accuracy.

Model i is trained on its own x[i] (n, d) and y[i] (n,), as if it were alone. Chapter 3
of the book builds this file; the other chapters use it.
"""

from functools import partial
from numbers import Integral

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from lora.checks import check_number


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
            # cross_entropy wants (S, classes, n)
            logits = forward(points).transpose(1, 2)
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
