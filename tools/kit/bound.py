"""Numbers in the prose are bound to their values: `98.88<!-- full.mean():.2f -->`.

The comment, which no surface shows, is a *key*. It names the value of the token before
it, in one of three ways:

- `full.mean():.2f`, an expression with a format, evaluated in the chapter's kernel
  after the code cell above;
- `03-experiment: full.mean():.2f`, the same at the end of that chapter;
- `hu2021: checkpoint GB`, the figure beside the same key in references.md.

`make run` writes the tokens, and the values into the metadata (`bound`) of the cell or,
for other pages, of the notebook. Captions and alternative texts are written the same
way, in a code cell's metadata `book`. nbval evaluates all keys afresh, see
book/conftest.py.
"""

import ast
import asyncio
import inspect
import re

from tools.kit.register import BOOK, ROOT, pages

KEY = r"<!-- (?P<key>[^\n]*?) -->"
TOKEN = r"[+−]?\w(?:[\w.,-]*\w)?%?(?: \[[+−][\d.]+, [+−][\d.]+\])?"  # or an interval
BOUND = re.compile(f"(?P<shown>{TOKEN})?" + KEY)
ELSEWHERE = re.compile(r"(\d\d-[\w-]+|recipe-run): (.*)")
LITERATURE = re.compile(r"([a-z]+\d{4}[a-z]*): (.*)")
GENERATED = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)
NUMBER = re.compile(
    r"(?<![\w.])(?<!\w-)(?P<digits>\d+(?:[,_]\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?)"
    r"(?P<unit>\s?%|\s?[×°]|-fold|\s(?:thousand|million|billion)\b|\s?[KMGT]i?B\b)?"
    r"(?![\w^])"
)
COUNTING = 12  # "three seeds, 12 entries": counted, not measured
NAMES = r"^\d+\. |\b(Exercises?|Chapters?|Sections?|Part|Python|CC BY) [\d.]+"
NAMES += r"|\b95% (confidence )?i"
CODE = r"```.*?```|(?<!`)`[^`\n]+`(?!`)"
UNREAD = CODE + r"|\]\([^)]*\)|</?\w[^>]*>|\bhttps?://\S+|^---\n.*?\n---\n"
UNREAD += r"|^#+ [^\n]*\?$"  # a question: it asks about a number, and states none
# Calls that compute nothing of their own: what they are given must be computed.
TRIVIAL = {"dict", "enumerate", "float", "int", "items", "keys", "len", "list", "max"}
TRIVIAL |= {"min", "range", "round", "set", "sorted", "str", "sum", "tuple", "values"}
TRIVIAL |= {"reversed", "zip"}
DEFINITIONS = ast.FunctionDef | ast.ClassDef


def keys(text):
    """The keys of a text, in order."""
    return [match["key"] for match in BOUND.finditer(text)]


def write(text, values):
    """The text with each token set to the value of its key, where there is one."""

    def token(match):
        key = match["key"]
        return f"{values.get(key, match['shown'] or '')}<!-- {key} -->"

    return BOUND.sub(token, text)


def expression(key):
    """A key's Python expression, which yields the text to show."""
    try:
        ast.parse(key, mode="eval")
    except SyntaxError:
        key, _, form = key.rpartition(":")
        ast.parse(key, mode="eval")
        return f"format({key}, {form.strip()!r})"
    return f"str({key})"


def evaluate(client, wanted):
    """Key -> the text that it shows, in a live kernel."""
    values = ask(client, map(expression, wanted))
    return {key: re.sub(r"^-(?=\d)", "−", value) for key, value in zip(wanted, values)}


def ask(client, expressions, before=""):
    """The values of expressions in a live kernel, after the statements `before`."""
    code = {str(i): e for i, e in enumerate(expressions)}

    async def answers():
        sent = client.execute(before, silent=True, user_expressions=code)
        while True:
            reply = client.get_shell_msg(timeout=600)
            reply = await reply if inspect.isawaitable(reply) else reply
            if reply["parent_header"].get("msg_id") == sent:
                return reply["content"]["user_expressions"]

    values = asyncio.run(answers()) if code else {}
    for i, answer in values.items():
        if answer["status"] == "error":
            raise ValueError(f"{code[i]}: {answer['ename']}: {answer['evalue']}")
    return [ast.literal_eval(values[i]["data"]["text/plain"]) for i in code]


# --- Where keys stand ---


def texts(cell):
    """Name -> text with keys: the source of prose, caption and alt of a code cell."""
    if cell.cell_type == "markdown":
        return {"source": cell.source}
    return {k: v for k, v in cell.metadata.get("book", {}).items() if k != "name"}


def local(cell):
    """Keys of a cell that its own chapter evaluates after the code cell above."""
    own = [key for text in texts(cell).values() for key in keys(text)]
    return [k for k in own if not ELSEWHERE.match(k) and not LITERATURE.match(k)]


def outside():
    """The texts that stand in no notebook: path -> text."""
    files = [ROOT / f"{page}.md" for page in pages()]
    return {f: f.read_text() for f in [*files, ROOT / "README.md"] if f.exists()}


def exported(name, notebooks):
    """Expressions that pages, other chapters and headlines take from a chapter."""
    cells = [cell for notebook in notebooks.values() for cell in notebook.cells]
    read = [*outside().values(), *(t for cell in cells for t in texts(cell).values())]
    quoted = filter(None, (ELSEWHERE.match(key) for text in read for key in keys(text)))
    expressions = [match[2] for match in quoted if match[1] == name]
    for cell in notebooks[name].cells:
        expressions += cell.metadata.get("headline", {}).get("book", {}).values()
    return list(dict.fromkeys(expressions))


def literature():
    """Key -> figure of each entry of `references.md`."""
    quoted = BOUND.finditer((BOOK / "references.md").read_text())
    return {m["key"]: m["shown"] for m in quoted if LITERATURE.match(m["key"])}


def sources_of_literature():
    """Entry of the bibliography -> address of its link in `references.md`."""
    links = {}
    for block in re.split(r"\n(?=- |\n)", (BOOK / "references.md").read_text()):
        for key in keys(block):
            entry = key.partition(":")[0]
            links[entry] = re.search(r"\]\(([^)]+)\)", block)[1]
    return links


# --- What a cell computes ---


def computed(cells):
    """Name -> tolerance, of each name that the code cells compute, in order.

    Literals, containers and arithmetic of literals, and other names for them are not
    computed. The tolerance is that of the cells behind the value, 0 where it is exact.
    """
    known = {}
    for cell in cells:
        own = cell.metadata.get("tolerance", {}).get("absolute", 0)
        for target, value in assignments(cell.source):
            name = root(target)
            behind = names_in(value) & known.keys()
            if name and (behind or computes(value)):
                tolerances = [known[n] for n in {*behind, name} & known.keys()]
                known[name] = max(own, *tolerances, 0)
            elif isinstance(target, ast.Name):
                known.pop(name, None)
    return known


def assignments(source):
    """(target, value), as syntax trees, of what a cell assigns outside functions."""
    code = re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.MULTILINE)
    body = [s for s in ast.parse(code).body if not isinstance(s, DEFINITIONS)]
    nodes = [n for s in body for n in ast.walk(s) if hasattr(n, "lineno")]
    for node in sorted(nodes, key=lambda n: n.lineno):
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    yield from unpacked(target, value)
            case ast.AugAssign(target=target, op=op, value=value):
                yield target, ast.BinOp(target, op, value)
            case ast.For(target=target, iter=value):
                yield from unpacked(target, value)
            case ast.With(items=items):
                for item in items:
                    yield from unpacked(item.optional_vars, item.context_expr)
            case ast.Expr(ast.Call(func=ast.Attribute(value=target), args=[value])):
                yield ast.Starred(target), value  # rows.append(value)


def unpacked(target, value):
    """`a, b = 1, f()` as `a = 1` and `b = f()`; each part of `a, b = f()` is f()."""
    parts, values = getattr(target, "elts", ()), getattr(value, "elts", ())
    if not parts:
        yield target, value
    for i, part in enumerate(parts):
        yield from unpacked(part, values[i] if len(values) == len(parts) else value)


def root(target):
    """The name at the root of `name[0].part`; None where there is none."""
    while isinstance(target, ast.Attribute | ast.Subscript | ast.Starred):
        target = target.value
    return getattr(target, "id", None)


def names_in(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def computes(value):
    """Whether an expression calls what is not trivial, or does sums with a name."""
    nodes = list(ast.walk(value))
    calls = [n.func for n in nodes if isinstance(n, ast.Call)]
    called = {getattr(f, "attr", getattr(f, "id", "")) for f in calls}
    sums = [n for n in nodes if isinstance(n, ast.BinOp | ast.Compare)]
    return bool(called - TRIVIAL) or any(map(names_in, sums))


def reads(key, known):
    """The names in `known` that a key's expression reads."""
    return names_in(ast.parse(expression(key), mode="eval")) & known.keys()


# --- Faults ---


def blank(match):
    return " " * len(match.group())


def faults_of_text(text, values):
    """A sentence for each number of a text that is not bound, or not to its value."""
    text = GENERATED.sub("", text)
    prose = re.sub(CODE, blank, text, flags=re.DOTALL)
    for match in BOUND.finditer(prose):
        key, shown = match["key"], match["shown"]
        if not shown:
            if not re.fullmatch(r"/?\w+", key):  # marks a block that is generated
                yield f"nothing to bind stands before <!-- {key} -->"
        elif re.search(r"[|`>]|--", key):
            yield f"<!-- {key} --> must not contain |, --, > or `: name the value"
        elif prose[: match.start()].rpartition("\n")[2].startswith("#"):
            yield f"<!-- {key} --> stands in a heading, where it would be read"
        elif key not in values:
            yield f"<!-- {key} --> has no value yet: make run"
        elif values[key] != shown:
            yield f"{shown!r} is said, {values[key]!r} is the value of <!-- {key} -->"
    bare = re.sub(UNREAD, " ", BOUND.sub("", prose), flags=re.DOTALL | re.MULTILINE)
    bare = re.sub(
        r"(?<=\d)(\{,\}|\\,)(?=\d{3})", ",", re.sub(NAMES, "", bare, flags=re.M)
    )
    for match in NUMBER.finditer(bare):
        plain = match["digits"]
        counted = plain.isdigit() and not match["unit"]
        if not counted or COUNTING < int(plain) < 1900 or int(plain) > 2100:
            place = " ".join(
                bare[max(0, match.start() - 50) : match.end() + 20].split()
            )
            yield f"{match.group()!r} is not bound, in {place!r}"


def faults(notebook, values):
    """A sentence for each fault of a chapter, with its cell.

    `values` holds those of the literature and of other chapters, see `known_values`.
    """
    above, names, links = [], {}, sources_of_literature()
    code = "".join(c.source for c in notebook.cells if c.cell_type == "code")
    code = "".join(code.split())
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            above.append(cell)
            names = computed(above)
        for what, text in texts(cell).items():
            for fault in faults_of_text(text, values | cell.metadata.get("bound", {})):
                yield f"cell {i}, {what}: {fault}"
            for span in re.findall(r"`([^`\n]+)`", text):
                number = re.search(r"\b\d\d|\d\.\d", span)
                if number and "".join(span.split()) not in code:
                    yield f"cell {i}, {what}: `{span}` stands in no code cell"
            for block in re.split(r"\n\s*\n", text):
                for key in filter(LITERATURE.match, keys(block)):
                    if links.get(key.partition(":")[0], "") not in block:
                        yield f"cell {i}: <!-- {key} --> needs its source's link beside"
        for key in local(cell):
            if not reads(key, names):
                yield f"cell {i}: <!-- {key} --> reads no name that a cell computed"


def known_values(notebooks):
    """Key -> value of all that a page may take from elsewhere."""
    values = dict(literature())
    for name, notebook in notebooks.items():
        for key, value in notebook.metadata.get("bound", {}).items():
            values[f"{name}: {key}"] = value
    return values
