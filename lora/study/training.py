"""Training many small networks of one architecture at once, and their accuracy.

Model i is trained on its own x[i] (n, d) and y[i] (n,), as if it were alone. Chapter 3
of the book builds this file; the other chapters use it.
"""

import copy
from numbers import Integral

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from lora.checks import check_number


def difference(first, second):
    """What sets two models apart, the values of tensors left aside; "" if nothing."""
    modules = [dict(m.named_modules(remove_duplicate=False)) for m in (first, second)]
    if modules[0].keys() != modules[1].keys():
        return "layers"
    for name, one in modules[0].items():
        other = modules[1][name]
        if type(one) is not type(other):
            return f"the type of {name or 'the model'}"
        # A hook, an activation function, a scale: whatever is no tensor of the state.
        for key in sorted(vars(one).keys() | vars(other).keys()):
            if key not in ("_parameters", "_buffers", "_modules"):
                a, b = (vars(m).get(key, modules) for m in (one, other))
                try:
                    equal = a is b or bool(a == b)
                except (RuntimeError, ValueError):  # tensors have no single answer
                    equal = False
                if not equal:
                    return f"{name}.{key}".strip(".")
    for kind in ("parameters", "buffers"):
        a, b = (
            [(k, t.shape, t.dtype, t.requires_grad) for k, t in named]
            for named in (getattr(m, f"named_{kind}")() for m in (first, second))
        )
        if a != b:
            return kind
    return ""


def check_stack(models, x, y):
    """Return `models` as a list if model i can be given x[i] (n, d) and y[i] (n,).

    One network's code is run with the tensors of all. So the models may differ in
    nothing but the values of parameters and buffers, may share nothing that is trained
    nor have a hook on it, and must compute logits (n, classes) without random draws and
    without a change of a buffer. x is finite and in the models' dtype, y is int64 and
    in 0 .. classes - 1. Raises ValueError otherwise.
    """
    models = list(models)
    if not models:
        raise ValueError("models must hold at least one model, got none")
    if len({id(m) for m in models}) < len(models):
        raise ValueError("models holds one model twice: use copy.deepcopy")
    for i, model in enumerate(models):
        if what := difference(models[0], model):
            raise ValueError(f"models[{i}] and models[0] differ in {what}")
    trained = [[p for p in m.parameters() if p.requires_grad] for m in models]
    # by memory: two parameters may be views of one tensor
    memory = [{p.untyped_storage().data_ptr() for p in mine} for mine in trained]
    if len(set().union(*memory)) < sum(map(len, memory)):
        raise ValueError("two models share a trained parameter: use copy.deepcopy")
    hooks = "_backward_hooks", "_post_accumulate_grad_hooks"
    if any(getattr(p, kind) for mine in trained for p in mine for kind in hooks):
        raise ValueError("a parameter has a hook, which would not be called")
    n = y.shape[-1] if y.dim() else 0
    if n == 0 or not x.dim() == 3 or not x.shape[:-1] == y.shape == (len(models), n):
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
    if not x.isfinite().all():
        raise ValueError("x must be finite, got NaN or infinity")
    probe = copy.deepcopy(models[0])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        logits = probe(x[0, :2])
        random = not torch.equal(before, torch.get_rng_state())
    if random:
        raise ValueError("a model draws random numbers (dropout?): call eval() first")
    if any(not torch.equal(a, b) for a, b in zip(probe.buffers(), models[0].buffers())):
        raise ValueError("a model updates a buffer (batch norm?): it would be lost")
    if logits.dim() != 2 or len(logits) != len(x[0, :2]):
        shapes = f"{tuple(x[0, :2].shape)} -> {tuple(logits.shape)}"
        raise ValueError(f"a model must map (n, d) to (n, classes), got {shapes}")
    low, high = y.min().item(), y.max().item()
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"y must lie in 0 .. {logits.shape[1] - 1}, got {low} .. {high}"
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
    batch_size = check_number("batch_size", batch_size, least=1, kind=Integral)
    seed = check_number("seed", seed, least=0, kind=Integral)
    check_number("lr", lr, least=0)
    params, buffers = stack_module_state(models)  # all gain a first dimension of size S
    # A weight's gradient (S, d_out, d_in) comes laid out as (S, d_in, d_out): with the
    # weight kept in that layout, neither backward() nor the optimizer has to copy.
    leaves = {k: (p.mT if p.dim() == 3 else p).detach() for k, p in params.items()}
    leaves = {k: p.contiguous() for k, p in leaves.items()}
    trainable = [
        leaves[k].requires_grad_() for k, p in params.items() if p.requires_grad
    ]
    if not trainable:
        raise ValueError("no parameter requires a gradient: nothing to train")
    network = vmap(lambda state, x: functional_call(models[0], state, (x,)))

    def weights():
        return {k: p.mT if p.dim() == 3 else p for k, p in leaves.items()}

    def forward(x):
        return network((weights(), buffers), x)

    # fused: one pass over memory for all that AdamW reads and writes.
    optimizer = torch.optim.AdamW(trainable, lr=lr, fused=True)
    order = torch.Generator("cpu").manual_seed(seed)
    losses = x.new_zeros(len(models), epochs)
    for epoch in range(epochs):
        rows = torch.randperm(x.shape[1], generator=order, device="cpu")
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
        for name, stacked in weights().items():
            if params[name].requires_grad:
                for model, values in zip(models, stacked):
                    model.get_parameter(name).copy_(values)
    return losses


@torch.no_grad()
def accuracy(models, x, y):
    """Fraction of x[i] (n, d) that model i assigns to its class y[i] (n,): (S,).

    Raises ValueError if a logit is not finite: such a model has diverged.
    """
    models = check_stack(models, x, y)
    logits = torch.stack([model(points) for model, points in zip(models, x)])
    if not logits.isfinite().all():
        raise ValueError("a model's logits are not finite: did its training diverge?")
    return (logits.argmax(2) == y).double().mean(1)
