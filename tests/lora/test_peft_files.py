"""`lora.peft_files`: PEFT reads what we write, we read PEFT's; all else is refused."""

import copy
import json
import math
import pickle
import random
import re
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

from lora import LoRALinear, peft_files
from lora.adapters import add_adapter, load_adapter, parts_of, save_adapter, set_adapter
from tests.lora.models import small

QUERY = r".*\.(query|value)"
SELF = "encoder.layer.0.attention.self"


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(9)
    return torch.randint(50, (5, 7))


@torch.no_grad()
def out(model, ids):
    return model(input_ids=ids).last_hidden_state


def adapted(targets=QUERY, **settings):
    """With one adapter, "a", whose A and B are drawn at random."""
    model = small()
    for place in add_adapter(model, "a", targets, **settings):
        nn.init.normal_(model.get_submodule(place).adapters["a"].B, std=0.3)
    return model


def head(seed=0, width=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, width), nn.LayerNorm(width))


@pytest.fixture
def saved(tmp_path):
    """A folder "mine" with an adapter and a head, and the model that it is from."""
    model = adapted(rank=2, rank_pattern={r".*value": 3})
    save_adapter(model, "a", tmp_path / "mine", head=head(1))
    return tmp_path / "mine"


def snapshot(model, *modules):
    """What a refused file must leave."""
    state = {k: v.clone() for m in (model, *modules) for k, v in m.state_dict().items()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    return state, [(n, type(m)) for n, m in model.named_modules()], trained


def same(a, b):
    return a[1:] == b[1:] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


# --- PEFT reads ours ---


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 2, "alpha": 4.0},
        {"targets": None, "rank": 3, "alpha": -1.5},
        {"rank_pattern": {r".*query": 5}, "alpha_pattern": {r".*layer\.1\..*": 3.0}},
        {"targets": r"encoder\.layer\.1\.output\.dense", "rank": 1},
    ],
)
def test_peft_reads_ours(tmp_path, ids, settings):
    model = adapted(**settings)
    save_adapter(model, "a", tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        peft_files.CONFIG,
        peft_files.WEIGHTS,
    }
    set_adapter(model, "a")
    theirs = PeftModel.from_pretrained(small(), tmp_path)
    torch.testing.assert_close(out(theirs, ids), out(model, ids), atol=1e-6, rtol=1e-6)
    wrapped = {
        n.removeprefix("base_model.model.") for n in theirs.targeted_module_names
    }
    assert wrapped == set(parts_of(model)[0])
    assert not torch.allclose(out(theirs, ids), out(small(), ids), atol=1e-3)


class Names(nn.Module):
    """A layer whose name is the end of another's, and names with odd letters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.b, self.a = nn.Linear(3, 3), nn.ModuleDict({"b": nn.Linear(3, 3)})
        self.a["b+"], self.a["1"] = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.a["1"](self.a["b+"](self.a["b"](self.b(x))))


@pytest.mark.parametrize("first", ["b", "a.b"])
def test_names_that_end_alike(tmp_path, first):
    """PEFT compares ends of names; ranks and layers must not be mixed up by it."""
    model, x = Names(), torch.randn(2, 3)
    other = {"b": "a.b", "a.b": "b"}[first]
    ranks = {first: 1, other: 2, r"a\.b\+": 3}
    pattern = {re.escape(k) if "+" not in k else k: v for k, v in ranks.items()}
    add_adapter(model, "a", r"b|a\.b\+?", rank_pattern=pattern)
    for layer in parts_of(model)[0].values():
        nn.init.normal_(layer.adapters["a"].B)
    save_adapter(model, "a", tmp_path)
    set_adapter(model, "a")
    theirs = PeftModel.from_pretrained(Names(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))
    again = Names()
    load_adapter(again, tmp_path, "z")
    set_adapter(again, "z")
    assert torch.equal(again(x), model(x))
    only = Names()
    add_adapter(only, "a", "b")
    save_adapter(only, "a", tmp_path / "one")
    theirs = PeftModel.from_pretrained(Names(), tmp_path / "one")
    assert theirs.targeted_module_names == ["b"]


# --- ours reads PEFT's ---


def peft_s(folder, **settings):
    """An adapter of PEFT's, drawn at random, saved; the model that it is in."""
    torch.manual_seed(1)
    model = get_peft_model(small(), LoraConfig(**{"target_modules": QUERY} | settings))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "lora_alpha": 5},
        {"target_modules": ["query", "output.dense"]},
        {"target_modules": "all-linear", "exclude_modules": ["key"]},
        {"r": 5, "use_rslora": True, "lora_alpha": 3},
        {
            "use_rslora": True,
            "rank_pattern": {"layer.1.attention.self.query": 3, "value": 5},
            "alpha_pattern": {
                r".*query": 2,
                "^encoder.layer.0.attention.self.value": 9,
            },
        },
        {"init_lora_weights": "gaussian", "lora_dropout": 0.0},
    ],
)
def test_ours_reads_peft_s(tmp_path, ids, settings):
    theirs, model = peft_s(tmp_path / "x", **settings), small()
    state = torch.get_rng_state()
    assert load_adapter(model, tmp_path / "x") == "x"
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    assert torch.equal(out(model, ids), out(small(), ids)), "loaded is not set"
    assert not any(
        p.requires_grad for m in parts_of(model)[0].values() for p in m.parameters()
    )
    set_adapter(model, "x")
    torch.testing.assert_close(out(theirs, ids), out(model, ids), atol=1e-6, rtol=1e-6)
    save_adapter(model, "x", tmp_path / "again")
    back = PeftModel.from_pretrained(small(), tmp_path / "again")
    torch.testing.assert_close(out(theirs, ids), out(back, ids), atol=1e-6, rtol=1e-6)


def test_dropout_is_said_to_be_ignored(tmp_path):
    peft_s(tmp_path, lora_dropout=0.25)
    with pytest.warns(UserWarning, match="lora_dropout=0.25 acts in training only"):
        load_adapter(small(), tmp_path, "x")


@pytest.mark.unmutated  # a mutant's switch is a caller of its own
def test_a_warning_points_to_the_line_that_loads(tmp_path):
    peft_s(tmp_path, lora_dropout=0.25)
    with pytest.warns(UserWarning, match="lora_dropout") as caught:
        load_adapter(small(), tmp_path, "x")
    assert [w.filename for w in caught if "lora_dropout" in str(w.message)] == [
        __file__
    ]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["key"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["query", "word_embeddings"]}, "word_embeddings"),
    ],
)
def test_peft_s_other_kinds_are_refused_by_name(tmp_path, settings, word):
    peft_s(tmp_path, **settings)
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError, match=word):
        load_adapter(model, tmp_path, "x")
    assert same(before, snapshot(model))


PLAIN = "for plain LoRA, got"
NONE = "names none of encoder"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bdlora": True}, f"use_bdlora must be off {PLAIN} True$"),
        ({"peft_type": "IA3"}, rf"peft_type must be \['LORA'\] {PLAIN} 'IA3'$"),
        ({"peft_type": ...}, rf"peft_type must be \['LORA'\] {PLAIN} None$"),
        ({"use_qalora": True}, f"use_qalora must be off {PLAIN}"),
        ({"layer_replication": [[0, 2]]}, "layer_replication must be off"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights must be \[True, "),
        ({"target_parameters": ["x"]}, "target_parameters must be off"),
        ({"a_setting_of_tomorrow": True}, "a_setting_of_tomorrow must be off"),
        ({"x": "9" * 200}, f"x must be off {PLAIN} '{'9' * 79}$"),
        ({"target_modules": "all-linear"}, f"target_modules='all-linear' {NONE}"),
        ({"target_modules": [1]}, NONE),
        ({"target_modules": "("}, "unterminated subpattern"),
        ({"target_modules": []}, NONE),
        ({"target_modules": "nothing"}, NONE),
        (
            {"target_modules": r".*\.(query|value|key)"},
            "model alone has encoder.*key.lora_A",
        ),
        ({"target_modules": r".*\.query"}, r"it alone has base.*value.lora_A"),
        ({"exclude_modules": "("}, "unterminated subpattern"),
        ({"r": 0, "rank_pattern": {}}, "rank must be an integer of at least 1, got 0"),
        ({"r": ..., "rank_pattern": {}}, r"must be \(8, 16\), got \(2, 16\)"),
        ({"r": "2", "rank_pattern": {}}, "rank must be an integer"),
        ({"r": 10**400, "rank_pattern": {}}, "rank must be an integer"),
        ({"r": True, "rank_pattern": {}}, "rank must be an integer"),
        ({"r": 4, "rank_pattern": None}, r"must be \(4, 16\), got \(2, 16\)"),
        ({"lora_alpha": math.nan, "alpha_pattern": {}}, "alpha must be a finite"),
        ({"lora_alpha": None, "alpha_pattern": {}}, "alpha must be a finite"),
        ({"lora_alpha": 10**400, "alpha_pattern": {}}, "alpha must be a finite"),
        ({"rank_pattern": [1]}, "'list' object has no attribute 'items'"),
        ({"rank_pattern": {"(": 1}}, "unterminated subpattern"),
        ({"rank_pattern": {"query": 7}}, r"must be \(7, 16\), got \(2, 16\)"),
        ({"alpha_pattern": {"^encoder.*": "x"}}, "alpha must be a finite"),
        ({"alpha_pattern": 3}, "'int' object has no attribute 'items'"),
    ],
)
def test_settings_that_cannot_be_honoured(saved, changes, message):
    (saved / peft_files.HEAD).unlink()
    config = json.loads((saved / peft_files.CONFIG).read_text()) | changes
    forge(saved, json.dumps({k: v for k, v in config.items() if v is not ...}))
    model = small()
    before = snapshot(model)
    assert re.search(message, str(outcome(model, saved)))
    assert same(before, snapshot(model))


def test_the_settings_are_peft_s_own(tmp_path):
    """What is constant in them is what PEFT writes for plain LoRA."""
    folder = tmp_path / "new" / "deep"
    save_adapter(adapted(rank=2, alpha=3.0), "a", folder)
    text = (folder / peft_files.CONFIG).read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2), "a text for people"
    with safe_open(folder / peft_files.WEIGHTS, "pt") as stored:
        assert stored.metadata()["format"] == "pt"
    model = get_peft_model(small(), LoraConfig(r=2, lora_alpha=3, target_modules=QUERY))
    model.save_pretrained(tmp_path / "peft")
    theirs = json.loads((tmp_path / "peft" / peft_files.CONFIG).read_text())
    ours = "target_modules", "rank_pattern", "alpha_pattern", "base_model_name_or_path"
    for key in config.keys() - set(ours):
        assert config[key] == theirs[key], key
    assert set(ours) <= theirs.keys()


def test_a_file_without_alpha_has_peft_s_default(tmp_path, ids):
    peft_s(tmp_path, r=2, lora_alpha=LoraConfig().lora_alpha)
    config = json.loads((tmp_path / peft_files.CONFIG).read_text())
    del config["lora_alpha"]
    (tmp_path / peft_files.CONFIG).write_text(json.dumps(config))
    model = small()
    load_adapter(model, tmp_path, "x")
    place = next(iter(parts_of(model)[0].values()))
    assert place.adapters["x"].alpha == LoraConfig().lora_alpha


def forge(folder, config, change=None):
    """Other settings, with files that say that they belong together."""
    (folder / peft_files.CONFIG).write_text(config)
    tensors = load_file(folder / peft_files.WEIGHTS)
    tensors = change(tensors) if change else tensors
    plain = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(plain, folder / peft_files.WEIGHTS)


def test_the_forged_file_would_have_been_read(saved):
    """The refusals above are not those of `forge`."""
    (saved / peft_files.HEAD).unlink()
    forge(saved, (saved / peft_files.CONFIG).read_text())
    model = small()
    assert load_adapter(model, saved) == "mine"
    query, value = (parts_of(model)[0][f"{SELF}.{n}"] for n in ("query", "value"))
    assert [layer.adapters["mine"].rank for layer in (query, value)] == [2, 3]


# --- what is in the tensors ---

SHORT = f"{SELF}.query.lora_A.weight"
FIRST = f"base_model.model.{SHORT}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {FIRST: t[FIRST][:1]}, r"must be \(2, 16\), got \(1, 16\)"),
        (lambda t: t | {FIRST: t[FIRST].T}, r"must be \(2, 16\), got \(16, 2\)"),
        (lambda t: t | {FIRST: t[FIRST].flatten()}, r"must be \(2, 16\), got \(32,\)"),
        (
            lambda t: t | {FIRST: t[FIRST] * math.nan},
            f"{peft_files.plain_name(FIRST)}: numbers that are not fini",
        ),
        (lambda t: t | {FIRST: t[FIRST] + math.inf}, "not finite"),
        (lambda t: t | {FIRST: t[FIRST].double() + 1e300}, "not finite"),
        (lambda t: t | {"x": t[FIRST]}, "alone has x, the model alone has none"),
        (lambda t: t | {FIRST + "x": t[FIRST]}, "it alone has base_model"),
        (
            lambda t: {k: v for k, v in t.items() if k != FIRST},
            f"(?m)has none, .* {SHORT}$",
        ),
        (lambda t: {}, "model alone has encoder"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    (saved / peft_files.HEAD).unlink()
    forge(saved, (saved / peft_files.CONFIG).read_text(), change)
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, saved)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64]
)
def test_other_precisions_are_read(saved, dtype):
    (saved / peft_files.HEAD).unlink()
    config = (saved / peft_files.CONFIG).read_text()
    forge(saved, config, lambda t: {k: v.to(dtype) for k, v in t.items()})
    model, expected = small(), load_file(saved / peft_files.WEIGHTS)[FIRST]
    load_adapter(model, saved)
    A = model.encoder.layer[0].attention.self.query.adapters["mine"].A
    assert A.dtype == torch.float32 and torch.equal(A, expected.float())


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float64])
def test_a_base_in_another_precision(saved, base):
    model = small().to(base)
    load_adapter(model, saved, head=head())
    part = model.encoder.layer[0].attention.self.query.adapters["mine"]
    assert part.A.dtype == torch.promote_types(base, torch.float32)


def test_a_model_of_another_size_or_kind(saved):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    wide = BertConfig(vocab_size=50, intermediate_size=24, **shape)
    message = "target_modules=.* names none of 0"
    with pytest.raises(ValueError, match=message):
        load_adapter(nn.Sequential(nn.Linear(16, 16)), saved, head=head())
    with pytest.raises(ValueError, match=r"must be \(2, 32\), got \(2, 16\)"):
        load_adapter(BertModel(wide, add_pooling_layer=False), saved, head=head())


# --- files that are cut, hostile, of two savings ---


def outcome(model, folder, **settings):
    """The error with which an adapter is refused, or None."""
    try:
        load_adapter(model, folder, "x", **settings)
    except Exception as fault:
        return fault


def refused(folder, given=None):
    """Why these files are refused, None if they are not; the model stays as it is."""
    model, given = small(), given or head()
    before = snapshot(model, given)
    fault = outcome(model, folder, head=given)
    assert fault is None or same(before, snapshot(model, given))
    return fault and (str(fault) or type(fault).__name__)


@pytest.mark.parametrize(
    "name", [peft_files.CONFIG, peft_files.WEIGHTS, peft_files.HEAD]
)
def test_a_file_cut_anywhere_is_refused(saved, name):
    whole = (saved / name).read_bytes()
    places = [0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1]
    for length in [*places, *random.Random(0).sample(range(len(whole)), 20)]:
        (saved / name).write_bytes(whole[:length])
        assert refused(saved), length
    (saved / name).unlink()
    message = (
        "No such file" if name == peft_files.HEAD else f"holds no {name}; it holds"
    )
    assert message in refused(saved) and name in refused(saved)
    (saved / name).write_bytes(whole)
    assert refused(saved) is None


def test_hundreds_of_mutated_files(saved, ids):
    """Any byte changed, or bytes put in or taken out: refused, or read as it stands."""
    model = small()
    load_adapter(model, saved, "x", head=head())
    set_adapter(model, "x")
    expected = out(model, ids)
    draw, kinds = (
        random.Random(0),
        [peft_files.CONFIG, peft_files.WEIGHTS, peft_files.HEAD],
    )
    originals = {name: (saved / name).read_bytes() for name in kinds}
    caught = 0
    for i in range(400):
        name = kinds[i % 3]
        data = bytearray(originals[name])
        for _ in range(draw.choice([1, 1, 2, 8])):
            at = draw.randrange(len(data))
            kind = draw.choice(["change", "put in", "take out"])
            if kind == "change":
                data[at] = draw.randrange(256)
            elif kind == "put in":
                data[at:at] = draw.randbytes(draw.choice([1, 9]))
            else:
                del data[at : at + draw.choice([1, 9])]
        (saved / name).write_bytes(data)
        message = refused(saved)
        caught += message is not None
        if name == peft_files.CONFIG and not message:  # no other function
            model = small()
            load_adapter(model, saved, "x", head=head())
            set_adapter(model, "x")
            assert torch.equal(out(model, ids), expected)
        (saved / name).write_bytes(originals[name])
    assert caught > 200


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    data=st.binary(max_size=200),
    name=st.sampled_from([peft_files.WEIGHTS, peft_files.CONFIG]),
)
def test_any_bytes_are_refused(saved, data, name):
    original = (saved / name).read_bytes()
    (saved / name).write_bytes(data)
    try:
        assert refused(saved)
    finally:
        (saved / name).write_bytes(original)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=9), c),
    max_leaves=6,
)
KEYS = ["peft_type", "r", "lora_alpha", "bias", "target_modules", "exclude_modules"]
KEYS += ["rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "x"]


@pytest.mark.filterwarnings("ignore:lora_dropout")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(key=st.sampled_from(KEYS), value=JSON)
def test_any_value_of_a_setting(saved, key, value):
    """Refused, or something that means plain LoRA."""
    original = (saved / peft_files.CONFIG).read_text()
    (saved / peft_files.HEAD).unlink(missing_ok=True)
    forge(saved, json.dumps(json.loads(original) | {key: value}))
    model = small()
    before = snapshot(model)
    try:
        assert outcome(model, saved) is None or same(before, snapshot(model))
    finally:
        forge(saved, original)


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize(
    "name", [peft_files.WEIGHTS, peft_files.CONFIG, peft_files.HEAD]
)
def test_nothing_is_unpickled(saved, name):
    trap, original = saved / "trap", (saved / name).read_bytes()
    (saved / name).write_bytes(pickle.dumps(Planted(str(trap))))
    assert refused(saved) and not trap.exists()
    torch.save(Planted(str(trap)), saved / name)
    assert refused(saved) and not trap.exists()
    for other in ("adapter_model.bin", "pytorch_model.bin"):
        torch.save({FIRST: Planted(str(trap))}, saved / other)
    (saved / name).write_bytes(original)
    (saved / peft_files.WEIGHTS).unlink()
    assert "; it holds adapter_config.json, adapter_model.bin" in refused(saved)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**5, "maximum recursion depth exceeded while decoding a JSON array"),
        ("3", "'int' object is not iterable"),
        ("", "Expecting value: line 1 column 1"),
        ("{}", "peft_type must be ['LORA'] for plain LoRA, got None"),
    ],
)
def test_settings_that_are_none(saved, text, message):
    (saved / peft_files.CONFIG).write_text(text)
    assert message in refused(saved)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1, 10])
def test_a_head_that_claims_to_be_long(saved, length):
    data = (saved / peft_files.WEIGHTS).read_bytes()
    (saved / peft_files.WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])
    assert "Error while deserializing header" in refused(saved)


def test_files_of_two_savings_are_refused(tmp_path):
    for rank in (2, 3):
        save_adapter(adapted(rank=rank), "a", tmp_path / str(rank), head=head(rank))
        save_adapter(adapted(alpha=rank), "a", tmp_path / f"alpha {rank}", head())
    for name in (peft_files.CONFIG, peft_files.WEIGHTS):
        mixed = tmp_path / f"alpha {3}" / name
        original = mixed.read_bytes()
        mixed.write_bytes((tmp_path / "alpha 2" / name).read_bytes())
        assert f"{peft_files.CONFIG} are of two savings" in refused(mixed.parent)
        mixed.write_bytes(original)
    assert refused(tmp_path / "alpha 3") is None
    other = (tmp_path / "2" / peft_files.HEAD).read_bytes()
    (tmp_path / "3" / peft_files.HEAD).write_bytes(other)
    assert "are of two savings" in refused(tmp_path / "3")


# --- saving ---


@pytest.mark.parametrize("step", range(6))
def test_a_crash_while_saving(saved, ids, monkeypatch, step):
    """At any step: what is there afterwards is the old one, or refused, or the new."""
    model = small()
    load_adapter(model, saved, "old", head=head())
    set_adapter(model, "old")
    old, new = out(model, ids), adapted(rank=2, rank_pattern={r".*value": 3}, alpha=3.0)
    set_adapter(new, "a")
    count = iter(range(100))
    for kind in ("write_bytes", "replace"):
        original = getattr(type(saved), kind)

        def crash(self, *arguments, original=original):
            if next(count) == step:
                if isinstance(arguments[0], bytes):
                    original(self, arguments[0][:50])
                raise OSError("no space left on device")
            return original(self, *arguments)

        monkeypatch.setattr(type(saved), kind, crash)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(new, "a", saved, head=head(2))
    monkeypatch.undo()
    again = small()
    fault = outcome(again, saved, head=head())
    if step > 3:  # between the replacements of two files
        assert "of two savings" in str(fault)
    else:
        set_adapter(again, "x")
        assert torch.equal(out(again, ids), old)
    save_adapter(new, "a", saved, head=head(2))
    load_adapter(again, saved, "y", head=head())
    set_adapter(again, "y")
    assert torch.equal(out(again, ids), out(new, ids))


def test_saving_the_same_settings_again_leaves_old_or_new(saved, monkeypatch, ids):
    """While one trains, only the numbers change: then no crash leaves a mixture."""
    (saved / peft_files.HEAD).unlink()
    model = small()
    load_adapter(model, saved)
    set_adapter(model, "mine")
    old = out(model, ids)
    new = adapted(rank=2, rank_pattern={r".*value": 3})
    set_adapter(new, "a")
    for step in range(2):
        count, original = iter(range(9)), type(saved).replace

        def crash(self, target, count=count, original=original, step=step):
            if next(count) == step:
                raise OSError("power cut")
            return original(self, target)

        monkeypatch.setattr(type(saved), "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            save_adapter(new, "a", saved)
        monkeypatch.undo()
        again = small()
        load_adapter(again, saved, "x")
        set_adapter(again, "x")
        got = out(again, ids)
        assert torch.equal(got, old) or torch.equal(got, out(new, ids))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_saved(saved, value):
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    model = adapted()
    model.encoder.layer[0].attention.self.query.adapters["a"].B.data[0] = value
    with pytest.raises(ValueError, match="cannot save .*lora_B.weight: numbers that"):
        save_adapter(model, "a", saved, head=head())
    broken = head()
    broken[0].weight.data[0] = value
    with pytest.raises(ValueError, match="cannot save 0.weight: numbers that are not"):
        save_adapter(adapted(), "a", saved, head=broken)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_where_it_cannot_be_saved(saved, tmp_path):
    with pytest.raises(ValueError, match="there is no adapter 'b'; there are: 'a'"):
        save_adapter(adapted(), "b", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError, match=peft_files.CONFIG):
        save_adapter(adapted(), "a", saved / peft_files.CONFIG)
    with pytest.raises(ValueError, match="holds the head of an earlier saving"):
        save_adapter(adapted(), "a", saved)
    with pytest.raises(AttributeError, match="'int' object has no attribute"):
        save_adapter(adapted(), "a", saved, head=3)


def test_only_the_adapter_is_in_the_file(tmp_path):
    model = adapted(rank=2)
    save_adapter(model, "a", tmp_path)
    tensors = load_file(tmp_path / peft_files.WEIGHTS)
    assert sum(t.numel() for t in tensors.values()) == 4 * 2 * (16 + 16)
    assert all(re.fullmatch(r".*\.lora_[AB]\.weight", name) for name in tensors)


# --- the head ---


def test_a_head_is_saved_beside_it(saved):
    given = head(7)
    load_adapter(small(), saved, head=given)
    for key, value in head(1).state_dict().items():
        assert torch.equal(given.state_dict()[key], value)


def test_a_head_may_count_and_may_share(tmp_path):
    """Whole numbers are kept, and tensors that share memory are written one by one."""
    first, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    first(torch.randn(5, 3))
    first.bias = first.weight
    save_adapter(adapted(), "a", tmp_path / "x", head=first)
    load_adapter(small(), tmp_path / "x", head=second)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value)
    assert second.num_batches_tracked == 1


def test_a_head_is_neither_forgotten_nor_made_up(saved):
    model = small()
    with pytest.raises(ValueError, match="holds a head: give a module, head="):
        load_adapter(model, saved)
    assert "must be (4, 16), got (3, 16)" in refused(saved, head(width=4))
    message = "0.bias, 1.bias, 0.weight, 1.weight, the model alone has bias, weight"
    assert f"it alone has {message}" in refused(saved, nn.LayerNorm(3))
    (saved / peft_files.HEAD).unlink()
    assert "head.safetensors" in refused(saved)
    with pytest.raises(AttributeError, match="'str' object has no attribute 'state_di"):
        load_adapter(model, saved, head="x")


@pytest.mark.parametrize("name", ["a.b", "mine", "keys"])
def test_the_name_of_what_is_loaded(saved, name):
    model = small()
    load_adapter(model, saved, "mine", head=head())
    before = snapshot(model)
    with pytest.raises(ValueError, match="name |an adapter 'mine' already"):
        load_adapter(model, saved, name if name != "mine" else None, head=head())
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", [peft_files.CONFIG, peft_files.WEIGHTS])
def test_a_broken_file_is_named_by_its_folder(saved, name):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: len(data) // 2])
    faults = ValueError, SafetensorError
    with pytest.raises(faults, match=re.escape(f"was read from {saved}")):
        load_adapter(small(), saved)


class Dotted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})
        self.a_b, self.c = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.c(self.a_b(self.a["b"](x)))


@pytest.mark.parametrize("pattern", ["a.b", "^a.b", r"a\.b", "^a_b", "x.a.b", "b"])
@pytest.mark.parametrize("targets", [["b", "a_b", "c"], "a.b|c"])
def test_a_dot_in_a_pattern_is_any_character(tmp_path, pattern, targets):
    model, x = Dotted(), torch.ones(1, 4)
    settings = {"target_modules": targets, "init_lora_weights": False}
    settings |= {"alpha_pattern": {pattern: 32}, "r": 2, "lora_alpha": 2}
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path, "one")
    set_adapter(model, "one")
    torch.testing.assert_close(model(x), theirs(x))


def test_patterns_of_a_stranger_that_take_long(saved):
    changes = {"r" + "." * n + "x": 4 for n in range(1, 20)}
    names = [f"layer{i}" for i in range(60_000)]
    with pytest.raises(ValueError, match="rank_pattern has expressions too costly"):
        peft_files.pattern_values("rank_pattern", {"rank_pattern": changes}, names, 4)


def test_settings_that_peft_has_by_default(tmp_path, ids):
    model, twin = adapted(rank=8), small()
    save_adapter(model, "a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    del config["r"], config["target_modules"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(twin, tmp_path, "one")
    for net, name in ((model, "a"), (twin, "one")):
        set_adapter(net, name)
    torch.testing.assert_close(out(twin, ids), out(model, ids))


def test_a_head_of_other_settings_changes_nothing(tmp_path):
    def new(alpha):
        return nn.Sequential(nn.Sequential(LoRALinear(nn.Linear(4, 4), 2, alpha)))

    model, twin = (nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    add_adapter(model, "one")
    save_adapter(model, "one", tmp_path, new(8.0))
    own = new(4.0)
    before = snapshot(twin, own)
    with pytest.raises(RuntimeError, match=r"\s0\.0 was saved with"):
        load_adapter(twin, tmp_path, "one", own)
    assert same(before, snapshot(twin, own))
