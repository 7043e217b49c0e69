"""Promise: YAML says what it looks like, and what is dumped reads back the same."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.config.yaml_text import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2.5e+2", -250.0),
        ("6.", 6.0),
        ("-.inf", float("-inf")),
        ("1_000", 1000),
        ("0x1F", 31),
        ("no", "no"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("truely", "truely"),
    ],
)
def test_scalars(text, value):
    got = parse_yaml(f"k: {text}", "f").to_plain()["k"]
    assert got == value
    assert type(got) is type(value)


def test_two_halves_of_a_character_are_it_and_one_is_refused():
    text = r'{"\ud83d\ude42": "a \ud83d\ude42 b\uD800\uDC00"}'
    assert parse_yaml(text, "f").to_plain() == json.loads(text) == {"🙂": "a 🙂 b𐀀"}
    for half in (r'"\ud83d"', r'"\ude42\ud83d"', r'{"\ud83d": 1}'):
        with pytest.raises(MaxlmError, match=r"f:2: .* holds half of a character"):
            parse_yaml(f"\n{half}", "f")


def test_keys_are_text_and_lines_count_from_one():
    setting = parse_yaml("\non:\n  3:\n    - 1\n    - {null: 2}\n", "f")
    assert {key: at.line for key, at in setting.list_origins()} == {
        (): 2,
        ("on",): 2,
        ("on", "3"): 3,
        ("on", "3", 0): 4,
        ("on", "3", 1): 5,
        ("on", "3", 1, "null"): 5,
    }


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | text
    | st.sampled_from(
        ["1e-3", "no", "010", "1:30", "~", "", " a ", "a\nb", "- a", "#", "2024-01-01"]
    )
)


@pytest.mark.heavy
@given(
    st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(text, inner))
)
def test_dump_reads_back(data):
    assert parse_yaml(dump_yaml(data), "f").to_plain() == data
