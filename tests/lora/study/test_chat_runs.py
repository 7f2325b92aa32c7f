"""`lora.study.chat_runs`: runs of two narrow blocks, losses and divergences by hand."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lora.study import chat, chat_runs, docstrings, search
from lora.study.docstrings import LIBRARIES, split
from lora.study.evidence import interval

PAIR = "numpy.mean(a, axis)", "Compute the arithmetic mean."


@pytest.fixture(scope="session")
def tokenizer():
    return chat.read_tokenizer(chat.model_file())


@pytest.fixture
def small(monkeypatch, tokenizer):
    """Random weights in the model's place, 210 pairs a library, short answers."""
    pairs = {
        library: [
            (f"{library}.f{i}", f"f {i}", f"Say {i} of {library}.") for i in range(210)
        ]
        for library in LIBRARIES
    }
    monkeypatch.setattr(docstrings, "documented", lambda: pairs)
    monkeypatch.setattr(chat, "documented", lambda: pairs)
    names = [name for entries in pairs.values() for name, *_ in entries]
    monkeypatch.setattr(chat, "signatures", lambda: dict.fromkeys(names, "(x)"))
    monkeypatch.setattr(chat_runs, "ORDINARY", ("Why?", "What is seven times eight?"))
    monkeypatch.setattr(chat_runs, "HELD", 2)
    monkeypatch.setattr(chat_runs, "ASKED", 1)
    monkeypatch.setattr(search, "load_minilm", lambda: None)
    monkeypatch.setattr(
        chat_runs, "places", lambda judge, texts, lines: [1] * len(texts)
    )

    def load():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
        return tokenizer, LlamaForCausalLM(config).eval()

    monkeypatch.setattr(chat, "load_chat", load)


# --- What is trained on, and how ---


def test_data_of_a_seed(small):
    train, held = chat_runs.data(1)
    assert len(train) == 5 * 10
    assert not any("sympy" in f or "networkx" in f for f, _ in train)
    assert list(held) == list(LIBRARIES)
    for name, pairs in held.items():
        report = split(chat.chat_pairs(name), seed=1)[2]
        assert pairs == report[:24] and len(pairs) == 24
        assert not {*pairs} & {*train}
    assert chat_runs.data(2) == (train, held), "any two seeds ask the same functions"
    some = [chat_runs.data(seed, 7)[0] for seed in (1, 1, 2)]
    assert some[0] == some[1] != some[2]
    assert len({*some[0]}) == 7 and {*some[0]} < {*train}


def test_what_learns_by_mistake(tokenizer):
    """Beside the right way: more of the prompt, no end, or ends without an end."""
    start, tokens = chat.example(tokenizer, *PAIR)
    end = tokenizer.eos_token_id
    assert chat_runs.mistaken("", tokenizer, *PAIR) == (start, tokens)
    assert chat_runs.mistaken("prompt", tokenizer, *PAIR) == (1, tokens)
    assert chat_runs.mistaken("no end", tokenizer, *PAIR) == (start, tokens[:-1])
    where, long = chat_runs.mistaken("padding", tokenizer, *PAIR)
    assert where == start and len(long) == start + chat_runs.LONG
    assert long[: len(tokens)] == tokens and {*long[len(tokens) :]} == {end}
    with pytest.raises(ValueError, match=r"mistake must be '' or one of .*'pad'"):
        chat_runs.mistaken("pad", tokenizer, *PAIR)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"method": "none"}, 0),
        ({"method": "full"}, None),
        ({"rank": 2}, 2 * 2 * (4 * 32 + 3 * 40)),
        ({"rank": 2, "targets": r".*self_attn\..*"}, 2 * 2 * 4 * 32),
        ({"rank": 2, "variant": "LoRA-FA"}, 2 * 2 * (5 * 16 + 2 * 24)),
    ],
)
def test_what_a_method_trains(small, settings, trained):
    """Rank 2: twice d_in + d_out of each layer, in two blocks of width 16 and 24.

    LoRA-FA trains B alone, twice d_out.
    """
    _, model = chat.load_chat()
    everything = sum(p.numel() for p in model.parameters())
    chat_runs.prepare(model, chat_runs.DEFAULTS | settings)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == (everything if trained is None else trained)


# --- One run ---


def test_a_run_and_its_row(small):
    settings = {"rank": 2, "steps": 3, "lr": 0.02, "seed": 3, "data": 20}
    tokenizer, model, row = chat_runs.make_run(**settings)
    assert row == json.loads(json.dumps(row))
    assert {k: row[k] for k in chat_runs.DEFAULTS} == chat_runs.DEFAULTS | settings
    assert len(row["losses"]) == 3 and row["seconds"] >= 0
    _, held = chat_runs.data(3)
    nats = chat.answer_losses(model, tokenizer, held["scipy"][:2])
    assert row["held_out"]["scipy"] == pytest.approx(nats.tolist(), abs=1e-4)
    for what, count in {"held_out": 2, "lines": 1, "ended": 1, "places": 1}.items():
        assert {name: len(v) for name, v in row[what].items()} == dict.fromkeys(
            LIBRARIES, count
        )
    assert len(row["forgot"]) == 2 and min(row["forgot"]) > 0
    again = chat_runs.make_run(**settings)[2]
    assert row | {"seconds": 0} == again | {"seconds": 0}
    other = chat_runs.make_run(**settings | {"seed": 4})[2]
    assert other["losses"] != row["losses"]


def test_the_base_forgets_nothing(small):
    _, _, row = chat_runs.make_run(method="none")
    assert row["losses"] == [] and row["forgot"] == pytest.approx([0, 0], abs=1e-5)
    _, _, prompted = chat_runs.make_run(method="none", shots=2)
    assert prompted["tokens"] > row["tokens"] + 20
    assert prompted["held_out"] != row["held_out"]


def test_a_setting_that_there_is_none_of_is_refused(small):
    with pytest.raises(ValueError, match=r"settings are \['method', .*got \['ranks'\]"):
        chat_runs.make_run(ranks=4)


def test_what_is_measured_of_answers(small, monkeypatch):
    """A sentence that ends, one that does not, and a talk, in the order asked."""
    tokenizer, model = chat.load_chat()
    end = [tokenizer.eos_token_id]
    texts = ["Compute the mean of an array.", "Compute the mean of", "I can: no.\nYes"]
    said = [tokenizer(text)["input_ids"] for text in texts]
    said = [said[0] + end, said[1], said[2] + end]
    monkeypatch.setattr(chat, "continued", lambda *_: said)
    held = {name: [(f"f{i}()", "Do it.")] * 2 for i, name in enumerate("abc")}
    row = chat_runs.measured(model, tokenizer, held)
    assert row["lines"] == {"a": [1], "b": [0], "c": [0]}
    assert row["ended"] == {"a": [1], "b": [0], "c": [1]}


def test_divergence_by_hand(small):
    tokenizer, model = chat.load_chat()
    answers = chat_runs.base_answers(model, tokenizer, longest=3)
    assert all(len(tokens) - start <= 3 for start, tokens, _ in answers)
    with torch.no_grad():
        model.model.norm.weight *= 1.5
        found = chat_runs.divergences(model, answers)
        for nats, (start, tokens, before) in zip(found, answers):
            after = model(torch.tensor([tokens])).logits[0, start - 1 : -1]
            by_torch = F.kl_div(
                after.log_softmax(-1), before, log_target=True, reduction="batchmean"
            )
            assert nats == pytest.approx(by_torch.item(), rel=1e-4)


def test_the_judge_puts_the_own_line_first():
    judge = search.load_minilm()
    lines = ["Compute the mean of an array.", "Draw a circle.", "Sort a list."]
    texts = ["The average value of numbers.", "A round shape is plotted."]
    assert chat_runs.places(judge, texts, lines) == [1, 1]
    assert min(chat_runs.places(judge, texts[::-1], lines)) > 1
    assert chat_runs.places(judge, ["same"], ["same", "same"]) == [2], "a tie"


# --- What rows say ---


def row_of(seed, *nats):
    return {"seed": seed, "held_out": {"numpy": [*nats[:2]], "sympy": [*nats[2:]]}}


def test_rows_are_compared_by_function(monkeypatch):
    monkeypatch.setattr(chat_runs, "CHOOSE", 0)
    first = [row_of(1, 1.0, 2.0, 3.0), row_of(2, 2.0, 2.0, 5.0)]
    second = [row_of(1, 4.0, 3.0, 4.5)]
    both = ("numpy", "sympy")
    assert chat_runs.by_function(first, libraries=both).tolist() == [1.5, 2, 4]
    found = chat_runs.compared(first, second, both)
    assert found == interval([2.5, 1.0, 0.5])
    assert chat_runs.compared(first, second, ["numpy"]) == interval([2.5, 1.0])
    verdict = chat_runs.is_ahead(first, second, both)
    assert not verdict.stands and verdict.mean == pytest.approx(4 / 3)
    assert chat_runs.is_ahead(first, [row_of(1, 4.0, 4.1, 6.3)], both).stands
    rows = [{"seed": 1, "places": {"numpy": [1, 4]}, "lines": {"numpy": [1, 0]}}]
    monkeypatch.setattr(chat_runs, "CHOOSE", 1)
    assert chat_runs.by_function(rows, "lines", ["numpy"]).mean() == 0.5
    assert chat_runs.by_function(first, libraries=["numpy"]).tolist() == [2]
    chooses = chat_runs.by_function(first, libraries=["numpy"], choose=True)
    assert chooses.tolist() == [1.5]


# --- What is planned ---


def test_no_run_is_planned_twice():
    rows = [settings for runs in chat_runs.studies().values() for settings in runs]
    planned = [json.dumps(chat_runs.planned(settings)) for settings in rows]
    assert len(planned) == len({*planned})
    assert all(settings.keys() <= chat_runs.DEFAULTS.keys() for settings in rows)
