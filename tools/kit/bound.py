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
ELSEWHERE = re.compile(r"(\d\d-[\w-]+): (.*)")
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
# Calls that compute nothing of their own: what they are given must be computed.
TRIVIAL = {"dict", "enumerate", "float", "int", "items", "keys", "len", "list", "max"}
TRIVIAL |= {"min", "range", "round", "set", "sorted", "str", "sum", "tuple", "values"}
TRIVIAL |= {"reversed", "zip"}


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


def evaluate(client, wanted, raw=()):
    """Key -> the text that it shows, and raw expression -> value, in a live kernel."""
    asked = {key: expression(key) for key in wanted} | {code: code for code in raw}

    async def ask():
        code = {str(i): e for i, e in enumerate(asked.values())}
        sent = client.execute("", silent=True, user_expressions=code)
        while True:
            reply = client.get_shell_msg(timeout=600)
            reply = await reply if inspect.isawaitable(reply) else reply
            if reply["parent_header"].get("msg_id") == sent:
                return reply["content"]["user_expressions"]

    values = {}
    for key, answer in zip(asked, asyncio.run(ask()).values()) if asked else ():
        if answer["status"] == "error":
            raise ValueError(f"{key}: {answer['ename']}: {answer['evalue']}")
        values[key] = ast.literal_eval(answer["data"]["text/plain"])
        if key in wanted and re.match(r"-\d", values[key]):
            values[key] = "−" + values[key][1:]
    return values


# --- Where keys stand ---


def texts(cell):
    """Name -> text with keys: the source of prose, caption and alt of a code cell."""
    if cell.cell_type == "markdown":
        return {"source": cell.source}
    return {k: v for k, v in cell.metadata.get("book", {}).items() if k != "name"}


def local(cell):
    """Keys of a cell that its own chapter evaluates after the code cell above."""
    found = [key for text in texts(cell).values() for key in keys(text)]
    return [k for k in found if not ELSEWHERE.match(k) and not LITERATURE.match(k)]


def outside():
    """The texts that stand in no notebook: path -> text."""
    files = [ROOT / f"{page}.md" for page in pages()]
    return {f: f.read_text() for f in [*files, ROOT / "README.md"] if f.exists()}


def exported(name, notebooks):
    """Expressions that pages, other chapters and headlines take from a chapter."""
    everything = [*outside().values()]
    for notebook in notebooks.values():
        everything += [t for cell in notebook.cells for t in texts(cell).values()]
    found = (ELSEWHERE.match(key) for text in everything for key in keys(text))
    wanted = {match[2]: None for match in found if match and match[1] == name}
    for cell in notebooks[name].cells:
        wanted |= dict.fromkeys(
            cell.metadata.get("headline", {}).get("book", {}).values()
        )
    return list(wanted)


def literature():
    """Key -> figure of each entry of `references.md`."""
    text = (BOOK / "references.md").read_text()
    return {
        m["key"]: m["shown"] for m in BOUND.finditer(text) if LITERATURE.match(m["key"])
    }


def sources_of_literature():
    """Entry of the bibliography -> address of its link in `references.md`."""
    found = {}
    for block in re.split(r"\n(?=- |\n)", (BOOK / "references.md").read_text()):
        for key in keys(block):
            link = re.search(r"\]\(([^)]+)\)", block)[1]
            found[key.partition(":")[0]] = link
    return found


# --- What a cell computes ---


def computed(cells):
    """Name -> tolerance, of each name that the code cells compute, in order.

    Literals, containers and arithmetic of literals, and other names for them are not
    computed. The tolerance is that of the cells behind the value, 0 where it is exact.
    """
    known = {}

    def worth(value, here):
        """The largest tolerance behind a value, None if nothing in it is computed."""
        nodes = list(ast.walk(value))
        read = {n.id for n in nodes if isinstance(n, ast.Name)}
        calls = [n.func for n in nodes if isinstance(n, ast.Call)]
        called = {getattr(f, "attr", getattr(f, "id", "")) for f in calls}
        sums = (n for n in nodes if isinstance(n, ast.BinOp | ast.Compare))
        sums = any(isinstance(m, ast.Name) for n in sums for m in ast.walk(n))
        if called - TRIVIAL or sums or read & known.keys():
            return max([here, *(known[name] for name in read & known.keys())])
        return None

    def assign(target, value, here):
        parts, values = getattr(target, "elts", ()), getattr(value, "elts", ())
        for i, part in enumerate(parts):
            assign(part, values[i] if len(values) == len(parts) else value, here)
        root = target
        while isinstance(root, ast.Attribute | ast.Subscript | ast.Starred):
            root = root.value
        if isinstance(root, ast.Name):
            found = worth(value, here)
            if found is not None:
                known[root.id] = max(found, known.get(root.id, 0))
            elif root is target:
                known.pop(root.id, None)

    for cell in cells:
        here = cell.metadata.get("tolerance", {}).get("absolute", 0)
        code = re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.MULTILINE)
        functions = ast.FunctionDef | ast.ClassDef
        body = [s for s in ast.parse(code).body if not isinstance(s, functions)]
        statements = [
            node for s in body for node in ast.walk(s) if hasattr(node, "lineno")
        ]
        for node in sorted(statements, key=lambda n: n.lineno):
            match node:
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        assign(target, value, here)
                case ast.AugAssign(target=target, op=op, value=value):
                    assign(target, ast.BinOp(target, op, value), here)
                case ast.For(target=target, iter=value):
                    assign(target, value, here)
                case ast.With(items=items):
                    for item in items:
                        assign(item.optional_vars, item.context_expr, here)
                case ast.Expr(ast.Call(func=ast.Attribute(value=target), args=[value])):
                    assign(ast.Starred(target), value, here)  # rows.append(value)
    return known


def reads(key, known):
    """The names in `known` that a key's expression reads."""
    tree = ast.walk(ast.parse(expression(key), mode="eval"))
    return {n.id for n in tree if isinstance(n, ast.Name)} & known.keys()


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
