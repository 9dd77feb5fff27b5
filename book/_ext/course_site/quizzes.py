"""Quizzes: a chapter's questions stand in a file, the page makes fields of them.

The file is plain Markdown, so that whoever works in JupyterLab reads the same questions there: a
heading, the question, and a list of answers with a box for each, ticked where the answer is
right; what is indented below an answer says why. In the page every answer's reason stands in a
box that is closed. A script (book/_static/quiz.js) shows the reason of the answer that was chosen;
without scripts, and on paper, the box is what there is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

FOLDER = Path(__file__).parents[2] / "_quizzes"
ANSWER = re.compile(
    r"^- \[(?P<tick>[ x])\] (?P<text>.*(?:\n  \S.*)*)\n\n"
    r"(?P<why>(?:  .*\n|\n)+)",
    flags=re.M,
)


class Answer(NamedTuple):
    """What a reader may choose, and what is to be said about it."""

    text: str
    right: bool
    why: str


class Question(NamedTuple):
    """A title, what is asked, and its answers."""

    title: str
    text: str
    answers: list[Answer]


def read(text: str) -> list[Question]:
    """Return the questions of a file."""
    questions = []
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        title, _, body = part.rstrip("\n").partition("\n")
        body = f"{body}\n\n"
        answers = [
            Answer(
                dedented(found["text"]),
                found["tick"] == "x",
                dedented(found["why"]),
            )
            for found in ANSWER.finditer(body)
        ]
        asked = re.split(r"^- \[", body, maxsplit=1, flags=re.M)[0].strip()
        if (
            len(answers) != len(re.findall(r"^- \[", body, flags=re.M))
            or sum(answer.right for answer in answers) != 1
        ):
            raise ValueError(
                f"{title!r}: every answer needs its reason below it, and one answer is right"
            )
        questions.append(Question(title.strip(), asked, answers))
    return questions


def dedented(text: str) -> str:
    return re.sub(r"^  ", "", text.strip("\n"), flags=re.M).strip()


class element(nodes.General, nodes.Element):
    """An element of HTML, by its tag and its attributes."""


def tag(name: str, /, *children: nodes.Node, **attributes: str) -> element:
    """Return an element; "class_" stands for what Python keeps for itself."""
    made = element("", *children)
    made["tag"] = name
    made["html"] = {k.rstrip("_"): v for k, v in attributes.items()}
    return made


class Quiz(SphinxDirective):
    """The questions of a chapter; what the directive holds is shown where no page is built."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        file = FOLDER / f"{name}.md"
        self.env.note_dependency(str(file))
        if not file.exists():
            raise ExtensionError(f"there is no {file} for this quiz")
        questions = read(file.read_text())
        fields = [
            self.field(question, f"quiz-{name}-{number}", number)
            for number, question in enumerate(questions, start=1)
        ]
        return [tag("div", *fields, class_="quiz")]

    def parsed(self, text: str) -> list[nodes.Node]:
        """Return Markdown as nodes."""
        holder = nodes.container()
        self.state.nested_parse(
            StringList(text.splitlines(), source=""), 0, holder
        )
        return holder.children

    def inline(self, text: str) -> list[nodes.Node]:
        """Return one paragraph without its frame."""
        (paragraph,) = self.parsed(text)
        return paragraph.children

    def field(self, question: Question, name: str, number: int) -> element:
        legend, *rest = question.text.split("\n\n", maxsplit=1)
        title = tag("strong", nodes.Text(f"{number} · {question.title}"))
        choices, reasons = [], []
        for letter, answer in zip("ABCDEF", question.answers, strict=False):
            choices.append(
                tag(
                    "label",
                    tag("input", type="radio", name=name, value=letter),
                    tag("b", nodes.Text(letter), class_="quiz-letter"),
                    tag("span", *self.inline(answer.text)),
                )
            )
            verdict = "right" if answer.right else "not quite"
            reasons.append(
                tag(
                    "div",
                    tag("b", nodes.Text(f"{letter} · {verdict}")),
                    *self.parsed(answer.why),
                    class_="quiz-why",
                    data_answer=letter,
                    data_right=str(answer.right).lower(),
                )
            )
        return tag(
            "fieldset",
            tag("legend", title),
            nodes.paragraph("", "", *self.inline(legend)),
            *(self.parsed(rest[0]) if rest else []),
            tag("div", *choices, class_="quiz-choices"),
            tag(
                "details",
                tag("summary", nodes.Text("Answers")),
                *reasons,
                class_="quiz-answers",
            ),
        )


def visit_element(self: HTML5Translator, node: element) -> None:
    attributes = "".join(
        f' {key.replace("_", "-")}="{self.attval(value)}"'
        for key, value in node["html"].items()
    )
    self.body.append(f"<{node['tag']}{attributes}>")


def depart_element(self: HTML5Translator, node: element) -> None:
    if node["tag"] != "input":
        self.body.append(f"</{node['tag']}>\n")


def setup(app: Sphinx) -> None:
    app.add_node(element, html=(visit_element, depart_element))
    app.add_directive("quiz", Quiz)
