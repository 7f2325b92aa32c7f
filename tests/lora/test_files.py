"""`lora.files`: what is written, what is refused, hundreds of broken files, crashes."""

import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file
from test_adapters import awake, mlp, refused, same, snapshot, three, wrapped
from torch import nn

from lora import LoRALinear, files
from lora.adapters import load_adapter, save_adapter, set_adapter
from lora.files import CONFIG, WEIGHTS


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of `mlp`, whose layers have different ranks."""
    model = three(mlp(), None)
    save_adapter(model, "a", tmp_path)
    return tmp_path


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def rewrite(folder, **fields):
    """Change the settings of a file; without its checksum, as PEFT writes it."""
    config = {**config_of(folder), **fields}
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(save(tensors))


def test_what_is_written(saved):
    assert {p.name for p in saved.iterdir()} == {WEIGHTS, CONFIG}
    tensors = load((saved / WEIGHTS).read_bytes())
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        "base_model.model.0.lora_A.weight": (2, 5),
        "base_model.model.0.lora_B.weight": (7, 2),
        "base_model.model.2.lora_A.weight": (2, 7),
        "base_model.model.2.lora_B.weight": (3, 2),
    }
    config = config_of(saved)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 3, "LORA")
    assert re.fullmatch(config["target_modules"], "0")
    assert re.fullmatch(config["target_modules"], "2")
    assert not re.fullmatch(config["target_modules"], "1.0")
    assert (saved / WEIGHTS).stat().st_mode & 0o777 == (
        saved / CONFIG
    ).stat().st_mode & (0o777)


def test_names_that_end_alike_are_told_apart(tmp_path):
    updates = {
        n: LoRALinear(nn.Linear(3, 3), r, a)
        for n, r, a in (
            ("q", 2, 1.0),
            ("x.q", 3, 2.0),
            ("y.q", 2, 1.0),
            ("z-1.q", 1, 4.5),
        )
    }
    files.write_adapter(tmp_path, "n", updates)
    name, found = files.read_adapter(tmp_path, 10**6)
    assert name == "n" and found.keys() == updates.keys()
    for n, (A, B, alpha) in found.items():
        assert torch.equal(A, updates[n].A) and torch.equal(B, updates[n].B)
        assert alpha == updates[n].alpha


@given(
    rank=st.integers(1, 5),
    alpha=st.floats(-100, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_round_trips(rank, alpha, dtype, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round")
    torch.manual_seed(seed)
    update = LoRALinear(nn.Linear(4, 3, dtype=dtype), rank, alpha)
    nn.init.normal_(update.B)
    files.write_adapter(folder, "x", {"a.b": update})
    _, found = files.read_adapter(folder, 10**6)
    A, B, back = found["a.b"]
    assert torch.equal(A, update.A) and torch.equal(B, update.B) and back == alpha


def test_the_default_name(saved, tmp_path):
    model = mlp()
    assert load_adapter(model, saved) == "a"
    assert load_adapter(model, str(saved), "other") == "other"
    rewrite(saved)  # as PEFT writes it: without a name
    saved.rename(tmp_path.with_name("folder"))
    assert load_adapter(model, tmp_path.with_name("folder")) == "folder"


# --- What is refused by its name ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("use_dora", True), ("bias", "all"), ("bias", "lora_only")),
        *(("modules_to_save", ["classifier"]), ("fan_in_fan_out", True)),
        *(("lora_bias", True), ("trainable_token_indices", [1])),
        *(("layer_replication", [[0, 1]]), ("target_parameters", ["w"])),
        *(("use_qalora", True), ("loftq_config", {"loftq_bits": 4})),
        *(("alora_invocation_tokens", [1]), ("megatron_config", {"a": 1})),
        *(("init_lora_weights", "pissa"), ("init_lora_weights", "olora")),
        *(("init_lora_weights", "pissa_niter_4"), ("eva_config", {"rho": 2})),
        *(("peft_type", "ADALORA"), ("peft_type", None), ("use_bdlora", {"n": 1})),
        *(("something_new", 1), ("r", 0), ("r", "8"), ("r", 2.0), ("r", True)),
        *(("lora_alpha", float("nan")), ("lora_alpha", "16"), ("lora_alpha", None)),
        *(("use_rslora", "yes"), ("rank_pattern", [1]), ("rank_pattern", {"0": "2"})),
        *(("alpha_pattern", {"0": float("inf")}), ("alpha_pattern", {"(": 1})),
        *(("alpha_pattern", {"(a+)+$": 1}), ("alpha_pattern", {"a?" * 30: 1})),
        *(("rank_pattern", {".*.*.*.*x": 1}), ("lora_dropout", "0.1")),
        *(("alpha_pattern", {str(i): 1 for i in range(5000)}), ("lora_dropout", -1)),
        ("alpha_pattern", {"x" * 2000: 1}),
    ],
)
def test_settings_that_cannot_be_honoured(saved, field, value):
    rewrite(saved, **{field: value})
    start = time.process_time()
    with refused(model := three(mlp(), None), field.removesuffix("_pattern")):
        load_adapter(model, saved, "new")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("use_dora", False), ("bias", "none"), ("modules_to_save", None)),
        *(("modules_to_save", []), ("loftq_config", {}), ("init_lora_weights", False)),
        *(("init_lora_weights", "gaussian"), ("task_type", "FEATURE_EXTRACTION")),
        *(("base_model_name_or_path", "x"), ("target_modules", ["(a+)+"])),
        *(("something_new", None), ("rank_pattern", None), ("peft_version", "9")),
        *(("alpha_pattern", {r"layer\.\d+\.q": 9}), ("use_rslora", None)),
    ],
)
def test_settings_that_change_nothing(saved, field, value):
    one, two = mlp(), mlp()
    load_adapter(one, saved)
    rewrite(saved, **{field: value})
    load_adapter(two, saved, "a")
    for model in (one, two):
        set_adapter(model, "a")
    assert torch.equal(one(torch.ones(2, 5)), two(torch.ones(2, 5)))


def test_dropout_is_said_not_to_act(saved):
    rewrite(saved, lora_dropout=0.1)
    with pytest.warns(UserWarning, match="lora_dropout=0.1"):
        load_adapter(mlp(), saved, "a")


# --- Broken, hostile, oversized, foreign ---


class Bomb:
    def __reduce__(self):
        return os.abort, ()


GOOD = {
    "base_model.model.0.lora_A.weight": torch.ones(2, 5),
    "base_model.model.0.lora_B.weight": torch.ones(7, 2),
}
A, B = GOOD
NAN = torch.full((2, 5), float("nan"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no tensor"),
        ({A: GOOD[A]}, "no lora_B"),
        ({B: GOOD[B]}, "no lora_A"),
        (GOOD | {A: NAN}, "finite"),
        (GOOD | {A: GOOD[A].int()}, "no factor"),
        (GOOD | {A: GOOD[A].to(torch.float8_e4m3fn)}, "finite, in 16"),
        (GOOD | {A: GOOD[A].cfloat()}, "no factor"),
        (GOOD | {A: torch.ones(2, 5, 1)}, "no factor"),
        (GOOD | {A: torch.ones(3, 5)}, "rank 2"),
        (GOOD | {A: torch.ones(0, 5), B: torch.ones(7, 0)}, "rank 2"),
        (GOOD | {A: torch.ones(2, 6)}, "must update (7, 5)"),
        (GOOD | {A: GOOD[A].double()}, "torch.float32"),
        (GOOD | {"base_model.model.0.lora_magnitude_vector": torch.ones(7)}, "magnit"),
        (GOOD | {"base_model.model.0.lora_B.bias": torch.ones(7)}, "bias"),
        (GOOD | {"classifier.weight": torch.ones(7, 7)}, "classifier"),
        (GOOD | {"base_model.model.e.lora_embedding_A": torch.ones(2, 9)}, "embedd"),
        ({k.replace(".0.", ".9."): t for k, t in GOOD.items()}, "no layer"),
        (
            GOOD | {k.replace(".0.", ".1."): t + 0 for k, t in GOOD.items()},
            "'1' in",
        ),
        ({k.replace(".0.", ".0/../.0."): t for k, t in GOOD.items()}, "no layer"),
    ],
)
def test_tensors_that_are_refused(saved, tensors, message):
    (saved / WEIGHTS).write_bytes(save(tensors))
    with refused(model := three(mlp(), None), message):
        load_adapter(model, saved, "new")


def header(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\0" * 8, b"\xff" * 8, b"PK\3\4", pickle.dumps(Bomb()), b"\0" * 999),
        *(header(b"{}"), header(b"[]"), header(b"null"), header(b"{" * 9999)),
        (2**63).to_bytes(8, "little") + b"{}",
        header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        header(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        header(b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', b"1"),
        header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"1234"),
    ],
)
def test_weights_that_are_no_safetensors(saved, data):
    (saved / WEIGHTS).write_bytes(data)
    with refused(model := three(mlp(), None)):
        load_adapter(model, saved, "new")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"[]", b"3", b"null", b"{", b"\xff\xfe\xff", b"\0" * 50, b'"LORA"'),
        *(b"[" * 200_000, b'{"r": ' + b"9" * 6000 + b"}", pickle.dumps(Bomb())),
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}',
        b" " * (2**20 + 1),
    ],
)
def test_settings_that_are_no_settings(saved, data):
    (saved / CONFIG).write_bytes(data)
    with refused(model := three(mlp(), None)):
        load_adapter(model, saved, "new")


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_missing_files_and_files_that_are_none(saved, file):
    model = three(mlp(), None)
    path = saved / file
    path.unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with refused(model, file, "never read"):
        load_adapter(model, saved, "new")
    path.mkdir()
    with refused(model, file):
        load_adapter(model, saved, "new")
    path.rmdir(), os.mkfifo(path)  # to open it would wait for ever
    with refused(model, file):
        load_adapter(model, saved, "new")
    with refused(model):
        load_adapter(model, saved / "nowhere", "new")
    for folder in (None, 3):
        with refused(model, kind=TypeError):
            load_adapter(model, folder, "new")


def test_a_file_larger_than_any_adapter_is_not_read(saved):
    with (saved / WEIGHTS).open("r+b") as file:
        file.truncate(2**36)  # sparse: 64 GB that are not there
    with refused(model := mlp(), "larger than"):
        load_adapter(model, saved, "new")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    other = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    save_adapter(three(other, None), "a", tmp_path)
    with refused(model := mlp(), "0 in", "must update (7, 5)"):
        load_adapter(model, tmp_path)


def test_factors_that_are_not_finite_are_not_written(tmp_path):
    model = three(mlp(), None)
    wrapped(model)["2"].adapters["a"].B.data[0, 0] = float("inf")
    with refused(model, "B of 2", "finite"):
        save_adapter(model, "a", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def mutants(data, count, seed):
    """Broken copies of `data`: cut, longer, bytes changed, parts moved."""
    draw = random.Random(seed)
    for _ in range(count):
        new, i, j = bytearray(data), *(draw.randrange(len(data)) for _ in range(2))
        how = draw.randrange(6)
        if how == 0:
            del new[i:]
        elif how == 1:
            new[i] ^= 1 << draw.randrange(8)
        elif how == 2:
            new[i] = draw.randrange(256)
        elif how == 3:
            del new[min(i, j) : max(i, j)]
        elif how == 4:
            new[i:i] = draw.randbytes(draw.randrange(1, 40))
        else:
            new[:8] = draw.randrange(2**64).to_bytes(8, "little")
        if bytes(new) != data:
            yield bytes(new)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_hundreds_of_broken_files(saved, file):
    """Each is refused and changes nothing, or it means the very same adapter."""
    model, good, loaded = mlp(), (saved / file).read_bytes(), 0
    kinds = set()
    want = three(mlp(), None)
    set_adapter(want, "a")
    before, x = snapshot(model), torch.ones(2, 5)
    for data in mutants(good, 400, 1):
        (saved / file).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                name = load_adapter(model, saved)
        except (ValueError, TypeError) as fault:
            kinds.add(type(fault))
            assert same(snapshot(model), before)
            continue
        loaded += 1
        set_adapter(model, name)
        assert torch.equal(model(x), want(x))
        model = mlp()
        before = snapshot(model)
    assert loaded < 200 and kinds <= {ValueError, TypeError}


# --- Crashes while writing ---


def crash(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("when", ["open", "fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_files(saved, file, when, monkeypatch):
    model = three(mlp(), None)
    for layer in wrapped(model).values():
        layer.adapters["a"].B.data += 1
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    calls, stop = [], [WEIGHTS, CONFIG].index(file)

    def dying(real):
        def call(*arguments, **keywords):
            calls.append(1)
            return crash() if len(calls) > stop else real(*arguments, **keywords)

        return call

    if when == "fsync":
        monkeypatch.setattr(os, "fsync", dying(os.fsync))
    else:
        kind = type(saved)
        monkeypatch.setattr(kind, when, dying(getattr(kind, when)))
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, "a", saved)
    monkeypatch.undo()
    assert {p.name for p in saved.iterdir()} == {WEIGHTS, CONFIG}  # nothing beside them
    if (when, file) != ("replace", CONFIG):
        assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    load_adapter(mlp(), saved)


def test_two_halves_of_two_adapters_are_told_apart(saved, tmp_path):
    """What a crash between the two replacements leaves."""
    other = mlp()
    three(other, None)
    for layer in wrapped(other).values():
        layer.adapters["a"].alpha = 99
    save_adapter(other, "a", tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).replace(saved / WEIGHTS)
    with refused(model := mlp(), "do not belong together"):
        load_adapter(model, saved)


def test_a_killed_process_leaves_the_old_files(saved):
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from test_adapters import mlp, three
from lora.adapters import save_adapter
os.fsync = lambda _: os._exit(9)
save_adapter(three(mlp(), None), "b", {str(saved)!r})
"""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 9
    assert {n: (saved / n).read_bytes() for n in before} == before
    assert load_adapter(mlp(), saved) == "a"


def test_other_files_in_the_folder_are_left_alone(saved):
    save_file({"weight": torch.ones(2, 2)}, saved / "head.safetensors")
    save_adapter(awake(three(mlp(), None), 5), "b", saved)
    assert (saved / "head.safetensors").exists()
    assert load_adapter(mlp(), saved) == "b"
