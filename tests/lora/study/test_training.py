"""`lora.study.training` against a plain loop, one model at a time, and scikit-learn."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import nn
from torch.profiler import profile

from lora import LoRALinear, freeze_all, inject_lora
from lora.study.moons import moons_batch, moons_mlp
from lora.study.training import accuracy, train


def train_alone(model, x, y, epochs, lr, batch_size=64, seed=0):
    """The oracle: one model, a plain loop, unfused AdamW; returns each epoch's loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, foreach=False)
    order = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=order).split(batch_size):
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


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("batch_size", [64, 40, 1000])
def test_training_together_is_training_one_by_one(rank, batch_size):
    seeds = [11, 12, 13]
    x, y = moons_batch(
        seeds, n=150
    )  # 64 does not divide 150: the last batch is smaller
    models = adapted(seeds, rank) if rank else [moons_mlp(s) for s in seeds]
    alone = copy.deepcopy(models)
    losses = train(models, x, y, epochs=4, lr=3e-3, batch_size=batch_size, seed=9)
    assert not losses.requires_grad
    expected = [
        train_alone(m, x[i], y[i], 4, 3e-3, batch_size, 9) for i, m in enumerate(alone)
    ]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=0, atol=1e-12)
    for ours, theirs in zip(models, alone):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_defaults_are_sixty_epochs_of_batches_of_64():
    x, y = moons_batch([1], n=100)
    model, alone = moons_mlp(0), moons_mlp(0)
    losses = train([model], x, y)
    torch.testing.assert_close(
        losses[0], train_alone(alone, x[0], y[0], 60, 1e-3), atol=1e-9, rtol=0
    )


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


def test_training_repeats_and_leaves_the_global_random_state():
    x, y = moons_batch([0], n=100)
    results = []
    for seed in (5, 5, 6):
        before = torch.get_rng_state()
        model = moons_mlp(0)
        train([model], x, y, epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(model[0].weight)
    assert torch.equal(results[0], results[1]) and not torch.equal(
        results[0], results[2]
    )


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_step_is_one_pass_over_memory_and_copies_no_matrix(epochs):
    models, data = [moons_mlp(0), moons_mlp(1)], moons_batch([0, 1], n=10)
    with profile(record_shapes=True) as seen:  # it sees copies inside of kernels too
        train(models, *data, epochs=epochs, batch_size=5)
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


def test_no_epochs_is_no_change():
    model, x, y = moons_mlp(0), *moons_batch([0], n=10)
    before = states([model])
    assert train([model], x, y, epochs=0).shape == (1, 0)
    assert same(before, states([model]))


def test_accuracy_is_that_of_scikit_learn():
    x, y = moons_batch([0, 1, 2], n=77)
    models = [moons_mlp(s) for s in (0, 1, 2)]
    got = accuracy(iter(models), x, y)  # any iterable will do
    assert got.shape == (3,) and not got.requires_grad
    for i, model in enumerate(models):
        expected = accuracy_score(y[i].numpy(), model(x[i]).detach().numpy().argmax(1))
        assert got[i].item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "^models must hold at least one model, got none$"),
        (
            {"models": [nn.Linear(2, 2).double(), nn.Linear(2, 3).double()]},
            r"models\[1\] and",
        ),
        (
            {"models": [moons_mlp(0)] * 2},
            "^models holds one model twice: use copy.deepcopy$",
        ),
        ({"models": [moons_mlp(0)]}, "for 1 models, x must be"),
        ({"x": torch.zeros(20, 2, dtype=torch.float64)}, r"got x \(20, 2\)"),
        ({"x": torch.zeros(2, 0, 2, dtype=torch.float64)}, "n >= 1"),
        ({"y": torch.zeros(2, 19, dtype=torch.int64)}, r"y \(2, 19\)"),
        (
            {"x": torch.zeros(2, 20, 2)},
            "got x torch.float32, y torch.int64 and models in",
        ),
        ({"y": torch.zeros(2, 20)}, "y torch.float32"),
        (
            {"x": torch.zeros(2, 0, 2).double(), "y": torch.zeros(2, 0).long()},
            "n >= 1",
        ),
        ({"y": torch.zeros(20, dtype=torch.int64)}, r"y \(20,\)"),
        ({"y": torch.tensor(1)}, r"y \(\)"),
        ({"epochs": -1}, "epochs must be an integer of at least 0, got -1"),
        ({"epochs": 1.5}, "epochs must be an integer of at least 0, got 1.5"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"lr": -1e-3}, "lr must be a finite number of at least 0, got -0.001"),
        ({"lr": float("nan")}, "lr must be a finite number of at least 0, got nan"),
        ({"seed": -3}, "seed must be an integer of at least 0, got -3"),
        # cross_entropy would leave out -100 without a word
        (
            {"y": torch.full((2, 20), -100)},
            r"^y must lie in 0 \.\. 1, got -100 \.\. -100$",
        ),
        ({"y": torch.full((2, 20), 2)}, r"^y must lie in 0 \.\. 1, got 2 \.\. 2$"),
        (
            {"x": torch.full((2, 20, 2), torch.nan).double()},
            "^x must be finite, got NaN or infinity$",
        ),
        ({"x": torch.full((2, 20, 2), torch.inf).double()}, "^x must be finite"),
        ({"x": torch.zeros(2, 20).double()}, r"got x \(2, 20\)"),
        (
            {"models": [nn.Sequential(moons_mlp(s), nn.Flatten(0)) for s in (0, 1)]},
            r"^a model must map \(n, d\) to \(n, classes\), got \(2, 2\) -> \(4,\)$",
        ),
        (
            {
                "models": [
                    nn.Sequential(moons_mlp(s), nn.Unflatten(1, (2, 1))) for s in (0, 1)
                ]
            },
            r"got \(2, 2\) -> \(2, 2, 1\)$",
        ),
    ],
)
def test_train_refuses_before_it_changes_anything(change, message):
    x, y = moons_batch([0, 1], n=20)
    arguments = {"models": [moons_mlp(0), moons_mlp(1)], "x": x, "y": y} | change
    before = states(arguments["models"])
    with pytest.raises(ValueError, match=message):
        train(**arguments)
    assert same(before, states(arguments["models"]))


def test_accuracy_refuses_what_train_refuses():
    with pytest.raises(ValueError, match="for 1 models, x must be"):
        accuracy([moons_mlp(0)], *moons_batch([0, 1], n=20))


def test_train_names_the_dtypes_of_a_mixed_model():
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"models in torch\.float32, torch\.float64$"):
        train([mixed], *moons_batch([0], n=20))


def test_train_refuses_a_model_without_anything_to_train():
    model = moons_mlp(0)
    freeze_all(model)
    with pytest.raises(
        ValueError, match="^no parameter requires a gradient: nothing to train$"
    ):
        train([model], *moons_batch([0], n=20))


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


CHANGES = {  # what the message names -> a change of something that is no value
    "inner.scale": lambda m: setattr(m.inner, "scale", 7.0),
    "X": lambda m: setattr(m, "X", None),
    "function": lambda m: setattr(m, "function", torch.cos),
    "inner._forward_hooks": lambda m: m.inner.register_forward_hook(double_output),
    "inner.base.training": lambda m: m.inner.base.eval(),
    "forward": lambda m: setattr(m, "forward", m.outer.forward),
    "table": lambda m: setattr(m, "table", torch.ones(3)),
    "the type of outer": lambda m: setattr(m, "outer", nn.Bilinear(5, 5, 2).double()),
    "layers": lambda m: setattr(m, "more", nn.Identity()),
    "buffers": lambda m: m.register_buffer("mask", torch.ones(5)),
    "parameters": lambda m: m.outer.weight.requires_grad_(False),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", CHANGES)
def test_models_that_differ_in_more_than_values_are_refused(what, which):
    models = [Activation(torch.tanh) for _ in range(2)]
    for model in models:
        model.inner = LoRALinear(model.inner, rank=2)
    before, data = states(models), moons_batch([0, 1], n=20)
    train(models, *data, epochs=1)
    assert not same(before, states(models))
    CHANGES[what](models[which])
    message = rf"^models\[1\] and models\[0\] differ in {what}$"
    for refuses in (train, accuracy):
        with pytest.raises(ValueError, match=message):
            refuses(models, *data)


def test_models_of_different_types_are_refused():
    models = [nn.Linear(2, 2).double(), nn.Bilinear(2, 2, 2).double()]
    with pytest.raises(ValueError, match=r"differ in the type of the model$"):
        train(models, *moons_batch([0, 1], n=20))


def test_a_tensor_that_is_no_buffer_must_be_one_object():
    models = [Activation(torch.tanh) for _ in range(2)]
    models[0].table = models[1].table = torch.ones(3)
    train(models, *moons_batch([0, 1], n=20), epochs=1)
    models[1].table = torch.ones(3)  # not used: the first one's would be
    with pytest.raises(ValueError, match="differ in table$"):
        train(models, *moons_batch([0, 1], n=20))


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


def test_models_that_share_a_trained_layer_are_refused():
    models = [moons_mlp(0), moons_mlp(1)]
    models[1][2] = models[0][2]
    before = states(models)
    with pytest.raises(ValueError, match="^two models share a trained parameter: use"):
        train(models, *moons_batch([0, 1], n=20))
    assert same(before, states(models))


def test_models_whose_parameters_share_memory_are_refused():
    """Different parameters, one tensor: as after loading a state with assign=True."""
    models = [moons_mlp(0), moons_mlp(1)]
    models[1].load_state_dict(models[0].state_dict(), assign=True)
    before = states(models)
    with pytest.raises(ValueError, match="^two models share a trained parameter: use"):
        train(models, *moons_batch([0, 1], n=20))
    assert same(before, states(models))


@pytest.mark.parametrize(
    "register", ["register_hook", "register_post_accumulate_grad_hook"]
)
def test_a_hook_on_a_parameter_would_not_be_called_and_is_refused(register):
    models = [moons_mlp(0), moons_mlp(1)]
    handles = [getattr(m[2].weight, register)(lambda grad: None) for m in models]
    before = states(models)
    with pytest.raises(ValueError, match="^a parameter has a hook, which would not be"):
        train(models, *moons_batch([0, 1], n=20))
    assert same(before, states(models))
    for handle in handles:
        handle.remove()
    check_against_a_plain_loop(models)


def test_a_model_may_use_one_activation_twice():
    shared = nn.Tanh()
    layers = [nn.Linear(2, 5).double(), shared, nn.Linear(5, 2).double(), shared]
    other = [nn.Linear(2, 5).double(), nn.Tanh(), nn.Linear(5, 2).double(), nn.Tanh()]
    check_against_a_plain_loop([nn.Sequential(*layers), nn.Sequential(*other)])


def test_a_model_that_diverged_has_no_accuracy():
    models, (x, y) = [moons_mlp(0), moons_mlp(1)], moons_batch([0, 1], n=20)
    models[1][6].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="^a model's logits are not finite"):
        accuracy(models, x, y)


def test_numpys_integers_are_integers():
    models, (x, y) = [moons_mlp(0)], moons_batch([0], n=20)
    settings = {"epochs": 1, "batch_size": 7, "seed": 3}
    other = copy.deepcopy(models)
    train(models, x, y, **settings)
    train(other, x, y, **{k: np.int64(v) for k, v in settings.items()})
    assert same(states(models), states(other))


def test_one_models_wrong_output_is_shown():
    flat = nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)).double()
    with pytest.raises(ValueError, match=r"got \(2, 2\) -> \(4,\)$"):
        train([flat], *moons_batch([0], n=20))


def test_models_may_share_a_frozen_layer():
    models = [moons_mlp(0), moons_mlp(1)]
    models[1][2] = models[0][2].requires_grad_(False)
    check_against_a_plain_loop(models)


def test_dropout_is_refused_while_it_drops():
    models = [nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).double() for _ in "ab"]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^a model draws random numbers \(dropout"):
        train(models, *moons_batch([0, 1], n=20))
    assert torch.equal(state, torch.get_rng_state())
    for model in models:
        model.eval()
    check_against_a_plain_loop(models)


class Counting(nn.Module):
    """A layer that counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x


@pytest.mark.parametrize("layer", [Counting(), nn.BatchNorm1d(2)])
def test_a_buffer_that_would_be_lost_is_refused(layer):
    model = nn.Sequential(nn.Linear(2, 2), layer).double()
    before = states([model])
    with pytest.raises(ValueError, match=r"^a model updates a buffer \(batch norm\?\)"):
        train([model], *moons_batch([0], n=20))
    assert same(before, states([model]))


def test_a_buffer_that_stays_is_each_models_own():
    models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double() for _ in "ab"]
    for i, model in enumerate(models):
        model.eval()[1].running_mean += i
    check_against_a_plain_loop(models)
