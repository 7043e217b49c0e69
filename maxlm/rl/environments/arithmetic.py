"""Arithmetic that a policy writes, worked out exactly and in bounded time."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

MAX_EXPRESSION_CHARS = 200
_MAX_BITS = 4096
_MAX_DECIMALS = 10
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
    ast.Mod: operator.mod,
}


def compute_arithmetic(text: str) -> Fraction:
    """Works out numbers with + - * / // % ** and brackets. Nothing else is run: the
    text is parsed and walked over. Raises ValueError, with a reason for the policy:
    anything else, a division by zero, a number of more than 4,096 bits."""
    text = text.strip()
    if len(text) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"longer than {MAX_EXPRESSION_CHARS} characters")
    try:
        tree = ast.parse(text, mode="eval")
    # The last two: very deep brackets, and characters such as a NUL.
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        raise ValueError("not an expression") from None
    return _compute(tree.body)


def format_number(number: Fraction) -> str:
    """Writes a number as digits: exactly if ten decimals can, else rounded to them."""
    if number.denominator == 1:
        return str(number.numerator)
    scale = 10**_MAX_DECIMALS
    scaled = round(abs(number) * scale)
    whole = scaled // scale
    decimals = str(scaled % scale).zfill(_MAX_DECIMALS).rstrip("0")
    sign = "-" if number < 0 and scaled else ""
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


def _compute(node: ast.expr) -> Fraction:
    # The text's length bounds the depth of the recursion.
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        source = str(node.value)
        if source in ("inf", "nan"):
            raise ValueError("the number is too large")
        return _check_size(Fraction(source))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_compute(node.operand)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd):
        return _compute(node.operand)
    if isinstance(node, ast.BinOp):
        left = _compute(node.left)
        right = _compute(node.right)
        if isinstance(node.op, ast.Pow):
            return _raise_to_power(left, right)
        function = _OPERATORS.get(type(node.op))
        if function is not None:
            if not right and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
                raise ValueError("division by zero")
            return _check_size(function(left, right))
    raise ValueError("not an expression of numbers, + - * / // % ** and brackets")


def _raise_to_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("a power that is no whole number")
    if not base and exponent < 0:
        raise ValueError("division by zero")
    # Before it is worked out: the result might not fit into memory.
    num_bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if num_bits > 1 and abs(exponent.numerator) * (num_bits - 1) > _MAX_BITS:
        raise ValueError("the number is too large")
    return _check_size(base**exponent.numerator)


def _check_size(number: Fraction) -> Fraction:
    num_bits = max(number.numerator.bit_length(), number.denominator.bit_length())
    if num_bits > _MAX_BITS:
        raise ValueError("the number is too large")
    return number
