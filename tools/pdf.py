"""The whole book as one PDF: `make pdf`. Chromium prints Sphinx's single page of it.

The pages of the next `make book` offer the file (book/_ext/front.py).
"""

import re

from tools.kit.register import BASE, PDF, ROOT
from tools.kit.site import build, open_browser

SINGLE = ROOT / "_build" / "singlehtml"
FOOT = (
    '<div style="font: 7pt sans-serif; width: 100%; text-align: center">'
    '<span class="pageNumber"></span></div>'
)
# Nothing waits for a reader. A link that stood in HTML, as Sphinx does not know it,
# leads to the page's place in the PDF; one to another file, such as a download, online.
READY = """async (base) => {
  await window.MathJax?.startup?.promise;
  for (const image of document.images) image.loading = "eager";
  await Promise.all([...document.images].map((image) => image.decode().catch(() => 0)));
  dispatchEvent(new Event("beforeprint"));
  const here = new URL(".", location).href;
  for (const link of document.querySelectorAll("a[href]:not([href^='#'])")) {
    const [, page] = link.getAttribute("href").match(/^([\\w-]+)\\.html/) ?? [];
    link.href = page ? `#document-book/${page}` : link.href.replace(here, base);
  }
}"""


def print_book(browser):
    """The PDF's bytes, by an open Chromium."""
    build("--builder", "singlehtml")
    # Sphinx puts it into the folder of the first page, with addresses for the root.
    text = (SINGLE / "book" / "index.html").read_text(encoding="utf-8")
    whole = SINGLE / "whole.html"
    text = re.sub('"../(_static|_images)/', r'"\1/', text)
    whole.write_text(text, encoding="utf-8")
    page = browser.new_page(color_scheme="light")
    page.set_default_timeout(300_000)  # a whole book, on a busy machine
    page.goto(whole.as_uri())
    page.evaluate(READY, BASE)
    page.emulate_media(media="print")
    data = page.pdf(
        prefer_css_page_size=True,
        display_header_footer=True,
        header_template="<span></span>",
        footer_template=FOOT,
        outline=True,
        tagged=True,
    )
    page.close()
    return data


def main():
    with open_browser() as browser:
        PDF.write_bytes(print_book(browser))


if __name__ == "__main__":
    main()
