"""Results that repeat on another processor within a tolerance only; a cell states it.

Its metadata hold `tolerance`: `absolute`, the `reason`, the expression `half_width` of
the interval that the text reports, of which the tolerance is at most a third, and, for
a cell that draws, the name of its `figure`. Without it everything is compared exactly.
"""

import math
import re

from tools.kit.bound import ask

NUMBER = r"[-−+]?\d[\d,_]*(?:\.\d+)?(?:e[-+]?\d+)?"
DRAWN = "from lora.study.plots import drawn as _drawn"


def drawn(client, tolerance):
    """The data of the cell's figure, [] without one; the tolerance itself is checked.

    Raises ValueError if the tolerance could hide what the text reports.
    """
    (width,) = ask(client, [tolerance["half_width"]])
    if not 0 < tolerance["absolute"] <= width / 3:
        raise ValueError(
            f"a tolerance of {tolerance['absolute']} is more than a third of the "
            f"half-width {width} of the interval that the text reports"
        )
    if "figure" not in tolerance:
        return []
    (data,) = ask(client, [f"_drawn({tolerance['figure']})"], before=DRAWN)
    return data


def words(outputs):
    """The texts of a cell's outputs, without pictures and their descriptions."""
    data = [o.get("data", {}) for o in outputs]
    return [o.get("text", "") for o in outputs] + [
        d.get(kind, "")
        for d in data
        for kind in ("text/plain", "text/html")
        if "image/png" not in d
    ]


def differs(stored, new, tolerance):
    """Whether two texts differ in words, or in a number by more than `tolerance`."""
    if re.sub(NUMBER, "#", stored) != re.sub(NUMBER, "#", new):
        return True
    pairs = zip(*(re.findall(NUMBER, text) for text in (stored, new)))
    return any(
        not math.isclose(number(a), number(b), rel_tol=1e-12, abs_tol=tolerance)
        for a, b in pairs
    )


def number(text):
    return float(re.sub("[,_]", "", text.replace("−", "-")))
