"""The built pages as a reader meets them. Those after `facts` need a browser."""

import base64
import io
import itertools
import re
from contextlib import suppress
from copy import copy
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import Comment
from PIL import Image
from playwright.sync_api import TimeoutError

from lora.study import plots
from tools.kit.register import BASE, ROOT, chapters, colab, pages

PAGES = pages()
CHAPTERS = [
    chapter.path.relative_to(ROOT).with_suffix("").as_posix() for chapter in chapters()
]
BY_PAGE = dict(zip(CHAPTERS, chapters(), strict=True))

each_page = pytest.mark.parametrize("path", PAGES)
each_chapter = pytest.mark.parametrize("path", CHAPTERS)


def cells(path, kind="code"):
    cells = nbformat.read(ROOT / f"{path}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == kind]


def is_folded(cell):
    return bool({"hide-cell", "hide-input"} & set(cell.metadata.get("tags", [])))


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
def test_formulas_are_parsed(soup, path):
    article = copy(soup[f"{path}.html"].article)
    for tag in article.select("pre, code, script, .math"):
        tag.extract()
    left = re.findall(r".{0,30}\$.{0,30}", article.get_text())
    assert not left, f"{path}: formulas left as text; mind blank lines in HTML: {left}"


@each_page
def test_colab_links(soup, path):
    """A notebook opens itself, the first page all: `launch_buttons` in _config.yml."""
    links = {a["href"] for a in soup[f"{path}.html"].select("a[href*=colab]")}
    notebooks = CHAPTERS if path == PAGES[0] else [path]
    files = [ROOT / f"{name}.ipynb" for name in notebooks]
    assert links == {colab(file) for file in files if file.exists()}, path


def test_what_search_engines_and_previews_read(book, soup):
    """See sitemap_*, ogp_* and notfound_urls_prefix in _config.yml."""
    sitemap = (book / "sitemap.xml").read_text(encoding="utf-8")
    addresses = [f"{BASE}{path}.html" for path in PAGES]
    assert sorted(re.findall("<loc>(.*?)</loc>", sitemap)) == sorted(addresses)
    for path in ("index.html", *(f"{path}.html" for path in PAGES)):
        tags = soup[path].select("meta[property^='og:']")
        og = {tag["property"]: tag["content"] for tag in tags}
        assert og["og:title"] and og["og:url"].startswith(BASE), path
        assert (book / og["og:image"].removeprefix(BASE)).is_file(), path
        assert re.fullmatch(r"[^\\]+", og["og:description"]), f"{path}: a formula"
    for tag in soup["404.html"].select("[href^='/'], [src^='/']"):
        url = tag.get("href") or tag.get("src")
        assert url.startswith(urlsplit(BASE).path), f"404.html: {url}"


@each_chapter
def test_figures_and_tables_have_captions_and_numbers(soup, path):
    """Figure 1.3 and Table 1.2 are counted through the chapter; each has its link."""
    number, article = CHAPTERS.index(path) + 1, soup[f"{path}.html"].article
    for kind, seen in (("Figure", "img"), ("Table", "table.dataframe")):
        outputs = article.select(f".cell_output {seen}")
        assert outputs, f"{path}: no {kind.lower()} among the outputs"
        for n, output in enumerate(outputs, 1):
            figure = output.find_parent("figure")
            text = figure.figcaption.get_text(" ", strip=True)
            assert text.startswith(f"{kind} {number}.{n} "), f"{path}: {text!r}"
            assert figure.select_one(f"a.headerlink[href='#{figure['id']}']"), text


@each_chapter
def test_chapters_and_sections_are_numbered(soup, path):
    number, html = CHAPTERS.index(path) + 1, soup[f"{path}.html"]
    titles = [h.get_text() for h in html.article.select("h1, section > h2")]
    wanted = [f"{number}. {BY_PAGE[path].title}"]
    wanted += [f"{number}.{n}. " for n in range(1, len(titles))]
    for title, start in zip(titles, wanted, strict=True):
        assert title.startswith(start), f"{path}: {title!r} should begin {start!r}"
    for heading in html.article.select("h1, h2, h3"):
        assert heading.select_one("a.headerlink"), f"{path}: no link at {heading}"


@pytest.mark.parametrize("path", [path for path in PAGES if path not in CHAPTERS])
def test_other_pages_have_no_numbers(soup, path):
    assert not soup[f"{path}.html"].article.select(
        ".section-number, .caption-number"
    ), path


@each_chapter
def test_linked_equations_are_numbered(soup, path):
    """An equation has a number where the notebook has an anchor before it."""
    text = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    names = re.findall(r'<a id="(eq-[\w-]+)"></a>', text)
    for n, name in enumerate(names, 1):
        equation = soup[f"{path}.html"].article.find(id=name)
        label = equation and equation.select_one(".eqno")
        number = f"({CHAPTERS.index(path) + 1}.{n})"
        assert label and label.get_text().startswith(number), f"{path}: {name}"


@each_chapter
def test_folds_say_what_they_hold(soup, path):
    """A fold's label is its cell's first line, which the book does not show."""
    folded = [cell.source.split("\n")[0] for cell in cells(path) if is_folded(cell)]
    labels = [
        s.get_text() for s in soup[f"{path}.html"].select("details.hide > summary")
    ]
    assert [f"# @title {label}" for label in labels] == folded, (
        f"{path}: a folded cell begins with a line `# @title LABEL`"
    )
    code = soup[f"{path}.html"].article.get_text()
    assert "@title" not in code, f"{path}: book/_ext/cells.py should take the line out"


@each_chapter
def test_a_figure_stands_before_what_made_it(soup, path):
    """Folds that follow each other are one row, under the output that they made."""
    for row in soup[f"{path}.html"].article.select(".made"):
        folded = [
            fold.summary.get_text() for fold in row.find_all("details", recursive=False)
        ]
        assert folded, f"{path}: an empty row"
        after = row.find_parent(class_="cell").find_next_sibling()
        assert not after or not after.select_one(":scope > .made:first-child"), (
            f"{path}: two rows after each other, {folded}: they should be one"
        )
    for figure in soup[f"{path}.html"].article.select(".tag_hide-input figure"):
        fold = figure.find_parent(class_="cell").find("details")
        assert figure.sourceline < fold.sourceline or (
            figure.sourcepos < fold.sourcepos
        ), f"{path}: a fold before {figure['id']}"


@each_page
def test_tables_have_a_frame_and_a_name(soup, path):
    names = []
    for table in soup[f"{path}.html"].article.select("table:not(.versions)"):
        frame = table.find_parent(class_="table-frame")
        assert frame and frame["role"] == "region" and frame["tabindex"] == "0", (
            f"{path}: {str(table)[:200]}; book/_ext/cells.py gives each table a frame"
        )
        names.append(frame["aria-label"])
    assert len(names) == len(set(names)), f"{path}: two tables have one name: {names}"


@each_page
def test_large_numbers_in_tables_are_grouped(soup, path):
    cells = soup[f"{path}.html"].article.select("table.dataframe td.number")
    long = [c.text for c in cells if re.search(r"(?<![\d.,])\d{4}", c.text)]
    assert not long, f"{path}: {long}; book/_ext/cells.py puts commas in"


@each_chapter
def test_papers_have_a_text_to_show(book, soup, path):
    text = (book / "_static" / "hover-texts.js").read_text(encoding="utf-8")
    papers = soup[f"{path}.html"].article.select(
        "a[href*='arxiv.org'], a[href*='doi.org']"
    )
    for link in papers:
        assert f'"{link["href"]}"' in text, (
            f"{path}: {link['href']} is not in references.bib, so that the page cannot "
            "show it on hover"
        )


@each_chapter
def test_terms_are_linked_in_their_one_sense(soup, path):
    """As the glossary writes them; "we rank" and "reciprocal rank" are not the rank."""
    for link in soup[f"{path}.html"].article.select("a.term"):
        target = soup["book/notation.html"].find(id=link["href"].split("#")[1])
        name = target.get_text().strip().rstrip("#").lower()
        assert link.get_text().lower() == name, f"{path}: {link}"
        before = str(link.previous_sibling or "")[-20:].lower()
        said = before + link.get_text().lower()
        another = name == "rank" and re.search(r"\b(reciprocal|to|we|can) rank$", said)
        assert not another, f"{path}: {said}"


@each_page
def test_comments_show_nowhere(book, soup, path):
    """Neither in a page, nor in its description or what links to it show."""
    html = soup[f"{path}.html"]
    left = html.article.find_all(string=lambda text: isinstance(text, Comment))
    assert not left, f"{path}: book/_ext/cells.py should take them out"
    metas = [tag.get("content", "") for tag in html.select("meta")]
    hover = (book / "_static" / "hover-texts.js").read_text("utf-8")
    for text in (html.get_text(), *metas, hover):
        assert not re.search(".{0,40}<!--|-->.{0,40}", text), path


def contrast(a, b):
    """Of two colours, (R, G, B) up to 255, by the rule of WCAG 2."""

    def luminance(colour):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (v / 255 for v in colour)
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# With a browser -------------------------------------------------------------------

MEASURE = """async () => {
  await window.MathJax?.startup?.promise;
  const maths = [...document.querySelectorAll('.math')];
  const screens = document.documentElement.scrollHeight / 900;
  const folds = [...document.querySelectorAll('details:not([open])')];
  for (const fold of folds) fold.open = true;
  const fact = {
    screens,
    formulas: maths.length,
    bare: maths.filter(m => !m.querySelector('mjx-container') ||
      m.querySelector('mjx-merror, math [mathcolor=red]')).map(m => m.textContent),
    cut: [...document.querySelectorAll('div.cell_input pre')]
      .filter(p => p.offsetParent && p.scrollWidth > p.clientWidth)
      .map(p => p.textContent.split('\\n'))
      .filter(lines => lines.every(l => l.length <= 88)).map(lines => lines[0]),
  };
  for (const fold of folds) fold.open = false;
  return fact;
}"""

# What came over the wire, and whether the first paint waits for it.
LOADED = """() => ['navigation', 'resource'].flatMap(
  (kind) => performance.getEntriesByType(kind).map((r) => ({
    name: r.name.split('/').pop().split('?')[0], size: r.transferSize,
    blocks: kind == 'navigation' || r.renderBlockingStatus == 'blocking'})))"""

# On a phone: figures that are not all in sight, and how large they are shown.
PHONE = """async () => {
  // The browser chooses the narrow of two pictures when it draws the page again.
  await new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve)));
  const images = [...document.querySelectorAll('.bd-article .cell_output img')]
    .filter(image => !image.matches('.rank-slider *, .rank-slider-still'));
  for (const image of images) { image.loading = 'eager'; await image.decode(); }
  return {
    width: document.documentElement.scrollWidth,
    figures: images.map(image => [image.width / image.naturalWidth,
      Math.round(image.getBoundingClientRect().right), image.alt]),
    over: [...document.querySelectorAll('.table-frame :is(th, td):first-child')]
      .filter(cell => cell.scrollWidth > cell.clientWidth)
      .map(cell => cell.textContent),
  };
}"""

# One of a kind is enough for axe, which takes long over thousands. Of a formula it
# gets what a screen reader gets, the MathML.
THIN_OUT = """() => {
  const seen = new Set();
  for (const span of document.querySelectorAll('pre span, .copybtn'))
    if (seen.has(span.className)) span.replaceWith(span.textContent.trim());
    else seen.add(span.className);
  const plain = [...document.querySelectorAll('.bd-article section > p')];
  for (const p of plain.filter(p => !p.children.length).slice(9)) p.remove();
  for (const row of document.querySelectorAll('tr:nth-child(n + 6)')) row.remove();
  for (const maths of document.querySelectorAll('mjx-container'))
    maths.replaceWith(maths.querySelector('math')?.textContent ?? '');
  document.head.insertAdjacentHTML(
    'beforeend', '<style>* { transition: none !important; }</style>');
}"""


# The theme makes what scrolls focusable a while after the window changed.
FOCUSABLE = """() => [...document.querySelectorAll('pre, .cell_output > .output')]
  .every((e) => e.tabIndex == 0 || e.scrollWidth <= e.clientWidth)"""


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
        fact["phone"] = page.evaluate(PHONE)
        fact["loaded"] = page.evaluate(LOADED)
        page.evaluate(THIN_OUT)
        fact["axe"] = {}
        for width in (390, 1265):
            page.set_viewport_size({"width": width, "height": 800})
            with suppress(TimeoutError):  # axe then says which
                page.wait_for_function(FOCUSABLE)
            page.emulate_media(color_scheme="light")
            page.wait_for_selector("html[data-theme=light]")
            page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
            fact["axe"][f"light, {width} px"] = violations(page)
            page.emulate_media(color_scheme="dark")
            page.wait_for_selector("html[data-theme=dark]")
            fact["axe"][f"dark, {width} px"] = violations(page, ["color-contrast"])
        page.close()
        foreign = [url for url in asked if not url.startswith(("data:", "blob:", site))]
        return fact | {"errors": errors, "foreign": foreign}

    return visit


each_view = pytest.mark.parametrize("path", [*PAGES, "search", "404"])


@each_view
def test_page_loads_cleanly(facts, path):
    fact = facts(path)
    assert not fact["foreign"], f"{path} loads from elsewhere: {fact['foreign']}"
    assert not fact["errors"], f"{path}: script or loading errors: {fact['errors']}"


@each_view
def test_page_is_light(facts, path):
    loaded = facts(path)["loaded"]
    before_paint = [file for file in loaded if file["blocks"]]
    scripts = {f["name"] for f in before_paint if f["name"].endswith(".js")}
    assert scripts <= {"documentation_options.js"}, "see `lighter` in front.py"
    for files, most, kilobytes in ((before_paint, 14, 160), (loaded, 60, 1500)):
        assert len(files) <= most, [file["name"] for file in files]
        assert sum(file["size"] for file in files) <= kilobytes * 1000, files


@each_page
def test_formulas_are_typeset(facts, soup, path):
    assert facts(path)["formulas"] == len(soup[f"{path}.html"].select(".math"))
    bare = facts(path)["bare"]
    assert not bare, f"{path}: MathJax cannot typeset {bare}"


@each_view
def test_page_is_accessible(facts, path):
    for view, found in facts(path)["axe"].items():
        assert not found, f"{path}, {view}: mend it or custom.css:\n" + "\n".join(found)


@each_view
def test_page_fits(facts, path):
    cut = facts(path)["cut"]
    assert not cut, f"{path}: 88 columns do not fit at 1280 px; custom.css, cells {cut}"
    width = facts(path)["phone"]["width"]
    assert width <= 390, f"{path}: scrolls sideways on a phone ({width} px of 390)"


@each_view
def test_a_first_column_does_not_cover_the_next(facts, path):
    over = facts(path)["phone"]["over"]
    assert not over, f"{path}: wider than their cells on a phone: {over}"


@each_chapter
def test_chapter_is_not_long(facts, path):
    screens = facts(path)["screens"]
    most = {"07": 26}.get(path[5:7], 24)  # a model that writes has more to tell
    assert screens <= most, f"{path}: {screens:.1f} screens of {most}: shorten it"


@each_chapter
def test_figures_can_be_read_on_a_phone(facts, path):
    """All in sight, and text of 10 pt (at 150 dots an inch) at least 11 px high."""
    for scale, right, alt in facts(path)["phone"]["figures"]:
        assert right <= 390, f"{path}: not all in sight: {alt}"
        size = 10 / 72 * 150 * scale
        assert size >= 11, f"{path}: labels of {size:.1f} px; draw it narrower: {alt}"


LANDED = """() => {
  const mark = document.querySelector('.bd-article mark');
  const section = document.querySelector(decodeURIComponent(location.hash) || 'none');
  const seen = [...section?.querySelectorAll('mark') ?? []].filter(mark => {
    const box = mark.getBoundingClientRect();
    return box.height && box.top > 0 && box.bottom < innerHeight;
  });
  return mark && seen.length && seen.map(mark => mark.textContent.toLowerCase());
}"""


@each_chapter
def test_a_search_lands_in_its_section(page, site, path):
    word = BY_PAGE[path].search
    page.goto(f"{site}{PAGES[0]}.html")
    page.keyboard.press("Control+k")
    page.keyboard.type(word)
    section = f".found a[href*='{path}.html']"
    page.locator(f"dialog {section}").first.wait_for()  # while one types
    page.keyboard.press("Enter")
    link = page.locator(f"#search-results {section}").first
    link.wait_for()
    target = link.get_attribute("href")
    page.goto(target)
    # a mark in sight, in its section; see search.js
    marks = page.wait_for_function(LANDED).json_value()
    first = re.split(r"\W+", word.lower())[0]
    assert any(first in mark for mark in marks), f"{target}: marks {marks}"
    # Opened without the word, it has no marks left.
    page.goto(f"{site}{path}.html")
    assert not page.locator(".bd-article mark").count()


def test_a_word_in_the_address_is_marked(page, site):
    page.goto(f"{site}{PAGES[0]}.html?highlight=lora")
    marks = page.locator("mark").all_inner_texts()
    assert marks and {mark.lower()[:4] for mark in marks} == {"lora"}, marks
    assert "highlight" not in page.url, "a link that is copied should not mark"
    page.keyboard.press("Escape")
    assert not page.locator("mark").count()


@each_chapter
def test_terms_papers_and_chapters_show_their_text(page, site, path):
    page.goto(f"{site}{path}.html")
    note = page.locator("#hover-note")
    others = [Path(other).name for other in CHAPTERS if other != path]
    chapter = ", ".join(f".bd-article p a[href^='{name}.html']" for name in others)
    for kind, selector, text in (
        ("glossary term", "a.term", r"[\w -]+\n+.{6}"),
        ("paper", ".bd-article p a[href^='https://arxiv.org/']", r".{20}.*\d{4}"),
        ("chapter", chapter, r"\d\. .*\n+.{20}"),
    ):
        link = page.locator(selector).first
        assert link.count(), f"{path}: no link to a {kind}"
        link.focus()
        note.wait_for(state="visible")
        assert re.match(text, note.inner_text()), f"{path}, {kind}: {note.inner_text()}"
        assert link.get_attribute("aria-describedby") == "hover-note"
        page.keyboard.press("Escape")
        assert not note.is_visible(), "Escape must close the note"
        link.blur()
        link.hover()
        note.wait_for(state="visible")
        page.mouse.move(0, 0)
        note.wait_for(state="hidden")


@each_chapter
def test_a_wide_table_scrolls_under_its_first_column(page, site, path):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{site}{path}.html")
    frame = page.locator(".table-frame:has(table.dataframe)").first
    frame.evaluate("""frame => {
      for (const row of frame.querySelectorAll('tr')) {
        const cell = row.lastElementChild.cloneNode();
        cell.innerHTML = '<div style="width: 30rem"></div>';
        row.append(cell);
      }
    }""")
    frame.scroll_into_view_if_needed()
    first = frame.locator("tbody th").first
    before = first.bounding_box()["x"]
    page.evaluate("document.activeElement.blur()")
    frame.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("frame => frame.scrollLeft > 60", arg=frame.element_handle())
    assert abs(first.bounding_box()["x"] - before) < 2, f"{path}: not sticky"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, path


@each_chapter
def test_where_you_are(page, site, path):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{site}{path}.html")
    heading = page.locator("section > h2").nth(2)
    assert not page.locator(".place p").is_visible(), "not before the first section"
    heading.evaluate("heading => heading.scrollIntoView({behavior: 'instant'})")
    title = heading.inner_text().rstrip("#\n")
    place = page.locator(".place p")
    place.get_by_text(title).wait_for()
    assert re.search(r"\d+ min left$", place.inner_text()), place.inner_text()


def test_figures_belong_into_the_dark(page, site):
    """White becomes the page's own background, ink and colours keep their contrast."""
    inks = [plots.BLUE, plots.RED, plots.GREEN, plots.ORANGE, plots.SKY, plots.GREY]
    picture = Image.new("RGB", (10 * len(inks) + 20, 10), "white")
    for n, ink in enumerate(["#000000", *inks], 1):
        picture.paste(ink, (10 * n, 0, 10 * n + 10, 10))
    data = io.BytesIO()
    picture.save(data, "png")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    page.emulate_media(color_scheme="dark")
    page.goto(f"{site}{CHAPTERS[0]}.html")
    page.wait_for_selector("html[data-theme=dark]")
    image = page.query_selector(".cell:not(.tag_photograph) .cell_output figure img")
    # A lazy picture would not be decoded before it is in view: it would wait for ever.
    image.evaluate("""i => {
      i.closest('picture')?.querySelectorAll('source').forEach(s => s.remove());
      i.loading = 'eager';
    }""")
    size = f"width: {picture.width}px; height: 10px; border-radius: 0"

    def shown():
        image.evaluate(f"async i => {{ i.src = '{url}'; i.style = '{size}'; "
                       "await i.decode(); }")  # fmt: skip
        shot = Image.open(io.BytesIO(image.screenshot())).convert("RGB")
        return [shot.getpixel((10 * n + 5, 5)) for n in range(len(inks) + 2)]

    paper, black, *colours = shown()
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    body = map(int, re.findall(r"\d+", colour)[:3])
    assert paper == pytest.approx(tuple(body), abs=4)
    assert contrast(black, paper) > 10, black
    for ink, colour in zip(inks, colours, strict=True):
        assert contrast(colour, paper) >= 3, f"{ink} becomes {colour} on {paper}"
    image.evaluate("i => i.closest('.cell').classList.add('tag_photograph')")
    assert shown()[0] == (255, 255, 255), "a photograph stays as it is"


@each_chapter
def test_fine_print_is_open_in_a_wide_margin_and_covers_nothing(page, site, path):
    boxes = """() => [...document.querySelectorAll(
        "details.note, .bd-article section > p, figure > figcaption")]
      .filter(e => !e.parentElement.closest("details") && e.offsetHeight)
      .filter(e => !e.matches("details:has(table)"))
      .map(e => [e.localName, e.open ?? true, e.getBoundingClientRect().toJSON()])"""
    page.goto(f"{site}{path}.html")
    notes = page.locator("details.note:not(details *)")
    assert notes.count() and page.locator("details.note[open]").count() == 0
    page.set_viewport_size({"width": 1700, "height": 900})
    page.reload()
    page.wait_for_selector("details.note[open]")
    found = page.evaluate(boxes)
    text = max(box["right"] for name, _, box in found if name == "p")
    margin = [box for name, _, box in found if name != "p" and box["left"] > text]
    details = [box for name, _, box in found if name == "details"]
    assert all(box in margin for box in details), f"{path}: fine print in the text"
    margin.sort(key=lambda box: box["top"])
    for box, below in itertools.pairwise(margin):
        assert box["bottom"] <= below["top"] + 1, f"{path}: {box} covers {below}"
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 1700, f"{path}: wider than its window"


@each_chapter
def test_solutions_are_folded_and_open(page, site, path):
    page.goto(f"{site}{path}.html")
    count = sum(cell.source.startswith("# @title Solution") for cell in cells(path))
    shown = page.locator("div.cell.solution .cell_input:visible")
    label = page.locator("div.cell.solution details > summary").first
    assert shown.count() == 0, f"{path}: solutions must be folded"
    height = label.bounding_box()["height"]
    assert height < 32, f"{path}: a folded cell is a line, not a box of {height} px"
    kind = label.evaluate("label => getComputedStyle(label).display")
    assert kind == "list-item", f"{path}: a solution has no triangle"
    label.click()
    assert shown.count() == 1, f"{path}: a click does not open the solution"
    label.press("Enter")
    assert shown.count() == 0, f"{path}: the key Enter does not fold the solution"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown.count() == count, f"{path}: solutions stay folded in print; custom.js"


@each_chapter
def test_copy_buttons_copy_the_code(page, site, path):
    page.goto(f"{site}{path}.html")
    cell = page.locator("div.cell_input:visible").first
    cell.hover()
    cell.locator("button.copybtn").click()
    copied = page.evaluate("navigator.clipboard.readText()").strip()
    visible = next(cell for cell in cells(path) if not is_folded(cell))
    assert copied == visible.source.strip(), f"{path}: copied {copied!r}"


def test_the_slider_moves_through_the_ranks(page, site):
    path = "book/01-intrinsic-rank"
    page.goto(f"{site}{path}.html")
    slider, picture = (
        page.locator(f".rank-slider {tag}").first for tag in ("input", "img")
    )
    ranks, offsets = [], []
    slider.press("Home")
    for _ in range(6):
        ranks.append(slider.get_attribute("aria-valuetext"))
        offsets.append(round(picture.bounding_box()["x"]))
        slider.press("ArrowRight")
    assert ranks == [f"rank {k}" for k in (1, 2, 4, 8, 32, 214)], "see rank-slider.js"
    steps = {a - b for a, b in itertools.pairwise(offsets)}
    width = page.locator(".rank-slider .window").first.bounding_box()["width"]
    assert all(abs(step - width) <= 1 for step in steps), "a step must be one column"
    still = page.locator(".rank-slider-still").first
    assert "Six versions" in still.get_attribute("alt"), f"{path}: the alt text"
    page.emulate_media(media="print")
    assert still.bounding_box()["width"] > 300, "in print the still figure must show"
    assert not slider.is_visible(), "in print the slider must go; see custom.css"


@pytest.mark.parametrize(("width", "chosen"), [(390, "narrow"), (1280, "wide")])
def test_the_browser_chooses_the_figure_for_its_width(page, site, soup, width, chosen):
    pages = [path for path in CHAPTERS if soup[f"{path}.html"].select("picture")]
    if not pages:
        pytest.skip("no figure of two sizes")
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{site}{pages[0]}.html")
    image = page.locator("picture img").first
    image.evaluate("image => { image.loading = 'eager'; return image.decode(); }")
    assert ("-narrow" in image.evaluate("image => image.currentSrc")) == (
        chosen == "narrow"
    )


SEARCHES = (ROOT / "tests/book/searches.csv").read_text().splitlines()[1:]
SEARCHES += [  # other words for what is asked there
    "lora layer pytorch,02-implementation,detour",
    "how to write a lora layer,02-implementation,detour",
    "double rank alpha,0,twice",
    "double alpha,0,rate",
    "model won't stop,07-a-language-model,end token",
    "my chat model never stops,07-a-language-model,end token",
    "what learning rate should i use,0,ten times",
    "dora vs lora,08-other-layers-other-updates,DoRA",
    "dataset size,0,pairs",
    "training data size,0,pairs",
    "ollama,07-a-language-model,llama",
]


@pytest.mark.parametrize("line", SEARCHES)
def test_what_people_type_finds_a_section(searched, line):
    """Among the first three: of that page (0: of any chapter), with these words.

    Or a question with them: test_practice.py follows its links.
    """
    query, page, words = line.split(",")
    found = searched(query)[:3]
    assert any(
        (f"book/{page}" in hit["url"] or "book/questions" in hit["url"])
        and words.lower() in (hit["text"] + hit["names"]).lower()
        for hit in found
    ), f"{query!r} finds {[hit['url'] for hit in found]}; see book/_ext/search.py"


@pytest.fixture(scope="module")
def searched(browser, site):
    page = browser.new_page()
    page.goto(f"{site}{PAGES[0]}.html")
    script = "async (query) => (await findSections(query)).map((hit) => hit.section)"
    yield cache(lambda query: page.evaluate(script, query))
    page.close()


def test_snippets_have_no_tex(book):
    text = (book / "_static" / "sections.js").read_text("utf-8")
    assert not re.findall(r".{20}\\\\[a-zA-Z(\[].{20}", text)
