"""`lora.study.moons` against scikit-learn, numpy and the series' counts."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons
from torch import nn

from lora import count_trainable
from lora.study import moons
from lora.study.moons import (
    disturbed,
    held_out_loss,
    moons_batch,
    moons_mlp,
    pretrained,
    two_moons,
)
from lora.study.training import accuracy, train


def states(models):
    return [{k: v.clone() for k, v in m.state_dict().items()} for m in models]


def same(first, second):
    return all(torch.equal(a[k], b[k]) for a, b in zip(first, second) for k in a)


def test_two_moons_without_rotation_is_make_moons():
    x, y = two_moons(101, noise=0.3, seed=5)
    points, labels = make_moons(n_samples=101, noise=0.3, random_state=5)
    assert x.dtype == torch.float64 and y.dtype == torch.int64
    np.testing.assert_array_equal(x.numpy(), points)
    np.testing.assert_array_equal(y.numpy(), labels)


@pytest.mark.parametrize("degrees", [-30, 45, 90.0, 400])
def test_rotation_is_counterclockwise_about_the_origin(degrees):
    x, y = two_moons(50, degrees=degrees, seed=1)
    points, labels = make_moons(n_samples=50, noise=0.15, random_state=1)
    turned = (points[:, 0] + 1j * points[:, 1]) * np.exp(1j * np.deg2rad(degrees))
    np.testing.assert_allclose(x.numpy(), np.c_[turned.real, turned.imag], atol=1e-12)
    np.testing.assert_array_equal(y.numpy(), labels)


def test_defaults_are_those_of_the_series():
    x, _ = two_moons()
    points, _ = make_moons(n_samples=1000, noise=0.15, random_state=0)
    np.testing.assert_array_equal(x.numpy(), points)


def test_moons_batch_stacks_one_sample_a_seed():
    x, y = moons_batch([7, 2], n=20, degrees=10)
    assert x.shape == (2, 20, 2) and y.shape == (2, 20)
    for i, seed in enumerate([7, 2]):
        expected = two_moons(20, degrees=10, seed=seed)
        assert torch.equal(x[i], expected[0]) and torch.equal(y[i], expected[1])
    for ours, expected in zip(moons_batch([3]), two_moons(seed=3)):
        assert torch.equal(ours[0], expected)


def test_network_is_that_of_the_series():
    model = moons_mlp()
    sizes = [(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)]
    assert sizes == [(2, 128), (128, 128), (128, 128), (128, 2)]
    assert count_trainable(model) == 33_666
    x = torch.randn(5, 2, dtype=torch.float64)
    W = [p.detach().numpy() for p in model.parameters()]
    h = x.numpy()
    for i in (0, 2, 4):
        h = np.tanh(h @ W[i].T + W[i + 1])
    np.testing.assert_allclose(model(x).detach().numpy(), h @ W[6].T + W[7], atol=1e-12)


def test_network_depends_on_its_seed_alone_and_leaves_the_global_one():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = moons_mlp(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert same(states([first]), states([moons_mlp(3)]))
    assert not torch.equal(first[0].weight, moons_mlp(4)[0].weight)
    assert same(states([moons_mlp()]), states([moons_mlp(0)]))
    assert torch.equal(first[2].weight.float().double(), first[2].weight)


def test_network_does_not_depend_on_the_default_dtype():
    expected = states([moons_mlp(3)])
    torch.set_default_dtype(torch.float64)
    try:
        assert same(states([moons_mlp(3)]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_pretrained_refuses_a_seed_that_occurs_twice():
    with pytest.raises(ValueError, match=r"^seeds must differ, got \[1, 2, 1\]$"):
        pretrained([1, 2, 1])


def test_pretrained_trains_each_model_on_its_own_source_data():
    models, x, y = pretrained(iter([4, 8]), epochs=2)
    expected = [moons_mlp(4), moons_mlp(8)]
    data = moons_batch([4, 8])
    train(expected, *data, epochs=2)
    assert torch.equal(x, data[0]) and torch.equal(y, data[1])
    assert same(states(models), states(expected))


def test_pretraining_takes_sixty_epochs(monkeypatch):
    log = []
    monkeypatch.setattr(moons, "train", lambda *settings: log.append(settings[3:]))
    pretrained([4])
    assert log == [(60,)]


def test_the_network_learns_the_moons():
    models, _, _ = pretrained([0], epochs=15)
    assert accuracy(models, *moons_batch([2000], n=2000)).item() > 0.97
    assert accuracy(models, *moons_batch([2000], n=2000, degrees=45)).item() < 0.75


@pytest.mark.parametrize("size", [None, 0.05])
def test_a_random_update_has_the_size_that_was_asked_for(size):
    models = [moons_mlp(0), moons_mlp(1)]
    copies, before = disturbed(models, [7, 8], rank=4, size=size)
    ratios = []
    for model, changed in zip(models, copies):
        for layer, other in zip(model[::2], changed[::2]):
            change = other.weight.detach() - layer.weight
            ratios.append((change.norm() / layer.weight.norm()).item())
            assert torch.linalg.matrix_rank(change) <= 4
    wanted = [size] * 8 if size else [before] * 8
    assert sum(ratios) == pytest.approx(sum(wanted))
    assert size is None or ratios == pytest.approx(wanted)


def test_the_held_out_loss_is_that_of_new_points():
    models = [moons_mlp(0), moons_mlp(1)]
    losses = held_out_loss(models, [3, 5], degrees=45)
    x, y = two_moons(2000, degrees=45, seed=1005)
    wanted = torch.nn.functional.cross_entropy(models[1](x), y).item()
    assert losses.shape == (2,)
    assert losses[1].item() == pytest.approx(wanted)
