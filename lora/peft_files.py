"""Adapters in files: PEFT's format, written in one go, checked before it is used.

`adapter_config.json` holds the settings, `adapter_model.safetensors` A and B of each
layer (PEFT 0.19, `LoraConfig`; Mangrulkar et al. 2022). Nothing is unpickled, and what
is not plain LoRA on linear layers is refused by its name. Chapter 5 of the book builds
this file.
"""

import copy
import hashlib
import json
import math
import re
import warnings
from collections import Counter

import torch
from safetensors import safe_open
from safetensors.torch import save

from lora import checks
from lora.bases import check_base, known, listed, weight_of, wrapper_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD = "head.safetensors"
# Settings that say nothing about the function: where the adapter is from, how it was
# made, parts of others that are switched off.
SAID = ["auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout"]
SAID += ["megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"]
SAID += ["fan_in_fan_out"]  # how W lies in the weight, which the layer's class says
# Those that this file honours: the function, and which layers.
FUNCTION = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"]
LAYERS = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"]
# Those that may be one of these. All others must be off: false, null or empty.
PLAIN = {"peft_type": ["LORA"], "bias": ["none"]}
PLAIN["init_lora_weights"] = [True, False, "gaussian", "orthogonal"]


def plain_name(name):
    """A layer's or tensor's name without what PEFT, DDP and torch.compile add."""
    name = name.replace("_orig_mod.", "").removeprefix("module.")
    return name.removeprefix("base_model.model.").removeprefix("module.")


def plain_names(names):
    """Name in PEFT's files -> name; ValueError if two names are one there."""
    plain = {plain_name(name): name for name in names}
    if lost := [n for n in names if plain[plain_name(n)] != n]:
        message = f"{lost[0]} and {plain[plain_name(lost[0])]} have one name"
        raise ValueError(f"{message} in PEFT's files, {plain_name(lost[0])}")
    return plain


def plain_updates(wrappers):
    """Name -> s B A of each wrapper: itself, or what a variant says in its `plain`."""
    return {n: w.plain(n) if hasattr(w, "plain") else w for n, w in wrappers.items()}


def layout(base, rank):
    """Name in PEFT's files -> shape there, of A and of B beside a base.

    As the wrapper says that was registered for the base, if one was.
    """
    if wrapper := wrapper_of(base):
        return wrapper.layout(base, rank)
    own = known(base)  # else W may have to be computed
    d_out, d_in = (
        weight_of(base).shape if own else (base.out_features, base.in_features)
    )
    return {"lora_A.weight": (rank, d_in), "lora_B.weight": (d_out, rank)}


def is_transposed(base):
    """Whether a base keeps W as (d_in, d_out): what PEFT calls `fan_in_fan_out`."""
    if known(base) is None or wrapper_of(base):
        return False
    return weight_of(base).stride() != base.weight.stride()


def write_adapter(folder, adapters, bases, head=None):
    """Write updates, layer's name -> update, and a module `head` into `folder`.

    Bad numbers raise before anything is written.
    """
    weights, names = {}, plain_names(adapters)
    if len(set(bases.values())) < len(bases):
        note = "one layer stands under several names: PEFT adapts the first alone"
        warnings.warn(note, stacklevel=3)
    for layer, update in adapters.items():
        shapes, factors = layout(bases[layer], update.rank), (update.A, update.B)
        for (name, shape), factor in zip(shapes.items(), factors):
            key = f"base_model.model.{plain_name(layer)}.{name}"
            weights[key] = factor.reshape(shape)
    adapters = {name: adapters[layer] for name, layer in names.items()}
    parts = {WEIGHTS: weights}
    if head is not None:
        parts[HEAD] = head.state_dict()
    elif (folder / HEAD).exists():
        message = f"{folder} holds the head of an earlier saving"
        raise ValueError(f"{message}: give head=, or choose another folder")
    config = peft_config(adapters)
    config["fan_in_fan_out"] = any(map(is_transposed, bases.values()))
    mark = {"format": "pt", "settings": mark_of(config)}
    new = {CONFIG: json.dumps(config, indent=2).encode()}
    for file, part in parts.items():
        whole = {n: sound(f"cannot save {n}", value) for n, value in part.items()}
        plain = {n: v.detach().cpu().contiguous().clone() for n, v in whole.items()}
        new[file] = save(plain, mark)
    folder.mkdir(parents=True, exist_ok=True)
    put_in_place(folder, new)


def warn_of_the_rest(model, wrappers, head=None):
    """Warn of what trains in a model, but is in no wrapper's update and not the head's.

    `wrappers`: name -> layer whose `base` stands beside its updates.
    """
    written = set() if head is None else set(head.parameters())
    for wrapper in wrappers.values():
        parameters = wrapper.named_parameters()
        written |= {p for name, p in parameters if not name.startswith("base.")}
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if rest := [n for n, p in own.items() if p not in written]:
        note = f"requires a gradient, and is not in the file: {listed(rest):.300}"
        warnings.warn(note, stacklevel=3)


def sound(name, tensor):
    """The tensor, or ValueError unless its numbers are all here, and finite."""
    kind = type(tensor.detach())
    if tensor.is_meta or kind is not torch.Tensor:  # a fake one, or one that is sharded
        message = f"{kind.__name__} on {tensor.device}, its numbers are not all here"
        raise ValueError(f"{name}: {message}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: numbers that are not finite")
    return tensor


def put_in_place(folder, new):
    """Write files, name -> bytes, beside the old ones first, then replace these."""
    for name, data in new.items():
        (folder / f"{name}.new").write_bytes(data)
    for name in new:
        (folder / f"{name}.new").replace(folder / name)


def peft_config(adapters):
    """The settings of adapters, layer's name -> update, as PEFT reads them."""
    ranks = {name: a.rank for name, a in adapters.items()}
    alphas = {
        name: float(a.alpha if a.scale == a.alpha / a.rank else a.scale * a.rank)
        for name, a in adapters.items()
    }
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "bias": "none",
        "use_rslora": False,
        "target_modules": "|".join(re.escape(name) for name in adapters),
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {
            f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha
        },
    }


def mark_of(config):
    """A hash of the settings that decide the function: the same in one saving."""
    settings = {key: config.get(key) or None for key in FUNCTION}
    numbers = json.loads(json.dumps(settings), parse_int=float)
    text = json.dumps(numbers, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_adapter(folder, model, bases, head=None):
    """What `folder` holds, checked: layer's name -> (A, B, alpha), and a head's state.

    `bases` are the layers of `model` that may have adapters, name -> base. Chosen are
    those that the settings name; where `selected` cannot say, those that the file of
    weights holds, as PEFT writes no others.
    """
    config = read_config(folder)
    file, mark = folder / WEIGHTS, mark_of(config)
    held = names_in(file)
    names = plain_names(bases)
    wanted = selected(config, names)
    if wanted is None:
        first = {n: next(iter(layout(bases[names[n]], 1))) for n in names}
        wanted = [n for n in names if f"{n}.{first[n]}" in held]
    if not wanted:
        message = f"{folder / CONFIG}: target_modules={config['target_modules']!r:.80}"
        raise ValueError(f"{message} names none of {listed(bases)}")
    ranks = pattern_values("rank_pattern", config, wanted, config["r"])
    alphas = pattern_values("alpha_pattern", config, wanted, config["lora_alpha"])
    like, keys = {}, {}
    for name in wanted:
        checks.check_settings(ranks[name], alphas[name])
        base = bases[names[name]]
        one = checks.wide(weight_of(base).new_empty(1))
        shapes = layout(base, ranks[name])
        keys[name] = [f"{name}.{key}" for key in shapes]
        like |= {f"{name}.{key}": one.expand(shape) for key, shape in shapes.items()}
    own = base_weights(model, held - like.keys())
    tensors = read_tensors(file, like | own, mark, plain_name)
    for name, weight in own.items():
        if not torch.equal(tensors[name], weight):
            raise ValueError(f"{file}: {name} is not the weight that the model has")
    found = {}
    for name in wanted:
        A, B = (tensors[key].flatten(1) for key in keys[name])
        factor = math.sqrt(ranks[name]) if config.get("use_rslora") else 1
        found[names[name]] = A, B, alphas[name] * factor
    return found, read_head(folder / HEAD, head, mark)


def by_base(folder, factors, places):
    """Base -> (A, B, alpha), of factors by name: a layer may have several names.

    Raises ValueError if they differ, and what `lora.bases.check_base` raises.
    """
    found = {}
    for place, (A, B, alpha) in factors.items():
        check_base(place, places[place])
        first, second, scale = found.setdefault(places[place], (A, B, alpha))
        if not (first.equal(A) and second.equal(B) and scale == alpha):
            message = "has another adapter under another name"
            raise ValueError(f"{folder}: {place} {message}")
    return found


def names_in(file):
    """The names of a file's tensors, as a set, without what PEFT adds."""
    with safe_open(file, "pt") as stored:
        return set(map(plain_name, stored.keys()))


def base_weights(model, keys):
    """Those of `keys` that are a weight of the base, name in the file -> tensor.

    PEFT writes them beside an adapter of the output layer.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    own = {plain_name(n).replace(".base.", "."): p.detach() for n, p in parameters}
    plain = {key: key.replace(".base_layer.", ".") for key in keys}
    return {key: own[name] for key, name in plain.items() if name in own}


def read_config(folder):
    """The settings in `folder`: a dictionary, of plain LoRA on linear layers."""
    there = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else ()
    for file in (CONFIG, WEIGHTS):
        if file not in there:
            found = ", ".join(there) or "nothing"
            raise FileNotFoundError(f"{folder} holds no {file}; it holds {found}")
    config = {"peft_type": None, "r": 8, "lora_alpha": 8, "target_modules": None}
    config |= json.loads((folder / CONFIG).read_bytes())
    for key, value in config.items():
        is_plain = value in PLAIN[key] if key in PLAIN else not value
        if not is_plain and key not in SAID + FUNCTION + LAYERS:
            message = f"{key} must be {PLAIN.get(key, 'off')} for plain LoRA"
            raise ValueError(f"{folder / CONFIG}: {message}, got {value!r:.80}")
    if config.get("lora_dropout"):
        note = f"lora_dropout={config['lora_dropout']!r} acts in training only: ignored"
        warnings.warn(note, stacklevel=4)
    return config


def selected(config, names):
    """Those of `names` that the settings select, by PEFT's rules.

    None if they do not say it, say it by numbers of layers, or by an expression that is
    not `quick`.
    """
    tests = []
    if config["target_modules"] is None:
        return None
    for value in (config["target_modules"], config.get("exclude_modules") or []):
        if not isinstance(value, str):  # names, or their ends
            tests.append(lambda name, ends=set(value): not ends.isdisjoint(tails(name)))
        elif all(parts := [literal(part) for part in value.split("|")]) and not any(
            dots for _, dots in parts
        ):
            tests.append({name for name, _ in parts}.__contains__)
        elif quick(value):
            tests.append(re.compile(value).fullmatch)
    if len(tests) < 2 or config.get("layers_to_transform") is not None:
        return None
    return [name for name in names if tests[0](name) and not tests[1](name)]


def pattern_values(key, config, names, default):
    """Layer's name -> value, by PEFT's rule: an expression matches a name's end.

    Two that give a layer different values are refused: PEFT sorts them when it saves,
    and takes the first.
    """
    holders, values = {}, {}  # holders: places of dots -> tail, without them -> names
    patterns = (config.get(key) or {}).items()
    tried = [e for e, _ in patterns if not literal(e)]
    if costly := [e for e in tried if not quick(e)] or tried[50:]:
        message = f"{CONFIG}: {key} has an expression too costly to try"
        raise ValueError(f"{message}: {costly[0]!r:.80}")
    masks = {found[1] for e, _ in patterns if (found := literal(e))}
    if len(masks) * len(names) > 10**6:
        raise ValueError(f"{CONFIG}: {key} has expressions too costly to try")
    for dots in masks:
        holders[dots] = {}
        for name in names:
            for tail in tails(name):
                holders[dots].setdefault(blurred(tail, dots), []).append(name)
    for expression, value in patterns:
        if found := literal(expression):
            name, dots = found
            matched = holders[dots].get(name, [])
            if expression[0] == "^":
                matched = [n for n in matched if len(n) == len(name)]
        else:
            pattern = re.compile(rf"(.*\.)?({expression})$")
            matched = [name for name in names if pattern.match(name)]
        for name in matched:
            if values.setdefault(name, value) != value:
                raise ValueError(
                    f"{CONFIG}: {key} gives {name} both {values[name]} "
                    f"and {value}, by {expression!r}"
                )
    return dict.fromkeys(names, default) | values


def tails(name):
    """A layer's name and what is left of it after each dot."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def literal(expression):
    """The name that an expression is, perhaps escaped and after a ^; or None.

    And the places of its dots that stand for any character.
    """
    if re.fullmatch(r"\^?([\w.-]|\\\W)+", expression):
        parts = re.findall(r"\\\W|[^\\^]", expression)
        dots = tuple(i for i, part in enumerate(parts) if part == ".")
        return "".join(part[-1] for part in parts), dots


def blurred(name, dots):
    """A name with dots at these places."""
    letters = [*name]
    for i in dots:
        if i < len(letters):
            letters[i] = "."
    return "".join(letters)


def quick(expression):
    """Whether an expression from a stranger takes no time that one would notice.

    A backtracking search tries all combinations of the choices in it: (a+)+ takes 2^n
    steps for n letters. So: at most three repeats and groups, no repeated group.
    """
    bare = re.sub(r"\\.|\[.*?\]", "x", expression[:300]).replace("(?:", "(")
    choices = len(re.findall(r"[*+?{(]", bare))
    return len(bare) <= 100 and choices <= 3 and not re.search(r"\)[*+?{]|\(\?", bare)


def read_tensors(file, like, mark, rename=str):
    """The tensors of a file, name -> tensor, as those of `like`; they must fit these.

    `rename` is a function of a tensor's name in the file.
    """
    with safe_open(file, "pt") as stored:
        if (stored.metadata() or {}).get("settings", mark) != mark:
            raise ValueError(f"{file} and {CONFIG} are of two savings")
        found = stored.keys()
        keys = {rename(key): key for key in found}
        if keys.keys() != like.keys() or len(keys) < len(found):
            here = sorted(key for name, key in keys.items() if name not in like)
            message = f"{file} does not fit: it alone has {listed(here)}"
            there = sorted(like.keys() - keys.keys())
            raise ValueError(f"{message}, the model alone has {listed(there)}")
        tensors = {name: stored.get_tensor(keys[name]) for name in like}
    for name, own in like.items():
        shape = tuple(tensors[name].shape)
        if shape != own.shape:
            raise ValueError(f"{file}: {name} must be {(*own.shape,)}, got {shape}")
        tensors[name] = sound(f"{file}: {name}", tensors[name].to(own))
    return tensors


def read_head(file, head, mark):
    """The state for a module `head`, checked against it; None without one."""
    if head is not None:
        state = read_tensors(file, head.state_dict(), mark)
        copy.deepcopy(head).load_state_dict(state)  # what would raise, raises here
        return state
    if file.exists():
        raise ValueError(f"{file.parent} holds a head: give a module, head=")
