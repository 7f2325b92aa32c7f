"""The search box of Chapter 4 along the dial: `python -m tools.dial`.

Trains the chapter's adapter again, a minute of a processor core, and asks its three
questions with 0, a quarter, ... five quarters of the update. Writes book/_ext/dial.json
for the page to play with: of each question the functions that are among the first
`SHOWN` at some stop, their cosines in ten-thousandths, and the place of the right one.
"""

import json

import torch

from lora import LoRALinear, bases
from lora.study import runs, search
from lora.study.docstrings import documented
from tools.kit.register import BOOK

FILE = BOOK / "_ext" / "dial.json"
STOPS = (0, 0.25, 0.5, 0.75, 1, 1.25)
SHOWN = 6
ASKED = {  # as at the top of Chapter 4
    "masked invalid": "numpy.ma.masked_invalid",
    "regularize a network by switching units off at random": "torch.nn.Dropout",
    "turn categories into columns of zeros and ones": (
        "sklearn.preprocessing.OneHotEncoder"
    ),
}


def cosines(model, tokenizer, questions, texts, stops=STOPS):
    """Of each question with each text, at each stop of the dial: (stops, q, texts).

    The model is left as it was.
    """
    layers = bases.find(model, LoRALinear).values()
    trained = [layer.scale for layer in layers]
    found = []
    for stop in stops:
        for layer, scale in zip(layers, trained):
            layer.scale = stop * scale
        asked, answers = (
            search.embed(model, tokenizer, part) for part in (questions, texts)
        )
        found.append(asked @ answers.T)
    for layer, scale in zip(layers, trained):
        layer.scale = scale
    return torch.stack(found)


def to_show(scores, right):
    """What the page needs of one question with `scores` (stops, n): a dictionary.

    "best" are the indices of the texts that are among the first at some stop or are the
    right one, "cosines" their scores at each stop, "places" of the right one.
    """
    best = scores.topk(SHOWN).indices.flatten().tolist()
    best = sorted({*best, right}, key=lambda i: -scores[0, i])
    return {
        "best": best,
        "cosines": (1e4 * scores[:, best]).round().int().tolist(),
        "places": (scores >= scores[:, [right]]).sum(1).tolist(),
    }


def make():
    """The file's content, from a model that is trained now."""
    tokenizer, model, _ = runs.make_run(seed=1)
    functions = [entry for part in documented().values() for entry in part]
    names, _, texts = zip(*functions)
    questions = []
    for question, scores in zip(
        ASKED, cosines(model, tokenizer, list(ASKED), list(texts)).unbind(1)
    ):
        shown = to_show(scores, names.index(ASKED[question]))
        best = shown.pop("best")
        shown["functions"] = [[names[i], texts[i]] for i in best]
        questions.append({"question": question, "answer": ASKED[question]} | shown)
    return {"stops": STOPS, "among": len(names), "questions": questions}


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps(make()) + "\n", encoding="utf-8")
