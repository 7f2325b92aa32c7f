"""The memory calculator, wherever a page holds `<div class="memory-play"></div>`.

The form and one example are made here, by `lora.memory`; memory.js moves them.
"""

import json

from lora.memory import MLP, SHAPES, training_memory

PLACE = '<div class="memory-play"></div>'
GPUS = 8, 16, 24, 48, 80  # GB
BITS = {"4.127": "4, NF4", "8.5": "8", "16": "16, bfloat16", "32": "32, float32"}
EXAMPLE = {"bits": 4.127, "tokens": 2048}
ITEMS = {
    "base": "frozen base",
    "weights": "adapters",
    "gradients": "their gradients",
    "AdamW m and v": "AdamW's two moments",
    "activations": "activations",
    "logits": "logits and their gradient",
}


def options(values, chosen):
    return "".join(
        f'<option value="{value}"{" selected" * (value == chosen)}>{label}</option>'
        for value, label in values.items()
    )


def number(name, label, value, step=1):
    return f"""<label>{label} <input name="{name}" type="number" min="1" step="{step}"
 value="{value}" inputmode="numeric"></label>"""


def form():
    own = SHAPES["7B"]
    sizes = {
        "blocks": "Blocks",
        "width": "Width",
        "kv": "Width of keys and values",
        "mlp": "Width of the MLP",
        "vocabulary": "Vocabulary",
    }
    models = {name: name for name in SHAPES} | {"own": "another model"}
    heads = {"2": "of its own", "1": "the embedding"}
    places = {"all": "all layers", "attention": "attention", "MLP": "the MLP"}
    ranks = {str(r): str(r) for r in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
    return f"""<form aria-label="Settings of the memory calculator" hidden>
<label>Model <select name="model">{options(models, "7B")}</select></label>
<label>Bits of the base <select name="bits">{options(BITS, "4.127")}</select></label>
<label>Rank <select name="rank">{options(ranks, "16")}</select></label>
<label>Adapters on <select name="on">{options(places, "all")}</select></label>
{number("row", "Tokens in a row", 2048)}
{number("batch", "Rows in a batch", 1)}
<label><input name="checkpoint" type="checkbox" checked> Checkpointing</label>
<label><input name="cast" type="checkbox"> Adapters keep a float32 copy of their input,
as in PEFT</label>
<fieldset class="memory-own" hidden><legend>The model’s config.json says</legend>
{"".join(number(name, label, getattr(own, name)) for name, label in sizes.items())}
<label>MLP <select name="kind">{options({k: k for k in MLP}, "SwiGLU")}</select></label>
<label>The head is <select name="tables">{options(heads, "2")}</select></label>
</fieldset></form>"""


def play():
    items = training_memory(SHAPES["7B"], **EXAMPLE)
    total, largest = sum(items.values()), 1.18 * 24e9
    card = next(size for size in GPUS if 0.9e9 * size >= total)

    def gb(n):
        return f"{n / 1e9:.{2 if n < 1e9 else 1}f}"

    bar = "".join(
        f'<span data-part="{name}" style="width: {n / largest:.2%}"></span>'
        for name, n in items.items()
    )
    lines = "".join(
        f'<i data-gpu="{size}" style="left: {1e9 * size / largest:.2%}"'
        f"{' hidden' * (1e9 * size > largest)}>{size} GB</i>"
        for size in GPUS
    )
    rows = "".join(
        f'<tr><th scope="row"><span data-part="{name}"></span>{label}</th>'
        f'<td class="number" data-size="{name}">{gb(items[name])}</td></tr>'
        for name, label in ITEMS.items()
    )
    numbers = {
        "shapes": {name: shape._asdict() for name, shape in SHAPES.items()},
        "mlp": MLP,
        "bits": EXAMPLE["bits"],
    }
    return f"""<div class="memory-play" data-numbers='{json.dumps(numbers)}'>
{form()}
<div class="memory-bar" aria-hidden="true"><div>{bar}</div>{lines}</div>
<output>7B in NF4, rank 16 on all layers, {EXAMPLE["tokens"]:,} tokens, with
checkpointing: {gb(total)} GB. With a tenth of it left free, a card of {card} GB holds
this.</output>
<div class="table-frame" role="region" tabindex="0" aria-label="Memory by item">
<table><thead><tr><th>What is kept</th><th class="number">GB</th></tr></thead>
<tbody>{rows}</tbody>
<tfoot><tr><th scope="row">sum</th><td class="number" data-size="sum">{gb(total)}</td>
</tr></tfoot></table></div></div>
<script src="../_static/memory.js" defer></script>"""


def put(app, pagename, templatename, context, doctree):
    if PLACE in context.get("body", ""):
        context["body"] = context["body"].replace(PLACE, play())


def setup(app):
    app.connect("html-page-context", put)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
