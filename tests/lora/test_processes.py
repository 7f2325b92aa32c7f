"""Two processes on one machine (gloo): DistributedDataParallel and fully_shard.

Each process takes its half of the rows. What they hold afterwards must be what one
process holds that took all rows, up to the order of sums.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lora import (
    LoRALinear,
    count_trainable,
    freeze_all,
    inject_lora,
    layers,
    merge_lora,
)
from lora.adapters import (
    add_adapter,
    load_adapter,
    route,
    save_adapter,
    set_adapter,
)
from lora.nf4 import quantize_model

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard

pytestmark = pytest.mark.unmutated  # mutants are not in the other processes


def start(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A function that runs a function in both processes: what the two return."""
    store = tmp_path_factory.mktemp("processes") / "store"
    spawn = multiprocessing.get_context("spawn")
    pools = [
        ProcessPoolExecutor(1, spawn, initializer=start, initargs=(rank, store))
        for rank in range(2)
    ]

    def run(function, *args):
        tasks = [pool.submit(function, *args) for pool in pools]
        return [task.result(timeout=60) for task in tasks]

    yield run
    for pool in pools:
        pool.shutdown()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4)
    model = nn.Sequential(*layers).to(dtype)
    freeze_all(model)
    return model


def injected(dtype=torch.float32):
    model = network(dtype)
    inject_lora(model, rank=2)
    return model


def with_two(dtype=torch.float32):
    """Adapters "a" on all layers, which is set, and "b" on the first."""
    model = network(dtype)
    add_adapter(model, "a", rank=2)
    add_adapter(model, "b", "0", rank=1)
    set_adapter(model, "a")
    return model


def train(model, steps=3):
    """On this process's rows, or, where there is but one, on all of them."""
    parts, own = (2, dist.get_rank()) if dist.is_initialized() else (1, 0)
    generator = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    optimizer = torch.optim.AdamW(trained, 0.01)
    for _ in range(steps):
        x = torch.randn(8, 64, generator=generator).chunk(parts)[own]
        optimizer.zero_grad()
        y = model(x.to(dtype))
        y.float().square().mean().backward()
        optimizer.step()
    return model


def held(model):
    """All parameters of a model, put together where they are sharded."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def close(found, model, atol=1e-6):
    """Whether these are the parameters of a model, up to the order of sums."""
    torch.testing.assert_close(found, held(model), atol=atol, rtol=0)
    return True


# --- DistributedDataParallel: each process has the whole model ---


def ddp_injected():
    model = injected()
    if dist.get_rank():  # DistributedDataParallel starts from those of the first
        for wrapper in (model[0], model[2]):
            wrapper.reset_parameters()
    sent = []

    def note(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, note)
    train(parallel)
    return held(model), sent


def test_ddp_trains_what_was_injected_and_sends_its_gradients_alone(both):
    (first, sent), (second, _) = both(ddp_injected)
    assert equal(first, second) and close(first, train(injected()))
    assert sum(sent) == 3 * 4 * count_trainable(injected())


def ddp_adapters():
    """a is trained, then b, the model wrapped again."""
    model = with_two()
    train(DistributedDataParallel(model))
    set_adapter(model, "b")
    train(DistributedDataParallel(model))
    return held(model)


def test_ddp_trains_one_adapter_after_the_other(both):
    first, second = both(ddp_adapters)
    alone = train(with_two())
    set_adapter(alone, "b")
    assert equal(first, second) and close(first, train(alone))


def ddp_set_behind_its_back():
    model = with_two()
    parallel = train(DistributedDataParallel(model))
    set_adapter(model, "b")  # the model cannot know that it is wrapped
    train(parallel)
    return held(model)


def test_an_adapter_set_after_the_wrapping_drifts_apart(both):
    """What the chapter warns of: nothing raises, and b is another one in each."""
    first, second = both(ddp_set_behind_its_back)
    apart = {name for name in first if not torch.equal(first[name], second[name])}
    assert apart == {"0.adapters.b.A", "0.adapters.b.B"}


def ddp_refusals(folder):
    model = with_two()
    lookup = DistributedDataParallel(nn.Sequential(nn.Embedding(4, 4)))
    whole = DistributedDataParallel(network().requires_grad_(True))
    parallel = DistributedDataParallel(model)
    before, messages = held(model), []
    for change in (
        lambda: set_adapter(parallel, "b"),
        lambda: add_adapter(nn.Sequential(parallel), "c"),
        lambda: inject_lora(parallel),
        lambda: quantize_model(parallel),
        lambda: layers.train_tokens(lookup, "module.0", [1]),
        lambda: layers.load_lora(whole, folder),
    ):
        with pytest.raises(ValueError, match="then wrap it again") as caught:
            change()
        messages.append(str(caught.value))
    assert equal(before, held(model))
    assert not model[0].adapters["b"].A.requires_grad
    return messages


def test_a_wrapped_model_is_not_changed(both, tmp_path):
    layers.save_lora(injected(), tmp_path)
    first, second = both(ddp_refusals, tmp_path)
    assert first == second and len(first) == 6 and len(set(first)) == 1


def ddp_routed(find_unused):
    model = with_two()
    for layer in (model[0], model[2]):
        layer.adapters.requires_grad_(True)
    parallel = DistributedDataParallel(model, find_unused_parameters=find_unused)
    for _ in range(2):
        with route(model, ["a", None]):  # b has no row
            parallel(torch.randn(2, 64)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_ddp_must_be_told_of_adapters_without_a_row(both):
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        both(ddp_routed, False)
    first, second = both(ddp_routed, True)
    assert equal(first, second) and first["0.adapters.a.B"].any()
    assert [name for name in first if ".b." in name] == []


class Counting(DistributedDataParallel):
    """Counts the bytes of what is sent beside the gradients."""

    sent = 0

    def _distributed_broadcast_coalesced(self, tensors, *args):
        self.sent += sum(t.nbytes for t in tensors)
        super()._distributed_broadcast_coalesced(tensors, *args)


def ddp_quantized(broadcast):
    model = network()
    quantize_model(model)
    inject_lora(model, rank=2)
    parallel = Counting(model, broadcast_buffers=broadcast)
    parallel.sent = 0
    train(parallel)
    return held(model), parallel.sent, sum(b.nbytes for b in model.buffers())


def test_ddp_sends_a_quantized_base_in_each_step_unless_told_not_to(both):
    (_, sent, base), _ = both(ddp_quantized, True)
    assert sent == 3 * base > 0
    (first, sent, _), (second, _, _) = both(ddp_quantized, False)
    assert sent == 0 and equal(first, second)


# --- fully_shard: each process has its part of each matrix ---


def sharded(make, dtype=torch.float32):
    model = make(dtype)
    for layer in (model[0], model[2]):  # a layer is put together when it is its turn
        fully_shard(layer)
    fully_shard(model)
    train(model)
    if make is with_two:
        set_adapter(model, "b")
        train(model)
    own = sum(p.to_local().nbytes for p in model.parameters())
    return held(model), own, sum(p.nbytes for p in held(model).values())


@pytest.mark.parametrize("make", [injected, with_two])
def test_a_sharded_model_trains_as_a_whole_one(both, make):
    (first, own, whole), (second, _, _) = both(sharded, make)
    alone = train(make())
    if make is with_two:  # set after the sharding, which does not mind
        set_adapter(alone, "b")
        train(alone)
    assert equal(first, second) and close(first, alone)
    assert own < 0.6 * whole


def test_a_base_in_half_precision_is_sharded(both):
    (first, _, _), (second, _, _) = both(sharded, injected, torch.bfloat16)
    assert equal(first, second)
    # gradients are rounded before they are summed: to 1 in 256, of steps of 0.01
    assert close(first, train(injected(torch.bfloat16)), atol=1e-3)


def sharded_and_merged():
    model = injected()
    fully_shard(model[0])
    fully_shard(model)
    train(model)
    with pytest.raises(ValueError, match="cannot merge 0: its wrapper has a forward"):
        merge_lora(model)
    model = injected()
    fully_shard(model)
    return held(merge_lora(train(model)))


def test_what_is_sharded_as_a_whole_is_merged(both):
    first, second = both(sharded_and_merged)
    assert equal(first, second) and close(first, merge_lora(train(injected())))


def gathered(folder):
    model = with_two()
    fully_shard(model)
    train(model)
    with pytest.raises(ValueError, match=r"cannot save .*lora_A.weight: DTensor on"):
        save_adapter(model, "a", folder)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        whole = with_two()
        whole.load_state_dict(state, strict=False)
        save_adapter(whole, "a", folder)
    return sorted(name for name in state if name.endswith((".A", ".B")))


def test_what_was_trained_is_gathered_and_saved(both, tmp_path):
    names, _ = both(gathered, tmp_path / "a")
    assert names == [f"{i}.adapters.a.{kind}" for i in (0, 2) for kind in "AB"]
    alone, loaded = train(with_two()), network()
    load_adapter(loaded, tmp_path / "a")
    for i in (0, 2):
        pair = (model[i].adapters["a"] for model in (loaded, alone))
        assert close(held(next(pair)), next(pair))


def distributed_base():
    """A layer whose weight is a DTensor already is a base like any other."""
    mesh = dist.init_device_mesh("cpu", (2,))
    base, x = network()[0], torch.randn(3, 64)
    expected, weight = base(x), base.weight.detach().clone()
    layer = LoRALinear(distribute_module(base, mesh))
    y = layer(distribute_tensor(x, mesh))
    y.sum().backward()
    assert all(isinstance(p, DTensor) for p in (layer.A, layer.B, layer.B.grad))
    assert torch.equal(layer.merged().weight.full_tensor(), weight)
    return torch.allclose(y.full_tensor(), expected, atol=1e-6)


def test_a_distributed_weight_is_that_of_a_base(both):
    assert both(distributed_base) == [True, True]
