"""What filters and methods make of the lengths that they are given. What is not listed here is Unbounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jinja2 import nodes
from prerope.server.api.chat.growth.length import NUMBER, Length, Unbounded
from prerope.server.api.requests.body import MAX_DEPTH

AS_TEXT = 5
"""Characters that one becomes where a value is written as HTML, JSON or Python has it: 1e15 as 1000000000000000.0."""

TEXTS = frozenset({"tojson", "trim", "string", "join", "replace", "lower", "upper", "escape", "e", "indent"})
"""Filters whose result is a text, and so is written as it is."""

SAME = frozenset(
    {
        *("trim", "lower", "upper", "capitalize", "title", "first", "last", "list", "safe", "items", "dictsort"),
        *("sort", "unique", "reverse", "select", "reject", "selectattr", "rejectattr"),
    }
)
"""Filters whose result is no longer than what they are given."""

NUMBERS = frozenset({"length", "count", "int", "float", "abs", "round"})
SAME_METHODS = frozenset(
    {
        *("strip", "lstrip", "rstrip", "lower", "upper", "capitalize", "title", "removeprefix", "removesuffix"),
        *("split", "rsplit", "splitlines", "partition", "rpartition", "get", "keys", "values", "items"),
    }
)
NUMBER_METHODS = frozenset({"startswith", "endswith", "find", "rfind", "count", "index", "isdigit", "isspace"})
LOOP_NUMBERS = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"})


def filtered(node: nodes.Filter, given: Length) -> Length:
    """given: what the filter is on. Its arguments count where its result has them in it."""
    name, arguments = node.name, [*node.args, *(one.value for one in node.kwargs)]
    if _gives_number(node):
        return NUMBER + given
    if name in SAME or (name == "map" and _maps_alike(node)):
        return given
    if name in ("string", "escape", "e", "forceescape"):
        return given * AS_TEXT
    if name == "replace":
        return replaced(given, arguments)
    if name == "join":
        return joined(given, arguments[0] if arguments else nodes.Const(""))
    if name == "indent":
        return given * (1 + whole(arguments[0] if arguments else nodes.Const(4)))
    if (
        name == "tojson"
        and not node.args
        and {one.key for one in node.kwargs} <= {"indent", "ensure_ascii", "sort_keys"}
    ):
        levels = next((whole(one.value) for one in node.kwargs if one.key == "indent"), 0)
        return given * (AS_TEXT + MAX_DEPTH * levels)
    raise Unbounded


def _gives_number(node: nodes.Filter) -> bool:
    """Some take what else to give, which may be a text."""
    return node.name in NUMBERS and not node.args and not node.kwargs


def _maps_alike(node: nodes.Filter) -> bool:
    """`map(attribute='x')`, or by the name of a filter that leaves texts as long."""
    if node.args:
        return len(node.args) == 1 and said(node.args[0]) in SAME | NUMBERS and not node.kwargs
    return all(one.key in ("attribute", "default") for one in node.kwargs)


def replaced(given: Length, arguments: Sequence[nodes.Node]) -> Length:
    """One text by another, both of which the template says."""
    if len(arguments) < 2 or not (old := said(arguments[0])):
        raise Unbounded
    return given * max(1.0, len(said(arguments[1])) / len(old))


def joined(given: Length, between: nodes.Node) -> Length:
    return given * (1 + len(said(between)))


def said(node: nodes.Node) -> str:
    """The text that the template itself has there."""
    if isinstance(node, nodes.Const) and isinstance(node.value, str):
        return node.value
    raise Unbounded


def whole(node: nodes.Node) -> int:
    """The number that the template itself has there; null is none."""
    if isinstance(node, nodes.Const) and (node.value is None or type(node.value) is int):
        return max(node.value or 0, 0)
    raise Unbounded


def is_number(node: nodes.Node) -> bool:
    """Whether what comes out of it is a number, or nothing does: a text is never multiplied by it or added to it."""
    match node:
        case nodes.Const(value=value):
            return isinstance(value, int | float)
        case nodes.Compare() | nodes.Not() | nodes.Test() | nodes.Neg() | nodes.Pos():
            return True
        case nodes.Sub() | nodes.Div() | nodes.FloorDiv():
            return True
        case nodes.Add(left=left, right=right):
            return is_number(left) or is_number(right)
        case nodes.Mul(left=left, right=right):
            return is_number(left) and is_number(right)
        case nodes.Mod(left=left):
            return is_number(left)
        case nodes.Filter():
            return _gives_number(node)
        case nodes.Getattr(node=nodes.Name(name="loop"), attr=attribute):
            return attribute in LOOP_NUMBERS
    return False


def dated(shape: nodes.Node) -> Length:
    """Today, written so; a digit is a width, of any size."""
    if any(map(str.isdigit, said(shape))):
        raise Unbounded
    return NUMBER * len(said(shape))


def counted(node: nodes.Node) -> Length:
    """An end of a range, and so how many numbers it has at most: said, or as large as something is long."""
    match node:
        case nodes.Const():
            return Length(whole(node))
        case nodes.Neg(node=nodes.Const()):
            return Length()
        case nodes.Filter(name="length" | "count") | nodes.Getattr(node=nodes.Name(name="loop")):
            return Length(0.0, (1.0,))
        case nodes.Add(left=left, right=right) | nodes.Sub(left=left, right=right):
            return counted(left) + counted(right)
    raise Unbounded


def is_text(node: nodes.Node) -> bool:
    """Whether what comes out of it is a text."""
    match node:
        case nodes.Const(value=value):
            return isinstance(value, str)
        case nodes.Filter(name=name):
            return name in TEXTS
    return isinstance(node, nodes.Concat)


def names_of(target: nodes.Node) -> Iterator[str]:
    """The names that an assignment or a loop sets."""
    match target:
        case nodes.Name(name=name):
            yield name
        case nodes.Tuple(items=items):
            for item in items:
                yield from names_of(item)
        case _:
            raise Unbounded


def what_is_added(target: nodes.NSRef, value: nodes.Node) -> nodes.Node | None:
    """`b` of `{% set ns.a = ns.a + b %}`; None where it is something else that is set."""

    def is_target(node: nodes.Node) -> bool:
        return (
            isinstance(node, nodes.Getattr)
            and node.attr == target.attr
            and isinstance(node.node, nodes.Name)
            and node.node.name == target.name
        )

    if isinstance(value, nodes.Concat) and is_target(value.nodes[0]):
        return nodes.Concat(value.nodes[1:])
    if not isinstance(value, nodes.Add):
        return None
    if is_target(value.left):
        return value.right
    rest = what_is_added(target, value.left)
    return None if rest is None else nodes.Add(rest, value.right)
