"""Six variants of LoRA, each a few lines on `core`: what differs, and no more.

rsLoRA is another number, LoRA+ another optimizer, PiSSA another start, LoRA-FA trains
half; DoRA and VeRA are other layers. Each equals PEFT 0.19's own to rounding, or its
docstring says where PEFT departs from the paper. Chapter 8 builds this file.
"""

import torch
from torch import nn
from torch.nn import functional as F

from lora import bases, checks
from lora.core import LoRALinear, LowRankUpdate, freeze_all


@torch.inference_mode(False)  # what is made there could not be trained through
def inject(model, wrapper, targets=None, rank=4, alpha=8.0):
    """`inject_lora` with a variant's class: `wrapper(layer, rank, alpha)`.

    Raises TypeError for a layer that takes no rows of numbers, a convolution or a
    lookup: of these the variants know nothing.
    """
    chosen = bases.choose(model, targets, wrapper=LoRALinear)
    places = {n: m for n, m in chosen.items() if model.get_submodule(n) is m}
    bases.check_rows(places)
    new = {}
    with bases.all_or_nothing(model):
        for name, layer in places.items():
            try:
                new[layer] = wrapper(layer, rank, alpha)
            except Exception as fault:
                fault.add_note(f"while {name} was to be wrapped")
                raise
    for name, layer in places.items():
        model.set_submodule(name, new[layer])
    return [*new.values()]


def rslora_alpha(rank, alpha):
    """The alpha whose scale is alpha / √r: rsLoRA (Kalajdzievski 2023, 2312.03732).

    So that the size of an update does not fall with the rank. It is plain LoRA, and
    saved as such; PEFT's `use_rslora` means the same function.
    """
    return alpha * rank**0.5


def loraplus_groups(model, lr, ratio=16):
    """Groups for an optimizer: B's rate is `ratio` times that of the rest (LoRA+).

    Hayou et al. 2024, arXiv:2402.12354. The layer is plain LoRA. PEFT's
    `create_loraplus_optimizer` has a rate of its own for lookups, and no weight decay
    unless it is given one as `loraplus_weight_decay`.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    ends = "B", "parametrizations.B.original"  # the latter of `adapt_rows`
    fast = [p for n, p in named if f".{n}".endswith(tuple(f".{end}" for end in ends))]
    slow = [p for _, p in named if all(p is not other for other in fast)]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": ratio * lr}]


class LoRAFALinear(LoRALinear):
    """LoRA whose A stays as drawn: B alone trains (Zhang et al. 2023, 2308.03303).

    For backward it keeps A x, r numbers a token, instead of x. PEFT's
    `create_lorafa_optimizer` departs from that: it multiplies the gradient of B by
    (A Aᵀ)⁻¹ / s² before AdamW, as later versions of the paper do, in bfloat16.
    """

    def __init__(self, base, rank=4, alpha=8.0):
        super().__init__(base, rank, alpha)
        self.A.requires_grad_(False)


class PiSSALinear(LoRALinear):
    """LoRA that starts from W's r largest directions (Meng et al. 2024, 2404.02948).

    s B A = U Σ Vᵀ cut to rank r, and the base becomes what is left, a new layer: the
    sum is W. TypeError for a base in few bits, which would become dense. Saved as the
    difference from the start, plain LoRA of rank 2 r on the base as it was.
    """

    def __init__(self, base, rank=4, alpha=8.0):
        if bases.known(base) is None:
            raise TypeError(f"base must hold its weight, got {type(base).__name__}")
        checks.check_settings(rank, alpha)
        W = checks.wide(bases.weight_of(base).detach())
        if not alpha > 0 or rank > min(W.shape):
            message = f"alpha > 0 and a rank up to {min(W.shape)}"
            raise ValueError(f"PiSSA needs {message}, got {alpha} and {rank}")
        super().__init__(base, rank, alpha)
        U, sizes, Vh = torch.linalg.svd(W, full_matrices=False)
        root = (sizes[:rank] / self.scale).sqrt()
        self.A, self.B = map(
            checks.parameter, (root[:, None] * Vh[:rank], U[:, :rank] * root)
        )
        self.start = LowRankUpdate(self.A, -self.B, alpha)
        freeze_all(self.start)
        self.base = bases.merge("base", base, self.start)

    def plain(self, name):
        """s B A minus what it was at the start: a `LowRankUpdate` of rank 2 r."""
        A, B = torch.cat([self.A, self.start.A]), torch.cat([self.B, self.start.B], 1)
        return LowRankUpdate(A, B, 2 * self.alpha)


class DoRALinear(LoRALinear):
    """m V / ‖V‖ with V = W + s B A: size and direction apart (Liu et al. 2024).

    arXiv:2402.09353; the norm is that of each row of V, (d_out,), m starts as W's, and
    no gradient goes through the norm (section 4.3), as in PEFT. Each forward computes
    V: a d_out × d_in product. It merges, but is no s B A.
    """

    def __init__(self, base, rank=4, alpha=8.0):
        super().__init__(base, rank, alpha)
        W = checks.wide(bases.weight_of(base))
        self.magnitude = checks.parameter(W.norm(dim=1))
        if not checks.finite(1 / self.magnitude):
            raise ValueError("DoRA needs a direction: a row of W is zero")

    def factor(self, V):
        return self.magnitude / V.detach().norm(dim=1)

    def forward(self, x):
        V = super().add_to(checks.wide(bases.weight_of(self.base)))
        bias = 0 if self.bias is None else self.bias
        y = super().forward(x) - bias
        return (self.factor(V) * y + bias).to(y.dtype)

    def add_to(self, W):
        """m V / ‖V‖, (d_out, d_in), in the dtype of W."""
        V = super().add_to(checks.wide(W))
        return (self.factor(V)[:, None] * V).to(W.dtype)

    def plain(self, name):
        raise ValueError(f"{name}: DoRA is no s B A, merge_lora it to save its weight")


class VeRALinear(LoRALinear):
    """y + b ∘ B (d ∘ A x): vectors d (r,) and b (d_out,) train, A and B are random.

    Kopiczko et al. 2023, arXiv:2310.11454. `pair`: A and B, which all layers share,
    each taking as much of them as it is large. Saved as s B A it is as large as LoRA.
    """

    def __init__(self, base, rank, pair, start=0.1):
        super().__init__(base, rank, rank)
        A, B = pair[0][:, : self.A.shape[1]], pair[1][: len(self.B)]
        self.A, self.B = (nn.Parameter(t, requires_grad=False) for t in (A, B))
        self.d = checks.parameter(torch.full_like(A[:, 0], start))
        self.b = checks.parameter(torch.zeros_like(B[:, 0]))

    def forward(self, x):
        A, B, d, b = (t.to(x.dtype) for t in (self.A, self.B, self.d, self.b))
        return self.base(x) + b * F.linear(d * F.linear(x, A), B)

    def add_to(self, W):
        """W + (b ∘ B) (d ∘ A), (d_out, d_in), in the dtype of W."""
        update = (self.b[:, None] * self.B) @ (self.d[:, None] * self.A)
        return (checks.wide(W) + update).to(W.dtype)

    def plain(self, name):
        """The same update as a `LowRankUpdate` of rank r."""
        A, B = self.d[:, None] * self.A, self.b[:, None] * self.B
        return LowRankUpdate(A, B, self.rank)


@torch.inference_mode(False)  # what is made there could not be trained through
def inject_vera(model, targets=None, rank=256, seed=0):
    """`inject` of `VeRALinear`: one pair for all layers, PEFT's, drawn with `seed`."""
    layers = bases.choose(model, targets, wrapper=LoRALinear).values()
    shapes = [bases.weight_of(layer).shape for layer in layers]
    d_out, d_in = (max(sizes) for sizes in zip(*shapes))
    generator = torch.Generator("cpu").manual_seed(seed)
    A, B = torch.empty(rank, d_in, device="cpu"), torch.empty(d_out, rank, device="cpu")
    for factor in (A, B):
        nn.init.kaiming_uniform_(factor, generator=generator)
    pair = [factor.to(bases.weight_of(next(iter(layers)))) for factor in (A, B)]
    return inject(model, lambda layer, r, _: VeRALinear(layer, r, pair), targets, rank)
