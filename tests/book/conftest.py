"""A copy of the book to break, its built pages, and the browser that opens them."""

import os
import shutil
import subprocess

import pytest
from bs4 import BeautifulSoup
from filelock import FileLock

from tools.kit.register import ROOT, last_change
from tools.kit.site import HTML, MISSING, build, chromium, serve


def pytest_collection_modifyitems(items):
    """Files that need a browser last: Playwright's event loop stays in the process."""
    browsing = {item.path for item in items if "browser" in item.fixturenames}
    items.sort(key=lambda item: item.path in browsing)


@pytest.fixture(scope="session")
def copy_book():
    """A function that copies all files that git would commit into a folder."""

    def copy_to(folder):
        command = ["git", "-C", ROOT, "ls-files", "-z", "-co", "--exclude-standard"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for file in filter(None, done.stdout.split("\0")):
            if (ROOT / file).exists():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, folder / file)
        return folder

    return copy_to


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """The folder of the built pages, built anew where a source is newer."""
    stamp = HTML / "index.html"  # every build writes it last
    # All processes that run tests at the same time share one folder of pages.
    with FileLock(tmp_path_factory.getbasetemp().parent / "book.lock"):
        if not stamp.exists() or stamp.stat().st_mtime < last_change():
            build("--all")  # the site map lists the pages of one and the same build
    return HTML


@pytest.fixture(scope="session")
def soup(book):
    """The parsed HTML files, by path relative to the site's root."""
    files = [f for f in book.rglob("*.html") if "_static" not in f.parts]
    return {
        f.relative_to(book).as_posix(): BeautifulSoup(f.read_bytes(), "html.parser")
        for f in files
    }


@pytest.fixture(scope="session")
def site(book):
    """The URL of the built pages on a local server."""
    with serve(book) as url:
        yield url


@pytest.fixture(scope="session")
def browser_type_launch_args():
    """What pytest-playwright starts: this machine's own Chromium or Chrome."""
    return chromium() or (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)


@pytest.fixture
def page(new_context):
    """A page of a window of 1280 px that asks for less motion."""
    size = {"width": 1280, "height": 800}
    allowed = ["clipboard-read", "clipboard-write"]
    options = {"viewport": size, "permissions": allowed, "reduced_motion": "reduce"}
    return new_context(**options).new_page()
