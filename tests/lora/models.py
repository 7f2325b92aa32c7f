"""Models, and what a refusal must leave as it was, for several test files."""

import torch
from torch import nn
from transformers import BertConfig, BertModel


def awake(wrapper, seed=0):
    """Give B random entries, so that the update is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        wrapper.B.copy_(torch.randn(wrapper.B.shape, generator=generator))
    return wrapper


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def snapshot(model):
    """All that an operation which was refused must leave as it was."""
    modules = [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]
    parameters = [
        (n, id(p), p.requires_grad, p.clone()) for n, p in model.named_parameters()
    ]
    return modules, parameters, torch.get_rng_state()


def assert_unchanged(model, before):
    modules, parameters, rng = snapshot(model)
    assert modules == before[0]
    assert [p[:3] for p in parameters] == [p[:3] for p in before[1]]
    assert all(
        torch.equal(p[3], q[3]) for p, q in zip(parameters, before[1], strict=True)
    )
    assert torch.equal(rng, before[2])


def attention():
    return nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)


def encoder():
    return nn.TransformerEncoderLayer(
        8, 2, 16, 0.0, batch_first=True, dtype=torch.float64
    )


def small(seed=0):
    """A BERT of two blocks of width 16, drawn from `seed`."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    return BertModel(config, add_pooling_layer=False).eval()
