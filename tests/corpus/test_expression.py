"""Expressions over labels mean what Python's operators mean, with SQL's nulls."""

import pickle

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.corpus.expression import Threshold, parse_expression

LABELS = {
    "language.name": pa.string(),
    "heuristics.words": pa.int32(),
    "heuristics.symbol_ratio": pa.float32(),
    "near.duplicate": pa.bool_(),
    "source": pa.string(),
}


def table(**columns):
    arrays = {name.replace("__", "."): values for name, values in columns.items()}
    return pa.table({n: pa.array(v, LABELS[n]) for n, v in arrays.items()})


def three_valued(expression, row):
    """The oracle: SQL's logic over one row, None for unknown."""
    kind, *rest = expression
    if kind == "words":
        comparison, value = rest
        words = row["words"]
        if words is None:
            return None
        values = {"<": words < value, ">=": words >= value, "==": words == value}
        return values[comparison]
    if kind == "flag":
        return row["flag"]
    if kind == "not":
        value = three_valued(rest[0], row)
        return None if value is None else not value
    operands = [three_valued(operand, row) for operand in rest]
    decisive = kind == "or"  # The value that decides, whatever the other one is.
    if decisive in operands:
        return decisive
    return None if None in operands else not decisive


def written(expression):
    kind, *rest = expression
    if kind == "words":
        return f"heuristics.words {rest[0]} {rest[1]}"
    if kind == "flag":
        return "near.duplicate"
    if kind == "not":
        return f"not ({written(rest[0])})"
    return f"({written(rest[0])}) {kind} ({written(rest[1])})"


leaves = st.one_of(
    st.tuples(st.just("words"), st.sampled_from(["<", ">=", "=="]), st.integers(-3, 3)),
    st.just(("flag",)),
)
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.just("not"), inner),
        st.tuples(st.sampled_from(["and", "or"]), inner, inner),
    ),
    max_leaves=8,
)
rows = st.fixed_dictionaries(
    {"words": st.none() | st.integers(-3, 3), "flag": st.none() | st.booleans()}
)


@given(expressions, st.lists(rows, max_size=6))
def test_logic_is_three_valued(expression, documents):
    data = table(
        heuristics__words=[row["words"] for row in documents],
        near__duplicate=[row["flag"] for row in documents],
    )
    values = parse_expression(written(expression), LABELS, "keep.x").evaluate(data)
    # What is unknown selects nothing.
    expected = [three_valued(expression, row) is True for row in documents]
    assert values.tolist() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('language.name == "en"', [True, False, False]),
        ('language.name in ("en", "fr")', [True, True, False]),
        ('language.name not in ["en"]', [False, True, False]),
        ("language.name is None", [False, False, True]),
        ("language.name is not None and True", [True, True, False]),
        ("50 <= heuristics.words < 70", [True, False, False]),
        ("heuristics.words / 40 >= 1.5", [True, True, False]),
        # More than int32 holds.
        ("heuristics.words * 1000000000 > 6e10", [False, True, False]),
        ("heuristics.words * 2 - 100 > -heuristics.words + 50", [True, True, False]),
        ("heuristics.symbol_ratio <= 0.1 or not near.duplicate", [True, True, False]),
        (
            "heuristics.words >= 60  # at least\n and heuristics.words < 65  # at most",
            [True, False, False],
        ),
        (' source=="web"\n and heuristics.words>0', [True, False, False]),
        ("False", [False, False, False]),
    ],
)
def test_values(text, expected):
    data = table(
        language__name=["en", "fr", None],
        heuristics__words=[60, 70, None],
        heuristics__symbol_ratio=[0.0625, 0.5, None],
        near__duplicate=[True, False, None],
        source=["web", "books", "web"],
    )
    expression = parse_expression(text, LABELS, "keep.x")
    assert expression.evaluate(data).tolist() == expected
    assert pickle.loads(pickle.dumps(expression)).evaluate(data).tolist() == expected


def test_names_and_thresholds():
    text = 'heuristics.words >= 50 and 0.1 > heuristics.symbol_ratio and language.name == "en"'
    expression = parse_expression(text, LABELS, "keep.x")
    names = ("heuristics.words", "heuristics.symbol_ratio", "language.name")
    assert expression.label_names == names
    assert expression.thresholds == (
        Threshold("heuristics.words", ">=", 50),
        Threshold("heuristics.symbol_ratio", "<", 0.1),
    )
    chained = parse_expression(
        "-1 < heuristics.words <= 1e3 and heuristics.words != None", LABELS, "keep.x"
    )
    assert chained.thresholds == (
        Threshold("heuristics.words", ">", -1),
        Threshold("heuristics.words", "<=", 1000),
    )


def test_labels_are_replaced_by_constants():
    text = "not (heuristics.words > 3 or heuristics.symbol_ratio is None) and language.name != 'x'"
    expression = parse_expression(text, LABELS, "keep.x")
    replaced = expression.replace_labels(
        {"heuristics.words": 1.0, "heuristics.symbol_ratio": 0.0}
    )
    assert replaced.label_names == ("language.name",)
    table = pa.table({"language.name": ["x", "en", None]})
    assert replaced.evaluate(table).tolist() == [False, True, False]
    assert expression.replace_labels({"heuristics.chars": 1.0}) is expression


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "heuristics.wrds > 3",
            'no label "heuristics.wrds"; did you mean heuristics.words',
        ),
        ("words > 3", "did you mean heuristics.words"),
        ("perplexity.bucket > 3", "there are: language.name, heuristics.words"),
        ('heuristics.words > "a"', "different kinds"),
        ("language.name == 3", "language.name is string"),
        ("not heuristics.words", "different kinds"),
        ("heuristics.words", "a value, not a condition"),
        ("language.name + 1 > 2", "different kinds"),
        ("heuristics.words >", "no expression"),
        ("len(language.name) > 2", "len"),
        ("heuristics.words is 3", "means nothing here"),
        ("heuristics.words in 3", "means nothing here"),
        ("heuristics.words if near.duplicate else 3", "means nothing here"),
        ("language.name in (1, 2)", "different kinds"),
        ("[x for x in source]", "x"),
        ("heuristics.words > 99999999999999999999", "different kinds"),
        ("", "means nothing here"),
        ("(" * 5000 + "1" + ")" * 5000, "no expression"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(MaxlmError) as error:
        parse_expression(text, LABELS, "keep.long")
    assert str(error.value).startswith("keep.long: ")
    assert message in str(error.value)
