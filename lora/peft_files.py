"""Adapters in files: PEFT's format, written in one go, checked before it is used.

`adapter_config.json` holds the settings, `adapter_model.safetensors` A and B of each
layer (PEFT 0.19, `LoraConfig`; Mangrulkar et al. 2022). Nothing is unpickled, and what
is not plain LoRA on linear layers is refused by its name. Chapter 5 of the book builds
this file.
"""

import hashlib
import json
import math
import re
import warnings

import torch
from safetensors import safe_open
from safetensors.torch import save

from lora import checks
from lora.bases import dense_weight, listed

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD = "head.safetensors"
# Settings that say nothing about the function: where the adapter is from, how it was
# made, parts of others that are switched off.
SAID = ["auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout"]
SAID += ["megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"]
# Those that this file honours.
READ = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"]
READ += ["target_modules", "exclude_modules"]
# Those that may be one of these. All others must be off: false, null or empty.
PLAIN = {"peft_type": ["LORA"], "bias": ["none"]}
PLAIN["init_lora_weights"] = [True, False, "gaussian", "orthogonal"]


def tensor_name(layer, kind):
    """PEFT's name for A or B of a layer."""
    return f"base_model.model.{layer}.lora_{kind}.weight"


def write_adapter(folder, adapters, head=None):
    """Write the adapters, layer's name -> Adapter, and a module `head` into `folder`.

    Raises ValueError, before anything is written, if a number is not finite, or if
    there is the head of an earlier saving and none is given.
    """
    weights = {
        tensor_name(layer, kind): getattr(adapter, kind)
        for layer, adapter in adapters.items()
        for kind in ("A", "B")
    }
    parts = {WEIGHTS: weights}
    if head is not None:
        parts[HEAD] = head.state_dict()
    elif (folder / HEAD).exists():
        message = f"{folder} holds the head of an earlier saving"
        raise ValueError(f"{message}: give head=, or choose another folder")
    config = json.dumps(peft_config(adapters), indent=2).encode()
    # The same in all files of one saving.
    mark = {"format": "pt", "config": hashlib.sha256(config).hexdigest()}
    new = {CONFIG: config}
    for file, part in parts.items():
        sound = {n: finite(f"cannot save {n}", value) for n, value in part.items()}
        plain = {n: v.detach().cpu().contiguous().clone() for n, v in sound.items()}
        new[file] = save(plain, mark)
    folder.mkdir(parents=True, exist_ok=True)
    put_in_place(folder, new)


def finite(name, tensor):
    """The tensor, or ValueError unless it is here, whole, and all finite."""
    if tensor.is_meta or type(tensor.detach()) is not torch.Tensor:  # sharded or fake
        kind = type(tensor.detach()).__name__
        raise ValueError(f"{name}: {kind} on {tensor.device}, not a tensor of numbers")
    if not checks.finite(tensor):
        raise ValueError(f"{name}: numbers that are not finite")
    return tensor


def put_in_place(folder, new):
    """Write files, name -> bytes, beside the old ones first, then replace these."""
    for name, data in new.items():
        (folder / f"{name}.new").write_bytes(data)
    for name in new:
        (folder / f"{name}.new").replace(folder / name)


def peft_config(adapters):
    """The settings of adapters, layer's name -> Adapter, as PEFT reads them."""
    whole = {name: f"^{re.escape(name)}" for name in adapters}
    first = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "r": int(first.rank),
        "lora_alpha": float(first.alpha),
        "bias": "none",
        "use_rslora": False,
        "target_modules": "|".join(re.escape(name) for name in adapters),
        "rank_pattern": {whole[n]: int(a.rank) for n, a in adapters.items()},
        "alpha_pattern": {whole[n]: float(a.alpha) for n, a in adapters.items()},
    }


def read_adapter(folder, bases, head=None):
    """What `folder` holds, checked: layer's name -> (A, B, alpha), and a head's state.

    `bases` are the model's layers that may have adapters, name -> base. Raises an error
    if anything does not fit; nothing is changed.
    """
    config, mark = read_config(folder)
    alphas, like = {}, {}
    for name, base in bases.items():
        if is_target(config, name):
            rank, alphas[name] = own_settings(config, name)
            W = dense_weight(base)
            one = W.new_empty(1, dtype=torch.promote_types(W.dtype, torch.float32))
            like[tensor_name(name, "A")] = one.expand(rank, base.in_features)
            like[tensor_name(name, "B")] = one.expand(base.out_features, rank)
    if not alphas:
        message = f"{folder / CONFIG}: target_modules={config['target_modules']!r}"
        raise ValueError(f"{message} names none of {listed(bases)}")
    tensors = read_tensors(folder / WEIGHTS, like, mark)
    found = {
        name: (tensors[tensor_name(name, "A")], tensors[tensor_name(name, "B")], alpha)
        for name, alpha in alphas.items()
    }
    return found, read_head(folder / HEAD, head, mark)


def read_config(folder):
    """The settings in `folder`, those of plain LoRA, and the SHA-256 of their file."""
    data = (folder / CONFIG).read_bytes()
    config = {"peft_type": None, "lora_alpha": 8} | json.loads(data)
    for key, value in config.items():
        is_plain = value in PLAIN[key] if key in PLAIN else not value
        if not is_plain and key not in SAID + READ:
            message = f"{key} must be {PLAIN.get(key, 'off')} for plain LoRA"
            raise ValueError(f"{folder / CONFIG}: {message}, got {value!r:.80}")
    if config.get("lora_dropout"):
        note = f"lora_dropout={config['lora_dropout']!r} acts in training only: ignored"
        warnings.warn(note, stacklevel=4)
    return config, hashlib.sha256(data).hexdigest()


def is_target(config, name):
    """Whether the settings name this layer, as PEFT understands them."""
    excluded = config.get("exclude_modules") or []
    return is_named(config["target_modules"], name) and not is_named(excluded, name)


def is_named(value, name):
    """PEFT's rule: an expression for the whole name, or a list of names' ends."""
    if isinstance(value, str):
        return re.fullmatch(value, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in value)


def own_settings(config, name):
    """(rank, alpha / scale · rank) of one layer."""
    rank = first_match(config.get("rank_pattern"), name, config["r"])
    alpha = first_match(config.get("alpha_pattern"), name, config["lora_alpha"])
    checks.check_settings(rank, alpha)
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def first_match(patterns, name, default):
    """PEFT's rule: the first expression that matches the end of the layer's name."""
    for expression, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({expression})$", name):
            return value
    return default


def read_tensors(file, like, mark):
    """The tensors of a file, name -> tensor, if they fit those of `like`, no other.

    Each is given the dtype and device of the one in `like`.
    """
    with safe_open(file, "pt") as stored:
        if (stored.metadata() or {}).get("config", mark) != mark:
            raise ValueError(f"{file} and {CONFIG} are of two savings")
        found, wanted = set(stored.keys()), set(like)
        if found != wanted:
            here, there = (sorted(s) for s in (found - wanted, wanted - found))
            message = f"{file} does not fit: it alone has {listed(here)}"
            raise ValueError(f"{message}, the model alone has {listed(there)}")
        tensors = {name: stored.get_tensor(name) for name in like}
    for name, own in like.items():
        shape = tuple(tensors[name].shape)
        if shape != own.shape:
            raise ValueError(f"{file}: {name} must be {(*own.shape,)}, got {shape}")
        tensors[name] = finite(f"{file}: {name}", tensors[name].to(own))
    return tensors


def read_head(file, head, mark):
    """The state for a module `head`, checked against it; None without one.

    Raises ValueError if there is a head and no module for it: without it the answers
    would be wrong.
    """
    if head is not None:
        return read_tensors(file, head.state_dict(), mark)
    if file.exists():
        raise ValueError(f"{file.parent} holds a head: give a module, head=")
