"""The pages: built, served as GitHub Pages serves them, opened in Chromium."""

import gzip
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

from playwright.sync_api import sync_playwright

from tools.kit.register import ROOT

HTML = ROOT / "_build" / "html"
BROWSERS = (
    os.environ.get("CHROMIUM"),
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
MISSING = "no Chromium or Chrome found; name one in the variable CHROMIUM"


def build(*options):
    """Build the book; a warning is an error, which ends the process."""
    command = [Path(sys.executable).with_name("jupyter-book"), "build", "--quiet"]
    command += ["-W", "-n", "--keep-going", *options, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def chromium():
    """How Playwright starts Chromium or Chrome here; None where there is neither."""
    path = next(filter(None, (shutil.which(b) for b in BROWSERS if b)), None)
    return path and {"executable_path": path, "args": FLAGS}


@contextmanager
def open_browser():
    """An open Chromium or Chrome; the process ends where there is neither."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**(chromium() or sys.exit(MISSING)))
        yield browser
        browser.close()


@contextmanager
def serve(folder):
    """The address of a folder on a local server."""
    handler = partial(Pages, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/LoRA/"
    server.shutdown()


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
        return self.answer(200, self.guess_type(path), path)

    def send_error(self, code, message=None, explain=None):
        body = self.answer(code, "text/html", Path(self.directory, "404.html"))
        self.copyfile(body, self.wfile)

    def answer(self, code, kind, path):
        body = packed(path, path.stat().st_mtime)
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return BytesIO(body)

    def log_message(self, *args):
        pass
