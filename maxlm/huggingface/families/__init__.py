"""Families of published models: their configurations and their names, both ways.

To add one, write its file and name it in ``FAMILIES``, or register it from outside:
``FAMILIES.register("name", ModelFamily(...))``, or an installed package's entry point
of the group ``maxlm.families``.
"""

from collections.abc import Mapping
from typing import Any

from maxlm.config import MaxlmError
from maxlm.config.registry import Registry
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.reader import ConfigReader

_FOLDER = "maxlm.huggingface.families"
FAMILIES = Registry[ModelFamily](
    "family",
    {
        "gpt2": f"{_FOLDER}.gpt2:GPT2",
        "llama": f"{_FOLDER}.llama:LLAMA",
        "mistral": f"{_FOLDER}.llama:MISTRAL",
        "qwen2": f"{_FOLDER}.qwen:QWEN2",
        "qwen3": f"{_FOLDER}.qwen:QWEN3",
        "qwen3_moe": f"{_FOLDER}.qwen:QWEN3_MOE",
        "gemma": f"{_FOLDER}.gemma:GEMMA",
        "gemma2": f"{_FOLDER}.gemma:GEMMA2",
        "gemma3": f"{_FOLDER}.gemma:GEMMA3",
        "falcon": f"{_FOLDER}.bloom:FALCON",
        "phi": f"{_FOLDER}.phi:PHI",
        "phi3": f"{_FOLDER}.phi:PHI3",
        "bloom": f"{_FOLDER}.bloom:BLOOM",
        "mpt": f"{_FOLDER}.mosaic:MPT",
        "mixtral": f"{_FOLDER}.llama:MIXTRAL",
        "grok1": f"{_FOLDER}.grok:GROK1",
        "dbrx": f"{_FOLDER}.mosaic:DBRX",
        "deepseek_v2": f"{_FOLDER}.deepseek:DEEPSEEK_V2",
        "deepseek_v3": f"{_FOLDER}.deepseek:DEEPSEEK_V3",
        "gpt_oss": f"{_FOLDER}.gpt_oss:GPT_OSS",
        "glm4_moe": f"{_FOLDER}.glm_moe:GLM4_MOE",
        "qwen2_moe": f"{_FOLDER}.qwen_moe:QWEN2_MOE",
        "dots1": f"{_FOLDER}.dots:DOTS1",
        "llama4": f"{_FOLDER}.llama4:LLAMA4",
        "olmoe": f"{_FOLDER}.olmoe:OLMOE",
        "minimax_m2": f"{_FOLDER}.minimax:MINIMAX_M2",
        "granitemoe": f"{_FOLDER}.granite_moe:GRANITE_MOE",
        "ernie4_5_moe": f"{_FOLDER}.ernie_moe:ERNIE4_5_MOE",
        "exaone_moe": f"{_FOLDER}.exaone_moe:EXAONE_MOE",
        "hunyuan_v1_moe": f"{_FOLDER}.hunyuan_moe:HUNYUAN_V1_MOE",
        "ministral": f"{_FOLDER}.ministral:MINISTRAL",
        "stablelm": f"{_FOLDER}.stablelm:STABLELM",
        "starcoder2": f"{_FOLDER}.starcoder2:STARCODER2",
        "cohere": f"{_FOLDER}.cohere:COHERE",
        "glm": f"{_FOLDER}.glm:GLM",
        "glm4": f"{_FOLDER}.glm:GLM4",
        "ernie4_5": f"{_FOLDER}.ernie:ERNIE4_5",
        "seed_oss": f"{_FOLDER}.seed_oss:SEED_OSS",
        "cohere2": f"{_FOLDER}.cohere:COHERE2",
        "smollm3": f"{_FOLDER}.smollm3:SMOLLM3",
        "olmo2": f"{_FOLDER}.olmo:OLMO2",
        "olmo3": f"{_FOLDER}.olmo:OLMO3",
        "exaone4": f"{_FOLDER}.exaone:EXAONE4",
        "granite": f"{_FOLDER}.granite:GRANITE",
        "hunyuan_v1_dense": f"{_FOLDER}.hunyuan:HUNYUAN_V1_DENSE",
        "arcee": f"{_FOLDER}.arcee:ARCEE",
        "nemotron": f"{_FOLDER}.nemotron:NEMOTRON",
        "bert": f"{_FOLDER}.bert:BERT",
        "t5": f"{_FOLDER}.t5:T5",
        "bart": f"{_FOLDER}.bart:BART",
    },
    plural="families",
)


def find_family(hf_config: Mapping[str, Any], source: str) -> ModelFamily:
    """Returns the family that a config.json is of."""
    names = ConfigReader(hf_config, source).names("architectures")
    kind = hf_config.get("model_type")
    for _, family in FAMILIES.items():
        known = {
            family.hf_architecture,
            family.hf_classifier,
            *family.other_hf_architectures,
        }
        if not (known & {*names} or (not names and kind == family.model_type)):
            continue
        if kind not in (None, family.model_type, *family.other_model_types):
            message = f"model_type={kind!r} is not that of {family.hf_architecture}"
            raise MaxlmError(
                message, where=source, fix="take it from the published model"
            )
        return family
    named = ", ".join(names) or f"model_type={kind!r}"
    supported = [family.hf_architecture for _, family in FAMILIES.items()]
    # LLaMAForCausalLM is in early files.
    near = [name for name in supported if name.lower() == named.lower()]
    message = f"the architecture {named} is not supported"
    if near:
        fix = f"did you mean {near[0]}?"
    else:
        fix = f"supported are {', '.join(supported)}"
    raise MaxlmError(message, where=source, fix=fix)
