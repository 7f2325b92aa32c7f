"""The data of Part II: what seven installed libraries say about their own functions.

Of each public function and class, the words of its name and the first sentence of its
docstring. Nothing is downloaded: the docstrings are read from the libraries that are
installed, and another version of a library has others. Chapter 4 of the book builds
this file.
"""

import contextlib
import functools
import importlib
import json
import os
import pkgutil
import random
import re
import subprocess
import sys

LIBRARIES = ("numpy", "scipy", "sklearn", "matplotlib", "torch", "sympy", "networkx")


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
    modules = [root]
    for info in sorted(pkgutil.iter_modules(root.__path__), key=lambda i: i.name):
        if info.name.startswith("_") or info.name in ("testing", "tests", "conftest"):
            continue
        with contextlib.suppress(Exception):  # a part that needs what is not installed
            modules.append(importlib.import_module(f"{library}.{info.name}"))
    return modules


def docstrings(library):
    """[(qualified name, docstring)] of a library's public functions and classes.

    By name. One that stands in several modules is called by the library's own, if it
    is one of them, else by the one that defines it, as far as that is public.
    """
    places = {}  # (name, docstring) -> the modules where it stands; the least is best
    for module in public_modules(library):
        path = module.__name__
        for name in dir(module):
            entry = getattr(module, name, None)
            if name.startswith("_") or not callable(entry):
                continue
            home = getattr(entry, "__module__", None) or library
            doc = getattr(entry, "__doc__", None)
            if home.partition(".")[0] == library and isinstance(doc, str):
                place = path != library, not home.startswith(path), path
                places.setdefault((name, doc), []).append(place)
    best = sorted((name, min(where), doc) for (name, doc), where in places.items())
    return [(f"{path}.{name}", doc) for name, (_, _, path), doc in best]


def read():
    """Library -> its `docstrings`, of all seven, read by a new Python process.

    What runs here may have changed a library: in a notebook matplotlib lacks a function
    that it has elsewhere. Raises RuntimeError, with what the process said, if it fails.
    """
    # PYTHONOPTIMIZE would drop the docstrings.
    plain = os.environ | {"MPLBACKEND": "agg", "PYTHONOPTIMIZE": ""}
    command = [sys.executable, "-m", "lora.study.docstrings"]
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    if done.returncode:
        raise RuntimeError(f"the libraries could not be read:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def documented():
    """Library -> [(qualified name, words, sentence)], by name, cleaned.

    A sentence that stands twice is kept once in all, words once a library; sentences
    that hold the name's letters, point elsewhere or have under four words are left out.
    The libraries are read once a process.
    """
    seen, kept = set(), {}
    for library, entries in read().items():
        kept[library] = {}  # words -> the first entry that has them
        for name, docstring in entries:
            words = words_of(name.rpartition(".")[2])
            sentence = first_sentence(docstring)
            told = letters(sentence)
            elsewhere = re.match("see |alias|deprecated|same as", sentence.lower())
            short = len(sentence.split()) < 4
            if elsewhere or short or letters(words) in told or told in seen:
                continue
            if words not in kept[library]:
                seen.add(told)
                kept[library][words] = name, words, sentence
    return {library: list(entries.values()) for library, entries in kept.items()}


def docstring_pairs(library):
    """[(words of the name, first sentence)] of one of `LIBRARIES`, in a fixed order.

    No name stands in its sentence, both compared as lower-case letters; no sentence
    stands twice, also across libraries.
    """
    return [(words, sentence) for _, words, sentence in documented()[library]]


def split(pairs, seed):
    """Pairs to train on, 50 to choose settings by, 150 to report: disjoint lists.

    The pairs to choose by are always the same; `seed` draws those to report from the
    rest.
    """
    fixed = random.Random(0).sample(pairs, len(pairs))
    choose, rest = fixed[:50], fixed[50:]
    drawn = random.Random(seed).sample(rest, len(rest))
    return drawn[150:], choose, drawn[:150]


if __name__ == "__main__":
    print(json.dumps({library: docstrings(library) for library in LIBRARIES}))
