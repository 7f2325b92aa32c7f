"""Landing page, claims page, footer, what pages weigh, the book on paper."""

import re
from collections import Counter
from copy import copy
from importlib.metadata import version
from urllib.parse import parse_qs, urlsplit

import nbformat
import pytest
import torch
import yaml
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from fontTools.ttLib import TTFont
from pypdfium2 import PdfDocument

from lora.formats import NF4, round_trip, to_codes
from tools.kit import ledger
from tools.kit.register import BASE, ROOT, chapters, colab, pages
from tools.pdf import SINGLE, print_book

PAGES = pages()
CHAPTERS = [c.path.stem for c in chapters()]
CLAIMS = ledger.claims()
each_page = pytest.mark.parametrize("path", PAGES)


# The landing page -----------------------------------------------------------------


def test_the_bar_counts_the_claims_and_opens_them(soup):
    text = (ROOT / "book" / "claims.md").read_text()
    shown = {}
    for part in soup[f"{PAGES[0]}.html"].select("ul.verdicts li a"):
        address = urlsplit(part["href"])
        assert address.path == "claims.html"
        (key,) = parse_qs(address.query)["verdict"]
        shown[key] = int(part.b.get_text())
        listed = soup["book/claims.html"].select(f"table.claims tr.{key}")
        assert len(listed) == shown[key]
    for verdict in ledger.VERDICTS:
        there = re.findall(rf"(?m)^\d+\. \*.*\*\*{verdict}\.?\*\*", text)
        assert shown[ledger.key(verdict)] == len(there)
    assert sum(shown.values()) == len(CLAIMS)


@pytest.mark.parametrize("width", [1280, 390])
def test_where_to_start_is_on_the_first_screen(page, site, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{site}{PAGES[0]}.html")
    first = f"{site}book/{CHAPTERS[0]}.html"
    targets = {"Start reading": first, "Run on Colab": colab(chapters()[0].path)}
    for label, target in targets.items():
        link = page.get_by_role("link", name=label)
        box = link.bounding_box()
        assert link.evaluate("a => a.href") == target
        assert box["y"] + box["height"] <= 800, f"{label}: below the first screen"
        assert box["x"] + box["width"] <= width and box["height"] >= 24


def test_the_dial_turns_the_rank(page, site):
    page.goto(f"{site}{PAGES[0]}.html")
    dial = page.locator("#rank-dial")
    slider = dial.get_by_role("slider")
    slider.press("Home")
    for rank in (1, 2, 4, 8, 16, 32, 64):
        a, b, w = (
            dial.locator(f"rect.{c}").bounding_box() for c in ("a", "b", "frozen")
        )
        unit = w["width"] / 129  # 128 and its line
        for thick, long in ((a["height"], a["width"]), (b["width"], b["height"])):
            assert thick / unit == pytest.approx(rank, abs=0.1)
            assert long / unit == pytest.approx(128, abs=0.1)
        said = f"{rank * (128 + 128):,}"
        share = f"{int(1000 * rank * 256 / 128**2 + 0.5) / 10}%"
        count = dial.locator(".count").inner_text()
        assert f"Rank {rank}: {said} trained" in count and share in count
        spoken = slider.get_attribute("aria-valuetext")
        assert spoken == f"rank {rank}: {said} numbers, {share} of W"
        slider.press("ArrowRight")


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_the_dial_moves_once_by_itself_and_not_for_all(new_context, site, motion):
    page = new_context(reduced_motion=motion).new_page()
    page.clock.install(time=0)
    page.clock.pause_at(1000)  # a slow machine would see it move
    page.goto(f"{site}{PAGES[0]}.html")
    slider = page.get_by_role("slider")
    assert slider.input_value() == "3"
    page.clock.run_for(1500)
    assert (slider.input_value() == "3") == (motion == "reduce")
    slider.focus()  # whoever takes it, has it
    held = slider.input_value()
    page.clock.run_for(1500)
    assert slider.input_value() == held


def test_without_scripts_the_picture_stands_still(new_context, site):
    page = new_context(java_script_enabled=False).new_page()
    page.goto(f"{site}{PAGES[0]}.html")
    assert page.locator("#rank-dial svg").is_visible()
    assert not page.locator("#rank-dial input").is_visible()
    assert "2,048" in page.locator("#rank-dial figcaption").inner_text()
    page.goto(f"{site}book/claims.html?verdict=holds")
    shown = page.locator("table.claims tbody tr:visible")
    assert shown.count() == len(CLAIMS), "without scripts every claim shows"
    assert not page.locator("nav.filters").is_visible()


# Things to play with --------------------------------------------------------------


@pytest.mark.parametrize("scripts", [True, False])
def test_eight_numbers_in_nf4_are_the_packages(new_context, site, scripts):
    page = new_context(java_script_enabled=scripts).new_page()
    page.goto(f"{site}book/lab.html")
    play = page.locator(".nf4-play")

    def rows():
        """Of each row what stands in it: the number, its code, what comes back."""
        texts = [row.split() for row in play.locator("tbody tr").all_inner_texts()]
        texts = [[n.replace("−", "-") for n in row] for row in texts]
        return [(float(row[0]), int(row[1], 2), float(row[2])) for row in texts]

    def compare():
        values = torch.tensor([number for number, _, _ in rows()])
        codes, _ = to_codes(values, NF4, 8)
        assert [code for _, code, _ in rows()] == codes.tolist()
        back = round_trip(values, "NF4", 8).tolist()
        assert [stored for _, _, stored in rows()] == pytest.approx(back, abs=0.006)

    compare()
    sliders = play.locator("input")
    assert sliders.first.is_visible() == scripts
    for i, number in enumerate([2.9, -0.4, 0, -2.2] if scripts else []):
        sliders.nth(i).fill(str(number))
        compare()
    if scripts:
        sliders.first.press("ArrowLeft")
        assert rows()[0][0] == 2.89
        numbers = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        found = play.evaluate("(play, all) => all.map(play.nf4)", numbers.tolist())
        codes, _ = to_codes(numbers.flatten(), NF4, 8)
        assert [hit["codes"] for hit in found] == codes.view(500, 8).tolist()


# The claims page ------------------------------------------------------------------


def words(text):
    """The words of a row, in any order: the verdict may have gone into its badge."""
    text = re.sub(r"<!--.*?-->|\]\([^)]*\)|\$[^$]*\$|\\\(.*?\\\)", " ", text)
    return sorted(re.findall(r"\w+", text.lower()))


def test_each_claim_is_a_row_with_its_verdict_and_no_word_lost(soup):
    for claim in CLAIMS:
        found = soup["book/claims.html"].select_one(f"tr#claim-{claim.number}")
        number, said, verdict, places = found.find_all("td")
        assert number.get_text(strip=True) == str(claim.number)
        assert verdict.get_text(strip=True) == claim.verdict
        wanted = re.findall(r"\]\(([\w-]+)\.ipynb#([^)]+)\)", claim.source)
        assert [a["href"] for a in places.find_all("a")] == [
            f"{path}.html#{anchor}" for path, anchor in wanted
        ]
        checks = [code.get_text() for code in said.select("details ul code")]
        assert checks == ledger.checks(claim.source)
        assert not said.select("details[open]"), "what asserts it is folded"
        text = " ".join(cell.get_text(" ") for cell in (said, verdict, places))
        text = text.replace("In full, and what asserts it", "")
        source = re.sub(r"^\d+\. ", "", claim.source)
        lost = set(words(source)) - set(words(text))
        assert not lost, f"claim {claim.number}: {lost}"


def visible(page):
    rows = page.locator("table.claims tbody tr:visible")
    return [int(row.removeprefix("claim-")) for row in rows.evaluate_all(
        "rows => rows.map((row) => row.id)"
    )]  # fmt: skip


def test_the_filter(page, site):
    address = f"{site}book/claims.html"
    page.goto(address)
    assert visible(page) == [claim.number for claim in CLAIMS]

    nav = page.get_by_role("navigation", name="Filter the claims")
    nav.get_by_role("link", name="Does not hold").press("Enter")
    failed = [claim for claim in CLAIMS if claim.verdict == "Does not hold"]
    assert visible(page) == [claim.number for claim in failed]
    nav.get_by_role("link", name="Part 2").click()
    both = [claim.number for claim in failed if claim.part == 2]
    assert visible(page) == both and 0 < len(both) < len(failed)
    assert (
        nav.get_by_role("status").inner_text() == f"{len(both)} of {len(CLAIMS)} claims"
    )
    chosen = nav.locator("[aria-current]").evaluate_all("all => all.map(a => a.text)")
    assert [re.sub(r" \d+$", "", text) for text in chosen] == [
        "Does not hold",
        "Part 2",
    ]
    assert page.get_by_role("heading", name="Part 1").count() == 0, "an empty part"
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    assert not found.response["violations"], found.generate_report()

    shared = page.url
    page.go_back()
    assert visible(page) == [claim.number for claim in failed]
    page.goto(shared)
    assert visible(page) == both, "the address holds the choice"
    page.goto(f"{address}?verdict=nonsense")
    assert len(visible(page)) == len(CLAIMS)
    held = next(claim.number for claim in CLAIMS if claim.verdict == "Holds")
    page.goto(f"{address}?verdict=does-not-hold#claim-{held}")
    assert held in visible(page), "a link to a claim shows it"


# Who and under what terms ---------------------------------------------------------


def test_terms_versions_and_the_day(soup):
    text = soup[f"{PAGES[0]}.html"].select_one("dl.terms").get_text(" ")
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for part in ("CC BY 4.0", "MIT", cite["title"], cite["version"], cite["url"]):
        assert part in text, part
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(),
                           re.MULTILINE))  # fmt: skip
    rows = soup[f"{PAGES[0]}.html"].select("table.versions tbody tr")
    said = dict([cell.get_text() for cell in row.find_all("td")] for row in rows)
    assert said.pop("Python")
    assert len(said) > 3
    for package, number in said.items():
        assert number.split("+")[0] == pins[package], "not the version that is pinned"
    day = max(
        nbformat.read(c.path, as_version=4).metadata.get("ran", "") for c in chapters()
    )
    for path in PAGES:
        foot = soup[f"{path}.html"].select_one("footer p.terms")
        assert "Licence: CC BY 4.0, code MIT" in foot.get_text(), path
        assert f"PyTorch {version('torch')}" in foot.get_text(), path
        assert re.search(r"last (run|changed) on \d+ \w+ 20\d\d", foot.get_text()), path
        assert not day or int(day[8:]) == int(re.search(r"on (\d+)", foot.text)[1])


# Weight ---------------------------------------------------------------------------


@each_page
def test_nothing_blocks_the_first_paint(soup, path):
    for script in soup[f"{path}.html"].select("script[src]"):
        assert script.has_attr("defer") or "documentation_options" in script["src"], (
            f"{path}: {script['src']} blocks; see `lighter` in book/_ext/front.py"
        )
    loads = bool(soup[f"{path}.html"].select("script[src*=mathjax]"))
    assert loads == bool(soup[f"{path}.html"].select(".math")), (
        f"{path}: MathJax where needed"
    )
    for image in soup[f"{path}.html"].article.select("img:not([src^='data:'])"):
        sized = image.has_attr("width") or "width" in image.get("style", "")
        assert image.get("loading") == "lazy" and sized, f"{path}: {image}"


def test_icons_are_few_and_all_there(book, soup):
    fonts = list((book / "_static/vendor/fontawesome/webfonts").glob("*.woff"))
    assert 0 < sum(f.stat().st_size for f in fonts) < 20_000
    drawn = {code for f in fonts for code in TTFont(f).getBestCmap()}
    css = (book / "_static/styles/pydata-sphinx-theme.css").read_text()
    used = {
        c for s in soup.values() for i in s.select("[class*=fa-]") for c in i["class"]
    }
    names = {n for n in used if re.match(r"fa-(?!solid|brands|regular|lg|fw|\dx)", n)}
    assert len(names) > 5
    for name in names:
        code = re.search(rf"\.{name}:before[^{{]*{{content:\"\\([0-9a-f]+)\"", css)
        assert code and int(code[1], 16) in drawn, f"the icon {name} is not in the font"
    assert "fontawesome.js" not in " ".join(map(str, soup.values()))


# On paper -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper(book, browser):
    """The whole book as `make pdf` prints it."""
    return print_book(browser)


@pytest.fixture(scope="module")
def printed(paper):
    """Page of `_toc.yml` -> the texts of its pages in the PDF, by the outline."""
    document = PdfDocument(paper)
    tops = [entry for entry in document.get_toc() if entry.level == 0]
    starts = [entry.get_dest().get_index() for entry in tops]
    assert len(starts) == len(PAGES), [entry.get_title() for entry in tops]
    texts = [letters(sheet.get_textpage().get_text_range()) for sheet in document]
    ends = [*starts[1:], len(texts)]
    return {path: texts[a:b] for path, a, b in zip(PAGES, starts, ends, strict=True)}


def letters(text):
    return re.sub(r"\W", "", text)


@each_page
def test_the_pdf_has_each_page_from_its_first_word_to_its_last(printed, soup, path):
    if path.removeprefix("book/") in CHAPTERS:
        assert len(printed[path]) <= 24, f"{path}: {len(printed[path])} pages"
    article = copy(soup[f"{path}.html"].article)
    unprinted = (
        ".headerlink, .math, .tag_hide-cell:not(.solution), table.claims details"
    )
    for tag in article.select(unprinted):
        tag.decompose()
    blocks = [block.get_text() for block in article.select("p, pre, td")]
    # The reading order of a PDF may differ by a block: the last page, three words.
    last = " ".join([b for b in blocks if letters(b)][-1].split()[-3:])
    full = [text for text in printed[path] if len(text) > 9]  # more than its number
    assert letters(last) in full[-1], f"{path}: no {last!r} on its last page"
    title = article.h1.get_text()
    assert letters(title) in printed[path][0][:100], f"{path}: no title {title}"


def test_the_pdf_has_the_solutions_and_nothing_that_is_folded_else(printed):
    for chapter in chapters():
        text = "".join(printed[f"book/{chapter.path.stem}"])
        cells = nbformat.read(chapter.path, as_version=4).cells
        shown = [c.source for c in cells if not c.source.startswith("# @title ")]
        shown = letters("".join(shown))
        for cell in cells:
            if title := re.match("# @title (.*)\n", cell.source):
                line = letters(max(cell.source.splitlines()[1:], key=len))
                if line in shown:
                    continue  # stands in a visible cell, too
                assert (line in text) == title[1].startswith("Solution"), title[1]


def test_the_pdf_has_its_formulas_typeset(paper):
    text = "".join(p.get_textpage().get_text_range() for p in PdfDocument(paper))
    left = re.findall(r"\\(?:frac|mathbb|text|times|alpha|Delta)\b.*", text)
    assert not left, f"{len(left)} formulas stand as TeX: {left[:3]}"


def test_the_pdf_links_from_chapter_to_chapter_and_to_the_world(paper):
    assert len(re.findall(rb"/Subtype\s*/Link", paper)) > 100
    addresses = {a.decode() for a in re.findall(rb"/URI \(([^)]*)\)", paper)}
    assert any("arxiv.org" in address for address in addresses)
    ours = {a.removeprefix(BASE) for a in addresses if a.startswith(BASE)}
    wrong = {a for a in ours if a.startswith("book/")}
    assert not wrong, f"a link into the book must stay in it: {wrong}"
    # Several chapters have a section `#exercises`: a link must name one of them.
    article = BeautifulSoup((SINGLE / "whole.html").read_bytes(), "html.parser").article
    names = Counter(tag["id"] for tag in article.select("[id]"))
    inside = [a["href"][1:] for a in article.select("a[href^='#']:not(.headerlink)")]
    assert {names[name] for name in inside} == {1}


CLIPPED = """() => [...document.querySelectorAll(
    '.bd-article :is(pre, table, img, svg, mjx-container, p, li, td)')]
  .filter((e) => e.offsetParent !== null || e.tagName === 'svg')
  .filter((e) => {
    const box = e.getBoundingClientRect();
    const block = e.tagName === "PRE" || getComputedStyle(e).overflowX !== "visible";
    const cut = block && e.clientWidth;
    return box.width && (box.right > innerWidth + 1 || box.left < -1 ||
      (cut && e.scrollWidth > e.clientWidth + 1));
  })
  .map((e) => `${e.tagName}: ${e.textContent.trim().slice(0, 60)}`)"""


@each_page
def test_no_line_is_clipped_on_paper(page, site, path):
    page.set_viewport_size(
        {"width": 642, "height": 1000}
    )  # 170 mm: A4 less its margins
    page.emulate_media(media="print")
    page.goto(f"{site}{path}.html")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.evaluate("async () => { await window.MathJax?.startup?.promise; }")
    found = page.evaluate(CLIPPED)
    assert not found, f"{path}: wider than the paper; see print.css: {found}"


def test_a_chapter_printed_alone_is_the_same(page, site, book):
    path = f"book/{CHAPTERS[0]}"
    page.goto(f"{site}{path}.html")
    page.evaluate("async () => { await window.MathJax?.startup?.promise; }")
    alone = PdfDocument(page.pdf(prefer_css_page_size=True))
    assert len(alone) <= 24
    width, height = (round(n * 25.4 / 72) for n in alone[0].get_size())
    assert (width, height) == (210, 297), "A4"
    title = alone[0].get_textpage().get_text_range()[:100]
    assert chapters()[0].title in title
    text = alone[len(alone) - 1].get_textpage().get_text_range()
    assert "By the authors" not in text and "Last updated" not in text
