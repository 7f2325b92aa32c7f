"""A figure that was drawn again is compared with the one that the notebook stores."""

import base64
from pathlib import Path

from matplotlib.testing.compare import compare_images
from matplotlib.testing.exceptions import ImageComparisonFailure

from lora.study.plots import NARROW

# Root mean square over the pixels, of 255; one changed letter is about 1.5. matplotlib
# brings its own font rasterizer, so that 3.10.0 and 3.10.9 draw the same pixels on all
# machines. 3.11 sets all text anew (about 30): after such an upgrade, `make run`.
TOLERANCE = 1.0


def pictures(outputs, *kinds):
    """The PNG files among a cell's outputs, as bytes: of these types, or of both."""
    found = [
        output["data"][kind]
        for output in outputs
        for kind in kinds or ("image/png", NARROW)
        if kind in output.get("data", {})
    ]
    return list(map(base64.b64decode, found))


def difference(stored, drawn, folder):
    """What tells two lists of pictures apart, in words; None if nothing does.

    Writes the pictures that differ, and a picture of the difference, into `folder`.
    """
    if len(stored) != len(drawn):
        return f"{len(stored)} figures are stored, {len(drawn)} were drawn"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, pair in enumerate(zip(stored, drawn)):
        files = [folder / f"{i}-{name}.png" for name in ("stored", "drawn")]
        for file, content in zip(files, pair):
            file.write_bytes(content)
        try:
            message = compare_images(*map(str, files), tol=TOLERANCE)
        except ImageComparisonFailure as another_size:
            message = str(another_size)
        if message:
            return message
    return None
