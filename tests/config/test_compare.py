"""Promise: two configs differ exactly where their settings do."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from maxlm.config import ABSENT, Config, compare_configs


class Model(Config):
    d_model: int = 8
    layers: tuple[int, ...] = (1, 2)
    extra: dict[str, float] = Field({})
    path: Path = Path("a")


def test_differences():
    a = Model(extra={"x": 1.0})
    b = {"d_model": 16, "layers": [1, 3, 4], "path": "a", "old": None}
    assert compare_configs(a, b, "model") == [
        ("model.d_model", 8, 16),
        ("model.layers.1", 2, 3),
        ("model.extra.x", 1.0, ABSENT),
        ("model.layers.2", ABSENT, 4),
        ("model.old", ABSENT, None),
    ]


def test_a_saved_config_equals_itself():
    model = Model(d_model=3, extra={"y": 1e-3})
    saved = json.loads(json.dumps(model.model_dump(mode="json")))
    assert compare_configs(model, saved) == []


trees = st.recursive(
    st.integers(0, 2) | st.none() | st.just("s"),
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3) | st.lists(inner, max_size=2)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from("xy"), trees), st.dictionaries(st.sampled_from("xy"), trees))
def test_no_difference_means_equal(a, b):
    assert (compare_configs(a, b) == []) == (a == b)
    assert compare_configs(b, a) == [] or a != b
    assert {key for key, *_ in compare_configs(a, b)} == {key for key, *_ in compare_configs(b, a)}
