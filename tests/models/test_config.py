"""Impossible models are refused when their config is read."""

import pytest
from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.layers.attention import AttentionConfig
from tests.models.building import GPT2, LLAMA_GQA


def refused(config: DecoderConfig, **changes) -> str:
    tree = config.model_dump()
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for name in path:
            node = node[name]
        node[last] = value
    with pytest.raises(ValidationError) as error:
        DecoderConfig.model_validate(tree)
    (only,) = error.value.errors()
    return f"{'.'.join(map(str, only['loc']))}: {only['msg']}"


def test_query_heads_must_be_a_multiple_of_kv_heads():
    with pytest.raises(MaxlmError) as error:
        AttentionConfig(num_heads=4, num_kv_heads=3, head_dim=6)
    assert str(error.value) == (
        "num_heads=4 is not a multiple of num_kv_heads=3; let every kv head serve as many query "
        "heads as the others"
    )


def test_rope_needs_pairs():
    assert refused(LLAMA_GQA, attention__head_dim=7) == (
        ": Value error, rope needs an even head_dim, not 7"
    )
    assert GPT2.attention.head_dim % 2  # learned positions do not


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "num_layers",
        "d_model",
        "max_seq_len",
        "init_std",
        "attention__num_heads",
        "attention__num_kv_heads",
        "attention__head_dim",
        "mlp__d_ff",
        "norm__eps",
        "positions__theta",
    ],
)
def test_sizes_are_positive(key):
    dotted = key.replace("__", ".")
    assert refused(LLAMA_GQA, **{key: 0}) == f"{dotted}: Input should be greater than 0"


def test_unknown_keys_and_names_are_refused():
    assert refused(LLAMA_GQA, dropout=0.1) == "dropout: Extra inputs are not permitted"
    assert refused(LLAMA_GQA, remat="some") == (
        "remat: Input should be 'none', 'full', 'attention', 'mlp' or 'matmuls'"
    )
