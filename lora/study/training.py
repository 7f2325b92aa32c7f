"""Training many small networks of one architecture at once, and their accuracy.

Model i is trained on its own x[i] (n, d) and y[i] (n,), as if it were alone. Chapter 3
of the book builds this file; the other chapters use it.
"""

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from lora.core import freeze_all


def outline(model):
    """Name -> all of a layer but the values of its tensors, to be compared."""
    layers = {}
    for name, layer in model.named_modules():
        tensors = [*layer.named_parameters(recurse=False)]
        tensors += layer.named_buffers(recurse=False)
        kinds = {key: (t.shape, t.dtype, t.requires_grad) for key, t in tensors}
        # A hook, an activation function, a scale: whatever is no tensor of the state.
        rest = vars(layer).keys() - {"_parameters", "_buffers", "_modules"}
        settings = {key: vars(layer)[key] for key in rest}
        layers[name] = type(layer), kinds, settings
    return layers


def check_stack(models, x, y):
    """Return `models` as a list if model i can be given x[i] (n, d) and y[i] (n,).

    One network's code is run with the tensors of all. So the models may differ in
    nothing but the values of parameters and buffers, and may share nothing that is
    trained. Raises ValueError otherwise.
    """
    models = list(models)
    first = outline(models[0])
    for i, model in enumerate(models):
        other = outline(model)
        for name in first | other:
            if first.get(name) != other.get(name):
                where = name or "the model itself"
                raise ValueError(f"models[{i}] and models[0] differ in {where}")
    trained = [p for m in models for p in m.parameters() if p.requires_grad]
    # by memory: two parameters may be views of one tensor
    if len({p.untyped_storage().data_ptr() for p in trained}) < len(trained):
        raise ValueError("two models share a trained parameter: use copy.deepcopy")
    if not len(models) == len(x) or not x.shape[:2] == y.shape:
        raise ValueError(
            f"for {len(models)} models, x must be ({len(models)}, n, d) and y "
            f"({len(models)}, n), got x {tuple(x.shape)} and y {tuple(y.shape)}"
        )
    return models


def train(models, x, y, epochs=60, lr=1e-3, after_epoch=None):
    """Train S models of one architecture together, in place: model i on x[i], y[i].

    x is (S, n, d) in the models' dtype, y is (S, n) in int64. AdamW (weight decay 0.01)
    on the mean cross-entropy of batches of 64 moves what requires a gradient. The order
    of the rows is drawn anew in each epoch and the same for all models. Their losses
    are summed, and AdamW works entry by entry, so no model influences another: the
    result is that of S separate runs up to rounding.

    After each epoch calls `after_epoch(epoch, predict)`, if given: `epoch` counts from
    1, and `predict` maps (S, m, d) to the logits (S, m, classes) of the models as they
    are then. Returns the mean training loss of each epoch, (S, epochs). Raises
    ValueError, before any training, for models that `check_stack` refuses.
    """
    models = check_stack(models, x, y)
    params, buffers = stack_module_state(models)  # all gain a first dimension of size S
    # A weight's gradient (S, d_out, d_in) comes laid out as (S, d_in, d_out): with the
    # weight kept in that layout, neither backward() nor the optimizer has to copy.
    leaves = {k: (p.mT if p.dim() == 3 else p).detach() for k, p in params.items()}
    leaves = {k: p.contiguous() for k, p in leaves.items()}
    trainable = [
        leaves[k].requires_grad_() for k, p in params.items() if p.requires_grad
    ]
    network = vmap(lambda state, x: functional_call(models[0], state, (x,)))

    def weights():
        return {k: p.mT if p.dim() == 3 else p for k, p in leaves.items()}

    def forward(x):
        return network((weights(), buffers), x)

    # fused: one pass over memory for all that AdamW reads and writes.
    optimizer = torch.optim.AdamW(trainable, lr=lr, fused=True)
    order = torch.Generator("cpu").manual_seed(0)
    losses = x.new_zeros(len(models), epochs)
    for epoch in range(epochs):
        rows = torch.randperm(x.shape[1], generator=order, device="cpu")
        batches = (t[:, rows].split(64, dim=1) for t in (x, y))
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


class RandomSubspace(nn.Module):
    """`model`, moved along d random directions of all its D parameters.

    The parameters are theta = theta_0 + P z (Li et al. 2018, arXiv:1804.08838, section
    2). theta_0 (D,) are those of `model`, which is kept, not copied, and frozen. P (D,
    d) is Gaussian, drawn from `seed`, with columns of length one. z (d,) starts at zero
    and is all that trains.
    """

    @torch.inference_mode(False)  # what is made there could not be trained
    def __init__(self, model, dimension, seed=0):
        super().__init__()
        self.model = model
        parameters = list(model.parameters())
        total = sum(p.numel() for p in parameters)
        plain = {"dtype": torch.float64, "device": "cpu"}  # whatever the defaults are
        generator = torch.Generator("cpu").manual_seed(seed)
        P = torch.randn(total, dimension, generator=generator, **plain)
        self.register_buffer("P", (P / P.norm(dim=0)).to(parameters[0]))
        self.z = nn.Parameter(torch.zeros_like(self.P[0]))
        freeze_all(model)  # last: if memory runs out above, the model is as it was

    def theta(self):
        """theta_0 + P z, as a dict from parameter name to tensor."""
        named = dict(self.model.named_parameters())
        moves = (self.P @ self.z).split([p.numel() for p in named.values()])
        return {
            name: p + move.view_as(p) for (name, p), move in zip(named.items(), moves)
        }

    def forward(self, *inputs):
        return functional_call(self.model, self.theta(), inputs)
