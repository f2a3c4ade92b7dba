"""Strict JSON of frozen dataclasses: what it refuses, and with which words."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import random
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from vlmforge import engine
from vlmforge.engine import schema
from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.positions import PositionPolicy
from vlmforge.engine.schema import from_json, to_json
from vlmforge.errors import EngineFormatError
from vlmforge.field_rules import Int


@dataclass(frozen=True, slots=True)
class Leaf:
    name: str
    count: int


@dataclass(frozen=True, slots=True)
class Tree:
    flag: bool
    ratio: float
    title: str | None
    extra: Leaf | None
    shape: tuple[int | str, ...]
    pair: tuple[int, str]
    leaves: tuple[Leaf, ...]
    table: Mapping[str, Leaf]


INTS = st.integers(-(2**63), 2**63)
TEXT = st.text(max_size=8)
LEAVES = st.builds(Leaf, TEXT, INTS)
TREES = st.builds(
    Tree,
    flag=st.booleans(),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    title=st.none() | TEXT,
    extra=st.none() | LEAVES,
    shape=st.lists(INTS | TEXT, max_size=4).map(tuple),
    pair=st.tuples(INTS, TEXT),
    leaves=st.lists(LEAVES, max_size=3).map(tuple),
    table=st.dictionaries(TEXT, LEAVES, max_size=3),
)
TREE = Tree(True, 0.5, None, None, (1, "n"), (3, "x"), (Leaf("a", 1),), {"k": Leaf("b", 2)})


def as_data(tree: Tree = TREE) -> dict[str, object]:
    """The tree as a parsed JSON document."""
    data = json.loads(to_json(tree))
    assert isinstance(data, dict)
    return data


def refusal(data: object, kind: type = Tree) -> EngineFormatError:
    with pytest.raises(EngineFormatError) as caught:
        from_json(kind, data, "t.json")
    return caught.value


@given(TREES)
def test_a_round_trip_gives_an_equal_value_of_equal_types(tree: Tree) -> None:
    back = from_json(Tree, json.loads(to_json(tree)), "t.json")
    assert back == tree
    assert sorted(repr(back)) == sorted(repr(tree))  # tells True from 1 and 1 from 1.0
    assert to_json(back) == to_json(tree)


@given(st.dictionaries(TEXT, LEAVES, min_size=2, max_size=5), st.randoms())
def test_equal_values_have_equal_text(table: dict[str, Leaf], order: random.Random) -> None:
    shuffled = {key: table[key] for key in order.sample(list(table), len(table))}
    one, other = (dataclasses.replace(TREE, table=t) for t in (table, shuffled))
    assert to_json(one) == to_json(other)


def test_text_is_readable_and_keeps_the_order_of_fields() -> None:
    text = to_json(Tree(True, 0.5, "标题 ü", None, (), (3, "x"), (), {}))
    assert text.endswith("\n")
    assert "标题 ü" in text
    assert list(json.loads(text)) == list(Tree.__dataclass_fields__)


def test_an_integer_is_a_number() -> None:
    ratio = from_json(Tree, as_data() | {"ratio": 2}, "t.json").ratio
    assert (ratio, type(ratio)) == (2.0, float)


@pytest.mark.parametrize("name", list(Tree.__dataclass_fields__))
def test_a_missing_key_is_named(name: str) -> None:
    data = as_data()
    del data[name]
    error = refusal(data)
    assert error.summary == "t.json is not what this version of vlmforge reads."
    assert error.found == f"no key {name!r}"
    assert error.expected == f"the keys {', '.join(Tree.__dataclass_fields__)}"
    assert error.fix == "rebuild the engine with the build-engine of this version"


def test_an_unknown_key_is_named_wherever_it_is() -> None:
    assert refusal(as_data() | {"colour": 1}).found == "unknown key 'colour'"
    error = refusal(as_data() | {"table": {"k": {"name": "b", "count": 2, "more": 0}}})
    assert "t.json.table.k is not" in error.summary
    assert (error.found, error.expected) == ("unknown key 'more'", "only the keys name, count")


@pytest.mark.parametrize(
    ("change", "where", "found", "expected"),
    [
        ({"flag": 1}, "t.json.flag", "int 1", "bool"),
        ({"flag": None}, "t.json.flag", "NoneType null", "bool"),
        ({"ratio": True}, "t.json.ratio", "bool true", "float"),
        ({"ratio": "1"}, "t.json.ratio", 'str "1"', "float"),
        ({"title": 4}, "t.json.title", "int 4", "str or null"),
        ({"title": ["a"]}, "t.json.title", 'list ["a"]', "str or null"),
        ({"extra": []}, "t.json.extra", "list []", "dict"),
        ({"extra": {"name": "a", "count": True}}, "t.json.extra.count", "bool true", "int"),
        ({"shape": [1, True]}, "t.json.shape[1]", "bool true", "int or str"),
        ({"shape": [1, None]}, "t.json.shape[1]", "NoneType null", "int or str"),
        ({"shape": [1.0]}, "t.json.shape[0]", "float 1.0", "int or str"),
        ({"shape": "12"}, "t.json.shape", 'str "12"', "list"),
        ({"pair": [1]}, "t.json.pair", "1 items", "2 items"),
        ({"pair": [1, "x", "y"]}, "t.json.pair", "3 items", "2 items"),
        ({"pair": ["x", "y"]}, "t.json.pair[0]", 'str "x"', "int"),
        ({"leaves": [{"name": 1, "count": 1}]}, "t.json.leaves[0].name", "int 1", "str"),
        ({"leaves": {"0": {}}}, "t.json.leaves", 'dict {"0": {}}', "list"),
        ({"table": [1]}, "t.json.table", "list [1]", "dict"),
        ({"table": {"k": 1}}, "t.json.table.k", "int 1", "dict"),
    ],
)
def test_a_mistyped_value_is_named_with_what_was_found_and_expected(
    change: dict[str, object], where: str, found: str, expected: str
) -> None:
    error = refusal(as_data() | change)
    assert error.summary == f"{where} is not what this version of vlmforge reads."
    assert (error.found, error.expected) == (found, expected)


@pytest.mark.parametrize("data", [None, 1, "text", [], [1], True])
def test_a_document_that_is_no_object_is_refused(data: object) -> None:
    assert refusal(data).expected == "dict"


@pytest.mark.parametrize("number", [10**400, math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_neither_read_nor_written(number: float) -> None:
    error = refusal(as_data() | {"ratio": number})
    assert error.summary.startswith("t.json.ratio is not")
    assert error.expected == "a finite float"
    assert len(error.found) < 100
    if isinstance(number, float):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json(dataclasses.replace(TREE, ratio=number))


def test_a_long_value_is_shown_cut() -> None:
    assert len(refusal(as_data() | {"flag": "x" * 10_000}).found) < 100


@given(st.recursive(st.none() | st.booleans() | INTS | TEXT, lambda x: st.lists(x, max_size=3)))
def test_whatever_replaces_a_field_is_read_exactly_or_refused(value: object) -> None:
    for name in Tree.__dataclass_fields__:
        try:
            tree = from_json(Tree, as_data() | {name: value}, "t.json")
        except EngineFormatError as error:
            assert f"t.json.{name}" in error.summary
        else:
            written = json.loads(to_json(tree))[name]
            assert written == value
            assert name == "ratio" or type(written) is type(value)


# --- members of unions that have files of their own ----------------------------------------------


@pytest.mark.parametrize(
    ("policy", "folder"), [(ImagePolicy, engine.images), (PositionPolicy, engine.positions)]
)
def test_a_policy_that_is_elsewhere_is_where_its_tag_says(
    policy: object, folder: types.ModuleType
) -> None:
    """And all those of the union are, which type checkers read."""
    _, *places = typing.get_args(policy)
    for place in places:
        defaults = {field.name: field.default for field in structs.fields(place.load())}
        assert defaults["name"] == place.tag
    nodes = ast.walk(ast.parse(inspect.getsource(folder)))
    union = next(node for node in nodes if isinstance(node, ast.AnnAssign))
    named = [node.id for node in ast.walk(union) if isinstance(node, ast.Name)]
    members = [name for name in named if name not in ("TypeAlias", "ImagePolicy", "PositionPolicy")]
    assert sorted(members) == sorted(place.name for place in places)


@pytest.mark.parametrize(
    "tag", ["pixels", "__init__", "../anyres", "anyres\0", "absolute", "", 3, None, ["anyres"], {}]
)
def test_no_tag_imports_what_is_not_listed(tag: object, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = list[str]()
    monkeypatch.setattr(schema.importlib, "import_module", imported.append)
    with pytest.raises(EngineFormatError, match=r"image\.name"):
        from_json(Pictured, {"image": {"name": tag}}, "t.json")
    assert imported == []


@dataclass(frozen=True, slots=True)
class Pictured:
    image: ImagePolicy


@dataclass(frozen=True)
class Base:
    low: Annotated[int, Int(0, 9)]


@dataclass(frozen=True)
class Derived(Base):
    high: Annotated[int, Int(0, 9)]


@dataclass(frozen=True)
class Wider(Derived):
    low: Annotated[int, Int(0, 99)]


def test_fields_of_a_base_class_have_its_rules_unless_they_are_given_others() -> None:
    assert from_json(Derived, {"low": 9, "high": 9}, "t.json") == Derived(9, 9)
    assert from_json(Wider, {"low": 99, "high": 9}, "t.json") == Wider(99, 9)
    for kind, low, high, wrong in ((Derived, 10, 9, "low"), (Wider, 99, 10, "high")):
        with pytest.raises(EngineFormatError, match=rf"t\.json\.{wrong}"):
            from_json(kind, {"low": low, "high": high}, "t.json")
