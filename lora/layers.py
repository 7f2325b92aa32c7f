"""Other layers than `nn.Linear`: convolutions, lookups, fused rows, new tokens.

A convolution is a linear layer of patches, a lookup one of unit vectors, GPT-2's
`Conv1D` one whose weight lies the other way round: each has a W, (d_out, d_in), and the
update is s B A as ever. `lora.bases.register` is told where W is. Files are PEFT's
(0.19, `LoraConfig`, `TrainableTokensConfig`). Chapter 8 of the book builds this file.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lora import bases, checks, peft_files
from lora.adapters import Adapters
from lora.core import (
    LoRALinear,
    LowRankUpdate,
    count_total,
    count_trainable,
    freeze_all,
)


class LoRAConv2d(LoRALinear):
    """y + s B ∗ (A ∗ x): A is a convolution with the base's kernel, B is one of 1 × 1.

    Beside an `nn.Conv2d` without groups, whose W, (d_out, channels · height · width),
    is `weight.flatten(1)`. A (r, channels · height · width) and B (d_out, r) are kept
    as matrices, so that W + s B A is merged as ever. ValueError for groups.
    """

    @staticmethod
    def check(name, base):
        if base.groups > 1:
            message = f"must be a Conv2d without groups, got {base.groups}"
            raise ValueError(f"{name} {message}")

    def forward(self, x):
        A = self.A.view(self.rank, *self.base.weight.shape[1:]).to(x.dtype)
        thin = self.base._conv_forward(x, A, None)  # stride and padding are the base's
        return self.base(x) + self.scale * F.conv2d(
            thin, self.B[..., None, None].to(x.dtype)
        )

    @staticmethod
    def layout(base, rank):
        """Name in PEFT's files -> shape there, of A and of B."""
        shapes = (rank, *base.weight.shape[1:]), (base.out_channels, rank, 1, 1)
        return dict(zip(("lora_A.weight", "lora_B.weight"), shapes))


class LoRAEmbedding(LoRALinear):
    """A lookup, and beside it one in Aᵀ that B widens: rows of W and of s B A.

    Beside an `nn.Embedding` of n rows, whose W, (width, n), is `weight.T`: a linear
    layer of unit vectors. A is (r, n), B is (width, r). PEFT starts it with A = 0 and B
    random, here it is the other way round, as in all layers. The row of padding stays.
    ValueError if the base renormalizes its rows (`max_norm`).
    """

    @staticmethod
    def check(name, base):
        if base.max_norm is not None:
            raise ValueError(f"{name} must be an Embedding without max_norm")

    def reset_parameters(self):
        super().reset_parameters()
        if self.base.padding_idx is not None:
            self.A.data[:, self.base.padding_idx] = 0

    def forward(self, x):
        y, base = self.base(x), self.base
        scaled = {"scale_grad_by_freq": base.scale_grad_by_freq}
        thin = F.embedding(x, self.A.T, base.padding_idx, **scaled)
        return y + self.scale * F.linear(thin, self.B).to(y.dtype)

    @staticmethod
    def layout(base, rank):
        """Name in PEFT's files -> shape there, of A and of B."""
        shapes = (rank, base.num_embeddings), (base.embedding_dim, rank)
        return dict(zip(("lora_embedding_A", "lora_embedding_B"), shapes))


# --- Some rows of a fused weight ---


class Spread(nn.Module):
    """Some rows of a matrix -> the matrix, with zeros in its other rows."""

    def __init__(self, rows, n):
        super().__init__()
        self.n = n
        self.register_buffer("rows", rows)

    def forward(self, some):
        return some.new_zeros(self.n, some.shape[1]).index_copy(0, self.rows, some)

    def right_inverse(self, whole):
        return whole[self.rows]


@torch.inference_mode(False)  # what is made there could not be trained through
def adapt_rows(wrapper, rows):
    """Let a `LoRALinear` change only these rows of its W, in place: of B no others are.

    For a fused layer, such as one of query, key and value in one. `rows`: different
    indices of outputs, a tensor or a range. TypeError for a variant whose update is no
    s B A, ValueError if B has numbers in other rows already.
    """
    if type(wrapper).add_to is not LowRankUpdate.add_to:
        raise TypeError(f"{type(wrapper).__name__} changes other rows of W, too")
    n, asked = len(wrapper.B), torch.as_tensor(rows).tolist()
    known = len({i for i in asked if type(i) is int and 0 <= i < n})
    if not asked or known < len(asked):
        raise ValueError(f"rows must be different indices below {n}, got {asked}")
    rows = torch.tensor(asked, device=wrapper.B.device)
    if wrapper.B.detach().index_fill(0, rows, 0).any():
        raise ValueError("B has numbers in other rows, which would be lost")
    spread = Spread(rows, len(wrapper.B))
    parametrize.register_parametrization(wrapper, "B", spread)


# --- New tokens ---


class TokenRows(nn.Module):
    """A frozen lookup, or the head that is tied to it, of which some rows train.

    `rows` (k, width) stand in place of the rows `ids` (k,) of the weight (n, width).
    """

    def __init__(self, base, ids, rows):
        super().__init__()
        self.base, self.rows = base, rows
        self.register_buffer("ids", ids)

    def forward(self, x):
        y = self.base(x)
        if isinstance(self.base, nn.Linear):
            bias = None if self.base.bias is None else self.base.bias[self.ids]
            return y.index_copy(-1, self.ids, F.linear(x, self.rows.to(x.dtype), bias))
        hit = x.unsqueeze(-1) == self.ids
        own = hit.to(self.rows.dtype) @ self.rows
        return torch.where(hit.any(-1, keepdim=True), own.to(y.dtype), y)

    @property
    def weight(self):
        """The weight, (n, width), with its new rows."""
        W = self.base.weight
        return W.index_copy(0, self.ids, self.rows.to(W.dtype))


@torch.inference_mode(False)  # what is made there could not be trained through
def train_tokens(model, name, ids):
    """Train the rows `ids` of the lookup `name` and of a head tied to it, in place.

    Nothing else of them trains. Returns the shared rows, an `nn.Parameter` (k, width).
    Raises ValueError for ids that recur or are not there, and where something else uses
    the weight: rows that train already, a hook, a module of another kind.
    """
    bases.check_not_parallel(model)
    base = model.get_submodule(name)
    if type(base) is not nn.Embedding or base.max_norm is not None:
        raise TypeError(f"{name} must be an Embedding without max_norm, got {base}")
    W, ids = base.weight, [int(i) for i in ids]
    if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(range(len(W))):
        raise ValueError(f"ids must differ and be below {len(W)}, got {ids}")
    if any(base is rows.base for rows in bases.find(model, TokenRows).values()):
        raise ValueError(f"rows of {name} train already: merge_tokens first")
    index = torch.tensor(ids, device=W.device)
    rows = checks.parameter(W[index])
    every = model.named_modules(remove_duplicate=False)
    tied = {n: m for n, m in every if getattr(m, "weight", None) is W}
    for place, m in tied.items():
        if type(m) not in (nn.Embedding, nn.Linear):
            raise TypeError(
                f"{type(m).__name__} is tied to {name}: it can't be changed"
            )
        if hooks := bases.hooks_of(m):
            message = f"has a {hooks[0]} hook, which would not see the new rows"
            raise ValueError(f"{place} {message}")
    if bases.uses(model)[W] > len(set(tied.values())):
        message = "and would keep the old rows"
        raise ValueError(f"another module uses the weight of {name}, {message}")
    for place, m in tied.items():
        freeze_all(m)
        model.set_submodule(place, TokenRows(m, index, rows))
    return rows


@torch.no_grad()
def merge_tokens(model):
    """Write the new rows into the weights, in place; return the model, plain again."""
    places = bases.find(model, TokenRows)
    for place, layer in places.items():
        if type(layer.base) not in (nn.Embedding, nn.Linear):
            kind = type(layer.base).__name__
            raise ValueError(f"{place} holds a {kind}: merge_lora first")
    for place, layer in places.items():
        layer.base.weight[layer.ids] = layer.rows.to(layer.base.weight.dtype)
        model.set_submodule(place, layer.base)
    return model


# --- What is left, and files ---


def left_out(model):
    """What is adapted, what is frozen, what trains whole, in numbers: a line of text.

    A parameter of three dimensions, such as the experts' of a layer, counts as that
    many matrices.
    """
    wrappers = bases.find(model, (LoRALinear, TokenRows, Adapters)).values()
    adapted = {wrapper.base for wrapper in wrappers}
    inside = {m for wrapper in wrappers for m in wrapper.modules()}
    modules, matrices, seen = Counter(), Counter(), set()
    for m in model.modules():
        own = {p for p in m.parameters(recurse=False) if p.ndim > 1} - seen
        if isinstance(m, bases.DenseWeight) and m not in inside:
            modules[type(m).__name__, False] += 1  # a weight in few bits
            matrices[type(m).__name__, False] += 1
        elif own and m not in inside:
            seen |= own
            kind = type(m).__name__, any(p.requires_grad for p in own)
            modules[kind] += 1
            stacked = not isinstance(m, nn.modules.conv._ConvNd)
            its = (len(p) if p.ndim == 3 and stacked else 1 for p in own)
            matrices[kind] += sum(its)
    total = len(adapted) + matrices.total()
    rest, whole = (
        ", ".join(
            f"{matrices[k]} in {n} {k[0]}" for k, n in modules.items() if k[1] == t
        )
        for t in (False, True)
    )
    text = f"adapts {len(adapted)} of {total} matrices; left: {rest or 'none'}"
    text += f"; trained whole: {whole}" * bool(whole)
    return f"{text}; {count_trainable(model):,} of {count_total(model):,} numbers train"


def save_lora(model, folder):
    """Write what `inject_lora` put into a model into `folder`, in PEFT's format.

    What cannot be written as s B A is refused by its name: a variant says so in its
    `plain`.
    """
    wrappers = bases.find(model, LoRALinear)
    if not wrappers:
        raise ValueError(f"{type(model).__name__} has no adapters: inject_lora first")
    updates = peft_files.plain_updates(wrappers)
    its = {name: wrapper.base for name, wrapper in wrappers.items()}
    peft_files.warn_of_the_rest(model, wrappers)
    peft_files.write_adapter(Path(folder), updates, its)


@torch.inference_mode(False)  # what is made there could not be trained through
def load_lora(model, folder):
    """Inject the adapter that `folder` holds, of `save_lora` or PEFT, in place.

    Returns the new wrappers. What is not plain LoRA on the layers that are known is
    refused by its name, before anything changes.
    """
    if there := bases.find(model, LoRALinear):
        raise ValueError(f"{bases.listed(there)}: wrapped already, merge_lora first")
    bases.check_not_parallel(model)
    places = bases.layers_of(model)
    factors, _ = peft_files.read_adapter(Path(folder), model, places)
    its = peft_files.by_base(folder, factors, places)
    wrappers = {}
    for base, (A, B, alpha) in its.items():
        wrappers[base] = bases.wrapper_of(base, LoRALinear)(base, len(A), alpha)
        wrappers[base].A.data, wrappers[base].B.data = A, B
    for place in factors:
        model.set_submodule(place, wrappers[places[place]])
    return [*wrappers.values()]


def save_tokens(model, folder):
    """Write the rows of `train_tokens` into `folder`, as PEFT's TRAINABLE_TOKENS."""
    places = bases.find(model, TokenRows)
    found = {m: n for n, m in places.items() if isinstance(m.base, nn.Embedding)}
    if len(found) != 1:
        have = bases.listed(found.values())
        raise ValueError(
            f"a file holds the new tokens of one lookup, there are: {have}"
        )
    ((layer, name),) = found.items()
    config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": [name]}
    config["token_indices"] = layer.ids.tolist()
    rows = peft_files.sound(name, layer.rows.detach().cpu().contiguous())
    tensors = {f"base_model.model.{name}.trainable_tokens_delta": rows}
    Path(folder).mkdir(parents=True, exist_ok=True)
    new = {peft_files.CONFIG: json.dumps(config, indent=2).encode()}
    new[peft_files.WEIGHTS] = peft_files.save(tensors, {"format": "pt"})
    peft_files.put_in_place(Path(folder), new)


@torch.inference_mode(False)  # what is made there could not be trained through
def load_tokens(model, folder):
    """`train_tokens` with the rows that `folder` holds, in place; return them.

    Raises ValueError for a file of another kind, or one that does not fit.
    """
    folder = Path(folder)
    config = json.loads((folder / peft_files.CONFIG).read_bytes())
    if config["peft_type"] != "TRAINABLE_TOKENS":
        raise ValueError(f"{folder} holds {config['peft_type']}, no TRAINABLE_TOKENS")
    places = [n for n, m in model.named_modules() if type(m) is nn.Embedding]
    file = folder / peft_files.WEIGHTS
    held = peft_files.names_in(file)  # PEFT writes the rows of a tied head once more
    named = [n for n in places if f"{n}.trainable_tokens_delta" in held]
    if len(named) != 1:
        message = f"{file} must hold rows of one of {bases.listed(places)}"
        raise ValueError(f"{message}, it holds {bases.listed(held)}")
    name, ids = named[0], config["token_indices"]
    W, own = model.get_submodule(name).weight, f"{name}.trainable_tokens_delta"
    tied = [n for n, m in model.named_modules() if getattr(m, "weight", None) is W]
    like = {own} | {f"{n}.trainable_tokens_delta" for n in tied} & held
    like = dict.fromkeys(like, W.new_empty(len(ids), W.shape[1]))
    found = peft_files.read_tensors(file, like, None, peft_files.plain_name)
    if not all(torch.equal(tensor, found[own]) for tensor in found.values()):
        raise ValueError(f"{file}: a tied head has other rows than {name}")
    rows = train_tokens(model, name, ids)
    rows.data = checks.wide(found[own])
    return rows
