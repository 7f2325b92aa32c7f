"""The package that the book *Deconstructing LoRA* builds, one module a chapter."""

from lora.core import (
    LoRALinear,
    count_total,
    count_trainable,
    freeze_all,
    inject_lora,
    merge_lora,
)

__all__ = [
    "LoRALinear",
    "count_total",
    "count_trainable",
    "freeze_all",
    "inject_lora",
    "merge_lora",
]
