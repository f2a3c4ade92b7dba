"""The jinja2 environment that chat templates run in: a sandbox, with what published ones expect.

jinja2's sandbox keeps a template from what is not its own, but not from running for hours. Here all
work is counted (`budget`): the tree of a template is rewritten before it is compiled, so that each
turn of a loop, each call, comparison and joining of texts spends from what one rendering may do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any, NoReturn, TypeVar, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace, pass_context, pass_environment
from jinja2.visitor import NodeTransformer

from vlmforge.inputs.budget import (
    OPERATION,
    TemplateLimitError,
    limited,
    size_of,
    spend,
    text_work,
    work_of,
)
from vlmforge.inputs.operations import (
    FILTERS,
    check_method,
    check_operator,
    counted,
    counted_filter,
    counted_test,
    join,
)

# What jinja's code hands on to functions that ask for the context of a loop or block.
_LOOP_SCOPES = ("_loop_vars", "_block_vars")

_OF_DICT = frozenset(dir(dict))

T = TypeVar("T", bound=nodes.Node)

_MOST_SOURCE = 1 << 17
_MOST_MESSAGE = 500
# The names have a space, which no name in a template has.
_STEP, _WEIGHED, _SEARCHED, _CONCAT, _SLICED = " step", " weighed", " searched", " concat", " slice"


class _Generation(Extension):
    """`{% generation %}` blocks mark the assistant's words; here they are transparent."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A namespace whose text is short, whatever it holds: it may hold itself."""

    def __repr__(self) -> str:
        return "<namespace>"


def _raise_exception(message: object) -> NoReturn:
    spend(work_of(message), "raise_exception")
    raise jinja2.TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    if len(layout) > 200:
        raise TemplateLimitError(f"strftime_now with a layout of {len(layout)} characters")
    return datetime.now().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter that published templates expect: jinja's own would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@pass_environment
def _join(
    environment: jinja2.Environment, value: Any, d: str = "", attribute: str | int | None = None
) -> str:
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return join(items, str(d))


@pass_context
def _sum(context: Context, value: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    environment: Any = context.environment
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    for item in counted(items, "the filter sum"):
        start = environment.call_binop(context, "+", start, item)
    return start


def _weighed(value: Any, others: int = 0) -> Any:
    """`value`, whose work is counted, and that of `others`, which is known."""
    spend(OPERATION + work_of(value) + abs(others), "a comparison")
    return value


def _searched(value: Any) -> Any:
    return value if isinstance(value, Mapping) else _weighed(value)


def _concat(parts: Iterable[Any]) -> str:
    return join(parts, "")


def _slice(value: Any) -> Any:
    spend(OPERATION + (len(value) if hasattr(value, "__len__") else 0), "a slice")
    return value


@pass_context
def _written(_: Context, value: Any) -> Any:
    size = len(value) if type(value) is str else size_of(value)
    spend(OPERATION + text_work(size), "the output")
    return value


class _Counting(NodeTransformer):
    """Rewrites a template's tree so that its work is counted."""

    def get_visitor(self, node: nodes.Node) -> Any:
        """The function for this type of node, or None: its children are visited."""
        return _REWRITES.get(type(node))


def _inside(node: T) -> T:
    """`node` with what is in it rewritten."""
    return cast("T", _Counting().generic_visit(node))


def _count_loop(node: nodes.For) -> nodes.Node:
    weight = _weight([*node.body, *([node.test] if node.test is not None else [])])
    node = _inside(node)
    step = _step_of(weight, node.lineno)
    node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
    if node.test is not None:
        # A test that lets nothing pass runs no body. The step gives None: `step is none and test`.
        counted = nodes.Test(step, "none", [], [], None, None)
        node.test = nodes.And(counted, node.test)
    return node


def _count_body(node: nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
    step = _step_of(_weight(node.body), node.lineno)
    node = _inside(node)
    node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
    return node


def _count_comparison(node: nodes.Compare) -> nodes.Node:
    node, known = _inside(node), 0
    for operand in node.ops:
        if isinstance(operand.expr, nodes.Const):  # mostly: a role or a type
            known += OPERATION + work_of(operand.expr.value)
        else:
            name = _SEARCHED if operand.op in ("in", "notin") else _WEIGHED
            operand.expr = _wrapped(operand.expr, name)
    node.expr = _wrapped(node.expr, _WEIGHED, nodes.Const(known))
    return node


def _count_concat(node: nodes.Concat) -> nodes.Node:
    node = _inside(node)
    return _wrapped(nodes.Tuple(node.nodes, "load", lineno=node.lineno), _CONCAT)


def _count_item(node: nodes.Getitem) -> nodes.Node:
    node = _inside(node)
    if isinstance(node.arg, nodes.Slice):
        return _wrapped(node, _SLICED)
    if not isinstance(node.arg, nodes.Const):
        node.arg = _wrapped(node.arg, _WEIGHED)  # it is hashed
    return node


def _count_key(node: nodes.Pair) -> nodes.Node:
    node = _inside(node)
    node.key = _wrapped(node.key, _WEIGHED)
    return node


_REWRITES: Mapping[type, Callable[[Any], nodes.Node]] = {
    nodes.For: _count_loop,
    nodes.Macro: _count_body,
    nodes.CallBlock: _count_body,
    nodes.Block: _count_body,
    nodes.Compare: _count_comparison,
    nodes.Concat: _count_concat,
    nodes.Getitem: _count_item,
    nodes.Pair: _count_key,
}


def _wrapped(node: nodes.Expr, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [*arguments], [], None, None, lineno=node.lineno)


def _step_of(weight: int, line: int) -> nodes.Filter:
    what = nodes.Const(f"what is repeated at line {line}")
    return _wrapped(nodes.Const(weight, lineno=line), _STEP, what)


def _weight(body: Iterable[nodes.Node]) -> int:
    """Operations of running `body` once; what is repeated inside counts when it is."""
    weight, left = OPERATION, list(body)
    while left:
        node = left.pop()
        weight += 1
        if isinstance(node, nodes.TemplateData):
            weight += text_work(len(node.data))
        repeated = isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block)
        left += node.iter_child_nodes(exclude=("body",) if repeated else None)
    return weight


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _OF_DICT:  # mostly a message: no error on the way
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        spend(1, "the look-ups")
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, *args: Any, **named: Any) -> Any:
        given = {name: value for name, value in named.items() if name not in _LOOP_SCOPES}
        return super().call(context, obj, *self._checked(obj, args, given), **named)

    def _checked(self, obj: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """The arguments to call `obj` with, after its work was counted."""
        if isinstance(obj, Macro | LoopContext | BlockReference | jinja2.Undefined | Joiner):
            spend(OPERATION, "calling macros and blocks")
            return args
        if any(obj is known for known in self.globals.values()):
            spend(OPERATION + work_of(*args, *named.values()), f"the function {obj.__name__}")
            return args
        if not isinstance(obj, BuiltinMethodType | MethodType | FunctionType):
            raise SecurityError(f"templates cannot call {type(obj).__name__!r}")
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, Cycler | LoopContext):
            spend(OPERATION + work_of(*args), f"the method {method.__name__}")
            return args
        return check_method(method, owner, args, named)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,  # constants are not worked out while compiling, where nothing is counted
        finalize=_written,
    )
    known = {**environment.filters, "tojson": _tojson, "join": _join, "sum": _sum}
    environment.filters = {name: counted_filter(name, known[name]) for name in FILTERS}
    environment.filters |= {_STEP: spend, _WEIGHED: _weighed, _SEARCHED: _searched}
    environment.filters |= {_CONCAT: _concat, _SLICED: _slice}
    tests: Any = environment.tests
    environment.tests = {name: counted_test(name, test) for name, test in tests.items()}
    del environment.globals["lipsum"]
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """Compile a template's text; the last ones are kept. Anything may be raised."""
    if len(source) > _MOST_SOURCE:
        raise TemplateLimitError(
            f"a template of {len(source)} characters; at most {_MOST_SOURCE} are compiled"
        )
    with limited():
        template = _environment().from_string(source)
    template.globals = dict(template.globals)  # not a chain, which takes long to copy each time
    return template


def render_bounded(source: str, values: Mapping[str, object]) -> str:
    """Compile and render; what it may do grows with `values`. Anything may be raised."""
    template = compile_template(source)
    with limited(values):
        return template.render(values)


def describe_fault(error: Exception) -> str:
    """What a template raised, in at most a few lines: the words may be its own."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= _MOST_MESSAGE else text[:_MOST_MESSAGE] + "..."
