"""`lora.memory` against the bytes that real architectures keep for backward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralModel,
    OPTConfig,
    OPTModel,
    PhiConfig,
    PhiModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    Starcoder2Config,
    Starcoder2Model,
)

from lora import count_trainable, freeze_all, inject_lora
from lora.memory import PARTS, SHAPES, Shape, saved_by_a_block, training_memory

WIDTH, RANK, ROWS, LENGTH = 128, 4, 2, 96
OFF = {"dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OFF |= {"residual_dropout": 0.0, "embedding_dropout": 0.0}
# name -> kind, width of keys and values, of the MLP, model, settings.
FITTED = {
    "Llama": ("SwiGLU", 128, 384, LlamaModel, LlamaConfig, {}),
    "BERT": ("GELU", 128, 512, BertModel, BertConfig, OFF),
    "OPT": ("ReLU", 128, 512, OPTModel, OPTConfig, OFF | {"ffn_dim": 512}),
    "Phi": ("GELU in steps", 128, 512, PhiModel, PhiConfig, {}),
}
HELD_OUT = {
    "Mistral": ("SwiGLU", 32, 448, MistralModel, MistralConfig, {}),
    "Qwen2": ("SwiGLU", 64, 640, Qwen2Model, Qwen2Config, {}),
    "Qwen3": ("SwiGLU", 64, 640, Qwen3Model, Qwen3Config, {"head_dim": 32}),
    "Gemma": ("SwiGLU", 128, 512, GemmaModel, GemmaConfig, {"head_dim": 32}),
    "GPT-NeoX": ("GELU", 128, 512, GPTNeoXModel, GPTNeoXConfig, {}),
    "StarCoder2": ("GELU", 32, 512, Starcoder2Model, Starcoder2Config, OFF),
}


def saved(model, call):
    """Bytes that autograd saves, those of the model's own tensors left out."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def keep(tensor):
        seen[tensor.untyped_storage()._cdata] = tensor  # alive, so that no id recurs
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(
        t.untyped_storage().nbytes() for key, t in seen.items() if key not in own
    )


def model_of(name, blocks):
    kind, kv, mlp, build, config, settings = (FITTED | HELD_OUT)[name]
    settings = settings | {
        "hidden_size": WIDTH,
        "intermediate_size": mlp,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": kv // 32,
        "vocab_size": 16,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return build(config(**settings)).eval(), Shape(blocks, WIDTH, kv, mlp, 16, kind)


def measured(name, adapted=PARTS, dtype=torch.float32, library="here"):
    """What one block more keeps, and what `saved_by_a_block` says."""
    found = []
    for blocks in (1, 2):
        model, shape = model_of(name, blocks)
        model.to(dtype)
        layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        chosen = [n for n in layers if ("att" in n) == (adapted == ("attention",))]
        chosen = layers if adapted == PARTS else chosen
        if library == "PEFT":
            net = get_peft_model(model, LoraConfig(r=RANK, target_modules=chosen))
            net = net.base_model.model
        else:
            freeze_all(model)
            inject_lora(
                model,
                rank=RANK,
                alpha=1.0,
                targets="|".join(map("({})".format, chosen)),
            )
            net = model
        x = torch.randn(ROWS, LENGTH, WIDTH, dtype=dtype).requires_grad_()
        extra = {} if "BERT" in name else {"use_cache": False}
        found.append(saved(net, lambda n=net, x=x, e=extra: n(inputs_embeds=x, **e)))
    said = saved_by_a_block(
        shape, ROWS * LENGTH, RANK, adapted, dtype.itemsize, library == "PEFT"
    )
    return said / (found[1] - found[0])


@pytest.mark.parametrize("name", FITTED)
def test_the_blocks_that_it_was_read_from(name):
    off = 0.05 if name == "Phi" else 0.01  # it has one norm for both parts
    assert measured(name) == pytest.approx(1, abs=off)


@pytest.mark.parametrize("name", HELD_OUT)
def test_blocks_that_it_was_not_read_from(name):
    assert measured(name, dtype=torch.bfloat16) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_some_layers_alone(name, part):
    assert measured(name, (part,), torch.bfloat16) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["Llama", "StarCoder2"])
def test_copies_that_peft_keeps_on_a_base_in_half_precision(name):
    wide = measured(name, dtype=torch.bfloat16, library="PEFT")
    assert wide == pytest.approx(1, abs=0.05)


def test_a_whole_model():
    """Parameters as in the model, and all that a loss keeps, with checkpointing."""
    shape = Shape(4, WIDTH, WIDTH, 384, 500)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    weights = sum(p.nbytes for p in model.parameters())
    freeze_all(model)
    inject_lora(model.model, rank=RANK, alpha=1.0)
    ids = torch.randint(0, 500, (ROWS, LENGTH))
    tokens = ids.numel()
    said = training_memory(shape, tokens, RANK, bits=32, itemsize=4)
    assert said["base"] == pytest.approx(weights, rel=0.01)  # norms are not counted
    assert said["weights"] == 4 * count_trainable(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    kept = saved(model, lambda: model(input_ids=ids, labels=ids, use_cache=False))
    one = saved_by_a_block(shape, tokens, RANK, itemsize=4)
    counted = said["activations"] - one + said["logits"] / 2
    assert counted == pytest.approx(kept, rel=0.15)
    plain = training_memory(shape, tokens, RANK, bits=32, itemsize=4, checkpoint=False)
    assert plain["activations"] == 4 * one


@pytest.mark.parametrize(
    ("name", "billions"), [("7B", 6.74), ("13B", 13.0), ("34B", 33.7), ("70B", 69.0),
                           ("8B, large vocabulary", 8.03), ("SmolLM2-135M", 0.1345)]
)  # fmt: skip
def test_sizes_of_the_named_models(name, billions):
    base = training_memory(SHAPES[name], 1, 1)["base"]
    assert base / 2e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("on", ["attention", ("Attention",), ("MLP", "norms")])
def test_parts_that_there_are_not(on):
    with pytest.raises(ValueError, match="`on` must hold some of"):
        training_memory(SHAPES["7B"], 2048, on=on)
