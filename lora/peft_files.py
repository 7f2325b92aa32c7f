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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lora import checks
from lora.bases import dense_weight

CONFIG, WEIGHTS, HEAD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "head.safetensors",
)
PREFIX = "base_model.model."  # of PEFT's names
LARGEST_CONFIG = 10**6  # bytes; PEFT's with a rank for each of 1,000 layers has 100,000
# Settings that say nothing about the function: where the adapter is from, how it was
# made, parts of others that are switched off.
SAID = ("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core")
SAID += ("peft_version", "qalora_group_size", "revision", "task_type", "lora_dropout")
READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
READ += ("target_modules", "exclude_modules")
# All others must be off (false, null, empty), or as they are here.
PLAIN = {"peft_type": ["LORA"], "bias": ["none"]}
PLAIN["init_lora_weights"] = [True, False, "gaussian", "orthogonal"]


def write_adapter(folder, adapters, head=None):
    """Write the adapters, layer's name -> Adapter, and a module `head` into `folder`.

    Raises ValueError, before anything is written, if a number is not finite, if
    `folder` is a file, or if it holds the head of an earlier saving and none is given.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a folder, {folder} is a file")
    tensors = {}
    for place, adapter in adapters.items():
        for key, value in (("A", adapter.A), ("B", adapter.B)):
            tensors[f"{PREFIX}{place}.lora_{key}.weight"] = value
    parts = {WEIGHTS: tensors}
    if head is not None:
        parts[HEAD] = check_head(head).state_dict()
    elif (folder / HEAD).exists():
        message = f"{folder} holds the head of an earlier saving"
        raise ValueError(f"{message}: give head=, or choose another folder")
    config = json.dumps(peft_config(adapters), indent=2).encode()
    # The same in all files of one saving.
    mark = {"format": "pt", "config": hashlib.sha256(config).hexdigest()}
    new = {CONFIG: config}
    for name, part in parts.items():
        for key, value in part.items():
            check_values(f"cannot save {key}", value)
        plain = {k: v.detach().cpu().contiguous().clone() for k, v in part.items()}
        new[name] = save(plain, mark)
    folder.mkdir(parents=True, exist_ok=True)
    put_in_place(folder, new)


def put_in_place(folder, new):
    """Write files, name -> bytes, beside the old ones first, then replace these."""
    for name, data in new.items():
        (folder / f"{name}.new").write_bytes(data)
    for name in new:
        (folder / f"{name}.new").replace(folder / name)


def peft_config(adapters):
    """The settings of adapters, layer's name -> Adapter, as PEFT reads them."""
    names = {name: f"^{re.escape(name)}" for name in adapters}
    first = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": int(first.rank),
        "lora_alpha": float(first.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": "|".join(re.escape(name) for name in adapters),
        "rank_pattern": {names[n]: int(a.rank) for n, a in adapters.items()},
        "alpha_pattern": {names[n]: float(a.alpha) for n, a in adapters.items()},
    }


def read_adapter(folder, bases, head=None):
    """What `folder` holds, checked: layer's name -> (A, B, alpha), and a head's state.

    `bases` are the model's layers that may have adapters, name -> base. Raises
    ValueError or TypeError if anything does not fit; nothing is changed.
    """
    config, mark = read_config(folder)
    wanted = {n: b for n, b in bases.items() if is_target(config, n)}
    if not wanted:
        message = f"{folder / CONFIG}: target_modules={config['target_modules']!r}"
        raise ValueError(f"{message} names none of {checks.listed(bases)}")
    shapes, settings = {}, {}
    for name, base in wanted.items():
        rank, alpha = own_settings(config, name)
        settings[name] = alpha
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (rank, base.in_features)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (base.out_features, rank)
    tensors = read_tensors(folder / WEIGHTS, shapes, mark)
    saved_head = read_head(folder / HEAD, head, mark)
    found = {}
    for name, alpha in settings.items():
        W, kinds = dense_weight(wanted[name]), ("A", "B")
        keys = [f"{PREFIX}{name}.lora_{kind}.weight" for kind in kinds]
        dtype = torch.promote_types(W.dtype, torch.float32)
        A, B = (tensors[key].to(W.device, dtype) for key in keys)
        for key, value in zip(keys, (A, B)):
            check_values(f"{folder / WEIGHTS}: {key}", value)
        found[name] = A, B, alpha
    return found, saved_head


def read_config(folder):
    """The settings in `folder`, those of plain LoRA, and the SHA-256 of their file."""
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} holds no {CONFIG}")
    if file.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{file} has over {LARGEST_CONFIG:,} bytes")
    data = file.read_bytes()
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{file} is no JSON: {fault}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a dictionary, got {config!r:.80}")
    missing = [key for key in ("peft_type", "r", "target_modules") if key not in config]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    for key, value in config.items():
        fits = value in PLAIN[key] if key in PLAIN else not value
        if key not in (*SAID, *READ) and not fits:
            wanted = PLAIN.get(key, "off")
            message = f"{key} must be {wanted} for plain LoRA, got {value!r:.80}"
            raise ValueError(f"{file}: {message}")
    checks.check_settings(config["r"], config.setdefault("lora_alpha", 8))
    if config.get("lora_dropout"):
        note = f"lora_dropout={config['lora_dropout']!r} acts in training only: ignored"
        warnings.warn(note, stacklevel=4)
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.setdefault(key, {}) or {}, dict):
            raise ValueError(f"{file}: {key} must be a dictionary")
    return config, hashlib.sha256(data).hexdigest()


def is_target(config, name):
    """Whether the settings name this layer, as PEFT understands them."""
    return is_named("target_modules", config["target_modules"], name) and not is_named(
        "exclude_modules", config.get("exclude_modules") or [], name
    )


def is_named(key, value, name):
    """PEFT's rule: an expression for the whole name, or a list of names' ends."""
    if isinstance(value, str):
        if value == "all-linear":
            raise ValueError(f"{CONFIG}: {key}='all-linear' does not name the layers")
        return checks.compiled(key, value).fullmatch(name) is not None
    if not isinstance(value, list) or not all(isinstance(end, str) for end in value):
        raise ValueError(f"{CONFIG}: {key} must be a text or a list of texts")
    return any(f".{name}".endswith(f".{end}") for end in value)


def own_settings(config, name):
    """(rank, alpha / scale · rank) of one layer; PEFT's rule for the two patterns."""
    found = {"rank_pattern": config["r"], "alpha_pattern": config["lora_alpha"]}
    for key in found:
        for expression, value in (config[key] or {}).items():
            if checks.compiled(key, rf"(.*\.)?({expression})$").match(name):
                found[key] = value
                break
    rank, alpha = found.values()
    checks.check_settings(rank, alpha)
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def read_tensors(file, shapes, mark):
    """The tensors of a file, name -> tensor, if they are those of `shapes`, no other.

    Names, shapes and dtypes are read from its head, before any number.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no {file.name}")
    try:
        with safe_open(file, "pt") as stored:
            check_mark(file, (stored.metadata() or {}).get("config"), mark)
            check_keys(file, stored.keys(), shapes)
            for key, shape in shapes.items():
                part = stored.get_slice(key)
                got = tuple(part.get_shape())
                check_tensor(f"{file}: {key}", got, part.get_dtype(), shape)
            return {key: stored.get_tensor(key) for key in shapes}
    except (SafetensorError, OSError) as fault:
        raise ValueError(f"{file} is no whole safetensors file: {fault}") from None


def read_head(file, head, mark):
    """The state for a module `head`, checked against it; None without one.

    Raises ValueError if there is a head in the folder and none is given, or none in
    the folder and one is given: without it the answers would be wrong.
    """
    if head is None:
        if file.exists():
            raise ValueError(f"{file.parent} holds a head: give a module, head=")
        return None
    own = check_head(head).state_dict()
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    state = read_tensors(file, shapes, mark)
    for key, value in state.items():
        check_values(f"{file}: {key}", value.to(own[key].dtype))
    return state


def check_head(head):
    """`head`, or TypeError unless it is a module with floating-point numbers only."""
    if not isinstance(head, nn.Module):
        raise TypeError(f"head must be a module, got {head!r:.80}")
    for name, value in head.state_dict().items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise TypeError(f"head must hold floating-point tensors, not {name}")
    return head


def check_values(name, tensor):
    """Raise ValueError if a number is not finite, or there is none."""
    if not checks.has_numbers(tensor):
        raise ValueError(f"{name}: a tensor without numbers, meta or fake")
    if not checks.finite(tensor):
        raise ValueError(f"{name}: numbers that are not finite")


def check_mark(file, found, expected):
    """Raise ValueError if a file is of another saving than the settings beside it."""
    if found not in (None, expected):
        raise ValueError(f"{file} and the settings beside it are of two savings")


def check_keys(file, found, expected):
    """Raise ValueError unless a file holds the tensors that are expected."""
    found, expected = set(found), set(expected)
    if missing := sorted(expected - found):
        raise ValueError(f"{file} lacks {checks.listed(missing)}")
    if foreign := sorted(found - expected):
        raise ValueError(f"{file}: no place in the model for {checks.listed(foreign)}")


def check_tensor(name, shape, dtype, expected):
    """Raise ValueError unless a stored tensor has this shape and is of floats."""
    if shape != expected:
        raise ValueError(f"{name} must be {expected}, got {shape}")
    if dtype not in ("F16", "BF16", "F32", "F64"):
        raise ValueError(f"{name} must be floating-point of 16 to 64 bits, got {dtype}")
