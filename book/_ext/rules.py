"""`{rules-to-keep}`: the rules of all chapters, as the recipe page lists them."""

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from tools.kit import register, rules


class RulesToKeep(SphinxDirective):
    def run(self):
        for chapter in register.chapters():
            self.env.note_dependency(str(chapter.path))
        lines = []
        for question, group in rules.grouped().items():
            also = any(question == rule.chapter for rule in group)
            lines += [f"**{'Also, from ' * also}{question}**", ""]
            for rule in group:
                place = dict.fromkeys((rule.chapter, rule.section))  # one, if equal
                place = f"[{': '.join(place)}]({rule.link})"
                lines.append(f"- {rule.text} {place}")
            lines.append("")
        home = nodes.container(classes=["rules"])
        self.state.nested_parse(StringList(lines, "rules"), 0, home)
        return [home]


def setup(app):
    app.add_directive("rules-to-keep", RulesToKeep)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
