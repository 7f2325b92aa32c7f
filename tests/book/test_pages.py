"""The built pages as a reader meets them. Those after `facts` need a browser."""

import base64
import io
import itertools
import json
import re
from copy import copy
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup, Comment
from PIL import Image

from lora.study import plots
from tools.kit.register import BASE, ROOT, chapters, colab, pages

PAGES = pages()
CHAPTERS = [
    chapter.path.relative_to(ROOT).with_suffix("").as_posix() for chapter in chapters()
]
BY_PAGE = dict(zip(CHAPTERS, chapters(), strict=True))
COMMENT = re.compile("<!--(.*?)-->", re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES)
each_chapter = pytest.mark.parametrize("page", CHAPTERS)


def cells(page, kind="code"):
    cells = nbformat.read(ROOT / f"{page}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == kind]


def is_folded(cell):
    return bool({"hide-cell", "hide-input"} & set(cell.metadata.get("tags", [])))


def caption(cell):
    return cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "")


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
    notebooks = [page] if page in CHAPTERS else CHAPTERS if page == PAGES[0] else []
    assert links == {colab(BY_PAGE[name]) for name in notebooks}, (
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


@each_chapter
def test_figures_and_tables_have_captions_and_numbers(soup, page):
    """Figure 1.3 and Table 1.2 are counted through the chapter; each has its link."""
    number, article = CHAPTERS.index(page) + 1, soup[f"{page}.html"].article
    for kind, seen in (("Figure", "img"), ("Table", "table.dataframe")):
        found = article.select(f".cell_output {seen}")
        assert found, f"{page}: no {kind.lower()} among the outputs"
        for n, output in enumerate(found, 1):
            figure = output.find_parent("figure")
            assert figure and figure.figcaption, (
                f"{page}: {kind} {n} has no caption; set it in the cell's metadata: "
                f"book, name and caption, then `make run`: {str(output)[:200]}"
            )
            text = figure.figcaption.get_text(" ", strip=True)
            start = f"{kind} {number}.{n} "
            assert text.startswith(start), f"{page}: {text!r} should begin {start!r}"
            assert figure.select_one(f"a.headerlink[href='#{figure['id']}']"), text
    captions = [caption(cell) for cell in cells(page) if caption(cell)]
    shown = article.select(".cell_output figcaption")
    assert len(captions) == len(shown), f"{page}: one captioned output a cell"


@each_chapter
def test_chapters_and_sections_are_numbered(soup, page):
    number, html = CHAPTERS.index(page) + 1, soup[f"{page}.html"]
    titles = [h.get_text() for h in html.article.select("h1, section > h2")]
    wanted = [f"{number}. {BY_PAGE[page].title}"]
    wanted += [f"{number}.{n}. " for n in range(1, len(titles))]
    for title, start in zip(titles, wanted, strict=True):
        assert title.startswith(start), (
            f"{page}: {title!r} should begin {start!r}: `numbered` in _toc.yml; no "
            "digit in the notebook's own titles"
        )
    for heading in html.article.select("h1, h2, h3"):
        assert heading.select_one("a.headerlink"), f"{page}: no link at {heading}"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in CHAPTERS])
def test_other_pages_have_no_numbers(soup, page):
    assert not soup[f"{page}.html"].article.select(
        ".section-number, .caption-number"
    ), page


@each_chapter
def test_linked_equations_are_numbered(soup, page):
    """An equation has a number where the notebook has an anchor before it."""
    text = "\n\n".join(cell.source for cell in cells(page, "markdown"))
    names = re.findall(r'<a id="(eq-[\w-]+)"></a>', text)
    for n, name in enumerate(names, 1):
        equation = soup[f"{page}.html"].article.find(id=name)
        label = equation and equation.select_one(".eqno")
        number = f"({CHAPTERS.index(page) + 1}.{n})"
        assert label and label.get_text().startswith(number), f"{page}: {name}"


@each_chapter
def test_folds_say_what_they_hold(soup, page):
    """A fold's label is its cell's first line, which the book does not show."""
    folded = [cell.source.split("\n")[0] for cell in cells(page) if is_folded(cell)]
    labels = [
        s.get_text() for s in soup[f"{page}.html"].select("details.hide > summary")
    ]
    assert [f"# @title {label}" for label in labels] == folded, (
        f"{page}: a folded cell begins with a line `# @title LABEL`"
    )
    code = soup[f"{page}.html"].article.get_text()
    assert "@title" not in code, f"{page}: book/_ext/cells.py should take the line out"
    for cell in cells(page):
        checked = re.match(r"# @title Checked: (\d+) assertion", cell.source)
        count = len(re.findall(r"^\s*assert ", cell.source, re.MULTILINE))
        assert not checked or int(checked[1]) == count, f"{page}: {cell.source}"


@each_page
def test_tables_have_a_frame_and_a_name(soup, page):
    names = []
    for table in soup[f"{page}.html"].article.select("table:not(.versions)"):
        frame = table.find_parent(class_="table-frame")
        assert frame and frame["role"] == "region" and frame["tabindex"] == "0", (
            f"{page}: {str(table)[:200]}; book/_ext/cells.py gives each table a frame"
        )
        names.append(frame["aria-label"])
    assert len(names) == len(set(names)), f"{page}: two tables have one name: {names}"


def comments():
    """What stands in comments of the sources, where a reader never sees it."""
    for page in PAGES:
        if page in CHAPTERS:
            texts = [cell.source for cell in cells(page, "markdown")]
        else:
            texts = [(ROOT / f"{page}.md").read_text(encoding="utf-8")]
        for text in texts:
            for comment in COMMENT.findall(text):
                yield page, comment.strip()


@each_chapter
def test_papers_have_a_text_to_show(book, soup, page):
    text = (book / "_static" / "hover-texts.js").read_text(encoding="utf-8")
    papers = soup[f"{page}.html"].article.select(
        "a[href*='arxiv.org'], a[href*='doi.org']"
    )
    for link in papers:
        assert f'"{link["href"]}"' in text, (
            f"{page}: {link['href']} is not in references.bib, so that the page cannot "
            "show it on hover"
        )


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def test_comments_show_nowhere(book, soup):
    """Neither in a page, nor in its description, nor in what the search knows."""
    found = list(comments())
    bare = [page for page in CHAPTERS if page not in dict(found)]
    assert not bare, f"{bare}: a chapter binds numbers in comments"
    seen = set()
    for page in PAGES:
        html = soup[f"{page}.html"]
        left = html.article.find_all(string=lambda text: isinstance(text, Comment))
        assert not left, f"{page}: {left}; book/_ext/cells.py should take them out"
        metas = " ".join(tag.get("content", "") for tag in html.select("meta"))
        for text in (html.get_text(), metas):
            shows = re.search(r".{0,40}(<!--|-->).{0,40}", text)
            assert not shows, f"{page}: a comment shows: {shows[0]}"
        seen |= words(html.get_text() + metas)
    hidden = set().union(*(words(comment) for _, comment in found)) - seen
    index = (book / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", index, re.DOTALL)[1])
    known = hidden & (set(index["terms"]) | set(index["titleterms"]))
    known = {k for k in known if not any(word.startswith(k) for word in seen)}  # stems
    assert not known, f"the search finds words of comments: {known}"
    assert "<!--" not in (book / "_static" / "hover-texts.js").read_text("utf-8")


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
  return {
    formulas: maths.length,
    bare: maths.filter(m => !m.querySelector('mjx-container') ||
      m.querySelector('mjx-merror, math [mathcolor=red]')).map(m => m.textContent),
    screens: document.documentElement.scrollHeight / innerHeight,
    cut: [...document.querySelectorAll('div.cell_input pre')]
      .filter(p => p.offsetParent && p.scrollWidth > p.clientWidth)
      .map(p => p.textContent.split('\\n'))
      .filter(lines => lines.every(l => l.length <= 88)).map(lines => lines[0]),
  };
}"""


# On a phone: figures that are not all in sight, and how large they are shown.
PHONE = """async () => {
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
        page.evaluate(THIN_OUT)
        fact["axe"] = {}
        for width in (390, 1265):
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_timeout(500)  # the theme waits, too, before it looks again
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
    for view, found in facts(page)["axe"].items():
        assert not found, f"{page}, {view}: mend it or custom.css:\n" + "\n".join(found)


@each_view
def test_page_fits(facts, page):
    cut = facts(page)["cut"]
    assert not cut, f"{page}: 88 columns do not fit at 1280 px; custom.css, cells {cut}"
    width = facts(page)["phone"]["width"]
    assert width <= 390, f"{page}: scrolls sideways on a phone ({width} px of 390)"


@each_view
def test_a_first_column_does_not_cover_the_next(facts, page):
    over = facts(page)["phone"]["over"]
    assert not over, f"{page}: wider than their cells on a phone: {over}"


@each_chapter
def test_chapter_is_not_long(facts, page):
    screens = facts(page)["screens"]
    assert screens <= 28, f"{page}: {screens:.1f} screens of 28; shorten it, fold code"


@each_chapter
def test_figures_can_be_read_on_a_phone(facts, page):
    """All in sight, and text of 10 pt (at 150 dots an inch) at least 11 px high."""
    for scale, right, alt in facts(page)["phone"]["figures"]:
        assert right <= 390, f"{page}: not all in sight: {alt}"
        size = 10 / 72 * 150 * scale
        assert size >= 11, f"{page}: labels of {size:.1f} px; draw it narrower: {alt}"


@pytest.fixture
def view(browser):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    yield context.new_page()
    context.close()


LANDED = """() => {
  const mark = document.querySelector('.bd-article mark');
  const section = document.querySelector(decodeURIComponent(location.hash) || 'none');
  const seen = [...section?.querySelectorAll('mark') ?? []].filter(mark => {
    const box = mark.getBoundingClientRect();
    return box.height && box.top > 0 && box.bottom < innerHeight;
  });
  return mark && seen.map(mark => mark.textContent.toLowerCase());
}"""


@each_chapter
def test_a_search_lands_in_its_section(view, site, page):
    word = BY_PAGE[page].search
    view.goto(f"{site}{PAGES[0]}.html")
    view.keyboard.press("Control+k")
    view.keyboard.type(word)
    view.keyboard.press("Enter")
    results = view.locator("#search-results > ul > li")
    result = results.filter(has=view.locator(f"a[href*='{page}.html']"))
    links = result.locator("li a")
    links.first.wait_for()  # the sections in which it is
    targets = [result.locator("a").first.get_attribute("href")]
    targets.append(links.last.get_attribute("href"))
    for target in targets:
        view.goto(target)
        view.wait_for_load_state()
        view.evaluate("window.MathJax?.startup?.promise")
        view.wait_for_timeout(100)
        marks = view.evaluate(LANDED)
        assert marks, f"{target}: no mark in sight; see search.js"
        first = re.split(r"\W+", word.lower())[0]
        assert any(first in mark for mark in marks), f"{target}: marks {marks}"
    # Opened without the word, it has no marks left.
    view.goto(f"{site}{page}.html")
    assert not view.locator(".bd-article mark").count()


def test_a_word_in_the_address_is_marked(view, site):
    view.goto(f"{site}{PAGES[0]}.html?highlight=lora")
    marks = view.locator("mark").all_inner_texts()
    assert marks and {mark.lower()[:4] for mark in marks} == {"lora"}, marks
    assert "highlight" not in view.url, "a link that is copied should not mark"
    view.keyboard.press("Escape")
    assert not view.locator("mark").count()


@each_chapter
def test_terms_papers_and_chapters_show_their_text(view, site, page):
    view.goto(f"{site}{page}.html")
    note = view.locator("#hover-note")
    others = [Path(other).name for other in CHAPTERS if other != page]
    chapter = ", ".join(f".bd-article p a[href^='{name}.html']" for name in others)
    for kind, selector, text in (
        ("glossary term", "a.term", r"[\w -]+\n+.{6}"),
        ("paper", ".bd-article p a[href^='https://arxiv.org/']", r".{20}.*\d{4}"),
        ("chapter", chapter, r"\d\. .*\n+.{20}"),
    ):
        link = view.locator(selector).first
        assert link.count(), f"{page}: no link to a {kind}"
        link.focus()
        note.wait_for(state="visible", timeout=3000)
        assert re.match(text, note.inner_text()), f"{page}, {kind}: {note.inner_text()}"
        assert link.get_attribute("aria-describedby") == "hover-note"
        view.keyboard.press("Escape")
        assert not note.is_visible(), "Escape must close the note"
        link.blur()
        link.hover()
        note.wait_for(state="visible", timeout=3000)
        view.mouse.move(0, 0)
        note.wait_for(state="hidden", timeout=3000)


@each_chapter
def test_a_wide_table_scrolls_under_its_first_column(view, site, page):
    view.set_viewport_size({"width": 390, "height": 800})
    view.goto(f"{site}{page}.html")
    frame = view.locator(".table-frame:has(table.dataframe)").first
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
    view.evaluate("document.activeElement.blur()")
    frame.focus()
    view.keyboard.press("ArrowRight")
    view.keyboard.press("ArrowRight")
    view.wait_for_function("frame => frame.scrollLeft > 60", arg=frame.element_handle())
    assert abs(first.bounding_box()["x"] - before) < 2, f"{page}: not sticky"
    assert view.evaluate("document.documentElement.scrollWidth") <= 390, page


@each_chapter
def test_where_you_are(view, site, page):
    view.set_viewport_size({"width": 390, "height": 800})
    view.goto(f"{site}{page}.html")
    heading = view.locator("section > h2").nth(2)
    assert not view.locator(".place p").is_visible(), "not before the first section"
    heading.evaluate("heading => heading.scrollIntoView({behavior: 'instant'})")
    title = heading.inner_text().rstrip("#\n")
    place = view.locator(".place p")
    place.get_by_text(title).wait_for(timeout=3000)
    assert re.search(r"\d+ min left$", place.inner_text()), place.inner_text()


def test_figures_belong_into_the_dark(view, site):
    """White becomes the page's own background, ink and colours keep their contrast."""
    inks = [plots.BLUE, plots.RED, plots.GREEN, plots.ORANGE, plots.SKY, plots.GREY]
    picture = Image.new("RGB", (10 * len(inks) + 20, 10), "white")
    for n, ink in enumerate(["#000000", *inks], 1):
        picture.paste(ink, (10 * n, 0, 10 * n + 10, 10))
    data = io.BytesIO()
    picture.save(data, "png")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    view.emulate_media(color_scheme="dark")
    view.goto(f"{site}{CHAPTERS[0]}.html")
    view.wait_for_selector("html[data-theme=dark]")
    image = view.locator(".cell_output figure img").first
    size = f"width: {picture.width}px; height: 10px; border-radius: 0"

    def shown():
        image.evaluate(f"async i => {{ i.src = '{url}'; i.style = '{size}'; "
                       "await i.decode(); }")  # fmt: skip
        shot = Image.open(io.BytesIO(image.screenshot())).convert("RGB")
        return [shot.getpixel((10 * n + 5, 5)) for n in range(len(inks) + 2)]

    paper, black, *colours = shown()
    page = view.evaluate("getComputedStyle(document.body).backgroundColor")
    page = [int(value) for value in re.findall(r"\d+", page)[:3]]
    assert all(abs(a - b) <= 4 for a, b in zip(paper, page, strict=True)), (paper, page)
    assert contrast(black, paper) > 10, black
    for ink, colour in zip(inks, colours, strict=True):
        assert contrast(colour, paper) >= 3, f"{ink} becomes {colour} on {paper}"
    image.evaluate("i => i.closest('.cell').classList.add('tag_photograph')")
    assert shown()[0] == (255, 255, 255), "a photograph stays as it is"


@each_chapter
def test_solutions_are_folded_and_open(view, site, page):
    view.goto(f"{site}{page}.html")
    count = sum(cell.source.startswith("# @title Solution") for cell in cells(page))
    shown = view.locator("div.cell.solution .cell_input:visible")
    label = view.locator("div.cell.solution details > summary").first
    assert count >= 3, f"{page}: at least three solutions, `# @title Solution N.M`"
    assert shown.count() == 0, f"{page}: solutions must be folded"
    height = label.bounding_box()["height"]
    assert height < 32, f"{page}: a folded cell is a line, not a box of {height} px"
    label.click()
    assert shown.count() == 1, f"{page}: a click does not open the solution"
    label.press("Enter")
    assert shown.count() == 0, f"{page}: the key Enter does not fold the solution"
    view.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown.count() == count, f"{page}: solutions stay folded in print; custom.js"


@each_chapter
def test_copy_buttons_copy_the_code(view, site, page):
    view.goto(f"{site}{page}.html")
    cell = view.locator("div.cell_input:visible").first
    cell.hover()
    cell.locator("button.copybtn").click()
    copied = view.evaluate("navigator.clipboard.readText()").strip()
    visible = next(cell for cell in cells(page) if not is_folded(cell))
    assert copied == visible.source.strip(), f"{page}: copied {copied!r}"


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
