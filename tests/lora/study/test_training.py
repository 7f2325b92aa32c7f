"""`lora.study.training` against a plain loop, one model at a time, and scikit-learn."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.profiler import profile

from lora import LoRALinear, count_trainable, freeze_all, inject_lora
from lora.study.moons import moons_batch, moons_mlp, two_moons
from lora.study.training import RandomSubspace, accuracy, train


def train_alone(model, x, y, epochs=60, lr=1e-3):
    """The oracle: one model, a plain loop, unfused AdamW; returns each epoch's loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, foreach=False)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=order).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(x))
    return torch.tensor(losses, dtype=x.dtype)


def adapted(seeds, rank):
    """Models with frozen base layers and adapters, both matrices random."""
    models = []
    for seed in seeds:
        model = moons_mlp(seed)
        freeze_all(model)
        torch.manual_seed(seed)
        for layer in inject_lora(model, rank=rank):
            nn.init.normal_(layer.B, std=0.1)
        models.append(model)
    return models


def states(models):
    return [{k: v.clone() for k, v in m.state_dict().items()} for m in models]


def same(first, second):
    return all(torch.equal(a[k], b[k]) for a, b in zip(first, second) for k in a)


def test_frozen_parameters_stay_bit_for_bit_and_the_others_move():
    models = adapted([0, 1], 2)
    before = states(models)
    x, y = moons_batch([0, 1], n=128, degrees=45)
    train(models, x, y, epochs=2)
    for model, old in zip(models, before):
        for name, p in model.named_parameters():
            assert torch.equal(p, old[name]) == (not p.requires_grad), name
            assert p.grad is None


def test_one_model_does_not_feel_another():
    x, y = moons_batch([0, 1], n=100)
    models = [moons_mlp(0), moons_mlp(1)]
    train(models, x, y, epochs=2)
    x[1], y[1] = x[1] * 5 - 1, 1 - y[1]
    again = [moons_mlp(0), moons_mlp(1)]
    train(again, x, y, epochs=2)
    assert same(states(models[:1]), states(again[:1]))
    assert not same(states(models[1:]), states(again[1:]))


def test_hook_sees_every_epoch_and_the_models_of_that_moment():
    x, y = moons_batch([0, 1], n=64)
    seen = {}
    models = [moons_mlp(0), moons_mlp(1)]
    train(
        models,
        x,
        y,
        epochs=3,
        after_epoch=lambda e, predict: seen.update({e: predict(x)}),
    )
    assert list(seen) == [1, 2, 3]
    assert not any(logits.requires_grad for logits in seen.values())
    for epochs, logits in seen.items():
        fresh = [moons_mlp(0), moons_mlp(1)]
        train(fresh, x, y, epochs=epochs)
        alone = torch.stack([m(points) for m, points in zip(fresh, x)])
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_training_together_is_training_one_by_one(rank):
    seeds = [11, 12, 13]
    x, y = moons_batch(seeds, n=150)  # 64 does not divide it: the last batch is smaller
    models = adapted(seeds, rank) if rank else [moons_mlp(s) for s in seeds]
    alone = copy.deepcopy(models)
    before = torch.get_rng_state()
    losses = train(models, x, y, epochs=4, lr=3e-3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not losses.requires_grad
    expected = [train_alone(m, x[i], y[i], 4, 3e-3) for i, m in enumerate(alone)]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=0, atol=1e-12)
    for ours, theirs in zip(models, alone):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_defaults_are_sixty_epochs_at_a_thousandth():
    x, y = moons_batch([1], n=10)
    model, alone = moons_mlp(0), moons_mlp(0)
    losses = train([model], x, y)
    torch.testing.assert_close(
        losses[0], train_alone(alone, x[0], y[0]), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_step_is_one_pass_over_memory_and_copies_no_matrix(epochs):
    models, data = [moons_mlp(0), moons_mlp(1)], moons_batch([0, 1], n=70)
    with profile(record_shapes=True) as seen:  # it sees copies inside of kernels too
        train(models, *data, epochs=epochs)
    calls = Counter()
    for event in seen.events():
        shape = tuple((event.input_shapes or [()])[0])
        calls[event.name, shape if event.name == "aten::copy_" else ()] += 1
    assert calls["aten::_fused_adamw_", ()] == 2 * epochs
    # two matrices: laid out before the training; never again
    assert calls["aten::copy_", (2, 128, 128)] == 2


class Gain(nn.Module):
    """A layer with a parameter that has no dimension."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.gain * x


def test_parameters_of_any_shape_train():
    models = [nn.Sequential(Gain(), nn.Linear(2, 2).double()) for _ in range(2)]
    alone, (x, y) = copy.deepcopy(models), moons_batch([0, 1], n=20)
    train(models, x, y, epochs=3)
    for i, model in enumerate(alone):
        train_alone(model, x[i], y[i], 3, 1e-3)
        for p, q in zip(models[i].parameters(), model.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_one_point_is_enough():
    model, (x, y) = moons_mlp(0), moons_batch([0], n=2)
    alone = copy.deepcopy(model)
    losses = train([model], x[:, :1], y[:, :1], epochs=2)
    expected = train_alone(alone, x[0, :1], y[0, :1], 2, 1e-3)
    torch.testing.assert_close(losses[0], expected, rtol=0, atol=1e-12)


def test_accuracy_is_that_of_scikit_learn():
    x, y = moons_batch([0, 1, 2], n=77)
    models = [moons_mlp(s) for s in (0, 1, 2)]
    got = accuracy(iter(models), x, y)  # any iterable will do
    assert got.shape == (3,) and not got.requires_grad
    for i, model in enumerate(models):
        expected = accuracy_score(y[i].numpy(), model(x[i]).detach().numpy().argmax(1))
        assert got[i].item() == pytest.approx(expected, abs=1e-15)


class Activation(nn.Module):
    """Two layers around a function that is an attribute."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.inner = nn.Linear(2, 5).double()
        self.outer = nn.Linear(5, 2).double()

    def forward(self, x):
        return self.outer(self.function(self.inner(x)))


def double_output(layer, args, output):
    return 2 * output


CHANGES = [  # what the message names, a change of something that is no value
    ("inner", lambda m: setattr(m.inner, "scale", 7.0)),
    ("inner", lambda m: m.inner.register_forward_hook(double_output)),
    ("inner.base", lambda m: m.inner.base.eval()),
    ("the model itself", lambda m: setattr(m, "X", None)),
    ("the model itself", lambda m: setattr(m, "function", torch.cos)),
    ("the model itself", lambda m: setattr(m, "forward", m.outer.forward)),
    ("the model itself", lambda m: m.register_buffer("mask", torch.ones(5))),
    ("outer", lambda m: setattr(m, "outer", nn.Bilinear(5, 5, 2).double())),
    ("outer", lambda m: setattr(m, "outer", nn.Linear(5, 3).double())),
    ("outer", lambda m: m.outer.weight.requires_grad_(False)),
    ("outer", lambda m: m.outer.float()),
    ("more", lambda m: setattr(m, "more", nn.Identity())),
]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("where", "change"), CHANGES)
def test_models_that_differ_in_more_than_values_are_refused(where, change, which):
    models = [Activation(torch.tanh) for _ in range(2)]
    for model in models:
        model.inner = LoRALinear(model.inner, rank=2)
    before, data = states(models), moons_batch([0, 1], n=20)
    train(models, *data, epochs=1)
    assert not same(before, states(models))
    change(models[which])
    before = states(models)
    message = rf"^models\[1\] and models\[0\] differ in {where}$"
    for refuses in (train, accuracy):
        with pytest.raises(ValueError, match=message):
            refuses(models, *data)
    assert same(before, states(models))


def share_a_layer(one, other):
    other[2] = one[2]


def share_memory(one, other):
    """Different parameters, one tensor: as after loading a state with assign=True."""
    other.load_state_dict(one.state_dict(), assign=True)


@pytest.mark.parametrize("share", [share_a_layer, share_memory])
def test_models_that_share_what_is_trained_are_refused(share):
    models = [moons_mlp(0), moons_mlp(1)]
    share(*models)
    before = states(models)
    for given in (models, models[:1] * 2):
        with pytest.raises(ValueError, match="^two models share a trained parameter: "):
            train(given, *moons_batch([0, 1], n=20))
    assert same(before, states(models))


@pytest.mark.parametrize("shapes", [((1, 20), (1, 20)), ((2, 20), (2, 25)), ((2,), ())])
def test_data_that_do_not_fit_are_refused(shapes):
    models, (x, y) = [moons_mlp(0), moons_mlp(1)], (torch.zeros(s) for s in shapes)
    before = states(models)
    for refuses in (train, accuracy):
        with pytest.raises(ValueError, match=r"^for 2 models, x must be \(2, n, d\)"):
            refuses(models, x.double()[..., None], y.long())
    assert same(before, states(models))


def check_against_a_plain_loop(models):
    alone, (x, y) = copy.deepcopy(models), moons_batch(range(len(models)), n=20)
    train(models, x, y, epochs=2)
    for i, model in enumerate(alone):
        train_alone(model, x[i], y[i], 2, 1e-3)
        for p, q in zip(models[i].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_hook_that_all_models_have_is_run():
    models = [Activation(torch.tanh)]
    models[0].outer.register_forward_hook(double_output)
    models.append(copy.deepcopy(models[0]))
    check_against_a_plain_loop(models)


def test_a_model_that_diverged_has_no_accuracy():
    models, (x, y) = [moons_mlp(0), moons_mlp(1)], moons_batch([0, 1], n=20)
    models[1][6].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="^a model's logits are not finite"):
        accuracy(models, x, y)


def test_models_may_share_a_frozen_layer():
    models = [moons_mlp(0), moons_mlp(1)]
    models[1][2] = models[0][2].requires_grad_(False)
    check_against_a_plain_loop(models)


def test_a_buffer_that_stays_is_each_models_own():
    models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double() for _ in "ab"]
    for i, model in enumerate(models):
        model.eval()[1].running_mean += i
    check_against_a_plain_loop(models)


# The random subspace


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def small_model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def test_random_subspace_starts_as_the_model_and_trains_z_alone():
    model, x = small_model(), numbers(5, 3)
    before = model(x).detach()
    subspace = RandomSubspace(model, 6, seed=1)
    assert torch.equal(subspace(x), before)
    assert subspace.model is model and not any(
        p.requires_grad for p in model.parameters()
    )
    assert [n for n, p in subspace.named_parameters() if p.requires_grad] == ["z"]
    assert count_trainable(subspace) == 6 and subspace.P.shape == (26, 6)
    # one in float64 too: drawn in float32, it would be one up to 1e-7
    torch.testing.assert_close(
        subspace.P.norm(dim=0), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_random_subspace_is_theta0_plus_P_z():
    model, x = small_model(), numbers(5, 3)
    start = parameters_to_vector(model.parameters()).detach().numpy()
    subspace = RandomSubspace(model, 6)
    with torch.no_grad():
        subspace.z.copy_(numbers(6))
    theta = start + subspace.P.numpy() @ numbers(6).numpy()
    W1, b1, W2, b2 = np.split(theta, [12, 16, 24])
    h = np.tanh(x.numpy() @ W1.reshape(4, 3).T + b1)
    np.testing.assert_allclose(
        subspace(x).detach(), h @ W2.reshape(2, 4).T + b2, atol=1e-12
    )
    moved = torch.cat([t.flatten() for t in subspace.theta().values()])
    np.testing.assert_allclose(moved.detach(), theta, atol=1e-12)
    assert list(subspace.theta()) == [name for name, _ in model.named_parameters()]


def test_gradient_of_z_is_the_projected_gradient_of_the_parameters():
    model, x = small_model(), numbers(5, 3)
    gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    subspace = RandomSubspace(model, 4, seed=2)
    subspace(x).square().sum().backward()
    expected = subspace.P.T @ torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(subspace.z.grad, expected)


def test_random_subspace_depends_on_its_seed_only():
    draws = [RandomSubspace(small_model(), 3, seed=s).P for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0], RandomSubspace(small_model(), 3).P)
    model, expected = small_model(), torch.random.get_rng_state()
    RandomSubspace(model, 3)
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_random_subspace_takes_the_models_dtype():
    assert RandomSubspace(small_model(torch.bfloat16), 3).z.dtype == torch.bfloat16


def test_the_subspace_of_a_single_number_is_that_number():
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    start, subspace = model.weight.item(), RandomSubspace(model, 1)
    with torch.no_grad():
        subspace.z.fill_(3)
    assert abs(subspace.P.item()) == pytest.approx(1, abs=1e-15)
    assert subspace.theta()["weight"].item() == start + 3 * subspace.P.item()


def test_a_full_random_basis_can_reach_any_parameters():
    """With d = D the subspace is everything: training in it is training."""
    model = nn.Linear(2, 1, dtype=torch.float64)
    subspace = RandomSubspace(model, 3)
    goal = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
    start = parameters_to_vector(model.parameters())
    with torch.no_grad():
        subspace.z.copy_(torch.linalg.solve(subspace.P, goal - start))
    x = numbers(4, 2)
    torch.testing.assert_close(subspace(x), x @ goal[:2, None] + goal[2])


def test_random_subspaces_train_as_a_stack_as_they_do_one_by_one():
    x, y = (torch.stack(v) for v in zip(*(two_moons(60, seed=s) for s in (0, 1))))

    def subspaces():
        return [RandomSubspace(moons_mlp(s), 5, seed=s) for s in (0, 1)]

    together, alone = subspaces(), subspaces()
    train(together, x, y, epochs=3, lr=0.1)
    for i, model in enumerate(alone):
        train([model], x[i : i + 1], y[i : i + 1], epochs=3, lr=0.1)
        torch.testing.assert_close(together[i].z, model.z, atol=1e-10, rtol=0)
        assert model.z.abs().min() > 0
        assert torch.equal(model.model[0].weight, moons_mlp(i)[0].weight)


def test_a_model_that_cannot_be_moved_is_left_as_it_was():
    model = small_model()
    with pytest.raises(RuntimeError, match="negative dimension"):
        RandomSubspace(model, -1)
    assert all(p.requires_grad for p in model.parameters())
