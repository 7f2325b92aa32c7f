"""A frozen base in four bits: NF4, blocks, double quantization, a linear layer.

Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3; the bytes are those of
bitsandbytes. Chapter 6 of the book builds this file.
"""

import torch
from torch import nn
from torch.nn import functional as F

from lora import bases, checks
from lora.core import freeze_all
from lora.formats import DYNAMIC, NF4, flat_numbers, scaled_back, to_codes


def quantize(weight, block=64):
    """Four bits for each number of `weight`: codes and scales (QLoRA, section 3).

    The n numbers are taken row by row. Returns codes, uint8 (⌈n / 2⌉,), two a byte, the
    first in the upper half; and scales, float32 (⌈n / block⌉,), the largest absolute
    value of each block. Raises ValueError for an infinity or a NaN.
    """
    codes, scales = to_codes(flat_numbers(weight), NF4, block)
    codes = F.pad(codes, (0, len(codes) % 2), value=7).view(-1, 2)  # 7: zero
    return codes[:, 0] * 16 + codes[:, 1], scales


def dequantize(codes, scales, shape, block=64):
    """The weight that `quantize` stored, of the given `shape`, in float32."""
    n = torch.Size(shape).numel()
    codes = codes.view((n + 1) // 2)  # refuses those of another shape
    pairs = torch.cartesian_prod(NF4, NF4).to(codes.device)  # byte -> its two levels
    values = F.embedding(codes.int(), pairs).flatten()[:n]
    return scaled_back(values, scales, block).view(shape)


def double_quantize(scales, block=256):
    """Eight bits for each scale of `quantize`: three tensors (QLoRA, section 3).

    Their mean is subtracted. For n scales returns codes, uint8 (n,); scales of their
    own, float32 (⌈n / block⌉,); and the mean, float32 ().
    """
    mean = scales.mean()
    codes, wide = to_codes(flat_numbers(scales - mean), DYNAMIC, block)
    return codes, wide, mean


def double_dequantize(codes, scales, mean, block=256):
    """The scales (n,) that `double_quantize` stored, in float32."""
    values = DYNAMIC.to(codes.device)[codes.int()]
    return scaled_back(values, scales, block) + mean


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b for a stored W, which is dequantized anew in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, bias, dense, codes, scales, wide, mean):  # torch.compile: no *stored
        return F.linear(x, dense(codes, scales, wide, mean), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dense = inputs[2]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx, g):
        x_needs, bias_needs, *rest = ctx.needs_input_grad
        x_grad = g @ ctx.dense(*ctx.saved_tensors).to(g.dtype) if x_needs else None
        bias_grad = g.reshape(-1, g.shape[-1]).sum(0) if bias_needs else None
        return x_grad, bias_grad, *[None for _ in rest]


class NF4Linear(checks.Described):
    """A frozen linear layer whose weight is stored in four bits (QLoRA, section 3).

    Maps x (..., in_features) to x Wᵀ + b, (..., out_features). All of `stored` is
    bytes, the float32 scales too, so that `.half()` and `.to()` leave it as it is: they
    set the dtype of W, b and x, as in `nn.Linear`.
    """

    settings = "in_features", "out_features", "block", "is_double"

    @torch.inference_mode(False)  # what is made there could not be trained through
    def __init__(self, weight, bias=None, block=64, double=True):
        super().__init__()
        codes, scales = quantize(weight, block)
        parts = [codes, *(double_quantize(scales) if double else [scales])]
        self.out_features, self.in_features = weight.shape
        self.block, self.is_double = block, double
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for name, part in zip(("codes", "scales", "scales_of_scales", "mean"), parts):
            self.register_buffer(name, part.flatten().view(torch.uint8))
        self.register_buffer("like", weight.new_empty(0), persistent=False)
        freeze_all(self)

    @classmethod
    def from_linear(cls, linear, block=64, double=True):
        """The quantized copy of a linear layer, which stays as it is.

        `block` numbers share a scale; with `double` the scales are quantized, too.
        """
        weight = bases.check_base("linear", linear)
        return cls(weight, linear.bias, block, double).train(linear.training)

    def stored(self):
        """What W is made of: codes and scales, or codes and the three of `double`."""
        names = ("codes", "scales", "scales_of_scales", "mean")
        return [getattr(self, n) for n in names[: 4 if self.is_double else 2]]

    def dense(self, codes, scales, wide=None, mean=None):
        """W, (out_features, in_features), of the bytes that `stored` returns."""
        if wide is not None:
            wide, mean = (part.view(torch.float32) for part in (wide, mean))
            scales = double_dequantize(scales, wide, mean)
        shape = self.out_features, self.in_features
        weight = dequantize(codes, scales.view(torch.float32), shape, self.block)
        return weight.to(self.like.dtype)

    def dense_weight(self):
        """W, (out_features, in_features), a new tensor: this makes the layer a base."""
        return self.dense(*self.stored())

    @property
    def weight(self):
        """W, (out_features, in_features), dequantized if its numbers are used."""
        like = self.like.new_empty(1).expand(self.out_features, self.in_features)
        return bases.LazyWeight(like, self.dense_weight)

    def forward(self, x):
        stored = [*self.stored(), None, None][:4]
        return FrozenProduct.apply(x, self.bias, self.dense, *stored)

    def extra_repr(self):
        return f"{super().extra_repr()}, bias={self.bias is not None}"


def quantize_model(model, targets=None):
    """Store the linear layers inside `model` in four bits, in place; return the new.

    Which of them: see `lora.bases.choose`. A quantized layer is left alone. If this
    raises, as for a weight that is not finite, nothing has changed.
    """
    if any(hasattr(m, "kept") and hasattr(m, "adapters") for m in model.modules()):
        raise ValueError("an adapter is merged: unmerge_adapter first")
    new, chosen = {}, bases.choose(model, targets, kind=(nn.Linear, NF4Linear))
    for name, layer in chosen.items():
        if layer not in new and not isinstance(layer, NF4Linear):
            try:
                new[layer] = NF4Linear.from_linear(layer)
            except ValueError as fault:
                raise ValueError(f"{name}: {fault}") from None
    for name, layer in chosen.items():
        model.set_submodule(name, new.get(layer, layer))
    return list(new.values())
