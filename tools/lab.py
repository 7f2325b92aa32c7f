"""The laboratory's data: `python -m tools.lab weights` or `picture`.

`weights` pretrains the network of seed 0 as Chapter 3 does and writes its numbers to
base.js: float32, little-endian, W and b of each layer in PyTorch's order, in base64
with their SHA-256. It is a script and no plain binary file because a page that is
opened from disk may load scripts but may not read files. `picture` takes the still
picture that stands for the laboratory on paper: the built page after its first run.
"""

import base64
import hashlib
import re
import sys

import torch

from lora.study.moons import pretrained
from tools.kit.register import BOOK
from tools.kit.site import HTML, open_browser

LAB = BOOK / "_static" / "lab"
ENGINE = ("matrix", "network", "optimizer", "adapters", "experiment")  # without a page
DONE = "document.querySelector('#lab-status').textContent"
SCRIPTS = (*ENGINE, "draw", "page")
FORMAT = """/* The pretrained network: 33,666 numbers in float32, by tools/lab.py.
   SHA-256 of the bytes: {digest} */

const MOONS_BASE =
  "{text}";
"""


def pretrained_numbers():
    """All numbers of Chapter 3's pretrained network of seed 0, float32, (33666,)."""
    (model,), *_ = pretrained([0])
    return torch.cat([p.detach().flatten() for p in model.parameters()]).float()


def stored_numbers():
    """The numbers in base.js, float32, (33666,). ValueError if they are damaged."""
    source = (LAB / "base.js").read_text(encoding="ascii")
    data = base64.b64decode(re.search('"(.*)"', source)[1])
    if hashlib.sha256(data).hexdigest() not in source:
        raise ValueError(
            "base.js does not have its SHA-256: python -m tools.lab weights"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def write_weights():
    data = pretrained_numbers().numpy().astype("<f4").tobytes()
    digest, text = hashlib.sha256(data).hexdigest(), base64.b64encode(data).decode()
    source = FORMAT.format(digest=digest, text=text)
    (LAB / "base.js").write_text(source, encoding="ascii")


def take_picture():
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1265, "height": 900})
        page.goto((HTML / "book" / "lab.html").as_uri())
        page.click("#lab-train")
        page.wait_for_function(DONE, timeout=180_000)
        page.locator("#lab-pictures").screenshot(path=str(LAB / "still.png"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"weights": write_weights, "picture": take_picture}[sys.argv[1]]()
