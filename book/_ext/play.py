"""Things to play with, wherever a page holds `<div class="NAME-play">...</div>`.

What stands in the div is for those who read a notebook elsewhere. Here it becomes one
example, computed by the package and whole without a script; play.js moves it.
"""

import html
import json
import re
from pathlib import Path

import torch
from scipy import stats

from lora import LoRALinear
from lora.formats import NF4, round_trip, to_codes
from lora.study.evidence import interval

PLACE = re.compile(r'<div class="(\w+)-play">(.*?)</div>', re.DOTALL)
FRAME = '<div class="table-frame" role="region" tabindex="0" aria-label="{}">'
DIAL = json.loads(Path(__file__).with_name("dial.json").read_text(encoding="utf-8"))
FORMATS = ("float32", "bfloat16", "float16")
SHOWN = 6  # rows of a list of search results


def minus(text):
    return text.replace("-", "−")


def numbers(*texts):
    return "".join(f'<td class="number">{minus(text)}</td>' for text in texts)


def head(*texts):
    cells = "".join(f'<th class="number" scope="col">{text}</th>' for text in texts)
    return f"<thead><tr><td></td>{cells}</tr></thead>"


def nf4(_):
    """Eight numbers, their codes in NF4 and what comes back."""
    values = torch.tensor([0.12, -0.55, 0.31, 2.0, -0.08, 0.9, -1.3, 0.02])
    codes, _ = to_codes(values, NF4, len(values))
    back = round_trip(values, "NF4", len(values))
    rows = ""
    for value, code, stored in zip(values.tolist(), codes.tolist(), back.tolist()):
        texts = f"{value:.2f}", f"{code:04b}", f"{stored:.2f}", f"{stored - value:.2f}"
        rows += f"""<tr><td><input type="range" min="-3" max="3" step="0.01"
 value="{value:.2f}" aria-label="A number" hidden></td>{numbers(*texts)}</tr>
"""
    error = ((values - back).norm() / values.norm()).item()
    return f"""<div class="nf4-play" data-levels="{NF4.tolist()}">
{FRAME.format("Eight numbers in NF4")}
<table>{head("number", "code", "comes back as", "off by")}
<tbody>{rows}</tbody></table></div>
<output>Scale {values.abs().max():.2f}, the largest of the eight.
What comes back is off by {error:.1%}.</output></div>"""


def merge(_, weight=0.5, update=0.001):
    """An update beside a weight, merged in three formats: `LoRALinear.merged`."""
    becomes, left = [], []
    for name in FORMATS:
        base = torch.nn.Linear(1, 1, bias=False, dtype=getattr(torch, name))
        torch.nn.init.constant_(base.weight, weight)
        layer = LoRALinear(base, rank=1, alpha=1)
        layer.A.data.fill_(1)
        layer.B.data.fill_(update)
        merged = layer.merged().weight.item()
        becomes.append(f"{merged:.7f}")
        left.append(f"{(merged - weight) / update:.0%}")
    return f"""<div class="merge-play" data-weight="{weight}">
<label hidden><span>Update: <b>{update}</b></span>
<input type="range" min="-8" max="-1" step="0.05" value="-3"></label>
{FRAME.format("An update merged in three formats")}
<table>{head(*FORMATS)}
<tbody><tr><th scope="row">{weight} + <span>{update}</span></th>{numbers(*becomes)}</tr>
<tr><th scope="row">kept of the update</th>{numbers(*left)}</tr></tbody></table></div>
</div>"""


def mark(name, text="", **values):
    """An element of a drawing. `kind` is its class."""
    values = {"class" if k == "kind" else k: value for k, value in values.items()}
    attributes = "".join(f' {key}="{value}"' for key, value in values.items())
    return f"<{name}{attributes}>{text}</{name}>"


def seeds(text):
    """Paired differences in the page: mean and interval of the first n seeds."""
    listed = re.findall(r"([\w ]+): ([\d.,−-]+\d)", re.sub("<[^>]*>", "", text))
    runs = {
        name.strip(): [float(n) for n in values.replace("−", "-").split(",")]
        for name, values in listed
    }
    name, values = next(iter(runs.items()))
    top, bottom, high = 0.8, -1.6, 210  # points, points, CSS pixels

    def y(points):
        inside = min(top, max(bottom, points))
        return round(high * (top - inside) / (top - bottom), 1)

    band = round(y(-0.15) - y(0.15), 1)
    marks = mark("rect", kind="band", width="100%", y=y(0.15), height=band)
    for tick in (0.5, 0, -0.5, -1, -1.5):
        at = {"x1": "2.6rem", "x2": "100%", "y1": y(tick), "y2": y(tick)}
        marks += mark("line", kind="grid", **at)
        label = minus(f"{tick:+g}") if tick else "0"
        marks += mark("text", label, x=0, y=y(tick), dy="0.35em")
    for n, value in enumerate(values, 1):
        x, seed = f"{9 + 90 * (n - 0.5) / len(values):.2f}%", ""
        if n > 1:
            mean, low, upper = interval(values[:n])
            apart = "apart" if low > 0 or upper < 0 else ""
            seed += mark("line", kind=apart, x1=x, x2=x, y1=y(low), y2=y(upper))
            seed += mark("rect", kind="mean", x=x, y=y(mean), width=7, height=2.5)
        marks += mark("g", seed + mark("circle", cx=x, cy=y(value), r=2.2))
    quantiles = stats.t.ppf(0.975, range(1, len(values))).tolist()
    data = {"runs": runs, "t": quantiles, "top": top, "bottom": bottom, "high": high}
    mean, low, upper = (minus(f"{n:+.2f}") for n in interval(values))
    options = "".join(f"<option>{name}</option>" for name in runs)
    return f"""<div class="seeds-play" data-numbers='{json.dumps(data)}'>
<p class="play-row" hidden><label>Compare <select>{options}</select> with full</label>
<button type="button" data-add="1">Add a seed</button>
<button type="button" data-add="10">Add ten</button>
<button type="button" data-add="0">Start again, in another order</button></p>
<svg role="img" width="100%" height="{high}" aria-label="Against the number of seeds:
each seed's difference as a dot, and the mean of all so far with its 95% interval."
>{marks}</svg>
<output>{len(values)} seeds, {name} minus full: {mean} [{low}, {upper}] points.</output>
</div>"""


def dial(_):
    """What a search finds with a part of the update, at its ends."""
    shown, *_ = DIAL["questions"]
    stops = [DIAL["stops"].index(stop) for stop in (0, 1)]
    columns = []
    for stop in stops:
        scores = shown["cosines"][stop]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        columns.append([shown["functions"][i][0] for i in order[:SHOWN]])
    rows = "".join(
        f'<tr><th scope="row">{place}</th>'
        + "".join(f"<td>{name.rpartition('.')[2]}</td>" for name in names)
        + "</tr>"
        for place, names in enumerate(zip(*columns), 1)
    )
    options = "".join(
        f"<option>{html.escape(entry['question'])}</option>"
        for entry in DIAL["questions"]
    )
    before, after = (shown["places"][stop] for stop in stops)
    return f"""<div class="dial-play" data-numbers="{html.escape(json.dumps(DIAL))}">
<p class="play-row" hidden><label>You type <select>{options}</select></label>
<label>Dial: <b></b>
<input type="range" min="0" max="{len(DIAL["stops"]) - 1}" value="0"></label></p>
<ol hidden></ol>
<output>“{shown["question"]}” looks for {shown["answer"]}: place {before} of
{DIAL["among"]:,} at 0, place {after} at 1.</output>
{FRAME.format("What the search finds at two places of the dial")}
<table><thead><tr><th>place</th><th>dial at 0</th><th>dial at 1</th></tr></thead>
<tbody>{rows}</tbody></table></div></div>"""


KINDS = {"nf4": nf4, "merge": merge, "seeds": seeds, "dial": dial}


def put(app, pagename, templatename, context, doctree):
    """Fill the places of a page, and load the script there."""

    def fill(place):
        return KINDS[place[1]](place[2]) if place[1] in KINDS else place[0]

    body = context.get("body", "")
    filled = PLACE.sub(fill, body)
    if filled != body:
        script = context["pathto"]("_static/play.js", 1)
        context["body"] = f'{filled}\n<script src="{script}" defer></script>'


def setup(app):
    app.connect("html-page-context", put)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
