"""Adapter files in PEFT's format: what may stand in them, and writing them safely.

An adapter is a folder with `adapter_model.safetensors`, the factors alone, and
`adapter_config.json`, ranks and scales. Nothing is ever unpickled, and what this
package cannot honour is refused by its name. Chapter 5 of the book uses this file.
"""

import hashlib
import json
import os
import re
import secrets
import warnings
from collections import Counter
from numbers import Integral
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lora.checks import check_number
from lora.guards import check_expression

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
HONOURED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# The names of the tensors say where they belong; the rest changes no output.
IGNORED = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping"),
    *("inference_mode", "peft_version", "megatron_core", "qalora_group_size"),
}
# These starts leave the base as it is; others, as PiSSA's, subtract from it.
STARTS = "gaussian", "orthogonal", "eva"


def by_pattern(patterns, name, default):
    """The value of the first key that matches the qualified `name`, as PEFT has it.

    Keys are regular expressions, matched against the whole name or its last parts.
    """
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def check_patterns(field, patterns):
    """Raise ValueError unless a stranger's `patterns` can be matched in a short time.

    A key holds letters, digits, `_-.^$|()[]*+` and the backslash, and of `(`, `*` and
    `+` three at most, none of them after `)`.
    """
    if not isinstance(patterns, dict) or len(patterns) > 4096:
        raise ValueError(f"{field} must map at most 4096 names, got {patterns!r:.80}")
    for key in patterns:
        strange = re.search(r"[^\w.^$|()\[\]\\*+-]|\)[*+]", key) or len(key) > 1024
        if strange or len(re.findall(r"[(*+]", key)) > 3:
            raise ValueError(f"{field} has a key too intricate to trust: {key!r:.80}")
        check_expression(field, key)


def check_config(config):
    """Raise ValueError unless all that the settings of a file ask for is plain LoRA."""
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} must hold an object, got {config!r:.80}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {config.get('peft_type')!r}")
    check_number("r", config.get("r"), 1, Integral)
    check_number("lora_alpha", config.get("lora_alpha"))
    if config.get("use_rslora") not in (None, False, True):
        raise ValueError(f"use_rslora must be a bool, got {config['use_rslora']!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        check_patterns(field, config.get(field) or {})
    for field, value in config.items():
        if field in HONOURED | IGNORED | {"peft_type"}:
            continue
        if field == "lora_dropout" and value:
            check_number(field, value, 0)
            note = f"lora_dropout={value} acts in training only; here it does not act"
            warnings.warn(note, stacklevel=4)
        elif field == "init_lora_weights" and (value is True or value in STARTS):
            continue
        elif not (value is None or value is False or value in (0, "none", {}, [])):
            raise ValueError(f"{field}={value!r:.80} is not supported, only plain LoRA")


def digest(layers):
    """A checksum of `layers`: names, scales and factors, bit for bit."""
    found = hashlib.sha256()
    for name, (A, B, alpha) in sorted(layers.items()):
        found.update(json.dumps([name, float(alpha), A.shape[0]]).encode())
        for factor in (A, B):
            found.update(factor.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def content(path, most):
    """The bytes of a regular file of at most `most` bytes, or ValueError."""
    if not path.is_file():
        raise ValueError(
            f"no file {path}: an adapter is a folder with {WEIGHTS} and {CONFIG}; "
            "pickled files, such as adapter_model.bin, are never read"
        )
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is larger than the {most} bytes that fit this model")
    return data


def read_adapter(folder, most):
    """The adapter in `folder`: (name, {layer: (A, B, alpha)}), all checked.

    A is (r, d_in), B (d_out, r), as they are stored; the update is (alpha / r) B A,
    and alpha makes up for rsLoRA's scale. `name` is what `write_adapter` stored, else
    the folder's. The weights may have `most` bytes. Raises ValueError for whatever is
    not a complete, finite adapter of plain LoRA on linear layers.
    """
    folder = Path(folder)
    data = content(folder / CONFIG, 2**20), content(folder / WEIGHTS, most)
    try:
        config = json.loads(data[0])
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{folder / CONFIG} is not JSON: {fault}") from None
    check_config(config)
    try:
        tensors = load(data[1])
        header = json.loads(data[1][8 : 8 + int.from_bytes(data[1][:8], "little")])
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as fault:
        message = f"{folder / WEIGHTS} is not in the safetensors format: {fault}"
        raise ValueError(message) from None
    layers = {}
    for name, pair in pairs(tensors).items():
        layers[name] = (*pair, check_pair(name, *pair, config))
    said = header.get("__metadata__", {})
    if "digest" in said and said["digest"] != digest(layers):
        raise ValueError(
            f"{WEIGHTS} and {CONFIG} in {folder} do not belong together, or a bit of "
            "them has changed since they were written"
        )
    return said.get("adapter", folder.resolve().name), layers


def pairs(tensors):
    """Layer -> (A, B) of the tensors of a file; ValueError if one is something else."""
    found = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if not match or tensor.ndim != 2 or not tensor.is_floating_point():
            kind = f"{tuple(tensor.shape)} in {tensor.dtype}"
            raise ValueError(f"{key!r:.200}, {kind}, is no factor of a linear layer")
        if tensor.dtype.itemsize < 2 or not tensor.isfinite().all():
            raise ValueError(f"{key} must be finite, in 16, 32 or 64 bits")
        found.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{name} has no lora_{'AB'['A' in pair]}")
    if not found:
        raise ValueError("the file holds no tensor: an adapter has at least one layer")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def check_pair(name, A, B, config):
    """Return alpha of the layer `name` if the ranks of A, B and `config` agree."""
    rank = by_pattern(config.get("rank_pattern") or {}, name, config["r"])
    alpha = by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    check_number(f"rank of {name}", rank, 1, Integral)
    alpha = check_number(f"alpha of {name}", alpha)
    if not A.shape[0] == B.shape[1] == rank:
        shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
        raise ValueError(f"{name} must have rank {rank}, got factors of shape {shapes}")
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def write_adapter(folder, name, layers):
    """Write {layer: LoRALinear} to `folder`, made if need be, in PEFT's format.

    A crash leaves the files that were there, or two that `read_adapter` tells apart.
    Raises ValueError if a factor is not finite, before anything is written.
    """
    tensors, found, settings = {}, {}, {"rank": {}, "alpha": {}}
    for layer, update in layers.items():
        for letter in "AB":
            factor = getattr(update, letter).detach().cpu().contiguous()
            if not factor.isfinite().all():
                raise ValueError(f"{letter} of {layer} must be finite, got NaN or inf")
            tensors[f"base_model.model.{layer}.lora_{letter}.weight"] = factor
            found.setdefault(layer, []).append(factor)
        found[layer].append(update.alpha)
        settings["rank"][layer], settings["alpha"][layer] = update.rank, update.alpha
    most = {k: Counter(of.values()).most_common(1)[0][0] for k, of in settings.items()}
    # PEFT matches the end of a name, too: "^" ties a key to the whole of it.
    apart = {
        kind: {f"^{re.escape(n)}": v for n, v in of.items() if v != most[kind]}
        for kind, of in settings.items()
    }
    config = {
        "peft_type": "LORA",
        "r": most["rank"],
        "lora_alpha": most["alpha"],
        "rank_pattern": apart["rank"],
        "alpha_pattern": apart["alpha"],
        "target_modules": "|".join(map(re.escape, layers)),
        **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), False),
        **dict.fromkeys(("base_model_name_or_path", "task_type", "modules_to_save")),
        **{"bias": "none", "lora_dropout": 0.0, "inference_mode": True},
    }
    metadata = {"format": "pt", "adapter": name, "digest": digest(found)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    replace({folder / WEIGHTS: save(tensors, metadata), folder / CONFIG: text})


def replace(files):
    """Write each path's bytes beside it, then rename: no file is ever half written."""
    beside = {p: p.with_name(f".{p.name}.{secrets.token_hex(8)}") for p in files}
    try:
        for path, data in files.items():
            with beside[path].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            beside[path].replace(path)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
