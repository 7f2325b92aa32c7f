"""Things to play with: each computes what the package does; none needs a script."""

import json
import re

import nbformat
import pytest
import torch
from bs4 import BeautifulSoup
from torch import nn

from lora import LoRALinear, inject_lora
from lora.formats import NF4, round_trip, to_codes
from lora.study import search
from lora.study.evidence import interval
from tools import dial
from tools.kit.register import BOOK, ROOT

PAGES = {
    "nf4": "lab",
    "merge": "02-implementation",
    "seeds": "03-experiment",
    "dial": "04-a-pretrained-model",
}
FILE = json.loads(dial.FILE.read_text(encoding="utf-8"))


@pytest.fixture
def toy(page, site):
    """Opens the page of a toy and gives the toy."""

    def open_page(name):
        page.goto(f"{site}book/{PAGES[name]}.html")
        return page.locator(f".{name}-play")

    return open_page


def numbers(text):
    return [float(n) for n in re.findall(r"-?\d+\.\d+", text.replace("−", "-"))]


def test_toys_are_small():
    files = [ROOT / "book/_static" / name for name in ("play.js", "rank-slider.js")]
    assert sum(file.stat().st_size for file in files) < 15_000
    assert dial.FILE.stat().st_size < 20_000


@pytest.mark.parametrize("name", PAGES)
def test_a_toy_stands_without_scripts_and_on_paper(new_context, site, name):
    page = new_context(java_script_enabled=False).new_page()
    page.goto(f"{site}book/{PAGES[name]}.html")
    toy = page.locator(f".{name}-play")
    assert toy.count() == 1 and toy.locator("table, svg").first.is_visible()
    assert re.search(r"\d", toy.locator("output, tbody").first.inner_text())
    assert not toy.locator("input:visible, select:visible, button:visible").count()
    page.close()
    page = new_context().new_page()
    page.goto(f"{site}book/{PAGES[name]}.html")
    toy = page.locator(f".{name}-play")
    controls = toy.locator("input, select, button").all()
    assert controls and all(control.is_visible() for control in controls)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert not any(control.is_visible() for control in controls)
    assert toy.locator("table, svg").first.is_visible()
    assert name != "seeds" or toy.locator("g:visible").count() == 40


# Eight numbers in NF4 --------------------------------------------------------------


def test_eight_numbers_in_nf4_are_the_packages(toy):
    play = toy("nf4")

    def compare():
        texts = [row.split() for row in play.locator("tbody tr").all_inner_texts()]
        texts = [[n.replace("−", "-") for n in row] for row in texts]
        values = torch.tensor([float(row[0]) for row in texts])
        codes, _ = to_codes(values, NF4, 8)
        assert [int(row[1], 2) for row in texts] == codes.tolist()
        back = round_trip(values, "NF4", 8).tolist()
        assert [float(row[2]) for row in texts] == pytest.approx(back, abs=0.006)
        return values.tolist()

    still = BeautifulSoup(play.evaluate("play => play.outerHTML"), "html.parser")
    assert len(compare()) == len(still.select("tbody tr")) == 8
    sliders = play.locator("input")
    for i, number in enumerate([2.9, -0.4, 0, -2.2]):
        sliders.nth(i).fill(str(number))
        compare()
    sliders.first.press("ArrowLeft")
    assert compare()[0] == pytest.approx(2.89)
    values = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    found = play.evaluate("(play, all) => all.map(play.nf4)", values.tolist())
    codes, _ = to_codes(values.flatten(), NF4, 8)
    assert [hit["codes"] for hit in found] == codes.view(500, 8).tolist()


# A merge that loses an update ------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_merge_is_torchs_bit_for_bit(toy, name):
    """Normal and subnormal numbers, ties to even, updates of all sizes."""
    play, dtype = toy("merge"), getattr(torch, name)
    draw = torch.Generator().manual_seed(0)
    size = torch.empty(4000).uniform_(-25, 9, generator=draw).exp2()
    weights = (torch.randn(4000, generator=draw) * size).to(dtype)
    size = torch.empty(4000).uniform_(-25, 9, generator=draw).exp2()
    updates = torch.randn(4000, generator=draw) * size
    half_a_step = torch.tensor([1.5, 0.5, -0.5, 2.5]) * torch.finfo(dtype).eps
    weights = torch.cat([weights, torch.ones(4, dtype=dtype)])
    updates = torch.cat([updates, half_a_step])
    wanted = (weights.float() + updates).to(dtype).double()
    pairs = torch.stack([weights.double(), updates.double()], 1).tolist()
    run = "(play, [pairs, name]) => pairs.map(([w, u]) => play.merge(w, u, name))"
    assert play.evaluate(run, [pairs, name]) == wanted.tolist()


def test_a_merge_shows_what_is_kept(toy, soup):
    play, name = toy("merge"), f"book/{PAGES['merge']}.html"
    still = soup[name].select_one(".merge-play tbody").get_text(" ", strip=True)
    assert play.locator("tbody").inner_text().split() == still.split()
    layers = {
        name: LoRALinear(nn.Linear(1, 1, bias=False, dtype=getattr(torch, name)), 1, 1)
        for name in ("float32", "bfloat16", "float16")
    }
    for exponent in (-8, -5, -3.5, -2.7, -1):
        play.locator("input").fill(str(exponent))
        update = float(f"{10**exponent:.1e}")
        rows = play.locator("tbody tr").all()
        shown = [row.locator(".number").all_inner_texts() for row in rows]
        for layer, becomes, kept in zip(layers.values(), *shown, strict=True):
            nn.init.constant_(layer.base.weight, 0.5)
            layer.A.data.fill_(1)
            layer.B.data.fill_(update)
            merged = layer.merged().weight.item()
            assert float(becomes) == pytest.approx(merged, abs=5.1e-8)
            assert abs(int(kept[:-1]) - 100 * (merged - 0.5) / update) <= 0.5 + 1e-9
    play.locator("input").press("Home")
    said = play.locator("input").get_attribute("aria-valuetext")
    assert "bfloat16 keeps 0%" in said and "1e-8" in said


# Add a seed ------------------------------------------------------------------------


def test_seeds_give_the_interval_of_the_package(toy):
    play = toy("seeds")
    values = json.loads(play.get_attribute("data-numbers"))["runs"]
    cells = nbformat.read(BOOK / f"{PAGES['seeds']}.ipynb", as_version=4).cells
    bound = next(c.metadata.bound for c in cells if "seeds-play" in c.source)
    lists = [
        v.replace("−", "-").split(",") for v in bound.values() if v.count(",") > 30
    ]
    assert sorted(values.values()) == sorted([float(n) for n in v] for v in lists)
    assert set(values) == {"rank 1", "rank 2", "rank 8"}

    for rank in values.values():
        for n in range(2, 41):
            found = play.evaluate("(play, all) => play.interval(all)", rank[:n])
            assert found == pytest.approx(interval(rank[:n]), abs=1e-9)

    add, ten, again = play.get_by_role("button").all()
    status = play.locator("output")
    assert "no interval" in status.inner_text()
    add.press("Enter")
    ten.click()
    assert play.locator("g:visible").count() == 12
    for name, rank in values.items():
        play.locator("select").select_option(name)
        text = status.inner_text().partition(":")[2]
        assert numbers(text) == pytest.approx(interval(rank[:12]), abs=0.0051)
    for _ in range(3):
        ten.click()
    assert ten.is_disabled() and add.is_disabled()
    assert numbers(status.inner_text()) == pytest.approx(interval(rank), abs=0.0051)
    again.click()
    assert play.locator("g:visible").count() == 1 and add.is_enabled()
    for _ in range(4):
        ten.click()
    assert numbers(status.inner_text()) == pytest.approx(interval(rank), abs=0.0051)


# The dial of a trained adapter -----------------------------------------------------


def test_the_dial_reorders_the_list(toy):
    play = toy("dial")
    slider, choice = play.locator("input"), play.locator("select")
    assert not play.locator("table").is_visible()
    for entry in FILE["questions"]:
        choice.select_option(entry["question"])
        slider.press("Home")
        for i, stop in enumerate(FILE["stops"]):
            scores, place = entry["cosines"][i], entry["places"][i]
            names = [name for name, _ in entry["functions"]]
            best = sorted(zip(scores, names), key=lambda pair: -pair[0])
            lines = [line.split()[1] for line in play.locator("li").all_inner_texts()]
            assert lines[:6] == [name.rpartition(".")[2] for _, name in best[:6]]
            right = play.locator("li.right")
            assert right.get_attribute("value") == str(place)
            named = f"{place}. {entry['answer'].rpartition('.')[2]} ✓ "
            assert right.inner_text().startswith(named)
            said = f"Dial {stop:g}: {entry['answer']} is at place {place} of"
            assert play.locator("output").inner_text().startswith(said)
            slider.press("ArrowRight")


def test_the_dial_is_chapter_4s():
    """At 0 what the base says now; at 1 the places that the chapter shows."""
    cells = nbformat.read(BOOK / f"{PAGES['dial']}.ipynb", as_version=4).cells
    (box,) = [c for c in cells if c.metadata.get("book", {}).get("name") == "tab-box"]
    html = BeautifulSoup(box.outputs[0].data["text/html"], "html.parser")
    rows = [
        [cell.get_text() for cell in row.find_all(["th", "td"])]
        for row in html.select("tbody tr")
    ]
    assert [entry["question"] for entry in FILE["questions"]] == [r[0] for r in rows]
    within = box.metadata["tolerance"]["absolute"]
    tokenizer, model = search.load_minilm()
    for entry, (question, answer, before, first, after) in zip(FILE["questions"], rows):
        names, texts = zip(*entry["functions"])
        assert entry["answer"].endswith(f".{answer}")
        ends = [entry["places"][FILE["stops"].index(stop)] for stop in (0, 1)]
        assert ends == pytest.approx([int(before), int(after)], abs=within)
        scores = entry["cosines"][FILE["stops"].index(1)]
        best = [names[i] for i in range(len(names)) if scores[i] > max(scores) - 100]
        assert first in [name.rpartition(".")[2] for name in best]
        found = dial.cosines(model, tokenizer, [question], list(texts), [0])
        stored = torch.tensor(entry["cosines"][0]) / 1e4
        assert (found.flatten() - stored).abs().max() < 1e-3


class Sentences(nn.Module):
    """In place of MiniLM: one layer, and a sentence is a row of its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)


def test_the_tool_turns_the_dial_and_leaves_the_model(monkeypatch):
    torch.manual_seed(0)
    model, x = Sentences(), torch.randn(9, 5)
    inject_lora(model, rank=2, alpha=6)
    nn.init.normal_(model.layer.B)
    monkeypatch.setattr(search, "embed", lambda m, _, rows: m.layer(x[rows]).detach())
    found = dial.cosines(model, None, [0, 1], list(range(2, 9)), (0, 0.5, 1))
    base, update = model.layer.base, model.layer.B @ model.layer.A
    for stop, scores in zip((0, 0.5, 1), found):
        out = x @ (base.weight + 3 * stop * update).T + base.bias
        assert torch.allclose(scores, out[:2] @ out[2:].T, atol=1e-5)
    assert model.layer.scale == 3


def test_what_the_tool_keeps_of_a_question():
    """All that is among the first somewhere, and the right one, wherever it is."""
    scores = torch.stack([torch.linspace(1, 0, 40), torch.linspace(0, 1, 40)])
    shown = dial.to_show(scores, right=20)
    first, last = range(dial.SHOWN), range(40 - dial.SHOWN, 40)
    assert shown["best"] == [*first, 20, *last]
    assert shown["places"] == [21, 20]
    assert shown["cosines"][0][0] == 10_000 and shown["cosines"][1][0] == 0
