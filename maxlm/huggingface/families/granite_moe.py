"""Granite 3's mixtures of experts (IBM Granite Team 2024, "Granite 3.0 Language
Models"): Llama's shape with factors on embeddings, scores, branches and logits; all
experts of a layer in one tensor, or beside them a shared one."""

from dataclasses import replace
from typing import Any

from maxlm.huggingface.families import fields, granite, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import join_experts, linear
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

M = "model.layers.{layer}.block_sparse_moe"
_SHARED = "model.layers.{layer}.shared_mlp"
TABLE = {
    **llama.OUTER,
    **llama.NORMS,
    **llama.ATTENTION,
    f"{M}.router.layer.weight": linear("moe.router"),
    f"{M}.input_linear.weight": join_experts("moe.gate", "moe.up", inputs_first=False),
    f"{M}.output_linear.weight": join_experts("moe.down", inputs_first=False),
}
GRANITE_MOE = ModelFamily(
    "granitemoe",
    "GraniteMoeForCausalLM",
    {
        **llama.COMMON,
        **llama.EXPERTS,
        **granite.MULTIPLIERS,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "attention_bias": fields.map_flag("attention.bias", False),
        "num_local_experts": fields.map_size("moe.num_experts"),
        "intermediate_size": fields.map_size("moe.d_ff"),
    },
    TABLE,
    rope_kwargs={},
)


def _read_shared(reader: ConfigReader, settings: dict[str, Any]) -> None:
    width = reader.size("shared_intermediate_size", 0, least=0)
    if width:
        settings["moe"] |= {"shared_experts": 1, "shared_d_ff": width}


def _write_shared(config: TransformerConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    width = moe.shared_d_ff or moe.shared_experts * moe.d_ff
    return {"shared_intermediate_size": width if moe.shared_experts else 0}


GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    name="granitemoeshared",
    hf_architecture="GraniteMoeSharedForCausalLM",
    name_table={
        **TABLE,
        f"{_SHARED}.input_linear.weight": linear(
            "moe.shared.gate.kernel", "moe.shared.up.kernel"
        ),
        f"{_SHARED}.output_linear.weight": linear("moe.shared.down.kernel"),
    },
    read_extra=_read_shared,
    write_extra=_write_shared,
)
