"""The pages one acts on: the recipe, the rules collected on it, the questions."""

import random
import re

import pytest

from lora.memory import MLP, SHAPES, Shape, training_memory
from tools.kit import rules
from tools.kit.bound import BOUND
from tools.kit.ledger import sections
from tools.kit.notebooks import PLAIN
from tools.kit.register import BOOK, ROOT, executed, notebooks

QUESTIONS = (BOOK / "questions.md").read_text()
LINK = re.compile(r"\[([^\]]+)\]\(([\w-]+\.ipynb)#([^)]+)\)")
SECTIONS = {f"{name}.ipynb": sections(book) for name, book in executed().items()}


def answers(text):
    """Question -> its answer, of the page's source."""
    parts = re.split(r"^#{2,3} (.+)\n", text, flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {question: answer for question, answer in pairs if answer.strip()}


ASKED = answers(QUESTIONS.partition("## Not answered here")[0])


def stems(text):
    """Beginnings of words, by which "layers" is "layer" and "merging" is "merge"."""
    return {word[:5].rstrip("s") for word in re.findall(r"[^\W_]+", text.lower())}


def faults(answer, known):
    """A sentence for each link that lands where nothing of the answer is."""

    def holds(text, number):
        return re.search(rf"(?<![\w.,]){re.escape(number)}(?!\w|[.,]\d)", text)

    links = LINK.findall(answer)
    numbers = {m["shown"] for m in BOUND.finditer(answer) if m["shown"]}
    places = {}
    for label, page, anchor in links:
        if anchor not in known.get(page, {}):
            yield f"no section {page}#{anchor}"
            continue
        places[page, anchor] = there = PLAIN.sub("", "\n".join(known[page][anchor]))
        said = {word for word in stems(label) if len(word) > 2} & stems(there)
        if not said and not any(holds(there, number) for number in numbers):
            yield f"{page}#{anchor} has neither a number of the answer nor {label!r}"
    for number in numbers:
        reported = "peft1836" in answer or any(
            holds(t, number) for t in places.values()
        )
        if not reported:
            yield f"{number} stands in no section that is linked"


@pytest.mark.parametrize("question", ASKED)
def test_an_answer_is_short_and_leads_to_what_shows_it(question):
    answer = ASKED[question]
    assert LINK.search(answer), "no link to a section"
    assert not list(faults(answer, SECTIONS))
    said = PLAIN.sub("", re.sub(r"\]\([^)]*\)", "]", answer))
    assert len(said.split()) < 60, "an answer is a sentence or two"


def test_answers_that_lead_nowhere():
    answer = ASKED["May I merge in bfloat16?"]
    for old, new, fault in (
        ("#merging-in-bfloat16", "#merging-in-float8", "no section"),
        ("#merging-in-bfloat16", "#tied-weights", "has neither a number"),
        ("83%", "84%", "stands in no section"),
    ):
        assert old in answer
        assert fault in "".join(faults(answer.replace(old, new), SECTIONS))
    link = "[merging](02-implementation.ipynb#activations)"
    assert "has neither" in "".join(faults(link, SECTIONS))


def test_questions_are_many_and_some_have_no_answer():
    assert len(ASKED) >= 60
    open_ones = re.findall(r"^- \*\*.+\?\*\* \w", QUESTIONS, re.MULTILINE)
    assert len(open_ones) >= 5


SEARCHES = (ROOT / "tests/book/searches.csv").read_text().splitlines()[1:]
STOP = stems("a an and are can do does for how i in is it many much my of on or the to")


@pytest.mark.parametrize("query", [line.split(",")[0] for line in SEARCHES])
def test_what_people_type_is_asked_or_answered(query):
    wanted = stems(query) - STOP
    pages = [stems(question + " " + answer) for question, answer in ASKED.items()]
    assert any(wanted <= page for page in pages), f"no question about {query!r}"


# The rules --------------------------------------------------------------------------


def test_every_rule_of_every_chapter_is_on_the_recipe_once(soup):
    listed = soup["book/recipe.html"].select(".rules li")
    written = [
        (name, rule)
        for name, book in notebooks().items()
        for cell in book.cells
        if cell.cell_type == "markdown"
        for rule in re.findall(r"^> \*\*Rule to keep\.\*\* (.+)$", cell.source, re.M)
    ]
    assert len(listed) == len(written) == len(rules.rules()) > 20
    shown = {}
    for item in listed:
        place = item.find_all("a")[-1]
        shown[stem(item.get_text())] = place["href"].split(".html#")
    for name, rule in written:
        text = stem(PLAIN.sub("", rule))
        found_at = [at for said, at in shown.items() if said.startswith(text)]
        (found,) = [at for at in found_at if at[0] == name]
        section = soup[f"book/{name}.html"].find(id=found[1])
        assert text in stem(section.get_text()), f"{rule}: not in {found[1]}"


def stem(text):
    """Letters and digits of a text without its formulas."""
    text = re.sub(r"\$[^$]*\$|\\\(.*?\\\)|\]\([^)]*\)", "", text)
    return re.sub(r"\W", "", text)


def test_a_rule_stands_under_the_decision_that_links_to_its_section():
    groups = rules.grouped()
    where = {
        rule.link: question for question, rules in groups.items() for rule in rules
    }
    layers = "04-a-pretrained-model.ipynb#which-layers-all-or-at-least-the-mlp"
    assert where[layers] == "3. Which layers?"
    assert sum(len(group) for group in groups.values()) == len(rules.rules())
    asked = list(rules.questions())
    places = [asked.index(g) if g in asked else len(asked) for g in groups]
    assert places == sorted(places), "those that no decision links to come last"


def test_the_code_of_the_recipe_is_that_which_ran():
    """Block by block; three need what the notebook has not: a hub, your own pairs."""
    text = (BOOK / "recipe.md").read_text()
    cells = "\n\n\n".join(cell.source for cell in executed()["recipe-run"].cells)
    plain = re.sub(r" +# .*", "", cells)
    blocks = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    ran = [re.sub(r" +# .*", "", block) in plain for block in blocks]
    assert ran.count(True) >= 4
    elsewhere = [block for block, found in zip(blocks, ran, strict=True) if not found]
    needs = "from_pretrained", "(*pair)", "merge_and_unload"
    for block, words in zip(elsewhere, needs, strict=True):
        assert words in block


# The calculator of memory ------------------------------------------------------------


def test_the_calculator_and_chapter_6_say_the_same():
    """But for the logits, which the chapter leaves out and counts in a note."""
    bound = {}
    for cell in notebooks()["06-a-four-bit-base"].cells:
        bound |= cell.metadata.get("bound", {})
    said = [re.match(r'total\["(\w+), (\w+)"\]:\.1f', key) for key in bound]
    said = [match for match in said if match]
    assert len(said) >= 5
    for match in said:
        bits = {"NF4": 4.127, "bfloat16": 16}[match[2]]
        items = training_memory(SHAPES[match[1]], 2048, bits=bits)
        total = sum(items.values()) - items["logits"]
        assert float(bound[match[0]]) == pytest.approx(total / 1e9, abs=0.06), match[0]


def settings():
    """A hundred cases as the page has them, and what the package counts for each."""
    draw = random.Random(0).choice
    parts = [["attention"], ["MLP"], ["attention", "MLP"]]
    for _ in range(100):
        kind, tables = draw([*MLP]), draw([1, 2])
        sizes = draw([2, 80]), draw([64, 8192]), draw([64, 1024]), draw([256, 28672])
        shape = Shape(*sizes, draw([50, 128_256]), kind, tables)
        options = {
            "tokens": draw([1, 5000]),
            "rank": draw([1, 64]),
            "on": draw(parts),
            "bits": draw([4.127, 16, 32]),
            "itemsize": draw([2, 4]),
            "checkpoint": draw([True, False]),
            "cast": draw([True, False]),
        }
        yield shape._asdict() | options, training_memory(shape, **options)


def test_the_calculator_counts_as_the_package(page, site):
    page.goto(f"{site}book/recipe.html")
    play = page.locator(".memory-play")
    cases, wanted = zip(*settings(), strict=True)
    found = play.evaluate("(play, all) => all.map(play.memory)", cases)
    for case, said, counted in zip(cases, found, wanted, strict=True):
        assert said == pytest.approx(counted), case

    def field(name):
        return play.locator(f"form [name={name}]")

    field("model").select_option("70B")
    field("on").select_option("attention")
    field("batch").fill("2")
    field("checkpoint").uncheck()
    items = training_memory(
        SHAPES["70B"], 4096, 16, ("attention",), 4.127, checkpoint=False
    )
    for name, size in [*items.items(), ("sum", sum(items.values()))]:
        text = play.locator(f"td[data-size='{name}']").inner_text()
        assert float(text) == pytest.approx(size / 1e9, abs=0.06), name
    said = play.locator("output").inner_text()
    assert "No single card" in said and "first turn checkpointing on" in said

    assert not field("width").is_visible()
    field("model").select_option("own")
    field("width").fill("64")
    base = training_memory(SHAPES["7B"]._replace(width=64), 1, bits=4.127)["base"]
    text = play.locator("td[data-size='base']").inner_text()
    assert float(text) == pytest.approx(base / 1e9, abs=0.006)


@pytest.mark.parametrize("name", ["recipe", "06-a-four-bit-base"])
def test_without_scripts_the_calculator_shows_an_example(new_context, site, name):
    page = new_context(java_script_enabled=False).new_page()
    page.goto(f"{site}book/{name}.html")
    play = page.locator(".memory-play")
    assert not play.locator("form").is_visible()
    total = sum(training_memory(SHAPES["7B"], 2048, bits=4.127).values()) / 1e9
    assert f"{total:.1f} GB" in play.locator("output").inner_text()
    assert play.locator(".memory-bar span").count() == 6
