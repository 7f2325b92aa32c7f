"""`lora.study.docstrings` against the libraries themselves, and plain Python."""

import csv
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from lora.study import docstrings
from lora.study.docstrings import LIBRARIES, docstring_pairs, documented, split

PAIRS = [(f"name {i}", f"A sentence of number {i}.") for i in range(210)]


def python(code, **environ):
    """What a fresh interpreter prints, on both streams."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def plain(text):
    """Lower-case Latin letters only, by another way than the module's."""
    latin = "LATIN SMALL LETTER "
    kept = (c for c in text.lower() if unicodedata.name(c, "").startswith(latin))
    return "".join(c for c in kept if c.isascii())


# --- What the seven libraries hold ---


def test_pairs_are_clean():
    everything = {library: docstring_pairs(library) for library in LIBRARIES}
    for pairs in everything.values():
        assert len({words for words, _ in pairs}) == len(pairs)
        for words, sentence in pairs:
            assert plain(words) and plain(words) not in plain(sentence)
            assert re.fullmatch(r"[a-z0-9]+( [a-z0-9]+)*", words)
            assert len(sentence.split()) >= 4
            assert sentence == sentence.strip() and not {*"\n`"} & {*sentence}
            assert not re.match("(?i)see |alias|deprecated|same as", sentence)
    sentences = [plain(s) for pairs in everything.values() for _, s in pairs]
    assert len(sentences) == len(set(sentences)) == 4000


def test_each_pair_is_of_the_object_that_it_names():
    for library, entries in documented().items():
        for name, words, sentence in entries[::10]:
            module, _, own = name.rpartition(".")
            entry = getattr(importlib.import_module(module), own)
            assert name.startswith(f"{library}.")
            assert words == docstrings.words_of(own)
            said = [plain(word) for word in sentence.split()]
            assert all(word in plain(entry.__doc__) for word in said), name


PRINTED = """
import hashlib, json
{before}
from lora.study.docstrings import LIBRARIES, docstring_pairs
pairs = [docstring_pairs(library) for library in LIBRARIES]
print(hashlib.sha256(json.dumps(pairs).encode()).hexdigest())
"""


@pytest.mark.parametrize(
    ("before", "environ"),
    [
        ("", {"PYTHONOPTIMIZE": "2", "MPLBACKEND": "none"}),  # drops docstrings
        ("import peft, matplotlib.pyplot, scipy.stats", {"PYTHONHASHSEED": "2"}),
    ],
)
def test_pairs_depend_on_nothing_that_a_process_draws_or_sets(before, environ):
    pairs = [docstring_pairs(library) for library in LIBRARIES]
    expected = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    printed = python(PRINTED.format(before=before), **environ)
    assert printed == expected, "also: nothing else is printed"


def test_reading_draws_no_random_number_and_changes_no_setting():
    code = """if True:
    import random, numpy, torch, matplotlib
    from lora.study import docstrings
    def state():
        drawn = random.random(), numpy.random.rand(), torch.rand(1).item()
        return drawn, dict(matplotlib.rcParams), torch.get_default_dtype()
    def seed(): random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    seed(); before = state()
    seed(); docstrings.documented(); print(before == state())"""
    assert python(code) == "True"


def test_what_the_process_said_is_told_if_it_fails(tmp_path, monkeypatch):
    (tmp_path / "networkx.py").write_text("raise ImportError('none here')")
    path = [str(tmp_path), os.environ.get("PYTHONPATH", str(Path.cwd()))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    with pytest.raises(RuntimeError, match="could not be read:(.|\n)*none here"):
        docstrings.read()


def test_questions_have_their_answers_in_the_libraries():
    path = Path(docstrings.__file__).parent / "data" / "questions.csv"
    names = {name for entries in documented().values() for name, _, _ in entries}
    _, *questions = csv.reader(path.open())
    assert len(questions) == 30
    assert {answer for _, answer in questions} <= names


# --- Small ones, by hand ---

FILES = {
    "__init__": """
        from json import dumps
        from ._hidden import both, deep, secret
        _own = both
        number = 3
        def here(): "Here."
        def silent(): pass
        """,
    "_hidden": """
        def both(): "Both."
        def deep(): "Deep."
        def secret(): "Secret."
        def other(): "Other."
        class Thing: "A thing."
        """,
    "alpha": """
        print("a line that a library prints")
        from .omega import late
        from ._hidden import both, other
        def here(): "Another one of that name."
        """,
    "broken": "raise ImportError",
    "omega": """
        from ._hidden import Thing
        def late(): "Late."
        """,
    "tests": "def check(): 'A check.'",
}


def test_docstrings_of_a_small_library(tmp_path, monkeypatch):
    """The library's own module first, then the one that defines it, then by name."""
    (tmp_path / "tiny").mkdir()
    for name, text in FILES.items():
        lines = [line.removeprefix(" " * 8) for line in text.split("\n")]
        (tmp_path / "tiny" / f"{name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    modules = [m.__name__ for m in docstrings.public_modules("tiny")]
    assert modules == ["tiny", "tiny.alpha", "tiny.omega"]
    assert docstrings.docstrings("tiny") == [
        ("tiny.omega.Thing", "A thing."),
        ("tiny.both", "Both."),
        ("tiny.deep", "Deep."),
        ("tiny.here", "Here."),
        ("tiny.alpha.here", "Another one of that name."),
        ("tiny.omega.late", "Late."),  # not alpha, which only imports it
        ("tiny.alpha.other", "Other."),
        ("tiny.secret", "Secret."),
    ]


def test_what_is_kept(monkeypatch):
    read = {
        "a": [
            ("a.one", "Gives back the first of all."),
            ("a.oneAgain", "GIVES back the first, of all!"),  # stands twice
            ("a.b.one", "Another sentence of these words."),  # words stand twice
            ("a.two", "Gives back the second."),
            ("a.first", "Has the word First in it."),
            ("a.thrice", "See the documentation of two."),
            ("a.four", "Deprecated since version two now."),
            ("a.five", "Alias of the function two."),
            ("a.six", "Same as two, but slower."),
            ("a.seven", "Only three words."),
            ("a.eight", ""),
        ],
        "b": [
            ("b.one", "Of another library, with these words."),
            ("b.ten", "Gives back the second."),  # stands in a
        ],
    }
    monkeypatch.setattr(docstrings, "read", lambda: read)
    assert documented.__wrapped__() == {
        "a": [
            ("a.one", "one", "Gives back the first of all."),
            ("a.two", "two", "Gives back the second."),
        ],
        "b": [("b.one", "one", "Of another library, with these words.")],
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LogNorm", "log norm"),
        ("rot90", "rot 90"),
        ("randperm", "randperm"),
        ("matrix_power", "matrix power"),
        ("FFTConvolve", "fft convolve"),
        ("SVD", "svd"),
        ("LSTMCell", "lstm cell"),
        ("L1Loss", "l 1 loss"),
        ("__len__", "len"),
    ],
)
def test_words_of_a_name(name, words):
    assert docstrings.words_of(name) == words


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One. Two.", "One."),
        ("  \n One line\n  and more. Then.\n\nNext.", "One line and more."),
        ("f(x, y=1)\n\nAdd them up.", "Add them up."),
        ("a.b.f(x) -> y\n\nAdd them up!", "Add them up!"),
        (".. note:: old\n\nAdd them.", "Add them."),
        ("Like :func:`~a.b` and :py:class:`T <a.T>` do.", "Like a.b and T do."),
        ("The ``x`` of `y`.", "The x of y."),
        ("Version 2.0 of it. End.", "Version 2.0 of it."),
        ("f(x)", ""),
        ("", ""),
    ],
)
def test_first_sentence(docstring, sentence):
    assert docstrings.first_sentence(docstring) == sentence


def test_split_is_disjoint_complete_and_fixed():
    train, choose, report = split(PAIRS, seed=3)
    assert [len(train), len(choose), len(report)] == [10, 50, 150]
    assert sorted(train + choose + report) == sorted(PAIRS)
    assert split(PAIRS, seed=3) == (train, choose, report)
    other = split(PAIRS, seed=4)
    assert other[1] == choose, "those to choose by are always the same"
    assert other[2] != report
