"""The whole book as one PDF, from the built pages: `make pdf`.

Chromium prints one page that holds the article of every page of `_toc.yml`, so that
links between chapters, the outline and the page numbers are the PDF's own.
"""

import mimetypes
import os
import shutil
import sys
from urllib.parse import unquote, urldefrag, urljoin

from bs4 import BeautifulSoup

from tools.kit.register import BASE, CONFIG, ROOT, pages

HTML = ROOT / "_build" / "html"
NAME = "deconstructing-lora.pdf"
BROWSERS = (
    os.environ.get("CHROMIUM"),
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
PLACE = '<span data-pdf="{}" hidden></span>'  # in the pages, from book/_ext/front.py
FOOT = (
    '<div style="font: 7pt sans-serif; width: 100%; text-align: center">'
    '<span class="pageNumber"></span></div>'
)
READY = """async () => {
  await window.MathJax?.startup?.promise;
  for (const image of document.images) image.loading = "eager";
  const images = [...document.images];
  await Promise.all(images.map((image) => image.decode().catch(() => 0)));
  const folded = ".solution details, details:not(.hide)";
  for (const details of document.querySelectorAll(folded)) details.open = true;
}"""


def chromium():
    """The path of Chromium or Chrome; None where there is none."""
    return next(filter(None, (shutil.which(b) for b in BROWSERS if b)), None)


def anchor(page, fragment=""):
    """The name of a page's anchor in the whole book."""
    return f"{page.replace('/', '-')}--{fragment or 'top'}"


def whole_book(html=HTML):
    """The pages of `_toc.yml` as one: the first one's head, every page's article."""
    names = pages()
    targets = {f"{BASE}{page}.html": page for page in names}
    soups = {
        page: BeautifulSoup((html / f"{page}.html").read_bytes(), "html.parser")
        for page in names
    }
    articles = []
    for page, soup in soups.items():
        article = soup.article
        for tag in article.select("[id]"):
            tag["id"] = anchor(page, tag["id"])
        for name in ("for", "aria-labelledby", "aria-describedby", "headers"):
            for tag in article.select(f"[{name}]"):
                tag[name] = " ".join(anchor(page, i) for i in tag[name].split())
        for tag in article.select("[src]"):
            tag["src"] = urljoin(f"{BASE}{page}.html", tag["src"])
        for tag in article.select("[href]"):
            url, fragment = urldefrag(urljoin(f"{BASE}{page}.html", tag["href"]))
            target = targets.get(url.split("?")[0])
            inside = target and f"#{anchor(target, unquote(fragment))}"
            tag["href"] = inside or url + (f"#{fragment}" if fragment else "")
        article["id"] = anchor(page)
        articles.append(article)
    book = next(iter(soups.values()))
    main = book.select_one("main")
    main.clear()
    main["class"] = "whole-book"
    main.extend(articles)
    # Only the pages with formulas load MathJax, with the settings of their own.
    scripts = {str(s) for s in book.head.select("script")}
    for soup in soups.values():
        for script in soup.head.select("script"):
            if "mathjax" in str(script).lower() and str(script) not in scripts:
                scripts.add(str(script))
                book.head.append(script)
    return str(book)


def from_disk(text, html):
    """Answers the requests of a page: `text` and files of `html`, no network."""

    def answer(route):
        path = urldefrag(route.request.url)[0].split("?")[0].removeprefix(BASE)
        file = html / path
        if path == "book/whole.html":
            route.fulfill(body=text, content_type="text/html; charset=utf-8")
        elif route.request.url.startswith(BASE) and file.is_file():
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            route.fulfill(body=file.read_bytes(), content_type=kind)
        else:
            route.abort()

    return answer


def print_book(browser, html=HTML):
    """The PDF's bytes, printed by an open Chromium."""
    page = browser.new_page(color_scheme="light")
    try:
        page.route("**/*", from_disk(whole_book(html), html))
        page.goto(f"{BASE}book/whole.html")
        page.evaluate(READY)
        page.emulate_media(media="print")
        return page.pdf(
            prefer_css_page_size=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOT,
            outline=True,
            tagged=True,
        )
    finally:
        page.close()


def offer(html=HTML):
    """Put links to the PDF where the built pages keep a place for them."""
    size = (html / NAME).stat().st_size / 1e6
    for file in html.rglob("*.html"):
        up = "../" * (len(file.relative_to(html).parts) - 1)
        text = file.read_text(encoding="utf-8")
        link = f'href="{up}{NAME}">PDF, {size:.1f} MB</a>'
        new = text.replace(PLACE.format("button"), f'<a class="button" {link}')
        new = new.replace(PLACE.format("link"), f" · <a {link}")
        if new != text:
            file.write_text(new, encoding="utf-8")


def main():
    from playwright.sync_api import sync_playwright

    found = chromium()
    if not found:
        sys.exit("no Chromium or Chrome found; name one in the variable CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        (HTML / NAME).write_bytes(print_book(browser))
        browser.close()
    offer()
    print(f"{CONFIG['title']} on paper: {(HTML / NAME).as_uri()}")


if __name__ == "__main__":
    main()
