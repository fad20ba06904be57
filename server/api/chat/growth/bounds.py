"""A bound on all that a chat template writes, or makes on the way, found by going through its statements.

Each variable has a length; a loop is gone through once, with an element of any length; of an alternative the longer
counts. What a namespace holds outlives the loop that sets it, so a template is gone through again until that stays the
same: what grows from itself has no bound. Nor has what is not listed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import nodes
from prerope.server.api.chat.growth import rules
from prerope.server.api.chat.growth.length import NUMBER, REQUEST, Length, Unbounded

MOST_PASSES = 4
MOST_EXPANSIONS = 1000
"""Of macros, one within another."""


@dataclass(slots=True)
class Bounds:
    """The bounds of one template.

    Attributes:
        limit: no value may be longer.
        levels: the most that the request is long, and what each loop around is at.
        loops: the lengths of what these loops go through.
        names: variables. Those that nobody set are of the request.
        running, loops_outside: macros that are being written, and the loops around the call of the innermost.
        held: attributes of namespaces, whichever they are of, as the last pass found them.
        found, added: the same in this pass: what they were set to, and what was added to it.
    """

    limit: float
    levels: list[float]
    loops: list[Length] = field(default_factory=list)
    names: dict[str, Length] = field(default_factory=dict)
    held: dict[str, Length] = field(default_factory=dict)
    found: dict[str, Length] = field(default_factory=dict)
    added: dict[str, Length] = field(default_factory=dict)
    namespaces: set[str] = field(default_factory=set)
    macros: dict[str, nodes.Macro] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    loops_outside: int = 0
    num_expansions: int = 0

    def of_template(self, template: nodes.Template) -> None:
        """Raises Unbounded."""
        for _ in range(MOST_PASSES):
            self.names, self.found, self.added = {}, {}, {}
            self._checked(self._body(template.body))
            now = {
                name: self._checked(self.found.get(name, Length()) + self.added.get(name, Length()))
                for name in (*self.found, *self.added)
            }
            if now == self.held:
                return
            self.held = now
        raise Unbounded

    def _most(self, length: Length) -> float:
        return length.most(self.levels)

    def _checked(self, length: Length) -> Length:
        if self._most(length) > self.limit:
            raise Unbounded
        return length

    # --- statements: what they write ---

    def _body(self, body: Sequence[nodes.Node]) -> Length:
        return sum(map(self._written, body), Length())

    def _written(self, node: nodes.Node) -> Length:
        match node:
            case nodes.Output(nodes=parts):
                return sum(map(self._as_text, parts), Length())
            case nodes.If(test=test, body=body, elif_=others, else_=otherwise):
                self._value(test)
                return self._either(body, *([one] for one in others), otherwise)
            case nodes.For(recursive=False):
                return self._loop(node)
            case nodes.Assign(target=target, node=value):
                self._assign(target, value)
                return Length()
            case nodes.AssignBlock(target=target, filter=None, body=body):
                self._set(target, self._body(body))
                return Length()
            case nodes.Macro(name=name):
                if self.macros.setdefault(name, node) is not node:
                    raise Unbounded  # of two which one is called
                return Length()
            case nodes.Break() | nodes.Continue():
                return Length()
        raise Unbounded

    def _as_text(self, part: nodes.Node) -> Length:
        if isinstance(part, nodes.TemplateData):
            return Length(len(part.data))
        return self._value(part) * (1 if rules.is_text(part) else rules.AS_TEXT)

    def _either(self, *bodies: Sequence[nodes.Node]) -> Length:
        """One of them runs, or none, and sets what it sets."""
        before, after, written = self.names, dict(self.names), Length()
        for body in bodies:
            self.names = dict(before)
            written |= self._body(body)
            after |= {name: now | after.get(name, REQUEST) for name, now in self.names.items()}
        self.names = after
        return written

    def _loop(self, loop: nodes.For) -> Length:
        through, before = self._value(loop.iter), dict(self.names)
        self.loops.append(through)
        self.levels.append(self._most(through))
        element = Length(0.0, (*[0.0] * len(self.loops), 1.0))
        for name in rules.names_of(loop.target):
            self._name(name, element)
        if loop.test is not None:
            self._value(loop.test)
        written = self._body(loop.body).over(through, self.levels)
        self.loops.pop()
        self.levels.pop()
        self.names = before
        return written | self._either(loop.else_)

    # --- names ---

    def _assign(self, target: nodes.Node, value: nodes.Node) -> None:
        match target, value:
            case nodes.Name(name=name), nodes.Call(node=nodes.Name(name="namespace"), args=[], dyn_args=None) if (
                value.dyn_kwargs is None
            ):
                self.namespaces.add(name)
                for one in value.kwargs:
                    self._hold(one.key, self._value(one.value))
            case nodes.NSRef(attr=attribute), _ if (more := rules.what_is_added(target, value)) is not None:
                if rules.is_number(more):  # which grows by no digit that matters
                    self._hold(attribute, NUMBER + self._value(more))
                else:
                    self._add(attribute, self._as_text(more) if isinstance(more, nodes.Concat) else self._value(more))
            case _:
                self._set(target, self._value(value))

    def _set(self, target: nodes.Node, length: Length) -> None:
        if isinstance(target, nodes.NSRef):
            self._hold(target.attr, length)
            return
        for name in rules.names_of(target):
            self._name(name, self._checked(length))

    def _name(self, name: str, length: Length) -> None:
        """In a loop or a macro a name may be another one than outside, which a macro that is called there still has."""
        if name == "loop":
            raise Unbounded
        inside = self.loops or self.running
        self.names[name] = length | self.names.get(name, Length()) if inside else length

    def _hold(self, attribute: str, length: Length) -> None:
        """Whatever the loops around are at by now: it stays when they have gone on."""
        outside = Length(self._most(length)) if self.loops else length
        self.found[attribute] = self.found.get(attribute, Length()) | outside

    def _add(self, attribute: str, length: Length) -> None:
        """To what a namespace holds already, in every turn of the loops around."""
        for depth in range(len(self.loops), 0, -1):
            length = length.over(self.loops[depth - 1], self.levels[: depth + 1])
        self.added[attribute] = self.added.get(attribute, Length()) + length

    # --- values: how long they are ---

    def _value(self, node: nodes.Node) -> Length:
        return self._checked(self._expression(node))

    def _expression(self, node: nodes.Node) -> Length:
        match node:
            case nodes.Const(value=value):
                return Length(float(len(str(value))))
            case nodes.TemplateData(data=data):
                return Length(float(len(data)))
            case nodes.Name(name=name):
                if name in self.namespaces or name in self.macros or name == "loop":
                    raise Unbounded  # as a value of its own
                return self.names.get(name, REQUEST)
            case nodes.List(items=items) | nodes.Tuple(items=items):
                return sum((self._value(one) + Length(1.0) for one in items), Length(2.0))
            case nodes.Dict(items=pairs):
                return sum((self._value(one.key) + self._value(one.value) for one in pairs), Length(2.0))
            case nodes.CondExpr(test=test, expr1=one, expr2=other):
                self._value(test)
                return self._value(one) | (self._value(other) if other is not None else Length())
            case nodes.And(left=left, right=right) | nodes.Or(left=left, right=right):
                return self._value(left) | self._value(right)
            case nodes.Concat(nodes=parts):
                return sum(map(self._as_text, parts), Length())
            case nodes.Getattr() | nodes.Getitem():
                return self._part(node)
            case nodes.Filter(dyn_args=None, dyn_kwargs=None):
                return self._filtered(node)
            case nodes.Call(dyn_args=None, dyn_kwargs=None):
                return self._called(node)
        return self._computed(node)

    def _computed(self, node: nodes.Node) -> Length:
        """Numbers, and texts that are put together."""
        match node:
            case nodes.Add(left=left, right=right):
                return self._value(left) + self._value(right) + (NUMBER if rules.is_number(node) else Length())
            case nodes.Mul(left=left, right=right) | nodes.Mod(left=left, right=right) if not rules.is_number(node):
                raise Unbounded  # a text many times, or what it is a format of
            case nodes.BinExpr(left=left, right=right) if not isinstance(node, nodes.Pow):
                return NUMBER + self._value(left) + self._value(right)
            case nodes.UnaryExpr(node=one):
                return NUMBER + self._value(one)
            case nodes.Compare(expr=one, ops=others):
                return sum((self._value(other.expr) for other in others), NUMBER + self._value(one))
            case nodes.Test(node=one, args=arguments):
                asked = [] if isinstance(one, nodes.Name) else [one]
                return sum(map(self._value, [*asked, *(arguments or ())]), NUMBER)
        raise Unbounded

    def _part(self, node: nodes.Getattr | nodes.Getitem) -> Length:
        """A subscript's or attribute's value: a part of a list, an object or a text, a namespace's, a loop's."""
        key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
        name = node.node.name if isinstance(node.node, nodes.Name) else ""
        if name in self.namespaces and isinstance(key, str):
            return self.held.get(key, Length()) | REQUEST  # which may be another value of this name
        if name == "loop" and len(self.loops) > self.loops_outside:
            if key in rules.LOOP_NUMBERS:
                return NUMBER
            if key in ("previtem", "nextitem"):
                return Length(self.levels[-1])
        if isinstance(node, nodes.Getitem):
            for child in node.arg.iter_child_nodes() if isinstance(node.arg, nodes.Slice) else [node.arg]:
                self._value(child)
        return self._value(node.node)

    def _filtered(self, node: nodes.Filter) -> Length:
        if node.node is None:
            raise Unbounded
        given = self._value(node.node)
        arguments = [self._value(one) for one in (*node.args, *(one.value for one in node.kwargs))]
        if node.name in ("default", "d"):
            return sum(arguments, Length()) | given
        return rules.filtered(node, given)

    def _called(self, node: nodes.Call) -> Length:
        arguments = [*map(self._value, node.args), *(self._value(one.value) for one in node.kwargs)]
        match node.node:
            case nodes.Name(name="raise_exception"):
                return Length()
            case nodes.Name(name="dict"):
                return sum(arguments, Length(2.0))
            case nodes.Name(name="range"):
                return sum(map(rules.counted, node.args), Length())
            case nodes.Name(name="strftime_now"):
                return sum(map(rules.dated, node.args), Length())
            case nodes.Name(name=name) if name in self.macros:
                return self._expanded(self.macros[name], node)
            case nodes.Getattr(node=of, attr=method) if method in rules.SAME_METHODS | rules.NUMBER_METHODS:
                return sum(arguments, NUMBER + self._value(of))
            case nodes.Getattr(node=of, attr="replace"):
                return rules.replaced(self._value(of), node.args)
            case nodes.Getattr(node=of, attr="join") if len(arguments) == 1:
                return rules.joined(arguments[0], of)
        raise Unbounded

    def _expanded(self, macro: nodes.Macro, call: nodes.Call) -> Length:
        """What a macro writes with these arguments. None calls itself."""
        self.num_expansions += 1
        too_many = self.num_expansions > MOST_EXPANSIONS or len(call.args) > len(macro.args)
        if macro.name in self.running or too_many or any(one.find(nodes.Name) for one in macro.defaults):
            raise Unbounded
        before, outside = self.names, self.loops_outside
        self.names = dict(before)
        names = [one.name for one in macro.args]
        given = [*zip(names, call.args, strict=False), *((one.key, one.value) for one in call.kwargs)]
        defaults = zip(names[len(names) - len(macro.defaults) :], macro.defaults, strict=True)
        lengths = [(name, self._value(value)) for name, value in (*defaults, *given)]
        self.running.append(macro.name)
        self.loops_outside = len(self.loops)
        for name, length in lengths:
            self._name(name, length)
        written = self._body(macro.body)
        self.running.pop()
        self.names, self.loops_outside = before, outside
        return written
