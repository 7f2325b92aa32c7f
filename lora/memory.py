"""What training LoRA on a Transformer keeps in memory, before it has run.

Weights, gradients and moments are counted (`lora.rank.training_bytes`). For activations
the module counts what autograd saves in a block: which tensors these are was read off
measured bytes of `transformers` models (Llama, BERT, OPT, Phi), and tried on others
(`tests/lora/test_memory.py`). Attention is taken to be fused, so that no square of the
length is kept; dropout is off.
"""

from typing import NamedTuple

from lora.rank import lora_parameters, training_bytes

# Matrices of the MLP; numbers of its width that a token keeps there in any case, and
# one more for the last matrix, where that is adapted. SwiGLU stands for Llama's kind of
# block, which also has RMS norms: they keep their input in float32.
MLP = {
    "SwiGLU": (3, 3, 1),
    "GELU": (2, 1, 1),
    "GELU in steps": (2, 4, 1),  # written out in several operations: Phi, GPT-2
    "ReLU": (2, 1, 0),
}


class Shape(NamedTuple):
    """A Transformer: its blocks, their widths, and the entries of its vocabulary."""

    blocks: int
    width: int
    kv: int  # of keys and values together over their heads, each
    mlp: int
    vocabulary: int
    kind: str = "SwiGLU"
    tables: int = 2  # 1 where the head is the embedding

    def matrices(self, part):
        """(d_in, d_out) of each matrix of a block's part, "attention" or "MLP"."""
        if part not in PARTS:
            raise ValueError(f"`on` must hold some of {PARTS}, got {part!r}")
        d, kv, m = self.width, self.kv, self.mlp
        if part == "attention":
            return [(d, d), (d, kv), (d, kv), (d, d)]
        return [(d, m)] * (MLP[self.kind][0] - 1) + [(m, d)]


PARTS = ("attention", "MLP")
SHAPES = {
    "SmolLM2-135M": Shape(30, 576, 192, 1536, 49152, tables=1),
    "7B": Shape(32, 4096, 4096, 11008, 32000),
    "8B, large vocabulary": Shape(32, 4096, 1024, 14336, 128256),
    "13B": Shape(40, 5120, 5120, 13824, 32000),
    "34B": Shape(48, 8192, 1024, 22016, 32000),
    "70B": Shape(80, 8192, 1024, 28672, 32000),
}


def saved_by_a_block(shape, tokens, rank, on=PARTS, itemsize=2, cast=False):
    """Bytes that autograd saves in one block for its backward pass.

    `on`: the parts with adapters; `itemsize`: bytes of a number of the activations;
    `cast`: each adapter keeps a float32 copy of its input, as PEFT's do on a base in
    half precision.
    """
    d, cast, copies = shape.width, cast and itemsize < 4, 0  # of A and B, in half
    _, always, own = MLP[shape.kind]
    norm = 4 if shape.kind == "SwiGLU" else itemsize
    kept = itemsize * (2 * d + 2 * shape.kv + always * shape.mlp) + 2 * norm * d
    for part in on:
        shapes = shape.matrices(part)
        if cast:
            kept += 4 * sum(d_in + rank for d_in, _ in shapes)
        else:
            inner = own * shape.mlp if part == "MLP" else 0
            kept += itemsize * (d + inner + rank * len(shapes))
            copies += itemsize * sum(lora_parameters(*s, rank) for s in shapes)
    return tokens * kept + (copies if itemsize < 4 else 0)


def training_memory(
    shape, tokens, rank=16, on=PARTS, bits=16, itemsize=2, checkpoint=True, cast=False
):
    """Bytes of a training step by item, a dict; their sum is an upper bound.

    `tokens` are those of a batch, padding included; `bits` those of a weight of the
    base's blocks, scales included (NF4: 4.127). Embedding and head have `itemsize`,
    adapters ("weights") and AdamW's moments float32. With `checkpoint` each block keeps
    its input, and one block at a time is computed again. "logits" are the float32
    log-probabilities and their gradient.
    """
    linear = shape.blocks * sum(a * b for p in PARTS for a, b in shape.matrices(p))
    adapters = sum(
        lora_parameters(*s, rank) for part in on for s in shape.matrices(part)
    )
    tables = shape.tables * shape.vocabulary * shape.width * itemsize
    block = saved_by_a_block(shape, tokens, rank, on, itemsize, cast)
    inputs = shape.blocks * tokens * shape.width * itemsize
    return {
        "base": training_bytes(0, linear, frozen_bytes=bits / 8)["weights"] + tables,
        **training_bytes(shape.blocks * adapters),
        "activations": inputs + block if checkpoint else shape.blocks * block,
        "logits": 2 * 4 * tokens * shape.vocabulary,
    }
