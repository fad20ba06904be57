"""A JSON schema as a whole: its subschemas, what its references name, and what stands where exactness matters.

Most rewriting allows less than the client's schema does. Under `oneOf` less is more: a value that the client finds in
two branches, and we in one of them, would be let through. So what a `oneOf` can reach is only said in other words that
mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from prerope.server.structured.numbers import check_multiples
from prerope.server.structured.values import Unenforceable

Schema = dict[str, Any]

ONE = frozenset(
    {
        *("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then"),
        *("unevaluatedItems", "unevaluatedProperties"),
    }
)
"""Keywords that hold a schema."""
LISTS = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
MAPS = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})

VALUES = frozenset({"const", "default", "enum", "examples"})
"""Keywords that hold no schema whatever a reference says."""

BRANCHES = frozenset({"$ref", "anyOf", "oneOf"})
APPLICATORS = frozenset(
    {
        *("$dynamicRef", "$recursiveRef", "$ref", "allOf", "anyOf", "dependencies", "dependentSchemas", "if", "not"),
        "oneOf",
    }
)
"""Keywords whose subschemas see the same value."""

REMARKS = frozenset(
    {
        *("$comment", "$id", "$schema", "default", "deprecated", "description", "discriminator", "examples"),
        *("readOnly", "title", "writeOnly"),
    }
)
"""Keywords that ask for nothing."""


class Document:
    """One schema of a client's, read only.

    Attributes:
        ids: of all its schemas, those that keywords hold and those that references name, wherever they stand.
        has_one_writing: each value must have one text, without characters by their number: an object has names of its
            own and room for others, or values must differ.
        is_met: several schemas look at one value somewhere.
        one_of_is_named: a reference may lead through a `oneOf`, which has to stay where it is.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        held = [] if not isinstance(root, dict) else list(_held([root]))
        self._has_ids = any("$id" in one or "id" in one for one in held if one is not root)
        nodes, all_known = self._reached([root])
        self.one_of_is_named = not all_known or any("oneOf" in unquote(str(one.get("$ref"))) for one in nodes)
        self._check_loops(nodes)
        self._named = {id(self.referenced(one["$ref"])) for one in nodes if "$ref" in one} if all_known else None
        self.ids = {id(one) for one in nodes}
        self.has_one_writing = any(_names_are_open(one) or _differ(one) for one in nodes)
        self.is_met = any(map(_is_met, nodes))
        exact, are_all = self._reached([one for node in nodes for one in _list(node, "oneOf")])
        self._exact = {id(one) for one in exact} if are_all else None
        multiples = [one["multipleOf"] for one in nodes if "multipleOf" in one]
        check_multiples(multiples, met=self.is_met)

    def is_exact(self, schema: Schema) -> bool:
        """Whether a `oneOf` reaches it."""
        return self._exact is None or id(schema) in self._exact

    def is_named(self, schema: Any) -> bool:
        """Whether a reference may lead to just this schema."""
        return self._named is None or id(schema) in self._named

    def referenced(self, pointer: Any) -> Any:
        """What a reference names; None for anything but a path into this document."""
        return None if self._has_ids else pointed(self.root, pointer)

    def _check_loops(self, nodes: list[Schema]) -> None:
        """Unenforceable where references lead from one to the next and back, so that nothing says what a value is."""
        ended = set[int]()
        for begin in nodes:
            node, path = begin, set[int]()
            while isinstance(node, dict) and "$ref" in node and id(node) not in ended:
                if id(node) in path:
                    raise Unenforceable("a '$ref' leads back to itself by others: one on the way must say what it is")
                path.add(id(node))
                node = self.referenced(node["$ref"])
            ended |= path

    def _reached(self, begin: list[Any]) -> tuple[list[Schema], bool]:
        """What these schemas reach by holding it or by reference, and whether that is all: it may be anything."""
        seen: dict[int, Schema] = {}
        left, are_all = [one for one in begin if isinstance(one, dict)], True
        while left:
            node = left.pop()
            if id(node) in seen:
                continue
            seen[id(node)] = node
            left += subschemas(node)
            if "$ref" in node:
                target = self.referenced(node["$ref"])
                if target is None:
                    are_all = False
                    _check_place(node["$ref"])
                left += [target] if isinstance(target, dict) else []
        return list(seen.values()), are_all


def pointed(root: Any, pointer: Any) -> Any:
    """What `#/…` names in a document; None for anything else."""
    if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
        return None
    found = root
    for part in pointer[2:].split("/") if pointer != "#" else ():
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and len(name) < 10 and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return None
    return found


def subschemas(schema: Schema) -> Iterator[Schema]:
    """The schemas that one holds, those that are objects."""
    for key, value in schema.items():
        if isinstance(value, dict):
            held = value.values() if key in MAPS else [value] if key in ONE else ()
        else:
            held = value if isinstance(value, list) and key in LISTS else ()
        yield from (one for one in held if isinstance(one, dict))


def _held(left: list[Schema]) -> Iterator[Schema]:
    while left:
        node = left.pop()
        yield node
        left += subschemas(node)


def _check_place(reference: Any) -> None:
    """Unenforceable for a reference that is not followed here, to where no keyword holds a schema: llguidance does."""
    _, at, pointer = reference.partition("#/") if isinstance(reference, str) else ("", "", "")
    steps = iter(pointer.split("/") if at else ())
    for step in steps:
        if step in MAPS or step in LISTS - ONE:
            next(steps, None)
        elif step not in ONE:
            raise Unenforceable("a '$ref' names what is no schema: put that into '$defs', and name it by '#/$defs/…'")


def _list(schema: Schema, key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _names_are_open(schema: Schema) -> bool:
    """Whether an object has names of its own and room for others beside them."""
    named = schema.get("properties") or schema.get("patternProperties") or schema.get("required")
    return bool(named) and schema.get("additionalProperties", True) is not False


def _differ(schema: Schema) -> bool:
    """Whether items or names may have to differ."""
    return schema.get("uniqueItems") is True or schema.get("minProperties", 0) not in (0, 1)


def _is_met(schema: Schema) -> bool:
    """Whether several schemas here look at one value."""
    if "allOf" in schema or "patternProperties" in schema:
        return True
    return not BRANCHES.isdisjoint(schema) and len(schema.keys() - REMARKS - {"$defs", "definitions"}) > 1
