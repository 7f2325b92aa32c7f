"""The laboratory: in Chromium its engine beside PyTorch, and its page from disk."""

import json
import math
import os
import re
import shutil
import subprocess
from functools import cache
from urllib.parse import parse_qsl, urlsplit

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from torch import nn

from lora.core import LoRALinear, freeze_all, inject_lora
from lora.study.moons import moons_mlp, two_moons
from tools.kit.register import ROOT
from tools.lab import ENGINE, LAB, SCRIPTS, pretrained_numbers, stored_numbers

BIOME = "@biomejs/biome@2.6.8"
TASK = {"angle": 45, "points": 1000, "noise": 0.15, "seed": 0, "epochs": 60}
LORA = {"method": "LoRA", "rank": 2, "alpha": 8, "rule": "α/r", "lr": 0.003}
LORA |= {"start": "A random", "size": "1/r"}
METHODS = {
    "LoRA": {},
    "LoRA, both random": {"rank": 5, "start": "both random", "rule": "α/√r"},
    "B alone": {"method": "B alone"},
    "full": {"method": "full", "lr": 0.001},
}

# In the page: a run that starts from PyTorch's numbers, and gets PyTorch's batches.
START = """
const matrix = (rows) =>
  new Matrix(rows.length, rows[0].length, Float64Array.from(rows.flat()));
const startFrom = ({settings, numbers, adapters}) => {
  const run = new MoonsRun(settings, Float64Array.from(numbers));
  run.network.layers.filter((layer) => layer.A).forEach((layer, i) => {
    [layer.A.value, layer.B.value] = adapters[i].map(matrix);
  });
  return run;
};"""
RUN = """(start) => {
  const run = startFrom(start);
  run.training = {X: matrix(start.x), labels: start.labels};
  const losses = start.batches.map((rows) => run.step(rows));
  const merged = mergeLora(run.network);
  const test = {X: matrix(start.test[0]), labels: start.test[1]};
  return [losses, [run.network, merged].map((network) => network.accuracy(test))];
}"""
GRADIENTS = """(start) => {
  const run = startFrom(start);
  run.turn(start.dial);
  for (const parameter of run.network.parameters) parameter.trains = true;
  run.network.backward(matrix(start.x), start.labels);
  const gradients = run.network.parameters.map(({gradient}) => gradient);
  return [...gradients, ...run.updates].map(({data}) => [...data]);
}"""


@pytest.fixture(scope="module")
def engine(browser):
    """Opens an empty page with the engine, changed by `edits`: (file, old, new)."""

    def load(*edits):
        page = browser.new_page()
        for name in ENGINE:
            source = (LAB / f"{name}.js").read_text(encoding="utf-8")
            for file, old, new in edits:
                if file == name:
                    assert old in source, f"{name}.js no longer has {old!r}"
                    source = source.replace(old, new, 1)
            page.add_script_tag(content=source)
        page.add_script_tag(content=START)
        return page

    return load


def network(settings):
    """The laboratory's base in PyTorch, float64, prepared for a method."""
    model = moons_mlp()
    numbers = stored_numbers().double()
    nn.utils.vector_to_parameters(numbers, model.parameters())
    if settings["method"] == "full":
        return model
    freeze_all(model)
    torch.manual_seed(0)
    for layer in inject_lora(model, rank=settings["rank"], alpha=settings["alpha"]):
        if settings["rule"] == "α/√r":
            layer.scale = settings["alpha"] / math.sqrt(settings["rank"])
        if settings["start"] == "both random":
            nn.init.normal_(layer.B, std=0.2)
        layer.A.requires_grad_(settings["method"] != "B alone")
    return model


def as_lists(model):
    """What the page needs to start from the same network."""
    wrappers = [layer for layer in model if isinstance(layer, LoRALinear)]
    return {
        "numbers": stored_numbers().double().tolist(),
        "adapters": [[layer.A.tolist(), layer.B.tolist()] for layer in wrappers],
    }


@cache
def in_pytorch(name, steps):
    """Losses of `steps` steps, test accuracy, and what the page needs for the same."""
    settings = TASK | LORA | METHODS[name]
    model = network(settings)
    start = as_lists(model)
    x, y = two_moons(settings["points"], degrees=settings["angle"], seed=1000)
    test_x, test_y = two_moons(2000, degrees=settings["angle"], seed=2000)
    order = torch.Generator().manual_seed(0)
    batches = []
    while len(batches) < steps:
        batches += torch.randperm(len(x), generator=order).split(64)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=settings["lr"]
    )
    losses = []
    for rows in batches[:steps]:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    right = (model(test_x).argmax(-1) == test_y).double().mean().item()
    start |= {"settings": settings, "x": x.tolist(), "labels": y.tolist()}
    start |= {"batches": [rows.tolist() for rows in batches[:steps]]}
    return losses, right, start | {"test": [test_x.tolist(), test_y.tolist()]}


def loss_error(page, name, steps=50):
    """Largest relative difference of the first losses; accuracies there and here."""
    losses, right, start = in_pytorch(name, steps)
    ours, accuracies = page.evaluate(RUN, start)
    ours, theirs = (torch.tensor(v[:50], dtype=torch.float64) for v in (ours, losses))
    return ((ours - theirs).abs() / theirs).max().item(), accuracies, right


@cache
def autograd():
    """Gradients of all parameters and each ΔW, at a dial of 0.7, and where."""
    settings, dial = TASK | LORA | {"rank": 3, "start": "both random"}, 0.7
    model = network(settings)
    start = as_lists(model)
    model.requires_grad_(True)
    wrappers = [layer for layer in model if isinstance(layer, LoRALinear)]
    for layer in wrappers:
        layer.scale *= dial
    x, y = two_moons(50, degrees=30, seed=5)
    nn.functional.cross_entropy(model(x), y).backward()
    wanted = []
    for layer in wrappers:
        base = layer.base
        wanted += [p.grad for p in (base.weight, base.bias, layer.A, layer.B)]
    wanted += [(layer.weight - layer.base.weight).detach() for layer in wrappers]
    start |= {"settings": settings, "x": x.tolist(), "labels": y.tolist(), "dial": dial}
    return wanted, start


def gradient_error(page):
    """Largest error of any gradient or ΔW, relative to its largest entry."""
    wanted, start = autograd()
    errors = []
    for ours, theirs in zip(page.evaluate(GRADIENTS, start), wanted, strict=True):
        difference = torch.tensor(ours, dtype=torch.float64) - theirs.flatten()
        errors.append(difference.abs().max() / theirs.abs().max())
    return torch.stack(errors).max().item()  # max of a tensor: NaN stays


# The engine -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LoRA", "full"])
def test_a_whole_run_is_pytorchs(engine, name):
    error, accuracies, right = loss_error(engine(), name, steps=960)
    assert error < 1e-6 and right > 0.97
    assert accuracies == pytest.approx([right, right], abs=0.001)  # and merged


@pytest.mark.parametrize("name", ["LoRA, both random", "B alone"])
def test_losses_are_pytorchs(engine, name):
    assert loss_error(engine(), name)[0] < 1e-6


def test_gradients_are_autograds(engine):
    assert gradient_error(engine()) < 1e-9


B = "this.B.value"
TURNED = "new Matrix(this.B.value.rows, this.B.value.cols, this.B.value.T.data)"
ERRORS = {
    "the scale twice, forward": (
        "adapters",
        "(this.H, ",
        "(this.H.scaled(this.scale), ",
    ),
    "the scale twice, backward": (
        "adapters",
        f"times(G, {B})",
        f"times(G, {B}).scaled(this.scale)",
    ),
    "B transposed, forward": ("adapters", f"(this.H, {B})", f"(this.H, {TURNED})"),
    "B transposed, backward": ("adapters", f"times(G, {B})", f"times(G, {TURNED})"),
    "B transposed in the update": ("adapters", f"times({B}", f"times({TURNED}"),
    "the other rule": ("adapters", "alpha / Math.sqrt(rank)", "alpha / rank"),
    "the dial left out": ("adapters", "this.scale * this.dial", "this.scale"),
    "a loss of the sum": ("network", "1 : 0)) / rows", "1 : 0))"),
    "tanh's slope": ("network", "(1 - Y[i] * Y[i])", "(1 - Y[i])"),
    "no bias correction": ("optimizer", "Math.sqrt(v[i]) / root", "Math.sqrt(v[i])"),
    "no weight decay": ("optimizer", "p[i] * shrink", "p[i]"),
    "a gradient that is not squared": ("optimizer", "g[i] * g[i]", "g[i]"),
}


@pytest.mark.parametrize(("file", "old", "new"), ERRORS.values(), ids=ERRORS)
def test_planted_errors_are_caught(engine, file, old, new):
    page = engine((file, old, new))
    right = loss_error(page, "LoRA, both random")[0] < 1e-6
    right = right and gradient_error(page) < 1e-9
    assert not right, f"{file}.js with {new!r} passes both checks"


def test_singular_values_are_torchs(engine):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    matrices = [draw(128, 128), draw(128, 2), draw(2, 128), draw(7, 5), draw(1, 1)]
    matrices += [draw(128, 3) @ draw(3, 128), torch.zeros(4, 6), torch.eye(9)]
    matrices += [draw(64, 64) * 0.5 ** torch.arange(64)]  # from 1 down to 1e-19
    page = engine()
    for matrix in matrices:
        ours = page.evaluate(
            "([rows, cols, data]) => "
            "singularValues(new Matrix(rows, cols, Float64Array.from(data)))",
            [*matrix.shape, matrix.flatten().tolist()],
        )
        theirs = torch.linalg.svdvals(matrix.double())
        error = (torch.tensor(ours, dtype=torch.float64) - theirs).abs().max()
        assert len(ours) == min(matrix.shape) and error <= 1e-12 * max(1, theirs[0])


def test_moons_are_scikit_learns(engine):
    rows = engine().evaluate(
        "() => {const {X, labels} = twoMoons(101, 0, 30, new Random(0, 0));"
        "return labels.map((label, i) => [label, ...X.data.slice(2 * i, 2 * i + 2)])}"
    )
    x, y = two_moons(101, noise=0, degrees=30)
    wanted = torch.cat([y[:, None].double(), x], 1)
    order = lambda rows: sorted(rows.double().round(decimals=9).add(0.0).tolist())  # noqa: E731
    assert order(torch.tensor(rows, dtype=torch.float64)) == order(wanted)


def test_random_numbers_are_gaussian_and_repeat(engine):
    page = engine()
    draw = "([seed, stream]) => {const r = new Random(seed, stream);"
    draw += "return Array.from({length: 40000}, () => r.gaussian())}"
    samples = [
        torch.tensor(page.evaluate(draw, case), dtype=torch.float64)
        for case in ([0, 1], [0, 2], [1, 1], [0, 1])
    ]
    assert torch.equal(samples[0], samples[3])
    for x in samples[:3]:
        assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
        assert abs((x**4).mean() - 3) < 0.2
        assert abs(x[1:] @ x[:-1]) / len(x) < 0.02
    correlations = torch.corrcoef(torch.stack(samples[:3]))
    assert (correlations - torch.eye(3)).abs().max() < 0.02


def test_four_starts(engine):
    """A and B are zero or not as named, and as large as named."""
    page = engine()
    for start, random in {
        "A random": (True, False),
        "B random": (False, True),
        "both random": (True, True),
        "both zero": (False, False),
    }.items():
        for size, std in {"1/r": 1 / 4, "Kaiming": 1 / math.sqrt(3 * 128)}.items():
            settings = TASK | LORA | {"rank": 4, "start": start, "size": size}
            pair = page.evaluate(
                "([settings, numbers]) => {"
                "const run = new MoonsRun(settings, Float64Array.from(numbers));"
                "const {A, B} = run.linear[1];"
                "return [A, B].map(({value}) => [...value.data])}",
                [settings, stored_numbers().tolist()],
            )
            for values, drawn in zip(pair, random):
                measured = torch.tensor(values).double().square().mean().sqrt().item()
                assert measured == pytest.approx(std if drawn else 0, rel=0.15)


@pytest.mark.parametrize("method", ["LoRA", "B alone", "full"])
def test_undo_gives_the_base_bit_for_bit(engine, method):
    script = (
        "([settings, numbers, spoil]) => {"
        "const run = new MoonsRun(settings, Float64Array.from(numbers));"
        "run.advance(); if (spoil) run.linear[1].base.W.value.data[7] += 1e-12;"
        "return [run.undo(), run.look().target]}"
    )
    settings = TASK | LORA | {"method": method, "points": 64}
    numbers = stored_numbers().double().tolist()
    page = engine()
    same, _ = page.evaluate(script, [settings, numbers, False])
    assert same == 33_666
    if method != "full":
        same, _ = page.evaluate(script, [settings, numbers, True])
        assert same == 33_665


@pytest.mark.parametrize(("k", "r", "fall"), [(4, 2, 0), (4, 1, 1), (3, 5, 0)])
def test_the_bench_ends_at_its_bound(engine, k, r, fall):
    settings = {"planted": k, "rank": r, "fall": fall, "seed": 1, "steps": 250}
    D, spread, bound, errors = engine().evaluate(
        "(settings) => {const run = new PlantedRun(settings);"
        "while (!run.done) run.advance();"
        "return [[...run.D.data], [...run.spread], run.bound, run.errors]}",
        settings,
    )
    D = torch.tensor(D, dtype=torch.float64).reshape(64, 64)
    values = torch.linalg.svdvals(D)
    assert torch.allclose(values[:k], torch.full((k,), 8.0).double())
    assert values[k] < 1e-9
    squares = torch.linalg.svdvals(D * torch.tensor(spread, dtype=D.dtype)).square()
    assert bound == pytest.approx((squares[r:].sum() / squares.sum()).item(), abs=1e-9)
    if fall == 0:
        assert bound == pytest.approx(max(0, 1 - r / k), abs=1e-9)
    else:
        assert bound < 1 - r / k - 0.1  # correlated inputs: an easier task
    assert len(errors) == 251 and errors[0] == pytest.approx(1)
    assert min(errors) >= bound - 1e-9 and errors[-1] < bound + 0.02


# The files ------------------------------------------------------------------------


def test_the_base_is_chapter_3s():
    stored, numbers = stored_numbers(), pretrained_numbers()
    assert stored.shape == (33_666,)
    assert torch.allclose(stored, numbers, rtol=0, atol=1e-6), (
        "the pretrained network has changed: python -m tools.lab weights"
    )


def test_the_scripts_are_small_and_all_there():
    files = {file.stem: file.stat().st_size for file in LAB.glob("*.js")}
    assert files.pop("base") < 200_000
    assert set(files) == set(SCRIPTS) and sum(files.values()) <= 42_000
    page = (ROOT / "book" / "lab.md").read_text(encoding="utf-8")
    assert re.findall(r'lab/(\w+)\.js" defer', page) == ["base", *SCRIPTS]


def test_the_scripts_are_formatted_and_linted():
    config = json.loads((ROOT / "biome.json").read_text(encoding="utf-8"))
    assert config["$schema"].split("/")[-2] == BIOME.rpartition("@")[2]
    npx = shutil.which("npx")
    if not npx:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no npx: install Node.js"
        )
    command = [npx, "--yes", "--prefer-offline", BIOME, "ci", "--error-on-warnings"]
    run = subprocess.run(
        [*command, "book/_static/lab"], cwd=ROOT, capture_output=True, text=True
    )
    if re.search("EAI_AGAIN|ENOTFOUND|ECONNREFUSED|ETIMEDOUT", run.stderr):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no npm registry")
    assert run.returncode == 0, f"npx {BIOME} check --write:\n{run.stdout}{run.stderr}"


# The page, opened from disk -------------------------------------------------------


@pytest.fixture
def visit(new_context, book):
    """Opens the page from disk with an address's settings; fails on script errors."""
    errors = []

    def open_page(query="", **options):
        options = {"viewport": {"width": 1265, "height": 800}} | options
        page = new_context(**options).new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((book / "book" / "lab.html").as_uri() + query)
        return page

    yield open_page
    assert not errors, f"script errors: {errors}"


def ready(page):
    """Waits until both runs have reported."""
    for run in "ab":
        page.locator(f"#{run}-epoch:not(:empty)").wait_for()


def train(page):
    ready(page)
    page.click("#lab-train")
    page.locator("#lab-status:has-text('Done')").wait_for(timeout=120_000)


QUICK = "?task.points=64&task.epochs=20&a.rank=4"
FRAME = """() => new Promise(
  (done) => requestAnimationFrame(() => requestAnimationFrame(done)))"""
SPOKEN = """() => {
  window.spoken = [];
  const status = document.getElementById('lab-status');
  new MutationObserver(() => status.textContent && spoken.push(status.textContent))
    .observe(status, {childList: true});
  window.drawn = 0;
  const draw = drawMap;
  drawMap = (...all) => { drawn++; draw(...all); };
}"""


def test_a_run_from_disk(visit):
    page = visit(QUICK)
    ready(page)
    base = page.inner_text("#a-target"), page.inner_text("#a-source")
    page.evaluate(SPOKEN)
    train(page)
    assert len(page.evaluate("spoken")) == 1, "the live region speaks at the end, once"
    status = page.inner_text("#lab-status")
    assert "LoRA, rank 4" in status and "full" in status
    assert page.inner_text("#a-epoch") == page.inner_text("#b-epoch") == "20 of 20"
    assert page.inner_text("#a-trains") == "3,088"
    assert page.inner_text("#b-trains") == "33,666"
    assert "by layer: " in page.get_attribute("#a-spectra", "aria-label")
    trained = page.inner_text("#a-target"), page.inner_text("#a-source")
    assert float(trained[0][:-1]) > float(base[0][:-1]) + 10
    for c, shown in (("0", base), ("1", trained)):
        page.fill("#a-turn", c)
        for name, text in zip(("target", "source"), shown):
            page.locator(f"#a-{name}:text-is('{text}')").wait_for()
    assert page.is_disabled("#b-turn"), "full fine-tuning has no adapter to turn"
    page.click("#a-undo")
    page.locator("#lab-status:has-text('33,666 of 33,666 numbers equal')").wait_for()
    assert page.inner_text("#a-target") == base[0] and page.is_disabled("#a-turn")


def test_dials_by_keyboard_and_the_address(visit, site, page):
    lab = visit("?b.rank=99&task.points=64&a.start=nowhere&b.method=B+alone#lab")
    ready(lab)
    status = lab.inner_text("#lab-status")
    assert "b.rank = 99 (accepted: 1 to 16)" in status
    assert "a.start = nowhere (accepted: A random, B random, both random" in status
    assert lab.input_value("[name='task.points']") == "64"
    assert lab.input_value("[name='b.rank']") == "2"
    assert lab.is_enabled("[name='b.rank']")
    lab.focus("[name='task.angle']")
    lab.keyboard.press("ArrowRight")
    assert lab.input_value("[name='task.angle']") == "50"
    lab.focus("[name='b.rank']")
    lab.keyboard.press("End")
    # After the #: not all browsers let a page on disk change the rest of its address.
    fragment = lab.url.partition("#")[2]
    assert "task.angle=50" in fragment and "b.rank=16" in fragment
    lab.reload()
    ready(lab)
    assert lab.input_value("[name='b.rank']") == "16"
    assert lab.input_value("[name='task.points']") == "64"
    lab.select_option("[name='b.method']", "full")
    assert lab.is_disabled("[name='b.rank']") and lab.is_enabled("[name='b.lr']")
    lab.focus("#lab-train")
    lab.keyboard.press("Enter")
    lab.locator("#lab-train:text-is('Stop')").wait_for()
    lab.keyboard.press("Enter")
    lab.locator("#lab-train:text-is('Train both')").wait_for()

    page.goto(f"{site}book/lab.html")
    ready(page)
    page.click("#a-dials summary")
    page.select_option("[name='a.start']", "both zero")
    assert page.url.endswith("lab.html?a.start=both+zero")
    page.click("text=rank 2 beside rank 8")
    ready(page)
    assert page.input_value("[name='b.rank']") == "8"
    assert page.input_value("[name='a.start']") == "A random"


def test_both_zero_learns_nothing(visit):
    page = visit(QUICK + "&b.method=LoRA&b.lr=0.003&b.start=both+zero")
    ready(page)
    assert page.is_disabled("#a-turn"), "before training there is nothing to dial"
    before = page.inner_text("#b-target")
    train(page)
    assert page.inner_text("#b-target") == before != page.inner_text("#a-target")
    assert page.is_enabled("#a-turn") and page.is_disabled("#b-turn")


def test_nothing_is_said_of_a_run_that_is_no_more(visit):
    page = visit("?task.epochs=150&b.method=LoRA&b.start=both+random")
    status = page.locator("#lab-status")
    ready(page)
    assert page.is_disabled("#a-turn") and page.is_enabled("#b-turn")
    page.click("#lab-train")
    assert page.is_disabled("#a-turn") and page.is_disabled("#a-undo")
    page.locator("#a-epoch:text-matches('^[1-9]')").wait_for()
    page.click("#lab-train")
    status.get_by_text("Stopped. A: LoRA, rank 2, A random after ").wait_for()
    epochs = page.inner_text("#a-epoch")
    assert f"after {epochs} epochs: " in status.inner_text()
    assert page.is_enabled("#a-turn") and page.is_enabled("#a-undo")
    page.fill("#a-turn", "0.5")
    page.locator("#a-title:text-is('A: LoRA, rank 2, A random, c = 0.5')").wait_for()
    assert status.inner_text() == ""
    page.fill("[name='task.angle']", "90")
    page.locator("#a-epoch:text-is('0 of 150')").wait_for()
    assert page.is_disabled("#a-turn") and status.inner_text() == ""


def test_reduced_motion(visit):
    page = visit(QUICK, reduced_motion="reduce")
    ready(page)
    page.evaluate(FRAME)
    page.evaluate(SPOKEN)
    train(page)
    page.evaluate(FRAME)
    assert 1 <= page.evaluate("drawn") <= 2, "only the ends of the two runs are drawn"


def test_a_phone_shows_what_trains(visit):
    size = {"width": 390, "height": 844}
    page = visit(QUICK, viewport=size, reduced_motion="reduce")
    ready(page)
    bottom = "document.getElementById('b-map').getBoundingClientRect().bottom"
    assert page.evaluate(bottom) > 844
    # Playwright's own click would move the page.
    page.evaluate("document.getElementById('lab-train').click()")
    assert page.evaluate(bottom) < 844


def test_the_bench(visit):
    page = visit("?bench.planted=4&bench.rank=1")
    page.locator("#bench-train").click()
    page.locator("#bench-status:has-text('Done')").wait_for(timeout=60_000)
    text = page.inner_text("#bench-status")
    error, bound = map(float, re.findall(r"0\.\d+", text))
    assert bound == 0.75 and bound <= error < 0.77


@pytest.mark.parametrize("chapter", ["02-implementation", "03-experiment"])
def test_a_chapter_opens_it_with_the_dials_set(new_context, book, chapter):
    """From disk, too; without a script it is a link."""
    page = new_context().new_page()
    page.goto((book / "book" / f"{chapter}.html").as_uri())
    links = page.locator('.bd-article p > a[href^="lab.html#"]')
    assert links.count() >= 2 and not page.locator("iframe").count()
    for i in range(links.count()):
        page.locator(".lab-try button").nth(i).click()
        frame = page.frame_locator("iframe")
        frame.locator("#b-epoch:not(:empty)").wait_for()
        dials = frame.locator('#lab [name^="b."]').all()
        found = {(d.get_attribute("name"), d.input_value()) for d in dials}
        question = links.nth(i).get_attribute("href").partition("#")[2]
        wanted = frame.locator(f'#{question} a[href*="?"]').get_attribute("href")
        query = parse_qsl(urlsplit(wanted).query)
        assert query and {wish for wish in query if wish[0][0] == "b"} <= found
        assert not frame.locator(".bd-article h1").is_visible(), "it stands alone"
        page.locator(".lab-try button").nth(i).click()
        assert not page.locator("iframe").count()


@pytest.mark.parametrize("how", ["no script", "print"])
def test_a_still_picture_stands_in(visit, how):
    page = visit(java_script_enabled=how != "no script")
    if how == "print":
        ready(page)
        assert not page.locator(".lab-still").is_visible()
        page.emulate_media(media="print")
    assert page.locator(".lab-still").is_visible()
    assert page.locator(".lab-still figcaption").inner_text()
    assert not page.locator("#lab").is_visible()
    assert not page.locator("#bench").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_after_a_run_it_is_accessible_and_fits_a_phone(visit, scheme):
    size = {"width": 390, "height": 800}
    page = visit("?task.points=16&task.epochs=3", viewport=size, color_scheme=scheme)
    train(page)
    page.evaluate(
        "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    found = Axe().run(page, context="article").response["violations"]
    assert not found, [(rule["id"], rule["nodes"][0]["html"][:90]) for rule in found]
    dark = page.evaluate("getComputedStyle(find('lab')).getPropertyValue('--lab-text')")
    assert (dark.strip() == "#e4e6e8") == (scheme == "dark")
