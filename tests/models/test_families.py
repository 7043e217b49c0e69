"""Every family reads weights as published and computes the published function. What the
other implementation made of the same weights lies in golden/; tests/parity compares
with it at length."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.huggingface.convert import count_lead_axes
from maxlm.huggingface.families import FAMILIES, find_family
from maxlm.models.params import flatten_names, param_specs
from maxlm.sharding import AxisRules
from tests.models.published import CASES, golden
from tests.parity import compare

every = pytest.mark.parametrize("name", CASES)
# Families all of whose blocks others have: their files are read below all the same.
# Those that stay have a block of each kind: recurrences, experts by every rule of
# routing, chunks, norms over all heads, parallel heads, short convolutions.
MORE = str.split("""arcee bailing_hybrid bamba cohere cohere2 dots1 ernie4_5 ernie4_5_moe exaone4
    exaone4_global exaone_moe falcon_h1_plain falcon_mamba glm glm4 glm4_moe glm4_moe_lite
    gpt_bigcode gpt_neox gpt_neox_serial gptj granitemoe granitemoehybrid
    afmoe flex_olmo granitemoeshared helium hy_v3 lfm2_moe olmo vaultgemma ministral3
    glm_moe_dsa granitemoehybrid_dense hunyuan_v1_moe jamba kimi_k2 llama4_scout minimax_m2 ministral
    nemotron nemotron_h olmo2 olmoe olmo_hybrid opt phi3_longrope_short qwen2_moe qwen3_5
    qwen3_5_moe seed_oss smollm3 stablelm starcoder2 zamba zamba2 zamba2_plain""")
mostly = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.more) if n in MORE else n for n in CASES],
)
# T5 does not scale its scores: softmax is near a choice of one, and magnifies rounding.
# So do norms of a delta rule's outputs where a document begins: there these are one
# product of a query and a key that may be nearly at right angles. In float64 they agree
# to 1e-13 (tests/parity). Lightning attention's outputs are normed, too.
LOOSE = dict.fromkeys(("t5", "t5_v1_1", "ul2"), 1e-4) | dict.fromkeys(
    (
        *("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear"),
        *("bailing_hybrid", "minimax"),
    ),
    1e-4,
)


def read(name: str) -> tuple[Any, Any, Any]:
    """A case's family, its config in our words, and the entries of its table."""
    case = golden(name)
    family, config = compare.read(case.values, case.tensors)
    return family, config, family.list_entries(config, case.tensors)


def test_every_family_has_a_case():
    assert {read(name)[0].name for name in CASES} == set(FAMILIES.builtin_kinds())


@mostly
def test_the_published_logits(name):
    case = golden(name)
    _, config, entries = read(name)
    more: dict[str, Any] = {}
    if "types" in case.shown:
        more["types"] = case.shown["types"]
    source = case.shown.get("source")
    if source is not None:
        places = np.broadcast_to(np.arange(source.shape[1]), source.shape)
        more["inputs"] = (source, places, None)
    tensors = {key: value.astype(np.float32) for key, value in case.tensors.items()}
    params = compare.parameters(config, entries, tensors)
    got = compare.logits(config, params, case.shown["tokens"], **more)
    error = np.abs(got - case.logits).max() / np.abs(case.logits).max()
    assert error < LOOSE.get(name, 1e-5)


@every
def test_each_tensor_and_each_parameter_once(name):
    case = golden(name)
    _, config, entries = read(name)
    assert sorted(entry.theirs for entry in entries) == sorted(case.tensors)
    specs = flatten_names(
        param_specs(config.build(rules=AxisRules(), dtype=jnp.float32))
    )
    count_lead_axes(entries, {key: spec.shape for key, spec in specs.items()})
    for entry in entries:
        whole = case.tensors[entry.theirs].astype(np.float32)
        parts = entry.split(whole)
        for place, part in zip(entry.ours, parts, strict=True):
            assert part.shape == specs[place.name].shape[len(place.index) :], place
        np.testing.assert_array_equal(entry.join(parts), whole)
        assert entry.join(parts).shape == entry.shape


@every
def test_config_comes_back(name):
    family, config, _ = read(name)
    values = family.write_config(config)
    assert find_family(values, "config.json") is family
    assert compare.read(values)[1] == config


@every
def test_no_setting_is_passed_over(name):
    values = golden(name).values | {"attention_of_tomorrow": True}
    with pytest.raises(
        MaxlmError, match="attention_of_tomorrow=True is not implemented"
    ):
        compare.read(values)
