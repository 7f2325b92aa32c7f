"""`make bench`: what takes how long, as ratios within one run, beside its goal.

No test looks at the clock: a busy machine must not turn one red. Here it may spoil a
row, so look at it again.
"""

import copy
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from lora import LoRALinear
from lora.adapters import (
    add_adapter,
    delete_adapter,
    load_adapter,
    merge_adapter,
    route,
    save_adapter,
    set_adapter,
)
from lora.study import search
from tools.kit import bound
from tools.kit.register import notebooks, pages
from tools.kit.site import HTML, open_browser, serve
from tools.run import client_of

IMPORT = """import time, torch
start = time.process_time()
import lora
print(1000 * (time.process_time() - start))"""
# A slow phone: slow 4G, and a processor that takes four times as long.
SLOW = {"offline": False, "latency": 150}
SLOW |= {"downloadThroughput": 1.6e6 / 8, "uploadThroughput": 0.75e6 / 8}
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
BARE = "<!DOCTYPE html><link rel=icon href='data:,'><title>Bare</title>Three words."
# The laboratory's first run: seconds, in those of a core that adds 750 million numbers
# a second one after the other, and its longest task meanwhile, in milliseconds.
TRAIN = """async () => {
  const measured = (use) => {
    const from = performance.now();
    use();
    return performance.now() - from;
  };
  let longest = 0, sum = 0;
  const watched = (use) => { longest = Math.max(longest, measured(use)); };
  for (const method of ["hear", "draw"]) {
    const own = Panel.prototype[method];
    Panel.prototype[method] = function (...all) {
      const frame = window.requestAnimationFrame;
      window.requestAnimationFrame = (use) => frame(() => watched(use));
      watched(() => own.apply(this, all));
      window.requestAnimationFrame = frame;
    };
  }
  const hundred = measured(() => { for (let i = 0; i < 1e8; i++) sum += 1e-9; });
  const from = performance.now(), status = document.getElementById("lab-status");
  document.getElementById("lab-train").click();
  while (!status.textContent.includes("Done") && sum)
    await new Promise((done) => setTimeout(done, 20));
  const slowness = hundred / (1e8 / 750e3);
  return [(performance.now() - from) / 1000 / slowness, longest];
}"""


def ratio(repetitions, ours, peft):
    """Time of one call over that of another: medians of interleaved runs."""
    times = {ours: [], peft: []}
    for _ in range(repetitions):
        for call, seconds in times.items():
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return median(times[ours]) / median(times[peft])


def against_peft(width, count, repetitions):
    """Time of one layer, both ways, over PEFT's."""
    base = nn.Linear(width, width).requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=16)
    ours = LoRALinear(copy.deepcopy(base), 8, 16)
    peft = PeftLinear(copy.deepcopy(base), "a", config, r=8, lora_alpha=16)
    x, gradient = torch.randn(count, width), torch.randn(count, width)
    x.requires_grad_()

    def both_ways(layer):
        layer(x).backward(gradient)
        layer.zero_grad()
        x.grad = None

    return ratio(repetitions, lambda: both_ways(ours), lambda: both_ways(peft))


def adapters_against_peft():
    """(what, time over PEFT's) of what one does with two adapters of 24 layers."""

    def stack():
        return nn.Sequential(*[nn.Linear(256, 256) for _ in range(24)])

    ours, config = stack(), LoraConfig(r=8, target_modules=r"\d+")
    peft = get_peft_model(stack(), config, "a")
    peft.add_adapter("b", config)
    for name in "ab":
        add_adapter(ours, name, rank=8)
    set_adapter(ours, "a")
    x = torch.randn(64, 256)
    trained = {
        model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for model in (ours, peft)
    }

    def step(model):
        model(x).square().mean().backward()
        trained[model].step()
        trained[model].zero_grad()

    def switch(change):
        for name in "ba":
            change(name)

    with TemporaryDirectory() as folder:

        def save_theirs():
            peft.save_pretrained(f"{folder}/peft", selected_adapters=["a"])

        def load_ours():
            load_adapter(ours, f"{folder}/ours", "c")
            delete_adapter(ours, "c")

        def load_theirs():
            peft.load_adapter(f"{folder}/peft/a", "c")
            peft.delete_adapter("c")

        for what, here, there in (
            ("step", lambda: step(ours), lambda: step(peft)),
            (
                "switch",
                lambda: switch(lambda name: set_adapter(ours, name)),
                lambda: switch(peft.set_adapter),
            ),
            ("save", lambda: save_adapter(ours, "a", f"{folder}/ours"), save_theirs),
            ("load and delete", load_ours, load_theirs),
        ):
            yield what, ratio(15, here, there)


def mixed_batches(rounds=7):
    """Times of a pass of 64 rows over one with one adapter, medians in turns.

    With seven adapters in `route`, the same in PEFT, and a switch.
    """
    names = [f"task {i}" for i in range(7)]
    targets = r".*encoder.*(query|key|value|dense)"
    ours = search.load_minilm()[1]
    config = LoraConfig(r=8, lora_alpha=8, target_modules=targets)
    peft = get_peft_model(search.load_minilm()[1], config, names[0]).eval()
    for name in names:
        add_adapter(ours, name, targets, rank=8)
        if name != names[0]:
            peft.add_adapter(name, config)
    tokens = torch.randint(1000, 20_000, (64, 16))
    rows = [names[i % 7] for i in range(64)]

    def routed():
        with route(ours, rows):
            ours(tokens)

    set_adapter(ours, names[0])
    works = {
        "one": lambda: ours(tokens),
        "ours": routed,
        "PEFT": lambda: peft(tokens, adapter_names=rows),
        "switch": lambda: set_adapter(ours, names[0]),
    }
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            with torch.no_grad():
                work()
            times[name].append(time.perf_counter() - start)
    one, *others = (median(seconds) for seconds in times.values())
    return [seconds / one for seconds in others]


def layers_time(n):
    """Seconds to add, save, load and merge an adapter of n layers."""
    one, other = (nn.ModuleList(nn.Linear(2, 2) for _ in range(n)) for _ in range(2))
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        add_adapter(one, "a", rank_pattern={".*1": 3})
        save_adapter(one, "a", folder)
        load_adapter(other, folder, "b")
    merge_adapter(other, "b")
    return time.perf_counter() - start


def import_time():
    """Milliseconds of processor time that `import lora` takes beside torch."""
    command = [sys.executable, "-c", IMPORT]
    return median(float(subprocess.check_output(command)) for _ in range(5))


def first_paint(browser, url):
    """Milliseconds until a slow phone shows the first word of a page: the best of 3."""
    paints = []
    for _ in range(3):
        page = browser.new_page(viewport={"width": 390, "height": 800})
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        session.send("Network.emulateNetworkConditions", SLOW)
        session.send("Emulation.setCPUThrottlingRate", {"rate": 4})
        page.goto(url, wait_until="commit")
        paints.append(page.wait_for_function(PAINT, timeout=60_000).json_value())
        page.close()
    return min(paints)


def chapter_rows(notebook):
    """What a chapter's timed cells measure when executed anew, and their goals."""
    timed = [i for i, cell in enumerate(notebook.cells) if "bench" in cell.metadata]
    client = client_of(notebook)
    with client.setup_kernel():
        for i, cell in enumerate(notebook.cells[: max(timed, default=-1) + 1]):
            client.execute_cell(cell, i)
            goals = cell.metadata.get("bench", {})
            values = bound.ask(client.kc, [f"float({what})" for what in goals])
            yield from zip(goals, values, goals.values())


def rows():
    """(what, its value, its goal) one after the other."""
    for size, goal in (
        ((128, 1000, 500), 0.92),
        ((1024, 512, 40), 1),
        ((4096, 256, 25), 1),
    ):
        yield f"a layer of width {size[0]}, of PEFT's time", against_peft(*size), goal
    for what, value in adapters_against_peft():
        yield f"{what}, two adapters of 24 layers, of PEFT's time", value, 1
    yield "import lora, ms beside torch", import_time(), 50
    few, many = (layers_time(n) for n in (1000, 10_000))
    yield "an adapter of 10,000 layers, s", many, 60
    yield "of the time that 1,000 layers take", many / few, 15
    mixed, peft, switch = mixed_batches()
    yield "a batch for seven adapters, of one for one", mixed, 1.35
    yield "the same, of PEFT's time", mixed / peft, 1.1
    yield "a switch of adapters, of a batch", switch, 0.05
    with open_browser() as browser, TemporaryDirectory() as folder:
        Path(folder, "bare.html").write_text(BARE)
        with serve(folder) as url:
            bare = first_paint(browser, f"{url}bare.html")
        with serve(HTML) as url:
            for path in pages():
                paint = first_paint(browser, f"{url}{path}.html")
                yield f"first paint of {path}, of a bare page's", paint / bare, 6
            page = browser.new_page()
            page.goto(f"{url}book/lab.html")
            for run in "ab":  # both have reported
                page.locator(f"#{run}-epoch:not(:empty)").wait_for()
            seconds, longest = page.evaluate(TRAIN)
            yield "first run of the laboratory, s on an ordinary core", seconds, 15
            yield "its longest task meanwhile, ms", longest, 50
    for notebook in notebooks().values():
        yield from chapter_rows(notebook)


def main():
    print(f"{'':60}{'here':>8}{'goal':>8}")
    for what, value, goal in rows():
        print(
            f"{what:60}{value:8.2f}{goal:8}{' *' if value > goal else ''}", flush=True
        )


if __name__ == "__main__":
    main()
