"""How long one layer takes against PEFT's: medians of interleaved runs, as ratios."""

import copy
import time
from statistics import median

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from lora import LoRALinear

for d, rows, runs in ((128, 1000, 500), (1024, 512, 40), (4096, 256, 25)):
    base = nn.Linear(d, d).requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=16)
    ours = LoRALinear(copy.deepcopy(base), 8, 16)
    peft = PeftLinear(copy.deepcopy(base), "a", config, r=8, lora_alpha=16)
    for shape in ((rows, d), (4, rows // 4, d)):
        x, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
        times = {ours: [], peft: []}
        for _ in range(runs):
            for layer, seconds in times.items():
                start = time.perf_counter()
                layer(x).backward(gradient)
                seconds.append(time.perf_counter() - start)
                layer.zero_grad()
                x.grad = None
        ratio = median(times[ours]) / median(times[peft])
        print(f"d = {d:4}, x {shape!s:14} forward and backward: {ratio:.2f} of PEFT's")
