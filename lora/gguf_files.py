"""llama.cpp's files: a base to train on as it is stored, an adapter to serve.

A GGUF file (version 3) is a header, names with values and a list of tensors, and then
the tensors' bytes, most of them in blocks of 32 numbers that share a scale. Nothing in
it is executed; whatever does not fit is refused before it is read. Chapter 7 of the
book builds this file.
"""

import re
import struct
from collections import namedtuple
from math import prod
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lora import adapters, bases, checks
from lora.core import LoRALinear, LowRankUpdate, freeze_all
from lora.nf4 import FrozenProduct
from lora.peft_files import plain_updates, sound, warn_of_the_rest

# Number in a file -> name of the type, numbers in a block, bytes of a block.
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", 32, 34)}
TYPES |= {2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20)}
KEPT = "Q4_0", "Q4_1"  # as they are, in memory too
BYTES = {name: size for name, _, size in TYPES.values()}
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # for struct
# A layer's name in `transformers` -> in the file.
PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
PARTS |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
PARTS |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
PARTS |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
OUTSIDE |= {"lm_head": "output"}
# What a header says of a Llama: name in the file -> in its configuration.
FIELDS = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size"}
FIELDS |= {"feed_forward_length": "intermediate_size"}
FIELDS |= {"attention.head_count": "num_attention_heads"}
FIELDS |= {"attention.head_count_kv": "num_key_value_heads"}
FIELDS |= {"context_length": "max_position_embeddings"}
HEAD = "rope.dimension_count", "attention.key_length", "attention.value_length"
# Of the settings of an adapter, those that this file honours, or that say nothing.
KIND = {"general.type": "adapter", "general.architecture": "llama"}
KIND |= {"adapter.type": "lora"}
SAID = {"adapter.type", "adapter.lora.alpha", "adapter.lora.task_name"}

Stored = namedtuple("Stored", "kind shape start length")  # where a tensor's bytes are


class Header:
    """The start of a file, read piece by piece and never past the file's end."""

    def __init__(self, file, size):
        self.file, self.size = file, size

    def take(self, n):
        if n > self.size - self.file.tell():
            raise ValueError("it is cut off, or no GGUF file")
        return self.file.read(n)

    def numbers(self, form, n=1):
        data = self.take(n * struct.calcsize(f"<{form}"))
        return struct.unpack(f"<{n}{form}", data)

    def text(self):
        return self.take(*self.numbers("Q")).decode()

    def value(self):
        (kind,) = self.numbers("I")
        kind, n = (kind, 1) if kind != 9 else (*self.numbers("I"), *self.numbers("Q"))
        if kind != 8 and kind not in SCALARS:
            raise ValueError(f"its header has a value of the unknown type {kind}")
        form = SCALARS.get(kind)
        return self.numbers(form, n) if form else [self.text() for _ in range(n)]

    def tensor(self):
        name, (n,) = self.text(), self.numbers("I")
        shape = self.numbers("Q", n)[::-1]
        return name, shape, *self.numbers("I"), *self.numbers("Q")


def read_header(path):
    """What is in a GGUF file: name -> value or list, and name -> `Stored` tensor.

    Raises ValueError for a file that is cut, whose tensors reach beyond its end, or
    that has one in a type that is none of `TYPES`.
    """
    path, tensors = Path(path), {}
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header = Header(file, size)
            if header.take(4) != b"GGUF" or header.numbers("I") != (3,):
                raise ValueError("it is no GGUF file of version 3")
            count, pairs = header.numbers("Q", 2)
            fields = {header.text(): header.value() for _ in range(pairs)}
            listed = [header.tensor() for _ in range(count)]
            start = file.tell()
        fields = {k: v[0] if len(v) == 1 else v for k, v in fields.items()}
        align = fields.get("general.alignment", 32)
        start += -start % checks.check_number("general.alignment", align, 1, Integral)
        for name, shape, kind, offset in listed:
            if kind not in TYPES:
                raise ValueError(f"{name} is in {type_name(kind)}, none of {[*BYTES]}")
            kind, block, each = TYPES[kind]
            length = prod(shape) // block * each
            there = start + offset + length <= size and name not in tensors
            if not there or not shape or shape[-1] % block:
                message = f"{name}, {shape} in {kind}, is not whole, or there twice"
                raise ValueError(message)
            tensors[name] = Stored(kind, shape, start + offset, length)
    except ValueError as fault:
        raise ValueError(f"{path}: {fault}") from None
    return fields, tensors


def type_name(kind):
    """The name of a type that `TYPES` has not, from `gguf` where it knows it."""
    from gguf import GGMLQuantizationType

    names = {member.value: member.name for member in GGMLQuantizationType}
    return names.get(kind, f"type {kind}")


def read_rows(path, stored):
    """The bytes of a tensor, (..., bytes of a row), uint8."""
    data = np.fromfile(path, np.uint8, stored.length, offset=stored.start)
    return torch.from_numpy(data).view(*stored.shape[:-1], -1)


def constants(rows, kind):
    """A block's scale, in Q4_1 and its least value, (blocks, 1 or 2), float32."""
    words = rows.reshape(-1, BYTES[kind]).view(torch.int16)
    least = words[:, : 2 if kind == "Q4_1" else 1].contiguous()
    return least.view(torch.float16).float()


def unpack(rows, kind):
    """The numbers, (..., n), float32, of rows (..., bytes) in one of `TYPES`.

    A block is a scale d in float16, in Q4_1 a least value m, and codes q: the numbers
    are d q + m, with q from 0 to 15; in Q4_0 d (q - 8); in Q8_0 d q, q signed. Of two
    codes in a byte the lower belongs to the first half of the block.
    """
    if kind in ("F32", "F16"):
        return rows.view(torch.float32 if kind == "F32" else torch.float16).float()
    d, *m = constants(rows, kind).split(1, dim=1)
    blocks = rows.reshape(-1, BYTES[kind])
    if kind == "Q8_0":
        numbers = blocks[:, 2:].view(torch.int8) * d
    else:
        # Two bytes at a time: the loop over a block's few numbers is what takes time.
        words = blocks.view(torch.int16)[:, -8:]
        codes = torch.stack([words, words >> 4], dim=1).bitwise_and_(0x0F0F)
        codes = codes.view(torch.uint8).view(-1, 32)
        (m,) = m or [-8 * d]
        numbers = codes.float().mul_(d).add_(m)
    return numbers.view(*rows.shape[:-1], -1)


class Q4Linear(checks.Described):
    """A frozen linear layer that keeps a file's own bytes, Q4_1 or Q4_0.

    Maps x (..., in_features) to x Wᵀ, (..., out_features); W is made anew for each
    call, forward and backward, and kept by none. `rows` is (out_features, bytes).
    """

    settings = "in_features", "out_features"
    bias = None

    def __init__(self, rows, kind="Q4_1"):
        super().__init__()
        self.kind, self.out_features = kind, len(rows)
        sound("a block's scale", constants(rows, kind))
        self.in_features = rows.shape[1] // BYTES[kind] * 32
        self.register_buffer("rows", rows)
        self.register_buffer("like", torch.empty(0).to(rows.device), persistent=False)

    def dense(self, rows, *none):
        return unpack(rows, self.kind).to(self.like.dtype)

    def dense_weight(self):
        """W, (out_features, in_features), a new tensor: this makes the layer a base."""
        return self.dense(self.rows)

    @property
    def weight(self):
        """W, dequantized if its numbers are used."""
        like = self.like.new_empty(1).expand(self.out_features, self.in_features)
        return bases.LazyWeight(like, self.dense_weight)

    def forward(self, x):
        return FrozenProduct.apply(x, None, self.dense, self.rows, *[None] * 3)

    def extra_repr(self):
        return f"{super().extra_repr()}, kind={self.kind}"


def file_name(place):
    """A layer's name as llama.cpp has it, or None: "blk.0.attn_q"."""
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)(.+)", place)
    part = PARTS.get(found[2]) if found else None
    return f"blk.{found[1]}.{part}" if part else OUTSIDE.get(place)


def row_order(place, config, n, inverse=False):
    """Where the n rows of a layer stand in the file, which permutes those of q and k.

    A head's two halves are interleaved there. With `inverse`, where the file's rows
    stand in the layer.
    """
    order = torch.arange(n, device="cpu")
    if not place.endswith(("q_proj", "k_proj")):
        return order
    is_q = place.endswith("q_proj")
    heads = config.num_attention_heads if is_q else config.num_key_value_heads
    return order.view((heads, 2, -1) if inverse else (heads, -1, 2)).mT.flatten()


def llama_config(fields, tensors):
    """The `transformers` configuration that a file's header describes."""
    from transformers import LlamaConfig

    if (kind := fields.get("general.architecture")) != "llama":
        raise ValueError(f"general.architecture must be 'llama', got {kind!r:.80}")
    if "token_embd.weight" not in tensors:
        raise ValueError("it has no token_embd.weight")
    own = {k[6:]: v for k, v in fields.items() if k.startswith("llama.")}
    own = {"attention.head_count_kv": own.get("attention.head_count")} | own
    known = {}
    for key, name in FIELDS.items():
        known[name] = checks.check_number(key, own.pop(key, None), 1, Integral)
    known["rope_theta"] = checks.check_number("rope", own.pop("rope.freq_base", 1e4), 1)
    eps = own.pop("attention.layer_norm_rms_epsilon", None)
    known["rms_norm_eps"] = checks.check_number("rms_epsilon", eps, 0)
    known["vocab_size"] = own["vocab_size"] = tensors["token_embd.weight"].shape[0]
    own.pop("vocab_size")
    head = known["hidden_size"] / known["num_attention_heads"]
    if other := {k: v for k, v in own.items() if k not in HEAD or v != head}:
        raise ValueError(f"no plain Llama: {other!r:.80}")
    for end in ("bos", "eos"):
        known[f"{end}_token_id"] = fields.get(f"tokenizer.ggml.{end}_token_id")
    tied = "output.weight" not in tensors
    return LlamaConfig(**known, tie_word_embeddings=tied)


@torch.inference_mode(False)  # what is made there could not be trained through
def load_llama(path, packed=True):
    """The `transformers` Llama that a GGUF file holds, frozen, in eval mode.

    On PyTorch's default device. Layers in Q4_1 or Q4_0 keep the file's bytes
    (`Q4Linear`); without `packed` they are in float32, as the rest is. Raises
    ValueError if the file is cut or its tensors are not those of its header.
    """
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields, tensors = read_header(path)
    try:
        config = llama_config(fields, tensors)
        if config.num_hidden_layers > len(tensors):
            raise ValueError("it has fewer tensors than blocks")
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        names, wanted = {}, {}
        for name, parameter in model.named_parameters():
            place = name.removesuffix(".weight")
            names[f"{file_name(place)}.weight"] = place
            wanted[f"{file_name(place)}.weight"] = tuple(parameter.shape)
        shapes = {name: stored.shape for name, stored in tensors.items()}
        if odd := sorted({name for name, _ in shapes.items() ^ wanted.items()}):
            raise ValueError(f"missing, unknown or misshapen: {bases.listed(odd)}")
        for name, place in names.items():
            kind, rows = tensors[name].kind, read_rows(path, tensors[name])
            rows = rows[row_order(place, config, len(rows))]
            if packed and kind in KEPT and place.startswith("model.layers"):
                model.set_submodule(place, Q4Linear(rows, kind))
            else:
                numbers = sound(name, unpack(rows, kind))
                model.get_submodule(place).weight = nn.Parameter(numbers)
    except (ValueError, TypeError) as fault:
        raise ValueError(f"{path}: {fault}") from None
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are in no file
    freeze_all(model)
    return model.eval().to(torch.get_default_device())


def write_gguf_adapter(model, path, name=None):
    """Write a Llama's adapter into a file that llama.cpp puts beside the base's.

    The layers' wrappers (`inject_lora`), or the adapter `name` (`add_adapter`). The
    file is replaced in one go. Raises ValueError, and writes nothing, if a layer has no
    place in llama.cpp or a number is not finite.
    """
    from gguf import GGUFWriter

    layers = bases.find(model, LoRALinear if name is None else adapters.Adapters)
    if name is not None:
        layers = {n: m.adapters[name] for n, m in layers.items() if name in m.adapters}
    if not layers:
        raise ValueError("the model has no adapter to write")
    if model.config.model_type != "llama":
        raise ValueError(f"the model must be a Llama, got {model.config.model_type}")
    wrappers = {n: model.get_submodule(n) for n in layers}
    bases.check_rows({n: wrapper.base for n, wrapper in wrappers.items()})
    layers = plain_updates(layers)
    warn_of_the_rest(model, bases.find(model, adapters.WRAPPERS))
    # One alpha for all layers: what differs goes into B. Zero would mean a scale of 1.
    alpha = next((a.scale * a.rank for a in layers.values() if a.scale), 1.0)
    new = Path(f"{path}.new")
    writer = GGUFWriter(new, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for place, update in layers.items():
        if not (name := file_name(place)):
            raise ValueError(f"{place} has no place in llama.cpp's Llama")
        A, B = (sound(place, t.detach().cpu().float()) for t in (update.A, update.B))
        B = B[row_order(place, model.config, len(B), inverse=True)]
        B *= update.scale * update.rank / alpha
        writer.add_tensor(f"{name}.weight.lora_a", A.numpy())
        writer.add_tensor(f"{name}.weight.lora_b", B.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    new.replace(path)


def read_gguf_adapter(path, model):
    """What an adapter's file holds, checked: layer's name -> (A, B, alpha).

    Raises ValueError unless it is plain LoRA whose matrices fit layers of `model`.
    """
    fields, tensors = read_header(path)
    kind = [fields.get(k) for k in KIND]
    more = {k for k in fields if k.startswith("adapter.")} - SAID
    if kind != [*KIND.values()] or more:
        raise ValueError(f"{path}: no plain LoRA of a Llama: {kind} {sorted(more)}")
    alpha = checks.check_number("alpha", fields.get("adapter.lora.alpha", 0.0))
    found = {}
    for place, base in bases.layers_of(model, wrapper=adapters.WRAPPERS).items():
        keys = [f"{file_name(place)}.weight.lora_{half}" for half in "ab"]
        pair = [tensors.pop(key) for key in keys if key in tensors]
        shapes, r = [part.shape for part in pair], pair and pair[0].shape[0]
        if pair:
            bases.check_rows({place: base})
            bases.check_base(place, base)
        if pair and shapes != [(r, base.in_features), (base.out_features, r)]:
            raise ValueError(f"{path}: {shapes} do not fit {place}")
        if pair:
            A, B = (sound(place, unpack(read_rows(path, p), p.kind)) for p in pair)
            B = B[row_order(place, model.config, len(B))]
            device = bases.dense_weight(base).device
            found[place] = A.to(device), B.to(device), alpha or float(r)
    if tensors or not found:
        raise ValueError(f"{path}: no such layers: {bases.listed(tensors)}")
    return found


def load_gguf_adapter(model, path, name):
    """Add the adapter in a file of llama.cpp's to `model`, called `name`.

    As `lora.adapters.load_adapter` does for PEFT's: nothing changes if it is refused.
    """
    adapters.known(model, "load an adapter")
    adapters.check_new_name(model, name)
    factors = read_gguf_adapter(path, model)
    adapters.check_not_injected(model)
    updates = {place: LowRankUpdate(*parts) for place, parts in factors.items()}
    adapters.attach(model, name, updates)
