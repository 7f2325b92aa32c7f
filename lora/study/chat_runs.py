"""Runs of the chat model: how each is made, which there are, the file of those made.

As `runs.py` for MiniLM, by the same commands: a row for each run, here in `lora/study/
data/chat.jsonl`. Held-out functions are the same for all seeds that report, so that any
two rows can be compared function by function. Chapter 7 of the book builds this file.
"""

import random
import time
from functools import partial

import pandas as pd
import torch

from lora.study import chat, runs, search
from lora.study.docstrings import LIBRARIES, split
from lora.study.evidence import Verdict, interval
from lora.study.runs import FOLDER, TRAINED, over, read_rows

DATA = FOLDER / "chat.jsonl"
# Between processors, training in float32 goes other ways: what may lie between the mean
# losses of two runs of the same settings, in nats a token.
TOLERANCE = 0.05
ALL = r"model\.layers\..*_proj"
PARTS = r".*self_attn\..*", r".*mlp\..*"
BEST = "DoRA", "LoRA-FA"  # of the variants on MiniLM
DEFAULTS = {
    "method": "lora",  # or "full", or "none"
    "rank": 8,
    "lr": 1e-3,
    "steps": 24,
    "batch": 8,
    "data": 0,  # how many of the pairs are trained on; 0: all
    "targets": ALL,
    "variant": "lora",  # or another of `lora.study.runs.VARIANTS`
    "mistake": "",  # or one of MISTAKES
    "shots": 0,  # examples in the prompt
    "seed": 1,
}
KEYS = [*DEFAULTS]
MISTAKES = "no end", "prompt", "padding"
LONG = 32  # tokens that an answer with its padding has, where the padding learns
LONGEST = 32  # tokens that an answer may have
HELD, ASKED, AMONG = 17, 5, 24  # of each library: losses, answers, the judge's choice
CHOOSE = 7  # of the losses: by the first rates are chosen, the others are reported
ORDINARY = (
    "What is the capital of France?",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "Why is the sky blue?",
    "Tell me a joke.",
    "What is the difference between a frog and a toad?",
    "Give me three tips for sleeping better.",
    "Who wrote Romeo and Juliet?",
    "Explain photosynthesis to a child.",
    "What is seven times eight?",
)


def data(seed, count=0):
    """(pairs to train on, held-out pairs: library -> AMONG of them).

    The former are of five libraries, all or `count` that `seed` draws.
    """
    parts = {name: split(chat.chat_pairs(name), seed=1) for name in LIBRARIES}
    train = [pair for name in TRAINED for pair in parts[name][0]]
    if count:
        train = random.Random(seed).sample(train, count)
    return train, {name: part[2][:AMONG] for name, part in parts.items()}


def mistaken(mistake, tokenizer, function, line):
    """An example (`lora.study.chat.example`) that teaches what it should not, or less.

    "prompt": the prompt's tokens learn, too. "no end": the end token does not.
    "padding": what fills the answer up to `LONG` tokens learns, too.
    """
    if mistake not in ("", *MISTAKES):
        raise ValueError(f"mistake must be '' or one of {MISTAKES}, got {mistake!r}")
    start, tokens = chat.example(tokenizer, function, line)
    if mistake == "prompt":
        start = 1
    elif mistake == "no end":
        tokens = tokens[:-1]
    elif mistake == "padding":
        tokens = tokens + [tokenizer.pad_token_id] * (start + LONG - len(tokens))
    return start, tokens


def prepare(model, settings):
    """Make trainable what the settings say, in place: adapters, everything, nothing."""
    model.requires_grad_(settings["method"] == "full")
    if settings["method"] == "lora":
        torch.manual_seed(settings["seed"])
        rank, inject = settings["rank"], runs.VARIANTS[settings["variant"]]
        inject(model, settings["targets"], rank, float(rank))


def make_run(**settings):
    """Make one run; return its tokenizer, its model and its row, a dictionary.

    Settings that are not named are `DEFAULTS`. The row holds them, the "losses" of the
    steps and the processor "seconds" of one; by library, "held_out": nats a token of
    the true line of each function; of answers, whether each is one short sentence
    ("lines"), whether it "ended", and its place by the judge ("places"); "tokens", the
    mean length of a prompt; "forgot", the divergence on each of the ORDINARY questions.
    Raises ValueError for a setting that there is none of.
    """
    if strange := settings.keys() - DEFAULTS.keys():
        raise ValueError(f"settings are {[*DEFAULTS]}, got {sorted(strange)}")
    settings = DEFAULTS | settings
    seed, steps, mistake = (settings[k] for k in ("seed", "steps", "mistake"))
    tokenizer, model = chat.load_chat()
    ordinary = base_answers(model, tokenizer)
    train, held = data(seed, settings["data"])
    shots = random.Random(seed).sample(train, settings["shots"])
    prepare(model, settings)
    losses, start = [], time.process_time()
    if settings["method"] != "none":
        make = partial(mistaken, mistake)
        how = {"lr": settings["lr"], "batch": settings["batch"], "seed": seed}
        losses = chat.fine_tune_chat(model, tokenizer, train, steps, make=make, **how)
    seconds = (time.process_time() - start) / max(1, len(losses))
    row = settings | {"versions": runs.versions(), "device": model.device.type}
    row["losses"] = [round(loss, 3) for loss in losses]
    row["seconds"] = round(seconds, 2)
    row |= measured(model, tokenizer, held, shots)
    row["forgot"] = [round(nats, 4) for nats in divergences(model, ordinary)]
    return tokenizer, model, row


def measured(model, tokenizer, held, shots=()):
    """What a row tells about losses and answers on held-out pairs, library -> pairs."""
    row = {name: {} for name in ("held_out", "lines", "ended", "places")}
    scored = [pair for pairs in held.values() for pair in pairs[:HELD]]
    nats = chat.answer_losses(model, tokenizer, scored, shots=shots).tolist()
    asked = [name for pairs in held.values() for name, _ in pairs[:ASKED]]
    prompts = [chat.prompt(tokenizer, name, shots) for name in asked]
    tokens = chat.continued(model, tokenizer, prompts, LONGEST)
    texts = [tokenizer.decode(t, skip_special_tokens=True).strip() for t in tokens]
    judge = search.load_minilm()
    for i, (name, pairs) in enumerate(held.items()):
        losses = nats[i * HELD : (i + 1) * HELD]
        row["held_out"][name] = [round(loss, 4) for loss in losses]
        mine = slice(i * ASKED, (i + 1) * ASKED)
        row["lines"][name] = [int(chat.is_line(text)) for text in texts[mine]]
        ends = [int(t[-1:] == [tokenizer.eos_token_id]) for t in tokens[mine]]
        row["ended"][name] = ends
        row["places"][name] = places(judge, texts[mine], [line for _, line in pairs])
    row["tokens"] = round(sum(map(len, prompts)) / len(prompts), 1)
    return row


def places(judge, texts, lines):
    """Where among the true `lines` the judge puts the own one of each text: ints.

    Line i is that of text i; 1 is the most similar by vectors of `judge`, a tokenizer
    and a model (`lora.study.search.embed`).
    """
    tokenizer, model = judge
    found, true = (search.embed(model, tokenizer, side) for side in (texts, lines))
    scores = found @ true.T
    return (scores >= scores.diagonal().unsqueeze(1)).sum(1).tolist()


@torch.no_grad()
def base_answers(model, tokenizer, longest=16):
    """What the base says to ORDINARY questions, as `divergences` needs it.

    Of each question the number of tokens in the prompt, all tokens, and the base's log-
    probabilities at the answer's, (n, vocabulary).
    """
    asked = [chat.talk(tokenizer, question) for question in ORDINARY]
    answers = chat.continued(model, tokenizer, asked, longest)
    talks = [(len(a), [*a, *answer]) for a, answer in zip(asked, answers)]
    return [(*talk, following(model, *talk)) for talk in talks]


def following(model, start, tokens):
    """Log-probabilities of the tokens from `start` on, each by those before it."""
    ids = torch.tensor([tokens], device=model.device)
    return model(ids).logits[0, start - 1 : -1].log_softmax(-1)


@torch.no_grad()
def divergences(model, answers):
    """Kullback-Leibler divergence of a model from the base, in nats a token, a list.

    The mean over the tokens of each of the base's own `base_answers`.
    """
    return [
        (before.exp() * (before - following(model, start, tokens))).sum(1).mean().item()
        for start, tokens, before in answers
    ]


# --- What rows say ---


def recorded(study):
    """The recorded rows of one study, a DataFrame: see `lora.study.runs.recorded`."""
    return read_rows(DATA, DEFAULTS, study)


def by_function(rows, what="held_out", libraries=LIBRARIES, choose=False):
    """One value for each function, the mean over the rows, a Series.

    `rows` is a DataFrame or a list of rows. Of losses ("held_out") those that serve to
    `choose`, or those that are reported; of answers all.
    """
    rows = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
    values = [
        (name, i, value)
        for row in rows
        for name in libraries
        for i, value in enumerate(row[what][name])
        if what != "held_out" or (i < CHOOSE) == choose
    ]
    table = pd.DataFrame(values, columns=["library", "place", what])
    return table.groupby(["library", "place"])[what].mean()


def compared(first, second, libraries=LIBRARIES):
    """By how many nats a token `first` finds the true lines more likely than `second`.

    (mean, low, high) over the functions that are reported, each counted once however
    many seeds asked it.
    """
    gain = by_function(second, libraries=libraries)
    return interval(gain - by_function(first, libraries=libraries))


def is_ahead(first, second, libraries=LIBRARIES):
    """Whether the true lines are more likely to `first`: a verdict over functions."""
    mean, low, high = compared(first, second, libraries)
    return Verdict(low > 0, mean, low, high)


def points(row):
    """The mean loss over the functions that are reported, in nats a token."""
    return by_function([row]).mean()


def share(rows, what="lines"):
    """The share of answers that are one short sentence, or that "ended"."""
    return by_function(rows, what).mean()


def judged(rows):
    """100 times the mean reciprocal place that the judge gives the true line."""
    return 100 * (1 / by_function(rows, "places")).mean()


# --- Which runs there are ---


def planned(settings):
    """The settings of each row that `make_rows` gives: one."""
    return [DEFAULTS | settings]


def make_rows(settings):
    """The row that is `planned`."""
    return [make_run(**settings)[2]]


def studies():
    """Study -> the settings of its runs."""
    none, full = {"method": "none"}, {"method": "full", "lr": 1e-4}
    dials = [{"targets": t} for t in PARTS] + [{"rank": r} for r in (1, 64)]
    some = (32, 48), (32, 96), (128, 24), (128, 48), (128, 96), (512, 96), (0, 96)
    amounts = [{"data": n, "steps": steps} for n, steps in some]
    other_draws = [{"data": n, "steps": k} for n in (32, 128) for k in (24, 48)]
    slow, fast = (({"lr": 1e-3 * k}, full | {"lr": 1e-4 * k}) for k in (0.5, 2))
    return {
        "chat prompts": over((1,), none, none | {"shots": 4}),
        "chat main": over((1,), {}, full),
        "chat endless": over((1,), {"mistake": "no end"}),
        "chat rates": over((1,), *fast),
        "chat data": over((1,), {"data": 32}),
        "chat mistakes": over((1,), {"mistake": "prompt"}, {"mistake": "padding"}),
        "chat seeds": over((2,), {"lr": 2e-3}, full),
        "chat slow": over((1,), *slow),
        "chat more seeds": over((3,), {"lr": 2e-3}, full),
        "chat shots": over((1,), *(none | {"shots": n} for n in (1, 8))),
        "chat draws": over((2, 3), none | {"shots": 4}),
        "chat layers": over((1,), *dials[:2]),
        "chat ranks": over((1,), *dials[2:]),
        "chat longer": over((1,), {"steps": 48}, full | {"steps": 48}),
        "chat fast": [
            *over((1,), *({"lr": lr, "steps": 48} for lr in (2e-3, 4e-3))),
            *over((1, 2, 3), {"lr": 4e-3}),
            *over((1,), {"lr": 8e-3}),
        ],
        "chat dials": over((2, 3), {}, *dials, {"steps": 48}),
        "chat variants": [
            *over((1,), *({"variant": name} for name in BEST)),
            *over((1, 2, 3), *({"variant": name, "lr": 2e-3} for name in BEST)),
        ],
        "chat amounts": [*over((1,), *amounts), *over((2, 3), *other_draws)],
    }
