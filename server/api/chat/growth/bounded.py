"""Whether a chat template may only make texts of bounded length: asked of the template, which is read and never run."""

from __future__ import annotations

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from prerope.server.api.chat.growth.bounds import Bounds
from prerope.server.api.chat.growth.length import Unbounded


class Generation(Extension):
    """`{% generation %}`, which transformers knows: what the model says stands in it."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def is_bounded(template: str, request: int, most: int) -> bool:
    """Whether no text that it makes of a request of so many bytes, on the way or in the end, has more characters."""
    try:
        tree = Environment(extensions=[Generation, loopcontrols], autoescape=True).parse(template)  # only read
        Bounds(float(most), [float(request)]).of_template(tree)
    except (Unbounded, TemplateError, RecursionError, ValueError):  # a number of thousands of digits
        return False
    return True
