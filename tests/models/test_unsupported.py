"""A config.json of a model type that is not supported is told what it needs, in one
line."""

from pathlib import Path

import pytest

from maxlm.config import MaxlmError
from maxlm.huggingface.families import FAMILIES, find_family
from maxlm.huggingface.families.unsupported import KNOWN_UNSUPPORTED

LINE = 100
"""Most characters of what a model type needs, so that a message is one line."""


def refusal(**values: object) -> str:
    with pytest.raises(MaxlmError) as error:
        find_family(values, "config.json")
    return str(error.value)


def test_no_supported_type_is_listed_as_unsupported():
    supported = {
        model_type
        for _, family in FAMILIES.items()
        for model_type in (family.model_type, *family.other_model_types)
    }
    assert not supported & KNOWN_UNSUPPORTED.keys()


def test_each_entry_is_one_line_and_names_a_family():
    for model_type, (needs, nearest) in KNOWN_UNSUPPORTED.items():
        assert 10 < len(needs) < LINE, model_type
        assert needs == " ".join(needs.split()), model_type
        assert nearest in FAMILIES.builtin_kinds(), model_type
        assert model_type == model_type.strip().lower()


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "modernbert-decoder"},
        {
            "model_type": "modernbert-decoder",
            "architectures": ["ModernBertDecoderForCausalLM"],
        },
        {"architectures": ["ModernBertDecoderForCausalLM"]},
    ],
)
def test_a_known_type_is_told_what_it_needs_and_which_family_is_near(values):
    message = refusal(**values)
    assert message.startswith("config.json: the architecture ")
    assert message.endswith(
        "is not supported: modernbert-decoder needs a first layer without a norm; "
        "convert a model of a supported family, the nearest is Gemma3ForCausalLM"
    )
    assert "\n" not in message


def test_a_type_that_needs_a_file_alone_is_told_where_to_read_how():
    assert refusal(model_type="jais2").endswith(
        "the nearest is NemotronForCausalLM, or write that file (docs/convert.md)"
    )


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("LLaMAForCausalLM", "LlamaForCausalLM"),
        ("Qwen_2ForCausalLM", "Qwen2ForCausalLM"),
    ],
)
def test_a_misspelt_class_is_told_the_right_one(architecture, name):
    assert refusal(architectures=[architecture]) == (
        f"config.json: the architecture {architecture} is not supported; "
        f"did you mean {name}?"
    )


def test_a_near_model_type_is_told_where_no_class_is_near():
    assert refusal(model_type="qwen3_nexd", architectures=["XyzzyForCausalLM"]) == (
        "config.json: the architecture XyzzyForCausalLM is not supported; "
        "did you mean Qwen3NextForCausalLM?"
    )


def test_any_other_type_is_told_where_the_supported_are_listed():
    assert refusal(model_type="xyzzy", architectures=["XyzzyForCausalLM"]) == (
        "config.json: the architecture XyzzyForCausalLM is not supported; "
        "docs/families.md lists those that are, docs/convert.md says how to add one"
    )
    page = Path(__file__).parents[2] / "docs" / "families.md"
    listed = page.read_text()
    for kind in FAMILIES.builtin_kinds():
        assert f"`{FAMILIES.get(kind).hf_architecture}`" in listed
