"""What all test files share."""

import gzip
import os
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

# Before anything reads them: no progress bars, nothing from the network.
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

# The same examples on every run: a failure in CI is a failure on every desk.
settings.register_profile("book", derandomize=True, deadline=None)
settings.load_profile("book")
# Small tensors: a second thread costs more than it brings.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "_config.yml", ROOT / "_toc.yml", ROOT / "book"]
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
QUIET += " --disable-background-networking --disable-component-update"


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
    # All processes that run tests at the same time share one folder of pages.
    with FileLock(tmp_path_factory.getbasetemp().parent / "book.lock"):
        return build_book()


def build_book():
    html = ROOT / "_build" / "html"
    stamp = html / "index.html"  # every build writes it last
    sources = [f for s in SOURCES for f in (s, *s.rglob("*")) if "." in f.name]
    built = stamp.stat().st_mtime if stamp.exists() else 0
    if any(f.stat().st_mtime > built for f in sources):
        # `make book`, which is not on every machine
        command = [
            str(Path(sys.executable).parent / "jupyter-book"),
            "build",
            "--all",  # the site map lists only the pages of one and the same build
        ]
        command += ["--quiet", "-W", "-n", "--keep-going", str(ROOT)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, "`make book` fails:\n" + run.stdout + run.stderr
    return html


@cache
def packed(path, changed):
    """A file as it goes over the wire; anew when it has changed."""
    return gzip.compress(path.read_bytes())


class Pages(SimpleHTTPRequestHandler):
    """Serves a folder as GitHub Pages does: /LoRA/, its own 404 page, text gzipped."""

    protocol_version = "HTTP/1.1"  # one connection serves many requests

    def translate_path(self, path):
        outside = "/" + "outside" + path
        return super().translate_path(path.removeprefix("/LoRA") or outside)

    def handle(self):
        with suppress(ConnectionError):  # a page that is closed while it loads
            super().handle()

    def send_head(self):
        path = Path(self.translate_path(self.path))
        if path.suffix not in (".html", ".css", ".js", ".svg", ".json"):
            return super().send_head()
        if not path.is_file():
            return self.send_error(404)
        body = packed(path, path.stat().st_mtime)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return BytesIO(body)

    def send_error(self, code, message=None, explain=None):
        body = Path(self.directory, "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site(book):
    """The URL of the built pages on a local server."""
    handler = partial(Pages, directory=str(book))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/LoRA/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Chromium, for the module only: Playwright holds the thread's event loop."""
    from tools.pdf import chromium  # it reads _config.yml, which `make mutants` has not

    found = chromium()
    if not found:
        missing = "no Chromium or Chrome found; name one in the variable CHROMIUM"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=QUIET.split(), headless=True
        )
        yield browser
        browser.close()
