"""What is wrong in a published config.json is refused in a line that names it; what is
rare is read as the published code reads it."""

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest

from maxlm.config import MaxlmError
from maxlm.huggingface.families import find_family
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.huggingface.families.rope import write_position_settings
from maxlm.models.layers.positions import PositionsConfig
from maxlm.run.convert import find_inexpressible_setting
from tests.models.published import PUBLISHED
from tests.parity.compare import Holder

# One model of each set of keys.
LAYOUTS = list({frozenset(values): name for name, values in PUBLISHED.items()}.values())


def settings(values: dict[str, Any], tensors: Any = ()) -> tuple[Any, list[str]]:
    values = json.loads(json.dumps(values))
    config, notes = find_family(values, "config.json").read_config(
        values, "config.json", tensors
    )
    return Holder.model_validate({"model": config}).model, notes


def test_a_relative_without_a_preset():
    model, notes = settings(PUBLISHED["falcon2_11b"])
    assert (model.placement, model.mlp.d_ff, notes) == ("parallel_shared", 16384, [])


def change(name: str, **values: Any) -> dict[str, Any]:
    return PUBLISHED[name] | values


def nested(name: str, part: str, **values: Any) -> dict[str, Any]:
    return change(name, **{part: PUBLISHED[name][part] | values})


FIX = "take it from the published model"
SIZE = f"is not a whole number above 0; {FIX}"
DROPPED = "convert a model without it; dropping it silently could change the model"
ONLY = "is not implemented; only {} can be converted"
WRONG: list[tuple[str, str, Any, str]] = [
    ("smollm2_135m", "rope_interleaved", True, ONLY.format(False)),
    ("qwen2_5_7b", "use_mrope", True, ONLY.format(False)),
    ("falcon_7b", "apply_residual_connection_post_layernorm", True, ONLY.format(False)),
    ("falcon2_11b", "ff_factor", 2, ONLY.format(4.0)),
    ("bloom_560m", "n_inner", 1024, ONLY.format("None or 4096")),
    ("gemma2_9b", "sliding_window_size", 1024, ONLY.format(4096)),
    ("bert_base", "is_decoder", True, ONLY.format(False)),  # nothing sees what follows
    ("gemma2_9b", "tie_word_embeddings", None, ONLY.format(True)),
    ("llama_7b", "_attention_sinks", 4, f"is not implemented; {DROPPED}"),
    ("t5_v1_1_small", "dense_act_fn", "relu", ONLY.format("None or 'gelu_new'")),
    ("t5_3b", "is_gated_act", True, ONLY.format("None or False")),
    ("t5_3b", "is_encoder_decoder", False, ONLY.format(True)),
    (
        "deepseek_v2_lite",
        "rms_norm_eps",
        1e-5,
        ONLY.format(1e-06),
    ),  # not that of all its norms
    ("deepseek_v2_lite", "hidden_act", {"name": "silu"}, ONLY.format("'silu'")),
    ("gemma3_1b", "attn_logit_softcapping", 50.0, ONLY.format(None)),
    ("stablelm2_1_6b", "qk_layernorm", True, ONLY.format(False)),
    ("starcoder2_3b", "mlp_type", "gated", ONLY.format("'default'")),
    ("command_r7b", "use_qk_norm", True, ONLY.format(False)),
    ("command_r7b", "rotary_pct", 0.5, ONLY.format(1.0)),
    ("smollm3_3b", "no_rope_layers", [2] * 36, f"is not a list of 0 and 1; {FIX}"),
    ("olmo3_7b", "rope_theta", 10000.0, ONLY.format("500000.0 or None")),
    ("exaone4_32b", "hidden_act", "relu", ONLY.format("'silu'")),
    ("granite3_2b", "logits_scaling", 0, f"is not a number above 0; {FIX}"),
    ("hunyuan_7b", "use_cla", True, ONLY.format(False)),
    ("olmoe_1b_7b", "clip_qkv", 8.0, ONLY.format(None)),
    ("pythia_160m", "partial_rotary_factor", 0.5, ONLY.format(None)),
    ("opt_125m", "word_embed_proj_dim", 512, ONLY.format("None or 768")),
    ("opt_125m", "do_layer_norm_before", False, ONLY.format(True)),
    ("gptj_6b", "tie_word_embeddings", True, ONLY.format(False)),
    ("starcoder_15b", "multi_query", False, ONLY.format(True)),
    ("minitron_4b", "mlp_bias", 1, f"is not true or false; {FIX}"),
    ("afm_4_5b", "rope_alpha", 2.0, f"is not implemented; {DROPPED}"),
    ("command_r", "head_dim", 64, ONLY.format("None or 128")),
    ("glm4_9b_0414", "hidden_act", "gelu", ONLY.format("'silu'")),
    ("ernie4_5_0_3b", "compression_ratio", 2.0, f"is not implemented; {DROPPED}"),
    ("seed_oss_36b", "attention_out_bias", 1, f"is not true or false; {FIX}"),
    ("llama_7b", "model_type", "mistral", f"is not that of LlamaForCausalLM; {FIX}"),
    ("llama_7b", "rms_norm_eps", "1e-5", f"is not a number above 0; {FIX}"),
    ("llama_7b", "rms_norm_eps", 0.0, f"is not a number above 0; {FIX}"),
    ("smollm2_135m", "attention_bias", 0, f"is not true or false; {FIX}"),
    ("gpt2", "architectures", "GPT2LMHeadModel", f"is not a list of names; {FIX}"),
    ("llama_7b", "hidden_size", "big", SIZE),
    ("llama_7b", "num_attention_heads", 0, SIZE),
    ("mpt_7b", "attn_config", [1], f"is not a mapping; {FIX}"),
    ("falcon_7b", "multi_query", "true", f"is not true or false; {FIX}"),
]
# What is wrong inside a mapping, or between two keys → what is said of it.
MORE_WRONG: list[tuple[dict[str, Any], str]] = [
    (
        change("llama_7b", max_position_embeddings=4096),
        "max_position_embeddings=4096 and max_sequence_length=2048 are one setting; "
        "keep the value "
        "that the model was trained with",
    ),
    (
        nested("dbrx", "ffn_config", uniform_expert_assignment=True),
        f"ffn_config: uniform_expert_assignment=True {ONLY.format(False)}",
    ),
    (
        nested("dbrx", "ffn_config", moe_normalize_expert_weights=None),
        f"ffn_config: moe_normalize_expert_weights=None {ONLY.format('1.0 or 1')}",
    ),
    (
        nested("dbrx", "ffn_config", ffn_act_fn={"name": "silu", "beta": 2}),
        f"ffn_config: ffn_act_fn: beta=2 is not implemented; {DROPPED}",
    ),
    (
        change("dbrx", rope_parameters={"rope_theta": 5e5, "factor": 3.0}),
        f"rope_parameters: factor=3.0 is not implemented; {DROPPED}",
    ),
    (
        change("dbrx", rope_parameters={"rope_theta": 1e4}),
        f"rope_parameters: rope_theta=10000.0 {ONLY.format('None or 500000.0')}",
    ),
    (
        change("phi3_mini", rope_scaling={"type": "longrope", "long_factor": [1.0]}),
        f"rope_scaling: short_factor is missing; {FIX}",
    ),
    (
        change("phi3_mini", rope_scaling={"type": "longrope", "short_factor": [0, 1]}),
        "rope_scaling: short_factor=[0, 1] is not a list of numbers above 0; " + FIX,
    ),
    (
        change("phi3_mini", rope_scaling={"type": "yarn", "factor": 2.0}),
        "rope_type of yarn is not implemented; only longrope and default can be "
        "converted",
    ),
    (
        change("llama_7b", rope_scaling={"type": "proportional"}),
        "rope_scaling: rope_type='proportional' is not implemented; linear, dynamic, "
        "yarn, llama3, longrope and default can be converted",
    ),
    (
        change("smollm3_3b", no_rope_layers=[1, 0]),
        f"no_rope_layers does not name 36 layers; {FIX}",
    ),
    (
        change("smollm3_3b", layer_types=["sliding_attention"] * 36),
        "layer_types has 'sliding_attention', which is not implemented; only "
        "full_attention can be converted",
    ),
    (
        change(
            "llama_7b",
            rope_scaling={"type": "linear"},
            rope_parameters={"rope_theta": 1e4},
        ),
        f"rope_scaling={{'type': 'linear'}} is not implemented; {DROPPED}",
    ),
    (
        change("llama_7b", rope_scaling={"type": "linear", "factor": "x"}),
        f"rope_scaling: factor='x' is not a number of at least 1; {FIX}",
    ),
    (
        change("gemma3_1b", rope_parameters={"rope_theta": 1e6}),
        f"rope_parameters: rope_theta=1000000.0 is not implemented; {DROPPED}",
    ),
    (
        change("qwen3_0_6b", layer_types=["chunked_attention"] * 28),
        "layer_types has 'chunked_attention', which is not implemented; only "
        "sliding_attention and "
        "full_attention can be converted",
    ),
    (
        change("gemma2_2b", layer_types=["full_attention"]),
        f"layer_types does not name the kinds of 26 layers; {FIX}",
    ),
    (
        {
            k: v
            for k, v in PUBLISHED["bart_base"].items()
            if k != "encoder_attention_heads"
        },
        f"encoder_attention_heads is missing; {FIX}",  # transformers has 16 then
    ),
]


@pytest.mark.parametrize(("values", "message"), MORE_WRONG)
def test_what_does_not_agree_is_refused_by_name(values, message):
    assert refusal(values) == f"config.json: {message}"


@pytest.mark.parametrize(("name", "key", "value", "message"), WRONG)
def test_a_value_that_would_not_compute_the_same(name, key, value, message):
    assert (
        refusal(change(name, **{key: value}))
        == f"config.json: {key}={value!r} {message}"
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(
            (name, "num_hidden_layers")
            for name in ("llama_7b", "gemma2_2b", "gemma3_1b")
        ),
        *(("bart_base", key) for key in ("encoder_layers", "decoder_layers")),
        *(("t5_v1_1_small", key) for key in ("num_layers", "num_decoder_layers")),
    ],
)
def test_layers_without_end_are_refused_before_any_is_named(name, key):
    """A list of a billion kinds of layers would take gigabytes, and minutes."""
    values = change(name, **{key: 10**9})
    if name == "bart_base" and key == "encoder_layers":
        values.pop("num_hidden_layers", None)  # another name of it
    ending = f"is not a whole number up to 10,000; {FIX}"
    assert refusal(values) == f"config.json: {key}=1000000000 {ending}"


@pytest.mark.parametrize(
    ("name", "values", "described"),
    [
        (
            "mixtral_8x7b",
            {"num_local_experts": 10**9},
            "1,000,000,000 experts in each of 32 layers",
        ),
        ("llama_7b", {"num_hidden_layers": 10_000}, "10,000 layers"),
    ],
)
def test_more_than_files_can_hold_is_refused_before_any_is_named(
    name, values, described
):
    model, _ = settings(change(name, **values))
    family = find_family(PUBLISHED[name], "config.json")
    with pytest.raises(
        MaxlmError, match=f"{described}, where the files hold 2 tensors"
    ):
        family.list_entries(model, ["lm_head.weight", "model.norm.weight"])


def refusal(values: dict[str, Any], family: ModelFamily | None = None) -> str | None:
    """What is said of a config.json. Who tries many of one family passes it: finding it
    looks through all installed packages."""
    try:
        family = family or find_family(values, "config.json")
        family.read_config(values, "config.json")
    except MaxlmError as error:
        return str(error)
    return None


# Values of every kind that JSON has, and numbers at the edges of sizes and floats.
ODD_VALUES = (
    *(None, "", "x", [], [1], ["x"], {}, {"a": 1}, True, -1, 0, 1.5),
    *(10**9, 10**400, 1e-300, 1e400),
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "mscale": 1.0,
    "truncate": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
# Keys that a family reads where a file has them, and most published files do not.
RARE_KEYS = (
    *("architectures", "model_type", "id2label", "layer_types", "rope_scaling"),
    *("rope_parameters", "partial_rotary_factor", "max_position_embeddings"),
    *("head_dim", "num_key_value_heads", "sliding_window", "use_sliding_window"),
    *("sliding_window_pattern", "initializer_range", "init_std", "n_inner"),
    *("attention_dropout", "hidden_activation", "decoder_start_token_id"),
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_value_is_a_traceback(name):
    """Whatever stands at a key: it is taken, refused in one line, or refused by the
    model's own checks, which know where it was written."""
    values = PUBLISHED[name]
    family = find_family(values, "config.json")
    labelled = values | {
        "architectures": [family.hf_classifier],
        "id2label": {"0": "spam"},
    }
    for key in {*values, *RARE_KEYS}:
        for odd in ODD_VALUES:
            check_one_line(labelled | {key: odd}, family)
    for odd in ODD_VALUES:
        for key in ("architectures", "model_type"):
            message = refusal(values | {key: odd})
            assert message is None or message.startswith("config.json: ")


@pytest.mark.parametrize("name", ["llama_7b", "gemma3_1b", "phi_2", "mpt_7b", "dbrx"])
def test_no_nested_value_is_a_traceback(name):
    values = PUBLISHED[name]
    family = find_family(values, "config.json")
    sections = {key: part for key, part in values.items() if isinstance(part, dict)}
    for scaling in (YARN, LLAMA3):
        per_kind = {"full_attention": scaling, "sliding_attention": scaling}
        sections |= {"rope_scaling": scaling, "rope_parameters": per_kind}
        for section, inner in sections.items():
            for key in {*inner, *scaling}:
                for odd in ODD_VALUES:
                    check_one_line(values | {section: inner | {key: odd}}, family)


def check_one_line(values: dict[str, Any], family: ModelFamily) -> None:
    message = refusal(values, family)
    assert message is None or message.startswith("config.json: ")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama_7b", {"architectures": 0}, "architectures=0 is not a list of names"),
        ("qwen3_0_6b", {"layer_types": "x"}, "layer_types='x' is not a list of names"),
        ("llama_7b", {"rope_scaling": {"type": 1}}, "rope_type=1 is not a name"),
        (
            "phi_2",
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor=1.5 is not a number above 0 and at most 1",
        ),
        (
            "llama_7b",
            {
                "architectures": ["LlamaForSequenceClassification"],
                "id2label": ["spam"],
            },
            "id2label=['spam'] is not a mapping",
        ),
        (
            "gemma2_2b",
            {"hidden_size": 2**60},
            f"hidden_size={2**60} is not a whole number up to {2**53:,}",
        ),
    ],
)
def test_a_value_of_another_type_is_refused(name, values, message):
    assert message in (refusal(change(name, **values)) or "")


@pytest.mark.parametrize(
    "error", [ArithmeticError, AttributeError, KeyError, TypeError, ValueError]
)
def test_a_bug_of_a_family_is_a_traceback(error):
    """An error of our own code is not told as one of the file."""

    def read_wrongly(reader: ConfigReader, settings: dict[str, Any]) -> None:
        raise error("a bug")

    values = PUBLISHED["llama_7b"]
    family = replace(find_family(values, "config.json"), read_extra=read_wrongly)
    with pytest.raises(error, match="a bug"):
        family.read_config(values, "config.json")


def write_wrongly(config: Any) -> dict[str, Any]:
    raise AttributeError("a bug")


def test_a_bug_of_a_family_that_writes_is_a_traceback():
    model, _ = settings(PUBLISHED["llama_7b"])
    family = find_family(PUBLISHED["llama_7b"], "config.json")
    with pytest.raises(AttributeError, match="a bug"):
        find_inexpressible_setting(model, replace(family, write_extra=write_wrongly))


def test_a_part_that_a_model_lacks_is_named():
    """No family of experts writes a model that has none."""
    model, _ = settings(PUBLISHED["llama_7b"])
    for name, part in (
        ("mixtral_8x7b", "moe"),
        ("deepseek_v2_lite", "attention.latent"),
    ):
        family = find_family(PUBLISHED[name], "config.json")
        assert find_inexpressible_setting(model, family) == f"a model without {part}"


def always_turns_all_dimensions(name: str) -> bool:
    """Whether the published code turns whole heads, whatever a config.json says."""
    if name.startswith(
        ("gemma3", "gemma4", "olmo3")
    ):  # which read positions by kind of layer
        return True
    rope_kwargs = find_family(PUBLISHED[name], "config.json").rope_kwargs
    return rope_kwargs is not None and "partial" not in rope_kwargs


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in LAYOUTS
        if "rope_theta" in PUBLISHED[name] and always_turns_all_dimensions(name)
    ],
)
def test_partial_rotation_that_the_published_code_ignores(name):
    assert refusal(change(name, partial_rotary_factor=1.0)) is None
    want = f"partial_rotary_factor=0.5 {ONLY.format('1.0 or None')}"
    assert refusal(change(name, partial_rotary_factor=0.5)) == f"config.json: {want}"
    inside: dict[str, Any] = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    if name.startswith(("gemma3", "gemma4", "olmo3")):
        inside = {"sliding_attention": inside}
    plain_rope = {
        key: value for key, value in change(name).items() if key != "rope_scaling"
    }
    assert (refusal(plain_rope | {"rope_parameters": inside}) or "").endswith(want)


def test_caps_that_a_file_does_not_name():
    """Gemma 2 has them where the key is absent, and none where it is null."""
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    bare = {key: value for key, value in change("gemma2_2b").items() if key not in caps}
    model, _ = settings(bare)
    assert (model.attention.soft_cap, model.logit_cap) == (50.0, 30.0)
    model, _ = settings(bare | dict.fromkeys(caps))
    assert (model.attention.soft_cap, model.logit_cap) == (None, None)


def test_heads_of_global_layers_that_a_file_leaves_out():
    """Gemma 4's have 512 dimensions; or what ``per_layer_config`` says, in which
    transformers names only what is not as in local layers."""
    bare = change("gemma4_e4b")
    del bare["global_head_dim"]
    one_head = {str(layer): {"num_key_value_heads": 1} for layer in range(5, 42, 6)}
    for more, heads in (
        ({}, (512, 2)),
        ({"per_layer_config": {}}, (256, 2)),
        ({"per_layer_config": one_head}, (256, 1)),
    ):
        attention = settings(bare | more)[0].attention
        assert (attention.head_dim, attention.num_kv_heads) == heads


GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 4}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gemma3_1b", {"layer_types": ["full_attention"] * 26, "sliding_window": None}),
        ("gemma3_1b", {"layer_types": ["sliding_attention"] * 26}),
        ("deepseek_v2_lite", GROUPS),
        ("deepseek_v2_lite", {"first_k_dense_replace": 0}),
    ],
)
def test_rare_models_come_back(name, values):
    model, _ = settings(change(name, **values))
    family = find_family(change(name), "config.json")
    assert settings(family.write_config(model))[0] == model


def test_local_layers_without_positions_are_written_with_the_models():
    name = "gemma3_1b"
    model, _ = settings(change(name))
    kinds = [kind.model_copy(update={"positions": None}) for kind in model.pattern]
    shared = model.model_copy(update={"pattern": tuple(kinds)})
    written = find_family(change(name), "config.json").write_config(shared)
    thetas = {
        kind: rope["rope_theta"] for kind, rope in written["rope_parameters"].items()
    }
    assert thetas["sliding_attention"] == model.positions.theta
    assert thetas["full_attention"] == model.positions.theta


def test_null_says_nothing():
    more = {"rope_scaling": None, "experts_of_tomorrow": None, "use_mrope": None}
    values = change(
        "qwen2_5_7b", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}
    )
    assert settings(values | more)[0] == settings(PUBLISHED["qwen2_5_7b"])[0]


def test_dropout_is_told_of_wherever_it_stands():
    for name in ("mpt_7b", "dbrx"):
        _, notes = settings(nested(name, "attn_config", attn_pdrop=0.1))
        assert notes == ["attn_config.attn_pdrop=0.1: training here has no dropout"]


def test_mixtral_turns_slowly_where_it_does_not_say():
    values = {
        key: value
        for key, value in PUBLISHED["mixtral_8x7b"].items()
        if "theta" not in key
    }
    assert settings(values)[0] == settings(PUBLISHED["mixtral_8x7b"])[0]


def test_a_share_of_a_head_is_written_so_that_it_is_read_again():
    """int(head_dim * share), as the published code has it: 44 * (30 / 44) is below
    30."""
    for head in range(2, 257, 2):
        for size in range(2, head, 2):
            values = write_position_settings(
                PositionsConfig(kind="rope", rotary_dim=size), head
            )
            assert int(head * values["partial_rotary_factor"]) == size


@pytest.mark.parametrize("name", ["qwen3_next_80b_a3b", "qwen3_5_9b_text"])
def test_a_layer_that_predicts_further_tokens_is_left_out_in_one_note(name):
    family = find_family(PUBLISHED[name], "config.json")
    config, _ = settings(PUBLISHED[name])
    names = ["mtp.fc.weight", "mtp.layers.0.mlp.experts.3.up_proj.weight"]
    patterns = family.list_ignored_tensors(config)
    assert all(
        any(fnmatchcase(name, pattern) for pattern in patterns) for name in names
    )
    note = "left out: mtp (2 tensors), which predicts further tokens"
    assert family.describe_left_out(config, names) == [note]


def test_layers_of_kimi_linear_that_are_not_named_are_refused():
    numbers = PUBLISHED["kimi_linear_48b_a3b"]["linear_attn_config"]
    values = nested("kimi_linear_48b_a3b", "linear_attn_config", kda_layers=[1, 2])
    assert len(numbers["kda_layers"]) == 20
    with pytest.raises(MaxlmError, match="do not name 27 layers"):
        settings(values)
