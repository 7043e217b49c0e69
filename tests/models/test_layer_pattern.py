"""Layers unlike each other by turns: what a config makes of its kinds and pattern, and
the same numbers as the layers applied one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.architectures.settings import MAX_LAYERS
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.params import bind, flatten_names, param_specs
from maxlm.run.model_placement import describe_pipeline_obstacle
from maxlm.sharding import AxisRules
from tests.models.building import (
    LLAMA_GQA,
    POSITIONS,
    QUICK,
    SEGMENTS,
    random_params,
)
from tests.models.generation import check_generation_equals_forward_pass
from tests.models.layer_walk import apply_layers_one_by_one

SIZES = {"vocab_size": 31, "d_model": 14, "max_seq_len": 64, "init_std": 0.3}
WIDE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
NARROW = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 4, "qk_norm": True}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "d_ff": 10}
KINDS = {
    "wide": {},
    "narrow": {"attention": NARROW, "window": 3, "ffn": "none"},
    "expert": {"mixer": "none", "ffn": "moe"},
    "bare": {"positions": {"kind": "none"}, "placement": "output", "mlp": {"d_ff": 9}},
}


def make_config(pattern, num_layers, changes=None) -> DecoderConfig:
    settings = {
        "num_layers": num_layers,
        "attention": WIDE,
        "mlp": {"d_ff": 18},
        "moe": EXPERTS,
        "kinds": {name: KINDS[name] | {} for name in dict.fromkeys(pattern)},
        "pattern": pattern,
    }
    for name, kind in settings["kinds"].items():
        if name == "wide":
            kind["ffn"] = "mlp"
    return DecoderConfig.model_validate(SIZES | settings | (changes or {}))


MIXED = make_config(["wide", "narrow", "wide", "expert", "bare"], 11)


def describe(config):
    """Of each run its name, periods, and stacks with their layers; then the order."""
    runs = []
    for run in config.layer_runs:
        stacks = {stack.name: stack.num_layers for stack in run.stacks}
        runs.append((run.name, run.num_layers // len(run.kinds), stacks))
    return runs


def test_layers_of_the_same_modules_share_a_stack():
    assert describe(MIXED) == [
        (
            "layers",
            2,
            {
                "layers.wide": 4,
                "layers.narrow": 2,
                "layers.expert": 2,
                "layers.bare": 2,
            },
        ),
        ("last_layers", 1, {"last_layers": 1}),
    ]
    order = [
        (place.stack.name, place.index)
        for run in MIXED.layer_runs
        for place in run.iterate_places()
    ]
    assert order[:6] == [
        ("layers.wide", 0),
        ("layers.narrow", 0),
        ("layers.wide", 1),
        ("layers.expert", 0),
        ("layers.bare", 0),
        ("layers.wide", 2),
    ]
    assert order[-2:] == [("layers.bare", 1), ("last_layers", 0)]
    model = MIXED.build(rules=AxisRules(), dtype=jnp.float32)
    names = flatten_names(param_specs(model))
    assert names["layers.narrow.attention.query.kernel"].shape == (2, 14, 3, 4)
    assert not any(name.startswith("layers.narrow.m") for name in names)
    assert "layers.expert.attention_norm.scale" not in names
    assert "layers.bare.attention_norm.scale" not in names
    assert DecoderConfig.model_validate(MIXED.model_dump()) == MIXED


def test_the_part_of_a_list_of_layers_that_repeats_is_scanned():
    listed = ["expert", *["wide", "narrow"] * 6, "bare"]
    config = make_config(listed, len(listed))
    assert describe(config) == [
        ("first_layers", 1, {"first_layers": 1}),
        ("layers", 6, {"layers.wide": 6, "layers.narrow": 6}),
        ("last_layers", 1, {"last_layers": 1}),
    ]
    # A shallow model's parameters have the names of a deep one's.
    shallow = make_config(["wide", "wide", "narrow"], 3)
    assert describe(shallow) == [("layers", 1, {"layers.wide": 2, "layers.narrow": 1})]
    # Layers that differ in windows alone stay in one stack, as they were.
    windows = [{"window": 3}, {"window": 5}, {"window": None}]
    plain = LLAMA_GQA.model_copy(update={"num_layers": 4})
    config = DecoderConfig.model_validate(plain.model_dump() | {"pattern": windows})
    assert describe(config) == [
        ("layers", 1, {"layers": 3}),
        ("last_layers", 1, {"last_layers": 1}),
    ]


PARTS = make_config(
    ["narrow"] * 2
    + ["expert"] * 2
    + ["wide", "bare"] * 4
    + ["narrow"] * 3
    + ["expert"],
    16,
)


def test_parts_of_a_list_that_share_no_stack_are_a_scan_each():
    assert describe(PARTS) == [
        ("first_layers", 2, {"first_layers.narrow": 2}),
        ("first_layers", 2, {"first_layers.expert": 2}),
        ("layers", 4, {"layers.wide": 4, "layers.bare": 4}),
        ("last_layers", 3, {"last_layers.narrow": 3}),
        ("last_layers", 1, {"last_layers.expert": 1}),
    ]
    # Where they share one, or none repeats, all are one run: names are the same.
    for last in (["narrow", "narrow", "expert", "narrow"], ["narrow", "expert"]):
        listed = [*["wide", "bare"] * 6, *last]
        runs = describe(make_config(listed, len(listed)))
        assert [(name, periods) for name, periods, _ in runs] == [
            ("layers", 6),
            ("last_layers", 1),
        ]
        assert runs[1][2].keys() == {"last_layers.narrow", "last_layers.expert"}


def test_pipelines_refuse_layers_beside_those_that_repeat():
    """They would run the others alone."""
    listed = [*["wide", "bare"] * 6, "narrow", "narrow", "wide", "wide"]
    assert describe_pipeline_obstacle(make_config(listed, 16)) == (
        "model.pattern does not repeat up to the last layer"
    )
    assert describe_pipeline_obstacle(make_config(listed[2:], 14)) is not None
    assert describe_pipeline_obstacle(make_config(listed[::-1], 16)) == (
        "model.pattern does not repeat from the first layer on"
    )
    assert describe_pipeline_obstacle(make_config(listed[:12], 12)) is None
    assert describe_pipeline_obstacle(make_config(listed[:2], 12)) is None


def test_dense_layers_stand_within_the_pattern():
    """The pattern goes on behind them (Kimi Linear: 3:1, the first one dense)."""
    pattern = ["narrow", "narrow", "wide"]
    kinds = {"wide": {}, "narrow": {"attention": NARROW}}
    config = make_config(pattern, 8, {"kinds": kinds, "dense_layers": 1})
    assert describe(config) == [
        ("first_layers", 1, {"first_layers": 1}),
        ("layers", 2, {"layers.narrow": 4, "layers.wide": 2}),
        ("last_layers", 1, {"last_layers": 1}),
    ]
    main = config.layer_runs[1]
    kinds_of_layers = [place.stack.name for place in main.iterate_places()]
    assert kinds_of_layers == ["layers.narrow", "layers.wide", "layers.narrow"] * 2
    is_expert = [stack.block.ffn == config.moe for stack in config.layer_stacks]
    assert is_expert == [False, True, True, True]


def test_a_long_list_of_layers_is_read_at_once():
    listed = ["wide", *["narrow"] * (MAX_LAYERS - 2), "bare"]
    runs = make_config(listed, MAX_LAYERS).layer_runs
    assert [run.num_layers for run in runs] == [1, MAX_LAYERS - 2, 1]


def build(config, mesh):
    """Builds a model with values that no initializer would draw."""
    model = config.build(rules=AxisRules(), dtype=jnp.float32)
    values = random_params(config, mesh)
    return model, jax.tree.map(lambda a: jnp.float32(0.6 * a), values)


@pytest.fixture(scope="module")
def built(one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        yield build(MIXED, one_device_mesh)


@pytest.mark.heavy
def test_a_scan_by_turns_is_the_layers_one_by_one(built):
    check_hidden_states_equal_walk(*built)


@pytest.mark.more
@pytest.mark.heavy
def test_gradients_of_a_scan_by_turns_are_those_of_the_layers_one_by_one(built):
    check_gradients_equal_walk(*built)


@pytest.mark.more
@pytest.mark.heavy
def test_several_scans_are_the_layers_one_by_one(one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        model, params = build(PARTS, one_device_mesh)
        check_hidden_states_equal_walk(model, params)
        check_generation_equals_forward_pass(model, params, (1, 17, 6))


def make_scan_and_walk(model):
    """Returns both ways to hidden states, functions of parameters."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, POSITIONS.shape))

    def scan(params):
        return bind(model, params)(tokens, POSITIONS, SEGMENTS)[0]

    def walk(params):
        return apply_layers_one_by_one(model, params, tokens, POSITIONS, SEGMENTS)

    return scan, walk


compare = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)


def check_hidden_states_equal_walk(model, params):
    scan, walk = make_scan_and_walk(model)
    hidden = jax.jit(scan, compiler_options=QUICK)(params)
    compare(hidden, walk(params))


def check_gradients_equal_walk(model, params):
    scan, walk = make_scan_and_walk(model)

    def loss(params, run):
        return jnp.sum(jnp.sin(3 * run(params)))

    d_scan = jax.jit(jax.grad(partial(loss, run=scan)), compiler_options=QUICK)(params)
    d_walk = jax.grad(partial(loss, run=walk))(params)
    largest = max(float(jnp.abs(d).max()) for d in jax.tree.leaves(d_walk))
    jax.tree.map(lambda a, b: compare(a / largest, b / largest), d_scan, d_walk)
    without = [name for name, d in flatten_names(d_scan).items() if not jnp.any(d)]
    assert without == ["head.kernel"]  # the loss is of hidden states


@pytest.mark.heavy
def test_experts_in_some_layers_alone_add_their_sums(built):
    model, params = built
    tokens = jnp.ones(POSITIONS.shape, int)
    _, aux = jax.jit(lambda p: bind(model, p)(tokens, POSITIONS, SEGMENTS))(params)
    # Two layers of experts, two experts for each token that is no padding, of four.
    assert aux.sums["expert_load"] == 2 * 2 * (SEGMENTS != 0).sum() / 4


@pytest.mark.more
@pytest.mark.heavy
def test_generation_equals_the_full_forward_pass(built):
    model, params = built
    check_generation_equals_forward_pass(model, params, (1, 17, 6))


WRONG = {
    "unknown name": (
        {"pattern": ["wide", "narow"]},
        "pattern: pattern names narow, which is not among kinds; did you mean narrow?",
    ),
    "unused": (
        {"pattern": ["wide", "wide"]},
        "pattern: kinds.narrow is not in the pattern; name it there, or leave it out",
    ),
    "unlike without names": (
        {"kinds": {}, "pattern": [{"ffn": "mlp"}, {"ffn": "moe"}]},
        "pattern: kinds of layers of different modules without names; give them names "
        "in model.kinds, and list these",
    ),
    "nothing": (
        {
            "moe": None,
            "kinds": {"empty": {"mixer": "none", "ffn": "none"}},
            "pattern": ["empty"],
        },
        "pattern: a layer of neither mixer nor ffn; give it one",
    ),
    "two mixers": (
        {
            "moe": None,
            "kinds": {"two": {"mixer": "none", "attention": WIDE}},
            "pattern": ["two"],
        },
        "both attention and mixer; give one of them",
    ),
    "absent experts": (
        {"moe": None, "kinds": {"a": {"ffn": "moe"}}, "pattern": ["a"]},
        "ffn=moe, but no moe; give one of them",
    ),
    "two kinds of positions": (
        {
            "moe": None,
            "kinds": {"a": {"positions": {"kind": "alibi"}}},
            "pattern": ["a"],
        },
        "pattern: a pattern of other positions than rope; let all layers have one kind, "
        "or none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_one_line(name):
    changes, message = WRONG[name]
    kinds = {"wide": {"ffn": "mlp"}, "narrow": {"attention": NARROW, "ffn": "none"}}
    usual = {"kinds": kinds, "pattern": ["wide", "narrow"]}
    with pytest.raises(MaxlmError) as caught:
        make_config([], 2, usual | changes)
    assert str(caught.value) == message


def test_an_unknown_mixer_names_those_there_are():
    from maxlm.config.load import load_config
    from maxlm.run.config import RunConfig

    with pytest.raises(MaxlmError, match=r"model\.kinds\.a\.mixer.*mamba3"):
        load_config(
            RunConfig,
            "llama3_8b",
            ["model.kinds.a.mixer.kind=mamba3", "model.pattern=[a]"],
        )
