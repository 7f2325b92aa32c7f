"""`lora.gguf_files` against `gguf`, `transformers` and llama.cpp itself.

Mostly on files of two narrow blocks with random numbers; the real one is read once.
"""

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from gguf import GGMLQuantizationType as Kind
from torch import nn
from transformers import AutoModelForCausalLM

from lora import (
    LoRALinear,
    bases,
    count_total,
    freeze_all,
    inject_lora,
    merge_lora,
    variants,
)
from lora.adapters import Adapters, add_adapter, disable_adapters, set_adapter
from lora.gguf_files import (
    Q4Linear,
    load_gguf_adapter,
    load_llama,
    read_gguf_adapter,
    read_header,
    read_rows,
    unpack,
    write_gguf_adapter,
)
from lora.layers import LoRAEmbedding
from lora.study import chat
from tests.lora.models import assert_unchanged, awake, snapshot

WIDTH, INNER, HEADS, GROUPS, BYTES = 64, 96, 4, 2, 256
IDS = torch.tensor([[65, 66, 7, 200, 31, 90, 91, 92]])
SHAPES = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH)}
SHAPES |= {"attn_v": (WIDTH // 2, WIDTH), "attn_output": (WIDTH, WIDTH)}
SHAPES |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH)}
SHAPES |= {"ffn_down": (WIDTH, INNER)}
FIELDS = {"block_count": 2, "embedding_length": WIDTH, "feed_forward_length": INNER}
FIELDS |= {"attention.head_count": HEADS, "attention.head_count_kv": GROUPS}
FIELDS |= {"context_length": 128, "rope.dimension_count": WIDTH // HEADS}


def tiny(path, kind=Kind.F32, fields=(), change=None):
    """A file of two blocks, its matrices in `kind`; `change` changes its tensors."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)  # noqa: E731
    tensors = {"token_embd.weight": (draw(BYTES, WIDTH), Kind.Q8_0)}
    if kind == Kind.F32:
        tensors["token_embd.weight"] = draw(BYTES, WIDTH), kind
    for i in range(2):
        for part, shape in SHAPES.items():
            tensors[f"blk.{i}.{part}.weight"] = draw(*shape), kind
        for part in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{part}.weight"] = draw(WIDTH), Kind.F32
    tensors["output_norm.weight"] = draw(WIDTH), Kind.F32
    if change:
        change(tensors)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for key, value in (FIELDS | dict(fields)).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([chr(256 + i) for i in range(BYTES)])
    writer.add_token_types([1] * BYTES)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for name, (numbers, how) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(numbers, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path):
    return tiny(tmp_path / "tiny.gguf", Kind.Q4_1)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def adapted(model, rank=3, alpha=6.0):
    freeze_all(model)
    for i, wrapper in enumerate(inject_lora(model, rank=rank, alpha=alpha)):
        awake(wrapper, i)
    return model


def served(base, adapter=None, scale=1.0):
    """The log-probabilities of the next token, (BYTES,), by llama.cpp."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(base), 128, -1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = 1
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.flash_attn_type = off  # it rounds to half precision
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), scale)]
    asked = {"prompt": IDS[0].tolist(), "n_predict": 1, "n_probs": BYTES}
    answer = xllamacpp.Server(params).handle_completions(asked | {"temperature": 0.0})
    found = torch.full((BYTES,), -torch.inf)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


# --- Blocks ---


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_numbers_are_those_of_gguf_bit_for_bit(tmp_path, kind):
    path = tiny(tmp_path / "tiny.gguf", kind)
    _, tensors = read_header(path)
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == [*tensors]
    for theirs in reader.tensors:
        stored = tensors[theirs.name]
        ours = unpack(read_rows(path, stored), stored.kind)
        expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        assert ours.shape == stored.shape
        assert np.array_equal(ours.numpy(), expected.astype(np.float32))


def test_the_real_file_is_read_as_gguf_and_transformers_read_it():
    file = chat.model_file()
    _, tensors = read_header(file)
    for theirs in gguf.GGUFReader(file).tensors[1:20]:
        stored = tensors[theirs.name]
        ours = unpack(read_rows(file, stored), stored.kind)
        expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        assert np.array_equal(ours.numpy(), expected)
    model = load_llama(file)
    kept = bases.find(model, Q4Linear)
    assert len(kept) == 210
    held = sum(layer.rows.numel() for layer in kept.values())
    assert 8 * held / sum(m.in_features * m.out_features for m in kept.values()) == 5
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)


# --- The layer ---


def test_the_layer_is_the_dense_one_forward_and_backward(file):
    stored = read_header(file)[1]["blk.0.ffn_down.weight"]
    layer = Q4Linear(read_rows(file, stored))
    dense = nn.Linear(INNER, WIDTH, bias=False)
    dense.weight.data = unpack(layer.rows, "Q4_1")
    x = torch.randn(2, 5, INNER)
    grads = []
    for module in (layer, dense):
        leaf = x.clone().requires_grad_()
        (module(leaf) ** 2).sum().backward()
        grads.append((module(x), leaf.grad))
    torch.testing.assert_close(*grads, atol=0, rtol=0)
    assert layer.weight.shape == dense.weight.shape
    assert torch.equal(layer.weight @ x[0].T, dense.weight @ x[0].T)


@pytest.mark.unmutated  # torch.compile cannot trace the switch inside a mutant
def test_a_model_on_stored_weights_compiles(file):
    model = load_llama(file)
    inject_lora(model, targets=r"model\.layers\..*_proj")
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, WIDTH)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_no_dense_weight_is_kept_for_backward(file):
    stored = read_header(file)[1]["blk.0.ffn_down.weight"]
    layer, kept = Q4Linear(read_rows(file, stored)), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        layer(torch.ones(1, INNER, requires_grad=True))
    assert kept == [WIDTH * INNER * 5 // 8]


def test_half_precision_changes_the_products_not_what_is_stored(file):
    model = load_llama(file).half()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.rows.dtype == torch.uint8
    assert layer(torch.ones(1, WIDTH).half()).dtype == torch.float16


def test_a_layer_merges_into_a_plain_one(file):
    model = adapted(load_llama(file))
    before = logits(model)
    merge_lora(model)
    assert not bases.find(model, (LoRALinear, Q4Linear))
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


# --- The model ---


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q4_0, Kind.Q4_1])
@pytest.mark.parametrize("packed", [True, False])
def test_the_model_is_transformers_own(tmp_path, kind, packed):
    file = tiny(tmp_path / "tiny.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    model = load_llama(file, packed)
    is_kept = packed and kind in (Kind.Q4_0, Kind.Q4_1)
    assert len(bases.find(model, Q4Linear)) == 14 * is_kept
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_of_its_own(tmp_path):
    def with_head(tensors):
        tensors["output.weight"] = np.ones((BYTES, WIDTH), np.float32), Kind.F16

    model = load_llama(tiny(tmp_path / "tiny.gguf", change=with_head))
    assert model.lm_head.weight.eq(1).all()
    assert not model.model.embed_tokens.weight.eq(1).all()


# --- Files that are cut, foreign or hostile ---


def test_a_file_cut_anywhere_is_refused(file):
    data = file.read_bytes()
    start = min(stored.start for stored in read_header(file)[1].values())
    for n in [0, 3, 4, 11, 23, *range(24, start, 61), start + 5, len(data) - 1]:
        file.write_bytes(data[:n])
        with pytest.raises(ValueError, match=r"tiny.gguf: .*(cut off|not whole)"):
            load_llama(file)


def replaced(file, old, new):
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))


def test_sizes_are_checked_before_anything_is_allocated(file):
    name = b"blk.0.ffn_down.weight" + struct.pack("<I", 2)
    replaced(file, name + struct.pack("<Q", INNER), name + struct.pack("<Q", 2**50))
    with pytest.raises(ValueError, match="ffn_down.*not whole"):
        load_llama(file)


def test_a_row_that_ends_within_a_block_is_refused(file):
    name = b"blk.0.ffn_down.weight" + struct.pack("<I", 2)
    replaced(file, name + struct.pack("<Q", INNER), name + struct.pack("<Q", 80))
    with pytest.raises(ValueError, match="ffn_down.*not whole"):
        load_llama(file)


def test_a_text_longer_than_the_file_is_refused(file):
    replaced(file, struct.pack("<Q", 4) + b"tiny", struct.pack("<Q", 2**60) + b"tiny")
    with pytest.raises(ValueError, match="cut off"):
        read_header(file)


def test_a_list_longer_than_the_file_is_refused(file):
    entry = struct.pack("<IIQ", 9, 5, BYTES)
    replaced(file, entry, struct.pack("<IIQ", 9, 5, 2**58))
    with pytest.raises(ValueError, match="cut off"):
        read_header(file)


def test_lists_of_lists_are_refused(file):
    replaced(file, struct.pack("<IIQ", 9, 5, BYTES), struct.pack("<IIQ", 9, 9, BYTES))
    with pytest.raises(ValueError, match="unknown type 9"):
        read_header(file)


def test_another_type_is_refused_by_its_name(tmp_path):
    def other(tensors):
        numbers, _ = tensors["blk.1.ffn_up.weight"]
        tensors["blk.1.ffn_up.weight"] = numbers, Kind.BF16

    file = tiny(tmp_path / "tiny.gguf", change=other)
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight is in BF16"):
        load_llama(file)


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        ({"block_count": 10**9}, None, "fewer tensors than blocks"),
        ({"block_count": 1}, None, "blk.1"),
        ({"embedding_length": 128}, None, "misshapen|plain Llama"),
        ({"feed_forward_length": 32}, None, "ffn_down"),
        ({"attention.head_count_kv": 1}, None, "attn_k"),
        ({"rope.dimension_count": 8}, None, "no plain Llama"),
        ({"expert_count": 8}, None, "no plain Llama.*expert_count"),
        ({"attention.head_count": 0}, None, "head_count must be an integer"),
        ({}, lambda t: t.pop("token_embd.weight"), "no token_embd"),
        ({}, lambda t: t.pop("blk.0.attn_v.weight"), "blk.0.attn_v"),
        (
            {},
            lambda t: t.update({"rope_freqs.weight": t["output_norm.weight"]}),
            "rope_freqs",
        ),
        (
            {},
            lambda t: t["blk.0.attn_q.weight"][0].fill(np.nan),
            "blk.0.attn_q.*not finite",
        ),
    ],
)
def test_what_is_no_plain_llama_is_refused(tmp_path, fields, change, message):
    file = tiny(tmp_path / "tiny.gguf", fields=fields, change=change)
    with pytest.raises(ValueError, match=f"tiny.gguf: .*({message})"):
        load_llama(file)


def test_a_scale_that_is_not_finite_is_refused(file):
    start = read_header(file)[1]["blk.0.attn_q.weight"].start
    data = bytearray(file.read_bytes())
    data[start : start + 2] = struct.pack("<e", np.inf)
    file.write_bytes(data)
    with pytest.raises(ValueError, match="scale: numbers that are not finite"):
        load_llama(file)


# --- Adapters ---


def test_llama_cpp_computes_what_is_computed_here(tmp_path):
    file, adapter = tiny(tmp_path / "tiny.gguf"), tmp_path / "adapter.gguf"
    model = load_llama(file)
    base = logits(model)[0, -1].log_softmax(0)
    torch.testing.assert_close(served(file), base, atol=1e-3, rtol=0)
    write_gguf_adapter(adapted(model), adapter)
    ours = logits(model)[0, -1].log_softmax(0)
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(served(file, adapter), ours, atol=1e-3, rtol=0)
    torch.testing.assert_close(served(file, adapter, 0.0), base, atol=1e-3, rtol=0)


def test_layers_of_several_ranks_and_alphas_in_one_file(tmp_path):
    file, adapter = tiny(tmp_path / "tiny.gguf"), tmp_path / "adapter.gguf"
    model = load_llama(file)
    named = {"targets": r".*\.0\..*", "rank": 2, "alpha": 1.0}
    pattern = {r".*q_proj": 5}, {r".*v_proj": 3.0}
    add_adapter(model, "a", **named, rank_pattern=pattern[0], alpha_pattern=pattern[1])
    set_adapter(model, "a")
    for i, layer in enumerate(bases.find(model, Adapters).values()):
        awake(layer.adapters["a"], i)
    write_gguf_adapter(model, adapter, "a")
    ours = logits(model)[0, -1].log_softmax(0)
    torch.testing.assert_close(served(file, adapter), ours, atol=1e-3, rtol=0)


def test_what_trains_beside_it_is_said(file, tmp_path):
    model = adapted(load_llama(file))
    freeze_all(model.lm_head)
    norm = model.model.norm.requires_grad_(True)
    with pytest.warns(UserWarning, match="is not in the file: model.norm.weight$"):
        write_gguf_adapter(model, tmp_path / "a.gguf")
    assert norm.weight.requires_grad


def test_an_adapter_comes_back_as_it_was_written(file, tmp_path):
    model = adapted(load_llama(file))
    write_gguf_adapter(model, tmp_path / "a.gguf")
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "tiny.gguf"]
    other = load_llama(file)
    base = logits(other)
    load_gguf_adapter(other, tmp_path / "a.gguf", "back")
    assert torch.equal(logits(other), base)
    set_adapter(other, "back")
    torch.testing.assert_close(logits(other), logits(model), atol=0, rtol=0)
    with disable_adapters(other):
        assert torch.equal(logits(other), base)
    wrappers = bases.find(model, LoRALinear)
    found = read_gguf_adapter(tmp_path / "a.gguf", load_llama(file))
    assert found.keys() == wrappers.keys()
    for name, (A, B, alpha) in found.items():
        assert torch.equal(A, wrappers[name].A) and torch.equal(B, wrappers[name].B)
        assert alpha == wrappers[name].alpha


def test_an_alpha_of_zero_is_not_written(file, tmp_path):
    model = adapted(load_llama(file), alpha=0.0)
    write_gguf_adapter(model, tmp_path / "a.gguf")
    for _, B, alpha in read_gguf_adapter(tmp_path / "a.gguf", model).values():
        assert B.eq(0).all() and alpha == 1


def write_adapter(path, change=lambda parts: None, **fields):
    model = adapted(load_llama(tiny(path.with_name("tiny.gguf"), Kind.Q4_1)))
    write_gguf_adapter(model, path)
    kept, tensors = read_header(path)
    parts = {n: unpack(read_rows(path, s), s.kind) for n, s in tensors.items()}
    change(parts)
    writer = gguf.GGUFWriter(path, "llama")
    fields = {k: kept[k] for k in ("general.type", "adapter.type")} | fields
    for key, value in fields.items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", kept["adapter.lora.alpha"])
    for name, part in parts.items():
        writer.add_tensor(name, part.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ONE = "blk.0.attn_q.weight.lora_a"


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda p: p.pop(ONE), {}, "do not fit model.layers.0.self_attn.q_proj"),
        (lambda p: p.update({ONE: p[ONE][:, :32]}), {}, "do not fit"),
        (lambda p: p.update({ONE: p[ONE][:2]}), {}, "do not fit"),
        (lambda p: p.update(extra=p[ONE]), {}, "no such layers: extra"),
        (lambda p: p[ONE].fill_(torch.nan), {}, "not finite"),
        (lambda p: p.clear(), {}, "no such layers"),
        (lambda p: None, {"general.type": "model"}, "no plain LoRA"),
        (lambda p: None, {"adapter.type": "ia3"}, "no plain LoRA"),
        (lambda p: None, {"adapter.alora.invocation": "x"}, "no plain LoRA"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(
    tmp_path, file, change, fields, message
):
    write_adapter(tmp_path / "a.gguf", change, **fields)
    model = load_llama(file)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_gguf_adapter(model, tmp_path / "a.gguf", "a")
    assert_unchanged(model, before)


def test_a_cut_adapter_changes_nothing(tmp_path, file):
    write_adapter(tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    model = load_llama(file)
    before = snapshot(model)
    for n in (10, 200, len(data) - 1):
        (tmp_path / "a.gguf").write_bytes(data[:n])
        with pytest.raises(ValueError, match="cut off|not whole"):
            load_gguf_adapter(model, tmp_path / "a.gguf", "a")
    assert_unchanged(model, before)


def test_what_llama_cpp_has_no_place_for_is_not_written(tmp_path, file):
    model = load_llama(file)
    path = tmp_path / "a.gguf"
    with pytest.raises(ValueError, match="no adapter to write"):
        write_gguf_adapter(model, path)
    model.model.other = nn.Linear(4, 4)
    adapted(model)
    with pytest.raises(ValueError, match="model.other has no place"):
        write_gguf_adapter(model, path)
    del model.model.other
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.B[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        write_gguf_adapter(model, path)
    assert not path.exists() and not Path(f"{path}.new").exists()


def test_adapters_are_counted_beside_stored_weights(file):
    model = load_llama(file)
    before = count_total(model)
    adapted(model, rank=2)
    assert count_total(model) == before + 2 * 2 * sum(map(sum, SHAPES.values()))


def test_a_variant_is_written_as_the_update_that_it_is(tmp_path):
    file = tiny(tmp_path / "tiny.gguf", Kind.F32)
    model, twin = load_llama(file), load_llama(file)
    for net in (model, twin):
        freeze_all(net)
    variants.inject(model, variants.PiSSALinear, r".*up_proj", rank=4)
    wrappers = bases.find(model, LoRALinear)
    for i, wrapper in enumerate(wrappers.values()):
        awake(wrapper, i)
    write_gguf_adapter(model, tmp_path / "a.gguf")
    load_gguf_adapter(twin, tmp_path / "a.gguf", "one")
    set_adapter(twin, "one")
    torch.testing.assert_close(logits(twin), logits(model), atol=1e-4, rtol=1e-4)
    other = load_llama(file)
    variants.inject(other, variants.DoRALinear, r".*up_proj")
    with pytest.raises(ValueError, match="DoRA is no s B A"):
        write_gguf_adapter(other, tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_another_architecture_is_not_written_as_a_llama(tmp_path, file):
    model = adapted(load_llama(file))
    model.config.model_type = "qwen2"
    with pytest.raises(ValueError, match="must be a Llama, got qwen2"):
        write_gguf_adapter(model, tmp_path / "a.gguf")


def test_a_lookup_s_adapter_is_not_written(tmp_path, file, monkeypatch):
    monkeypatch.setattr(bases, "REGISTERED", {})
    bases.register(nn.Embedding, lambda weight: weight.T, LoRAEmbedding)
    model = load_llama(file)
    freeze_all(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    inject_lora(model, targets="model.embed_tokens")
    with pytest.raises(TypeError, match="embed_tokens: Embedding takes no rows"):
        write_gguf_adapter(model, tmp_path / "a.gguf")


def test_an_adapter_is_not_put_beside_a_layer_with_a_hook(tmp_path, file):
    write_gguf_adapter(adapted(load_llama(file)), tmp_path / "a.gguf")
    model = load_llama(file)
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, out: 2 * out)
    before = snapshot(model)
    with pytest.raises(TypeError, match="up_proj must be .* has a forward hook"):
        load_gguf_adapter(model, tmp_path / "a.gguf", "one")
    assert_unchanged(model, before)
