"""The built pages as a reader meets them. Those after `facts` need a browser."""

import itertools
import re
from copy import copy
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [TOC["root"], *(chapter["file"] for chapter in TOC["chapters"])]
CHAPTERS = [page for page in PAGES if (ROOT / f"{page}.ipynb").exists()]
BASE = CONFIG["html"]["baseurl"]
REPOSITORY = CONFIG["repository"]["url"].removeprefix("https://github.com/")
COLAB = f"https://colab.research.google.com/github/{REPOSITORY}/blob/"
COLAB += CONFIG["repository"]["branch"] + "/"

# A word by which the search must find the chapter.
TERMS = {
    "book/01-intrinsic-rank": "Eckart",
    "book/02-implementation": "inject_lora",
    "book/03-experiment": "zero-shot",
}

each_page = pytest.mark.parametrize("page", PAGES)
each_chapter = pytest.mark.parametrize("page", CHAPTERS)


def code_cells(page):
    cells = nbformat.read(ROOT / f"{page}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


@pytest.fixture(scope="session")
def soup(book):
    """The parsed HTML files, by path relative to the site's root."""
    files = [f for f in book.rglob("*.html") if "_static" not in f.parts]
    return {
        f.relative_to(book).as_posix(): BeautifulSoup(f.read_bytes(), "html.parser")
        for f in files
    }


# Without a browser ----------------------------------------------------------------


def test_links_resolve(book, soup):
    ids = {path: {t["id"] for t in html.select("[id]")} for path, html in soup.items()}
    broken = []
    for path, html in soup.items():
        for tag in html.select("[href], [src]"):
            link = tag.get("href") or tag.get("src")
            url, anchor = urldefrag(unquote(urljoin(BASE + path, link)))
            target = url.removeprefix(BASE).split("?")[0] or "index.html"
            if url.startswith(BASE) and (
                not (book / target).is_file()
                or (anchor and anchor not in ids.get(target, [anchor]))
            ):
                broken.append(f"{path}: {link}")
    assert not broken, "no such file or anchor; mend the link: " + "; ".join(broken)


@each_page
def test_formulas_are_parsed(soup, page):
    article = copy(soup[f"{page}.html"].article)
    for tag in article.select("pre, code, script, .math"):
        tag.extract()
    left = re.findall(r".{0,30}\$.{0,30}", article.get_text())
    assert not left, f"{page}: formulas left as text; mind blank lines in HTML: {left}"


@each_chapter
def test_images_say_what_is_to_be_seen(soup, page):
    for image in soup[f"{page}.html"].article.find_all("img"):
        alt = image.get("alt", "")
        assert len(alt) > 20 and not re.search(r"\.(png|svg)$|_images", alt), (
            f"{page}: {image['src']} has the alt text {alt!r}; "
            "set it in the cell's metadata: mystnb, image, alt"
        )


@each_page
def test_page_is_light(book, soup, page):
    images = {i["src"] for i in soup[f"{page}.html"].find_all("img")}
    files = [book / f"{page}.html", *((book / page).parent / src for src in images)]
    size = sum(file.stat().st_size for file in files) / 1e6
    assert size <= 1.5, f"{page}: {size:.1f} MB; make figures smaller or fewer"


@each_page
def test_colab_links(soup, page):
    links = {a["href"] for a in soup[f"{page}.html"].select("a[href*=colab]")}
    notebooks = [page] if page in CHAPTERS else CHAPTERS if page == TOC["root"] else []
    assert links == {f"{COLAB}{name}.ipynb" for name in notebooks}, (
        f"{page}: links to Colab must open {notebooks}: `repository` and "
        "`launch_buttons` in _config.yml, or the page's own links"
    )


@each_page
def test_previous_and_next_follow_the_contents(soup, page):
    i = PAGES.index(page)
    for end, j in (("left-prev", i - 1), ("right-next", i + 1)):
        link = soup[f"{page}.html"].select_one(f".prev-next-area a.{end}")
        target = link and urljoin(BASE + page, link["href"])
        wanted = f"{BASE}{PAGES[j]}.html" if 0 <= j < len(PAGES) else None
        assert target == wanted, f"{page}: {end} leads to {target}, not to {wanted}"


def test_what_search_engines_and_previews_read(book, soup):
    sitemap = (book / "sitemap.xml").read_text(encoding="utf-8")
    assert set(re.findall("<loc>(.*?)</loc>", sitemap)) == {
        f"{BASE}{page}.html" for page in PAGES
    }, "sitemap.xml must list the pages of _toc.yml: sitemap_* in _config.yml"
    for path in ("index.html", *(f"{page}.html" for page in PAGES)):
        tags = soup[path].select("meta[property^='og:']")
        og = {tag["property"]: tag["content"] for tag in tags}
        for name in ("og:title", "og:description", "og:url", "og:image"):
            assert og.get(name), f"{path}: no {name}; see ogp_* in _config.yml"
        assert og["og:url"].startswith(BASE) and og["og:image"].startswith(BASE), path
        assert (book / og["og:image"].removeprefix(BASE)).is_file(), path
        assert "\\" not in og["og:description"], f"{path}: a formula in og:description"
    prefix = urlsplit(BASE).path
    for tag in soup["404.html"].select("[href^='/'], [src^='/']"):
        url = tag.get("href") or tag.get("src")
        assert url.startswith(prefix), f"404.html: {url}; see notfound_urls_prefix"


# With a browser -------------------------------------------------------------------

MEASURE = """async () => {
  await window.MathJax?.startup?.promise;
  const maths = [...document.querySelectorAll('.math')];
  return {
    formulas: maths.length,
    bare: maths.filter(m => !m.querySelector('mjx-container') ||
      m.querySelector('mjx-merror, math [mathcolor=red]')).map(m => m.textContent),
    cut: [...document.querySelectorAll('div.cell_input pre')]
      .filter(p => p.offsetParent && p.scrollWidth > p.clientWidth)
      .map(p => p.textContent.split('\\n'))
      .filter(lines => lines.every(l => l.length <= 88)).map(lines => lines[0]),
  };
}"""


# One of a kind is enough for axe, which takes long over thousands. Of a formula it
# gets what a screen reader gets, the MathML.
THIN_OUT = """() => {
  const seen = new Set();
  for (const span of document.querySelectorAll('pre span, .copybtn'))
    if (seen.has(span.className)) span.replaceWith(span.textContent.trim());
    else seen.add(span.className);
  for (const maths of document.querySelectorAll('mjx-container'))
    maths.replaceWith(maths.querySelector('math')?.textContent ?? '');
  document.head.insertAdjacentHTML(
    'beforeend', '<style>* { transition: none !important; }</style>');
}"""


def violations(page, rules=None):
    options = {"resultTypes": ["violations"], "preload": False}
    if rules:
        options["runOnly"] = {"type": "rule", "values": rules}
    return [
        f"{rule['id']} ({rule['help']}) at {node['target'][0]}: {node['html'][:90]}"
        for rule in Axe().run(page, options=options).response["violations"]
        for node in rule["nodes"]
    ]


@pytest.fixture(scope="module")
def facts(browser, site):
    """What one visit to a page shows, taken once: `facts(page)`."""

    @cache
    def visit(name):
        # A vertical scroll bar takes 15 px of a 1280 px wide window.
        page = browser.new_page(viewport={"width": 1265, "height": 800})
        errors, logged, asked = [], [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: logged.append(message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{site}{name}.html")
        fact = page.evaluate(MEASURE)
        errors += [f"{m.text} {m.location}" for m in logged if m.type == "error"]
        page.set_viewport_size({"width": 390, "height": 800})
        fact["phone"] = page.evaluate("document.documentElement.scrollWidth")
        page.set_viewport_size({"width": 1265, "height": 800})
        page.evaluate(THIN_OUT)
        fact["light"] = violations(page)
        page.emulate_media(color_scheme="dark")
        page.wait_for_selector("html[data-theme=dark]")
        fact["dark"] = violations(page, ["color-contrast"])
        page.close()
        foreign = [url for url in asked if not url.startswith(("data:", site))]
        return fact | {"errors": errors, "foreign": foreign}

    return visit


each_view = pytest.mark.parametrize("page", [*PAGES, "search", "404"])


@each_view
def test_page_loads_cleanly(facts, page):
    fact = facts(page)
    assert not fact["foreign"], f"{page} loads from elsewhere: {fact['foreign']}"
    assert not fact["errors"], f"{page}: script or loading errors: {fact['errors']}"


@each_page
def test_formulas_are_typeset(facts, soup, page):
    assert facts(page)["formulas"] == len(soup[f"{page}.html"].select(".math"))
    bare = facts(page)["bare"]
    assert not bare, f"{page}: MathJax cannot typeset {bare}"


@each_view
def test_page_is_accessible(facts, page):
    for theme in ("light", "dark"):
        found = facts(page)[theme]
        assert not found, f"{page}, {theme}: mend it or custom.css:\n" + "\n".join(
            found
        )


@each_view
def test_page_fits(facts, page):
    cut = facts(page)["cut"]
    assert not cut, f"{page}: 88 columns do not fit at 1280 px; custom.css, cells {cut}"
    width = facts(page)["phone"]
    assert width <= 390, f"{page}: scrolls sideways on a phone ({width} px of 390)"


@pytest.fixture
def view(browser):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    yield context.new_page()
    context.close()


@each_chapter
def test_search_finds(view, site, page):
    assert page in TERMS, f"give TERMS a word by which to find {page}"
    view.goto(f"{site}search.html?q={TERMS[page]}")
    view.wait_for_function("/found|did not match/.test(document.body.innerText)")
    links = view.locator(f"#search-results a[href*='{page}.html']")
    assert links.count(), f"searching {TERMS[page]!r} does not find {page}"


@each_chapter
def test_solutions_are_folded_and_open(view, site, page):
    view.goto(f"{site}{page}.html")
    count = sum("hide-cell" in c.metadata.get("tags", []) for c in code_cells(page))
    shown = view.locator("div.cell.tag_hide-cell .cell_input:visible")
    label = view.locator("div.cell.tag_hide-cell details > summary").first
    assert count and shown.count() == 0, f"{page}: a solution must be there, and folded"
    assert label.inner_text() == "Show the solution", f"{page}: see book/_ext/pages.py"
    label.click()
    assert shown.count() == 1, f"{page}: a click does not open the solution"
    assert label.inner_text() == "Hide the solution", f"{page}: see book/_ext/pages.py"
    label.press("Enter")
    assert shown.count() == 0, f"{page}: the key Enter does not fold the solution"
    view.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown.count() == count, f"{page}: solutions stay folded in print; custom.js"


@each_chapter
def test_copy_buttons_copy_the_code(view, site, page):
    view.goto(f"{site}{page}.html")
    cell = view.locator("div.cell_input").first
    cell.hover()
    cell.locator("button.copybtn").click()
    copied = view.evaluate("navigator.clipboard.readText()").strip()
    assert copied == code_cells(page)[0].source, f"{page}: copied {copied!r}"


def test_the_slider_moves_through_the_ranks(view, site):
    page = "book/01-intrinsic-rank"
    view.goto(f"{site}{page}.html")
    slider, picture = (view.locator(f".rank-slider {tag}") for tag in ("input", "img"))
    ranks, offsets = [], []
    slider.press("Home")
    for _ in range(6):
        ranks.append(slider.get_attribute("aria-valuetext"))
        offsets.append(round(picture.bounding_box()["x"]))
        slider.press("ArrowRight")
    assert ranks == [f"rank {k}" for k in (0, 1, 2, 3, 4, 128)], "see rank-slider.js"
    steps = {a - b for a, b in itertools.pairwise(offsets)}
    width = view.locator(".rank-slider .window").bounding_box()["width"]
    assert all(abs(step - width) <= 1 for step in steps), "a step must be one column"
    still = view.locator(".rank-slider-still")
    assert "Six columns" in still.get_attribute("alt"), f"{page}: the figure's alt text"
    view.emulate_media(media="print")
    assert still.bounding_box()["width"] > 300, "in print the still figure must show"
    assert not slider.is_visible(), "in print the slider must go; see custom.css"
