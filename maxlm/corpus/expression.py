"""Expressions over labels: `language.name == "en" and heuristics.words >= 50`.

Python's syntax, of which comparisons, `and`, `or`, `not`, `in`, `is None`, arithmetic
and literals mean something. A label that a document lacks is null, and nulls spread as
in SQL: a comparison with null is neither true nor false, and a document is taken only
where the whole is true.
"""

# pyarrow.compute makes its functions at run time, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, reduce
from itertools import pairwise
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from maxlm.config import MaxlmError

_COMPARE: dict[type, Callable] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
# In float64: integers of labels would silently wrap around.
_ARITHMETIC: dict[type, Callable] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}
_FIX = 'write it like: language.name == "en" and heuristics.words >= 50'


_SIGNS: dict[type, str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


@dataclass(frozen=True)
class Threshold:
    """A comparison of a label with a number, such as `heuristics.words >= 50`."""

    label: str
    comparison: str
    """One of == != < <= > >=."""
    value: float


@dataclass(frozen=True)
class Expression:
    """A condition on a document's labels. Made by `parse`; picklable."""

    text: str

    @cached_property
    def _tree(self) -> ast.expr:
        # In brackets it may have several lines, with comments.
        return ast.parse(f"(\n{self.text}\n)", mode="eval").body

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """The labels that the expression names, each once."""
        return tuple(dict.fromkeys(_names(self._tree)))

    @cached_property
    def thresholds(self) -> tuple[Threshold, ...]:
        """The expression's comparisons of a label with a number."""
        return tuple(_list_thresholds(self._tree))

    def replace_labels(
        self, values: Mapping[str, bool | float | tuple[()] | None]
    ) -> "Expression":
        """Returns the expression with labels replaced by constants."""
        if values.keys().isdisjoint(self.label_names):
            return self
        return Expression(
            ast.unparse(
                _LabelReplacer(values).visit(ast.parse(ast.unparse(self._tree)))
            )
        )

    def evaluate(self, table: pa.RecordBatch | pa.Table) -> np.ndarray:
        """Marks rows that fulfil it: bool [rows]. `table` has the columns
        `label_names`."""
        value = _evaluate(self._tree, table)
        if isinstance(value, pa.Scalar):
            return np.full(table.num_rows, bool(value.as_py()))
        return pc.fill_null(value, False).to_numpy(zero_copy_only=False)


def parse(
    text: str, labels: Mapping[str, pa.DataType], error_location: str
) -> Expression:
    """Check an expression against the types of the labels that it may name.
    `error_location`: the config key it comes from, for errors."""
    expression = Expression(text)
    try:
        tree = expression._tree
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        what = f"{text!r} is no expression: {getattr(error, 'msg', str(error))}"
        raise MaxlmError(what, where=error_location, fix=_FIX) from error
    try:
        names = expression.label_names
        for name in names:
            if name not in labels:
                raise make_unknown_label_error(name, labels, error_location)
        empty = pa.Table.from_arrays(
            [pa.nulls(1, labels[n]) for n in names], list(names)
        )
        value = _evaluate(tree, empty if names else pa.table({"": pa.nulls(1)}))
    except _Unknown as error:
        what = f"{text!r}: {error} means nothing here"
        raise MaxlmError(what, where=error_location, fix=_FIX) from error
    except (pa.ArrowException, TypeError, OverflowError) as error:
        what = f"{text!r} compares things of different kinds ({str(error).splitlines()[0]})"
        kinds = ", ".join(f"{name} is {labels[name]}" for name in names)
        raise MaxlmError(what, where=error_location, fix=f"labels: {kinds}") from error
    if not pa.types.is_boolean(value.type):
        what = f"{text!r} is a value, not a condition"
        raise MaxlmError(
            what, where=error_location, fix="compare it with something"
        ) from None
    return expression


class _Unknown(Exception):
    """Syntax that has no meaning in an expression."""


def make_unknown_label_error(
    name: str, labels: Mapping[str, pa.DataType], error_location: str
) -> MaxlmError:
    """The error for a label that does not exist; names near ones."""
    near = get_close_matches(name, labels, n=3, cutoff=0.5)
    near = near or [label for label in labels if name.rpartition(".")[2] in label][:3]
    listed = ", ".join(near or list(labels)[:8]) or "no stage gives any"
    fix = f"did you mean {listed}?" if near else f"there are: {listed}"
    return MaxlmError(f'there is no label "{name}"', where=error_location, fix=fix)


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := _dotted(node.value)):
        return f"{inner}.{node.attr}"
    return None


class _LabelReplacer(ast.NodeTransformer):
    """Replaces names of labels in an expression's tree by constants."""

    def __init__(self, values: Mapping[str, bool | float | tuple[()] | None]):
        self._values = values

    def visit(self, node: ast.AST) -> Any:
        name = _dotted(node) if isinstance(node, ast.expr) else None
        if name is None:
            return self.generic_visit(node)
        if name not in self._values:
            return node
        value = self._values[name]
        # Of spans an expression can only tell that they are there.
        return ast.Constant(False if isinstance(value, tuple) else value)


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.expr) and (name := _dotted(node)):
        return [name]
    return [name for child in ast.iter_child_nodes(node) for name in _names(child)]


def _list_thresholds(tree: ast.expr) -> list[Threshold]:
    thresholds = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = pairwise([node.left, *node.comparators])
        for (left, right), operator in zip(sides, node.ops, strict=True):
            sign = _SIGNS.get(type(operator))
            if sign is None:
                continue
            label = _dotted(left)
            value = _parse_number(right)
            if label is None:
                label = _dotted(right)
                value = _parse_number(left)
                sign = _MIRRORED.get(sign, sign)
            if label is not None and value is not None:
                thresholds.append(Threshold(label, sign, value))
    return thresholds


def _parse_number(node: ast.expr) -> float | None:
    """Returns the finite number that an expression writes; None: it is something
    else."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not isfinite(value)
    ):
        return None
    return float(value)


def _evaluate(node: ast.expr, table: pa.RecordBatch | pa.Table) -> Any:
    name = _dotted(node)
    if name is not None:
        return table.column(name)
    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None):
            return pa.scalar(node.value)
        case ast.BoolOp(op=op, values=values):
            join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
            return reduce(join, (_evaluate(value, table) for value in values))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return pc.invert(_evaluate(operand, table))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return pc.negate(_evaluate(operand, table))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            sides = (_float(_evaluate(side, table)) for side in (left, right))
            return _ARITHMETIC[type(op)](*sides)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = zip(pairwise([left, *comparators]), ops, strict=True)
            return reduce(
                pc.and_kleene, (_compare(a, op, b, table) for (a, b), op in sides)
            )
    raise _Unknown(ast.unparse(node))


def _compare(left: ast.expr, op: ast.cmpop, right: ast.expr, table: Any) -> Any:
    if isinstance(op, ast.Is | ast.IsNot) and ast.unparse(right) == "None":
        null = pc.is_null(_evaluate(left, table))
        return null if isinstance(op, ast.Is) else pc.invert(null)
    if isinstance(op, ast.In | ast.NotIn) and isinstance(
        right, ast.Tuple | ast.List | ast.Set
    ):
        value = _evaluate(left, table)
        matches = (pc.equal(value, _evaluate(each, table)) for each in right.elts)
        found = reduce(pc.or_kleene, matches, pa.scalar(False))
        return found if isinstance(op, ast.In) else pc.invert(found)
    if type(op) in _COMPARE:
        return _COMPARE[type(op)](_evaluate(left, table), _evaluate(right, table))
    raise _Unknown(f"{ast.unparse(left)} {type(op).__name__} {ast.unparse(right)}")


def _float(value: Any) -> Any:
    if not (types.is_integer(value.type) or types.is_floating(value.type)):
        raise TypeError(f"no arithmetic with {value.type}")
    return pc.cast(value, pa.float64())
