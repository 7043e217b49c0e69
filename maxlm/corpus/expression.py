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
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from maxlm.config import MaxlmError

Value: TypeAlias = "pa.Array | pa.ChunkedArray | pa.Scalar"
"""The value of an expression: of each row, or one for all of them."""

_Function = Callable[[Value, Value], Value]
_COMPARISONS: dict[type[ast.cmpop], _Function] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
# In float64: integers of labels would silently wrap around.
_ARITHMETIC: dict[type[ast.operator], _Function] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}
_SIGNS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_FIX = 'write it like: language.name == "en" and heuristics.words >= 50'


@dataclass(frozen=True)
class Threshold:
    """A comparison of a label with a number, such as `heuristics.words >= 50`."""

    label: str
    comparison: str
    """One of == != < <= > >=."""
    value: float


@dataclass(frozen=True)
class Expression:
    """A condition on a document's labels. Made by `parse_expression`; picklable."""

    text: str

    @cached_property
    def _tree(self) -> ast.expr:
        # In brackets it may have several lines, with comments.
        return ast.parse(f"(\n{self.text}\n)", mode="eval").body

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """The labels that the expression names, each once."""
        return tuple(dict.fromkeys(_list_names(self._tree)))

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
        # A copy: the replacer changes a tree in place.
        tree = ast.parse(ast.unparse(self._tree))
        return Expression(ast.unparse(_LabelReplacer(values).visit(tree)))

    def evaluate(self, table: pa.RecordBatch | pa.Table) -> np.ndarray:
        """Marks rows that fulfil it: bool [rows]. `table` has the columns
        `label_names`."""
        value = _evaluate(self._tree, table)
        if isinstance(value, pa.Scalar):
            return np.full(table.num_rows, bool(value.as_py()))
        return pc.fill_null(value, False).to_numpy(zero_copy_only=False)


def parse_expression(
    text: str, labels: Mapping[str, pa.DataType], error_location: str
) -> Expression:
    """Parses an expression and checks it against the types of the labels that it may
    name. `error_location`: the config key it comes from, for errors."""
    expression = Expression(text)
    try:
        tree = expression._tree
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", str(error))
        message = f"{text!r} is no expression: {reason}"
        raise MaxlmError(message, where=error_location, fix=_FIX) from error
    names = expression.label_names
    for name in names:
        if name not in labels:
            raise make_unknown_label_error(name, labels, error_location)
    # Evaluating it on one row of nulls tells whether it has a meaning and of what type.
    columns = {name: pa.nulls(1, labels[name]) for name in names}
    if not names:
        columns = {"": pa.nulls(1)}  # For the number of rows.
    try:
        value = _evaluate(tree, pa.table(columns))
    except _MeaninglessSyntax as error:
        message = f"{text!r}: {error} means nothing here"
        raise MaxlmError(message, where=error_location, fix=_FIX) from error
    except (pa.ArrowException, _WrongKind, OverflowError) as error:
        reason = str(error).splitlines()[0]
        message = f"{text!r} compares things of different kinds ({reason})"
        kinds = ", ".join(f"{name} is {labels[name]}" for name in names)
        raise MaxlmError(
            message, where=error_location, fix=f"labels: {kinds}"
        ) from error
    if not pa.types.is_boolean(value.type):
        message = f"{text!r} is a value, not a condition"
        raise MaxlmError(message, where=error_location, fix="compare it with something")
    return expression


class _MeaninglessSyntax(Exception):
    """Syntax that has no meaning in an expression."""


class _WrongKind(Exception):
    """Arithmetic with something else than numbers."""


def make_unknown_label_error(
    name: str, labels: Mapping[str, pa.DataType], error_location: str
) -> MaxlmError:
    """Makes the error for a label that does not exist; it names near ones."""
    near = get_close_matches(name, labels, n=3, cutoff=0.5)
    if not near:
        last_part = name.rpartition(".")[2]
        near = [label for label in labels if last_part in label][:3]
    if near:
        fix = f"did you mean {', '.join(near)}?"
    else:
        fix = f"there are: {', '.join(list(labels)[:8]) or 'no stage gives any'}"
    return MaxlmError(f'there is no label "{name}"', where=error_location, fix=fix)


def _get_dotted_name(node: ast.AST) -> str | None:
    """Returns the label that a node names, such as "language.name"; None: it is no
    name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        prefix = _get_dotted_name(node.value)
        if prefix is not None:
            return f"{prefix}.{node.attr}"
    return None


class _LabelReplacer(ast.NodeTransformer):
    """Replaces names of labels in an expression's tree by constants."""

    def __init__(self, values: Mapping[str, bool | float | tuple[()] | None]):
        self._values = values

    def visit(self, node: ast.AST) -> ast.AST:
        name = _get_dotted_name(node)
        if name is None:
            return self.generic_visit(node)
        if name not in self._values:
            return node
        value = self._values[name]
        # Of spans an expression can only tell that they are there.
        return ast.Constant(False if isinstance(value, tuple) else value)


def _list_names(node: ast.AST) -> list[str]:
    """Lists the labels that a node and those below it name, from left to right."""
    name = _get_dotted_name(node)
    if name is not None:
        return [name]
    names = []
    for child in ast.iter_child_nodes(node):
        names += _list_names(child)
    return names


def _list_thresholds(tree: ast.expr) -> list[Threshold]:
    thresholds = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        # `1 <= a < 2` is two comparisons.
        sides = pairwise([node.left, *node.comparators])
        for (left, right), operator in zip(sides, node.ops, strict=True):
            sign = _SIGNS.get(type(operator))
            if sign is None:
                continue
            label = _get_dotted_name(left)
            value = _parse_number(right)
            if label is None:
                label = _get_dotted_name(right)
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
    # True and False are ints to Python.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not isfinite(value):
        return None
    return float(value)


def _evaluate(node: ast.expr, table: pa.RecordBatch | pa.Table) -> Value:
    """Evaluates an expression on the rows of a table.

    Raises:
        _MeaninglessSyntax: a part of it means nothing.
        _WrongKind, pa.ArrowException: it calculates with or compares what it cannot.
    """
    name = _get_dotted_name(node)
    if name is not None:
        return table.column(name)
    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None):
            return pa.scalar(node.value)
        case ast.BoolOp(op=op, values=operands):
            join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
            return reduce(join, [_evaluate(operand, table) for operand in operands])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return pc.invert(_evaluate(operand, table))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return pc.negate(_evaluate(operand, table))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            left_value = _to_float(_evaluate(left, table))
            right_value = _to_float(_evaluate(right, table))
            return _ARITHMETIC[type(op)](left_value, right_value)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = pairwise([left, *comparators])
            results = [
                _compare(one, op, other, table)
                for (one, other), op in zip(sides, ops, strict=True)
            ]
            return reduce(pc.and_kleene, results)
    raise _MeaninglessSyntax(ast.unparse(node))


def _compare(
    left: ast.expr,
    op: ast.cmpop,
    right: ast.expr,
    table: pa.RecordBatch | pa.Table,
) -> Value:
    """Evaluates one comparison of two sides; raises as `_evaluate` does."""
    if isinstance(op, ast.Is | ast.IsNot) and ast.unparse(right) == "None":
        is_null = pc.is_null(_evaluate(left, table))
        return is_null if isinstance(op, ast.Is) else pc.invert(is_null)
    is_collection = isinstance(right, ast.Tuple | ast.List | ast.Set)
    if isinstance(op, ast.In | ast.NotIn) and is_collection:
        value = _evaluate(left, table)
        is_member = pa.scalar(False)
        for element in right.elts:
            is_equal = pc.equal(value, _evaluate(element, table))
            is_member = pc.or_kleene(is_member, is_equal)
        return is_member if isinstance(op, ast.In) else pc.invert(is_member)
    if type(op) in _COMPARISONS:
        compare = _COMPARISONS[type(op)]
        return compare(_evaluate(left, table), _evaluate(right, table))
    raise _MeaninglessSyntax(
        f"{ast.unparse(left)} {type(op).__name__} {ast.unparse(right)}"
    )


def _to_float(value: Value) -> Value:
    if not (types.is_integer(value.type) or types.is_floating(value.type)):
        raise _WrongKind(f"no arithmetic with {value.type}")
    return pc.cast(value, pa.float64())
